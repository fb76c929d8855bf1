//! Text part of the config of a multimodal model.
#![forbid(unsafe_code)]

use serde_json::{Map, Value};
use upg_kernel::inference::config::FAMILIES;
use upg_kernel::{Error, ErrorKind, Result};

/// Keys of the config of the text model.
const KEYS: [&str; 2] = ["text_config", "llm_config"];

/// Keys that the text model has from the whole model where its own config lacks them.
const INHERITED: [&str; 9] = [
    "bos_token_id",
    "compression_config",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "sparsity_config",
    "tie_word_embeddings",
    "torch_dtype",
];

/// Returns the config of the text model in a multimodal `config`; none if there is no such part.
///
/// Also removes a part that only repeats the config of a plain text model. Errors (`Unsupported`):
/// the text model is of no family that can run.
pub(super) fn text_part(config: &Value) -> Result<Option<Value>> {
    let family = |config: &Value| {
        let name = config.get("model_type")?.as_str()?.to_owned();
        let is_known = FAMILIES.iter().any(|family| family.name == name);
        Some((name, is_known))
    };
    let found = KEYS
        .iter()
        .find_map(|key| Some((*key, config.get(*key)?.as_object()?)));
    let (Some(outer), Some((key, inner))) = (config.as_object(), found) else {
        return Ok(None);
    };
    let whole = family(config);
    if whole.as_ref().is_some_and(|(_, is_known)| *is_known) {
        let is_repeated = inner
            .iter()
            .all(|(key, value)| outer.get(key) == Some(value));
        let mut plain = outer.clone();
        plain.remove(key);
        return Ok(is_repeated.then(|| Value::Object(plain)));
    }
    let inner_value = Value::Object(inner.clone());
    match (family(&inner_value), whole) {
        (Some((_, true)), _) => Ok(Some(with_inherited(inner.clone(), outer))),
        (Some((text, false)), Some((whole, _))) => {
            let known: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
            let message = format!(
                "the text part of this '{}' model has model_type '{}', known are {}",
                whole.escape_debug(),
                text.escape_debug(),
                known.join(", ")
            );
            Err(Error::new(ErrorKind::Unsupported, message))
        }
        _ => Ok(None),
    }
}

fn with_inherited(mut inner: Map<String, Value>, outer: &Map<String, Value>) -> Value {
    for key in INHERITED {
        if let (None | Some(Value::Null), Some(value)) = (inner.get(key), outer.get(key)) {
            inner.insert(key.to_owned(), value.clone());
        }
    }
    Value::Object(inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn text_parts_of_known_families() {
        let text = json!({"model_type": "mistral", "vocab_size": 8, "eos_token_id": 7});
        let whole = json!({"model_type": "llava", "text_config": text, "vision_config": {},
            "tie_word_embeddings": true, "eos_token_id": 3});
        let expected = json!({"model_type": "mistral", "vocab_size": 8, "eos_token_id": 7,
            "tie_word_embeddings": true});
        assert_eq!(text_part(&whole).unwrap(), Some(expected));
        assert_eq!(text_part(&text).unwrap(), None);

        let other = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}});
        let e = text_part(&other).unwrap_err().to_string();
        assert!(
            e.contains("'gemma3' model has model_type 'gemma3_text', known are llama"),
            "{e}"
        );
    }

    #[test]
    fn a_repeated_part_is_removed_and_another_one_is_not() {
        let with = |size| {
            text_part(&json!({"model_type": "llama", "hidden_size": 64,
                "text_config": {"hidden_size": size}}))
            .unwrap()
        };
        assert_eq!(
            with(64),
            Some(json!({"model_type": "llama", "hidden_size": 64}))
        );
        assert_eq!(with(32), None);
    }
}
