//! SmoothL1, averaged over the values of a row.

use candle_core::{D, DType, Tensor};

use super::cross_entropy::Compared;
use super::{Compute, Tape, Value};
use crate::plugin::Matrix;
use crate::{Error, Result};

/// `mean d^2 / 2` where `|d| < 1`, else `|d| - 1/2`, with `d` the difference of a row and its goal, summed over the rows that
/// count. The tape is seeded with the gradient of the weighted sum; the sum is returned unweighted.
pub fn smooth_l1(tape: &mut Tape, x: &Value, goals: &Matrix, rows: &[Compared]) -> Result<f64> {
    let h = x.columns();
    if goals.columns != h {
        return Err(Error::Invalid(format!(
            "goals of {} values for rows of {h}",
            goals.columns
        )));
    }
    match tape.on.clone() {
        Compute::Kernels(_) => {
            let (values, goals) = (x.matrix.values()?, goals.values()?);
            let mut grad = vec![0.0; values.len()];
            let mut total = 0.0;
            for &Compared { row, goal, weight } in rows {
                let weight = (weight / h as f64) as f32;
                let at = row * h..(row + 1) * h;
                let (x, goal) = (&values[at.clone()], &goals[goal * h..(goal + 1) * h]);
                let mut sums = [0.0f32; 16];
                for ((x, goal), grad) in x
                    .chunks(16)
                    .zip(goal.chunks(16))
                    .zip(grad[at].chunks_mut(16))
                {
                    for (i, ((x, goal), grad)) in x.iter().zip(goal).zip(grad).enumerate() {
                        let d = x - goal;
                        let size = d.abs();
                        sums[i] += if size < 1.0 { 0.5 * d * d } else { size - 0.5 };
                        *grad += weight * d.clamp(-1.0, 1.0);
                    }
                }
                total += sums.iter().map(|&s| f64::from(s)).sum::<f64>() / h as f64;
            }
            tape.seed(x, Matrix::host(grad, h))?;
            Ok(total)
        }
        Compute::Tensors { device, dtype, .. } => {
            let chosen = |of: &Tensor, ids: Vec<u32>| -> Result<(Tensor, Tensor)> {
                let ids = Tensor::from_vec(ids, rows.len(), &device)?;
                Ok((of.index_select(&ids, 0)?, ids))
            };
            if rows.is_empty() {
                return Ok(0.0);
            }
            let (values, ids) = chosen(
                x.matrix.tensor()?,
                rows.iter().map(|r| r.row as u32).collect(),
            )?;
            let (goals, _) = chosen(
                goals.tensor()?,
                rows.iter().map(|r| r.goal as u32).collect(),
            )?;
            let d = values.sub(&goals)?;
            let size = d.abs()?;
            // With c = min(|d|, 1): c^2 / 2 + (|d| - c).
            let c = size.minimum(1.0)?;
            let loss = ((c.sqr()? * 0.5)? + size.sub(&c)?)?.mean(D::Minus1)?;
            let total = loss.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
            let weights: Vec<f64> = rows.iter().map(|r| r.weight / h as f64).collect();
            let weights = Tensor::from_vec(weights, (rows.len(), 1), &device)?.to_dtype(dtype)?;
            let slopes = d.clamp(-1.0, 1.0)?.broadcast_mul(&weights)?;
            let grad = x
                .matrix
                .tensor()?
                .zeros_like()?
                .index_add(&ids, &slopes, 0)?;
            tape.seed(x, Matrix::device(grad)?)?;
            Ok(total)
        }
    }
}
