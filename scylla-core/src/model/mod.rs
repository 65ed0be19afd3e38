//! The transformer of the Llama and Qwen2 families, and the files it is read from.

mod config;
mod cpu;
mod device;
mod ends;
mod gguf;
mod gguf_config;
mod hf;
mod known;
mod rope;
mod slots;
mod source;
mod stack;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

pub use config::{ModelConfig, RopeScaling};
pub use cpu::CpuModel;
pub use device::DeviceModel;
pub use ends::Ends;
pub(crate) use gguf::supported as gguf_types;
pub use gguf::{Gguf, Value};
pub use slots::Rows;
pub(crate) use source::shards_of;
pub use source::{Raw, Shards, Source};
pub use stack::{CpuStack, Layer, Weights};

use crate::files::read_text;
use crate::kernels::{CacheForm, Pool, Weight};
use crate::plugin::TargetModel;
use crate::{Error, Result};

/// The form in which weights are held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum WeightForm {
    /// As the file stores them (f16 is widened to f32 on a CPU; on other devices dense weights are).
    #[default]
    #[serde(rename = "as-is")]
    AsIs,
    /// Single precision.
    #[serde(rename = "f32")]
    F32,
    /// Rounded to bf16; on a CPU only.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8-bit blocks of 32; matrices whose rows are not whole blocks stay as they are.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4-bit blocks of 32 with a scale and an offset; the same, on a CPU only.
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
}

impl ModelFiles {
    /// Opens a Hugging Face directory or a GGUF file. Nothing is read beyond headers.
    ///
    /// # Errors
    /// If a file is not there or not whole, or says something of the model that is neither followed here nor known to
    /// change nothing; names file, key or tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let ((config, notes), source) = if path.is_dir() {
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
            let config = ModelConfig::from_hf(&read_text(&file)?, &file)?;
            (config, Source::Safetensors(Shards::open(path)?))
        } else if path.exists() {
            let gguf = Gguf::open(path)?;
            (gguf.config()?, Source::Gguf(Box::new(gguf)))
        } else {
            return Err(Error::file(
                path,
                "no such file or directory; a model is a directory with config.json and safetensors, or a GGUF file",
            ));
        };
        source.check_names(&config)?;
        Ok(Self {
            path: path.to_path_buf(),
            config,
            source,
            notes,
        })
    }

    /// The files that make up the model, in order of name: its configuration, where that is one of its own, and its weights.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = self.source.files().to_vec();
        files.extend(self.path.is_dir().then(|| self.path.join("config.json")));
        files.sort();
        files
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
    /// If they are more than the model was made for, or than a sliding window of its layers lets a row see.
    pub fn positions(&self, config: &ModelConfig) -> Result<usize> {
        let positions = match self.context {
            0 => config.context.min(USUAL_CONTEXT),
            n if n <= config.context => n,
            n => {
                return Err(Error::Invalid(format!(
                    "context {n} is longer than the model's {}",
                    config.context
                )));
            }
        };
        match config.window {
            Some(window) if window < positions => Err(Error::Unsupported(format!(
                "sliding_window {window} in a context of {positions}: windows are not supported; a context within it is \
                 (target.context = {window} or less)"
            ))),
            _ => Ok(positions),
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
    pub model: Box<dyn TargetModel + Send>,
    /// Its shape.
    pub config: ModelConfig,
    /// Bytes of weights held.
    pub weight_bytes: usize,
    /// The forms of the weights, most bytes first.
    pub forms: Vec<&'static str>,
    /// Bytes of one position of a cache.
    pub cache_bytes: usize,
    /// Its ends and threads, where it runs on the CPU.
    shared: Option<(Ends, Arc<Pool>)>,
}

impl Loaded {
    /// Embedding, head and threads, which drafts share with a target that runs on the CPU.
    pub fn shared(&self) -> Option<&(Ends, Arc<Pool>)> {
        self.shared.as_ref()
    }
}

/// Loads a target: on a CPU with this crate's kernels, elsewhere through candle.
pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Loaded> {
    let config = files.config.clone();
    if matches!(options.device, Device::Cpu) {
        let model = CpuModel::load(files, options)?;
        Ok(Loaded {
            weight_bytes: model.weight_bytes(),
            forms: model.forms(),
            cache_bytes: config.cache_values(1) * model.cache_form().bytes(),
            shared: Some((model.ends().clone(), Arc::clone(model.pool()))),
            model: Box::new(model),
            config,
        })
    } else {
        let model = DeviceModel::load(files, options)?;
        Ok(Loaded {
            weight_bytes: model.weight_bytes(),
            forms: model.forms(),
            cache_bytes: config.cache_values(1) * CacheForm::F32.bytes(),
            shared: None,
            model: Box::new(model),
            config,
        })
    }
}
