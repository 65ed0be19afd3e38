//! What trainers share: the graph, optimizers, schedules, checkpoints, the order of data, and losses that align a student
//! with a teacher.

mod align;
pub mod checkpoint;
pub mod graph;
mod language;
mod muon;
mod optimizer;
mod schedule;

pub use align::{AlignContext, AlignLoss, AlignNeeds, Aligner, AnswerLogits, Part};
pub use language::{Language, normal};
pub use muon::MuonSettings;
pub use optimizer::{AdamW, AdamWSettings, Named, accumulate, norm, scale};
pub use schedule::{Schedule, Shape};
