//! Load balancing: which backend takes the next connection.
//!
//! A new algorithm is a file here with an implementation of [`Balancer`], a variant of [`Balance`] and its
//! name in [`Balance::NAMES`]; nothing else knows about it.

use serde::{Deserialize, Serialize};

mod least_connections;
mod least_response_time;
mod maglev;
mod power_of_two;
mod round_robin;

/// A backend that may take connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// What the table holds for it.
    pub index: u32,
    /// Stable id of its name.
    pub id: u32,
    /// Weight, at least 1.
    pub weight: u32,
    /// Connections that it has.
    pub load: u64,
    /// How long it takes to answer, nanoseconds; 0: not known.
    pub response: u64,
}

/// An algorithm.
pub trait Balancer: Send {
    /// The load-balancing table: `size` entries of backend indexes, through which the data path spreads
    /// connections evenly. Empty when there is no candidate. The same candidates give the same shares.
    fn table(&self, candidates: &[Candidate], size: u32) -> Vec<u32>;

    /// The backend for one more connection, of a client with this hash.
    fn pick(&mut self, candidates: &[Candidate], hash: u64) -> Option<Candidate>;
}

/// The algorithms by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// Consistent hashing: a backend that comes or goes moves few clients.
    #[default]
    Maglev,
    /// Each in turn, by weight.
    WeightedRoundRobin,
    /// The one with the fewest connections for its weight.
    WeightedLeastConnections,
    /// Of two at random the one with the fewer connections for its weight.
    PowerOfTwoChoices,
    /// The one with the fewest connections for its weight and speed.
    WeightedLeastResponseTime,
}

impl Balance {
    /// Names in configurations.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("maglev", Self::Maglev),
        ("weighted-round-robin", Self::WeightedRoundRobin),
        ("weighted-least-connections", Self::WeightedLeastConnections),
        ("power-of-two-choices", Self::PowerOfTwoChoices),
        ("weighted-least-response-time", Self::WeightedLeastResponseTime),
    ];

    /// A balancer of this kind.
    #[must_use]
    pub fn balancer(self) -> Box<dyn Balancer> {
        match self {
            Self::Maglev => Box::new(maglev::Maglev),
            Self::WeightedRoundRobin => Box::new(round_robin::RoundRobin::default()),
            Self::WeightedLeastConnections => Box::new(least_connections::LeastConnections),
            Self::PowerOfTwoChoices => Box::new(power_of_two::PowerOfTwo::default()),
            Self::WeightedLeastResponseTime => Box::new(least_response_time::LeastResponseTime),
        }
    }

    /// True when a table must be the same wherever it is made, and moves few entries by itself. Those of the
    /// others keep as many entries in their places as they can.
    #[must_use]
    pub const fn is_consistent(self) -> bool {
        matches!(self, Self::Maglev)
    }

    /// True when tables depend on [`Candidate::load`], so that they must be made anew now and then.
    #[must_use]
    pub const fn follows_load(self) -> bool {
        matches!(
            self,
            Self::WeightedLeastConnections | Self::PowerOfTwoChoices | Self::WeightedLeastResponseTime
        )
    }
}

/// Mixes the bits of a number (the finalizer of SplitMix64).
const fn mix(n: u64) -> u64 {
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn candidates(weights: &[u32]) -> Vec<Candidate> {
        let named = |(n, weight): (usize, &u32)| Candidate {
            index: n as u32 * 3,
            id: dispatcher_common::service::stable_id(&format!("web/{n}")),
            weight: *weight,
            load: 0,
            response: 0,
        };
        weights.iter().enumerate().map(named).collect()
    }

    /// How often each candidate is in a table.
    pub(super) fn shares(table: &[u32], candidates: &[Candidate]) -> Vec<usize> {
        candidates.iter().map(|one| table.iter().filter(|index| **index == one.index).count()).collect()
    }

    #[test]
    fn every_algorithm_fills_its_table_by_weight() {
        let all = candidates(&[1, 2, 5]);
        for (name, balance) in Balance::NAMES {
            let table = balance.balancer().table(&all, 4093);
            assert_eq!(table.len(), 4093, "{name}");
            for (share, expected) in shares(&table, &all).into_iter().zip([511.6, 1023.2, 2558.1]) {
                assert!((share as f64 - expected).abs() < 50.0, "{name}: {share} instead of {expected}");
            }
        }
    }

    #[test]
    fn nobody_to_choose_from_is_an_empty_table() {
        for (name, balance) in Balance::NAMES {
            assert!(balance.balancer().table(&[], 4093).is_empty(), "{name}");
            assert_eq!(balance.balancer().pick(&[], 7), None, "{name}");
        }
    }

    #[test]
    fn names_are_those_of_json() {
        for (name, balance) in Balance::NAMES {
            assert_eq!(serde_json::to_string(&balance).expect("json"), format!("\"{name}\""));
        }
    }
}
