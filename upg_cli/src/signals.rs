//! Ctrl-C, SIGTERM and SIGHUP. The first signal asks the work to end and clean up; a later one, and one that comes while
//! the command waits for a line, ends the process at once. A signal that was ignored at the start stays ignored.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use upg_kernel::{Error, ErrorKind, Result};

/// Exit code of a process that a signal ended, as shells have it, less the number of the signal.
const SHELL_BASE: i32 = 128;

/// The number of Ctrl-C everywhere.
const SIGINT: i32 = signal_hook::consts::SIGINT;

/// The flag that signals raise. An answer of a chat that it ends lowers it again.
static RAISED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// The signal that came last, but SIGINT only if no other came before; 0 if there was none.
static LAST: AtomicI32 = AtomicI32::new(0);

/// Set while a line is waited for, when there is nothing to clean up.
static WAITS: AtomicBool = AtomicBool::new(false);

/// Returns a flag that SIGINT (Ctrl-C), SIGTERM and SIGHUP raise. From then on the first of them no longer ends the
/// process by itself, so that the work can clean up. Those that are ignored, as `nohup` has it, stay ignored.
pub fn interrupt_flag() -> Result<Arc<AtomicBool>> {
    if let Some(flag) = RAISED.get() {
        return Ok(Arc::clone(flag));
    }
    let flag = Arc::clone(RAISED.get_or_init(Arc::default));
    system::listen(&flag).map_err(|e| {
        Error::new(ErrorKind::Io, format!("cannot listen for signals: {e}")).with_source(e)
    })?;
    Ok(flag)
}

/// Returns the exit code after a signal, as shells have it: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP.
pub fn exit_code() -> u8 {
    let signal = match LAST.load(Ordering::SeqCst) {
        0 => SIGINT,
        signal => signal,
    };
    u8::try_from(SHELL_BASE + signal).unwrap_or(u8::MAX)
}

/// Makes a write beyond the file size limit of the process an error in place of a signal that ends it without a word.
pub fn report_size_limit() -> Result<()> {
    system::report_size_limit().map_err(|e| {
        Error::new(ErrorKind::Io, format!("cannot listen for signals: {e}")).with_source(e)
    })
}

/// Lowers `flag` after it has ended an answer of a chat, so that Ctrl-C does not end the next one too.
pub fn start_again(flag: &AtomicBool) {
    flag.store(false, Ordering::SeqCst);
}

/// Returns an error of kind `Interrupted` if SIGTERM or SIGHUP has come.
pub fn check_end() -> Result<()> {
    match LAST.load(Ordering::SeqCst) {
        0 | SIGINT => Ok(()),
        _ => Err(Error::new(ErrorKind::Interrupted, "asked to end")),
    }
}

/// Runs `read`, which waits for a line. A signal meanwhile ends the process, with the terminal as it was before.
pub fn while_waiting<T>(read: impl FnOnce() -> T) -> Result<T> {
    system::keep_terminal_mode();
    WAITS.store(true, Ordering::SeqCst);
    // A signal from before that is not lost: either its thread sees that this waits, or this sees the flag. It is down
    // unless a signal came that has ended nothing yet.
    let is_raised = RAISED.get().is_some_and(|f| f.load(Ordering::SeqCst));
    let result = match is_raised {
        true => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
        false => check_end().map(|()| read()),
    };
    WAITS.store(false, Ordering::SeqCst);
    result
}

#[cfg(unix)]
mod system {
    use super::{LAST, SHELL_BASE, SIGINT, WAITS};
    use crate::bus_error::is_ignored;
    use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
    use signal_hook::consts::{SIGHUP, SIGTERM, SIGXFSZ};
    use signal_hook::iterator::Signals;
    use std::io::{IsTerminal, Write};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    /// Time after the first signal in which others count as the same one. `timeout` signals a process and then its group;
    /// the end of a terminal comes from the system and from the shell.
    const PAIR: Duration = Duration::from_millis(500);

    /// Mode of the terminal before a line was asked for.
    static MODE: Mutex<Option<Termios>> = Mutex::new(None);

    /// Ends what the line editor asks of a terminal: that it marks text which is pasted.
    const NO_PASTE_MARKS: &[u8] = b"\x1b[?2004l\n";

    /// Starts a thread that waits for signals: it may do what no handler may.
    pub fn listen(flag: &Arc<AtomicBool>) -> std::io::Result<()> {
        let all = [SIGINT, SIGTERM, SIGHUP];
        let heard = all.into_iter().filter(|&s| !is_ignored(s));
        let mut signals = Signals::new(heard)?;
        let flag = Arc::clone(flag);
        let thread = std::thread::Builder::new().name("signals".to_owned());
        thread.spawn(move || {
            let mut first = Instant::now();
            for signal in signals.forever() {
                // Ctrl-C does not take back what another signal has asked for.
                if signal != SIGINT || LAST.load(Ordering::SeqCst) == 0 {
                    LAST.store(signal, Ordering::SeqCst);
                }
                let is_second = match flag.swap(true, Ordering::SeqCst) {
                    true => first.elapsed() >= PAIR,
                    false => {
                        first = Instant::now();
                        false
                    }
                };
                let waits = WAITS.load(Ordering::SeqCst);
                if waits {
                    restore_terminal();
                }
                if waits || is_second {
                    // No code at exit: it could wait for a lock of a thread that does not get on.
                    signal_hook::low_level::exit(SHELL_BASE + signal);
                }
            }
        })?;
        Ok(())
    }

    pub fn report_size_limit() -> std::io::Result<()> {
        // Nobody looks at the flag: that there is a handler lets the write return.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop)
    }

    pub fn keep_terminal_mode() {
        let mode = tcgetattr(std::io::stdin()).ok();
        *MODE.lock().unwrap_or_else(|e| e.into_inner()) = mode;
    }

    fn restore_terminal() {
        let mode = MODE.lock().unwrap_or_else(|e| e.into_inner());
        let Some(mode) = mode.as_ref() else { return };
        // A failure here means that the terminal has gone.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, mode);
        let mut error = std::io::stderr();
        if error.is_terminal() {
            let _ = error.write_all(NO_PASTE_MARKS);
        }
    }
}

#[cfg(not(unix))]
mod system {
    use super::{SHELL_BASE, SIGINT};
    use signal_hook::flag;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    pub fn listen(raised: &Arc<AtomicBool>) -> std::io::Result<()> {
        // In this order: the first signal finds the flag down.
        flag::register_conditional_shutdown(SIGINT, SHELL_BASE + SIGINT, Arc::clone(raised))?;
        flag::register(SIGINT, Arc::clone(raised))?;
        Ok(())
    }

    /// There is no such signal.
    pub fn report_size_limit() -> std::io::Result<()> {
        Ok(())
    }

    /// The line editor restores the terminal.
    pub fn keep_terminal_mode() {}
}
