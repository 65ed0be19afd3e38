//! Dense traces: what a draft could have proposed at every place of the target's own text, and what the target says of it.
//!
//! A bench's `cycles.jsonl` says what became of the trees of one budget. A dense trace holds the candidates that trees of any
//! smaller budget, of any deterministic shape, are chosen from, so that these are evaluated without target and draft
//! ([`replay()`]): the same cycles as decoding greedily with them.
//!
//! ```text
//! {"trace": {format, version, target, draft, budget, environment, ..}}     first line
//! {"text": {prompt, task, turn, prompt_tokens, answer, ..}}                 then each text, followed by
//! {"place": {at, open, tokens, logs, ranks, p}}                             its places, one line each
//! ```
//!
//! A place is a token of the answer, root of the candidates below it. `open` holds pairs: a node that the draft was asked
//! about, and how many of its children are kept, in the order in which the nodes come in `tokens`. `logs` are log-probabilities
//! under the draft given the parent, in units of -2^-30; `ranks` and `p` are the place and the probability of the token among
//! the target's next ones there (temperature 1, no transform).

mod read;
mod record;
mod replay;

use std::path::PathBuf;

use scylla_core::plugin::Candidates;
use scylla_core::tree::Budget;
use serde::{Deserialize, Serialize};

pub use read::{Reader, find};
pub use record::{Recorder, Writer};
pub use replay::{Replay, Replayed, replay};

use crate::Environment;

/// What the first line says the file is.
pub const FORMAT: &str = "scylla-dense-trace";
/// Version that is written, and the last that is read.
pub const VERSION: u32 = 1;

/// Limits of trees, as in experiments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Nodes verified, root included.
    pub total: usize,
    /// Children per node.
    pub width: usize,
    /// Expansion steps after level 0.
    pub depth: usize,
}

impl From<Budget> for Limits {
    fn from(b: Budget) -> Self {
        Self {
            total: b.total,
            width: b.width,
            depth: b.depth,
        }
    }
}

impl From<Limits> for Budget {
    fn from(b: Limits) -> Self {
        Self {
            total: b.total,
            width: b.width,
            depth: b.depth,
        }
    }
}

/// What a trace is of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// The target.
    pub target: String,
    /// The draft.
    pub draft: String,
    /// Its weights.
    #[serde(default)]
    pub dir: Option<PathBuf>,
    /// The largest budget whose trees can be chosen from the candidates.
    pub budget: Limits,
    /// Of the target's and the draft's logits.
    pub repetition_penalty: f64,
    /// Where it was recorded.
    pub environment: Environment,
}

/// A text of the target's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// The prompt's id.
    pub prompt: String,
    /// Its task.
    pub task: String,
    /// Which of its turns.
    pub turn: usize,
    /// Tokens before the answer.
    pub prompt_tokens: usize,
    /// The answer.
    pub answer: Vec<u32>,
    /// The limit of new tokens that it was decoded under.
    pub max_new_tokens: usize,
    /// Positions that a slot holds.
    pub context: usize,
    /// Tokens that the draft can propose: children that a node has at most.
    pub most: usize,
}

/// The candidates below one token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// Which token of the answer is the root.
    pub at: usize,
    /// The candidates.
    pub candidates: Candidates,
    /// How many tokens the target holds more probable there `[N]`; the root's is 0 and means nothing.
    pub ranks: Vec<u32>,
    /// Probability under the target `[N]`; the root's is 1 and means nothing.
    pub p: Vec<f32>,
}

/// A place as it is written.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlaceLine {
    at: usize,
    open: Vec<usize>,
    tokens: Vec<u32>,
    logs: Vec<u64>,
    ranks: Vec<u32>,
    p: Vec<f32>,
}

/// A line.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line<P> {
    Trace(Header),
    Text(Text),
    Place(P),
}

/// Four digits, which is what a probability is worth.
fn rounded(p: f64) -> f32 {
    format!("{p:.3e}").parse().unwrap_or(0.0)
}

impl PlaceLine {
    fn of(place: &Place) -> Self {
        let c = &place.candidates;
        let open = (0..c.tokens.len()).filter_map(|n| Some([n, c.children[n].as_ref()?.len()]));
        Self {
            at: place.at,
            open: open.flatten().collect(),
            tokens: c.tokens[1..].to_vec(),
            logs: c.logs[1..]
                .iter()
                .map(|l| (-l / Candidates::UNIT) as u64)
                .collect(),
            ranks: place.ranks[1..].to_vec(),
            p: place.p[1..].to_vec(),
        }
    }

    /// The place it says, or what is wrong with it.
    fn place(self, text: &Text, limits: Limits) -> Result<Place, String> {
        let n = self.tokens.len();
        let lengths = [self.logs.len(), self.ranks.len(), self.p.len()];
        if lengths != [n; 3] {
            return Err(format!("{n} tokens with {lengths:?} logs, ranks and p"));
        }
        let Some(&root) = text.answer.get(self.at) else {
            return Err(format!(
                "place {} of an answer of {} tokens",
                self.at,
                text.answer.len()
            ));
        };
        let mut candidates = Candidates::root(root, text.most);
        let mut logs = self.logs.iter().map(|&l| -(l as f64) * Candidates::UNIT);
        let mut tokens = self.tokens.iter().copied();
        let mut depths = vec![0];
        for pair in self.open.chunks(2) {
            let &[node, count] = pair else {
                return Err("`open` is not of pairs".into());
            };
            let known = candidates.children.get(node).is_some_and(Option::is_none);
            if !known || depths[node] > limits.depth || count > limits.width.min(text.most) {
                return Err(format!("`open` has {count} children of node {node}"));
            }
            let children: Vec<(u32, f64)> =
                tokens.by_ref().zip(logs.by_ref()).take(count).collect();
            if children.len() < count || children.windows(2).any(|w| w[0].1 < w[1].1) {
                return Err(format!(
                    "the children of node {node} are not {count} with falling logs"
                ));
            }
            depths.extend(std::iter::repeat_n(depths[node] + 1, count));
            candidates.expand(node, children);
        }
        if candidates.tokens.len() != n + 1 {
            return Err(format!(
                "{n} tokens, of which `open` accounts for {}",
                candidates.tokens.len() - 1
            ));
        }
        if self.p.iter().any(|p| !(0.0..=1.0).contains(p)) {
            return Err("a probability outside 0..=1".into());
        }
        Ok(Place {
            at: self.at,
            candidates,
            ranks: [vec![0], self.ranks].concat(),
            p: [vec![1.0], self.p].concat(),
        })
    }
}
