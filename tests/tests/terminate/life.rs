//! What happens to requests when certificates, servers or the daemon go; which certificate and which server a
//! client gets.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dispatcher_tests::{
    http::{self, Noise},
    sockets,
    tls::HOST,
    topology::Family,
    town::until,
};
use dispatcher_user::api;

use crate::{
    frames::{Frames, PREFACE, SETTINGS, frame},
    mirror::{Manner, Mirror, Seen},
    scene::{COOKIE, ESTABLISHED, PORT, Scene, Servers, say},
};

#[test]
fn each_name_gets_its_certificate() {
    let mut scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    let pair = |server: &str, name: &str| {
        let own = scene.authority.issue_for(server, name, false).expect("a certificate");
        let both = format!("{}{}", own.certificate_pem, own.key_pem);
        let file = scene.folder.write(&format!("{server}.pem"), &both).expect("written");
        format!("{{ certificate = \"{}\" }}", file.display())
    };
    let pairs = [
        pair("first", HOST),
        pair("exact", "a.wild.test"),
        pair("wild", "*.wild.test"),
        pair("last", "other.test"),
    ];
    let start = scene.text.find("terminate.certificates").expect("a line");
    let end = start + scene.text[start..].find('\n').expect("its end");
    let line = format!("terminate.certificates = [{}]", pairs.join(", "));
    let text = [&scene.text[..start], &line, &scene.text[end..]].concat();
    scene.daemon.rewrite(&text).expect("written");
    let _: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    let to = format!("{}:{PORT}", Family::V4.vip());
    for (name, subject) in [
        (Some(HOST), "first"),
        (Some("a.wild.test"), "exact"),
        (Some("A.Wild.Test"), "exact"),
        (Some("b.wild.test"), "wild"),
        // A star is for one label.
        (Some("c.b.wild.test"), "first"),
        (Some("wild.test"), "first"),
        (Some("other.test"), "last"),
        (Some("unknown.test"), "first"),
        // No name, but some clients send it.
        (Some("192.0.2.7"), "first"),
        (None, "first"),
    ] {
        let mut arguments = vec!["10", "openssl", "s_client", "-connect", &to];
        match name {
            Some(name) => arguments.extend(["-servername", name]),
            None => arguments.push("-noservername"),
        }
        let said = scene.topology.clients.execute("timeout", &arguments).expect("openssl");
        let line = said.lines().find(|line| line.starts_with("subject")).unwrap_or_default();
        assert!(line.ends_with(&format!("CN = {subject}")), "{name:?}: {line}");
    }
    let log = scene.daemon.process().log();
    assert!(!log.contains("rustls"), "what clients send is no news: {log}");
}

#[test]
fn a_certificate_that_has_expired_is_warned_of() {
    let mut scene = Scene::mirrors(Manner::HTTP1, &[COOKIE]);
    let file = scene.folder.path().join("web.pem");
    let metric = |scene: &Scene, end: &str| {
        let metrics = scene.daemon.told(&["metrics"]).expect("metrics");
        let labels = format!("{{service=\"shop\",file=\"{}\"}}", file.display());
        let line = format!("dispatcher_certificate_not_after_timestamp_seconds{labels} {end}");
        assert!(metrics.lines().any(|one| one == line), "{line}: {metrics}");
    };
    // Until the year 4096, rcgen's default.
    metric(&scene, "67090118400.0");
    assert!(!scene.daemon.process().log().contains("web.pem"), "{}", scene.daemon.process().log());
    let expired = scene.authority.issue_for("expired", HOST, true).expect("a certificate");
    scene.folder.write("web.pem", &expired.certificate_pem).expect("written");
    scene.folder.write("web.key", &expired.key_pem).expect("written");
    let _: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    metric(&scene, "1580515200.0");
    let warning = format!("service shop: {}: it has expired (2020-02-01T00:00:00Z)", file.display());
    until("it is warned of", || scene.daemon.process().log().contains(&warning));
}

#[test]
fn a_reload_of_certificates_leaves_a_download_alone() {
    const LENGTH: u64 = 20_000_000;
    let scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    let mut line = scene.connect(Family::V4, 0);
    // HTTP/1.0: the body ends with the connection.
    write!(line, "GET /bytes/{LENGTH} HTTP/1.0\r\nHost: {HOST}\r\n\r\n").expect("sent");
    line.flush().expect("sent");
    let head = http::read_head(&mut line).expect("an answer").expect("an answer");
    assert!(head.line.contains("200"), "{head:?}");
    let mut half = vec![0; LENGTH as usize / 2];
    line.read_exact(&mut half).expect("half of it");
    let new = scene.authority.issue("renewed").expect("a certificate");
    scene.folder.write("web.pem", &new.certificate_pem).expect("written");
    scene.folder.write("web.key", &new.key_pem).expect("written");
    let _: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    let mut other = scene.connect(Family::V6, 0);
    assert_eq!(other.stream().conn.peer_certificates().expect("one")[0].as_ref(), new.der());
    let mut whole = std::io::Cursor::new(half).chain(line.take(LENGTH / 2));
    let sum = http::hash(&mut whole, LENGTH).expect("the rest");
    assert_eq!(sum, http::hash(&mut Noise::default(), LENGTH).expect("endless"));
}

/// Visits with a value of the cookie; which backend it was and what was set.
fn visit(scene: &Scene, cookie: Option<&str>, path: &str) -> (String, Vec<String>) {
    let cookie = cookie.map(|value| format!("Cookie: sid={value}"));
    let mut arguments = vec!["-D", "-"];
    if let Some(cookie) = &cookie {
        arguments.extend(["-H", cookie]);
    }
    let answer = scene.curl("none", Family::V4, &arguments, path).unwrap_or_else(|error| panic!("{error:#}"));
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let seen: Seen = serde_json::from_str(body).expect("what it saw");
    let set = head.lines().filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("set-cookie").then(|| value.to_owned())
    });
    (seen.backend, set.collect())
}

#[test]
fn a_named_cookie_is_given_where_the_backend_sets_none() {
    let scene = Scene::mirrors(Manner::HTTP1, &[COOKIE, "terminate.assign_cookie = true"]);
    let (home, set) = visit(&scene, None, "/");
    let [line] = set.as_slice() else { panic!("one cookie: {set:?}") };
    let value = line.strip_prefix("sid=").and_then(|rest| rest.split(';').next()).expect("its name");
    assert_eq!(value.len(), 32, "{line}");
    for _ in 0..4 {
        assert_eq!(visit(&scene, Some(value), "/"), (home.clone(), Vec::new()));
    }
    let (home, set) = visit(&scene, None, "/named");
    assert_eq!(set, ["sid=from-the-backend; Path=/"], "only the backend's");
    for _ in 0..4 {
        assert_eq!(visit(&scene, Some("from-the-backend"), "/").0, home);
    }
}

#[test]
fn a_pinned_session_goes_where_it_was_pinned() {
    let scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    for (value, home) in [("one", "b1"), ("two", "b2"), ("three", "b3"), ("one", "b3")] {
        let id = format!("cookie:{value}");
        scene
            .daemon
            .told(&["sessions", "pin", &id, "--service", "shop", "--backend", home])
            .unwrap_or_else(|error| panic!("{error:#}"));
        for _ in 0..4 {
            assert_eq!(visit(&scene, Some(value), "/").0, home);
        }
    }
}

#[test]
fn a_vip_that_is_not_here_is_said_with_the_remedy() {
    let scene = Scene::mirrors(Manner::HTTP1, &[COOKIE]);
    let [v4, v6] = Family::BOTH.map(Family::vip);
    let (old, new) = (format!("vip = [\"{v4}:{PORT}\", \"[{v6}]:{PORT}\"]"), "vip = [\"203.0.113.9:8443\"]");
    let text = scene.text.replace(&old, new);
    assert_ne!(text, scene.text);
    scene.daemon.rewrite(&text).expect("written");
    let said = scene.daemon.ask::<api::Reload>(&["reload"]).expect_err("refused").to_string();
    for part in ["203.0.113.9:8443", "ip address add 203.0.113.9/32 dev lo", "nothing was changed"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(visit(&scene, None, "/").1, [""; 0], "the old service goes on");
}

#[test]
fn servers_that_are_killed_lose_no_request_that_can_be_repeated() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let mut scene = Scene::mirrors(manner, &[COOKIE]);
        let Servers::Mirrors(mirrors) = std::mem::replace(&mut scene.servers, Servers::Others(Vec::new()))
        else {
            panic!("mirrors")
        };
        let mut mirrors: BTreeMap<String, Mirror> =
            mirrors.into_iter().map(|one| (one.name.clone(), one)).collect();
        let (stop, done, problems) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let (scene, stop, done, problems) = (&scene, &stop, &done, &problems);
            for client in 0..6 {
                scope.spawn(move || {
                    let mut line = scene.connect(Family::BOTH[client % 2], client % 4);
                    // Some are under way when their server goes; some have no session.
                    let path = ["/", "/slow/40"][client / 2 % 2];
                    let cookie =
                        if client < 4 { format!("Cookie: sid=user{client}\r\n") } else { String::new() };
                    let text = format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\n{cookie}\r\n");
                    while !stop.load(Ordering::Relaxed) {
                        let answer = say(&mut line, &text).and_then(|(status, body)| {
                            ensure!(status.contains("200"), "{status}: {body}");
                            Ok(())
                        });
                        if let Err(error) = answer {
                            problems.lock().expect("whole").push(format!("client {client}: {error:#}"));
                            return;
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let more = |count| {
                let before = done.load(Ordering::Relaxed);
                until("requests go on", || {
                    done.load(Ordering::Relaxed) >= before + count
                        || !problems.lock().expect("whole").is_empty()
                });
            };
            more(100);
            for name in ["b1", "b2", "b3", "b1"] {
                drop(mirrors.remove(name));
                more(200);
                until("its tunnels have ended", || scene.tunnels().iter().all(|one| one.backend != name));
                let place = &scene.topology.backends[usize::from(name.as_bytes()[1] - b'1')];
                let again =
                    Mirror::start(&place.netns, name, PORT, &scene.authority, manner).expect("it starts");
                mirrors.insert(name.to_owned(), again);
                until("it has tunnels again", || {
                    scene.tunnels().iter().filter(|one| one.backend == name).count() >= ESTABLISHED
                });
                more(50);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(*problems.lock().expect("whole"), [""; 0], "{:?}", manner.alpn);
    }
}

/// However long all were away: attempts to reach them are not left for later while somebody asks.
#[test]
fn who_asks_when_a_backend_is_back_is_served() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let mut scene = Scene::mirrors(manner, &[COOKIE]);
        drop(std::mem::replace(&mut scene.servers, Servers::Others(Vec::new())));
        until("attempts fail", || {
            scene.tunnel_backends().iter().all(|one| one.established == 0 && one.failed > 6)
        });
        let ask = || {
            let mut line = scene.connect(Family::V4, 0);
            say(&mut line, &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid=user\r\n\r\n"))
                .expect("an answer")
        };
        let (status, text) = ask();
        assert!(status.contains("503") && text.contains("no tunnel to a backend"), "{status} {text}");
        let place = &scene.topology.backends[1];
        let _back = Mirror::start(&place.netns, "b2", PORT, &scene.authority, manner).expect("it starts");
        let (status, text) = ask();
        assert!(status.contains("200"), "{status} {text}");
    }
}

#[test]
fn at_its_end_the_daemon_waits_for_requests_but_not_for_ever() {
    let mut scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    let ask = |path: &str, client| {
        let mut line = scene.connect(Family::V4, client);
        write!(line, "GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n").expect("sent");
        line.flush().expect("sent");
        line
    };
    let (mut soon, mut late, mut idle) =
        (ask("/slow/2000", 0), ask("/slow/60000", 1), scene.connect(Family::V6, 0));
    let Servers::Mirrors(mirrors) = &scene.servers else { panic!("mirrors") };
    until("both are under way", || mirrors.iter().map(Mirror::begun).sum::<u64>() == 2);
    let began = Instant::now();
    scene.daemon.process().signal(libc::SIGTERM);
    // Whoever asks nothing is told to go at once.
    let mut rest = Vec::new();
    let _ = idle.read_to_end(&mut rest);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let head = http::read_head(&mut soon).expect("an answer").expect("an answer");
    assert!(head.line.contains("200") && head.close, "{head:?}");
    // It is cut, or told so in time.
    let cut: Result<_> = http::read_head(&mut late);
    assert!(!matches!(&cut, Ok(Some(head)) if !head.line.contains("503")), "{cut:?}");
    let after = began.elapsed();
    assert!((Duration::from_secs(4)..Duration::from_secs(8)).contains(&after), "{after:?}");
    let status = scene.daemon.process().wait(Duration::from_secs(5)).expect("it ends");
    assert!(status.success(), "{status}");
}

/// Nothing of theirs is under way, though none of them closes.
#[test]
fn at_its_end_the_daemon_does_not_wait_for_who_asks_nothing() {
    let mut scene = Scene::mirrors(Manner::HTTP1, &[COOKIE]);
    let (from, to) = (scene.topology.client(Family::V4, 0), SocketAddr::new(Family::V4.vip(), PORT));
    let _silent = sockets::connect(&scene.topology.clients, from, to).expect("connected");
    let _idle = scene.connect(Family::V4, 1);
    let mut half = scene.connect(Family::V6, 2);
    half.write_all(b"GET / HT").and_then(|()| half.flush()).expect("sent");
    // It answers no PING.
    let mut frames = Frames::silent(&scene).mute();
    frames.write(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat());
    std::thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    scene.daemon.process().signal(libc::SIGTERM);
    let status = scene.daemon.process().wait(Duration::from_secs(10)).expect("it ends");
    assert!(status.success() && began.elapsed() < Duration::from_secs(4), "{status} {:?}", began.elapsed());
    let mut rest = Vec::new();
    half.read_to_end(&mut rest).expect("TLS was ended as it should");
}

#[test]
fn bad_words_about_tunnels_are_answered_clearly() {
    let scene = Scene::mirrors(Manner::HTTP1, &[COOKIE]);
    for (arguments, part) in [
        (&["show", "0"][..], "no such tunnel"),
        (&["show", "99999"], "no such tunnel"),
        (&["show", "4294967295"], "no such tunnel"),
        (&["show", "4294967296"], "4294967296"),
        (&["show", "99999999999999999999999"], "99999999999999999999999"),
        (&["show", "word"], "word"),
        (&["show", ""], "<ID>"),
        (&["show", "1/../../services"], "services"),
        (&["close", "0"], "no such tunnel"),
        (&["close", "99999"], "no such tunnel"),
        (&["close", "word"], "word"),
        (&["rotate", "nobody"], "nobody"),
        (&["rotate", "shop/b9"], "b9"),
        (&["rotate", "other/b1"], "other"),
        (&["rotate", "shop/b1?x=y"], "b1?x=y"),
        (&["rotate", ""], "\"\""),
        (&["nonsense"], "nonsense"),
    ] {
        let error = scene.daemon.told(&[&["tunnels"], arguments].concat()).expect_err("refused");
        let said = format!("{error:#}");
        let said = said.split_once("exit status").map_or("", |(_, rest)| rest);
        assert!(said.contains(part) && !said.contains("panicked"), "{arguments:?}: {said}");
    }
    assert_eq!(scene.tunnels().len(), 3 * ESTABLISHED, "nothing was closed");
}
