//! Root-mean-square norm.

use candle_core::{D, Tensor};

use super::{Compute, Tape, Value};
use crate::kernels::{self, gradients};
use crate::plugin::Matrix;
use crate::{Error, Result};

/// Rows of a share, whatever the number of threads: a weight's gradient is the sum of theirs, in order.
const SHARE: usize = 64;

/// As a configuration says it: 1e-5, not the f32 nearest to it.
pub(super) fn decimal(eps: f32) -> f64 {
    eps.to_string().parse().unwrap_or(f64::from(eps))
}

/// Norms rows by a weight `[1, H]`; rows of several heads `[M, A H]` head by head.
pub fn rms_norm(tape: &mut Tape, x: &Value, weight: &Value, eps: f32) -> Result<Value> {
    let (h, columns) = (weight.columns(), x.columns());
    if h == 0 || !columns.is_multiple_of(h) {
        return Err(Error::Invalid(format!(
            "a norm of {h} values over rows of {columns}"
        )));
    }
    let out = match &tape.on {
        Compute::Kernels(p) => {
            let (values, w) = (x.matrix.values()?, weight.matrix.values()?);
            let mut out = vec![0.0; values.len()];
            p.pool.rows([&mut out], [columns], SHARE, |range, [out]| {
                kernels::rms_norm(
                    &values[range.start * columns..range.end * columns],
                    w,
                    eps,
                    out,
                );
            });
            Matrix::host(out, columns)
        }
        Compute::Tensors { .. } => {
            let (x, w) = (heads(x, h)?, weight.matrix.tensor()?);
            let y = x.broadcast_mul(&inverse(&x, eps)?)?.broadcast_mul(w)?;
            Matrix::device(y.reshape(((), columns))?)?
        }
    };
    let (x, weight, on) = (x.clone(), weight.clone(), tape.on.clone());
    Ok(tape.record(
        &[&x.clone(), &weight.clone()],
        out,
        move |grad, to| match &on {
            Compute::Kernels(p) => {
                let (values, w) = (x.matrix.values()?, weight.matrix.values()?);
                let mut grad = grad.into_values()?;
                let shares = (values.len() / columns).div_ceil(SHARE);
                let mut sums = vec![0.0; shares * h];
                {
                    let sums =
                        std::sync::Mutex::new(sums.chunks_mut(h).map(Some).collect::<Vec<_>>());
                    p.pool.rows([&mut grad], [columns], SHARE, |range, [grad]| {
                        // Each share once, and alone with its sums.
                        let taken = |i: usize| sums.lock().map_or(None, |mut sums| sums[i].take());
                        for first in range.clone().step_by(SHARE) {
                            let rows = first..range.end.min(first + SHARE);
                            let Some(sum) = taken(first / SHARE) else {
                                continue;
                            };
                            let at = (rows.start - range.start) * columns
                                ..(rows.end - range.start) * columns;
                            let x = &values[rows.start * columns..rows.end * columns];
                            gradients::rms_norm(x, w, eps, &mut grad[at], sum);
                        }
                    });
                }
                if weight.node.is_some() {
                    let (first, rest) = sums.split_at_mut(h);
                    rest.chunks_exact(h)
                        .for_each(|sum| gradients::accumulate(first, sum));
                    sums.truncate(h);
                    to.add(weight.node, Matrix::host(sums, h))?;
                }
                to.add(x.node, Matrix::host(grad, columns))
            }
            Compute::Tensors { .. } => {
                let (x_heads, w) = (heads(&x, h)?, weight.matrix.tensor()?);
                let g = grad.tensor()?.reshape(((), h))?;
                let r = inverse(&x_heads, eps)?;
                let normed = x_heads.broadcast_mul(&r)?;
                if weight.node.is_some() {
                    to.add(
                        weight.node,
                        Matrix::device(g.mul(&normed)?.sum_keepdim(0)?)?,
                    )?;
                }
                let g = g.broadcast_mul(w)?;
                let along = g.mul(&normed)?.mean_keepdim(D::Minus1)?;
                let x_grad = g.sub(&normed.broadcast_mul(&along)?)?.broadcast_mul(&r)?;
                to.add(x.node, Matrix::device(x_grad.reshape(((), columns))?)?)
            }
        },
    ))
}

fn heads(x: &Value, h: usize) -> Result<Tensor> {
    Ok(x.matrix.tensor()?.reshape(((), h))?)
}

/// One over the root of the mean square.
fn inverse(x: &Tensor, eps: f32) -> Result<Tensor> {
    Ok((x.sqr()?.mean_keepdim(D::Minus1)? + decimal(eps))?
        .sqrt()?
        .recip()?)
}
