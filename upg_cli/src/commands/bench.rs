//! `upg bench`: measures how fast this machine loads, multiplies, decompresses and generates.
#![forbid(unsafe_code)]

mod figure;
mod generation;
mod llama;
mod load;
mod machine;
mod matrices;
mod report;
mod synth;

use super::model_file;
use crate::cli::{BenchArgs, BenchCommand, MeasureArgs};
use crate::terminal;
use llama::Llama;
use load::Loads;
use machine::{Machine, Memory, Others};
use matrices::Stored;
use report::Report;
use upg_kernel::support::peak_memory;
use upg_kernel::{Error, ErrorKind, OpenOptions, Result};

pub fn run(args: &BenchArgs, open: OpenOptions) -> Result<()> {
    match (&args.command, &args.measure) {
        (Some(BenchCommand::Synth(args)), _) => synth::run(args),
        (None, Some(args)) => measure(args, open),
        (None, None) => {
            let message = "no file to measure";
            Err(Error::new(ErrorKind::Argument, message).hint("see `upg bench --help`"))
        }
    }
}

fn measure(args: &MeasureArgs, open: OpenOptions) -> Result<()> {
    let llamas = Llama::find(args)?;
    let machine = Machine::here()?;
    let others = Others::watch();
    // Drops the model: the page cache frees pages of the file only when nobody maps them.
    let unfit = match load::model(&args.file, open)? {
        Ok(model) => {
            generation::check(args, model.model().config().context)?;
            None
        }
        Err(e) if llamas.is_empty() => Some(e.to_string()),
        Err(e) => return Err(e),
    };
    let loads = Loads::measure(args, open, unfit.is_none())?;
    let generation = match unfit {
        None => Some(generation::measure(args, open, &llamas)?),
        Some(_) => None,
    };
    let peak = peak_memory();

    let file = model_file::open_current(&args.file, open)?;
    let stored = Stored::of(&file)?;
    let memory = Memory::new()?;
    let products = stored.products(&memory, args.repetitions)?;
    let read_bytes = memory.bytes();
    drop(memory);
    let report = Report {
        args,
        machine: &machine,
        file: &file,
        unfit: unfit.as_deref(),
        loads: &loads,
        generation: generation.as_ref(),
        peak,
        read_bytes,
        products: &products,
        decompressed: &stored.decompressed(&file, args.repetitions)?,
        swept_bytes: stored.bytes(),
        others: others.and_then(|others| others.percent()),
    };
    terminal::print(&match args.json {
        true => format!("{:#}\n", report.as_json()),
        false => report.as_table(),
    })
}
