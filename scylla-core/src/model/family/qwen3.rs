//! Qwen3: no biases, and each head of q and k is normed before it is rotated.

use super::{Family, Fields};
use crate::Result;
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
        let first = fields.size("max_window_layers")?.unwrap_or(28);
        for (layer, window) in layers.iter_mut().zip(fields.windows(false, first)?) {
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
}
