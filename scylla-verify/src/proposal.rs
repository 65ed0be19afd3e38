//! What the children of a node were drawn from, as they are tried one after another.

use std::borrow::Cow;

use scylla_core::kernels::probability;
use scylla_core::tree::{Drawing, Tree};
use scylla_core::{Error, Result};

use crate::weights::{Weights, outside};

/// The distribution of the next sibling given the earlier ones, over target ids.
pub(crate) struct Proposal<'a> {
    node: usize,
    drawing: Drawing,
    /// q over target ids, 0 beyond its end; `None` where each child is a point mass.
    q: Option<Cow<'a, [f64]>>,
    /// Earlier siblings, which q no longer holds.
    taken: Vec<u32>,
    /// Mass of q without them.
    mass: f64,
}

impl<'a> Proposal<'a> {
    /// The proposal of a node's children, taken to be drawn as `drawing` says.
    pub(crate) fn of(tree: &'a Tree, node: usize, drawing: Drawing, vocab: usize) -> Result<Self> {
        let q = match drawing {
            Drawing::Deterministic => None,
            _ => {
                let q = tree.q.get(node).and_then(Option::as_deref).ok_or_else(|| {
                    Error::Invalid(format!("node {node} was expanded at random without its q"))
                })?;
                Some(over_target(tree, q, vocab)?)
            }
        };
        Ok(Self {
            node,
            drawing,
            q,
            taken: Vec::new(),
            mass: 1.0,
        })
    }

    /// q over target ids, without a look at earlier siblings; empty for point masses.
    pub(crate) fn q(&self) -> &[f64] {
        self.q.as_deref().unwrap_or(&[])
    }

    /// The probability with which the next sibling was to be this token.
    pub(crate) fn probability(&self, token: u32) -> Result<f64> {
        let Some(q) = &self.q else { return Ok(1.0) };
        match q.get(token as usize) {
            Some(&q) if q > 0.0 && !self.taken.contains(&token) => Ok((q / self.mass).min(1.0)),
            _ => Err(Error::Invalid(format!(
                "token {token} was drawn at node {} although its q is zero",
                self.node
            ))),
        }
    }

    /// Replaces p by `(a p - q)+`, with q the distribution of the sibling `token`, and returns what is left.
    pub(crate) fn subtract(&self, p: &mut Weights, a: f64, token: u32) -> Result<f64> {
        let Some(q) = &self.q else {
            return p.take_point(a, token, 1.0);
        };
        // Earlier siblings were taken out of q: what p holds of them only shrinks by the factor.
        let mut spared = Vec::with_capacity(self.taken.len());
        for &earlier in &self.taken {
            spared.push((earlier as usize, a * p.at(earlier)?));
        }
        let left = p.residual(a, q, 1.0 / self.mass);
        Ok(left + p.restore(&spared))
    }

    /// Goes on to the next sibling: without replacement, q loses the token just tried.
    pub(crate) fn next(&mut self, token: u32) {
        let (Drawing::WithoutReplacement, Some(q)) = (self.drawing, &self.q) else {
            return;
        };
        self.taken.push(token);
        self.mass -= q.get(token as usize).copied().unwrap_or(0.0);
        // A difference of nearly equal numbers has few digits left: then the rest is summed anew.
        if self.mass < 0.1 {
            let mut places: Vec<usize> = self.taken.iter().map(|&t| t as usize).collect();
            places.sort_unstable();
            let mut from = 0;
            self.mass = 0.0;
            for place in places.into_iter().chain([q.len()]) {
                let end = place.min(q.len());
                self.mass += probability::sum_and_least(&q[from.min(end)..end]).0;
                from = place + 1;
            }
        }
    }
}

/// q by target id: as it is where the ids are the same, else spread out.
fn over_target<'a>(tree: &Tree, q: &'a [f64], vocab: usize) -> Result<Cow<'a, [f64]>> {
    let Some(map) = &tree.draft_to_target else {
        return match q.iter().skip(vocab).position(|&q| q > 0.0) {
            Some(beyond) => Err(outside((vocab + beyond) as u32, vocab)),
            None => Ok(Cow::Borrowed(&q[..q.len().min(vocab)])),
        };
    };
    let mut wide = vec![0.0; vocab];
    for (&id, &q) in map.iter().zip(q) {
        *wide
            .get_mut(id as usize)
            .ok_or_else(|| outside(id, vocab))? += q;
    }
    Ok(Cow::Owned(wide))
}
