//! QUIC, as far as every version of it looks the same (RFC 8999 section 5), and connection IDs that name
//! their server in clear (draft-ietf-quic-load-balancers-21, called QUIC-LB).

use crate::tls::Bytes;

/// Longest connection ID of versions 1 and 2 (RFC 9000 section 17.2), and the longest considered.
pub const CID_MAX: usize = 20;
/// Bytes at the start of a datagram in which both connection IDs of a long header lie, if neither is longer.
pub const HEAD_MAX: usize = 7 + 2 * CID_MAX;

/// Longest server ID (QUIC-LB section 5.3: with the nonce at most 19 bytes).
pub const SERVER_ID_MAX: usize = 15;
/// Shortest nonce (QUIC-LB section 5.3).
pub const NONCE_MIN: usize = 4;
/// The configuration ID of connection IDs that no load balancer can read (QUIC-LB section 3.2).
pub const UNROUTABLE: u8 = 7;

const VERSION_1: u32 = 1;
/// RFC 9369.
const VERSION_2: u32 = 0x6b33_43cf;

/// What a datagram begins with.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Form {
    /// A short header: how long the connection ID is only its server knows.
    #[default]
    Short,
    /// A long header.
    Long,
    /// A long header of an unknown version, with longer connection IDs than any known one has.
    Other,
    /// A long header that is cut short, or longer connection IDs than its version has.
    Bad,
}

/// Where a connection ID stands in a datagram.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Cid {
    /// Offset.
    pub at: u32,
    /// Length, at most [`CID_MAX`].
    pub len: u32,
}

/// The first header of a datagram.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Head {
    /// What it is.
    pub form: Form,
    /// Version of a long header; 0 is Version Negotiation.
    pub version: u32,
    /// Destination connection ID. In a short header as many bytes as there are, at most [`CID_MAX`].
    pub dcid: Cid,
    /// Source connection ID of a long header.
    pub scid: Cid,
}

/// Reads the first header of a datagram of `total` bytes, of which `bytes` holds the first [`HEAD_MAX`], or
/// all.
#[inline(always)]
pub fn head<B: Bytes + ?Sized>(bytes: &B, total: usize) -> Head {
    let none = Cid { at: 0, len: 0 };
    let bad = Head { form: Form::Bad, version: 0, dcid: none, scid: none };
    let Some(first) = bytes.byte(0) else {
        return Head { form: Form::Short, version: 0, dcid: none, scid: none };
    };
    if first & 0x80 == 0 {
        let after = total.saturating_sub(1);
        let len = if after > CID_MAX { CID_MAX } else { after };
        return Head { form: Form::Short, version: 0, dcid: Cid { at: 1, len: len as u32 }, scid: none };
    }
    let (Some(a), Some(b), Some(c), Some(d)) = (bytes.byte(1), bytes.byte(2), bytes.byte(3), bytes.byte(4))
    else {
        return bad;
    };
    let version = u32::from_be_bytes([a, b, c, d]);
    let too_long = if version == VERSION_1 || version == VERSION_2 { Form::Bad } else { Form::Other };
    let too_long = Head { form: too_long, version, dcid: none, scid: none };
    let Some(dcid_len) = bytes.byte(5) else { return bad };
    let dcid_len = dcid_len as usize;
    // The length of the other ID follows.
    if 6 + dcid_len >= total {
        return bad;
    }
    if dcid_len > CID_MAX {
        return too_long;
    }
    let Some(scid_len) = bytes.byte(6 + dcid_len) else { return bad };
    let (scid_at, scid_len) = (7 + dcid_len, scid_len as usize);
    if scid_at + scid_len > total {
        return bad;
    }
    if scid_len > CID_MAX {
        return too_long;
    }
    Head {
        form: Form::Long,
        version,
        dcid: Cid { at: 6, len: dcid_len as u32 },
        scid: Cid { at: scid_at as u32, len: scid_len as u32 },
    }
}

/// The configuration ID in a connection ID's first byte (QUIC-LB section 3.1).
#[inline(always)]
#[must_use]
pub const fn config_id(first: u8) -> u8 {
    first >> 5
}

/// Length of the server ID that follows a connection ID's first byte, 0 when it has none that we could read:
/// `lengths` are those of the configurations, 0 for none, and `cid_len` is the connection ID's length, or more
/// where that is not known.
#[inline(always)]
#[must_use]
pub const fn server_id_len(first: u8, cid_len: usize, lengths: &[u8; 8]) -> usize {
    let config = config_id(first);
    // The mask is for the verifier.
    let len = lengths[(config & 7) as usize] as usize;
    if config == UNROUTABLE || len > SERVER_ID_MAX || cid_len < 1 + len + NONCE_MIN { 0 } else { len }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    /// Beginnings of the packets in RFC 9001 appendix A, and a short one with a connection ID.
    const INITIAL: [u8; 22] = [
        0xc0, 0, 0, 0, 1, 8, 0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08, 0, 0, 0x44, 0x9e, 0x7b, 0x9a,
        0xec, 0x34,
    ];
    const SERVER_INITIAL: [u8; 22] = [
        0xcf, 0, 0, 0, 1, 0, 8, 0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62, 0xb5, 0, 0x40, 0x75, 0xc0, 0xd9,
        0x5a, 0x48,
    ];
    const RETRY: [u8; 36] = [
        0xff, 0, 0, 0, 1, 0, 8, 0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62, 0xb5, b't', b'o', b'k', b'e', b'n',
        0x04, 0xa2, 0x65, 0xba, 0x2e, 0xff, 0x4d, 0x82, 0x90, 0x58, 0xfb, 0x3f, 0x0f, 0x24, 0x96, 0xba,
    ];
    const SHORT: [u8; 21] = [
        0x4c, 0xfe, 0x41, 0x89, 0x65, 0x5e, 0x5c, 0xd5, 0x5c, 0x41, 0xf6, 0x90, 0x80, 0x57, 0x5d, 0x79, 0x99,
        0xc2, 0x5a, 0x5b, 0xfb,
    ];

    fn of(bytes: &[u8]) -> Head {
        head(&bytes[..bytes.len().min(HEAD_MAX)], bytes.len())
    }

    fn cid(bytes: &[u8], cid: Cid) -> &[u8] {
        &bytes[cid.at as usize..][..cid.len as usize]
    }

    #[test]
    fn packets_of_the_rfc() {
        let given = [0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62, 0xb5];
        let chosen = [0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];
        for (packet, dcid, scid) in [
            (&INITIAL[..], &chosen[..], &[][..]),
            (&SERVER_INITIAL[..], &[][..], &given[..]),
            (&RETRY[..], &[][..], &given[..]),
        ] {
            let head = of(packet);
            assert_eq!((head.form, head.version), (Form::Long, 1));
            assert_eq!((cid(packet, head.dcid), cid(packet, head.scid)), (dcid, scid));
        }
        let head = of(&SHORT);
        assert_eq!((head.form, cid(&SHORT, head.dcid)), (Form::Short, &SHORT[1..]));
        assert_eq!(of(&[0x40; 100]).dcid, Cid { at: 1, len: 20 });
        assert_eq!(
            (of(&[0x40; 1]), of(&[])),
            (Head { dcid: Cid { at: 1, len: 0 }, ..Head::default() }, Head::default())
        );
    }

    #[test]
    fn every_prefix_of_a_long_header_is_bad() {
        for (packet, end) in [(&INITIAL[..], 15), (&SERVER_INITIAL[..], 15), (&RETRY[..], 15)] {
            for len in 1..packet.len() {
                let form = of(&packet[..len]).form;
                assert_eq!(form, if len < end { Form::Bad } else { Form::Long }, "{len} bytes");
            }
        }
    }

    #[test]
    fn lengths_beyond_the_version_or_the_datagram() {
        // Version, lengths of both IDs, and how many bytes are missing.
        for (version, dcid, scid, missing, form) in [
            (1, 20, 20, 0, Form::Long),
            (1, 20, 20, 1, Form::Bad),
            (1, 21, 0, 0, Form::Bad),
            (1, 0, 21, 0, Form::Bad),
            (VERSION_2, 0, 21, 0, Form::Bad),
            (VERSION_2, 20, 20, 0, Form::Long),
            (0, 20, 20, 0, Form::Long),
            (0x0a0a_0a0a, 21, 0, 0, Form::Other),
            (0x0a0a_0a0a, 0, 255, 0, Form::Other),
            (0x0a0a_0a0a, 0, 255, 1, Form::Bad),
            (0x0a0a_0a0a, 255, 0, 1, Form::Bad),
            (0x0a0a_0a0a, 255, 255, 255, Form::Other),
            (0x0a0a_0a0a, 20, 20, 0, Form::Long),
        ] {
            let mut packet = Vec::from([0x80_u8]);
            packet.extend(u32::to_be_bytes(version));
            packet.push(dcid as u8);
            packet.extend((0..dcid).map(|_| 7_u8));
            packet.push(scid as u8);
            packet.extend((0..scid).map(|_| 8_u8));
            packet.truncate(packet.len() - missing);
            assert_eq!(of(&packet).form, form, "{version:#x} {dcid} {scid} {missing}");
        }
    }

    #[test]
    fn random_changes_stay_within_the_datagram() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..50_000 {
            for base in [&INITIAL[..], &SERVER_INITIAL, &RETRY, &SHORT] {
                let mut bytes = Vec::from(base);
                for _ in 0..3 {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let at = state as usize % bytes.len();
                    bytes[at] = (state >> 32) as u8;
                }
                bytes.truncate(1 + (state >> 40) as usize % bytes.len());
                let head = of(&bytes);
                for cid in [head.dcid, head.scid] {
                    assert!(cid.len as usize <= CID_MAX && (cid.at + cid.len) as usize <= bytes.len());
                }
                let found = server_id_len(bytes[0], head.dcid.len as usize, &[1, 2, 3, 15, 16, 255, 9, 3]);
                assert!(found == 0 || 1 + found + NONCE_MIN <= head.dcid.len as usize);
            }
        }
    }

    /// QUIC-LB appendix B.1. The draft prints the second row without the leading zeros of two bytes:
    /// `20a350d28b4203487d970b`, where the first byte must be 2a (configuration 1, ten more bytes).
    #[test]
    fn vectors_of_the_draft() {
        for (config, server_id, nonce, cid) in [
            (
                0,
                &[0xc4, 0x60, 0x5e][..],
                &[0x45, 0x04, 0xcc, 0x4f][..],
                &[0x07, 0xc4, 0x60, 0x5e, 0x45, 0x04, 0xcc, 0x4f][..],
            ),
            (
                1,
                &[0x35, 0x0d, 0x28, 0xb4, 0x20],
                &[0x34, 0x87, 0xd9, 0x70, 0x0b],
                &[0x2a, 0x35, 0x0d, 0x28, 0xb4, 0x20, 0x34, 0x87, 0xd9, 0x70, 0x0b],
            ),
        ] {
            let mut lengths = [0; 8];
            lengths[config] = server_id.len() as u8;
            assert_eq!(usize::from(config_id(cid[0])), config);
            let len = server_id_len(cid[0], cid.len(), &lengths);
            assert_eq!((&cid[1..=len], &cid[1 + len..]), (server_id, nonce));
        }
    }

    #[test]
    fn what_is_not_routable() {
        let lengths = [3, 15, 0, 16, 0, 0, 1, 3];
        for (first, cid_len, expected) in [
            (0x00, 8, 3),
            (0x1f, 20, 3),
            (0x00, 7, 0),
            (0x20, 20, 15),
            (0x20, 19, 0),
            (0x40, 20, 0),
            (0x60, 20, 0),
            (0xc0, 6, 1),
            (0xc0, 5, 0),
            (0xe0, 20, 0),
            (0xff, 0, 0),
        ] {
            assert_eq!(server_id_len(first, cid_len, &lengths), expected, "{first:#x} {cid_len}");
        }
    }
}
