//! Target: the bytes as a GGUF file.

use upg_compress::source::GgufSource;

pub fn run(data: &[u8]) {
    let folder = super::folder();
    match GgufSource::open(super::write(&folder, "model.gguf", data)) {
        Ok(source) => super::read_source(&source),
        Err(e) => super::one_line(&e),
    }
}
