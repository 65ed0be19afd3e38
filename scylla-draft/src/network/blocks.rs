//! What networks are built from.

use std::sync::Arc;

use scylla_core::model::{Executor, Forms, Stack, StackRows, WeightMatrix};
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::{Error, Result};

use super::feature::capacity;
use super::{Body, DraftHost, Feature, Ids};
use crate::checkpoint::{Backbone, Checkpoint, layers};

/// The token embedding: the target's, or the draft's own where its file has one.
pub(super) fn embedding(from: &Checkpoint, host: &DraftHost) -> Result<Arc<dyn WeightMatrix>> {
    let Backbone { vocab, hidden, .. } = *from.config.backbone();
    match from.has("embed_tokens.weight") {
        true => {
            let shape = [vocab, hidden];
            host.executor.weight(from, "embed_tokens", shape, false)
        }
        false => Ok(Arc::clone(&host.tokens.embedding)),
    }
}

/// A draft's decoder layers, with room for nodes.
pub(super) fn stack(from: &Checkpoint, host: &DraftHost) -> Result<Box<dyn Stack>> {
    let positions = capacity(host.target.context);
    host.executor.stack(from, &layers(&from.config), positions)
}

/// Logits over draft ids.
pub(super) struct Head {
    weight: Arc<dyn WeightMatrix>,
    pub(super) ids: Ids,
}

impl Head {
    /// The target's head, or its rows of the ids that the draft may propose.
    pub(super) fn of_target(host: &DraftHost) -> Result<Self> {
        Ok(match &host.head {
            None => Self {
                weight: Arc::clone(&host.tokens.head),
                ids: Ids::same(host.target.vocab, host.known),
            },
            Some(chosen) => Self {
                weight: host.tokens.cut_head(chosen)?,
                ids: Ids::mapped(chosen.to_vec(), host.target.vocab)?,
            },
        })
    }

    /// A head of the draft's own `[V_d, H]`, cut to the ids that the draft may propose.
    pub(super) fn own(from: &Checkpoint, ids: Ids, host: &DraftHost) -> Result<Self> {
        let shape = [ids.columns, from.config.backbone().hidden];
        let weight = host.executor.weight(from, "lm_head", shape, false)?;
        let Some(chosen) = &host.head else {
            return Ok(Self { weight, ids });
        };
        let (targets, rows): (Vec<u32>, Vec<u32>) = chosen
            .iter()
            .filter_map(|&target| Some((target, ids.draft(target)? as u32)))
            .unzip();
        if targets.is_empty() {
            return Err(Error::Invalid(format!(
                "none of the {} ids of the truncated head is in the draft's vocabulary of {}",
                chosen.len(),
                ids.columns
            )));
        }
        Ok(Self {
            weight: weight.cut(&rows)?,
            ids: Ids::mapped(targets, host.target.vocab)?,
        })
    }

    /// Logits `[M, V_d]` of `[M, H]`.
    pub(super) fn forward(&self, x: &Matrix, out: &mut Matrix) -> Result<()> {
        self.weight.multiply(x, out)
    }
}

/// Bytes of weights that one step reads: the layers' products, others given, and the head's.
pub(super) fn step_bytes(stack: &dyn Stack, others: &[&dyn WeightMatrix], head: &Head) -> usize {
    let mut forms = Forms::new();
    let norms = stack.count(&mut forms);
    others.iter().for_each(|weight| weight.count(&mut forms));
    head.weight.count(&mut forms);
    forms.values().sum::<usize>() + norms
}

/// The network that EAGLE-1, EAGLE-2, HASS and Scylla share: `fc(cat(embed(x), f))`, decoder layers of which the first
/// has no input norm, the target's head. Where there is a final norm, the logits are those of the normed state.
pub(super) struct Reduced {
    hidden: usize,
    eps: f32,
    executor: Arc<dyn Executor>,
    embedding: Arc<dyn WeightMatrix>,
    /// `[H, 2 H]`
    fc: Arc<dyn WeightMatrix>,
    stack: Box<dyn Stack>,
    /// Final norm, and whether the state recurs after it.
    norm: Option<(Matrix, bool)>,
    head: Head,
    embedded: Matrix,
    joined: Matrix,
    normed: Matrix,
}

impl Reduced {
    /// The network of a checkpoint; `recurs_normed` says of a final norm whether the state recurs after it.
    pub(super) fn new(
        from: &Checkpoint,
        recurs_normed: Option<bool>,
        host: &DraftHost,
    ) -> Result<Feature<Self>> {
        let Backbone { hidden: h, eps, .. } = *from.config.backbone();
        let executor = Arc::clone(&host.executor);
        let norm = |after| Ok::<_, Error>((executor.vector(from, "norm.weight", h)?, after));
        let body = Self {
            hidden: h,
            eps,
            embedding: embedding(from, host)?,
            fc: executor.weight(from, "fc", [h, 2 * h], from.has("fc.bias"))?,
            stack: stack(from, host)?,
            norm: recurs_normed.map(norm).transpose()?,
            head: Head::of_target(host)?,
            executor,
            embedded: Matrix::default(),
            joined: Matrix::default(),
            normed: Matrix::default(),
        };
        Ok(Feature::new(body, host.target.context).noting(from.notes.clone()))
    }
}

impl Body for Reduced {
    fn taps(&self) -> &[Tap] {
        &[Tap::Final]
    }

    fn feature_width(&self) -> usize {
        self.hidden
    }

    fn ids(&self) -> &Ids {
        &self.head.ids
    }

    fn step_bytes(&self) -> usize {
        step_bytes(&*self.stack, &[&*self.fc], &self.head)
    }

    fn stack(&mut self) -> &mut dyn Stack {
        &mut *self.stack
    }

    fn stack_bytes(&self, positions: usize) -> usize {
        self.stack.slot_bytes(positions)
    }

    fn project(&mut self, features: &mut Matrix, out: &mut Matrix) -> Result<()> {
        std::mem::swap(features, out);
        Ok(())
    }

    fn run(
        &mut self,
        rows: &[StackRows<'_>],
        features: &Matrix,
        tokens: &[u32],
        out: &mut Matrix,
    ) -> Result<()> {
        self.embedding.rows(tokens, &mut self.embedded)?;
        beside(&self.embedded, features, &mut self.joined)?;
        self.fc.multiply(&self.joined, out)?;
        self.stack.forward(rows, out, None, &mut |_, _| {})?;
        if let Some((norm, true)) = &self.norm {
            self.executor
                .rms_norm(out, norm, self.eps, &mut self.normed)?;
            std::mem::swap(out, &mut self.normed);
        }
        Ok(())
    }

    fn logits(&mut self, states: &Matrix, out: &mut Matrix) -> Result<()> {
        match &self.norm {
            Some((norm, false)) => {
                self.executor
                    .rms_norm(states, norm, self.eps, &mut self.normed)?;
                self.head.forward(&self.normed, out)
            }
            _ => self.head.forward(states, out),
        }
    }
}

/// Rows of two matrices side by side.
pub(super) fn beside(left: &Matrix, right: &Matrix, out: &mut Matrix) -> Result<()> {
    let rows: Vec<usize> = (0..left.rows()).collect();
    out.clear();
    out.append(&[left, right], &rows)
}
