//! `upg completions`, and the answers to a shell whose user presses the tab key.
#![forbid(unsafe_code)]

use crate::cli::{Cli, CompletionsArgs};
use crate::terminal;
use clap::{CommandFactory, ValueEnum};
use clap_complete::CompleteEnv;
use clap_complete::env::Shells;
use upg_kernel::{Error, ErrorKind, Result};

/// Environment variable by which the script asks the program.
const VARIABLE: &str = "UPG_COMPLETE";

/// Prints the script that makes a shell ask this program.
pub fn run(args: &CompletionsArgs) -> Result<()> {
    let name = args.shell.to_possible_value();
    let name = name.as_ref().map_or("", |value| value.get_name());
    let shells = Shells::builtins();
    let shell = shells.completer(name).ok_or_else(|| {
        let message = format!("no completions for {name}");
        Error::new(ErrorKind::Argument, message)
    })?;
    let mut script = Vec::new();
    shell
        .write_registration(VARIABLE, "upg", "upg", "upg", &mut script)
        .map_err(terminal::output_error)?;
    terminal::print(&String::from_utf8_lossy(&script))
}

/// Answers a shell, if one asks; then the process ends.
pub fn answer() {
    CompleteEnv::with_factory(Cli::command)
        .var(VARIABLE)
        .complete();
}
