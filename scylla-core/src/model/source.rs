//! Weight files: safetensors (one or many shards) and GGUF, read tensor by tensor and checked.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Take};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};

use super::config::ModelConfig;
use super::gguf::Gguf;
use super::known;
use crate::files::{head, parse_json, read_text, refuse_pointer};
use crate::kernels::{Weight, is_finite};
use crate::{Error, Result};

/// An open set of weights with Hugging Face names.
pub enum Source {
    /// Safetensors shards.
    Safetensors(Shards),
    /// A GGUF file.
    Gguf(Box<Gguf>),
}

/// A tensor's bytes as they are stored, with q and k rows in split rotary order.
pub struct Raw {
    /// The element or block type.
    pub dtype: GgmlDType,
    /// Whole elements or blocks.
    pub bytes: Vec<u8>,
}

/// Where a tensor lies in its file, checked to lie within it.
pub(super) struct Place<'a> {
    pub(super) name: &'a str,
    pub(super) path: &'a Path,
    pub(super) dtype: GgmlDType,
    pub(super) start: u64,
    pub(super) length: usize,
}

impl Place<'_> {
    fn reader(&self) -> Result<Take<File>> {
        let mut file = File::open(self.path).map_err(Error::io(self.path))?;
        file.seek(SeekFrom::Start(self.start))
            .map_err(Error::io(self.path))?;
        Ok(file.take(self.length as u64))
    }

    fn raw(&self) -> Result<Raw> {
        let mut bytes = vec![0; self.length];
        self.reader()?
            .read_exact(&mut bytes)
            .map_err(Error::io(self.path))?;
        if !is_finite(self.dtype, &bytes) {
            return Err(self.wrong("finite values".into(), "NaN or infinity".into()));
        }
        Ok(Raw {
            dtype: self.dtype,
            bytes,
        })
    }

    /// A vector in f32.
    pub(super) fn vector(&self) -> Result<Vec<f32>> {
        let n = self.length / self.dtype.type_size() * self.dtype.block_size();
        Ok(self.weight(&[n])?.to_f32())
    }

    /// Reads into the form the CPU kernels multiply with, piece by piece: no second copy is ever held.
    fn weight(&self, shape: &[usize]) -> Result<Weight> {
        let (n, k) = sizes(shape);
        let mut from = BufReader::with_capacity(1 << 16, self.reader()?);
        match Weight::read(self.dtype, n, k, &mut from) {
            Ok(read) => read.map_err(Error::io(self.path)),
            Err(Error::Invalid(found)) => Err(self.wrong("finite values".into(), found)),
            Err(e) => Err(e),
        }
    }

    fn wrong(&self, expected: String, found: String) -> Error {
        Error::Tensor {
            path: self.path.to_path_buf(),
            tensor: self.name.into(),
            expected,
            found,
        }
    }
}

/// A tensor of a safetensors file.
struct Found<'a> {
    name: &'a str,
    path: &'a Path,
    dtype: Dtype,
    range: std::ops::Range<usize>,
}

/// Rows and columns of a matrix; a vector is a row.
fn sizes(shape: &[usize]) -> (usize, usize) {
    match *shape {
        [n, k] => (n, k),
        _ => (1, shape.iter().product()),
    }
}

/// Reads the header of a safetensors file: where the data begins, what it holds, and the size of the file.
#[allow(unsafe_code)]
fn header(path: &Path) -> Result<(usize, Metadata, usize)> {
    let begin = head(path, 64)?;
    refuse_pointer(path, &begin)?;
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is read-only and private, and lives for this function alone. A file that another process
    // shortens meanwhile ends this one with a signal; it cannot make it read other memory.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
    let (header, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|e| Error::file(path, format!("not a whole safetensors file: {e}")))?;
    Ok((header + 8, metadata, map.len()))
}

/// Safetensors files and which of them holds which tensor.
pub struct Shards {
    files: Vec<PathBuf>,
    /// Tensor name to file, type, shape and byte range.
    index: HashMap<String, (usize, Dtype, Vec<usize>, std::ops::Range<usize>)>,
}

impl Shards {
    /// Opens every shard of a model directory.
    ///
    /// # Errors
    /// If the directory holds no weights that are read, or its listing and its shards do not agree.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return Self::open_files(&[single]);
        }
        let listing = dir.join("model.safetensors.index.json");
        if !listing.is_file() {
            return Err(no_weights(dir));
        }
        let map = listed(&listing)?;
        let names = shard_names(&map, &listing)?;
        let files: Vec<PathBuf> = names.iter().map(|n| dir.join(n)).collect();
        let shards = Self::open_files(&files)?;
        for (tensor, file) in &map {
            let found = shards.index.get(tensor).map(|at| &names[at.0]);
            if found != Some(file) {
                return Err(Error::file(
                    &listing,
                    match found {
                        Some(found) => format!("says that {file} holds `{tensor}`; {found} does"),
                        None => format!("says that {file} holds `{tensor}`; it does not"),
                    },
                ));
            }
        }
        Ok(shards)
    }

    /// Opens the given files.
    ///
    /// # Errors
    /// If there are none, one is not whole, or two hold a tensor of the same name.
    pub fn open_files(paths: &[PathBuf]) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::Invalid("no weight files were given".into()));
        }
        let mut shards = Self {
            files: paths.to_vec(),
            index: HashMap::new(),
        };
        for (i, path) in paths.iter().enumerate() {
            let (data, metadata, size) = header(path)?;
            for (name, info) in metadata.tensors() {
                let range = data + info.data_offsets.0..data + info.data_offsets.1;
                if range.end > size {
                    return Err(Error::Tensor {
                        path: path.clone(),
                        tensor: name,
                        expected: format!("a file of at least {} bytes", range.end),
                        found: format!("{size} bytes (truncated?)"),
                    });
                }
                if let Some((other, ..)) = shards.index.get(&name) {
                    let message = format!("tensor `{name}` is also in {}", paths[*other].display());
                    return Err(Error::file(path, message));
                }
                let entry = (i, info.dtype, info.shape.clone(), range);
                shards.index.insert(name, entry);
            }
        }
        Ok(shards)
    }

    /// The files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The same under other names.
    ///
    /// # Errors
    /// If two tensors get one name.
    pub fn renamed(self, name: impl Fn(&str) -> String) -> Result<Self> {
        let mut index = HashMap::with_capacity(self.index.len());
        for (old, entry) in self.index {
            let new = name(&old);
            if index.contains_key(&new) {
                return Err(Error::file(
                    &self.files[0],
                    format!("holds tensor `{new}` under two names, of which one is `{old}`"),
                ));
            }
            index.insert(new, entry);
        }
        let files = self.files;
        Ok(Self { files, index })
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The tensors' names, in order.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.index.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Shape of a tensor, where it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.index.get(name).map(|(_, _, shape, _)| &shape[..])
    }

    /// The first file.
    pub fn path(&self) -> &Path {
        &self.files[0]
    }

    /// Type of a tensor, its shape checked.
    pub fn dtype(&self, name: &str, shape: &[usize]) -> Result<Dtype> {
        Ok(self.find(name, shape)?.dtype)
    }

    /// Type and bytes of a tensor of any type, as stored.
    pub fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, Vec<u8>)> {
        let Found {
            path, dtype, range, ..
        } = self.find(name, shape)?;
        let mut file = File::open(path).map_err(Error::io(path))?;
        let mut bytes = vec![0; range.len()];
        file.seek(SeekFrom::Start(range.start as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io(path))?;
        Ok((dtype, bytes))
    }

    /// Reads a matrix or vector of f32, f16 or bf16.
    pub fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.place(name, shape)?.weight(shape)
    }

    /// File, type and place of a tensor, its shape checked.
    fn find(&self, name: &str, shape: &[usize]) -> Result<Found<'_>> {
        let Some((name, (file, dtype, found, range))) = self.index.get_key_value(name) else {
            return Err(missing(self.files[0].clone(), name, shape));
        };
        let path = &self.files[*file];
        if found != shape {
            return Err(Error::Tensor {
                path: path.clone(),
                tensor: name.into(),
                expected: format!("shape {shape:?}"),
                found: format!("shape {found:?}"),
            });
        }
        Ok(Found {
            name,
            path,
            dtype: *dtype,
            range: range.clone(),
        })
    }

    /// Finds a tensor of floating-point values, its shape checked.
    fn place(&self, name: &str, shape: &[usize]) -> Result<Place<'_>> {
        let Found {
            name,
            path,
            dtype,
            range,
        } = self.find(name, shape)?;
        let ggml = match dtype {
            Dtype::F32 => GgmlDType::F32,
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            other => {
                return Err(Error::Tensor {
                    path: path.to_path_buf(),
                    tensor: name.into(),
                    expected: "F32, F16 or BF16".into(),
                    found: format!("{other:?}"),
                });
            }
        };
        Ok(Place {
            name,
            path,
            dtype: ggml,
            start: range.start as u64,
            length: range.len(),
        })
    }
}

pub(super) fn missing(path: PathBuf, name: &str, shape: &[usize]) -> Error {
    Error::Tensor {
        path,
        tensor: name.into(),
        expected: format!("shape {shape:?}"),
        found: "no such tensor".into(),
    }
}

/// What a directory holds instead of weights that are read, and what to do about it.
fn no_weights(dir: &Path) -> Error {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    let ending = |ends: &[&str]| names.iter().find(|n| ends.iter().any(|e| n.ends_with(e)));
    let pickled = ending(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"]);
    let message = if let Some(name) = ending(&["adapter_model.safetensors"]) {
        format!(
            "holds an adapter ({name}), not a model; merge it into its base model first (peft: merge_and_unload)"
        )
    } else if let Some(name) = ending(&[".gguf"]) {
        format!("holds {name} and no model.safetensors; give the path of the GGUF file itself")
    } else if let Some(name) = pickled {
        format!(
            "holds pickled weights ({name}), which run code when loaded and are not read. Convert them once with Python: \
             from transformers import AutoModelForCausalLM as M; M.from_pretrained('{dir}').save_pretrained('{dir}', safe_serialization=True)",
            dir = dir.display()
        )
    } else if let Some(name) = ending(&[".safetensors"]) {
        format!(
            "holds {name}, but no model.safetensors and no model.safetensors.index.json that lists shards"
        )
    } else {
        "holds no model.safetensors, in one file or in shards".into()
    };
    Error::file(dir, message)
}

/// The shard of each tensor, as a listing says.
fn listed(listing: &Path) -> Result<HashMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Listing {
        weight_map: HashMap<String, String>,
    }
    let json = parse_json(&read_text(listing)?, listing, "a shard listing")?;
    let parsed: Listing = serde::Deserialize::deserialize(json)
        .map_err(|e| Error::file(listing, format!("not a shard listing: {e}")))?;
    Ok(parsed.weight_map)
}

fn shard_names(map: &HashMap<String, String>, listing: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = map.values().cloned().collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(Error::file(listing, "names no shard"));
    }
    // A name from a file must not lead out of its directory.
    match names
        .iter()
        .find(|n| Path::new(n).components().count() != 1 || n.contains(".."))
    {
        Some(name) => Err(Error::file(
            listing,
            format!("shard name `{name}` is a path"),
        )),
        None => Ok(names),
    }
}

/// The shards that a listing names.
pub(crate) fn shards_of(listing: &Path) -> Result<Vec<String>> {
    shard_names(&listed(listing)?, listing)
}

impl Raw {
    /// Puts the `n` rows of a q or k weight of a Llama model back from interleaved to split rotary pairs.
    fn unpermuted(self, n: usize, heads: usize) -> Self {
        let Self { dtype, bytes } = self;
        let row = bytes.len() / n;
        let e = n / heads;
        let mut straight = vec![0; bytes.len()];
        for (i, to) in straight.chunks_exact_mut(row).enumerate() {
            let (head, at) = (i / e, i % e);
            let from = head * e
                + if at < e / 2 {
                    2 * at
                } else {
                    2 * (at - e / 2) + 1
                };
            to.copy_from_slice(&bytes[from * row..(from + 1) * row]);
        }
        Self {
            dtype,
            bytes: straight,
        }
    }
}

impl Source {
    /// Finds a tensor by its Hugging Face name, shape checked; with the number of heads where its rows stand in
    /// interleaved rotary pairs.
    fn place(
        &self,
        name: &str,
        shape: &[usize],
        config: &ModelConfig,
    ) -> Result<(Place<'_>, Option<usize>)> {
        match self {
            Self::Safetensors(shards) => Ok((shards.place(name, shape)?, None)),
            Self::Gguf(gguf) => {
                let heads = match name {
                    _ if config.architecture != "llama" || !name.ends_with("weight") => None,
                    _ if name.contains("q_proj") => Some(config.heads),
                    _ if name.contains("k_proj") => Some(config.kv_heads),
                    _ => None,
                };
                Ok((gguf.place(&gguf_name(name), shape)?, heads))
            }
        }
    }

    /// Reads a tensor by its Hugging Face name, shape checked, in the form it is stored in.
    pub fn raw(&self, name: &str, shape: &[usize], config: &ModelConfig) -> Result<Raw> {
        let (place, heads) = self.place(name, shape, config)?;
        let raw = place.raw()?;
        Ok(match heads {
            Some(heads) => raw.unpermuted(shape[0], heads),
            None => raw,
        })
    }

    /// Reads a tensor into the form the CPU kernels multiply with.
    pub fn tensor(&self, name: &str, shape: &[usize], config: &ModelConfig) -> Result<Weight> {
        let (place, heads) = self.place(name, shape, config)?;
        match heads {
            Some(heads) => {
                let raw = place.raw()?.unpermuted(shape[0], heads);
                let (n, k) = sizes(shape);
                Weight::from_gguf(raw.dtype, &raw.bytes, n, k)
            }
            None => place.weight(shape),
        }
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Safetensors(shards) => shards.contains(name),
            Self::Gguf(gguf) => gguf.contains(&gguf_name(name)),
        }
    }

    /// The files it is made of.
    pub fn files(&self) -> &[PathBuf] {
        match self {
            Self::Safetensors(shards) => shards.files(),
            Self::Gguf(gguf) => gguf.files(),
        }
    }

    /// Checks that every tensor of the files is one that a model of this shape is made of, or is known to change
    /// nothing: a tensor that is passed over without a word would make another model of it.
    ///
    /// # Errors
    /// Names the tensor.
    pub(super) fn check_names(&self, config: &ModelConfig) -> Result<()> {
        let own = |name: String| match self {
            Self::Safetensors(_) => name,
            Self::Gguf(_) => gguf_name(&name),
        };
        let mut known: HashSet<String> = config.tensors().into_iter().map(own).collect();
        if let Self::Gguf(_) = self {
            known.insert("rope_freqs.weight".into()); // part of the rope
        }
        let (names, ignored, path): (Vec<&str>, _, _) = match self {
            Self::Safetensors(shards) => (shards.names(), known::HF_TENSORS, shards.path()),
            Self::Gguf(gguf) => (gguf.tensors().collect(), known::GGUF_TENSORS, &*gguf.path),
        };
        let strange = |name: &&&str| {
            !known.contains(**name) && !ignored.iter().any(|(end, _)| name.ends_with(end))
        };
        let found = names.iter().filter(strange).min();
        match found {
            None => Ok(()),
            Some(&"lm_head.weight") if config.tied => self.check_copy(path, config),
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
    fn check_copy(&self, path: &Path, config: &ModelConfig) -> Result<()> {
        let shape = [config.vocab, config.hidden];
        let mut readers = Vec::new();
        for name in ["lm_head.weight", "model.embed_tokens.weight"] {
            let (place, _) = self.place(name, &shape, config)?;
            readers.push((
                place.dtype,
                BufReader::with_capacity(1 << 20, place.reader()?),
            ));
        }
        let same = readers[0].0 == readers[1].0 && {
            let (first, second) = readers.split_at_mut(1);
            equal(&mut first[0].1, &mut second[0].1).map_err(Error::io(path))?
        };
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

    /// A vector in f32.
    pub fn vector(&self, name: &str, len: usize, config: &ModelConfig) -> Result<Vec<f32>> {
        Ok(self.tensor(name, &[len], config)?.to_f32())
    }
}

/// Whether two readers give the same bytes.
fn equal(a: &mut impl BufRead, b: &mut impl BufRead) -> std::io::Result<bool> {
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

/// GGUF's name for a Hugging Face tensor.
fn gguf_name(name: &str) -> String {
    let top = [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ];
    if let Some((_, theirs)) = top.iter().find(|(ours, _)| *ours == name) {
        return (*theirs).into();
    }
    let mut theirs = name.replace("model.layers.", "blk.");
    for (ours, short) in [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ] {
        theirs = theirs.replace(ours, short);
    }
    theirs
}
