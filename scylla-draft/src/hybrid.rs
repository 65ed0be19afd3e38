//! Two drafts in one tree: what the text repeats, and what a trained network expects.

use scylla_core::plugin::{Committed, DraftModel, Price, Request, Slot, Tap};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Error, Result};

use crate::Suffix;
use crate::tree::{Scored, TreeDraft};

/// [`Suffix`] and a network, whose trees become one: a node that both propose stands once, as probable as the surer of the two
/// holds it, and the most probable nodes of both are kept. Where the text's match is sure enough the network is not asked.
///
/// All children are point masses, so that the tree is exact under any rule for deterministic trees, as those of its parts are.
pub struct Hybrid {
    repeats: Suffix,
    network: TreeDraft,
    /// Probability of the match's first token from which on the network is not asked.
    sure: f64,
    price: Price,
}

impl Hybrid {
    /// Of a draft by repetition and one with a network.
    ///
    /// # Errors
    /// If the network's trees are drawn at random, whose nodes may not be chosen by value, or `sure` is not a number.
    pub fn new(repeats: Suffix, network: TreeDraft, sure: f64) -> Result<Self> {
        let sampled = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let drawing = network.drawing(&sampled);
        if drawing != Drawing::Deterministic {
            return Err(Error::Invalid(format!(
                "a hybrid draft chooses among the nodes of both its parts by value, so its network may not draw them at random \
                 ({drawing}); draft.drawing = \"deterministic\""
            )));
        }
        if sure.is_nan() {
            return Err(Error::Invalid("hybrid draft: sure is not a number".into()));
        }
        Ok(Self {
            repeats,
            network,
            sure,
            price: Price::default(),
        })
    }
}

/// The nodes of both.
fn merged(repeats: Scored, network: &Scored) -> Scored {
    let Scored {
        mut tree,
        mut scores,
    } = repeats;
    // Where the network's nodes stand among all.
    let mut places = vec![0; network.tree.len()];
    for node in 1..network.tree.len() {
        let parent = places[network.tree.parents[node]];
        let (token, score) = (network.tree.tokens[node], network.scores[node]);
        let known = tree.children(parent).find(|&c| tree.tokens[c] == token);
        places[node] = match known {
            Some(child) => {
                scores[child] = scores[child].max(score);
                child
            }
            None => {
                scores.push(score);
                tree.push(parent, token)
            }
        };
    }
    Scored { tree, scores }
}

impl DraftModel for Hybrid {
    fn taps(&self) -> Vec<Tap> {
        self.network.taps()
    }

    fn drawing(&self, _: &Sampling) -> Drawing {
        Drawing::Deterministic
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.network.open(slot)?;
        self.repeats.open(slot)
    }

    fn close(&mut self, slot: Slot) {
        self.network.close(slot);
        self.repeats.close(slot);
    }

    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        self.repeats.observe(committed)?;
        self.network.observe(committed)
    }

    fn price(&mut self, price: &Price) {
        self.repeats.price(price);
        self.network.price(price);
        self.price.clone_from(price);
    }

    fn weighs(&self, _: &Sampling) -> bool {
        true
    }

    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        let repeats: Vec<Scored> = requests.iter().map(|r| self.repeats.scored(r)).collect();
        let sure = |scored: &Scored| scored.scores.get(1).is_some_and(|s| s.exp() >= self.sure);
        let mut asked: Vec<Request<'_>> = requests
            .iter_mut()
            .zip(&repeats)
            .map(|(r, scored)| Request {
                slot: r.slot,
                root: r.root,
                budget: if sure(scored) { Budget::OFF } else { r.budget },
                sampling: r.sampling,
                chance: &mut *r.chance,
            })
            .collect();
        let network = self.network.propose_scored(&mut asked)?;
        let both = repeats.into_iter().zip(&network).zip(requests);
        both.map(|((repeats, network), r)| merged(repeats, network).worth(r.budget, &self.price))
            .collect()
    }

    fn fork(&mut self, from: Slot, to: Slot, tokens: &[u32]) -> Result<bool> {
        if !self.network.fork(from, to, tokens)? {
            return Ok(false);
        }
        self.repeats.open(to)?;
        let told = Committed {
            slot: to,
            tokens,
            path: &[],
            taps: &[],
        };
        self.repeats.observe(&[told])?;
        Ok(true)
    }

    fn slot_bytes(&self, positions: usize) -> usize {
        self.network.slot_bytes(positions)
    }

    fn trim(&mut self) {
        self.network.trim();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use scylla_core::chance::Seeded;

    use super::*;
    use crate::tree::TreeSettings;
    use crate::tree::table::{Table, VOCAB};

    fn draft(seed: u64, sure: f64) -> Hybrid {
        let network = TreeDraft::new(Table::new(seed), &TreeSettings::default()).expect("network");
        let repeats = Suffix::new(1, 4.0).expect("settings");
        Hybrid::new(repeats, network, sure).expect("hybrid")
    }

    fn told(draft: &mut impl DraftModel, tokens: &[u32]) {
        draft.open(0).expect("open");
        let committed = Committed {
            slot: 0,
            tokens,
            path: &[],
            taps: &[],
        };
        draft.observe(&[committed]).expect("observe");
    }

    fn propose(draft: &mut impl DraftModel, root: u32, budget: Budget) -> Tree {
        let sampling = Sampling::default();
        let request = Request {
            slot: 0,
            root,
            budget,
            sampling: &sampling,
            chance: &mut Seeded::new(0, 0),
        };
        draft.propose(&mut [request]).expect("propose").remove(0)
    }

    #[test]
    fn a_sure_match_stands_alone_and_without_one_the_network_does() {
        let budget = Budget {
            total: 9,
            width: 2,
            depth: 3,
        };
        let text = [1, 2, 3, 1, 2, 3, 1, 2];
        let mut suffix = Suffix::new(1, 4.0).expect("settings");
        told(&mut suffix, &text);
        let mut sure = draft(5, 0.0);
        told(&mut sure, &text);
        assert_eq!(
            propose(&mut sure, 2, budget),
            propose(&mut suffix, 2, budget)
        );

        let mut network = TreeDraft::new(Table::new(5), &TreeSettings::default()).expect("network");
        let mut unseen = draft(5, 0.0);
        told(&mut unseen, &[1, 2, 3]);
        told(&mut network, &[1, 2, 3]);
        let paths = |tree: &Tree| {
            let mut paths: Vec<Vec<u32>> = (0..tree.len()).map(|n| tree.tokens_to(n)).collect();
            paths.sort();
            paths
        };
        let (a, b) = (
            propose(&mut unseen, 3, budget),
            propose(&mut network, 3, budget),
        );
        assert_eq!(paths(&a), paths(&b));
    }

    #[test]
    fn a_network_that_draws_at_random_is_refused() {
        let settings = TreeSettings {
            tree: crate::tree::TreeKind::Chain,
            ..TreeSettings::default()
        };
        let network = TreeDraft::new(Table::new(1), &settings).expect("network");
        let repeats = Suffix::new(1, 4.0).expect("settings");
        let error = Hybrid::new(repeats, network, 0.8).err().expect("refused");
        assert!(error.to_string().contains("at random"), "{error}");
    }

    proptest! {
        #[test]
        fn trees_hold_the_best_nodes_of_both_within_the_budget(
            seed in 0u64..100_000, tokens in prop::collection::vec(0u32..VOCAB as u32, 1..40),
            total in 1usize..20, width in 1usize..5, depth in 0usize..5,
        ) {
            let budget = Budget { total, width, depth };
            let mut both = draft(seed, 2.0);
            let mut network = TreeDraft::new(Table::new(seed), &TreeSettings::default()).expect("network");
            let mut suffix = Suffix::new(1, 4.0).expect("settings");
            told(&mut both, &tokens);
            told(&mut network, &tokens);
            told(&mut suffix, &tokens);
            let root = tokens[tokens.len() - 1];
            let tree = propose(&mut both, root, budget);
            prop_assert!(tree.check(root, VOCAB, budget).is_ok());
            let parts = [propose(&mut network, root, budget), propose(&mut suffix, root, budget)];
            let mut known: Vec<Vec<u32>> = parts
                .iter()
                .flat_map(|part| (0..part.len()).map(|n| part.tokens_to(n)))
                .collect();
            known.sort();
            known.dedup();
            for node in 0..tree.len() {
                prop_assert!(known.contains(&tree.tokens_to(node)));
            }
            // What is left out had no room.
            prop_assert!(tree.len() == known.len() || tree.len() == total || tree.width() == width);
        }
    }
}
