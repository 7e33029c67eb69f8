//! What client and server say of themselves in clear: TLS hellos, HTTP's cookie, QUIC's connection IDs.

use dispatcher_common::{
    http::Head,
    quic::{self, Cid, Form},
    session::{ID_MAX, TICKET_FORMATS},
    tls::{self, Scan, Span},
};
use serde::Serialize;

use crate::{api::to_hex, counted, identify::client_hello};

/// What a client speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Protocol {
    /// TLS.
    Tls,
    /// HTTP/1 in clear.
    Http,
    /// QUIC.
    Quic,
}

/// What a client's first bytes say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Hello {
    /// Which of those that are known here.
    pub(super) protocol: Option<Protocol>,
    /// The whole hello, or head of the request, is there.
    pub(super) complete: bool,
    /// The highest version that is offered. Of a hello that is cut this and what follows is what was seen.
    pub(super) tls_version: Option<String>,
    /// Session ID.
    pub(super) session_id: Option<Vec<u8>>,
    /// Length of the session ticket.
    pub(super) ticket_len: Option<usize>,
    /// Length of the first PSK identity.
    pub(super) psk_identity_len: Option<usize>,
    /// Where the usual formats put the name of the key that sealed ticket or PSK.
    pub(super) key_name: Option<Vec<u8>>,
    /// Server name.
    pub(super) sni: Option<String>,
    /// Cookie of a request in clear.
    pub(super) cookie: Option<Cookie>,
    /// QUIC version and connection IDs.
    pub(super) quic: Option<Quic>,
}

/// That there is a cookie; its value is a secret.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Cookie {
    /// Bytes of the `Cookie` header's value.
    len: usize,
}

impl Cookie {
    /// For people.
    pub(super) fn shown(&self) -> String {
        counted(self.len, "byte")
    }
}

/// The header of a QUIC packet, as far as it is the same in all versions (RFC 8999 section 5.1).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Quic {
    /// Version.
    pub(super) version: u32,
    /// Destination connection ID.
    pub(super) dcid: Vec<u8>,
    /// Source connection ID.
    pub(super) scid: Vec<u8>,
}

/// What a server's first bytes say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Answer {
    /// The version that it accepts.
    pub(super) version: Option<String>,
    /// It resumes the session that the client offers.
    pub(super) resumed: Option<bool>,
}

impl Hello {
    /// TLS or QUIC.
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self.protocol, Some(Protocol::Tls | Protocol::Quic))
    }
}

/// Reads the start of a client's stream.
pub(super) fn of_stream(bytes: &[u8]) -> Hello {
    let scan = tls::scan_client_hello(bytes);
    if scan == Scan::NotTls || bytes.is_empty() {
        return of_request(bytes);
    }
    let complete = scan == Scan::Complete;
    let hello = Hello { protocol: Some(Protocol::Tls), complete, ..Hello::default() };
    let Some((message, found)) = client_hello(bytes) else { return hello };
    // What was not seen may still come.
    let seen = |span: Span| (complete || span.len != 0).then(|| span.of(&message));
    let (ticket, psk) = (seen(found.ticket), seen(found.psk));
    // A client that offers both resumes with the PSK.
    let sealed = psk.filter(|psk| !psk.is_empty()).or(ticket).unwrap_or_default();
    let (at, name_len) = TICKET_FORMATS[0];
    let name = sealed.get(usize::from(at)..usize::from(at) + usize::from(name_len));
    let server_name = found.server_name.of(&message);
    Hello {
        tls_version: seen(found.versions).map(|versions| highest(found.version, versions)),
        session_id: seen(found.session_id).map(<[u8]>::to_vec),
        ticket_len: ticket.map(<[u8]>::len),
        psk_identity_len: psk.map(<[u8]>::len),
        key_name: name.map(<[u8]>::to_vec),
        sni: (!server_name.is_empty()).then(|| printable(server_name)),
        ..hello
    }
}

/// Reads the head of a request in clear.
fn of_request(bytes: &[u8]) -> Hello {
    let Some(head) = Head::of_request(bytes) else { return Hello::default() };
    let cookie = head.fields().find(|(name, _)| name.eq_ignore_ascii_case(b"cookie"));
    Hello {
        protocol: Some(Protocol::Http),
        complete: head.is_whole(),
        cookie: cookie.map(|(_, value)| Cookie { len: value.len() }),
        ..Hello::default()
    }
}

/// The highest version of a hello. GREASE values (RFC 8701) are no versions.
fn highest(legacy: u16, offered: &[u8]) -> String {
    let offered = offered.chunks_exact(2).map(|two| u16::from_be_bytes([two[0], two[1]]));
    let real = offered.filter(|version| (0x0300..=0x0304).contains(version)).max();
    version(real.unwrap_or(legacy))
}

fn version(number: u16) -> String {
    match number {
        0x0300 => "SSL 3.0".to_owned(),
        0x0301..=0x0304 => format!("1.{}", number - 0x0301),
        other => format!("{other:#06x}"),
    }
}

/// Text of others, without what a terminal would obey.
fn printable(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// Reads the first datagram of a client.
pub(super) fn of_datagram(bytes: &[u8]) -> Hello {
    let quic = quic(bytes);
    let protocol = quic.as_ref().map(|_| Protocol::Quic);
    Hello { protocol, complete: quic.is_some(), quic, ..Hello::default() }
}

/// A long header of a version in use: what else begins so is no QUIC.
fn quic(bytes: &[u8]) -> Option<Quic> {
    let head = quic::head(bytes, bytes.len());
    let id = |cid: Cid| bytes.get(cid.at as usize..(cid.at + cid.len) as usize).map(<[u8]>::to_vec);
    if head.form != Form::Long || head.version == 0 {
        return None;
    }
    Some(Quic { version: head.version, dcid: id(head.dcid)?, scid: id(head.scid)? })
}

/// Reads the start of a server's stream.
pub(super) fn of_server(bytes: &[u8], client: &Hello) -> Answer {
    let mut rest = bytes;
    // A HelloRetryRequest and ChangeCipherSpec may come before the hello that counts.
    for _ in 0..4 {
        let mut id = [0; ID_MAX];
        match tls::server_hello(rest, &mut id) {
            Some(hello) if !hello.retry => {
                let legacy =
                    rest.get(9..).and_then(|two| two.first_chunk()).map_or(0, |two| u16::from_be_bytes(*two));
                let id = id.get(..usize::from(hello.id_len)).unwrap_or_default();
                let same = !id.is_empty() && client.session_id.as_deref() == Some(id);
                return Answer {
                    version: Some(version(if hello.tls13 { 0x0304 } else { legacy })),
                    resumed: Some(if hello.tls13 { hello.psk } else { same }),
                };
            }
            Some(_) | None => {}
        }
        let [20 | 22, _, _, high, low, after @ ..] = rest else { break };
        rest = after.get(usize::from(u16::from_be_bytes([*high, *low]))..).unwrap_or_default();
    }
    Answer::default()
}

/// The first bytes of a stream, out of segments (offset, bytes) in any order: as far as there is no gap,
/// at most `most`.
pub(super) fn joined<'b>(segments: impl Iterator<Item = (u32, &'b [u8])>, most: usize) -> Vec<u8> {
    let mut waiting: Vec<(usize, &[u8])> = segments
        .map(|(offset, bytes)| (offset as usize, bytes))
        .filter(|(offset, bytes)| *offset < most && !bytes.is_empty())
        .collect();
    waiting.sort_by_key(|(offset, _)| *offset);
    let mut out: Vec<u8> = Vec::new();
    for (offset, bytes) in waiting {
        let Some(known) = out.len().checked_sub(offset) else { break };
        out.extend(bytes.get(known..).unwrap_or_default());
    }
    out.truncate(most);
    out
}

/// Hexadecimal digits, where there are bytes.
pub(super) fn hex(bytes: Option<&Vec<u8>>) -> Option<String> {
    bytes.map(|bytes| to_hex(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(highest(0x0303, &[]), "1.2");
        assert_eq!(highest(0x0301, &[]), "1.0");
        assert_eq!(highest(0x0300, &[]), "SSL 3.0");
        assert_eq!(highest(0x0303, &[0x7a, 0x7a, 3, 4, 3, 3]), "1.3");
        assert_eq!(highest(0x0303, &[0x7f, 0x1c]), "1.2");
        assert_eq!(highest(0x0999, &[]), "0x0999");
    }

    #[test]
    fn segments_are_joined_as_far_as_they_go() {
        let segments: [(u32, &[u8]); 4] = [(3, b"def"), (0, b"abc"), (2, b"cde"), (9, b"xyz")];
        assert_eq!(joined(segments.into_iter(), 100), b"abcdef");
        assert_eq!(joined(segments.into_iter(), 4), b"abcd");
        assert_eq!(joined([(1, &b"b"[..])].into_iter(), 4), b"");
        assert_eq!(joined([(u32::MAX, &b"before"[..]), (0, b"a")].into_iter(), 4), b"a");
    }

    #[test]
    fn a_cookie_is_seen_and_not_shown() {
        let request = b"GET / HTTP/1.1\r\nHost: x\r\ncOOKIE:  id=secret \r\n\r\nCookie: body=1\r\n";
        assert_eq!(of_stream(request).cookie, Some(Cookie { len: 9 }));
        assert_eq!(of_stream(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nCookie: body=1\r\n").cookie, None);
        assert_eq!(of_stream(b"SSH-2.0-x\r\nCookie: a=1\r\n").cookie, None);
    }

    #[test]
    fn long_headers_of_quic() {
        let packet = [&[0xc3, 0, 0, 0, 1, 3, 1, 2, 3, 2, 8, 9][..], &[0; 40]].concat();
        let quic = of_datagram(&packet).quic.expect("QUIC");
        assert_eq!((quic.version, quic.dcid, quic.scid), (1, vec![1, 2, 3], vec![8, 9]));
        for end in 0..12 {
            assert_eq!(of_datagram(&packet[..end]), Hello::default(), "{end}");
        }
        let mut other = packet.clone();
        other[5] = 21;
        assert_eq!(of_datagram(&other).quic, None, "an ID of 21 bytes");
        other = packet;
        other[0] = 0x43;
        assert_eq!(of_datagram(&other).protocol, None, "a short header says nothing of itself");
    }

    #[test]
    fn names_do_not_reach_the_terminal_raw() {
        assert_eq!(printable(b"a.test\x1b[2J"), "a.test\\x1b[2J");
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..20_000 {
            let bytes: Vec<u8> = (0..round % 90)
                .map(|at| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if at < 6 { [22, 3, 1, 0, 80, 1][at] } else { (state >> 56) as u8 }
                })
                .collect();
            let hello = of_stream(&bytes);
            of_server(&bytes, &hello);
            of_datagram(&bytes);
        }
    }
}
