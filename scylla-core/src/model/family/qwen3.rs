//! Qwen3: no biases, and each head of q and k is normed before it is rotated.

use super::{Family, Fields, refuse_window};
use crate::Result;
use crate::model::files::Gguf;
use crate::model::spec::{Biases, LayerSpec};

pub(super) struct Qwen3;

impl Family for Qwen3 {
    fn name(&self) -> &'static str {
        "qwen3"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["attention_bias", "sliding_window", "max_window_layers"]
    }

    fn layers_of_hf(&self, fields: &Fields<'_>, layers: &mut [LayerSpec]) -> Result<()> {
        let biased = fields.flag("attention_bias")?.unwrap_or(false);
        let windows = fields.windows(false, Some("max_window_layers"))?;
        for (layer, window) in layers.iter_mut().zip(windows) {
            layer.qk_norm = true;
            layer.window = window;
            if biased {
                layer.biases = Biases {
                    o: true,
                    ..Biases::QKV
                };
            }
        }
        Ok(())
    }

    fn layers_of_gguf(&self, gguf: &Gguf, layers: &mut [LayerSpec]) -> Result<()> {
        for layer in &mut *layers {
            layer.qk_norm = true;
        }
        refuse_window(gguf, layers)
    }
}
