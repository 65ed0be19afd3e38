//! AdamW, and Muon for matrices where asked for, with clipping: masters and moments in f32, whatever products are computed in.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::graph::Compute;
use super::muon::{self, MuonSettings};
use crate::kernels::gradients::{self, AdamFactors};
use crate::plugin::Matrix;
use crate::{Error, Result};

/// What is trained, by the names that its checkpoint has: matrices `[N, K]`, vectors `[1, N]`.
pub type Named = BTreeMap<String, Matrix>;

/// Settings of AdamW (arXiv:1711.05101): decay is of the parameters themselves, not through the gradient.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWSettings {
    /// Learning rate, which a schedule multiplies.
    pub lr: f64,
    /// Share of the first moment that stays.
    pub beta1: f64,
    /// Share of the second moment that stays.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// What parameters shrink by, times the learning rate.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm over all parameters; 0: not.
    pub clip_norm: f64,
    /// Each value of a gradient is held within this, to either side; 0: not.
    pub clip_value: f64,
    /// Muon, in place of AdamW, for matrices that are neither embedding nor head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonSettings>,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.0,
            clip_norm: 0.5,
            clip_value: 0.0,
            muon: None,
        }
    }
}

impl AdamWSettings {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the setting that is out of range.
    pub fn check(&self) -> Result<()> {
        let share = |v: f64| (0.0..1.0).contains(&v);
        let bad = |name: &str, v: f64, expected: &str| {
            Err(Error::Invalid(format!(
                "optimizer.{name} {v}: expected {expected}"
            )))
        };
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return bad("lr", self.lr, "a number above 0");
        }
        for (name, v) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !share(v) {
                return bad(name, v, "0 or more, below 1");
            }
        }
        if !(self.eps as f32 > 0.0 && self.eps.is_finite()) {
            return bad("eps", self.eps, "a number above 0");
        }
        for (name, v) in [
            ("weight_decay", self.weight_decay),
            ("clip_norm", self.clip_norm),
            ("clip_value", self.clip_value),
        ] {
            if !(v >= 0.0 && v.is_finite()) {
                return bad(name, v, "0 or more");
            }
        }
        self.muon.map_or(Ok(()), |muon| muon.check())
    }
}

/// The state of AdamW; of matrices that Muon steps the first moment is their momentum, and the second one rests.
#[derive(Default)]
pub struct AdamW {
    /// Steps done.
    pub steps: u64,
    /// First moments, by name.
    pub first: Named,
    /// Second moments, by name.
    pub second: Named,
}

impl AdamW {
    /// Before the first step.
    ///
    /// # Errors
    /// If memory for the moments cannot be had where the parameters are.
    pub fn new(on: &Compute, parameters: &Named) -> Result<Self> {
        let zeros = || -> Result<Named> {
            let of =
                |(name, p): (&String, &Matrix)| Ok((name.clone(), on.zeros(p.rows(), p.columns)?));
            parameters.iter().map(of).collect()
        };
        Ok(Self {
            steps: 0,
            first: zeros()?,
            second: zeros()?,
        })
    }

    /// One step; returns the norm of the gradients before they were clipped.
    ///
    /// # Errors
    /// If the norm is not finite: nothing is changed then.
    pub fn step(
        &mut self,
        on: &Compute,
        settings: &AdamWSettings,
        rate: f64,
        parameters: &mut Named,
        grads: &Named,
    ) -> Result<f64> {
        let norm = norm(grads)?;
        if !norm.is_finite() {
            return Err(Error::Invalid(format!("the gradients' norm is {norm}")));
        }
        self.steps += 1;
        let t = self.steps.min(1 << 30) as i32;
        let limited = settings.clip_norm > 0.0 && norm > settings.clip_norm;
        let factors = AdamFactors {
            rate: rate as f32,
            beta1: settings.beta1 as f32,
            beta2: settings.beta2 as f32,
            eps: settings.eps as f32,
            shrink: (rate * settings.weight_decay) as f32,
            correct1: (1.0 / (1.0 - settings.beta1.powi(t))) as f32,
            correct2: (1.0 / (1.0 - settings.beta2.powi(t))) as f32,
            scale: if limited {
                settings.clip_norm / norm
            } else {
                1.0
            } as f32,
            limit: if settings.clip_value > 0.0 {
                settings.clip_value as f32
            } else {
                f32::INFINITY
            },
        };
        for (name, value) in parameters.iter_mut() {
            let (Some(m), Some(v), Some(grad)) = (
                self.first.get_mut(name),
                self.second.get_mut(name),
                grads.get(name),
            ) else {
                return Err(Error::Invalid(format!(
                    "parameter `{name}` has no moments or no gradient"
                )));
            };
            match &settings.muon {
                Some(muon) if MuonSettings::takes(name, value) => {
                    let step = muon::Step {
                        rate,
                        shrink: rate * settings.weight_decay,
                        scale: factors.scale,
                        limit: factors.limit,
                    };
                    muon::step(on, muon, step, value, m, grad)?;
                }
                _ => one(on, factors, value, [m, v], grad)?,
            }
        }
        Ok(norm)
    }
}

fn one(
    on: &Compute,
    f: AdamFactors,
    value: &mut Matrix,
    [m, v]: [&mut Matrix; 2],
    grad: &Matrix,
) -> Result<()> {
    match on {
        Compute::Kernels(p) => {
            let grad = grad.values()?;
            let all = [value.values_mut()?, m.values_mut()?, v.values_mut()?];
            if all.iter().any(|x| x.len() != grad.len()) {
                return Err(Error::Invalid(
                    "a gradient of another shape than its parameter".into(),
                ));
            }
            p.pool.rows(all, [1; 3], 1 << 14, |range, [value, m, v]| {
                gradients::adamw(value, m, v, &grad[range], f);
            });
        }
        Compute::Tensors { .. } => {
            let wide = |m: &Matrix| -> Result<Tensor> { Ok(m.tensor()?.to_dtype(DType::F32)?) };
            let mut g = (wide(grad)? * f64::from(f.scale))?;
            if f.limit.is_finite() {
                g = g.clamp(-f.limit, f.limit)?;
            }
            let (b1, b2) = (f64::from(f.beta1), f64::from(f.beta2));
            let first = ((wide(m)? * b1)? + (&g * (1.0 - b1))?)?;
            let second = ((wide(v)? * b2)? + (g.sqr()? * (1.0 - b2))?)?;
            let root = ((&second * f64::from(f.correct2))?.sqrt()? + f64::from(f.eps))?;
            let step = (&first * f64::from(f.correct1))?.div(&root)?;
            let kept = (wide(value)? * (1.0 - f64::from(f.shrink)))?;
            let next = kept.sub(&(step * f64::from(f.rate))?)?;
            let dtype = value.tensor()?.dtype();
            *value = Matrix::device(next.to_dtype(dtype)?)?;
            (*m, *v) = (Matrix::device(first)?, Matrix::device(second)?);
        }
    }
    Ok(())
}

/// The norm over all gradients.
///
/// # Errors
/// If they cannot be read.
pub fn norm(grads: &Named) -> Result<f64> {
    let mut total = 0.0;
    for grad in grads.values() {
        total += match grad.tensor() {
            Ok(t) => f64::from(
                t.to_dtype(DType::F32)?
                    .sqr()?
                    .sum_all()?
                    .to_scalar::<f32>()?,
            ),
            Err(_) => gradients::squares(grad.values()?),
        };
    }
    Ok(total.sqrt())
}

/// Adds gradients of another part of the same batch.
///
/// # Errors
/// If they are of other parameters.
pub fn accumulate(on: &Compute, sum: &mut Named, more: Named) -> Result<()> {
    for (name, grad) in more {
        let total = match sum.remove(&name) {
            Some(total) => on.sum(total, &grad)?,
            None => grad,
        };
        sum.insert(name, total);
    }
    Ok(())
}

/// Multiplies gradients.
///
/// # Errors
/// If they cannot be written.
pub fn scale(on: &Compute, grads: &mut Named, factor: f64) -> Result<()> {
    for grad in grads.values_mut() {
        match on {
            Compute::Kernels(_) => grad
                .values_mut()?
                .iter_mut()
                .for_each(|v| *v *= factor as f32),
            Compute::Tensors { .. } => *grad = Matrix::device((grad.tensor()? * factor)?)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;

    use super::*;
    use crate::kernels::{Pool, ProductForm, Products};

    fn computes() -> [Compute; 3] {
        let kernels = |threads| {
            Compute::Kernels(Products {
                pool: Arc::new(Pool::new(threads)),
                form: ProductForm::F32,
            })
        };
        [
            kernels(1),
            kernels(3),
            Compute::tensors(Device::Cpu, DType::F32),
        ]
    }

    /// AdamW as its paper writes it, in f64.
    fn written_out(
        s: &AdamWSettings,
        rates: &[f64],
        grads: &[Vec<f64>],
        mut x: Vec<f64>,
    ) -> Vec<f64> {
        let (mut m, mut v) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        for (t, (rate, g)) in rates.iter().zip(grads).enumerate() {
            let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            let scale = if s.clip_norm > 0.0 && norm > s.clip_norm {
                s.clip_norm / norm
            } else {
                1.0
            };
            for i in 0..x.len() {
                let mut g = g[i] * scale;
                if s.clip_value > 0.0 {
                    g = g.clamp(-s.clip_value, s.clip_value);
                }
                m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
                v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
                let (a, b) = (
                    1.0 - s.beta1.powi(t as i32 + 1),
                    1.0 - s.beta2.powi(t as i32 + 1),
                );
                x[i] -= rate * s.weight_decay * x[i];
                x[i] -= rate * (m[i] / a) / ((v[i] / b).sqrt() + s.eps);
            }
        }
        x
    }

    #[test]
    fn steps_follow_the_paper_with_and_without_clipping_and_decay() {
        let value = |i: usize, t: usize| ((i * 37 + t * 11) % 19) as f64 * 0.1 - 0.9;
        let count = 40_000;
        let begun: Vec<f64> = (0..count).map(|i| value(i, 100)).collect();
        let grads: Vec<Vec<f64>> = (0..5)
            .map(|t| (0..count).map(|i| value(i, t)).collect())
            .collect();
        let rates = [1e-2, 2e-2, 2e-2, 1e-2, 0.5e-2];
        for (clip_norm, clip_value, weight_decay) in
            [(0.0, 0.0, 0.0), (1.5, 0.0, 0.1), (0.0, 0.25, 0.0)]
        {
            let settings = AdamWSettings {
                clip_norm,
                clip_value,
                weight_decay,
                ..Default::default()
            };
            let expected = written_out(&settings, &rates, &grads, begun.clone());
            let mut found: Vec<Vec<f32>> = Vec::new();
            for on in computes() {
                let of = |x: &[f64]| -> Named {
                    let values = x.iter().map(|&v| v as f32).collect();
                    [("x".to_string(), on.matrix(values, 200).expect("matrix"))].into()
                };
                let mut parameters = of(&begun);
                let mut adam = AdamW::new(&on, &parameters).expect("state");
                for (rate, grad) in rates.iter().zip(&grads) {
                    adam.step(&on, &settings, *rate, &mut parameters, &of(grad))
                        .expect("step");
                }
                found.push(parameters["x"].all().expect("values").into_owned());
            }
            assert_eq!(found[0], found[1], "by the number of threads");
            for found in &found {
                let off = found
                    .iter()
                    .zip(&expected)
                    .map(|(a, b)| (f64::from(*a) - b).abs())
                    .fold(0.0, f64::max);
                assert!(off < 2e-6, "clip {clip_norm} {clip_value}: {off}");
            }
        }
    }

    /// Muon as it is published, in f64: momentum of Nesterov, five iterations, the size of AdamW's steps.
    fn muon_written_out(
        s: &AdamWSettings,
        rate: f64,
        grads: &[Vec<f64>],
        mut x: Vec<f64>,
        [n, k]: [usize; 2],
    ) -> Vec<f64> {
        let Some(muon) = s.muon else { return x };
        // Products of `[a, b]` and `[b, c]`.
        let times = |l: &[f64], r: &[f64], [a, b, c]: [usize; 3]| -> Vec<f64> {
            let of = |i: usize, j: usize| (0..b).map(|t| l[i * b + t] * r[t * c + j]).sum();
            (0..a * c).map(|at| of(at / c, at % c)).collect()
        };
        let turned = |m: &[f64], [a, b]: [usize; 2]| -> Vec<f64> {
            (0..a * b).map(|at| m[at % a * b + at / a]).collect()
        };
        let mut m = vec![0.0; n * k];
        for g in grads {
            let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            let scale = if s.clip_norm > 0.0 && norm > s.clip_norm {
                s.clip_norm / norm
            } else {
                1.0
            };
            let g: Vec<f64> = g.iter().map(|g| g * scale).collect();
            let b = muon.momentum;
            for (m, g) in m.iter_mut().zip(&g) {
                *m = b * *m + (1.0 - b) * g;
            }
            let mut u: Vec<f64> = m
                .iter()
                .zip(&g)
                .map(|(m, g)| b * m + (1.0 - b) * g)
                .collect();
            let size = u.iter().map(|u| u * u).sum::<f64>().sqrt() + 1e-7;
            u.iter_mut().for_each(|u| *u /= size);
            let tall = n > k;
            let [r, c] = if tall { [k, n] } else { [n, k] };
            if tall {
                u = turned(&u, [n, k]);
            }
            for _ in 0..muon.iterations {
                let a = times(&u, &turned(&u, [r, c]), [r, c, r]);
                let aa = times(&a, &a, [r, r, r]);
                let mix: Vec<f64> = a
                    .iter()
                    .zip(&aa)
                    .map(|(a, aa)| -4.7750 * a + 2.0315 * aa)
                    .collect();
                let more = times(&mix, &u, [r, r, c]);
                u = u.iter().zip(&more).map(|(u, m)| 3.4445 * u + m).collect();
            }
            if tall {
                u = turned(&u, [k, n]);
            }
            let step = rate * 0.2 * (n.max(k) as f64).sqrt();
            for (x, u) in x.iter_mut().zip(&u) {
                *x = *x * (1.0 - rate * s.weight_decay) - step * u;
            }
        }
        x
    }

    #[test]
    fn muon_steps_matrices_as_it_is_published_and_leaves_the_rest_to_adamw() {
        let settings = AdamWSettings {
            weight_decay: 0.1,
            clip_norm: 0.7,
            muon: Some(MuonSettings::default()),
            ..Default::default()
        };
        // Values that no small sum of products makes: full rank.
        let value = |i: usize, t: usize| {
            ((i * 7919 + t * 104_729 + i * i % 613) % 1009) as f64 / 504.5 - 1.0
        };
        for [n, k] in [[24, 40], [40, 24], [16, 16], [1, 40]] {
            let begun: Vec<f64> = (0..n * k).map(|i| value(i, 9)).collect();
            let grads: Vec<Vec<f64>> = (0..4)
                .map(|t| (0..n * k).map(|i| value(i, t)).collect())
                .collect();
            for name in ["layers.0.mlp.up_proj.weight", "lm_head.weight"] {
                let takes = n > 1 && name != "lm_head.weight";
                let expected = match takes {
                    true => muon_written_out(&settings, 1e-2, &grads, begun.clone(), [n, k]),
                    false => written_out(&settings, &[1e-2; 4], &grads, begun.clone()),
                };
                let mut found: Vec<Vec<f32>> = Vec::new();
                for on in computes() {
                    let of = |x: &[f64]| -> Named {
                        let values = x.iter().map(|&v| v as f32).collect();
                        [(name.to_string(), on.matrix(values, k).expect("matrix"))].into()
                    };
                    let mut parameters = of(&begun);
                    let mut adam = AdamW::new(&on, &parameters).expect("state");
                    for grad in &grads {
                        adam.step(&on, &settings, 1e-2, &mut parameters, &of(grad))
                            .expect("step");
                    }
                    found.push(parameters[name].all().expect("values").into_owned());
                }
                assert_eq!(found[0], found[1], "by the number of threads");
                for found in &found {
                    let pairs = found.iter().zip(&expected);
                    let off = pairs
                        .map(|(a, b)| (f64::from(*a) - b).abs())
                        .fold(0.0, f64::max);
                    // Four steps of at most 0.01 x 0.2 sqrt(40) x 1.2 a value, which f32 follows to five digits.
                    assert!(off < 2e-5, "{name} {n} x {k}: off by {off:.2e}");
                }
            }
        }
    }

    #[test]
    fn muons_settings_are_checked() {
        for muon in [
            MuonSettings {
                momentum: 1.0,
                ..Default::default()
            },
            MuonSettings {
                iterations: 0,
                ..Default::default()
            },
        ] {
            let settings = AdamWSettings {
                muon: Some(muon),
                ..Default::default()
            };
            let said = settings.check().expect_err("refused").to_string();
            assert!(said.contains("optimizer.muon."), "{said}");
        }
    }

    #[test]
    fn a_gradient_that_is_not_a_number_changes_nothing() {
        for on in computes() {
            let of = |v: f32| -> Named {
                [("x".to_string(), on.matrix(vec![v; 4], 2).expect("matrix"))].into()
            };
            let mut parameters = of(1.0);
            let mut adam = AdamW::new(&on, &parameters).expect("state");
            let settings = AdamWSettings::default();
            let failed = adam.step(&on, &settings, 1e-3, &mut parameters, &of(f32::NAN));
            assert!(failed.is_err() && adam.steps == 0);
            assert_eq!(parameters["x"].all().expect("values")[..], [1.0; 4]);
        }
    }
}
