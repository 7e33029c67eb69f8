use std::collections::{BTreeMap, BTreeSet};

use dispatcher_common::reason::Reason;

use super::*;
use crate::{control::shown_counter, dataplane};

/// A sample: its labels in their order, and its value.
type Sample = (Vec<(String, String)>, f64);

fn is_name(text: &str) -> bool {
    text.bytes()
        .enumerate()
        .all(|(i, byte)| byte.is_ascii_alphabetic() || byte == b'_' || (i > 0 && byte.is_ascii_digit()))
        && !text.is_empty()
}

/// `name="value",...` between braces, with escapes; what follows the closing brace.
fn labels_of(mut text: &str) -> (Vec<(String, String)>, &str) {
    let mut found = Vec::new();
    loop {
        let (name, rest) = text.split_once("=\"").expect("a label");
        assert!(is_name(name), "{name}");
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next().expect("a closing quote") {
                (_, '\\') => value.push(match chars.next().expect("an escape").1 {
                    'n' => '\n',
                    c @ ('"' | '\\') => c,
                    c => panic!("no escape: {c}"),
                }),
                (at, '"') => break at + 1,
                (_, '\n') => panic!("a label over two lines"),
                (_, c) => value.push(c),
            }
        };
        found.push((name.to_owned(), value));
        text = &rest[end..];
        match text.strip_prefix(',') {
            Some(rest) => text = rest,
            None => return (found, text.strip_prefix('}').expect("a closing brace")),
        }
    }
}

/// The families by name of sample. Panics at anything that OpenMetrics does not allow, of what we use of it.
fn parse(text: &str) -> BTreeMap<String, Vec<Sample>> {
    let body = text.strip_suffix("# EOF\n").expect("the end is told");
    let mut samples: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let (mut family, mut helped, mut suffixes): (_, _, &[&str]) = ("", "", &[]);
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help");
            assert!(is_name(name) && !help.is_empty() && seen.insert(name), "{line}");
            (helped, family) = (name, "");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(name, helped, "{line}");
            family = name;
            suffixes = match kind {
                "counter" => &["_total"],
                "gauge" => &[""],
                "info" => &["_info"],
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => panic!("{line}"),
            };
        } else {
            let end = line.find(['{', ' ']).expect("a value");
            let name = &line[..end];
            let suffix = name.strip_prefix(family).filter(|_| !family.is_empty());
            assert!(suffix.is_some_and(|one| suffixes.contains(&one)), "{line} is not of {family}");
            let (labels, rest) = match line[end..].strip_prefix('{') {
                Some(rest) => labels_of(rest),
                None => (Vec::new(), &line[end..]),
            };
            let value: f64 = rest.strip_prefix(' ').expect("a blank").parse().expect("a number");
            assert!(value.is_finite() && value >= 0.0, "{line}");
            let of_name = samples.entry(name.to_owned()).or_default();
            assert!(of_name.iter().all(|(other, _)| *other != labels), "{line} is there twice");
            of_name.push((labels, value));
        }
    }
    samples
}

fn backend(name: &str, state: &str) -> api::Backend {
    api::Backend {
        deadline_seconds: None,
        open: None,
        name: name.into(),
        service: "web".into(),
        id: 1,
        index: 0,
        addresses: Vec::new(),
        state: state.into(),
        reason: None,
        weight: 3,
        share: Some(0.25),
        connections: 10,
        hits: 1,
        misses: 2,
        fresh: 3,
        nonsecure: 4,
        established: 9,
        refused: 5,
        learned: 6,
        connect_ms: Some(0.5),
        response_ms: None,
    }
}

fn snapshot(backends: Vec<api::Backend>) -> Snapshot {
    let events = api::Events { miss: 1, held: 2, released: 3, refused: 4, learned: 5, rejected: 6, swept: 7 };
    let status = api::Status {
        pin: None,
        version: "1.2.3".into(),
        abi: 9,
        uptime_seconds: 60,
        interfaces: vec![dataplane::Attached {
            name: "eth0".into(),
            ifindex: 2,
            mode: dataplane::AttachMode::Native,
        }],
        memory_bytes: 1 << 20,
        services: 1,
        backends: backends.len(),
        backends_up: 1,
        connections: 0,
        hits: 0,
        misses: 0,
        fresh: 0,
        nonsecure: 0,
        learned: 0,
        heartbeat_age_ms: 250,
        cookie_epoch: 0,
        events,
    };
    let reasons = Reason::ALL.iter().map(|reason| shown_counter((*reason, *reason as u64 + 100))).collect();
    let health = [("10.0.0.1:443", true), ("[fd00::1]:443", false)].map(|(address, healthy)| Checked {
        service: "web".into(),
        backend: "a".into(),
        address: address.into(),
        healthy,
    });
    let (counters, health) = (api::Counters { reasons }, health.into());
    let mut times = BackendTimes::default();
    (times.connect.buckets[1], times.connect.buckets[23], times.connect.sum) = (2, 1, 9_000_000_000);
    let times = vec![times; backends.len()];
    let mut refused = [0; Refusal::ALL.len()];
    refused[1] = 12;
    let served = Counted {
        accepted: 9,
        open: 4,
        refused,
        requests: [[0, 1, 0, 0, 0], [0, 7, 0, 0, 2]],
        retried: 3,
        times: Histogram::default(),
    };
    let tunnels = Status {
        backend: 1,
        name: "shop/a".into(),
        established: 4,
        error: Some(("refused".into(), std::time::SystemTime::UNIX_EPOCH)),
        handshakes: 6,
        failed: 1,
    };
    let (served, tunnels) = (vec![("shop".into(), served)], vec![tunnels]);
    let share = api::QosShare {
        service: "shop".into(),
        backend: "a".into(),
        class: "gold".into(),
        weight_percent: 80.0,
        share_percent: Some(75.0),
        in_flight: 1,
        queued: 2,
        admitted: 3,
        borrowed: 4,
        shed: 5,
        late: 6,
        cancelled: 7,
        wait_p50_ms: None,
        wait_p99_ms: None,
        bytes: 8,
        borrowed_bytes: 9,
        dropped_bytes: 10,
        connections: 11,
        connections_over: 12,
    };
    let shares = vec![(share, Histogram::default())];
    let certificates = vec![("shop".into(), "/etc/shop.pem".into(), 1_580_515_200)];
    let sessions = [77, 5];
    Snapshot { status, counters, backends, times, health, sessions, served, certificates, tunnels, shares }
}

fn value(samples: &BTreeMap<String, Vec<Sample>>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let of_name = samples.get(name).unwrap_or_else(|| panic!("no {name}"));
    let same = |found: &[(String, String)]| {
        found.iter().map(|(key, value)| (key.as_str(), value.as_str())).eq(labels.iter().copied())
    };
    of_name
        .iter()
        .find(|(found, _)| same(found))
        .unwrap_or_else(|| panic!("{name} has no {labels:?}: {of_name:?}"))
        .1
}

#[test]
fn clients_requests_and_tunnels_are_there() {
    let samples = parse(&snapshot(vec![backend("a", "up")]).text().expect("a text"));
    let shop = ("service", "shop");
    let backend = [shop, ("backend", "a")];
    for (name, labels, number) in [
        ("dispatcher_clients_total", &[shop][..], 9.0),
        ("dispatcher_clients_open", &[shop], 4.0),
        ("dispatcher_clients_refused_total", &[shop, ("reason", "handshake")], 12.0),
        ("dispatcher_clients_refused_total", &[shop, ("reason", "limit")], 0.0),
        ("dispatcher_requests_total", &[shop, ("way", "clear"), ("code", "2xx")], 1.0),
        ("dispatcher_requests_total", &[shop, ("way", "tunnel"), ("code", "5xx")], 2.0),
        ("dispatcher_requests_retried_total", &[shop], 3.0),
        ("dispatcher_request_seconds_count", &[shop], 0.0),
        (
            "dispatcher_certificate_not_after_timestamp_seconds",
            &[shop, ("file", "/etc/shop.pem")],
            1_580_515_200.0,
        ),
        ("dispatcher_tunnels", &backend, 4.0),
        ("dispatcher_tunnels_failing", &backend, 1.0),
        ("dispatcher_tunnel_handshakes_total", &backend, 6.0),
        ("dispatcher_tunnel_failures_total", &backend, 1.0),
    ] {
        assert_eq!(value(&samples, name, labels), number, "{name} {labels:?}");
    }
}

#[test]
fn classes_are_there() {
    let samples = parse(&snapshot(vec![backend("a", "up")]).text().expect("a text"));
    let of = [("service", "shop"), ("backend", "a"), ("class", "gold")];
    for (name, number) in [
        ("weight_share", 0.8),
        ("share", 0.75),
        ("in_flight", 1.0),
        ("queued", 2.0),
        ("admitted_total", 3.0),
        ("borrowed_total", 4.0),
        ("shed_total", 5.0),
        ("late_total", 6.0),
        ("cancelled_total", 7.0),
        ("passed_bytes_total", 8.0),
        ("borrowed_bytes_total", 9.0),
        ("dropped_bytes_total", 10.0),
        ("connections_total", 11.0),
        ("connections_over_total", 12.0),
        ("wait_seconds_count", 0.0),
    ] {
        assert_eq!(value(&samples, &format!("dispatcher_class_{name}"), &of), number, "{name}");
    }
}

#[test]
fn every_reason_is_there_and_the_text_parses() {
    let samples = parse(&snapshot(vec![backend("a", "up")]).text().expect("a text"));
    assert_eq!(samples["dispatcher_packets_total"].len(), Reason::ALL.len());
    for reason in Reason::ALL {
        let counter = shown_counter((*reason, 0));
        let labels = [("reason", reason.name()), ("kind", counter.kind.as_str())];
        assert_eq!(value(&samples, "dispatcher_packets_total", &labels), f64::from(*reason as u32 + 100));
    }
    let of_a = [("service", "web"), ("backend", "a")];
    for (name, expected) in [
        ("connections_total", 10.0),
        ("hits_total", 1.0),
        ("misses_total", 2.0),
        ("fresh_total", 3.0),
        ("nonsecure_total", 4.0),
        ("established_total", 9.0),
        ("refused_total", 5.0),
        ("learned_total", 6.0),
        ("weight", 3.0),
        ("share", 0.25),
    ] {
        assert_eq!(value(&samples, &format!("dispatcher_backend_{name}"), &of_a), expected, "{name}");
    }
    for (address, expected) in [("10.0.0.1:443", 1.0), ("[fd00::1]:443", 0.0)] {
        let labels = [of_a[0], of_a[1], ("address", address)];
        assert_eq!(value(&samples, "dispatcher_backend_healthy", &labels), expected, "{address}");
    }
    for (bound, expected) in [("0.000001024", 0.0), ("0.000002048", 2.0), ("+Inf", 3.0)] {
        let labels = [("le", bound), of_a[0], of_a[1]];
        let found = value(&samples, "dispatcher_backend_connect_seconds_bucket", &labels);
        assert_eq!(found, expected, "{bound}");
    }
    assert_eq!(value(&samples, "dispatcher_backend_connect_seconds_sum", &of_a), 9.0);
    assert_eq!(value(&samples, "dispatcher_backend_response_seconds_count", &of_a), 0.0);
    let events = ["miss", "held", "released", "refused", "learned", "rejected", "swept"];
    for (number, event) in events.iter().enumerate() {
        let found = value(&samples, "dispatcher_events_total", &[("event", event)]);
        assert_eq!(found, (number + 1) as f64, "{event}");
    }
    assert_eq!(value(&samples, "dispatcher_heartbeat_age_seconds", &[]), 0.25);
    assert_eq!(value(&samples, "dispatcher_uptime_seconds", &[]), 60.0);
    assert_eq!(value(&samples, "dispatcher_sessions", &[]), 77.0);
    assert_eq!(value(&samples, "dispatcher_provisional_sessions", &[]), 5.0);
    assert_eq!(value(&samples, "dispatcher_maps_bytes", &[]), f64::from(1 << 20));
    let attached = [("interface", "eth0"), ("mode", "native")];
    assert_eq!(value(&samples, "dispatcher_interface_info", &attached), 1.0);
    assert_eq!(value(&samples, "dispatcher_build_info", &[("version", "1.2.3"), ("abi", "9")]), 1.0);
}

#[test]
fn each_backend_has_one_state() {
    let known = STATES.iter().map(|state| backend(state, state));
    let backends = known.chain([backend("other", "unheard-of")]).collect();
    let samples = parse(&snapshot(backends).text().expect("a text"));
    for state in STATES.into_iter().chain(["unheard-of"]) {
        let name = if state == "unheard-of" { "other" } else { state };
        let of = [("service", "web"), ("backend", name)];
        let labels = [of[0], of[1], ("state", state)];
        assert_eq!(value(&samples, "dispatcher_backend_state", &labels), 1.0, "{state}");
        let of_backend = samples["dispatcher_backend_state"].iter().filter(|(found, _)| found[1].1 == name);
        assert_eq!(of_backend.map(|(_, value)| value).sum::<f64>(), 1.0, "{state}");
    }
}

#[test]
fn names_with_special_characters_are_escaped() {
    let name = "a\"b\\c\nd";
    let samples = parse(&snapshot(vec![backend(name, "up")]).text().expect("a text"));
    assert_eq!(value(&samples, "dispatcher_backend_weight", &[("service", "web"), ("backend", name)]), 3.0);
}

#[test]
fn the_table_of_names_is_complete() {
    let documented = include_str!("../../../../docs/operations.md");
    for name in parse(&snapshot(vec![backend("a", "up")]).text().expect("a text")).keys() {
        let parts = ["_bucket", "_sum", "_count"];
        let name = parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name);
        assert!(documented.contains(&format!("`{name}")), "{name} is not in docs/operations.md");
    }
}
