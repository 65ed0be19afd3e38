//! EAGLE-1 and EAGLE-2 (arXiv:2401.15077, 2406.16858): one decoder layer without input norm over
//! `fc(cat(embed(x_{t+1}), f_t))`, no final norm, the target's head. The two differ in their trees alone.

use std::path::Path;

use scylla_core::Result;

use super::blocks::Reduced;
use super::{Body, DraftHost, Feature};
use crate::checkpoint::{Checkpoint, Layout};

/// Loads an EAGLE-1/2 checkpoint.
pub fn load(dir: &Path, host: &DraftHost) -> Result<Feature<impl Body + use<>>> {
    let from = Checkpoint::open(dir, &[Layout::Eagle], &host.target, host.weights)?;
    build(&from, host)
}

/// The network of an EAGLE-1/2 checkpoint.
pub fn build(from: &Checkpoint, host: &DraftHost) -> Result<Feature<impl Body + use<>>> {
    from.expect(&[Layout::Eagle])?;
    Reduced::new(from, None, host)
}
