//! The command line: every flag, its default and its help text.
#![forbid(unsafe_code)]

mod complete;
mod generation;
mod models;

pub use generation::{CacheArg, ChatArgs, RunArgs, SamplingArgs};
pub use models::{ListArgs, ModelArgs, PullArgs, RmArgs, ShowArgs, TakesModel};

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::engine::{ArgValueCandidates, ArgValueCompleter};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use upg_compress::source::PUBLISHED;
use upg_compress::{Choice, Override, Sparse, TuneOptions};
use upg_kernel::format::Encoding;

/// Parses a finite number above 0.
fn positive(text: &str) -> Result<f64, String> {
    let number = text
        .parse()
        .ok()
        .filter(|n: &f64| *n > 0.0 && n.is_finite());
    number.ok_or_else(|| "expected a number above 0".to_owned())
}

/// Parses an integer above 0.
fn count(text: &str) -> Result<usize, String> {
    let number = text.parse::<NonZeroUsize>();
    number.map(NonZeroUsize::get).map_err(|e| e.to_string())
}

/// Parses a number above 0 and below 1.
fn share(text: &str) -> Result<f64, String> {
    let number = positive(text).ok().filter(|n| *n < 1.0);
    number.ok_or_else(|| "expected a number above 0 and below 1".to_owned())
}

/// Parses a number of bytes, with or without a unit: `700MB`, `5.5 GB`, `2GiB`.
fn size(text: &str) -> Result<u64, String> {
    let size = text.parse::<bytesize::ByteSize>();
    size.map(|size| size.as_u64())
}

/// Compress language models into one memory-mapped file and run them from it
#[derive(Parser)]
#[command(
    name = "upg",
    disable_version_flag = true,
    arg_required_else_help = true,
    args_override_self = true,
    max_term_width = 100,
    after_help = "\
Examples:
  upg compress SmolLM2-135M-Instruct/ -o smollm2.safetensors
  upg run smollm2.safetensors 'Why is the sky blue?'
  upg chat smollm2.safetensors
  upg chat HuggingFaceTB/SmolLM2-135M-Instruct

Exit codes:
  0    success
  1    error in a file or the system
  2    invalid option or argument
  3    model file truncated or overwritten while in use
  130  Ctrl-C (SIGTERM: 143, SIGHUP: 129); a second signal exits at once

Control characters are escaped on a terminal, as \\u{1b}, and unchanged in a file or a pipe."
)]
pub struct Cli {
    /// Number of threads [default: one per available core; one per hardware thread for all
    /// commands except run, chat, eval and bench]
    #[arg(short = 't', long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Read model files into memory instead of mapping them, and verify the checksums of UPG
    /// files while reading. For network drives and for files that may be written during use
    #[arg(long, global = true)]
    pub no_mmap: bool,
    /// Print the version
    #[arg(short = 'V', long)]
    pub version: bool,
    /// With --version: also list the available kernels and the selected ones
    #[arg(long, requires = "version")]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Compress a model directory or a GGUF file into a UPG file
    Compress(CompressArgs),
    /// Fine-tune the scales and norms of a UPG file to match the original model
    Tune(TuneArgs),
    /// Convert a version 1 file (a Python pickle) to UPG, without executing the pickle
    Convert(ConvertArgs),
    /// Export a UPG file to a Hugging Face directory that transformers can load
    Decompress(DecompressArgs),
    /// List the contents of a UPG file
    Inspect(InspectArgs),
    /// Verify the checksums and format rules of a UPG file, and that its model can run
    Verify(VerifyArgs),
    /// Generate text from a prompt, or compute logits for token ids
    Run(RunArgs),
    /// Chat with a model
    Chat(ChatArgs),
    /// Measure perplexity on a text, and the divergence from a reference model
    Eval(EvalArgs),
    /// Measure speed and memory use
    Bench(BenchArgs),
    /// Download a model by name, as user/model
    Pull(PullArgs),
    /// List the models in the caches
    List(ListArgs),
    /// Show what is in the caches of a model
    Show(ShowArgs),
    /// Remove a model from the caches
    Rm(RmArgs),
    /// Print a shell completion script
    Completions(CompletionsArgs),
    /// Make a page of the report of a compression
    Report(ReportArgs),
    /// Write man pages
    Man(ManArgs),
    /// Explain the words of this program
    #[command(after_help = GLOSSARY)]
    Glossary,
}

/// Text of `upg glossary`.
pub const GLOSSARY: &str = "\
encoding         How the weights of a matrix are stored: q8, q4, t4, t3, t2,
                 s8, s4, mdcsr, or keep for uncompressed.
bits per weight  Bytes of a file times 8, divided by the number of weights. `in
                 blocks` leaves out the embeddings and the output head, which
                 usually have more bits.
relative error   Error of the weights of a matrix against the original, as a
                 share of their size. Calibration makes it larger, and the
                 predictions better.
block            A layer of the transformer: attention and MLP. Most weights
                 are in blocks.
embedding        The matrix that turns a token into a vector. In models with
                 tied embeddings it is also the output head, which turns a
                 vector into probabilities of tokens.
perplexity       How unexpected a text is to a model: e to the mean negative
                 log-probability of its tokens. Lower is better; it depends on
                 the text and the tokenizer.
KL divergence    How far the predictions of a compressed model are from those
                 of the original, in nats for each position; 0 is equal. 0.01
                 is hard to notice, 0.1 is noticeable.
top-1 agreement  Share of positions at which both models find the same token
                 most probable.
calibrate        Compress so that the predictions on a text change least, not
                 the weights. Takes longer, and gives much better files below 8
                 bits.
tune             Train the scales and norms of a finished file to match the
                 original.
budget           A size, a mean number of bits or a ratio, for which compress
                 chooses the encoding of each matrix.
group            Columns of a matrix that share a scale, which is a prime from
                 a table.
context          The tokens that a model can see at once: the conversation and
                 the answer.
KV cache         What the model keeps of each token of the context, in memory.
temperature      Randomness of the choice of tokens; 0 always takes the most
                 probable one.
chat template    Text of the model that frames the messages of a conversation.
layer            In the list of `inspect` a matrix; in a model one block.
";

#[derive(Args)]
#[command(after_help = "\
Encodings, with bits per weight:
  keep   uncompressed, as in the source
  mdcsr  32    nearly lossless archive
  q8     8.13
  q4     4.26
  t4     4.01  rotated, trellis-coded
  t3     3.01  rotated, trellis-coded
  t2     2.01  rotated, trellis-coded
  s8     1.1, and 8 per nonzero weight; zeros are exact
  s4     1.2, and 4 per nonzero weight; zeros are exact

Examples:
  upg compress SmolLM2-135M-Instruct/ -o smollm2.safetensors
  upg compress microsoft/phi-4 -o phi4.safetensors
  upg compress model.gguf -o model.safetensors --encoding q4
  upg compress Phi-4/ -o phi4.safetensors --size 5.5GB --resume
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --calibrate text.txt
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --tensor '*.down_proj.weight=t4'
  upg compress Phi-4/ -o phi4.safetensors --encoding s8 --prune 0.5
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --dry-run
  upg compress Phi-4/ -o phi4.safetensors --encoding q4 --no-calibrate")]
pub struct CompressArgs {
    /// Hugging Face directory (config.json, *.safetensors), GGUF file, name as user/model, or
    /// version 1 UPG file (see convert)
    #[arg(add = ArgValueCompleter::new(complete::models))]
    pub source: PathBuf,
    /// Use what is in the cache of downloads, and no network
    #[arg(long)]
    pub offline: bool,
    /// Output file, written atomically; replaces an existing one
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Encoding of the transformer block matrices [default: q8 for a model of less than a billion
    /// weights, which bears little loss, else q4]
    #[arg(short, long, add = ArgValueCandidates::new(complete::encodings))]
    pub encoding: Option<Choice>,
    /// Target average bits per weight of the transformer block matrices: picks t2, t3, t4 or q8
    /// per matrix, with more bits for the most sensitive ones
    #[arg(long, value_name = "BITS", value_parser = positive, group = "budget", conflicts_with_all = ["encoding", "prune", "no_calibrate"])]
    pub bpw: Option<f64>,
    /// Like --bpw, with a target for the whole file:
    /// smaller than its weights in F32 by this factor
    #[arg(long, value_name = "FACTOR", value_parser = positive, group = "budget", conflicts_with_all = ["encoding", "prune", "no_calibrate"])]
    pub ratio: Option<f64>,
    /// Like --bpw, with a maximum size of the whole file, for example 5.5GB or 700MB
    #[arg(long, value_name = "SIZE", value_parser = size, group = "budget", conflicts_with_all = ["encoding", "prune", "no_calibrate"])]
    pub size: Option<u64>,
    /// Encoding of the embeddings and the output head [default: q8; q4 with t2 or t3 if q8
    /// embeddings would exceed 20 % of the file; the same as --encoding for keep and mdcsr]
    #[arg(long, value_name = "ENCODING", add = ArgValueCandidates::new(complete::encodings))]
    pub embedding: Option<Choice>,
    /// Columns per group in q8 and q4 (they share a prime index): 32 or 64 [default: 64 for q8,
    /// 32 for q4]
    #[arg(long, value_name = "COLUMNS")]
    pub group: Option<usize>,
    /// Encoding of the matrices whose name matches PATTERN (wildcards * and ?); repeatable, the
    /// last match wins
    #[arg(long = "tensor", value_name = "PATTERN=ENCODING")]
    pub overrides: Vec<Override>,
    /// Random seed of the rotation in t2, t3 and t4
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Calibrate on a text: minimize the change of the model's predictions instead of its
    /// weights. Works with all block encodings except keep and mdcsr, and takes many times as long.
    /// TEXT is UTF-8, or JSON lines with a string "text" each if its name ends in .jsonl [without
    /// TEXT: a built-in text; without this option: a fourth of that for q4 t4 t3 t2 s4, and for
    /// --bpw, --ratio, --size and --prune]
    #[arg(long, value_name = "TEXT", num_args = 0..=1)]
    pub calibrate: Option<Option<PathBuf>>,
    /// Maximum number of calibration tokens, at least one sequence (512); time is proportional to
    /// it [default: all of TEXT, 32768 of the built-in text with --calibrate, 8192 without]
    #[arg(long, value_name = "N")]
    pub calibration_tokens: Option<NonZeroUsize>,
    /// Round the weights without a text: much faster, and the model loses more
    #[arg(long, conflicts_with_all = ["calibrate", "calibration_tokens"])]
    pub no_calibrate: bool,
    /// Store matrices with many zeros as s8 instead of q8 and as s4 instead of q4: auto if that
    /// saves 10 % (from 23 % and 33 % zeros), or never
    #[arg(long, value_name = "WHEN", default_value_t)]
    pub sparse: Sparse,
    /// Set this share of the block weights to zero, the least sensitive ones, and store the rest
    /// as s8 or s4. At equal size an encoding with fewer bits is better
    #[arg(long, value_name = "SHARE", conflicts_with = "no_calibrate")]
    pub prune: Option<f64>,
    /// Make the run restartable: after a stop of any kind the same command continues from
    /// FILE.partial and FILE.partial.journal, and writes the same bytes. If the name of FILE is
    /// longer than 239 bytes, both names are a prefix of it with a checksum
    #[arg(long)]
    pub resume: bool,
    /// Print the encoding of each tensor and the estimated size, memory and time; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the result as JSON: size, bits, seconds, memory, predicted divergence
    #[arg(long, conflicts_with = "dry_run")]
    pub json: bool,
    /// Write a report, as a page if FILE ends in .html and otherwise as JSON: error, zeros, bits and seconds per tensor, and speed; with
    /// --calibrate also output errors and predicted divergence. Tensors finished by an earlier run
    /// without --report have no errors in it
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "\
Only scales and norms change (norms become F32); codes stay the same. One in 16 sequences \
of 512 tokens is held out, and no file is written unless the KL divergence on these falls. \
The gain shrinks with the loss of the encoding: tune t2 rather than q8.

Examples:
  upg tune phi4-t2.safetensors --original Phi-4/ -o phi4-t2-tuned.safetensors
  upg tune phi4-t2.safetensors --original Phi-4/ -o phi4-t2.safetensors --text book.txt --passes 1")]
pub struct TuneArgs {
    /// UPG file
    pub file: PathBuf,
    /// Original model of FILE: Hugging Face directory, GGUF file or name as user/model
    #[arg(long, value_name = "SOURCE", add = ArgValueCompleter::new(complete::models))]
    pub original: PathBuf,
    /// Output file, written atomically; may be FILE itself
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Training text: UTF-8, or JSON lines with a string "text" each if its name ends in .jsonl
    /// [default: a built-in text]
    #[arg(long, value_name = "TEXT")]
    pub text: Option<PathBuf>,
    /// Maximum number of training tokens [default: all of TEXT, 32768 of the built-in text]
    #[arg(long, value_name = "N")]
    pub tokens: Option<NonZeroUsize>,
    /// Number of passes over the text; each takes about as long as calibrating on it
    #[arg(long, value_name = "N", default_value_t = TuneOptions::default().passes, value_parser = count)]
    pub passes: usize,
    /// Learning rate: approximate relative change of a scale per step
    #[arg(long, value_name = "RATE", default_value_t = TuneOptions::default().rate, value_parser = share)]
    pub rate: f64,
}

#[derive(Args)]
#[command(after_help = "\
The weights are stored exactly, as mdcsr, or re-encoded with --to. Version 1 files have no \
config and no tokenizer: without --model the output can be inspected and decompressed, but \
not run. `upg compress` also reads version 1 files and has more options than --to.

Examples:
  upg convert old.upg -o new.safetensors --model Phi-4/
  upg convert old.upg -o new.safetensors --model Phi-4/ --to q4")]
pub struct ConvertArgs {
    /// Version 1 UPG file
    pub file: PathBuf,
    /// Output file, written atomically; replaces an existing one
    #[arg(short, long, value_name = "FILE", required_unless_present = "to_path")]
    pub output: Option<PathBuf>,
    /// Same as --output
    #[arg(value_name = "NEW", conflicts_with = "output")]
    pub to_path: Option<PathBuf>,
    /// Hugging Face directory of the model; its config.json, tokenizer and chat template are
    /// stored in the file
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Re-encode the transformer block matrices, as `upg compress --encoding` does
    #[arg(long, value_name = "ENCODING", add = ArgValueCandidates::new(complete::encodings))]
    pub to: Option<Choice>,
    /// Out-of-band buffers of a protocol 5 pickle, in the order they were written; rarely needed
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub buffers: Vec<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "\
Example:
  upg decompress model.safetensors -o model-hf/")]
pub struct DecompressArgs {
    /// UPG file
    pub file: PathBuf,
    /// Output directory, created if missing
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Data type of the decompressed matrices [default: from config.json, else bf16]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatArg>,
    /// Overwrite a model in DIR that this command did not write
    #[arg(long)]
    pub force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum FloatArg {
    /// 2 bytes, the range of f32
    Bf16,
    /// 2 bytes, 11-bit significand
    F16,
    /// 4 bytes, the exact decoded values
    F32,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  upg inspect model.safetensors
  upg inspect model.safetensors --plot
  upg inspect model.safetensors --json | jq '.layers[] | select(.encoding == \"q4\")'")]
pub struct InspectArgs {
    /// UPG file, or an original: user/model, a .gguf file or a Hugging Face directory
    #[arg(add = ArgValueCompleter::new(complete::models))]
    pub file: PathBuf,
    #[command(flatten)]
    pub original: ModelArgs,
    /// List every layer; by default those that differ only in their number are one line
    #[arg(long)]
    pub layers: bool,
    /// Draw the bits of each kind of matrix over the layers
    #[arg(long, conflicts_with = "layers")]
    pub plot: bool,
    /// Print JSON
    #[arg(long, conflicts_with_all = ["layers", "plot"])]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
Example:
  upg verify model.safetensors && echo sound")]
pub struct VerifyArgs {
    /// UPG file, or an original: user/model, a .gguf file or a Hugging Face directory
    #[arg(add = ArgValueCompleter::new(complete::models))]
    pub file: PathBuf,
    #[command(flatten)]
    pub original: ModelArgs,
    /// Print JSON; of a file that is not sound nothing, but an error
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
The text is split into windows and the second half of each is scored, as in llama.cpp.

Examples:
  upg eval model.safetensors --text book.txt
  upg eval small.safetensors --text book.txt --against Phi-4/ --json
  upg eval small.safetensors --text book.txt --against Phi-4/ --logits phi4.logits")]
pub struct EvalArgs {
    /// UPG file, or an original: user/model, a .gguf file or a Hugging Face directory
    #[arg(add = ArgValueCompleter::new(complete::models))]
    pub file: PathBuf,
    #[command(flatten)]
    pub original: ModelArgs,
    /// Text file (UTF-8)
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Reference model, for KL divergence and top-1 agreement: a UPG file, or an original
    /// (user/model, Hugging Face directory or GGUF file), which runs in f32 and takes 4 bytes of
    /// memory per weight
    #[arg(long, value_name = "MODEL", add = ArgValueCompleter::new(complete::models))]
    pub against: Option<PathBuf>,
    /// Cache the reference logits in this file; recomputed if the text, windows or reference
    /// changed. Takes 2 bytes per scored position and vocabulary entry
    #[arg(long, value_name = "FILE", requires = "against")]
    pub logits: Option<PathBuf>,
    /// Window size in tokens
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub window: usize,
    /// Positions per forward pass; 1 rounds exactly as generation does
    #[arg(long, value_name = "N")]
    pub chunk: Option<usize>,
    /// Data type of the KV cache
    #[arg(long, value_enum, default_value_t)]
    pub cache_type: CacheArg,
    /// Maximum number of windows [default: all]
    #[arg(long, value_name = "N")]
    pub windows: Option<NonZeroUsize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
1 GB is 10^9 bytes. `read` is the memory bandwidth of the same threads, the upper limit for \
reading weights. Matrix-vector products are timed over the whole file; between rounds other \
memory is read, so that no weights stay in a cache. Tokens are random. Figures are medians.

Examples:
  upg bench model.safetensors
  upg bench model.safetensors -p 2048 -n 64 --depth 4096 --threads 1 --json
  upg bench model.safetensors -p 0 --sequences 1,2,4,8,16
  upg bench model.safetensors --compare-llama model.gguf
  upg bench synth --arch phi-4 --encoding t3 -o phi4-random.safetensors"
)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    #[command(flatten)]
    pub measure: Option<MeasureArgs>,
    // Not in `MeasureArgs`: clap takes an optional group with another group in it for absent.
    #[command(flatten)]
    pub original: ModelArgs,
}

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Write a model with random weights in the shapes of a published model
    Synth(SynthArgs),
}

#[derive(Args)]
pub struct MeasureArgs {
    /// UPG file, or an original: user/model, a .gguf file or a Hugging Face directory
    #[arg(add = ArgValueCompleter::new(complete::models))]
    pub file: PathBuf,
    /// Prompt length in tokens; 0: skip
    #[arg(short, long, default_value_t = 512, value_name = "N")]
    pub prompt_tokens: usize,
    /// Number of tokens to generate; 0: skip
    #[arg(short = 'n', long, default_value_t = 128, value_name = "N")]
    pub generate: usize,
    /// Context length in tokens before --generate starts
    #[arg(short, long, default_value_t = 0, value_name = "N")]
    pub depth: usize,
    /// Batch sizes: also generate this many sequences at once; comma-separated list
    #[arg(long, value_delimiter = ',', value_name = "N")]
    pub sequences: Vec<NonZeroUsize>,
    /// Minimum number of repetitions per measurement
    #[arg(long, default_value = "5", value_name = "N")]
    pub repetitions: NonZeroUsize,
    /// GGUF file to measure with llama.cpp in alternation with FILE; repeatable
    #[arg(long, value_name = "GGUF")]
    pub compare_llama: Vec<PathBuf>,
    /// Path of llama.cpp's llama-bench [default: llama-bench on the PATH]
    #[arg(long, requires = "compare_llama", value_name = "PROGRAM")]
    pub llama_bench: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
Size, layout and speed equal those of a real model; there is no tokenizer. Takes little time: \
one strip of 64 rows is encoded per width and repeated.

Example:
  upg bench synth --arch phi-4 --encoding t3 -o phi4-random.safetensors")]
pub struct SynthArgs {
    /// Published model to take the shapes from
    #[arg(long, value_parser = PossibleValuesParser::new(PUBLISHED.map(|(name, _)| name)))]
    pub arch: String,
    /// Encoding of the transformer block matrices
    #[arg(short, long, value_enum, default_value = "q4")]
    pub encoding: SynthEncoding,
    /// Encoding of the embeddings and the output head [default: as in `upg compress`]
    #[arg(long, value_enum)]
    pub embedding: Option<SynthEncoding>,
    /// Output file, written atomically; replaces an existing one
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Random seed of the weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Encodings of random models.
#[derive(Clone, Copy, ValueEnum)]
pub enum SynthEncoding {
    Q8,
    Q4,
    T4,
    T3,
    T2,
}

impl From<SynthEncoding> for Choice {
    fn from(encoding: SynthEncoding) -> Self {
        Self::Encode(match encoding {
            SynthEncoding::Q8 => Encoding::Q8,
            SynthEncoding::Q4 => Encoding::Q4,
            SynthEncoding::T4 => Encoding::T4,
            SynthEncoding::T3 => Encoding::T3,
            SynthEncoding::T2 => Encoding::T2,
        })
    }
}

#[derive(Args)]
#[command(after_help = "\
The script asks upg itself, which knows the models in the caches.

Examples:
  echo 'source <(upg completions bash)' >> ~/.bashrc
  echo 'source <(upg completions zsh)' >> ~/.zshrc
  upg completions fish > ~/.config/fish/completions/upg.fish")]
pub struct CompletionsArgs {
    /// Shell to generate the script for
    pub shell: clap_complete::Shell,
}

#[derive(Args)]
#[command(after_help = "\
The page has the bits of each matrix as a heat map, the predicted divergence of each layer and the \
means of each kind of matrix. It needs no other file.

Example:
  upg report phi4.json -o phi4.html")]
pub struct ReportArgs {
    /// Report that `upg compress --report FILE.json` wrote
    pub report: PathBuf,
    /// HTML file, written atomically; replaces an existing one
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

#[derive(Args)]
#[command(after_help = "\
Example:
  upg man ~/.local/share/man/man1 && man upg-compress")]
pub struct ManArgs {
    /// Directory, created if missing
    pub folder: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
