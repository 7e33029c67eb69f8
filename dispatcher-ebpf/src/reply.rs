//! Turns a received TCP packet into a segment back to its sender.

use dispatcher_common::{
    checksum::fold,
    flow::ports_swapped,
    reason::Reason,
    tcp::{ACK, FIN, RST, SYN, TIMESTAMP_WORD},
};

use crate::{
    packet::{Frame, Ipv4, Ipv6, Tcp},
    parse::{Parsed, TCP, packet_end},
};

/// TTL and hop limit of segments that are ours.
pub const TTL: u8 = 64;

/// What the segment says. Sequence numbers in host order.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// Flags.
    pub flags: u8,
    /// Window field.
    pub window: u16,
    /// 1: carries timestamps (the received packet had them, so there is room).
    pub ts: u8,
    /// TSval.
    pub tsval: u32,
    /// TSecr.
    pub tsecr: u32,
}

/// Sends `segment` to whoever sent this packet, out of the interface it came from.
#[inline(never)]
pub fn segment(frame: &Frame, p: &Parsed, segment: &Segment) -> Result<(), Reason> {
    let view = frame.view();
    let l4 = p.l4();
    let len = size_of::<Tcp>() + if segment.ts != 0 { 12 } else { 0 };
    let tcp = view.ptr::<Tcp>(l4).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &mut *tcp };
    tcp.ports = ports_swapped(p.key.ports);
    tcp.seq = segment.seq.to_be();
    tcp.ack = segment.ack.to_be();
    tcp.offset = (len as u8) << 2;
    tcp.flags = segment.flags;
    tcp.window = segment.window.to_be();
    tcp.check = 0;
    tcp.urgent = 0;
    let mut sum = sum_header(tcp) + pseudo(p, len);
    if segment.ts != 0 {
        let options = view.ptr::<[u32; 3]>(l4 + size_of::<Tcp>()).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        let options = unsafe { &mut *options };
        *options = [TIMESTAMP_WORD, segment.tsval.to_be(), segment.tsecr.to_be()];
        sum += options[0] as u64 + options[1] as u64 + options[2] as u64;
    }
    tcp.check = !fold(sum);
    turn_around(frame, p, len)?;
    if !frame.resize(l4 + len) {
        return Err(Reason::NoRoom);
    }
    frame.redirect(frame.ingress());
    Ok(())
}

/// Sum over a TCP header without options.
#[inline(always)]
pub fn sum_header(tcp: &Tcp) -> u64 {
    let word = u32::from_ne_bytes([tcp.offset, tcp.flags, 0, 0]);
    tcp.ports as u64 + tcp.seq as u64 + tcp.ack as u64 + word as u64 + tcp.window as u64 + tcp.urgent as u64
}

/// Sum over the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) of a packet of the same
/// or the opposite direction. The words that make an address IPv4-mapped sum to zero.
#[inline(always)]
pub fn pseudo(p: &Parsed, len: usize) -> u64 {
    let mut sum = (TCP as u16).to_be() as u64 + (len as u16).to_be() as u64;
    for i in 0..4 {
        sum += p.key.src.words[i] as u64 + p.key.dst.words[i] as u64;
    }
    sum
}

/// Exchanges MAC and IP addresses and sets the IP length for a TCP segment of `len` bytes.
#[inline(always)]
pub fn turn_around(frame: &Frame, p: &Parsed, len: usize) -> Result<(), Reason> {
    let view = frame.view();
    let (l3, l4) = (p.l3(), p.l4());
    let macs = view.ptr::<[u16; 6]>(0).ok_or(Reason::ShortFrame)?;
    // SAFETY: `ptr` checked the bounds.
    let macs = unsafe { &mut *macs };
    *macs = [macs[3], macs[4], macs[5], macs[0], macs[1], macs[2]];
    if p.is_v4() {
        let ip = view.ptr::<Ipv4>(l3).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        let total = ((l4 - l3 + len) as u16).to_be();
        // RFC 1624 over the two words that change; exchanged addresses change nothing.
        let ttl = u16::from_ne_bytes([TTL, ip.proto]);
        let old_ttl = u16::from_ne_bytes([ip.ttl, ip.proto]);
        let sum = !ip.check as u64 + !ip.len as u64 + total as u64 + !old_ttl as u64 + ttl as u64;
        ip.len = total;
        ip.ttl = TTL;
        ip.check = !fold(sum);
        ip.src = p.key.dst.words[3];
        ip.dst = p.key.src.words[3];
    } else {
        let ip = view.ptr::<Ipv6>(l3).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &mut *ip };
        ip.len = ((l4 - l3 - size_of::<Ipv6>() + len) as u16).to_be();
        ip.hops = TTL;
        p.key.dst.store(&mut ip.src);
        p.key.src.store(&mut ip.dst);
    }
    Ok(())
}

/// Answers a packet that belongs to nothing with RST (RFC 9293 section 3.10.7.1).
#[inline(never)]
pub fn reset(frame: &Frame, p: &Parsed) -> Result<(), Reason> {
    let view = frame.view();
    let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &*tcp };
    let mut answer =
        Segment { seq: u32::from_be(tcp.ack), ack: 0, flags: RST, window: 0, ts: 0, tsval: 0, tsecr: 0 };
    if tcp.flags & ACK == 0 {
        let header = (tcp.offset >> 4) as usize * 4;
        let end = packet_end(view, p).ok_or(Reason::BadIp)?;
        let payload = end.checked_sub(p.l4() + header).ok_or(Reason::BadTransport)? as u32;
        let control = (tcp.flags & SYN != 0) as u32 + (tcp.flags & FIN != 0) as u32;
        answer.seq = 0;
        answer.ack = u32::from_be(tcp.seq).wrapping_add(payload + control);
        answer.flags = RST | ACK;
    }
    segment(frame, p, &answer)
}
