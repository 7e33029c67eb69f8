//! The daemon's one record for all packets, time, and scratch memory.

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::map,
    maps::{Array, PerCpuArray},
};
use dispatcher_common::{
    flow::{Flow, FlowKey},
    globals::{Globals, HEARTBEAT_LIMIT_NS},
    http::Reader,
    opaque::opaque,
    qos::Name,
    quic::Head,
    reason::Reason,
    session::{Session, SessionKey, TICKET_HEAD},
    tcp::{OptionBytes, Options},
    tls::{Bytes, ClientHello},
};

use crate::{parse::Parsed, stash::Segment};

#[map]
static GLOBALS: Array<Globals> = Array::with_max_entries(1, 0);
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// Bytes of the buffer for hellos: twice the longest, so that any offset and length below that fit.
pub const HELLO: usize = 16_384;
/// Bytes of the payload buffer.
pub const PAYLOAD: usize = 4096;

/// Memory for what does not fit the stack of 512 bytes, one a CPU. Valid within one program run.
#[repr(C)]
pub struct Scratch {
    /// The packet, for the program that has it not on its stack.
    pub packet: Parsed,
    /// Index in `STAGES` of the program that goes on with the packet.
    pub stage: u32,
    /// Where the first option word stands in `header`.
    pub offset: u32,
    /// A segment's payload.
    pub payload: [u8; PAYLOAD],
    /// A TCP header with options, or options before their translation.
    pub old: OptionBytes,
    /// Options after their translation.
    pub options: OptionBytes,
    /// A frame's headers: IP at offset 32, what is before it right-aligned.
    pub header: [u32; 48],
    /// What the options say.
    pub parsed: Options,
    /// Entry toward the backend.
    pub forward: Flow,
    /// Entry toward the client.
    pub backward: Flow,
    /// Key of the entry toward the client.
    pub backward_key: FlowKey,
    /// Key of a session.
    pub session_key: SessionKey,
    /// A session to be written.
    pub session: Session,
    /// A segment of a connection that is not established.
    pub segment: Segment,
    /// A hello without record headers.
    pub hello: [u8; HELLO],
    /// What it says.
    pub client_hello: ClientHello,
    /// The name it asks for, as `NAMES` has it.
    pub name: Name,
    /// Start of a ticket.
    pub ticket: [u8; TICKET_HEAD],
    /// How much of it there is, at most `TICKET_HEAD`.
    pub ticket_len: u32,
    /// Id of the class of the session that was found, 0 for none.
    pub class: u32,
    /// How far the reading of a header came.
    pub reader: Reader,
    /// The first header of a QUIC datagram, which `payload` begins with.
    pub quic: Head,
    /// Something that the verifier does not know.
    pub salt: u64,
}

/// The record.
#[inline(always)]
pub fn globals() -> Result<&'static Globals, Reason> {
    GLOBALS.get(0).ok_or(Reason::Internal)
}

/// This CPU's scratch memory.
#[inline(always)]
pub fn scratch() -> Result<&'static mut Scratch, Reason> {
    let scratch = SCRATCH.get_ptr_mut(0).ok_or(Reason::Internal)?;
    // SAFETY: the entry belongs to this CPU; each stage uses it as plain memory and hands no
    // reference to another run of the program.
    Ok(unsafe { &mut *scratch })
}

/// Nanoseconds of CLOCK_MONOTONIC, a tick coarse.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Nanoseconds of CLOCK_MONOTONIC, exact: it costs more.
#[inline(always)]
pub fn exact_ns() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// True while the daemon gives signs of life.
#[inline(always)]
pub fn daemon_lives(globals: &Globals) -> bool {
    // Signed: the coarse clock is up to a tick behind the daemon's.
    (now_ns().wrapping_sub(globals.heartbeat) as i64) < HEARTBEAT_LIMIT_NS as i64
}

/// Seconds of CLOCK_MONOTONIC.
#[inline(always)]
pub fn now() -> u32 {
    (now_ns() / 1_000_000_000) as u32
}

/// Bytes in scratch memory, as the parsers read them. `N` is a power of two.
pub struct Buffer<'a, const N: usize> {
    /// The memory.
    pub bytes: &'a [u8; N],
    /// How much of it counts.
    pub len: usize,
    /// See [`Bytes::salt`].
    pub salt: u64,
}

impl<const N: usize> Bytes for Buffer<'_, N> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.len
    }
    #[inline(always)]
    fn byte(&self, at: usize) -> Option<u8> {
        let at = opaque(at as u64) as usize;
        if at >= N || at >= self.len {
            return None;
        }
        // SAFETY: `at` is below `N`.
        Some(unsafe { *self.bytes.as_ptr().add(at) })
    }
    #[inline(always)]
    fn byte_or_any(&self, at: usize) -> u8 {
        let at = opaque(at as u64) as usize & (N - 1);
        // SAFETY: `at` is below `N`, a power of two.
        unsafe { *self.bytes.as_ptr().add(at) }
    }
    #[inline(always)]
    fn salt(&self) -> u64 {
        self.salt
    }
}
