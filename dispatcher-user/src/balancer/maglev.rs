//! Maglev's consistent hashing ("Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4), with weights: each backend walks its own permutation of the table and takes the first
//! free entry, heavier ones more often.

use super::{Balancer, Candidate, mix};

#[derive(Debug)]
pub(super) struct Maglev;

impl Balancer for Maglev {
    fn table(&self, candidates: &[Candidate], size: u32) -> Vec<u32> {
        let mut walkers: Vec<Walker> = candidates.iter().map(|one| Walker::new(one, size)).collect();
        // The order of turns must not depend on how candidates happen to be listed.
        walkers.sort_unstable_by_key(|walker| walker.id);
        let heaviest = walkers.iter().map(|walker| walker.weight).max().unwrap_or(0);
        if heaviest == 0 || size == 0 {
            return Vec::new();
        }
        let mut table: Vec<Option<u32>> = vec![None; size as usize];
        let mut free = size;
        while free > 0 {
            for walker in &mut walkers {
                // A backend of the greatest weight has a turn in each round, others in their share of rounds.
                walker.credit += walker.weight;
                if walker.credit < heaviest {
                    continue;
                }
                walker.credit -= heaviest;
                if let Some(entry) = walker.next_free(&table)
                    && let Some(place) = table.get_mut(entry)
                {
                    *place = Some(walker.index);
                    free -= 1;
                }
                if free == 0 {
                    break;
                }
            }
        }
        table.into_iter().flatten().collect()
    }

    fn pick(&mut self, candidates: &[Candidate], hash: u64) -> Option<Candidate> {
        // Weighted rendezvous hashing has the same properties as a table and needs none.
        let score = |one: &Candidate| {
            let uniform = (mix(hash ^ mix(u64::from(one.id))) >> 11) as f64 / (1_u64 << 53) as f64;
            -uniform.max(f64::MIN_POSITIVE).ln() / f64::from(one.weight.max(1))
        };
        candidates.iter().min_by(|a, b| score(a).total_cmp(&score(b))).copied()
    }
}

/// A backend on its way through the table.
struct Walker {
    id: u32,
    index: u32,
    weight: u64,
    credit: u64,
    at: u64,
    skip: u64,
    size: u64,
}

impl Walker {
    fn new(candidate: &Candidate, size: u32) -> Self {
        let size = u64::from(size.max(1));
        let hash = mix(u64::from(candidate.id));
        Self {
            id: candidate.id,
            index: candidate.index,
            weight: u64::from(candidate.weight),
            credit: 0,
            at: hash % size,
            // The size is prime, so every skip visits every entry.
            skip: mix(hash) % (size - 1).max(1) + 1,
            size,
        }
    }

    fn next_free(&mut self, table: &[Option<u32>]) -> Option<usize> {
        for _ in 0..self.size {
            let entry = self.at as usize;
            self.at = (self.at + self.skip) % self.size;
            if table.get(entry).is_some_and(Option::is_none) {
                return Some(entry);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{candidates, shares},
        *,
    };

    #[test]
    fn equal_backends_get_equal_shares() {
        let all = candidates(&[1; 10]);
        let table = Maglev.table(&all, 4093);
        assert!(shares(&table, &all).into_iter().all(|share| (408..=410).contains(&share)));
    }

    #[test]
    fn the_order_of_candidates_does_not_matter() {
        let mut all = candidates(&[3, 1, 2, 7]);
        let table = Maglev.table(&all, 251);
        all.reverse();
        assert_eq!(Maglev.table(&all, 251), table);
    }

    #[test]
    fn a_backend_that_leaves_moves_little_else() {
        let all = candidates(&[1; 10]);
        let before = Maglev.table(&all, 4093);
        let gone = all[4].index;
        let left: Vec<Candidate> = all.iter().copied().filter(|one| one.index != gone).collect();
        let after = Maglev.table(&left, 4093);
        let moved = before.iter().zip(&after).filter(|(b, a)| **b != gone && a != b).count();
        // The paper's figure 12: a few per cent with a table of this size.
        assert!(moved < 4093 * 8 / 100, "{moved} entries of others moved");
        assert!(after.iter().all(|index| *index != gone));
    }

    #[test]
    fn picks_are_weighted_and_stay_when_others_leave() {
        let all = candidates(&[1, 1, 2]);
        let picks: Vec<u32> =
            (0..8000_u64).filter_map(|n| Maglev.pick(&all, mix(n))).map(|one| one.index).collect();
        for (share, expected) in shares(&picks, &all).into_iter().zip([2000, 2000, 4000_usize]) {
            assert!(share.abs_diff(expected) < 200, "{share} instead of {expected}");
        }
        let left = [all[0], all[2]];
        for (n, before) in (0..8000_u64).zip(picks) {
            let after = Maglev.pick(&left, mix(n)).expect("two are left").index;
            assert!(after == before || before == all[1].index);
        }
    }
}
