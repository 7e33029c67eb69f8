//! Who is served first where a backend takes no more: classes share it by their weights.
//!
//! ```text
//! terminate:   request -> session, backend -> Gate (max_inflight)                -> tunnel -> answer
//! passthrough: held hello -> backend -> Pacer (connections_per_second, max_connections) -> release
//! ```
//!
//! - `fair::Queue` says whose turn it is: start-time fair queueing over classes, then clients.
//! - `gate::Gate` lets so many requests at a time to one backend; `limit::Adaptive` may say how many.
//! - `pace::Pacer` releases hellos to one backend.
//! - `most::Most` keeps classes from what others do not lend, and to their ceilings, of so many at a time; `rates::Rates` of
//!   so many a second.
//! - `book::Book` counts.
//!
//! A backend without limits has neither, and costs nothing but a look at a flag. All time is monotonic: a clock
//! that jumps changes nothing. New weights count from the next item on.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use dispatcher_common::service::Histogram;
use serde::Serialize;
use tokio::time::Instant;

use crate::config::{self, Class, Config, Queueing};

mod book;
mod fair;
mod gate;
mod limit;
mod most;
mod pace;
mod rates;

use self::pace::Pacer;
pub(crate) use self::{
    gate::{Gate, Permit, Refused},
    pace::Held,
};

/// What one backend can take. 0: no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Requests at a time.
    pub max_inflight: u32,
    /// No more wait.
    pub queue: u32,
    /// No request waits longer.
    pub queue_timeout: Duration,
    /// The number of requests at a time follows the backend's response times, up to `max_inflight`.
    pub adaptive: bool,
    /// New connections, of those that the daemon is asked about.
    pub connections_per_second: u32,
    /// Connections at a time; those of known sessions are not held up.
    pub max_connections: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_inflight: 0,
            queue: 1000,
            queue_timeout: Duration::from_secs(5),
            adaptive: false,
            connections_per_second: 0,
            max_connections: 0,
        }
    }
}

/// What is limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Requests of services that end TLS.
    Requests,
    /// Connections whose hellos the data path holds.
    Connections,
}

/// How one backend is shared.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Status {
    /// The backend's id.
    pub backend: u32,
    /// What is limited.
    pub what: What,
    /// As many at a time; 0: no limit. An adaptive limit as it is now.
    pub limit: u32,
    /// As many new ones in a second; 0: no limit.
    pub rate: u32,
    /// Requests under way. Of connections, only the data path knows.
    pub in_flight: u32,
    /// How many wait.
    pub queued: u32,
    /// Each class.
    pub classes: Vec<ClassStatus>,
}

/// How one class does at one backend.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ClassStatus {
    /// Id.
    pub id: u16,
    /// Name.
    pub name: String,
    /// Weight.
    pub weight: u32,
    /// Priority.
    pub priority: u8,
    /// Those that were let in.
    pub admitted: u64,
    /// Of these, those that waited.
    pub waited: u64,
    /// Of these, those that were let in when the class had more than its share of the last seconds.
    pub borrowed: u64,
    /// Those for which there was no room.
    pub shed: u64,
    /// Those that waited for too long.
    pub late: u64,
    /// Those whose client went while they waited.
    pub cancelled: u64,
    /// Under way now.
    pub in_flight: u32,
    /// Waiting now.
    pub queued: u32,
    /// Part of all that were let in in the last seconds.
    pub share: f64,
    /// The part that its weight says.
    pub due: f64,
    /// Waiting times of those that waited and were let in.
    #[serde(skip)]
    pub waits: Histogram,
}

/// The queues of all backends.
pub(crate) struct Qos {
    began: Instant,
    /// By backend id. A gate stays as long as its backend is configured.
    gates: RwLock<BTreeMap<u32, Arc<Gate>>>,
    /// Whether there is any limit.
    gated: AtomicBool,
    pacers: Mutex<BTreeMap<u32, Pacer>>,
    paced: AtomicBool,
}

impl Default for Qos {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            gates: RwLock::default(),
            gated: AtomicBool::default(),
            pacers: Mutex::default(),
            paced: AtomicBool::default(),
        }
    }
}

impl Qos {
    /// Sets classes, and the limits of all backends, by their ids. Counters stay, and who waits goes on waiting,
    /// where the new settings let him.
    pub(crate) fn set(&self, classes: &[Class], limits: impl IntoIterator<Item = (u32, Limits)>) {
        let mut all = classes.to_vec();
        if !all.iter().any(|class| class.id == 0) {
            all.insert(0, Class::default());
        }
        let limits: BTreeMap<u32, Limits> = limits.into_iter().collect();
        let none = Limits::default();
        let mut gates = self.gates.write().unwrap_or_else(PoisonError::into_inner);
        let mut pacers = lock(&self.pacers);
        for (backend, limits) in &limits {
            match gates.get(backend) {
                Some(gate) => gate.set(&all, *limits),
                None if limits.max_inflight > 0 => drop(gates.insert(*backend, Gate::new(&all, *limits))),
                None => {}
            }
            match pacers.get_mut(backend) {
                Some(pacer) => pacer.set(&all, *limits),
                None if is_paced(limits) => drop(pacers.insert(*backend, Pacer::new(&all, *limits))),
                None => {}
            }
        }
        gates.retain(|backend, gate| {
            let stays = limits.contains_key(backend);
            if !stays {
                gate.set(&all, none);
            }
            stays
        });
        pacers.retain(|backend, pacer| {
            if !limits.contains_key(backend) {
                pacer.set(&all, none);
            }
            limits.contains_key(backend) || pacer.waiting() > 0
        });
        self.gated.store(gates.values().any(|gate| gate.limits().max_inflight > 0), Relaxed);
        self.paced
            .store(pacers.values().any(|pacer| is_paced(&pacer.limits()) || pacer.waiting() > 0), Relaxed);
    }

    /// Sets what a configuration says.
    pub(crate) fn follow(&self, config: &Config) {
        let limits = config.services.iter().flat_map(|service| {
            service.backends.iter().map(move |backend| {
                let config::Limits { connections_per_second, max_inflight, max_connections, .. } =
                    service.limits_of(backend);
                let Queueing { queue, queue_timeout, adaptive, .. } = service.queueing;
                // The data path keeps to the rate where connections do not wait.
                let connections_per_second =
                    if service.holds_connections() { connections_per_second } else { 0 };
                let queue_timeout = Duration::from_secs(queue_timeout.into());
                let limits = Limits {
                    max_inflight,
                    queue,
                    queue_timeout,
                    adaptive,
                    connections_per_second,
                    max_connections,
                };
                (backend.id, limits)
            })
        });
        self.set(&config.classes, limits);
    }

    /// The gate of a backend with a limit of requests.
    pub(crate) fn gate(&self, backend: u32) -> Option<Arc<Gate>> {
        if !self.gated.load(Relaxed) {
            return None;
        }
        let gates = self.gates.read().unwrap_or_else(PoisonError::into_inner);
        gates.get(&backend).cloned()
    }

    /// Requests that wait for a backend.
    pub(crate) fn waiting(&self, backend: u32) -> u64 {
        self.gate(backend).map_or(0, |gate| gate.waiting() as u64)
    }

    /// True when the connections of backends must be counted.
    pub(crate) fn follows_load(&self) -> bool {
        self.paced.load(Relaxed)
            && lock(&self.pacers).values().any(|pacer| pacer.limits().max_connections > 0)
    }

    /// True when hellos wait for connections to end.
    pub(crate) fn waits_for_ends(&self) -> bool {
        self.paced.load(Relaxed) && lock(&self.pacers).values().any(Pacer::waits_for_ends)
    }

    /// Takes note of the connections that backends have, by class.
    pub(crate) fn count(&self, load: impl Fn(u32) -> BTreeMap<u16, u32>) {
        if self.paced.load(Relaxed) {
            lock(&self.pacers).iter_mut().for_each(|(backend, pacer)| pacer.count(&load(*backend)));
        }
    }

    /// Lets a hello wait for its backend; false if that has no limit.
    pub(crate) fn hold(&self, backend: u32, class: impl FnOnce() -> u16, client: IpAddr, held: Held) -> bool {
        if !self.paced.load(Relaxed) {
            return false;
        }
        let mut pacers = lock(&self.pacers);
        let Some(pacer) = pacers.get_mut(&backend) else { return false };
        pacer.hold(self.began.elapsed(), class(), client, held);
        true
    }

    /// The hellos that may go now, with their backends' ids, at most so many, of those that still wait.
    pub(crate) fn release(&self, most: usize, waits: impl Fn(&Held) -> bool) -> Vec<(u32, Held)> {
        let mut all = Vec::new();
        if !self.paced.load(Relaxed) {
            return all;
        }
        let now = self.began.elapsed();
        for (backend, pacer) in lock(&self.pacers).iter_mut() {
            while all.len() < most
                && let Some(held) = pacer.release(now, &waits)
            {
                all.push((*backend, held));
            }
        }
        all
    }

    /// When the next hello is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        if !self.paced.load(Relaxed) {
            return None;
        }
        let next = lock(&self.pacers).values().filter_map(Pacer::next).min();
        next.map(|due| self.began + due)
    }

    /// How all backends with limits are shared, ordered by id.
    pub(crate) fn snapshot(&self) -> Vec<Status> {
        let gates = self.gates.read().unwrap_or_else(PoisonError::into_inner).clone();
        let requests = gates.iter().map(|(backend, gate)| {
            let (limit, in_flight, queued, classes) = gate.read();
            Status { backend: *backend, what: What::Requests, limit, rate: 0, in_flight, queued, classes }
        });
        let mut all: Vec<Status> = requests.collect();
        for (backend, pacer) in lock(&self.pacers).iter_mut() {
            let Limits { max_connections: limit, connections_per_second: rate, .. } = pacer.limits();
            let (queued, classes) = pacer.read(self.began.elapsed());
            let what = What::Connections;
            all.push(Status { backend: *backend, what, limit, rate, in_flight: 0, queued, classes });
        }
        all.sort_by_key(|one| one.backend);
        all
    }
}

const fn is_paced(limits: &Limits) -> bool {
    limits.connections_per_second > 0 || limits.max_connections > 0
}

/// A weight of 0 is one of 1: the configuration refuses it.
fn weight(class: &Class) -> u64 {
    class.weight.max(1).into()
}

/// What the locks protect is whole between statements, so that a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn requests(max_inflight: u32) -> Limits {
        Limits { max_inflight, ..Limits::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn settings_come_and_go() {
        let qos = Qos::default();
        assert!(qos.gate(1).is_none() && !qos.follows_load() && qos.snapshot().is_empty());
        qos.set(&[], [(1, requests(1)), (2, requests(0))]);
        assert!(qos.gate(2).is_none());
        let gate = qos.gate(1).expect("a gate");
        let permit = gate.enter(9, CLIENT).await.expect("room");
        let class = Class { id: 9, name: "gold".to_owned(), weight: 5, ..Class::default() };
        qos.set(&[Class::default(), class], [(1, requests(2))]);
        assert!(qos.gate(1).is_some_and(|same| Arc::ptr_eq(&same, &gate)), "it stays, with who is under way");
        let status = qos.snapshot();
        let [one] = status.as_slice() else { panic!("{status:?}") };
        assert_eq!(
            (one.backend, one.what, one.limit, one.in_flight, one.queued),
            (1, What::Requests, 2, 1, 0)
        );
        assert_eq!(one.classes.iter().map(|class| class.admitted).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(one.classes[1].due, 5.0 / 6.0);
        // Who waits for a backend that goes is let in, and finds that it is gone.
        let _second = gate.enter(0, CLIENT).await.expect("room");
        let waiting = gate.enter(0, CLIENT);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert_eq!(qos.waiting(1), 1);
        qos.set(&[], []);
        assert!(qos.gate(1).is_none());
        assert!(waiting.await.is_ok());
        drop(permit);
    }

    #[tokio::test(start_paused = true)]
    async fn hellos_wait_where_there_is_a_rate() {
        let qos = Qos::default();
        let held = |slot| Held {
            slot,
            flow: dispatcher_common::flow::FlowKey { ports: slot, ..Default::default() },
            ..Held::default()
        };
        assert!(!qos.hold(1, || 0, CLIENT, held(1)));
        qos.set(&[], [(1, Limits { connections_per_second: 10, ..Limits::default() }), (2, requests(3))]);
        assert!(!qos.hold(2, || 0, CLIENT, held(1)) && qos.next().is_none() && !qos.follows_load());
        for slot in 0..3 {
            assert!(qos.hold(1, || 0, CLIENT, held(slot)));
        }
        assert_eq!(qos.release(255, |_| true), [(1, held(0)), (1, held(1))]);
        let due = qos.next().expect("it is due");
        assert_eq!(due.saturating_duration_since(Instant::now()).as_millis(), 100);
        tokio::time::sleep_until(due).await;
        assert_eq!(qos.release(0, |_| true), []);
        // Without the limit, what still waits goes at once.
        assert!(qos.hold(1, || 0, CLIENT, held(4)));
        qos.set(&[], []);
        assert_eq!(qos.release(255, |_| true).len(), 2);
        assert!(qos.next().is_none());
        qos.set(&[], []);
        assert!(qos.snapshot().is_empty());
    }
}
