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
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dispatcher_common::reason::Reason;

use crate::{
    bench::{
        report::{Report, Row, median},
        sniff::{Seen, Sniffer},
    },
    daemon::{Daemon, Folder, Process, Service},
    hello,
    netns::Netns,
    packet::flags,
    sockets,
    tls::Authority,
    topology::{Family, Plan, Topology, VIP, cable},
};

const HTTP: u16 = 80;
const HTTPS: u16 = 443;
/// A service whose misses the daemon decides; its backends listen on [`HTTPS`].
const HELD: u16 = 444;
const BACKENDS: u8 = 3;
/// Connections of wrk at a time, to each address that it is sent to.
const PARALLEL: u8 = 4;
/// Address of the client that is on the backends' network.
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 200);
/// No socket waits in TIME_WAIT.
const FORGET: &str = "ipv4/tcp_max_tw_buckets=0";
/// How long one first segment may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Open files: wrk and nginx together need a few hundred.
const FILES: u64 = 20_000;

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
    servers: Vec<Server>,
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
            .map(|(number, place)| Server::start(&place.netns, &format!("b{number}"), authority))
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
                let near = Netns::new("near")?;
                near.sysctl(&[FORGET])?;
                let switch = variant.topology.switch.as_ref().context("no switch")?;
                cable(&near, "eth0", switch, "near")?;
                switch.ip("link set near master br0")?;
                near.ip(&format!("address add {NEAR}/24 dev eth0"))?;
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
        let results = wrks.into_iter().map(Wrk::finish).collect::<Result<Vec<_>>>()?;
        let cpu = self.cpu()? - before;
        let requests: u64 = results.iter().map(|result| result.requests).sum();
        ensure!(requests > 0, "no connection succeeded");
        samples.rate.push(results.iter().map(|result| result.rate).sum());
        samples.failed.push(results.iter().map(|result| result.failed as f64).sum());
        samples.cpu.push(cpu / requests as f64 * 10_000.0);
        samples.drops.extend(self.drops()?.zip(drops).map(|(after, before)| (after - before) as f64));
        let target = targets.first().context("no backend")?;
        let result = self.wrk(*target, effort.seconds, 2, &["--latency"])?.finish()?;
        samples.p50.push(result.p50.context("wrk shows no median")?);
        samples.p99.push(result.p99.context("wrk shows no 99th percentile")?);
        Ok(())
    }

    /// Packets that the dispatcher has dropped so far.
    fn drops(&self) -> Result<Option<u64>> {
        let Some(daemon) = &self.daemon else { return Ok(None) };
        Ok(Some(daemon.drops()?.iter().map(|(_, packets)| packets).sum()))
    }

    fn wrk(&self, target: IpAddr, seconds: u32, connections: u8, more: &[&str]) -> Result<Wrk> {
        let mut command = self.client().command("wrk");
        command.args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}s"), "--timeout", "2s"]);
        command.args(more).arg(format!("http://{}/", SocketAddr::new(target, HTTP)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().context("starting wrk; `cargo xtask setup` says how to get it")?;
        Ok(Wrk(Some(child)))
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

/// A running wrk; it is ended when dropped.
struct Wrk(Option<Child>);

impl Wrk {
    fn finish(mut self) -> Result<WrkResult> {
        let child = self.0.take().context("has ended")?;
        let output = child.wait_with_output().context("waiting for wrk")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "wrk: {}: {}", output.status, errors.trim());
        WrkResult::read(&text).with_context(|| format!("wrk said:\n{text}"))
    }
}

impl Drop for Wrk {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct WrkResult {
    requests: u64,
    rate: f64,
    failed: u64,
    /// Milliseconds.
    p50: Option<f64>,
    p99: Option<f64>,
}

impl WrkResult {
    fn read(text: &str) -> Result<Self> {
        let line = |start: &str| text.lines().map(str::trim).find_map(|line| line.strip_prefix(start));
        let requests =
            text.lines().find_map(|line| line.split_once(" requests in ")).context("no requests")?;
        let rate = line("Requests/sec:").context("no rate")?;
        let numbers = |text: &str| -> u64 {
            text.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u64>().ok()).sum()
        };
        let failed =
            line("Socket errors:").map_or(0, numbers) + line("Non-2xx or 3xx responses:").map_or(0, numbers);
        let percentile = |start| line(start).map(|text| milliseconds(text.trim())).transpose();
        Ok(Self {
            requests: requests.0.trim().parse().context("the number of requests")?,
            rate: rate.trim().parse().context("the rate")?,
            failed,
            p50: percentile("50%")?,
            p99: percentile("99%")?,
        })
    }
}

/// A duration as wrk writes it.
fn milliseconds(text: &str) -> Result<f64> {
    for (unit, factor) in [("us", 0.001), ("ms", 1.0), ("s", 1000.0)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.parse::<f64>().with_context(|| format!("duration {text}"))? * factor);
        }
    }
    bail!("duration {text}")
}

/// An nginx with a small answer on a plain and on a TLS port.
struct Server {
    process: Process,
    _folder: Folder,
}

impl Server {
    fn start(netns: &Netns, name: &str, authority: &Authority) -> Result<Self> {
        let folder = Folder::new()?;
        let credentials = authority.issue(name)?;
        folder.write("certificate.pem", &credentials.certificate_pem)?;
        folder.write("key.pem", &credentials.key_pem)?;
        let path = folder.path().display();
        let text = format!(
            "daemon off;\nmaster_process off;\nworker_processes 1;\nworker_rlimit_nofile {FILES};\n\
             error_log stderr warn;\npid {path}/pid;\n\
             events {{ worker_connections 8192; }}\n\
             http {{\n\
               access_log off;\nkeepalive_requests 100000000;\n\
               client_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\n\
               fastcgi_temp_path {path}/fastcgi;\nuwsgi_temp_path {path}/uwsgi;\nscgi_temp_path {path}/scgi;\n\
               server {{\n\
                 listen {HTTP} backlog=4096;\nlisten {HTTPS} ssl backlog=4096;\n\
                 ssl_certificate {path}/certificate.pem;\nssl_certificate_key {path}/key.pem;\n\
                 ssl_protocols TLSv1.2 TLSv1.3;\n\
                 ssl_session_cache shared:sessions:4m;\nssl_session_tickets off;\n\
                 location / {{ return 200 'ok'; }}\n\
               }}\n\
             }}\n"
        );
        let config = folder.write("nginx.conf", &text)?;
        let mut command = netns.command("nginx");
        command.arg("-p").arg(folder.path()).arg("-c").arg(&config);
        let mut process = Process::start(command, None)
            .context("starting nginx; `cargo xtask setup` says how to get it")?;
        let deadline = Instant::now() + sockets::PATIENCE;
        let local = IpAddr::from([127, 0, 0, 1]);
        while sockets::connect(netns, local, SocketAddr::new(local, HTTPS)).is_err() {
            if let Some(status) = process.ended() {
                bail!("nginx: {status}; it said:\n{}", process.log());
            }
            ensure!(Instant::now() < deadline, "nginx does not listen; it said:\n{}", process.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { process, _folder: folder })
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

/// CPU seconds of children that have been waited for.
fn children() -> f64 {
    // SAFETY: all-zero is a valid rusage, and the call writes one.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// CPU seconds of a process.
fn process(id: u32) -> Result<f64> {
    let path = format!("/proc/{id}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // The name is in parentheses and may hold anything; user and system time are the 12th and 13th
    // field behind it.
    let (_, fields) = text.rsplit_once(')').with_context(|| format!("{path}: {text}"))?;
    let mut ticks = 0_u64;
    for field in fields.split_whitespace().skip(11).take(2) {
        ticks += field.parse::<u64>().with_context(|| format!("{path}: {text}"))?;
    }
    // SAFETY: takes and returns numbers.
    let tick = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / tick as f64)
}

/// The kernel's threads that handle packets when softirqs take too long.
fn packet_threads() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("reading /proc")?;
    let named = entries.flatten().filter(|entry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"))
    });
    Ok(named.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Allows as many open files as the measurement needs; children inherit it.
fn raise_files() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls are given one rlimit.
    let done = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max.min(FILES);
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    ensure!(done, "raising the limit of open files: {}", std::io::Error::last_os_error());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_says_is_read() {
        let text = "Running 1s test @ http://198.51.100.1:80/\n  1 threads and 2 connections\n  \
            Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency   123.45us   67.00us   1.20ms   88.00%\n  \
            Latency Distribution\n     50%  112.00us\n     75%  140.00us\n     90%    0.20ms\n     99%    1.02ms\n  \
            15791 requests in 1.10s, 2.50MB read\n  Socket errors: connect 1, read 2, write 0, timeout 3\n\
            Requests/sec:  14355.10\nTransfer/sec:      2.27MB\n";
        let result = WrkResult::read(text).expect("reads");
        assert_eq!((result.requests, result.failed), (15_791, 6));
        assert_eq!((result.p50, result.p99), (Some(0.112), Some(1.02)));
        assert_eq!(result.rate, 14_355.1);
        assert!(WrkResult::read("").is_err());
        assert!(milliseconds("3 parsecs").is_err());
    }

    #[test]
    fn this_process_has_used_time() {
        assert!(process(std::process::id()).expect("reads") >= 0.0);
        assert!(!packet_threads().expect("reads").is_empty());
    }
}
