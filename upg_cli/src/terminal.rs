//! Output, progress bars, Ctrl-C and threads.
#![forbid(unsafe_code)]

use indicatif::{ProgressBar, ProgressStyle};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
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

/// The text in a file. Errors: `Io`; `Malformed` if it is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("cannot read", path, e))?;
    String::from_utf8(bytes).map_err(|e| {
        Error::new(ErrorKind::Malformed, format!("not UTF-8 text: {e}"))
            .at(path)
            .with_source(e)
    })
}

/// Writes a line to standard error; if nobody reads that any more, there is nobody to tell.
pub fn note(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Whether `e` means that the reader of our output has gone.
pub fn is_broken_pipe(e: &Error) -> bool {
    std::error::Error::source(e)
        .and_then(|e| e.downcast_ref::<std::io::Error>())
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Far above what helps anywhere: more only cost the time to start and stop them.
const MOST_THREADS: usize = 1024;

/// Sets the number of threads of the whole process. Errors (`Argument`): 0, or above 1,024.
pub fn set_threads(threads: usize) -> Result<()> {
    if !(1..=MOST_THREADS).contains(&threads) {
        let message = format!("--threads {threads}: use 1 to {MOST_THREADS}");
        return Err(Error::new(ErrorKind::Argument, message));
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

/// A flag that Ctrl-C raises, and what else asks a process to end (SIGTERM, SIGHUP). From then on these
/// no longer end the process by themselves, so that it can clean up.
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

/// `12.3 MB` and the like, in powers of 1,000.
pub fn bytes(n: u64) -> String {
    indicatif::DecimalBytes(n).to_string()
}

/// `45 s`, `12 min` or `3.5 h`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
