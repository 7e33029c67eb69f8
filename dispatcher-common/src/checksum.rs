//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! One's complement sums do not depend on byte order as long as every word is read the same way
//! (RFC 1071 section 2), so words are taken from memory as they are.

/// Folds a sum below 2^47 (32,767 words of 32 bits) to 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// What to add to a sum when the word `old` becomes `new` (RFC 1624 equation 3: `~m + m'`).
#[inline(always)]
#[must_use]
pub const fn change(old: u32, new: u32) -> u64 {
    !old as u64 + new as u64
}

/// Updates a checksum field, as it stands in the packet, by a sum of changes.
#[inline(always)]
#[must_use]
pub const fn update(field: u16, changes: u64) -> u16 {
    !fold(!field as u64 + changes)
}

/// The sum over bytes, padded with a zero byte when odd.
#[must_use]
pub fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| match pair {
            [a, b] => u64::from(u16::from_ne_bytes([*a, *b])),
            [a] => u64::from(u16::from_ne_bytes([*a, 0])),
            _ => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc1071_example() {
        // RFC 1071 section 3: the bytes sum to ddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn rfc1624_example() {
        // RFC 1624 section 4: checksum dd2f, word 5555 becomes 3285: new checksum 0000.
        let word = |w: u16| u32::from(u16::from_ne_bytes(w.to_be_bytes()));
        let field = u16::from_ne_bytes(0xdd2f_u16.to_be_bytes());
        let updated = update(field, u64::from(!word(0x5555) as u16) + u64::from(word(0x3285)));
        assert_eq!(updated, 0);
    }

    #[test]
    fn the_largest_sums_fold() {
        for sum in (0..1000).map(|i| (1_u64 << 47) - 1 - i).chain((0..1000).map(|i| 0xffff_0000 + i * 7)) {
            // 2^16 is 1 modulo 65535, so folding keeps the remainder; only 0 folds to 0.
            assert_eq!(u64::from(fold(sum)) % 0xffff, sum % 0xffff);
            assert_ne!(fold(sum), 0);
        }
    }

    #[test]
    fn update_equals_recomputation() {
        let mut state = 0x1234_5678_9abc_def0_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..10_000 {
            let mut bytes = [0_u8; 40];
            bytes.iter_mut().for_each(|b| *b = next() as u8);
            let field = !fold(sum(&bytes));
            let (old, new) = (u32::from_ne_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]), next() as u32);
            bytes[8..12].copy_from_slice(&new.to_ne_bytes());
            assert_eq!(update(field, change(old, new)), !fold(sum(&bytes)));
        }
    }
}
