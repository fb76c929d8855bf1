//! SIGBUS on a mapped model file that was truncated: prints a message and exits with a code.
//!
//! Touching a page that the file no longer has raises SIGBUS in the thread that does it. The
//! handler looks up which file is mapped at that address.
//!
//! [`is_ignored`] is here too, because it is the only other question about signals
//! that needs `unsafe`.

/// Installs the handler for bus errors.
///
/// A bus error in a mapped file then ends the process with a message and
/// [`FILE_CHANGED`](crate::FILE_CHANGED). Any other bus error is handled as before.
pub fn report() {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    handler::install();
}

/// Returns whether this process ignores `signal`.
///
/// `nohup` and the background jobs of shells ignore signals. A signal counts as not ignored if its
/// state cannot be queried.
#[cfg(unix)]
pub fn is_ignored(signal: std::ffi::c_int) -> bool {
    use nix::libc::{SIG_IGN, sigaction};
    let mut action = std::mem::MaybeUninit::<sigaction>::zeroed();
    // SAFETY: without a new action the call changes nothing; `action` has room for the present one.
    let done = unsafe { sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: all fields are integers, pointers or an optional function, for which zero is a valid
    // value. If the call succeeded, it has written the rest.
    done == 0 && unsafe { action.assume_init() }.sa_sigaction == SIG_IGN
}

#[cfg(any(target_os = "linux", target_os = "macos"))]
mod handler {
    use nix::libc::{self, c_int, c_void, siginfo_t};
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
    use std::io::IsTerminal;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use upg_kernel::support::{MAPPED_PATH_BYTES, mapped_path_at};

    /// Start of the message line.
    const WHO: &[u8] = b"upg: ";
    /// End of the message line, after the path.
    const WHAT: &[u8] = b": the file was cut short or overwritten while it was in use, or its disk cannot be read; \
        fetch or compress it again, and replace model files by renaming, not by copying over them\n";

    /// Action of the signal before the handler was installed.
    static BEFORE: OnceLock<SigAction> = OnceLock::new();
    /// Flag for a line that may follow the start of another, such as that of a progress bar.
    static ON_TERMINAL: AtomicBool = AtomicBool::new(false);
    /// Flag that a thread sets when it ends the process.
    static ENDING: AtomicBool = AtomicBool::new(false);

    pub(super) fn install() {
        ON_TERMINAL.store(std::io::stderr().is_terminal(), Ordering::Relaxed);
        // Uses Rust's alternate signal stack: the normal stack may be exhausted.
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_signal), flags, SigSet::empty());
        // SAFETY: `on_signal` does only what a handler may. It reads its arguments and atomics,
        // writes, and ends the process or restores an action. It takes no lock, allocates nothing
        // and does not panic.
        if let Ok(before) = unsafe { sigaction(Signal::SIGBUS, &action) } {
            // `main` calls this once.
            let _ = BEFORE.set(before);
        }
    }

    extern "C" fn on_signal(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
        // SAFETY: with `SA_SIGINFO` the system passes a `siginfo_t` that is valid until the handler
        // returns; SIGBUS sets its address.
        let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
        // If another process sent the signal, the address is meaningless.
        let is_sent = match cfg!(target_os = "macos") {
            true => code >= 0x1_0001,
            false => code <= 0,
        };
        let mut line = Line::new();
        if !is_sent && line.names_file_at(address) {
            end(line.bytes());
        }
        let default = || SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        let before = BEFORE.get().copied().unwrap_or_else(default);
        // SAFETY: the action is the one the process had before, and this one allows a handler to
        // restore it.
        let _ = unsafe { sigaction(Signal::SIGBUS, &before) };
        // The faulting instruction runs again and raises the signal again; a signal that was sent
        // is sent again.
        if is_sent {
            let _ = raise(Signal::SIGBUS);
        }
    }

    /// Message in the memory of the handler.
    struct Line {
        bytes: [u8; 1 + WHO.len() + MAPPED_PATH_BYTES + WHAT.len()],
        len: usize,
    }

    impl Line {
        fn new() -> Self {
            let mut line = Self {
                bytes: [0; 1 + WHO.len() + MAPPED_PATH_BYTES + WHAT.len()],
                len: 0,
            };
            if ON_TERMINAL.load(Ordering::Relaxed) {
                line.add(b"\n");
            }
            line.add(WHO);
            line
        }

        fn add(&mut self, text: &[u8]) {
            for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text) {
                *to = *from;
            }
            self.len += text.len();
        }

        /// Appends the message about the file mapped at `address`;
        /// returns `false` if there is none.
        fn names_file_at(&mut self, address: usize) -> bool {
            let path = self.bytes.get_mut(self.len..).unwrap_or_default();
            let Some(len) = mapped_path_at(address, path) else {
                return false;
            };
            self.len += len;
            self.add(WHAT);
            true
        }

        fn bytes(&self) -> &[u8] {
            self.bytes.get(..self.len).unwrap_or_default()
        }
    }

    /// Writes the line and ends the process without the usual exit code.
    fn end(line: &[u8]) -> ! {
        // Several threads may fault at once; one line is enough.
        if !ENDING.swap(true, Ordering::Relaxed) {
            // SAFETY: the pointer and length are those of a slice. If the line cannot be written,
            // nobody can be told.
            unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
            // SAFETY: `_exit` ends the process at once, from any thread.
            unsafe { libc::_exit(crate::FILE_CHANGED.into()) };
        }
        loop {
            // SAFETY: `pause` waits for a signal, or for the imminent end of the process.
            unsafe { libc::pause() };
        }
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "macos")))]
mod tests {
    use std::fs::File;
    use std::process::{Command, Stdio};
    use upg_kernel::MappedFile;

    /// Environment variable with the file that the child process reads while it is truncated.
    const FILE: &str = "UPG_TEST_OF_BUS_ERRORS";

    /// The parent runs this test again in a process that may die. There, a spawned thread reads
    /// the file.
    #[test]
    fn any_thread_that_reads_what_was_cut_off_ends_the_process_with_a_line() {
        if let Some(path) = std::env::var_os(FILE) {
            super::report();
            let map = MappedFile::open(&path).unwrap();
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(1)
                .unwrap();
            // The remaining part can be read.
            assert_eq!(map[0], 7);
            let read = std::thread::spawn(move || std::hint::black_box(map[50_000]));
            panic!("read {:?}", read.join());
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a file");
        std::fs::write(&path, [7; 100_000]).unwrap();
        let name =
            "bus_error::tests::any_thread_that_reads_what_was_cut_off_ends_the_process_with_a_line";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(FILE, &path)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(crate::FILE_CHANGED.into()),
            "{stderr}"
        );
        let expected = format!("upg: {}: the file was cut short", path.display());
        assert!(stderr.contains(&expected), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
