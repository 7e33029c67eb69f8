//! Services that the daemon serves itself, through established tunnels to the backends.
//!
//! ```text
//! terminate: accept -> handshake -> request -> session (cookie) -> backend -> tunnel -> answer
//! relay:     accept -> first bytes -> session (ticket, ID, address) -> backend -> tunnel -> bytes both ways
//! ```
//!
//! A `Site` is all that requests of a service need, a `Relay` what its connections need; a reload puts another in
//! its place.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    balancer::{Balance, Balancer, Candidate},
    config::{self, Config, Service, Terminate},
    qos::Qos,
    reconcile::Pool,
    state::Shared,
    terminate::counts::{Counted, Counts},
    tunnels::{Carries, Load, Settings, Target, Tls, Tunnels},
    workers::Workers,
};

mod access;
mod certificates;
mod class;
mod connection;
pub(crate) mod counts;
mod draining;
mod forwarded;
mod http2;
mod lingering;
mod relay;
mod request;
pub(crate) mod secure;
mod sending;
mod session;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;
/// How long requests may go on when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why a service cannot end TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of certificates or keys.
    #[error("service {service}: {}: {problem}", path.display())]
    File {
        /// Whose.
        service: String,
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Certificates and keys do not make a TLS configuration.
    #[error("service {service}: {problem}")]
    Tls {
        /// Whose.
        service: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A VIP cannot be listened on.
    #[error("service {service}: listening on {vip}: {source}{}", remedy(source, *vip))]
    Listen {
        /// Whose.
        service: String,
        /// The address.
        vip: SocketAddr,
        /// Why not.
        source: io::Error,
    },
}

fn remedy(error: &io::Error, vip: SocketAddr) -> String {
    let length = if vip.is_ipv4() { 32 } else { 128 };
    let (ip, port) = (vip.ip(), vip.port());
    match error.raw_os_error() {
        Some(libc::EADDRNOTAVAIL) => format!(
            "; in this mode the VIP must be an address of this machine: `ip address add {ip}/{length} dev lo`"
        ),
        Some(libc::EADDRINUSE) => {
            format!("; stop who has it (`ss -ltnp 'sport = {port}'`), or take another port")
        }
        Some(libc::EACCES) => {
            "; ports below 1024 need CAP_NET_BIND_SERVICE: start as root, or with it".to_owned()
        }
        _ => String::new(),
    }
}

/// How tunnels to a service's backends are made.
pub(crate) struct Way {
    config: config::Tunnels,
    /// Contents of the files, so that another content is another way.
    files: Vec<Vec<u8>>,
    tls: Arc<ClientConfig>,
    carries: Carries,
    /// For requests in clear.
    clear: Arc<Settings>,
    /// By the address that is the name where none is configured.
    settings: Mutex<BTreeMap<IpAddr, Arc<Settings>>>,
}

impl Way {
    /// Settings that stay the same as long as nothing is changed.
    fn settings(&self, address: IpAddr) -> Arc<Settings> {
        let own = self.config.server_name.as_ref().and_then(|name| ServerName::try_from(name.clone()).ok());
        let new = || {
            Arc::new(Settings {
                tls: Some(Tls {
                    config: Arc::clone(&self.tls),
                    name: own.unwrap_or_else(|| ServerName::from(address)),
                }),
                carries: self.carries,
                established: self.config.established as usize,
                most: self.config.most as usize,
                max_age: seconds(self.config.max_age),
                timeout: seconds(self.config.timeout),
            })
        };
        Arc::clone(lock(&self.settings).entry(address).or_insert_with(new))
    }
}

fn seconds(number: u32) -> Duration {
    Duration::from_secs(number.into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All that requests of a service need.
pub(crate) struct Site {
    service: Arc<Service>,
    terminate: Terminate,
    /// Name of the cookie by which sessions are known.
    cookie: String,
    tls: Arc<ServerConfig>,
    /// Contents of the files of certificates and keys.
    files: Vec<Vec<u8>>,
    /// When each certificate ends, seconds since 1970.
    ends: Vec<(PathBuf, i64)>,
    way: Arc<Way>,
    log: Option<access::Log>,
}

/// All that connections need of a service that relays them.
pub(crate) struct Relay {
    service: Arc<Service>,
    /// Kinds of identifiers, in the order in which they are looked up.
    kinds: Vec<u8>,
    way: Arc<Way>,
}

/// What serves the clients of a service.
#[derive(Clone)]
enum Front<S, R> {
    Terminate(S),
    Relay(R),
}

/// One that runs: whoever serves its clients follows it.
type Running = Front<watch::Sender<Arc<Site>>, watch::Sender<Arc<Relay>>>;
/// One that is followed by whoever serves its clients.
type Followed = Front<watch::Receiver<Arc<Site>>, watch::Receiver<Arc<Relay>>>;
/// One that is to run.
type Ready = Front<Arc<Site>, Arc<Relay>>;

impl Running {
    fn now(&self) -> Ready {
        match self {
            Self::Terminate(site) => Ready::Terminate(Arc::clone(&site.borrow())),
            Self::Relay(relay) => Ready::Relay(Arc::clone(&relay.borrow())),
        }
    }
}

impl Ready {
    fn service(&self) -> &Arc<Service> {
        match self {
            Self::Terminate(site) => &site.service,
            Self::Relay(relay) => &relay.service,
        }
    }

    fn way(&self) -> &Arc<Way> {
        match self {
            Self::Terminate(site) => &site.way,
            Self::Relay(relay) => &relay.way,
        }
    }

    fn clear(&self) -> Option<&config::Clear> {
        match self {
            Self::Terminate(site) => site.terminate.clear.as_ref(),
            Self::Relay(_) => None,
        }
    }
}

/// Backends of a service that can be reached.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reached {
    pub(crate) pool: Pool,
    /// Their names, `service/backend`, and where they are, by backend id.
    pub(crate) addresses: BTreeMap<u32, (String, SocketAddr)>,
    /// Formats of their tickets, a bit each (`session::TICKET_FORMATS`).
    pub(crate) ticket_formats: u8,
    /// What is known of their tickets (`session::TICKET_*`), by backend id.
    pub(crate) tickets: BTreeMap<u32, u32>,
}

/// By service id.
type All<T> = BTreeMap<u32, T>;

/// What runs for services that end TLS.
pub(crate) struct Terminator {
    fronts: Mutex<All<Running>>,
    counts: Mutex<All<Arc<Counts>>>,
    listeners: Mutex<BTreeMap<SocketAddr, JoinHandle<()>>>,
    balancers: Mutex<All<(Balance, Box<dyn Balancer>)>>,
    /// What the reconciler has found.
    reached: watch::Sender<All<Arc<Reached>>>,
    pub(crate) tunnels: Arc<Tunnels>,
    /// Connections for requests in clear.
    clear: Arc<Tunnels>,
    /// They serve clients and keep the tunnels.
    workers: Arc<Workers>,
    /// True once the daemon ends.
    closing: watch::Sender<bool>,
}

impl Default for Terminator {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}
/// What a configuration needs, checked and ready.
#[derive(Default)]
pub(crate) struct Prepared {
    fronts: Vec<Ready>,
    /// VIPs that nobody listened on.
    listeners: Vec<(SocketAddr, StdListener)>,
    /// What a reload does that the configuration does not say.
    pub(crate) renewed: Vec<String>,
}

impl Terminator {
    pub(crate) fn new(workers: Arc<Workers>) -> Self {
        Self {
            fronts: Mutex::default(),
            counts: Mutex::default(),
            listeners: Mutex::default(),
            balancers: Mutex::default(),
            reached: watch::Sender::new(All::new()),
            tunnels: Tunnels::new(Arc::clone(&workers)),
            clear: Tunnels::new(Arc::clone(&workers)),
            workers,
            closing: watch::Sender::new(false),
        }
    }

    /// Reads certificates, and listens on VIPs that are new. Nothing is changed yet.
    pub(crate) fn prepare(&self, config: &Config) -> Result<Prepared, Error> {
        let mut prepared = Prepared::default();
        let bound = lock(&self.listeners);
        for service in &config.services {
            let Some(tunnels) = &service.tunnels else { continue };
            let former = lock(&self.fronts).get(&service.id).map(Running::now);
            let old = former.as_ref().map(|front| Arc::clone(front.way()));
            let name = &service.name;
            let own = Arc::new(service.clone());
            let front = match &service.terminate {
                Some(terminate) => {
                    let certificates::Shown { tls, files, ends } = certificates::server(name, terminate)?;
                    Ready::Terminate(Arc::new(Site {
                        cookie: service.cookie().unwrap_or(config::DEFAULT_COOKIE).to_owned(),
                        tls,
                        files,
                        ends,
                        way: certificates::way(name, tunnels, Carries::Requests, old)?,
                        log: terminate.access_log.as_ref().map(|file| open(name, file)).transpose()?,
                        terminate: terminate.clone(),
                        service: own,
                    }))
                }
                None => Ready::Relay(Arc::new(Relay {
                    kinds: service.affinity.iter().map(config::Affinity::kind).collect(),
                    way: certificates::way(name, tunnels, Carries::Flow, old)?,
                    service: own,
                })),
            };
            prepared.renewed.extend(former.iter().flat_map(|former| renewed(former, &front)));
            prepared.fronts.push(front);
            for vip in service.listeners().filter(|vip| !bound.contains_key(vip)) {
                let listener =
                    listen(vip).map_err(|source| Error::Listen { service: name.clone(), vip, source })?;
                prepared.listeners.push((vip, listener));
            }
        }
        Ok(prepared)
    }

    /// Puts in force what was prepared. Connections of services that stay go on.
    pub(crate) fn install(&self, shared: &Arc<Shared>, prepared: Prepared) {
        let Prepared { fronts, listeners, renewed: _ } = prepared;
        let mut running = lock(&self.fronts);
        let mut bound = lock(&self.listeners);
        bound.retain(|vip, task| {
            let stays = fronts.iter().any(|one| one.service().listeners().any(|one| one == *vip));
            if !stays {
                task.abort();
            }
            stays
        });
        // Whoever serves a client of one that goes hears of it: its sender is dropped.
        running.retain(|id, _| fronts.iter().any(|one| one.service().id == *id));
        for front in fronts {
            let id = front.service().id;
            match (running.get(&id), front) {
                (Some(Running::Terminate(sender)), Ready::Terminate(site)) => drop(sender.send_replace(site)),
                (Some(Running::Relay(sender)), Ready::Relay(relay)) => drop(sender.send_replace(relay)),
                (_, Ready::Terminate(site)) => {
                    running.insert(id, Running::Terminate(watch::Sender::new(site)));
                }
                (_, Ready::Relay(relay)) => {
                    running.insert(id, Running::Relay(watch::Sender::new(relay)));
                }
            }
        }
        for (vip, listener) in listeners {
            bound.insert(vip, tokio::spawn(connection::accept(Arc::clone(shared), vip, listener)));
        }
        drop((running, bound));
        self.follow();
    }

    /// The service that has a VIP.
    fn at(&self, vip: SocketAddr) -> Option<Followed> {
        let fronts = lock(&self.fronts);
        let is_there = |front: &&Running| front.now().service().listeners().any(|one| one == vip);
        Some(match fronts.values().find(is_there)? {
            Front::Terminate(site) => Front::Terminate(site.subscribe()),
            Front::Relay(relay) => Front::Relay(relay.subscribe()),
        })
    }

    /// The counters of a service.
    fn counts(&self, service: u32) -> Arc<Counts> {
        Arc::clone(lock(&self.counts).entry(service).or_default())
    }

    /// What is counted of each service, by its name.
    pub(crate) fn counted(&self) -> Vec<(String, Counted)> {
        let services: Vec<_> =
            lock(&self.fronts).values().map(|front| Arc::clone(front.now().service())).collect();
        services.iter().map(|service| (service.name.clone(), self.counts(service.id).read())).collect()
    }

    /// The certificates of each service, by its name: their files, and when they end, seconds since 1970.
    pub(crate) fn certificates(&self) -> Vec<(String, PathBuf, i64)> {
        let fronts: Vec<_> = lock(&self.fronts).values().map(Running::now).collect();
        let mut all = Vec::new();
        for front in &fronts {
            if let Front::Terminate(site) = front {
                let ends = site.ends.iter().cloned();
                all.extend(ends.map(|(file, end)| (site.service.name.clone(), file, end)));
            }
        }
        all
    }

    /// Takes note of the backends that can be reached.
    pub(crate) fn find(&self, found: All<Reached>) {
        self.reached.send_if_modified(|known| {
            let same = known.iter().map(|(id, one)| (id, &**one)).eq(&found);
            if !same {
                *known = found.into_iter().map(|(id, one)| (id, Arc::new(one))).collect();
            }
            !same
        });
    }

    /// Lets the tunnels follow services and backends.
    fn follow(&self) {
        let fronts = lock(&self.fronts);
        let reached = self.reached.borrow();
        let (mut targets, mut clear) = (Vec::new(), Vec::new());
        for (service, front) in fronts.iter() {
            let Some(reached) = reached.get(service) else { continue };
            let front = front.now();
            for (backend, (name, address)) in &reached.addresses {
                let target = |address: SocketAddr, settings| Target {
                    backend: *backend,
                    name: name.clone(),
                    address,
                    settings,
                };
                targets.push(target(*address, front.way().settings(address.ip())));
                if let Some(way) = front.clear() {
                    let address = SocketAddr::new(address.ip(), way.port);
                    clear.push(target(address, Arc::clone(&front.way().clear)));
                }
            }
        }
        self.tunnels.follow(targets);
        self.clear.follow(clear);
    }

    /// Backends of a service that can be reached.
    fn reached(&self, service: u32) -> Option<Arc<Reached>> {
        self.reached.borrow().get(&service).cloned()
    }

    /// Requests and relayed connections that are under way to a backend.
    pub(crate) fn in_use(&self, backend: u32) -> u64 {
        (self.tunnels.in_use(backend) + self.clear.in_use(backend)) as u64
    }

    /// Ends what is under way to a backend.
    pub(crate) fn cut(&self, backend: u32) {
        self.tunnels.cut(backend);
        self.clear.cut(backend);
    }

    /// The connections to backends for requests that are secure, or not.
    fn road(&self, secure: bool) -> &Tunnels {
        if secure { &self.tunnels } else { &self.clear }
    }

    /// The balancer's choice among backends to which connections are established, or else among those to which
    /// they are being made, or else among those where that has failed: they may be back. What waits for a backend is
    /// load of it.
    fn pick(
        &self,
        qos: &Qos,
        road: &Tunnels,
        service: &Service,
        pool: &Pool,
        client: IpAddr,
        avoid: &[u32],
    ) -> Option<Candidate> {
        let mut tiers: [Vec<Candidate>; 3] = Default::default();
        for one in pool.candidates.iter().filter(|one| !avoid.contains(&one.id)) {
            let Load { established, in_flight, failing } = road.load(one.id);
            let tier = if established > 0 { 0 } else { 1 + usize::from(failing) };
            tiers[tier].push(Candidate { load: in_flight as u64 + qos.waiting(one.id), ..*one });
        }
        let candidates = tiers.into_iter().find(|tier| !tier.is_empty()).unwrap_or_default();
        let mut balancers = lock(&self.balancers);
        let new = || (service.balance, service.balance.balancer());
        let kept = balancers.entry(service.id).or_insert_with(new);
        if kept.0 != service.balance {
            *kept = new();
        }
        kept.1.pick(&candidates, session::hash(client))
    }
}

/// What the configuration of a daemon that starts needs.
pub(crate) fn prepare(config: &Config) -> Result<Prepared, Error> {
    Terminator::default().prepare(config)
}

/// Files that have another content under the same name.
fn renewed(former: &Ready, front: &Ready) -> Vec<String> {
    let name = &front.service().name;
    let mut lines = Vec::new();
    if let (Ready::Terminate(old), Ready::Terminate(new)) = (former, front)
        && old.terminate.certificates == new.terminate.certificates
        && old.files != new.files
    {
        lines.push(format!("~ service {name}: terminate.certificates: their files have changed"));
    }
    let (old, new) = (former.way(), front.way());
    if old.config == new.config && old.files != new.files {
        lines.push(format!("~ service {name}: tunnels: their files of certificates have changed"));
    }
    lines
}

/// Checks what a start needs of this machine beside the data path: files of certificates, keys and roots, places of access
/// logs, addresses to listen on. Changes nothing.
///
/// # Errors
/// As a start would end with.
pub fn check(config: &Config) -> Result<(), Error> {
    for service in &config.services {
        let Some(tunnels) = &service.tunnels else { continue };
        if let Some(terminate) = &service.terminate {
            certificates::server(&service.name, terminate)?;
            if let Some(path) = &terminate.access_log {
                access::Log::check(path).map_err(|error| unwritten(&service.name, path, &error))?;
            }
        }
        certificates::way(&service.name, tunnels, Carries::Requests, None)?;
        for vip in service.listeners() {
            // A daemon that runs has the port.
            bind(SocketAddr::new(vip.ip(), 0)).map_err(|source| Error::Listen {
                service: service.name.clone(),
                vip,
                source,
            })?;
        }
    }
    Ok(())
}

fn open(service: &str, path: &Path) -> Result<access::Log, Error> {
    access::Log::open(path).map_err(|error| unwritten(service, path, &error))
}

fn unwritten(service: &str, path: &Path, error: &io::Error) -> Error {
    Error::File {
        service: service.to_owned(),
        path: path.to_owned(),
        problem: format!("{error}; the access log must be in a folder in which the daemon may write"),
    }
}

fn bind(vip: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(vip), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if vip.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&vip.into())?;
    Ok(socket)
}

fn listen(vip: SocketAddr) -> io::Result<StdListener> {
    let socket = bind(vip)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Keeps tunnels to the backends there are, until the task is dropped.
pub(crate) async fn serve(shared: Arc<Shared>) -> (&'static str, String) {
    let mut reached = shared.terminator.reached.subscribe();
    loop {
        reached.borrow_and_update();
        shared.terminator.follow();
        if reached.changed().await.is_err() {
            return ("the tunnels", "nobody tells of backends".to_owned());
        }
    }
}

/// At the end: requests under way are answered, and nobody is accepted any more.
pub(crate) async fn shutdown(shared: &Arc<Shared>) {
    let terminator = &shared.terminator;
    for (_, task) in std::mem::take(&mut *lock(&terminator.listeners)) {
        task.abort();
    }
    terminator.closing.send_replace(true);
    // Each connection holds a receiver.
    if tokio::time::timeout(FAREWELL, terminator.closing.closed()).await.is_err() {
        log::warn!("some clients' connections were ended after {} s", FAREWELL.as_secs());
    }
    terminator.clear.follow(Vec::new());
    terminator.tunnels.shutdown(Duration::from_secs(1)).await;
    let workers = Arc::clone(&terminator.workers);
    if let Err(error) = tokio::task::spawn_blocking(move || workers.end()).await {
        log::error!("the workers: {error}");
    }
}
