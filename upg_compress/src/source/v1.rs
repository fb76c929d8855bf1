//! Version 1 files: pickles with sparse rows, decoded to f32.
#![forbid(unsafe_code)]

use super::model::{
    RawTensor, SkippedTensor, Source, SourceDtype, TensorInfo, check_rows, sort_key, tensor_at,
};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use upg_kernel::inference::model_dir::{ModelFiles, TEXTS};
use upg_kernel::sparse::MdCSRMatrix;
use upg_kernel::v1::V1File;
use upg_kernel::{Matrix, Result};

/// Version 1 file with its weights.
pub struct V1Source {
    file: V1File,
    files: ModelFiles,
    /// Folder in which the texts were searched.
    texts: Option<PathBuf>,
    buffers: Vec<PathBuf>,
    tensors: Vec<TensorInfo>,
    /// Number of each tensor in the file.
    numbers: Vec<usize>,
    /// Tensor that was read last, because rows are requested in pieces.
    last: Mutex<Option<(usize, Arc<Matrix>)>>,
}

impl V1Source {
    /// Opens a file and reads its catalogue.
    ///
    /// `buffers` are those of [`V1File::open`]. `texts` is the folder with `config.json`, tokenizer
    /// and chat template, which a version 1 file does not have.
    ///
    /// Errors: those of [`V1File::open`], [`V1File::check_weights`] and [`ModelFiles::read`].
    pub fn open(path: &Path, buffers: &[PathBuf], texts: Option<&Path>) -> Result<Self> {
        let file = V1File::open(path, buffers)?;
        file.check_weights()?;
        file.check_sizes()?;
        let listed = &file.catalogue().tensors;
        let mut numbers: Vec<usize> = (0..listed.len()).collect();
        numbers.sort_by_key(|&number| sort_key(&listed[number].name));
        let tensor = |&number: &usize| TensorInfo {
            name: listed[number].name.clone(),
            shape: listed[number].shape.iter().map(|&n| n as usize).collect(),
            dtype: SourceDtype::Quantized("UPG 1"),
        };
        let tensors = numbers.iter().map(tensor).collect();
        Ok(Self {
            files: texts.map(ModelFiles::read).transpose()?.unwrap_or_default(),
            texts: texts.map(Path::to_path_buf),
            buffers: buffers.to_vec(),
            file,
            tensors,
            numbers,
            last: Mutex::new(None),
        })
    }

    fn matrix(&self, index: usize) -> Result<Arc<Matrix>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((read, matrix)) = &*last
            && *read == index
        {
            return Ok(Arc::clone(matrix));
        }
        let read: MdCSRMatrix = self.file.matrix(self.numbers[index])?;
        let (_, matrix) = last.insert((index, Arc::new(Matrix::MdCsr(read))));
        Ok(Arc::clone(matrix))
    }
}

impl Source for V1Source {
    fn model_name(&self) -> &str {
        let named = self.file.catalogue().model_type.as_deref();
        named.unwrap_or("unknown")
    }

    fn files(&self) -> &ModelFiles {
        &self.files
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn skipped(&self) -> &[SkippedTensor] {
        &[]
    }

    fn own_files(&self) -> Vec<PathBuf> {
        let texts = self.texts.iter();
        let texts = texts.flat_map(|folder| TEXTS.map(|name| folder.join(name)));
        let read = [self.file.path().to_path_buf()].into_iter();
        read.chain(self.buffers.clone()).chain(texts).collect()
    }

    fn read_rows_f32(&self, index: usize, rows: Range<usize>) -> Result<Vec<f32>> {
        let tensor = tensor_at(&self.tensors, index)?;
        check_rows(tensor, &rows)?;
        let matrix = self.matrix(index)?;
        // A vector `[n]` has n rows of one value here, and is one row there.
        if tensor.shape.len() == 1 {
            return Ok(matrix.to_dense()[rows].to_vec());
        }
        let mut out = vec![0.0; rows.len() * tensor.cols()];
        matrix.rows_into(rows.start, &mut out)?;
        Ok(out)
    }

    fn read_raw(&self, index: usize) -> Result<RawTensor<'_>> {
        Ok(RawTensor::of_f32(&self.read_f32(index)?))
    }
}
