//! Target: the parts as `tokenizer.json`, `tokenizer_config.json` and a text.

use upg_kernel::inference::tokenizer::{SpecialIds, SpecialText, Tokenizer};

pub fn run(data: &[u8]) {
    let [json, config, text] = super::parts(data);
    let config = super::text(config);
    let config = (!config.is_empty()).then_some(config.as_str());
    match Tokenizer::from_json(json, config, SpecialIds::default()) {
        Ok(tokenizer) => use_all(&tokenizer, &super::text(text)),
        Err(e) => super::one_line(&e),
    }
}

/// Encodes a text in every way, and decodes the ids at once and one by one.
pub(super) fn use_all(tokenizer: &Tokenizer, text: &str) {
    for special in [SpecialText::Parse, SpecialText::Plain] {
        let ids = match tokenizer.encode_as(text, true, special) {
            Ok(ids) => ids,
            Err(e) => {
                super::one_line(&e);
                continue;
            }
        };
        for skip_special in [false, true] {
            if let Err(e) = tokenizer.decode(&ids, skip_special) {
                super::one_line(&e);
            }
            let mut stream = tokenizer.decode_stream(skip_special);
            let pieces = ids.iter().map(|&id| stream.push(id));
            if let Err(e) = pieces.collect::<Result<String, _>>() {
                super::one_line(&e);
            }
            if let Err(e) = stream.finish() {
                super::one_line(&e);
            }
        }
    }
    // Ids without a token.
    let _ = tokenizer.decode(&[0, 1, u32::MAX], false);
}
