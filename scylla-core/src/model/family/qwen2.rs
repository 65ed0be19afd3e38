//! Qwen2 and 2.5: Llama with biases of q, k and v.

use super::{Family, Fields, refuse_window};
use crate::Result;
use crate::model::files::Gguf;
use crate::model::spec::{Biases, LayerSpec};

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
        let windows = fields.windows(false, Some("max_window_layers"))?;
        for (layer, window) in layers.iter_mut().zip(windows) {
            layer.biases = biases;
            layer.window = window;
        }
        Ok(())
    }

    fn layers_of_gguf(&self, gguf: &Gguf, layers: &mut [LayerSpec]) -> Result<()> {
        refuse_window(gguf, layers)
    }
}
