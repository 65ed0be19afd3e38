//! What the integration tests share: random tiny models in every file format, and where larger inputs lie.

pub mod answers;
mod bench;
mod decode;
mod drafts;
mod random;
mod tiny;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use safetensors::{Dtype, SafeTensors};
use scylla_core::assets::{DEFAULT_MODEL, cache_dir};
use scylla_core::kernels::Pool;
use scylla_core::model::{
    Cpu, Executor, LoadOptions, Loaded, ModelFiles, OnDevice, WeightForm, load_on, parse_device,
};
use scylla_core::plugin::{SlotRows, Step, TargetModel, Want};

pub use bench::{Bench, NETWORKS, TINY};
pub use decode::{decode_prompts, refusal, whole};
pub use drafts::{DraftTensor, TinyDraft};
pub use random::{RandomWeights, llama_shape};
pub use tiny::{
    LETTERS, Tiny, byte_level_tokenizer, pair_tokenizer, write_gguf, write_gguf_with, write_hf,
    write_letters, write_sentencepiece_gguf, write_split_gguf,
};

/// The folder of golden values, named by `SCYLLA_GOLDEN`; without it a test prints why it is skipped.
pub fn golden(test: &str) -> Option<PathBuf> {
    match std::env::var_os("SCYLLA_GOLDEN") {
        Some(dir) if Path::new(&dir).is_dir() => Some(dir.into()),
        _ => {
            eprintln!("skipped: {test}: SCYLLA_GOLDEN does not name the folder of golden values");
            None
        }
    }
}

/// The default model, fetched if need be; without network a test prints why it is skipped.
pub fn default_model(test: &str) -> Option<PathBuf> {
    let fetched = cache_dir().and_then(|cache| DEFAULT_MODEL.fetch(&cache, &mut |_| {}));
    match fetched {
        Ok(path) => Some(path),
        Err(e) => {
            eprintln!("skipped: {test}: {e}");
            None
        }
    }
}

/// Whether the tests shall run on a GPU too: the build has CUDA, and `SCYLLA_DEVICE` does not say `cpu`.
fn has_gpu() -> bool {
    cfg!(feature = "cuda") && std::env::var("SCYLLA_DEVICE").as_deref() != Ok("cpu")
}

/// The first GPU, where the build has CUDA and it is not left out.
pub fn gpu() -> Option<Device> {
    has_gpu().then(|| parse_device("cuda").expect("a GPU"))
}

/// Every executor that this build and machine have, by name: the kernels on one and on two threads, candle's tensors on
/// the CPU, and on the first GPU where the build has CUDA.
pub fn executors() -> Vec<(String, Arc<dyn Executor>)> {
    let mut all: Vec<(String, Arc<dyn Executor>)> = Vec::new();
    for threads in [1, 2] {
        let kernels = Cpu::new(Arc::new(Pool::new(threads)));
        all.push((format!("kernels, {threads} threads"), Arc::new(kernels)));
    }
    let mut devices = vec!["cpu"];
    if has_gpu() {
        devices.push("cuda");
    }
    for name in devices {
        let device = OnDevice::new(parse_device(name).expect("device"));
        all.push((format!("candle on {name}"), Arc::new(device)));
    }
    all
}

/// A model on every executor.
pub fn backends(files: &ModelFiles, weights: WeightForm) -> Vec<(String, Loaded)> {
    let options = LoadOptions {
        weights,
        ..LoadOptions::default()
    };
    let load = |(name, executor)| (name, load_on(files, &options, executor).expect("loads"));
    executors().into_iter().map(load).collect()
}

/// Candle's tensors on the first GPU where the build has CUDA, and else on the CPU, which stands in for one.
pub fn on_device() -> Arc<dyn Executor> {
    Arc::new(OnDevice::new(match has_gpu() {
        true => parse_device("cuda").expect("a GPU"),
        false => Device::Cpu,
    }))
}

/// Where two texts behind a prompt part, the distance of the two tokens' logits by the model itself; nothing where they
/// are one. On a device rows depend on their company in the last places, so that tokens that are nearly as probable may
/// change places.
pub fn parting(
    model: &mut dyn TargetModel,
    prompt: &[u32],
    one: &[u32],
    other: &[u32],
) -> Option<f32> {
    let at = one.iter().zip(other).position(|(a, b)| a != b)?;
    let slot = 1000;
    let tokens = [prompt, &one[..at]].concat();
    model.open(slot).expect("open");
    let step = Step {
        slots: vec![SlotRows {
            slot,
            tokens: &tokens,
            parents: &[],
            want: Want::Last,
        }],
        taps: &[],
    };
    let found = model.forward(&step).expect("forward");
    model.close(slot);
    let row = found.logits[0].row(0).expect("logits").into_owned();
    Some((row[one[at] as usize] - row[other[at] as usize]).abs())
}

/// Logits that lie no further apart than this may change places on a device in single precision.
pub const NEAR_TIE: f32 = 1e-3;

/// A safetensors file read whole.
pub struct Tensors(Vec<u8>);

impl Tensors {
    /// Reads a file.
    pub fn read(path: &Path) -> Self {
        Self(std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    /// Whether a tensor is there.
    pub fn has(&self, name: &str) -> bool {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        file.tensor(name).is_ok()
    }

    /// Values and shape of an f32 tensor.
    pub fn f32(&self, name: &str) -> (Vec<f32>, Vec<usize>) {
        let (bytes, shape) = self.bytes(name, Dtype::F32);
        let value = |b: &[u8]| f32::from_le_bytes(std::array::from_fn(|i| b[i]));
        (bytes.chunks_exact(4).map(value).collect(), shape)
    }

    /// Values of an f64 tensor.
    pub fn f64(&self, name: &str) -> Vec<f64> {
        let value = |b: &[u8]| f64::from_le_bytes(std::array::from_fn(|i| b[i]));
        let (bytes, _) = self.bytes(name, Dtype::F64);
        bytes.chunks_exact(8).map(value).collect()
    }

    /// Values of an i64 tensor.
    pub fn i64(&self, name: &str) -> Vec<i64> {
        let value = |b: &[u8]| i64::from_le_bytes(std::array::from_fn(|i| b[i]));
        self.bytes(name, Dtype::I64)
            .0
            .chunks_exact(8)
            .map(value)
            .collect()
    }

    fn bytes(&self, name: &str, dtype: Dtype) -> (Vec<u8>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(view.dtype(), dtype, "{name}");
        (view.data().to_vec(), view.shape().to_vec())
    }
}

/// Largest absolute difference.
pub fn deviation(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Tokens as ids.
pub fn ids(values: &[i64]) -> Vec<u32> {
    values
        .iter()
        .map(|&v| u32::try_from(v).expect("an id"))
        .collect()
}
