//! `scylla export`

use std::path::{Path, PathBuf};

use clap::Args;
use scylla_core::assets::{hash_model, resolve};
use scylla_core::model::{ModelFiles, WeightForm, Weights};
use scylla_draft::checkpoint::{self, Checkpoint, Format, Layout, Precision};
use serde::Serialize;

use super::{print_json, say, with_download};
use crate::{Error, Result};

#[derive(Args)]
pub(super) struct Export {
    /// Draft by name, with the directory of its weights behind a colon
    #[arg(long, value_name = "NAME:DIR")]
    draft: String,
    /// The draft's target: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// eagle, eagle3, speculators or scylla
    #[arg(long)]
    format: Format,
    /// Directory to write; it must not hold a checkpoint yet
    #[arg(long)]
    output: PathBuf,
    /// Type of the values: bf16, f32 or as-is
    #[arg(long, default_value = "bf16")]
    dtype: Precision,
    /// Write a zero fc.bias, which SGLang's EAGLE-1 loader expects
    #[arg(long)]
    zero_bias: bool,
    /// Name of the target as it will be served [default: what --target says]
    #[arg(long)]
    verifier: Option<String>,
    /// Layers whose inputs an EAGLE-3 draft reads [default: what its configuration says]
    #[arg(long, value_delimiter = ',')]
    taps: Option<Vec<usize>>,
    /// Tokens a cycle that a speculators configuration proposes
    #[arg(long, default_value_t = 5)]
    speculative_tokens: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    output: &'a Path,
    #[serde(flatten)]
    written: checkpoint::Written,
}

impl Export {
    /// The layouts that the draft's name stands for, its directory, and what can be refused without a file.
    fn check(&self) -> Result<(&'static [Layout], &str)> {
        let bad = |message: String| Err(Error::Experiment(message));
        let Some((name, dir)) = self.draft.split_once(':') else {
            return bad(format!("--draft `{}`: expected NAME:DIR", self.draft));
        };
        let layouts = Layout::of_name(name, "exportable draft")?;
        if self.speculative_tokens == 0 {
            return bad("--speculative-tokens must be at least 1".into());
        }
        for file in ["config.json", "model.safetensors"] {
            let file = self.output.join(file);
            if file.exists() {
                let message = "is there already; choose another --output";
                return Err(Error::file(&file, message));
            }
        }
        Ok((layouts, dir))
    }

    pub(super) fn run(self) -> Result<()> {
        let (layouts, dir) = self.check()?;
        let target = with_download(|p| Ok(resolve(&self.target, p)?))?;
        let files = ModelFiles::open(&target)?;
        let c = &files.config;
        let dir = with_download(|p| Ok(resolve(dir, p)?))?;
        let checkpoint = Checkpoint::open(&dir, layouts, &c.shape(), WeightForm::AsIs)?;
        let taps = checkpoint.taps(self.taps.as_deref(), &c.shape())?;
        let hash = hash_model(&files)?;
        let embedding = || {
            let shape = [c.vocab, c.hidden];
            let weights = files.weights(WeightForm::AsIs);
            let table = weights.find("model.embed_tokens.weight", &shape)?;
            Ok(table.weight()?.to_f32())
        };
        let architecture = match c.architecture.as_str() {
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            "mistral" => "MistralForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let export = checkpoint::Export {
            checkpoint: &checkpoint,
            format: self.format,
            precision: self.dtype,
            zero_bias: self.zero_bias,
            target: c,
            target_sha256: Some(&hash),
            verifier: (self.verifier.as_ref().unwrap_or(&self.target), architecture),
            embedding: &embedding,
            taps: &taps,
            speculative_tokens: self.speculative_tokens,
        };
        let written = checkpoint::export(&export, &self.output)?;
        for note in &written.notes {
            say(&format!("note: {note}"));
        }
        if written.rounded > 0 {
            say(&format!(
                "note: {} values were rounded to bf16; --dtype as-is keeps them",
                written.rounded
            ));
        }
        if self.json {
            return print_json(&Report {
                output: &self.output,
                written,
            });
        }
        let keys = written.keys.join("\n  ");
        super::print_text(&format!("{}\n  {keys}\n", self.output.display()))
    }
}
