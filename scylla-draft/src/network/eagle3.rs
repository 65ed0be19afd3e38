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

use scylla_core::model::{Executor, Stack, StackRows, WeightMatrix};
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::{Error, Result};

use super::blocks::{Head, beside, embedding, stack, step_bytes};
use super::{Body, DraftHost, Feature, Ids};
use crate::checkpoint::{Checkpoint, DraftConfig, Eagle3Config, Layout, layer_prefix};

struct Eagle3 {
    config: Eagle3Config,
    executor: Arc<dyn Executor>,
    taps: Vec<Tap>,
    embedding: Arc<dyn WeightMatrix>,
    /// Norms of the features before `fc`: as one, then of all taps, one after the other.
    whole_norm: Option<Matrix>,
    tap_norms: Vec<Matrix>,
    /// `[H, taps H_t]`
    fc: Arc<dyn WeightMatrix>,
    input_norm: Matrix,
    hidden_norm: Matrix,
    stack: Box<dyn Stack>,
    norm: Matrix,
    head: Head,
    embedded: Matrix,
    normed_embedding: Matrix,
    normed: Matrix,
    joined: Matrix,
}

const LAYOUTS: [Layout; 2] = [Layout::Eagle3, Layout::Speculators];

/// Loads an EAGLE-3 checkpoint, raw or in speculators format. `taps` overrides the layers whose inputs it reads.
pub fn load(
    dir: &Path,
    taps: Option<&[usize]>,
    host: &DraftHost,
) -> Result<Feature<impl Body + use<>>> {
    let from = Checkpoint::open(dir, &LAYOUTS, &host.target, host.weights)?;
    build(&from, taps, host)
}

/// The network of an EAGLE-3 checkpoint.
pub fn build(
    from: &Checkpoint,
    taps: Option<&[usize]>,
    host: &DraftHost,
) -> Result<Feature<impl Body + use<>>> {
    from.expect(&LAYOUTS)?;
    let DraftConfig::Eagle3(c) = from.config.clone() else {
        return Err(Error::Invalid("another network than EAGLE-3".into()));
    };
    let executor = Arc::clone(&host.executor);
    let (h, tapped) = (c.backbone.hidden, c.target_hidden);
    let width = c.tap_count * tapped;
    let vector = |name: &str, n| executor.vector(from, &format!("{name}.weight"), n);
    let tap_norm = |i| vector(&format!("fc_norm.{i}"), tapped);
    let tap_norms = match c.fc_norm {
        true => (0..c.tap_count).map(tap_norm).collect::<Result<_>>()?,
        false => Vec::new(),
    };
    let whole_norm = match c.norm_before_fc {
        true => Some(vector("input_norm", width)?),
        false => None,
    };
    let prefix = layer_prefix(from.config.layout(), 0);
    let ids = from.draft_ids(host.known)?;
    let head = match from.has("lm_head.weight") {
        true => Head::own(from, ids, host)?,
        false if (0..ids.columns).any(|i| ids.target(i) as usize != i) => {
            return Err(Error::file(
                &from.dir,
                "no lm_head.weight, and d2t puts the vocabulary into another order than the target's head has",
            ));
        }
        false => Head::of_target(host)?,
    };
    let body = Eagle3 {
        taps: c.taps(taps, &host.target)?,
        embedding: embedding(from, host)?,
        whole_norm,
        tap_norms,
        fc: executor.weight(from, "fc", [h, width], false)?,
        input_norm: vector(&format!("{prefix}.input_layernorm"), h)?,
        hidden_norm: vector(&format!("{prefix}.hidden_norm"), h)?,
        stack: stack(from, host)?,
        norm: vector("norm", h)?,
        head,
        executor: Arc::clone(&executor),
        config: c,
        embedded: Matrix::default(),
        normed_embedding: Matrix::default(),
        normed: Matrix::default(),
        joined: Matrix::default(),
    };
    Ok(Feature::new(body, host.target.context).noting(from.notes.clone()))
}

impl Eagle3 {
    /// Norms each tap by its own weight; all taps of a row lie side by side.
    fn norm_taps(&mut self, features: &mut Matrix) -> Result<()> {
        let eps = self.config.backbone.eps;
        let rows: Vec<usize> = (0..features.rows()).collect();
        let taps = features.columns_split(self.tap_norms.len())?;
        let mut normed = Vec::with_capacity(taps.len());
        for (tap, norm) in taps.iter().zip(&self.tap_norms) {
            let mut out = Matrix::default();
            self.executor.rms_norm(tap, norm, eps, &mut out)?;
            normed.push(out);
        }
        features.clear();
        features.append(&normed.iter().collect::<Vec<_>>(), &rows)
    }
}

impl Body for Eagle3 {
    fn taps(&self) -> &[Tap] {
        &self.taps
    }

    fn feature_width(&self) -> usize {
        self.config.tap_count * self.config.target_hidden
    }

    fn ids(&self) -> &Ids {
        &self.head.ids
    }

    fn step_bytes(&self) -> usize {
        step_bytes(&*self.stack, &[], &self.head)
    }

    fn stack(&mut self) -> &mut dyn Stack {
        &mut *self.stack
    }

    fn stack_bytes(&self, positions: usize) -> usize {
        self.stack.slot_bytes(positions)
    }

    fn project(&mut self, features: &mut Matrix, out: &mut Matrix) -> Result<()> {
        if let Some(norm) = &self.whole_norm {
            let eps = self.config.backbone.eps;
            self.executor
                .rms_norm(features, norm, eps, &mut self.normed)?;
            std::mem::swap(features, &mut self.normed);
        }
        if !self.tap_norms.is_empty() {
            self.norm_taps(features)?;
        }
        self.fc.multiply(features, out)
    }

    fn run(
        &mut self,
        rows: &[StackRows<'_>],
        features: &Matrix,
        tokens: &[u32],
        out: &mut Matrix,
    ) -> Result<()> {
        let eps = self.config.backbone.eps;
        let on = &self.executor;
        self.embedding.rows(tokens, &mut self.embedded)?;
        on.rms_norm(
            &self.embedded,
            &self.input_norm,
            eps,
            &mut self.normed_embedding,
        )?;
        on.rms_norm(features, &self.hidden_norm, eps, &mut self.normed)?;
        beside(&self.normed_embedding, &self.normed, &mut self.joined)?;
        // The residual stream.
        let begins = match self.config.norm_before_residual {
            true => &self.normed,
            false => features,
        };
        out.copy_of(begins);
        self.stack
            .forward(rows, out, Some(&self.joined), &mut |_, _| {})?;
        if self.config.norm_output {
            self.executor
                .rms_norm(out, &self.norm, eps, &mut self.normed)?;
            std::mem::swap(out, &mut self.normed);
        }
        Ok(())
    }

    fn logits(&mut self, states: &Matrix, out: &mut Matrix) -> Result<()> {
        if self.config.norm_output {
            return self.head.forward(states, out);
        }
        let eps = self.config.backbone.eps;
        self.executor
            .rms_norm(states, &self.norm, eps, &mut self.normed)?;
        self.head.forward(&self.normed, out)
    }
}
