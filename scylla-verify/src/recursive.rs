//! Recursive rejection: siblings are tried one after another, each against what the earlier ones left of p.
//!
//! At a node, p_1 is the target's distribution and q_i that of the i-th sibling given the earlier ones. Sibling x is
//! accepted with min(1, p_i(x) / q_i(x)); else p_{i+1} = norm((p_i - q_i)+). When none is accepted, the bonus is
//! drawn from what is left. Each step leaves the law of the next token at p_1: the accepted part is min(p_i, q_i),
//! and the rest follows (p_i - q_i)+.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict};
use scylla_core::tree::{Drawing, Tree};

use crate::proposal::Proposal;
use crate::weights::Weights;

/// Verifies a tree whose siblings were drawn as `drawing` says.
pub(crate) fn verify(
    tree: &Tree,
    rows: &dyn TargetRows,
    chance: &mut dyn Chance,
    drawing: Drawing,
) -> Result<Verdict> {
    let mut path = Vec::new();
    let mut node = 0;
    let mut p = Weights::of(rows, node)?;
    'nodes: loop {
        let mut mass = 1.0;
        let mut proposal = None;
        for child in tree.children(node) {
            let proposal = match &mut proposal {
                Some(proposal) => proposal,
                none => none.insert(Proposal::of(tree, node, drawing, p.vocab())?),
            };
            let x = tree.tokens[child];
            let q_x = proposal.probability(x)?;
            let mut passes = chance.coin(p.at(x)? / mass / q_x);
            if !passes {
                let left = proposal.subtract(&mut p, 1.0 / mass, x)?;
                mass = left;
                // Nothing left: p and q are equal up to rounding, and so is this branch's probability to zero.
                passes = left <= 0.0;
            }
            if passes {
                path.push(child);
                node = child;
                p.load(rows, node)?;
                continue 'nodes;
            }
            proposal.next(x);
        }
        let bonus = p.pick(chance)?;
        return Ok(Verdict { path, bonus });
    }
}
