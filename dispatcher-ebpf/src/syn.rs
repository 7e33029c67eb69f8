//! SYN -> SYN-ACK with a stateless cookie, and the check of what comes back.

use dispatcher_common::{
    checksum::fold,
    cookie::{self, Check, MSS_TABLE, NO_WSCALE, WINDOW_SHIFT},
    flow::{FlowKey, ports_swapped},
    globals::Globals,
    opaque::opaque,
    reason::Reason,
    service::{
        FRONTEND_NO_SACK, FRONTEND_NO_TS, FRONTEND_REFUSED, FRONTEND_REFUSED_SACK, FRONTEND_REFUSED_TS,
        FRONTEND_REFUSED_WSCALE, Frontend,
    },
    tcp::{ACK, Options, SYN, TIMESTAMP_WORD},
};

use crate::{
    globals::{now_ns, scratch},
    options,
    packet::{Frame, Tcp, View},
    parse::{Parsed, packet_end},
    reply::{pseudo, sum_header, turn_around},
    verdict::Verdict,
};

const TCP_MIN: usize = size_of::<Tcp>();

/// Segments of the client that the SYN-ACK's window admits before a backend is bound.
const WINDOW_SEGMENTS: u16 = 3;

/// The five option words of a SYN as Linux and others send it, without a walk: what the answer needs
/// of them. False for any other form.
#[inline(always)]
fn usual_options(view: View, at: usize, out: &mut Options) -> bool {
    let Some([mss, sack_ts, tsval, _, wscale]) = view.read::<[u32; 5]>(at) else { return false };
    let mss = mss.to_ne_bytes();
    let wscale = wscale.to_ne_bytes();
    if mss[0] != 2
        || mss[1] != 4
        || sack_ts != u32::from_ne_bytes([4, 2, 8, 10])
        || wscale[0] != 1
        || wscale[1] != 3
        || wscale[2] != 3
    {
        return false;
    }
    out.tsval = u32::from_be(tsval);
    out.mss = u16::from_be_bytes([mss[2], mss[3]]);
    out.wscale = if wscale[3] > 14 { 14 } else { wscale[3] };
    out.sack = 1;
    out.ts = 1;
    true
}

#[inline(always)]
fn mss_word(frontend: &Frontend) -> u32 {
    let [high, low] = frontend.mss.to_be_bytes();
    u32::from_ne_bytes([2, 4, high, low])
}

#[inline(always)]
fn wscale_word(frontend: &Frontend) -> u32 {
    u32::from_ne_bytes([1, 3, 3, frontend.wscale])
}

/// Writes the options of a SYN-ACK over the `words` words of the SYN's, and returns their sum: MSS,
/// SACK permitted and timestamps in words that they share, window scale, zeros.
#[inline(always)]
fn write_options(
    view: View,
    at: usize,
    words: usize,
    isn: u32,
    options: &Options,
    frontend: &Frontend,
) -> Result<u64, Reason> {
    let scratch = scratch()?;
    let out = &mut scratch.header;
    for word in out.iter_mut().take(16) {
        *word = 0;
    }
    let mut from = 5;
    if options.wscale != NO_WSCALE {
        from -= 1;
        out[from] = wscale_word(frontend);
    }
    if options.ts != 0 {
        from -= 3;
        out[from] = if options.sack != 0 { u32::from_ne_bytes([4, 2, 8, 10]) } else { TIMESTAMP_WORD };
        // The client's own ISN as our timestamp: what echoes it tells a later segment's place.
        out[from + 1] = isn.to_be();
        out[from + 2] = options.tsval.to_be();
    } else if options.sack != 0 {
        from -= 1;
        out[from] = u32::from_ne_bytes([1, 1, 4, 2]);
    }
    if options.has_mss != 0 {
        from -= 1;
        out[from] = mss_word(frontend);
    }
    // Through memory, so that the verifier follows one case and not each of them.
    scratch.offset = from as u32;
    let from = opaque(scratch.offset as u64) as usize;
    let mut sum = 0;
    for i in 0..10 {
        if i >= words {
            break;
        }
        let to = view.ptr::<u32>(at + i * 4).ok_or(Reason::BadTransport)?;
        let word = scratch.header[(from + i) & 15];
        // SAFETY: `ptr` checked the bounds.
        unsafe { *to = word };
        sum += word as u64;
    }
    Ok(sum)
}

/// Answers a SYN. The answer never is longer than the SYN: it only carries options that came.
#[inline(never)]
pub fn answer(frame: &Frame, p: &Parsed, frontend: &Frontend, globals: &Globals) -> Verdict {
    let view = frame.view();
    let l4 = p.l4();
    let tcp = view.ptr::<Tcp>(l4).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let len = unsafe { ((*tcp).offset >> 4) as usize * 4 };
    if packet_end(view, p).ok_or(Reason::BadIp)? < l4 + len || len < TCP_MIN {
        return Verdict(Reason::BadTransport);
    }
    let words = len / 4 - 5;
    let refused = frontend.flags & (FRONTEND_NO_SACK | FRONTEND_NO_TS | FRONTEND_REFUSED) != 0;
    let options = &mut scratch()?.parsed;
    let usual = words == 5 && !refused && usual_options(view, l4 + TCP_MIN, options);
    if !usual {
        options::read(frame, p)?;
        if frontend.flags & (FRONTEND_NO_SACK | FRONTEND_REFUSED_SACK) != 0 {
            options.sack = 0;
        }
        if frontend.flags & (FRONTEND_NO_TS | FRONTEND_REFUSED_TS) != 0 {
            options.ts = 0;
        }
        if frontend.flags & FRONTEND_REFUSED_WSCALE != 0 {
            options.wscale = NO_WSCALE;
        }
    }

    let view = frame.view();
    let tcp = view.ptr::<Tcp>(l4).ok_or(Reason::BadTransport)?;
    // SAFETY: `ptr` checked the bounds.
    let tcp = unsafe { &mut *tcp };
    let isn = u32::from_be(tcp.seq);
    let mss = if options.mss < frontend.mss { options.mss } else { frontend.mss };
    let carried =
        cookie::Options { mss: cookie::mss_index(mss), wscale: options.wscale, sack: options.sack != 0 };
    let key = globals.cookie_keys[(globals.epoch & 1) as usize];
    let hash = tuple_hash(key[0], key[1], &p.key, now_ns() >> WINDOW_SHIFT);
    tcp.ports = ports_swapped(p.key.ports);
    tcp.seq = cookie::make(hash, isn, carried).to_be();
    tcp.ack = isn.wrapping_add(1).to_be();
    tcp.flags = SYN | ACK;
    let window = if mss < MSS_TABLE[0] { MSS_TABLE[0] } else { mss };
    tcp.window = (window * WINDOW_SEGMENTS).to_be();
    tcp.check = 0;
    tcp.urgent = 0;
    let mut sum = sum_header(tcp) + pseudo(p, len);

    if usual {
        let out = view.ptr::<[u32; 5]>(l4 + TCP_MIN).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        let out = unsafe { &mut *out };
        // SACK permitted and the head of the timestamps in word 1 stay.
        out[0] = mss_word(frontend);
        out[2] = isn.to_be();
        out[3] = options.tsval.to_be();
        out[4] = wscale_word(frontend);
        for word in out {
            sum += *word as u64;
        }
    } else {
        sum += write_options(view, l4 + TCP_MIN, words, isn, options, frontend)?;
    }
    tcp.check = !fold(sum);
    turn_around(frame, p, len)?;
    // A SYN with data (RFC 7413) gets no cookie for it: what is beyond the header is padding now.
    frame.redirect(frame.ingress());
    Verdict(Reason::SynAnswered)
}

#[inline(never)]
fn tuple_hash(key0: u64, key1: u64, flow: &FlowKey, window: u64) -> u64 {
    cookie::hash([key0, key1], flow, window)
}

/// Checks a cookie against both keys and the current and the previous time window.
#[inline(never)]
pub fn check(globals: &Globals, flow: &FlowKey, isn: u32, cookie: u32, out: &mut cookie::Options) -> u32 {
    let window = now_ns() >> WINDOW_SHIFT;
    let mut worth = INVALID;
    for attempt in 0..4_u32 {
        let key = globals.cookie_keys[((globals.epoch ^ (attempt >> 1)) & 1) as usize];
        let hash = tuple_hash(key[0], key[1], flow, window.wrapping_sub((attempt & 1) as u64));
        match cookie::check(hash, isn, cookie) {
            Check::Invalid => {}
            // By chance, perhaps: another key or window may say more.
            Check::Address => worth = ADDRESS,
            Check::Full(options) => {
                *out = options;
                return FULL;
            }
        }
    }
    worth
}

/// [`check`]: not ours.
pub const INVALID: u32 = 0;
/// [`check`]: ours, but not with this initial sequence number.
pub const ADDRESS: u32 = 1;
/// [`check`]: ours.
pub const FULL: u32 = 2;
