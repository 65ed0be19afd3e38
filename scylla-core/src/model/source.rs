//! Weight files: safetensors (one or many shards) and GGUF, read tensor by tensor and checked.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Take};
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, gguf_file};
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};

use super::config::{ModelConfig, RopeScaling};
use crate::kernels::Weight;
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
struct Place<'a> {
    path: &'a Path,
    dtype: GgmlDType,
    start: u64,
    length: usize,
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
        Ok(Raw {
            dtype: self.dtype,
            bytes,
        })
    }

    /// Reads into the form the CPU kernels multiply with, piece by piece: no second copy is ever held.
    fn weight(&self, shape: &[usize]) -> Result<Weight> {
        let (n, k) = sizes(shape);
        let mut from = BufReader::with_capacity(1 << 16, self.reader()?);
        let read = Weight::read(self.dtype, n, k, &mut from);
        read?.map_err(Error::io(self.path))
    }
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
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let listing = dir.join("model.safetensors.index.json");
        let names = if single.is_file() || !listing.is_file() {
            vec![single]
        } else {
            shard_names(&listing)?
                .into_iter()
                .map(|n| dir.join(n))
                .collect()
        };
        Self::open_files(&names)
    }

    /// Opens the given files.
    pub fn open_files(paths: &[PathBuf]) -> Result<Self> {
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
                shards
                    .index
                    .insert(name, (i, info.dtype, info.shape.clone(), range));
            }
        }
        Ok(shards)
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
        Ok(self.find(name, shape)?.1)
    }

    /// Type and bytes of a tensor of any type, as stored.
    pub fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, Vec<u8>)> {
        let (path, dtype, range) = self.find(name, shape)?;
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
    fn find(&self, name: &str, shape: &[usize]) -> Result<(&Path, Dtype, std::ops::Range<usize>)> {
        let Some((file, dtype, found, range)) = self.index.get(name) else {
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
        Ok((path, *dtype, range.clone()))
    }

    /// Finds a tensor of floating-point values, its shape checked.
    fn place(&self, name: &str, shape: &[usize]) -> Result<Place<'_>> {
        let (path, dtype, range) = self.find(name, shape)?;
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
            path,
            dtype: ggml,
            start: range.start as u64,
            length: range.len(),
        })
    }
}

fn missing(path: PathBuf, name: &str, shape: &[usize]) -> Error {
    Error::Tensor {
        path,
        tensor: name.into(),
        expected: format!("shape {shape:?}"),
        found: "no such tensor".into(),
    }
}

pub(crate) fn shard_names(listing: &Path) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Listing {
        weight_map: HashMap<String, String>,
    }
    let text = std::fs::read_to_string(listing).map_err(Error::io(listing))?;
    let parsed: Listing = serde_json::from_str(&text)
        .map_err(|e| Error::file(listing, format!("not a shard listing: {e}")))?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
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

/// A GGUF file: metadata, and tensors read when asked for.
pub struct Gguf {
    /// The file.
    pub path: PathBuf,
    /// Its metadata and tensor table.
    pub content: gguf_file::Content,
    size: u64,
}

impl Gguf {
    /// Reads the metadata and checks that every tensor lies within the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let size = file.metadata().map_err(Error::io(path))?.len();
        let content = gguf_file::Content::read(&mut BufReader::new(file))
            .map_err(|e| Error::file(path, format!("not a whole GGUF file: {e}")))?;
        let gguf = Self {
            path: path.to_path_buf(),
            content,
            size,
        };
        for name in gguf.content.tensor_infos.keys() {
            gguf.range(name)?;
        }
        Ok(gguf)
    }

    /// Offset and length of a tensor's bytes.
    fn range(&self, name: &str) -> Result<(u64, usize)> {
        let info = &self.content.tensor_infos[name];
        let dtype = info.ggml_dtype;
        let bad = |expected: String, found: String| Error::Tensor {
            path: self.path.clone(),
            tensor: name.into(),
            expected,
            found,
        };
        let count = info
            .shape
            .dims()
            .iter()
            .try_fold(1usize, |a, &d| a.checked_mul(d))
            .filter(|c| c.is_multiple_of(dtype.block_size()))
            .ok_or_else(|| {
                bad(
                    format!("whole blocks of {dtype:?}"),
                    format!("{:?}", info.shape),
                )
            })?;
        let bytes = count / dtype.block_size() * dtype.type_size();
        let start = self.content.tensor_data_offset.saturating_add(info.offset);
        if start.saturating_add(bytes as u64) > self.size {
            return Err(bad(
                format!("{bytes} bytes at offset {start}"),
                format!("a file of {} bytes (truncated?)", self.size),
            ));
        }
        Ok((start, bytes))
    }

    /// A metadata value.
    pub fn value(&self, key: &str) -> Option<&gguf_file::Value> {
        self.content.metadata.get(key)
    }

    /// A metadata number of any width.
    pub fn number(&self, key: &str) -> Option<f64> {
        use gguf_file::Value::{F32, F64, I8, I16, I32, I64, U8, U16, U32, U64};
        Some(match self.value(key)? {
            U8(v) => f64::from(*v),
            I8(v) => f64::from(*v),
            U16(v) => f64::from(*v),
            I16(v) => f64::from(*v),
            U32(v) => f64::from(*v),
            I32(v) => f64::from(*v),
            U64(v) => *v as f64,
            I64(v) => *v as f64,
            F32(v) => f64::from(*v),
            F64(v) => *v,
            _ => return None,
        })
    }

    /// A metadata string.
    pub fn string(&self, key: &str) -> Option<&str> {
        self.value(key)
            .and_then(|v| v.to_string().ok())
            .map(String::as_str)
    }

    fn size_of(&self, key: &str) -> Result<usize> {
        match self.number(key) {
            Some(v) if v >= 0.0 && v.fract() == 0.0 && v < 1e9 => Ok(v as usize),
            Some(v) => Err(Error::file(
                &self.path,
                format!("metadata `{key}` = {v} is not a size"),
            )),
            None => Err(Error::file(
                &self.path,
                format!("metadata key `{key}` is missing"),
            )),
        }
    }

    /// The model's shape.
    pub fn config(&self) -> Result<ModelConfig> {
        let arch = self
            .string("general.architecture")
            .unwrap_or_default()
            .to_string();
        if !["llama", "qwen2"].contains(&arch.as_str()) {
            return Err(Error::Unsupported(format!(
                "{}: GGUF architecture `{arch}`; supported: llama, qwen2",
                self.path.display()
            )));
        }
        let key = |name: &str| format!("{arch}.{name}");
        let scaling = self.string(&key("rope.scaling.type")).unwrap_or("none");
        let rope_scaling = match scaling {
            _ if self.content.tensor_infos.contains_key("rope_freqs.weight") => {
                RopeScaling::Factors(Vec::new()) // read with the other tensors
            }
            "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: self.number(&key("rope.scaling.factor")).unwrap_or(1.0),
            },
            other => {
                return Err(Error::Unsupported(format!(
                    "{}: rope scaling `{other}`; supported: none, linear, rope_freqs.weight",
                    self.path.display()
                )));
            }
        };
        let context = self.size_of(&key("context_length"))?;
        if let Some(window) = self.number(&key("attention.sliding_window"))
            && window > 0.0
            && (window as usize) < context
        {
            return Err(Error::Unsupported(format!(
                "{}: sliding window {window} is active in a context of {context}",
                self.path.display()
            )));
        }
        let embedding = self.content.tensor_infos.get("token_embd.weight");
        let vocab = embedding.and_then(|t| t.shape.dims().first().copied());
        let (hidden, heads) = (
            self.size_of(&key("embedding_length"))?,
            self.size_of(&key("attention.head_count"))?,
        );
        let mut config = ModelConfig {
            vocab: vocab
                .ok_or_else(|| missing(self.path.clone(), "token_embd.weight", &[hidden]))?,
            hidden,
            ffn: self.size_of(&key("feed_forward_length"))?,
            layers: self.size_of(&key("block_count"))?,
            heads,
            kv_heads: self
                .size_of(&key("attention.head_count_kv"))
                .unwrap_or(heads),
            head_dim: match self.number(&key("attention.key_length")) {
                Some(v) => v as usize,
                None => hidden.checked_div(heads).unwrap_or(0),
            },
            norm_eps: self
                .number(&key("attention.layer_norm_rms_epsilon"))
                .unwrap_or(1e-5) as f32,
            rope_theta: self.number(&key("rope.freq_base")).unwrap_or(10000.0),
            rope_scaling,
            context,
            tied: !self.content.tensor_infos.contains_key("output.weight"),
            qkv_bias: self.content.tensor_infos.contains_key("blk.0.attn_q.bias"),
            architecture: arch,
        };
        config.check(&self.path)?;
        if config.qkv_bias && config.architecture == "llama" {
            return Err(Error::Unsupported(format!(
                "{}: attention biases in a GGUF file of architecture llama",
                self.path.display()
            )));
        }
        if matches!(config.rope_scaling, RopeScaling::Factors(_)) {
            let half = config.head_dim / 2;
            let place = self.place("rope_freqs.weight", &[half])?;
            let factors = place.weight(&[half])?.to_f32();
            if factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
                return Err(Error::file(
                    &self.path,
                    "rope_freqs.weight holds a factor that is not positive",
                ));
            }
            config.rope_scaling = RopeScaling::Factors(factors);
        }
        Ok(config)
    }

    /// Finds a tensor, its shape checked.
    fn place(&self, name: &str, shape: &[usize]) -> Result<Place<'_>> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            return Err(missing(self.path.clone(), name, shape));
        };
        let dtype = info.ggml_dtype;
        let columns = shape.last().copied().unwrap_or(1);
        if info.shape.dims() != shape || !columns.is_multiple_of(dtype.block_size()) {
            return Err(Error::Tensor {
                path: self.path.clone(),
                tensor: name.into(),
                expected: format!("shape {shape:?}, rows of whole {dtype:?} blocks"),
                found: format!("{:?}", info.shape.dims()),
            });
        }
        let (start, length) = self.range(name)?;
        Ok(Place {
            path: &self.path,
            dtype,
            start,
            length,
        })
    }
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
            Self::Gguf(gguf) => gguf.content.tensor_infos.contains_key(&gguf_name(name)),
        }
    }

    /// A vector in f32.
    pub fn vector(&self, name: &str, len: usize, config: &ModelConfig) -> Result<Vec<f32>> {
        Ok(self.tensor(name, &[len], config)?.to_f32())
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
