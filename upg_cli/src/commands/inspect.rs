//! `upg inspect`.
#![forbid(unsafe_code)]

use super::inspect_v1;
use crate::cli::InspectArgs;
use crate::terminal;
use serde_json::{Value, json};
use std::fmt::Write;
use upg_kernel::format::UpgFile;
use upg_kernel::v1::is_pickle;
use upg_kernel::{OpenOptions, Result};

pub fn run(args: &InspectArgs, open: OpenOptions) -> Result<()> {
    if is_pickle(&args.file) {
        return inspect_v1::run(args);
    }
    let file = UpgFile::open_with(&args.file, open)?;
    let text = if args.json {
        format!("{:#}\n", as_json(&file))
    } else {
        as_table(&file)
    };
    terminal::print(&text)
}

fn as_json(file: &UpgFile) -> Value {
    let metadata = |key| file.metadata(key).unwrap_or_default();
    let number = |key| metadata(key).parse::<f64>().ok();
    let layers = file.layers().iter().enumerate().map(|(id, layer)| {
        json!({
            "id": id,
            "name": layer.name,
            "rows": layer.rows,
            "cols": layer.cols,
            "encoding": layer.encoding_name(),
            "group": layer.group,
            "hadamard": layer.hadamard,
            "bytes": file.layer_bytes(id),
            "bits_per_weight": layer_bits(file, id),
            "error": layer.error,
        })
    });
    let kept = file.kept().map(
        |(name, dtype, shape)| json!({ "name": name, "dtype": dtype.to_string(), "shape": shape }),
    );
    json!({
        "file": file.path().display().to_string(),
        "bytes": file.file_len(),
        "weights": file.weights(),
        "version": metadata("version"),
        "model": metadata("model"),
        "compression_ratio": number("compression_ratio"),
        "bits_per_weight": number("bits_per_weight"),
        "recipe": upg_kernel::format::json::value("recipe", metadata("recipe")).unwrap_or_default(),
        "tokenizer": file.tokenizer_json().is_some(),
        "chat_template": file.metadata("chat_template").is_some(),
        "layers": layers.collect::<Vec<_>>(),
        "kept": kept.collect::<Vec<_>>(),
    })
}

fn layer_bits(file: &UpgFile, id: usize) -> f64 {
    let layer = &file.layers()[id];
    8.0 * file.layer_bytes(id) as f64 / (layer.rows as f64 * layer.cols as f64)
}

fn as_table(file: &UpgFile) -> String {
    let metadata = |key| file.metadata(key).unwrap_or_default().escape_debug();
    let mut out = format!(
        "{}: UPG {}, {}\nmodel {}, {} bits per weight; as BF16 it would have {} ({:.2} times as much)\n\n",
        file.path().display(),
        metadata("version"),
        terminal::bytes(file.file_len()),
        metadata("model"),
        metadata("bits_per_weight"),
        terminal::bytes(2 * file.weights()),
        2.0 * file.weights() as f64 / file.file_len() as f64,
    );
    let width = file
        .layers()
        .iter()
        .map(|l| l.name.chars().count())
        .max()
        .unwrap_or(0);
    let mut line = |text: String| {
        out += text.trim_end();
        out.push('\n');
    };
    if !file.layers().is_empty() {
        line(format!(
            "{:>4}  {:width$}  {:>15}  {:8}  {:>6}  {:>9}",
            "id", "layer", "shape", "encoding", "bits", "error"
        ));
    }
    for (id, layer) in file.layers().iter().enumerate() {
        let error = layer
            .error
            .map_or(String::new(), |e| format!("{:.4} %", 100.0 * e));
        line(format!(
            "{id:>4}  {:width$}  {:>15}  {:8}  {:>6.3}  {error:>9}",
            layer.name.escape_debug().to_string(),
            format!("{} x {}", layer.rows, layer.cols),
            layer.encoding_name(),
            layer_bits(file, id),
        ));
    }
    let tokenizer = if file.tokenizer_json().is_some() {
        "yes"
    } else {
        "no"
    };
    let _ = write!(
        out,
        "\n{} uncompressed tensors of {} weights; tokenizer: {tokenizer}\n",
        file.kept().count(),
        file.kept_weights()
    );
    out
}
