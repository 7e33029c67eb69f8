//! Power of two choices: of two backends at random the one with the fewer connections for its weight. Never the
//! worst, and several dispatchers that pick at once do not all pick the same.

use super::{
    Balancer, Candidate,
    least_connections::{LeastConnections, Ratio},
    mix,
};

#[derive(Debug, Default)]
pub(super) struct PowerOfTwo {
    /// Picks so far: each draws anew.
    picks: u64,
}

impl Balancer for PowerOfTwo {
    fn table(&self, candidates: &[Candidate], size: u32) -> Vec<u32> {
        // A table is read at random already; its shares follow the load.
        LeastConnections.table(candidates, size)
    }

    fn pick(&mut self, candidates: &[Candidate], hash: u64) -> Option<Candidate> {
        self.picks = self.picks.wrapping_add(1);
        let random = mix(hash ^ mix(self.picks));
        let len = candidates.len() as u64;
        let first = (random >> 32) % len.max(1);
        // Another one, if there is another.
        let step = 1 + (random & u64::from(u32::MAX)) % len.saturating_sub(1).max(1);
        let two = [first, (first + step) % len.max(1)];
        // What it would have with this connection: so weights count among idle ones too.
        let ratio = |one: &&Candidate| Ratio::new(one.load + 1, one.weight);
        two.iter().filter_map(|n| candidates.get(*n as usize)).min_by_key(ratio).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::candidates, *};

    fn picks(all: &[Candidate], times: u64) -> Vec<usize> {
        let mut balancer = PowerOfTwo::default();
        let mut counts = vec![0; all.len()];
        for hash in 0..times {
            let picked = balancer.pick(all, hash).expect("one is there");
            counts[picked.index as usize / 3] += 1;
        }
        counts
    }

    #[test]
    fn the_most_loaded_is_never_picked_and_the_least_loaded_most_often() {
        let mut all = candidates(&[1, 1, 1, 1]);
        for (load, one) in (0..).zip(&mut all) {
            one.load = load * 10;
        }
        let counts = picks(&all, 6000);
        assert_eq!(counts[3], 0);
        // Of six pairs three have the first, two the second, one the third.
        for (count, expected) in counts.iter().zip([3000, 2000, 1000]) {
            assert!(count.abs_diff(expected) < 200, "{counts:?}");
        }
    }

    #[test]
    fn load_counts_for_its_weight() {
        let mut all = candidates(&[1, 4]);
        (all[0].load, all[1].load) = (2, 7);
        assert_eq!(picks(&all, 100), [0, 100]);
        all[1].load = 12;
        assert_eq!(picks(&all, 100), [100, 0]);
    }

    #[test]
    fn one_alone_is_picked() {
        assert_eq!(picks(&candidates(&[1]), 10), [10]);
    }

    #[test]
    fn one_client_gets_all_backends() {
        let all = candidates(&[1, 1, 1]);
        let mut balancer = PowerOfTwo::default();
        let mut seen: Vec<u32> = (0..60).filter_map(|_| balancer.pick(&all, 7)).map(|one| one.id).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 3);
    }
}
