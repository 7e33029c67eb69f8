//! Services and backends as the data path sees them.

use crate::{addr::Addr, flow::Link};

/// Key of `VIPS`: what a new connection is addressed to. 20 bytes without padding.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct VipKey {
    /// Destination address.
    pub addr: Addr,
    /// Destination port, as on the wire.
    pub port: u16,
    /// IP protocol number, host order.
    pub proto: u16,
}

impl VipKey {
    /// From a port in host order.
    #[must_use]
    pub fn new(addr: impl Into<Addr>, port: u16, proto: u8) -> Self {
        Self { addr: addr.into(), port: port.to_be(), proto: proto as u16 }
    }

    /// Where [`Globals::vips`](crate::globals::Globals::vips) may know this VIP.
    #[inline(always)]
    #[must_use]
    pub const fn hint(&self) -> usize {
        let w = &self.addr.words;
        let w = w[0] ^ w[1] ^ w[2] ^ w[3] ^ (self.port as u32 | (self.proto as u32) << 16);
        (w.wrapping_mul(0x9e37_79b1) >> 20) as usize
    }
}

/// Delayed binding: the first data decides.
pub const MODE_PASSTHROUGH: u8 = 1;
/// Bound on the first packet by consistent hash.
pub const MODE_L4: u8 = 2;
/// Served by a listener of the daemon: packets go up.
pub const MODE_LOCAL: u8 = 3;

/// Backends see the dispatcher's address, not the client's.
pub const FRONTEND_SOURCE_DISPATCHER: u32 = 1 << 0;
/// A PROXY protocol v2 header goes before the client's first byte.
pub const FRONTEND_PROXY_V2: u32 = 1 << 1;
/// Misses are held for the daemon instead of going by the table.
pub const FRONTEND_MISS_DAEMON: u32 = 1 << 2;
/// Do not agree to SACK with clients.
pub const FRONTEND_NO_SACK: u32 = 1 << 3;
/// Do not agree to timestamps with clients.
pub const FRONTEND_NO_TS: u32 = 1 << 4;
/// A backend refused SACK, so it is not agreed to with clients. The data path sets this.
pub const FRONTEND_REFUSED_SACK: u32 = 1 << 5;
/// A backend refused timestamps. The data path sets this.
pub const FRONTEND_REFUSED_TS: u32 = 1 << 6;
/// A backend refused window scaling. The data path sets this.
pub const FRONTEND_REFUSED_WSCALE: u32 = 1 << 7;
/// A connection over its backend's rate is answered with RST, where it is TCP.
pub const FRONTEND_OVER_RESET: u32 = 1 << 8;
/// A connection over its backend's rate is held for the daemon, with [`FRONTEND_MISS_DAEMON`].
pub const FRONTEND_OVER_HOLD: u32 = 1 << 9;
/// Some of its connections' classes are said by the name that clients ask for: those of `NAMES`.
pub const FRONTEND_NAMES: u32 = 1 << 10;
/// First bit of the class in [`Frontend::flags`], see [`Frontend::class`].
pub const FRONTEND_CLASS_BIT: u32 = 16;
/// What the data path sets.
pub const FRONTEND_REFUSED: u32 = FRONTEND_REFUSED_SACK | FRONTEND_REFUSED_TS | FRONTEND_REFUSED_WSCALE;

/// One VIP address/port of a service, with the service's settings.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Frontend {
    /// The VIP.
    pub addr: Addr,
    /// Port, as on the wire.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// `MODE_*`.
    pub mode: u8,
    /// Stable id of the service, see [`stable_id`].
    pub service: u32,
    /// `FRONTEND_*`, and from bit [`FRONTEND_CLASS_BIT`] on the class.
    pub flags: u32,
    /// First entry of the load-balancing table in `LB_TABLE`.
    pub table_base: u32,
    /// Entries of the table; 0: no backend is available.
    pub table_len: u32,
    /// For the daemon: first entry of the place in `LB_TABLE` that holds this frontend's two tables.
    pub table_region: u32,
    /// For the daemon: entries of each of the two.
    pub table_size: u32,
    /// First source address in `SOURCES` (`source = "dispatcher"`).
    pub source_base: u32,
    /// Number of source addresses, at least 1 with `FRONTEND_SOURCE_DISPATCHER`.
    pub source_len: u32,
    /// First port of the source port pool, host order.
    pub port_min: u16,
    /// Last port of the source port pool, host order.
    pub port_max: u16,
    /// Window scale told to clients (0-14).
    pub wscale: u8,
    /// Bit f: tickets may carry a name in format f of
    /// [`TICKET_FORMATS`](crate::session::TICKET_FORMATS).
    pub ticket_formats: u8,
    /// Largest MSS told to clients.
    pub mss: u16,
    /// Life of a confirmed session entry without use, seconds.
    pub session_ttl: u32,
    /// Life of a provisional session entry, seconds.
    pub provisional_ttl: u32,
    /// `session::KIND_*` in the order in which identifiers are looked up; 0 ends.
    pub affinity: [u8; 4],
    /// Index into `COOKIES` of the automaton that finds the service's cookie, plus 1; 0: no cookie.
    pub cookie: u32,
    /// Bit n: servers of the service choose QUIC connection IDs of n bytes. The data path sets it.
    pub cid_lengths: u32,
    /// Length of the server ID in QUIC connection IDs of configuration n; 0: not configured.
    pub quic_lb: [u8; 8],
}

impl Frontend {
    /// Id of the class of its connections, where neither session nor client say another; 0 is the default one.
    #[inline(always)]
    #[must_use]
    pub const fn class(&self) -> u16 {
        (self.flags >> FRONTEND_CLASS_BIT) as u16
    }

    /// Sets the class.
    pub const fn set_class(&mut self, id: u16) {
        self.flags = self.flags & ((1 << FRONTEND_CLASS_BIT) - 1) | (id as u32) << FRONTEND_CLASS_BIT;
    }
}

/// The endpoint can be reached: route and neighbour are known, and it is not disabled.
pub const BACKEND_UP: u16 = 1 << 0;
/// Known sessions still go here, new ones do not.
pub const BACKEND_DRAIN: u16 = 1 << 1;
/// Nothing answers there any more: its flows are over.
pub const BACKEND_DEAD: u16 = 1 << 2;
/// For the daemon: it is down because it is disabled.
pub const BACKEND_DISABLED: u16 = 1 << 3;
/// For the daemon: health checks took it out.
pub const BACKEND_UNHEALTHY: u16 = 1 << 4;

/// One address of a backend.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Backend {
    /// Address; all zero where the backend has none of this family.
    pub addr: Addr,
    /// Port, as on the wire.
    pub port: u16,
    /// `BACKEND_*`.
    pub flags: u16,
    /// Stable id, see [`stable_id`].
    pub id: u32,
    /// How frames reach it.
    pub link: Link,
    /// MTU of the route, bytes.
    pub mtu: u16,
    /// Number of the replay map of the interface (0..REPLAY_MAPS).
    pub replay: u16,
    /// What is known of its session tickets: `session::TICKET_*`.
    pub ticket: u32,
    /// Unused, zero.
    pub reserved: [u32; 2],
}

/// Where a backend's address of a family stands in `BACKENDS`.
#[inline(always)]
#[must_use]
pub const fn endpoint_index(backend: u32, v4: bool) -> u32 {
    backend.wrapping_mul(2).wrapping_add(if v4 { 0 } else { 1 })
}

/// Counted once a connection, per backend.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct BackendStats {
    /// Connections bound.
    pub connections: u64,
    /// Of these, by a session known before.
    pub hits: u64,
    /// Of these, secure with an identifier that was not known.
    pub misses: u64,
    /// Of these, secure without an identifier.
    pub fresh: u64,
    /// Of these, not secure.
    pub nonsecure: u64,
    /// Connections that the backend accepted.
    pub established: u64,
    /// Connections that the backend refused or did not answer.
    pub refused: u64,
    /// Sessions learned from the backend's ServerHello.
    pub learned: u64,
}

/// Buckets of a [`Histogram`].
pub const BUCKETS: usize = 24;

/// How often something took how long. Bucket `n` counts what took less than 1024 << n nanoseconds and is in no
/// bucket before it, the last one all the rest.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Histogram {
    /// Counts.
    pub buckets: [u64; BUCKETS],
    /// Sum of all times, nanoseconds.
    pub sum: u64,
}

impl Histogram {
    /// The bucket of a time in nanoseconds.
    #[inline(always)]
    #[must_use]
    pub const fn bucket(ns: u64) -> usize {
        let n = 64 - (ns >> 10).leading_zeros() as usize;
        if n < BUCKETS { n } else { BUCKETS - 1 }
    }

    /// Where a bucket ends, nanoseconds; `None` for the last one, which has no end.
    #[must_use]
    pub const fn end(bucket: usize) -> Option<u64> {
        if bucket + 1 < BUCKETS { Some(1024 << bucket) } else { None }
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// How long a backend takes to answer: counted once a connection, per backend.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct BackendTimes {
    /// From our SYN to its SYN-ACK.
    pub connect: Histogram,
    /// From the hello or request that it was sent to its first data.
    pub response: Histogram,
}

/// A stable 32-bit id from a name (FNV-1a), never 0. Services use their name, backends
/// `service/name`. Two names with one id are refused by the config.
#[must_use]
pub fn stable_id(name: &str) -> u32 {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ b as u32).wrapping_mul(0x0100_0193));
    if hash == 0 { 1 } else { hash }
}

const _: () = assert!(size_of::<VipKey>() == 20);
const _: () = assert!(size_of::<Frontend>() == 88);
const _: () = assert!(size_of::<Backend>() == 64);
