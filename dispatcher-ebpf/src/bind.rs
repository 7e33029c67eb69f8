//! First data -> backend: session lookup, balancing, flow entries, and the SYN.

use dispatcher_common::{
    addr::Addr,
    event::{EVENT_BOUND, EVENT_HELD, EVENT_MISS, EVENT_REFUSED, EVENT_TURN},
    flow::{
        CLASS_BIT, FLAG_SYN_SENT, FLAG_TO_BACKEND, FLAG_VLAN, Flow, FlowKey, Link, MARK_HIT, MARK_HTTP,
        MARK_SECURE, MARKS_CLASS, is_closed, ports_of, ports_swapped,
    },
    globals::GLOBAL_NO_CLONES,
    proxy::{self, ROOM, ROOM_WORDS},
    reason::Reason,
    service::{
        FRONTEND_MISS_DAEMON, FRONTEND_OVER_HOLD, FRONTEND_OVER_RESET, FRONTEND_PROXY_V2,
        FRONTEND_SOURCE_DISPATCHER, Frontend,
    },
    session::{KIND_CLIENT, KIND_TICKET_NAME},
    stash::{MARK_TURN, STAGE_BOUND, STAGE_FILLING, STAGE_FREE, STAGE_HELD, Slot},
};

use crate::{
    counters, emit, events, flows,
    globals::{daemon_lives, exact_ns, globals, now, now_ns, scratch},
    identify,
    packet::Frame,
    qos, services, sessions, stash,
    verdict::Verdict,
};

/// SYNs to a backend that does not answer before another one is tried; clients repeat themselves
/// after 0.2, 0.6, 1.4, 3 and 6 seconds.
const TRIES_MAX: u8 = 3;
/// The same for a session's own backend, which no other can replace.
const TRIES_HIT_MAX: u8 = 5;
/// Backends given up for one connection before its client is told that there is none.
const REBINDS_MAX: u32 = 3;
/// Ports tried in the source pool for one connection.
const PORT_TRIES: u32 = 8;
/// Any backend will do.
pub const ANY: u32 = u32::MAX;

/// Binds a slot whose content is enough to decide: to `pick`, or where its session or the table
/// says. A slot that is bound already has its SYN sent again, to another backend if this one does
/// not answer; one that the daemon left alone for too long goes by the table.
#[inline(always)]
pub fn bind(frame: &Frame, slot: &mut Slot, index: u32, pick: u32) -> Verdict {
    // A flow that awaits its backend is changed by whoever has the lock of its slot.
    let earlier = stash::dispatcher_lock_earlier(index);
    if earlier == stash::NOT_LOCKED {
        return Verdict(Reason::StashBusy);
    }
    let verdict = bind_locked(frame, slot, index, pick);
    stash::dispatcher_unlock_earlier(index, earlier);
    verdict
}

/// [`bind`] of a flow that no other CPU changes.
#[inline(never)]
fn bind_locked(frame: &Frame, slot: &mut Slot, index: u32, pick: u32) -> Verdict {
    let frontend = services::frontend(slot.frontend)?;
    let mut avoid = ANY;
    if let Some(flow) = flows::get(&slot.key) {
        if flow.flags & FLAG_SYN_SENT == 0 {
            // It was answered a moment ago: what the client sends again finds it.
            return Verdict(Reason::StashBusy);
        }
        let limit = if flow.marks & MARK_HIT != 0 { TRIES_HIT_MAX } else { TRIES_MAX };
        if flow.tries < limit && services::endpoint_up(flow.backend, slot.key.src.is_v4()).is_some() {
            return repeat(frame, slot, index, flow);
        }
        avoid = flow.backend;
        slot.rebinds = slot.rebinds.wrapping_add(1);
        if slot.rebinds > REBINDS_MAX {
            flows::remove(&slot.key);
            slot.stage = STAGE_FREE;
            return Verdict(Reason::NoBackend);
        }
        counters::backend(avoid, |stats| stats.refused += 1);
        tell(EVENT_REFUSED, avoid, index, slot);
    }
    let verdict = if pick != ANY {
        slot.backend = pick;
        Verdict(Reason::Released)
    } else {
        choose(slot, index, frontend, avoid)
    };
    if verdict.is_drop() || verdict.is(Reason::Held) {
        return verdict;
    }
    // What another backend could not be given was admitted before, and a released one in the daemon's order.
    if avoid == ANY && !qos::connects(slot.backend, slot.marks >> CLASS_BIT & 15, pick != ANY) {
        return over(slot, frontend);
    }
    let hit = verdict.is(Reason::BoundHit);
    open_slot(slot, index, hit)?;
    install(&slot.key, frontend)?;
    take_over(slot, frontend)?;
    let secure = slot.marks & MARK_SECURE as u32 != 0;
    let known = slot.session.len != 0;
    if avoid != ANY {
        // Counted where it was bound first.
        send_syn(frame, slot, index)?;
        return verdict;
    }
    counters::backend(slot.backend, |stats| {
        stats.connections += 1;
        if hit {
            stats.hits += 1;
        } else if !secure {
            stats.nonsecure += 1;
        } else if known {
            stats.misses += 1;
        } else {
            stats.fresh += 1;
        }
    });
    send_syn(frame, slot, index)?;
    trace(slot, verdict)?;
    verdict
}

/// What becomes of a connection over its backend's rate: the daemon's queue, RST (which `pipeline` sends), or another
/// try when the client repeats itself.
#[inline(always)]
fn over(slot: &mut Slot, frontend: &Frontend) -> Verdict {
    if slot.stage == STAGE_FILLING
        && frontend.flags & FRONTEND_MISS_DAEMON != 0
        && frontend.flags & FRONTEND_OVER_HOLD != 0
        && daemon_lives(globals()?)
    {
        slot.stage = STAGE_HELD;
        slot.marks |= MARK_TURN;
        return Verdict(Reason::Held);
    }
    slot.stage = if frontend.flags & FRONTEND_OVER_RESET != 0 { STAGE_FREE } else { STAGE_FILLING };
    Verdict(Reason::OverConnections)
}

/// Tells the daemon of a bound connection, where it wants to know of this one.
#[inline(always)]
fn trace(slot: &Slot, verdict: Verdict) -> Result<(), Reason> {
    let one_in = globals()?.trace;
    if one_in != 0 && slot.cookie.is_multiple_of(one_in) {
        tell(EVENT_BOUND, slot.backend, verdict.0 as u32, slot);
    }
    Ok(())
}

/// Sends the slot's SYN: in this frame if it has the room, else in a clone.
#[inline(always)]
fn send_syn(frame: &Frame, slot: &mut Slot, index: u32) -> Result<(), Reason> {
    slot.stage = STAGE_BOUND;
    slot.sent = exact_ns();
    match emit::syn(frame, slot) {
        Ok(()) => {
            frame.redirect(slot.link.ifindex);
            Ok(())
        }
        Err(reason) => {
            if globals()?.flags & GLOBAL_NO_CLONES != 0 {
                return Err(reason);
            }
            let endpoint = services::endpoint(slot.backend, slot.key.src.is_v4()).ok_or(Reason::NoBackend)?;
            emit::replay(frame, slot, index, endpoint.replay as u32)
        }
    }
}

/// The same backend once more: the slot may be a new one, so everything comes from the flow.
#[inline(never)]
fn repeat(frame: &Frame, slot: &mut Slot, index: u32, flow: &mut Flow) -> Verdict {
    let frontend = services::frontend(slot.frontend)?;
    flow.tries = flow.tries.wrapping_add(1);
    flow.slot = index;
    slot.backend = flow.backend;
    flow.src().store(&mut slot.src.words);
    flow.dst().store(&mut slot.dst.words);
    slot.ports = flow.ports;
    slot.link = flow.link();
    if let Some(peer) = flows::peer(flow, slot.key.proto) {
        peer.slot = index;
        peer.seq_add = slot.cookie;
    }
    flow.seq_add = slot.isn;
    proxy_header(slot, frontend);
    send_syn(frame, slot, index)?;
    Verdict(Reason::SynRepeated)
}

/// Decides on a backend: the session's, or the daemon's later, or the table's.
#[inline(never)]
fn choose(slot: &mut Slot, index: u32, frontend: &Frontend, avoid: u32) -> Verdict {
    let v4 = slot.key.src.is_v4();
    let secure = slot.marks & MARK_SECURE as u32 != 0;
    slot.session.len = 0;
    let found = scratch()?;
    found.class = 0;
    found.client_hello.server_name.len = 0;
    if slot.marks & MARK_HTTP as u32 == 0 {
        slot.offer.flags = 0;
        if secure {
            identify::read(index);
        }
    }
    let mut backend = identify::find(index, avoid, secure);
    classify(slot);
    let mut reason = Reason::BoundHit;
    if backend == ANY {
        let hash = (stash::mix(&slot.key) >> 16) as u32 ^ slot.isn;
        backend = services::pick(frontend, hash, v4, avoid)?;
        if slot.stage == STAGE_FILLING
            && frontend.flags & FRONTEND_MISS_DAEMON != 0
            && daemon_lives(globals()?)
        {
            slot.backend = backend;
            slot.stage = STAGE_HELD;
            return Verdict(Reason::Held);
        }
        reason = if !secure {
            Reason::BoundNonsecure
        } else if slot.session.len != 0 {
            Reason::BoundMiss
        } else {
            Reason::BoundFresh
        };
    }
    slot.backend = backend;
    let scratch = scratch()?;
    let first_known = matches!(reason, Reason::BoundHit) && scratch.session_key.kind == slot.session.kind;
    // A key's name is one for many clients: only a server's acceptance says whose it is.
    if slot.session.len != 0 && !first_known && slot.session.kind != KIND_TICKET_NAME {
        let id = services::endpoint(backend, v4).ok_or(Reason::NoBackend)?.id;
        match sessions::add(&slot.session, &mut scratch.session, id, frontend) {
            // Another first request with this identifier was faster: follow it.
            Some(winner) => {
                let other = identify::reachable(winner, slot, avoid);
                if other == ANY {
                    // Its backend is gone, and nobody has vouched for it.
                    sessions::replace(&slot.session, &scratch.session);
                } else if !matches!(reason, Reason::BoundHit) {
                    slot.backend = other;
                    reason = Reason::BoundHit;
                    identify::note_class(winner);
                    classify(slot);
                }
            }
            None => {
                tell(EVENT_MISS, backend, index, slot);
            }
        }
    }
    if slot.session.kind != KIND_CLIENT && slot.session.len != 0 {
        follow_client(slot, frontend);
    }
    Verdict(reason)
}

/// Notes the class of the slot's connection beside its marks.
#[inline(always)]
fn classify(slot: &mut Slot) {
    let class = qos::class(slot.frontend);
    slot.marks = slot.marks & !(MARKS_CLASS as u32 | MARK_TURN) | class << CLASS_BIT;
}

/// The client's next connection may come without this one's identifier: a service that knows clients by
/// their addresses notes the address too.
#[inline(never)]
fn follow_client(slot: &Slot, frontend: &Frontend) -> bool {
    let mut follows = false;
    for i in 0..frontend.affinity.len() {
        follows |= frontend.affinity[i] == KIND_CLIENT;
    }
    if !follows {
        return false;
    }
    let (Ok(scratch), Some(backend)) = (scratch(), services::endpoint(slot.backend, slot.key.src.is_v4()))
    else {
        return false;
    };
    identify::client_key(slot, &mut scratch.session_key);
    scratch.session_key.service = frontend.service;
    if let Some(entry) = sessions::add(&scratch.session_key, &mut scratch.session, backend.id, frontend) {
        entry.backends[0] = backend.id;
        sessions::touch(KIND_CLIENT, entry, frontend, now());
    }
    true
}

/// Asks the daemon for a backend for a held slot; false when the ring is full.
#[inline(always)]
pub fn ask(index: u32, slot: &Slot) -> bool {
    let kind = if slot.marks & MARK_TURN != 0 { EVENT_TURN } else { EVENT_HELD };
    tell(kind, slot.backend, index, slot)
}

/// Tells the daemon of a slot; false when the ring is full.
#[inline(never)]
fn tell(kind: u16, backend: u32, index: u32, slot: &Slot) -> bool {
    events::tell(kind, qos::id_of(slot), slot.frontend, backend, index, (&slot.key, &slot.session))
}

/// Prepares the slot's flow entries.
#[inline(always)]
fn open_slot(slot: &Slot, index: u32, hit: bool) -> Result<(), Reason> {
    let hit = if hit { MARK_HIT } else { 0 };
    let opening = Opening {
        frontend: slot.frontend,
        backend: slot.backend,
        flags: FLAG_SYN_SENT,
        marks: slot.marks as u8 & (MARK_SECURE | MARK_HTTP | MARKS_CLASS) | hit,
        slot: index,
        isn: slot.isn,
        cookie: slot.cookie,
        client: u32::from_ne_bytes([slot.wscale, slot.sack, slot.ts, 0]),
    };
    open(&slot.key, &slot.client, &opening)
}

/// Gives the slot what its frames to the backend need.
#[inline(always)]
fn take_over(slot: &mut Slot, frontend: &Frontend) -> Result<(), Reason> {
    let scratch = scratch()?;
    let flow = &scratch.forward;
    flow.src().store(&mut slot.src.words);
    flow.dst().store(&mut slot.dst.words);
    slot.ports = flow.ports;
    slot.link = flow.link();
    proxy_header(slot, frontend);
    Ok(())
}

#[inline(always)]
fn proxy_header(slot: &mut Slot, frontend: &Frontend) {
    slot.start = ROOM as u32;
    if frontend.flags & FRONTEND_PROXY_V2 != 0 {
        let room = slot.buf.as_mut_ptr().cast::<[u32; ROOM_WORDS]>();
        // SAFETY: `buf` begins with ROOM bytes, at an offset of the slot that is a multiple of 64.
        slot.start = ROOM as u32 - proxy::write(&slot.key, unsafe { &mut *room });
    }
}

/// What makes two flow entries, beside the client's packet.
pub struct Opening {
    /// Index of the frontend.
    pub frontend: u32,
    /// Backend index.
    pub backend: u32,
    /// `FLAG_*` of both entries.
    pub flags: u16,
    /// `MARK_*` of both entries.
    pub marks: u8,
    /// Stash slot.
    pub slot: u32,
    /// The client's initial sequence number; waits in the forward entry's `seq_add` for the SYN-ACK.
    pub isn: u32,
    /// Ours; waits in the backward entry's `seq_add`.
    pub cookie: u32,
    /// What the client agreed to (window scale, SACK, timestamps); waits in the forward entry's `ts_add`.
    pub client: u32,
}

/// Prepares both flow entries of a connection in scratch memory, for [`install`].
#[inline(never)]
pub fn open(key: &FlowKey, client: &Link, opening: &Opening) -> Result<(), Reason> {
    let scratch = scratch()?;
    let v4 = key.src.is_v4();
    let backend = services::endpoint_up(opening.backend, v4).ok_or(Reason::NoBackend)?;
    let tags = client.vlans[0] | backend.link.vlans[0];
    let flags = opening.flags | if tags != 0 { FLAG_VLAN } else { 0 };
    let now = now();
    let generation = globals()?.generation as u16;
    let (client_port, _) = ports_of(key.ports);

    for flow in [&mut scratch.forward, &mut scratch.backward] {
        flow.generation = generation;
        flow.flags = flags;
        flow.tries = 1;
        flow.marks = opening.marks;
        flow.frontend = opening.frontend as u16;
        flow.backend = opening.backend;
        flow.slot = opening.slot;
        flow.created = now;
    }
    let forward = &mut scratch.forward;
    forward.flags |= FLAG_TO_BACKEND;
    forward.set_link(&backend.link);
    forward.set_src(&key.src);
    forward.set_dst(&backend.addr);
    forward.ports = join(client_port.to_be(), backend.port);
    forward.seq_add = opening.isn;
    forward.ts_add = opening.client;
    let backward = &mut scratch.backward;
    backward.set_link(client);
    backward.set_src(&key.dst);
    backward.set_dst(&key.src);
    backward.ports = ports_swapped(key.ports);
    backward.seq_add = opening.cookie;
    backward.ts_add = 0;
    Ok(())
}

/// Writes the entries that [`open`] prepared, with a source of the pool if the service wants one.
#[inline(never)]
pub fn install(key: &FlowKey, frontend: &Frontend) -> Result<(), Reason> {
    let scratch = scratch()?;
    if frontend.flags & FRONTEND_SOURCE_DISPATCHER != 0 {
        from_pool(key, frontend, scratch.backward.backend)?;
    } else {
        flows::set_peer_key(&scratch.forward, key.proto, &mut scratch.backward_key);
        flows::put(&scratch.backward_key, &scratch.backward)?;
    }
    flows::put(key, &scratch.forward)
}

/// Finds a free source address and port, and takes it with the backward entry.
#[inline(always)]
fn from_pool(key: &FlowKey, frontend: &Frontend, backend: u32) -> Result<(), Reason> {
    let scratch = scratch()?;
    let backend = services::endpoint(backend, key.src.is_v4()).ok_or(Reason::NoBackend)?;
    let range = (frontend.port_max as u32).wrapping_sub(frontend.port_min as u32).wrapping_add(1) & 0x1ffff;
    if range == 0 {
        return Err(Reason::NoSourcePort);
    }
    // Starts anywhere, so that a port rests before it is used again.
    let mut hash = (stash::mix(key) as u32).wrapping_add(now_ns() as u32);
    for _ in 0..PORT_TRIES {
        let Some(addr) = services::source(frontend, hash) else { return Err(Reason::NoSourcePort) };
        let port = frontend.port_min.wrapping_add(((hash >> 8) % range) as u16);
        set_source(&mut scratch.forward, addr, port, backend.port);
        flows::set_peer_key(&scratch.forward, key.proto, &mut scratch.backward_key);
        if flows::add(&scratch.backward_key, &scratch.backward) {
            return Ok(());
        }
        if let Some(old) = flows::get(&scratch.backward_key)
            && is_closed(old.flags)
        {
            return flows::put(&scratch.backward_key, &scratch.backward);
        }
        hash = hash.wrapping_mul(0x9e37_79b1).wrapping_add(0x85eb_ca6b);
    }
    Err(Reason::NoSourcePort)
}

#[inline(always)]
fn set_source(forward: &mut Flow, addr: &Addr, port: u16, backend_port: u16) {
    forward.set_src(addr);
    forward.ports = join(port.to_be(), backend_port);
}

/// A ports word of two ports as on the wire.
#[inline(always)]
fn join(src: u16, dst: u16) -> u32 {
    let (s, d) = (src.to_ne_bytes(), dst.to_ne_bytes());
    u32::from_ne_bytes([s[0], s[1], d[0], d[1]])
}
