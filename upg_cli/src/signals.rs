//! Handling of Ctrl-C, SIGTERM and SIGHUP.
//!
//! The first signal asks the work to stop and clean up. A later signal ends the process at once,
//! and so does one that arrives while the command waits for a line. A signal that was ignored at
//! the start stays ignored.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use upg_kernel::{Error, ErrorKind, Result};

/// Base of the exit codes of signals in shells: the code is this plus the signal number.
const SHELL_BASE: i32 = 128;

/// Signal number of Ctrl-C, which is the same on all systems.
const SIGINT: i32 = signal_hook::consts::SIGINT;

/// Flag that signals set. `chat` clears it after an interrupted answer.
static RAISED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Last signal, or 0. SIGINT is recorded only if no other signal came before.
static LAST: AtomicI32 = AtomicI32::new(0);

/// Flag that is set while a line is read, when there is nothing to clean up.
static WAITS: AtomicBool = AtomicBool::new(false);

/// Returns a flag that SIGINT (Ctrl-C), SIGTERM and SIGHUP set.
///
/// From then on the first of these signals no longer ends the process, so that the work can clean
/// up. Ignored signals, such as under `nohup`, stay ignored.
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

/// Returns the exit code after a signal, as in shells: 130 for SIGINT, 143 for SIGTERM, 129
/// for SIGHUP.
pub fn exit_code() -> u8 {
    let signal = match LAST.load(Ordering::SeqCst) {
        0 => SIGINT,
        signal => signal,
    };
    u8::try_from(SHELL_BASE + signal).unwrap_or(u8::MAX)
}

/// Turns writes beyond the file size limit into errors. Otherwise a signal would silently end
/// the process.
pub fn report_size_limit() -> Result<()> {
    system::report_size_limit().map_err(|e| {
        Error::new(ErrorKind::Io, format!("cannot listen for signals: {e}")).with_source(e)
    })
}

/// Clears `flag` after an interrupted answer,
/// so that Ctrl-C does not interrupt the next one too.
pub fn start_again(flag: &AtomicBool) {
    flag.store(false, Ordering::SeqCst);
}

/// Returns an error of kind `Interrupted` if SIGTERM or SIGHUP has arrived.
pub fn check_end() -> Result<()> {
    match LAST.load(Ordering::SeqCst) {
        0 | SIGINT => Ok(()),
        _ => Err(Error::new(ErrorKind::Interrupted, "asked to end")),
    }
}

/// Runs `read`, which waits for a line.
///
/// A signal meanwhile restores the terminal and ends the process.
pub fn while_waiting<T>(read: impl FnOnce() -> T) -> Result<T> {
    system::keep_terminal_mode();
    WAITS.store(true, Ordering::SeqCst);
    // A signal that arrived before is not lost: either its thread sees `WAITS`, or this thread sees
    // the flag. The flag is down unless a signal came that has ended nothing yet.
    let is_raised = RAISED.get().is_some_and(|f| f.load(Ordering::SeqCst));
    let result = match is_raised {
        true => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
        false => check_end().map(|()| read()),
    };
    WAITS.store(false, Ordering::SeqCst);
    result
}

/// Keeps what is typed from the screen until it is dropped, if standard input is a terminal.
///
/// The line editor shows it later.
pub struct NoEcho(());

/// Begins a time in which the program writes, and what is typed would stand in its lines.
pub fn without_echo() -> NoEcho {
    system::keep_terminal_mode();
    system::hide_typed();
    NoEcho(())
}

impl Drop for NoEcho {
    fn drop(&mut self) {
        system::restore_mode();
    }
}

#[cfg(unix)]
mod system {
    use super::{LAST, SHELL_BASE, SIGINT, WAITS};
    use crate::bus_error::is_ignored;
    use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
    use signal_hook::consts::{SIGHUP, SIGTERM, SIGXFSZ};
    use signal_hook::iterator::Signals;
    use std::io::{IsTerminal, Write};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    /// Time after the first signal during which further ones count as the same.
    ///
    /// `timeout` signals a process and then its group; for a closed terminal both the system and
    /// the shell signal.
    const PAIR: Duration = Duration::from_millis(500);

    /// Terminal mode before a line was read, or an answer began.
    static MODE: Mutex<Option<Termios>> = Mutex::new(None);

    /// Escape sequence that turns off the bracketed paste mode of the line editor.
    const NO_PASTE_MARKS: &[u8] = b"\x1b[?2004l\n";

    /// Starts a thread that waits for signals; it may do things that a handler may not.
    pub fn listen(flag: &Arc<AtomicBool>) -> std::io::Result<()> {
        let all = [SIGINT, SIGTERM, SIGHUP];
        let heard = all.into_iter().filter(|&s| !is_ignored(s));
        let mut signals = Signals::new(heard)?;
        let flag = Arc::clone(flag);
        let thread = std::thread::Builder::new().name("signals".to_owned());
        thread.spawn(move || {
            let mut first = Instant::now();
            for signal in signals.forever() {
                // Ctrl-C does not override another signal.
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
                if WAITS.load(Ordering::SeqCst) || is_second {
                    restore_terminal();
                    // No exit handlers: they could wait for a lock of a blocked thread.
                    signal_hook::low_level::exit(SHELL_BASE + signal);
                }
            }
        })?;
        Ok(())
    }

    pub fn report_size_limit() -> std::io::Result<()> {
        // Nobody reads the flag: the mere existence of a handler makes the write return.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop)
    }

    pub fn keep_terminal_mode() {
        let mode = tcgetattr(std::io::stdin()).ok();
        *MODE.lock().unwrap_or_else(|e| e.into_inner()) = mode;
    }

    /// Stops showing what is typed. Signals of keys still work.
    pub fn hide_typed() {
        let mode = MODE.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(mut mode) = mode.clone() {
            mode.local_flags.remove(LocalFlags::ECHO);
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &mode);
        }
    }

    /// Restores the mode that was kept; returns whether there was one.
    pub fn restore_mode() -> bool {
        let mode = MODE.lock().unwrap_or_else(|e| e.into_inner());
        let Some(mode) = mode.as_ref() else {
            return false;
        };
        // A failure here means that the terminal is gone.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, mode);
        true
    }

    fn restore_terminal() {
        if !restore_mode() {
            return;
        }
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
        // The order matters: the first signal must find the flag down.
        flag::register_conditional_shutdown(SIGINT, SHELL_BASE + SIGINT, Arc::clone(raised))?;
        flag::register(SIGINT, Arc::clone(raised))?;
        Ok(())
    }

    /// Does nothing: this system has no such signal.
    pub fn report_size_limit() -> std::io::Result<()> {
        Ok(())
    }

    /// Does nothing: the line editor restores the terminal.
    pub fn keep_terminal_mode() {}

    /// Does nothing: what is typed stands in the lines of the answer.
    pub fn hide_typed() {}

    pub fn restore_mode() {}
}
