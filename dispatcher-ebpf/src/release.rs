//! Held hellos that the daemon releases: it runs the `release` program, whose frames become SYNs.

use aya_ebpf::{macros::map, maps::Array};
use dispatcher_common::{abi::RELEASES_MAX, event::Release, reason::Reason, stash::STAGE_HELD};

use crate::{atomic::Word, bind, packet::Frame, stash, verdict::Verdict};

/// Entry 0 holds the number of the next release in its `slot`.
#[map]
static RELEASES: Array<Release> = Array::with_max_entries(RELEASES_MAX + 1, 0);

/// Takes the next release and binds its slot to the daemon's pick.
#[inline(always)]
pub fn next(frame: &Frame) -> Verdict {
    let cursor = RELEASES.get_ptr_mut(0).ok_or(Reason::Internal)?;
    // SAFETY: array entries live as long as the map.
    let number = Word::new(unsafe { &mut (*cursor).slot }).add(1);
    let release = RELEASES.get(number).ok_or(Reason::Internal)?;
    let index = release.slot;
    stash::locked(index, |slot| {
        if slot.key != release.flow || slot.stage != STAGE_HELD {
            return Verdict(Reason::StaleRelease);
        }
        bind::bind(frame, slot, index, release.backend)
    })
}
