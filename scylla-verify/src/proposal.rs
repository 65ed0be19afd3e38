//! What the children of a node were drawn from, as they are tried one after another.

use scylla_core::kernels::probability;
use scylla_core::tree::{Drawing, Tree};
use scylla_core::{Error, Result};

/// The distribution of the next sibling given the earlier ones, over target ids.
pub(crate) struct Proposal<'a> {
    tree: &'a Tree,
    node: usize,
    drawing: Drawing,
    /// q over draft ids; `None` where each child is a point mass.
    q: Option<&'a [f64]>,
    /// Draft ids of earlier siblings, which q no longer holds.
    taken: Vec<usize>,
    /// Mass of q without them.
    mass: f64,
}

impl<'a> Proposal<'a> {
    /// The proposal of a node's children, taken to be drawn as `drawing` says.
    pub(crate) fn of(tree: &'a Tree, node: usize, drawing: Drawing) -> Result<Self> {
        let q = match drawing {
            Drawing::Deterministic => None,
            _ => Some(tree.q.get(node).and_then(Option::as_deref).ok_or_else(|| {
                Error::Invalid(format!("node {node} was expanded at random without its q"))
            })?),
        };
        Ok(Self {
            tree,
            node,
            drawing,
            q,
            taken: Vec::new(),
            mass: 1.0,
        })
    }

    /// The probability with which the next sibling was to be this token.
    pub(crate) fn probability(&self, token: u32) -> Result<f64> {
        let Some(q) = self.q else { return Ok(1.0) };
        let id = self
            .tree
            .draft_id(token)
            .filter(|id| !self.taken.contains(id));
        match id.and_then(|id| q.get(id)) {
            Some(&q) if q > 0.0 => Ok((q / self.mass).min(1.0)),
            _ => Err(Error::Invalid(format!(
                "token {token} was drawn at node {} although its q is zero",
                self.node
            ))),
        }
    }

    /// Replaces p by `(a p - b q)+`, with q the distribution of the sibling `token`, and returns what is left.
    pub(crate) fn subtract(&self, p: &mut [f64], a: f64, b: f64, token: u32) -> Result<f64> {
        let outside = |id: usize, vocab: usize| {
            Error::Invalid(format!(
                "proposed token {id} is outside the vocabulary of {vocab}"
            ))
        };
        let Some(q) = self.q else {
            let vocab = p.len();
            probability::scale(p, a);
            let at = p
                .get_mut(token as usize)
                .ok_or_else(|| outside(token as usize, vocab))?;
            *at = (*at - b).max(0.0);
            return Ok(probability::sum_and_least(p).0);
        };
        let b = b / self.mass;
        // Earlier siblings were taken out of q: what p holds of them only shrinks by the factor.
        let target = |&id: &usize| self.tree.target_id(id).map(|t| t as usize);
        let places = self.taken.iter().filter_map(target);
        let spared: Vec<(usize, f64)> = places
            .filter_map(|i| p.get(i).map(|&v| (i, v * a)))
            .collect();
        let mut left = match &self.tree.draft_to_target {
            None => {
                let (shared, beyond) = (q.len().min(p.len()), q.len() > p.len());
                if beyond && q[p.len()..].iter().any(|&q| q > 0.0) {
                    return Err(outside(q.len() - 1, p.len()));
                }
                let (near, far) = p.split_at_mut(shared);
                probability::scale(far, a);
                probability::residual(near, a, &q[..shared], b) + probability::sum_and_least(far).0
            }
            Some(map) => {
                probability::scale(p, a);
                for (&id, &q) in map.iter().zip(q) {
                    let vocab = p.len();
                    let p = p
                        .get_mut(id as usize)
                        .ok_or_else(|| outside(id as usize, vocab))?;
                    *p = (*p - b * q).max(0.0);
                }
                probability::sum_and_least(p).0
            }
        };
        for (i, v) in spared {
            left += v - p[i];
            p[i] = v;
        }
        Ok(left)
    }

    /// Shows p and q of every token that q may hold.
    pub(crate) fn pairs(&self, p: &[f64], mut each: impl FnMut(f64, f64)) {
        let q = self.q.unwrap_or(&[]);
        match &self.tree.draft_to_target {
            None => p.iter().zip(q).for_each(|(&p, &q)| each(p, q)),
            Some(map) => {
                for (&id, &q) in map.iter().zip(q) {
                    each(p.get(id as usize).copied().unwrap_or(0.0), q);
                }
            }
        }
    }

    /// Changes every token's p in view of its q; tokens unknown to the draft have none. Returns the sum of the results.
    pub(crate) fn change(&self, p: &mut [f64], change: impl Fn(f64, f64) -> f64) -> f64 {
        let q = self.q.unwrap_or(&[]);
        match &self.tree.draft_to_target {
            None => p.iter_mut().zip(q).for_each(|(p, &q)| *p = change(*p, q)),
            Some(map) => {
                for (&id, &q) in map.iter().zip(q) {
                    if let Some(p) = p.get_mut(id as usize) {
                        *p = change(*p, q);
                    }
                }
            }
        }
        probability::sum_and_least(p).0
    }

    /// Goes on to the next sibling: without replacement, q loses the token just tried.
    pub(crate) fn next(&mut self, token: u32) {
        let (Drawing::WithoutReplacement, Some(q)) = (self.drawing, self.q) else {
            return;
        };
        let Some(id) = self.tree.draft_id(token) else {
            return;
        };
        self.taken.push(id);
        self.mass -= q.get(id).copied().unwrap_or(0.0);
        // A difference of nearly equal numbers has few digits left: then the rest is summed anew.
        if self.mass < 0.5 {
            self.mass = probability::sum_and_least(q).0;
            let rest = |mass: f64, id: &usize| mass - q.get(*id).copied().unwrap_or(0.0);
            let by_difference = self.taken.iter().fold(self.mass, rest);
            self.mass = match by_difference > 0.5 * self.mass {
                true => by_difference,
                false => {
                    let kept = q
                        .iter()
                        .enumerate()
                        .filter(|(i, _)| !self.taken.contains(i));
                    kept.map(|(_, q)| q).sum()
                }
            };
        }
    }
}
