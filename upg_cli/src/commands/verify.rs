//! `upg verify`.
#![forbid(unsafe_code)]

use crate::cli::FileArgs;
use crate::terminal;
use std::sync::Arc;
use upg_kernel::format::UpgFile;
use upg_kernel::{OpenOptions, Result, UPGModel};

pub fn run(args: &FileArgs, open: OpenOptions) -> Result<()> {
    let file = Arc::new(UpgFile::open_with(&args.file, open)?);
    // A file that was read into memory was verified then.
    if open.mmap {
        let bar = terminal::bar(
            file.file_len(),
            "{bar:30} {percent:>3}%  {bytes}/{total_bytes}",
        );
        let verified = file.verify(&|done| bar.set_position(done));
        bar.finish_and_clear();
        verified?;
    }
    UPGModel::check(&file)?;
    terminal::print(&format!(
        "{}: sound ({}, {} layers)\n",
        args.file.display(),
        terminal::bytes(file.file_len()),
        file.layers().len()
    ))
}
