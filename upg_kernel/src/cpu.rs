//! The CPU as a device: an instruction set and a thread pool.

pub(crate) mod attention;
pub(crate) mod cache;
pub(crate) mod device;
pub(crate) mod product;
pub(crate) mod team;

use crate::error::{Error, ErrorKind, Result};
use crate::kernels::Kernels;
use std::fmt;
use std::sync::{Arc, LazyLock};
use team::Team;

/// CPU device: kernels for one instruction set, and the threads that run them.
///
/// Clones share the threads. Several devices can coexist: each has its own threads.
///
/// ```
/// # fn main() -> upg_kernel::Result<()> {
/// use upg_kernel::Cpu;
/// use upg_kernel::kernels::Kernels;
///
/// let cpu = Cpu::new(Kernels::best(), 2);
/// assert_eq!(cpu.threads(), 2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Cpu {
    kernels: Kernels,
    team: Arc<Team>,
}

impl Cpu {
    /// Creates a device with `threads` threads, including the calling one.
    ///
    /// There are fewer if the system provides no more, but always the calling one.
    pub fn new(kernels: Kernels, threads: usize) -> Self {
        Self {
            kernels,
            team: Arc::new(Team::new(threads)),
        }
    }

    /// Returns the default device, created at the first call.
    ///
    /// It has the kernels of [`Kernels::from_env`] and as many threads as rayon's global pool,
    /// which is started if necessary. Errors: those of [`Kernels::from_env`].
    pub fn shared() -> Result<&'static Self> {
        static SHARED: LazyLock<std::result::Result<Cpu, String>> = LazyLock::new(|| {
            let kernels = Kernels::from_env().map_err(|e| e.to_string())?;
            Ok(Cpu::new(kernels, rayon::current_num_threads()))
        });
        SHARED
            .as_ref()
            .map_err(|message| Error::new(ErrorKind::Unsupported, message))
    }

    /// Returns the kernels.
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Returns the number of threads that work on one call, including the calling one.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    pub(crate) fn team(&self) -> &Team {
        &self.team
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Cpu({}, {} threads)",
            self.kernels.name(),
            self.threads()
        )
    }
}
