//! Traversal verification: a tree from the leaves to the root.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

use crate::proposal::Proposal;
use crate::weights::Weights;

/// Gives every node a weight w, the probability with which its subtree is to be accepted: 1 at the root, and
/// min(w P(x)/Q(x), 1) at a child x. A node tries its children's subtrees in turn; one that is rejected leaves
/// P' = norm((w P - Q)+) and w' = S/(S + 1 - w) with S the mass of (w P - Q)+, and the next sibling is tried with
/// them. After the last, the node itself is accepted with what its weight has become, and the bonus drawn from what
/// P has become (Weng et al., arXiv:2505.12398).
///
/// Why it is exact: let a node with weight w and distribution P be asked to accept with probability w and then to
/// continue with law P, that is, to emit token x with mass w P(x). Child x ~ Q emits min(w P, Q)(x) in all, since
/// its subtree accepts with min(w P(x)/Q(x), 1). There remains (w P - Q)+, of mass S, and the child was rejected
/// with probability 1 - (w - S). So what is still asked for is the same task with w' and P', independent of which x
/// was drawn; by induction over siblings and depth, the root emits P with certainty. On a chain this is block
/// verification.
#[derive(Debug, Clone, Copy, Default)]
pub struct Traversal;

impl Verifier for Traversal {
    fn name(&self) -> &str {
        "traversal"
    }

    fn exact_for(&self, _drawing: Drawing, _width: usize, _sampling: &Sampling) -> bool {
        // The argument holds for any law of the next sibling given the earlier ones, point masses included.
        true
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        let mut walk = Walk { tree, rows, chance };
        match walk.accept(0, 1.0)? {
            Some((last, bonus)) => Ok(Verdict {
                path: tree.path_to(last),
                bonus,
            }),
            // Only rounding leaves the root, whose weight is 1: the branch's probability is that of an ulp.
            None => {
                let bonus = Weights::of(rows, 0)?.pick(walk.chance)?;
                Ok(Verdict {
                    path: Vec::new(),
                    bonus,
                })
            }
        }
    }
}

struct Walk<'a> {
    tree: &'a Tree,
    rows: &'a dyn TargetRows,
    chance: &'a mut dyn Chance,
}

/// What remains to be asked of a node after a child was rejected.
pub(crate) fn weight_after(left: f64, weight: f64) -> f64 {
    match left + 1.0 - weight {
        all if all > 0.0 => (left / all).min(1.0),
        _ => 0.0,
    }
}

impl Walk<'_> {
    /// Accepts the subtree of a node with probability `weight`: its last accepted node and the bonus.
    fn accept(&mut self, node: usize, weight: f64) -> Result<Option<(usize, u32)>> {
        if weight <= 0.0 {
            return Ok(None);
        }
        let tree = self.tree;
        let mut p = Weights::of(self.rows, node)?;
        let (mut weight, mut mass) = (weight, 1.0);
        let mut proposal = None;
        for child in tree.children(node) {
            let proposal = match &mut proposal {
                Some(proposal) => proposal,
                none => none.insert(Proposal::of(tree, node, tree.drawing, p.vocab())?),
            };
            let x = tree.tokens[child];
            let ratio = weight * p.at(x)? / mass / proposal.probability(x)?;
            let found = self.accept(child, ratio.min(1.0))?;
            if found.is_some() {
                return Ok(found);
            }
            let left = proposal.subtract(&mut p, weight / mass, x)?;
            weight = weight_after(left, weight);
            if weight <= 0.0 {
                return Ok(None);
            }
            mass = left;
            proposal.next(x);
        }
        match self.chance.coin(weight) {
            true => Ok(Some((node, p.pick(self.chance)?))),
            false => Ok(None),
        }
    }
}
