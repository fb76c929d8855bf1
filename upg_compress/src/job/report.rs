//! Report of a compression: errors, sizes and times.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upg_kernel::Matrix;
use upg_kernel::format::LayerInfo;
use upg_kernel::inference::LayerInput;
use upg_kernel::support::peak_memory;

/// Tensor of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TensorReport {
    /// Hugging Face name of the tensor.
    pub name: String,
    /// Encoding: `keep`, or its name.
    pub encoding: String,
    /// Shape: `[rows, cols]` of a matrix, `[n]` of a vector.
    pub shape: Vec<usize>,
    /// Bytes of its arrays.
    pub bytes: u64,
    /// Relative error `|Q - W| / |W|`, to six digits; `None` if the tensor is uncompressed.
    pub weight_error: Option<f64>,
    /// Relative error of the outputs, `|X (Q - W)^T| / |X W^T|`,
    /// over the inputs `X` of the calibration.
    ///
    /// Each input is weighted by the size of the gradients of its outputs. `None` if it was not
    /// requested or the matrix has no such inputs.
    pub output_error: Option<f64>,
    /// Kullback-Leibler divergence that the errors of this matrix alone cause, in nats per
    /// position, to six digits.
    ///
    /// Predicted by its [`Curvature`](crate::sensitivity::Curvature); `None` as for `output_error`.
    pub divergence: Option<f64>,
    /// Number of zero weights of a matrix that is stored as `s8` or `s4`.
    pub zeros: Option<u64>,
    /// Seconds of reading, encoding and measuring the weight error,
    /// in parallel with other tensors.
    ///
    /// Excludes the run over the calibration text.
    pub seconds: f64,
}

impl TensorReport {
    pub(crate) fn weights(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    fn is_uncompressed(&self) -> bool {
        self.encoding == "keep"
    }

    /// Returns whether its encoding uses a calibration.
    fn may_be_calibrated(&self) -> bool {
        !self.is_uncompressed() && self.encoding != "mdcsr" && LayerInput::of(&self.name).is_some()
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "encoding": self.encoding,
            "shape": self.shape,
            "bytes": self.bytes,
            "bits_per_weight": ratio(8.0 * self.bytes as f64, self.weights() as f64),
            "weight_error": self.weight_error,
            "output_error": self.output_error,
            "divergence": self.divergence,
            "zeros": self.zeros,
            "seconds": self.seconds,
        })
    }
}

/// Zero weights of the matrices that are stored as `s8` or `s4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Zeros {
    /// Number of matrices.
    pub matrices: usize,
    /// Number of weights of these matrices.
    pub weights: u64,
    /// Number of zero weights.
    pub zeros: u64,
}

impl Zeros {
    /// Returns the fraction of the weights that is zero.
    pub fn share(&self) -> f64 {
        self.zeros as f64 / self.weights.max(1) as f64
    }

    /// Sums over the sparse matrices among `tensors`; `None` if there are none.
    pub(crate) fn of(tensors: &[TensorReport]) -> Option<Self> {
        let mut sums = Self::default();
        for (tensor, zeros) in tensors.iter().filter_map(|t| Some((t, t.zeros?))) {
            sums.matrices += 1;
            sums.weights += tensor.weights();
            sums.zeros += zeros;
        }
        (sums.matrices > 0).then_some(sums)
    }
}

/// Statistics of the run over the calibration text.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct CalibrationReport {
    /// Tokens of the text.
    pub tokens: usize,
    /// Number of layers of the backward pass, and of the model.
    pub layers: (usize, usize),
    /// Seconds of the forward and backward passes in this run,
    /// including the sums for the curvatures.
    pub seconds: f64,
}

impl CalibrationReport {
    /// Returns the tokens per second, extrapolated to the whole model.
    pub fn tokens_per_second(&self) -> f64 {
        let part = self.layers.0 as f64 / self.layers.1 as f64;
        self.tokens as f64 * part / self.seconds
    }
}

/// Report of a finished compression.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CompressReport {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Weights of the model, including uncompressed ones.
    pub weights: u64,
    /// Compressed matrices with their errors.
    pub layers: Vec<LayerInfo>,
    /// Zeros of the sparse matrices; `None` if there are none.
    pub zeros: Option<Zeros>,
    /// All tensors of the model, in file order.
    pub tensors: Vec<TensorReport>,
    /// Number of leading tensors that an earlier run had already written.
    pub restored: usize,
    /// Run over the calibration text; `None` if nothing was calibrated.
    pub calibration: Option<CalibrationReport>,
    /// Seconds of this run for matrices: reading, encoding and measuring.
    pub encoding_seconds: f64,
    /// Total seconds of this run.
    pub seconds: f64,
}

impl CompressReport {
    /// Returns the bits of the whole file per weight.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.file_bytes as f64 / self.weights as f64
    }

    /// Returns the bits per weight of the matrices in the blocks, including uncompressed ones.
    ///
    /// NaN if there are none.
    pub fn bits_per_weight_blocks(&self) -> f64 {
        let in_block =
            |t: &&TensorReport| t.name.starts_with("model.layers.") && t.shape.len() == 2;
        let blocks = self.tensors.iter().filter(in_block);
        let (bytes, weights) = blocks.fold((0, 0), |sum, t| (sum.0 + t.bytes, sum.1 + t.weights()));
        8.0 * bytes as f64 / weights as f64
    }

    /// Returns the Kullback-Leibler divergence that the errors of all matrices cause, in nats for
    /// each position.
    ///
    /// `None` without a calibration or [`CompressOptions::output_errors`](crate::CompressOptions),
    /// or if a matrix has no figure: that of a part would be taken for that of the whole.
    pub fn divergence(&self) -> Option<f64> {
        self.calibration?;
        let calibrated = self.tensors.iter().filter(|t| t.may_be_calibrated());
        calibrated.map(|t| t.divergence).sum()
    }

    /// Returns the report as JSON: `tensors` and `totals`.
    ///
    /// In `totals`, `encoding` covers the matrices that this run has encoded. Peak memory is that
    /// of the process so far. Missing figures are `null`.
    pub fn to_json(&self) -> Value {
        let encoded = self.tensors[self.restored..].iter();
        let (mut matrices, mut weights) = (0, 0);
        for tensor in encoded.filter(|t| !t.is_uncompressed()) {
            matrices += 1;
            weights += tensor.weights();
        }
        let seconds = self.encoding_seconds;
        json!({
            "totals": {
                "file_bytes": self.file_bytes,
                "weights": self.weights,
                "bits_per_weight": ratio(8.0 * self.file_bytes as f64, self.weights as f64),
                "bits_per_weight_blocks": finite(self.bits_per_weight_blocks()),
                "seconds": self.seconds,
                "restored_tensors": self.restored,
                "peak_memory_bytes": peak_memory(),
                "divergence": self.divergence(),
                "encoding": {
                    "matrices": matrices,
                    "weights": weights,
                    "seconds": seconds,
                    "matrices_per_second": ratio(f64::from(matrices), seconds),
                    "weights_per_second": ratio(weights as f64, seconds),
                },
                "calibration": self.calibration.map(|calibration| json!({
                    "tokens": calibration.tokens,
                    "layers": calibration.layers.0,
                    "seconds": calibration.seconds,
                    "tokens_per_second": finite(calibration.tokens_per_second()),
                })),
            },
            "tensors": self.tensors.iter().map(TensorReport::to_json).collect::<Vec<_>>(),
        })
    }
}

/// Returns the number of zero weights of a sparse matrix.
pub(crate) fn zeros_of(matrix: &Matrix) -> Option<u64> {
    let Matrix::Bitmap(bitmap) = matrix else {
        return None;
    };
    let bits = &bitmap.arrays().bitmap;
    let kept: u64 = bits.iter().map(|byte| u64::from(byte.count_ones())).sum();
    Some(matrix.rows() as u64 * matrix.cols() as u64 - kept)
}

fn ratio(a: f64, b: f64) -> Option<f64> {
    finite(a / b)
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, encoding: &str, shape: &[usize], bytes: u64) -> TensorReport {
        TensorReport {
            name: name.into(),
            encoding: encoding.into(),
            shape: shape.to_vec(),
            bytes,
            weight_error: None,
            output_error: None,
            divergence: None,
            zeros: None,
            seconds: 2.0,
        }
    }

    /// Creates the report of a calibrated run.
    fn report(tensors: Vec<TensorReport>, restored: usize) -> CompressReport {
        CompressReport {
            file_bytes: 100,
            weights: 80,
            layers: Vec::new(),
            zeros: None,
            tensors,
            restored,
            calibration: Some(CalibrationReport {
                tokens: 60,
                layers: (1, 2),
                seconds: 3.0,
            }),
            encoding_seconds: 2.0,
            seconds: 9.0,
        }
    }

    #[test]
    fn totals_are_of_this_run_and_bits_of_everything() {
        let tensors = vec![
            tensor("model.embed_tokens.weight", "q8", &[4, 5], 30),
            tensor("model.layers.0.norm.weight", "keep", &[8], 32),
            tensor("model.layers.0.a.weight", "q4", &[4, 8], 16),
            tensor("model.layers.0.b.weight", "keep", &[2, 10], 40),
            tensor("empty", "keep", &[0], 0),
        ];
        let report = report(tensors, 1);
        let json = report.to_json();
        let totals = &json["totals"];
        assert_eq!(totals["bits_per_weight"], 10.0);
        assert_eq!(totals["bits_per_weight_blocks"], 8.0 * 56.0 / 52.0);
        assert_eq!(totals["encoding"]["matrices_per_second"], 0.5);
        assert_eq!(totals["encoding"]["weights_per_second"], 16.0);
        assert_eq!(totals["calibration"]["tokens_per_second"], 10.0);
        assert_eq!(json["tensors"][2]["bits_per_weight"], 4.0);
        assert_eq!(json["tensors"][4]["bits_per_weight"], Value::Null);
    }

    #[test]
    fn the_divergence_is_that_of_the_whole_model_or_none() {
        let name = "model.layers.0.mlp.down_proj.weight";
        let tensors = vec![
            tensor("model.embed_tokens.weight", "q8", &[4, 5], 30),
            tensor(name, "t3", &[4, 8], 16),
            tensor(&name.replace('0', "1"), "t3", &[4, 8], 16),
            tensor(&name.replace('0', "2"), "mdcsr", &[4, 8], 16),
        ];
        let mut report = report(tensors, 2);
        let divergence = |report: &CompressReport| report.to_json()["totals"]["divergence"].clone();
        report.tensors[2].divergence = Some(0.25);
        assert_eq!(divergence(&report), Value::Null);
        report.tensors[1].divergence = Some(0.5);
        assert_eq!(divergence(&report), 0.75);
        report.calibration = None;
        assert_eq!(divergence(&report), Value::Null);
    }
}
