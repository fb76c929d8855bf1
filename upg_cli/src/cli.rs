//! The command line: every flag, its default and its help.
#![forbid(unsafe_code)]

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use upg_compress::source::PUBLISHED;
use upg_compress::{Choice, Override, Sparse, TuneOptions};
use upg_kernel::format::Encoding;
use upg_kernel::inference::CacheType;

/// A number above 0.
fn positive(text: &str) -> Result<f64, String> {
    let number = text
        .parse()
        .ok()
        .filter(|n: &f64| *n > 0.0 && n.is_finite());
    number.ok_or_else(|| "expected a number above 0".to_owned())
}

/// A whole number above 0.
fn count(text: &str) -> Result<usize, String> {
    let number = text.parse::<NonZeroUsize>();
    number.map(NonZeroUsize::get).map_err(|e| e.to_string())
}

/// A number above 0 and below 1.
fn share(text: &str) -> Result<f64, String> {
    let number = positive(text).ok().filter(|n| *n < 1.0);
    number.ok_or_else(|| "expected a number above 0 and below 1".to_owned())
}

/// A number of bytes, with or without a unit: `700MB`, `5.5 GB`, `2GiB`.
fn size(text: &str) -> Result<u64, String> {
    let size = text.parse::<bytesize::ByteSize>();
    size.map(|size| size.as_u64())
}

/// Compress language models into one memory-mapped file, and run them from it.
#[derive(Parser)]
#[command(
    name = "upg",
    disable_version_flag = true,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "\
Examples:
  upg compress SmolLM2-135M-Instruct/ -o smollm2.safetensors --encoding q4
  upg run smollm2.safetensors -p 'The capital of France is' -n 20
  upg chat smollm2.safetensors

Exit codes: 0 success, 1 an error in a file or the system, 2 a wrong option or argument, 3 a model file was cut
short or overwritten while it was in use, 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP. A second signal ends upg
at once.

A terminal is shown control characters as \\u{1b}; a file or a pipe gets them as they are."
)]
pub struct Cli {
    /// Threads to use [default: one for each core that this process may use; for compress, decompress and
    /// verify one for each hardware thread]
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Read model files into memory instead of mapping them, and check those of UPG against their checksums then: for
    /// network disks, and for files that somebody may write meanwhile
    #[arg(long, global = true)]
    pub no_mmap: bool,
    /// Print the version
    #[arg(short = 'V', long)]
    pub version: bool,
    /// With --version: also the kernels that this machine has, and which of them are used
    #[arg(long, requires = "version")]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Compress a model directory or a GGUF file into a UPG file
    Compress(CompressArgs),
    /// Let the scales and norms of a UPG file learn from the original model
    Tune(TuneArgs),
    /// Make a UPG file of one of version 1 (a Python pickle), without running anything of it
    Convert(ConvertArgs),
    /// Rebuild a Hugging Face directory that transformers can load
    Decompress(DecompressArgs),
    /// List what a UPG file holds
    Inspect(InspectArgs),
    /// Read a whole UPG file and check it against its checksums and rules
    Verify(FileArgs),
    /// Continue one prompt, or compute logits for token ids
    Run(RunArgs),
    /// Talk with a model
    Chat(ChatArgs),
    /// Measure perplexity on a text, and the distance to another file
    Eval(EvalArgs),
    /// Measure speed and memory
    Bench(BenchArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

#[derive(Args)]
#[command(after_help = "\
Encodings, with bits per weight:
  keep   as the source has it       mdcsr  nearly lossless archive, 32
  q8     8.13                       q4     4.26
  t4     4.01  rotated, trellis     s8     zeros kept exactly: 1.1 + 8 per kept weight
  t3     3.01  rotated, trellis     s4     zeros kept exactly: 1.2 + 4 per kept weight
  t2     2.01  rotated, trellis

Examples:
  upg compress Phi-4/ -o phi4.safetensors --encoding t3
  upg compress model.gguf -o model.safetensors --encoding q4 --embedding q8
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --tensor '*.down_proj.weight=t4'
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --calibrate
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --calibrate text.txt
  upg compress Phi-4/ -o phi4.safetensors --size 5.5GB --calibrate
  upg compress Phi-4/ -o phi4.safetensors --encoding s8 --calibrate --prune 0.5
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --calibrate --resume
  upg compress Phi-4/ -o phi4.safetensors --encoding t3 --dry-run")]
pub struct CompressArgs {
    /// Hugging Face directory (config.json, *.safetensors), GGUF file, or UPG file of version 1 (see convert)
    pub source: PathBuf,
    /// File to write; it appears whole or not at all, in the place of an older one
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// For the matrices of the transformer blocks
    #[arg(short, long, default_value = "q4")]
    pub encoding: Choice,
    /// Choose t2, t3, t4 or q8 for each of these matrices, so that they have this many bits a weight on average, those
    /// that --calibrate shows to need them most more than others
    #[arg(long, value_name = "BITS", value_parser = positive, group = "budget", requires = "calibrate", conflicts_with_all = ["encoding", "prune"])]
    pub bpw: Option<f64>,
    /// As --bpw, so that the whole file is smaller than the weights in F32 by this factor
    #[arg(long, value_name = "FACTOR", value_parser = positive, group = "budget", requires = "calibrate", conflicts_with_all = ["encoding", "prune"])]
    pub ratio: Option<f64>,
    /// As --bpw, so that the whole file has at most this size, for example 5.5GB or 700MB
    #[arg(long, value_name = "SIZE", value_parser = size, group = "budget", requires = "calibrate", conflicts_with_all = ["encoding", "prune"])]
    pub size: Option<u64>,
    /// For the embeddings and the output head [default: q8; q4 with t2 or t3 where they are large]
    #[arg(long, value_name = "ENCODING")]
    pub embedding: Option<Choice>,
    /// Columns that share a prime index in q8 and q4: 32 or 64 [default: 64 in q8, 32 in q4]
    #[arg(long, value_name = "COLUMNS")]
    pub group: Option<usize>,
    /// For matrices whose name matches a pattern with * and ?; the last match counts
    #[arg(long = "tensor", value_name = "PATTERN=ENCODING")]
    pub overrides: Vec<Override>,
    /// Seed of the random rotation of the t encodings
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Run the model over a text first: what it predicts there is kept rather than its weights.
    /// For all encodings of the blocks but keep and mdcsr; takes many times as long. TEXT is UTF-8, or JSON lines
    /// with a string "text" each if its name ends in .jsonl [without TEXT: one that comes with upg]
    #[arg(long, value_name = "TEXT", num_args = 0..=1)]
    pub calibrate: Option<Option<PathBuf>>,
    /// Most tokens of that text to use, a sequence (512) at least: time grows with them [default: all of TEXT, 32768 of the one that comes
    /// with upg]
    #[arg(long, value_name = "N", requires = "calibrate")]
    pub calibration_tokens: Option<NonZeroUsize>,
    /// Store matrices with many zeros as s8 instead of q8 and s4 instead of q4: auto where it saves a tenth
    /// (23 % and 33 % zeros), or never
    #[arg(long, value_name = "WHEN", default_value_t)]
    pub sparse: Sparse,
    /// Set this share of the weights in the blocks to zero, those that --calibrate shows to matter least, and
    /// store the others as s8 or s4. At equal size an encoding of fewer bits is better
    #[arg(long, value_name = "SHARE", requires = "calibrate")]
    pub prune: Option<f64>,
    /// Keep what is done in FILE.partial if this is stopped, however it is stopped, and go on from what an
    /// earlier run has left there; the file is the same. FILE.partial.journal says what is done (of a FILE whose
    /// name has over 239 bytes, both names begin with a part of it and a checksum)
    #[arg(long)]
    pub resume: bool,
    /// Print what becomes of each tensor, and the size, memory and time that it would take; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Write JSON: errors, zeros, bits and seconds of each tensor, with --calibrate also the errors of outputs and the
    /// divergence that they predict, unless an earlier run without --report has done it, and how fast it went
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "\
Codes stay as they are; norms are F32 afterwards. One sequence of 512 tokens in 16 is held out, and nothing is written if
the divergence of those has not fallen. What is won shrinks with what was lost: tune t2 rather than q8.

Examples:
  upg tune phi4-t2.safetensors --original Phi-4/ -o phi4-t2-tuned.safetensors
  upg tune phi4-t2.safetensors --original Phi-4/ -o phi4-t2.safetensors --text book.txt --passes 1")]
pub struct TuneArgs {
    /// UPG file
    pub file: PathBuf,
    /// What it was made of: Hugging Face directory or GGUF file
    #[arg(long, value_name = "SOURCE")]
    pub original: PathBuf,
    /// File to write; it appears whole or not at all, and may be the one that is tuned
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Text to learn on: UTF-8, or JSON lines with a string "text" each if its name ends in .jsonl [default: one that
    /// comes with upg]
    #[arg(long, value_name = "TEXT")]
    pub text: Option<PathBuf>,
    /// Most tokens of it to use [default: all of TEXT, 32768 of the one that comes with upg]
    #[arg(long, value_name = "N")]
    pub tokens: Option<NonZeroUsize>,
    /// How often to go through the text; each time takes about as long as calibrating on it
    #[arg(long, value_name = "N", default_value_t = TuneOptions::default().passes, value_parser = count)]
    pub passes: usize,
    /// By which part of itself a scale moves in a step, about
    #[arg(long, value_name = "RATE", default_value_t = TuneOptions::default().rate, value_parser = share)]
    pub rate: f64,
}

#[derive(Args)]
#[command(after_help = "\
The weights are those of the old file exactly, as mdcsr, or encoded again with --to. An old file has no config and no
tokenizer; without --model its weights can be read and decompressed, but not run. For more choices than --to an old file is
a source of `upg compress` too.

Examples:
  upg convert old.upg -o new.safetensors --model Phi-4/
  upg convert old.upg -o new.safetensors --model Phi-4/ --to q4")]
pub struct ConvertArgs {
    /// UPG file of version 1
    pub file: PathBuf,
    /// File to write; it appears whole or not at all, in the place of an older one
    #[arg(short, long, value_name = "FILE", required_unless_present = "to_path")]
    pub output: Option<PathBuf>,
    /// The same as --output
    #[arg(value_name = "NEW", conflicts_with = "output")]
    pub to_path: Option<PathBuf>,
    /// Hugging Face directory of the model, whose config.json, tokenizer and chat template go into the file
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Encode the matrices of the transformer blocks again, as `upg compress --encoding` does
    #[arg(long, value_name = "ENCODING")]
    pub to: Option<Choice>,
    /// Files of the out-of-band buffers of a pickle of protocol 5, in the order in which they were written; few have any
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
    /// Directory to write; made if need be
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Type of the decompressed matrices [default: what config.json says, else bf16]
    #[arg(long, value_enum)]
    pub dtype: Option<FloatArg>,
    /// Replace a model that is in DIR already and was not written by this command
    #[arg(long)]
    pub force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum FloatArg {
    /// 2 bytes, the range of f32
    Bf16,
    /// 2 bytes, 11 bits of precision
    F16,
    /// 4 bytes, exactly what the file says
    F32,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  upg inspect model.safetensors
  upg inspect model.safetensors --json | jq '.layers[] | select(.encoding == \"q4\")'")]
pub struct InspectArgs {
    /// UPG file, also of version 1
    pub file: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
Example:
  upg verify model.safetensors && echo sound")]
pub struct FileArgs {
    /// UPG file
    pub file: PathBuf,
}

#[derive(Args)]
pub struct SamplingArgs {
    /// Randomness; 0 always takes the most probable token
    #[arg(short, long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Choose among this many most probable tokens; 0: all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Choose among the fewest tokens of this total probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f32,
    /// Choose among tokens of at least this probability, relative to the first
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub min_p: f32,
    /// Make tokens of the last 64 less probable; 1: no change
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub repetition_penalty: f32,
    /// Subtract this from the logit of a token for each time it is among the last 64
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "X",
        allow_negative_numbers = true
    )]
    pub frequency_penalty: f32,
    /// Subtract this from the logits of tokens that are among the last 64
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "X",
        allow_negative_numbers = true
    )]
    pub presence_penalty: f32,
    /// Seed of the random choice
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop at this text; may be given several times
    #[arg(long = "stop", value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Positions to keep room for [default: what the model allows]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// How the keys and values of attention are kept
    #[arg(long, value_enum, default_value_t)]
    pub cache_type: CacheArg,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub enum CacheArg {
    /// 4 bytes an element
    F32,
    /// 2 bytes an element
    #[default]
    F16,
    /// 1 byte an element, and 4 bytes of scale for 32 of them
    Int8,
}

impl From<CacheArg> for CacheType {
    fn from(arg: CacheArg) -> Self {
        match arg {
            CacheArg::F32 => Self::F32,
            CacheArg::F16 => Self::F16,
            CacheArg::Int8 => Self::Int8,
        }
    }
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  upg run model.safetensors -p 'Once upon a time' -n 100 --temperature 0.8 --seed 7
  upg run model.safetensors --chat -p 'Why is the sky blue?' -n 200
  upg run model.safetensors --tokens 504,3575,282 --logits logits.safetensors")]
pub struct RunArgs {
    /// UPG file
    pub file: PathBuf,
    /// Text to continue; - reads standard input. Special tokens in it count as such
    #[arg(
        short,
        long,
        conflicts_with_all = ["tokens", "logits"],
        required_unless_present = "tokens"
    )]
    pub prompt: Option<String>,
    /// Most tokens to generate
    #[arg(short = 'n', long, default_value_t = 128, value_name = "N")]
    pub max_tokens: usize,
    /// Put the prompt into the chat template of the model
    #[arg(long, conflicts_with = "tokens")]
    pub chat: bool,
    /// System message for --chat
    #[arg(long, requires = "chat", value_name = "TEXT")]
    pub system: Option<String>,
    /// Token ids instead of a prompt, separated by commas; for --logits
    #[arg(long, value_delimiter = ',', num_args = 1.., requires = "logits", value_name = "IDS",
        value_parser = |id: &str| id.trim().parse::<u32>())]
    pub tokens: Option<Vec<u32>>,
    /// With --tokens: write the logits of every position, F32 [positions, vocab], as safetensors
    #[arg(long, requires = "tokens", value_name = "FILE")]
    pub logits: Option<PathBuf>,
    /// No figures on speed and memory at the end
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Args)]
#[command(after_help = "\
Ctrl-C stops the answer; Ctrl-D, or Ctrl-C at the prompt, ends the program. So do SIGTERM and SIGHUP
at any time. /clear forgets the talk.

Example:
  upg chat model.safetensors --system 'You answer in one sentence.' --temperature 0.7")]
pub struct ChatArgs {
    /// UPG file
    pub file: PathBuf,
    /// System message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens of an answer
    #[arg(short = 'n', long, default_value_t = 1024, value_name = "N")]
    pub max_tokens: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Args)]
#[command(after_help = "\
The text is cut into windows and the second half of each is scored, as llama.cpp does it.

Examples:
  upg eval model.safetensors --text book.txt
  upg eval small.safetensors --text book.txt --against Phi-4/ --json
  upg eval small.safetensors --text book.txt --against Phi-4/ --logits phi4.logits   # computed once")]
pub struct EvalArgs {
    /// UPG file
    pub file: PathBuf,
    /// Text file, UTF-8
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Reference to compare with, for KL divergence and agreement of the first choice: a UPG file, or an
    /// original (Hugging Face directory, GGUF file), which is run in f32 with 4 bytes of memory a weight
    #[arg(long, value_name = "MODEL")]
    pub against: Option<PathBuf>,
    /// Keep the logits of the reference in this file, and use them from there the next time. Made anew where
    /// text, windows or reference are others; 2 bytes for each scored position and token of the vocabulary
    #[arg(long, value_name = "FILE", requires = "against")]
    pub logits: Option<PathBuf>,
    /// Tokens of a window
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub window: usize,
    /// Positions computed at once; 1 measures what generation computes, which may round otherwise
    #[arg(long, value_name = "N")]
    pub chunk: Option<usize>,
    /// How the keys and values of attention are kept
    #[arg(long, value_enum, default_value_t)]
    pub cache_type: CacheArg,
    /// Use only this many windows of the text
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
GB are 10^9 bytes. `read` is the speed at which the same threads add up memory: the limit of
whatever reads weights. Products are timed matrix by matrix through the whole file, with a pass over
that memory between two rounds, so that no cache holds the weights. Tokens are random. Figures are
medians.

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
}

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Write a model of random weights in the shapes of a published one
    Synth(SynthArgs),
}

#[derive(Args)]
pub struct MeasureArgs {
    /// UPG file
    pub file: PathBuf,
    /// Tokens of a prompt; 0: measure none
    #[arg(short, long, default_value_t = 512, value_name = "N")]
    pub prompt_tokens: usize,
    /// Tokens to generate one by one; 0: measure none
    #[arg(short = 'n', long, default_value_t = 128, value_name = "N")]
    pub generate: usize,
    /// Positions of context that are there when --generate begins
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub depth: usize,
    /// Also generate with so many sequences at once; may be several numbers, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "N")]
    pub sequences: Vec<NonZeroUsize>,
    /// How often each figure is measured, at least
    #[arg(long, default_value = "5", value_name = "N")]
    pub repetitions: NonZeroUsize,
    /// GGUF file to measure with llama.cpp in turn with this one; may be given several times
    #[arg(long, value_name = "GGUF")]
    pub compare_llama: Vec<PathBuf>,
    /// llama.cpp's llama-bench [default: the one on the PATH]
    #[arg(long, requires = "compare_llama", value_name = "PROGRAM")]
    pub llama_bench: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
A strip of 64 rows is encoded for each width and repeated, so it takes little time. Size, layout and
speed are those of a real model; there is no tokenizer.

Example:
  upg bench synth --arch phi-4 --encoding t3 -o phi4-random.safetensors")]
pub struct SynthArgs {
    /// The model whose shapes it has
    #[arg(long, value_parser = PossibleValuesParser::new(PUBLISHED.map(|(name, _)| name)))]
    pub arch: String,
    /// For the matrices of the transformer blocks
    #[arg(short, long, value_enum, default_value = "q4")]
    pub encoding: SynthEncoding,
    /// For the embeddings and the output head [default: as `upg compress`]
    #[arg(long, value_enum)]
    pub embedding: Option<SynthEncoding>,
    /// File to write; it appears whole or not at all, in the place of an older one
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// The encodings of random models.
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
Example:
  upg completions bash > ~/.local/share/bash-completion/completions/upg")]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
