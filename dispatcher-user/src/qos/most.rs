//! How many requests or connections at a time each class may have, beside its weight: no more than its `ceil`, no more than
//! `borrow_limit` beyond its share, and nothing of what classes with `lend = false` keep free for themselves.
//!
//! Shares are parts of the whole by the weights. What is kept is rounded down, so that all that is kept is never more than
//! there is, and what a class may have is rounded up: at least one.

use super::{Class, weight};

/// The classes' settings.
#[derive(Debug, Default)]
pub(super) struct Most {
    classes: Vec<Class>,
    weights: u64,
    /// Whether there is anything to keep to.
    bounded: bool,
}

impl Most {
    pub(super) fn set(&mut self, classes: &[Class]) {
        self.classes = classes.to_vec();
        self.weights = classes.iter().map(weight).sum();
        self.bounded = classes.iter().any(|one| !one.lend || one.borrow_limit < 100 || one.ceil < 100);
    }

    /// Whether a class may have one more, of at most `whole`; so many are under way in all, and of each class.
    pub(super) fn allows(&self, class: u16, all: u32, whole: u32, of: impl Fn(u16) -> u32) -> bool {
        if all >= whole || !self.bounded {
            return all < whole;
        }
        let (whole, own) = (u64::from(whole), u64::from(of(class)));
        let others = self.classes.iter().filter(|one| one.id != class && !one.lend);
        let keeps = |one: &Class| (whole * weight(one) / self.weights).saturating_sub(of(one.id).into());
        if u64::from(all) + others.map(keeps).sum::<u64>() >= whole {
            return false;
        }
        self.classes.iter().find(|one| one.id == class).is_none_or(|class| {
            let percent = |part: u8| (whole * u64::from(part)).div_ceil(100);
            let share = (whole * weight(class)).div_ceil(self.weights);
            own < percent(class.ceil).min(share + percent(class.borrow_limit)).max(1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(id: u16, weight: u32) -> Class {
        Class { id, weight, ..Class::default() }
    }

    /// How many each class gets, if they ask in this order for as long as they get any.
    fn given(classes: &[Class], whole: u32, order: &[u16]) -> Vec<u32> {
        let mut most = Most::default();
        most.set(classes);
        let mut given = vec![0; classes.len()];
        for id in order {
            while most.allows(*id, given.iter().sum(), whole, |id| given[usize::from(id)]) {
                given[usize::from(*id)] += 1;
            }
        }
        given
    }

    #[test]
    fn without_bounds_one_class_may_have_all() {
        assert_eq!(given(&[class(0, 1), class(1, 1)], 8, &[1, 0]), [0, 8]);
        assert_eq!(given(&[class(0, 3), class(1, 1)], 8, &[0, 1]), [8, 0]);
    }

    #[test]
    fn ceilings_and_loans_are_bounded() {
        let ceil = |ceil| Class { ceil, ..class(1, 1) };
        assert_eq!(given(&[class(0, 1), ceil(50)], 8, &[1, 0]), [4, 4]);
        assert_eq!(given(&[class(0, 1), ceil(1)], 8, &[1, 0]), [7, 1], "it always has one");
        let borrow = |borrow_limit| Class { borrow_limit, ..class(1, 1) };
        assert_eq!(given(&[class(0, 3), borrow(0)], 8, &[1, 0]), [6, 2]);
        assert_eq!(given(&[class(0, 3), borrow(25)], 8, &[1, 0]), [4, 4]);
        assert_eq!(given(&[class(0, 1000), borrow(0)], u32::MAX, &[]), [0, 0]);
    }

    #[test]
    fn what_is_not_lent_stays_free() {
        let keeps = |id, weight| Class { lend: false, ..class(id, weight) };
        assert_eq!(given(&[class(0, 1), keeps(1, 1)], 8, &[0]), [4, 0]);
        assert_eq!(given(&[class(0, 1), keeps(1, 1)], 8, &[0, 1]), [4, 4]);
        assert_eq!(given(&[class(0, 1), keeps(1, 1)], 8, &[1, 0]), [0, 8], "it may borrow all the same");
        // Two that lend do not take it together.
        assert_eq!(given(&[class(0, 1), class(1, 1), keeps(2, 2)], 8, &[0, 1, 2]), [4, 0, 4]);
    }

    #[test]
    fn somebody_always_gets_in() {
        for whole in 1..40 {
            for weights in [[1, 1, 1], [1, 5, 9], [10_000, 1, 1], [3, 3, 7]] {
                let classes: Vec<Class> = (0..3)
                    .zip(weights)
                    .map(|(id, weight)| Class { lend: false, borrow_limit: 0, ..class(id, weight) })
                    .collect();
                for id in 0..3 {
                    assert!(
                        given(&classes, whole, &[id])[usize::from(id)] > 0,
                        "{id} of {weights:?}, {whole}"
                    );
                }
            }
        }
    }
}
