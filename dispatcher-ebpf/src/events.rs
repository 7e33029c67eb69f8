//! What the daemon is told.

use aya_ebpf::{macros::map, maps::RingBuf};
use dispatcher_common::{
    abi,
    event::{EVENT_HELD, EVENT_TURN, Event},
    flow::FlowKey,
    session::SessionKey,
};

/// What the daemon finds when it looks by itself: a wake-up costs more than all else that a miss does.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(abi::EVENTS_BYTES, 0);
/// What waits for its answer.
#[map]
static HELD: RingBuf = RingBuf::with_byte_size(abi::EVENTS_BYTES, 0);

/// Wakes nobody (`BPF_RB_NO_WAKEUP` of bpf.h).
const LEAVE: u64 = 1;
/// Wakes the daemon if it has read all that came before; else it is still reading.
const WAKE: u64 = 0;

/// Writes an event; false when the ring is full.
#[inline(always)]
pub fn tell(
    kind: u16,
    class: u16,
    frontend: u32,
    backend: u32,
    slot: u32,
    (flow, session): (&FlowKey, &SessionKey),
) -> bool {
    let (ring, flags) =
        if kind == EVENT_HELD || kind == EVENT_TURN { (&HELD, WAKE) } else { (&EVENTS, LEAVE) };
    let Some(mut entry) = ring.reserve::<Event>(0) else { return false };
    let event = entry.as_mut_ptr();
    // SAFETY: the ring reserved the bytes of one event; every field is written.
    unsafe {
        (*event).kind = kind;
        (*event).class = class;
        (*event).frontend = frontend;
        (*event).backend = backend;
        (*event).slot = slot;
        (*event).flow = *flow;
        (*event).session = *session;
    }
    entry.submit(flags);
    true
}
