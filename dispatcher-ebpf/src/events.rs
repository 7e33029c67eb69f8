//! What the daemon is told.

use aya_ebpf::{macros::map, maps::RingBuf};
use dispatcher_common::{
    abi,
    event::{EVENT_HELD, EVENT_REJECTED, Event},
    flow::FlowKey,
    session::SessionKey,
};

#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(abi::EVENTS_BYTES, 0);

/// The daemon is woken (`BPF_RB_FORCE_WAKEUP` of bpf.h): it must act.
const WAKE: u64 = 2;
/// The daemon finds it when it looks by itself (`BPF_RB_NO_WAKEUP`): a wake-up costs more than all else
/// that a miss does.
const LEAVE: u64 = 1;

/// Writes an event; false when the ring is full.
#[inline(always)]
pub fn tell(kind: u32, frontend: u32, backend: u32, slot: u32, flow: &FlowKey, session: &SessionKey) -> bool {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else { return false };
    let event = entry.as_mut_ptr();
    // SAFETY: the ring reserved the bytes of one event; every field is written.
    unsafe {
        (*event).kind = kind;
        (*event).frontend = frontend;
        (*event).backend = backend;
        (*event).slot = slot;
        (*event).flow = *flow;
        (*event).session = *session;
    }
    let acts = kind == EVENT_HELD || kind == EVENT_REJECTED;
    entry.submit(if acts { WAKE } else { LEAVE });
    true
}
