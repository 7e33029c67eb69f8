//! Bodies, trailers, and answers without a body, whatever the versions on the two sides.

use std::{
    io::{Read as _, Write as _},
    time::{Duration, Instant},
};

use dispatcher_tests::{
    http::{self, Noise},
    system::Nginx,
    tls::HOST,
    topology::{Family, Place},
    town::until,
};

use crate::{
    frames::{DATA, END_HEADERS, END_STREAM, Frames, HEADERS, RST_STREAM, WINDOW_UPDATE, block, request},
    mirror::{Answers, Manner, Mirror, Prepared, Seen},
    scene::{COOKIE, ESTABLISHED, PORT, Scene, Servers, memory, say},
};

const LONG: u64 = 30_000_000;

#[test]
fn bodies_pass_whole_whatever_the_versions() {
    let sum = http::hash(&mut Noise::default(), LONG).expect("endless");
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let mut body = vec![0; LONG as usize];
        Noise::default().read_exact(&mut body).expect("endless");
        let file = scene.folder.path().join("body");
        std::fs::write(&file, &body).expect("written");
        let (up, down) = (format!("@{}", file.display()), scene.folder.path().join("down"));
        for version in ["--http1.1", "--http2"] {
            let arguments = [version, "-H", "Expect:", "--data-binary", &up];
            let answer = scene.curl("jar", Family::V4, &arguments, "/").expect("uploaded");
            let seen: Seen = serde_json::from_str(&answer).expect("what it saw");
            assert_eq!(seen.body, format!("{LONG} {sum}"), "{version}");
            // Of unknown length, in chunks where that is HTTP/1.1.
            let arguments =
                [version, "-H", "Expect:", "-H", "Transfer-Encoding: chunked", "--data-binary", &up];
            let answer = scene.curl("jar", Family::V6, &arguments, "/").expect("uploaded");
            let seen: Seen = serde_json::from_str(&answer).expect("what it saw");
            assert_eq!(seen.body, format!("{LONG} {sum}"), "{version} in chunks");
            let arguments = [version, "-o", &down.to_string_lossy()];
            scene.curl("jar", Family::V4, &arguments, &format!("/bytes/{LONG}")).expect("downloaded");
            assert!(std::fs::read(&down).expect("a file") == body, "{version}: another body");
        }
    }
}

#[test]
fn who_does_not_read_is_not_read_for() {
    const LONG: u64 = 200_000_000;
    const MOST: u64 = 40_000_000;
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let mut scene = Scene::mirrors(manner, &[COOKIE]);
        let before = memory(&mut scene);
        // A server that does not read for some seconds. What is under way is in the kernels' buffers.
        let mut line = scene.connect(Family::V4, 0);
        write!(line, "POST /stall HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {LONG}\r\n\r\n").expect("sent");
        line.stream().sock.set_write_timeout(Some(Duration::from_millis(500))).expect("a limit");
        let (piece, mut sent) = (vec![7; 16 << 10], 0);
        // Rustls does not tell of a write that took too long.
        let mut began = Instant::now();
        while sent < LONG && began.elapsed() < Duration::from_millis(450) {
            began = Instant::now();
            sent += line.write(&piece).expect("sent") as u64;
        }
        assert!(sent < 2 * MOST, "{sent} bytes were taken from a client for a server that did not read");
        let grown = memory(&mut scene).saturating_sub(before);
        assert!(grown < MOST, "the daemon has {grown} bytes more");
        drop(line);
        // Clients that do not read.
        let lines: Vec<_> = (0..8)
            .map(|client| {
                let mut line = scene.connect(Family::BOTH[client % 2], client % 4);
                write!(line, "GET /bytes/{} HTTP/1.1\r\nHost: {HOST}\r\n\r\n", 1_u64 << 40).expect("sent");
                line.flush().expect("sent");
                line
            })
            .collect();
        std::thread::sleep(Duration::from_secs(2));
        let grown = memory(&mut scene).saturating_sub(before);
        assert!(grown < MOST, "the daemon has {grown} bytes more");
        // Others are served.
        let (status, _) =
            say(&mut scene.connect(Family::V4, 1), &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n"))
                .expect("an answer");
        assert!(status.contains("200"), "{status}");
        drop(lines);
    }
}

#[test]
fn trailers_pass_both_ways() {
    let scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    let mut frames = Frames::open(&scene);
    frames.send(HEADERS, END_HEADERS, 1, &request("POST", "/trailers", &[("te", "trailers")]));
    frames.send(DATA, 0, 1, b"message");
    frames.send(HEADERS, END_HEADERS | END_STREAM, 1, &block(&[("checksum", "abc")]));
    let mut kinds = Vec::new();
    let mut body = Vec::new();
    let last = loop {
        let frame = frames.read().unwrap_or_else(|| panic!("no trailers after {kinds:?}"));
        if frame.stream != 1 || frame.kind == WINDOW_UPDATE {
            continue;
        }
        assert_ne!(frame.kind, RST_STREAM, "{frame:?}");
        kinds.push(frame.kind);
        if frame.kind == DATA {
            body.extend(&frame.payload);
        }
        if frame.flags & END_STREAM != 0 {
            break frame;
        }
    };
    assert_eq!((kinds.first(), last.kind), (Some(&HEADERS), HEADERS), "{kinds:?}");
    let seen: Seen = serde_json::from_slice(&body).expect("what it saw");
    assert_eq!(
        (seen.body.as_str(), seen.trailers.get("checksum").map(Vec::len)),
        ("message", Some(1)),
        "{seen:?}"
    );
    // curl shows those that come.
    let head = scene
        .curl("jar", Family::V6, &["--http2", "-o", "/dev/null", "-D", "-"], "/trailers")
        .expect("an answer");
    assert!(head.to_lowercase().contains("grpc-status: 0"), "{head}");
}

#[test]
fn a_client_that_waits_for_100_gets_it() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let arguments = [
            "--http1.1",
            "-D",
            "-",
            "-H",
            "Expect: 100-continue",
            "--expect100-timeout",
            "8",
            "-d",
            "waited",
        ];
        let began = Instant::now();
        let answer = scene.curl("jar", Family::V4, &arguments, "/").expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 100"), "{answer}");
        assert!(answer.contains("\"body\":\"waited\""), "{answer}");
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        // The body comes anyway: no server is asked whether it may.
        let seen = scene.seen().pop().expect("one");
        assert_eq!(seen.headers.get("expect"), None, "{seen:?}");
    }
}

#[test]
fn answers_without_a_body_end_no_connection() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let handshakes = scene.handshakes();
        let mut line = scene.connect(Family::V6, 0);
        for (method, path, status) in [
            ("HEAD", "/", "200"),
            ("GET", "/status/204", "204"),
            ("GET", "/status/304", "304"),
            ("HEAD", "/status/404", "404"),
            ("OPTIONS", "/status/204", "204"),
            ("DELETE", "/status/205", "205"),
        ] {
            write!(line, "{method} {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n").expect("sent");
            line.flush().expect("sent");
            let head = http::read_head(&mut line).expect("an answer").expect("an answer");
            assert!(head.line.contains(status) && !head.close, "{method} {path}: {head:?}");
            // Nothing is between this answer and the next one.
            let (line, body) =
                say(&mut line, &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n")).expect("an answer");
            assert!(
                line.contains("200") && body.contains("\"GET\""),
                "after {method} {path}: {line}: {body}"
            );
        }
        assert_eq!(scene.handshakes(), handshakes, "tunnels were used again");
        let head = scene.curl("jar", Family::V4, &["--http2", "-I"], "/").expect("an answer");
        assert!(head.starts_with("HTTP/2 200") && head.contains("content-length: "), "{head}");
    }
}

#[test]
fn interim_answers_do_not_pass_for_the_answer() {
    let scene = prepared(
        &[(
            false,
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        )],
        &[],
    );
    for version in ["--http1.1", "--http2"] {
        let answer = scene.curl("jar", Family::V4, &[version, "-D", "-"], "/0").expect("an answer");
        assert!(answer.contains(" 200") && answer.ends_with("\r\n\r\nok"), "{answer}");
    }
}

/// Who is still sending hears it too, and not only that the connection is closed.
#[test]
fn an_answer_before_the_body_ends_arrives() {
    for http2 in [false, true] {
        let scene = Scene::before(&[COOKIE], |topology, authority| {
            let places = topology.backends.iter().enumerate();
            let all = places.map(|(i, place)| {
                let name = format!("b{}", i + 1);
                // It takes a body of 1 MB, its default.
                match http2 {
                    true => Nginx::with_http2(&place.netns, &name, PORT, authority),
                    false => Nginx::start(&place.netns, &name, PORT, authority),
                }
            });
            Ok(Servers::Nginx { _running: all.collect::<anyhow::Result<_>>()? })
        });
        let scene = scene.unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
        until("tunnels are established", || scene.tunnels().len() == 3 * ESTABLISHED);
        for length in [2_000_000, LONG] {
            let file = scene.folder.path().join("body");
            std::fs::File::create(&file).and_then(|file| file.set_len(length)).expect("written");
            let body = format!("@{}", file.display());
            for number in 0..8 {
                let version = ["--http1.1", "--http2"][number / 4];
                let expect = ["Expect:", "Expect: 100-continue"][number / 2 % 2];
                let arguments =
                    [version, "-H", expect, "-o", "/dev/null", "-w", "%{http_code}", "--data-binary", &body];
                let answer = scene.curl("none", Family::BOTH[number % 2], &arguments, "/");
                let what = format!("{length} bytes, {version}, {expect}, HTTP/2 behind: {http2}");
                assert_eq!(answer.unwrap_or_else(|error| panic!("{what}: {error:#}")), "413", "{what}");
            }
        }
    }
}

/// The rest of the body is no reason to end the connection, on which the next request comes.
#[test]
fn after_an_early_answer_the_connection_goes_on() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        for (length, chunked) in [(5_000, false), (5_000, true), (3_000_000, false)] {
            let mut line = scene.connect(Family::V4, 0);
            let head = if chunked {
                format!("Transfer-Encoding: chunked\r\n\r\n{length:x}")
            } else {
                format!("Content-Length: {length}\r\n")
            };
            let begin = format!("POST /early HTTP/1.1\r\nHost: {HOST}\r\n{head}\r\n");
            let half = "y".repeat(length / 2);
            let (status, body) = say(&mut line, &(begin + &half)).expect("an early answer");
            assert!(status.contains("401") && body == "no", "{status}: {body}");
            // Until the server's word that it wants no more has come, too.
            std::thread::sleep(Duration::from_millis(100));
            let end = if chunked { "\r\n0\r\n\r\n" } else { "" };
            let rest = format!("{half}{end}GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
            let (status, _) =
                say(&mut line, &rest).unwrap_or_else(|error| panic!("{length} {chunked}: {error:#}"));
            assert!(status.contains("200"), "{length} {chunked}: {status}");
        }
    }
}

/// What servers say that cannot be passed on: the client learns that, and no more.
#[test]
fn bad_answers_become_502() {
    const BAD: Answers = &[
        (true, b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
        (true, b""),
        (true, b"HTTP/1.1 200 O"),
        (false, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc"),
        (false, b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc"),
        (false, b"HTTP/1.1 200 OK\r\nBad Name: x\r\nContent-Length: 2\r\n\r\nok"),
        (false, b"HTTP/1.1 99 OK\r\nContent-Length: 2\r\n\r\nok"),
        (false, b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"),
    ];
    let scene = prepared(BAD, &[]);
    for (number, (_, bytes)) in BAD.iter().enumerate() {
        let shown = String::from_utf8_lossy(bytes).into_owned();
        let text = format!("POST /{number} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 0\r\n\r\n");
        let (status, body) = say(&mut scene.connect(Family::V4, 0), &text).expect("an answer");
        assert!(status.contains("502"), "{shown:?}: {status}: {body}");
        assert!(body.starts_with("502 Bad Gateway: ") && body.contains("(request "), "{shown:?}: {body}");
        let (body, _) = body.split_once("(request ").expect("an id");
        for word in ["hyper", "pars", "incomplete", "invalid", "10.", "b1"] {
            assert!(!body.to_lowercase().contains(word), "{word}: {body}");
        }
    }
}

/// The same over HTTP/2, and the next tunnel is not asked.
#[test]
fn an_answer_that_is_malformed_is_asked_for_once() {
    let scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    for version in ["--http1.1", "--http2"] {
        let answer = scene.curl("jar", Family::V4, &[version], "/longer").expect("an answer");
        assert!(answer.starts_with("502 Bad Gateway: the backend's answer cannot be read ("), "{answer}");
    }
    assert_eq!(scene.seen().len(), 2);
}

/// Servers that say what was prepared.
pub(crate) fn prepared(answers: Answers, lines: &[&str]) -> Scene {
    let scene = Scene::before(&[&[COOKIE], lines].concat(), |topology, authority| {
        let start = |place: &Place| {
            Prepared::start(&place.netns, PORT, authority, answers).map(|one| Box::new(one) as _)
        };
        Ok(Servers::Others(topology.backends.iter().map(start).collect::<anyhow::Result<_>>()?))
    });
    let scene = scene.unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
    until("tunnels are established", || scene.tunnels().len() >= 3);
    scene
}

/// RFC 9112 section 6.3.
#[test]
fn beside_chunks_a_length_does_not_count() {
    const BOTH: Answers = &[
        (
            false,
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ),
        (
            false,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        ),
    ];
    let scene = prepared(BOTH, &[]);
    for version in ["--http1.1", "--http2"] {
        for (method, path) in [("GET", "/0"), ("POST", "/0"), ("GET", "/1"), ("POST", "/1")] {
            let answer = scene.curl("jar", Family::V4, &[version, "-X", method, "-D", "-"], path);
            let answer = answer.unwrap_or_else(|error| panic!("{version} {method} {path}: {error:#}"));
            assert!(answer.contains(" 200") && answer.ends_with("\r\n\r\nok"), "{answer}");
            assert!(!answer.to_lowercase().contains("content-length"), "{answer}");
        }
    }
}

#[test]
fn a_switch_to_what_nobody_asked_for_is_none() {
    const SWITCHED: Answers = &[
        (false, b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"),
        (false, b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\n"),
        (false, b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: Echo\r\n\r\n"),
    ];
    let scene = prepared(SWITCHED, &[]);
    for (number, status) in ["502", "502", "101"].into_iter().enumerate() {
        let text = format!(
            "GET /{number} HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: test/1, echo\r\n\r\n"
        );
        let (said, body) = say(&mut scene.connect(Family::V4, 0), &text).expect("an answer");
        assert!(said.contains(status), "{number}: {said}: {body}");
        assert!(status == "101" || body.contains("the backend switched to another protocol"), "{body}");
    }
}

#[test]
fn an_answer_that_breaks_off_is_not_taken_for_whole() {
    let scene = prepared(&[(true, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nonly this")], &[]);
    for version in ["--http1.1", "--http2"] {
        let error = scene.curl("jar", Family::V4, &[version, "-X", "POST"], "/0").expect_err("it breaks off");
        let text = format!("{error:#}");
        // curl's names for a transfer that is not whole, and for a stream that was reset.
        assert!(text.contains("curl: (18)") || text.contains("curl: (92)"), "{version}: {text}");
    }
}

#[test]
fn a_client_that_goes_takes_its_request_with_it() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let Servers::Mirrors(mirrors) = &scene.servers else { panic!("mirrors") };
        let mut line = scene.connect(Family::V4, 0);
        write!(line, "GET /bytes/{} HTTP/1.1\r\nHost: {HOST}\r\n\r\n", 1_u64 << 40).expect("sent");
        line.flush().expect("sent");
        until("it is under way", || mirrors.iter().map(Mirror::begun).sum::<u64>() == 1);
        let busy = || scene.tunnels().iter().filter(|one| one.in_flight > 0).count();
        until("a tunnel is used", || busy() == 1);
        drop(line);
        until("it was ended", || busy() == 0);
    }
}
