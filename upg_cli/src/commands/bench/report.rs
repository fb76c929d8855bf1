//! Report of the measurements, as JSON and as text.
#![forbid(unsafe_code)]

use super::figure::Figure;
use super::generation::{Generation, Speeds};
use super::load::Loads;
use super::machine::Machine;
use super::matrices::{Decompressed, Kind, Products};
use crate::cli::MeasureArgs;
use crate::terminal::bytes;
use serde_json::{Value, json};
use upg_kernel::format::UpgFile;

/// All results of `upg bench FILE`.
pub struct Report<'a> {
    pub args: &'a MeasureArgs,
    pub machine: &'a Machine,
    pub file: &'a UpgFile,
    /// Reason why the file is not a runnable model.
    pub unfit: Option<&'a str>,
    pub loads: &'a Loads,
    pub generation: Option<&'a Generation<'a>>,
    pub peak: Option<u64>,
    /// Bytes of memory read per bandwidth pass.
    pub read_bytes: u64,
    pub products: &'a Products,
    pub decompressed: &'a [Decompressed],
    /// Processor time that others used meanwhile, in percent.
    pub others: Option<f64>,
    /// Bytes of all matrices, which are multiplied in turn.
    pub swept_bytes: u64,
}

impl Report<'_> {
    fn percent_of_read(&self, gbps: f64) -> f64 {
        100.0 * gbps / self.products.read.median
    }

    /// Returns the GB of weights that decoding reads per second.
    fn decode_gbps(&self) -> Option<f64> {
        let generation = self.generation?;
        let rate = generation.speeds.decode?.median;
        Some(generation.token_bytes as f64 * rate / 1e9)
    }

    pub fn as_json(&self) -> Value {
        let (args, machine, loads) = (self.args, self.machine, self.loads);
        let metadata = |key| self.file.metadata(key).unwrap_or_default();
        let speeds = self.generation.map(|g| &g.speeds);
        let prefill = speeds.and_then(|s| s.prefill);
        let decode = speeds.and_then(|s| s.decode);
        let products = self.products.of_kinds.iter().map(|p| {
            json!({
                "shape": [p.kind.rows, p.kind.cols],
                "encoding": p.kind.encoding,
                "layers": p.count,
                "bytes": p.bytes,
                "ms": 1e3 * p.seconds.median,
                "gbps": p.gbps.median,
                "gbps_spread": spread(p.gbps),
                "percent_of_read": self.percent_of_read(p.gbps.median),
            })
        });
        let decompressed = self.decompressed.iter().map(|d| {
            json!({
                "shape": [d.kind.rows, d.kind.cols],
                "encoding": d.kind.encoding,
                "layer": d.layer,
                "dtype": "BF16",
                "bytes": d.bytes,
                "ms": 1e3 * d.seconds.median,
                "gbps": d.gbps.median,
                "gbps_spread": spread(d.gbps),
            })
        });
        let batches = self.generation.iter().flat_map(|g| &g.batches);
        let batches = batches.map(|(sequences, rate)| {
            json!({
                "sequences": sequences,
                "decode_tps": rate.median,
                "decode_tps_spread": spread(*rate),
                "decode_tps_per_sequence": rate.median / *sequences as f64,
            })
        });
        let llamas = self.generation.iter().flat_map(|g| &g.llamas);
        let llamas = llamas.map(|(llama, theirs)| {
            let about = llama.about();
            json!({
                "file": llama.gguf.display().to_string(),
                "model": about.model,
                "model_bytes": about.model_bytes,
                "build": about.build,
                "prefill_tps": theirs.prefill.map(|f| f.median),
                "prefill_tps_spread": theirs.prefill.map(spread),
                "prefill_ratio": ratio(prefill, theirs.prefill),
                "decode_tps": theirs.decode.map(|f| f.median),
                "decode_tps_spread": theirs.decode.map(spread),
                "decode_ratio": ratio(decode, theirs.decode),
            })
        });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "file": self.file.path().display().to_string(),
            "file_bytes": self.file.file_len(),
            "model": metadata("model"),
            "not_run": self.unfit,
            "cpu": machine.cpu,
            "threads": machine.threads,
            "kernels": machine.kernels,
            "load_average": machine.load_average,
            "others_percent": self.others,
            "repetitions": args.repetitions,
            "read_gbps": self.products.read.median,
            "read_gbps_spread": spread(self.products.read),
            "read_bytes": self.read_bytes,
            "load_cold_s": loads.cold.as_ref().ok().map(|f| f.median),
            "load_not_cold": loads.cold.as_ref().err(),
            "load_warm_s": loads.warm.median,
            "first_token_cold_s": loads.first_token_cold,
            "first_token_warm_s": loads.first_token_warm.map(|f| f.median),
            "peak_rss_bytes": self.peak,
            "prompt_tokens": args.prompt_tokens,
            "prefill_tps": prefill.map(|f| f.median),
            "prefill_tps_spread": prefill.map(spread),
            "generate": args.generate,
            "depth": args.depth,
            "decode_tps": decode.map(|f| f.median),
            "decode_tps_spread": decode.map(spread),
            "decode_token_bytes": self.generation.map(|g| g.token_bytes),
            "decode_percent_of_read": self.decode_gbps().map(|gbps| self.percent_of_read(gbps)),
            "batches": batches.collect::<Vec<_>>(),
            "matvec": products.collect::<Vec<_>>(),
            "matvec_bytes": self.swept_bytes,
            "decompress": decompressed.collect::<Vec<_>>(),
            "llama": llamas.collect::<Vec<_>>(),
        })
    }

    pub fn as_table(&self) -> String {
        let mut lines = self.head();
        lines.extend(self.generated());
        lines.extend(self.multiplied());
        lines.extend(self.unpacked());
        lines.extend(self.compared());
        lines
            .iter()
            .map(|line| format!("{}\n", line.trim_end()))
            .collect()
    }

    fn head(&self) -> Vec<String> {
        let (machine, loads) = (self.machine, self.loads);
        let model = self.file.metadata("model").unwrap_or_default();
        let cpu = machine.cpu.as_deref().unwrap_or("unknown processor");
        let cold = match &loads.cold {
            Ok(cold) => format!("{:.3} s", cold.median),
            Err(why) => format!("not measured: {why}"),
        };
        let cold_token = loads
            .first_token_cold
            .map_or(String::new(), |s| format!(", to the first token {s:.3} s"));
        let warm_token = loads.first_token_warm.map_or(String::new(), |f| {
            format!(", to the first token {:.3} s", f.median)
        });
        let load = machine.load_average.map_or(String::new(), |load| {
            format!("; load average before {load:.2}")
        });
        let others = self.others.map_or(String::new(), |percent| {
            format!("; others used {percent:.0} % of the processors meanwhile")
        });
        vec![
            format!(
                "{}: {}, {}",
                self.file.path().display(),
                model.escape_debug(),
                bytes(self.file.file_len())
            ),
            format!(
                "upg {}, kernels {}, {} threads, {}",
                env!("CARGO_PKG_VERSION"),
                machine.kernels,
                machine.threads,
                cpu.escape_debug(),
            ),
            format!("medians of {} or more{load}{others}", self.args.repetitions),
            String::new(),
            format!(
                "read         {:>9.1} GB/s     {} of memory, {}",
                self.products.read.median,
                bytes(self.read_bytes),
                between(self.products.read)
            ),
            format!("load, cold   {cold}{cold_token}"),
            format!("load, warm   {:.3} s{warm_token}", loads.warm.median),
            format!(
                "peak memory  {}",
                self.peak.map_or_else(|| "unknown".into(), bytes)
            ),
        ]
    }

    fn generated(&self) -> Vec<String> {
        let Some(generation) = self.generation else {
            let why = self.unfit.unwrap_or("unknown");
            return vec![format!("not run      {}", why.escape_debug())];
        };
        let Speeds { prefill, decode } = &generation.speeds;
        let prefill = prefill.map(|rate| {
            format!(
                "prefill      {:>9.1} tokens/s {} tokens, {}",
                rate.median,
                self.args.prompt_tokens,
                between(rate)
            )
        });
        let decode = decode.map(|rate| {
            format!(
                "decode       {:>9.1} tokens/s {} tokens after {}, {}",
                rate.median,
                self.args.generate,
                self.args.depth,
                between(rate)
            )
        });
        let weights = self.decode_gbps().map(|gbps| {
            format!(
                "             {gbps:>9.1} GB/s     {:.0} % of read: {} of weights for each token",
                self.percent_of_read(gbps),
                bytes(generation.token_bytes)
            )
        });
        let batches = generation.batches.iter().map(|(sequences, rate)| {
            format!(
                "             {:>9.1} tokens/s {sequences} at once, {:.1} each, {}",
                rate.median,
                rate.median / *sequences as f64,
                between(*rate)
            )
        });
        let lines = prefill.into_iter().chain(decode).chain(weights);
        lines.chain(batches).collect()
    }

    fn multiplied(&self) -> Vec<String> {
        let mut lines = vec![
            String::new(),
            format!(
                "matrix-vector products, all {} in turn, from memory",
                bytes(self.swept_bytes)
            ),
        ];
        lines.push(format!(
            "{:>15}  {:8}  {:>6}  {:>9}  {:>7}  {:>9}",
            "shape", "encoding", "layers", "ms", "GB/s", "of read"
        ));
        lines.extend(self.products.of_kinds.iter().map(|p| {
            format!(
                "{}  {:>6}  {:>9.3}  {:>7.1}  {:>7.0} %",
                described(&p.kind),
                p.count,
                1e3 * p.seconds.median,
                p.gbps.median,
                self.percent_of_read(p.gbps.median)
            )
        }));
        lines
    }

    fn unpacked(&self) -> Vec<String> {
        if self.decompressed.is_empty() {
            return Vec::new();
        }
        let mut lines = vec![
            String::new(),
            "one layer decompressed to BF16".into(),
            format!(
                "{:>15}  {:8}  {:>9}  {:>12}  written",
                "shape", "encoding", "ms", "GB/s written"
            ),
        ];
        lines.extend(self.decompressed.iter().map(|d| {
            format!(
                "{}  {:>9.3}  {:>12.2}  {}",
                described(&d.kind),
                1e3 * d.seconds.median,
                d.gbps.median,
                bytes(d.bytes)
            )
        }));
        lines
    }

    fn compared(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (llama, theirs) in self.generation.iter().flat_map(|g| &g.llamas) {
            let about = llama.about();
            lines.push(String::new());
            lines.push(format!(
                "llama.cpp {}: {}, {}, {}",
                about.build.as_deref().unwrap_or("unknown").escape_debug(),
                llama.gguf.display(),
                about.model.as_deref().unwrap_or("unknown").escape_debug(),
                about
                    .model_bytes
                    .map_or_else(|| "unknown size".into(), bytes)
            ));
            let ours = self.generation.map(|g| &g.speeds);
            let pairs = [
                ("prefill", ours.and_then(|s| s.prefill), theirs.prefill),
                ("decode", ours.and_then(|s| s.decode), theirs.decode),
            ];
            for (what, ours, theirs) in pairs {
                if let Some((theirs, ratio)) = theirs.zip(ratio(ours, theirs)) {
                    lines.push(format!(
                        "{what:12} {:>9.1} tokens/s {}; upg has {ratio:.2} times as many",
                        theirs.median,
                        between(theirs)
                    ));
                }
            }
        }
        lines
    }
}

fn described(kind: &Kind) -> String {
    let shape = format!("{} x {}", kind.rows, kind.cols);
    format!("{shape:>15}  {:8}", kind.encoding)
}

fn spread(figure: Figure) -> [f64; 2] {
    [figure.least, figure.most]
}

fn between(figure: Figure) -> String {
    format!("{:.1} to {:.1}", figure.least, figure.most)
}

fn ratio(ours: Option<Figure>, theirs: Option<Figure>) -> Option<f64> {
    Some(ours?.median / theirs?.median)
}
