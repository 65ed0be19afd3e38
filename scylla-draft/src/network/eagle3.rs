//! EAGLE-3 (arXiv:2503.01840): three taps of the target reduced by `fc`, one decoder layer over
//! `cat(norm(embed(x_{t+1})), norm(g))`, a vocabulary and a head of its own.

use std::path::Path;
use std::sync::Arc;

use scylla_core::Result;
use scylla_core::kernels::{Linear, Scratch, rms_norm};
use scylla_core::model::{CpuStack, Layer, Rows, Weights};
use scylla_core::plugin::Tap;

use super::blocks::{Embedding, Head};
use super::feature::capacity;
use super::{Body, Feature, Ids, Shared};
use crate::checkpoint::{Checkpoint, Family, eagle3_prefix};

struct Eagle3 {
    taps: Vec<Tap>,
    width: usize,
    hidden: usize,
    eps: f32,
    embedding: Embedding,
    /// `[H, 3 H_t]`
    fc: Linear,
    input_norm: Vec<f32>,
    hidden_norm: Vec<f32>,
    /// Whether the residual stream begins with the normed feature.
    norm_before_residual: bool,
    stack: CpuStack,
    norm: Vec<f32>,
    head: Head,
    embedded: Vec<f32>,
    normed: Vec<f32>,
    joined: Vec<f32>,
    scratch: Scratch,
}

/// Loads an EAGLE-3 checkpoint, raw or in speculators format. `taps` overrides the layers whose inputs it reads.
pub fn load(
    dir: &Path,
    taps: Option<&[usize]>,
    shared: &Shared,
) -> Result<Feature<impl Body + use<>>> {
    let families = [Family::Eagle3, Family::Speculators];
    let from = Checkpoint::open(dir, &families, &shared.target, shared.weights)?;
    let c = &from.config;
    let (h, width) = (c.hidden, 3 * shared.target.hidden);
    let prefix = eagle3_prefix(from.family);
    let own = match from.has("embed_tokens.weight") {
        true => Some(from.matrix("embed_tokens.weight", c.vocab, h)?),
        false => None,
    };
    let ids = from.draft_ids(shared.known)?;
    let head = from.matrix("lm_head.weight", ids.columns, h)?;
    let layer = Layer::read(&from, prefix, c, 2 * h, false)?;
    let positions = shared.target.context;
    let pool = Arc::clone(&shared.pool);
    let body = Eagle3 {
        taps: from.taps(taps, &shared.target)?,
        width,
        hidden: h,
        eps: c.norm_eps,
        embedding: Embedding::new(own, shared, h),
        fc: from.linear("fc", h, width, false)?,
        input_norm: from.vector(&format!("{prefix}.input_layernorm.weight"), h)?,
        hidden_norm: from.vector(&format!("{prefix}.hidden_norm.weight"), h)?,
        norm_before_residual: from.flag("norm_before_residual"),
        stack: CpuStack::new(c.clone(), vec![layer], capacity(positions), pool),
        norm: from.vector("norm.weight", h)?,
        head: Head::own(head, h, ids, shared)?,
        embedded: Vec::new(),
        normed: Vec::new(),
        joined: Vec::new(),
        scratch: Scratch::default(),
    };
    Ok(Feature::new(body, positions))
}

impl Body for Eagle3 {
    fn taps(&self) -> &[Tap] {
        &self.taps
    }

    fn feature_width(&self) -> usize {
        self.width
    }

    fn hidden(&self) -> usize {
        self.hidden
    }

    fn ids(&self) -> &Ids {
        &self.head.ids
    }

    fn stack(&mut self) -> &mut CpuStack {
        &mut self.stack
    }

    fn project(&mut self, features: &[f32], out: &mut Vec<f32>) -> Result<()> {
        out.resize(features.len() / self.width * self.hidden, 0.0);
        let pool = self.stack.pool();
        self.fc.forward(pool, features, &mut self.scratch, out)
    }

    fn run(
        &mut self,
        rows: &[Rows<'_>],
        features: &[f32],
        tokens: &[u32],
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (h, m) = (self.hidden, tokens.len());
        for buffer in [&mut self.embedded, &mut self.normed] {
            buffer.resize(m * h, 0.0);
        }
        for (&token, line) in tokens.iter().zip(self.normed.chunks_exact_mut(h)) {
            self.embedding.row(token, line)?;
        }
        rms_norm(&self.normed, &self.input_norm, self.eps, &mut self.embedded);
        rms_norm(features, &self.hidden_norm, self.eps, &mut self.normed);
        self.joined.clear();
        let pairs = self
            .embedded
            .chunks_exact(h)
            .zip(self.normed.chunks_exact(h));
        for (embedded, feature) in pairs {
            self.joined.extend_from_slice(embedded);
            self.joined.extend_from_slice(feature);
        }
        out.clear();
        out.extend_from_slice(match self.norm_before_residual {
            true => &self.normed,
            false => features,
        });
        self.stack.forward(rows, out, Some(&self.joined), |_, _| {})
    }

    fn logits(&mut self, states: &[f32], out: &mut Vec<f32>) -> Result<()> {
        self.normed.resize(states.len(), 0.0);
        rms_norm(states, &self.norm, self.eps, &mut self.normed);
        let pool = Arc::clone(self.stack.pool());
        self.head.forward(&pool, &self.normed, out)
    }
}
