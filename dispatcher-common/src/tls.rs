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
const NEW_SESSION_TICKET: u8 = 4;
const CHANGE_CIPHER_SPEC: u8 = 20;
const APPLICATION_DATA: u8 = 23;
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

/// Takes the record headers out of a hello: calls `copy(from, to, len)` for each record's content, `to`
/// counted from the start of the handshake message. Returns the number of bytes copied, at most `room`.
#[inline(always)]
pub fn join_records<B: Bytes + ?Sized>(
    bytes: &B,
    room: usize,
    mut copy: impl FnMut(usize, usize, usize) -> bool,
) -> usize {
    let (mut from, mut to) = (0, 0);
    for _ in 0..RECORDS_MAX {
        from = forget(from, bytes.salt());
        to = forget(to, bytes.salt());
        let held = bytes.len();
        if from + RECORD_HEADER >= held || to >= room {
            break;
        }
        // Not `record_len`: the verifier refuses to spill the undefined part of an empty `Option`.
        let byte = |at| bytes.byte_or_any(at) as usize;
        let mut len = byte(from + 3) << 8 | byte(from + 4);
        if byte(from) != HANDSHAKE as usize || byte(from + 1) != 3 || len == 0 || len > RECORD_MAX {
            break;
        }
        from += RECORD_HEADER;
        if len > held - from {
            len = held - from;
        }
        if len > room - to {
            len = room - to;
        }
        if !copy(from, to, len) {
            break;
        }
        from += len;
        to += len;
    }
    to
}

/// A piece of a handshake message.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Span {
    /// Offset of its first byte.
    pub at: u16,
    /// Its length, 0 for none.
    pub len: u16,
}

impl Span {
    /// The piece of a slice.
    #[must_use]
    pub fn of(self, bytes: &[u8]) -> &[u8] {
        let at = self.at as usize;
        bytes.get(at..at + self.len as usize).unwrap_or_default()
    }
}

/// What a ClientHello says, as pieces of the message. Of a hello that is cut short, what is there.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ClientHello {
    /// Session ID, 0 to 32 bytes (RFC 8446 section 4.1.2).
    pub session_id: Span,
    /// Content of the SessionTicket extension (RFC 5077 section 3.2); empty where the client only asks
    /// for one.
    pub ticket: Span,
    /// The first PSK identity (RFC 8446 section 4.2.11).
    pub psk: Span,
    /// The host name of the server_name extension (RFC 6066 section 3), as the client wrote it.
    pub server_name: Span,
    /// Versions of the supported_versions extension (RFC 8446 section 4.2.1), two bytes each.
    pub versions: Span,
    /// `legacy_version`.
    pub version: u16,
    /// 1: every extension was seen.
    pub whole: u8,
    /// Unused, zero.
    pub pad: u8,
}

/// Extension types (IANA, TLS ExtensionType Values).
mod extension {
    pub(super) const SERVER_NAME: usize = 0;
    pub(super) const SESSION_TICKET: usize = 35;
    pub(super) const PRE_SHARED_KEY: usize = 41;
    pub(super) const SUPPORTED_VERSIONS: usize = 43;
}

/// Most extensions that are looked at. Browsers send up to twenty.
const EXTENSIONS_MAX: usize = 40;
/// Offsets in a handshake message are at most this; so long a message is not read to its end.
const AT_MASK: usize = 0x3fff;

/// An offset so far behind another, which the verifier forgets; the largest one when that is too far.
#[inline(always)]
fn behind(at: usize, by: usize, salt: u64) -> usize {
    forget((at + by).min(AT_MASK), salt) & AT_MASK
}

/// Sixteen bits at an offset.
#[inline(always)]
fn word<B: Bytes + ?Sized>(bytes: &B, at: usize) -> Option<usize> {
    Some((bytes.byte(at)? as usize) << 8 | bytes.byte(at + 1)? as usize)
}

/// A piece, if it lies within the bytes.
#[inline(always)]
fn span<B: Bytes + ?Sized>(bytes: &B, at: usize, len: usize) -> Span {
    if at + len > bytes.len() { Span::default() } else { Span { at: at as u16, len: len as u16 } }
}

/// Reads a ClientHello, a handshake message without record headers (see [`join_records`]); false when
/// it is none. What lies about its length is as if it were not there; an extension that comes twice
/// counts once.
#[inline(always)]
pub fn client_hello<B: Bytes + ?Sized>(bytes: &B, hello: &mut ClientHello) -> bool {
    // Known zeros would become a call of a byte-wise `memset`.
    let none = opaque(0) as u16;
    for span in [
        &mut hello.session_id,
        &mut hello.ticket,
        &mut hello.psk,
        &mut hello.server_name,
        &mut hello.versions,
    ] {
        span.at = none;
        span.len = none;
    }
    hello.whole = 0;
    let (Some(kind), Some(version)) = (bytes.byte(0), word(bytes, 4)) else { return false };
    if kind != CLIENT_HELLO {
        return false;
    }
    hello.version = version as u16;
    let Some(id_len) = bytes.byte(SESSION_ID_LEN_AT) else { return true };
    let mut at = SESSION_ID_LEN_AT + 1;
    if id_len as usize > ID_MAX {
        return true;
    }
    hello.session_id = span(bytes, at, id_len as usize);
    at = behind(at, id_len as usize, bytes.salt());
    let Some(suites) = word(bytes, at) else { return true };
    at = behind(at, 2 + suites, bytes.salt());
    let Some(compressions) = bytes.byte(at) else { return true };
    at = behind(at, 1 + compressions as usize, bytes.salt());
    let Some(all) = word(bytes, at) else { return true };
    at += 2;
    let mut end = at + all;
    for _ in 0..EXTENSIONS_MAX {
        end = forget(end, bytes.salt());
        if at + 4 > end {
            hello.whole = (at == end && end <= bytes.len()) as u8;
            return true;
        }
        let (Some(kind), Some(len)) = (word(bytes, at), word(bytes, at + 2)) else { return true };
        at += 4;
        if at + len > end {
            return true;
        }
        match kind {
            extension::SESSION_TICKET if hello.ticket.at == 0 => hello.ticket = span(bytes, at, len),
            extension::PRE_SHARED_KEY if hello.psk.at == 0 => hello.psk = first_identity(bytes, at, len),
            extension::SERVER_NAME if hello.server_name.at == 0 => {
                hello.server_name = host_name(bytes, at, len);
            }
            extension::SUPPORTED_VERSIONS if hello.versions.at == 0 && len > 1 => {
                hello.versions = span(bytes, at + 1, len - 1);
            }
            _ => {}
        }
        at = behind(at, len, bytes.salt());
    }
    true
}

/// The first identity of a pre_shared_key extension: the list's length, the identity's length, the identity.
#[inline(always)]
fn first_identity<B: Bytes + ?Sized>(bytes: &B, at: usize, len: usize) -> Span {
    let byte = |behind| bytes.byte_or_any(at + behind) as usize;
    let identity = byte(2) << 8 | byte(3);
    if 4 + identity > len { Span::default() } else { span(bytes, at + 4, identity) }
}

/// The host name of a server_name extension: the list's length, and of its first entry the type, 0 for a host name,
/// the name's length, and the name. There is no other type, and only one name of a type may be there, so servers
/// refuse what has it further behind.
#[inline(always)]
fn host_name<B: Bytes + ?Sized>(bytes: &B, at: usize, len: usize) -> Span {
    let byte = |behind| bytes.byte_or_any(at + behind) as usize;
    let (list, kind, name) = (byte(0) << 8 | byte(1), byte(2), byte(3) << 8 | byte(4));
    // One branch, because the verifier follows each both ways: the top bit is set where the name is longer than its
    // list. What lies beyond the end was never more than a guess, which `span` refuses.
    let lies = (2 + list) ^ len | kind | list.wrapping_sub(3 + name) >> (usize::BITS - 1);
    if lies != 0 { Span::default() } else { span(bytes, at + 5, name) }
}

/// What a ServerHello says about the session.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct ServerHello {
    /// TLS 1.3: the session ID only echoes the client's (RFC 8446 section 4.1.3).
    pub tls13: bool,
    /// A HelloRetryRequest (RFC 8446 section 4.1.4): the client will send another hello.
    pub retry: bool,
    /// The server accepted the client's PSK: it has a pre_shared_key extension (RFC 8446 section 4.2.11).
    pub psk: bool,
    /// The server will send a NewSessionTicket (RFC 5077 section 3.2).
    pub ticket: bool,
    /// Length of the session ID.
    pub id_len: u8,
    /// Another message follows in the same record.
    pub open: bool,
    /// Where what follows the hello begins.
    pub end: usize,
}

/// First bytes of the random value that makes a ServerHello a HelloRetryRequest (RFC 8446 section 4.1.3).
const RETRY: [u8; 8] = [0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11];

/// Reads a ServerHello in its record, the session ID goes to `id`; `None` for anything else.
#[inline(always)]
pub fn server_hello<B: Bytes + ?Sized>(bytes: &B, id: &mut [u8; ID_MAX]) -> Option<ServerHello> {
    const AT: usize = RECORD_HEADER + SESSION_ID_LEN_AT;
    let Record::Of(record) = record_len(bytes, 0) else { return None };
    let kind = bytes.byte(RECORD_HEADER)?;
    let body = word(bytes, RECORD_HEADER + 2)?;
    let len = bytes.byte(AT)? as usize;
    // version 2, random 32, ID, cipher suite 2, compression 1
    let fixed = 2 + 32 + 1 + len + 3;
    if kind != SERVER_HELLO || len > ID_MAX || body < fixed || record < body + 4 || bytes.len() < AT + 1 + len
    {
        return None;
    }
    for (i, slot) in id.iter_mut().enumerate() {
        // All ones for i < len: without a branch, which the verifier would follow both ways.
        let keep = opaque(((i as i64 - len as i64) >> 63) as u64) as u8;
        *slot = bytes.byte_or_any(AT + 1 + i) & keep;
    }
    let mut hello =
        ServerHello { id_len: len as u8, end: RECORD_HEADER + 4 + body, ..ServerHello::default() };
    let mut differs = 0;
    for (i, byte) in RETRY.into_iter().enumerate() {
        differs |= bytes.byte_or_any(RECORD_HEADER + 6 + i) ^ byte;
    }
    hello.retry = differs == 0;
    hello.open = record > body + 4;
    let end = hello.end;
    let mut at = RECORD_HEADER + 4 + fixed + 2;
    // One word, so that the verifier can forget it: bit 0 TLS 1.3, bit 1 PSK, bit 2 ticket.
    let mut seen = 0;
    for _ in 0..16 {
        at = forget(at, bytes.salt()) & AT_MASK;
        seen = forget(seen, bytes.salt());
        if at + 4 > end {
            hello.tls13 = seen & 1 != 0;
            hello.psk = seen & 2 != 0;
            hello.ticket = seen & 4 != 0;
            return Some(hello);
        }
        if at + 4 > bytes.len() {
            return None;
        }
        let word = |at| (bytes.byte_or_any(at) as usize) << 8 | bytes.byte_or_any(at + 1) as usize;
        let kind = word(at);
        // Only TLS 1.3 and later answer with supported_versions (RFC 8446 section 4.2.1).
        seen |= (kind == extension::SUPPORTED_VERSIONS) as usize
            | ((kind == extension::PRE_SHARED_KEY) as usize) << 1
            | ((kind == extension::SESSION_TICKET) as usize) << 2;
        at += 4 + word(at + 2);
    }
    None
}

/// What a server's bytes begin with after its first hello, where a NewSessionTicket may come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Later {
    /// A NewSessionTicket of TLS 1.2 (RFC 5077 section 3.3): its ticket.
    Ticket(Span),
    /// ChangeCipherSpec or encrypted data: no ticket will come in clear.
    Encrypted,
    /// Something else of the handshake.
    Other,
}

/// Looks for a NewSessionTicket at the start of a record, or, with `open`, behind another message of
/// the record.
#[inline(always)]
pub fn new_session_ticket<B: Bytes + ?Sized>(bytes: &B, at: usize, open: bool) -> Later {
    let mut at = at & AT_MASK;
    if !open {
        let Some(kind) = bytes.byte(at) else { return Later::Other };
        if kind != HANDSHAKE {
            return if kind == CHANGE_CIPHER_SPEC || kind == APPLICATION_DATA {
                Later::Encrypted
            } else {
                Later::Other
            };
        }
        at += RECORD_HEADER;
    }
    // message header 4, lifetime 4, length of the ticket 2
    let (Some(NEW_SESSION_TICKET), Some(len)) = (bytes.byte(at), word(bytes, at + 8)) else {
        return Later::Other;
    };
    let found = span(bytes, at + 10, len);
    if found.len == 0 { Later::Other } else { Later::Ticket(found) }
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

    fn plain_hello(id: &[u8], padding: usize) -> Vec<u8> {
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

    fn joined(bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 8192];
        let len = join_records(bytes, 8192, |from, to, len| {
            out[to..to + len].copy_from_slice(&bytes[from..from + len]);
            true
        });
        out.truncate(len);
        out
    }

    fn read(bytes: &[u8]) -> Option<(Vec<u8>, ClientHello)> {
        let message = joined(bytes);
        let mut hello = ClientHello::default();
        client_hello(&message[..], &mut hello).then_some((message, hello))
    }

    fn session_id(bytes: &[u8]) -> Vec<u8> {
        read(bytes).map(|(message, hello)| hello.session_id.of(&message).to_vec()).unwrap_or_default()
    }

    fn extension_bytes(kind: u16, content: &[u8]) -> Vec<u8> {
        let mut out = kind.to_be_bytes().to_vec();
        out.extend_from_slice(&(content.len() as u16).to_be_bytes());
        out.extend_from_slice(content);
        out
    }

    /// An entry of the list in a server_name extension.
    fn name_entry(kind: u8, name: &[u8]) -> Vec<u8> {
        let mut out = vec![kind];
        out.extend_from_slice(&(name.len() as u16).to_be_bytes());
        out.extend_from_slice(name);
        out
    }

    /// The content of a server_name extension.
    fn names_of(entries: &[Vec<u8>]) -> Vec<u8> {
        let list = entries.concat();
        let mut out = (list.len() as u16).to_be_bytes().to_vec();
        out.extend(list);
        out
    }

    /// A hello with GREASE, a host name, versions, a key share of `share` bytes, a ticket and a PSK.
    fn resuming_hello(share: usize, ticket: &[u8], psk: &[u8]) -> Vec<u8> {
        let mut extensions = extension_bytes(0x4a4a, &[]);
        extensions.extend(extension_bytes(0, &names_of(&[name_entry(0, b"service.test")])));
        extensions.extend(extension_bytes(35, ticket));
        extensions.extend(extension_bytes(43, &[4, 3, 4, 3, 3]));
        extensions.extend(extension_bytes(51, &vec![0; share]));
        if !psk.is_empty() {
            let mut list = ((psk.len() + 6) as u16).to_be_bytes().to_vec();
            list.extend_from_slice(&(psk.len() as u16).to_be_bytes());
            list.extend_from_slice(psk);
            list.extend_from_slice(&[0, 0, 0, 1, 0, 33, 32]);
            list.extend_from_slice(&[9; 32]);
            extensions.extend(extension_bytes(41, &list));
        }
        hello_with(&extensions)
    }

    /// A hello with these extensions.
    fn hello_with(extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.push(32);
        body.extend_from_slice(&[5; 32]);
        body.extend_from_slice(&[0, 2, 0x13, 1, 1, 0]);
        body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
        body.extend_from_slice(extensions);
        handshake(1, &body)
    }

    #[test]
    fn a_resuming_hello_shows_ticket_and_psk() {
        let (ticket, psk): (Vec<u8>, Vec<u8>) = ((0..200).collect(), (0..240).rev().collect());
        let hello = resuming_hello(1216, &ticket, &psk);
        for cuts in [&[][..], &[2, 70, 1500], &[1]] {
            let bytes = records(&hello, cuts);
            let (message, found) = read(&bytes).expect("a hello");
            assert_eq!(message, hello);
            assert_eq!(found.ticket.of(&message), ticket);
            assert_eq!(found.psk.of(&message), psk);
            assert_eq!(found.server_name.of(&message), b"service.test");
            assert_eq!(found.versions.of(&message), [3, 4, 3, 3]);
            assert_eq!((found.version, found.whole), (0x0303, 1));
            for end in 0..bytes.len() {
                let Some((message, cut)) = read(&bytes[..end]) else { continue };
                assert_eq!(cut.whole, 0, "{end}");
                let psk_found = cut.psk.of(&message);
                assert!(psk_found.is_empty() || psk_found == psk, "{end}");
                assert!(cut.ticket.len == 0 || cut.ticket.of(&message) == ticket, "{end}");
                assert!([&b""[..], b"service.test"].contains(&cut.server_name.of(&message)), "{end}");
            }
        }
    }

    #[test]
    fn the_host_name_is_the_first_entry_of_a_list_that_is_right() {
        let name = b"a.example".as_slice();
        let (long, longest) = (vec![b'a'; 256], vec![b'b'; 8000]);
        let one = names_of(&[name_entry(0, name)]);
        let lying = |at: usize, by: u8| {
            let mut bytes = one.clone();
            bytes[at] = bytes[at].wrapping_add(by);
            bytes
        };
        for (what, content, expected) in [
            ("one", one.clone(), name),
            ("in capitals", names_of(&[name_entry(0, b"A.Example")]), b"A.Example"),
            ("over 255 bytes", names_of(&[name_entry(0, &long)]), &long),
            ("very long", names_of(&[name_entry(0, &longest)]), &longest),
            ("an empty name", names_of(&[name_entry(0, b"")]), b""),
            ("two of them", names_of(&[name_entry(0, name), name_entry(0, b"b.example")]), name),
            ("another type behind", names_of(&[name_entry(0, name), name_entry(7, b"x")]), name),
            ("another type", names_of(&[name_entry(7, name)]), b""),
            ("another type before", names_of(&[name_entry(7, b"x"), name_entry(0, name)]), b""),
            ("an empty list", names_of(&[]), b""),
            ("no list", Vec::new(), b""),
            ("half a length", vec![0], b""),
            ("a list that claims more", lying(1, 1), b""),
            ("a list that claims less", lying(1, 255), b""),
            ("a list that claims much more", lying(0, 1), b""),
            ("a name that claims more", lying(4, 1), b""),
            ("a name that claims much more", lying(3, 0x40), b""),
            ("a name that claims less", lying(4, 255), b"a.exampl"),
            ("bytes behind the list", [&one[..], &[0]].concat(), b""),
        ] {
            let mut extensions = extension_bytes(0, &content);
            extensions.extend(extension_bytes(35, &[1; 20]));
            let hello = hello_with(&extensions);
            let mut found = ClientHello::default();
            assert!(client_hello(&hello[..], &mut found), "{what}");
            assert_eq!(found.server_name.of(&hello), expected, "{what}");
            assert_eq!((found.ticket.len, found.whole), (20, 1), "{what}");
            // A cut never makes another name of it.
            for end in 0..hello.len() {
                if client_hello(&hello[..end], &mut found) {
                    let cut = found.server_name.of(&hello[..end]);
                    assert!(cut.is_empty() || cut == expected, "{what} {end}");
                }
            }
        }
    }

    #[test]
    fn lying_lengths_hide_only_what_lies() {
        let hello = resuming_hello(32, &[1; 100], &[2; 100]);
        let find = |needle: &[u8]| hello.windows(needle.len()).position(|w| w == needle).expect("there");
        // The PSK identity claims more than its extension has.
        let mut bytes = hello.clone();
        let at = find(&[0, 100, 2, 2, 2]);
        bytes[at] = 0x7f;
        let mut found = ClientHello::default();
        assert!(client_hello(&bytes[..], &mut found));
        assert_eq!((found.psk.len, found.ticket.len), (0, 100));
        // An extension claims more than the hello has: what comes before it stays.
        let mut bytes = hello.clone();
        let at = find(&[0, 51, 0, 32]);
        bytes[at + 2] = 0xff;
        assert!(client_hello(&bytes[..], &mut found));
        assert_eq!((found.psk.len, found.ticket.len, found.whole), (0, 100, 0));
    }

    #[test]
    fn nothing_beyond_the_end_is_read_at_the_start() {
        let hello = resuming_hello(32, &[1; 100], &[2; 100]);
        let suites = SESSION_ID_LEN_AT + 1 + 32;
        let all = suites + 2 + 2 + 2;
        let name = all + 2 + 4 + 2;
        // Offsets are kept below AT_MASK + 1: these wrap around to where they should be.
        for (what, lies) in [("suites", &[suites][..]), ("all extensions and one", &[all, name])] {
            let mut bytes = hello.clone();
            for at in lies {
                bytes[*at] += 0x40;
            }
            let mut found = ClientHello::default();
            assert!(client_hello(&bytes[..], &mut found));
            assert_eq!((found.ticket.len, found.psk.len, found.whole), (0, 0, 0), "{what}");
            assert_eq!(found.session_id.len, 32, "{what}");
        }
    }

    #[test]
    fn the_first_of_two_equal_extensions_counts() {
        let mut hello = resuming_hello(32, &[1; 100], &[]);
        let extra = extension_bytes(35, &[3; 50]);
        let all_at = SESSION_ID_LEN_AT + 1 + 32 + 4 + 2;
        let all = u16::from_be_bytes([hello[all_at], hello[all_at + 1]]) + extra.len() as u16;
        hello[all_at..all_at + 2].copy_from_slice(&all.to_be_bytes());
        hello.extend(extra);
        let mut found = ClientHello::default();
        assert!(client_hello(&hello[..], &mut found));
        assert_eq!(found.ticket.of(&hello), [1; 100]);
    }

    #[test]
    fn a_new_session_ticket_is_found_behind_a_hello_and_alone() {
        let mut content = vec![0, 0, 1, 44, 0, 120];
        content.extend_from_slice(&[8; 120]);
        let ticket = handshake(4, &content);
        let own = records(&ticket, &[]);
        let Later::Ticket(found) = new_session_ticket(&own[..], 0, false) else { panic!("not found") };
        assert_eq!(found.of(&own), [8; 120]);
        let mut id = [0; ID_MAX];
        let mut two = server_hello_bytes(&[4; 32], &[0, 35, 0, 0]);
        let hello = server_hello(&two[..], &mut id).expect("a hello");
        assert!(hello.ticket && !hello.psk && !hello.tls13 && !hello.retry);
        assert_eq!(hello.end, two.len());
        two.extend_from_slice(&own);
        assert!(matches!(
            new_session_ticket(&two[..], hello.end, false),
            Later::Ticket(Span { len: 120, .. })
        ));
        assert_eq!(new_session_ticket(&[20, 3, 3, 0, 1, 1][..], 0, false), Later::Encrypted);
        assert_eq!(new_session_ticket(&[23, 3, 3, 0, 9, 1][..], 0, false), Later::Encrypted);
        assert_eq!(new_session_ticket(&[][..], 0, false), Later::Other);
        for end in 0..own.len() {
            assert_eq!(new_session_ticket(&own[..end], 0, false), Later::Other, "{end}");
        }
    }

    #[test]
    fn a_retry_request_is_told_from_a_hello() {
        let mut bytes = server_hello_bytes(&[4; 32], &[0, 43, 0, 2, 3, 4]);
        let mut id = [0; ID_MAX];
        assert!(!server_hello(&bytes[..], &mut id).expect("a hello").retry);
        bytes[11..19].copy_from_slice(&RETRY);
        assert!(server_hello(&bytes[..], &mut id).expect("a hello").retry);
    }

    #[test]
    fn every_length_of_session_id_is_found() {
        for len in 0..=32 {
            let id: Vec<u8> = (1..=len).collect();
            let bytes = records(&plain_hello(&id, 200), &[]);
            assert_eq!(scan_client_hello(&bytes[..]), Scan::Complete);
            assert_eq!(session_id(&bytes), id);
        }
    }

    #[test]
    fn every_prefix_is_partial_and_only_the_whole_is_complete() {
        let bytes = records(&plain_hello(&[5; 32], 1800), &[]);
        for end in 0..bytes.len() {
            assert_eq!(scan_client_hello(&bytes[..end]), Scan::Partial, "{end}");
            let id = session_id(&bytes[..end]);
            assert!(id.is_empty() || id == [5; 32]);
        }
        assert_eq!(scan_client_hello(&bytes[..]), Scan::Complete);
    }

    #[test]
    fn a_hello_over_several_records_is_read_wherever_it_is_cut() {
        let hello = plain_hello(&[6; 32], 100);
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
        let mut bytes = records(&plain_hello(&[1; 32], 0), &[]);
        bytes[43] = 33;
        assert!(session_id(&bytes).is_empty());
        bytes[43] = 255;
        assert!(session_id(&bytes).is_empty());
    }

    #[test]
    fn more_records_than_any_client_sends_are_not_tls() {
        let hello = plain_hello(&[1; 32], 600);
        let cuts: Vec<usize> = (1..40).collect();
        assert_eq!(scan_client_hello(&records(&hello, &cuts)[..]), Scan::NotTls);
    }

    #[test]
    fn server_hello_of_each_version() {
        let mut id = [0; ID_MAX];
        let tls12 = server_hello_bytes(&[4; 32], &[0xff, 1, 0, 1, 0, 0, 23, 0, 0]);
        let found = server_hello(&tls12[..], &mut id).expect("a hello");
        assert_eq!((found.tls13, found.ticket, found.id_len, id), (false, false, 32, [4; 32]));
        let bare = server_hello_bytes(&[4; 16], &[]);
        assert_eq!(server_hello(&bare[..], &mut id).expect("a hello").id_len, 16);
        let none = server_hello_bytes(&[], &[0, 35, 0, 0]);
        let found = server_hello(&none[..], &mut id).expect("a hello");
        assert_eq!((found.tls13, found.ticket, found.id_len), (false, true, 0));
        let mut extensions = extension_bytes(51, &[0; 36]);
        extensions.extend(extension_bytes(43, &[3, 4]));
        let fresh = server_hello_bytes(&[8; 32], &extensions);
        let found = server_hello(&fresh[..], &mut id).expect("a hello");
        assert_eq!((found.tls13, found.psk, found.id_len, id), (true, false, 32, [8; 32]));
        extensions.extend(extension_bytes(41, &[0, 0]));
        let resumed = server_hello_bytes(&[8; 32], &extensions);
        assert!(server_hello(&resumed[..], &mut id).expect("a hello").psk);
        for end in 0..resumed.len() - 6 {
            assert_eq!(server_hello(&resumed[..end], &mut id), None, "{end}");
        }
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let hello = records(&resuming_hello(40, &[1; 64], &[2; 64]), &[3, 9, 60]);
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
                scan_client_hello(&bytes[..]);
                if let Some((message, found)) = read(&bytes) {
                    for span in [found.session_id, found.ticket, found.psk, found.server_name, found.versions]
                    {
                        assert_eq!(span.of(&message).len(), usize::from(span.len), "{found:?}");
                    }
                }
                server_hello(&bytes[..], &mut id);
                new_session_ticket(&bytes[..], state as usize % 600, false);
            }
        }
    }
}
