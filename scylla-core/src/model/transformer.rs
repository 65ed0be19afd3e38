//! A target: embedding, decoder layers, final norm and head, on any executor.

use std::sync::Arc;

use super::config::layer_prefix;
use super::executor::{Executor, Forms, Stack};
use super::files::{ModelFiles, Weights};
use super::slots::{check_tokens, rows_of};
use super::{LoadOptions, ModelConfig, TokenLayers};
use crate::plugin::{Forward, Matrix, PackedRows, Slot, Step, Tap, TargetModel, TargetShape};
use crate::{Error, Result};

/// A language model on an executor.
pub struct Transformer {
    config: ModelConfig,
    executor: Arc<dyn Executor>,
    tokens: TokenLayers,
    stack: Box<dyn Stack>,
    norm: Matrix,
    /// `[M, H]`
    x: Matrix,
    normed: Matrix,
    /// The rows whose logits are wanted, `[., H]`
    wanted: Matrix,
    logits: Matrix,
}

impl Transformer {
    /// Loads the weights in the form the options ask for.
    pub fn load(
        files: &ModelFiles,
        options: &LoadOptions,
        executor: Arc<dyn Executor>,
    ) -> Result<Self> {
        let positions = options.positions(&files.config)?;
        let weights = files.weights(options.weights);
        Self::read(&weights, &files.config, positions, executor)
    }

    /// A model of this shape, whose slots hold `positions` rows.
    pub fn read(
        from: &dyn Weights,
        c: &ModelConfig,
        positions: usize,
        executor: Arc<dyn Executor>,
    ) -> Result<Self> {
        // First the largest: while a weight settles there are two of it.
        let tokens = TokenLayers::read(&*executor, from, c)?;
        let layers = c.layers.iter().enumerate();
        let layers: Vec<_> = layers
            .map(|(i, spec)| (layer_prefix(i), spec.clone()))
            .collect();
        Ok(Self {
            stack: executor.stack(from, &layers, positions)?,
            norm: executor.vector(from, "model.norm.weight", c.hidden)?,
            config: c.clone(),
            executor,
            tokens,
            x: Matrix::default(),
            normed: Matrix::default(),
            wanted: Matrix::default(),
            logits: Matrix::default(),
        })
    }

    /// What drafts share with it.
    pub fn tokens(&self) -> &TokenLayers {
        &self.tokens
    }

    /// Bytes of one position of a cache.
    pub fn cache_bytes(&self) -> usize {
        self.stack.cache_bytes()
    }

    /// Bytes of weights held.
    pub fn weight_bytes(&self) -> usize {
        let (forms, norms) = self.held();
        forms.values().sum::<usize>() + norms
    }

    /// The forms of the weights, most bytes first.
    pub fn forms(&self) -> Vec<&'static str> {
        let mut forms: Vec<_> = self.held().0.into_iter().collect();
        forms.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        forms.into_iter().map(|(form, _)| form).collect()
    }

    fn held(&self) -> (Forms, usize) {
        let mut forms = Forms::new();
        self.tokens.count(&mut forms);
        let norms = self.stack.count(&mut forms);
        (forms, norms + self.config.hidden * 4)
    }

    /// Runs tokens through the layers and the final norm, whose output is left in `normed`; returns the states tapped.
    fn tapped(
        &mut self,
        tokens: &[u32],
        taps: &[Tap],
        run: impl FnOnce(&mut dyn Stack, &mut Matrix, &mut dyn FnMut(usize, &Matrix)) -> Result<()>,
    ) -> Result<Vec<Matrix>> {
        self.tokens.embed(tokens, &mut self.x)?;
        let mut states: Vec<Option<Matrix>> = vec![None; taps.len()];
        // No state is kept that nobody tapped.
        let mut tap = |at: Tap, x: &Matrix| {
            for (tap, state) in taps.iter().zip(&mut states) {
                if *tap == at {
                    *state = Some(x.snapshot());
                }
            }
        };
        run(&mut *self.stack, &mut self.x, &mut |i, x| {
            tap(Tap::Input(i), x)
        })?;
        let eps = self.config.norm_eps;
        self.executor
            .rms_norm(&self.x, &self.norm, eps, &mut self.normed)?;
        tap(Tap::Final, &self.normed);
        let there = |(tap, state): (&Tap, Option<Matrix>)| {
            let layers = self.config.layers.len();
            let missing = || Error::Invalid(format!("tap {tap:?} of a model with {layers} layers"));
            state.ok_or_else(missing)
        };
        taps.iter().zip(states).map(there).collect()
    }

    /// The last state after the final norm is in `normed`; returns the logits asked for, slot by slot.
    fn logits(&mut self, step: &Step<'_>) -> Result<Vec<Matrix>> {
        let mut first = 0;
        let mut wanted = Vec::new();
        let mut counts = Vec::with_capacity(step.slots.len());
        for slot in &step.slots {
            let rows = slot.want.of(slot.tokens.len())?;
            counts.push(rows.len());
            wanted.extend(rows.into_iter().map(|row| first + row));
            first += slot.tokens.len();
        }
        let mut logits = std::mem::take(&mut self.logits);
        if wanted.is_empty() {
            logits.sized(0, self.config.vocab);
        } else {
            self.wanted.clear();
            self.wanted.append(&[&self.normed], &wanted)?;
            self.tokens.head.multiply(&self.wanted, &mut logits)?;
        }
        logits.split(&counts)
    }
}

/// Packed rows that run together.
const TOGETHER: usize = 4096;

impl TargetModel for Transformer {
    fn open(&mut self, slot: Slot) -> Result<()> {
        self.stack.open(slot)
    }

    fn close(&mut self, slot: Slot) {
        self.stack.close(slot);
    }

    fn forward(&mut self, step: &Step<'_>) -> Result<Forward> {
        let rows = rows_of(step, self.config.vocab)?;
        let tokens: Vec<u32> = step.slots.iter().flat_map(|s| s.tokens).copied().collect();
        let states = self.tapped(&tokens, step.taps, |stack, x, on_layer| {
            stack.forward(&rows, x, None, on_layer)
        })?;
        let counts: Vec<usize> = step.slots.iter().map(|s| s.tokens.len()).collect();
        let mut taps = vec![Vec::with_capacity(states.len()); counts.len()];
        for state in states {
            for (taps, part) in taps.iter_mut().zip(state.split(&counts)?) {
                taps.push(part);
            }
        }
        let logits = self.logits(step)?;
        Ok(Forward { logits, taps })
    }

    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()> {
        self.stack.commit(slot, path)
    }

    /// Logits only: they are the large ones.
    fn recycle(&mut self, forward: Forward) {
        // All slots' share one memory: it is free with the last of them.
        let mut logits = forward.logits;
        if let Some(last) = logits.pop().filter(|last| !last.is_on_device()) {
            drop(logits);
            self.logits = last;
        }
    }

    fn fork(&mut self, from: Slot, to: Slot, count: usize) -> Result<bool> {
        self.stack.fork(from, to, count).map(|()| true)
    }

    fn slot_bytes(&self, positions: usize) -> usize {
        self.stack.slot_bytes(positions)
    }

    fn trim(&mut self) {
        self.stack.trim();
    }

    fn states(&mut self, tokens: &[u32], rows: &PackedRows, taps: &[Tap]) -> Result<Vec<Matrix>> {
        rows.check(tokens.len())?;
        check_tokens(tokens, self.config.vocab)?;
        let mut pieces = vec![Vec::new(); taps.len()];
        for (start, piece) in rows.pieces(TOGETHER) {
            let tokens = &tokens[start..start + piece.count()];
            let found = self.tapped(tokens, taps, |stack, x, on_layer| {
                stack.packed(&piece, x, on_layer)
            })?;
            pieces.iter_mut().zip(found).for_each(|(p, f)| p.push(f));
        }
        pieces.into_iter().map(Matrix::joined).collect()
    }

    fn shape(&self) -> TargetShape {
        TargetShape {
            context: self.stack.capacity(),
            ..self.config.shape()
        }
    }
}
