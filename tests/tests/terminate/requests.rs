//! Requests and answers: what passes, and what is refused.

use std::io::{Read as _, Write as _};

use dispatcher_tests::{http, tls::HOST, topology::Family};

use crate::scene::{COOKIE, Scene, say};

#[test]
fn requests_that_can_be_taken_for_two_are_refused() {
    let scene = Scene::new(false, &[COOKIE]);
    let head = format!("Host: {HOST}\r\n");
    for (text, status) in [
        (format!("GET / HTTP/1.1\r\n{head}\r\n"), "200"),
        (format!("POST / HTTP/1.1\r\n{head}Content-Length: 3\r\n\r\nabc"), "200"),
        (
            format!(
                "POST / HTTP/1.1\r\n{head}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            "200",
        ),
        (format!("POST / HTTP/1.1\r\n{head}Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"), "400"),
        (format!("POST / HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\nxyz\r\n"), "400"),
        (format!("GET / HTTP/1.1\r\n{head}Host: other.test\r\n\r\n"), "400"),
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), "400"),
        (format!("CONNECT {HOST}:443 HTTP/1.1\r\n{head}\r\n"), "405"),
    ] {
        let mut line = scene.connect(Family::V4, 0);
        let answer = say(&mut line, &text);
        let (found, body) = answer.unwrap_or_else(|error| panic!("{:.200}: {error:#}", text));
        assert!(found.contains(status), "{:.200}: {found}: {body}", text);
    }
    // Who sends too much is told so, or, when he goes on sending, finds the connection closed.
    let long = format!("GET / HTTP/1.1\r\n{head}Long: {}\r\n\r\n", "x".repeat(1 << 20));
    if let Ok((status, body)) = say(&mut scene.connect(Family::V4, 0), &long) {
        assert!(status.contains("431"), "{status}: {body}");
    }
    let usual = format!("GET / HTTP/1.1\r\n{head}\r\n");
    let (status, _) = say(&mut scene.connect(Family::V4, 0), &usual).expect("an answer");
    assert!(status.contains("200"), "{status}");
}

#[test]
fn a_backend_that_never_answers_is_not_waited_for() {
    let scene = Scene::new(false, &[COOKIE, "terminate.response_timeout = \"1s\""]);
    let mut line = scene.connect(Family::V6, 1);
    let (status, body) =
        say(&mut line, &format!("GET /hang HTTP/1.1\r\nHost: {HOST}\r\n\r\n")).expect("an answer");
    assert!(status.contains("504") && body.contains("within 1 s"), "{status}: {body}");
    let (status, _) = say(&mut line, &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n")).expect("an answer");
    assert!(status.contains("200"), "the connection goes on: {status}");
    // A request that takes long to come is no backend's fault.
    let mut slow = scene.connect(Family::V4, 1);
    slow.write_all(format!("POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 6\r\n\r\n").as_bytes())
        .expect("sent");
    for byte in b"slowly".chunks(1) {
        slow.flush().expect("sent");
        std::thread::sleep(std::time::Duration::from_millis(400));
        slow.write_all(byte).expect("sent");
    }
    let (status, _) = say(&mut slow, "").expect("an answer");
    assert!(status.contains("200"), "{status}");
}

#[test]
fn http_1_1_alone_can_be_asked_of_backends() {
    let scene = Scene::new(true, &[COOKIE, "tunnels.http = \"1.1\""]);
    assert!(scene.tunnels().iter().all(|one| one.alpn.as_deref() == Some("http/1.1")));
    assert_eq!(scene.visit("jar", Family::V4, &["--http2"], "/").protocol, "TLSv1.3");
}

#[test]
fn protocols_can_be_switched() {
    let scene = Scene::new(false, &[COOKIE]);
    let mut line = scene.connect(Family::V4, 2);
    let text = format!("GET /echo HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    let (status, _) = say(&mut line, &text).expect("an answer");
    assert!(status.contains("101"), "{status}");
    line.write_all(b"hello").expect("sent");
    line.flush().expect("sent");
    let mut back = [0; 5];
    line.read_exact(&mut back).expect("read");
    assert_eq!(&back, b"hello");
}

#[test]
fn bodies_pass_whole_and_with_back_pressure() {
    let scene = Scene::new(false, &[COOKIE]);
    for family in Family::BOTH {
        let mut line = scene.connect(family, 1);
        http::download(&mut line, 20_000_000).expect("downloaded");
        http::upload(&mut line, 5_000_000).expect("uploaded");
    }
}
