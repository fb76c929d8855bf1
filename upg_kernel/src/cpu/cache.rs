//! Memory of the KV cache on the CPU.
#![forbid(unsafe_code)]

use super::team::Team;
use crate::error::{Error, ErrorKind, Result};
use crate::inference::cache::{BLOCK, CacheLayout, CacheType, SCALED, first_seen};
use crate::inference::pass::Pass;
use crate::kernels::attention::{Blocks, Head, SLAB, Slab, place_in_slab};
use crate::rotation::Rotation;
use bytemuck::Pod;
use half::f16;
use std::ops::Range;

/// Minimum rows for storing keys and values in parallel.
const MANY: usize = 16;

/// Keys and values of all layers.
///
/// Memory is allocated in slabs of [`SLAB`] blocks,
/// when a pass first refers to one of their blocks.
#[derive(Debug)]
pub(crate) struct CpuCache {
    layout: CacheLayout,
    rotation: Option<Rotation>,
    /// Blocks of each group of layers.
    groups: Vec<Blocks>,
    /// Destinations of the rows of the pass for each group of layers;
    /// those in the same slab are consecutive.
    writes: Vec<Vec<BlockRows>>,
}

/// Rows of a pass that are written to one block.
#[derive(Debug)]
struct BlockRows {
    block: usize,
    /// Entry of the first row in the block.
    entry: usize,
    rows: Range<usize>,
}

/// KV cache of a sequence for one layer.
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

    /// Returns the range of entries that the query at `position` attends to.
    pub(crate) fn seen(&self, position: usize) -> Range<usize> {
        first_seen(self.window, position) - self.first..position + 1 - self.first
    }
}

impl CpuCache {
    pub(crate) fn new(layout: &CacheLayout) -> Self {
        let blocks = |_| match layout.cache_type {
            CacheType::F32 => Blocks::F32(Vec::new()),
            CacheType::F16 => Blocks::F16(Vec::new()),
            CacheType::Int8 => Blocks::Int8(Vec::new(), Vec::new()),
        };
        Self {
            rotation: match layout.cache_type {
                CacheType::Int8 => head_rotation(layout.head_dim),
                CacheType::F32 | CacheType::F16 => None,
            },
            groups: (0..layout.groups.len()).map(blocks).collect(),
            writes: layout.groups.iter().map(|_| Vec::new()).collect(),
            layout: layout.clone(),
        }
    }

    /// Returns the rotation of queries, keys and values before they are stored as int8.
    pub(crate) fn rotation(&self) -> Option<&Rotation> {
        self.rotation.as_ref()
    }

    /// Allocates the slabs of a pass, copies shared blocks,
    /// and computes where its rows are stored.
    ///
    /// Errors (`TooLarge`): out of memory.
    pub(crate) fn begin(&mut self, pass: &Pass) -> Result<()> {
        for group in 0..self.groups.len() {
            self.writes[group].clear();
            for (number, segment) in pass.segments.iter().enumerate() {
                let view = pass.view(number, group);
                let blocks = pass.blocks(view);
                self.allocate(group, blocks)?;
                let mut row = segment.rows.start;
                while row < segment.rows.end {
                    let entry = segment.first + row - segment.rows.start - view.first;
                    let end = segment.rows.end.min(row + BLOCK - entry % BLOCK);
                    self.writes[group].push(BlockRows {
                        block: blocks[entry / BLOCK] as usize,
                        entry: entry % BLOCK,
                        rows: row..end,
                    });
                    row = end;
                }
            }
            self.writes[group].sort_unstable_by_key(|write| write.block);
        }
        for copy in &pass.copies {
            let (from, to) = (copy.from as usize, copy.to as usize);
            let heads = self.layout.groups[copy.group].layers * self.layout.kv_heads;
            let size = BLOCK * self.layout.head_dim;
            let scales = BLOCK * self.layout.head_dim.div_ceil(SCALED);
            match &mut self.groups[copy.group] {
                Blocks::F32(slabs) => copy_block(slabs, heads, size, from, to),
                Blocks::F16(slabs) => copy_block(slabs, heads, size, from, to),
                Blocks::Int8(slabs, scales_of) => {
                    copy_block(slabs, heads, size, from, to);
                    copy_block(scales_of, heads, scales, from, to);
                }
            }
        }
        Ok(())
    }

    fn allocate(&mut self, group: usize, numbers: &[u32]) -> Result<()> {
        let too_large = || Error::new(ErrorKind::TooLarge, "no memory for the KV cache");
        let values = self.layout.block_values(group).ok_or_else(too_large)?;
        let scales = self.layout.block_scales(group).ok_or_else(too_large)?;
        match &mut self.groups[group] {
            Blocks::F32(slabs) => allocate(slabs, numbers, values),
            Blocks::F16(slabs) => allocate(slabs, numbers, values),
            Blocks::Int8(slabs, scales_of) => {
                allocate(slabs, numbers, values).and_then(|()| allocate(scales_of, numbers, scales))
            }
        }
        .ok_or_else(too_large)
    }

    /// Stores the keys and values of `layer`: the last elements of each row of `rows [n, width]`.
    pub(crate) fn append(&mut self, team: &Team, layer: usize, rows: &[f32], width: usize) {
        let (group, index) = self.layout.layers[layer];
        let rows = Rows {
            rows,
            width,
            heads: self.layout.kv_heads,
            dim: self.layout.head_dim,
            first_head: index * self.layout.kv_heads,
        };
        let of_slabs = self.writes[group].chunk_by(|a, b| a.block / SLAB == b.block / SLAB);
        for writes in of_slabs {
            let slab = writes[0].block / SLAB;
            match &mut self.groups[group] {
                Blocks::F32(slabs) => rows.store(team, slabs[slab].as_mut_slice(), writes),
                Blocks::F16(slabs) => rows.store(team, slabs[slab].as_mut_slice(), writes),
                Blocks::Int8(slabs, scales) => {
                    let scales = scales[slab].as_mut_slice();
                    rows.quantize(slabs[slab].as_mut_slice(), scales, writes);
                }
            }
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

/// Returns the rotation of heads of `dim` elements; `None` for no elements.
///
/// Models with biases have keys with a few large elements, which would leave few integer steps for
/// the others. The rotation spreads these large elements. It changes no product of a query and a
/// key. Source: QuaRot (arXiv 2404.00456).
fn head_rotation(dim: usize) -> Option<Rotation> {
    // The first fractional digits of pi.
    let signs = 0x243f_6a88_85a3_08d3_1319_8a2e_0370_7344_u128.to_le_bytes();
    let size = 1usize << dim.checked_ilog2()?;
    let signs: Vec<u8> = signs.into_iter().cycle().take(size.div_ceil(8)).collect();
    Rotation::new(dim, size, signs.into()).ok()
}

/// Allocates the missing slabs of the blocks `numbers`.
///
/// A block has `size` elements. `None`: out of memory.
fn allocate<T: Pod>(slabs: &mut Vec<Slab<T>>, numbers: &[u32], size: usize) -> Option<()> {
    for &number in numbers {
        let slab = number as usize / SLAB;
        if slab >= slabs.len() {
            slabs.try_reserve(slab + 1 - slabs.len()).ok()?;
            slabs.resize_with(slab + 1, Slab::default);
        }
        if slabs[slab].is_empty() {
            let len = size.checked_mul(SLAB)?;
            slabs[slab] = Slab::zeros(len).ok()?;
        }
    }
    Some(())
}

/// Copies the entries of all heads from one block to another.
///
/// Each head has `size` elements of keys and of values in a block.
fn copy_block<T: Pod>(slabs: &mut [Slab<T>], heads: usize, size: usize, from: usize, to: usize) {
    for head in 0..heads {
        for is_key in [true, false] {
            let source = place_in_slab(head, is_key, from, size);
            let target = place_in_slab(head, is_key, to, size);
            match slabs.get_disjoint_mut([from / SLAB, to / SLAB]) {
                Ok([source_slab, target_slab]) => {
                    target_slab.as_mut_slice()[target]
                        .copy_from_slice(&source_slab.as_slice()[source]);
                }
                // Both blocks are in the same slab.
                Err(_) => {
                    let slab = slabs[from / SLAB].as_mut_slice();
                    slab.copy_within(source, target.start);
                }
            }
        }
    }
}

/// Rows of keys and values of one layer.
struct Rows<'a> {
    /// Rows `[n, width]`, whose last elements are the keys and then the values.
    rows: &'a [f32],
    width: usize,
    heads: usize,
    dim: usize,
    /// Index of the first head of the layer in a slab.
    first_head: usize,
}

impl Rows<'_> {
    /// Returns the key and the value of a head.
    fn of_head(&self, row: usize, head: usize) -> [&[f32]; 2] {
        let row = &self.rows[row * self.width..(row + 1) * self.width];
        let kv = self.heads * self.dim;
        let part = |start: usize| &row[start + head * self.dim..][..self.dim];
        [part(self.width - 2 * kv), part(self.width - kv)]
    }

    /// Stores the rows of one slab. If there are many rows, each head is a task.
    fn store<T: Stored>(&self, team: &Team, slab: &mut [T], writes: &[BlockRows]) {
        let size = BLOCK * self.dim;
        let of_head = 2 * SLAB * size;
        let slab = &mut slab[self.first_head * of_head..][..self.heads * of_head];
        let task = |head: usize, slab: &mut [T]| {
            for write in writes {
                let places =
                    [true, false].map(|key| place_in_slab(0, key, write.block, size).start);
                for (i, row) in write.rows.clone().enumerate() {
                    let entry = write.entry + i;
                    let [key, value] = self.of_head(row, head);
                    put(key, &mut slab[places[0] + entry..], BLOCK, T::from_f32);
                    put(
                        value,
                        &mut slab[places[1] + entry * self.dim..],
                        1,
                        T::from_f32,
                    );
                }
            }
        };
        let rows: usize = writes.iter().map(|write| write.rows.len()).sum();
        match rows < MANY {
            true => (0..)
                .zip(slab.chunks_mut(of_head))
                .for_each(|(head, slab)| task(head, slab)),
            false => team.chunks(slab, of_head, task),
        }
    }

    /// Stores the rows of one slab as int8.
    fn quantize(&self, slab: &mut [i8], scales: &mut [f32], writes: &[BlockRows]) {
        let (dim, groups) = (self.dim, self.dim.div_ceil(SCALED));
        for (head, write) in (0..self.heads).flat_map(|head| writes.iter().map(move |w| (head, w)))
        {
            let place = |is_key: bool, size: usize| {
                place_in_slab(self.first_head + head, is_key, write.block, size).start
            };
            let [keys, values] = [true, false].map(|is_key| place(is_key, BLOCK * dim));
            let [key_scales, value_scales] = [true, false].map(|key| place(key, BLOCK * groups));
            for (i, row) in write.rows.clone().enumerate() {
                let entry = write.entry + i;
                let [key, value] = self.of_head(row, head);
                let parts = key.chunks(SCALED).zip(value.chunks(SCALED));
                for (group, (key, value)) in parts.enumerate() {
                    let first = group * SCALED;
                    let (scale, quantize) = quantizer(key);
                    scales[key_scales + group * BLOCK + entry] = scale;
                    put(
                        key,
                        &mut slab[keys + first * BLOCK + entry..],
                        BLOCK,
                        quantize,
                    );
                    let (scale, quantize) = quantizer(value);
                    scales[value_scales + entry * groups + group] = scale;
                    put(
                        value,
                        &mut slab[values + entry * dim + first..],
                        1,
                        quantize,
                    );
                }
            }
        }
    }
}

/// Number type that keys and values are rounded to.
trait Stored: Pod + Send {
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

/// Stores the elements of `x` at every `step`-th position of `out`.
fn put<T>(x: &[f32], out: &mut [T], step: usize, convert: impl Fn(f32) -> T) {
    for (out, &x) in out.iter_mut().step_by(step).zip(x) {
        *out = convert(x);
    }
}

/// Returns the scale of some values, and a function that quantizes them.
fn quantizer(x: &[f32]) -> (f32, impl Fn(f32) -> i8) {
    let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = largest / 127.0;
    // A scale whose inverse overflows belongs to values that are practically 0.
    let inverse = match scale >= f32::MIN_POSITIVE {
        true => 1.0 / scale,
        false => 0.0,
    };
    // Non-finite values stay non-finite.
    let scale = match x.iter().all(|x| x.is_finite()) {
        true => scale,
        false => f32::NAN,
    };
    (scale, move |x: f32| (x * inverse).round_ties_even() as i8)
}

#[cfg(test)]
mod tests;
