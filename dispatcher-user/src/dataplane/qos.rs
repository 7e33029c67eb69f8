//! Classes, limits of backends, client networks and server names, as the data path has them.
//!
//! The maps are the only record: what is set is compared with what they hold, and only what differs is written. Tokens
//! that are there stay there, so that a new weight takes nothing away; what CPUs have in hand is taken back, so that it
//! counts at once, and is noted, so that it does not count as passed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Mutex,
};

use aya::{
    Ebpf,
    maps::{
        MapData, PerCpuArray, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
};
use dispatcher_common::{
    abi,
    addr::Addr,
    globals::{GLOBAL_CLASSES, GLOBAL_DSCP, GLOBAL_LIMITS},
    qos::{
        Buckets, CLASSES_MAX, ClassEntry, ClassStats, Credits, DSCP_NONE, FRACTION, KIND_CONNECTIONS,
        KIND_TO_BACKEND, KIND_TO_CLIENT, KINDS, LEAST_BYTES, LEAST_CONNECTIONS, NAME_MAX, NAMES_MAX, Name,
        Network, Rates, TakenBack, bytes_rate, connections_rate, limit_index, limited_of, limited_word,
        stats_index,
    },
};

use super::{Cells, Counters, Dataplane, Error, Table, clear, lock, map_error, take_map};

/// What is set of a class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClassSetting {
    /// [`class_id`](dispatcher_common::qos::class_id) of its name; 0 is the default class.
    pub id: u16,
    /// Its part of the sum of all weights is its part of a backend's rate; at least 1.
    pub weight: u32,
    /// What it leaves of its share is given to others.
    pub lend: bool,
    /// Most that it is given beyond its own share, percent of the whole rate; 100 is no limit.
    pub borrow_limit: u8,
    /// Most that it gets in all, percent of the whole rate, 1 to 100.
    pub ceil: u8,
    /// DSCP of its frames, 0 to 63.
    pub dscp: Option<u8>,
}

impl Default for ClassSetting {
    /// The default class, where nothing is said of it.
    fn default() -> Self {
        Self { id: 0, weight: 1, lend: true, borrow_limit: 100, ceil: 100, dscp: None }
    }
}

/// Limits of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Bits a second, each way; 0 for none.
    pub bandwidth: u64,
    /// New connections a second; 0 for none.
    pub connections_per_second: u32,
}

/// The class of clients of a network at a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetworkClass {
    /// Stable id of the service.
    pub service: u32,
    /// An address of the network.
    pub address: IpAddr,
    /// Bits that all its addresses have in common, of 32 or 128.
    pub prefix: u8,
    /// Id of the class.
    pub class: u16,
}

/// The class of clients that ask a service for a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NameClass {
    /// Stable id of the service.
    pub service: u32,
    /// The name, in whatever case.
    pub name: String,
    /// Id of the class.
    pub class: u16,
}

/// What was counted of a class at a backend with limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClassCount {
    /// Id of the class, 0 for the default one. Flows of a class that is there no more count as the default one's,
    /// but what was dropped or bound of them stays with the number that they have.
    pub id: u16,
    /// Bytes to the backend and to clients that passed: taken out of the buckets, and not in a CPU's hand any more.
    /// What a CPU does in the moment in which limits change can be missing, or be 2 ms of the class's rate too much.
    /// Never less than before.
    pub bytes: [u64; 2],
    /// Of these, given to it by others: at most all of them, also where CPUs have more of that in hand.
    pub borrowed: [u64; 2],
    /// The rest, exact.
    pub stats: ClassStats,
}

/// The maps of classes and limits.
pub(super) struct Qos {
    classes: Cells<ClassEntry>,
    networks: Mutex<LpmTrie<MapData, Network, u32>>,
    names: Table<Name, u32>,
    limited: Cells<u32>,
    rates: Cells<Rates>,
    buckets: Cells<Buckets>,
    tokens: Counters<Credits>,
    taken_back: Cells<TakenBack>,
    stats: Counters<ClassStats>,
    /// Backends with limits, and their numbers: what `LIMITED` says. Held by whoever writes any of the maps.
    numbers: Mutex<BTreeMap<u32, u32>>,
    /// What was found last, by number.
    found: Mutex<BTreeMap<u32, Found>>,
}

/// Tokens with fraction, to the backend and to clients, by class.
type Passed = [[u64; CLASSES_MAX]; 2];

/// What is known of a backend's buckets beside what they hold.
#[derive(Clone, Copy, Default)]
struct Found {
    /// What had passed when it was looked at last.
    passed: Passed,
    /// Of what was borrowed, what others did whose class had the number before.
    others_borrowed: Passed,
}

/// Looks at buckets for a moment in which no CPU works on them.
const TRIES: u32 = 100;

/// From here on a difference is one to less: by no more than CPUs have in hand. Counters may turn over.
const LESS: u64 = u64::MAX - (1 << 60);

impl fmt::Debug for Qos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qos").field("numbers", &self.numbers).finish_non_exhaustive()
    }
}

impl Qos {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        let counters =
            |ebpf: &mut Ebpf, name| -> Result<PerCpuArray<MapData, Credits>, Error> { take_map(ebpf, name) };
        Ok(Self {
            classes: Cells::take(ebpf, abi::MAP_CLASSES)?,
            networks: Mutex::new(take_map(ebpf, abi::MAP_NETWORKS)?),
            names: Table::take(ebpf, abi::MAP_NAMES)?,
            limited: Cells::take(ebpf, abi::MAP_LIMITED)?,
            rates: Cells::take(ebpf, abi::MAP_RATES)?,
            buckets: Cells::take(ebpf, abi::MAP_BUCKETS)?,
            tokens: Mutex::new(counters(ebpf, abi::MAP_TOKENS)?),
            taken_back: Cells::take(ebpf, abi::MAP_TAKEN_BACK)?,
            stats: Mutex::new(take_map(ebpf, abi::MAP_CLASS_STATS)?),
            numbers: Mutex::default(),
            found: Mutex::default(),
        })
    }

    /// Reads the numbers that a daemon before us gave.
    pub(super) fn recall(&self) -> Result<(), Error> {
        let mut numbers = lock(&self.numbers);
        for backend in 0..self.limited.capacity() {
            let (number, kinds) = limited_of(self.limited.get(backend)?);
            if kinds != 0 {
                numbers.insert(backend, number);
            }
        }
        Ok(())
    }

    fn entries(&self) -> Result<[ClassEntry; CLASSES_MAX], Error> {
        let mut entries = [ClassEntry::default(); CLASSES_MAX];
        for (at, entry) in (0..).zip(&mut entries) {
            *entry = self.classes.get(at)?;
        }
        if entries[0].used == 0 {
            entries[0] = entry_of(&ClassSetting::default());
        }
        Ok(entries)
    }

    /// Writes the rates of all kinds, if any are others, and takes back what CPUs have in hand of the tokens of those
    /// before.
    fn set_rates(&self, backend: u32, number: u32, rates: &[Rates; KINDS as usize]) -> Result<(), Error> {
        let old = self.rates_of(number)?;
        if old == *rates {
            return Ok(());
        }
        for ((kind, old), rates) in (0..).zip(&old).zip(rates) {
            if old != rates {
                self.rates.set(limit_index(number, kind), *rates)?;
            }
        }
        let [to_backend, to_client, _] = &old;
        let mut taken = self.taken_back.get(number)?;
        self.hands(backend)?.iter().for_each(|hand| taken.note(hand, [to_backend, to_client]));
        self.taken_back.set(number, taken)?;
        self.empty_hands(backend)
    }

    /// What each CPU has of a backend's tokens.
    fn hands(&self, backend: u32) -> Result<PerCpuValues<Credits>, Error> {
        lock(&self.tokens).get(&backend, 0).map_err(map_error(abi::MAP_TOKENS, "reading"))
    }

    /// Takes it from them.
    fn empty_hands(&self, backend: u32) -> Result<(), Error> {
        clear(&self.tokens, backend).map_err(map_error(abi::MAP_TOKENS, "clearing"))
    }

    fn rates_of(&self, number: u32) -> Result<[Rates; KINDS as usize], Error> {
        let mut rates = [Rates::default(); KINDS as usize];
        for (kind, rates) in (0..).zip(&mut rates) {
            *rates = self.rates.get(limit_index(number, kind))?;
        }
        Ok(rates)
    }

    /// What passed of each class, with the buckets from which that is known.
    fn find(&self, backend: u32, number: u32) -> Result<(Found, [Buckets; 2]), Error> {
        let rates = self.rates_of(number)?;
        let kinds = [KIND_TO_BACKEND, KIND_TO_CLIENT];
        let (mut buckets, mut settled) = ([Buckets::default(); 2], [false; 2]);
        for (kind, at) in kinds.into_iter().zip(0..) {
            for _ in 0..TRIES {
                buckets[at] = self.buckets.get(limit_index(number, kind))?;
                // Who took what is seen above has it in hand before the lock is free. What is taken from now on is
                // in the hands read below only, so it makes the sum smaller.
                settled[at] = self.buckets.get(limit_index(number, kind))?.lock == 0;
                if settled[at] {
                    break;
                }
            }
        }
        let (hands, taken_back) = (self.hands(backend)?, self.taken_back.get(number)?);
        let mut all = lock(&self.found);
        let known = all.entry(number).or_default();
        for at in (0..2).filter(|at| settled[*at]) {
            for (class, before) in known.passed[at].iter_mut().enumerate() {
                let kept = hands.iter().map(|hand| hand.in_hand(kinds[at], &rates[at])[class]);
                let kept = kept.fold(taken_back.of[at][class], i64::wrapping_add);
                let found = buckets[at].classes[class].taken.wrapping_sub(kept as u64);
                if found.wrapping_sub(*before) <= LESS {
                    *before = found;
                }
            }
        }
        Ok((*known, buckets))
    }

    /// The counters of a class's number begin at 0: it belongs to another class from now on. The buckets count on, as
    /// the data path alone writes them, so what they have counted is taken off.
    fn count_anew(&self, backend: u32, number: u32, class: usize) -> Result<(), Error> {
        let (known, buckets) = self.find(backend, number)?;
        let mut taken = self.taken_back.get(number)?;
        for (way, of) in taken.of.iter_mut().enumerate() {
            of[class] = of[class].wrapping_add_unsigned(known.passed[way][class]);
        }
        self.taken_back.set(number, taken)?;
        let mut all = lock(&self.found);
        let known = all.entry(number).or_default();
        for (way, buckets) in buckets.iter().enumerate() {
            known.passed[way][class] = 0;
            known.others_borrowed[way][class] = buckets.classes[class].borrowed;
        }
        clear(&self.stats, stats_index(number, class as u32))
            .map_err(map_error(abi::MAP_CLASS_STATS, "clearing"))
    }
}

/// The id of the class that has a number, or had it last; 0 for a fresh one.
const fn owner(entry: &ClassEntry) -> u32 {
    if entry.used == 0 { entry.weight } else { entry.id as u32 }
}

/// Numbers that others have than before.
fn handed_on(
    old: &[ClassEntry; CLASSES_MAX],
    new: &[ClassEntry; CLASSES_MAX],
) -> impl Iterator<Item = usize> {
    (1..CLASSES_MAX).filter(|at| owner(&old[*at]) != 0 && owner(&old[*at]) != owner(&new[*at]))
}

fn entry_of(setting: &ClassSetting) -> ClassEntry {
    ClassEntry {
        id: setting.id,
        dscp: setting.dscp.unwrap_or(DSCP_NONE),
        lends: u8::from(setting.lend),
        weight: setting.weight,
        borrow_limit: setting.borrow_limit,
        ceil: setting.ceil,
        used: 1,
        pad: 0,
    }
}

fn wrong<T>(problem: String) -> Result<T, Error> {
    Err(Error::Qos(problem))
}

/// Says what is wrong with settings, if anything is.
fn check(settings: &[ClassSetting]) -> Result<(), Error> {
    let mut ids = BTreeSet::from([0]);
    for one in settings {
        let ClassSetting { id, weight, borrow_limit, ceil, dscp, lend: _ } = *one;
        if id != 0 && !ids.insert(id) {
            return wrong(format!("two classes have the id {id}; give one another name"));
        }
        if weight == 0 {
            return wrong(format!("class {id} has the weight 0; give at least 1, or remove the class"));
        }
        if borrow_limit > 100 || ceil > 100 || ceil == 0 {
            return wrong(format!(
                "class {id} may borrow {borrow_limit} % and get {ceil} %; 100 is all, and the second is at least 1"
            ));
        }
        if dscp.is_some_and(|dscp| dscp > 63) {
            return wrong(format!("class {id} has a DSCP above 63, the highest"));
        }
    }
    if ids.len() > CLASSES_MAX {
        return wrong(format!(
            "{} classes; {} beside the default one are possible",
            ids.len() - 1,
            CLASSES_MAX - 1
        ));
    }
    Ok(())
}

/// The entries that settings make of those that are there. A class keeps its number, which flows have, and gets it back
/// when it comes again; the number of one that is gone is given to another when there is no fresh one.
fn entries_of(settings: &[ClassSetting], old: &[ClassEntry; CLASSES_MAX]) -> [ClassEntry; CLASSES_MAX] {
    let mut entries = *old;
    let default = settings.iter().find(|one| one.id == 0).copied().unwrap_or_default();
    entries[0] = entry_of(&default);
    for entry in entries.iter_mut().skip(1) {
        if entry.used != 0 && !settings.iter().any(|one| one.id == entry.id) {
            // The id in the place of the weight tells whose the number was.
            *entry = ClassEntry { weight: entry.id.into(), ..ClassEntry::default() };
        }
    }
    for setting in settings.iter().filter(|one| one.id != 0) {
        let others = 1..CLASSES_MAX;
        let at = others.clone().find(|at| entries[*at].used != 0 && entries[*at].id == setting.id);
        let own =
            others.clone().find(|at| entries[*at].used == 0 && entries[*at].weight == u32::from(setting.id));
        let fresh = others.clone().find(|at| entries[*at].weight == 0);
        let free = others.clone().find(|at| entries[*at].used == 0);
        if let Some(at) = at.or(own).or(fresh).or(free) {
            entries[at] = entry_of(setting);
        }
    }
    // Flows of classes that are gone are the default one's.
    let dscp = entries[0].dscp;
    entries.iter_mut().filter(|one| one.used == 0).for_each(|one| one.dscp = dscp);
    entries
}

impl Dataplane {
    /// Sets the classes: those that are not named are gone. Their flows count as the default class's, which has the
    /// id 0 and the weight 1 where nothing is said of it.
    pub fn set_classes(&self, settings: &[ClassSetting]) -> Result<(), Error> {
        check(settings)?;
        let qos = &self.qos;
        let numbers = lock(&qos.numbers);
        let before = qos.entries()?;
        let entries = entries_of(settings, &before);
        // While the number is still the old one's, or nobody's: a daemon that ends here does it again.
        for class in handed_on(&before, &entries) {
            for (backend, number) in numbers.iter() {
                qos.count_anew(*backend, *number, class)?;
            }
        }
        for (at, entry) in (0..).zip(&entries) {
            if qos.classes.get(at)? != *entry {
                qos.classes.set(at, *entry)?;
            }
        }
        for (backend, number) in numbers.iter() {
            let rates =
                qos.rates_of(*number)?.map(|there| Rates::divided(there.whole, there.least, &entries));
            qos.set_rates(*backend, *number, &rates)?;
        }
        let several = entries.iter().skip(1).any(|one| one.used != 0);
        let marks = entries.iter().any(|one| one.used != 0 && one.dscp != DSCP_NONE);
        self.set_flags(GLOBAL_CLASSES | GLOBAL_DSCP, [(several, GLOBAL_CLASSES), (marks, GLOBAL_DSCP)])
    }

    /// The ids of the classes by their numbers, which flows have; 0 where there is none.
    pub fn class_ids(&self) -> Result<[u16; CLASSES_MAX], Error> {
        Ok(self.qos.entries()?.map(|entry| entry.id))
    }

    /// Sets the limits of a backend.
    pub fn set_limits(&self, backend: u32, limits: Limits) -> Result<(), Error> {
        let qos = &self.qos;
        let mut numbers = lock(&qos.numbers);
        let rates = [
            (KIND_TO_BACKEND, bytes_rate(limits.bandwidth), LEAST_BYTES),
            (KIND_TO_CLIENT, bytes_rate(limits.bandwidth), LEAST_BYTES),
            (KIND_CONNECTIONS, connections_rate(limits.connections_per_second), LEAST_CONNECTIONS),
        ];
        let kinds = rates.iter().filter(|one| one.1 != 0).fold(0, |kinds, one| kinds | 1 << one.0);
        if kinds == 0 {
            if numbers.remove(&backend).is_some() {
                qos.limited.set(backend, 0)?;
            }
        } else {
            let entries = qos.entries()?;
            let given = numbers.get(&backend).copied();
            let number = match given {
                Some(number) => number,
                None => {
                    let used: BTreeSet<u32> = numbers.values().copied().collect();
                    let most = qos.rates.capacity() / KINDS;
                    let Some(number) = (0..most).find(|number| !used.contains(number)) else {
                        return wrong(format!("more than {most} backends have limits; that is the most"));
                    };
                    // What a backend before it left there.
                    for kind in 0..KINDS {
                        qos.buckets.set(limit_index(number, kind), Buckets::default())?;
                    }
                    for class in 0..CLASSES_MAX as u32 {
                        clear(&qos.stats, stats_index(number, class))
                            .map_err(map_error(abi::MAP_CLASS_STATS, "clearing"))?;
                    }
                    qos.taken_back.set(number, TakenBack::default())?;
                    lock(&qos.found).remove(&number);
                    number
                }
            };
            let rates = rates.map(|(_, rate, least)| Rates::divided(rate, least, &entries));
            qos.set_rates(backend, number, &rates)?;
            let word = limited_word(number, kinds);
            if qos.limited.get(backend)? != word {
                qos.limited.set(backend, word)?;
                // What CPUs were given while there was no limit. A frame that is under way now may have the last of it.
                qos.empty_hands(backend)?;
            }
            numbers.insert(backend, number);
        }
        self.set_flags(GLOBAL_LIMITS, [(!numbers.is_empty(), GLOBAL_LIMITS)])
    }

    /// Sets the classes of client networks, of all services together.
    pub fn set_networks(&self, networks: &[NetworkClass]) -> Result<(), Error> {
        let wanted: BTreeMap<(u32, [u8; 20]), u32> = networks
            .iter()
            .map(|one| {
                let bits = if one.address.is_ipv4() { one.prefix.min(32) + 96 } else { one.prefix.min(128) };
                (network_key(one.service, one.address, bits), u32::from(one.class))
            })
            .collect();
        let mut trie = lock(&self.qos.networks);
        let failed = |action| map_error(abi::MAP_NETWORKS, action);
        let mut there = BTreeMap::new();
        for entry in trie.iter() {
            let (key, class) = entry.map_err(failed("reading"))?;
            there.insert((key.prefix_len(), bytes_of(&key.data())), class);
        }
        for (key, class) in &wanted {
            if there.get(key) != Some(class) {
                trie.insert(&trie_key(key), class, 0).map_err(failed("inserting"))?;
            }
        }
        for key in there.keys().filter(|key| !wanted.contains_key(key)) {
            trie.remove(&trie_key(key)).map_err(failed("removing"))?;
        }
        Ok(())
    }

    /// Sets the classes of server names, of all services together. Of a name that is given twice the first counts.
    pub fn set_names(&self, names: &[NameClass]) -> Result<(), Error> {
        let mut wanted = BTreeMap::new();
        for one in names {
            let Some(key) = Name::new(one.service, &one.name) else {
                return wrong(format!("\"{}\" is no server name: 1 to {NAME_MAX} bytes are", one.name));
            };
            wanted.entry(key).or_insert(u32::from(one.class));
        }
        if wanted.len() > NAMES_MAX as usize {
            return wrong(format!("{} server names have classes; {NAMES_MAX} are possible", wanted.len()));
        }
        let table = &self.qos.names;
        let there: BTreeMap<Name, u32> = table.iter().collect();
        // First, so that there is room for what comes.
        for key in there.keys().filter(|key| !wanted.contains_key(key)) {
            table.remove(key)?;
        }
        for (key, class) in wanted.into_iter().filter(|(key, class)| there.get(key) != Some(class)) {
            table.insert(key, class)?;
        }
        Ok(())
    }

    /// What was counted of each class at a backend, the default class first; nothing of a backend without limits.
    pub fn class_stats(&self, backend: u32) -> Result<Vec<ClassCount>, Error> {
        let qos = &self.qos;
        let numbers = lock(&qos.numbers);
        let Some(number) = numbers.get(&backend) else { return Ok(Vec::new()) };
        let (known, buckets) = qos.find(backend, *number)?;
        let mut counts = Vec::new();
        for (at, entry) in qos.entries()?.iter().enumerate() {
            if entry.used == 0 {
                continue;
            }
            let bytes = known.passed.map(|classes| classes[at] >> FRACTION);
            let borrowed = |way: usize| {
                let own = buckets[way].classes[at].borrowed.wrapping_sub(known.others_borrowed[way][at]);
                (own >> FRACTION).min(bytes[way])
            };
            let values = lock(&qos.stats)
                .get(&stats_index(*number, at as u32), 0)
                .map_err(map_error(abi::MAP_CLASS_STATS, "reading"))?;
            let stats = values.iter().fold(ClassStats::default(), |sum, one| ClassStats {
                connections: sum.connections + one.connections,
                connections_over: sum.connections_over + one.connections_over,
                dropped_to_backend: sum.dropped_to_backend + one.dropped_to_backend,
                dropped_to_backend_bytes: sum.dropped_to_backend_bytes + one.dropped_to_backend_bytes,
                dropped_to_client: sum.dropped_to_client + one.dropped_to_client,
                dropped_to_client_bytes: sum.dropped_to_client_bytes + one.dropped_to_client_bytes,
            });
            counts.push(ClassCount { id: entry.id, bytes, borrowed: [borrowed(0), borrowed(1)], stats });
        }
        Ok(counts)
    }

    /// Sets some of the flags to these, if they are others.
    fn set_flags<const N: usize>(&self, mask: u32, flags: [(bool, u32); N]) -> Result<(), Error> {
        let wanted = flags.iter().filter(|one| one.0).fold(0, |all, one| all | one.1);
        if self.globals().flags & mask == wanted {
            return Ok(());
        }
        self.update_globals(|globals| globals.flags = globals.flags & !mask | wanted)
    }
}

/// Bits, and the bytes of a [`Network`] with nothing behind them.
fn network_key(service: u32, address: IpAddr, bits: u8) -> (u32, [u8; 20]) {
    let mut bytes = bytes_of(&Network { service, addr: Addr::from(address) });
    for (at, byte) in bytes.iter_mut().skip(4).enumerate() {
        let kept = usize::from(bits).saturating_sub(at * 8).min(8);
        *byte &= !(0xff_u16 >> kept) as u8;
    }
    (u32::from(bits) + 32, bytes)
}

fn bytes_of(network: &Network) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&network.service.to_ne_bytes());
    bytes[4..].copy_from_slice(&network.addr.octets());
    bytes
}

fn trie_key((bits, bytes): &(u32, [u8; 20])) -> Key<Network> {
    let [a, b, c, d, address @ ..] = *bytes;
    Key::new(*bits, Network { service: u32::from_ne_bytes([a, b, c, d]), addr: Addr::from_octets(address) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(id: u16, weight: u32) -> ClassSetting {
        ClassSetting { id, weight, ..ClassSetting::default() }
    }

    #[test]
    fn bad_settings_are_refused_with_words() {
        let many: Vec<ClassSetting> = (1..=16).map(|id| class(id, 1)).collect();
        for (settings, word) in [
            (vec![class(1, 0)], "weight 0"),
            (vec![class(1, 1), class(1, 2)], "two classes"),
            (vec![ClassSetting { ceil: 0, ..class(1, 1) }], "at least 1"),
            (vec![ClassSetting { borrow_limit: 101, ..class(1, 1) }], "100 is all"),
            (vec![ClassSetting { dscp: Some(64), ..class(1, 1) }], "DSCP"),
            (many.clone(), "15 beside the default one"),
        ] {
            let error = check(&settings).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
        check(&many[..15]).expect("15 are possible");
        check(&[class(1, u32::MAX), class(2, u32::MAX)]).expect("weights cannot overflow");
    }

    #[test]
    fn classes_keep_their_numbers_and_old_ones_are_given_last() {
        let none = [ClassEntry::default(); CLASSES_MAX];
        let first = entries_of(&[class(7, 1), class(8, 2)], &none);
        assert_eq!([first[0].used, first[1].used, first[2].used, first[3].used], [1, 1, 1, 0]);
        let second = entries_of(&[class(9, 1), class(8, 3)], &first);
        assert_eq!((second[1].used, second[2].id, second[2].weight, second[3].id), (0, 8, 3, 9));
        let back = entries_of(&[class(7, 5), class(8, 3), class(9, 1)], &second);
        assert_eq!([1, 2, 3].map(|at| (back[at].id, back[at].weight)), [(7, 5), (8, 3), (9, 1)]);
        let all: Vec<ClassSetting> = (20..34).chain([8]).map(|id| class(id, 1)).collect();
        let third = entries_of(&all, &second);
        assert!(third.iter().all(|one| one.used == 1));
        assert_eq!(third[2].id, 8);
        // Of all numbers those of 7 and 9 alone have another class now.
        let handed = |old, new| handed_on(old, new).collect::<Vec<_>>();
        assert_eq!(handed(&second, &third).len(), 2);
        assert_eq!([handed(&none, &first), handed(&first, &second), handed(&second, &back)], [[0; 0]; 3]);
    }

    #[test]
    fn networks_lose_what_is_behind_their_prefix() {
        let (bits, bytes) = network_key(5, IpAddr::from([10, 1, 255, 3]), 96 + 20);
        assert_eq!(bits, 32 + 96 + 20);
        assert_eq!(bytes[16..], [10, 1, 240, 0]);
        assert_eq!(trie_key(&(bits, bytes)).data().addr, Addr::from(IpAddr::from([10, 1, 240, 0])));
        let (bits, bytes) = network_key(5, "2001:db8:ffff::1".parse().expect("an address"), 0);
        assert_eq!((bits, bytes[4..].iter().sum::<u8>()), (32, 0));
    }
}
