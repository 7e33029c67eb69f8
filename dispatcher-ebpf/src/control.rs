//! Packets of known flows that are not plain data: handshake, SYN, FIN, RST, tags, a ServerHello.

use dispatcher_common::{
    abi::{STAGE_ANSWER, STAGE_DATAGRAM, STAGE_FIRST_DATA},
    flow::{
        FLAG_FIN, FLAG_FIN_PEER, FLAG_L4, FLAG_LEARN, FLAG_QUIC, FLAG_RESYN, FLAG_SYN_SENT, FLAG_TO_BACKEND,
        Flow, MARK_HTTP, is_closed, ports_of,
    },
    globals::GLOBAL_QOS,
    reason::Reason,
    service::BACKEND_DEAD,
    tcp::{ACK, FIN, RST, SYN},
};

use crate::{
    answer, flows,
    globals::globals,
    http, icmp,
    packet::{Frame, Tcp},
    parse::{Parsed, packet_end},
    pipeline, qos, quic, reply,
    rewrite::{self, leave},
    services,
    verdict::Verdict,
};

/// What [`handle`] says of a packet that is to be treated as if it had no flow; never counted.
pub const AS_NEW: Reason = Reason::NoService;

/// Handles a packet that the fast path leaves.
#[inline(never)]
pub fn handle(frame: &Frame, p: &Parsed, flow: &mut Flow) -> Verdict {
    let to_backend = flow.flags & FLAG_TO_BACKEND != 0;
    if pipeline::hops(frame.view(), p) <= 1 {
        // In our own name: the VIP's, whichever side is told.
        let vip = if to_backend { p.key.dst } else { flow.src() };
        return icmp::time_exceeded(frame, p, &vip);
    }
    if to_backend && !refresh(p, flow)? && flow.flags & FLAG_SYN_SENT == 0 {
        flows::remove(&flows::peer_key(flow, p.key.proto));
        flows::remove(&p.key);
        return over(frame, p);
    }
    if !p.is_tcp() {
        // The connection ID of a packet that is not plain may be the usual one.
        let strange = flow.flags & FLAG_QUIC != 0 && quic::strange(frame.view(), p.l4(), flow) != 0;
        if strange || flow.flags & FLAG_LEARN != 0 {
            return pipeline::stage(STAGE_DATAGRAM);
        }
        return forward(frame, p, flow, rewrite::direction(flow));
    }
    let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let flags = unsafe { (*tcp).flags };
    if !to_backend {
        // The handshake with a backend, and the ServerHello, have a program of their own.
        let answers = flags & (SYN | ACK) == SYN | ACK && flow.flags & FLAG_L4 == 0;
        let learns =
            flow.flags & FLAG_LEARN != 0 && (flow.marks & MARK_HTTP == 0 || http::may_set(frame, p, flow));
        if answers || learns || flow.flags & FLAG_SYN_SENT != 0 {
            return pipeline::stage(STAGE_ANSWER);
        }
        if flow.flags & FLAG_RESYN != 0 {
            if flags & RST != 0 {
                answer::end(flow, p.key.proto);
                return Verdict(Reason::StaleFlow);
            }
            flow.flags &= !FLAG_RESYN;
            if let Some(peer) = flows::peer(flow, p.key.proto) {
                peer.flags &= !FLAG_RESYN;
            }
        }
        return conclude(frame, p, flow, flags);
    }
    if flow.flags & FLAG_SYN_SENT != 0 {
        return waiting(frame, p, flow, flags);
    }
    if flags & (SYN | ACK) == SYN {
        if is_closed(flow.flags) {
            // The same addresses and ports again, after the end of the old connection: the ACK that
            // will follow must find no flow.
            flows::remove(&p.key);
            return Verdict(AS_NEW);
        }
        if flow.flags & FLAG_L4 == 0 {
            // On a living flow only the backend can say whether it lives: it answers with a
            // challenge ACK (RFC 5961 section 4.2), or does not know the flow any more.
            flow.flags |= FLAG_RESYN;
            if let Some(peer) = flows::peer(flow, p.key.proto) {
                peer.flags |= FLAG_RESYN;
            }
        }
    }
    conclude(frame, p, flow, flags)
}

/// A client's packet of a connection that is over.
#[inline(always)]
fn over(frame: &Frame, p: &Parsed) -> Verdict {
    if p.is_tcp() {
        let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        if unsafe { (*tcp).flags } & (SYN | RST) == 0 {
            reply::reset(frame, p)?;
            return Verdict(Reason::ResetClient);
        }
    }
    Verdict(AS_NEW)
}

/// Notes the end of a flow, translates and sends on.
#[inline(always)]
pub fn conclude(frame: &Frame, p: &Parsed, flow: &mut Flow, flags: u8) -> Verdict {
    let mut reason = rewrite::direction(flow);
    if flags & (SYN | FIN | RST) != 0 {
        reason = Reason::Control;
        if flags & RST != 0 {
            answer::end(flow, p.key.proto);
        } else if flags & FIN != 0 {
            flow.flags |= FLAG_FIN;
            if let Some(peer) = flows::peer(flow, p.key.proto) {
                peer.flags |= FLAG_FIN_PEER;
            }
        }
    }
    forward(frame, p, flow, reason)
}

/// The backend's neighbour may have changed since the flow was last used. False when the backend is dead, or
/// was removed.
#[inline(always)]
fn refresh(p: &Parsed, flow: &mut Flow) -> Result<bool, Reason> {
    let generation = globals()?.generation;
    if flow.generation == generation as u16 {
        return Ok(true);
    }
    let backend = services::endpoint(flow.backend, p.is_v4()).ok_or(Reason::Internal)?;
    if backend.flags & BACKEND_DEAD != 0 || backend.addr != flow.dst() || backend.port != flow_port(flow) {
        return Ok(false);
    }
    if backend.link.ifindex != 0 {
        flow.set_link(&backend.link);
    }
    flow.generation = generation as u16;
    Ok(true)
}

/// The backend's port, as on the wire.
#[inline(always)]
fn flow_port(flow: &Flow) -> u16 {
    ports_of(flow.ports).1.to_be()
}

/// A client's packet while the backend has not answered.
#[inline(always)]
fn waiting(frame: &Frame, p: &Parsed, flow: &mut Flow, flags: u8) -> Verdict {
    if flags & RST != 0 {
        answer::end(flow, p.key.proto);
        flow.flags &= !FLAG_SYN_SENT;
        return Verdict(Reason::ResetIgnored);
    }
    if flags & SYN != 0 {
        return Verdict(AS_NEW);
    }
    if has_payload(frame, p) {
        return pipeline::stage(STAGE_FIRST_DATA);
    }
    Verdict(Reason::WaitingBackend)
}

/// True when a TCP packet carries data.
#[inline(always)]
pub fn has_payload(frame: &Frame, p: &Parsed) -> bool {
    let view = frame.view();
    let Some(tcp) = view.ptr::<Tcp>(p.l4()) else { return false };
    // SAFETY: `ptr` checked the bounds.
    let at = p.l4() + unsafe { (*tcp).offset >> 4 } as usize * 4;
    match packet_end(view, p) {
        Some(end) => end > at,
        None => false,
    }
}

/// Translates and sends on, with whatever tags.
#[inline(never)]
pub fn forward(frame: &Frame, p: &Parsed, flow: &Flow, reason: Reason) -> Verdict {
    rewrite::translate::<true>(frame, frame.view(), p, p, flow)?;
    let flags = globals()?.flags;
    if flags & GLOBAL_QOS != 0 && !qos::passes_slowly(flags, frame.view(), p, flow) {
        return Verdict(Reason::OverBandwidth);
    }
    leave(frame, p, &flow.link())?;
    Verdict(reason)
}
