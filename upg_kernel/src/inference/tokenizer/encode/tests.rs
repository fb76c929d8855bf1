//! Encoding in pieces gives the ids of the whole.
//!
//! Tested with every kind of tokenizer, over texts of everything that pieces could change.
use super::super::SpecialIds;
use super::*;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const POSSESSIVE: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
/// The three expressions of DeepSeek V3.
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];
const DEEPSEEK: &str =
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Fragments that texts are made of.
const FRAGMENTS: &[&str] = &[
    "a",
    "b",
    "the",
    "Ab",
    "don't",
    "I'LL",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n",
    "\r\n",
    "\n\n",
    " \n",
    "\n ",
    "\t",
    "\r",
    "\u{a0}",
    "\u{3000}",
    "\u{2028}",
    "1",
    "23",
    "4567",
    "½",
    "²",
    "!",
    "?!",
    ".",
    "/",
    "//",
    "'",
    "_",
    "中",
    "文字",
    "ですか",
    "é",
    "e\u{301}",
    "\u{301}",
    "ʰ",
    "👩\u{200d}👩\u{200d}👧",
    "🇩🇪",
    "\u{0}",
    "\u{7f}",
    "▁",
    "▁▁",
    "<s>",
    "</s>",
    "<|x|>",
    "<pad>",
    " <pad> ",
    "ﬁ",
    "Å",
    "ǅ",
    "क्षि",
    "العربية",
];

/// Random generator with a fixed sequence.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % n
    }

    fn text(&mut self, fragments: usize) -> String {
        (0..fragments)
            .map(|_| FRAGMENTS[self.below(FRAGMENTS.len())])
            .collect()
    }
}

/// Trains a vocabulary of `alphabet` with merges of the most frequent pairs of a text,
/// including those across words.
fn trained(
    alphabet: impl IntoIterator<Item = String>,
    text: &str,
    merges: usize,
) -> (Value, Value) {
    let mut vocab: Vec<String> = alphabet.into_iter().collect();
    vocab.sort();
    let known: HashSet<String> = vocab.iter().cloned().collect();
    let mut words: Vec<String> = text
        .chars()
        .map(String::from)
        .filter(|c| known.contains(c))
        .collect();
    let mut pairs = Vec::new();
    for _ in 0..merges {
        let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
        for pair in words.windows(2) {
            *counts.entry((&pair[0], &pair[1])).or_default() += 1;
        }
        let most = counts
            .into_iter()
            .max_by_key(|&(pair, count)| (count, pair));
        let Some(((a, b), _)) = most else { break };
        let (a, b) = (a.to_owned(), b.to_owned());
        let joined = format!("{a}{b}");
        let mut next: Vec<String> = Vec::with_capacity(words.len());
        for word in words {
            match next.last_mut() {
                Some(last) if *last == a && word == b => last.push_str(&word),
                _ => next.push(word),
            }
        }
        words = next;
        if !vocab.contains(&joined) {
            vocab.push(joined);
        }
        pairs.push(json!([a, b]));
    }
    let vocab: serde_json::Map<_, _> = vocab
        .into_iter()
        .zip(0..)
        .map(|(t, id)| (t, json!(id)))
        .collect();
    (json!(vocab), json!(pairs))
}

fn file(
    normalizer: Value,
    pre_tokenizer: Value,
    (vocab, merges): (Value, Value),
    more: Value,
) -> Value {
    let mut vocab = vocab;
    let mut added = Vec::new();
    let tokens = [
        json!({"content": "<s>"}),
        json!({"content": "</s>", "rstrip": true}),
        json!({"content": "<|x|>", "normalized": true}),
        json!({"content": "<pad>", "lstrip": true, "rstrip": true}),
    ];
    for token in tokens {
        let id = vocab.as_object().unwrap().len();
        let text = token["content"].as_str().unwrap().to_owned();
        vocab[&text] = json!(id);
        let mut whole = json!({"id": id, "single_word": false, "lstrip": false, "rstrip": false,
                               "normalized": false, "special": true});
        token
            .as_object()
            .unwrap()
            .iter()
            .for_each(|(k, v)| whole[k] = v.clone());
        added.push(whole);
    }
    let id = |token: &str| vocab[token].clone();
    let special = |token: &str| json!({"id": token, "ids": [id(token)], "tokens": [token]});
    let mut model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab, "merges": merges});
    more.as_object()
        .unwrap()
        .iter()
        .for_each(|(k, v)| model[k] = v.clone());
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": special("<s>"), "</s>": special("</s>")}},
        "decoder": null, "model": model,
    })
}

fn load(file: &Value) -> Tokenizer {
    let bytes = file.to_string();
    Tokenizer::from_json(bytes.as_bytes(), None, SpecialIds::default()).unwrap()
}

/// Byte-level files with all possible steps before the bytes.
fn byte_level_files() -> Vec<(String, Value, bool)> {
    let text = Random(1).text(3000);
    let spelled: String = {
        let mut text = NormalizedString::from(text);
        tokenizers::normalizers::ByteLevel::new()
            .normalize(&mut text)
            .unwrap();
        text.get().to_owned()
    };
    let alphabet = || ByteLevel::alphabet().into_iter().map(String::from);
    let vocab = trained(alphabet(), &spelled, 300);
    let bytes = |prefix: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
    let split = |e: &str| json!({"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated", "invert": false});
    let inverted = |e: &str| json!({"type": "Split", "pattern": {"Regex": e}, "behavior": "Removed", "invert": true});
    let digits = |one: bool| json!({"type": "Digits", "individual_digits": one});
    let steps = |steps: &[Value]| json!({"type": "Sequence", "pretokenizers": steps});
    let nfc = json!({"type": "NFC"});
    let mut files = Vec::new();
    for (name, normalizer, pre_tokenizer, is_cut) in [
        ("gpt-2", Value::Null, bytes(false, true), true),
        (
            "gpt-2 with a space before",
            Value::Null,
            bytes(true, true),
            true,
        ),
        (
            "digits",
            Value::Null,
            steps(&[digits(true), bytes(false, true)]),
            true,
        ),
        (
            "digits with a space before",
            Value::Null,
            steps(&[digits(false), bytes(true, true)]),
            true,
        ),
        (
            "llama 3",
            Value::Null,
            steps(&[split(LLAMA3), bytes(false, false)]),
            true,
        ),
        (
            "llama 3, the rest removed",
            Value::Null,
            steps(&[inverted(LLAMA3), bytes(false, false)]),
            true,
        ),
        (
            "qwen",
            nfc.clone(),
            steps(&[split(LLAMA3), bytes(false, false)]),
            true,
        ),
        (
            "o200k",
            Value::Null,
            steps(&[split(GPT4O), bytes(false, false)]),
            true,
        ),
        (
            "possessive",
            Value::Null,
            steps(&[split(POSSESSIVE), bytes(false, false)]),
            true,
        ),
        (
            "deepseek",
            Value::Null,
            steps(&[split(r"\p{N}{1,3}"), split(DEEPSEEK), bytes(false, false)]),
            true,
        ),
        (
            "deepseek 3",
            Value::Null,
            steps(&[
                split(DEEPSEEK3[0]),
                split(DEEPSEEK3[1]),
                split(DEEPSEEK3[2]),
                bytes(false, false),
            ]),
            true,
        ),
        (
            "deepseek coder",
            Value::Null,
            steps(&[
                split(r"[\r\n]"),
                split(r"\s?\p{L}+"),
                split(r"\s?\p{P}+"),
                split(r"[一-龥ࠀ-一가-퟿]+"),
                digits(true),
                bytes(false, false),
            ]),
            false,
        ),
        (
            "prepended",
            json!({"type": "Prepend", "prepend": "b"}),
            bytes(false, true),
            true,
        ),
        (
            "punctuation",
            Value::Null,
            steps(&[
                json!({"type": "Punctuation", "behavior": "MergedWithNext"}),
                digits(false),
                bytes(false, true),
            ]),
            true,
        ),
        (
            "falcon",
            Value::Null,
            steps(&[
                json!({"type": "Punctuation", "behavior": "Contiguous"}),
                bytes(false, true),
                digits(false),
                split("[0-9][0-9][0-9]"),
            ]),
            false,
        ),
        (
            "compatibility",
            json!({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}),
            bytes(false, true),
            true,
        ),
        (
            "bloom",
            Value::Null,
            steps(&[split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), bytes(false, false)]),
            false,
        ),
        (
            "white space",
            Value::Null,
            steps(&[json!({"type": "Whitespace"}), bytes(false, false)]),
            true,
        ),
        (
            "white space only",
            Value::Null,
            steps(&[json!({"type": "WhitespaceSplit"}), bytes(false, false)]),
            true,
        ),
        (
            "scripts",
            Value::Null,
            steps(&[json!({"type": "UnicodeScripts"}), bytes(false, true)]),
            false,
        ),
        ("no words", Value::Null, bytes(false, false), false),
        (
            "stripped",
            json!({"type": "Strip", "strip_left": true, "strip_right": true}),
            bytes(false, true),
            false,
        ),
    ] {
        for ignore_merges in [false, true] {
            let more = json!({"ignore_merges": ignore_merges});
            files.push((
                name.to_owned(),
                file(
                    normalizer.clone(),
                    pre_tokenizer.clone(),
                    vocab.clone(),
                    more,
                ),
                is_cut,
            ));
        }
    }
    files
}

/// Files like those of sentencepiece.
fn sentencepiece_files() -> Vec<(String, Value, bool)> {
    let text = Random(2).text(3000).replace(' ', "▁");
    let characters: HashSet<char> = text
        .chars()
        .filter(|&c| c != '½' && c != '\n' && c != 'e')
        .collect();
    let bytes = (0..=255).map(|b| format!("<0x{b:02X}>"));
    let vocab = trained(
        characters.iter().map(|c| c.to_string()).chain(bytes),
        &text,
        300,
    );
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let all = |parts: &[&Value]| json!({"type": "Sequence", "normalizers": parts});
    let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let after_spaces = json!({"type": "Split", "pattern": {"String": " "},
                              "behavior": "MergedWithPrevious", "invert": false});
    let mut files = Vec::new();
    for (name, normalizer, pre_tokenizer, is_cut) in [
        ("llama 2", all(&[&prepend, &replace]), Value::Null, true),
        ("gemma", replace.clone(), Value::Null, true),
        ("gemma 3", replace.clone(), after_spaces.clone(), true),
        ("after spaces", Value::Null, after_spaces, true),
        ("spaces as they are", Value::Null, Value::Null, true),
        ("metaspace", Value::Null, metaspace("first", false), true),
        (
            "metaspace always",
            Value::Null,
            metaspace("always", true),
            true,
        ),
        (
            "metaspace first, split",
            Value::Null,
            metaspace("first", true),
            true,
        ),
        (
            "metaspace never",
            Value::Null,
            metaspace("never", false),
            true,
        ),
        (
            "two replacements",
            all(&[
                &replace,
                &json!({"type": "Replace", "pattern": {"String": "ab"}, "content": "b"}),
            ]),
            Value::Null,
            false,
        ),
    ] {
        for (more, falls_back) in [
            (json!({"byte_fallback": true}), true),
            (json!({"unk_token": "<s>", "fuse_unk": true}), false),
        ] {
            files.push((
                format!("{name}, {falls_back}"),
                file(
                    normalizer.clone(),
                    pre_tokenizer.clone(),
                    vocab.clone(),
                    more,
                ),
                is_cut,
            ));
        }
    }
    files
}

#[test]
fn pieces_have_the_ids_of_the_whole() {
    for (name, file, is_cut) in byte_level_files().into_iter().chain(sentencepiece_files()) {
        let mut tokenizer = load(&file);
        let mut random = Random(3);
        let mut cuts = 0;
        for round in 0..10 {
            let text = random.text(150);
            for piece in [1, 40] {
                tokenizer.cut_points.piece = piece;
                let mut rest = text.as_str();
                while !rest.is_empty() {
                    rest = &rest[tokenizer
                        .cut_points
                        .first_piece(rest, &tokenizer.inner)
                        .unwrap()..];
                    cuts += usize::from(!rest.is_empty());
                }
                for special_text in [SpecialText::Parse, SpecialText::Plain] {
                    let add_special = round % 2 == 0;
                    let options = EncodeOptions {
                        add_special,
                        special_text,
                        interrupt: None,
                    };
                    let ids = tokenizer.encode_with(&text, options).unwrap();
                    let whole = match special_text {
                        SpecialText::Parse => &tokenizer.inner,
                        SpecialText::Plain => tokenizer.plain.get().unwrap(),
                    };
                    let expected = whole.encode_fast(text.as_str(), add_special).unwrap();
                    assert_eq!(
                        ids,
                        expected.get_ids(),
                        "{name}: {text:?} in pieces of {piece}"
                    );
                }
            }
        }
        assert_eq!(cuts > 60, is_cut, "{name}: {cuts} cuts");
    }
}

#[test]
fn a_raised_flag_ends_the_work() {
    let (_, file, _) = byte_level_files().swap_remove(0);
    let tokenizer = load(&file);
    let flag = AtomicBool::new(true);
    let options = EncodeOptions {
        interrupt: Some(&flag),
        ..EncodeOptions::default()
    };
    let kind = |text: &str| tokenizer.encode_with(text, options).map_err(|e| e.kind());
    assert_eq!(kind(""), Err(ErrorKind::Interrupted));
    assert_eq!(kind("a"), Err(ErrorKind::Interrupted));
    // Set during the work: encoding all of it would take seconds.
    flag.store(false, Ordering::Relaxed);
    let text = "one word after another\n".repeat(MAX_TEXT_BYTES / 23);
    std::thread::scope(|scope| {
        let work = scope.spawn(|| tokenizer.encode_with(&text, options).map(|ids| ids.len()));
        std::thread::sleep(std::time::Duration::from_millis(50));
        flag.store(true, Ordering::Relaxed);
        assert_eq!(
            work.join().unwrap().unwrap_err().kind(),
            ErrorKind::Interrupted
        );
    });
}

/// Text after an added token that takes whitespace is normalized as the start of a text, in
/// every piece.
#[test]
fn no_cut_behind_white_space_that_an_added_token_takes() {
    let files = byte_level_files();
    let file = &files.iter().find(|f| f.0 == "prepended").unwrap().1;
    let mut tokenizer = load(file);
    tokenizer.cut_points.piece = 1;
    for text in ["a</s>\nthe", "a</s>\nthe the", "the\nthe</s>\n\nthe"] {
        let expected = tokenizer.inner.encode_fast(text, false).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected.get_ids());
    }
}

/// Over a megabyte is encoded as a whole, because of the tokenizer or because the text cannot
/// be cut.
#[test]
fn a_text_without_a_place_to_cut_is_encoded_as_a_whole() {
    let files: Vec<_> = byte_level_files()
        .into_iter()
        .chain(sentencepiece_files())
        .collect();
    let of = |name: &str| load(&files.iter().find(|f| f.0 == name).unwrap().1);
    let repeated = |text: &str| text.repeat((1 << 18) / text.len() + 1);
    // The last two have cut points, but not in such texts:
    // no word ends at whitespace alone, and no space.
    for (name, text) in [
        ("no words", repeated("a the ")),
        ("deepseek coder", repeated("the Ab, 23\n")),
        ("deepseek 3", repeated(".\r\n")),
        ("gpt-2 with a space before", repeated("文字ですか\n")),
    ] {
        let tokenizer = of(name);
        let first = tokenizer.cut_points.first_piece(&text, &tokenizer.inner);
        assert_eq!(first.unwrap(), text.len(), "{name}");
        let expected = tokenizer.inner.encode_fast(text.as_str(), true).unwrap();
        assert_eq!(tokenizer.encode(&text, true).unwrap(), expected.get_ids());
    }
    // These are cut.
    for name in ["deepseek 3", "gemma 3, true"] {
        let text = repeated("the Ab, 23 文字\n");
        let tokenizer = of(name);
        let first = tokenizer.cut_points.first_piece(&text, &tokenizer.inner);
        assert!(first.unwrap() < 40_000, "{name}");
        let expected = tokenizer.inner.encode_fast(text.as_str(), true).unwrap();
        assert_eq!(tokenizer.encode(&text, true).unwrap(), expected.get_ids());
    }
}

/// A normalizer that multiplies texts limits the stretches without a cut point.
#[test]
fn a_long_piece_that_would_grow_far_is_refused() {
    let (_, mut file, _) = byte_level_files().swap_remove(0);
    file["normalizer"] =
        json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b".repeat(64)});
    let tokenizer = load(&file);
    let text = "the ".repeat(MAX_TEXT_BYTES / 8 / 4 + 1);
    let e = tokenizer.encode(&text, false).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TooLarge);
    assert!(
        e.to_string()
            .contains("over 2097152 bytes that cannot be cut"),
        "{e}"
    );
}
