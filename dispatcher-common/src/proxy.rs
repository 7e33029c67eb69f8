//! PROXY protocol version 2 (HAProxy's proxy-protocol.txt, section 2.2).

use crate::{addr::Addr, flow::FlowKey};

/// Room for a header, in 32-bit words; a header is right-aligned in it, so that payload follows.
pub const ROOM_WORDS: usize = 16;
/// The same in bytes.
pub const ROOM: usize = ROOM_WORDS * 4;
/// Length of a header for TCP over IPv4, bytes.
pub const LEN_V4: u32 = 28;
/// Length of a header for TCP over IPv6, bytes.
pub const LEN_V6: u32 = 52;

const SIGNATURE: [[u8; 4]; 3] = [*b"\r\n\r\n", *b"\0\r\nQ", *b"UIT\n"];

/// Writes the header for a client's flow at the end of `room`; returns its length in bytes.
#[inline(always)]
pub fn write(flow: &FlowKey, room: &mut [u32; ROOM_WORDS]) -> u32 {
    let word = u32::from_ne_bytes;
    let signature = [word(SIGNATURE[0]), word(SIGNATURE[1]), word(SIGNATURE[2])];
    let Addr { words: s } = flow.src;
    let Addr { words: d } = flow.dst;
    if flow.src.is_v4() {
        room[9] = signature[0];
        room[10] = signature[1];
        room[11] = signature[2];
        // version 2, PROXY; TCP over IPv4; 12 bytes follow.
        room[12] = word([0x21, 0x11, 0, 12]);
        room[13] = s[3];
        room[14] = d[3];
        room[15] = flow.ports;
        LEN_V4
    } else {
        room[3] = signature[0];
        room[4] = signature[1];
        room[5] = signature[2];
        // version 2, PROXY; TCP over IPv6; 36 bytes follow.
        room[6] = word([0x21, 0x21, 0, 36]);
        room[7] = s[0];
        room[8] = s[1];
        room[9] = s[2];
        room[10] = s[3];
        room[11] = d[0];
        room[12] = d[1];
        room[13] = d[2];
        room[14] = d[3];
        room[15] = flow.ports;
        LEN_V6
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::ports_word;

    fn bytes(room: [u32; ROOM_WORDS], len: u32) -> ([u8; ROOM], usize) {
        let mut out = [0; ROOM];
        for (chunk, word) in out.chunks_mut(4).zip(room) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        (out, ROOM - len as usize)
    }

    #[test]
    fn v4_header_has_the_specified_bytes() {
        let flow = FlowKey {
            src: core::net::Ipv4Addr::new(192, 0, 2, 1).into(),
            dst: core::net::Ipv4Addr::new(198, 51, 100, 2).into(),
            ports: ports_word(0x1234, 443),
            proto: 6,
        };
        let mut room = [0; ROOM_WORDS];
        let (out, start) = bytes(room, write(&flow, &mut room));
        assert_eq!(out[start..].len(), 28);
        let (out, _) = bytes(room, 28);
        assert_eq!(&out[start..start + 12], b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(
            &out[start + 12..],
            [0x21, 0x11, 0, 12, 192, 0, 2, 1, 198, 51, 100, 2, 0x12, 0x34, 1, 187]
        );
    }

    #[test]
    fn v6_header_has_the_specified_bytes() {
        let ip = |last| Addr::from_octets([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        let flow = FlowKey { src: ip(1), dst: ip(2), ports: ports_word(1, 2), proto: 6 };
        let mut room = [0; ROOM_WORDS];
        let len = write(&flow, &mut room);
        let (out, start) = bytes(room, len);
        assert_eq!(len, 52);
        assert_eq!(&out[start + 12..start + 16], [0x21, 0x21, 0, 36]);
        assert_eq!(out[start + 16 + 15], 1);
        assert_eq!(out[start + 32 + 15], 2);
        assert_eq!(&out[start + 48..], [0, 1, 0, 2]);
    }
}
