use serde_json::json;

use super::*;

fn tokenizer_json(prefix: bool) -> String {
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for token in ["▁", "a", "b", "é", "ab", "▁a", "▁ab"] {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let mut normalizers = vec![replace];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let file = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": [["a", "b"], ["▁", "ab"], ["▁", "a"]]},
    });
    file.to_string()
}

/// Creates a vocabulary like sentencepiece's: `▁` for spaces, a token for each byte.
fn sentencepiece(prefix: bool) -> Tokenizer {
    let special = SpecialIds {
        bos: Some(1),
        eos: vec![2],
    };
    let config = r#"{"add_bos_token": true}"#;
    Tokenizer::from_json(tokenizer_json(prefix).as_bytes(), Some(config), special).unwrap()
}

/// Returns the pieces of the stream, after comparing them with the decoding of the whole.
fn stream(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
    let mut stream = tokenizer.decode_stream(skip);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    assert_eq!(
        pieces.concat(),
        tokenizer.decode(ids, skip).unwrap(),
        "{ids:?} {pieces:?}"
    );
    pieces
}

#[test]
fn encodes_with_and_without_special_tokens() {
    let t = sentencepiece(true);
    let [space, a, ab_word] = ["▁", "a", "▁ab"].map(|s| t.token_to_id(s).unwrap());
    assert_eq!(t.encode("ab", false).unwrap(), [ab_word]);
    assert_eq!(t.encode("ab", true).unwrap(), [1, ab_word]);
    // Truncation in the file is ignored.
    assert_eq!(t.encode("ab ab ab ab ab ab", false).unwrap(), [ab_word; 6]);
    // The text after a special token gets the space prefix again, as in llama.cpp.
    assert_eq!(t.encode("</s>ab", false).unwrap(), [2, ab_word]);
    let plain = t.encode_as("</s>", false, SpecialText::Plain).unwrap();
    assert_eq!(plain.first(), Some(&space));
    assert!(!plain.contains(&2));
    assert_eq!(t.decode(&plain, true).unwrap(), "</s>");
    // Without a token, it is encoded as bytes.
    assert_eq!(t.encode("ü", false).unwrap(), [space, 3 + 0xC3, 3 + 0xBC]);
    assert_eq!((t.vocab_size(), t.id_to_token(a)), (266, Some("a".into())));
    assert!(t.is_special(1) && !t.is_special(a) && t.is_eos(2) && !t.is_eos(1));
    assert!(t.encode("", false).unwrap().is_empty());
    assert_eq!(t.decode(&[], false).unwrap(), "");
}

#[test]
fn streams_spaces_and_bytes() {
    let t = sentencepiece(true);
    let [space, a, ab_word] = ["▁", "a", "▁ab"].map(|s| t.token_to_id(s).unwrap());
    assert_eq!(
        stream(&t, &[ab_word, ab_word, space, ab_word], false),
        ["ab", " ab", " ", " ab", ""]
    );
    assert_eq!(
        stream(&t, &[space, space, space, ab_word], false),
        ["", " ", " ", " ab", ""]
    );
    // Special tokens between words do not remove the space after them.
    assert_eq!(
        stream(&t, &[1, ab_word, 2, ab_word, 1], true),
        ["", "ab", "", " ab", "", ""]
    );
    assert_eq!(stream(&t, &[1, ab_word], false), ["<s>", " ab", ""]);
    // Bytes wait for the end of their run: one invalid byte would change all of it.
    assert_eq!(
        stream(&t, &[a, 3 + 0xC3, 3 + 0xBC, a], false),
        ["a", "", "", "üa", ""]
    );
    assert_eq!(
        stream(&t, &[a, 3 + 0xC3, 3 + 0xBC, 3 + 0xFF, a], false),
        ["a", "", "", "", "\u{FFFD}\u{FFFD}\u{FFFD}a", ""]
    );
    assert_eq!(stream(&t, &[3 + 0xC3], false), ["", "\u{FFFD}"]);
    // Rows of the embedding without a token.
    assert_eq!(
        stream(&t, &[ab_word, 9999, ab_word], false),
        ["ab", "", " ab", ""]
    );
}

/// With any ids in any order, the stream equals the decoding of the whole.
#[test]
fn streams_equal_the_whole() {
    for t in [sentencepiece(true), sentencepiece(false)] {
        let mut state = 1_u32;
        for _ in 0..2000 {
            let ids: Vec<u32> = (0..12)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let pick = state >> 16;
                    match pick % 4 {
                        0 => 3 + pick / 4 % 256,
                        1 => pick / 4 % 3,
                        _ => 259 + pick / 4 % 7,
                    }
                })
                .collect();
            stream(&t, &ids, false);
            stream(&t, &ids, true);
        }
    }
}

#[test]
fn endless_broken_bytes_are_given_up() {
    let t = sentencepiece(true);
    let mut stream = t.decode_stream(false);
    let given: usize = (0..1000)
        .map(|_| stream.push(3 + 0xFF).unwrap().len())
        .sum();
    assert_eq!(given, 1000 / MAX_PENDING_IN_TEST * MAX_PENDING_IN_TEST * 3);
}

const MAX_PENDING_IN_TEST: usize = 256;

/// In transformers 5.24 a text gets the tokens of tokenizer_config.json, and answers end with
/// the ids of the model's configuration.
///
/// These differ in published models. Here an answer ends at both, as in llama.cpp.
#[test]
fn texts_begin_and_end_with_the_tokens_of_the_tokenizer() {
    let with = |config: &str| {
        let special = SpecialIds {
            bos: Some(2),
            eos: vec![0, 1],
        };
        let json = tokenizer_json(true);
        let t = Tokenizer::from_json(json.as_bytes(), Some(config), special).unwrap();
        let ids = t.encode("ab", true).unwrap();
        let spelled = [t.bos_token(), t.eos_token()].map(|t| t.map(str::to_owned));
        assert_eq!(t.special_ids().eos, [0, 1, 2]);
        (ids, spelled)
    };
    let text = |t: &str| Some(t.to_owned());
    let ab = 3 + 256 + 6;
    let (ids, spelled) = with(
        r#"{"add_bos_token": true, "add_eos_token": true, "bos_token": "<s>",
            "eos_token": {"content": "</s>"}}"#,
    );
    assert_eq!(
        (ids, spelled),
        (vec![1, ab, 2], [text("<s>"), text("</s>")])
    );
    // The config says that there is none.
    let (ids, spelled) = with(r#"{"add_bos_token": true, "bos_token": null}"#);
    assert_eq!((ids, spelled), (vec![ab], [None, text("<unk>")]));
    // The config does not mention it, so the ids are used.
    let (ids, spelled) = with(r#"{"add_bos_token": true, "add_eos_token": true}"#);
    assert_eq!(
        (ids, spelled),
        (vec![2, ab, 0], [text("</s>"), text("<unk>")])
    );
}

#[test]
fn answers_end_at_every_token_that_ends_a_turn() {
    let mut json: Value = serde_json::from_str(&tokenizer_json(true)).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    for (id, content) in [(1, "<|eot_id|>"), (2, "<|pad|>")] {
        added[id]["content"] = content.into();
    }
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    for (from, to) in [
        ("<s>", "<|eot_id|>"),
        ("</s>", "<|pad|>"),
        ("ab", "<|end|>"),
    ] {
        let id = vocab.remove(from).unwrap();
        vocab.insert(to.to_owned(), id);
    }
    json["model"]["merges"] = json!([]);
    let eos = |config, named: &[u32]| {
        let special = SpecialIds {
            bos: None,
            eos: named.to_vec(),
        };
        let t = Tokenizer::from_json(json.to_string().as_bytes(), config, special).unwrap();
        assert_eq!(t.special_id("<|eot_id|>"), Some(1));
        assert_eq!((t.special_id("<|end|>"), t.special_id("a")), (None, None));
        t.special_ids().eos.clone()
    };
    // `<|end|>` is no special token of this vocabulary.
    assert_eq!(eos(None, &[]), [1]);
    assert_eq!(eos(None, &[5]), [5, 1]);
    assert_eq!(eos(Some(r#"{"eos_token": "<|pad|>"}"#), &[0, 1]), [0, 1, 2]);
    assert_eq!(eos(Some(r#"{"eos_token": null}"#), &[0]), [0, 1]);
}

#[test]
fn refuses_what_is_no_tokenizer() {
    let none = SpecialIds::default;
    let of = |json: &[u8], config| Tokenizer::from_json(json, config, none());
    let kind = |found: Result<Tokenizer>| found.unwrap_err().kind();
    for bad in [&b""[..], b"{", b"\xFF\xFE", b"[]", b"{}"] {
        assert_eq!(kind(of(bad, None)), ErrorKind::Malformed);
    }
    let empty = br#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
    assert!(of(empty, None).is_ok());
    assert_eq!(kind(of(empty, Some("{"))), ErrorKind::Malformed);
    assert_eq!(
        kind(of(br#"{"model": {"type": "no"}}"#, None)),
        ErrorKind::Unsupported
    );
    let special = SpecialIds {
        bos: None,
        eos: vec![7],
    };
    let found = Tokenizer::from_json(empty, None, special);
    assert_eq!(kind(found), ErrorKind::Invalid);
    // The crate would silently give this token the id 1.
    let moved = br#"{"version": "1.0", "added_tokens": [{"id": 9, "content": "<x>",
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true}], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
    assert_eq!(kind(of(moved, None)), ErrorKind::Invalid);
    let out = br#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0},
        "merges": [["a", "b"]]}}"#;
    assert_eq!(kind(of(out, None)), ErrorKind::Malformed);
}

/// Components that end the process or exhaust memory in the `tokenizers` crate.
#[test]
fn refuses_parts_that_do_harm() {
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaa"});
    let chain = |kind: &str, key: &str| json!({"type": kind, key: vec![&replace; 3]});
    for (part, value) in [
        (
            "normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ),
        (
            "normalizer",
            json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
        ),
        (
            "normalizer",
            json!({"type": "Replace", "pattern": {"Regex": "(?=)"}, "content": "x"}),
        ),
        (
            "normalizer",
            json!({"type": "Prepend", "prepend": "x".repeat(65)}),
        ),
        ("normalizer", chain("Sequence", "normalizers")),
        ("decoder", chain("Sequence", "decoders")),
        (
            "decoder",
            json!({"type": "Strip", "content": "a", "start": 1_u64 << 50, "stop": 0}),
        ),
        (
            "decoder",
            json!({"type": "Strip", "content": "a", "start": 0}),
        ),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Removed",
                                 "invert": false}),
        ),
        // Each step takes one character and looks at all of them.
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "(?:(a|a)*)b|a"}, "behavior": "Isolated",
                                 "invert": false}),
        ),
        (
            "pre_tokenizer",
            json!({"type": "Sequence", "pretokenizers": vec![json!({"type": "Digits"}); 64]}),
        ),
        ("post_processor", json!({"type": "Unknown"})),
        ("post_processor", template(&["B"], 1)),
        ("post_processor", template(&["A", "B"], 1)),
        ("post_processor", template(&["A", "A"], 1)),
        ("post_processor", template(&[], 1)),
        ("post_processor", template(&["A"], 65)),
        (
            "post_processor",
            json!({"type": "Sequence", "processors": vec![template(&["A"], 1); 2]}),
        ),
        (
            "post_processor",
            json!({"type": "Sequence", "processors": [{"type": "Sequence", "processors":
                [template(&["A"], 1)]}, {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}]}),
        ),
        ("pre_tokenizer", json!("ByteLevel")),
    ] {
        let mut file: Value = serde_json::from_str(&tokenizer_json(true)).unwrap();
        file[part] = value;
        let e = Tokenizer::from_json(file.to_string().as_bytes(), None, SpecialIds::default());
        assert_eq!(
            e.unwrap_err().kind(),
            ErrorKind::Unsupported,
            "{}",
            file[part]
        );
    }
    for (field, value) in [
        ("type", json!("Unigram")),
        ("continuing_subword_prefix", json!("##")),
        ("end_of_word_suffix", json!("</w>")),
        ("dropout", json!(0.5)),
    ] {
        let mut file: Value = serde_json::from_str(&tokenizer_json(true)).unwrap();
        file["model"][field] = value;
        let e = Tokenizer::from_json(file.to_string().as_bytes(), None, SpecialIds::default());
        assert_eq!(e.unwrap_err().kind(), ErrorKind::Unsupported, "{field}");
    }
    let deep = (0..20).fold(
        json!({"type": "Fuse"}),
        |inner, _| json!({"type": "Sequence", "decoders": [inner]}),
    );
    let mut file: Value = serde_json::from_str(&tokenizer_json(true)).unwrap();
    file["decoder"] = deep;
    let e = Tokenizer::from_json(file.to_string().as_bytes(), None, SpecialIds::default());
    assert_eq!(e.unwrap_err().kind(), ErrorKind::Unsupported);
}

/// Creates a post-processor that concatenates ids and these texts.
fn template(texts: &[&str], ids: usize) -> Value {
    let token = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let texts = texts
        .iter()
        .map(|text| json!({"Sequence": {"id": text, "type_id": 0}}));
    let single: Vec<_> = [token].into_iter().chain(texts).collect();
    let special = json!({"<s>": {"id": "<s>", "ids": vec![1; ids], "tokens": vec!["<s>"; ids]}});
    json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special})
}

#[test]
fn a_template_puts_its_ids_around_a_text() {
    let mut file: Value = serde_json::from_str(&tokenizer_json(true)).unwrap();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false});
    file["post_processor"] =
        json!({"type": "Sequence", "processors": [byte_level, template(&["A"], 64)]});
    let tokenizer = Tokenizer::from_json(file.to_string().as_bytes(), None, SpecialIds::default());
    let tokenizer = tokenizer.unwrap();
    let ids = tokenizer.encode("ab", true).unwrap();
    assert_eq!(ids[..64], [1; 64]);
    assert_eq!(ids[64..], tokenizer.encode("ab", false).unwrap());
}

/// Tokens that would be found everywhere, or with a negative length: the crate panics or
/// exhausts memory.
#[test]
fn refuses_added_tokens_that_cannot_be_found() {
    let added = |content: &str, lstrip: bool, rstrip: bool, normalized: bool| {
        json!({"id": 0, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": rstrip,
               "normalized": normalized, "special": false})
    };
    let file = |normalizer: Value, mut tokens: Vec<Value>| {
        let mut file: Value = serde_json::from_str(&tokenizer_json(true)).unwrap();
        file["normalizer"] = normalizer;
        let vocab = file["model"]["vocab"].as_object().unwrap().len();
        for (i, token) in tokens.iter_mut().enumerate() {
            token["id"] = json!(vocab + i);
        }
        let all = file["added_tokens"].as_array_mut().unwrap();
        all.extend(tokens);
        let bytes = file.to_string();
        Tokenizer::from_json(bytes.as_bytes(), None, SpecialIds::default())
    };
    let without_z = json!({"type": "Replace", "pattern": {"String": "z"}, "content": ""});
    let strip = json!({"type": "Strip", "strip_left": true, "strip_right": true});
    for (normalizer, tokens) in [
        (without_z.clone(), vec![added("zz", false, false, true)]),
        (without_z.clone(), vec![added("zz", true, false, true)]),
        (strip, vec![added("  ", false, false, true)]),
        (
            Value::Null,
            vec![
                added("x", false, true, false),
                added(" ", true, false, false),
            ],
        ),
    ] {
        let error = file(normalizer, tokens).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    // Without normalization it is found unchanged.
    let tokenizer = file(without_z, vec![added("zz", false, true, false)]).unwrap();
    let found = tokenizer.encode("a zz  b", false).unwrap();
    let id = tokenizer.token_to_id("zz").unwrap();
    assert_eq!(found.iter().filter(|&&token| token == id).count(), 1);
}

#[test]
fn refuses_texts_above_the_caps() {
    let t = sentencepiece(true);
    for bad in [
        "a ".repeat(MAX_TEXT_BYTES / 2 + 1),
        " ".repeat(MAX_RUN_CHARS + 1),
        "a".repeat(MAX_RUN_CHARS + 1),
    ] {
        let e = t.encode(&bad, false).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TooLarge);
    }
}
