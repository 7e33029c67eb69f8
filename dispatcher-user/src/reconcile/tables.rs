//! Load-balancing tables that remember what they were made of: of many services a change concerns few, and
//! the tables of the others are not made again to see that they stay as they are.

use std::{collections::HashMap, sync::Arc};

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
        let mut entries = balance.balancer().table(&recipe.candidates, size);
        if let Some(old) = old.filter(|_| !balance.is_consistent()) {
            keep_places(&mut entries, &old.entries);
        }
        Self { entries: entries.into(), made_of: Some(Arc::new(recipe)) }
    }

    /// Backend indexes.
    #[must_use]
    pub fn entries(&self) -> &[u32] {
        &self.entries
    }
}

/// Puts the entries of a table where another one has them already, as far as there are as many: who has not
/// to go elsewhere does not.
fn keep_places(entries: &mut [u32], old: &[u32]) {
    if entries.len() != old.len() {
        return;
    }
    let mut left: HashMap<u32, usize> = HashMap::new();
    for index in &*entries {
        *left.entry(*index).or_default() += 1;
    }
    let mut take = |index: &u32| match left.get_mut(index).filter(|left| **left > 0) {
        Some(left) => {
            *left -= 1;
            true
        }
        None => false,
    };
    let stays: Vec<bool> = old.iter().map(&mut take).collect();
    let rest: Vec<u32> = entries.iter().copied().filter(|index| take(index)).collect();
    let mut rest = rest.into_iter();
    for ((entry, old), stays) in entries.iter_mut().zip(old).zip(stays) {
        *entry = if stays { *old } else { rest.next().unwrap_or(*entry) };
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
    fn places_are_left_only_where_they_must() {
        let many = |ids: &[u32], weight: u32| -> Vec<Candidate> {
            let one = |id: &u32| Candidate { index: *id, id: *id, weight, load: 0, response: 0 };
            ids.iter().map(one).collect()
        };
        for (name, balance) in Balance::NAMES.into_iter().filter(|(_, balance)| !balance.is_consistent()) {
            let first = Table::make(balance, 1009, many(&[1, 2, 3, 4], 1), None);
            let less = Table::make(balance, 1009, many(&[1, 2, 4], 1), Some(&first));
            let more = Table::make(balance, 1009, many(&[1, 2, 4, 5, 6], 1), Some(&less));
            for (old, new) in [(&first, &less), (&less, &more)] {
                let count = |table: &Table, id| table.entries().iter().filter(|one| **one == id).count();
                let must: usize = (1..=6).map(|id| count(new, id).saturating_sub(count(old, id))).sum();
                let moved = old.entries().iter().zip(new.entries()).filter(|(old, new)| old != new).count();
                assert_eq!(moved, must, "{name}");
            }
            assert!(more.entries().iter().all(|id| [1, 2, 4, 5, 6].contains(id)), "{name}");
            let shares: Vec<usize> =
                [1, 2, 4, 5, 6].map(|id| more.entries().iter().filter(|one| **one == id).count()).into();
            assert!(shares.iter().all(|share| (201..=202).contains(share)), "{name}: {shares:?}");
        }
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
