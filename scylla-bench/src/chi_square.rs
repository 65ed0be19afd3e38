//! The law of what a rule commits on a real model: a chi-square test of the first two tokens against the target's.
//!
//! The prefix is fixed, so the target's logits after each continuation are computed once and kept: on the CPU kernels
//! a row does not depend on the rows beside it, and every cycle would compute the same ones again.

use std::collections::HashMap;
use std::sync::Arc;

use scylla_core::chance::Seeded;
use scylla_core::draw;
use scylla_core::plugin::{Chance, SlotRows, Step, TargetModel, TargetRows, Verifier, Want};
use scylla_core::sampling::{Sampling, argmax};
use scylla_core::tree::{Drawing, Tree};
use serde::Serialize;

use crate::prove::Proposals;
use crate::stats::chi_square_tail;
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

/// Logits of a model after one prefix and any continuation, each computed once.
struct Continuations<'a> {
    model: &'a mut dyn TargetModel,
    slot: usize,
    known: usize,
    found: HashMap<Vec<u32>, Arc<[f32]>>,
}

impl<'a> Continuations<'a> {
    fn new(model: &'a mut dyn TargetModel, prefix: &[u32], known: usize) -> Result<Self> {
        let slot = 0;
        model.open(slot)?;
        // The last token of the prefix is forwarded with each continuation, so that its logits are there too.
        let Some((_, before)) = prefix.split_last() else {
            return Err(Error::Experiment("the prefix is empty".into()));
        };
        if !before.is_empty() {
            forward(model, slot, before, Want::None)?;
            model.commit(slot, &(0..before.len()).collect::<Vec<_>>())?;
        }
        Ok(Self {
            model,
            slot,
            known,
            found: HashMap::new(),
        })
    }

    /// Logits after `tokens`, which begin with the last token of the prefix.
    fn after(&mut self, tokens: &[u32]) -> Result<Arc<[f32]>> {
        if let Some(row) = self.found.get(tokens) {
            return Ok(Arc::clone(row));
        }
        let row: Arc<[f32]> = forward(self.model, self.slot, tokens, Want::Last)?.into();
        self.found.insert(tokens.to_vec(), Arc::clone(&row));
        Ok(row)
    }

    fn distribution(&mut self, tokens: &[u32], sampling: &Sampling) -> Result<Vec<f64>> {
        let mut out = Vec::new();
        let known = self.known;
        sampling.distribution(&self.after(tokens)?, known, &mut out)?;
        Ok(out)
    }
}

impl Drop for Continuations<'_> {
    fn drop(&mut self) {
        self.model.close(self.slot);
    }
}

fn forward(
    model: &mut dyn TargetModel,
    slot: usize,
    tokens: &[u32],
    want: Want<'_>,
) -> Result<Vec<f32>> {
    let rows = SlotRows {
        slot,
        tokens,
        parents: &[],
        want,
    };
    let found = model.forward(&Step {
        slots: vec![rows],
        taps: &[],
    })?;
    match found.logits.first() {
        Some(logits) => Ok(logits.all()?.into_owned()),
        None => Err(Error::Experiment("the target returned no logits".into())),
    }
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
    target: Continuations<'a>,
    draft: Continuations<'a>,
    root: u32,
    sampling: &'a Sampling,
    /// q after each continuation, transformed once.
    q: HashMap<Vec<u32>, Arc<[f64]>>,
}

impl<'a> Setup<'a> {
    /// Prepares two copies of a model; ids from `known` on are padding.
    pub fn new(
        target: &'a mut dyn TargetModel,
        draft: &'a mut dyn TargetModel,
        prefix: &[u32],
        known: usize,
        sampling: &'a Sampling,
    ) -> Result<Self> {
        let root = *prefix
            .last()
            .ok_or_else(|| Error::Experiment("the prefix is empty".into()))?;
        let end = &prefix[prefix.len() - prefix.len().div_ceil(2)..];
        Ok(Self {
            target: Continuations::new(target, prefix, known)?,
            draft: Continuations::new(draft, end, known)?,
            root,
            sampling,
            q: HashMap::new(),
        })
    }

    fn q(&mut self, tokens: &[u32]) -> Result<Arc<[f64]>> {
        if let Some(q) = self.q.get(tokens) {
            return Ok(Arc::clone(q));
        }
        let q: Arc<[f64]> = self.draft.distribution(tokens, self.sampling)?.into();
        self.q.insert(tokens.to_vec(), Arc::clone(&q));
        Ok(q)
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
        let mut frontier = vec![0];
        for &width in widths {
            let mut next = Vec::new();
            for node in frontier {
                let q = self.q(&path(&tree, node))?;
                let drawn = draw::children(drawing, &q, width, chance)?;
                next.extend(drawn.into_iter().map(|x| tree.push(node, x as u32)));
                if drawing != Drawing::Deterministic {
                    tree.q.resize(tree.len(), None);
                    tree.q[node] = Some(q);
                }
            }
            frontier = next;
        }
        Ok(tree)
    }

    /// Runs `cycles` cycles and compares the first two tokens with the target's law; a cycle that commits one token
    /// is continued by plain sampling.
    pub fn test(
        &mut self,
        rule: &dyn Verifier,
        proposals: Proposals,
        cycles: usize,
        seed: u64,
    ) -> Result<Found> {
        let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
        let mut committed = 0;
        let mut chance = Seeded::new(seed, 0);
        for cycle in 0..cycles {
            chance.at(cycle);
            let tree = self.tree(proposals, &mut chance)?;
            let logits = (0..tree.len()).map(|n| self.target.after(&path(&tree, n)));
            let rows = Rows {
                logits: logits.collect::<Result<_>>()?,
                sampling: self.sampling,
                known: self.target.known,
            };
            let verdict = rule.verify(&tree, &rows, &mut chance)?;
            verdict.check(&tree, self.target.known)?;
            let mut tokens: Vec<u32> = verdict.path.iter().map(|&n| tree.tokens[n]).collect();
            tokens.push(verdict.bonus);
            committed += tokens.len();
            if tokens.len() == 1 {
                let p = self
                    .target
                    .distribution(&[self.root, tokens[0]], self.sampling)?;
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

    /// Pearson's statistic over pairs expected at least five times, and one cell for all the others.
    fn statistic(
        &mut self,
        counts: &HashMap<(u32, u32), u64>,
        cycles: usize,
    ) -> Result<(f64, usize)> {
        let n = cycles as f64;
        let (mut statistic, mut cells) = (0.0, 0);
        let (mut expected_left, mut seen_left) = (n, n);
        let first = self.target.distribution(&[self.root], self.sampling)?;
        // A first token expected fewer than five times has no pair that is expected more often.
        for (x, &p_x) in first.iter().enumerate().filter(|(_, p)| **p * n >= 5.0) {
            let second = self
                .target
                .distribution(&[self.root, x as u32], self.sampling)?;
            for (y, p_y) in second.iter().enumerate() {
                let expected = n * p_x * p_y;
                if expected >= 5.0 {
                    let seen = counts.get(&(x as u32, y as u32)).copied().unwrap_or(0) as f64;
                    statistic += (seen - expected).powi(2) / expected;
                    cells += 1;
                    expected_left -= expected;
                    seen_left -= seen;
                }
            }
        }
        if expected_left >= 5.0 {
            statistic += (seen_left - expected_left).powi(2) / expected_left;
            cells += 1;
        } else if seen_left > 100.0 {
            // Tokens that the target never or hardly ever gives.
            statistic = f64::INFINITY;
        }
        match cells {
            0 | 1 => Err(Error::Experiment(
                "after this prefix the target leaves a single pair of tokens; take another prefix"
                    .into(),
            )),
            _ => Ok((statistic, cells - 1)),
        }
    }
}

/// The tokens from the root down to a node.
fn path(tree: &Tree, node: usize) -> Vec<u32> {
    let below = tree.path_to(node).into_iter().map(|n| tree.tokens[n]);
    std::iter::once(tree.tokens[0]).chain(below).collect()
}
