//! Which entries of the flow table count as connections of which backend.
//!
//! An entry names its backend by the index, which another one may have by now, and nothing tells when its last
//! packet came. So it counts if it was made after its backend took the index.

use std::collections::BTreeMap;

use dispatcher_common::flow::{FLAG_TO_BACKEND, Flow, is_closed};

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

#[cfg(test)]
mod tests {
    use dispatcher_common::flow::{FLAG_FIN, FLAG_FIN_PEER};

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
}
