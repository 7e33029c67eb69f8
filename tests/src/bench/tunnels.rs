//! `tunnels`: services that end TLS, beside HAProxy that does the same.
//!
//! ```text
//! direct          client --- switch --- one backend
//! dispatcher-h1   client --- router, the dispatcher with mode = "terminate" --- switch --- backends, HTTP/1.1
//! dispatcher-h2   the same --- backends, HTTP/2
//! haproxy-h1      client --- router, HAProxy: ends TLS, encrypts again, cookie, reuse --- switch --- backends, HTTP/1.1
//! haproxy-h2      the same --- backends, HTTP/2
//! ```
//!
//! `--floor` measures also [`floor`](super::floor), `floor-h1` and `floor-h2`: what is missing to it is our own code's.
//! `--against FILE` measures another dispatcherd instead of the others: `against-h1`, `against-h2`.
//!
//! Each variant has namespaces and servers of its own; what stands between starts anew in each round.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use dispatcher_user::{api, workers::processors};
use rustls::{ClientConnection, StreamOwned};

use crate::{
    bench::{
        FORGET,
        load::{Found, Generator, latencies},
        origin::{HTTP, HTTPS, Origin},
        report::{Goal, Report, Row, median},
        usage::{process, raise_files, resident},
    },
    daemon::{Daemon, Folder, Process, Service, config, program},
    http,
    netns::Netns,
    sockets,
    tls::{Authority, HOST, Line, User, Version},
    topology::{Family, NEAR, Plan, Topology, VIP},
};

/// Users, each with a session and a generator.
const USERS: usize = 6;
/// Connections of one wrk.
const CONNECTIONS: u8 = 8;
/// Connections of one h2load, and requests at a time on each.
const H2: [&str; 4] = ["-c2", "-m8", "-H", "accept: */*"];
/// Requests a second on each connection of h2load at the fixed rate: twelve times as many in all.
const RATE: u32 = 100;
/// Runs at it: whether generators ask in step is chance, and decides how long requests wait for each other.
const RUNS: usize = 4;
/// Threads that connect again and again, or hold connections.
const THREADS: usize = 4;
/// Tunnels, or idle connections, to each backend: twice the requests at a time for one, as the last one's tunnel may not
/// be free yet when the next one comes.
const POOL: usize = 64;

/// What is measured: case, metric, unit.
type What = (&'static str, &'static str, &'static str);

const KEPT_H1: &str = "kept alive, HTTP/1.1 clients";
const KEPT_H2: &str = "kept alive, HTTP/2 clients";
const FULL: &str = "a connection a request, full handshakes";
const RESUMED: &str = "a connection a request, resumed";
const FIXED: &str = "HTTP/2 clients at a fixed rate";
const IDLE: &str = "idle TLS connections";
const REQUESTS: &str = "all phases after the warm-up";
const CPU: &str = "CPU per 100k requests";

/// What should be reached beside HAProxy, the worst value of the ratio, and in which direction.
const GOALS: [(What, bool); 10] = [
    ((KEPT_H1, "requests", "1/s"), true),
    ((KEPT_H2, "requests", "1/s"), true),
    ((FULL, "connections", "1/s"), true),
    ((RESUMED, "connections", "1/s"), true),
    ((KEPT_H1, CPU, "s"), false),
    ((KEPT_H2, CPU, "s"), false),
    ((FULL, CPU, "s"), false),
    ((RESUMED, CPU, "s"), false),
    ((FIXED, CPU, "s"), false),
    ((FIXED, "p99", "ms"), false),
];
/// The daemon's own count.
const HANDSHAKES: What = (REQUESTS, "TLS handshakes with backends", "handshakes");

#[derive(Clone, Copy)]
struct Effort {
    rounds: usize,
    /// Of one run of a generator.
    seconds: u32,
    /// Of connecting again and again.
    connecting: f64,
    /// Idle connections that are held.
    idle: usize,
}

/// Measures; `against` is another dispatcherd that takes the place of all but ours, with `floor` also the least that the
/// libraries can do. With `only`, the cases whose name has it.
pub fn run(quick: bool, against: Option<&Path>, floor: bool, only: Option<&str>) -> Result<Report> {
    if let Some(only) = only {
        let cases = [IDLE, KEPT_H1, KEPT_H2, FULL, RESUMED, FIXED];
        ensure!(
            cases.iter().any(|case| case.contains(only)),
            "no case's name has \"{only}\" in it: {cases:?}"
        );
    }
    let effort = if quick {
        Effort { rounds: 1, seconds: 1, connecting: 0.3, idle: 200 }
    } else {
        Effort { rounds: 5, seconds: 4, connecting: 3.0, idle: 1000 }
    };
    raise_files()?;
    let authority = Authority::new()?;
    let variants = kinds(against, floor)
        .into_iter()
        .map(|kind| Variant::new(kind, &authority))
        .collect::<Result<Vec<_>>>()?;
    let mut samples = vec![Samples::new(); variants.len()];
    for round in 0..effort.rounds {
        for step in 0..variants.len() {
            let at = (round + step) % variants.len();
            let (Some(variant), Some(samples)) = (variants.get(at), samples.get_mut(at)) else { continue };
            let found =
                variant.measure(effort, &authority, only).with_context(|| variant.kind.name().to_owned())?;
            for (what, value) in found {
                samples.entry(what).or_default().push(value);
            }
        }
    }
    let mut report = report(&variants, &samples, against);
    if only.is_some() {
        report.goals.retain(|goal| goal.value.is_some());
    }
    Ok(report)
}

/// One value a round.
type Samples = BTreeMap<What, Vec<f64>>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind<'a> {
    Direct,
    /// `http2`: to the backends.
    Dispatcher {
        http2: bool,
    },
    Haproxy {
        http2: bool,
    },
    Floor {
        http2: bool,
    },
    /// Another dispatcherd.
    Against {
        http2: bool,
        program: &'a Path,
    },
}

/// What is measured.
fn kinds(against: Option<&Path>, floor: bool) -> Vec<Kind<'_>> {
    let versions = [false, true];
    let own = versions.map(|http2| Kind::Dispatcher { http2 });
    let others = versions.map(|http2| other(http2, against));
    let direct = against.is_none().then_some(Kind::Direct);
    let floors = versions.into_iter().filter(|_| floor).map(|http2| Kind::Floor { http2 });
    direct.into_iter().chain(own).chain(others).chain(floors).collect()
}

/// Connections to each backend: of HTTP/2, as many requests share one, what the daemon has as a default.
fn established(http2: bool) -> usize {
    if http2 { processors().max(2) } else { POOL }
}

/// Whom we are compared with.
fn other(http2: bool, against: Option<&Path>) -> Kind<'_> {
    against.map_or(Kind::Haproxy { http2 }, |program| Kind::Against { http2, program })
}

impl Kind<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Dispatcher { http2: false } => "dispatcher-h1",
            Self::Dispatcher { http2: true } => "dispatcher-h2",
            Self::Haproxy { http2: false } => "haproxy-h1",
            Self::Haproxy { http2: true } => "haproxy-h2",
            Self::Floor { http2: false } => "floor-h1",
            Self::Floor { http2: true } => "floor-h2",
            Self::Against { http2: false, .. } => "against-h1",
            Self::Against { http2: true, .. } => "against-h2",
        }
    }

    fn http2(self) -> bool {
        match self {
            // Clients of both versions come to it.
            Self::Direct => true,
            Self::Dispatcher { http2 }
            | Self::Haproxy { http2 }
            | Self::Floor { http2 }
            | Self::Against { http2, .. } => http2,
        }
    }
}

/// Namespaces and servers of one variant.
struct Variant<'a> {
    kind: Kind<'a>,
    // In the order in which they must end.
    _origins: Vec<Origin>,
    near: Option<Netns>,
    topology: Topology,
    folder: Folder,
    web: [PathBuf; 2],
    roots: PathBuf,
}

/// What stands between clients and servers.
enum Between {
    Nothing,
    Dispatcher(Box<Daemon>),
    /// HAProxy, or the floor.
    Other(Process),
}

impl Between {
    fn id(&mut self) -> Option<u32> {
        match self {
            Self::Nothing => None,
            Self::Dispatcher(daemon) => Some(daemon.process().id()),
            Self::Other(process) => Some(process.id()),
        }
    }

    fn cpu(&mut self) -> Result<f64> {
        self.id().map_or(Ok(0.0), process)
    }

    /// The daemon's tunnels, by backend.
    fn tunnels(&self) -> Result<Vec<api::TunnelBackend>> {
        match self {
            Self::Dispatcher(daemon) => daemon.ask(&["tunnels", "backends"]),
            Self::Nothing | Self::Other(_) => Ok(Vec::new()),
        }
    }

    fn handshakes(&self) -> Result<f64> {
        Ok(self.tunnels()?.iter().map(|one| one.handshakes as f64).sum())
    }
}

impl<'a> Variant<'a> {
    fn new(kind: Kind<'a>, authority: &Authority) -> Result<Self> {
        let topology = Topology::new(Plan::default())?;
        let origins = (1..)
            .zip(&topology.backends)
            .map(|(number, place)| {
                Origin::start(&place.netns, &format!("b{number}"), authority, kind.http2())
            })
            .collect::<Result<Vec<_>>>()?;
        let near = (kind == Kind::Direct).then(|| topology.near()).transpose()?;
        let places = topology.backends.iter().map(|place| &place.netns);
        for netns in places.chain([&topology.clients, &topology.dispatcher]).chain(&near) {
            netns.sysctl(&[FORGET])?;
        }
        let folder = Folder::new()?;
        let own = authority.issue("front")?;
        let certificate = folder.write("web.pem", &own.certificate_pem)?;
        let key = folder.write("web.pem.key", &own.key_pem)?;
        let roots = folder.write("roots.pem", &authority.pem())?;
        Ok(Self { kind, _origins: origins, near, topology, folder, web: [certificate, key], roots })
    }

    fn clients(&self) -> &Netns {
        self.near.as_ref().unwrap_or(&self.topology.clients)
    }

    /// From where, by number, and to where.
    fn path(&self, number: usize) -> (IpAddr, SocketAddr) {
        let first = self.topology.backends.first().map_or(VIP[0], |place| place.address(Family::V4));
        let (from, to) = match self.kind {
            Kind::Direct => (NEAR.into(), first),
            Kind::Dispatcher { .. } | Kind::Haproxy { .. } | Kind::Floor { .. } | Kind::Against { .. } => {
                (self.topology.client(Family::V4, number), VIP[0])
            }
        };
        (from, SocketAddr::new(to, HTTPS))
    }

    /// Starts what stands between, and waits until it serves.
    fn begin(&self) -> Result<Between> {
        let dispatcher = &self.topology.dispatcher;
        match self.kind {
            Kind::Direct => Ok(Between::Nothing),
            Kind::Dispatcher { http2 } => self.dispatcher(&program("dispatcherd")?, http2),
            Kind::Against { http2, program } => self.dispatcher(program, http2),
            Kind::Haproxy { http2 } => {
                let file = self.folder.write("haproxy.cfg", &self.haproxy(http2))?;
                let mut command = dispatcher.command("haproxy");
                command.arg("-db").arg("-f").arg(file);
                self.other(command).context("is haproxy installed?")
            }
            Kind::Floor { http2 } => {
                let own = env::current_exe().context("finding this program")?;
                let mut command = dispatcher.command(own);
                command.arg("floor").arg("--certificate").arg(&self.web[0]).arg("--key").arg(&self.web[1]);
                command.arg("--roots").arg(&self.roots).args(["--name", HOST, "--established"]);
                command.arg(established(http2).to_string()).args(http2.then_some("--http2"));
                command.arg(SocketAddr::new(VIP[0], HTTPS).to_string());
                let places = self.topology.backends.iter().map(|place| place.address(Family::V4));
                command.args(places.map(|address| SocketAddr::new(address, HTTPS).to_string()));
                self.other(command)
            }
        }
    }

    /// Starts what listens at the VIP.
    fn other(&self, command: Command) -> Result<Between> {
        let mut process = Process::start(command, None)?;
        process.listens(&self.topology.dispatcher, SocketAddr::new(VIP[0], HTTPS))?;
        Ok(Between::Other(process))
    }

    fn dispatcher(&self, program: &Path, http2: bool) -> Result<Between> {
        let ([certificate, key], established) = (&self.web, established(http2));
        let service = Service::new("web", HTTPS)
            .with("mode = \"terminate\"")
            .with("balance = \"weighted-round-robin\"")
            .with(&format!(
                "terminate.certificates = [{{ certificate = \"{}\", key = \"{}\" }}]",
                certificate.display(),
                key.display()
            ))
            .with(&format!("tunnels.roots = \"{}\"", self.roots.display()))
            .with(&format!("tunnels.server_name = \"{HOST}\""))
            .with(&format!("tunnels.established = {established}"));
        let daemon = Daemon::start_program(
            program,
            &self.topology.dispatcher,
            &config(&self.topology, "native", &[service]),
        )?;
        let between = Between::Dispatcher(Box::new(daemon));
        let deadline = Instant::now() + sockets::PATIENCE;
        loop {
            let found = between.tunnels()?;
            let all = found.len() == self.topology.backends.len();
            if all && found.iter().all(|one| one.established == established) {
                return Ok(between);
            }
            ensure!(Instant::now() < deadline, "tunnels are not established: {found:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As many threads as the daemon has, the session's server in a cookie, idle connections to servers that
    /// any request may take and that nobody closes, certificates verified and backends told of clients as the daemon does.
    fn haproxy(&self, http2: bool) -> String {
        let alpn = if http2 { "h2,http/1.1" } else { "http/1.1" };
        let places = (1..).zip(&self.topology.backends);
        let servers: String = places
            .map(|(number, place)| {
                let address = SocketAddr::new(place.address(Family::V4), HTTPS);
                format!("    server b{number} {address} cookie b{number}\n")
            })
            .collect();
        format!(
            "global\n    maxconn 8000\n    nbthread 2\n\
             defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n    \
             timeout http-keep-alive 60s\n    http-reuse always\n\
             frontend web\n    bind {}:{HTTPS} ssl crt {} alpn h2,http/1.1\n    option forwardfor\n    \
             http-request set-header X-Forwarded-Proto https\n    \
             http-request set-header X-Forwarded-Host %[req.hdr(host)]\n    \
             http-request set-header Forwarded for=%[src];host=\\\"%[req.hdr(host)]\\\";proto=https\n    \
             unique-id-format %{{+X}}o%Ts%rt%ci%cp%pid\n    unique-id-header X-Request-ID\n    \
             default_backend servers\n\
             backend servers\n    balance roundrobin\n    cookie SRV insert indirect nocache httponly secure\n    \
             default-server ssl verify required ca-file {} sni str({HOST}) verifyhost {HOST} alpn {alpn} \
             pool-max-conn -1 pool-low-conn {POOL} pool-purge-delay 60s\n{servers}",
            VIP[0],
            self.web[0].display(),
            self.roots.display()
        )
    }

    /// One round.
    fn measure(&self, effort: Effort, authority: &Authority, only: Option<&str>) -> Result<Vec<(What, f64)>> {
        let is_wanted = |case: &str| only.is_none_or(|only| case.contains(only));
        let mut found = Vec::new();
        let mut between = self.begin()?;
        let user = User::new(authority, Version::Tls13)?;
        let cookies = (0..USERS).map(|number| self.session(&user, number)).collect::<Result<Vec<_>>>()?;
        if let Some(id) = between.id().filter(|_| is_wanted(IDLE)) {
            let before = resident(id)?;
            let held = self.hold(&user, effort.idle)?;
            std::thread::sleep(Duration::from_millis(100));
            let grown = (resident(id)? - before) / 1024.0 / 1024.0 * 1000.0 / effort.idle as f64;
            drop(held);
            found.push(((IDLE, "memory per 1,000", "MiB"), grown));
        }
        // Pools are filled: here the most requests are under way at a time.
        self.kept_h2(1, &cookies)?;
        let (handshakes, accepted) = (between.handshakes()?, self.accepted()?);
        let mut failed = 0;
        for (case, h2) in [(KEPT_H1, false), (KEPT_H2, true)] {
            if !is_wanted(case) {
                continue;
            }
            let before = between.cpu()?;
            let load = if h2 {
                self.kept_h2(effort.seconds, &cookies)?
            } else {
                self.kept_h1(effort.seconds, &cookies)?
            };
            found.push(((case, "requests", "1/s"), load.rate));
            found.push(((case, CPU, "s"), (between.cpu()? - before) / load.requests as f64 * 1e5));
            failed += load.failed;
        }
        for case in [FULL, RESUMED] {
            if !is_wanted(case) {
                continue;
            }
            let resumed = case == RESUMED;
            let user = || User::new(authority, Version::Tls13);
            let user = || if resumed { user() } else { Ok(user()?.forgetful()) };
            let users = (0..THREADS).map(|_| user()).collect::<Result<_>>()?;
            let before = between.cpu()?;
            let began = Instant::now();
            let count = self.connect(users, resumed, effort.connecting)?;
            found.push(((case, "connections", "1/s"), f64::from(count) / began.elapsed().as_secs_f64()));
            found.push(((case, CPU, "s"), (between.cpu()? - before) / f64::from(count) * 1e5));
        }
        if is_wanted(FIXED) {
            let before = between.cpu()?;
            let load = self.fixed(effort.seconds, &cookies)?;
            found.push(((FIXED, "requests", "1/s"), load.rate));
            found.push(((FIXED, CPU, "s"), (between.cpu()? - before) / load.requests as f64 * 1e5));
            let (p50, p99) = load.p50.zip(load.p99).context("h2load logged no request")?;
            found.push(((FIXED, "p50", "ms"), p50));
            found.push(((FIXED, "p99", "ms"), p99));
            failed += load.failed;
        }
        found.push(((REQUESTS, "failed", "requests"), failed as f64));
        ensure!(!matches!(self.kind, Kind::Floor { .. }) || failed == 0, "{failed} requests failed");
        if self.kind != Kind::Direct {
            let accepted = self.accepted()? - accepted - self.topology.backends.len() as f64;
            found.push(((REQUESTS, "new connections at backends", "connections"), accepted));
        }
        if matches!(between, Between::Dispatcher(_)) {
            found.push((HANDSHAKES, between.handshakes()? - handshakes));
        }
        Ok(found)
    }

    /// A first visit: the session's cookie, where one is given.
    fn session(&self, user: &User, number: usize) -> Result<Option<String>> {
        let (from, to) = self.path(number);
        let mut line = user.connect(self.clients(), from, to)?;
        Ok(ask(&mut line)?.cookie)
    }

    /// Kept-alive connections of HTTP/1.1, each with one request at a time.
    fn kept_h1(&self, seconds: u32, cookies: &[Option<String>]) -> Result<Found> {
        let url = format!("https://{}/", self.path(0).1);
        let start = |cookie: &Option<String>| {
            let header = cookie_header(cookie);
            Generator::wrk(self.clients(), &url, seconds, CONNECTIONS, &["-H", &header])
        };
        let running = cookies.iter().map(start).collect::<Result<Vec<_>>>()?;
        let all = running.into_iter().map(|one| Found::by_wrk(&one.finish()?));
        Ok(sum(&all.collect::<Result<Vec<_>>>()?))
    }

    /// Connections of HTTP/2 with several requests at a time.
    fn kept_h2(&self, seconds: u32, cookies: &[Option<String>]) -> Result<Found> {
        self.h2load(seconds, cookies, |_| Vec::new())
    }

    /// The same at a fixed rate, with the times of requests.
    fn fixed(&self, seconds: u32, cookies: &[Option<String>]) -> Result<Found> {
        // A log costs the generator something: only where few requests are made.
        let log = |number: usize| self.folder.path().join(format!("requests{number}"));
        let rate = RATE.to_string();
        let (mut runs, mut times) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            runs.push(self.h2load(seconds, cookies, |number| {
                let log = log(number).to_string_lossy().into_owned();
                vec!["--rps".to_owned(), rate.clone(), "--log-file".to_owned(), log]
            })?);
            for number in 0..cookies.len() {
                times.extend(latencies(&log(number))?);
                fs::remove_file(log(number))?;
            }
        }
        times.sort_by(f64::total_cmp);
        let mut found = sum(&runs);
        found.rate /= RUNS as f64;
        found.p50 = times.get(times.len() / 2).copied();
        found.p99 = times.get(times.len() * 99 / 100).copied();
        Ok(found)
    }

    fn h2load(
        &self,
        seconds: u32,
        cookies: &[Option<String>],
        more: impl Fn(usize) -> Vec<String>,
    ) -> Result<Found> {
        let url = format!("https://{}/", self.path(0).1);
        let start = |(number, cookie): (usize, &Option<String>)| {
            let (header, more) = (cookie_header(cookie), more(number));
            let more: Vec<&str> = more.iter().map(String::as_str).collect();
            let arguments = [&H2[..], &["-H", &header], &more].concat();
            Generator::h2load(self.clients(), &url, seconds, &arguments)
        };
        let running = cookies.iter().enumerate().map(start).collect::<Result<Vec<_>>>()?;
        let all = running.into_iter().map(|one| Found::by_h2load(&one.finish()?));
        Ok(sum(&all.collect::<Result<Vec<_>>>()?))
    }

    /// Connects, asks and closes again and again; how often. Each handshake must be of the kind.
    fn connect(&self, users: Vec<User>, resumed: bool, seconds: f64) -> Result<u32> {
        let stop = Arc::new(AtomicBool::new(false));
        let (from, to) = self.path(0);
        let work = move |user: User, stop: Arc<AtomicBool>| -> Result<u32> {
            let mut count = 0;
            // The first one is where the others come back from.
            user.resumes_on(sockets::connect_here(from, to)?)?;
            while !stop.load(Ordering::Relaxed) {
                let again = user.resumes_on(sockets::connect_here(from, to)?)?;
                ensure!(again == resumed, "resumed: {again}, but {resumed} was to be measured");
                count += 1;
            }
            Ok(count)
        };
        let start = |user| {
            let stop = Arc::clone(&stop);
            self.clients().spawn(move || work(user, stop))
        };
        let workers = users.into_iter().map(start).collect();
        std::thread::sleep(Duration::from_secs_f64(seconds));
        stop.store(true, Ordering::Relaxed);
        joined(workers).map(|counts| counts.iter().sum())
    }

    /// Connections on which one request was answered, kept open.
    fn hold(&self, user: &User, count: usize) -> Result<Vec<Connection>> {
        let (from, to) = self.path(0);
        let workers = (0..THREADS).map(|_| {
            let user = user.clone();
            self.clients().spawn(move || {
                let connect = |_| {
                    let mut line = user.secure(sockets::connect_here(from, to)?)?;
                    ask(&mut line)?;
                    Ok(line)
                };
                (0..count / THREADS).map(connect).collect::<Result<Vec<_>>>()
            })
        });
        joined(workers.collect()).map(|held| held.into_iter().flatten().collect())
    }

    /// Connections that the backends have accepted so far, with one for each question.
    fn accepted(&self) -> Result<f64> {
        let mut all = 0.0;
        for place in &self.topology.backends {
            let local = SocketAddr::from(([127, 0, 0, 1], HTTP));
            let mut stream = sockets::connect(&place.netns, local.ip(), local)?;
            stream.write_all(b"GET /status HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            // The line below `server accepts handled requests`.
            let numbers = text.lines().skip_while(|line| !line.starts_with("server accepts")).nth(1);
            let number = numbers.and_then(|line| line.split_whitespace().next());
            let number: u64 = number.with_context(|| format!("nginx said {text}"))?.parse()?;
            all += number as f64;
        }
        Ok(all)
    }
}

type Connection = Line<StreamOwned<ClientConnection, TcpStream>>;

/// Sends a request and reads the answer.
fn ask(line: &mut Connection) -> Result<http::Head> {
    write!(line, "GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n")?;
    line.flush()?;
    let head = http::read_head(line)?.context("no answer")?;
    ensure!(head.line.split(' ').nth(1) == Some("200"), "the answer is {}", head.line);
    let mut body = vec![0; head.length as usize];
    line.read_exact(&mut body)?;
    Ok(head)
}

fn cookie_header(cookie: &Option<String>) -> String {
    format!("cookie: {}", cookie.as_deref().unwrap_or("none=none"))
}

fn joined<T>(workers: Vec<JoinHandle<Result<T>>>) -> Result<Vec<T>> {
    let join = |worker: JoinHandle<Result<T>>| match worker.join() {
        Ok(result) => result,
        Err(_) => bail!("a client's thread panicked"),
    };
    workers.into_iter().map(join).collect()
}

fn sum(all: &[Found]) -> Found {
    Found {
        requests: all.iter().map(|one| one.requests).sum(),
        rate: all.iter().map(|one| one.rate).sum(),
        failed: all.iter().map(|one| one.failed).sum(),
        p50: None,
        p99: None,
    }
}

fn report(variants: &[Variant<'_>], samples: &[Samples], against: Option<&Path>) -> Report {
    let whats: std::collections::BTreeSet<What> = samples.iter().flat_map(BTreeMap::keys).copied().collect();
    let mut rows = Vec::new();
    for what @ (case, metric, unit) in whats {
        for (variant, samples) in variants.iter().zip(samples) {
            // What uses CPU and memory stands between.
            let Some(values) = samples.get(&what).filter(|_| variant.kind != Kind::Direct || metric != CPU)
            else {
                continue;
            };
            rows.push(Row::new(case, variant.kind.name(), metric, unit, values));
        }
    }
    let of = |kind: Kind<'_>, what: What| {
        let at = variants.iter().position(|variant| variant.kind == kind)?;
        samples.get(at)?.get(&what)
    };
    let mut goals = Vec::new();
    for http2 in [false, true] {
        let (own, other) = (Kind::Dispatcher { http2 }, other(http2, against));
        for (what @ (case, metric, _), higher) in GOALS {
            let (Some(ours), Some(theirs)) = (of(own, what), of(other, what)) else { continue };
            let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
            let name = format!("{metric}, ratio to {}", other.name());
            rows.push(Row::new(case, own.name(), &name, "ratio", &ratios));
            if let Some(floor) = of(Kind::Floor { http2 }, what) {
                let ratios: Vec<f64> =
                    floor.iter().zip(theirs).map(|(floor, theirs)| floor / theirs).collect();
                rows.push(Row::new(case, Kind::Floor { http2 }.name(), &name, "ratio", &ratios));
            }
            let goal = format!("{}: {case}: {name}", own.name());
            let value = median(&ratios);
            goals.push(if higher {
                Goal::at_least(&goal, value, 1.0)
            } else {
                Goal::at_most(&goal, value, 1.0)
            });
        }
        let handshakes = of(own, HANDSHAKES).and_then(|counts| counts.iter().copied().reduce(f64::max));
        let goal = format!("{}: {}: {}, the most of a round", own.name(), HANDSHAKES.0, HANDSHAKES.1);
        goals.push(Goal::at_most(&goal, handshakes, 0.0));
    }
    Report { bench: "tunnels", rows, goals }
}
