//! The tokenizer of a real GGUF file gives the ids of llama.cpp and transformers.

use crate::common::{data, json, smollm2_gguf};
use candle_core::quantized::gguf_file::{Content, Value};
use serde_json::Value as Json;
use std::fs::File;
use std::path::PathBuf;
use upg_compress::Calibration;
use upg_compress::source::{self, GgufVocab, TokenizerFiles};
use upg_kernel::inference::chat_template::{ChatTemplate, Message};
use upg_kernel::inference::tokenizer::{SpecialIds, SpecialText, Tokenizer};

/// Reads the tokenizer metadata of the file.
fn vocab() -> GgufVocab {
    let mut file = File::open(smollm2_gguf()).unwrap();
    let metadata = Content::read(&mut file).unwrap().metadata;
    let list = |key: &str| metadata.get(key).map(|v| v.to_vec().unwrap().as_slice());
    let strings = |key: &str| -> Vec<String> {
        let one = |v: &Value| v.to_string().unwrap().clone();
        list(key).unwrap_or_default().iter().map(one).collect()
    };
    let id = |key: &str| metadata.get(key).map(|v| v.to_u32().unwrap());
    let flag = |key: &str| metadata.get(key).map(|v| v.to_bool().unwrap());
    let text = |key: &str| metadata.get(key).map(|v| v.to_string().unwrap().clone());
    let mut vocab = GgufVocab::default();
    vocab.model = text("tokenizer.ggml.model").unwrap();
    vocab.pre = text("tokenizer.ggml.pre");
    vocab.tokens = strings("tokenizer.ggml.tokens");
    vocab.token_types = list("tokenizer.ggml.token_type")
        .unwrap_or_default()
        .iter()
        .map(|v| v.to_i32().unwrap())
        .collect();
    vocab.merges = strings("tokenizer.ggml.merges");
    vocab.bos = id("tokenizer.ggml.bos_token_id");
    vocab.eos = id("tokenizer.ggml.eos_token_id");
    vocab.unk = id("tokenizer.ggml.unknown_token_id");
    vocab.pad = id("tokenizer.ggml.padding_token_id");
    vocab.add_bos = flag("tokenizer.ggml.add_bos_token");
    vocab.add_eos = flag("tokenizer.ggml.add_eos_token");
    vocab.add_space_prefix = flag("tokenizer.ggml.add_space_prefix");
    vocab.chat_template = text("tokenizer.chat_template");
    vocab
}

fn load(files: &TokenizerFiles) -> Tokenizer {
    Tokenizer::from_json(
        &files.tokenizer_json,
        Some(&files.tokenizer_config_json),
        files.special.clone(),
    )
    .unwrap()
}

fn ids(value: &Json) -> Vec<u32> {
    let one = |v: &Json| u32::try_from(v.as_u64().unwrap()).unwrap();
    value.as_array().unwrap().iter().map(one).collect()
}

/// Returns the text of a case: its own, or the first characters of another file.
fn text(case: &Json) -> String {
    match case["text_file"].as_str() {
        None => case["text"].as_str().unwrap().to_owned(),
        Some(name) => {
            let first = case["first_chars"].as_u64().unwrap();
            std::fs::read_to_string(data(name))
                .unwrap()
                .chars()
                .take(first as usize)
                .collect()
        }
    }
}

#[test]
fn real_vocabulary_gives_the_ids_of_llama_cpp() {
    let files = vocab().to_tokenizer_files().unwrap();
    if let Some(folder) = std::env::var_os("UPG_TEST_WRITE_TOKENIZER") {
        let folder = PathBuf::from(folder);
        std::fs::write(folder.join("tokenizer.json"), &files.tokenizer_json).unwrap();
        std::fs::write(
            folder.join("tokenizer_config.json"),
            &files.tokenizer_config_json,
        )
        .unwrap();
    }
    let tokenizer = load(&files);
    assert_eq!(tokenizer.vocab_size(), 49152);
    let special = SpecialIds {
        bos: Some(1),
        eos: vec![2, 0],
    };
    assert_eq!(tokenizer.special_ids(), &special);

    let file = json("smollm2_tokens.json");
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 26);
    for case in cases {
        let text = text(case);
        let expected = ids(&case["ids"]);
        // The file wants no begin of sequence, so both are the same.
        assert_eq!(
            tokenizer.encode(&text, false).unwrap(),
            expected,
            "{text:?}"
        );
        assert_eq!(tokenizer.encode(&text, true).unwrap(), expected, "{text:?}");

        for skip in [false, true] {
            let whole = tokenizer.decode(&expected, skip).unwrap();
            if !skip {
                assert_eq!(whole, text);
            }
            let mut stream = tokenizer.decode_stream(skip);
            let mut pieces = String::new();
            for &id in &expected {
                let piece = stream.push(id).unwrap();
                assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{text:?}");
                pieces.push_str(&piece);
            }
            pieces.push_str(&stream.finish().unwrap());
            assert_eq!(pieces, whole, "{text:?}");
        }
    }
}

#[test]
fn real_vocabulary_gives_the_prompts_of_transformers() {
    let files = vocab().to_tokenizer_files().unwrap();
    let tokenizer = load(&files);
    for prompt in json("smollm2_oracle.json")["prompts"].as_array().unwrap() {
        let text = prompt["prompt"].as_str().unwrap();
        assert_eq!(
            tokenizer.encode(text, false).unwrap(),
            ids(&prompt["prompt_ids"])
        );
    }
}

#[test]
fn special_tokens_are_plain_text_when_asked() {
    let tokenizer = load(&vocab().to_tokenizer_files().unwrap());
    let text = "<|im_end|>\n<|im_start|>system";
    let parsed = tokenizer.encode(text, false).unwrap();
    assert_eq!(parsed[..2], [2, 198]);
    let plain = tokenizer
        .encode_as(text, false, SpecialText::Plain)
        .unwrap();
    assert!(!plain.iter().any(|&id| tokenizer.is_special(id)));
    assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
}

#[test]
fn real_template_adds_its_system_prompt() {
    let files = vocab().to_tokenizer_files().unwrap();
    let template = ChatTemplate::from_tokenizer_config(&files.tokenizer_config_json)
        .unwrap()
        .unwrap();
    let text = template
        .render(&[Message::new("user", "Hi")], true)
        .unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
     <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn a_calibration_text_is_cut_into_whole_sequences_of_the_ids_of_llama_cpp() {
    let file = json("smollm2_tokens.json");
    let cases = file["cases"].as_array().unwrap();
    let case = cases.iter().find(|case| !case["text_file"].is_null());
    let case = case.expect("a case with a long text");
    let source = source::open(smollm2_gguf()).unwrap();
    let calibration = Calibration::of_text(source.as_ref(), &text(case), usize::MAX).unwrap();
    let ids = ids(&case["ids"]);
    let whole = ids.len() / 512 * 512;
    assert!(whole > 0 && whole < ids.len());
    assert_eq!(calibration.window(), 512);
    assert_eq!(calibration.tokens(), &ids[..whole]);

    // Documents are tokenized separately.
    let documents = ["A", " b".repeat(600).as_str()].map(str::to_owned);
    let calibration = Calibration::of_documents(source.as_ref(), &documents, usize::MAX).unwrap();
    let alone = |text: &str| {
        source
            .files()
            .tokenizer()
            .unwrap()
            .encode(text, true)
            .unwrap()
    };
    let joined = [alone(&documents[0]), alone(&documents[1])].concat();
    assert_eq!(calibration.tokens(), &joined[..512]);

    let built_in = Calibration::built_in(source.as_ref(), usize::MAX).unwrap();
    assert!(built_in.is_built_in() && !calibration.is_built_in());
    let few = Calibration::built_in(source.as_ref(), 1100).unwrap();
    assert_eq!(few.tokens(), &built_in.tokens()[..1024]);
    let e = Calibration::built_in(source.as_ref(), 511).unwrap_err();
    assert_eq!(e.kind(), upg_kernel::ErrorKind::Argument);
    assert!(
        (60_000..90_000).contains(&built_in.tokens().len()),
        "{}",
        built_in.tokens().len()
    );
}
