//! The mapping table, of two maps: see `sessions.rs` of the data path.

use std::{collections::HashMap, sync::Mutex};

use aya::Ebpf;
use dispatcher_common::{
    abi,
    session::{STATE_DISCOVERED, STATE_PINNED, STATE_PROVISIONAL, Session, SessionKey},
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

    /// Inserts or replaces. What is not provisional takes the place of what is. Pinned and discovered entries
    /// are written again by [`sweep`](Self::sweep) if the table loses them.
    pub fn insert(&self, key: SessionKey, session: Session) -> Result<(), Error> {
        if matches!(session.state, STATE_PINNED | STATE_DISCOVERED) {
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
            // First look, then remove: a walk whose last key is gone starts anew.
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

    /// All keys, with the same caveat.
    pub fn keys(&self) -> impl Iterator<Item = SessionKey> + '_ {
        self.mapping.keys().chain(self.provisional.keys())
    }
}
