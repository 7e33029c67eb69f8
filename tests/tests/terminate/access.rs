//! The access log.

use std::{io::Write as _, path::Path};

use dispatcher_tests::{daemon::Folder, tls::HOST, topology::Family, town::until};
use serde_json::Value;

use crate::{
    mirror::Manner,
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
        (400, false, "the client left"),
        (400, true, "the request's body cannot be read"),
        (408, true, "nothing more of the request's body came within 1 s"),
    ];
    for (found, (status, complete, error)) in found.iter().zip(expected) {
        assert_eq!(*found, (Some(status), Some(complete), error.into()));
    }
}
