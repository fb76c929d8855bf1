//! Files of random models, for measurements of size,
//! memory and speed without hours of encoding.
#![forbid(unsafe_code)]

use crate::encode::matrix::{Encoded, encode_matrix, encoder_of};
use crate::job::compress::{MatrixJob, compress_with};
use crate::job::report::CompressReport;
use crate::plan::options::CompressOptions;
use crate::progress::Progress;
use crate::source::Source;
use crate::source::synthetic::SyntheticSource;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::time::Instant;
use upg_kernel::format::LayerInfo;
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::{Error, ErrorKind, Matrix, Result};

/// Compresses a random model by encoding one strip of 64 rows per width and encoding, and
/// repeating it.
///
/// The file has the size, the layout and the speed of a file that [`compress`](crate::compress())
/// writes, but its layers are alike, and their errors are not recorded.
///
/// Memory: about one copy of the largest matrix as stored, or half a gigabyte of smaller ones.
/// Errors: those of `compress`; `Argument` for a resumable run; `Unsupported` for other encodings
/// than `q8`, `q4`, `t2`, `t3` and `t4`.
pub fn compress_random(
    source: &SyntheticSource,
    out: impl AsRef<Path>,
    options: &CompressOptions,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    if options.resume {
        let message = "a random model cannot be resumed";
        return Err(Error::new(ErrorKind::Argument, message));
    }
    let mut strips: HashMap<(usize, usize, String), Matrix> = HashMap::new();
    let mut encode = |MatrixJob { index, layer }: MatrixJob<'_>| {
        let started = Instant::now();
        progress.tensor(&layer.name);
        let mut first = layer.clone();
        first.rows = layer.rows.min(STRIP_ROWS);
        let strip = match strips.entry((first.rows, first.cols, layer.encoding_name().to_owned())) {
            Entry::Occupied(strip) => strip.into_mut(),
            Entry::Vacant(place) => {
                let rows = source.read_rows_f32(index, 0..first.rows)?;
                place.insert(encode_matrix(&rows, &first, options.seed, None, &())?)
            }
        };
        progress.advance(layer.rows as u64 * layer.cols as u64);
        Ok(Encoded {
            matrix: repeated(layer, strip, layer.rows)?,
            output_error: None,
            divergence: None,
            seconds: started.elapsed().as_secs_f64(),
        })
    };
    compress_with(source, out, options, progress, |jobs| {
        let encoded = jobs.into_iter().map(&mut encode);
        Ok((encoded.collect::<Result<_>>()?, Ok(())))
    })
}

/// Repeats `strip`, encoded as `layer` says, as a matrix of `rows` rows.
fn repeated(layer: &LayerInfo, strip: &Matrix, rows: usize) -> Result<Matrix> {
    (encoder_of(layer)?.repeat)(strip, rows)?.ok_or_else(|| {
        let message = "a random model in another encoding than q8, q4, t2, t3 or t4";
        Error::new(ErrorKind::Unsupported, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::options::Choice;
    use upg_kernel::format::{Encoding, UpgFile};
    use upg_kernel::matrix::Levels;
    use upg_kernel::matrix::strips::TILE_COLS;

    /// Rows of every kind: less than a strip (48), not a multiple of it (80, 112, 96), several
    /// strips (256).
    const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 96, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 48,
        "max_position_embeddings": 64, "vocab_size": 256, "hidden_act": "silu",
        "tie_word_embeddings": false}"#;

    fn options(encoding: Encoding) -> CompressOptions {
        let mut options = CompressOptions::new(Choice::Encode(encoding));
        options.embedding = Some(options.encoding);
        options
    }

    #[test]
    fn rows_are_those_of_the_first_strip_over_and_over() {
        let source = SyntheticSource::new(CONFIG, 3).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model");
        for encoding in ["q8", "q4", "t2", "t3", "t4"] {
            let options = options(encoding.parse().unwrap());
            compress_random(&source, &out, &options, &()).unwrap();
            let file = UpgFile::open(&out).unwrap();
            file.verify(&|_| {}).unwrap();
            let head = file
                .matrix(file.layer_id("lm_head.weight").unwrap())
                .unwrap();
            assert_eq!((head.rows(), head.cols()), (256, 96));
            let (weights, strip) = (head.to_dense(), STRIP_ROWS * 96);
            assert!(weights.iter().any(|&w| w != 0.0));
            assert!(
                weights.chunks(strip).all(|s| s == &weights[..strip]),
                "{encoding}"
            );
            upg_kernel::UPGModel::from_file(&out).unwrap();
        }
    }

    /// Rows that pad the last strip are zeros, although the strip before has values there.
    #[test]
    fn rows_that_fill_up_a_strip_are_zeros() {
        let w: Vec<f32> = (1..=64 * 40).map(|i| i as f32).collect();
        for encoding in [Encoding::Q8, Encoding::Q4] {
            let mut layer = LayerInfo::new("w", 64, 40, encoding);
            layer.group = Some(32);
            let strip = encode_matrix(&w, &layer, 0, None, &()).unwrap();
            for rows in [1, 63, 64, 65, 128, 130] {
                let matrix = repeated(&layer, &strip, rows).unwrap();
                let expected: Vec<f32> = (strip.to_dense().iter().cycle().copied())
                    .take(rows * 40)
                    .collect();
                assert_eq!(matrix.to_dense(), expected, "{encoding}, {rows} rows");
                let Matrix::Grouped(m) = &matrix else {
                    panic!("{encoding} has groups");
                };
                let codes: &[u8] = match m.levels() {
                    Levels::Bytes(values) => bytemuck::cast_slice(values),
                    Levels::Nibbles { codes, .. } => codes,
                };
                let used = rows % STRIP_ROWS;
                for (array, width) in [(codes, TILE_COLS), (m.prime_indices(), 1)] {
                    let last = &array[array.len() / rows.div_ceil(64) * (rows / 64)..];
                    for block in last.chunks_exact(STRIP_ROWS * width) {
                        assert!(block[used * width..].iter().all(|&b| b == 0), "{rows} rows");
                    }
                }
            }
        }
    }

    /// A strip that is the whole matrix is encoded as in `compress`.
    #[test]
    fn a_matrix_of_one_strip_is_what_compress_makes_of_it() {
        let source = SyntheticSource::new(CONFIG, 3).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let [random, whole] = ["random", "whole"].map(|name| folder.path().join(name));
        let options = options(Encoding::T3);
        compress_random(&source, &random, &options, &()).unwrap();
        crate::job::compress::compress(&source, &whole, &options, &()).unwrap();
        let [random, whole] = [random, whole].map(|path| UpgFile::open(path).unwrap());
        let first = |file: &UpgFile, name: &str| {
            let id = file.layer_id(name).unwrap();
            file.matrix(id).unwrap().to_dense()
        };
        let name = "model.layers.0.self_attn.k_proj.weight";
        assert_eq!(first(&random, name), first(&whole, name));
        assert_eq!(random.file_len(), whole.file_len());
    }

    #[test]
    fn other_encodings_are_refused_and_leave_nothing() {
        let source = SyntheticSource::new(CONFIG, 3).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model");
        let e = compress_random(&source, &out, &options(Encoding::S4), &()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
