//! UDP services that know connections by their QUIC connection IDs: a client's datagram goes to the backend
//! that its destination ID names or that gave it, from whatever address it comes.
//!
//! Only servers teach: an ID is theirs that they sent as the source ID of a long header, and it is noted as a
//! session once the client uses it, so that datagrams with false sources fill no table. What a client sends
//! decides about its own packet alone, and about which backend the flow entry remembers for the same ID:
//! where packets with an ID that nobody knows go (`Flow::slot`) was decided when the flow began.

use aya_ebpf::bindings::xdp_md;
use dispatcher_common::{
    event::EVENT_LEARNED,
    flow::{CLASS_BIT, FLAG_L4, FLAG_LEARN, FLAG_QUIC, FLAG_TO_BACKEND, Flow, MARK_HIT},
    opaque::opaque,
    quic::{self, CID_MAX, Cid, Form, HEAD_MAX},
    reason::Reason,
    service::Frontend,
    session::{ID_MAX, KIND_QUIC_CID, KIND_QUIC_SERVER},
};

use crate::{
    bind::{self, ANY, Opening},
    control, counters, events, flows,
    globals::{Buffer, PAYLOAD, Scratch, now, scratch},
    packet::{Frame, Udp, View},
    parse::{Parsed, packet_end},
    qos, rewrite, services, sessions, stash,
    verdict::Verdict,
};

const UDP: usize = size_of::<Udp>();
/// Lengths of connection IDs that are tried for one short header.
const LENGTHS_MAX: u32 = 4;
/// Bits of the lengths that are too short for the tag in flow entries, see [`strange`].
const LENGTHS_SHORT: u32 = 0xf;
/// Short headers of a server after which no long header is waited for.
const PATIENCE: u32 = 16;

/// Not zero when a datagram to a backend may belong to another connection than the flow's last one: a long
/// header, or another connection ID.
#[inline(always)]
pub fn strange(view: View, l4: usize, flow: &Flow) -> u32 {
    let (Some(first), Some(tag)) = (view.read::<u8>(l4 + UDP), view.read::<u32>(l4 + UDP + 1)) else {
        return 1;
    };
    (first & 0x80) as u32 | (tag ^ flow.seq_add)
}

/// True for a service whose connections are known by connection IDs.
#[inline(always)]
pub fn serves(frontend: &Frontend) -> bool {
    frontend.affinity[0] == KIND_QUIC_CID
}

/// A client's datagram that has no flow, or another connection ID than the last one of its flow.
#[inline(never)]
pub fn bind(frame: &Frame, p: &Parsed, index: u32, frontend: &Frontend) -> Verdict {
    let head = &scratch()?.quic;
    if head.form as u32 == Form::Bad as u32 {
        return Verdict(Reason::BadQuic);
    }
    let long = head.form as u32 != Form::Short as u32;
    scratch()?.class = 0;
    let known = dispatcher_find_cid(index);
    let old = flows::get(&p.key).filter(|flow| flow.flags & FLAG_QUIC != 0);
    let followed = old.is_some();
    let mut home = match &old {
        Some(flow) => flow.slot,
        None => ANY,
    };
    let mut backend = known;
    if backend == ANY {
        if services::endpoint_up(home, p.is_v4()).is_none() {
            home = services::pick(frontend, hash(p)?, p.is_v4(), ANY)?;
        }
        backend = home;
    }
    if home == ANY {
        home = backend;
    }
    let hit = known != ANY;
    let tag = tag(frame, p);
    if let Some(flow) = old
        && flow.backend == backend
    {
        flow.seq_add = tag;
        if frontend.cid_lengths & LENGTHS_SHORT != 0 {
            flow.flags &= !FLAG_QUIC;
        }
        if long
            && !hit
            && let Some(peer) = flows::peer(flow, p.key.proto)
        {
            // Another connection of the same addresses and ports: its server will tell its ID.
            peer.flags |= FLAG_LEARN;
            peer.ts_add = 0;
        }
        return control::forward(frame, p, flow, rewrite::direction(flow));
    }
    let class = qos::class(index);
    // A connection ID that is known, or a flow that changes its backend, is no new connection.
    if !hit && !followed && !qos::connects(backend, class, false) {
        return Verdict(Reason::OverConnections);
    }
    let opening = Opening {
        frontend: index,
        backend,
        flags: FLAG_L4,
        marks: (class << CLASS_BIT) as u8 | if hit { MARK_HIT } else { 0 },
        slot: home,
        isn: tag,
        cookie: 0,
        client: 0,
    };
    let client = stash::client_link(frame, p);
    bind::open(&p.key, &client, &opening)?;
    let scratch = scratch()?;
    if frontend.cid_lengths & LENGTHS_SHORT == 0 {
        scratch.forward.flags |= FLAG_QUIC;
    }
    scratch.backward.tries = 0;
    if long {
        scratch.backward.flags |= FLAG_LEARN;
    }
    bind::install(&p.key, frontend)?;
    counters::backend(backend, |stats| {
        stats.connections += 1;
        if hit {
            stats.hits += 1;
        } else {
            stats.nonsecure += 1;
        }
    });
    let flow = flows::get(&p.key).ok_or(Reason::FlowTable)?;
    control::forward(frame, p, flow, if hit { Reason::BoundHit } else { Reason::BoundL4 })
}

/// A server's datagram while its connection ID is waited for.
#[inline(never)]
pub fn answer(frame: &Frame, p: &Parsed, flow: &mut Flow) -> Verdict {
    note(flow);
    control::forward(frame, p, flow, rewrite::direction(flow))
}

/// Notes the connection ID that a server gives, until the client uses it.
#[inline(never)]
fn note(flow: &mut Flow) -> bool {
    let (Ok(scratch), Ok(frontend)) = (scratch(), services::frontend(flow.frontend as u32)) else {
        return false;
    };
    let form = scratch.quic.form as u32;
    let scid = scratch.quic.scid;
    if form == Form::Short as u32 {
        flow.ts_add = flow.ts_add.wrapping_add(1);
        if flow.tries != 0 || flow.ts_add > PATIENCE {
            flow.flags &= !FLAG_LEARN;
        }
    } else if form == Form::Long as u32 && scratch.quic.version != 0 {
        // Version Negotiation repeats what the client sent.
        if scid.len == 0 {
            flow.flags &= !FLAG_LEARN;
            frontend.cid_lengths |= 1;
            return true;
        }
        set_key(scratch, KIND_QUIC_CID, scid);
        let words = words(&scratch.session_key.id);
        flow.set_given_cid(scid.len as u8, words);
    }
    true
}

/// Reads the first header of a datagram into scratch memory.
#[inline(always)]
pub fn read(frame: &Frame, p: &Parsed) -> Result<(), Reason> {
    let (view, at) = (frame.view(), p.l4());
    let udp = view.ptr::<Udp>(at).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let len = u16::from_be(unsafe { (*udp).len }) as usize;
    let end = packet_end(view, p).ok_or(Reason::BadTransport)?;
    if len < UDP || at + len > end {
        return Err(Reason::BadTransport);
    }
    // SAFETY: the frame's own context.
    if unsafe { dispatcher_read_quic(frame.ctx(), (at + UDP) as u32, (len - UDP) as u32) } == 0 {
        return Err(Reason::BadTransport);
    }
    Ok(())
}

/// Reads the first header of a datagram of `len` bytes at `at` into `Scratch::quic`, its bytes into
/// `Scratch::payload`. Returns 1, or 0 when the frame does not hold them.
///
/// Exported, so that the verifier checks it once, for any arguments.
///
/// # Safety
///
/// `ctx` is the context of the running program.
#[unsafe(no_mangle)]
#[inline(never)]
unsafe extern "C" fn dispatcher_read_quic(ctx: *mut xdp_md, at: u32, len: u32) -> u32 {
    let (Ok(scratch), Ok(own)) = (scratch(), scratch()) else { return 0 };
    let total = len as usize;
    let some = opaque(if total > HEAD_MAX { HEAD_MAX as u64 } else { total as u64 }) as usize & 0x3f;
    if some != 0 && !Frame::of(ctx).load(at as usize, scratch.payload.as_mut_ptr(), some) {
        return 0;
    }
    let bytes = Buffer { bytes: &scratch.payload, len: some, salt: scratch.salt };
    own.quic = quic::head(&bytes, total);
    1
}

/// The backend of the destination connection ID in scratch memory, or [`ANY`]: the one whose server ID is in
/// it, the one to which it is known to belong, or the one that gave it on the packet's flow.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn dispatcher_find_cid(index: u32) -> u32 {
    let (Ok(scratch), Ok(frontend)) = (scratch(), services::frontend(index)) else { return ANY };
    let (form, dcid) = (scratch.quic.form as u32, scratch.quic.dcid);
    if dcid.len == 0 {
        return ANY;
    }
    scratch.session_key.service = frontend.service;
    let first = scratch.payload[dcid.at as usize & (PAYLOAD - 1)];
    let len = quic::server_id_len(first, dcid.len as usize, &frontend.quic_lb);
    if len != 0 {
        set_key(scratch, KIND_QUIC_SERVER, Cid { at: dcid.at, len: len as u32 + 1 });
        scratch.session_key.id[0] = quic::config_id(first);
        let found = usable(scratch, frontend);
        if found != ANY {
            return found;
        }
    }
    if form == Form::Long as u32 {
        set_key(scratch, KIND_QUIC_CID, dcid);
        let found = usable(scratch, frontend);
        return if found != ANY { found } else { given(scratch, frontend) };
    }
    let mut tries = 0;
    for len in 1..=CID_MAX as u32 {
        if frontend.cid_lengths >> len & 1 == 0 {
            continue;
        }
        if len > dcid.len || tries == LENGTHS_MAX {
            break;
        }
        tries += 1;
        set_key(scratch, KIND_QUIC_CID, Cid { at: dcid.at, len });
        let found = usable(scratch, frontend);
        if found != ANY {
            return found;
        }
    }
    given(scratch, frontend)
}

/// The backend of the scratch key, if it can be reached.
#[inline(never)]
fn usable(scratch: &mut Scratch, frontend: &Frontend) -> u32 {
    let now = now();
    let Some(session) = sessions::get(&scratch.session_key, now) else { return ANY };
    let Some(backend) = services::backend_of_id(session.backends[0]) else { return ANY };
    if services::endpoint_up(backend, scratch.packet.is_v4()).is_none() {
        return ANY;
    }
    sessions::touch(scratch.session_key.kind, session, frontend, now);
    scratch.class = session.class as u32;
    backend
}

/// The backend of the packet's flow, if the packet has the connection ID that the server gave. Then it has
/// reached the client, and is noted for other flows.
#[inline(always)]
fn given(scratch: &mut Scratch, frontend: &mut Frontend) -> u32 {
    let Some(flow) = flows::get(&scratch.packet.key) else { return ANY };
    if flow.flags & FLAG_TO_BACKEND == 0 {
        return ANY;
    }
    let Some(peer) = flows::peer(flow, scratch.packet.key.proto) else { return ANY };
    let (len, dcid) = (peer.tries as u32, scratch.quic.dcid);
    let long = scratch.quic.form as u32 == Form::Long as u32;
    if len == 0 || len > dcid.len || (long && len != dcid.len) {
        return ANY;
    }
    let Some(backend) = services::endpoint_up(flow.backend, scratch.packet.is_v4()) else { return ANY };
    set_key(scratch, KIND_QUIC_CID, Cid { at: dcid.at, len });
    let id = words(&scratch.session_key.id);
    let given = peer.given_cid();
    let mut differs = 0;
    for i in 0..given.len() {
        differs |= id[i] ^ given[i];
    }
    if differs != 0 {
        return ANY;
    }
    frontend.cid_lengths |= 1 << (len & 31);
    if sessions::confirm(&scratch.session_key, &mut scratch.session, backend.id, frontend) {
        counters::backend(flow.backend, |stats| stats.learned += 1);
        let (index, key) = (flow.frontend as u32, &scratch.session_key);
        events::tell(EVENT_LEARNED, 0, index, flow.backend, 0, (&scratch.packet.key, key));
    }
    flow.backend
}

/// Makes the scratch key that of bytes in the scratch payload, all but the service.
#[inline(never)]
fn set_key(scratch: &mut Scratch, kind: u8, cid: Cid) -> bool {
    let at = opaque(cid.at as u64) as usize & (PAYLOAD / 2 - 1);
    let key = &mut scratch.session_key;
    key.kind = kind;
    key.len = cid.len as u8;
    key.pad[0] = 0;
    key.pad[1] = 0;
    for i in 0..ID_MAX {
        // All ones for i < len: without a branch, which the verifier would follow both ways.
        let keep = opaque(((i as i64 - cid.len as i64) >> 63) as u64) as u8;
        // SAFETY: `at + i` is below the size of `payload`.
        key.id[i] = unsafe { *scratch.payload.as_ptr().add(at + i) } & keep;
    }
    true
}

/// An identifier that is no longer than a connection ID, as words.
#[inline(always)]
fn words(id: &[u8; ID_MAX]) -> &[u32; 5] {
    // SAFETY: the 20 bytes are there; BPF on the platforms that run XDP needs no alignment.
    unsafe { &*id.as_ptr().cast::<[u32; 5]>() }
}

/// The first four bytes of the destination connection ID, or anything.
#[inline(always)]
fn tag(frame: &Frame, p: &Parsed) -> u32 {
    let Ok(scratch) = scratch() else { return 0 };
    let at = p.l4() + UDP + (scratch.quic.dcid.at as usize & 7);
    frame.view().read::<u32>(at).unwrap_or(0)
}

/// The hash by which the table picks: of the client's connection ID, so that a repeated first packet goes the
/// same way from another port; of addresses and ports where there is none, or where it is a server's that we
/// do not know.
#[inline(always)]
fn hash(p: &Parsed) -> Result<u32, Reason> {
    let scratch = scratch()?;
    if scratch.quic.form as u32 != Form::Long as u32 || scratch.quic.dcid.len == 0 {
        return Ok(stash::mix(&p.key) as u32);
    }
    let dcid = scratch.quic.dcid;
    set_key(scratch, KIND_QUIC_CID, dcid);
    let mut h = dcid.len as u64;
    for word in words(&scratch.session_key.id) {
        h = (h ^ *word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^= h >> 29;
    }
    Ok((h ^ h >> 32) as u32)
}
