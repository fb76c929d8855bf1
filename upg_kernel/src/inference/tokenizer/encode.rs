//! Encoding of text to ids, in pieces, with an interrupt flag checked between them.
#![forbid(unsafe_code)]

use super::Tokenizer;
use super::contained::{contained, wrapped};
use super::limits::{MAX_RUN_CHARS, MAX_TEXT_BYTES};
use super::options::{EncodeOptions, SpecialText};
use crate::{Error, ErrorKind, Result};
use tokenizers::{
    Encoding, Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizer,
};

impl Tokenizer {
    /// Returns the ids of `text`; special tokens in it are parsed.
    ///
    /// `add_special` adds begin and end of sequence where the model wants them. Leave it off for
    /// the output of a chat template, which has them already.
    ///
    /// # Errors
    /// `TooLarge` if the text is above [`MAX_TEXT_BYTES`] or has a run above [`MAX_RUN_CHARS`].
    /// Also if over 2 MiB of it cannot be cut and the tokenizer's normalizer may make them over
    /// nine times longer, which those of published tokenizers do not.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.encode_with(
            text,
            EncodeOptions {
                add_special,
                ..EncodeOptions::default()
            },
        )
    }

    /// Runs [`Tokenizer::encode`] with a choice of how special tokens in `text` are treated.
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

    /// Runs [`Tokenizer::encode`], interruptible by a flag.
    ///
    /// A long text is encoded in pieces of about 32 KiB, cut where this does not change the ids.
    /// The flag is checked between them; each takes some tens of milliseconds. Memory is that of a
    /// piece and of the ids.
    ///
    /// Some tokenizers have no such cut points, or none in some texts. A stretch without a cut
    /// point is one piece. It takes time about linear in its length (up to a second per MiB),
    /// during which the flag is not checked, and memory up to 300 times its bytes.
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

    /// Adds begin and end tokens of `add_bos_token`/`add_eos_token` that the post-processor has
    /// left out.
    ///
    /// Some files specify them in one place only. As in transformers, `false` removes nothing.
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

/// Appends the ids of a piece, as `tokenizers::Tokenizer::encode_fast` gives them without
/// special tokens.
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

/// Normalizer of a tokenizer for one piece of a text.
///
/// A prefix before the text is added to the first piece only.
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
        // After an added token a text starts anew.
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

/// Returns `ids` with the ids that the post-processor puts around them.
///
/// It gets one token in their place, which costs less than all. When the tokenizer was read, it was
/// checked that the post-processor uses the text once.
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
                "the text has {} bytes, the limit is {MAX_TEXT_BYTES}",
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
