use super::*;
use safetensors::tensor::{Metadata as Reference, SafeTensors};

/// Name, type, shape and place of a tensor.
type Listed = (String, Dtype, Vec<usize>, Range<usize>);

fn file(header: &str, data: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [length.as_slice(), header.as_bytes(), &vec![7; data]].concat()
}

/// The table that the crate `safetensors` reads from the same bytes.
fn reference(bytes: &[u8]) -> Option<Vec<Listed>> {
    let (header, table): (usize, Reference) = SafeTensors::read_metadata(bytes).ok()?;
    let start = header + LENGTH_BYTES;
    let tensors = table.tensors().into_iter().map(|(name, info)| {
        let (begin, end) = info.data_offsets;
        (
            name,
            info.dtype,
            info.shape.clone(),
            start + begin..start + end,
        )
    });
    let mut found: Vec<Listed> = tensors.collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Some(found)
}

fn read(bytes: &[u8]) -> Option<Vec<Listed>> {
    let container = Container::read(bytes).ok()?;
    let listed = |e: Entry<'_>| (e.name.to_owned(), e.dtype, e.shape.to_vec(), e.range);
    Some(container.iter().map(listed).collect())
}

/// Headers, bytes of data, and whether they are a file.
const TABLE: &[(&str, usize, bool)] = &[
    ("{}", 0, true),
    (" {} \n", 0, true),
    (r#"{"__metadata__":null}"#, 0, true),
    (
        r#"{"__metadata__":{"a":"b\n\u00e9"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#,
        8,
        true,
    ),
    (
        r#"{"b":{"dtype":"U8","shape":[],"data_offsets":[3,4]},"a":{"dtype":"I8","shape":[3],"data_offsets":[0,3]}}"#,
        4,
        true,
    ),
    (
        r#"{"e":{"dtype":"F4","shape":[2],"data_offsets":[0,1],"more":[{"x":1}]},"z":{"dtype":"F64","shape":[0,9],"data_offsets":[0,0]}}"#,
        1,
        true,
    ),
    (
        r#"{"\u0062":{"data_offsets":[0,2],"shape":[1],"dtype":"BF16"}}"#,
        2,
        true,
    ),
    ("", 0, false),
    ("[]", 0, false),
    ("{", 0, false),
    ("{}{}", 0, false),
    ("{}", 1, false),
    (r#"{"__metadata__":{"a":1}}"#, 0, false),
    (r#"{"a":{"dtype":"F32","shape":[1]}}"#, 0, false),
    (
        r#"{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#,
        4,
        false,
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        4,
        false,
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#,
        4,
        false,
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}"#,
        4,
        false,
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
        4,
        false,
    ),
    (
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
        4,
        false,
    ),
    (
        r#"{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}"#,
        1,
        false,
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        2,
        false,
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
        3,
        false,
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
        0,
        false,
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#,
        8,
        false,
    ),
];

#[test]
fn reads_what_the_reference_reads() {
    for &(header, data, is_good) in TABLE {
        let bytes = file(header, data);
        let found = read(&bytes);
        assert_eq!(found, reference(&bytes), "{header}");
        assert_eq!(found.is_some(), is_good, "{header}");
        for len in 0..bytes.len() {
            let cut = &bytes[..len];
            assert_eq!(read(cut), reference(cut), "{header}: {len}");
        }
    }
    let container = Container::read(&file(TABLE[3].0, 8)).unwrap();
    assert_eq!(container.metadata()["a"], "b\n\u{e9}");
    assert_eq!(container.get("x").unwrap().shape, [2, 1]);
    assert_eq!(
        (container.get("y"), container.position("x")),
        (None, Some(0))
    );
}

/// From a reader that gives the header only.
#[test]
fn a_file_is_read_without_its_data_as_it_is_read_whole() {
    for (header, data, _) in TABLE {
        let whole = file(header, *data);
        let header = &whole[..LENGTH_BYTES + header.len()];
        for len in [whole.len(), whole.len() + 1, header.len() - 1, 0] {
            let mut resized = whole.clone();
            resized.resize(len, 7);
            let expected = Container::read(&resized).map(|read| format!("{read:?}"));
            let found = Container::read_from(header, len as u64).map(|read| format!("{read:?}"));
            assert_eq!(found.ok(), expected.ok(), "{len} bytes of {header:?}");
        }
    }
    for cut in [0, 7] {
        let e = Container::read_from(&[2; 8][..cut], 100).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Malformed);
    }
}

#[test]
fn caps_have_an_error_of_a_short_line() {
    let tensor = |name: &str, shape: &str| {
        format!(r#"{{"{name}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}"#)
    };
    let long = "n".repeat(1 << 20);
    let dims = vec!["0"; MOST_DIMS + 1].join(",");
    let keys: Vec<String> = (0..=MOST_METADATA)
        .map(|i| format!(r#""{i}":"""#))
        .collect();
    use ErrorKind::{Malformed, TooLarge};
    for (header, kind, words) in [
        (
            tensor(&long, "0"),
            TooLarge,
            "a name of 1048576 bytes, at most 4096",
        ),
        (tensor("a", &dims), TooLarge, "more than 16 dimensions"),
        (
            format!(r#"{{"__metadata__":{{{}}}}}"#, keys.join(",")),
            TooLarge,
            "more than 65536 metadata",
        ),
        (tensor("a\\u0085", "0"), Malformed, "control characters"),
        (
            tensor("a", "0").replace("F32", &long),
            Malformed,
            "not known",
        ),
        (
            tensor("a", &format!("\"{long}\"")),
            Malformed,
            "invalid type",
        ),
        (format!("[{}]", long), Malformed, "expected"),
        (
            r#"{"__metadata__":{"a":"","a":""}}"#.into(),
            Malformed,
            "twice",
        ),
        (
            r#"{"__metadata__":{},"__metadata__":{}}"#.into(),
            Malformed,
            "twice",
        ),
        (
            tensor("a", "0").replace("}}", "},") + &tensor("a", "0")[1..],
            Malformed,
            "tensor 'a': not",
        ),
    ] {
        let e = Container::read(&file(&header, 0)).unwrap_err();
        let shown = e.to_string();
        assert_eq!(e.kind(), kind, "{shown}");
        assert!(shown.contains(words) && shown.len() < 300, "{shown}");
    }
    let huge = [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat();
    let e = Container::read(&huge).unwrap_err();
    assert!(e.to_string().contains("at most 100000000"), "{e}");
}

/// The most tensors that there may be, and one more.
#[test]
fn the_number_of_tensors_is_capped() {
    let tensor =
        |i: usize| format!(r#""{i:07}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let header = |n: usize| {
        let tensors: Vec<String> = (0..n).map(tensor).collect();
        file(&format!("{{{}}}", tensors.join(",")), 0)
    };
    let container = Container::read(&header(MOST_TENSORS)).unwrap();
    assert_eq!(container.iter().len(), MOST_TENSORS);
    let e = Container::read(&header(MOST_TENSORS + 1)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TooLarge, "{e}");
}
