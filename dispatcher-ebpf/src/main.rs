//! The XDP data path of Dispatcher. One file a stage; [`pipeline`] shows their order, and this file
//! is the only one where a reason becomes an XDP action.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "atomic operations, see atomic.rs")]
#![expect(unreachable_pub, reason = "in a binary, pub says: for other stages")]

mod answer;
mod atomic;
mod bind;
mod control;
mod counters;
mod emit;
mod flows;
mod globals;
mod icmp;
mod l4;
mod packet;
mod parse;
mod pipeline;
mod release;
mod reply;
mod rewrite;
mod services;
mod sessions;
mod stash;
mod syn;

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
    macros::xdp,
    programs::XdpContext,
};
use dispatcher_common::reason::{Kind, Reason};

use crate::packet::Frame;

/// Every frame that an attached interface receives.
#[xdp]
fn dispatcher(ctx: XdpContext) -> u32 {
    finish(pipeline::run(&Frame::new(&ctx)))
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
        Some(Ok(reason)) => {
            counters::count(reason);
            XDP_PASS
        }
        Some(Err(reason)) => {
            counters::count(reason);
            XDP_DROP
        }
    }
}

/// Counts the verdict and makes it an action.
#[inline(always)]
fn finish(result: Result<Reason, Reason>) -> u32 {
    let (Ok(reason) | Err(reason)) = result;
    counters::count(reason);
    match reason.kind() {
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
