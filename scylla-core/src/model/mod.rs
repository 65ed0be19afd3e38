//! Models: what a layer is ([`LayerSpec`]), the families whose files say it, the executors that compute it, and targets
//! made of them.

mod config;
mod cpu;
mod device;
mod executor;
mod family;
mod files;
mod rope;
mod slots;
mod spec;
mod tokens;
mod transformer;

use std::sync::Arc;

use candle_core::Device;

pub use config::ModelConfig;
pub use cpu::{Cpu, CpuStack, LayerWeights};
pub use device::OnDevice;
pub use executor::{Executor, Forms, Stack, WeightMatrix};
pub use family::{Described, Family, Fields, config_of, families, of_config, of_draft};
pub use files::{Gguf, ModelFiles, Raw, Shards, Source, StoredTensor, Value, Weights};
pub(crate) use files::{gguf_types, shards_of};
pub use rope::{Rope, RopeScaling};
pub use slots::StackRows;
pub use spec::{AttentionInput, Biases, LayerSpec};
pub use tokens::TokenLayers;
pub use transformer::Transformer;

use crate::kernels::{Pool, Weight};
use crate::plugin::TargetModel;
use crate::{Error, Result};

/// The form in which weights are held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum WeightForm {
    /// As the file stores them (f16 is widened to f32).
    #[default]
    #[serde(rename = "as-is")]
    AsIs,
    /// Single precision.
    #[serde(rename = "f32")]
    F32,
    /// Rounded to bf16; on a device that runs through candle activations are bf16 too.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8-bit blocks of 32; matrices whose rows are not whole blocks stay as they are.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4-bit blocks of 32 with a scale and an offset; the same.
    #[serde(rename = "q4")]
    Q4,
}

impl std::str::FromStr for WeightForm {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "as-is" => Ok(Self::AsIs),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "q8_0" => Ok(Self::Q8_0),
            "q4" => Ok(Self::Q4),
            other => Err(Error::unknown(
                "weight form",
                other,
                ["as-is", "f32", "bf16", "q8_0", "q4"],
            )),
        }
    }
}

impl std::fmt::Display for WeightForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AsIs => "as-is",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4 => "q4",
        })
    }
}

impl WeightForm {
    /// Brings a matrix into this form; blocks need rows of whole ones.
    pub fn apply(self, weight: Weight) -> Result<Weight> {
        let whole = weight.k.is_multiple_of(32);
        Ok(match (self, weight.form()) {
            (Self::AsIs, _) | (Self::F32, "f32") | (Self::Bf16, "bf16") => weight,
            (Self::Q8_0, "q8_0") | (Self::Q4, "q4") => weight,
            (Self::F32, _) => weight.to_wide(),
            (Self::Bf16, _) => weight.to_bf16(),
            (Self::Q8_0, _) if whole => weight.to_q8_0()?,
            (Self::Q4, _) if whole => weight.to_q4()?,
            _ => weight,
        })
    }
}

/// Positions a slot holds unless more are asked for.
pub const USUAL_CONTEXT: usize = 8192;

/// How a model is held and run.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Form of the weights.
    pub weights: WeightForm,
    /// Threads on a CPU; 0 takes the number of cores.
    pub threads: usize,
    /// Positions a slot can hold; 0 takes the model's context, at most 8192.
    pub context: usize,
    /// Where to run.
    pub device: Device,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            weights: WeightForm::AsIs,
            threads: 0,
            context: 0,
            device: Device::Cpu,
        }
    }
}

impl LoadOptions {
    /// Positions a slot of this model holds under these options.
    ///
    /// # Errors
    /// If they are more than the model was made for.
    pub fn positions(&self, config: &ModelConfig) -> Result<usize> {
        match self.context {
            0 => Ok(config.context.min(USUAL_CONTEXT)),
            n if n <= config.context => Ok(n),
            n => Err(Error::Invalid(format!(
                "context {n} is longer than the model's {}",
                config.context
            ))),
        }
    }

    /// What computes under these options: this crate's kernels on a CPU, candle elsewhere.
    pub fn executor(&self) -> Arc<dyn Executor> {
        match &self.device {
            Device::Cpu => Arc::new(Cpu::new(Arc::new(Pool::new(self.thread_count())))),
            device => Arc::new(OnDevice::new(device.clone())),
        }
    }

    /// Threads to use.
    pub fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

/// Parses `cpu`, `cuda` or `cuda:n`.
pub fn parse_device(name: &str) -> Result<Device> {
    let cuda = |n: usize| {
        if candle_core::utils::cuda_is_available() {
            Ok(Device::new_cuda(n)?)
        } else {
            Err(Error::Unsupported(format!(
                "device `{name}`: this binary was built without the `cuda` feature"
            )))
        }
    };
    match name.split_once(':') {
        None if name == "cpu" => Ok(Device::Cpu),
        None if name == "cuda" => cuda(0),
        Some(("cuda", n)) if n.parse::<usize>().is_ok() => cuda(n.parse().unwrap_or(0)),
        _ => Err(Error::unknown("device", name, ["cpu", "cuda", "cuda:n"])),
    }
}

/// A loaded target and what it weighs.
pub struct Loaded {
    /// The model.
    pub model: Box<dyn TargetModel>,
    /// Its shape.
    pub config: ModelConfig,
    /// Bytes of weights held.
    pub weight_bytes: usize,
    /// The forms of the weights, most bytes first.
    pub forms: Vec<&'static str>,
    /// Bytes of one position of a cache.
    pub cache_bytes: usize,
    /// What computes it, and its drafts.
    pub executor: Arc<dyn Executor>,
    /// Embedding and head, which drafts share.
    pub tokens: TokenLayers,
}

/// Loads a target: on a CPU with this crate's kernels, elsewhere through candle.
pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Loaded> {
    load_on(files, options, options.executor())
}

/// Loads a target, or a draft that is a whole model, on an executor.
pub fn load_on(
    files: &ModelFiles,
    options: &LoadOptions,
    executor: Arc<dyn Executor>,
) -> Result<Loaded> {
    let model = Transformer::load(files, options, Arc::clone(&executor))?;
    Ok(Loaded {
        config: files.config.clone(),
        weight_bytes: model.weight_bytes(),
        forms: model.forms(),
        cache_bytes: model.cache_bytes(),
        tokens: model.tokens().clone(),
        model: Box::new(model),
        executor,
    })
}
