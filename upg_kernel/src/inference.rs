//! From text to text: tokenizer and chat template.
#![forbid(unsafe_code)]

pub mod chat_template;
pub mod tokenizer;
