//! SipHash-2-4 (Aumasson and Bernstein, 2012) over whole 64-bit words.

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

/// The hash of `words`, each taken as eight little-endian bytes.
#[inline(always)]
#[must_use]
pub const fn siphash24<const N: usize>(key: [u64; 2], words: [u64; N]) -> u64 {
    let mut v = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    let mut i = 0;
    while i <= N {
        let word = if i < N { words[i] } else { (N as u64 * 8) << 56 };
        v[3] ^= word;
        v = round(round(v));
        v[0] ^= word;
        i += 1;
    }
    v[2] ^= 0xff;
    v = round(round(round(round(v))));
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_vectors() {
        // vectors_sip64 of the reference implementation, lengths 0, 8 and 16:
        // key 00..0f, message 00 01 02 ...
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        assert_eq!(siphash24(key, []), 0x726f_db47_dd0e_0e31);
        assert_eq!(siphash24(key, [0x0706_0504_0302_0100]), 0x93f5_f579_9a93_2462);
        assert_eq!(siphash24(key, key), 0x3f2a_cc7f_57c2_9bdb);
    }
}
