//! Options of models by name, and the commands for the caches.
#![forbid(unsafe_code)]

use super::complete;
use clap::Args;
use clap_complete::engine::{ArgValueCandidates, ArgValueCompleter};
use std::path::PathBuf;
use upg_compress::Choice;

/// Heading of these options in the help.
const HEADING: &str = "Originals (user/model, .gguf file, Hugging Face directory)";

/// Options of commands that take an original in place of a UPG file.
#[derive(Args)]
pub struct ModelArgs {
    /// Download and compress without a question
    #[arg(short, long, help_heading = HEADING)]
    pub yes: bool,
    /// Encoding that the original is compressed with, once, into the cache (see `upg compress`)
    #[arg(long, value_name = "ENCODING", default_value = "q8", help_heading = HEADING,
        add = ArgValueCandidates::new(complete::encodings))]
    pub encoding: Choice,
    /// Use what is in the caches, and no network
    #[arg(long, help_heading = HEADING)]
    pub offline: bool,
}

#[derive(Args)]
#[command(after_help = "\
Names are those of https://huggingface.co: user/model, user/model@REVISION, and user/model:Q4_K_M \
for one of several GGUF files. The cache is that of huggingface_hub. A download that was stopped \
resumes.

Examples:
  upg pull HuggingFaceTB/SmolLM2-135M-Instruct
  upg pull user/model@v1.0
  HF_TOKEN=hf_... upg pull meta-llama/Llama-3.2-1B")]
pub struct PullArgs {
    /// Name: user/model, user/model@REVISION, user/model:Q4_K_M
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(complete::names))]
    pub names: Vec<String>,
    /// Use what is in the cache, and no network
    #[arg(long)]
    pub offline: bool,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  upg list
  upg list --json | jq '.[] | select(.kind == \"original\") | .name'")]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  upg show HuggingFaceTB/SmolLM2-135M-Instruct")]
pub struct ShowArgs {
    /// Model, as `upg list` prints it, or the name of a file in the cache
    #[arg(add = ArgValueCompleter::new(complete::names))]
    pub name: String,
}

#[derive(Args)]
#[command(after_help = "\
Other programs use the cache of originals too, so removing one needs a yes.

Examples:
  upg rm HuggingFaceTB/SmolLM2-135M-Instruct
  upg rm --keep-original HuggingFaceTB/SmolLM2-135M-Instruct")]
pub struct RmArgs {
    /// Models, as `upg list` prints them, or names of files in the cache
    #[arg(required = true, value_name = "NAME", add = ArgValueCompleter::new(complete::names))]
    pub names: Vec<String>,
    /// Remove compressed files only
    #[arg(long)]
    pub keep_original: bool,
    /// Remove without a question
    #[arg(short, long)]
    pub yes: bool,
}

/// Arguments of commands whose model may be an original.
pub trait TakesModel {
    /// Returns the model and how to make a UPG file of it.
    fn model(&mut self) -> (&mut PathBuf, &ModelArgs);
}

macro_rules! takes_model {
    ($($args:ty),*) => {
        $(impl TakesModel for $args {
            fn model(&mut self) -> (&mut PathBuf, &ModelArgs) {
                (&mut self.file, &self.original)
            }
        })*
    };
}

takes_model!(
    super::RunArgs,
    super::ChatArgs,
    super::EvalArgs,
    super::InspectArgs,
    super::VerifyArgs
);
