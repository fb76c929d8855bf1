//! `upg compress`.
#![forbid(unsafe_code)]

use super::report;
use crate::cli::CompressArgs;
use crate::progress::WeightsBar;
use crate::terminal::{self, bytes, duration};
use std::fmt::Write as _;
use std::io::Write as _;
use std::num::NonZeroUsize;
use std::path::Path;
use upg_compress::sensitivity::{BUILT_IN_TOKENS, json_lines};
use upg_compress::{
    Budget, Calibration, Choice, CompressOptions, CompressReport, Preflight, Source,
    compress_checked, count_encodings, partial_files, source,
};
use upg_kernel::format::Encoding;
use upg_kernel::inference::tokenizer::MAX_TEXT_BYTES;
use upg_kernel::support::{AtomicFile, refuse_to_overwrite};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result};

/// Estimated seconds below which work starts without a notice.
const WORTH_A_LINE: f64 = 10.0;

/// Estimated seconds above which the notice recommends `--resume`.
const WORTH_RESUMING: f64 = 600.0;

/// Weights below which a model is compressed with `q8` by default: it bears less loss, and is
/// small anyway.
const SMALL_MODEL: usize = 1_000_000_000;

/// Tokens of the built-in text for a calibration that was not asked for.
const UNASKED_TOKENS: usize = BUILT_IN_TOKENS / 4;

/// Largest JSON lines file to calibrate on, in bytes;
/// each document may be as long as a plain text.
const LONGEST_LINES: usize = 256 << 20;

pub fn run(args: &CompressArgs, open: OpenOptions) -> Result<()> {
    if args.output.is_dir() {
        return Err(Error::new(ErrorKind::Argument, "the output is a directory")
            .at(&args.output)
            .hint("name a file, for example model.safetensors"));
    }
    let text = args.calibrate.iter().flatten();
    refuse_to_overwrite(&args.output, text.clone())?;
    if let Some(report) = &args.report {
        let [data, journal] = partial_files(&args.output)?;
        let others = [args.output.clone(), data, journal];
        refuse_to_overwrite(report, text.chain(&others))?;
    }
    let source = source::open_with(&args.source, open)?;
    let options = options(args, source.as_ref())?;
    // Checked before the work: an error after hours would be too late.
    let report_file = match &args.report {
        Some(path) if !args.dry_run => Some(AtomicFile::create_from(path, source.own_files())?),
        _ => None,
    };
    let preflight =
        Preflight::new(source.as_ref(), &args.output, &options).map_err(|e| e.at(&args.source))?;
    if args.dry_run {
        terminal::print(&plan(&preflight))?;
        terminal::print_prose(&(cost(&preflight) + "\n"))?;
        return preflight.check();
    }
    preflight.check()?;
    announce(args, &preflight, &options)?;

    let progress = WeightsBar::new(Some(preflight.seconds))?;
    let report = compress_checked(source.as_ref(), &args.output, &options, &progress).map_err(
        |e| match e.kind() {
            ErrorKind::Interrupted if args.resume => e.hint("run the same command again to resume"),
            _ => e.at(&args.source),
        },
    )?;
    drop(progress);
    if let Some(file) = report_file {
        write_report(file, &report, &preflight)?;
    }
    if args.json {
        let mut json = report.to_json()["totals"].take();
        json["file"] = args.output.display().to_string().into();
        return terminal::print(&format!("{json:#}\n"));
    }
    terminal::print_prose(&summary(&args.output, source.as_ref(), &report))
}

/// Returns the encoding of a model for which none was chosen.
///
/// SmolLM2 (135 M weights): q8 takes 9 s and gives a KL divergence of 0.001; q4 gives 0.19, and
/// 0.06 after two minutes of calibration.
fn default_encoding(source: &dyn Source) -> Choice {
    let weights: usize = source.tensors().iter().map(|t| t.weights()).sum();
    Choice::Encode(match weights < SMALL_MODEL {
        true => Encoding::Q8,
        false => Encoding::Q4,
    })
}

/// Returns the calibration of a compression without options; `None` where it is not worth its time,
/// and, with a note, where it is not possible.
pub fn unasked_calibration(source: &dyn Source, encoding: Choice) -> Result<Option<Calibration>> {
    if !needs_calibration(encoding) {
        return Ok(None);
    }
    match Calibration::built_in(source, UNASKED_TOKENS) {
        // Weights without a config or a tokenizer cannot run.
        Err(e) if e.kind() == ErrorKind::Missing => {
            terminal::note(format_args!("upg: not calibrated: {e}"));
            Ok(None)
        }
        calibration => calibration.map(Some),
    }
}

/// Returns whether a model loses so much in this encoding that it is calibrated unasked.
fn needs_calibration(encoding: Choice) -> bool {
    match encoding {
        Choice::Encode(encoding) => {
            !matches!(encoding, Encoding::MdCsr | Encoding::Q8 | Encoding::S8)
        }
        _ => false,
    }
}

fn options(args: &CompressArgs, source: &dyn Source) -> Result<CompressOptions> {
    let encoding = args.encoding.unwrap_or_else(|| default_encoding(source));
    let mut options = CompressOptions::new(encoding);
    options.embedding = args.embedding;
    options.group = args.group;
    options.overrides = args.overrides.clone();
    options.seed = args.seed;
    options.sparse = args.sparse;
    options.prune = args.prune;
    options.resume = args.resume;
    options.output_errors = args.report.is_some();
    options.budget = budget(args, source);
    if let Some(budget) = options.budget {
        options.encoding = Choice::Encode(budget.encoding());
    }
    let most = args.calibration_tokens.map(NonZeroUsize::get);
    if let Some(text) = &args.calibrate {
        options.calibration = Some(calibration(source, text.as_deref(), most)?);
    } else if needs_text(&options) || most.is_some() {
        let most = most.unwrap_or(UNASKED_TOKENS);
        options.calibration = Some(Calibration::built_in(source, most)?);
    } else if !args.no_calibrate {
        options.calibration = unasked_calibration(source, options.encoding)?;
    }
    Ok(options)
}

/// Returns whether the options cannot be met without a calibration.
fn needs_text(options: &CompressOptions) -> bool {
    options.budget.is_some() || options.prune.is_some()
}

fn budget(args: &CompressArgs, source: &dyn Source) -> Option<Budget> {
    let weights = source.tensors().iter().map(|t| t.weights() as f64);
    let of_ratio = |ratio: f64| Budget::File((4.0 * weights.sum::<f64>() / ratio) as u64);
    let bits = args.bpw.map(Budget::Blocks);
    bits.or(args.ratio.map(of_ratio))
        .or(args.size.map(Budget::File))
}

/// Lists the encoding of every tensor.
fn plan(preflight: &Preflight) -> String {
    let mut text = String::new();
    for group in &preflight.groups {
        let _ = writeln!(
            text,
            "{:>4} x {:<48} {:>5}  {:<16} {:>9}",
            group.tensors,
            group.name.escape_debug().to_string(),
            group.encoding,
            format!("{:?}", group.shape),
            bytes(group.bytes),
        );
    }
    text
}

/// Formats size, memory and time in one line.
fn cost(preflight: &Preflight) -> String {
    let memory_free = preflight.memory_free;
    format!(
        "will write {}{} ({} free), use up to {} of memory ({} free) plus {} for the source, and take about {}",
        if preflight.is_bound { "at most " } else { "" },
        bytes(preflight.file_bytes),
        bytes(preflight.disk_free),
        bytes(preflight.memory.own),
        memory_free.map_or("unknown".to_owned(), bytes),
        bytes(preflight.memory.mapped),
        duration(preflight.seconds),
    )
}

/// Announces the work if it will take long enough.
fn announce(args: &CompressArgs, preflight: &Preflight, options: &CompressOptions) -> Result<()> {
    let [data, journal] = partial_files(&args.output)?;
    if !args.resume && data.exists() && journal.exists() {
        terminal::note(format_args!(
            "upg: {} is left from a stopped run; --resume continues it, this run starts from scratch",
            data.display()
        ));
    }
    if preflight.seconds >= WORTH_A_LINE {
        terminal::note(format_args!("upg: {}", cost(preflight)));
        if options.calibration.is_some() && args.calibrate.is_none() {
            terminal::note(match needs_text(options) {
                true => "upg: most of that is calibration; --calibration-tokens sets how much",
                false => "upg: most of that is calibration; --no-calibrate leaves it out",
            });
        }
    }
    if preflight.seconds >= WORTH_RESUMING && !args.resume {
        terminal::note("upg: with --resume this run could be continued after a stop");
    }
    Ok(())
}

fn write_report(
    mut file: AtomicFile,
    report: &CompressReport,
    preflight: &Preflight,
) -> Result<()> {
    let mut json = report.to_json();
    json["stated"] = serde_json::json!({
        "file_bytes": preflight.file_bytes,
        "memory_bytes": preflight.memory.own,
        "mapped_bytes": preflight.memory.mapped,
        "seconds": preflight.seconds,
    });
    let path = file.path().to_path_buf();
    let text = match report::is_page(&path) {
        true => report::page(&json)?,
        false => format!("{json:#}\n"),
    };
    file.write_all(text.as_bytes())
        .map_err(|e| Error::io("cannot write", path, e))?;
    file.commit()
}

pub fn summary(output: &Path, source: &dyn Source, report: &CompressReport) -> String {
    let mut text = format!(
        "{}: {}, {:.3} bits per weight ({:.1} % of F32), in {:.1} s\n",
        output.display(),
        bytes(report.file_bytes),
        report.bits_per_weight(),
        100.0 * report.bits_per_weight() / 32.0,
        report.seconds,
    );
    if report.restored > 0 {
        text += &format!(
            "{} of {} tensors were there from an earlier run\n",
            report.restored,
            report.tensors.len()
        );
    }
    let error = |e: Option<f64>| e.unwrap_or(0.0);
    let worst = report
        .layers
        .iter()
        .max_by(|a, b| error(a.error).total_cmp(&error(b.error)));
    if let Some(calibration) = report.calibration {
        // The weights have larger errors than without a text, and the predictions smaller ones.
        text += &format!("calibrated on {} tokens", calibration.tokens);
        text += &match report.divergence() {
            Some(nats) => format!("; predicted KL divergence {nats:.4}\n"),
            None => "\n".to_owned(),
        };
    } else if let Some((layer, error)) = worst.and_then(|l| Some((l, l.error?))) {
        text += &format!(
            "largest relative error {:.3} % ({}, {})\n",
            100.0 * error,
            layer.name,
            layer.encoding_name()
        );
    }
    let counts = count_encodings(&report.layers);
    if counts.len() > 1 {
        let counts = counts.iter().map(|(name, n)| format!("{n} {name}"));
        text += &format!(
            "blocks {:.3} bits per weight: {}\n",
            report.bits_per_weight_blocks(),
            counts.collect::<Vec<_>>().join(", ")
        );
    }
    if let Some(zeros) = report.zeros {
        text += &format!(
            "{} matrices stored by their zeros, {:.1} % of their weights\n",
            zeros.matrices,
            100.0 * zeros.share()
        );
    }
    if let Some(first) = source.skipped().first() {
        text += &format!(
            "{} tensors left out, the first of them {}: {}\n",
            source.skipped().len(),
            first.name.escape_debug(),
            first.reason
        );
    }
    text
}

/// Reads the calibration text from a file, or takes the built-in one.
pub fn calibration(
    source: &dyn Source,
    path: Option<&Path>,
    most: Option<usize>,
) -> Result<Calibration> {
    let Some(path) = path else {
        return Calibration::built_in(source, most.unwrap_or(BUILT_IN_TOKENS));
    };
    let most = most.unwrap_or(usize::MAX);
    let is_lines = path
        .extension()
        .is_some_and(|extension| extension == "jsonl");
    match is_lines {
        true => {
            let content = terminal::read_text(path, LONGEST_LINES)?;
            let documents = json_lines(&content).map_err(|e| e.at(path))?;
            Calibration::of_documents(source, &documents, most)
        }
        false => {
            let content = terminal::read_text(path, MAX_TEXT_BYTES)?;
            Calibration::of_text(source, &content, most)
        }
    }
}
