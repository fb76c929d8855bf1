//! Target: the parts as the files of a Hugging Face directory, the weights last.

use upg_compress::source::HfSource;

pub fn run(data: &[u8]) {
    let [
        config,
        generation,
        tokenizer,
        tokenizer_config,
        index,
        weights,
    ] = super::parts(data);
    let folder = super::folder();
    for (name, part) in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("model.safetensors.index.json", index),
        ("model.safetensors", weights),
    ] {
        if !part.is_empty() {
            super::write(&folder, name, part);
        }
    }
    match HfSource::open(folder.path()) {
        Ok(source) => super::read_source(&source),
        Err(e) => super::one_line(&e),
    }
}
