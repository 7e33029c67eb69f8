//! The identifiers of a client that are looked up, in the order of its service's affinity.
//!
//! The program keeps to itself what it looks up. So it is read here with the program's parsers, and the
//! identifier that decided is the one whose entry was used while the flow was bound.

use std::net::IpAddr;

use dispatcher_common::{
    http::{self, FOUND, Reader},
    quic::{self, Form},
    service::Frontend,
    session::{KIND_QUIC_CID, KIND_QUIC_SERVER, Session, SessionKey},
    stash::PAYLOAD_MAX,
};

use super::{Error, machine::Machine};
use crate::identify::{self, Wanted};

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
    let cookie = machine.cookie(frontend, stream)?;
    let cookie = cookie.filter(|reader| reader.state == FOUND).map(|reader| http::id(reader.hash));
    let wanted = Wanted {
        service: frontend.service,
        affinity: &frontend.affinity,
        ticket_formats: frontend.ticket_formats,
    };
    Ok(identify::keys(&wanted, client, stream, cookie))
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
