//! Services in clear that know a session by an HTTP cookie: read in the first request, learned from
//! every response that sets it.

use aya_ebpf::{helpers::generated::bpf_probe_read_kernel, macros::map, maps::Array};
use dispatcher_common::{
    abi,
    flow::{Flow, MARK_HTTP, MARK_SECURE},
    http::{END, FOUND, NOT_HTTP, PAUSED, REQUEST, RESPONSE, RESPONSE_SKIP, SEEDS, TABLE, VALUE},
    opaque::opaque,
    proxy::ROOM,
    service::Frontend,
    session::{COOKIE_LEN, ID_MAX, KIND_COOKIE},
    stash::{OFFER_COOKIE, PAYLOAD_MAX, Slot},
};

use crate::{
    globals::{HELLO, PAYLOAD, Scratch, scratch},
    packet::{Frame, Tcp},
    parse::{Parsed, packet_end},
    stash,
};

#[map]
static COOKIES: Array<[u8; TABLE]> = Array::with_max_entries(abi::DEFAULT_COOKIES, 0);

/// Bytes between two looks whether the header has ended: so many NULs follow what is read.
const STRIDE: usize = 8;
/// Cookies that one packet of a response may set.
pub const SET_MAX: u32 = 4;

/// Walks what is in `Scratch::hello` from offset `from` to `to`, as `Scratch::reader` goes on.
///
/// Exported, so that the verifier checks it once and not for every way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_walk_header(cookie: u32, from: u32, to: u32) -> u32 {
    let Ok(scratch) = scratch() else { return 0 };
    let Some(table) = COOKIES.get(cookie.wrapping_sub(1)) else { return 0 };
    let mut reader = scratch.reader;
    reader.at = 0;
    let from = opaque(from as u64) as usize & (HELLO / 2 - 1);
    let to = to as usize & (HELLO / 2 - 1);
    for block in 0..PAYLOAD_MAX.div_ceil(STRIDE) {
        if from + block * STRIDE >= to || reader.ended() {
            break;
        }
        for i in 0..STRIDE {
            // SAFETY: both are below half the buffer's size.
            let byte = unsafe { *scratch.hello.as_ptr().add(from + (block * STRIDE + i)) };
            reader.step(table, byte);
        }
    }
    scratch.reader = reader;
    1
}

/// Reads the first request of a slot; the cookie's hash goes to what the slot offers. Its marks, and
/// whether all that is needed was there.
#[inline(always)]
pub fn request(frontend: &Frontend, index: u32) -> (u8, bool) {
    if frontend.cookie == 0 {
        return (0, true);
    }
    let state = dispatcher_read_request(index, frontend.cookie) as u8;
    match state {
        FOUND => (MARK_HTTP | MARK_SECURE, true),
        NOT_HTTP => (0, true),
        _ => (MARK_HTTP, state == END),
    }
}

/// [`request`]: the state in which the walk ended.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_read_request(index: u32, cookie: u32) -> u32 {
    let (Ok(slot), Ok(scratch)) = (stash::slot(index), scratch()) else { return END as u32 };
    slot.offer.flags = 0;
    let mut len = opaque(slot.len as u64) as usize;
    if len > PAYLOAD_MAX {
        len = PAYLOAD_MAX;
    }
    // SAFETY: `buf` is longer than `ROOM` and the payload, `hello` than the payload.
    let copied = len != 0
        && unsafe {
            bpf_probe_read_kernel(
                scratch.hello.as_mut_ptr().cast(),
                len as u32,
                slot.buf.as_ptr().add(ROOM).cast(),
            ) == 0
        };
    if !copied {
        return END as u32;
    }
    pad(scratch, len);
    scratch.reader.state = REQUEST;
    scratch.reader.hash = SEEDS;
    dispatcher_walk_header(cookie, 0, len as u32);
    let state = scratch.reader.state;
    if state == FOUND {
        slot.offer.flags = OFFER_COOKIE;
        store_id(scratch.reader.hash, &mut slot.offer.id);
    }
    state as u32
}

/// NULs behind what will be walked.
#[inline(always)]
fn pad(scratch: &mut Scratch, len: usize) {
    let len = opaque(len as u64) as usize & (HELLO / 2 - 1);
    for i in 0..STRIDE {
        // SAFETY: the sum is below the size of `hello`.
        unsafe { *scratch.hello.as_mut_ptr().add(len + i) = opaque(0) as u8 };
    }
}

/// A cookie's hash as an identifier of 16 bytes, zero-filled.
#[inline(always)]
fn store_id(hash: [u64; 2], id: &mut [u8; ID_MAX]) {
    // SAFETY: 32 bytes; BPF on the platforms that run XDP needs no alignment.
    let words = unsafe { &mut *id.as_mut_ptr().cast::<[u64; 4]>() };
    words[0] = hash[0];
    words[1] = hash[1];
    words[2] = opaque(0);
    words[3] = opaque(0);
}

/// True when a packet of the backend may have a part of a response's header: what stands at the start of
/// its payload looks like one, or the last header was not whole.
#[inline(always)]
pub fn may_set(frame: &Frame, p: &Parsed, flow: &Flow) -> bool {
    let view = frame.view();
    let Some(tcp) = view.ptr::<Tcp>(p.l4()) else { return false };
    // SAFETY: `ptr` checked the bounds.
    let at = p.l4() + unsafe { (*tcp).offset >> 4 } as usize * 4;
    flow.tries != 0 || view.read::<u32>(opaque(at as u64) as usize & 0x1ff) == Some(BEGINNING)
}

/// The first word of every response.
const BEGINNING: u32 = u32::from_ne_bytes(*b"HTTP");

/// Brings a packet's payload to `Scratch::hello`; its length, 0 when it cannot be read.
#[inline(always)]
pub fn payload(frame: &Frame, p: &Parsed) -> u32 {
    let (Ok(scratch), view) = (scratch(), frame.view()) else { return 0 };
    let (Some(tcp), Some(end)) = (view.ptr::<Tcp>(p.l4()), packet_end(view, p)) else { return 0 };
    // SAFETY: `ptr` checked the bounds.
    let at = p.l4() + unsafe { (*tcp).offset >> 4 } as usize * 4;
    if end <= at {
        return 0;
    }
    let len = opaque((end - at) as u64) as usize;
    if len == 0 || len >= PAYLOAD || !frame.load(at, scratch.hello.as_mut_ptr(), len) {
        return 0;
    }
    pad(scratch, len);
    len as u32
}

/// Prepares the reading of a response's header, or of its next part: `flow.tries` keeps the state
/// between packets, and the slot, while it is the flow's, the hash of a value that is cut.
#[inline(always)]
pub fn begin(flow: &mut Flow, slot: &Slot, ours: bool) {
    let Ok(scratch) = scratch() else { return };
    // SAFETY: the buffer is longer, and BPF on the platforms that run XDP needs no alignment.
    let first = unsafe { *scratch.hello.as_ptr().cast::<u32>() };
    let reader = &mut scratch.reader;
    reader.hash = SEEDS;
    reader.state = if first == BEGINNING { RESPONSE } else { flow.tries };
    if reader.state == 0 {
        // A header begins at the start of a packet, or this one is not read.
        reader.state = NOT_HTTP;
    } else if reader.state == PAUSED || reader.state == VALUE {
        if ours {
            // SAFETY: 32 bytes, as above.
            reader.hash = unsafe { *slot.offer.id.as_ptr().cast::<[u64; 2]>() };
        } else {
            reader.state = NOT_HTTP;
        }
    }
}

/// Goes on to the next cookie that the response sets: true when there is one, its identifier is then in
/// the scratch key.
#[inline(always)]
pub fn next_cookie(cookie: u32, from: &mut u32, to: u32) -> bool {
    let Ok(scratch) = scratch() else { return false };
    dispatcher_walk_header(cookie, *from, to);
    if scratch.reader.state != FOUND {
        return false;
    }
    scratch.session_key.kind = KIND_COOKIE;
    scratch.session_key.len = COOKIE_LEN;
    store_id(scratch.reader.hash, &mut scratch.session_key.id);
    *from = opaque(*from as u64) as u32 + scratch.reader.at;
    scratch.reader.state = RESPONSE_SKIP;
    scratch.reader.hash = SEEDS;
    true
}

/// Notes how far the reading came.
#[inline(always)]
pub fn end(flow: &mut Flow, slot: &mut Slot, ours: bool) {
    let Ok(scratch) = scratch() else { return };
    let state = scratch.reader.state;
    flow.tries = if state < END { state } else { 0 };
    if ours {
        store_id(scratch.reader.hash, &mut slot.offer.id);
    }
}
