//! The target's distributions at the nodes of a tree, out of the logits of one forward.

use std::borrow::Cow;
use std::cell::OnceCell;

use crate::plugin::{Matrix, TargetRows};
use crate::sampling::{Sampling, argmax};
use crate::tree::Tree;
use crate::{Error, Result};

/// What a rule sees of a forward pass: the sampling transform is applied to the rows it asks for, and to no other.
pub struct LogitRows<'a> {
    /// Logits `[N, V]`, one row per node; a tree of the root alone may stand on a single row.
    pub logits: &'a Matrix,
    /// The tree.
    pub tree: &'a Tree,
    /// Tokens before the root.
    pub history: &'a [u32],
    /// The transform.
    pub sampling: &'a Sampling,
    /// Tokens from here on are padding.
    pub known: usize,
    /// Where the logits are on a device, the argmax of all nodes, once it was asked for; begins empty.
    pub best: OnceCell<Vec<u32>>,
}

fn beyond(node: usize) -> Error {
    Error::Invalid(format!("no logits of node {node}"))
}

impl LogitRows<'_> {
    /// The logits after a node, penalised for the tokens before it.
    fn logits(&self, node: usize) -> Result<Cow<'_, [f32]>> {
        let row = self.logits.row(node)?;
        if self.sampling.repetition_penalty == 1.0 {
            return Ok(row);
        }
        let mut row = row.into_owned();
        let path = self.tree.tokens_to(node);
        let before = self.history.iter().copied().chain(path);
        self.sampling.penalise(&mut row, before);
        Ok(Cow::Owned(row))
    }
}

impl TargetRows for LogitRows<'_> {
    fn argmax(&self, nodes: &[usize]) -> Result<Vec<u32>> {
        if self.logits.is_on_device() && self.sampling.repetition_penalty == 1.0 {
            // Those of all nodes at once, the first time: a rule asks for one after the other, and each would be waited for.
            if self.best.get().is_none() {
                let all: Vec<usize> = (0..self.logits.rows()).collect();
                let _ = self.best.set(self.logits.argmax(&all, self.known)?);
            }
            let best = self.best.get().map_or(&[][..], |best| best);
            let of = |&node: &usize| best.get(node).copied().ok_or_else(|| beyond(node));
            return nodes.iter().map(of).collect();
        }
        let best = |&node: &usize| {
            let row = self.logits(node)?;
            argmax(&row[..self.known.min(row.len())])
        };
        nodes.iter().map(best).collect()
    }

    fn row(&self, node: usize, out: &mut Vec<f64>) -> Result<()> {
        self.sampling
            .distribution(&self.logits(node)?, self.known, out)
    }
}
