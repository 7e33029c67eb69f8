//! Start-time fair queueing (Goyal, Vin and Cheng, 1996) over classes, and within a class over clients.
//!
//! A flow's next item has a start tag: the virtual time at which the flow came, or the end of its item before,
//! whichever is later. The item with the least start tag is served, and virtual time is that tag. An item is as
//! long as one unit divided by its flow's weight. Tags are those of flows, not of items, so that a new weight
//! counts from the next item on.
//!
//! - Levels of priority stand above the weights: a level is served when nothing waits in a higher one.
//! - Weights are integers and so are tags: nothing drifts. A tag has 64 bits for the part of an item, and 64 for
//!   items.
//! - A client is an IPv4 address or an IPv6 network of 64 bits, because a host has as many addresses as it likes.
//!   Those of one class have equal weights.
//! - There is no clock: what jumps of one do is none of our business.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv6Addr},
};

use super::Class;

/// What one item of a flow of weight 1 takes of virtual time.
const UNIT: u128 = 1 << 64;
/// Clients of a class that are remembered although nothing of theirs waits. Forgetting one gives it at most one
/// item before its turn.
const REMEMBERED: usize = 1024;
/// Priorities.
const LEVELS: usize = 8;

/// Items that wait, and what was served before.
pub(crate) struct Queue<T> {
    /// By id; 0 is always there.
    classes: BTreeMap<u16, Kind<T>>,
    /// Virtual time of each priority.
    now: [u128; LEVELS],
    len: usize,
    /// Number of the next item.
    next: u64,
}

/// Where an item waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ticket {
    class: u16,
    client: IpAddr,
    number: u64,
}

/// A class, as its queue sees it.
struct Kind<T> {
    weight: u32,
    level: usize,
    /// Start tag of its next item.
    start: u128,
    /// Virtual time among its clients.
    now: u128,
    clients: HashMap<IpAddr, Waiting<T>>,
    /// Those of whom something waits, by their start tags and the numbers of their oldest items.
    turns: BTreeSet<(u128, u64, IpAddr)>,
    /// The same by how much waits.
    crowds: BTreeSet<(usize, IpAddr)>,
    len: usize,
}

/// A client, as its class sees it.
struct Waiting<T> {
    start: u128,
    items: BTreeMap<u64, T>,
}

impl<T> Kind<T> {
    fn new(weight: u32, level: usize, start: u128) -> Self {
        Self {
            weight,
            level,
            start,
            now: 0,
            clients: HashMap::new(),
            turns: BTreeSet::new(),
            crowds: BTreeSet::new(),
            len: 0,
        }
    }

    /// Changes what waits of a client, and keeps the orders of clients true.
    fn change<R>(&mut self, client: IpAddr, work: impl FnOnce(&mut Waiting<T>, &mut u128) -> R) -> R {
        let now = self.now;
        let waiting =
            self.clients.entry(client).or_insert_with(|| Waiting { start: now, items: BTreeMap::new() });
        if let Some(first) = waiting.items.keys().next() {
            self.turns.remove(&(waiting.start, *first, client));
            self.crowds.remove(&(waiting.items.len(), client));
        }
        let before = waiting.items.len();
        let result = work(waiting, &mut self.now);
        let after = waiting.items.len();
        self.len = self.len + after - before;
        if let Some(first) = waiting.items.keys().next() {
            self.turns.insert((waiting.start, *first, client));
            self.crowds.insert((after, client));
        } else if waiting.start <= self.now {
            self.clients.remove(&client);
        }
        if self.clients.len() > REMEMBERED + self.turns.len() {
            self.clients.retain(|_, waiting| !waiting.items.is_empty());
        }
        result
    }

    fn push(&mut self, client: IpAddr, number: u64, item: T) {
        self.change(client, |waiting, now| {
            if waiting.items.is_empty() {
                waiting.start = waiting.start.max(*now);
            }
            waiting.items.insert(number, item);
        });
    }

    /// The oldest item of the client whose turn it is.
    fn pop(&mut self) -> Option<T> {
        let (_, _, client) = *self.turns.first()?;
        self.change(client, |waiting, now| {
            let (_, item) = waiting.items.pop_first()?;
            waiting.serve(now);
            Some(item)
        })
    }
}

impl<T> Waiting<T> {
    fn serve(&mut self, now: &mut u128) {
        self.start = self.start.max(*now);
        *now = self.start;
        self.start += UNIT;
    }
}

impl<T> Queue<T> {
    /// An empty one.
    pub(crate) fn new(classes: &[Class]) -> Self {
        let mut new = Self { classes: BTreeMap::new(), now: [0; LEVELS], len: 0, next: 0 };
        new.set(classes);
        new
    }

    /// Sets the classes. What waits in one that is gone waits in class 0, behind what the same client has there.
    /// A weight of 0 is one of 1, and a priority of more than 7 is 7: the configuration refuses both.
    pub(crate) fn set(&mut self, classes: &[Class]) {
        let class0 = Class::default();
        let known = classes.iter().any(|one| one.id == 0);
        for class in classes.iter().chain((!known).then_some(&class0)) {
            let (weight, level) = (class.weight.max(1), usize::from(class.priority).min(LEVELS - 1));
            let start = self.now[level];
            let kind = self.classes.entry(class.id).or_insert_with(|| Kind::new(weight, level, start));
            kind.weight = weight;
            if kind.level != level {
                // Tags of one level mean nothing in another.
                (kind.level, kind.start) = (level, start);
            }
        }
        let goes = |id: &u16, _: &mut Kind<T>| *id != 0 && !classes.iter().any(|one| one.id == *id);
        let gone: Vec<_> = self.classes.extract_if(.., goes).collect();
        for (_, kind) in gone {
            for (client, waiting) in kind.clients {
                for (number, item) in waiting.items {
                    self.put(Ticket { class: 0, client, number }, item);
                }
            }
            self.len -= kind.len;
        }
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// How many of a class wait.
    pub(crate) fn waiting(&self, class: u16) -> usize {
        self.classes.get(&class).map_or(0, |kind| kind.len)
    }

    /// The classes of which something waits.
    pub(crate) fn classes(&self) -> impl Iterator<Item = u16> {
        self.classes.iter().filter(|(_, kind)| kind.len > 0).map(|(id, _)| *id)
    }

    /// The class as which something counts: 0 for one that is not there.
    pub(crate) fn class(&self, class: u16) -> u16 {
        if self.classes.contains_key(&class) { class } else { 0 }
    }

    /// Lets something wait.
    pub(crate) fn push(&mut self, class: u16, client: IpAddr, item: T) -> Ticket {
        let ticket = Ticket { class: self.class(class), client: network(client), number: self.next };
        self.next += 1;
        self.put(ticket, item);
        ticket
    }

    fn put(&mut self, ticket: Ticket, item: T) {
        let Some(kind) = self.classes.get_mut(&ticket.class) else { return };
        if kind.len == 0 {
            kind.start = kind.start.max(self.now[kind.level]);
        }
        kind.push(ticket.client, ticket.number, item);
        self.len += 1;
    }

    /// Counts something that is served although it did not wait.
    pub(crate) fn pass(&mut self, class: u16, client: IpAddr) {
        let class = self.class(class);
        let Some(kind) = self.classes.get_mut(&class) else { return };
        kind.change(network(client), Waiting::serve);
        self.serve(class);
    }

    /// The class that is served next, among those that may have more.
    fn turn(&self, may: impl Fn(u16) -> bool) -> Option<u16> {
        let waiting = self.classes.iter().filter(|(id, kind)| kind.len > 0 && may(**id));
        waiting.min_by_key(|(_, kind)| (Reverse(kind.level), kind.start)).map(|(id, _)| *id)
    }

    /// What [`pop`](Self::pop) takes next.
    pub(crate) fn first(&self, may: impl Fn(u16) -> bool) -> Option<(Ticket, &T)> {
        let class = self.turn(may)?;
        let kind = self.classes.get(&class)?;
        let (_, _, client) = *kind.turns.first()?;
        let (number, item) = kind.clients.get(&client)?.items.first_key_value()?;
        Some((Ticket { class, client, number: *number }, item))
    }

    /// Takes what is served next, with its class, among classes that may have more.
    pub(crate) fn pop(&mut self, may: impl Fn(u16) -> bool) -> Option<(u16, T)> {
        let class = self.turn(may)?;
        let item = self.classes.get_mut(&class)?.pop()?;
        self.len -= 1;
        self.serve(class);
        Some((class, item))
    }

    /// Virtual time goes on with an item of a class.
    fn serve(&mut self, class: u16) {
        let Some(kind) = self.classes.get_mut(&class) else { return };
        let now = &mut self.now[kind.level];
        *now = kind.start.max(*now);
        kind.start = *now + UNIT / u128::from(kind.weight);
    }

    /// What waits, to be changed.
    pub(crate) fn item(&mut self, ticket: Ticket) -> Option<&mut T> {
        let place = self.place(ticket)?;
        self.classes.get_mut(&place)?.clients.get_mut(&ticket.client)?.items.get_mut(&ticket.number)
    }

    /// Takes out what waits, if it still does.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> Option<(u16, T)> {
        let place = self.place(ticket)?;
        let kind = self.classes.get_mut(&place)?;
        let item = kind.change(ticket.client, |waiting, _| waiting.items.remove(&ticket.number))?;
        self.len -= 1;
        Some((place, item))
    }

    /// The class in which it waits by now.
    fn place(&self, ticket: Ticket) -> Option<u16> {
        let has = |class: &u16| {
            let client = self.classes.get(class).and_then(|kind| kind.clients.get(&ticket.client));
            client.is_some_and(|waiting| waiting.items.contains_key(&ticket.number))
        };
        [ticket.class, 0].into_iter().find(has)
    }

    /// Makes room for one more of a class and client: takes out the newest item of the class furthest above its
    /// share, and there of the client of whom most waits. None if that is the class and client of the one that
    /// comes. Of several priorities the lowest loses. The only one of a class stays where another class has more, or a short
    /// queue would have no place for the light ones at all.
    pub(crate) fn shed(&mut self, class: u16, client: IpAddr) -> Option<(u16, T)> {
        let (class, client) = (self.class(class), network(client));
        let crowd = |id: u16, kind: &Kind<T>| (kind.len + usize::from(id == class)) as u128;
        let above = |(one, kind): &(&u16, &Kind<T>), (other, rival): &(&u16, &Kind<T>)| {
            let mine = crowd(**one, kind) * u128::from(rival.weight);
            let theirs = crowd(**other, rival) * u128::from(kind.weight);
            rival
                .level
                .cmp(&kind.level)
                .then((crowd(**one, kind) > 1).cmp(&(crowd(**other, rival) > 1)))
                .then(mine.cmp(&theirs))
                .then((**one == class).cmp(&(**other == class)))
        };
        let crowded = self.classes.iter().filter(|(id, kind)| crowd(**id, kind) > 0);
        let worst = *crowded.max_by(above)?.0;
        let kind = self.classes.get_mut(&worst)?;
        let (most, loser) = *kind.crowds.last()?;
        let own = kind.clients.get(&client).map_or(0, |waiting| waiting.items.len());
        if worst == class && own + 1 >= most {
            return None;
        }
        let (_, item) = kind.change(loser, |waiting, _| waiting.items.pop_last())?;
        self.len -= 1;
        Some((worst, item))
    }
}

/// Whom an address stands for.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generator of numbers (xorshift64), so that what fails fails again.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % end
        }
    }

    fn class(id: u16, weight: u32) -> Class {
        Class { id, name: format!("c{id}"), weight, ..Class::default() }
    }

    fn urgent(id: u16, priority: u8) -> Class {
        Class { priority, ..class(id, 1) }
    }

    fn client(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    /// Whether all that the queue keeps goes together.
    fn check<T>(queue: &Queue<T>) {
        let mut all = 0;
        for kind in queue.classes.values() {
            let waiting = kind.clients.iter().filter(|(_, waiting)| !waiting.items.is_empty());
            let len: usize = waiting.clone().map(|(_, waiting)| waiting.items.len()).sum();
            assert_eq!((len, waiting.clone().count()), (kind.len, kind.turns.len()));
            for (client, waiting) in waiting {
                let first = waiting.items.keys().next().expect("something waits");
                assert!(kind.turns.contains(&(waiting.start, *first, *client)));
                assert!(kind.crowds.contains(&(waiting.items.len(), *client)));
            }
            assert_eq!(kind.crowds.len(), kind.turns.len());
            assert!(kind.clients.len() <= REMEMBERED + kind.turns.len() + 1);
            all += len;
        }
        assert_eq!(all, queue.len());
    }

    /// Serves so many items of classes that always have some waiting, and counts them by class.
    fn served(queue: &mut Queue<()>, classes: &[Class], number: u32) -> BTreeMap<u16, u32> {
        let mut counts = BTreeMap::new();
        for class in classes {
            if queue.waiting(class.id) == 0 {
                queue.push(class.id, client(0), ());
            }
        }
        for _ in 0..number {
            let (class, ()) = queue.pop(|_| true).expect("something waits");
            *counts.entry(class).or_insert(0) += 1;
            queue.push(class, client(0), ());
        }
        counts
    }

    fn assert_shares(counts: &BTreeMap<u16, u32>, classes: &[Class], number: u32) {
        let all: u64 = classes.iter().map(|one| u64::from(one.weight)).sum();
        for class in classes {
            let due = u64::from(number) * u64::from(class.weight) / all;
            let got = u64::from(counts.get(&class.id).copied().unwrap_or(0));
            assert!(got.abs_diff(due) <= 1 + due / 100, "{class:?}: {got} of {number}, not {due}");
        }
    }

    #[test]
    fn shares_are_those_of_the_weights() {
        let mut numbers = Numbers(1);
        for _ in 0..200 {
            let all = 1 + numbers.below(8) as u16;
            let classes: Vec<Class> = (0..all).map(|id| class(id, 1 + numbers.below(100) as u32)).collect();
            let mut queue = Queue::new(&classes);
            let counts = served(&mut queue, &classes, 10_000);
            assert_shares(&counts, &classes, 10_000);
        }
    }

    #[test]
    fn shares_hold_in_short_runs_too() {
        // Nobody waits for more than one round: the deviation is one item, at any time.
        let classes = [class(0, 1), class(1, 3), class(2, 6)];
        let mut queue = Queue::new(&classes);
        let mut counts = BTreeMap::<u16, u64>::new();
        for id in 0..3 {
            queue.push(id, client(0), ());
        }
        for turn in 1..1000_u64 {
            let (id, ()) = queue.pop(|_| true).expect("something waits");
            *counts.entry(id).or_insert(0) += 1;
            queue.push(id, client(0), ());
            for class in &classes {
                let got = counts.get(&class.id).copied().unwrap_or(0) * 10;
                assert!(got.abs_diff(turn * u64::from(class.weight)) <= 10 * 2, "turn {turn}: {counts:?}");
            }
        }
    }

    #[test]
    fn the_largest_weights_do_not_overflow() {
        let classes = [class(0, u32::MAX), class(1, u32::MAX), class(2, u32::MAX / 2 + 1)];
        let mut queue = Queue::new(&classes);
        let counts = served(&mut queue, &classes, 50_000);
        assert_shares(&counts, &classes, 50_000);
        // And far from them, one item of the least weight takes as long as all those.
        let classes = [class(0, 1), class(1, u32::MAX)];
        let mut queue = Queue::new(&classes);
        let counts = served(&mut queue, &classes, 10_000);
        assert_eq!(counts.get(&1), Some(&9_999), "{counts:?}");
        queue.push(1, client(0), ());
        queue.push(0, client(0), ());
        assert_eq!(queue.shed(1, client(9)), Some((0, ())), "two are more than three for these weights");
    }

    #[test]
    fn what_one_class_leaves_others_use_and_nothing_is_saved_up() {
        let classes = [class(0, 1), class(1, 9)];
        let mut queue = Queue::new(&classes);
        let counts = served(&mut queue, &classes[..1], 1000);
        assert_eq!(counts, BTreeMap::from([(0, 1000)]), "alone, it has all");
        let counts = served(&mut queue, &classes, 1000);
        assert_shares(&counts, &classes, 1000);
    }

    #[test]
    fn what_did_not_wait_counts_too() {
        let classes = [class(0, 1), class(1, 1)];
        let mut queue = Queue::new(&classes);
        // Class 0 has had a lot while nobody else asked: it owes nothing for it. Then both ask, but only class 0 is
        // served at once.
        for _ in 0..1000 {
            queue.pass(0, client(0));
        }
        queue.pass(1, client(1));
        queue.pass(0, client(0));
        queue.push(0, client(0), ());
        queue.push(1, client(1), ());
        assert_eq!(queue.pop(|_| true).map(|(class, ())| class), Some(1), "it had one less");
        let counts = served(&mut queue, &classes, 100);
        assert_shares(&counts, &classes, 100);
    }

    #[test]
    fn clients_of_a_class_share_it_evenly() {
        let mut queue = Queue::new(&[]);
        // One with a lot, one with one at a time, one in between.
        for _ in 0..300 {
            queue.push(0, client(1), 1);
        }
        queue.push(0, client(2), 2);
        for _ in 0..50 {
            queue.push(0, client(3), 3);
        }
        let mut order = Vec::new();
        for _ in 0..120 {
            let (_, who) = queue.pop(|_| true).expect("something waits");
            order.push(who);
            if who == 2 {
                queue.push(0, client(2), 2);
            }
            check(&queue);
        }
        for who in 1..=3 {
            let got = order.iter().filter(|one| **one == who).count();
            assert!((39..=41).contains(&got), "client {who} had {got} of 120");
        }
        let firsts: BTreeSet<i32> = order.iter().take(3).copied().collect();
        assert_eq!(firsts, BTreeSet::from([1, 2, 3]), "nobody waits longer than a round");
    }

    #[test]
    fn addresses_of_one_network_are_one_client() {
        let mut queue = Queue::new(&[]);
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        for host in 1..=50 {
            queue.push(0, address(&format!("2001:db8::{host}")), 'a');
        }
        queue.push(0, address("2001:db8:0:1::1"), 'b');
        queue.push(0, address("::ffff:192.0.2.1"), 'c');
        queue.push(0, address("192.0.2.1"), 'd');
        let order: String = (0..6).filter_map(|_| queue.pop(|_| true)).map(|(_, item)| item).collect();
        assert_eq!(order, "abcada");
    }

    #[test]
    fn a_higher_priority_is_always_first() {
        let classes = [urgent(0, 0), urgent(1, 7), urgent(2, 3), urgent(3, 200)];
        let mut queue = Queue::new(&classes);
        for id in [0, 1, 2, 3, 0, 1, 2, 3] {
            queue.push(id, client(0), ());
        }
        let order: Vec<u16> = std::iter::from_fn(|| queue.pop(|_| true)).map(|(class, ())| class).collect();
        assert_eq!(order, [1, 3, 1, 3, 2, 2, 0, 0], "7 and what is more than 7 are one level");
        // A class that moves to another level begins there like one that is new.
        let counts = served(&mut queue, &classes[..1], 1000);
        assert_eq!(counts.get(&0), Some(&1000));
        let classes = [urgent(0, 5), urgent(1, 5)];
        queue.set(&classes);
        let counts = served(&mut queue, &classes, 100);
        assert_shares(&counts, &classes, 100);
    }

    #[test]
    fn nobody_starves_within_a_level() {
        let mut numbers = Numbers(7);
        let classes = [class(0, 1), class(1, 1000), class(2, 50)];
        let mut queue = Queue::new(&classes);
        queue.push(0, client(0), true);
        let mut turns = 0;
        loop {
            for id in 1..3 {
                queue.push(id, client(numbers.below(100) as u32), false);
            }
            turns += 1;
            if matches!(queue.pop(|_| true), Some((_, true))) {
                break;
            }
            assert!(turns < 3, "the first item of a class is among the first");
        }
        queue.push(0, client(0), true);
        let mut turns = 0;
        while !matches!(queue.pop(|_| true), Some((_, true))) {
            queue.push(1, client(numbers.below(100) as u32), false);
            queue.push(2, client(numbers.below(100) as u32), false);
            turns += 1;
            assert!(turns <= 1053, "one round is 1051 items, and tags are rounded");
        }
    }

    #[test]
    fn a_new_weight_counts_from_the_next_item_on() {
        let classes = [class(0, 1), class(1, 1)];
        let mut queue = Queue::new(&classes);
        assert_shares(&served(&mut queue, &classes, 1000), &classes, 1000);
        let classes = [class(0, 1), class(1, 9)];
        queue.set(&classes);
        let counts = served(&mut queue, &classes, 20);
        assert!(counts.get(&1).is_some_and(|got| (16..=19).contains(got)), "{counts:?}");
        let classes = [class(0, 0), class(1, 1)];
        queue.set(&classes);
        let counts = served(&mut queue, &classes, 1000);
        assert_shares(&counts, &[class(0, 1), class(1, 1)], 1000);
    }

    #[test]
    fn what_waits_in_a_class_that_goes_waits_in_class_0() {
        let mut queue = Queue::new(&[class(5, 3)]);
        let first = queue.push(5, client(1), "first");
        let second = queue.push(5, client(1), "second");
        let third = queue.push(7, client(2), "unknown");
        assert_eq!((queue.waiting(5), queue.waiting(0)), (2, 1));
        queue.set(&[]);
        check(&queue);
        assert_eq!((queue.waiting(5), queue.waiting(0), queue.len()), (0, 3, 3));
        assert_eq!(queue.cancel(first), Some((0, "first")));
        // The class is back, but not what waited in it.
        queue.set(&[class(5, 3)]);
        assert_eq!(queue.item(second).map(|item| *item), Some("second"));
        assert_eq!(queue.cancel(second), Some((0, "second")));
        assert_eq!((queue.cancel(second), queue.cancel(first)), (None, None), "each goes once");
        assert_eq!(queue.pop(|_| true), Some((0, "unknown")));
        assert_eq!((queue.cancel(third), queue.pop(|_| true), queue.len()), (None, None, 0));
        check(&queue);
    }

    #[test]
    fn who_is_furthest_above_its_share_loses() {
        let classes = [class(0, 1), class(1, 3)];
        let mut queue = Queue::new(&classes);
        for number in 0..4 {
            queue.push(0, client(1), number);
        }
        for number in 10..16 {
            queue.push(1, client(2), number);
        }
        // 4 / 1 is more than 6 / 3: the newest of class 0 goes.
        assert_eq!(queue.shed(1, client(3)), Some((0, 3)));
        queue.push(1, client(3), 20);
        assert_eq!(queue.shed(0, client(1)), None, "that would be the one that comes");
        assert_eq!(
            queue.shed(0, client(9)),
            Some((0, 2)),
            "within a class, of the client of whom most waits"
        );
        // 2 / 1 against 7 / 3: now class 1 is further above.
        assert_eq!(queue.shed(1, client(9)), Some((1, 15)));
        check(&queue);
    }

    #[test]
    fn a_short_queue_has_a_place_for_the_light() {
        let classes = [class(0, 1), class(1, 8)];
        let mut queue = Queue::new(&classes);
        for number in 0..7 {
            queue.push(1, client(1), number);
        }
        assert_eq!(queue.shed(0, client(2)), Some((1, 6)), "its first");
        queue.push(0, client(2), 10);
        assert_eq!(queue.shed(0, client(2)), None, "its second is too many");
        assert_eq!(queue.shed(1, client(1)), None, "and the others do not take the place");
        check(&queue);
    }

    #[test]
    fn a_lower_priority_loses_first() {
        let mut queue = Queue::new(&[urgent(0, 0), urgent(1, 1)]);
        for number in 0..5 {
            queue.push(1, client(1), number);
        }
        queue.push(0, client(1), 9);
        assert_eq!(queue.shed(0, client(1)), None);
        assert_eq!(queue.shed(1, client(1)), Some((0, 9)));
        assert_eq!(queue.shed(1, client(1)), None);
    }

    #[test]
    fn whatever_is_done_all_goes_together() {
        let mut numbers = Numbers(42);
        let classes: Vec<Class> = (0..5).map(|id| class(id, 1 + u32::from(id))).collect();
        let mut queue = Queue::new(&classes);
        let (mut tickets, mut there) = (Vec::new(), BTreeSet::new());
        for number in 0..50_000_u64 {
            let (id, who) = (numbers.below(6) as u16, client(numbers.below(20) as u32));
            match numbers.below(10) {
                0..4 => {
                    tickets.push((queue.push(id, who, number), number));
                    there.insert(number);
                }
                4..7 => {
                    let any = !there.is_empty();
                    assert_eq!(queue.pop(|_| true).map(|(_, item)| there.remove(&item)), any.then_some(true));
                }
                7 => queue.pass(id, client(number as u32)),
                8 if !tickets.is_empty() => {
                    let (ticket, item) = tickets.swap_remove(numbers.below(tickets.len() as u64) as usize);
                    assert_eq!(
                        queue.cancel(ticket).map(|(_, item)| item),
                        there.remove(&item).then_some(item)
                    );
                }
                8 => {}
                _ => {
                    if let Some((_, item)) = queue.shed(id, who) {
                        assert!(there.remove(&item));
                    }
                    if numbers.below(100) == 0 {
                        queue.set(&classes[..1 + numbers.below(5) as usize]);
                    }
                }
            }
            assert_eq!(queue.len(), there.len());
            if number % 100 == 0 {
                check(&queue);
            }
        }
    }

    #[test]
    fn idle_clients_are_forgotten() {
        let mut queue = Queue::<()>::new(&[]);
        for number in 0..100_000 {
            queue.pass(0, client(number));
        }
        check(&queue);
    }
}
