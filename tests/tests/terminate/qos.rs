//! Backends that take so many requests at a time: who is served first (rows C11 and C12), who waits, who is refused.

use std::{
    io::Write as _,
    thread::{Scope, ScopedJoinHandle},
};

use dispatcher_tests::{daemon::Folder, tls::HOST, topology::Family, town::until};
use dispatcher_user::api;

use crate::{
    access::lines,
    mirror::{Manner, Mirror},
    scene::{COOKIE, Connection, Scene, Servers, say},
};

const CLASSES: &str =
    "\n[[class]]\nname = \"gold\"\nweight = 3\n\n[[class]]\nname = \"bronze\"\nweight = 1\n";
/// One request at a time.
const ONE: &str = "limits.max_inflight = 1";
const PATIENT: &str = "limits.queue_timeout = \"60s\"";

/// Mirrors, and two sessions of `b1`, each in the class that is named like it.
fn scene(lines: &[&str]) -> Scene {
    let scene = Scene::mirrors(Manner::HTTP2, &[&[COOKIE], lines].concat());
    scene.daemon.rewrite(&format!("{}{CLASSES}", scene.text)).expect("a configuration");
    scene.daemon.told(&["reload"]).expect("reloaded");
    for name in ["gold", "bronze"] {
        let session = format!("cookie:{name}");
        scene
            .daemon
            .told(&["sessions", "pin", &session, "--service", "shop", "--backend", "b1"])
            .expect("pinned");
        scene.daemon.told(&["qos", "assign", &session, name, "--service", "shop"]).expect("assigned");
    }
    scene
}

fn mirror(scene: &Scene, number: usize) -> &Mirror {
    let Servers::Mirrors(mirrors) = &scene.servers else { panic!("mirrors") };
    &mirrors[number]
}

/// What is counted of a class at a backend; nothing where it did not use it.
fn shares(scene: &Scene, backend: &str, class: &str) -> api::QosShare {
    let shares: Vec<api::QosShare> = scene.daemon.ask(&["qos"]).expect("shares");
    let found = shares.into_iter().find(|one| one.backend == backend && one.class == class);
    found.unwrap_or_else(|| panic!("no {class} at {backend}"))
}

fn queued(scene: &Scene, backend: &str) -> u64 {
    let shares: Vec<api::QosShare> = scene.daemon.ask(&["qos"]).expect("shares");
    shares.iter().filter(|one| one.backend == backend).map(|one| one.queued).sum()
}

fn text(session: &str, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid={session}\r\n\r\n")
}

/// A request of a session that stays under way until it is ended.
struct Blocker(Connection);

impl Blocker {
    fn new(scene: &Scene, session: &str) -> Self {
        let mut line = scene.connect(Family::V4, 0);
        let head = format!(
            "POST /blocker HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid={session}\r\nContent-Length: 5\r\n\r\n"
        );
        line.write_all(head.as_bytes()).and_then(|()| line.flush()).expect("sent");
        Self(line)
    }

    fn end(mut self) {
        let (status, _) = say(&mut self.0, "12345").expect("an answer");
        assert!(status.contains("200"), "{status}");
    }
}

/// Asks on a connection of its own; the status and the body.
fn ask<'s>(
    scope: &'s Scope<'s, '_>,
    scene: &Scene,
    session: &'static str,
    path: &'static str,
) -> ScopedJoinHandle<'s, (String, String)> {
    let mut line = scene.connect(Family::V4, 1);
    scope.spawn(move || say(&mut line, &text(session, path)).expect("an answer"))
}

/// Lets both sessions ask 30 times while the server is busy; whose requests it got then, in order.
fn race(scene: &Scene, blocked: impl FnOnce()) -> Vec<String> {
    let before = mirror(scene, 0).seen().len();
    let blocker = Blocker::new(scene, "bronze");
    until("the server is busy", || mirror(scene, 0).begun() > before as u64);
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..60)
            .map(|turn| ask(scope, scene, ["gold", "bronze"][usize::from(turn < 30)], "/slow/5"))
            .collect();
        until("all wait", || queued(scene, "b1") == 60);
        blocked();
        blocker.end();
        for one in asked {
            let (status, _) = one.join().expect("a client");
            assert!(status.contains("200"), "{status}");
        }
    });
    let seen = mirror(scene, 0).seen();
    let whose = |one: &crate::mirror::Seen| one.header("cookie").unwrap_or_default().to_owned();
    seen.iter().skip(before).filter(|one| one.method == "GET").map(whose).collect()
}

fn assert_share(order: &[String], percent: usize) {
    let gold = order.iter().filter(|one| one.as_str() == "sid=gold").count() * 100 / order.len();
    assert!(gold.abs_diff(percent) <= 5, "{gold}% instead of {percent}% are gold: {order:?}");
}

#[test]
fn claim_c12_the_heavier_class_is_served_first() {
    let scene = scene(&[ONE, PATIENT]);
    // The lighter class asked first, and all its requests wait before the other's come.
    let order = race(&scene, || {});
    assert_eq!(order.len(), 60);
    assert_share(&order[..40], 75);
    assert!(order[40..].iter().filter(|one| one.as_str() == "sid=gold").count() <= 2, "{order:?}");
    // A weight that is changed while they wait counts at once.
    let order = race(&scene, || {
        scene.daemon.told(&["qos", "weight", "gold", "1"]).expect("weighed");
    });
    assert_share(&order[..40], 50);
    let (gold, bronze) = (shares(&scene, "b1", "gold"), shares(&scene, "b1", "bronze"));
    assert_eq!((gold.admitted, bronze.admitted), (60, 62), "{gold:?} {bronze:?}");
    assert_eq!((gold.shed + gold.late + gold.cancelled, gold.queued, gold.in_flight), (0, 0, 0));
}

#[test]
fn claim_c11_a_second_identifier_goes_to_the_server_of_the_first() {
    // It waits for that server although others are idle.
    let scene = scene(&[ONE, PATIENT]);
    let mut line = scene.connect(Family::V4, 2);
    let (_, body) = say(&mut line, &text("first", "/named")).expect("an answer");
    let home = serde_json::from_str::<crate::mirror::Seen>(&body).expect("what was seen").backend;
    let blocker = Blocker::new(&scene, "first");
    let number = home.trim_start_matches('b').parse::<usize>().expect("a number") - 1;
    until("the first session is in use", || mirror(&scene, number).begun() == 2);
    std::thread::scope(|scope| {
        let second = ask(scope, &scene, "from-the-backend", "/");
        until("the second one waits for its server", || queued(&scene, &home) == 1);
        blocker.end();
        let (status, body) = second.join().expect("a client");
        assert!(status.contains("200"), "{status}");
        assert_eq!(serde_json::from_str::<crate::mirror::Seen>(&body).expect("what was seen").backend, home);
    });
    let sessions = scene.sessions();
    assert_eq!(sessions.iter().filter(|one| one.backend == home && one.state != "pinned").count(), 2);
}

#[test]
fn a_full_queue_refuses_who_has_most_for_its_weight() {
    let scene = scene(&[ONE, PATIENT, "limits.queue = 4"]);
    let blocker = Blocker::new(&scene, "bronze");
    until("the server is busy", || mirror(&scene, 0).begun() == 1);
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..4).map(|_| ask(scope, &scene, "bronze", "/")).collect();
        until("the queue is full", || queued(&scene, "b1") == 4);
        // From the address of the others: another client's would make room for itself.
        let from = scene.topology.client(Family::V4, 1).to_string();
        let arguments = ["-i", "--interface", &from, "-H", "Cookie: sid=bronze"];
        let refused = scene.curl("jar", Family::V4, &arguments, "/").expect("an answer");
        let head = refused.to_lowercase();
        assert!(head.contains(" 503") && head.contains("\nretry-after: 1\r\n"), "{refused}");
        assert!(head.contains("x-request-id: ") && head.contains("too many requests wait"), "{refused}");
        let gold = ask(scope, &scene, "gold", "/");
        until("one of the others made room", || shares(&scene, "b1", "bronze").shed == 2);
        assert_eq!((shares(&scene, "b1", "gold").queued, queued(&scene, "b1")), (1, 4));
        blocker.end();
        assert!(gold.join().expect("a client").0.contains("200"));
        let refused = waiting.into_iter().map(|one| one.join().expect("a client").0);
        assert_eq!(refused.filter(|status| status.contains("503")).count(), 1);
    });
}

#[test]
fn nobody_waits_longer_than_the_deadline() {
    let folder = Folder::new().expect("a folder");
    let path = folder.path().join("access.jsonl");
    let log = format!("terminate.access_log = \"{}\"", path.display());
    let scene = scene(&[ONE, "limits.queue_timeout = \"1s\"", &log]);
    let blocker = Blocker::new(&scene, "gold");
    until("the server is busy", || mirror(&scene, 0).begun() == 1);
    let late = scene.curl("jar", Family::V6, &["-i", "-H", "Cookie: sid=gold"], "/").expect("an answer");
    assert!(late.contains(" 503") && late.contains("took no more requests in time"), "{late}");
    assert_eq!((shares(&scene, "b1", "gold").late, queued(&scene, "b1")), (1, 0));
    blocker.end();
    let answer = scene.curl("jar", Family::V6, &["-i", "-H", "Cookie: sid=gold"], "/").expect("an answer");
    assert!(answer.contains(" 200"), "{answer}");
    until("three lines", || lines(&path).len() >= 3);
    let all = lines(&path);
    // In the order in which they ended.
    let late = "the backend took no more requests in time";
    for (line, path, status, error) in
        [(&all[0], "/", 503, Some(late)), (&all[1], "/blocker", 200, None), (&all[2], "/", 200, None)]
    {
        let found = (line["path"].as_str(), line["status"].as_u64(), line["error"].as_str());
        assert_eq!(found, (Some(path), Some(status), error), "{line:#}");
        assert_eq!(line["class"], "gold", "{line:#}");
        let waited = line["queued_ms"].as_f64().expect("it had to ask for its turn");
        assert_eq!(waited >= 900.0, error.is_some(), "{line:#}");
    }
}

#[test]
fn a_session_can_be_put_into_the_default_class_against_a_rule() {
    let scene = scene(&[ONE, PATIENT]);
    let rule = "\n[[service.classify]]\nclass = \"bronze\"\npath = \"/\"\n";
    let ruled = scene.text.replacen("\n[[service.backend]]", &format!("{rule}\n[[service.backend]]"), 1);
    assert_ne!(ruled, scene.text, "the rule stands before the backends");
    scene.daemon.rewrite(&format!("{ruled}{CLASSES}")).expect("a configuration");
    scene.daemon.told(&["reload"]).expect("reloaded");
    let admitted = |class| {
        let shares: Vec<api::QosShare> = scene.daemon.ask(&["qos"]).expect("shares");
        let found = shares.into_iter().find(|one| one.backend == "b1" && one.class == class);
        found.map_or(0, |one| one.admitted)
    };
    for (choice, class, shown) in [
        ("default", "default", Some("default")),
        ("gold", "gold", Some("gold")),
        ("--by-rules", "bronze", None),
    ] {
        scene.daemon.told(&["qos", "assign", "cookie:gold", choice, "--service", "shop"]).expect("assigned");
        let before = admitted(class);
        let (status, _) = say(&mut scene.connect(Family::V4, 1), &text("gold", "/")).expect("an answer");
        assert!(status.contains("200"), "{status}");
        assert_eq!(admitted(class), before + 1, "{choice}");
        let key = dispatcher_common::http::cookie_id(b"gold");
        let id: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let sessions = scene.sessions();
        let session = sessions.iter().find(|one| one.id == id).expect("the session");
        assert_eq!(session.class.as_deref(), shown, "{choice}");
    }
}

#[test]
fn a_client_that_goes_leaves_the_queue() {
    let scene = scene(&[ONE, PATIENT]);
    let blocker = Blocker::new(&scene, "gold");
    until("the server is busy", || mirror(&scene, 0).begun() == 1);
    let mut line = scene.connect(Family::V4, 1);
    line.write_all(text("gold", "/").as_bytes()).and_then(|()| line.flush()).expect("sent");
    until("it waits", || queued(&scene, "b1") == 1);
    drop(line);
    until("its place is free", || queued(&scene, "b1") == 0);
    let given_up = ["--http2", "--max-time", "1", "-H", "Cookie: sid=gold"];
    scene.curl("jar", Family::V4, &given_up, "/").expect_err("the time is over");
    until("both were counted", || shares(&scene, "b1", "gold").cancelled == 2);
    blocker.end();
    assert_eq!(mirror(&scene, 0).seen().len(), 1, "nothing was sent for them");
    assert_eq!(shares(&scene, "b1", "gold").admitted, 1);
}

#[test]
fn a_backend_without_a_limit_is_not_held_up() {
    let scene = scene(&[]);
    let limited = scene.text.replace("name = \"b1\"\n", "name = \"b1\"\nlimits = { max_inflight = 1 }\n");
    scene.daemon.rewrite(&format!("{limited}{CLASSES}")).expect("a configuration");
    scene.daemon.told(&["reload"]).expect("reloaded");
    for backend in ["b1", "b2"] {
        let pin =
            ["sessions", "pin", &format!("cookie:of-{backend}"), "--service", "shop", "--backend", backend];
        scene.daemon.told(&pin).expect("pinned");
    }
    let held: Vec<_> = (0..3).map(|_| Blocker::new(&scene, "of-b1")).collect();
    let free: Vec<_> = (0..10).map(|_| Blocker::new(&scene, "of-b2")).collect();
    until("all are under way at the other", || mirror(&scene, 1).begun() == 10);
    until("two wait", || queued(&scene, "b1") == 2);
    assert_eq!(mirror(&scene, 0).begun(), 1);
    // Without the limit they need not wait any more.
    scene.daemon.rewrite(&format!("{}{CLASSES}", scene.text)).expect("a configuration");
    scene.daemon.told(&["reload"]).expect("reloaded");
    until("all are under way", || mirror(&scene, 0).begun() == 3);
    held.into_iter().chain(free).for_each(Blocker::end);
}

#[test]
fn who_waits_for_a_backend_that_goes_is_served_by_another() {
    for how in ["disable", "offline", "remove", "replace"] {
        let scene = scene(&[ONE, PATIENT]);
        let blocker = Blocker::new(&scene, "gold");
        until("the server is busy", || mirror(&scene, 0).begun() == 1);
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..6).map(|_| ask(scope, &scene, "bronze", "/")).collect();
            until("all wait", || queued(&scene, "b1") == 6);
            if how == "replace" {
                // None of those that were there stays.
                let others = scene.text.replace("name = \"b", "name = \"c");
                scene.daemon.rewrite(&format!("{others}{CLASSES}")).expect("a configuration");
                scene.daemon.told(&["reload"]).expect("reloaded");
            } else {
                scene.daemon.told(&["backend", "shop/b1", how]).expect("done");
            }
            match how {
                // What is under way goes on, and they wait for it.
                "disable" => {
                    until("it is left", || scene.tunnel_backends().iter().all(|one| one.backend != "b1"));
                    blocker.end();
                }
                _ => drop(blocker),
            }
            for one in asked {
                let (status, body) = one.join().expect("a client");
                assert!(status.contains("200"), "{how}: {status}: {body}");
            }
        });
        if how == "disable" {
            assert!(mirror(&scene, 0).seen().iter().all(|one| one.method != "GET"), "nothing more for it");
        }
    }
}

#[test]
fn what_a_class_that_goes_has_is_the_default_ones() {
    let scene = scene(&[ONE, PATIENT]);
    let blocker = Blocker::new(&scene, "gold");
    until("the server is busy", || mirror(&scene, 0).begun() == 1);
    let with = format!("{}{CLASSES}", scene.text);
    let reload = |text: &str| {
        scene.daemon.rewrite(text).expect("a configuration");
        scene.daemon.told(&["reload"]).expect("reloaded");
    };
    let used = |class: &str| {
        let shares: Vec<api::QosShare> = scene.daemon.ask(&["qos"]).expect("shares");
        shares.into_iter().any(|one| one.backend == "b1" && one.class == class)
    };
    std::thread::scope(|scope| {
        let mut asked: Vec<_> =
            (0..8).map(|turn| ask(scope, &scene, ["gold", "bronze"][turn % 2], "/")).collect();
        until("all wait", || queued(&scene, "b1") == 8);
        assert_eq!((shares(&scene, "b1", "gold").queued, shares(&scene, "b1", "gold").in_flight), (4, 1));
        reload(&with.replace("\n[[class]]\nname = \"gold\"\nweight = 3\n", ""));
        assert!(!used("gold"));
        assert_eq!((shares(&scene, "b1", "default").queued, shares(&scene, "b1", "bronze").queued), (4, 4));
        // One of its session that comes now.
        asked.push(ask(scope, &scene, "gold", "/"));
        until("it waits", || shares(&scene, "b1", "default").queued == 5);
        blocker.end();
        for one in asked {
            let (status, _) = one.join().expect("a client");
            assert!(status.contains("200"), "{status}");
        }
    });
    let default = shares(&scene, "b1", "default");
    assert_eq!((default.admitted, default.in_flight, default.queued), (5, 0, 0), "{default:?}");
    assert_eq!(default.shed + default.late + default.cancelled, 0, "{default:?}");
    assert_eq!(shares(&scene, "b1", "bronze").admitted, 4);
    // The session is still assigned to it.
    reload(&with);
    let before = if used("gold") { shares(&scene, "b1", "gold").admitted } else { 0 };
    std::thread::scope(|scope| {
        let (status, _) = ask(scope, &scene, "gold", "/").join().expect("a client");
        assert!(status.contains("200"), "{status}");
    });
    let gold = shares(&scene, "b1", "gold");
    assert_eq!((gold.admitted, gold.in_flight), (before + 1, 0), "{gold:?}");
    assert_eq!(shares(&scene, "b1", "default").admitted, 5);
    let sessions = scene.sessions();
    let session = sessions.iter().find(|one| one.class.as_deref() == Some("gold"));
    assert!(session.is_some(), "{sessions:?}");
}
