//! Health checks and slow start: who is taken out, who comes back, and how fast.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use dispatcher_tests::{
    daemon::config,
    stage::{Stage, web},
    tls::{Manners, Server, Version},
    topology::{Family, Plan},
};
use dispatcher_user::api;

fn stage(lines: &str, manners: Manners) -> Stage {
    Stage::new(Plan::default(), "native", &web().with(lines), manners)
}

/// A backend as `dispatcherctl` shows it.
fn backend(stage: &Stage, name: &str) -> api::Backend {
    let backends = stage.daemon.backends().expect("backends");
    backends.into_iter().find(|backend| backend.name == name).expect("it is listed")
}

/// Waits for something that takes a few seconds.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(45);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until a backend is in a state and all its addresses agree; why it is.
fn becomes(stage: &Stage, name: &str, state: &str) -> String {
    let mut reason = String::new();
    until(&format!("{name} is not {state}"), || {
        let backend = backend(stage, name);
        reason = backend.reason.unwrap_or_default();
        backend.state == state && (state != "up" || reason.is_empty())
    });
    reason
}

/// Ends the server with this name, and returns its number.
fn stop(stage: &mut Stage, name: &str) -> usize {
    let number = stage.servers.iter().position(|server| server.name == name).expect("it runs");
    drop(stage.servers.remove(number));
    number
}

/// Starts it again.
fn start(stage: &mut Stage, name: &str, number: usize) {
    let netns = &stage.topology.backends[number].netns;
    let server =
        Server::start(netns, name, dispatcher_tests::stage::PORT, &stage.authority, Manners::default());
    stage.servers.insert(number, server.expect("starts again"));
}

/// Who answers so many requests in clear.
fn answering(stage: &Stage) -> BTreeSet<String> {
    (0..60).map(|turn| stage.visit_in_clear(Family::BOTH[turn % 2], turn).backend).collect()
}

#[test]
fn a_backend_that_stops_listening_is_left_until_it_is_back() {
    let mut stage = stage("health = { check = \"tcp\", interval = \"1s\" }", Manners::default());
    let user = stage.user(Version::Tls12);
    let home = stage.visit(&user, Family::V4, 0).backend;
    until("not every address is checked", || answering(&stage).len() == 3);
    let number = stop(&mut stage, &home);
    let reason = becomes(&stage, &home, "down");
    assert!(reason.contains("health: connecting: refused"), "{reason}");
    let before = backend(&stage, &home);
    assert_eq!(before.share, Some(0.0));
    for family in Family::BOTH {
        let identity = stage.visit(&user, family, 1);
        assert_ne!(identity.backend, home, "its sessions go elsewhere");
    }
    assert!(!answering(&stage).contains(&home));
    let after = backend(&stage, &home);
    assert_eq!((after.refused, after.connections), (before.refused, before.connections), "nobody tries it");
    start(&mut stage, &home, number);
    becomes(&stage, &home, "up");
    assert_eq!(answering(&stage).len(), 3);
}

#[test]
fn a_wrong_status_takes_a_backend_out() {
    for check in ["http", "https"] {
        let lines = format!(
            "health = {{ check = \"{check}\", path = \"/live\", expect = [\"200\", \"204\"], interval = \"1s\" }}"
        );
        let stage = stage(&lines, Manners::default());
        until("no check", || stage.servers.iter().all(|server| server.served() >= 2));
        assert_eq!(answering(&stage).len(), 3, "{check}");
        stage.servers[1].answer_with(503);
        let reason = becomes(&stage, "b2", "down");
        assert!(reason.contains("health: status 503 (3 of 3)"), "{check}: {reason}");
        assert_eq!(answering(&stage).len(), 2, "{check}");
        stage.servers[1].answer_with(204);
        becomes(&stage, "b2", "up");
    }
}

#[test]
fn checks_say_that_they_are_the_proxy_itself() {
    let lines =
        "proxy_protocol = \"v2\"\nhealth = { check = \"https\", server_name = \"b1\", interval = \"1s\" }";
    let stage = stage(lines, Manners { proxy: true, ..Manners::default() });
    until("no check succeeds", || stage.servers.iter().all(|server| server.served() >= 4));
    for backend in stage.daemon.backends().expect("backends") {
        assert_eq!((backend.state.as_str(), backend.reason), ("up", None));
    }
}

#[test]
fn refused_connections_hasten_the_next_check() {
    let lines = "health = { check = \"http\", interval = \"10m\", fall = 1 }";
    let mut stage = stage(lines, Manners::default());
    until("no check", || stage.servers.iter().all(|server| server.served() >= 2));
    stop(&mut stage, "b2");
    until("b2 is not checked", || {
        answering(&stage);
        backend(&stage, "b2").state == "down"
    });
    let reason = backend(&stage, "b2").reason.unwrap_or_default();
    assert!(reason.contains("health: connecting: refused (1 of 1)"), "{reason}");
}

#[test]
fn a_reload_brings_checks_changes_them_and_takes_them_away() {
    let mut stage = stage("", Manners::default());
    let number = stop(&mut stage, "b2");
    let reload = |stage: &Stage, lines: &str| {
        stage.daemon.rewrite(&config(&stage.topology, "native", &[web().with(lines)])).expect("written");
        stage.daemon.ask::<api::Reload>(&["reload"]).expect("reloaded").changes
    };
    assert_eq!(backend(&stage, "b2").state, "up", "nobody has looked");
    let changes = reload(&stage, "health = { check = \"tcp\", interval = \"10m\" }");
    assert_eq!(changes.len(), 1, "{changes:?}");
    becomes(&stage, "b2", "down");
    assert_eq!(answering(&stage).len(), 2);
    let healthy = |stage: &Stage, name: &str| -> Vec<String> {
        let text = stage.daemon.told(&["metrics"]).expect("metrics");
        let begin = format!("dispatcher_backend_healthy{{service=\"web\",backend=\"{name}\",address=");
        let lines = text.lines().filter(|line| line.starts_with(&begin));
        lines.map(|line| line.rsplit(' ').next().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!((healthy(&stage, "b1"), healthy(&stage, "b2")), (vec!["1".into(); 2], vec!["0".into(); 2]));
    start(&mut stage, "b2", number);
    // Of the old interval nothing is waited for; what was known is kept: one good check is not enough.
    reload(&stage, "health = { check = \"tcp\", interval = \"3s\", rise = 2 }");
    assert_eq!(backend(&stage, "b2").state, "down");
    becomes(&stage, "b2", "up");
    assert_eq!(answering(&stage).len(), 3);
    stop(&mut stage, "b2");
    becomes(&stage, "b2", "down");
    reload(&stage, "");
    becomes(&stage, "b2", "up");
    assert_eq!(healthy(&stage, "b1"), [""; 0], "not checked any more");
}

#[test]
fn a_backend_that_comes_back_gets_a_growing_share() {
    let lines = "slow_start = \"15s\"\nhealth = { check = \"tls\", interval = \"1s\" }";
    let mut stage = stage(lines, Manners::default());
    let share = |stage: &Stage| backend(stage, "b1").share.expect("a share");
    assert!((share(&stage) - 1.0 / 3.0).abs() < 0.02, "nobody is spared at the start");
    let number = stop(&mut stage, "b1");
    becomes(&stage, "b1", "down");
    start(&mut stage, "b1", number);
    let mut shares = Vec::new();
    until("its share does not grow to all of it", || {
        shares.push(share(&stage));
        shares.last().is_some_and(|share| *share > 0.32)
    });
    shares.dedup();
    assert!(shares.is_sorted(), "{shares:?}");
    // From nothing by a tenth of its weight to all of it.
    let small = shares.iter().filter(|share| (0.01..0.2).contains(*share)).count();
    assert!(small > 2 && shares.len() > 5, "{shares:?}");
}
