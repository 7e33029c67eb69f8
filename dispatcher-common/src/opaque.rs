//! Hiding a value's history from the optimizer and from the verifier.

/// Returns its argument. On BPF the value passes an empty `asm!`, so that LLVM neither checks one
/// register and uses another, nor derives the value from earlier arithmetic; the verifier sees
/// what the next bounds check says, which lets it merge the paths that led here.
#[inline(always)]
#[must_use]
pub fn opaque(x: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut x = x;
        // SAFETY: moves a register to itself; no memory, stack or flags are touched.
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) x, options(nomem, nostack, preserves_flags)) };
        x
    }
    #[cfg(not(target_arch = "bpf"))]
    x
}

/// Returns `x`, of which the verifier then knows nothing: `salt` must come from memory that it does
/// not track (a map value). Paths through a loop that differ only in what is known of `x` merge.
#[inline(always)]
#[must_use]
pub fn forget(x: usize, salt: u64) -> usize {
    (opaque(x as u64 ^ salt) ^ salt) as usize
}

/// Zeros that LLVM does not write by a call of a byte-wise `memset`.
#[inline(always)]
#[must_use]
pub fn zeros() -> [u8; 32] {
    let word = opaque(0);
    // SAFETY: 32 bytes of integers, of which any value is valid.
    unsafe { core::mem::transmute::<[u64; 4], [u8; 32]>([word, word, word, word]) }
}
