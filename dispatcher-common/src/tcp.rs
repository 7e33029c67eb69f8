//! TCP header arithmetic: flags, options, window scaling (RFC 9293, RFC 7323, RFC 2018).

use crate::{cookie::NO_WSCALE, opaque::forget};

/// FIN.
pub const FIN: u8 = 0x01;
/// SYN.
pub const SYN: u8 = 0x02;
/// RST.
pub const RST: u8 = 0x04;
/// PSH.
pub const PSH: u8 = 0x08;
/// ACK.
pub const ACK: u8 = 0x10;

/// The four bytes that nearly every stack puts before timestamps: NOP, NOP, kind 8, length 10.
pub const TIMESTAMP_WORD: u32 = u32::from_ne_bytes([1, 1, 8, 10]);

/// Room for options. 40 is the most that a header holds; 64 makes every masked index valid.
pub const OPTIONS_ROOM: usize = 64;
/// Options as copied from a header.
pub type OptionBytes = [u8; OPTIONS_ROOM];

/// Options and NOPs that are read in one header. Stacks send up to eight.
const ITEMS_MAX: usize = 20;

const MASK: usize = OPTIONS_ROOM - 1;

/// What the options of a segment say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Options {
    /// TSval, 0 without timestamps.
    pub tsval: u32,
    /// TSecr, 0 without timestamps.
    pub tsecr: u32,
    /// Maximum segment size; 536 where the option is missing (RFC 9293 section 3.7.1).
    pub mss: u16,
    /// Window scale at most 14 (RFC 7323 section 2.3), or [`NO_WSCALE`].
    pub wscale: u8,
    /// 1: SACK permitted.
    pub sack: u8,
    /// 1: timestamps present.
    pub ts: u8,
    /// 1: MSS present.
    pub has_mss: u8,
    /// Offset of the timestamp option, valid if `ts`.
    pub ts_at: u8,
    /// Offset of the SACK option, valid if `sack_len`.
    pub sack_at: u8,
    /// Length of the SACK option, 0 for none.
    pub sack_len: u8,
    /// Unused, zero.
    pub pad: [u8; 3],
}

impl Options {
    /// No options at all.
    pub const NONE: Self = Self {
        tsval: 0,
        tsecr: 0,
        mss: 536,
        wscale: NO_WSCALE,
        sack: 0,
        ts: 0,
        has_mss: 0,
        ts_at: 0,
        sack_at: 0,
        sack_len: 0,
        pad: [0; 3],
    };
}

#[inline(always)]
fn be32(bytes: &OptionBytes, at: usize) -> u32 {
    u32::from_be_bytes([
        bytes[at & MASK],
        bytes[(at + 1) & MASK],
        bytes[(at + 2) & MASK],
        bytes[(at + 3) & MASK],
    ])
}

#[inline(always)]
fn put_be32(bytes: &mut OptionBytes, at: usize, value: u32) {
    let [a, b, c, d] = value.to_be_bytes();
    bytes[at & MASK] = a;
    bytes[(at + 1) & MASK] = b;
    bytes[(at + 2) & MASK] = c;
    bytes[(at + 3) & MASK] = d;
}

/// One step of a walk: the option at `at`, as (kind, length), or `None` at the end or at an option
/// that does not fit. NOP has length 1.
#[inline(always)]
fn option_at(bytes: &OptionBytes, len: usize, at: usize) -> Option<(u8, usize)> {
    if at >= len || at >= 40 {
        return None;
    }
    match bytes[at & MASK] {
        0 => None,
        1 => Some((1, 1)),
        kind => {
            let size = bytes[(at + 1) & MASK] as usize;
            if size < 2 || at + size > len { None } else { Some((kind, size)) }
        }
    }
}

/// Reads the options in the first `len` bytes into `out`. Stops at what it cannot read.
#[inline(always)]
pub fn parse_options(bytes: &OptionBytes, len: usize, out: &mut Options) {
    *out = Options::NONE;
    let mut at = 0;
    for _ in 0..ITEMS_MAX {
        at = forget(at, bytes[MASK] as u64) & MASK;
        let Some((kind, size)) = option_at(bytes, len, at) else { return };
        match (kind, size) {
            (2, 4) => {
                out.mss = u16::from_be_bytes([bytes[(at + 2) & MASK], bytes[(at + 3) & MASK]]);
                out.has_mss = 1;
            }
            (3, 3) => out.wscale = bytes[(at + 2) & MASK].min(14),
            (4, 2) => out.sack = 1,
            (5, 10 | 18 | 26 | 34) => {
                out.sack_at = at as u8;
                out.sack_len = size as u8;
            }
            (8, 10) => {
                out.ts = 1;
                out.ts_at = at as u8;
                out.tsval = be32(bytes, at + 2);
                out.tsecr = be32(bytes, at + 6);
            }
            _ => {}
        }
        at += size;
    }
}

/// How the options of an established flow change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Toward the backend (SACK edges, TSecr) or toward the client (TSval).
    pub to_backend: bool,
    /// Added to SACK edges.
    pub seq_add: u32,
    /// Added to TSecr or TSval.
    pub ts_add: u32,
    /// Replace SACK by NOPs.
    pub strip_sack: bool,
    /// Replace timestamps by NOPs.
    pub strip_ts: bool,
}

/// Translates options in place, whatever their order and alignment. `found` is what
/// [`parse_options`] found in them.
#[inline(always)]
pub fn translate_options(bytes: &mut OptionBytes, found: &Options, how: Translation) {
    if found.ts != 0 {
        let at = found.ts_at as usize;
        if how.strip_ts {
            for i in 0..10 {
                bytes[(at + i) & MASK] = 1;
            }
        } else {
            // TSval is at 2, TSecr at 6.
            let field = if how.to_backend { at + 6 } else { at + 2 };
            let value = be32(bytes, field).wrapping_add(how.ts_add);
            put_be32(bytes, field, value);
        }
    }
    if found.sack_len != 0 && how.to_backend {
        let (at, len) = (found.sack_at as usize, found.sack_len as usize);
        if how.strip_sack {
            for i in 0..34 {
                if i >= len {
                    break;
                }
                bytes[(at + i) & MASK] = 1;
            }
        } else {
            for edge in 0..8 {
                if edge * 4 + 2 >= len {
                    break;
                }
                let field = at + 2 + edge * 4;
                let value = be32(bytes, field).wrapping_add(how.seq_add);
                put_be32(bytes, field, value);
            }
        }
    }
}

/// Shifts a window field (host order): left by a positive shift, saturating, else right.
#[inline(always)]
#[must_use]
pub const fn scale_window(field: u16, shift: i8) -> u16 {
    if shift >= 0 {
        let wide = (field as u64) << (shift as u32 & 15);
        if wide > 0xffff { 0xffff } else { wide as u16 }
    } else {
        field >> (shift.unsigned_abs() as u32 & 15)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Options {
        let mut room = [0xee; OPTIONS_ROOM];
        room[..bytes.len()].copy_from_slice(bytes);
        let mut out = Options::NONE;
        parse_options(&room, bytes.len(), &mut out);
        out
    }

    const LINUX_SYN: [u8; 20] = [2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0, 1, 3, 3, 7];

    #[test]
    fn linux_syn() {
        let options = parse(&LINUX_SYN);
        assert_eq!(options.mss, 1460);
        assert_eq!((options.wscale, options.sack, options.ts, options.tsval), (7, 1, 1, 9));
    }

    #[test]
    fn every_prefix_and_every_byte_value_is_survived() {
        for end in 0..=LINUX_SYN.len() {
            parse(&LINUX_SYN[..end]);
            for at in 0..end {
                for value in 0..=255 {
                    let mut bytes = LINUX_SYN;
                    bytes[at] = value;
                    parse(&bytes[..end]);
                }
            }
        }
    }

    #[test]
    fn lying_lengths_end_the_walk() {
        assert_eq!(parse(&[2, 4, 5]), Options::NONE);
        assert_eq!(parse(&[8, 0, 1, 1]), Options::NONE);
        assert_eq!(parse(&[3, 3, 15, 2, 1]).wscale, 14);
    }

    #[test]
    fn sack_and_timestamps_are_translated_at_any_alignment() {
        let mut room = [0; OPTIONS_ROOM];
        // kind 8 at an odd offset, then SACK with one block.
        let bytes = [1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 5, 10, 0, 0, 0, 10, 0, 0, 0, 20, 0, 0, 0];
        room[..bytes.len()].copy_from_slice(&bytes);
        let how = Translation { to_backend: true, seq_add: 5, ts_add: 7, strip_sack: false, strip_ts: false };
        let mut found = Options::NONE;
        parse_options(&room, bytes.len(), &mut found);
        translate_options(&mut room, &found, how);
        assert_eq!(be32(&room, 3), 1);
        assert_eq!(be32(&room, 7), 9);
        assert_eq!((be32(&room, 13), be32(&room, 17)), (15, 25));
        let mut room2 = room;
        translate_options(&mut room2, &found, Translation { strip_sack: true, strip_ts: true, ..how });
        assert!(room2[..21].iter().all(|b| *b == 1), "{room2:?}");
    }

    #[test]
    fn window_shifts_saturate() {
        assert_eq!(scale_window(1000, 2), 4000);
        assert_eq!(scale_window(40000, 2), 0xffff);
        assert_eq!(scale_window(4000, -2), 1000);
        assert_eq!(scale_window(4000, 0), 4000);
    }
}
