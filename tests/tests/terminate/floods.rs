//! Clients that are slow, or send what costs us more than them.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::SocketAddr,
    time::{Duration, Instant},
};

use dispatcher_tests::{sockets, tls::HOST, topology::Family, town::until};

use crate::{
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, End, Frames, HEADERS, PING, PREFACE,
        REFUSED_STREAM, RST_STREAM, SETTINGS, WHOLE, WINDOW_UPDATE, block, frame, request,
    },
    mirror::{Manner, Mirror},
    scene::{COOKIE, Connection, PORT, Scene, Servers, memory, processor, say},
};

const SHORT: [&str; 3] = [COOKIE, "terminate.handshake_timeout = \"1s\"", "terminate.idle_timeout = \"1s\""];

/// How long it takes until the other side closes; what it says before.
fn closed(line: &mut Connection) -> (Duration, String) {
    let began = Instant::now();
    let (mut said, mut piece) = (Vec::new(), [0; 1024]);
    loop {
        match line.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => said.extend_from_slice(&piece[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("it is open after {:?}", began.elapsed())
            }
            Err(_) => break,
        }
    }
    (began.elapsed(), String::from_utf8_lossy(&said).into_owned())
}

fn is_served(scene: &Scene) {
    let (status, body) =
        say(&mut scene.connect(Family::V4, 1), &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n"))
            .expect("an answer");
    assert!(status.contains("200"), "{status}: {body}");
}

#[test]
fn who_takes_his_time_is_not_waited_for() {
    let scene = Scene::mirrors(Manner::HTTP1, &SHORT);
    let soon = Duration::from_millis(500)..Duration::from_secs(5);
    // No hello, and half of one.
    for bytes in [&b""[..], b"\x16\x03\x01\x02"] {
        let (from, to) = (scene.topology.client(Family::V4, 0), SocketAddr::new(Family::V4.vip(), PORT));
        let mut stream = sockets::connect(&scene.topology.clients, from, to).expect("connected");
        stream.write_all(bytes).expect("sent");
        let began = Instant::now();
        let _ = stream.read(&mut [0; 64]);
        assert!(soon.contains(&began.elapsed()), "{bytes:?}: {:?}", began.elapsed());
    }
    // Nothing, half of a line, half of a header; and a header that never ends.
    for text in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: a\r\nX: "] {
        let mut line = scene.connect(Family::V4, 0);
        line.write_all(text.as_bytes()).and_then(|()| line.flush()).expect("sent");
        let (after, said) = closed(&mut line);
        assert!(soon.contains(&after) && !said.contains("200"), "{text:?}: {after:?}: {said}");
    }
    let mut line = scene.connect(Family::V6, 0);
    let began = Instant::now();
    line.write_all(b"GET / HTTP/1.1\r\n").expect("sent");
    line.stream().sock.set_read_timeout(Some(Duration::from_millis(200))).expect("a limit");
    let waits = |error: &io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    while line.read(&mut [0; 64]).is_err_and(|error| waits(&error)) {
        assert!(began.elapsed() < Duration::from_secs(5), "it is open after {:?}", began.elapsed());
        line.write_all(b"X: 1\r\n").and_then(|()| line.flush()).expect("what comes now is thrown away");
    }
    let dribbles = std::thread::spawn(move || {
        line.stream().sock.set_read_timeout(None).expect("no limit");
        while line.write_all(b"X: 1\r\n").and_then(|()| line.flush()).is_ok() {
            assert!(began.elapsed() < Duration::from_secs(45), "it is taken after {:?}", began.elapsed());
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    // After an answer.
    let mut line = scene.connect(Family::V6, 0);
    assert!(
        say(&mut line, &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n"))
            .expect("an answer")
            .0
            .contains("200")
    );
    assert!(soon.contains(&closed(&mut line).0));
    // HTTP/2: nothing, half of the preface, half of a frame, a header without end, nothing after an answer.
    let settings = frame(SETTINGS, 0, 0, &[]);
    for bytes in [
        Vec::new(),
        PREFACE[..10].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, &settings, &[0, 0]].concat(),
        [PREFACE, &settings, &frame(HEADERS, END_STREAM, 1, &request("GET", "/", &[]))].concat(),
        [PREFACE, &settings, &frame(HEADERS, WHOLE, 1, &request("GET", "/", &[]))].concat(),
    ] {
        let mut frames = Frames::silent(&scene).mute();
        frames.patience(Duration::from_secs(8));
        frames.write(&bytes);
        let began = Instant::now();
        while frames.read().is_some() {}
        assert!(soon.contains(&began.elapsed()), "{} bytes: {:?}", bytes.len(), began.elapsed());
    }
    dribbles.join().expect("it is waited for, but not for ever");
    is_served(&scene);
}

#[test]
fn who_does_not_take_his_answer_keeps_no_tunnel() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE, "terminate.idle_timeout = \"3s\""]);
        let busy = || scene.tunnels().iter().map(|one| one.in_flight).sum::<usize>();
        let mut lines: Vec<_> = (0..3)
            .map(|client| {
                let mut line = scene.connect(Family::V4, client);
                write!(line, "GET /bytes/{} HTTP/1.1\r\nHost: {HOST}\r\n\r\n", 1_u64 << 40).expect("sent");
                line.flush().expect("sent");
                line
            })
            .collect();
        // With HTTP/2 it is enough to open no window.
        let mut frames = Frames::open(&scene);
        let path = format!("/bytes/{}", 1_u64 << 40);
        frames.send(HEADERS, WHOLE, 1, &request("GET", &path, &[]));
        assert_eq!(frames.end(1), End::Status(200));
        until("all are under way", || busy() == 4);
        until("none is", || {
            // It is there, and says so.
            frames.send(PING, 0, 0, b"12345678");
            busy() == 0
        });
        // Who reads slowly, but reads, is served.
        let mut line = lines.remove(0);
        drop(lines);
        line = {
            drop(line);
            scene.connect(Family::V4, 3)
        };
        write!(line, "GET /bytes/20000000 HTTP/1.1\r\nHost: {HOST}\r\n\r\n").expect("sent");
        line.flush().expect("sent");
        let mut piece = vec![0; 1 << 20];
        for _ in 0..16 {
            std::thread::sleep(Duration::from_millis(300));
            line.read_exact(&mut piece).expect("it goes on");
        }
        is_served(&scene);
    }
}

#[test]
fn an_answer_that_does_not_go_on_is_cut() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let lines = [COOKIE, "terminate.response_timeout = \"1s\"", "terminate.idle_timeout = \"30s\""];
        let scene = Scene::mirrors(manner, &lines);
        let mut line = scene.connect(Family::V4, 0);
        write!(line, "GET /half HTTP/1.1\r\nHost: {HOST}\r\n\r\n").expect("sent");
        line.flush().expect("sent");
        let (_, text) = closed(&mut line);
        assert!(text.contains("200 OK") && text.contains("half"), "{text}");
        assert!(!text.ends_with("0\r\n\r\n"), "{text}");
        let mut frames = Frames::open(&scene);
        frames.send(HEADERS, WHOLE, 1, &request("GET", "/half", &[]));
        assert_eq!(frames.end(1), End::Status(200));
        until("the stream is reset", || {
            frames.read().is_some_and(|frame| (frame.stream, frame.kind) == (1, RST_STREAM))
        });
        until("nothing is under way", || scene.tunnels().iter().all(|one| one.in_flight == 0));
        is_served(&scene);
    }
}

#[test]
fn who_does_not_send_his_body_keeps_no_tunnel() {
    let scene = Scene::mirrors(Manner::HTTP1, &[COOKIE, "terminate.response_timeout = \"1s\""]);
    let mut line = scene.connect(Family::V4, 0);
    let head = format!("POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 10\r\n\r\nabc");
    let (status, body) = say(&mut line, &head).expect("an answer");
    assert!(status.contains("408") && body.contains("within 1 s"), "{status}: {body}");
    until("no tunnel is used", || scene.tunnels().iter().all(|one| one.in_flight == 0));
}

/// What a flood costs: memory, and processor time for each frame.
struct Flood {
    what: &'static str,
    /// Makes one burst of frames; the number is that of the burst.
    burst: fn(u32) -> Vec<u8>,
    bursts: u32,
    /// The connection is ended for it.
    ends: bool,
}

fn streams(number: u32, each: u32) -> impl Iterator<Item = u32> {
    (number * each..(number + 1) * each).map(|index| 2 * index + 1)
}

const FLOODS: [Flood; 10] = [
    Flood {
        what: "streams that are reset at once (CVE-2023-44487)",
        burst: |number| {
            streams(number, 100)
                .flat_map(|id| {
                    [
                        frame(HEADERS, WHOLE, id, &request("GET", "/slow/500", &[])),
                        frame(RST_STREAM, 0, id, &[0, 0, 0, 8]),
                    ]
                    .concat()
                })
                .collect()
        },
        bursts: 200,
        ends: true,
    },
    Flood {
        what: "a header that is continued without end (CVE-2024-27316)",
        burst: |number| match number {
            0 => frame(HEADERS, END_STREAM, 1, &request("GET", "/", &[])),
            _ => frame(CONTINUATION, 0, 1, &block(&[("x", "y"); 100])),
        },
        bursts: 5000,
        ends: true,
    },
    Flood {
        what: "a header that is continued by nothing",
        burst: |number| match number {
            0 => frame(HEADERS, END_STREAM, 1, &request("GET", "/", &[])),
            _ => frame(CONTINUATION, 0, 1, &[]).repeat(100),
        },
        bursts: 500,
        ends: true,
    },
    Flood {
        what: "DATA without data (CVE-2019-9518)",
        burst: |number| match number {
            0 => frame(HEADERS, END_HEADERS, 1, &request("POST", "/", &[])),
            _ => frame(DATA, 0, 1, &[]).repeat(1000),
        },
        bursts: 200,
        ends: true,
    },
    Flood {
        what: "streams that we reset (MadeYouReset, CVE-2025-8671)",
        burst: |number| {
            streams(number, 100)
                .flat_map(|id| {
                    [
                        frame(HEADERS, END_HEADERS, id, &request("POST", "/", &[])),
                        frame(WINDOW_UPDATE, 0, id, &[0; 4]),
                    ]
                    .concat()
                })
                .collect()
        },
        bursts: 200,
        ends: true,
    },
    Flood {
        what: "more streams than were allowed",
        burst: |number| {
            streams(number, 100)
                .flat_map(|id| frame(HEADERS, END_HEADERS, id, &request("POST", "/", &[])))
                .collect()
        },
        bursts: 200,
        ends: true,
    },
    Flood {
        what: "pings whose answers nobody reads (CVE-2019-9512)",
        burst: |_| frame(PING, 0, 0, b"12345678").repeat(1000),
        bursts: 1000,
        ends: false,
    },
    Flood {
        what: "settings whose acknowledgements nobody reads (CVE-2019-9515)",
        burst: |_| frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1000),
        bursts: 1000,
        ends: false,
    },
    Flood {
        what: "window updates",
        burst: |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(1000),
        bursts: 500,
        ends: false,
    },
    Flood {
        what: "frames of a kind that nobody knows",
        burst: |_| frame(0xee, 0, 0, &[7; 100]).repeat(1000),
        bursts: 100,
        ends: false,
    },
];

#[test]
fn floods_cost_little() {
    const MEMORY: u64 = 32 << 20;
    let mut scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    is_served(&scene);
    for flood in FLOODS {
        let (memory_before, processor_before) = (memory(&mut scene), processor(&mut scene));
        let mut frames = Frames::open(&scene);
        frames.patience(Duration::from_millis(500));
        let (began, mut sent) = (Instant::now(), 0);
        for number in 0..flood.bursts {
            let bytes = (flood.burst)(number);
            if began.elapsed() > Duration::from_secs(5) || !frames.write(&bytes) {
                break;
            }
            sent += bytes.len();
        }
        let grown = memory(&mut scene).saturating_sub(memory_before);
        let used = processor(&mut scene) - processor_before;
        eprintln!(
            "{}: {sent} bytes in {:?}: {grown} bytes of memory, {used:?} of a processor",
            flood.what,
            began.elapsed()
        );
        assert!(grown < MEMORY, "{}: {grown} bytes of memory", flood.what);
        // As much as it takes to read them, and no answer of a backend's.
        assert!(used < Duration::from_secs(4), "{}: {used:?} of a processor for {sent} bytes", flood.what);
        if flood.ends {
            frames.patience(Duration::from_secs(3));
            let end = frames.end(u32::MAX >> 1);
            assert_ne!(end, End::Silence, "{}: the connection is open", flood.what);
            // The reason is lost where our own bytes are still under way when it closes.
            assert!(
                matches!(end, End::Goaway(ENHANCE_YOUR_CALM | REFUSED_STREAM | 1) | End::Closed),
                "{}: {end:?}",
                flood.what
            );
        }
        drop(frames);
        is_served(&scene);
    }
    // Of the streams that were reset few came to a backend.
    let Servers::Mirrors(mirrors) = &scene.servers else { panic!("mirrors") };
    let begun = mirrors.iter().map(Mirror::begun).sum::<u64>();
    assert!(begun < 2000, "{begun} requests");
    until("nothing is under way", || scene.tunnels().iter().all(|one| one.in_flight == 0));
}

/// What is refused before it is a request can be seen in the metrics, by its reason.
#[test]
fn refusals_are_counted() {
    let scene = Scene::mirrors(Manner::HTTP1, &SHORT);
    let counted = |reason: &str| -> u64 {
        let text = scene.daemon.told(&["metrics"]).expect("metrics");
        let name = format!("reason=\"{reason}\"");
        let line = text.lines().find(|line| line.contains("clients_refused_total{") && line.contains(&name));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("{reason}: {text}"))
    };
    let head = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n");
    let say_it = |text: &str| {
        let mut line = scene.connect(Family::V4, 0);
        let _ = line.write_all(text.as_bytes()).and_then(|()| line.flush());
        closed(&mut line)
    };
    type Act<'a> = Box<dyn Fn() + 'a>;
    let acts: Vec<(&str, Act<'_>)> = vec![
        ("malformed", Box::new(|| drop(say_it(&format!("{head}X A: 1\r\n\r\n"))))),
        ("too_large", Box::new(|| drop(say_it(&format!("{head}{}\r\n", "x: 1\r\n".repeat(200)))))),
        (
            "too_large",
            Box::new(|| {
                let mut frames = Frames::open(&scene);
                frames.ask(1, &[("x", &"y".repeat(80 << 10))]);
                assert_eq!(frames.end(1), End::Status(431));
            }),
        ),
        ("timeout", Box::new(|| drop(say_it(&head)))),
        (
            "handshake",
            Box::new(|| {
                let (from, to) =
                    (scene.topology.client(Family::V4, 0), SocketAddr::new(Family::V4.vip(), PORT));
                let mut stream = sockets::connect(&scene.topology.clients, from, to).expect("connected");
                stream.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("sent");
                let _ = stream.read(&mut [0; 64]);
            }),
        ),
        (
            "http2",
            Box::new(|| {
                let mut frames = Frames::open(&scene);
                frames.send(DATA, END_STREAM, 1, b"x");
                assert_eq!(frames.end(1), End::Goaway(1));
            }),
        ),
    ];
    for (reason, act) in acts {
        let before = counted(reason);
        act();
        act();
        until("it is counted", || counted(reason) >= before + 2);
        assert_eq!(counted(reason), before + 2, "{reason}");
    }
}
