//! A new configuration for a running daemon.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use dispatcher_tests::{
    daemon::{Daemon, Folder, Process, Service, config, program},
    http, sockets,
    tls::{Authority, Identity, Manners, Server, User, Version, visit_in_clear},
    topology::{Family, Plan, Topology},
    town::until,
};
use dispatcher_user::api;

const PORT: u16 = 443;
const OTHER: u16 = 444;

struct Scene {
    daemon: Daemon,
    authority: Authority,
    _servers: Vec<Server>,
    topology: Topology,
}

impl Scene {
    fn new() -> Self {
        let authority = Authority::new().expect("certificates");
        let topology = Topology::new(Plan::default()).expect("namespaces");
        let mut servers = Vec::new();
        for (i, place) in topology.backends.iter().enumerate() {
            let name = format!("b{}", i + 1);
            servers.push(
                Server::start(&place.netns, &name, PORT, &authority, Manners::default()).expect("a server"),
            );
        }
        let daemon = Daemon::start(&topology, "native", &[web()]).expect("dispatcherd");
        Self { daemon, authority, _servers: servers, topology }
    }

    fn text(&self, services: &[Service]) -> String {
        config(&self.topology, "native", services)
    }

    fn reload(&self, text: &str) -> api::Reload {
        self.daemon.rewrite(text).expect("written");
        self.daemon.ask(&["reload"]).expect("reloaded")
    }

    /// Why a configuration is not put in force.
    fn refused(&self, text: &str) -> String {
        self.daemon.rewrite(text).expect("written");
        let error = self.daemon.ask::<api::Reload>(&["reload"]).expect_err("refused");
        format!("{error:#}")
    }

    fn visit(&self, user: &User, turn: usize) -> Identity {
        let family = Family::BOTH[turn % 2];
        let to = SocketAddr::new(family.vip(), PORT);
        user.visit(&self.topology.clients, self.topology.client(family, turn / 2), to).expect("an answer")
    }

    /// Who answers new connections to a port.
    fn answers(&self, port: u16, times: usize) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        for turn in 0..times {
            let family = Family::BOTH[turn % 2];
            let to = SocketAddr::new(family.vip(), port);
            let from = self.topology.client(family, turn / 2 % 4);
            seen.insert(visit_in_clear(&self.topology.clients, from, to).expect("an answer").backend);
        }
        seen
    }
}

fn web() -> Service {
    Service::new("web", PORT)
}

#[test]
fn sessions_and_connections_outlive_a_reload() {
    let scene = Scene::new();
    let users: Vec<User> =
        (0..6).map(|_| User::new(&scene.authority, Version::Tls12).expect("a user")).collect();
    let homes: Vec<String> =
        users.iter().enumerate().map(|(turn, user)| scene.visit(user, turn).backend).collect();
    let to = SocketAddr::new(Family::V4.vip(), PORT);
    let from = scene.topology.client(Family::V4, 0);
    let mut line = users[0].connect(&scene.topology.clients, from, to).expect("a connection");
    http::download(&mut line, 100_000).expect("a download");

    let text = scene.text(&[web().weights(&[1, 0, 0]).with("balance = \"weighted-round-robin\"")]);
    scene.daemon.rewrite(&text).expect("written");
    let wanted = [
        "~ service web: balance: maglev -> weighted-round-robin",
        "~ backend web/b2: weight: 1 -> 0",
        "~ backend web/b3: weight: 1 -> 0",
    ];
    let dry: api::Reload = scene.daemon.ask(&["reload", "--dry-run"]).expect("told");
    assert_eq!((dry.applied, dry.changes.as_slice()), (false, wanted.map(str::to_owned).as_slice()));
    assert_eq!(scene.daemon.backends().expect("backends")[1].weight, 1, "a dry run changes nothing");
    let done: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    assert_eq!((done.applied, done.changes.as_slice()), (true, wanted.map(str::to_owned).as_slice()));

    http::download(&mut line, 100_000).expect("the connection lives");
    for (turn, (user, home)) in users.iter().zip(&homes).enumerate() {
        let identity = scene.visit(user, turn + 1);
        assert_eq!((&identity.backend, identity.reused.as_str()), (home, "r"), "known sessions stay");
    }
    assert_eq!(scene.answers(PORT, 20), BTreeSet::from(["b1".to_owned()]), "new ones follow the weights");
    let again: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    assert_eq!(again.changes, [""; 0]);
    assert_eq!(scene.daemon.drops().expect("counters"), []);
}

#[test]
fn services_and_backends_come_and_go() {
    let scene = Scene::new();
    let two = scene.text(&[web(), Service::new("other", OTHER).backend_port(PORT)]);
    let gone = two.split("\n[[service.backend]]\nname = \"b3\"").next().expect("a start").to_owned();
    // The first service loses its last backend, a second service comes.
    let second = &two[two.find("\n[[service]]\nname = \"other\"").expect("there")..];
    let done = scene.reload(&format!("{gone}{second}"));
    assert_eq!(done.changes, ["- backend web/b3", "+ service other (3 backends)"]);
    assert_eq!(scene.answers(PORT, 30), BTreeSet::from(["b1", "b2"].map(str::to_owned)));
    assert_eq!(scene.answers(OTHER, 40).len(), 3);
    // And back.
    let done = scene.reload(&scene.text(&[web()]));
    assert_eq!(done.changes, ["- service other (3 backends)", "+ backend web/b3"]);
    assert_eq!(scene.answers(PORT, 40).len(), 3);
    let from = scene.topology.client(Family::V4, 0);
    let to = SocketAddr::new(Family::V4.vip(), OTHER);
    assert!(sockets::connect(&scene.topology.clients, from, to).is_err(), "the service is gone");
}

#[test]
fn what_is_wrong_changes_nothing() {
    let scene = Scene::new();
    let good = scene.text(&[web()]);
    let error = scene.refused(&good.replace("name = \"web\"", "name = \"web\"\nbalance = \"best\""));
    assert!(error.contains("dispatcher.toml: line ") && error.contains("service.balance"), "{error}");
    assert!(error.contains("nothing was changed"), "{error}");
    let error = scene.refused(&good[..good.len() - 20]);
    assert!(error.contains("line "), "half a file: {error}");
    let error = scene.refused(&good.replace("flows = 65536", "flows = 4096"));
    assert!(error.contains("these need a restart") && error.contains("flows: 65536"), "{error}");
    let error = scene.refused(&good.replacen("interfaces = [", "interfaces = [\"none0\", ", 1));
    assert!(error.contains("none0"), "{error}");
    let error = scene.daemon.ask::<api::Reload>(&["reload", "--dry-run"]).expect_err("it would be refused");
    assert!(format!("{error:#}").contains("none0"), "{error:#}");
    assert_eq!(scene.answers(PORT, 30).len(), 3, "all as before");
    assert_eq!(scene.daemon.status().expect("status").services, 1);
}

/// Nobody waits for it yet, and it must not end the process.
#[test]
fn sighup_during_the_start_is_a_reload() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let folder = Folder::new().expect("a folder");
    let text = config(&topology, "native", &[web()]);
    let file = folder.write("dispatcher.toml", &text).expect("a file");
    let mut command = topology.dispatcher.command(program("dispatcherd").expect("dispatcherd"));
    command.arg("--config").arg(file).arg("--control").arg(folder.path().join("control.sock"));
    let mut process = Process::start(command, None).expect("starts");
    until("it is not ready", || {
        std::thread::sleep(Duration::from_millis(100));
        assert!(process.ended().is_none(), "it ended: {}", process.log());
        let log = process.log();
        // Before it says so, the program itself may not have begun.
        if log.contains("on 2 interfaces") && !log.contains("ready") {
            process.signal(libc::SIGHUP);
        }
        log.contains("ready")
    });
    until("it was not told", || process.log().contains("reloaded"));
    process.signal(libc::SIGTERM);
    assert!(process.wait(Duration::from_secs(20)).expect("ends").success());
}

#[test]
fn what_the_operator_set_gives_way_to_the_file() {
    let mut scene = Scene::new();
    let _: Vec<api::Backend> = scene.daemon.ask(&["backend", "web/b1", "disabled"]).expect("set");
    let state = |scene: &Scene| scene.daemon.backends().expect("backends")[0].state.clone();
    assert_eq!(state(&scene), "disabled");
    let dry: api::Reload = scene.daemon.ask(&["reload", "--dry-run"]).expect("told");
    assert_eq!(dry.changes, ["~ backend web/b1: state: disabled -> enabled"]);
    scene.daemon.process().signal(libc::SIGHUP);
    let deadline = Instant::now() + Duration::from_secs(5);
    while state(&scene) != "up" {
        assert!(Instant::now() < deadline, "SIGHUP reloads");
        std::thread::sleep(Duration::from_millis(20));
    }
}
