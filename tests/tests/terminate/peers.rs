//! Backends and clients that are not ours, and backends that do not please.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::Permissions,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use dispatcher_tests::{
    daemon::{Daemon, Folder, Process},
    netns::Netns,
    tls::{Authority, HOST, Identity, Manners, Server},
    topology::Family,
    town::until,
};

use crate::{
    mirror::{Manner, Mirror},
    scene::{COOKIE, ESTABLISHED, PORT, Scene, Servers},
};

/// Port behind stunnel.
const BEHIND: u16 = 8080;

/// A program that unwraps TLS, or speaks HTTP itself.
struct Program {
    _process: Process,
    _folder: Folder,
}

fn program(
    netns: &Netns,
    authority: &Authority,
    name: &str,
    command: &str,
    text: impl FnOnce(&Path) -> String,
) -> Result<Program> {
    let folder = Folder::new()?;
    let own = authority.issue(name)?;
    folder.write("both.pem", &format!("{}{}", own.certificate_pem, own.key_pem))?;
    let config = folder.write("config", &text(folder.path()))?;
    let mut all = command.split(' ');
    let mut command = netns.command(all.next().unwrap_or_default());
    command.args(all).arg(&config);
    let mut process = Process::start(command, None)?;
    process.listens(netns, SocketAddr::from(([127, 0, 0, 1], PORT))).context(name.to_owned())?;
    Ok(Program { _process: process, _folder: folder })
}

fn stunnel(netns: &Netns, authority: &Authority) -> Result<Program> {
    program(netns, authority, "stunnel", "stunnel4", |folder| {
        format!(
            "foreground = yes\npid =\ndebug = err\nsocket = l:TCP_NODELAY=1\n[tls]\naccept = :::{PORT}\n\
             connect = 127.0.0.1:{BEHIND}\ncert = {}/both.pem\n",
            folder.display()
        )
    })
}

fn haproxy(netns: &Netns, authority: &Authority, name: &str, options: &str) -> Result<Program> {
    program(netns, authority, name, "haproxy -db -f", |folder| {
        let identity = format!(
            r#"{{\"backend\":\"{name}\",\"reused\":\".\",\"protocol\":\"%[ssl_fc_protocol]\",\"peer\":\"%ci:%cp\",\"proxied\":\"\"}}"#
        );
        format!(
            "defaults\n mode http\n timeout client 30s\nfrontend tls\n bind :::{PORT} v4v6 ssl crt {}/both.pem {options}\n \
             http-request return status 200 content-type application/json lf-string \"{identity}\"\n",
            folder.display()
        )
    })
}

#[test]
fn stunnel_and_haproxy_are_backends() {
    let scene = Scene::before(&[COOKIE, "balance = \"weighted-round-robin\""], |topology, authority| {
        let [one, two, three] = topology.backends.as_slice() else { panic!("three places") };
        let behind = Server::start(&one.netns, "stunnel", BEHIND, authority, Manners::default())?;
        Ok(Servers::Others(vec![
            Box::new(behind),
            Box::new(stunnel(&one.netns, authority)?),
            Box::new(haproxy(&two.netns, authority, "haproxy", "alpn h2,http/1.1")?),
            Box::new(haproxy(&three.netns, authority, "old", "alpn http/1.1 ssl-max-ver TLSv1.2")?),
        ]))
    });
    let scene = scene.unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
    until("tunnels are established", || scene.tunnels().len() == 3 * ESTABLISHED);
    let kinds: BTreeSet<_> = scene
        .tunnels()
        .into_iter()
        .map(|one| (one.backend, one.version, one.alpn.unwrap_or_default()))
        .collect();
    let kind =
        |backend: &str, version: &str, alpn: &str| (backend.to_owned(), version.to_owned(), alpn.to_owned());
    let wanted = [kind("b1", "TLSv1_3", ""), kind("b2", "TLSv1_3", "h2"), kind("b3", "TLSv1_2", "http/1.1")];
    assert_eq!(kinds, BTreeSet::from(wanted));
    let mut homes = BTreeSet::new();
    for number in 0..24 {
        let cookie = format!("Cookie: sid=user{number}");
        let version = ["--http1.1", "--http2"][number % 2];
        let ask =
            || scene.visit("none", Family::BOTH[number / 2 % 2], &[version, "-H", &cookie], "/").backend;
        let home = ask();
        assert!((0..3).all(|_| ask() == home), "{home}");
        homes.insert(home);
    }
    assert_eq!(homes.len(), 3, "{homes:?}");
}

/// The reason that is shown for each backend, by its name.
fn reasons(scene: &Scene) -> BTreeMap<String, String> {
    until("all attempts fail", || scene.tunnel_backends().iter().all(|one| one.error.is_some()));
    scene.tunnel_backends().into_iter().map(|one| (one.backend, one.error.unwrap_or_default())).collect()
}

#[test]
fn certificates_that_do_not_hold_are_refused_with_the_reason() {
    // It has the name of the scene's, but not its key.
    let other = Authority::new().expect("an authority");
    let scene = Scene::before(&[COOKIE], |topology, authority| {
        let certificates = [
            authority.issue_for("b1", HOST, true)?,
            authority.issue_for("b2", "other.test", false)?,
            other.issue("b3")?,
        ];
        let all = topology.backends.iter().zip(&certificates);
        let all = all.map(|(place, own)| Mirror::with(&place.netns, "", PORT, own, Manner::HTTP2));
        Ok(Servers::Mirrors(all.collect::<Result<_>>()?))
    });
    let scene = scene.unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
    let reasons = reasons(&scene);
    for (backend, word) in [("b1", "expired"), ("b2", "other.test"), ("b3", "BadSignature")] {
        assert!(reasons[backend].contains(word), "{word}: {reasons:?}");
    }
    assert!(scene.tunnels().is_empty());
}

#[test]
fn backends_that_ask_who_we_are_are_told() {
    let ours = Authority::new().expect("an authority");
    let folder = Folder::new().expect("a folder");
    let own = ours.issue("dispatcher").expect("a certificate");
    let certificate = folder.write("own.pem", &own.certificate_pem).expect("written");
    let key = folder.write("own.key", &own.key_pem).expect("written");
    for only_tls12 in [false, true] {
        let scene = |lines: &[&str]| {
            let scene = Scene::before(lines, |topology, authority| {
                let manner = Manner { only_tls12, asks: Some(&ours), ..Manner::HTTP2 };
                let all = topology.backends.iter();
                let all = all.map(|place| Mirror::start(&place.netns, "b", PORT, authority, manner));
                Ok(Servers::Mirrors(all.collect::<Result<_>>()?))
            });
            scene.unwrap_or_else(|error| panic!("setting the scene: {error:#}"))
        };
        let lines = [
            format!("tunnels.certificate = \"{}\"", certificate.display()),
            format!("tunnels.key = \"{}\"", key.display()),
        ];
        let good = scene(&[COOKIE, &lines[0], &lines[1]]);
        until("tunnels are established", || good.tunnels().len() == 3 * ESTABLISHED);
        let answer = good.curl("jar", Family::V4, &[], "/").expect("an answer");
        assert!(answer.contains("\"backend\":\"b\""), "{answer}");
        drop(good);
        for reason in reasons(&scene(&[COOKIE])).into_values() {
            // TLS 1.2 has no alert for that.
            let word = if only_tls12 { "HandshakeFailure" } else { "CertificateRequired" };
            assert!(reason.contains(word) || reason.contains("CertificateRequired"), "{word}: {reason}");
        }
    }
}

#[test]
fn old_tls_is_refused_where_that_is_said() {
    let scene = Scene::before(&[COOKIE, "tunnels.min_version = \"1.3\""], |topology, authority| {
        let manner = Manner { only_tls12: true, ..Manner::HTTP2 };
        let all =
            topology.backends.iter().map(|place| Mirror::start(&place.netns, "b", PORT, authority, manner));
        Ok(Servers::Mirrors(all.collect::<Result<_>>()?))
    });
    let scene = scene.unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
    for reason in reasons(&scene).into_values() {
        assert!(reason.contains("ProtocolVersion"), "{reason}");
    }
}

/// A daemon on a machine that trusts what is in this file.
fn start(scene: &Scene, text: &str, roots: &Path) -> Result<Daemon> {
    let script = format!(
        "#!/bin/sh\nunset SSL_CERT_DIR\nSSL_CERT_FILE={} exec {} \"$@\"\n",
        roots.display(),
        dispatcher_tests::daemon::program("dispatcherd")?.display()
    );
    let script = scene.folder.write("start", &script)?;
    std::fs::set_permissions(&script, Permissions::from_mode(0o700))?;
    Daemon::start_program(&script, &scene.topology.dispatcher, text)
}

#[test]
fn without_roots_what_the_machine_trusts_is_trusted() {
    let mut scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    let roots = scene.folder.path().join("roots.pem");
    let line = format!("tunnels.roots = \"{}\"\n", roots.display());
    let text = scene.text.replace(&line, "");
    assert_ne!(text, scene.text);
    scene.daemon.stop().expect("it ends");
    scene.daemon = start(&scene, &text, &roots).expect("it starts");
    until("tunnels are established", || scene.tunnels().len() == 3 * ESTABLISHED);
    scene.daemon.stop().expect("it ends");
    let nothing = scene.folder.write("nothing.pem", "").expect("written");
    let refused = start(&scene, &text, &nothing);
    let said = format!("{:#}", refused.expect_err("it does not start"));
    for part in ["trusts no certificates", "service.tunnels.roots"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn backends_may_have_ipv6_only() {
    let mut scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    let mut text = scene.text.clone();
    for place in &scene.topology.backends {
        let [v4, v6] = Family::BOTH.map(|family| place.address(family));
        text = text.replace(&format!("\"{v4}:{PORT}\", \"[{v6}]:{PORT}\""), &format!("\"[{v6}]:{PORT}\""));
    }
    assert_ne!(text, scene.text);
    scene.daemon.stop().expect("it ends");
    scene.daemon = Daemon::start_with(&scene.topology.dispatcher, &text).expect("it starts");
    until("tunnels are established", || scene.tunnels().len() == 3 * ESTABLISHED);
    assert!(scene.tunnels().iter().all(|one| one.destination.is_ipv6() && one.source.is_ipv6()));
    for family in Family::BOTH {
        let answer = scene.curl("jar", family, &[], "/").expect("an answer");
        assert!(answer.contains("\"backend\":\"b"), "{answer}");
    }
}

/// What a program of a client's says, in the clients' namespace.
fn client(scene: &Scene, program: &str, arguments: &[&str]) -> String {
    scene.topology.clients.execute(program, arguments).unwrap_or_else(|error| panic!("{error:#}"))
}

#[test]
fn load_from_h2load_and_wrk_gets_good_answers_only() {
    let scene = Scene::new(true, &[COOKIE]);
    for family in Family::BOTH {
        let to = SocketAddr::new(family.vip(), PORT);
        let url = format!("https://{to}/");
        let host = format!("Host: {HOST}");
        let said = client(&scene, "timeout", &["30", "wrk", "-t1", "-c16", "-d2s", "-H", &host, &url]);
        let requests =
            said.lines().find_map(|line| line.trim().split_once(" requests in")).map(|(n, _)| n.to_owned());
        assert!(requests.is_some_and(|n| n.parse::<u64>().is_ok_and(|n| n > 100)), "{said}");
        assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
        let authority = format!("--header=:authority: {HOST}");
        let said = client(&scene, "timeout", &["30", "h2load", "-n5000", "-c8", "-m16", &authority, &url]);
        assert!(said.contains("5000 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
        assert!(said.contains("5000 2xx"), "{said}");
    }
}

#[test]
#[ignore = "needs chromium (Debian: apt-get install chromium), then: cargo xtask test --full"]
fn chromium_stays_at_its_server() {
    let scene = Scene::new(true, &[]);
    for family in Family::BOTH {
        let folder = Folder::new().expect("a folder");
        let vip = match family {
            Family::V4 => family.vip().to_string(),
            Family::V6 => format!("[{}]", family.vip()),
        };
        let mut arguments = String::from(
            "60 chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --ignore-certificate-errors --disable-quic --virtual-time-budget=20000 --dump-dom",
        );
        write!(arguments, " --user-data-dir={}", folder.path().display()).expect("written");
        let rules = format!("--host-resolver-rules=MAP {HOST} {vip}");
        let url = format!("https://{HOST}/page");
        let mut all: Vec<&str> = arguments.split(' ').collect();
        all.extend([rules.as_str(), url.as_str()]);
        let dom = client(&scene, "timeout", &all);
        let text = dom.split_once("<pre id=\"seen\">").and_then(|(_, rest)| rest.split_once("</pre>"));
        let seen: Vec<Identity> =
            serde_json::from_str(text.expect("the page").0).unwrap_or_else(|error| panic!("{error}: {dom}"));
        assert_eq!(seen.len(), 8, "{seen:#?}");
        assert!(seen.iter().all(|one| one.backend == seen[0].backend), "{seen:#?}");
    }
}
