//! The `upg` command: flags in, library calls, exit codes out.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod terminal;

use clap::Parser;
use std::process::ExitCode;
use upg_kernel::{ErrorKind, Result};

/// Exit code of an error in the input or the environment.
const FAILED: u8 = 1;
/// Exit code of a wrong option or argument, as clap has it.
const USAGE: u8 = 2;
/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if terminal::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            terminal::note(format_args!("upg: {e}"));
            ExitCode::from(match e.kind() {
                ErrorKind::Argument => USAGE,
                ErrorKind::Interrupted => INTERRUPTED,
                _ => FAILED,
            })
        }
    }
}

fn run(cli: cli::Cli) -> Result<()> {
    if let Some(threads) = cli.threads {
        terminal::set_threads(threads)?;
    }
    match cli.command {
        cli::Command::Compress(args) => commands::compress::run(&args),
        cli::Command::Decompress(args) => commands::decompress::run(&args),
        cli::Command::Inspect(args) => commands::inspect::run(&args),
        cli::Command::Verify(args) => commands::verify::run(&args),
        cli::Command::Run(args) => commands::run::run(&args),
        cli::Command::Chat(args) => commands::chat::run(&args),
        cli::Command::Eval(args) => commands::eval::run(&args),
        cli::Command::Completions(args) => commands::completions::run(&args),
    }
}
