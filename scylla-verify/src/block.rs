//! Block verification of a chain.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

use crate::chain::only_chains;
use crate::proposal::Proposal;
use crate::traversal::weight_after;
use crate::weights::Weights;

/// Judges a chain as a whole (Sun et al., arXiv:2403.10444): w_0 = 1, w_i = min(w_{i-1} P(x_i)/Q(x_i), 1), and the
/// longest prefix i is kept that passes a coin of h_i, tried from the end, where S_i is the mass of (w_i P - Q)+,
/// h_i = S_i/(S_i + 1 - w_i), and h_g = w_g at the end of the chain. The bonus follows (w_i P - Q)+; after the whole
/// chain, P. Never accepts fewer tokens than chain sampling on average.
#[derive(Debug, Clone, Copy, Default)]
pub struct Block;

impl Verifier for Block {
    fn name(&self) -> &str {
        "block"
    }

    fn exact_for(&self, _drawing: Drawing, width: usize, _sampling: &Sampling) -> bool {
        width <= 1
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        only_chains(self.name(), tree)?;
        let mut weights = vec![1.0];
        let mut seen: Vec<Weights> = Vec::new();
        let bonus_after = |i: usize, p: &Weights, chance: &mut dyn Chance| {
            Ok(Verdict {
                path: (1..=i).collect(),
                bonus: p.pick(chance)?,
            })
        };
        for node in 0..tree.len() {
            seen.push(Weights::of(rows, node)?);
            let (p, weight) = (&seen[node], weights[node]);
            if node + 1 == tree.len() {
                if chance.coin(weight) {
                    return bonus_after(node, p, chance);
                }
                break;
            }
            let x = tree.tokens[node + 1];
            let q_x = Proposal::of(tree, node, tree.drawing, p.vocab())?.probability(x)?;
            weights.push((weight * p.at(x)? / q_x).min(1.0));
            if weights[node + 1] <= 0.0 {
                break; // nothing further down can pass
            }
        }
        for node in (0..seen.len().min(tree.len() - 1)).rev() {
            let (p, weight) = (&mut seen[node], weights[node]);
            let proposal = Proposal::of(tree, node, tree.drawing, p.vocab())?;
            let left = proposal.subtract(p, weight, tree.tokens[node + 1])?;
            if chance.coin(weight_after(left, weight)) {
                return bonus_after(node, p, chance);
            }
        }
        // Only rounding leaves the root, whose weight is 1: the branch's probability is that of an ulp.
        seen[0].load(rows, 0)?;
        bonus_after(0, &seen[0], chance)
    }
}
