//! Resumption of a stopped run: its finished tensors are checked and reused.
#![forbid(unsafe_code)]

use crate::job::journal::{Fingerprint, Journal, Record};
use crate::job::report::TensorReport;
use crate::plan::options::CompressOptions;
use crate::plan::tensors::{Plan, PlannedTensor};
use crate::progress::Progress;
use crate::source::{Source, TensorInfo};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;
use sysinfo::{CpuRefreshKind, RefreshKind, System};
use upg_kernel::Cpu;
use upg_kernel::format::{FileWriter, LayerInfo, checksum_of};
use upg_kernel::support::{AtomicFile, refuse_to_overwrite};
use upg_kernel::{Error, ErrorKind, Result};

/// Run that stores its progress for a later one.
pub(crate) struct Resumable {
    journal: Journal,
    found: Vec<Record>,
}

/// Returns the paths of the two files that a stopped run to `out` leaves:
/// the data and the journal.
///
/// Errors: `Io` if `out` is not writable.
pub fn partial_files(out: impl AsRef<Path>) -> Result<[PathBuf; 2]> {
    let out = out.as_ref();
    Ok([
        AtomicFile::partial(out)?,
        AtomicFile::beside(out, ".partial.journal")?,
    ])
}

impl Resumable {
    /// Looks for an earlier run to `out` and locks its journal until this run ends.
    ///
    /// Errors: those of [`Journal::open`]; `Argument` if there is a partial file without a journal,
    /// or a file of the `source` would be overwritten.
    pub fn open(out: &Path, source: &dyn Source, fingerprint: &Fingerprint) -> Result<Self> {
        let [data, journal] = partial_files(out)?;
        for path in [out, &data, &journal] {
            refuse_to_overwrite(path, source.own_files())?;
        }
        let (journal, found) = Journal::open(journal, fingerprint)?;
        if found.is_none() && data.exists() {
            let refused = Error::new(
                ErrorKind::Argument,
                "the journal of this partial file is missing",
            )
            .at(&data)
            .hint("remove it to start from scratch, or choose another output");
            journal.remove()?;
            return Err(refused);
        }
        Ok(Self {
            journal,
            found: found.unwrap_or_default(),
        })
    }

    /// Reuses the tensors on disk that match the journal, up to the first that does not.
    ///
    /// Sets the errors of these tensors in `layers`, the compressed ones of the plan, and returns
    /// their reports.
    ///
    /// Cost: reads the reused tensors. Errors: `Io`; `Interrupted`.
    pub fn restore(
        &mut self,
        writer: &mut FileWriter,
        source: &dyn Source,
        plan: &Plan,
        layers: &mut [LayerInfo],
        progress: &dyn Progress,
    ) -> Result<Vec<TensorReport>> {
        let mut restored = Vec::new();
        let mut next_layer = 0;
        for (planned, record) in plan.tensors.iter().zip(&self.found) {
            progress.check_interrupt()?;
            let tensor = &source.tensors()[planned.index];
            if !is_of(record, planned, tensor) || !take(writer, next_layer, tensor, record)? {
                break;
            }
            if let Some(layer) = &record.layer {
                layers[next_layer] = layer.clone();
                next_layer += 1;
            }
            progress.restored(tensor.weights() as u64);
            restored.push(record.tensor.clone());
        }
        writer.cut()?;
        self.journal.forget_after(restored.len())?;
        self.found.clear();
        Ok(restored)
    }

    /// Records a tensor that was just written. Errors: `Io`.
    pub fn add(&mut self, writer: &mut FileWriter, record: &Record) -> Result<()> {
        // In this order: everything in the journal is on disk.
        writer.sync()?;
        self.journal.add(record)
    }

    /// Removes the journal once the output is in its place. Errors: `Io`.
    pub fn finish(self) -> Result<()> {
        self.journal.remove()
    }
}

/// Returns whether a record belongs to this tensor, in its planned encoding.
fn is_of(record: &Record, planned: &PlannedTensor, tensor: &TensorInfo) -> bool {
    let same_layer = match (&record.layer, &planned.layer) {
        (None, None) => record.arrays.len() == 1 && record.arrays[0].shape == tensor.shape,
        (Some(found), Some(planned)) => {
            let mut found = found.clone();
            found.error = planned.error;
            found == *planned
        }
        _ => false,
    };
    same_layer && record.tensor.name == tensor.name && record.tensor.shape == tensor.shape
}

/// Reuses one tensor. Returns `false` if the file does not match the record.
fn take(
    writer: &mut FileWriter,
    next_layer: usize,
    tensor: &TensorInfo,
    record: &Record,
) -> Result<bool> {
    if let Some(layer) = &record.layer {
        return writer.restore_layer(next_layer, layer, &record.arrays);
    }
    writer.restore_tensor(&tensor.name, tensor.raw_dtype().into(), &record.arrays[0])
}

/// Returns the fingerprint of a run: everything that the bytes of the file
/// of `plan` depend on.
///
/// The weights are represented by the name, length and modification time of each file, and the
/// first row of each tensor. A change of other weights that leaves all of these unchanged goes
/// unnoticed, and so does another build of the same version.
///
/// Errors: those of the source; `Io`.
pub(crate) fn fingerprint(
    source: &dyn Source,
    options: &CompressOptions,
    plan: &Plan,
    recipe: &str,
) -> Result<Fingerprint> {
    let files = source.files();
    let texts = [
        files.config_json.as_ref().map(String::as_bytes),
        files.generation_config_json.as_deref().map(str::as_bytes),
        files.tokenizer_json.as_deref(),
        files.tokenizer_config_json.as_deref().map(str::as_bytes),
        files.special_tokens_map_json.as_deref().map(str::as_bytes),
        files.chat_template.as_deref().map(str::as_bytes),
    ];
    let texts = texts.map(|text| text.map_or("none".to_owned(), checksum_of));
    let layers: Vec<_> = plan.tensors.iter().map(|t| &t.layer).collect();
    let json = |e: serde_json::Error| Error::new(ErrorKind::Argument, e.to_string());
    let layers = serde_json::to_string(&layers).map_err(json)?;
    let mut found: Fingerprint = [
        ("version of upg", env!("CARGO_PKG_VERSION").to_owned()),
        ("name of the model", source.model_name().to_owned()),
        ("options", recipe.to_owned()),
        (
            "list of tensors and encodings",
            checksum_of(layers.as_bytes()),
        ),
        ("source", of_files(source)?),
        (
            "config or tokenizer",
            checksum_of(texts.join(" ").as_bytes()),
        ),
        ("source in its first rows", of_first_rows(source)?),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    if let Some(calibration) = &options.calibration {
        // Before the options, which name it by its checksum.
        found.insert(0, ("calibration text".into(), calibration.checksum()));
        found.push(("processor".into(), processor()?));
    }
    Ok(found)
}

/// Returns names, lengths and modification times in nanoseconds.
fn of_files(source: &dyn Source) -> Result<String> {
    let mut files = Vec::new();
    for path in source.own_files() {
        let io = |e| Error::io("cannot open", &path, e);
        // Optional files of a source may be missing.
        let Ok(metadata) = std::fs::metadata(&path) else {
            continue;
        };
        let changed = metadata.modified().map_err(io)?;
        let changed = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
        files.push(format!(
            "{} of {} bytes, changed at {} s",
            path.file_name().unwrap_or_default().display(),
            metadata.len(),
            changed.as_nanos() as f64 / 1e9,
        ));
    }
    files.sort();
    Ok(files.join(", "))
}

fn of_first_rows(source: &dyn Source) -> Result<String> {
    let mut sums = String::new();
    for (index, tensor) in source.tensors().iter().enumerate() {
        let row = source.read_rows_f32(index, 0..tensor.rows().min(1))?;
        sums += &format!("{} {} {:?} ", tensor.name, tensor.dtype, tensor.shape);
        sums += &checksum_of(bytemuck::cast_slice(&row));
    }
    Ok(checksum_of(sums.as_bytes()))
}

/// Returns the processor and the kernels, which determine the order of sums in a calibration.
fn processor() -> Result<String> {
    let cpus = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(cpus).ok();
    let first = system.as_ref().and_then(|system| system.cpus().first());
    let brand = first.map_or("unknown", |cpu| cpu.brand());
    let kernels = Cpu::shared()?.kernels().name();
    Ok(format!("{} {brand}, {kernels}", std::env::consts::ARCH))
}
