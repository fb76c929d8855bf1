//! The memory of the KV cache on the processor.
#![forbid(unsafe_code)]

use super::team::Team;
use crate::error::{Error, ErrorKind, Result};
use crate::inference::cache::{BLOCK, CacheLayout, CacheType, SCALED, first_seen};
use crate::inference::pass::Pass;
use crate::kernels::attention::{Blocks, Head, Int8Block};
use half::f16;
use std::mem::take;
use std::ops::Range;

/// Keys and values of all layers, block by block; a block is allocated when a pass first refers to it.
#[derive(Debug)]
pub(crate) struct CpuCache {
    layout: CacheLayout,
    /// For each group of layers.
    groups: Vec<Blocks>,
    /// Places of the rows of the pass, for each group of layers.
    writes: Vec<Vec<Write>>,
    taken: Taken,
}

/// Memory for the blocks that threads write at the same time.
#[derive(Debug, Default)]
struct Taken {
    f32: Vec<Box<[f32]>>,
    f16: Vec<Box<[f16]>>,
    int8: Vec<Int8Block>,
}

/// The rows of a pass that go to one block.
#[derive(Debug)]
struct Write {
    block: u32,
    /// Entry of the first row in the block.
    entry: usize,
    rows: Range<usize>,
}

/// The cache of a sequence for one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerView<'a> {
    blocks: &'a Blocks,
    table: &'a [u32],
    /// Position of the first entry, a multiple of [`BLOCK`].
    first: usize,
    window: Option<usize>,
    /// Index of the first head of the layer in a block.
    head: usize,
    head_dim: usize,
}

impl<'a> LayerView<'a> {
    /// Returns the entries of key/value head `index`.
    pub(crate) fn head(&self, index: usize) -> Head<'a> {
        Head {
            blocks: self.blocks,
            table: self.table,
            index: self.head + index,
            dim: self.head_dim,
        }
    }

    /// Returns the position of the first entry.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Returns which entries the query at `position` sees.
    pub(crate) fn seen(&self, position: usize) -> Range<usize> {
        first_seen(self.window, position) - self.first..position + 1 - self.first
    }
}

impl CpuCache {
    pub(crate) fn new(layout: &CacheLayout) -> Self {
        let blocks = |_| match layout.cache_type {
            CacheType::F32 => Blocks::F32(Vec::new()),
            CacheType::F16 => Blocks::F16(Vec::new()),
            CacheType::Int8 => Blocks::Int8(Vec::new()),
        };
        Self {
            groups: (0..layout.groups.len()).map(blocks).collect(),
            writes: layout.groups.iter().map(|_| Vec::new()).collect(),
            taken: Taken::default(),
            layout: layout.clone(),
        }
    }

    /// Allocates the blocks of a pass, copies those that were shared, and finds out where its rows go.
    ///
    /// Errors (`TooLarge`): no memory.
    pub(crate) fn begin(&mut self, pass: &Pass) -> Result<()> {
        self.writes.iter_mut().for_each(Vec::clear);
        for (number, segment) in pass.segments.iter().enumerate() {
            for group in 0..self.groups.len() {
                let view = pass.view(number, group);
                let blocks = pass.blocks(view);
                self.allocate(group, blocks)?;
                let mut row = segment.rows.start;
                while row < segment.rows.end {
                    let entry = segment.first + row - segment.rows.start - view.first;
                    let end = segment.rows.end.min(row + BLOCK - entry % BLOCK);
                    self.writes[group].push(Write {
                        block: blocks[entry / BLOCK],
                        entry: entry % BLOCK,
                        rows: row..end,
                    });
                    row = end;
                }
            }
        }
        for copy in &pass.copies {
            let (from, to) = (copy.from as usize, copy.to as usize);
            match &mut self.groups[copy.group] {
                Blocks::F32(blocks) => blocks[to] = blocks[from].clone(),
                Blocks::F16(blocks) => blocks[to] = blocks[from].clone(),
                Blocks::Int8(blocks) => blocks[to] = blocks[from].clone(),
            }
        }
        Ok(())
    }

    fn allocate(&mut self, group: usize, numbers: &[u32]) -> Result<()> {
        let too_large = || Error::new(ErrorKind::TooLarge, "no memory for a block of the KV cache");
        let values = self.layout.block_values(group).ok_or_else(too_large)?;
        let scales = self.layout.block_scales(group).ok_or_else(too_large)?;
        match &mut self.groups[group] {
            Blocks::F32(blocks) => allocate(blocks, numbers, || zeros(values)),
            Blocks::F16(blocks) => allocate(blocks, numbers, || zeros(values)),
            Blocks::Int8(blocks) => allocate(blocks, numbers, || {
                Some(Int8Block {
                    values: zeros(values)?,
                    scales: zeros(scales)?,
                })
            }),
        }
        .ok_or_else(too_large)
    }

    /// Stores keys and values of `layer`: the last elements of each row of `rows [n, width]`.
    pub(crate) fn append(&mut self, team: &Team, layer: usize, rows: &[f32], width: usize) {
        let (group, index) = self.layout.layers[layer];
        let (kv_heads, dim) = (self.layout.kv_heads, self.layout.head_dim);
        let target = Target {
            head: index * kv_heads,
            kv_heads,
            dim,
            rows,
            width,
        };
        let (writes, taken) = (&self.writes[group], &mut self.taken);
        match &mut self.groups[group] {
            Blocks::F32(blocks) => target.store(team, blocks, &mut taken.f32, writes),
            Blocks::F16(blocks) => target.store(team, blocks, &mut taken.f16, writes),
            Blocks::Int8(blocks) => target.store(team, blocks, &mut taken.int8, writes),
        }
    }

    /// Returns the cache of one sequence of a pass for `layer`.
    pub(crate) fn view<'a>(
        &'a self,
        pass: &'a Pass,
        segment: usize,
        layer: usize,
    ) -> LayerView<'a> {
        let (group, index) = self.layout.layers[layer];
        let view = pass.view(segment, group);
        LayerView {
            blocks: &self.groups[group],
            table: pass.blocks(view),
            first: view.first,
            window: self.layout.groups[group].window,
            head: index * self.layout.kv_heads,
            head_dim: self.layout.head_dim,
        }
    }
}

/// Makes `blocks` as long as the largest number asks for, and allocates those of `numbers` that are empty.
fn allocate<B: Memory>(
    blocks: &mut Vec<B>,
    numbers: &[u32],
    new: impl Fn() -> Option<B>,
) -> Option<()> {
    for &number in numbers {
        let number = number as usize;
        if number >= blocks.len() {
            blocks.try_reserve(number + 1 - blocks.len()).ok()?;
            blocks.resize_with(number + 1, B::default);
        }
        if blocks[number].is_empty() {
            blocks[number] = new()?;
        }
    }
    Some(())
}

/// Returns so many zeros. `None`: no memory.
fn zeros<T: bytemuck::Zeroable>(len: usize) -> Option<Box<[T]>> {
    bytemuck::try_zeroed_slice_box(len).ok()
}

/// Rows of keys and values, and the heads of a block that they go to.
struct Target<'a> {
    /// Index of the first head in a block.
    head: usize,
    kv_heads: usize,
    dim: usize,
    /// `[n, width]`.
    rows: &'a [f32],
    width: usize,
}

impl Target<'_> {
    /// Stores the rows, one task for each block. No two writes are to the same block: a sequence owns what it writes.
    fn store<B: Memory>(
        &self,
        team: &Team,
        blocks: &mut [B],
        taken: &mut Vec<B>,
        writes: &[Write],
    ) {
        let written = writes.iter().map(|write| write.block as usize);
        taken.extend(written.clone().map(|block| take(&mut blocks[block])));
        team.chunks(taken, 1, |index, taken| {
            let (write, block) = (&writes[index], &mut taken[0]);
            for (i, row) in write.rows.clone().enumerate() {
                let row = &self.rows[row * self.width..(row + 1) * self.width];
                let kv = self.kv_heads * self.dim;
                let (keys, values) = row[self.width - 2 * kv..].split_at(kv);
                let heads = keys
                    .chunks_exact(self.dim)
                    .zip(values.chunks_exact(self.dim));
                for (head, (key, value)) in heads.enumerate() {
                    block.set(self.head + head, write.entry + i, key, value);
                }
            }
        });
        for (number, block) in written.zip(taken.drain(..)) {
            blocks[number] = block;
        }
    }
}

/// The memory of a block: for each head its keys `[dim, 16]`, then its values `[16, dim]`.
trait Memory: Default + Send {
    fn is_empty(&self) -> bool;

    /// Stores the key and the value of an entry of a head.
    fn set(&mut self, head: usize, entry: usize, key: &[f32], value: &[f32]);
}

impl<T: Stored> Memory for Box<[T]> {
    fn is_empty(&self) -> bool {
        <[T]>::is_empty(self)
    }

    fn set(&mut self, head: usize, entry: usize, key: &[f32], value: &[f32]) {
        let size = BLOCK * key.len();
        let (keys, values) = self[2 * head * size..2 * (head + 1) * size].split_at_mut(size);
        put(key, &mut keys[entry..], BLOCK, T::from_f32);
        put(value, &mut values[entry * value.len()..], 1, T::from_f32);
    }
}

impl Memory for Int8Block {
    fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    fn set(&mut self, head: usize, entry: usize, key: &[f32], value: &[f32]) {
        let (dim, groups) = (key.len(), key.len().div_ceil(SCALED));
        let (size, scales) = (BLOCK * dim, BLOCK * groups);
        let values = &mut self.values[2 * head * size..2 * (head + 1) * size];
        let (keys, values) = values.split_at_mut(size);
        let scales = &mut self.scales[2 * head * scales..2 * (head + 1) * scales];
        let (key_scales, value_scales) = scales.split_at_mut(BLOCK * groups);
        for (group, (key, value)) in key.chunks(SCALED).zip(value.chunks(SCALED)).enumerate() {
            let first = group * SCALED;
            let (scale, quantize) = quantizer(key);
            key_scales[group * BLOCK + entry] = scale;
            put(key, &mut keys[first * BLOCK + entry..], BLOCK, quantize);
            let (scale, quantize) = quantizer(value);
            value_scales[entry * groups + group] = scale;
            put(value, &mut values[entry * dim + first..], 1, quantize);
        }
    }
}

/// A number that keys and values are rounded to.
trait Stored: bytemuck::Zeroable + Copy + Send {
    fn from_f32(x: f32) -> Self;
}

impl Stored for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Stored for f16 {
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Stores the elements of `x` in every `step`-th place of `out`.
fn put<T>(x: &[f32], out: &mut [T], step: usize, convert: impl Fn(f32) -> T) {
    for (out, &x) in out.iter_mut().step_by(step).zip(x) {
        *out = convert(x);
    }
}

/// Returns the scale of some values and what rounds them to multiples of it.
fn quantizer(x: &[f32]) -> (f32, impl Fn(f32) -> i8) {
    let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = largest / 127.0;
    // A scale of which there is no inverse belongs to values that are as good as 0.
    let inverse = match scale >= f32::MIN_POSITIVE {
        true => 1.0 / scale,
        false => 0.0,
    };
    // What is not finite stays so.
    let scale = match x.iter().all(|x| x.is_finite()) {
        true => scale,
        false => f32::NAN,
    };
    (scale, move |x: f32| (x * inverse).round_ties_even() as i8)
}

#[cfg(test)]
mod tests;
