//! Typical acceptance, which is not exact.

use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};
use scylla_core::{Error, Result};

use crate::weights::Weights;

/// Accepts a child x where p(x) > min(epsilon, delta exp(-H(p))), H the entropy of p in nats, and keeps the deepest
/// path so accepted, the first of equals; the bonus is drawn from p (Medusa, arXiv:2401.10774, section 2.3.1).
///
/// **Lossy**: the law of the output is not the target's, for any proposal.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Typical {
    /// Hard threshold.
    pub epsilon: f64,
    /// Threshold relative to the entropy.
    pub delta: f64,
}

impl Default for Typical {
    /// Medusa's own values: epsilon 0.09, delta 0.3 (its square root).
    fn default() -> Self {
        Self {
            epsilon: 0.09,
            delta: 0.3,
        }
    }
}

impl Typical {
    /// The rule with its two thresholds.
    ///
    /// # Errors
    /// If one is not in (0, 1].
    pub fn new(epsilon: f64, delta: f64) -> Result<Self> {
        let fits = |v: f64| v > 0.0 && v <= 1.0;
        match fits(epsilon) && fits(delta) {
            true => Ok(Self { epsilon, delta }),
            false => Err(Error::Invalid(format!(
                "typical acceptance with epsilon {epsilon} and delta {delta}: both must be above 0 and at most 1"
            ))),
        }
    }

    fn threshold(&self, p: &[f64]) -> f64 {
        let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
        self.epsilon.min(self.delta * (-entropy).exp())
    }
}

impl Verifier for Typical {
    fn name(&self) -> &str {
        "typical"
    }

    fn exact_for(&self, _drawing: Drawing, _width: usize, _sampling: &Sampling) -> bool {
        false
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        let mut p = Weights::empty();
        let mut accepted = vec![false; tree.len()];
        accepted[0] = true;
        for node in 0..tree.len() {
            if !accepted[node] || tree.children(node).next().is_none() {
                continue;
            }
            p.load(rows, node)?;
            let threshold = self.threshold(p.dense());
            for child in tree.children(node) {
                accepted[child] = p.at(tree.tokens[child])? > threshold;
            }
        }
        let depths = tree.depths();
        let nodes = (0..tree.len()).filter(|&n| accepted[n]);
        let last = nodes.rev().max_by_key(|&n| depths[n]).unwrap_or(0);
        p.load(rows, last)?;
        Ok(Verdict {
            path: tree.path_to(last),
            bonus: p.pick(chance)?,
        })
    }
}
