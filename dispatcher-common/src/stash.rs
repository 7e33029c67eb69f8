//! Where the first bytes of a connection wait until its backend has answered.

use crate::{
    addr::Addr,
    flow::{FlowKey, Link},
    proxy::ROOM,
    session::{ID_MAX, SessionKey},
};

/// Bytes of [`Slot::buf`]: room for a PROXY header and payload.
pub const BUF: usize = 7872;
/// Longest segment that is stashed.
pub const SEGMENT_MAX: usize = 2047;
/// Largest offset at which a segment is stashed, so that any segment fits behind it.
pub const OFFSET_MAX: usize = BUF - ROOM - SEGMENT_MAX - 1;
/// Most payload that is stashed: what the clones of one SYN-ACK can carry at an MSS of 1300.
pub const PAYLOAD_MAX: usize = 4 * 1300;

/// Free.
pub const STAGE_FREE: u32 = 0;
/// Collects a hello; no backend yet.
pub const STAGE_FILLING: u32 = 1;
/// Waits for the daemon's pick.
pub const STAGE_HELD: u32 = 2;
/// [`Slot::marks`]: it is held for its turn at the backend that it has.
pub const MARK_TURN: u32 = 1 << 8;
/// The SYN went to the backend.
pub const STAGE_BOUND: u32 = 3;
/// The backend has answered and the content was sent; kept for repair, may be taken over.
pub const STAGE_REPLAYED: u32 = 4;

/// See [`Slot::emitted`].
pub const EMITTED: u32 = 1 << 16;

/// A slot that was not touched for so long may be taken over by another flow, nanoseconds.
pub const SLOT_LIFE_NS: u64 = 3_000_000_000;

/// A session ticket of TLS 1.2, not empty.
pub const OFFER_TICKET: u8 = 1 << 0;
/// A PSK of TLS 1.3.
pub const OFFER_PSK: u8 = 1 << 1;
/// An HTTP cookie, whose hash stands in place of the session ID.
pub const OFFER_COOKIE: u8 = 1 << 2;

/// What a ClientHello offers to resume, for the reading of the server's answer.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Offer {
    /// `OFFER_*`.
    pub flags: u8,
    /// Length of the session ID.
    pub id_len: u8,
    /// Unused, zero.
    pub pad: [u8; 2],
    /// The session ID, zero-filled. Beside a ticket or PSK the client made it up. Of a flow with
    /// [`MARK_HTTP`](crate::flow::MARK_HTTP): hash of a cookie, or of the part that has come.
    pub id: [u8; ID_MAX],
}

/// One stashed connection. 8192 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Slot {
    /// 1 while a CPU works on the slot.
    pub lock: u32,
    /// `STAGE_*`.
    pub stage: u32,
    /// The client's flow (client -> VIP).
    pub key: FlowKey,
    /// Last touched, nanoseconds of CLOCK_MONOTONIC.
    pub stamp: u64,
    /// The client's initial sequence number.
    pub isn: u32,
    /// Ours toward the client.
    pub cookie: u32,
    /// Payload bytes held from the first on without a gap.
    pub len: u32,
    /// One piece beyond a gap: its start in the payload.
    pub ahead_start: u32,
    /// One piece beyond a gap: its end; 0 for none.
    pub ahead_end: u32,
    /// Index into `FRONTENDS`.
    pub frontend: u32,
    /// Backend index.
    pub backend: u32,
    /// Clones that the emit program has begun with, and [`EMITTED`] times those that it is done with.
    pub emitted: u32,
    /// The backend's initial sequence number.
    pub peer_isn: u32,
    /// The backend's TSval.
    pub peer_ts: u32,
    /// Stream bytes a segment toward the backend.
    pub chunk: u32,
    /// Where the stream to the backend begins in `buf`: before `ROOM` by a PROXY header's length.
    pub start: u32,
    /// The client's last TSval.
    pub tsval: u32,
    /// The client's window field (unscaled), host order.
    pub window: u16,
    /// The client's MSS.
    pub mss: u16,
    /// The client's window scale, [`NO_WSCALE`](crate::cookie::NO_WSCALE) for none.
    pub wscale: u8,
    /// 1: the client agreed to SACK.
    pub sack: u8,
    /// 1: the client agreed to timestamps.
    pub ts: u8,
    /// TTL or hop limit of the client's packet, less one.
    pub ttl: u8,
    /// How frames reach the client.
    pub client: Link,
    /// How frames reach the backend.
    pub link: Link,
    /// Source address of packets to the backend.
    pub src: Addr,
    /// Destination address of packets to the backend.
    pub dst: Addr,
    /// Ports of packets to the backend, as on the wire.
    pub ports: u32,
    /// Result of the scan: `flow::MARK_SECURE`, `flow::MARK_HTTP`; then the class, as in `Flow::marks`; then
    /// [`MARK_TURN`].
    pub marks: u32,
    /// TOS or traffic class of the client's packet.
    pub tos: u32,
    /// The first identifier of the service's order that was found, `len` 0 for none.
    pub session: SessionKey,
    /// What the hello offers to resume.
    pub offer: Offer,
    /// Segments taken so far.
    pub segments: u32,
    /// Backends that were given up for this connection.
    pub rebinds: u32,
    /// Unused, zero.
    pub pad: [u32; 5],
    /// When the backend was sent what it has not answered yet, nanoseconds of CLOCK_MONOTONIC; 0 for never.
    pub sent: u64,
    /// `ROOM` bytes for a PROXY header, then the payload.
    pub buf: [u8; BUF],
}

const _: () = assert!(size_of::<Slot>() == 8192);
