//! ICMP errors about packets of our flows: translated, and sent on to whoever sent the packet.
//!
//! The quoted packet is one that we sent, so its reverse is the key of the flow entry that tells
//! what its sender calls it: the entry's new addresses, exchanged.

use dispatcher_common::{
    addr::Addr,
    checksum::{change, update},
    flow::{FLAG_TO_BACKEND, Flow, FlowKey, ports_swapped},
    reason::Reason,
};

use crate::{
    flows,
    packet::{Frame, Ipv4, Ipv6, View},
    parse::{ICMP, Parsed, TCP, UDP},
    rewrite::leave,
    services,
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

/// The part of the quoted transport header that is always there.
#[repr(C)]
struct Quoted {
    ports: u32,
    seq: u32,
}

/// Sends an ICMP error about a packet of ours to its sender; passes everything else.
#[inline(never)]
pub fn error(frame: &Frame, p: &Parsed) -> Verdict {
    if p.fragment != 0 {
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
    let mut key = FlowKey {
        src: Addr { words: [0; 4] },
        dst: Addr { words: [0; 4] },
        ports: 0,
        proto: 0,
    };
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
        key.src = Addr { words: ip.dst };
        key.dst = Addr { words: ip.src };
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
    let src = if p.key.src == key.src { flow.src } else { p.key.src };
    let mut outer = 0;
    for i in 0..4 {
        outer += change(p.key.src.words[i], src.words[i]) + change(p.key.dst.words[i], flow.dst.words[i]);
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
        ip.dst = flow.dst.words[3];
    } else {
        let ip = view.ptr::<Ipv6>(p.l3()).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        if ip.hops <= 1 {
            return Verdict(Reason::TtlExpired);
        }
        ip.hops -= 1;
        ip.src = src.words;
        ip.dst = flow.dst.words;
        // ICMPv6 has a pseudo header (RFC 4443 section 2.3).
        sum += outer;
    }
    icmp.check = update(icmp.check, sum);
    let mut link = flow.link;
    if flow.flags & FLAG_TO_BACKEND != 0
        && let Some(backend) = services::endpoint(flow.backend, is_v4)
    {
        link = backend.link;
    }
    leave(frame, p, &link)?;
    Verdict(Reason::IcmpError)
}

/// Exchanges the quoted IPv4 addresses and repairs the quoted header's checksum.
#[inline(always)]
fn quoted_v4(view: View, at: usize, flow: &Flow) -> Result<u64, Reason> {
    let ip = view.ptr::<Ipv4>(at).ok_or(Reason::BadIcmp)?;
    // SAFETY: `ptr` checked the bounds.
    let ip = unsafe { &mut *ip };
    let addresses = change(ip.src, flow.dst.words[3]) + change(ip.dst, flow.src.words[3]);
    let check = update(ip.check, addresses);
    let sum = addresses + !ip.check as u64 + check as u64;
    ip.check = check;
    ip.src = flow.dst.words[3];
    ip.dst = flow.src.words[3];
    Ok(sum)
}

/// Exchanges the quoted IPv6 addresses.
#[inline(always)]
fn quoted_v6(view: View, at: usize, flow: &Flow) -> Result<u64, Reason> {
    let ip = view.ptr::<Ipv6>(at).ok_or(Reason::BadIcmp)?;
    // SAFETY: `ptr` checked the bounds.
    let ip = unsafe { &mut *ip };
    let mut sum = 0;
    for i in 0..4 {
        sum += change(ip.src[i], flow.dst.words[i]) + change(ip.dst[i], flow.src.words[i]);
    }
    ip.src = flow.dst.words;
    ip.dst = flow.src.words;
    Ok(sum)
}
