//! EAGLE-1 and EAGLE-2 (arXiv:2401.15077, 2406.16858): one decoder layer without input norm over
//! `fc(cat(embed(x_{t+1}), f_t))`, no final norm, the target's head. The two differ in their trees alone.

use std::path::Path;

use scylla_core::Result;
use scylla_core::kernels::Scratch;
use scylla_core::model::{CpuStack, Layer};
use scylla_core::plugin::Tap;

use super::blocks::{Head, Reduced};
use super::feature::capacity;
use super::{Body, Feature, Shared};
use crate::checkpoint::{Checkpoint, Family};

/// Loads an EAGLE-1/2 checkpoint.
pub fn load(dir: &Path, shared: &Shared) -> Result<Feature<impl Body + use<>>> {
    let from = Checkpoint::open(dir, &[Family::Eagle], &shared.target, shared.weights)?;
    let c = &from.config;
    Reduced::check_width(c, shared)?;
    let (embedding, fc) = Reduced::front(
        &from,
        from.has("embed_tokens.weight"),
        from.has("fc.bias"),
        shared,
    )?;
    let layer = Layer::read(&from, "layers.0", c, c.hidden, false)?;
    let positions = shared.target.context;
    let pool = shared.pool.clone();
    let body = Reduced {
        taps: [Tap::Final],
        hidden: c.hidden,
        eps: c.norm_eps,
        embedding,
        fc,
        stack: CpuStack::new(c.clone(), vec![layer], capacity(positions), pool),
        norm: None,
        head: Head::of_target(shared)?,
        joined: Vec::new(),
        normed: Vec::new(),
        scratch: Scratch::default(),
    };
    Ok(Feature::new(body, positions))
}
