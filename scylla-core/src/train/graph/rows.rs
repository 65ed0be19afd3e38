//! Packed rows, and rows side by side.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Compute, Tape, Value};
use crate::plugin::Matrix;
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

    /// `[B, 1, S, S]`: zero where a row sees another, minus infinity elsewhere.
    pub(super) fn mask(
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

/// Rows of two values side by side.
pub fn beside(tape: &mut Tape, left: &Value, right: &Value) -> Result<Value> {
    let (a, b) = (left.columns(), right.columns());
    if left.rows() != right.rows() {
        return Err(Error::Invalid(format!(
            "{} rows beside {}",
            left.rows(),
            right.rows()
        )));
    }
    let out = match &tape.on {
        Compute::Kernels(p) => {
            let (l, r) = (left.matrix.values()?, right.matrix.values()?);
            let mut out = vec![0.0; l.len() + r.len()];
            p.pool.rows([&mut out], [a + b], 64, |range, [rows]| {
                for (row, out) in range.zip(rows.chunks_exact_mut(a + b)) {
                    out[..a].copy_from_slice(&l[row * a..(row + 1) * a]);
                    out[a..].copy_from_slice(&r[row * b..(row + 1) * b]);
                }
            });
            Matrix::host(out, a + b)
        }
        Compute::Tensors { .. } => Matrix::device(Tensor::cat(
            &[left.matrix.tensor()?, right.matrix.tensor()?],
            1,
        )?)?,
    };
    let (nodes, on) = ([left.node, right.node], tape.on.clone());
    Ok(tape.record(&[left, right], out, move |grad, to| {
        for (node, columns) in nodes.into_iter().zip([0..a, a..a + b]) {
            if node.is_none() {
                continue;
            }
            let width = columns.len();
            let part = match &on {
                Compute::Kernels(p) => {
                    let g = grad.values()?;
                    let mut part = vec![0.0; g.len() / (a + b) * width];
                    p.pool.rows([&mut part], [width], 64, |range, [rows]| {
                        for (row, out) in range.zip(rows.chunks_exact_mut(width)) {
                            let at = row * (a + b);
                            out.copy_from_slice(&g[at + columns.start..at + columns.end]);
                        }
                    });
                    Matrix::host(part, width)
                }
                Compute::Tensors { .. } => Matrix::device(
                    grad.tensor()?
                        .narrow(1, columns.start, width)?
                        .contiguous()?,
                )?,
            };
            to.add(node, part)?;
        }
        Ok(())
    }))
}

/// Some columns of a value.
pub fn columns(tape: &mut Tape, of: &Value, range: Range<usize>) -> Result<Value> {
    let (all, width) = (of.columns(), range.len());
    if range.end > all || width == 0 {
        return Err(Error::Invalid(format!("columns {range:?} of {all}")));
    }
    let out = match &tape.on {
        Compute::Kernels(_) => {
            let rows = of.matrix.values()?.chunks_exact(all);
            Matrix::host(
                rows.flat_map(|row| &row[range.clone()]).copied().collect(),
                width,
            )
        }
        Compute::Tensors { .. } => Matrix::device(
            of.matrix
                .tensor()?
                .narrow(1, range.start, width)?
                .contiguous()?,
        )?,
    };
    let (node, on) = (of.node, tape.on.clone());
    Ok(tape.record(&[of], out, move |grad, to| {
        let whole = match &on {
            Compute::Kernels(_) => {
                let mut whole = vec![0.0; grad.rows() * all];
                let rows = whole
                    .chunks_exact_mut(all)
                    .zip(grad.values()?.chunks_exact(width));
                rows.for_each(|(whole, grad)| whole[range.clone()].copy_from_slice(grad));
                Matrix::host(whole, all)
            }
            Compute::Tensors { .. } => {
                let behind = all - range.end;
                let grad = grad.tensor()?.pad_with_zeros(1, range.start, behind)?;
                Matrix::device(grad)?
            }
        };
        to.add(node, whole)
    }))
}
