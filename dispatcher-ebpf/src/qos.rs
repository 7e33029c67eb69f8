//! Limits of backends, and what becomes of a class: policing of frames and connections, and DSCP.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{
        Array, HashMap, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
};
use dispatcher_common::{
    abi,
    checksum::{change, update},
    flow::{CLASS_BIT, FLAG_TO_BACKEND, Flow},
    globals::{GLOBAL_CLASSES, GLOBAL_DSCP, GLOBAL_LIMITS},
    opaque::opaque,
    qos::{
        Buckets, CLASSES_MAX, CONNECTION, CREDITS, ClassEntry, ClassStats, Credits, FRACTION, FREE,
        KIND_CONNECTIONS, KIND_TO_BACKEND, KIND_TO_CLIENT, KINDS, LIMITED_MAX, NAME_MAX, NAME_WORDS,
        NAMES_MAX, NETWORK_BITS, NETWORKS_MAX, Name, Network, Rates, TakenBack, credit_index, first_bytes,
        limit_index, limited_of, lower, stats_index,
    },
    service::FRONTEND_NAMES,
    stash::Slot,
};

use crate::{
    atomic::Word,
    globals::{HELLO, exact_ns, globals, scratch},
    packet::{Ipv4, Ipv6, View},
    parse::Layout,
    services,
};

#[map]
static CLASSES: Array<ClassEntry> = Array::with_max_entries(CLASSES_MAX as u32, 0);
#[map]
static NETWORKS: LpmTrie<Network, u32> = LpmTrie::with_max_entries(NETWORKS_MAX, BPF_F_NO_PREALLOC);
#[map]
static NAMES: HashMap<Name, u32> = HashMap::with_max_entries(NAMES_MAX, 0);
#[map]
static LIMITED: Array<u32> = Array::with_max_entries(abi::DEFAULT_BACKENDS, 0);
#[map]
static RATES: Array<Rates> = Array::with_max_entries(LIMITED_MAX * KINDS, 0);
#[map]
static BUCKETS: Array<Buckets> = Array::with_max_entries(LIMITED_MAX * KINDS, 0);
#[map]
static TOKENS: PerCpuArray<Credits> = PerCpuArray::with_max_entries(abi::DEFAULT_BACKENDS, 0);
/// The daemon's, which keeps it here because it must outlive it.
#[map]
static TAKEN_BACK: Array<TakenBack> = Array::with_max_entries(LIMITED_MAX, 0);
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
    if flags & GLOBAL_LIMITS == 0 {
        return true;
    }
    let cost = (view.len() as u64) << FRACTION;
    let at = place(flow.flags as u32, flow.class());
    spend(flow.backend, at, cost) || more(flow.backend, at, cost)
}

/// The same off the fast path, where one call costs the verifier less.
#[inline(always)]
pub fn passes_slowly(flags: u32, view: View, layout: impl Layout, flow: &Flow) -> bool {
    if flags & GLOBAL_DSCP != 0 {
        mark(view, layout, flow.class());
    }
    let cost = (view.len() as u64) << FRACTION;
    let at = place(flow.flags as u32, flow.class());
    flags & GLOBAL_LIMITS == 0
        || dispatcher_spend(flow.backend, at, cost) != 0
        || more(flow.backend, at, cost)
}

/// Where the tokens of a flow stand.
#[inline(always)]
fn place(flags: u32, class: u32) -> u32 {
    let kind = if flags & FLAG_TO_BACKEND as u32 != 0 { KIND_TO_BACKEND } else { KIND_TO_CLIENT };
    credit_index(kind, class)
}

/// [`spend`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_spend(backend: u32, at: u32, cost: u64) -> u32 {
    spend(backend, at, cost) as u32
}

/// Takes a frame's cost from what this CPU has of the tokens; false if that is not so much.
#[inline(always)]
fn spend(backend: u32, at: u32, cost: u64) -> bool {
    let Some(tokens) = tokens(backend, at) else { return false };
    let left = tokens.wrapping_sub(cost as i64);
    if left < 0 {
        return false;
    }
    *tokens = left;
    true
}

/// What this CPU has of a backend's tokens, by [`credit_index`].
#[inline(always)]
fn tokens(backend: u32, at: u32) -> Option<&'static mut i64> {
    let credits = TOKENS.get_ptr_mut(backend)?.cast::<i64>();
    let at = opaque(at as u64) as usize;
    if at >= CREDITS {
        return None;
    }
    // SAFETY: the entry belongs to this CPU, programs do not preempt one another on it, and `at` is below its length.
    Some(unsafe { &mut *credits.add(at) })
}

/// Gets more tokens for a frame and takes its cost. False when there are none.
#[inline(always)]
fn more(backend: u32, at: u32, cost: u64) -> bool {
    let limited = dispatcher_limit(backend, at, cost);
    limited == NO_LIMIT || take(backend, limited, at, cost, 0)
}

/// What [`dispatcher_limit`] says when there is none.
const NO_LIMIT: u32 = u32::MAX;

/// The number of a backend among those with limits, if it has one of the kind of tokens that is asked for. If not, there
/// are enough for this and for what comes next.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_limit(backend: u32, at: u32, cost: u64) -> u32 {
    let Some(word) = LIMITED.get(backend) else { return NO_LIMIT };
    let (limited, kinds) = limited_of(*word);
    if kinds >> (at >> 4 & 3) & 1 != 0 {
        return limited;
    }
    if let Some(tokens) = tokens(backend, at) {
        *tokens = FREE.wrapping_sub(cost as i64);
    }
    NO_LIMIT
}

/// Takes `cost` from this CPU's tokens, of which it gets more from the buckets. False when there is not so much; with
/// `owe` that is never said, and what is missing is taken from what comes later.
#[inline(always)]
fn take(backend: u32, limited: u32, at: u32, cost: u64, owe: u32) -> bool {
    let locked = dispatcher_fill(limit_index(limited, at >> 4 & 3));
    if dispatcher_take(backend, limited, at, cost, owe | locked << 1) != 0 {
        return true;
    }
    dispatcher_over(limited, at, cost);
    false
}

/// Counts what could not be taken.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_over(limited: u32, at: u32, cost: u64) -> u32 {
    let kind = at >> 4 & 3;
    if let Some(stats) = stats(limited, at & 15) {
        let bytes = cost >> FRACTION;
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

/// Locks a limit's buckets and fills them. 0 when another CPU is there.
///
/// Exported, as what follows, so that the verifier checks it once and not for every way that leads here; and many
/// small functions need less of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_fill(index: u32) -> u32 {
    let (Some(rates), Some(buckets)) = (RATES.get(index), buckets(index)) else { return 0 };
    if !Word::new(&mut buckets.lock).try_lock() {
        return 0;
    }
    let ticks = buckets.advance(rates, exact_ns());
    if ticks != 0 {
        let mut weights = 0_u64;
        for class in 0..CLASSES_MAX as u32 {
            weights = weights.wrapping_add(dispatcher_fill_class(index, class, ticks));
        }
        dispatcher_share(index, weights);
    }
    1
}

/// The buckets of a limit; their lock decides who writes.
#[inline(always)]
fn buckets(index: u32) -> Option<&'static mut Buckets> {
    // SAFETY: array entries live as long as the map.
    BUCKETS.get_ptr_mut(index).map(|buckets| unsafe { &mut *buckets })
}

/// Fills a class's buckets, see [`Buckets::fill`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_fill_class(index: u32, class: u32, ticks: u64) -> u64 {
    match (RATES.get(index), buckets(index)) {
        (Some(rates), Some(buckets)) => buckets.fill(rates, class, ticks),
        _ => 0,
    }
}

/// Gives out what ran over in locked buckets.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_share(index: u32, weights: u64) -> u32 {
    if let (Some(rates), Some(buckets)) = (RATES.get(index), buckets(index)) {
        buckets.share(rates, weights);
    }
    0
}

/// Bit of `how`: what is missing is owed.
const OWE: u32 = 1;
/// Bit of `how`: the buckets are locked; they are not any more afterwards.
const LOCKED: u32 = 2;

/// [`take`], once [`dispatcher_fill`] has done what it could.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_take(backend: u32, limited: u32, at: u32, cost: u64, how: u32) -> u32 {
    let (kind, class) = (at >> 4 & 3, at & 15);
    let index = limit_index(limited, kind);
    let Some(tokens) = tokens(backend, at) else { return 1 };
    let (Some(rates), Some(buckets)) = (RATES.get(index), buckets(index)) else { return 1 };
    let cost = cost as i64;
    let mut enough = how & OWE != 0;
    if how & LOCKED != 0 {
        *tokens = tokens.wrapping_add(buckets.take(rates, class, cost.wrapping_sub(*tokens)));
        if how & OWE != 0 && *tokens < cost {
            buckets.owe(rates, class, cost.wrapping_sub(*tokens));
            *tokens = cost;
        }
        Word::new(&mut buckets.lock).unlock();
        enough |= *tokens >= cost;
    } else {
        // Another CPU is there: this one is paid for later.
        let portion = rates.classes[rates.sharing(class)].portion();
        enough |= *tokens >= 0_i64.wrapping_sub(portion);
    }
    if enough {
        *tokens = tokens.wrapping_sub(cost);
        return 1;
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
    let limits = dispatcher_limits(backend);
    if limits == 0 {
        return true;
    }
    let (limited, kinds) = limited_of(limits);
    let at = credit_index(KIND_CONNECTIONS, class);
    let owe = if owe { OWE } else { 0 };
    if kinds >> KIND_CONNECTIONS & 1 != 0 && !take(backend, limited, at, CONNECTION << FRACTION, owe) {
        return false;
    }
    if let Some(stats) = stats(limited, class) {
        stats.connections += 1;
    }
    true
}

/// What `LIMITED` says of a backend; 0 if there are no limits.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_limits(backend: u32) -> u32 {
    match globals() {
        Ok(globals) if globals.flags & GLOBAL_LIMITS != 0 => LIMITED.get(backend).copied().unwrap_or(0),
        _ => 0,
    }
}

/// The class of a connection of a frontend from the packet in scratch memory: its session's (`Scratch::class`), that of
/// the name in its hello (`Scratch::client_hello`), its client's network's, or the service's.
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
    if id == 0 && frontend.flags & FRONTEND_NAMES != 0 {
        id = dispatcher_name_class(frontend.service);
    }
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

/// The id of the class of the name that the hello in scratch memory asks a service for, 0 for none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_name_class(service: u32) -> u32 {
    let Ok(scratch) = scratch() else { return 0 };
    let span = scratch.client_hello.server_name;
    if span.len == 0 || span.len as usize > NAME_MAX {
        return 0;
    }
    let at = opaque(span.at as u64) as usize & (HELLO / 2 - 1);
    let name = &mut scratch.name;
    name.service = service;
    name.len = span.len as u32;
    let mut left = span.len as i64;
    // Of which the compiler does not know that it could unroll it.
    for i in 0..opaque(NAME_WORDS as u64) as usize & 63 {
        let word = opaque(i as u64) as usize & (NAME_WORDS - 1);
        // SAFETY: `hello` is longer than the sum; BPF on the platforms that run XDP needs no alignment.
        let bytes = unsafe { *scratch.hello.as_ptr().add(at + word * 8).cast::<u64>() };
        name.words[word] = lower(first_bytes(bytes, left));
        left -= 8;
    }
    let name: &Name = name;
    // SAFETY: the value is copied.
    unsafe { NAMES.get(name).copied() }.unwrap_or(0)
}

/// The id of the class of a slot's connection.
#[inline(always)]
pub fn id_of(slot: &Slot) -> u16 {
    dispatcher_class_id(slot.marks >> CLASS_BIT & 15) as u16
}

/// [`id_of`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_class_id(class: u32) -> u32 {
    CLASSES.get(class).map_or(0, |class| class.id as u32)
}

/// What the class's DSCP makes of a TOS byte or traffic class; the two bits of ECN are kept (RFC 3168).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_tos(class: u32, tos: u32) -> u32 {
    let Ok(globals) = globals() else { return tos };
    match CLASSES.get(class) {
        Some(class) if class.dscp < 64 && globals.flags & GLOBAL_DSCP != 0 => {
            (class.dscp as u32) << 2 | tos & 3
        }
        _ => tos,
    }
}

/// [`dispatcher_tos`].
#[inline(always)]
fn marked(class: u32, tos: u8) -> u8 {
    dispatcher_tos(class, tos as u32) as u8
}

/// The TOS byte or traffic class of a frame that is made of a slot's content.
#[inline(always)]
pub fn slot_tos(slot: &Slot) -> u8 {
    marked(slot.marks >> CLASS_BIT & 15, slot.tos as u8)
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
