//! The mapping table, of two maps: see `sessions.rs` of the data path.

use std::{collections::HashMap, sync::Mutex};

use aya::Ebpf;
use dispatcher_common::{
    abi,
    session::{
        STATE_CONFIGURED, STATE_CONFIRMED, STATE_DISCOVERED, STATE_PINNED, STATE_PROVISIONAL, Session,
        SessionKey,
    },
};

use super::{Error, Table, lock};

/// The mapping table. What only clients stand for has a map of its own, which comes second: so clients
/// cannot push out what others said.
#[derive(Debug)]
pub struct Sessions {
    mapping: Table<SessionKey, Session>,
    provisional: Table<SessionKey, Session>,
    /// What the daemon wrote itself: a full table makes room by forgetting what is not used.
    ours: Mutex<HashMap<SessionKey, Session>>,
}

/// What [`Sessions::sweep`] found and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Swept {
    /// Entries removed.
    pub removed: u64,
    /// Entries that servers, probes or the operator vouch for, of so many that there is room for.
    pub known: (u64, u32),
    /// The same of entries that only clients stand for.
    pub provisional: (u64, u32),
}

impl Sessions {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            mapping: Table::take(ebpf, abi::MAP_SESSIONS)?,
            provisional: Table::take(ebpf, abi::MAP_PROVISIONAL)?,
            ours: Mutex::default(),
        })
    }

    /// Remembers what a daemon before us wrote.
    pub(super) fn recall(&self) {
        lock(&self.ours).extend(self.mapping.iter().filter(|(_, session)| is_ours(session)));
    }

    fn map_of(&self, session: &Session) -> &Table<SessionKey, Session> {
        if session.state == STATE_PROVISIONAL { &self.provisional } else { &self.mapping }
    }

    /// The entries of an identifier: a provisional one can stand in for one whose backend is away.
    pub fn all(&self, key: &SessionKey) -> Result<impl Iterator<Item = Session> + use<>, Error> {
        Ok([self.mapping.get(key)?, self.provisional.get(key)?].into_iter().flatten())
    }

    /// The entry of an identifier that comes first.
    pub fn get(&self, key: &SessionKey) -> Result<Option<Session>, Error> {
        Ok(self.all(key)?.next())
    }

    /// Inserts or replaces. What is not provisional takes the place of what is. Pinned, configured and
    /// discovered entries are written again by [`sweep`](Self::sweep) if the table loses them.
    pub fn insert(&self, key: SessionKey, session: Session) -> Result<(), Error> {
        if is_ours(&session) {
            lock(&self.ours).insert(key, session);
        }
        self.map_of(&session).insert(key, session)?;
        if session.state != STATE_PROVISIONAL {
            self.provisional.remove(&key)?;
        }
        Ok(())
    }

    /// Inserts unless the key exists in the same map; false when it did.
    pub fn insert_new(&self, key: SessionKey, session: Session) -> Result<bool, Error> {
        self.map_of(&session).insert_new(key, session)
    }

    /// Removes all entries of a key; false when there were none.
    pub fn remove(&self, key: &SessionKey) -> Result<bool, Error> {
        lock(&self.ours).remove(key);
        Ok(self.mapping.remove(key)? | self.provisional.remove(key)?)
    }

    /// Removes what has expired at `now` (seconds of CLOCK_MONOTONIC), and writes once more what was ours and
    /// is lost.
    pub fn sweep(&self, now: u32) -> Result<Swept, Error> {
        let mut swept = Swept {
            known: (0, self.mapping.capacity()),
            provisional: (0, self.provisional.capacity()),
            ..Swept::default()
        };
        for (map, (entries, _)) in
            [(&self.mapping, &mut swept.known), (&self.provisional, &mut swept.provisional)]
        {
            let mut expired = Vec::new();
            for (key, session) in map.iter() {
                *entries += 1;
                if session.expired(now) {
                    expired.push(key);
                }
            }
            for key in expired {
                if map.get(&key)?.is_some_and(|session| session.expired(now)) && map.remove(&key)? {
                    swept.removed += 1;
                    *entries = entries.saturating_sub(1);
                }
            }
        }
        let mut ours = lock(&self.ours);
        ours.retain(|_, session| !session.expired(now));
        for (key, session) in ours.iter() {
            self.mapping.insert_new(*key, *session)?;
        }
        Ok(swept)
    }

    /// All entries. Others may write meanwhile, see [`Table::iter`].
    pub fn iter(&self) -> impl Iterator<Item = (SessionKey, Session)> + '_ {
        self.mapping.iter().chain(self.provisional.iter())
    }

    /// Entries that servers, probes or the operator stand for, with the same caveat: those that nothing else
    /// would bring back after a reboot.
    pub fn lasting(&self) -> impl Iterator<Item = (SessionKey, Session)> + '_ {
        let ours = lock(&self.ours);
        let lost: Vec<_> = ours
            .iter()
            .filter(|(key, _)| matches!(self.mapping.get(key), Ok(None)))
            .map(|(key, session)| (*key, *session))
            .collect();
        let lasts =
            |session: &Session| matches!(session.state, STATE_CONFIRMED | STATE_DISCOVERED | STATE_PINNED);
        self.mapping.iter().chain(lost).filter(move |(_, session)| lasts(session))
    }

    /// All keys, with the same caveat.
    pub fn keys(&self) -> impl Iterator<Item = SessionKey> + '_ {
        self.mapping.keys().chain(self.provisional.keys())
    }
}

/// True for what the daemon writes and keeps up.
fn is_ours(session: &Session) -> bool {
    matches!(session.state, STATE_PINNED | STATE_CONFIGURED | STATE_DISCOVERED)
}

#[cfg(test)]
mod tests {
    use dispatcher_common::session::KIND_COOKIE;

    use super::{
        super::{Capacities, Dataplane, object},
        *,
    };

    /// In a build with the object, as root.
    #[test]
    fn what_the_daemon_wrote_is_written_again_until_it_expires_or_is_removed() {
        // SAFETY: takes nothing, touches nothing.
        if object().is_empty() || unsafe { libc::geteuid() } != 0 {
            return;
        }
        let capacities = Capacities { flows: 64, sessions: 64, stash_slots: 16, ..Capacities::default() };
        let dataplane = Dataplane::load(object(), &capacities).expect("loads");
        let sessions = dataplane.sessions();
        let key = |n: u8| SessionKey::new(1, KIND_COOKIE, &[n; 16]).expect("a key");
        let session = |state, expires| Session { state, expires, ..Session::of(7) };
        for (n, state, expires) in [
            (1, STATE_PINNED, 0),
            (2, STATE_DISCOVERED, 100),
            (3, STATE_DISCOVERED, 10),
            (4, STATE_CONFIRMED, 100),
            (5, STATE_PROVISIONAL, 100),
            (6, STATE_PINNED, 0),
            (7, STATE_CONFIGURED, 0),
        ] {
            sessions.insert(key(n), session(state, expires)).expect("writable");
        }
        assert!(sessions.remove(&key(6)).expect("writable"), "by the operator");
        // A full table forgets.
        for n in [1, 2, 3, 4, 7] {
            assert!(sessions.mapping.remove(&key(n)).expect("writable"));
        }
        let swept = sessions.sweep(50).expect("sweeps");
        assert_eq!((swept.removed, swept.known.0, swept.provisional.0), (0, 0, 1));
        let there = |n| sessions.get(&key(n)).expect("readable").is_some();
        assert_eq!([1, 2, 3, 4, 5, 6, 7].map(there), [true, true, false, false, true, false, true]);
        let swept = sessions.sweep(200).expect("sweeps");
        assert_eq!((swept.removed, swept.known, swept.provisional.0), (2, (2, 64), 0));
    }

    /// As above.
    #[test]
    fn a_provisional_entry_comes_second_and_gives_way() {
        // SAFETY: takes nothing, touches nothing.
        if object().is_empty() || unsafe { libc::geteuid() } != 0 {
            return;
        }
        let capacities = Capacities { flows: 64, sessions: 64, stash_slots: 16, ..Capacities::default() };
        let dataplane = Dataplane::load(object(), &capacities).expect("loads");
        let sessions = dataplane.sessions();
        let key = SessionKey::new(1, KIND_COOKIE, &[1; 16]).expect("a key");
        let session = |state, backend| Session { state, ..Session::of(backend) };
        sessions.insert(key, session(STATE_CONFIRMED, 7)).expect("writable");
        sessions.insert(key, session(STATE_PROVISIONAL, 8)).expect("writable");
        assert_eq!(sessions.get(&key).expect("readable").expect("there").backends[0], 7);
        assert_eq!(sessions.all(&key).expect("readable").count(), 2);
        sessions.insert(key, session(STATE_PINNED, 9)).expect("writable");
        assert_eq!(sessions.all(&key).expect("readable").map(|one| one.backends[0]).collect::<Vec<_>>(), [9]);
    }
}
