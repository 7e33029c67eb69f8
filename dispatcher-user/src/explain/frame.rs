//! Frames: read as far as flows need it, and changed.
//!
//! Nothing here panics, whatever the bytes are. Ranges and offsets in a [`Parsed`] lie within its frame.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Range,
};

use dispatcher_common::{
    checksum::{fold, sum},
    tcp::{ACK, FIN, OPTIONS_ROOM, Options, PSH, SYN, Translation, parse_options, translate_options},
};

/// TCP.
pub(super) const TCP: u8 = 6;
/// UDP.
pub(super) const UDP: u8 = 17;

/// Lengths of headers.
const ETHERNET: usize = 14;
const TCP_MIN: usize = 20;
const UDP_LEN: usize = 8;

/// Where things stand in a frame with TCP or UDP.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Parsed {
    /// IPv4.
    v4: bool,
    /// Offset of the IP header.
    l3: usize,
    /// Offset of the TCP or UDP header.
    l4: usize,
    /// Protocol number.
    pub(super) proto: u8,
    /// Source.
    pub(super) src: SocketAddr,
    /// Destination.
    pub(super) dst: SocketAddr,
    /// The payload.
    pub(super) payload: Range<usize>,
    /// All of the payload is there.
    pub(super) whole: bool,
    /// The checksum of the transport header.
    pub(super) sum: Sum,
    /// What only TCP has; zeros for UDP.
    pub(super) tcp: Tcp,
}

/// Fields of a TCP header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tcp {
    /// Sequence number.
    pub(super) seq: u32,
    /// Acknowledgment number.
    pub(super) ack: u32,
    /// Flags.
    pub(super) flags: u8,
    /// Options.
    pub(super) options: Options,
}

impl Tcp {
    /// SYN without ACK.
    pub(super) fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// SYN with ACK.
    pub(super) fn is_syn_ack(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK
    }
}

/// A checksum as it was captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sum {
    /// Right, or none (UDP over IPv4).
    Right,
    /// Only that of the pseudo header: the sender's network card would have finished it.
    Unfinished,
    /// Wrong.
    Wrong,
}

/// Who an IP packet is from and to, and with which protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Ends {
    /// Source.
    pub(super) src: IpAddr,
    /// Destination.
    pub(super) dst: IpAddr,
    /// Protocol number.
    pub(super) proto: u8,
}

struct Network {
    v4: bool,
    l3: usize,
    l4: usize,
    end: usize,
    fragment: bool,
    ends: Ends,
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|two| u16::from_be_bytes(*two))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|four| u32::from_be_bytes(*four))
}

fn put<const N: usize>(frame: &mut [u8], at: usize, bytes: [u8; N]) {
    if let Some(place) = frame.get_mut(at..at + N) {
        place.copy_from_slice(&bytes);
    }
}

/// The ethertype behind VLAN tags, and where what it names begins.
fn ethertype(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = ETHERNET - 2;
    while matches!(half(frame, at)?, 0x8100 | 0x88a8) {
        at += 4;
    }
    Some((half(frame, at)?, at + 2))
}

fn network(frame: &[u8]) -> Option<Network> {
    let (kind, l3) = ethertype(frame)?;
    let ip = frame.get(l3..)?;
    let first = *ip.first()?;
    match (kind, first >> 4) {
        (0x0800, 4) => {
            let header = usize::from(first & 15) * 4;
            let total = usize::from(half(ip, 2)?);
            // Segmentation offload of more than 64 kB leaves the length 0.
            let end = if total == 0 { frame.len() } else { l3 + total };
            let fragment = half(ip, 6)? & 0x3fff != 0;
            let proto = *ip.get(9)?;
            let address = |at: usize| ip.get(at..)?.first_chunk::<4>().map(|four| Ipv4Addr::from(*four));
            let ends = Ends { src: address(12)?.into(), dst: address(16)?.into(), proto };
            (header >= 20).then_some(Network { v4: true, l3, l4: l3 + header, end, fragment, ends })
        }
        (0x86dd, 6) => {
            let end = l3 + 40 + usize::from(half(ip, 4)?);
            let mut proto = *ip.get(6)?;
            let address = |at: usize| ip.get(at..)?.first_chunk::<16>().map(|all| Ipv6Addr::from(*all));
            let (src, dst) = (address(8)?.into(), address(24)?.into());
            let mut l4 = l3 + 40;
            let mut fragment = false;
            while matches!(proto, 0 | 43 | 60) {
                let (Some(next), Some(units)) = (frame.get(l4), frame.get(l4 + 1)) else { break };
                (proto, l4) = (*next, l4 + (usize::from(*units) + 1) * 8);
            }
            if proto == 44 {
                fragment = true;
                proto = *frame.get(l4)?;
            }
            Some(Network { v4: false, l3, l4, end, fragment, ends: Ends { src, dst, proto } })
        }
        _ => None,
    }
}

/// Sender, receiver and protocol of an IP packet.
pub(super) fn ends(frame: &[u8]) -> Option<Ends> {
    network(frame).map(|network| network.ends)
}

/// Reads a frame; `None` unless it holds a whole TCP or UDP header. With `cut`, payload may be missing.
pub(super) fn parse(frame: &[u8], cut: bool) -> Option<Parsed> {
    let Network { v4, l3, l4, end, fragment, ends } = network(frame)?;
    let whole = end <= frame.len();
    let end = if cut { end.min(frame.len()) } else { end };
    if fragment || end > frame.len() {
        return None;
    }
    let transport = frame.get(l4..end)?;
    let (src_port, dst_port) = (half(transport, 0)?, half(transport, 2)?);
    let none = Tcp { seq: 0, ack: 0, flags: 0, options: Options::NONE };
    let (header, tcp) = match ends.proto {
        TCP => {
            let header = usize::from(transport.get(12)? >> 4) * 4;
            let bytes = transport.get(TCP_MIN..header)?;
            let (room, len) = options_room(bytes);
            let mut options = Options::NONE;
            parse_options(&room, len, &mut options);
            let (seq, ack) = (word(transport, 4)?, word(transport, 8)?);
            (header, Tcp { seq, ack, flags: *transport.get(13)?, options })
        }
        UDP if transport.len() >= UDP_LEN => (UDP_LEN, none),
        _ => return None,
    };
    let mut parsed = Parsed {
        v4,
        l3,
        l4,
        proto: ends.proto,
        src: SocketAddr::new(ends.src, src_port),
        dst: SocketAddr::new(ends.dst, dst_port),
        payload: l4 + header..end,
        whole,
        sum: Sum::Right,
        tcp,
    };
    if whole {
        parsed.sum = parsed.look_at_sum(frame);
    }
    Some(parsed)
}

fn options_room(bytes: &[u8]) -> ([u8; OPTIONS_ROOM], usize) {
    let mut room = [0; OPTIONS_ROOM];
    let len = bytes.len().min(OPTIONS_ROOM);
    room.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    (room, len)
}

impl Parsed {
    /// The payload of the frame that was parsed.
    pub(super) fn payload<'f>(&self, frame: &'f [u8]) -> &'f [u8] {
        frame.get(self.payload.clone()).unwrap_or_default()
    }

    /// Payload and TCP options.
    pub(super) fn segment_len(&self) -> usize {
        self.payload.end.saturating_sub(self.l4 + TCP_MIN)
    }

    fn sum_at(&self) -> usize {
        self.l4 + if self.proto == TCP { 16 } else { 6 }
    }

    /// The checksum of the pseudo header, not complemented.
    fn pseudo(&self, frame: &[u8]) -> u64 {
        let addresses = if self.v4 { self.l3 + 12..self.l3 + 20 } else { self.l3 + 8..self.l3 + 40 };
        let len = (self.payload.end - self.l4) as u32;
        sum(frame.get(addresses).unwrap_or_default()) + sum(&len.to_be_bytes()) + sum(&[0, self.proto])
    }

    /// What the checksum field should hold.
    fn right_sum(&self, frame: &[u8]) -> u16 {
        let field = half(frame, self.sum_at()).unwrap_or(0);
        let field = u64::from(u16::from_ne_bytes(field.to_be_bytes()));
        let all = self.pseudo(frame) + sum(frame.get(self.l4..self.payload.end).unwrap_or_default());
        // The field counts as zero: take it away, which in one's complement is to add its complement.
        let right = !fold(all + (field ^ 0xffff));
        u16::from_be_bytes(right.to_ne_bytes())
    }

    fn look_at_sum(&self, frame: &[u8]) -> Sum {
        let field = half(frame, self.sum_at()).unwrap_or(0);
        let same = |a: u16, b: u16| a == b || (a == 0 || a == 0xffff) && (b == 0 || b == 0xffff);
        if (self.proto == UDP && field == 0) || same(field, self.right_sum(frame)) {
            return Sum::Right;
        }
        let unfinished = u16::from_be_bytes(fold(self.pseudo(frame)).to_ne_bytes());
        if field == unfinished { Sum::Unfinished } else { Sum::Wrong }
    }

    /// Writes the checksums of a frame that was changed: right ones, or, where the captured one was wrong
    /// and not the hardware's to finish, a wrong one again.
    pub(super) fn seal(&self, frame: &mut [u8]) {
        if self.v4 {
            put(frame, self.l3 + 10, [0, 0]);
            let right = !fold(sum(frame.get(self.l3..self.header_end()).unwrap_or_default()));
            put(frame, self.l3 + 10, right.to_ne_bytes());
        }
        if self.proto == UDP && half(frame, self.sum_at()) == Some(0) {
            return;
        }
        let mut value = self.right_sum(frame);
        if self.proto == UDP && value == 0 {
            value = 0xffff;
        }
        if self.sum == Sum::Wrong {
            value ^= 0x0101;
        }
        put(frame, self.sum_at(), value.to_be_bytes());
    }

    /// End of the IPv4 header.
    fn header_end(&self) -> usize {
        self.l4
    }

    /// Sets sender and receiver, of the same family.
    pub(super) fn set_ends(&self, frame: &mut [u8], src: SocketAddr, dst: SocketAddr) {
        match (self.v4, src.ip(), dst.ip()) {
            (true, IpAddr::V4(src), IpAddr::V4(dst)) => {
                put(frame, self.l3 + 12, src.octets());
                put(frame, self.l3 + 16, dst.octets());
            }
            (false, IpAddr::V6(src), IpAddr::V6(dst)) => {
                put(frame, self.l3 + 8, src.octets());
                put(frame, self.l3 + 24, dst.octets());
            }
            _ => return,
        }
        put(frame, self.l4, src.port().to_be_bytes());
        put(frame, self.l4 + 2, dst.port().to_be_bytes());
    }

    /// Sets the acknowledgment number.
    pub(super) fn set_ack(&self, frame: &mut [u8], ack: u32) {
        put(frame, self.l4 + 8, ack.to_be_bytes());
    }

    /// Moves what a client's segment says of the server's numbers: acknowledgment and SACK blocks by
    /// `shift`, TSecr by `clock`.
    pub(super) fn shift(&self, frame: &mut [u8], shift: u32, clock: u32) {
        if self.tcp.flags & ACK != 0 {
            self.set_ack(frame, self.tcp.ack.wrapping_add(shift));
        }
        let range = self.l4 + TCP_MIN..self.payload.start;
        let (mut room, len) = options_room(frame.get(range.clone()).unwrap_or_default());
        let how = Translation {
            to_backend: true,
            seq_add: shift,
            ts_add: clock,
            strip_sack: false,
            strip_ts: false,
        };
        translate_options(&mut room, &self.tcp.options, how);
        if let Some(place) = frame.get_mut(range) {
            place.iter_mut().zip(room.iter().take(len)).for_each(|(to, from)| *to = *from);
        }
    }

    /// The frame as segments of at most `mss` bytes each with options, as a network card would cut it.
    pub(super) fn split(&self, frame: &[u8], mss: usize) -> Vec<Vec<u8>> {
        let size = mss.saturating_sub(self.payload.start.saturating_sub(self.l4 + TCP_MIN)).max(1);
        let (head, payload) = (frame.get(..self.payload.start).unwrap_or_default(), self.payload(frame));
        let last = payload.len().div_ceil(size).saturating_sub(1);
        let piece = |(number, part): (usize, &[u8])| {
            let mut out = [head, part].concat();
            let segment = Self { payload: head.len()..out.len(), sum: Sum::Right, ..self.clone() };
            put(&mut out, self.l4 + 4, self.tcp.seq.wrapping_add((number * size) as u32).to_be_bytes());
            if number < last {
                put(&mut out, self.l4 + 13, [self.tcp.flags & !(FIN | PSH)]);
            }
            segment.set_lengths(&mut out);
            segment.seal(&mut out);
            out
        };
        payload.chunks(size).enumerate().map(piece).collect()
    }

    fn set_lengths(&self, frame: &mut [u8]) {
        let end = self.payload.end;
        if self.v4 {
            put(frame, self.l3 + 2, ((end - self.l3) as u16).to_be_bytes());
        } else {
            put(frame, self.l3 + 4, ((end - self.l3 - 40) as u16).to_be_bytes());
        }
    }

    /// A segment of the same sender without payload, with other numbers and options.
    pub(super) fn segment(&self, frame: &[u8], tcp: &Tcp, options: &[u8]) -> (Vec<u8>, Self) {
        let mut out = frame.get(..self.l4 + 4).unwrap_or_default().to_vec();
        let header = TCP_MIN + options.len();
        out.extend(tcp.seq.to_be_bytes());
        out.extend(tcp.ack.to_be_bytes());
        out.extend([(header / 4) as u8 * 16, tcp.flags, 0xfa, 0xf0, 0, 0, 0, 0]);
        out.extend(options);
        let (room, len) = options_room(options);
        let mut found = Options::NONE;
        parse_options(&room, len, &mut found);
        let payload = out.len()..out.len();
        let tcp = Tcp { options: found, ..*tcp };
        let segment = Self { payload, sum: Sum::Right, tcp, ..self.clone() };
        segment.set_lengths(&mut out);
        segment.seal(&mut out);
        (out, segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with a VLAN tag, IPv4 with an option or IPv6 with an extension header, TCP with timestamps
    /// and a SACK block.
    fn sample(v4: bool, payload: &[u8]) -> Vec<u8> {
        let tcp_len = TCP_MIN + 24 + payload.len();
        let mut out = vec![2; 12];
        out.extend([0x81, 0, 0, 7]);
        if v4 {
            out.extend([8, 0, 0x46, 0]);
            out.extend(((24 + tcp_len) as u16).to_be_bytes());
            out.extend([0, 1, 0x40, 0, 64, TCP, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1, 1, 1, 1, 0]);
        } else {
            out.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            out.extend(((8 + tcp_len) as u16).to_be_bytes());
            out.extend([60, 64]);
            out.extend([[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]; 2].concat());
            out.extend([TCP, 0, 1, 4, 0, 0, 0, 0]);
        }
        out.extend([
            0xc3,
            0x50,
            1,
            0xbb,
            0,
            0,
            0,
            100,
            0,
            0,
            0,
            200,
            0xb0,
            ACK | PSH | FIN,
            1,
            0,
            0,
            0,
            0,
            0,
        ]);
        out.extend([1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6, 1, 1, 5, 10, 0, 0, 1, 0, 0, 0, 2, 0]);
        out.extend(payload);
        let parsed = parse(&out, false).expect("TCP");
        Parsed { sum: Sum::Right, ..parsed }.seal(&mut out);
        out
    }

    #[test]
    fn what_stands_where() {
        for v4 in [true, false] {
            let frame = sample(v4, b"hello");
            let parsed = parse(&frame, false).expect("TCP");
            assert_eq!(parsed.sum, Sum::Right);
            assert_eq!((parsed.src.port(), parsed.dst.port(), parsed.src.is_ipv4()), (50_000, 443, v4));
            assert_eq!((parsed.tcp.seq, parsed.tcp.ack, parsed.payload(&frame)), (100, 200, &b"hello"[..]));
            assert_eq!((parsed.tcp.options.tsval, parsed.tcp.options.tsecr), (5, 6));
            // Padding of short frames is no payload.
            let padded = [&frame[..], &[0; 9]].concat();
            assert_eq!(parse(&padded, false).expect("TCP").payload(&padded), b"hello");
        }
    }

    #[test]
    fn no_prefix_and_no_changed_byte_panics() {
        for v4 in [true, false] {
            let frame = sample(v4, b"hello");
            for end in 0..frame.len() {
                assert_eq!(parse(&frame[..end], false), None, "{end}");
                if let Some(parsed) = parse(&frame[..end], true) {
                    assert!(parsed.payload(&frame[..end]).len() < 5);
                }
            }
            for at in 12..frame.len() {
                for value in 0..=255 {
                    let mut frame = frame.clone();
                    frame[at] = value;
                    let Some(parsed) = parse(&frame, value % 2 == 0) else { continue };
                    parsed.split(&frame, 3);
                    parsed.shift(&mut frame, 1, 1);
                    parsed.set_ends(&mut frame, parsed.dst, parsed.src);
                    parsed.seal(&mut frame);
                    parsed.segment(&frame, &parsed.tcp, &[]);
                }
            }
        }
    }

    #[test]
    fn numbers_of_the_server_move_and_checksums_follow() {
        for v4 in [true, false] {
            let mut frame = sample(v4, b"hello");
            let parsed = parse(&frame, false).expect("TCP");
            parsed.shift(&mut frame, 1000, 2000);
            parsed.set_ends(&mut frame, parsed.dst, parsed.src);
            parsed.seal(&mut frame);
            let moved = parse(&frame, false).expect("TCP");
            assert_eq!((moved.sum, moved.tcp.seq, moved.tcp.ack), (Sum::Right, 100, 1200));
            assert_eq!((moved.tcp.options.tsval, moved.tcp.options.tsecr), (5, 2006));
            assert_eq!((moved.src, moved.dst), (parsed.dst, parsed.src));
            let sack = moved.payload.start - 8;
            assert_eq!(
                (word(&frame, sack), word(&frame, sack + 4)),
                (Some(0x100 + 1000), Some(0x200 + 1000))
            );
        }
    }

    #[test]
    fn checksums_are_told_apart() {
        for v4 in [true, false] {
            let mut frame = sample(v4, b"hello");
            let parsed = parse(&frame, false).expect("TCP");
            put(&mut frame, parsed.sum_at(), [0x12, 0x34]);
            let wrong = parse(&frame, false).expect("TCP");
            assert_eq!(wrong.sum, Sum::Wrong);
            wrong.shift(&mut frame, 1, 1);
            wrong.seal(&mut frame);
            assert_eq!(parse(&frame, false).expect("TCP").sum, Sum::Wrong, "what was wrong stays wrong");
            let unfinished = fold(parsed.pseudo(&frame)).to_ne_bytes();
            put(&mut frame, parsed.sum_at(), unfinished);
            let unfinished = parse(&frame, false).expect("TCP");
            assert_eq!(unfinished.sum, Sum::Unfinished);
            unfinished.seal(&mut frame);
            assert_eq!(parse(&frame, false).expect("TCP").sum, Sum::Right);
        }
    }

    #[test]
    fn a_large_segment_becomes_small_ones() {
        let payload: Vec<u8> = (0..=255).cycle().take(10_001).collect();
        for v4 in [true, false] {
            let frame = sample(v4, &payload);
            let parsed = parse(&frame, false).expect("TCP");
            let pieces = parsed.split(&frame, 1024);
            assert_eq!(pieces.len(), 11);
            let mut all: Vec<u8> = Vec::new();
            for (number, piece) in pieces.iter().enumerate() {
                let part = parse(piece, false).expect("TCP");
                assert_eq!((part.sum, part.tcp.seq), (Sum::Right, 100 + all.len() as u32));
                assert_eq!(part.tcp.flags & (FIN | PSH) != 0, number == 10);
                assert!(part.payload(piece).len() <= 1000);
                all.extend(part.payload(piece));
            }
            assert_eq!(all, payload);
        }
    }
}
