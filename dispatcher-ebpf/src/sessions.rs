//! The mapping table: session identifier -> backend.

use aya_ebpf::{macros::map, maps::LruHashMap};
use dispatcher_common::{
    abi,
    service::Frontend,
    session::{
        KIND_CLIENT, KIND_COOKIE, KIND_TICKET_NAME, STATE_CONFIRMED, STATE_PINNED, STATE_PROVISIONAL,
        Session, SessionKey,
    },
};

use crate::globals::now;

#[map]
static SESSIONS: LruHashMap<SessionKey, Session> = LruHashMap::with_max_entries(abi::DEFAULT_SESSIONS, 0);

const NOEXIST: u64 = 1;

/// The living entry of an identifier.
#[inline(always)]
pub fn get(key: &SessionKey, now: u32) -> Option<&'static mut Session> {
    // SAFETY: entries of a preallocated hash stay valid memory while the program runs; fields are
    // words, each written whole.
    let session = SESSIONS.get_ptr_mut(key).map(|session| unsafe { &mut *session })?;
    if session.expired(now) { None } else { Some(session) }
}

/// Notes that an identifier was used.
#[inline(always)]
pub fn touch(kind: u8, session: &mut Session, frontend: &Frontend, now: u32) {
    session.used = now;
    session.hits = session.hits.wrapping_add(1);
    if session.state == STATE_CONFIRMED || kind == KIND_COOKIE && session.state == STATE_PROVISIONAL {
        session.expires = now.wrapping_add(frontend.session_ttl);
    }
}

/// Makes an entry that the client alone stands for, unless there is a living one, which is returned:
/// of two racing first requests both go to one backend.
#[inline(always)]
pub fn add(
    key: &SessionKey,
    session: &mut Session,
    backend: u32,
    frontend: &Frontend,
) -> Option<&'static mut Session> {
    let now = now();
    *session = Session::of(backend);
    session.created = now;
    session.used = now;
    session.hits = 1;
    if key.kind == KIND_CLIENT {
        // Nobody will confirm an address, and it steers nobody else.
        session.state = STATE_CONFIRMED;
        session.expires = now.wrapping_add(frontend.session_ttl);
    } else {
        session.state = STATE_PROVISIONAL;
        // A server that was given a cookie confirms nothing: only one that sets it does.
        let life = if key.kind == KIND_COOKIE { frontend.session_ttl } else { frontend.provisional_ttl };
        session.expires = now.wrapping_add(life);
    }
    let session: &Session = session;
    if SESSIONS.insert(key, session, NOEXIST).is_ok() {
        return None;
    }
    let winner = get(key, now);
    if winner.is_none() {
        // Expired: take its place. A full table evicts; a failure costs only stickiness.
        let _ = SESSIONS.insert(key, session, 0);
    }
    winner
}

/// The server issued or accepted the identifier: it is the backend's from now on. True if that is news.
#[inline(always)]
pub fn confirm(key: &SessionKey, session: &mut Session, backend: u32, frontend: &Frontend) -> bool {
    let now = now();
    let expires = now.wrapping_add(frontend.session_ttl);
    // SAFETY: as in `get`.
    if let Some(entry) = SESSIONS.get_ptr_mut(key).map(|entry| unsafe { &mut *entry }) {
        if entry.state == STATE_PINNED {
            return false;
        }
        entry.used = now;
        let expired = entry.expired(now);
        // What two servers accept they share: key names are random, and nothing else is issued twice.
        if key.kind == KIND_TICKET_NAME && entry.state != STATE_PROVISIONAL && !expired {
            if entry.state == STATE_CONFIRMED {
                entry.expires = expires;
            }
            return entry.add(backend);
        }
        let news = entry.state != STATE_CONFIRMED || entry.backends[0] != backend || expired;
        entry.backends[0] = backend;
        entry.backends[1] = 0;
        entry.backends[2] = 0;
        entry.backends[3] = 0;
        entry.state = STATE_CONFIRMED;
        entry.expires = expires;
        return news;
    }
    *session = Session::of(backend);
    session.state = STATE_CONFIRMED;
    session.created = now;
    session.used = now;
    session.expires = expires;
    let session: &Session = session;
    SESSIONS.insert(key, session, 0).is_ok()
}

/// Forgets a provisional entry whose identifier turned out to mean nothing.
#[inline(always)]
pub fn forget_provisional(key: &SessionKey) {
    // SAFETY: as in `get`.
    if let Some(entry) = SESSIONS.get_ptr_mut(key).map(|entry| unsafe { &mut *entry })
        && entry.state == STATE_PROVISIONAL
    {
        let _ = SESSIONS.remove(key);
    }
}
