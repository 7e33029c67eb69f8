//! The backend's answer to our SYN: deltas are set, the stashed data follow, and later the
//! ServerHello is read.

use dispatcher_common::{
    cookie::NO_WSCALE,
    event::{EVENT_LEARNED, EVENT_REJECTED},
    flow::{
        FLAG_LEARN, FLAG_NO_SACK, FLAG_NO_TS, FLAG_RESYN, FLAG_RST, FLAG_SYN_SENT, Flow, FlowKey, MARK_HIT,
        MARK_HTTP, MARK_SECURE,
    },
    globals::GLOBAL_NO_CLONES,
    opaque::opaque,
    proxy::ROOM,
    reason::Reason,
    service::{FRONTEND_REFUSED_SACK, FRONTEND_REFUSED_TS, FRONTEND_REFUSED_WSCALE},
    session::{ID_MAX, KIND_TICKET_NAME, KIND_TLS_SESSION_ID, SessionKey, TICKET_HEAD, TICKET_NAMED},
    stash::{OFFER_PSK, OFFER_TICKET, STAGE_BOUND, STAGE_REPLAYED, Slot},
    tcp::{ACK, RST, SYN, scale_window},
    tls::{self, Later},
};

use crate::{
    control, counters, emit, events, flows,
    globals::{Buffer, PAYLOAD, exact_ns, globals, scratch},
    http, identify, options,
    packet::{Frame, Tcp},
    parse::{Parsed, packet_end},
    reply, services, sessions, stash,
    verdict::Verdict,
};

/// Window of an ACK that we make, when the client's is not known.
const SOME_WINDOW: u16 = 1024;

/// A packet of a backend that `control` leaves to this stage.
#[inline(always)]
pub fn packet(frame: &Frame, p: &Parsed, flow: &mut Flow) -> Verdict {
    if flow.flags & FLAG_SYN_SENT != 0 {
        return to_syn(frame, p, flow);
    }
    let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let flags = unsafe { (*tcp).flags };
    if flags & (SYN | ACK) == SYN | ACK {
        if flow.flags & FLAG_RESYN != 0 {
            // It took the SYN on a living flow for a new connection, which our client does not know of.
            end(flow, p.key.proto);
            reply::reset(frame, p)?;
            return Verdict(Reason::ResetBackend);
        }
        // Our ACK or the data were lost: once more.
        options::read(frame, p)?;
        return stash::locked(flow.slot, |slot| {
            let key = client_key(flow, p)?;
            if slot.key == *key && stash::is_leaving(slot) {
                return Verdict(Reason::StashBusy);
            }
            replay(frame, p, flow, slot)
        });
    }
    if control::has_payload(frame, p) {
        responded(p, flow);
    }
    if flow.marks & MARK_HTTP != 0 {
        learn_cookies(frame, p, flow);
    } else if learn(frame, p, flow) {
        flow.flags &= !FLAG_LEARN;
    }
    control::conclude(frame, p, flow, flags)
}

/// Counts how long the backend took to its first data.
#[inline(never)]
fn responded(p: &Parsed, flow: &Flow) -> u32 {
    let (Ok(key), Ok(slot)) = (client_key(flow, p), stash::slot(flow.slot)) else { return 0 };
    if slot.sent != 0 && slot.key == *key && slot.stage == STAGE_REPLAYED {
        counters::time(flow.backend, |times| &mut times.response, exact_ns().wrapping_sub(slot.sent));
        slot.sent = 0;
    }
    0
}

/// The client's flow, in scratch memory.
#[inline(always)]
fn client_key(flow: &Flow, p: &Parsed) -> Result<&'static FlowKey, Reason> {
    let key = &mut scratch()?.backward_key;
    flows::set_peer_key(flow, p.key.proto, key);
    Ok(key)
}

/// A packet of a backend on a flow whose SYN it was sent.
#[inline(never)]
fn to_syn(frame: &Frame, p: &Parsed, flow: &mut Flow) -> Verdict {
    let key = client_key(flow, p)?;
    let index = flows::get(key).ok_or(Reason::BadAnswer)?.slot;
    // The client's CPU may be sending the SYN again at this moment.
    stash::locked(index, |slot| to_syn_locked(frame, p, flow, slot, index))
}

/// [`to_syn`] while no other CPU changes the flow.
#[inline(always)]
fn to_syn_locked(frame: &Frame, p: &Parsed, flow: &mut Flow, slot: &mut Slot, index: u32) -> Verdict {
    let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let (flags, seq, ack) = unsafe { ((*tcp).flags, u32::from_be((*tcp).seq), u32::from_be((*tcp).ack)) };
    let key = client_key(flow, p)?;
    let forward = flows::get(key).ok_or(Reason::BadAnswer)?;
    if forward.slot != index || flow.flags & FLAG_SYN_SENT == 0 {
        return Verdict(Reason::StashBusy);
    }
    // Of several backends that were tried for one client, only the last one's answer counts.
    let awaited = forward.flags & FLAG_SYN_SENT != 0 && forward.backend == flow.backend;
    if flags & RST != 0 {
        if awaited {
            // Refused. The client's retransmission of its first data goes to another backend.
            forward.tries = u8::MAX;
        }
        return Verdict(Reason::WaitingBackend);
    }
    if !awaited || flags & (SYN | ACK) != SYN | ACK {
        // Given up, or left over from an earlier connection of these ports: RST ends it
        // (RFC 9293 section 3.5.2).
        reply::reset(frame, p)?;
        return Verdict(Reason::ResetBackend);
    }
    options::read(frame, p)?;
    let parsed = &scratch()?.parsed;
    let frontend = services::frontend(flow.frontend as u32)?;
    let ours = slot.key == *key && slot.stage == STAGE_BOUND;

    let isn = forward.seq_add;
    let header =
        if ours { (ROOM as u32).wrapping_sub(slot.start) } else { isn.wrapping_sub(ack).wrapping_add(1) };
    if header > ROOM as u32 || ack.wrapping_add(header) != isn.wrapping_add(1) {
        reply::reset(frame, p)?;
        return Verdict(Reason::ResetBackend);
    }
    let [client_wscale, client_sack, client_ts, _] = forward.ts_add.to_ne_bytes();
    let delta = seq.wrapping_sub(flow.seq_add);
    forward.seq_add = delta;
    flow.seq_add = 0_u32.wrapping_sub(delta);
    forward.ts_add = 0;
    flow.ts_add = 0;
    let mut refuses = 0;
    let mut flags = 0;
    if client_ts != 0 {
        if parsed.ts != 0 {
            // Toward the client our clock began at its ISN.
            flow.ts_add = isn.wrapping_sub(parsed.tsval);
            forward.ts_add = 0_u32.wrapping_sub(flow.ts_add);
        } else {
            flags |= FLAG_NO_TS;
            refuses |= FRONTEND_REFUSED_TS;
        }
    }
    if client_sack != 0 && parsed.sack == 0 {
        flags |= FLAG_NO_SACK;
        refuses |= FRONTEND_REFUSED_SACK;
    }
    if client_wscale != NO_WSCALE {
        let told = frontend.wscale as i8;
        if parsed.wscale == NO_WSCALE {
            refuses |= FRONTEND_REFUSED_WSCALE;
            forward.set_win_shift(client_wscale as i8);
            flow.set_win_shift(0_i8.wrapping_sub(told));
        } else {
            forward.set_win_shift(0);
            flow.set_win_shift((parsed.wscale as i8).wrapping_sub(told));
        }
    }
    if frontend.flags & refuses != refuses {
        // From now on clients are not offered what this service's backends do not have.
        frontend.flags |= refuses;
    }
    let learn = if flow.marks & (MARK_SECURE | MARK_HTTP) != 0 { FLAG_LEARN } else { 0 };
    forward.flags = (forward.flags | flags) & !FLAG_SYN_SENT;
    flow.flags = (flow.flags | learn) & !FLAG_SYN_SENT;
    flow.tries = 0;
    counters::backend(flow.backend, |stats| stats.established += 1);

    if ours {
        let now = exact_ns();
        counters::time(flow.backend, |times| &mut times.connect, now.wrapping_sub(slot.sent));
        slot.sent = now;
        slot.window = scale_window(slot.window, forward.win_shift());
        slot.peer_isn = seq;
        slot.peer_ts = parsed.tsval;
        slot.ts = client_ts & parsed.ts;
        slot.chunk = chunk(parsed.mss, flow.backend, key.src.is_v4(), slot.ts != 0);
        slot.emitted = 0;
        slot.stage = STAGE_REPLAYED;
    }
    replay(frame, p, flow, slot)
}

/// Sends the stashed data, or a bare ACK when they are gone: then the client's retransmission
/// brings them.
#[inline(never)]
fn replay(frame: &Frame, p: &Parsed, flow: &Flow, slot: &mut Slot) -> Verdict {
    let key = client_key(flow, p)?;
    if slot.key == *key && slot.stage == STAGE_REPLAYED {
        if globals()?.flags & GLOBAL_NO_CLONES != 0 {
            let reason = emit::in_place(frame, slot)?;
            frame.redirect(slot.link.ifindex);
            return Verdict(reason);
        }
        let backend = services::endpoint(flow.backend, key.src.is_v4()).ok_or(Reason::NoBackend)?;
        emit::replay(frame, slot, flow.slot, backend.replay as u32)?;
        return Verdict(Reason::Replayed);
    }
    acknowledge(frame, p, slot, key)
}

#[inline(always)]
fn acknowledge(frame: &Frame, p: &Parsed, slot: &Slot, key: &FlowKey) -> Verdict {
    let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let (seq, ack) = unsafe { (u32::from_be((*tcp).seq), u32::from_be((*tcp).ack)) };
    let parsed = &scratch()?.parsed;
    let known = slot.key == *key;
    let answer = reply::Segment {
        seq: ack,
        ack: seq.wrapping_add(1),
        flags: ACK,
        window: if known { slot.window } else { SOME_WINDOW },
        ts: parsed.ts,
        tsval: parsed.tsecr,
        tsecr: parsed.tsval,
    };
    reply::segment(frame, p, &answer)?;
    Verdict(Reason::AckedBackend)
}

/// Stream bytes of a segment to a backend: its MSS, no more than the route's MTU, in whole words.
#[inline(always)]
fn chunk(mss: u16, backend: u32, v4: bool, ts: bool) -> u32 {
    let mtu = services::endpoint(backend, v4).map_or(0, |e| e.mtu);
    let headers = if v4 { 40 } else { 60 };
    let by_mtu = if mtu < 576 { 1500 - headers } else { mtu - headers };
    let mut size = (if mss < by_mtu { mss } else { by_mtu }) as u32;
    if ts {
        size -= 12;
    }
    size = size.clamp(64, 1460);
    size & !3
}

/// Packets with payload among which a NewSessionTicket is looked for.
const LEARN_MAX: u8 = 16;

/// Reads the server's part of the handshake and learns what it issues or accepts. True when there is no
/// more to learn.
#[inline(never)]
fn learn(frame: &Frame, p: &Parsed, flow: &mut Flow) -> bool {
    let Ok(scratch) = scratch() else { return true };
    let view = frame.view();
    let Some(tcp) = view.ptr::<Tcp>(p.l4()) else { return true };
    // SAFETY: `ptr` checked the bounds.
    let at = p.l4() + unsafe { (*tcp).offset >> 4 } as usize * 4;
    let Some(end) = packet_end(view, p) else { return true };
    if end <= at {
        return false;
    }
    let mut len = end - at;
    if len > PAYLOAD - 1 {
        len = PAYLOAD - 1;
    }
    let len = opaque(len as u64) as usize & (PAYLOAD - 1);
    if len == 0 || !frame.load(at, scratch.payload.as_mut_ptr(), len) {
        return true;
    }
    let hello = dispatcher_read_server_hello(len as u32);
    if hello & RETRY != 0 {
        return false;
    }
    if hello & IS_HELLO != 0 {
        learn_hello(p, flow, hello);
        if hello & TLS13 != 0 || hello & TICKET == 0 {
            return true;
        }
    }
    flow.tries = flow.tries.wrapping_add(1);
    let bytes = Buffer { bytes: &scratch.payload, len, salt: scratch.salt };
    match tls::new_session_ticket(&bytes, (hello >> 16) as usize, hello & OPEN != 0) {
        Later::Ticket(ticket) => {
            if ticket.len as usize >= TICKET_HEAD {
                learn_ticket(p, flow, ticket.at as u32);
            }
            true
        }
        Later::Encrypted => true,
        Later::Other => flow.tries > LEARN_MAX,
    }
}

/// Learns the cookies that a response sets.
#[inline(never)]
fn learn_cookies(frame: &Frame, p: &Parsed, flow: &mut Flow) -> u32 {
    let (Ok(frontend), Ok(key), Ok(slot)) =
        (services::frontend(flow.frontend as u32), client_key(flow, p), stash::slot(flow.slot))
    else {
        return 0;
    };
    let len = http::payload(frame, p);
    if len == 0 {
        return 0;
    }
    let ours = slot.key == *key;
    http::begin(flow, slot, ours);
    let mut from = 0;
    for _ in 0..http::SET_MAX {
        if !http::next_cookie(frontend.cookie, &mut from, len) {
            break;
        }
        confirm(p, flow);
    }
    http::end(flow, slot, ours);
    0
}

/// [`dispatcher_read_server_hello`]: there is a ServerHello.
const IS_HELLO: u32 = 1 << 0;
/// [`dispatcher_read_server_hello`]: of TLS 1.3.
const TLS13: u32 = 1 << 1;
/// [`dispatcher_read_server_hello`]: it accepts the client's PSK.
const PSK: u32 = 1 << 2;
/// [`dispatcher_read_server_hello`]: a ticket will follow.
const TICKET: u32 = 1 << 3;
/// [`dispatcher_read_server_hello`]: it is a HelloRetryRequest.
const RETRY: u32 = 1 << 4;
/// [`dispatcher_read_server_hello`]: another message follows in the same record.
const OPEN: u32 = 1 << 5;

/// Reads a ServerHello in the scratch payload, its session ID goes to the scratch key. One word: the flags
/// above, from bit 8 the length of the session ID, from bit 16 where the hello ends.
///
/// Exported, so that the verifier checks it once and not for every way that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_read_server_hello(len: u32) -> u32 {
    let (Ok(scratch), Ok(own)) = (scratch(), scratch()) else { return 0 };
    let len = opaque(len as u64) as usize & (PAYLOAD - 1);
    let bytes = Buffer { bytes: &scratch.payload, len, salt: scratch.salt };
    let Some(hello) = tls::server_hello(&bytes, &mut own.session_key.id) else { return 0 };
    let flag = |set: bool, flag| if set { flag } else { 0 };
    IS_HELLO
        | flag(hello.tls13, TLS13)
        | flag(hello.psk, PSK)
        | flag(hello.ticket, TICKET)
        | flag(hello.retry, RETRY)
        | flag(hello.open, OPEN)
        | (hello.id_len as u32) << 8
        | (hello.end as u32) << 16
}

/// What a ServerHello says of the identifiers that the client came with, or gives it.
#[inline(never)]
fn learn_hello(p: &Parsed, flow: &Flow, hello: u32) -> u32 {
    let (tls13, psk, id_len) = (hello & TLS13 != 0, hello & PSK != 0, (hello >> 8) as u8 & 0x3f);
    let (Ok(scratch), Ok(key), Ok(slot)) = (scratch(), client_key(flow, p), stash::slot(flow.slot)) else {
        return 0;
    };
    // The slot may be another connection's by now; then nothing is known of the client's hello.
    let offer = if slot.key == *key { slot.offer.flags } else { 0 };
    let accepted = if tls13 {
        psk
    } else {
        // A server that accepts a ticket repeats the session ID that came with it (RFC 5077 section 3.4).
        id_len != 0 && id_len == slot.offer.id_len && equal(&scratch.session_key.id, &slot.offer.id)
    };
    let offered = if tls13 { OFFER_PSK } else { OFFER_TICKET };
    if offer & offered != 0 {
        resumption(p, flow, slot, accepted);
        if accepted {
            return 0;
        }
    }
    if id_len == 0 {
        return 0;
    }
    scratch.session_key.kind = KIND_TLS_SESSION_ID;
    scratch.session_key.len = id_len;
    if !tls13 {
        return confirm(p, flow);
    }
    if offer & (OFFER_PSK | OFFER_TICKET) == 0
        && let Ok(frontend) = services::frontend(flow.frontend as u32)
    {
        // The client made the ID up for middleboxes (RFC 8446 appendix D.4): it will never return.
        scratch.session_key.service = frontend.service;
        sessions::forget_provisional(&scratch.session_key);
    }
    0
}

/// A server accepted a ticket or not: whose is the key that sealed it?
#[inline(always)]
fn resumption(p: &Parsed, flow: &Flow, slot: &Slot, accepted: bool) {
    if slot.session.kind != KIND_TICKET_NAME || slot.session.len == 0 {
        return;
    }
    let (Ok(scratch), Some(backend)) = (scratch(), services::endpoint(flow.backend, p.is_v4())) else {
        return;
    };
    if accepted {
        // Where tickets carry no name, their first bytes say nothing about other tickets.
        if backend.ticket >= TICKET_NAMED {
            scratch.session_key.kind = slot.session.kind;
            scratch.session_key.len = slot.session.len;
            identify::words(&slot.session.id, &mut scratch.session_key.id);
            confirm(p, flow);
        }
    } else if flow.marks & MARK_HIT != 0 {
        tell(EVENT_REJECTED, flow, &p.key, &slot.session);
    }
}

/// A ticket that a server issues in clear, at an offset of the scratch payload.
#[inline(never)]
fn learn_ticket(p: &Parsed, flow: &Flow, at: u32) -> u32 {
    let Ok(scratch) = scratch() else { return 0 };
    let Some(backend) = services::endpoint(flow.backend, p.is_v4()) else { return 0 };
    let at = opaque(at as u64) as usize & (PAYLOAD - 1);
    if at > PAYLOAD - TICKET_HEAD {
        return 0;
    }
    for i in 0..TICKET_HEAD {
        // SAFETY: `at + i` is below the size of `payload`.
        scratch.ticket[i] = unsafe { *scratch.payload.as_ptr().add(at + i) };
    }
    scratch.ticket_len = TICKET_HEAD as u32;
    if backend.ticket < TICKET_NAMED {
        identify::set_ticket(scratch);
    } else if !identify::set_name(scratch, (backend.ticket - TICKET_NAMED) as usize) {
        return 0;
    }
    confirm(p, flow)
}

/// The identifier in the scratch key is the backend's.
#[inline(never)]
fn confirm(p: &Parsed, flow: &Flow) -> u32 {
    let (Ok(scratch), Ok(frontend)) = (scratch(), services::frontend(flow.frontend as u32)) else { return 0 };
    let Some(backend) = services::endpoint(flow.backend, p.is_v4()) else { return 0 };
    let key = &mut scratch.session_key;
    key.service = frontend.service;
    key.pad[0] = 0;
    key.pad[1] = 0;
    if sessions::confirm(key, &mut scratch.session, backend.id, frontend) {
        counters::backend(flow.backend, |stats| stats.learned += 1);
        tell(EVENT_LEARNED, flow, &p.key, key);
    }
    0
}

/// Tells the daemon of a flow; whether the ring has room does not matter.
#[inline(never)]
fn tell(kind: u16, flow: &Flow, key: &FlowKey, session: &SessionKey) -> bool {
    events::tell(kind, 0, flow.frontend as u32, flow.backend, flow.slot, (key, session))
}

/// Compares two session IDs without a branch a word.
#[inline(always)]
fn equal(a: &[u8; ID_MAX], b: &[u8; ID_MAX]) -> bool {
    // SAFETY: 32 bytes each; BPF on the platforms that run XDP needs no alignment.
    let (a, b) = unsafe { (&*a.as_ptr().cast::<[u32; 8]>(), &*b.as_ptr().cast::<[u32; 8]>()) };
    let mut differs = 0;
    for i in 0..8 {
        differs |= a[i] ^ b[i];
    }
    differs == 0
}

/// Ends both entries of a flow: the next SYN begins a new one.
#[inline(always)]
pub fn end(flow: &mut Flow, proto: u32) {
    flow.flags |= FLAG_RST;
    if let Some(peer) = flows::peer(flow, proto) {
        peer.flags |= FLAG_RST;
    }
}
