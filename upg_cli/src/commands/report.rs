//! `upg report`: a page with the figures of a compression.
#![forbid(unsafe_code)]

use super::kinds::split;
use crate::cli::ReportArgs;
use crate::terminal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use upg_kernel::format::json;
use upg_kernel::support::AtomicFile;
use upg_kernel::{Error, ErrorKind, Result};

/// Largest report in bytes: 300 bytes a tensor.
const MAX_REPORT: usize = 64 << 20;

/// Most layers and kinds of matrices on a page.
const MAX_SHOWN: usize = 512;

pub fn run(args: &ReportArgs) -> Result<()> {
    let text = terminal::read_text(&args.report, MAX_REPORT)?;
    let report = json::value("the report", &text).map_err(|e| e.at(&args.report))?;
    let page = page(&report).map_err(|e| e.at(&args.report))?;
    let mut file = AtomicFile::create_from(&args.output, [&args.report])?;
    file.write_all(page.as_bytes())
        .map_err(|e| Error::io("cannot write", &args.output, e))?;
    file.commit()?;
    terminal::print(&format!("{}\n", args.output.display()))
}

/// Returns whether a report of this name is a page.
pub fn is_page(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    extension.eq_ignore_ascii_case("html") || extension.eq_ignore_ascii_case("htm")
}

/// The matrix of one kind in one layer.
#[derive(Clone, Default)]
struct Cell {
    encoding: String,
    bits: f64,
    error: Option<f64>,
    divergence: Option<f64>,
}

/// Kinds of matrices in the order of the report, with a cell for each layer that has one.
type Kinds = Vec<(String, BTreeMap<usize, Cell>)>;

/// Returns a self-contained HTML page of a report of `upg compress`.
///
/// Errors (`Malformed`): it is none.
pub fn page(report: &Value) -> Result<String> {
    let malformed = || Error::new(ErrorKind::Malformed, "no report of upg compress");
    let tensors = report.get("tensors").and_then(Value::as_array);
    let kinds = kinds(tensors.ok_or_else(malformed)?);
    let totals = report.get("totals").ok_or_else(malformed)?;
    let mut out = String::from(HEAD);
    out += "<h1>Compressed model</h1>\n";
    facts(&mut out, totals);
    out += "<h2>Bits per weight by layer and matrix</h2>\n";
    heat_map(&mut out, &kinds);
    let by_layer = divergences(&kinds);
    if by_layer.iter().any(|sum| *sum > 0.0) {
        out += "<h2>Predicted divergence by layer</h2>\n\
                <p>What the rounding of a layer adds to the KL divergence of the model, in nats; \
                higher is worse.</p>\n";
        bars(&mut out, &by_layer);
    }
    out += "<h2>Kinds of matrices</h2>\n";
    table(&mut out, &kinds);
    Ok(out + "</main></body></html>\n")
}

fn kinds(tensors: &[Value]) -> Kinds {
    let mut kinds = Kinds::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in tensors {
        let text = |key: &str| tensor.get(key).and_then(Value::as_str).unwrap_or_default();
        let number = |key: &str| tensor.get(key).and_then(Value::as_f64);
        let shape = tensor.get("shape").and_then(Value::as_array);
        // Vectors are never compressed.
        if shape.is_none_or(|shape| shape.len() != 2) {
            continue;
        }
        let (name, layer) = split(text("name"));
        if layer >= MAX_SHOWN {
            continue;
        }
        let place = *places.entry(name.clone()).or_insert(kinds.len());
        if place == kinds.len() {
            kinds.push((name, BTreeMap::new()));
        }
        let cell = Cell {
            encoding: text("encoding").to_owned(),
            bits: number("bits_per_weight").unwrap_or(0.0),
            error: number("weight_error"),
            divergence: number("divergence"),
        };
        kinds[place].1.insert(layer, cell);
    }
    kinds.truncate(MAX_SHOWN);
    kinds
}

/// Returns the sum of the divergences of each layer; matrices outside of layers count as the first.
fn divergences(kinds: &Kinds) -> Vec<f64> {
    let mut sums = vec![0.0; layers(kinds)];
    for (layer, cell) in kinds.iter().flat_map(|(_, cells)| cells) {
        sums[*layer] += cell.divergence.unwrap_or(0.0);
    }
    sums
}

fn layers(kinds: &Kinds) -> usize {
    let last = kinds.iter().filter_map(|(_, cells)| cells.keys().last());
    last.max().map_or(0, |last| last + 1)
}

/// Writes the figures of the whole file.
fn facts(out: &mut String, totals: &Value) {
    let number = |path: &str| totals.pointer(path).and_then(Value::as_f64);
    let calibration = number("/calibration/tokens").filter(|tokens| *tokens > 0.0);
    let facts = [
        (
            "file",
            number("/file_bytes").map(|n| terminal::bytes(n as u64)),
        ),
        (
            "weights",
            number("/weights").map(|n| format!("{:.1} million", n / 1e6)),
        ),
        (
            "bits per weight",
            number("/bits_per_weight").map(|n| format!("{n:.3}")),
        ),
        (
            "in blocks",
            number("/bits_per_weight_blocks").map(|n| format!("{n:.3}")),
        ),
        (
            "predicted divergence",
            number("/divergence").map(|n| format!("{n:.5} nats")),
        ),
        ("calibrated on", calibration.map(|n| format!("{n} tokens"))),
        ("time", number("/seconds").map(terminal::duration)),
        (
            "peak memory",
            number("/peak_memory_bytes").map(|n| terminal::bytes(n as u64)),
        ),
    ];
    *out += "<dl>";
    for (name, value) in facts {
        if let Some(value) = value {
            let _ = write!(
                out,
                "<div><dt>{name}</dt><dd>{}</dd></div>",
                escaped(&value)
            );
        }
    }
    *out += "</dl>\n";
}

/// Edge of a cell of the heat map.
const CELL: usize = 18;
/// Room for the names of the rows.
const NAMES: usize = 170;

/// Writes a row for each kind, a column for each layer.
fn heat_map(out: &mut String, kinds: &Kinds) {
    let rows: Vec<_> = kinds.iter().filter(|(_, cells)| cells.len() > 1).collect();
    let columns = layers(kinds);
    let (width, height) = (NAMES + CELL * columns + 10, CELL * rows.len() + 24);
    let _ = writeln!(
        out,
        "<div class=wide><svg width={width} height={height} role=img aria-label='Bits per weight'>"
    );
    for (row, (name, cells)) in rows.iter().enumerate() {
        let y = CELL * row;
        let _ = writeln!(
            out,
            "<text x={} y={} class=name>{}</text>",
            NAMES - 8,
            y + 13,
            escaped(name)
        );
        for (layer, cell) in cells {
            let _ = writeln!(
                out,
                "<rect x={} y={y} width={} height={} fill='{}'><title>layer {layer}, {}: {}, {:.3} bits{}</title></rect>",
                NAMES + CELL * layer,
                CELL - 1,
                CELL - 1,
                colour(cell.bits),
                escaped(name),
                escaped(&cell.encoding),
                cell.bits,
                percent(", relative error ", cell.error),
            );
        }
    }
    for layer in (0..columns).step_by(5) {
        let x = NAMES + CELL * layer + CELL / 2;
        let _ = writeln!(
            out,
            "<text x={x} y={} class=axis>{layer}</text>",
            height - 8
        );
    }
    *out += "</svg></div>\n<p class=legend>";
    for bits in [2, 3, 4, 5, 6, 7, 8] {
        let _ = write!(
            out,
            "<span style='background:{}'></span> {bits} ",
            colour(f64::from(bits))
        );
    }
    *out += "and more bits per weight</p>\n";
}

/// Colours at 2, 4, 6 and 8 bits, red, green and blue: of the scale viridis, without its darkest
/// part, which a dark page would hide.
const COLOURS: [[f64; 3]; 4] = [
    [253.0, 231.0, 37.0],
    [94.0, 201.0, 98.0],
    [33.0, 145.0, 140.0],
    [59.0, 82.0, 139.0],
];

/// Returns a colour between those of [`COLOURS`].
fn colour(bits: f64) -> String {
    let place = ((bits - 2.0) / 2.0).clamp(0.0, 3.0);
    let below = (place as usize).min(COLOURS.len() - 2);
    let share = place - below as f64;
    let (from, to) = (COLOURS[below], COLOURS[below + 1]);
    let [r, g, b] = std::array::from_fn(|i| (from[i] + (to[i] - from[i]) * share) as u8);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Writes a bar for each layer.
fn bars(out: &mut String, values: &[f64]) {
    const HEIGHT: f64 = 120.0;
    let most = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let width = NAMES + CELL * values.len() + 10;
    let _ = writeln!(
        out,
        "<div class=wide><svg width={width} height=150 role=img aria-label='Divergence by layer'>"
    );
    let _ = writeln!(
        out,
        "<text x={} y=12 class=name>{most:.2e}</text><text x={} y=124 class=name>0</text>",
        NAMES - 8,
        NAMES - 8
    );
    for (layer, value) in values.iter().enumerate() {
        let height = HEIGHT * value / most;
        let _ = writeln!(
            out,
            "<rect x={} y={:.1} width={} height={height:.1} class=bar><title>layer {layer}: {value:.3e}</title></rect>",
            NAMES + CELL * layer,
            HEIGHT - height + 2.0,
            CELL - 2,
        );
    }
    for layer in (0..values.len()).step_by(5) {
        let x = NAMES + CELL * layer + CELL / 2;
        let _ = writeln!(out, "<text x={x} y=140 class=axis>{layer}</text>");
    }
    *out += "</svg></div>\n";
}

/// Writes the means of each kind.
fn table(out: &mut String, kinds: &Kinds) {
    *out += "<table><tr><th>matrix<th>number<th>encodings<th>bits<th>relative error<th>divergence</tr>\n";
    for (name, cells) in kinds {
        let mut encodings: BTreeMap<&str, usize> = BTreeMap::new();
        for cell in cells.values() {
            *encodings.entry(&cell.encoding).or_default() += 1;
        }
        let encodings = encodings.iter().map(|(name, count)| match encodings.len() {
            1 => (*name).to_owned(),
            _ => format!("{count} {name}"),
        });
        let mean = |figure: fn(&Cell) -> Option<f64>| {
            let known: Vec<f64> = cells.values().filter_map(figure).collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
        };
        let divergence = mean(|cell| cell.divergence).map(|mean| mean * cells.len() as f64);
        let _ = writeln!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{:.3}<td>{}<td>{}</tr>",
            escaped(name),
            cells.len(),
            escaped(&encodings.collect::<Vec<_>>().join(", ")),
            mean(|cell| Some(cell.bits)).unwrap_or(0.0),
            percent("", mean(|cell| cell.error)),
            divergence.map_or(String::new(), |d| format!("{d:.2e}")),
        );
    }
    *out += "</table>\n";
}

fn percent(before: &str, share: Option<f64>) -> String {
    share.map_or(String::new(), |share| {
        format!("{before}{:.2} %", 100.0 * share)
    })
}

/// Returns a text without characters that mean something in HTML.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '&' => out += "&amp;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
        out
    })
}

const HEAD: &str = "<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>
<title>UPG report</title>
<style>
:root { color-scheme: light dark; --bar: #3366aa; }
@media (prefers-color-scheme: dark) { :root { --bar: #88aaee; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2rem; font-size: 1.2rem; }
dl { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; margin: 0; }
dt { font-size: 0.8rem; opacity: 0.7; }
dd { margin: 0; font-size: 1.1rem; }
.wide { overflow-x: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
svg .name { text-anchor: end; }
svg .axis { text-anchor: middle; opacity: 0.7; }
svg .bar { fill: var(--bar); }
.legend span { display: inline-block; width: 0.9em; height: 0.9em; margin-left: 0.6em; vertical-align: -0.1em; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: 0.2rem 0.8rem; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
</style></head><body><main>
";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use serde_json::json;

    #[test]
    fn a_page_has_every_kind_and_no_markup_of_names() {
        let tensor = |name: &str, bits: f64| {
            json!({
                "name": name, "encoding": "q4", "shape": [2, 3], "bits_per_weight": bits,
                "weight_error": 0.125, "divergence": 1e-3,
            })
        };
        let report = json!({
            "totals": { "file_bytes": 1000, "calibration": { "tokens": 512 } },
            "tensors": [
                tensor("model.layers.0.mlp.<script>.weight", 4.25),
                tensor("model.layers.1.mlp.<script>.weight", 2.0),
                tensor("model.embed_tokens.weight", 8.0),
            ],
        });
        let page = page(&report).unwrap();
        assert!(!page.contains("<script>"), "{page}");
        for expected in [
            "512 tokens",
            "1.00 kB",
            "layer 1, mlp.&lt;script&gt;: q4, 2.000 bits, relative error 12.50 %",
            "<td>model.embed_tokens<td>1<td>q4<td>8.000<td>12.50 %<td>1.00e-3",
            "<td>2<td>q4<td>3.125<td>12.50 %<td>2.00e-3",
        ] {
            assert!(page.contains(expected), "{expected}: {page}");
        }
        for none in [json!({}), json!([]), json!({"tensors": []})] {
            assert!(super::page(&none).is_err(), "{none}");
        }
    }
}
