//! EAGLE-1 and EAGLE-2 (arXiv:2401.15077, 2406.16858): one decoder layer without input norm over
//! `fc(cat(embed(x_{t+1}), f_t))`, no final norm, the target's head. The two differ in their trees alone.

use std::path::Path;

use scylla_core::Result;
use scylla_core::model::Layer;

use super::blocks::Reduced;
use super::{Body, Feature, Shared};
use crate::checkpoint::{Checkpoint, Family};

/// Loads an EAGLE-1/2 checkpoint.
pub fn load(dir: &Path, shared: &Shared) -> Result<Feature<impl Body + use<>>> {
    let from = Checkpoint::open(dir, &[Family::Eagle], &shared.target, shared.weights)?;
    let c = &from.config;
    let layer = Layer::read(&from, "layers.0", c, c.hidden, false)?;
    Reduced::new(&from, vec![layer], None, shared)
}
