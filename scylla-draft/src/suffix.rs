//! A suffix automaton over prompt and output: proposes what most often followed the longest suffix seen before.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use scylla_core::plugin::{Committed, DraftModel, Price, Request, Slot};
use scylla_core::sampling::Sampling;
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Error, Result};

use crate::tree::Scored;

/// Suffix drafting (as SAM decoding, arXiv:2411.10666, with the frequency-weighted trees of SuffixDecoding,
/// arXiv:2411.04975). Point masses, so it needs no q and is exact under any rule for deterministic trees.
///
/// The automaton grows by amortised constant work per token and knows the longest suffix of the text that occurred
/// before, of any length, at no cost. Branches are tried by how often they followed, later ones first among equals.
///
/// How probable a node is, it tells from how often matches of its length were right in this text until now ([`Trust`]): a
/// branch of a match of n tokens is believed by that, and by its share among those that followed; what shorter matches add
/// shares what longer ones leave. Nodes that are not worth a row ([`DraftModel::price`]) are left out.
#[derive(Debug, Clone)]
pub struct Suffix {
    shortest: usize,
    per_match: f64,
    price: Price,
    slots: HashMap<Slot, Automaton>,
}

impl Suffix {
    /// Matches of at least `shortest` tokens; a match of `n` tokens proposes at most `per_match * n` levels.
    ///
    /// # Errors
    /// If `shortest` is 0 or `per_match` is not positive.
    pub fn new(shortest: usize, per_match: f64) -> Result<Self> {
        if shortest == 0 || per_match.is_nan() || per_match <= 0.0 {
            return Err(Error::Invalid(format!(
                "suffix draft: shortest {shortest} must be at least 1, per_match {per_match} above 0"
            )));
        }
        Ok(Self {
            shortest,
            per_match,
            price: Price::default(),
            slots: HashMap::new(),
        })
    }

    /// Grows a tree for one request, of all nodes that may pay.
    pub(crate) fn scored(&self, request: &Request<'_>) -> Scored {
        let mut scored = Scored {
            tree: Tree::root(request.root),
            scores: vec![0.0],
        };
        let Some(automaton) = self.slots.get(&request.slot) else {
            return scored;
        };
        // In a repetitive text every suffix says the same: a few in a row that add nothing are the end.
        let least = self.price.least();
        let (mut idle, mut left) = (0, 1.0);
        for state in automaton.matches(self.shortest).take(COUNTED) {
            if scored.tree.len() >= request.budget.total || idle > 3 {
                break;
            }
            let before = scored.tree.len();
            let length = automaton.states[state].len;
            let levels = (self.per_match * length as f64).ceil() as usize;
            let budget = request.budget.within(levels, request.budget.total);
            let from = Match {
                state,
                length,
                left,
            };
            if budget.levels() > 0 {
                grow(automaton, from, budget, least, &mut scored);
            }
            idle = match scored.tree.len() == before {
                true => idle + 1,
                false => 0,
            };
            left *= 1.0 - automaton.trust.of(length);
        }
        scored
    }
}

/// How often what most often followed a match of some length came next, in one text.
#[derive(Debug, Clone, Default)]
struct Trust([(f64, f64); LENGTHS.len()]);

/// Matches by length, from so many tokens on, and the share of them that is right before a text has shown its own: what the
/// default model's answers to the dev prompts have.
const LENGTHS: [(usize, f64); 8] = [
    (1, 0.2),
    (2, 0.48),
    (3, 0.57),
    (4, 0.72),
    (5, 0.85),
    (7, 0.86),
    (10, 0.92),
    (16, 0.95),
];
/// Matches that weigh as much as what was believed before.
const BELIEF: f64 = 10.0;

impl Trust {
    fn kind(length: usize) -> usize {
        LENGTHS.partition_point(|&(from, _)| from <= length).max(1) - 1
    }

    /// A match of so many tokens was right, or not.
    fn add(&mut self, length: usize, right: bool) {
        let (hits, seen) = &mut self.0[Self::kind(length)];
        *hits += f64::from(u8::from(right));
        *seen += 1.0;
    }

    /// The share of matches of so many tokens that is right.
    fn of(&self, length: usize) -> f64 {
        let kind = Self::kind(length);
        let (hits, seen) = self.0[kind];
        (hits + LENGTHS[kind].1 * BELIEF) / (seen + BELIEF)
    }
}

/// Strings of the text that end at the same places.
#[derive(Debug, Clone)]
struct State {
    /// Length of the longest of them.
    len: usize,
    /// State of its longest suffix that ends in more places; the initial state's is itself.
    link: usize,
    /// Next tokens and their states, by token.
    next: Vec<(u32, usize)>,
    /// Places it ended at, and the last of them, as far as they were counted.
    count: u32,
    recent: usize,
}

impl State {
    fn step(&self, token: u32) -> Option<usize> {
        let at = self.next.binary_search_by_key(&token, |n| n.0).ok()?;
        Some(self.next[at].1)
    }

    fn set(&mut self, token: u32, state: usize) {
        match self.next.binary_search_by_key(&token, |n| n.0) {
            Ok(at) => self.next[at].1 = state,
            Err(at) => self.next.insert(at, (token, state)),
        }
    }
}

/// Suffixes whose places are counted at each token: all of them in ordinary text, a bound in repetitive ones.
const COUNTED: usize = 32;

#[derive(Debug, Clone)]
struct Automaton {
    states: Vec<State>,
    /// State of the whole text.
    last: usize,
    len: usize,
    trust: Trust,
}

impl Default for Automaton {
    fn default() -> Self {
        Self {
            states: vec![State {
                len: 0,
                link: 0,
                next: Vec::new(),
                count: 0,
                recent: 0,
            }],
            last: 0,
            len: 0,
            trust: Trust::default(),
        }
    }
}

impl Automaton {
    /// What follows the text: whether its longest match said so is remembered.
    fn follow(&mut self, token: u32) {
        let longest = self.matches(1).next();
        if let Some(state) = longest {
            let length = self.states[state].len;
            let said = self.said(state);
            self.trust.add(length, said == Some(token));
        }
        self.push(token);
    }

    /// What most often followed a state, the latest of equals.
    fn said(&self, state: usize) -> Option<u32> {
        let next = self.states[state].next.iter();
        let order = |&&(token, s): &&(u32, usize)| {
            let state = &self.states[s];
            (state.count.max(1), state.recent, u32::MAX - token)
        };
        next.max_by_key(order).map(|&(token, _)| token)
    }

    /// Appends a token (Blumer et al. 1985).
    fn push(&mut self, token: u32) {
        self.len += 1;
        let new = self.states.len();
        self.states.push(State {
            len: self.len,
            link: 0,
            next: Vec::new(),
            count: 1,
            recent: self.len,
        });
        let mut at = self.last;
        let known = loop {
            if let Some(known) = self.states[at].step(token) {
                break Some(known);
            }
            self.states[at].set(token, new);
            if at == 0 {
                break None;
            }
            at = self.states[at].link;
        };
        if let Some(known) = known {
            self.states[new].link = match self.states[at].len + 1 == self.states[known].len {
                true => known,
                false => self.split(at, token, known),
            };
        }
        self.last = new;
        let mut at = self.states[new].link;
        for _ in 0..COUNTED {
            if at == 0 {
                break;
            }
            self.states[at].count += 1;
            self.states[at].recent = self.len;
            at = self.states[at].link;
        }
    }

    /// Splits off the strings of `known` that are as short as `at` and `token`.
    fn split(&mut self, mut at: usize, token: u32, known: usize) -> usize {
        let short = self.states.len();
        let mut state = self.states[known].clone();
        state.len = self.states[at].len + 1;
        self.states.push(state);
        self.states[known].link = short;
        while self.states[at].step(token) == Some(known) {
            self.states[at].set(token, short);
            if at == 0 {
                break;
            }
            at = self.states[at].link;
        }
        short
    }

    /// States of the suffixes that occurred before, the longest first.
    fn matches(&self, shortest: usize) -> impl Iterator<Item = usize> + '_ {
        let link = |&at: &usize| Some(self.states[at].link);
        let long = move |&at: &usize| at != 0 && self.states[at].len >= shortest;
        std::iter::successors(link(&self.last), link).take_while(long)
    }
}

/// A branch that may be added to the tree.
struct Candidate {
    /// Estimated probability of its path.
    score: f64,
    recent: usize,
    parent: usize,
    depth: usize,
    token: u32,
    state: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let score = self.score.total_cmp(&other.score);
        score
            .then(self.recent.cmp(&other.recent))
            .then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// A match to go on from.
struct Match {
    state: usize,
    /// Its tokens.
    length: usize,
    /// What longer matches leave it of all probability.
    left: f64,
}

/// Grows a tree from one match, the most probable branch first, as long as they are held at least so probable; branches that
/// are there already are followed.
fn grow(automaton: &Automaton, from: Match, budget: Budget, least: f64, scored: &mut Scored) {
    let mut heap = BinaryHeap::new();
    let offer = |heap: &mut BinaryHeap<Candidate>, parent, depth, state: usize, score: f64| {
        let next = &automaton.states[state].next;
        let count = |s: usize| f64::from(automaton.states[s].count.max(1));
        let sum: f64 = next.iter().map(|&(_, s)| count(s)).sum();
        let score = score * automaton.trust.of(from.length + depth - 1);
        heap.extend(next.iter().map(|&(token, state)| Candidate {
            score: score * count(state) / sum,
            recent: automaton.states[state].recent,
            parent,
            depth,
            token,
            state,
        }));
    };
    offer(&mut heap, 0, 1, from.state, from.left);
    while let Some(best) = heap.pop() {
        if best.score < least {
            return;
        }
        let tree = &mut scored.tree;
        let same = |&child: &usize| tree.tokens[child] == best.token;
        let known = tree.children(best.parent).find(same);
        let node = match known {
            Some(node) => {
                let score = &mut scored.scores[node];
                *score = score.max(best.score.ln());
                node
            }
            None if tree.len() >= budget.total => return,
            None if tree.children(best.parent).count() >= budget.width => continue,
            None => {
                scored.scores.push(best.score.ln());
                tree.push(best.parent, best.token)
            }
        };
        if best.depth < budget.levels() {
            offer(&mut heap, node, best.depth + 1, best.state, best.score);
        }
    }
}

impl DraftModel for Suffix {
    fn drawing(&self, _sampling: &Sampling) -> Drawing {
        Drawing::Deterministic
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.slots.insert(slot, Automaton::default());
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        self.slots.remove(&slot);
    }

    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        for c in committed {
            let closed = || Error::Invalid(format!("slot {} is not open", c.slot));
            let automaton = self.slots.get_mut(&c.slot).ok_or_else(closed)?;
            for &token in c.tokens {
                automaton.follow(token);
            }
        }
        Ok(())
    }

    fn price(&mut self, price: &Price) {
        self.price.clone_from(price);
    }

    fn weighs(&self, _: &Sampling) -> bool {
        true
    }

    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        let propose = |r: &Request<'_>| self.scored(r).worth(r.budget, &self.price);
        requests.iter().map(propose).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use scylla_core::chance::Seeded;

    fn automaton(tokens: &[u32]) -> Automaton {
        let mut automaton = Automaton::default();
        for &token in tokens {
            automaton.push(token);
        }
        automaton
    }

    fn propose(tokens: &[u32], shortest: usize, budget: Budget) -> Tree {
        let mut draft = Suffix::new(shortest, 4.0).expect("settings");
        draft.open(0).expect("open");
        let committed = Committed {
            slot: 0,
            tokens,
            path: &[],
            taps: &[],
        };
        draft.observe(&[committed]).expect("observe");
        let request = Request {
            slot: 0,
            root: tokens[tokens.len() - 1],
            budget,
            sampling: &Sampling::default(),
            chance: &mut Seeded::new(0, 0),
        };
        draft.propose(&mut [request]).expect("propose").remove(0)
    }

    #[test]
    fn what_followed_the_longest_match_comes_first() {
        // 1 2 3 was followed by 7; a bare 3, later, by 9.
        let tree = propose(&[1, 2, 3, 7, 8, 3, 9, 1, 2, 3], 1, Budget::chain(2));
        assert_eq!(tree.tokens, [3, 7, 8]);
    }

    #[test]
    fn the_more_frequent_branch_comes_first_and_the_later_of_equals() {
        let wide = Budget {
            total: 3,
            width: 2,
            depth: 0,
        };
        let tree = propose(&[1, 5, 1, 6, 1, 5, 1, 7, 1], 1, wide);
        assert_eq!(tree.tokens, [1, 5, 7]);
        let tree = propose(&[1, 5, 1, 6, 1], 1, wide);
        assert_eq!(tree.tokens, [1, 6, 5]);
    }

    #[test]
    fn without_a_match_the_root_stands_alone() {
        assert!(propose(&[1, 2, 3], 1, Budget::chain(5)).is_empty());
        assert!(propose(&[1, 2, 1], 2, Budget::chain(5)).is_empty());
        assert!(Suffix::new(0, 1.0).is_err() && Suffix::new(1, 0.0).is_err());
    }

    proptest! {
        #[test]
        fn the_longest_repeated_suffix_is_found_and_counted(tokens in prop::collection::vec(0u32..4, 1..25)) {
            let automaton = automaton(&tokens);
            let n = tokens.len();
            let ends = |len: usize| (len..=n).filter(|&e| tokens[e - len..e] == tokens[n - len..]).count();
            let longest = (1..n).rev().find(|&len| ends(len) > 1);
            let first = automaton.matches(1).next();
            prop_assert_eq!(first.map(|s| automaton.states[s].len), longest);
            for state in automaton.matches(1) {
                let state = &automaton.states[state];
                prop_assert_eq!(state.count as usize, ends(state.len));
                prop_assert_eq!(state.recent, n);
            }
        }

        #[test]
        fn trees_keep_the_budget_and_repeat_what_was_seen(
            tokens in prop::collection::vec(0u32..4, 1..80), total in 1usize..20, width in 1usize..4, depth in 0usize..6,
        ) {
            let budget = Budget { total, width, depth };
            let tree = propose(&tokens, 1, budget);
            prop_assert!(tree.check(tokens[tokens.len() - 1], 4, budget).is_ok());
            prop_assert!(tree.width() <= width);
            for node in 1..tree.len() {
                let path = tree.tokens_to(node);
                prop_assert!(tokens.windows(path.len()).any(|w| w == path));
            }
        }
    }
}
