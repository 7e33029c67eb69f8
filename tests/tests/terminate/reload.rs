//! What a daemon reads at its start and at a reload.

use std::{net::SocketAddr, path::PathBuf};

use dispatcher_tests::{
    daemon::Folder,
    sockets,
    tls::{Authority, HOST},
    topology::Family,
    town::until,
};
use dispatcher_user::api;

use crate::scene::{COOKIE, PORT, Scene, say};

/// A port that only who may bind it can open.
const OTHER_PORT: u16 = 843;

#[test]
fn a_reload_changes_certificates_and_ends_services() {
    let scene = Scene::new(false, &[COOKIE]);
    let mut line = scene.connect(Family::V4, 0);
    let ask = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid=a\r\n\r\n");
    assert!(say(&mut line, &ask).expect("an answer").0.contains("200"));
    // A key that is not the certificate's changes nothing.
    let new = scene.authority.issue("renewed").expect("a certificate");
    scene.folder.write("web.pem", &new.certificate_pem).expect("written");
    let before = scene.tunnels();
    let said = scene.daemon.ask::<api::Reload>(&["reload"]).expect_err("refused").to_string();
    assert!(said.contains("web.key") && said.contains("nothing was changed"), "{said}");
    scene.folder.write("web.key", &new.key_pem).expect("written");
    for arguments in [&["reload", "--dry-run"][..], &["reload"]] {
        let done: api::Reload = scene.daemon.ask(arguments).expect("reloaded");
        assert_eq!(done.changes, ["~ service shop: terminate.certificates: their files have changed"]);
    }
    assert!(say(&mut line, &ask).expect("an answer").0.contains("200"), "connections go on");
    let mut other = scene.connect(Family::V4, 0);
    let certificates = other.stream().conn.peer_certificates().expect("one").to_vec();
    assert_eq!(certificates[0].as_ref(), new.der(), "new clients see the new one");
    let ids = |tunnels: Vec<api::Tunnel>| tunnels.into_iter().map(|one| one.id).collect::<Vec<_>>();
    assert_eq!(ids(scene.tunnels()), ids(before), "tunnels stay");
    // The service goes to another port.
    let [v4, v6] = Family::BOTH.map(Family::vip);
    let there = format!("vip = [\"{v4}:{PORT}\", \"[{v6}]:{PORT}\"]");
    let elsewhere = format!("vip = [\"{v4}:{OTHER_PORT}\", \"[{v6}]:{OTHER_PORT}\"]");
    let text = scene.text.replace(&there, &elsewhere);
    assert_ne!(text, scene.text);
    scene.daemon.rewrite(&text).expect("written");
    let _: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    let open = |port| {
        let (clients, from) = (&scene.topology.clients, scene.topology.client(Family::V4, 0));
        sockets::connect(clients, from, SocketAddr::new(v4, port)).is_ok()
    };
    until("it listens at one place only", || !open(PORT) && open(OTHER_PORT));
    assert!(say(&mut line, &ask).expect("an answer").0.contains("200"), "connections go on");
    // Without the service nothing is left of it: whoever is there is told to go.
    let (without, _) = scene.text.split_once("[[service]]").expect("a service");
    scene.daemon.rewrite(without).expect("written");
    let _: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    until("all is gone", || scene.tunnels().is_empty() && !open(OTHER_PORT));
    assert!(say(&mut line, &ask).is_err(), "the connection was ended");
    // It can come back.
    scene.daemon.rewrite(&scene.text).expect("written");
    let _: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
    until("it is back", || scene.curl("jar", Family::V4, &[], "/").is_ok());
}

#[test]
fn what_is_wrong_is_said_at_the_start() {
    let folder = Folder::new().expect("a folder");
    let authority = Authority::new().expect("an authority");
    let good = authority.issue("a").expect("a certificate");
    let other = authority.issue("b").expect("a certificate");
    let write = |name: &str, text: &str| -> PathBuf { folder.write(name, text).expect("written") };
    let (certificate, key) = (write("a.pem", &good.certificate_pem), write("a.key", &good.key_pem));
    let (wrong, nothing) = (write("b.key", &other.key_pem), write("empty.pem", ""));
    let missing = folder.path().join("missing.pem");
    let pair = |certificate: &PathBuf, key: &PathBuf| {
        format!(
            "terminate.certificates = [{{ certificate = \"{}\", key = \"{}\" }}]",
            certificate.display(),
            key.display()
        )
    };
    for (line, parts) in [
        (pair(&missing, &key), ["missing.pem", "No such file"]),
        (pair(&nothing, &key), ["empty.pem", "no certificate"]),
        (pair(&certificate, &nothing), ["empty.pem", "no private key"]),
        (pair(&certificate, &wrong), ["b.key", "not the key of the certificate"]),
    ] {
        let Err(error) = Scene::begin(false, &[&line]) else { panic!("{line}: it began") };
        let said = format!("{error:#}");
        for part in parts {
            assert!(said.contains(part), "{part} is missing in: {said}");
        }
    }
}
