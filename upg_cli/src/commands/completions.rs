//! `upg completions`.
#![forbid(unsafe_code)]

use crate::cli::{Cli, CompletionsArgs};
use crate::terminal;
use clap::CommandFactory;
use upg_kernel::Result;

pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "upg", &mut script);
    terminal::print(&String::from_utf8_lossy(&script))
}
