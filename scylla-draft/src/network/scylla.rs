//! Scylla (arXiv:2505.07858): EAGLE-2's input, D decoder layers and a final norm, the target's head.
//!
//! The paper leaves two things open, and `config.json` says them: whether layer 0 has an input norm
//! (`input_norm_first`, default no, as in EAGLE-2) and whether the state recurs before the final norm
//! (`recur_before_norm`, default no: the normed state is the feature its loss trains).

use std::path::Path;

use scylla_core::Result;

use super::blocks::Reduced;
use super::{Body, DraftHost, Feature};
use crate::checkpoint::{Checkpoint, DraftConfig, Layout};

/// Loads a Scylla checkpoint.
pub fn load(dir: &Path, host: &DraftHost) -> Result<Feature<impl Body + use<>>> {
    let from = Checkpoint::open(dir, &[Layout::Scylla], &host.target, host.weights)?;
    build(&from, host)
}

/// The network of a Scylla checkpoint.
pub fn build(from: &Checkpoint, host: &DraftHost) -> Result<Feature<impl Body + use<>>> {
    from.expect(&[Layout::Scylla])?;
    let before = matches!(&from.config, DraftConfig::Scylla(c) if c.recur_before_norm);
    Reduced::new(from, Some(!before), host)
}
