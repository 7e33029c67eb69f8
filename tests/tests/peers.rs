//! The TLS peers themselves, connected by the kernel's routing only.

use std::net::SocketAddr;

use dispatcher_tests::{
    http,
    system::{Nginx, OpensslUser},
    tls::{Authority, Manners, Server, User, Version, visit_in_clear},
    topology::{Family, Plan, Shape, Topology},
};

const SMALL: Plan = Plan { shape: Shape::Links, backends: 2, clients: 2, tags: 0 };

#[test]
fn sessions_resume_on_their_own_server_only() {
    let topology = Topology::new(SMALL).expect("namespaces");
    let authority = Authority::new().expect("certificates");
    let servers: Vec<_> = topology
        .backends
        .iter()
        .enumerate()
        .map(|(i, b)| Server::start(&b.netns, &format!("b{i}"), 443, &authority, Manners::default()))
        .collect::<Result<_, _>>()
        .expect("servers");
    for version in Version::BOTH {
        for family in Family::BOTH {
            let user = User::new(&authority, version).expect("a user");
            let visit = |client, server: usize| {
                let to = SocketAddr::new(topology.backends[server].address(family), 443);
                user.visit(&topology.clients, topology.client(family, client), to).expect("an answer")
            };
            assert_eq!(visit(0, 0).reused, ".");
            let identity = visit(1, 0);
            assert_eq!((identity.backend.as_str(), identity.reused.as_str()), ("b0", "r"));
            assert!(identity.peer.contains(&topology.client(family, 1).to_string()), "{identity:?}");
            assert_eq!(visit(0, 1).reused, ".", "another server must not know the session");
        }
    }
    assert_eq!(servers[1].served(), 4);
}

#[test]
fn bodies_clear_text_long_hellos_and_retries() {
    let topology = Topology::new(SMALL).expect("namespaces");
    let authority = Authority::new().expect("certificates");
    let netns = &topology.backends[0].netns;
    let _plain = Server::start(netns, "plain", 443, &authority, Manners::default()).expect("a server");
    let _retry =
        Server::start(netns, "retry", 444, &authority, Manners { retry: true, ..Manners::default() })
            .expect("a server");
    let from = topology.client(Family::V4, 0);
    let to = |port| SocketAddr::new(topology.backends[0].address(Family::V4), port);
    let identity = visit_in_clear(&topology.clients, from, to(443)).expect("an answer in clear");
    assert_eq!((identity.backend.as_str(), identity.protocol.as_str()), ("plain", ""));
    let user = User::new(&authority, Version::Tls13).expect("a user");
    let mut line = user.connect(&topology.clients, from, to(443)).expect("a connection");
    http::download(&mut line, 3_000_001).expect("a download");
    http::upload(&mut line, 3_000_001).expect("an upload");
    let identity = user.with_long_hello(3000).visit(&topology.clients, from, to(443)).expect("an answer");
    assert_eq!(identity.backend, "plain");
    let mut line = user.connect(&topology.clients, from, to(444)).expect("a connection");
    let kind = line.stream().conn.handshake_kind();
    assert_eq!(kind, Some(rustls::HandshakeKind::FullWithHelloRetryRequest));
    http::download(&mut line, 10).expect("a download");
}

#[test]
fn nginx_and_openssl_resume_sessions_too() {
    let topology = Topology::new(SMALL).expect("namespaces");
    let authority = Authority::new().expect("certificates");
    let _first = Nginx::start(&topology.backends[0].netns, "n0", 443, &authority).expect("nginx");
    let _second = Nginx::start(&topology.backends[1].netns, "n1", 443, &authority).expect("nginx");
    for family in Family::BOTH {
        let user = OpensslUser::new(&authority, Version::Tls12).expect("a user");
        let visit = |client, server: usize| {
            let to = SocketAddr::new(topology.backends[server].address(family), 443);
            user.visit(&topology.clients, topology.client(family, client), to).expect("an answer")
        };
        assert_eq!(visit(0, 0).reused, ".");
        let identity = visit(1, 0);
        assert_eq!((identity.backend.as_str(), identity.reused.as_str()), ("n0", "r"));
        assert!(identity.peer.contains(&topology.client(family, 1).to_string()), "{identity:?}");
        assert_eq!(visit(0, 1).reused, ".", "another server must not know the session");
        let rustls = User::new(&authority, Version::Tls12).expect("a user");
        let to = SocketAddr::new(topology.backends[0].address(family), 443);
        let from = topology.client(family, 0);
        assert_eq!(rustls.visit(&topology.clients, from, to).expect("an answer").reused, ".");
        assert_eq!(rustls.visit(&topology.clients, from, to).expect("an answer").reused, "r");
    }
}
