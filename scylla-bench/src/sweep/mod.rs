//! Grids of training runs: independent, resumable, one folder each.
//!
//! Token budgets of one setting share a **trunk**, trained at a constant rate as far as any of them needs it; each budget is a
//! branch that leaves it and cools down. A checkpoint in the middle of a schedule that falls all the way would be worse than a
//! run made for that budget, and a law fitted to such points wrong; a branch is, step by step, the run that was trained
//! straight to its budget with the same schedule. Settings that share their data share the target's pass.
//!
//! ```text
//! DIR/trunk_layers-2_seed-0/              experiment.toml metrics.jsonl checkpoint.safetensors
//! DIR/layers-2_tokens-1000000_seed-0/     experiment.toml metrics.jsonl summary.json best/
//! ```

mod gather;
mod plan;
mod run;
mod slurm;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use gather::gather;
pub use plan::{Axis, Plan, Planned, Trunk, Unit};
pub use run::{Failed, Swept, sweep};
pub use slurm::script;

use crate::Environment;
use crate::train::{PromptTau, Tau};

/// What the summary of a run of a sweep says it is.
pub const FORMAT: &str = "scylla-sweep";
/// Version of its form.
pub const VERSION: u32 = 1;
/// Its name.
pub const SUMMARY: &str = "summary.json";

/// A run of a sweep that is done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Name of its folder.
    pub name: String,
    /// The recipe.
    pub family: String,
    /// D.
    pub layers: usize,
    /// T: tokens trained on, the trunk's included.
    pub tokens: u64,
    /// Seed of parameters, data and noise.
    pub seed: u64,
    /// The trunk it branched off from, and the step behind which.
    pub trunk: Option<(String, u64)>,
    /// What the grid set.
    pub settings: BTreeMap<String, toml::Value>,
    /// Steps, the trunk's included.
    pub steps: u64,
    /// The loss of the last step.
    pub loss: f64,
    /// What the draft is worth behind its last step.
    pub tau: Tau,
    /// The same prompt by prompt.
    pub prompts: Vec<PromptTau>,
    /// Where it was trained.
    pub environment: Environment,
}
