//! Batches with what the target says of them: one pass for all drafts that learn from it.

use scylla_core::plugin::{Matrix, Tap, TargetModel};
use scylla_draft::recipe::TopProbabilities;

use crate::Result;
use crate::data::documents::Documents;
use crate::data::packing::{Lines, Position, Stream};

/// A batch as drafts learn from it.
pub struct Taught {
    /// Tokens, masks and documents.
    pub lines: Lines,
    /// The target's states `[M, H]`, one for each of the taps asked for.
    pub states: Vec<Matrix>,
    /// Its logits `[M, V]`, where they do not follow from these states.
    pub logits: Option<Matrix>,
    /// Its most probable tokens, where they were kept.
    pub top: Option<TopProbabilities>,
}

/// Batches of a stage, one after the other.
pub struct Feed<'a> {
    documents: &'a Documents,
    stream: Stream<'a>,
    batch: usize,
}

impl<'a> Feed<'a> {
    /// Batches of `batch` lines of `length` rows, from a position on,
    ///
    /// # Errors
    /// If there is nothing to train on.
    pub fn new(
        documents: &'a Documents,
        (batch, length): (usize, usize),
        seed: u64,
        at: Position,
    ) -> Result<Self> {
        Ok(Self {
            stream: Stream::new(&documents.all, length, seed, at)?,
            documents,
            batch,
        })
    }

    /// Where the next batch begins.
    pub fn position(&self) -> Position {
        self.stream.position()
    }

    /// Names of a batch's documents.
    pub fn names(&self, lines: &Lines) -> Vec<&'a str> {
        lines.names(&self.documents.all)
    }

    /// The next lines; those that teach nothing are passed over.
    ///
    /// # Errors
    /// If a range does not fit, which is a defect.
    pub fn lines(&mut self) -> Result<Lines> {
        let begun = self.stream.position().epoch;
        loop {
            if self.stream.position().epoch > begun + 1 {
                return Err(crate::Error::Experiment(
                    "no document has a token that is trained on before its last one: there is nothing to learn".into(),
                ));
            }
            let lines = self.stream.lines(self.batch)?;
            let next_counts = |r: &std::ops::Range<usize>| {
                r.len() > 1 && lines.mask[r.start..r.end - 1].contains(&true)
            };
            if lines.rows.documents.iter().any(next_counts) {
                return Ok(lines);
            }
        }
    }
}

/// The target's states of some lines.
///
/// # Errors
/// If the target fails.
pub fn teach(target: &mut dyn TargetModel, lines: Lines, taps: &[Tap]) -> Result<Taught> {
    let states = target.states(&lines.tokens, &lines.rows, taps)?;
    Ok(Taught {
        lines,
        states,
        logits: None,
        top: None,
    })
}
