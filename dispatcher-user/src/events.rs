//! What the data path tells us, and the picks for hellos that it holds.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use dispatcher_common::{
    event::{
        EVENT_BOUND, EVENT_HELD, EVENT_LEARNED, EVENT_MISS, EVENT_REFUSED, EVENT_REJECTED, EVENT_TURN, Event,
        REFUSED, Release,
    },
    flow::FlowKey,
    session::{KIND_TICKET_NAME, STATE_PROVISIONAL, Session},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, timeout_at},
};

use crate::{
    api,
    balancer::{Balancer, Candidate},
    dataplane::{Dataplane, Error, RELEASES_AT_ONCE, Sessions, Swept, monotonic_seconds},
    qos::Held,
    reconcile::Pool,
    state::Shared,
};

/// The ring of what nobody is woken for is looked at this often: it holds 10,000.
const LOOK: Duration = Duration::from_millis(50);

/// Counts what came through the ring.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    miss: AtomicU64,
    held: AtomicU64,
    released: AtomicU64,
    refused: AtomicU64,
    learned: AtomicU64,
    rejected: AtomicU64,
    swept: AtomicU64,
    known: AtomicU64,
    provisional: AtomicU64,
}

impl Counts {
    pub(crate) fn read(&self) -> api::Events {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        api::Events {
            miss: read(&self.miss),
            held: read(&self.held),
            released: read(&self.released),
            refused: read(&self.refused),
            learned: read(&self.learned),
            rejected: read(&self.rejected),
            swept: read(&self.swept),
        }
    }

    pub(crate) fn swept(&self, swept: Swept) {
        self.swept.fetch_add(swept.removed, Ordering::Relaxed);
        self.known.store(swept.known.0, Ordering::Relaxed);
        self.provisional.store(swept.provisional.0, Ordering::Relaxed);
    }

    /// Sessions that the last sweep has left: known ones, and provisional ones.
    pub(crate) fn sessions(&self) -> [u64; 2] {
        [&self.known, &self.provisional].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Answers held hellos, and counts events, until the task is dropped.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    held: RingBuf<MapData>,
    mut events: RingBuf<MapData>,
) -> io::Result<()> {
    // SAFETY: the ring owns its descriptor and names the same one until it is dropped.
    let mut held = unsafe { AsyncFd::register_with_interest(held, Interest::READABLE) }?;
    let mut picker = Picker::default();
    let (mut more, mut look) = (false, Instant::now());
    loop {
        if more {
            tokio::task::yield_now().await;
        } else if let Ok(guard) =
            timeout_at(shared.qos.next().map_or(look, |due| due.min(look)), held.readable_mut()).await
        {
            guard?.clear_ready();
        }
        more = answer(&shared, &mut picker, held.get_mut());
        if Instant::now() >= look {
            look = Instant::now() + LOOK;
            while let Some(item) = events.next() {
                if let Some(event) = read_event(&item) {
                    take_note(&shared, &event);
                }
            }
        }
    }
}

/// Answers what is held, at most as many hellos as one run releases: those that came first do not wait for
/// all the others. Those for backends with limits wait for their turn. True when there may be more.
fn answer(shared: &Shared, picker: &mut Picker, held: &mut RingBuf<MapData>) -> bool {
    let (pools, counted) = shared.pools();
    picker.counted(counted);
    let (mut releases, mut read) = (Vec::new(), 0);
    while read < RELEASES_AT_ONCE
        && let Some(item) = held.next()
    {
        read += 1;
        let Some(event) = read_event(&item) else { continue };
        take_note(shared, &event);
        match picker.answer(&shared.dataplane, &pools, &event) {
            Ok(Some(Choice { id, index, class })) => {
                let Event { frontend, slot, flow, .. } = event;
                let class = || if class == 0 { event.class } else { class };
                let waits = Held { frontend, slot, flow, refused: false };
                if !shared.qos.hold(id, class, flow.src.into(), waits) {
                    releases.push(Release { slot, backend: index, flow });
                }
            }
            // The client sends its hello again, and may then find a backend.
            Ok(None) => log::debug!("no backend for {:?}", event.flow),
            Err(error) => log::warn!("held hello of {:?}: {error}", event.flow),
        }
    }
    let mut refused = 0;
    let waits = |held: &Held| shared.dataplane.holds(held.slot, &held.flow);
    for (backend, held) in shared.qos.release(RELEASES_AT_ONCE - releases.len(), waits) {
        let Held { frontend, slot, flow, refused: lost } = held;
        if lost {
            refused += 1;
            releases.push(Release { slot, backend: REFUSED, flow });
            continue;
        }
        match pools.get(&frontend).and_then(|pool| pool.known.get(&backend)) {
            Some(index) => releases.push(Release { slot, backend: *index, flow }),
            // As above.
            None => log::debug!("the backend for {flow:?} is gone"),
        }
    }
    if releases.is_empty() {
        return read == RELEASES_AT_ONCE;
    }
    match shared.dataplane.release(&releases) {
        Ok(()) => {
            shared.counts.released.fetch_add(releases.len() as u64 - refused, Ordering::Relaxed);
        }
        Err(error) => log::error!("answering {} held hellos: {error}", releases.len()),
    }
    read == RELEASES_AT_ONCE || releases.len() == RELEASES_AT_ONCE
}

pub(crate) fn read_event(bytes: &[u8]) -> Option<Event> {
    if bytes.len() < size_of::<Event>() {
        return None;
    }
    // SAFETY: there are enough bytes (the pointer needs no alignment), and every bit pattern is an `Event`:
    // it is `Pod`.
    Some(unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() })
}

/// Counts an event and hands it on.
fn take_note(shared: &Shared, event: &Event) {
    shared.trace.tell(event);
    let counts = &shared.counts;
    let (count, what) = match event.kind {
        EVENT_MISS => (&counts.miss, "unknown identifier"),
        EVENT_HELD | EVENT_TURN => (&counts.held, "held"),
        EVENT_REFUSED => (&counts.refused, "refused by the backend"),
        EVENT_LEARNED => (&counts.learned, "identifier learned"),
        EVENT_REJECTED => (&counts.rejected, "ticket not accepted"),
        // For those who listen.
        EVENT_BOUND => return,
        _ => return log::debug!("event of unknown kind {}", event.kind),
    };
    count.fetch_add(1, Ordering::Relaxed);
    log::debug!(
        "{what}: {:?} frontend {} backend {} session {}",
        event.flow,
        event.frontend,
        event.backend,
        api::to_hex(event.session.id())
    );
    if event.kind == EVENT_REJECTED
        && let Some(id) = shared.state().actual.backend_id(event.backend)
    {
        shared.discovery.look_again(id);
    }
    if event.kind == EVENT_REFUSED
        && let Some(id) = shared.state().actual.backend_id(event.backend)
    {
        shared.suspects.refused(id);
    }
}

/// Where a held hello goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Choice {
    /// The backend's id.
    id: u32,
    /// Its index.
    index: u32,
    /// Class of a session that the data path did not know, 0 for none.
    class: u16,
}

impl From<Candidate> for Choice {
    fn from(Candidate { id, index, .. }: Candidate) -> Self {
        Self { id, index, class: 0 }
    }
}

/// Balancers with what they remember between picks.
#[derive(Default)]
struct Picker {
    balancers: BTreeMap<String, Box<dyn Balancer>>,
    /// Picks since loads were last counted, by backend id.
    since: BTreeMap<u32, u64>,
    counted: u64,
}

impl Picker {
    /// Takes note of how often loads were counted.
    fn counted(&mut self, counted: u64) {
        if counted != self.counted {
            self.counted = counted;
            self.since.clear();
        }
    }

    /// The backend for a held hello.
    fn answer(
        &mut self,
        dataplane: &Dataplane,
        pools: &BTreeMap<u32, Pool>,
        event: &Event,
    ) -> Result<Option<Choice>, Error> {
        let Some(pool) = pools.get(&event.frontend) else { return Ok(None) };
        if event.kind == EVENT_TURN {
            let home = pool.known.iter().find(|(_, index)| **index == event.backend);
            return Ok(home.map(|(id, index)| Choice { id: *id, index: *index, class: 0 }));
        }
        // A key's name is one for many clients: only a server's acceptance says whose it is.
        if event.session.len == 0 || event.session.kind == KIND_TICKET_NAME {
            return Ok(self.pick(pool, &event.flow).map(Choice::from));
        }
        self.bind(dataplane.sessions(), pool, event)
    }

    /// A hello with an identifier: the session's backend, or a new session.
    fn bind(&mut self, sessions: &Sessions, pool: &Pool, event: &Event) -> Result<Option<Choice>, Error> {
        let (key, now) = (event.session, monotonic_seconds());
        let known =
            || -> Result<_, Error> { Ok(sessions.all(&key)?.find_map(|session| usable(session, pool, now))) };
        if let Some(choice) = known()? {
            return Ok(Some(choice));
        }
        let Some(picked) = self.pick(pool, &event.flow) else { return Ok(None) };
        let session = provisional(picked.id, now, pool.provisional_ttl);
        if !sessions.insert_new(key, session)? {
            // The data path was faster: its entry counts, if it can be used.
            if let Some(choice) = known()? {
                return Ok(Some(choice));
            }
            sessions.insert(key, session)?;
        }
        Ok(Some(picked.into()))
    }

    fn pick(&mut self, pool: &Pool, client: &FlowKey) -> Option<Candidate> {
        let balancer = self.balancers.entry(pool.service.clone()).or_insert_with(|| pool.balance.balancer());
        let load = |one: &Candidate| one.load + self.since.get(&one.id).copied().unwrap_or(0);
        let candidates: Vec<Candidate> =
            pool.candidates.iter().map(|one| Candidate { load: load(one), ..*one }).collect();
        let picked = balancer.pick(&candidates, hash(client))?;
        *self.since.entry(picked.id).or_insert(0) += 1;
        Some(picked)
    }
}

/// The backend of a session that may be used.
fn usable(session: Session, pool: &Pool, now: u32) -> Option<Choice> {
    let session = Some(session).filter(|session| !session.expired(now))?;
    let choice = |id| Some(Choice { id, index: *pool.known.get(&id)?, class: session.class });
    session.ids().find_map(choice)
}

fn provisional(backend: u32, now: u32, life: u32) -> Session {
    Session {
        state: STATE_PROVISIONAL,
        created: now,
        used: now,
        expires: now.saturating_add(life).max(1),
        ..Session::of(backend)
    }
}

/// A hash of the client's address: one client keeps its backend with consistent hashing.
fn hash(client: &FlowKey) -> u64 {
    client.src.words.iter().fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ u64::from(*word)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balancer::Balance;

    fn pool(balance: Balance) -> Pool {
        let one = |n| Candidate { index: n, id: n + 100, weight: 1, load: 0, response: 0 };
        Pool {
            service: "web".into(),
            balance,
            provisional_ttl: 10,
            candidates: vec![one(0), one(1)],
            known: BTreeMap::from([(100, 0), (101, 1), (102, 2)]),
        }
    }

    #[test]
    fn picks_since_the_last_count_are_load() {
        let mut picker = Picker::default();
        let pool = pool(Balance::WeightedLeastConnections);
        let client = FlowKey::default();
        let picks: Vec<u32> =
            (0..4).filter_map(|_| picker.pick(&pool, &client)).map(|one| one.index).collect();
        assert_eq!(picks.iter().filter(|index| **index == 0).count(), 2);
    }

    #[test]
    fn only_living_sessions_of_reachable_backends_are_used() {
        let pool = pool(Balance::Maglev);
        let session = |backend| Session { class: 7, ..provisional(backend, 50, 10) };
        let choice = Choice { id: 102, index: 2, class: 7 };
        assert_eq!(usable(session(102), &pool, 55), Some(choice), "drained backends keep their sessions");
        assert_eq!(usable(session(102), &pool, 60), None);
        assert_eq!(usable(session(103), &pool, 55), None);
    }

    #[test]
    fn short_records_are_no_events() {
        assert_eq!(read_event(&[0; 95]), None);
        assert_eq!(read_event(&[0; 96]), Some(Event::default()));
    }
}
