//! Batches of tensors that are encoded in parallel.
//!
//! A small matrix has too few parts to keep all threads busy.
//! With many threads the memory limits a batch.
#![forbid(unsafe_code)]

use crate::encode::panel::sequential_rows;
use crate::plan::options::CompressOptions;
use crate::plan::sizes::tensor_bytes;
use crate::plan::tensors::PlannedTensor;
use crate::sensitivity::curvature::curvature_bytes;
use crate::source::Source;
use std::cmp::Reverse;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use upg_kernel::Result;

/// Parts per thread of a batch of several matrices.
///
/// Parts differ in duration; with a few per thread all threads end at about the same time.
const PARTS: usize = 4;

/// Maximum memory of matrices in parallel. A matrix that takes more is alone.
const MOST_BYTES: u64 = 1 << 29;

/// Tensors of a plan that are encoded together, in order.
pub(crate) struct TensorBatch<'a> {
    pub tensors: &'a [PlannedTensor],
    /// Memory in bytes while they are encoded and written.
    pub bytes: u64,
}

impl<'a> TensorBatch<'a> {
    /// Divides `tensors` into batches. Uncompressed tensors join the matrices before them.
    ///
    /// Errors: those of the description of a layer.
    pub(crate) fn all(
        source: &dyn Source,
        options: &CompressOptions,
        tensors: &'a [PlannedTensor],
    ) -> Result<Vec<Self>> {
        let enough = match rayon::current_num_threads() {
            1 => 1,
            threads => PARTS * threads,
        };
        let (mut batches, mut first, mut size) = (Vec::new(), 0, BatchSize::default());
        for (n, planned) in tensors.iter().enumerate() {
            let with_this = size.with(source, options, planned)?;
            let is_full = size.parts >= enough || with_this.beside > MOST_BYTES;
            if planned.layer.is_some() && size.matrices > 0 && is_full {
                batches.push(size.of(&tensors[first..n]));
                (first, size) = (n, BatchSize::default().with(source, options, planned)?);
            } else {
                size = with_this;
            }
        }
        if first < tensors.len() {
            batches.push(size.of(&tensors[first..]));
        }
        Ok(batches)
    }
}

/// Size of a batch.
#[derive(Clone, Copy, Default)]
struct BatchSize {
    matrices: usize,
    /// Number of parts that threads can encode in parallel.
    parts: usize,
    /// Bytes of the last matrix if it is alone.
    alone: u64,
    /// Bytes of all matrices in parallel.
    beside: u64,
    /// Bytes of the largest uncompressed tensor: they are written one after the other.
    uncompressed: u64,
}

impl BatchSize {
    fn with(
        mut self,
        source: &dyn Source,
        options: &CompressOptions,
        planned: &PlannedTensor,
    ) -> Result<Self> {
        let bytes = tensor_bytes(source, options, planned)?;
        let Some(layer) = &planned.layer else {
            self.uncompressed = self.uncompressed.max(bytes);
            return Ok(self);
        };
        let is_calibrated = options.calibrates(layer);
        self.matrices += 1;
        self.parts += layer.rows.div_ceil(sequential_rows(is_calibrated));
        self.alone = bytes;
        self.beside += bytes;
        if is_calibrated {
            // The calibration no longer holds those of other layers.
            self.beside += curvature_bytes(layer.rows as u64, layer.cols as u64);
        }
        Ok(self)
    }

    fn of(self, tensors: &[PlannedTensor]) -> TensorBatch<'_> {
        let of_matrices = match self.matrices {
            1 => self.alone,
            _ => self.beside,
        };
        TensorBatch {
            tensors,
            bytes: of_matrices + self.uncompressed,
        }
    }
}

/// Calls `f` with every item in parallel, the largest `size` first, until a call fails.
///
/// Returns the results of the leading items up to the first one without a result,
/// and the first error.
pub(crate) fn in_parallel<T: Send, R: Send>(
    items: Vec<T>,
    size: impl Fn(&T) -> usize,
    f: impl Fn(T) -> Result<R> + Sync,
) -> (Vec<R>, Result<()>) {
    let mut results: Vec<Option<Result<R>>> = items.iter().map(|_| None).collect();
    let mut queue: Vec<_> = items.into_iter().zip(&mut results).collect();
    queue.sort_by_key(|(item, _)| Reverse(size(item)));
    let queue = Mutex::new(queue.into_iter());
    let next = || queue.lock().unwrap_or_else(|e| e.into_inner()).next();
    let failed = AtomicBool::new(false);
    // One per thread, not one per item: a waiting thread takes up other work, and each time its
    // stack grows.
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let Some((item, result)) = next() else { break };
            let found = f(item);
            failed.fetch_or(found.is_err(), Ordering::Relaxed);
            *result = Some(found);
        }
    };
    rayon::scope_fifo(|scope| {
        for _ in 0..rayon::current_num_threads() {
            scope.spawn_fifo(|_| work());
        }
    });
    drop(queue);
    let mut done = Vec::new();
    let mut results = results.into_iter();
    let error = loop {
        match results.next() {
            Some(Some(Ok(result))) => done.push(result),
            Some(Some(Err(e))) => break Some(e),
            // Not started, because another one failed.
            Some(None) => break results.find_map(|result| result?.err()),
            None => break None,
        }
    };
    (done, error.map_or(Ok(()), Err))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::options::Choice;
    use crate::plan::tensors::Plan;
    use crate::sensitivity::calibration::Calibration;
    use crate::source::synthetic::SyntheticSource;
    use rayon::ThreadPoolBuilder;
    use rayon::prelude::*;
    use upg_kernel::format::Encoding;
    use upg_kernel::{Error, ErrorKind};

    /// Attention of 512 rows and columns, and of 128 rows; up and down projections of 2,048.
    const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "vocab_size": 256, "hidden_act": "silu",
        "tie_word_embeddings": true}"#;

    fn on_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(f)
    }

    /// Returns the number of matrices in each batch and its bytes, for a number of threads.
    fn batches(config: &str, threads: usize) -> Vec<(usize, u64)> {
        let source = SyntheticSource::new(config, 1).unwrap();
        let mut options = CompressOptions::new(Choice::Encode(Encoding::T3));
        options.calibration = Calibration::new(vec![1; 64], 64).ok();
        let plan = Plan::new(&source, &options).unwrap();
        let all = on_threads(threads, || {
            TensorBatch::all(&source, &options, &plan.tensors).map(|batches| {
                let covered: usize = batches.iter().map(|b| b.tensors.len()).sum();
                assert_eq!(covered, plan.tensors.len());
                let matrices =
                    |b: &TensorBatch<'_>| b.tensors.iter().filter(|t| t.layer.is_some()).count();
                batches.iter().map(|b| (matrices(b), b.bytes)).collect()
            })
        });
        all.unwrap()
    }

    #[test]
    fn small_matrices_go_together_and_large_ones_alone() {
        let counts = |batches: &[(usize, u64)]| batches.iter().map(|b| b.0).collect::<Vec<_>>();
        // An embedding and three layers of seven matrices.
        assert_eq!(counts(&batches(CONFIG, 1)), [1; 22]);
        let two = batches(CONFIG, 2);
        assert!(
            two.len() > 2 && counts(&two).iter().any(|&n| n > 4),
            "{two:?}"
        );
        assert!(two.iter().all(|b| b.1 <= MOST_BYTES), "{two:?}");
        let many = batches(CONFIG, 64);
        assert!(counts(&many).iter().any(|&n| n > 4), "{many:?}");
        assert!(
            many.iter().all(|b| b.1 <= MOST_BYTES || b.0 == 1),
            "{many:?}"
        );
        // Decompositions of 16,384 columns take gigabytes.
        let wide = CONFIG.replace("2048", "16384");
        let wide = batches(&wide, 64);
        assert!(
            wide.iter().filter(|b| b.1 > MOST_BYTES).all(|b| b.0 == 1),
            "{wide:?}"
        );
        assert_eq!(wide.iter().filter(|b| b.1 > 4 * MOST_BYTES).count(), 3);
    }

    #[test]
    fn results_are_in_the_order_of_the_items() {
        let items: Vec<usize> = (0..100).map(|i| i * 37 % 100).collect();
        let of = |items: &[usize], threads| {
            let fallible = |i| match i {
                74 | 11 => Err(Error::new(ErrorKind::Invalid, format!("{i}"))),
                _ => Ok(i * i),
            };
            on_threads(threads, || in_parallel(items.to_vec(), |&i| i, fallible))
        };
        for threads in [1, 3] {
            let good: Vec<usize> = items
                .iter()
                .copied()
                .filter(|i| ![74, 11].contains(i))
                .collect();
            let (squares, outcome) = of(&good, threads);
            outcome.unwrap();
            assert_eq!(squares, good.iter().map(|i| i * i).collect::<Vec<_>>());
            // The largest failing item is met first. The item before it in order was not started,
            // or is done.
            let (done, outcome) = of(&items, threads);
            assert!(done.len() <= items.iter().position(|&i| i == 74).unwrap());
            assert_eq!(outcome.unwrap_err().to_string(), "74");
        }
    }

    /// Threads that wait in one item start others, and their stacks must suffice.
    #[test]
    fn many_items_that_wait_do_not_pile_up() {
        let deep = |_| {
            let part = |i: u64| (0..2000).fold(i, |a, b| a.wrapping_mul(31) ^ b);
            let sum: u64 = (0..64)
                .into_par_iter()
                .map(part)
                .reduce(|| 0, u64::wrapping_add);
            let stack = [sum; 1 << 13];
            Ok(std::hint::black_box(stack)[7])
        };
        let (done, outcome) = on_threads(8, || in_parallel(vec![(); 2000], |()| 1, deep));
        outcome.unwrap();
        assert_eq!(done.len(), 2000);
        assert!(done.iter().all(|sum| *sum == done[0]));
    }
}
