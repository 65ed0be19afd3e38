//! What networks are built from.

use std::sync::Arc;

use scylla_core::kernels::{Linear, Pool, Scratch, Weight, rms_norm};
use scylla_core::model::{CpuStack, Ends, Layer, Rows, Weights};
use scylla_core::plugin::Tap;
use scylla_core::{Error, Result};

use super::feature::capacity;
use super::{Body, Feature, Ids, Shared};
use crate::checkpoint::Checkpoint;

/// Token embeddings: the target's, or the draft's own.
pub(super) enum Embedding {
    Target(Ends),
    Own(Weight),
}

impl Embedding {
    /// The draft's own `embed_tokens` where its file has one, else the target's.
    pub(super) fn read(from: &Checkpoint, shared: &Shared) -> Result<Self> {
        let (vocab, hidden) = (from.config.vocab, from.config.hidden);
        Ok(match from.has("embed_tokens.weight") {
            true => Self::Own(from.matrix("embed_tokens.weight", vocab, hidden)?),
            false => Self::Target(shared.ends.clone()),
        })
    }

    /// Writes the embedding of a token `[H]`.
    pub(super) fn row(&self, token: u32, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Target(ends) => ends.embed(token, out),
            Self::Own(table) if (token as usize) < table.n => {
                table.row(token as usize, out);
                Ok(())
            }
            Self::Own(table) => Err(Error::Invalid(format!(
                "token {token} outside the vocabulary of {}",
                table.n
            ))),
        }
    }
}

/// Logits over draft ids.
pub(super) struct Head {
    linear: Arc<Linear>,
    pub(super) ids: Ids,
    scratch: Scratch,
}

impl Head {
    /// The target's head, or its rows of the ids that the draft may propose.
    pub(super) fn of_target(shared: &Shared) -> Result<Self> {
        Ok(match &shared.head {
            None => {
                let ids = Ids::same(shared.target.vocab, shared.known);
                Self::new(Arc::clone(shared.ends.head()), ids)
            }
            Some(chosen) => {
                let ids = Ids::mapped(chosen.to_vec(), shared.target.vocab)?;
                Self::new(Arc::new(shared.ends.head_rows(chosen)?), ids)
            }
        })
    }

    /// A head of the draft's own `[V_d, H]`, cut to the ids that the draft may propose.
    pub(super) fn own(weight: Weight, ids: Ids, shared: &Shared) -> Result<Self> {
        let Some(chosen) = &shared.head else {
            return Ok(Self::new(
                Arc::new(Linear::new(weight, None).settled()),
                ids,
            ));
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
        let weight = weight.rows(&rows);
        let ids = Ids::mapped(targets, shared.target.vocab)?;
        Ok(Self::new(
            Arc::new(Linear::new(weight, None).settled()),
            ids,
        ))
    }

    fn new(linear: Arc<Linear>, ids: Ids) -> Self {
        Self {
            linear,
            ids,
            scratch: Scratch::default(),
        }
    }

    /// Bytes of weights held.
    pub(super) fn bytes(&self) -> usize {
        self.linear.bytes()
    }

    /// Logits `[M, V_d]` of `[M, H]`.
    pub(super) fn forward(&mut self, pool: &Pool, x: &[f32], out: &mut Vec<f32>) -> Result<()> {
        out.resize(x.len() / self.linear.k * self.linear.n, 0.0);
        self.linear.forward(pool, x, &mut self.scratch, out)
    }
}

/// Bytes of a stack's weights.
pub(super) fn layer_bytes(stack: &CpuStack) -> usize {
    stack.layers().iter().map(Layer::bytes).sum()
}

/// The network that EAGLE-1, EAGLE-2, HASS and Scylla share: `fc(cat(embed(x), f))`, decoder layers of which the first
/// has no input norm, the target's head. Where there is a final norm, the logits are those of the normed state.
pub(super) struct Reduced {
    hidden: usize,
    eps: f32,
    embedding: Embedding,
    /// `[H, 2 H]`
    fc: Linear,
    stack: CpuStack,
    /// Final norm, and whether the state recurs after it.
    norm: Option<(Vec<f32>, bool)>,
    head: Head,
    joined: Vec<f32>,
    normed: Vec<f32>,
    scratch: Scratch,
}

impl Reduced {
    /// A network of these layers, with the front that all of them have.
    pub(super) fn new(
        from: &Checkpoint,
        layers: Vec<Layer>,
        norm: Option<(Vec<f32>, bool)>,
        shared: &Shared,
    ) -> Result<Feature<Self>> {
        let c = &from.config;
        let h = c.hidden;
        let positions = shared.target.context;
        let pool = Arc::clone(&shared.pool);
        let body = Self {
            hidden: h,
            eps: c.norm_eps,
            embedding: Embedding::read(from, shared)?,
            fc: from.linear("fc", h, 2 * h, from.has("fc.bias"))?.settled(),
            stack: CpuStack::new(c.clone(), layers, capacity(positions), pool),
            norm,
            head: Head::of_target(shared)?,
            joined: Vec::new(),
            normed: Vec::new(),
            scratch: Scratch::default(),
        };
        Ok(Feature::new(body, positions).noting(from.notes.clone()))
    }
}

impl Body for Reduced {
    fn taps(&self) -> &[Tap] {
        &[Tap::Final]
    }

    fn feature_width(&self) -> usize {
        self.hidden
    }

    fn hidden(&self) -> usize {
        self.hidden
    }

    fn ids(&self) -> &Ids {
        &self.head.ids
    }

    fn step_bytes(&self) -> usize {
        layer_bytes(&self.stack) + self.fc.bytes() + self.head.bytes()
    }

    fn stack(&mut self) -> &mut CpuStack {
        &mut self.stack
    }

    fn project(&mut self, features: &[f32], out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(features);
        Ok(())
    }

    fn run(
        &mut self,
        rows: &[Rows<'_>],
        features: &[f32],
        tokens: &[u32],
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let h = self.hidden;
        self.joined.resize(tokens.len() * 2 * h, 0.0);
        let lines = self.joined.chunks_exact_mut(2 * h);
        for ((line, feature), &token) in lines.zip(features.chunks_exact(h)).zip(tokens) {
            let (embedded, below) = line.split_at_mut(h);
            self.embedding.row(token, embedded)?;
            below.copy_from_slice(feature);
        }
        out.resize(tokens.len() * h, 0.0);
        let pool = Arc::clone(self.stack.pool());
        self.fc
            .forward(&pool, &self.joined, &mut self.scratch, out)?;
        self.stack.forward(rows, out, None, |_, _| {})?;
        if let Some((norm, true)) = &self.norm {
            self.normed.clear();
            self.normed.extend_from_slice(out);
            rms_norm(&self.normed, norm, self.eps, out);
        }
        Ok(())
    }

    fn logits(&mut self, states: &[f32], out: &mut Vec<f32>) -> Result<()> {
        let pool = Arc::clone(self.stack.pool());
        match &self.norm {
            Some((norm, false)) => {
                self.normed.resize(states.len(), 0.0);
                rms_norm(states, norm, self.eps, &mut self.normed);
                self.head.forward(&pool, &self.normed, out)
            }
            _ => self.head.forward(&pool, states, out),
        }
    }
}
