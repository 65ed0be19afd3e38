//! What is recorded of each cycle and each sequence.

use serde::{Deserialize, Serialize};

/// One cycle of one sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cycle {
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
    /// Time by phase.
    pub ms: Phases,
}

/// Milliseconds by phase. In a batch each sequence carries its share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Phases {
    /// The prompt, up to the first token.
    pub prefill: f64,
    /// The draft: learning what was committed, and proposing.
    pub propose: f64,
    /// The target's verification forward.
    pub forward: f64,
    /// The rule.
    pub accept: f64,
    /// Keeping the accepted rows, text and streaming.
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

    /// The share of one of `n` sequences.
    pub(super) fn shared(self, n: usize) -> Self {
        let share = 1.0 / n.max(1) as f64;
        Self {
            prefill: self.prefill * share,
            propose: self.propose * share,
            forward: self.forward * share,
            accept: self.accept * share,
            commit: self.commit * share,
        }
    }

    /// Everything but the prefill.
    pub fn decode(&self) -> f64 {
        self.propose + self.forward + self.accept + self.commit
    }
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
    /// New tokens. The first comes from the prefill and belongs to no cycle.
    pub ids: Vec<u32>,
    /// Their text, without special tokens.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// The cycles.
    pub cycles: Vec<Cycle>,
    /// Time by phase.
    pub ms: Phases,
    /// What went wrong, where it failed. What it had until then is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Output {
    pub(super) fn unstarted(prompt_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            ids: Vec::new(),
            text: String::new(),
            finish: Finish::Interrupted,
            cycles: Vec::new(),
            ms: Phases::default(),
            failed: None,
        }
    }

    /// Mean tokens committed per cycle, bonus included; plain decoding is 1. `None` before the first cycle.
    pub fn tau(&self) -> Option<f64> {
        tau(&self.cycles)
    }
}

/// Mean tokens committed per cycle.
pub fn tau(cycles: &[Cycle]) -> Option<f64> {
    let committed: usize = cycles.iter().map(|c| c.committed).sum();
    (!cycles.is_empty()).then(|| committed as f64 / cycles.len() as f64)
}
