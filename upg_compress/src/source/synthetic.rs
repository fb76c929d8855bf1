//! Random models of given sizes, to measure size, memory and speed without the weights.
#![forbid(unsafe_code)]

use super::gguf::dims::Dims;
use super::gguf::families::family_of_model_type;
use super::model::{
    FloatType, RawTensor, SkippedTensor, Source, SourceDtype, TensorInfo, check_rows, fill_rows,
    sort_key, tensor_at,
};
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::Value;
use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::LazyLock;
use upg_kernel::inference::model_dir::ModelFiles;
use upg_kernel::{Error, ErrorKind, Result};

/// Published models whose shapes [`SyntheticSource::published`] knows.
///
/// Each has its name, and the sizes and settings of its `config.json`.
pub const PUBLISHED: [(&str, &str); 3] = [
    ("phi-4", PHI4_CONFIG),
    ("llama-3.1-8b", LLAMA31_8B_CONFIG),
    ("smollm2-135m", SMOLLM2_135M_CONFIG),
];

/// Config of microsoft/phi-4: 14.66 billion weights.
const PHI4_CONFIG: &str = r#"{
  "architectures": ["Phi3ForCausalLM"],
  "model_type": "phi3",
  "torch_dtype": "bfloat16",
  "hidden_act": "silu",
  "hidden_size": 5120,
  "intermediate_size": 17920,
  "num_hidden_layers": 40,
  "num_attention_heads": 40,
  "num_key_value_heads": 10,
  "max_position_embeddings": 16384,
  "original_max_position_embeddings": 16384,
  "rms_norm_eps": 1e-05,
  "rope_theta": 250000,
  "rope_scaling": null,
  "sliding_window": null,
  "tie_word_embeddings": false,
  "bos_token_id": 100257,
  "eos_token_id": [100257, 100265],
  "pad_token_id": 100349,
  "vocab_size": 100352
}"#;

/// Config of meta-llama/Llama-3.1-8B: 8.03 billion weights.
const LLAMA31_8B_CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "torch_dtype": "bfloat16",
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-05,
  "rope_theta": 500000.0,
  "rope_scaling": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192
  },
  "attention_bias": false,
  "mlp_bias": false,
  "tie_word_embeddings": false,
  "bos_token_id": 128000,
  "eos_token_id": 128001,
  "vocab_size": 128256
}"#;

/// Config of HuggingFaceTB/SmolLM2-135M: 134.5 million weights.
const SMOLLM2_135M_CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "torch_dtype": "bfloat16",
  "hidden_act": "silu",
  "hidden_size": 576,
  "intermediate_size": 1536,
  "num_hidden_layers": 30,
  "num_attention_heads": 9,
  "num_key_value_heads": 3,
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-05,
  "rope_theta": 100000,
  "rope_scaling": null,
  "attention_bias": false,
  "mlp_bias": false,
  "tie_word_embeddings": true,
  "bos_token_id": 0,
  "eos_token_id": 0,
  "vocab_size": 49152
}"#;

/// Standard deviation of the weights: transformers' usual `initializer_range`.
const DEVIATION: f32 = 0.02;

/// Model of random BF16 weights: matrices and biases are Gaussian, norms 1.
///
/// Every row has its own random stream, so that any row is generated on demand, in parallel, and
/// reproducibly; nothing is stored in memory.
#[derive(Debug)]
pub struct SyntheticSource {
    name: String,
    files: ModelFiles,
    seed: u64,
    tensors: Vec<TensorInfo>,
}

impl SyntheticSource {
    /// Creates a model with the shapes of one of [`PUBLISHED`], called `synthetic-NAME`.
    ///
    /// Errors (`Argument`): there is no such name.
    pub fn published(name: &str, seed: u64) -> Result<Self> {
        let Some((_, config)) = PUBLISHED.iter().find(|(known, _)| *known == name) else {
            let known = PUBLISHED.map(|(name, _)| name).join(", ");
            let message = format!("'{name}' is not a known model");
            return Err(
                Error::new(ErrorKind::Argument, message).hint(format!("choose one of {known}"))
            );
        };
        let mut source = Self::new(config, seed)?;
        source.name = format!("synthetic-{name}");
        Ok(source)
    }

    /// Creates a model of this `config.json`, of any supported family, without optional biases.
    ///
    /// Errors: `Malformed` (not JSON), `Missing` (a size is not in the config), `Unsupported`
    /// (family), `Invalid` (inconsistent sizes), `TooLarge`.
    pub fn new(config_json: &str, seed: u64) -> Result<Self> {
        let config: Value = serde_json::from_str(config_json)
            .map_err(|e| Error::new(ErrorKind::Malformed, format!("config: {e}")))?;
        let model_type = config.get("model_type").and_then(Value::as_str);
        let family = family_of_model_type(model_type.unwrap_or_default())?;
        let dims = read_dims(&config)?;
        family.check(&dims)?;
        if dims.layers > MAX_LAYERS {
            let message = format!("{} layers, at most {MAX_LAYERS}", dims.layers);
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
        let tied = config.get("tie_word_embeddings") == Some(&Value::Bool(true));
        let mut tensors: Vec<TensorInfo> = family
            .expected(&dims)
            .filter(|w| w.required || (w.hf == "lm_head.weight" && !tied))
            .map(|w| TensorInfo {
                name: w.hf,
                shape: w.shape,
                dtype: SourceDtype::Float(FloatType::Bf16),
            })
            .collect();
        tensors.sort_by(|a, b| sort_key(&a.name).cmp(&sort_key(&b.name)));
        Ok(Self {
            name: format!("synthetic-{}", family.model_type),
            files: ModelFiles {
                config_json: Some(config_json.to_owned()),
                ..ModelFiles::default()
            },
            seed,
            tensors,
        })
    }
}

/// Maximum layers, more than any model has, so that the list of tensors stays small.
const MAX_LAYERS: usize = 1 << 12;

/// Reads the sizes in a `config.json`.
fn read_dims(config: &Value) -> Result<Dims> {
    let number = |key: &str| {
        let n = config.get(key).and_then(Value::as_u64);
        n.and_then(|n| usize::try_from(n).ok())
    };
    let required = |key: &str| {
        number(key).ok_or_else(|| Error::new(ErrorKind::Missing, format!("no {key} in the config")))
    };
    let heads = required("num_attention_heads")?;
    let hidden = required("hidden_size")?;
    let head_dim = number("head_dim").or(hidden.checked_div(heads));
    Ok(Dims {
        hidden,
        layers: required("num_hidden_layers")?,
        heads,
        kv_heads: number("num_key_value_heads").unwrap_or(heads),
        head_dim: head_dim.unwrap_or(0),
        ffn: required("intermediate_size")?,
        vocab: required("vocab_size")?,
        context: required("max_position_embeddings")?,
        rotary_dim: head_dim.unwrap_or(0),
        rope_theta: 1.0,
        rms_eps: 0.0,
        sliding_window: None,
    })
}

impl Source for SyntheticSource {
    fn model_name(&self) -> &str {
        &self.name
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
        Vec::new()
    }

    fn read_rows_f32(&self, index: usize, rows: Range<usize>) -> Result<Vec<f32>> {
        let tensor = tensor_at(&self.tensors, index)?;
        check_rows(tensor, &rows)?;
        let cols = tensor.cols();
        if tensor.name.ends_with("norm.weight") {
            return Ok(vec![1.0; rows.len() * cols]);
        }
        let mut seed = [0u8; 32];
        let words = [self.seed, index as u64];
        for (to, from) in seed.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        let stream = ChaCha8Rng::from_seed(seed);
        fill_rows(rows, cols, usize::MAX, |first, out| {
            let mut bytes = vec![0u8; 2 * cols];
            for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
                let mut stream = stream.clone();
                stream.set_stream(row as u64);
                stream.fill_bytes(&mut bytes);
                for (x, u) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = GAUSSIAN[usize::from(u16::from_le_bytes(*u))];
                }
            }
            Ok(())
        })
    }

    fn read_raw(&self, index: usize) -> Result<RawTensor<'_>> {
        let values: Vec<bf16> = self
            .read_f32(index)?
            .into_iter()
            .map(bf16::from_f32)
            .collect();
        Ok(RawTensor {
            dtype: FloatType::Bf16,
            bytes: Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        })
    }
}

/// Normal distribution as 65,536 equally likely values, rounded to BF16.
static GAUSSIAN: LazyLock<Box<[f32; 1 << 16]>> = LazyLock::new(|| {
    let mut table = Box::new([0f32; 1 << 16]);
    for (i, x) in table.iter_mut().enumerate() {
        let quantile = inverse_normal((i as f64 + 0.5) / 65536.0);
        *x = bf16::from_f32(DEVIATION * quantile as f32).to_f32();
    }
    table
});

/// Returns the quantile of the standard normal distribution for probability `p` in (0, 1).
///
/// The error is at most 4.5e-4 (Abramowitz and Stegun,
/// Handbook of Mathematical Functions, 26.2.23).
fn inverse_normal(p: f64) -> f64 {
    let t = (-2.0 * p.min(1.0 - p).ln()).sqrt();
    let above = 2.515517 + t * (0.802853 + t * 0.010328);
    let below = 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308));
    let x = t - above / below;
    if p < 0.5 { -x } else { x }
}

#[cfg(test)]
mod tests {
    use super::super::hf::HfSource;
    use super::super::tests::data;
    use super::*;

    #[test]
    fn published_models_have_their_published_sizes() {
        let sizes = [14_659_507_200, 8_030_261_248, 134_515_008];
        for ((name, _), size) in PUBLISHED.into_iter().zip(sizes) {
            let source = SyntheticSource::published(name, 0).unwrap();
            assert_eq!(source.total_weights(), size, "{name}");
            assert_eq!(source.model_name(), format!("synthetic-{name}"));
        }
        let e = SyntheticSource::published("gpt-1", 0).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Argument);
        assert!(e.to_string().contains("phi-4, llama-3.1-8b"), "{e}");
    }

    #[test]
    fn phi4_has_its_published_shapes() {
        let source = SyntheticSource::new(PHI4_CONFIG, 0).unwrap();
        let shape = |name: &str| {
            let found = source.tensors().iter().find(|t| t.name == name);
            found.unwrap().shape.clone()
        };
        assert_eq!(
            shape("model.layers.39.self_attn.qkv_proj.weight"),
            [7680, 5120]
        );
        assert_eq!(
            shape("model.layers.0.mlp.gate_up_proj.weight"),
            [35840, 5120]
        );
        assert_eq!(shape("lm_head.weight"), [100352, 5120]);
    }

    #[test]
    fn tensors_are_those_of_transformers() {
        for family in ["llama3", "mistral", "qwen2", "qwen3", "phi3", "phi4-mini"] {
            let real = HfSource::open(data(&format!("families/{family}"))).unwrap();
            let made = SyntheticSource::new(real.files().config_json.as_ref().unwrap(), 1).unwrap();
            let list = |s: &dyn Source| -> Vec<(String, Vec<usize>)> {
                let pair = |t: &TensorInfo| (t.name.clone(), t.shape.clone());
                s.tensors().iter().map(pair).collect()
            };
            assert_eq!(list(&real), list(&made), "{family}");
        }
    }

    #[test]
    fn rows_are_gaussian_and_always_the_same() {
        let source = SyntheticSource::new(PHI4_CONFIG, 5).unwrap();
        let index = 5;
        let rows = source.read_rows_f32(index, 100..140).unwrap();
        let count = rows.len() as f64;
        assert_eq!(rows.len(), 40 * source.tensors()[index].cols());
        let cols = source.tensors()[index].cols();
        let again = source.read_rows_f32(index, 139..140).unwrap();
        assert_eq!(again, rows[39 * cols..]);
        assert_ne!(again, source.read_rows_f32(index, 138..139).unwrap());
        assert_ne!(again, source.read_rows_f32(index + 1, 139..140).unwrap());
        let moment = |power: i32| {
            let scaled = rows.iter().map(|x| f64::from(*x / DEVIATION).powi(power));
            scaled.sum::<f64>() / count
        };
        // Five standard errors of about 200,000 values.
        assert!(moment(1).abs() < 0.012, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.016, "{}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.12, "{}", moment(4));
        assert!(rows.iter().all(|x| bf16::from_f32(*x).to_f32() == *x));
    }

    #[test]
    fn bad_configs_are_refused() {
        let table = [
            ("", ErrorKind::Malformed),
            ("{}", ErrorKind::Unsupported),
            (r#"{"model_type":"phi3"}"#, ErrorKind::Missing),
        ];
        for (config, kind) in table {
            assert_eq!(SyntheticSource::new(config, 0).unwrap_err().kind(), kind);
        }
        let zero = PHI4_CONFIG.replace("\"num_attention_heads\": 40", "\"num_attention_heads\": 0");
        assert_eq!(
            SyntheticSource::new(&zero, 0).unwrap_err().kind(),
            ErrorKind::Invalid
        );
    }
}
