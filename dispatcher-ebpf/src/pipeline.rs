//! The way of a packet:
//!
//! ```text
//! parse -> ours? -> flow known? -> rewrite -> redirect
//!                        | no
//!                        +-> SYN: cookie | first data: stash -> session -> bind | l4: bind
//! ```

use dispatcher_common::{
    abi::STAGE_FIRST_DATA,
    flow::{FLAG_TO_BACKEND, FLAGS_SLOW, Flow},
    reason::Reason,
    service::MODE_L4,
    tcp::{ACK, FIN, RST, SYN},
};

use crate::{
    control::{self, AS_NEW},
    flows,
    globals::{globals, scratch},
    icmp, l4,
    packet::{Frame, Ipv4, Ipv6, Tcp, View},
    parse::{self, ICMP, ICMP6, Parsed, TCP, UDP},
    reply, rewrite, services, stash, syn,
    verdict::Verdict,
};

/// Takes a frame all the way.
#[inline(always)]
pub fn run(frame: &Frame) -> Verdict {
    let globals = globals()?;
    let view = frame.view();
    let mut p = parse::network(view)?;
    parse::merge(&mut p, globals.stash_mask);
    let to_us = globals.filter_has(&p.key.dst);
    if !to_us && !globals.filter_has(&p.key.src) {
        if p.key.proto == ICMP || p.key.proto == ICMP6 {
            return icmp::error(frame, &p);
        }
        return Verdict(Reason::NotOurs);
    }
    let strangers = Verdict(if to_us { Reason::NoService } else { Reason::BackendOther });
    if p.key.proto != TCP && p.key.proto != UDP {
        if !p.is_v4() && !parse::extensions(frame, &mut p) {
            return Verdict(Reason::BadExtension);
        }
        match p.key.proto {
            TCP | UDP => {}
            ICMP | ICMP6 => return icmp::error(frame, &p),
            _ => return strangers,
        }
    }
    let p = &mut p;
    if p.is_fragment() {
        return if to_us { Verdict(Reason::Fragment) } else { strangers };
    }
    parse::ports(view, p)?;
    if let Some(flow) = flows::get(&p.key) {
        let verdict = known(frame, view, p, flow, globals.generation);
        if !verdict.is(AS_NEW) {
            return verdict;
        }
    } else if !to_us {
        return strangers;
    }
    new_connection(frame, p)
}

/// A packet of a known flow.
#[inline(always)]
fn known(frame: &Frame, view: View, p: &Parsed, flow: &mut Flow, generation: u32) -> Verdict {
    if hops(view, p) <= 1 {
        // In our own name: the VIP's, whichever side is told.
        let vip = if flow.flags & FLAG_TO_BACKEND != 0 { &p.key.dst } else { &flow.src };
        return icmp::time_exceeded(frame, p, vip);
    }
    let mut slow = flow.flags & FLAGS_SLOW | p.tags();
    if flow.flags & FLAG_TO_BACKEND != 0 {
        slow |= flow.generation ^ generation;
    }
    if p.is_tcp() {
        let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        slow |= unsafe { ((*tcp).flags & (SYN | FIN | RST | ACK)) ^ ACK } as u32;
    }
    if slow != 0 || !rewrite::translate::<false>(frame, view, p, flow)? {
        return control::handle(frame, p, flow);
    }
    rewrite::leave_plain(frame, view, &flow.link)?;
    Verdict(rewrite::direction(flow))
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

/// A packet of no flow, to one of our addresses.
#[inline(never)]
pub fn new_connection(frame: &Frame, p: &Parsed) -> Verdict {
    let Some(index) = services::frontend_of(&p.key) else { return Verdict(Reason::NoService) };
    let frontend = services::frontend(index)?;
    let view = frame.view();
    if hops(view, p) <= 1 {
        return icmp::time_exceeded(frame, p, &p.key.dst);
    }
    if frontend.mode == MODE_L4 {
        return stage(STAGE_FIRST_DATA);
    }
    let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &*tcp };
    let flags = tcp.flags & (SYN | FIN | RST | ACK);
    if flags & RST != 0 {
        return Verdict(if flags & SYN != 0 { Reason::BadFlags } else { Reason::ResetIgnored });
    }
    if flags & SYN != 0 {
        return if flags == SYN { syn::answer(frame, p, frontend) } else { Verdict(Reason::BadFlags) };
    }
    if flags & ACK == 0 {
        return Verdict(Reason::BadFlags);
    }
    if control::has_payload(frame, p) {
        return stage(STAGE_FIRST_DATA);
    }
    // A bare ACK completes a handshake, if its cookie is right. So does a bare FIN, whose sender
    // wants nothing any more.
    if flags & FIN == 0 {
        let isn = u32::from_be(tcp.seq).wrapping_sub(1);
        let cookie = u32::from_be(tcp.ack).wrapping_sub(1);
        let mut options = dispatcher_common::cookie::Options { mss: 0, wscale: 0, sack: false };
        if syn::check(globals()?, &p.key, isn, cookie, &mut options) != syn::INVALID {
            return Verdict(Reason::CookieAck);
        }
    }
    reply::reset(frame, p)?;
    Verdict(Reason::ResetClient)
}

/// Asks for another program, with a stack of its own, to go on with the packet.
#[inline(always)]
pub fn stage(index: u32) -> Verdict {
    scratch()?.stage = index;
    Verdict(Reason::NoStage)
}

/// Parses a frame of a known kind once more, into scratch memory.
#[inline(always)]
fn parse_again(frame: &Frame) -> Result<&'static mut Parsed, Reason> {
    let p = &mut scratch()?.packet;
    *p = parse::network(frame.view())?;
    if p.key.proto != TCP && p.key.proto != UDP && !parse::extensions(frame, p) {
        return Err(Reason::BadExtension);
    }
    parse::ports(frame.view(), p)?;
    Ok(p)
}

/// The stage of new connections.
#[inline(always)]
pub fn first_data(frame: &Frame) -> Verdict {
    let p = parse_again(frame)?;
    let Some(index) = services::frontend_of(&p.key) else { return Verdict(Reason::NoService) };
    let frontend = services::frontend(index)?;
    if frontend.mode == MODE_L4 {
        return l4::bind(frame, p, index, frontend);
    }
    stash::first_data(frame, p, index)
}

/// The stage of a backend's first packets.
#[inline(always)]
pub fn answer(frame: &Frame) -> Verdict {
    let p = parse_again(frame)?;
    let Some(flow) = flows::get(&p.key) else { return Verdict(Reason::BackendOther) };
    crate::answer::packet(frame, p, flow)
}
