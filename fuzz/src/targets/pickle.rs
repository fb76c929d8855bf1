//! Target: the bytes as a version 1 file.

use upg_kernel::inference::model_dir::ModelFiles;
use upg_kernel::v1::V1File;

pub fn run(data: &[u8]) {
    let folder = super::folder();
    let file = match V1File::open(super::write(&folder, "model.pkl", data), &[]) {
        Ok(file) => file,
        Err(e) => return super::one_line(&e),
    };
    let checked = file.check_sizes().and_then(|()| file.check_weights());
    if let Err(e) = checked {
        return super::one_line(&e);
    }
    let out = folder.path().join("out.safetensors");
    match file.convert(&out, &ModelFiles::default(), &mut |_, _| Ok(())) {
        Ok(_) => super::read_upg(&out),
        Err(e) => super::one_line(&e),
    }
}
