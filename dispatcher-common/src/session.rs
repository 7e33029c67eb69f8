//! The mapping table: session identifier -> backend and tunnel.

/// TLS session ID of TLS 1.2 and before (RFC 5246 section 7.4.1.2).
pub const KIND_TLS_SESSION_ID: u8 = 1;
/// Name of the key that sealed a session ticket, a part of the ticket: see [`TICKET_FORMATS`]. Of TLS 1.2
/// (RFC 5077 section 4 recommends it) and TLS 1.3 (the first PSK identity).
pub const KIND_TICKET_NAME: u8 = 2;
/// The first 32 bytes of a ticket, which no other ticket has: where servers put no name into tickets.
pub const KIND_TICKET: u8 = 3;
/// Client address.
pub const KIND_CLIENT: u8 = 4;
/// Hash of an HTTP cookie's value, 16 bytes: the value itself, which is a secret, is kept nowhere.
pub const KIND_COOKIE: u8 = 5;
/// Bytes of that hash.
pub const COOKIE_LEN: u8 = 16;
/// QUIC connection ID that a server chose (RFC 9000 section 5.1).
pub const KIND_QUIC_CID: u8 = 6;
/// Server ID in a QUIC connection ID of a QUIC-LB configuration (draft-ietf-quic-load-balancers).
pub const KIND_QUIC_SERVER: u8 = 7;

/// Where servers put the name of the key into a ticket: offset and length in bytes. OpenSSL, nginx,
/// HAProxy, Apache, BoringSSL, GnuTLS and rustls, and s2n, whose version before the name does no harm;
/// mbedTLS and JSSE. Go from 1.21 on, and servers that remember sessions instead of sealing them, put none.
pub const TICKET_FORMATS: [(u8, u8); 2] = [(0, 16), (0, 4)];
/// Bytes of a ticket that are looked at.
pub const TICKET_HEAD: usize = 32;
/// `Backend::ticket`: not known.
pub const TICKET_UNKNOWN: u32 = 0;
/// `Backend::ticket`: its tickets carry no name.
pub const TICKET_OPAQUE: u32 = 1;
/// `Backend::ticket`: from here on, its tickets carry a name in format number `ticket - TICKET_NAMED`.
pub const TICKET_NAMED: u32 = 2;

/// Longest identifier.
pub const ID_MAX: usize = 32;

/// Key of `SESSIONS`. 40 bytes without padding; identifiers shorter than 32 bytes are zero-filled,
/// and the length is a part of the key.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct SessionKey {
    /// Stable id of the service: identifiers of different services do not meet.
    pub service: u32,
    /// `KIND_*`.
    pub kind: u8,
    /// Length of the identifier, 1-32.
    pub len: u8,
    /// Unused, zero.
    pub pad: [u8; 2],
    /// The identifier.
    pub id: [u8; ID_MAX],
}

impl SessionKey {
    /// A key, or `None` when the identifier is empty or longer than 32 bytes.
    #[must_use]
    pub fn new(service: u32, kind: u8, id: &[u8]) -> Option<Self> {
        let len = u8::try_from(id.len()).ok().filter(|len| (1..=ID_MAX as u8).contains(len))?;
        let mut key = Self { service, kind, len, ..Self::default() };
        key.id.get_mut(..id.len())?.copy_from_slice(id);
        Some(key)
    }

    /// The identifier's bytes.
    #[must_use]
    pub fn id(&self) -> &[u8] {
        self.id.get(..self.len as usize).unwrap_or(&self.id)
    }
}

/// Learned from a client only, and kept in `PROVISIONAL`: never stands before another, nor pushes one out.
pub const STATE_PROVISIONAL: u8 = 1;
/// The server issued or accepted the identifier.
pub const STATE_CONFIRMED: u8 = 2;
/// Set by the operator: learning never changes it and it does not expire.
pub const STATE_PINNED: u8 = 3;
/// Found by the daemon's own probes, and kept up by them.
pub const STATE_DISCOVERED: u8 = 4;
/// Set by the configuration: it does not expire.
pub const STATE_CONFIGURED: u8 = 5;

/// Backends of one entry: key names can be shared.
pub const BACKENDS_MAX: usize = 4;

/// Value of `SESSIONS`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Session {
    /// Stable ids of the backends that know the identifier, 0 for none; only key names have several.
    pub backends: [u32; BACKENDS_MAX],
    /// Tunnel id, 0 for none.
    pub tunnel: u32,
    /// Id of its QoS class, see [`class_id`](crate::qos::class_id); 0: none of its own.
    pub class: u16,
    /// `STATE_*`.
    pub state: u8,
    /// Unused, zero.
    pub pad: u8,
    /// Created, seconds of CLOCK_MONOTONIC.
    pub created: u32,
    /// Last used, seconds of CLOCK_MONOTONIC.
    pub used: u32,
    /// Expires, seconds of CLOCK_MONOTONIC; 0 for never.
    pub expires: u32,
    /// Connections that came with this identifier.
    pub hits: u32,
}

impl Session {
    /// An entry of one backend.
    #[inline(always)]
    #[must_use]
    pub const fn of(backend: u32) -> Self {
        Self {
            backends: [backend, 0, 0, 0],
            tunnel: 0,
            class: 0,
            state: 0,
            pad: 0,
            created: 0,
            used: 0,
            expires: 0,
            hits: 0,
        }
    }

    /// The ids of its backends.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.backends.into_iter().filter(|id| *id != 0)
    }

    /// True when a backend is one of the entry's.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, backend: u32) -> bool {
        let [a, b, c, d] = self.backends;
        a == backend || b == backend || c == backend || d == backend
    }

    /// Adds a backend; false when it was there, or when there is no room.
    #[inline(always)]
    pub const fn add(&mut self, backend: u32) -> bool {
        if self.has(backend) {
            return false;
        }
        let mut i = 0;
        while i < BACKENDS_MAX {
            if self.backends[i] == 0 {
                self.backends[i] = backend;
                return true;
            }
            i += 1;
        }
        false
    }

    /// True when the entry must not be used at `now` (seconds of CLOCK_MONOTONIC).
    #[inline(always)]
    #[must_use]
    pub const fn expired(&self, now: u32) -> bool {
        self.expires != 0 && now >= self.expires
    }
}

const _: () = assert!(size_of::<SessionKey>() == 40);
const _: () = assert!(size_of::<Session>() == 40);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_added_once_and_up_to_the_most() {
        let mut session = Session::of(7);
        assert!(!session.add(7));
        for id in 8..11 {
            assert!(session.add(id));
        }
        assert!(!session.add(11), "no room");
        assert!(session.ids().eq(7..11));
        assert!(session.has(10) && !session.has(11));
    }
}
