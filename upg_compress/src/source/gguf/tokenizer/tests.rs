use upg_kernel::inference::tokenizer::{MAX_RUN_CHARS, SpecialText, Tokenizer};

use super::*;
use serde_json::{Value, json};

fn load(vocab: &GgufVocab) -> Tokenizer {
    let files = vocab.to_tokenizer_files().unwrap();
    Tokenizer::from_json(
        &files.tokenizer_json,
        Some(&files.tokenizer_config_json),
        files.special,
    )
    .unwrap()
}

fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(|&s| s.to_owned()).collect()
}

/// Creates a byte-level vocabulary: ASCII, a few words, three special tokens.
fn byte_level(pre: &str) -> GgufVocab {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(strings(&[
        "Ġ", "Ċ", "Ã", "©", "Ġa", "ab", "12", "123", "ĠĠ",
    ]));
    let n = tokens.len();
    tokens.extend(strings(&["<|x|>", "<think>", "<|im_end|>"]));
    let mut token_types = vec![1; n];
    token_types.extend([3, 4, 3]);
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some(pre.to_owned()),
        tokens,
        token_types,
        merges: strings(&["Ġ a", "a b", "1 2", "12 3", "Ġ Ġ"]),
        eos: Some(n as u32),
        ..GgufVocab::default()
    }
}

fn spelled(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, false).unwrap();
    ids.iter()
        .map(|&id| tokenizer.id_to_token(id).unwrap())
        .collect()
}

#[test]
fn pre_tokenizers_cut_as_named() {
    // (name, spelling of "123", spelling of "x a")
    for (pre, digits, spaces) in [
        ("smollm", &["1", "2", "3"][..], &["x", "Ġ", "Ġa"][..]),
        ("gpt-2", &["123"], &["x", "Ġ", "Ġa"]),
        ("default", &["123"], &["x", "Ġ", "Ġa"]),
        ("llama-bpe", &["123"], &["x", "Ġ", "Ġa"]),
        ("dbrx", &["123"], &["x", "Ġ", "Ġa"]),
        ("gpt-4o", &["123"], &["x", "Ġ", "Ġa"]),
        ("qwen2", &["1", "2", "3"], &["x", "Ġ", "Ġa"]),
        ("tekken", &["1", "2", "3"], &["x", "Ġ", "Ġa"]),
    ] {
        let mut vocab = byte_level(pre);
        vocab.add_bos = Some(false);
        let t = load(&vocab);
        assert_eq!(spelled(&t, "123"), digits, "{pre}");
        assert_eq!(spelled(&t, "x  a"), spaces, "{pre}");
        assert_eq!(spelled(&t, "é\n"), ["Ã", "©", "Ċ"], "{pre}");
        assert_eq!(
            spelled(&t, "a<|x|>b<think> ab"),
            ["a", "<|x|>", "b", "<think>", "Ġa", "b"],
            "{pre}"
        );
        let text = "a<|x|>b<think> é  12";
        let ids = t.encode(text, false).unwrap();
        assert_eq!(t.decode(&ids, false).unwrap(), text);
        assert_eq!(t.decode(&ids, true).unwrap(), "ab<think> é  12");
    }
    // As in llama.cpp, a missing name is the default one.
    let mut vocab = byte_level("default");
    let named = vocab.to_tokenizer_files().unwrap().tokenizer_json;
    vocab.pre = None;
    assert_eq!(vocab.to_tokenizer_files().unwrap().tokenizer_json, named);
    assert_eq!(spelled(&load(&vocab), "1231a"), ["123", "1", "a"]);
    // Only in one of them words end at a capital.
    let mut vocab = byte_level("gpt-4o");
    vocab.merges.push("b C".to_owned());
    vocab.tokens.push("bC".to_owned());
    vocab.token_types.push(1);
    assert_eq!(spelled(&load(&vocab), "bC"), ["b", "C"]);
    vocab.pre = Some("qwen2".to_owned());
    assert_eq!(spelled(&load(&vocab), "bC"), ["bC"]);
}

/// The regex engine gives up on far longer runs, and the rest would stay unsplit.
#[test]
fn the_longest_runs_are_cut() {
    for pre in ["smollm", "gpt-2", "llama-bpe", "gpt-4o", "qwen2", "tekken"] {
        let mut vocab = byte_level(pre);
        vocab.add_bos = Some(false);
        // Merged in a text that is not split.
        vocab.merges.insert(0, "b 1".to_owned());
        vocab.tokens.push("b1".to_owned());
        vocab.token_types.push(1);
        let t = load(&vocab);
        let cut = ["b", "1"];
        for run in [" ", "A", "1", "-", "\n"] {
            let text = run.repeat(MAX_RUN_CHARS - 1) + "\nb1";
            let found = spelled(&t, &text);
            assert_eq!(found[found.len() - cut.len()..], cut, "{pre} {run:?}");
        }
    }
}

#[test]
fn whole_words_are_taken_unmerged_where_the_family_says() {
    let mut vocab = byte_level("dbrx");
    vocab.tokens.push("cab".to_owned());
    vocab.token_types.push(1);
    assert_eq!(spelled(&load(&vocab), "cab"), ["c", "ab"]);
    vocab.pre = Some("llama-bpe".to_owned());
    vocab.add_bos = Some(false);
    assert_eq!(spelled(&load(&vocab), "cab"), ["cab"]);
}

#[test]
fn special_tokens_and_configuration() {
    let mut vocab = byte_level("llama-bpe");
    let n = vocab.tokens.len() as u32;
    vocab.bos = Some(n - 3);
    vocab.pad = Some(n - 1);
    vocab.chat_template = Some("{{ messages }}".to_owned());
    let files = vocab.to_tokenizer_files().unwrap();
    let special = SpecialIds {
        bos: Some(n - 3),
        eos: vec![n - 3, n - 1],
    };
    assert_eq!(files.special, special);
    let config: Value = serde_json::from_str(&files.tokenizer_config_json).unwrap();
    assert_eq!(config["bos_token"], "<|x|>");
    assert_eq!(config["pad_token"], "<|im_end|>");
    assert_eq!(config["add_bos_token"], true);
    assert_eq!(config["chat_template"], "{{ messages }}");
    assert_eq!(config.get("unk_token"), None);
    let t = load(&vocab);
    assert_eq!(t.encode("", true).unwrap(), [n - 3]);
    assert!(t.is_special(n - 1) && !t.is_special(n - 2));
    vocab.add_eos = Some(true);
    assert_eq!(load(&vocab).encode("!", true).unwrap(), [n - 3, 0, n - 3]);
}

/// Creates a sentencepiece vocabulary: bytes, letters, and words whose scores decrease with
/// their ids.
fn sentencepiece() -> GgufVocab {
    let mut tokens = strings(&["<unk>", "<s>", "</s>"]);
    let mut token_types = vec![2, 3, 3];
    for byte in 0..=u8::MAX {
        tokens.push(format!("<0x{byte:02X}>"));
        token_types.push(6);
    }
    let mut scores = vec![0.0; tokens.len()];
    let pieces = [
        "▁t",
        "he",
        "in",
        "▁a",
        "▁the",
        "er",
        "on",
        "an",
        "▁▁",
        "in▁",
        "the",
        "▁▁▁▁",
        "and",
        "▁and",
        "ing",
        "thing",
        "▁in",
        "o",
        "n",
        "e",
        "t",
        "a",
        "h",
        "i",
        "g",
        "d",
        "r",
        "▁",
    ];
    for (rank, piece) in pieces.iter().enumerate() {
        tokens.push((*piece).to_owned());
        token_types.push(1);
        scores.push(-(rank as f32));
    }
    GgufVocab {
        model: "llama".to_owned(),
        tokens,
        token_types,
        scores,
        ..GgufVocab::default()
    }
}

/// Tokenizes like llama.cpp (`llm_tokenizer_spm_session`) in its plainest form.
///
/// Merges the neighbours whose token has the best score, at a tie the leftmost,
/// until none make a token.
fn by_scores(vocab: &GgufVocab, text: &str) -> Vec<u32> {
    let find = |s: &str| vocab.tokens.iter().position(|t| t == s);
    let text = format!(" {text}").replace(' ', "▁");
    let mut symbols: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for i in 1..symbols.len() {
            if let Some(id) = find(&symbols[i - 1..=i].concat())
                && best.is_none_or(|(score, _)| vocab.scores[id] > score)
            {
                best = Some((vocab.scores[id], i - 1));
            }
        }
        let Some((_, i)) = best else { break };
        let right = symbols.remove(i + 1);
        symbols[i].push_str(&right);
    }
    let ids = |s: &String| match find(s) {
        Some(id) => vec![id as u32],
        None => s.bytes().map(|b| 3 + u32::from(b)).collect(),
    };
    symbols.iter().flat_map(ids).collect()
}

#[test]
fn sentencepiece_merges_by_score() {
    let vocab = sentencepiece();
    let t = load(&vocab);
    assert_eq!(spelled(&t, "the thing"), ["▁the", "▁t", "h", "ing"]);
    assert_eq!(spelled(&t, "ü"), ["▁", "<0xC3>", "<0xBC>"]);
    assert_eq!(t.encode("the", true).unwrap()[0], 1);
    let mut state = 7_u32;
    let letters: Vec<char> = "theingand  oré\n<>".chars().collect();
    for _ in 0..500 {
        let text: String = (0..40)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                letters[(state >> 16) as usize % letters.len()]
            })
            .collect();
        let ids = t.encode(&text, false).unwrap();
        assert_eq!(ids, by_scores(&vocab, &text), "{text:?}");
        assert_eq!(t.decode(&ids, false).unwrap(), text);
    }
}

/// Returns the merges of a vocabulary as pairs of ids, by trying every split of every token.
fn plain_merges(vocab: &GgufVocab) -> Vec<(usize, usize)> {
    let find = |text: &str| {
        let id = vocab.tokens.iter().position(|token| token == text)?;
        [1, 4, 5].contains(&vocab.token_types[id]).then_some(id)
    };
    let mut found = Vec::new();
    for (id, token) in vocab.tokens.iter().enumerate() {
        if find(token).is_none() {
            continue;
        }
        let first = found.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (find(left), find(right)) {
                found.push((vocab.scores[id] + 0.0, left.chars().count(), l, r));
            }
        }
        found[first..].sort_by_key(|&(_, _, l, r)| (l, r));
    }
    let right = |r: usize| vocab.tokens[r].chars().count();
    found.sort_by(|a, b| {
        let by_score = b.0.total_cmp(&a.0).then(b.1.cmp(&a.1));
        by_score.then(right(b.3).cmp(&right(a.3)))
    });
    found.into_iter().map(|(_, _, l, r)| (l, r)).collect()
}

#[test]
fn implied_merges_are_all_splits_into_two_tokens() {
    let mut state = 11_u32;
    let mut random = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % below
    };
    let mut most = 0;
    for round in 0..50 {
        let mut vocab = GgufVocab {
            model: "llama".to_owned(),
            ..GgufVocab::default()
        };
        for _ in 0..120 {
            let letters = if round == 0 { 1 } else { 3 };
            let word = 0..random(if round == 0 { 60 } else { 7 });
            let token: String = word
                .map(|_| ['a', 'é', 'b'][random(letters) as usize])
                .collect();
            if !vocab.tokens.contains(&token) {
                vocab.tokens.push(token);
                vocab
                    .token_types
                    .push([1, 1, 1, 4, 5, 2, 3, 6][random(8) as usize]);
                vocab
                    .scores
                    .push([0.0, -0.0, -1.0, 3.5, f32::INFINITY][random(5) as usize]);
            }
        }
        let files = vocab.to_tokenizer_files().unwrap();
        let json: Value = serde_json::from_slice(&files.tokenizer_json).unwrap();
        let expected = plain_merges(&vocab);
        most = most.max(expected.len());
        let texts = expected
            .iter()
            .map(|&(l, r)| json!([vocab.tokens[l], vocab.tokens[r]]));
        assert_eq!(json["model"]["merges"], Value::Array(texts.collect()));
        let ids = vocab
            .tokens
            .iter()
            .enumerate()
            .map(|(id, token)| (token.clone(), json!(id)));
        assert_eq!(json["model"]["vocab"], Value::Object(ids.collect()));
    }
    assert!(most > 100, "{most}");
}

/// The merges that a short vocabulary implies are limited by their bytes.
#[test]
fn implied_merges_are_capped_by_their_bytes() {
    let tokens: Vec<String> = (1..500).map(|n| "a".repeat(n)).collect();
    let vocab = GgufVocab {
        model: "llama".to_owned(),
        scores: vec![0.0; tokens.len()],
        tokens,
        ..GgufVocab::default()
    };
    let e = vocab.to_tokenizer_files().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TooLarge, "{e}");
}

#[test]
fn sentencepiece_space_prefix_and_special_tokens() {
    let mut vocab = sentencepiece();
    let t = load(&vocab);
    assert_eq!(spelled(&t, "a</s>a"), ["▁a", "</s>", "▁a"]);
    let plain = t.encode_as("<s>", false, SpecialText::Plain).unwrap();
    assert!(!plain.contains(&1));
    vocab.add_space_prefix = Some(false);
    vocab.add_bos = Some(false);
    let t = load(&vocab);
    assert_eq!(spelled(&t, "a a"), ["a", "▁a"]);
    assert_eq!(t.encode("a", true).unwrap(), t.encode("a", false).unwrap());
    let ids = t.encode(" a", false).unwrap();
    assert_eq!(t.decode(&ids, false).unwrap(), " a");
}

#[test]
fn refuses_broken_vocabularies() {
    let check = |edit: &dyn Fn(&mut GgufVocab), kind: ErrorKind, words: &str| {
        for mut vocab in [byte_level("gpt-2"), sentencepiece()] {
            vocab.merges.push("a b".to_owned());
            edit(&mut vocab);
            let e = vocab.to_tokenizer_files().unwrap_err();
            assert_eq!(e.kind(), kind, "{e}");
            assert!(e.to_string().contains(words), "{e}");
        }
    };
    let (invalid, missing) = (ErrorKind::Invalid, ErrorKind::Missing);
    check(
        &|v| v.model = "bert".into(),
        ErrorKind::Unsupported,
        "'bert'",
    );
    check(&|v| v.tokens.clear(), missing, "tokens");
    check(
        &|v| v.tokens[9] = v.tokens[4].clone(),
        invalid,
        "ids 4 and 9",
    );
    check(
        &|v| v.tokens[9] = "x".repeat(5000),
        ErrorKind::TooLarge,
        "token 9",
    );
    check(&|v| v.token_types[3] = 7, invalid, "token 3 is 7");
    check(&|v| v.token_types[3] = -1, invalid, "token 3 is -1");
    check(&|v| v.token_types.truncate(9), invalid, "token_type");
    check(&|v| v.scores = vec![0.0], invalid, "scores");
    check(
        &|v| v.bos = Some(1_000_000),
        invalid,
        "bos_token_id is 1000000",
    );
    check(&|v| v.eos = Some(u32::MAX), invalid, "eos_token_id");
    check(&|v| v.unk = Some(1_000_000), invalid, "unknown_token_id");
    check(&|v| v.pad = Some(1_000_000), invalid, "padding_token_id");

    let bytes = |edit: &dyn Fn(&mut GgufVocab), kind: ErrorKind, words: &str| {
        let mut vocab = byte_level("gpt-2");
        edit(&mut vocab);
        let e = vocab.to_tokenizer_files().unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(e.to_string().contains(words), "{e}");
    };
    bytes(
        &|v| v.pre = Some("new".into()),
        ErrorKind::Unsupported,
        "'new'",
    );
    bytes(&|v| v.merges.clear(), missing, "merges");
    bytes(&|v| v.merges.push("a é".into()), invalid, "'é'");
    bytes(&|v| v.merges.push("c d".into()), invalid, "'cd'");
    bytes(&|v| v.merges.push("ab".into()), invalid, "two tokens");
    bytes(&|v| v.merges.push(String::new()), invalid, "two tokens");
    bytes(&|v| v.tokens[5] = "\u{FFFD}".into(), invalid, "U+FFFD");
    bytes(&|v| v.add_bos = Some(true), missing, "bos");

    let mut vocab = sentencepiece();
    vocab.scores[270] = f32::NAN;
    let e = vocab.to_tokenizer_files().unwrap_err();
    assert_eq!(e.kind(), invalid);
    vocab.scores.clear();
    let e = vocab.to_tokenizer_files().unwrap_err();
    assert_eq!(e.kind(), missing);
}
