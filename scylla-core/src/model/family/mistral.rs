//! Mistral: Llama with a sliding window in every layer.

use super::{Family, Fields};
use crate::Result;
use crate::model::spec::LayerSpec;

pub(super) struct Mistral;

impl Family for Mistral {
    fn name(&self) -> &'static str {
        "mistral"
    }

    fn keys(&self) -> &'static [&'static str] {
        &["sliding_window"]
    }

    fn layers_of_hf(&self, fields: &Fields<'_>, layers: &mut [LayerSpec]) -> Result<()> {
        for (layer, window) in layers.iter_mut().zip(fields.windows(true, None)?) {
            layer.window = window;
        }
        Ok(())
    }

    fn has_gguf(&self) -> bool {
        false // its files say `llama`
    }
}
