//! What goes wrong in networks, and must not show.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::Daemon,
    hello::{ask, client_hello},
    http, sockets,
    stage::{Stage, web},
    tls::{Line, Manners, Version},
    topology::{Family, Plan, Topology},
};

/// Drops packets at all backends by a rule that counts, so that the same ones are lost each time.
fn lose_at_backends(stage: &Stage, hook: &str, which: &str) {
    let chain = format!("chain c {{\ntype filter hook {hook} priority 0\n{which} drop\n}}");
    for place in &stage.topology.backends {
        place.netns.nft(&format!("table inet trouble {{\n{chain}\n}}")).expect("a rule");
    }
}

/// Users of both versions and families, as usual.
fn life_goes_on(stage: &Stage) {
    let _ = stage.returns(4);
    for family in Family::BOTH {
        let _ = stage.visit(&stage.user(Version::Tls13), family, 1);
        let _ = stage.visit_in_clear(family, 2);
    }
}

#[test]
fn lost_syns_to_the_backend() {
    let stage = Stage::usual();
    lose_at_backends(&stage, "input", "tcp flags & (syn | ack) == syn numgen inc mod 2 == 0");
    life_goes_on(&stage);
    assert!(stage.daemon.counter(Reason::SynRepeated).expect("a counter") > 0);
}

#[test]
fn lost_syn_acks_of_the_backend() {
    let stage = Stage::usual();
    lose_at_backends(&stage, "output", "tcp flags & (syn | ack) == syn | ack numgen inc mod 2 == 0");
    life_goes_on(&stage);
}

#[test]
fn lost_first_data_at_the_backend() {
    let stage = Stage::usual();
    lose_at_backends(&stage, "input", "tcp flags & (syn | psh) == psh numgen inc mod 2 == 0");
    life_goes_on(&stage);
}

/// Users by threads, until each has come back a few times.
fn crowd(work: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
}

#[test]
fn claim_c2_sessions_return_under_loss_on_the_clients_side() {
    let stage = Stage::usual();
    Topology::lose(&stage.topology.clients, 5).expect("loss");
    crowd(|_| {
        for _ in 0..3 {
            let _ = stage.returns(4);
        }
    });
}

/// When a backend seems dead, since all it sends is lost, another one gets the connection. So what
/// is certain here is only that everybody is served.
#[test]
fn everybody_is_served_under_loss_on_the_backends_side() {
    let stage = Stage::usual();
    for place in &stage.topology.backends {
        Topology::lose(&place.netns, 5).expect("loss");
    }
    crowd(|thread| {
        let user = stage.user(Version::Tls12);
        for turn in 0..12 {
            let _ = stage.visit(&user, Family::BOTH[turn % 2], thread + turn);
        }
    });
}

#[test]
fn a_backend_that_refuses_is_left_for_another() {
    let mut stage = Stage::usual();
    let gone = stage.servers.remove(1);
    let name = gone.name.clone();
    drop(gone);
    let servers: BTreeSet<String> =
        (0..24).map(|turn| stage.visit_in_clear(Family::BOTH[turn % 2], turn).backend).collect();
    assert!(!servers.contains(&name), "{servers:?}");
    let backends = stage.daemon.backends().expect("backends");
    let refused = backends.iter().find(|backend| backend.name == name).expect("it is listed").refused;
    assert!(refused > 0, "{backends:?}");
}

#[test]
fn a_backend_that_vanishes_is_left_for_another() {
    let stage = Stage::usual();
    let gone = &stage.topology.backends[2];
    gone.netns.ip("link set eth0 down").expect("down");
    std::thread::scope(|scope| {
        for turn in 0..12 {
            let stage = &stage;
            scope.spawn(move || {
                let identity = stage.visit(&stage.user(Version::Tls12), Family::BOTH[turn % 2], turn);
                assert_ne!(identity.backend, "b3");
            });
        }
    });
}

/// The backend's card is replaced: the daemon hears of it and running flows follow.
#[test]
fn a_backend_gets_another_mac_address() {
    let stage = Stage::usual();
    let user = stage.user(Version::Tls12);
    for (turn, family) in Family::BOTH.into_iter().enumerate() {
        let home = stage.visit(&user, family, 0).backend;
        let place = &stage.topology.backends[usize::from(home.as_bytes()[1] - b'1')];
        let mut line = user
            .connect(&stage.topology.clients, stage.from(family, 1), stage.at(family))
            .expect("a running connection");
        http::download(&mut line, 1000).expect("which works");
        place
            .netns
            .ip(&format!("link set eth0 address 02:00:00:00:ee:0{turn}\nneighbour flush dev eth0"))
            .expect("another address");
        // As hosts do it, it tells its neighbours by asking for them.
        for family in Family::BOTH {
            let router = if family == Family::V4 { "10.2.0.1" } else { "2001:db8:2::1" };
            let to = SocketAddr::new(router.parse().expect("an address"), 9);
            let error =
                sockets::connect(&place.netns, place.address(family), to).expect_err("nobody listens");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
        http::download(&mut line, 100_000).expect("the running connection goes on");
        let identity = stage.visit(&user, family, 2);
        assert_eq!((identity.backend, identity.reused.as_str()), (home, "r"));
    }
}

fn miss_by_daemon() -> Stage {
    Stage::new(Plan::default(), "native", &web().with("miss = \"daemon\""), Manners::default())
}

/// Asks with an ID that nobody knows.
fn ask_unknown(stage: &Stage, family: Family, id: u8) -> String {
    let mut stream = stage.connect(family, 0).expect("a connection");
    ask(&mut stream, &client_hello(&[id; 32], 0)).expect("a flight").server
}

#[test]
fn claim_c7_misses_go_by_the_daemon_and_without_it_by_the_table() {
    let mut stage = miss_by_daemon();
    for (id, family) in (1..9).zip(Family::BOTH.into_iter().cycle()) {
        assert!(!ask_unknown(&stage, family, id).is_empty());
    }
    let events = stage.daemon.status().expect("status").events;
    assert!(events.held >= 8 && events.released >= 8, "{events:?}");
    life_goes_on(&stage);
    // It hangs: no sign of life, no answers.
    stage.daemon.process().signal(libc::SIGSTOP);
    for (id, family) in (101..109).zip(Family::BOTH.into_iter().cycle()) {
        assert!(!ask_unknown(&stage, family, id).is_empty());
    }
    life_goes_on(&stage);
    stage.daemon.process().signal(libc::SIGCONT);
}

/// A connection from a port, with a request in clear.
fn once(stage: &Stage, from: SocketAddr, family: Family) -> TcpStream {
    let stream = sockets::connect_from(&stage.topology.clients, from, stage.at(family))
        .unwrap_or_else(|error| panic!("from {from}: {error}"));
    let mut line = Line::new(stream.try_clone().expect("a second handle"));
    let answer = http::get(&mut line, "/").unwrap_or_else(|error| panic!("from {from}: {error:#}"));
    assert!(answer.contains(&from.ip().to_string()), "{answer}");
    stream
}

#[test]
fn the_same_port_again_after_rst() {
    let stage = Stage::usual();
    for family in Family::BOTH {
        let from = SocketAddr::new(stage.from(family, 0), 33_333);
        for _ in 0..6 {
            sockets::reset(once(&stage, from, family)).expect("resets");
        }
    }
}

#[test]
fn the_same_port_again_after_fin() {
    let stage = Stage::usual();
    stage.topology.clients.sysctl(&["ipv4/tcp_tw_reuse=1"]).expect("reuse");
    for family in Family::BOTH {
        let from = SocketAddr::new(stage.from(family, 0), 33_334);
        for _ in 0..3 {
            drop(once(&stage, from, family));
            // Linux lets a port in TIME-WAIT be used again when the timestamp has moved on.
            std::thread::sleep(Duration::from_millis(1100));
        }
    }
}

/// The dispatcher is started anew and knows nothing of old connections: their clients must hear so.
#[test]
fn connections_without_state_are_reset() {
    let mut stage = Stage::usual();
    let mut streams: Vec<TcpStream> = Family::BOTH
        .into_iter()
        .map(|family| once(&stage, SocketAddr::new(stage.from(family, 0), 0), family))
        .collect();
    stage.daemon.kill().expect("kills");
    let config = dispatcher_tests::daemon::config(&stage.topology, "native", &[web()]);
    let _second = Daemon::start_with(&stage.topology.dispatcher, &config).expect("dispatcherd again");
    for stream in &mut streams {
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("is sent");
        let error = stream.read(&mut [0; 100]).expect_err("the connection is no more");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    for family in Family::BOTH {
        let _ = stage.visit_in_clear(family, 1);
    }
}

#[test]
fn clients_that_say_nothing_or_leave_early() {
    let stage = Stage::usual();
    for family in Family::BOTH {
        for _ in 0..5 {
            // Never a word, then FIN; a word, then RST; half a hello, then FIN.
            drop(stage.connect(family, 0).expect("a connection"));
            let mut stream = stage.connect(family, 0).expect("a connection");
            stream.write_all(b"GET /").expect("sends");
            sockets::reset(stream).expect("resets");
            let mut stream = stage.connect(family, 0).expect("a connection");
            stream.write_all(&client_hello(&[1; 32], 0)[..50]).expect("sends");
            drop(stream);
        }
    }
    life_goes_on(&stage);
}

#[test]
fn many_connections_at_once() {
    let stage = Stage::usual();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let stage = &stage;
            scope.spawn(move || {
                let user = stage.user(Version::Tls12);
                let home = stage.visit(&user, Family::V4, thread).backend;
                for turn in 0..20 {
                    let identity = stage.visit(&user, Family::BOTH[turn % 2], thread + turn);
                    assert_eq!((&identity.backend, identity.reused.as_str()), (&home, "r"));
                }
            });
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(60), "one of them hung");
    assert_eq!(stage.daemon.status().expect("status").hits, 16 * 20);
}
