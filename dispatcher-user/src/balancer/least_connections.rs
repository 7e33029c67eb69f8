//! Weighted least connections. Exact where the daemon picks (`miss = "daemon"`). A table follows the load
//! of the moment it was made: its shares bring backends toward the same load for their weight.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{Balancer, Candidate};

#[derive(Debug)]
pub(super) struct LeastConnections;

impl Balancer for LeastConnections {
    fn table(&self, candidates: &[Candidate], size: u32) -> Vec<u32> {
        // Each entry stands for so many connections that a full table evens out half the present load.
        let total: u64 = candidates.iter().map(|one| one.load).sum();
        let size = u64::from(size);
        let mut heap: BinaryHeap<Reverse<(Ratio, usize)>> = candidates
            .iter()
            .enumerate()
            .map(|(n, one)| Reverse((Ratio::new(one.load * 2 * size, one.weight), n)))
            .collect();
        let step = total.max(size);
        let mut table = Vec::with_capacity(size as usize);
        while (table.len() as u64) < size {
            let Some(Reverse((ratio, n))) = heap.pop() else { break };
            let Some(one) = candidates.get(n) else { break };
            table.push(one.index);
            heap.push(Reverse((Ratio::new(ratio.load + step, one.weight), n)));
        }
        table
    }

    fn pick(&mut self, candidates: &[Candidate], hash: u64) -> Option<Candidate> {
        // Ties go by hash, so that an idle farm does not send everyone to the first backend.
        let start = (hash % candidates.len().max(1) as u64) as usize;
        let order = candidates.iter().cycle().skip(start).take(candidates.len());
        order.min_by_key(|one| Ratio::new(one.load, one.weight)).copied()
    }
}

/// Load by weight, compared without division.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Ratio {
    load: u64,
    weight: u64,
}

impl Ratio {
    pub(super) fn new(load: u64, weight: u32) -> Self {
        Self { load, weight: u64::from(weight.max(1)) }
    }
}

impl Ord for Ratio {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let cross = |a: u64, b: u64| u128::from(a) * u128::from(b);
        cross(self.load, other.weight).cmp(&cross(other.load, self.weight))
    }
}

impl PartialOrd for Ratio {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{candidates, shares},
        *,
    };

    #[test]
    fn the_least_loaded_for_its_weight_is_picked() {
        let mut all = candidates(&[1, 4]);
        (all[0].load, all[1].load) = (2, 7);
        assert_eq!(LeastConnections.pick(&all, 0), Some(all[1]));
        all[1].load = 9;
        assert_eq!(LeastConnections.pick(&all, 1), Some(all[0]));
    }

    #[test]
    fn ties_are_spread_by_hash() {
        let all = candidates(&[1, 1, 1]);
        let picks: Vec<u32> =
            (0..3).filter_map(|n| LeastConnections.pick(&all, n)).map(|one| one.index / 3).collect();
        assert_eq!(picks, [0, 1, 2]);
    }

    #[test]
    fn a_table_gives_less_to_those_with_more() {
        let mut all = candidates(&[1, 1]);
        (all[0].load, all[1].load) = (60, 40);
        let table = LeastConnections.table(&all, 1009);
        let shares = shares(&table, &all);
        assert!(shares[0] < shares[1] && shares[0] > 0, "{shares:?}");
    }
}
