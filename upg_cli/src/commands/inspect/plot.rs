//! Bars of bits by kind of matrix and layer.
#![forbid(unsafe_code)]

use super::layer_bits;
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

/// Most layers that are told apart; a name may have any number.
const MAX_LAYERS: usize = 1 << 16;

/// Splits a name into that of its kind and the number of its layer:
/// `model.layers.3.mlp.up_proj.weight` is `mlp.up_proj` of layer 3.
fn split(name: &str) -> (String, usize) {
    let plain = name.strip_suffix(".weight").unwrap_or(name);
    let parts = plain.split_once(".layers.").and_then(|(_, rest)| {
        let (number, kind) = rest.split_once('.')?;
        let number = number.parse().ok().filter(|n| *n < MAX_LAYERS)?;
        Some((kind, number))
    });
    let (kind, number) = parts.unwrap_or((plain, 0));
    (kind.escape_debug().to_string(), number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_at_the_layer() {
        let of = |name| split(name);
        assert_eq!(
            of("model.layers.3.mlp.up_proj.weight"),
            ("mlp.up_proj".into(), 3)
        );
        assert_eq!(
            of("model.embed_tokens.weight"),
            ("model.embed_tokens".into(), 0)
        );
        assert_eq!(
            of("model.layers.99999999.x"),
            ("model.layers.99999999.x".into(), 0)
        );
        assert_eq!(of("a\nb"), ("a\\nb".into(), 0));
    }

    #[test]
    fn bars_grow_with_the_share() {
        assert_eq!([0.0, 0.1, 0.5, 1.0].map(bar), [' ', '▁', '▄', '█']);
    }
}
