//! The only file that touches packet pointers.
//!
//! Every access goes through [`View::ptr`], which checks it against the end of the frame. Headers
//! are structs of words; BPF loads and stores need no alignment on the platforms that run XDP, and
//! aligned types make LLVM emit one instruction a word instead of one a byte.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::xdp_md,
    helpers::generated::{
        bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_load_bytes, bpf_xdp_store_bytes,
    },
    programs::XdpContext,
};

/// Bytes by which the start of a frame can be moved back everywhere: of the 256 that XDP keeps,
/// the kernel takes 40 for itself.
pub const HEAD_ROOM: i32 = 192;
/// Start of an Ethernet frame: destination and source MAC.
pub const MACS: usize = 12;

/// IPv4 header without options (RFC 791), fields as on the wire.
#[repr(C)]
pub struct Ipv4 {
    /// Version and header length.
    pub version: u8,
    /// Type of service.
    pub tos: u8,
    /// Total length.
    pub len: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol.
    pub proto: u8,
    /// Header checksum.
    pub check: u16,
    /// Source.
    pub src: u32,
    /// Destination.
    pub dst: u32,
}

/// IPv6 header (RFC 8200), fields as on the wire.
#[repr(C)]
pub struct Ipv6 {
    /// Version, traffic class, flow label.
    pub head: u32,
    /// Payload length.
    pub len: u16,
    /// Next header.
    pub next: u8,
    /// Hop limit.
    pub hops: u8,
    /// Source.
    pub src: [u32; 4],
    /// Destination.
    pub dst: [u32; 4],
}

/// TCP header without options (RFC 9293), fields as on the wire.
#[repr(C)]
pub struct Tcp {
    /// Source and destination port.
    pub ports: u32,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// Data offset in the upper half.
    pub offset: u8,
    /// Flags.
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Checksum.
    pub check: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

/// UDP header (RFC 768), fields as on the wire.
#[repr(C)]
pub struct Udp {
    /// Source and destination port.
    pub ports: u32,
    /// Length.
    pub len: u16,
    /// Checksum, 0 for none (IPv4 only).
    pub check: u16,
}

/// The bounds of a frame at one moment. Resizing ends its life.
#[derive(Clone, Copy)]
pub struct View {
    data: usize,
    end: usize,
}

impl View {
    /// A pointer to a `T` at an offset, if it lies within the frame.
    #[inline(always)]
    pub fn ptr<T>(self, at: usize) -> Option<*mut T> {
        let from = self.data + at;
        if from + size_of::<T>() > self.end { None } else { Some(from as *mut T) }
    }

    /// A copy of a `T` at an offset.
    #[inline(always)]
    pub fn read<T: Copy>(self, at: usize) -> Option<T> {
        // SAFETY: `ptr` checked that the bytes lie within the frame; T is made of integers.
        self.ptr::<T>(at).map(|p| unsafe { *p })
    }

    /// Length of the frame in bytes.
    #[inline(always)]
    pub fn len(self) -> usize {
        self.end - self.data
    }
}

/// A frame and what can be done to it.
#[derive(Clone, Copy)]
pub struct Frame {
    ctx: *mut xdp_md,
}

impl Frame {
    /// The frame of a program's context.
    #[inline(always)]
    pub fn new(ctx: &XdpContext) -> Self {
        Self { ctx: ctx.ctx }
    }

    /// The frame of a raw context.
    #[inline(always)]
    pub fn of(ctx: *mut xdp_md) -> Self {
        Self { ctx }
    }

    /// The raw context, for functions that the verifier checks on their own.
    #[inline(always)]
    pub fn ctx(&self) -> *mut xdp_md {
        self.ctx
    }

    /// Its bounds now.
    #[inline(always)]
    pub fn view(&self) -> View {
        // The fields are 32 bits wide, but the registers then hold pointers. Volatile, so that no
        // pass loads them in a caller and hands them on as 32-bit arguments.
        // SAFETY: the kernel keeps `ctx` valid while the program runs.
        unsafe {
            View {
                data: read_volatile(&raw const (*self.ctx).data) as usize,
                end: read_volatile(&raw const (*self.ctx).data_end) as usize,
            }
        }
    }

    /// Index of the interface it came in on.
    #[inline(always)]
    pub fn ingress(&self) -> u32 {
        // SAFETY: as in `view`.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    /// Copies bytes out; false when they are not all there.
    ///
    /// `to` must be valid for `len` bytes (the verifier checks it), `len` at least 1.
    #[inline(always)]
    pub fn load(&self, at: usize, to: *mut u8, len: usize) -> bool {
        // SAFETY: the helper checks the frame's bounds, the verifier those of `to`.
        unsafe { bpf_xdp_load_bytes(self.ctx, at as u32, to.cast(), len as u32) == 0 }
    }

    /// Copies bytes in; false when there is no room.
    #[inline(always)]
    pub fn store(&self, at: usize, from: *const u8, len: usize) -> bool {
        // SAFETY: the helper checks the frame's bounds, the verifier those of `from`.
        unsafe { bpf_xdp_store_bytes(self.ctx, at as u32, from.cast_mut().cast(), len as u32) == 0 }
    }

    /// Moves the end of the frame; false when the driver has no room.
    #[inline(always)]
    pub fn resize(&self, len: usize) -> bool {
        let delta = len as i32 - self.view().len() as i32;
        // SAFETY: the helper checks the bounds of the buffer.
        delta == 0 || unsafe { bpf_xdp_adjust_tail(self.ctx, delta) == 0 }
    }

    /// Gives the frame a new length, whatever becomes of its content: at the start where that will
    /// do, because drivers have room there, and because generic XDP leaves the end of a frame that
    /// was resized 14 bytes off (kernel 6.18, `bpf_prog_run_generic_xdp`), so that a receiver on
    /// this machine that merges segments would read garbage.
    #[inline(always)]
    pub fn renew(&self, len: usize) -> bool {
        let grow = len as i32 - self.view().len() as i32;
        (grow <= HEAD_ROOM && self.shift(0_i32.wrapping_sub(grow))) || self.resize(len)
    }

    /// Moves the start of the frame: forward for a positive number of bytes.
    #[inline(always)]
    pub fn shift(&self, by: i32) -> bool {
        // SAFETY: the helper checks the bounds of the buffer.
        by == 0 || unsafe { bpf_xdp_adjust_head(self.ctx, by) == 0 }
    }

    /// Sends the frame out of an interface once the program returns its reason.
    #[inline(always)]
    pub fn redirect(&self, ifindex: u32) {
        // SAFETY: a helper without pointers.
        unsafe { bpf_redirect(ifindex, 0) };
    }
}
