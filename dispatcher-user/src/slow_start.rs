//! Slow start: a backend that comes up gets a growing part of its weight, so that it is not hit by its full
//! share while it is cold.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::reconcile::Desired;

/// Percent of its weight that a backend begins with.
const FIRST: u32 = 10;

/// Which backends take new connections, and since when.
#[derive(Debug, Default)]
pub(crate) struct SlowStart {
    /// Backends that take new connections; `None` for those that have all of their weight.
    since: BTreeMap<u32, Option<Instant>>,
    /// What backends in slow start have.
    percent: BTreeMap<u32, u32>,
    followed: bool,
}

impl SlowStart {
    /// Percent of the weights of backends in slow start, by backend id.
    pub(crate) fn percent(&self) -> &BTreeMap<u32, u32> {
        &self.percent
    }

    /// Takes note of who takes new connections now, and how long each starts. Whoever is there the first
    /// time has all of its weight: when all begin together, none is spared.
    pub(crate) fn follow(&mut self, takers: &BTreeMap<u32, Duration>, now: Instant) {
        let first = !std::mem::replace(&mut self.followed, true);
        self.since.retain(|id, _| takers.contains_key(id));
        self.percent.clear();
        for (id, whole) in takers {
            let since = self.since.entry(*id).or_insert((!first).then_some(now));
            let Some(start) = *since else { continue };
            let percent = percent(now.saturating_duration_since(start), *whole);
            if percent < 100 {
                self.percent.insert(*id, percent);
            } else {
                *since = None;
            }
        }
    }
}

/// Backends that take new connections, and how long each starts. Those of services without slow start are
/// among them: when a reload brings it, they have all of their weight already.
pub(crate) fn takers(desired: &Desired<'_>) -> BTreeMap<u32, Duration> {
    let services = desired.config.services.iter();
    services
        .flat_map(|service| {
            let takers = service.backends.iter().filter(|backend| desired.takes_new(backend));
            takers.map(|backend| (backend.id, Duration::from_secs(u64::from(service.slow_start))))
        })
        .collect()
}

/// Percent of the weight after so long: it grows from second to second, in a straight line.
fn percent(elapsed: Duration, whole: Duration) -> u32 {
    let (elapsed, whole) = (elapsed.as_secs(), whole.as_secs());
    if elapsed >= whole {
        return 100;
    }
    FIRST + (u64::from(100 - FIRST) * elapsed / whole) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_grow_in_a_straight_line() {
        for (elapsed, expected) in
            [(0, 10), (999, 10), (1_000, 13), (15_000, 55), (29_999, 97), (30_000, 100)]
        {
            let percent = percent(Duration::from_millis(elapsed), Duration::from_secs(30));
            assert_eq!(percent, expected, "after {elapsed} ms");
        }
        assert_eq!(percent(Duration::from_secs(1 << 40), Duration::from_secs(1)), 100);
    }

    #[test]
    fn only_those_that_come_later_start_slowly() {
        let takers = |ids: &[u32]| ids.iter().map(|id| (*id, Duration::from_secs(10))).collect();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut slow = SlowStart::default();
        slow.follow(&takers(&[1, 2]), at(0));
        assert!(slow.percent().is_empty(), "{slow:?}");
        slow.follow(&takers(&[1]), at(1));
        slow.follow(&takers(&[1, 2, 3]), at(2));
        assert_eq!(slow.percent(), &BTreeMap::from([(2, 10), (3, 10)]));
        slow.follow(&takers(&[1, 2]), at(7));
        assert_eq!(slow.percent(), &BTreeMap::from([(2, 55)]));
        slow.follow(&takers(&[1, 2]), at(12));
        assert!(slow.percent().is_empty(), "{slow:?}");
        slow.follow(&takers(&[1, 2]), at(3));
        assert!(slow.percent().is_empty(), "what has all of its weight keeps it: {slow:?}");
        slow.follow(&BTreeMap::from([(1, Duration::ZERO), (2, Duration::ZERO), (4, Duration::ZERO)]), at(20));
        assert!(slow.percent().is_empty(), "without slow start: {slow:?}");
        slow.follow(&takers(&[1, 2, 4, 5]), at(21));
        assert_eq!(
            slow.percent(),
            &BTreeMap::from([(5, 10)]),
            "who is there when it is turned on is not slowed"
        );
    }
}
