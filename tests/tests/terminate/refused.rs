//! Requests that could be taken for others than they are: none of them reaches a backend.

use std::io::{Read as _, Write as _};

use dispatcher_tests::{tls::HOST, topology::Family};

use crate::{
    frames::{
        COMPRESSION_ERROR, DATA, END_HEADERS, END_STREAM, End, Frames, HEADERS, PROTOCOL_ERROR, WHOLE, block,
        request,
    },
    mirror::Manner,
    scene::{COOKIE, Scene, say},
};

/// What would be a request of its own, if the one before it ended earlier.
const SECOND: &str = "GET /second HTTP/1.1\r\nHost: service.test\r\n\r\n";

/// All that is said on a connection, up to its end or to silence.
fn rest(scene: &Scene, bytes: &[u8]) -> String {
    let mut line = scene.connect(Family::V4, 0);
    line.stream().sock.set_read_timeout(Some(std::time::Duration::from_secs(1))).expect("a limit");
    line.write_all(bytes).and_then(|()| line.flush()).expect("it is taken, though not read");
    let (mut all, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = line.read(&mut piece) {
        all.extend_from_slice(&piece[..count]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

#[test]
fn no_request_hides_in_another() {
    let get = |lines: &str| format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n{lines}\r\n{SECOND}");
    let post = |lines: &str, body: &str| format!("POST / HTTP/1.1\r\nHost: {HOST}\r\n{lines}\r\n{body}");
    let chunked = |body: &str| post("Transfer-Encoding: chunked\r\n", body);
    let rows: Vec<(&str, String, &str)> = vec![
        ("two lengths", post("Content-Length: 3\r\nContent-Length: 4\r\n", &format!("abc{SECOND}")), "400"),
        ("a list of lengths", post("Content-Length: 3, 3\r\n", &format!("abc{SECOND}")), "400"),
        ("a signed length", post("Content-Length: +3\r\n", &format!("abc{SECOND}")), "400"),
        ("a negative length", post("Content-Length: -1\r\n", SECOND), "400"),
        ("a hexadecimal length", post("Content-Length: 0x3\r\n", &format!("abc{SECOND}")), "400"),
        (
            "a length beyond 64 bits",
            post("Content-Length: 18446744073709551619\r\n", &format!("abc{SECOND}")),
            "400",
        ),
        ("an empty length", post("Content-Length: \r\n", SECOND), "400"),
        (
            "a coding after chunked",
            post("Transfer-Encoding: chunked, identity\r\n", &format!("0\r\n\r\n{SECOND}")),
            "400",
        ),
        (
            "a coding that is none",
            post("Transfer-Encoding: xchunked\r\n", &format!("0\r\n\r\n{SECOND}")),
            "400",
        ),
        (
            "a coding that is not known",
            post("Transfer-Encoding: gzip, chunked\r\n", &format!("0\r\n\r\n{SECOND}")),
            "501",
        ),
        (
            "a coding twice",
            post(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                &format!("0\r\n\r\n{SECOND}"),
            ),
            "501",
        ),
        (
            "a tab in the coding",
            post("Transfer-Encoding: \x0bchunked\r\n", &format!("0\r\n\r\n{SECOND}")),
            "400",
        ),
        (
            "a blank before the colon",
            post("Transfer-Encoding : chunked\r\n", &format!("0\r\n\r\n{SECOND}")),
            "400",
        ),
        (
            "a coding in HTTP/1.0",
            post("Transfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{SECOND}"))
                .replace("1.1\r\nHost: service.test\r\nT", "1.0\r\nHost: service.test\r\nT"),
            "400",
        ),
        ("a folded line", get("X-A: 1\r\n X-B: 2\r\n"), "400"),
        ("a folded first line", format!("GET / HTTP/1.1\r\n Host: {HOST}\r\n\r\n{SECOND}"), "400"),
        ("a line without a colon", get("X-A\r\n"), "400"),
        ("a name with a blank", get("X A: 1\r\n"), "400"),
        ("a name that is empty", get(": 1\r\n"), "400"),
        ("NUL in a value", get("X-A: a\0b\r\n"), "400"),
        ("NUL in a name", get("X\0A: b\r\n"), "400"),
        ("CR in a value", get("X-A: a\rX-B: b\r\n"), "400"),
        ("CR in the target", format!("GET /a\rb HTTP/1.1\r\nHost: {HOST}\r\n\r\n"), "400"),
        ("a blank in the target", format!("GET /a b HTTP/1.1\r\nHost: {HOST}\r\n\r\n"), "400"),
        ("NUL in the target", format!("GET /a\0b HTTP/1.1\r\nHost: {HOST}\r\n\r\n"), "400"),
        ("another version", format!("GET / HTTP/1.2\r\nHost: {HOST}\r\n\r\n"), "400"),
        ("no version", "GET /\r\n\r\n".to_owned(), "400"),
        ("a method with a blank", format!("GE T / HTTP/1.1\r\nHost: {HOST}\r\n\r\n"), "400"),
        ("two hosts", get("Host: other.test\r\n"), "400"),
        ("a host with a user", format!("GET / HTTP/1.1\r\nHost: user@{HOST}\r\n\r\n"), "400"),
        ("a host with a path", format!("GET / HTTP/1.1\r\nHost: {HOST}/a\r\n\r\n"), "400"),
        ("a list of hosts", format!("GET / HTTP/1.1\r\nHost: {HOST}, other.test\r\n\r\n"), "400"),
        ("a host that is empty", "GET / HTTP/1.1\r\nHost: \r\n\r\n".to_owned(), "400"),
        ("a chunk's size that is none", chunked(&format!("xyz\r\n{SECOND}")), "400"),
        ("a signed chunk's size", chunked(&format!("-1\r\n\r\n{SECOND}")), "400"),
        ("a chunk's size in C", chunked(&format!("0x3\r\nabc\r\n0\r\n\r\n{SECOND}")), "400"),
        ("a chunk beyond 64 bits", chunked(&format!("10000000000000003\r\nabc\r\n0\r\n\r\n{SECOND}")), "400"),
        ("a chunk that is longer", chunked(&format!("3\r\nabcd\r\n0\r\n\r\n{SECOND}")), "400"),
        ("a chunk's end without CR", chunked(&format!("3\r\nabc\n0\r\n\r\n{SECOND}")), "400"),
        ("a chunk's size without CR", chunked(&format!("3\nabc\r\n0\r\n\r\n{SECOND}")), "400"),
        ("an extension with LF", chunked(&format!("3;a\nb\r\nabc\r\n0\r\n\r\n{SECOND}")), "400"),
        ("a flood of extensions", chunked(&format!("3;{}\r\nabc\r\n0\r\n\r\n", "a".repeat(64 << 10))), "400"),
        ("a flood of trailers", chunked(&format!("0\r\n{}\r\n", "a: b\r\n".repeat(20_000))), "400"),
        ("too many lines", get(&(0..200).map(|i| format!("x-{i}: 1\r\n")).collect::<String>()), "431"),
        ("a line too long", get(&format!("x: {}\r\n", "y".repeat(80 << 10))), "431"),
        (
            "a target too long",
            // As long as it takes for no reading to get it whole: then it would be 414.
            format!("GET /{} HTTP/1.1\r\nHost: {HOST}\r\n\r\n", "y".repeat(200 << 10)),
            "431",
        ),
        (
            "a list of hosts without a blank",
            format!("GET / HTTP/1.1\r\nHost: {HOST},other.test\r\n\r\n"),
            "400",
        ),
        ("a port beyond 65535", format!("GET / HTTP/1.1\r\nHost: {HOST}:65536\r\n\r\n"), "400"),
        ("a port that is none", format!("GET / HTTP/1.1\r\nHost: {HOST}:+80\r\n\r\n"), "400"),
        (
            "a target without a path",
            format!("GET {HOST}:443 HTTP/1.1\r\nHost: {HOST}\r\n\r\n{SECOND}"),
            "400",
        ),
        ("all of the server", format!("GET * HTTP/1.1\r\nHost: {HOST}\r\n\r\n{SECOND}"), "400"),
        ("another scheme", format!("GET ftp://{HOST}/ HTTP/1.1\r\nHost: {HOST}\r\n\r\n{SECOND}"), "400"),
        (
            "a request through us",
            format!("CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}\r\n\r\n{SECOND}"),
            "405",
        ),
    ];
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let mut problems = Vec::new();
        for (what, bytes, status) in &rows {
            let said = rest(&scene, bytes.as_bytes());
            let first = said.lines().next().unwrap_or_default();
            if !first.starts_with(&format!("HTTP/1.1 {status}")) {
                problems.push(format!("{what}: {first:?} instead of {status}"));
            }
            if said.matches("HTTP/1.1 ").count() > 1 {
                problems.push(format!("{what}: {said}"));
            }
        }
        assert_eq!(problems, [""; 0]);
        assert_eq!(scene.seen(), []);
        // RFC 9110 section 15.5.6.
        let said = rest(&scene, format!("CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes());
        assert!(said.to_lowercase().contains("\r\nallow: get, head, post, "), "{said}");
    }
}

/// What a client may do, though few do: it is passed on in one form that nobody takes for two.
#[test]
fn what_is_unusual_is_passed_on_in_the_usual_form() {
    let rows = [
        ("line feeds alone", format!("GET /1 HTTP/1.1\nHost: {HOST}\nX: 1\n\n"), "/1", ""),
        ("empty lines before", format!("\r\n\r\nGET /2 HTTP/1.1\r\nHost: {HOST}\r\n\r\n"), "/2", ""),
        (
            "a length beside chunks",
            format!(
                "POST /3 HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
            ),
            "/3",
            "abc",
        ),
        (
            "extensions of chunks",
            format!(
                "POST /4 HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: Chunked\r\n\r\n3;a=b\r\nabc\r\n0;c\r\n\r\n"
            ),
            "/4",
            "abc",
        ),
        (
            "the same length twice",
            format!("POST /5 HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc"),
            "/5",
            "abc",
        ),
        (
            "another host in the target",
            format!("GET https://{HOST}/6 HTTP/1.1\r\nHost: other.test\r\n\r\n"),
            "/6",
            "",
        ),
        ("HTTP/1.0 with a host", format!("GET /7 HTTP/1.0\r\nHost: {HOST}\r\n\r\n"), "/7", ""),
    ];
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        for (what, bytes, path, body) in &rows {
            let said = rest(&scene, bytes.as_bytes());
            assert!(said.lines().next().is_some_and(|line| line.contains(" 200")), "{what}: {said}");
            let seen: Vec<_> = scene.seen().into_iter().filter(|one| one.uri.ends_with(path)).collect();
            let [seen] = seen.as_slice() else { panic!("{what}: {seen:?}") };
            assert_eq!(seen.body, *body, "{what}");
            assert!(
                !(seen.headers.contains_key("content-length")
                    && seen.headers.contains_key("transfer-encoding"))
            );
            assert_eq!(seen.header("x-forwarded-host"), Some(HOST), "{what}: {seen:?}");
            let host = seen.header("host").unwrap_or(HOST);
            assert_eq!(host, HOST, "{what}: {seen:?}");
        }
        assert_eq!(scene.seen().len(), rows.len());
        // `*` is no path.
        let said = rest(&scene, format!("OPTIONS * HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes());
        assert!(said.contains(" 200"), "{said}");
        assert!(
            scene.seen().iter().any(|one| one.method == "OPTIONS" && one.uri.ends_with('*')),
            "{:?}",
            scene.seen()
        );
    }
}

#[test]
fn http2_cannot_carry_what_http1_would_take_for_more() {
    let malformed = &[End::Reset(PROTOCOL_ERROR), End::Status(400)][..];
    let usual = |more: &[(&str, &str)]| request("GET", "/", more);
    let host = (":authority", HOST);
    let (get, https, path) = ((":method", "GET"), (":scheme", "https"), (":path", "/"));
    let rows: Vec<(&str, Vec<u8>, &[End])> = vec![
        ("transfer-encoding", usual(&[("transfer-encoding", "chunked")]), malformed),
        ("connection", usual(&[("connection", "x-a")]), malformed),
        ("keep-alive", usual(&[("keep-alive", "timeout=5")]), malformed),
        ("proxy-connection", usual(&[("proxy-connection", "x")]), malformed),
        ("upgrade", usual(&[("upgrade", "h2c")]), malformed),
        ("te that is not trailers", usual(&[("te", "gzip")]), malformed),
        ("a length without a body", usual(&[("content-length", "3")]), malformed),
        ("two lengths", usual(&[("content-length", "0"), ("content-length", "3")]), malformed),
        ("a length that is none", usual(&[("content-length", "x")]), malformed),
        ("another host", usual(&[("host", "other.test")]), malformed),
        ("two hosts", usual(&[("host", HOST), ("host", HOST)]), malformed),
        ("another scheme", block(&[get, (":scheme", "ftp"), path, host]), malformed),
        ("all of the server", request("GET", "*", &[]), malformed),
        ("a port beyond 65535", block(&[get, https, path, (":authority", "service.test:65536")]), malformed),
        ("a list of hosts", block(&[get, https, path, (":authority", "service.test,other.test")]), malformed),
        ("a blank in the path", request("GET", "/a b", &[]), malformed),
        ("CR and LF in the path", request("GET", "/ HTTP/1.1\r\nX: y", &[]), malformed),
        ("NUL in the path", request("GET", "/a\0", &[]), malformed),
        ("no path", block(&[get, https, host]), malformed),
        ("an empty path", request("GET", "", &[]), malformed),
        ("a path without a slash", request("GET", "a", &[]), malformed),
        ("two paths", usual(&[(":path", "/b")]), malformed),
        ("no method", block(&[https, host, path]), malformed),
        ("CR and LF in the method", request("GET / HTTP/1.1\r\nX: y\r\n\r\nGET", "/", &[]), malformed),
        ("no scheme", block(&[get, host, path]), malformed),
        ("a field of ours that nobody knows", usual(&[(":other", "x")]), malformed),
        ("a response's field", usual(&[(":status", "200")]), malformed),
        ("a field of the frame after others", block(&[get, https, ("a", "b"), path, host]), malformed),
        ("upper case", usual(&[("X-Upper", "x")]), malformed),
        ("a blank in a name", usual(&[("x a", "x")]), malformed),
        ("CR and LF in a name", usual(&[("x\r\ny", "x")]), malformed),
        ("a colon in a name", usual(&[("x:y", "x")]), malformed),
        ("an empty name", usual(&[("", "x")]), malformed),
        ("CR and LF in a value", usual(&[("x", "a\r\nb: c")]), malformed),
        ("LF in a value", usual(&[("x", "a\nb")]), malformed),
        ("NUL in a value", usual(&[("x", "a\0b")]), malformed),
        (
            "a user in the authority",
            block(&[get, https, path, (":authority", "user@service.test")]),
            malformed,
        ),
        ("CR and LF in the authority", block(&[get, https, path, (":authority", "a\r\nb: c")]), malformed),
        ("neither authority nor host", block(&[get, https, path]), malformed),
        (
            "a request through us",
            block(&[(":method", "CONNECT"), host]),
            &[End::Status(405), End::Reset(PROTOCOL_ERROR)],
        ),
        (
            "a protocol that was not offered",
            block(&[(":method", "CONNECT"), (":protocol", "websocket"), https, path, host]),
            malformed,
        ),
        ("too long a header", usual(&[("x", &"y".repeat(80 << 10))]), &[End::Status(431)]),
    ];
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let mut problems = Vec::new();
        for (what, block, allowed) in &rows {
            let mut frames = Frames::open(&scene);
            frames.whole(1, block);
            let end = frames.end(1);
            // Of what is malformed it may also be the connection that ends (RFC 9113 section 8.1.1).
            let also =
                matches!(end, End::Goaway(PROTOCOL_ERROR | COMPRESSION_ERROR)) && *allowed == malformed;
            if !allowed.contains(&end) && !also {
                problems.push(format!("{what}: {end:?}"));
            }
        }
        // Bodies of another length than was said.
        for (what, length, body) in
            [("a longer body", "3", &b"abcGET /second"[..]), ("a shorter body", "5", b"abc")]
        {
            let mut frames = Frames::open(&scene);
            frames.send(HEADERS, END_HEADERS, 1, &request("POST", "/", &[("content-length", length)]));
            frames.send(DATA, END_STREAM, 1, body);
            let end = frames.end(1);
            if !malformed.contains(&end) {
                problems.push(format!("{what}: {end:?}"));
            }
        }
        assert_eq!(problems, [""; 0]);
        assert_eq!(scene.seen(), [], "nothing of that reached a backend whole");
        let mut frames = Frames::open(&scene);
        frames.send(HEADERS, WHOLE, 1, &request("GET", "/", &[]));
        assert_eq!(frames.end(1), End::Status(200));
    }
}

/// Browsers send each cookie in a field of its own over HTTP/2 (RFC 9113 section 8.2.3).
#[test]
fn cookies_in_pieces_are_put_together() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let mut frames = Frames::open(&scene);
        frames.ask(1, &[("cookie", "a=1"), ("cookie", "sid=mine"), ("cookie", "b=2")]);
        assert_eq!(frames.end(1), End::Status(200));
        let seen = scene.seen().pop().expect("one");
        assert_eq!(seen.headers["cookie"].join("; "), "a=1; sid=mine; b=2");
        if manner.alpn == Manner::HTTP1.alpn {
            assert_eq!(seen.headers["cookie"].len(), 1, "{seen:?}");
        }
        assert_eq!(scene.sessions().len(), 1, "and its session is known");
    }
    let scene = Scene::mirrors(Manner::HTTP1, &[COOKIE]);
    let text = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: a=1\r\nCookie: sid=mine\r\n\r\n");
    assert!(say(&mut scene.connect(Family::V4, 0), &text).expect("an answer").0.contains("200"));
}
