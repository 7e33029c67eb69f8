//! Services that relay TLS through tunnels: to stunnel, HAProxy and nginx, which unwrap it.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::{Daemon, Folder, Process, Service, config},
    netns::Netns,
    packet::{Body, Packet, Tcp, TcpOption, flags},
    tagger::Port,
    tls::{Authority, HOST, Identity, Manners, Server, User, Version},
    topology::{Family, Plan, Topology},
    town::until,
};
use dispatcher_user::api;

/// Port of the service, and of what unwraps the tunnels.
const PORT: u16 = 443;
/// Port of the servers behind them.
const INSIDE: u16 = 8443;
const ESTABLISHED: usize = 4;
/// New sessions go to the backends by turns.
const TURNS: &str = "balance = \"weighted-round-robin\"";

/// Dropped in this order.
struct Scene {
    daemon: Daemon,
    servers: Vec<Server>,
    _fronts: Vec<Process>,
    folder: Folder,
    authority: Authority,
    topology: Topology,
}

/// Starts what ends tunnels in a backend's namespace: by the number of the backend another program.
fn front(number: usize, netns: &Netns, folder: &Path) -> Result<Process> {
    let path = |name: &str| folder.join(format!("{name}{number}"));
    let (pem, file) = (folder.join("front.pem"), path("front"));
    let mut command = match number {
        0 => {
            let text = format!(
                "foreground = yes\npid =\n[front]\naccept = :::{PORT}\nconnect = 127.0.0.1:{INSIDE}\ncert = {}\n",
                pem.display()
            );
            std::fs::write(&file, text)?;
            let mut command = netns.command("stunnel4");
            command.arg(&file);
            command
        }
        1 => {
            let text = format!(
                "global\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
                 listen front\n  bind :::{PORT} v4v6 ssl crt {}\n  server inside 127.0.0.1:{INSIDE}\n",
                pem.display()
            );
            std::fs::write(&file, text)?;
            let mut command = netns.command("haproxy");
            command.arg("-db").arg("-f").arg(&file);
            command
        }
        _ => {
            let mut text = format!(
                "daemon off;\nmaster_process off;\nerror_log stderr warn;\npid {}/pid;\n",
                folder.display()
            );
            if Path::new("/usr/lib/nginx/modules/ngx_stream_module.so").exists() {
                text += "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n";
            }
            write!(
                text,
                "events {{}}\nstream {{\n  server {{\n    listen {PORT} ssl;\n    listen [::]:{PORT} ssl;\n    ssl_certificate {0};\n    \
                 ssl_certificate_key {0};\n    ssl_protocols TLSv1.3;\n    proxy_pass 127.0.0.1:{INSIDE};\n  }}\n}}\n",
                pem.display()
            )?;
            std::fs::write(&file, text)?;
            let mut command = netns.command("nginx");
            command.arg("-p").arg(folder).arg("-c").arg(&file);
            command
        }
    };
    command.env("LC_ALL", "C");
    let mut process = Process::start(command, None)?;
    process.listens(netns, SocketAddr::from(([127, 0, 0, 1], PORT)))?;
    Ok(process)
}

impl Scene {
    /// As soon as tunnels are ready.
    fn new(manners: Manners, lines: &[&str]) -> Self {
        let scene = Self::set(manners, lines).unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
        until("tunnels are ready", || scene.ready() == 3 * ESTABLISHED);
        scene
    }

    fn set(manners: Manners, lines: &[&str]) -> Result<Self> {
        let authority = Authority::new()?;
        let topology = Topology::new(Plan::default())?;
        let folder = Folder::new()?;
        let own = authority.issue("front")?;
        folder.write("front.pem", &format!("{}{}", own.certificate_pem, own.key_pem))?;
        let roots = folder.write("roots.pem", &authority.pem())?;
        let (mut servers, mut fronts) = (Vec::new(), Vec::new());
        for (number, place) in topology.backends.iter().enumerate() {
            let name = format!("b{}", number + 1);
            servers.push(Server::start(&place.netns, &name, INSIDE, &authority, manners)?);
            fronts.push(front(number, &place.netns, folder.path()).with_context(|| name.clone())?);
        }
        let mut service = Service::new("web", PORT)
            .with("mode = \"relay\"")
            .with(&format!("tunnels.roots = \"{}\"", roots.display()))
            .with(&format!("tunnels.server_name = \"{HOST}\""));
        for line in lines {
            service = service.with(line);
        }
        let text = config(&topology, "native", &[service]);
        let daemon = Daemon::start_with(&topology.dispatcher, &text)?;
        Ok(Self { daemon, servers, _fronts: fronts, folder, authority, topology })
    }

    fn tunnels(&self) -> Vec<api::Tunnel> {
        self.daemon.ask(&["tunnels"]).expect("tunnels")
    }

    fn ready(&self) -> usize {
        self.tunnels().iter().filter(|one| one.state == "open").count()
    }

    fn user(&self, version: Version) -> User {
        User::new(&self.authority, version).expect("a user")
    }

    fn visit(&self, user: &User, family: Family, client: usize) -> Identity {
        let (from, to) = (self.topology.client(family, client), SocketAddr::new(family.vip(), PORT));
        user.visit(&self.topology.clients, from, to).unwrap_or_else(|error| panic!("from {from}: {error}"))
    }

    /// Visits of one user, who comes from everywhere: all to one server, and resumed but for the first.
    fn comes_back(&self, user: &User, times: usize) -> String {
        let visits: Vec<_> =
            (0..times).map(|turn| self.visit(user, Family::BOTH[turn % 2], turn / 2)).collect();
        let servers: BTreeSet<_> = visits.iter().map(|one| one.backend.clone()).collect();
        assert_eq!(servers.len(), 1, "one session, several servers: {visits:#?}");
        let reused: String = visits.iter().map(|one| one.reused.as_str()).collect();
        assert_eq!(reused, format!(".{}", "r".repeat(times - 1)), "{visits:#?}");
        servers.into_iter().next().unwrap_or_default()
    }

    fn settled_identities(&self) -> Vec<api::Identity> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let found: Vec<api::Identity> = self.daemon.ask(&["identities"]).expect("identities");
            if found.iter().all(|one| one.state != "pending") {
                return found;
            }
            assert!(Instant::now() < deadline, "{found:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn metric(&self, start: &str) -> u64 {
        let metrics = self.daemon.told(&["metrics"]).expect("metrics");
        let line = metrics.lines().find_map(|line| line.strip_prefix(start));
        line.and_then(|count| count.trim().parse().ok()).unwrap_or_else(|| panic!("{start}: {metrics}"))
    }
}

#[test]
fn claim_c1_c6_c8_c9_sessions_come_home_inside_ready_tunnels() {
    let scene = Scene::new(Manners::default(), &["affinity = \"tls-session-id\"", TURNS]);
    for tunnel in scene.tunnels() {
        assert!(tunnel.cipher_suite.starts_with("TLS13_") && tunnel.requests == 0, "{tunnel:?}");
        assert_eq!((tunnel.destination.port(), tunnel.alpn.as_deref()), (PORT, None), "{tunnel:?}");
    }
    let mut homes = BTreeSet::new();
    for _ in 0..9 {
        homes.insert(scene.comes_back(&scene.user(Version::Tls12), 4));
    }
    assert_eq!(homes.len(), 3, "through stunnel, HAProxy and nginx: {homes:?}");
    // C6: an entry for each session with its backend,
    let sessions = scene.daemon.sessions().expect("sessions");
    let known = sessions.iter().filter(|one| one.kind == "tls-session-id" && one.state == "confirmed");
    assert_eq!(known.clone().count(), 9, "{sessions:#?}");
    assert!(known.clone().all(|one| one.hits >= 3), "{sessions:#?}");
    // and with its tunnel, as long as that is there.
    let user = scene.user(Version::Tls12);
    let home = scene.visit(&user, Family::V4, 0).backend;
    let (from, to) = (scene.topology.client(Family::V6, 1), SocketAddr::new(Family::V6.vip(), PORT));
    let open = user.connect(&scene.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"));
    let used: Vec<_> = scene.tunnels().into_iter().filter(|one| one.state == "used").collect();
    let sessions = scene.daemon.sessions().expect("sessions");
    let own: Vec<_> = sessions.iter().filter(|one| one.tunnel != 0).collect();
    assert_eq!((own.len(), used.len()), (1, 1), "{sessions:#?} {used:#?}");
    assert_eq!((own[0].tunnel, &own[0].backend), (used[0].id, &home));
    assert_eq!((&used[0].backend, used[0].sessions), (&home, 1));
    drop(open);
    // C8: each took one that was ready; others took their places.
    until("the pool is full again", || scene.ready() == 3 * ESTABLISHED);
    assert_eq!(scene.metric("dispatcher_clients_total{service=\"web\"} "), 38);
}

#[test]
fn claim_c2_tickets_lead_home_through_tunnels() {
    let scene = Scene::new(Manners { tickets: true, ..Manners::default() }, &[TURNS]);
    // Asked for through the tunnels: the backends' own port is the front's.
    let found = scene.settled_identities();
    assert!(found.iter().all(|one| one.state == "routable"), "{found:#?}");
    let mut homes = BTreeSet::new();
    for version in Version::BOTH {
        for _ in 0..4 {
            homes.insert(scene.comes_back(&scene.user(version).with_tickets(), 4));
        }
    }
    assert!(homes.len() > 1, "{homes:?}");
}

#[test]
fn servers_are_told_of_clients_and_lost_ones_are_left_alone() {
    let proxied = Manners { proxy: true, ..Manners::default() };
    let mut scene = Scene::new(
        proxied,
        &["proxy_protocol = \"v2\"", "affinity = [\"tls-session-id\", \"client-address\"]"],
    );
    let user = scene.user(Version::Tls12);
    for (turn, family) in Family::BOTH.into_iter().enumerate() {
        let seen = scene.visit(&user, family, turn);
        let told: SocketAddr = seen.proxied.parse().expect("an address");
        assert_eq!(told.ip(), scene.topology.client(family, turn));
    }
    // A client that says nothing that can be known is kept by its address.
    let stranger = |scene: &Scene| scene.visit(&scene.user(Version::Tls13), Family::V4, 5).backend;
    let home = stranger(&scene);
    for _ in 0..4 {
        assert_eq!(stranger(&scene), home);
    }
    // Its front goes: tunnels fail, and its clients are served elsewhere.
    let number: usize = home.trim_start_matches('b').parse().expect("a number");
    let gone = scene._fronts.remove(number - 1);
    drop(gone);
    until("its tunnels are gone", || scene.tunnels().iter().all(|one| one.backend != home));
    let other = stranger(&scene);
    assert_ne!(other, home);
    assert_eq!(stranger(&scene), other);
    assert!(scene.servers.iter().any(|one| one.name == other));
}

#[test]
fn whole_bodies_pass_and_a_reload_changes_nothing_of_them() {
    let scene = Scene::new(Manners::default(), &["max_connections = 2"]);
    let user = scene.user(Version::Tls13);
    let (from, to) = (scene.topology.client(Family::V4, 1), SocketAddr::new(Family::V4.vip(), PORT));
    let mut line = user.connect(&scene.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"));
    dispatcher_tests::http::download(&mut line, 20 << 20).expect("a download");
    let used = scene.tunnels().into_iter().find(|one| one.state == "used").expect("it has a tunnel");
    assert!(used.received_bytes > 20 << 20 && used.in_flight == 1, "{used:?}");
    dispatcher_tests::http::upload(&mut line, 5 << 20).expect("an upload");
    scene.daemon.told(&["reload"]).expect("a reload");
    dispatcher_tests::http::download(&mut line, 1 << 20).expect("a download");
    // There may be two; the third is closed at once.
    let _second = user.connect(&scene.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"));
    assert!(user.connect(&scene.topology.clients, from, to).is_err());
    assert_eq!(scene.metric("dispatcher_clients_refused_total{service=\"web\",reason=\"limit\"} "), 1);
    // The operator ends one.
    let _: Vec<api::Tunnel> = scene.daemon.ask(&["tunnels", "close", &used.id.to_string()]).expect("closed");
    assert!(dispatcher_tests::http::get(&mut line, "/").is_err());
    assert!(scene.folder.path().exists());
}

#[test]
fn a_drain_waits_for_connections_and_offline_ends_them() {
    let scene = Scene::new(Manners::default(), &["affinity = \"tls-session-id\""]);
    let user = scene.user(Version::Tls12);
    let (from, to) = (scene.topology.client(Family::V4, 1), SocketAddr::new(Family::V4.vip(), PORT));
    let mut line = user.connect(&scene.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"));
    let home: Identity =
        serde_json::from_str(&dispatcher_tests::http::get(&mut line, "/").expect("an answer")).expect("JSON");
    let name = format!("web/{}", home.backend);
    let open = || {
        let found: Vec<api::Backend> = scene.daemon.ask(&["backend", &name]).expect("a backend");
        found[0].open
    };
    assert_eq!(open(), Some(1));
    // The connection outlives the wait, so its deadline ends it.
    let begun = Instant::now();
    let told = scene.daemon.told(&["backend", &name, "drain", "--deadline", "2s", "--wait"]);
    let said = format!("{told:?}");
    assert!(begun.elapsed() >= Duration::from_millis(1500) && said.contains('1'), "{said}");
    until("it has ended", || open() == Some(0));
    assert!(dispatcher_tests::http::get(&mut line, "/").is_err());
    let other = scene.visit(&user, Family::V4, 1);
    assert_ne!(other.backend, home.backend);
}

#[test]
fn a_flood_of_syns_does_not_keep_clients_out() {
    let scene = Scene::new(Manners::default(), &["affinity = \"tls-session-id\"", TURNS]);
    let cookies = |value: &str| {
        let setting = format!("net.ipv4.tcp_syncookies={value}");
        scene.topology.dispatcher.execute("sysctl", &["-q", "-w", &setting]).expect("a setting");
    };
    let count = |reason| scene.daemon.counter(reason).expect("a counter");
    // All SYNs are answered with cookies: handshakes and what follows them are as without.
    cookies("2");
    let home = scene.comes_back(&scene.user(Version::Tls12), 6);
    assert!(!home.is_empty());
    assert_eq!(count(Reason::SynCookie), 6);
    cookies("1");
    let _ = scene.comes_back(&scene.user(Version::Tls12), 4);
    assert_eq!(count(Reason::SynCookie), 6, "nobody is in need");
    // More than the queue holds, of clients who never answer.
    let backlog = 4096;
    for family in Family::BOTH {
        let flood = Flood::new(&scene.topology, family).expect("a packet socket");
        flood.send(backlog + 3000).expect("SYNs");
        until("cookies are given", || count(Reason::SynCookie) > 6);
        let before = count(Reason::SynCookie);
        let user = scene.user(Version::Tls12);
        let first = scene.visit(&user, family, 1);
        let again = scene.visit(&user, family, 2);
        assert_eq!((&first.backend, again.reused.as_str()), (&again.backend, "r"), "{family:?}");
        assert_eq!(count(Reason::SynCookie), before + 2, "{family:?}");
    }
    assert!(count(Reason::ToDaemon) > 100);
}

/// An address that nobody has.
fn ghost(family: Family) -> IpAddr {
    family.of([[10, 1, 0, 200].into(), [0x2001, 0xdb8, 1, 0, 0, 0, 0, 0xdead].into()])
}

/// SYNs to the service from clients who are not there.
struct Flood {
    port: Port,
    family: Family,
    macs: [[u8; 6]; 2],
}

impl Flood {
    fn new(topology: &Topology, family: Family) -> Result<Self> {
        let mac = |netns: &Netns, link: &str| -> Result<[u8; 6]> {
            let text = netns.execute("ip", &["-o", "link", "show", "dev", link])?;
            let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether").skip(1);
            let bytes = words.next().context("no MAC")?.split(':').map(|byte| u8::from_str_radix(byte, 16));
            bytes.collect::<Result<Vec<_>, _>>()?.try_into().ok().context("a MAC has six bytes")
        };
        let macs = [mac(&topology.dispatcher, "cl0")?, mac(&topology.clients, "eth0")?];
        let port = topology.clients.run(|| Port::open("eth0"))?;
        // Answers are sent, and nobody takes them.
        let mac = macs[1].map(|byte| format!("{byte:02x}")).join(":");
        topology
            .dispatcher
            .ip(&format!("neighbour add {} lladdr {mac} dev cl0 nud permanent", ghost(family)))?;
        Ok(Self { port, family, macs })
    }

    fn send(&self, count: u16) -> Result<()> {
        for number in 0..count {
            let options = vec![TcpOption::Mss(1460)];
            let syn = Tcp { src: 1024 + number, dst: PORT, flags: flags::SYN, options, ..Tcp::default() };
            let packet = Packet::new(ghost(self.family), self.family.vip(), Body::Tcp(syn));
            self.port.send(&Packet { macs: self.macs, ..packet }.frame());
            if number % 64 == 0 {
                // As fast as the link's queue is emptied.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}

#[test]
fn at_the_daemons_end_what_is_under_way_goes_on_for_a_while() {
    let mut scene = Scene::new(Manners::default(), &[]);
    let user = scene.user(Version::Tls13);
    let connect = |client| {
        let (from, to) = (scene.topology.client(Family::V4, client), SocketAddr::new(Family::V4.vip(), PORT));
        user.connect(&scene.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"))
    };
    let (mut busy, mut idle) = (connect(0), connect(1));
    for line in [&mut busy, &mut idle] {
        dispatcher_tests::http::get(line, "/").expect("an answer");
    }
    scene.daemon.process().signal(libc::SIGTERM);
    let began = Instant::now();
    let ended = std::thread::spawn(move || {
        let _ = std::io::Read::read(&mut idle, &mut [0; 64]);
        began.elapsed()
    });
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(250));
        dispatcher_tests::http::get(&mut busy, "/").expect("it is under way");
    }
    let ended = ended.join().expect("it ends");
    assert!(ended < Duration::from_millis(2500), "who says nothing is not waited for: {ended:?}");
    let status = scene.daemon.process().wait(Duration::from_secs(8)).expect("it ends");
    assert!(status.success(), "{status}");
    assert!(dispatcher_tests::http::get(&mut busy, "/").is_err());
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    let scene = Scene::new(Manners::default(), &[]);
    let from = scene.topology.client(Family::V4, 1);
    let to = SocketAddr::new(Family::V4.vip(), PORT);
    let mut silent =
        dispatcher_tests::sockets::connect(&scene.topology.clients, from, to).expect("a connection");
    let mut byte = [0];
    silent.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    assert_eq!(std::io::Read::read(&mut silent, &mut byte).expect("its end"), 0);
    assert_eq!(scene.metric("dispatcher_clients_refused_total{service=\"web\",reason=\"timeout\"} "), 1);
    // It took no tunnel.
    assert!(scene.tunnels().iter().all(|one| one.requests == 0));
}
