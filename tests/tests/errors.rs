//! What `dispatcherd` and `dispatcherctl` say when they cannot do what they are told.

use std::{
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use dispatcher_tests::{
    daemon::{Daemon, Folder, Process, UNPINNED, config, program},
    netns::{Netns, execute},
    stage::web,
    tls::Authority,
    topology::{Plan, Topology, VIP},
};

/// Starts `dispatcherd` on a configuration that must be refused; what it says.
fn refused(netns: &Netns, text: &str) -> String {
    let folder = Folder::new().expect("a folder");
    let file = folder.write("dispatcher.toml", text).expect("a file");
    let mut command = netns.command(program("dispatcherd").expect("dispatcherd"));
    command.arg("--config").arg(file).arg("--control").arg(folder.path().join("control.sock"));
    let mut process = Process::start(command, None).expect("starts");
    let status = process.wait(Duration::from_secs(30)).expect("ends");
    assert!(!status.success(), "it was to refuse:\n{text}");
    assert!(!folder.path().join("control.sock").exists(), "the socket is left behind");
    process.log()
}

fn service(lines: &str) -> String {
    format!(
        "{UNPINNED}\ninterfaces = [\"lo\"]\n\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:443\"\n{lines}\n\n\
         [[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1:443\"\n"
    )
}

#[test]
fn bad_configurations_name_line_key_and_remedy() {
    let netns = Netns::new("errors").expect("a namespace");
    let rows = [
        ("a typing error", "interfaces = [\n".to_owned(), "line "),
        ("an unknown key", service("bananas = 1"), "bananas"),
        ("an unknown mode", service("mode = \"magic\""), "passthrough"),
        ("an unknown algorithm", service("balance = \"dice\""), "maglev"),
        ("an address without port", service("").replace("192.0.2.1:443", "192.0.2.1"), "vip"),
        ("metrics for everybody", "metrics = \"0.0.0.0:9100\"\n".to_owned() + &service(""), "metrics_public"),
        ("a negative weight", service("") + "weight = -1\n", "weight"),
        (
            "PROXY without delayed binding",
            service("mode = \"l4\"\nproxy_protocol = \"v2\""),
            "proxy_protocol",
        ),
        ("a pool without addresses", service("source = \"dispatcher\""), "source_addresses"),
        (
            "two services of one name",
            service("") + &service("").replace(&format!("{UNPINNED}\ninterfaces = [\"lo\"]"), ""),
            "web",
        ),
    ];
    for (what, text, expected) in rows {
        let said = refused(&netns, &text);
        assert!(said.contains("line ") && said.contains(expected), "{what}: {said}");
        assert!(said.contains("dispatcher.toml"), "{what}: {said}");
    }
}

#[test]
fn a_missing_file_or_interface() {
    let netns = Netns::new("errors").expect("a namespace");
    let said =
        refused(&netns, &service("").replace("interfaces = [\"lo\"]", "interfaces = [\"no-such-if\"]"));
    assert!(said.contains("interface no-such-if does not exist"), "{said}");
    let mut command = Command::new(program("dispatcherd").expect("dispatcherd"));
    let error = execute(command.args(["--config", "/nonexistent/d.toml"]), None).expect_err("no such file");
    assert!(format!("{error:#}").contains("reading /nonexistent/d.toml"), "{error:#}");
}

#[test]
fn a_control_path_that_is_no_socket_is_left_alone() {
    let netns = Netns::new("errors").expect("a namespace");
    let folder = Folder::new().expect("a folder");
    let file = folder.write("precious.txt", "precious").expect("a file");
    for (path, expected) in [
        (file.clone(), "is there and is no socket"),
        (folder.path().to_owned(), "is there and is no socket"),
        (folder.path().join("no/such/folder.sock"), "does not exist"),
    ] {
        let mut command = netns.command(program("dispatcherd").expect("dispatcherd"));
        command.args(["--interface", "lo", "--control"]).arg(&path);
        let mut process = Process::start(command, None).expect("starts");
        assert!(!process.wait(Duration::from_secs(30)).expect("ends").success());
        assert!(process.log().contains(expected), "{}", process.log());
    }
    assert_eq!(std::fs::read_to_string(file).expect("still there"), "precious");
    assert!(!folder.path().join("no").exists());
}

#[test]
fn a_missing_capability_is_told() {
    let netns = Netns::new("errors").expect("a namespace");
    let folder = Folder::new().expect("a folder");
    let mut command = netns.command("setpriv");
    command.args(["--bounding-set=-perfmon,-sys_admin", "--inh-caps=-perfmon,-sys_admin"]);
    command.arg(program("dispatcherd").expect("dispatcherd"));
    command.args(["--interface", "lo", "--control"]).arg(folder.path().join("control.sock"));
    let mut process = Process::start(command, None).expect("starts");
    assert!(!process.wait(Duration::from_secs(60)).expect("ends").success());
    let said = process.log();
    assert!(said.contains("CAP_PERFMON") && said.lines().count() < 8, "{said}");
}

#[test]
fn native_mode_where_it_is_not_supported() {
    let netns = Netns::new("errors").expect("a namespace");
    netns.ip("link add br0 type bridge\nlink set br0 up").expect("a device without native XDP");
    let text = service("").replace("interfaces = [\"lo\"]", "interfaces = [\"br0\"]");
    let said = refused(&netns, &text.replace("\n\n[[service]]", "\nattach = \"native\"\n\n[[service]]"));
    assert!(said.contains("br0") && said.contains("generic"), "{said}");
    let daemon = Daemon::start_with(&netns, &text).expect("auto falls back to generic mode");
    let status = daemon.status().expect("status");
    assert_eq!(status.interfaces[0].mode.to_string(), "generic");
}

#[test]
fn an_interface_that_comes_back_is_attached_again() {
    let netns = Netns::new("errors").expect("a namespace");
    let make = "link add d0 type bridge\nlink set d0 up";
    netns.ip(make).expect("a device");
    let text =
        service("").replace("interfaces = [\"lo\"]", "interfaces = [\"d0\", \"lo\"]\nattach = \"generic\"");
    let daemon = Daemon::start_with(&netns, &text).expect("the daemon");
    let index = || {
        let status = daemon.status().expect("status");
        status.interfaces.iter().find(|one| one.name == "d0").map(|one| one.ifindex)
    };
    let until = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(std::time::Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let before = index().expect("attached");
    netns.ip("link del d0").expect("removes");
    until("status still shows what is gone", &|| index().is_none());
    netns.ip(make).expect("a device of the same name");
    until("not attached again", &|| index().is_some_and(|now| now != before));
    let seen = netns.execute("ip", &["link", "show", "d0"]).expect("ip link");
    assert!(seen.contains("prog/xdp"), "{seen}");
}

#[test]
fn an_interface_that_has_a_program_already() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let text = config(&topology, "native", &[web()]);
    let _first = Daemon::start_with(&topology.dispatcher, &text).expect("the first");
    let said = refused(&topology.dispatcher, &text);
    assert!(said.contains("cl0") && said.contains("already"), "{said}");
}

#[test]
fn not_root() {
    let folder = Folder::new().expect("a folder");
    // A copy, as the build's folder may be closed to others.
    let copy = folder.path().join("dispatcherd");
    std::fs::copy(program("dispatcherd").expect("dispatcherd"), &copy).expect("a copy");
    let mut command = Command::new(&copy);
    command.args(["--interface", "lo", "--control", "/nonexistent/control.sock"]).uid(65_534).gid(65_534);
    let output = command.stdin(Stdio::null()).output().expect("starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("root"), "{said}");
}

#[test]
fn checking_changes_nothing() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let folder = Folder::new().expect("a folder");
    let file = folder.write("dispatcher.toml", &config(&topology, "native", &[web()])).expect("a file");
    let file = file.to_string_lossy();
    let program = program("dispatcherd").expect("dispatcherd");
    let said = topology
        .dispatcher
        .execute(&program.to_string_lossy(), &["--check", "--config", &file])
        .expect("a good configuration");
    assert!(said.contains("1 service, 3 backends: good"), "{said}");
    let links = topology.dispatcher.execute("ip", &["-details", "link"]).expect("links");
    assert!(!links.contains("xdp"), "{links}");
    let pinned = folder.path().join("pins");
    let text =
        config(&topology, "native", &[web()]).replacen("pin = \"none\"", &format!("pin = {pinned:?}"), 1);
    folder.write("dispatcher.toml", &text).expect("a file");
    let refused = topology.dispatcher.execute(&program.to_string_lossy(), &["--check", "--config", &file]);
    let said = format!("{:#}", refused.expect_err("no place for pins"));
    assert!(said.contains("no BPF file system is mounted there; mount one") && !pinned.exists(), "{said}");
    let own = Authority::new().and_then(|authority| authority.issue("front")).expect("a certificate");
    let pem = folder.write("web.pem", &(own.certificate_pem + &own.key_pem)).expect("a file");
    let ended = |pem: &Path, log: &Path| {
        let service = web()
            .with("mode = \"terminate\"")
            .with(&format!("terminate.certificates = [{{ certificate = {pem:?} }}]"))
            .with(&format!("terminate.access_log = {log:?}"));
        config(&topology, "native", &[service])
    };
    let (log, nowhere) = (folder.path().join("access.jsonl"), Path::new("/nowhere/at.all"));
    let good = ended(&pem, &log);
    for (text, problem) in [
        (ended(nowhere, &log), Some("/nowhere/at.all")),
        (ended(&pem, nowhere), Some("the access log must be in a folder")),
        (good.replace(&VIP[0].to_string(), "203.0.113.9"), Some("203.0.113.9")),
        (good, None),
    ] {
        folder.write("dispatcher.toml", &text).expect("a file");
        let said = topology.dispatcher.execute(&program.to_string_lossy(), &["--check", "--config", &file]);
        match (said, problem) {
            (Err(error), Some(problem)) => assert!(format!("{error:#}").contains(problem), "{error:#}"),
            (said, problem) => assert!(said.is_ok() && problem.is_none(), "{problem:?}: {said:?}"),
        }
        assert!(!log.exists());
    }
}

#[test]
fn the_end_leaves_no_program_and_no_socket() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let mut daemon = Daemon::start(&topology, "native", &[web()]).expect("dispatcherd");
    let links = topology.dispatcher.execute("ip", &["-details", "link"]).expect("links");
    assert!(links.contains("xdp"), "{links}");
    let socket = daemon.socket().to_owned();
    daemon.process().signal(libc::SIGTERM);
    let status = daemon.process().wait(Duration::from_secs(10)).expect("ends");
    assert!(status.success(), "{status}");
    assert!(!socket.exists());
    let links = topology.dispatcher.execute("ip", &["-details", "link"]).expect("links");
    assert!(!links.contains("xdp"), "{links}");
}

#[test]
fn what_is_wrong_with_classes_is_told() {
    let netns = Netns::new("errors").expect("a namespace");
    let class = "\n[[class]]\nname = \"gold\"\nweight = 3\n";
    let daemon = Daemon::start_with(&netns, &(service("") + class)).expect("a daemon");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(program("dispatcherctl").expect("dispatcherctl"));
        let output = command.arg("--socket").arg(daemon.socket()).args(arguments).output().expect("starts");
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (refused, usage) = (Some(1), Some(2));
    for (arguments, code, expected) in [
        (&["qos", "weight", "tin", "3"][..], refused, "no class \"tin\"; there are: default, gold"),
        (&["qos", "weight", "gold", "0"], usage, "0 is not in 1..=10000"),
        (&["qos", "weight", "gold", "10001"], usage, "10001 is not in 1..=10000"),
        (&["qos", "weight", "gold"], usage, "<WEIGHT>"),
        (&["qos", "assign", "00ff", "gold", "--service", "shop"], refused, "no service shop"),
        (
            &["qos", "assign", "00ff", "tin", "--service", "web"],
            refused,
            "no class \"tin\"; there are: default, gold",
        ),
        (&["qos", "assign", "00ff", "gold", "--service", "web"], refused, "service web has no session 00ff"),
        (
            &["qos", "assign", "cookie:a", "gold", "--service", "web"],
            refused,
            "service web has no session cookie:a",
        ),
        (&["qos", "assign", "0", "gold", "--service", "web"], refused, "hexadecimal"),
        (&["qos", "assign", "00ff", "gold", "--service", "web", "--kind", "magic"], refused, "magic"),
    ] {
        let (found, said) = run(arguments);
        assert_eq!(found, code, "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    let classes: Vec<dispatcher_user::api::QosClass> = daemon.ask(&["qos", "classes"]).expect("classes");
    let classes: Vec<_> = classes.iter().map(|one| (one.name.as_str(), one.weight)).collect();
    assert_eq!(classes, [("default", 1), ("gold", 3)], "nothing was changed");
    assert_eq!(daemon.told(&["qos"]).expect("a table").lines().count(), 1, "nobody used a class");
}

#[test]
fn dispatcherctl_without_a_daemon() {
    let mut command = Command::new(program("dispatcherctl").expect("dispatcherctl"));
    let output = command.args(["--socket", "/nonexistent/control.sock", "status"]).output().expect("starts");
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/nonexistent/control.sock") && said.contains("dispatcherd"), "{said}");
}
