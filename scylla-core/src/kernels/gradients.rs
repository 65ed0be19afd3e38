//! What training needs beside products and attention: gradients of what lies between them, and of cross entropy over long
//! rows. Row by row; the callers hand out rows to threads.

use super::exponential::exp;
use super::simd::{InstructionSet, Simd, dispatch};
use super::softmax::Real;

/// `x += y` by registers.
pub fn accumulate(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    dispatch!(InstructionSet::detect(), accumulate_of(x, y): (x: &mut [f32], y: &[f32]) <>);
}

#[inline(always)]
fn accumulate_of<S: Simd>(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// The gradient of [`super::rms_norm`] for rows `x` `[M, H]`: `grad` goes from the output's to the input's, and the weight's
/// is added to `weight_grad` `[H]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, grad: &mut [f32], weight_grad: &mut [f32]) {
    assert_eq!(x.len(), grad.len());
    assert_eq!(weight.len(), weight_grad.len());
    dispatch!(InstructionSet::detect(), norm_rows(x, weight, eps, grad, weight_grad): (x: &[f32], weight: &[f32], eps: f32, grad: &mut [f32], weight_grad: &mut [f32]) <>);
}

#[inline(always)]
fn norm_rows<S: Simd>(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    grad: &mut [f32],
    weight_grad: &mut [f32],
) {
    let h = weight.len();
    for (x, grad) in x.chunks_exact(h).zip(grad.chunks_exact_mut(h)) {
        let (mut squares, mut along) = ([0.0f32; 16], [0.0f32; 16]);
        let lanes = |i: usize| i % 16;
        for (i, ((&x, &g), &w)) in x.iter().zip(&*grad).zip(weight).enumerate() {
            squares[lanes(i)] += x * x;
            along[lanes(i)] += x * g * w;
        }
        let (squares, along): (f32, f32) = (squares.iter().sum(), along.iter().sum());
        // y = r x w with r = (mean x^2 + eps)^(-1/2): dx = r (g w - x r^2 mean(x g w)).
        let r = 1.0 / (squares / h as f32 + eps).sqrt();
        let pull = r * r * along / h as f32;
        for (((g, &x), &w), dw) in grad.iter_mut().zip(x).zip(weight).zip(&mut *weight_grad) {
            *dw += *g * x * r;
            *g = r * (*g * w - x * pull);
        }
    }
}

/// `silu(gate) * up`, value by value.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    dispatch!(InstructionSet::detect(), swiglu_of(gate, up, out): (gate: &[f32], up: &[f32], out: &mut [f32]) <>);
}

/// One over one plus e^-x.
#[inline(always)]
fn sigmoid<S: Simd>(x: S::V) -> S::V {
    let one = S::splat(1.0);
    S::div(one, S::add(one, S::exp(S::mul(x, S::splat(-1.0)))))
}

#[inline(always)]
fn swiglu_of<S: Simd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gates, rest) = gate.as_chunks::<16>();
    let (ups, last_up) = up.as_chunks::<16>();
    let (outs, last) = out.as_chunks_mut::<16>();
    for ((g, u), o) in gates.iter().zip(ups).zip(outs) {
        let (g, u) = (S::load(g), S::load(u));
        S::store(S::mul(S::mul(g, sigmoid::<S>(g)), u), o);
    }
    for ((&g, &u), o) in rest.iter().zip(last_up).zip(last) {
        *o = g / (1.0 + exp(-g)) * u;
    }
}

/// The gradient of [`swiglu`]: `grad` goes from the output's to `up`'s, and `gate`'s is written to `gate_grad`.
pub fn swiglu_gradient(gate: &[f32], up: &[f32], grad: &mut [f32], gate_grad: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == grad.len() && gate.len() == gate_grad.len());
    dispatch!(InstructionSet::detect(), swiglu_gradient_of(gate, up, grad, gate_grad): (gate: &[f32], up: &[f32], grad: &mut [f32], gate_grad: &mut [f32]) <>);
}

#[inline(always)]
fn swiglu_gradient_of<S: Simd>(gate: &[f32], up: &[f32], grad: &mut [f32], gate_grad: &mut [f32]) {
    let (gates, rest) = gate.as_chunks::<16>();
    let (ups, last_up) = up.as_chunks::<16>();
    let (grads, last) = grad.as_chunks_mut::<16>();
    let (outs, last_out) = gate_grad.as_chunks_mut::<16>();
    for (((g, u), d), o) in gates.iter().zip(ups).zip(grads).zip(outs) {
        let (g, u, down) = (S::load(g), S::load(u), S::load(d));
        let s = sigmoid::<S>(g);
        let silu = S::mul(g, s);
        // silu' = s (1 + g (1 - s)) = s + silu (1 - s)
        let away = S::fma(s, S::splat(-1.0), S::splat(1.0));
        let slope = S::fma(silu, away, s);
        S::store(S::mul(S::mul(down, u), slope), o);
        S::store(S::mul(down, silu), d);
    }
    for (((&g, &u), d), o) in rest.iter().zip(last_up).zip(last).zip(last_out) {
        let s = 1.0 / (1.0 + exp(-g));
        *o = *d * u * (s + g * s * (1.0 - s));
        *d *= g * s;
    }
}

/// What one step of AdamW (arXiv:1711.05101) multiplies by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamFactors {
    /// Learning rate.
    pub rate: f32,
    /// Share of the first moment that stays.
    pub beta1: f32,
    /// Share of the second.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// What parameters shrink by, beside the gradient: the decay times the rate.
    pub shrink: f32,
    /// `1 / (1 - beta1^t)`
    pub correct1: f32,
    /// `1 / (1 - beta2^t)`
    pub correct2: f32,
    /// What gradients are multiplied by first.
    pub scale: f32,
    /// What they are then held within, to either side.
    pub limit: f32,
}

/// One step for some parameters, their moments beside them.
pub fn adamw(
    values: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    grad: &[f32],
    f: AdamFactors,
) {
    assert!(values.len() == grad.len() && first.len() == grad.len() && second.len() == grad.len());
    dispatch!(InstructionSet::detect(), adamw_of(values, first, second, grad, f): (values: &mut [f32], first: &mut [f32], second: &mut [f32], grad: &[f32], f: AdamFactors) <>);
}

#[inline(always)]
fn adamw_of<S: Simd>(
    values: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    grad: &[f32],
    f: AdamFactors,
) {
    let moments = first.iter_mut().zip(second);
    for ((value, (m, v)), &g) in values.iter_mut().zip(moments).zip(grad) {
        let g = g * f.scale;
        let g = if g > f.limit { f.limit } else { g };
        let g = if g < -f.limit { -f.limit } else { g };
        *m = f.beta1 * *m + (1.0 - f.beta1) * g;
        *v = f.beta2 * *v + (1.0 - f.beta2) * g * g;
        let step = *m * f.correct1 / ((*v * f.correct2).sqrt() + f.eps);
        *value = *value * (1.0 - f.shrink) - f.rate * step;
    }
}

/// The sum of squares, in an order that depends on the number of values alone.
pub fn squares(values: &[f32]) -> f64 {
    dispatch!(InstructionSet::detect(), squares_of(values): (values: &[f32]) [f64] <>)
}

#[inline(always)]
fn squares_of<S: Simd>(values: &[f32]) -> f64 {
    let mut total = 0.0;
    for run in values.chunks(4096) {
        let mut sums = [0.0f32; 16];
        for few in run.chunks(16) {
            for (sum, v) in sums.iter_mut().zip(few) {
                *sum += v * v;
            }
        }
        total += sums.iter().map(|&s| f64::from(s)).sum::<f64>();
    }
    total
}

/// The loss of one row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowLoss {
    /// Cross entropy.
    pub loss: f64,
    /// Whether both sides hold the same column for the most probable; ties go to the lowest.
    pub correct: bool,
}

/// What a student's row is held against.
pub enum Goal<'a> {
    /// Logits, which are used up.
    Logits(&'a mut [f32]),
    /// Probabilities.
    Probabilities(&'a [f32]),
}

/// Cross entropy of a student's logits with the goal's probabilities. The logits become their gradient, times `weight`:
/// `weight (softmax(student) - p)`. NaN anywhere leaves NaN in the loss.
pub fn cross_entropy(student: &mut [f32], goal: Goal<'_>, weight: f32) -> RowLoss {
    match goal {
        Goal::Logits(teacher) => {
            assert_eq!(student.len(), teacher.len());
            dispatch!(InstructionSet::detect(), against_logits(student, teacher, weight): (student: &mut [f32], teacher: &mut [f32], weight: f32) [RowLoss] <>)
        }
        Goal::Probabilities(p) => {
            assert_eq!(student.len(), p.len());
            dispatch!(InstructionSet::detect(), against_probabilities(student, p, weight): (student: &mut [f32], p: &[f32], weight: f32) [RowLoss] <>)
        }
    }
}

/// The probabilities of a row of logits, in place; the column of the largest.
pub fn softmax(row: &mut [f32]) {
    dispatch!(InstructionSet::detect(), softmax_of(row): (row: &mut [f32]) <>);
}

#[inline(always)]
fn softmax_of<S: Simd>(row: &mut [f32]) {
    let max = super::elementwise::largest(row);
    let sum = exponentials::<S>(row, max);
    let factor = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= factor);
}

/// The column of the largest value, the lowest of equals.
pub fn argmax(row: &[f32]) -> usize {
    dispatch!(InstructionSet::detect(), argmax_of(row): (row: &[f32]) [usize] <>)
}

#[inline(always)]
fn argmax_of<S: Simd>(row: &[f32]) -> usize {
    place(row, super::elementwise::largest(row))
}

/// The first column of a value.
#[inline(always)]
pub(super) fn place(row: &[f32], value: f32) -> usize {
    const RUN: usize = 256;
    for (i, run) in row.chunks(RUN).enumerate() {
        // Without an early end, so that it is done by registers.
        if run.iter().fold(false, |any, &v| any | (v == value)) {
            return i * RUN + run.iter().position(|&v| v == value).unwrap_or(0);
        }
    }
    0
}

/// Exponentials relative to `reference`, in place, and their sum.
#[inline(always)]
pub(super) fn exponentials<S: Simd>(row: &mut [f32], reference: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (tiles, rest) = row.as_chunks_mut::<16>();
    for tile in tiles {
        for i in 0..16 {
            tile[i] = <f32 as Real>::exp(tile[i] - reference, S::FMA);
            sums[i] += tile[i];
        }
    }
    for (v, sum) in rest.iter_mut().zip(&mut sums) {
        *v = <f32 as Real>::exp(*v - reference, S::FMA);
        *sum += *v;
    }
    sums.iter().sum()
}

#[inline(always)]
fn against_logits<S: Simd>(student: &mut [f32], teacher: &mut [f32], weight: f32) -> RowLoss {
    let (most, most_of_teacher) = (
        super::elementwise::largest(student),
        super::elementwise::largest(teacher),
    );
    let correct = place(student, most) == place(teacher, most_of_teacher);
    // Of each: exponentials, and the teacher's times the student's logits, in one pass.
    let (mut sums, mut masses, mut along) = ([0.0f32; 16], [0.0f32; 16], [0.0f32; 16]);
    let mut each = |s: &mut f32, t: &mut f32, i: usize| {
        let above = *s - most;
        *t = <f32 as Real>::exp(*t - most_of_teacher, S::FMA);
        along[i] = <f32 as Real>::fused(*t, above, along[i], S::FMA);
        masses[i] += *t;
        *s = <f32 as Real>::exp(above, S::FMA);
        sums[i] += *s;
    };
    let (tiles, rest) = student.as_chunks_mut::<16>();
    let (goals, last) = teacher.as_chunks_mut::<16>();
    for (s, t) in tiles.iter_mut().zip(goals) {
        for i in 0..16 {
            each(&mut s[i], &mut t[i], i);
        }
    }
    for (i, (s, t)) in rest.iter_mut().zip(last).enumerate() {
        each(s, t, i);
    }
    let total = |lanes: &[f32; 16]| lanes.iter().map(|&v| f64::from(v)).sum::<f64>();
    let (sum, mass, along) = (total(&sums), total(&masses), total(&along));
    let (a, b) = (
        (f64::from(weight) / sum) as f32,
        (f64::from(weight) / mass) as f32,
    );
    for (s, t) in student.iter_mut().zip(&*teacher) {
        *s = *s * a - t * b;
    }
    RowLoss {
        loss: sum.ln() - along / mass,
        correct,
    }
}

#[inline(always)]
fn against_probabilities<S: Simd>(student: &mut [f32], p: &[f32], weight: f32) -> RowLoss {
    let most = super::elementwise::largest(student);
    let correct = place(student, most) == place(p, super::elementwise::largest(p));
    let (mut masses, mut along) = ([0.0f32; 16], [0.0f32; 16]);
    for (s, p) in student.chunks(16).zip(p.chunks(16)) {
        for (i, (s, p)) in s.iter().zip(p).enumerate() {
            along[i] = <f32 as Real>::fused(*p, *s - most, along[i], S::FMA);
            masses[i] += p;
        }
    }
    let total = |lanes: &[f32; 16]| lanes.iter().map(|&v| f64::from(v)).sum::<f64>();
    let (mass, along) = (total(&masses), total(&along));
    let sum = f64::from(exponentials::<S>(student, most));
    // The goal may hold no mass at all: then there is no gradient either.
    let a = (f64::from(weight) * mass / sum) as f32;
    for (s, p) in student.iter_mut().zip(p) {
        *s = *s * a - p * weight;
    }
    RowLoss {
        loss: mass * sum.ln() - along,
        correct,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 7919 + seed * 31) % 1009) as f32 * 0.01 - 5.0)
            .collect()
    }

    fn probabilities(logits: &[f32]) -> Vec<f64> {
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let e: Vec<f64> = logits.iter().map(|&l| f64::from(l - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|e| e / sum).collect()
    }

    #[test]
    fn cross_entropy_and_its_gradient_equal_the_plain_sums() {
        for n in [1, 5, 16, 33, if cfg!(miri) { 70 } else { 700 }] {
            let (student, teacher) = (row(n, 1), row(n, 2));
            let (q, p) = (probabilities(&student), probabilities(&teacher));
            let expected: f64 = -p.iter().zip(&q).map(|(p, q)| p * q.ln()).sum::<f64>();
            let single: Vec<f32> = p.iter().map(|&p| p as f32).collect();
            for logits in [true, false] {
                let (mut s, mut t) = (student.clone(), teacher.clone());
                let goal = match logits {
                    true => Goal::Logits(&mut t),
                    false => Goal::Probabilities(&single),
                };
                let found = cross_entropy(&mut s, goal, 2.0);
                assert!(
                    (found.loss - expected).abs() < 1e-5 * (1.0 + expected),
                    "{n}: {} for {expected}",
                    found.loss
                );
                assert_eq!(found.correct, argmax(&student) == argmax(&teacher));
                for i in 0..n {
                    assert!(
                        (f64::from(s[i]) - 2.0 * (q[i] - p[i])).abs() < 1e-6,
                        "{n} {i}"
                    );
                }
            }
            let mut whole = student.clone();
            softmax(&mut whole);
            assert!(
                whole
                    .iter()
                    .zip(&q)
                    .all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6)
            );
        }
    }

    #[test]
    fn what_is_not_a_number_stays_in_the_loss() {
        for n in [3, 40] {
            let (mut s, mut t) = (row(n, 1), row(n, 2));
            s[n / 2] = f32::NAN;
            assert!(
                cross_entropy(&mut s, Goal::Logits(&mut t), 1.0)
                    .loss
                    .is_nan()
            );
            let (mut s, mut t) = (row(n, 1), row(n, 2));
            t[n / 2] = f32::NAN;
            assert!(
                cross_entropy(&mut s, Goal::Logits(&mut t), 1.0)
                    .loss
                    .is_nan()
            );
        }
    }

    #[test]
    fn equal_values_go_to_the_lowest_column() {
        let mut row = vec![0.0; 600];
        (row[300], row[301], row[599]) = (2.0, 2.0, 2.0);
        assert_eq!(argmax(&row), 300);
    }
}
