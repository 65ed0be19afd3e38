//! Recursive rejection sampling without replacement.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

use crate::recursive;

/// Siblings drawn from q without replacement: q_i is q without the earlier siblings, normalised; x is accepted with
/// min(1, p_i(x)/q_i(x)), and p_{i+1} = norm((p_i - q_i)+) (EAGLE, arXiv:2401.15077; RRSw).
#[derive(Debug, Clone, Copy, Default)]
pub struct RrsWithoutReplacement;

impl Verifier for RrsWithoutReplacement {
    fn name(&self) -> &str {
        "rrs-without-replacement"
    }

    fn exact_for(&self, drawing: Drawing, width: usize, _sampling: &Sampling) -> bool {
        drawing == Drawing::WithoutReplacement || (drawing == Drawing::Independent && width <= 1)
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        recursive::verify(tree, rows, chance, Drawing::WithoutReplacement)
    }
}
