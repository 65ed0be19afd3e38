//! Distances between what a student and a goal say, sums of several among them, and their gradients by the student's logits.

use super::elementwise::largest;
use super::gradients::{Goal, RowLoss, cross_entropy, exponentials, place, softmax};
use super::simd::{InstructionSet, Simd, dispatch};

/// A distance of the student's probabilities q from the goal's p, as a sum: the weight of each part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mix {
    /// Cross entropy, `-sum p log q`.
    pub ce: f64,
    /// Kullback and Leibler's divergence, `sum p log(p / q)`; its gradient is that of cross entropy.
    pub kl: f64,
    /// Total variation, `sum |p - q| / 2`: the probability that a drafted token is refused.
    pub tv: f64,
    /// The LK loss, `-log sum min(p, q)`: of the probability that it is accepted.
    pub lk: f64,
    /// Cross entropy over the `k` columns that the goal holds for the most probable (top-k distillation of HASS,
    /// arXiv:2408.15766); of equal ones the first count.
    pub top: f64,
    /// How many columns those are.
    pub k: usize,
}

impl Mix {
    /// Cross entropy alone.
    pub const CE: Self = Self {
        ce: 1.0,
        kl: 0.0,
        tv: 0.0,
        lk: 0.0,
        top: 0.0,
        k: 0,
    };

    /// The same with all its weights multiplied.
    pub fn times(self, by: f64) -> Self {
        Self {
            ce: self.ce * by,
            kl: self.kl * by,
            tv: self.tv * by,
            lk: self.lk * by,
            top: self.top * by,
            k: self.k,
        }
    }
}

/// The distance of a student's logits from a goal; the logits become its gradient, times `weight`. A goal without any mass has
/// no gradient. NaN anywhere leaves NaN in the loss.
pub fn divergence(student: &mut [f32], goal: Goal<'_>, mix: &Mix, weight: f32) -> RowLoss {
    if *mix == Mix::CE {
        return cross_entropy(student, goal, weight);
    }
    let p = match goal {
        Goal::Logits(teacher) => {
            softmax(teacher);
            &*teacher
        }
        Goal::Probabilities(p) => p,
    };
    assert_eq!(student.len(), p.len());
    dispatch!(InstructionSet::detect(), apart(student, p, mix, weight): (student: &mut [f32], p: &[f32], mix: &Mix, weight: f32) [RowLoss] <>)
}

/// Sums of something of each column, in lanes.
#[inline(always)]
fn sum(q: &[f32], p: &[f32], of: impl Fn(f32, f32) -> f32) -> f64 {
    let mut lanes = [0.0f32; 16];
    for (q, p) in q.chunks(16).zip(p.chunks(16)) {
        for (lane, (q, p)) in lanes.iter_mut().zip(q.iter().zip(p)) {
            *lane += of(*q, *p);
        }
    }
    lanes.iter().map(|&v| f64::from(v)).sum()
}

/// The columns of the `k` largest values, the first of equals; whole runs that hold none are passed over.
#[inline(always)]
fn largest_columns(p: &[f32], k: usize) -> Vec<usize> {
    const RUN: usize = 64;
    let mut best: Vec<usize> = Vec::with_capacity(k + 1);
    for (i, run) in p.chunks(RUN).enumerate() {
        let full = best.len() >= k;
        let least = best.last().map_or(f32::NEG_INFINITY, |&last| p[last]);
        if full && largest(run) <= least {
            continue;
        }
        for column in i * RUN..i * RUN + run.len() {
            let place = best.partition_point(|&b| p[b] >= p[column]);
            if place < k {
                best.insert(place, column);
                best.truncate(k);
            }
        }
    }
    best
}

/// -1, 0 or 1.
#[inline(always)]
fn sign(x: f32) -> f32 {
    f32::from(u8::from(x > 0.0)) - f32::from(u8::from(x < 0.0))
}

#[inline(always)]
fn below(q: f32, p: f32) -> f32 {
    f32::from(u8::from(q < p))
}

#[inline(always)]
fn apart<S: Simd>(student: &mut [f32], p: &[f32], mix: &Mix, weight: f32) -> RowLoss {
    let most = largest(student);
    let correct = place(student, most) == place(p, largest(p));
    let mass = sum(student, p, |_, p| p);
    let along = sum(student, p, |s, p| p * (s - most));
    let top = match mix.top != 0.0 {
        true => largest_columns(p, mix.k),
        false => Vec::new(),
    };
    let (mut mass_of_top, mut along_top) = (0.0, 0.0);
    for &column in &top {
        mass_of_top += f64::from(p[column]);
        along_top += f64::from(p[column] * (student[column] - most));
    }
    let total = f64::from(exponentials::<S>(student, most));
    let factor = (1.0 / total) as f32;
    student.iter_mut().for_each(|q| *q *= factor);
    let ce = mass * total.ln() - along;
    let mut loss = (mix.ce + mix.kl) * ce;
    if mix.kl != 0.0 {
        let own = |p: f32| if p > 0.0 { p * p.ln() } else { p };
        loss += mix.kl * sum(student, p, |_, p| own(p));
    }
    // q (v - sum q v), with v what the loss changes by with q.
    loss += mix.top * (mass_of_top * total.ln() - along_top);
    let (mut unlike, mut short, mut lk) = (0.0, 0.0, 0.0);
    if mix.tv != 0.0 {
        loss += mix.tv * 0.5 * sum(student, p, |q, p| (p - q).abs());
        unlike = 0.5 * sum(student, p, |q, p| q * sign(q - p));
    }
    if mix.lk != 0.0 && mass > 0.0 {
        let overlap = sum(student, p, |q, p| if q < p { q } else { p });
        short = sum(student, p, |q, p| q * below(q, p));
        loss -= mix.lk * overlap.ln();
        lk = mix.lk / overlap;
    }
    let scale = f64::from(weight);
    let near = (scale * (mix.ce + mix.kl)) as f32;
    let mass = mass as f32;
    let (tv, lk_weight) = ((scale * mix.tv) as f32, (scale * lk) as f32);
    let rest = (scale * (lk * short - mix.tv * unlike + mix.top * mass_of_top)) as f32;
    for (q, &p) in student.iter_mut().zip(p) {
        let v = 0.5 * tv * sign(*q - p) - lk_weight * below(*q, p) + rest;
        *q = near * (mass * *q - p) + *q * v;
    }
    for column in top {
        student[column] -= (scale * mix.top) as f32 * p[column];
    }
    RowLoss { loss, correct }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIXES: [Mix; 6] = [
        Mix::CE,
        Mix {
            kl: 1.0,
            ce: 0.0,
            ..Mix::CE
        },
        Mix {
            tv: 1.0,
            ce: 0.0,
            ..Mix::CE
        },
        Mix {
            lk: 1.0,
            ce: 0.0,
            ..Mix::CE
        },
        Mix {
            ce: 0.1,
            tv: 0.9,
            ..Mix::CE
        },
        Mix {
            ce: 0.1,
            top: 1.0,
            k: 4,
            ..Mix::CE
        },
    ];

    fn softmaxed(logits: &[f64]) -> Vec<f64> {
        let e: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|e| e / sum).collect()
    }

    /// As the formulas stand.
    fn plain(logits: &[f64], p: &[f64], mix: &Mix) -> f64 {
        let q = softmaxed(logits);
        let pairs = || p.iter().zip(&q);
        let ce: f64 = -pairs().map(|(p, q)| p * q.ln()).sum::<f64>();
        let kl: f64 = pairs()
            .filter(|(p, _)| **p > 0.0)
            .map(|(p, q)| p * (p / q).ln())
            .sum();
        let tv: f64 = 0.5 * pairs().map(|(p, q)| (p - q).abs()).sum::<f64>();
        let overlap: f64 = pairs().map(|(p, q)| p.min(*q)).sum();
        let lk = if overlap > 0.0 { -overlap.ln() } else { 0.0 };
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
        let top: f64 = order.iter().take(mix.k).map(|&i| -p[i] * q[i].ln()).sum();
        mix.ce * ce + mix.kl * kl + mix.tv * tv + mix.lk * lk + mix.top * top
    }

    #[test]
    fn distances_and_their_gradients_are_those_of_the_formulas() {
        let row = |n: usize, seed: usize| -> Vec<f32> {
            (0..n)
                .map(|i| ((i * 7919 + (i + 1) * i * seed * 31) % 1009) as f32 * 0.004 - 2.0)
                .collect()
        };
        for n in [1, 5, 33, if cfg!(miri) { 17 } else { 300 }] {
            let (student, teacher) = (row(n, 1), row(n, 2));
            let wide: Vec<f64> = student.iter().map(|&v| f64::from(v)).collect();
            let goal: Vec<f64> = teacher.iter().map(|&v| f64::from(v)).collect();
            let whole = softmaxed(&goal);
            // The same; half of its columns, not renormalised; nothing.
            let half = whole
                .iter()
                .enumerate()
                .map(|(i, p)| if i % 2 == 0 { *p } else { 0.0 });
            for p in [whole.clone(), half.collect(), vec![0.0; n]] {
                for mix in MIXES {
                    let single: Vec<f32> = p.iter().map(|&p| p as f32).collect();
                    let mut found = student.clone();
                    let row = divergence(&mut found, Goal::Probabilities(&single), &mix, 2.0);
                    let expected = plain(&wide, &p, &mix);
                    let room = 1e-5 * (1.0 + expected.abs());
                    assert!(
                        (row.loss - expected).abs() < room,
                        "{n} {mix:?}: {} for {expected}",
                        row.loss
                    );
                    // Every step is interpreted by Miri: it looks at few columns, of every place in a run of lanes.
                    for i in (0..n).step_by(if cfg!(miri) { 11 } else { 1 }) {
                        // A step so small that no |p - q| passes zero on the way, or nearly none; and so large that f64 is
                        // exact to seven digits.
                        let step = 1e-6;
                        let at = |by: f64| {
                            let mut moved = wide.clone();
                            moved[i] += by;
                            plain(&moved, &p, &mix)
                        };
                        let slope = (at(step) - at(-step)) / (2.0 * step);
                        assert!(
                            (f64::from(found[i]) - 2.0 * slope).abs() < 2e-5,
                            "{n} {mix:?} [{i}]: {} for {}",
                            found[i],
                            2.0 * slope
                        );
                    }
                }
            }
            for mix in MIXES {
                let (mut a, mut t, mut b) = (student.clone(), teacher.clone(), student.clone());
                let single: Vec<f32> = whole.iter().map(|&p| p as f32).collect();
                let by_logits = divergence(&mut a, Goal::Logits(&mut t), &mix, 1.0);
                let by_goal = divergence(&mut b, Goal::Probabilities(&single), &mix, 1.0);
                assert!((by_logits.loss - by_goal.loss).abs() < 1e-5);
                assert_eq!(by_logits.correct, by_goal.correct);
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6));
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_in_the_loss() {
        for mix in MIXES {
            let (mut s, p) = (vec![0.5, f32::NAN, 0.1], [0.2, 0.3, 0.5]);
            assert!(
                divergence(&mut s, Goal::Probabilities(&p), &mix, 1.0)
                    .loss
                    .is_nan()
            );
            let (mut s, p) = (vec![0.5, 0.2, 0.1], [0.2, f32::NAN, 0.5]);
            assert!(
                divergence(&mut s, Goal::Probabilities(&p), &mix, 1.0)
                    .loss
                    .is_nan()
            );
        }
    }
}
