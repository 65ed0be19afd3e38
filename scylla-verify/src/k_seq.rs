//! SpecTr's K-SEQ selection among independent siblings.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

use crate::proposal::Proposal;
use crate::weights::Weights;

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
        let mut p = Weights::of(rows, node)?;
        'nodes: loop {
            let siblings: Vec<usize> = tree.children(node).collect();
            if !siblings.is_empty() {
                let proposal = Proposal::of(tree, node, Drawing::Independent, p.vocab())?;
                let plan = Plan::solve(&p, proposal.q(), siblings.len());
                let mut accepted = None;
                for &child in &siblings {
                    let x = tree.tokens[child];
                    if chance.coin(p.at(x)? / proposal.probability(x)? / plan.gamma) {
                        accepted = Some(child);
                        break;
                    }
                }
                let Plan { gamma, factor } = plan;
                if accepted.is_none() && p.spare(proposal.q(), factor, 1.0 / gamma) <= 0.0 {
                    // All of p was to be accepted: up to rounding, this branch does not exist.
                    accepted = Some(siblings[0]);
                }
                if let Some(child) = accepted {
                    path.push(child);
                    node = child;
                    p.load(rows, node)?;
                    continue 'nodes;
                }
            }
            let bonus = p.pick(chance)?;
            return Ok(Verdict { path, bonus });
        }
    }
}

/// The threshold of one node, and the mass factor of what its siblings accept.
#[derive(Clone, Copy)]
struct Plan {
    gamma: f64,
    factor: f64,
}

/// Probability that one of k trials passes, each with probability `beta`.
fn any_of(k: usize, beta: f64) -> f64 {
    1.0 - (1.0 - beta).max(0.0).powi(k as i32)
}

impl Plan {
    /// Finds gamma: the equation is solved as if no token changed its branch of the minimum, and then with the
    /// branches at that gamma, until it holds.
    ///
    /// It stops on the upper side of the root, where the law is exact whatever the distance, and so near to it that
    /// no more than `NEAR` of the acceptance is lost.
    fn solve(p: &Weights, q: &[f64], k: usize) -> Self {
        const NEAR: f64 = 1e-6;
        let (mut low, mut high) = (1.0, k as f64);
        // Good drafts have their root here; 1 itself is tried where p = q may hold.
        let mut gamma = 1.0 + 0.2 * (high - 1.0);
        let mut one_is_left = high > 1.0;
        loop {
            let (below, above) = p.overlap(q, gamma);
            let beta = (above + below / gamma).min(1.0);
            if beta <= 0.0 {
                return Self { gamma, factor: 0.0 };
            }
            let excess = any_of(k, beta) - gamma * beta;
            if (-NEAR..=1e-13).contains(&excess) || high - low <= 1e-13 * high {
                let factor = (any_of(k, beta) / beta).min(gamma);
                return Self { gamma, factor };
            }
            if excess > 0.0 {
                low = gamma;
            } else {
                high = gamma;
            }
            let (mut from, mut to) = (low, high);
            while to - from > 1e-12 * to {
                let middle = 0.5 * (from + to);
                let frozen = (above + below / middle).min(1.0);
                match any_of(k, frozen) > middle * frozen {
                    true => from = middle,
                    false => to = middle,
                }
            }
            // A little further, so as to end above the root.
            let next = gamma + (1.0 + 1e-3) * (to - gamma);
            gamma = match next {
                _ if next > low && next < high => next,
                _ if next <= 1.0 && one_is_left => 1.0,
                _ => 0.5 * (low + high),
            };
            one_is_left &= gamma > 1.0;
        }
    }
}
