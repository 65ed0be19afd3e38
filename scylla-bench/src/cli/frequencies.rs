//! `scylla inspect frequencies`

use std::path::PathBuf;

use clap::Args;
use scylla_core::assets::{resolve, write_atomically};
use scylla_core::model::ModelFiles;
use scylla_core::text::Tokenizer;

use super::with_download;
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

impl Frequencies {
    pub(super) fn run(self) -> Result<()> {
        let path = with_download(|p| Ok(resolve(&self.model, p)?))?;
        let files = ModelFiles::open(&path)?;
        let tokenizer = Tokenizer::of_model(&files)?.ok_or_else(|| {
            Error::file(
                &path,
                "this model has no tokenizer, so nothing can be counted",
            )
        })?;
        let mut counts = vec![0u64; tokenizer.size()];
        for path in &self.text {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            for line in text.split_inclusive('\n') {
                for id in tokenizer.encode_plain(line)? {
                    if let Some(count) = counts.get_mut(id as usize) {
                        *count += 1;
                    }
                }
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
        write_atomically(&self.output, lines.as_bytes())?;
        let (all, seen): (u64, usize) = (
            counts.iter().sum(),
            counts.iter().filter(|&&c| c > 0).count(),
        );
        eprintln!("{all} tokens, {seen} different ones of {}", counts.len());
        Ok(())
    }
}
