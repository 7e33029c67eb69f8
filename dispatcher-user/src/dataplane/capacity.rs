//! How large the maps are, and what they cost.

use std::fmt;

use aya::maps::{MapType, lpm_trie};
use dispatcher_common::{
    abi,
    addr::Addr,
    event::Release,
    flow::{Flow, FlowKey},
    globals::Globals,
    http,
    qos::{
        Buckets, CLASSES_MAX, ClassEntry, ClassStats, Credits, KINDS, LIMITED_MAX, NAMES_MAX, NETWORKS_MAX,
        Name, Network, Rates, TakenBack,
    },
    reason::REASONS_MAX,
    service::{Backend, BackendStats, BackendTimes, Frontend, VipKey},
    session::{Session, SessionKey},
    stash::Slot,
};

use super::Error;

/// Entries of the maps. Memory is taken at start, all of it: see [`memory_bytes`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacities {
    /// Flow entries; a connection has two.
    pub flows: u32,
    /// Sessions that servers, probes or the operator vouch for.
    pub sessions: u32,
    /// Sessions that only clients stand for.
    pub provisional: u32,
    /// VIP address/port pairs.
    pub frontends: u32,
    /// Backends.
    pub backends: u32,
    /// Entries of all load-balancing tables; each frontend takes twice its table's size.
    pub lb_table: u32,
    /// Source addresses.
    pub sources: u32,
    /// Names of cookies that services know sessions by.
    pub cookies: u32,
    /// Connections whose first bytes can wait at the same time: a power of two.
    pub stash_slots: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            flows: abi::DEFAULT_FLOWS,
            sessions: abi::DEFAULT_SESSIONS,
            provisional: abi::DEFAULT_PROVISIONAL,
            frontends: abi::DEFAULT_FRONTENDS,
            backends: abi::DEFAULT_BACKENDS,
            lb_table: abi::DEFAULT_LB_TABLE,
            sources: abi::DEFAULT_SOURCES,
            cookies: abi::DEFAULT_COOKIES,
            stash_slots: abi::DEFAULT_STASH_SLOTS,
        }
    }
}

impl Capacities {
    /// Says what is wrong, if anything is.
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |name, value, problem| Err(Error::Capacity { name, value, problem });
        for (name, value) in self.all() {
            if value == 0 {
                return wrong(name, value, "is nothing; give at least 1, or leave it out for the default");
            }
            if value > 1 << 26 {
                return wrong(name, value, "is more than 67108864, the most that we try");
            }
        }
        // A flow entry holds its frontend in 16 bits.
        if self.frontends > 1 << 16 {
            return wrong("frontends", self.frontends, "is more than 65536");
        }
        if self.cookies > MAX_COOKIES {
            return wrong("cookies", self.cookies, "is more than 1024");
        }
        if self.backends > MAX_BACKENDS {
            return wrong("backends", self.backends, "is more than 16384");
        }
        if !self.stash_slots.is_power_of_two() {
            return wrong("stash_slots", self.stash_slots, "is not a power of two; 1024, 4096 and 16384 are");
        }
        Ok(())
    }

    /// The maps whose content is of use beyond one generation of programs, and their sizes.
    pub(super) fn maps(&self) -> [Definition; 27] {
        use MapType::{Array, Hash, LpmTrie, LruHash, PerCpuArray, RingBuf};
        let limited = self.backends.min(LIMITED_MAX);
        [
            Definition::of::<FlowKey, Flow>(abi::MAP_FLOWS, LruHash, self.flows),
            Definition::of::<SessionKey, Session>(abi::MAP_SESSIONS, LruHash, self.sessions),
            Definition::of::<SessionKey, Session>(abi::MAP_PROVISIONAL, LruHash, self.provisional),
            Definition::of::<VipKey, u32>(abi::MAP_VIPS, Hash, self.frontends),
            Definition::of::<u32, Frontend>(abi::MAP_FRONTENDS, Array, self.frontends),
            Definition::of::<u32, Backend>(abi::MAP_BACKENDS, Array, self.backends * 2),
            Definition::of::<u32, u32>(abi::MAP_BACKEND_INDEX, Hash, self.backends),
            Definition::of::<u32, u32>(abi::MAP_LB_TABLE, Array, self.lb_table),
            Definition::of::<u32, Addr>(abi::MAP_SOURCES, Array, self.sources),
            Definition::of::<u32, [u8; http::TABLE]>(abi::MAP_COOKIES, Array, self.cookies),
            Definition::of::<u32, Slot>(abi::MAP_STASH, Array, self.stash_slots),
            Definition::of::<u32, Globals>(abi::MAP_GLOBALS, Array, 1),
            Definition::of::<u32, BackendStats>(abi::MAP_BACKEND_STATS, PerCpuArray, self.backends),
            Definition::of::<u32, BackendTimes>(abi::MAP_BACKEND_TIMES, PerCpuArray, self.backends),
            Definition::of::<u32, ClassEntry>(abi::MAP_CLASSES, Array, CLASSES_MAX as u32),
            Definition::of::<lpm_trie::Key<Network>, u32>(abi::MAP_NETWORKS, LpmTrie, NETWORKS_MAX),
            Definition::of::<Name, u32>(abi::MAP_NAMES, Hash, NAMES_MAX),
            Definition::of::<u32, u32>(abi::MAP_LIMITED, Array, self.backends),
            Definition::of::<u32, Rates>(abi::MAP_RATES, Array, limited * KINDS),
            Definition::of::<u32, Buckets>(abi::MAP_BUCKETS, Array, limited * KINDS),
            Definition::of::<u32, Credits>(abi::MAP_TOKENS, PerCpuArray, self.backends),
            Definition::of::<u32, TakenBack>(abi::MAP_TAKEN_BACK, Array, limited),
            Definition::of::<u32, ClassStats>(
                abi::MAP_CLASS_STATS,
                PerCpuArray,
                limited * CLASSES_MAX as u32,
            ),
            Definition::of::<u32, u64>(abi::MAP_REASONS, PerCpuArray, REASONS_MAX),
            Definition::of::<u32, Release>(abi::MAP_RELEASES, Array, abi::RELEASES_MAX),
            Definition::of::<(), ()>(abi::MAP_EVENTS, RingBuf, abi::EVENTS_BYTES),
            Definition::of::<(), ()>(abi::MAP_HELD, RingBuf, abi::EVENTS_BYTES),
        ]
    }

    /// Takes the sizes of maps that are there already.
    pub(super) fn take_over(&mut self, there: impl Fn(&str) -> Option<u32>) {
        for (map, entries) in [
            (abi::MAP_FLOWS, &mut self.flows),
            (abi::MAP_SESSIONS, &mut self.sessions),
            (abi::MAP_PROVISIONAL, &mut self.provisional),
            (abi::MAP_FRONTENDS, &mut self.frontends),
            (abi::MAP_BACKEND_INDEX, &mut self.backends),
            (abi::MAP_LB_TABLE, &mut self.lb_table),
            (abi::MAP_SOURCES, &mut self.sources),
            (abi::MAP_COOKIES, &mut self.cookies),
            (abi::MAP_STASH, &mut self.stash_slots),
        ] {
            *entries = there(map).unwrap_or(*entries);
        }
    }

    /// Name, entries here and entries there of those that differ.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<(&'static str, u32, u32)> {
        let both = self.all().into_iter().zip(other.all());
        both.filter(|(here, there)| here != there)
            .map(|((name, here), (_, there))| (name, here, there))
            .collect()
    }

    /// Every capacity by its name in the configuration.
    fn all(&self) -> [(&'static str, u32); 9] {
        [
            ("flows", self.flows),
            ("sessions", self.sessions),
            ("provisional", self.provisional),
            ("frontends", self.frontends),
            ("backends", self.backends),
            ("lb_table", self.lb_table),
            ("sources", self.sources),
            ("cookies", self.cookies),
            ("stash_slots", self.stash_slots),
        ]
    }
}

/// What a map is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Definition {
    /// Name.
    pub(super) name: &'static str,
    /// Type.
    pub(super) kind: MapType,
    /// Bytes of a key.
    pub(super) key: u32,
    /// Bytes of a value.
    pub(super) value: u32,
    /// Entries; of a ring, bytes.
    pub(super) entries: u32,
}

impl Definition {
    const fn of<K, V>(name: &'static str, kind: MapType, entries: u32) -> Self {
        Self { name, kind, key: size_of::<K>() as u32, value: size_of::<V>() as u32, entries }
    }

    /// Estimate of the kernel memory.
    fn bytes(&self, cpus: u64) -> u64 {
        let (key, value) =
            (u64::from(self.key).next_multiple_of(8), u64::from(self.value).next_multiple_of(8));
        let entries = u64::from(self.entries);
        if matches!(self.kind, MapType::Hash | MapType::LruHash) {
            entries * (HASH_ELEMENT + key + value) + entries.next_power_of_two() * HASH_BUCKET
        } else if self.kind == MapType::PerCpuArray {
            cpus * entries * value
        } else if self.kind == MapType::RingBuf {
            entries
        } else if self.kind == MapType::LpmTrie {
            // Taken when an entry is made.
            0
        } else {
            entries * value
        }
    }
}

impl fmt::Display for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name: _, kind, key, value, entries } = self;
        write!(f, "{kind:?}, keys of {key} bytes, values of {value}, {entries} entries")
    }
}

/// Most names of cookies; one takes 64 KiB.
const MAX_COOKIES: u32 = 1024;
/// Most backends that one dispatcher keeps.
pub(crate) const MAX_BACKENDS: u32 = 16_384;

/// What the kernel adds to an element of a hash map (`struct htab_elem`, Linux 6.x).
const HASH_ELEMENT: u64 = 48;
/// A bucket of a hash map.
const HASH_BUCKET: u64 = 16;

/// Estimate of the kernel memory of all maps.
#[must_use]
pub fn memory_bytes(capacities: &Capacities) -> u64 {
    let cpus = aya::util::nr_cpus().map_or(1, |cpus| cpus as u64);
    capacities.maps().iter().map(|map| map.bytes(cpus)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_costs_three_cache_lines_and_a_bucket() {
        let small = Capacities { flows: 1 << 10, ..Capacities::default() };
        let large = Capacities { flows: 1 << 11, ..Capacities::default() };
        assert_eq!(memory_bytes(&large) - memory_bytes(&small), (1 << 10) * (192 + 16));
    }

    #[test]
    fn bad_capacities_name_the_key() {
        let base = Capacities::default();
        base.check().expect("the default is fine");
        for (capacities, key) in [
            (Capacities { stash_slots: 1000, ..base }, "stash_slots"),
            (Capacities { flows: 0, ..base }, "flows"),
            (Capacities { cookies: 1025, ..base }, "cookies"),
            (Capacities { backends: MAX_BACKENDS + 1, ..base }, "backends"),
            (Capacities { frontends: 65_537, ..base }, "frontends"),
            (Capacities { sessions: u32::MAX, ..base }, "sessions"),
        ] {
            let error = capacities.check().expect_err(key).to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
