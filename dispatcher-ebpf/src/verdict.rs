//! How a stage ends.

use core::{convert::Infallible, ops::FromResidual};

use dispatcher_common::reason::{Kind, Reason};

/// The one reason in which a packet ends. `?` on a `Result<_, Reason>` ends a stage with its error.
/// It is one register, where a `Result<Reason, Reason>` would be returned through memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Verdict(pub Reason);

impl Verdict {
    /// True for this reason.
    #[inline(always)]
    pub fn is(self, reason: Reason) -> bool {
        self.0 as u32 == reason as u32
    }

    /// True when the packet is dropped.
    #[inline(always)]
    pub fn is_drop(self) -> bool {
        matches!(self.0.kind(), Kind::Drop)
    }
}

impl FromResidual<Result<Infallible, Reason>> for Verdict {
    #[inline(always)]
    fn from_residual(residual: Result<Infallible, Reason>) -> Self {
        match residual {
            Err(reason) => Self(reason),
        }
    }
}
