//! EAGLE-1's loss (arXiv:2401.15077), which EAGLE-2 and Scylla (arXiv:2505.07858) share: row `t` pairs the target's final state
//! `f_t` with token `x_{t+1}` and learns `f_{t+1}`, by SmoothL1, and what the head says of it, by cross entropy.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::train::graph::{
    Compared, GraphStack, Parameters, StepCache, Tape, Teacher, Value, beside, cross_entropy,
    linear, rms_norm, smooth_l1,
};
use scylla_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{Batch, BatchLoss, Recipe, StepLoss, TrainHost};
use crate::checkpoint::{DraftConfig, layers};

/// Settings of the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EagleLoss {
    /// Weight of SmoothL1 on features.
    pub smooth_l1: f64,
    /// Weight of the cross entropy.
    pub ce: f64,
    /// Width of the uniform noise on features, for lines of 512 rows; it falls with their length.
    pub noise: f64,
}

impl Default for EagleLoss {
    fn default() -> Self {
        Self {
            smooth_l1: 1.0,
            ce: 0.1,
            noise: 0.2,
        }
    }
}

/// Added to the number of rows that a loss is divided by, as in the reference code.
const LEAST: f64 = 1e-5;

/// The recipe of EAGLE-1, EAGLE-2 and Scylla networks.
pub struct EagleRecipe {
    settings: EagleLoss,
    stack: GraphStack,
    eps: f32,
    /// Whether there is a final norm, and whether the state recurs after it.
    norm: Option<bool>,
}

impl EagleRecipe {
    /// The recipe of a network.
    ///
    /// # Errors
    /// If the network is another, or a weight is no number.
    pub fn new(config: &DraftConfig, settings: &EagleLoss) -> Result<Self> {
        let norm = match config {
            DraftConfig::Eagle(_) => None,
            DraftConfig::Scylla(c) => Some(!c.recur_before_norm),
            DraftConfig::Eagle3(_) => {
                return Err(Error::Invalid(
                    "EAGLE-1's recipe for an EAGLE-3 network".into(),
                ));
            }
        };
        for (name, v) in [
            ("smooth_l1", settings.smooth_l1),
            ("ce", settings.ce),
            ("noise", settings.noise),
        ] {
            if !(v.is_finite() && v >= 0.0) {
                return Err(Error::Invalid(format!(
                    "loss.{name} {v}: expected 0 or more"
                )));
            }
        }
        Ok(Self {
            settings: settings.clone(),
            stack: GraphStack::new(layers(config))?,
            eps: config.backbone().eps,
            norm,
        })
    }

    /// The states that recur and those whose logits count.
    fn states(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
        features: Value,
    ) -> Result<(Value, Value)> {
        let embedded = host.embed(&batch.ahead(1))?;
        let joined = beside(tape, &embedded, &features)?;
        let weight = named.get(tape, "fc.weight")?;
        let bias = match named.has("fc.bias") {
            true => Some(named.get(tape, "fc.bias")?),
            false => None,
        };
        let x = linear(tape, &joined, &weight, bias.as_ref(), None)?;
        let x = self
            .stack
            .forward(tape, named, batch.rows, &mut StepCache::default(), &x, None)?;
        let Some(recurs_normed) = self.norm else {
            return Ok((x.clone(), x));
        };
        let norm = named.get(tape, "norm.weight")?;
        let normed = rms_norm(tape, &x, &norm, self.eps)?;
        Ok(match recurs_normed {
            true => (normed.clone(), normed),
            false => (x, normed),
        })
    }

    /// Features with noise on them.
    fn noisy(&self, host: &TrainHost, features: &Matrix, batch: &Batch<'_>) -> Result<Matrix> {
        let width = self.settings.noise * 512.0 / batch.rows.length as f64;
        if width == 0.0 {
            return host.on.bring(features);
        }
        let mut random = StdRng::seed_from_u64(batch.seed);
        let width = width as f32;
        let noisy = |v: &f32| v + (random.random::<f32>() - 0.5) * width;
        let values = features.all()?.iter().map(noisy).collect();
        host.on.matrix(values, features.columns)
    }
}

impl Recipe for EagleRecipe {
    fn taps(&self) -> Vec<Tap> {
        vec![Tap::Final]
    }

    fn loss(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
    ) -> Result<BatchLoss> {
        batch.check(1)?;
        let goals = host.on.bring(&batch.taps[0])?;
        let pairs: Vec<(usize, usize)> = batch
            .rows
            .shifted(1)
            .into_iter()
            .enumerate()
            .filter_map(|(row, next)| Some((row, next.filter(|_| batch.mask[row])?)))
            .collect();
        let count = pairs.len() as f64 + LEAST;
        let weighted = |weight: f64| -> Vec<Compared> {
            let row = |&(row, goal): &(usize, usize)| Compared {
                row,
                goal,
                weight: weight / count,
            };
            pairs.iter().map(row).collect()
        };
        let features = Value::constant(self.noisy(host, &batch.taps[0], batch)?);
        let (recurs, heard) = self.states(tape, named, host, batch, features)?;
        let near = smooth_l1(tape, &recurs, &goals, &weighted(self.settings.smooth_l1))? / count;
        let teacher = Teacher::States(&goals, &host.head);
        let said = cross_entropy(
            tape,
            &heard,
            &host.head,
            &teacher,
            &weighted(self.settings.ce),
        )?;
        let ce = said.sum / count;
        let total = self.settings.smooth_l1 * near + self.settings.ce * ce;
        Ok(BatchLoss {
            total,
            total_by_mask: total,
            steps: vec![StepLoss {
                loss: total,
                accuracy: said.correct as f64 / pairs.len().max(1) as f64,
                count: pairs.len(),
            }],
            parts: vec![("smooth_l1", near), ("ce", ce)],
        })
    }

    fn forward(
        &self,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
    ) -> Result<(Matrix, Matrix)> {
        batch.check(1)?;
        let features = Value::constant(host.on.bring(&batch.taps[0])?);
        let (recurs, heard) =
            self.states(&mut Tape::new(&host.on), named, host, batch, features)?;
        Ok((recurs.matrix, host.head.logits(&host.on, &heard.matrix)?))
    }
}
