//! EAGLE-3's training-time test (arXiv:2503.01840): the network runs `unroll` times, each time on its own states of the time
//! before, and each step is held against the target one token further on.
//!
//! Row `t` of step `i` has token `x_{t+1+i}`, the target's distribution after token `t+1+i`, and the mask of row `t+i`. It sees
//! the rows of step 0 up to itself, and of later steps itself alone.

use scylla_core::plugin::{Matrix, Tap, TargetShape};
use scylla_core::train::graph::{
    Compared, GraphStack, Head, Parameters, StepCache, Tape, Teacher, Value, beside, columns,
    divergence, linear, probabilities, probabilities_of, rms_norm,
};
use scylla_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::{
    Batch, BatchLoss, Distance, Recipe, StepLoss, TopProbabilities, TrainHost, check_unroll,
};
use crate::checkpoint::{DraftConfig, Eagle3Config, layer_prefix, layers};
use crate::network::Ids;

/// What the loss of a step is divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    /// All rows of the batch, those that do not count among them, as in the reference code.
    #[default]
    Rows,
    /// The rows that count in it.
    Mask,
}

/// Settings of the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eagle3Loss {
    /// Steps.
    pub unroll: usize,
    /// Weight of each step, times that of the one before.
    pub decay: f64,
    /// What the loss of a step is divided by.
    pub normalise: Normalise,
    /// The distance from the target's distribution.
    pub distance: Distance,
}

impl Default for Eagle3Loss {
    fn default() -> Self {
        Self {
            unroll: 7,
            decay: 0.8,
            normalise: Normalise::default(),
            distance: Distance::default(),
        }
    }
}

/// The recipe of EAGLE-3 networks.
pub struct Eagle3Recipe {
    settings: Eagle3Loss,
    config: Eagle3Config,
    /// Name of the first layer's parameters.
    first: String,
    stack: GraphStack,
    taps: Vec<Tap>,
    ids: Ids,
    listed: Vec<u32>,
}

impl Eagle3Recipe {
    /// The recipe of a network with this draft vocabulary; `taps` overrides the layers whose inputs it reads.
    ///
    /// # Errors
    /// If the network is another, or a setting is out of range.
    pub fn new(
        config: &DraftConfig,
        taps: Option<&[usize]>,
        ids: Ids,
        target: &TargetShape,
        settings: &Eagle3Loss,
    ) -> Result<Self> {
        let DraftConfig::Eagle3(c) = config else {
            return Err(Error::Invalid(
                "EAGLE-3's recipe for another network".into(),
            ));
        };
        check_unroll(settings.unroll, settings.decay)?;
        Ok(Self {
            settings: settings.clone(),
            first: layer_prefix(config.layout(), 0),
            stack: GraphStack::new(layers(config))?,
            taps: c.taps(taps, target)?,
            listed: ids.targets(),
            ids,
            config: c.clone(),
        })
    }

    fn norm(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        name: &str,
        x: &Value,
    ) -> Result<Value> {
        let weight = named.get(tape, &format!("{name}.weight"))?;
        rms_norm(tape, x, &weight, self.config.backbone.eps)
    }

    /// The taps, side by side, reduced.
    fn reduced(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        taps: &[Matrix],
    ) -> Result<Value> {
        let mut parts = Vec::with_capacity(taps.len());
        for tap in taps {
            parts.push(Value::constant(host.on.bring(tap)?));
        }
        if self.config.norm_before_fc {
            let whole = joined(tape, &parts)?;
            let whole = self.norm(tape, named, "input_norm", &whole)?;
            let width = self.config.target_hidden;
            for (i, part) in parts.iter_mut().enumerate() {
                *part = columns(tape, &whole, i * width..(i + 1) * width)?;
            }
        }
        if self.config.fc_norm {
            for (i, part) in parts.iter_mut().enumerate() {
                *part = self.norm(tape, named, &format!("fc_norm.{i}"), part)?;
            }
        }
        let all = joined(tape, &parts)?;
        let weight = named.get(tape, "fc.weight")?;
        linear(tape, &all, &weight, None, None)
    }

    /// One step: the state that recurs.
    fn step(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        batch: &Batch<'_>,
        cache: &mut StepCache,
        embedded: &Value,
        feature: &Value,
    ) -> Result<Value> {
        let first = self.first.clone();
        let e = self.norm(tape, named, &format!("{first}.input_layernorm"), embedded)?;
        let g = self.norm(tape, named, &format!("{first}.hidden_norm"), feature)?;
        let joined = beside(tape, &e, &g)?;
        let begins = match self.config.norm_before_residual {
            true => &g,
            false => feature,
        };
        let x = self
            .stack
            .forward(tape, named, batch.rows, cache, begins, Some(&joined))?;
        match self.config.norm_output {
            true => self.norm(tape, named, "norm", &x),
            false => Ok(x),
        }
    }

    /// What the head takes of a state that recurs.
    fn heard(&self, tape: &mut Tape, named: &mut Parameters<'_>, state: &Value) -> Result<Value> {
        match self.config.norm_output {
            true => Ok(state.clone()),
            false => self.norm(tape, named, "norm", state),
        }
    }

    fn head(&self, tape: &mut Tape, named: &mut Parameters<'_>, host: &TrainHost) -> Result<Head> {
        Ok(match named.has("lm_head.weight") {
            true => Head::trained(&named.get(tape, "lm_head.weight")?),
            false => host.head.clone(),
        })
    }

    /// The same of its most probable tokens alone: those of the draft's vocabulary among them, renormalised.
    fn among_top(
        &self,
        host: &TrainHost,
        top: &TopProbabilities,
        rows: usize,
    ) -> Result<(Vec<u32>, Matrix)> {
        let (k, n) = (top.k, self.listed.len());
        if k == 0 || top.ids.len() != rows * k || top.p.len() != rows * k {
            return Err(Error::Invalid(format!(
                "the {k} most probable tokens of {} rows for {rows}",
                top.ids.len() / k.max(1)
            )));
        }
        let mut all = vec![0.0f32; rows * n];
        for (row, p) in all.chunks_mut(n).enumerate() {
            let own = row * k..(row + 1) * k;
            let mut sum = 0.0;
            for (&id, &of) in top.ids[own.clone()].iter().zip(&top.p[own]) {
                if let Some(column) = self.ids.draft(id).filter(|&c| c < n) {
                    p[column] = of;
                    sum += of;
                }
            }
            match sum > 0.0 {
                true => p.iter_mut().for_each(|p| *p /= sum),
                // None of them: its most probable token is not the draft's either, and the row does not count.
                false => p.fill(1.0 / n as f32),
            }
        }
        let best = top.ids.iter().step_by(k).copied().collect();
        Ok((best, host.on.matrix(all, n)?))
    }

    /// What the target says after each row: its most probable token, and probabilities among the draft's. Behind the rows
    /// stands a uniform one where `beyond`.
    fn taught(&self, host: &TrainHost, batch: &Batch<'_>) -> Result<(Vec<u32>, Matrix)> {
        let (mut best, p) = match (batch.top, batch.logits) {
            (Some(top), _) => self.among_top(host, top, batch.rows.count())?,
            (None, Some(logits)) => {
                probabilities_of(&host.on, &host.on.bring(logits)?, &self.listed)?
            }
            (None, None) => {
                let states = host.on.bring(&batch.taps[self.taps.len()])?;
                probabilities(&host.on, &states, &host.head, &self.listed)?
            }
        };
        if !batch.beyond {
            return Ok((best, p));
        }
        best.push(0);
        let n = self.listed.len();
        let uniform = host.on.uniform(n)?;
        let mut all = Matrix::default();
        let rows: Vec<usize> = (0..p.rows()).collect();
        if p.is_on_device() {
            all = p;
            all.append(&[&uniform], &[0])?;
        } else {
            all.append(&[&p], &rows)?;
            all.append(&[&uniform], &[0])?;
        }
        Ok((best, all))
    }
}

/// Values side by side.
fn joined(tape: &mut Tape, parts: &[Value]) -> Result<Value> {
    let Some((first, rest)) = parts.split_first() else {
        return Err(Error::Invalid("a network of no taps".into()));
    };
    rest.iter()
        .try_fold(first.clone(), |left, right| beside(tape, &left, right))
}

impl Recipe for Eagle3Recipe {
    fn taps(&self) -> Vec<Tap> {
        let mut taps = self.taps.clone();
        taps.push(Tap::Final);
        taps
    }

    fn spared(&self) -> usize {
        1
    }

    fn loss(
        &self,
        tape: &mut Tape,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
    ) -> Result<BatchLoss> {
        batch.check(self.taps.len())?;
        let (best, p) = self.taught(host, batch)?;
        let drafted: Vec<bool> = best
            .iter()
            .map(|&id| self.ids.draft(id).is_some())
            .collect();
        let m = batch.rows.count();
        let head = self.head(tape, named, host)?;
        let mut feature = self.reduced(tape, named, host, &batch.taps[..self.taps.len()])?;
        let mut cache = StepCache::default();
        let mut loss = BatchLoss::default();
        let mut weight = 1.0;
        for i in 0..self.settings.unroll {
            let embedded = host.embed(&batch.ahead(1 + i))?;
            feature = self.step(tape, named, batch, &mut cache, &embedded, &feature)?;
            let heard = self.heard(tape, named, &feature)?;
            let masks = batch
                .rows
                .shifted(i)
                .into_iter()
                .map(|row| row.is_some_and(|r| batch.mask[r]));
            let mut asked = 0usize;
            let mut rows = Vec::new();
            for (row, (mask, goal)) in masks.zip(batch.rows.shifted(1 + i)).enumerate() {
                let goal = goal.or(batch.beyond.then_some(m));
                asked += usize::from(mask);
                if let Some(goal) = goal.filter(|&goal| mask && drafted[goal]) {
                    rows.push(Compared {
                        row,
                        goal,
                        weight: 0.0,
                    });
                }
            }
            let count = rows.len();
            let divisor = match self.settings.normalise {
                Normalise::Rows => m as f64,
                Normalise::Mask => count.max(1) as f64,
            };
            rows.iter_mut()
                .for_each(|row| row.weight = weight / divisor);
            let teacher = Teacher::Probabilities(&p);
            let mix = self.settings.distance.mix();
            let found = divergence(tape, &heard, &head, &teacher, &mix, &rows)?;
            loss.total += weight * found.sum / divisor;
            loss.total_by_mask += weight * found.sum / count.max(1) as f64;
            loss.steps.push(StepLoss {
                loss: found.sum / divisor,
                accuracy: found.correct as f64 / (asked as f64 + 1e-6),
                count,
            });
            weight *= self.settings.decay;
        }
        Ok(loss)
    }

    fn forward(
        &self,
        named: &mut Parameters<'_>,
        host: &TrainHost,
        batch: &Batch<'_>,
    ) -> Result<(Matrix, Matrix)> {
        batch.check(self.taps.len())?;
        let mut tape = Tape::new(&host.on);
        let feature = self.reduced(&mut tape, named, host, &batch.taps[..self.taps.len()])?;
        let embedded = host.embed(&batch.ahead(1))?;
        let state = self.step(
            &mut tape,
            named,
            batch,
            &mut StepCache::default(),
            &embedded,
            &feature,
        )?;
        let heard = self.heard(&mut tape, named, &state)?;
        let head = self.head(&mut tape, named, host)?;
        Ok((state.matrix, head.logits(&host.on, &heard.matrix)?))
    }
}
