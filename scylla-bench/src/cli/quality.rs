//! `scylla inspect quality`

use std::path::PathBuf;

use clap::Args;
use scylla_core::files::read_text;
use scylla_core::model::{LoadOptions, ModelFiles, WeightForm, load};
use scylla_core::plugin::{SlotRows, Step, TargetModel, Want};
use scylla_core::sampling::{argmax, top_log_probabilities};
use scylla_core::text::{Tokenizer, no_tokenizer};
use serde::Serialize;

use super::inspect::open;
use super::{print_json, print_text, warn};
use crate::{Error, Result};

#[derive(Args)]
pub(super) struct Quality {
    /// Model: `default`, a directory, a GGUF file, or a hub id
    #[arg(default_value = "default")]
    model: String,
    /// Text to read, UTF-8
    #[arg(long)]
    text: PathBuf,
    /// Forms of the weights to compare with f32
    #[arg(long, value_delimiter = ',', default_value = "as-is,bf16,q8_0,q4")]
    forms: Vec<WeightForm>,
    /// Tokens of the text at most
    #[arg(long, default_value_t = 1024)]
    tokens: usize,
    /// Threads; 0 takes the number of cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct FormQuality {
    form: String,
    weight_bytes: usize,
    perplexity: f64,
    /// Perplexity over that of f32.
    ratio: f64,
    /// Share of positions with f32's most probable token.
    top_1_agreement: f64,
}

#[derive(Serialize)]
struct Report {
    tokens: usize,
    forms: Vec<FormQuality>,
}

/// What one form makes of a text: bytes of weights, log-probability of each token after the first, and the most
/// probable token there.
struct Reading {
    weight_bytes: usize,
    logs: Vec<f64>,
    best: Vec<u32>,
}

/// Rows of one forward.
const CHUNK: usize = 128;

fn read(files: &ModelFiles, form: WeightForm, threads: usize, ids: &[u32]) -> Result<Reading> {
    let options = LoadOptions {
        weights: form,
        threads,
        ..LoadOptions::default()
    };
    let mut loaded = load(files, &options)?;
    let model: &mut dyn TargetModel = loaded.model.as_mut();
    let vocab = model.shape().vocab;
    model.open(0)?;
    let mut reading = Reading {
        weight_bytes: loaded.weight_bytes,
        logs: Vec::new(),
        best: Vec::new(),
    };
    let mut next = ids[1..].iter();
    for chunk in ids[..ids.len() - 1].chunks(CHUNK) {
        let found = model.forward(&Step {
            slots: vec![SlotRows {
                slot: 0,
                tokens: chunk,
                parents: &[],
                want: Want::All,
            }],
            taps: &[],
        })?;
        model.commit(0, &(0..chunk.len()).collect::<Vec<_>>())?;
        for row in 0..chunk.len() {
            let logits = found.logits[0].row(row)?;
            let token = *next.next().unwrap_or(&0) as usize;
            let (best, log) = top_log_probabilities(&logits, vocab, 1)?[0];
            // Its log-probability follows from the best one's.
            let below = f64::from(logits[token]) - f64::from(logits[best]);
            reading.logs.push(log + below);
            reading.best.push(argmax(&logits)?);
        }
    }
    Ok(reading)
}

impl Quality {
    pub(super) fn run(self) -> Result<()> {
        let files = open(&self.model)?;
        let tokenizer =
            Tokenizer::of_model(&files)?.ok_or_else(|| Error::Experiment(no_tokenizer(&files)))?;
        let text = read_text(&self.text)?;
        let mut ids = tokenizer.encode(&text)?;
        ids.truncate(self.tokens.min(files.config.context.min(8192)));
        if ids.len() < 2 {
            return Err(Error::file(&self.text, "fewer than two tokens"));
        }
        let wide = read(&files, WeightForm::F32, self.threads, &ids)?;
        let perplexity = |r: &Reading| (-r.logs.iter().sum::<f64>() / r.logs.len() as f64).exp();
        let describe = |form: String, r: &Reading| {
            let same = r
                .best
                .iter()
                .zip(&wide.best)
                .filter(|(a, b)| a == b)
                .count();
            FormQuality {
                form,
                weight_bytes: r.weight_bytes,
                perplexity: perplexity(r),
                ratio: perplexity(r) / perplexity(&wide),
                top_1_agreement: same as f64 / wide.best.len() as f64,
            }
        };
        let mut forms = vec![describe("f32".into(), &wide)];
        let mut failed = None;
        for &form in &self.forms {
            match read(&files, form, self.threads, &ids) {
                Ok(reading) => forms.push(describe(form.to_string(), &reading)),
                // The others are told all the same.
                Err(e) => {
                    warn(&format!("left out: {form}: {e}"));
                    failed = Some(e);
                }
            }
        }
        let report = Report {
            tokens: ids.len(),
            forms,
        };
        let mut out = format!(
            "{} tokens\nform      MB     perplexity  over f32  top-1 as f32\n",
            report.tokens
        );
        for f in &report.forms {
            out.push_str(&format!(
                "{:<8}{:>6.1}  {:>11.3}  {:>8.4}  {:>11.1}%\n",
                f.form,
                f.weight_bytes as f64 / 1e6,
                f.perplexity,
                f.ratio,
                f.top_1_agreement * 100.0
            ));
        }
        match self.json {
            true => print_json(&report)?,
            false => print_text(&out)?,
        }
        failed.map_or(Ok(()), Err)
    }
}
