//! Held hellos that the daemon releases, or refuses: it runs the `release` program, whose frames become SYNs to backends,
//! or RSTs to clients.

use aya_ebpf::{macros::map, maps::Array};
use dispatcher_common::{
    abi::RELEASES_MAX,
    event::{REFUSED, Release},
    reason::Reason,
    stash::{MARK_TURN, STAGE_FREE, STAGE_HELD, Slot},
};

use crate::{atomic::Word, bind, emit, flows, packet::Frame, sessions, stash, verdict::Verdict};

/// Entry 0 holds the number of the next release in its `slot`.
#[map]
static RELEASES: Array<Release> = Array::with_max_entries(RELEASES_MAX + 1, 0);

/// Takes the next release and binds its slot to the daemon's pick, or refuses its client.
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
        if release.backend == REFUSED {
            return refuse(frame, slot);
        }
        bind::bind(frame, slot, index, release.backend)
    })
}

/// Tells the client of a locked slot that it is not served, and frees the slot.
#[inline(always)]
fn refuse(frame: &Frame, slot: &mut Slot) -> Verdict {
    if flows::get(&slot.key).is_some() {
        // An earlier slot of the connection led to a backend.
        return Verdict(Reason::StaleRelease);
    }
    slot.stage = STAGE_FREE;
    // What was not known before is not known now: who comes again with it would not be held.
    if slot.session.len != 0 && slot.marks & MARK_TURN == 0 {
        sessions::forget_provisional(&slot.session);
    }
    emit::reset(frame, slot)?;
    frame.redirect(slot.client.ifindex);
    Verdict(Reason::ResetOverRate)
}
