use super::*;
use crate::job::compress::compress;
use crate::plan::options::Choice;
use crate::sensitivity::calibration::Calibration;
use crate::source::synthetic::SyntheticSource;
use upg_kernel::format::Encoding;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 96, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 48,
    "max_position_embeddings": 64, "vocab_size": 256, "hidden_act": "silu",
    "tie_word_embeddings": false}"#;

#[test]
fn the_size_of_the_file_is_known() {
    let source = SyntheticSource::new(CONFIG, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    let choices = Encoding::ALL.map(Choice::Encode);
    for choice in choices.into_iter().chain([Choice::Keep]) {
        let options = CompressOptions::new(choice);
        let preflight = Preflight::new(&source, &out, &options).unwrap();
        preflight.check().unwrap();
        let report = compress(&source, &out, &options, &()).unwrap();
        let (stated, found) = (preflight.file_bytes, report.file_bytes);
        use Encoding::{MdCsr, S4, S8};
        match choice {
            Choice::Encode(MdCsr | S8 | S4) => assert!(stated >= found, "{choice}"),
            _ => assert_eq!(stated, found, "{choice}"),
        }
        assert!(preflight.seconds.is_finite() && preflight.seconds >= 0.0);
    }
}

#[test]
fn tensors_of_layers_are_counted_together() {
    let source = SyntheticSource::new(CONFIG, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut options = CompressOptions::new(Choice::Encode(Encoding::T3));
    options.overrides = vec!["model.layers.1.mlp.down_proj.weight=q8".parse().unwrap()];
    let preflight = Preflight::new(&source, folder.path().join("model"), &options).unwrap();
    let found = |name: &str, encoding: &str| {
        let mut groups = preflight.groups.iter();
        let found = groups.find(|g| g.name == name && g.encoding == encoding);
        found.map(|group| (group.tensors, group.bytes))
    };
    let down = "model.layers.*.mlp.down_proj.weight";
    assert_eq!(found(down, "t3").unwrap().0, 1);
    // 96 rows in two strips of 64: including the padding to 128 columns, a prime per 64 of them,
    // and scales.
    assert_eq!(
        found(down, "q8"),
        Some((1, 2 * 64 * 128 + 2 * 64 * 2 + 4 * 96))
    );
    assert_eq!(
        found("model.layers.*.self_attn.q_proj.weight", "t3")
            .unwrap()
            .0,
        2
    );
    assert_eq!(found("model.norm.weight", "keep"), Some((1, 2 * 96)));
}

#[test]
fn what_cannot_fit_is_refused() {
    let source = SyntheticSource::new(CONFIG, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = CompressOptions::new(Choice::Keep);
    let mut preflight = Preflight::new(&source, folder.path().join("model"), &options).unwrap();
    preflight.memory_free = Some(preflight.memory.own - 1);
    let e = preflight.check().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TooLarge, "{e}");
    preflight.memory_free = None;
    preflight.disk_free = preflight.file_bytes - 1;
    let e = preflight.check().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io, "{e}");
    // An earlier run has written a part of it.
    preflight.written_bytes = 1;
    preflight.check().unwrap();
    preflight.temporary_bytes = preflight.temporary_free + 1;
    let e = preflight.check().unwrap_err();
    assert!(e.to_string().contains("temporary"), "{e}");
}

/// A calibration takes memory for its tokens: hidden states and their gradients.
#[test]
fn memory_grows_with_the_text() {
    let source = SyntheticSource::new(CONFIG, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let own = |tokens: Option<usize>| {
        let mut options = CompressOptions::new(Choice::Encode(Encoding::Q4));
        let calibration = tokens.map(|n| Calibration::new(vec![1; n], 64).unwrap());
        options.calibration = calibration;
        let preflight = Preflight::new(&source, folder.path().join("model"), &options);
        preflight.unwrap().memory.own
    };
    let (none, some, more) = (own(None), own(Some(1 << 12)), own(Some(1 << 17)));
    assert!(none < some && some < more);
    // And as much again that the allocator keeps.
    assert_eq!(more - some, ((1 << 17) - (1 << 12)) * 8 * 96 * 2);
}
