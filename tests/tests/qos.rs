//! Limits of backends and classes on real sockets: what the data path lets through and marks, and connections that wait
//! in the daemon until backends can take them (`miss = "daemon"`).

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::{Daemon, Folder, Pins, Process, Service, config, program},
    flood::{DATAGRAM, Flood},
    hello::{ask, client_hello},
    http, sockets,
    stage::{PORT, Stage, web},
    tls::{Authority, Line, Manners, Server, User, Version},
    topology::{Family, Plan, Topology},
    town::until,
};
use dispatcher_user::api;

const CLASSES: &str =
    "\n[[class]]\nname = \"gold\"\nweight = 3\n\n[[class]]\nname = \"bronze\"\nweight = 1\n";
/// Port of the UDP service.
const BULK: u16 = 9000;
/// Bits a second that its backend takes.
const BANDWIDTH: u64 = 8_000_000;
/// A datagram with its heads.
const FRAME: u64 = DATAGRAM as u64 + 42;

/// Addresses of both families of the client with this number.
fn client(topology: &Topology, number: usize) -> [IpAddr; 2] {
    Family::BOTH.map(|family| topology.client(family, number))
}

/// The first client is gold, the second one bronze.
fn by_client(topology: &Topology) -> String {
    let rule = |(number, class): (usize, &str)| {
        let [v4, v6] = client(topology, number);
        format!("{{ class = \"{class}\", clients = [\"{v4}/32\", \"{v6}/128\"] }}")
    };
    let rules: Vec<String> = ["gold", "bronze"].into_iter().enumerate().map(rule).collect();
    format!("classify = [{}]", rules.join(", "))
}

fn limited_bulk(topology: &Topology) -> Service {
    Service::new("bulk", BULK)
        .with("protocol = \"udp\"")
        .with("mode = \"l4\"")
        .with(&by_client(topology))
        .with(&format!("limits = {{ bandwidth = \"{BANDWIDTH}bit/s\" }}"))
}

/// One backend, which gets twice what it takes of each class. Dropped in the order of its fields.
struct Bulk {
    daemon: Daemon,
    flood: Flood,
    pins: Pins,
    text: String,
    topology: Topology,
}

impl Bulk {
    fn new(more: &[Service]) -> Self {
        let topology = Topology::new(Plan { backends: 1, ..Plan::default() }).expect("namespaces");
        let services = [more, &[limited_bulk(&topology)]].concat();
        let pins = Pins::new();
        let text = pins.within(&(config(&topology, "native", &services) + CLASSES));
        let mut flood = Flood::new(&topology.backends[0], BULK).expect("a server");
        let daemon = Daemon::start_with(&topology.dispatcher, &text).expect("dispatcherd");
        for from in (0..2).flat_map(|number| client(&topology, number)) {
            flood.send(&topology.clients, from, BANDWIDTH).expect("a client");
        }
        Self { daemon, flood, pins, text, topology }
    }

    /// Datagrams that the server got of each class.
    fn received(&self) -> [u64; 2] {
        [0, 1].map(|number| self.flood.received(&client(&self.topology, number)))
    }

    /// The part of the first class, percent, of what the server gets from now on, for less than a second.
    fn gold(&self) -> f64 {
        let before = self.received();
        let since = || {
            let now = self.received();
            [now[0] - before[0], now[1] - before[1]]
        };
        until("nothing comes", || since().iter().sum::<u64>() > 600);
        let [gold, bronze] = since();
        gold as f64 / (gold + bronze) as f64 * 100.0
    }

    fn share(&self, class: &str) -> Option<api::QosShare> {
        let shares: Vec<api::QosShare> = self.daemon.ask(&["qos"]).expect("shares");
        shares.into_iter().find(|one| one.service == "bulk" && one.class == class)
    }

    fn reload(&self, text: &str) {
        self.daemon.rewrite(text).expect("written");
        let _: api::Reload = self.daemon.ask(&["reload"]).expect("reloaded");
    }

    fn only_policed(&self) {
        let drops = self.daemon.drops().expect("counters");
        assert!(drops.iter().all(|(name, _)| name == Reason::OverBandwidth.name()), "{drops:?}");
    }
}

/// Within 15 % of what the weights give.
#[track_caller]
fn assert_share(found: f64, due: f64) {
    assert!((found / due - 1.0).abs() < 0.15, "{found:.1} %, not {due} %");
    let (found, due) = (100.0 - found, 100.0 - due);
    assert!((found / due - 1.0).abs() < 0.15, "the other class: {found:.1} %, not {due} %");
}

#[test]
fn bandwidth_is_shared_by_weights_that_the_operator_turns_round() {
    let bulk = Bulk::new(&[]);
    // What the buckets held at the start is spent then.
    let _ = bulk.gold();
    assert_share(bulk.gold(), 75.0);
    for (class, weight) in [("gold", "1"), ("bronze", "3")] {
        let told: Vec<api::QosClass> = bulk.daemon.ask(&["qos", "weight", class, weight]).expect("weighed");
        assert_eq!(told[0].weight.to_string(), weight);
    }
    let _ = bulk.gold();
    assert_share(bulk.gold(), 25.0);
    let [gold, bronze] = ["gold", "bronze"].map(|class| bulk.share(class).expect("it is used"));
    let passed = bulk.received().map(|datagrams| datagrams * FRAME);
    for (share, passed) in [gold, bronze].iter().zip(passed) {
        // Counted before they arrive; and what is to be sent next is counted already.
        assert!(share.bytes >= passed && share.dropped_bytes > passed / 4, "{passed} passed, {share:?}");
    }
    bulk.only_policed();
}

#[test]
fn packets_of_a_class_are_marked() {
    let topology = Topology::new(Plan { backends: 1, ..Plan::default() }).expect("namespaces");
    let service = Service::new("echo", BULK)
        .with("protocol = \"udp\"")
        .with("mode = \"l4\"")
        .with(&by_client(&topology));
    let marked = CLASSES.replace("weight = 3", "weight = 3\ndscp = 46");
    let text = config(&topology, "native", &[service]) + &marked;
    let _daemon = Daemon::start_with(&topology.dispatcher, &text).expect("dispatcherd");
    for family in Family::BOTH {
        let at = SocketAddr::new(topology.backends[0].address(family), BULK);
        let server = sockets::marked_datagrams(&topology.backends[0].netns, at).expect("a server");
        for (number, dscp) in [46, 0].into_iter().enumerate() {
            let from = SocketAddr::new(topology.client(family, number), 0);
            let client = sockets::marked_datagrams(&topology.clients, from).expect("a client");
            // The first datagram is bound, the others are of a known flow.
            for _ in 0..3 {
                client.send_to(b"question", SocketAddr::new(family.vip(), BULK)).expect("sent");
                let (from, found) = sockets::receive_marked(&server).expect("a datagram");
                assert_eq!(found, dscp, "to the server, {family:?}");
                server.send_to(b"answer", from).expect("sent");
                let (from, found) = sockets::receive_marked(&client).expect("an answer");
                assert_eq!((from.ip(), found), (family.vip(), dscp), "to the client, {family:?}");
            }
        }
    }
}

/// A server that is asked in clear, beside the other service.
fn server(bulk: &Bulk) -> Server {
    let authority = Authority::new().expect("certificates");
    let place = &bulk.topology.backends[0];
    Server::start(&place.netns, "b1", PORT, &authority, Manners::default()).expect("a server")
}

fn goes_on_without_a_daemon(end: fn(&mut Daemon) -> anyhow::Result<()>) {
    // Another service with limits, so that there are two sets of them.
    let mut bulk = Bulk::new(&[web().with("limits = { bandwidth = \"100Mbit/s\" }")]);
    let _server = server(&bulk);
    let to = SocketAddr::new(Family::V6.vip(), PORT);
    let from = bulk.topology.client(Family::V6, 2);
    let mut line = Line::new(sockets::connect(&bulk.topology.clients, from, to).expect("connects"));
    http::download(&mut line, 100_000).expect("a page");
    let shares = |bulk: &Bulk| -> Vec<api::QosShare> {
        let mut all: Vec<api::QosShare> = bulk.daemon.ask(&["qos"]).expect("shares");
        all.sort_by(|a, b| (&a.service, &a.class).cmp(&(&b.service, &b.class)));
        all
    };
    let _ = bulk.gold();
    let before = shares(&bulk);
    end(&mut bulk.daemon).expect("ends");
    let _ = bulk.gold();
    let (sent, received) = (bulk.flood.sent(), bulk.received().iter().sum::<u64>());
    assert_share(bulk.gold(), 75.0);
    let (sent, received) = (bulk.flood.sent() - sent, bulk.received().iter().sum::<u64>() - received);
    assert!(received < sent / 2, "{received} of {sent} datagrams, not a quarter");
    http::download(&mut line, 100_000).expect("the connection goes on");
    bulk.daemon.again(&bulk.topology.dispatcher, &bulk.text).expect("dispatcherd again");
    let after = shares(&bulk);
    let names = |shares: &[api::QosShare]| -> Vec<String> {
        shares.iter().map(|one| format!("{} {}", one.service, one.class)).collect()
    };
    assert_eq!(names(&before), ["bulk bronze", "bulk gold", "web default"]);
    assert_eq!(names(&before), names(&after));
    for (before, after) in before.iter().zip(&after) {
        assert!(after.bytes > before.bytes, "counters go on: {before:?} {after:?}");
        assert!(after.connections >= before.connections, "counters go on: {before:?} {after:?}");
        assert_eq!(after.share_percent, None, "of no time, at the first look");
    }
    let dropped = |shares: &[api::QosShare]| shares.iter().map(|one| one.dropped_bytes).sum::<u64>();
    let lost = (sent - received) * DATAGRAM as u64;
    assert!(dropped(&after) >= dropped(&before) + lost, "what was dropped meanwhile is counted");
    let _ = bulk.gold();
    assert_share(bulk.gold(), 75.0);
    http::download(&mut line, 100_000).expect("the connection goes on");
    bulk.only_policed();
    assert!(bulk.pins.path().exists());
}

#[test]
fn limits_hold_between_two_daemons() {
    goes_on_without_a_daemon(Daemon::stop);
}

#[test]
fn limits_hold_when_the_daemon_is_killed() {
    goes_on_without_a_daemon(Daemon::kill);
}

#[test]
fn flows_of_a_class_that_goes_are_the_default_ones_until_it_comes_back() {
    let bulk = Bulk::new(&[]);
    let classes = |bulk: &Bulk, number| -> Vec<String> {
        let flows: Vec<api::Flow> = bulk.daemon.ask(&["flows"]).expect("flows");
        let clients = client(&bulk.topology, number);
        let of_client = flows.into_iter().filter(|one| clients.contains(&one.client.ip()));
        of_client.map(|one| one.class).collect()
    };
    let _ = bulk.gold();
    assert_eq!(
        (classes(&bulk, 0), classes(&bulk, 1)),
        (vec!["gold".to_owned(); 2], vec!["bronze".into(); 2])
    );
    let before = bulk.share("gold").expect("it is used");

    let gold = "\n[[class]]\nname = \"gold\"\nweight = 3\n";
    let without = bulk.text.replace(gold, "").replace("class = \"gold\"", "class = \"default\"");
    bulk.reload(&without);
    assert_eq!(classes(&bulk, 0), ["default", "default"]);
    assert!(bulk.share("gold").is_none());
    let _ = bulk.gold();
    let received = bulk.received()[0];
    let default = bulk.share("default").expect("its flows").bytes;
    // As much as the other: both have the weight 1.
    assert_share(bulk.gold(), 50.0);
    let more = bulk.share("default").expect("its flows").bytes - default;
    let received = (bulk.received()[0] - received) * FRAME;
    assert!(more >= received / 10 * 9, "{more} bytes are counted, {received} came");

    bulk.reload(&bulk.text);
    assert_eq!(classes(&bulk, 0), ["gold", "gold"], "the same flows");
    let _ = bulk.gold();
    assert_share(bulk.gold(), 75.0);
    let after = bulk.share("gold").expect("it is used");
    assert!(after.bytes > before.bytes && after.dropped_bytes > before.dropped_bytes, "{before:?} {after:?}");
    bulk.only_policed();
}

#[test]
fn a_live_view_outlives_the_daemon() {
    let mut bulk = Bulk::new(&[]);
    let _ = bulk.gold();
    let mut command = Command::new(program("dispatcherctl").expect("dispatcherctl"));
    command.arg("--socket").arg(bulk.daemon.socket()).args(["top", "--json"]);
    let (sender, lines) = mpsc::channel();
    let mut view = Process::start(command, Some(sender)).expect("dispatcherctl");
    let next = |what: &str, is: &dyn Fn(&api::Top) -> bool| -> api::Top {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let line = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect(what);
            let top: api::Top = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            if is(&top) {
                return top;
            }
        }
    };
    let good = |top: &api::Top| {
        top.error.is_none() && top.classes.iter().filter(|one| one.bytes_per_second > Some(0.0)).count() == 2
    };
    let check = |top: &api::Top| {
        let of = |class: &str| {
            top.classes.iter().find(|one| one.class == class).and_then(|one| one.bytes_per_second)
        };
        let (gold, bronze) = (of("gold").expect("a rate"), of("bronze").expect("a rate"));
        assert_share(gold / (gold + bronze) * 100.0, 75.0);
        let backend = &top.backends[0];
        assert_eq!((backend.service.as_str(), backend.name.as_str(), backend.queued), ("bulk", "b1", 0));
        assert!((backend.bytes_per_second.expect("a rate") - gold - bronze).abs() < 1.0, "{top:?}");
        assert_eq!(top.services[0].bytes_per_second, backend.bytes_per_second);
        assert_eq!((backend.connections_per_second, top.services[0].requests_per_second), (Some(0.0), None));
        assert!(top.forward_per_second > Some(0.0) && top.drop_per_second > Some(0.0), "{top:?}");
    };
    check(&next("a first view", &good));
    bulk.daemon.kill().expect("ends");
    let silent = next("that nobody answers", &|top| top.error.is_some());
    assert!(silent.uptime_seconds.is_none() && silent.backends.is_empty(), "{silent:?}");
    bulk.daemon.again(&bulk.topology.dispatcher, &bulk.text).expect("dispatcherd again");
    check(&next("another view", &good));
    view.signal(libc::SIGTERM);
    let _ = view.wait(Duration::from_secs(10)).expect("it ends");
    let text = bulk.daemon.told(&["top", "--count", "2"]).expect("two views");
    assert_eq!((text.matches("SERVICE  MODE").count(), text.matches("gold").count()), (2, 2), "{text}");
}

#[test]
fn a_backend_in_the_place_of_another_begins_to_count_anew() {
    let bulk = Bulk::new(&[]);
    let _ = bulk.gold();
    let before = bulk.share("gold").expect("it is used");
    // The second one comes before the first one goes, and the third one has the first one's number among those with
    // limits. Places of backends are not handed on at once.
    for name in ["b2", "b3"] {
        bulk.reload(&bulk.text.replace("name = \"b1\"", &format!("name = \"{name}\"")));
    }
    let backends = bulk.daemon.backends().expect("backends");
    assert_eq!((backends[0].name.as_str(), backends[0].index), ("b3", 2));
    let after = bulk.share("gold").map_or(0, |share| share.bytes + share.dropped_bytes);
    assert!(after < (before.bytes + before.dropped_bytes) / 2, "{after} of {before:?}");
    let _ = bulk.gold();
    assert_share(bulk.gold(), 75.0);
}

#[test]
fn a_weight_that_the_operator_said_holds_until_the_file_is_read_again() {
    let topology = Topology::new(Plan { backends: 1, ..Plan::default() }).expect("namespaces");
    let netns = &topology.dispatcher;
    let folder = Folder::new().expect("a folder");
    let state = format!("state = \"{}\"", folder.path().join("state.redb").display());
    let text = config(&topology, "native", &[web()]).replace("state = \"none\"", &state) + CLASSES;
    let weights = |daemon: &Daemon| -> Vec<(String, u32)> {
        let classes: Vec<api::QosClass> = daemon.ask(&["qos", "classes"]).expect("classes");
        classes.into_iter().map(|one| (one.name, one.weight)).collect()
    };
    let expected = |gold: u32| {
        [("default", 1), ("gold", gold), ("bronze", 1)].map(|(name, weight)| (name.to_owned(), weight))
    };
    let mut daemon = Daemon::start_with(netns, &text).expect("dispatcherd");
    assert_eq!(weights(&daemon), expected(3));
    let _: Vec<api::QosClass> = daemon.ask(&["qos", "weight", "gold", "7"]).expect("weighed");
    for end in [Daemon::kill, Daemon::stop] {
        end(&mut daemon).expect("ends");
        daemon.again(netns, &text).expect("dispatcherd again");
        assert_eq!(weights(&daemon), expected(7));
    }
    // A file without the class: that is told, and the rest is in force.
    daemon.stop().expect("ends");
    daemon.again(netns, &text.replace("gold", "silver")).expect("dispatcherd again");
    assert!(daemon.process().log().contains("gold"), "{}", daemon.process().log());
    daemon.rewrite(&text).expect("written");
    let dry: api::Reload = daemon.ask(&["reload", "--dry-run"]).expect("a dry run");
    assert!(!dry.changes.is_empty(), "{dry:?}");
    let _: api::Reload = daemon.ask(&["reload"]).expect("reloaded");
    assert_eq!(weights(&daemon), expected(3));
    let _: Vec<api::QosClass> = daemon.ask(&["qos", "weight", "gold", "5"]).expect("weighed");
    let told: api::Reload = daemon.ask(&["reload"]).expect("reloaded");
    assert_eq!(told.changes, ["~ class gold: weight: 5 -> 3"]);
    daemon.stop().expect("ends");
    daemon.again(netns, &text).expect("dispatcherd again");
    assert_eq!(weights(&daemon), expected(3), "what the file says is said again");
}

/// New sessions go to the backends by turns.
const TURNS: &str = "balance = \"weighted-round-robin\"";

fn stage(lines: &[&str]) -> Stage {
    let service = lines.iter().fold(web().with("miss = \"daemon\""), |service, line| service.with(line));
    Stage::new(Plan::default(), "native", &service, Manners::default())
}

fn shares(stage: &Stage) -> Vec<api::QosShare> {
    stage.daemon.ask(&["qos"]).expect("shares")
}

/// Hellos of so many connections at the same time; those connections, once each is answered.
fn rush(stage: &Stage, number: u8) -> Vec<TcpStream> {
    let connect = |i: u8| stage.connect(Family::BOTH[usize::from(i) % 2], i.into()).expect("a connection");
    let streams: Vec<_> = (0..number).map(connect).collect();
    std::thread::scope(|scope| {
        let one = |(i, mut stream): (usize, TcpStream)| {
            scope.spawn(move || {
                ask(&mut stream, &client_hello(&[i as u8; 32], 0)).expect("a server's flight");
                stream
            })
        };
        let all: Vec<_> = streams.into_iter().enumerate().map(one).collect();
        all.into_iter().map(|one| one.join().expect("a client")).collect()
    })
}

#[test]
fn connections_beyond_the_rate_wait_for_their_turn() {
    let stage = stage(&["limits.connections_per_second = 10", "limits.over = \"hold\"", TURNS]);
    let began = Instant::now();
    let streams = rush(&stage, 60);
    // 20 for each of three backends, of which at most the first few need not wait.
    assert!(began.elapsed() >= Duration::from_millis(1200), "{:?}", began.elapsed());
    let admitted: u64 = shares(&stage).iter().map(|one| one.admitted).sum();
    let waiting: u64 = shares(&stage).iter().map(|one| one.queued).sum();
    assert!(admitted >= 60 && waiting == 0, "{:?}", shares(&stage));
    let counter = |reason| stage.daemon.counter(reason).expect("a counter");
    assert_eq!((counter(Reason::BoundMiss), counter(Reason::BoundFresh)), (0, 0), "none by the table");
    assert_eq!(counter(Reason::Released), 60);
    drop(streams);
}

#[test]
fn where_only_connections_are_limited_shares_are_of_these() {
    let service = web().with("limits.connections_per_second = 1000");
    let stage = Stage::new(Plan::default(), "native", &service, Manners::default());
    let mut streams = rush(&stage, 6);
    assert!(shares(&stage).iter().all(|one| one.connections > 0 && one.share_percent.is_none()));
    until("they are counted", || {
        streams.extend(rush(&stage, 3));
        shares(&stage).iter().any(|one| one.share_percent == Some(100.0))
    });
}

#[test]
fn no_more_connections_than_there_may_be() {
    let stage = stage(&["limits.max_connections = 2", TURNS]);
    let mut streams = rush(&stage, 6);
    // Until they were counted; who comes then waits, and not for ever.
    std::thread::sleep(Duration::from_millis(1500));
    std::thread::scope(|scope| {
        let mut late = stage.connect(Family::V4, 0).expect("a connection");
        let late = scope.spawn(move || ask(&mut late, &client_hello(&[99; 32], 0)).map(drop));
        until("it waits", || shares(&stage).iter().any(|one| one.queued > 0));
        let error = late.join().expect("a client").expect_err("nobody went");
        let kind = error.downcast_ref().map(std::io::Error::kind);
        assert_eq!(kind, Some(std::io::ErrorKind::ConnectionReset), "{error:#}");
    });
    assert_eq!(stage.daemon.counter(Reason::Released).expect("a counter"), 6);
    assert_eq!(stage.daemon.counter(Reason::ResetOverRate).expect("a counter"), 1);
    streams.clear();
    // With the same session, which is not known for having been refused.
    until("there is room again", || {
        let mut stream = stage.connect(Family::V6, 0).expect("a connection");
        ask(&mut stream, &client_hello(&[99; 32], 0)).is_ok()
    });
    assert_eq!(stage.daemon.counter(Reason::Released).expect("a counter"), 7);
    assert_eq!(stage.daemon.counter(Reason::BoundMiss).expect("a counter"), 0);
}

#[test]
fn known_sessions_that_wait_for_their_turn_stay_at_home() {
    let service = ["limits.connections_per_second = 4", "limits.over = \"hold\"", TURNS]
        .iter()
        .fold(web().with("miss = \"daemon\""), |service, line| service.with(line));
    let manners = Manners { tickets: true, ..Manners::default() };
    let stage = Stage::new(Plan::default(), "native", &service, manners);
    let routable = || {
        let found: Vec<api::Identity> = stage.daemon.ask(&["identities"]).expect("identities");
        found.iter().all(|one| one.state == "routable")
    };
    until("keys are known", routable);
    for version in [Version::Tls12, Version::Tls13] {
        let user = stage.user(version).with_tickets();
        let home = stage.visit(&user, Family::V4, 0).backend;
        let before = stage.daemon.counter(Reason::Released).expect("a counter");
        for turn in 0..12 {
            let visit = stage.visit(&user, Family::BOTH[turn % 2], turn);
            assert_eq!(
                (visit.backend.as_str(), visit.reused.as_str()),
                (home.as_str(), "r"),
                "{version:?} {turn}"
            );
        }
        let after = stage.daemon.counter(Reason::Released).expect("a counter");
        assert!(after > before + 5, "most had to wait: {before} and {after}");
    }
}

#[test]
fn connections_that_wait_come_in_by_the_weights_of_their_classes() {
    assert_hellos_share(CLASSES, 75.0);
}

#[test]
fn a_ceiling_holds_for_connections_that_wait() {
    assert_hellos_share(&CLASSES.replacen("weight = 3", "weight = 3\nceil = 40", 1), 40.0);
}

/// The part of the first class, percent, of connections that wait for a rate, while both classes want more.
#[track_caller]
fn assert_hellos_share(classes: &str, gold_due: f64) {
    let topology = Topology::new(Plan { backends: 1, ..Plan::default() }).expect("namespaces");
    let authority = Authority::new().expect("certificates");
    let place = &topology.backends[0];
    let _server = Server::start(&place.netns, "b1", PORT, &authority, Manners::default()).expect("a server");
    let service = web()
        .with("miss = \"daemon\"")
        .with(&by_client(&topology))
        .with("limits = { connections_per_second = 60, over = \"hold\" }");
    let text = config(&topology, "native", &[service]) + classes;
    let daemon = Daemon::start_with(&topology.dispatcher, &text).expect("dispatcherd");
    /// Ends the clients, also when the test fails.
    struct End<'s>(&'s AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (stop, counts) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 2]);
    // Each class has more clients than are let in while one waits.
    std::thread::scope(|scope| {
        let end = End(&stop);
        for number in 0..24 {
            let class = number % 2;
            let (topology, authority, stop, counts) = (&topology, &authority, &stop, &counts);
            scope.spawn(move || {
                let user = User::new(authority, Version::Tls13).expect("a user").forgetful();
                let family = Family::BOTH[number / 2 % 2];
                let (from, to) = (topology.client(family, class), SocketAddr::new(family.vip(), PORT));
                while !stop.load(Ordering::Relaxed) {
                    user.visit(&topology.clients, from, to)
                        .unwrap_or_else(|error| panic!("from {from}: {error}"));
                    counts[class].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let read = || [0, 1].map(|class: usize| counts[class].load(Ordering::Relaxed));
        until("nobody comes in", || read().iter().sum::<u64>() >= 40);
        let before = read();
        until("nobody comes in", || read().iter().sum::<u64>() >= before.iter().sum::<u64>() + 160);
        let after = read();
        drop(end);
        let [gold, bronze] = [0, 1].map(|class| (after[class] - before[class]) as f64);
        assert_share(gold / (gold + bronze) * 100.0, gold_due);
    });
    let shares: Vec<api::QosShare> = daemon.ask(&["qos"]).expect("shares");
    let of = |class: &str| shares.iter().find(|one| one.class == class).expect("it was used");
    let (gold, bronze) = (of("gold").admitted as f64, of("bronze").admitted as f64);
    assert!((gold / (gold + bronze) * 100.0 - gold_due).abs() < 12.0, "{shares:?}");
    assert_eq!(daemon.drops().expect("counters"), []);
}

#[test]
fn hellos_of_clients_that_left_take_no_place() {
    let topology = Topology::new(Plan { backends: 1, ..Plan::default() }).expect("namespaces");
    let authority = Authority::new().expect("certificates");
    let place = &topology.backends[0];
    let _server = Server::start(&place.netns, "b1", PORT, &authority, Manners::default()).expect("a server");
    let service = web().with("miss = \"daemon\"").with("limits = { max_connections = 1 }");
    let daemon = Daemon::start_with(&topology.dispatcher, &config(&topology, "native", &[service]));
    let daemon = daemon.expect("dispatcherd");
    let user = User::new(&authority, Version::Tls13).expect("a user").forgetful();
    let ends = |family: Family| (topology.client(family, 0), SocketAddr::new(family.vip(), PORT));
    let connect = |family| user.connect(&topology.clients, ends(family).0, ends(family).1);
    let first = connect(Family::V4).expect("it is alone");
    let shares = || -> Vec<api::QosShare> { daemon.ask(&["qos"]).expect("shares") };
    let leavers: Vec<_> = (0..6_u8)
        .map(|number| {
            let (from, to) = ends(Family::V4);
            let mut stream = sockets::connect(&topology.clients, from, to).expect("a connection");
            stream.write_all(&client_hello(&[number; 32], 0)).expect("sent");
            stream
        })
        .collect();
    until("they wait", || shares().iter().map(|one| one.queued).sum::<u64>() == 6);
    drop((leavers, first));
    // Of the same client they come first.
    let _patient = connect(Family::V4).expect("there is room");
    let sum = |read: fn(&api::QosShare) -> u64| shares().iter().map(read).sum::<u64>();
    assert_eq!((sum(|one| one.cancelled), sum(|one| one.admitted), sum(|one| one.late)), (6, 2, 0));
}

#[test]
fn connections_that_a_class_keeps_for_itself_are_nobody_elses() {
    let topology = Topology::new(Plan { backends: 1, ..Plan::default() }).expect("namespaces");
    let authority = Authority::new().expect("certificates");
    let place = &topology.backends[0];
    let _server = Server::start(&place.netns, "b1", PORT, &authority, Manners::default()).expect("a server");
    let service =
        web().with("miss = \"daemon\"").with(&by_client(&topology)).with("limits = { max_connections = 5 }");
    let text = config(&topology, "native", &[service])
        + &CLASSES.replacen("weight = 3", "weight = 3\nlend = false", 1);
    let _daemon = Daemon::start_with(&topology.dispatcher, &text).expect("dispatcherd");
    let user = User::new(&authority, Version::Tls13).expect("a user").forgetful();
    let connect = |class: usize, family: Family| {
        let (from, to) = (topology.client(family, class), SocketAddr::new(family.vip(), PORT));
        user.connect(&topology.clients, from, to)
    };
    // Three of five are kept: weights are 3, 1 and the default class's 1.
    let others: Vec<_> =
        Family::BOTH.map(|family| connect(1, family).expect("those that are not kept")).into_iter().collect();
    // Those that were let in, and those that were counted.
    for family in Family::BOTH {
        assert!(connect(1, family).is_err(), "a connection of the others");
        std::thread::sleep(Duration::from_millis(1200));
    }
    let kept: Vec<_> = (0..3).map(|turn| connect(0, Family::BOTH[turn % 2]).expect("its own")).collect();
    assert!(connect(0, Family::V4).is_err(), "there are five");
    drop((others, kept));
    until("there is room again", || connect(1, Family::V6).is_ok());
}
