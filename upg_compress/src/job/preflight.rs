//! Estimate of disk space, memory and time, before the compression starts.
#![forbid(unsafe_code)]

mod memory;
mod time;

use crate::job::resume::partial_files;
use crate::plan::budget::most_bytes;
use crate::plan::options::{CompressOptions, is_calibrated};
use crate::plan::sizes::{array_bytes, file_bytes};
use crate::plan::tensors::{Plan, PlannedTensor};
use crate::source::{Source, check_runnable};
use std::path::Path;
use sysinfo::System;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::{Error, ErrorKind, Result};

pub use memory::MemoryEstimate;

/// Estimate of the results and the cost of [`compress`](crate::compress()).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Preflight {
    /// Groups of tensors that are treated alike, in the order of their first tensors.
    pub groups: Vec<TensorGroup>,
    /// Output size in bytes; an upper bound for `mdcsr`, `s8`, `s4` and with a budget.
    pub file_bytes: u64,
    /// Flag: `file_bytes` is such a bound.
    pub is_bound: bool,
    /// Bytes that an earlier run may have written already.
    pub written_bytes: u64,
    /// Free bytes on the file system of the output.
    pub disk_free: u64,
    /// Bytes of temporary files for hidden states.
    pub temporary_bytes: u64,
    /// Free bytes on the file system of temporary files.
    pub temporary_free: u64,
    /// Peak memory.
    pub memory: MemoryEstimate,
    /// Memory that is available to this process, including swap.
    ///
    /// Considers the system and the limits of the process group. `None`:
    /// the system does not report it.
    pub memory_free: Option<u64>,
    /// Estimated seconds, without work that an earlier run has done.
    ///
    /// Measured on samples of the weights, which are encoded and multiplied now.
    pub seconds: f64,
}

/// Tensors of the same shape and encoding whose names differ only by the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorGroup {
    /// Name with `*` for the number of the layer.
    pub name: String,
    /// Encoding: `keep`, its name, or `mixed` if a budget will choose it.
    pub encoding: String,
    /// Shape: `[rows, cols]` of a matrix, `[n]` of a vector.
    pub shape: Vec<usize>,
    /// Number of tensors.
    pub tensors: usize,
    /// Total bytes; for `mixed` those of `t3` or `t4`, whichever is nearer to the budget.
    pub bytes: u64,
}

impl Preflight {
    /// Estimates the compression of `source` into `out`.
    /// Takes a second or two, mostly for samples.
    ///
    /// Errors: those that [`compress`](crate::compress()) would return before its first tensor, and
    /// those of encoding samples; `Io` if `out` is not writable.
    pub fn new(
        source: &dyn Source,
        out: impl AsRef<Path>,
        options: &CompressOptions,
    ) -> Result<Self> {
        let out = out.as_ref();
        check_runnable(source)?;
        let plan = Plan::new(source, options)?;
        let file_bytes = match options.budget {
            Some(budget) => most_bytes(source, options, budget)?,
            None => file_bytes(source, options, &plan)?,
        };
        let mut groups: Vec<TensorGroup> = Vec::new();
        for planned in &plan.tensors {
            let bytes = array_bytes(source, planned)?.iter().sum();
            let is_open = options.budget.is_some()
                && planned.layer.as_ref().is_some_and(is_calibrated)
                && !options.is_named(&source.tensors()[planned.index].name);
            add(&mut groups, source, planned, bytes, is_open);
        }
        let [partial, _] = partial_files(out)?;
        let written = std::fs::metadata(&partial).map_or(0, |m| m.len());
        let folder = partial.parent().filter(|p| !p.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let temporary = std::env::temp_dir();
        Ok(Self {
            groups,
            file_bytes,
            is_bound: options.budget.is_some() || plan.layers().iter().any(varies),
            written_bytes: if options.resume {
                written.min(file_bytes)
            } else {
                0
            },
            disk_free: free(folder)?,
            temporary_bytes: temporary_bytes(source, options)?,
            temporary_free: free(&temporary)?,
            memory: MemoryEstimate::of(source, options, &plan)?,
            memory_free: memory_free(),
            seconds: time::seconds(source, options, &plan)?,
        })
    }

    /// Checks the estimate against the free space and memory.
    ///
    /// Errors: `Io` if the file will not fit on the disk;
    /// `TooLarge` if the work will not fit in memory.
    pub fn check(&self) -> Result<()> {
        let wanted = self.file_bytes - self.written_bytes;
        if wanted > self.disk_free {
            let message = format!(
                "needs {} on the disk of the output, where {} are free",
                megabytes(wanted),
                megabytes(self.disk_free)
            );
            return Err(Error::new(ErrorKind::Io, message)
                .hint("make room, choose another place or an encoding of fewer bits"));
        }
        if self.temporary_bytes > self.temporary_free {
            let message = format!(
                "needs {} where temporary files are, where {} are free",
                megabytes(self.temporary_bytes),
                megabytes(self.temporary_free)
            );
            return Err(Error::new(ErrorKind::Io, message)
                .hint("name another folder in TMPDIR, or use a shorter calibration text"));
        }
        match self.memory_free {
            Some(free) if self.memory.own > free => {
                let message = format!(
                    "needs up to {} of memory, {} are free",
                    megabytes(self.memory.own),
                    megabytes(free)
                );
                Err(Error::new(ErrorKind::TooLarge, message)
                    .hint("end other programs, use fewer threads or a shorter calibration text"))
            }
            _ => Ok(()),
        }
    }
}

/// Returns the free bytes on the file system of a folder.
pub(crate) fn free(folder: &Path) -> Result<u64> {
    fs4::available_space(folder)
        .map_err(|e| Error::io("cannot find out how much room is left", folder, e))
}

/// Returns the bytes of the hidden states before each layer.
fn temporary_bytes(source: &dyn Source, options: &CompressOptions) -> Result<u64> {
    let Some(calibration) = &options.calibration else {
        return Ok(0);
    };
    let (config, tokens) = (source.files().config()?, calibration.tokens().len());
    Ok(4 * (tokens * config.hidden_size * config.num_layers) as u64)
}

fn add(
    groups: &mut Vec<TensorGroup>,
    source: &dyn Source,
    planned: &PlannedTensor,
    bytes: u64,
    is_open: bool,
) {
    let tensor = &source.tensors()[planned.index];
    let encoding = match &planned.layer {
        _ if is_open => "mixed",
        Some(layer) => layer.encoding_name(),
        None => "keep",
    };
    let name = with_star(&tensor.name);
    let same =
        |g: &&mut TensorGroup| g.name == name && g.encoding == encoding && g.shape == tensor.shape;
    match groups.iter_mut().find(same) {
        Some(group) => {
            group.tensors += 1;
            group.bytes += bytes;
        }
        None => groups.push(TensorGroup {
            name,
            encoding: encoding.to_owned(),
            shape: tensor.shape.clone(),
            tensors: 1,
            bytes,
        }),
    }
}

/// Returns `model.layers.*.rest` for the tensors of all layers.
fn with_star(name: &str) -> String {
    const LAYERS: &str = "model.layers.";
    let rest = name.strip_prefix(LAYERS).and_then(|n| n.split_once('.'));
    match rest {
        Some((number, rest)) if number.bytes().all(|b| b.is_ascii_digit()) => {
            format!("{LAYERS}*.{rest}")
        }
        _ => name.to_owned(),
    }
}

fn memory_free() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let free = system.available_memory() + system.free_swap();
    let limits = system.cgroup_limits();
    Some(limits.map_or(free, |l| {
        free.min(l.free_memory.saturating_add(l.free_swap))
    }))
}

/// Returns whether the size of a matrix depends on its values.
fn varies(layer: &LayerInfo) -> bool {
    matches!(
        layer.encoding(),
        Ok(Encoding::MdCsr | Encoding::S8 | Encoding::S4)
    )
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests;
