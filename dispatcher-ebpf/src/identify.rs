//! The identifiers of a stashed hello, looked up in the service's order.

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use dispatcher_common::{
    opaque::opaque,
    proxy::ROOM,
    service::Frontend,
    session::{
        COOKIE_LEN, ID_MAX, KIND_CLIENT, KIND_COOKIE, KIND_TICKET, KIND_TICKET_NAME, KIND_TLS_SESSION_ID,
        Session, SessionKey, TICKET_FORMATS, TICKET_HEAD,
    },
    stash::{OFFER_COOKIE, OFFER_PSK, OFFER_TICKET, Slot},
    tls::{self, Span},
};

use crate::{
    bind::ANY,
    globals::{Buffer, HELLO, Scratch, now, scratch},
    services, sessions,
    stash::{self, Payload},
};

// The three steps of reading a hello, and the search for its identifiers, are exported, so that each is
// a global function for the verifier (kernel 5.6), which checks it once, for any arguments, and not for
// every way that leads to it.

/// Copies the hello of a slot to scratch memory, without record headers. Returns its length.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_join_hello(index: u32) -> u32 {
    let (Ok(slot), Ok(scratch)) = (stash::slot(index), scratch()) else { return 0 };
    // SAFETY: `buf` is longer than `ROOM`.
    let from = unsafe { slot.buf.as_ptr().add(ROOM) };
    let to = scratch.hello.as_mut_ptr();
    let len = tls::join_records(&Payload { slot }, HELLO / 2, |at, put, len| {
        let put = opaque(put as u64) as usize & (HELLO / 2 - 1);
        let len = opaque(len as u64) as usize & (HELLO / 2 - 1);
        // SAFETY: the source lies in `buf` by what the scan of records found, and the kernel checks it in
        // any case. The destination: `put + len` is below `HELLO`.
        len != 0 && unsafe { bpf_probe_read_kernel(to.add(put).cast(), len as u32, from.add(at).cast()) } == 0
    });
    len as u32
}

/// Reads the hello in scratch memory. Returns 1, or 0 when it is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_parse_hello(len: u32) -> u32 {
    let (Ok(scratch), Ok(own)) = (scratch(), scratch()) else { return 0 };
    let message = Buffer { bytes: &scratch.hello, len: len as usize, salt: scratch.salt };
    tls::client_hello(&message, &mut own.client_hello) as u32
}

/// Reads the hello of a slot: what it offers goes to the slot, the start of its ticket to scratch memory.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_read_hello(index: u32) -> u32 {
    let (Ok(slot), Ok(scratch)) = (stash::slot(index), scratch()) else { return 0 };
    slot.offer.flags = 0;
    slot.offer.id_len = 0;
    scratch.ticket_len = 0;
    if dispatcher_parse_hello(dispatcher_join_hello(index)) == 0 {
        return 0;
    }
    let hello = &scratch.client_hello;
    slot.offer.id_len = copy::<ID_MAX>(&scratch.hello, hello.session_id, &mut slot.offer.id);
    let mut ticket = hello.ticket;
    if ticket.len != 0 {
        slot.offer.flags |= OFFER_TICKET;
    }
    if hello.psk.len != 0 {
        // A client that offers both resumes with the PSK.
        slot.offer.flags |= OFFER_PSK;
        ticket = hello.psk;
    }
    scratch.ticket_len = copy::<TICKET_HEAD>(&scratch.hello, ticket, &mut scratch.ticket) as u32;
    1
}

/// Reads the hello of a slot, see [`dispatcher_read_hello`].
#[inline(always)]
pub fn read(index: u32) {
    dispatcher_read_hello(index);
}

/// Copies the start of a piece, zero-filled; returns how many bytes there are, at most `N`.
#[inline(always)]
fn copy<const N: usize>(from: &[u8; HELLO], span: Span, to: &mut [u8; N]) -> u8 {
    let len = if span.len as usize > N { N } else { span.len as usize };
    let at = opaque(span.at as u64) as usize & (HELLO / 2 - 1);
    for (i, byte) in to.iter_mut().enumerate() {
        // All ones for i < len: without a branch, which the verifier would follow both ways.
        let keep = opaque(((i as i64 - len as i64) >> 63) as u64) as u8;
        // SAFETY: `at + i` is below the size of `hello`.
        *byte = unsafe { *from.as_ptr().add(at + i) } & keep;
    }
    len as u8
}

/// The backend of a known identifier, or [`ANY`]. The first identifier that the hello has, known or not,
/// goes to `slot.session`.
#[inline(always)]
pub fn find(index: u32, avoid: u32, secure: bool) -> u32 {
    dispatcher_find(index, avoid, secure as u32)
}

/// [`find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_find(index: u32, avoid: u32, secure: u32) -> u32 {
    let Ok(slot) = stash::slot(index) else { return ANY };
    let Ok(frontend) = services::frontend(slot.frontend) else { return ANY };
    for i in 0..frontend.affinity.len() {
        let kind = frontend.affinity[i];
        if kind == 0 {
            break;
        }
        let found = by_kind(slot, frontend, avoid, (kind as u32) << 1 | secure & 1);
        if found != ANY {
            return found;
        }
    }
    ANY
}

/// [`find`] for one kind; `what` is the kind shifted left by one, and whether the connection is secure.
#[inline(never)]
fn by_kind(slot: &mut Slot, frontend: &Frontend, avoid: u32, what: u32) -> u32 {
    let Ok(scratch) = scratch() else { return ANY };
    let (kind, secure) = ((what >> 1) as u8, what & 1 != 0);
    let resumes = slot.offer.flags & (OFFER_TICKET | OFFER_PSK) != 0;
    let key = &mut scratch.session_key;
    key.service = frontend.service;
    key.kind = kind;
    key.pad[0] = 0;
    key.pad[1] = 0;
    match kind {
        KIND_TICKET_NAME if secure && resumes => return by_ticket(slot, frontend, avoid),
        // Beside a ticket or PSK the session ID is made up by the client (RFC 5077 section 3.4).
        KIND_TLS_SESSION_ID if secure && !resumes && slot.offer.id_len != 0 => {
            key.len = slot.offer.id_len;
            words(&slot.offer.id, &mut key.id);
        }
        KIND_COOKIE if slot.offer.flags & OFFER_COOKIE != 0 => {
            key.len = COOKIE_LEN;
            words(&slot.offer.id, &mut key.id);
        }
        KIND_CLIENT => client_key(slot, key),
        _ => return ANY,
    }
    note(slot, key);
    usable(slot, frontend, key, avoid)
}

/// The key of a client's address.
#[inline(always)]
pub fn client_key(slot: &Slot, key: &mut SessionKey) {
    key.kind = KIND_CLIENT;
    key.len = 16;
    let from = &slot.key.src.words;
    // SAFETY: `id` has 32 bytes, at an offset of the key that is a multiple of 8.
    let to = unsafe { &mut *key.id.as_mut_ptr().cast::<[u32; 8]>() };
    let none = opaque(0) as u32;
    to[0] = from[0];
    to[1] = from[1];
    to[2] = from[2];
    to[3] = from[3];
    to[4] = none;
    to[5] = none;
    to[6] = none;
    to[7] = none;
}

/// By the name of the key that sealed the ticket, else by the ticket itself.
#[inline(never)]
fn by_ticket(slot: &mut Slot, frontend: &Frontend, avoid: u32) -> u32 {
    let Ok(scratch) = scratch() else { return ANY };
    for format in 0..TICKET_FORMATS.len() {
        if frontend.ticket_formats >> format & 1 == 0 || !set_name(scratch, format) {
            continue;
        }
        note(slot, &scratch.session_key);
        let found = usable(slot, frontend, &scratch.session_key, avoid);
        if found != ANY {
            // What is learned from the answer is learned of this name.
            slot.session.len = 0;
            note(slot, &scratch.session_key);
            return found;
        }
    }
    if scratch.ticket_len < TICKET_HEAD as u32 {
        return ANY;
    }
    set_ticket(scratch);
    usable(slot, frontend, &scratch.session_key, avoid)
}

/// Makes the scratch key that of the key name in the scratch ticket; false when the ticket is too short.
#[inline(always)]
pub fn set_name(scratch: &mut Scratch, format: usize) -> bool {
    let Some((offset, len)) = TICKET_FORMATS.get(format).copied() else { return false };
    if scratch.ticket_len < (offset + len) as u32 {
        return false;
    }
    scratch.session_key.kind = KIND_TICKET_NAME;
    scratch.session_key.len = len;
    for i in 0..ID_MAX {
        let keep = opaque(((i as i64 - len as i64) >> 63) as u64) as u8;
        let at = (i + offset as usize) & (TICKET_HEAD - 1);
        scratch.session_key.id[i] = scratch.ticket[at] & keep;
    }
    true
}

/// Makes the scratch key that of the scratch ticket as a whole.
#[inline(always)]
pub fn set_ticket(scratch: &mut Scratch) {
    scratch.session_key.kind = KIND_TICKET;
    scratch.session_key.len = TICKET_HEAD as u8;
    words(&scratch.ticket, &mut scratch.session_key.id);
}

/// Copies an identifier word by word: LLVM calls its byte-wise `memmove` for a whole array.
#[inline(always)]
pub fn words(from: &[u8; ID_MAX], to: &mut [u8; ID_MAX]) {
    // SAFETY: 32 bytes each; BPF on the platforms that run XDP needs no alignment.
    let (from, to) =
        unsafe { (&*from.as_ptr().cast::<[u32; 8]>(), &mut *to.as_mut_ptr().cast::<[u32; 8]>()) };
    to[0] = from[0];
    to[1] = from[1];
    to[2] = from[2];
    to[3] = from[3];
    to[4] = from[4];
    to[5] = from[5];
    to[6] = from[6];
    to[7] = from[7];
}

/// The slot remembers the first identifier.
#[inline(always)]
fn note(slot: &mut Slot, key: &SessionKey) {
    if slot.session.len == 0 {
        slot.session.service = key.service;
        slot.session.kind = key.kind;
        slot.session.len = key.len;
        slot.session.pad[0] = 0;
        slot.session.pad[1] = 0;
        words(&key.id, &mut slot.session.id);
    }
}

/// The backend of a living entry that can be reached: what a client alone stands for comes last.
#[inline(never)]
fn usable(slot: &Slot, frontend: &Frontend, key: &SessionKey, avoid: u32) -> u32 {
    let now = now();
    let reach = |session: Option<&'static mut Session>| {
        let Some(session) = session else { return ANY };
        let found = reachable(session, slot, avoid);
        if found != ANY {
            sessions::touch(key.kind, session, frontend, now);
            note_class(session);
        }
        found
    };
    match reach(sessions::get(key, now)) {
        ANY => reach(sessions::provisional(key, now)),
        found => found,
    }
}

/// The connection is of the session's class, if it has one.
#[inline(always)]
pub fn note_class(session: &Session) {
    if let Ok(scratch) = scratch() {
        scratch.class = session.class as u32;
    }
}

/// One of an entry's backends that can be reached: any of them, by the flow's hash.
#[inline(always)]
pub fn reachable(session: &Session, slot: &Slot, avoid: u32) -> u32 {
    let v4 = slot.key.src.is_v4();
    let several = session.backends[1] != 0;
    let turn = if several { stash::mix(&slot.key) as u32 >> 8 } else { 0 };
    for i in 0..session.backends.len() as u32 {
        let id = session.backends[(turn.wrapping_add(i) & 3) as usize];
        if id != 0
            && let Some(backend) = services::backend_of_id(id)
            && backend != avoid
            && services::endpoint_up(backend, v4).is_some()
        {
            return backend;
        }
    }
    ANY
}
