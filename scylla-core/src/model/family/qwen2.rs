//! Qwen2 and 2.5: Llama with biases of q, k and v.

use super::{Family, Fields};
use crate::model::files::Gguf;
use crate::model::spec::{Biases, LayerSpec};
use crate::{Error, Result};

pub(super) struct Qwen2;

impl Family for Qwen2 {
    fn name(&self) -> &'static str {
        "qwen2"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["qkv_bias", "sliding_window", "max_window_layers"]
    }

    fn layers_of_hf(&self, fields: &Fields<'_>, layers: &mut [LayerSpec]) -> Result<()> {
        let biases = match fields.flag("qkv_bias")?.unwrap_or(true) {
            true => Biases::QKV,
            false => Biases::default(),
        };
        let first = fields.size("max_window_layers")?.unwrap_or(28);
        for (layer, window) in layers.iter_mut().zip(fields.windows(false, first)?) {
            layer.biases = biases;
            layer.window = window;
        }
        Ok(())
    }

    fn layers_of_gguf(&self, gguf: &Gguf, layers: &mut [LayerSpec]) -> Result<()> {
        match layers.iter().find_map(|layer| layer.window) {
            Some(window) => Err(Error::Unsupported(format!(
                "{}: metadata `qwen2.attention.sliding_window` is {window}; which layers have it, a GGUF file does not say",
                gguf.path.display()
            ))),
            None => Ok(()),
        }
    }
}
