//! The flow table.

use aya_ebpf::{macros::map, maps::LruHashMap};
use dispatcher_common::{
    abi,
    flow::{Flow, FlowKey, ports_swapped},
    reason::Reason,
};

#[map]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(abi::DEFAULT_FLOWS, 0);

/// Fail when the key is there.
const NOEXIST: u64 = 1;

/// The entry of a packet.
#[inline(always)]
pub fn get(key: &FlowKey) -> Option<&'static mut Flow> {
    // SAFETY: entries of a preallocated hash stay valid memory while the program runs; fields are
    // words that two CPUs may write, each write whole.
    FLOWS.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

/// Writes an entry, whether there is one or not.
#[inline(always)]
pub fn put(key: &FlowKey, flow: &Flow) -> Result<(), Reason> {
    FLOWS.insert(key, flow, 0).map_err(|_| Reason::FlowTable)
}

/// Writes an entry if there is none; false when there is one.
#[inline(always)]
pub fn add(key: &FlowKey, flow: &Flow) -> bool {
    FLOWS.insert(key, flow, NOEXIST).is_ok()
}

/// Forgets an entry.
#[inline(always)]
pub fn remove(key: &FlowKey) {
    let _ = FLOWS.remove(key);
}

/// Key of the other direction's entry: what comes back when `flow` has been applied.
#[inline(always)]
pub fn peer_key(flow: &Flow, proto: u32) -> FlowKey {
    FlowKey { src: flow.dst(), dst: flow.src(), ports: ports_swapped(flow.ports), proto }
}

/// The same, into memory that is there.
#[inline(always)]
pub fn set_peer_key(flow: &Flow, proto: u32, key: &mut FlowKey) {
    flow.dst().store(&mut key.src.words);
    flow.src().store(&mut key.dst.words);
    key.ports = ports_swapped(flow.ports);
    key.proto = proto;
}

/// The other direction's entry.
#[inline(always)]
pub fn peer(flow: &Flow, proto: u32) -> Option<&'static mut Flow> {
    get(&peer_key(flow, proto))
}
