//! `scylla train`: one pass of the target feeds one or several drafts, which are checked by what they are worth when served.
//!
//! ```text
//! files -> documents -> packed lines -> the target's states -> recipe -> graph -> loss -> gradients -> optimizer
//! every so often: export in memory -> simulated and real tau on dev prompts -> the best draft, a checkpoint
//! ```

mod events;
mod experiment;
mod feed;
mod learner;
mod run;
mod tau;
mod trainer;

pub(crate) use experiment::product_form;
pub use experiment::{EvaluateSpec, RunSpec, Stage, TrainDraft, TrainExperiment, TrainSpec};
pub use feed::{Feed, Taught, teach};
pub(crate) use learner::{Fed, serving};
pub use learner::{Learner, recipe_of};
pub use run::{BEST, Best, CHECKPOINT, METRICS, Metrics, Outcome, Times};
pub(crate) use run::{append, cut_to, first_difference};
pub use tau::{Answer, PromptTau, Tau, Tester};
pub(crate) use tau::{SLOT, states_of, tell};
pub use trainer::{OnTold, Report, Told, Trainer, compute, compute_beside};
pub(crate) use trainer::{branch, fork_name};
