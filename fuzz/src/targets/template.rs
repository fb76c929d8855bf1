//! Target: the parts as a chat template and a user message.

use upg_kernel::inference::chat_template::{ChatTemplate, Message};

pub fn run(data: &[u8]) {
    let [source, said] = super::parts(data);
    let template = match ChatTemplate::new(&super::text(source), Some("<s>"), Some("</s>")) {
        Ok(template) => template,
        Err(e) => return super::one_line(&e),
    };
    let said = super::text(said);
    let messages = [
        Message::new("system", "You answer in one word."),
        Message::new("user", said.clone()),
        Message::new("assistant", "Yes."),
        Message::new("user", said),
    ];
    for messages in [&messages[..], &messages[1..2]] {
        if let Err(e) = template.render(messages, true) {
            super::one_line(&e);
        }
    }
}
