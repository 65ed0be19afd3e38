//! HASS (arXiv:2408.15766): EAGLE-1's network, trained on its own outputs over several unrolled forwards. What
//! differs lies in training; when it drafts it is EAGLE-1, from the same files.

use std::path::Path;

use scylla_core::Result;

use super::{Body, DraftHost, Feature, eagle};

/// Loads a HASS checkpoint.
pub fn load(dir: &Path, host: &DraftHost) -> Result<Feature<impl Body + use<>>> {
    eagle(dir, host)
}
