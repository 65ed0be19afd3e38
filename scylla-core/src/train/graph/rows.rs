//! Rows side by side.

use std::ops::Range;

use candle_core::Tensor;

use super::{Compute, Tape, Value};
use crate::kernels::gradients;
use crate::plugin::Matrix;
use crate::{Error, Result};

/// Rows of a table `[V, H]`, one for each token `[M, H]`.
///
/// # Errors
/// If the table has no row for a token.
pub fn embedding(tape: &mut Tape, table: &Value, tokens: &[u32]) -> Result<Value> {
    let (vocab, width) = (table.rows(), table.columns());
    if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(Error::Invalid(format!(
            "token {token} is outside the vocabulary of {vocab}"
        )));
    }
    let ids = |of: &Tensor| Tensor::from_slice(tokens, tokens.len(), of.device());
    let out = match &tape.on {
        Compute::Kernels(_) => {
            let values = table.matrix.values()?;
            let row = |&token: &u32| &values[token as usize * width..][..width];
            Matrix::host(tokens.iter().flat_map(row).copied().collect(), width)
        }
        Compute::Tensors { .. } => {
            let all = table.matrix.tensor()?;
            Matrix::device(all.index_select(&ids(all)?, 0)?)?
        }
    };
    let (node, on, tokens) = (table.node, tape.on.clone(), tokens.to_vec());
    Ok(tape.record(&[table], out, move |grad, to| {
        let Some(node) = node else { return Ok(()) };
        match &on {
            Compute::Kernels(_) => {
                let grad = grad.values()?;
                // Where the table is a head too, its gradient as one is there by now: rows are added to it.
                to.product(node, vocab, width, |sums, _| {
                    for (&token, row) in tokens.iter().zip(grad.chunks_exact(width)) {
                        gradients::accumulate(&mut sums[token as usize * width..][..width], row);
                    }
                })
            }
            Compute::Tensors { .. } => {
                let grad = grad.tensor()?;
                let ids = Tensor::from_slice(&tokens, tokens.len(), grad.device())?;
                let sums = Tensor::zeros((vocab, width), grad.dtype(), grad.device())?;
                to.add(Some(node), Matrix::device(sums.index_add(&ids, grad, 0)?)?)
            }
        }
    }))
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
