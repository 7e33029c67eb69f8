//! `qos`: whether shares follow weights while a server is saturated, and what that costs.
//!
//! ```text
//! bandwidth    UDP senders, one a class, at twice their share each -- l4 service with a bandwidth -- one backend
//! streams      TCP senders, some connections a class -- the same
//! requests     wrk, one a class -- mode = "terminate" with max_inflight -- nginx that answers at a fixed rate
//! haproxy      the same through HAProxy: set-priority-class, maxconn
//! hellos       TLS clients that connect again and again -- passthrough, over = "hold" -- one backend
//! ```
//!
//! The path of an established packet is measured by `fastpath`.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum as _;

use crate::{
    bench::{
        FORGET,
        load::{Found, Generator},
        origin::{HTTPS, Origin},
        report::{Goal, Report, Row, median},
    },
    daemon::{Daemon, Folder, Process, Service, config},
    http,
    netns::Netns,
    sockets,
    tls::{Authority, HOST, User, Version},
    topology::{Family, Plan, Topology, VIP},
};

/// Bits a second that the backend of the first part takes.
const BANDWIDTH: u64 = 100_000_000;
/// Bytes of a datagram, and those of Ethernet, IPv4 and UDP before it.
const DATAGRAM: usize = 1400;
const HEADERS: u64 = 42;
/// Port of the UDP service.
const UDP: u16 = 9000;
/// Port of the TCP service, and connections of each class to it.
const TCP: u16 = 9001;
const STREAMS: [usize; 3] = [1, 4, 16];
/// Requests a second that the server answers, and that it is given at a time.
const CAPACITY: u32 = 1000;
const INFLIGHT: u32 = 8;
/// Connections of one wrk: more than its class's share of those at a time.
const CONNECTIONS: u8 = 32;
/// New connections a second, and threads of each class that want some.
const RATE: u32 = 200;
const THREADS: usize = 12;

/// A new weight acts once a time of this length has shares within so much of it.
const WINDOW: Duration = Duration::from_millis(50);
const NEAR: f64 = 0.1;

const NAMES: [&str; 3] = ["gold", "silver", "bronze"];

#[derive(Clone, Copy)]
struct Effort {
    rounds: usize,
    seconds: u32,
}

/// What can be measured alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Part {
    /// Bytes of UDP, by the data path
    Bandwidth,
    /// The same of TCP
    Streams,
    /// Requests in flight, also through HAProxy
    Requests,
    /// Hellos that are held
    Hellos,
}

/// Measures all parts, or only one.
pub fn run(quick: bool, only: Option<Part>) -> Result<Report> {
    let effort = if quick { Effort { rounds: 1, seconds: 2 } } else { Effort { rounds: 3, seconds: 5 } };
    let mut found = Samples::default();
    for _ in 0..effort.rounds {
        for weights in [&[8, 1][..], &[5, 3, 1]] {
            for part in Part::value_variants().iter().filter(|part| only.is_none_or(|only| only == **part)) {
                match part {
                    Part::Bandwidth => bandwidth(effort, weights, &mut found)?,
                    Part::Streams => {
                        for connections in STREAMS {
                            for who in [Senders::All, Senders::Kept, Senders::Last] {
                                streams(effort, weights, who, connections, &mut found)?;
                            }
                        }
                    }
                    Part::Requests => requests(effort, weights, &mut found)?,
                    Part::Hellos => hellos(effort, weights, &mut found)?,
                }
            }
        }
    }
    Ok(found.report())
}

/// Values of rounds by case, subject, metric and unit; and what should be reached.
#[derive(Default)]
struct Samples {
    values: BTreeMap<(String, String, String, &'static str), Vec<f64>>,
    order: Vec<(String, String, String, &'static str)>,
    goals: Vec<Wanted>,
}

/// A value that should be reached in the median.
struct Wanted {
    key: (String, String, String, &'static str),
    limit: f64,
    most: bool,
}

impl Samples {
    fn add(&mut self, case: &str, subject: &str, metric: &str, unit: &'static str, value: f64) {
        let key = (case.to_owned(), subject.to_owned(), metric.to_owned(), unit);
        if !self.values.contains_key(&key) {
            self.order.push(key.clone());
        }
        self.values.entry(key).or_default().push(value);
    }

    /// Adds a value that has a goal.
    fn wanted(
        &mut self,
        (case, subject, metric, unit): (&str, &str, &str, &'static str),
        value: f64,
        limit: f64,
        most: bool,
    ) {
        let key = (case.to_owned(), subject.to_owned(), metric.to_owned(), unit);
        if !self.values.contains_key(&key) {
            self.goals.push(Wanted { key, limit, most });
        }
        self.add(case, subject, metric, unit, value);
    }

    /// Shares beside weights: rows, and the largest deviation, percent of the share that the weight gives.
    fn shares(&mut self, case: &str, subject: &str, weights: &[u32], amounts: &[f64], goal: bool) {
        let (all, sum) = (amounts.iter().sum::<f64>(), weights.iter().sum::<u32>());
        let worst = deviation(weights, amounts).unwrap_or(f64::NAN) * 100.0;
        for ((name, weight), amount) in NAMES.iter().zip(weights).zip(amounts) {
            let (share, due) = (amount / all, f64::from(*weight) / f64::from(sum));
            self.add(
                case,
                subject,
                &format!("{name}: share, weight gives {:.1}", due * 100.0),
                "%",
                share * 100.0,
            );
        }
        let metric = "largest deviation from the weights";
        if goal {
            self.wanted((case, subject, metric, "%"), worst, 5.0, true);
        } else {
            self.add(case, subject, metric, "%", worst);
        }
    }

    fn report(&self) -> Report {
        let rows = self.order.iter().filter_map(|key| {
            let (case, subject, metric, unit) = key;
            Some(Row::new(case, subject, metric, unit, self.values.get(key)?))
        });
        let goals = self.goals.iter().map(|Wanted { key, limit, most }| {
            let (case, subject, metric, _) = key;
            let (name, value) =
                (format!("{case}: {subject}: {metric}"), self.values.get(key).and_then(|all| median(all)));
            if *most { Goal::at_most(&name, value, *limit) } else { Goal::at_least(&name, value, *limit) }
        });
        Report { bench: "qos", rows: rows.collect(), goals: goals.collect() }
    }
}

/// Classes by weights, in the words of the file.
fn classes(weights: &[u32]) -> String {
    NAMES
        .iter()
        .zip(weights)
        .map(|(name, weight)| format!("\n[[class]]\nname = \"{name}\"\nweight = {weight}\n"))
        .collect()
}

/// A rule for each client address.
fn by_client(topology: &Topology, weights: &[u32]) -> String {
    let rule = |(number, name): (usize, &&str)| {
        format!("{{ class = \"{name}\", clients = \"{}\" }}", topology.client(Family::V4, number))
    };
    let rules: Vec<String> = NAMES.iter().take(weights.len()).enumerate().map(rule).collect();
    format!("classify = [{}]", rules.join(", "))
}

fn named(weights: &[u32]) -> String {
    weights.iter().map(u32::to_string).collect::<Vec<_>>().join(":")
}

fn place() -> Result<Topology> {
    Topology::new(Plan { backends: 1, ..Plan::default() })
}

/// Threads that work until this is dropped.
#[derive(Default)]
struct Workers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Workers {
    fn start(&mut self, netns: &Netns, work: impl FnOnce(&AtomicBool) -> Result<()> + Send + 'static) {
        let stop = Arc::clone(&self.stop);
        self.threads.push(netns.spawn(move || work(&stop)));
    }

    /// Ends them; the first failure is told.
    fn end(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("a thread of the measurement panicked"),
            }
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// (a), (b): bytes by the policer of the data path.
fn bandwidth(effort: Effort, weights: &[u32], found: &mut Samples) -> Result<()> {
    let topology = place()?;
    let service = Service::new("sink", UDP)
        .with("protocol = \"udp\"")
        .with("mode = \"l4\"")
        .with(&by_client(&topology, weights))
        .with(&format!("limits = {{ bandwidth = \"{}bit/s\" }}", BANDWIDTH));
    let text = config(&topology, "native", &[service]) + &classes(weights);
    let daemon = Daemon::start_with(&topology.dispatcher, &text)?;
    let place = topology.backends.first().context("a backend")?;
    let counts = Arc::new(Mutex::new(BTreeMap::<IpAddr, Vec<Instant>>::new()));
    let mut sink = Workers::default();
    let (address, noted) = (SocketAddr::new(place.address(Family::V4), UDP), Arc::clone(&counts));
    let (ready, is_ready) = std::sync::mpsc::channel();
    sink.start(&place.netns, move |stop| {
        let socket = UdpSocket::bind(address)?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let _ = ready.send(());
        let mut buffer = [0; 2048];
        while !stop.load(Ordering::Relaxed) {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let mut counts = noted.lock().unwrap_or_else(PoisonError::into_inner);
                ensure!(length == DATAGRAM, "a datagram of {length} bytes");
                counts.entry(from.ip()).or_default().push(Instant::now());
            }
        }
        Ok(())
    });
    is_ready.recv().context("the sink did not start")?;
    let sum: u32 = weights.iter().sum();
    let received = |seconds: u32| {
        // The bucket's burst is over.
        sleep(Duration::from_millis(700));
        let began = Instant::now();
        sleep(Duration::from_secs(seconds.into()));
        rates(&counts, &topology, weights.len(), began, began.elapsed())
    };
    // Twice what the weights give.
    let mut senders = Workers::default();
    for (number, weight) in weights.iter().enumerate() {
        let rate = 2 * BANDWIDTH * u64::from(*weight) / u64::from(sum);
        send(&mut senders, &topology, number, rate);
    }
    let case = format!("(a) bandwidth, weights {}", named(weights));
    let rates_by_weights = received(effort.seconds);
    senders.end()?;
    // Each sends all that there is: none has less than any weight gives.
    let mut senders = Workers::default();
    (0..weights.len()).for_each(|number| send(&mut senders, &topology, number, BANDWIDTH));
    // The burst of the bucket is over, and all senders are there.
    sleep(Duration::from_secs(1));
    let turned = weights.iter().rev().copied().collect::<Vec<u32>>();
    let began = Instant::now();
    for (name, weight) in NAMES.iter().zip(&turned) {
        daemon.told(&["qos", "weight", name, &weight.to_string()])?;
    }
    // Of which the last one is what all wait for.
    let said = began.elapsed();
    let deadline = Instant::now() + Duration::from_secs(2);
    let acts = loop {
        ensure!(Instant::now() < deadline, "new weights do not act");
        sleep(WINDOW);
        let steps = (0..).map(|step| Duration::from_millis(5) * step);
        let seen = steps.take_while(|step| began + *step + WINDOW < Instant::now()).find(|step| {
            let rates = rates(&counts, &topology, weights.len(), began + *step, WINDOW);
            deviation(&turned, &rates).is_some_and(|deviation| deviation < NEAR)
        });
        if let Some(step) = seen {
            break step;
        }
    };
    senders.end()?;
    found.shares(&case, "dispatcher", weights, &rates_by_weights, true);
    let used = rates_by_weights.iter().sum::<f64>() / BANDWIDTH as f64 * 100.0;
    found.add(&case, "dispatcher", "of the bandwidth, used", "%", used);
    let metric = "the last of the weights is said by the command line";
    found.add(&case, "dispatcher", metric, "ms", said.as_secs_f64() * 1e3);
    let metric = "all weights turned round act, since the first was said";
    found.wanted((&case, "dispatcher", metric, "ms"), acts.as_secs_f64() * 1e3, 100.0, true);
    // Only the last class, which has the least.
    let last = weights.len() - 1;
    let mut alone = Workers::default();
    send(&mut alone, &topology, last, 2 * BANDWIDTH);
    let rates = received(effort.seconds);
    alone.end()?;
    sink.end()?;
    let case = format!("(b) one class alone, weights {}", named(weights));
    let used = rates.get(last).copied().unwrap_or(0.0) / BANDWIDTH as f64 * 100.0;
    found.wanted((&case, "dispatcher", "of the bandwidth, used", "%"), used, 95.0, false);
    Ok(())
}

/// Who sends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Senders {
    All,
    /// All, and none may take what others leave.
    Kept,
    /// Only the last class, which has the least.
    Last,
}

/// (a) and (b) for TCP, which makes room when it loses frames: connections that always have something to send.
fn streams(
    effort: Effort,
    weights: &[u32],
    who: Senders,
    connections: usize,
    found: &mut Samples,
) -> Result<()> {
    let first = if who == Senders::Last { weights.len() - 1 } else { 0 };
    let topology = place()?;
    let service = Service::new("sink", TCP)
        .with("mode = \"l4\"")
        .with(&by_client(&topology, weights))
        .with(&format!("limits = {{ bandwidth = \"{}bit/s\" }}", BANDWIDTH));
    let mut classes = classes(weights);
    if who == Senders::Kept {
        classes = classes.replace("\nweight", "\nborrow_limit = 0\nweight");
    }
    let text = config(&topology, "native", &[service]) + &classes;
    let _daemon = Daemon::start_with(&topology.dispatcher, &text)?;
    let place = topology.backends.first().context("a backend")?;
    let listener = sockets::listen(&place.netns, TCP)?;
    let counts: Vec<Arc<AtomicU64>> = weights.iter().map(|_| Arc::default()).collect();
    let (mut sink, mut senders) = (Workers::default(), Workers::default());
    for (number, count) in counts.iter().enumerate().skip(first) {
        let from = topology.client(Family::V4, number);
        for _ in 0..connections {
            let mut sender = sockets::connect(&topology.clients, from, SocketAddr::new(VIP[0], TCP))?;
            let (mut receiver, _) = listener.accept()?;
            for socket in [&sender, &receiver] {
                socket.set_read_timeout(Some(Duration::from_millis(50)))?;
                socket.set_write_timeout(Some(Duration::from_millis(50)))?;
            }
            let count = Arc::clone(count);
            sink.start(&place.netns, move |stop| {
                let mut buffer = vec![0; 64 << 10];
                while !stop.load(Ordering::Relaxed) {
                    // Bytes that came are those of sequence; what is sent again counts once.
                    match receiver.read(&mut buffer) {
                        // The sender's end; another is his failure.
                        Ok(0) => break,
                        Ok(length) => drop(count.fetch_add(length as u64, Ordering::Relaxed)),
                        Err(error) => ensure!(error.kind() == ErrorKind::WouldBlock, "reading: {error}"),
                    }
                }
                Ok(())
            });
            senders.start(&topology.clients, move |stop| {
                let piece = vec![7; 64 << 10];
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = sender.write(&piece) {
                        ensure!(error.kind() == ErrorKind::WouldBlock, "writing: {error}");
                    }
                }
                Ok(())
            });
        }
    }
    sleep(Duration::from_secs(1));
    let seen = || counts.iter().map(|count| count.load(Ordering::Relaxed) as f64).collect::<Vec<_>>();
    let (began, before) = (Instant::now(), seen());
    sleep(Duration::from_secs(effort.seconds.into()));
    let (took, after) = (began.elapsed(), seen());
    let came: Vec<f64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    senders.end()?;
    sink.end()?;
    let each = if connections == 1 { "connection" } else { "connections" };
    let what = match who {
        Senders::All => "a class",
        Senders::Kept => "a class that borrows nothing",
        Senders::Last => "of one class alone",
    };
    let case = format!("TCP, {connections} {each} {what}, weights {}", named(weights));
    if who != Senders::Last {
        found.shares(&case, "dispatcher", weights, &came, false);
    }
    let used = came.iter().sum::<f64>() * 8.0 / took.as_secs_f64() / BANDWIDTH as f64 * 100.0;
    found.add(&case, "dispatcher", "of the bandwidth, payload", "%", used);
    Ok(())
}

/// Bits a second that came from each client.
fn rates(
    counts: &Mutex<BTreeMap<IpAddr, Vec<Instant>>>,
    topology: &Topology,
    clients: usize,
    from: Instant,
    time: Duration,
) -> Vec<f64> {
    let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    let of = |number| {
        let all = counts.get(&topology.client(Family::V4, number)).map_or(&[][..], Vec::as_slice);
        let count = |end: Instant| all.partition_point(|at| *at < end) as f64;
        let bits = (DATAGRAM as u64 + HEADERS) as f64 * 8.0;
        (count(from + time) - count(from)) * bits / time.as_secs_f64()
    };
    (0..clients).map(of).collect()
}

/// The largest deviation of amounts from weights, as a part of what the weight gives. None where nothing came.
fn deviation(weights: &[u32], amounts: &[f64]) -> Option<f64> {
    let (all, sum) = (amounts.iter().sum::<f64>(), weights.iter().sum::<u32>());
    let due = |weight: &u32| f64::from(*weight) / f64::from(sum);
    let each = weights.iter().zip(amounts).map(|(weight, amount)| (amount / all / due(weight) - 1.0).abs());
    (all > 0.0).then(|| each.fold(0.0, f64::max))
}

/// Sends datagrams from a client at a rate.
fn send(workers: &mut Workers, topology: &Topology, number: usize, rate: u64) {
    let from = topology.client(Family::V4, number);
    workers.start(&topology.clients, move |stop| {
        let socket = UdpSocket::bind(SocketAddr::new(from, 0))?;
        socket.connect(SocketAddr::new(VIP[0], UDP))?;
        let datagram = [7; DATAGRAM];
        let bits = (DATAGRAM as u64 + HEADERS) * 8;
        let (began, mut sent) = (Instant::now(), 0_u64);
        while !stop.load(Ordering::Relaxed) {
            let due = (began.elapsed().as_secs_f64() * rate as f64) as u64 / bits;
            while sent < due {
                // A full queue loses it, as a network would.
                drop(socket.send(&datagram));
                sent += 1;
            }
            sleep(Duration::from_micros(500));
        }
        Ok(())
    });
}

/// (c), (e): requests, by the daemon's queue and by HAProxy's.
fn requests(effort: Effort, weights: &[u32], found: &mut Samples) -> Result<()> {
    let authority = Authority::new()?;
    let topology = place()?;
    let place = topology.backends.first().context("a backend")?;
    let sum: u32 = weights.iter().sum();
    let share = |rate: u32| rate * weights.first().copied().unwrap_or(1) / sum;
    for netns in [&topology.clients, &topology.dispatcher, &place.netns] {
        netns.sysctl(&[FORGET])?;
    }
    let folder = Folder::new()?;
    let own = authority.issue("front")?;
    let certificate = folder.write("web.pem", &own.certificate_pem)?;
    let key = folder.write("web.pem.key", &own.key_pem)?;
    let roots = folder.write("roots.pem", &authority.pem())?;
    let rules: Vec<String> = NAMES
        .iter()
        .take(weights.len())
        .map(|name| format!("{{ class = \"{name}\", header = \"X-Tier: {name}\" }}"))
        .collect();
    let service = Service::new("web", HTTPS)
        .with("mode = \"terminate\"")
        .with(&format!(
            "terminate.certificates = [{{ certificate = \"{}\", key = \"{}\" }}]",
            certificate.display(),
            key.display()
        ))
        .with(&format!("tunnels.roots = \"{}\"", roots.display()))
        .with(&format!("tunnels.server_name = \"{HOST}\""))
        .with(&format!("classify = [{}]", rules.join(", ")))
        .with(&format!("limits = {{ max_inflight = {INFLIGHT} }}"));
    let text = config(&topology, "native", &[service]) + &classes(weights);
    let case = format!("(c) requests, weights {}", named(weights));
    // What the heaviest class is promised: a server of its share.
    let promised = {
        let _origin = Origin::paced(&place.netns, "b1", &authority, share(CAPACITY))?;
        let _daemon = Daemon::start_with(
            &topology.dispatcher,
            &text.replace(
                &format!("max_inflight = {INFLIGHT}"),
                &format!("max_inflight = {}", share(INFLIGHT).max(1)),
            ),
        )?;
        served(&topology, &authority)?;
        Found::by_wrk(&wrk(effort.seconds, &topology, NAMES[0])?.finish()?)?
    };
    let origin = Origin::paced(&place.netns, "b1", &authority, CAPACITY)?;
    {
        let _daemon = Daemon::start_with(&topology.dispatcher, &text)?;
        served(&topology, &authority)?;
        side(effort, &topology, &origin, (&case, "dispatcher"), weights, Some(promised), found)?;
    }
    let file =
        folder.write("haproxy.cfg", &haproxy(place.address(Family::V4), [&certificate, &roots], weights))?;
    let mut command = topology.dispatcher.command("haproxy");
    command.arg("-db").arg("-f").arg(file);
    let mut process = Process::start(command, None).context("is haproxy installed?")?;
    process.listens(&topology.dispatcher, SocketAddr::new(VIP[0], HTTPS)).context("haproxy")?;
    let case = format!("(e) requests, weights {}", named(weights));
    side(effort, &topology, &origin, (&case, "haproxy"), weights, None, found)
}

/// Waits until requests are answered.
fn served(topology: &Topology, authority: &Authority) -> Result<()> {
    let user = User::new(authority, Version::Tls13)?;
    let (from, to) = (topology.client(Family::V4, 0), SocketAddr::new(VIP[0], HTTPS));
    let deadline = Instant::now() + sockets::PATIENCE;
    loop {
        let mut line = user.connect(&topology.clients, from, to)?;
        write!(line, "GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n")?;
        line.flush()?;
        let head = http::read_head(&mut line)?.context("no answer")?;
        if head.line.contains(" 200") {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the answer is {}", head.line);
        sleep(Duration::from_millis(20));
    }
}

/// Requests of a class, as many as are answered.
fn wrk(seconds: u32, topology: &Topology, class: &str) -> Result<Generator> {
    let url = format!("https://{}/", SocketAddr::new(VIP[0], HTTPS));
    let header = format!("X-Tier: {class}");
    Generator::wrk(&topology.clients, &url, seconds, CONNECTIONS, &["--latency", "-H", &header])
}

/// The heaviest class alone, then all of them. `promised` is how it does alone before a server of its share.
fn side(
    effort: Effort,
    topology: &Topology,
    origin: &Origin,
    (case, subject): (&str, &str),
    weights: &[u32],
    promised: Option<Found>,
    found: &mut Samples,
) -> Result<()> {
    let names = NAMES.get(..weights.len()).context("a name for each class")?;
    let alone = Found::by_wrk(&wrk(effort.seconds, topology, names[0])?.finish()?)?;
    // Their beginnings and ends, when not all are there, do not count.
    let start = |name: &&str| wrk(effort.seconds + 1, topology, name);
    let running = names.iter().map(start).collect::<Result<Vec<_>>>()?;
    sleep(Duration::from_millis(500));
    let (from, time) = (SystemTime::now(), Duration::from_secs(effort.seconds.into()));
    let all = running.into_iter().map(|one| Found::by_wrk(&one.finish()?)).collect::<Result<Vec<_>>>()?;
    let tiers = origin.tiers(from, time)?;
    let rate = |name: &&str| tiers.get(*name).copied().unwrap_or(0) as f64 / time.as_secs_f64();
    let rates: Vec<f64> = names.iter().map(rate).collect();
    found.shares(case, subject, weights, &rates, promised.is_some());
    found.add(case, subject, "requests of all", "1/s", rates.iter().sum());
    found.add(case, subject, "failed", "requests", all.iter().map(|one| one.failed as f64).sum());
    let p99 = |one: Option<&Found>| one.and_then(|one| one.p99).context("wrk said no percentile");
    let (alone, beside) = (p99(Some(&alone))?, p99(all.first())?);
    found.add(case, subject, "gold: p99 alone", "ms", alone);
    found.add(case, subject, "gold: p99 beside the others", "ms", beside);
    let metric = "gold: p99, ratio to that alone";
    // Alone it had all: with a smaller share it must wait longer.
    let reachable = weights.iter().sum::<u32>() * 2 <= weights.first().map_or(0, |heaviest| heaviest * 3);
    if promised.is_some() && reachable {
        found.wanted((case, subject, metric, "ratio"), beside / alone, 1.5, true);
    } else {
        found.add(case, subject, metric, "ratio", beside / alone);
    }
    if promised.is_some() {
        let promised = p99(promised.as_ref())?;
        found.add(case, subject, "gold: p99 alone before a server of its share", "ms", promised);
        let metric = "gold: p99, ratio to that alone before a server of its share";
        found.wanted((case, subject, metric, "ratio"), beside / promised, 1.5, true);
    }
    Ok(())
}

/// As many requests at a time; the classes in the order of their weights, which is all that it knows.
fn haproxy(backend: IpAddr, [certificate, roots]: [&PathBuf; 2], weights: &[u32]) -> String {
    let rules: String = NAMES
        .iter()
        .zip(weights)
        .map(|(name, weight)| {
            format!("    http-request set-priority-class int(-{weight}) if {{ req.hdr(x-tier) {name} }}\n")
        })
        .collect();
    format!(
        "global\n    maxconn 8000\n    nbthread 2\n\
         defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n    \
         timeout queue 5s\n    timeout http-keep-alive 60s\n    http-reuse always\n\
         frontend web\n    bind {}:{HTTPS} ssl crt {} alpn http/1.1\n{rules}    default_backend servers\n\
         backend servers\n    server b1 {backend}:{HTTPS} maxconn {INFLIGHT} ssl verify required ca-file {} sni str({HOST}) \
         verifyhost {HOST} alpn http/1.1 pool-max-conn -1\n",
        VIP[0],
        certificate.display(),
        roots.display()
    )
}

/// (d): connections that wait for their turn in the daemon.
fn hellos(effort: Effort, weights: &[u32], found: &mut Samples) -> Result<()> {
    let authority = Authority::new()?;
    let topology = place()?;
    let place = topology.backends.first().context("a backend")?;
    let _origin = Origin::start(&place.netns, "b1", &authority, false)?;
    for netns in [&topology.clients, &topology.dispatcher, &place.netns] {
        netns.sysctl(&[FORGET])?;
    }
    let service = Service::new("web", HTTPS)
        .with("miss = \"daemon\"")
        .with(&by_client(&topology, weights))
        .with(&format!("limits = {{ connections_per_second = {RATE}, over = \"hold\" }}"));
    let text = config(&topology, "native", &[service]) + &classes(weights);
    let _daemon = Daemon::start_with(&topology.dispatcher, &text)?;
    let counts: Vec<Arc<AtomicU64>> = weights.iter().map(|_| Arc::default()).collect();
    let failed = Arc::new(AtomicU64::new(0));
    let mut workers = Workers::default();
    for (number, count) in counts.iter().enumerate() {
        let (from, to) = (topology.client(Family::V4, number), SocketAddr::new(VIP[0], HTTPS));
        for _ in 0..THREADS {
            let user = User::new(&authority, Version::Tls13)?.forgetful();
            let (count, failed) = (Arc::clone(count), Arc::clone(&failed));
            workers.start(&topology.clients, move |stop| {
                while !stop.load(Ordering::Relaxed) {
                    match sockets::connect_here(from, to).map(|stream| user.resumes_on(stream)) {
                        Ok(Ok(_)) => count.fetch_add(1, Ordering::Relaxed),
                        _ => failed.fetch_add(1, Ordering::Relaxed),
                    };
                }
                Ok(())
            });
        }
    }
    let read = || counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
    sleep(Duration::from_millis(1500));
    let (before, began) = (read(), Instant::now());
    sleep(Duration::from_secs(effort.seconds.into()));
    let (after, took) = (read(), began.elapsed().as_secs_f64());
    workers.end()?;
    let rates: Vec<f64> =
        after.iter().zip(&before).map(|(after, before)| (after - before) as f64 / took).collect();
    let case = format!("(d) held hellos, weights {}", named(weights));
    found.shares(&case, "dispatcher", weights, &rates, true);
    found.add(&case, "dispatcher", "connections of all", "1/s", rates.iter().sum());
    found.add(&case, "dispatcher", "failed", "connections", failed.load(Ordering::Relaxed) as f64);
    Ok(())
}
