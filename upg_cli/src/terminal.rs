//! Output, progress bars, Ctrl-C and threads.
#![forbid(unsafe_code)]

use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use upg_compress::compress::Progress;
use upg_kernel::{Error, ErrorKind, Result};

/// Writes to standard output and flushes; a closed pipe is an error that `main` takes as success.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| {
            Error::new(ErrorKind::Io, format!("cannot write the output: {e}")).with_source(e)
        })
}

/// Whether `e` means that the reader of our output has gone.
pub fn is_broken_pipe(e: &Error) -> bool {
    std::error::Error::source(e)
        .and_then(|e| e.downcast_ref::<std::io::Error>())
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Sets the number of threads of the whole process. Errors (`Argument`): 0.
pub fn set_threads(threads: usize) -> Result<()> {
    if threads == 0 {
        return Err(Error::new(
            ErrorKind::Argument,
            "--threads 0: use at least 1",
        ));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| {
            Error::new(
                ErrorKind::Io,
                format!("cannot start {threads} threads: {e}"),
            )
            .with_source(e)
        })
}

/// A flag that Ctrl-C raises. From then on Ctrl-C no longer ends the process by itself.
pub fn interrupt_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&flag);
    ctrlc::set_handler(move || raised.store(true, Ordering::Relaxed)).map_err(|e| {
        Error::new(ErrorKind::Io, format!("cannot listen for Ctrl-C: {e}")).with_source(e)
    })?;
    Ok(flag)
}

/// A bar on standard error; invisible if that is no terminal.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Bar over weights, with Ctrl-C.
pub struct WeightsBar {
    bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
}

impl WeightsBar {
    pub fn new() -> Result<Self> {
        Ok(Self {
            bar: bar(
                0,
                "{bar:30} {percent:>3}%  {human_pos}/{human_len} weights, {eta} left  {msg}",
            ),
            interrupted: interrupt_flag()?,
        })
    }
}

impl Progress for WeightsBar {
    fn start(&self, weights: u64) {
        self.bar.set_length(weights);
    }

    fn tensor(&self, name: &str) {
        self.bar.set_message(name.to_owned());
    }

    fn advance(&self, weights: u64) {
        self.bar.inc(weights);
    }

    fn is_cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

impl Drop for WeightsBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// `12.3 MB` and the like, in powers of 1,000.
pub fn bytes(n: u64) -> String {
    indicatif::DecimalBytes(n).to_string()
}
