//! Services that end TLS: sessions by cookie, through tunnels that are established already.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use dispatcher_tests::{
    daemon::{Daemon, Folder, Process, Service, config},
    http, sockets,
    system::Nginx,
    tls::{Authority, HOST, Identity, Line, Manners, Server, User, Version},
    topology::{Family, Plan, Topology},
    town::until,
};
use dispatcher_user::api;
use rustls::{ClientConnection, StreamOwned};

/// Port of the service and of its backends.
const PORT: u16 = 443;
/// A port that a daemon may open which has given up its privileges.
const OTHER_PORT: u16 = 8443;
/// Tunnels to each backend.
const ESTABLISHED: usize = 4;
const COOKIE: &str = "affinity = \"http-cookie:sid\"";

/// What answers in the backends' namespaces.
#[derive(Debug)]
enum Servers {
    /// HTTP/2; `/login` sets the cookie.
    Nginx { _running: Vec<Nginx> },
    /// HTTP/1.1; `/login/VALUE` sets the cookie.
    Own(Vec<Server>),
}

/// Dropped in this order.
struct Scene {
    daemon: Daemon,
    servers: Servers,
    folder: Folder,
    text: String,
    authority: Authority,
    topology: Topology,
}

type Connection = Line<StreamOwned<ClientConnection, TcpStream>>;

impl Scene {
    /// A service in front of servers that have been started, as soon as tunnels to all of them are there.
    fn new(http2: bool, lines: &[&str]) -> Self {
        let scene = Self::begin(http2, lines).unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
        until("tunnels are established", || scene.tunnels().len() == 3 * ESTABLISHED);
        scene
    }

    fn begin(http2: bool, lines: &[&str]) -> Result<Self> {
        let authority = Authority::new()?;
        let topology = Topology::new(Plan::default())?;
        let folder = Folder::new()?;
        let own = authority.issue("dispatcher")?;
        let certificate = folder.write("web.pem", &own.certificate_pem)?;
        let key = folder.write("web.key", &own.key_pem)?;
        let roots = folder.write("roots.pem", &authority.pem())?;
        let places = topology.backends.iter().enumerate().map(|(i, place)| (format!("b{}", i + 1), place));
        let servers = if http2 {
            let all = places.map(|(name, place)| Nginx::with_http2(&place.netns, &name, PORT, &authority));
            Servers::Nginx { _running: all.collect::<Result<_>>()? }
        } else {
            let manners = Manners::default();
            let all =
                places.map(|(name, place)| Server::start(&place.netns, &name, PORT, &authority, manners));
            Servers::Own(all.collect::<Result<_>>()?)
        };
        let mut shop = Service::new("shop", PORT).with("mode = \"terminate\"");
        for line in lines {
            shop = shop.with(line);
        }
        if !lines.iter().any(|line| line.starts_with("terminate.certificates")) {
            shop = shop.with(&format!(
                "terminate.certificates = [{{ certificate = \"{}\", key = \"{}\" }}]",
                certificate.display(),
                key.display()
            ));
        }
        let shop = shop.with(&format!("tunnels.roots = \"{}\"", roots.display()));
        let shop = if lines.iter().any(|line| line.starts_with("tunnels.server_name")) {
            shop
        } else {
            shop.with(&format!("tunnels.server_name = \"{HOST}\""))
        };
        let text = config(&topology, "native", &[shop]);
        let daemon = Daemon::start_with(&topology.dispatcher, &text)?;
        Ok(Self { daemon, servers, folder, text, authority, topology })
    }

    fn tunnels(&self) -> Vec<api::Tunnel> {
        self.daemon.ask(&["tunnels"]).expect("tunnels")
    }

    fn tunnel_backends(&self) -> Vec<api::TunnelBackend> {
        self.daemon.ask(&["tunnels", "backends"]).expect("backends")
    }

    fn handshakes(&self) -> u64 {
        self.tunnel_backends().iter().map(|one| one.handshakes).sum()
    }

    fn sessions(&self) -> Vec<api::Session> {
        self.daemon.ask(&["sessions", "list"]).expect("sessions")
    }

    fn connect(&self, family: Family, client: usize) -> Connection {
        let user = User::new(&self.authority, Version::Tls13).expect("a user");
        let (from, to) = (self.topology.client(family, client), SocketAddr::new(family.vip(), PORT));
        user.connect(&self.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Asks for a path with curl, with what is in a jar of cookies; what the service says.
    fn curl(&self, jar: &str, family: Family, arguments: &[&str], path: &str) -> Result<String> {
        let vip = match family {
            Family::V4 => family.vip().to_string(),
            Family::V6 => format!("[{}]", family.vip()),
        };
        let file = |name: &str| self.folder.path().join(name).to_string_lossy().into_owned();
        let (jar, roots) = (file(jar), file("roots.pem"));
        let (to, url) = (format!("{HOST}:{PORT}:{vip}"), format!("https://{HOST}:{PORT}{path}"));
        let mut all =
            vec!["-sS", "--max-time", "10", "--cacert", &roots, "-b", &jar, "-c", &jar, "--resolve", &to];
        all.extend(arguments);
        all.push(&url);
        self.topology.clients.execute("curl", &all)
    }

    fn visit(&self, jar: &str, family: Family, arguments: &[&str], path: &str) -> Identity {
        let answer = self.curl(jar, family, arguments, path).unwrap_or_else(|error| panic!("{error:#}"));
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }
}

/// Sends a text and reads one answer: its first line, its header and its body.
fn say(line: &mut Connection, text: &str) -> Result<(String, String)> {
    line.write_all(text.as_bytes())?;
    line.flush()?;
    let head = http::read_head(line)?.context("no answer")?;
    let mut body = vec![0; head.length as usize];
    line.read_exact(&mut body)?;
    Ok((head.line, String::from_utf8_lossy(&body).into_owned()))
}

#[test]
fn claim_c1_c6_c8_c9_sessions_go_through_established_tunnels() {
    let scene = Scene::new(true, &[COOKIE]);
    let before = scene.handshakes();
    // C9: from where to where, and by what.
    for tunnel in scene.tunnels() {
        assert_eq!(tunnel.destination.port(), PORT, "{tunnel:?}");
        assert!(tunnel.cipher_suite.starts_with("TLS13_") && tunnel.version == "TLSv1_3", "{tunnel:?}");
        assert_eq!(tunnel.alpn.as_deref(), Some("h2"), "{tunnel:?}");
    }
    let mut homes = BTreeSet::new();
    for number in 0..12 {
        let jar = format!("jar{number}");
        let family = Family::BOTH[number % 2];
        let version = ["--http1.1", "--http2"][number / 2 % 2];
        let home = scene.visit(&jar, family, &[version], "/login").backend;
        for turn in 0..4 {
            assert_eq!(scene.visit(&jar, Family::BOTH[turn % 2], &[version], "/").backend, home);
        }
        homes.insert(home);
    }
    assert!(homes.len() > 1, "all went to {homes:?}");
    // C6: each session has its backend and its tunnel, which is of that backend.
    let (sessions, tunnels) = (scene.sessions(), scene.tunnels());
    assert_eq!(sessions.len(), 12, "{sessions:?}");
    for session in &sessions {
        let tunnel = tunnels.iter().find(|one| one.id == session.tunnel);
        assert!(tunnel.is_some_and(|one| one.backend == session.backend), "{session:?} {tunnels:?}");
        assert_eq!((session.state.as_str(), session.hits > 3), ("confirmed", true), "{session:?}");
    }
    assert_eq!(tunnels.iter().map(|one| one.sessions).sum::<u32>(), 12);
    // C8: nobody waited for a handshake.
    assert_eq!(scene.handshakes(), before);
}

#[test]
fn claim_c1_a_client_without_a_session_is_given_one() {
    let scene = Scene::new(true, &[]);
    let mut given = BTreeSet::new();
    for number in 0..6 {
        let jar = format!("jar{number}");
        let head = scene.curl(&jar, Family::V4, &["-o", "/dev/null", "-D", "-"], "/").expect("an answer");
        let lines: Vec<&str> =
            head.lines().filter(|line| line.to_lowercase().starts_with("set-cookie")).collect();
        let [line] = lines.as_slice() else { panic!("one cookie: {head}") };
        let value = line.split_once("DISPATCHER=").and_then(|(_, rest)| rest.split(';').next()).unwrap_or("");
        assert_eq!((value.len(), value.bytes().all(|byte| byte.is_ascii_hexdigit())), (32, true), "{line}");
        for part in ["; Path=/", "; Secure", "; HttpOnly", "; SameSite=Lax"] {
            assert!(line.contains(part), "{line}");
        }
        given.insert(value.to_owned());
        let home = scene.visit(&jar, Family::V6, &[], "/").backend;
        let head = scene.curl(&jar, Family::V4, &["-o", "/dev/null", "-D", "-"], "/").expect("an answer");
        assert!(!head.to_lowercase().contains("set-cookie"), "it has one: {head}");
        assert!((0..4).all(|_| scene.visit(&jar, Family::V4, &[], "/").backend == home));
        let found: Vec<api::Session> =
            scene.daemon.ask(&["sessions", "show", &format!("cookie:{value}")]).expect("a session");
        assert_eq!((found[0].backend.as_str(), found[0].state.as_str()), (home.as_str(), "confirmed"));
    }
    assert_eq!(given.len(), 6, "each has its own");
    // An unknown session is a miss, never an error.
    let cookie = ["-H", "Cookie: DISPATCHER=0123456789abcdef0123456789abcdef"];
    let home = scene.visit("other", Family::V4, &cookie, "/").backend;
    assert_eq!(scene.visit("other", Family::V4, &cookie, "/").backend, home);
}

#[test]
fn claim_c10_no_byte_in_clear_on_the_way_to_backends() {
    let scene = Scene::new(true, &[COOKIE]);
    let file = scene.folder.path().join("way.pcap");
    let mut command = scene.topology.dispatcher.command("tcpdump");
    command.args(["-i", "be0", "-s", "0", "-U", "--immediate-mode", "-w"]).arg(&file);
    let capture = Process::start(command, None).expect("tcpdump");
    until("it captures", || capture.log().contains("listening on"));
    let tunnels = scene.tunnels();
    for number in 0..6 {
        let body = ["-d", "user-data-that-nobody-sees"];
        let _ = scene.curl(&format!("jar{number}"), Family::V4, &body, "/path-that-nobody-sees");
        let _ = scene.visit(&format!("jar{number}"), Family::V6, &[], "/login");
    }
    capture.signal(libc::SIGTERM);
    let mut capture = capture;
    let _ = capture.wait(std::time::Duration::from_secs(5)).expect("ends");
    let seen = std::fs::read(&file).expect("a capture");
    // What was sent is in it: packets of the tunnels, and nothing that can be read.
    assert!(seen.len() > 5000, "{} bytes", seen.len());
    let has = |text: &[u8]| seen.windows(text.len()).any(|window| window == text);
    assert!(tunnels.iter().any(|one| has(&one.source.port().to_be_bytes())));
    for text in ["nobody-sees", "GET /", "POST /", "sid=", "backend", "HTTP/1.1 200", HOST] {
        // The server's name is asked for by SNI, before the capture began.
        assert!(!has(text.as_bytes()), "{text} is there to be read");
    }
}

#[test]
fn tunnels_that_end_lose_no_request() {
    for http2 in [true, false] {
        let scene = Scene::new(http2, &[COOKIE]);
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let problems = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for client in 0..4 {
                let (scene, stop, done, problems) = (&scene, &stop, &done, &problems);
                scope.spawn(move || {
                    let mut line = scene.connect(Family::BOTH[client % 2], client);
                    let text = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid=user{client}\r\n\r\n");
                    let mut home = None;
                    while !stop.load(Ordering::Relaxed) {
                        let answer = say(&mut line, &text).and_then(|(status, body)| {
                            ensure!(status.contains("200"), "{status}: {body}");
                            Ok(serde_json::from_str::<Identity>(&body)?.backend)
                        });
                        match answer {
                            Ok(backend) if *home.get_or_insert(backend.clone()) == backend => {}
                            other => {
                                problems.lock().expect("whole").push(format!("{home:?}: {other:?}"));
                                return;
                            }
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let more = |count| {
                let before = done.load(Ordering::Relaxed);
                until("requests go on", || {
                    done.load(Ordering::Relaxed) >= before + count
                        || !problems.lock().expect("whole").is_empty()
                });
            };
            more(100);
            for _ in 0..5 {
                for tunnel in scene.tunnels() {
                    // It may have ended with the one before.
                    let _ =
                        scene.daemon.ask::<Vec<api::Tunnel>>(&["tunnels", "close", &tunnel.id.to_string()]);
                }
                more(50);
            }
            let rotated: api::Rotated = scene.daemon.ask(&["tunnels", "rotate"]).expect("rotated");
            assert!(rotated.tunnels > 0);
            more(100);
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(*problems.lock().expect("whole"), [""; 0], "http2: {http2}");
        // Sessions name a tunnel that is there, once they were used again.
        until("tunnels are established again", || {
            scene.tunnels().iter().filter(|one| one.state == "open").count() >= 3 * ESTABLISHED
        });
    }
}

#[test]
fn a_backend_that_is_not_who_it_should_be_gets_nothing() {
    let scene = Scene::begin(true, &["tunnels.server_name = \"other.test\""]).expect("a scene");
    until("attempts fail", || scene.tunnel_backends().iter().all(|one| one.error.is_some()));
    for backend in scene.tunnel_backends() {
        let error = backend.error.unwrap_or_default();
        assert!(error.contains("other.test") && backend.established == 0, "{error}");
    }
    let (answer, _) =
        say(&mut scene.connect(Family::V4, 0), &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n"))
            .map(|(status, body)| (format!("{status}\n{body}"), ()))
            .expect("an answer");
    for part in ["503", "request ", "no tunnel"] {
        assert!(answer.contains(part), "{answer}");
    }
    assert!(scene.tunnels().is_empty());
}

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

#[test]
fn servers_are_lost_and_come_back() {
    let mut scene = Scene::new(false, &[COOKIE]);
    let text = |user: &str| format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nCookie: sid={user}\r\n\r\n");
    let ask = |scene: &Scene, user: &str| -> Identity {
        let (status, body) = say(&mut scene.connect(Family::V4, 0), &text(user)).expect("an answer");
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {status}: {body}"))
    };
    let home = ask(&scene, "one").backend;
    let Servers::Own(servers) = &mut scene.servers else { panic!("own servers") };
    let place = servers.iter().position(|server| server.name == home).expect("one of them");
    drop(servers.remove(place));
    // Its tunnels end with it, and its session goes elsewhere.
    until("the tunnels have ended", || scene.tunnels().iter().all(|one| one.backend != home));
    let other = ask(&scene, "one").backend;
    assert_ne!(other, home);
    assert_eq!(ask(&scene, "one").backend, other, "and stays there");
}

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
    let _: api::Reload = scene.daemon.ask(&["reload"]).expect("reloaded");
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
}

#[test]
fn a_backend_that_the_operator_adds_gets_tunnels() {
    let scene = Scene::new(false, &[COOKIE]);
    let of = |name: &str| scene.tunnels().iter().filter(|one| one.backend == name).count();
    let at = SocketAddr::new(scene.topology.backends[2].address(Family::V4), PORT).to_string();
    let _: Vec<api::Backend> = scene.daemon.ask(&["backend", "shop/b3", "remove"]).expect("removed");
    until("its tunnels end", || of("b3") == 0);
    let _: Vec<api::Backend> = scene.daemon.ask(&["backend", "shop/b9", "add", &at]).expect("added");
    until("it has tunnels", || of("b9") == ESTABLISHED);
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
