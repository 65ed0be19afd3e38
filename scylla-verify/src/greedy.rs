//! Greedy tree verification.

use scylla_core::Result;
use scylla_core::plugin::{Chance, TargetRows, Verdict, Verifier};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Drawing, Tree};

/// Accepts the longest path whose tokens are the target's argmax after each parent, then the argmax as bonus.
///
/// Equal to greedy decoding for any tree; under sampling it would not follow the target's law.
#[derive(Debug, Clone, Copy, Default)]
pub struct Greedy;

impl Verifier for Greedy {
    fn name(&self) -> &str {
        "greedy"
    }

    fn exact_for(&self, _drawing: Drawing, _width: usize, sampling: &Sampling) -> bool {
        sampling.is_greedy()
    }

    fn verify(&self, tree: &Tree, rows: &dyn TargetRows, _: &mut dyn Chance) -> Result<Verdict> {
        let mut path = Vec::new();
        let mut node = 0;
        loop {
            let best = rows.argmax(&[node])?[0];
            match tree
                .children(node)
                .find(|&child| tree.tokens[child] == best)
            {
                Some(child) => {
                    path.push(child);
                    node = child;
                }
                None => return Ok(Verdict { path, bonus: best }),
            }
        }
    }
}
