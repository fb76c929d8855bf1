//! Target: sparse and packed weights, the parts as `config.json` and `model.safetensors`.

use upg_compress::source::HfSource;

pub fn run(data: &[u8]) {
    let [config, weights] = super::parts(data);
    let folder = super::folder();
    super::write(&folder, "config.json", config);
    super::write(&folder, "model.safetensors", weights);
    match HfSource::open(folder.path()) {
        Ok(source) => super::read_source(&source),
        Err(e) => super::one_line(&e),
    }
}
