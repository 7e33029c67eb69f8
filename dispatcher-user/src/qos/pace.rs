//! Hellos that wait for one backend: released in fair order, so many a second and while it has few enough
//! connections. There is no clock here: whoever calls says what time it is, in time that only goes forward.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use dispatcher_common::flow::FlowKey;

use super::{
    Class, ClassStatus, Limits,
    book::{Book, Loss},
    fair::{Queue, Ticket},
};

/// A hello that has waited for so long is refused: its place in the data path will soon be another's.
pub(super) const PATIENCE: Duration = Duration::from_millis(2500);
/// What was not used of the rate is kept for so long.
const BURST: Duration = Duration::from_millis(100);

/// A hello that the data path holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Held {
    /// Index of its frontend.
    pub(crate) frontend: u32,
    /// Where it is kept.
    pub(crate) slot: u32,
    /// Its flow.
    pub(crate) flow: FlowKey,
    /// It is not let in: there was no room, or it has waited for too long.
    pub(crate) refused: bool,
}

/// What waits for one backend.
pub(super) struct Pacer {
    limits: Limits,
    queue: Queue<(Duration, Held)>,
    book: Book,
    flows: HashMap<FlowKey, Ticket>,
    /// When each has waited for too long, the oldest first; some are not there any more.
    ends: VecDeque<(Duration, FlowKey, Ticket)>,
    /// Those that are not let in, and were not told so yet.
    refused: Vec<Held>,
    /// When the next one is due by the rate alone.
    due: Duration,
    /// Connections when they were counted, and those released since then.
    load: u64,
    released: u64,
}

impl Pacer {
    pub(super) fn new(classes: &[Class], limits: Limits) -> Self {
        let mut book = Book::default();
        book.set(classes);
        Self {
            limits,
            queue: Queue::new(classes),
            book,
            flows: HashMap::new(),
            ends: VecDeque::new(),
            refused: Vec::new(),
            due: Duration::ZERO,
            load: 0,
            released: 0,
        }
    }

    pub(super) fn set(&mut self, classes: &[Class], limits: Limits) {
        self.limits = limits;
        self.queue.set(classes);
        self.book.set(classes);
    }

    pub(super) const fn limits(&self) -> Limits {
        self.limits
    }

    /// How many wait for an answer.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len() + self.refused.len()
    }

    /// Takes note of the connections that the backend has.
    pub(super) fn count(&mut self, load: u64) {
        (self.load, self.released) = (load, 0);
    }

    /// Lets a hello wait. One that waits already stays in its place.
    pub(super) fn hold(&mut self, now: Duration, class: u16, client: IpAddr, held: Held) {
        self.end(now);
        if let Some(ticket) = self.flows.get(&held.flow)
            && let Some((_, known)) = self.queue.item(*ticket)
        {
            *known = held;
            return;
        }
        let class = self.queue.class(class);
        if self.queue.len() >= self.limits.queue as usize {
            let Some((loser, (_, lost))) = self.queue.shed(class, client) else {
                return self.refuse(class, held, Loss::Shed);
            };
            self.refuse(loser, lost, Loss::Shed);
        }
        let ticket = self.queue.push(class, client, (now, held));
        self.flows.insert(held.flow, ticket);
        self.ends.push_back((now + PATIENCE, held.flow, ticket));
    }

    /// Refuses what has waited for too long.
    fn end(&mut self, now: Duration) {
        while let Some((_, _, ticket)) = self.ends.pop_front_if(|(end, ..)| *end <= now) {
            if let Some((class, (_, held))) = self.queue.cancel(ticket) {
                self.refuse(class, held, Loss::Late);
            }
        }
    }

    /// Takes note of a hello that is not let in and waits no more.
    fn refuse(&mut self, class: u16, held: Held, loss: Loss) {
        self.flows.remove(&held.flow);
        self.book.lose(class, loss);
        self.refused.push(Held { refused: true, ..held });
    }

    fn has_room(&self) -> bool {
        self.limits.max_connections == 0 || self.load + self.released < u64::from(self.limits.max_connections)
    }

    /// The next that may go now, after those that are refused.
    pub(super) fn release(&mut self, now: Duration) -> Option<Held> {
        self.end(now);
        if let Some(held) = self.refused.pop() {
            return Some(held);
        }
        let rate = self.limits.connections_per_second;
        if !self.has_room() || rate != 0 && self.due > now + BURST {
            return None;
        }
        let (class, (since, held)) = self.queue.pop(|_| true)?;
        self.flows.remove(&held.flow);
        if rate != 0 {
            self.due = self.due.max(now) + Duration::from_secs(1) / rate;
        }
        self.released += 1;
        self.book.admit(class, Some(now.saturating_sub(since)), now);
        self.book.end(class);
        Some(held)
    }

    /// When to look again; none where nothing waits, or only for connections to end.
    pub(super) fn next(&self) -> Option<Duration> {
        let paced = self.queue.len() > 0 && self.has_room();
        paced.then(|| self.due.saturating_sub(BURST))
    }

    pub(super) fn read(&mut self, now: Duration) -> (u32, Vec<ClassStatus>) {
        let Self { queue, book, .. } = self;
        (queue.len() as u32, book.read(now, |class| queue.waiting(class)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn class(id: u16, weight: u32) -> Class {
        Class { id, name: format!("c{id}"), weight, ..Class::default() }
    }

    fn limits(rate: u32, most: u32) -> Limits {
        Limits { connections_per_second: rate, max_connections: most, ..Limits::default() }
    }

    fn held(number: u32) -> Held {
        Held { slot: number, flow: FlowKey { ports: number, ..FlowKey::default() }, ..Held::default() }
    }

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Those that are released at a time, and those that are refused.
    fn both(pacer: &mut Pacer, now: Duration) -> [Vec<u32>; 2] {
        let all: Vec<Held> = std::iter::from_fn(|| pacer.release(now)).collect();
        [false, true]
            .map(|refused| all.iter().filter(|held| held.refused == refused).map(|held| held.slot).collect())
    }

    fn all(pacer: &mut Pacer, now: Duration) -> Vec<u32> {
        let [released, _] = both(pacer, now);
        released
    }

    #[test]
    fn the_rate_is_kept_and_shared_by_weight() {
        let classes = [class(0, 1), class(1, 4)];
        let mut pacer = Pacer::new(&classes, limits(1000, 0));
        let mut counts = BTreeMap::<u32, u64>::new();
        let mut number = 0;
        for ms in 0..10_000 {
            // Twice as many as there may be, the same of both classes.
            for id in 0..2 {
                pacer.hold(at(ms), id, CLIENT, Held { slot: id.into(), ..held(number) });
                number += 1;
            }
            for slot in all(&mut pacer, at(ms)) {
                *counts.entry(slot).or_insert(0) += 1;
            }
        }
        let sum: u64 = counts.values().sum();
        assert!((10_000..=10_101).contains(&sum), "{counts:?}");
        assert!(counts[&1].abs_diff(sum * 4 / 5) <= sum / 100, "{counts:?}");
        assert!(pacer.waiting() <= 1000);
        assert_eq!(pacer.flows.len(), pacer.waiting());
    }

    #[test]
    fn a_pause_gives_a_small_burst_only() {
        let mut pacer = Pacer::new(&[class(0, 1)], limits(50, 0));
        for number in 0..100 {
            pacer.hold(at(10_000), 0, CLIENT, held(number));
        }
        assert_eq!(all(&mut pacer, at(10_000)).len(), 6, "5 in 100 ms, and the one that is due");
        assert_eq!(pacer.next(), Some(at(10_020)));
        assert_eq!(all(&mut pacer, at(10_019)).len(), 0);
        assert_eq!(all(&mut pacer, at(10_020)).len(), 1);
        assert_eq!(all(&mut pacer, at(9_000)).len(), 0, "an earlier time gives nothing");
        // A slow rate is no matter of the burst.
        let mut pacer = Pacer::new(&[class(0, 1)], limits(1, 0));
        for number in 0..4 {
            pacer.hold(at(0), 0, CLIENT, held(number));
        }
        let released: Vec<usize> = (0..5).map(|turn| all(&mut pacer, at(turn * 500)).len()).collect();
        assert_eq!(released, [1, 0, 1, 0, 1]);
    }

    #[test]
    fn connections_that_are_there_count() {
        let mut pacer = Pacer::new(&[class(0, 1)], limits(0, 3));
        pacer.count(2);
        for number in 0..4 {
            pacer.hold(at(0), 0, CLIENT, held(number));
        }
        assert_eq!(all(&mut pacer, at(0)), [0]);
        assert_eq!(pacer.next(), None, "it waits for connections to end");
        pacer.count(1);
        assert_eq!(all(&mut pacer, at(1)), [1, 2]);
        pacer.count(5);
        assert!(all(&mut pacer, at(2)).is_empty());
        pacer.set(&[class(0, 1)], limits(0, 0));
        assert_eq!(all(&mut pacer, at(3)), [3]);
    }

    #[test]
    fn what_waits_for_too_long_is_refused() {
        let mut pacer = Pacer::new(&[class(0, 1)], limits(0, 1));
        pacer.count(1);
        pacer.hold(at(0), 0, CLIENT, held(1));
        pacer.hold(at(100), 0, CLIENT, Held { slot: 7, ..held(1) });
        pacer.hold(at(100), 0, CLIENT, held(2));
        assert_eq!(pacer.waiting(), 2, "one flow waits once");
        pacer.count(0);
        assert_eq!(pacer.release(at(200)), Some(Held { slot: 7, ..held(1) }), "where it is kept by now");
        pacer.count(1);
        assert!(all(&mut pacer, at(2599)).is_empty());
        assert_eq!(pacer.waiting(), 1);
        assert_eq!(both(&mut pacer, at(2600)), [vec![], vec![2]]);
        assert_eq!(pacer.release(at(2600)), None, "it is told once");
        let (queued, classes) = pacer.read(at(2600));
        assert_eq!((queued, classes[0].late, classes[0].admitted, classes[0].in_flight), (0, 1, 1, 0));
        assert!(pacer.flows.is_empty() && pacer.ends.is_empty());
    }

    #[test]
    fn no_more_wait_than_there_is_room_for() {
        let classes = [class(0, 1), class(1, 1)];
        let mut pacer = Pacer::new(&classes, Limits { queue: 3, ..limits(0, 1) });
        pacer.count(1);
        for number in 0..4 {
            pacer.hold(at(0), 0, CLIENT, held(number));
        }
        pacer.hold(at(0), 1, CLIENT, held(4));
        let (queued, read) = pacer.read(at(0));
        assert_eq!((queued, read[0].shed, read[1].shed, read[1].queued), (3, 2, 0, 1));
        assert_eq!((pacer.flows.len(), pacer.waiting()), (3, 5));
        let [released, mut refused] = both(&mut pacer, at(0));
        refused.sort_unstable();
        assert_eq!((released, refused), (vec![], vec![2, 3]), "who came, and the newest of those who wait");
        // Who comes again waits as anybody.
        pacer.set(&classes, Limits { queue: 4, ..limits(0, 1) });
        pacer.hold(at(1), 0, CLIENT, held(3));
        assert_eq!((both(&mut pacer, at(1)), pacer.waiting()), ([vec![], vec![]], 4));
    }
}
