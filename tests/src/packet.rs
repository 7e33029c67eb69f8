//! Frames as data: built byte by byte, and read back with every length and checksum verified.
//!
//! The arithmetic here is its own, not that of `dispatcher-common`, so that one can find the
//! other's mistakes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, bail, ensure};

/// TCP flags.
pub mod flags {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// PSH.
    pub const PSH: u8 = 8;
    /// ACK.
    pub const ACK: u8 = 16;
    /// URG.
    pub const URG: u8 = 32;
}

/// An IP packet in an Ethernet frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Destination and source MAC.
    pub macs: [[u8; 6]; 2],
    /// VLAN tags (TPID and TCI), outermost first.
    pub tags: Vec<[u8; 4]>,
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// IPv4 identification, IPv6 flow label.
    pub id: u32,
    /// IPv4 "don't fragment"; ignored for IPv6.
    pub dont_fragment: bool,
    /// Fragment offset in bytes, and whether more fragments follow.
    pub fragment: Option<(u16, bool)>,
    /// IPv4 options (a multiple of four bytes).
    pub ip_options: Vec<u8>,
    /// IPv6 extension headers: number, and everything after the next-header byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// What is inside.
    pub body: Body,
}

/// What an IP packet carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// TCP.
    Tcp(Tcp),
    /// UDP.
    Udp(Udp),
    /// ICMP or ICMPv6, by the packet's family.
    Icmp(Icmp),
    /// Any other protocol, or bytes that are no whole header.
    Raw(u8, Vec<u8>),
}

/// A TCP segment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tcp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// Flags.
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Urgent pointer.
    pub urgent: u16,
    /// Options; the end is padded by zeros when built.
    pub options: Vec<TcpOption>,
    /// Payload.
    pub payload: Vec<u8>,
}

/// A TCP option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TcpOption {
    /// No operation.
    Nop,
    /// Maximum segment size.
    Mss(u16),
    /// Window scale.
    Wscale(u8),
    /// SACK permitted.
    SackPermitted,
    /// SACK blocks.
    Sack(Vec<(u32, u32)>),
    /// TSval and TSecr.
    Timestamps(u32, u32),
    /// Any bytes.
    Raw(Vec<u8>),
}

/// A UDP datagram.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Udp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// No checksum (IPv4 only).
    pub unchecked: bool,
    /// Payload.
    pub payload: Vec<u8>,
}

/// An ICMP message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// The word after the checksum.
    pub rest: [u8; 4],
    /// What follows; of an error, the packet that it is about.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A packet between two addresses of one family.
    #[must_use]
    pub fn new(src: IpAddr, dst: IpAddr, body: Body) -> Self {
        Self {
            macs: [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]],
            tags: Vec::new(),
            src,
            dst,
            ttl: 64,
            tos: 0,
            id: 0x1234,
            dont_fragment: true,
            fragment: None,
            ip_options: Vec::new(),
            extensions: Vec::new(),
            body,
        }
    }

    /// The TCP segment, where it is one.
    pub fn tcp(&self) -> Result<&Tcp> {
        if let Body::Tcp(tcp) = &self.body { Ok(tcp) } else { bail!("no TCP but {:?}", self.body) }
    }

    /// The whole frame.
    #[must_use]
    pub fn frame(&self) -> Vec<u8> {
        let ethertype: [u8; 2] = if self.src.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        let mut out = self.macs.concat();
        out.extend(self.tags.as_flattened());
        out.extend(ethertype);
        out.extend(self.ip());
        out
    }

    /// From the IP header on.
    #[must_use]
    pub fn ip(&self) -> Vec<u8> {
        let (protocol, transport) = self.transport();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.ipv4(src, dst, protocol, &transport),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.ipv6(src, dst, protocol, &transport),
            _ => panic!("a packet from {} to {} has two families", self.src, self.dst),
        }
    }

    fn ipv4(&self, src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, transport: &[u8]) -> Vec<u8> {
        let header = 20 + self.ip_options.len();
        let (offset, more) = self.fragment.unwrap_or((0, false));
        let fragment =
            (offset / 8) | if more { 0x2000 } else { 0 } | if self.dont_fragment { 0x4000 } else { 0 };
        let mut out = vec![0x40 | (header / 4) as u8, self.tos];
        out.extend(((header + transport.len()) as u16).to_be_bytes());
        out.extend((self.id as u16).to_be_bytes());
        out.extend(fragment.to_be_bytes());
        out.extend([self.ttl, protocol, 0, 0]);
        out.extend(src.octets());
        out.extend(dst.octets());
        out.extend(&self.ip_options);
        let sum = checksum(&[&out]);
        out[10..12].copy_from_slice(&sum.to_be_bytes());
        out.extend(transport);
        out
    }

    fn ipv6(&self, src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, transport: &[u8]) -> Vec<u8> {
        let mut headers: Vec<(u8, Vec<u8>)> = self.extensions.clone();
        if let Some((offset, more)) = self.fragment {
            let [high, low] = (offset | u16::from(more)).to_be_bytes();
            let mut rest = vec![0, high, low];
            rest.extend(self.id.to_be_bytes());
            headers.push((44, rest));
        }
        let mut chain = Vec::new();
        for (i, (_, rest)) in headers.iter().enumerate() {
            chain.push(headers.get(i + 1).map_or(protocol, |next| next.0));
            chain.extend(rest);
        }
        let first = headers.first().map_or(protocol, |first| first.0);
        let word = 6 << 28 | u32::from(self.tos) << 20 | self.id & 0xf_ffff;
        let mut out = word.to_be_bytes().to_vec();
        out.extend(((chain.len() + transport.len()) as u16).to_be_bytes());
        out.extend([first, self.ttl]);
        out.extend(src.octets());
        out.extend(dst.octets());
        out.extend(chain);
        out.extend(transport);
        out
    }

    /// Protocol and bytes of what is inside.
    fn transport(&self) -> (u8, Vec<u8>) {
        match &self.body {
            Body::Raw(protocol, bytes) => (*protocol, bytes.clone()),
            Body::Tcp(tcp) => {
                let mut out = tcp.bytes();
                self.seal(6, &mut out, 16);
                (6, out)
            }
            Body::Udp(udp) => {
                let mut out = [udp.src.to_be_bytes(), udp.dst.to_be_bytes()].concat();
                out.extend(((8 + udp.payload.len()) as u16).to_be_bytes());
                out.extend([0, 0]);
                out.extend(&udp.payload);
                if !udp.unchecked {
                    self.seal(17, &mut out, 6);
                    if out[6..8] == [0, 0] {
                        out[6..8].copy_from_slice(&[0xff, 0xff]);
                    }
                }
                (17, out)
            }
            Body::Icmp(icmp) => {
                let mut out = vec![icmp.kind, icmp.code, 0, 0];
                out.extend(icmp.rest);
                out.extend(&icmp.payload);
                if self.src.is_ipv4() {
                    let sum = checksum(&[&out]);
                    out[2..4].copy_from_slice(&sum.to_be_bytes());
                    return (1, out);
                }
                self.seal(58, &mut out, 2);
                (58, out)
            }
        }
    }

    /// Writes the checksum with pseudo header at an offset that holds zeros.
    fn seal(&self, protocol: u8, bytes: &mut [u8], at: usize) {
        let sum = checksum(&[&pseudo(self.src, self.dst, protocol, bytes.len()), bytes]);
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }

    /// Reads a frame. Lengths must agree and checksums must be right; what is beyond the IP packet
    /// is padding. A fragment's content stays raw.
    pub fn parse(frame: &[u8]) -> Result<Self> {
        let mut reader = Reader(frame);
        let macs = [reader.array()?, reader.array()?];
        let mut tags = Vec::new();
        loop {
            match reader.array()? {
                tpid @ ([0x81, 0] | [0x88, 0xa8]) => {
                    let tci: [u8; 2] = reader.array()?;
                    tags.push([tpid[0], tpid[1], tci[0], tci[1]]);
                }
                [8, 0] => return Ok(Self { macs, tags, ..Self::parse_v4(reader.0, true)? }),
                [0x86, 0xdd] => return Ok(Self { macs, tags, ..Self::parse_v6(reader.0, true)? }),
                other => bail!("ethertype {other:02x?}"),
            }
        }
    }

    /// Reads an IP packet.
    pub fn parse_ip(bytes: &[u8]) -> Result<Self> {
        if bytes.first().is_some_and(|b| b >> 4 == 4) {
            Self::parse_v4(bytes, true)
        } else {
            Self::parse_v6(bytes, true)
        }
    }

    /// Reads the packet inside an ICMP error, which may be cut short: only its IP header is
    /// verified, and of the transport header eight bytes must be there.
    pub fn parse_quoted(bytes: &[u8]) -> Result<Self> {
        if bytes.first().is_some_and(|b| b >> 4 == 4) {
            Self::parse_v4(bytes, false)
        } else {
            Self::parse_v6(bytes, false)
        }
    }

    fn parse_v4(bytes: &[u8], whole: bool) -> Result<Self> {
        let first = *bytes.first().context("no IP header")?;
        let header = usize::from(first & 15) * 4;
        ensure!(first >> 4 == 4 && header >= 20, "IPv4 header begins with {first:#x}");
        let head = bytes.get(..header).context("IPv4 header cut short")?;
        ensure!(checksum(&[head]) == 0, "IPv4 checksum is wrong in {head:02x?}");
        let mut reader = Reader(&head[1..]);
        let [tos] = reader.array()?;
        let length = usize::from(reader.word()?);
        let id = u32::from(reader.word()?);
        let fragment = reader.word()?;
        let [ttl, protocol, _, _] = reader.array()?;
        let src = IpAddr::from(reader.array::<4>()?);
        let dst = IpAddr::from(reader.array::<4>()?);
        ensure!(
            length >= header && (!whole || length <= bytes.len()),
            "IPv4 length {length} of {}",
            bytes.len()
        );
        let content = &bytes[header..length.min(bytes.len())];
        let (offset, more) = ((fragment & 0x1fff) * 8, fragment & 0x2000 != 0);
        let fragment_of = (offset != 0 || more).then_some((offset, more));
        let body = if fragment_of.is_some() {
            Body::Raw(protocol, content.to_vec())
        } else {
            Body::parse(protocol, content, src, dst, whole)?
        };
        let mut packet = Self::new(src, dst, body);
        packet.macs = [[0; 6]; 2];
        (packet.ttl, packet.tos, packet.id) = (ttl, tos, id);
        packet.dont_fragment = fragment & 0x4000 != 0;
        packet.fragment = fragment_of;
        packet.ip_options = reader.0.to_vec();
        Ok(packet)
    }

    fn parse_v6(bytes: &[u8], whole: bool) -> Result<Self> {
        let mut reader = Reader(bytes);
        let word = u32::from_be_bytes(reader.array()?);
        ensure!(word >> 28 == 6, "IPv6 header begins with {word:#x}");
        let length = usize::from(reader.word()?);
        let [mut protocol, ttl] = reader.array()?;
        let src = IpAddr::from(reader.array::<16>()?);
        let dst = IpAddr::from(reader.array::<16>()?);
        ensure!(!whole || length <= reader.0.len(), "IPv6 length {length} of {}", reader.0.len());
        let mut content = &reader.0[..length.min(reader.0.len())];
        let mut extensions = Vec::new();
        let mut fragment = None;
        let mut id = word & 0xf_ffff;
        while matches!(protocol, 0 | 43 | 44 | 60) {
            let [next, words] = *content.first_chunk().context("extension header cut short")?;
            let size = if protocol == 44 { 8 } else { (usize::from(words) + 1) * 8 };
            let (header, after) = content.split_at_checked(size).context("extension header cut short")?;
            if protocol == 44 {
                let mut reader = Reader(&header[2..]);
                let offset = reader.word()?;
                fragment = Some((offset & 0xfff8, offset & 1 != 0));
                id = u32::from_be_bytes(reader.array()?);
            } else {
                extensions.push((protocol, header[1..].to_vec()));
            }
            (protocol, content) = (next, after);
        }
        let body = if fragment.is_some() {
            Body::Raw(protocol, content.to_vec())
        } else {
            Body::parse(protocol, content, src, dst, whole)?
        };
        let mut packet = Self::new(src, dst, body);
        packet.macs = [[0; 6]; 2];
        (packet.ttl, packet.tos, packet.id) = (ttl, (word >> 20) as u8, id);
        packet.fragment = fragment;
        packet.extensions = extensions;
        Ok(packet)
    }
}

impl Body {
    fn parse(protocol: u8, bytes: &[u8], src: IpAddr, dst: IpAddr, whole: bool) -> Result<Self> {
        let with_pseudo = || checksum(&[&pseudo(src, dst, protocol, bytes.len()), bytes]);
        match protocol {
            6 => {
                ensure!(!whole || with_pseudo() == 0, "TCP checksum is wrong in {bytes:02x?}");
                Ok(Self::Tcp(Tcp::parse(bytes, whole)?))
            }
            17 => {
                let mut reader = Reader(bytes);
                let [src_port, dst_port, length, sum] =
                    [reader.word()?, reader.word()?, reader.word()?, reader.word()?];
                ensure!(
                    !whole || usize::from(length) == bytes.len(),
                    "UDP length {length} of {}",
                    bytes.len()
                );
                ensure!(!whole || sum == 0 || with_pseudo() == 0, "UDP checksum is wrong in {bytes:02x?}");
                let payload = reader.0.to_vec();
                Ok(Self::Udp(Udp { src: src_port, dst: dst_port, unchecked: sum == 0, payload }))
            }
            1 | 58 => {
                let sum = if protocol == 1 { checksum(&[bytes]) } else { with_pseudo() };
                ensure!(!whole || sum == 0, "ICMP checksum is wrong in {bytes:02x?}");
                let mut reader = Reader(bytes);
                let [kind, code, _, _] = reader.array()?;
                Ok(Self::Icmp(Icmp { kind, code, rest: reader.array()?, payload: reader.0.to_vec() }))
            }
            _ => Ok(Self::Raw(protocol, bytes.to_vec())),
        }
    }
}

impl Tcp {
    /// Length of the options as built.
    #[must_use]
    pub fn options_len(&self) -> usize {
        self.options.iter().map(|option| option.bytes().len()).sum::<usize>().next_multiple_of(4)
    }

    /// The option of timestamps: TSval and TSecr.
    #[must_use]
    pub fn timestamps(&self) -> Option<(u32, u32)> {
        self.options.iter().find_map(|option| {
            if let TcpOption::Timestamps(val, ecr) = option { Some((*val, *ecr)) } else { None }
        })
    }

    /// The options without padding and NOPs.
    #[must_use]
    pub fn meaningful_options(&self) -> Vec<TcpOption> {
        self.options.iter().filter(|option| **option != TcpOption::Nop).cloned().collect()
    }

    /// The segment with a checksum of zero.
    fn bytes(&self) -> Vec<u8> {
        let mut options: Vec<u8> = self.options.iter().flat_map(TcpOption::bytes).collect();
        options.resize(self.options_len(), 0);
        let mut out = [self.src.to_be_bytes(), self.dst.to_be_bytes()].concat();
        out.extend(self.seq.to_be_bytes());
        out.extend(self.ack.to_be_bytes());
        out.extend([((20 + options.len()) / 4 * 16) as u8, self.flags]);
        out.extend(self.window.to_be_bytes());
        out.extend([0, 0]);
        out.extend(self.urgent.to_be_bytes());
        out.extend(options);
        out.extend(&self.payload);
        out
    }

    fn parse(bytes: &[u8], whole: bool) -> Result<Self> {
        let mut reader = Reader(bytes);
        let mut tcp = Self { src: reader.word()?, dst: reader.word()?, ..Self::default() };
        tcp.seq = u32::from_be_bytes(reader.array()?);
        if !whole && bytes.len() < 20 {
            return Ok(tcp);
        }
        tcp.ack = u32::from_be_bytes(reader.array()?);
        let [offset, flags] = reader.array()?;
        (tcp.flags, tcp.window) = (flags, reader.word()?);
        let _checksum = reader.word()?;
        tcp.urgent = reader.word()?;
        let header = usize::from(offset >> 4) * 4;
        ensure!(header >= 20, "TCP data offset {}", offset >> 4);
        if !whole && header > bytes.len() {
            return Ok(tcp);
        }
        let (options, payload) = reader.0.split_at_checked(header - 20).context("TCP options cut short")?;
        tcp.options = TcpOption::parse(options)?;
        tcp.payload = payload.to_vec();
        Ok(tcp)
    }
}

impl TcpOption {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Nop => vec![1],
            Self::Mss(mss) => [[2, 4], mss.to_be_bytes()].concat(),
            Self::Wscale(shift) => vec![3, 3, *shift],
            Self::SackPermitted => vec![4, 2],
            Self::Sack(blocks) => {
                let edges = blocks.iter().flat_map(|(left, right)| [left.to_be_bytes(), right.to_be_bytes()]);
                let mut out = vec![5, (2 + 8 * blocks.len()) as u8];
                out.extend(edges.flatten());
                out
            }
            Self::Timestamps(val, ecr) => [&[8, 10], &val.to_be_bytes()[..], &ecr.to_be_bytes()].concat(),
            Self::Raw(bytes) => bytes.clone(),
        }
    }

    fn parse(mut bytes: &[u8]) -> Result<Vec<Self>> {
        let mut out = Vec::new();
        while let Some(&kind) = bytes.first() {
            if kind == 0 {
                ensure!(bytes.iter().all(|b| *b == 0), "TCP options after their end: {bytes:02x?}");
                break;
            }
            if kind == 1 {
                out.push(Self::Nop);
                bytes = &bytes[1..];
                continue;
            }
            let size = usize::from(*bytes.get(1).context("TCP option cut short")?);
            ensure!(size >= 2, "TCP option of length {size}");
            let (option, rest) = bytes.split_at_checked(size).context("TCP option cut short")?;
            let number = |at: usize| option[at..].first_chunk().map(|b| u32::from_be_bytes(*b)).unwrap_or(0);
            out.push(match (kind, size) {
                (2, 4) => Self::Mss(u16::from_be_bytes([option[2], option[3]])),
                (3, 3) => Self::Wscale(option[2]),
                (4, 2) => Self::SackPermitted,
                (8, 10) => Self::Timestamps(number(2), number(6)),
                (5, 10 | 18 | 26 | 34) => {
                    Self::Sack((2..size).step_by(8).map(|at| (number(at), number(at + 4))).collect())
                }
                _ => Self::Raw(option.to_vec()),
            });
            bytes = rest;
        }
        Ok(out)
    }
}

/// The Internet checksum over parts that follow one another, each but the last of even length.
#[must_use]
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    !(sum as u16)
}

fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for address in [src, dst] {
        match address {
            IpAddr::V4(v4) => out.extend(v4.octets()),
            IpAddr::V6(v6) => out.extend(v6.octets()),
        }
    }
    out.extend((length as u32).to_be_bytes());
    out.extend([0, 0, 0, protocol]);
    out
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk().with_context(|| format!("{N} bytes are missing"))?;
        self.0 = rest;
        Ok(*array)
    }

    fn word(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(v4: bool) -> (IpAddr, IpAddr) {
        if v4 {
            (IpAddr::from([192, 0, 2, 1]), IpAddr::from([198, 51, 100, 1]))
        } else {
            ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap())
        }
    }

    fn samples() -> Vec<Packet> {
        let tcp = Tcp {
            src: 1000,
            dst: 443,
            seq: 7,
            ack: 9,
            flags: flags::ACK,
            window: 100,
            options: vec![
                TcpOption::Nop,
                TcpOption::Nop,
                TcpOption::Timestamps(1, 2),
                TcpOption::Nop,
                TcpOption::Nop,
                TcpOption::Sack(vec![(1, 2), (3, 4)]),
            ],
            payload: b"odd".to_vec(),
            ..Tcp::default()
        };
        let udp = Udp { src: 1, dst: 2, unchecked: false, payload: b"hello".to_vec() };
        let icmp = Icmp { kind: 3, code: 4, rest: [0, 0, 5, 0xdc], payload: vec![1, 2, 3] };
        let mut out = Vec::new();
        for v4 in [true, false] {
            let (src, dst) = addresses(v4);
            for body in [Body::Tcp(tcp.clone()), Body::Udp(udp.clone()), Body::Icmp(icmp.clone())] {
                let mut packet = Packet::new(src, dst, body);
                packet.tags = vec![[0x88, 0xa8, 0, 1], [0x81, 0, 0, 2]];
                packet.dont_fragment = true;
                if v4 {
                    packet.ip_options = vec![7, 7, 4, 0, 0, 0, 0, 0];
                } else {
                    packet.extensions =
                        vec![(0, vec![0; 7]), (60, vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])];
                }
                out.push(packet);
            }
        }
        out
    }

    #[test]
    fn what_is_built_is_read_back() {
        for packet in samples() {
            assert_eq!(Packet::parse(&packet.frame()).unwrap(), packet);
        }
    }

    #[test]
    fn a_changed_bit_in_header_or_payload_is_found() {
        for packet in samples() {
            let frame = packet.frame();
            let mut tolerated = 0;
            for at in 22..frame.len() {
                for bit in 0..8 {
                    let mut frame = frame.clone();
                    frame[at] ^= 1 << bit;
                    let Ok(changed) = Packet::parse(&frame) else { continue };
                    // IPv6 has no checksum over traffic class, flow label, hop limit and options;
                    // a protocol that we do not read has none at all.
                    tolerated += 1;
                    assert!(changed != packet || packet.src.is_ipv6(), "{changed:?}");
                    assert!(packet.src.is_ipv6(), "bit {bit} of byte {at} of {packet:?}");
                }
            }
            assert!(tolerated < 250, "{tolerated}");
        }
    }

    #[test]
    fn every_prefix_is_refused() {
        for packet in samples() {
            let frame = packet.frame();
            for length in 0..frame.len() {
                assert!(Packet::parse(&frame[..length]).is_err(), "{length} of {}", frame.len());
            }
        }
    }

    #[test]
    fn a_checksum_by_hand() {
        let (src, dst) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let tcp = Tcp { src: 53004, dst: 80, seq: 1, flags: flags::SYN, window: 64240, ..Tcp::default() };
        let ip = Packet::new(src, dst, Body::Tcp(tcp)).ip();
        let words: u32 = 0x0a00 + 1 + 0x0a00 + 2 + 6 + 20 + 53004 + 80 + 1 + 0x5002 + 64240;
        let folded = (words & 0xffff) + (words >> 16);
        assert_eq!(u16::from_be_bytes([ip[36], ip[37]]), !(folded as u16));
        // RFC 1071 section 3: the bytes sum to ddf2.
        assert_eq!(!checksum(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]), 0xddf2);
    }
}
