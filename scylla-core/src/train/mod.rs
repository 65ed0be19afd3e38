//! What trainers share. So far: losses that align a student with a teacher.

mod align;

pub use align::{AlignContext, AlignLoss, AlignNeeds, Aligner, AnswerLogits, Part};
