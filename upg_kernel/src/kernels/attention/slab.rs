//! Memory of a slab of the KV cache.
#![forbid(unsafe_code)]

use bytemuck::Pod;
use memmap2::{MmapMut, MmapOptions};
use std::io::Result;
use std::marker::PhantomData;

/// Size of a huge page on x86-64 and, with pages of 4 KiB, on 64-bit ARM.
const HUGE_PAGE: usize = 2 << 20;

/// Array of fixed length, initially zero.
///
/// Larger slabs start at a huge page, and ask Linux for such pages. Attention over a long context
/// reads from so many places that it is otherwise limited by address translation (SmolLM2 at 4096
/// positions, one Zen 4 core: 62 tokens/s, 70 with huge pages).
#[derive(Debug)]
pub(crate) struct Slab<T> {
    /// Mapping; `None` if there are no elements.
    memory: Option<MmapMut>,
    /// Byte offset of the first element in `memory`.
    start: usize,
    /// Size of the elements in bytes.
    size: usize,
    elements: PhantomData<T>,
}

impl<T> Default for Slab<T> {
    /// Returns a slab without elements, which takes no memory.
    fn default() -> Self {
        Self {
            memory: None,
            start: 0,
            size: 0,
            elements: PhantomData,
        }
    }
}

impl<T: Pod> Slab<T> {
    /// Allocates `len` zeros.
    ///
    /// Errors: out of memory, or more bytes than a `usize` holds.
    pub(crate) fn zeros(len: usize) -> Result<Self> {
        let no_memory = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        let size = len.checked_mul(size_of::<T>()).ok_or_else(no_memory)?;
        let is_large = size >= HUGE_PAGE;
        // Untouched pages take no memory.
        let spare = if is_large { HUGE_PAGE } else { 0 };
        let mapped = size.checked_add(spare).ok_or_else(no_memory)?;
        let memory = MmapOptions::new().len(mapped).map_anon()?;
        let start = match is_large {
            true => memory.as_ptr().align_offset(HUGE_PAGE).min(spare),
            false => 0,
        };
        #[cfg(target_os = "linux")]
        if is_large {
            // Without huge pages in the kernel, small pages work too.
            let _ = memory.advise(memmap2::Advice::HugePage);
        }
        Ok(Self {
            memory: Some(memory),
            start,
            size,
            elements: PhantomData,
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.size == 0
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        match &self.memory {
            Some(memory) => bytemuck::cast_slice(&memory[self.start..self.start + self.size]),
            None => &[],
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        match &mut self.memory {
            Some(memory) => {
                bytemuck::cast_slice_mut(&mut memory[self.start..self.start + self.size])
            }
            None => &mut [],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_are_zero_and_keep_what_is_written() {
        for len in [1, 1000, HUGE_PAGE / 4, HUGE_PAGE / 4 + 1, 3 << 20] {
            let mut slab = Slab::<f32>::zeros(len).unwrap();
            assert_eq!(slab.as_slice().len(), len);
            assert!(slab.as_slice().iter().all(|&x| x == 0.0));
            let at = slab.as_slice().as_ptr().addr();
            assert!(len < HUGE_PAGE / 4 || at.is_multiple_of(HUGE_PAGE));
            slab.as_mut_slice()[len - 1] = 1.5;
            assert_eq!(slab.as_slice()[len - 1], 1.5);
        }
        assert!(Slab::<f32>::default().as_slice().is_empty());
        assert!(Slab::<f32>::default().is_empty());
    }

    #[test]
    fn sizes_past_the_memory_are_errors() {
        for len in [usize::MAX, usize::MAX / 4, usize::MAX / 8] {
            assert!(Slab::<f32>::zeros(len).is_err());
        }
    }
}
