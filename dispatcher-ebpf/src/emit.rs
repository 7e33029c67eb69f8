//! Builds frames toward a backend out of a stash slot: the SYN, and the stashed data.
//!
//! A SYN-ACK is too short to become a full segment where drivers give small buffers (veth), so it
//! is broadcast to a replay map: the kernel clones it into whole pages, and the `emit` program, at
//! the exit, turns clone *n* into piece *n* of the stashed stream.

use aya_ebpf::{
    bindings::xdp_action::XDP_REDIRECT,
    helpers::generated::{bpf_csum_diff, bpf_redirect_map},
    macros::map,
    maps::DevMap,
};
use dispatcher_common::{
    abi::{REPLAY_MARK as MARK, REPLAY_WIDTH, SINGLE_WIDTH},
    addr::V4_MAPPED,
    checksum::fold,
    cookie::NO_WSCALE,
    flow::ports_swapped,
    opaque::opaque,
    proxy::ROOM,
    reason::Reason,
    stash::{BUF, EMITTED, STAGE_BOUND, STAGE_REPLAYED, Slot},
    tcp::{ACK, PSH, RST, SYN, TIMESTAMP_WORD, scale_window},
};

use crate::{
    atomic::Word, globals::scratch, packet::Frame, parse::TCP, qos, reply::TTL, rewrite::tags_of, stash,
    verdict::Verdict,
};

macro_rules! replay_maps {
    ($width:ident: $($name:ident)*) => {$(
        #[map]
        static $name: DevMap = DevMap::with_max_entries($width, 0);
    )*};
}
replay_maps!(REPLAY_WIDTH: REPLAY0 REPLAY1 REPLAY2 REPLAY3 REPLAY4 REPLAY5 REPLAY6 REPLAY7);
replay_maps!(SINGLE_WIDTH: SINGLE0 SINGLE1 SINGLE2 SINGLE3 SINGLE4 SINGLE5 SINGLE6 SINGLE7);

/// Send to every entry of the device map (kernel 5.14).
const BPF_F_BROADCAST: u64 = 8;
/// Offset of the IP header in `Scratch::header`, and the same in words.
const IP_AT: usize = 32;
const IP_WORD: usize = IP_AT / 4;
/// Longest piece for which a SYN-ACK has room before its start.
const IN_PLACE_MAX: u32 = 160;
/// Longest piece that is emitted.
const PIECE_MAX: usize = 1500;
/// Largest offset in a slot's buffer at which a piece begins.
const FROM_MAX: usize = BUF - PIECE_MAX - 64;
/// `bpf_csum_diff` took no more than this before kernel 6.13.
const CSUM_MAX: usize = 512;

/// The segment to be built. Numbers in host order.
#[derive(Clone, Copy)]
pub struct Piece {
    seq: u32,
    ack: u32,
    from: u32,
    len: u32,
    flags: u8,
    window: u16,
}

/// The SYN of a bound slot.
#[inline(always)]
pub fn syn(frame: &Frame, slot: &Slot) -> Result<(), Reason> {
    // The window of a SYN is never scaled (RFC 7323 section 2.2), that of the client's data was.
    let scale = if slot.wscale == NO_WSCALE { 0 } else { slot.wscale as i8 };
    let piece = Piece {
        seq: first_seq(slot),
        ack: 0,
        from: 0,
        len: 0,
        flags: SYN,
        window: scale_window(slot.window, scale),
    };
    build(frame, slot, &piece)
}

/// A RST to the client of a slot that is given up: it is made as if the client were the backend.
#[inline(always)]
pub fn reset(frame: &Frame, slot: &mut Slot) -> Result<(), Reason> {
    slot.key.dst.store(&mut slot.src.words);
    slot.key.src.store(&mut slot.dst.words);
    slot.ports = ports_swapped(slot.key.ports);
    slot.link = slot.client;
    slot.ttl = TTL;
    slot.ts = 0;
    let seq = slot.cookie.wrapping_add(1);
    build(frame, slot, &Piece { seq, ack: 0, from: 0, len: 0, flags: RST, window: 0 })
}

/// Sequence number of the SYN to the backend: a PROXY header, if there is one, takes the numbers
/// before the client's first byte, so that the client's own numbers need no translation.
#[inline(always)]
pub fn first_seq(slot: &Slot) -> u32 {
    slot.isn.wrapping_sub((ROOM as u32).wrapping_sub(slot.start))
}

/// Sum over `len` bytes, rounded up to words, at `from`; the bytes behind must be zero.
///
/// The verifier must know that `from` is valid for `len` rounded up, at most 4 * 512 bytes.
#[inline(always)]
pub fn sum_bytes(from: *const u8, len: usize) -> u64 {
    let mut sum = 0_u64;
    for part in 0..4 {
        let done = part * CSUM_MAX;
        if done < len {
            let left = (len - done + 3) & !3;
            let size = if left > CSUM_MAX { CSUM_MAX } else { left };
            // SAFETY: as the caller promises and the verifier checks.
            let diff = unsafe {
                bpf_csum_diff(core::ptr::null_mut(), 0, from.add(done).cast_mut().cast(), size as u32, 0)
            };
            sum += diff as u32 as u64;
        }
    }
    sum
}

/// Sum over `len` bytes of a slot, at most [`PIECE_MAX`], at `from`. What is behind them does not matter: it may
/// be the next bytes of the client, which another CPU writes at this moment.
#[inline(never)]
fn sum_to(from: *const u8, len: usize) -> u64 {
    let whole = opaque((len & !3) as u64) as usize;
    if whole > PIECE_MAX {
        return 0;
    }
    let mut tail = 0;
    for i in 0..3 {
        // 1 for a byte that counts: a factor instead of a branch.
        let counts = (whole + i < len) as u32;
        // SAFETY: 64 bytes of `buf` are behind the longest piece.
        tail |= (unsafe { *from.add(whole + i) } as u32 * counts) << (8 * i);
    }
    let words = if whole > 0 { sum_bytes(from, whole) } else { 0 };
    u32::from_le(tail) as u64 + words
}

/// Turns the frame, whatever it is, into a segment from the slot, to its `dst` by its `link`.
#[inline(never)]
fn build(frame: &Frame, slot: &Slot, piece: &Piece) -> Result<(), Reason> {
    let scratch = scratch()?;
    let header = scratch.header.as_mut_ptr();
    let v4 = slot.dst.words[0] == 0 && slot.dst.words[1] == 0 && slot.dst.words[2] == V4_MAPPED;
    let tcp_word = IP_WORD + if v4 { 5 } else { 10 };
    let from = piece.from as usize;
    let len = piece.len as usize;
    if from > FROM_MAX || len > PIECE_MAX {
        return Err(Reason::Internal);
    }

    // SAFETY: `header` has 48 words; TCP begins at word 13 or 18 and has at most 15.
    let tcp = unsafe { header.add(tcp_word) };
    let mut words = 5;
    // SAFETY: as above; `words` grows to at most 5 + 5.
    unsafe {
        let mut push = |word: u32| {
            *tcp.add(words) = word;
            words += 1;
        };
        if piece.flags & SYN != 0 {
            let [high, low] = slot.mss.to_be_bytes();
            push(u32::from_ne_bytes([2, 4, high, low]));
            if slot.ts != 0 {
                push(if slot.sack != 0 { u32::from_ne_bytes([4, 2, 8, 10]) } else { TIMESTAMP_WORD });
                push(slot.tsval.to_be());
                push(0);
            } else if slot.sack != 0 {
                push(u32::from_ne_bytes([1, 1, 4, 2]));
            }
            if slot.wscale != NO_WSCALE {
                push(u32::from_ne_bytes([1, 3, 3, slot.wscale]));
            }
        } else if slot.ts == 1 {
            push(TIMESTAMP_WORD);
            push(slot.tsval.to_be());
            push(slot.peer_ts.to_be());
        }
        *tcp = slot.ports;
        *tcp.add(1) = piece.seq.to_be();
        *tcp.add(2) = piece.ack.to_be();
        let [high, low] = piece.window.to_be_bytes();
        *tcp.add(3) = u32::from_ne_bytes([(words as u8) << 4, piece.flags, high, low]);
        *tcp.add(4) = 0;
    }
    let tcp_len = words * 4;

    let mut sum = (TCP as u16).to_be() as u64 + ((tcp_len + len) as u16).to_be() as u64;
    for i in 0..4 {
        sum += slot.src.words[i] as u64 + slot.dst.words[i] as u64;
    }
    for i in 0..10 {
        if i < words {
            // SAFETY: as above.
            sum += unsafe { *tcp.add(i) } as u64;
        }
    }
    if len > 0 {
        // SAFETY: `from` and `len` are bounded so that both lie in `buf`.
        sum += sum_to(unsafe { slot.buf.as_ptr().add(from) }, len);
    }
    // SAFETY: as above.
    unsafe { *tcp.add(4) = fold(sum) as u32 ^ 0xffff };

    let ip_len = (tcp_word - IP_WORD) * 4;
    // SAFETY: words 8 to 17 of 48.
    unsafe {
        let ip = header.add(IP_WORD);
        if v4 {
            let [high, low] = ((ip_len + tcp_len + len) as u16).to_be_bytes();
            *ip = u32::from_ne_bytes([0x45, qos::slot_tos(slot), high, low]);
            // No identification is needed with "don't fragment" (RFC 6864 section 4.1).
            *ip.add(1) = u32::from_ne_bytes([0, 0, 0x40, 0]);
            *ip.add(2) = u32::from_ne_bytes([slot.ttl, TCP as u8, 0, 0]);
            *ip.add(3) = slot.src.words[3];
            *ip.add(4) = slot.dst.words[3];
            let mut sum = 0;
            for i in 0..5 {
                sum += *ip.add(i) as u64;
            }
            let [a, b] = (!fold(sum)).to_ne_bytes();
            *ip.add(2) = u32::from_ne_bytes([slot.ttl, TCP as u8, a, b]);
        } else {
            let class = qos::slot_tos(slot);
            let [high, low] = ((tcp_len + len) as u16).to_be_bytes();
            *ip = u32::from_ne_bytes([0x60 | class >> 4, class << 4, 0, 0]);
            *ip.add(1) = u32::from_ne_bytes([high, low, TCP as u8, slot.ttl]);
            for i in 0..4 {
                *ip.add(2 + i) = slot.src.words[i];
                *ip.add(6 + i) = slot.dst.words[i];
            }
        }
    }

    let tags = tags_of(&slot.link) as usize;
    let l2 = 14 + tags * 4;
    let ethertype = if v4 { 0x0800_u16 } else { 0x86dd }.to_be();
    // SAFETY: the Ethernet header takes `l2` bytes, 14 to 22, before byte 32 of the buffer.
    unsafe {
        let bytes = header.cast::<u8>();
        let macs = bytes.add(IP_AT - l2).cast::<u32>();
        *macs = slot.link.macs[0];
        *macs.add(1) = slot.link.macs[1];
        *macs.add(2) = slot.link.macs[2];
        if tags > 0 {
            *macs.add(3) = slot.link.vlans[0];
        }
        if tags > 1 {
            *macs.add(4) = slot.link.vlans[1];
        }
        *bytes.add(IP_AT - 2).cast::<u16>() = ethertype;
    }
    let head = l2 + ip_len + tcp_len;
    // Without payload nothing can be merged with it, see `renew`: the end may move.
    let cut = len == 0 && head <= frame.view().len();
    if !(if cut { frame.resize(head) } else { frame.renew(head + len) }) {
        return Err(Reason::NoRoom);
    }
    // SAFETY: `head` is at most 22 + 40 + 40 bytes, from byte 10 at the least, of 192.
    if !frame.store(0, unsafe { header.cast::<u8>().add(IP_AT - l2) }, head) {
        return Err(Reason::NoRoom);
    }
    if len > 0 {
        // SAFETY: bounded above.
        if !frame.store(head, unsafe { slot.buf.as_ptr().add(from) }, len) {
            return Err(Reason::NoRoom);
        }
    }
    Ok(())
}

/// Turns the frame into as much of the slot's stream as it has room for, where frames cannot be
/// cloned: the first segment, or only the PROXY header, which no client can repeat, or a bare ACK.
/// What is missing the client sends again.
#[inline(never)]
pub fn in_place(frame: &Frame, slot: &mut Slot) -> Result<Reason, Reason> {
    slot.emitted = REPLAY_WIDTH * EMITTED;
    let end = ROOM as u32 + slot.len;
    let all = end.wrapping_sub(slot.start);
    let mut piece = Piece {
        seq: first_seq(slot).wrapping_add(1),
        ack: slot.peer_isn.wrapping_add(1),
        from: slot.start,
        len: if all > slot.chunk { slot.chunk } else { all },
        flags: ACK | PSH,
        window: slot.window,
    };
    if piece.len <= IN_PLACE_MAX && build(frame, slot, &piece).is_ok() {
        return Ok(Reason::Replayed);
    }
    piece.len = (ROOM as u32).wrapping_sub(slot.start);
    build(frame, slot, &piece)?;
    Ok(Reason::AckedBackend)
}

/// Sends what a slot has to send, the SYN or the stashed data, through a replay map of the interface
/// (see `Backend::replay`).
#[inline(always)]
pub fn replay(frame: &Frame, slot: &mut Slot, index: u32, replay: u32) -> Result<(), Reason> {
    slot.emitted = 0;
    let single = slot.stage == STAGE_BOUND || ROOM as u32 + slot.len - slot.start <= slot.chunk;
    broadcast(frame, index, replay, single)
}

/// Marks the frame as belonging to a slot and broadcasts it: for each clone that is not needed the kernel
/// would take a page all the same.
#[inline(never)]
fn broadcast(frame: &Frame, index: u32, replay: u32, single: bool) -> Result<(), Reason> {
    if frame.view().len() > 256 && !frame.resize(64) {
        return Err(Reason::NoRoom);
    }
    let mark = frame.view().ptr::<[u32; 3]>(0).ok_or(Reason::ShortFrame)?;
    // SAFETY: `ptr` checked the bounds.
    unsafe { *mark = [MARK, index, MARK] };
    let map: *const DevMap = match (replay, single) {
        (0, true) => &raw const SINGLE0,
        (1, true) => &raw const SINGLE1,
        (2, true) => &raw const SINGLE2,
        (3, true) => &raw const SINGLE3,
        (4, true) => &raw const SINGLE4,
        (5, true) => &raw const SINGLE5,
        (6, true) => &raw const SINGLE6,
        (_, true) => &raw const SINGLE7,
        (0, false) => &raw const REPLAY0,
        (1, false) => &raw const REPLAY1,
        (2, false) => &raw const REPLAY2,
        (3, false) => &raw const REPLAY3,
        (4, false) => &raw const REPLAY4,
        (5, false) => &raw const REPLAY5,
        (6, false) => &raw const REPLAY6,
        (_, false) => &raw const REPLAY7,
    };
    // SAFETY: the map lives as long as the program.
    let action = unsafe { bpf_redirect_map(map.cast_mut().cast(), 0, BPF_F_BROADCAST) };
    if action as u32 == XDP_REDIRECT { Ok(()) } else { Err(Reason::Internal) }
}

/// At the exit to a backend: turns a clone into what the slot has to send. `None` for a frame that
/// only passes through.
#[inline(always)]
pub fn at_exit(frame: &Frame) -> Option<Verdict> {
    let [mark, index, again] = frame.view().read::<[u32; 3]>(0)?;
    if mark != MARK || again != MARK {
        return None;
    }
    Some(piece_of(frame, index))
}

#[inline(always)]
fn piece_of(frame: &Frame, index: u32) -> Verdict {
    let slot = stash::slot(index)?;
    let emitted = Word::new(&mut slot.emitted);
    let number = emitted.add(1) & (EMITTED - 1);
    let verdict = piece(frame, slot, number);
    // Nobody may have taken the slot over before this.
    emitted.add(EMITTED);
    verdict
}

#[inline(always)]
fn piece(frame: &Frame, slot: &Slot, number: u32) -> Verdict {
    if slot.stage == STAGE_BOUND {
        if number != 0 {
            return Verdict(Reason::CloneUnused);
        }
        syn(frame, slot)?;
        return Verdict(Reason::EmittedSyn);
    }
    let end = ROOM as u32 + slot.len;
    let from = slot.start.wrapping_add(number.wrapping_mul(slot.chunk));
    if slot.stage != STAGE_REPLAYED || from >= end || number >= REPLAY_WIDTH {
        return Verdict(Reason::CloneUnused);
    }
    let left = end - from;
    let piece = Piece {
        seq: first_seq(slot).wrapping_add(1).wrapping_add(from - slot.start),
        ack: slot.peer_isn.wrapping_add(1),
        from,
        len: if left > slot.chunk { slot.chunk } else { left },
        flags: if left > slot.chunk { ACK } else { ACK | PSH },
        window: slot.window,
    };
    build(frame, slot, &piece)?;
    Verdict(Reason::EmittedSegment)
}
