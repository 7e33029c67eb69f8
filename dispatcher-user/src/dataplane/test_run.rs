//! `BPF_PROG_TEST_RUN`: a program on one frame, without an interface.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use super::syscall::{Attributes, bpf};

/// Frames that the program redirects are sent (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18).
pub const LIVE_FRAMES: u32 = 1 << 1;

/// `BPF_PROG_TEST_RUN` of Linux's bpf.h.
const COMMAND: libc::c_int = 10;
/// Frames are at most a page less the kernel's own head- and tailroom, but they may grow.
const DATA_OUT_MAX: usize = 4096;

/// What a program made of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TestRun {
    /// The program's return value, an XDP action.
    pub retval: u32,
    /// The frame afterwards; empty with [`LIVE_FRAMES`].
    pub data_out: Vec<u8>,
    /// Mean duration of one repetition, nanoseconds.
    pub duration_ns: u32,
}

/// `struct { ... } test` of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct Run {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}
// SAFETY: as the doc comment says, with `pad` for its tail.
unsafe impl Attributes for Run {}

/// `struct xdp_md`.
#[repr(C)]
#[derive(Default)]
struct Context {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

/// Runs an XDP program on a frame, as if it had come in on `ctx_ifindex` (which must be an interface of
/// this namespace with an XDP program or NAPI; the loopback interface when `None`).
pub fn test_run(
    program: BorrowedFd<'_>,
    data_in: &[u8],
    ctx_ifindex: Option<u32>,
    repeat: u32,
    flags: u32,
) -> io::Result<TestRun> {
    let size = |len: usize| u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG));
    let mut data_out = vec![0_u8; if flags & LIVE_FRAMES == 0 { DATA_OUT_MAX } else { 0 }];
    let context = ctx_ifindex.map(|ingress_ifindex| {
        size(data_in.len()).map(|data_end| Context { data_end, ingress_ifindex, ..Context::default() })
    });
    let context = context.transpose()?;
    let mut attributes = Run {
        prog_fd: program.as_raw_fd().unsigned_abs(),
        data_size_in: size(data_in.len())?,
        data_size_out: size(data_out.len())?,
        data_in: data_in.as_ptr().expose_provenance() as u64,
        data_out: if data_out.is_empty() { 0 } else { data_out.as_mut_ptr().expose_provenance() as u64 },
        repeat,
        flags,
        ..Run::default()
    };
    if let Some(context) = &context {
        attributes.ctx_in = std::ptr::from_ref(context).expose_provenance() as u64;
        attributes.ctx_size_in = size(size_of::<Context>())?;
    }
    // SAFETY: the addresses in `attributes` are those of `data_in` and `context` (read) and `data_out`
    // (written), with their lengths, and all of them outlive the call.
    unsafe { bpf(COMMAND, &mut attributes) }?;
    data_out.truncate(attributes.data_size_out as usize);
    Ok(TestRun { retval: attributes.retval, data_out, duration_ns: attributes.duration })
}
