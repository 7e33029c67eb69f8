//! The namespaces themselves, without a dispatcher: plain routing must work in every shape.

use std::{io::ErrorKind, net::SocketAddr, time::Duration};

use dispatcher_tests::{
    http,
    netns::Netns,
    sockets,
    tagger::Tagger,
    tls::{Authority, Manners, Server, User, Version},
    topology::{Family, Plan, Shape, Topology, cable},
};

/// Every client address reaches the VIP and every backend, by the kernel alone: nobody listens, so
/// the answer is a refusal.
fn reaches_everything(plan: Plan) {
    let topology = Topology::new(plan).expect("the namespaces can be made");
    for family in Family::BOTH {
        let targets = topology.backends.iter().map(|backend| backend.address(family)).chain([family.vip()]);
        for (number, target) in targets.enumerate() {
            let from = topology.client(family, number);
            let error = sockets::connect(&topology.clients, from, SocketAddr::new(target, 9))
                .expect_err("no server listens on this port");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{plan:?}: {from} to {target}: {error}");
        }
    }
}

#[test]
fn two_arms_with_a_bridge() {
    reaches_everything(Plan::default());
}

#[test]
fn two_arms_with_a_link_each() {
    reaches_everything(Plan { shape: Shape::Links, ..Plan::default() });
}

#[test]
fn one_arm() {
    reaches_everything(Plan { shape: Shape::OneArm, ..Plan::default() });
}

#[test]
fn nothing_is_left_after_a_panic() {
    let names = std::sync::Mutex::new(Vec::new());
    let result = std::panic::catch_unwind(|| {
        let topology = Topology::new(Plan::default()).expect("the namespaces can be made");
        names.lock().expect("not poisoned yet").push(topology.clients.name().to_owned());
        panic!("on purpose");
    });
    assert!(result.is_err());
    let names = names.lock().expect("the panic came after the lock was released");
    assert_eq!(names.len(), 1);
    for name in &*names {
        assert!(!std::path::Path::new("/run/netns").join(name).exists(), "{name} is still there");
    }
}

/// Two switches back to back: what one puts on, the other must find and take off.
#[test]
fn tags_travel_between_two_switches() {
    for count in [1, 2] {
        let names = ["left", "near", "far", "right"];
        let [left, near, far, right] = names.map(|name| Netns::new(name).expect("a namespace"));
        cable(&left, "eth0", &near, "plain").expect("a cable");
        cable(&near, "trunk", &far, "trunk").expect("a cable");
        cable(&right, "eth0", &far, "plain").expect("a cable");
        let _near = Tagger::new(&near, "plain", "trunk", count).expect("a switch");
        let far_switch = Tagger::new(&far, "plain", "trunk", count).expect("a switch");
        left.ip("address add 10.9.0.1/24 dev eth0\nlink set eth0 mtu 1496").expect("an address");
        right.ip("address add 10.9.0.2/24 dev eth0\nlink set eth0 mtu 1496").expect("an address");
        let authority = Authority::new().expect("certificates");
        let _server = Server::start(&right, "right", 443, &authority, Manners::default()).expect("a server");
        let user = User::new(&authority, Version::Tls13).expect("a user");
        let (from, to) =
            ("10.9.0.1".parse().expect("an address"), "10.9.0.2:443".parse().expect("an address"));
        let mut line = user.connect(&left, from, to).expect("a connection");
        http::download(&mut line, 3_000_000).expect("a download");
        http::upload(&mut line, 3_000_000).expect("an upload");
        // A switch that expects other tags lets nothing through.
        drop(far_switch);
        let _other = Tagger::new(&far, "plain", "trunk", 3 - count).expect("a switch");
        line.stream().sock.set_read_timeout(Some(Duration::from_millis(700))).expect("a limit");
        assert!(http::get(&mut line, "/").is_err());
    }
}
