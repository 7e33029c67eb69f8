//! Captures: pcap and pcapng become Ethernet frames.

use std::{fs, io::Read as _, path::Path};

use pcap_parser::{
    Block, LegacyPcapBlock, Linktype, PcapError, PcapHeader,
    nom::{Err as Broken, IResult},
    parse_block_be, parse_block_le, parse_pcap_frame, parse_pcap_frame_be, parse_pcap_frame_modified,
    parse_pcap_header,
    traits::PcapNGPacketBlock as _,
};

use super::Error;

/// Most bytes of a capture, which is held in memory.
const FILE_MAX: u64 = 1 << 30;
/// Longest packet that any tool captures (`MAXIMUM_SNAPLEN` of libpcap).
const PACKET_MAX: usize = 262_144;
/// MAC addresses for packets that were captured without: locally administered, destination first.
const MACS: [u8; 12] = [2, 0, 0, 0, 0, 0xd0, 2, 0, 0, 0, 0, 0xc0];

/// What a capture holds.
#[derive(Debug, Default)]
pub(super) struct Capture {
    /// The packets, in the capture's order.
    pub(super) packets: Vec<Packet>,
    /// Why reading ended before the end of the file, if it did.
    pub(super) broken: Option<String>,
}

/// A packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Packet {
    /// The Ethernet frame.
    pub(super) frame: Vec<u8>,
    /// The capture holds only the start of the packet.
    pub(super) cut: bool,
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<Capture, Error> {
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(Error::TooLarge { path: path.to_owned(), most: FILE_MAX });
    }
    parse(&bytes).map_err(|problem| Error::Format { path: path.to_owned(), problem })
}

fn parse(bytes: &[u8]) -> Result<Capture, String> {
    match bytes.first_chunk() {
        None if bytes.is_empty() => Err(
            "it is empty, not even a header; give a pcap or pcapng file, as `tcpdump -w` and `dumpcap` write"
                .to_owned(),
        ),
        Some([0x0a, 0x0d, 0x0d, 0x0a]) => pcapng(bytes),
        Some(
            [0xd4 | 0x4d, 0xc3 | 0x3c, 0xb2, 0xa1]
            | [0xa1, 0xb2, 0xc3 | 0x3c, 0xd4 | 0x4d]
            | [0x34, 0xcd, 0xb2, 0xa1],
        ) => pcap(bytes),
        Some([0x1f, 0x8b, _, _]) => Err("it is compressed (gzip); unpack it first: gzip -d".to_owned()),
        _ => {
            Err("it is neither pcap nor pcapng; `tcpdump -w` writes the one, `dumpcap` the other".to_owned())
        }
    }
}

fn pcap(bytes: &[u8]) -> Result<Capture, String> {
    let (mut rest, header) =
        parse_pcap_header(bytes).map_err(|_| "its header is cut short: no packets".to_owned())?;
    // The upper bits tell of checksums at the frame's end (RFC draft-ietf-opsawg-pcap section 4).
    let link = Link::of(Linktype(header.network.0 & 0xffff))?;
    let frame = frame_parser(&header);
    let mut capture = Capture::default();
    while !rest.is_empty() {
        match frame(rest) {
            Ok((after, block)) if block.data.len() <= PACKET_MAX => {
                let cut = (block.origlen as usize) > block.data.len();
                capture.packets.push(Packet { frame: link.ethernet(block.data), cut });
                rest = after;
            }
            _ => return Ok(capture.broken_here(bytes.len() - rest.len())),
        }
    }
    Ok(capture)
}

type FrameParser = fn(&[u8]) -> IResult<&[u8], LegacyPcapBlock<'_>, PcapError<&[u8]>>;

fn frame_parser(header: &PcapHeader) -> FrameParser {
    match (header.is_modified_format(), header.is_bigendian()) {
        (true, _) => parse_pcap_frame_modified,
        (false, true) => parse_pcap_frame_be,
        (false, false) => parse_pcap_frame,
    }
}

fn pcapng(bytes: &[u8]) -> Result<Capture, String> {
    let mut capture = Capture::default();
    let mut links: Vec<(Result<Link, String>, usize)> = Vec::new();
    let mut rest = bytes;
    let mut big = false;
    while !rest.is_empty() {
        // A section's header says its byte order by itself.
        let (after, block) = match if big { parse_block_be(rest) } else { parse_block_le(rest) } {
            Ok(parsed) => parsed,
            Err(Broken::Incomplete(_) | Broken::Error(_) | Broken::Failure(_)) => {
                return Ok(capture.broken_here(bytes.len() - rest.len()));
            }
        };
        let mut take = |interface: u32, original: u32, data: &[u8]| {
            let Some((link, most)) = links.get(interface as usize) else { return Ok(false) };
            // Of several interfaces only those with packets matter.
            let link = link.clone()?;
            // A simple packet block does not say how much was captured: the interface does.
            let data = data.get(..data.len().min(*most)).unwrap_or(data);
            let cut = (original as usize) > data.len();
            capture.packets.push(Packet { frame: link.ethernet(data), cut });
            Ok::<_, String>(data.len() <= PACKET_MAX)
        };
        let good = match &block {
            Block::SectionHeader(section) => {
                big = section.big_endian();
                links.clear();
                true
            }
            Block::InterfaceDescription(interface) => {
                let most = if interface.snaplen == 0 { usize::MAX } else { interface.snaplen as usize };
                links.push((Link::of(interface.linktype), most));
                true
            }
            Block::EnhancedPacket(packet) => take(packet.if_id, packet.origlen, packet.packet_data())?,
            Block::SimplePacket(packet) => take(0, packet.origlen, packet.packet_data())?,
            // No packets.
            Block::NameResolution(_)
            | Block::InterfaceStatistics(_)
            | Block::SystemdJournalExport(_)
            | Block::DecryptionSecrets(_)
            | Block::ProcessInformation(_)
            | Block::Custom(_)
            | Block::Unknown(_) => true,
        };
        if !good {
            return Ok(capture.broken_here(bytes.len() - rest.len()));
        }
        rest = after;
    }
    Ok(capture)
}

impl Capture {
    fn broken_here(mut self, at: usize) -> Self {
        self.broken = Some(format!(
            "after packet {}, at byte {at}, no whole packet follows: the file was cut short, or a length in it is wrong",
            self.packets.len()
        ));
        self
    }
}

/// What a captured packet begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Ethernet,
    /// An IP header.
    Raw,
    /// The header of Linux's "any" device: where the protocol stands, and the header's length.
    Cooked {
        protocol: usize,
        len: usize,
    },
}

impl Link {
    fn of(kind: Linktype) -> Result<Self, String> {
        match kind {
            Linktype::ETHERNET => Ok(Self::Ethernet),
            // 12 and 14 are what some systems call RAW (LINKTYPE_RAW of libpcap).
            Linktype::RAW | Linktype::IPV4 | Linktype::IPV6 | Linktype(12 | 14) => Ok(Self::Raw),
            Linktype::LINUX_SLL => Ok(Self::Cooked { protocol: 14, len: 16 }),
            Linktype::LINUX_SLL2 => Ok(Self::Cooked { protocol: 0, len: 20 }),
            other => Err(format!(
                "its link type is {}; Ethernet, raw IP and Linux cooked (SLL, SLL2) can be read: capture on an interface whose frames are Ethernet's",
                other.0
            )),
        }
    }

    /// The packet as an Ethernet frame.
    fn ethernet(self, data: &[u8]) -> Vec<u8> {
        let (ethertype, content) = match self {
            Self::Ethernet => return data.to_vec(),
            Self::Raw => {
                (if data.first().is_some_and(|byte| byte >> 4 == 6) { [0x86, 0xdd] } else { [8, 0] }, data)
            }
            Self::Cooked { protocol, len } => {
                let ethertype = data.get(protocol..protocol + 2).and_then(|bytes| bytes.first_chunk());
                (ethertype.copied().unwrap_or_default(), data.get(len..).unwrap_or_default())
            }
        };
        [&MACS[..], &ethertype, content].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number in either byte order.
    fn word(big: bool, value: u32) -> [u8; 4] {
        if big { value.to_be_bytes() } else { value.to_le_bytes() }
    }

    fn half(big: bool, value: u16) -> [u8; 2] {
        if big { value.to_be_bytes() } else { value.to_le_bytes() }
    }

    fn pcap_file(big: bool, magic: u32, link: u32, packets: &[(&[u8], u32)]) -> Vec<u8> {
        let mut out = word(big, magic).to_vec();
        out.extend([half(big, 2), half(big, 4)].concat());
        out.extend([word(big, 0), word(big, 0), word(big, 65_535), word(big, link)].concat());
        for (data, original) in packets {
            out.extend(
                [word(big, 1), word(big, 2), word(big, data.len() as u32), word(big, *original)].concat(),
            );
            out.extend(*data);
        }
        out
    }

    fn block(big: bool, kind: u32, content: &[u8]) -> Vec<u8> {
        let padded = content.len().next_multiple_of(4);
        let len = word(big, padded as u32 + 12);
        let padding = vec![0; padded - content.len()];
        [&word(big, kind)[..], &len, content, &padding, &len].concat()
    }

    fn pcapng_file(big: bool, link: u16, packets: &[(&[u8], u32)]) -> Vec<u8> {
        let section = [&word(big, 0x1a2b_3c4d)[..], &half(big, 1), &half(big, 0), &[0xff; 8]].concat();
        let interface = [&half(big, link)[..], &half(big, 0), &word(big, 0)].concat();
        let mut out = [block(big, 0x0a0d_0d0a, &section), block(big, 1, &interface)].concat();
        for (data, original) in packets {
            let head = [0, 0, 0, data.len() as u32, *original].map(|value| word(big, value)).concat();
            out.extend(block(big, 6, &[&head, *data].concat()));
            // Statistics of the interface come in between.
            out.extend(block(big, 5, &[0; 12]));
        }
        out
    }

    #[test]
    fn both_formats_in_both_byte_orders() {
        let packets: [(&[u8], u32); 2] = [(&[7; 61], 61), (&[8; 60], 1500)];
        let mut files = Vec::new();
        for big in [false, true] {
            // Microseconds and nanoseconds.
            for magic in [0xa1b2_c3d4, 0xa1b2_3c4d] {
                files.push(pcap_file(big, magic, 1, &packets));
            }
            files.push(pcapng_file(big, 1, &packets));
        }
        for file in files {
            let capture = parse(&file).expect("a capture");
            assert_eq!(capture.broken, None, "{:02x?}", &file[..4]);
            let wanted =
                [Packet { frame: vec![7; 61], cut: false }, Packet { frame: vec![8; 60], cut: true }];
            assert_eq!(capture.packets, wanted, "{:02x?}", &file[..4]);
        }
    }

    #[test]
    fn simple_packets_are_as_long_as_the_interface_captures() {
        for big in [false, true] {
            let section = [&word(big, 0x1a2b_3c4d)[..], &half(big, 1), &half(big, 0), &[0xff; 8]].concat();
            let interface = [&half(big, 1)[..], &half(big, 0), &word(big, 62)].concat();
            let packet =
                |original: u32, data: &[u8]| block(big, 3, &[&word(big, original)[..], data].concat());
            let file = [
                block(big, 0x0a0d_0d0a, &section),
                block(big, 1, &interface),
                packet(61, &[7; 61]),
                packet(1500, &[8; 62]),
                // Of an interface that nothing describes.
                block(
                    big,
                    6,
                    &[word(big, 9), word(big, 0), word(big, 0), word(big, 0), word(big, 0)].concat(),
                ),
            ]
            .concat();
            let capture = parse(&file).expect("a capture");
            let wanted =
                [Packet { frame: vec![7; 61], cut: false }, Packet { frame: vec![8; 62], cut: true }];
            assert_eq!(capture.packets, wanted);
            assert!(capture.broken.expect("a reason").contains("after packet 2,"));
        }
    }

    #[test]
    fn every_interface_has_its_own_link_type() {
        let ip = [&[0x45][..], &[1; 30]].concat();
        for big in [false, true] {
            let section = [&word(big, 0x1a2b_3c4d)[..], &half(big, 1), &half(big, 0), &[0xff; 8]].concat();
            let interface =
                |link: u16| block(big, 1, &[&half(big, link)[..], &half(big, 0), &word(big, 0)].concat());
            let packet = |interface: u32, data: &[u8]| {
                let head = [interface, 0, 0, data.len() as u32, data.len() as u32];
                block(big, 6, &[&head.map(|value| word(big, value)).concat(), data].concat())
            };
            // Ethernet; radio, without packets; raw IP. A second section counts its interfaces anew.
            let file = [
                block(big, 0x0a0d_0d0a, &section),
                interface(1),
                interface(127),
                interface(101),
                packet(2, &ip),
                packet(0, &[7; 60]),
                block(big, 0x0a0d_0d0a, &section),
                interface(101),
                packet(0, &ip),
            ]
            .concat();
            let capture = parse(&file).expect("a capture");
            let raw = || Packet { frame: [&MACS[..], &[8, 0], &ip].concat(), cut: false };
            assert_eq!(capture.packets, [raw(), Packet { frame: vec![7; 60], cut: false }, raw()]);
            assert_eq!(capture.broken, None);
        }
    }

    #[test]
    fn every_prefix_keeps_the_packets_that_are_whole() {
        let packets: [(&[u8], u32); 3] = [(&[7; 60], 60), (&[8; 61], 61), (&[9; 62], 62)];
        for file in [pcap_file(false, 0xa1b2_c3d4, 1, &packets), pcapng_file(true, 1, &packets)] {
            let mut most = 0;
            for end in 0..=file.len() {
                let Ok(capture) = parse(&file[..end]) else {
                    assert_eq!(most, 0, "{end}");
                    continue;
                };
                assert!(capture.packets.len() >= most && capture.packets.len() <= 3, "{end}");
                most = capture.packets.len();
                if let Some(problem) = &capture.broken {
                    assert!(problem.contains(&format!("after packet {most},")), "{problem}");
                }
            }
            assert_eq!(most, 3);
        }
    }

    #[test]
    fn changed_bytes_never_panic() {
        let packets: [(&[u8], u32); 2] = [(&[7; 60], 60), (&[8; 61], 61)];
        for file in [pcap_file(true, 0xa1b2_3c4d, 113, &packets), pcapng_file(false, 276, &packets)] {
            for at in 0..file.len() {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut file = file.clone();
                    file[at] = value;
                    if let Ok(capture) = parse(&file) {
                        assert!(capture.packets.len() <= 2, "byte {at} = {value}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_length_that_lies_ends_the_reading() {
        let mut file = pcap_file(false, 0xa1b2_c3d4, 1, &[(&[7; 60], 60), (&[8; 60], 60)]);
        file[24 + 16 + 60 + 8..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let capture = parse(&file).expect("a capture");
        assert_eq!(capture.packets.len(), 1);
        assert!(capture.broken.expect("a reason").contains("after packet 1, at byte 100"));
    }

    #[test]
    fn other_link_types_get_an_ethernet_header() {
        let raw = [&[0x45][..], &[1; 30]].concat();
        let raw6 = [&[0x60][..], &[1; 50]].concat();
        let cooked = [&[0; 14][..], &[8, 0], &raw].concat();
        let cooked2 = [&[0x86, 0xdd][..], &[0; 18], &raw6].concat();
        for (link, packet, ethertype, content) in [
            (101, &raw, [8, 0], &raw),
            (12, &raw6, [0x86, 0xdd], &raw6),
            (228, &raw, [8, 0], &raw),
            (113, &cooked, [8, 0], &raw),
            (276, &cooked2, [0x86, 0xdd], &raw6),
        ] {
            let file = pcap_file(false, 0xa1b2_c3d4, link, &[(packet, packet.len() as u32)]);
            let capture = parse(&file).expect("a capture");
            let frame = [&MACS[..], &ethertype, content].concat();
            assert_eq!(capture.packets, [Packet { frame, cut: false }], "{link}");
        }
        for file in [pcap_file(false, 0xa1b2_c3d4, 127, &[]), pcapng_file(false, 127, &[(&raw, 31)])] {
            let error = parse(&file).expect_err("radio");
            assert!(error.contains("127") && error.contains("Ethernet"), "{error}");
        }
    }

    #[test]
    fn what_is_no_capture_is_said() {
        assert!(parse(b"").expect_err("nothing").contains("empty"));
        for bytes in [&b"abc"[..], b"#!/bin/sh\n"] {
            assert!(parse(bytes).expect_err("no capture").contains("neither"), "{bytes:?}");
        }
        assert!(parse(&[0x1f, 0x8b, 8, 0]).expect_err("gzip").contains("gzip -d"));
    }
}
