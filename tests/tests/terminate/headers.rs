//! What backends learn of a client, and what stays between two hops.

use anyhow::Result;
use dispatcher_tests::{tls::HOST, topology::Family};

use crate::{
    frames::{END_HEADERS, END_STREAM, End, Frames, HEADERS, request},
    mirror::{Manner, Seen},
    scene::{COOKIE, Scene, say},
};

/// What a client says of itself, in vain.
const LIES: [&str; 10] = [
    "X-Forwarded-For: 192.0.2.66",
    "x-forwarded-for: 192.0.2.67",
    "X-Forwarded-Proto: http",
    "X-Forwarded-Host: lie.test",
    "Forwarded: for=192.0.2.66",
    "X-Request-Id: lie",
    "x_forwarded_for: 192.0.2.66",
    "X-Forwarded_Proto: http",
    "X_Request_ID: lie",
    "X-Other: kept",
];

fn visit(scene: &Scene, family: Family, arguments: &[&str], path: &str) -> Result<(String, Seen)> {
    let from = scene.topology.client(family, 1).to_string();
    let all = [&["-D", "-", "--interface", &from], arguments].concat();
    let answer = scene.curl("jar", family, &all, path)?;
    // One head after another if there was a 100.
    let at = answer.rfind("\r\n\r\n").unwrap_or_default();
    Ok((answer[..at].to_lowercase(), serde_json::from_str(answer[at..].trim())?))
}

#[test]
fn backends_learn_who_asks_and_believe_no_client() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        for version in ["--http1.1", "--http2"] {
            for family in Family::BOTH {
                let mut arguments = vec![version];
                LIES.iter().for_each(|line| arguments.extend(["-H", line]));
                let (head, seen) = visit(&scene, family, &arguments, "/a?b=c").expect("an answer");
                let from = scene.topology.client(family, 1);
                assert_eq!(seen.header("x-forwarded-for"), Some(from.to_string().as_str()), "{seen:?}");
                assert_eq!(seen.header("x-forwarded-proto"), Some("https"));
                let host = seen.header("x-forwarded-host").unwrap_or_default();
                assert!(host == HOST || host == format!("{HOST}:443"), "{host}");
                let node = if from.is_ipv6() { format!("\"[{from}]\"") } else { from.to_string() };
                let told = format!("for={node};host=\"{host}\";proto=https");
                assert_eq!(seen.header("forwarded"), Some(told.as_str()));
                let id = seen.header("x-request-id").unwrap_or_default();
                assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
                assert_eq!(seen.header("x-other"), Some("kept"));
                assert!(!seen.headers.keys().any(|name| name.contains('_')), "{seen:?}");
                assert!(seen.uri.ends_with("/a?b=c"), "{seen:?}");
                assert!(head.contains(" 200"), "{head}");
            }
        }
    }
}

#[test]
fn what_is_for_one_hop_goes_no_further() {
    for manner in [Manner::HTTP1, Manner::HTTP2] {
        let scene = Scene::mirrors(manner, &[COOKIE]);
        let lines = [
            "Connection: x-secret, te",
            "X-Secret: 1",
            "Keep-Alive: timeout=7",
            "Proxy-Connection: keep-alive",
            "TE: gzip",
            "X-Other: kept",
        ];
        let mut arguments = vec!["--http1.1"];
        lines.iter().for_each(|line| arguments.extend(["-H", line]));
        let (_, seen) = visit(&scene, Family::V4, &arguments, "/").expect("an answer");
        for name in ["x-secret", "keep-alive", "proxy-connection", "te", "connection"] {
            assert_eq!(seen.headers.get(name), None, "{name}: {seen:?}");
        }
        assert_eq!(seen.header("x-other"), Some("kept"));
        for version in ["--http1.1", "--http2"] {
            let (head, _) = visit(&scene, Family::V6, &[version], "/hop").expect("an answer");
            for name in ["x-named", "keep-alive", "proxy-connection"] {
                // HTTP/2 has no `Connection` that could name it.
                let named = name != "x-named" || manner.alpn == Manner::HTTP1.alpn;
                assert!(!named || !head.contains(name), "{name}: {head}");
            }
            assert!(head.contains("x-kept: x"), "{head}");
        }
    }
}

/// What would make a backend read all that follows as HTTP/2, past us.
#[test]
fn nobody_switches_to_http2_in_clear() {
    let scene = Scene::mirrors(Manner::HTTP1, &[COOKIE]);
    for upgrade in ["h2c", "H2C", "websocket, h2c", "h2c\r\nUpgrade: websocket"] {
        for options in ["Upgrade, HTTP2-Settings", "Upgrade"] {
            let text = format!(
                "GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: {options}\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
            );
            let (status, _) = say(&mut scene.connect(Family::V4, 0), &text).expect("an answer");
            assert!(status.contains("200"), "{status}");
            for (seen, name) in
                scene.seen().iter().flat_map(|seen| ["upgrade", "http2-settings"].map(|name| (seen, name)))
            {
                assert_eq!(seen.headers.get(name), None, "{name} of {upgrade}: {seen:?}");
            }
        }
    }
}

#[test]
fn clients_that_take_trailers_are_said_to() {
    // As clients of gRPC do, and their servers want to see.
    let scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    for (value, found) in
        [("trailers", Some("trailers")), ("gzip, trailers;q=0.5", Some("trailers")), ("gzip", None)]
    {
        let line = format!("TE: {value}");
        let (_, seen) = visit(&scene, Family::V4, &["--http1.1", "-H", &line, "-H", "Connection: te"], "/")
            .expect("an answer");
        assert_eq!(seen.header("te"), found, "{value}");
    }
    let mut frames = Frames::open(&scene);
    frames.send(HEADERS, END_STREAM | END_HEADERS, 1, &request("GET", "/grpc", &[("te", "trailers")]));
    assert_eq!(frames.end(1), End::Status(200));
    let seen = scene.seen().into_iter().find(|seen| seen.uri.ends_with("/grpc")).expect("it came");
    assert_eq!(seen.header("te"), Some("trailers"));
}
