//! Chat messages to prompt text, by the Jinja template of the model.
//!
//! Renders like transformers' `apply_chat_template`, without tools or documents. A template is a
//! program from an unchecked file. It can read only the messages, has no access to files or other
//! templates, and is limited by fuel (work and memory), an output limit and a recursion limit.
//! Templates see no clock except the date they are given, so the same messages give the same text.
#![forbid(unsafe_code)]

mod date;
mod guard;
mod python_json;
mod python_tests;

use std::io::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, context};
use serde_json::{Map, Value as Json};

use crate::format::json;
use crate::inference::tokenizer::token_text;
use crate::inference::tokenizer_config::default_template;
use crate::{Error, ErrorKind, Result};

pub use date::Date;

/// Maximum size of the template source in bytes: the largest published ones have about 30 kB.
pub const MAX_TEMPLATE_BYTES: usize = 256 << 10;

/// Maximum rendered text in bytes, the limit of one tokenizer call.
pub const MAX_OUTPUT_BYTES: usize = 16 << 20;

/// Fuel of every render: one unit per instruction, and one per 64 bytes created or read.
const BASE_FUEL: u64 = 2_000_000;

/// Additional fuel per byte of the messages.
const FUEL_PER_BYTE: u64 = 1;

/// Maximum nesting of macros, loops and conditions while rendering, as counted by the engine.
const MAX_RECURSION: usize = 100;

/// Stack size for the engine, whose parser and interpreter are recursive.
///
/// In debug builds the limits allow a use of 8 to 12 MiB; threads have 2 MiB by default. Only
/// touched pages take memory.
const STACK_BYTES: usize = 64 << 20;

/// Maximum characters of a template's own message (`raise_exception`) in an error.
const MAX_MESSAGE_CHARS: usize = 300;

/// Names that every rendering defines.
const DEFINED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// Maximum characters of a template's line in an error.
const MAX_LINE_CHARS: usize = 120;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// Role of the speaker: `system`, `user`, `assistant`,
    /// or another one that the template knows.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

impl Message {
    /// Creates a message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }

    fn to_value(&self) -> Value {
        Value::from_pairs([
            ("role", self.role.as_str()),
            ("content", self.content.as_str()),
        ])
    }
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    /// Text as given, with the same lines as `source`, for errors.
    original: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    date: Option<Date>,
    arguments: Map<String, Json>,
}

impl ChatTemplate {
    /// Checks and stores a template.
    ///
    /// `bos_token` and `eos_token` are the spellings that the template may ask for; without them
    /// the names are undefined, as in transformers.
    ///
    /// # Errors
    /// `TooLarge` above [`MAX_TEMPLATE_BYTES`]; `Malformed` if it is not a Jinja template or uses a
    /// feature that a chat template must not use (other templates).
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!(
                    "the chat template has {} bytes, the limit is {MAX_TEMPLATE_BYTES}",
                    source.len()
                ),
            ));
        }
        let malformed = |e| template_error(ErrorKind::Malformed, &e, source);
        let mut template = Self {
            source: without_generation_tags(source),
            original: source.to_owned(),
            bos_token: bos_token.map(str::to_owned),
            eos_token: eos_token.map(str::to_owned),
            date: None,
            arguments: Map::new(),
        };
        template.source = guard::guarded(&template.source, syntax()).map_err(malformed)?;
        with_stack(|| {
            let env = template.environment(0);
            let compiled = env.template_from_str(&template.source);
            compiled.map(drop).map_err(malformed)
        })?;
        Ok(template)
    }

    /// Reads the template of a `tokenizer_config.json`; `None` if it has none.
    ///
    /// If there are several named templates, `default` is used.
    ///
    /// # Errors
    /// `Malformed` if it is not JSON, or if `chat_template` is neither a text nor such a list;
    /// those of [`ChatTemplate::new`].
    pub fn from_tokenizer_config(config: &str) -> Result<Option<Self>> {
        let keys = ["chat_template", "bos_token", "eos_token"];
        let config = json::fields("tokenizer_config.json", config, &keys)?;
        let Some(source) = default_template(&config)? else {
            return Ok(None);
        };
        let bos = token_text(config.get("bos_token"));
        let eos = token_text(config.get("eos_token"));
        Self::new(source, bos.as_deref(), eos.as_deref()).map(Some)
    }

    /// Defines `strftime_now` for the template, with this date at midnight.
    ///
    /// Without it that function is undefined, and templates fall back to a date of their own.
    pub fn with_date(mut self, date: Date) -> Self {
        self.date = Some(date);
        self
    }

    /// Defines more names for the template, such as `enable_thinking`.
    ///
    /// They replace those of an earlier call. transformers and servers call them
    /// `chat_template_kwargs`. Errors (`Argument`): a name that [`ChatTemplate::render`] defines.
    pub fn with_arguments(mut self, arguments: Map<String, Json>) -> Result<Self> {
        if let Some(name) = DEFINED.iter().find(|name| arguments.contains_key(**name)) {
            let message = format!("'{name}' of the chat template is set from the conversation");
            return Err(Error::new(ErrorKind::Argument, message));
        }
        self.arguments = arguments;
        Ok(self)
    }

    /// Returns whether the text of the template mentions the variable `name`.
    pub fn reads(&self, name: &str) -> bool {
        let found = with_stack(|| {
            let env = self.environment(0);
            let compiled = env.template_from_str(&self.source);
            Ok(compiled.is_ok_and(|template| template.undeclared_variables(false).contains(name)))
        });
        found.unwrap_or(false)
    }

    /// Renders the text of a conversation.
    ///
    /// `add_generation_prompt` appends the start of the assistant's turn. The template is compiled
    /// each time: published ones are short.
    ///
    /// # Errors
    /// `Argument` if the template rejects the messages (`raise_exception`), with its message;
    /// `TooLarge` if it runs out of fuel or above [`MAX_OUTPUT_BYTES`]; `Invalid` for any other
    /// failure in it.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let bytes: usize = messages
            .iter()
            .map(|m| m.role.len() + m.content.len() + size_of::<Message>())
            .fold(0, usize::saturating_add);
        if bytes > MAX_OUTPUT_BYTES {
            return Err(too_large("the messages"));
        }
        with_stack(|| self.render_here(messages, add_generation_prompt, bytes))
    }

    /// Runs [`ChatTemplate::render`] for messages of `bytes` bytes in total.
    fn render_here(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bytes: usize,
    ) -> Result<String> {
        let env = self.environment(bytes);
        let template = env
            .template_from_str(&self.source)
            .map_err(|e| template_error(ErrorKind::Malformed, &e, &self.original))?;
        let values = context! {
            messages => messages.iter().map(Message::to_value).collect::<Vec<Value>>(),
            tools => (),
            documents => (),
            add_generation_prompt,
            ..pairs(&self.arguments),
        };
        let mut output = Capped(Vec::new());
        match template.render_captured_to(values, &mut output) {
            Ok(_) => String::from_utf8(output.0).map_err(|e| {
                Error::new(
                    ErrorKind::Invalid,
                    "the output of the chat template is not UTF-8",
                )
                .with_source(e)
            }),
            Err(e) => Err(render_error(&e, &self.original)),
        }
    }

    /// Returns the environment as transformers sets it up,
    /// for messages of `bytes` bytes in total.
    fn environment(&self, bytes: usize) -> Environment<'_> {
        let mut env = Environment::new();
        let messages_fuel = (bytes as u64).saturating_mul(FUEL_PER_BYTE);
        env.set_fuel(Some(BASE_FUEL.saturating_add(messages_fuel)));
        env.set_recursion_limit(MAX_RECURSION);
        env.set_syntax(syntax());
        env.add_function("raise_exception", raise_exception);
        env.add_filter("tojson", python_json::tojson);
        python_tests::install(&mut env);
        guard::install(&mut env);
        if let Some(date) = self.date {
            env.add_function("strftime_now", move |format: &str| date.strftime(format));
        }
        for (name, token) in [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
        ] {
            if let Some(token) = token {
                env.add_global(name, token.as_str());
            }
        }
        env
    }
}

/// Returns the members of an object as a value of the engine.
fn pairs(object: &Map<String, Json>) -> Value {
    let members = object.iter();
    Value::from_pairs(members.map(|(name, value)| (name.as_str(), to_value(value))))
}

/// Converts a JSON value. JSON texts are at most 128 levels deep.
fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => (*flag).into(),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => number.into(),
            (_, Some(number)) => number.into(),
            _ => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(members) => pairs(members),
    }
}

/// Returns Jinja's delimiters with the whitespace rules of transformers.
fn syntax() -> SyntaxConfig {
    SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        // Only unusual delimiters can be invalid, and these are not set.
        .unwrap_or_default()
}

/// Calls the engine on a thread with [`STACK_BYTES`].
///
/// Its stack use depends on the build, and a stack overflow would end the process.
fn with_stack<T: Send>(call: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, call).map_err(|e| {
            Error::new(
                ErrorKind::Io,
                format!("no thread for the chat template: {e}"),
            )
            .with_source(e)
        })?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Marker of the errors that the template raised itself.
#[derive(Debug)]
struct Raised;

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("raised by the template")
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    let short: String = message.chars().take(MAX_MESSAGE_CHARS).collect();
    Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, short).with_source(Raised))
}

/// Buffer that refuses to grow above the limit.
struct Capped(Vec<u8>);

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len().saturating_add(bytes.len()) > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other("output above the cap"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn too_large(what: &str) -> Error {
    Error::new(
        ErrorKind::TooLarge,
        format!("{what} of the chat template: above {MAX_OUTPUT_BYTES} bytes"),
    )
}

fn render_error(e: &minijinja::Error, original: &str) -> Error {
    let mut cause: Option<&dyn std::error::Error> = Some(e);
    while let Some(this) = cause {
        if let Some(inner) = this.downcast_ref::<minijinja::Error>() {
            match inner.kind() {
                minijinja::ErrorKind::OutOfFuel => {
                    return Error::new(
                        ErrorKind::TooLarge,
                        "the chat template exceeds the work limit (out of fuel)",
                    );
                }
                minijinja::ErrorKind::WriteFailure => return too_large("the output"),
                _ => {}
            }
        }
        if this.is::<Raised>() {
            return Error::new(
                ErrorKind::Argument,
                format!(
                    "the chat template refuses the messages: {}",
                    detail(e).unwrap_or_default()
                ),
            );
        }
        cause = this.source();
    }
    template_error(ErrorKind::Invalid, e, original)
}

/// Describes an error with its line, and the text of the line in `original` if nothing else says
/// what is wrong.
fn template_error(kind: ErrorKind, e: &minijinja::Error, original: &str) -> Error {
    let line = e.line().map_or(String::new(), |n| format!(", line {n}"));
    let text = || {
        let text = original.lines().nth(e.line()?.checked_sub(1)?)?;
        let text: String = text.trim().chars().take(MAX_LINE_CHARS).collect();
        Some(format!("in '{}'", text.escape_debug()))
    };
    let what = detail(e)
        .or_else(text)
        .map_or(String::new(), |what| format!(": {what}"));
    Error::new(kind, format!("chat template{line}: {}{what}", e.kind()))
}

/// Returns the detail of an error, truncated:
/// it may contain any text that the template computed.
fn detail(e: &minijinja::Error) -> Option<String> {
    let detail = e.detail().filter(|detail| !detail.is_empty())?;
    Some(detail.chars().take(MAX_MESSAGE_CHARS).collect())
}

/// Replaces `{% generation %}`, which marks the assistant's text for training
/// and renders its content.
///
/// The engine does not know the tag, so it becomes an `if` that is always true, with the same
/// whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        let Some((body, after)) = tag.split_once("%}") else {
            rest = tag;
            break;
        };
        let word = body.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&body.replacen(word, "if true", 1)),
            "endgeneration" => out.push_str(&body.replacen(word, "endif", 1)),
            _ => {
                // The body may contain the start of another tag (inside a string), so search again.
                rest = tag;
                continue;
            }
        }
        out.push_str("%}");
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
