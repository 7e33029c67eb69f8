//! The tunnel manager: TLS connections to the backends, established ahead of need.
//!
//! A tunnel is one TLS connection to one backend. Requests are sent over it: many at once if the backend
//! chose `h2` by ALPN, else one at a time with HTTP/1.1 keep-alive. A request only ever takes a tunnel that
//! is established already, or waits until there is one: no handshake is part of a request.
//!
//! - [`Tunnels`] follows the wanted backends. Each has a `pool::Pool` with one task, the keeper, that opens,
//!   replaces and retires tunnels.
//! - `tunnel::Tunnel` is what is known about one connection. It is listed as long as its
//!   `tunnel::Wire` lives, whoever holds that.
//! - [`Lease`] is the right to send one request, or to send the bytes of one flow.
//!
//! Lock order: the map of pools, then a pool, then the list of tunnels. No lock is held across an await.

mod http2;
mod lease;
mod pool;
#[cfg(test)]
mod tests;
mod tunnel;

use std::collections::HashMap;
use std::error::Error;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use rustls::pki_types::ServerName;
use tokio::sync::watch;

pub use lease::{Lease, Reply, SendError, Stream};

use pool::Pool;
use tunnel::Registry;

use crate::workers::Workers;

/// Why a body breaks off.
pub type BoxError = Box<dyn Error + Send + Sync>;
/// The body of a request that is sent over a tunnel.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

/// How tunnels to a backend are made. Targets with the same `Arc` have the same settings.
pub struct Settings {
    /// How TLS is spoken; without it, connections are in clear.
    pub tls: Option<Tls>,
    /// What each connection is for.
    pub carries: Carries,
    /// Tunnels kept established ahead of need; at least one is kept.
    pub established: usize,
    /// The most tunnels under load, not counting those that are being replaced. More than `established` are
    /// opened when no tunnel could take another request.
    pub most: usize,
    /// A tunnel of this age, less up to a tenth at random, is replaced.
    pub max_age: Duration,
    /// Bound of one attempt: TCP connect, TLS handshake and, for HTTP/2, the peer's settings.
    pub timeout: Duration,
}

/// How TLS is spoken to a backend.
#[derive(Clone)]
pub struct Tls {
    /// Verification, ALPN, client certificate and resumption, as the caller set them.
    pub config: Arc<rustls::ClientConfig>,
    /// The name the backend's certificate must be valid for.
    pub name: ServerName<'static>,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// HTTP requests, one after another or, over HTTP/2, side by side.
    Requests,
    /// The bytes of one flow, from its first to its last.
    Flow,
}

/// A backend to which tunnels are wanted.
#[derive(Clone)]
pub struct Target {
    /// Stable id, not 0, unique among the targets.
    pub backend: u32,
    /// `service/backend`, for logs and lists.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// How to connect.
    pub settings: Arc<Settings>,
}

impl Target {
    fn is_same(&self, other: &Target) -> bool {
        self.name == other.name
            && self.address == other.address
            && Arc::ptr_eq(&self.settings, &other.settings)
    }
}

/// Whether a tunnel takes new requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It takes requests, or will as soon as the peer sent its HTTP/2 settings.
    Open,
    /// It carries one flow to its end.
    Used,
    /// It takes no more: it is being replaced, closed, or was upgraded to another protocol. What is in flight
    /// goes on.
    Retiring,
}

/// One SSL context: a live tunnel as [`Tunnels::list`] shows it.
#[derive(Clone, Debug)]
pub struct Context {
    /// Unique while the manager lives, not 0.
    pub id: u32,
    /// The backend's id.
    pub backend: u32,
    /// The backend's name.
    pub name: String,
    /// Our end.
    pub source: SocketAddr,
    /// The backend's end.
    pub destination: SocketAddr,
    /// Protocol version, as rustls names it, e.g. `TLSv1_3`; "none" in clear, as the suite.
    pub version: &'static str,
    /// Cipher suite, e.g. `TLS13_AES_256_GCM_SHA384`.
    pub cipher_suite: &'static str,
    /// Key-exchange group, e.g. `X25519MLKEM768`; none if a session was resumed without one.
    pub group: Option<&'static str>,
    /// The protocol chosen by ALPN.
    pub alpn: Option<String>,
    /// Time since the handshake.
    pub age: Duration,
    /// Plaintext bytes sent into TLS.
    pub sent: u64,
    /// Plaintext bytes received out of TLS.
    pub received: u64,
    /// Requests so far.
    pub requests: u64,
    /// Requests in flight; an upgraded connection counts as one.
    pub in_flight: usize,
    /// Whether it takes new requests.
    pub state: State,
}

/// What the tunnels of one backend have to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Established tunnels that take requests.
    pub established: usize,
    /// Requests in flight over them.
    pub in_flight: usize,
    /// None is established, and attempts fail.
    pub failing: bool,
}

/// How the tunnels of one backend do.
#[derive(Clone, Debug)]
pub struct Status {
    /// The backend's id.
    pub backend: u32,
    /// The backend's name.
    pub name: String,
    /// Established tunnels that take requests.
    pub established: usize,
    /// The last error and since when attempts fail. Gone when a later tunnel is used or has held for a second,
    /// or when none is missing any more.
    pub error: Option<(String, SystemTime)>,
    /// Connections made, each with its handshake.
    pub handshakes: u64,
    /// Attempts that gave no tunnel, and tunnels that ended within a second of their handshake unused.
    pub failed: u64,
}

/// Which of a backend's tunnels a request wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Preference {
    /// That of its session, by its id.
    Tunnel(u32),
    /// One for a session that has none yet.
    New,
    /// It is of no session.
    Any,
}

impl Preference {
    /// As entries of sessions hold it: 0 is none.
    #[must_use]
    pub fn of(tunnel: u32) -> Self {
        if tunnel == 0 { Self::New } else { Self::Tunnel(tunnel) }
    }
}

/// Why [`Tunnels::wait`] gave no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The backend is not, or no longer, among the targets.
    #[error("no tunnels are kept to backend {0}: it is not part of the configuration")]
    Unknown(u32),
    /// The queue is full.
    #[error("{name}: {waiting} requests wait for a tunnel already; allow more tunnels or add backends")]
    Crowded {
        /// The backend's name.
        name: String,
        /// Length of the queue.
        waiting: usize,
    },
    /// There is none, and attempts to make one fail.
    #[error("{name}: no tunnel can be made: {error}")]
    Failing {
        /// The backend's name.
        name: String,
        /// The last connect error.
        error: String,
    },
    /// None could take the request in time.
    #[error("{name}: no tunnel could take the request within {patience:?}; {}", .error.as_deref().unwrap_or("all are busy or still connecting"))]
    Late {
        /// The backend's name.
        name: String,
        /// How long the caller was ready to wait.
        patience: Duration,
        /// The last connect error, if attempts fail.
        error: Option<String>,
    },
}

/// The tunnels of all backends as they were when this was asked for: whoever sends many requests keeps it until
/// [`Tunnels::subscribe`] tells of a change, instead of asking what all share for each.
#[derive(Default)]
pub struct Pools(HashMap<u32, Arc<Pool>>);

impl Pools {
    /// A tunnel right now: the `wanted` one if it is of that backend and can take a request, else the one with
    /// the fewest requests in flight.
    pub fn take(&self, backend: u32, wanted: Preference) -> Option<Lease> {
        self.0.get(&backend)?.take(wanted)
    }

    /// Whether a backend has no tunnel, and attempts to make one fail: [`Load::failing`].
    pub fn is_failing(&self, backend: u32) -> bool {
        self.0.get(&backend).is_some_and(|pool| pool.is_failing())
    }
}

/// The manager of all tunnels. Its methods must be called within a tokio runtime.
///
/// When it is dropped, all tunnels are retired and the tasks end.
#[derive(Default)]
pub struct Tunnels {
    pools: watch::Sender<Arc<Pools>>,
    registry: Arc<Registry>,
    workers: Arc<Workers>,
}

impl Tunnels {
    /// A manager without targets. Its tunnels are spread over the workers.
    pub fn new(workers: Arc<Workers>) -> Arc<Self> {
        Arc::new(Self { pools: watch::Sender::default(), registry: Arc::default(), workers })
    }

    /// Sets what should be. New backends start to be connected. Those that are gone, or whose name, address or
    /// settings changed, are retired: requests in flight finish, then the tunnels close. Who waits for a
    /// changed backend goes on waiting for the new tunnels.
    pub fn follow(&self, targets: Vec<Target>) {
        self.pools.send_if_modified(|pools| {
            let (mut former, mut now) = (pools.0.clone(), HashMap::new());
            let mut changed = former.len() != targets.len();
            for target in targets {
                let backend = target.backend;
                let pool = match former.remove(&backend) {
                    Some(pool) if pool.target.is_same(&target) => pool,
                    old => {
                        changed = true;
                        let waiting = old.map(|old| old.end()).unwrap_or_default();
                        let (registry, workers) = (Arc::clone(&self.registry), Arc::clone(&self.workers));
                        Pool::start(target, registry, workers, waiting)
                    }
                };
                if let Some(twin) = now.insert(backend, pool) {
                    twin.end();
                }
            }
            for gone in former.into_values() {
                gone.end();
            }
            *pools = Arc::new(Pools(now));
            changed
        });
    }

    /// The tunnels there are now, and word when other backends are followed.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Pools>> {
        self.pools.subscribe()
    }

    /// A tunnel right now, as [`Pools::take`] gives it.
    pub fn take(&self, backend: u32, wanted: Preference) -> Option<Lease> {
        self.pools().take(backend, wanted)
    }

    /// As [`take`](Self::take), but waits for its turn, first come, first served, for at most `patience`; not when the
    /// last tunnel is gone and the next attempt to make one has failed.
    pub async fn wait(
        &self,
        backend: u32,
        wanted: Preference,
        patience: Duration,
    ) -> Result<Lease, Unavailable> {
        let turn = match self.pools().0.get(&backend) {
            Some(pool) => match pool.take(wanted) {
                Some(lease) => return Ok(lease),
                None => pool.queue(wanted)?,
            },
            None => return Err(Unavailable::Unknown(backend)),
        };
        let late = match tokio::time::timeout(patience, turn).await {
            Ok(Ok(lease)) => return Ok(lease),
            Ok(Err(_gone)) => false,
            Err(_elapsed) => true,
        };
        let status = self.pools().0.get(&backend).map(|pool| pool.status());
        Err(match status.map(|Status { name, error, .. }| (name, error.map(|(text, _)| text))) {
            None => Unavailable::Unknown(backend),
            Some((name, Some(error))) if !late => Unavailable::Failing { name, error },
            Some((name, error)) => Unavailable::Late { name, patience, error },
        })
    }

    /// The live tunnels, ordered by id.
    pub fn list(&self) -> Vec<Context> {
        self.registry.all().iter().map(|tunnel| tunnel.context()).collect()
    }

    /// The followed backends, ordered by id.
    pub fn backends(&self) -> Vec<Status> {
        let mut all: Vec<Status> = self.pools().0.values().map(|pool| pool.status()).collect();
        all.sort_by_key(|status| status.backend);
        all
    }

    /// What a backend's tunnels have to do; nothing of one that is not followed.
    pub fn load(&self, backend: u32) -> Load {
        self.pools().0.get(&backend).map(|pool| pool.load()).unwrap_or_default()
    }

    /// Whether a backend has no tunnel, and attempts to make one fail: [`Load::failing`].
    pub fn is_failing(&self, backend: u32) -> bool {
        self.pools().is_failing(backend)
    }

    /// Requests and flows that are under way to a backend, over tunnels of whatever state.
    pub fn in_use(&self, backend: u32) -> usize {
        let all = self.registry.all();
        let own = all.iter().filter(|tunnel| tunnel.pool.target.backend == backend);
        own.map(|tunnel| tunnel.in_flight.load(Ordering::Relaxed)).sum()
    }

    /// Closes all tunnels to a backend at once.
    pub fn cut(&self, backend: u32) {
        for tunnel in self.registry.all().iter().filter(|tunnel| tunnel.pool.target.backend == backend) {
            tunnel.pool.remove(tunnel);
            tunnel.kill();
        }
    }

    /// Closes a tunnel at once: its requests in flight fail, and it is replaced. False if there is none.
    pub fn close(&self, id: u32) -> bool {
        self.registry.one(id).is_some_and(|tunnel| {
            tunnel.pool.remove(&tunnel);
            tunnel.kill();
            true
        })
    }

    /// Replaces the open tunnels of one backend or of all: new ones come up first, then the old ones retire.
    /// Returns how many will be replaced.
    pub fn rotate(&self, backend: Option<u32>) -> usize {
        let pools = self.pools();
        match backend {
            Some(backend) => pools.0.get(&backend).map_or(0, |pool| pool.rotate()),
            None => pools.0.values().map(|pool| pool.rotate()).sum(),
        }
    }

    /// Retires all tunnels and waits until they have ended. What is left after `patience` is closed.
    pub async fn shutdown(&self, patience: Duration) {
        self.follow(Vec::new());
        if tokio::time::timeout(patience, self.registry.emptied()).await.is_err() {
            for tunnel in self.registry.all() {
                log::debug!("tunnel {} to {} did not end in time", tunnel.id, tunnel.pool.target.name);
                tunnel.kill();
            }
        }
    }

    fn pools(&self) -> watch::Ref<'_, Arc<Pools>> {
        self.pools.borrow()
    }
}

impl Drop for Tunnels {
    fn drop(&mut self) {
        self.follow(Vec::new());
    }
}

/// A lock whose data is whole between statements, so that a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
