//! The first data of a connection: checked, kept, and bound once enough of it is there.

use aya_ebpf::{macros::map, maps::Array};
use dispatcher_common::{
    abi::{self, STAGE_ANSWER},
    cookie,
    flow::{FLAG_SYN_SENT, FlowKey, Link, MARK_SECURE},
    globals::GLOBAL_NO_CLONES,
    opaque::opaque,
    proxy::ROOM,
    reason::Reason,
    service::FRONTEND_OVER_HOLD,
    stash::{
        BUF, EMITTED, OFFSET_MAX, PAYLOAD_MAX, SEGMENT_MAX, SLOT_LIFE_NS, STAGE_BOUND, STAGE_FILLING,
        STAGE_FREE, STAGE_HELD, STAGE_REPLAYED, Slot,
    },
    tcp::{ACK, FIN, RST},
    tls::{self, Bytes, Scan},
};

use crate::{
    atomic::Word,
    bind, control,
    emit::sum_bytes,
    flows,
    globals::{daemon_lives, exact_ns, globals, now_ns, scratch},
    http, options,
    packet::{Frame, Ipv4, Ipv6, Tcp},
    parse::{Parsed, packet_end},
    pipeline,
    reply::{self, pseudo},
    services, syn,
    verdict::Verdict,
};

#[map]
static STASH: Array<Slot> = Array::with_max_entries(abi::DEFAULT_STASH_SLOTS, 0);

/// Segments after which a hello that still is not whole is bound by what was seen.
const SEGMENTS_MAX: u32 = 32;
/// Clones that have not left by then never will, nanoseconds.
const LEAVING_LIMIT_NS: u64 = 100_000_000;
/// How long is waited for a slot that another CPU works on, nanoseconds, and the looks at its lock that
/// this takes at most.
const LOCK_LIMIT_NS: u64 = 20_000;
const LOCK_TRIES: u32 = 500;
/// A held hello whose client retransmits after so long goes by the table, nanoseconds.
const HELD_LIMIT_NS: u64 = 100_000_000;
/// The daemon refuses one that waits for its turn after 2.5 s: about one that is still there then it is asked again.
const QUEUED_LIMIT_NS: u64 = 2_600_000_000;

/// What [`take`] says when the slot's content is enough to choose a backend; never counted.
const ENOUGH: Reason = Reason::NoStage;

/// A slot by its number.
#[inline(always)]
pub fn slot(index: u32) -> Result<&'static mut Slot, Reason> {
    let slot = STASH.get_ptr_mut(index).ok_or(Reason::Internal)?;
    // SAFETY: array entries live as long as the map; `lock` decides who writes.
    Ok(unsafe { &mut *slot })
}

/// Runs `work` with the slot locked, or not at all when another CPU keeps it.
///
/// The lock covers the slot, and the flow that awaits its backend with this slot.
#[inline(always)]
pub fn locked(index: u32, work: impl FnOnce(&mut Slot) -> Verdict) -> Verdict {
    let slot = slot(index)?;
    if dispatcher_lock_slot(index) == 0 {
        return Verdict(Reason::StashBusy);
    }
    let result = work(slot);
    Word::new(&mut slot.lock).unlock();
    result
}

/// Locks a slot. 0 when another CPU does not leave it: less time is needed for a segment than is waited.
///
/// Exported, so that the verifier checks it once and not for every way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn dispatcher_lock_slot(index: u32) -> u32 {
    let Ok(slot) = slot(index) else { return 0 };
    let lock = Word::new(&mut slot.lock);
    if lock.try_lock() {
        return 1;
    }
    let began = exact_ns();
    for _ in 0..LOCK_TRIES {
        if lock.is_zero() && lock.try_lock() {
            return 1;
        }
        if exact_ns().wrapping_sub(began) > LOCK_LIMIT_NS {
            break;
        }
    }
    0
}

/// What [`dispatcher_lock_earlier`] says when another CPU has the slot.
pub const NOT_LOCKED: u32 = u32::MAX;

/// Locks the slot that the flow of a locked slot has, which may be an earlier one, and returns it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn dispatcher_lock_earlier(index: u32) -> u32 {
    let Ok(slot) = slot(index) else { return NOT_LOCKED };
    let Some(flow) = flows::get(&slot.key) else { return index };
    let earlier = flow.slot;
    if earlier == index || dispatcher_lock_slot(earlier) != 0 { earlier } else { NOT_LOCKED }
}

/// Undoes [`dispatcher_lock_earlier`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn dispatcher_unlock_earlier(index: u32, earlier: u32) -> u32 {
    if earlier != index
        && let Ok(slot) = slot(earlier)
    {
        Word::new(&mut slot.lock).unlock();
    }
    0
}

/// A hash of a flow, for the choice of slots and table entries. Not secret: the cookie has been
/// checked before it matters.
#[inline(always)]
pub fn mix(key: &FlowKey) -> u64 {
    let mut h = key.ports as u64;
    for i in 0..4 {
        h = (h ^ key.src.words[i] as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^= h >> 29;
    }
    h = (h ^ key.dst.words[3] as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h ^ h >> 32
}

/// Slots that a flow may have, of which it takes the first that is free. With four, one connection of 250 finds none
/// in a stash that is a quarter full; with two it would be one of 16.
const PLACES: u32 = 4;

/// What [`dispatcher_find_slot`] looks for.
const KEPT: u32 = 0;
const FREE: u32 = 1;
const HELD: u32 = 2;
/// None of the flow's slots is what was looked for.
const NO_SLOT: u32 = u32::MAX;

/// The first slot of the packet's flow that is `wanted`, not locked: [`KEPT`] has this connection's data, [`FREE`] may be
/// taken, [`HELD`] waits for the daemon and has all that came before this segment. Else [`NO_SLOT`].
///
/// Exported, so that the verifier checks it once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn dispatcher_find_slot(wanted: u32) -> u32 {
    let (Ok(globals), Ok(scratch)) = (globals(), scratch()) else { return NO_SLOT };
    let (p, segment) = (&scratch.packet, &scratch.segment);
    let hash = mix(&p.key);
    let mut at = hash as u32;
    for _ in 0..PLACES {
        let index = at & globals.stash_mask;
        let Ok(slot) = slot(index) else { return NO_SLOT };
        let found = match wanted {
            FREE => is_free(slot, p, segment.now),
            HELD => waits(slot, p, segment.seq),
            _ => keeps(slot, p, segment.ack.wrapping_sub(1)),
        };
        if found {
            return index;
        }
        // Odd, so that no place comes twice.
        at = at.wrapping_add((hash >> 32) as u32 | 1);
    }
    NO_SLOT
}

/// The payload in a slot, as the parsers read it.
pub struct Payload<'a> {
    /// The slot.
    pub slot: &'a Slot,
}

impl Bytes for Payload<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.slot.len as usize
    }
    #[inline(always)]
    fn byte(&self, at: usize) -> Option<u8> {
        let at = opaque(at as u64) as usize;
        if at >= BUF - ROOM || at >= self.slot.len as usize {
            return None;
        }
        // SAFETY: `at` is below the length of the payload part of `buf`.
        Some(unsafe { *self.slot.buf.as_ptr().add(ROOM + at) })
    }
    #[inline(always)]
    fn byte_or_any(&self, at: usize) -> u8 {
        let at = opaque(at as u64) as usize;
        if at >= BUF - ROOM {
            return 0;
        }
        // SAFETY: `at` is below the length of the payload part of `buf`.
        unsafe { *self.slot.buf.as_ptr().add(ROOM + at) }
    }
    #[inline(always)]
    fn salt(&self) -> u64 {
        self.slot.stamp
    }
}

/// A segment with payload: where it stands.
#[repr(C)]
pub struct Segment {
    at: usize,
    len: usize,
    now: u64,
    seq: u32,
    ack: u32,
    /// The slot, and whether it has this connection's data.
    index: u32,
    known: u32,
    /// For a new slot: the client's ISN, and what its cookie carries.
    isn: u32,
    options: u32,
}

/// Takes a segment of a connection that is not established.
#[inline(always)]
pub fn first_data(frame: &Frame, p: &Parsed, frontend: u32) -> Verdict {
    let verdict = collect(frame, p, frontend);
    if !verdict.is(Reason::Held) {
        return verdict;
    }
    let index = scratch()?.segment.index;
    let slot = slot(index)?;
    // Not while the slot is locked: the daemon's answer can come at once.
    if bind::ask(index, slot) {
        return verdict;
    }
    // Too much waits for the daemon.
    locked(index, |slot| bind::bind(frame, slot, index, bind::ANY))
}

/// True for a segment of a client that goes: RST, or a FIN without data.
#[inline(always)]
pub fn leaves(frame: &Frame, p: &Parsed) -> bool {
    let Some(tcp) = frame.view().ptr::<Tcp>(p.l4()) else { return false };
    // SAFETY: `ptr` checked the bounds.
    let flags = unsafe { (*tcp).flags };
    flags & RST != 0 || flags & FIN != 0 && !control::has_payload(frame, p)
}

/// Frees the slot in which the hello of a client that goes is held, so that it is not let in later. As for an
/// established connection (RFC 5961), the segment must stand right behind what came before it.
#[inline(always)]
pub fn left(frame: &Frame, p: &Parsed) -> Verdict {
    let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let (seq, flags) = unsafe { (u32::from_be((*tcp).seq), (*tcp).flags) };
    scratch()?.segment.seq = seq;
    let index = dispatcher_find_slot(HELD);
    if index != NO_SLOT {
        let _ = locked(index, |slot| {
            if waits(slot, p, seq) {
                slot.stage = STAGE_FREE;
            }
            Verdict(Reason::ResetIgnored)
        });
    }
    if flags & RST != 0 {
        return Verdict(Reason::ResetIgnored);
    }
    reply::reset(frame, p)?;
    Verdict(Reason::ResetClient)
}

/// Keeps the segment in the connection's slot, or in a new one, and binds it if there is enough of it.
#[inline(always)]
fn collect(frame: &Frame, p: &Parsed, frontend: u32) -> Verdict {
    let globals = globals()?;
    options::read(frame, p)?;
    let parsed = &scratch()?.parsed;
    let view = frame.view();
    let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &*tcp };
    let at = p.l4() + (tcp.offset >> 4) as usize * 4;
    let end = packet_end(view, p).ok_or(Reason::BadIp)?;
    if end <= at {
        return Verdict(Reason::BadTransport);
    }
    let segment = &mut scratch()?.segment;
    segment.at = at;
    segment.len = end - at;
    segment.now = now_ns();
    segment.seq = u32::from_be(tcp.seq);
    segment.ack = u32::from_be(tcp.ack);
    let our_isn = segment.ack.wrapping_sub(1);

    segment.index = dispatcher_find_slot(KEPT);
    segment.known = u32::from(segment.index != NO_SLOT);
    if segment.known == 0 {
        if is_answered(&p.key) {
            return pipeline::stage(STAGE_ANSWER);
        }
        // Our SYN-ACK's timestamp was the client's ISN: each segment tells its own place. Without
        // timestamps only the first can be told.
        let told = parsed.ts != 0 && (segment.seq.wrapping_sub(parsed.tsecr) as usize) < PAYLOAD_MAX;
        let isn = if told { parsed.tsecr } else { segment.seq.wrapping_sub(1) };
        let mut options = cookie::Options { mss: 0, wscale: 0, sack: false };
        let worth = syn::check(globals, &p.key, isn, our_isn, &mut options);
        if worth == syn::ADDRESS && parsed.ts == 0 {
            return Verdict(Reason::BeforeFirst);
        }
        if worth != syn::FULL {
            // Not ours, or of a flow that was forgotten.
            reply::reset(frame, p)?;
            return Verdict(Reason::ResetClient);
        }
        segment.index = dispatcher_find_slot(FREE);
        if segment.index == NO_SLOT {
            return Verdict(Reason::StashFull);
        }
        segment.isn = isn;
        segment.options = u32::from(options.pack());
    }
    keep(frame, p, frontend)
}

/// Puts a segment to its slot, which was found.
#[inline(always)]
fn keep(frame: &Frame, p: &Parsed, frontend: u32) -> Verdict {
    let segment = &scratch()?.segment;
    let index = segment.index;
    let known = segment.known != 0;
    let our_isn = segment.ack.wrapping_sub(1);
    locked(index, |slot| {
        let still = if known { keeps(slot, p, our_isn) } else { is_free(slot, p, segment.now) };
        if !still {
            // Another CPU had the slot in the meantime. Its backend has answered, or it is another flow's.
            return if known { pipeline::stage(STAGE_ANSWER) } else { Verdict(Reason::StashBusy) };
        }
        if !known {
            let options = cookie::Options::unpack(segment.options as u8);
            claim(frame, p, slot, segment.isn, our_isn);
            slot.frontend = frontend;
            slot.mss = cookie::mss_of(options.mss);
            slot.wscale = options.wscale;
            slot.sack = options.sack as u8;
        }
        let verdict = take(frame, p, slot, segment);
        if verdict.is(ENOUGH) { bind::bind(frame, slot, index, bind::ANY) } else { verdict }
    })
}

/// True when the slot has what a connection sent so far, and waits for more or for a backend.
#[inline(always)]
fn keeps(slot: &Slot, p: &Parsed, our_isn: u32) -> bool {
    slot.key == p.key && slot.cookie == our_isn && slot.stage != STAGE_FREE && slot.stage != STAGE_REPLAYED
}

/// True when the slot has what a connection sent so far, the daemon was asked about it, and the next byte is `seq`.
#[inline(always)]
fn waits(slot: &Slot, p: &Parsed, seq: u32) -> bool {
    slot.key == p.key && slot.stage == STAGE_HELD && seq == slot.isn.wrapping_add(1).wrapping_add(slot.len)
}

/// True when a flow may take the slot.
#[inline(always)]
fn is_free(slot: &Slot, p: &Parsed, now: u64) -> bool {
    let replayed = slot.stage == STAGE_REPLAYED;
    slot.stage == STAGE_FREE
        || replayed && is_sent(slot)
        || !replayed && slot.key == p.key
        || now.wrapping_sub(slot.stamp) > SLOT_LIFE_NS
}

/// True when a backend answers for this flow: what its client sends needs no slot any more.
#[inline(always)]
fn is_answered(key: &FlowKey) -> bool {
    flows::get(key).is_some_and(|flow| flow.flags & FLAG_SYN_SENT == 0)
}

/// True when nothing of a replayed slot is on its way any more: its clones have passed, as many as it takes.
#[inline(always)]
fn is_sent(slot: &Slot) -> bool {
    let all = (ROOM as u32).wrapping_add(slot.len).wrapping_sub(slot.start);
    let clones = slot.emitted / EMITTED;
    clones >= abi::REPLAY_WIDTH || clones.wrapping_mul(slot.chunk) >= all
}

/// True when a replayed slot's clones are on their way: those that still are after so long were lost.
#[inline(always)]
pub fn is_leaving(slot: &Slot) -> bool {
    slot.stage == STAGE_REPLAYED && !is_sent(slot) && now_ns().wrapping_sub(slot.stamp) < LEAVING_LIMIT_NS
}

/// Makes a slot this flow's.
#[inline(always)]
fn claim(frame: &Frame, p: &Parsed, slot: &mut Slot, isn: u32, our_isn: u32) {
    slot.stage = STAGE_FILLING;
    slot.key = p.key;
    slot.isn = isn;
    slot.cookie = our_isn;
    slot.len = 0;
    slot.ahead_end = 0;
    slot.segments = 0;
    slot.rebinds = 0;
    slot.marks = 0;
    slot.start = ROOM as u32;
    slot.session.len = 0;
    slot.client = client_link(frame, p);
}

/// How frames reach the sender of this one: back the way it came.
#[inline(always)]
pub fn client_link(frame: &Frame, p: &Parsed) -> Link {
    // Known zeros would become calls of a byte-wise `memset`.
    let none = opaque(0) as u32;
    let mut link = Link { ifindex: frame.ingress(), macs: [none; 3], vlans: [none; 2] };
    let view = frame.view();
    if let Some(m) = view.read::<[u16; 6]>(0) {
        let word = |a: u16, b: u16| a as u32 | (b as u32) << 16;
        link.macs = [word(m[3], m[4]), word(m[5], m[0]), word(m[1], m[2])];
    }
    if p.tags() > 0
        && let Some(tag) = view.read::<u32>(12)
    {
        link.vlans[0] = tag;
    }
    if p.tags() > 1
        && let Some(tag) = view.read::<u32>(16)
    {
        link.vlans[1] = tag;
    }
    link
}

/// Keeps a segment in a locked slot. [`ENOUGH`] when the slot can be bound.
#[inline(never)]
fn take(frame: &Frame, p: &Parsed, slot: &mut Slot, segment: &Segment) -> Verdict {
    let scratch = scratch()?;
    let stage = slot.stage;
    let offset = opaque(segment.seq.wrapping_sub(slot.isn).wrapping_sub(1) as u64) as usize;
    let len = opaque(segment.len as u64) as usize;
    if offset > OFFSET_MAX || len > SEGMENT_MAX || len == 0 || offset + len > PAYLOAD_MAX {
        if stage == STAGE_FILLING && slot.len > 0 && offset < 0x8000 {
            // Longer than the stash: bound by what was seen; the client sends the rest again.
            return Verdict(ENOUGH);
        }
        return Verdict(Reason::StashBeyond);
    }

    // The checksum covers what will be sent with a checksum of ours: it must have been right.
    let header = opaque((segment.at - p.l4()) as u64) as usize & 0x3f;
    if header < size_of::<Tcp>() || !frame.load(p.l4(), scratch.old.as_mut_ptr(), header) {
        return Verdict(Reason::BadTransport);
    }
    if !frame.load(segment.at, scratch.payload.as_mut_ptr(), len) {
        return Verdict(Reason::BadTransport);
    }
    for i in 0..3 {
        scratch.payload[(len + i) & 4095] = 0;
    }
    let sum = sum_bytes(scratch.old.as_ptr(), header)
        + sum_bytes(scratch.payload.as_ptr(), len)
        + pseudo(p, header + len);
    if dispatcher_common::checksum::fold(sum) != 0xffff {
        return Verdict(Reason::BadChecksum);
    }
    // SAFETY: `offset` and `len` are bounded so that the segment lies in `buf`.
    if !frame.load(segment.at, unsafe { slot.buf.as_mut_ptr().add(ROOM + offset) }, len) {
        return Verdict(Reason::BadTransport);
    }

    let before = slot.len;
    merge(slot, offset as u32, (offset + len) as u32)?;
    slot.segments = slot.segments.wrapping_add(1);
    slot.tsval = scratch.parsed.tsval;
    slot.ts = scratch.parsed.ts;
    note_header(frame, p, slot);
    let age = segment.now.wrapping_sub(slot.stamp);
    if stage != STAGE_HELD {
        slot.stamp = segment.now;
    }

    match stage {
        STAGE_BOUND => {
            // The client repeats itself: the SYN or its answer was lost.
            Verdict(if slot.len == before { ENOUGH } else { Reason::Stashed })
        }
        STAGE_HELD => {
            if age <= HELD_LIMIT_NS {
                return Verdict(Reason::Stashed);
            }
            let frontend = services::frontend(slot.frontend)?;
            if frontend.flags & FRONTEND_OVER_HOLD == 0 || !daemon_lives(globals()?) {
                return Verdict(ENOUGH);
            }
            // Where connections are held until their turn comes, the daemon's word is waited for.
            if age <= QUEUED_LIMIT_NS {
                return Verdict(Reason::Stashed);
            }
            slot.stamp = segment.now;
            Verdict(Reason::Held)
        }
        _ => {
            let frontend = services::frontend(slot.frontend)?;
            let (marks, whole) = match tls::scan_client_hello(&Payload { slot }) {
                Scan::NotTls => http::request(frontend, segment.index),
                Scan::Complete => (MARK_SECURE, true),
                Scan::Partial => (MARK_SECURE, false),
            };
            slot.marks = marks as u32;
            // What is acknowledged must be kept, and a window that closes would stop the client.
            if whole || slot.segments >= SEGMENTS_MAX || slot.len as usize > PAYLOAD_MAX - SEGMENT_MAX {
                return Verdict(ENOUGH);
            }
            // A client that waits for an acknowledgment (Nagle) would never send the rest. Where
            // frames cannot be cloned it must be able to send everything again.
            if slot.len == before || globals()?.flags & GLOBAL_NO_CLONES != 0 {
                return Verdict(Reason::Stashed);
            }
            acknowledge(frame, p, slot)
        }
    }
}

/// Notes the fields of the client's headers that the backend shall see.
#[inline(always)]
fn note_header(frame: &Frame, p: &Parsed, slot: &mut Slot) {
    let view = frame.view();
    if let Some(tcp) = view.ptr::<Tcp>(p.l4()) {
        // SAFETY: `ptr` checked the bounds.
        slot.window = u16::from_be(unsafe { (*tcp).window });
    }
    if p.is_v4() {
        if let Some(ip) = view.ptr::<Ipv4>(p.l3()) {
            // SAFETY: `ptr` checked the bounds.
            let ip = unsafe { &*ip };
            slot.tos = ip.tos as u32;
            slot.ttl = ip.ttl.wrapping_sub(1);
        }
    } else if let Some(ip) = view.ptr::<Ipv6>(p.l3()) {
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &*ip };
        slot.tos = u32::from_be(ip.head) >> 20 & 0xff;
        slot.ttl = ip.hops.wrapping_sub(1);
    }
}

/// Adds a range to what the slot holds: a run from the start, and one piece ahead of it.
#[inline(always)]
fn merge(slot: &mut Slot, from: u32, to: u32) -> Result<(), Reason> {
    if from > slot.len {
        if slot.ahead_end == 0 {
            slot.ahead_start = from;
            slot.ahead_end = to;
        } else if from <= slot.ahead_end && to >= slot.ahead_start {
            slot.ahead_start = slot.ahead_start.min(from);
            slot.ahead_end = slot.ahead_end.max(to);
        } else {
            return Err(Reason::BeforeFirst);
        }
        return Ok(());
    }
    slot.len = slot.len.max(to);
    if slot.ahead_end != 0 && slot.ahead_start <= slot.len {
        slot.len = slot.len.max(slot.ahead_end);
        slot.ahead_end = 0;
    }
    Ok(())
}

/// Acknowledges what the slot holds so far.
#[inline(always)]
fn acknowledge(frame: &Frame, p: &Parsed, slot: &Slot) -> Verdict {
    let frontend = services::frontend(slot.frontend)?;
    let room = PAYLOAD_MAX as u32 - slot.len;
    let scale = if slot.wscale == cookie::NO_WSCALE { 0 } else { frontend.wscale as u32 & 15 };
    let answer = reply::Segment {
        seq: slot.cookie.wrapping_add(1),
        ack: slot.isn.wrapping_add(1).wrapping_add(slot.len),
        flags: ACK,
        window: (room >> scale) as u16,
        ts: slot.ts,
        tsval: slot.isn,
        tsecr: slot.tsval,
    };
    reply::segment(frame, p, &answer)?;
    Verdict(Reason::AckedPart)
}
