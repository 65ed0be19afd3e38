//! The student: a language model in the graph, the files it is read from, and those it is written to.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scylla_core::assets::{self, OnProgress};
use scylla_core::files::{self, read_json};
use scylla_core::model::{ModelConfig, ModelFiles, WeightForm, config_of, of_config};
use scylla_core::text::{self, Tokenizer};
use scylla_core::train::graph::{Compute, Parameters, Value};
use scylla_core::train::{Language, Named};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::experiment::StudentSpec;
use crate::{Error, Result};

/// Files of a tokenizer and of how a model generates, which go wherever the student goes.
const BESIDE: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// A model that learns.
pub struct Student {
    /// Its network.
    pub language: Language,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What `config.json` says.
    config: Json,
    /// Where its tokenizer's files lie.
    pub from: PathBuf,
    /// Its own weights, where it has some.
    weights: Option<PathBuf>,
    /// Holds what a GGUF file says, as files of a folder.
    unpacked: Option<TempDir>,
}

impl Student {
    /// The student of an experiment, without weights yet. What its name stands for is fetched where it is missing.
    ///
    /// # Errors
    /// If its files cannot be read, or its tokenizer has more tokens than it has rows.
    pub fn open(spec: &StudentSpec, on_progress: OnProgress<'_>) -> Result<Self> {
        match (&spec.model, &spec.tokenizer) {
            (Some(model), _) => {
                let path = assets::resolve(&model.to_string_lossy(), on_progress)?;
                match path.is_dir() {
                    true => Self::of_dir(path),
                    false => Self::of_gguf(path),
                }
            }
            (None, Some(dir)) => {
                let tokenizer = Tokenizer::from_dir(dir)?;
                let config = new_config(spec, &tokenizer);
                Self::new(tokenizer, config, dir.clone(), None, None)
            }
            (None, None) => Err(Error::Experiment("[student] names no model".into())),
        }
    }

    /// A Hugging Face folder; without safetensors in it its weights are random.
    fn of_dir(dir: PathBuf) -> Result<Self> {
        let config = read_json(&dir.join("config.json"), "a model configuration")?;
        let entries = std::fs::read_dir(&dir).map_err(Error::io(&dir))?;
        let paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        let held = |kind: &str| {
            paths
                .iter()
                .find(|p| p.extension().is_some_and(|e| e == kind))
        };
        let weights = match (held("safetensors"), held("bin").or(held("gguf"))) {
            (None, Some(other)) => {
                return Err(Error::file(
                    other,
                    "a student begins with weights in safetensors, or in a GGUF file that student.model names; with random ones in a folder without any weights",
                ));
            }
            (found, _) => found.map(|_| dir.clone()),
        };
        let own = match &weights {
            Some(dir) => Tokenizer::of_model(&ModelFiles::open(dir)?)?,
            None => None,
        };
        let tokenizer = match own {
            Some(tokenizer) => tokenizer,
            None => Tokenizer::from_dir(&dir)?,
        };
        Self::new(tokenizer, config, dir, weights, None)
    }

    /// A GGUF file: its weights widened, its tokenizer and shape as a folder holds them.
    fn of_gguf(path: PathBuf) -> Result<Self> {
        let files = ModelFiles::open(&path)?;
        let tokenizer = Tokenizer::of_model(&files)?;
        let tokenizer = tokenizer.ok_or_else(|| Error::file(&path, text::no_tokenizer(&files)))?;
        let unpacked = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
        tokenizer.write(unpacked.path())?;
        let mut config = config_of(&files.config)
            .map_err(|e| Error::file(&path, format!("as a student: {e}")))?;
        ends(&mut config, &tokenizer);
        let from = unpacked.path().to_path_buf();
        Self::new(tokenizer, config, from, Some(path), Some(unpacked))
    }

    fn new(
        tokenizer: Tokenizer,
        config: Json,
        from: PathBuf,
        weights: Option<PathBuf>,
        unpacked: Option<TempDir>,
    ) -> Result<Self> {
        let path = from.join("config.json");
        let (shape, _) = of_config(&config, &path)?;
        shape.check(&path)?;
        tokenizer.check_fits(shape.vocab, &from)?;
        Ok(Self {
            language: Language::new(&shape)?,
            tokenizer,
            config,
            from,
            weights,
            unpacked,
        })
    }

    /// Where its tokenizer is read from: its weights, where they bring it along.
    pub(super) fn tokenized(&self) -> &Path {
        match (&self.unpacked, &self.weights) {
            (Some(_), Some(file)) => file,
            _ => &self.from,
        }
    }

    /// Its shape.
    pub fn shape(&self) -> &ModelConfig {
        self.language.config()
    }

    /// Columns of its logits that belong to tokens.
    pub fn known(&self) -> usize {
        self.tokenizer.size().min(self.shape().vocab)
    }

    /// Whether it begins with weights of its own.
    pub fn is_trained(&self) -> bool {
        self.weights.is_some()
    }

    /// The parameters it begins with: its own, or random ones by seed.
    ///
    /// # Errors
    /// If its weights cannot be read.
    pub fn begin(&self, seed: u64, on: &Compute) -> Result<Named> {
        match &self.weights {
            None => Ok(self.language.start(seed, on)?),
            Some(dir) => {
                let files = ModelFiles::open(dir)?;
                let weights = files.weights(WeightForm::AsIs);
                Ok(self.language.read(&weights, on)?)
            }
        }
    }

    /// Writes a folder that loads as a model: configuration, weights in f32, and what belongs to the tokenizer.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn export(&self, named: &Named, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join("model.safetensors");
        let bad = |e: safetensors::SafeTensorError| Error::file(&path, e.to_string());
        let mut held = Vec::new();
        for (name, shape) in self.shape().tensors() {
            let missing = || Error::file(&path, format!("no parameter `{name}`"));
            let values = named.get(&name).ok_or_else(missing)?.all()?;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            held.push((name, shape, bytes));
        }
        let mut views = Vec::with_capacity(held.len());
        for (name, shape, bytes) in &held {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(bad)?;
            views.push((name.clone(), view));
        }
        let metadata = [("format".to_string(), "pt".to_string())].into();
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(bad)?;
        for name in BESIDE {
            let from = self.from.join(name);
            if from.is_file() {
                let bytes = std::fs::read(&from).map_err(Error::io(&from))?;
                files::write(&dir.join(name), &bytes)?;
            }
        }
        let config = format!("{:#}\n", self.config);
        files::write(&dir.join("config.json"), config.as_bytes())?;
        Ok(files::write(&path, &bytes)?)
    }
}

/// Parameters whose gradients go nowhere.
pub(super) fn still(named: &Named) -> Parameters<'static> {
    let mut parameters = Parameters::default();
    for (name, value) in named {
        parameters.set(name, Value::constant(value.clone()));
    }
    parameters
}

/// A Llama, as transformers describes one.
fn new_config(spec: &StudentSpec, tokenizer: &Tokenizer) -> Json {
    let or = |own: usize, usual: usize| if own == 0 { usual } else { own };
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": or(spec.vocab, tokenizer.size()),
        "hidden_size": spec.hidden,
        "intermediate_size": or(spec.ffn, (spec.hidden * 8 / 3).div_ceil(32) * 32),
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": or(spec.kv_heads, spec.heads),
        "max_position_embeddings": spec.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "torch_dtype": "float32",
    });
    ends(&mut config, tokenizer);
    config
}

/// What a tokenizer begins and ends with.
fn ends(config: &mut Json, tokenizer: &Tokenizer) {
    if let Some(end) = tokenizer.eos().first() {
        config["eos_token_id"] = json!(end);
    }
    if let Some(begin) = tokenizer.beginning() {
        config["bos_token_id"] = json!(begin);
    }
}
