//! The way of a packet:
//!
//! ```text
//! parse -> ours? -> flow known? -> rewrite -> redirect
//!                        | no
//!                        +-> SYN: cookie | first data: stash -> session -> bind | l4: bind
//! ```

use dispatcher_common::{
    flow::{FLAG_TO_BACKEND, FLAGS_SLOW},
    reason::Reason,
    service::MODE_L4,
    tcp::{ACK, FIN, RST, SYN},
};

use crate::{
    control, flows,
    globals::globals,
    icmp, l4,
    packet::{Frame, Ipv4, Ipv6, Tcp, View},
    parse::{self, ICMP, ICMP6, Parsed, TCP, UDP},
    reply, rewrite, services, stash, syn,
};

/// Takes a frame all the way.
#[inline(always)]
pub fn run(frame: &Frame) -> Result<Reason, Reason> {
    let globals = globals()?;
    let view = frame.view();
    let mut p = Parsed::empty();
    if let Err(reason) = parse::network(view, &mut p) {
        return if reason as u32 == Reason::NotIp as u32 { Ok(reason) } else { Err(reason) };
    }
    let to_us = globals.filter_has(&p.key.dst);
    if !to_us && !globals.filter_has(&p.key.src) {
        if p.key.proto == ICMP || p.key.proto == ICMP6 {
            return icmp::error(frame, &p);
        }
        return Ok(Reason::NotOurs);
    }
    if p.key.proto != TCP && p.key.proto != UDP {
        return other(frame, &mut p, to_us);
    }
    transport(frame, view, &mut p, globals.generation, to_us)
}

/// A TCP or UDP packet to or from one of our addresses.
#[inline(always)]
fn transport(
    frame: &Frame,
    view: View,
    p: &mut Parsed,
    generation: u32,
    to_us: bool,
) -> Result<Reason, Reason> {
    if p.fragment != 0 {
        return if to_us { Err(Reason::Fragment) } else { Ok(Reason::BackendOther) };
    }
    parse::ports(view, p)?;
    let Some(flow) = flows::get(&p.key) else {
        return if to_us { new_connection(frame, p) } else { Ok(Reason::BackendOther) };
    };
    if hops(view, p) <= 1 {
        return Err(Reason::TtlExpired);
    }
    let mut slow = flow.flags & FLAGS_SLOW | p.tags;
    if flow.flags & FLAG_TO_BACKEND != 0 {
        slow |= flow.generation ^ generation;
    }
    if p.is_tcp() {
        let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        slow |= unsafe { ((*tcp).flags & (SYN | FIN | RST | ACK)) ^ ACK } as u32;
    }
    if slow != 0 {
        return control::handle(frame, p, flow);
    }
    rewrite::translate(frame, view, p, flow)?;
    rewrite::leave_plain(frame, frame.view(), &flow.link)?;
    Ok(rewrite::direction(flow))
}

/// TTL or hop limit.
#[inline(always)]
fn hops(view: View, p: &Parsed) -> u8 {
    let l3 = p.l3();
    if p.is_v4() {
        // SAFETY: `ptr` checked the bounds.
        view.ptr::<Ipv4>(l3).map_or(0, |ip| unsafe { (*ip).ttl })
    } else {
        // SAFETY: `ptr` checked the bounds.
        view.ptr::<Ipv6>(l3).map_or(0, |ip| unsafe { (*ip).hops })
    }
}

/// Neither TCP nor UDP at first sight: ICMP, IPv6 extension headers, or not for us.
#[inline(never)]
fn other(frame: &Frame, p: &mut Parsed, to_us: bool) -> Result<Reason, Reason> {
    if !p.is_v4() && matches!(p.key.proto, 0 | 43 | 44 | 60) && !parse::extensions(frame, p) {
        return Err(Reason::BadExtension);
    }
    match p.key.proto {
        TCP | UDP => after_extensions(frame, p, to_us),
        ICMP | ICMP6 => icmp::error(frame, p),
        _ => Ok(if to_us { Reason::NoService } else { Reason::BackendOther }),
    }
}

#[inline(never)]
fn after_extensions(frame: &Frame, p: &mut Parsed, to_us: bool) -> Result<Reason, Reason> {
    let generation = globals()?.generation;
    transport(frame, frame.view(), p, generation, to_us)
}

/// A packet of no flow, to one of our addresses.
#[inline(never)]
pub fn new_connection(frame: &Frame, p: &Parsed) -> Result<Reason, Reason> {
    let Some(index) = services::frontend_of(&p.key) else { return Ok(Reason::NoService) };
    let frontend = services::frontend(index)?;
    let view = frame.view();
    if hops(view, p) <= 1 {
        return Err(Reason::TtlExpired);
    }
    if frontend.mode == MODE_L4 {
        return l4::bind(frame, p, index, frontend);
    }
    let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &*tcp };
    let flags = tcp.flags & (SYN | FIN | RST | ACK);
    if flags & RST != 0 {
        return if flags & SYN != 0 { Err(Reason::BadFlags) } else { Ok(Reason::ResetIgnored) };
    }
    if flags & SYN != 0 {
        return if flags == SYN { syn::answer(frame, p, frontend) } else { Err(Reason::BadFlags) };
    }
    if flags & ACK == 0 {
        return Err(Reason::BadFlags);
    }
    if control::has_payload(frame, p) {
        return stash::first_data(frame, p, index);
    }
    // A bare ACK completes a handshake, if its cookie is right. So does a bare FIN, whose sender
    // wants nothing any more.
    if flags & FIN == 0 {
        let isn = u32::from_be(tcp.seq).wrapping_sub(1);
        let cookie = u32::from_be(tcp.ack).wrapping_sub(1);
        let mut options = dispatcher_common::cookie::Options { mss: 0, wscale: 0, sack: false };
        if syn::check(globals()?, &p.key, isn, cookie, &mut options) != syn::INVALID {
            return Ok(Reason::CookieAck);
        }
    }
    reply::reset(frame, p)?;
    Ok(Reason::ResetClient)
}
