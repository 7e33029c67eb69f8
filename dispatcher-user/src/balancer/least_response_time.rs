//! Weighted least response time: least connections, where a backend that answers in half the time counts as
//! one of twice the weight.

use super::{Balancer, Candidate, least_connections::LeastConnections};

/// The fastest backend's weight is multiplied by this, the others' by less.
const SCALE: u64 = 1000;

#[derive(Debug)]
pub(super) struct LeastResponseTime;

impl Balancer for LeastResponseTime {
    fn table(&self, candidates: &[Candidate], size: u32) -> Vec<u32> {
        LeastConnections.table(&by_speed(candidates), size)
    }

    fn pick(&mut self, candidates: &[Candidate], hash: u64) -> Option<Candidate> {
        let picked = LeastConnections.pick(&by_speed(candidates), hash)?;
        candidates.iter().find(|one| one.id == picked.id).copied()
    }
}

/// With weights by response time. One whose time is not known yet counts as the fastest, so that it becomes
/// known; the slowest keeps something, so that it is seen when it is fast again.
fn by_speed(candidates: &[Candidate]) -> Vec<Candidate> {
    let known = candidates.iter().map(|one| one.response).filter(|time| *time != 0);
    let fastest = known.min().unwrap_or(1);
    let weight = |one: &Candidate| {
        let time = if one.response == 0 { fastest } else { one.response };
        let scaled = u128::from(one.weight) * u128::from(SCALE) * u128::from(fastest) / u128::from(time);
        u32::try_from(scaled.max(1)).unwrap_or(u32::MAX)
    };
    candidates.iter().map(|one| Candidate { weight: weight(one), ..*one }).collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{candidates, shares},
        *,
    };

    #[test]
    fn shares_follow_speed_and_weight() {
        let mut all = candidates(&[1, 1, 2]);
        (all[0].response, all[1].response, all[2].response) = (1_000_000, 4_000_000, 4_000_000);
        let shares = shares(&LeastResponseTime.table(&all, 4093), &all);
        for (share, expected) in shares.into_iter().zip([2339, 585, 1169]) {
            assert!(share.abs_diff(expected) < 50, "{share} instead of {expected}");
        }
        // What it has counts against it.
        all[0].load = 5;
        assert_eq!(LeastResponseTime.pick(&all, 0).map(|one| (one.id, one.weight)), Some((all[1].id, 1)));
    }

    #[test]
    fn the_unknown_and_the_slowest_are_not_left_out() {
        let mut all = candidates(&[1, 1, 1]);
        (all[1].response, all[2].response) = (1_000_000, 60_000_000_000);
        let shares = shares(&LeastResponseTime.table(&all, 65_537), &all);
        assert!(shares[0].abs_diff(shares[1]) < 10 && shares[2] > 0, "{shares:?}");
    }
}
