//! Builder of GGUF files, byte by byte.

use super::data;

/// GGUF file under construction.
pub(super) struct File(pub(super) Vec<u8>);

impl File {
    pub(super) fn new(tensors: u64, keys: u64) -> Self {
        Self([b"GGUF".as_slice(), &3u32.to_le_bytes()].concat())
            .u64(tensors)
            .u64(keys)
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn u32(self, n: u32) -> Self {
        self.bytes(&n.to_le_bytes())
    }

    pub(super) fn u64(self, n: u64) -> Self {
        self.bytes(&n.to_le_bytes())
    }

    pub(super) fn text(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    pub(super) fn key(self, key: &str, kind: u32) -> Self {
        self.text(key).u32(kind)
    }

    /// Adds a key with a u32.
    pub(super) fn number(self, key: &str, n: u32) -> Self {
        self.key(key, 4).u32(n)
    }

    pub(super) fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut file = self.text(name).u32(dims.len() as u32);
        for &dim in dims {
            file = file.u64(dim);
        }
        file.u32(kind).u64(offset)
    }
}

pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;

/// Returns a valid file with every occurrence
/// of `from` replaced by `to` (of the same length).
pub(super) fn edited(family: &str, from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = std::fs::read(data(&format!("families/{family}/model.gguf"))).unwrap();
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> = (0..=bytes.len() - from.len())
        .filter(|&at| bytes[at..].starts_with(from))
        .collect();
    assert!(!places.is_empty(), "nothing to edit");
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

pub(super) fn key_with(key: &str, n: u32) -> Vec<u8> {
    [key.as_bytes(), &4u32.to_le_bytes(), &n.to_le_bytes()].concat()
}

pub(super) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Returns an all-zero llama of one layer and one head of 8,
/// with additional keys and tensors.
///
/// A key is a name, below `llama.` unless it begins with `general.`, a value type and bytes.
pub(super) fn llama(keys: &[(&str, u32, &[u8])], tensors: &[(&str, &[u64])]) -> Vec<u8> {
    let sizes = [
        "embedding_length",
        "attention.head_count",
        "feed_forward_length",
        "block_count",
        "context_length",
    ];
    let matrices = [
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    let vectors = [
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
        "output_norm.weight",
    ];
    let mut file = File::new(11 + tensors.len() as u64, 7 + keys.len() as u64)
        .key("general.architecture", STRING)
        .text("llama")
        .key("llama.attention.layer_norm_rms_epsilon", 6)
        .bytes(&1e-5f32.to_le_bytes());
    for name in sizes {
        let one = matches!(name, "attention.head_count" | "block_count");
        file = file.number(&format!("llama.{name}"), if one { 1 } else { 8 });
    }
    for (name, kind, bytes) in keys {
        let key = match name.starts_with("general.") {
            true => (*name).to_owned(),
            false => format!("llama.{name}"),
        };
        file = file.key(&key, *kind).bytes(bytes);
    }
    file = file.tensor("token_embd.weight", &[8, 8], 0, 0);
    for name in matrices {
        file = file.tensor(&format!("blk.0.{name}.weight"), &[8, 8], 0, 0);
    }
    for name in vectors {
        file = file.tensor(name, &[8], 0, 0);
    }
    for (name, dims) in tensors {
        file = file.tensor(name, dims, 0, 0);
    }
    file.bytes(&[0; 32 + 8 * 8 * 4]).0
}

/// Returns the bytes of a string value.
pub(super) fn text(text: &str) -> Vec<u8> {
    File(Vec::new()).text(text).0
}
