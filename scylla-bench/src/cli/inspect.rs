//! `scylla inspect`

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, Subcommand};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use scylla_core::assets::{hash_model, resolve};
use scylla_core::files;
use scylla_core::model::{LoadOptions, ModelFiles, load, parse_device};
use scylla_core::plugin::{SlotRows, Step, Tap, Want};
use scylla_core::text::Tokenizer;

use super::{ModelOptions, print_json, with_download};
use crate::{Error, Registry, Result};

#[derive(Subcommand)]
pub(super) enum Inspect {
    /// Run tokens through a model and write the logits
    Forward(Forward),
    /// The training loss of one batch and its gradients
    Loss(super::loss::Loss),
    /// A draft's tau, walked along the target's own answers and decoded for real
    Tau(super::tau::Tau),
    /// Say what a model is
    Model(Model),
    /// The best static tree for the acceptance that a benchmark recorded
    Tree(super::tree::Tree),
    /// Perplexity and most probable tokens of weight forms, against f32
    Quality(super::quality::Quality),
    /// Count tokens of texts, for a truncated head (draft.head)
    Frequencies(super::frequencies::Frequencies),
}

#[derive(Args)]
pub(super) struct Forward {
    /// Model: `default`, a directory, a GGUF file, or a hub id
    #[arg(long)]
    model: String,
    /// Safetensors with `tokens i64 [S]` and optional `parents i64 [S]` (-1 for a first row)
    #[arg(long)]
    input: PathBuf,
    /// Safetensors to write: `logits f32 [S, V]`
    #[arg(long)]
    output: PathBuf,
    /// Also write `hidden f32 [L + 2, S, H]`: embedding, each layer's output, final normalised state
    #[arg(long)]
    taps: bool,
    #[command(flatten)]
    options: ModelOptions,
}

#[derive(Args)]
pub(super) struct Model {
    /// Model: `default`, a directory, a GGUF file, or a hub id
    #[arg(default_value = "default")]
    model: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Description {
    path: PathBuf,
    architecture: String,
    vocab: usize,
    hidden: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    tied: bool,
    /// Positions that the layers see, those that see all left out.
    windows: Vec<usize>,
    qk_norm: bool,
    biases: Vec<&'static str>,
    rope: String,
    cache_values_per_position: usize,
    tokenizer_size: Option<usize>,
    eos: Vec<u32>,
    chat_template: bool,
    sha256: String,
}

impl Inspect {
    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        match self {
            Self::Forward(c) => c.run(),
            Self::Loss(c) => c.run(),
            Self::Tau(c) => c.run(registry, stop),
            Self::Model(c) => c.run(),
            Self::Tree(c) => c.run(),
            Self::Quality(c) => c.run(),
            Self::Frequencies(c) => c.run(),
        }
    }
}

pub(super) fn open(spec: &str) -> Result<ModelFiles> {
    let path = with_download(|p| Ok(resolve(spec, p)?))?;
    let files = ModelFiles::open(&path)?;
    files
        .notes
        .iter()
        .for_each(|note| super::say(&format!("note: {note}")));
    Ok(files)
}

impl Model {
    fn run(self) -> Result<()> {
        let files = open(&self.model)?;
        let tokenizer = Tokenizer::of_model(&files)?;
        let c = &files.config;
        let Some(layer) = c.layers.first() else {
            return Err(Error::Experiment("a model of no layers".into()));
        };
        let mut windows: Vec<usize> = c.layers.iter().filter_map(|l| l.window).collect();
        windows.sort_unstable();
        windows.dedup();
        let products = layer.products().into_iter();
        let description = Description {
            architecture: c.architecture.clone(),
            vocab: c.vocab,
            hidden: c.hidden,
            ffn: layer.ffn,
            layers: c.layers.len(),
            heads: layer.heads,
            kv_heads: layer.kv_heads,
            head_dim: layer.head_dim,
            windows,
            qk_norm: layer.qk_norm,
            biases: products
                .filter(|(.., bias)| *bias)
                .map(|(name, ..)| name)
                .collect(),
            rope: format!("{:?}", layer.rope),
            context: c.context,
            tied: c.tied,
            cache_values_per_position: c.cache_values(1),
            tokenizer_size: tokenizer.as_ref().map(Tokenizer::size),
            eos: match &tokenizer {
                Some(tokenizer) => tokenizer.eos().to_vec(),
                None => scylla_core::text::eos_of_model(&files)?,
            },
            chat_template: tokenizer.as_ref().is_some_and(|t| t.template().is_some()),
            sha256: hash_model(&files)?,
            path: files.path.clone(),
        };
        if self.json {
            return print_json(&description);
        }
        let value =
            serde_json::to_value(&description).map_err(|e| Error::Experiment(e.to_string()))?;
        let mut text = String::new();
        for (key, value) in value.as_object().into_iter().flatten() {
            text.push_str(&format!("{key:<26}{value}\n"));
        }
        super::print_text(&text)
    }
}

/// An i64 vector of a safetensors file.
fn ids(file: &SafeTensors<'_>, name: &str, path: &Path) -> Result<Option<Vec<i64>>> {
    let Ok(view) = file.tensor(name) else {
        return Ok(None);
    };
    if view.dtype() != Dtype::I64 || view.shape().len() != 1 {
        return Err(Error::file(
            path,
            format!(
                "tensor `{name}`: expected I64 [S], found {:?} {:?}",
                view.dtype(),
                view.shape()
            ),
        ));
    }
    let value = |b: &[u8]| i64::from_le_bytes(std::array::from_fn(|i| b[i]));
    Ok(Some(view.data().chunks_exact(8).map(value).collect()))
}

impl Forward {
    fn run(self) -> Result<()> {
        let bytes = std::fs::read(&self.input).map_err(Error::io(&self.input))?;
        let bad = |message: String| Error::file(&self.input, message);
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| bad(format!("not a whole safetensors file: {e}")))?;
        let tokens = ids(&file, "tokens", &self.input)?
            .ok_or_else(|| bad("tensor `tokens` is missing".into()))?;
        let tokens: Vec<u32> = tokens
            .iter()
            .map(|&t| u32::try_from(t).map_err(|_| bad(format!("token {t} is no id"))))
            .collect::<Result<_>>()?;
        let parent = |p: i64| match usize::try_from(p) {
            Ok(p) => Ok(Some(p)),
            Err(_) if p == -1 => Ok(None),
            Err(_) => Err(bad(format!("parent {p} is neither a row nor -1"))),
        };
        let parents = ids(&file, "parents", &self.input)?.unwrap_or_default();
        let parents: Vec<Option<usize>> = parents.into_iter().map(parent).collect::<Result<_>>()?;

        let files = open(&self.model)?;
        let options = LoadOptions {
            weights: self.options.weights.as_deref().unwrap_or("as-is").parse()?,
            threads: self.options.threads.unwrap_or(0),
            device: parse_device(self.options.device.as_deref().unwrap_or("cpu"))?,
            context: 0,
        };
        let mut loaded = load(&files, &options)?;
        let mut taps = Vec::new();
        if self.taps {
            taps.extend((0..=files.config.layers.len()).map(Tap::Input));
            taps.push(Tap::Final);
        }
        loaded.model.open(0)?;
        let mut forward = loaded.model.forward(&Step {
            slots: vec![SlotRows {
                slot: 0,
                tokens: &tokens,
                parents: &parents,
                want: Want::All,
            }],
            taps: &taps,
        })?;
        let logits = forward.logits.remove(0);
        let mut tensors = HashMap::new();
        let logit_bytes = to_bytes(&logits.all()?);
        tensors.insert(
            "logits",
            view(&logit_bytes, vec![logits.rows(), logits.columns])?,
        );
        let mut hidden = Vec::new();
        for tap in forward.taps.iter().flatten() {
            hidden.extend(to_bytes(&tap.all()?));
        }
        if self.taps {
            let shape = vec![taps.len(), tokens.len(), files.config.hidden];
            tensors.insert("hidden", view(&hidden, shape)?);
        }
        let whole = safetensors::serialize(tensors, None)
            .map_err(|e| Error::file(&self.output, e.to_string()))?;
        Ok(files::write(&self.output, &whole)?)
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn view(bytes: &[u8], shape: Vec<usize>) -> Result<TensorView<'_>> {
    TensorView::new(Dtype::F32, shape, bytes).map_err(|e| Error::Experiment(e.to_string()))
}
