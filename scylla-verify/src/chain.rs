//! Chain speculative sampling.

use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};
use scylla_core::{Error, Result};

use crate::recursive;

/// Accepts x drawn from q with probability min(1, p(x)/q(x)); on rejection samples norm((p - q)+) and stops; when
/// all are accepted, samples p (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318).
///
/// A deterministic proposal is a point mass: accepted with p(x), and the residual is p without x.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chain;

impl Verifier for Chain {
    fn name(&self) -> &str {
        "chain"
    }

    fn exact_for(&self, _drawing: Drawing, width: usize, _sampling: &Sampling) -> bool {
        // One draw is the same with and without replacement.
        width <= 1
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        only_chains(self.name(), tree)?;
        recursive::verify(tree, rows, chance, tree.drawing)
    }
}

/// Refuses a tree in which a node has several children.
pub(crate) fn only_chains(rule: &str, tree: &Tree) -> Result<()> {
    match (1..tree.len()).find(|&node| tree.parents[node] != node - 1) {
        Some(node) => Err(Error::Invalid(format!(
            "rule `{rule}` verifies chains; node {node} of the tree does not follow node {}",
            node - 1
        ))),
        None => Ok(()),
    }
}
