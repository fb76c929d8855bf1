//! `upg decompress`.
#![forbid(unsafe_code)]

use super::model_file;
use crate::cli::{DecompressArgs, FloatArg};
use crate::progress::WeightsBar;
use crate::terminal;
use upg_compress::export;
use upg_compress::source::FloatType;
use upg_kernel::{OpenOptions, Result, UPGDecompressor};

pub fn run(args: &DecompressArgs, open: OpenOptions) -> Result<()> {
    let model = UPGDecompressor::new(model_file::open(&args.file, open)?);
    let dtype = args.dtype.map(|dtype| match dtype {
        FloatArg::Bf16 => FloatType::Bf16,
        FloatArg::F16 => FloatType::F16,
        FloatArg::F32 => FloatType::F32,
    });
    let progress = WeightsBar::new(None)?;
    export(&model, &args.output, dtype, args.force, &progress)?;
    drop(progress);
    terminal::print(&format!(
        "{}: a Hugging Face directory\n",
        args.output.display()
    ))
}
