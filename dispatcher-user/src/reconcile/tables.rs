//! Load-balancing tables that remember what they were made of: of many services a change concerns few, and
//! the tables of the others are not made again to see that they stay as they are.

use std::sync::Arc;

use crate::balancer::{Balance, Candidate};

/// A load-balancing table.
#[derive(Clone, Debug)]
pub struct Table {
    entries: Arc<[u32]>,
    /// Nothing where it was found in the maps.
    made_of: Option<Arc<Recipe>>,
}

/// What a table depends on.
#[derive(PartialEq, Debug)]
struct Recipe {
    balance: Balance,
    size: u32,
    candidates: Vec<Candidate>,
}

impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Table {
    /// One that stands in the maps.
    pub(super) fn found(entries: Vec<u32>) -> Self {
        Self { entries: entries.into(), made_of: None }
    }

    /// The table of these candidates: another one's entries, if it was made of the same.
    pub(super) fn make(
        balance: Balance,
        size: u32,
        mut candidates: Vec<Candidate>,
        old: Option<&Self>,
    ) -> Self {
        if !balance.follows_load() {
            // It does not look at these.
            candidates.iter_mut().for_each(|one| (one.load, one.response) = (0, 0));
        }
        let recipe = Recipe { balance, size, candidates };
        if let Some(old) = old.filter(|old| old.made_of.as_deref() == Some(&recipe)) {
            return old.clone();
        }
        let entries = balance.balancer().table(&recipe.candidates, size).into();
        Self { entries, made_of: Some(Arc::new(recipe)) }
    }

    /// Backend indexes.
    #[must_use]
    pub fn entries(&self) -> &[u32] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(loads: [u64; 2]) -> Vec<Candidate> {
        let one = |(index, load)| Candidate { index, id: index + 7, weight: 1, load, response: load };
        (0..).zip(loads).map(one).collect()
    }

    #[test]
    fn only_what_matters_makes_another_table() {
        fn make(balance: Balance, loads: [u64; 2], old: Option<&Table>) -> Table {
            Table::make(balance, 251, candidates(loads), old)
        }
        let same = |one: &Table, other: &Table| Arc::ptr_eq(&one.entries, &other.entries);
        for (name, balance) in Balance::NAMES {
            let old = make(balance, [1, 1], None);
            assert!(same(&old, &make(balance, [1, 1], Some(&old))), "{name}");
            assert_eq!(same(&old, &make(balance, [1, 2], Some(&old))), !balance.follows_load(), "{name}");
            let found = Table::found(old.entries().to_vec());
            let again = make(balance, [1, 1], Some(&found));
            assert!(!same(&found, &again) && found == again, "{name}");
            let larger = Table::make(balance, 509, candidates([1, 1]), Some(&old));
            assert_eq!(larger.entries().len(), 509, "{name}");
        }
    }
}
