//! Sessions in clear are known by an HTTP cookie (rows C2, C5, C11 and C13), with nginx.

use std::{
    collections::BTreeSet,
    io::{BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use dispatcher_tests::{
    daemon::{Daemon, Service},
    http::read_head,
    sockets,
    system::{CLEAR, Nginx},
    tls::{Authority, Identity},
    topology::{Family, Plan, Topology},
};
use dispatcher_user::api;

struct Shop {
    daemon: Daemon,
    _servers: Vec<Nginx>,
    topology: Topology,
}

impl Shop {
    fn new(attach: &str) -> Self {
        let authority = Authority::new().expect("certificates");
        let topology = Topology::new(Plan::default()).expect("namespaces");
        let servers = (1..)
            .zip(&topology.backends)
            .map(|(i, place)| Nginx::start(&place.netns, &format!("b{i}"), 443, &authority).expect("nginx"))
            .collect();
        let service = Service::new("shop", CLEAR).with("affinity = \"http-cookie:sid\"");
        let daemon = Daemon::start(&topology, attach, &[service]).expect("dispatcherd");
        Self { daemon, _servers: servers, topology }
    }

    fn connect(&self, turn: usize) -> BufReader<TcpStream> {
        let family = Family::BOTH[turn % 2];
        let from = self.topology.client(family, turn / 2);
        let to = SocketAddr::new(family.vip(), CLEAR);
        BufReader::new(sockets::connect(&self.topology.clients, from, to).expect("a connection"))
    }

    /// One request on a connection of its own: who answered, and the cookie that was set.
    fn visit(&self, turn: usize, path: &str, cookie: Option<&str>) -> (String, Option<String>) {
        ask(&mut self.connect(turn), &request(path, cookie))
    }

    fn session(&self, cookie: &str) -> api::Session {
        let id = format!("cookie:{}", cookie.strip_prefix("sid=").expect("its name"));
        let found: Vec<api::Session> = self.daemon.ask(&["sessions", "show", &id]).expect("it is known");
        found.into_iter().next().expect("one")
    }
}

fn request(path: &str, cookie: Option<&str>) -> Vec<u8> {
    let cookie = cookie.map_or_else(String::new, |pair| format!("Cookie: lang=en; {pair}; theme=dark\r\n"));
    format!("GET {path} HTTP/1.1\r\nHost: shop\r\nUser-Agent: test\r\n{cookie}\r\n").into_bytes()
}

fn ask(stream: &mut BufReader<TcpStream>, request: &[u8]) -> (String, Option<String>) {
    stream.get_mut().write_all(request).expect("sent");
    let head = read_head(stream).expect("a head").expect("an answer");
    let mut body = vec![0; head.length as usize];
    stream.read_exact(&mut body).expect("a body");
    let identity: Identity = serde_json::from_slice(&body).expect("who answered");
    (identity.backend, head.cookie)
}

#[test]
fn claim_c13_a_session_cookie_leads_back_to_the_server_that_set_it() {
    for attach in ["native", "generic"] {
        let shop = Shop::new(attach);
        let mut homes = BTreeSet::new();
        for user in 0..8 {
            let (home, cookie) = shop.visit(user, "/login", None);
            let cookie = cookie.expect("a cookie is set");
            let entry = shop.session(&cookie);
            assert_eq!(
                (entry.backend.as_str(), entry.state.as_str(), entry.kind.as_str()),
                (home.as_str(), "confirmed", "http-cookie")
            );
            assert!(!entry.id.contains(&cookie["sid=".len()..]), "the value itself is kept nowhere");
            for turn in 0..8 {
                assert_eq!(shop.visit(turn, "/", Some(&cookie)).0, home, "{attach}: turn {turn}");
            }
            homes.insert(home);
        }
        assert!(homes.len() > 1, "all sessions on one server prove nothing: {homes:?}");
        let status = shop.daemon.status().expect("status");
        assert_eq!((status.hits, status.nonsecure), (64, 8), "{status:?}");
        assert_eq!(shop.daemon.drops().expect("counters"), []);
    }
}

#[test]
fn claim_c5_without_a_cookie_each_request_goes_by_the_balancer() {
    let shop = Shop::new("native");
    let answers: BTreeSet<String> = (0..40).map(|turn| shop.visit(turn % 8, "/", None).0).collect();
    assert_eq!(answers.len(), 3, "{answers:?}");
    assert!(shop.daemon.sessions().expect("the list of sessions").is_empty());
    assert_eq!(shop.daemon.status().expect("status").nonsecure, 40);
}

#[test]
fn claim_c11_a_cookie_set_later_on_a_connection_leads_to_its_server() {
    let shop = Shop::new("native");
    for user in 0..6 {
        // A browser that looks around first, then logs in over the connection that it has.
        let mut stream = shop.connect(user);
        let (home, none) = ask(&mut stream, &request("/", None));
        assert_eq!(none, None);
        let (again, first) = ask(&mut stream, &request("/login", None));
        let first = first.expect("a cookie");
        // With the first cookie in use it gets a second one.
        let (_, second) = ask(&mut stream, &request("/login", Some(&first)));
        let second = second.expect("another cookie");
        assert_eq!(again, home);
        for cookie in [&first, &second] {
            assert_eq!(shop.session(cookie).backend, home);
            for turn in 0..4 {
                assert_eq!(shop.visit(turn, "/", Some(cookie)).0, home);
            }
        }
    }
}

#[test]
fn a_request_in_pieces_and_one_that_is_long() {
    let shop = Shop::new("native");
    let (home, cookie) = shop.visit(0, "/login", None);
    let cookie = cookie.expect("a cookie");
    let whole = request("/", Some(&cookie));
    for cut in [1, 3, 20, whole.len() - 30] {
        let mut stream = shop.connect(cut);
        let (one, two) = whole.split_at(cut);
        stream.get_mut().write_all(one).expect("sent");
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(ask(&mut stream, two).0, home, "cut at {cut}");
    }
    // In the second and third segment.
    for length in [1500, 2900] {
        let long = format!("big={}; {cookie}", "x".repeat(length));
        for turn in 0..4 {
            assert_eq!(shop.visit(turn, "/", Some(&long)).0, home, "behind {length} bytes");
        }
    }
    // Beyond the stash: bound by what was seen, and served all the same.
    let longest = format!("big={}; {cookie}", "x".repeat(7000));
    let _ = shop.visit(0, "/", Some(&longest));
    let dead = shop.daemon.drops().expect("counters");
    assert!(dead.iter().all(|(name, _)| name == "stash_beyond"), "{dead:?}");
}

#[test]
fn an_operator_pins_a_cookie() {
    let shop = Shop::new("native");
    for backend in ["b1", "b2", "b3"] {
        let pinned: Vec<api::Session> = shop
            .daemon
            .ask(&["sessions", "pin", "cookie:vip", "--service", "shop", "--backend", backend])
            .expect("pins");
        assert_eq!((pinned[0].kind.as_str(), pinned[0].state.as_str()), ("http-cookie", "pinned"));
        for turn in 0..4 {
            assert_eq!(shop.visit(turn, "/", Some("sid=vip")).0, backend);
        }
    }
    let wrong = shop.daemon.ask::<Vec<api::Session>>(&[
        "sessions",
        "pin",
        "00ff",
        "--kind",
        "cookie",
        "--service",
        "shop",
        "--backend",
        "b1",
    ]);
    let error = format!("{:#}", wrong.expect_err("no such kind"));
    assert!(error.contains("cookie is no kind of identifier; use tls-session-id"), "{error}");
}
