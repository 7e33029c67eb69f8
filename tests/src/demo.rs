//! What `dispatcher-demo` does.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write},
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use dispatcher_common::reason::Reason;
use dispatcher_user::api;
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::{
    daemon::{Daemon, Folder, Service, config},
    netns::Netns,
    system::{Nginx, OpensslUser},
    tls::{Authority, Failure, Identity, Manners, Server, User, Version, visit_in_clear},
    topology::{self, Family, Shape, Topology},
};

mod bulk;
mod shop;

use self::shop::Shop;

/// Whose clients and servers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Peers {
    /// rustls on both sides.
    Builtin,
    /// nginx and openssl.
    System,
}

/// What the demo shall do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// How long; `None`: until a signal.
    pub seconds: Option<u64>,
    /// Whose clients and servers.
    pub peers: Peers,
    /// Number of servers.
    pub backends: u8,
    /// New connections a second.
    pub rate: u32,
    /// Where the figures go.
    pub json: Option<PathBuf>,
}

/// The figures at the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Connections that clients opened.
    pub connections: u64,
    /// TLS handshakes that were completed.
    pub handshakes_ok: u64,
    /// TLS handshakes, or TCP connections for one, that failed.
    pub handshakes_failed: u64,
    /// Connections of users who came back with a session: an ID or a ticket.
    pub returning: u64,
    /// Of these, those that reached the server that had issued it.
    pub returning_same_backend: u64,
    /// Connections whose session the server resumed.
    pub resumed: u64,
    /// Connections bound by a known session, as the data path counted them.
    pub hits: u64,
    /// Connections with an unknown identifier, as the data path counted them.
    pub misses: u64,
    /// Packets dropped, as the data path counted them.
    pub drops: u64,
    /// Requests to the service that ends TLS.
    pub requests: u64,
    /// Of these, those that came with the cookie of an earlier one.
    pub shoppers_returning: u64,
    /// Of these, those that reached the same server.
    pub shoppers_same_backend: u64,
}

/// Port of the service and of the servers.
const PORT: u16 = 443;
/// Users; each has a session store of its own.
const USERS: usize = 24;
/// Client addresses of each family.
const ADDRESSES: u8 = 8;
/// Connections that may be under way at the same time.
const WORKERS: usize = 8;
/// After so many visits a user throws its session away and begins anew.
const PATIENT_VISITS: u32 = 25;
/// Seconds between lines where output is no terminal.
const LINE_EVERY: u64 = 5;

/// Runs the demo; false when something went wrong that must not.
pub fn run(plan: &Plan, out: &mut (impl Write + std::os::fd::AsFd)) -> Result<bool> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("waiting for signals")?;
    }
    let shape = topology::Plan {
        shape: Shape::Bridge,
        backends: plan.backends,
        clients: ADDRESSES,
        ..topology::Plan::default()
    };
    let authority = Authority::new()?;
    let topology = Topology::new(shape).context("making the namespaces")?;
    describe(plan, &topology, out)?;
    let _servers = servers(plan.peers, &topology, &authority)?;
    let folder = Folder::new()?;
    let services = [Service::new("web", PORT), shop::service(&folder, &authority)?, bulk::service(&topology)];
    let text = config(&topology, "native", &services) + &bulk::classes();
    let mut daemon = Daemon::start_with(&topology.dispatcher, &text)?;
    writeln!(out, "Look inside: dispatcherctl --socket {} backends\n", daemon.socket().display())?;

    wait_for_keys(&daemon, &stop, out)?;
    shop::wait_for_tunnels(&daemon, &stop, out)?;
    let crowd = Crowd::new(plan, &topology, &authority)?;
    let shop = Shop::new(&topology, &authority)?;
    let _flood = bulk::start(&topology)?;
    let show = std::thread::scope(|scope| {
        let mut workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(|| crowd.work(&stop))).collect();
        workers.push(scope.spawn(|| shop.work(&stop)));
        // Whatever happens here, the workers must end.
        let _end = SetOnDrop(&stop);
        let shown = show(plan, &mut daemon, &crowd, &shop, &stop, out);
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            if worker.join().is_err() {
                bail!("a client's thread panicked");
            }
        }
        shown
    });
    show?;

    let mut summary = crowd.summary(&daemon)?;
    shop.sum(&mut summary);
    let good = report(&summary, &crowd, &shop, out)?;
    if let Some(path) = &plan.json {
        let text = serde_json::to_string_pretty(&summary)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(good)
}

/// Waits until the daemon knows whose ticket keys are whose.
fn wait_for_keys(daemon: &Daemon, stop: &AtomicBool, out: &mut impl Write) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found: Vec<api::Identity> = daemon.ask(&["identities"])?;
        if found.iter().all(|one| one.state == "routable") {
            writeln!(out, "Names of the servers' ticket keys, found out by asking them:")?;
            for one in found {
                writeln!(out, "  {}  {}", one.backend, one.keys.join(", "))?;
            }
            return Ok(writeln!(out)?);
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the servers' ticket keys were not found out: {found:#?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn describe(plan: &Plan, topology: &Topology, out: &mut impl Write) -> Result<()> {
    let [v4, v6] = topology::VIP;
    let (client, server) = match plan.peers {
        Peers::Builtin => ("rustls", "rustls"),
        Peers::System => ("openssl", "nginx"),
    };
    let first = topology.backends.first().context("no backend")?;
    writeln!(
        out,
        "\n  {USERS} users ({client}),          dispatcher                 {} servers ({server}),\n  \
         {} addresses                {v4}:{PORT}            each with its own cache and ticket key\n  \
         10.1.0.10 ..               [{v6}]:{PORT}    b1 {} ..\n\n    \
         clients -------------- cl0  XDP  be0 -------- switch ---- b1, b2, ..\n\n\
         Namespaces: {}, {}, {} ..",
        plan.backends,
        u32::from(ADDRESSES) * 2,
        first.address(Family::V4),
        topology.clients.name(),
        topology.dispatcher.name(),
        first.netns.name(),
    )?;
    writeln!(
        out,
        "Users come back from other ports, addresses and families. What leads them to the server that knows\n\
         them is their session ID (TLS 1.2), or the name of the key in their ticket (TLS 1.2 and 1.3)."
    )?;
    Ok(())
}

/// Servers, of which it matters only that they stop when dropped.
enum Farm {
    Builtin { _servers: Vec<Server> },
    System { _servers: Vec<Nginx> },
}

fn servers(peers: Peers, topology: &Topology, authority: &Authority) -> Result<Farm> {
    let places = topology.backends.iter().enumerate().map(|(i, place)| (format!("b{}", i + 1), &place.netns));
    Ok(match peers {
        Peers::Builtin => Farm::Builtin {
            _servers: places
                .map(|(name, netns)| {
                    let manners = Manners { tickets: true, ..Manners::default() };
                    Server::start(netns, &name, PORT, authority, manners)
                })
                .collect::<Result<_>>()?,
        },
        Peers::System => Farm::System {
            _servers: places
                .map(|(name, netns)| Nginx::with_tickets(netns, &name, PORT, authority, None))
                .collect::<Result<_>>()?,
        },
    })
}

/// All users.
struct Crowd<'a> {
    topology: &'a Topology,
    authority: &'a Authority,
    peers: Peers,
    users: Vec<Mutex<Someone>>,
    ticket: Mutex<Instant>,
    pause: Duration,
    turn: AtomicU64,
    tally: Mutex<Tally>,
}

/// Someone's store and memory.
struct Someone {
    guest: Guest,
    /// The server that issued the session.
    home: Option<String>,
    visits: u32,
}

enum Guest {
    Rustls(User),
    Openssl(OpensslUser),
    InClear,
}

/// What clients have seen.
#[derive(Default)]
struct Tally {
    sum: Summary,
    per_backend: BTreeMap<String, Landed>,
    troubles: Vec<String>,
}

/// What clients have seen of a backend.
#[derive(Clone, Copy, Default)]
struct Landed {
    visits: u64,
    returning: u64,
    home: u64,
    resumed: u64,
}

impl<'a> Crowd<'a> {
    fn new(plan: &Plan, topology: &'a Topology, authority: &'a Authority) -> Result<Self> {
        let users = (0..USERS)
            .map(|number| Ok(Mutex::new(Someone::new(guest(plan.peers, authority, number)?))))
            .collect::<Result<_>>()?;
        Ok(Self {
            topology,
            authority,
            peers: plan.peers,
            users,
            ticket: Mutex::new(Instant::now()),
            pause: Duration::from_secs(1) / plan.rate,
            turn: AtomicU64::new(0),
            tally: Mutex::default(),
        })
    }

    /// Makes connections until told to stop.
    fn work(&self, stop: &AtomicBool) {
        while self.wait_for_ticket(stop) {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            // A fixed walk through users, addresses and families that repeats late.
            let number = turn.wrapping_mul(7) as usize % self.users.len();
            let family = if (turn.wrapping_mul(5) / 7).is_multiple_of(2) { Family::V4 } else { Family::V6 };
            let from = self.topology.client(family, (turn.wrapping_mul(3) / 5) as usize);
            let to = SocketAddr::new(family.vip(), PORT);
            let mut someone = lock(&self.users[number]);
            let result = someone.guest.visit(&self.topology.clients, from, to);
            self.note(&mut someone, result);
            someone.visits += 1;
            if someone.visits >= PATIENT_VISITS
                && let Ok(guest) = guest(self.peers, self.authority, number)
            {
                *someone = Someone::new(guest);
            }
        }
    }

    /// Waits for the next connection's time; false at the end.
    fn wait_for_ticket(&self, stop: &AtomicBool) -> bool {
        let due = {
            let mut ticket = lock(&self.ticket);
            // What could not be kept up with is not made up for.
            *ticket = (*ticket + self.pause).max(Instant::now());
            *ticket
        };
        while !stop.load(Ordering::Relaxed) {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
        false
    }

    fn note(&self, someone: &mut Someone, result: Result<Identity, Failure>) {
        let mut tally = lock(&self.tally);
        let Tally { sum, per_backend, troubles } = &mut *tally;
        sum.connections += 1;
        let secure = !matches!(someone.guest, Guest::InClear);
        if someone.home.is_some() {
            sum.returning += 1;
        }
        let identity = match result {
            Ok(identity) => identity,
            Err(failure) => {
                // Without an answer nobody knows whether it would have been the right one.
                match failure {
                    Failure::Connect(_) | Failure::Handshake(_) => sum.handshakes_failed += 1,
                    Failure::Request(_) => sum.handshakes_ok += u64::from(secure),
                }
                troubles.push(failure.to_string());
                return;
            }
        };
        sum.handshakes_ok += u64::from(secure);
        let landed = per_backend.entry(identity.backend.clone()).or_default();
        landed.visits += 1;
        if identity.reused == "r" {
            sum.resumed += 1;
            landed.resumed += 1;
        }
        if let Some(home) = &someone.home {
            landed.returning += 1;
            if *home == identity.backend {
                sum.returning_same_backend += 1;
                landed.home += 1;
            } else {
                troubles.push(format!("a session of {home} came to {}", identity.backend));
            }
        }
        if secure {
            someone.home = Some(identity.backend);
        }
    }

    fn summary(&self, daemon: &Daemon) -> Result<Summary> {
        let status = daemon.status()?;
        // What is beyond a bandwidth is meant to be dropped.
        let meant = Reason::OverBandwidth.name();
        let drops =
            daemon.drops()?.iter().filter(|(name, _)| name != meant).map(|(_, packets)| packets).sum();
        Ok(Summary { hits: status.hits, misses: status.misses, drops, ..lock(&self.tally).sum })
    }
}

impl Someone {
    fn new(guest: Guest) -> Self {
        Self { guest, home: None, visits: 0 }
    }
}

/// The kind of a user: of eight, two with session IDs and two with tickets of TLS 1.2, three with TLS 1.3
/// and one without TLS.
fn guest(peers: Peers, authority: &Authority, number: usize) -> Result<Guest> {
    let kind = number % 8;
    let version = if matches!(kind, 1 | 4 | 6) { Version::Tls13 } else { Version::Tls12 };
    let tickets = !matches!(kind, 0 | 3);
    Ok(match peers {
        Peers::Builtin if kind == 7 => Guest::InClear,
        Peers::Builtin => {
            let user = User::new(authority, version)?;
            Guest::Rustls(if tickets { user.with_tickets() } else { user })
        }
        Peers::System => {
            let user = OpensslUser::new(authority, version)?;
            Guest::Openssl(if tickets { user.with_tickets() } else { user })
        }
    })
}

impl Guest {
    fn visit(&self, netns: &Netns, from: std::net::IpAddr, to: SocketAddr) -> Result<Identity, Failure> {
        match self {
            Self::Rustls(user) => user.visit(netns, from, to),
            Self::Openssl(user) => user.visit(netns, from, to),
            Self::InClear => visit_in_clear(netns, from, to),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows the table every second until the end.
fn show(
    plan: &Plan,
    daemon: &mut Daemon,
    crowd: &Crowd<'_>,
    shop: &Shop<'_>,
    stop: &AtomicBool,
    out: &mut (impl Write + std::os::fd::AsFd),
) -> Result<()> {
    let live = out.as_fd().is_terminal();
    let begin = Instant::now();
    let end = plan.seconds.map(|seconds| begin + Duration::from_secs(seconds));
    let mut lines_above = 0;
    let mut second = 0;
    while !stop.load(Ordering::Relaxed) && end.is_none_or(|end| Instant::now() < end) {
        let next = begin + Duration::from_secs(second + 1);
        while Instant::now() < next && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
        second += 1;
        if let Some(status) = daemon.process().ended() {
            bail!("dispatcherd: {status}; it said:\n{}", daemon.process().log());
        }
        if live {
            let text = tables(daemon, crowd, shop, second)?;
            if lines_above > 0 {
                write!(out, "\x1b[{lines_above}A\x1b[J")?;
            }
            lines_above = text.lines().count();
            write!(out, "{text}")?;
            out.flush()?;
        } else if second % LINE_EVERY == 0 {
            let status = daemon.status()?;
            let sum = lock(&crowd.tally).sum;
            writeln!(
                out,
                "{second:4} s: {} connections, {} hits, {} misses, {} fresh, {} of {} returning sessions at home, {} failed",
                sum.connections,
                status.hits,
                status.misses,
                status.fresh,
                sum.returning_same_backend,
                sum.returning,
                sum.handshakes_failed
            )?;
            out.flush()?;
        }
    }
    if !live {
        write!(out, "\n{}", tables(daemon, crowd, shop, second)?)?;
    }
    Ok(())
}

/// A table for each service.
fn tables(daemon: &Daemon, crowd: &Crowd<'_>, shop: &Shop<'_>, second: u64) -> Result<String> {
    let web = table(&of_web(daemon)?, crowd, second);
    Ok(format!("{web}\n{}\n{}", shop.table(daemon)?, bulk::table(daemon)?))
}

/// Backends of the service that the data path serves.
fn of_web(daemon: &Daemon) -> Result<Vec<api::Backend>> {
    Ok(daemon.backends()?.into_iter().filter(|one| one.service == "web").collect())
}

/// Left what the data path counts, right what the clients saw.
fn table(backends: &[api::Backend], crowd: &Crowd<'_>, second: u64) -> String {
    let tally = lock(&crowd.tally);
    let mut text = format!(
        "after {second} s  |             counted in XDP               |          seen by the clients\n\
         backend       |  bound    hits  misses   fresh   clear  |  answers  resumed  returning  at home\n"
    );
    for backend in backends {
        let landed = tally.per_backend.get(&backend.name).copied().unwrap_or_default();
        text += &format!(
            "{:<13} |{:7} {:7} {:7} {:7} {:7}  |  {:7}  {:7}  {:9}  {:7}\n",
            format!("{} {}", backend.name, backend.state),
            backend.connections,
            backend.hits,
            backend.misses,
            backend.fresh,
            backend.nonsecure,
            landed.visits,
            landed.resumed,
            landed.returning,
            landed.home
        );
    }
    text
}

fn report(summary: &Summary, crowd: &Crowd<'_>, shop: &Shop<'_>, out: &mut impl Write) -> Result<bool> {
    let Summary { connections, handshakes_ok, handshakes_failed, returning, returning_same_backend, .. } =
        summary;
    writeln!(
        out,
        "\n{connections} connections; {handshakes_ok} handshakes, {handshakes_failed} failed. \
         {returning_same_backend} of {returning} returning sessions reached their own server, {} were resumed.\n\
         XDP: {} hits, {} misses, {} packets dropped.\n\
         shop: {} requests, {} of {} returning sessions reached their own server.",
        summary.resumed,
        summary.hits,
        summary.misses,
        summary.drops,
        summary.requests,
        summary.shoppers_same_backend,
        summary.shoppers_returning
    )?;
    let troubles = [lock(&crowd.tally).troubles.clone(), shop.troubles()].concat();
    for trouble in troubles.iter().take(10) {
        writeln!(out, "trouble: {trouble}")?;
    }
    if troubles.len() > 10 {
        writeln!(out, "... and {} more", troubles.len() - 10)?;
    }
    Ok(troubles.is_empty() && *handshakes_failed == 0 && returning == returning_same_backend)
}
