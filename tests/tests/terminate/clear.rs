//! Requests in clear to a service that ends TLS, and which of them are secure all the same.

use dispatcher_tests::{
    tls::{HOST, Identity},
    topology::Family,
};

use crate::scene::{COOKIE, Scene};

const CLEAR: &str = "clear = { vip = [\"192.0.2.10:80\", \"[2001:db8:10::1]:80\"], secure = [\
    { paths = [\"/account/*\"] }, { methods = [\"POST\", \"PUT\"], session = true } ] }";

/// Asks in clear; who answers, and how he was asked.
fn ask(scene: &Scene, jar: &str, family: Family, arguments: &[&str], path: &str) -> Identity {
    let vip = match family {
        Family::V4 => family.vip().to_string(),
        Family::V6 => format!("[{}]", family.vip()),
    };
    let jar = scene.folder.path().join(jar).to_string_lossy().into_owned();
    let (to, url) = (format!("{HOST}:80:{vip}"), format!("http://{HOST}{path}"));
    let mut all = vec!["-sS", "--max-time", "10", "--path-as-is", "-b", &jar, "-c", &jar, "--resolve", &to];
    all.extend(arguments);
    all.push(&url);
    let answer = scene.topology.clients.execute("curl", &all).unwrap_or_else(|error| panic!("{error:#}"));
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// The number of the tunnel that a request came through, or none.
fn tunnel(scene: &Scene, seen: &Identity) -> Option<u32> {
    let port: u16 = seen.peer.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
    let tunnels = scene.tunnels();
    let found = tunnels.iter().find(|one| one.source.port() == port && one.backend == seen.backend);
    assert_eq!(found.is_some(), !seen.protocol.is_empty(), "{seen:?} {tunnels:?}");
    found.map(|one| one.id)
}

#[test]
fn claim_c10_c13_what_is_declared_secure_goes_through_the_tunnel() {
    let clear = CLEAR
        .replace("192.0.2.10", &Family::V4.vip().to_string())
        .replace("2001:db8:10::1", &Family::V6.vip().to_string());
    let scene = Scene::new(true, &[COOKIE, &clear]);
    for (number, family) in Family::BOTH.into_iter().enumerate() {
        // A session that came to be over TLS.
        let jar = format!("jar{number}");
        let home = scene.visit(&jar, family, &[], "/login").backend;
        let session = scene.sessions().into_iter().find(|one| one.backend == home).expect("a session");
        assert_ne!(session.tunnel, 0);
        for (arguments, path, secure) in [
            (&[][..], "/", false),
            (&["-d", "order=1"], "/", true),
            (&["-X", "PUT"], "/", true),
            (&["-X", "DELETE"], "/", false),
            (&[], "/account/1", true),
            (&[], "/%61ccount/1", true),
            (&[], "/x/..//account/1", true),
            (&[], "/account;jsessionid=1/1", true),
            (&[], "/Account/1", true),
            (&[], "/x/..%5Caccount/1", true),
            (&[], "/accounts", false),
            (&["--http2-prior-knowledge"], "/", false),
            (&["--http2-prior-knowledge"], "/account/1", true),
        ] {
            let seen = ask(&scene, &jar, family, arguments, path);
            // C13: by path, by method, and by the cookie that the server set; C10: others not.
            assert_eq!(seen.protocol, if secure { "TLSv1.3" } else { "" }, "{arguments:?} {path}: {seen:?}");
            assert_eq!(tunnel(&scene, &seen).is_some(), secure, "{arguments:?} {path}");
            // Both ways lead to the session's server.
            assert_eq!(seen.backend, home, "{arguments:?} {path}");
        }
        // Without a session, methods alone are no reason here, but paths are.
        let stranger = format!("stranger{number}");
        assert_eq!(ask(&scene, &stranger, family, &["-d", "order=1"], "/").protocol, "");
        assert_eq!(ask(&scene, &stranger, family, &[], "/account/").protocol, "TLSv1.3");
        // What a server sets in clear is a session too, and leads home over TLS.
        let other = format!("other{number}");
        let home = ask(&scene, &other, family, &[], "/login").backend;
        for _ in 0..3 {
            assert_eq!(scene.visit(&other, family, &[], "/").backend, home);
            assert_eq!(ask(&scene, &other, family, &[], "/").backend, home);
        }
    }
    // What went in clear took no session's tunnel away.
    let sessions = scene.sessions();
    assert_eq!(
        (sessions.len(), sessions.iter().filter(|one| one.tunnel != 0).count()),
        (4, 4),
        "{sessions:?}"
    );
    let metrics = scene.daemon.told(&["metrics"]).expect("metrics");
    let count = |way: &str| {
        let start = format!("dispatcher_requests_total{{service=\"shop\",way=\"{way}\",code=\"2xx\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
        line.and_then(|count| count.parse::<u64>().ok()).unwrap_or_else(|| panic!("{metrics}"))
    };
    assert_eq!((count("clear"), count("tunnel")), (2 * (4 + 1 + 1 + 3), 2 * (1 + 9 + 1 + 3)));
}
