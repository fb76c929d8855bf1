//! Bytes and bits of a file and its parts.
#![forbid(unsafe_code)]

use super::UpgFile;
use super::tensors::array_name;

impl UpgFile {
    /// Length of the whole file in bytes.
    pub fn file_len(&self) -> u64 {
        self.tensors().file().len() as u64
    }

    /// Bytes of the arrays of layer `id`; 0 for an unknown one.
    pub fn layer_bytes(&self, id: usize) -> u64 {
        let specs = self.layers().get(id).and_then(|layer| layer.arrays().ok());
        specs
            .iter()
            .flatten()
            .filter_map(|spec| self.bytes(&array_name(id, spec.suffix)))
            .map(|bytes| bytes.len() as u64)
            .sum()
    }

    /// Weights of the tensors that are not compressed.
    pub fn kept_weights(&self) -> u64 {
        self.kept().map(|(_, _, shape)| product(shape)).sum()
    }

    /// Weights of the whole model, compressed or not.
    pub fn weights(&self) -> u64 {
        let layers = self.layers().iter();
        let compressed: u64 = layers.map(|l| product(&[l.rows, l.cols])).sum();
        compressed + self.kept_weights()
    }

    /// Bits of the whole file for each weight; NaN if there are none.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.file_len() as f64 / self.weights() as f64
    }

    /// Bits for each weight in the matrices of the transformer blocks, compressed or not; NaN if
    /// there are none.
    pub fn bits_per_weight_blocks(&self) -> f64 {
        let in_block = |name: &str| name.starts_with("model.layers.");
        let layers = self.layers().iter().enumerate();
        let layers = layers
            .filter(|(_, l)| in_block(&l.name))
            .map(|(id, l)| (self.layer_bytes(id), product(&[l.rows, l.cols])));
        let kept = self
            .kept()
            .filter(|(name, _, shape)| in_block(name) && shape.len() == 2)
            .map(|(name, _, shape)| {
                let bytes = self.bytes(name).map_or(0, |b| b.len() as u64);
                (bytes, product(shape))
            });
        let (bytes, weights) = layers
            .chain(kept)
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        8.0 * bytes as f64 / weights as f64
    }
}

fn product(shape: &[usize]) -> u64 {
    shape.iter().map(|&n| n as u64).product()
}
