use super::*;
use crate::config;

fn status(uptime_seconds: u64) -> api::Status {
    api::Status {
        version: "1".into(),
        abi: 1,
        uptime_seconds,
        interfaces: Vec::new(),
        memory_bytes: 0,
        pin: None,
        services: 2,
        backends: 2,
        backends_up: 2,
        connections: 0,
        hits: 0,
        misses: 0,
        fresh: 0,
        nonsecure: 0,
        learned: 0,
        heartbeat_age_ms: 0,
        cookie_epoch: 0,
        events: api::Events::default(),
    }
}

fn service(name: &str, mode: config::Mode) -> api::Service {
    api::Service {
        name: name.into(),
        id: 1,
        vips: Vec::new(),
        protocol: config::Protocol::Tcp,
        mode,
        miss: config::Miss::Table,
        source: "client".into(),
        proxy_protocol: "off".into(),
        balance: crate::balancer::Balance::Maglev,
        table_size: 1,
        refused_options: Vec::new(),
        backends: 1,
        backends_up: 1,
    }
}

fn backend(service: &str, name: &str, connections: u64, hits: u64) -> api::Backend {
    let backend = crate::ctl::tests::backend("up", 0, None);
    api::Backend { service: service.into(), name: name.into(), connections, hits, ..backend }
}

fn tunnel(id: u32, requests: u64, bytes: u64) -> api::Tunnel {
    api::Tunnel {
        id,
        service: "shop".into(),
        backend: "a".into(),
        source: ([10, 0, 0, 1], 1).into(),
        destination: ([10, 0, 0, 2], 443).into(),
        version: "TLSv1_3".into(),
        cipher_suite: "TLS13_AES_256_GCM_SHA384".into(),
        group: None,
        alpn: None,
        age_seconds: 1,
        sessions: 0,
        requests,
        in_flight: 3,
        sent_bytes: bytes,
        received_bytes: bytes,
        state: "open".into(),
    }
}

pub(in crate::ctl) fn share(class: &str, admitted: u64, bytes: u64) -> api::QosShare {
    api::QosShare {
        service: "web".into(),
        backend: "a".into(),
        class: class.into(),
        weight_percent: 75.0,
        share_percent: Some(70.25),
        in_flight: 2,
        queued: 5,
        admitted,
        borrowed: 0,
        shed: 1,
        late: 0,
        cancelled: 0,
        wait_p50_ms: Some(0.5),
        wait_p99_ms: Some(12.25),
        bytes,
        borrowed_bytes: 0,
        dropped_bytes: bytes / 2,
        connections: 0,
        connections_over: 0,
    }
}

/// What is read, `after` that many milliseconds, when all has counted so far.
fn reading(began: Instant, after: u64, n: u64) -> Reading {
    let reason = |kind: &str, packets| api::Counter {
        number: 0,
        name: kind.into(),
        kind: kind.into(),
        packets,
        description: String::new(),
    };
    Reading {
        at: began + Duration::from_millis(after),
        status: status(100 + after / 1000),
        counters: api::Counters {
            reasons: vec![reason("forward", 1000 * n), reason("drop", n), reason("drop", n)],
        },
        services: vec![service("web", config::Mode::Passthrough), service("shop", config::Mode::Terminate)],
        backends: vec![
            backend("web", "a", 20 * n, 10 * n),
            backend("web", "b", 4 * n, 0),
            backend("shop", "a", 0, 0),
        ],
        tunnels: vec![tunnel(1, 10 * n, 100 * n), tunnel(2, 20 * n, 0)],
        shares: vec![share("gold", 8 * n, 2000 * n), share("bronze", 2 * n, 0)],
        clients: BTreeMap::from([("shop".to_owned(), 6 * n)]),
        requests: BTreeMap::from([("shop".to_owned(), 40 * n)]),
    }
}

/// What is answered to the requests of a reading.
pub(in crate::ctl) fn answers(n: u64) -> Vec<String> {
    let Reading { status, counters, services, backends, tunnels, shares, .. } = reading(Instant::now(), 0, n);
    fn text(value: &impl serde::Serialize) -> String {
        serde_json::to_string(value).expect("json")
    }
    let metrics = format!("dispatcher_clients_total{{service=\"shop\"}} {n}\n# EOF\n");
    vec![
        text(&status),
        text(&counters),
        text(&services),
        text(&backends),
        text(&tunnels),
        text(&shares),
        metrics,
    ]
}

#[test]
fn rates_are_differences_by_the_time_between() {
    let began = Instant::now();
    let (before, now) = (reading(began, 0, 1), reading(began, 2000, 2));
    let top = Pair { before: &before, now: &now }.top();
    assert_eq!((top.seconds, top.uptime_seconds, top.error.as_deref()), (2.0, Some(102), None));
    assert_eq!(
        (top.forward_per_second, top.drop_per_second, top.pass_per_second),
        (Some(500.0), Some(1.0), Some(0.0))
    );
    let [web, shop] = top.services.as_slice() else { panic!("two services") };
    assert_eq!((web.connections_per_second, web.hits_per_second), (Some(12.0), Some(5.0)));
    assert_eq!((web.requests_per_second, web.bytes_per_second), (None, Some(1000.0)));
    assert_eq!(shop.hits_per_second, None, "nobody counts that");
    assert_eq!((shop.connections_per_second, shop.requests_per_second), (Some(3.0), Some(20.0)));
    let [a, b, other] = top.backends.as_slice() else { panic!("three backends") };
    assert_eq!((a.connections_per_second, a.hits_per_second, a.queued), (Some(10.0), Some(5.0), 10));
    assert_eq!((a.requests_per_second, a.in_flight, a.bytes_per_second), (None, None, Some(1000.0)));
    assert_eq!((b.queued, b.bytes_per_second), (0, None), "nothing is counted of it");
    assert_eq!(
        (other.requests_per_second, other.in_flight, other.bytes_per_second),
        (Some(15.0), Some(6), Some(100.0))
    );
    let [gold, bronze] = top.classes.as_slice() else { panic!("two classes") };
    assert_eq!((gold.admitted_per_second, gold.bytes_per_second), (Some(4.0), Some(1000.0)));
    assert_eq!((bronze.admitted_per_second, bronze.shed_per_second), (Some(1.0), Some(0.0)));
    assert_eq!(gold.dropped_bytes_per_second, Some(500.0));
}

#[test]
fn what_was_counted_anew_has_no_rate() {
    let began = Instant::now();
    let (before, mut now) = (reading(began, 0, 5), reading(began, 1000, 6));
    // Another daemon: its own counters fell, or have not been there; those of the data path went on.
    now.status.uptime_seconds = 1;
    now.clients = BTreeMap::from([("shop".to_owned(), 2)]);
    now.requests.clear();
    now.shares[0].admitted = 3;
    now.backends.push(backend("web", "new", 7, 7));
    let top = Pair { before: &before, now: &now }.top();
    assert_eq!((top.services[1].connections_per_second, top.services[1].requests_per_second), (None, None));
    assert_eq!((top.backends[2].requests_per_second, top.backends[2].in_flight), (None, Some(6)));
    assert_eq!((top.classes[0].admitted_per_second, top.classes[0].bytes_per_second), (None, Some(2000.0)));
    assert_eq!(top.backends[3].connections_per_second, None);
    assert_eq!(top.services[0].connections_per_second, Some(24.0));
    let text = page(&top, None, None);
    let shop = text.lines().find(|line| line.starts_with("shop")).expect("a line");
    assert_eq!(
        shop.split_whitespace().collect::<Vec<_>>(),
        ["shop", "terminate", "-", "-", "-", "-", "-", "1/1"]
    );
    // A tunnel that was closed takes nothing away, and one that is new has all that it counted.
    let mut now = reading(began, 1000, 6);
    now.tunnels = vec![tunnel(2, 120, 0), tunnel(3, 7, 0)];
    let top = Pair { before: &before, now: &now }.top();
    assert_eq!(top.backends[2].requests_per_second, Some(27.0));
}

#[test]
fn it_fits_the_terminal() {
    let began = Instant::now();
    let (mut before, mut now) = (reading(began, 0, 1), reading(began, 1000, 2));
    for n in 0..40 {
        let name = format!("backend-{n}");
        before.backends.push(backend("web", &name, 0, 0));
        now.backends.push(backend("web", &name, if n == 30 { 5000 } else { n }, 0));
    }
    let top = Pair { before: &before, now: &now }.top();
    let whole = page(&top, None, None);
    assert_eq!(whole.lines().count(), 1 + 3 * 2 + 2 + 43 + 2, "{whole}");
    for (columns, rows) in [(80, 24), (132, 50), (60, 16), (80, 10), (40, 5), (20, 1)] {
        let text = page(&top, Some(columns), Some(rows));
        assert!(text.lines().count() < usize::from(rows.max(2)), "{columns} x {rows}: {text}");
        assert!(
            text.lines().all(|line| line.chars().count() <= columns.into()),
            "{columns} x {rows}: {text}"
        );
    }
    assert_eq!(page(&top, None, Some(55)), whole, "just high enough");
    assert!(page(&top, None, Some(54)).contains(" more)\n"));
    let text = page(&top, Some(80), Some(24));
    assert!(text.contains("backend-30") && !text.contains("backend-1 "), "the busiest: {text}");
    assert!(text.contains(" more)\n") && text.contains("gold") && text.contains("bronze"), "{text}");
}

#[test]
fn lines_are_divided() {
    for (wanted, lines, expected) in [
        (&[3, 3][..], 10, &[3, 3][..]),
        (&[10, 2, 10], 12, &[5, 2, 5]),
        (&[1, 50, 4], 20, &[1, 15, 4]),
        (&[5, 5], 0, &[0, 0]),
        (&[], 3, &[]),
    ] {
        assert_eq!(parts(wanted, lines), expected, "{wanted:?} in {lines}");
    }
}

#[test]
fn numbers_are_short() {
    for (value, text) in [
        (Some(0.0), "0"),
        (Some(0.5), "0.5"),
        (Some(12.4), "12"),
        (Some(999.0), "999"),
        (Some(1250.0), "1.2k"),
        (Some(3.45e7), "34.5M"),
        (Some(2e12), "2000.0G"),
        (None, "-"),
    ] {
        assert_eq!(short(value), text);
    }
}

#[test]
fn metrics_by_service() {
    let text = "# TYPE dispatcher_requests counter\n\
                dispatcher_requests_total{service=\"shop\",way=\"tunnel\",code=\"2xx\"} 12\n\
                dispatcher_requests_total{service=\"shop\",way=\"clear\",code=\"4xx\"} 3\n\
                dispatcher_requests_total{service=\"web-2\",way=\"clear\",code=\"4xx\"} 0\n\
                dispatcher_requests_retried_total{service=\"shop\"} 9\n# EOF\n";
    let expected = BTreeMap::from([("shop".to_owned(), 15), ("web-2".to_owned(), 0)]);
    assert_eq!(by_service(text, "dispatcher_requests_total"), expected);
}
