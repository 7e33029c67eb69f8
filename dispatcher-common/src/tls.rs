//! TLS records and hellos (RFC 8446 sections 4.1 and 5.1, RFC 5246 sections 6.2 and 7.4.1).
//!
//! Nothing here panics or reads beyond what [`Bytes`] offers. The functions read through a trait,
//! so that the BPF program uses them on a map value and the host on a slice.

use crate::{
    opaque::{forget, opaque},
    session::ID_MAX,
};

/// Bytes at offsets; `None` beyond the end.
pub trait Bytes {
    /// Number of bytes.
    fn len(&self) -> usize;
    /// The byte at an offset.
    fn byte(&self, at: usize) -> Option<u8>;
    /// Any number that the verifier does not know, see [`forget`].
    fn salt(&self) -> u64 {
        0
    }
    /// The byte at an offset, anything beyond the end.
    fn byte_or_any(&self, at: usize) -> u8 {
        self.byte(at).unwrap_or(0)
    }
    /// True without bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Bytes for [u8] {
    fn len(&self) -> usize {
        self.len()
    }
    fn byte(&self, at: usize) -> Option<u8> {
        self.get(at).copied()
    }
}

const RECORD_HEADER: usize = 5;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
/// Handshake header, version and random come before the session ID's length.
const SESSION_ID_LEN_AT: usize = 4 + 2 + 32;
/// Largest record: 2^14 plus what ciphers may add (RFC 5246 section 6.2.3).
const RECORD_MAX: usize = 16384 + 2048;
/// Largest ClientHello considered.
const HELLO_MAX: usize = 65_536;
/// Most records that a hello may be spread over.
const RECORDS_MAX: usize = 16;

/// How much of a ClientHello is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scan {
    /// The bytes are not the start of a ClientHello: the connection is not secure.
    NotTls,
    /// They may be, or are, but the hello goes on.
    Partial,
    /// The whole hello is there.
    Complete,
}

/// Handshake bytes out of a series of records.
#[derive(Clone, Copy)]
struct Cursor {
    /// Offset of the next byte.
    at: usize,
    /// Bytes left in the record.
    left: usize,
}

enum Next {
    Byte(u8),
    End,
    NotTls,
}

impl Cursor {
    const START: Self = Self { at: 0, left: 0 };

    /// The next handshake byte. An empty record cannot be part of a handshake (RFC 8446 section 5.1).
    #[inline(always)]
    fn next<B: Bytes + ?Sized>(&mut self, bytes: &B) -> Next {
        if self.left == 0 {
            match record_len(bytes, self.at) {
                Record::Of(len) => self.left = len,
                Record::Cut => return Next::End,
                Record::Not => return Next::NotTls,
            }
            self.at += RECORD_HEADER;
        }
        match bytes.byte(self.at) {
            Some(byte) => {
                self.at += 1;
                self.left -= 1;
                Next::Byte(byte)
            }
            None => Next::End,
        }
    }
}

enum Record {
    Of(usize),
    Cut,
    Not,
}

/// Length of the handshake record whose header is at `at`.
#[inline(always)]
fn record_len<B: Bytes + ?Sized>(bytes: &B, at: usize) -> Record {
    let Some(kind) = bytes.byte(at) else { return Record::Cut };
    if kind != HANDSHAKE {
        return Record::Not;
    }
    let Some(major) = bytes.byte(at + 1) else { return Record::Cut };
    if major != 3 {
        return Record::Not;
    }
    let (Some(high), Some(low)) = (bytes.byte(at + 3), bytes.byte(at + 4)) else { return Record::Cut };
    let len = (high as usize) << 8 | low as usize;
    if len == 0 || len > RECORD_MAX { Record::Not } else { Record::Of(len) }
}

/// Looks whether the bytes begin with a ClientHello, and whether it is whole.
#[inline(always)]
pub fn scan_client_hello<B: Bytes + ?Sized>(bytes: &B) -> Scan {
    let first = match record_len(bytes, 0) {
        Record::Of(len) => len,
        Record::Cut => return Scan::Partial,
        Record::Not => return Scan::NotTls,
    };
    let mut header = [0_u8; 4];
    if first >= 4 {
        let Some(kind) = bytes.byte(RECORD_HEADER) else { return Scan::Partial };
        if kind != CLIENT_HELLO {
            return Scan::NotTls;
        }
        let (Some(a), Some(b), Some(c)) =
            (bytes.byte(RECORD_HEADER + 1), bytes.byte(RECORD_HEADER + 2), bytes.byte(RECORD_HEADER + 3))
        else {
            return Scan::Partial;
        };
        header = [kind, a, b, c];
    } else {
        let mut cursor = Cursor::START;
        for slot in &mut header {
            match cursor.next(bytes) {
                Next::Byte(byte) => *slot = byte,
                Next::End => return Scan::Partial,
                Next::NotTls => return Scan::NotTls,
            }
        }
        if header[0] != CLIENT_HELLO {
            return Scan::NotTls;
        }
    }
    let body = (header[1] as usize) << 16 | (header[2] as usize) << 8 | header[3] as usize;
    if !(SESSION_ID_LEN_AT - 3..HELLO_MAX).contains(&body) {
        return Scan::NotTls;
    }
    let mut need = body + 4;
    if need <= first {
        return if bytes.len() >= RECORD_HEADER + need { Scan::Complete } else { Scan::Partial };
    }
    let mut at = 0;
    for _ in 0..RECORDS_MAX {
        at = forget(at, bytes.salt());
        need = forget(need, bytes.salt());
        let len = match record_len(bytes, at) {
            Record::Of(len) => len,
            Record::Cut => return Scan::Partial,
            Record::Not => return Scan::NotTls,
        };
        if need <= len {
            return if bytes.len() >= at + RECORD_HEADER + need { Scan::Complete } else { Scan::Partial };
        }
        need -= len;
        at += RECORD_HEADER + len;
    }
    Scan::NotTls
}

/// The session ID of a ClientHello, whole or not: copies it to `id` and returns its length, 0 for
/// none. A length above 32 is no session ID (RFC 8446 section 4.1.2).
#[inline(always)]
pub fn client_session_id<B: Bytes + ?Sized>(bytes: &B, id: &mut [u8; ID_MAX]) -> u8 {
    let Record::Of(first) = record_len(bytes, 0) else { return 0 };
    if first > SESSION_ID_LEN_AT + ID_MAX {
        return plain_session_id(bytes, CLIENT_HELLO, id);
    }
    // The identifier may be cut by a record boundary: byte by byte.
    let mut cursor = Cursor::START;
    let mut len = 0_usize;
    for index in 0..=SESSION_ID_LEN_AT + ID_MAX {
        cursor.at = forget(cursor.at, bytes.salt());
        cursor.left = forget(cursor.left, bytes.salt());
        len = forget(len, bytes.salt());
        if index > SESSION_ID_LEN_AT && index - SESSION_ID_LEN_AT > len {
            break;
        }
        let Next::Byte(byte) = cursor.next(bytes) else { return 0 };
        if index == 0 && byte != CLIENT_HELLO {
            return 0;
        }
        if index == SESSION_ID_LEN_AT {
            len = byte as usize;
            if len > ID_MAX {
                return 0;
            }
        }
        if index > SESSION_ID_LEN_AT {
            id[(index - SESSION_ID_LEN_AT - 1) & (ID_MAX - 1)] = byte;
        }
    }
    len as u8
}

/// The session ID of a hello whose first record reaches beyond it.
#[inline(always)]
fn plain_session_id<B: Bytes + ?Sized>(bytes: &B, kind: u8, id: &mut [u8; ID_MAX]) -> u8 {
    const AT: usize = RECORD_HEADER + SESSION_ID_LEN_AT;
    if bytes.byte(RECORD_HEADER) != Some(kind) {
        return 0;
    }
    let Some(len) = bytes.byte(AT) else { return 0 };
    if len as usize > ID_MAX || bytes.len() < AT + 1 + len as usize {
        return 0;
    }
    for (i, slot) in id.iter_mut().enumerate() {
        // All ones for i < len: without a branch, which the verifier would follow both ways.
        let keep = opaque(((i as i64 - i64::from(len)) >> 63) as u64) as u8;
        *slot = bytes.byte_or_any(AT + 1 + i) & keep;
    }
    len
}

/// What a ServerHello says about the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServerHello {
    /// No ServerHello, or not enough of it.
    Unknown,
    /// TLS 1.3: the session ID only echoes the client's (RFC 8446 section 4.1.3).
    Tls13,
    /// TLS 1.2 or before; the session ID is issued or accepted by the server. Its length, 0 for none.
    Tls12(u8),
}

/// Reads a ServerHello; the session ID is copied to `id`, also for TLS 1.3.
#[inline(always)]
pub fn server_hello<B: Bytes + ?Sized>(bytes: &B, id: &mut [u8; ID_MAX], id_len: &mut u8) -> ServerHello {
    const AT: usize = RECORD_HEADER + SESSION_ID_LEN_AT;
    *id_len = 0;
    let Record::Of(record) = record_len(bytes, 0) else { return ServerHello::Unknown };
    let (Some(kind), Some(high), Some(low)) =
        (bytes.byte(RECORD_HEADER), bytes.byte(RECORD_HEADER + 2), bytes.byte(RECORD_HEADER + 3))
    else {
        return ServerHello::Unknown;
    };
    let body = (high as usize) << 8 | low as usize;
    let Some(len) = bytes.byte(AT) else { return ServerHello::Unknown };
    // version 2, random 32, ID, cipher suite 2, compression 1
    let fixed = 2 + 32 + 1 + len as usize + 3;
    if kind != SERVER_HELLO || len as usize > ID_MAX || body < fixed || record < body + 4 {
        return ServerHello::Unknown;
    }
    let hello_len = plain_session_id(bytes, SERVER_HELLO, id);
    if hello_len != len {
        return ServerHello::Unknown;
    }
    *id_len = len;
    let end = RECORD_HEADER + 4 + body;
    let mut at = RECORD_HEADER + 4 + fixed + 2;
    for _ in 0..16 {
        at = forget(at, bytes.salt()) & 0x3fff;
        if at + 4 > end {
            return ServerHello::Tls12(len);
        }
        if at + 4 > bytes.len() {
            return ServerHello::Unknown;
        }
        let word = |at| (bytes.byte_or_any(at) as usize) << 8 | bytes.byte_or_any(at + 1) as usize;
        // supported_versions: only TLS 1.3 and later answer with it (RFC 8446 section 4.2.1).
        if word(at) == 43 {
            return ServerHello::Tls13;
        }
        at += 4 + word(at + 2);
    }
    ServerHello::Unknown
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::{vec, vec::Vec};

    fn handshake(kind: u8, body: &[u8]) -> Vec<u8> {
        let len = body.len() as u32;
        let mut out = vec![kind];
        out.extend_from_slice(&len.to_be_bytes()[1..]);
        out.extend_from_slice(body);
        out
    }

    fn records(handshake: &[u8], cuts: &[usize]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut from = 0;
        for to in cuts.iter().copied().chain([handshake.len()]) {
            let part = &handshake[from..to];
            out.extend_from_slice(&[22, 3, 1, (part.len() >> 8) as u8, part.len() as u8]);
            out.extend_from_slice(part);
            from = to;
        }
        out
    }

    fn client_hello(id: &[u8], padding: usize) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.push(id.len() as u8);
        body.extend_from_slice(id);
        body.extend_from_slice(&[0, 2, 0x13, 1, 1, 0]);
        body.extend_from_slice(&((padding + 4) as u16).to_be_bytes());
        body.extend_from_slice(&[0, 21]);
        body.extend_from_slice(&(padding as u16).to_be_bytes());
        body.resize(body.len() + padding, 0);
        handshake(1, &body)
    }

    fn server_hello_bytes(id: &[u8], extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend_from_slice(&[9; 32]);
        body.push(id.len() as u8);
        body.extend_from_slice(id);
        body.extend_from_slice(&[0xc0, 0x2b, 0]);
        if !extensions.is_empty() {
            body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
            body.extend_from_slice(extensions);
        }
        records(&handshake(2, &body), &[])
    }

    fn session_id(bytes: &[u8]) -> Vec<u8> {
        let mut id = [0; ID_MAX];
        let len = client_session_id(bytes, &mut id);
        id[..len as usize].to_vec()
    }

    #[test]
    fn every_length_of_session_id_is_found() {
        for len in 0..=32 {
            let id: Vec<u8> = (1..=len).collect();
            let bytes = records(&client_hello(&id, 200), &[]);
            assert_eq!(scan_client_hello(&bytes[..]), Scan::Complete);
            assert_eq!(session_id(&bytes), id);
        }
    }

    #[test]
    fn every_prefix_is_partial_and_only_the_whole_is_complete() {
        let bytes = records(&client_hello(&[5; 32], 1800), &[]);
        for end in 0..bytes.len() {
            assert_eq!(scan_client_hello(&bytes[..end]), Scan::Partial, "{end}");
            let id = session_id(&bytes[..end]);
            assert!(id.is_empty() || id == [5; 32]);
        }
        assert_eq!(scan_client_hello(&bytes[..]), Scan::Complete);
    }

    #[test]
    fn a_hello_over_several_records_is_read_wherever_it_is_cut() {
        let hello = client_hello(&[6; 32], 100);
        for a in 1..hello.len() - 1 {
            for b in [a + 1, (a + 40).min(hello.len() - 1)] {
                let cuts: &[usize] = if b > a && b < hello.len() { &[a, b] } else { &[a] };
                let bytes = records(&hello, cuts);
                assert_eq!(scan_client_hello(&bytes[..]), Scan::Complete, "{cuts:?}");
                assert_eq!(session_id(&bytes), [6; 32], "{cuts:?}");
                for end in 0..bytes.len() {
                    assert_eq!(scan_client_hello(&bytes[..end]), Scan::Partial, "{cuts:?} {end}");
                    let id = session_id(&bytes[..end]);
                    assert!(id.is_empty() || id == [6; 32]);
                }
            }
        }
    }

    #[test]
    fn other_protocols_are_not_tls() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"SSH-2.0-x\r\n",
            &[0x80, 0x2e, 1, 3, 1],
            &[22, 2, 0, 0, 5, 1],
            &[22, 3, 1, 0, 0],
            &[22, 3, 1, 0xff, 0xff],
            &[22, 3, 1, 0, 80, 2, 0, 0, 76],
            &[22, 3, 1, 0, 80, 1, 0, 0, 3],
            &[23, 3, 3, 0, 80],
        ] {
            assert_eq!(scan_client_hello(bytes), Scan::NotTls, "{bytes:?}");
            assert!(session_id(bytes).is_empty());
        }
    }

    #[test]
    fn lying_session_id_lengths_are_no_identifier() {
        let mut bytes = records(&client_hello(&[1; 32], 0), &[]);
        bytes[43] = 33;
        assert!(session_id(&bytes).is_empty());
        bytes[43] = 255;
        assert!(session_id(&bytes).is_empty());
    }

    #[test]
    fn more_records_than_any_client_sends_are_not_tls() {
        let hello = client_hello(&[1; 32], 600);
        let cuts: Vec<usize> = (1..40).collect();
        assert_eq!(scan_client_hello(&records(&hello, &cuts)[..]), Scan::NotTls);
    }

    #[test]
    fn server_hello_of_each_version() {
        let mut id = [0; ID_MAX];
        let mut len = 0;
        let tls12 = server_hello_bytes(&[4; 32], &[0xff, 1, 0, 1, 0, 0, 23, 0, 0]);
        assert_eq!(server_hello(&tls12[..], &mut id, &mut len), ServerHello::Tls12(32));
        assert_eq!(id, [4; 32]);
        let bare = server_hello_bytes(&[4; 16], &[]);
        assert_eq!(server_hello(&bare[..], &mut id, &mut len), ServerHello::Tls12(16));
        let none = server_hello_bytes(&[], &[0, 35, 0, 0]);
        assert_eq!(server_hello(&none[..], &mut id, &mut len), ServerHello::Tls12(0));
        let mut key_share = vec![0, 51, 0, 36];
        key_share.extend_from_slice(&[0; 36]);
        key_share.extend_from_slice(&[0, 43, 0, 2, 3, 4]);
        let tls13 = server_hello_bytes(&[8; 32], &key_share);
        assert_eq!(server_hello(&tls13[..], &mut id, &mut len), ServerHello::Tls13);
        assert_eq!((id, len), ([8; 32], 32));
        for end in 0..tls13.len() - 6 {
            assert_eq!(server_hello(&tls13[..end], &mut id, &mut len), ServerHello::Unknown, "{end}");
        }
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let hello = records(&client_hello(&[1; 32], 300), &[3, 9, 60]);
        let server = server_hello_bytes(&[4; 32], &[0, 43, 0, 2, 3, 4]);
        for _ in 0..20_000 {
            for base in [&hello, &server] {
                let mut bytes = base.clone();
                for _ in 0..4 {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let at = state as usize % bytes.len();
                    bytes[at] = (state >> 32) as u8;
                }
                let mut id = [0; ID_MAX];
                let mut len = 0;
                scan_client_hello(&bytes[..]);
                client_session_id(&bytes[..], &mut id);
                server_hello(&bytes[..], &mut id, &mut len);
            }
        }
    }
}
