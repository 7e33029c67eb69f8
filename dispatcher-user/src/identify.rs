//! The identifiers of a client's first bytes, with the parsers of the data path.

use std::net::IpAddr;

use dispatcher_common::{
    addr::Addr,
    session::{
        KIND_CLIENT, KIND_COOKIE, KIND_TICKET, KIND_TICKET_NAME, KIND_TLS_SESSION_ID, SessionKey,
        TICKET_FORMATS, TICKET_HEAD,
    },
    tls::{self, Scan},
};

/// What a service looks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'w> {
    /// Its stable id.
    pub(crate) service: u32,
    /// Kinds of identifiers, in the order in which they are looked up.
    pub(crate) affinity: &'w [u8],
    /// Formats of tickets, a bit each (`session::TICKET_FORMATS`).
    pub(crate) ticket_formats: u8,
}

/// The ClientHello with which a stream begins, without record headers, and where in it things stand.
pub(crate) fn client_hello(bytes: &[u8]) -> Option<(Vec<u8>, tls::ClientHello)> {
    if tls::scan_client_hello(bytes) == Scan::NotTls {
        return None;
    }
    let mut message = vec![0; bytes.len()];
    let len = tls::join_records(bytes, bytes.len(), |from, to, len| {
        let Some(part) = bytes.get(from..from + len) else { return false };
        message.get_mut(to..to + len).map(|place| place.copy_from_slice(part)).is_some()
    });
    message.truncate(len);
    let mut found = tls::ClientHello::default();
    tls::client_hello(&message[..], &mut found).then_some((message, found))
}

/// The identifiers with which a client's stream begins; `cookie` is the id of its cookie, where it has one.
pub(crate) fn keys(
    wanted: &Wanted<'_>,
    client: IpAddr,
    stream: &[u8],
    cookie: Option<[u8; 16]>,
) -> Vec<SessionKey> {
    let (message, found) = client_hello(stream).unwrap_or_default();
    let [session_id, ticket, psk] = [found.session_id, found.ticket, found.psk].map(|one| one.of(&message));
    // A client that offers both resumes with the PSK.
    let sealed = if psk.is_empty() { ticket } else { psk };
    let key = |kind, id: &[u8]| SessionKey::new(wanted.service, kind, id);
    let mut keys = Vec::new();
    for kind in wanted.affinity {
        match *kind {
            KIND_TICKET_NAME => {
                let formats = (0..).zip(TICKET_FORMATS).filter(|(n, _)| wanted.ticket_formats >> n & 1 != 0);
                let names = formats.filter_map(|(_, (at, len))| {
                    key(KIND_TICKET_NAME, sealed.get(usize::from(at)..usize::from(at + len))?)
                });
                keys.extend(names);
                keys.extend(sealed.get(..TICKET_HEAD).and_then(|head| key(KIND_TICKET, head)));
            }
            // Beside a ticket or PSK the session ID is made up by the client (RFC 5077 section 3.4).
            KIND_TLS_SESSION_ID if sealed.is_empty() => keys.extend(key(KIND_TLS_SESSION_ID, session_id)),
            KIND_COOKIE => keys.extend(cookie.and_then(|id| key(KIND_COOKIE, &id))),
            KIND_CLIENT => keys.extend(key(KIND_CLIENT, &Addr::from(client).octets())),
            _ => {}
        }
    }
    keys
}
