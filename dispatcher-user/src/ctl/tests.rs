use std::{
    io::{BufRead as _, BufReader},
    os::unix::net::UnixListener,
    sync::atomic::{AtomicU32, Ordering},
    thread::JoinHandle,
};

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
        "dispatcherctl qos",
        "dispatcherctl qos shares --watch",
        "dispatcherctl qos shares --watch 5 --json",
        "dispatcherctl qos classes --json",
        "dispatcherctl qos weight gold 1",
        "dispatcherctl qos weight gold 10000",
        "dispatcherctl qos assign cookie:4f1c gold --service shop",
        "dispatcherctl qos assign 00ff default --service shop --kind tls-session-id",
        "dispatcherctl qos assign cookie:4f1c --by-rules --service shop",
        "dispatcherctl top",
        "dispatcherctl top --interval 5 --count 3 --json",
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
        "dispatcherctl qos shares --watch 0",
        "dispatcherctl qos weight gold",
        "dispatcherctl qos weight gold 0",
        "dispatcherctl qos weight gold 10001",
        "dispatcherctl qos weight gold -1",
        "dispatcherctl qos weight gold 1.5",
        "dispatcherctl qos assign 00ff gold",
        "dispatcherctl qos assign 00ff --service shop",
        "dispatcherctl qos assign 00ff gold --by-rules --service shop",
        "dispatcherctl qos assign client:nobody gold --service shop",
        "dispatcherctl top --interval 0",
        "dispatcherctl top --count 0",
        "dispatcherctl explain",
        "dispatcherctl detach --pin /x --config dispatcher.toml",
        "dispatcherctl explain file.pcap --live",
    ] {
        assert_eq!(parse(line).expect_err(line).exit_code(), i32::from(Exit::Usage as u8), "{line}");
    }
}

/// A socket of one test, with somebody behind it who answers each request with the next of these and then goes.
struct Told {
    socket: PathBuf,
    /// Ends with the requests' first lines.
    server: JoinHandle<Vec<String>>,
}

fn socket() -> PathBuf {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("dispatcherctl-{}-{number}.sock", std::process::id()))
}

fn told(answers: Vec<String>) -> Told {
    let socket = socket();
    let listener = UnixListener::bind(&socket).expect("a socket");
    let server = std::thread::spawn(move || {
        let one = |body: &String| {
            let (mut stream, _) = listener.accept().expect("a request");
            let mut request = BufReader::new(stream.try_clone().expect("a second handle")).lines();
            let first = request.next().expect("a line").expect("a text");
            let _head = request.map(|line| line.expect("a text")).take_while(|line| !line.is_empty()).count();
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).expect("told");
            first
        };
        answers.iter().map(one).collect()
    });
    Told { socket, server }
}

impl Told {
    /// What a command line prints, what it hints at, and how it ends; and what it asked for.
    fn run(self, line: &str) -> (Result<(), Error>, String, String, Vec<String>) {
        self.run_on(None, line)
    }

    /// The same on a terminal.
    fn run_on(
        self,
        terminal: Option<Terminal>,
        line: &str,
    ) -> (Result<(), Error>, String, String, Vec<String>) {
        let args =
            parse(&format!("dispatcherctl --socket {} {line}", self.socket.display())).expect("parses");
        let (mut out, mut hints) = (Vec::new(), Vec::new());
        let result = run(&args, &mut out, &mut hints, &|| terminal);
        let text = |bytes| String::from_utf8(bytes).expect("a text");
        let asked = self.server.join().expect("all was asked");
        std::fs::remove_file(&self.socket).expect("removes");
        (result, text(out), text(hints), asked)
    }
}

#[test]
fn a_daemon_that_never_answers_is_given_up() {
    let socket = socket();
    // The kernel accepts, nobody reads.
    let listener = UnixListener::bind(&socket).expect("a socket");
    let client = Client { socket: &socket, patience: Duration::from_millis(50) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let asked = runtime.block_on(async {
        let asked = client.get::<api::Status>("/v1/status");
        tokio::time::timeout(Duration::from_secs(20), asked).await.expect("it gives up")
    });
    let error = asked.expect_err("no answer");
    let said = error.to_string();
    assert_eq!(error.exit(), Exit::Unreachable);
    assert!(said.contains("no answer in 50ms") && said.contains("dispatcherd hangs"), "{said}");
    drop(listener);
    std::fs::remove_file(&socket).expect("removes");
}

#[test]
fn a_list_that_is_cut_says_so() {
    let flow = |port: u16| api::Flow {
        client: ([192, 0, 2, 7], port).into(),
        vip: ([192, 0, 2, 1], 443).into(),
        protocol: config::Protocol::Tcp,
        service: "web".into(),
        backend: "a".into(),
        state: "established".into(),
        age_seconds: 1,
        secure: true,
        hit: true,
        class: "default".to_owned(),
    };
    let list = |count: u16| serde_json::to_string(&(0..count).map(flow).collect::<Vec<_>>()).expect("json");
    let hint = "dispatcherctl: the first 3, there may be more: `--limit N` lists up to N\n";
    for (command, count, hinted) in
        [("flows --limit 3", 3, hint), ("--json flows --limit 3", 3, hint), ("flows --limit 3", 2, "")]
    {
        let (result, out, hints, asked) = told(vec![list(count)]).run(command);
        assert!(result.is_ok());
        assert_eq!(
            (hints.as_str(), asked[0].as_str()),
            (hinted, "GET /v1/flows?limit=3 HTTP/1.1"),
            "{command}"
        );
        assert_eq!(out.matches("192.0.2.7:").count(), usize::from(count), "{out}");
    }
}

pub(super) fn backend(state: &str, open: u64, left: Option<u64>) -> api::Backend {
    api::Backend {
        name: "a".into(),
        service: "web".into(),
        id: 1,
        index: 0,
        addresses: Vec::new(),
        state: state.into(),
        deadline_seconds: left,
        reason: None,
        weight: 1,
        share: None,
        open: Some(open),
        connections: 3,
        hits: 0,
        misses: 0,
        fresh: 0,
        nonsecure: 0,
        established: 0,
        refused: 0,
        learned: 0,
        connect_ms: None,
        response_ms: None,
    }
}

#[test]
fn a_drain_that_cuts_connections_has_a_code_of_its_own() {
    let backend = |state, open, left| serde_json::to_string(&[backend(state, open, left)]).expect("json");
    let drain = "backend web/a drain --wait --deadline 1s";
    let answers =
        [backend("drain", 3, Some(1)), backend("drain", 2, Some(0)), backend("offline", 0, None)].to_vec();
    let (result, out, hints, asked) = told(answers).run(drain);
    let error = result.expect_err("two were cut");
    assert_eq!(
        (error.exit(), error.to_string().as_str()),
        (Exit::Cut, "web/a went offline, which ended 2 connections")
    );
    assert!(
        out.contains("offline") && asked[0].starts_with("PATCH ") && asked[2].starts_with("GET "),
        "{out}"
    );
    assert_eq!(hints, "web/a: 3 connections, 1 s left\nweb/a: 2 connections, 0 s left\n");

    let answers = [backend("drain", 1, Some(1)), backend("drain", 0, Some(0))].to_vec();
    let (result, out, ..) = told(answers).run(drain);
    assert!(result.is_ok() && out.contains("drain"), "{out}");
}

#[test]
fn nobody_to_ask_is_a_code_of_its_own() {
    let args = parse("dispatcherctl --socket /no/such/socket status").expect("parses");
    let error = run(&args, &mut Vec::new(), &mut Vec::new(), &|| None).expect_err("nobody is there");
    assert_eq!(error.exit(), Exit::Unreachable);
    assert!(error.to_string().contains("is dispatcherd running"), "{error}");
}

#[test]
fn detach_says_where_nothing_is() {
    let args = parse("dispatcherctl detach --pin /no/such/folder").expect("parses");
    let mut out = Vec::new();
    run(&args, &mut out, &mut Vec::new(), &|| None).expect("nothing to do");
    assert_eq!(String::from_utf8_lossy(&out).trim(), "nothing is pinned in /no/such/folder");
    let args = parse("dispatcherctl detach --config /no/such/file").expect("parses");
    assert_eq!(
        run(&args, &mut Vec::new(), &mut Vec::new(), &|| None).expect_err("no file").exit(),
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
fn a_narrow_terminal_gets_fewer_columns() {
    let addresses =
        vec!["10.0.0.1:443".parse().expect("an address"), "[fd00::1]:443".parse().expect("one too")];
    let list = [api::Backend { addresses, ..backend("up", 0, None) }];
    let table = |width| {
        let mut out = Vec::new();
        show(&mut out, Form::Table(width), list.as_slice(), backends).expect("prints");
        String::from_utf8(out).expect("a text")
    };
    let whole = table(None);
    // The last column has a space behind it that is not printed.
    let natural = whole.lines().map(str::len).max().expect("lines") as u16 + 1;
    assert_eq!(table(Some(natural)), whole, "it fits");
    let header = |text: &str| text.lines().next().expect("a header").split_whitespace().count();
    let mut before = header(&whole);
    assert_eq!(before, 18);
    for (width, left_out) in [
        (natural - 1, "(left out: learned; --wide or --json shows all)"),
        (
            100,
            "(left out: learned, refused, estab, nonsecure, fresh, misses, hits, connect; --wide or --json shows all)",
        ),
    ] {
        let text = table(Some(width));
        let lines: Vec<&str> = text.lines().collect();
        let [head, row, last] = lines.as_slice() else { panic!("no cell is broken: {text}") };
        assert!(head.len().max(row.len()) <= width.into(), "{text}");
        assert_eq!(*last, left_out, "{text}");
        assert!(header(&text) < before && row.contains("10.0.0.1:443,[fd00::1]:443"), "{text}");
        before = header(&text);
    }
    // What cannot be spared is broken, not left out.
    let text = table(Some(40));
    assert!(text.lines().count() > 3 && header(&text) == 7, "{text}");
    // The flag is as a terminal without an end.
    let args = parse("dispatcherctl backends --wide").expect("parses");
    assert!(args.wide);
}

/// Each name of a column that can be spared is a column.
#[test]
fn spare_columns_exist() {
    let nothing = api::Counters { reasons: Vec::new() };
    let sheets = [
        services(&[]),
        backends(&[]),
        sessions(&[]),
        identities(&[]),
        flows(&[]),
        counters(&nothing, None, true),
        qos::share_table(&[]),
        qos::classes(&[]),
    ];
    for mut sheet in sheets.into_iter().chain(top::sheets()) {
        assert_eq!(sheet.fit(1), sheet.spare);
    }
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
        let result = run(&parse(line.trim()).expect("parses"), &mut out, &mut Vec::new(), &|| None);
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

#[test]
fn shares_beside_weights() {
    let shares = [
        top::tests::share("gold", 12, 3000),
        api::QosShare { share_percent: None, ..top::tests::share("bronze", 0, 0) },
    ];
    let json = serde_json::to_string(&shares).expect("json");
    for command in ["qos", "qos shares"] {
        let (result, out, _, asked) = told(vec![json.clone()]).run(command);
        assert!(result.is_ok() && asked == ["GET /v1/qos HTTP/1.1"], "{asked:?}");
        let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
        let [head, gold, bronze] = lines.as_slice() else { panic!("three lines: {out}") };
        assert_eq!(head[..7], ["SERVICE", "BACKEND", "CLASS", "WEIGHT", "SHARE", "OPEN", "WAITING"]);
        assert_eq!(gold[..8], ["web", "a", "gold", "75.0%", "70.2%", "2", "5", "12"]);
        assert_eq!(gold[12..], ["12.2", "ms", "3000", "1500", "0", "0"]);
        assert_eq!(bronze[2..5], ["bronze", "75.0%", "-"]);
    }
    let (result, out, ..) = told(vec![json]).run("--json qos shares");
    assert!(result.is_ok());
    assert_eq!(serde_json::from_str::<Vec<api::QosShare>>(&out).expect("json"), shares);
    // 80 columns: what matters most is left.
    let (result, out, ..) = told(vec![serde_json::to_string(&shares).expect("json")])
        .run_on(Some(Terminal { columns: Some(80), rows: None }), "qos");
    assert!(result.is_ok() && out.lines().take(3).all(|line| line.len() <= 80), "{out}");
    for title in ["WEIGHT", "SHARE", "WAITING", "SHED", "DROPPED"] {
        assert!(out.contains(title), "{title}: {out}");
    }
}

#[test]
fn shares_again_and_again() {
    let json = serde_json::to_string(&[top::tests::share("gold", 12, 3000)]).expect("json");
    let (result, out, _, asked) = told(vec![json.clone(), json]).run("qos shares --watch");
    assert_eq!(result.expect_err("nobody answers any more").exit(), Exit::Unreachable);
    assert_eq!(
        (asked.len(), out.matches("SERVICE").count(), out.matches("gold").count()),
        (2, 2, 2),
        "{out}"
    );
}

#[test]
fn classes_and_what_is_said_of_them() {
    let class = |name: &str, weight, dscp| api::QosClass {
        name: name.into(),
        weight,
        priority: 2,
        lend: weight > 1,
        borrow_limit: 100,
        ceil: 50,
        dscp,
    };
    let all = [class("default", 1, None), class("gold", 3, Some(46))];
    let json = serde_json::to_string(&all).expect("json");
    let (result, out, _, asked) = told(vec![json.clone()]).run("qos classes");
    assert!(result.is_ok() && asked == ["GET /v1/qos/classes HTTP/1.1"], "{asked:?}");
    assert_eq!(
        out,
        "CLASS    WEIGHT  PRIORITY  LENDS  BORROWS  CEIL  DSCP\n\
         default       1         2     no     100%   50%     -\n\
         gold          3         2    yes     100%   50%    46\n"
    );
    let (result, out, ..) = told(vec![json.clone()]).run("--json qos classes");
    assert!(
        result.is_ok() && serde_json::from_str::<Vec<api::QosClass>>(&out).expect("json") == all,
        "{out}"
    );
    let (result, out, _, asked) = told(vec![json]).run("qos weight gold 3");
    assert!(result.is_ok() && out.contains("gold"), "{out}");
    assert_eq!(asked, ["PATCH /v1/qos/classes/gold HTTP/1.1"]);
}

#[test]
fn sessions_are_put_into_classes() {
    let session = api::Session {
        id: "00ff".into(),
        kind: "tls-session-id".into(),
        service: "web".into(),
        backend: "a".into(),
        tunnel: 0,
        class: Some("gold".into()),
        state: "confirmed".into(),
        hits: 0,
        age_seconds: 1,
        idle_seconds: 1,
        expires_in_seconds: None,
    };
    let json = serde_json::to_string(std::slice::from_ref(&session)).expect("json");
    let (result, out, _, asked) = told(vec![json.clone()]).run("qos assign 00ff gold --service web");
    assert!(result.is_ok() && out.contains("CLASS") && out.contains("gold"), "{out}");
    assert_eq!(asked, ["PUT /v1/qos/sessions/00ff HTTP/1.1"]);
    let (result, out, ..) = told(vec![json]).run("--json qos assign 00ff gold --service web");
    assert!(
        result.is_ok() && serde_json::from_str::<Vec<api::Session>>(&out).expect("json") == [session],
        "{out}"
    );
    let args = parse(
        "dispatcherctl --socket /no/such/socket qos assign cookie:a gold --service web --kind tls-ticket",
    );
    let error =
        run(&args.expect("parses"), &mut Vec::new(), &mut Vec::new(), &|| None).expect_err("two kinds");
    assert!(error.to_string().contains("is of the kind http-cookie, not tls-ticket"), "{error}");
}

#[test]
fn a_live_view() {
    let views = |count: u64| (1..=count).flat_map(top::tests::answers).collect::<Vec<_>>();
    // The first reading is shown by its difference to the second; then nobody answers.
    let (result, out, _, asked) = told(views(2)).run("--json top --count 2");
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(asked.len(), 14);
    let tops: Vec<api::Top> = out.lines().map(|line| serde_json::from_str(line).expect("json")).collect();
    let [good, silent] = tops.as_slice() else { panic!("two lines: {out}") };
    assert!(good.error.is_none() && good.forward_per_second.is_some_and(|rate| rate > 0.0), "{good:?}");
    assert!(
        silent.error.as_ref().is_some_and(|error| error.contains("is dispatcherd running")),
        "{silent:?}"
    );
    assert!(silent.uptime_seconds.is_none() && silent.services.is_empty(), "{silent:?}");
    // Nobody from the beginning is an error.
    let args = parse("dispatcherctl --socket /no/such/socket top").expect("parses");
    let error = run(&args, &mut Vec::new(), &mut Vec::new(), &|| None).expect_err("nobody is there");
    assert_eq!(error.exit(), Exit::Unreachable);
    // Piped: one after another; on a terminal: in the place of the one before.
    let (result, out, ..) = told(views(3)).run("top --count 2");
    assert!(result.is_ok() && out.matches("SERVICE  MODE").count() == 2 && !out.contains('\x1b'), "{out}");
    let terminal = Some(Terminal { columns: Some(80), rows: Some(24) });
    let (result, out, ..) = told(views(3)).run_on(terminal, "top --count 2");
    assert!(result.is_ok() && out.matches("\x1b[H").count() == 2 && out.ends_with("\x1b[J"), "{out}");
    assert!(out.split("\x1b[H").skip(1).all(|view| view.matches('\n').count() < 24), "{out}");
}
