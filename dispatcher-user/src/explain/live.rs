//! What a running daemon knows, out of the answers of its control API.

use std::collections::BTreeMap;

use dispatcher_common::{
    service::stable_id,
    session::{BACKENDS_MAX, Session, SessionKey, TICKET_FORMATS, TICKET_NAMED, TICKET_OPAQUE},
};

use crate::{
    api::{self, from_hex},
    config::backend_id,
    control::{KINDS, STATES},
    dataplane::monotonic_seconds,
};

/// What decides besides the configuration.
#[derive(Debug, Default)]
pub struct Known {
    /// Sessions.
    pub(super) sessions: Vec<(SessionKey, Session)>,
    /// What is known of tickets (`session::TICKET_*`), by backend id.
    pub(super) tickets: BTreeMap<u32, u32>,
}

impl Known {
    /// From `GET /v1/sessions` and `GET /v1/identities`. What another version of the daemon calls by a name
    /// that this one does not have is left out.
    #[must_use]
    pub fn new(sessions: &[api::Session], identities: &[api::Identity]) -> Self {
        let ticket = |one: &api::Identity| {
            if one.state == "opaque" {
                return Some(TICKET_OPAQUE);
            }
            // Two digits a byte.
            let len = one.keys.first()?.len() / 2;
            let format = TICKET_FORMATS.iter().position(|(_, bytes)| usize::from(*bytes) == len)?;
            Some(TICKET_NAMED + format as u32)
        };
        Self {
            sessions: sessions.iter().filter_map(session).collect(),
            tickets: identities
                .iter()
                .filter_map(|one| Some((backend_id(&one.service, &one.backend), ticket(one)?)))
                .collect(),
        }
    }
}

fn session(one: &api::Session) -> Option<(SessionKey, Session)> {
    let key = SessionKey::new(stable_id(&one.service), number(&KINDS, &one.kind)?, &from_hex(&one.id)?)?;
    let mut backends = [0; BACKENDS_MAX];
    backends
        .iter_mut()
        .zip(one.backend.split(','))
        .for_each(|(id, name)| *id = backend_id(&one.service, name));
    let now = monotonic_seconds();
    let session = Session {
        backends,
        state: number(&STATES, &one.state)?,
        created: now.saturating_sub(one.age_seconds),
        used: now.saturating_sub(one.idle_seconds),
        expires: one.expires_in_seconds.map_or(0, |seconds| now.saturating_add(seconds.max(1))),
        hits: one.hits,
        ..Session::default()
    };
    Some((key, session))
}

fn number(table: &[(u8, &str)], name: &str) -> Option<u8> {
    table.iter().find(|(_, known)| *known == name).map(|(number, _)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dispatcher_common::session::{KIND_TICKET_NAME, STATE_DISCOVERED};

    #[test]
    fn sessions_and_identities_come_over() {
        let session = api::Session {
            id: "00ff".into(),
            kind: "tls-ticket-key".into(),
            service: "web".into(),
            backend: "a,b".into(),
            tunnel: 0,
            class: None,
            state: "discovered".into(),
            hits: 3,
            age_seconds: 0,
            idle_seconds: 0,
            expires_in_seconds: None,
        };
        let other = api::Session { kind: "of-tomorrow".into(), ..session.clone() };
        let identity = |backend: &str, state: &str, key: usize| api::Identity {
            service: "web".into(),
            backend: backend.into(),
            server_name: None,
            state: state.into(),
            keys: if key > 0 { vec!["ab".repeat(key)] } else { Vec::new() },
            versions: Vec::new(),
            shared_with: Vec::new(),
            note: None,
            looked_seconds_ago: None,
        };
        let identities = [
            identity("a", "routable", 16),
            identity("b", "routable", 4),
            identity("c", "opaque", 0),
            identity("d", "failed", 0),
        ];
        let known = Known::new(&[session, other], &identities);
        let [(key, value)] = known.sessions[..] else { panic!("{:?}", known.sessions) };
        assert_eq!(Some(key), SessionKey::new(stable_id("web"), KIND_TICKET_NAME, &[0, 255]));
        assert_eq!(value.backends, [backend_id("web", "a"), backend_id("web", "b"), 0, 0]);
        assert_eq!((value.state, value.hits, value.expires), (STATE_DISCOVERED, 3, 0));
        let tickets: Vec<Option<u32>> =
            ["a", "b", "c", "d"].map(|name| known.tickets.get(&backend_id("web", name)).copied()).to_vec();
        assert_eq!(tickets, [Some(TICKET_NAMED), Some(TICKET_NAMED + 1), Some(TICKET_OPAQUE), None]);
    }
}
