//! Two drafts in one tree: what the text repeats, and what a trained network expects.

use std::collections::HashMap;

use scylla_core::plugin::{Committed, DraftModel, Price, Request, Slot, Tap};
use scylla_core::policy::{Acceptance, cut};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Error, Result};

use crate::Suffix;
use crate::tree::{Scored, TreeDraft};

/// [`Suffix`] and a network.
///
/// Where all children are point masses their trees become one: a node that both propose stands once, as probable as the surer of
/// the two holds it, and the most probable nodes of both are kept. Where the text's match is sure enough the network is not asked.
///
/// Where the network draws its trees at random, for sampled text, what was drawn may not be chosen by value, so a tree is of one
/// of the two: of the match where that is sure, else of the network, with as many levels as have paid in this text until then.
/// Which of them it is hangs on what was there before, so that both are exact under a rule that is for point masses and for trees
/// that are drawn so.
pub struct Hybrid {
    repeats: Suffix,
    network: TreeDraft,
    /// Probability of the match's first token from which on the network is not asked.
    sure: f64,
    price: Price,
    drawn: HashMap<Slot, Drawn>,
}

/// How the network's drawn trees fared in a text.
#[derive(Default)]
struct Drawn {
    acceptance: Acceptance,
    /// Levels that were allowed, and the tree, while its verdict is awaited.
    last: Option<(usize, Tree)>,
}

/// The share of drawn tokens that is accepted given the level above, before a text has shown its own: what the shipped drafts have
/// of the dev prompts at temperature 1. So many cycles it weighs.
const ACCEPTED: f64 = 0.42;
const BELIEF: f64 = 10.0;

impl Drawn {
    /// The limits of a drawn tree that is worth most at a price; all that are given, where there is none.
    fn worth(&self, most: Budget, price: &Price) -> Budget {
        if !price.is_known() {
            return most;
        }
        let ((mut value, mut best), mut sums, mut above) = ((0.0, 0), (0.0, 0.0), 1.0);
        for depth in 0..most.levels() {
            let hope = (1.0, above * ACCEPTED);
            let (nodes, accepted) = self.acceptance.at(depth, hope, BELIEF);
            above = accepted.min(above);
            sums = (sums.0 + nodes, sums.1 + above);
            let now = sums.1 - price.of(sums.0.ceil() as usize) - price.level * depth as f64;
            if now > value {
                (value, best) = (now, depth + 1);
            }
        }
        cut(most, best)
    }
}

impl Hybrid {
    /// Of a draft by repetition and one with a network.
    ///
    /// # Errors
    /// If `sure` is not a number.
    pub fn new(repeats: Suffix, network: TreeDraft, sure: f64) -> Result<Self> {
        if sure.is_nan() {
            return Err(Error::Invalid("hybrid draft: sure is not a number".into()));
        }
        Ok(Self {
            repeats,
            network,
            sure,
            price: Price::default(),
            drawn: HashMap::new(),
        })
    }

    fn is_drawn(&self, sampling: &Sampling) -> bool {
        self.network.drawing(sampling) != Drawing::Deterministic
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

    fn drawing(&self, sampling: &Sampling) -> Drawing {
        self.network.drawing(sampling)
    }

    fn mixes(&self, sampling: &Sampling) -> bool {
        self.is_drawn(sampling)
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.network.open(slot)?;
        self.drawn.insert(slot, Drawn::default());
        self.repeats.open(slot)
    }

    fn close(&mut self, slot: Slot) {
        self.network.close(slot);
        self.drawn.remove(&slot);
        self.repeats.close(slot);
    }

    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        for c in committed {
            if let Some(drawn) = self.drawn.get_mut(&c.slot)
                && let Some((levels, tree)) = drawn.last.take()
            {
                let accepted = c.tokens.len().saturating_sub(1);
                drawn.acceptance.add(levels, &tree, accepted);
            }
        }
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
        let limits = |(r, repeats): (&Request<'_>, &Scored)| {
            let first = repeats.scores.get(1);
            match self.drawn.get(&r.slot) {
                _ if first.is_some_and(|s| s.exp() >= self.sure) => Budget::OFF,
                Some(drawn) if self.is_drawn(r.sampling) => drawn.worth(r.budget, &self.price),
                _ => r.budget,
            }
        };
        let limits: Vec<Budget> = requests.iter().zip(&repeats).map(limits).collect();
        let mut asked: Vec<Request<'_>> = requests
            .iter_mut()
            .zip(&limits)
            .map(|(r, &budget)| Request {
                slot: r.slot,
                root: r.root,
                budget,
                sampling: r.sampling,
                chance: &mut *r.chance,
            })
            .collect();
        let network = self.network.propose_scored(&mut asked)?;
        let mut trees = Vec::with_capacity(requests.len());
        let parts = repeats.into_iter().zip(network).zip(limits);
        for (r, ((repeats, network), limits)) in requests.iter().zip(parts) {
            let tree = match self.drawn.get_mut(&r.slot) {
                Some(drawn) if network.tree.drawing != Drawing::Deterministic => {
                    // What was passed over is believed to do less badly than it did, so that it is tried again.
                    drawn.last = Some((limits.levels(), network.tree.clone()));
                    match limits.levels() {
                        0 => repeats.worth(r.budget, &self.price)?,
                        _ => network.tree,
                    }
                }
                _ => merged(repeats, &network).worth(r.budget, &self.price)?,
            };
            trees.push(tree);
        }
        Ok(trees)
    }

    fn fork(&mut self, from: Slot, to: Slot, tokens: &[u32]) -> Result<bool> {
        if !self.network.fork(from, to, tokens)? {
            return Ok(false);
        }
        self.drawn.insert(to, Drawn::default());
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

    fn sampled(sure: f64) -> Hybrid {
        let settings = TreeSettings {
            tree: crate::tree::TreeKind::Auto,
            ..TreeSettings::default()
        };
        let network = TreeDraft::new(Table::new(1), &settings).expect("network");
        let repeats = Suffix::new(1, 4.0).expect("settings");
        Hybrid::new(repeats, network, sure).expect("hybrid")
    }

    fn at(temperature: f64) -> Sampling {
        Sampling {
            temperature,
            ..Sampling::default()
        }
    }

    fn draw(draft: &mut Hybrid, sampling: &Sampling) -> Tree {
        let request = Request {
            slot: 0,
            root: 2,
            budget: Budget::chain(3),
            sampling,
            chance: &mut Seeded::new(0, 0),
        };
        let tree = draft.propose(&mut [request]).expect("propose").remove(0);
        tree.check(2, VOCAB, Budget::chain(3)).expect("sound");
        tree
    }

    #[test]
    fn sampled_text_gets_the_match_where_it_is_sure_and_else_what_the_network_draws() {
        let text = [1, 2, 3, 1, 2, 3, 1, 2];
        for (sure, drawing) in [
            (0.0, Drawing::Deterministic),
            (2.0, Drawing::WithoutReplacement),
        ] {
            let mut draft = sampled(sure);
            told(&mut draft, &text);
            assert!(draft.mixes(&at(1.0)) && !draft.mixes(&at(0.0)));
            assert_eq!(draft.drawing(&at(1.0)), Drawing::WithoutReplacement);
            let tree = draw(&mut draft, &at(1.0));
            assert_eq!((tree.drawing, tree.len()), (drawing, 4));
            let greedy = draw(&mut draft, &at(0.0));
            assert_eq!(greedy.drawing, Drawing::Deterministic);
        }
    }

    #[test]
    fn levels_are_drawn_as_long_as_they_pay() {
        let mut draft = sampled(2.0);
        told(&mut draft, &[1, 2]);
        draft.price(&Price {
            rows: vec![0.05, 0.1, 0.15],
            level: 0.1,
        });
        // 0.42, 0.18 and 0.07 are expected, of which 0.05, 0.15 and 0.15 are lost.
        assert_eq!(draw(&mut draft, &at(1.0)).len(), 3);
        let levels = |draft: &Hybrid| {
            let limits = draft.drawn[&0].worth(Budget::chain(3), &draft.price);
            limits.levels()
        };
        let accept = |draft: &mut Hybrid, cycles: usize, accepted: u32| {
            for _ in 0..cycles {
                draw(draft, &at(1.0));
                let tokens: Vec<u32> = (0..=accepted).collect();
                let committed = Committed {
                    slot: 0,
                    tokens: &tokens,
                    path: &[],
                    taps: &[],
                };
                draft.observe(&[committed]).expect("observe");
            }
        };
        accept(&mut draft, 200, 3);
        assert_eq!(levels(&draft), 3);
        draft.price(&Price {
            rows: vec![0.2, 0.4, 0.6],
            level: 0.1,
        });
        let mut tried = Vec::new();
        for _ in 0..300 {
            accept(&mut draft, 1, 0);
            tried.push(levels(&draft));
        }
        let none = tried.iter().filter(|&&levels| levels == 0).count();
        assert!(
            (50..290).contains(&none) && tried[250..].contains(&1),
            "passed over, and tried again: {tried:?}"
        );
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
