//! `upg inspect` for version 1 files.
#![forbid(unsafe_code)]

use crate::cli::InspectArgs;
use crate::terminal;
use serde_json::{Value, json};
use std::fmt::Write;
use upg_kernel::Result;
use upg_kernel::v1::{Catalogue, CatalogueEntry, V1File};

pub fn run(args: &InspectArgs) -> Result<()> {
    let file = V1File::open(&args.file, &[])?;
    let text = match args.json {
        true => plain(&format!("{:#}\n", as_json(&file))),
        false => as_table(&file),
    };
    terminal::print(&text)
}

fn as_json(file: &V1File) -> Value {
    let catalogue = file.catalogue();
    let tensors = catalogue.tensors.iter().map(|tensor| {
        json!({
            "name": tensor.name,
            "file": tensor.file.as_deref(),
            "shape": tensor.shape,
            "weights": tensor.has_weights(),
            "notes": tensor.notes,
        })
    });
    json!({
        "file": file.path().display().to_string(),
        "version": "1",
        "model_type": catalogue.model_type,
        "source": catalogue.source,
        "compression_method": catalogue.compression_method,
        "target_compression": catalogue.target_compression,
        "tensors": tensors.collect::<Vec<_>>(),
    })
}

/// Escapes the control characters that JSON leaves unescaped and
/// that a terminal would interpret.
fn plain(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c.is_control() && c != '\n' {
            true => out += &format!("\\u{:04x}", u32::from(c)),
            false => out.push(c),
        }
    }
    out
}

fn as_table(file: &V1File) -> String {
    let catalogue = file.catalogue();
    let shown = |text: &Option<String>| match text {
        Some(text) => text.escape_debug().to_string(),
        None => "not said".to_owned(),
    };
    let mut out = format!(
        "{}: UPG 1 (a Python pickle)\nmodel {}, made of {}, by {}, target {}\n\n",
        file.path().display(),
        shown(&catalogue.model_type),
        shown(&catalogue.source),
        shown(&catalogue.compression_method),
        note(Some(&catalogue.target_compression)),
    );
    let names = catalogue
        .tensors
        .iter()
        .map(|t| t.name.escape_debug().to_string());
    let width = names
        .map(|name| name.chars().count())
        .max()
        .unwrap_or(0)
        .max(6);
    let mut line = |text: String| {
        out += text.trim_end();
        out.push('\n');
    };
    line(format!(
        "{:width$}  {:>15}  {:9}  {:>14}  {:>14}  {:>8}  {:12}  weights",
        "tensor", "shape", "dtype", "original", "compressed", "sparsity", "quantization"
    ));
    for tensor in &catalogue.tensors {
        let note = |key: &str| note(tensor.notes.get(key));
        line(format!(
            "{:width$}  {:>15}  {:9}  {:>14}  {:>14}  {:>8}  {:12}  {}",
            tensor.name.escape_debug().to_string(),
            shape(tensor),
            note("dtype"),
            note("original_bytes"),
            note("compressed_bytes"),
            note("sparsity_level"),
            note("quantization"),
            if tensor.has_weights() { "yes" } else { "no" },
        ));
    }
    let _ = writeln!(out, "\n{}", what_next(catalogue));
    out
}

fn what_next(catalogue: &Catalogue) -> String {
    let count = catalogue.tensors.len();
    let with_weights = catalogue.tensors.iter().filter(|t| t.has_weights()).count();
    match with_weights {
        0 => format!("a list of {count} tensors only: the file has no weights"),
        n if n == count => {
            format!("{count} tensors; `upg convert` makes a file of version 2 of them")
        }
        n => format!("{count} tensors, the weights of {n} of them: the file is not whole"),
    }
}

fn shape(tensor: &CatalogueEntry) -> String {
    let sizes = tensor.shape.iter().map(u64::to_string);
    sizes.collect::<Vec<_>>().join(" x ")
}

/// Formats a description of a tensor, with control characters escaped.
fn note(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.escape_debug().to_string(),
        Some(other) => other.to_string(),
    }
}
