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
use crate::scratch::Row;

/// Verifies a tree whose siblings were drawn as `drawing` says.
pub(crate) fn verify(
    tree: &Tree,
    rows: &dyn TargetRows,
    chance: &mut dyn Chance,
    drawing: Drawing,
) -> Result<Verdict> {
    let mut path = Vec::new();
    let mut node = 0;
    let mut p = Row::new();
    'nodes: loop {
        rows.row(node, &mut p)?;
        let mut mass = 1.0;
        let mut proposal = None;
        for child in tree.children(node) {
            let proposal = match &mut proposal {
                Some(proposal) => proposal,
                none => none.insert(Proposal::of(tree, node, drawing)?),
            };
            let x = tree.tokens[child];
            let q_x = proposal.probability(x)?;
            let p_x = probability_of(&p, x)? / mass;
            if chance.coin(p_x / q_x) {
                path.push(child);
                node = child;
                continue 'nodes;
            }
            let left = proposal.subtract(&mut p, 1.0 / mass, 1.0, x)?;
            if left <= 0.0 {
                // p and q are equal up to rounding, and so is this branch's probability to zero: x, as q has it.
                path.push(child);
                node = child;
                continue 'nodes;
            }
            mass = left;
            proposal.next(x);
        }
        let bonus = chance.pick(&p)? as u32;
        return Ok(Verdict { path, bonus });
    }
}

/// A token's entry in a row.
pub(crate) fn probability_of(p: &[f64], token: u32) -> Result<f64> {
    p.get(token as usize).copied().ok_or_else(|| {
        scylla_core::Error::Invalid(format!(
            "proposed token {token} is outside the vocabulary of {}",
            p.len()
        ))
    })
}
