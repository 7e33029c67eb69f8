//! `affinity`: do returning clients find the server that can resume their session, and how fast?
//!
//! ```text
//! direct         client --- switch --- backends: each user always at one server
//! routed         client --- router, nothing but routes --- switch --- backends: each user always at one server
//! dispatcher     client --- router, the dispatcher in native mode --- switch --- backends
//! haproxy-tcp    client --- router, HAProxy with its session-ID recipe --- switch --- backends
//! nginx-stream   client --- router, nginx stream, round robin --- switch --- backends
//! nft            client --- router, DNAT at random by nftables --- switch --- backends
//! ```
//!
//! Three nginx, each with a session cache and a ticket key of its own. Each variant has namespaces and
//! servers of its own. Then, with the dispatcher only, three servers of each other make.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dispatcher_user::api;

use crate::{
    bench::{
        FORGET,
        report::{Goal, Report, Row, median},
    },
    daemon::{Daemon, Folder, Process, Service},
    netns::Netns,
    servers::{Make, Resumed, Running, Way},
    sockets,
    tls::{Authority, User},
    topology::{Family, NEAR, Plan, Topology, VIP},
};

const PORT: u16 = 443;
const BACKENDS: u8 = 3;
/// Client addresses.
const CLIENTS: u8 = 16;
/// Users of each kind a round, and visits of each after the first.
const USERS: usize = 6;
const RETURNS: usize = 10;
/// Threads that make resuming handshakes.
const THREADS: usize = 6;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Direct,
    Routed,
    Dispatcher,
    Haproxy,
    NginxStream,
    Nft,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Direct, Self::Routed, Self::Dispatcher, Self::Haproxy, Self::NginxStream, Self::Nft];

    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Routed => "routed",
            Self::Dispatcher => "dispatcher",
            Self::Haproxy => "haproxy-tcp",
            Self::NginxStream => "nginx-stream",
            Self::Nft => "nft",
        }
    }
}

/// Measures.
pub fn run(quick: bool) -> Result<Report> {
    let (rounds, seconds) = if quick { (5, 0.4) } else { (5, 3.0) };
    let authority = Authority::new()?;
    let mut variants = Vec::new();
    let mut rows = Vec::new();
    for kind in Kind::ALL {
        match Variant::new(kind, Make::Nginx, &authority) {
            Ok(variant) => variants.push(variant),
            // The others are worth something without it.
            Err(error) if matches!(kind, Kind::Haproxy | Kind::NginxStream) => {
                rows.push(Row::not_run("all", kind.name(), &format!("{error:#}"), "percent"));
            }
            Err(error) => return Err(error.context(kind.name())),
        }
    }
    let mut samples = vec![[const { Samples::NONE }; Way::ALL.len()]; variants.len()];
    for round in 0..rounds {
        for step in 0..variants.len() {
            let at = (round + step) % variants.len();
            let (Some(variant), Some(samples)) = (variants.get(at), samples.get_mut(at)) else { continue };
            for (way, samples) in Way::ALL.into_iter().zip(samples) {
                let what = || format!("{}, {}", variant.kind.name(), way.name);
                samples.percent.push(variant.returning(way, &authority).with_context(what)?);
                samples.rate.push(variant.rate(way, &authority, seconds).with_context(what)?);
            }
        }
    }
    let mut report = report(rows, &variants, &samples);
    drop(variants);
    for make in Make::ALL.into_iter().filter(|make| *make != Make::Nginx) {
        returning_to(make, &authority, &mut report).context(make.name())?;
    }
    Ok(report)
}

/// Rounds with servers of each other make.
const MAKE_ROUNDS: usize = 3;

/// Clients that return through the dispatcher to three servers of a make.
fn returning_to(make: Make, authority: &Authority, report: &mut Report) -> Result<()> {
    let variant = match Variant::new(Kind::Dispatcher, make, authority) {
        Ok(variant) => variant,
        // The others are worth something without it.
        Err(error) => {
            report.rows.push(Row::not_run("all", make.name(), &format!("{error:#}"), "percent"));
            return Ok(());
        }
    };
    for (way, expected) in Way::ALL.into_iter().zip(make.expected().resumed) {
        if expected == Resumed::Unspoken {
            report.rows.push(Row::not_run(way.name, make.name(), "it does not speak that", "percent"));
            continue;
        }
        let rounds = (0..MAKE_ROUNDS).map(|_| variant.returning(way, authority));
        let percent = rounds.collect::<Result<Vec<f64>>>().context(way.name)?;
        report.rows.push(Row::new(
            way.name,
            make.name(),
            "resumed behind the dispatcher",
            "percent",
            &percent,
        ));
        if expected == Resumed::All {
            let goal = format!("{}, {}: percent resumed", way.name, make.name());
            report.goals.push(Goal::at_least(&goal, median(&percent), 100.0));
        }
    }
    Ok(())
}

/// What was measured, one value a round.
#[derive(Clone)]
struct Samples {
    percent: Vec<f64>,
    rate: Vec<f64>,
}

impl Samples {
    const NONE: Self = Self { percent: Vec::new(), rate: Vec::new() };
}

fn report(mut rows: Vec<Row>, variants: &[Variant], samples: &[[Samples; Way::ALL.len()]]) -> Report {
    let of = |kind: Kind, way: usize| {
        let found = variants.iter().zip(samples).find(|(variant, _)| variant.kind == kind);
        found.and_then(|(_, samples)| samples.get(way))
    };
    let mut goals = Vec::new();
    for (at, way) in Way::ALL.iter().enumerate() {
        for (variant, samples) in variants.iter().zip(samples) {
            let Some(samples) = samples.get(at) else { continue };
            rows.push(Row::new(way.name, variant.kind.name(), "resumed", "percent", &samples.percent));
        }
        let percent = of(Kind::Dispatcher, at).map(|samples| median(&samples.percent));
        goals.push(Goal::at_least(&format!("{}: percent resumed", way.name), percent.flatten(), 100.0));
    }
    for (at, way) in Way::ALL.iter().enumerate() {
        let direct = of(Kind::Direct, at).map(|samples| samples.rate.clone()).unwrap_or_default();
        for (variant, samples) in variants.iter().zip(samples) {
            let Some(samples) = samples.get(at) else { continue };
            let name = variant.kind.name();
            rows.push(Row::new(way.name, name, "resuming handshakes a second", "1/s", &samples.rate));
            let ratios: Vec<f64> =
                samples.rate.iter().zip(&direct).map(|(own, direct)| own / direct).collect();
            rows.push(Row::new(way.name, name, "ratio to direct", "ratio", &ratios));
            if variant.kind == Kind::Dispatcher {
                let goal = format!("{}: resuming handshakes a second, to direct", way.name);
                goals.push(Goal::at_least(&goal, median(&ratios), 0.95));
                // What two more devices on the way cost, nobody in between can save.
                let routed = of(Kind::Routed, at).map(|samples| samples.rate.clone()).unwrap_or_default();
                let ratios: Vec<f64> =
                    samples.rate.iter().zip(&routed).map(|(own, routed)| own / routed).collect();
                rows.push(Row::new(way.name, name, "ratio to routed", "ratio", &ratios));
            }
        }
    }
    Report { bench: "affinity", rows, goals }
}

/// Namespaces and servers of one variant.
struct Variant {
    kind: Kind,
    // In the order in which they must end.
    _balancer: Balancer,
    _servers: Vec<Running>,
    near: Option<Netns>,
    topology: Arc<Topology>,
}

/// What stands between clients and servers, kept until the end.
enum Balancer {
    None,
    Dispatcher { _daemon: Box<Daemon> },
    Proxy { _process: Process, _folder: Folder },
}

impl Variant {
    fn new(kind: Kind, make: Make, authority: &Authority) -> Result<Self> {
        let topology = Topology::new(Plan { backends: BACKENDS, clients: CLIENTS, ..Plan::default() })?;
        let servers = (1..)
            .zip(&topology.backends)
            .map(|(n, place)| make.start(&place.netns, &format!("b{n}"), PORT, authority))
            .collect::<Result<Vec<_>>>()?;
        let near = (kind == Kind::Direct).then(|| topology.near()).transpose()?;
        let places = topology.backends.iter().map(|place| &place.netns);
        for netns in places.chain([&topology.clients, &topology.dispatcher]).chain(&near) {
            netns.sysctl(&[FORGET])?;
        }
        let balancer = match kind {
            Kind::Direct | Kind::Routed => Balancer::None,
            Kind::Dispatcher => dispatcher(&topology, make.expected().state)?,
            Kind::Haproxy => haproxy(&topology)?,
            Kind::NginxStream => nginx_stream(&topology)?,
            Kind::Nft => nft(&topology)?,
        };
        Ok(Self { kind, _balancer: balancer, _servers: servers, near, topology: Arc::new(topology) })
    }

    /// Where a user's connection with this number comes from, and goes to.
    fn path(&self, user: usize, visit: usize) -> (IpAddr, SocketAddr) {
        let far = self.topology.client(Family::V4, (user * 5 + visit) % usize::from(CLIENTS));
        let places = &self.topology.backends;
        let own = places.get(user % places.len()).map_or(VIP[0], |place| place.address(Family::V4));
        let (from, to) = match self.kind {
            Kind::Direct => (NEAR.into(), own),
            Kind::Routed => (far, own),
            Kind::Dispatcher | Kind::Haproxy | Kind::NginxStream | Kind::Nft => (far, VIP[0]),
        };
        (from, SocketAddr::new(to, PORT))
    }

    fn clients(&self) -> &Netns {
        self.near.as_ref().unwrap_or(&self.topology.clients)
    }

    /// Percent of the returning connections of some users that were resumed.
    fn returning(&self, way: Way, authority: &Authority) -> Result<f64> {
        let mut resumed = 0;
        for number in 0..USERS {
            let user = way.user(authority)?;
            for visit in 0..=RETURNS {
                let (from, to) = self.path(number, visit);
                let again = user.resumes(self.clients(), from, to)?;
                resumed += u32::from(visit > 0 && again);
            }
        }
        Ok(f64::from(resumed) / (USERS * RETURNS) as f64 * 100.0)
    }

    /// Resuming handshakes a second, of some users who do nothing else.
    fn rate(&self, way: Way, authority: &Authority, seconds: f64) -> Result<f64> {
        let stop = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..THREADS)
            .map(|number| {
                let user = way.user(authority)?;
                let paths: Vec<_> = (0..usize::from(CLIENTS)).map(|visit| self.path(number, visit)).collect();
                let stop = Arc::clone(&stop);
                Ok(self.clients().spawn(move || handshakes(&user, &paths, &stop)))
            })
            .collect::<Result<_>>()?;
        let began = Instant::now();
        std::thread::sleep(Duration::from_secs_f64(seconds));
        stop.store(true, Ordering::Relaxed);
        let mut resumed = 0;
        for worker in workers {
            match worker.join() {
                Ok(found) => resumed += found?,
                Err(_) => bail!("a client's thread panicked"),
            }
        }
        Ok(f64::from(resumed) / began.elapsed().as_secs_f64())
    }
}

/// Connects again and again; how often the session was resumed.
fn handshakes(user: &User, paths: &[(IpAddr, SocketAddr)], stop: &AtomicBool) -> Result<u32> {
    let mut resumed = 0;
    for (from, to) in paths.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let stream = sockets::connect_here(*from, *to)?;
        resumed += u32::from(user.visit_on(stream)?.reused == "r");
    }
    Ok(resumed)
}

/// `state`: what must be known of all ticket keys before it begins.
fn dispatcher(topology: &Topology, state: &str) -> Result<Balancer> {
    let service = Service::new("web", PORT).with("tickets = { server_names = [\"service.test\"] }");
    let daemon = Daemon::start(topology, "native", &[service])?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found: Vec<api::Identity> = daemon.ask(&["identities"])?;
        if found.iter().all(|one| one.state == state) {
            return Ok(Balancer::Dispatcher { _daemon: Box::new(daemon) });
        }
        ensure!(Instant::now() < deadline, "ticket keys were not found out: {found:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn addresses(topology: &Topology) -> Vec<SocketAddr> {
    topology.backends.iter().map(|place| SocketAddr::new(place.address(Family::V4), PORT)).collect()
}

/// HAProxy's session-ID recipe in the form that works: with an inspect delay for the response too.
fn haproxy(topology: &Topology) -> Result<Balancer> {
    let servers: String =
        (1..).zip(addresses(topology)).map(|(n, address)| format!("    server b{n} {address}\n")).collect();
    let text = format!(
        "global\n    maxconn 4000\ndefaults\n    mode tcp\n    timeout connect 5s\n    timeout client 30s\n    \
         timeout server 30s\nfrontend tls\n    bind {}:{PORT}\n    default_backend servers\nbackend servers\n    \
         balance roundrobin\n    stick-table type binary len 32 size 100k expire 30m\n    \
         acl client_hello req_ssl_hello_type 1\n    acl server_hello rep_ssl_hello_type 2\n    \
         tcp-request inspect-delay 5s\n    tcp-request content accept if client_hello\n    \
         tcp-response inspect-delay 5s\n    tcp-response content accept if server_hello\n    \
         stick on payload_lv(43,1) if client_hello\n    \
         stick store-response payload_lv(43,1) if server_hello\n{servers}",
        VIP[0]
    );
    let folder = Folder::new()?;
    let file = folder.write("haproxy.cfg", &text)?;
    let mut command = topology.dispatcher.command("haproxy");
    command.arg("-db").arg("-f").arg(file);
    proxy(topology, Process::start(command, None).context("is haproxy installed?")?, folder)
}

fn nginx_stream(topology: &Topology) -> Result<Balancer> {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    ensure!(std::path::Path::new(MODULE).exists(), "{MODULE} is missing (Debian: libnginx-mod-stream)");
    let servers: String = addresses(topology).iter().map(|address| format!("server {address};\n")).collect();
    let folder = Folder::new()?;
    let text = format!(
        "load_module {MODULE};\ndaemon off;\nmaster_process off;\nerror_log stderr warn;\npid {}/pid;\n\
         events {{ worker_connections 4096; }}\n\
         stream {{\nupstream servers {{\n{servers}}}\nserver {{ listen {}:{PORT}; proxy_pass servers; }}\n}}\n",
        folder.path().display(),
        VIP[0]
    );
    let file = folder.write("nginx.conf", &text)?;
    let mut command = topology.dispatcher.command("nginx");
    command.arg("-p").arg(folder.path()).arg("-c").arg(file);
    proxy(topology, Process::start(command, None).context("is nginx installed?")?, folder)
}

/// Waits until a proxy listens.
fn proxy(topology: &Topology, mut process: Process, folder: Folder) -> Result<Balancer> {
    let deadline = Instant::now() + sockets::PATIENCE;
    while sockets::connect(&topology.dispatcher, VIP[0], SocketAddr::new(VIP[0], PORT)).is_err() {
        if let Some(status) = process.ended() {
            bail!("{status}; it said:\n{}", process.log());
        }
        ensure!(Instant::now() < deadline, "it does not listen; it said:\n{}", process.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Balancer::Proxy { _process: process, _folder: folder })
}

/// DNAT to a backend at random.
fn nft(topology: &Topology) -> Result<Balancer> {
    let map: Vec<String> = (0..)
        .zip(&topology.backends)
        .map(|(n, place)| format!("{n} : {}", place.address(Family::V4)))
        .collect();
    let (vip, map) = (VIP[0], map.join(", "));
    topology.dispatcher.nft(&format!(
        "table ip bench {{
            chain to_backends {{
                type nat hook prerouting priority dstnat;
                ip daddr {vip} tcp dport {PORT} dnat to numgen random mod {BACKENDS} map {{ {map} }};
            }}
        }}"
    ))?;
    topology.dispatcher.sysctl(&["netfilter/nf_conntrack_tcp_timeout_time_wait=1"])?;
    Ok(Balancer::None)
}
