//! The tunnels of one backend, and the task that keeps them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::lease::{Lease, Sender};
use super::tunnel::{self, Registry, Tunnel};
use super::{Load, Preference, Status, Target, Unavailable, lock};
use crate::workers::{Workers, here};

/// The most requests that wait for a tunnel to one backend.
pub(super) const MOST_WAITING: usize = 1024;
/// The most attempts at once while none fails; one at a time while some do.
const PARALLEL: usize = 8;
/// The delay after the first failure is up to this; it doubles with each further one.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// The longest delay after a failure, while nobody waits.
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// The longest while somebody does.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// A tunnel that holds this long unused shows that the backend is well.
const SETTLED: Duration = Duration::from_secs(1);
/// Tunnels beyond the most that were needed within this time are retired.
pub(super) const WINDOW: Duration = Duration::from_secs(60);

/// Who waits.
pub(super) type Waiting = VecDeque<Waiter>;

/// One that waits.
pub(super) struct Waiter {
    wanted: Preference,
    /// The worker that is to serve it.
    worker: Option<usize>,
    answer: oneshot::Sender<Lease>,
}

/// The tunnels of one target.
pub(super) struct Pool {
    pub(super) target: Target,
    pub(super) registry: Arc<Registry>,
    workers: Arc<Workers>,
    members: Mutex<Members>,
    /// How many wait: who ends a request looks here before he takes the lock.
    waiters: AtomicUsize,
    /// What [`Members::is_failing`] says.
    failing: AtomicBool,
    /// Wakes the keeper: something ended, or more is needed.
    keeper: Notify,
}

/// What the lock protects.
struct Members {
    /// The target is no longer followed.
    ended: bool,
    /// By id.
    open: BTreeMap<u32, Member>,
    /// How many of them take many requests at a time.
    shared: usize,
    /// Those of them that are free and take one request or flow at a time, by worker, the last used at the end. Some may
    /// have just ended.
    idle: Vec<VecDeque<u32>>,
    /// While someone waits, no open tunnel can take a request.
    waiting: Waiting,
    /// The log says that tunnels came up.
    announced: bool,
    trouble: Option<Trouble>,
    /// The most tunnels needed at once in this window.
    peak: usize,
    window_ends: Instant,
    handshakes: u64,
    failed: u64,
}

/// A tunnel that takes requests.
struct Member {
    tunnel: Arc<Tunnel>,
    /// None while the one request of HTTP/1.1, or the flow, has it.
    sender: Option<Sender>,
    /// It is to be replaced.
    stale: bool,
}

/// Attempts fail, or tunnels end as soon as they are up.
struct Trouble {
    error: String,
    since: SystemTime,
    /// The latest failure.
    last: Instant,
    /// Delays so far.
    delays: u32,
    /// The next attempt.
    again: Instant,
}

impl Pool {
    /// A pool with its keeper. `waiting` are those of the pool before it.
    pub(super) fn start(
        target: Target,
        registry: Arc<Registry>,
        workers: Arc<Workers>,
        waiting: Waiting,
    ) -> Arc<Self> {
        let members = Members {
            ended: false,
            open: BTreeMap::new(),
            shared: 0,
            idle: vec![VecDeque::new(); workers.number()],
            waiting,
            announced: false,
            trouble: None,
            peak: 0,
            window_ends: Instant::now() + WINDOW,
            handshakes: 0,
            failed: 0,
        };
        let waiters = AtomicUsize::new(members.waiting.len());
        let members = Mutex::new(members);
        let pool = Arc::new(Pool {
            target,
            registry,
            workers,
            members,
            waiters,
            failing: AtomicBool::new(false),
            keeper: Notify::new(),
        });
        tokio::spawn(Arc::clone(&pool).keep());
        pool
    }

    /// Retires all, ends the keeper and gives who waits.
    pub(super) fn end(&self) -> Waiting {
        let mut members = lock(&self.members);
        members.ended = true;
        std::mem::take(&mut members.open).into_values().for_each(Member::retire);
        members.shared = 0;
        members.idle.iter_mut().for_each(VecDeque::clear);
        self.keeper.notify_one();
        std::mem::take(&mut members.waiting)
    }

    pub(super) fn take(&self, wanted: Preference) -> Option<Lease> {
        let mut members = lock(&self.members);
        // Nobody overtakes those who wait.
        let lease = if members.waiting.is_empty() { members.pick(wanted, here()) } else { None };
        self.note_demand(&mut members);
        lease
    }

    /// A lease as soon as it is the caller's turn; an error when the pool ended before.
    pub(super) fn queue(
        &self,
        wanted: Preference,
    ) -> Result<impl Future<Output = Result<Lease, oneshot::error::RecvError>> + use<>, Unavailable> {
        let (answer, receiver) = oneshot::channel();
        let mut members = lock(&self.members);
        if members.waiting.len() >= MOST_WAITING {
            members.waiting.retain(|waiter| !waiter.answer.is_closed());
            let waiting = members.waiting.len();
            if waiting >= MOST_WAITING {
                return Err(Unavailable::Crowded { name: self.target.name.clone(), waiting });
            }
        }
        members.waiting.push_back(Waiter { wanted, worker: here(), answer });
        self.waiters.store(members.waiting.len(), SeqCst);
        // Either this is seen by who ends a request, or that is seen here.
        fence(SeqCst);
        let spare = self.serve_all(&mut members);
        self.note_demand(&mut members);
        drop(members);
        drop(spare);
        Ok(receiver)
    }

    /// Gives free tunnels to those who wait. To be called when one may have become free.
    pub(super) fn serve(&self) {
        fence(SeqCst);
        if self.waiters.load(SeqCst) == 0 {
            return;
        }
        let spare = self.serve_all(&mut lock(&self.members));
        // Dropped without the lock, which giving back takes.
        drop(spare);
    }

    #[must_use = "to be dropped without the lock"]
    fn serve_all(&self, members: &mut Members) -> Option<Lease> {
        if members.waiting.is_empty() {
            return None;
        }
        let spare = members.serve();
        self.waiters.store(members.waiting.len(), SeqCst);
        spare
    }

    /// The tunnel takes its next request.
    pub(super) fn give_back(&self, tunnel: &Tunnel, sender: Sender) {
        let mut members = lock(&self.members);
        let Some(member) = members.open.get_mut(&tunnel.id) else { return };
        member.sender = Some(sender);
        members.idle_of(tunnel.worker).push_back(tunnel.id);
        let spare = self.serve_all(&mut members);
        drop(members);
        drop(spare);
    }

    pub(super) fn count_handshake(&self) {
        lock(&self.members).handshakes += 1;
    }

    /// The tunnel is established. Without a followed target its sender is dropped, and so it ends.
    pub(super) fn add(&self, tunnel: Arc<Tunnel>, sender: Sender) {
        let mut members = lock(&self.members);
        let member = Member { tunnel, sender: Some(sender), stale: false };
        if members.ended {
            return member.retire();
        }
        if !std::mem::replace(&mut members.announced, true) && members.trouble.is_none() {
            log::info!("{}: tunnels to {} are up", self.target.name, self.target.address);
        }
        let (id, worker) = (member.tunnel.id, member.tunnel.worker);
        if !member.is_shared() {
            members.idle_of(worker).push_front(id);
        }
        members.shared += usize::from(member.is_shared());
        members.open.insert(id, member);
        self.failing.store(false, Relaxed);
        let spare = self.serve_all(&mut members);
        drop(members);
        drop(spare);
    }

    /// The tunnel takes no more requests. True if it did so far.
    pub(super) fn remove(&self, tunnel: &Tunnel) -> bool {
        let mut members = lock(&self.members);
        let removed = members.remove(tunnel.id);
        self.failing.store(members.is_failing(), Relaxed);
        self.keeper.notify_one();
        removed
    }

    /// The tunnel's connection ended without our doing, or was upgraded.
    pub(super) fn ended(&self, tunnel: &Tunnel, reason: &str) {
        if !self.remove(tunnel) {
            return;
        }
        log::debug!("{}: tunnel {} ended: {reason}", self.target.name, tunnel.id);
        if tunnel.since.elapsed() < SETTLED && tunnel.requests.load(Relaxed) == 0 {
            self.fail(format!("a tunnel ended as soon as it was up: {reason}"));
        }
    }

    /// Marks all as to be replaced and says how many.
    pub(super) fn rotate(&self) -> usize {
        let mut members = lock(&self.members);
        members.open.values_mut().for_each(|member| member.stale = true);
        self.keeper.notify_one();
        members.open.len()
    }

    pub(super) fn status(&self) -> Status {
        let members = lock(&self.members);
        Status {
            backend: self.target.backend,
            name: self.target.name.clone(),
            established: members.open.len(),
            error: members.trouble.as_ref().map(|trouble| (trouble.error.clone(), trouble.since)),
            handshakes: members.handshakes,
            failed: members.failed,
        }
    }

    pub(super) fn load(&self) -> Load {
        let members = lock(&self.members);
        Load {
            established: members.open.len(),
            in_flight: members.open.values().map(|one| one.tunnel.in_flight.load(Relaxed)).sum(),
            failing: members.is_failing(),
        }
    }

    pub(super) fn is_failing(&self) -> bool {
        self.failing.load(Relaxed)
    }

    /// The keeper: opens what is missing, and looks again when something changed or is due.
    async fn keep(self: Arc<Self>) {
        let mut attempts = JoinSet::new();
        // Where each of them runs.
        let mut places = HashMap::new();
        while let Some((missing, due)) = self.tend(attempts.len()) {
            for _ in 0..missing {
                let worker = self.fewest(places.values().copied());
                let attempt = tunnel::open(Arc::clone(&self));
                places.insert(attempts.spawn_on(attempt, &self.workers.runtime(worker)).id(), worker);
            }
            tokio::select! {
                () = self.keeper.notified() => {}
                () = tokio::time::sleep_until(due) => {}
                Some(attempt) = attempts.join_next_with_id() => match attempt {
                    Ok((id, result)) => {
                        places.remove(&id);
                        result.unwrap_or_else(|error| self.fail(error));
                    }
                    Err(panic) => {
                        places.remove(&panic.id());
                        self.fail(panic.to_string());
                    }
                },
            }
        }
    }

    /// The worker with the fewest tunnels, together with those that are being opened.
    fn fewest(&self, opened: impl Iterator<Item = usize>) -> usize {
        let members = lock(&self.members);
        let mut counts = vec![0; self.workers.number()];
        let fresh = members.open.values().filter(|member| !member.stale).map(|member| member.tunnel.worker);
        for worker in fresh.chain(opened) {
            counts.get_mut(worker).into_iter().for_each(|count| *count += 1);
        }
        let least = counts.iter().enumerate().min_by_key(|(_, count)| **count);
        least.map_or(0, |(worker, _)| worker)
    }

    /// Retires what is replaced or in surplus. Says how many attempts to start and when to look again; none
    /// when the target is no longer followed.
    fn tend(&self, attempts: usize) -> Option<(usize, Instant)> {
        let mut members = lock(&self.members);
        let members = &mut *members;
        if members.ended {
            return None;
        }
        let now = Instant::now();
        let demand = members.demand(&self.target);
        members.peak = members.peak.max(demand);
        if now >= members.window_ends {
            while members.open.len() > members.peak && members.retire_one(Member::is_free) {}
            members.peak = demand;
            members.window_ends = now + WINDOW;
        }

        let mut due = members.window_ends;
        let mut fresh = 0;
        for member in members.open.values_mut() {
            member.stale |= member.tunnel.until.is_some_and(|until| until <= now);
            fresh += usize::from(!member.stale);
            due = member.tunnel.until.filter(|_| !member.stale).map_or(due, |until| due.min(until));
        }
        while members.open.len() > demand && members.retire_one(|member| member.stale) {}

        let mut bound = PARALLEL;
        if let Some(trouble) = &members.trouble {
            let over = trouble.over(&members.open, fresh >= demand);
            if over.is_some_and(|over| over <= now) {
                log::info!("{}: tunnels to {} are up again", self.target.name, self.target.address);
                members.trouble = None;
            } else {
                let again = trouble.due(!members.waiting.is_empty());
                bound = usize::from(again <= now);
                let again = (bound == 0).then_some(again);
                due = over.into_iter().chain(again).fold(due, Instant::min);
            }
        }
        self.failing.store(members.is_failing(), Relaxed);
        let missing = demand.saturating_sub(fresh + attempts);
        Some((missing.min(bound.saturating_sub(attempts)), due))
    }

    /// Counts a failure and sets when to try again. Failures of attempts that ran side by side make one delay.
    fn fail(&self, error: String) {
        log::debug!("{}: {error}", self.target.name);
        let mut members = lock(&self.members);
        members.failed += 1;
        let (now, waited_for) = (Instant::now(), !members.waiting.is_empty());
        let trouble = members.trouble.get_or_insert_with(|| {
            log::info!("{}: tunnels cannot be kept: {error}", self.target.name);
            Trouble { error: String::new(), since: SystemTime::now(), last: now, delays: 0, again: now }
        });
        let due = trouble.due(waited_for);
        trouble.error = error;
        trouble.last = now;
        if due <= now {
            trouble.again = now + delay(trouble.delays);
            trouble.delays += 1;
        }
        // Other backends are sooner there than this one: whoever waits is told.
        self.failing.store(members.is_failing(), Relaxed);
        let told = if members.is_failing() { std::mem::take(&mut members.waiting) } else { Waiting::new() };
        self.waiters.store(members.waiting.len(), SeqCst);
        drop(members);
        drop(told);
    }

    /// Tells the keeper if more tunnels are needed.
    fn note_demand(&self, members: &mut Members) {
        let demand = members.demand(&self.target);
        members.peak = members.peak.max(demand);
        if demand > members.open.len() {
            self.keeper.notify_one();
        }
    }
}

impl Members {
    fn is_failing(&self) -> bool {
        self.open.is_empty() && self.trouble.is_some()
    }

    /// Free ones of a worker.
    fn idle_of(&mut self, worker: usize) -> &mut VecDeque<u32> {
        if worker >= self.idle.len() {
            self.idle.resize(worker + 1, VecDeque::new());
        }
        &mut self.idle[worker]
    }

    /// A lease of the wanted tunnel if it is free, else of another that is, for a request that `worker` serves.
    fn pick(&mut self, wanted: Preference, worker: Option<usize>) -> Option<Lease> {
        let id = self.choose(wanted, worker)?;
        let home = match wanted {
            Preference::Tunnel(home) if self.is_home(home, worker) => home,
            Preference::Tunnel(_) | Preference::New | Preference::Any => id,
        };
        let member = self.open.get_mut(&id)?;
        let sender = match &member.sender {
            Some(Sender::Http2(sender)) => Some(Sender::Http2(sender.clone())),
            Some(Sender::Http1(_) | Sender::Flow(_)) | None => member.sender.take(),
        };
        sender.map(|sender| Lease::new(&member.tunnel, sender, home))
    }

    /// Whether a session stays with this tunnel although it has no room now: another worker's is left for one of the own.
    fn is_home(&self, id: u32, worker: Option<usize>) -> bool {
        self.open.get(&id).is_some_and(|member| !member.stale && member.is_of(worker))
    }

    /// One that is free: of this worker the wanted one, then another; then one of other workers.
    fn choose(&mut self, wanted: Preference, worker: Option<usize>) -> Option<u32> {
        if let Preference::Tunnel(id) = wanted
            && self.open.get(&id).is_some_and(|member| member.is_of(worker) && member.is_free())
        {
            self.claim(id);
            return Some(id);
        }
        if let Some(worker) = worker
            && let Some(id) = self.choose_of(wanted, worker).or_else(|| self.least(Some(worker)))
        {
            return Some(id);
        }
        if let Preference::Tunnel(id) = wanted
            && self.open.get(&id).is_some_and(Member::is_free)
        {
            self.claim(id);
            return Some(id);
        }
        (0..self.idle.len()).find_map(|worker| self.choose_of(wanted, worker)).or_else(|| self.least(None))
    }

    /// Of a worker's free ones with one request at a time: for a new session the one that has rested longest, so that
    /// sessions are spread; for all others the last used, as its state is still in the caches.
    fn choose_of(&mut self, wanted: Preference, worker: usize) -> Option<u32> {
        let idle = self.idle.get_mut(worker)?;
        loop {
            let id = match wanted {
                Preference::New => idle.pop_front(),
                Preference::Tunnel(_) | Preference::Any => idle.pop_back(),
            }?;
            if self.open.get(&id).is_some_and(Member::is_free) {
                return Some(id);
            }
        }
    }

    /// The one of HTTP/2 with the least to do, of one worker or of all.
    fn least(&self, worker: Option<usize>) -> Option<u32> {
        let shared = self
            .open
            .values()
            .filter(|member| member.is_of(worker) && member.is_shared() && member.is_free());
        let least = shared.min_by_key(|Member { tunnel, .. }| {
            (tunnel.in_flight.load(Relaxed), tunnel.requests.load(Relaxed))
        });
        least.map(|member| member.tunnel.id)
    }

    /// It is not idle any more.
    fn claim(&mut self, id: u32) {
        let Some(worker) = self.open.get(&id).map(|member| member.tunnel.worker) else { return };
        let idle = self.idle_of(worker);
        if let Some(place) = idle.iter().rposition(|one| *one == id) {
            idle.remove(place);
        }
    }

    /// It takes no more requests. False if it did not any more.
    fn remove(&mut self, id: u32) -> bool {
        self.claim(id);
        let Some(member) = self.open.remove(&id) else { return false };
        self.shared -= usize::from(member.is_shared());
        member.retire();
        true
    }

    /// Hands free tunnels to those who wait, in order. Gives back one that nobody took any more.
    #[must_use = "to be dropped without the lock"]
    fn serve(&mut self) -> Option<Lease> {
        let mut spare: Option<Lease> = None;
        while let Some(waiter) = self.waiting.pop_front() {
            if waiter.answer.is_closed() {
                continue;
            }
            match spare.take().or_else(|| self.pick(waiter.wanted, waiter.worker)) {
                Some(lease) => spare = waiter.answer.send(lease).err(),
                None => {
                    self.waiting.push_front(waiter);
                    break;
                }
            }
        }
        spare
    }

    /// How many tunnels there should be: beyond those that are full, one or as many as those that wait need.
    /// How many requests a tunnel takes is known from the first on.
    fn demand(&self, target: &Target) -> usize {
        let idle: usize = self.idle.iter().map(VecDeque::len).sum();
        let mut full = self.open.len().saturating_sub(idle);
        let first = self.open.values().next();
        // Whether those of HTTP/2 are full is not known without a look at them.
        if full > 0 && self.shared > 0 {
            full -= self.open.values().filter(|member| member.is_shared() && member.is_free()).count();
        }
        let streams = first.map_or(usize::MAX, |member| member.tunnel.streams.load(Relaxed).max(1));
        let needed = full + self.waiting.len().div_ceil(streams).max(1);
        needed.min(target.settings.most).max(target.settings.established).max(1)
    }

    /// Retires the tunnel with the least in flight among those chosen. False if there is none.
    fn retire_one(&mut self, chosen: impl Fn(&Member) -> bool) -> bool {
        let some = self.open.values().filter(|member| chosen(member));
        let least = some.min_by_key(|member| member.tunnel.in_flight.load(Relaxed));
        let least = least.map(|member| member.tunnel.id);
        least.is_some_and(|id| self.remove(id))
    }
}

impl Member {
    /// Whether it can take a request.
    fn is_free(&self) -> bool {
        match &self.sender {
            Some(Sender::Http1(sender)) => !sender.is_closed(),
            // One that has ended has left.
            Some(Sender::Http2(_)) => self.tunnel.in_flight.load(Relaxed) < self.tunnel.streams.load(Relaxed),
            Some(Sender::Flow(sender)) => !sender.is_closed(),
            None => false,
        }
    }

    /// Whether this worker drives it; for who is none, they are all alike.
    fn is_of(&self, worker: Option<usize>) -> bool {
        worker.is_none_or(|worker| self.tunnel.worker == worker)
    }

    /// Whether it takes many requests at a time.
    fn is_shared(&self) -> bool {
        matches!(self.sender, Some(Sender::Http2(_)))
    }

    /// When it shows that the backend is well: once used, or after a while.
    fn proved(&self) -> Instant {
        let used = self.tunnel.requests.load(Relaxed) > 0;
        if used { self.tunnel.since } else { self.tunnel.since + SETTLED }
    }

    /// Without a sender, the driver closes the connection when nothing is in flight.
    fn retire(self) {
        drop(self.sender);
        self.tunnel.retire();
    }
}

impl Trouble {
    /// When the next attempt is due.
    fn due(&self, waited_for: bool) -> Instant {
        if waited_for { self.again.min(self.last + LONGEST_WAIT) } else { self.again }
    }

    /// When it is over: a tunnel made after the last failure has proved itself, or all are there and have.
    fn over(&self, open: &BTreeMap<u32, Member>, all: bool) -> Option<Instant> {
        let later = open.values().filter(|member| member.tunnel.since > self.last).map(Member::proved).min();
        let calm = open.values().map(Member::proved).fold(self.last + SETTLED, Instant::max);
        later.into_iter().chain(all.then_some(calm)).min()
    }
}

/// Full jitter: a random part of a bound that doubles.
pub(super) fn delay(before: u32) -> Duration {
    let bound = FIRST_DELAY.saturating_mul(1 << before.min(16)).min(LONGEST_DELAY);
    bound.mul_f64(tunnel::random())
}
