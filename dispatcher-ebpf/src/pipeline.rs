//! The way of a packet:
//!
//! ```text
//! parse -> ours? -> flow known? -> rewrite -> redirect
//!                        | no
//!                        +-> SYN: cookie | first data: stash -> session -> bind | l4: bind | the daemon's: pass
//! ```

use dispatcher_common::{
    abi::{STAGE_DATAGRAM, STAGE_FIRST_DATA, STAGE_LISTENER},
    flow::{FLAG_QUIC, FLAG_SYN_SENT, FLAG_TO_BACKEND, FLAGS_SLOW, Flow},
    globals::{GLOBAL_QOS, Globals},
    reason::Reason,
    service::{FRONTEND_MISS_DAEMON, FRONTEND_OVER_RESET, MODE_L4, MODE_LOCAL},
    tcp::{ACK, FIN, RST, SYN},
};

use crate::{
    control::{self, AS_NEW},
    flows,
    globals::{globals, scratch},
    icmp, l4,
    packet::{Frame, Ipv4, Ipv6, Tcp, View},
    parse::{self, ICMP, ICMP6, Layout, Parsed, Plain, TCP, UDP},
    qos, quic, reply, rewrite, services, stash, syn,
    verdict::Verdict,
};

/// How far the look at a packet came.
enum Step {
    /// All the way.
    Done(Verdict),
    /// The packet is of a known flow, but not plain data.
    Known(&'static mut Flow),
    /// The packet is for us and of no flow.
    New,
    /// The packet's layout is not the expected one.
    Other,
}

impl From<Reason> for Step {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self::Done(Verdict(reason))
    }
}

/// Takes a frame all the way.
#[inline(always)]
pub fn run(frame: &Frame) -> Verdict {
    let globals = globals()?;
    let view = frame.view();
    let p = &mut Parsed::none();
    let mut step = plain::<true>(frame, view, globals, p);
    if matches!(step, Step::Other) {
        step = plain::<false>(frame, view, globals, p);
    }
    if matches!(step, Step::Other) {
        step = any(frame, view, globals, p);
    }
    match step {
        Step::Done(verdict) => return verdict,
        Step::Known(flow) => {
            let verdict = control::handle(frame, p, flow);
            if !verdict.is(AS_NEW) {
                return verdict;
            }
        }
        Step::New => {}
        Step::Other => return Verdict(Reason::Internal),
    }
    new_connection(frame, p, globals)
}

/// A TCP or UDP packet of the usual layout: the fast path.
#[inline(always)]
fn plain<const V4: bool>(frame: &Frame, view: View, globals: &Globals, p: &mut Parsed) -> Step {
    let layout = Plain::<V4>;
    if !parse::plain::<V4>(view, p) {
        return Step::Other;
    }
    let to_us = globals.filter_has(&p.key.dst);
    if !to_us && !globals.filter_has(&p.key.src) {
        return Reason::NotOurs.into();
    }
    if let Err(reason) = parse::ports(view, layout.l4(), p) {
        return reason.into();
    }
    let Some(flow) = flows::get(&p.key) else { return stranger(to_us) };

    let mut slow = (flow.flags & FLAGS_SLOW) as u32;
    if flow.flags & FLAG_TO_BACKEND != 0 {
        slow |= (flow.generation ^ globals.generation as u16) as u32;
    }
    if p.is_tcp() {
        let Some(tcp) = view.ptr::<Tcp>(layout.l4()) else { return Reason::BadTransport.into() };
        // SAFETY: `ptr` checked the bounds.
        slow |= unsafe { ((*tcp).flags & (SYN | FIN | RST | ACK)) ^ ACK } as u32;
    } else if flow.flags & FLAG_QUIC != 0 {
        slow |= quic::strange(view, layout.l4(), flow);
    }
    if slow != 0 || hops(view, layout) <= 1 {
        return Step::Known(flow);
    }
    match rewrite::translate::<false>(frame, view, layout, p, flow) {
        Err(reason) => return reason.into(),
        Ok(false) => return Step::Known(flow),
        Ok(true) => {}
    }
    if globals.flags & GLOBAL_QOS != 0 && !qos::passes(globals.flags, view, layout, flow) {
        return Reason::OverBandwidth.into();
    }
    if let Err(reason) = rewrite::leave_plain(frame, view, flow.ifindex, &flow.macs) {
        return reason.into();
    }
    rewrite::direction(flow).into()
}

/// A packet of any other layout.
#[inline(always)]
fn any(frame: &Frame, view: View, globals: &Globals, p: &mut Parsed) -> Step {
    match parse::network(view) {
        Err(reason) => return reason.into(),
        Ok(parsed) => *p = parsed,
    }
    parse::merge(p, globals.stash_mask);
    let to_us = globals.filter_has(&p.key.dst);
    if !to_us && !globals.filter_has(&p.key.src) {
        if p.key.proto == ICMP || p.key.proto == ICMP6 {
            return Step::Done(icmp::error(frame, p));
        }
        return Reason::NotOurs.into();
    }
    let strangers = if to_us { Reason::NoService } else { Reason::BackendOther };
    if p.key.proto != TCP && p.key.proto != UDP {
        if !p.is_v4() && !parse::extensions(frame, p) {
            return Reason::BadExtension.into();
        }
        match p.key.proto {
            TCP | UDP => {}
            ICMP | ICMP6 => return Step::Done(icmp::error(frame, p)),
            _ => return strangers.into(),
        }
    }
    if p.is_fragment() {
        return if to_us { Reason::Fragment } else { strangers }.into();
    }
    if let Err(reason) = parse::ports(view, p.l4(), p) {
        return reason.into();
    }
    match flows::get(&p.key) {
        Some(flow) => Step::Known(flow),
        None => stranger(to_us),
    }
}

/// A packet of no flow.
#[inline(always)]
fn stranger(to_us: bool) -> Step {
    if to_us { Step::New } else { Reason::BackendOther.into() }
}

/// TTL or hop limit.
#[inline(always)]
pub fn hops(view: View, layout: impl Layout) -> u8 {
    let l3 = layout.l3();
    if layout.is_v4() {
        // SAFETY: `ptr` checked the bounds.
        view.ptr::<Ipv4>(l3).map_or(0, |ip| unsafe { (*ip).ttl })
    } else {
        // SAFETY: `ptr` checked the bounds.
        view.ptr::<Ipv6>(l3).map_or(0, |ip| unsafe { (*ip).hops })
    }
}

/// A packet of no flow, to one of our addresses.
#[inline(never)]
pub fn new_connection(frame: &Frame, p: &Parsed, globals: &Globals) -> Verdict {
    let Some((_, frontend)) = services::frontend_of(globals, &p.key) else {
        return Verdict(Reason::NoService);
    };
    let view = frame.view();
    if frontend.mode == MODE_LOCAL {
        return local(view, p);
    }
    if hops(view, p) <= 1 {
        return icmp::time_exceeded(frame, p, &p.key.dst);
    }
    if frontend.mode == MODE_L4 {
        return stage(if quic::serves(frontend) { STAGE_DATAGRAM } else { STAGE_FIRST_DATA });
    }
    let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &*tcp };
    let flags = tcp.flags & (SYN | FIN | RST | ACK);
    let holds = frontend.flags & FRONTEND_MISS_DAEMON != 0;
    if flags & RST != 0 {
        if flags & SYN != 0 {
            return Verdict(Reason::BadFlags);
        }
        return if holds { stage(STAGE_FIRST_DATA) } else { Verdict(Reason::ResetIgnored) };
    }
    if flags & SYN != 0 {
        return if flags == SYN {
            syn::answer(frame, p, frontend, globals)
        } else {
            Verdict(Reason::BadFlags)
        };
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
        if syn::check(globals, &p.key, isn, cookie, &mut options) != syn::INVALID {
            return Verdict(Reason::CookieAck);
        }
    } else if holds {
        return stage(STAGE_FIRST_DATA);
    }
    reply::reset(frame, p)?;
    Verdict(Reason::ResetClient)
}

/// A packet for a listener of the daemon goes up; a SYN is looked at before.
#[inline(always)]
fn local(view: View, p: &Parsed) -> Verdict {
    let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let flags = unsafe { (*tcp).flags } & (SYN | FIN | RST | ACK);
    if flags == SYN { stage(STAGE_LISTENER) } else { Verdict(Reason::ToDaemon) }
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
    parse::ports(frame.view(), p.l4(), p)?;
    Ok(p)
}

/// The stage of new connections.
#[inline(always)]
pub fn first_data(frame: &Frame) -> Verdict {
    let p = parse_again(frame)?;
    let Some((index, frontend)) = services::frontend_of(globals()?, &p.key) else {
        return Verdict(Reason::NoService);
    };
    let verdict = if frontend.mode == MODE_L4 {
        l4::bind(frame, p, index, frontend)
    } else if stash::leaves(frame, p) {
        return stash::left(frame, p);
    } else {
        stash::first_data(frame, p, index)
    };
    if verdict.is(Reason::NoBackend) && p.is_tcp() {
        reply::reset(frame, p)?;
        return Verdict(Reason::ResetNoBackend);
    }
    if verdict.is(Reason::OverConnections) && p.is_tcp() && frontend.flags & FRONTEND_OVER_RESET != 0 {
        reply::reset(frame, p)?;
        return Verdict(Reason::ResetOverRate);
    }
    verdict
}

/// The stage of datagrams that may tell a connection ID.
#[inline(always)]
pub fn datagram(frame: &Frame) -> Verdict {
    let p = parse_again(frame)?;
    quic::read(frame, p)?;
    if let Some(flow) = flows::get(&p.key)
        && flow.flags & FLAG_TO_BACKEND == 0
    {
        return quic::answer(frame, p, flow);
    }
    let Some((index, frontend)) = services::frontend_of(globals()?, &p.key) else {
        return Verdict(Reason::NoService);
    };
    quic::bind(frame, p, index, frontend)
}

/// The stage of SYNs to listeners of the daemon.
#[inline(always)]
pub fn listener(frame: &Frame) -> Verdict {
    crate::listener::syn(frame, parse_again(frame)?)
}

/// The stage of a backend's first packets.
#[inline(always)]
pub fn answer(frame: &Frame) -> Verdict {
    let p = parse_again(frame)?;
    let Some(flow) = flows::get(&p.key) else { return Verdict(Reason::BackendOther) };
    if flow.flags & FLAG_TO_BACKEND != 0 {
        // The backend answered while this segment was on its way to the stash.
        if flow.flags & FLAG_SYN_SENT != 0 {
            return Verdict(Reason::StashBusy);
        }
        let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        return control::conclude(frame, p, flow, unsafe { (*tcp).flags });
    }
    crate::answer::packet(frame, p, flow)
}
