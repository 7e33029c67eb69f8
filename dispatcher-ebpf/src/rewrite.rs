//! Packets of established flows: addresses, sequence numbers, timestamps, window, checksums. One
//! path for both families and both directions.

use aya_ebpf::helpers::generated::bpf_csum_diff;
use dispatcher_common::{
    checksum::{change, update},
    flow::{FLAG_L4, FLAG_NO_SACK, FLAG_NO_TS, FLAG_TO_BACKEND, Flow, Link},
    opaque::opaque,
    reason::Reason,
    tcp::{ACK, TIMESTAMP_WORD, Translation, scale_window, translate_options},
};

use crate::{
    globals::scratch,
    options::read,
    packet::{Frame, Ipv4, Ipv6, MACS, Tcp, Udp, View},
    parse::{Layout, Parsed},
};

const TCP_MIN: usize = size_of::<Tcp>();

/// The options cannot be translated in place.
const OPTIONS_ODD: u64 = u64::MAX;

/// Translates a packet in place: everything but the Ethernet header. With `ODD`, options may have
/// any form; without, the result is false, and nothing changed, for a form that stacks do not send.
#[inline(always)]
pub fn translate<const ODD: bool>(
    frame: &Frame,
    view: View,
    layout: impl Layout,
    p: &Parsed,
    flow: &Flow,
) -> Result<bool, Reason> {
    let (l3, l4) = (layout.l3(), layout.l4());
    // What the transport checksum changes by.
    let mut sum = change(p.key.ports, flow.ports);
    let mut view = view;
    if p.is_tcp() && flow.flags & FLAG_L4 == 0 {
        let tcp = view.ptr::<Tcp>(l4).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        let words = unsafe { (*tcp).offset >> 4 } as usize;
        if words > 5 {
            let changes =
                if ODD { odd_options(frame, p, flow) } else { options(view, l4 + TCP_MIN, words - 5, flow) };
            if changes == OPTIONS_ODD {
                return if ODD { Err(Reason::BadTransport) } else { Ok(false) };
            }
            sum += changes;
            if ODD {
                // The helpers that took the long way ended the life of packet pointers.
                view = frame.view();
            }
        }
    }

    if layout.is_v4() {
        let ip = view.ptr::<Ipv4>(l3).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        let addresses = change(ip.src, flow.src_low) + change(ip.dst, flow.dst_low);
        sum += addresses;
        ip.ttl = ip.ttl.wrapping_sub(1);
        // TTL is the first byte of its 16-bit word: less one is plus ~1 in one's complement.
        ip.check = update(ip.check, addresses + !1_u16 as u64);
        ip.src = flow.src_low;
        ip.dst = flow.dst_low;
    } else {
        let ip = view.ptr::<Ipv6>(l3).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        let (src, dst) = (flow.src(), flow.dst());
        for i in 0..4 {
            sum += change(ip.src[i], src.words[i]) + change(ip.dst[i], dst.words[i]);
        }
        ip.hops = ip.hops.wrapping_sub(1);
        src.store(&mut ip.src);
        dst.store(&mut ip.dst);
    }

    if p.is_tcp() {
        let tcp = view.ptr::<Tcp>(l4).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        let tcp = unsafe { &mut *tcp };
        if flow.flags & FLAG_TO_BACKEND != 0 {
            if tcp.flags & ACK != 0 {
                let old = tcp.ack;
                tcp.ack = u32::from_be(old).wrapping_add(flow.seq_add).to_be();
                sum += change(old, tcp.ack);
            }
        } else {
            let old = tcp.seq;
            tcp.seq = u32::from_be(old).wrapping_add(flow.seq_add).to_be();
            sum += change(old, tcp.seq);
        }
        let shift = flow.win_shift();
        if shift != 0 {
            let old = tcp.window;
            tcp.window = scale_window(u16::from_be(old), shift).to_be();
            sum += change(old as u32, tcp.window as u32);
        }
        tcp.ports = flow.ports;
        tcp.check = update(tcp.check, sum);
    } else {
        let udp = view.ptr::<Udp>(l4).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        let udp = unsafe { &mut *udp };
        udp.ports = flow.ports;
        if udp.check != 0 {
            let check = update(udp.check, sum);
            udp.check = if check == 0 { 0xffff } else { check };
        }
    }
    Ok(true)
}

/// Translates options in the form that stacks send: NOP NOP timestamps, then, or instead, NOP NOP
/// SACK. Returns the sum of changes, or `OPTIONS_ODD` with nothing changed for another form.
#[inline(always)]
fn options(view: View, at: usize, words: usize, flow: &Flow) -> u64 {
    let to_backend = flow.flags & FLAG_TO_BACKEND != 0;
    let stamps = if words >= 3 { view.ptr::<[u32; 3]>(at) } else { None };
    // SAFETY: `ptr` checked the bounds.
    let stamps = stamps.map(|stamps| unsafe { &mut *stamps }).filter(|stamps| stamps[0] == TIMESTAMP_WORD);
    let mut sum = 0;
    if to_backend {
        if flow.flags & (FLAG_NO_SACK | FLAG_NO_TS) != 0 {
            return OPTIONS_ODD;
        }
        let taken = if stamps.is_some() { 3 } else { 0 };
        if words > taken {
            sum = sack(view, at + taken * 4, words - taken, flow.seq_add);
            if sum == OPTIONS_ODD {
                return OPTIONS_ODD;
            }
        }
    } else if stamps.is_none() && flow.ts_add != 0 {
        // The client's sequence numbers, which the backend's SACK blocks name, are kept: only
        // timestamps need translation, and they stand elsewhere if at all.
        return OPTIONS_ODD;
    }
    if let Some(stamps) = stamps {
        let field = &mut stamps[if to_backend { 2 } else { 1 }];
        let old = *field;
        *field = u32::from_be(old).wrapping_add(flow.ts_add).to_be();
        sum += change(old, *field);
    }
    sum
}

/// Translates NOP NOP SACK with nothing behind.
#[inline(always)]
fn sack(view: View, at: usize, words: usize, seq_add: u32) -> u64 {
    let Some([1, 1, 5, len]) = view.read::<[u8; 4]>(at) else { return OPTIONS_ODD };
    let blocks = words / 2;
    if blocks * 2 + 1 != words || len as usize != blocks * 8 + 2 || blocks > 4 {
        return OPTIONS_ODD;
    }
    let mut sum = 0;
    for block in 0..4 {
        if block < blocks {
            let Some(edges) = view.ptr::<[u32; 2]>(at + 4 + block * 8) else { return OPTIONS_ODD };
            // SAFETY: `ptr` checked the bounds.
            for edge in unsafe { &mut *edges } {
                let old = *edge;
                *edge = u32::from_be(old).wrapping_add(seq_add).to_be();
                sum += change(old, *edge);
            }
        }
    }
    sum
}

/// Translates options of any order and alignment through scratch memory. Returns the sum of
/// changes, or `OPTIONS_ODD` when the header is cut short.
#[inline(never)]
fn odd_options(frame: &Frame, p: &Parsed, flow: &Flow) -> u64 {
    let Ok(scratch) = scratch() else { return OPTIONS_ODD };
    let Ok(len) = read(frame, p) else { return OPTIONS_ODD };
    let len = opaque(len as u64) as usize & 0x3f;
    if len == 0 || len > 40 {
        return OPTIONS_ODD;
    }
    let at = p.l4();
    let to_backend = flow.flags & FLAG_TO_BACKEND != 0;
    scratch.old = scratch.options;
    let how = Translation {
        to_backend,
        seq_add: flow.seq_add,
        ts_add: flow.ts_add,
        strip_sack: flow.flags & FLAG_NO_SACK != 0 && to_backend,
        strip_ts: flow.flags & FLAG_NO_TS != 0 && to_backend,
    };
    translate_options(&mut scratch.options, &scratch.parsed, how);
    // SAFETY: both buffers hold 64 bytes, `len` is at most 40 and a multiple of 4.
    let sum = unsafe {
        bpf_csum_diff(
            scratch.old.as_mut_ptr().cast(),
            len as u32,
            scratch.options.as_mut_ptr().cast(),
            len as u32,
            0,
        )
    };
    if sum < 0 || !frame.store(at + TCP_MIN, scratch.options.as_ptr(), len) {
        return OPTIONS_ODD;
    }
    sum as u64
}

/// The Ethernet header of a frame without tags, and off it goes.
#[inline(always)]
pub fn leave_plain(frame: &Frame, view: View, ifindex: u32, macs: &[u32; 3]) -> Result<(), Reason> {
    let to = view.ptr::<[u32; 3]>(0).ok_or(Reason::ShortFrame)?;
    // SAFETY: `ptr` checked the bounds.
    let to = unsafe { &mut *to };
    to[0] = macs[0];
    to[1] = macs[1];
    to[2] = macs[2];
    frame.redirect(ifindex);
    Ok(())
}

/// The Ethernet header of a frame that came with any number of tags and leaves with those of `link`.
#[inline(always)]
pub fn leave(frame: &Frame, p: &Parsed, link: &Link) -> Result<(), Reason> {
    let had = p.tags();
    let ethertype: u16 = frame.view().read(MACS + had as usize * 4).ok_or(Reason::ShortFrame)?;
    let tags = tags_of(link);
    let shift = (had as i32 - tags as i32) * 4;
    if !frame.shift(shift) {
        return Err(Reason::NoRoom);
    }
    let view = frame.view();
    let mut at = MACS;
    if tags > 0 {
        put(view, at, link.vlans[0])?;
        at += 4;
    }
    if tags > 1 {
        put(view, at, link.vlans[1])?;
        at += 4;
    }
    put(view, at, ethertype)?;
    leave_plain(frame, view, link.ifindex, &link.macs)
}

/// Number of VLAN tags of a link.
#[inline(always)]
pub fn tags_of(link: &Link) -> u32 {
    (link.vlans[0] != 0) as u32 + (link.vlans[1] != 0) as u32
}

#[inline(always)]
fn put<T>(view: View, at: usize, value: T) -> Result<(), Reason> {
    let to = view.ptr::<T>(at).ok_or(Reason::ShortFrame)?;
    // SAFETY: `ptr` checked the bounds.
    unsafe { *to = value };
    Ok(())
}

/// The reason of a translated packet.
#[inline(always)]
pub fn direction(flow: &Flow) -> Reason {
    if flow.flags & FLAG_TO_BACKEND != 0 { Reason::ToBackend } else { Reason::ToClient }
}
