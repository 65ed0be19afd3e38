//! Rotary positions.

use candle_core::{D, Tensor};

use super::{Compute, Tape, Value};
use crate::Result;
use crate::kernels;
use crate::model::Rope;
use crate::plugin::Matrix;

/// Cosines and sines of rows, as they are rotated.
#[derive(Clone)]
pub struct Angles {
    head_dim: usize,
    /// `[M, E / 2]`
    cos: Matrix,
    sin: Matrix,
}

impl Angles {
    /// Those of rows at these positions.
    pub fn new(on: &Compute, rope: &Rope, head_dim: usize, positions: &[u32]) -> Result<Self> {
        let half = head_dim / 2;
        let count = positions.iter().max().map_or(0, |&p| p as usize + 1);
        let (cos, sin) = rope.wide_tables(head_dim, count);
        let of = |table: &[f64]| {
            let row = |&p: &u32| {
                table[p as usize * half..(p as usize + 1) * half]
                    .iter()
                    .copied()
            };
            let values: Vec<f64> = positions.iter().flat_map(row).collect();
            match on {
                Compute::Kernels(_) => Ok(Matrix::host(
                    values.iter().map(|&v| v as f32).collect(),
                    half,
                )),
                Compute::Tensors { device, dtype, .. } => {
                    let tensor = Tensor::from_vec(values, (positions.len(), half), device)?;
                    Matrix::device(tensor.to_dtype(*dtype)?)
                }
            }
        };
        Ok(Self {
            head_dim,
            cos: of(&cos)?,
            sin: of(&sin)?,
        })
    }
}

/// Rotates the heads of rows `[M, A E]`, pairing element `i` with `i + E / 2`.
pub fn rotary(tape: &mut Tape, x: &Value, angles: &Angles) -> Result<Value> {
    let out = rotated(&tape.on, x.matrix.snapshot(), angles, false)?;
    let (node, angles, on) = (x.node, angles.clone(), tape.on.clone());
    // The transpose of a rotation is the rotation back.
    Ok(tape.record(&[x], out, move |grad, to| {
        to.add(node, rotated(&on, grad, &angles, true)?)
    }))
}

fn rotated(on: &Compute, x: Matrix, angles: &Angles, back: bool) -> Result<Matrix> {
    let (columns, half) = (x.columns, angles.head_dim / 2);
    match on {
        Compute::Kernels(p) => {
            let (cos, sin) = (angles.cos.values()?, angles.sin.values()?);
            let mut values = x.into_values()?;
            p.pool.rows([&mut values], [columns], 32, |range, [rows]| {
                let mut turned = vec![0.0; half];
                for (row, values) in range.zip(rows.chunks_exact_mut(columns)) {
                    let at = row * half..(row + 1) * half;
                    let sin = match back {
                        false => &sin[at.clone()],
                        true => {
                            turned
                                .iter_mut()
                                .zip(&sin[at.clone()])
                                .for_each(|(t, s)| *t = -s);
                            &turned
                        }
                    };
                    kernels::rope(values, &cos[at], sin);
                }
            });
            Ok(Matrix::host(values, columns))
        }
        Compute::Tensors { .. } => {
            let heads = columns / angles.head_dim;
            let rows = x.rows();
            let x = x.tensor()?.reshape((rows, heads, 2 * half))?;
            let table = |m: &Matrix| m.tensor().map(|t| t.reshape((rows, 1, half)));
            let (cos, sin) = (table(&angles.cos)??, table(&angles.sin)??);
            let sin = if back { sin.neg()? } else { sin };
            let (a, b) = (
                x.narrow(D::Minus1, 0, half)?,
                x.narrow(D::Minus1, half, half)?,
            );
            let left = a.broadcast_mul(&cos)?.sub(&b.broadcast_mul(&sin)?)?;
            let right = b.broadcast_mul(&cos)?.add(&a.broadcast_mul(&sin)?)?;
            Matrix::device(Tensor::cat(&[left, right], D::Minus1)?.reshape((rows, columns))?)
        }
    }
}
