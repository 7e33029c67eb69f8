//! What is counted: a reason a packet, and per backend what happened once a connection.

use aya_ebpf::{macros::map, maps::PerCpuArray};
use dispatcher_common::{
    abi,
    opaque::opaque,
    reason::{REASONS_MAX, Reason},
    service::{BUCKETS, BackendStats, BackendTimes, Histogram},
};

#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASONS_MAX, 0);
#[map]
static BACKEND_STATS: PerCpuArray<BackendStats> = PerCpuArray::with_max_entries(abi::DEFAULT_BACKENDS, 0);

#[map]
static BACKEND_TIMES: PerCpuArray<BackendTimes> = PerCpuArray::with_max_entries(abi::DEFAULT_BACKENDS, 0);

/// Counts a packet.
#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: the entry belongs to this CPU, and programs do not preempt one another on it.
        unsafe { *counter += 1 };
    }
}

/// Counts something of a backend.
#[inline(always)]
pub fn backend(index: u32, what: impl FnOnce(&mut BackendStats)) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(index) {
        // SAFETY: as in `count`.
        what(unsafe { &mut *stats });
    }
}

/// Counts how long a backend took, nanoseconds.
#[inline(always)]
pub fn time(index: u32, what: impl FnOnce(&mut BackendTimes) -> &mut Histogram, ns: u64) {
    if let Some(times) = BACKEND_TIMES.get_ptr_mut(index) {
        // SAFETY: as in `count`.
        let histogram = what(unsafe { &mut *times });
        histogram.sum = histogram.sum.wrapping_add(ns);
        let bucket = opaque(Histogram::bucket(ns) as u64) as usize;
        if bucket < BUCKETS {
            histogram.buckets[bucket] += 1;
        }
    }
}
