//! The transformer on this crate's CPU kernels.

use std::sync::Arc;

use super::slots::rows_of;
use super::stack::{CpuStack, Layer, Weights, sized};
use super::{Ends, LoadOptions, ModelConfig, ModelFiles};
use crate::Result;
use crate::kernels::{CacheForm, Pool, Scratch, Weight, rms_norm};
use crate::plugin::{Forward, Matrix, Slot, Step, Tap, TargetModel, TargetShape};

/// A Llama- or Qwen2-style transformer on the CPU.
pub struct CpuModel {
    config: ModelConfig,
    ends: Ends,
    stack: CpuStack,
    norm: Vec<f32>,
    scratch: Scratch,
    /// `[M, H]`
    x: Vec<f32>,
    normed: Vec<f32>,
    /// The rows whose logits are wanted, `[., H]`
    wanted: Vec<f32>,
    /// Memory of logits that were handed back.
    spare: Option<Vec<f32>>,
}

/// A model's weights in the form the options ask for.
pub(super) struct Held<'a> {
    pub(super) files: &'a ModelFiles,
    pub(super) options: &'a LoadOptions,
}

impl Weights for Held<'_> {
    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Weight> {
        let weight = self
            .files
            .source
            .tensor(name, &[n, k], &self.files.config)?;
        self.options.weights.apply(weight)
    }
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        self.files.source.vector(name, n, &self.files.config)
    }
}

impl CpuModel {
    /// Loads the weights in the form the options ask for.
    pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Self> {
        Self::load_on(files, options, Arc::new(Pool::new(options.thread_count())))
    }

    /// The same, on threads that it shares with other models; two pools would spin against each other.
    pub fn load_on(files: &ModelFiles, options: &LoadOptions, pool: Arc<Pool>) -> Result<Self> {
        let c = &files.config;
        let held = Held { files, options };
        // First the largest: while a weight settles there are two of it.
        let ends = Ends::read(&held, c)?;
        let layer = |i| Layer::read(&held, &format!("model.layers.{i}"), c, c.hidden, true);
        let layers = (0..c.layers).map(layer).collect::<Result<_>>()?;
        Ok(Self {
            ends,
            norm: held.vector("model.norm.weight", c.hidden)?,
            stack: CpuStack::new(c.clone(), layers, options.positions(c)?, pool),
            config: c.clone(),
            scratch: Scratch::default(),
            x: Vec::new(),
            normed: Vec::new(),
            wanted: Vec::new(),
            spare: None,
        })
    }

    /// The ends that drafts share.
    pub fn ends(&self) -> &Ends {
        &self.ends
    }

    /// The threads that work on it.
    pub fn pool(&self) -> &Arc<Pool> {
        self.stack.pool()
    }

    /// How its caches hold keys and values.
    pub fn cache_form(&self) -> CacheForm {
        self.stack.cache_form()
    }

    /// Bytes of weights held.
    pub fn weight_bytes(&self) -> usize {
        let layers = self.stack.layers().iter().map(Layer::bytes).sum::<usize>();
        layers + self.norm.len() * 4 + self.ends.bytes()
    }

    /// The forms of the weights, most bytes first.
    pub fn forms(&self) -> Vec<&'static str> {
        let mut bytes = std::collections::BTreeMap::<&str, usize>::new();
        let layers = self.stack.layers().iter().flat_map(Layer::linears);
        for weight in layers.flat_map(|l| l.weights()).chain(self.ends.weights()) {
            *bytes.entry(weight.form()).or_default() += weight.bytes();
        }
        let mut forms: Vec<_> = bytes.into_iter().collect();
        forms.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        forms.into_iter().map(|(form, _)| form).collect()
    }

    /// The last state after the final norm is in `normed`; returns the logits asked for, slot by slot.
    fn logits(&mut self, step: &Step<'_>) -> Result<Vec<Matrix>> {
        let (h, vocab) = (self.config.hidden, self.config.vocab);
        let mut first = 0;
        self.wanted.clear();
        let mut counts = Vec::with_capacity(step.slots.len());
        for slot in &step.slots {
            let rows = slot.want.of(slot.tokens.len())?;
            counts.push(rows.len());
            for row in rows {
                let from = (first + row) * h..(first + row + 1) * h;
                self.wanted.extend_from_slice(&self.normed[from]);
            }
            first += slot.tokens.len();
        }
        let mut logits = self.spare.take().unwrap_or_default();
        logits.resize(counts.iter().sum::<usize>() * vocab, 0.0);
        if !logits.is_empty() {
            self.ends.head().forward(
                self.stack.pool(),
                &self.wanted,
                &mut self.scratch,
                &mut logits,
            )?;
        }
        Ok(Matrix::parts(logits, vocab, &counts))
    }
}

/// One matrix per slot of `[M, H]`.
fn per_slot(step: &Step<'_>, values: &[f32], h: usize) -> Vec<Matrix> {
    let counts: Vec<usize> = step.slots.iter().map(|s| s.tokens.len()).collect();
    Matrix::parts(values.to_vec(), h, &counts)
}

impl TargetModel for CpuModel {
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.stack.open(slot)
    }

    fn close(&mut self, slot: Slot) {
        self.stack.close(slot);
    }

    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        let rows = rows_of(step, self.config.vocab)?;
        let m = rows.iter().map(|r| r.count).sum::<usize>();
        let (h, eps) = (self.config.hidden, self.config.norm_eps);
        let x = sized(&mut self.x, m * h);
        let tokens = step.slots.iter().flat_map(|s| s.tokens);
        for (out, &token) in x.chunks_exact_mut(h).zip(tokens) {
            self.ends.embed(token, out)?;
        }
        let mut taps: Vec<Vec<Matrix>> = vec![Vec::new(); step.taps.len()];
        let mut tap = |at: Tap, x: &[f32]| {
            for (tap, out) in step.taps.iter().zip(&mut taps) {
                if *tap == at {
                    *out = per_slot(step, x, h);
                }
            }
        };
        self.stack
            .forward(&rows, x, None, |i, x| tap(Tap::Input(i), x))?;
        let normed = sized(&mut self.normed, m * h);
        rms_norm(x, &self.norm, eps, normed);
        tap(Tap::Final, normed);
        if let Some(i) = taps.iter().position(Vec::is_empty) {
            return Err(crate::Error::Invalid(format!(
                "tap {:?} of a model with {} layers",
                step.taps[i], self.config.layers
            )));
        }
        let logits = self.logits(step)?;
        // From [tap][slot] to [slot][tap].
        let mut taps: Vec<_> = taps.into_iter().map(Vec::into_iter).collect();
        let of_slot = |_| taps.iter_mut().filter_map(Iterator::next).collect();
        Ok(Forward {
            logits,
            taps: (0..step.slots.len()).map(of_slot).collect(),
        })
    }

    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.stack.commit(slot, path)
    }

    /// Logits only: they are the large ones.
    fn recycle(&mut self, forward: Forward) {
        // All slots' share one memory: it is free with the last of them.
        self.spare = forward
            .logits
            .into_iter()
            .filter_map(Matrix::into_memory)
            .last();
    }

    fn shape(&self) -> TargetShape {
        TargetShape {
            context: self.stack.capacity(),
            ..self.config.shape()
        }
    }
}
