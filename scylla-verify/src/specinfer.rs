//! SpecInfer's multi-step speculative sampling.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

use crate::recursive;

/// Siblings drawn independently from q, the same token possibly twice: x is accepted with min(1, p_i(x)/q(x)), and
/// p_{i+1} = norm((p_i - q)+) (SpecInfer, arXiv:2305.09781, algorithm 2).
#[derive(Debug, Clone, Copy, Default)]
pub struct SpecInfer;

impl Verifier for SpecInfer {
    fn name(&self) -> &str {
        "specinfer"
    }

    fn exact_for(&self, drawing: Drawing, width: usize, _sampling: &Sampling) -> bool {
        drawing == Drawing::Independent || (drawing == Drawing::WithoutReplacement && width <= 1)
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        recursive::verify(tree, rows, chance, Drawing::Independent)
    }
}
