//! `upg verify`.
#![forbid(unsafe_code)]

use super::model_file;
use crate::cli::VerifyArgs;
use crate::terminal;
use serde_json::json;
use upg_kernel::{OpenOptions, Result, UPGModel};

pub fn run(args: &VerifyArgs, open: OpenOptions) -> Result<()> {
    let file = model_file::open_current(&args.file, open)?;
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
    if args.json {
        let json = json!({
            "file": args.file.display().to_string(),
            "sound": true,
            "model": file.metadata("model"),
            "file_bytes": file.file_len(),
            "layers": file.layers().len(),
        });
        return terminal::print(&format!("{json:#}\n"));
    }
    terminal::print(&format!(
        "{}: sound ({}, {} layers)\n",
        args.file.display(),
        terminal::bytes(file.file_len()),
        file.layers().len()
    ))
}
