//! An allocator that knows how many bytes are allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, Ordering};

/// The allocator of the system, counted.
pub struct Counting;

static LIVE: AtomicI64 = AtomicI64::new(0);

/// Bytes that are allocated and not freed, by Rust.
pub fn live_bytes() -> i64 {
    LIVE.load(Ordering::Relaxed)
}

fn add(bytes: usize) {
    LIVE.fetch_add(bytes as i64, Ordering::Relaxed);
}

fn remove(bytes: usize) {
    LIVE.fetch_sub(bytes as i64, Ordering::Relaxed);
}

// SAFETY: every call is passed on to `System` as it is, whose results are returned as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duties are those of `System::alloc`.
        let made = unsafe { System.alloc(layout) };
        if !made.is_null() {
            add(layout.size());
        }
        made
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duties are those of `System::alloc_zeroed`.
        let made = unsafe { System.alloc_zeroed(layout) };
        if !made.is_null() {
            add(layout.size());
        }
        made
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's duties are those of `System::dealloc`; `memory` came from `System`.
        unsafe { System.dealloc(memory, layout) };
        remove(layout.size());
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's duties are those of `System::realloc`; `memory` came from `System`.
        let made = unsafe { System.realloc(memory, layout, size) };
        if !made.is_null() {
            remove(layout.size());
            add(size);
        }
        made
    }
}
