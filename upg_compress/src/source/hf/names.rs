//! Names of tensors: prefixes of modules around the model are removed, and tensors that are no
//! part of a text model are left out.
#![forbid(unsafe_code)]

use super::stored::{Stored, Tensors};
use crate::source::SkippedTensor;
use safetensors::Dtype;
use std::collections::BTreeSet;
use upg_kernel::{Error, ErrorKind, Result};

/// Modules around a text model or around its decoder.
const AROUND: [&str; 7] = [
    "_orig_mod",
    "module",
    "base_model",
    "model",
    "language_model",
    "text_model",
    "llm",
];

/// Modules that torch puts around any other one.
const WRAPPERS: [&str; 3] = [
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// Parts of a decoder.
const DECODER: [&str; 3] = ["embed_tokens", "layers", "norm"];

/// Parts of a model beside its text model.
const NOT_TEXT: [&str; 14] = [
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "vision_embed_tokens",
    "vision_language_adapter",
    "vision_projection",
    "visual",
    "image_newline",
    "multi_modal_projector",
    "mm_projector",
    "mlp1",
    "patch_merger",
    "audio_tower",
    "audio_projector",
];

/// Parts of adapters that are not merged.
const ADAPTER: [&str; 7] = [
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer",
    "modules_to_save",
];

/// Names of buffers that old versions of torch and transformers stored.
const BUFFERS: [&str; 12] = [
    "position_ids",
    "inv_freq",
    "original_inv_freq",
    "cos_cached",
    "sin_cached",
    "masked_bias",
    "causal_mask",
    "attn_mask",
    "attention_mask",
    "mask",
    "tril",
    "num_batches_tracked",
];

const HEAD: &str = "lm_head";
const TABLE: &str = "a rotary table, computed from the config";
const BUFFER: &str = "a table of positions or a mask, which is computed";
const OTHER_PART: &str = "not part of the text model";

/// Tensors by their names in transformers.
pub(super) struct Named {
    pub tensors: Tensors,
    pub skipped: Vec<SkippedTensor>,
    /// Prefix that was replaced by `model.`, if it is another one.
    pub prefix: Option<String>,
}

/// Returns the tensors by the names that a text model has in transformers.
///
/// The prefix before `embed_tokens` shows how the model is wrapped; it must be the same for all
/// parts of the decoder. A model without `embed_tokens` keeps its names. `is_multimodal`: all parts
/// but the decoder and its head are left out.
///
/// Errors: `Unsupported` for adapters, for unknown or several prefixes, and for tensors outside
/// the prefix; `Invalid` if two tensors get one name.
pub(super) fn named(stored: Tensors, is_multimodal: bool) -> Result<Named> {
    let mut named = Named {
        tensors: Tensors::new(),
        skipped: Vec::new(),
        prefix: None,
    };
    let mut plain = Tensors::new();
    for (name, stored) in stored {
        let parts = || name.split('.');
        if parts().any(|part| ADAPTER.contains(&part)) {
            let message = "belongs to an adapter, which is not merged into the weights";
            return Err(Error::new(ErrorKind::Unsupported, message)
                .tensor(name)
                .hint("merge it first, with merge_and_unload() of peft, and save the model"));
        }
        match unused(&name, &stored) {
            Some(reason) => named.skipped.push(SkippedTensor { name, reason }),
            None => {
                let kept: Vec<_> = parts().filter(|part| !WRAPPERS.contains(part)).collect();
                insert(&mut plain, kept.join("."), stored)?;
            }
        }
    }
    let prefix = prefix(&plain)?;
    for (name, stored) in plain {
        match renamed(&name, prefix.as_deref(), is_multimodal)? {
            Some(new) => insert(&mut named.tensors, new, stored)?,
            None => named.skipped.push(SkippedTensor {
                name,
                reason: OTHER_PART,
            }),
        }
    }
    named.prefix = prefix.filter(|prefix| prefix != "model.");
    Ok(named)
}

fn insert(tensors: &mut Tensors, name: String, stored: Stored) -> Result<()> {
    if tensors.contains_key(&name) {
        let message = "two tensors have this name without the prefixes of modules around them";
        return Err(Error::new(ErrorKind::Invalid, message).tensor(name));
    }
    tensors.insert(name, stored);
    Ok(())
}

/// Returns why no model uses a tensor.
fn unused(name: &str, stored: &Stored) -> Option<&'static str> {
    let last = name.rsplit('.').next().unwrap_or_default();
    let is_float = matches!(
        stored.dtype,
        Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64
    );
    // The causal mask of old attention modules has this name.
    let is_mask = last == "bias" && !is_float && stored.shape.len() == 4;
    match last {
        _ if name.contains(".rotary_emb.") => Some(TABLE),
        _ if BUFFERS.contains(&last) || is_mask => Some(BUFFER),
        _ => None,
    }
}

/// Returns the prefix of the decoder, `model.` in a plain model; none without embeddings.
fn prefix(tensors: &Tensors) -> Result<Option<String>> {
    let before = |name: &String| {
        let parts: Vec<&str> = name.split('.').collect();
        let at = parts.iter().position(|part| *part == "embed_tokens")?;
        Some(parts[..at].iter().map(|part| format!("{part}.")).collect())
    };
    let found: BTreeSet<String> = tensors.keys().filter_map(before).collect();
    let is_known = |prefix: &&String| {
        let parts = prefix.split_terminator('.');
        parts.into_iter().all(|part| AROUND.contains(&part))
    };
    if found.is_empty() || found.contains("model.") {
        return Ok(found.get("model.").cloned());
    }
    let known: Vec<&String> = found.iter().filter(is_known).collect();
    let message = match (known.as_slice(), found.first()) {
        ([one], _) => return Ok(Some((*one).clone())),
        ([], Some(unknown)) => format!(
            "the embeddings are under '{}', expected 'model.'",
            unknown.escape_debug()
        ),
        (several, _) => format!(
            "there are {} models, with different prefixes",
            several.len()
        ),
    };
    Err(Error::new(ErrorKind::Unsupported, message)
        .hint("save the text model by itself, with the names that transformers gives its tensors"))
}

/// Returns the name of a tensor under `model.` and `lm_head.`; none for other parts of a model.
fn renamed(name: &str, prefix: Option<&str>, is_multimodal: bool) -> Result<Option<String>> {
    let Some(prefix) = prefix else {
        return Ok(Some(name.to_owned()));
    };
    let first = |rest: &str| rest.split('.').next().unwrap_or_default().to_owned();
    let rest = name.strip_prefix(prefix);
    if let Some(rest) = rest.filter(|rest| DECODER.contains(&first(rest).as_str())) {
        return Ok(Some(format!("model.{rest}")));
    }
    // The head is beside the decoder, or beside one of the modules around it.
    if let Some((outer, rest)) = name.split_once(&format!("{HEAD}."))
        && prefix.starts_with(outer)
        && (outer.is_empty() || outer.ends_with('.'))
    {
        return Ok(Some(format!("{HEAD}.{rest}")));
    }
    let is_other = name.split('.').any(|part| NOT_TEXT.contains(&part));
    match rest {
        _ if is_multimodal || is_other => Ok(None),
        // As in a plain model, where unknown tensors are part of the file.
        Some(rest) if !prefix.is_empty() => Ok(Some(format!("model.{rest}"))),
        _ if prefix == "model." => Ok(Some(name.to_owned())),
        _ => Err(Error::new(
            ErrorKind::Unsupported,
            format!("is outside of the prefix '{prefix}' of the other weights"),
        )
        .tensor(name)
        .hint("rename the tensors, or leave this one out: all begin with 'model.' or 'lm_head.'")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(dtype: Dtype, dims: usize) -> Stored {
        Stored {
            shard: 0,
            dtype,
            shape: vec![1; dims],
            bytes: 0..4,
        }
    }

    fn of(names: &[&str], is_multimodal: bool) -> Result<Named> {
        let tensors = names
            .iter()
            .map(|name| ((*name).to_owned(), stored(Dtype::F32, 2)));
        named(tensors.collect(), is_multimodal)
    }

    const PARTS: [&str; 3] = [
        "embed_tokens.weight",
        "layers.0.mlp.up_proj.weight",
        "norm.weight",
    ];

    #[test]
    fn one_prefix_is_removed() {
        let expected = PARTS.map(|part| format!("model.{part}"));
        for (prefix, head) in [
            ("model.", "lm_head.weight"),
            ("", "lm_head.weight"),
            ("_orig_mod.model.", "_orig_mod.lm_head.weight"),
            ("module._orig_mod.model.", "module._orig_mod.lm_head.weight"),
            ("module.model.", "module.lm_head.weight"),
            ("language_model.model.", "language_model.lm_head.weight"),
            ("model.language_model.", "lm_head.weight"),
            (
                "model.language_model.model.",
                "model.language_model.lm_head.weight",
            ),
            ("base_model.model.model.", "base_model.model.lm_head.weight"),
        ] {
            let mut names = PARTS.map(|part| format!("{prefix}{part}")).to_vec();
            names.push(head.to_owned());
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let found = of(&names, false).unwrap();
            let mut sorted = [&[HEAD.to_owned() + ".weight"][..], &expected].concat();
            sorted.sort();
            assert!(
                found.tensors.keys().eq(&sorted),
                "{prefix}: {:?}",
                found.tensors.keys()
            );
            let shown = prefix.replace("_orig_mod.", "");
            assert_eq!(found.prefix.unwrap_or("model.".to_owned()), shown);
        }
        let inner = [
            "model._orig_mod.embed_tokens.weight",
            "model.layers.0._orig_mod.a.weight",
        ];
        let found = of(&inner, false).unwrap();
        assert!(
            found
                .tensors
                .keys()
                .eq(["model.embed_tokens.weight", "model.layers.0.a.weight"])
        );
    }

    #[test]
    fn unclear_prefixes_are_refused() {
        for (names, cause) in [
            (&["a.model.embed_tokens.weight"][..], "under 'a.model.'"),
            (
                &[
                    "module.model.embed_tokens.weight",
                    "llm.model.embed_tokens.weight",
                ],
                "2 models",
            ),
            (
                &["module.model.embed_tokens.weight", "model.norm.weight"],
                "outside of the prefix 'module.model.'",
            ),
            (
                &["embed_tokens.weight", "score.weight"],
                "outside of the prefix ''",
            ),
            (
                &["_orig_mod.model.norm.weight", "model.norm.weight"],
                "two tensors have this name",
            ),
            (
                &["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
                "not merged",
            ),
        ] {
            let e = of(names, false).err().unwrap().to_string();
            assert!(e.contains(cause), "{e}");
        }
    }

    #[test]
    fn parts_beside_the_text_model_are_left_out() {
        let text = "model.language_model.embed_tokens.weight";
        let vision = [
            "model.vision_tower.a.weight",
            "model.multi_modal_projector.b.weight",
        ];
        let found = of(&[text, vision[0], vision[1], "lm_head.weight"], true).unwrap();
        assert!(
            found
                .tensors
                .keys()
                .eq(["lm_head.weight", "model.embed_tokens.weight"])
        );
        assert!(found.skipped.iter().all(|s| s.reason == OTHER_PART));
        // Names that say so are enough; other ones need a config that does.
        let found = of(&["language_model.model.norm.weight", vision[0]], false).unwrap();
        assert_eq!(found.tensors.len(), 2, "there are no embeddings to go by");
        let plain = "model.embed_tokens.weight";
        assert_eq!(of(&[plain, vision[0]], false).unwrap().tensors.len(), 1);
        assert_eq!(
            of(&[plain, "model.other.weight"], false)
                .unwrap()
                .tensors
                .len(),
            2
        );
        assert_eq!(
            of(&[plain, "model.other.weight"], true)
                .unwrap()
                .tensors
                .len(),
            1
        );
    }

    #[test]
    fn buffers_are_left_out() {
        let names = [
            (
                "model.layers.0.self_attn.rotary_emb.inv_freq",
                Dtype::F32,
                1,
                TABLE,
            ),
            ("model.rotary.inv_freq", Dtype::F32, 1, BUFFER),
            ("model.embeddings.position_ids", Dtype::I64, 2, BUFFER),
            ("model.layers.0.self_attn.bias", Dtype::BOOL, 4, BUFFER),
            (
                "model.layers.0.self_attn.masked_bias",
                Dtype::F32,
                0,
                BUFFER,
            ),
        ];
        for (name, dtype, dims, reason) in names {
            assert_eq!(unused(name, &stored(dtype, dims)), Some(reason), "{name}");
        }
        assert_eq!(
            unused("model.layers.0.self_attn.bias", &stored(Dtype::F32, 1)),
            None
        );
        assert_eq!(
            unused("model.layers.0.mlp.mask.weight", &stored(Dtype::F32, 2)),
            None
        );
    }
}
