//! EAGLE-1's loss (arXiv:2401.15077), which EAGLE-2 and Scylla (arXiv:2505.07858) share: row `t` pairs the target's final state
//! `f_t` with token `x_{t+1}` and learns `f_{t+1}`, by SmoothL1, and what the head says of it, by cross entropy.
//!
//! HASS (arXiv:2408.15766) runs the same network several times, each time on the states of the time before, which are taken as
//! given: row `t` of step `i` has token `x_{t+1+i}` and learns `f_{t+1+i}`. It sees the rows of step 0 up to itself, and of later
//! steps itself alone, as a drafted path does. Beside these losses stands one over the target's most probable tokens.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::plugin::{Matrix, Tap};
use scylla_core::train::graph::{
    Compared, GraphStack, Head, Parameters, StepCache, Tape, Teacher, Value, beside, divergence,
    linear, probabilities, probabilities_of, rms_norm, smooth_l1,
};
use scylla_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{Batch, BatchLoss, Distance, Recipe, StepLoss, TrainHost, check_unroll};
use crate::checkpoint::{DraftConfig, layers};
use crate::network::Ids;

/// Settings of the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EagleLoss {
    /// Weight of SmoothL1 on features.
    pub smooth_l1: f64,
    /// Weight of the distance between what the head says of both.
    pub ce: f64,
    /// Which distance.
    pub distance: Distance,
    /// Times that the network runs, each on its own states of the time before.
    pub unroll: usize,
    /// Weight of each time, times that of the one before.
    pub decay: f64,
    /// Tokens of top-k distillation; 0: none.
    pub top_k: usize,
    /// Its weight.
    pub top_weight: f64,
    /// Width of the uniform noise on features, for lines of 512 rows; it falls with their length.
    pub noise: f64,
}

impl Default for EagleLoss {
    fn default() -> Self {
        Self {
            smooth_l1: 1.0,
            ce: 0.1,
            distance: Distance::default(),
            unroll: 1,
            decay: 1.0,
            top_k: 0,
            top_weight: 1.0,
            noise: 0.2,
        }
    }
}

impl EagleLoss {
    /// As HASS trains: three times, with a loss over ten tokens.
    pub fn hass() -> Self {
        Self {
            unroll: 3,
            top_k: 10,
            ..Self::default()
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
    /// Rows of the target's head that are kept, and their tokens.
    truncated: Option<(Head, Ids)>,
}

impl EagleRecipe {
    /// The same with a truncated head: probabilities are those among its tokens, and rows whose most probable token is none of
    /// them teach features alone.
    pub fn with_head(self, head: Head, ids: Ids) -> Self {
        Self {
            truncated: Some((head, ids)),
            ..self
        }
    }

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
            ("top_weight", settings.top_weight),
        ] {
            if !(v.is_finite() && v >= 0.0) {
                return Err(Error::Invalid(format!(
                    "loss.{name} {v}: expected 0 or more"
                )));
            }
        }
        check_unroll(settings.unroll, settings.decay)?;
        if settings.top_k > 256 {
            return Err(Error::Invalid(format!(
                "loss.top_k {}: expected at most 256",
                settings.top_k
            )));
        }
        Ok(Self {
            settings: settings.clone(),
            stack: GraphStack::new(layers(config))?,
            eps: config.backbone().eps,
            norm,
            truncated: None,
        })
    }

    /// The states that recur and those whose logits count, of as many times before as the cache holds.
    fn states(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
        features: Value,
        cache: &mut StepCache,
    ) -> Result<(Value, Value)> {
        let embedded = host.embed(&batch.ahead(1 + cache.steps()))?;
        let joined = beside(tape, &embedded, &features)?;
        let weight = named.get(tape, "fc.weight")?;
        let bias = match named.has("fc.bias") {
            true => Some(named.get(tape, "fc.bias")?),
            false => None,
        };
        let x = linear(tape, &joined, &weight, bias.as_ref(), None)?;
        let x = self
            .stack
            .forward(tape, named, batch.rows, cache, &x, None)?;
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
        let set = &self.settings;
        let goals = host.on.bring(&batch.taps[0])?;
        let mut features = Value::constant(self.noisy(host, &batch.taps[0], batch)?);
        let mut cache = StepCache::default();
        let mut loss = BatchLoss::default();
        let (mut near_of_all, mut said_of_all, mut step_weight) = (0.0, 0.0, 1.0);
        // What is said is weighted as a whole, so that its loss is shown without its weight; beside a part that has a weight
        // of its own both stand in the distance.
        let (mut mix, mut said_weight, mut name) =
            (set.distance.mix(), set.ce, set.distance.name());
        if set.top_k > 0 {
            mix = mix.times(set.ce);
            (mix.top, mix.k) = (set.top_weight, set.top_k);
            (said_weight, name) = (1.0, "said");
        }
        let listed = match (&self.truncated, batch.logits) {
            (Some((_, ids)), _) => Some(ids.targets()),
            (None, Some(logits)) => Some((0..logits.columns as u32).collect()),
            (None, None) => None,
        };
        let taught = match (listed, batch.logits) {
            (None, _) => None,
            (Some(ids), None) => Some(probabilities(&host.on, &goals, &host.head, &ids)?),
            (Some(ids), Some(logits)) => {
                Some(probabilities_of(&host.on, &host.on.bring(logits)?, &ids)?)
            }
        };
        let head = self.truncated.as_ref().map_or(&host.head, |(head, _)| head);
        let said_by = |goal: usize| match (&taught, &self.truncated) {
            (Some((best, _)), Some((_, ids))) => ids.draft(best[goal]).is_some(),
            _ => true,
        };
        for step in 0..set.unroll {
            let masks = batch.rows.shifted(step).into_iter();
            let asked = masks.map(|row| row.is_some_and(|row| batch.mask[row]));
            let pairs: Vec<(usize, usize)> = asked
                .zip(batch.rows.shifted(1 + step))
                .enumerate()
                .filter_map(|(row, (asked, next))| Some((row, next.filter(|_| asked)?)))
                .collect();
            let count = pairs.len() as f64 + LEAST;
            let weighted = |weight: f64| -> Vec<Compared> {
                let row = |&(row, goal): &(usize, usize)| Compared {
                    row,
                    goal,
                    weight: step_weight * weight / count,
                };
                pairs.iter().map(row).collect()
            };
            let (recurs, heard) = self.states(tape, named, host, batch, features, &mut cache)?;
            let near = smooth_l1(tape, &recurs, &goals, &weighted(set.smooth_l1))? / count;
            let teacher = match &taught {
                Some((_, p)) => Teacher::Probabilities(p),
                None => Teacher::States(&goals, &host.head),
            };
            let mut rows = weighted(said_weight);
            rows.retain(|row| said_by(row.goal));
            let found = divergence(tape, &heard, head, &teacher, &mix, &rows)?;
            let said = found.sum / count;
            let of_step = set.smooth_l1 * near + said_weight * said;
            loss.total += step_weight * of_step;
            near_of_all += step_weight * near;
            said_of_all += step_weight * said;
            loss.steps.push(StepLoss {
                loss: of_step,
                accuracy: found.correct as f64 / pairs.len().max(1) as f64,
                count: pairs.len(),
            });
            step_weight *= set.decay;
            // What a later forward runs on is taken as given.
            features = recurs.detached();
        }
        loss.total_by_mask = loss.total;
        loss.parts = vec![("smooth_l1", near_of_all), (name, said_of_all)];
        Ok(loss)
    }

    fn forward(
        &self,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
    ) -> Result<(Matrix, Matrix)> {
        batch.check(1)?;
        let features = Value::constant(host.on.bring(&batch.taps[0])?);
        let mut tape = Tape::new(&host.on);
        let cache = &mut StepCache::default();
        let (recurs, heard) = self.states(&mut tape, named, host, batch, features, cache)?;
        let head = self.truncated.as_ref().map_or(&host.head, |(head, _)| head);
        Ok((recurs.matrix, head.logits(&host.on, &heard.matrix)?))
    }
}
