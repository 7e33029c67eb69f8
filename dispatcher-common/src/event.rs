//! What the data path tells the daemon, and the daemon's answers.

use crate::{flow::FlowKey, session::SessionKey};

/// A secure request with an identifier that was not known was bound by the table.
pub const EVENT_MISS: u16 = 1;
/// A hello is held for the daemon to pick a backend: answer with a [`Release`].
pub const EVENT_HELD: u16 = 2;
/// A backend refused or did not answer a connection.
pub const EVENT_REFUSED: u16 = 3;
/// An identifier was learned from a ServerHello.
pub const EVENT_LEARNED: u16 = 4;

/// A backend did not accept a ticket whose key name the mapping table says is its own.
pub const EVENT_REJECTED: u16 = 5;

/// A connection was bound: one of so many as [`Globals::trace`](crate::globals::Globals::trace) says.
pub const EVENT_BOUND: u16 = 6;

/// A hello of a known session is held until its turn at its backend, which is over its rate: answer as
/// [`EVENT_HELD`], with that backend.
pub const EVENT_TURN: u16 = 7;

/// One record of the rings `EVENTS` and `HELD`. 96 bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Event {
    /// `EVENT_*`.
    pub kind: u16,
    /// Id of the class of the connection whose first data it is about, 0 for the default one.
    pub class: u16,
    /// Index into `FRONTENDS`.
    pub frontend: u32,
    /// Backend index; for [`EVENT_HELD`] what the table would pick.
    pub backend: u32,
    /// Stash slot, for [`EVENT_HELD`] and [`EVENT_TURN`]; number of the [`Reason`](crate::reason::Reason), for [`EVENT_BOUND`].
    pub slot: u32,
    /// The flow of the packet that it is about: client -> VIP; of what a server's packet taught
    /// ([`EVENT_LEARNED`], [`EVENT_REJECTED`]) backend -> client or pool.
    pub flow: FlowKey,
    /// Identifier; `len` 0 where there is none.
    pub session: SessionKey,
}

/// [`Release::backend`]: none; the client is told so with RST.
pub const REFUSED: u32 = u32::MAX;

/// The daemon's pick for a held hello.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Release {
    /// Stash slot, from the event.
    pub slot: u32,
    /// Backend index, or [`REFUSED`].
    pub backend: u32,
    /// The client's flow, from the event: a slot that belongs to another flow by now is left alone.
    pub flow: FlowKey,
}

const _: () = assert!(size_of::<Event>() == 96);
const _: () = assert!(size_of::<Release>() == 48);
