//! Batches with what the target says of them: one pass for all drafts that learn from it.

use scylla_core::plugin::{Matrix, SlotRows, Step, Tap, TargetModel, Want};

use crate::Result;
use crate::data::documents::Documents;
use crate::data::packing::{Lines, Position, Stream};

use candle_core::Tensor;

/// Rows and documents that the target runs at a time; no engine runs meanwhile, so that all slots are free.
const ROWS: usize = 2048;
const DOCUMENTS: usize = 256;

/// A batch as drafts learn from it.
pub struct Taught {
    /// Tokens, masks and documents.
    pub lines: Lines,
    /// The target's states `[M, H]`, one for each of the taps asked for.
    pub states: Vec<Matrix>,
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

/// The target's states of some lines: documents side by side, none of which sees another.
///
/// # Errors
/// If the target fails.
pub fn teach(target: &mut Box<dyn TargetModel>, lines: Lines, taps: &[Tap]) -> Result<Taught> {
    let mut pieces: Vec<Vec<Matrix>> = Vec::new();
    let documents = &lines.rows.documents;
    let real = |i: usize| lines.of[i] != usize::MAX;
    let mut first = 0;
    while first < documents.len() {
        let (mut end, mut rows) = (first, 0);
        while end < documents.len()
            && (end == first || rows + documents[end].len() <= ROWS && end - first < DOCUMENTS)
        {
            rows += documents[end].len();
            end += 1;
        }
        let slots: Vec<usize> = (first..end).filter(|&i| real(i)).collect();
        let mut found = run(target, &lines, &slots, taps)?.into_iter();
        for i in first..end {
            pieces.push(match real(i) {
                true => found.next().unwrap_or_default(),
                false => Vec::new(),
            });
        }
        first = end;
    }
    let states = (0..taps.len()).map(|tap| joined(&lines, &pieces, tap));
    let states = states.collect::<Result<_>>()?;
    Ok(Taught { lines, states })
}

/// Runs some documents, each in a slot of its own, and returns their states.
fn run(
    target: &mut Box<dyn TargetModel>,
    lines: &Lines,
    documents: &[usize],
    taps: &[Tap],
) -> Result<Vec<Vec<Matrix>>> {
    let mut open = Vec::new();
    let mut forward = || -> Result<Vec<Vec<Matrix>>> {
        let mut slots = Vec::new();
        for (i, &document) in documents.iter().enumerate() {
            target.open(i)?;
            open.push(i);
            slots.push(SlotRows {
                slot: i,
                tokens: &lines.tokens[lines.rows.documents[document].clone()],
                parents: &[],
                want: Want::None,
            });
        }
        match slots.is_empty() {
            true => Ok(Vec::new()),
            false => Ok(target.forward(&Step { slots, taps })?.taps),
        }
    };
    let found = forward();
    open.into_iter().for_each(|slot| target.close(slot));
    found
}

/// The states of one tap in the order of rows; zeros where a line is filled up.
fn joined(lines: &Lines, pieces: &[Vec<Matrix>], tap: usize) -> Result<Matrix> {
    let some = pieces.iter().find_map(|p| p.get(tap));
    let Some(some) = some else {
        return Ok(Matrix::default());
    };
    let columns = some.columns;
    if some.is_on_device() {
        let like = some.tensor()?;
        let mut parts = Vec::new();
        for (range, piece) in lines.rows.documents.iter().zip(pieces) {
            parts.push(match piece.get(tap) {
                Some(piece) => piece.tensor()?.clone(),
                None => Tensor::zeros((range.len(), columns), like.dtype(), like.device())?,
            });
        }
        return Ok(Matrix::device(Tensor::cat(&parts, 0)?)?);
    }
    let mut values = Vec::with_capacity(lines.tokens.len() * columns);
    for (range, piece) in lines.rows.documents.iter().zip(pieces) {
        match piece.get(tap) {
            Some(piece) => values.extend_from_slice(piece.values()?),
            None => values.resize(values.len() + range.len() * columns, 0.0),
        }
    }
    Ok(Matrix::host(values, columns))
}
