//! Checksums: the first 16 bytes of SHA-256, in hexadecimal.
#![forbid(unsafe_code)]

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, Read};

/// Bytes of a digest that are kept.
pub(super) const DIGEST_BYTES: usize = 16;

/// Length of a checksum in hexadecimal digits.
pub(super) const CHECKSUM_DIGITS: usize = 2 * DIGEST_BYTES;

/// Bytes that are read at once.
const PART: usize = 1 << 20;

/// Checksum of the data of one tensor: the first 16 bytes of SHA-256, in hexadecimal.
pub fn data(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// [`data`] of the next `len` bytes of `from`; `None` if there are not so many.
pub(super) fn read(from: &mut impl Read, len: u64) -> io::Result<Option<String>> {
    let mut hash = Sha256::new();
    let mut part = vec![0; PART.min(usize::try_from(len).unwrap_or(PART))];
    let mut left = len;
    while left > 0 {
        let most = part.len().min(usize::try_from(left).unwrap_or(PART));
        match from.read(&mut part[..most]) {
            Ok(0) => return Ok(None),
            Ok(n) => {
                hash.update(&part[..n]);
                left -= n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Some(hex(&hash.finalize())))
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
        hash.update(name);
        hash.update(format!("\n{dtype}\n{}\n", shape.join(",")));
    }
    for (key, value) in metadata
        .iter()
        .filter(|(key, _)| *key != super::rules::CHECKSUM)
    {
        // Piece by piece: a value may have most of the header.
        hash.update(key);
        hash.update(format!("\n{}\n", value.len()));
        hash.update(value);
        hash.update("\n");
    }
    hex(&hash.finalize())
}

/// A checksum as bytes; `None` for a text that is none.
pub(super) fn parsed(text: &str) -> Option<[u8; DIGEST_BYTES]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let mut bytes = [0; DIGEST_BYTES];
    if pairs.len() != DIGEST_BYTES || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// The text of a checksum: so many bytes of `digest`, in hexadecimal.
pub(super) fn hex(digest: &[u8]) -> String {
    let mut out = String::with_capacity(CHECKSUM_DIGITS);
    for byte in &digest[..DIGEST_BYTES] {
        write!(out, "{byte:02x}").expect("writing to a String cannot fail");
    }
    out
}
