//! The daemon: starts everything in order, says so, and stops it in order.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use dispatcher_common::globals::GLOBAL_LOG;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};

use crate::{
    config::{Amendments, Config, Shortage, changes},
    control::{self, Socket},
    counted,
    dataplane::{self, Dataplane, memory_bytes, monotonic_ns},
    discovery, events, health, netlink, privileges,
    reconcile::{self, Actual, Reach},
    reload::{self, AMENDMENTS, Source},
    saved,
    state::{Base, Shared},
    store::{self, Store},
    terminate,
    workers::Workers,
};

/// Sign of life: a quarter of the age at which the data path gives us up.
const HEARTBEAT: Duration = Duration::from_millis(250);
/// A cookie lives for one to two of these.
const KEY_LIFE: Duration = Duration::from_secs(60);
/// Expired sessions are removed this often.
const SWEEP: Duration = Duration::from_secs(5);
/// Loads are counted this often, where a balancer asks for them.
const COUNT: Duration = Duration::from_secs(1);
/// The same where hellos wait for connections to end.
const COUNT_SOON: Duration = Duration::from_millis(100);
/// How long the start waits for neighbours to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why the daemon does not start, or stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The data path.
    #[error(transparent)]
    Dataplane(#[from] dataplane::Error),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// Routes and neighbours.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// Capabilities.
    #[error(transparent)]
    Privileges(#[from] privileges::Error),
    /// The state file.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// Maps that were taken over are too small for the configuration.
    #[error(
        "the pinned maps have a capacity {name} of {have}, the services need {need}; `dispatcherctl detach` before the start gives them their new size, and ends connections, and sessions but those in the state file"
    )]
    Shortage {
        /// Which, as under `[capacity]`.
        name: &'static str,
        /// What there is.
        have: u32,
        /// What the services need.
        need: u64,
    },
    /// A service that ends TLS.
    #[error(transparent)]
    Terminate(#[from] terminate::Error),
    /// The address of the metrics.
    #[error("metrics: listening on {at}: {source}; set another address with `metrics`, or stop who has it")]
    Metrics {
        /// The address.
        at: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The threads of the runtime.
    #[error("starting threads: {0}")]
    Runtime(io::Error),
    /// A task ended that should not.
    #[error("{task} stopped: {reason}")]
    Task {
        /// Which.
        task: &'static str,
        /// Why.
        reason: String,
    },
}

/// How to run, beside the configuration.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Do not give up privileges after start.
    pub keep_privileges: bool,
    /// Where the configuration comes from: SIGHUP and `dispatcherctl reload` read it again.
    pub source: Option<Source>,
}

/// Runs until `shutdown` is ready. What is done is said to `out`, a line a step; the last line of the
/// start is `dispatcherd: ready`. Call it before any other thread is started: capabilities belong to
/// threads.
pub fn run(
    config: Config,
    options: Options,
    out: &mut (dyn Write + Send),
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    // Until somebody waits for it: it would end the process.
    hold_hang_ups(true);
    let (services, interfaces) = (config.services.len(), config.interfaces.len());
    say(out, &format!("{} on {}", counted(services, "service"), counted(interfaces, "interface")));
    for interface in &config.interfaces {
        dataplane::find_interface(&interface.name)?;
    }
    let store = config.state.as_deref().map(Store::open).transpose()?;
    if let Some(store) = &store {
        say(out, &format!("state: {}", store.path().display()));
    }
    let (config, base) = with_amendments(config, store.as_ref(), out)?;
    let dataplane = match &config.pin {
        Some(folder) => Dataplane::load_pinned(dataplane::object(), &config.capacities, folder)?,
        None => Dataplane::load(dataplane::object(), &config.capacities)?,
    };
    let prepared = match prepare(&config, &options, &dataplane, store.as_ref(), out) {
        Ok(prepared) => prepared,
        Err(error) => {
            dataplane.give_up();
            return Err(error);
        }
    };
    let Prepared { actual, mut socket, scrapes, ending, runtime, workers } = prepared;
    let shared = Arc::new(Shared::new(config, base, options.source, dataplane, actual, store, workers));
    let result = runtime.block_on(serve(shared, &mut socket, scrapes, ending, out, shutdown));
    // A walk through a map may be under way; nothing is lost with it.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// The file with what the operator has said of backends since it was read, as far as it still goes with it.
fn with_amendments(
    file: Config,
    store: Option<&Store>,
    out: &mut (dyn Write + Send),
) -> Result<(Config, Base), Error> {
    let known = store.map(|store| store.document::<Amendments>(AMENDMENTS)).transpose()?.flatten();
    let mut amendments = known.unwrap_or_default();
    let (config, errors) = file.amended_where_it_fits(&mut amendments);
    for error in errors {
        log::warn!("the operator's word does not go with the file any more, and is left out: {error}");
    }
    for line in changes(&file, &config).lines {
        say(out, &format!("by the operator: {line}"));
    }
    Ok((config, Base { file, amendments }))
}

/// What a daemon needs beside its data path.
struct Prepared {
    actual: Actual,
    socket: Socket,
    scrapes: Option<TcpListener>,
    ending: terminate::Prepared,
    runtime: Runtime,
    workers: Arc<Workers>,
}

/// All that can fail before packets depend on us.
fn prepare(
    config: &Config,
    options: &Options,
    dataplane: &Dataplane,
    store: Option<&Store>,
    out: &mut (dyn Write + Send),
) -> Result<Prepared, Error> {
    let capacities = dataplane.capacities();
    let mebibytes = memory_bytes(capacities) as f64 / f64::from(1 << 20);
    say(
        out,
        &format!(
            "maps: {mebibytes:.1} MiB, {}, {}",
            counted(capacities.flows, "flow"),
            counted(capacities.sessions, "session")
        ),
    );
    if let Some(folder) = dataplane.pinned() {
        let what = if dataplane.taken_over() { "taken over from" } else { "pinned in" };
        say(out, &format!("{what} {}", folder.display()));
    }
    for (name, there, wanted) in capacities.differences(&config.capacities) {
        log::warn!(
            "capacity {name}: the pinned map has {there} and keeps them, not {wanted}; `dispatcherctl detach` before the start gives it its new size, and ends connections, and sessions but those in the state file"
        );
    }
    if let Some(Shortage { name, have, need }) = config.shortage(capacities) {
        return Err(Error::Shortage { name, have, need });
    }
    let mut actual = Actual::take_over(dataplane)?;
    if let Some(store) = store.filter(|_| !dataplane.taken_over()) {
        actual.cid_lengths = restore(store, dataplane, config, out);
    }
    let socket = Socket::bind(&config.control, config.control_group.as_deref())?;
    say(out, &format!("control: {}", config.control.display()));
    let scrapes = config.metrics.map(|at| {
        let listener = TcpListener::bind(at).map_err(|source| Error::Metrics { at, source })?;
        say(out, &format!("metrics: http://{at}/metrics"));
        Ok::<_, Error>(listener)
    });
    let scrapes = scrapes.transpose()?;
    let ending = terminate::prepare(config)?;
    for service in &config.services {
        for vip in service.listeners() {
            say(out, &format!("service {}: listening on {vip}", service.name));
        }
    }
    for interface in &config.interfaces {
        let mode = dataplane.attach(&interface.name, interface.attach)?;
        say(out, &format!("attached to {} ({mode})", interface.name));
    }
    for interface in dataplane.settled()? {
        say(out, &format!("detached from {interface}"));
    }
    if let Err(error) = dataplane.anchor_release() {
        log::warn!(
            "{error}: hellos held at the same time wait 25 ms for their backend; start with CAP_SYS_ADMIN"
        );
    }
    if !options.keep_privileges {
        privileges::drop_privileges()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // For all but clients and tunnels.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let workers = Workers::start().map_err(Error::Runtime)?;
    Ok(Prepared { actual, socket, scrapes, ending, runtime, workers })
}

/// Before a packet is seen, the sessions that were saved. Without them it goes on all the same. Returns the
/// lengths of the QUIC connection IDs among them.
fn restore(
    store: &Store,
    dataplane: &Dataplane,
    config: &Config,
    out: &mut (dyn Write + Send),
) -> BTreeMap<u32, u32> {
    match saved::restore(store, dataplane, config) {
        Ok(Some(saved::Restored { sessions, left_out, cid_lengths })) => {
            let others = if left_out > 0 {
                format!("; {left_out} left out: expired, or of services or backends that are not configured")
            } else {
                String::new()
            };
            say(out, &format!("restored {}{others}", counted(sessions, "session")));
            let room = dataplane.capacities().sessions;
            if sessions > room.into() {
                log::warn!(
                    "of {sessions} restored sessions {room} have room at most; raise capacity.sessions"
                );
            }
            cid_lengths
        }
        Ok(None) => BTreeMap::new(),
        Err(error) => {
            log::warn!("{error}; sessions are not restored");
            BTreeMap::new()
        }
    }
}

/// At the end.
async fn save(shared: &Arc<Shared>, out: &mut (dyn Write + Send)) {
    let Some(store) = &shared.store else { return };
    let own = Arc::clone(shared);
    let saved = tokio::task::spawn_blocking(move || {
        own.store.as_ref().map(|store| saved::save(&own.dataplane, store)).transpose()
    });
    match saved.await {
        Ok(Ok(sessions)) => {
            let sessions = counted(sessions.unwrap_or_default(), "session");
            say(out, &format!("saved {sessions} in {}", store.path().display()));
        }
        Ok(Err(error)) => log::error!("{error}; the sessions saved before stay saved"),
        Err(error) => log::error!("saving sessions: {error}"),
    }
}

async fn serve(
    shared: Arc<Shared>,
    socket: &mut Socket,
    scrapes: Option<TcpListener>,
    ending: terminate::Prepared,
    out: &mut (dyn Write + Send),
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let logger = start_logger(&shared.dataplane)?;
    let attached: netlink::AttachedNow = {
        let shared = Arc::clone(&shared);
        Box::new(move || shared.dataplane.attached().into_iter().map(|one| one.ifindex).collect())
    };
    let (mut reach, _follower) = netlink::follow(shared.addresses.subscribe(), attached).await?;
    let mut shutdown = std::pin::pin!(shutdown);
    tokio::select! {
        // First, so that signals are waited for from now on.
        biased;
        () = &mut shutdown => return Ok(()),
        () = wait_for_neighbours(&mut reach) => {}
    }
    shared.state().reach = reach.borrow_and_update().clone();
    if shared.follows_load() {
        // Connections may be open that a daemon before us has seen.
        shared.count_loads();
    } else {
        shared.reconcile(|_| {});
    }

    let mut tasks: JoinSet<(&'static str, String)> = JoinSet::new();
    if let (Some(held), Some(ring)) = (shared.dataplane.take_held(), shared.dataplane.take_events()) {
        let shared = Arc::clone(&shared);
        tasks.spawn(async move { ("the event task", ended(events::serve(shared, held, ring).await)) });
    }
    tasks.spawn(heartbeat(Arc::clone(&shared)));
    tasks.spawn(follow(Arc::clone(&shared), reach));
    tasks.spawn(stay_attached(Arc::clone(&shared)));
    tasks.spawn(sweep(Arc::clone(&shared)));
    tasks.spawn(discovery::serve(Arc::clone(&shared)));
    tasks.spawn(count(Arc::clone(&shared)));
    tasks.spawn(hang_ups(Arc::clone(&shared), signal(SignalKind::hangup()).map_err(Error::Runtime)?));
    // One that came during the start is told now.
    hold_hang_ups(false);
    tasks.spawn(reload::deadlines(Arc::clone(&shared)));
    tasks.spawn(health::serve(Arc::clone(&shared)));
    tasks.spawn(saved::serve(Arc::clone(&shared)));
    shared.terminator.install(&shared, ending);
    tasks.spawn(terminate::serve(Arc::clone(&shared)));
    if let Some(listener) = scrapes {
        let serve = control::metrics::serve(Arc::clone(&shared), listener);
        tasks.spawn(async move { ("serving metrics", ended(serve.await)) });
    }
    if let Some(logger) = logger {
        tasks.spawn(logger);
    }
    report_backends(&shared, out);
    say(out, "ready");
    let result = tokio::select! {
        () = &mut shutdown => Ok(()),
        ended = control::serve(Arc::clone(&shared), socket) => {
            Err(Error::Task { task: "the control API", reason: self::ended(ended) })
        }
        Some(ended) = tasks.join_next() => Err(match ended {
            Ok((task, reason)) => Error::Task { task, reason },
            Err(error) => Error::Task { task: "a task", reason: error.to_string() },
        }),
    };
    terminate::shutdown(&shared).await;
    tasks.shutdown().await;
    save(&shared, out).await;
    if let Some(folder) = shared.dataplane.pinned() {
        // Nothing is to be held for us any more, and nothing told that only we ask for.
        let farewell = shared.dataplane.update_globals(|globals| (globals.heartbeat, globals.trace) = (0, 0));
        if let Err(error) = farewell {
            log::warn!("{error}");
        }
        say(
            out,
            &format!(
                "packets go on without a daemon, by what is pinned in {}; `dispatcherctl detach` ends that",
                folder.display()
            ),
        );
        return result;
    }
    for interface in shared.dataplane.attached() {
        match shared.dataplane.detach(&interface.name) {
            Ok(_) => say(out, &format!("detached from {}", interface.name)),
            Err(error) => log::warn!("{error}"),
        }
    }
    result
}

/// Says one step; that nobody reads it any more is no reason to stop.
fn say(out: &mut (dyn Write + Send), line: &str) {
    if writeln!(out, "dispatcherd: {line}").and_then(|()| out.flush()).is_err() {
        log::debug!("{line}");
    }
}

fn ended(result: io::Result<()>) -> String {
    result.err().map_or_else(|| "it came to its end".to_owned(), |error| error.to_string())
}

fn report_backends(shared: &Shared, out: &mut (dyn Write + Send)) {
    let state = shared.state();
    let config = shared.config();
    let desired = state.desired(&config);
    for service in &config.services {
        for backend in &service.backends {
            let (condition, reason) = reconcile::status(&desired, &state.actual, backend);
            let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
            say(out, &format!("backend {}/{}: {condition}{reason}", service.name, backend.name));
        }
    }
}

/// Gives neighbours that were just asked for the time to answer.
async fn wait_for_neighbours(reach: &mut watch::Receiver<netlink::Reachability>) {
    let deadline = Instant::now() + PATIENCE;
    let waiting = |reach: &Reach| matches!(reach, Reach::Down(reason) if reason == netlink::NO_NEIGHBOUR);
    while reach.borrow_and_update().values().any(waiting) {
        if !matches!(timeout_at(deadline, reach.changed()).await, Ok(Ok(()))) {
            break;
        }
    }
}

/// Writes signs of life, and new cookie keys.
async fn heartbeat(shared: Arc<Shared>) -> (&'static str, String) {
    const TASK: &str = "the heartbeat";
    let mut tick = interval(HEARTBEAT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut rotated = Instant::now();
    loop {
        tick.tick().await;
        let mut result = shared.dataplane.update_globals(|globals| globals.heartbeat = monotonic_ns());
        if rotated.elapsed() >= KEY_LIFE {
            rotated = Instant::now();
            result = result.and_then(|()| rotate(&shared.dataplane));
        }
        if let Err(error) = result {
            return (TASK, error.to_string());
        }
    }
}

/// The next key is there before anything is made with it.
fn rotate(dataplane: &Dataplane) -> Result<(), dataplane::Error> {
    let key = dataplane::random_key()?;
    dataplane.update_globals(|globals| {
        let next = (globals.epoch.wrapping_add(1) & 1) as usize;
        globals.cookie_keys[next] = key;
    })?;
    dataplane.update_globals(|globals| globals.epoch = globals.epoch.wrapping_add(1))
}

/// Brings the maps in line with what is reached.
async fn follow(
    shared: Arc<Shared>,
    mut reach: watch::Receiver<netlink::Reachability>,
) -> (&'static str, String) {
    const TASK: &str = "following neighbours";
    while reach.changed().await.is_ok() {
        let found = reach.borrow_and_update().clone();
        let shared = Arc::clone(&shared);
        let written = tokio::task::spawn_blocking(move || {
            let before = conditions(&shared);
            shared.reconcile(|state| state.reach = found);
            for (name, now) in conditions(&shared).difference(&before) {
                log::info!("backend {name}: {now}");
            }
        });
        if let Err(error) = written.await {
            return (TASK, error.to_string());
        }
    }
    (TASK, "netlink is gone".to_owned())
}

/// Each backend's name and condition.
fn conditions(shared: &Shared) -> BTreeSet<(String, String)> {
    let state = shared.state();
    let config = shared.config();
    let desired = state.desired(&config);
    let backends = config.services.iter().flat_map(|service| {
        service.backends.iter().map(move |backend| (format!("{}/{}", service.name, backend.name), backend))
    });
    backends
        .map(|(name, backend)| {
            let (condition, reason) = reconcile::status(&desired, &state.actual, backend);
            let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
            (name, format!("{condition}{reason}"))
        })
        .collect()
}

/// An interface that goes takes its programs with it; one that comes back under its name gets them again.
async fn stay_attached(shared: Arc<Shared>) -> (&'static str, String) {
    let mut tick = interval(COUNT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = BTreeSet::new();
    loop {
        tick.tick().await;
        let attached = shared.dataplane.attached();
        for interface in &shared.config().interfaces {
            let name = &interface.name;
            let old = attached.iter().find(|one| one.name == *name).map(|one| one.ifindex);
            let now = dataplane::find_interface(name).ok();
            if old == now && old.is_some() {
                continue;
            }
            if old.is_some() {
                shared.dataplane.forget(name);
                log::warn!("interface {name} is gone; it is attached again when it is back");
            }
            let Some(_) = now else { continue };
            match shared.dataplane.attach(name, interface.attach) {
                Ok(mode) => {
                    told.remove(name);
                    log::warn!("interface {name} is back: attached again ({mode})");
                }
                // Once is enough.
                Err(error) if told.insert(name.clone()) => log::error!("{error}; this is tried again"),
                Err(_) => {}
            }
        }
    }
}

async fn sweep(shared: Arc<Shared>) -> (&'static str, String) {
    const TASK: &str = "removing expired sessions";
    let mut full = [false; 2];
    loop {
        tokio::time::sleep(SWEEP).await;
        let swept = tokio::task::spawn_blocking({
            let shared = Arc::clone(&shared);
            move || shared.dataplane.sessions().sweep(dataplane::monotonic_seconds())
        });
        match swept.await {
            Ok(Ok(swept)) => {
                shared.counts.swept(swept);
                let tables = [
                    (swept.known, "sessions", "known sessions"),
                    (swept.provisional, "provisional", "sessions that no server confirmed"),
                ];
                for (full, ((entries, room), capacity, what)) in full.iter_mut().zip(tables) {
                    let now = entries >= u64::from(room) / 10 * 9;
                    if now && !*full {
                        log::warn!(
                            "{entries} of {room} {what}: from now on those that were not used for longest are \
                             forgotten; raise capacity.{capacity}"
                        );
                    }
                    *full = now;
                }
            }
            Ok(Err(error)) => log::warn!("{error}"),
            Err(error) => return (TASK, error.to_string()),
        }
    }
}

/// Holds SIGHUP back from this thread and those that it starts, or lets it through to this one.
fn hold_hang_ups(hold: bool) {
    let how = if hold { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: `set` is made before it is used, and outlives the calls.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGHUP);
        libc::pthread_sigmask(how, &set, std::ptr::null_mut());
    }
}

/// SIGHUP reads the configuration again.
async fn hang_ups(shared: Arc<Shared>, mut signals: Signal) -> (&'static str, String) {
    const TASK: &str = "waiting for SIGHUP";
    while signals.recv().await.is_some() {
        match reload::reload(&shared, false).await {
            Ok(done) => done.changes.iter().for_each(|line| log::info!("reload: {line}")),
            Err(error) => log::error!("reload: {error}"),
        }
    }
    (TASK, "no more signals".to_owned())
}

async fn count(shared: Arc<Shared>) -> (&'static str, String) {
    let mut took = Duration::ZERO;
    loop {
        // Whoever waits for connections to end waits for us to see it. A tenth of a processor is enough for that.
        let soon = if shared.qos.follows_load() { COUNT_SOON.max(9 * took) } else { COUNT };
        let next = Instant::now() + COUNT;
        while Instant::now() < next {
            tokio::time::sleep(soon.min(COUNT)).await;
            if shared.qos.waits_for_ends() {
                break;
            }
        }
        if !shared.follows_load() {
            continue;
        }
        let (shared, began) = (Arc::clone(&shared), Instant::now());
        let counted = tokio::task::spawn_blocking(move || shared.count_loads()).await;
        took = began.elapsed();
        if let Err(error) = counted {
            return ("counting connections", error.to_string());
        }
    }
}

/// Hands on what the programs log, if they were built to; they do so at level debug.
fn start_logger(
    dataplane: &Dataplane,
) -> Result<Option<impl Future<Output = (&'static str, String)> + use<>>, Error> {
    let Some(mut logger) = dataplane.logger() else { return Ok(None) };
    if log::log_enabled!(log::Level::Debug) {
        dataplane.update_globals(|globals| globals.flags |= GLOBAL_LOG)?;
    }
    Ok(Some(async move {
        let mut tick = interval(HEARTBEAT);
        loop {
            tick.tick().await;
            logger.flush();
        }
    }))
}
