//! What the daemon tells over its sockets: metrics, the trace, and an API that is as it is described.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr},
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    path::Path,
    process::Command,
    sync::mpsc,
    time::{Duration, Instant},
};

use dispatcher_tests::{
    daemon::{Daemon, Folder, Process, Service, UNPINNED, config, program},
    netns::{Netns, execute},
    sockets,
    stage::{PORT, Stage, web},
    tls::{Authority, HOST, Manners, Server, Version},
    topology::{Family, Plan, Topology},
    town::until,
};
use dispatcher_user::{api, workers};
use serde_json::{Value, json};

const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9100);

/// The usual stage, with metrics over TCP.
fn stage() -> Stage {
    let authority = Authority::new().expect("certificates");
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let server = |(i, place): (usize, &dispatcher_tests::topology::Place)| {
        let name = format!("b{}", i + 1);
        Server::start(&place.netns, &name, PORT, &authority, Manners::default()).expect("a server")
    };
    let servers = topology.backends.iter().enumerate().map(server).collect();
    let text = format!("metrics = \"{METRICS}\"\n{}", config(&topology, "native", &[web()]));
    let daemon = Daemon::start_with(&topology.dispatcher, &text).expect("the daemon");
    Stage { daemon, servers, authority, topology }
}

/// A request without a client that knows the API: status and body.
fn http(mut stream: impl Read + Write, method: &str, path: &str, body: &str) -> (u16, String) {
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nhost: d\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .expect("asks");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
    (status, body.to_owned())
}

fn ask(daemon: &Daemon, method: &str, path: &str, body: &str) -> (u16, String) {
    http(UnixStream::connect(daemon.socket()).expect("connects"), method, path, body)
}

/// The sum of the samples whose line begins so.
fn sum(metrics: &str, begin: &str) -> f64 {
    let of = metrics.lines().filter(|line| line.starts_with(begin));
    of.map(|line| line.rsplit(' ').next().expect("a value").parse::<f64>().expect("a number")).sum()
}

#[test]
fn metrics_move_with_traffic() {
    let stage = stage();
    let scrape = || {
        let (status, text) = ask(&stage.daemon, "GET", "/metrics", "");
        assert_eq!(status, 200);
        assert!(text.ends_with("# EOF\n"), "{text}");
        text
    };
    let before = scrape();
    assert_eq!(sum(&before, "dispatcher_packets_total{reason=\"bound_fresh\""), 0.0);
    assert_eq!(sum(&before, "dispatcher_backend_state{service=\"web\",backend=\"b1\",state=\"up\"}"), 1.0);
    let home = stage.returns(4);
    let after = scrape();
    assert_eq!(sum(&after, "dispatcher_packets_total{reason=\"bound_fresh\",kind=\"forward\"}"), 1.0);
    assert_eq!(sum(&after, "dispatcher_packets_total{reason=\"bound_hit\",kind=\"forward\"}"), 3.0);
    let of_home = format!("{{service=\"web\",backend=\"{home}\"}}");
    for (name, expected) in
        [("connections", 4.0), ("hits", 3.0), ("fresh", 1.0), ("established", 4.0), ("learned", 1.0)]
    {
        let name = format!("dispatcher_backend_{name}_total");
        assert_eq!(sum(&after, &format!("{name}{of_home}")), expected, "{name}");
        assert_eq!(sum(&after, &format!("{name}{{")), expected, "{name} of all backends");
    }
    assert_eq!(sum(&after, "dispatcher_interface_info{"), 2.0);
    let learned = |text: &str| sum(text, "dispatcher_events_total{event=\"learned\"}");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let now = scrape();
        if learned(&now) == 1.0 && sum(&now, "dispatcher_sessions ") == 1.0 {
            break;
        }
        assert!(Instant::now() < deadline, "{now}");
        std::thread::sleep(Duration::from_millis(100));
    }
    // Over TCP the same, and nothing else.
    let over_tcp = |method, path| {
        let stream = sockets::connect(&stage.topology.dispatcher, METRICS.ip(), METRICS).expect("connects");
        http(stream, method, path, "")
    };
    let (status, text) = over_tcp("GET", "/metrics");
    assert_eq!((status, sum(&text, &format!("dispatcher_backend_hits_total{of_home}"))), (200, 3.0));
    assert_eq!(over_tcp("POST", "/metrics").0, 405);
    for path in ["/v1/status", "/v1/sessions", "/"] {
        assert_eq!(over_tcp("GET", path).0, 404, "{path}");
    }
    let said = stage.daemon.told(&["metrics"]);
    assert_eq!(sum(&said.expect("metrics"), &format!("dispatcher_backend_hits_total{of_home}")), 3.0);
}

/// Starts `dispatcherctl trace`; its lines as they come.
fn trace(daemon: &Daemon, arguments: &[&str]) -> (Process, mpsc::Receiver<String>) {
    let mut command = Command::new(program("dispatcherctl").expect("dispatcherctl"));
    command.arg("--socket").arg(daemon.socket()).arg("trace").args(arguments);
    let (sender, lines) = mpsc::channel();
    (Process::start(command, Some(sender)).expect("starts"), lines)
}

#[test]
fn the_trace_shows_a_miss_and_what_is_learned() {
    let stage = Stage::usual();
    let (_process, lines) = trace(&stage.daemon, &[]);
    let line = || lines.recv_timeout(Duration::from_secs(20)).expect("a line");
    assert!(line().starts_with("TIME"), "the heading says that it listens");
    let user = stage.user(Version::Tls12);
    let home = stage.visit(&user, Family::V4, 0).backend;
    let from = stage.from(Family::V4, 0).to_string();
    let bound = line();
    for word in ["bound_fresh", "web", &home, &format!("{from}:")] {
        assert!(bound.contains(word), "{word}: {bound}");
    }
    let learned = line();
    for word in ["learned", "web", &home, &format!("{from}:"), "tls-session-id"] {
        assert!(learned.contains(word), "{word}: {learned}");
    }
    let id = learned.split_whitespace().last().expect("an identifier").to_owned();
    let sessions = stage.daemon.sessions().expect("sessions");
    assert!(sessions.iter().any(|one| one.id == id), "{id}: {sessions:#?}");
    // An identifier that is not known any more is a miss.
    assert_eq!(stage.visit(&user, Family::V6, 1).backend, home);
    let hit = line();
    assert!(hit.contains(" bound_hit ") && hit.ends_with(&id), "{hit}");
    let _: Vec<api::Session> = stage.daemon.ask(&["sessions", "remove", &id]).expect("removes");
    let _ = stage.visit(&user, Family::V6, 2);
    let missed = line();
    assert!(missed.contains(" miss ") && missed.ends_with(&id), "{missed}");
    let bound = line();
    assert!(bound.contains(" bound_miss ") && bound.ends_with(&id), "{bound}");
    assert!(missed.contains(&stage.from(Family::V6, 2).to_string()), "{missed}");

    // Another listens to one client only, in JSON, and stops at a limit.
    let [here, there] = [1, 2].map(|client| stage.from(Family::V4, client));
    let arguments =
        ["--json", "--limit", "2", "--one-in", "0", "--service", "web", "--client", &here.to_string()];
    let (mut process, lines) = trace(&stage.daemon, &arguments);
    let deadline = Instant::now() + Duration::from_secs(30);
    while process.ended().is_none() {
        assert!(Instant::now() < deadline, "no two decisions about {here}");
        for client in [2, 1] {
            let _ = stage.visit(&stage.user(Version::Tls12), Family::V4, client);
        }
    }
    assert!(process.wait(Duration::from_secs(10)).expect("ends").success());
    let document = described();
    let decisions: Vec<api::Decision> = lines
        .iter()
        .map(|line| {
            let value = serde_json::from_str(&line).expect("json");
            check(
                &document,
                "/paths/~1v1~1trace/get/responses/200/content/application~1x-ndjson/schema",
                &value,
            );
            serde_json::from_value(value).expect("a decision")
        })
        .collect();
    assert_eq!(decisions.len(), 2);
    assert!(decisions.iter().all(|one| one.client.ip() == here && one.client.ip() != there), "{decisions:?}");
    assert!(decisions.iter().all(|one| (one.what.as_str(), one.service.as_str()) == ("learned", "web")));
    let (mut process, lines) = trace(&stage.daemon, &["--service", "nobody"]);
    assert_eq!(process.wait(Duration::from_secs(10)).expect("ends").code(), Some(1));
    assert!(lines.iter().any(|line| line.contains("no service nobody")));
}

/// What `dispatcherctl openapi` says; objects may have no fields but those described.
fn described() -> Value {
    let mut command = Command::new(program("dispatcherctl").expect("dispatcherctl"));
    let text = execute(command.args(["--socket", "/nonexistent", "openapi"]), None).expect("needs no daemon");
    let mut document: Value = serde_json::from_str(&text).expect("json");
    let schemas = document["components"]["schemas"].as_object_mut().expect("schemas");
    for schema in schemas.values_mut().filter(|schema| schema["properties"].is_object()) {
        schema["additionalProperties"] = json!(false);
    }
    document
}

/// Fails if a value does not fit the schema at a place of the document.
fn check(document: &Value, at: &str, value: &Value) {
    let mut schema = document.pointer(at).unwrap_or_else(|| panic!("nothing at {at}")).clone();
    schema["components"] = document["components"].clone();
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let errors: Vec<String> = validator.iter_errors(value).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{at}: {errors:#?} in {value:#}");
}

#[test]
fn answers_are_as_the_api_is_described() {
    let mut stage = Stage::usual();
    let (status, text) = ask(&stage.daemon, "POST", "/v1/sessions/save", "");
    assert!(status == 409 && text.contains("no state file"), "{status} {text}");
    let folder = Folder::new().expect("a folder");
    let state = format!("state = \"{}\"", folder.path().join("state.redb").display());
    stage.daemon.stop().expect("ends");
    let own = stage.authority.issue("dispatcher").expect("a certificate");
    let pem = folder.write("own.pem", &format!("{}{}", own.certificate_pem, own.key_pem)).expect("written");
    let roots = folder.write("roots.pem", &stage.authority.pem()).expect("written");
    let shop = Service::new("shop", 8443)
        .backend_port(PORT)
        .with("mode = \"terminate\"")
        .with(&format!("terminate.certificates = [{{ certificate = \"{}\" }}]", pem.display()))
        .with(&format!("tunnels = {{ server_name = \"{HOST}\", roots = \"{}\" }}", roots.display()));
    let web = web().with("limits = { bandwidth = \"10Gbit/s\" }");
    let text = config(&stage.topology, "native", &[web, shop]).replace("state = \"none\"", &state)
        + "\n[[class]]\nname = \"gold\"\nweight = 8\n";
    stage.daemon.again(&stage.topology.dispatcher, &text).expect("starts");
    let _ = stage.returns(3);
    let document = described();
    let (status, text) = ask(&stage.daemon, "GET", "/v1/openapi.json", "");
    assert_eq!(status, 200);
    let served: Value = serde_json::from_str(&text).expect("json");
    assert_eq!(served["paths"], document["paths"], "the daemon and the command line say the same");
    let id = stage.daemon.sessions().expect("sessions")[0].id.clone();
    let tunnels = || stage.daemon.ask::<Vec<api::Tunnel>>(&["tunnels"]).expect("tunnels");
    until("tunnels are established", || tunnels().len() == 3 * workers::processors().max(2));
    let last = tunnels().iter().map(|one| one.id).max().expect("several");
    let bodies = [
        (
            "patch",
            "/v1/backends/{service}/{name}",
            json!({ "state": "drain", "deadline_seconds": 60, "weight": 2 }),
        ),
        ("put", "/v1/backends/{service}/{name}", json!({ "addresses": ["10.99.0.9:443"], "weight": 1 })),
        ("put", "/v1/sessions/{id}", json!({ "service": "web", "backend": "b2" })),
        ("patch", "/v1/qos/classes/{class}", json!({ "weight": 3 })),
        ("put", "/v1/qos/sessions/{id}", json!({ "service": "web", "class": "gold" })),
    ];
    let paths = document["paths"].as_object().expect("paths");
    let mut asked = 0;
    for (path, methods) in paths {
        let methods = methods.as_object().expect("methods");
        // DELETE last: what it removes must be there for the others.
        for method in ["get", "patch", "put", "post", "delete"]
            .into_iter()
            .filter(|method| methods.contains_key(*method))
        {
            let place = format!("/paths/{}/{method}", path.replace('/', "~1"));
            let content = document.pointer(&format!("{place}/responses/200/content")).expect("content");
            if content.get("application/json").is_none() {
                // Text, and lines without end: the other tests read them.
                assert!(
                    ["/metrics", "/v1/config.toml", "/v1/trace"].contains(&path.as_str()),
                    "{path}: {content}"
                );
                continue;
            }
            let body =
                bodies.iter().find(|(how, of, _)| *how == method && of == path).map(|(_, _, body)| body);
            if let Some(body) = body {
                check(&document, &format!("{place}/requestBody/content/application~1json/schema"), body);
            }
            let body = body.map(Value::to_string).unwrap_or_default();
            let mut id = id.clone();
            if path == "/v1/tunnels/{id}" {
                // All have been rotated.
                until("others take their places", || {
                    let all = tunnels();
                    !all.is_empty() && all.iter().all(|one| one.id > last)
                });
                id = tunnels()[0].id.to_string();
            }
            let real = path.replace("{id}", &id).replace("{service}", "web").replace("{class}", "gold");
            // What is added is removed again.
            let name = if ["put", "delete"].contains(&method) { "b9" } else { "b1" };
            let real = real.replace("{name}", name);
            let (status, text) = ask(&stage.daemon, &method.to_ascii_uppercase(), &real, &body);
            assert_eq!(status, 200, "{method} {real}: {text}");
            let value = serde_json::from_str(&text).expect("json");
            check(&document, &format!("{place}/responses/200/content/application~1json/schema"), &value);
            let objects = [
                "/v1/openapi.json",
                "/v1/status",
                "/v1/counters",
                "/v1/reload",
                "/v1/config",
                "/v1/sessions/save",
                "/v1/tunnels/rotate",
            ];
            if !objects.contains(&path.as_str()) {
                assert!(
                    value.as_array().is_some_and(|list| !list.is_empty()) || path == "/v1/identities",
                    "{path}"
                );
            }
            asked += 1;
        }
        assert!(
            methods.keys().all(|method| ["get", "patch", "put", "post", "delete"].contains(&method.as_str())),
            "{path}"
        );
    }
    assert!(asked >= 14, "{asked}");
    let (status, text) = ask(&stage.daemon, "GET", "/v1/sessions/xyz", "");
    assert_eq!(status, 400);
    let problem = "/paths/~1v1~1sessions~1{id}/get/responses/default/content/application~1json/schema";
    check(&document, problem, &serde_json::from_str(&text).expect("json"));
}

/// Lets a program that only speaks TCP talk to the daemon's socket, until the test ends.
fn bridge(netns: &Netns, port: u16, socket: &Path) {
    let listener = sockets::listen(netns, port).expect("a port");
    let socket = socket.to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(daemon) = UnixStream::connect(&socket) else { return };
            let (Ok(mut from), Ok(mut to)) = (client.try_clone(), daemon.try_clone()) else { return };
            let (mut client, mut daemon) = (client, daemon);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Write);
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut daemon, &mut client);
                let _ = client.shutdown(std::net::Shutdown::Write);
            });
        }
    });
}

/// Schemathesis makes requests out of the description, good ones and bad ones, and compares the answers with it:
/// none is an error of the server, bad requests are refused and good ones not, methods that are not described
/// are answered by 405, and what is removed is gone. /v1/trace is left out, as its answers have no end.
#[test]
fn the_api_is_as_described_whatever_is_asked() {
    let stage = stage();
    let user = stage.user(Version::Tls12);
    assert_eq!(stage.visit(&user, Family::V4, 0).reused, ".");
    let folder = Folder::new().expect("a folder");
    let document =
        folder.write("openapi.json", &stage.daemon.told(&["openapi"]).expect("told")).expect("a file");
    let netns = &stage.topology.dispatcher;
    bridge(netns, 8080, stage.daemon.socket());
    let own = std::env::current_exe().expect("a path");
    let target = own.ancestors().nth(3).expect("target");
    let mut command = netns.command(target.join("python/bin/schemathesis"));
    command.arg("run").arg(document).current_dir(folder.path());
    command.args(["--url", "http://127.0.0.1:8080", "--exclude-path", "/v1/trace", "--checks", "all"]);
    command.args(["--exclude-checks", "ignored_auth", "--continue-on-failure", "--request-timeout", "20"]);
    let examples = if std::env::var_os("DISPATCHER_FULL").is_some() {
        ["--max-examples", "200"].as_slice()
    } else {
        &["--max-examples", "10", "--seed", "1"]
    };
    let output = command.args(examples).output().unwrap_or_else(|error| {
        panic!("{}: {error}; `cargo xtask setup` installs it", target.join("python").display())
    });
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let tested = said.lines().find_map(|line| line.trim().strip_prefix("Tested: ")).expect("a sum");
    assert!(tested.parse::<u32>().is_ok_and(|tested| tested >= 16), "{said}");
    // It may have lost backends: that can be asked for.
    assert_eq!(stage.daemon.status().expect("it lives").services, 1);
}

/// What is in force is what was read, and reading it again changes nothing.
#[test]
fn the_configuration_in_force_is_shown_and_loads_again() {
    let stage = stage();
    let shown = stage.daemon.told(&["config", "show"]).expect("shown");
    assert!(
        shown.contains("session_ttl = \"1h\"") && shown.contains("metrics = \"127.0.0.1:9100\""),
        "{shown}"
    );
    stage.daemon.rewrite(&shown).expect("written");
    let reload: api::Reload = stage.daemon.ask(&["reload"]).expect("reloaded");
    assert_eq!((reload.applied, reload.changes.as_slice()), (true, [].as_slice()));
    let json: Value = stage.daemon.ask(&["config", "show"]).expect("shown");
    assert_eq!(json["service"][0]["backend"][2]["name"], "b3");
    let schema: Value = stage.daemon.ask(&["config", "schema"]).expect("a schema");
    jsonschema::validate(&schema, &json).unwrap_or_else(|error| panic!("{}: {error}", error.instance_path()));
    let (classes, services) = shown.split_once("[[service.backend]]").expect("a backend");
    let changed = format!("{classes}[[service.backend]]{}", services.replacen("weight = 1", "weight = 7", 1));
    stage.daemon.rewrite(&changed).expect("written");
    let said = stage.daemon.told(&["reload"]).expect("reloaded");
    assert_eq!(said, "~ backend web/b1: weight: 1 -> 7\nin force: 1 change\n");
    let said = stage.daemon.told(&["reload", "--dry-run"]).expect("told");
    assert_eq!(said, "dry run: nothing would change\n");
    let now = stage.daemon.told(&["config", "show"]).expect("shown");
    assert_eq!(now, changed);
}

#[test]
fn logs_in_json_are_an_object_a_line() {
    let netns = Netns::new("control").expect("a namespace");
    let folder = Folder::new().expect("a folder");
    let mut command = netns.command(program("dispatcherd").expect("dispatcherd"));
    command.args(["--log-format", "json", "--interface", "no-such-if", "--control"]);
    command.arg(folder.path().join("control.sock"));
    let mut process = Process::start(command, None).expect("starts");
    assert!(!process.wait(Duration::from_secs(30)).expect("ends").success());
    let log = process.log();
    // The steps of the start are on stdout, for people.
    let lines: Vec<&str> = log.lines().filter(|line| !line.starts_with("dispatcherd: ")).collect();
    let objects: Vec<Value> =
        lines.iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    let last = objects.last().expect("the reason");
    assert_eq!((&last["level"], &last["target"]), (&json!("error"), &json!("dispatcherd")));
    assert!(last["message"].as_str().is_some_and(|text| text.contains("no-such-if")), "{last}");
    assert!(objects.iter().all(|one| one["time"].is_string() && one["message"].is_string()), "{log}");
}

#[test]
fn an_address_for_metrics_that_is_taken_is_told() {
    let netns = Netns::new("control").expect("a namespace");
    netns.ip("link set lo up").expect("lo");
    let _taken = netns.run(|| std::net::TcpListener::bind(METRICS)).expect("listens");
    let text = format!("{UNPINNED}\nmetrics = \"{METRICS}\"\ninterfaces = [\"lo\"]\nattach = \"generic\"\n");
    let error = Daemon::start_with(&netns, &text).expect_err("is taken");
    let said = format!("{error:#}");
    assert!(
        said.contains("metrics: listening on 127.0.0.1:9100") && said.contains("another address"),
        "{said}"
    );
}

/// The socket's mode keeps others out. Where somebody has opened it to all, the daemon asks who comes.
#[test]
fn who_is_neither_root_nor_of_the_group_is_refused() {
    const NOBODY: u32 = 65_534;
    let netns = Netns::new("control").expect("a namespace");
    let folder = Folder::new().expect("a folder");
    // A copy, as the build's folder may be closed to others.
    let copy = folder.path().join("dispatcherctl");
    std::fs::copy(program("dispatcherctl").expect("dispatcherctl"), &copy).expect("a copy");
    let asks = |daemon: &Daemon, group: u32| {
        let mut command = Command::new(&copy);
        command.arg("--socket").arg(daemon.socket()).arg("status").uid(NOBODY).gid(group);
        let output = command.output().expect("starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let text = format!("{UNPINNED}\ninterfaces = [\"lo\"]\nattach = \"generic\"\n");
    let mut daemon = Daemon::start_with(&netns, &text).expect("dispatcherd");
    let (code, said) = asks(&daemon, NOBODY);
    assert!(
        code == Some(3) && said.contains("run as root, or as a member of the daemon's control_group"),
        "{said}"
    );
    let all = std::fs::Permissions::from_mode(0o666);
    std::fs::set_permissions(daemon.socket(), all).expect("open to all");
    let (code, said) = asks(&daemon, NOBODY);
    let refusal = "only root may ask, or, if control_group names a group, its members";
    assert_eq!((code, said.as_str()), (Some(1), format!("dispatcherctl: {refusal}\n").as_str()));
    let of_nobody = std::thread::scope(|scope| {
        let asks = || {
            // SAFETY: a system call with integers only; unlike libc's function it changes this thread alone.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) }, 0);
            ask(&daemon, "GET", "/v1/status", "")
        };
        scope.spawn(asks).join().expect("an answer")
    });
    assert_eq!(of_nobody, (403, json!({ "error": refusal }).to_string()));
    assert!(daemon.process().log().contains("user 65534 is not root; refused"), "{}", daemon.process().log());
    assert_eq!(ask(&daemon, "GET", "/v1/status", "").0, 200, "root may");

    daemon.stop().expect("ends");
    let groups = std::fs::read_to_string("/etc/group").expect("groups");
    let line =
        groups.lines().find(|line| line.starts_with("daemon:")).expect("a group that every system has");
    let member = line.split(':').nth(2).expect("a number").parse().expect("a number");
    daemon.again(&netns, &format!("control_group = \"daemon\"\n{text}")).expect("dispatcherd again");
    let (code, said) = asks(&daemon, member);
    assert_eq!((code, said.as_str()), (Some(0), ""), "a member may");
    let (code, said) = asks(&daemon, NOBODY);
    assert!(code == Some(3) && said.contains("control_group"), "{said}");
}
