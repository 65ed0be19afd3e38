//! `scylla data`

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use clap::{Args, Subcommand};
use scylla_core::plugin::Tap;
use scylla_core::text::Tokenizer;
use scylla_draft::checkpoint::{Layout, default_taps};
use serde::Serialize;

use super::{ModelOptions, Progress, open_session, print_json, print_text, say};
use crate::data::documents::{self, DataSpec, Documents};
use crate::data::features::{How, keep};
use crate::data::packing::{Position, Stream};
use crate::data::regenerate::regenerate;
use crate::data::speculators::import;
use crate::experiment::{Experiment, Override};
use crate::{Error, Registry, Result};

#[derive(Subcommand)]
pub(super) enum Data {
    /// Print tokens, masks and pairing of a sample, as a person would check them
    Show(Show),
    /// Let the target answer conversations itself: what a draft learns best from
    Regenerate(Regenerate),
    /// Compute the target's states of documents once and keep them, to train on without its pass
    Features(Features),
    /// Take over states that vLLM has computed for the speculators library (hs_{i}.safetensors)
    Import(Import),
}

impl Data {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        match self {
            Self::Show(c) => c.run(),
            Self::Regenerate(c) => c.run(registry, stop),
            Self::Features(c) => c.run(stop),
            Self::Import(c) => c.run(),
        }
    }
}

/// Which data, as an experiment names them.
#[derive(Args)]
struct Files {
    /// Files or folders: .txt, .md, .jsonl, .json, .parquet
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// train, dev, test or all
    #[arg(long, default_value = "train")]
    part: String,
    /// Tokens to read at most; 0: all
    #[arg(long, default_value_t = 0)]
    tokens: u64,
    /// The line that parts the documents of a text file
    #[arg(long, default_value = "<|endoftext|>")]
    separator: String,
    /// Train on all tokens of conversations, not on the assistant's alone
    #[arg(long)]
    whole: bool,
}

impl Files {
    fn spec(&self) -> DataSpec {
        DataSpec {
            files: self.files.clone(),
            part: self.part.clone(),
            tokens: self.tokens,
            separator: self.separator.clone(),
            whole: self.whole,
            ..DataSpec::default()
        }
    }
}

#[derive(Args)]
pub(super) struct Show {
    #[command(flatten)]
    files: Files,
    /// Target whose tokenizer and chat template are used
    #[arg(long, default_value = "default")]
    target: String,
    /// Rows of a line
    #[arg(long, default_value_t = 512)]
    length: usize,
    /// Seed of the order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Rows to print
    #[arg(long, default_value_t = 48)]
    rows: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct Regenerate {
    /// Conversations, in any form that prompt sets have; of answers that they hold nothing is kept
    input: PathBuf,
    /// JSON lines to append to; conversations that are in it already are not answered again
    #[arg(long)]
    output: PathBuf,
    /// The target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// Sequences side by side
    #[arg(long, default_value_t = 16)]
    batch: u64,
    /// New tokens of an answer at most
    #[arg(long, default_value_t = 512)]
    max_new_tokens: u64,
    /// Override any field of the experiment: sampling.temperature=0.7, draft.name=ngram
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

impl Regenerate {
    fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let mut overrides = self.model.overrides();
        overrides.push(Override::new("target.model", self.target.clone()));
        overrides.push(Override::number("run.batch", self.batch));
        overrides.push(Override::number("run.max_new_tokens", self.max_new_tokens));
        overrides.extend(Override::parse_all(&self.set)?);
        let experiment = Experiment::from_overrides(&overrides)?;
        let mut session = open_session(&experiment)?;
        let mut progress = Progress::new("answering", false);
        let found = regenerate(
            registry,
            &mut session,
            &experiment,
            &self.input,
            &self.output,
            stop,
            &mut |done, all, failure| {
                progress.set(done as u64, all as u64);
                if let Some(failure) = failure {
                    say(&format!("not answered: {failure}"));
                }
            },
        );
        progress.finish();
        let found = found?;
        if self.json {
            return print_json(&found);
        }
        print_text(&format!(
            "{} conversations: {} answered, {} were before, {} failed; {} tokens in {:.1} s ({:.0} tokens/s), {} answers cut at {} tokens\n",
            found.read,
            found.written,
            found.skipped,
            found.failed,
            found.tokens,
            found.seconds,
            found.tokens_per_s,
            found.cut,
            self.max_new_tokens
        ))
    }
}

#[derive(Args)]
pub(super) struct Features {
    #[command(flatten)]
    files: Files,
    /// Folder to write
    #[arg(long)]
    output: PathBuf,
    /// The target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// Whose states: eagle2, hass and scylla read the final one, eagle3 three layers' inputs beside it
    #[arg(long, default_value = "eagle3")]
    draft: String,
    /// Layers whose inputs are kept beside the final state [default: those of the draft]
    #[arg(long, value_delimiter = ',')]
    taps: Option<Vec<usize>>,
    /// Keep the target's K most probable tokens of each row; eagle3 then needs no final state, and the target's head is not computed
    /// again
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Tokens of a piece of a document at most
    #[arg(long, default_value_t = 512)]
    length: usize,
    /// Megabytes of a shard
    #[arg(long, default_value_t = 256)]
    shard_mb: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

#[derive(Args)]
pub(super) struct Import {
    /// Folder of hs_{i}.safetensors
    input: PathBuf,
    /// Layers whose inputs they hold, in order; the last is the target's number of layers (its last output)
    #[arg(long, value_delimiter = ',', required = true)]
    layers: Vec<usize>,
    /// Folder to write
    #[arg(long)]
    output: PathBuf,
    /// The target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// Megabytes of a shard
    #[arg(long, default_value_t = 256)]
    shard_mb: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

impl Import {
    fn run(self) -> Result<()> {
        let mut overrides = self.model.overrides();
        overrides.push(Override::new("target.model", self.target.clone()));
        let session = open_session(&Experiment::from_overrides(&overrides)?)?;
        let bytes = self.shard_mb.max(1) << 20;
        let kept = import(&session, &self.input, &self.layers, bytes, &self.output)?;
        if self.json {
            return print_json(&kept);
        }
        print_text(&format!(
            "{} samples, {} tokens: {:.2} GB in {} shards; train with data.features\n",
            kept.counts.written,
            kept.counts.tokens,
            kept.bytes as f64 / 1e9,
            kept.shards
        ))
    }
}

impl Features {
    fn taps(&self, layers: usize) -> Result<Vec<Tap>> {
        let inputs = match &self.taps {
            Some(taps) => taps.clone(),
            None => match Layout::of_name(&self.draft, "draft to train")? {
                [Layout::Eagle | Layout::Scylla, ..] => Vec::new(),
                _ => default_taps(layers)?.to_vec(),
            },
        };
        if let Some(tap) = inputs.iter().find(|&&t| t > layers) {
            return Err(Error::Experiment(format!(
                "tap {tap} of a target of {layers} layers"
            )));
        }
        if self.top_k > 0 && inputs.is_empty() {
            return Err(Error::Experiment(format!(
                "--top-k is for drafts that learn what the target says alone; `{}` learns its final states too",
                self.draft
            )));
        }
        let last = [Tap::Final].into_iter().filter(|_| self.top_k == 0);
        Ok(inputs.into_iter().map(Tap::Input).chain(last).collect())
    }

    fn run(self, stop: &AtomicBool) -> Result<()> {
        let mut overrides = self.model.overrides();
        overrides.push(Override::new("target.model", self.target.clone()));
        let experiment = Experiment::from_overrides(&overrides)?;
        let mut session = open_session(&experiment)?;
        let shape = session.target.model.shape();
        let taps = self.taps(shape.layers)?;
        if !(2..=shape.context).contains(&self.length) || self.shard_mb == 0 {
            return Err(Error::Experiment(format!(
                "--length {} must be 2 to the target's context of {}, --shard-mb {} at least 1",
                self.length, shape.context, self.shard_mb
            )));
        }
        let found = documents::load(&self.files.spec(), session.tokenizer()?, &mut |_, _| {})?;
        found
            .failures
            .iter()
            .for_each(|f| say(&format!("not used: {f}")));
        let how = How {
            taps: &taps,
            length: self.length,
            top: self.top_k,
            shard_bytes: self.shard_mb << 20,
        };
        let mut progress = Progress::new("computing", false);
        let kept = keep(
            &mut session,
            &found,
            &how,
            &self.output,
            stop,
            &mut |done, all| {
                progress.set(done as u64, all as u64);
            },
        );
        progress.finish();
        let kept = kept?;
        if self.json {
            return print_json(&kept);
        }
        print_text(&format!(
            "{} documents read: {} taken, {} left out, {} failed; {} tokens, {:.1} MB in {} shards ({} were there), {:.1} s\n",
            kept.counts.read,
            kept.counts.written,
            kept.counts.skipped,
            kept.counts.failed,
            kept.counts.tokens,
            kept.bytes as f64 / 1e6,
            kept.shards,
            kept.shards_before,
            kept.seconds
        ))
    }
}

/// A row of the sample.
#[derive(Serialize)]
struct Row {
    document: String,
    position: usize,
    token: u32,
    text: String,
    mask: bool,
    /// The token that the row is paired with, and the one that it learns to say.
    paired: Option<u32>,
    says: Option<u32>,
}

#[derive(Serialize)]
struct Report {
    read: usize,
    written: usize,
    skipped: usize,
    failed: usize,
    overlapping: usize,
    tokens: u64,
    masked: u64,
    seconds: f64,
    failures: Vec<String>,
    rows: Vec<Row>,
}

impl Show {
    fn run(self) -> Result<()> {
        let begun = std::time::Instant::now();
        let files = super::inspect::open(&self.target)?;
        let Some(tokenizer) = Tokenizer::of_model(&files)? else {
            return Err(Error::Experiment(format!(
                "{}: the target has no tokenizer",
                files.path.display()
            )));
        };
        let found = documents::load(&self.files.spec(), &tokenizer, &mut |_, _| {})?;
        let rows = self.sample(&found, &tokenizer)?;
        let c = &found.counts;
        let report = Report {
            read: c.read,
            written: c.written,
            skipped: c.skipped,
            failed: c.failed,
            overlapping: c.overlapping,
            tokens: c.tokens,
            masked: c.masked,
            seconds: begun.elapsed().as_secs_f64(),
            failures: found.failures.clone(),
            rows,
        };
        if self.json {
            return print_json(&report);
        }
        report
            .failures
            .iter()
            .for_each(|f| say(&format!("not used: {f}")));
        print_text(&text(&report, &tokenizer))
    }

    fn sample(&self, found: &Documents, tokenizer: &Tokenizer) -> Result<Vec<Row>> {
        let lines =
            Stream::new(&found.all, self.length, self.seed, Position::default())?.lines(1)?;
        let mut rows = Vec::new();
        let (next, after) = (lines.rows.shifted(1), lines.rows.shifted(2));
        let token = |row: Option<usize>| row.map(|r| lines.tokens[r]);
        for (range, &document) in lines.rows.documents.iter().zip(&lines.of) {
            for row in range.clone() {
                let id = lines.tokens[row];
                rows.push(Row {
                    document: found
                        .all
                        .get(document)
                        .map_or("(filled up)".into(), |d| d.name.clone()),
                    position: row - range.start,
                    token: id,
                    text: tokenizer.token(id).unwrap_or_default(),
                    mask: lines.mask[row],
                    paired: token(next[row]),
                    says: token(after[row]),
                });
            }
        }
        rows.truncate(self.rows);
        Ok(rows)
    }
}

fn text(report: &Report, tokenizer: &Tokenizer) -> String {
    let mut out = format!(
        "{} documents read: {} taken, {} left out ({} for an evaluation prompt), {} failed\n{} tokens, {} of them trained on ({:.1} %)\n",
        report.read,
        report.written,
        report.skipped,
        report.overlapping,
        report.failed,
        report.tokens,
        report.masked,
        100.0 * report.masked as f64 / report.tokens.max(1) as f64
    );
    let shown = |id: Option<u32>| match id {
        None => "-".to_string(),
        Some(id) => format!("{:?}", tokenizer.token(id).unwrap_or_default()),
    };
    let mut document = "";
    for row in &report.rows {
        if row.document != document {
            document = &row.document;
            out += &format!(
                "\n{document}\n{:>5} {:>4} {:>6}  {:<20} {:<20} learns to say\n",
                "row", "mask", "id", "state behind", "paired with"
            );
        }
        out += &format!(
            "{:>5} {:>4} {:>6}  {:<20} {:<20} {}\n",
            row.position,
            if row.mask { "x" } else { "" },
            row.token,
            format!("{:?}", row.text),
            shown(row.paired),
            shown(row.says)
        );
    }
    out
}
