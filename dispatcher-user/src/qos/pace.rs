//! Hellos that wait for one backend: released in fair order, so many a second and while it has few enough
//! connections. There is no clock here: whoever calls says what time it is, in time that only goes forward.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::IpAddr,
    time::Duration,
};

use dispatcher_common::flow::FlowKey;

use super::{
    Class, ClassStatus, Limits,
    book::{Book, Loss},
    fair::{Queue, Ticket},
    most::Most,
    rates::Rates,
};

/// A hello that has waited for so long is refused: its place in the data path will soon be another's.
pub(super) const PATIENCE: Duration = Duration::from_millis(2500);

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
    room: Room,
}

/// What the backend has room for.
#[derive(Default)]
struct Room {
    rates: Rates,
    most: Most,
    /// Connections at a time; 0: no limit.
    whole: u32,
    /// Connections of each class: those that were counted, and those released since then.
    load: BTreeMap<u16, u32>,
}

impl Room {
    /// From when on one of a class may go, as many connections as there are; none where others must end before.
    fn ready(&self, class: u16) -> Option<Duration> {
        let Self { rates, most, whole, load } = self;
        let of = |class| load.get(&class).copied().unwrap_or(0);
        let room = *whole == 0 || most.allows(class, load.values().sum(), *whole, of);
        room.then(|| rates.ready(class)).flatten()
    }

    fn take(&mut self, class: u16, now: Duration) {
        self.rates.take(class, now);
        *self.load.entry(class).or_insert(0) += 1;
    }
}

impl Pacer {
    pub(super) fn new(classes: &[Class], limits: Limits) -> Self {
        let mut pacer = Self {
            limits,
            queue: Queue::new(classes),
            book: Book::default(),
            flows: HashMap::new(),
            ends: VecDeque::new(),
            refused: Vec::new(),
            room: Room::default(),
        };
        pacer.set(classes, limits);
        pacer
    }

    pub(super) fn set(&mut self, classes: &[Class], limits: Limits) {
        self.limits = limits;
        self.queue.set(classes);
        self.book.set(classes);
        self.room.most.set(classes);
        self.room.rates.set(classes, limits.connections_per_second);
        self.room.whole = limits.max_connections;
    }

    pub(super) const fn limits(&self) -> Limits {
        self.limits
    }

    /// How many wait for an answer.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len() + self.refused.len()
    }

    /// Takes note of the connections that the backend has, by class.
    pub(super) fn count(&mut self, load: &BTreeMap<u16, u32>) {
        self.room.load.clear();
        for (class, count) in load {
            // As one of the default class counts what is of none that there is.
            *self.room.load.entry(self.queue.class(*class)).or_insert(0) += count;
        }
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

    /// The next that may go now, after those that are refused. Those whose client does not wait any more take nobody's turn.
    pub(super) fn release(&mut self, now: Duration, waits: impl Fn(&Held) -> bool) -> Option<Held> {
        self.end(now);
        if let Some(held) = self.refused.pop() {
            return Some(held);
        }
        let Self { queue, room, .. } = self;
        let may = |class| room.ready(class).is_some_and(|ready| ready <= now);
        while let Some((ticket, (_, held))) = queue.first(may)
            && !waits(held)
        {
            let Some((class, (_, held))) = queue.cancel(ticket) else { break };
            self.flows.remove(&held.flow);
            self.book.lose(class, Loss::Cancelled);
        }
        let (class, (since, held)) = queue.pop(may)?;
        room.take(class, now);
        self.flows.remove(&held.flow);
        self.book.admit(class, Some(now.saturating_sub(since)), now);
        self.book.end(class);
        Some(held)
    }

    /// True when something waits for connections to end.
    pub(super) fn waits_for_ends(&self) -> bool {
        self.queue.classes().any(|class| self.room.ready(class).is_none())
    }

    /// When to look again; none where nothing waits, or only for connections to end.
    pub(super) fn next(&self) -> Option<Duration> {
        self.queue.classes().filter_map(|class| self.room.ready(class)).min()
    }

    pub(super) fn read(&mut self, now: Duration) -> (u32, Vec<ClassStatus>) {
        let Self { queue, book, room, .. } = self;
        let mut classes = book.read(now, |class| queue.waiting(class));
        for one in classes.iter_mut().filter(|_| room.whole > 0) {
            one.in_flight = room.load.get(&one.id).copied().unwrap_or(0);
        }
        (queue.len() as u32, classes)
    }
}

#[cfg(test)]
mod tests {
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
        let all: Vec<Held> = std::iter::from_fn(|| pacer.release(now, |_| true)).collect();
        [false, true]
            .map(|refused| all.iter().filter(|held| held.refused == refused).map(|held| held.slot).collect())
    }

    fn all(pacer: &mut Pacer, now: Duration) -> Vec<u32> {
        let [released, _] = both(pacer, now);
        released
    }

    /// How many of each of two classes are let in within ten seconds, if both ask a thousand times a second.
    fn in_ten_seconds(pacer: &mut Pacer) -> [u64; 2] {
        let mut counts = [0; 2];
        for ms in 0..10_000 {
            for id in 0..2 {
                let number = 2 * ms + id;
                pacer.hold(at(ms.into()), id as u16, CLIENT, Held { slot: id, ..held(number) });
            }
            for slot in all(pacer, at(ms.into())) {
                counts[slot as usize] += 1;
            }
            assert!(pacer.next().is_none_or(|next| next > at(ms.into())), "somebody could go");
        }
        counts
    }

    #[test]
    fn the_rate_is_kept_and_shared_by_weight() {
        let mut pacer = Pacer::new(&[class(0, 1), class(1, 4)], limits(1000, 0));
        let counts = in_ten_seconds(&mut pacer);
        let sum: u64 = counts.iter().sum();
        assert!((10_000..=10_101).contains(&sum), "{counts:?}");
        assert!(counts[1].abs_diff(sum * 4 / 5) <= sum / 100, "{counts:?}");
        assert!(pacer.waiting() <= 1000);
        assert_eq!(pacer.flows.len(), pacer.waiting());
    }

    #[test]
    fn classes_keep_to_what_they_may_have() {
        let classes = [Class { ceil: 20, ..class(0, 9) }, Class { lend: false, ..class(1, 1) }];
        let counts = in_ten_seconds(&mut Pacer::new(&classes, limits(1000, 0)));
        assert!(counts[0].abs_diff(2000) <= 21 && counts[1].abs_diff(8000) <= 82, "{counts:?}");
        // Of eight connections at a time one has six; of those that count nobody's are the default class's.
        let classes = [class(0, 1), Class { lend: false, ..class(1, 3) }];
        let mut pacer = Pacer::new(&classes, limits(0, 8));
        for number in 0..8 {
            pacer.hold(at(0), 0, CLIENT, held(number));
        }
        assert_eq!(all(&mut pacer, at(0)), [0, 1]);
        assert_eq!(pacer.next(), None);
        pacer.count(&BTreeMap::from([(0, 1), (9, 1), (1, 5)]));
        assert!(all(&mut pacer, at(1)).is_empty());
        pacer.count(&BTreeMap::from([(0, 1), (1, 5)]));
        assert_eq!(all(&mut pacer, at(1)), [2]);
        pacer.set(&[class(0, 1), class(1, 3)], limits(0, 8));
        assert_eq!(all(&mut pacer, at(1)), [3]);
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
        pacer.count(&BTreeMap::from([(0, 2)]));
        for number in 0..4 {
            pacer.hold(at(0), 0, CLIENT, held(number));
        }
        assert_eq!(all(&mut pacer, at(0)), [0]);
        assert_eq!(pacer.next(), None, "it waits for connections to end");
        pacer.count(&BTreeMap::from([(0, 1)]));
        assert_eq!(all(&mut pacer, at(1)), [1, 2]);
        pacer.count(&BTreeMap::from([(0, 5)]));
        assert!(all(&mut pacer, at(2)).is_empty());
        pacer.set(&[class(0, 1)], limits(0, 0));
        assert_eq!(all(&mut pacer, at(3)), [3]);
    }

    #[test]
    fn who_left_takes_nobodys_turn() {
        let classes = [class(0, 1), class(1, 1)];
        let mut pacer = Pacer::new(&classes, limits(10, 1));
        for number in 0..8 {
            pacer.hold(at(0), 0, CLIENT, held(number));
        }
        pacer.hold(at(0), 1, CLIENT, held(8));
        pacer.hold(at(0), 0, CLIENT, held(9));
        let mut released = |now: u64| -> Vec<u32> {
            pacer.count(&BTreeMap::new());
            let one = || pacer.release(at(now), |held| held.slot > 7).map(|held| held.slot);
            std::iter::from_fn(one).collect()
        };
        assert_eq!(released(0), [9], "there is one place, and one turn of each");
        assert_eq!(released(100), [8]);
        let (queued, read) = pacer.read(at(100));
        assert_eq!((queued, read[0].cancelled, read[0].admitted, read[1].admitted), (0, 8, 1, 1));
        assert!(pacer.flows.is_empty());
    }

    #[test]
    fn what_waits_for_too_long_is_refused() {
        let mut pacer = Pacer::new(&[class(0, 1)], limits(0, 1));
        pacer.count(&BTreeMap::from([(0, 1)]));
        assert_eq!(pacer.read(at(0)).1[0].in_flight, 1, "connections that are there");
        pacer.hold(at(0), 0, CLIENT, held(1));
        pacer.hold(at(100), 0, CLIENT, Held { slot: 7, ..held(1) });
        pacer.hold(at(100), 0, CLIENT, held(2));
        assert_eq!(pacer.waiting(), 2, "one flow waits once");
        pacer.count(&BTreeMap::new());
        assert_eq!(
            pacer.release(at(200), |_| true),
            Some(Held { slot: 7, ..held(1) }),
            "where it is kept by now"
        );
        pacer.count(&BTreeMap::from([(0, 1)]));
        assert!(all(&mut pacer, at(2599)).is_empty());
        assert_eq!(pacer.waiting(), 1);
        assert_eq!(both(&mut pacer, at(2600)), [vec![], vec![2]]);
        assert_eq!(pacer.release(at(2600), |_| true), None, "it is told once");
        let (queued, classes) = pacer.read(at(2600));
        assert_eq!((queued, classes[0].late, classes[0].admitted, classes[0].in_flight), (0, 1, 1, 1));
        assert!(pacer.flows.is_empty() && pacer.ends.is_empty());
    }

    #[test]
    fn no_more_wait_than_there_is_room_for() {
        let classes = [class(0, 1), class(1, 1)];
        let mut pacer = Pacer::new(&classes, Limits { queue: 3, ..limits(0, 1) });
        pacer.count(&BTreeMap::from([(0, 1)]));
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
