//! Encodes single matrices with and without their inputs: the Rust part of `bench/minilm.sh`.
//!
//!     cargo run --release --example encode_matrices -- INPUTS.safetensors OUTPUTS.safetensors
//!
//! INPUTS has matrices `[rows, cols]` and inputs `[n, cols]`, all F32. Its metadata has for each
//! matrix the name of its inputs. OUTPUTS gets each decoded matrix, as `ENCODING/NAME` and
//! `ENCODING calibrated/NAME`, and in its metadata the bits per weight of each encoding.
#![forbid(unsafe_code)]

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};
use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::path::Path;
use upg_compress::encode::encode_matrix;
use upg_compress::encode::hadamard_size;
use upg_compress::sensitivity::{Curvature, Hessian};
use upg_kernel::MappedFile;
use upg_kernel::format::{Encoding, LayerInfo};

/// Encodings, and how many columns share a prime in each.
const ENCODINGS: [(Encoding, Option<usize>); 5] = [
    (Encoding::Q8, Some(64)),
    (Encoding::Q4, Some(32)),
    (Encoding::T4, None),
    (Encoding::T3, None),
    (Encoding::T2, None),
];

/// Seed of the rotation.
const SEED: u64 = 0;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(inputs), Some(outputs)) = (args.next(), args.next()) else {
        return Err("pass the file to read and the file to write".into());
    };
    let file = MappedFile::open(&inputs)?;
    let (_, header) = SafeTensors::read_metadata(&file)?;
    let inputs_of: BTreeMap<String, String> = header
        .metadata()
        .iter()
        .flatten()
        .map(|(name, inputs)| (name.clone(), inputs.clone()))
        .collect();
    let tensors = SafeTensors::deserialize(&file)?;

    let mut curvatures: HashMap<&str, Curvature> = HashMap::new();
    let mut decoded: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut sizes: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (name, inputs) in &inputs_of {
        let (shape, weights) = read(&tensors, name)?;
        let &[rows, cols] = &shape[..] else {
            return Err(format!("{name} is no matrix").into());
        };
        if !curvatures.contains_key(inputs.as_str()) {
            let mut hessian = Hessian::new(cols);
            hessian.add(&read(&tensors, inputs)?.1)?;
            curvatures.insert(inputs, Curvature::from(hessian));
        }
        for (encoding, group) in ENCODINGS {
            let mut layer = LayerInfo::new(name, rows, cols, encoding);
            layer.group = group;
            layer.hadamard = encoding.trellis_bits().and_then(|_| hadamard_size(cols));
            let size = sizes.entry(encoding.name()).or_default();
            size.0 += layer.array_bytes()?.iter().sum::<u64>();
            size.1 += weights.len() as u64;
            for curvature in [None, curvatures.get(inputs.as_str())] {
                let matrix = encode_matrix(&weights, &layer, SEED, curvature, &())?;
                let calibrated = if curvature.is_some() {
                    " calibrated"
                } else {
                    ""
                };
                decoded.push((
                    format!("{encoding}{calibrated}/{name}"),
                    shape.clone(),
                    bytemuck::cast_slice(&matrix.to_dense()).to_vec(),
                ));
            }
        }
        eprintln!("{name} {shape:?}");
    }
    let bits = sizes.into_iter().map(|(encoding, (bytes, weights))| {
        (
            encoding.to_owned(),
            format!("{:.4}", 8.0 * bytes as f64 / weights as f64),
        )
    });
    let views: Vec<_> = decoded
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()?;
    serialize_to_file(views, Some(bits.collect()), Path::new(&outputs))?;
    Ok(())
}

fn read(tensors: &SafeTensors<'_>, name: &str) -> Result<(Vec<usize>, Vec<f32>), Box<dyn Error>> {
    let tensor = tensors.tensor(name)?;
    if tensor.dtype() != Dtype::F32 {
        return Err(format!("{name} is not F32").into());
    }
    let values = tensor.data().as_chunks::<4>().0.iter();
    let values = values.map(|v| f32::from_le_bytes(*v)).collect();
    Ok((tensor.shape().to_vec(), values))
}
