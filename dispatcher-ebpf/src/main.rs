//! The XDP data path of Dispatcher. One file a stage; [`pipeline`] shows their order, and this file
//! is the only one where a reason becomes an XDP action.
#![no_std]
#![no_main]
#![feature(core_intrinsics, try_trait_v2)]
#![expect(internal_features, reason = "atomic operations, see atomic.rs")]
#![expect(unreachable_pub, reason = "in a binary, pub says: for other stages")]

mod answer;
mod atomic;
mod bind;
mod control;
mod counters;
mod emit;
mod events;
mod flows;
mod globals;
mod http;
mod icmp;
mod identify;
mod l4;
mod listener;
mod options;
mod packet;
mod parse;
mod pipeline;
mod qos;
mod quic;
mod release;
mod reply;
mod rewrite;
mod services;
mod sessions;
mod stash;
mod syn;
mod verdict;

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
    macros::{map, xdp},
    maps::ProgramArray,
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use dispatcher_common::{
    abi,
    globals::GLOBAL_LOG,
    reason::{Kind, Reason},
};

use crate::{packet::Frame, verdict::Verdict};

#[map]
static STAGES: ProgramArray = ProgramArray::with_max_entries(abi::STAGE_PROGRAMS.len() as u32, 0);

/// Every frame that an attached interface receives.
#[xdp]
fn dispatcher(ctx: XdpContext) -> u32 {
    let verdict = pipeline::run(&Frame::new(&ctx));
    go_on(&ctx, verdict);
    finish(verdict)
}

/// Hands the frame to another program, if the verdict asks for it (see [`pipeline::stage`]).
#[inline(always)]
fn go_on(ctx: &XdpContext, verdict: Verdict) {
    if verdict.is(Reason::NoStage)
        && let Ok(scratch) = globals::scratch()
    {
        // Does not return, unless the array lacks the stage.
        // SAFETY: a program of the same type, by its context.
        unsafe { STAGES.tail_call(ctx, scratch.stage) };
    }
}

/// First data of a connection, or the first packet of an l4 flow; called by `dispatcher`.
#[xdp]
fn first_data(ctx: XdpContext) -> u32 {
    let verdict = pipeline::first_data(&Frame::new(&ctx));
    go_on(&ctx, verdict);
    log_drop(&ctx, verdict);
    finish(verdict)
}

/// A backend's answer to our SYN, or its first data; called by `dispatcher`.
#[xdp]
fn answer(ctx: XdpContext) -> u32 {
    finish(pipeline::answer(&Frame::new(&ctx)))
}

/// A datagram of a QUIC service that may tell a connection ID; called by `dispatcher`.
#[xdp]
fn datagram(ctx: XdpContext) -> u32 {
    finish(pipeline::datagram(&Frame::new(&ctx)))
}

/// A SYN to a listener of the daemon; called by `dispatcher`.
#[xdp]
fn listener(ctx: XdpContext) -> u32 {
    finish(pipeline::listener(&Frame::new(&ctx)))
}

/// Frames that the daemon makes to release held hellos.
#[xdp]
fn release(ctx: XdpContext) -> u32 {
    finish(release::next(&Frame::new(&ctx)))
}

/// Frames that leave through a replay map.
#[xdp(map = "devmap")]
fn emit(ctx: XdpContext) -> u32 {
    match emit::at_exit(&Frame::new(&ctx)) {
        None => XDP_PASS,
        // At an exit XDP_PASS means: go on.
        Some(verdict) => {
            counters::count(verdict.0);
            if matches!(verdict.0.kind(), Kind::Forward) { XDP_PASS } else { XDP_DROP }
        }
    }
}

/// Logs a dropped first packet, if the daemon asked for it (`--log-level debug`). The fast path
/// never logs.
#[inline(always)]
fn log_drop(ctx: &XdpContext, verdict: Verdict) {
    if verdict.is_drop()
        && let Ok(globals) = globals::globals()
        && globals.flags & GLOBAL_LOG != 0
    {
        debug!(ctx, "first data dropped, reason {}", verdict.0 as u32);
    }
}

/// Counts the verdict and makes it an action.
#[inline(always)]
fn finish(verdict: Verdict) -> u32 {
    counters::count(verdict.0);
    match verdict.0.kind() {
        Kind::Forward => XDP_REDIRECT,
        Kind::Pass => XDP_PASS,
        Kind::Consume | Kind::Drop => XDP_DROP,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: no path of this crate panics: every index is masked or checked, and the verifier
    // would refuse a program in which this call is reachable and does not end.
    unsafe { core::hint::unreachable_unchecked() }
}
