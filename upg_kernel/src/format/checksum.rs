//! Checksums: the first 16 bytes of SHA-256, in hexadecimal.
#![forbid(unsafe_code)]

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Bytes of a digest that are kept.
const DIGEST_BYTES: usize = 16;

/// Length of a checksum in hexadecimal digits.
pub(super) const CHECKSUM_DIGITS: usize = 2 * DIGEST_BYTES;

/// Checksum of the data of one tensor.
pub(super) fn data(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Checksum of the table of tensors and of all metadata but the key `checksum` itself (rule 4).
///
/// `tensors` gives name, dtype and shape; both are hashed in the order of their names.
pub(super) fn table<'a>(
    tensors: impl Iterator<Item = (&'a str, String, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> String {
    let mut hash = Sha256::new();
    for (name, dtype, shape) in tensors {
        let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
        hash.update(format!("{name}\n{dtype}\n{}\n", shape.join(",")));
    }
    for (key, value) in metadata
        .iter()
        .filter(|(key, _)| *key != super::rules::CHECKSUM)
    {
        hash.update(format!("{key}\n{}\n{value}\n", value.len()));
    }
    hex(&hash.finalize())
}

fn hex(digest: &[u8]) -> String {
    let mut out = String::with_capacity(CHECKSUM_DIGITS);
    for byte in &digest[..DIGEST_BYTES] {
        write!(out, "{byte:02x}").expect("writing to a String cannot fail");
    }
    out
}
