//! How large the maps are, and what they cost.

use dispatcher_common::{
    abi,
    addr::Addr,
    event::Release,
    flow::{Flow, FlowKey},
    globals::Globals,
    http,
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
        let all = [
            ("flows", self.flows),
            ("sessions", self.sessions),
            ("provisional", self.provisional),
            ("frontends", self.frontends),
            ("backends", self.backends),
            ("lb_table", self.lb_table),
            ("sources", self.sources),
            ("cookies", self.cookies),
            ("stash_slots", self.stash_slots),
        ];
        for (name, value) in all {
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

    /// The maps whose size is ours to say.
    pub(super) fn maps(&self) -> [(&'static str, u32); 16] {
        [
            (abi::MAP_FLOWS, self.flows),
            (abi::MAP_SESSIONS, self.sessions),
            (abi::MAP_PROVISIONAL, self.provisional),
            (abi::MAP_VIPS, self.frontends),
            (abi::MAP_FRONTENDS, self.frontends),
            (abi::MAP_BACKENDS, self.backends * 2),
            (abi::MAP_BACKEND_INDEX, self.backends),
            (abi::MAP_LB_TABLE, self.lb_table),
            (abi::MAP_SOURCES, self.sources),
            (abi::MAP_COOKIES, self.cookies),
            (abi::MAP_STASH, self.stash_slots),
            (abi::MAP_BACKEND_STATS, self.backends),
            (abi::MAP_BACKEND_TIMES, self.backends),
            (abi::MAP_REASONS, REASONS_MAX),
            (abi::MAP_EVENTS, abi::EVENTS_BYTES),
            (abi::MAP_RELEASES, abi::RELEASES_MAX),
        ]
    }
}

/// Most names of cookies; one takes 64 KiB.
const MAX_COOKIES: u32 = 1024;
/// Most backends that one dispatcher keeps.
pub(super) const MAX_BACKENDS: u32 = 16_384;

/// What the kernel adds to an element of a hash map (`struct htab_elem`, Linux 6.x).
const HASH_ELEMENT: u64 = 48;
/// A bucket of a hash map.
const HASH_BUCKET: u64 = 16;

/// Estimate of the kernel memory of all maps.
#[must_use]
pub fn memory_bytes(capacities: &Capacities) -> u64 {
    let cpus = aya::util::nr_cpus().map_or(1, |cpus| cpus as u64);
    let c = capacities;
    hash::<FlowKey, Flow>(c.flows)
        + hash::<SessionKey, Session>(c.sessions)
        + hash::<SessionKey, Session>(c.provisional)
        + hash::<VipKey, u32>(c.frontends)
        + hash::<u32, u32>(c.backends)
        + array::<Frontend>(c.frontends)
        + array::<Backend>(c.backends * 2)
        + array::<u32>(c.lb_table)
        + array::<Addr>(c.sources)
        + array::<[u8; http::TABLE]>(c.cookies)
        + array::<Slot>(c.stash_slots)
        + array::<Globals>(1)
        + array::<Release>(abi::RELEASES_MAX)
        + cpus
            * (array::<u64>(REASONS_MAX)
                + array::<BackendStats>(c.backends)
                + array::<BackendTimes>(c.backends))
        + u64::from(abi::EVENTS_BYTES)
}

fn hash<K, V>(entries: u32) -> u64 {
    let element = HASH_ELEMENT + padded::<K>() + padded::<V>();
    u64::from(entries) * element + u64::from(entries.next_power_of_two()) * HASH_BUCKET
}

fn array<V>(entries: u32) -> u64 {
    u64::from(entries) * padded::<V>()
}

fn padded<T>() -> u64 {
    (size_of::<T>() as u64).next_multiple_of(8)
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
