//! Sessions by cookie: kept, given, and moved when a server is lost.

use std::collections::BTreeSet;

use dispatcher_tests::{
    tls::{HOST, Identity},
    topology::Family,
    town::until,
};
use dispatcher_user::api;

use crate::scene::{COOKIE, PORT, Scene, Servers, say};

#[test]
fn claim_c1_c6_c8_c9_sessions_go_through_established_tunnels() {
    let scene = Scene::new(true, &[COOKIE]);
    let before = scene.handshakes();
    // C9: from where to where, and by what.
    for tunnel in scene.tunnels() {
        assert_eq!(tunnel.destination.port(), PORT, "{tunnel:?}");
        assert!(tunnel.cipher_suite.starts_with("TLS13_") && tunnel.version == "TLSv1_3", "{tunnel:?}");
        assert_eq!(tunnel.alpn.as_deref(), Some("h2"), "{tunnel:?}");
    }
    let mut homes = BTreeSet::new();
    for number in 0..12 {
        let jar = format!("jar{number}");
        let family = Family::BOTH[number % 2];
        let version = ["--http1.1", "--http2"][number / 2 % 2];
        let home = scene.visit(&jar, family, &[version], "/login").backend;
        for turn in 0..4 {
            assert_eq!(scene.visit(&jar, Family::BOTH[turn % 2], &[version], "/").backend, home);
        }
        homes.insert(home);
    }
    assert!(homes.len() > 1, "all went to {homes:?}");
    // C6: each session has its backend and its tunnel, which is of that backend.
    let (sessions, tunnels) = (scene.sessions(), scene.tunnels());
    assert_eq!(sessions.len(), 12, "{sessions:?}");
    for session in &sessions {
        let tunnel = tunnels.iter().find(|one| one.id == session.tunnel);
        assert!(tunnel.is_some_and(|one| one.backend == session.backend), "{session:?} {tunnels:?}");
        assert_eq!((session.state.as_str(), session.hits > 3), ("confirmed", true), "{session:?}");
    }
    assert_eq!(tunnels.iter().map(|one| one.sessions).sum::<u32>(), 12);
    // C8: nobody waited for a handshake.
    assert_eq!(scene.handshakes(), before);
}

#[test]
fn claim_c1_a_client_without_a_session_is_given_one() {
    let scene = Scene::new(true, &[]);
    let mut given = BTreeSet::new();
    for number in 0..6 {
        let jar = format!("jar{number}");
        let head = scene.curl(&jar, Family::V4, &["-o", "/dev/null", "-D", "-"], "/").expect("an answer");
        let lines: Vec<&str> =
            head.lines().filter(|line| line.to_lowercase().starts_with("set-cookie")).collect();
        let [line] = lines.as_slice() else { panic!("one cookie: {head}") };
        let value = line.split_once("DISPATCHER=").and_then(|(_, rest)| rest.split(';').next()).unwrap_or("");
        assert_eq!((value.len(), value.bytes().all(|byte| byte.is_ascii_hexdigit())), (32, true), "{line}");
        for part in ["; Path=/", "; Secure", "; HttpOnly", "; SameSite=Lax"] {
            assert!(line.contains(part), "{line}");
        }
        given.insert(value.to_owned());
        let home = scene.visit(&jar, Family::V6, &[], "/").backend;
        let head = scene.curl(&jar, Family::V4, &["-o", "/dev/null", "-D", "-"], "/").expect("an answer");
        assert!(!head.to_lowercase().contains("set-cookie"), "it has one: {head}");
        assert!((0..4).all(|_| scene.visit(&jar, Family::V4, &[], "/").backend == home));
        let found: Vec<api::Session> =
            scene.daemon.ask(&["sessions", "show", &format!("cookie:{value}")]).expect("a session");
        assert_eq!((found[0].backend.as_str(), found[0].state.as_str()), (home.as_str(), "confirmed"));
    }
    assert_eq!(given.len(), 6, "each has its own");
    // An unknown session is a miss, never an error.
    let cookie = ["-H", "Cookie: DISPATCHER=0123456789abcdef0123456789abcdef"];
    let home = scene.visit("other", Family::V4, &cookie, "/").backend;
    assert_eq!(scene.visit("other", Family::V4, &cookie, "/").backend, home);
}

#[test]
fn servers_are_lost_and_come_back() {
    let mut scene = Scene::new(false, &[COOKIE]);
    let text = |user: &str| format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid={user}\r\n\r\n");
    let ask = |scene: &Scene, user: &str| -> Identity {
        let (status, body) = say(&mut scene.connect(Family::V4, 0), &text(user)).expect("an answer");
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {status}: {body}"))
    };
    let home = ask(&scene, "one").backend;
    let Servers::Own(servers) = &mut scene.servers else { panic!("own servers") };
    let place = servers.iter().position(|server| server.name == home).expect("one of them");
    drop(servers.remove(place));
    // Its tunnels end with it, and its session goes elsewhere.
    until("the tunnels have ended", || scene.tunnels().iter().all(|one| one.backend != home));
    let other = ask(&scene, "one").backend;
    assert_ne!(other, home);
    assert_eq!(ask(&scene, "one").backend, other, "and stays there");
}

#[test]
fn a_connection_that_stays_counts_its_requests_and_hears_of_a_pin() {
    let scene = Scene::new(false, &[COOKIE]);
    let mut line = scene.connect(Family::V4, 0);
    let text = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid=stays\r\n\r\n");
    let mut ask = || {
        let (_, body) = say(&mut line, &text).expect("an answer");
        serde_json::from_str::<Identity>(&body).expect("an identity").backend
    };
    let home = ask();
    assert!((1..20).all(|_| ask() == home));
    let other = ["b1", "b2", "b3"].into_iter().find(|name| *name != home).expect("another");
    let pin = ["sessions", "pin", "cookie:stays", "--service", "shop", "--backend", other];
    scene.daemon.told(&pin).expect("pinned");
    until("it goes where it was pinned to", || ask() == other);
    drop(line);
    // Another one, that ends before the table was told.
    let mut line = scene.connect(Family::V4, 1);
    let text = text.replace("stays", "ends");
    for _ in 0..20 {
        say(&mut line, &text).expect("an answer");
    }
    drop(line);
    let hits = || {
        let found: Vec<api::Session> =
            scene.daemon.ask(&["sessions", "show", "cookie:ends"]).expect("a session");
        found.iter().map(|one| one.hits).sum::<u32>()
    };
    until("each request is counted", || hits() == 20);
}
