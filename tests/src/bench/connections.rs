//! `connections`: real connections through network namespaces, to three nginx.
//!
//! ```text
//! direct      client --- switch --- backends
//! routed      client --- router, nothing but routes --- switch --- backends
//! nft         client --- router, DNAT at random by nftables --- switch --- backends
//! dispatcher  client --- router, the dispatcher in native mode --- switch --- backends
//! ```
//!
//! Each variant has namespaces and servers of its own, so that nothing of one is left when the next
//! has its turn.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dispatcher_common::reason::Reason;

use crate::{
    bench::{
        FORGET,
        load::{Found, Generator},
        origin::{HTTP, HTTPS, Origin},
        report::{Report, Row, median},
        sniff::{Seen, Sniffer},
        usage::{children, packet_threads, process, raise_files},
    },
    daemon::{Daemon, Service},
    hello,
    netns::Netns,
    packet::flags,
    sockets,
    tls::Authority,
    topology::{Family, NEAR, Plan, Topology, VIP},
};

/// A service whose misses the daemon decides; its backends listen on [`HTTPS`].
const HELD: u16 = 444;
const BACKENDS: u8 = 3;
/// Connections of wrk at a time, to each address that it is sent to.
const PARALLEL: u8 = 4;
/// How long one first segment may take.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy)]
struct Effort {
    rounds: usize,
    /// Of one run of wrk.
    seconds: u32,
    /// First segments of each kind a round.
    hellos: usize,
}

/// Measures.
pub fn run(quick: bool) -> Result<Report> {
    let effort = if quick {
        Effort { rounds: 5, seconds: 1, hellos: 20 }
    } else {
        Effort { rounds: 5, seconds: 4, hellos: 200 }
    };
    raise_files()?;
    let authority = Authority::new()?;
    let mut variants =
        Kind::ALL.into_iter().map(|kind| Variant::new(kind, &authority)).collect::<Result<Vec<_>>>()?;
    for variant in &variants {
        variant.warm_up().with_context(|| format!("{}: the first connections", variant.kind.name()))?;
    }
    let mut samples = vec![Samples::default(); variants.len()];
    let mut hellos = Hellos::default();
    for round in 0..effort.rounds {
        for step in 0..variants.len() {
            let at = (round + step) % variants.len();
            let (Some(variant), Some(samples)) = (variants.get_mut(at), samples.get_mut(at)) else {
                continue;
            };
            variant.measure(samples, effort).with_context(|| variant.kind.name().to_owned())?;
            if variant.daemon.is_some() {
                hellos.add(variant, round, effort.hellos).context("hello -> backend's SYN")?;
            }
        }
    }
    Ok(report(&variants, &samples, &hellos))
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Direct,
    Routed,
    Nft,
    Dispatcher,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Direct, Self::Routed, Self::Nft, Self::Dispatcher];

    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Routed => "routed",
            Self::Nft => "nft",
            Self::Dispatcher => "dispatcher",
        }
    }
}

/// Namespaces and servers of one variant.
struct Variant {
    kind: Kind,
    // In the order in which they must end.
    daemon: Option<Daemon>,
    servers: Vec<Origin>,
    near: Option<Netns>,
    topology: Topology,
}

/// What was measured, one value a round.
#[derive(Clone, Default)]
struct Samples {
    rate: Vec<f64>,
    cpu: Vec<f64>,
    failed: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    /// Packets that the dispatcher dropped.
    drops: Vec<f64>,
}

impl Variant {
    fn new(kind: Kind, authority: &Authority) -> Result<Self> {
        let topology = Topology::new(Plan { backends: BACKENDS, ..Plan::default() })?;
        let servers = (1..)
            .zip(&topology.backends)
            .map(|(number, place)| Origin::start(&place.netns, &format!("b{number}"), authority, false))
            .collect::<Result<Vec<_>>>()?;
        // wrk often closes first: 28k ports toward one address would be used up within two seconds.
        let servers_at = topology.backends.iter().map(|place| &place.netns);
        for netns in servers_at.chain([&topology.clients]) {
            netns.sysctl(&[FORGET])?;
        }
        let mut variant = Self { kind, daemon: None, servers, near: None, topology };
        match kind {
            Kind::Routed => {}
            Kind::Direct => {
                let near = variant.topology.near()?;
                near.sysctl(&[FORGET])?;
                variant.near = Some(near);
            }
            Kind::Nft => variant.translate()?,
            Kind::Dispatcher => {
                let held = Service::new("held", HELD).with("miss = \"daemon\"").backend_port(HTTPS);
                let services = [Service::new("web", HTTP), Service::new("tls", HTTPS), held];
                variant.daemon = Some(Daemon::start(&variant.topology, "native", &services)?);
            }
        }
        Ok(variant)
    }

    /// DNAT to a backend at random.
    fn translate(&self) -> Result<()> {
        let places = (0..).zip(&self.topology.backends);
        let map: Vec<String> =
            places.map(|(number, place)| format!("{number} : {}", place.address(Family::V4))).collect();
        let (vip, map) = (VIP[0], map.join(", "));
        self.topology.dispatcher.nft(&format!(
            "table ip bench {{
                chain to_backends {{
                    type nat hook prerouting priority dstnat;
                    ip daddr {vip} tcp dport {{ {HTTP}, {HTTPS} }} dnat to numgen random mod {BACKENDS} map {{ {map} }};
                }}
            }}"
        ))?;
        // Between rounds the table of ended connections empties itself.
        self.topology.dispatcher.sysctl(&["netfilter/nf_conntrack_tcp_timeout_time_wait=1"])
    }

    fn client(&self) -> &Netns {
        self.near.as_ref().unwrap_or(&self.topology.clients)
    }

    /// Where clients connect to: the backends themselves, or the VIP as often.
    fn targets(&self) -> Vec<IpAddr> {
        let backends = self.topology.backends.iter().map(|place| place.address(Family::V4));
        match self.kind {
            Kind::Direct | Kind::Routed => backends.collect(),
            Kind::Nft | Kind::Dispatcher => backends.map(|_| Family::V4.vip()).collect(),
        }
    }

    /// Neighbours are known and the servers answer before anything is measured.
    fn warm_up(&self) -> Result<()> {
        let from = match self.kind {
            Kind::Direct => NEAR.into(),
            Kind::Routed | Kind::Nft | Kind::Dispatcher => self.topology.client(Family::V4, 0),
        };
        for target in self.targets() {
            let mut stream = sockets::connect(self.client(), from, SocketAddr::new(target, HTTP))?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer.starts_with("HTTP/1.1 200 "), "{target} said {answer}");
        }
        Ok(())
    }

    fn measure(&mut self, samples: &mut Samples, effort: Effort) -> Result<()> {
        let targets = self.targets();
        let (before, drops) = (self.cpu()?, self.drops()?);
        let wrks = targets
            .iter()
            .map(|target| self.wrk(*target, effort.seconds, PARALLEL, &["-H", "Connection: close"]))
            .collect::<Result<Vec<_>>>()?;
        let results =
            wrks.into_iter().map(|wrk| Found::by_wrk(&wrk.finish()?)).collect::<Result<Vec<_>>>()?;
        let cpu = self.cpu()? - before;
        let requests: u64 = results.iter().map(|result| result.requests).sum();
        ensure!(requests > 0, "no connection succeeded");
        samples.rate.push(results.iter().map(|result| result.rate).sum());
        samples.failed.push(results.iter().map(|result| result.failed as f64).sum());
        samples.cpu.push(cpu / requests as f64 * 10_000.0);
        samples.drops.extend(self.drops()?.zip(drops).map(|(after, before)| (after - before) as f64));
        let target = targets.first().context("no backend")?;
        let result = Found::by_wrk(&self.wrk(*target, effort.seconds, 2, &["--latency"])?.finish()?)?;
        samples.p50.push(result.p50.context("wrk shows no median")?);
        samples.p99.push(result.p99.context("wrk shows no 99th percentile")?);
        Ok(())
    }

    /// Packets that the dispatcher has dropped so far.
    fn drops(&self) -> Result<Option<u64>> {
        let Some(daemon) = &self.daemon else { return Ok(None) };
        Ok(Some(daemon.drops()?.iter().map(|(_, packets)| packets).sum()))
    }

    fn wrk(&self, target: IpAddr, seconds: u32, connections: u8, more: &[&str]) -> Result<Generator> {
        let url = format!("http://{}/", SocketAddr::new(target, HTTP));
        Generator::wrk(self.client(), &url, seconds, connections, more)
    }

    /// CPU seconds so far of all whose work is for connections: wrk (those that have ended), nginx,
    /// the daemon, and the kernel's threads for packets that no process is charged with.
    fn cpu(&mut self) -> Result<f64> {
        let daemon = self.daemon.as_mut().map(|daemon| daemon.process().id());
        let servers = self.servers.iter().map(|server| server.process.id());
        let mut seconds = children();
        for id in servers.chain(daemon).chain(packet_threads()?) {
            seconds += process(id)?;
        }
        Ok(seconds)
    }
}

/// Microseconds from a hello that leaves the client to the SYN that reaches the backend: medians of
/// the rounds.
#[derive(Default)]
struct Hellos {
    hit: Vec<f64>,
    miss_table: Vec<f64>,
    miss_daemon: Vec<f64>,
}

impl Hellos {
    fn add(&mut self, variant: &Variant, round: usize, count: usize) -> Result<()> {
        let daemon = variant.daemon.as_ref().context("no daemon")?;
        let topology = &variant.topology;
        let open = |netns: &Netns| netns.run(|| Sniffer::new("eth0")).context("opening a packet socket");
        let probe = Probe {
            topology,
            client: open(&topology.clients)?,
            backends: topology.backends.iter().map(|place| open(&place.netns)).collect::<Result<_>>()?,
        };
        let reasons = [Reason::BoundHit, Reason::BoundMiss, Reason::Held];
        let counters = || reasons.map(|reason| daemon.counter(reason));
        let before = counters();
        let (mut hit, mut miss_table, mut miss_daemon) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..count {
            // A session that nobody knows; then it is known.
            let id = session_id(round, number, 0);
            miss_table.push(probe.run(HTTPS, &id)?);
            hit.push(probe.run(HTTPS, &id)?);
            miss_daemon.push(probe.run(HELD, &session_id(round, number, 1))?);
        }
        for ((before, after), reason) in before.into_iter().zip(counters()).zip(reasons) {
            let counted = after? - before?;
            ensure!(counted == count as u64, "{count} of {reason:?} were expected, {counted} counted");
        }
        self.hit.extend(median(&hit));
        self.miss_table.extend(median(&miss_table));
        self.miss_daemon.extend(median(&miss_daemon));
        Ok(())
    }
}

fn session_id(round: usize, number: usize, kind: u8) -> [u8; 32] {
    let mut id = [0xb1; 32];
    id[..4].copy_from_slice(&((round * 100_000 + number) as u32).to_be_bytes());
    id[4] = kind;
    id
}

struct Probe<'a> {
    topology: &'a Topology,
    client: Sniffer,
    backends: Vec<Sniffer>,
}

impl Probe<'_> {
    /// One connection with a hello; microseconds until its SYN is at a backend.
    fn run(&self, port: u16, id: &[u8]) -> Result<f64> {
        let from = self.topology.client(Family::V4, 0);
        let to = SocketAddr::new(Family::V4.vip(), port);
        let mut stream = sockets::connect(&self.topology.clients, from, to)?;
        let own = stream.local_addr()?.port();
        std::iter::once(&self.client).chain(&self.backends).for_each(Sniffer::drain);
        stream.write_all(&hello::client_hello(id, 0))?;
        let sent = wait(std::slice::from_ref(&self.client), |seen| seen.source == own && seen.payload > 0)
            .context("the hello did not leave")?;
        let arrived = wait(&self.backends, |seen| seen.source == own && seen.flags == flags::SYN)
            .context("no SYN came to a backend")?;
        sockets::reset(stream)?;
        let passed = arrived.at.checked_sub(sent.at).context("the SYN was there before the hello")?;
        Ok(passed.as_secs_f64() * 1e6)
    }
}

/// Waits for a segment at one of several places.
fn wait(sniffers: &[Sniffer], wanted: impl Fn(&Seen) -> bool) -> Result<Seen> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        for sniffer in sniffers {
            while let Some(seen) = sniffer.next() {
                if wanted(&seen) {
                    return Ok(seen);
                }
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    bail!("nothing for {PATIENCE:?}")
}

fn report(variants: &[Variant], samples: &[Samples], hellos: &Hellos) -> Report {
    let (close, keep) = ("plain, a connection a request", "plain, kept alive, 2 connections");
    let direct = variants.iter().zip(samples).find(|(variant, _)| variant.kind == Kind::Direct);
    let direct = direct.map(|(_, samples)| samples.clone()).unwrap_or_default();
    let pairs = |values: &[f64], base: &[f64], join: fn(f64, f64) -> f64| -> Vec<f64> {
        values.iter().zip(base).map(|(value, base)| join(*value, *base)).collect()
    };
    let mut rows = Vec::new();
    let mut add = |values: fn(&Samples) -> Vec<f64>, case: &str, metric: &str, unit| {
        for (variant, samples) in variants.iter().zip(samples) {
            rows.push(Row::new(case, variant.kind.name(), metric, unit, &values(samples)));
        }
    };
    add(|s| s.rate.clone(), close, "connections", "1/s");
    add(|s| s.failed.clone(), close, "failed", "connections");
    add(|s| s.cpu.clone(), close, "CPU per 10k connections", "s");
    add(|s| s.p50.clone(), keep, "p50", "ms");
    add(|s| s.p99.clone(), keep, "p99", "ms");
    for (variant, samples) in variants.iter().zip(samples).filter(|(v, _)| v.kind != Kind::Direct) {
        let name = variant.kind.name();
        let ratio = pairs(&samples.rate, &direct.rate, |own, direct| own / direct);
        rows.push(Row::new(close, name, "connections, ratio to direct", "ratio", &ratio));
        let added = pairs(&samples.cpu, &direct.cpu, |own, direct| own - direct);
        rows.push(Row::new(close, name, "CPU added per 10k connections", "s", &added));
    }
    for (variant, samples) in variants.iter().zip(samples).filter(|(v, _)| v.daemon.is_some()) {
        rows.push(Row::new(close, variant.kind.name(), "dropped", "packets", &samples.drops));
    }
    let metric = "hello at the client -> SYN at the backend";
    for (case, values) in [
        ("session known", &hellos.hit),
        ("session not known, miss = \"table\"", &hellos.miss_table),
        ("session not known, miss = \"daemon\"", &hellos.miss_daemon),
    ] {
        rows.push(Row::new(case, Kind::Dispatcher.name(), metric, "us", values));
    }
    Report { bench: "connections", rows, goals: Vec::new() }
}
