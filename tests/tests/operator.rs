//! What the operator does with backends while clients come and stay.

use std::{
    collections::BTreeSet,
    io::ErrorKind,
    net::TcpStream,
    time::{Duration, Instant},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::config,
    http,
    stage::{PORT, Stage, web},
    tls::{Identity, Line, User, Version},
    topology::Family,
};
use dispatcher_user::api;

fn backend(stage: &Stage, arguments: &[&str]) -> api::Backend {
    let answer: Vec<api::Backend> =
        stage.daemon.ask(&[&["backend"], arguments].concat()).unwrap_or_else(|error| panic!("{error:#}"));
    let [one] = answer.try_into().expect("one backend");
    one
}

fn refused(stage: &Stage, arguments: &[&str]) -> String {
    let answer = stage.daemon.ask::<Vec<api::Backend>>(&[&["backend"], arguments].concat());
    format!("{:#}", answer.expect_err("it was to be refused"))
}

/// Users and where their sessions are, each server with some of them.
fn users(stage: &Stage) -> Vec<(User, String)> {
    let known = |turn: usize| {
        let user = stage.user(Version::Tls12);
        let home = stage.visit(&user, Family::BOTH[turn % 2], turn).backend;
        (user, home)
    };
    let users: Vec<_> = (0..24).map(known).collect();
    let homes: BTreeSet<&String> = users.iter().map(|(_, home)| home).collect();
    assert_eq!(homes.len(), 3, "each server has some");
    users
}

/// Where somebody without a session goes, many times.
fn newcomers(stage: &Stage) -> BTreeSet<String> {
    (0..30).map(|turn| stage.visit_in_clear(Family::BOTH[turn % 2], turn).backend).collect()
}

/// Asks who answers.
fn asked(line: &mut Line<TcpStream>) -> anyhow::Result<Identity> {
    Ok(serde_json::from_str(&http::get(line, "/")?)?)
}

/// A connection in clear that stays open at a backend.
fn stay(stage: &Stage, at: &str) -> Line<TcpStream> {
    for turn in 0..60 {
        let mut line = Line::new(stage.connect(Family::BOTH[turn % 2], turn).expect("connects"));
        if asked(&mut line).expect("an answer").backend == at {
            return line;
        }
    }
    panic!("nobody was sent to {at}");
}

/// Fails unless a connection was reset.
fn is_over(line: &mut Line<TcpStream>) {
    let error = asked(line).expect_err("it goes on");
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    assert!(matches!(kind, Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)), "{error:#}");
}

fn until(what: &str, mut good: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !good() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_drain_keeps_sessions_until_its_deadline() {
    let stage = Stage::usual();
    let users = users(&stage);
    let mut open = stay(&stage, "b1");
    let told = backend(&stage, &["web/b1", "drain", "--deadline", "1h"]);
    assert_eq!((told.state.as_str(), told.share), ("drain", Some(0.0)));
    assert!(told.deadline_seconds.is_some_and(|left| (3500..=3600).contains(&left)), "{told:?}");
    assert!(told.open.is_some_and(|open| open >= 1), "{told:?}");
    for (turn, (user, home)) in users.iter().enumerate() {
        let identity = stage.visit(user, Family::BOTH[turn % 2], turn + 7);
        assert_eq!((&identity.backend, identity.reused.as_str()), (home, "r"), "known sessions stay");
    }
    assert_eq!(newcomers(&stage), BTreeSet::from(["b2", "b3"].map(str::to_owned)));
    assert!(asked(&mut open).is_ok(), "open connections stay");
    let table = stage.daemon.told(&["backends"]).expect("a table");
    assert!(table.contains("s left"), "{table}");

    let told = backend(&stage, &["web/b1", "drain", "--deadline", "1s"]);
    assert!(told.deadline_seconds.is_some_and(|left| left <= 1), "{told:?}");
    until("the deadline does nothing", || backend(&stage, &["web/b1"]).state == "offline");
    is_over(&mut open);
    for (turn, (user, _)) in users.iter().enumerate() {
        assert_ne!(stage.visit(user, Family::BOTH[turn % 2], turn + 7).backend, "b1");
    }
    assert_eq!(backend(&stage, &["web/b1"]).open, Some(0));
    assert_eq!(backend(&stage, &["web/b1", "enable"]).state, "up");
    assert_eq!(newcomers(&stage).len(), 3);
}

#[test]
fn a_drain_is_waited_for() {
    let stage = Stage::usual();
    let open = stay(&stage, "b2");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| stage.daemon.told(&["backend", "web/b2", "drain", "--wait"]));
        std::thread::sleep(Duration::from_millis(2500));
        assert!(!waits.is_finished(), "a connection is open");
        drop(open);
        let table = waits.join().expect("ends").expect("drained");
        assert!(table.contains("drain"), "{table}");
    });
    let told = backend(&stage, &["web/b2"]);
    assert_eq!((told.state.as_str(), told.open), ("drain", Some(0)));
}

#[test]
fn a_drain_that_is_waited_for_tells_what_its_deadline_cut() {
    let stage = Stage::usual();
    let mut open = stay(&stage, "b2");
    let cut = stage.daemon.told(&["backend", "web/b2", "drain", "--wait", "--deadline", "2s"]);
    let said = format!("{:#}", cut.expect_err("one was open"));
    assert!(
        said.contains("exit status: 4") && said.contains("web/b2 went offline, which ended 1 connection"),
        "{said}"
    );
    is_over(&mut open);
    // Nobody is there: that is good at once.
    let told =
        stage.daemon.told(&["backend", "web/b3", "drain", "--wait", "--deadline", "1h"]).expect("drained");
    assert!(told.contains("drain"), "{told}");
}

#[test]
fn that_nobody_takes_new_sessions_is_told() {
    let mut stage = Stage::usual();
    let told = |stage: &mut Stage, times| {
        let line = "no backend of service web takes new sessions: clients without one get a RST";
        let found = |stage: &mut Stage| stage.daemon.process().log().matches(line).count();
        until("it is not told", || found(stage) >= times);
        assert_eq!(found(stage), times);
    };
    let _ = backend(&stage, &["web/b1", "drain"]);
    let _ = backend(&stage, &["web/b2", "offline"]);
    assert_eq!(newcomers(&stage), BTreeSet::from(["b3".to_owned()]));
    told(&mut stage, 0);
    let _ = backend(&stage, &["web/b3", "weight", "0"]);
    told(&mut stage, 1);
    is_over(&mut Line::new(stage.connect(Family::V4, 0).expect("connects")));
    assert!(stage.daemon.counter(Reason::ResetNoBackend).expect("a counter") > 0);
    let _ = backend(&stage, &["web/b1", "enable"]);
    assert_eq!(newcomers(&stage), BTreeSet::from(["b1".to_owned()]));
    told(&mut stage, 1);
    // The same by the file.
    let all = web().each("state = \"drain\"");
    stage.daemon.rewrite(&config(&stage.topology, "native", &[all])).expect("written");
    let _: api::Reload = stage.daemon.ask(&["reload"]).expect("reloaded");
    told(&mut stage, 2);
}

#[test]
fn disabled_keeps_connections_and_offline_ends_them() {
    let stage = Stage::usual();
    let mut open = stay(&stage, "b3");
    assert_eq!(backend(&stage, &["web/b3", "disable"]).state, "disabled");
    assert!(asked(&mut open).is_ok(), "it goes on");
    assert_eq!(backend(&stage, &["web/b3", "offline"]).state, "offline");
    is_over(&mut open);
    assert_eq!(newcomers(&stage), BTreeSet::from(["b1", "b2"].map(str::to_owned)));
}

#[test]
fn weights_follow_at_once() {
    let stage = Stage::usual();
    for (weight, share) in [("2", 0.5), ("0", 0.0), ("1", 1.0 / 3.0)] {
        let told = backend(&stage, &["web/b1", "weight", weight]);
        assert!((told.share.expect("a share") - share).abs() < 0.03, "weight {weight}: {told:?}");
        assert_eq!(told.weight.to_string(), weight);
    }
}

#[test]
fn claim_c3_backends_come_and_go_by_the_operators_word() {
    let stage = Stage::usual();
    let users = users(&stage);
    let (mut gone, mut stays) = (stay(&stage, "b3"), stay(&stage, "b1"));
    let removed = backend(&stage, &["web/b3", "remove"]);
    assert_eq!(removed.name, "b3");
    is_over(&mut gone);
    assert!(asked(&mut stays).is_ok(), "others do not notice");
    assert_eq!(newcomers(&stage), BTreeSet::from(["b1", "b2"].map(str::to_owned)));
    for (turn, (user, home)) in users.iter().enumerate().filter(|(_, (_, home))| home != "b3") {
        let identity = stage.visit(user, Family::BOTH[turn % 2], turn + 7);
        assert_eq!((&identity.backend, identity.reused.as_str()), (home, "r"));
    }
    assert!(refused(&stage, &["web/b3", "drain"]).contains("no backend b3"));

    let place = &stage.topology.backends[2];
    let [v4, v6] =
        Family::BOTH.map(|family| std::net::SocketAddr::new(place.address(family), PORT).to_string());
    let added = backend(&stage, &["web/b3", "add", &v4, &v6, "--weight", "3"]);
    assert_eq!((added.state.as_str(), added.weight, added.addresses.len()), ("up", 3, 2));
    assert_eq!(newcomers(&stage).len(), 3);
    let shown = stage.daemon.told(&["config", "show"]).expect("the configuration");
    assert!(shown.contains(&v4), "{shown}");

    for (arguments, expected) in [
        (&["web/b3", "add", "10.0.0.9:443"][..], "has a backend b3 already"),
        (&["web/b4", "add", &v4], "is backend b3 already"),
        (&["web/b4", "add", &stage.at(Family::V4).to_string()], "is a VIP too"),
        (&["web/b4", "add", "10.0.0.9"], "has no port"),
        (&["shop/b4", "add", "10.0.0.9:443"], "no service shop"),
        (&["web/b9", "weight", "3"], "no backend b9"),
    ] {
        let said = refused(&stage, arguments);
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
    for name in ["web/b1", "web/b2"] {
        let _ = backend(&stage, &[name, "remove"]);
    }
    let said = refused(&stage, &["web/b3", "remove"]);
    assert!(said.contains("service.backend"), "a service needs one: {said}");

    let undone: api::Reload = stage.daemon.ask(&["reload"]).expect("reloads");
    assert!(undone.changes.contains(&"+ backend web/b1".to_owned()), "{undone:?}");
    assert!(undone.changes.contains(&"~ backend web/b3: weight: 3 -> 1".to_owned()), "{undone:?}");
    assert_eq!(newcomers(&stage).len(), 3);
}
