//! Bars of bits by kind of matrix and layer.
#![forbid(unsafe_code)]

use super::layer_bits;
use crate::commands::kinds::split;
use std::collections::HashMap;
use std::fmt::Write;
use upg_kernel::format::UpgFile;

/// Heights of a bar, from an eighth of a line to a whole one.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Most columns of a row of bars; with more layers, neighbours share one.
const MAX_COLUMNS: usize = 40;

/// Matrices whose names differ only in the number of the layer.
struct Kind {
    name: String,
    /// Bits per weight of the matrix of each layer, 0 where there is none.
    bits: Vec<f64>,
}

/// Returns a row of bars for each kind of matrix: the bits per weight of each layer.
pub fn plot(file: &UpgFile) -> String {
    let kinds = kinds(file);
    let most = kinds.iter().flat_map(|kind| &kind.bits).copied();
    let most = most.fold(0.0, f64::max);
    let layers = kinds.iter().map(|kind| kind.bits.len()).max().unwrap_or(0);
    let together = layers.div_ceil(MAX_COLUMNS).max(1);
    let width = kinds.iter().map(|kind| kind.name.chars().count()).max();
    let width = width.unwrap_or(0).max(6);
    let mut out = format!(
        "{:width$}  {:>6}  by layer, 0 to {}\n",
        "matrix",
        "bits",
        layers.saturating_sub(1)
    );
    for kind in &kinds {
        let there = kind.bits.iter().filter(|bits| **bits > 0.0);
        let mean = there.clone().sum::<f64>() / there.count().max(1) as f64;
        let bars = kind.bits.chunks(together).map(|bits| {
            let bits = bits.iter().copied().fold(0.0, f64::max);
            bar(bits / most)
        });
        let bars: String = bars.collect();
        let _ = writeln!(out, "{:width$}  {mean:>6.3}  {bars}", kind.name);
    }
    let _ = writeln!(
        out,
        "A full bar has {most:.2} bits per weight{}.",
        match together {
            1 => String::new(),
            n => format!("; each stands for {n} layers and shows the largest"),
        }
    );
    out
}

/// Returns the bar of a share of the largest one.
fn bar(share: f64) -> char {
    match (share * BARS.len() as f64).ceil() as usize {
        0 => ' ',
        height => BARS[height.min(BARS.len()) - 1],
    }
}

/// Returns the kinds in the order of the file; matrices outside of layers have a bar each.
fn kinds(file: &UpgFile) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for (id, layer) in file.layers().iter().enumerate() {
        let (name, index) = split(&layer.name);
        let at = *places.entry(name.clone()).or_insert(kinds.len());
        if at == kinds.len() {
            kinds.push(Kind {
                name,
                bits: Vec::new(),
            });
        }
        let bits = &mut kinds[at].bits;
        if bits.len() <= index {
            bits.resize(index + 1, 0.0);
        }
        bits[index] = layer_bits(file, id);
    }
    kinds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_grow_with_the_share() {
        assert_eq!([0.0, 0.1, 0.5, 1.0].map(bar), [' ', '▁', '▄', '█']);
    }
}
