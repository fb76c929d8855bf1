//! The `upg` command: flags in, library calls, exit codes out.
mod bus_error;
mod cli;
mod commands;
mod progress;
mod signals;
mod terminal;
mod threads;

use clap::Parser;
use log::{Level, LevelFilter, Log};
use std::process::ExitCode;
use upg_kernel::Cpu;
use upg_kernel::kernels::Kernels;
use upg_kernel::{Error, ErrorKind, OpenOptions, Result};

/// Exit code of an error in the input or the environment.
const FAILED: u8 = 1;
/// Exit code of a wrong option or argument, as clap has it.
const USAGE: u8 = 2;
/// Exit code when a file was cut short or overwritten while it was mapped.
const FILE_CHANGED: u8 = 3;

/// Warnings of the libraries, in the form of the command's own messages.
struct Warnings;

impl Log for Warnings {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("upg_")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            terminal::note(format_args!("upg: {}", record.args()));
        }
    }

    fn flush(&self) {}
}

fn main() -> ExitCode {
    // It fails only if there is one already.
    if log::set_logger(&Warnings).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
    let cli = cli::Cli::parse();
    bus_error::report();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if terminal::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            terminal::note(format_args!("upg: {e}"));
            ExitCode::from(match e.kind() {
                ErrorKind::Argument => USAGE,
                ErrorKind::Interrupted => signals::exit_code(),
                _ => FAILED,
            })
        }
    }
}

fn run(cli: cli::Cli) -> Result<()> {
    if cli.version {
        return print_version(cli.verbose);
    }
    // A wrong name of kernels is told now, not after a model was loaded.
    Cpu::shared()?;
    let default = cli.command.as_ref().and_then(default_threads);
    if let Some(threads) = cli.threads.or(default) {
        terminal::set_threads(threads)?;
    }
    let Some(command) = cli.command else {
        let message = "no command given";
        return Err(Error::new(ErrorKind::Argument, message).hint("see `upg --help`"));
    };
    let mut open = OpenOptions::default();
    open.mmap = !cli.no_mmap;
    match command {
        cli::Command::Compress(args) => commands::compress::run(&args, open),
        cli::Command::Tune(args) => commands::tune::run(&args, open),
        cli::Command::Convert(args) => commands::convert::run(&args),
        cli::Command::Decompress(args) => commands::decompress::run(&args, open),
        cli::Command::Inspect(args) => commands::inspect::run(&args, open),
        cli::Command::Verify(args) => commands::verify::run(&args, open),
        cli::Command::Run(args) => commands::run::run(&args, open),
        cli::Command::Chat(args) => commands::chat::run(&args, open),
        cli::Command::Eval(args) => commands::eval::run(&args, open),
        cli::Command::Bench(args) => commands::bench::run(&args, open),
        cli::Command::Completions(args) => commands::completions::run(&args),
    }
}

/// Threads of commands that read weights at the speed of memory; `None` is all that there are.
fn default_threads(command: &cli::Command) -> Option<usize> {
    let is_model = matches!(
        command,
        cli::Command::Run(_)
            | cli::Command::Chat(_)
            | cli::Command::Eval(_)
            | cli::Command::Bench(_)
    );
    let is_chosen = std::env::var_os("RAYON_NUM_THREADS").is_some();
    (is_model && !is_chosen).then(threads::available_cores)
}

fn print_version(verbose: bool) -> Result<()> {
    let mut text = concat!("upg ", env!("CARGO_PKG_VERSION"), "\n").to_owned();
    if verbose {
        let names: Vec<_> = Kernels::available().iter().map(|k| k.name()).collect();
        text += &format!(
            "kernels: {} (of {}; UPG_KERNEL chooses others)\n",
            Cpu::shared()?.kernels().name(),
            names.join(", ")
        );
    }
    terminal::print(&text)
}
