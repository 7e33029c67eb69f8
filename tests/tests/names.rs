//! Classes of connections by the name that clients ask for.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
};

use dispatcher_tests::{
    daemon::{Daemon, Pins, Service, config},
    sockets,
    tls::{Authority, Manners, Server, User, Version},
    topology::{Family, Plan, Topology},
    town::until,
};
use dispatcher_user::api;

const PORT: u16 = 443;
const CLASSES: &str = "\n[[class]]\nname = \"gold\"\nweight = 8\n[[class]]\nname = \"silver\"\n";

/// Dropped in the order of its fields.
struct Scene {
    daemon: Daemon,
    pins: Pins,
    authority: Authority,
    _servers: Vec<Server>,
    topology: Topology,
}

impl Scene {
    fn new(rules: &str) -> Self {
        let authority = Authority::new().expect("certificates");
        let topology = Topology::new(Plan::default()).expect("namespaces");
        let mut servers = Vec::new();
        for (i, place) in topology.backends.iter().enumerate() {
            let name = format!("b{}", i + 1);
            let server = Server::start(&place.netns, &name, PORT, &authority, Manners::default());
            servers.push(server.expect("a server"));
        }
        let pins = Pins::new();
        let text = text(&topology, &pins, rules);
        let daemon = Daemon::start_with(&topology.dispatcher, &text).expect("dispatcherd");
        Self { daemon, pins, authority, _servers: servers, topology }
    }

    fn text(&self, rules: &str) -> String {
        text(&self.topology, &self.pins, rules)
    }

    fn user(&self, version: Version) -> User {
        User::new(&self.authority, version).expect("a user")
    }

    fn connect(&self, family: Family) -> TcpStream {
        let (from, to) = (self.topology.client(family, 0), SocketAddr::new(family.vip(), PORT));
        sockets::connect(&self.topology.clients, from, to).expect("a connection")
    }

    /// The class of a connection that is open.
    fn class(&self, client: SocketAddr) -> String {
        let mut class = None;
        until("the flow is there", || {
            let flows: Vec<api::Flow> = self.daemon.ask(&["flows"]).expect("flows");
            class = flows.into_iter().find(|flow| flow.client == client).map(|flow| flow.class);
            class.is_some()
        });
        class.unwrap_or_default()
    }

    /// The class of a new connection.
    fn new_class(&self, user: &User, family: Family) -> String {
        let stream = self.connect(family);
        let client = stream.local_addr().expect("an address");
        let _line = user.secure(stream).expect("a handshake");
        self.class(client)
    }
}

fn text(topology: &Topology, pins: &Pins, rules: &str) -> String {
    let web = Service::new("web", PORT).with(&format!("classify = [{rules}]"));
    pins.within(&(config(topology, "native", &[web]) + CLASSES))
}

/// In other letters than those that clients send.
const BY_NAME: &str = r#"{ class = "gold", server_name = "Service.TEST" }"#;
const BY_NETWORK: &str = r#"{ class = "silver", clients = ["0.0.0.0/0", "::/0"] }"#;

#[test]
fn connections_are_classed_by_the_name_that_clients_ask_for() {
    let both = format!("{BY_NAME}, {BY_NETWORK}");
    let mut scene = Scene::new(&both);
    for version in [Version::Tls12, Version::Tls13] {
        for family in Family::BOTH {
            let user = scene.user(version);
            assert_eq!(scene.new_class(&user, family), "gold", "{version:?} {family:?}");
            let long = user.with_long_hello(2500);
            assert_eq!(scene.new_class(&long, family), "gold", "in segments, {version:?} {family:?}");
        }
    }
    let mut clear = scene.connect(Family::V4);
    clear.write_all(b"GET / HTTP/1.1\r\nHost: service.test\r\n\r\n").expect("sent");
    assert_eq!(scene.class(clear.local_addr().expect("an address")), "silver", "in clear there is no name");

    // Another daemon finds the names that are there, and those who are connected stay what they are.
    let user = scene.user(Version::Tls13);
    let stream = scene.connect(Family::V6);
    let client = stream.local_addr().expect("an address");
    let line = user.secure(stream).expect("a handshake");
    scene.daemon.stop().expect("an orderly end");
    let text = scene.text(&both);
    scene.daemon.again(&scene.topology.dispatcher, &text).expect("another daemon");
    assert_eq!((scene.class(client), scene.new_class(&user, Family::V6)), ("gold".into(), "gold".into()));

    scene.daemon.rewrite(&scene.text(BY_NETWORK)).expect("written");
    let reload: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    assert!(reload.applied, "{reload:?}");
    assert_eq!(scene.new_class(&user, Family::V4), "silver", "the rule is gone");
    assert_eq!(scene.class(client), "gold", "for new connections only");
    drop(line);
}
