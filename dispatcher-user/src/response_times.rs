//! How long backends take to answer, of late: from what the data path counts.

use std::collections::BTreeMap;

use dispatcher_common::service::{BackendTimes, Histogram};

/// How much the newest look counts.
const NEWEST: f64 = 0.3;

/// A moving average of a histogram's times.
#[derive(Clone, Copy, Debug, Default)]
struct Average {
    /// Count and sum at the last look.
    seen: (u64, u64),
    ns: Option<f64>,
}

impl Average {
    fn look(&mut self, histogram: &Histogram) {
        let now = (histogram.count(), histogram.sum);
        let (count, sum) = (now.0.saturating_sub(self.seen.0), now.1.saturating_sub(self.seen.1));
        self.seen = now;
        if count != 0 {
            let new = sum as f64 / count as f64;
            self.ns = Some(self.ns.map_or(new, |old| old + (new - old) * NEWEST));
        }
    }
}

/// Moving averages of backends, by id.
#[derive(Debug, Default)]
pub(crate) struct ResponseTimes {
    averages: BTreeMap<u32, [Average; 2]>,
    sums: BTreeMap<u32, u64>,
}

impl ResponseTimes {
    /// How long backends take to accept a connection and to answer what they are sent, nanoseconds, by id.
    pub(crate) fn sums(&self) -> &BTreeMap<u32, u64> {
        &self.sums
    }

    /// Takes note of what is counted by now; who is not there any more is forgotten.
    pub(crate) fn look(&mut self, times: &BTreeMap<u32, BackendTimes>) {
        self.averages.retain(|id, _| times.contains_key(id));
        self.sums.clear();
        for (id, times) in times {
            let averages = self.averages.entry(*id).or_default();
            for (average, histogram) in averages.iter_mut().zip([&times.connect, &times.response]) {
                average.look(histogram);
            }
            let sum: f64 = averages.iter().filter_map(|average| average.ns).sum();
            if sum > 0.0 {
                self.sums.insert(*id, sum as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_follow_what_is_new() {
        let mut times = BackendTimes::default();
        let mut known = ResponseTimes::default();
        let mut look = |times: &BackendTimes| {
            known.look(&BTreeMap::from([(7, *times)]));
            known.sums().get(&7).copied()
        };
        assert_eq!(look(&times), None);
        let took = |times: &mut BackendTimes, ns: u64| {
            times.connect.buckets[Histogram::bucket(ns)] += 1;
            times.connect.sum += ns;
        };
        took(&mut times, 1_000_000);
        took(&mut times, 3_000_000);
        assert_eq!(look(&times), Some(2_000_000));
        assert_eq!(look(&times), Some(2_000_000), "nothing new");
        took(&mut times, 12_000_000);
        assert_eq!(look(&times), Some(5_000_000));
        times.response.buckets[3] += 1;
        times.response.sum += 8000;
        assert_eq!(look(&times), Some(5_008_000));
        // The place was given to another backend.
        let mut fresh = BackendTimes::default();
        took(&mut fresh, 5_000_000);
        assert!(look(&fresh).is_some());
        known.look(&BTreeMap::new());
        assert!(known.sums().is_empty());
    }
}
