//! Classes of traffic, and the token buckets that hold backends to their rates.
//!
//! A backend with limits has for each [kind](KIND_TO_BACKEND) of them a set of buckets on two levels. Each class has
//! a bucket of its own that its share of the rate runs into. What does not fit runs over into one that all share, and
//! from there to classes that wanted more than their own in the last few milliseconds, by their shares. So the sum of
//! all that is given out never exceeds the whole rate by more than what the buckets hold.
//!
//! A CPU takes tokens from there in portions, under a lock, and spends them without one: see [`Credits`]. Where there
//! is no limit the portions are [`FREE`], so that one lookup is enough to know that a frame may pass.
//!
//! Tokens are bytes, or [`CONNECTION`]s, with [`FRACTION`] bits of fraction. Nothing here overflows for rates up to
//! [`RATE_MAX`] and any time, and clocks that jump do no more than fill the buckets.

/// Classes, the default one among them, which is number 0.
pub const CLASSES_MAX: usize = 16;
/// Frames on their way to the backend, bytes.
pub const KIND_TO_BACKEND: u32 = 0;
/// Frames on their way to clients, bytes.
pub const KIND_TO_CLIENT: u32 = 1;
/// New connections.
pub const KIND_CONNECTIONS: u32 = 2;
/// Kinds of limits.
pub const KINDS: u32 = 3;
/// `ClassEntry::dscp`: frames keep their own.
pub const DSCP_NONE: u8 = 0xff;
/// Most backends that can have limits at the same time.
pub const LIMITED_MAX: u32 = 1024;
/// Most client networks that name a class.
pub const NETWORKS_MAX: u32 = 65_536;
/// Most server names that name a class.
pub const NAMES_MAX: u32 = 4096;

/// Bits of a token's fraction.
pub const FRACTION: u32 = 10;
/// A connection in tokens, so that rates of few a second are exact.
pub const CONNECTION: u64 = 1 << 20;
/// Highest rate, tokens in [`SECOND`]: 131 Tbit/s, or 15 million connections a second. More is no limit.
pub const RATE_MAX: u64 = 1 << 44;
/// The time that rates are told for, nanoseconds: a power of two near a second.
pub const SECOND: u64 = 1 << 30;

/// Buckets hold what comes in a quarter of a second, but at least so much: the longest frame that there can be.
///
/// TCP that has lost frames may send nothing for 200 ms (RFC 6298 section 2.4, as Linux has it). With buckets that run
/// over sooner, others have used by then what was its own. What runs over is kept for a quarter of that time only, where
/// several want it.
pub const LEAST_BYTES: i64 = 65_536 << FRACTION;
/// The same of connections: one.
pub const LEAST_CONNECTIONS: i64 = (CONNECTION << FRACTION) as i64;

/// Buckets are not filled more often than this, nanoseconds, so that what is cut off is nothing.
const STEP_NS: i64 = 1 << 16;
/// The longest time for which buckets are filled at once, nanoseconds.
const ELAPSED_MAX_NS: i64 = 1 << 41;
/// Ticks in which any bucket of a rate from [`FAST`] on is full, twice over.
const FULL: u64 = 1 << 19;
/// See [`FULL`]: slower ones times [`ELAPSED_MAX_NS`] fit a word.
const FAST: u64 = 1 << 32;
/// Half of the time for which a class counts as one that wants more, nanoseconds.
const HUNGER_NS: u64 = 1 << 23;
/// The same of connections, which come one by one: clients who were refused pause before they come again.
const HUNGER_CONNECTIONS_NS: u64 = 1 << 28;

/// One class: value of `CLASSES`, index 0 is the default class.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ClassEntry {
    /// See [`class_id`]; 0: there is no such class, and flows that have it count as the default one's.
    pub id: u16,
    /// DSCP that its frames get, [`DSCP_NONE`] for none.
    pub dscp: u8,
    /// 1: what it leaves of its share is given to others.
    pub lends: u8,
    /// Its part of the sum of all weights is its part of the rate.
    pub weight: u32,
    /// Most that it is given beyond its own share, percent of the whole rate.
    pub borrow_limit: u8,
    /// Most that it gets in all, percent of the whole rate.
    pub ceil: u8,
    /// 1: it is in use. The default class may have the id 0.
    pub used: u8,
    /// Unused, zero.
    pub pad: u8,
}

/// A class's id from its name, never 0: entries of sessions, networks and services name a class by it. The config
/// refuses two names with one id.
#[must_use]
pub fn class_id(name: &str) -> u16 {
    let id = crate::service::stable_id(name);
    let folded = (id >> 16) as u16 ^ id as u16;
    if folded == 0 { 1 } else { folded }
}

/// Key of `NETWORKS`, behind the length of its prefix: a service's client network. In memory as on the wire.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct Network {
    /// Stable id of the service; always compared as a whole.
    pub service: u32,
    /// The network's address.
    pub addr: crate::addr::Addr,
}

/// Bits of a whole [`Network`].
pub const NETWORK_BITS: u32 = 160;

/// Longest server name that can name a class; DNS has none of more than 253 bytes.
pub const NAME_MAX: usize = 255;
/// Words of [`Name::words`].
pub const NAME_WORDS: usize = NAME_MAX.div_ceil(8);

/// Key of `NAMES`: what clients of a service ask for by SNI.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(C)]
pub struct Name {
    /// Stable id of the service.
    pub service: u32,
    /// Bytes of the name.
    pub len: u32,
    /// The name in lower case, eight bytes in each word as they are in memory; zero behind it.
    pub words: [u64; NAME_WORDS],
}

impl Name {
    /// A service's name; `None` if it is longer than [`NAME_MAX`], or empty.
    #[must_use]
    pub fn new(service: u32, name: &str) -> Option<Self> {
        if name.is_empty() || name.len() > NAME_MAX {
            return None;
        }
        let mut key = Self { service, len: name.len() as u32, words: [0; NAME_WORDS] };
        for (word, part) in key.words.iter_mut().zip(name.as_bytes().chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..part.len()].copy_from_slice(part);
            *word = lower(u64::from_ne_bytes(bytes));
        }
        Some(key)
    }
}

/// Eight bytes with their capital letters of ASCII in lower case.
#[inline(always)]
#[must_use]
pub const fn lower(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    const HIGH: u64 = ONES << 7;
    // The seventh bit of a byte tells whether what is added to its other seven reached 128.
    let low = word & !HIGH;
    let from_a = low.wrapping_add(ONES * (128 - b'A' as u64));
    let beyond_z = low.wrapping_add(ONES * (127 - b'Z' as u64));
    word | (from_a & !beyond_z & !word & HIGH) >> 2
}

/// The first `left` of the eight bytes of a word, zero behind them: none below 1, all from 8 on. Without a branch,
/// which the verifier would follow both ways.
#[inline(always)]
#[must_use]
pub fn first_bytes(word: u64, left: i64) -> u64 {
    let none = crate::opaque::opaque((left >> 63) as u64);
    let all = crate::opaque::opaque((7_i64.wrapping_sub(left) >> 63) as u64);
    // 0 to 7 where it matters; the shift in two steps, because a shift by 64 is none.
    let half = (8_i64.wrapping_sub(left) as u64).wrapping_mul(4) & 63;
    let some = u64::MAX >> half >> half;
    word & u64::from_le((some | all) & !none)
}

/// What one class may get: a part of [`Rates`]. Tokens in [`SECOND`].
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ClassRates {
    /// Its share; 0: there is no such class, and flows that have it count as the default one's.
    pub own: u64,
    /// Most that it gets in all.
    pub ceil: u64,
    /// Most that it is given beyond its share.
    pub borrow: u64,
    /// 1: what it leaves of its share is given to others.
    pub lends: u64,
}

/// A limit of one kind of one backend: value of `RATES`. The daemon writes it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Rates {
    /// All of it, tokens in [`SECOND`]; 0: no limit.
    pub whole: u64,
    /// Least that a bucket holds, tokens with fraction.
    pub least: i64,
    /// What each class gets of it.
    pub classes: [ClassRates; CLASSES_MAX],
}

/// Buckets of one class, tokens with fraction.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ClassBuckets {
    /// What it may take now: its own, and what it was given of others'.
    pub own: i64,
    /// What it may still take before it meets its ceiling.
    pub ceil: i64,
    /// What it may still be given of others'.
    pub borrow: i64,
    /// All that it was given of others', since ever.
    pub borrowed: u64,
    /// All that CPUs took for it, since ever.
    pub taken: u64,
}

/// The state of a limit: value of `BUCKETS`. The data path writes it, under its lock.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Buckets {
    /// 1 while a CPU works on it.
    pub lock: u32,
    /// Bit n: class n wanted more than its own lately; bit n + 16: it did in the time before.
    pub hungry: u32,
    /// When `hungry` was begun anew, nanoseconds of CLOCK_MONOTONIC.
    pub turned: u64,
    /// Up to when the buckets are filled, nanoseconds of CLOCK_MONOTONIC.
    pub filled: u64,
    /// What ran over and was given to nobody yet, tokens with fraction.
    pub shared: i64,
    /// The classes'.
    pub classes: [ClassBuckets; CLASSES_MAX],
}

/// What one CPU has of a backend's tokens: value of `TOKENS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Credits {
    /// By [`credit_index`], with fraction; below 0 what it spent while another CPU had the lock, down to a
    /// [portion](ClassRates::portion).
    pub of: [i64; CREDITS],
}

/// Entries of [`Credits`].
pub const CREDITS: usize = KINDS as usize * CLASSES_MAX;

/// What a CPU is given at once where there is no limit, tokens with fraction: 1 MiB.
pub const FREE: i64 = 1 << (20 + FRACTION);

impl Default for Credits {
    fn default() -> Self {
        Self { of: [0; CREDITS] }
    }
}

/// What the daemon took out of CPUs' hands, tokens with fraction: value of `TAKEN_BACK`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct TakenBack {
    /// To the backend and to clients, by class.
    pub of: [[i64; CLASSES_MAX]; 2],
}

/// Where the credit of a kind and a class stands in [`Credits`].
#[inline(always)]
#[must_use]
pub const fn credit_index(kind: u32, class: u32) -> u32 {
    kind << 4 | class & 15
}

impl Credits {
    /// What a CPU has in hand of the tokens of a kind, by the classes whose buckets they came from: flows of a class
    /// without a share take from the default one's. Nothing, where there is no limit.
    #[must_use]
    pub fn in_hand(&self, kind: u32, rates: &Rates) -> [i64; CLASSES_MAX] {
        let mut sums = [0_i64; CLASSES_MAX];
        for class in (0..CLASSES_MAX).filter(|_| rates.whole != 0) {
            let of = if rates.classes[class].own == 0 { 0 } else { class };
            sums[of] = sums[of].wrapping_add(self.of[credit_index(kind, class as u32) as usize]);
        }
        sums
    }
}

impl TakenBack {
    /// Notes what a CPU had in hand.
    pub fn note(&mut self, hand: &Credits, rates: [&Rates; 2]) {
        for (kind, rates) in [KIND_TO_BACKEND, KIND_TO_CLIENT].into_iter().zip(rates) {
            for (sum, one) in self.of[kind as usize].iter_mut().zip(hand.in_hand(kind, rates)) {
                *sum = sum.wrapping_add(one);
            }
        }
    }
}

/// Where a limit stands in `RATES` and `BUCKETS`, by the number of the backend among those with limits.
#[inline(always)]
#[must_use]
pub const fn limit_index(limited: u32, kind: u32) -> u32 {
    limited.wrapping_mul(KINDS).wrapping_add(kind)
}

/// Where the counters of a class stand in `CLASS_STATS`.
#[inline(always)]
#[must_use]
pub const fn stats_index(limited: u32, class: u32) -> u32 {
    limited << 4 | class & 15
}

/// Value of `LIMITED` for a backend: its number among those with limits, and which kinds it has; 0 for none.
#[inline(always)]
#[must_use]
pub const fn limited_word(limited: u32, kinds: u32) -> u32 {
    kinds << 16 | limited & 0xffff
}

/// Takes [`limited_word`] apart: number, and a bit for each kind.
#[inline(always)]
#[must_use]
pub const fn limited_of(word: u32) -> (u32, u32) {
    (word & 0xffff, word >> 16)
}

/// What a CPU counted of a class of a backend with limits: value of `CLASS_STATS`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ClassStats {
    /// Connections bound.
    pub connections: u64,
    /// First packets of connections that were over the rate; those that come again count again.
    pub connections_over: u64,
    /// Frames to the backend that were dropped.
    pub dropped_to_backend: u64,
    /// Their bytes.
    pub dropped_to_backend_bytes: u64,
    /// Frames to clients that were dropped.
    pub dropped_to_client: u64,
    /// Their bytes.
    pub dropped_to_client_bytes: u64,
}

/// What a bucket holds at most.
#[inline(always)]
#[must_use]
pub const fn depth(rate: u64, least: i64) -> i64 {
    let depth = (rate << (FRACTION - 2)) as i64;
    if depth > least { depth } else { least }
}

/// What is kept of what ran over, and what a class holds at most when it is given of that: what comes in a quarter of
/// the time. More would be given to whoever asks first, for seconds. For a class that is alone it is no less than of its own.
#[inline(always)]
const fn kept(rate: u64, least: i64, alone: bool) -> i64 {
    depth(if alone { rate } else { rate >> 2 }, least)
}

/// What runs into a bucket in a time of `ticks` of 1024 ns. `FRACTION` is 10, so rate * ticks * 2^10 / 2^30 * 2^10 is
/// what follows.
#[inline(always)]
const fn gained(rate: u64, ticks: u64) -> i64 {
    let ticks = if rate >= FAST && ticks > FULL { FULL } else { ticks };
    (rate.wrapping_mul(ticks) >> FRACTION) as i64
}

/// [`CLASSES_MAX`], of which the compiler does not know that it could unroll a loop over it: the stack has no room for
/// what it keeps then.
#[inline(always)]
fn rolled() -> usize {
    crate::opaque::opaque(CLASSES_MAX as u64) as usize & 31
}

#[inline(always)]
const fn at_most(a: i64, b: i64) -> i64 {
    if a < b { a } else { b }
}

#[inline(always)]
const fn at_least(a: i64, b: i64) -> i64 {
    if a > b { a } else { b }
}

impl Buckets {
    /// Sets the buckets' time. Returns how much passed, in ticks of 1024 ns; 0 if that is too little to fill them.
    #[inline(always)]
    pub fn advance(&mut self, rates: &Rates, now: u64) -> u64 {
        let elapsed = now.wrapping_sub(self.filled) as i64;
        if (0..STEP_NS).contains(&elapsed) {
            return 0;
        }
        // Who wanted more counts as such until others do, however long that takes.
        let hunger = if rates.least == LEAST_CONNECTIONS { HUNGER_CONNECTIONS_NS } else { HUNGER_NS };
        if now.wrapping_sub(self.turned) > hunger && self.hungry & 0xffff != 0 {
            self.hungry <<= 16;
            self.turned = now;
        }
        if elapsed < 0 {
            // The clock went back: it begins anew.
            self.filled = now;
            return 0;
        }
        if elapsed > ELAPSED_MAX_NS {
            self.filled = now;
            return ELAPSED_MAX_NS as u64 >> 10;
        }
        self.filled = self.filled.wrapping_add(elapsed as u64 & !1023);
        elapsed as u64 >> 10
    }

    /// Lets what came in a time run into a class's bucket. Returns its share if it wanted more lately, else 0.
    #[inline(always)]
    pub fn fill(&mut self, rates: &Rates, class: u32, ticks: u64) -> u64 {
        let class = crate::opaque::opaque(class as u64) as usize & (CLASSES_MAX - 1);
        let (rate, bucket) = (&rates.classes[class], &mut self.classes[class]);
        if rate.own == 0 {
            return 0;
        }
        // What it was given of others' may be more than that.
        let full = at_least(depth(rate.own, rates.least), bucket.own);
        let mut own = bucket.own.wrapping_add(gained(rate.own, ticks));
        if own > full {
            if rate.lends != 0 {
                self.shared = self.shared.wrapping_add(own.wrapping_sub(full));
            }
            own = full;
        }
        bucket.own = own;
        let ceil = bucket.ceil.wrapping_add(gained(rate.ceil, ticks));
        bucket.ceil = at_most(ceil, depth(rate.ceil, rates.least));
        let borrow = bucket.borrow.wrapping_add(gained(rate.borrow, ticks));
        bucket.borrow = at_most(borrow, depth(rate.borrow, 0));
        if self.all_hungry() >> class & 1 != 0 { rate.own } else { 0 }
    }

    /// Bit n: class n wanted more than its own lately.
    #[inline(always)]
    fn all_hungry(&self) -> u32 {
        (self.hungry | self.hungry >> 16) & 0xffff
    }

    /// Gives out what ran over, to classes whose shares have this sum.
    ///
    /// While one class alone wants more there is nobody to be fair to, and it may be TCP: it finds as much as if the rate
    /// were its own.
    #[inline(always)]
    pub fn share(&mut self, rates: &Rates, weights: u64) {
        let hungry = self.all_hungry();
        let alone = hungry != 0 && hungry & hungry.wrapping_sub(1) == 0;
        let pool = at_most(self.shared, kept(rates.whole, rates.least, alone));
        self.shared = pool;
        if weights == 0 || pool <= 0 {
            return;
        }
        for i in 0..rolled() {
            let at = crate::opaque::opaque(i as u64) as usize & 15;
            let (rate, bucket) = (&rates.classes[at], &mut self.classes[at]);
            if hungry >> i & 1 == 0 || rate.own == 0 {
                continue;
            }
            let part = (rate.own << 16) / weights;
            let mut given = ((pool as u64 >> FRACTION).wrapping_mul(part) >> (16 - FRACTION)) as i64;
            given = at_most(given, bucket.borrow);
            let due = rates.whole.wrapping_mul(part) >> 16;
            let (own, due) = (kept(rate.own, rates.least, alone), kept(due, rates.least, false));
            given = at_most(given, at_least(own, due).wrapping_sub(bucket.own));
            if given > 0 {
                bucket.own = bucket.own.wrapping_add(given);
                bucket.borrow = bucket.borrow.wrapping_sub(given);
                bucket.borrowed = bucket.borrowed.wrapping_add(given as u64);
                self.shared = self.shared.wrapping_sub(given);
            }
        }
    }

    /// Takes the tokens that a class needs, and a portion more for what comes next; or what there is of it.
    #[inline(always)]
    pub fn take(&mut self, rates: &Rates, class: u32, need: i64) -> i64 {
        let class = rates.sharing(class);
        let (rate, bucket) = (&rates.classes[class], &mut self.classes[class]);
        let wanted = need.wrapping_add(rate.portion());
        // Not only when nothing is left, or it would lose something each time until it is given more: what comes in 4 ms of
        // the whole rate is more than a portion.
        let reserve = at_most((rates.whole << 2) as i64, depth(rate.own, rates.least) >> 1);
        if bucket.own < need.wrapping_add(reserve) {
            self.hungry |= 1 << class;
        }
        let mut tokens = at_most(at_most(bucket.own, bucket.ceil), wanted);
        if tokens < 0 {
            tokens = 0;
        }
        bucket.own = bucket.own.wrapping_sub(tokens);
        bucket.ceil = bucket.ceil.wrapping_sub(tokens);
        bucket.taken = bucket.taken.wrapping_add(tokens as u64);
        tokens
    }
}

impl Buckets {
    /// Takes what is not there from what a class gets later, up to what its bucket holds.
    #[inline(always)]
    pub fn owe(&mut self, rates: &Rates, class: u32, tokens: i64) {
        let class = rates.sharing(class);
        let (rate, bucket) = (&rates.classes[class], &mut self.classes[class]);
        let least = 0_i64.wrapping_sub(depth(rate.own, rates.least));
        let left = bucket.own.wrapping_sub(tokens);
        bucket.own = if left > least { left } else { least };
        bucket.taken = bucket.taken.wrapping_add(tokens as u64);
    }
}

impl ClassRates {
    /// What a CPU takes at once beyond its need, tokens with fraction: what comes in 2 ms.
    #[inline(always)]
    #[must_use]
    pub const fn portion(&self) -> i64 {
        (self.own << 1) as i64
    }
}

impl Rates {
    /// The class whose share a class takes from: its own, or the default one's if it has none.
    #[inline(always)]
    #[must_use]
    pub fn sharing(&self, class: u32) -> usize {
        let class = crate::opaque::opaque(class as u64) as usize & (CLASSES_MAX - 1);
        if self.classes[class].own == 0 { 0 } else { class }
    }

    /// Divides a rate of tokens in [`SECOND`] among the classes that are in use.
    #[must_use]
    pub fn divided(whole: u64, least: i64, classes: &[ClassEntry; CLASSES_MAX]) -> Self {
        let whole = whole.min(RATE_MAX);
        let mut rates = Self { whole, least, ..Self::default() };
        let used = |class: &&ClassEntry| class.used != 0;
        let sum: u64 = classes.iter().filter(used).map(|class| u64::from(class.weight.max(1))).sum();
        if whole == 0 || sum == 0 {
            return rates;
        }
        let percent = |part: u8| {
            (whole / 100 * u64::from(part.min(100)) + whole % 100 * u64::from(part.min(100)) / 100).max(1)
        };
        for (rate, class) in rates.classes.iter_mut().zip(classes) {
            if class.used == 0 {
                continue;
            }
            // A share of nothing would mean that there is no such class.
            let own = u128::from(whole) * u128::from(class.weight.max(1)) / u128::from(sum);
            rate.own = u64::try_from(own).unwrap_or(whole).max(1);
            rate.ceil = percent(class.ceil);
            rate.borrow = if class.borrow_limit == 0 { 0 } else { percent(class.borrow_limit) };
            rate.lends = u64::from(class.lends);
        }
        rates
    }
}

/// A rate of bits a second as tokens in [`SECOND`]; 0 stays 0.
#[must_use]
pub fn bytes_rate(bits: u64) -> u64 {
    scaled(u128::from(bits), 8_000_000_000)
}

/// A rate of connections a second as tokens in [`SECOND`]; 0 stays 0.
#[must_use]
pub fn connections_rate(connections: u32) -> u64 {
    scaled(u128::from(connections) * u128::from(CONNECTION), 1_000_000_000)
}

fn scaled(number: u128, by: u128) -> u64 {
    if number == 0 {
        return 0;
    }
    let rate = (number * u128::from(SECOND)).div_ceil(by);
    u64::try_from(rate).unwrap_or(RATE_MAX).min(RATE_MAX)
}

const _: () = assert!(size_of::<ClassEntry>() == 12);
const _: () = assert!(size_of::<Network>() == 20);
const _: () = assert!(size_of::<Name>() == 8 + 8 * NAME_WORDS);
const _: () = assert!(size_of::<Rates>() == 16 + 32 * CLASSES_MAX);
const _: () = assert!(size_of::<Buckets>() == 32 + 40 * CLASSES_MAX);
const _: () = assert!(size_of::<Credits>() == 8 * CREDITS);
const _: () = assert!(size_of::<TakenBack>() == 16 * CLASSES_MAX);
const _: () = assert!(size_of::<ClassStats>() == 48);

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn fill(buckets: &mut Buckets, rates: &Rates, now: u64) {
        let ticks = buckets.advance(rates, now);
        if ticks != 0 {
            let weights = (0..CLASSES_MAX as u32).map(|class| buckets.fill(rates, class, ticks)).sum();
            buckets.share(rates, weights);
        }
    }

    fn classes(settings: &[(u32, u8, u8, u8)]) -> [ClassEntry; CLASSES_MAX] {
        let mut entries = [ClassEntry::default(); CLASSES_MAX];
        for (entry, &(weight, lends, borrow_limit, ceil)) in entries.iter_mut().zip(settings) {
            *entry = ClassEntry { weight, lends, borrow_limit, ceil, used: 1, ..ClassEntry::default() };
        }
        entries
    }

    /// Bytes that each class sends in `time` ns, if class n offers a frame of 1000 bytes each `every[n]` ns (0: none).
    /// What the buckets held at the start is not counted.
    fn sent<const N: usize>(rates: &Rates, every: [u64; N], time: u64) -> [f64; N] {
        sent_of(rates, |_| every, 500 * MS..500 * MS + time)
    }

    /// The same in a span of time since the start, if what is offered changes with it. At the start all buckets are full.
    fn sent_of<const N: usize>(
        rates: &Rates,
        every: impl Fn(u64) -> [u64; N],
        counted: core::ops::Range<u64>,
    ) -> [f64; N] {
        let (mut buckets, mut credits, mut sums) = (Buckets::default(), [0_i64; N], [0.0; N]);
        let begin = 1_000 * MS;
        let mut now = begin;
        while now < begin + counted.end {
            now += 1000;
            for (class, every) in every(now - begin).into_iter().enumerate() {
                if every == 0 || !now.is_multiple_of(every) {
                    continue;
                }
                let (credit, cost) = (&mut credits[class], 1000_i64 << FRACTION);
                if *credit < cost {
                    fill(&mut buckets, rates, now);
                    *credit += buckets.take(rates, class as u32, cost - *credit);
                }
                if *credit >= cost {
                    *credit -= cost;
                    if now > begin + counted.start {
                        sums[class] += 1000.0;
                    }
                }
            }
        }
        sums
    }

    fn assert_near(what: &str, found: f64, wanted: f64) {
        assert!((found - wanted).abs() <= wanted * 0.02 + 2000.0, "{what}: {found} bytes, not {wanted}");
    }

    /// 80 Mbit/s: 10,000 bytes a millisecond.
    fn rates(settings: &[(u32, u8, u8, u8)]) -> Rates {
        Rates::divided(bytes_rate(80_000_000), LEAST_BYTES, &classes(settings))
    }

    #[test]
    fn all_that_want_more_get_their_shares() {
        let rates = rates(&[(1, 1, 100, 100), (2, 1, 100, 100), (5, 1, 100, 100)]);
        // Whether they ask often or seldom.
        let sums = sent(&rates, [4_000, 20_000, 10_000], 1000 * MS);
        for (sum, weight) in sums.into_iter().zip([1.0, 2.0, 5.0]) {
            assert_near("a share", sum, 10e6 * weight / 8.0);
        }
    }

    #[test]
    fn a_pause_as_long_as_tcps_timer_costs_no_share() {
        let rates = rates(&[(8, 1, 100, 100), (1, 1, 100, 100)]);
        let pausing = |now| if (500 * MS..700 * MS).contains(&now) { [0, 4_000] } else { [4_000, 4_000] };
        let [heavy, light] = sent_of(&rates, pausing, 500 * MS..1500 * MS);
        assert_near("with its pause", heavy, 10e6 * 8.0 / 9.0);
        assert_near("the other", light, 10e6 / 9.0);
    }

    #[test]
    fn who_is_alone_has_all_whatever_his_pauses() {
        let rates = rates(&[(8, 1, 100, 100), (1, 1, 100, 100)]);
        // A fifth of a second of nothing, then twice of what there is.
        let pausing = |now: u64| if now / MS % 500 < 200 { [0, 0] } else { [0, 50_000] };
        let [_, light] = sent_of(&rates, pausing, 1000 * MS..6000 * MS);
        assert_near("in five seconds", light, 50e6);
    }

    #[test]
    fn what_was_saved_up_is_spent_soon() {
        let rates = rates(&[(8, 1, 100, 100), (1, 1, 100, 100)]);
        // Each offers twice its share: what it had beyond that lasts no longer than it took to save it up.
        let [heavy, light] = sent_of(&rates, |_| [56_000, 450_000], 700 * MS..2700 * MS);
        assert_near("the heavier", heavy, 20e6 * 8.0 / 9.0);
        assert_near("the lighter", light, 20e6 / 9.0);
    }

    #[test]
    fn what_one_leaves_is_used_by_the_others_by_their_weights() {
        let all = rates(&[(4, 1, 100, 100), (1, 1, 100, 100), (3, 1, 100, 100)]);
        let [none, one, three] = sent(&all, [0, 4_000, 100_000], 1000 * MS);
        assert_eq!(none, 0.0);
        assert_near("weight 1", one, 2.5e6);
        assert_near("weight 3, which asks seldom", three, 7.5e6);
        let [_, alone, _] = sent(&all, [0, 4_000, 0], 1000 * MS);
        assert_near("all of it", alone, 10e6);
        let [some, rest, _] = sent(&all, [1000 * 1000, 4_000, 0], 1000 * MS);
        assert_near("below its share", some, 1e6);
        assert_near("the rest", rest, 9e6);
    }

    /// However little its own share is beside those of classes that want nothing.
    #[test]
    fn who_wants_no_more_than_is_due_to_it_loses_nothing() {
        for (idle, megabits) in [(1, 20), (100, 20), (10_000, 20), (10, 80), (10_000, 80), (100, 800)] {
            let some = [(1, 1, 100, 100), (3, 1, 100, 100), (1, 1, 100, 100), (idle, 1, 100, 100)];
            let rates = Rates::divided(bytes_rate(megabits * 1_000_000), LEAST_BYTES, &classes(&some));
            // A frame each so many microseconds is all.
            let frame = 8_000 / megabits;
            for every in [frame * 5 / 2, frame * 5 / 3, frame * 3 / 2, frame] {
                let offers = |_| [0, every * 1000, frame * 500];
                let [_, heavy, light] = sent_of(&rates, offers, 2000 * MS..3000 * MS);
                let all = megabits as f64 * 125e3;
                let due = (1e9 / every as f64).min(all * 0.75);
                let found = [heavy / all, light / all];
                let near = (heavy - due).abs() < all / 50.0 && (light + due - all).abs() < all / 50.0;
                assert!(near, "{idle} idle, {megabits} Mbit/s, a frame each {every} us: {found:?}");
            }
        }
    }

    /// Clients come one by one, and again some time after they were refused.
    #[test]
    fn connections_are_shared_by_weight_though_clients_pause() {
        for (idle, rate) in [(1, 50), (8, 50), (100, 50), (10_000, 50), (1, 500), (100, 500), (10_000, 500)] {
            let some = [(1, 1, 100, 100), (3, 1, 100, 100), (1, 1, 100, 100), (idle, 1, 100, 100)];
            let rates = Rates::divided(connections_rate(rate), LEAST_CONNECTIONS, &classes(&some));
            let (mut buckets, mut credits, mut let_in) = (Buckets::default(), [0; 3], [0.0; 3]);
            // Four clients of each class, who try again after 1 ms or 50.
            let mut due = [0, 1, 2, 3, 4, 5, 6, 7].map(|n| (n * 3 * MS, 1 + n as usize % 2));
            for now in (0..10_000).map(|ms| ms * MS) {
                for (at, class) in due.iter_mut().filter(|(at, _)| *at <= now) {
                    fill(&mut buckets, &rates, 1000 * MS + now);
                    let credit = &mut credits[*class];
                    *credit += buckets.take(&rates, *class as u32, LEAST_CONNECTIONS - *credit);
                    let enough = *credit >= LEAST_CONNECTIONS;
                    if enough {
                        *credit -= LEAST_CONNECTIONS;
                        let_in[*class] += 1.0;
                    }
                    *at = now + if enough { MS } else { 50 * MS };
                }
            }
            let (all, heavy) = (let_in[1] + let_in[2], let_in[1]);
            let near = (0.95..1.1).contains(&(all / f64::from(rate) / 10.0));
            assert!(
                near && (0.73..0.77).contains(&(heavy / all)),
                "{idle} idle, {rate} a second: {let_in:?}"
            );
        }
    }

    #[test]
    fn lending_borrowing_and_the_ceiling_have_limits() {
        let [_, kept] = sent(&rates(&[(3, 0, 100, 100), (1, 1, 100, 100)]), [0, 4_000], 1000 * MS);
        assert_near("nothing is lent", kept, 2.5e6);
        let [_, little] = sent(&rates(&[(3, 1, 10, 100), (1, 1, 10, 100)]), [0, 4_000], 1000 * MS);
        assert_near("its own and a tenth", little, 3.5e6);
        let [_, none] = sent(&rates(&[(3, 1, 0, 100), (1, 1, 0, 100)]), [0, 4_000], 1000 * MS);
        assert_near("its own", none, 2.5e6);
        let [_, half] = sent(&rates(&[(3, 1, 100, 50), (1, 1, 100, 50)]), [0, 4_000], 1000 * MS);
        assert_near("the ceiling", half, 5e6);
        let [low, high] = sent(&rates(&[(3, 1, 100, 20), (1, 1, 100, 100)]), [4_000, 4_000], 1000 * MS);
        assert_near("a ceiling below its share", low, 2e6);
        assert_near("what that leaves", high, 8e6);
    }

    #[test]
    fn a_class_that_is_gone_counts_as_the_default_one() {
        let rates = rates(&[(1, 1, 100, 100), (1, 1, 100, 100)]);
        let [default, other, _, gone] = sent(&rates, [4_000, 4_000, 0, 4_000], 1000 * MS);
        assert_near("together", default + gone, 5e6);
        assert_near("the other", other, 5e6);
    }

    #[test]
    fn what_is_taken_back_is_that_of_limits_only() {
        let (limited, free) = (rates(&[(1, 1, 100, 100), (1, 1, 100, 100)]), Rates::default());
        let mut hand = Credits::default();
        for (kind, class, tokens) in [
            (KIND_TO_BACKEND, 0, 5),
            (KIND_TO_BACKEND, 1, 7),
            (KIND_TO_BACKEND, 9, -2),
            (KIND_TO_CLIENT, 1, FREE),
        ] {
            hand.of[credit_index(kind, class) as usize] = tokens;
        }
        hand.of[credit_index(KIND_CONNECTIONS, 1) as usize] = 11;
        let mut taken = TakenBack::default();
        (0..2).for_each(|_| taken.note(&hand, [&limited, &free]));
        assert_eq!(taken.of[0][..3], [2 * (5 - 2), 2 * 7, 0], "who has no share took from the default one's");
        assert_eq!(taken.of[1], [0; CLASSES_MAX], "nobody's tokens");
    }

    #[test]
    fn slow_rates_are_exact_however_often_is_asked() {
        let slow = Rates::divided(bytes_rate(800_000), LEAST_BYTES, &classes(&[(1, 1, 100, 100)]));
        let [sum] = sent(&slow, [1_000], 2000 * MS);
        assert_near("800 kbit/s", sum, 2e5);
        let few = Rates::divided(connections_rate(10), LEAST_CONNECTIONS, &classes(&[(1, 1, 100, 100)]));
        let (mut buckets, mut credit, mut connections) = (Buckets::default(), 0, 0);
        for step in 0..10_000 {
            let cost = LEAST_CONNECTIONS;
            fill(&mut buckets, &few, 1000 * MS + step * MS);
            credit += buckets.take(&few, 0, cost - credit);
            if credit >= cost {
                credit -= cost;
                connections += 1;
            }
        }
        assert!((99..=102).contains(&connections), "{connections} connections in ten seconds");
        let one = Rates::divided(connections_rate(1), LEAST_CONNECTIONS, &classes(&[(1, 1, 100, 100)]));
        let (mut buckets, mut seldom) = (Buckets::default(), 0);
        for step in 0..20 {
            fill(&mut buckets, &one, 10_000 * MS + step * 700 * MS);
            seldom += buckets.take(&one, 0, LEAST_CONNECTIONS);
        }
        assert!(
            (14..=16).contains(&(seldom / LEAST_CONNECTIONS)),
            "{seldom} in 14 seconds, asked for each 0.7"
        );
    }

    #[test]
    fn what_is_owed_is_paid_first() {
        let few = Rates::divided(connections_rate(100), LEAST_CONNECTIONS, &classes(&[(1, 1, 100, 100)]));
        let mut buckets = Buckets::default();
        let take = |buckets: &mut Buckets, at: u64| {
            fill(buckets, &few, 1000 * MS + at);
            buckets.take(&few, 0, LEAST_CONNECTIONS)
        };
        assert!(take(&mut buckets, 0) >= LEAST_CONNECTIONS);
        // Twenty-six were there, so four are missing then.
        buckets.owe(&few, 0, 30 * LEAST_CONNECTIONS);
        assert_eq!(take(&mut buckets, 20 * MS), 0, "two connections later");
        assert!(take(&mut buckets, 120 * MS) >= LEAST_CONNECTIONS);
        for _ in 0..1000 {
            buckets.owe(&few, 0, LEAST_CONNECTIONS);
        }
        assert!(buckets.classes[0].own >= -depth(few.whole, LEAST_CONNECTIONS), "debts are bounded");
    }

    #[test]
    fn nothing_overflows_whatever_rate_and_clock() {
        assert_eq!(bytes_rate(8_000_000_000), SECOND);
        assert_eq!((bytes_rate(0), connections_rate(0)), (0, 0));
        assert_eq!((bytes_rate(1), connections_rate(1)), (1, 1_125_900));
        assert_eq!((bytes_rate(u64::MAX), connections_rate(u32::MAX)), (RATE_MAX, RATE_MAX));
        let all = [(u32::MAX, 1, 100, 100); CLASSES_MAX];
        for whole in [1, 1000, bytes_rate(100_000_000_000_000), RATE_MAX, u64::MAX] {
            for settings in [&all[..], &[(1, 1, 100, 100), (u32::MAX, 1, 1, 1)]] {
                let rates = Rates::divided(whole, LEAST_BYTES, &classes(settings));
                let mut buckets = Buckets::default();
                let most = depth(rates.whole, LEAST_BYTES);
                for now in [0, 1, u64::MAX, 1 << 63, (1 << 63) - 1, 5, 1 << 40, (1 << 40) + MS, 1 << 39, 0] {
                    for class in [0, 1, 15, 16, u32::MAX] {
                        let before = buckets;
                        fill(&mut buckets, &rates, now);
                        let taken = buckets.take(&rates, class, 1500 << FRACTION);
                        let portion = rates.classes[rates.sharing(class)].portion();
                        assert!((0..=(1500 << FRACTION) + portion).contains(&taken));
                        assert!(buckets.shared >= 0 && buckets.shared <= most, "{before:?} to {buckets:?}");
                        assert!(buckets.classes.iter().all(|one| one.own >= 0 && one.own <= most));
                    }
                }
            }
        }
    }

    #[test]
    fn a_clock_that_jumps_gives_no_more_than_the_buckets_hold() {
        let rates = rates(&[(1, 1, 100, 100)]);
        let mut buckets = Buckets::default();
        let full = depth(rates.whole, LEAST_BYTES);
        let mut all = |now| {
            let mut sum = 0;
            fill(&mut buckets, &rates, now);
            loop {
                let taken = buckets.take(&rates, 0, 1 << 20);
                if taken == 0 {
                    return sum;
                }
                sum += taken;
            }
        };
        assert!(all(1 << 50) <= 2 * full);
        assert!(all(1 << 60) <= 2 * full);
        assert_eq!(all(1 << 40), 0, "back: nothing");
        assert!(all((1 << 40) + 10 * MS) > 0, "and on from there");
    }

    #[test]
    fn names_are_compared_in_lower_case() {
        for first in 0..=255_u8 {
            let bytes = [first, b'A', first, b'Z', first, b'z', 0, first];
            let lowered = lower(u64::from_ne_bytes(bytes)).to_ne_bytes();
            assert_eq!(lowered, bytes.map(|byte| byte.to_ascii_lowercase()), "{bytes:?}");
        }
        for (left, expected) in (-20..20).map(|left| (left, left.clamp(0, 8) as usize)) {
            let mut kept = [0; 8];
            kept[..expected].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8][..expected]);
            let word = first_bytes(u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 7, 8]), left);
            assert_eq!(word.to_ne_bytes(), kept, "{left}");
        }
        assert_eq!(Name::new(1, "Shop.Example"), Name::new(1, "shop.example"));
        assert_ne!(Name::new(1, "a.example"), Name::new(2, "a.example"));
        assert_ne!(Name::new(1, "a.example"), Name::new(1, "a.example\0"));
        let at = |len: usize| Name::new(1, core::str::from_utf8(&[b'a'; 300][..len]).unwrap_or(""));
        assert_eq!([at(0), at(256)], [None, None]);
        assert!(at(255).is_some_and(|name| name.words[31].to_ne_bytes() == *b"aaaaaaa\0"));
    }

    #[test]
    fn ids_of_classes_are_never_nothing() {
        assert_ne!(class_id("gold"), class_id("silver"));
        assert!((0..100_000_u32).all(|n| {
            let mut name = [0; 6];
            name.iter_mut().enumerate().for_each(|(at, byte)| *byte = b'a' + (n >> (at * 4) & 15) as u8);
            class_id(core::str::from_utf8(&name).unwrap_or("")) != 0
        }));
    }
}
