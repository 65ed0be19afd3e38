//! Scylla (arXiv:2505.07858): EAGLE-2's input, D decoder layers and a final norm, the target's head.
//!
//! The paper leaves two things open, and `config.json` says them: whether layer 0 has an input norm
//! (`input_norm_first`, default no, as in EAGLE-2) and whether the state recurs before the final norm
//! (`recur_before_norm`, default no: the normed state is the feature its loss trains).

use std::path::Path;

use scylla_core::Result;
use scylla_core::model::{Layer, Weights};

use super::blocks::Reduced;
use super::{Body, Feature, Shared};
use crate::checkpoint::{Checkpoint, Family};

/// Loads a Scylla checkpoint.
pub fn load(dir: &Path, shared: &Shared) -> Result<Feature<impl Body + use<>>> {
    let from = Checkpoint::open(dir, &[Family::Scylla], &shared.target, shared.weights)?;
    let c = &from.config;
    let layers = (0..c.layers).map(|i| {
        let normed = i > 0 || from.flag("input_norm_first");
        Layer::read(&from, &format!("layers.{i}"), c, c.hidden, normed)
    });
    let layers = layers.collect::<Result<_>>()?;
    let norm = from.vector("norm.weight", c.hidden)?;
    let after = !from.flag("recur_before_norm");
    Reduced::new(&from, layers, Some((norm, after)), shared)
}
