//! What the tasks of the daemon share.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use dispatcher_common::{
    flow::{Flow, FlowKey},
    service::stable_id,
};
use tokio::sync::watch;

use crate::{
    config::{AdminState, Amendments, Config},
    control::{qos::Looks, trace::Trace},
    dataplane::{self, Dataplane, monotonic_seconds},
    discovery::Discovery,
    events::Counts,
    health::Suspects,
    loads::{Closing, Load, Tenures},
    policing::Policing,
    qos::Qos,
    reconcile::{self, Actual, Desired, Pool, Reach, Unhealthy},
    reload::{self, Source},
    response_times::ResponseTimes,
    slow_start::{self, SlowStart},
    store::Store,
    terminate::Terminator,
    workers::Workers,
};

/// Pools by frontend index, and how often loads were counted.
type Pools = (Arc<BTreeMap<u32, Pool>>, u64);

pub(crate) struct Shared {
    pub(crate) dataplane: Dataplane,
    /// What outlives a reboot, where something does.
    pub(crate) store: Option<Store>,
    /// The configuration in force.
    config: Mutex<Arc<Config>>,
    /// Where it comes from.
    pub(crate) source: Option<Source>,
    /// What it is made of; whoever changes it holds this.
    pub(crate) base: tokio::sync::Mutex<Base>,
    /// Addresses whose routes and neighbours are followed.
    pub(crate) addresses: watch::Sender<BTreeSet<IpAddr>>,
    pub(crate) started: Instant,
    pub(crate) counts: Counts,
    pub(crate) trace: Trace,
    pub(crate) discovery: Discovery,
    pub(crate) suspects: Suspects,
    pub(crate) terminator: Terminator,
    pub(crate) qos: Qos,
    pub(crate) looks: Looks,
    /// Held while connections are counted.
    closing: Mutex<Closing>,
    state: Mutex<State>,
    pools: Mutex<Pools>,
}

/// The configuration in force is the file with what the operator said since it was read.
pub(crate) struct Base {
    pub(crate) file: Config,
    pub(crate) amendments: Amendments,
}

/// What changes while the daemon runs.
#[derive(Default)]
pub(crate) struct State {
    /// When a drain ends, in Unix time in seconds, by backend id.
    pub(crate) deadlines: BTreeMap<u32, u64>,
    pub(crate) reach: BTreeMap<IpAddr, Reach>,
    loads: BTreeMap<u32, u64>,
    tenures: Tenures,
    responses: ResponseTimes,
    /// What is known of tickets, by backend id.
    pub(crate) tickets: BTreeMap<u32, u32>,
    /// Why health checks took an address out, by backend id and family.
    pub(crate) health: BTreeMap<(u32, bool), Unhealthy>,
    pub(crate) slow_start: SlowStart,
    counted: u64,
    /// What the data path has of classes and limits.
    policing: Option<Policing>,
    pub(crate) actual: Actual,
}

impl State {
    pub(crate) fn desired<'s>(&'s self, config: &'s Config) -> Desired<'s> {
        Desired {
            config,
            reach: &self.reach,
            loads: &self.loads,
            responses: self.responses.sums(),
            tickets: &self.tickets,
            health: &self.health,
            percent: self.slow_start.percent(),
        }
    }
}

fn deadlines(amendments: &Amendments) -> BTreeMap<u32, u64> {
    amendments.deadlines().map(|(name, deadline)| (stable_id(name), deadline)).collect()
}

impl Shared {
    /// `config` is what `base` makes.
    pub(crate) fn new(
        config: Config,
        base: Base,
        source: Option<Source>,
        dataplane: Dataplane,
        actual: Actual,
        store: Option<Store>,
        workers: Arc<Workers>,
    ) -> Self {
        let qos = Qos::default();
        qos.follow(&config);
        let mut tenures = Tenures::default();
        // Since when those have their indexes that a daemon before us gave them, nothing tells.
        tenures.follow(actual.backend_indexes(), 0);
        let state = State {
            tenures,
            deadlines: deadlines(&base.amendments),
            tickets: actual.tickets(),
            health: actual.health(),
            actual,
            ..State::default()
        };
        Self {
            dataplane,
            store,
            source,
            base: tokio::sync::Mutex::new(base),
            addresses: watch::Sender::new(reload::addresses(&config)),
            config: Mutex::new(Arc::new(config)),
            started: Instant::now(),
            counts: Counts::default(),
            trace: Trace::default(),
            discovery: Discovery::default(),
            suspects: Suspects::default(),
            terminator: Terminator::new(workers),
            qos,
            looks: Looks::default(),
            closing: Mutex::default(),
            state: Mutex::new(state),
            pools: Mutex::default(),
        }
    }

    /// The configuration in force now. A reload puts another in its place.
    pub(crate) fn config(&self) -> Arc<Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pools(&self) -> Pools {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of something and brings the maps in line with it. What fails is tried again next time.
    pub(crate) fn reconcile(&self, note: impl FnOnce(&mut State)) {
        let mut state = self.state();
        note(&mut state);
        if let Some(error) = self.settle(&mut state, &self.config()) {
            log::error!("{error}; this is tried again with the next change");
        }
    }

    /// Puts another configuration in force.
    pub(crate) fn replace(&self, config: Config, amendments: &Amendments) -> Option<dataplane::Error> {
        let mut state = self.state();
        let config = Arc::new(config);
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&config);
        state.deadlines = deadlines(amendments);
        self.qos.follow(&config);
        self.settle(&mut state, &config)
    }

    /// Brings the maps in line; the first failure ends it.
    fn settle(&self, state: &mut State, config: &Config) -> Option<dataplane::Error> {
        let takers = slow_start::takers(&state.desired(config));
        state.slow_start.follow(&takers, Instant::now());
        let changes = reconcile::diff(&state.desired(config), &state.actual);
        // By the clock that the data path reads: no connection of a new backend is older.
        let now = monotonic_seconds();
        let failed = changes.iter().find_map(|change| state.actual.apply(change, &self.dataplane).err());
        state.tenures.follow(state.actual.backend_indexes(), now);
        let local = config.services.iter().filter(|service| service.mode.is_local());
        let reached = local
            .map(|service| (service.id, reconcile::reached(&state.desired(config), &state.actual, service)));
        self.terminator.find(reached.collect());
        let failed = failed.or_else(|| self.police(state, config).err());
        let local = config.services.iter().filter(|service| service.mode.is_local());
        for backend in local.flat_map(|service| &service.backends) {
            if backend.state == AdminState::Offline {
                self.terminator.cut(backend.id);
            }
        }
        let pools = reconcile::pools(&state.desired(config), &state.actual);
        *self.pools.lock().unwrap_or_else(PoisonError::into_inner) = (Arc::new(pools), state.counted);
        failed
    }

    /// Brings the data path's classes and limits in line.
    fn police(&self, state: &mut State, config: &Config) -> Result<(), dataplane::Error> {
        let wanted = Policing::of(config, &state.actual);
        if state.policing.as_ref() == Some(&wanted) {
            return Ok(());
        }
        state.policing = None;
        wanted.apply(&self.dataplane)?;
        state.policing = Some(wanted);
        Ok(())
    }

    /// True when a balancer, or a limit, wants to know how many connections backends have.
    pub(crate) fn follows_load(&self) -> bool {
        self.qos.follows_load() || self.config().services.iter().any(|service| service.balance.follows_load())
    }

    /// Connections that are open at a backend.
    pub(crate) fn open(&self, index: u32) -> u64 {
        self.open_flows().filter(|(_, flow)| flow.backend == index).count() as u64
    }

    /// Each connection that is open.
    fn open_flows(&self) -> impl Iterator<Item = (FlowKey, Flow)> {
        // All of the flow table is read, which nobody who needs the state is to wait for.
        let tenures = self.state().tenures.clone();
        self.dataplane.flows().iter().filter(move |(_, flow)| tenures.is_open(flow))
    }

    /// Counts the connections of each backend and lets tables follow.
    pub(crate) fn count_loads(&self) {
        let by_index = {
            let mut closing = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
            closing.count(self.open_flows(), monotonic_seconds())
        };
        let classes = self.dataplane.class_ids();
        let classes = classes.map_err(|error| log::warn!("{error}")).unwrap_or_default();
        self.reconcile(|state| {
            let actual = &state.actual;
            let known = by_index.iter().filter_map(|(index, load)| Some((actual.backend_id(*index)?, load)));
            let by_id: BTreeMap<u32, &Load> = known.collect();
            state.loads =
                by_id.iter().map(|(id, load)| (*id, load.iter().copied().map(u64::from).sum())).collect();
            self.qos.count(|backend| {
                let mut by_class = BTreeMap::new();
                for (class, count) in classes.iter().zip(by_id.get(&backend).copied().into_iter().flatten()) {
                    *by_class.entry(*class).or_insert(0) += count;
                }
                by_class
            });
            let times = actual.backend_indexes().filter_map(|(id, index)| {
                let times = self.dataplane.backend_times(index);
                times.map_err(|error| log::warn!("{error}")).ok().map(|times| (id, times))
            });
            state.responses.look(&times.collect());
            state.counted += 1;
        });
    }
}
