//! Tunnels to the backends: what is seen of them, and what becomes of requests when they end.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use anyhow::ensure;
use dispatcher_tests::{
    daemon::Process,
    tls::{HOST, Identity},
    topology::Family,
    town::until,
};
use dispatcher_user::api;

use crate::scene::{COOKIE, ESTABLISHED, PORT, Scene, say};

#[test]
fn claim_c10_no_byte_in_clear_on_the_way_to_backends() {
    let scene = Scene::new(true, &[COOKIE]);
    let file = scene.folder.path().join("way.pcap");
    let mut command = scene.topology.dispatcher.command("tcpdump");
    command.args(["-i", "be0", "-s", "0", "-U", "--immediate-mode", "-w"]).arg(&file);
    let capture = Process::start(command, None).expect("tcpdump");
    until("it captures", || capture.log().contains("listening on"));
    let tunnels = scene.tunnels();
    for number in 0..6 {
        let body = ["-d", "user-data-that-nobody-sees"];
        let _ = scene.curl(&format!("jar{number}"), Family::V4, &body, "/path-that-nobody-sees");
        let _ = scene.visit(&format!("jar{number}"), Family::V6, &[], "/login");
    }
    capture.signal(libc::SIGTERM);
    let mut capture = capture;
    let _ = capture.wait(std::time::Duration::from_secs(5)).expect("ends");
    let seen = std::fs::read(&file).expect("a capture");
    // What was sent is in it: packets of the tunnels, and nothing that can be read.
    assert!(seen.len() > 5000, "{} bytes", seen.len());
    let has = |text: &[u8]| seen.windows(text.len()).any(|window| window == text);
    assert!(tunnels.iter().any(|one| has(&one.source.port().to_be_bytes())));
    for text in ["nobody-sees", "GET /", "POST /", "sid=", "backend", "HTTP/1.1 200", HOST] {
        // The server's name is asked for by SNI, before the capture began.
        assert!(!has(text.as_bytes()), "{text} is there to be read");
    }
}

#[test]
fn tunnels_that_end_lose_no_request() {
    for http2 in [true, false] {
        let scene = Scene::new(http2, &[COOKIE]);
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let problems = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for client in 0..4 {
                let (scene, stop, done, problems) = (&scene, &stop, &done, &problems);
                scope.spawn(move || {
                    let mut line = scene.connect(Family::BOTH[client % 2], client);
                    let text = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid=user{client}\r\n\r\n");
                    let mut home = None;
                    while !stop.load(Ordering::Relaxed) {
                        let answer = say(&mut line, &text).and_then(|(status, body)| {
                            ensure!(status.contains("200"), "{status}: {body}");
                            Ok(serde_json::from_str::<Identity>(&body)?.backend)
                        });
                        match answer {
                            Ok(backend) if *home.get_or_insert(backend.clone()) == backend => {}
                            other => {
                                problems.lock().expect("whole").push(format!("{home:?}: {other:?}"));
                                return;
                            }
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
            for _ in 0..5 {
                for tunnel in scene.tunnels() {
                    // It may have ended with the one before.
                    let _ =
                        scene.daemon.ask::<Vec<api::Tunnel>>(&["tunnels", "close", &tunnel.id.to_string()]);
                }
                more(50);
            }
            let rotated: api::Rotated = scene.daemon.ask(&["tunnels", "rotate"]).expect("rotated");
            assert!(rotated.tunnels > 0);
            more(100);
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(*problems.lock().expect("whole"), [""; 0], "http2: {http2}");
        // Sessions name a tunnel that is there, once they were used again.
        until("tunnels are established again", || {
            scene.tunnels().iter().filter(|one| one.state == "open").count() >= 3 * ESTABLISHED
        });
    }
}

#[test]
fn a_backend_that_is_not_who_it_should_be_gets_nothing() {
    let scene = Scene::begin(true, &["tunnels.server_name = \"other.test\""]).expect("a scene");
    until("attempts fail", || scene.tunnel_backends().iter().all(|one| one.error.is_some()));
    for backend in scene.tunnel_backends() {
        let error = backend.error.unwrap_or_default();
        assert!(error.contains("other.test") && backend.established == 0, "{error}");
    }
    let (answer, _) =
        say(&mut scene.connect(Family::V4, 0), &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n"))
            .map(|(status, body)| (format!("{status}\n{body}"), ()))
            .expect("an answer");
    for part in ["503", "request ", "no tunnel"] {
        assert!(answer.contains(part), "{answer}");
    }
    assert!(scene.tunnels().is_empty());
}

#[test]
fn a_backend_that_the_operator_adds_gets_tunnels() {
    let scene = Scene::new(false, &[COOKIE]);
    let of = |name: &str| scene.tunnels().iter().filter(|one| one.backend == name).count();
    let at = SocketAddr::new(scene.topology.backends[2].address(Family::V4), PORT).to_string();
    let _: Vec<api::Backend> = scene.daemon.ask(&["backend", "shop/b3", "remove"]).expect("removed");
    until("its tunnels end", || of("b3") == 0);
    let _: Vec<api::Backend> = scene.daemon.ask(&["backend", "shop/b9", "add", &at]).expect("added");
    until("it has tunnels", || of("b9") == ESTABLISHED);
}
