//! A network of seven tokens for tests: any function of the tokens below the root, with ties now and then.

use std::collections::HashMap;

use scylla_core::Result;
use scylla_core::plugin::{Committed, Matrix, Slot, Tap};

use crate::network::{Ids, Network, Nodes};

pub(crate) const VOCAB: usize = 7;

/// Logits after the tokens below the root: any function of them that has ties now and then.
pub(crate) fn logits(path: &[u32], seed: u64) -> Vec<f32> {
    let mut state = seed;
    for &t in path {
        state = (state ^ u64::from(t + 1)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        state ^= state >> 29;
    }
    (0..VOCAB)
        .map(|i| {
            let mixed = (state ^ i as u64).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40;
            (mixed % 9) as f32 / 2.0
        })
        .collect()
}

/// A network that is such a function.
pub(crate) struct Table {
    seed: u64,
    ids: Ids,
    /// Tokens below the root of each node forwarded, by slot.
    nodes: HashMap<Slot, Vec<Vec<u32>>>,
}

impl Table {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            ids: Ids::same(VOCAB, VOCAB),
            nodes: HashMap::new(),
        }
    }
}

impl Network for Table {
    fn taps(&self) -> Vec<Tap> {
        Vec::new()
    }
    fn ids(&self) -> &Ids {
        &self.ids
    }
    fn step_bytes(&self) -> usize {
        0
    }
    fn open(&mut self, _: Slot) -> Result<()> {
        Ok(())
    }
    fn close(&mut self, _: Slot) {}
    fn observe(&mut self, _: &Committed<'_>) -> Result<()> {
        Ok(())
    }
    fn room(&self, _: Slot) -> Option<usize> {
        Some(1000)
    }
    fn start(&mut self, slots: &[Slot], out: &mut Matrix) -> Result<()> {
        self.nodes = slots.iter().map(|&s| (s, Vec::new())).collect();
        let rows = slots.iter().flat_map(|_| logits(&[], self.seed));
        *out = Matrix::host(rows.collect(), VOCAB);
        Ok(())
    }
    fn expand(&mut self, nodes: &[Nodes<'_>], out: &mut Matrix) -> Result<()> {
        let mut rows = Vec::new();
        for n in nodes {
            let known = self.nodes.entry(n.slot).or_default();
            for (&token, &parent) in n.tokens.iter().zip(n.parents) {
                let mut path = parent.map_or(Vec::new(), |p| known[p].clone());
                path.push(token);
                rows.extend(logits(&path, self.seed));
                known.push(path);
            }
        }
        *out = Matrix::host(rows, VOCAB);
        Ok(())
    }
}
