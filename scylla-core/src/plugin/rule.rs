//! The rule that accepts.

use super::Chance;
use crate::sampling::Sampling;
use crate::tree::{Drawing, Tree};
use crate::{Error, Result};

/// The target's distributions at the nodes of a tree, computed when asked for.
pub trait TargetRows {
    /// The most probable token after each node (ties: the lowest id).
    fn argmax(&self, nodes: &[usize]) -> Result<Vec<u32>>;
    /// Writes the distribution after a node, `[V]`, after the sampling transform, to `out`.
    fn row(&self, node: usize, out: &mut Vec<f64>) -> Result<()>;
}

/// What a rule decides about one tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Accepted nodes from the root's child downwards; empty when none is.
    pub path: Vec<usize>,
    /// The token the target adds after them.
    pub bonus: u32,
}

impl Verdict {
    /// Checks that the path is one of the tree, from a child of the root down, and the bonus a token.
    pub fn check(&self, tree: &Tree, vocab: usize) -> Result<()> {
        let mut parent = 0;
        for &node in &self.path {
            if node == 0 || node >= tree.len() || tree.parents[node] != parent {
                return Err(Error::Invalid(format!(
                    "the rule accepted {:?}, which is no path of the tree",
                    self.path
                )));
            }
            parent = node;
        }
        if self.bonus as usize >= vocab {
            return Err(Error::Invalid(format!(
                "the rule's bonus {} is outside the vocabulary of {vocab}",
                self.bonus
            )));
        }
        Ok(())
    }
}

/// An acceptance rule.
pub trait Verifier {
    /// Its name, as the registry and messages print it.
    fn name(&self) -> &str;
    /// Whether the committed tokens follow the target's law exactly, for trees drawn this way and with at most `width`
    /// children a node. A width of 0 asks for trees of their root alone, however drawn: plain decoding, and the first
    /// token after every prompt.
    fn exact_for(&self, drawing: Drawing, width: usize, sampling: &Sampling) -> bool;
    /// Accepts a path of the tree and draws the bonus.
    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict>;
}
