//! Conversion of version 1 arrays to `mdcsr`: indices become gaps, everything else stays.
#![forbid(unsafe_code)]

use super::V1File;
use super::bytes::Files;
use super::catalogue::{CatalogueEntry, Parts, Scale};
use super::numbers::Integers;
use super::rows::RowBuilder;
use crate::atomic_file::AtomicFile;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Encoding, FileWriter, LayerInfo, TOKENIZER, check_kept_name, header_capacity, insert_figures,
    reserve_figures, rules,
};
use crate::inference::model_dir::ModelFiles;
use crate::matrix::Matrix;
use crate::prime_lut::PRIME_COUNT;
use crate::sparse::MdCSRMatrix;
use bytemuck::cast_slice;
use safetensors::Dtype;
use serde_json::json;
use std::fs::File;
use std::path::Path;

/// Maximum entries, including those that bridge gaps: per byte read, plus a constant.
///
/// Far columns and arrays shared by tensors must not turn kilobytes into gigabytes.
const MOST_ENTRIES: (u64, u64) = (16, 1 << 25);

/// Statistics of a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Converted {
    /// Number of matrices, in `mdcsr`.
    pub matrices: usize,
    /// Number of vectors, in F32.
    pub vectors: usize,
    /// Stored entries without those that bridge gaps: nonzero weights.
    pub entries: u64,
    /// Number of weights, including zeros.
    pub weights: u64,
    /// Bytes of the new file.
    pub file_bytes: u64,
}

impl V1File {
    /// Writes the weights as a version 2.0 file to `out`, which is replaced atomically.
    ///
    /// `texts` become the config, tokenizer and chat template of the model. `proceed` is called
    /// before each tensor with its name and its number of weights; its error ends the work.
    ///
    /// Memory: about 5 bytes per entry of the largest tensor. The output depends only on the file
    /// and `texts`. Errors: `Missing` if the file lacks the weights of all or some tensors;
    /// `Shape`, `Invalid` or `Unsupported` for arrays that do not match each other or that version
    /// 2 cannot hold; `TooLarge` for sizes beyond its limits, if more entries have to bridge gaps
    /// than 16 per byte read plus 33 million, or if tensors that share arrays have more rows and
    /// entries together; `Malformed`, `Io`; `Argument` if `out` is an input file.
    pub fn convert(
        &self,
        out: impl AsRef<Path>,
        texts: &ModelFiles,
        proceed: &mut dyn FnMut(&str, u64) -> Result<()>,
    ) -> Result<Converted> {
        let mut convert = || {
            self.check_weights()?;
            let out = AtomicFile::create_from(out.as_ref(), self.files.paths())?;
            let (converted, file) = self.write(out, texts, proceed)?;
            file.commit()?;
            Ok(converted)
        };
        convert().map_err(|e: Error| e.at(&self.path))
    }

    /// Runs [`V1File::convert`] into an unnamed temporary file.
    pub(super) fn convert_to_temporary(&self, texts: &ModelFiles) -> Result<File> {
        let convert = || {
            self.check_weights()?;
            let out = AtomicFile::temporary(&self.path)?;
            let (_, file) = self.write(out, texts, &mut |_, _| Ok(()))?;
            file.into_file()
        };
        convert().map_err(|e: Error| e.at(&self.path))
    }

    /// Returns the tensor number `index` of the catalogue as a matrix; a vector is one row.
    ///
    /// Memory and errors: as [`V1File::convert`]. Panics if there is no such number.
    pub fn matrix(&self, index: usize) -> Result<MdCSRMatrix> {
        let entry = &self.catalogue.tensors[index];
        let read = || {
            let parts = entry.parts.as_ref().ok_or_else(no_weights)?;
            let (rows, cols) = sizes(entry)?;
            read_rows(&self.files, parts, rows, cols, self.most_entries())
        };
        read().map_err(|e: Error| e.tensor(&entry.name).at(&self.path))
    }

    /// Returns the maximum entries that the whole file may produce.
    fn most_entries(&self) -> u64 {
        MOST_ENTRIES.0 * self.files.bytes() + MOST_ENTRIES.1
    }

    /// Checks that the weights are there.
    ///
    /// Errors (`Missing`): the file is only a list, or lacks the weights of some tensors.
    pub fn check_weights(&self) -> Result<()> {
        let tensors = &self.catalogue.tensors;
        if self.catalogue.is_list_only() {
            let message = match tensors.len() {
                0 => "it lists no tensors".to_owned(),
                n => format!("it lists {n} tensors, but has the weights of none"),
            };
            let hint = format!(
                "make a real file from the model: upg compress {} -o {} --encoding t3",
                self.source_to_show().unwrap_or("MODEL_DIRECTORY"),
                self.name_to_write()
            );
            return Err(Error::new(ErrorKind::Missing, message)
                .at(&self.path)
                .hint(hint));
        }
        match tensors.iter().find(|t| !t.has_weights()) {
            None => Ok(()),
            Some(entry) => Err(no_weights().tensor(&entry.name).at(&self.path)),
        }
    }

    /// Checks the sizes.
    ///
    /// Errors (`Shape`, `TooLarge`): a tensor is neither a matrix nor a vector, or too large.
    pub fn check_sizes(&self) -> Result<()> {
        let mut tensors = self.catalogue.tensors.iter();
        tensors.try_for_each(|entry| {
            let checked = sizes(entry).map(|_| ());
            checked.map_err(|e| e.tensor(&entry.name).at(&self.path))
        })
    }

    /// Returns the source model if its name can be displayed in a command line unquoted.
    ///
    /// Nothing in a file may lure anyone into running more.
    fn source_to_show(&self) -> Option<&str> {
        let source = self.catalogue.source.as_deref()?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '/' | '-');
        let begins_well = source.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/');
        (begins_well && source.len() <= 200 && source.chars().all(is_plain)).then_some(source)
    }

    fn name_to_write(&self) -> String {
        let last = self
            .source_to_show()
            .and_then(|s| s.rsplit('/').find(|p| !p.is_empty()));
        format!("{}.safetensors", last.unwrap_or("model"))
    }

    /// Checks tensors that share arrays.
    ///
    /// Errors (`TooLarge`): together they have more rows and entries than a file of this size may
    /// produce. Entries of value 0 count too: they are read, though left out.
    fn check_shared(&self) -> Result<()> {
        let mut left = self.most_entries();
        for entry in &self.catalogue.tensors {
            let rest = entry.parts.as_ref().map_or(Some(left), |parts| {
                left.checked_sub(parts.values.len())?
                    .checked_sub(parts.pointers.len())
            });
            left = rest.ok_or_else(|| {
                let most = self.most_entries();
                let message =
                    format!("more than {most} rows and entries together, for a file of this size");
                Error::new(ErrorKind::TooLarge, message).tensor(&entry.name)
            })?;
        }
        Ok(())
    }

    fn write(
        &self,
        out: AtomicFile,
        texts: &ModelFiles,
        proceed: &mut dyn FnMut(&str, u64) -> Result<()>,
    ) -> Result<(Converted, AtomicFile)> {
        let tensors = &self.catalogue.tensors;
        self.check_shared()?;
        let mut layers = Vec::new();
        for entry in tensors {
            layers.extend(described(entry).map_err(|e| e.tensor(&entry.name))?);
        }
        let mut metadata = texts.metadata();
        let model = self.catalogue.model_type.as_deref().unwrap_or("unknown");
        metadata.insert("model".into(), model.to_owned());
        let recipe = json!({
            "converted_from": "UPG 1",
            "source": self.catalogue.source,
            "compression_method": self.catalogue.compression_method,
        });
        metadata.insert("recipe".into(), recipe.to_string());
        reserve_figures(&mut metadata);
        let kept = tensors.iter().filter(|t| t.shape.len() == 1);
        let other = kept.map(|t| t.name.as_str()).chain([TOKENIZER]);
        let capacity = header_capacity(&layers, other, &metadata)?;
        let mut writer = FileWriter::new(out, capacity)?;

        let mut done = Converted {
            matrices: 0,
            vectors: 0,
            entries: 0,
            weights: 0,
            file_bytes: 0,
        };
        let mut left = self.most_entries();
        for (index, entry) in tensors.iter().enumerate() {
            let weights = entry.shape.iter().product();
            proceed(&entry.name, weights)?;
            let matrix = self.matrix(index)?;
            left = left
                .checked_sub(matrix.nnz() as u64)
                .ok_or_else(|| too_many(self.most_entries()).tensor(&entry.name))?;
            done.weights += weights;
            done.entries += matrix.arrays().values.iter().filter(|v| **v != 0).count() as u64;
            if entry.shape.len() == 1 {
                let values = matrix.to_dense();
                let shape = [values.len()];
                writer.tensor(&entry.name, Dtype::F32, &shape, cast_slice(&values))?;
                done.vectors += 1;
            } else {
                let layer = &layers[done.matrices];
                writer.layer(done.matrices, layer, &Matrix::MdCsr(matrix))?;
                done.matrices += 1;
            }
        }
        if let Some(json) = texts.tokenizer_json.as_deref() {
            writer.tensor(TOKENIZER, Dtype::U8, &[json.len()], json)?;
        }
        done.file_bytes = writer.file_len();
        insert_figures(&mut metadata, done.file_bytes, done.weights);
        let file = writer.complete(metadata, &layers)?;
        Ok((done, file))
    }
}

/// Describes a matrix of the new file; `None` for a vector. Errors: invalid sizes and names.
fn described(entry: &CatalogueEntry) -> Result<Option<LayerInfo>> {
    let (rows, cols) = sizes(entry)?;
    if entry.shape.len() == 1 {
        return check_kept_name(&entry.name).map(|()| None);
    }
    let layer = LayerInfo::new(&entry.name, rows, cols, Encoding::MdCsr);
    layer.check().map(|()| Some(layer))
}

fn no_weights() -> Error {
    Error::new(
        ErrorKind::Missing,
        "its weights are not in the file, though it is listed",
    )
}

fn shape(message: String) -> Error {
    Error::new(ErrorKind::Shape, message)
}

/// Returns `[rows, cols]`; a vector is one row.
///
/// Errors (`Shape`, `TooLarge`): other dimensions, or sizes that no file may have.
fn sizes(entry: &CatalogueEntry) -> Result<(usize, usize)> {
    let (rows, cols) = match *entry.shape.as_slice() {
        [cols] => (1, cols),
        [rows, cols] => (rows, cols),
        _ => {
            let message = format!(
                "the shape {:?}, expected one or two dimensions",
                entry.shape
            );
            return Err(shape(message));
        }
    };
    let fits = (1..=rules::MOST_ROWS as u64).contains(&rows)
        && (1..=rules::MOST_COLS as u64).contains(&cols)
        && rows * cols <= rules::LARGEST_MATRIX as u64;
    match fits {
        true => Ok((rows as usize, cols as usize)),
        false => {
            let message = format!("the shape {:?} is outside the limits", entry.shape);
            Err(Error::new(ErrorKind::TooLarge, message).rule(rules::LAYERS))
        }
    }
}

fn read_rows(
    files: &Files,
    parts: &Parts,
    rows: usize,
    cols: usize,
    most: u64,
) -> Result<MdCSRMatrix> {
    let nnz = parts.values.len();
    for (name, part) in [
        ("indices", &parts.indices),
        ("prime_indices", &parts.primes),
    ] {
        if part.len() != nnz {
            let message = format!("{} {name} for {nnz} values", part.len());
            return Err(shape(message));
        }
    }
    if parts.pointers.len() != rows as u64 + 1 {
        let message = format!("{} row pointers for {rows} rows", parts.pointers.len());
        return Err(shape(message));
    }
    let scales = scales(files, &parts.scale, rows)?;
    let mut builder = RowBuilder::new(cols);
    let mut pointers = parts.pointers.integers(files);
    let mut row = Row {
        values: parts.values.integers(files),
        indices: parts.indices.integers(files),
        primes: parts.primes.integers(files),
        cols,
        entries: [const { Vec::new() }; 3],
    };
    let mut pointer = Vec::new();
    pointers.take(1, &mut pointer)?;
    let mut start = pointer[0];
    if start != 0 {
        return Err(invalid(format!("the row pointers start with {start}")));
    }
    for (number, &scale) in scales.iter().enumerate() {
        pointers.take(1, &mut pointer)?;
        let end = pointer[0];
        // Columns are distinct, so no row has more.
        if end < start || end - start > cols as i64 || end as u64 > nnz {
            let message = format!(
                "row {number} has the entries {start} to {end} of {nnz}, in {cols} columns"
            );
            return Err(invalid(message));
        }
        row.read((end - start) as usize, &mut builder)
            .map_err(|e| e.place(format_args!("row {number}")))?;
        builder.end_row(scale)?;
        if builder.entries() as u64 > most {
            return Err(too_many(most));
        }
        start = end;
    }
    if start as u64 != nnz {
        return Err(invalid(format!(
            "the row pointers end with {start}, for {nnz} values"
        )));
    }
    pointers.finish()?;
    row.values.finish()?;
    row.indices.finish()?;
    row.primes.finish()?;
    builder.finish()
}

fn too_many(most: u64) -> Error {
    let message =
        format!("more than {most} entries, with those that bridge gaps, for a file of this size");
    Error::new(ErrorKind::TooLarge, message)
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

fn scales(files: &Files, scale: &Scale, rows: usize) -> Result<Vec<f32>> {
    let scales = match scale {
        Scale::One(scale) => vec![*scale as f32; rows],
        Scale::Many(numbers) => {
            let fits = numbers.len() == 1 || numbers.len() == rows as u64;
            if !fits || !numbers.is_row() {
                return Err(shape(format!("the scales are {numbers}, for {rows} rows")));
            }
            let scales = numbers.floats(files)?;
            match *scales.as_slice() {
                [scale] => vec![scale; rows],
                _ => scales,
            }
        }
    };
    Ok(scales)
}

/// Reader of the entries of one row after the other.
struct Row<'a> {
    values: Integers<'a>,
    indices: Integers<'a>,
    primes: Integers<'a>,
    cols: usize,
    /// Indices, values, primes of this row.
    entries: [Vec<i64>; 3],
}

impl Row<'_> {
    /// Reads the next `n` entries, in column order, into `out`.
    fn read(&mut self, n: usize, out: &mut RowBuilder) -> Result<()> {
        let [indices, values, primes] = &mut self.entries;
        self.indices.take(n, indices)?;
        self.values.take(n, values)?;
        self.primes.take(n, primes)?;
        let outside = |limits: std::ops::RangeInclusive<i64>, numbers: &[i64], name| {
            let bad = numbers.iter().find(|n| !limits.contains(n));
            bad.map_or(Ok(()), |bad| {
                let message = format!(
                    "a {name} of {bad}, expected {} to {}",
                    limits.start(),
                    limits.end()
                );
                Err(invalid(message))
            })
        };
        outside(0..=self.cols as i64 - 1, indices, "column")?;
        outside(i8::MIN.into()..=i8::MAX.into(), values, "value")?;
        outside(0..=PRIME_COUNT as i64 - 1, primes, "prime index")?;
        let mut push = |i: usize| {
            out.push(indices[i] as usize, values[i] as i8, primes[i] as u16);
        };
        if indices.is_sorted_by(|a, b| a < b) {
            (0..n).for_each(push);
            return Ok(());
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_unstable_by_key(|&i| indices[i]);
        if let Some(twice) = order.windows(2).find(|w| indices[w[0]] == indices[w[1]]) {
            let message = format!("two entries in column {}", indices[twice[0]]);
            return Err(invalid(message));
        }
        order.into_iter().for_each(&mut push);
        Ok(())
    }
}
