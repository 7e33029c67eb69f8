//! Programs for `cargo xtask bench fastpath`: what the data path is measured against, and the wrappers
//! that undo what a program did to its frame before it runs again.
#![no_std]
#![no_main]
#![expect(unreachable_pub, reason = "in a binary, pub says: for other stages")]

#[expect(dead_code, reason = "the data path needs all of it")]
mod packet;

use aya_ebpf::{
    bindings::xdp_action::{XDP_ABORTED, XDP_PASS, XDP_TX},
    macros::{map, xdp},
    maps::{Array, LruHashMap, ProgramArray},
    programs::XdpContext,
};
use dispatcher_common::{
    abi,
    addr::Addr,
    checksum::update,
    flow::{Flow, FlowKey},
    opaque::opaque,
};

use crate::packet::{Frame, Ipv4, MACS, Tcp};

const IPV4: u16 = 0x0800_u16.to_be();
/// More fragments, or an offset (RFC 791).
const FRAGMENT: u16 = 0x3fff_u16.to_be();
const IP_AT: usize = MACS + 2;
const TCP_AT: usize = IP_AT + size_of::<Ipv4>();

/// Longest frame of the wrapper `restore`.
const TEMPLATE_MAX: usize = 128;
/// Longest frame of the wrapper `restore_each`.
const EACH_MAX: usize = 1020;

/// Where a forwarder sends a flow, in a record as long as the data path's.
#[repr(C)]
struct Record {
    hop: NextHop,
    _rest: [u32; (size_of::<Flow>() - size_of::<NextHop>()) / 4],
}

/// Where a forwarder sends a flow, and nothing else.
#[repr(C)]
struct NextHop {
    /// Destination and source MAC.
    macs: [u32; 3],
    /// Interface.
    ifindex: u32,
}

/// An entry of a floor program's table.
trait Entry {
    /// Where the flow is sent.
    fn macs(&self) -> [u32; 3];
}

impl Entry for Record {
    #[inline(always)]
    fn macs(&self) -> [u32; 3] {
        self.hop.macs
    }
}

impl Entry for NextHop {
    #[inline(always)]
    fn macs(&self) -> [u32; 3] {
        self.macs
    }
}

/// State and settings of the wrappers.
#[repr(C)]
struct Control {
    /// Index of the next run's flow or frame.
    next: u32,
    /// Number of flows or frames.
    count: u32,
    /// Length of the template in bytes.
    len: u32,
    /// 1: `PATCHES` holds what differs between flows.
    patched: u32,
}

/// What differs between the IPv4/TCP frames of two flows.
#[repr(C)]
struct Patch {
    src: u32,
    dst: u32,
    ports: u32,
    ip_check: u16,
    tcp_check: u16,
}

/// A whole frame.
#[repr(C)]
struct Each {
    len: u32,
    bytes: [u8; EACH_MAX],
}

#[map]
static FLOOR: LruHashMap<FlowKey, Record> = LruHashMap::with_max_entries(abi::DEFAULT_FLOWS, 0);
#[map]
static FLOOR_SMALL: LruHashMap<FlowKey, NextHop> = LruHashMap::with_max_entries(abi::DEFAULT_FLOWS, 0);
#[map]
static FLOOR_BOTH: LruHashMap<FlowKey, Record> = LruHashMap::with_max_entries(abi::DEFAULT_FLOWS, 0);
#[map]
static CONTROL: Array<Control> = Array::with_max_entries(1, 0);
#[map]
static TEMPLATE: Array<[u8; TEMPLATE_MAX]> = Array::with_max_entries(1, 0);
#[map]
static PATCHES: Array<Patch> = Array::with_max_entries(65_536, 0);
#[map]
static FRAMES: Array<Each> = Array::with_max_entries(2048, 0);
/// The program under test, at index 0.
#[map]
static CALLEE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// The least that a program can do.
#[xdp]
fn floor_tx(_ctx: XdpContext) -> u32 {
    XDP_TX
}

/// The least that a flow-based forwarder of TCP over IPv4 can do.
#[xdp]
fn floor_lru(ctx: XdpContext) -> u32 {
    forward(&Frame::new(&ctx), &FLOOR).unwrap_or(XDP_PASS)
}

/// The same with the shortest record that will do.
#[xdp]
fn floor_lru_small(ctx: XdpContext) -> u32 {
    forward(&Frame::new(&ctx), &FLOOR_SMALL).unwrap_or(XDP_PASS)
}

/// `floor_lru` with a table that also holds the other direction of every flow, as the data path's does.
#[xdp]
fn floor_lru_both(ctx: XdpContext) -> u32 {
    forward(&Frame::new(&ctx), &FLOOR_BOTH).unwrap_or(XDP_PASS)
}

/// Parse, one lookup, TTL with its checksum, MAC addresses.
#[inline(always)]
fn forward<E: Entry>(frame: &Frame, hops: &LruHashMap<FlowKey, E>) -> Option<u32> {
    let view = frame.view();
    if view.read::<u16>(MACS)? != IPV4 {
        return None;
    }
    // SAFETY: `ptr` checked the bounds.
    let ip = unsafe { &mut *view.ptr::<Ipv4>(IP_AT)? };
    if ip.version != 0x45 || ip.proto != 6 || ip.fragment & FRAGMENT != 0 || ip.ttl <= 1 {
        return None;
    }
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &*view.ptr::<Tcp>(TCP_AT)? };
    let key = &FlowKey {
        src: Addr::from_v4_word(ip.src),
        dst: Addr::from_v4_word(ip.dst),
        ports: tcp.ports,
        proto: 6,
    };
    // SAFETY: entries of a preallocated hash stay valid memory while the program runs.
    let hop = unsafe { &*hops.get_ptr(key)? };
    ip.ttl = ip.ttl.wrapping_sub(1);
    // TTL is the first byte of its 16-bit word: less one is plus ~1 in one's complement.
    ip.check = update(ip.check, !1_u16 as u64);
    // SAFETY: `ptr` checked the bounds.
    unsafe { *view.ptr::<[u32; 3]>(0)? = hop.macs() };
    Some(XDP_TX)
}

/// Restores the template for the next flow, then calls the program under test.
#[xdp]
fn restore(ctx: XdpContext) -> u32 {
    if restore_template(&Frame::new(&ctx)).is_some() {
        // Does not return, unless there is no program to call.
        // SAFETY: a program of the same type, by its context.
        unsafe { CALLEE.tail_call(&ctx, 0) };
    }
    XDP_ABORTED
}

#[inline(always)]
fn restore_template(frame: &Frame) -> Option<()> {
    // SAFETY: the bench runs on one CPU at a time.
    let control = unsafe { &mut *CONTROL.get_ptr_mut(0)? };
    let template = TEMPLATE.get(0)?;
    let index = advance(control);
    put(frame, template.as_ptr(), control.len, TEMPLATE_MAX as u32)?;
    if control.patched == 0 {
        return Some(());
    }
    let patch = PATCHES.get(index)?;
    let view = frame.view();
    // SAFETY: `ptr` checked the bounds.
    let (ip, tcp) = unsafe { (&mut *view.ptr::<Ipv4>(IP_AT)?, &mut *view.ptr::<Tcp>(TCP_AT)?) };
    ip.src = patch.src;
    ip.dst = patch.dst;
    ip.check = patch.ip_check;
    tcp.ports = patch.ports;
    tcp.check = patch.tcp_check;
    Some(())
}

/// Puts the next of many frames in place, then calls the program under test.
#[xdp]
fn restore_each(ctx: XdpContext) -> u32 {
    if restore_frame(&Frame::new(&ctx)).is_some() {
        // SAFETY: as in `restore`.
        unsafe { CALLEE.tail_call(&ctx, 0) };
    }
    XDP_ABORTED
}

#[inline(always)]
fn restore_frame(frame: &Frame) -> Option<()> {
    // SAFETY: as in `restore_template`.
    let control = unsafe { &mut *CONTROL.get_ptr_mut(0)? };
    let each = FRAMES.get(advance(control))?;
    put(frame, each.bytes.as_ptr(), each.len, EACH_MAX as u32)
}

/// This run's index.
#[inline(always)]
fn advance(control: &mut Control) -> u32 {
    let index = control.next;
    control.next = if index + 1 < control.count { index + 1 } else { 0 };
    index
}

/// Gives the frame its length and content. A program may have moved its start or its end: back at the
/// start as long as there is room, else at the end.
#[inline(always)]
fn put(frame: &Frame, from: *const u8, len: u32, max: u32) -> Option<()> {
    let len = opaque(len as u64) as u32;
    if len < TCP_AT as u32 || len > max {
        return None;
    }
    let by = opaque(frame.view().len() as u64) as i32 - len as i32;
    if !frame.shift(by) && !frame.resize(len as usize) {
        return None;
    }
    frame.store(0, from, len as usize).then_some(())
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: no path of these programs panics, and the verifier would refuse one that does.
    unsafe { core::hint::unreachable_unchecked() }
}
