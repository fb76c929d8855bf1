//! Conversations as JSON files: the messages as APIs of chats have them.
#![forbid(unsafe_code)]

use crate::terminal;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use upg_kernel::inference::chat_template::Message;
use upg_kernel::inference::tokenizer::MAX_TEXT_BYTES;
use upg_kernel::support::AtomicFile;
use upg_kernel::{Error, ErrorKind, Result};

/// Writes a conversation. Errors: `Io`.
pub fn save(path: &Path, system: Option<&str>, turns: &[Message]) -> Result<()> {
    let system = system.map(|text| Message::new("system", text));
    let messages: Vec<Value> = system
        .iter()
        .chain(turns)
        .map(|message| json!({ "role": message.role, "content": message.content }))
        .collect();
    let mut file = AtomicFile::create(path)?;
    let text = format!("{:#}\n", json!({ "messages": messages }));
    file.write_all(text.as_bytes())
        .map_err(|e| Error::io("cannot write", path, e))?;
    file.commit()
}

/// Reads a conversation: its system message, if any, and its turns.
///
/// Errors: `Io`; `TooLarge`; `Malformed` if it is no JSON of this form.
pub fn load(path: &Path) -> Result<(Option<String>, Vec<Message>)> {
    let text = terminal::read_text(path, MAX_TEXT_BYTES)?;
    let malformed = |what: &str| {
        let message = format!("no saved conversation: {what}");
        Error::new(ErrorKind::Malformed, message).at(path)
    };
    let json: Value = serde_json::from_str(&text).map_err(|e| malformed(&e.to_string()))?;
    let messages = json.get("messages").and_then(Value::as_array);
    let messages = messages.ok_or_else(|| malformed("it has no list 'messages'"))?;
    let text_of = |message: &Value, key: &str| {
        let text = message.get(key).and_then(Value::as_str);
        let missing = || malformed(&format!("a message has no text '{key}'"));
        text.map(str::to_owned).ok_or_else(missing)
    };
    let mut system = None;
    let mut turns = Vec::new();
    for message in messages {
        let (role, content) = (text_of(message, "role")?, text_of(message, "content")?);
        match role.as_str() {
            "system" if turns.is_empty() && system.is_none() => system = Some(content),
            _ => turns.push(Message::new(role, content)),
        }
    }
    if turns.iter().all(|turn| turn.role != "user") {
        return Err(malformed("it has no question"));
    }
    Ok((system, turns))
}
