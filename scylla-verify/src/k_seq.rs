//! SpecTr's K-SEQ selection among independent siblings.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

use crate::proposal::Proposal;
use crate::recursive::probability_of;
use crate::scratch::Row;

/// K siblings drawn independently from q, each accepted with min(1, p(x)/(gamma q(x))); gamma in [1, K] solves
/// 1 - (1 - beta)^K = gamma beta with beta = sum min(q, p/gamma) (SpecTr, arXiv:2310.15141, algorithm 2).
///
/// One trial accepts with probability beta and then has law min(q, p/gamma)/beta, so K trials accept x with mass
/// a min(q, p/gamma)(x), where a = (1 - (1 - beta)^K)/beta. The bonus therefore follows p - a min(q, p/gamma), which
/// is nowhere negative as long as a <= gamma, and the law of the next token is p for any such gamma. The equation's
/// root is the smallest, hence the best.
#[derive(Debug, Clone, Copy, Default)]
pub struct KSeq;

impl Verifier for KSeq {
    fn name(&self) -> &str {
        "k-seq"
    }

    fn exact_for(&self, drawing: Drawing, width: usize, _sampling: &Sampling) -> bool {
        drawing == Drawing::Independent || (drawing == Drawing::WithoutReplacement && width <= 1)
    }

    fn verify(
        &self,
        tree: &Tree,
        rows: &dyn TargetRows,
        chance: &mut dyn Chance,
    ) -> Result<Verdict> {
        let mut path = Vec::new();
        let mut node = 0;
        let mut p = Row::new();
        'nodes: loop {
            rows.row(node, &mut p)?;
            let siblings: Vec<usize> = tree.children(node).collect();
            if !siblings.is_empty() {
                let proposal = Proposal::of(tree, node, Drawing::Independent)?;
                let plan = Plan::solve(&p, &proposal, siblings.len());
                for &child in &siblings {
                    let x = tree.tokens[child];
                    let ratio = probability_of(&p, x)? / proposal.probability(x)? / plan.gamma;
                    if chance.coin(ratio) {
                        path.push(child);
                        node = child;
                        continue 'nodes;
                    }
                }
                if !plan.leave(&mut p, &proposal) {
                    // All of p was to be accepted: up to rounding, this branch does not exist.
                    path.push(siblings[0]);
                    node = siblings[0];
                    continue;
                }
            }
            let bonus = chance.pick(&p)? as u32;
            return Ok(Verdict { path, bonus });
        }
    }
}

/// The threshold of one node, and the mass factor of what its siblings accept.
struct Plan {
    gamma: f64,
    factor: f64,
}

impl Plan {
    /// Finds gamma by bisection, on its upper side, so that the residual is nowhere negative.
    fn solve(p: &[f64], proposal: &Proposal<'_>, k: usize) -> Self {
        let k_f = k as f64;
        // Only where 1 < p/q < K does min(q, p/gamma) change its branch; the others are two sums.
        let (mut always_q, mut always_p) = (0.0, 0.0);
        let mut between: Vec<(f64, f64)> = Vec::new();
        proposal.pairs(p, |p, q| {
            if p >= k_f * q {
                always_q += q;
            } else if p <= q {
                always_p += p;
            } else {
                between.push((p, q));
            }
        });
        let beta = |gamma: f64| {
            let middle: f64 = between.iter().map(|&(p, q)| q.min(p / gamma)).sum();
            always_q + always_p / gamma + middle
        };
        let accepted = |beta: f64| 1.0 - (1.0 - beta.min(1.0)).powi(k as i32);
        let (mut low, mut high) = (1.0, k_f);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            let beta = beta(middle);
            if accepted(beta) > middle * beta {
                low = middle;
            } else {
                high = middle;
            }
            if high - low < 1e-14 * high {
                break;
            }
        }
        let beta = beta(high);
        let factor = match beta > 0.0 {
            true => (accepted(beta) / beta).min(high),
            false => 0.0,
        };
        Self {
            gamma: high,
            factor,
        }
    }

    /// Replaces p by the law of the bonus after K rejections, not normalised; false where nothing is left.
    fn leave(&self, p: &mut [f64], proposal: &Proposal<'_>) -> bool {
        let left = proposal.change(p, |p, q| (p - self.factor * q.min(p / self.gamma)).max(0.0));
        left > 0.0
    }
}
