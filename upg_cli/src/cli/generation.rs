//! Options of the commands that generate text.
#![forbid(unsafe_code)]

use super::{ModelArgs, complete};
use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCompleter;
use serde_json::Value;
use std::num::ParseIntError;
use std::path::PathBuf;
use std::str::FromStr;
use upg_kernel::inference::CacheType;

#[derive(Args)]
#[command(next_help_heading = "Sampling (by default as the model recommends)")]
pub struct SamplingArgs {
    /// Sampling temperature; 0: greedy [default: that of the model, else 0.8]
    #[arg(long, alias = "temp", value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Top-k sampling; 0: disabled [default: that of the model, else 40]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Top-p (nucleus) sampling; 1: disabled [default: that of the model, else 0.95]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Min-p sampling, relative to the most probable token; 0: disabled [default: that of the
    /// model, else 0.05]
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Repetition penalty on the last 64 tokens; 1: disabled [default: that of the model, else 1]
    #[arg(long, alias = "repeat-penalty", value_name = "FACTOR")]
    pub repetition_penalty: Option<f32>,
    /// Frequency penalty on the last 64 tokens: logit reduction per occurrence; 0: disabled
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Presence penalty on the last 64 tokens: logit reduction if present; 0: disabled
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Random seed [default, and -1: a random one; --stats, --json and, in chat, /show tell it]
    #[arg(short, long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<Seed>,
    /// Maximum number of tokens of an answer [default: until it ends]
    #[arg(short = 'n', long, aliases = ["predict", "n-predict"], value_name = "N",
        allow_negative_numbers = true, value_parser = limit)]
    pub max_tokens: Option<usize>,
    /// Stop sequence; repeatable
    #[arg(long = "stop", value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Context size in tokens [default: the maximum of the model]
    #[arg(
        short,
        long,
        alias = "ctx-size",
        value_name = "N",
        help_heading = "Options"
    )]
    pub context: Option<usize>,
    /// Data type of the KV cache
    #[arg(
        long,
        alias = "cache-type-k",
        value_enum,
        default_value_t,
        help_heading = "Options"
    )]
    pub cache_type: CacheArg,
    /// Name for the chat template, with a JSON value: enable_thinking=false; repeatable
    #[arg(long = "template-arg", value_name = "NAME=VALUE", value_parser = template_arg, help_heading = "Options")]
    pub template_args: Vec<(String, Value)>,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub enum CacheArg {
    /// 4 bytes per element
    F32,
    /// 2 bytes per element
    #[default]
    F16,
    /// 1 byte per element, and a 4-byte scale per 32 elements
    #[value(alias = "q8_0")]
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

/// Random seed; `None`: a random one.
#[derive(Debug, Clone, Copy)]
pub struct Seed(pub Option<u64>);

impl FromStr for Seed {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        match text {
            "-1" => Ok(Self(None)),
            text => text.parse().map(|seed| Self(Some(seed))),
        }
    }
}

/// Parses a number of tokens; -1 is no limit, as in llama.cpp.
fn limit(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(usize::MAX),
        text => text.parse().map_err(|e| format!("{e}")),
    }
}

/// Parses `NAME=VALUE`; a value that is not JSON is a text.
fn template_arg(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((name.to_owned(), value))
}

#[derive(Args)]
#[command(after_help = "\
The chat template of the model frames the prompt; --raw continues the text as it is. A model \
without a template always continues the text.

Examples:
  upg run model.safetensors 'Why is the sky blue?'
  upg run model.safetensors 'Summarize this text:' -f notes.txt --json
  git diff | upg run model.safetensors 'Review this change:' -f -
  upg run model.safetensors --raw 'Once upon a time' -n 100 --temperature 0.8 --seed 7
  upg run model.safetensors --tokens 504,3575,282 --logits logits.safetensors")]
pub struct RunArgs {
    /// UPG file, or an original: user/model, a .gguf file or a Hugging Face directory
    #[arg(value_name = "MODEL", add = ArgValueCompleter::new(complete::models))]
    pub file: PathBuf,
    #[command(flatten)]
    pub original: ModelArgs,
    /// Prompt, or - for standard input [default: standard input, if it is no terminal]
    #[arg(value_name = "TEXT", conflicts_with_all = ["tokens", "logits"])]
    pub text: Option<String>,
    /// Same as TEXT
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true,
        conflicts_with_all = ["text", "tokens", "logits"])]
    pub prompt: Option<String>,
    /// Read the prompt from a file, - for standard input; after TEXT, if that is given too
    #[arg(short = 'f', long = "file", value_name = "FILE", conflicts_with_all = ["tokens", "logits"])]
    pub prompt_file: Option<PathBuf>,
    /// Continue the text without the chat template
    #[arg(long)]
    pub raw: bool,
    /// System message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with_all = ["raw", "tokens"])]
    pub system: Option<String>,
    /// Token ids instead of a prompt, comma-separated; for --logits
    #[arg(long, value_delimiter = ',', num_args = 1.., requires = "logits", value_name = "IDS",
        value_parser = |id: &str| id.trim().parse::<u32>())]
    pub tokens: Option<Vec<u32>>,
    /// With --tokens: write the logits of every position to a safetensors file,
    /// F32 [positions, vocab]
    #[arg(long, requires = "tokens", value_name = "FILE")]
    pub logits: Option<PathBuf>,
    /// Print JSON: text, why it ended, tokens, seconds, seed
    #[arg(long, conflicts_with = "tokens")]
    pub json: bool,
    /// Print tokens, speed, memory and seed to standard error at the end, even if that is no
    /// terminal
    #[arg(long)]
    pub stats: bool,
    /// Print nothing but the answer and errors
    #[arg(short, long, conflicts_with = "stats")]
    pub quiet: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Args)]
#[command(after_help = "\
Ctrl-C stops the answer. Ctrl-D, /bye, or Ctrl-C twice at the prompt, exits; SIGTERM and SIGHUP \
exit at any time. /help lists the commands. When the context is full, the oldest turns are left out.

Examples:
  upg chat model.safetensors
  upg chat model.safetensors --system 'You answer in one sentence.' --temperature 0.2")]
pub struct ChatArgs {
    /// UPG file, or an original: user/model, a .gguf file or a Hugging Face directory
    #[arg(value_name = "MODEL", add = ArgValueCompleter::new(complete::models))]
    pub file: PathBuf,
    #[command(flatten)]
    pub original: ModelArgs,
    /// System message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Print tokens and speed after each answer
    #[arg(long)]
    pub stats: bool,
    /// Neither read nor write the history of questions (`$XDG_STATE_HOME/upg/history`)
    #[arg(long)]
    pub no_history: bool,
    /// Leave the breaking of long lines to the terminal
    #[arg(long)]
    pub no_wrap: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}
