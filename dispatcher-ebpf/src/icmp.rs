//! ICMP errors about packets of our flows: translated, and sent on to whoever sent the packet.
//!
//! The quoted packet is one that we sent, so its reverse is the key of the flow entry that tells
//! what its sender calls it: the entry's new addresses, exchanged.

use dispatcher_common::{
    addr::Addr,
    checksum::{change, fold, update},
    flow::{FLAG_TO_BACKEND, Flow, FlowKey, ports_swapped},
    opaque::opaque,
    reason::Reason,
};

use crate::{
    emit::sum_bytes,
    flows,
    globals::{PAYLOAD, scratch},
    packet::{Frame, Ipv4, Ipv6, MACS, View},
    parse::{ICMP, ICMP6, Parsed, TCP, UDP},
    reply::TTL,
    rewrite::{leave, leave_plain},
    services, stash,
    verdict::Verdict,
};

/// ICMP header: type, code, checksum, and a word that depends on the type.
#[repr(C)]
struct Icmp {
    kind: u8,
    code: u8,
    check: u16,
    rest: u32,
}

/// Type of ICMP "time exceeded" (RFC 792), and of ICMPv6 (RFC 4443 section 3.3).
const TIME_EXCEEDED: u8 = 11;
const TIME_EXCEEDED6: u8 = 3;
/// Bytes of the transport header that an error quotes.
const QUOTED: usize = size_of::<Quoted>();

/// The part of the quoted transport header that is always there.
#[repr(C)]
struct Quoted {
    ports: u32,
    seq: u32,
}

/// Sends an ICMP error about a packet of ours to its sender; passes everything else.
#[inline(never)]
pub fn error(frame: &Frame, p: &Parsed) -> Verdict {
    if p.is_fragment() {
        return Verdict(Reason::IcmpOther);
    }
    let view = frame.view();
    let at = p.l4();
    let icmp = view.ptr::<Icmp>(at).ok_or(Reason::BadIcmp)?;
    // SAFETY: `ptr` checked the bounds.
    let icmp = unsafe { &mut *icmp };
    let is_v4 = p.key.proto == ICMP;
    let errors = if is_v4 {
        // destination unreachable, time exceeded, parameter problem (RFC 792)
        matches!(icmp.kind, 3 | 11 | 12)
    } else {
        // unreachable, too big, time exceeded, parameter problem (RFC 4443)
        matches!(icmp.kind, 1..=4)
    };
    if !errors || is_v4 != p.is_v4() {
        return Verdict(Reason::IcmpOther);
    }
    let inner = at + size_of::<Icmp>();
    let mut key = FlowKey { src: Addr { words: [0; 4] }, dst: Addr { words: [0; 4] }, ports: 0, proto: 0 };
    let transport;
    if is_v4 {
        let ip = view.ptr::<Ipv4>(inner).ok_or(Reason::BadIcmp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &*ip };
        if ip.version >> 4 != 4 || ip.version & 0xf < 5 {
            return Verdict(Reason::BadIcmp);
        }
        transport = inner + (ip.version & 0xf) as usize * 4;
        key.src = Addr::from_v4_word(ip.dst);
        key.dst = Addr::from_v4_word(ip.src);
        key.proto = ip.proto as u32;
    } else {
        let ip = view.ptr::<Ipv6>(inner).ok_or(Reason::BadIcmp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &*ip };
        transport = inner + size_of::<Ipv6>();
        key.src = Addr::load(&ip.dst);
        key.dst = Addr::load(&ip.src);
        key.proto = ip.next as u32;
    }
    if key.proto != TCP && key.proto != UDP {
        return Verdict(Reason::IcmpOther);
    }
    let quoted = view.ptr::<Quoted>(transport).ok_or(Reason::BadIcmp)?;
    // SAFETY: `ptr` checked the bounds.
    let quoted = unsafe { &mut *quoted };
    key.ports = ports_swapped(quoted.ports);
    let Some(flow) = flows::get(&key) else { return Verdict(Reason::IcmpOther) };

    // The quoted packet first; `sum` is what changes within the ICMP message.
    let ports = ports_swapped(flow.ports);
    let mut sum = change(quoted.ports, ports);
    quoted.ports = ports;
    if key.proto == TCP && flow.flags & FLAG_TO_BACKEND != 0 {
        let seq = u32::from_be(quoted.seq).wrapping_add(flow.seq_add).to_be();
        sum += change(quoted.seq, seq);
        quoted.seq = seq;
    }
    sum += if is_v4 { quoted_v4(view, inner, flow)? } else { quoted_v6(view, inner, flow)? };

    // A host that reports about itself is called by the name that the receiver knows.
    let src = if p.key.src == key.src { flow.src() } else { p.key.src };
    let dst = flow.dst();
    let mut outer = 0;
    for i in 0..4 {
        outer += change(p.key.src.words[i], src.words[i]) + change(p.key.dst.words[i], dst.words[i]);
    }
    if is_v4 {
        let ip = view.ptr::<Ipv4>(p.l3()).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        if ip.ttl <= 1 {
            return Verdict(Reason::TtlExpired);
        }
        ip.ttl -= 1;
        ip.check = update(ip.check, outer + !1_u16 as u64);
        ip.src = src.words[3];
        ip.dst = flow.dst_low;
    } else {
        let ip = view.ptr::<Ipv6>(p.l3()).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        if ip.hops <= 1 {
            return Verdict(Reason::TtlExpired);
        }
        ip.hops -= 1;
        src.store(&mut ip.src);
        dst.store(&mut ip.dst);
        // ICMPv6 has a pseudo header (RFC 4443 section 2.3).
        sum += outer;
    }
    icmp.check = update(icmp.check, sum);
    let mut link = flow.link();
    if flow.flags & FLAG_TO_BACKEND != 0
        && let Some(backend) = services::endpoint(flow.backend, is_v4)
    {
        link = backend.link;
    }
    leave(frame, p, &link)?;
    Verdict(Reason::IcmpError)
}

/// Tells the sender of a packet whose TTL ran out so, as a router does (RFC 1812 section 5.3.1):
/// the packet becomes the quotation of an ICMP error, sent back where it came from by `from`.
#[inline(never)]
pub fn time_exceeded(frame: &Frame, p: &Parsed, from: &Addr) -> Verdict {
    let scratch = scratch()?;
    let l3 = p.l3();
    let v4 = p.is_v4();
    let quote = opaque((p.l4().wrapping_sub(l3) + QUOTED) as u64) as usize & 0xff;
    let ip_len = if v4 { size_of::<Ipv4>() } else { size_of::<Ipv6>() };
    // The error, with room for the quotation behind the ICMP header, which begins at byte 48.
    let header = scratch.header.as_mut_ptr();
    for i in 0..3 {
        scratch.payload[(quote + i) & (PAYLOAD - 1)] = 0;
    }
    if quote < 28 || !frame.load(l3, scratch.payload.as_mut_ptr(), quote) {
        return Verdict(Reason::TtlExpired);
    }
    let mut sum = sum_bytes(scratch.payload.as_ptr(), quote);
    let [high, low] = ((size_of::<Icmp>() + quote) as u16).to_be_bytes();
    // SAFETY: words 2 to 13 of 48.
    unsafe {
        let icmp = header.add(12);
        if v4 {
            let [high, low] = ((ip_len + size_of::<Icmp>() + quote) as u16).to_be_bytes();
            let ip = header.add(7);
            *ip = u32::from_ne_bytes([0x45, 0xc0, high, low]);
            *ip.add(1) = 0;
            *ip.add(2) = u32::from_ne_bytes([TTL, ICMP as u8, 0, 0]);
            *ip.add(3) = from.words[3];
            *ip.add(4) = p.key.src.words[3];
            let mut head = 0;
            for i in 0..5 {
                head += *ip.add(i) as u64;
            }
            let [a, b] = (!fold(head)).to_ne_bytes();
            *ip.add(2) = u32::from_ne_bytes([TTL, ICMP as u8, a, b]);
            *icmp = u32::from_ne_bytes([TIME_EXCEEDED, 0, 0, 0]);
        } else {
            let ip = header.add(2);
            *ip = u32::from_ne_bytes([0x60, 0, 0, 0]);
            *ip.add(1) = u32::from_ne_bytes([high, low, ICMP6 as u8, TTL]);
            sum += u32::from_ne_bytes([0, ICMP6 as u8, high, low]) as u64;
            for i in 0..4 {
                *ip.add(2 + i) = from.words[i];
                *ip.add(6 + i) = p.key.src.words[i];
                sum += from.words[i] as u64 + p.key.src.words[i] as u64;
            }
            *icmp = u32::from_ne_bytes([TIME_EXCEEDED6, 0, 0, 0]);
        }
        *icmp.add(1) = 0;
        let [a, b] = (!fold(sum + *icmp as u64)).to_ne_bytes();
        *icmp = u32::from_ne_bytes([(*icmp).to_ne_bytes()[0], 0, a, b]);
    }
    // The Ethernet header, tags included, stays as it is but for the exchanged addresses.
    let link = stash::client_link(frame, p);
    let start = l3 + ip_len + size_of::<Icmp>();
    if !frame.renew(start + quote)
        || !frame.store(start, scratch.payload.as_ptr(), quote)
        // SAFETY: the IP header ends at byte 48, where ICMP begins.
        || !frame.store(l3, unsafe { header.cast::<u8>().add(48 - ip_len) }, ip_len + size_of::<Icmp>())
    {
        return Verdict(Reason::TtlExpired);
    }
    let view = frame.view();
    let ethertype = view.ptr::<u16>(l3.wrapping_sub(2) & 0x1f).ok_or(Reason::ShortFrame)?;
    // SAFETY: `ptr` checked the bounds.
    unsafe { *ethertype = if v4 { 0x0800_u16 } else { 0x86dd }.to_be() };
    for (i, tag) in link.vlans.iter().enumerate() {
        if *tag != 0 {
            let to = view.ptr::<u32>(MACS + i * 4).ok_or(Reason::ShortFrame)?;
            // SAFETY: `ptr` checked the bounds.
            unsafe { *to = *tag };
        }
    }
    leave_plain(frame, view, link.ifindex, &link.macs)?;
    Verdict(Reason::TimeExceeded)
}

/// Exchanges the quoted IPv4 addresses and repairs the quoted header's checksum.
#[inline(always)]
fn quoted_v4(view: View, at: usize, flow: &Flow) -> Result<u64, Reason> {
    let ip = view.ptr::<Ipv4>(at).ok_or(Reason::BadIcmp)?;
    // SAFETY: `ptr` checked the bounds.
    let ip = unsafe { &mut *ip };
    let addresses = change(ip.src, flow.dst_low) + change(ip.dst, flow.src_low);
    let check = update(ip.check, addresses);
    let sum = addresses + !ip.check as u64 + check as u64;
    ip.check = check;
    ip.src = flow.dst_low;
    ip.dst = flow.src_low;
    Ok(sum)
}

/// Exchanges the quoted IPv6 addresses.
#[inline(always)]
fn quoted_v6(view: View, at: usize, flow: &Flow) -> Result<u64, Reason> {
    let ip = view.ptr::<Ipv6>(at).ok_or(Reason::BadIcmp)?;
    // SAFETY: `ptr` checked the bounds.
    let ip = unsafe { &mut *ip };
    let (src, dst) = (flow.src(), flow.dst());
    let mut sum = 0;
    for i in 0..4 {
        sum += change(ip.src[i], dst.words[i]) + change(ip.dst[i], src.words[i]);
    }
    dst.store(&mut ip.src);
    src.store(&mut ip.dst);
    Ok(sum)
}
