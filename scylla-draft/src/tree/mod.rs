//! How trees grow, apart from the networks they grow with.

mod auto;
mod candidates;
mod dynamic;
mod fixed;
mod optimal;
mod settings;
mod stop;
#[cfg(test)]
pub(crate) mod table;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use scylla_core::plugin::{
    Candidates, Committed, DraftModel, Matrix, Price, Request, Slot, Tap, TopRows,
};
use scylla_core::sampling::{Sampling, top_log_probabilities};
use scylla_core::tree::{Budget, Drawing, Tree};
use scylla_core::{Error, Result};

pub use auto::Auto;
pub use candidates::regrow;
pub use dynamic::Dynamic;
pub use fixed::{EAGLE1, Fixed, Growing, StaticTree};
pub use optimal::{MOST as MOST_OPTIMAL, expected_tokens, optimal};
pub use settings::{Draws, TreeKind, TreeSettings};
pub use stop::EarlyStop;

use crate::network::{Ids, Network, Nodes};

/// A tree that grows.
pub struct Growth {
    /// What was drawn so far; more than is proposed, where a shape re-ranks.
    pub tree: Tree,
    /// Log-probability of each node's path under the draft `[N]`, the root's 0.
    pub scores: Vec<f64>,
    /// Place of each node in a static tree `[N]`.
    pub places: Vec<usize>,
    /// Nodes whose children come next.
    pub frontier: Vec<usize>,
    /// Levels grown.
    pub level: usize,
    /// Least log-probability of a path that pays for its row, where shapes may choose.
    pub least: f64,
    /// For each node the order in which it was forwarded.
    rows: Vec<Option<usize>>,
    forwarded: usize,
    /// Nodes that may be forwarded in all.
    room: usize,
}

impl Growth {
    fn new(root: u32, drawing: Drawing, ids: &Ids, room: usize) -> Self {
        let mut growth = Self::of_points(root);
        growth.room = room;
        growth.tree.drawing = drawing;
        if drawing != Drawing::Deterministic {
            growth.tree.draft_to_target = ids.map();
        }
        growth
    }

    /// One of point masses, whose nodes are not forwarded.
    fn of_points(root: u32) -> Self {
        Self {
            tree: Tree::root(root),
            scores: vec![0.0],
            places: vec![0],
            frontier: vec![0],
            level: 0,
            least: f64::NEG_INFINITY,
            rows: vec![None],
            forwarded: 0,
            room: 0,
        }
    }

    /// Adds a point mass.
    pub fn push(&mut self, parent: usize, token: u32, score: f64, place: usize) -> usize {
        self.scores.push(score);
        self.places.push(place);
        self.tree.push(parent, token)
    }

    /// The frontier as the network takes it, all of it or as much as still has room.
    fn forward(&mut self) -> (Vec<u32>, Vec<Option<usize>>) {
        self.frontier.truncate(self.room - self.forwarded);
        self.rows.resize(self.tree.len(), None);
        let mut tokens = Vec::with_capacity(self.frontier.len());
        let mut parents = Vec::with_capacity(self.frontier.len());
        for &node in &self.frontier {
            tokens.push(self.tree.tokens[node]);
            parents.push(self.rows[self.tree.parents[node]]);
            self.rows[node] = Some(self.forwarded);
            self.forwarded += 1;
        }
        (tokens, parents)
    }
}

/// What a shape sees of one slot and level: the logits after each node of the frontier, or what is known of them.
pub struct Level<'a, 'r> {
    source: Source<'a>,
    request: &'a mut Request<'r>,
}

/// Where children come from.
enum Source<'a> {
    /// The network.
    Logits(Logits<'a>),
    /// Candidates that were told before.
    Known(candidates::Known<'a>),
}

/// Logits that a network has written.
struct Logits<'a> {
    /// Those of all slots; this slot's begin at row `first`.
    logits: &'a Matrix,
    first: usize,
    /// The best of all rows, where the logits are on a device and were asked for.
    top: &'a mut Option<TopRows>,
    ids: &'a Ids,
    /// Draft ids that occurred, each once.
    seen: &'a [u32],
    scratch: &'a mut Vec<f64>,
}

impl Level<'_, '_> {
    /// The budget asked for.
    pub fn budget(&self) -> Budget {
        self.request.budget
    }

    /// The `k` most probable children of the `i`-th node of the frontier: target id and log-probability, the latter a
    /// multiple of [`Candidates::UNIT`].
    pub fn top(&mut self, i: usize, tree: &Tree, node: usize, k: usize) -> Result<Vec<(u32, f64)>> {
        match &mut self.source {
            Source::Logits(logits) => logits.top(self.request.sampling, i, tree, node, k),
            Source::Known(known) => known.top(tree, node, k),
        }
    }

    /// The distribution after the `i`-th node of the frontier, through the same transform as the target's.
    pub fn q(&mut self, i: usize, tree: &Tree, node: usize) -> Result<Arc<[f64]>> {
        match &mut self.source {
            Source::Logits(logits) => logits.q(self.request.sampling, i, tree, node),
            Source::Known(_) => Err(Error::Invalid(
                "children drawn at random cannot be told from the most probable ones".into(),
            )),
        }
    }
}

impl Logits<'_> {
    /// The logits after the `i`-th node of the frontier, penalised as the target's are.
    fn row(
        &self,
        sampling: &Sampling,
        i: usize,
        tree: &Tree,
        node: usize,
    ) -> Result<std::borrow::Cow<'_, [f32]>> {
        let row = self.logits.row(self.first + i)?;
        if sampling.repetition_penalty == 1.0 {
            return Ok(row);
        }
        let mut row = row.into_owned();
        let path = tree.tokens_to(node);
        let path = path[1..].iter();
        let drafted = path.filter_map(|&t| Some(self.ids.draft(t)? as u32));
        let seen = self.seen.iter().copied().chain(drafted);
        sampling.penalise(&mut row, seen);
        Ok(row.into())
    }

    fn top(
        &mut self,
        sampling: &Sampling,
        i: usize,
        tree: &Tree,
        node: usize,
        k: usize,
    ) -> Result<Vec<(u32, f64)>> {
        let (ids, limit) = (self.ids, self.ids.limit);
        let target = |&(id, log): &(usize, f64)| (ids.target(id), Candidates::counted(log));
        let is_plain = sampling.repetition_penalty == 1.0;
        if !(self.logits.is_on_device() && is_plain) {
            let row = self.row(sampling, i, tree, node)?;
            return Ok(top_log_probabilities(&row, limit, k)?
                .iter()
                .map(target)
                .collect());
        }
        // All rows of all slots at once, and no more than the best leave the device.
        let most = k.min(limit);
        let top = match self.top.take().filter(|top| top.k >= most) {
            Some(top) => top,
            None => self.logits.top_log_probabilities(limit, k)?,
        };
        let best = top.row(self.first + i)[..most].iter().map(target);
        let best = best.collect();
        *self.top = Some(top);
        Ok(best)
    }

    fn q(&mut self, sampling: &Sampling, i: usize, tree: &Tree, node: usize) -> Result<Arc<[f64]>> {
        let mut scratch = std::mem::take(self.scratch);
        let row = self.row(sampling, i, tree, node);
        let done = row.and_then(|row| sampling.distribution(&row, self.ids.limit, &mut scratch));
        let q = done.map(|()| Arc::from(&scratch[..]));
        *self.scratch = scratch;
        q
    }
}

/// How a tree grows from its network's logits. Level 0 holds the root's children.
///
/// ```
/// use scylla_core::sampling::Sampling;
/// use scylla_core::tree::{Budget, Drawing};
/// use scylla_draft::tree::{Growth, Level, Shape};
///
/// /// The most probable child of the most probable child, and so on.
/// struct Best;
///
/// impl Shape for Best {
///     fn drawing(&self, _: &Sampling) -> Drawing {
///         Drawing::Deterministic
///     }
///     fn grow(&mut self, growth: &mut Growth, level: &mut Level<'_, '_>) -> scylla_core::Result<()> {
///         let node = growth.frontier[0];
///         let best = level.top(0, &growth.tree, node, 1)?;
///         let child = best.first().map(|&(token, log)| growth.push(node, token, growth.scores[node] + log, 0));
///         let more = growth.level + 1 < level.budget().levels() && growth.tree.len() < level.budget().total;
///         growth.frontier = child.filter(|_| more).into_iter().collect();
///         Ok(())
///     }
///     fn chosen(&self, growth: &Growth, budget: Budget) -> Vec<usize> {
///         (0..growth.tree.len().min(budget.total)).collect()
///     }
/// }
/// ```
pub trait Shape: Send {
    /// How children are chosen under a sampling setting.
    fn drawing(&self, sampling: &Sampling) -> Drawing;
    /// Adds the children of the frontier's nodes and chooses the next frontier; an empty one ends the growth.
    fn grow(&mut self, growth: &mut Growth, level: &mut Level<'_, '_>) -> Result<()>;
    /// Whether nodes that were drawn so may be left out by their value: point masses, the least probable first.
    fn is_ranked(&self, _: Drawing) -> bool {
        false
    }
    /// The nodes that are proposed, the root first and in order.
    fn chosen(&self, growth: &Growth, budget: Budget) -> Vec<usize>;
}

/// A tree with the log-probability of each node's path under the draft `[N]`; 0 throughout where it was drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The tree.
    pub tree: Tree,
    /// Its scores.
    pub scores: Vec<f64>,
}

impl Scored {
    /// The nodes that are worth their rows at a price, the most probable ones within the budget, best first. As probable as its
    /// parent a child is at most, and stands behind it.
    pub(crate) fn worth(&self, budget: Budget, price: &Price) -> Result<Tree> {
        let (tree, scores) = (&self.tree, &self.scores);
        let mut order: Vec<usize> = (1..tree.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let (mut kept, mut children) = (vec![0], vec![0; tree.len()]);
        let mut chosen = vec![false; tree.len()];
        chosen[0] = true;
        for node in order {
            let parent = tree.parents[node];
            if kept.len() < budget.total && chosen[parent] && children[parent] < budget.width {
                children[parent] += 1;
                chosen[node] = true;
                kept.push(node);
            }
        }
        kept.truncate(1 + price.paying(kept[1..].iter().map(|&n| scores[n].exp())));
        tree.select(&kept)
    }
}

/// Ids that occurred, each once.
#[derive(Default)]
struct Seen {
    ids: Vec<u32>,
    known: HashSet<u32>,
}

impl Seen {
    fn add(&mut self, tokens: &[u32], ids: &Ids) {
        for id in tokens.iter().filter_map(|&t| Some(ids.draft(t)? as u32)) {
            if self.known.insert(id) {
                self.ids.push(id);
            }
        }
    }
}

/// The share of a path's probability that its best child is expected to keep.
const KEPT: f64 = 0.65;

/// A draft: a network and the shape of its trees.
pub struct TreeDraft {
    network: Box<dyn Network>,
    shape: Box<dyn Shape>,
    stop: Option<EarlyStop>,
    /// Draft ids that occurred in each slot, for the repetition penalty.
    seen: HashMap<Slot, Seen>,
    logits: Matrix,
    scratch: Vec<f64>,
    price: Price,
}

impl TreeDraft {
    /// A draft that grows trees as the settings say.
    pub fn new(network: impl Network + 'static, settings: &TreeSettings) -> Result<Self> {
        Ok(Self {
            network: Box::new(network),
            shape: settings.shape()?,
            stop: settings.early_stop.then(EarlyStop::default),
            seen: HashMap::new(),
            logits: Matrix::default(),
            scratch: Vec::new(),
            price: Price::default(),
        })
    }

    /// Lets every growth take its level; the logits are those of all frontiers, one after the other.
    fn grow(&mut self, growths: &mut [Growth], requests: &mut [Request<'_>]) -> Result<()> {
        let ids = self.network.ids();
        let (mut first, mut top) = (0, None);
        for (growth, request) in growths.iter_mut().zip(requests) {
            let count = growth.frontier.len();
            if count == 0 {
                continue;
            }
            let seen = self.seen.get(&request.slot);
            let mut level = Level {
                source: Source::Logits(Logits {
                    logits: &self.logits,
                    first,
                    top: &mut top,
                    ids,
                    seen: seen.map_or(&[], |s| &s.ids[..]),
                    scratch: &mut self.scratch,
                }),
                request,
            };
            self.shape.grow(growth, &mut level)?;
            first += count;
            growth.level += 1;
        }
        Ok(())
    }
}

impl DraftModel for TreeDraft {
    fn taps(&self) -> Vec<Tap> {
        self.network.taps()
    }

    fn drawing(&self, sampling: &Sampling) -> Drawing {
        match sampling.is_greedy() {
            true => Drawing::Deterministic,
            false => self.shape.drawing(sampling),
        }
    }

    fn open(&mut self, slot: Slot) -> Result<()> {
        self.network.open(slot)?;
        self.seen.insert(slot, Seen::default());
        if let Some(stop) = &mut self.stop {
            stop.interrupt();
        }
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        self.network.close(slot);
        self.seen.remove(&slot);
    }

    fn observe(&mut self, committed: &[Committed<'_>]) -> Result<()> {
        for c in committed {
            if let Some(stop) = &mut self.stop {
                stop.committed(c.tokens.len());
            }
            if let Some(seen) = self.seen.get_mut(&c.slot) {
                seen.add(c.tokens, self.network.ids());
            }
            self.network.observe(c)?;
        }
        Ok(())
    }

    fn fork(&mut self, from: Slot, to: Slot, tokens: &[u32]) -> Result<bool> {
        if !self.network.fork(from, to, tokens)? {
            return Ok(false);
        }
        let mut seen = Seen::default();
        seen.add(tokens, self.network.ids());
        self.seen.insert(to, seen);
        if let Some(stop) = &mut self.stop {
            stop.interrupt();
        }
        Ok(true)
    }

    fn slot_bytes(&self, positions: usize) -> usize {
        self.network.slot_bytes(positions)
    }

    fn trim(&mut self) {
        self.network.trim();
    }

    fn price(&mut self, price: &Price) {
        self.price.clone_from(price);
    }

    fn weighs(&self, sampling: &Sampling) -> bool {
        self.shape.is_ranked(self.drawing(sampling))
    }

    fn propose(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Tree>> {
        let scored = self.propose_scored(requests)?;
        let ranked = |scored: &Scored| self.shape.is_ranked(scored.tree.drawing);
        let tree = |(scored, request): (Scored, &mut Request<'_>)| match self.price.is_known()
            && ranked(&scored)
        {
            true => scored.worth(request.budget, &self.price),
            false => Ok(scored.tree),
        };
        scored.into_iter().zip(requests).map(tree).collect()
    }

    fn candidates(&mut self, request: &mut Request<'_>, follows: &[u32]) -> Result<Candidates> {
        self.all_candidates(request, follows)
    }
}

impl TreeDraft {
    /// Proposes, and says how probable the draft holds each node.
    pub fn propose_scored(&mut self, requests: &mut [Request<'_>]) -> Result<Vec<Scored>> {
        let mut slots = Vec::with_capacity(requests.len());
        let mut growths = Vec::with_capacity(requests.len());
        for r in requests.iter() {
            let room = self.network.room(r.slot).filter(|_| r.budget.levels() > 0);
            let (drawing, ids) = (self.drawing(r.sampling), self.network.ids());
            let mut growth = Growth::new(r.root, drawing, ids, room.unwrap_or(0));
            growth.least = self.price.least().ln();
            match room {
                Some(_) => slots.push(r.slot),
                None => growth.frontier.clear(),
            }
            growths.push(growth);
        }
        if !slots.is_empty() {
            self.grow_all(&slots, &mut growths, requests)?;
        }
        let scored = |(growth, request): (Growth, &mut Request<'_>)| {
            let nodes = self.shape.chosen(&growth, request.budget);
            Ok(Scored {
                tree: growth.tree.select(&nodes)?,
                scores: nodes.iter().map(|&n| growth.scores[n]).collect(),
            })
        };
        growths.into_iter().zip(requests).map(scored).collect()
    }

    /// Whether the children of the frontiers are expected to be worth their rows and what it takes to draft them.
    fn another_level_pays(&self, growths: &[Growth]) -> bool {
        let rows = &self.price.rows;
        let Some(&all) = rows.last() else { return true };
        let row = all / rows.len() as f64;
        let nodes = growths
            .iter()
            .flat_map(|g| g.frontier.iter().map(|&n| g.scores[n].exp()));
        let gain: f64 = nodes.map(|path| (path * KEPT - row).max(0.0)).sum();
        gain >= self.price.level
    }

    /// Grows the trees level by level, one forward for all slots each.
    fn grow_all(
        &mut self,
        slots: &[Slot],
        growths: &mut [Growth],
        requests: &mut [Request<'_>],
    ) -> Result<()> {
        if let Some(stop) = &mut self.stop {
            stop.begin();
        }
        self.network.start(slots, &mut self.logits)?;
        loop {
            self.grow(growths, requests)?;
            if let Some(stop) = &mut self.stop
                && !stop.pays(growths)
            {
                return Ok(());
            }
            let ranked = |g: &Growth| self.shape.is_ranked(g.tree.drawing);
            if growths.iter().all(ranked) && !self.another_level_pays(growths) {
                return Ok(());
            }
            let rows: Vec<(Slot, Vec<u32>, Vec<Option<usize>>)> = growths
                .iter_mut()
                .zip(requests.iter())
                .filter(|(growth, _)| !growth.frontier.is_empty())
                .map(|(growth, request)| {
                    let (tokens, parents) = growth.forward();
                    (request.slot, tokens, parents)
                })
                .filter(|(_, tokens, _)| !tokens.is_empty())
                .collect();
            if rows.is_empty() {
                return Ok(());
            }
            let nodes: Vec<Nodes<'_>> = rows
                .iter()
                .map(|(slot, tokens, parents)| Nodes {
                    slot: *slot,
                    tokens,
                    parents,
                })
                .collect();
            self.network.expand(&nodes, &mut self.logits)?;
        }
    }
}
