//! Limits of backends, and what becomes of a class: policing of frames and connections, and DSCP.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{
        Array, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
};
use dispatcher_common::{
    abi,
    checksum::{change, update},
    flow::{FLAG_TO_BACKEND, Flow},
    globals::{GLOBAL_CLASSES, GLOBAL_DSCP, GLOBAL_LIMITS},
    opaque::opaque,
    qos::{
        Buckets, CLASSES_MAX, CONNECTION, CREDITS, ClassEntry, ClassStats, Credit, Credits, FRACTION,
        KIND_CONNECTIONS, KIND_TO_BACKEND, KIND_TO_CLIENT, KINDS, LIMITED_MAX, NETWORK_BITS, NETWORKS_MAX,
        Network, Rates, credit_index, limit_index, limited_of, stats_index,
    },
    stash::Slot,
};

use crate::{
    atomic::Word,
    globals::{exact_ns, globals, scratch},
    packet::{Ipv4, Ipv6, View},
    parse::Layout,
    services,
};

#[map]
static CLASSES: Array<ClassEntry> = Array::with_max_entries(CLASSES_MAX as u32, 0);
#[map]
static NETWORKS: LpmTrie<Network, u32> = LpmTrie::with_max_entries(NETWORKS_MAX, BPF_F_NO_PREALLOC);
#[map]
static LIMITED: Array<u32> = Array::with_max_entries(abi::DEFAULT_BACKENDS, 0);
#[map]
static RATES: Array<Rates> = Array::with_max_entries(LIMITED_MAX * KINDS, 0);
#[map]
static BUCKETS: Array<Buckets> = Array::with_max_entries(LIMITED_MAX * KINDS, 0);
#[map]
static CREDIT: PerCpuArray<Credits> = PerCpuArray::with_max_entries(LIMITED_MAX, 0);
#[map]
static CLASS_STATS: PerCpuArray<ClassStats> =
    PerCpuArray::with_max_entries(LIMITED_MAX * CLASSES_MAX as u32, 0);

/// What is done to a translated packet of a flow where [`GLOBAL_QOS`](dispatcher_common::globals::GLOBAL_QOS) says
/// that there is something: marked with its class's DSCP, and counted. False when it is over its backend's rate.
#[inline(always)]
pub fn passes(flags: u32, view: View, layout: impl Layout, flow: &Flow) -> bool {
    if flags & GLOBAL_DSCP != 0 {
        mark(view, layout, flow.class());
    }
    flags & GLOBAL_LIMITS == 0 || spend(flow, view.len())
}

/// Takes a frame's length from this CPU's credit; false when there is not enough, nor more to be had.
#[inline(always)]
fn spend(flow: &Flow, len: usize) -> bool {
    let kind = if flow.flags & FLAG_TO_BACKEND != 0 { KIND_TO_BACKEND } else { KIND_TO_CLIENT };
    let Some((limited, at)) = limit_of(flow.backend, kind, flow.class()) else { return true };
    let Some(credit) = credit(limited, at) else { return true };
    let cost = (len as u64) << FRACTION;
    let left = credit.tokens.wrapping_sub(cost as i64);
    if left >= 0 {
        credit.tokens = left;
        return true;
    }
    dispatcher_take(limited, at, cost, 0) != 0
}

/// The number of a backend among those with limits, and the place of a class's credit, if it has this kind.
#[inline(always)]
fn limit_of(backend: u32, kind: u32, class: u32) -> Option<(u32, u32)> {
    let (limited, kinds) = limited_of(LIMITED.get(backend).copied()?);
    if kinds >> kind & 1 == 0 {
        return None;
    }
    Some((limited, credit_index(kind, class)))
}

/// This CPU's credit.
#[inline(always)]
fn credit(limited: u32, at: u32) -> Option<&'static mut Credit> {
    let credits = CREDIT.get_ptr_mut(limited)?.cast::<Credit>();
    let at = opaque(at as u64) as usize & (CREDITS - 1);
    // SAFETY: the entry belongs to this CPU, programs do not preempt one another on it, and `at` is below its length.
    Some(unsafe { &mut *credits.add(at) })
}

/// Takes `cost` from this CPU's credit, which gets more from the buckets. 0 when there is not so much; with `owe`
/// that is never said, and what is missing is taken from what comes later.
///
/// Exported, so that the verifier checks it once and not for every way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_take(limited: u32, at: u32, cost: u64, owe: u32) -> u32 {
    let (kind, class) = (at >> 4 & 3, at & 15);
    let index = limit_index(limited, kind);
    let Some(credit) = credit(limited, at) else { return 1 };
    let (Some(rates), Some(buckets)) = (RATES.get(index), BUCKETS.get_ptr_mut(index)) else { return 1 };
    // SAFETY: array entries live as long as the map; the lock decides who writes.
    let buckets = unsafe { &mut *buckets };
    let lock = Word::new(&mut buckets.lock);
    let cost = cost as i64;
    let mut enough = owe != 0;
    if lock.try_lock() {
        let taken = buckets.take(rates, class, cost.wrapping_sub(credit.tokens), exact_ns());
        credit.tokens = credit.tokens.wrapping_add(taken.tokens);
        credit.portion = taken.portion;
        if owe != 0 && credit.tokens < cost {
            buckets.owe(rates, class, cost.wrapping_sub(credit.tokens));
            credit.tokens = cost;
        }
        lock.unlock();
        enough |= credit.tokens >= cost;
    } else {
        // Another CPU is there: this one is paid for later.
        enough |= credit.tokens >= 0_i64.wrapping_sub(credit.portion);
    }
    if enough {
        credit.tokens = credit.tokens.wrapping_sub(cost);
        return 1;
    }
    if let Some(stats) = stats(limited, class) {
        let bytes = (cost >> FRACTION) as u64;
        if kind == KIND_TO_BACKEND {
            stats.dropped_to_backend += 1;
            stats.dropped_to_backend_bytes = stats.dropped_to_backend_bytes.wrapping_add(bytes);
        } else if kind == KIND_TO_CLIENT {
            stats.dropped_to_client += 1;
            stats.dropped_to_client_bytes = stats.dropped_to_client_bytes.wrapping_add(bytes);
        } else {
            stats.connections_over += 1;
        }
    }
    0
}

/// This CPU's counters of a class.
#[inline(always)]
fn stats(limited: u32, class: u32) -> Option<&'static mut ClassStats> {
    // SAFETY: the entry belongs to this CPU, and programs do not preempt one another on it.
    CLASS_STATS.get_ptr_mut(stats_index(limited, class)).map(|stats| unsafe { &mut *stats })
}

/// True when a backend may be given a connection of a class now; with `owe` it is given it in any case.
#[inline(always)]
pub fn connects(backend: u32, class: u32, owe: bool) -> bool {
    dispatcher_connect(backend, class, owe as u32) != 0
}

/// [`connects`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_connect(backend: u32, class: u32, owe: u32) -> u32 {
    let Ok(globals) = globals() else { return 1 };
    if globals.flags & GLOBAL_LIMITS == 0 {
        return 1;
    }
    let Some((limited, kinds)) = LIMITED.get(backend).map(|word| limited_of(*word)) else { return 1 };
    if kinds == 0 {
        return 1;
    }
    let at = credit_index(KIND_CONNECTIONS, class);
    if kinds >> KIND_CONNECTIONS & 1 != 0 && dispatcher_take(limited, at, CONNECTION << FRACTION, owe) == 0 {
        return 0;
    }
    if let Some(stats) = stats(limited, class) {
        stats.connections += 1;
    }
    1
}

/// The class of a connection of a frontend from the packet in scratch memory: its session's (`Scratch::class`), its
/// client's network's, or the service's.
#[inline(always)]
pub fn class(frontend: u32) -> u32 {
    dispatcher_class(frontend)
}

/// [`class`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_class(frontend: u32) -> u32 {
    let (Ok(globals), Ok(scratch)) = (globals(), scratch()) else { return 0 };
    if globals.flags & GLOBAL_CLASSES == 0 {
        return 0;
    }
    let Ok(frontend) = services::frontend(frontend) else { return 0 };
    let mut id = scratch.class;
    if id == 0 {
        let addr = &scratch.packet.key.src.words;
        let words = [NETWORK_BITS, frontend.service, addr[0], addr[1], addr[2], addr[3]];
        // SAFETY: the words of a `Key<Network>`, which needs no alignment.
        let key = unsafe { &*words.as_ptr().cast::<Key<Network>>() };
        id = NETWORKS.get(key).copied().unwrap_or(0);
    }
    if id == 0 {
        id = frontend.class() as u32;
    }
    if id == 0 {
        return 0;
    }
    for index in 1..CLASSES_MAX as u32 {
        if let Some(class) = CLASSES.get(index)
            && class.id as u32 == id
        {
            return index;
        }
    }
    0
}

/// What the class's DSCP makes of a TOS byte or traffic class; the two bits of ECN are kept (RFC 3168).
#[inline(always)]
fn marked(class: u32, tos: u8) -> u8 {
    match CLASSES.get(class) {
        Some(class) if class.dscp < 64 => class.dscp << 2 | tos & 3,
        _ => tos,
    }
}

/// The TOS byte or traffic class of a frame that is made of a slot's content.
#[inline(always)]
pub fn slot_tos(slot: &Slot) -> u8 {
    let tos = slot.tos as u8;
    match globals() {
        Ok(globals) if globals.flags & GLOBAL_DSCP != 0 => marked(slot.marks >> 4 & 15, tos),
        _ => tos,
    }
}

/// Gives a packet the DSCP of its class.
#[inline(always)]
fn mark(view: View, layout: impl Layout, class: u32) {
    if layout.is_v4() {
        let Some(ip) = view.ptr::<Ipv4>(layout.l3()) else { return };
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        let word = |tos: u8| u16::from_ne_bytes([ip.version, tos]) as u32;
        let tos = marked(class, ip.tos);
        let changes = change(word(ip.tos), word(tos));
        ip.tos = tos;
        ip.check = update(ip.check, changes);
    } else {
        let Some(ip) = view.ptr::<Ipv6>(layout.l3()) else { return };
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        let head = u32::from_be(ip.head);
        let tos = marked(class, (head >> 20) as u8);
        ip.head = (head & !(0xff << 20) | (tos as u32) << 20).to_be();
    }
}
