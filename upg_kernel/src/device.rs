//! The seam between the decoder and the hardware that computes it: the steps of a layer.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::inference::cache::CacheLayout;
use crate::inference::config::ModelConfig;
use crate::inference::pass::Pass;
use crate::inference::rope::Rope;
use crate::matrix::Matrix;

/// The effect of a product on its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// Overwrites it.
    Set,
    /// Adds to it.
    Add,
}

/// A matrix `[outputs, inputs]` and, in some families, a bias `[outputs]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear<W = Matrix, V = Vec<f32>> {
    pub(crate) weight: W,
    pub(crate) bias: Option<V>,
}

/// A root mean square norm (arXiv 1910.07467) with a gain for each element.
#[derive(Debug, Clone)]
pub(crate) struct Norm<V = Vec<f32>> {
    pub(crate) gain: V,
    pub(crate) eps: f32,
}

/// Hardware that computes the steps of a decoder layer.
///
/// The decoder is written once over these steps and calls them in order, from one thread. A device
/// may compute a step when it is called, or record it and compute all steps at the end of the pass,
/// in [`Device::read`] or [`Device::finish`]. Buffers are rows of f32 values, `[n, width]`; a step
/// that writes one gives it the size that it needs.
pub(crate) trait Device: Send + Sync + Sized + 'static {
    /// Rows of f32 values.
    type Buffer: Default + Send;
    /// A matrix `[outputs, inputs]`.
    type Weight: Send + Sync;
    /// A vector of f32 values.
    type Vector: Send + Sync;
    /// Keys and values of all layers, in blocks.
    type Cache: Send;
    /// Memory that the steps of a pass share.
    type Scratch: Default + Send;

    /// Makes a matrix known to the device. A mapped file is not copied where the device can read it
    /// in place.
    fn matrix(&self, matrix: Matrix) -> Result<Self::Weight>;

    /// Makes a vector known to the device.
    fn vector(&self, vector: Vec<f32>) -> Result<Self::Vector>;

    /// Makes an empty cache, which grows with the blocks that passes refer to.
    fn cache(&self, layout: &CacheLayout) -> Result<Self::Cache>;

    /// Calls `compute`, which computes a pass and calls its argument after each layer: another pass
    /// may have its turn then.
    fn in_turn<R>(&self, compute: impl FnOnce(&mut dyn FnMut()) -> R) -> R {
        compute(&mut || {})
    }

    /// Prepares a pass: rotations of its positions, memory for its blocks, copies of shared blocks.
    ///
    /// Errors (`TooLarge`): no memory for a block.
    fn begin(
        &self,
        pass: &Pass,
        rope: &Rope,
        heads: Heads,
        cache: &mut Self::Cache,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// Gathers rows of the embedding: `out [n, hidden]` for `tokens [n]`.
    fn gather(
        &self,
        embedding: &Self::Weight,
        tokens: &[u32],
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Normalizes each row of `x` by its root mean square into `out`.
    fn norm(&self, norm: &Norm<Self::Vector>, x: &Self::Buffer, out: &mut Self::Buffer);

    /// Multiplies `x [n, inputs]` by matrices with this input: `out [n, outputs of all]`, side by
    /// side.
    fn linear(
        &self,
        parts: &[Linear<Self::Weight, Self::Vector>],
        x: &Self::Buffer,
        n: usize,
        write: Write,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Normalizes and rotates the heads of `qkv [n, queries, keys, values]` in place, and stores
    /// keys and values of `layer`.
    fn rope_append(
        &self,
        pass: &Pass,
        layer: usize,
        norms: Option<&[Norm<Self::Vector>; 2]>,
        qkv: &mut Self::Buffer,
        cache: &mut Self::Cache,
        scratch: &mut Self::Scratch,
    );

    /// Attends to the cache of `layer`: `out [n, queries]` for `qkv [n, queries, keys, values]`.
    fn attend(
        &self,
        pass: &Pass,
        layer: usize,
        qkv: &Self::Buffer,
        cache: &Self::Cache,
        scratch: &mut Self::Scratch,
        out: &mut Self::Buffer,
    );

    /// Computes `silu(gate) * up` for the rows `[gate, up]`: `out [n, size]`.
    fn gated_silu(&self, gate_up: &Self::Buffer, size: usize, out: &mut Self::Buffer);

    /// Copies some rows of `x [n, width]`.
    fn select(&self, x: &Self::Buffer, width: usize, rows: &[usize], out: &mut Self::Buffer);

    /// Waits for all steps of a pass that no values are read from.
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// Waits for all steps and appends the values of `x` to `out`.
    fn read(&self, x: &Self::Buffer, out: &mut Vec<f32>) -> Result<()>;
}

/// The sizes of the heads of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Number of query heads.
    pub(crate) queries: usize,
    /// Number of key/value heads, a divisor of that of the query heads.
    pub(crate) kv: usize,
    /// Elements of a head.
    pub(crate) dim: usize,
}

impl Heads {
    /// Returns the sizes of the heads of a model.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Self {
            queries: config.num_heads,
            kv: config.num_kv_heads,
            dim: config.head_dim,
        }
    }

    /// Returns the number of query heads that share a key/value head.
    pub(crate) fn group(&self) -> usize {
        self.queries / self.kv
    }

    /// Returns the elements of a row of queries.
    pub(crate) fn query_size(&self) -> usize {
        self.queries * self.dim
    }

    /// Returns the elements of a row of keys.
    pub(crate) fn kv_size(&self) -> usize {
        self.kv * self.dim
    }

    /// Returns the elements of a row of queries, keys and values.
    pub(crate) fn width(&self) -> usize {
        self.query_size() + 2 * self.kv_size()
    }
}

#[cfg(test)]
mod tests;
