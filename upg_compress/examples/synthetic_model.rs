//! Writes a UPG file of the shapes of Phi-4, to measure size, load time, memory and speed without the
//! weights of a model: one strip of 64 random rows is encoded for each width and repeated.
//!
//! ```text
//! cargo run --release -p upg_compress --example synthetic_model -- phi4.safetensors t3 [config.json]
//! ```

use std::collections::{BTreeMap, HashMap};
use upg_compress::compress::encode_matrix;
use upg_compress::source::Source;
use upg_compress::source::synthetic::{PHI4_CONFIG, SyntheticSource};
use upg_kernel::format::{Encoding, FileWriter, LayerInfo, header_capacity};
use upg_kernel::matrix::{GroupedMatrix, Levels, TrellisMatrix, TrellisParts};
use upg_kernel::{Array, Error, ErrorKind, Matrix, Result};

/// Rows that are encoded; every matrix has a multiple of them.
const STRIP: usize = 64;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(out), Some(encoding)) = (args.next(), args.next()) else {
        return Err(Error::new(
            ErrorKind::Argument,
            "usage: synthetic_model OUT ENCODING [CONFIG]",
        ));
    };
    let encoding: Encoding = encoding.parse()?;
    let config = match args.next() {
        Some(path) => {
            std::fs::read_to_string(&path).map_err(|e| Error::io("cannot read", path, e))?
        }
        None => PHI4_CONFIG.to_owned(),
    };
    let source = SyntheticSource::new(&config, 1)?;
    let layers: Vec<LayerInfo> = source
        .tensors()
        .iter()
        .filter(|t| t.shape.len() == 2)
        .map(|t| {
            let is_block = t.name.starts_with("model.layers.");
            let encoding = if is_block { encoding } else { Encoding::Q4 };
            let mut layer = LayerInfo::new(&t.name, t.rows(), t.cols(), encoding);
            layer.group = match encoding {
                Encoding::Q4 => Some(32),
                Encoding::Q8 => Some(64),
                _ => None,
            };
            layer
        })
        .collect();
    write(&source, &out, layers, config)
}

fn write(
    source: &SyntheticSource,
    out: &str,
    mut layers: Vec<LayerInfo>,
    config: String,
) -> Result<()> {
    let mut metadata: BTreeMap<String, String> = ["compression_ratio", "bits_per_weight"]
        .map(|key| (key.to_owned(), "0.0000000000".to_owned()))
        .into();
    metadata.insert("model".into(), source.model_name().into());
    metadata.insert("recipe".into(), r#"{"tool":"synthetic_model"}"#.into());
    metadata.insert("config.json".into(), config);
    let kept = source.tensors().iter().filter(|t| t.shape.len() != 2);
    let capacity = header_capacity(&layers, kept.map(|t| t.name.as_str()), &metadata)?;
    let mut writer = FileWriter::create(out, capacity)?;
    let mut strips: HashMap<(usize, String), Matrix> = HashMap::new();
    let mut next = 0;
    for (index, tensor) in source.tensors().iter().enumerate() {
        if tensor.shape.len() != 2 {
            let raw = source.read_raw(index)?;
            writer.tensor(&tensor.name, raw.dtype.into(), &tensor.shape, &raw.bytes)?;
            continue;
        }
        let layer = &mut layers[next];
        let key = (layer.cols, layer.encoding_name().to_owned());
        if !strips.contains_key(&key) {
            let rows = source.read_rows_f32(index, 0..STRIP)?;
            let mut strip = layer.clone();
            strip.rows = STRIP;
            strips.insert(key.clone(), encode_matrix(&rows, &strip, 0, &())?);
        }
        let matrix = repeated(&strips[&key], layer.rows)?;
        if let Matrix::Trellis(m) = &matrix {
            layer.hadamard = Some(m.parts().rotation.size());
        }
        writer.layer(next, layer, &matrix)?;
        next += 1;
    }
    let (weights, bytes) = (source.total_weights() as f64, writer.file_len() as f64);
    metadata.insert(
        "compression_ratio".into(),
        format!("{:.4}", 4.0 * weights / bytes),
    );
    metadata.insert(
        "bits_per_weight".into(),
        format!("{:.4}", 8.0 * bytes / weights),
    );
    writer.finish(metadata, &layers)
}

/// The strip, over and over, as a matrix of `rows` rows.
fn repeated(strip: &Matrix, rows: usize) -> Result<Matrix> {
    if !rows.is_multiple_of(STRIP) {
        let message = format!("{rows} rows are no multiple of {STRIP}");
        return Err(Error::new(ErrorKind::Argument, message));
    }
    let times = rows / STRIP;
    match strip {
        Matrix::Grouped(m) => {
            let levels = match m.levels() {
                Levels::Bytes(values) => Levels::Bytes(repeat(values, times)),
                Levels::Nibbles { codes, codebook } => Levels::Nibbles {
                    codes: repeat(codes, times),
                    codebook: codebook.clone(),
                },
            };
            let (primes, scales) = (repeat(m.prime_indices(), times), repeat(m.scales(), times));
            GroupedMatrix::new(rows, strip.cols(), m.group(), levels, primes, scales)
                .map(Matrix::Grouped)
        }
        Matrix::Trellis(m) => {
            let parts = TrellisParts {
                codes: repeat(&m.parts().codes, times),
                prime_indices: repeat(&m.parts().prime_indices, times),
                scales: repeat(&m.parts().scales, times),
                ..m.parts().clone()
            };
            TrellisMatrix::new(rows, strip.cols(), m.k(), parts).map(Matrix::Trellis)
        }
        _ => Err(Error::new(
            ErrorKind::Argument,
            "choose q8, q4, t2, t3 or t4",
        )),
    }
}

fn repeat<T: bytemuck::Pod>(values: &Array<T>, times: usize) -> Array<T> {
    values.repeat(times).into()
}
