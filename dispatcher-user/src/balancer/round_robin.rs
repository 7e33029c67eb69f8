//! Smooth weighted round robin: turns of a heavy backend are spread between those of others.

use std::collections::BTreeMap;

use super::{Balancer, Candidate};

#[derive(Debug, Default)]
pub(super) struct RoundRobin {
    /// Credit by backend id.
    credit: BTreeMap<u32, i64>,
}

impl Balancer for RoundRobin {
    fn table(&self, candidates: &[Candidate], size: u32) -> Vec<u32> {
        let mut turn = Self::default();
        (0..size).map_while(|_| turn.pick(candidates, 0)).map(|one| one.index).collect()
    }

    fn pick(&mut self, candidates: &[Candidate], _hash: u64) -> Option<Candidate> {
        self.credit.retain(|id, _| candidates.iter().any(|one| one.id == *id));
        let mut best: Option<(i64, Candidate)> = None;
        for one in candidates {
            let credit = self.credit.entry(one.id).or_insert(0);
            *credit += i64::from(one.weight);
            if best.is_none_or(|(most, _)| *credit > most) {
                best = Some((*credit, *one));
            }
        }
        let (_, best) = best?;
        let total: i64 = candidates.iter().map(|one| i64::from(one.weight)).sum();
        *self.credit.entry(best.id).or_insert(0) -= total;
        Some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::candidates, *};

    #[test]
    fn turns_are_spread() {
        let all = candidates(&[5, 1, 1]);
        let turns: Vec<u32> = RoundRobin::default().table(&all, 7).into_iter().map(|i| i / 3).collect();
        assert_eq!(turns, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn a_backend_that_left_keeps_no_credit() {
        let all = candidates(&[1, 1]);
        let mut turn = RoundRobin::default();
        for _ in 0..5 {
            turn.pick(&all[..1], 0);
        }
        let picks: Vec<u32> = (0..4).filter_map(|_| turn.pick(&all, 0)).map(|one| one.index / 3).collect();
        assert_eq!(picks, [0, 1, 0, 1]);
    }
}
