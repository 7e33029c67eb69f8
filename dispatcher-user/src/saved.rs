//! Sessions over a reboot: saved to the state file now and then and at the end, restored at a start with new maps.
//!
//! While the machine is up the maps hold the truth. Saved is what servers, probes and the operator stand for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dispatcher_common::session::{BACKENDS_MAX, KIND_QUIC_CID, Session, SessionKey};

use crate::{
    config::Config,
    dataplane::{self, Dataplane, monotonic_seconds},
    state::Shared,
    store::{self, Clocks, Store},
};

/// Sessions are saved this often.
const SAVE: Duration = Duration::from_secs(300);

/// Why sessions are not restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Dataplane(#[from] dataplane::Error),
}

/// What [`restore`] did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Restored {
    pub(crate) sessions: u64,
    /// Expired, or nothing that the configuration knows.
    pub(crate) left_out: u64,
    /// Lengths of QUIC connection IDs among them, for [`Actual::cid_lengths`](crate::reconcile::Actual).
    pub(crate) cid_lengths: BTreeMap<u32, u32>,
}

/// Saves the sessions in place of those saved before; how many. It takes its time.
pub(crate) fn save(dataplane: &Dataplane, store: &Store) -> Result<u64, store::Error> {
    let clocks = Clocks::now();
    let sessions = dataplane.sessions().lasting();
    store.keep_sessions(clocks, sessions.filter(|(_, session)| !session.expired(clocks.monotonic)))
}

/// Writes the sessions that were saved into new maps; `None` when none ever were.
pub(crate) fn restore(
    store: &Store,
    dataplane: &Dataplane,
    config: &Config,
) -> Result<Option<Restored>, Error> {
    let Some(then) = store.kept_at()? else { return Ok(None) };
    let (now, known) = (Clocks::now(), Known::new(config));
    let mut done = Restored::default();
    for number in 1.. {
        let Some(sessions) = store.kept(number)? else { break };
        for (key, session) in sessions {
            match known.of(&key, session).and_then(|session| revived(session, then, now)) {
                Some(session) => {
                    dataplane.sessions().insert(key, session)?;
                    done.sessions += 1;
                    if key.kind == KIND_QUIC_CID {
                        *done.cid_lengths.entry(key.service).or_default() |= 1 << (key.len & 31);
                    }
                }
                None => done.left_out += 1,
            }
        }
    }
    Ok(Some(done))
}

/// Saves the sessions every few minutes. What fails is tried again then.
pub(crate) async fn serve(shared: Arc<Shared>) -> (&'static str, String) {
    loop {
        tokio::time::sleep(SAVE).await;
        let shared = Arc::clone(&shared);
        let saved = tokio::task::spawn_blocking(move || {
            if let Some(store) = &shared.store
                && let Err(error) = save(&shared.dataplane, store)
            {
                log::error!("{error}; the sessions saved before stay saved");
            }
        });
        if let Err(error) = saved.await {
            return ("saving sessions", error.to_string());
        }
    }
}

impl Clocks {
    fn now() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { monotonic: monotonic_seconds(), wall }
    }
}

/// Backend ids by service id.
struct Known(BTreeMap<u32, BTreeSet<u32>>);

impl Known {
    fn new(config: &Config) -> Self {
        let ids = |service: &crate::config::Service| service.backends.iter().map(|one| one.id).collect();
        Self(config.services.iter().map(|service| (service.id, ids(service))).collect())
    }

    /// What the configuration knows of a session.
    fn of(&self, key: &SessionKey, session: Session) -> Option<Session> {
        let known = self.0.get(&key.service)?;
        let mut backends = [0; BACKENDS_MAX];
        let ids = session.ids().filter(|id| known.contains(id));
        backends.iter_mut().zip(ids).for_each(|(backend, id)| *backend = id);
        (backends[0] != 0).then_some(Session { backends, ..session })
    }
}

/// A session by the clocks of now, unless it has expired. How long it was away is what the clock on the wall says,
/// and nothing if that went back: a session never has more time left than it had when it was saved.
fn revived(session: Session, then: Clocks, now: Clocks) -> Option<Session> {
    let away = now.wall.saturating_sub(then.wall);
    let at = |time: u32| {
        let ago = i64::from(then.monotonic) - i64::from(time);
        let ago = ago.saturating_add(i64::try_from(away).unwrap_or(i64::MAX));
        i64::from(now.monotonic).saturating_sub(ago)
    };
    // What was before this machine's start has no time on its clock.
    let past = |time| at(time).clamp(0, now.monotonic.into()) as u32;
    let (created, used) = (past(session.created), past(session.used));
    if session.expires == 0 {
        return Some(Session { created, used, ..session });
    }
    let expires = u32::try_from(at(session.expires)).ok().filter(|at| *at > now.monotonic)?;
    Some(Session { created, used, expires, ..session })
}

#[cfg(test)]
mod tests {
    use dispatcher_common::{
        service::stable_id,
        session::{
            KIND_TLS_SESSION_ID, STATE_CONFIGURED, STATE_CONFIRMED, STATE_DISCOVERED, STATE_PINNED,
            STATE_PROVISIONAL,
        },
    };

    use super::*;
    use crate::dataplane::{Capacities, object};

    const THEN: Clocks = Clocks { monotonic: 10_000, wall: 1_700_000_000 };

    fn after(seconds: i64, monotonic: u32) -> Clocks {
        Clocks { monotonic, wall: THEN.wall.saturating_add_signed(seconds) }
    }

    #[test]
    fn times_go_on_over_a_reboot() {
        let session = Session { created: 4_000, used: 9_990, expires: 13_600, ..Session::of(1) };
        let times = |now| revived(session, THEN, now).map(|one| (one.created, one.used, one.expires));
        for (what, now, expected) in [
            ("a restart of the daemon", after(10, 10_010), Some((4_000, 9_990, 13_600))),
            ("a reboot of 100 seconds", after(100, 30), Some((0, 0, 3_530))),
            ("just not expired", after(3_599, 30), Some((0, 0, 31))),
            ("just expired", after(3_600, 30), None),
            ("long expired", after(1_000_000, 30), None),
            ("a clock that went back", after(-1_000_000, 30), Some((0, 20, 3_630))),
            ("a clock at its end", Clocks { monotonic: 30, wall: u64::MAX }, None),
            ("a clock at its start", Clocks { monotonic: 30, wall: 0 }, Some((0, 20, 3_630))),
        ] {
            assert_eq!(times(now), expected, "{what}");
        }
        let pinned = Session { expires: 0, ..session };
        for now in [after(0, 30), after(1_000_000, 30), Clocks { monotonic: 0, wall: u64::MAX }] {
            assert_eq!(revived(pinned, THEN, now).map(|one| one.expires), Some(0), "{now:?}");
        }
        // What no dispatcher writes: used after it was saved.
        let odd = Session { used: u32::MAX, expires: u32::MAX, ..session };
        let odd = revived(odd, THEN, after(0, 30)).expect("not expired");
        assert_eq!((odd.used, odd.expires), (30, u32::MAX - 10_000 + 30));
        assert_eq!(
            revived(odd, Clocks { monotonic: 0, wall: 0 }, after(0, u32::MAX)),
            None,
            "beyond the clock"
        );
    }

    const TEXT: &str = "interfaces = [\"lo\"]\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:443\"\n\
        [[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1:443\"\n\
        [[service.backend]]\nname = \"b\"\naddress = \"10.0.0.2:443\"\n";

    #[test]
    fn what_the_configuration_does_not_know_is_left_out() {
        let known = Known::new(&Config::parse(TEXT, &[]).expect("good"));
        let [a, b] = ["web/a", "web/b"].map(stable_id);
        let of = |service: &str, backends| {
            let key = SessionKey::new(stable_id(service), KIND_TLS_SESSION_ID, &[1]).expect("a key");
            known.of(&key, Session { backends, hits: 3, ..Session::default() }).map(|one| one.backends)
        };
        assert_eq!(of("web", [a, 0, 0, 0]), Some([a, 0, 0, 0]));
        assert_eq!(of("web", [7, b, 8, a]), Some([b, a, 0, 0]), "of a shared key, those that are known");
        assert_eq!(of("web", [7, 0, 0, 0]), None);
        assert_eq!(of("mail", [a, 0, 0, 0]), None);
    }

    /// In a build with the object, as root.
    #[test]
    fn what_lasts_is_restored_into_new_maps() {
        // SAFETY: takes nothing, touches nothing.
        if object().is_empty() || unsafe { libc::geteuid() } != 0 {
            return;
        }
        let folder = store::Folder::new();
        let store = Store::open(&folder.file()).expect("opens");
        let capacities = Capacities { flows: 64, sessions: 64, stash_slots: 16, ..Capacities::default() };
        let config = Config::parse(TEXT, &[]).expect("good");
        let key = |n| SessionKey::new(stable_id("web"), KIND_TLS_SESSION_ID, &[n; 8]).expect("a key");
        let now = monotonic_seconds();
        let session = |state| {
            let expires = if state == STATE_PINNED { 0 } else { now + 600 };
            Session { state, expires, created: now, used: now, hits: 4, ..Session::of(stable_id("web/b")) }
        };
        let before = Dataplane::load(object(), &capacities).expect("loads");
        assert_eq!(restore(&store, &before, &config).expect("readable"), None, "nothing was saved");
        let states = [STATE_CONFIRMED, STATE_DISCOVERED, STATE_PINNED, STATE_PROVISIONAL, STATE_CONFIGURED];
        for (n, state) in (0..).zip(states) {
            before.sessions().insert(key(n), session(state)).expect("writable");
        }
        let gone = Session { expires: now, ..session(STATE_CONFIRMED) };
        before.sessions().insert(key(5), gone).expect("writable");
        let away = Session { backends: [9, 0, 0, 0], ..session(STATE_PINNED) };
        before.sessions().insert(key(6), away).expect("writable");
        assert_eq!(save(&before, &store).expect("saved"), 4);
        let after = Dataplane::load(object(), &capacities).expect("loads");
        let done = restore(&store, &after, &config).expect("restored");
        assert_eq!(done, Some(Restored { sessions: 3, left_out: 1, ..Restored::default() }));
        assert_eq!(after.sessions().iter().count(), 3);
        for (n, state) in (0..3).zip(states) {
            let found = after.sessions().get(&key(n)).expect("readable").expect("it is there");
            assert_eq!((found.state, found.hits, found.backends), (state, 4, session(state).backends));
            let expected = session(state).expires;
            assert!(found.expires.abs_diff(expected) <= 2, "{found:?}, not {expected}");
        }
    }
}
