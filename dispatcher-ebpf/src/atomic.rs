//! The three atomic operations that the data path needs. `core::sync::atomic` offers none that
//! read and write on this target, so they come from the compiler's intrinsics (BPF CPU v3).

use core::intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg, atomic_xadd, atomic_xchg};

/// A word in a map value.
#[derive(Clone, Copy)]
pub struct Word(*mut u32);

impl Word {
    /// Wraps a field of a map value, which outlives the program run.
    #[inline(always)]
    pub fn new(word: &mut u32) -> Self {
        Self(word)
    }

    /// Adds a number; returns what was there before.
    #[inline(always)]
    pub fn add(self, number: u32) -> u32 {
        // SAFETY: `new` took it from a reference into a map value: aligned and alive.
        unsafe { atomic_xadd::<u32, u32, { SeqCst }>(self.0, number) }
    }

    /// True when it is 0 now.
    #[inline(always)]
    pub fn is_zero(self) -> bool {
        // SAFETY: as in `add`.
        unsafe { self.0.read_volatile() == 0 }
    }

    /// From 0 to 1; false when it is 1 already.
    #[inline(always)]
    pub fn try_lock(self) -> bool {
        // SAFETY: as in `add`.
        unsafe { atomic_cxchg::<u32, { SeqCst }, { SeqCst }>(self.0, 0, 1).1 }
    }

    /// Back to 0.
    #[inline(always)]
    pub fn unlock(self) {
        // SAFETY: as in `add`.
        unsafe { atomic_xchg::<u32, { SeqCst }>(self.0, 0) };
    }
}
