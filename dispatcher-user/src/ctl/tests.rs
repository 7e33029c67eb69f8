use super::*;

fn parse(line: &str) -> Result<Args, clap::Error> {
    Args::try_parse_from(line.split(' '))
}

#[test]
fn command_lines() {
    for line in [
        "dispatcherctl status",
        "dispatcherctl --json backends",
        "dispatcherctl backends --json --socket /tmp/x",
        "dispatcherctl backend web/a drain",
        "dispatcherctl sessions list --service web --limit 3",
        "dispatcherctl sessions pin 00ff --service web --backend a",
        "dispatcherctl sessions save --json",
        "dispatcherctl identities --json",
        "dispatcherctl detach",
        "dispatcherctl detach --json --config dispatcher.toml",
        "dispatcherctl detach --pin /sys/fs/bpf/other",
        "dispatcherctl counters --watch",
        "dispatcherctl counters --watch 5 --all",
        "dispatcherctl trace --client 2001:db8::1 --service web --limit 3 --json",
        "dispatcherctl metrics",
        "dispatcherctl config check dispatcher.toml --json",
        "dispatcherctl config show",
        "dispatcherctl config schema",
        "dispatcherctl reload --dry-run --json",
        "dispatcherctl openapi",
        "dispatcherctl explain file.pcap",
        "dispatcherctl explain file.pcap --json --packets --live --config dispatcher.toml",
    ] {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
    for line in [
        "dispatcherctl",
        "dispatcherctl backend web drain",
        "dispatcherctl sessions pin 00ff --service web",
        "dispatcherctl flows --limit x",
        "dispatcherctl trace --client somebody",
        "dispatcherctl trace --limit 0",
        "dispatcherctl config",
        "dispatcherctl config check",
        "dispatcherctl explain",
        "dispatcherctl detach --pin /x --config dispatcher.toml",
        "dispatcherctl explain file.pcap --live",
    ] {
        assert_eq!(parse(line).expect_err(line).exit_code(), i32::from(Exit::Usage as u8), "{line}");
    }
}

#[test]
fn nobody_to_ask_is_a_code_of_its_own() {
    let args = parse("dispatcherctl --socket /no/such/socket status").expect("parses");
    let error = run(&args, &mut Vec::new(), &mut Vec::new(), None).expect_err("nobody is there");
    assert_eq!(error.exit(), Exit::Unreachable);
    assert!(error.to_string().contains("is dispatcherd running"), "{error}");
}

#[test]
fn detach_says_where_nothing_is() {
    let args = parse("dispatcherctl detach --pin /no/such/folder").expect("parses");
    let mut out = Vec::new();
    run(&args, &mut out, &mut Vec::new(), None).expect("nothing to do");
    assert_eq!(String::from_utf8_lossy(&out).trim(), "nothing is pinned in /no/such/folder");
    let args = parse("dispatcherctl detach --config /no/such/file").expect("parses");
    assert_eq!(
        run(&args, &mut Vec::new(), &mut Vec::new(), None).expect_err("no file").exit(),
        Exit::Refused
    );
}

#[test]
fn tables_have_aligned_columns() {
    let counter = |number, packets| api::Counter {
        number,
        name: format!("reason_{number}"),
        kind: "drop".into(),
        packets,
        description: "Why.".into(),
    };
    let before = api::Counters { reasons: vec![counter(1, 5), counter(2, 0)] };
    let now = api::Counters { reasons: vec![counter(1, 1005), counter(2, 0)] };
    let mut out = Vec::new();
    show(&mut out, Form::Table(None), &now, |now| counters(now, Some(&before), false)).expect("prints");
    let text = String::from_utf8(out).expect("text");
    assert_eq!(
        text,
        "REASON    KIND  DESCRIPTION  PACKETS  MORE\nreason_1  drop  Why.            1005  1000\n"
    );
}

#[test]
fn json_has_the_promised_names() {
    let counters = api::Counters {
        reasons: vec![api::Counter {
            number: 1,
            name: "to_client".into(),
            kind: "forward".into(),
            packets: 2,
            description: "x".into(),
        }],
    };
    let mut out = Vec::new();
    show(&mut out, Form::Json, &counters, |_| Table::new()).expect("prints");
    let value: serde_json::Value = serde_json::from_slice(&out).expect("json");
    let first = &value["reasons"][0];
    assert_eq!(first["number"], 1);
    assert_eq!(first["name"], "to_client");
    assert_eq!(first["kind"], "forward");
    assert_eq!(first["packets"], 2);
}

#[test]
fn paths_are_escaped() {
    let hex: Identifier = "00ff".parse().expect("any text is an identifier");
    assert_eq!(session(&hex, Some("a b/c")), "/v1/sessions/00ff?service=a%20b%2Fc");
    let cookie: Identifier = "cookie:abc".parse().expect("a value");
    assert_eq!((cookie.hex.len(), cookie.kind), (32, Some("http-cookie")));
    assert_eq!(cookie.kind(Some("http-cookie")).expect("agrees").as_deref(), Some("http-cookie"));
    assert!(cookie.kind(Some("tls-ticket")).is_err());
    let missing = cookie.named::<()>(Err(Error::Refused(format!("no session {}", cookie.hex))));
    assert_eq!(missing.expect_err("missing").to_string(), "no session cookie:abc");
    let client: Identifier = "client:192.0.2.1".parse().expect("an address");
    assert_eq!(
        (client.hex.as_str(), client.kind),
        ("00000000000000000000ffffc0000201", Some("client-address"))
    );
    for wrong in ["cookie:", "client:host"] {
        assert!(wrong.parse::<Identifier>().is_err(), "{wrong}");
    }
}

#[test]
fn ages() {
    for (seconds, text) in [(0, "0s"), (59, "59s"), (61, "1m01s"), (3660, "1h01m"), (90_000, "1d01h")] {
        assert_eq!(age(seconds), text);
    }
}

#[test]
fn tables_fit_the_terminal() {
    let counter = api::Counter {
        number: 1,
        name: "reason_1".into(),
        kind: "drop".into(),
        packets: 7,
        description: "Why it is that a sentence such as this one is too long for a terminal.".into(),
    };
    let now = api::Counters { reasons: vec![counter] };
    let widest = |width| {
        let mut out = Vec::new();
        show(&mut out, Form::Table(width), &now, |now| counters(now, None, false)).expect("prints");
        let text = String::from_utf8(out).expect("text");
        text.lines().map(str::len).max().expect("lines")
    };
    assert!(widest(None) > 80, "a pipe gets whole lines");
    assert!(widest(Some(60)) <= 60);
    assert_eq!(widest(Some(200)), widest(None));
}

#[test]
fn a_line_of_the_trace() {
    let decision = api::Decision {
        time: "2026-01-02T03:04:05.678Z".into(),
        what: "miss".into(),
        reason: None,
        service: "web".into(),
        client: "192.0.2.7:4711".parse().expect("an address"),
        vip: "192.0.2.1:443".parse().expect("an address"),
        protocol: config::Protocol::Tcp,
        backend: "a".into(),
        kind: Some("tls-session-id".into()),
        id: Some("00ff".into()),
    };
    for traced in [Traced::Decision(decision), Traced::Lost(api::Lost { lost: 12 })] {
        let text = serde_json::to_string(&traced).expect("json");
        assert_eq!(serde_json::from_str::<Traced>(&text).expect("back"), traced, "{text}");
        let line = trace_line(&traced);
        let words: Vec<&str> = line.split_whitespace().collect();
        match traced {
            Traced::Decision(_) => assert_eq!(
                words,
                ["2026-01-02T03:04:05.678Z", "miss", "web", "192.0.2.7:4711", "a", "tls-session-id", "00ff"]
            ),
            Traced::Lost(_) => assert!(line.contains("12 events were lost"), "{line}"),
        }
    }
}

#[test]
fn a_file_is_checked_without_a_daemon() {
    let folder = std::env::temp_dir().join(format!("dispatcherctl-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("dispatcher.toml");
    let check = |json: &str| {
        let line = format!("dispatcherctl --socket /no/such/socket config check {} {json}", file.display());
        let mut out = Vec::new();
        let result = run(&parse(line.trim()).expect("parses"), &mut out, &mut Vec::new(), None);
        (result, String::from_utf8(out).expect("a text"))
    };
    let good = include_str!("../../../docs/config/minimal.toml");
    std::fs::write(&file, good).expect("a file");
    let (result, said) = check("");
    assert!(result.is_ok() && said == format!("{}: 1 service, 2 backends: good\n", file.display()), "{said}");
    let (result, said) = check("--json");
    let checked: api::Checked = serde_json::from_str(&said).expect("json");
    let wanted = api::Checked { file: file.clone(), good: true, services: 1, backends: 2, error: None };
    assert!(result.is_ok() && checked == wanted, "{said}");

    std::fs::write(&file, good.replace("vip =", "mode = \"magic\"\nvip =")).expect("a file");
    let (result, said) = check("");
    let error = result.expect_err("not good");
    assert_eq!((error.exit(), said.as_str()), (Exit::Refused, ""));
    assert!(error.to_string().contains("dispatcher.toml: line 8: service.mode:"), "{error}");
    let (result, said) = check("--json");
    assert_eq!(result.expect_err("not good").exit(), Exit::Refused);
    let checked: api::Checked = serde_json::from_str(&said).expect("json");
    let mistake = checked.error.expect("a mistake");
    assert_eq!((checked.good, mistake.line, mistake.key.as_deref()), (false, Some(8), Some("service.mode")));
    assert!(mistake.problem.contains("use \"passthrough\" or \"l4\""), "{mistake:?}");

    std::fs::remove_dir_all(&folder).expect("removes");
    let (result, said) = check("--json");
    assert!(result.is_err() && said.contains("\"line\": null") && said.contains("No such file"), "{said}");
}
