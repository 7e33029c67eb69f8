//! What the tasks of the daemon share.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use dispatcher_common::flow::{FLAG_TO_BACKEND, is_closed};

use crate::{
    config::{AdminState, Config},
    dataplane::Dataplane,
    discovery::Discovery,
    events::Counts,
    reconcile::{self, Actual, Desired, Pool, Reach},
};

/// Pools by frontend index, and how often loads were counted.
type Pools = (Arc<BTreeMap<u32, Pool>>, u64);

pub(crate) struct Shared {
    pub(crate) dataplane: Dataplane,
    /// The configuration in force.
    config: Mutex<Arc<Config>>,
    pub(crate) started: Instant,
    pub(crate) counts: Counts,
    pub(crate) discovery: Discovery,
    state: Mutex<State>,
    pools: Mutex<Pools>,
}

/// What changes while the daemon runs.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) admin: BTreeMap<u32, AdminState>,
    pub(crate) reach: BTreeMap<IpAddr, Reach>,
    loads: BTreeMap<u32, u64>,
    /// What is known of tickets, by backend id.
    pub(crate) tickets: BTreeMap<u32, u32>,
    counted: u64,
    pub(crate) actual: Actual,
}

impl State {
    pub(crate) fn desired<'s>(&'s self, config: &'s Config) -> Desired<'s> {
        Desired { config, admin: &self.admin, reach: &self.reach, loads: &self.loads, tickets: &self.tickets }
    }
}

impl Shared {
    pub(crate) fn new(config: Config, dataplane: Dataplane) -> Self {
        Self {
            dataplane,
            config: Mutex::new(Arc::new(config)),
            started: Instant::now(),
            counts: Counts::default(),
            discovery: Discovery::default(),
            state: Mutex::default(),
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
        let config = self.config();
        let changes = reconcile::diff(&state.desired(&config), &state.actual);
        for change in &changes {
            if let Err(error) = state.actual.apply(change, &self.dataplane) {
                log::error!("{error}; this is tried again with the next change");
                break;
            }
        }
        let pools = reconcile::pools(&state.desired(&config), &state.actual);
        *self.pools.lock().unwrap_or_else(PoisonError::into_inner) = (Arc::new(pools), state.counted);
    }

    /// True when a balancer wants to know how many connections backends have.
    pub(crate) fn follows_load(&self) -> bool {
        self.config().services.iter().any(|service| service.balance.follows_load())
    }

    /// Counts the connections of each backend and lets tables follow.
    pub(crate) fn count_loads(&self) {
        let mut by_index: BTreeMap<u32, u64> = BTreeMap::new();
        for (_, flow) in self.dataplane.flows().iter() {
            if flow.flags & FLAG_TO_BACKEND != 0 && !is_closed(flow.flags) {
                *by_index.entry(flow.backend).or_insert(0) += 1;
            }
        }
        self.reconcile(|state| {
            let actual = &state.actual;
            state.loads =
                by_index.iter().filter_map(|(index, n)| Some((actual.backend_id(*index)?, *n))).collect();
            state.counted += 1;
        });
    }
}
