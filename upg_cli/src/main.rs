//! The `upg` command: parses flags, calls the libraries and returns exit codes.
mod bus_error;
mod cli;
mod commands;
mod hints;
mod progress;
mod signals;
mod terminal;
mod threads;
mod wrap;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};
use cli::TakesModel;
use commands::originals;
use log::{Level, LevelFilter, Log};
use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;
use upg_kernel::kernels::Kernels;
use upg_kernel::support::steers;
use upg_kernel::{Error, ErrorKind, OpenOptions, Result};

/// Exit code of an error in the input or the environment.
const FAILED: u8 = 1;
/// Exit code of a wrong option or argument, the same as clap's.
const USAGE: u8 = 2;
/// Exit code when a mapped file was truncated or overwritten.
#[cfg(unix)]
const FILE_CHANGED: u8 = 3;

/// Logger that prints the libraries' warnings like messages of the command.
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
    commands::completions::answer();
    // Fails only if a logger is already set.
    if log::set_logger(&Warnings).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return explain(&e),
    };
    bus_error::report();
    end(run(cli))
}

/// Prints a help text or a usage error; returns the exit code.
fn explain(e: &clap::Error) -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(hint) = hints::of(e, &arguments) {
        terminal::note(format_args!("upg: {hint}"));
        return ExitCode::from(USAGE);
    }
    let plain = e.render().to_string();
    if !e.use_stderr() {
        return end(match std::io::stdout().is_terminal() {
            // Keeps the colours of clap.
            true => e.print().map_err(terminal::output_error),
            false => terminal::print(&plain),
        });
    }
    // Clap echoes arguments unescaped, and they may be file names with control characters.
    let steer = |argument: &OsString| argument.to_string_lossy().contains(steers);
    match arguments.iter().any(steer) {
        true => terminal::note(plain.trim_end()),
        // If standard error is closed, nobody can be told.
        false => drop(e.print()),
    }
    if let Some(ContextValue::String(word)) = e.get(ContextKind::InvalidSubcommand)
        && originals::is_like_a_model(word)
    {
        terminal::note(format_args!(
            "upg: to use a model: upg run {word}, upg chat {word}"
        ));
    }
    ExitCode::from(USAGE)
}

/// Prints an error; returns the exit code.
fn end(result: Result<()>) -> ExitCode {
    match result {
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
    signals::report_size_limit()?;
    // An invalid kernel name is reported before a model is loaded.
    Kernels::from_env()?;
    threads::start(cli.threads, cli.command.as_ref().is_some_and(runs_a_model))?;
    let Some(command) = cli.command else {
        let message = "no command given";
        return Err(Error::new(ErrorKind::Argument, message).hint("see `upg --help`"));
    };
    let mut open = OpenOptions::default();
    open.mmap = !cli.no_mmap;
    match command {
        cli::Command::Compress(mut args) => {
            args.source = originals::source(&args.source, args.offline)?;
            commands::compress::run(&args, open)
        }
        cli::Command::Tune(mut args) => {
            args.original = originals::source(&args.original, false)?;
            commands::tune::run(&args, open)
        }
        cli::Command::Convert(args) => commands::convert::run(&args),
        cli::Command::Decompress(args) => commands::decompress::run(&args, open),
        cli::Command::Inspect(args) => with_upg_file(args, open, commands::inspect::run),
        cli::Command::Verify(args) => with_upg_file(args, open, commands::verify::run),
        cli::Command::Run(args) => with_upg_file(args, open, commands::run::run),
        cli::Command::Chat(args) => with_upg_file(args, open, commands::chat::run),
        cli::Command::Eval(mut args) => {
            if let Some(reference) = &mut args.against {
                *reference = originals::source(reference, args.original.offline)?;
            }
            with_upg_file(args, open, commands::eval::run)
        }
        cli::Command::Bench(mut args) => {
            if let Some(measure) = &mut args.measure {
                measure.file = originals::upg_file(&measure.file, &args.original, open)?;
            }
            commands::bench::run(&args, open)
        }
        cli::Command::Pull(args) => commands::pull::run(&args),
        cli::Command::List(args) => commands::list::run(&args),
        cli::Command::Show(args) => commands::show::run(&args),
        cli::Command::Rm(args) => commands::rm::run(&args),
        cli::Command::Completions(args) => commands::completions::run(&args),
        cli::Command::Report(args) => commands::report::run(&args),
        cli::Command::Man(args) => commands::man::run(&args),
        cli::Command::Glossary => terminal::print(cli::GLOSSARY),
    }
}

/// Runs a command after its model was made a UPG file.
fn with_upg_file<A: TakesModel>(
    mut args: A,
    open: OpenOptions,
    command: impl FnOnce(&A, OpenOptions) -> Result<()>,
) -> Result<()> {
    let (file, original) = args.model();
    *file = originals::upg_file(file, original, open)?;
    command(&args, open)
}

/// Returns whether a command reads weights at memory bandwidth.
fn runs_a_model(command: &cli::Command) -> bool {
    use cli::Command as C;
    match command {
        C::Run(_) | C::Chat(_) | C::Eval(_) | C::Bench(_) => true,
        C::Compress(_)
        | C::Tune(_)
        | C::Convert(_)
        | C::Decompress(_)
        | C::Inspect(_)
        | C::Verify(_)
        | C::Pull(_)
        | C::List(_)
        | C::Show(_)
        | C::Rm(_)
        | C::Completions(_)
        | C::Report(_)
        | C::Man(_)
        | C::Glossary => false,
    }
}

fn print_version(verbose: bool) -> Result<()> {
    let mut text = concat!("upg ", env!("CARGO_PKG_VERSION"), "\n").to_owned();
    if verbose {
        let names: Vec<_> = Kernels::available().iter().map(|k| k.name()).collect();
        text += &format!(
            "kernels: {} (available: {}; select with UPG_KERNEL)\n",
            Kernels::from_env()?.name(),
            names.join(", ")
        );
    }
    terminal::print(&text)
}
