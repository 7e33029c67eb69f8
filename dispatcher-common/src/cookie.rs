//! SYN cookies: the initial sequence number of our SYN-ACK proves a client's address and carries
//! what the SYN to the backend needs.
//!
//! ```text
//!  31         20 19          8 7       0
//! +-------------+-------------+---------+
//! | address MAC |   ISN MAC   | options |   options are masked with hash bits
//! +-------------+-------------+---------+
//! ```
//!
//! The address MAC covers addresses, ports and a time window; the ISN MAC also covers the client's
//! initial sequence number. A first segment must satisfy both, 24 bits. A later segment that comes
//! before the first and carries no timestamp satisfies only the address MAC: it is no stranger, and gets
//! no RST. What passes the ISN MAC by chance would be taken for the start of a stream.

use crate::{flow::FlowKey, siphash::siphash13};

/// MSS values that a cookie can carry: the largest that does not exceed the client's is taken.
pub const MSS_TABLE: [u16; 8] = [536, 1200, 1300, 1360, 1400, 1440, 1452, 1460];

/// Length of a time window as a shift of nanoseconds: 2^36 ns, 68.7 s.
pub const WINDOW_SHIFT: u32 = 36;

/// No window scaling.
pub const NO_WSCALE: u8 = 15;

/// What a cookie carries of the client's SYN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Index into [`MSS_TABLE`].
    pub mss: u8,
    /// Window scale 0-14, or [`NO_WSCALE`].
    pub wscale: u8,
    /// SACK permitted.
    pub sack: bool,
}

impl Options {
    /// One byte: MSS index in bits 5-7, window scale in 1-4, SACK in 0.
    #[inline(always)]
    #[must_use]
    pub const fn pack(self) -> u8 {
        (self.mss & 7) << 5 | (self.wscale & 15) << 1 | self.sack as u8
    }

    /// The reverse of [`pack`](Self::pack).
    #[inline(always)]
    #[must_use]
    pub const fn unpack(byte: u8) -> Self {
        Self { mss: byte >> 5, wscale: byte >> 1 & 15, sack: byte & 1 != 0 }
    }
}

/// Index of the largest table entry that does not exceed `mss`.
#[inline(always)]
#[must_use]
pub const fn mss_index(mss: u16) -> u8 {
    let mut index = 0;
    let mut i = 1;
    while i < MSS_TABLE.len() {
        if MSS_TABLE[i] <= mss {
            index = i as u8;
        }
        i += 1;
    }
    index
}

/// The table's MSS of an index.
#[inline(always)]
#[must_use]
pub const fn mss_of(index: u8) -> u16 {
    MSS_TABLE[(index & 7) as usize]
}

/// What a sequence number that came back is worth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Check {
    /// Not ours.
    Invalid,
    /// Of this client, but the sequence number is not that of its first segment.
    Address,
    /// Of this client and this initial sequence number.
    Full(Options),
}

/// Hash of addresses, ports and time window, from which every part of a cookie is taken.
#[inline(always)]
#[must_use]
pub const fn hash(key: [u64; 2], flow: &FlowKey, window: u64) -> u64 {
    let (s, d) = (&flow.src.words, &flow.dst.words);
    // 24 bits of windows are 36 years.
    let rest = pair(flow.ports, window as u32);
    // The other words of an IPv4-mapped address are the same for all.
    if flow.src.is_v4() {
        siphash13(key, [pair(s[3], d[3])], rest)
    } else {
        siphash13(key, [pair(s[0], s[1]), pair(s[2], s[3]), pair(d[0], d[1]), pair(d[2], d[3])], rest)
    }
}

#[inline(always)]
const fn pair(a: u32, b: u32) -> u64 {
    a as u64 | (b as u64) << 32
}

/// The cookie of a client's initial sequence number.
#[inline(always)]
#[must_use]
pub const fn make(hash: u64, isn: u32, options: Options) -> u32 {
    let mac = hash as u32 & 0xfff;
    let mask = (hash >> 12) as u8;
    mac << 20 | (isn_mac(hash, isn) as u32) << 8 | (options.pack() ^ mask) as u32
}

/// Checks a cookie against the hash and the supposed initial sequence number.
#[inline(always)]
#[must_use]
pub const fn check(hash: u64, isn: u32, cookie: u32) -> Check {
    if cookie >> 20 != hash as u32 & 0xfff {
        return Check::Invalid;
    }
    if (cookie >> 8) as u16 & 0xfff != isn_mac(hash, isn) {
        return Check::Address;
    }
    Check::Full(Options::unpack(cookie as u8 ^ (hash >> 12) as u8))
}

/// Twelve bits that depend on the sequence number by a multiplier that only the key's owner knows.
#[inline(always)]
const fn isn_mac(hash: u64, isn: u32) -> u16 {
    let secret = (hash >> 32) as u32;
    (isn ^ secret).wrapping_mul(secret | 1).wrapping_add((hash >> 16) as u32).wrapping_shr(20) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(port: u16) -> FlowKey {
        FlowKey {
            src: core::net::Ipv4Addr::new(192, 0, 2, 1).into(),
            dst: core::net::Ipv4Addr::new(198, 51, 100, 1).into(),
            ports: crate::flow::ports_word(port, 443),
            proto: 6,
        }
    }

    #[test]
    fn a_cookie_carries_its_options_back() {
        for mss in 0..8 {
            for wscale in 0..16 {
                for sack in [false, true] {
                    let options = Options { mss, wscale, sack };
                    let hash = hash([1, 2], &flow(1000), 7);
                    let cookie = make(hash, 0xdead_beef, options);
                    assert_eq!(check(hash, 0xdead_beef, cookie), Check::Full(options));
                }
            }
        }
    }

    #[test]
    fn another_address_port_window_or_key_is_invalid() {
        let options = Options { mss: 7, wscale: 7, sack: true };
        let mut accepted = 0;
        for port in 0..4096 {
            let cookie = make(hash([1, 2], &flow(port), 7), 1, options);
            assert_ne!(check(hash([1, 2], &flow(port), 7), 1, cookie), Check::Invalid);
            accepted += u32::from(check(hash([1, 2], &flow(port + 1), 7), 1, cookie) != Check::Invalid);
            accepted += u32::from(check(hash([1, 2], &flow(port), 8), 1, cookie) != Check::Invalid);
            accepted += u32::from(check(hash([1, 3], &flow(port), 7), 1, cookie) != Check::Invalid);
        }
        assert!(accepted <= 12, "{accepted} of 12288 strangers passed a 12-bit MAC");
    }

    #[test]
    fn another_sequence_number_keeps_only_the_address() {
        let options = Options { mss: 7, wscale: 7, sack: true };
        let mut full = 0;
        for port in 0..256 {
            let hash = hash([1, 2], &flow(port), 7);
            let cookie = make(hash, 5000, options);
            for isn in 5001..9097 {
                let worth = check(hash, isn, cookie);
                assert_ne!(worth, Check::Invalid);
                full += u32::from(worth != Check::Address);
            }
        }
        assert!(full < 1024, "{full} of 1048576 other sequence numbers passed a 12-bit MAC");
    }

    #[test]
    fn mss_is_rounded_down() {
        assert_eq!(mss_of(mss_index(1460)), 1460);
        assert_eq!(mss_of(mss_index(1459)), 1452);
        assert_eq!(mss_of(mss_index(9000)), 1460);
        assert_eq!(mss_of(mss_index(100)), 536);
    }
}
