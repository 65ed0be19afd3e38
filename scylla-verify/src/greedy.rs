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
        // Nodes that stand for the same accepted tokens: independent draws may hold one twice, with other children.
        let mut here = vec![0];
        loop {
            let best = rows.argmax(&here[..1])?[0];
            let matching = |&node: &usize| tree.tokens[node] == best;
            let children = here.iter().flat_map(|&node| tree.children(node));
            let next: Vec<usize> = children.filter(matching).collect();
            if next.is_empty() {
                return Ok(Verdict {
                    path: tree.path_to(here[0]),
                    bonus: best,
                });
            }
            here = next;
        }
    }
}
