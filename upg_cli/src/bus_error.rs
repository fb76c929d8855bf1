//! A model file that is cut short while it is mapped: a line and an exit code instead of an end without a word.
//!
//! Touching a page that the file no longer has raises SIGBUS in the thread that does it. Its handler looks which file is
//! mapped there.
//!
//! The one question about signals that needs `unsafe` is here too: whether a signal is ignored.

/// Installs the handler: a bus error in a mapped file then ends the process with a message and
/// [`FILE_CHANGED`](crate::FILE_CHANGED). Any other bus error does what it did before.
pub fn report() {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    handler::install();
}

/// Returns whether this process ignores `signal`, as `nohup` and background jobs of shells have it. A signal whose state
/// the system does not tell counts as not ignored.
#[cfg(unix)]
pub fn is_ignored(signal: std::ffi::c_int) -> bool {
    use nix::libc::{SIG_IGN, sigaction};
    let mut action = std::mem::MaybeUninit::<sigaction>::zeroed();
    // SAFETY: without a new action the call changes nothing; `action` is room for the present one.
    let done = unsafe { sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: all fields are integers or pointers, or an optional function, for which zero is a value; the call, where it
    // succeeds, has written the rest.
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

    /// Beginning of the line.
    const WHO: &[u8] = b"upg: ";
    /// End of the line, after the path.
    const WHAT: &[u8] = b": the file was cut short or overwritten while it was in use, or its disk cannot be read; \
        fetch or compress it again, and replace model files by renaming, not by copying over them\n";

    /// The action of the signal before the handler was installed.
    static BEFORE: OnceLock<SigAction> = OnceLock::new();
    /// Set if the line may come after the beginning of another, such as that of a progress bar.
    static ON_TERMINAL: AtomicBool = AtomicBool::new(false);
    /// Set once a thread is ending the process.
    static ENDING: AtomicBool = AtomicBool::new(false);

    pub(super) fn install() {
        ON_TERMINAL.store(std::io::stderr().is_terminal(), Ordering::Relaxed);
        // On the stack for signals that threads of Rust have: the signal may mean that the other one is full.
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_signal), flags, SigSet::empty());
        // SAFETY: `on_signal` does only what a handler may: it reads its arguments and atomics, writes, and ends the
        // process or restores an action. It takes no lock, allocates nothing and does not panic.
        if let Ok(before) = unsafe { sigaction(Signal::SIGBUS, &action) } {
            // It is set once, by `main`.
            let _ = BEFORE.set(before);
        }
    }

    extern "C" fn on_signal(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
        // SAFETY: with `SA_SIGINFO` the system passes a `siginfo_t` that is valid until the handler returns; of SIGBUS it
        // has an address.
        let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
        // Another process may send it; then the address is none.
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
        // SAFETY: the action is what the process had before, and this one lets a handler restore it.
        let _ = unsafe { sigaction(Signal::SIGBUS, &before) };
        // The instruction at fault is run again and raises the signal again; one that was sent is sent again.
        if is_sent {
            let _ = raise(Signal::SIGBUS);
        }
    }

    /// The message, in memory of the handler.
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

        /// Adds the message about the file mapped at `address`; returns `false` if there is none.
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

    /// Writes the line and ends the process, without what it does at other ends.
    fn end(line: &[u8]) -> ! {
        // Several threads may fault at once, and one line is enough.
        if !ENDING.swap(true, Ordering::Relaxed) {
            // SAFETY: the pointer and length are those of a slice. If the line cannot be written, there is nobody to tell.
            unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
            // SAFETY: it ends the process at once, from any thread.
            unsafe { libc::_exit(crate::FILE_CHANGED.into()) };
        }
        loop {
            // SAFETY: it waits for a signal, or for the end that is near.
            unsafe { libc::pause() };
        }
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "macos")))]
mod tests {
    use std::fs::File;
    use std::process::{Command, Stdio};
    use upg_kernel::MappedFile;

    /// The file that a child process is to read when it is cut short.
    const FILE: &str = "UPG_TEST_OF_BUS_ERRORS";

    /// The parent runs this very test again, as a process that may die; there a thread of its own reads the file.
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
            // What is still there can be read.
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
