//! Matrices that are encoded side by side, so that small ones, which have few parts, keep all threads busy too.
#![forbid(unsafe_code)]

use crate::curvature::{PANEL_ROWS, curvature_bytes};
use crate::plan::{CompressOptions, PlannedTensor};
use crate::preflight::tensor_bytes;
use crate::source::Source;
use std::cmp::Reverse;
use upg_kernel::Result;
use upg_kernel::matrix::strips::STRIP_ROWS;

/// Parts for each thread, if there are several: as parts differ in length, threads end at about the same time if there are a
/// few of them.
const PARTS: usize = 8;

/// Memory that matrices may take side by side. One that takes more is by itself.
const MOST_BYTES: u64 = 1 << 29;

/// Tensors of a plan that are done together, in their order.
pub(crate) struct Batch<'a> {
    pub tensors: &'a [PlannedTensor],
    /// Memory that they take on their way into the file.
    pub bytes: u64,
}

impl<'a> Batch<'a> {
    /// Those of `tensors`, one after the other. Tensors that are kept go with the matrices before them.
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
        let (mut batches, mut first, mut size) = (Vec::new(), 0, Size::default());
        for (n, planned) in tensors.iter().enumerate() {
            let with_this = size.with(source, options, planned)?;
            let is_full = size.parts >= enough || with_this.beside > MOST_BYTES;
            if planned.layer.is_some() && size.matrices > 0 && is_full {
                batches.push(size.of(&tensors[first..n]));
                (first, size) = (n, Size::default().with(source, options, planned)?);
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

/// Of a batch.
#[derive(Clone, Copy, Default)]
struct Size {
    matrices: usize,
    /// That threads can do side by side.
    parts: usize,
    /// Bytes of the last matrix, by itself.
    alone: u64,
    /// Of all matrices side by side.
    beside: u64,
    /// Of the largest tensor that is kept: they come one after the other.
    kept: u64,
}

impl Size {
    fn with(
        mut self,
        source: &dyn Source,
        options: &CompressOptions,
        planned: &PlannedTensor,
    ) -> Result<Self> {
        let bytes = tensor_bytes(source, options, planned)?;
        let Some(layer) = &planned.layer else {
            self.kept = self.kept.max(bytes);
            return Ok(self);
        };
        let is_calibrated = options.calibrates(layer);
        self.matrices += 1;
        self.parts += layer.rows.div_ceil(rows_in_turn(is_calibrated));
        self.alone = bytes;
        self.beside += bytes;
        if is_calibrated {
            // Those of other layers are not held by the calibration any more.
            self.beside += curvature_bytes(layer.rows as u64, layer.cols as u64);
        }
        Ok(self)
    }

    fn of(self, tensors: &[PlannedTensor]) -> Batch<'_> {
        let of_matrices = match self.matrices {
            1 => self.alone,
            _ => self.beside,
        };
        Batch {
            tensors,
            bytes: of_matrices + self.kept,
        }
    }
}

/// Rows that are encoded one after the other.
pub(crate) fn rows_in_turn(is_calibrated: bool) -> usize {
    match is_calibrated {
        true => PANEL_ROWS,
        false => STRIP_ROWS,
    }
}

/// `f` of every item, side by side, those of the largest `size` first; the results are in the order of the items.
///
/// Errors: the first one of them.
pub(crate) fn side_by_side<T: Send, R: Send>(
    items: Vec<T>,
    size: impl Fn(&T) -> usize,
    f: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut results: Vec<Option<Result<R>>> = items.iter().map(|_| None).collect();
    let mut queue: Vec<_> = items.into_iter().zip(&mut results).collect();
    queue.sort_by_key(|(item, _)| Reverse(size(item)));
    let f = &f;
    rayon::scope_fifo(|scope| {
        for (item, result) in queue {
            scope.spawn_fifo(move |_| *result = Some(f(item)));
        }
    });
    let results = results.into_iter();
    results
        .map(|result| result.expect("the scope ends when all of it is done"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::Calibration;
    use crate::plan::{Choice, Plan};
    use crate::source::synthetic::SyntheticSource;
    use rayon::ThreadPoolBuilder;
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

    /// For a number of threads, the numbers of matrices in each batch, and its bytes.
    fn batches(config: &str, threads: usize) -> Vec<(usize, u64)> {
        let source = SyntheticSource::new(config, 1).unwrap();
        let mut options = CompressOptions::new(Choice::Encode(Encoding::T3));
        options.calibration = Calibration::new(vec![1; 64], 64).ok();
        let plan = Plan::new(&source, &options).unwrap();
        let all = on_threads(threads, || {
            Batch::all(&source, &options, &plan.tensors).map(|batches| {
                let covered: usize = batches.iter().map(|b| b.tensors.len()).sum();
                assert_eq!(covered, plan.tensors.len());
                let matrices =
                    |b: &Batch<'_>| b.tensors.iter().filter(|t| t.layer.is_some()).count();
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
        let squares = side_by_side(items.clone(), |&i| i, |i| Ok(i * i)).unwrap();
        assert!(
            items
                .iter()
                .zip(&squares)
                .all(|(i, square)| i * i == *square)
        );
        let failed = side_by_side(
            items,
            |&i| i,
            |i| match i {
                74 | 11 => Err(Error::new(ErrorKind::Invalid, i.to_string())),
                _ => Ok(i),
            },
        );
        // 74 = 2 * 37 comes before 11 = 3 * 37 - 100.
        assert_eq!(failed.unwrap_err().to_string(), "74");
    }
}
