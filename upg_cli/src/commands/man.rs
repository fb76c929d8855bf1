//! `upg man`.
#![forbid(unsafe_code)]

use crate::cli::{Cli, ManArgs};
use crate::terminal;
use clap::CommandFactory;
use upg_kernel::{Error, Result};

/// Writes a page for `upg` and one for each command.
pub fn run(args: &ManArgs) -> Result<()> {
    let folder = &args.folder;
    let failed = |e| Error::io("cannot write", folder, e);
    std::fs::create_dir_all(folder).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(failed)?;
    terminal::print(&format!("man pages in {}\n", folder.display()))
}
