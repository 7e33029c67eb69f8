//! Sessions of requests: the cookie's value leads to backend and tunnel, by the same table as in the data path.

use std::{iter, net::IpAddr, sync::Mutex};

use dispatcher_common::{
    http,
    session::{
        KIND_CLIENT, KIND_COOKIE, KIND_TICKET_NAME, STATE_CONFIRMED, STATE_PINNED, STATE_PROVISIONAL,
        Session, SessionKey,
    },
};
use hyper::{HeaderMap, header::COOKIE, http::HeaderValue};
use memchr::{memchr, memchr2};

use super::{Reached, Site, lock};
use crate::{
    config::Service,
    dataplane::{Error, Sessions, monotonic_seconds},
};

/// Random bytes of a session that we give.
const ID: usize = 16;

/// The value of a cookie in a request: of several the first that is not empty.
pub(super) fn of_request<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h [u8]> {
    let mut pairs = headers.get_all(COOKIE).into_iter().flat_map(|line| pairs(line.as_bytes()));
    pairs.find_map(|pair| value(pair, name).filter(|value| !value.is_empty()))
}

/// What is between semicolons: lines of cookies can be long.
fn pairs(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(line);
    iter::from_fn(move || {
        let line = rest?;
        let end = memchr(b';', line);
        rest = end.map(|end| &line[end + 1..]);
        Some(&line[..end.unwrap_or(line.len())])
    })
}

/// The value of a cookie that a response sets.
pub(super) fn of_set_cookie<'h>(line: &'h HeaderValue, name: &str) -> Option<&'h [u8]> {
    value(pairs(line.as_bytes()).next()?, name).filter(|value| !value.is_empty())
}

/// As in the data path, a value ends before a blank. Those around `=` do not count (RFC 6265bis section 5.6).
pub(super) fn value<'h>(pair: &'h [u8], name: &str) -> Option<&'h [u8]> {
    let rest = pair.trim_ascii_start().strip_prefix(name.as_bytes())?;
    let rest = rest.trim_ascii_start().strip_prefix(b"=")?.trim_ascii_start();
    Some(&rest[..memchr2(b' ', b'\t', rest).unwrap_or(rest.len())])
}

/// The key of a session.
pub(super) fn key(site: &Site, value: &[u8]) -> SessionKey {
    let id = http::cookie_id(value);
    SessionKey::new(site.service.id, KIND_COOKIE, &id).unwrap_or_default()
}

/// A new session's value: 128 random bits, hexadecimal.
pub(super) fn new_value() -> Option<String> {
    let mut id = [0; ID];
    getrandom::fill(&mut id).ok()?;
    Some(crate::api::to_hex(&id))
}

/// The session and its backend, where it has one that can be reached.
pub(super) fn find(
    sessions: &Sessions,
    key: &SessionKey,
    reached: &Reached,
) -> Result<Option<(Session, u32)>, Error> {
    let now = monotonic_seconds();
    Ok(sessions.all(key)?.find_map(|session| usable(session, reached, now)))
}

fn usable(session: Session, reached: &Reached, now: u32) -> Option<(Session, u32)> {
    let backend = session.ids().find(|id| reached.pool.known.contains_key(id))?;
    (!session.expired(now)).then_some((session, backend))
}

/// The session of a connection's last request. For the rest of the second in which it was read and written, requests
/// that change nothing but the number of hits need not ask the table. What others change in the table holds a second
/// later.
#[derive(Default)]
pub(super) struct Recent(Mutex<Option<Seen>>);

struct Seen {
    key: SessionKey,
    /// As it was written.
    session: Session,
    /// Hits that the table does not know of.
    hits: u32,
}

impl Recent {
    /// The session, if it is that one and from this second.
    pub(super) fn find(&self, key: &SessionKey, reached: &Reached) -> Option<(Session, u32)> {
        let now = monotonic_seconds();
        let session =
            lock(&self.0).as_ref().filter(|seen| seen.key == *key && seen.session.used == now)?.session;
        usable(session, reached, now)
    }

    /// Counts a request; false if there is more to write than that.
    fn count(&self, key: &SessionKey, binding: Binding) -> bool {
        let Binding { backend, tunnel, confirmed } = binding;
        let now = monotonic_seconds();
        let same = |seen: &&mut Seen| {
            let Seen { key: known, session, .. } = seen;
            *known == *key
                && session.used == now
                && session.has(backend)
                && (tunnel == 0 || session.tunnel == tunnel)
                && !(confirmed && session.state == STATE_PROVISIONAL)
        };
        let mut seen = lock(&self.0);
        let found = seen.as_mut().filter(same);
        found.map(|seen| seen.hits = seen.hits.wrapping_add(1)).is_some()
    }

    /// Takes note of what was written. Hits that it did not hold are written now.
    fn note(&self, sessions: &Sessions, key: &SessionKey, session: Session) -> Result<(), Error> {
        let seen = lock(&self.0).replace(Seen { key: *key, session, hits: 0 });
        seen.map_or(Ok(()), |seen| seen.write(sessions))
    }

    /// Hits of this session that the table does not know of, to be written.
    fn take(&self, key: &SessionKey) -> u32 {
        let mut seen = lock(&self.0);
        let found = seen.as_mut().filter(|seen| seen.key == *key);
        found.map_or(0, |seen| std::mem::take(&mut seen.hits))
    }

    /// Writes what the table does not know, at the end of the connection.
    pub(super) fn flush(&self, sessions: &Sessions) -> Result<(), Error> {
        let seen = lock(&self.0).take();
        seen.map_or(Ok(()), |seen| seen.write(sessions))
    }
}

impl Seen {
    fn write(self, sessions: &Sessions) -> Result<(), Error> {
        if self.hits == 0 {
            return Ok(());
        }
        match sessions.get(&self.key)? {
            Some(now) => sessions.insert(self.key, Session { hits: now.hits.wrapping_add(self.hits), ..now }),
            // It was removed meanwhile.
            None => Ok(()),
        }
    }
}

/// What is written of a session.
#[derive(Clone, Copy)]
pub(super) struct Binding {
    pub(super) backend: u32,
    /// 0 for none.
    pub(super) tunnel: u32,
    /// The backend set the cookie, or we did: not only the client says so.
    pub(super) confirmed: bool,
}

/// Notes that a session uses a backend and a tunnel. Of two racing first requests both go to the first one's
/// backend, which is returned.
pub(super) fn bind(
    sessions: &Sessions,
    key: &SessionKey,
    binding: Binding,
    service: &Service,
    reached: &Reached,
    recent: &Recent,
) -> Result<u32, Error> {
    let Binding { backend, tunnel, confirmed } = binding;
    if recent.count(key, binding) {
        return Ok(backend);
    }
    let now = monotonic_seconds();
    let end = |life: u32| now.saturating_add(life).max(1);
    // An address, and a cookie, live as long as a confirmed one although nobody confirms them.
    let lasts = matches!(key.kind, KIND_COOKIE | KIND_CLIENT);
    if let Some((old, known)) = find(sessions, key, reached)? {
        // What one backend has set, another does not take away while the first can be reached.
        if known != backend {
            return Ok(known);
        }
        let state = if confirmed && old.state == STATE_PROVISIONAL { STATE_CONFIRMED } else { old.state };
        let extends = state == STATE_CONFIRMED || state == STATE_PROVISIONAL && lasts;
        let expires = if extends { end(service.session_ttl) } else { old.expires };
        let hits = old.hits.wrapping_add(1).wrapping_add(recent.take(key));
        // A request in clear takes no tunnel away.
        let tunnel = if tunnel == 0 { old.tunnel } else { tunnel };
        let new = Session { tunnel, state, used: now, expires, hits, ..old };
        sessions.insert(*key, new)?;
        return recent.note(sessions, key, new).map(|()| backend);
    }
    let state = if confirmed { STATE_CONFIRMED } else { STATE_PROVISIONAL };
    let expires = end(if confirmed || lasts { service.session_ttl } else { service.provisional_ttl });
    let new = Session { tunnel, state, created: now, used: now, expires, hits: 1, ..Session::of(backend) };
    if sessions.insert_new(*key, new)? {
        return Ok(backend);
    }
    match find(sessions, key, reached)? {
        Some((_, winner)) => Ok(winner),
        None if sessions.get(key)?.is_some_and(|old| old.state == STATE_PINNED) => Ok(backend),
        // Expired, or its backend is gone.
        None => sessions.insert(*key, new).map(|()| backend),
    }
}

/// The server issued or accepted an identifier: it is the backend's from now on.
pub(super) fn confirm(sessions: &Sessions, key: &SessionKey, backend: u32, life: u32) -> Result<(), Error> {
    let now = monotonic_seconds();
    let expires = now.saturating_add(life).max(1);
    let Some(mut old) = sessions.get(key)?.filter(|old| !old.expired(now)) else {
        let new =
            Session { state: STATE_CONFIRMED, created: now, used: now, expires, ..Session::of(backend) };
        return sessions.insert(*key, new);
    };
    // What two servers accept they share: key names are random, and nothing else is issued twice.
    let shared = key.kind == KIND_TICKET_NAME && old.state != STATE_PROVISIONAL;
    if old.state == STATE_PINNED || shared && old.has(backend) && old.state != STATE_CONFIRMED {
        return Ok(());
    }
    if shared {
        old.add(backend);
        let expires = if old.state == STATE_CONFIRMED { expires } else { old.expires };
        return sessions.insert(*key, Session { used: now, expires, ..old });
    }
    let Session { tunnel, class, created, hits, .. } = old;
    let new = Session { tunnel, class, created, hits, used: now, expires, ..Session::of(backend) };
    sessions.insert(*key, Session { state: STATE_CONFIRMED, ..new })
}

/// A hash of a client's address: one client keeps its backend with consistent hashing.
pub(super) fn hash(client: IpAddr) -> u64 {
    let fold = |bytes: &[u8]| {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    };
    match client {
        IpAddr::V4(ip) => fold(&ip.octets()),
        IpAddr::V6(ip) => fold(&ip.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(COOKIE, HeaderValue::from_static(line));
        }
        headers
    }

    #[test]
    fn the_first_cookie_of_the_name_counts() {
        for (lines, found) in [
            (&["a=1; SID=x; SID=y"][..], Some(&b"x"[..])),
            (&["SID=x"], Some(b"x")),
            (&["a=SID=x"], None),
            (&["SIDE=x", "b=2;SID=z"], Some(b"z")),
            (&["SID=; SID=y"], Some(b"y")),
            (&["sid=x"], None),
            (&["SID=a b"], Some(b"a")),
            (&["SID = x"], Some(b"x")),
            (&["a=1; SID\t=x"], Some(b"x")),
            (&["SID= x; SID=y"], Some(b"x")),
            (&["SID = ; SID=y"], Some(b"y")),
            (&["SID x=y"], None),
            (&["SID"], None),
            (&[], None),
        ] {
            assert_eq!(of_request(&headers(lines), "SID"), found, "{lines:?}");
        }
    }

    #[test]
    fn a_set_cookie_names_one() {
        let line = |text| HeaderValue::from_static(text);
        assert_eq!(of_set_cookie(&line("SID=x; Path=/; HttpOnly"), "SID"), Some(&b"x"[..]));
        assert_eq!(of_set_cookie(&line("SID = x; Path=/"), "SID"), Some(&b"x"[..]));
        assert_eq!(of_set_cookie(&line("a=1; SID=x"), "SID"), None);
        assert_eq!(of_set_cookie(&line("SID=; Max-Age=0"), "SID"), None);
    }

    #[test]
    fn given_values_differ() {
        let (one, other) = (new_value().expect("random"), new_value().expect("random"));
        assert_eq!(one.len(), 32);
        assert_ne!(one, other);
    }
}
