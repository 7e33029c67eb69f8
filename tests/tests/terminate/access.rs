//! The access log.

use std::{io::Write as _, path::Path};

use dispatcher_tests::{daemon::Folder, tls::HOST, topology::Family, town::until};
use serde_json::Value;

use crate::{
    bodies::prepared,
    mirror::{Answers, Manner},
    scene::{COOKIE, Scene, say},
};

pub(crate) fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn each_request_has_a_line() {
    let folder = Folder::new().expect("a folder");
    let path = folder.path().join("access.jsonl");
    let log = format!("terminate.access_log = \"{}\"", path.display());
    let scene = Scene::new(true, &[COOKIE, &log]);
    let home = scene.visit("jar", Family::V4, &["--http2"], "/login?token=secret-of-the-query").backend;
    let _ = scene.visit("jar", Family::V6, &["--http1.1"], "/");
    let absent =
        scene.curl("jar", Family::V4, &["--http1.1", "-X", "CONNECT", "--request-target", "a:1"], "/");
    assert!(absent.is_ok_and(|text| text.starts_with("405")), "refused");
    until("three lines", || lines(&path).len() >= 3);
    let all = lines(&path);
    assert_eq!(all.len(), 3, "{all:#?}");
    let session = scene.sessions().into_iter().next().expect("a session");
    for (line, path, version, network) in
        [(&all[0], "/login", "2", "10.1.0."), (&all[1], "/", "1.1", "2001:db8:1::")]
    {
        assert!(line["client"].as_str().is_some_and(|client| client.starts_with(network)), "{line:#}");
        for (key, value) in [
            ("service", Value::from("shop")),
            ("method", "GET".into()),
            ("path", path.into()),
            ("version", version.into()),
            ("status", 200.into()),
            ("backend", home.as_str().into()),
            ("tunnel", session.tunnel.into()),
            ("tries", 1.into()),
            ("complete", true.into()),
        ] {
            assert_eq!(line[key], value, "{key} of {line:#}");
        }
        assert!(line["sent_bytes"].as_u64().is_some_and(|sent| sent > 50), "{line:#}");
        assert!(line["ms"].as_f64() >= line["head_ms"].as_f64(), "{line:#}");
        assert_eq!(line["request_id"].as_str().map(str::len), Some(32), "{line:#}");
        assert!(
            line["time"].as_str().is_some_and(|time| time.ends_with('Z') && time.len() >= 20),
            "{line:#}"
        );
    }
    assert_eq!((&all[2]["status"], &all[2]["backend"]), (&405.into(), &Value::Null));
    assert_eq!((&all[2]["error"], &all[0]["error"]), (&"CONNECT is not served here".into(), &Value::Null));
    assert_eq!((&all[0]["class"], &all[0]["queued_ms"]), (&Value::Null, &Value::Null), "nobody waits here");
    // Neither queries nor cookies.
    let text = std::fs::read_to_string(&path).expect("a file");
    assert!(!text.contains("secret-of-the-query") && !text.contains("sid="), "{text}");
    // As logrotate does it.
    let old = folder.path().join("access.jsonl.1");
    std::fs::rename(&path, &old).expect("moved");
    scene.daemon.told(&["reload"]).expect("a reload");
    let _ = scene.visit("jar", Family::V4, &[], "/after");
    until("the new file has it", || lines(&path).len() == 1);
    assert_eq!((lines(&path)[0]["path"].as_str(), lines(&old).len()), (Some("/after"), 3));
}

#[test]
fn uploads_that_break_off_are_told_apart() {
    let folder = Folder::new().expect("a folder");
    let path = folder.path().join("access.jsonl");
    let log = format!("terminate.access_log = \"{}\"", path.display());
    let scene = Scene::mirrors(Manner::HTTP1, &[COOKIE, &log, "terminate.response_timeout = \"1s\""]);
    let head = format!("POST / HTTP/1.1\r\nHost: {HOST}\r\n");
    // Who is gone gets no answer.
    let mut line = scene.connect(Family::V4, 0);
    write!(line, "{head}Content-Length: 10\r\n\r\nabc").expect("sent");
    line.flush().expect("sent");
    until("it is under way", || scene.tunnels().iter().any(|one| one.in_flight == 1));
    drop(line);
    until("a line", || lines(&path).len() == 1);
    // Who says nothing that can be read, and who says nothing more, do.
    for (rest, status) in
        [("Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef", "400"), ("Content-Length: 10\r\n\r\nabc", "408")]
    {
        let (said, body) =
            say(&mut scene.connect(Family::V4, 0), &format!("{head}{rest}")).expect("an answer");
        assert!(said.contains(status), "{said}: {body}");
    }
    until("three lines", || lines(&path).len() == 3);
    let found: Vec<_> = lines(&path)
        .into_iter()
        .map(|line| (line["status"].as_u64(), line["complete"].as_bool(), line["error"].clone()))
        .collect();
    let expected = [
        (499, false, "the client left before the answer"),
        (400, true, "the request's body cannot be read"),
        (408, true, "nothing more of the request's body came within 1 s"),
    ];
    for (found, (status, complete, error)) in found.iter().zip(expected) {
        assert_eq!(*found, (Some(status), Some(complete), error.into()));
    }
}

/// Status, whether it was complete, and the error, of the only line.
fn only(path: &Path) -> (u64, bool, Option<String>) {
    until("a line", || !lines(path).is_empty());
    let line = lines(path).pop().expect("a line");
    std::fs::write(path, "").expect("emptied");
    let status = line["status"].as_u64().expect("a status");
    (status, line["complete"] == true, line["error"].as_str().map(str::to_owned))
}

#[test]
fn how_an_answer_ended_is_told() {
    const ANSWERS: Answers = &[
        (
            false,
            b"HTTP/1.1 200 OK\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n",
        ),
        (true, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nonly this"),
        (false, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nonly this"),
        (true, b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
    ];
    let folder = Folder::new().expect("a folder");
    let path = folder.path().join("access.jsonl");
    let log = format!("terminate.access_log = \"{}\"", path.display());
    let limits = ["terminate.response_timeout = \"1s\"", "terminate.idle_timeout = \"30s\""];
    let scene = prepared(ANSWERS, &[&[log.as_str()], &limits[..]].concat());
    for version in ["--http1.1", "--http2"] {
        let ask = |number: &str| drop(scene.curl("jar", Family::V4, &[version], number));
        ask("/0");
        assert_eq!(only(&path), (200, true, None), "{version}");
        for (number, status, why) in [
            ("/1", 200, "the backend's answer broke off: "),
            ("/2", 200, "the backend sent nothing for too long"),
            ("/3", 502, "the backend's answer cannot be read: "),
        ] {
            ask(number);
            let (found, complete, error) = only(&path);
            assert_eq!((found, complete), (status, status == 502), "{number}");
            assert!(error.as_ref().is_some_and(|error| error.starts_with(why)), "{number}: {error:?}");
        }
    }
    // What breaks one backend is not sent to the next.
    scene.curl("jar", Family::V4, &[], "/3").expect("an answer");
    until("a line", || !lines(&path).is_empty());
    assert_eq!(lines(&path)[0]["tries"], 1);
}

#[test]
fn clients_that_leave_are_told() {
    let folder = Folder::new().expect("a folder");
    let path = folder.path().join("access.jsonl");
    let log = format!("terminate.access_log = \"{}\"", path.display());
    let scene = Scene::mirrors(Manner::HTTP2, &[COOKIE, &log]);
    for version in ["--http1.1", "--http2"] {
        for (url, status, why) in [
            ("/slow/5000", 499, "the client left before the answer"),
            ("/bytes/1000000000000", 200, "the client left"),
        ] {
            let left = scene.curl("jar", Family::V4, &[version, "-o", "/dev/null", "-m", "1"], url);
            left.expect_err("it takes too long");
            assert_eq!(only(&path), (status, false, Some(why.to_owned())), "{version} {url}");
        }
        // What has no body is complete.
        scene.curl("jar", Family::V4, &[version, "-I"], "/").expect("an answer");
        assert_eq!(only(&path), (200, true, None), "{version}");
    }
}
