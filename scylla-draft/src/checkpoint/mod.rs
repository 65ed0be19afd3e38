//! Checkpoint directories: `config.json` beside safetensors, in the layouts that vLLM and SGLang serve.
//!
//! Everything is checked against the layout before a weight is used: a key too many is as wrong as one too few, since
//! vLLM rejects what SGLang silently skips.

mod config;
mod eagle3;
mod export;
mod layout;
mod variants;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use scylla_core::files::{parse_json, read_text};
use scylla_core::model::{Shards, StoredTensor, WeightForm, Weights, of_draft};
use scylla_core::plugin::TargetShape;
use scylla_core::{Error, Result};

pub use config::{Backbone, DraftConfig, Eagle3Config, EagleConfig, ScyllaConfig};
pub use eagle3::{default_taps, offsets_of};
pub use export::{Export, Format, Precision, Written, export};
use layout::passed_over_in;
pub use layout::{Entry, Layout, entries};
pub(crate) use layout::{layer_prefix, layers};
pub use variants::{Pairing, Reading, Variant, rope_said, said, variants};

/// A tensor in memory, as a file would store it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldTensor {
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, row by row.
    pub bytes: Vec<u8>,
}

/// What the numbers of a vocabulary map `d2t` mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MapForm {
    /// Target id less draft id, as EAGLE-3's files have it.
    #[default]
    Offsets,
    /// Target ids: a usual mistake.
    Ids,
}

/// Where a checkpoint's tensors are.
enum Tensors {
    Files(Shards),
    Memory(BTreeMap<String, HeldTensor>),
}

/// A draft's network with its tensors: of a directory, of which nothing is read beyond headers, or in memory, as a
/// trainer has them.
pub struct Checkpoint {
    /// The directory; for messages, where the tensors are in memory.
    pub dir: PathBuf,
    /// What the network is.
    pub config: DraftConfig,
    /// How its vocabulary map is read.
    pub map: MapForm,
    /// What was passed over or taken for granted, for the user to know.
    pub notes: Vec<String>,
    tensors: Tensors,
    form: WeightForm,
}

impl Checkpoint {
    /// Opens a directory that holds a network of one of `layouts`, for a target of this shape, and checks its keys.
    ///
    /// # Errors
    /// If it holds pickle or no weights, another network, sizes that do not fit the target, or keys that are missing,
    /// mis-shaped or unknown.
    pub fn open(
        dir: &Path,
        layouts: &[Layout],
        target: &TargetShape,
        form: WeightForm,
    ) -> Result<Self> {
        refuse_pickle(dir)?;
        let file = dir.join("config.json");
        let text = read_text(&file)?;
        let json = parse_json(&text, &file, "a configuration")?;
        // SGLang takes a leading `model.`, and both engines either name of the first layer.
        let bare = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_string();
        let shards = Shards::open(dir)?.renamed(bare)?;
        let layout = Layout::of(&json, &shards, &file)?;
        let shards = match layout {
            Layout::Eagle3 | Layout::Speculators => shards.renamed(|name| {
                let rest = ["midlayer.", "layers.0."]
                    .iter()
                    .find_map(|p| name.strip_prefix(p));
                match rest {
                    Some(rest) => format!("{}.{rest}", layer_prefix(layout, 0)),
                    None => name.to_string(),
                }
            })?,
            _ => shards,
        };
        if !layouts.contains(&layout) {
            let known: Vec<String> = layouts.iter().map(Layout::to_string).collect();
            return Err(Error::file(
                &file,
                format!("holds {layout}; expected {}", known.join(" or ")),
            ));
        }
        let (layer, notes) = of_draft(&json, &file)?;
        let config = DraftConfig::read(&json, layout, layer, target, &file)?;
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            config,
            map: MapForm::Offsets,
            notes,
            tensors: Tensors::Files(shards),
            form,
        };
        checkpoint.check_sizes(target, &file)?;
        checkpoint.check_keys()?;
        if layout == Layout::Speculators && json.get("norm_before_residual").is_none() {
            checkpoint.notes.push(format!(
                "{}: norm_before_residual is not said and taken as false, as speculators does; vLLM takes it as true",
                file.display()
            ));
        }
        Ok(checkpoint)
    }

    /// A network whose tensors are in memory, under the names that its layout has in a file; they are checked as a
    /// file's are.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn in_memory(
        config: DraftConfig,
        tensors: BTreeMap<String, HeldTensor>,
        target: &TargetShape,
        form: WeightForm,
    ) -> Result<Self> {
        let dir = PathBuf::from("memory");
        let mut checkpoint = Self {
            config,
            map: MapForm::Offsets,
            notes: Vec::new(),
            tensors: Tensors::Memory(tensors),
            form,
            dir: dir.clone(),
        };
        checkpoint.check_sizes(target, &dir)?;
        checkpoint.check_keys()?;
        Ok(checkpoint)
    }

    /// Refuses networks of other layouts.
    pub(crate) fn expect(&self, layouts: &[Layout]) -> Result<()> {
        let layout = self.config.layout();
        if layouts.contains(&layout) {
            return Ok(());
        }
        let known: Vec<String> = layouts.iter().map(Layout::to_string).collect();
        Err(Error::file(
            &self.dir,
            format!("holds {layout}; expected {}", known.join(" or ")),
        ))
    }

    /// The first file; for messages.
    fn path(&self) -> &Path {
        match &self.tensors {
            Tensors::Files(shards) => shards.path(),
            Tensors::Memory(_) => &self.dir,
        }
    }

    fn names(&self) -> Vec<&str> {
        match &self.tensors {
            Tensors::Files(shards) => shards.names(),
            Tensors::Memory(all) => all.keys().map(String::as_str).collect(),
        }
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        match &self.tensors {
            Tensors::Files(shards) => shards.shape(name),
            Tensors::Memory(all) => all.get(name).map(|t| &t.shape[..]),
        }
    }

    fn check_sizes(&self, target: &TargetShape, file: &Path) -> Result<()> {
        let bad = |key: &str, found: usize, expected: String| {
            Err(Error::file(
                file,
                format!("`{key}` is {found}; expected {expected}"),
            ))
        };
        let c = self.config.backbone();
        if c.vocab != target.vocab {
            return bad(
                "vocab_size",
                c.vocab,
                format!("{}, the target's", target.vocab),
            );
        }
        if let DraftConfig::Eagle3(eagle3) = &self.config {
            if !(1..=target.layers + 1).contains(&eagle3.tap_count) {
                let expected = format!("1..={}", target.layers + 1);
                return bad("num_aux_hidden_states", eagle3.tap_count, expected);
            }
            if eagle3.target_hidden != target.hidden {
                let expected = format!("{}, the target's", target.hidden);
                return bad("target_hidden_size", eagle3.target_hidden, expected);
            }
        }
        let first = c.layers.first().map(|layer| layer.input);
        if first != Some(self.config.first_input()) {
            return Err(Error::file(
                file,
                format!(
                    "a first layer of {} takes {:?}; found {first:?}",
                    self.config.layout(),
                    self.config.first_input()
                ),
            ));
        }
        let (tensors, layers) = (self.names().len(), c.layers.len());
        if matches!(self.config, DraftConfig::Eagle(_)) && layers != 1 {
            return bad("num_hidden_layers", layers, "1".into());
        }
        // A file of so many layers has more keys than that.
        if layers > tensors {
            let expected = format!("no more than the file's {tensors} keys");
            return bad("num_hidden_layers", layers, expected);
        }
        let may_differ = matches!(self.config, DraftConfig::Eagle3(_));
        if c.hidden != target.hidden && !(may_differ && self.has("embed_tokens.weight")) {
            let expected = format!("{}, the target's", target.hidden);
            return bad("hidden_size", c.hidden, expected);
        }
        let draft_vocab = self.config.draft_vocab();
        if draft_vocab == 0 || draft_vocab > c.vocab {
            return bad("draft_vocab_size", draft_vocab, format!("1..={}", c.vocab));
        }
        Ok(())
    }

    /// Compares the keys with the layout's.
    fn check_keys(&mut self) -> Result<()> {
        let entries = self.entries();
        let layout = self.config.layout();
        for entry in &entries {
            if !entry.optional || self.has(&entry.name) {
                // Shape and type are checked where the header is, before anything is read.
                self.check_entry(entry)?;
            }
        }
        let mut passed_over = Vec::new();
        for name in self.names() {
            if entries.iter().any(|entry| entry.name == name)
                || name.ends_with("rotary_emb.inv_freq")
            {
                continue;
            }
            if passed_over_in(layout).contains(&name) {
                passed_over.push(name);
                continue;
            }
            return Err(Error::Tensor {
                path: self.path().to_path_buf(),
                tensor: name.into(),
                expected: format!("no such key in {layout}"),
                found: format!("shape {:?}", self.shape(name).unwrap_or_default()),
            });
        }
        if !passed_over.is_empty() {
            let note = format!(
                "{}: {} are copies of the target's from training, and passed over",
                self.path().display(),
                passed_over.join(", ")
            );
            self.notes.push(note);
        }
        Ok(())
    }

    /// The keys that its network has.
    pub fn entries(&self) -> Vec<Entry> {
        entries(&self.config, &|name| self.has(name))
    }

    fn check_entry(&self, entry: &Entry) -> Result<()> {
        let dtype = match &self.tensors {
            Tensors::Files(shards) => shards.dtype(&entry.name, &entry.shape)?,
            Tensors::Memory(_) => self.held(&entry.name, &entry.shape)?.dtype,
        };
        match entry.kinds.contains(&dtype) {
            true => Ok(()),
            false => Err(self.wrong(
                &entry.name,
                format!("type {:?}", entry.kinds),
                format!("{dtype:?}"),
            )),
        }
    }

    /// A tensor in memory, its shape and length checked.
    fn held(&self, name: &str, shape: &[usize]) -> Result<&HeldTensor> {
        let found = match &self.tensors {
            Tensors::Memory(all) => all.get(name),
            Tensors::Files(_) => None,
        };
        let expected = || format!("shape {shape:?}");
        let Some(found) = found else {
            return Err(self.wrong(name, expected(), "no such tensor".into()));
        };
        if found.shape != shape {
            let shape = format!("shape {:?}", found.shape);
            return Err(self.wrong(name, expected(), shape));
        }
        let bits = found.dtype.bitsize() * shape.iter().product::<usize>();
        match found.bytes.len() * 8 == bits {
            true => Ok(found),
            false => Err(self.wrong(
                name,
                format!("{} bytes", bits / 8),
                format!("{} bytes", found.bytes.len()),
            )),
        }
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        match &self.tensors {
            Tensors::Files(shards) => shards.contains(name),
            Tensors::Memory(all) => all.contains_key(name),
        }
    }

    /// Type and bytes of a tensor, as stored.
    pub fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, Cow<'_, [u8]>)> {
        if let Tensors::Files(shards) = &self.tensors {
            let (dtype, bytes) = shards.stored(name, shape)?;
            return Ok((dtype, bytes.into()));
        }
        let held = self.held(name, shape)?;
        Ok((held.dtype, (&held.bytes[..]).into()))
    }

    /// An error about a tensor's content.
    fn wrong(&self, tensor: &str, expected: String, found: String) -> Error {
        Error::Tensor {
            path: self.path().to_path_buf(),
            tensor: tensor.into(),
            expected,
            found,
        }
    }
}

impl Weights for Checkpoint {
    fn find(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        if let Tensors::Files(shards) = &self.tensors {
            return shards.find(name, shape);
        }
        let held = self.held(name, shape)?;
        StoredTensor::in_memory(name.to_string(), held.dtype, shape, &held.bytes[..])
    }

    fn form(&self) -> WeightForm {
        self.form
    }
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
