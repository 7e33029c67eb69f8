//! The mapping table: session identifier -> backend.

use aya_ebpf::{macros::map, maps::LruHashMap};
use dispatcher_common::{
    abi,
    service::Frontend,
    session::{STATE_CONFIRMED, STATE_PINNED, STATE_PROVISIONAL, Session, SessionKey},
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
pub fn touch(session: &mut Session, frontend: &Frontend, now: u32) {
    session.used = now;
    session.hits = session.hits.wrapping_add(1);
    if session.state == STATE_CONFIRMED {
        session.expires = now.wrapping_add(frontend.session_ttl);
    }
}

/// Makes a provisional entry, unless there is a living one: then its backend's stable id is
/// returned, so that of two racing first requests both go to one backend.
#[inline(always)]
pub fn add_provisional(
    key: &SessionKey,
    session: &mut Session,
    backend: u32,
    frontend: &Frontend,
) -> Option<u32> {
    let now = now();
    *session = Session {
        backend,
        state: STATE_PROVISIONAL,
        created: now,
        used: now,
        expires: now.wrapping_add(frontend.provisional_ttl),
        hits: 1,
        ..Session::default()
    };
    let session: &Session = session;
    if SESSIONS.insert(key, session, NOEXIST).is_ok() {
        return None;
    }
    match get(key, now) {
        Some(winner) => Some(winner.backend),
        None => {
            // Expired: take its place. A full table evicts; a failure costs only stickiness.
            let _ = SESSIONS.insert(key, session, 0);
            None
        }
    }
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
        let news = entry.state != STATE_CONFIRMED || entry.backend != backend || entry.expired(now);
        entry.backend = backend;
        entry.state = STATE_CONFIRMED;
        entry.used = now;
        entry.expires = expires;
        return news;
    }
    *session =
        Session { backend, state: STATE_CONFIRMED, created: now, used: now, expires, ..Session::default() };
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
