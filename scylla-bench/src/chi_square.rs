//! The law of what a rule commits on a real model: a chi-square test of the first two tokens against the target's.
//!
//! The prefix is fixed, so the target's logits after each continuation are computed once and kept: on the CPU kernels
//! a row does not depend on the rows beside it, and every cycle would compute the same ones again.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use scylla_core::chance::Seeded;
use scylla_core::draw;
use scylla_core::plugin::{
    Chance, Matrix, SlotRows, Step, TargetModel, TargetRows, Verifier, Want,
};
use scylla_core::sampling::{Sampling, argmax};
use scylla_core::tree::{Drawing, Tree};
use serde::Serialize;

use crate::cases::Proposals;
use crate::stats::{chi_square_tail, pearson};
use crate::{Error, Result};

/// What the test found.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// The rule.
    pub rule: String,
    /// Cycles run.
    pub cycles: usize,
    /// Mean tokens committed per cycle, bonus included.
    pub tau: f64,
    /// The statistic.
    pub chi_square: f64,
    /// Cells less one: pairs of tokens expected at least five times, and one for all others.
    pub degrees: usize,
    /// Probability of a statistic at least this large under the target's law.
    pub p_value: f64,
}

/// Logits after one prefix, which fills a slot of the model, and any continuation; each computed once.
struct Continuations {
    slot: usize,
    known: usize,
    found: HashMap<Vec<u32>, Arc<[f32]>>,
}

impl Continuations {
    fn new(
        model: &mut dyn TargetModel,
        slot: usize,
        prefix: &[u32],
        known: usize,
    ) -> scylla_core::Result<Self> {
        model.open(slot)?;
        // The last token of the prefix is forwarded with each continuation, so that its logits are there too.
        let before = &prefix[..prefix.len().saturating_sub(1)];
        if !before.is_empty() {
            forward(model, slot, before, &[], Want::None)?;
            model.commit(slot, &(0..before.len()).collect::<Vec<_>>())?;
        }
        Ok(Self {
            slot,
            known,
            found: HashMap::new(),
        })
    }

    /// Logits after every node of a tree rooted at the last token of the prefix, in one forward as decoding does it.
    fn after(
        &mut self,
        model: &mut dyn TargetModel,
        tree: &Tree,
    ) -> scylla_core::Result<Vec<Arc<[f32]>>> {
        let paths: Vec<Vec<u32>> = (0..tree.len()).map(|n| tree.tokens_to(n)).collect();
        if paths.iter().any(|path| !self.found.contains_key(path)) {
            let above = |n: usize| (n > 0).then(|| tree.parents[n]);
            let parents: Vec<Option<usize>> = (0..tree.len()).map(above).collect();
            let logits = forward(model, self.slot, &tree.tokens, &parents, Want::All)?;
            for (n, path) in paths.iter().enumerate() {
                if !self.found.contains_key(path) {
                    self.found.insert(path.clone(), logits.row(n)?.into());
                }
            }
        }
        Ok(paths
            .iter()
            .map(|path| Arc::clone(&self.found[path]))
            .collect())
    }

    /// The transformed distribution after `tokens`, which begin with the last token of the prefix.
    fn distribution(
        &mut self,
        model: &mut dyn TargetModel,
        tokens: &[u32],
        sampling: &Sampling,
    ) -> scylla_core::Result<Vec<f64>> {
        let row = match self.found.get(tokens) {
            Some(row) => Arc::clone(row),
            None => {
                let logits = forward(model, self.slot, tokens, &[], Want::Last)?;
                let row: Arc<[f32]> = logits.row(0)?.into();
                self.found.insert(tokens.to_vec(), Arc::clone(&row));
                row
            }
        };
        let mut out = Vec::new();
        sampling.distribution(&row, self.known, &mut out)?;
        Ok(out)
    }
}

fn forward(
    model: &mut dyn TargetModel,
    slot: usize,
    tokens: &[u32],
    parents: &[Option<usize>],
    want: Want<'_>,
) -> scylla_core::Result<Matrix> {
    let rows = SlotRows {
        slot,
        tokens,
        parents,
        want,
    };
    let found = model.forward(&Step {
        slots: vec![rows],
        taps: &[],
    })?;
    model.commit(slot, &[])?;
    let logits = found.logits.into_iter().next();
    logits.ok_or_else(|| scylla_core::Error::Invalid("the target returned no logits".into()))
}

/// The rows of one tree.
struct Rows<'a> {
    logits: Vec<Arc<[f32]>>,
    sampling: &'a Sampling,
    known: usize,
}

impl TargetRows for Rows<'_> {
    fn argmax(&self, nodes: &[usize]) -> scylla_core::Result<Vec<u32>> {
        let best = |&n: &usize| argmax(&self.logits[n][..self.known]);
        nodes.iter().map(best).collect()
    }
    fn row(&self, node: usize, out: &mut Vec<f64>) -> scylla_core::Result<()> {
        self.sampling
            .distribution(&self.logits[node], self.known, out)
    }
}

/// A test on one prefix: the target with the whole prefix, and as draft the same model with only its end.
pub struct Setup<'a> {
    model: &'a mut dyn TargetModel,
    target: Continuations,
    draft: Continuations,
    root: u32,
    sampling: &'a Sampling,
    /// q after each continuation, transformed once.
    q: HashMap<Vec<u32>, Arc<[f64]>>,
}

/// Slots of the whole prefix and of its end.
const SLOTS: [usize; 2] = [0, 1];

impl<'a> Setup<'a> {
    /// Fills two slots of a model, which are closed again at the end; ids from `known` on are padding.
    pub fn new(
        model: &'a mut dyn TargetModel,
        prefix: &[u32],
        known: usize,
        sampling: &'a Sampling,
    ) -> Result<Self> {
        let root = *prefix
            .last()
            .ok_or_else(|| Error::Experiment("the prefix is empty".into()))?;
        let end = &prefix[prefix.len() / 2..];
        Ok(Self {
            target: Continuations::new(model, SLOTS[0], prefix, known)?,
            draft: Continuations::new(model, SLOTS[1], end, known)?,
            model,
            root,
            sampling,
            q: HashMap::new(),
        })
    }

    fn tree(&mut self, proposals: Proposals, chance: &mut dyn Chance) -> Result<Tree> {
        let (drawing, widths): (_, &[usize]) = match proposals {
            Proposals::Chain => (Drawing::Independent, &[1, 1]),
            Proposals::Fixed => (Drawing::Deterministic, &[3, 2]),
            Proposals::WithoutReplacement => (Drawing::WithoutReplacement, &[3, 2]),
            Proposals::Independent => (Drawing::Independent, &[3, 2]),
        };
        let mut tree = Tree::root(self.root);
        tree.drawing = drawing;
        let mut q = |tokens: &[u32]| {
            if let Some(q) = self.q.get(tokens) {
                return Ok(Arc::clone(q));
            }
            let found = self.draft.distribution(self.model, tokens, self.sampling)?;
            let q: Arc<[f64]> = found.into();
            self.q.insert(tokens.to_vec(), Arc::clone(&q));
            Ok(q)
        };
        draw::grow(&mut tree, widths, usize::MAX, &mut q, chance)?;
        Ok(tree)
    }

    /// Runs `cycles` cycles and compares the first two tokens with the target's law; a cycle that commits one token
    /// is continued by plain sampling. `on_cycle` is told the cycles done, and may break off.
    pub fn test(
        &mut self,
        rule: &dyn Verifier,
        proposals: Proposals,
        cycles: usize,
        seed: u64,
        on_cycle: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Found> {
        let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
        let mut committed = 0;
        let mut chance = Seeded::new(seed, 0);
        for cycle in 0..cycles {
            if on_cycle(cycle).is_break() {
                return Err(Error::Interrupted(format!(
                    " after {cycle} of {cycles} cycles"
                )));
            }
            chance.at(cycle);
            let tree = self.tree(proposals, &mut chance)?;
            let rows = Rows {
                logits: self.target.after(self.model, &tree)?,
                sampling: self.sampling,
                known: self.target.known,
            };
            let verdict = rule.verify(&tree, &rows, &mut chance)?;
            verdict.check(&tree, self.target.known)?;
            let mut tokens: Vec<u32> = verdict.path.iter().map(|&n| tree.tokens[n]).collect();
            tokens.push(verdict.bonus);
            committed += tokens.len();
            if tokens.len() == 1 {
                let p = self.p(&[self.root, tokens[0]])?;
                tokens.push(chance.pick(&p)? as u32);
            }
            *counts.entry((tokens[0], tokens[1])).or_default() += 1;
        }
        let (chi_square, degrees) = self.statistic(&counts, cycles)?;
        Ok(Found {
            rule: rule.name().into(),
            cycles,
            tau: committed as f64 / cycles as f64,
            chi_square,
            degrees,
            p_value: chi_square_tail(chi_square, degrees),
        })
    }

    fn p(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        let (model, sampling) = (&mut *self.model, self.sampling);
        Ok(self.target.distribution(model, tokens, sampling)?)
    }

    /// Pearson's statistic over pairs of tokens.
    fn statistic(
        &mut self,
        counts: &HashMap<(u32, u32), u64>,
        cycles: usize,
    ) -> Result<(f64, usize)> {
        let n = cycles as f64;
        // Expected and seen.
        let mut cells: Vec<(f64, f64)> = Vec::new();
        let first = self.p(&[self.root])?;
        // A first token expected fewer than five times has no pair that is expected more often.
        for (x, &p_x) in first.iter().enumerate().filter(|(_, p)| **p * n >= 5.0) {
            let second = self.p(&[self.root, x as u32])?;
            cells.extend(second.iter().enumerate().map(|(y, p_y)| {
                let seen = counts.get(&(x as u32, y as u32)).copied().unwrap_or(0);
                (n * p_x * p_y, seen as f64)
            }));
        }
        pearson(cells.into_iter(), n).ok_or_else(|| {
            Error::Experiment(
                "after this prefix the target leaves a single pair of tokens; take another prefix"
                    .into(),
            )
        })
    }
}

impl Drop for Setup<'_> {
    fn drop(&mut self) {
        for slot in SLOTS {
            self.model.close(slot);
        }
    }
}
