//! From text to ids: in pieces, with a flag looked at between them.
#![forbid(unsafe_code)]

use super::{MAX_RUN_CHARS, MAX_TEXT_BYTES, Tokenizer, contained, wrapped};
use crate::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use tokenizers::{
    Encoding, Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizer,
};

/// How the special tokens that stand in a text are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// `<|im_end|>` in the text becomes the token of that name (what transformers does).
    Parse,
    /// Special tokens in the text are ordinary characters: for text from people who are not
    /// trusted to write them.
    Plain,
}

/// Options of [`Tokenizer::encode_with`].
#[derive(Debug, Clone, Copy)]
pub struct EncodeOptions<'a> {
    /// Puts begin and end of sequence around the text where the model wants them. Leave it off for text that a chat
    /// template made, which has them already.
    pub add_special: bool,
    /// How special tokens in the text are read.
    pub special_text: SpecialText,
    /// A flag that ends the work with an error of kind `Interrupted`, once it is raised.
    pub interrupt: Option<&'a AtomicBool>,
}

impl Default for EncodeOptions<'_> {
    fn default() -> Self {
        Self {
            add_special: true,
            special_text: SpecialText::Parse,
            interrupt: None,
        }
    }
}

impl EncodeOptions<'_> {
    fn check_interrupt(&self) -> Result<()> {
        match self.interrupt {
            Some(flag) if flag.load(Ordering::Relaxed) => {
                Err(Error::new(ErrorKind::Interrupted, "interrupted"))
            }
            _ => Ok(()),
        }
    }
}

impl Tokenizer {
    /// Returns the ids of `text`; special tokens in it are parsed. `add_special` puts begin and end of
    /// sequence around it where the model wants them: leave it off for text that a chat template
    /// made, which has them already.
    ///
    /// # Errors
    /// `TooLarge` when the text is above [`MAX_TEXT_BYTES`] or has a run above [`MAX_RUN_CHARS`]; also when over 2 MiB
    /// of it cannot be cut and the tokenizer's normalizer may make them over nine times longer, which those of
    /// published tokenizers do not.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.encode_with(
            text,
            EncodeOptions {
                add_special,
                ..EncodeOptions::default()
            },
        )
    }

    /// [`Tokenizer::encode`] with the choice of how special tokens in `text` are read.
    ///
    /// The first call with [`SpecialText::Plain`] copies the vocabulary (tens of MB).
    ///
    /// # Errors
    /// The errors of [`Tokenizer::encode`].
    pub fn encode_as(
        &self,
        text: &str,
        add_special: bool,
        special_text: SpecialText,
    ) -> Result<Vec<u32>> {
        self.encode_with(
            text,
            EncodeOptions {
                add_special,
                special_text,
                interrupt: None,
            },
        )
    }

    /// [`Tokenizer::encode`] that a flag can end.
    ///
    /// A long text is encoded in pieces of about 32 KiB, cut where the ids are the same as those of the whole, and the
    /// flag is looked at between them: each takes some tens of milliseconds. Memory is that of a piece and of the ids.
    ///
    /// Some tokenizers have no such cuts, or none in some texts. A stretch without a cut is one piece: it takes time
    /// about linear in its length (up to a second a MiB), in which the flag is not looked at, and up to 300 times its
    /// bytes of memory.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::encode`]; `Interrupted`.
    pub fn encode_with(&self, text: &str, options: EncodeOptions<'_>) -> Result<Vec<u32>> {
        check_text(text)?;
        options.check_interrupt()?;
        let tokenizer = match options.special_text {
            SpecialText::Parse => &self.inner,
            SpecialText::Plain => self.plain.get_or_init(|| {
                let mut plain = self.inner.clone();
                plain.set_encode_special_tokens(true);
                plain
            }),
        };
        let add_special = options.add_special;
        let mut ids = if text.len() <= self.cut_points.piece {
            let encoding =
                contained(|| tokenizer.encode_fast(text, add_special))?.map_err(failed)?;
            encoding.get_ids().to_vec()
        } else {
            let ids = self.encode_pieces(tokenizer, text, options)?;
            contained(|| framed(tokenizer, &ids, add_special))?.map_err(failed)?
        };
        if add_special {
            self.settle_bos_eos(&mut ids);
        }
        Ok(ids)
    }

    fn encode_pieces(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        options: EncodeOptions<'_>,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            options.check_interrupt()?;
            let (piece, after) = rest.split_at(self.cut_points.first_piece(rest, tokenizer)?);
            let is_first = rest.len() == text.len();
            contained(|| encode_piece(tokenizer, piece, is_first, &mut ids))?.map_err(failed)?;
            rest = after;
        }
        Ok(ids)
    }

    /// `add_bos_token`/`add_eos_token` of the configuration add what the post-processor has left out:
    /// some files say it in one place only. As in transformers, `false` takes nothing away.
    fn settle_bos_eos(&self, ids: &mut Vec<u32>) {
        if let (Some(bos), Some(wanted)) = (self.special.bos, self.add_bos) {
            let there = ids.first() == Some(&bos);
            if wanted && !there {
                ids.insert(0, bos);
            }
        }
        if let (Some(eos), Some(true)) = (self.eos_id, self.add_eos)
            && ids.last() != Some(&eos)
        {
            ids.push(eos);
        }
    }
}

/// Appends the ids of a piece, as `tokenizers::Tokenizer::encode_fast` makes them without special tokens.
fn encode_piece(
    tokenizer: &tokenizers::Tokenizer,
    piece: &str,
    is_first: bool,
    ids: &mut Vec<u32>,
) -> tokenizers::Result<()> {
    let normalizer = PieceNormalizer {
        whole: tokenizer.get_normalizer(),
        is_first,
    };
    let added = tokenizer.get_added_vocabulary();
    let mut words = added.extract_and_normalize(Some(&normalizer), piece);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words)?;
    }
    words.tokenize(|word| tokenizer.get_model().tokenize(word.get()))?;
    let splits = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
    for (_, _, tokens) in splits {
        ids.extend(tokens.iter().flatten().map(|token| token.id));
    }
    Ok(())
}

/// The normalizer of a tokenizer for one piece of a text: what goes before a text goes before the first piece only.
struct PieceNormalizer<'a> {
    whole: Option<&'a NormalizerWrapper>,
    is_first: bool,
}

impl PieceNormalizer<'_> {
    fn apply(
        &self,
        part: &NormalizerWrapper,
        text: &mut NormalizedString,
    ) -> tokenizers::Result<()> {
        // Behind an added token a text begins anew.
        let is_continued = !self.is_first && text.offsets_original().0 == 0;
        match part {
            NormalizerWrapper::Sequence(parts) => parts
                .as_ref()
                .iter()
                .try_for_each(|part| self.apply(part, text)),
            NormalizerWrapper::Prepend(_) if is_continued => Ok(()),
            part => part.normalize(text),
        }
    }
}

impl Normalizer for PieceNormalizer<'_> {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        self.whole.map_or(Ok(()), |whole| self.apply(whole, text))
    }
}

/// Returns `ids` with the ids that the post-processor puts around them. It is shown one token in their place, which costs
/// less than all; that it takes the text once was checked when the tokenizer was read.
fn framed(
    tokenizer: &tokenizers::Tokenizer,
    ids: &[u32],
    add_special: bool,
) -> tokenizers::Result<Vec<u32>> {
    const TEXT: u32 = u32::MAX;
    let encoding: Encoding = [(TEXT, String::new(), (0, 0), None, 0)]
        .into_iter()
        .collect();
    let encoding = tokenizer.post_process(encoding, None, add_special)?;
    let frame = encoding.get_ids();
    let place = frame.iter().position(|&id| id == TEXT);
    let place = place.ok_or("the post-processor leaves out the text")?;
    Ok([&frame[..place], ids, &frame[place + 1..]].concat())
}

fn failed(e: tokenizers::Error) -> Error {
    wrapped(ErrorKind::Invalid, "cannot encode the text", e)
}

fn check_text(text: &str) -> Result<()> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(Error::new(
            ErrorKind::TooLarge,
            format!(
                "the text has {} bytes, the cap is {MAX_TEXT_BYTES}",
                text.len()
            ),
        ));
    }
    if text.len() <= MAX_RUN_CHARS {
        return Ok(());
    }
    let (mut run, mut kind) = (0_usize, false);
    for c in text.chars() {
        run = if c.is_whitespace() == kind {
            run + 1
        } else {
            1
        };
        kind = c.is_whitespace();
        if run > MAX_RUN_CHARS {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!(
                    "the text has more than {MAX_RUN_CHARS} characters in a row {} white space",
                    if kind { "of nothing but" } else { "without" }
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
