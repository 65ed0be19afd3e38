//! Sampling verification of a tree of point masses.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

use crate::recursive;

/// Accepts child x with probability p(x); on rejection p(x) becomes zero, the rest is normalised, and the next
/// sibling is tried; when none is left, samples what remains of p (EAGLE-2's and EAGLE-3's trees under sampling,
/// arXiv:2406.16858).
///
/// Each child is taken as a point mass, however it was chosen, so it is exact for every tree that was made without
/// a look at the target's distributions; for children drawn at random it accepts fewer than rules that use q.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeterministicTree;

impl Verifier for DeterministicTree {
    fn name(&self) -> &str {
        "deterministic-tree"
    }

    fn exact_for(&self, _drawing: Drawing, _width: usize, _sampling: &Sampling) -> bool {
        true
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        recursive::verify(tree, rows, chance, Drawing::Deterministic)
    }
}
