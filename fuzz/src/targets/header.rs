//! Target: the bytes as a UPG file.

pub fn run(data: &[u8]) {
    let folder = super::folder();
    super::read_upg(&super::write(&folder, "model.safetensors", data));
}
