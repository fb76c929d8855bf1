//! System allocator with counters, for programs that set it as their global allocator.
#![allow(dead_code, reason = "a program reads some of the counters")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

/// System allocator with counters.
pub(crate) struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicI64 = AtomicI64::new(0);
static PEAK: AtomicI64 = AtomicI64::new(0);

/// Returns the number of successful allocations and reallocations.
pub(crate) fn allocations() -> usize {
    CALLS.load(Ordering::Relaxed)
}

/// Returns the bytes that Rust code has allocated and not freed.
pub(crate) fn live_bytes() -> i64 {
    LIVE.load(Ordering::Relaxed)
}

/// Runs `work`; returns its result and the peak of live bytes above those at the start.
///
/// A reallocation counts as old and new memory at once, as if the block had to move.
pub(crate) fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = live_bytes();
    PEAK.store(before, Ordering::Relaxed);
    let found = work();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    (found, usize::try_from(peak).unwrap_or(0))
}

/// Counts `made`, memory of `bytes` bytes, unless the allocation failed.
fn add(made: *mut u8, bytes: usize) -> *mut u8 {
    if !made.is_null() {
        CALLS.fetch_add(1, Ordering::Relaxed);
        let live = LIVE.fetch_add(bytes as i64, Ordering::Relaxed) + bytes as i64;
        PEAK.fetch_max(live, Ordering::Relaxed);
    }
    made
}

fn remove(bytes: usize) {
    LIVE.fetch_sub(bytes as i64, Ordering::Relaxed);
}

// SAFETY: every call is forwarded unchanged to `System`, and its result is returned unchanged;
// counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duties are those of `System::alloc`.
        add(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duties are those of `System::alloc_zeroed`.
        add(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's duties are those of `System::dealloc`; `memory` came from `System`.
        unsafe { System.dealloc(memory, layout) };
        remove(layout.size());
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's duties are those of `System::realloc`; `memory` came from `System`.
        let made = add(unsafe { System.realloc(memory, layout, size) }, size);
        if !made.is_null() {
            remove(layout.size());
        }
        made
    }
}
