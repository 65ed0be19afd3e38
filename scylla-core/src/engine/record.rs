//! What is recorded of each step, each cycle and each sequence.

use serde::{Deserialize, Serialize};

use super::RequestId;

/// One step of an engine, with its whole costs: nothing is divided among the requests that shared it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Its number, from 0 on.
    pub step: u64,
    /// Requests that decoded: one tree each.
    pub batch: usize,
    /// Nodes of all trees, roots included.
    pub rows: usize,
    /// Committed positions that each of these rows sees, summed over rows.
    pub positions: usize,
    /// Deepest level that a budget allowed.
    pub levels: usize,
    /// Requests whose prompt went on in the same forward.
    pub prompts: usize,
    /// Rows of theirs.
    pub prompt_rows: usize,
    /// Time by phase. Where prompts run in the same forward, that is its whole time; `prefill` is 0. What it took to let
    /// requests in is part of `commit`.
    pub ms: Phases,
    /// Of `ms.propose`, what proposing took; the rest was learning what was committed, of prompts too.
    #[serde(default)]
    pub proposing_ms: f64,
    /// What became of each tree.
    pub requests: Vec<Accepted>,
}

/// What became of one tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Whose it was.
    pub request: RequestId,
    /// Nodes verified, root included.
    pub nodes: usize,
    /// Drafted tokens that the rule accepted, the bonus excluded.
    pub accepted: usize,
}

/// One cycle of one sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cycle {
    /// The step it was part of, whose record has its costs.
    #[serde(default)]
    pub step: u64,
    /// Nodes verified, root included.
    pub nodes: usize,
    /// Levels of the tree below its root.
    pub depth: usize,
    /// Drafted tokens accepted and kept; the bonus is not counted.
    pub accepted: usize,
    /// Tokens kept, bonus included.
    pub committed: usize,
    /// Rank of each accepted token among its siblings, in the order a rule tries them.
    #[serde(default)]
    pub ranks: Vec<usize>,
    /// Children that the root had, and then each accepted node.
    #[serde(default)]
    pub offered: Vec<usize>,
    /// Whether the sequence ended in this cycle (EOS, stop string, length or context).
    pub cut: bool,
}

/// Milliseconds by phase.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Phases {
    /// The prompt, up to the first token.
    pub prefill: f64,
    /// The draft: learning what was committed, and proposing.
    pub propose: f64,
    /// The target's forward.
    pub forward: f64,
    /// The rule.
    pub accept: f64,
    /// Keeping rows, text and streaming.
    pub commit: f64,
}

impl Phases {
    /// Adds another record.
    pub fn add(&mut self, other: &Self) {
        self.prefill += other.prefill;
        self.propose += other.propose;
        self.forward += other.forward;
        self.accept += other.accept;
        self.commit += other.commit;
    }

    /// Everything but the prefill.
    pub fn decode(&self) -> f64 {
        self.propose + self.forward + self.accept + self.commit
    }
}

/// Milliseconds since a request was submitted, as who waits for it sees them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Waited {
    /// Until a slot was free.
    pub slot: f64,
    /// Until its first token.
    pub first: Option<f64>,
    /// Until its end.
    pub end: f64,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// An EOS id; it is the last of the ids.
    Eos,
    /// A stop string; the text ends before it.
    Stop,
    /// The limit of new tokens.
    Length,
    /// The context is full.
    Context,
    /// The caller broke off.
    Interrupted,
    /// An error ended it; [`Output::failed`] says which.
    Failed,
}

/// What became of one sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them whose rows were taken from an earlier sequence that began alike.
    #[serde(default)]
    pub reused_tokens: usize,
    /// New tokens. The first comes from the prefill and belongs to no cycle.
    pub ids: Vec<u32>,
    /// Their text, without special tokens.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// The cycles.
    pub cycles: Vec<Cycle>,
    /// Its share of the time of the steps it was part of: of forwards by rows, of drafting in equal parts. All shares
    /// together are the whole; costs of the work itself are in the steps' records.
    pub ms: Phases,
    /// How long it took, waiting and the time of others included.
    #[serde(default)]
    pub waited: Waited,
    /// What went wrong, where it failed. What it had until then is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Output {
    pub(super) fn unstarted(prompt_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            reused_tokens: 0,
            ids: Vec::new(),
            text: String::new(),
            finish: Finish::Interrupted,
            cycles: Vec::new(),
            ms: Phases::default(),
            waited: Waited::default(),
            failed: None,
        }
    }

    pub(super) fn refused(prompt_tokens: usize, reason: String) -> Self {
        Self {
            finish: Finish::Failed,
            failed: Some(reason),
            ..Self::unstarted(prompt_tokens)
        }
    }

    /// Mean tokens committed per cycle, bonus included; plain decoding is 1. `None` before the first cycle.
    pub fn tau(&self) -> Option<f64> {
        tau(&self.cycles)
    }

    /// Milliseconds a token after the first, the time of others included; `None` where there is none.
    pub fn ms_per_token(&self) -> Option<f64> {
        let tokens = self.ids.len().checked_sub(2)? + 1;
        Some((self.waited.end - self.waited.first?) / tokens as f64)
    }
}

/// Mean tokens committed per cycle.
pub fn tau(cycles: &[Cycle]) -> Option<f64> {
    let committed: usize = cycles.iter().map(|c| c.committed).sum();
    (!cycles.is_empty()).then(|| committed as f64 / cycles.len() as f64)
}
