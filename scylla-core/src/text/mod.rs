//! Tokenizers, chat templates, and text that grows token by token.

mod chat;
mod gguf;
mod python;
mod templates;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use tokenizer::{TextStream, Tokenizer, eos_of_model, no_tokenizer};
