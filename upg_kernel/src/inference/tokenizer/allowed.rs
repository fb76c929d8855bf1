//! Allowed components of a `tokenizer.json`.
//!
//! The `tokenizers` crate trusts its file: some components end the process if their parameters are
//! wrong, and a few successive replacements can exhaust memory. So only components that occur in
//! tokenizers of the supported families are allowed, with harmless parameters.
#![forbid(unsafe_code)]

use super::expressions::examine;
use super::file::Parts;
use crate::format::json;
use crate::{Error, ErrorKind, Result};
use serde_json::Value;

/// Maximum factor by which all replacements together lengthen a text.
const MAX_GROWTH: usize = 64;

/// Maximum characters that a decoder may strip.
const MAX_CUT: u64 = 1024;

/// Maximum nesting of components.
const MAX_DEPTH: usize = 8;

/// Maximum components of a normalizer, a pre-tokenizer, and so on; each processes the whole
/// text. Published ones have up to ten.
const MAX_PARTS: usize = 64;

/// Maximum ids that a post-processor may put around a text. Published ones put up to three.
const MAX_FRAME: usize = 64;

/// Maximum characters of an expression in an error.
const SHOWN: usize = 60;

const NORMALIZERS: &[&str] = &[
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "Strip",
    "Prepend",
    "Replace",
    "Sequence",
];
const PRE_TOKENIZERS: &[&str] = &[
    "ByteLevel",
    "Digits",
    "Metaspace",
    "Punctuation",
    "Sequence",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
];
const POST_PROCESSORS: &[&str] = &[
    "BertProcessing",
    "ByteLevel",
    "RobertaProcessing",
    "Sequence",
    "TemplateProcessing",
];
const DECODERS: &[&str] = &[
    "ByteFallback",
    "ByteLevel",
    "Fuse",
    "Metaspace",
    "Replace",
    "Sequence",
    "Strip",
];

impl Parts {
    /// Returns the factor by which the normalizer may lengthen a text.
    ///
    /// Errors (`Unsupported`): an unknown component, or one with unusable parameters.
    pub(super) fn check(&self) -> Result<usize> {
        let model = &self.model;
        // Old files do not name the kind of model.
        let is_bpe = match &model.kind {
            Some(kind) => kind == "BPE",
            None => model.merges.is_there(),
        };
        if !is_bpe {
            let kind = model.kind.as_deref().unwrap_or("without a type");
            return Err(unsupported(format!("model '{kind}', expected BPE")));
        }
        let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
            return Err(unsupported("a prefix or suffix of subwords".into()));
        }
        if model.dropout.is_some_and(|dropout| dropout != 0.0) {
            return Err(unsupported("dropout: ids would be random".into()));
        }
        let parts = [
            ("normalizer", &self.normalizer, NORMALIZERS),
            ("pre_tokenizer", &self.pre_tokenizer, PRE_TOKENIZERS),
            ("post_processor", &self.post_processor, POST_PROCESSORS),
            ("decoder", &self.decoder, DECODERS),
        ];
        let mut normalizer_growth = 1;
        check_frame(&self.post_processor)?;
        for (what, part, known) in parts {
            let mut size = Size {
                growth: 1,
                parts: 0,
            };
            check(part, what, known, MAX_DEPTH, &mut size)?;
            if what == "normalizer" {
                normalizer_growth = size.growth;
            }
        }
        Ok(normalizer_growth)
    }
}

/// Checks that a post-processor puts only a few ids around the text and uses the text once.
///
/// Errors (`Unsupported`): two components that put ids around a text, of which the second
/// ends the process; a template without the text, with more than one of it, or with more
/// than [`MAX_FRAME`] ids.
fn check_frame(post_processor: &Value) -> Result<()> {
    let mut frames = Vec::new();
    find_frames(post_processor, MAX_DEPTH, &mut frames);
    if frames.len() > 1 {
        return Err(unsupported(
            "post_processor of more than one template".into(),
        ));
    }
    let template = frames
        .into_iter()
        .find(|part| is_type(part, "TemplateProcessing"));
    let Some(template) = template else {
        return Ok(());
    };
    let pieces = template.get("single").and_then(Value::as_array);
    let (mut texts, mut ids) = (0, 0);
    for piece in pieces.into_iter().flatten() {
        if let Some(token) = piece.pointer("/SpecialToken/id").and_then(Value::as_str) {
            let token = template
                .get("special_tokens")
                .and_then(|all| all.get(token));
            let found = token.and_then(|token| token.get("ids")?.as_array());
            ids += found.map_or(0, Vec::len);
        } else if piece.pointer("/Sequence/id").is_some_and(|id| id == "A") {
            texts += 1;
        } else {
            return Err(unsupported("post_processor of two texts".into()));
        }
    }
    match (texts, ids) {
        (1, 0..=MAX_FRAME) => Ok(()),
        (1, _) => Err(unsupported(format!(
            "post_processor of over {MAX_FRAME} ids"
        ))),
        _ => Err(unsupported(format!(
            "post_processor with {texts} times the text"
        ))),
    }
}

/// Lists the components that put ids around a text.
fn find_frames<'a>(part: &'a Value, depth: usize, frames: &mut Vec<&'a Value>) {
    let inner = part.get("processors").and_then(Value::as_array);
    if is_type(part, "Sequence") && depth > 0 {
        for part in inner.into_iter().flatten() {
            find_frames(part, depth - 1, frames);
        }
    } else if !part.is_null() && !is_type(part, "ByteLevel") {
        frames.push(part);
    }
}

fn is_type(part: &Value, kind: &str) -> bool {
    part.get("type").is_some_and(|found| found == kind)
}

/// Total size of several components.
struct Size {
    /// Factor by which they may lengthen a text.
    growth: usize,
    /// Number of components.
    parts: usize,
}

/// Checks one component and those nested in it, and adds them to `size`.
fn check(part: &Value, what: &str, known: &[&str], depth: usize, size: &mut Size) -> Result<()> {
    if part.is_null() {
        return Ok(());
    }
    size.parts += 1;
    if size.parts > MAX_PARTS {
        return Err(unsupported(format!("{what} of over {MAX_PARTS} parts")));
    }
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
    if depth == 0 || !known.contains(&kind) {
        return Err(unsupported(format!("{what} '{kind}'")));
    }
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map_or(0, str::len);
    match kind {
        "Sequence" => {
            let items = ["normalizers", "pretokenizers", "processors", "decoders"];
            let items = items.iter().find_map(|key| part.get(key)?.as_array());
            for item in items.into_iter().flatten() {
                check(item, what, known, depth - 1, size)?;
            }
        }
        "Replace" => {
            let pattern = text(part.pointer("/pattern/String"));
            if pattern == 0 {
                return Err(unsupported(format!(
                    "{what} 'Replace' of anything but a text"
                )));
            }
            let times = text(part.get("content")).div_ceil(pattern).max(1);
            size.growth = size.growth.saturating_mul(times);
        }
        "Split" if part.pointer("/pattern/String").is_some_and(|p| p == "") => {
            return Err(unsupported(format!("{what} 'Split' at an empty text")));
        }
        "Split" => {
            let expression = part.pointer("/pattern/Regex").and_then(Value::as_str);
            if let Some(expression) = expression.filter(|e| examine(e).is_none()) {
                let start: String = expression.chars().take(SHOWN).collect();
                return Err(unsupported(format!(
                    "{what} 'Split' at '{}'",
                    start.escape_debug()
                ))
                .hint("its time may be quadratic in the text: only known and simple expressions are supported"));
            }
        }
        "Prepend" => {
            let times = text(part.get("prepend")).max(1);
            size.growth = size.growth.saturating_mul(times);
        }
        "Strip" if what == "decoder" => {
            let cut = |key| part.get(key).and_then(Value::as_u64).unwrap_or(u64::MAX);
            if cut("start") > MAX_CUT || cut("stop") > MAX_CUT {
                return Err(unsupported(format!(
                    "{what} 'Strip' of over {MAX_CUT} characters"
                )));
            }
        }
        _ => {}
    }
    match size.growth <= MAX_GROWTH {
        true => Ok(()),
        false => Err(unsupported(format!(
            "{what}: makes texts over {MAX_GROWTH} times longer"
        ))),
    }
}

fn unsupported(message: String) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("tokenizer.json: {} is not supported", json::cut(&message)),
    )
}
