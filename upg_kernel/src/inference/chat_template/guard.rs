//! Charges fuel for operations that the engine does not charge for, by inserting filters into
//! the source.
//!
//! Three operations are free in the engine and can exhaust memory or the stack:
//! - Joining and repeating lists is lazy, and the whole is copied once 32 joins are stacked:
//!   `{% set a = a + a %}` in a loop asks for 2^32 items at once.
//! - A list that holds the same list twice is small, and endless in print: `{% set a = [a, a] %}`.
//! - Lists nested 100,000 deep overflow the stack when they are dropped.
//!
//! Other operations take time that the engine does not count. Comparing two texts of 10 MB, testing
//! one, indexing one or using one as a key costs a single unit.
//!
//! Therefore, before a template is compiled, filters are inserted:
//! - The left operand of a `+` gets a filter that flattens a list and charges its length, so that a
//!   list can only grow by the charged amount.
//! - The operands of a `*` get one that rejects lists (no chat template repeats them).
//! - List, tuple and map literals and the values of `set` get one that charges everything in them,
//!   once per occurrence, and rejects great depth.
//! - Operands of comparisons, tests and indexing get one that charges the length of a text, and in
//!   comparisons also the content of lists and maps.
//!
//! The filters change no value. The engine's own lexer finds the places, so that a hostile template
//! cannot be read in two ways.
#![forbid(unsafe_code)]

use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

const FLAT: &str = "|_upg_flat";
const SCALAR: &str = "|_upg_scalar";
const SIZED: &str = "|_upg_sized)";
/// Suffix for the whole value of a `set`, which may be a sum,
/// a conditional or an unbracketed tuple.
const SET_SIZED: &str = ")|_upg_sized)";
const SET_STORED: &str = ")|_upg_stored)";
const TEXT: &str = "|_upg_text";
const INDEXED: &str = "|_upg_text)";
const WHOLE: &str = "|_upg_whole";

/// Comparing tests, as the engine spells them.
const COMPARING: &[&str] = &[
    "eq",
    "equalto",
    "ne",
    "gt",
    "greaterthan",
    "ge",
    "lt",
    "lessthan",
    "le",
    "in",
    "sameas",
];

/// List items per unit of fuel.
const ITEMS_PER_FUEL: u64 = 16;

/// Bytes of text in a list per unit of fuel, as in the engine.
const BYTES_PER_FUEL: u64 = 64;

/// Maximum nesting of lists and maps.
const MAX_DEPTH: usize = 32;

/// Lists, maps and their items per unit of fuel, where everything is counted.
const NODES_PER_FUEL: u64 = 4;

/// Maximum tokens in one tag, and maximum tags in a template.
///
/// The engine's parser recurses for each `not` and each `elif`, without a limit. The largest
/// published templates have about 100 and 500.
const MAX_TAG_TOKENS: usize = 1000;
const MAX_TAGS: usize = 4000;

/// Maximum digits of a width in `str.format`.
const MAX_WIDTH_DIGITS: usize = 3;

/// Keywords before a bracket that do not make it an index or a call.
const KEYWORDS: &[&str] = &[
    "in",
    "not",
    "and",
    "or",
    "is",
    "if",
    "else",
    "elif",
    "recursive",
    "do",
];

/// Tags whose brackets hold names, not values.
const NAME_TAGS: &[&str] = &["for", "set", "call"];

/// Adds the filters, and removes or replaces functions that join values themselves.
pub(super) fn install(env: &mut Environment<'_>) {
    for name in ["chain", "zip"] {
        env.remove_filter(name);
    }
    env.remove_global("debug");
    env.add_filter("_upg_flat", flat);
    env.add_filter("_upg_scalar", scalar);
    env.add_filter("_upg_sized", sized);
    env.add_filter("_upg_stored", stored);
    env.add_filter("_upg_text", text);
    env.add_filter("_upg_whole", whole);
    env.add_function("dict", dict);
    env.set_unknown_method_callback(|state, value, method, args| {
        if method == "format" {
            check_format(value.as_str().unwrap_or_default())?;
        }
        unknown_method_callback(state, value, method, args)
    });
}

/// Checks a format string: `'{:>999999999}'.format(1)` creates its text before any
/// fuel is charged.
fn check_format(format: &str) -> Result<(), Error> {
    let (mut digits, mut open) = (0_usize, 0_usize);
    for c in format.replace("{{", "").replace("}}", "").chars() {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        match c {
            '{' => open += 1,
            '}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > 1 || (open == 1 && digits > MAX_WIDTH_DIGITS) {
            return Err(refused(
                "format: computed or large widths are not supported",
            ));
        }
    }
    Ok(())
}

/// Returns the source with the filters inserted.
pub(super) fn guarded(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    let tokens = limited_tokens(source, syntax)?;
    let mut places = Places {
        tokens: &tokens,
        inserts: Vec::new(),
        open: Vec::new(),
        set: None,
        in_target: false,
    };
    for at in 0..tokens.len() {
        places.visit(at);
    }
    let mut inserts = places.inserts;
    inserts.sort_by_key(|&(at, _)| at);
    let mut out = String::with_capacity(source.len() + inserts.len() * SCALAR.len());
    let mut from = 0;
    for (at, text) in inserts {
        out.push_str(source.get(from..at).ok_or_else(lost)?);
        out.push_str(text);
        from = at;
    }
    out.push_str(source.get(from..).ok_or_else(lost)?);
    Ok(out)
}

fn limited_tokens(source: &str, syntax: SyntaxConfig) -> Result<Vec<(Token<'_>, Span)>, Error> {
    let mut tokens = Vec::new();
    let (mut tags, mut in_tag) = (0_usize, 0_usize);
    for token in tokenize(source, false, syntax) {
        let token = token?;
        if matches!(token.0, Token::BlockStart | Token::VariableStart) {
            tags += 1;
            in_tag = 0;
        }
        in_tag += 1;
        if in_tag > MAX_TAG_TOKENS || tags > MAX_TAGS {
            return Err(Error::new(
                ErrorKind::SyntaxError,
                format!("above {MAX_TAG_TOKENS} tokens in a tag or {MAX_TAGS} tags"),
            ));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

fn lost() -> Error {
    Error::new(
        ErrorKind::SyntaxError,
        "the lexer and the source do not agree",
    )
}

/// Bracket that is not closed yet.
struct Open {
    start: usize,
    literal: bool,
    /// Flag: it has a comma; only then a parenthesis makes a tuple.
    tuple: bool,
}

struct Places<'a> {
    tokens: &'a [(Token<'a>, Span)],
    /// Insertions as (offset in the source, text), in writing order at equal offsets.
    inserts: Vec<(usize, &'static str)>,
    open: Vec<Open>,
    /// Closing text inside of `{% set x = `.
    set: Option<&'static str>,
    /// Flag between `for` and its `in`, or `set` and its `=`, where brackets hold names.
    in_target: bool,
}

impl<'a> Places<'a> {
    fn token(&self, at: Option<usize>) -> Option<&'a Token<'a>> {
        self.tokens.get(at?).map(|(token, _)| token)
    }

    fn start(&self, at: usize) -> usize {
        self.tokens
            .get(at)
            .map_or(0, |(_, span)| span.start_offset as usize)
    }

    fn end(&self, at: usize) -> usize {
        self.tokens
            .get(at)
            .map_or(0, |(_, span)| span.end_offset as usize)
    }

    fn visit(&mut self, at: usize) {
        let left = at.checked_sub(1);
        match self.token(Some(at)) {
            Some(Token::Ident("for" | "set"))
                if matches!(self.token(left), Some(Token::BlockStart)) =>
            {
                self.in_target = true;
            }
            Some(Token::Ident("in") | Token::Assign | Token::BlockEnd) => self.in_target = false,
            _ => {}
        }
        match self.token(Some(at)) {
            Some(Token::Plus) if self.ends_operand(left) => self.insert_after(left, FLAT),
            Some(Token::Eq | Token::Ne | Token::Gt | Token::Gte | Token::Lt | Token::Lte)
                if self.ends_operand(left) =>
            {
                self.insert_after(left, WHOLE)
            }
            Some(Token::Ident("is")) if self.ends_operand(left) => {
                self.insert_after(left, self.price_of_test(at + 1));
            }
            Some(Token::Mul) if self.ends_operand(left) || self.is_number(left) => {
                if self.ends_operand(left) {
                    self.insert_after(left, SCALAR);
                }
                let right = self.operand_end(at + 1);
                self.insert_after(right, SCALAR);
            }
            Some(Token::Comma) => {
                if let Some(open) = self.open.last_mut() {
                    open.tuple = true;
                }
            }
            Some(Token::BraceOpen) => self.push(at, true, true),
            Some(Token::BracketOpen) => {
                let literal = self.opens_literal(at);
                if let Some(start) = left.filter(|_| !literal && self.ends_operand(left)) {
                    // A filter cannot be indexed, but a parenthesized one can.
                    self.inserts
                        .push((self.start(self.operand_start(start)), "("));
                    self.insert_after(left, INDEXED);
                }
                self.push(at, literal, true);
            }
            Some(Token::ParenOpen) => self.push(at, self.opens_literal(at), false),
            Some(Token::ParenClose | Token::BracketClose | Token::BraceClose) => {
                let is_index = matches!(self.token(Some(at)), Some(Token::BracketClose));
                match self.open.pop() {
                    Some(open) if open.literal && open.tuple => {
                        self.inserts.push((open.start, "("));
                        self.insert_after(Some(at), SIZED);
                    }
                    Some(open) if is_index && !open.literal && self.ends_operand(left) => {
                        self.insert_after(left, TEXT);
                    }
                    _ => {}
                }
            }
            Some(Token::Assign) if self.open.is_empty() && self.set.is_none() => {
                self.open_set(at);
            }
            Some(Token::BlockEnd | Token::VariableEnd) => {
                if let Some(close) = self.set.take() {
                    self.insert_after(left, close);
                }
                self.open.clear();
            }
            _ => {}
        }
    }

    /// Returns the filter for a value before the test whose name is at `at`, or after a `not`.
    fn price_of_test(&self, at: usize) -> &'static str {
        match self.token(Some(at)) {
            Some(Token::Ident("not")) => self.price_of_test(at + 1),
            Some(Token::Ident(test)) if COMPARING.contains(test) => WHOLE,
            _ => TEXT,
        }
    }

    fn insert_after(&mut self, at: Option<usize>, text: &'static str) {
        if let Some(at) = at {
            self.inserts.push((self.end(at), text));
        }
    }

    fn push(&mut self, at: usize, literal: bool, tuple: bool) {
        self.open.push(Open {
            start: self.start(at),
            literal,
            tuple,
        });
    }

    /// Wraps the value of `{% set names = value %}`.
    /// A value stored in a namespace outlives the others.
    fn open_set(&mut self, assign: usize) {
        let tag = self
            .tokens
            .iter()
            .take(assign)
            .rposition(|(token, _)| matches!(token, Token::BlockStart));
        let Some(tag) = tag else { return };
        if !matches!(self.token(Some(tag + 1)), Some(Token::Ident("set"))) {
            return;
        }
        let to_namespace = self
            .tokens
            .iter()
            .take(assign)
            .skip(tag)
            .any(|(token, _)| matches!(token, Token::Dot));
        self.set = Some(if to_namespace { SET_STORED } else { SET_SIZED });
        self.insert_after(Some(assign), "((");
    }

    /// Returns whether the bracket at `at` starts a value of its own:
    /// no index, no call, no names.
    fn opens_literal(&self, at: usize) -> bool {
        if self.in_target {
            return false;
        }
        let left = at.checked_sub(1);
        let before = left.and_then(|at| at.checked_sub(1));
        match self.token(left) {
            Some(Token::Ident(word)) if matches!(self.token(before), Some(Token::BlockStart)) => {
                !NAME_TAGS.contains(word)
            }
            Some(Token::Ident(_)) if self.is_test(left) => {
                // `x is eq [1]` compares with a list, `x is eq(1)` calls the test.
                matches!(self.token(Some(at)), Some(Token::BracketOpen))
            }
            Some(Token::Ident(word)) => {
                KEYWORDS.contains(word) && !matches!(self.token(before), Some(Token::Dot))
            }
            Some(Token::Str(_) | Token::String(_)) => false,
            _ => !self.ends_operand(left),
        }
    }

    /// Returns whether a value that may be a list ends at `at`.
    fn ends_operand(&self, at: Option<usize>) -> bool {
        let before = at.and_then(|at| at.checked_sub(1));
        match self.token(at) {
            Some(Token::Ident(_) | Token::ParenClose | Token::BracketClose | Token::BraceClose) => {
                true
            }
            // `messages.0`
            Some(Token::Int(_)) => matches!(self.token(before), Some(Token::Dot)),
            _ => false,
        }
    }

    /// Returns whether the name at `at` is a test: it follows an `is` or `is not`.
    fn is_test(&self, at: Option<usize>) -> bool {
        let before = |at: Option<usize>| at.and_then(|at| at.checked_sub(1));
        let word = |at| matches!(self.token(at), Some(Token::Ident("is")));
        let previous = before(at);
        word(previous)
            || matches!(self.token(previous), Some(Token::Ident("not"))) && word(before(previous))
    }

    fn is_number(&self, at: Option<usize>) -> bool {
        matches!(
            self.token(at),
            Some(Token::Int(_) | Token::Int128(_) | Token::Float(_))
        )
    }

    /// Returns the last token of the operand that starts at `at`.
    ///
    /// An operand is signs, one atom, then `.name`, `[..]`, `(..)` and `|filter`,
    /// as far as they go.
    fn operand_end(&self, mut at: usize) -> Option<usize> {
        while matches!(self.token(Some(at)), Some(Token::Minus | Token::Plus)) {
            at += 1;
        }
        let mut last = self.group_end(at)?;
        loop {
            at = last + 1;
            last = match self.token(Some(at)) {
                Some(Token::Dot | Token::Pipe) => at + 1,
                Some(Token::BracketOpen | Token::ParenOpen) => self.group_end(at)?,
                // Adjacent string literals are one.
                Some(Token::Str(_) | Token::String(_)) => at,
                _ => return Some(last),
            };
        }
    }

    /// Returns the first token of the operand that ends at `at`, without signs.
    fn operand_start(&self, mut at: usize) -> usize {
        loop {
            let is_group = matches!(
                self.token(Some(at)),
                Some(Token::ParenClose | Token::BracketClose | Token::BraceClose)
            );
            if is_group {
                at = self.group_start(at);
            }
            let Some(before) = at.checked_sub(1) else {
                return at;
            };
            at = match self.token(Some(before)) {
                Some(Token::Dot) if !is_group => before.saturating_sub(1),
                Some(Token::Ident(word))
                    if is_group && !KEYWORDS.contains(word) && !self.is_test(Some(before)) =>
                {
                    before
                }
                Some(Token::ParenClose | Token::BracketClose | Token::BraceClose) if is_group => {
                    before
                }
                _ => return at,
            };
        }
    }

    /// Returns the first token of the bracketed group that ends at `to`.
    fn group_start(&self, to: usize) -> usize {
        let mut depth = 0_usize;
        for (at, (token, _)) in self.tokens.iter().enumerate().take(to + 1).rev() {
            match token {
                Token::ParenClose | Token::BracketClose | Token::BraceClose => depth += 1,
                Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => {
                    depth = depth.saturating_sub(1);
                }
                _ => {}
            }
            if depth == 0 {
                return at;
            }
        }
        to
    }

    /// Returns the last token of the bracketed group that starts at `from`, or `from` itself.
    fn group_end(&self, from: usize) -> Option<usize> {
        let mut depth = 0_usize;
        for (at, (token, _)) in self.tokens.iter().enumerate().skip(from) {
            match token {
                Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => depth += 1,
                Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                    depth = depth.checked_sub(1)?;
                }
                Token::BlockEnd | Token::VariableEnd => return None,
                _ => {}
            }
            if depth == 0 {
                return Some(at);
            }
        }
        None
    }
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn flat(state: &State, value: Value) -> Result<Value, Error> {
    if !is_list(&value) {
        return Ok(value);
    }
    if let Some(len) = value.len() {
        state.consume_fuel(len as u64 / ITEMS_PER_FUEL)?;
        if value.kind() == ValueKind::Seq {
            return Ok(value);
        }
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        if (items.len() as u64).is_multiple_of(ITEMS_PER_FUEL) {
            state.consume_fuel(1)?;
        }
        items.push(item);
    }
    Ok(Value::from(items))
}

fn scalar(value: Value) -> Result<Value, Error> {
    if is_list(&value) {
        return Err(refused("lists cannot be repeated in a chat template"));
    }
    Ok(value)
}

fn text(state: &State, value: Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        state.consume_fuel(text.len() as u64 / BYTES_PER_FUEL)?;
    }
    Ok(value)
}

fn whole(state: &State, value: Value) -> Result<Value, Error> {
    if value.as_str().is_some() {
        return text(state, value);
    }
    pay(state, &value, true)?;
    Ok(value)
}

fn sized(state: &State, value: Value) -> Result<Value, Error> {
    pay(state, &value, true)?;
    Ok(value)
}

fn stored(state: &State, value: Value) -> Result<Value, Error> {
    pay(state, &value, false)?;
    Ok(value)
}

/// Implements `dict(a=1)`, with the charge of a literal.
fn dict(state: &State, items: Kwargs) -> Result<Value, Error> {
    let pairs: Vec<(String, Value)> = items
        .args()
        .map(|name| Ok((name.to_owned(), items.get::<Value>(name)?)))
        .collect::<Result<_, Error>>()?;
    sized(state, Value::from_pairs(pairs))
}

/// Charges everything in `value`, once for each way to reach it.
///
/// A namespace is the only mutable value: inside another one it could come to contain itself.
fn pay(state: &State, value: &Value, namespace: bool) -> Result<(), Error> {
    // The engine has already charged for a single text when it was created.
    if value.kind() != ValueKind::Map && !is_list(value) {
        return Ok(());
    }
    let mut pending = vec![(value.clone(), 0_usize)];
    let (mut nodes, mut bytes) = (0_u64, 0_u64);
    while let Some((value, depth)) = pending.pop() {
        nodes += 1;
        bytes += value.as_str().map_or(0, |s| s.len() as u64);
        if nodes >= NODES_PER_FUEL || bytes >= BYTES_PER_FUEL {
            state.consume_fuel(nodes / NODES_PER_FUEL + bytes / BYTES_PER_FUEL)?;
            (nodes, bytes) = (nodes % NODES_PER_FUEL, bytes % BYTES_PER_FUEL);
        }
        let map = value.kind() == ValueKind::Map;
        if !map && !is_list(&value) {
            continue;
        }
        if depth >= MAX_DEPTH {
            return Err(refused("lists and maps are nested too deeply"));
        }
        if is_namespace(&value) && (depth > 0 || !namespace) {
            return Err(refused("a namespace cannot be put into another value"));
        }
        for item in value.try_iter()? {
            if map {
                pending.push((value.get_item(&item)?, depth + 1));
            }
            pending.push((item, depth + 1));
            if (pending.len() as u64).is_multiple_of(ITEMS_PER_FUEL) {
                state.consume_fuel(1)?;
            }
        }
    }
    Ok(())
}

fn is_namespace(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

fn refused(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests;
