//! `y = x W^T + b`, with what it is added to.

use crate::Result;
use crate::kernels::View;
use crate::plugin::Matrix;

use super::{Compute, Tape, Value};

/// The product of rows `x` `[M, K]` with a weight `[N, K]`, its bias `[1, N]` and a residual `[M, N]` added where given.
pub fn linear(
    tape: &mut Tape,
    x: &Value,
    weight: &Value,
    bias: Option<&Value>,
    residual: Option<&Value>,
) -> Result<Value> {
    let out = match tape.on.clone() {
        Compute::Kernels(p) => {
            let (m, n) = (x.rows(), weight.rows());
            let right = tape.gradients.right(&p, weight, true)?;
            let mut out = match residual {
                Some(residual) => residual.matrix.values()?.to_vec(),
                None => vec![0.0; m * n],
            };
            let left = View::new(x.matrix.values()?, m, x.columns());
            p.multiply_packed(left, &right, residual.is_some(), &mut out, n);
            if let Some(bias) = bias {
                let bias = bias.matrix.values()?;
                p.pool.rows([&mut out], [n], 64, |_, [rows]| {
                    for row in rows.chunks_exact_mut(n) {
                        crate::kernels::gradients::accumulate(row, bias);
                    }
                });
            }
            Matrix::host(out, n)
        }
        Compute::Tensors {
            dtype, products, ..
        } => {
            let x = x.matrix.tensor()?.to_dtype(products)?;
            let w = weight.matrix.tensor()?.to_dtype(products)?;
            let mut y = x.matmul(&w.t()?)?.to_dtype(dtype)?;
            if let Some(bias) = bias {
                y = y.broadcast_add(bias.matrix.tensor()?)?;
            }
            if let Some(residual) = residual {
                y = y.add(residual.matrix.tensor()?)?;
            }
            Matrix::device(y)?
        }
    };
    let from: Vec<&Value> = [Some(x), Some(weight), bias, residual]
        .into_iter()
        .flatten()
        .collect();
    let (x, weight) = (x.clone(), weight.clone());
    let (bias, residual) = (bias.cloned(), residual.cloned());
    let on = tape.on.clone();
    Ok(tape.record(&from.clone(), out, move |grad, to| {
        match &on {
            Compute::Kernels(p) => {
                let (m, n, k) = (x.rows(), weight.rows(), x.columns());
                let g = View::new(grad.values()?, m, n);
                if x.node.is_some() {
                    let right = to.right(p, &weight, false)?;
                    let mut x_grad = vec![0.0; m * k];
                    p.multiply_packed(g, &right, false, &mut x_grad, k);
                    to.add(x.node, Matrix::host(x_grad, k))?;
                }
                if let Some(node) = weight.node {
                    let x = View::new(x.matrix.values()?, m, k);
                    to.product(node, n, k, |out, add| {
                        p.multiply(g.transposed(), x, add, out)
                    })?;
                }
                if let Some(bias) = &bias {
                    let mut sums = vec![0.0; n];
                    for row in grad.values()?.chunks_exact(n) {
                        crate::kernels::gradients::accumulate(&mut sums, row);
                    }
                    to.add(bias.node, Matrix::host(sums, n))?;
                }
            }
            Compute::Tensors {
                dtype, products, ..
            } => {
                let g = grad.tensor()?.to_dtype(*products)?;
                if x.node.is_some() {
                    let w = weight.matrix.tensor()?.to_dtype(*products)?;
                    to.add(x.node, Matrix::device(g.matmul(&w)?.to_dtype(*dtype)?)?)?;
                }
                if weight.node.is_some() {
                    let x = x.matrix.tensor()?.to_dtype(*products)?;
                    to.add(
                        weight.node,
                        Matrix::device(g.t()?.matmul(&x)?.to_dtype(*dtype)?)?,
                    )?;
                }
                if let Some(bias) = &bias {
                    to.add(bias.node, Matrix::device(grad.tensor()?.sum_keepdim(0)?)?)?;
                }
            }
        }
        to.add(residual.and_then(|r| r.node), grad)
    }))
}
