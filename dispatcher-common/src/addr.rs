//! Addresses as they stand in map keys and values.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address as IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2), as four
/// words in network byte order in memory, so that one path serves both families.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Addr {
    /// The sixteen bytes of the address, as 32-bit words read from memory as they are.
    pub words: [u32; 4],
}

/// The third word of an IPv4-mapped address: `00 00 ff ff` in memory.
pub const V4_MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Addr {
    /// The mapped form of an IPv4 address given as the word read from the packet.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, V4_MAPPED, word] }
    }

    /// True for an IPv4-mapped address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == V4_MAPPED
    }

    /// A copy of four words, word by word: LLVM calls its byte-wise `memmove` for a whole array.
    #[inline(always)]
    #[must_use]
    pub const fn load(words: &[u32; 4]) -> Self {
        Self { words: [words[0], words[1], words[2], words[3]] }
    }

    /// Writes the four words, word by word.
    #[inline(always)]
    pub const fn store(&self, to: &mut [u32; 4]) {
        to[0] = self.words[0];
        to[1] = self.words[1];
        to[2] = self.words[2];
        to[3] = self.words[3];
    }

    /// From sixteen bytes in network order.
    #[must_use]
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self {
            words: [
                u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
                u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
                u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
                u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
            ],
        }
    }

    /// The sixteen bytes in network order.
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = [
            self.words[0].to_ne_bytes(),
            self.words[1].to_ne_bytes(),
            self.words[2].to_ne_bytes(),
            self.words[3].to_ne_bytes(),
        ];
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// Bit number of this address in the filter of [`Globals`](crate::globals::Globals).
    #[inline(always)]
    #[must_use]
    pub const fn filter_bit(&self) -> u32 {
        let w = self.words[0] ^ self.words[1] ^ self.words[2] ^ self.words[3];
        w.wrapping_mul(0x9e37_79b1) >> 16
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => Self::from_octets(v6.octets()),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(v4: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(v4.octets()))
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        if addr.is_v4() {
            IpAddr::V4(Ipv4Addr::from(addr.words[3].to_ne_bytes()))
        } else {
            IpAddr::V6(Ipv6Addr::from(addr.octets()))
        }
    }
}

impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_survive_the_round_trip() {
        for text in ["192.0.2.7", "0.0.0.0", "2001:db8::1", "::1"] {
            let ip: IpAddr = text.parse().expect("address");
            assert_eq!(IpAddr::from(Addr::from(ip)), ip);
            assert_eq!(Addr::from(ip).is_v4(), ip.is_ipv4());
        }
    }

    #[test]
    fn words_hold_the_bytes_in_network_order() {
        let addr = Addr::from(IpAddr::from([192, 0, 2, 7]));
        assert_eq!(addr.octets(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 7]);
    }
}
