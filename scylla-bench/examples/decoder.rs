//! The library's front door: a target, a draft and a rule, composed into a decoder that answers.
use scylla_core::engine::Draft;
use scylla_core::model::LoadOptions;
use scylla_core::text::Message;
use scylla_core::{Decoder, Target};

fn main() -> scylla_core::Result<()> {
    let target = Target::open("default", &LoadOptions::default())?;
    let draft = Draft::new("ngram", scylla_draft::Ngram::new(2, 4)?);
    let mut decoder = Decoder::new(target, Some(draft), scylla_verify::Auto)?;
    let question = decoder.request(&[Message::user("Name three rivers of Europe.")])?;
    let answer = decoder.answer(question, |text| print!("{text}"))?;
    let tau = answer.tau().unwrap_or(1.0);
    println!("\n{} tokens, tau {tau:.2}", answer.ids.len());
    Ok(())
}
