//! `silu(gate) * up`

use super::{Compute, Tape, Value};
use crate::Result;
use crate::kernels::gradients;
use crate::plugin::Matrix;

/// The gated activation of rows `[M, I]`.
pub fn swiglu(tape: &mut Tape, gate: &Value, up: &Value) -> Result<Value> {
    let columns = gate.columns();
    let out = match &tape.on {
        Compute::Kernels(p) => {
            let (g, u) = (gate.matrix.values()?, up.matrix.values()?);
            let mut out = vec![0.0; g.len()];
            p.pool.rows([&mut out], [columns], 16, |range, [out]| {
                let at = range.start * columns..range.end * columns;
                gradients::swiglu(&g[at.clone()], &u[at], out);
            });
            Matrix::host(out, columns)
        }
        Compute::Tensors { .. } => {
            let gate = gate.matrix.tensor()?;
            Matrix::device(gate.mul(&sigmoid(gate)?)?.mul(up.matrix.tensor()?)?)?
        }
    };
    let (gate, up, on) = (gate.clone(), up.clone(), tape.on.clone());
    Ok(tape.record(
        &[&gate.clone(), &up.clone()],
        out,
        move |grad, to| match &on {
            Compute::Kernels(p) => {
                let (g, u) = (gate.matrix.values()?, up.matrix.values()?);
                let mut up_grad = grad.into_values()?;
                let mut gate_grad = vec![0.0; up_grad.len()];
                let widths = [columns, columns];
                p.pool.rows(
                    [&mut up_grad, &mut gate_grad],
                    widths,
                    16,
                    |range, [up_grad, gate_grad]| {
                        let at = range.start * columns..range.end * columns;
                        gradients::swiglu_gradient(&g[at.clone()], &u[at], up_grad, gate_grad);
                    },
                );
                to.add(up.node, Matrix::host(up_grad, columns))?;
                to.add(gate.node, Matrix::host(gate_grad, columns))
            }
            Compute::Tensors { .. } => {
                let (down, g, u) = (grad.tensor()?, gate.matrix.tensor()?, up.matrix.tensor()?);
                let s = sigmoid(g)?;
                let silu = g.mul(&s)?;
                to.add(up.node, Matrix::device(down.mul(&silu)?)?)?;
                // s + silu (1 - s)
                let slope = s.add(&silu.mul(&s.affine(-1.0, 1.0)?)?)?;
                to.add(gate.node, Matrix::device(down.mul(u)?.mul(&slope)?)?)
            }
        },
    ))
}

fn sigmoid(x: &candle_core::Tensor) -> Result<candle_core::Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}
