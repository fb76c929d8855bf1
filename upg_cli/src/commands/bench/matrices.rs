//! Matrix-vector products and decompression of the matrices of a file.
#![forbid(unsafe_code)]

use super::figure::{Figure, goes_on, repeat, seconds};
use super::machine::Memory;
use half::bf16;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;
use upg_kernel::format::UpgFile;
use upg_kernel::{Error, ErrorKind, Matrix, Result, UPGDecompressor};

/// All matrices of a file, in file order.
pub struct Stored {
    matrices: Vec<One>,
    kinds: Vec<Kind>,
}

struct One {
    /// Layer index; `None` if not compressed.
    layer: Option<usize>,
    matrix: Matrix,
    bytes: u64,
    /// Index into the list of kinds.
    kind: usize,
}

/// Shape and encoding that several matrices share.
#[derive(Clone, PartialEq)]
pub struct Kind {
    pub rows: usize,
    pub cols: usize,
    /// Encoding, or the data type if not compressed.
    pub encoding: String,
}

/// Matrix-vector products of the matrices of one kind.
pub struct Product {
    pub kind: Kind,
    /// Number of matrices, and their total bytes.
    pub count: usize,
    pub bytes: u64,
    /// Seconds per matrix, and GB of stored data per second.
    pub seconds: Figure,
    pub gbps: Figure,
}

/// Products of all kinds, and the memory bandwidth in GB/s,
/// measured between them on the same threads.
pub struct Products {
    pub of_kinds: Vec<Product>,
    pub read: Figure,
}

/// First layer of a kind, decompressed to BF16.
pub struct Decompressed {
    pub kind: Kind,
    pub layer: String,
    /// Bytes written per run.
    pub bytes: u64,
    pub seconds: Figure,
    pub gbps: Figure,
}

impl Stored {
    /// Lists the matrices of `file`. Errors: those of [`UpgFile::matrix`].
    pub fn of(file: &UpgFile) -> Result<Self> {
        let mut stored = Self {
            matrices: Vec::new(),
            kinds: Vec::new(),
        };
        for (id, layer) in file.layers().iter().enumerate() {
            let matrix = file.matrix(id)?.clone();
            stored.push(
                Some(id),
                matrix,
                file.layer_bytes(id),
                layer.encoding_name(),
            );
        }
        let is_matrix = |shape: &[usize]| shape.len() == 2 && !shape.contains(&0);
        for (name, dtype, _) in file.kept().filter(|(.., shape)| is_matrix(shape)) {
            let matrix = Matrix::Dense(file.kept_matrix(name)?);
            let bytes = file.bytes(name).map_or(0, |b| b.len() as u64);
            stored.push(None, matrix, bytes, &dtype.to_string());
        }
        Ok(stored)
    }

    fn push(&mut self, layer: Option<usize>, matrix: Matrix, bytes: u64, encoding: &str) {
        let kind = Kind {
            rows: matrix.rows(),
            cols: matrix.cols(),
            encoding: encoding.to_owned(),
        };
        let known = self.kinds.iter().position(|known| *known == kind);
        let kind = known.unwrap_or_else(|| {
            self.kinds.push(kind);
            self.kinds.len() - 1
        });
        self.matrices.push(One {
            layer,
            matrix,
            bytes,
            kind,
        });
    }

    /// Returns the total bytes of all matrices.
    pub fn bytes(&self) -> u64 {
        self.matrices.iter().map(|one| one.bytes).sum()
    }

    fn of_kind(&self, kind: usize) -> impl Iterator<Item = &One> {
        self.matrices.iter().filter(move |one| one.kind == kind)
    }

    /// Times every matrix times a vector, and a pass over `memory`, in turn.
    ///
    /// If one matrix were multiplied repeatedly, it would come from a cache.
    pub fn products(&self, memory: &Memory, repetitions: NonZeroUsize) -> Result<Products> {
        let longest = |of: fn(&Kind) -> usize| self.kinds.iter().map(of).max().unwrap_or(0);
        let x: Vec<f32> = (0..longest(|k| k.cols))
            .map(|i| (i as f32 * 0.37).sin())
            .collect();
        let mut y = vec![0.0; longest(|k| k.rows)];
        let mut sweep = || -> Result<Vec<f64>> {
            let mut took = vec![0.0; self.kinds.len()];
            for one in &self.matrices {
                let (x, y) = (&x[..one.matrix.cols()], &mut y[..one.matrix.rows()]);
                took[one.kind] += seconds(|| one.matrix.spmm_into(black_box(x), 1, y))?;
                black_box(&y);
            }
            Ok(took)
        };
        sweep()?;
        memory.read()?;
        let (mut sweeps, mut reads) = (Vec::new(), Vec::new());
        let started = Instant::now();
        while goes_on(sweeps.len(), repetitions, started.elapsed()) {
            sweeps.push(sweep()?);
            reads.push(memory.read()?);
        }
        let product = |(index, kind): (usize, &Kind)| {
            let count = self.of_kind(index).count();
            let bytes = self.of_kind(index).map(|one| one.bytes).sum::<u64>();
            let of_one = |sweep: &Vec<f64>| sweep[index] / count as f64;
            let seconds = Figure::of(sweeps.iter().map(of_one).collect());
            Product {
                kind: kind.clone(),
                count,
                bytes,
                seconds,
                gbps: seconds.rate(bytes as f64 / count as f64 / 1e9),
            }
        };
        Ok(Products {
            of_kinds: self.kinds.iter().enumerate().map(product).collect(),
            read: Figure::of(reads).rate(memory.bytes() as f64 / 1e9),
        })
    }

    /// Times the decompression of one compressed layer of each kind to BF16,
    /// into memory already written.
    ///
    /// Errors: `TooLarge` if there is no memory for the largest, and those of
    /// [`UPGDecompressor::decompress_layer_into`].
    pub fn decompressed(
        &self,
        file: &Arc<UpgFile>,
        repetitions: NonZeroUsize,
    ) -> Result<Vec<Decompressed>> {
        let firsts = (0..self.kinds.len()).filter_map(|kind| self.of_kind(kind).next());
        let firsts: Vec<(&Kind, usize)> = firsts
            .filter_map(|one| Some((&self.kinds[one.kind], one.layer?)))
            .collect();
        let largest = firsts.iter().map(|(kind, _)| kind.rows * kind.cols).max();
        let largest = largest.unwrap_or(0);
        let mut out: Vec<bf16> = Vec::new();
        out.try_reserve_exact(largest).map_err(|e| {
            let message = format!("no memory for {largest} decompressed weights: {e}");
            Error::new(ErrorKind::TooLarge, message)
        })?;
        out.resize(largest, bf16::ZERO);
        let decompressor = UPGDecompressor::new(Arc::clone(file));
        let one = |(kind, id): (&Kind, usize)| {
            let out = &mut out[..kind.rows * kind.cols];
            let bytes = size_of_val(out) as u64;
            let seconds = repeat(repetitions, || {
                decompressor.decompress_layer_into(id, &mut *out)
            })?;
            Ok(Decompressed {
                kind: kind.clone(),
                layer: file.layers()[id].name.clone(),
                bytes,
                seconds,
                gbps: seconds.rate(bytes as f64 / 1e9),
            })
        };
        firsts.into_iter().map(one).collect()
    }
}
