//! Connections that wait in the daemon until backends can take them (`miss = "daemon"`).

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    hello::{ask, client_hello},
    stage::{Stage, web},
    tls::{Manners, Version},
    topology::{Family, Plan},
    town::until,
};
use dispatcher_user::api;

/// New sessions go to the backends by turns.
const TURNS: &str = "balance = \"weighted-round-robin\"";

fn stage(lines: &[&str]) -> Stage {
    let service = lines.iter().fold(web().with("miss = \"daemon\""), |service, line| service.with(line));
    Stage::new(Plan::default(), "native", &service, Manners::default())
}

fn shares(stage: &Stage) -> Vec<api::QosShare> {
    stage.daemon.ask(&["qos"]).expect("shares")
}

/// Hellos of so many connections at the same time; those connections, once each is answered.
fn rush(stage: &Stage, number: u8) -> Vec<TcpStream> {
    let connect = |i: u8| stage.connect(Family::BOTH[usize::from(i) % 2], i.into()).expect("a connection");
    let streams: Vec<_> = (0..number).map(connect).collect();
    std::thread::scope(|scope| {
        let one = |(i, mut stream): (usize, TcpStream)| {
            scope.spawn(move || {
                ask(&mut stream, &client_hello(&[i as u8; 32], 0)).expect("a server's flight");
                stream
            })
        };
        let all: Vec<_> = streams.into_iter().enumerate().map(one).collect();
        all.into_iter().map(|one| one.join().expect("a client")).collect()
    })
}

#[test]
fn connections_beyond_the_rate_wait_for_their_turn() {
    let stage = stage(&["limits.connections_per_second = 10", "limits.over = \"hold\"", TURNS]);
    let began = Instant::now();
    let streams = rush(&stage, 60);
    // 20 for each of three backends, of which at most the first few need not wait.
    assert!(began.elapsed() >= Duration::from_millis(1200), "{:?}", began.elapsed());
    let admitted: u64 = shares(&stage).iter().map(|one| one.admitted).sum();
    let waiting: u64 = shares(&stage).iter().map(|one| one.queued).sum();
    assert!(admitted >= 60 && waiting == 0, "{:?}", shares(&stage));
    let counter = |reason| stage.daemon.counter(reason).expect("a counter");
    assert_eq!((counter(Reason::BoundMiss), counter(Reason::BoundFresh)), (0, 0), "none by the table");
    assert_eq!(counter(Reason::Released), 60);
    drop(streams);
}

#[test]
fn no_more_connections_than_there_may_be() {
    let stage = stage(&["limits.max_connections = 2", TURNS]);
    let mut streams = rush(&stage, 6);
    // Until they were counted; who comes then waits, and not for ever.
    std::thread::sleep(Duration::from_millis(1500));
    std::thread::scope(|scope| {
        let mut late = stage.connect(Family::V4, 0).expect("a connection");
        let late = scope.spawn(move || ask(&mut late, &client_hello(&[99; 32], 0)).map(drop));
        until("it waits", || shares(&stage).iter().any(|one| one.queued > 0));
        let error = late.join().expect("a client").expect_err("nobody went");
        let kind = error.downcast_ref().map(std::io::Error::kind);
        assert_eq!(kind, Some(std::io::ErrorKind::ConnectionReset), "{error:#}");
    });
    assert_eq!(stage.daemon.counter(Reason::Released).expect("a counter"), 6);
    assert_eq!(stage.daemon.counter(Reason::ResetOverRate).expect("a counter"), 1);
    streams.clear();
    // With the same session, which is not known for having been refused.
    until("there is room again", || {
        let mut stream = stage.connect(Family::V6, 0).expect("a connection");
        ask(&mut stream, &client_hello(&[99; 32], 0)).is_ok()
    });
    assert_eq!(stage.daemon.counter(Reason::Released).expect("a counter"), 7);
    assert_eq!(stage.daemon.counter(Reason::BoundMiss).expect("a counter"), 0);
}

#[test]
fn known_sessions_that_wait_for_their_turn_stay_at_home() {
    let service = ["limits.connections_per_second = 4", "limits.over = \"hold\"", TURNS]
        .iter()
        .fold(web().with("miss = \"daemon\""), |service, line| service.with(line));
    let manners = Manners { tickets: true, ..Manners::default() };
    let stage = Stage::new(Plan::default(), "native", &service, manners);
    let routable = || {
        let found: Vec<api::Identity> = stage.daemon.ask(&["identities"]).expect("identities");
        found.iter().all(|one| one.state == "routable")
    };
    until("keys are known", routable);
    for version in [Version::Tls12, Version::Tls13] {
        let user = stage.user(version).with_tickets();
        let home = stage.visit(&user, Family::V4, 0).backend;
        let before = stage.daemon.counter(Reason::Released).expect("a counter");
        for turn in 0..12 {
            let visit = stage.visit(&user, Family::BOTH[turn % 2], turn);
            assert_eq!(
                (visit.backend.as_str(), visit.reused.as_str()),
                (home.as_str(), "r"),
                "{version:?} {turn}"
            );
        }
        let after = stage.daemon.counter(Reason::Released).expect("a counter");
        assert!(after > before + 5, "most had to wait: {before} and {after}");
    }
}
