//! TLS sessions stay on their backend (rows C1, C2 and C7).

use std::{
    collections::BTreeSet,
    io::Write as _,
    net::SocketAddr,
    sync::Barrier,
    time::{Duration, Instant},
};

use dispatcher_tests::{
    daemon::Daemon,
    hello::{Flight, ask, client_hello, flight, in_records},
    stage::{PORT, Stage, web},
    system::{Nginx, OpensslUser},
    tls::{Authority, Manners, User, Version},
    topology::{Family, Plan, Topology},
};
use dispatcher_user::api;

fn hex(id: &[u8]) -> String {
    api::to_hex(id)
}

/// What the mapping table says of an ID, by `dispatcherctl sessions list`.
fn entries(daemon: &Daemon, id: &[u8]) -> Vec<api::Session> {
    let mut sessions = daemon.sessions().expect("the list of sessions");
    sessions.retain(|session| session.id == hex(id));
    sessions
}

/// Sends a hello with an ID and returns what the server says.
fn ask_with(stage: &Stage, family: Family, client: usize, id: &[u8]) -> Flight {
    let mut stream = stage.connect(family, client).expect("a connection");
    ask(&mut stream, &client_hello(id, 0)).expect("a server's flight")
}

#[test]
fn claim_c1_a_first_request_with_an_id_is_bound_to_a_server() {
    let stage = Stage::usual();
    for (number, family) in Family::BOTH.into_iter().enumerate() {
        let id = [0xc1 + number as u8; 32];
        assert!(entries(&stage.daemon, &id).is_empty());
        let first = ask_with(&stage, family, 0, &id);
        let bound = entries(&stage.daemon, &id);
        assert_eq!(bound.len(), 1, "{bound:?}");
        assert_eq!((bound[0].backend.as_str(), bound[0].service.as_str()), (first.server.as_str(), "web"));
        for client in 1..4 {
            for family in Family::BOTH {
                assert_eq!(ask_with(&stage, family, client, &id).server, first.server, "it goes there again");
            }
        }
        // The ID that the server issued is bound to it as well.
        let issued = entries(&stage.daemon, &first.session_id);
        assert_eq!(issued.len(), 1, "{issued:?}");
        assert_eq!(
            (issued[0].backend.as_str(), issued[0].state.as_str()),
            (first.server.as_str(), "confirmed")
        );
    }
    let status = stage.daemon.status().expect("status");
    assert_eq!(status.misses, 2, "{status:?}");
    assert_eq!(status.hits, 12, "{status:?}");
}

#[test]
fn claim_c2_sessions_return_to_their_server_from_anywhere() {
    let stage = Stage::usual();
    let homes: BTreeSet<String> = (0..16).map(|_| stage.returns(8)).collect();
    assert!(homes.len() > 1, "all sessions on one server prove nothing: {homes:?}");
    let status = stage.daemon.status().expect("status");
    assert_eq!((status.connections, status.fresh, status.hits), (16 * 8, 16, 16 * 7), "{status:?}");
    stage.only_drops(&[]).expect("no loss, no drops");
}

#[test]
fn claim_c2_with_nginx_and_openssl() {
    let authority = Authority::new().expect("certificates");
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let _servers: Vec<_> = topology
        .backends
        .iter()
        .enumerate()
        .map(|(i, place)| Nginx::start(&place.netns, &format!("n{i}"), PORT, &authority).expect("nginx"))
        .collect();
    let daemon = Daemon::start(&topology, "native", &[web()]).expect("dispatcherd");
    for round in 0..4 {
        let openssl = OpensslUser::new(&authority, Version::Tls12).expect("a user");
        let rustls = User::new(&authority, Version::Tls12).expect("a user");
        let (mut homes, mut others) = (BTreeSet::new(), BTreeSet::new());
        for turn in 0..4 {
            let family = Family::BOTH[(turn + round) % 2];
            let (from, to) = (topology.client(family, turn), SocketAddr::new(family.vip(), PORT));
            let expected = if turn == 0 { "." } else { "r" };
            let identity = openssl.visit(&topology.clients, from, to).expect("an answer to openssl");
            assert_eq!(identity.reused, expected, "turn {turn}: {identity:?}");
            homes.insert(identity.backend);
            let identity = rustls.visit(&topology.clients, from, to).expect("an answer to rustls");
            assert_eq!(identity.reused, expected, "turn {turn}: {identity:?}");
            others.insert(identity.backend);
        }
        assert_eq!((homes.len(), others.len()), (1, 1), "{homes:?} {others:?}");
    }
    assert_eq!(daemon.status().expect("status").hits, 4 * 2 * 3);
}

/// Requests that are past the TCP handshake when the first hello is sent, then all at once.
fn race(stage: &Stage, id: &[u8], runners: usize) -> BTreeSet<String> {
    let streams: Vec<_> =
        (0..runners).map(|i| stage.connect(Family::BOTH[i % 2], i).expect("a connection")).collect();
    let barrier = Barrier::new(runners);
    std::thread::scope(|scope| {
        let threads: Vec<_> = streams
            .into_iter()
            .map(|mut stream| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let hello = client_hello(id, 0);
                    barrier.wait();
                    ask(&mut stream, &hello).expect("a server's flight").server
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a runner")).collect()
    })
}

fn races(miss: &str) {
    let stage =
        Stage::new(Plan::default(), "native", &web().with(&format!("miss = \"{miss}\"")), Manners::default());
    let mut winners = BTreeSet::new();
    for round in 0..12 {
        let id = [0x70 + round; 32];
        let servers = race(&stage, &id, 4);
        assert_eq!(servers.len(), 1, "miss = {miss:?}, round {round}: one ID came to {servers:?}");
        let entries = entries(&stage.daemon, &id);
        assert_eq!(entries.len(), 1, "{entries:?}");
        assert!(servers.contains(&entries[0].backend), "{entries:?} {servers:?}");
        winners.extend(servers);
    }
    assert!(winners.len() > 1, "all IDs on one server prove nothing: {winners:?}");
    if miss == "daemon" {
        let events = stage.daemon.status().expect("status").events;
        assert!(events.held >= 12 && events.released >= 12, "{events:?}");
    }
}

#[test]
fn claim_c7_racing_first_requests_get_one_entry_by_the_table() {
    races("table");
}

#[test]
fn claim_c7_racing_first_requests_get_one_entry_by_the_daemon() {
    races("daemon");
}

#[test]
fn claim_c6_the_table_tells_a_sessions_server_and_tunnel() {
    let stage = Stage::usual();
    let home = stage.returns(3);
    let [session] = stage.daemon.sessions().expect("sessions").try_into().expect("one session");
    assert_eq!((session.backend.as_str(), session.state.as_str(), session.hits), (&*home, "confirmed", 2));
    // The service passes TLS through: there is no tunnel.
    assert_eq!(session.tunnel, 0);
    let table = stage.daemon.told(&["sessions", "show", &session.id]).expect("a table");
    for word in ["BACKEND", "TUNNEL", &home, &session.id] {
        assert!(table.contains(word), "{word} is missing in {table}");
    }
}

#[test]
fn claim_c2_the_operator_may_pin_and_remove_a_session() {
    let stage = Stage::usual();
    for (number, backend) in ["b1", "b2", "b3"].into_iter().enumerate() {
        let id = [0x91 + number as u8; 24];
        let _: serde_json::Value = stage
            .daemon
            .ask(&["sessions", "pin", &hex(&id), "--service", "web", "--backend", backend])
            .expect("pins");
        for family in Family::BOTH {
            assert_eq!(ask_with(&stage, family, number, &id).server, backend);
        }
        let _: serde_json::Value = stage.daemon.ask(&["sessions", "remove", &hex(&id)]).expect("removes");
        assert!(entries(&stage.daemon, &id).is_empty());
    }
}

#[test]
fn tls_1_3_works_and_leaves_nothing_behind() {
    let stage = Stage::usual();
    let user = stage.user(Version::Tls13);
    for turn in 0..6 {
        assert_eq!(stage.visit(&user, Family::BOTH[turn % 2], turn).protocol, "TLSv1.3");
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while !stage.daemon.sessions().expect("sessions").is_empty() {
        assert!(Instant::now() < deadline, "random IDs are kept: {:?}", stage.daemon.sessions());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_hello_retry_request_and_long_hellos() {
    let stage = Stage::new(Plan::default(), "native", &web(), Manners { retry: true, ..Manners::default() });
    for family in Family::BOTH {
        for bytes in [0, 1500, 3000, 4200] {
            let user = stage.user(Version::Tls13);
            let user = if bytes > 0 { user.with_long_hello(bytes) } else { user };
            let mut line = user
                .connect(&stage.topology.clients, stage.from(family, 0), stage.at(family))
                .unwrap_or_else(|error| panic!("a hello of {bytes} bytes: {error}"));
            let kind = line.stream().conn.handshake_kind();
            assert_eq!(kind, Some(rustls::HandshakeKind::FullWithHelloRetryRequest), "{bytes} bytes");
        }
    }
}

#[test]
fn claim_c2_long_hellos_lead_home_too() {
    let stage = Stage::usual();
    for family in Family::BOTH {
        let user = stage.user(Version::Tls12);
        let home = stage.visit(&user, family, 0).backend;
        for bytes in [1400, 2900, 4000] {
            let identity = stage.visit(&user.with_long_hello(bytes), family, 1);
            assert_eq!(
                (identity.backend.as_str(), identity.reused.as_str()),
                (home.as_str(), "r"),
                "{bytes} bytes"
            );
        }
    }
}

#[test]
fn claim_c2_hellos_in_small_pieces_lead_home_too() {
    let stage = Stage::usual();
    for family in Family::BOTH {
        let id = [if family == Family::V4 { 0xa4 } else { 0xa6 }; 32];
        let home = ask_with(&stage, family, 0, &id).server;
        let hello = client_hello(&id, 0);
        let whole = [hello.clone(), in_records(&hello, &[1, 4, 40, 60])];
        for hello in whole {
            for cut in [1, 3, 5, 9, 30, 44, 60] {
                let mut stream = stage.connect(family, cut).expect("a connection");
                stream.write_all(&hello[..cut]).expect("sends the first piece");
                std::thread::sleep(Duration::from_millis(20));
                stream.write_all(&hello[cut..]).expect("sends the rest");
                assert_eq!(flight(&mut stream).expect("a flight").server, home, "cut at {cut}");
            }
        }
        // Byte by byte over the most interesting part.
        let mut stream = stage.connect(family, 0).expect("a connection");
        for byte in &hello[..6] {
            stream.write_all(&[*byte]).expect("sends a byte");
            std::thread::sleep(Duration::from_millis(5));
        }
        stream.write_all(&hello[6..]).expect("sends the rest");
        assert_eq!(flight(&mut stream).expect("a flight").server, home, "byte by byte");
    }
}
