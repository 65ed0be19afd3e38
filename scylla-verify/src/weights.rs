//! The row that a rule works on: what is left of the target's distribution at a node.

use std::cell::RefCell;

use scylla_core::kernels::probability;
use scylla_core::plugin::{Chance, TargetRows};
use scylla_core::{Error, Result};

thread_local! {
    static SPARE: RefCell<Vec<Buffers>> = const { RefCell::new(Vec::new()) };
}

#[derive(Default)]
struct Buffers {
    dense: Vec<f64>,
    support: Vec<u32>,
}

/// Nonnegative weights over the vocabulary `[V]`, with their support where it is small (as top-p and top-k leave it):
/// then only the support is touched. Memory goes back to the thread's spare buffers when dropped.
pub(crate) struct Weights {
    buffers: Buffers,
    sparse: bool,
}

impl Weights {
    /// None yet.
    pub(crate) fn empty() -> Self {
        Self {
            buffers: SPARE.with_borrow_mut(Vec::pop).unwrap_or_default(),
            sparse: false,
        }
    }

    /// The distribution after a node.
    pub(crate) fn of(rows: &dyn TargetRows, node: usize) -> Result<Self> {
        let mut weights = Self::empty();
        weights.load(rows, node)?;
        Ok(weights)
    }

    /// Takes the distribution after another node.
    pub(crate) fn load(&mut self, rows: &dyn TargetRows, node: usize) -> Result<()> {
        let Buffers { dense, support } = &mut self.buffers;
        rows.row(node, dense)?;
        // For the small vocabularies of proofs both ways are common, so that both are proved.
        let limit = match dense.len() {
            n if n > 1024 => n / 16,
            n => 3 * n / 4,
        };
        self.sparse = probability::support(dense, limit, support);
        Ok(())
    }

    pub(crate) fn vocab(&self) -> usize {
        self.buffers.dense.len()
    }

    /// A token's weight.
    ///
    /// # Errors
    /// If it lies outside the vocabulary, or is no weight: NaN would fail every comparison, and so bias silently.
    pub(crate) fn at(&self, token: u32) -> Result<f64> {
        match self.buffers.dense.get(token as usize) {
            Some(&p) if p >= 0.0 && p.is_finite() => Ok(p),
            Some(&p) => Err(Error::Invalid(format!(
                "the target's probability of token {token} is {p}"
            ))),
            None => Err(outside(token, self.vocab())),
        }
    }

    /// All weights.
    pub(crate) fn dense(&self) -> &[f64] {
        &self.buffers.dense
    }

    /// Sums over p and q with `p < gamma q` (of p) and with `p >= gamma q` (of q); q is over the same ids.
    pub(crate) fn overlap(&self, q: &[f64], gamma: f64) -> (f64, f64) {
        let dense = &self.buffers.dense;
        if !self.sparse {
            let shared = dense.len().min(q.len());
            return probability::overlap(&dense[..shared], &q[..shared], gamma);
        }
        let (mut below, mut above) = (0.0, 0.0);
        for &i in &self.buffers.support {
            let p = dense[i as usize];
            match q.get(i as usize) {
                Some(q) if p < gamma * q => below += p,
                Some(q) => above += q,
                None => {}
            }
        }
        (below, above)
    }

    /// Changes the weights of the support by `change(p, q)`, and returns their sum. `change` makes nothing negative.
    fn change_support(&mut self, q: &[f64], change: impl Fn(f64, f64) -> f64) -> f64 {
        let Buffers { dense, support } = &mut self.buffers;
        let each = |&i: &u32| {
            let i = i as usize;
            dense[i] = change(dense[i], q.get(i).copied().unwrap_or(0.0));
            dense[i]
        };
        support.iter().map(each).sum()
    }

    /// `p <- (p - factor min(q, scale p))+` and the sum of what is left; q is 0 beyond its end.
    pub(crate) fn spare(&mut self, q: &[f64], factor: f64, scale: f64) -> f64 {
        if self.sparse {
            return self.change_support(q, |p, q| (p - factor * q.min(scale * p)).max(0.0));
        }
        let dense = &mut self.buffers.dense;
        let shared = dense.len().min(q.len());
        let (near, far) = dense.split_at_mut(shared);
        let left = probability::spare(near, &q[..shared], factor, scale);
        left + probability::sum_and_least(far).0
    }

    /// `p <- (a p - b q)+` and the sum of what is left; q is 0 beyond its end.
    pub(crate) fn residual(&mut self, a: f64, q: &[f64], b: f64) -> f64 {
        if self.sparse {
            return self.change_support(q, |p, q| (a * p - b * q).max(0.0));
        }
        let dense = &mut self.buffers.dense;
        let shared = dense.len().min(q.len());
        let (near, far) = dense.split_at_mut(shared);
        probability::scale(far, a);
        let left = probability::residual(near, a, &q[..shared], b);
        left + probability::sum_and_least(far).0
    }

    /// `p <- a p` everywhere, then `p <- (p - b)+` at one token; the sum of what is left.
    pub(crate) fn take_point(&mut self, a: f64, token: u32, b: f64) -> Result<f64> {
        self.at(token)?;
        let mut left = self.residual(a, &[], 0.0);
        let p = &mut self.buffers.dense[token as usize];
        left -= *p;
        *p = (*p - b).max(0.0);
        left += *p;
        // Where nearly all was at that token, a difference has no digits left.
        if left < 1e-3 {
            left = self.sum();
        }
        Ok(left)
    }

    /// Puts single weights back, and returns by how much the sum changed.
    pub(crate) fn restore(&mut self, weights: &[(usize, f64)]) -> f64 {
        let mut change = 0.0;
        for &(i, p) in weights {
            change += p - self.buffers.dense[i];
            self.buffers.dense[i] = p;
        }
        change
    }

    fn sum(&self) -> f64 {
        let Buffers { dense, support } = &self.buffers;
        match self.sparse {
            true => support.iter().map(|&i| dense[i as usize]).sum(),
            false => probability::sum_and_least(dense).0,
        }
    }

    /// A token with probability proportional to its weight.
    pub(crate) fn pick(&self, chance: &mut dyn Chance) -> Result<u32> {
        let Buffers { dense, support } = &self.buffers;
        if !self.sparse {
            return Ok(chance.pick(dense)? as u32);
        }
        let few: Vec<f64> = support.iter().map(|&i| dense[i as usize]).collect();
        let at = chance.pick(&few)?;
        Ok(support.get(at).copied().unwrap_or(0))
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        let buffers = std::mem::take(&mut self.buffers);
        // A thread that is ending has no spare buffers any more.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().push(buffers));
    }
}

/// Rows of the vocabulary that this thread keeps.
#[cfg(test)]
pub(crate) fn spare_rows() -> usize {
    SPARE.with_borrow(Vec::len)
}

pub(crate) fn outside(token: u32, vocab: usize) -> Error {
    Error::Invalid(format!(
        "proposed token {token} is outside the vocabulary of {vocab}"
    ))
}
