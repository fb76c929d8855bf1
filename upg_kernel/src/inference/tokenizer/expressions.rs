//! Regular expressions that may split a text.
//!
//! `Split` searches from the end of the last match. An expression that looks far ahead and then
//! takes little makes this quadratic in the text. On one that backtracks over a long stretch the
//! regex engine gives up, which leaves the rest of the text in one piece. So each alternative of an
//! expression must take everything that it has looked at, except for a few characters, or be one of
//! the known ones that leave the rest to the alternative after them.
#![forbid(unsafe_code)]

use regex_syntax::hir::{Hir, HirKind, Repetition};

/// Maximum bytes of an expression: the longest known one has 400.
const MAX_EXPRESSION: usize = 2048;

/// Maximum bytes that an alternative may look at in vain: those of 16 characters.
const MAX_LOOK: usize = 64;

/// Alternatives of published tokenizers.
///
/// None matches a character and whitespace after it, except line ends after punctuation. None
/// depends on what follows a match that ends in anything but whitespace.
const WORDS: &[&str] = &[
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "(?:'s|'t|'re|'ve|'m|'ll|'d)",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "'(?i:[sdmt]|ll|ve|re)",
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"\p{N}",
    r"\p{N}+",
    r"\p{N}{1,2}",
    r"\p{N}{1,3}",
    r"\p{N}{1,3}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}\r\n]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    "[一-龥぀-ゟ゠-ヿ]+",
];

/// Alternatives that take all whitespace from a position on.
///
/// The ones before the last look over it, and take it except for one character or leave it to the
/// last one.
const SPACES: &[&[&str]] = &[
    &[r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"],
    &[r"\s*[\r\n]+", r"\s+"],
    &[r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"],
    &[r"\s++$", r"\s*[\r\n]", r"\s+(?!\S)", r"\s"],
    &[r"\s*[\r\n]", r"\s+(?!\S)", r"\s"],
    &[r"\s+(?!\S)", r"\s+"],
];

/// Words that end where upper case follows lower case, with and without contractions.
///
/// The first one looks over upper case in vain, the second one takes it.
const CASED: &[&[&str]] = &[
    &[
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    ],
    &[
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    ],
];

/// Whitespace at the end of a text: one search, which fails or is the last.
const TRAILING: &[&str] = &[r"\s+$"];

/// Knowledge of the cuts that an expression makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cuts {
    /// It cuts before whitespace that follows another character,
    /// whatever else there is in the text.
    BeforeSpaces,
    /// It cuts at some places, but never at one that depends on the other side
    /// of such whitespace.
    Within,
    /// It takes time linear in the text; nothing is known of its cuts.
    Anywhere,
}

/// Returns the cuts that `expression` makes; `None` if its time may be more than linear in
/// the text.
pub(super) fn examine(expression: &str) -> Option<Cuts> {
    if expression.len() > MAX_EXPRESSION || sets_flags(expression) {
        return None;
    }
    let parts = alternatives(expression);
    if parts == TRAILING {
        return Some(Cuts::Anywhere);
    }
    let (mut rest, mut cuts) = (parts.as_slice(), Cuts::Within);
    let mut all_known = true;
    while let Some(&part) = rest.first() {
        let known =
            |groups: &[&[&str]]| groups.iter().find(|g| rest.starts_with(g)).map(|g| g.len());
        let taken = if let Some(n) = known(SPACES) {
            cuts = Cuts::BeforeSpaces;
            n
        } else if let Some(n) = known(CASED) {
            n
        } else if WORDS.contains(&part) {
            1
        } else {
            all_known = false;
            let hir = regex_syntax::parse(part).ok()?;
            takes_what_it_sees(&hir).then_some(1)?
        };
        rest = &rest[taken..];
    }
    Some(if all_known { cuts } else { Cuts::Anywhere })
}

/// Returns the alternatives of an expression: the parts between top-level bars.
fn alternatives(expression: &str) -> Vec<&str> {
    let (mut parts, mut start) = (Vec::new(), 0);
    let (mut escaped, mut classes, mut groups) = (false, 0_usize, 0_usize);
    for (place, c) in expression.char_indices() {
        if std::mem::take(&mut escaped) {
            continue;
        }
        match c {
            '\\' => escaped = true,
            '[' => classes += 1,
            ']' => classes = classes.saturating_sub(1),
            '(' if classes == 0 => groups += 1,
            ')' if classes == 0 => groups = groups.saturating_sub(1),
            '|' if classes == 0 && groups == 0 => {
                parts.push(&expression[start..place]);
                start = place + 1;
            }
            _ => {}
        }
    }
    parts.push(&expression[start..]);
    parts
}

/// Returns whether a flag is set for everything that follows.
///
/// It would affect other alternatives too, which are examined separately.
fn sets_flags(expression: &str) -> bool {
    expression.split("(?").skip(1).any(|rest| {
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_alphabetic() || c == '-');
        rest.starts_with(')')
    })
}

/// Returns whether a search for `hir` looks at most [`MAX_LOOK`] bytes beyond its match.
///
/// Once it repeats something without a bound, it can end after each repetition.
fn takes_what_it_sees(hir: &Hir) -> bool {
    let properties = hir.properties();
    properties.look_set().is_empty()
        && (is_short(hir)
            || match hir.kind() {
                HirKind::Capture(capture) => takes_what_it_sees(&capture.sub),
                HirKind::Repetition(repetition) => repeats_freely(repetition),
                HirKind::Alternation(parts) => parts.iter().all(takes_what_it_sees),
                HirKind::Concat(parts) => {
                    let short = parts.iter().take_while(|p| is_short(p)).count();
                    let (before, from) = parts.split_at(short);
                    let looked: usize = before
                        .iter()
                        .filter_map(|p| p.properties().maximum_len())
                        .sum();
                    looked <= MAX_LOOK
                        && from.iter().all(takes_what_it_sees)
                        && from
                            .iter()
                            .skip(1)
                            .all(|p| p.properties().minimum_len() == Some(0))
                }
                _ => false,
            })
}

fn is_short(hir: &Hir) -> bool {
    hir.properties()
        .maximum_len()
        .is_some_and(|most| most <= MAX_LOOK)
}

/// Returns whether this repeats a short part, or one character class.
///
/// In `x++` the second sign has another meaning in the engine, but takes as much.
fn repeats_freely(repetition: &Repetition) -> bool {
    let least = repetition.sub.properties().minimum_len().unwrap_or(0);
    let is_bounded_before = least.saturating_mul(repetition.min as usize) <= MAX_LOOK;
    is_bounded_before
        && match repetition.sub.kind() {
            HirKind::Repetition(inner) => {
                repetition.min <= 1 && matches!(inner.sub.kind(), HirKind::Class(_))
            }
            _ => is_short(&repetition.sub),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Built-in expression of `ByteLevel`.
    const GPT2: &str =
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    #[test]
    fn alternatives_are_those_outside_of_groups_and_classes() {
        assert_eq!(
            alternatives(r"a|(?:b|c)+|[|\]|]|\||d"),
            ["a", "(?:b|c)+", r"[|\]|]", r"\|", "d"]
        );
        assert_eq!(alternatives(""), [""]);
    }

    #[test]
    fn known_expressions_cut_before_spaces() {
        let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let cased = [
            CASED[0].join("|"),
            r"\p{N}{1,3}".into(),
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*".into(),
            SPACES[0].join("|"),
        ];
        let possessive = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
        for expression in [GPT2, llama3, &cased.join("|"), possessive] {
            assert_eq!(
                examine(expression),
                Some(Cuts::BeforeSpaces),
                "{expression}"
            );
        }
        for expression in [r"\p{N}{1,3}", r"\p{N}", r"\p{N}+", "[一-龥぀-ゟ゠-ヿ]+"] {
            assert_eq!(examine(expression), Some(Cuts::Within));
        }
    }

    #[test]
    fn other_linear_expressions_are_taken() {
        for expression in [
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            r"\s+$",
            r"[一-龥ࠀ-一가-퟿]+",
            "[0-9][0-9][0-9]",
            r" ?[^(\s|[.,!?…。，、।۔،])]+",
            r"a+b*(?:cd)?",
            r"(?:ab)+",
            " ",
        ] {
            assert_eq!(examine(expression), Some(Cuts::Anywhere), "{expression}");
        }
    }

    #[test]
    fn expressions_that_look_far_and_take_little_are_refused() {
        for expression in [
            r"(?:(a|a)*)b|a",
            r"a*b|a",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            // Takes one character of the run that its neighbours have looked over.
            r"\s*[\r\n]+|\s|\s+(?!\S)|\s+",
            CASED[0][0],
            r"(?=(\d{3})+(?!\d))",
            r"(a+)+b",
            r"((a|aa)+)*",
            r"(a)\1",
            r"a{100}",
            r"(?:a{1,9}){1,9}b+",
            r"\p{L}+$",
            r"\bfoo+",
            r"(?x)a|b",
            "(",
            &"a|".repeat(2000),
        ] {
            assert_eq!(examine(expression), None, "{expression}");
        }
    }
}
