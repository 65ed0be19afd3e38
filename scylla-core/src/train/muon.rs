//! Muon: steps of matrices are their momentum with all singular values brought near one.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::graph::Compute;
use crate::kernels::{Products, View};
use crate::plugin::Matrix;
use crate::{Error, Result};

/// Settings of Muon (Jordan et al., 2024), whose steps are scaled to the size of AdamW's, 0.2 sqrt(max(N, K)) (arXiv:2502.16982):
/// learning rate, schedule, decay and clipping are those beside it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MuonSettings {
    /// Share of the momentum that stays.
    pub momentum: f64,
    /// Iterations of Newton and Schulz.
    pub iterations: usize,
}

impl Default for MuonSettings {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            iterations: 5,
        }
    }
}

impl MuonSettings {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the setting that is out of range.
    pub fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.momentum) {
            return Err(Error::Invalid(format!(
                "optimizer.muon.momentum {}: expected 0 or more, below 1",
                self.momentum
            )));
        }
        if !(1..=20).contains(&self.iterations) {
            return Err(Error::Invalid(format!(
                "optimizer.muon.iterations {}: expected 1 to 20",
                self.iterations
            )));
        }
        Ok(())
    }

    /// Whether a parameter is one that Muon steps: a matrix, and neither an embedding nor a head.
    pub fn takes(name: &str, value: &Matrix) -> bool {
        let apart = ["embed_tokens.weight", "lm_head.weight"];
        value.rows() > 1 && value.columns > 1 && !apart.iter().any(|a| name.ends_with(a))
    }
}

/// The polynomial's coefficients.
const A: f64 = 3.4445;
const B: f64 = -4.7750;
const C: f64 = 2.0315;

/// What a step needs beside the settings.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// The learning rate.
    pub(super) rate: f64,
    /// What a parameter shrinks by.
    pub(super) shrink: f64,
    /// What gradients are multiplied by, and held within then.
    pub(super) scale: f32,
    pub(super) limit: f32,
}

/// One step of a matrix `[N, K]` and its momentum.
pub(super) fn step(
    on: &Compute,
    settings: &MuonSettings,
    step: Step,
    value: &mut Matrix,
    momentum: &mut Matrix,
    grad: &Matrix,
) -> Result<()> {
    let (rows, columns) = (value.rows(), value.columns);
    if [&*momentum, grad].map(|m| (m.rows(), m.columns)) != [(rows, columns); 2] {
        return Err(Error::Invalid(
            "a gradient of another shape than its parameter".into(),
        ));
    }
    let size = step.rate * 0.2 * (rows.max(columns) as f64).sqrt();
    let stays = settings.momentum;
    match on {
        Compute::Kernels(p) => {
            let (kept, new) = (stays as f32, (1.0 - stays) as f32);
            let m = momentum.values_mut()?;
            let ahead = m.iter_mut().zip(grad.values()?).map(|(m, g)| {
                let g = (g * step.scale).clamp(-step.limit, step.limit);
                *m = kept * *m + new * g;
                kept * *m + new * g
            });
            let direction = orthogonal(p, ahead.collect(), rows, columns, settings.iterations);
            let (size, left) = (size as f32, (1.0 - step.shrink) as f32);
            for (x, d) in value.values_mut()?.iter_mut().zip(&direction) {
                *x = *x * left - size * d;
            }
        }
        Compute::Tensors { products, .. } => {
            let wide = |m: &Matrix| -> Result<Tensor> { Ok(m.tensor()?.to_dtype(DType::F32)?) };
            let mut g = (wide(grad)? * f64::from(step.scale))?;
            if step.limit.is_finite() {
                g = g.clamp(-step.limit, step.limit)?;
            }
            let new = (&g * (1.0 - stays))?;
            let m = ((wide(momentum)? * stays)? + &new)?;
            let ahead = ((&m * stays)? + new)?;
            let direction = orthogonal_tensor(&ahead, *products, settings.iterations)?;
            let next = ((wide(value)? * (1.0 - step.shrink))? - (direction * size)?)?;
            let dtype = value.tensor()?.dtype();
            *value = Matrix::device(next.to_dtype(dtype)?)?;
            *momentum = Matrix::device(m)?;
        }
    }
    Ok(())
}

/// Brings the singular values of a matrix near one: each iteration X = a X + (b S + c S^2) X with S = X X^T, of the shorter
/// side.
fn orthogonal(
    p: &Products,
    mut x: Vec<f32>,
    rows: usize,
    columns: usize,
    iterations: usize,
) -> Vec<f32> {
    let norm = crate::kernels::gradients::squares(&x).sqrt() + 1e-7;
    x.iter_mut().for_each(|v| *v /= norm as f32);
    let (n, flat) = (rows.min(columns), rows <= columns);
    let (mut s, mut mix) = (vec![0.0; n * n], vec![0.0; n * n]);
    for _ in 0..iterations {
        let view = View::new(&x, rows, columns);
        match flat {
            true => p.multiply(view, view.transposed(), false, &mut s),
            false => p.multiply(view.transposed(), view, false, &mut s),
        }
        for (mix, s) in mix.iter_mut().zip(&s) {
            *mix = B as f32 / C as f32 * s;
        }
        // c (b / c S + S S)
        let square = View::new(&s, n, n);
        p.multiply(square, square, true, &mut mix);
        mix.iter_mut().for_each(|v| *v *= C as f32);
        let mut next: Vec<f32> = x.iter().map(|v| A as f32 * v).collect();
        let mix = View::new(&mix, n, n);
        match flat {
            true => p.multiply(mix, view, true, &mut next),
            false => p.multiply(view, mix, true, &mut next),
        }
        x = next;
    }
    x
}

fn orthogonal_tensor(of: &Tensor, products: DType, iterations: usize) -> Result<Tensor> {
    let (rows, columns) = of.dims2()?;
    let norm = f64::from(of.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt() + 1e-7;
    let mut x = match rows <= columns {
        true => of.clone(),
        false => of.t()?.contiguous()?,
    };
    x = (x / norm)?.to_dtype(products)?;
    for _ in 0..iterations {
        let s = x.matmul(&x.t()?.contiguous()?)?;
        let mix = ((&s * B)? + (s.matmul(&s)? * C)?)?;
        x = ((&x * A)? + mix.matmul(&x)?)?;
    }
    let x = x.to_dtype(DType::F32)?;
    Ok(match rows <= columns {
        true => x,
        false => x.t()?.contiguous()?,
    })
}
