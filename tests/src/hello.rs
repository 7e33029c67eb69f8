//! TLS hellos as bytes: built with any session ID and length, cut into records, read back.

use std::io::{Read, Write};

use anyhow::{Context as _, Result, bail, ensure};

use crate::tls::HOST;

/// A ClientHello for TLS 1.2 that every server here can answer, in one record.
///
/// `padding` makes it longer by that many bytes and a few.
#[must_use]
pub fn client_hello(session_id: &[u8], padding: usize) -> Vec<u8> {
    resuming_hello(session_id, None, &[], padding)
}

/// The same with a SessionTicket extension, and with a PSK identity in the last extension.
#[must_use]
pub fn resuming_hello(session_id: &[u8], ticket: Option<&[u8]>, psk: &[u8], padding: usize) -> Vec<u8> {
    let mut extensions = Vec::new();
    if let Some(ticket) = ticket {
        extensions.push((35, ticket.to_vec()));
    }
    extensions.extend(usual_extensions());
    if padding > 0 {
        extensions.push((21, vec![0; padding]));
    }
    if !psk.is_empty() {
        extensions.push((43, vec![4, 3, 4, 3, 3]));
        extensions.push((41, pre_shared_key(psk)));
    }
    // ECDHE with ECDSA or RSA, AES-128-GCM
    hello_of(session_id, &[0xc0, 0x2b, 0xc0, 0x2f], &extensions)
}

/// What every server here needs: a host name, groups and signature algorithms.
#[must_use]
pub fn usual_extensions() -> Vec<(u16, Vec<u8>)> {
    vec![
        server_name(HOST.as_bytes()),
        // x25519, secp256r1
        (10, length16(&[0, 29, 0, 23])),
        (11, vec![1, 0]),
        // ECDSA and RSA with SHA-256
        (13, length16(&[4, 3, 8, 4, 4, 1])),
        // extended master secret
        (23, Vec::new()),
    ]
}

/// A server_name extension.
#[must_use]
pub fn server_name(name: &[u8]) -> (u16, Vec<u8>) {
    (0, length16(&[&[0][..], &length16(name)].concat()))
}

/// The content of a pre_shared_key extension with one identity.
#[must_use]
pub fn pre_shared_key(identity: &[u8]) -> Vec<u8> {
    let identities = length16(&[&length16(identity)[..], &[0, 0, 0, 9]].concat());
    let binders = length16(&[&[32][..], &[0xb1; 32]].concat());
    [identities, binders].concat()
}

/// A ClientHello of these cipher suites and extensions, in one record.
#[must_use]
pub fn hello_of(session_id: &[u8], suites: &[u8], extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]);
    body.push(session_id.len() as u8);
    body.extend(session_id);
    body.extend(length16(suites));
    body.extend([1, 0]);
    let extensions: Vec<u8> =
        extensions.iter().flat_map(|(kind, content)| extension(*kind, content)).collect();
    body.extend(length16(&extensions));
    record(&handshake(1, &body))
}

/// A ServerHello in one record; `tls13` adds the extension that says so.
#[must_use]
pub fn server_hello(session_id: &[u8], tls13: bool) -> Vec<u8> {
    server_hello_with(session_id, &[if tls13 { (43, &[3, 4]) } else { (23, &[]) }])
}

/// A ServerHello with these extensions.
#[must_use]
pub fn server_hello_with(session_id: &[u8], extensions: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0xa5; 32]);
    body.push(session_id.len() as u8);
    body.extend(session_id);
    body.extend([0xc0, 0x2b, 0]);
    let extensions: Vec<u8> =
        extensions.iter().flat_map(|(kind, content)| extension(*kind, content)).collect();
    body.extend(length16(&extensions));
    record(&handshake(2, &body))
}

/// A NewSessionTicket of TLS 1.2 in one record.
#[must_use]
pub fn new_session_ticket(ticket: &[u8]) -> Vec<u8> {
    record(&handshake(4, &[&[0, 0, 1, 44][..], &length16(ticket)].concat()))
}

/// The same handshake message in several records, cut at these offsets of its one record's content.
#[must_use]
pub fn in_records(hello: &[u8], cuts: &[usize]) -> Vec<u8> {
    let content = &hello[5..];
    let ends = cuts.iter().copied().chain([content.len()]);
    let mut out = Vec::new();
    let mut start = 0;
    for end in ends {
        out.extend(record(&content[start..end]));
        start = end;
    }
    out
}

/// What a server of TLS 1.2 says in its first flight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Flight {
    /// The session ID in its ServerHello.
    pub session_id: Vec<u8>,
    /// The common name in its certificate; empty when it resumes a session.
    pub server: String,
}

/// Sends a hello and reads the server's first flight.
pub fn ask(stream: &mut (impl Read + Write), hello: &[u8]) -> Result<Flight> {
    stream.write_all(hello).context("sending a hello")?;
    flight(stream)
}

/// Reads a server's first flight as far as its certificate.
pub fn flight(stream: &mut impl Read) -> Result<Flight> {
    let mut messages = Vec::new();
    let mut flight: Option<Flight> = None;
    loop {
        let mut header = [0; 5];
        stream.read_exact(&mut header).context("reading a record of the server's flight")?;
        let mut content = vec![0; usize::from(u16::from_be_bytes([header[3], header[4]]))];
        stream.read_exact(&mut content).context("reading a record of the server's flight")?;
        match (header[0], &mut flight) {
            (22, _) => messages.extend(content),
            // ChangeCipherSpec right after the ServerHello: the session is resumed.
            (20, Some(flight)) => return Ok(flight.clone()),
            (kind, _) => bail!("record of kind {kind}: {content:02x?}"),
        }
        while let Some((kind, body, rest)) = next_message(&messages) {
            match (kind, &mut flight) {
                (2, None) => {
                    let length = usize::from(*body.get(34).context("ServerHello cut short")?);
                    let session_id = body.get(35..35 + length).context("ServerHello cut short")?.to_vec();
                    flight = Some(Flight { session_id, server: String::new() });
                }
                (11, Some(flight)) => {
                    let length = usize::from(u16::from_be_bytes([body[4], body[5]]));
                    flight.server = common_name(body.get(6..6 + length).context("certificate cut short")?)?;
                    return Ok(flight.clone());
                }
                // Extensions of the flight that come before the certificate do not matter.
                (4, Some(_)) => {}
                (kind, _) => bail!("handshake message {kind} before the certificate"),
            }
            messages = rest;
        }
    }
}

fn next_message(bytes: &[u8]) -> Option<(u8, Vec<u8>, Vec<u8>)> {
    let (&[kind, a, b, c], rest) = bytes.split_first_chunk()?;
    let (body, rest) = rest.split_at_checked(u32::from_be_bytes([0, a, b, c]) as usize)?;
    Some((kind, body.to_vec(), rest.to_vec()))
}

/// The subject's common name: the last one in a certificate, after the issuer's.
fn common_name(der: &[u8]) -> Result<String> {
    const ID: [u8; 5] = [6, 3, 0x55, 4, 3];
    let at = der.windows(5).rposition(|window| window == ID).context("no common name in the certificate")?;
    let rest = &der[at + 5..];
    ensure!(matches!(rest.first(), Some(0x0c | 0x13)), "the common name is no string");
    let length = usize::from(*rest.get(1).context("common name cut short")?);
    Ok(String::from_utf8(rest.get(2..2 + length).context("common name cut short")?.to_vec())?)
}

fn record(content: &[u8]) -> Vec<u8> {
    [&[22, 3, 1][..], &length16(content)].concat()
}

fn handshake(kind: u8, body: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = (body.len() as u32).to_be_bytes();
    [&[kind, a, b, c][..], body].concat()
}

/// An extension: type, length, content.
#[must_use]
pub fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &length16(body)].concat()
}

fn length16(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dispatcher_common::tls::{self, Scan, scan_client_hello};

    fn session_id(hello: &[u8]) -> Vec<u8> {
        let mut message = vec![0; hello.len()];
        let len = tls::join_records(hello, hello.len(), |from, to, len| {
            message[to..to + len].copy_from_slice(&hello[from..from + len]);
            true
        });
        let mut found = tls::ClientHello::default();
        assert!(tls::client_hello(&message[..len], &mut found));
        assert_eq!(found.whole, 1);
        found.session_id.of(&message).to_vec()
    }

    #[test]
    fn hellos_are_what_the_parser_expects() {
        for id in [&b""[..], b"short", &[7; 32]] {
            for hello in
                [client_hello(id, 0), client_hello(id, 3000), in_records(&client_hello(id, 0), &[1, 40])]
            {
                assert_eq!(scan_client_hello(hello.as_slice()), Scan::Complete);
                assert_eq!(session_id(&hello), id);
                assert_eq!(scan_client_hello(&hello[..hello.len() - 1]), Scan::Partial);
            }
        }
    }

    #[test]
    fn names_come_from_the_subject() {
        let der =
            [&[6, 3, 0x55, 4, 3, 0x0c, 2][..], b"ca", &[6, 3, 0x55, 4, 3, 0x0c, 3], b"b12", &[9, 9]].concat();
        assert_eq!(common_name(&der).unwrap(), "b12");
        assert!(common_name(&der[..der.len() - 4]).is_err());
    }
}
