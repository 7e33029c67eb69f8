//! The mapping table: session identifier -> backend and tunnel.

/// TLS session ID of TLS 1.2 and before (RFC 5246 section 7.4.1.2).
pub const KIND_TLS_SESSION_ID: u8 = 1;

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

/// Learned from a client only: short life, never overrides another.
pub const STATE_PROVISIONAL: u8 = 1;
/// The server issued or accepted the identifier.
pub const STATE_CONFIRMED: u8 = 2;
/// Set by the operator: learning never changes it and it does not expire.
pub const STATE_PINNED: u8 = 3;

/// Value of `SESSIONS`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Session {
    /// Stable id of the backend.
    pub backend: u32,
    /// Tunnel id, 0 for none.
    pub tunnel: u32,
    /// QoS class.
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
    /// Unused, zero.
    pub reserved: u32,
}

impl Session {
    /// True when the entry must not be used at `now` (seconds of CLOCK_MONOTONIC).
    #[inline(always)]
    #[must_use]
    pub const fn expired(&self, now: u32) -> bool {
        self.expires != 0 && now >= self.expires
    }
}

const _: () = assert!(size_of::<SessionKey>() == 40);
const _: () = assert!(size_of::<Session>() == 32);
