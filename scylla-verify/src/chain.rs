//! Chain speculative sampling.

use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};
use scylla_core::{Error, Result};

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
        let mut path = Vec::new();
        let mut node = 0;
        let mut p = Vec::new();
        loop {
            rows.row(node, &mut p)?;
            let mut children = tree.children(node);
            let Some(child) = children.next() else {
                let bonus = chance.pick(&p)? as u32;
                return Ok(Verdict { path, bonus });
            };
            if children.next().is_some() {
                return Err(Error::Invalid(format!(
                    "rule `chain` verifies chains; node {node} has several children"
                )));
            }
            let x = tree.tokens[child] as usize;
            let q = point_or_drawn(tree, node, child)?;
            let p_x = *p.get(x).ok_or_else(|| outside(x, p.len()))?;
            if chance.coin(p_x / q.of_child) {
                path.push(child);
                node = child;
                continue;
            }
            q.subtract_from(tree, &mut p, x)?;
            let bonus = chance.pick(&p)? as u32;
            return Ok(Verdict { path, bonus });
        }
    }
}

/// The proposal's distribution at one node.
struct Proposal<'a> {
    /// q of the drafted token; 1 for a point mass.
    of_child: f64,
    /// `None` for a point mass.
    q: Option<&'a [f64]>,
}

fn point_or_drawn(tree: &Tree, node: usize, child: usize) -> Result<Proposal<'_>> {
    if tree.drawing == Drawing::Deterministic {
        return Ok(Proposal {
            of_child: 1.0,
            q: None,
        });
    }
    let missing = || Error::Invalid(format!("node {node} was expanded at random without its q"));
    let q = tree
        .q
        .get(node)
        .and_then(Option::as_deref)
        .ok_or_else(missing)?;
    let token = tree.tokens[child];
    let drawn = (0..q.len()).find(|&i| tree.target_id(i) == Some(token));
    match drawn.map(|i| q[i]) {
        Some(of_child) if of_child > 0.0 => Ok(Proposal {
            of_child,
            q: Some(q),
        }),
        _ => Err(Error::Invalid(format!(
            "token {token} was drawn at node {node} although its q is zero"
        ))),
    }
}

impl Proposal<'_> {
    /// Leaves the residual (p - q)+, not normalised.
    fn subtract_from(&self, tree: &Tree, p: &mut [f64], x: usize) -> Result<()> {
        let Some(q) = self.q else {
            p[x] = 0.0;
            return Ok(());
        };
        for (i, &q) in q.iter().enumerate() {
            let id = tree.target_id(i).map_or(usize::MAX, |id| id as usize);
            match p.get_mut(id) {
                Some(p) => *p = (*p - q).max(0.0),
                None if q > 0.0 => return Err(outside(id, p.len())),
                None => {}
            }
        }
        Ok(())
    }
}

fn outside(token: usize, vocab: usize) -> Error {
    Error::Invalid(format!(
        "proposed token {token} is outside the vocabulary of {vocab}"
    ))
}
