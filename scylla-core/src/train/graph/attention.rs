//! Attention over packed rows, with keys of a row's own from later steps.

use candle_core::{D, Tensor};

use super::{Compute, PackedRows, Tape, Value};
use crate::kernels::causal::{self, Packed};
use crate::model::LayerSpec;
use crate::plugin::Matrix;
use crate::{Error, Result};

/// Mixes values by queries `[M, A E]`. `steps` are keys and values `[M, K E]`: those of the first are seen by the rows at and
/// behind them in their document (within the window), those of the others by their own row alone; one softmax over all
/// (EAGLE-3's training-time test, arXiv:2503.01840).
pub fn attention(
    tape: &mut Tape,
    q: &Value,
    steps: &[(Value, Value)],
    rows: &PackedRows,
    spec: &LayerSpec,
) -> Result<Value> {
    let fits = |v: &Value, width: usize| v.rows() == rows.count() && v.columns() == width;
    let kv = |(k, v): &(Value, Value)| fits(k, spec.kv_width()) && fits(v, spec.kv_width());
    if !fits(q, spec.q_width()) || !steps.iter().all(kv) || steps.is_empty() {
        return Err(Error::Invalid(format!(
            "queries, keys or values that are not of {} rows",
            rows.count()
        )));
    }
    let out = match &tape.on {
        Compute::Kernels(p) => {
            let (k, v) = host(steps)?;
            let q = q.matrix.values()?;
            let mut out = vec![0.0; q.len()];
            causal::attend(p, &packed(spec, rows), q, &k, &v, &mut out);
            Matrix::host(out, spec.q_width())
        }
        Compute::Tensors { .. } => {
            let parts = Parts::new(q, steps, rows, spec)?;
            let p = parts.weights()?;
            let mut mixed = p[0].matmul(&parts.values[0])?;
            for (p, v) in p[1..].iter().zip(&parts.values[1..]) {
                mixed = mixed.add(&v.broadcast_mul(p)?)?;
            }
            parts.joined(&mixed)?
        }
    };
    let (q, steps, rows, spec, on) = (
        q.clone(),
        steps.to_vec(),
        rows.clone(),
        spec.clone(),
        tape.on.clone(),
    );
    let mut from = vec![&q];
    from.extend(steps.iter().flat_map(|(k, v)| [k, v]));
    let from: Vec<Value> = from.into_iter().cloned().collect();
    let from: Vec<&Value> = from.iter().collect();
    Ok(tape.record(&from, out, move |grad, to| match &on {
        Compute::Kernels(p) => {
            let (k, v) = host(&steps)?;
            let queries = q.matrix.values()?;
            let mut q_grad = vec![0.0; queries.len()];
            let mut k_grad = vec![Vec::new(); steps.len()];
            let mut v_grad = k_grad.clone();
            let shape = packed(&spec, &rows);
            causal::gradient(
                p,
                &shape,
                queries,
                &k,
                &v,
                grad.values()?,
                &mut q_grad,
                &mut k_grad,
                &mut v_grad,
            );
            to.add(q.node, Matrix::host(q_grad, spec.q_width()))?;
            for ((k, v), (k_grad, v_grad)) in steps.iter().zip(k_grad.into_iter().zip(v_grad)) {
                to.add(k.node, Matrix::host(k_grad, spec.kv_width()))?;
                to.add(v.node, Matrix::host(v_grad, spec.kv_width()))?;
            }
            Ok(())
        }
        Compute::Tensors { .. } => {
            let parts = Parts::new(&q, &steps, &rows, &spec)?;
            let p = parts.weights()?;
            let down = parts.heads(&grad)?;
            // Slopes of the weights, then of the scores: p (slope - sum p slope).
            let mut slopes = vec![down.matmul(&parts.values[0].t()?)?];
            for v in &parts.values[1..] {
                slopes.push(down.mul(v)?.sum_keepdim(D::Minus1)?);
            }
            let mut mean = p[0].mul(&slopes[0])?.sum_keepdim(D::Minus1)?;
            for (p, slope) in p[1..].iter().zip(&slopes[1..]) {
                mean = mean.add(&p.mul(slope)?)?;
            }
            let scores = |(p, slope): (&Tensor, &Tensor)| -> Result<Tensor> {
                Ok((p.mul(&slope.broadcast_sub(&mean)?)? * parts.scale)?)
            };
            let slopes = p
                .iter()
                .zip(&slopes)
                .map(scores)
                .collect::<Result<Vec<_>>>()?;
            let mut q_grad = slopes[0].matmul(&parts.keys[0])?;
            for (slope, k) in slopes[1..].iter().zip(&parts.keys[1..]) {
                q_grad = q_grad.add(&k.broadcast_mul(slope)?)?;
            }
            to.add(q.node, parts.joined(&q_grad)?)?;
            for (i, (k, v)) in steps.iter().enumerate() {
                let (k_grad, v_grad) = match i {
                    0 => (slopes[0].t()?.matmul(&parts.q)?, p[0].t()?.matmul(&down)?),
                    _ => (
                        parts.q.broadcast_mul(&slopes[i])?,
                        down.broadcast_mul(&p[i])?,
                    ),
                };
                to.add(k.node, parts.grouped(&k_grad)?)?;
                to.add(v.node, parts.grouped(&v_grad)?)?;
            }
            Ok(())
        }
    }))
}

fn packed<'a>(spec: &LayerSpec, rows: &'a PackedRows) -> Packed<'a> {
    Packed {
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        documents: &rows.documents,
        window: spec.window,
    }
}

type Sides<'a> = (Vec<&'a [f32]>, Vec<&'a [f32]>);

fn host(steps: &[(Value, Value)]) -> Result<Sides<'_>> {
    let mut sides = (Vec::new(), Vec::new());
    for (k, v) in steps {
        sides.0.push(k.matrix.values()?);
        sides.1.push(v.matrix.values()?);
    }
    Ok(sides)
}

/// All sides as tensors `[B, A, S, E]`, those of kv heads repeated for their groups.
struct Parts {
    batch: usize,
    length: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f64,
    mask: Tensor,
    q: Tensor,
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
}

impl Parts {
    fn new(
        q: &Value,
        steps: &[(Value, Value)],
        rows: &PackedRows,
        spec: &LayerSpec,
    ) -> Result<Self> {
        let of = q.matrix.tensor()?;
        let mut parts = Self {
            batch: rows.batch,
            length: rows.length,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            scale: (spec.head_dim as f64).sqrt().recip(),
            mask: rows.mask(spec.window, of.device(), of.dtype())?,
            q: of.clone(),
            keys: Vec::new(),
            values: Vec::new(),
        };
        parts.q = parts.heads(&q.matrix)?;
        let group = spec.heads / spec.kv_heads;
        let repeated = |m: &Matrix| -> Result<Tensor> {
            let (b, s, k, e) = (parts.batch, parts.length, parts.kv_heads, parts.head_dim);
            let heads = parts.heads(m)?.unsqueeze(2)?;
            Ok(heads
                .broadcast_as((b, k, group, s, e))?
                .reshape((b, k * group, s, e))?)
        };
        let keys = steps
            .iter()
            .map(|(k, _)| repeated(&k.matrix))
            .collect::<Result<_>>()?;
        let values = steps
            .iter()
            .map(|(_, v)| repeated(&v.matrix))
            .collect::<Result<_>>()?;
        (parts.keys, parts.values) = (keys, values);
        Ok(parts)
    }

    /// `[M, heads E]` as `[B, heads, S, E]`.
    fn heads(&self, m: &Matrix) -> Result<Tensor> {
        let heads = m.columns / self.head_dim;
        let t = m
            .tensor()?
            .reshape((self.batch, self.length, heads, self.head_dim))?;
        Ok(t.transpose(1, 2)?.contiguous()?)
    }

    /// And back.
    fn joined(&self, t: &Tensor) -> Result<Matrix> {
        let rows = self.batch * self.length;
        Matrix::device(t.transpose(1, 2)?.contiguous()?.reshape((rows, ()))?)
    }

    /// The sum over groups `[M, K E]`.
    fn grouped(&self, t: &Tensor) -> Result<Matrix> {
        let (b, s, k, e) = (self.batch, self.length, self.kv_heads, self.head_dim);
        self.joined(&t.reshape((b, k, (), s, e))?.sum(2)?)
    }

    /// Probabilities over the keys of the first step `[B, A, S, S]`, then over each later one `[B, A, S, 1]`.
    fn weights(&self) -> Result<Vec<Tensor>> {
        let first = (self.q.matmul(&self.keys[0].t()?)? * self.scale)?;
        let mut scores = vec![first.broadcast_add(&self.mask)?];
        for k in &self.keys[1..] {
            scores.push((self.q.mul(k)?.sum_keepdim(D::Minus1)? * self.scale)?);
        }
        let all = Tensor::cat(&scores, D::Minus1)?;
        let e = all.broadcast_sub(&all.max_keepdim(D::Minus1)?)?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
        let mut parts = vec![p.narrow(D::Minus1, 0, self.length)?.contiguous()?];
        for i in 1..self.keys.len() {
            parts.push(p.narrow(D::Minus1, self.length + i - 1, 1)?.contiguous()?);
        }
        Ok(parts)
    }
}
