//! Llama-2 and 3, and what has their architecture: SmolLM2, TinyLlama, Vicuna.

use super::{Family, Fields};
use crate::Result;
use crate::model::spec::{Biases, LayerSpec};

pub(super) struct Llama;

impl Family for Llama {
    fn name(&self) -> &'static str {
        "llama"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["attention_bias", "qkv_bias", "mlp_bias", "sliding_window"]
    }

    fn layers_of_hf(&self, fields: &Fields<'_>, layers: &mut [LayerSpec]) -> Result<()> {
        let attention = fields.flag("attention_bias")?.unwrap_or(false);
        // Drafts say so where only those have one.
        let qkv = fields.flag("qkv_bias")?.unwrap_or(attention);
        let mlp = fields.flag("mlp_bias")?.unwrap_or(false);
        for (layer, window) in layers.iter_mut().zip(fields.windows(false, None)?) {
            layer.biases = Biases {
                q: qkv,
                k: qkv,
                v: qkv,
                o: attention,
                mlp,
            };
            layer.window = window;
        }
        Ok(())
    }

    fn is_interleaved(&self) -> bool {
        true
    }
}
