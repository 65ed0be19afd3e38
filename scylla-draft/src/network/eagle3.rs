//! EAGLE-3 (arXiv:2503.01840): three taps of the target reduced by `fc`, one decoder layer over
//! `cat(norm(embed(x_{t+1})), norm(g))`, a vocabulary and a head of its own.
//!
//! Of several layers, those behind the first are plain: input norm, H wide.
//!
//! Options of the configuration, all off by default: `norm_before_residual` begins the residual stream with the normed
//! feature; EAGLE-3.1's `fc_norm` norms each tap and `norm_before_fc` all of them together before `fc`, and
//! `norm_output` lets the state recur after the final norm.

use std::path::Path;
use std::sync::Arc;

use scylla_core::kernels::{Linear, Scratch, rms_norm};
use scylla_core::model::{CpuStack, Layer, Rows, Weights};
use scylla_core::plugin::Tap;
use scylla_core::{Error, Result};

use super::blocks::{Embedding, Head, layer_bytes};
use super::feature::capacity;
use super::{Body, Feature, Ids, Shared};
use crate::checkpoint::{Checkpoint, Family, eagle3_prefix};

struct Eagle3 {
    taps: Vec<Tap>,
    width: usize,
    hidden: usize,
    eps: f32,
    embedding: Embedding,
    /// Norms of the features before `fc`: as one, then tap by tap.
    whole_norm: Option<Vec<f32>>,
    tap_norms: Vec<Vec<f32>>,
    /// `[H, taps H_t]`
    fc: Linear,
    input_norm: Vec<f32>,
    hidden_norm: Vec<f32>,
    /// Whether the residual stream begins with the normed feature.
    norm_before_residual: bool,
    /// Whether the state recurs after the final norm.
    norm_output: bool,
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
    let (h, tapped) = (c.hidden, shared.target.hidden);
    let width = from.tap_count() * tapped;
    let tap_norm = |i| from.vector(&format!("fc_norm.{i}.weight"), tapped);
    let tap_norms = match from.flag("fc_norm") {
        true => (0..from.tap_count()).map(tap_norm).collect::<Result<_>>()?,
        false => Vec::new(),
    };
    let whole_norm = match from.norm_before_fc() {
        true => Some(from.vector("input_norm.weight", width)?),
        false => None,
    };
    let prefix = eagle3_prefix(from.family, 0);
    let ids = from.draft_ids(shared.known)?;
    let head = match from.has("lm_head.weight") {
        true => Head::own(from.matrix("lm_head.weight", ids.columns, h)?, ids, shared)?,
        false if (0..ids.columns).any(|i| ids.target(i) as usize != i) => {
            return Err(Error::file(
                dir,
                "no lm_head.weight, and d2t puts the vocabulary into another order than the target's head has",
            ));
        }
        false => Head::of_target(shared)?,
    };
    let layers = (0..c.layers).map(|i| match i {
        0 => Layer::read(&from, &prefix, c, 2 * h, false),
        // Those behind the first are plain decoder layers, as vLLM and speculators run them.
        _ => Layer::read(&from, &eagle3_prefix(from.family, i), c, h, true),
    });
    let layers = layers.collect::<Result<_>>()?;
    let positions = shared.target.context;
    let pool = Arc::clone(&shared.pool);
    let body = Eagle3 {
        taps: from.taps(taps, &shared.target)?,
        width,
        hidden: h,
        eps: c.norm_eps,
        embedding: Embedding::read(&from, shared)?,
        whole_norm,
        tap_norms,
        fc: from.linear("fc", h, width, false)?.settled(),
        input_norm: from.vector(&format!("{prefix}.input_layernorm.weight"), h)?,
        hidden_norm: from.vector(&format!("{prefix}.hidden_norm.weight"), h)?,
        norm_before_residual: from.flag("norm_before_residual"),
        norm_output: from.flag("norm_output"),
        stack: CpuStack::new(c.clone(), layers, capacity(positions), pool),
        norm: from.vector("norm.weight", h)?,
        head,
        embedded: Vec::new(),
        normed: Vec::new(),
        joined: Vec::new(),
        scratch: Scratch::default(),
    };
    Ok(Feature::new(body, positions).noting(from.notes))
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

    fn step_bytes(&self) -> usize {
        layer_bytes(&self.stack) + self.head.bytes()
    }

    fn stack(&mut self) -> &mut CpuStack {
        &mut self.stack
    }

    fn project(&mut self, features: &[f32], out: &mut Vec<f32>) -> Result<()> {
        out.resize(features.len() / self.width * self.hidden, 0.0);
        let mut features = std::borrow::Cow::Borrowed(features);
        if let Some(norm) = &self.whole_norm {
            self.normed.resize(features.len(), 0.0);
            rms_norm(&features, norm, self.eps, &mut self.normed);
            features.to_mut().copy_from_slice(&self.normed);
        }
        if !self.tap_norms.is_empty() {
            let each = self.width / self.tap_norms.len();
            self.normed.resize(each, 0.0);
            let norms = self.tap_norms.iter().cycle();
            for (tap, norm) in features.to_mut().chunks_exact_mut(each).zip(norms) {
                rms_norm(tap, norm, self.eps, &mut self.normed);
                tap.copy_from_slice(&self.normed);
            }
        }
        let pool = self.stack.pool();
        self.fc.forward(pool, &features, &mut self.scratch, out)
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
        self.stack
            .forward(rows, out, Some(&self.joined), |_, _| {})?;
        if self.norm_output {
            self.normed.copy_from_slice(out);
            rms_norm(&self.normed, &self.norm, self.eps, out);
        }
        Ok(())
    }

    fn logits(&mut self, states: &[f32], out: &mut Vec<f32>) -> Result<()> {
        let pool = Arc::clone(self.stack.pool());
        if self.norm_output {
            return self.head.forward(&pool, states, out);
        }
        self.normed.resize(states.len(), 0.0);
        rms_norm(states, &self.norm, self.eps, &mut self.normed);
        self.head.forward(&pool, &self.normed, out)
    }
}
