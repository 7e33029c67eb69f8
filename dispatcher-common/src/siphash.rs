//! SipHash (Aumasson and Bernstein, 2012) over whole 64-bit words and a tail of seven bytes, so that
//! the block that ends every message with its length carries data too; with any numbers of rounds.

#[inline(always)]
const fn round(v: [u64; 4]) -> [u64; 4] {
    let [mut v0, mut v1, mut v2, mut v3] = v;
    v0 = v0.wrapping_add(v1);
    v2 = v2.wrapping_add(v3);
    v1 = v1.rotate_left(13) ^ v0;
    v3 = v3.rotate_left(16) ^ v2;
    v0 = v0.rotate_left(32);
    v2 = v2.wrapping_add(v1);
    v0 = v0.wrapping_add(v3);
    v1 = v1.rotate_left(17) ^ v2;
    v3 = v3.rotate_left(21) ^ v0;
    v2 = v2.rotate_left(32);
    [v0, v1, v2, v3]
}

/// SipHash-1-3 of `words`, each taken as eight little-endian bytes, and the lower seven bytes of
/// `tail`. Fewer rounds than 2-4, and the
/// usual choice where an attacker only sees truncated output (Rust's and Linux's hash tables).
#[inline(always)]
#[must_use]
pub const fn siphash13<const N: usize>(key: [u64; 2], words: [u64; N], tail: u64) -> u64 {
    siphash::<1, 3, N>(key, words, tail)
}

#[inline(always)]
const fn rounds(mut v: [u64; 4], count: usize) -> [u64; 4] {
    let mut i = 0;
    while i < count {
        v = round(v);
        i += 1;
    }
    v
}

#[inline(always)]
const fn siphash<const C: usize, const D: usize, const N: usize>(
    key: [u64; 2],
    words: [u64; N],
    tail: u64,
) -> u64 {
    let mut v = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    let mut i = 0;
    while i <= N {
        let word = if i < N { words[i] } else { tail << 8 >> 8 | (N as u64 * 8 + 7) << 56 };
        v[3] ^= word;
        v = rounds(v, C);
        v[0] ^= word;
        i += 1;
    }
    v[2] ^= 0xff;
    v = rounds(v, D);
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_vectors() {
        // vectors_sip64 of the reference implementation, lengths 7, 15 and 23 (15 is the example in
        // appendix A of the paper): key 00..0f, message 00 01 02 ...
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        assert_eq!(siphash::<2, 4, 0>(key, [], key[0]), 0xab02_00f5_8b01_d137);
        assert_eq!(siphash::<2, 4, 1>(key, [key[0]], key[1]), 0xa129_ca61_49be_45e5);
        assert_eq!(siphash::<2, 4, 2>(key, key, 0x1716_1514_1312_1110), 0xa80c_038c_cd5c_cec8);
    }

    #[test]
    fn one_three_is_what_std_computes() {
        // `DefaultHasher::new()` is SipHash-1-3 with a key of zeros.
        extern crate std;
        use core::hash::Hasher as _;
        for seed in 0..1000_u64 {
            let words = [seed, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), !seed];
            let mut std = std::hash::DefaultHasher::new();
            words.iter().for_each(|word| std.write(&word.to_le_bytes()));
            std.write(&seed.to_le_bytes()[..7]);
            assert_eq!(siphash13([0, 0], words, seed), std.finish());
        }
    }
}
