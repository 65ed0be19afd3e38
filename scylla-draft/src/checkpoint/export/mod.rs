//! Writing a checkpoint in the layouts that vLLM, SGLang and the speculators library load: exactly their keys.

mod config;

use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scylla_core::files;
use scylla_core::model::{LayerSpec, ModelConfig, Weights};
use scylla_core::plugin::Tap;
use scylla_core::{Error, Result};

use super::{Checkpoint, DraftConfig, Entry, Layout, layer_prefix, offsets_of};

/// The layouts that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// EAGLE-1/2.
    Eagle,
    /// EAGLE-3, one directory for both engines.
    Eagle3,
    /// EAGLE-3 for the speculators library.
    Speculators,
    /// Scylla, which this project alone reads.
    Scylla,
}

impl std::str::FromStr for Format {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "eagle" => Ok(Self::Eagle),
            "eagle3" => Ok(Self::Eagle3),
            "speculators" => Ok(Self::Speculators),
            "scylla" => Ok(Self::Scylla),
            other => {
                let known = ["eagle", "eagle3", "speculators", "scylla"];
                Err(Error::unknown("format", other, known))
            }
        }
    }
}

/// Type of the exported values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// What the engines compute in.
    #[default]
    Bf16,
    /// Single precision.
    F32,
    /// Each tensor's own.
    AsIs,
}

impl std::str::FromStr for Precision {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "bf16" => Ok(Self::Bf16),
            "f32" => Ok(Self::F32),
            "as-is" => Ok(Self::AsIs),
            other => Err(Error::unknown("dtype", other, ["bf16", "f32", "as-is"])),
        }
    }
}

/// What is exported, and for which target.
pub struct Export<'a> {
    /// The draft.
    pub checkpoint: &'a Checkpoint,
    /// The layout.
    pub format: Format,
    /// Type of the values.
    pub precision: Precision,
    /// Whether EAGLE-1's `fc` gets a zero bias, which SGLang's loader expects (vLLM drops it).
    pub zero_bias: bool,
    /// The target's shape.
    pub target: &'a ModelConfig,
    /// Its sha256, which the draft carries.
    pub target_sha256: Option<&'a str>,
    /// Its name or path and its architecture, as served.
    pub verifier: (&'a str, &'a str),
    /// The target's embedding `[V, H]`, for layouts that hold it.
    pub embedding: &'a dyn Fn() -> Result<Vec<f32>>,
    /// Layers whose inputs an EAGLE-3 network reads.
    pub taps: &'a [Tap],
    /// Drafted tokens that a speculators configuration proposes.
    pub speculative_tokens: usize,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Written {
    /// Keys, in order.
    pub keys: Vec<String>,
    /// Values that lost precision.
    pub rounded: usize,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// A tensor to be written.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Writes `config.json` and `model.safetensors` into a directory, which is made where it is not there.
///
/// # Errors
/// If the network cannot be said in the format, or a file cannot be written.
pub fn export(what: &Export<'_>, dir: &Path) -> Result<Written> {
    let from = what.checkpoint;
    let cannot = |why: &str| {
        Err(Error::Unsupported(format!(
            "{}: {} cannot be written in format {:?}{why}",
            from.dir.display(),
            from.config.layout(),
            what.format
        )))
    };
    match (what.format, &from.config) {
        (Format::Eagle, DraftConfig::Eagle(_)) | (Format::Scylla, DraftConfig::Scylla(_)) => {}
        (Format::Eagle3 | Format::Speculators, DraftConfig::Eagle3(_)) => {}
        _ => return cannot(""),
    }
    let layers = &from.config.backbone().layers;
    if layers.iter().any(|l| l.qk_norm || l.window.is_some()) {
        return cannot(": a plain Llama layer has no norms of q and k, and no window");
    }
    let like_the_first = |l: &LayerSpec| {
        let input = l.input;
        layers.first().is_some_and(|first| {
            *l == LayerSpec {
                input,
                ..first.clone()
            }
        })
    };
    let biases = |l: &LayerSpec| l.biases.q == l.biases.k && l.biases.q == l.biases.v;
    let eps = from.config.backbone().eps;
    if !layers
        .iter()
        .all(|l| like_the_first(l) && biases(l) && l.eps == eps)
    {
        return cannot(
            ": its configuration describes one layer for all, with biases of q, k and v together",
        );
    }
    let mut written = Written::default();
    let tensors = tensors(what, &mut written)?;
    let biased = tensors.iter().any(|t| t.name == "fc.bias");
    let weight = tensors.iter().find(|t| t.name == "fc.weight");
    let dtype = match weight.map(|t| t.dtype) {
        Some(Dtype::BF16) => "bfloat16",
        Some(Dtype::F16) => "float16",
        _ => "float32",
    };
    let config = config::config(what, biased, dtype, &mut written.notes)?;
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let views = tensors.iter().map(|t| {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
        view.map(|view| (t.name.as_str(), view))
    });
    let bad = |e: safetensors::SafeTensorError| Error::file(dir, format!("safetensors: {e}"));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(bad)?;
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(bad)?;
    files::write(&dir.join("model.safetensors"), &bytes)?;
    let text = serde_json::to_string_pretty(&config)
        .map_err(|e| Error::Invalid(format!("configuration: {e}")))?;
    files::write(&dir.join("config.json"), (text + "\n").as_bytes())?;
    written.keys = tensors.into_iter().map(|t| t.name).collect();
    written.keys.sort_unstable();
    Ok(written)
}

/// The tensors of the format, under its names.
fn tensors(what: &Export<'_>, written: &mut Written) -> Result<Vec<Stored>> {
    let from = what.checkpoint;
    let c = from.config.backbone();
    let same_vocab = from.config.draft_vocab() == c.vocab;
    let moved = same_vocab && from.has("d2t") && from.offsets()?.iter().any(|&offset| offset != 0);
    if moved {
        return Err(Error::Unsupported(format!(
            "{}: a draft vocabulary as large as the target's in another order; vLLM takes no map there",
            from.dir.display()
        )));
    }
    let mut all = Vec::new();
    for Entry { name, shape, .. } in from.entries() {
        // vLLM refuses maps where there is nothing to map; EAGLE-1's bias is written below, where it is wanted.
        let dropped = same_vocab && (name == "d2t" || name == "t2d");
        let zero = name == "fc.bias" && is_zero(from, &shape)?;
        if !from.has(&name) || dropped || zero {
            continue;
        }
        let (dtype, bytes) = match &*name {
            // Both engines take the one width without a word.
            "d2t" => {
                let bytes = from
                    .offsets()?
                    .iter()
                    .flat_map(|v| v.to_le_bytes())
                    .collect();
                (Dtype::I64, bytes)
            }
            _ => {
                let (dtype, bytes) = from.stored(&name, &shape)?;
                (dtype, bytes.into_owned())
            }
        };
        all.push(Stored {
            name: renamed(&name, what),
            dtype,
            shape,
            bytes,
        });
    }
    all.retain(|t| t.name != "t2d" || t.dtype == Dtype::BOOL);
    complete_maps(from, &mut all)?;
    let bias = all.iter().any(|t| t.name == "fc.bias");
    if bias {
        written
            .notes
            .push("fc.bias is not zero: vLLM drops it and will draft worse; SGLang uses it".into());
    }
    let wide = |name: &str, values: Vec<f32>, shape: &[usize]| Stored {
        name: name.into(),
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    if what.zero_bias && what.format == Format::Eagle && !bias {
        all.push(wide("fc.bias", vec![0.0; c.hidden], &[c.hidden]));
    }
    if what.format == Format::Speculators && !from.has("embed_tokens.weight") {
        let values = (what.embedding)()?;
        all.push(wide("embed_tokens.weight", values, &[c.vocab, c.hidden]));
    }
    for tensor in &mut all {
        written.rounded += convert(tensor, what.precision);
    }
    Ok(all)
}

/// Writes the map that the checkpoint leaves out because it follows from the other.
fn complete_maps(from: &Checkpoint, all: &mut Vec<Stored>) -> Result<()> {
    let (count, vocab) = (from.config.draft_vocab(), from.config.backbone().vocab);
    if !matches!(from.config, DraftConfig::Eagle3(_)) || count == vocab {
        return Ok(());
    }
    let ids = from.draft_ids(vocab)?;
    let targets: Vec<u32> = (0..count).map(|i| ids.target(i)).collect();
    if all.iter().all(|t| t.name != "t2d") {
        let mut marked = vec![0; vocab];
        targets.iter().for_each(|&t| marked[t as usize] = 1);
        all.push(Stored {
            name: "t2d".into(),
            dtype: Dtype::BOOL,
            shape: vec![vocab],
            bytes: marked,
        });
    }
    if !from.has("d2t") {
        let bytes = offsets_of(&targets).into_iter().flat_map(i64::to_le_bytes);
        all.push(Stored {
            name: "d2t".into(),
            dtype: Dtype::I64,
            shape: vec![count],
            bytes: bytes.collect(),
        });
    }
    Ok(())
}

/// Whether an EAGLE-1 network has no bias to speak of.
fn is_zero(from: &Checkpoint, shape: &[usize]) -> Result<bool> {
    let zero = |bias: Vec<f32>| bias.iter().all(|&b| b == 0.0);
    match from.has("fc.bias") {
        true => from.vector("fc.bias", shape[0]).map(zero),
        false => Ok(true),
    }
}

fn renamed(name: &str, what: &Export<'_>) -> String {
    let ours = layer_prefix(what.checkpoint.config.layout(), 0);
    let theirs = match what.format {
        Format::Eagle | Format::Scylla => return name.into(),
        Format::Eagle3 => layer_prefix(Layout::Eagle3, 0),
        Format::Speculators => layer_prefix(Layout::Speculators, 0),
    };
    match name.strip_prefix(&ours) {
        Some(rest) => format!("{theirs}{rest}"),
        None => name.into(),
    }
}

/// Brings floating-point values to a type; returns how many lost precision.
fn convert(tensor: &mut Stored, precision: Precision) -> usize {
    let size = match tensor.dtype {
        Dtype::F32 => 4,
        Dtype::BF16 | Dtype::F16 => 2,
        _ => return 0,
    };
    let to = match precision {
        Precision::AsIs => return 0,
        Precision::Bf16 => Dtype::BF16,
        Precision::F32 => Dtype::F32,
    };
    if to == tensor.dtype {
        return 0;
    }
    let from = tensor.dtype;
    let value = |b: &[u8]| match from {
        Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
        _ => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
    };
    let mut rounded = 0;
    let mut bytes = Vec::with_capacity(tensor.bytes.len());
    for b in tensor.bytes.chunks_exact(size) {
        let v = value(b);
        match to {
            Dtype::F32 => bytes.extend(v.to_le_bytes()),
            _ => {
                let short = bf16::from_f32(v);
                rounded += usize::from(short.to_f32().to_bits() != v.to_bits());
                bytes.extend(short.to_le_bytes());
            }
        }
    }
    tensor.dtype = to;
    tensor.bytes = bytes;
    rounded
}
