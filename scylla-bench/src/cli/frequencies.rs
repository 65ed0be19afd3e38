//! `scylla inspect frequencies`

use std::path::{Path, PathBuf};

use clap::Args;
use scylla_core::files::read_text;
use scylla_core::text::{Tokenizer, no_tokenizer};

use super::inspect::open;
use super::{say, warn};
use crate::{Error, Result};

#[derive(Args)]
pub(super) struct Frequencies {
    /// Model whose tokenizer counts: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    model: String,
    /// Texts to count, UTF-8
    #[arg(long, required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// File to write: one id and its count per line, the most frequent first, every id of the tokenizer
    #[arg(long)]
    output: PathBuf,
}

/// Pieces of about 64 KiB, cut behind a line's end between two characters that are no space: some tokens hold
/// several line ends, or one with the space around it.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = rest.as_bytes();
        let cut = |&i: &usize| {
            let solid = |b: u8| !b.is_ascii_whitespace();
            bytes[i - 1] == b'\n' && solid(bytes[i - 2]) && solid(bytes[i])
        };
        let end = (64 << 10..bytes.len()).find(cut).unwrap_or(bytes.len());
        let (piece, others) = rest.split_at(end);
        rest = others;
        Some(piece)
    })
}

/// Counts the tokens of a text, all of them or none.
fn count(path: &Path, tokenizer: &Tokenizer, counts: &mut [u64]) -> Result<()> {
    let text = read_text(path)?;
    let mut found = Vec::new();
    for piece in pieces(&text) {
        found.extend(tokenizer.encode_plain(piece)?);
    }
    for id in found {
        if let Some(count) = counts.get_mut(id as usize) {
            *count += 1;
        }
    }
    Ok(())
}

impl Frequencies {
    pub(super) fn run(self) -> Result<()> {
        let files = open(&self.model)?;
        let tokenizer =
            Tokenizer::of_model(&files)?.ok_or_else(|| Error::Experiment(no_tokenizer(&files)))?;
        let mut counts = vec![0u64; tokenizer.size()];
        let mut left_out = 0;
        for path in &self.text {
            // One text that cannot be read does not undo the counting of the others.
            if let Err(e) = count(path, &tokenizer, &mut counts) {
                warn(&format!("left out: {e}"));
                left_out += 1;
            }
        }
        // A generated text ends, whatever a file says; so the ends come first.
        let last = u64::MAX;
        let rank = |id: usize| match tokenizer.eos().contains(&(id as u32)) {
            true => last,
            false => counts[id],
        };
        let mut order: Vec<usize> = (0..counts.len()).collect();
        order.sort_by_key(|&id| (std::cmp::Reverse(rank(id)), id));
        let line = |&id: &usize| format!("{id} {}\n", counts[id]);
        let lines: String = order.iter().map(line).collect();
        scylla_core::files::write(&self.output, lines.as_bytes())?;
        let (all, seen): (u64, usize) = (
            counts.iter().sum(),
            counts.iter().filter(|&&c| c > 0).count(),
        );
        say(&format!(
            "{all} tokens, {seen} different ones of {}",
            counts.len()
        ));
        match left_out {
            0 => Ok(()),
            n => Err(Error::Experiment(format!(
                "{n} of {} texts were left out of the counts",
                self.text.len()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_up_the_text_and_part_only_solid_lines() {
        let text = "a line\n\n  and \u{e9}\nanother\n".repeat(20_000);
        let found: Vec<&str> = pieces(&text).collect();
        assert!(found.len() > 3);
        assert_eq!(found.concat(), text);
        for piece in &found[..found.len() - 1] {
            assert!(
                piece.ends_with("\u{e9}\n") || piece.ends_with("another\n"),
                "{piece:?}"
            );
        }
    }
}
