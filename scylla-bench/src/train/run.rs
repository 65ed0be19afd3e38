//! One draft on its way: what it is in the middle of, and the files of its folder.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use scylla_core::train::graph::Compute;
use scylla_core::train::{accumulate, checkpoint, norm};
use scylla_draft::checkpoint::DraftConfig;
use scylla_draft::recipe::{BatchLoss, DraftShape, StepLoss, TrainHost, frequent};
use serde::{Deserialize, Serialize};

use super::events::Events;
use super::experiment::{Stage, TrainExperiment};
use super::feed::Taught;
use super::learner::Learner;
use super::tau::{PromptTau, Tau};
use crate::context::parse;
use crate::data::documents::Documents;
use crate::data::features::Features;
use crate::data::packing::Position;
use crate::session::Session;
use crate::{Error, Result};

/// Name of the checkpoint in a run's folder.
pub const CHECKPOINT: &str = "checkpoint.safetensors";

/// Name of the metrics.
pub const METRICS: &str = "metrics.jsonl";

/// Folder of the best draft.
pub const BEST: &str = "best";

/// A line of the metrics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// The stage.
    pub stage: String,
    /// Steps done, over all stages.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The loss of the step.
    pub loss: f64,
    /// The same with each step of an unrolled loss divided by its own rows.
    pub loss_by_mask: f64,
    /// Step by step, where the recipe unrolls.
    pub steps: Vec<StepLoss>,
    /// Parts of the loss by name.
    pub parts: BTreeMap<String, f64>,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// What it took; not said in runs whose files shall be the same each time.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub times: Option<Times>,
    /// Where it was evaluated behind this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tau: Option<Tau>,
}

/// What a step took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Rows a second, the target's pass included.
    pub tokens_per_s: f64,
    /// Milliseconds of the target's pass, shared by all drafts that are trained.
    pub target_ms: f64,
    /// Milliseconds of the draft's own part.
    pub draft_ms: f64,
}

/// The best draft until now.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step behind which it was evaluated.
    pub step: u64,
    /// Its worth.
    pub tau: Tau,
}

/// All that a run is in the middle of, beside parameters and moments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Version of this form.
    pub(super) version: u32,
    /// Steps done, over all stages.
    pub(super) step: u64,
    pub(super) tokens: u64,
    /// The stage of the last step.
    pub(super) stage: usize,
    /// Where its data stands.
    pub(super) position: Position,
    /// The draft vocabulary: it is not counted again.
    pub(super) ids: Option<Vec<u32>>,
    pub(super) target: String,
    /// Hashes of the data, by stage.
    pub(super) data: Vec<String>,
    /// The experiment as it was begun.
    pub(super) experiment: TrainExperiment,
    pub(super) best: Option<Best>,
    pub(super) last: Option<Tau>,
    pub(super) loss: f64,
    /// Bytes of the metrics.
    pub(super) metrics: u64,
    /// A step whose evaluation a break came before.
    pub(super) pending: Option<Metrics>,
    /// Hash of the prompts that tau is measured on.
    pub(super) prompts: String,
    /// The last evaluation, prompt by prompt.
    #[serde(default)]
    pub(super) by_prompt: Vec<PromptTau>,
}

const VERSION: u32 = 1;

/// What came of one draft.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Steps done.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The loss of the last step.
    pub loss: f64,
    /// Of the best draft.
    pub tau: Tau,
    /// Of the draft behind the last step.
    pub last: Tau,
    /// Folder of the best draft.
    pub best: PathBuf,
    /// The step behind which it was the best.
    pub best_step: u64,
    /// NAME:DIR to decode with.
    pub draft: String,
}

/// One draft on its way, with its folder.
pub(super) struct Run {
    pub(super) experiment: TrainExperiment,
    pub(super) dir: PathBuf,
    pub(super) learner: Learner,
    pub(super) state: State,
    pub(super) events: Option<Events>,
}

/// What a stage is trained on: documents, whose states the target says, or states that were kept with theirs.
#[derive(Default)]
pub(super) struct Source {
    pub(super) read: Documents,
    pub(super) kept: Option<Features>,
}

impl Source {
    pub(super) fn documents(&self) -> &Documents {
        self.kept
            .as_ref()
            .map_or(&self.read, |kept| &kept.documents)
    }
}

/// How often each token is trained on.
fn counts(data: &[Source], vocab: usize) -> Vec<u64> {
    let mut counts = vec![0; vocab];
    for document in data.iter().flat_map(|d| &d.documents().all) {
        for (&token, _) in document
            .tokens
            .iter()
            .zip(&document.mask)
            .filter(|(_, m)| **m)
        {
            if let Some(count) = counts.get_mut(token as usize) {
                *count += 1;
            }
        }
    }
    counts
}

impl Run {
    pub(super) fn begin(
        experiment: &TrainExperiment,
        dir: &Path,
        session: &Session,
        host: &TrainHost,
        data: &[Source],
        resume: bool,
    ) -> Result<Self> {
        for name in [CHECKPOINT, METRICS, BEST] {
            let path = dir.join(name);
            // A run that was killed before its first checkpoint begins anew.
            if path.exists() && !resume {
                return Err(Error::file(
                    &path,
                    "is there already: --resume goes on, another --output begins anew",
                ));
            }
        }
        let ids = match experiment.draft.start {
            Some(_) => None,
            None => match Learner::network(experiment, &session.target.config)? {
                DraftConfig::Eagle3(c) if c.draft_vocab != c.backbone.vocab => {
                    Some(frequent(&counts(data, c.backbone.vocab), c.draft_vocab)?)
                }
                config => {
                    let shape: DraftShape = parse("draft", experiment.draft.shape.clone())?;
                    let vocab = config.backbone().vocab;
                    match shape.head {
                        0 => None,
                        head if head == vocab => None,
                        head => Some(frequent(&counts(data, vocab), head)?),
                    }
                }
            },
        };
        let learner = Learner::begin(experiment, session, host, ids)?;
        Ok(Self {
            state: State {
                version: VERSION,
                step: 0,
                tokens: 0,
                stage: 0,
                position: Position::default(),
                ids: learner.ids.clone(),
                target: session.target_hash()?.into(),
                data: data.iter().map(|d| d.documents().hash.clone()).collect(),
                experiment: experiment.clone(),
                best: None,
                last: None,
                loss: 0.0,
                metrics: 0,
                pending: None,
                prompts: String::new(),
                by_prompt: Vec::new(),
            },
            experiment: experiment.clone(),
            dir: dir.to_path_buf(),
            learner,
            events: None,
        })
    }

    pub(super) fn resume(
        experiment: &TrainExperiment,
        dir: &Path,
        session: &Session,
        host: &TrainHost,
        data: &[Source],
    ) -> Result<Self> {
        let path = dir.join(CHECKPOINT);
        let (parameters, optimizer, state): (_, _, State) = checkpoint::load(&path, &host.on)?;
        let changed = |what: String| {
            Err(Error::file(
                &path,
                format!(
                    "{what}; go on with what it was begun with, or begin anew in another --output"
                ),
            ))
        };
        if state.version != VERSION {
            return changed(format!(
                "is of version {}, this is {VERSION}",
                state.version
            ));
        }
        if state.target != session.target_hash()? {
            return changed(format!(
                "the target has changed: it was the one with sha256 {}, now it is {}",
                state.target,
                session.target_hash()?
            ));
        }
        for ((stage, was), now) in experiment.stage.iter().zip(&state.data).zip(data) {
            if *was != now.documents().hash {
                return changed(format!("the data of stage {} have changed", stage.name));
            }
        }
        if let Some(key) = differing(&state.experiment, experiment)? {
            return changed(format!("the experiment has changed, in `{key}`"));
        }
        let config = match &experiment.draft.start {
            None => Learner::network(experiment, &session.target.config)?,
            Some(_) => Learner::begin(experiment, session, host, None)?.config,
        };
        let learner = Learner::resume(
            experiment,
            session,
            host,
            config,
            state.ids.clone(),
            parameters,
            optimizer,
        )?;
        Ok(Self {
            experiment: experiment.clone(),
            dir: dir.to_path_buf(),
            learner,
            events: None,
            state,
        })
    }

    /// Lets a run go on from a step of another one that did the same until then: what may differ is how many steps there are,
    /// and how the rate moves behind that step. Its folder gets the checkpoint and the metrics until there.
    ///
    /// # Errors
    /// If the other one was of another experiment, or a file cannot be read or written.
    pub(super) fn fork(
        trunk: &Path,
        checkpoint_of: &Path,
        experiment: &TrainExperiment,
        dir: &Path,
        on: &Compute,
    ) -> Result<u64> {
        let (parameters, optimizer, mut state): (_, _, State) =
            checkpoint::load(checkpoint_of, on)?;
        let bare = |e: &TrainExperiment| {
            let mut e = e.clone();
            for stage in &mut e.stage {
                let warmup = stage.schedule.warmup;
                (stage.steps, stage.tokens) = (1, 0);
                stage.schedule = Default::default();
                stage.schedule.warmup = warmup;
            }
            e
        };
        if let Some(key) = differing(&bare(&state.experiment), &bare(experiment))? {
            return Err(Error::file(
                checkpoint_of,
                format!("was trained by another experiment: they differ in `{key}`"),
            ));
        }
        state.experiment = experiment.clone();
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let from = trunk.join(METRICS);
        let mut metrics = std::fs::read(&from).map_err(Error::io(&from))?;
        if (metrics.len() as u64) < state.metrics {
            return Err(Error::file(&from, "is shorter than its checkpoint says"));
        }
        metrics.truncate(state.metrics as usize);
        scylla_core::files::write(&dir.join(METRICS), &metrics)?;
        let to = dir.join(CHECKPOINT);
        checkpoint::save(&to, &parameters, &optimizer, &state)?;
        Ok(state.step)
    }

    /// The loss over all batches of a step, and the step.
    pub(super) fn learn(
        &mut self,
        on: &Compute,
        batches: &[Taught],
        stage: &Stage,
        rate: f64,
        step: u64,
    ) -> Result<(BatchLoss, f64)> {
        let mut grads = BTreeMap::new();
        let mut losses = Vec::with_capacity(batches.len());
        for (i, taught) in batches.iter().enumerate() {
            let seed = self.experiment.run.seed
                ^ (step * batches.len() as u64 + i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let (loss, found) = self.learner.learn(taught, seed)?;
            if !loss.total.is_finite() {
                return Err(Error::Experiment(format!("the loss is {}", loss.total)));
            }
            losses.push(loss);
            accumulate(on, &mut grads, found)?;
        }
        let count = batches.len() as f64;
        if batches.len() > 1 {
            scylla_core::train::scale(on, &mut grads, 1.0 / count)?;
        }
        // Where nothing counts there is nothing to learn: moments stay as they are.
        let counts = |loss: &BatchLoss| loss.steps.iter().any(|s| s.count > 0);
        let norm = match losses.iter().any(counts) {
            true => self.learner.step(&stage.optimizer, rate, &grads)?,
            false => 0.0,
        };
        Ok((mean(losses), norm))
    }

    pub(super) fn failed(&self, error: &Error, step: u64, documents: &[&str]) -> Error {
        let kept = match self.dir.join(CHECKPOINT).exists() {
            true => format!(
                "{} is the last good checkpoint",
                self.dir.join(CHECKPOINT).display()
            ),
            false => "there is no checkpoint yet".into(),
        };
        let shown = documents
            .iter()
            .take(8)
            .copied()
            .collect::<Vec<_>>()
            .join("; ");
        Error::Experiment(format!(
            "step {} failed: {error}. Its batch holds {} documents: {shown}. Nothing of it was kept; {kept}",
            step + 1,
            documents.len()
        ))
    }

    pub(super) fn metrics(
        &self,
        stage: &Stage,
        loss: &BatchLoss,
        norm: f64,
        rate: f64,
        [target_ms, draft_ms]: [f64; 2],
    ) -> Metrics {
        Metrics {
            stage: stage.name.clone(),
            step: self.state.step,
            tokens: self.state.tokens,
            loss: loss.total,
            loss_by_mask: loss.total_by_mask,
            steps: loss.steps.clone(),
            parts: loss
                .parts
                .iter()
                .map(|(name, v)| (name.to_string(), *v))
                .collect(),
            grad_norm: norm,
            lr: rate,
            times: self.experiment.run.times.then(|| Times {
                tokens_per_s: self.experiment.rows() as f64 / (target_ms + draft_ms) * 1e3,
                target_ms,
                draft_ms,
            }),
            tau: None,
        }
    }

    /// Cuts off what was written to the metrics behind the checkpoint: it is written again.
    pub(super) fn open_metrics(&mut self) -> Result<()> {
        self.state.metrics = cut_to(&self.dir.join(METRICS), self.state.metrics)?;
        Ok(())
    }

    /// Refuses parameters that are no numbers: a checkpoint of them would be worth nothing.
    pub(super) fn check_finite(&self) -> Result<()> {
        for named in [
            &self.learner.parameters,
            &self.learner.optimizer.first,
            &self.learner.optimizer.second,
        ] {
            if !norm(named)?.is_finite() {
                return Err(Error::Experiment(
                    "a parameter or a moment has left the range of numbers; a smaller learning rate, or clipping".into(),
                ));
            }
        }
        Ok(())
    }

    /// Appends a line to the metrics.
    pub(super) fn keep(&mut self, metrics: &Metrics) -> Result<()> {
        self.state.metrics += append(&self.dir.join(METRICS), metrics)?;
        if self.experiment.run.tensorboard {
            let events = match self.events.take() {
                Some(events) => events,
                None => Events::new(&self.dir)?,
            };
            self.events.insert(events).add(metrics)?;
        }
        Ok(())
    }

    pub(super) fn save(&self) -> Result<()> {
        let path = self.dir.join(CHECKPOINT);
        Ok(checkpoint::save(
            &path,
            &self.learner.parameters,
            &self.learner.optimizer,
            &self.state,
        )?)
    }

    pub(super) fn outcome(&self) -> Outcome {
        let best = self.dir.join(BEST);
        let nothing = Best {
            step: 0,
            tau: self.state.last.unwrap_or_default(),
        };
        let found = self.state.best.unwrap_or(nothing);
        Outcome {
            steps: self.state.step,
            tokens: self.state.tokens,
            loss: self.state.loss,
            tau: found.tau,
            last: self.state.last.unwrap_or_default(),
            best_step: found.step,
            draft: format!("{}:{}", self.experiment.draft.name, best.display()),
            best,
        }
    }
}

/// The mean of the losses of a step's batches.
fn mean(losses: Vec<BatchLoss>) -> BatchLoss {
    let count = losses.len().max(1) as f64;
    let mut all = losses.into_iter();
    let mut sum = all.next().unwrap_or_default();
    for loss in all {
        sum.total += loss.total;
        sum.total_by_mask += loss.total_by_mask;
        for (a, b) in sum.steps.iter_mut().zip(&loss.steps) {
            a.loss += b.loss;
            a.accuracy += b.accuracy;
            a.count += b.count;
        }
        for (a, b) in sum.parts.iter_mut().zip(&loss.parts) {
            a.1 += b.1;
        }
    }
    sum.total /= count;
    sum.total_by_mask /= count;
    for step in &mut sum.steps {
        step.loss /= count;
        step.accuracy /= count;
    }
    sum.parts.iter_mut().for_each(|p| p.1 /= count);
    sum
}

/// Cuts a file of lines off behind so many bytes, where it is longer; its length.
pub(crate) fn cut_to(path: &Path, bytes: u64) -> Result<u64> {
    let length = std::fs::metadata(path).map_or(0, |m| m.len());
    if length > bytes {
        let file = std::fs::OpenOptions::new().write(true).open(path);
        let file = file.map_err(Error::io(path))?;
        file.set_len(bytes).map_err(Error::io(path))?;
    }
    Ok(length.min(bytes))
}

/// Appends a line of JSON to a file; its bytes.
pub(crate) fn append(path: &Path, line: &impl Serialize) -> Result<u64> {
    let line = serde_json::to_string(line).map_err(|e| Error::Experiment(e.to_string()))? + "\n";
    let mut options = std::fs::OpenOptions::new();
    let file = options.create(true).append(true).open(path);
    let mut file = file.map_err(Error::io(path))?;
    file.write_all(line.as_bytes()).map_err(Error::io(path))?;
    Ok(line.len() as u64)
}

/// The first key in which two experiments differ; threads and checkpoints may.
fn differing(was: &TrainExperiment, now: &TrainExperiment) -> Result<Option<String>> {
    let table = |e: &TrainExperiment| {
        let mut e = e.clone();
        e.run.threads = 0;
        e.run.tensorboard = false;
        e.train.checkpoint = 0;
        serde_json::to_value(e).map_err(|e| Error::Experiment(e.to_string()))
    };
    Ok(first_difference(&table(was)?, &table(now)?, ""))
}

/// The path of the first value in which two differ, below `path`.
pub(crate) fn first_difference(
    a: &serde_json::Value,
    b: &serde_json::Value,
    path: &str,
) -> Option<String> {
    use serde_json::Value;
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let keys = x.keys().chain(y.keys());
            keys.filter_map(|key| {
                let null = Value::Null;
                let (a, b) = (x.get(key).unwrap_or(&null), y.get(key).unwrap_or(&null));
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                first_difference(a, b, &path)
            })
            .next()
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            let pairs = x.iter().zip(y).enumerate();
            pairs
                .filter_map(|(i, (a, b))| first_difference(a, b, &format!("{path}[{i}]")))
                .next()
        }
        (a, b) if a == b => None,
        _ => Some(path.to_string()),
    }
}
