//! The identifiers of a client that are looked up, in the order of its service's affinity.
//!
//! The program keeps to itself what it looks up. So it is read here with the program's parsers, and the
//! identifier that decided is the one whose entry was used while the flow was bound.

use std::net::IpAddr;

use dispatcher_common::{
    addr::Addr,
    http::{self, FOUND, Reader},
    quic::{self, Form},
    service::Frontend,
    session::{
        KIND_CLIENT, KIND_COOKIE, KIND_QUIC_CID, KIND_QUIC_SERVER, KIND_TICKET, KIND_TICKET_NAME,
        KIND_TLS_SESSION_ID, Session, SessionKey, TICKET_FORMATS, TICKET_HEAD,
    },
    stash::PAYLOAD_MAX,
};

use super::{Error, hello, machine::Machine};

/// An identifier, and its entry before the program ran.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tried {
    /// The identifier.
    pub(super) key: SessionKey,
    /// Its entry at that time.
    pub(super) session: Option<Session>,
}

/// The identifiers with which a client's stream begins, for a service that binds by the first data.
pub(super) fn of_stream(
    machine: &Machine,
    frontend: &Frontend,
    client: IpAddr,
    stream: &[u8],
) -> Result<Vec<SessionKey>, Error> {
    let stream = stream.get(..PAYLOAD_MAX).unwrap_or(stream);
    let (message, found) = hello::client_hello(stream).unwrap_or_default();
    let cookie = machine.cookie(frontend, stream)?;
    let [session_id, ticket, psk] = [found.session_id, found.ticket, found.psk].map(|one| one.of(&message));
    // A client that offers both resumes with the PSK.
    let sealed = if psk.is_empty() { ticket } else { psk };
    let key = |kind, id: &[u8]| SessionKey::new(frontend.service, kind, id);
    let mut keys = Vec::new();
    for kind in frontend.affinity {
        match kind {
            KIND_TICKET_NAME => {
                let formats =
                    (0..).zip(TICKET_FORMATS).filter(|(n, _)| frontend.ticket_formats >> n & 1 != 0);
                let names = formats.filter_map(|(_, (at, len))| {
                    key(kind, sealed.get(usize::from(at)..usize::from(at + len))?)
                });
                keys.extend(names);
                keys.extend(sealed.get(..TICKET_HEAD).and_then(|head| key(KIND_TICKET, head)));
            }
            // Beside a ticket or PSK the session ID is made up by the client (RFC 5077 section 3.4).
            KIND_TLS_SESSION_ID if sealed.is_empty() => keys.extend(key(kind, session_id)),
            KIND_COOKIE => {
                let value = cookie.filter(|reader| reader.state == FOUND);
                keys.extend(value.and_then(|reader| key(kind, &http::id(reader.hash))));
            }
            KIND_CLIENT => keys.extend(key(kind, &Addr::from(client).octets())),
            _ => {}
        }
    }
    Ok(keys)
}

/// The identifiers of the first datagram of a service that is bound by it.
pub(super) fn of_datagram(frontend: &Frontend, datagram: &[u8]) -> Vec<SessionKey> {
    let head = quic::head(datagram, datagram.len());
    let (at, len) = (head.dcid.at as usize, head.dcid.len as usize);
    let quic = frontend.affinity.first() == Some(&KIND_QUIC_CID);
    let Some([first, rest @ ..]) = datagram.get(at..at + len).filter(|_| quic) else { return Vec::new() };
    let key = |kind, id: &[u8]| SessionKey::new(frontend.service, kind, id);
    let server = match quic::server_id_len(*first, len, &frontend.quic_lb) {
        0 => None,
        len => {
            rest.get(..len).and_then(|id| key(KIND_QUIC_SERVER, &[&[quic::config_id(*first)], id].concat()))
        }
    };
    let lengths = match head.form {
        // How long it is only its server knows: what the service's servers use is tried.
        Form::Short => frontend.cid_lengths,
        Form::Long | Form::Other | Form::Bad => 1 << len,
    };
    let lengths = (1..=len).filter(|len| lengths >> len & 1 != 0).take(QUIC_LENGTHS_MAX);
    let ids = lengths.filter_map(|len| key(KIND_QUIC_CID, datagram.get(at..at + len)?));
    server.into_iter().chain(ids).collect()
}

/// Lengths of connection IDs that the program tries for a short header.
const QUIC_LENGTHS_MAX: usize = 4;

/// Where a cookie declares who is secure: what a client's stream says so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Declared {
    /// The session cookie is there.
    Yes,
    /// There is none, or nobody looks for one.
    No,
    /// It may still come.
    Open,
}

impl Declared {
    /// What the walk over a stream found; `None` where nobody looks for a cookie.
    pub(super) fn by(walked: Option<Reader>) -> Self {
        match walked {
            Some(reader) if reader.state == FOUND => Self::Yes,
            Some(reader) if !reader.ended() => Self::Open,
            _ => Self::No,
        }
    }
}
