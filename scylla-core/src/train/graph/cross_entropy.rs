//! Cross entropy over a vocabulary: logits exist for a few rows at a time, and leave their gradient behind.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, Tensor};

use super::{Compute, Tape, Value};
use crate::kernels::divergence::{self, Mix};
use crate::kernels::gradients::{self, Goal, RowLoss};
use crate::kernels::{Products, Right, View, zeros};
use crate::plugin::Matrix;
use crate::{Error, Result};

/// Rows whose logits exist at a time, of a vocabulary that is as wide as this or wider.
const CHUNK: usize = 256;
const WIDE: usize = 49_152;

/// What turns states into logits: a weight `[V, H]`.
#[derive(Clone)]
pub struct Head {
    weight: Value,
    /// `[H, V]` and `[V, H]`, packed once where the weight is frozen.
    packed: Option<[Arc<Right>; 2]>,
}

impl Head {
    /// A head that does not change: only its input gets a gradient.
    pub fn frozen(on: &Compute, weight: Matrix) -> Result<Self> {
        let packed = match on {
            Compute::Kernels(p) => {
                let view = View::new(weight.values()?, weight.rows(), weight.columns);
                let pack = |view| Arc::new(Right::pack(&p.pool, p.form, view));
                Some([pack(view.transposed()), pack(view)])
            }
            Compute::Tensors { .. } => None,
        };
        // The kernels read the packed sides alone, and candle's products what they round to.
        let weight = match on {
            Compute::Kernels(_) => Matrix::host(Vec::new(), weight.columns),
            Compute::Tensors { products, .. } => {
                Matrix::device(weight.tensor()?.to_dtype(*products)?)?
            }
        };
        Ok(Self {
            weight: Value::constant(weight),
            packed,
        })
    }

    /// A head that is trained.
    pub fn trained(weight: &Value) -> Self {
        Self {
            weight: weight.clone(),
            packed: None,
        }
    }

    /// V.
    pub fn columns(&self) -> usize {
        match &self.packed {
            Some([down, _]) => down.shape().1,
            None => self.weight.rows(),
        }
    }

    /// Bytes it holds beside the weight it was made of.
    pub fn bytes(&self) -> usize {
        self.packed.iter().flatten().map(|side| side.bytes()).sum()
    }

    fn sides(&self, tape: &mut Tape, p: &Products) -> Result<[Arc<Right>; 2]> {
        match &self.packed {
            Some(sides) => Ok(sides.clone()),
            None => Ok([
                tape.gradients.right(p, &self.weight, true)?,
                tape.gradients.right(p, &self.weight, false)?,
            ]),
        }
    }

    /// Logits `[M, V]` of states `[M, H]`, all at once.
    ///
    /// # Errors
    /// If sizes do not fit.
    pub fn logits(&self, on: &Compute, states: &Matrix) -> Result<Matrix> {
        let Compute::Kernels(p) = on else {
            return Matrix::device(self.tensor_logits(on, states.tensor()?)?);
        };
        let [down, _] = self.sides(&mut Tape::new(on), p)?;
        let (m, v) = (states.rows(), self.columns());
        let mut out = zeros::<f32>(m * v);
        let x = View::new(states.values()?, m, states.columns);
        p.multiply_packed(x, &down, false, &mut out, v);
        Ok(Matrix::host(out, v))
    }

    fn tensor_logits(&self, on: &Compute, states: &Tensor) -> Result<Tensor> {
        let Compute::Tensors {
            dtype, products, ..
        } = on
        else {
            return Err(Error::Invalid("tensors among kernels".into()));
        };
        let w = self.weight.matrix.tensor()?.to_dtype(*products)?;
        Ok(states
            .to_dtype(*products)?
            .matmul(&w.t()?)?
            .to_dtype(*dtype)?)
    }
}

/// A row that counts: which row of a teacher it is held against, and what its loss is multiplied by in the gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared {
    /// The student's row.
    pub row: usize,
    /// The teacher's.
    pub goal: usize,
    /// The factor.
    pub weight: f64,
}

/// What rows are held against.
pub enum Teacher<'a> {
    /// The softmax of a frozen head's logits over states `[., H]`.
    States(&'a Matrix, &'a Head),
    /// Probabilities `[., V]`, which need not sum to one.
    Probabilities(&'a Matrix),
}

/// A loss over rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSum {
    /// The sum over rows, not weighted.
    pub sum: f64,
    /// Rows whose most probable column is the teacher's.
    pub correct: usize,
}

/// The cross entropy of `states` `[M, H]` under a head with what a teacher says, over the rows that count. The tape is seeded
/// with the gradient of the weighted sum.
pub fn cross_entropy(
    tape: &mut Tape,
    states: &Value,
    head: &Head,
    teacher: &Teacher<'_>,
    rows: &[Compared],
) -> Result<LossSum> {
    divergence(tape, states, head, teacher, &Mix::CE, rows)
}

/// The same of another distance, or of a sum of several.
///
/// # Errors
/// As [`cross_entropy`].
pub fn divergence(
    tape: &mut Tape,
    states: &Value,
    head: &Head,
    teacher: &Teacher<'_>,
    mix: &Mix,
    rows: &[Compared],
) -> Result<LossSum> {
    match tape.on.clone() {
        Compute::Kernels(p) => on_kernels(tape, &p, states, head, (teacher, mix), rows),
        Compute::Tensors { .. } => on_tensors(tape, states, head, (teacher, mix), rows),
    }
}

/// Rows of a matrix, side by side in memory.
fn gathered(from: &[f32], columns: usize, rows: impl Iterator<Item = usize>) -> Vec<f32> {
    let mut out = Vec::new();
    rows.for_each(|row| out.extend_from_slice(&from[row * columns..(row + 1) * columns]));
    out
}

fn on_kernels(
    tape: &mut Tape,
    p: &Products,
    states: &Value,
    head: &Head,
    (teacher, mix): (&Teacher<'_>, &Mix),
    rows: &[Compared],
) -> Result<LossSum> {
    let (h, v) = (states.columns(), head.columns());
    let [down, up] = head.sides(tape, p)?;
    let values = states.matrix.values()?;
    let mut grad = vec![0.0; values.len()];
    // Of a small vocabulary more rows, so that the gradient of a trained head is not read and written for few of them.
    let chunk = (CHUNK * WIDE / v.max(1)).max(CHUNK).min(rows.len());
    let (mut student, mut goals) = (zeros::<f32>(chunk * v), Vec::new());
    if let Teacher::States(..) = teacher {
        goals = zeros::<f32>(chunk * v);
    }
    let mut total = LossSum::default();
    for rows in rows.chunks(chunk.max(1)) {
        let n = rows.len();
        let x = gathered(values, h, rows.iter().map(|r| r.row));
        let student = &mut student[..n * v];
        p.multiply_packed(View::new(&x, n, h), &down, false, student, v);
        let found = Mutex::new(vec![RowLoss::default(); n]);
        let keep = |row: usize, loss: RowLoss| {
            found.lock().unwrap_or_else(PoisonError::into_inner)[row] = loss;
        };
        match teacher {
            Teacher::States(states, head) => {
                let width = states.columns;
                let t = gathered(states.values()?, width, rows.iter().map(|r| r.goal));
                let Some([down, _]) = &head.packed else {
                    return Err(Error::Invalid("a teacher's head that is trained".into()));
                };
                let goals = &mut goals[..n * v];
                p.multiply_packed(View::new(&t, n, width), down, false, goals, v);
                p.pool.rows(
                    [&mut *student, goals],
                    [v, v],
                    1,
                    |range, [student, goals]| {
                        let pairs = student.chunks_exact_mut(v).zip(goals.chunks_exact_mut(v));
                        for (row, (student, goal)) in range.zip(pairs) {
                            let weight = rows[row].weight as f32;
                            keep(
                                row,
                                divergence::divergence(student, Goal::Logits(goal), mix, weight),
                            );
                        }
                    },
                );
            }
            Teacher::Probabilities(all) => {
                let all = all.values()?;
                p.pool.rows([&mut *student], [v], 1, |range, [student]| {
                    for (row, student) in range.zip(student.chunks_exact_mut(v)) {
                        let Compared { goal, weight, .. } = rows[row];
                        let goal = Goal::Probabilities(&all[goal * v..(goal + 1) * v]);
                        keep(
                            row,
                            divergence::divergence(student, goal, mix, weight as f32),
                        );
                    }
                });
            }
        }
        for loss in found.into_inner().unwrap_or_else(PoisonError::into_inner) {
            total.sum += loss.loss;
            total.correct += usize::from(loss.correct);
        }
        let slopes = View::new(student, n, v);
        if states.node.is_some() {
            let mut x_grad = vec![0.0; n * h];
            p.multiply_packed(slopes, &up, false, &mut x_grad, h);
            for (row, x_grad) in rows.iter().zip(x_grad.chunks_exact(h)) {
                gradients::accumulate(&mut grad[row.row * h..(row.row + 1) * h], x_grad);
            }
        }
        if let Some(node) = head.weight.node {
            let x = View::new(&x, n, h);
            tape.gradients.product(node, v, h, |out, add| {
                p.multiply(slopes.transposed(), x, add, out)
            })?;
        }
    }
    tape.seed(states, Matrix::host(grad, h))?;
    Ok(total)
}

/// A loss of some rows of `states` `[M, H]` under a head, whatever it is: it gets their logits `[rows, V]` and leaves its gradient
/// by them in their place. Logits exist for these rows alone, and no longer than this takes.
///
/// # Errors
/// If the loss fails.
pub fn under_head<T>(
    tape: &mut Tape,
    states: &Value,
    head: &Head,
    rows: &[usize],
    loss: impl FnOnce(&mut Matrix) -> Result<T>,
) -> Result<T> {
    let (m, h, v, n) = (states.rows(), states.columns(), head.columns(), rows.len());
    if let Some(row) = rows.iter().find(|&&row| row >= m) {
        return Err(Error::Invalid(format!("row {row} of {m} under a head")));
    }
    match tape.on.clone() {
        Compute::Kernels(p) => {
            let [down, up] = head.sides(tape, &p)?;
            let x = gathered(states.matrix.values()?, h, rows.iter().copied());
            let mut logits = zeros::<f32>(n * v);
            p.multiply_packed(View::new(&x, n, h), &down, false, &mut logits, v);
            let mut logits = Matrix::host(logits, v);
            let found = loss(&mut logits)?;
            let slopes = View::new(logits.values()?, n, v);
            if states.node.is_some() {
                let mut x_grad = vec![0.0; n * h];
                p.multiply_packed(slopes, &up, false, &mut x_grad, h);
                let mut grad = vec![0.0; m * h];
                for (row, x_grad) in rows.iter().zip(x_grad.chunks_exact(h)) {
                    gradients::accumulate(&mut grad[row * h..(row + 1) * h], x_grad);
                }
                tape.seed(states, Matrix::host(grad, h))?;
            }
            if let Some(node) = head.weight.node {
                let x = View::new(&x, n, h);
                tape.gradients.product(node, v, h, |out, add| {
                    p.multiply(slopes.transposed(), x, add, out)
                })?;
            }
            Ok(found)
        }
        Compute::Tensors {
            dtype, products, ..
        } => {
            let values = states.matrix.tensor()?;
            let x = chosen(values, rows.iter().copied())?;
            let mut logits = Matrix::device(head.tensor_logits(&tape.on, &x)?)?;
            let found = loss(&mut logits)?;
            let slopes = logits.tensor()?.to_dtype(products)?;
            if states.node.is_some() {
                let w = head.weight.matrix.tensor()?.to_dtype(products)?;
                let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
                let ids = Tensor::from_vec(ids, n, values.device())?;
                let part = slopes.matmul(&w)?.to_dtype(dtype)?;
                let grad = values.zeros_like()?.index_add(&ids, &part, 0)?;
                tape.seed(states, Matrix::device(grad)?)?;
            }
            if head.weight.node.is_some() {
                let part = slopes.t()?.matmul(&x.to_dtype(products)?)?;
                tape.seed(&head.weight, Matrix::device(part.to_dtype(dtype)?)?)?;
            }
            Ok(found)
        }
    }
}

fn chosen(of: &Tensor, rows: impl Iterator<Item = usize>) -> Result<Tensor> {
    let rows: Vec<u32> = rows.map(|row| row as u32).collect();
    let count = rows.len();
    Ok(of.index_select(&Tensor::from_vec(rows, count, of.device())?, 0)?)
}

fn on_tensors(
    tape: &mut Tape,
    states: &Value,
    head: &Head,
    (teacher, mix): (&Teacher<'_>, &Mix),
    rows: &[Compared],
) -> Result<LossSum> {
    let on = tape.on.clone();
    let Compute::Tensors {
        device,
        dtype,
        products,
    } = &on
    else {
        return Err(Error::Invalid("tensors among kernels".into()));
    };
    let values = states.matrix.tensor()?;
    let mut grad = values.zeros_like()?;
    let mut total = LossSum::default();
    // On a GPU larger pieces keep it busy.
    let chunk = if device.is_cpu() { CHUNK } else { 4 * CHUNK };
    for rows in rows.chunks(chunk) {
        let x = chosen(values, rows.iter().map(|r| r.row))?;
        let s = head.tensor_logits(&on, &x)?;
        let p = match teacher {
            Teacher::States(states, head) => {
                let t = chosen(states.tensor()?, rows.iter().map(|r| r.goal))?;
                softmax(&head.tensor_logits(&on, &t)?)?
            }
            Teacher::Probabilities(all) => chosen(all.tensor()?, rows.iter().map(|r| r.goal))?,
        };
        let s = s.broadcast_sub(&s.max_keepdim(D::Minus1)?)?;
        let e = s.exp()?;
        let sum = e.sum_keepdim(D::Minus1)?;
        let mass = p.sum_keepdim(D::Minus1)?;
        let ce = mass
            .mul(&sum.log()?)?
            .sub(&p.mul(&s)?.sum_keepdim(D::Minus1)?)?;
        let mut slopes = e.broadcast_mul(&mass.div(&sum)?)?.sub(&p)?;
        let mut loss = ce;
        if *mix != Mix::CE {
            let q = e.broadcast_div(&sum)?;
            loss = (loss * (mix.ce + mix.kl))?;
            slopes = (slopes * (mix.ce + mix.kl))?;
            if [mix.kl, mix.tv, mix.lk].iter().any(|&part| part != 0.0) {
                let (more, by_q) = apart_on_tensors(&q, &p, &mass, mix)?;
                loss = (loss + more)?;
                let mean = q.mul(&by_q)?.sum_keepdim(D::Minus1)?;
                slopes = (slopes + q.mul(&by_q.broadcast_sub(&mean)?)?)?;
            }
            if mix.top != 0.0 {
                let (more, by_logits) = top_on_tensors(&s, &sum, &q, &p, mix.k)?;
                loss = (loss + (more * mix.top)?)?;
                slopes = (slopes + (by_logits * mix.top)?)?;
            }
        }
        total.sum += loss
            .to_dtype(candle_core::DType::F64)?
            .sum_all()?
            .to_scalar::<f64>()?;
        let same = s.argmax(D::Minus1)?.eq(&p.argmax(D::Minus1)?)?;
        total.correct += same
            .to_dtype(candle_core::DType::F32)?
            .sum_all()?
            .to_scalar::<f32>()? as usize;
        let weights: Vec<f64> = rows.iter().map(|r| r.weight).collect();
        let weights = Tensor::from_vec(weights, (rows.len(), 1), device)?.to_dtype(*dtype)?;
        let slopes = slopes.broadcast_mul(&weights)?.to_dtype(*products)?;
        if states.node.is_some() {
            let w = head.weight.matrix.tensor()?.to_dtype(*products)?;
            let ids: Vec<u32> = rows.iter().map(|r| r.row as u32).collect();
            let ids = Tensor::from_vec(ids, rows.len(), device)?;
            grad = grad.index_add(&ids, &slopes.matmul(&w)?.to_dtype(*dtype)?, 0)?;
        }
        if head.weight.node.is_some() {
            let part = slopes
                .t()?
                .matmul(&x.to_dtype(*products)?)?
                .to_dtype(*dtype)?;
            tape.seed(&head.weight, Matrix::device(part)?)?;
        }
    }
    tape.seed(states, Matrix::device(grad)?)?;
    Ok(total)
}

/// Cross entropy over the goal's `k` most probable columns, row by row, and its gradient by the logits `s`.
fn top_on_tensors(
    s: &Tensor,
    sum: &Tensor,
    q: &Tensor,
    p: &Tensor,
    k: usize,
) -> Result<(Tensor, Tensor)> {
    let (rows, columns) = p.dims2()?;
    let best = Matrix::device(p.clone())?.top_log_probabilities(columns, k)?;
    let ids = (0..rows).flat_map(|row| best.row(row).iter().map(|&(id, _)| id as u32));
    let ids = Tensor::from_vec(ids.collect::<Vec<_>>(), (rows, k.min(columns)), p.device())?;
    let goal = p.gather(&ids, 1)?;
    let mass = goal.sum_keepdim(1)?;
    let along = goal.mul(&s.gather(&ids, 1)?)?.sum_keepdim(1)?;
    let loss = mass.mul(&sum.log()?)?.sub(&along)?;
    let goals = p.zeros_like()?.scatter_add(&ids, &goal, 1)?;
    Ok((loss, q.broadcast_mul(&mass)?.sub(&goals)?))
}

/// What a sum of distances holds beside cross entropy, row by row, and what it changes by with q.
fn apart_on_tensors(q: &Tensor, p: &Tensor, mass: &Tensor, mix: &Mix) -> Result<(Tensor, Tensor)> {
    let sum = |t: Tensor| -> Result<Tensor> { Ok(t.sum_keepdim(D::Minus1)?) };
    // Where p is zero, p log p is: the logarithm is of one there.
    let zero = p.le(0.0)?.to_dtype(p.dtype())?;
    let own = sum(p.mul(&p.add(&zero)?.log()?)?)?;
    let variation = (sum(p.sub(q)?.abs()?)? * 0.5)?;
    // A goal without mass overlaps nothing: one stands for it, whose logarithm is zero.
    let empty = mass.le(0.0)?.to_dtype(p.dtype())?;
    let overlap = sum(p.minimum(q)?)?.add(&empty)?;
    let below = q.lt(p)?.to_dtype(p.dtype())?;
    let loss = ((own * mix.kl)? + (variation * mix.tv)?)?;
    let loss = (loss - (overlap.log()? * mix.lk)?)?;
    let by_q = (q.sub(p)?.sign()? * (0.5 * mix.tv))?;
    let by_q = (by_q - (below.broadcast_div(&overlap)? * mix.lk)?)?;
    Ok((loss, by_q))
}

fn softmax(logits: &Tensor) -> Result<Tensor> {
    let e = logits
        .broadcast_sub(&logits.max_keepdim(D::Minus1)?)?
        .exp()?;
    Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
}

/// What a teacher's states `[M, H]` say under its head: the most probable token of each row, and the probabilities among
/// the listed columns alone `[M, listed]`, renormalised. Logits exist for a few rows at a time.
///
/// # Errors
/// If a listed column is none of the head's.
pub fn probabilities(
    on: &Compute,
    states: &Matrix,
    head: &Head,
    listed: &[u32],
) -> Result<(Vec<u32>, Matrix)> {
    if let (Compute::Kernels(p), false) = (on, states.is_on_device()) {
        check_listed(listed, head.columns())?;
        let [down, _] = head.sides(&mut Tape::new(on), p)?;
        let x = View::new(states.values()?, states.rows(), states.columns);
        let (best, mut all) = p.select(x, &down, listed);
        p.pool.rows([&mut all], [listed.len()], 1, |_, [rows]| {
            rows.chunks_exact_mut(listed.len())
                .for_each(gradients::softmax);
        });
        return Ok((best, Matrix::host(all, listed.len())));
    }
    among(on, states.rows(), head.columns(), listed, |rows| {
        let part = states.tensor()?.narrow(0, rows.start, rows.len())?;
        head.logits(on, &Matrix::device(part)?)
    })
}

/// The same of logits `[M, V]` that are given.
///
/// # Errors
/// If a listed column is none of them.
pub fn probabilities_of(
    on: &Compute,
    logits: &Matrix,
    listed: &[u32],
) -> Result<(Vec<u32>, Matrix)> {
    let v = logits.columns;
    among(on, logits.rows(), v, listed, |rows| {
        match logits.is_on_device() {
            false => Ok(Matrix::host(
                logits.values()?[rows.start * v..rows.end * v].to_vec(),
                v,
            )),
            true => Matrix::device(logits.tensor()?.narrow(0, rows.start, rows.len())?),
        }
    })
}

fn check_listed(listed: &[u32], v: usize) -> Result<()> {
    match listed.iter().find(|&&id| id as usize >= v) {
        Some(id) => Err(Error::Invalid(format!("column {id} of {v}"))),
        None => Ok(()),
    }
}

fn among(
    on: &Compute,
    m: usize,
    v: usize,
    listed: &[u32],
    logits: impl Fn(std::ops::Range<usize>) -> Result<Matrix>,
) -> Result<(Vec<u32>, Matrix)> {
    let n = listed.len();
    check_listed(listed, v)?;
    let chunks = |size: usize| {
        (0..m)
            .step_by(size)
            .map(move |first| first..m.min(first + size))
    };
    match on {
        Compute::Kernels(p) => {
            let mut best = vec![0; m];
            let mut all = zeros::<f32>(m * n);
            for rows in chunks(CHUNK) {
                let logits = logits(rows.clone())?;
                let logits = logits.values()?;
                let found = Mutex::new(&mut best[rows.clone()]);
                let out = &mut all[rows.start * n..rows.end * n];
                p.pool.rows([out], [n], 1, |range, [out]| {
                    for (row, out) in range.zip(out.chunks_exact_mut(n)) {
                        let logits = &logits[row * v..(row + 1) * v];
                        let most = gradients::argmax(logits) as u32;
                        found.lock().unwrap_or_else(PoisonError::into_inner)[row] = most;
                        out.iter_mut()
                            .zip(listed)
                            .for_each(|(o, &id)| *o = logits[id as usize]);
                        gradients::softmax(out);
                    }
                });
            }
            Ok((best, Matrix::host(all, n)))
        }
        Compute::Tensors { device, .. } => {
            let listed = Tensor::from_vec(listed.to_vec(), n, device)?;
            let (mut best, mut all) = (Vec::with_capacity(m), Vec::new());
            for rows in chunks(4 * CHUNK) {
                let logits = logits(rows)?;
                let logits = logits.tensor()?;
                best.extend(logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
                all.push(softmax(&logits.index_select(&listed, 1)?)?);
            }
            Ok((best, Matrix::device(Tensor::cat(&all, 0)?)?))
        }
    }
}
