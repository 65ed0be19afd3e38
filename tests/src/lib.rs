//! What the integration tests share: random tiny models in every file format, and where larger inputs lie.

pub mod answers;
mod drafts;
mod tiny;

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use scylla_core::assets::{DEFAULT_MODEL, cache_dir};
use scylla_core::model::{
    CpuModel, DeviceModel, LoadOptions, ModelFiles, WeightForm, parse_device,
};
use scylla_core::plugin::TargetModel;

pub use drafts::{DraftTensor, TinyDraft};
pub use tiny::{
    LETTERS, Tiny, byte_level_tokenizer, write_gguf, write_gguf_with, write_hf,
    write_sentencepiece_gguf, write_split_gguf,
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

/// Every implementation of the transformer that this build and machine can run, by name.
pub fn backends(files: &ModelFiles, weights: WeightForm) -> Vec<(String, Box<dyn TargetModel>)> {
    let options = |device: &str, threads| LoadOptions {
        weights,
        threads,
        context: 0,
        device: parse_device(device).expect("device"),
    };
    let mut all: Vec<(String, Box<dyn TargetModel>)> = Vec::new();
    for threads in [1, 2] {
        let model = CpuModel::load(files, &options("cpu", threads)).expect("loads");
        all.push((format!("kernels, {threads} threads"), Box::new(model)));
    }
    let mut devices = vec!["cpu"];
    if cfg!(feature = "cuda") {
        devices.push("cuda");
    }
    // Forms that candle's devices have not are refused there.
    let refused = matches!(weights, WeightForm::Bf16 | WeightForm::Q4);
    for device in devices.into_iter().filter(|_| !refused) {
        let model = DeviceModel::load(files, &options(device, 1)).expect("loads");
        all.push((format!("candle on {device}"), Box::new(model)));
    }
    all
}

/// A safetensors file read whole.
pub struct Tensors(Vec<u8>);

impl Tensors {
    /// Reads a file.
    pub fn read(path: &Path) -> Self {
        Self(std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
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
