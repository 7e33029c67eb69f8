//! Which entries of the flow table count as connections of which backend.
//!
//! An entry names its backend by the index, which another one may have by now, and nothing tells when its last
//! packet came. So it counts if it was made after its backend took the index.
//!
//! Nor does anything tell whether a client is still there that has closed its side, or whose backend has. Many vanish
//! without another word, so as load such a connection counts for a while only.

use std::collections::{BTreeMap, HashMap};

use dispatcher_common::{
    flow::{FLAG_FIN, FLAG_FIN_PEER, FLAG_TO_BACKEND, Flow, FlowKey, is_closed},
    qos::CLASSES_MAX,
};

/// Seconds for which a connection that one side alone has closed counts as load, from when it was seen so first.
const HALF_CLOSED: u32 = 60;

/// When backends took their indexes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tenures(BTreeMap<u32, Tenure>);

#[derive(Clone, Copy, Debug)]
struct Tenure {
    /// Id of the backend.
    id: u32,
    /// Seconds of CLOCK_MONOTONIC.
    since: u32,
}

impl Tenures {
    /// Takes note of ids and indexes of all backends. `now` is a second that was before the data path knew those
    /// that are new. Whatever else changes of a backend, it keeps its connections.
    pub(crate) fn follow(&mut self, backends: impl Iterator<Item = (u32, u32)>, now: u32) {
        let before = std::mem::take(&mut self.0);
        let tenure = |(id, index)| {
            let same = before.get(&index).filter(|tenure| tenure.id == id);
            (index, same.copied().unwrap_or(Tenure { id, since: now }))
        };
        self.0 = backends.map(tenure).collect();
    }

    /// True of a connection that is open at the backend that has its index now.
    pub(crate) fn is_open(&self, flow: &Flow) -> bool {
        flow.flags & FLAG_TO_BACKEND != 0
            && !is_closed(flow.flags)
            && self.0.get(&flow.backend).is_some_and(|tenure| flow.created >= tenure.since)
    }
}

/// Connections of each class, by its number.
pub(crate) type Load = [u32; CLASSES_MAX];

/// Connections that one side alone has closed.
#[derive(Debug, Default)]
pub(crate) struct Closing(HashMap<FlowKey, Seen>);

#[derive(Clone, Copy, Debug)]
struct Seen {
    /// [`Flow::created`]: the same client may be there again, from the same port.
    created: u32,
    /// When it was seen first, seconds of CLOCK_MONOTONIC.
    since: u32,
}

impl Closing {
    /// How many of these connections, all that are open, are load of each backend, by its index, and of each class there, by
    /// its number. Those that are not named any more are forgotten.
    pub(crate) fn count(
        &mut self,
        open: impl Iterator<Item = (FlowKey, Flow)>,
        now: u32,
    ) -> BTreeMap<u32, Load> {
        let before = std::mem::take(&mut self.0);
        let mut by_index = BTreeMap::<u32, Load>::new();
        for (key, flow) in open {
            if flow.flags & (FLAG_FIN | FLAG_FIN_PEER) != 0 {
                let seen = before.get(&key).filter(|seen| seen.created == flow.created);
                let seen = seen.copied().unwrap_or(Seen { created: flow.created, since: now });
                self.0.insert(key, seen);
                if now.saturating_sub(seen.since) > HALF_CLOSED {
                    continue;
                }
            }
            let load = by_index.entry(flow.backend).or_default();
            if let Some(count) = load.get_mut(flow.class() as usize) {
                *count += 1;
            }
        }
        by_index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(backend: u32, created: u32) -> Flow {
        Flow { flags: FLAG_TO_BACKEND, backend, created, ..Flow::default() }
    }

    #[test]
    fn connections_of_whoever_had_an_index_before_do_not_count() {
        let mut tenures = Tenures::default();
        // 70 and 71 were there before the daemon was.
        tenures.follow([(70, 0), (71, 1)].into_iter(), 0);
        assert!(tenures.is_open(&flow(0, 0)) && tenures.is_open(&flow(1, 5)));
        assert!(!tenures.is_open(&flow(2, 5)), "nobody has it");
        // 70 goes, then 72 has its index.
        tenures.follow([(71, 1)].into_iter(), 10);
        assert!(!tenures.is_open(&flow(0, 5)));
        for now in [20, 30] {
            tenures.follow([(72, 0), (71, 1)].into_iter(), now);
            assert!(!tenures.is_open(&flow(0, 5)) && !tenures.is_open(&flow(0, 19)));
            assert!(tenures.is_open(&flow(0, 20)), "of the same second as the backend");
            assert!(tenures.is_open(&flow(1, 5)), "it stayed");
        }
        // One that comes back is a new one; so is one that takes over an index at once.
        tenures.follow([(70, 0), (71, 1)].into_iter(), 40);
        assert!(!tenures.is_open(&flow(0, 39)) && tenures.is_open(&flow(0, 40)));
    }

    #[test]
    fn one_direction_counts_and_only_while_it_is_open() {
        let mut tenures = Tenures::default();
        tenures.follow(std::iter::once((70, 0)), 0);
        for (flags, open) in [
            (0, false),
            (FLAG_TO_BACKEND, true),
            (FLAG_TO_BACKEND | FLAG_FIN, true),
            (FLAG_TO_BACKEND | FLAG_FIN | FLAG_FIN_PEER, false),
        ] {
            assert_eq!(tenures.is_open(&Flow { flags, ..flow(0, 1) }), open, "{flags:#x}");
        }
    }

    #[test]
    fn half_closed_connections_are_load_for_a_minute() {
        let key = |ports| FlowKey { ports, proto: 6, ..FlowKey::default() };
        let closing = |flag, created| Flow { flags: FLAG_TO_BACKEND | flag, ..flow(3, created) };
        let mut seen = Closing::default();
        let open = (key(1), flow(3, 5));
        let (client, server) = ((key(2), closing(FLAG_FIN, 5)), (key(3), closing(FLAG_FIN_PEER, 6)));
        let mut load = |flows: &[(FlowKey, Flow)], now| {
            let counted = seen.count(flows.iter().copied(), now);
            (counted.get(&3).map_or(0, |load| load.iter().sum::<u32>()), seen.0.len())
        };
        assert_eq!(load(&[open, client], 1000), (2, 1), "however old it is");
        assert_eq!(load(&[open, client, server], 1030), (3, 2));
        assert_eq!(load(&[open, client, server], 1060), (3, 2));
        assert_eq!(load(&[open, client, server], 1061), (2, 2));
        assert_eq!(
            load(&[open, client, server], 1091),
            (1, 2),
            "one that is open counts as long as it lasts"
        );
        // The client's port is used again, and that connection half closed, too.
        let again = (key(2), closing(FLAG_FIN, 1092));
        assert_eq!(load(&[open, again, server], 1095), (2, 2));
        assert_eq!(load(&[open], 1096), (1, 0), "nothing is kept of what is over");
        assert_eq!(load(&[open, server], 1097), (2, 1));
    }
}
