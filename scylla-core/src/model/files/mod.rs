//! A model's files: Hugging Face directories and GGUF files, opened, checked whole, and read tensor by tensor.

mod gguf;
mod safetensors;
mod stored;

use std::collections::HashSet;
use std::io::BufRead;
use std::path::{Path, PathBuf};

pub(crate) use gguf::supported as gguf_types;
pub use gguf::{Gguf, Value};
pub use safetensors::Shards;
pub(crate) use safetensors::shards_of;
pub(super) use stored::missing;
pub use stored::{Raw, StoredTensor, Weights};

use super::WeightForm;
use super::config::ModelConfig;
use super::family::{self, Family, families, known};
use super::tokens::{EMBEDDING, HEAD};
use crate::files::read_text;
use crate::{Error, Result};

/// An open set of weights.
pub enum Source {
    /// Safetensors shards.
    Safetensors(Shards),
    /// A GGUF file.
    Gguf(Box<Gguf>),
}

impl Source {
    /// The files it is made of.
    pub fn files(&self) -> &[PathBuf] {
        match self {
            Self::Safetensors(shards) => shards.files(),
            Self::Gguf(gguf) => gguf.files(),
        }
    }
}

/// A model's files: what they describe, and the weights.
pub struct ModelFiles {
    /// The directory or GGUF file.
    pub path: PathBuf,
    /// The model's shape.
    pub config: ModelConfig,
    /// The weights.
    pub source: Source,
    /// What the files say that was passed over, for the user to know.
    pub notes: Vec<String>,
    family: &'static dyn Family,
}

impl ModelFiles {
    /// Opens a Hugging Face directory or a GGUF file. Nothing is read beyond headers.
    ///
    /// # Errors
    /// If a file is not there or not whole, or says something of the model that is neither followed here nor known to
    /// change nothing; names file, key or tensor.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_among(path, &families())
    }

    /// The same of a model that belongs to one of these families.
    ///
    /// # Errors
    /// As [`ModelFiles::open`].
    pub fn open_among(path: &Path, families: &[&'static dyn Family]) -> Result<Self> {
        let (((config, notes), family), source) = if path.is_dir() {
            let file = path.join("config.json");
            if !file.is_file() {
                let adapter = path.join("adapter_config.json").is_file();
                return Err(Error::file(
                    path,
                    match adapter {
                        true => {
                            "holds an adapter, not a model; merge it into its base model first (peft: merge_and_unload)"
                        }
                        false => {
                            "has no config.json; a model is a directory with config.json and safetensors, or a GGUF file"
                        }
                    },
                ));
            }
            let described = family::of_hf(&read_text(&file)?, &file, families)?;
            (described, Source::Safetensors(Shards::open(path)?))
        } else if path.exists() {
            let gguf = Gguf::open(path)?;
            (
                family::of_gguf(&gguf, families)?,
                Source::Gguf(Box::new(gguf)),
            )
        } else {
            return Err(Error::file(
                path,
                "no such file or directory; a model is a directory with config.json and safetensors, or a GGUF file",
            ));
        };
        let files = Self {
            path: path.to_path_buf(),
            config,
            source,
            family,
            notes,
        };
        files.check_names()?;
        Ok(files)
    }

    /// The files that make up the model, in order of name: its configuration, where that is one of its own, and its weights.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = self.source.files().to_vec();
        files.extend(self.path.is_dir().then(|| self.path.join("config.json")));
        files.sort();
        files
    }

    /// The weights, in a form.
    pub fn weights(&self, form: WeightForm) -> impl Weights + '_ {
        Held { files: self, form }
    }

    /// The files' name for a tensor.
    fn own_name(&self, name: &str) -> String {
        match self.source {
            Source::Safetensors(_) => self.family.hf_name(name),
            Source::Gguf(_) => self.family.gguf_name(name),
        }
    }

    /// Finds a tensor by its Hugging Face name, shape checked.
    fn find(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let own = self.own_name(name);
        let gguf = match &self.source {
            Source::Safetensors(shards) => return shards.find(&own, shape),
            Source::Gguf(gguf) => gguf,
        };
        let mut found = gguf.find(&own, shape)?;
        if shape.len() == 1 && found.dtype().block_size() > 1 {
            return Err(Error::Tensor {
                path: gguf.path.clone(),
                tensor: own,
                expected: "a vector of F32, F16 or BF16".into(),
                found: format!("blocks of type {:?}", found.dtype()),
            });
        }
        if self.family.is_interleaved() {
            let layer = self.config.layers.first();
            found.interleaved = match name {
                _ if name.contains("q_proj") => layer.map(|l| l.heads),
                _ if name.contains("k_proj") => layer.map(|l| l.kv_heads),
                _ => None,
            };
        }
        Ok(found)
    }

    /// Checks that every tensor of the files is one that a model of this shape is made of, or is known to change
    /// nothing: a tensor that is passed over without a word would make another model of it.
    ///
    /// # Errors
    /// Names the tensor.
    fn check_names(&self) -> Result<()> {
        let config = &self.config;
        let own = |(name, _): (String, _)| self.own_name(&name);
        let mut known: HashSet<String> = config.tensors().into_iter().map(own).collect();
        if let Source::Gguf(_) = self.source {
            known.insert("rope_freqs.weight".into()); // part of the rope
        }
        let (names, ignored, path): (Vec<&str>, _, _) = match &self.source {
            Source::Safetensors(shards) => (shards.names(), known::HF_TENSORS, shards.path()),
            Source::Gguf(gguf) => (gguf.tensors().collect(), known::GGUF_TENSORS, &*gguf.path),
        };
        let strange = |name: &&&str| {
            !known.contains(**name) && !ignored.iter().any(|(end, _)| name.ends_with(end))
        };
        let found = names.iter().filter(strange).min();
        match found {
            None => Ok(()),
            Some(&name) if config.tied && name == self.own_name(HEAD) => self.check_copy(path),
            Some(name) => {
                let quantised = [
                    ".qweight",
                    ".qzeros",
                    ".g_idx",
                    ".scales",
                    "_scale",
                    "_scale_inv",
                    ".absmax",
                    ".quant_state",
                    "weight_packed",
                    ".SCB",
                    "weight_format",
                ];
                let hint = match quantised
                    .iter()
                    .any(|q| names.iter().any(|n| n.contains(q)))
                {
                    true => {
                        "; these weights are quantised (GPTQ, AWQ, FP8 or bitsandbytes): take the model they were made from, or a GGUF file"
                    }
                    false => "",
                };
                Err(Error::Tensor {
                    path: path.to_path_buf(),
                    tensor: (*name).into(),
                    expected: format!(
                        "no such tensor in a model of family {}",
                        config.architecture
                    ),
                    found: format!("one that would be left out{hint}"),
                })
            }
        }
    }

    /// A head beside one that is tied may be a copy of the embedding, and nothing else.
    fn check_copy(&self, path: &Path) -> Result<()> {
        let shape = [self.config.vocab, self.config.hidden];
        let (head, table) = (self.find(HEAD, &shape)?, self.find(EMBEDDING, &shape)?);
        let same = head.dtype() == table.dtype()
            && equal(&mut *head.reader()?, &mut *table.reader()?).map_err(Error::io(path))?;
        match same {
            true => Ok(()),
            false => Err(Error::Tensor {
                path: path.to_path_buf(),
                tensor: "lm_head.weight".into(),
                expected: "a copy of model.embed_tokens.weight, since tie_word_embeddings is true".into(),
                found: "other values; say tie_word_embeddings = false in config.json if the head is its own".into(),
            }),
        }
    }
}

/// A model's weights in the form that is asked for.
struct Held<'a> {
    files: &'a ModelFiles,
    form: WeightForm,
}

impl Weights for Held<'_> {
    fn find(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        self.files.find(name, shape)
    }
    fn form(&self) -> WeightForm {
        self.form
    }
}

/// Whether two readers give the same bytes.
fn equal(a: &mut dyn BufRead, b: &mut dyn BufRead) -> std::io::Result<bool> {
    loop {
        let (left, right) = (a.fill_buf()?, b.fill_buf()?);
        let n = left.len().min(right.len());
        if n == 0 {
            return Ok(left.is_empty() && right.is_empty());
        }
        if left[..n] != right[..n] {
            return Ok(false);
        }
        a.consume(n);
        b.consume(n);
    }
}
