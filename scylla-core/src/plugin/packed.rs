//! Rows of several documents together.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// Rows of several documents one behind the other, `batch` lines of `length` rows. No document reaches over the end of a
/// line; each row belongs to one (those that fill a line up are documents of their own).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedRows {
    /// Lines.
    pub batch: usize,
    /// Rows of a line.
    pub length: usize,
    /// Rows of each document, in order.
    pub documents: Arc<[Range<usize>]>,
}

impl PackedRows {
    /// Checks that documents cover the rows, in order and within lines.
    ///
    /// # Errors
    /// If they do not.
    pub fn new(batch: usize, length: usize, documents: Vec<Range<usize>>) -> Result<Self> {
        let mut next = 0;
        for d in &documents {
            let within = d.start < d.end && d.start / length.max(1) == (d.end - 1) / length.max(1);
            if d.start != next || !within {
                return Err(Error::Invalid(format!(
                    "rows {d:?} of a document, in lines of {length}, behind row {next}"
                )));
            }
            next = d.end;
        }
        match next == batch * length && next > 0 {
            true => Ok(Self {
                batch,
                length,
                documents: documents.into(),
            }),
            false => Err(Error::Invalid(format!(
                "documents of {next} rows in {batch} lines of {length}"
            ))),
        }
    }

    /// Whole lines, each a document.
    pub fn lines(batch: usize, length: usize) -> Result<Self> {
        Self::new(
            batch,
            length,
            (0..batch).map(|i| i * length..(i + 1) * length).collect(),
        )
    }

    /// M.
    pub fn count(&self) -> usize {
        self.batch * self.length
    }

    /// Refuses tokens that are not as many as the rows.
    pub(crate) fn check(&self, tokens: usize) -> Result<()> {
        match tokens == self.count() {
            true => Ok(()),
            false => Err(Error::Invalid(format!(
                "{tokens} tokens for {} packed rows",
                self.count()
            ))),
        }
    }

    /// Places of rows in their documents, `ahead` added.
    pub fn positions(&self, ahead: usize) -> Vec<u32> {
        let of = |d: &Range<usize>| (0..d.len()).map(|p| (p + ahead) as u32);
        self.documents.iter().flat_map(of).collect()
    }

    /// For each row the row `by` behind it in its document, if there is one.
    pub fn shifted(&self, by: usize) -> Vec<Option<usize>> {
        let of = |d: &Range<usize>| {
            let end = d.end;
            d.clone()
                .map(move |row| Some(row + by).filter(|&r| r < end))
        };
        self.documents.iter().flat_map(of).collect()
    }

    /// Whole lines of at most so many rows together, or one: each piece, and where its rows begin.
    pub fn pieces(&self, most: usize) -> Vec<(usize, Self)> {
        let lines = (most / self.length.max(1)).max(1);
        let piece = |first: usize| {
            let batch = lines.min(self.batch - first);
            let (start, end) = (first * self.length, (first + batch) * self.length);
            let inside = |d: &&Range<usize>| start <= d.start && d.start < end;
            let moved = |d: &Range<usize>| d.start - start..d.end - start;
            let documents = self.documents.iter().filter(inside).map(moved).collect();
            let length = self.length;
            (
                start,
                Self {
                    batch,
                    length,
                    documents,
                },
            )
        };
        (0..self.batch).step_by(lines).map(piece).collect()
    }

    /// `[B, 1, S, S]`: zero where a row sees another, minus infinity elsewhere.
    pub(crate) fn mask(
        &self,
        window: Option<usize>,
        device: &Device,
        dtype: DType,
    ) -> Result<Tensor> {
        let s = self.length;
        let mut mask = vec![f32::NEG_INFINITY; self.batch * s * s];
        for d in self.documents.iter() {
            let line = d.start / s;
            for row in d.clone() {
                let first = d
                    .start
                    .max((row + 1).saturating_sub(window.unwrap_or(usize::MAX)));
                let at = row * s;
                mask[at + first - line * s..=at + row - line * s].fill(0.0);
            }
        }
        Ok(Tensor::from_vec(mask, (self.batch, 1, s, s), device)?.to_dtype(dtype)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_rows_in_order() -> Result<()> {
        let rows = PackedRows::new(3, 4, vec![0..4, 4..5, 5..8, 8..12])?;
        for most in [1, 4, 8, 11, 12, 100] {
            let (mut next, mut found) = (0, Vec::new());
            for (start, piece) in rows.pieces(most) {
                assert_eq!((start, piece.length), (next, 4));
                assert!(piece.count() <= most.max(4));
                let again = PackedRows::new(piece.batch, 4, piece.documents.to_vec())?;
                assert_eq!(again, piece);
                found.extend(
                    piece
                        .documents
                        .iter()
                        .map(|d| d.start + start..d.end + start),
                );
                next += piece.count();
            }
            assert_eq!((next, &found[..]), (12, &rows.documents[..]));
        }
        Ok(())
    }
}
