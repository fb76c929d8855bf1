//! `upg verify`.
#![forbid(unsafe_code)]

use crate::cli::FileArgs;
use crate::terminal;
use upg_kernel::Result;
use upg_kernel::format::UpgFile;

pub fn run(args: &FileArgs) -> Result<()> {
    let file = UpgFile::open(&args.file)?;
    let bar = terminal::bar(
        file.file_len(),
        "{bar:30} {percent:>3}%  {bytes}/{total_bytes}",
    );
    let verified = file.verify(&|done| bar.set_position(done));
    bar.finish_and_clear();
    verified?;
    terminal::print(&format!(
        "{}: sound ({}, {} layers)\n",
        args.file.display(),
        terminal::bytes(file.file_len()),
        file.layers().len()
    ))
}
