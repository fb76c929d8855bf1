//! `upg inspect`.
#![forbid(unsafe_code)]

mod plot;

use super::inspect_v1;
use super::kinds::split;
use super::model_file;
use crate::cli::InspectArgs;
use crate::terminal;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Write;
use upg_kernel::format::{LayerInfo, UpgFile};
use upg_kernel::inference::ModelConfig;
use upg_kernel::v1::is_pickle;
use upg_kernel::{OpenOptions, Result};

pub fn run(args: &InspectArgs, open: OpenOptions) -> Result<()> {
    if is_pickle(&args.file) {
        return inspect_v1::run(args);
    }
    let file = model_file::open_current(&args.file, open)?;
    if args.json {
        return terminal::print(&format!("{:#}\n", as_json(&file)));
    }
    terminal::print_prose(&head(&file))?;
    terminal::print(&as_table(&file, args))
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

/// Returns a table of the matrices, or a plot, and what is beside them.
fn as_table(file: &UpgFile, args: &InspectArgs) -> String {
    let mut out = match (args.plot, args.layers) {
        (true, _) => plot::plot(file),
        (false, true) => table(all(file)),
        (false, false) => table(kinds(file)),
    };
    let has = |there: bool| if there { "yes" } else { "no" };
    let _ = write!(
        out,
        "\n{} uncompressed tensors of {} weights; tokenizer: {}; chat template: {}\n",
        file.kept().count(),
        file.kept_weights(),
        has(file.tokenizer_json().is_some()),
        has(file.metadata("chat_template").is_some()),
    );
    out
}

/// Returns the size, and what is known of the model.
fn head(file: &UpgFile) -> String {
    let metadata = |key| file.metadata(key).unwrap_or_default().escape_debug();
    let mut out = format!(
        "{}: UPG {}, {}\nmodel {}, {} bits per weight; as BF16 it would have {} ({:.2} times as much)\n",
        file.path().display(),
        metadata("version"),
        terminal::bytes(file.file_len()),
        metadata("model"),
        metadata("bits_per_weight"),
        terminal::bytes(2 * file.weights()),
        2.0 * file.weights() as f64 / file.file_len() as f64,
    );
    let generation = file.metadata("generation_config.json");
    let config = file
        .metadata("config.json")
        .map(|json| ModelConfig::from_json(json, generation));
    // A file that only holds weights has none; one of an unknown family is still inspected.
    if let Some(Ok(config)) = config {
        let _ = writeln!(
            out,
            "family {}, {} layers; context of {} tokens, each with {} of KV cache",
            config.family.name,
            config.num_layers,
            config.context,
            terminal::bytes((F16_KEY_AND_VALUE * config.num_layers * config.kv_size()) as u64),
        );
    }
    out + &recipe(file) + "\n"
}

/// Bytes of an element of keys and of values together, as f16.
const F16_KEY_AND_VALUE: usize = 4;

/// Returns how the file was made, as far as it says so.
fn recipe(file: &UpgFile) -> String {
    let text = file.metadata("recipe").unwrap_or_default();
    let recipe = upg_kernel::format::json::value("recipe", text).unwrap_or_default();
    let Some(encoding) = recipe.get("encoding").and_then(Value::as_str) else {
        return String::new();
    };
    let calibration = match recipe.get("calibration") {
        Some(Value::Object(calibration)) => {
            let text = calibration.get("text").and_then(Value::as_str);
            let tokens = calibration.get("tokens").and_then(Value::as_u64);
            format!(
                "calibrated on {} tokens of {}",
                tokens.unwrap_or_default(),
                match text.unwrap_or_default() {
                    "built-in" => "the built-in text",
                    _ => "a text",
                }
            )
        }
        _ => "not calibrated".to_owned(),
    };
    format!("made with {}, {calibration}\n", encoding.escape_debug())
}

/// A line of the table: some matrices of one shape and encoding.
struct Row {
    /// The number of a layer, or of how many there are.
    number: String,
    name: String,
    shape: String,
    encoding: String,
    bits: f64,
    /// Mean of the relative errors that are known.
    error: Option<f64>,
}

/// Returns a row for each layer.
fn all(file: &UpgFile) -> Vec<Row> {
    let layers = file.layers().iter().enumerate();
    let row = |(id, layer): (usize, &LayerInfo)| Row {
        number: id.to_string(),
        name: layer.name.escape_debug().to_string(),
        shape: format!("{} x {}", layer.rows, layer.cols),
        encoding: layer.encoding_name().to_owned(),
        bits: layer_bits(file, id),
        error: layer.error,
    };
    layers.map(row).collect()
}

/// Returns a row for all matrices of a kind with the same shape and encoding.
fn kinds(file: &UpgFile) -> Vec<Row> {
    let mut kinds: Vec<(Row, Vec<f64>, usize)> = Vec::new();
    let mut places: HashMap<_, usize> = HashMap::new();
    for mut row in all(file) {
        row.name = split(&row.name).0;
        let same = (row.name.clone(), row.shape.clone(), row.encoding.clone());
        match places.entry(same) {
            Entry::Occupied(place) => {
                let (kind, errors, count): &mut (Row, Vec<f64>, usize) = &mut kinds[*place.get()];
                kind.bits += row.bits;
                errors.extend(row.error);
                *count += 1;
            }
            Entry::Vacant(place) => {
                place.insert(kinds.len());
                let errors = row.error.into_iter().collect();
                kinds.push((row, errors, 1));
            }
        }
    }
    let mean = |(mut row, errors, count): (Row, Vec<f64>, usize)| {
        row.number = format!("{count} x");
        row.bits /= count as f64;
        row.error = (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64);
        row
    };
    kinds.into_iter().map(mean).collect()
}

fn table(rows: Vec<Row>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let width = |text: fn(&Row) -> &str| rows.iter().map(|row| text(row).chars().count()).max();
    let numbers = width(|row| &row.number).unwrap_or(0).max(2);
    let names = width(|row| &row.name).unwrap_or(0).max(5);
    let mut out = format!(
        "{:>numbers$}  {:names$}  {:>15}  {:8}  {:>6}  {:>9}\n",
        "", "matrix", "shape", "encoding", "bits", "error"
    );
    for row in rows {
        let error = row.error.map(|e| format!("{:.4} %", 100.0 * e));
        let line = format!(
            "{:>numbers$}  {:names$}  {:>15}  {:8}  {:>6.3}  {:>9}",
            row.number,
            row.name,
            row.shape,
            row.encoding,
            row.bits,
            error.unwrap_or_default(),
        );
        out += line.trim_end();
        out.push('\n');
    }
    out
}
