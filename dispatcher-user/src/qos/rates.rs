//! So many a second, and how many of them each class may have beside its weight: no more than its `ceil`, no more than
//! `borrow_limit` beyond its share, and nothing of what classes with `lend = false` do not use of theirs.
//!
//! What classes lend is one rate, from which all take; a class that does not lend has its share as a rate of its own, from
//! which it takes first. Whoever is bounded has a second rate that he must keep to.

use std::{collections::BTreeMap, time::Duration};

use super::{Class, weight};

/// What was not used is kept for so long.
const BURST: Duration = Duration::from_millis(100);

/// The rates at one backend. There is no clock here, as in [`super::pace`].
#[derive(Debug, Default)]
pub(super) struct Rates {
    limited: bool,
    /// What classes lend; none where none does.
    shared: Option<Rate>,
    /// By class id.
    own: BTreeMap<u16, Own>,
}

/// The rates of one class.
#[derive(Debug, Default)]
struct Own {
    kept: Option<Rate>,
    most: Option<Rate>,
}

/// One in so much time (the generic cell rate algorithm, ITU-T I.371).
#[derive(Clone, Copy, Debug)]
struct Rate {
    every: Duration,
    /// When the next one is due.
    due: Duration,
}

impl Rate {
    /// So many parts of a whole that is so many a second. What was taken of the one before counts on.
    fn new(rate: u32, parts: u64, whole: u64, before: Option<Self>) -> Self {
        let every = (1_000_000_000 * u128::from(whole)).div_ceil(u128::from(rate) * u128::from(parts));
        let every = Duration::from_nanos(u64::try_from(every).unwrap_or(u64::MAX));
        Self { every, due: before.map_or(Duration::ZERO, |before| before.due) }
    }

    /// From when on there is one.
    fn ready(&self) -> Duration {
        self.due.saturating_sub(BURST)
    }

    fn take(&mut self, now: Duration) {
        self.due = self.due.max(now).saturating_add(self.every);
    }
}

impl Rates {
    /// So many a second are shared by these classes; 0: no limit.
    pub(super) fn set(&mut self, classes: &[Class], rate: u32) {
        let before = std::mem::take(self);
        if rate == 0 {
            return;
        }
        self.limited = true;
        let weights: u64 = classes.iter().map(weight).sum();
        let lent: u64 = classes.iter().filter(|one| one.lend).map(weight).sum();
        self.shared = (lent > 0).then(|| Rate::new(rate, lent, weights, before.shared));
        for class in classes {
            let before = before.own.get(&class.id);
            let share = 100 * weight(class);
            let most = (share + u64::from(class.borrow_limit) * weights).min(u64::from(class.ceil) * weights);
            let bounded = most < 100 * weights;
            let own = Own {
                kept: (!class.lend)
                    .then(|| Rate::new(rate, weight(class), weights, before.and_then(|own| own.kept))),
                most: bounded.then(|| Rate::new(rate, most, 100 * weights, before.and_then(|own| own.most))),
            };
            self.own.insert(class.id, own);
        }
    }

    /// From when on a class may have one more; none where it never may.
    pub(super) fn ready(&self, class: u16) -> Option<Duration> {
        if !self.limited {
            return Some(Duration::ZERO);
        }
        let (kept, most) = self.own.get(&class).map_or((None, None), |own| (own.kept, own.most));
        let first = [kept, self.shared].iter().flatten().map(Rate::ready).min()?;
        Some(most.map_or(first, |most| first.max(most.ready())))
    }

    /// Counts one of a class.
    pub(super) fn take(&mut self, class: u16, now: Duration) {
        if !self.limited {
            return;
        }
        let own = self.own.entry(class).or_default();
        let from = own.kept.as_mut().filter(|kept| kept.ready() <= now).or(self.shared.as_mut());
        from.into_iter().chain(&mut own.most).for_each(|rate| rate.take(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(id: u16, weight: u32) -> Class {
        Class { id, weight, ..Class::default() }
    }

    /// How many each class gets in ten seconds of `rate`, where these ask for all they can get, in this order.
    fn given(classes: &[Class], rate: u32, order: &[u16]) -> Vec<u32> {
        let mut rates = Rates::default();
        rates.set(classes, rate);
        let mut given = vec![0; classes.len()];
        for ms in 0..10_000 {
            let now = Duration::from_millis(ms);
            for id in order {
                while rates.ready(*id).is_some_and(|ready| ready <= now) {
                    rates.take(*id, now);
                    given[usize::from(*id)] += 1;
                }
            }
        }
        given
    }

    /// Beside the rate a tenth of a second of it is there at once, and the one that is due.
    #[track_caller]
    fn assert_given(classes: &[Class], order: &[u16], due: &[u32]) {
        let given = given(classes, 1000, order);
        let near = given.iter().zip(due).all(|(given, due)| (*due..=due + due / 100 + 2).contains(given));
        assert!(near, "{given:?}, not {due:?}");
    }

    #[test]
    fn without_bounds_one_class_may_have_all() {
        assert_given(&[class(0, 1), class(1, 9)], &[0, 1], &[10_000, 0]);
        let mut none = Rates::default();
        none.set(&[class(0, 1)], 0);
        none.take(0, Duration::ZERO);
        assert_eq!(none.ready(0), Some(Duration::ZERO));
    }

    #[test]
    fn a_ceiling_holds() {
        let light = Class { ceil: 20, ..class(0, 1) };
        assert_given(&[light.clone(), class(1, 1)], &[0, 1], &[2000, 8000]);
        assert_given(&[light, class(1, 1)], &[0], &[2000, 0]);
    }

    #[test]
    fn nobody_borrows_more_than_he_may() {
        // A quarter is its share.
        let light = Class { borrow_limit: 10, ..class(0, 1) };
        assert_given(&[light, class(1, 3)], &[0, 1], &[3500, 6500]);
        let none = Class { borrow_limit: 0, ..class(0, 1) };
        assert_given(&[none, class(1, 3)], &[0], &[2500, 0]);
    }

    #[test]
    fn what_is_not_lent_is_kept() {
        let keeps = |id, weight| Class { lend: false, ..class(id, weight) };
        assert_given(&[class(0, 1), keeps(1, 3)], &[0], &[2500, 0]);
        assert_given(&[class(0, 1), keeps(1, 3)], &[0, 1], &[2500, 7500]);
        // It takes what others lend.
        assert_given(&[class(0, 1), keeps(1, 3)], &[1], &[0, 10_000]);
        assert_given(&[class(0, 1), keeps(1, 1), keeps(2, 2)], &[0, 1, 2], &[2500, 2500, 5000]);
        assert_given(&[class(0, 1), keeps(1, 1), keeps(2, 2)], &[2, 0, 1], &[0, 2500, 7500]);
        // Where nobody lends each has his own.
        assert_given(&[keeps(0, 1), keeps(1, 3)], &[0], &[2500, 0]);
        assert_given(&[keeps(0, 1), keeps(1, 3)], &[1, 0], &[2500, 7500]);
    }

    #[test]
    fn new_settings_give_nothing_beside() {
        let classes = [class(0, 1), Class { lend: false, ceil: 60, ..class(1, 1) }];
        let mut rates = Rates::default();
        let mut given = [0; 2];
        for ms in 0..1000 {
            rates.set(&classes, 1000);
            let now = Duration::from_millis(ms);
            for id in [0, 1] {
                while rates.ready(id).is_some_and(|ready| ready <= now) {
                    rates.take(id, now);
                    given[usize::from(id)] += 1;
                }
            }
        }
        assert_eq!(given.map(|given| (550..=552).contains(&given)), [true; 2], "{given:?}");
    }

    #[test]
    fn rates_of_any_size() {
        let classes = [class(0, 1), Class { lend: false, borrow_limit: 0, ceil: 1, ..class(1, 10_000) }];
        for rate in [1, 7, 1_000_000, u32::MAX] {
            let mut rates = Rates::default();
            rates.set(&classes, rate);
            for id in [0, 1] {
                assert_eq!(rates.ready(id), Some(Duration::ZERO), "the first goes at once");
                rates.take(id, Duration::ZERO);
                rates.take(id, Duration::MAX);
                assert!(rates.ready(id) > Some(Duration::from_secs(1)), "{rate}");
            }
        }
    }
}
