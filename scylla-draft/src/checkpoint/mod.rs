//! Checkpoint directories: `config.json` beside safetensors, in the layouts that vLLM and SGLang serve.
//!
//! Everything is checked against the layout before a weight is used: a key too many is as wrong as one too few, since
//! vLLM rejects what SGLang silently skips.

mod eagle3;
mod export;

mod layout;

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use scylla_core::files::{parse_json, read_text};
use scylla_core::kernels::Weight;
use scylla_core::model::{ModelConfig, Shards, WeightForm, Weights};
use scylla_core::plugin::TargetShape;
use scylla_core::{Error, Result};
use serde_json::Value;

pub use eagle3::{default_taps, offsets_of};

pub use export::{Export, Format, Precision, Written, export};
pub(crate) use layout::eagle3_prefix;
use layout::passed_over_in;
pub use layout::{Entry, Family, entries};

/// An opened draft directory: shape, options and weights, nothing read beyond headers.
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// The whole `config.json`.
    pub json: Value,
    /// The network's shape.
    pub config: ModelConfig,
    /// Which network it is.
    pub family: Family,
    /// What was passed over or taken for granted, for the user to know.
    pub notes: Vec<String>,
    shards: Shards,
    form: WeightForm,
}

impl Checkpoint {
    /// Opens a directory that holds a network of one of `families`, for a target of this shape, and checks its keys.
    ///
    /// # Errors
    /// If it holds pickle or no weights, another network, sizes that do not fit the target, or keys that are missing,
    /// mis-shaped or unknown.
    pub fn open(
        dir: &Path,
        families: &[Family],
        target: &TargetShape,
        form: WeightForm,
    ) -> Result<Self> {
        refuse_pickle(dir)?;
        let file = dir.join("config.json");
        let text = read_text(&file)?;
        let json = parse_json(&text, &file, "a configuration")?;
        check_options(&json, &file)?;
        // SGLang takes a leading `model.`, and both engines either name of the first layer.
        let bare = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_string();
        let shards = Shards::open(dir)?.renamed(bare)?;
        let family = Family::of(&json, &shards, &file)?;
        let shards = match family {
            Family::Eagle3 | Family::Speculators => shards.renamed(|name| {
                let rest = ["midlayer.", "layers.0."]
                    .iter()
                    .find_map(|p| name.strip_prefix(p));
                match rest {
                    Some(rest) => format!("{}.{rest}", eagle3_prefix(family, 0)),
                    None => name.to_string(),
                }
            })?,
            _ => shards,
        };
        if !families.contains(&family) {
            let known: Vec<String> = families.iter().map(Family::to_string).collect();
            return Err(Error::file(
                &file,
                format!("holds {family}; expected {}", known.join(" or ")),
            ));
        }
        let (config, notes) = ModelConfig::of_draft(&json, &file)?;
        if let Some(window) = config.window.filter(|&window| window < target.context) {
            return Err(Error::Unsupported(format!(
                "{}: sliding_window {window} is shorter than the target's context of {}: windows are not supported; \
                 a context within it is (target.context = {window} or less)",
                file.display(),
                target.context
            )));
        }
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            json,
            config,
            family,
            notes,
            shards,
            form,
        };
        checkpoint.check_sizes(target, &file)?;
        checkpoint.check_keys(target)?;
        if family == Family::Speculators && checkpoint.json.get("norm_before_residual").is_none() {
            checkpoint.notes.push(format!(
                "{}: norm_before_residual is not said and taken as false, as speculators does; vLLM takes it as true",
                file.display()
            ));
        }
        Ok(checkpoint)
    }

    fn check_sizes(&self, target: &TargetShape, file: &Path) -> Result<()> {
        let bad = |key: &str, found: usize, expected: String| {
            Err(Error::file(
                file,
                format!("`{key}` is {found}; expected {expected}"),
            ))
        };
        let c = &self.config;
        if c.vocab != target.vocab {
            return bad(
                "vocab_size",
                c.vocab,
                format!("{}, the target's", target.vocab),
            );
        }
        let tensors = self.shards.names().len();
        match self.family {
            // A file of so many layers has more keys than that.
            Family::Scylla if c.layers > tensors => {
                let expected = format!("no more than the file's {tensors} keys");
                return bad("num_hidden_layers", c.layers, expected);
            }
            Family::Scylla => {}
            Family::Eagle if c.layers != 1 => {
                return bad("num_hidden_layers", c.layers, "1".into());
            }
            _ if c.layers > tensors => {
                let expected = format!("no more than the file's {tensors} keys");
                return bad("num_hidden_layers", c.layers, expected);
            }
            Family::Eagle3 | Family::Speculators => self.check_taps(target)?,
            Family::Eagle => {}
        }
        let may_differ = matches!(self.family, Family::Eagle3 | Family::Speculators);
        if c.hidden != target.hidden && !(may_differ && self.has("embed_tokens.weight")) {
            let expected = format!("{}, the target's", target.hidden);
            return bad("hidden_size", c.hidden, expected);
        }
        let draft_vocab = self.draft_vocab();
        if draft_vocab == 0 || draft_vocab > c.vocab {
            return bad("draft_vocab_size", draft_vocab, format!("1..={}", c.vocab));
        }
        Ok(())
    }

    /// Compares the keys with the layout's.
    fn check_keys(&mut self, target: &TargetShape) -> Result<()> {
        let layout = entries(self, target);
        for entry in &layout {
            if !entry.optional || self.has(&entry.name) {
                // Shape and type are checked where the header is, before anything is read.
                self.check_entry(entry)?;
            }
        }
        let mut passed_over = Vec::new();
        for name in self.shards.names() {
            if layout.iter().any(|entry| entry.name == name)
                || name.ends_with("rotary_emb.inv_freq")
            {
                continue;
            }
            if passed_over_in(self.family).contains(&name) {
                passed_over.push(name);
                continue;
            }
            return Err(Error::Tensor {
                path: self.shards.path().to_path_buf(),
                tensor: name.into(),
                expected: format!("no such key in {}", self.family),
                found: format!("shape {:?}", self.shards.shape(name).unwrap_or_default()),
            });
        }
        if !passed_over.is_empty() {
            let note = format!(
                "{}: {} are copies of the target's from training, and passed over",
                self.shards.path().display(),
                passed_over.join(", ")
            );
            self.notes.push(note);
        }
        Ok(())
    }

    fn check_entry(&self, entry: &Entry) -> Result<()> {
        let dtype = self.shards.dtype(&entry.name, &entry.shape)?;
        match entry.kinds.contains(&dtype) {
            true => Ok(()),
            false => Err(Error::Tensor {
                path: self.shards.path().to_path_buf(),
                tensor: entry.name.clone(),
                expected: format!("type {:?}", entry.kinds),
                found: format!("{dtype:?}"),
            }),
        }
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        self.shards.contains(name)
    }

    /// V_d: the draft's vocabulary, the target's where the file says nothing.
    pub fn draft_vocab(&self) -> usize {
        self.size("draft_vocab_size").unwrap_or(self.config.vocab)
    }

    /// A size of the configuration.
    fn size(&self, key: &str) -> Option<usize> {
        let value = self.json.get(key)?.as_u64()?;
        usize::try_from(value).ok()
    }

    /// A switch of the configuration; `false` where it is not there.
    pub fn flag(&self, key: &str) -> bool {
        self.json.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    /// Type and bytes of a tensor, as stored.
    pub fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, Vec<u8>)> {
        self.shards.stored(name, shape)
    }

    /// An error about a tensor's content.
    fn wrong(&self, tensor: &str, expected: String, found: String) -> Error {
        Error::Tensor {
            path: self.shards.path().to_path_buf(),
            tensor: tensor.into(),
            expected,
            found,
        }
    }
}

impl Weights for Checkpoint {
    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Weight> {
        self.form.apply(self.shards.weight(name, &[n, k])?)
    }
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        Ok(self.shards.weight(name, &[n])?.to_f32())
    }
}

/// Checks the types of what a configuration says beside the layer's shape.
fn check_options(json: &Value, file: &Path) -> Result<()> {
    let flags = [
        "norm_before_residual",
        "norm_before_fc",
        "norm_output",
        "fc_norm",
        "input_norm_first",
        "recur_before_norm",
    ];
    let sizes = [
        "draft_vocab_size",
        "num_aux_hidden_states",
        "target_hidden_size",
    ];
    let said = |key: &str| json.get(key).filter(|v| !v.is_null());
    let bad = |key: &str, found: &Value, expected: &str| {
        Err(Error::file(
            file,
            format!("`{key}` is {found}; expected {expected}"),
        ))
    };
    for key in flags {
        if let Some(found) = said(key).filter(|v| !v.is_boolean()) {
            return bad(key, found, "true or false");
        }
    }
    for key in sizes {
        if let Some(found) = said(key).filter(|v| !v.is_u64()) {
            return bad(key, found, "a size");
        }
    }
    Ok(())
}

/// Pickle runs code when it is loaded, so it is never read.
fn refuse_pickle(dir: &Path) -> Result<()> {
    let entries = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut pickled = None;
    for entry in entries {
        let path = entry.map_err(Error::io(dir))?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some("safetensors") => return Ok(()),
            Some("bin" | "pt" | "pth" | "ckpt" | "pkl") => pickled = Some(path),
            _ => {}
        }
    }
    let found = match pickled {
        None => "holds no safetensors file".into(),
        Some(path) => format!(
            "holds pickled weights ({name}), which run code when loaded and are not read. Convert them once with Python: \
             from safetensors.torch import save_file; import torch; \
             w = torch.load('{name}', weights_only=True, map_location='cpu'); \
             save_file({{k: v.contiguous() for k, v in w.items()}}, 'model.safetensors')",
            name = path.file_name().unwrap_or_default().to_string_lossy()
        ),
    };
    Err(Error::file(dir, found))
}
