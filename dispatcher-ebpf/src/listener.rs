//! SYNs to listeners of the daemon, which the kernel's own TCP serves: while more come than it can remember, they are
//! answered here with the cookie that it would give, and takes back.

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp, bpf_tcp_gen_syncookie},
};
use dispatcher_common::{
    checksum::fold,
    flow::ports_swapped,
    opaque::opaque,
    reason::Reason,
    tcp::{ACK, SYN},
};

use crate::{
    globals::scratch,
    packet::{Frame, Ipv4, Ipv6, Tcp},
    parse::Parsed,
    reply::{pseudo, sum_header, turn_around},
    verdict::Verdict,
};

/// Length of a TCP header with the one option of an answer, MSS.
const LEN: usize = size_of::<Tcp>() + 4;
/// Window of an answer: what cannot be remembered has no scale (RFC 4987 section 3.6).
const WINDOW: u16 = 14_600;

/// Answers a SYN, if the listener's queue is full; else it goes up like all that follows.
#[inline(always)]
pub fn syn(frame: &Frame, p: &Parsed) -> Verdict {
    let pass = Verdict(Reason::ToDaemon);
    let scratch = scratch()?;
    let tcp = frame.view().ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let len = unsafe { ((*tcp).offset >> 4) as usize * 4 };
    let len = opaque(len as u64) as usize & 0x3f;
    let ip = if p.is_v4() { size_of::<Ipv4>() } else { size_of::<Ipv6>() };
    if len < size_of::<Tcp>()
        || !frame.load(p.l3(), scratch.hello.as_mut_ptr(), ip)
        || !frame.load(p.l4(), scratch.payload.as_mut_ptr(), len)
    {
        return pass;
    }
    // As `struct bpf_sock_tuple`: addresses, then ports, as on the wire.
    let words = &mut scratch.header;
    let size = if p.is_v4() {
        words[0] = p.key.src.words[3];
        words[1] = p.key.dst.words[3];
        words[2] = p.key.ports;
        12
    } else {
        let (src, dst) = (&p.key.src.words, &p.key.dst.words);
        (words[0], words[1], words[2], words[3]) = (src[0], src[1], src[2], src[3]);
        (words[4], words[5], words[6], words[7]) = (dst[0], dst[1], dst[2], dst[3]);
        words[8] = p.key.ports;
        36
    };
    let tuple = words.as_mut_ptr().cast::<bpf_sock_tuple>();
    // SAFETY: the frame's own context; the tuple has that size; all ones: the namespace of the interface.
    let socket = unsafe { bpf_skc_lookup_tcp(frame.ctx().cast(), tuple, size, u64::MAX, 0) };
    if socket.is_null() {
        return pass;
    }
    // SAFETY: the socket is held until it is released; the headers are whole, in memory of a map.
    let cookie = unsafe {
        let cookie = bpf_tcp_gen_syncookie(
            socket.cast(),
            scratch.hello.as_mut_ptr().cast(),
            ip as u32,
            scratch.payload.as_mut_ptr().cast(),
            len as u32,
        );
        bpf_sk_release(socket.cast());
        cookie
    };
    // No listener, or it can remember this one.
    if cookie < 0 {
        return pass;
    }
    if !frame.resize(p.l4() + LEN) {
        return Verdict(Reason::NoRoom);
    }
    answer(frame, p, cookie as u32, (cookie >> 32) as u16)?;
    frame.redirect(frame.ingress());
    Verdict(Reason::SynCookie)
}

/// Makes the SYN an answer with a cookie, which may be longer than the SYN was.
#[inline(always)]
fn answer(frame: &Frame, p: &Parsed, cookie: u32, mss: u16) -> Result<(), Reason> {
    let view = frame.view();
    let tcp = view.ptr::<Tcp>(p.l4()).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &mut *tcp };
    let isn = u32::from_be(tcp.seq);
    tcp.ports = ports_swapped(p.key.ports);
    tcp.seq = cookie.to_be();
    tcp.ack = isn.wrapping_add(1).to_be();
    tcp.offset = (LEN as u8) << 2;
    tcp.flags = SYN | ACK;
    tcp.window = WINDOW.to_be();
    tcp.check = 0;
    tcp.urgent = 0;
    let option = view.ptr::<u32>(p.l4() + size_of::<Tcp>()).ok_or(Reason::BadTransport)?;
    let [high, low] = mss.to_be_bytes();
    let word = u32::from_ne_bytes([2, 4, high, low]);
    // SAFETY: `ptr` checked the bounds.
    unsafe { *option = word };
    tcp.check = !fold(sum_header(tcp) + pseudo(p, LEN) + word as u64);
    turn_around(frame, p, LEN)
}
