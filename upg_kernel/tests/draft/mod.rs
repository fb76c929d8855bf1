//! Small UPG file with a layer of every encoding.
//!
//! It is built from the text of `upg_format_v2.md`, not with the library's writer, so that tests
//! can damage any part of it.

use safetensors::Dtype;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Two strips, the second one with two rows.
pub const ROWS: usize = 66;
pub const COLS: usize = 70;

const STRIPS: usize = ROWS.div_ceil(64);

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
    /// Name of the tensor directly before which it is placed, instead of its usual place.
    pub before: Option<String>,
}

/// Content of a file, open to damage.
#[derive(Clone)]
pub struct Draft {
    pub metadata: BTreeMap<String, String>,
    pub layers: Vec<serde_json::Value>,
    pub tensors: Vec<Tensor>,
}

impl Draft {
    /// Creates layers 0 to 7 in the order of the specification,
    /// an uncompressed tensor and a tokenizer.
    pub fn good() -> Self {
        let metadata = [
            ("format", "upg"),
            ("version", "2.1"),
            ("model", "draft"),
            ("compression_ratio", "1"),
            ("bits_per_weight", "32"),
            ("recipe", "{}"),
        ];
        let mut draft = Self {
            metadata: metadata.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            layers: Vec::new(),
            tensors: Vec::new(),
        };
        draft.mdcsr();
        draft.grouped("q8", 64, "values", Dtype::I8);
        draft.grouped("q4", 32, "codes", Dtype::U8);
        for k in [2, 3, 4] {
            draft.trellis(k);
        }
        draft.bitmap("s8", "values", Dtype::I8);
        draft.bitmap("s4", "codes", Dtype::U8);
        draft.push("model.norm.weight", Dtype::F32, &[4], &[0; 16]);
        draft.push("tokenizer.json", Dtype::U8, &[2], b"{}");
        draft
    }

    fn begin(&mut self, encoding: &str) -> String {
        let i = self.layers.len();
        self.layers.push(serde_json::json!({
            "name": format!("{encoding}.weight"), "rows": ROWS, "cols": COLS, "encoding": encoding,
        }));
        format!("layer_{i}_")
    }

    fn push(&mut self, name: impl Into<String>, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        self.tensors.push(Tensor {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
            bytes: bytes.to_vec(),
            before: None,
        });
    }

    fn scales(&mut self, prefix: &str) {
        let scales = [0.5f32, 1.0, 0.25].iter().cycle().take(ROWS);
        let scales: Vec<u8> = scales.flat_map(|s| s.to_le_bytes()).collect();
        self.push(format!("{prefix}scales"), Dtype::F32, &[ROWS], &scales);
    }

    /// Adds an `mdcsr` layer with entries in rows 0 and 2.
    fn mdcsr(&mut self) {
        let p = self.begin("mdcsr");
        let mut pointers = [4; ROWS + 1];
        pointers[..3].copy_from_slice(&[0, 2, 2]);
        self.push(
            format!("{p}row_pointers"),
            Dtype::U32,
            &[ROWS + 1],
            &words(&pointers),
        );
        self.scales(&p);
        self.push(
            format!("{p}prime_indices"),
            Dtype::U16,
            &[4],
            &[1, 0, 2, 0, 0x0F, 0x27, 4, 0],
        );
        self.push(format!("{p}values"), Dtype::I8, &[4], &[1, 2, 3, 4]);
        self.push(format!("{p}delta_indices"), Dtype::U8, &[4], &[0, 69, 5, 6]);
    }

    fn grouped(&mut self, encoding: &str, group: usize, array: &str, dtype: Dtype) {
        let p = self.begin(encoding);
        self.last()["group"] = group.into();
        let groups = COLS.div_ceil(group);
        let weights = 64 * groups * group;
        let strip = match dtype {
            Dtype::I8 => weights,
            _ => weights / 2,
        };
        self.scales(&p);
        let codes = noise(STRIPS * strip);
        self.push(format!("{p}{array}"), dtype, &[STRIPS, strip], &codes);
        self.prime_indices(&p, groups);
        if dtype == Dtype::U8 {
            self.push(format!("{p}codebook"), Dtype::I8, &[16], &noise(16));
        }
    }

    fn prime_indices(&mut self, prefix: &str, groups: usize) {
        let indices = noise(STRIPS * groups * 64);
        let shape = [STRIPS, groups, 64];
        self.push(
            format!("{prefix}prime_indices"),
            Dtype::U8,
            &shape,
            &indices,
        );
    }

    fn trellis(&mut self, k: usize) {
        let p = self.begin(&format!("t{k}"));
        self.last()["hadamard"] = 64.into();
        let strip = 32 * k * COLS.div_ceil(4) + 16;
        self.scales(&p);
        let codes = noise(STRIPS * strip);
        self.push(format!("{p}codes"), Dtype::U8, &[STRIPS, strip], &codes);
        self.push(
            format!("{p}prime_indices"),
            Dtype::U8,
            &[ROWS, 1],
            &[0; ROWS],
        );
        self.push(format!("{p}signs"), Dtype::U8, &[64 / 8], &noise(64 / 8));
    }

    /// Adds a sparse layer.
    ///
    /// Row 0 has columns 0 and 69, row 63 column 5, and row 65 the first three.
    fn bitmap(&mut self, encoding: &str, array: &str, dtype: Dtype) {
        let p = self.begin(encoding);
        self.last()["group"] = 64.into();
        let mut bitmap = [0u8; STRIPS * 1024];
        (bitmap[0], bitmap[17 * 32]) = (1, 1 << 1);
        bitmap[63] = 1 << 5;
        bitmap[1024] = 7 << 4;
        let (codes, pointers) = match dtype {
            Dtype::I8 => (6, [0, 3, 6]),
            _ => (5, [0, 3, 5]),
        };
        self.push(
            format!("{p}strip_pointers"),
            Dtype::U32,
            &[STRIPS + 1],
            &words(&pointers),
        );
        self.scales(&p);
        self.push(format!("{p}bitmap"), Dtype::U8, &[STRIPS, 1024], &bitmap);
        self.push(format!("{p}{array}"), dtype, &[codes], &noise(codes));
        self.prime_indices(&p, 2);
        if dtype == Dtype::U8 {
            self.push(format!("{p}codebook"), Dtype::I8, &[16], &noise(16));
        }
    }

    fn last(&mut self) -> &mut serde_json::Value {
        self.layers.last_mut().expect("a layer was begun")
    }

    /// Returns the tensor of this name.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors
            .iter_mut()
            .find(|t| t.name == name)
            .unwrap_or_else(|| panic!("{name}"))
    }

    /// Returns the metadata with all computed values.
    pub fn sealed(&self) -> BTreeMap<String, String> {
        let mut metadata = self.metadata.clone();
        let layers = serde_json::Value::from(self.layers.clone()).to_string();
        metadata.entry("layers".into()).or_insert(layers);
        metadata
            .entry("num_layers".into())
            .or_insert(self.layers.len().to_string());
        let sums: BTreeMap<_, _> = self
            .tensors
            .iter()
            .map(|t| (&t.name, digest(&t.bytes)))
            .collect();
        let sums = serde_json::to_string(&sums).expect("plain strings");
        metadata.entry("checksums".into()).or_insert(sums);
        let mut table = String::new();
        let mut tensors: Vec<&Tensor> = self.tensors.iter().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        for t in tensors {
            let shape: Vec<String> = t.shape.iter().map(usize::to_string).collect();
            table += &format!("{}\n{}\n{}\n", t.name, t.dtype, shape.join(","));
        }
        for (key, value) in &metadata {
            table += &format!("{key}\n{}\n{value}\n", value.len());
        }
        metadata
            .entry("checksum".into())
            .or_insert(digest(table.as_bytes()));
        metadata
    }

    /// Returns the file: tensors of larger elements first, so that all are aligned.
    pub fn bytes(&self) -> Vec<u8> {
        let (moved, mut tensors): (Vec<&Tensor>, Vec<&Tensor>) =
            self.tensors.iter().partition(|t| t.before.is_some());
        tensors.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize()));
        for t in moved {
            let at = tensors
                .iter()
                .position(|other| Some(&other.name) == t.before.as_ref());
            tensors.insert(at.expect("a tensor to lie before"), t);
        }
        self.in_order(&tensors)
    }

    fn in_order(&self, tensors: &[&Tensor]) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!(self.sealed()));
        let mut data = Vec::new();
        for t in tensors {
            let begin = data.len();
            data.extend_from_slice(&t.bytes);
            header.insert(
                t.name.clone(),
                serde_json::json!({
                    "dtype": t.dtype.to_string(), "shape": t.shape, "data_offsets": [begin, data.len()],
                }),
            );
        }
        let mut header = serde_json::to_vec(&header).expect("plain values");
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        file
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)[..16]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Returns bytes without a pattern.
pub fn noise(n: usize) -> Vec<u8> {
    (0..n as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}
