//! The header of a safetensors file.
#![forbid(unsafe_code)]

use safetensors::tensor::Metadata;
use safetensors::{SafeTensorError, SafeTensors};

/// Most bytes of a header that the safetensors crate takes.
const MOST_BYTES: u64 = 100_000_000;

/// Reads the header of the safetensors file with these bytes: its length, and what it lists.
///
/// As [`SafeTensors::read_metadata`], but of a copy: the bytes of a mapped file may change while they are parsed. Errors:
/// those of that function.
pub fn read_header(file: &[u8]) -> Result<(usize, Metadata), SafeTensorError> {
    let copy = copy_of_header(file);
    match SafeTensors::read_metadata(&copy) {
        Ok(found) if copy.len() == file.len() => Ok(found),
        // It takes the copy for the whole file, and has found nothing else to object to.
        Ok(_) | Err(SafeTensorError::MetadataIncompleteBuffer) => whole(&copy, file.len()),
        Err(e) => Err(e),
    }
}

/// The header, or as much of it as there is.
fn copy_of_header(file: &[u8]) -> Vec<u8> {
    let len = file.first_chunk().map_or(0, |len| u64::from_le_bytes(*len));
    let end = len.min(MOST_BYTES) as usize + size_of::<u64>();
    file[..end.min(file.len())].to_vec()
}

/// A header that is sound by itself; the length of the file has to agree with it.
fn whole(header: &[u8], file_len: usize) -> Result<(usize, Metadata), SafeTensorError> {
    let json = &header[size_of::<u64>()..];
    let metadata: Metadata =
        serde_json::from_slice(json).map_err(SafeTensorError::InvalidHeaderDeserialization)?;
    let ends = metadata.tensors().into_values().map(|t| t.data_offsets.1);
    match ends.max().unwrap_or(0).checked_add(header.len()) == Some(file_len) {
        true => Ok((json.len(), metadata)),
        false => Err(SafeTensorError::MetadataIncompleteBuffer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    fn file(tensors: &[(&str, usize)]) -> Vec<u8> {
        let data = [7u8; 64];
        let views = tensors.iter().map(|&(name, len)| {
            let view = TensorView::new(Dtype::U8, vec![len], &data[..len]);
            (name, view.unwrap())
        });
        let views: Vec<_> = views.collect();
        safetensors::serialize(views, None).unwrap()
    }

    /// Of files cut anywhere, or with a wrong byte, it says what the safetensors crate says of the whole file.
    #[test]
    fn it_reads_what_the_crate_reads_and_refuses_what_it_refuses() {
        let same = |bytes: &[u8]| {
            let shown = |(len, metadata): (usize, Metadata)| {
                let tensors = metadata.tensors();
                let mut tensors: Vec<_> = tensors
                    .iter()
                    .map(|(name, t)| (name.clone(), t.data_offsets, t.shape.clone()))
                    .collect();
                tensors.sort();
                (len, tensors)
            };
            let ours = read_header(bytes).map(shown).map_err(|e| e.to_string());
            let theirs = SafeTensors::read_metadata(bytes);
            assert_eq!(ours, theirs.map(shown).map_err(|e| e.to_string()));
            ours.is_ok()
        };
        for tensors in [&[][..], &[("a", 0)], &[("a", 5), ("b", 64)]] {
            let whole = file(tensors);
            assert!(same(&whole));
            let mut longer = whole.clone();
            longer.push(0);
            assert!(!same(&longer));
            for len in 0..whole.len() {
                same(&whole[..len]);
            }
            for place in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[place] ^= 1;
                same(&damaged);
            }
        }
        assert!(!same(&[0xff; 100]));
    }
}
