//! Reading TCP options: the one part whose paths the verifier must not follow from every caller.

use aya_ebpf::bindings::xdp_md;
use dispatcher_common::{
    opaque::opaque,
    reason::Reason,
    tcp::{Options, parse_options},
};

use crate::{
    globals::scratch,
    packet::{Frame, Tcp},
    parse::Parsed,
};

/// Copies `len` bytes of options at `at` to `Scratch::options` and reads them into
/// `Scratch::parsed`. Returns 1, or 0 when the frame does not hold them.
///
/// Exported, so that it is a global function for the verifier (kernel 5.6), which checks it once,
/// for any arguments, and not once a call.
///
/// # Safety
///
/// `ctx` is the context of the running program.
#[unsafe(no_mangle)]
#[inline(never)]
pub unsafe extern "C" fn dispatcher_read_options(ctx: *mut xdp_md, at: u32, len: u32) -> u32 {
    let Ok(scratch) = scratch() else { return 0 };
    scratch.parsed = Options::NONE;
    let len = opaque(len as u64) as usize & 0x3f;
    if len == 0 {
        return 1;
    }
    if len > 40 || !Frame::of(ctx).load(at as usize, scratch.options.as_mut_ptr(), len) {
        return 0;
    }
    parse_options(&scratch.options, len, &mut scratch.parsed);
    1
}

/// Reads the options of a packet into scratch memory; returns their length.
#[inline(always)]
pub fn read(frame: &Frame, p: &Parsed) -> Result<usize, Reason> {
    let at = p.l4();
    let tcp = frame.view().ptr::<Tcp>(at).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let header = unsafe { ((*tcp).offset >> 4) as usize * 4 };
    let len = header.checked_sub(size_of::<Tcp>()).ok_or(Reason::BadTransport)?;
    let at = at + size_of::<Tcp>();
    // SAFETY: the frame's own context.
    if unsafe { dispatcher_read_options(frame.ctx(), at as u32, len as u32) } == 0 {
        return Err(Reason::BadTransport);
    }
    Ok(len)
}
