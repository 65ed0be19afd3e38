//! The model or method that proposes.

use std::ops::Range;

use super::{Chance, Matrix, Slot, Tap};
use crate::sampling::Sampling;
use crate::tree::{Budget, Drawing, Tree};
use crate::{Error, Result};

/// What became final in a slot since the draft last heard of it.
///
/// Tokens run one ahead of features: the root of the next tree is known before it is forwarded. Feature `i` of
/// a sequence belongs with token `i + 1`.
#[derive(Debug, Clone)]
pub struct Committed<'a> {
    /// Where.
    pub slot: Slot,
    /// Newly final tokens, in order.
    pub tokens: &'a [u32],
    /// Rows of `taps` that were kept, in order: the newly forwarded positions.
    pub path: &'a [usize],
    /// One matrix per tap of [`DraftModel::taps`].
    pub taps: &'a [Matrix],
}

/// What is asked of a draft for one slot.
pub struct Request<'a> {
    /// Where.
    pub slot: Slot,
    /// The last committed token, root of the tree.
    pub root: u32,
    /// Limits of the tree.
    pub budget: Budget,
    /// The transform that p passes through; q must pass through the same.
    pub sampling: &'a Sampling,
    /// The slot's random stream.
    pub chance: &'a mut dyn Chance,
}

/// What a draft could propose below a root: all that its trees within some limits are chosen from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Candidates {
    /// `[N]`, the root's first; parents before children, and the children of a node side by side, best first.
    pub tokens: Vec<u32>,
    /// Log-probability of each given its parent `[N]`, the root's 0: multiples of [`Candidates::UNIT`].
    pub logs: Vec<f64>,
    /// Children of each node that the draft was asked about; `None` of others `[N]`.
    pub children: Vec<Option<Range<usize>>>,
    /// Children that a node has at most: tokens that the draft can propose.
    pub most: usize,
}

impl Candidates {
    /// What log-probabilities are counted in, so that their sums are exact and a path's score does not depend on the order
    /// in which it is added up.
    pub const UNIT: f64 = 1.0 / (1u64 << 30) as f64;

    /// The root alone.
    pub fn root(token: u32, most: usize) -> Self {
        Self {
            tokens: vec![token],
            logs: vec![0.0],
            children: vec![None],
            most,
        }
    }

    /// A log-probability as the nearest multiple of [`Candidates::UNIT`], at least -2^20.
    pub fn counted(log: f64) -> f64 {
        (log.max(-1048576.0) / Self::UNIT).round() * Self::UNIT
    }

    /// Adds the children of a node, best first.
    pub fn expand(&mut self, node: usize, children: impl IntoIterator<Item = (u32, f64)>) {
        let first = self.tokens.len();
        for (token, log) in children {
            self.tokens.push(token);
            self.logs.push(log);
            self.children.push(None);
        }
        self.children[node] = Some(first..self.tokens.len());
    }

    /// The child of a node that has a token.
    pub fn child(&self, node: usize, token: u32) -> Option<usize> {
        let children = self.children[node].clone()?;
        children.into_iter().find(|&c| self.tokens[c] == token)
    }

    /// The node that tokens below the root lead to.
    pub fn at(&self, below: &[u32]) -> Option<usize> {
        below
            .iter()
            .try_fold(0, |node, &token| self.child(node, token))
    }
}

/// What drafting costs, in the tokens that the decoder would commit meanwhile.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Price {
    /// What `n + 1` nodes below a root take, ascending; empty where nothing is known.
    pub rows: Vec<f64>,
    /// What a level of drafting behind the first takes of each request.
    pub level: f64,
}

impl Price {
    /// Whether rows have one.
    pub fn is_known(&self) -> bool {
        !self.rows.is_empty()
    }

    /// What `nodes` below a root take. Beyond those that have a price each costs what the last of them adds.
    pub fn of(&self, nodes: usize) -> f64 {
        let rows = &self.rows;
        match (nodes.checked_sub(1), rows.last()) {
            (None, _) | (_, None) => 0.0,
            (Some(at), Some(&last)) => rows.get(at).copied().unwrap_or_else(|| {
                let step = last - rows.len().checked_sub(2).map_or(0.0, |at| rows[at]);
                last + step * (nodes - rows.len()) as f64
            }),
        }
    }

    /// How many of a tree's nodes are worth their rows, their probabilities descending: those whose expected tokens exceed what
    /// they cost by most; all where rows have no price.
    pub fn paying(&self, probabilities: impl Iterator<Item = f64>) -> usize {
        if !self.is_known() {
            return probabilities.count();
        }
        let ((mut most, mut best), mut sum) = ((0.0, 0), 0.0);
        for (n, p) in probabilities.enumerate() {
            sum += p;
            let value = sum - self.of(n + 1);
            if value > most {
                (most, best) = (value, n + 1);
            }
        }
        best
    }

    /// The least probability at which a node may be worth a row, whatever stands beside it.
    pub fn least(&self) -> f64 {
        let before = std::iter::once(&0.0).chain(&self.rows);
        let steps = self
            .rows
            .iter()
            .zip(before)
            .map(|(row, before)| row - before);
        match self.is_known() {
            true => steps.fold(1.0, f64::min).max(0.0),
            false => 0.0,
        }
    }
}

/// The model or method that proposes.
///
/// ```
/// use scylla_core::plugin::{Committed, DraftModel, Request, Slot};
/// use scylla_core::sampling::Sampling;
/// use scylla_core::tree::{Drawing, Tree};
///
/// /// Proposes that the last token is repeated.
/// struct Echo;
///
/// impl DraftModel for Echo {
///     fn drawing(&self, _: &Sampling) -> Drawing {
///         Drawing::Deterministic // point masses: no q is needed
///     }
///     fn open(&mut self, _: Slot) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn close(&mut self, _: Slot) {}
///     fn observe(&mut self, _: &[Committed<'_>]) -> scylla_core::Result<()> {
///         Ok(())
///     }
///     fn propose(&mut self, requests: &mut [Request<'_>]) -> scylla_core::Result<Vec<Tree>> {
///         let chain = |r: &mut Request<'_>| {
///             let length = r.budget.levels().min(r.budget.total - 1);
///             Ok(Tree::chain(r.root, &vec![r.root; length]))
///         };
///         requests.iter_mut().map(chain).collect()
///     }
/// }
///
/// # use scylla_core::{chance::Seeded, tree::Budget};
/// let (sampling, mut chance) = (Sampling::default(), Seeded::new(0, 0));
/// let request = Request { slot: 0, root: 7, budget: Budget::chain(2), sampling: &sampling, chance: &mut chance };
/// assert_eq!(Echo.propose(&mut [request])?[0].tokens, [7, 7, 7]);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait DraftModel: Send {
    /// Hidden states it wants with each committed position.
    fn taps(&self) -> Vec<Tap> {
        Vec::new()
    }
    /// How its trees are drawn under a sampling setting; decides which rules are exact for it.
    fn drawing(&self, sampling: &Sampling) -> Drawing;
    /// Whether trees of point masses stand among those that are drawn at random: its rule must be exact for both.
    fn mixes(&self, _sampling: &Sampling) -> bool {
        false
    }
    /// Starts an empty sequence in a slot.
    fn open(&mut self, slot: Slot) -> Result<()>;
    /// Ends it; closing a slot that is not open does nothing.
    fn close(&mut self, slot: Slot);
    /// Learns what became final.
    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()>;
    /// Proposes one tree per request, within its budget, rooted at its root. Where it fails for several it is asked again
    /// for each of them alone, so that one slot's error stays its own.
    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>>;
    /// What drafting costs from now on. It is for drafts that know how probable their nodes are, which leave out what does not pay,
    /// and for point masses alone: what was drawn at random may not be judged by its value.
    fn price(&mut self, _price: &Price) {}
    /// Whether it heeds the price under a sampling setting: within its budget it then chooses levels and nodes itself.
    fn weighs(&self, _sampling: &Sampling) -> bool {
        false
    }
    /// All that trees within the request's limits, or any smaller ones, would be chosen from, whether they are re-ranked or of
    /// a fixed shape of most probable children; `follows` is what the target says next, and so what such a tree is followed
    /// along. Asking changes nothing.
    ///
    /// # Errors
    /// Where a draft has no such candidates.
    fn candidates(&mut self, _request: &mut Request<'_>, _follows: &[u32]) -> Result<Candidates> {
        Err(Error::Invalid(
            "this draft proposes without saying what else it could have proposed: only drafts that grow trees with a network \
             can be traced densely"
                .into(),
        ))
    }
    /// Opens slot `to` as if it had seen these tokens, which slot `from` begins with, and the features of all of them but
    /// the last. False, and nothing is opened, where a draft cannot; one that wants no taps is told the tokens instead.
    fn fork(&mut self, _from: Slot, _to: Slot, _tokens: &[u32]) -> Result<bool> {
        Ok(false)
    }
    /// Bytes that the cache of a slot takes which comes to hold so many positions; 0 where none are counted.
    fn slot_bytes(&self, _positions: usize) -> usize {
        0
    }
    /// Gives back the memory that is kept of slots that were closed.
    fn trim(&mut self) {}
}

/// The same draft, borrowed or boxed.
macro_rules! forwarded {
    ($($kind:ty),+) => {$(
        impl<T: DraftModel + ?Sized> DraftModel for $kind {
            fn taps(&self) -> Vec<Tap> {
                (**self).taps()
            }
            fn drawing(&self, sampling: &Sampling) -> Drawing {
                (**self).drawing(sampling)
            }
            fn mixes(&self, sampling: &Sampling) -> bool {
                (**self).mixes(sampling)
            }
            fn open(&mut self, slot: Slot) -> Result<()> {
                (**self).open(slot)
            }
            fn close(&mut self, slot: Slot) {
                (**self).close(slot);
            }
            fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
                (**self).observe(committed)
            }
            fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
                (**self).propose(requests)
            }
            fn price(&mut self, price: &Price) {
                (**self).price(price);
            }
            fn weighs(&self, sampling: &Sampling) -> bool {
                (**self).weighs(sampling)
            }
            fn candidates(&mut self, request: &mut Request<'_>, follows: &[u32]) -> Result<Candidates> {
                (**self).candidates(request, follows)
            }
            fn fork(&mut self, from: Slot, to: Slot, tokens: &[u32]) -> Result<bool> {
                (**self).fork(from, to, tokens)
            }
            fn slot_bytes(&self, positions: usize) -> usize {
                (**self).slot_bytes(positions)
            }
            fn trim(&mut self) {
                (**self).trim();
            }
        }
    )+};
}

forwarded!(&mut T, Box<T>);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_a_price_all_nodes_pay() {
        let free = Price::default();
        assert_eq!(free.paying([0.5, 0.001].into_iter()), 2);
        assert_eq!((free.least(), free.is_known()), (0.0, false));
    }

    #[test]
    fn a_dear_row_pays_where_those_behind_it_are_cheap() {
        // The second row costs much, the third little: two nodes of 0.3 do not pay, three do.
        let price = Price {
            rows: vec![0.1, 0.5, 0.55],
            level: 0.0,
        };
        assert_eq!(price.paying([0.3, 0.3].into_iter()), 1);
        assert_eq!(price.paying([0.3, 0.3, 0.3].into_iter()), 3);
        assert!((price.least() - 0.05).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn no_other_number_of_nodes_is_worth_more_and_none_below_the_least_pays(
            steps in prop::collection::vec(0.0f64..0.5, 1..9), mut p in prop::collection::vec(0.0f64..1.0, 0..12),
        ) {
            p.sort_by(|a, b| b.total_cmp(a));
            let sums = |values: &[f64]| -> Vec<f64> {
                values.iter().scan(0.0, |sum, v| { *sum += v; Some(*sum) }).collect()
            };
            let price = Price { rows: sums(&steps), level: 0.0 };
            let mut costs = steps.clone();
            // Beyond what has a price as the last of it.
            costs.resize(steps.len().max(p.len()), steps[steps.len() - 1]);
            let value = |n: usize| p[..n].iter().sum::<f64>() - costs[..n].iter().sum::<f64>();
            let best = price.paying(p.iter().copied());
            for n in 0..=p.len() {
                prop_assert!(value(n) <= value(best) + 1e-9, "{} is worth more than {}", n, best);
            }
            prop_assert!(p[..best].iter().all(|&p| p >= price.least() - 1e-9));
        }
    }
}
