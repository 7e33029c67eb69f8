//! Services that end TLS: clients are served by rustls and hyper, and each request goes through an established
//! tunnel to the backend of its session.
//!
//! ```text
//! accept -> handshake -> request -> session (cookie) -> backend -> tunnel -> answer
//! ```
//!
//! A `Site` is all that requests of a service need; a reload puts another in its place.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    balancer::{Balance, Balancer, Candidate},
    config::{self, Config, Service, Terminate},
    reconcile::Pool,
    state::Shared,
    tunnels::{Carries, Load, Settings, Target, Tls, Tunnels},
};

mod certificates;
mod connection;
mod request;
pub(crate) mod secure;
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
            "; a running daemon has no right to ports below 1024 any more: restart it".to_owned()
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
    service: Service,
    terminate: Terminate,
    /// Name of the cookie by which sessions are known.
    cookie: String,
    tls: Arc<ServerConfig>,
    way: Arc<Way>,
}

/// Backends of a service that can be reached.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reached {
    pub(crate) pool: Pool,
    /// Their names, `service/backend`, and where they are, by backend id.
    pub(crate) addresses: BTreeMap<u32, (String, SocketAddr)>,
}

/// By service id.
type All<T> = BTreeMap<u32, T>;

/// What runs for services that end TLS.
pub(crate) struct Terminator {
    sites: Mutex<All<watch::Sender<Arc<Site>>>>,
    listeners: Mutex<BTreeMap<SocketAddr, JoinHandle<()>>>,
    balancers: Mutex<All<(Balance, Box<dyn Balancer>)>>,
    /// What the reconciler has found.
    reached: watch::Sender<All<Arc<Reached>>>,
    pub(crate) tunnels: Arc<Tunnels>,
    /// Connections for requests in clear.
    clear: Arc<Tunnels>,
    /// True once the daemon ends.
    closing: watch::Sender<bool>,
}

impl Default for Terminator {
    fn default() -> Self {
        Self {
            sites: Mutex::default(),
            listeners: Mutex::default(),
            balancers: Mutex::default(),
            reached: watch::Sender::new(All::new()),
            tunnels: Tunnels::new(),
            clear: Tunnels::new(),
            closing: watch::Sender::new(false),
        }
    }
}

/// What a configuration needs, checked and ready.
#[derive(Default)]
pub(crate) struct Prepared {
    sites: Vec<Arc<Site>>,
    /// VIPs that nobody listened on.
    listeners: Vec<(SocketAddr, StdListener)>,
}

impl Terminator {
    /// Reads certificates, and listens on VIPs that are new. Nothing is changed yet.
    pub(crate) fn prepare(&self, config: &Config) -> Result<Prepared, Error> {
        let mut prepared = Prepared::default();
        let bound = lock(&self.listeners);
        for service in &config.services {
            let (Some(terminate), Some(tunnels)) = (&service.terminate, &service.tunnels) else { continue };
            let old = lock(&self.sites).get(&service.id).map(|site| Arc::clone(&site.borrow().way));
            let name = &service.name;
            prepared.sites.push(Arc::new(Site {
                cookie: service.cookie().unwrap_or(config::DEFAULT_COOKIE).to_owned(),
                tls: certificates::server(name, terminate)?,
                way: certificates::way(name, tunnels, Carries::Requests, old)?,
                terminate: terminate.clone(),
                service: service.clone(),
            }));
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
        let Prepared { sites, listeners } = prepared;
        let mut running = lock(&self.sites);
        let mut bound = lock(&self.listeners);
        bound.retain(|vip, task| {
            let stays = sites.iter().any(|site| site.service.listeners().any(|one| one == *vip));
            if !stays {
                task.abort();
            }
            stays
        });
        // Whoever serves a client of one that goes hears of it: its sender is dropped.
        running.retain(|id, _| sites.iter().any(|site| site.service.id == *id));
        for site in sites {
            match running.get(&site.service.id) {
                Some(sender) => drop(sender.send_replace(site)),
                None => drop(running.insert(site.service.id, watch::Sender::new(site))),
            }
        }
        for (vip, listener) in listeners {
            bound.insert(vip, tokio::spawn(connection::accept(Arc::clone(shared), vip, listener)));
        }
        drop((running, bound));
        self.follow();
    }

    /// The service that has a VIP.
    fn at(&self, vip: SocketAddr) -> Option<watch::Receiver<Arc<Site>>> {
        let sites = lock(&self.sites);
        let found = sites.values().find(|site| site.borrow().service.listeners().any(|one| one == vip))?;
        Some(found.subscribe())
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
        let sites = lock(&self.sites);
        let reached = self.reached.borrow();
        let (mut targets, mut clear) = (Vec::new(), Vec::new());
        for (service, site) in sites.iter() {
            let Some(reached) = reached.get(service) else { continue };
            let site = site.borrow();
            for (backend, (name, address)) in &reached.addresses {
                let target = |address: SocketAddr, settings| Target {
                    backend: *backend,
                    name: name.clone(),
                    address,
                    settings,
                };
                targets.push(target(*address, site.way.settings(address.ip())));
                if let Some(way) = &site.terminate.clear {
                    let address = SocketAddr::new(address.ip(), way.port);
                    clear.push(target(address, Arc::clone(&site.way.clear)));
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

    /// The connections to backends for requests that are secure, or not.
    fn road(&self, secure: bool) -> &Tunnels {
        if secure { &self.tunnels } else { &self.clear }
    }

    /// The balancer's choice among backends to which connections are established, or else among those to which
    /// they are being made.
    fn pick(
        &self,
        road: &Tunnels,
        service: &Service,
        pool: &Pool,
        client: IpAddr,
        avoid: &[u32],
    ) -> Option<Candidate> {
        let mut candidates: Vec<Candidate> = Vec::new();
        let mut waiting = Vec::new();
        for one in pool.candidates.iter().filter(|one| !avoid.contains(&one.id)) {
            let Load { established, in_flight, failing } = road.load(one.id);
            let one = Candidate { load: in_flight as u64, ..*one };
            if established > 0 {
                candidates.push(one);
            } else if !failing {
                waiting.push(one);
            }
        }
        if candidates.is_empty() {
            candidates = waiting;
        }
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

fn listen(vip: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(vip), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if vip.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&vip.into())?;
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
}
