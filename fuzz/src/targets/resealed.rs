//! Target: a valid file of every encoding with edits and recomputed checksums.
//!
//! Thus the edits reach the checks behind the checksums.

use draft::Draft;
use safetensors::Dtype;
use serde_json::json;
use upg_kernel::format::Encoding;

#[path = "../../../upg_kernel/tests/draft/mod.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod draft;

const DTYPES: [Dtype; 6] = [
    Dtype::U8,
    Dtype::I8,
    Dtype::U16,
    Dtype::U32,
    Dtype::F32,
    Dtype::BF16,
];

/// Sizes at the edges of a rule.
const SIZES: [u64; 12] = [
    0,
    1,
    2,
    32,
    63,
    64,
    70,
    128,
    1 << 20,
    1 << 32,
    1 << 62,
    u64::MAX,
];

pub fn run(data: &[u8]) {
    let mut draft = Draft::good();
    for edit in data.chunks(8) {
        let mut full = [0; 8];
        full[..edit.len()].copy_from_slice(edit);
        apply(&mut draft, full);
    }
    let folder = super::folder();
    super::read_upg(&super::write(&folder, "model.safetensors", &draft.bytes()));
}

/// Applies one edit: its kind, the tensor or layer, the position, and the value.
fn apply(draft: &mut Draft, [what, which, low, high, a, b, c, d]: [u8; 8]) {
    let at = usize::from(u16::from_le_bytes([low, high]));
    let number = u32::from_le_bytes([a, b, c, d]);
    let (layers, tensors) = (draft.layers.len(), draft.tensors.len());
    let layer = usize::from(which) % layers;
    let tensor = usize::from(which) % tensors;
    let size = SIZES[at % SIZES.len()];
    match what % 12 {
        0..=3 => {
            // Bytes of a tensor: one, two, four of them, or a run.
            let bytes = &mut draft.tensors[tensor].bytes;
            if bytes.is_empty() {
                return;
            }
            let start = at % bytes.len();
            let len = [1, 2, 4, 64][usize::from(what % 4)].min(bytes.len() - start);
            let new = number.to_le_bytes();
            let run = bytes[start..start + len].iter_mut();
            run.zip(new.iter().cycle()).for_each(|(b, new)| *b = *new);
        }
        4 => {
            // The number of bytes may or may not match the dtype.
            let tensor = &mut draft.tensors[tensor];
            tensor.bytes.resize(at % 4096, a);
            if b & 1 == 0 {
                let element = tensor.dtype.bitsize().div_ceil(8).max(1);
                tensor
                    .bytes
                    .truncate(tensor.bytes.len() / element * element);
                tensor.shape = vec![tensor.bytes.len() / element];
            }
        }
        5 => {
            let shape = &mut draft.tensors[tensor].shape;
            match shape.len() {
                0 => shape.push(size as usize),
                n => shape[usize::from(a) % n] = size as usize,
            }
        }
        6 => draft.tensors[tensor].dtype = DTYPES[at % DTYPES.len()],
        7 => {
            let key = ["rows", "cols", "group", "hadamard"][usize::from(a) % 4];
            draft.layers[layer][key] = json!(size);
        }
        8 => {
            let key = ["rows", "cols", "group", "hadamard"][usize::from(a) % 4];
            draft.layers[layer][key] = json!(at);
        }
        9 => {
            let name = Encoding::ALL.get(at % (Encoding::ALL.len() + 1));
            draft.layers[layer]["encoding"] = json!(name.map_or("q9", |e| e.name()));
        }
        10 => {
            let name = draft.tensors[at % tensors].name.clone();
            draft.tensors[tensor].name = name;
        }
        _ => match a % 4 {
            0 => drop(draft.layers.remove(layer)),
            1 => drop(draft.tensors.remove(tensor)),
            2 => draft.layers[layer]["name"] = json!(format!("w{b}")),
            _ => draft.layers.push(draft.layers[layer].clone()),
        },
    }
    // Later edits need something left to pick from.
    if draft.layers.is_empty() || draft.tensors.is_empty() {
        *draft = Draft::good();
    }
}
