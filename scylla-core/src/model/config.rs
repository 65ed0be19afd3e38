//! What a transformer looks like. Families read it from `config.json` or from GGUF metadata.

use std::path::Path;

use super::spec::LayerSpec;
use crate::plugin::TargetShape;
use crate::{Error, Result};

/// The shape of a transformer: decoder layers between an embedding and a head.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Name of the family, as files and reports say it.
    pub architecture: String,
    /// V: rows of the embedding.
    pub vocab: usize,
    /// H.
    pub hidden: usize,
    /// Positions the model was made for.
    pub context: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Added to the mean square in the final norm.
    pub norm_eps: f32,
    /// The decoder layers, first to last.
    pub layers: Vec<LayerSpec>,
}

/// Where a target's layer lies among its tensors.
pub(super) fn layer_prefix(layer: usize) -> String {
    format!("model.layers.{layer}")
}

impl ModelConfig {
    /// Checks that the sizes fit together.
    pub fn check(&self, path: &Path) -> Result<()> {
        let bad = |message: String| Err(Error::file(path, message));
        for (name, size) in [("vocabulary size", self.vocab), ("context", self.context)] {
            if size == 0 || size > 1 << 24 {
                return bad(format!("{name} {size} is outside 1..=16777216"));
            }
        }
        check_layers(self.layers.len(), path)?;
        match self.layers.iter().find_map(LayerSpec::flaw) {
            Some(flaw) => bad(flaw),
            None => Ok(()),
        }
    }

    /// The tensors it is made of, Hugging Face style, with their shapes: those and no other.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let table = vec![self.vocab, self.hidden];
        let mut all = vec![
            (super::tokens::EMBEDDING.to_string(), table.clone()),
            ("model.norm.weight".to_string(), vec![self.hidden]),
        ];
        if !self.tied {
            all.push((super::tokens::HEAD.into(), table));
        }
        let layers = self.layers.iter().enumerate();
        all.extend(layers.flat_map(|(i, layer)| layer.tensors(&layer_prefix(i))));
        all
    }

    /// The sizes that drafts need, with the whole context.
    pub fn shape(&self) -> TargetShape {
        TargetShape {
            vocab: self.vocab,
            hidden: self.hidden,
            layers: self.layers.len(),
            context: self.context,
        }
    }

    /// Values of a cache of `positions` positions.
    pub fn cache_values(&self, positions: usize) -> usize {
        let layers = self.layers.iter().map(|l| 2 * l.kv_width());
        layers.sum::<usize>() * positions
    }
}

/// Checks a number of layers before anything is made for each of them.
pub(super) fn check_layers(layers: usize, path: &Path) -> Result<()> {
    match layers {
        // Each layer has tensors of its own names, which are looked for before any is read.
        1..=4096 => Ok(()),
        n => Err(Error::file(
            path,
            format!("number of layers {n} is outside 1..=4096"),
        )),
    }
}
