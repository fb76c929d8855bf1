//! Block tables of the KV cache: the memory blocks that hold the keys
//! and values of a sequence.
//!
//! Keys and values are stored in blocks of 16 positions (PagedAttention, arXiv 2309.06180). Blocks
//! are reference-counted, so sequences with a common prefix share them. Only block numbers are
//! here: the memory belongs to the device.
#![forbid(unsafe_code)]

use super::config::ModelConfig;
use super::pass::{BlockCopy, Pass, TableView};
use crate::error::{Error, ErrorKind, Result};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Positions per block.
pub(crate) const BLOCK: usize = 16;

/// Values that share a scale in an int8 cache.
pub(crate) const SCALED: usize = 32;

/// Data type of keys and values in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CacheType {
    /// 4 bytes per element, unrounded.
    F32,
    /// 2 bytes per element.
    #[default]
    F16,
    /// 1 byte per element, and a 4-byte scale per 32 elements.
    Int8,
}

/// Layers with the same attention window, which share one table of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerGroup {
    /// Positions that a query attends to, including its own; `None`: all before it.
    pub(crate) window: Option<usize>,
    /// Number of layers.
    pub(crate) layers: usize,
}

/// Sizes of a KV cache.
#[derive(Debug, Clone)]
pub(crate) struct CacheLayout {
    pub(crate) cache_type: CacheType,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) groups: Vec<LayerGroup>,
    /// Group of each layer, and the index of the layer in it.
    pub(crate) layers: Vec<(usize, usize)>,
}

impl CacheLayout {
    /// Groups the layers of a model by their windows.
    pub(crate) fn new(config: &ModelConfig, cache_type: CacheType) -> Self {
        let mut groups: Vec<LayerGroup> = Vec::new();
        let mut place = |&window: &Option<usize>| {
            let known = groups.iter().position(|group| group.window == window);
            let group = known.unwrap_or_else(|| {
                groups.push(LayerGroup { window, layers: 0 });
                groups.len() - 1
            });
            groups[group].layers += 1;
            (group, groups[group].layers - 1)
        };
        let layers = config.windows.iter().map(&mut place).collect();
        Self {
            cache_type,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            groups,
            layers,
        }
    }

    /// Returns the number of values in a block of `group`:
    /// keys and values of all layers and heads.
    ///
    /// `None`: overflow.
    pub(crate) fn block_values(&self, group: usize) -> Option<usize> {
        let heads = self.groups[group].layers.checked_mul(self.kv_heads)?;
        heads.checked_mul(2 * BLOCK)?.checked_mul(self.head_dim)
    }

    /// Returns the number of scales in a block of `group`, for [`CacheType::Int8`].
    pub(crate) fn block_scales(&self, group: usize) -> Option<usize> {
        let values = self.block_values(group)?;
        Some(values / self.head_dim * self.head_dim.div_ceil(SCALED))
    }

    /// Returns the bytes of a block of `group`. `None`: overflow.
    fn block_bytes(&self, group: usize) -> Option<usize> {
        let values = self.block_values(group)?;
        match self.cache_type {
            CacheType::F32 => values.checked_mul(4),
            CacheType::F16 => values.checked_mul(2),
            CacheType::Int8 => values.checked_add(self.block_scales(group)?.checked_mul(4)?),
        }
    }

    /// Returns the maximum bytes of a sequence of `context` positions, appended at most `chunk`
    /// at a time.
    ///
    /// Errors (`TooLarge`): overflow of a `usize`.
    pub(crate) fn sequence_bytes(&self, context: usize, chunk: usize) -> Result<usize> {
        let bytes = |group: usize| {
            let blocks = most_blocks(self.groups[group].window, context, chunk)?;
            blocks.checked_mul(self.block_bytes(group)?)
        };
        (0..self.groups.len())
            .try_fold(0usize, |sum, group| sum.checked_add(bytes(group)?))
            .ok_or_else(|| too_large(context))
    }
}

/// Blocks of a cache: the free ones, and the limit of their bytes.
#[derive(Debug)]
pub(crate) struct BlockPool {
    layout: Arc<CacheLayout>,
    /// Free blocks of each group of layers.
    groups: Vec<Arc<Free>>,
    /// Bytes of a block of each group.
    bytes: Vec<usize>,
    max_bytes: usize,
}

/// Numbers of the unreferenced blocks, lowest first,
/// so that the blocks of a sequence are contiguous.
#[derive(Debug, Default)]
struct Free {
    numbers: Mutex<BinaryHeap<Reverse<u32>>>,
    /// Number of blocks ever used, which is the next new number.
    ever: AtomicUsize,
    used: AtomicUsize,
}

/// Reference to a block. The block is free when the last one is dropped.
#[derive(Debug)]
struct Block {
    number: u32,
    free: Arc<Free>,
}

impl Drop for Block {
    fn drop(&mut self) {
        let numbers = self.free.numbers.lock();
        numbers
            .unwrap_or_else(PoisonError::into_inner)
            .push(Reverse(self.number));
        self.free.used.fetch_sub(1, Ordering::Relaxed);
    }
}

impl BlockPool {
    /// Creates a pool for at most `max_bytes`; `None`: no limit.
    ///
    /// Errors (`TooLarge`): the bytes of a block overflow a `usize`.
    pub(crate) fn new(layout: Arc<CacheLayout>, max_bytes: Option<usize>) -> Result<Self> {
        let bytes = |group| layout.block_bytes(group).ok_or_else(|| too_large(BLOCK));
        let groups = 0..layout.groups.len();
        Ok(Self {
            bytes: groups.clone().map(bytes).collect::<Result<_>>()?,
            groups: groups.map(|_| Arc::default()).collect(),
            max_bytes: max_bytes.unwrap_or(usize::MAX),
            layout,
        })
    }

    /// Returns the sizes of the cache.
    pub(crate) fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Returns the bytes of all referenced blocks.
    pub(crate) fn used_bytes(&self) -> usize {
        let groups = self.groups.iter().zip(&self.bytes);
        groups
            .map(|(free, bytes)| free.used.load(Ordering::Relaxed) * bytes)
            .sum()
    }

    fn full(&self) -> Error {
        let message = match self.max_bytes {
            usize::MAX => "no memory for another block of the KV cache".into(),
            bytes => format!("the KV cache has reached its limit of {bytes} bytes"),
        };
        Error::new(ErrorKind::TooLarge, message).hint("end other sequences, or raise the limit")
    }

    fn take(&self, group: usize) -> Option<Arc<Block>> {
        if self.max_bytes - self.used_bytes().min(self.max_bytes) < self.bytes[group] {
            return None;
        }
        let free = &self.groups[group];
        let number = {
            let numbers = free.numbers.lock();
            numbers.unwrap_or_else(PoisonError::into_inner).pop()
        };
        let number = match number {
            Some(Reverse(number)) => number,
            None => u32::try_from(free.ever.fetch_add(1, Ordering::Relaxed)).ok()?,
        };
        free.used.fetch_add(1, Ordering::Relaxed);
        Some(Arc::new(Block {
            number,
            free: Arc::clone(free),
        }))
    }
}

/// Blocks of one sequence, with a table for each group of layers.
#[derive(Debug, Clone)]
pub(crate) struct BlockTables {
    layout: Arc<CacheLayout>,
    tables: Vec<Table>,
    /// Number of positions that the blocks hold, from the start of the sequence.
    len: usize,
    /// First position of a block that the current pass copies. It is lost if the pass fails
    /// before the copy.
    copied_from: Option<usize>,
}

#[derive(Debug, Clone, Default)]
struct Table {
    /// Position of the first one that is kept, a multiple of [`BLOCK`].
    first: usize,
    blocks: Vec<Arc<Block>>,
}

impl BlockTables {
    /// Creates the tables of an empty sequence.
    pub(crate) fn new(pool: &BlockPool) -> Self {
        Self {
            layout: Arc::clone(&pool.layout),
            tables: vec![Table::default(); pool.groups.len()],
            len: 0,
            copied_from: None,
        }
    }

    /// Returns whether the blocks belong to this pool.
    pub(crate) fn are_of(&self, pool: &BlockPool) -> bool {
        Arc::ptr_eq(&self.layout, &pool.layout)
    }

    /// Returns the number of stored positions.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Reserves room for `n` more positions, and writes to `pass` where they
    /// and the earlier ones are.
    ///
    /// A shared block that will be written is copied. If more than a window and `chunk` positions
    /// would be held, a window releases the blocks that no query attends to any more. Errors
    /// (`TooLarge`): beyond `context`, or the pool is out of blocks; [`BlockTables::truncate`] then
    /// releases the reserved ones.
    pub(crate) fn reserve(
        &mut self,
        pool: &BlockPool,
        n: usize,
        (context, chunk): (usize, usize),
        pass: &mut Pass,
    ) -> Result<()> {
        let too_large = || too_large(context);
        let end = self.len.checked_add(n).filter(|&end| end <= context);
        let end = end.ok_or_else(too_large)?;
        for (group, table) in self.tables.iter_mut().enumerate() {
            let window = self.layout.groups[group].window;
            let most = most_blocks(window, context, chunk).ok_or_else(too_large)?;
            table.drop_unseen(first_seen(window, self.len), end, most);
            let written = (self.len - table.first) / BLOCK;
            if let Some(shared) = table.blocks.get_mut(written)
                && Arc::strong_count(shared) > 1
            {
                let own = pool.take(group).ok_or_else(|| pool.full())?;
                pass.copies.push(BlockCopy {
                    group,
                    from: shared.number,
                    to: own.number,
                });
                *shared = own;
                let start = table.first + written * BLOCK;
                let before = self.copied_from.unwrap_or(start);
                self.copied_from = Some(start.min(before));
            }
            while table.first + table.blocks.len() * BLOCK < end {
                table
                    .blocks
                    .push(pool.take(group).ok_or_else(|| pool.full())?);
            }
            let start = pass.tables.len();
            pass.tables
                .extend(table.blocks.iter().map(|block| block.number));
            pass.views.push(TableView {
                first: table.first,
                blocks: start..pass.tables.len(),
            });
        }
        Ok(())
    }

    /// Adds `n` positions that a pass has computed.
    pub(crate) fn commit(&mut self, n: usize) {
        self.len += n;
        self.copied_from = None;
    }

    /// Returns the positions that [`BlockTables::truncate`] to `len` would keep.
    pub(crate) fn usable(&self, len: usize) -> usize {
        let copied = self.copied_from.unwrap_or(self.len);
        let len = len.min(self.len).min(copied);
        let lost =
            |(table, group): (&Table, &LayerGroup)| table.first > first_seen(group.window, len);
        match self.tables.iter().zip(&self.layout.groups).any(lost) {
            true => 0,
            false => len,
        }
    }

    /// Keeps the first `len` positions, or none if a window has released some
    /// that the next query needs.
    ///
    /// Also releases blocks that were reserved and not committed, and the positions of a block
    /// whose copy was not committed: the pass may have failed before it.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.usable(len);
        self.copied_from = None;
        for table in &mut self.tables {
            if self.len == 0 {
                table.first = 0;
            }
            let kept = (self.len.max(table.first) - table.first).div_ceil(BLOCK);
            table.blocks.truncate(kept);
        }
    }
}

impl Table {
    /// Releases the blocks before `first` if more than `most` would be needed up to `end`.
    fn drop_unseen(&mut self, first: usize, end: usize, most: usize) {
        if (end - self.first).div_ceil(BLOCK) > most && first > self.first {
            let blocks = (first - self.first) / BLOCK;
            self.blocks.drain(..blocks);
            self.first += blocks * BLOCK;
        }
    }
}

/// Returns the first position that a query at `position` attends to.
pub(crate) fn first_seen(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// Returns the maximum blocks of a sequence, including the rest of the block of the first
/// visible position.
///
/// `None`: overflow.
fn most_blocks(window: Option<usize>, context: usize, chunk: usize) -> Option<usize> {
    let all = context.div_ceil(BLOCK);
    let Some(window) = window else {
        return Some(all);
    };
    let seen = (window - 1).checked_add(chunk)?.checked_add(BLOCK - 1)?;
    Some(all.min(seen.div_ceil(BLOCK)))
}

fn too_large(context: usize) -> Error {
    let message = format!("no memory for a KV cache of up to {context} positions");
    Error::new(ErrorKind::TooLarge, message).hint("ask for a smaller context")
}

#[cfg(test)]
mod tests;
