//! What is counted of the classes at one backend.

use std::{collections::BTreeMap, time::Duration};

use dispatcher_common::service::Histogram;

use super::{Class, ClassStatus, weight};

/// Seconds over which shares are counted.
const SECONDS: usize = 4;
/// Items of its share that a class may save: so much is rounding, and what is not used beyond is left to others.
const SLACK: u64 = 4;

/// The classes' counters.
#[derive(Debug, Default)]
pub(super) struct Book {
    classes: Vec<Class>,
    weights: u64,
    /// By class id; those of classes that are gone stay, for when they come back.
    counts: BTreeMap<u16, Counts>,
    /// Of all classes.
    recent: Recent,
}

/// The counters of one class.
#[derive(Debug, Default)]
struct Counts {
    admitted: u64,
    waited: u64,
    borrowed: u64,
    /// What it has of its share: each item that is admitted gives each class its weight, and costs its own the sum of
    /// all weights. Without so much it is borrowed.
    credit: u64,
    shed: u64,
    late: u64,
    cancelled: u64,
    in_flight: u32,
    /// Of those that were admitted and had waited.
    waits: Histogram,
    recent: Recent,
}

/// What was counted in the last seconds.
#[derive(Debug, Default)]
struct Recent {
    second: u64,
    counts: [u64; SECONDS],
}

impl Recent {
    /// Forgets what is too long ago.
    fn turn(&mut self, second: u64) {
        for passed in 1..=second.saturating_sub(self.second).min(SECONDS as u64) {
            self.counts[((self.second + passed) % SECONDS as u64) as usize] = 0;
        }
        self.second = self.second.max(second);
    }

    fn add(&mut self, second: u64) {
        self.turn(second);
        self.counts[(self.second % SECONDS as u64) as usize] += 1;
    }

    fn sum(&mut self, second: u64) -> u64 {
        self.turn(second);
        self.counts.iter().sum()
    }
}

/// What becomes of one that is not admitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Loss {
    /// There was no room.
    Shed,
    /// It waited for too long.
    Late,
    /// Its client went.
    Cancelled,
}

impl Book {
    pub(super) fn set(&mut self, classes: &[Class]) {
        self.classes = classes.to_vec();
        self.weights = classes.iter().map(weight).sum();
        for class in classes {
            self.counts.entry(class.id).or_default().credit = SLACK * self.weights;
        }
    }

    /// Counts one that is served; how long it has waited, if it did.
    pub(super) fn admit(&mut self, class: u16, waited: Option<Duration>, now: Duration) {
        let second = now.as_secs();
        self.recent.add(second);
        for one in &self.classes {
            let counts = self.counts.entry(one.id).or_default();
            counts.credit = (counts.credit + weight(one)).min(SLACK * self.weights);
        }
        let counts = self.counts.entry(class).or_default();
        counts.recent.add(second);
        match counts.credit.checked_sub(self.weights) {
            Some(left) => counts.credit = left,
            None => counts.borrowed += 1,
        }
        counts.admitted += 1;
        counts.in_flight += 1;
        let Some(waited) = waited else { return };
        let ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        counts.waited += 1;
        counts.waits.buckets[Histogram::bucket(ns)] += 1;
        counts.waits.sum = counts.waits.sum.saturating_add(ns);
    }

    /// One that was admitted has ended.
    pub(super) fn end(&mut self, class: u16) {
        if let Some(counts) = self.counts.get_mut(&class) {
            counts.in_flight = counts.in_flight.saturating_sub(1);
        }
    }

    /// Requests of a class under way.
    pub(super) fn in_flight(&self, class: u16) -> u32 {
        self.counts.get(&class).map_or(0, |counts| counts.in_flight)
    }

    pub(super) fn lose(&mut self, class: u16, loss: Loss) {
        let counts = self.counts.entry(class).or_default();
        match loss {
            Loss::Shed => counts.shed += 1,
            Loss::Late => counts.late += 1,
            Loss::Cancelled => counts.cancelled += 1,
        }
    }

    /// The classes there are, with what waits of each.
    pub(super) fn read(&mut self, now: Duration, waiting: impl Fn(u16) -> usize) -> Vec<ClassStatus> {
        let all = self.recent.sum(now.as_secs());
        let part = |some: u64, all: u64| if all == 0 { 0.0 } else { some as f64 / all as f64 };
        let status = |class: &Class| {
            let counts = self.counts.entry(class.id).or_default();
            ClassStatus {
                id: class.id,
                name: class.name.clone(),
                weight: class.weight.max(1),
                priority: class.priority,
                admitted: counts.admitted,
                waited: counts.waited,
                borrowed: counts.borrowed,
                shed: counts.shed,
                late: counts.late,
                cancelled: counts.cancelled,
                in_flight: counts.in_flight,
                queued: waiting(class.id) as u32,
                share: part(counts.recent.sum(now.as_secs()), all),
                due: part(class.weight.max(1).into(), self.weights),
                waits: counts.waits,
            }
        };
        self.classes.iter().map(status).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(id: u16, weight: u32) -> Class {
        Class { id, name: format!("c{id}"), weight, ..Class::default() }
    }

    #[test]
    fn shares_are_those_of_the_last_seconds() {
        let mut book = Book::default();
        book.set(&[class(0, 1), class(1, 3)]);
        let at = Duration::from_millis;
        for turn in 0..100 {
            book.admit(0, None, at(turn * 10));
        }
        let now = book.read(at(1000), |_| 0);
        assert_eq!((now[0].share, now[1].share, now[0].due, now[1].due), (1.0, 0.0, 0.25, 0.75));
        // Four in a second by the weights, until nothing else is remembered.
        for turn in 0..8 {
            for id in [1, 0, 1, 1] {
                book.admit(id, Some(at(3)), at(1000 + turn * 1000));
            }
        }
        let now = book.read(at(8500), |id| usize::from(id) * 7);
        assert_eq!((now[0].share, now[1].share, now[1].queued), (0.25, 0.75, 7));
        assert_eq!((now[0].admitted, now[0].waited, now[0].in_flight), (108, 8, 108));
        assert_eq!((now[0].waits.count(), now[0].waits.sum), (8, 24_000_000));
        let later = book.read(at(60_000), |_| 0);
        assert_eq!((later[0].share, later[1].share), (0.0, 0.0), "nothing lately");
        // A second that is before the last one changes nothing.
        book.admit(0, None, at(1));
        assert_eq!(book.read(at(60_000), |_| 0)[0].share, 1.0);
    }

    #[test]
    fn who_has_more_than_its_share_borrows() {
        let mut book = Book::default();
        book.set(&[class(0, 1), class(1, 3)]);
        for _ in 0..100 {
            book.admit(0, None, Duration::ZERO);
        }
        assert!((71..=75).contains(&book.read(Duration::ZERO, |_| 0)[0].borrowed), "a quarter was its own");
        let mut book = Book::default();
        book.set(&[class(0, 1), class(1, 3)]);
        for turn in 0..400 {
            book.admit(u16::from(turn % 4 != 0), None, Duration::ZERO);
        }
        let now = book.read(Duration::ZERO, |_| 0);
        assert_eq!((now[0].borrowed, now[1].borrowed), (0, 0), "by the weights nobody does");
        // Of a class that is silent, both use the share by their weights.
        let mut book = Book::default();
        book.set(&[class(0, 1), class(1, 3), class(2, 1)]);
        for turn in 0..120 {
            book.admit([0, 1, 1, 1][turn % 4], None, Duration::ZERO);
        }
        let now = book.read(Duration::ZERO, |_| 0);
        assert!(now[0].borrowed.abs_diff(6) <= 4 && now[1].borrowed.abs_diff(18) <= 4, "{now:?}");
    }

    #[test]
    fn counters_of_a_class_stay() {
        let mut book = Book::default();
        book.set(&[class(0, 1), class(1, u32::MAX), class(2, u32::MAX)]);
        book.admit(1, None, Duration::ZERO);
        book.lose(1, Loss::Shed);
        book.lose(1, Loss::Late);
        book.lose(1, Loss::Cancelled);
        book.set(&[class(0, 1)]);
        book.end(1);
        book.end(1);
        assert_eq!(book.read(Duration::ZERO, |_| 0).len(), 1);
        book.set(&[class(0, 1), class(1, 2)]);
        let now = &book.read(Duration::ZERO, |_| 0)[1];
        assert_eq!((now.admitted, now.shed, now.late, now.cancelled, now.in_flight), (1, 1, 1, 1, 0));
    }
}
