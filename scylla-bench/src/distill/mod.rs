//! Distillation across tokenizers: a student learns from a teacher whose vocabulary it does not share.
//!
//! Texts and answers are tokenised by each side for itself, behind prompts of its own (`pairs`); the teacher says what it thinks of
//! them (`teacher`), an aligner compares, and what it finds flows into the student through the graph (`trainer`).

mod cache;
mod evaluate;
mod experiment;
mod learn;
mod pairs;
mod rows;
mod score;
mod student;
mod tables;
mod teacher;
mod trainer;

pub use experiment::{CacheSpec, DistillExperiment, DistillSpec, PairSpec, StudentSpec, Watch};
pub use pairs::{Pair, Pairs, Side, pairs_of};
pub use score::{AnswerScore, Said, Scores};
pub use student::Student;
pub use teacher::Teacher;
pub use trainer::{Distiller, OnTold, Outcome, Step, StepTimes, Told};
