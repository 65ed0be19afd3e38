//! The trainer: steps, evaluations and checkpoints of one draft or several, over one pass of the target.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::DType;
use scylla_core::files;
use scylla_core::kernels::{Pool, ProductForm, Products, keep_freed_memory};
use scylla_core::model::{LoadOptions, Loaded};
use scylla_core::plugin::Tap;
use scylla_core::train::graph::Compute;
use scylla_draft::checkpoint::{Checkpoint, DraftConfig, Layout};
use scylla_draft::recipe::TrainHost;
use serde::{Deserialize, Serialize};

use super::experiment::TrainExperiment;
use super::feed::{Feed, Taught, teach};
use super::learner::{Fed, Learner, serving};
use super::run::{BEST, Best, CHECKPOINT, Metrics, Outcome, Run, Source};
use super::tau::{PromptTau, Tau, Tester};
use crate::data::documents;
use crate::data::features::Features;
use crate::data::packing::{Lines, Position};
use crate::environment::{Environment, peak_resident};
use crate::session::Session;
use crate::{Error, Result};

/// A stage: its number, and its steps among those of all.
struct Leg {
    index: usize,
    steps: std::ops::Range<u64>,
}

/// What is told while training.
pub enum Told<'a> {
    /// Something the user should know.
    Note(String),
    /// A step of one of the drafts is done: its folder, its metrics, steps in all, and seconds left.
    Step(&'a Path, &'a Metrics, u64, f64),
    /// Documents and tokens read.
    Data(usize, u64),
}

/// Told what is going on.
pub type OnTold<'a> = &'a mut dyn FnMut(Told<'_>);

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// By experiment.
    pub runs: Vec<Outcome>,
    /// Where.
    pub environment: Environment,
    /// What products were computed with.
    pub products: String,
    /// Largest resident size, where the system tells.
    pub peak_bytes: Option<u64>,
}

/// Trains one draft or several on the same batches.
pub struct Trainer<'s> {
    session: &'s mut Session,
    host: TrainHost,
    data: Vec<Source>,
    taps: Vec<Tap>,
    runs: Vec<Run>,
    tester: Tester,
    /// Steps behind which the state is kept aside, for other runs to go on from.
    forks: Vec<u64>,
    /// Of the target's pass and the drafts' parts, per step, lately; and of an evaluation.
    step_s: f64,
    evaluation_s: f64,
}

/// What a graph is computed with beside a target.
///
/// # Errors
/// If the target is on a device that the graph cannot use.
pub fn compute(session: &Session, form: Option<ProductForm>) -> Result<Compute> {
    compute_beside(&session.target, &session.options, form)
}

/// The same beside any model.
///
/// # Errors
/// As [`compute`].
pub fn compute_beside(
    model: &Loaded,
    options: &LoadOptions,
    form: Option<ProductForm>,
) -> Result<Compute> {
    let device = &options.device;
    if device.is_cpu() {
        let pool = match model.executor.pool() {
            Some(pool) => Arc::clone(pool),
            None => Arc::new(Pool::new(options.thread_count())),
        };
        keep_freed_memory();
        let form = form.unwrap_or_else(ProductForm::fastest);
        return Ok(Compute::Kernels(Products { pool, form }));
    }
    Ok(Compute::Tensors {
        device: device.clone(),
        dtype: DType::F32,
        products: match form {
            Some(ProductForm::F32) => DType::F32,
            _ => DType::BF16,
        },
    })
}

impl<'s> Trainer<'s> {
    /// Reads the data, checks the experiments, and begins or goes on.
    ///
    /// # Errors
    /// If anything is amiss that can be known before a step is paid for; in particular, on resume, if target, data or
    /// experiment have changed.
    pub fn new(
        session: &'s mut Session,
        experiments: &[(TrainExperiment, PathBuf)],
        resume: bool,
        stop: &AtomicBool,
        told: OnTold<'_>,
    ) -> Result<Self> {
        let Some((first, _)) = experiments.first() else {
            return Err(Error::Experiment("no experiment to train".into()));
        };
        for (other, _) in experiments {
            first.shares_with(other)?;
            other.check_target(&session.target.model.shape())?;
            // What is wrong with the network or its loss is said before any data is read.
            if other.draft.start.is_none() {
                Learner::network(other, &session.target.config)?;
            }
        }
        let mut data = Vec::new();
        for stage in &first.stage {
            let source = match &stage.data.features {
                Some(dir) => Source {
                    kept: Some(Features::open(dir, session.target_hash()?)?),
                    ..Source::default()
                },
                None => {
                    let tokenizer = session.tokenizer()?;
                    let on_read = &mut |d, t| told(Told::Data(d, t));
                    // What drafts are chosen by is kept out like what they are reported on.
                    let mut spec = stage.data.clone();
                    if !spec.keep_out.contains(&first.evaluate.prompts.set) {
                        spec.keep_out.push(first.evaluate.prompts.set.clone());
                    }
                    let read = documents::load(&spec, tokenizer, on_read)?;
                    Source { read, kept: None }
                }
            };
            let found = source.documents();
            let c = &found.counts;
            told(Told::Note(format!(
                "stage {}: {} documents, {} tokens ({} trained on); {} left out, {} of them for an evaluation prompt; {} failed",
                stage.name, c.written, c.tokens, c.masked, c.skipped, c.overlapping, c.failed
            )));
            for failure in &found.failures {
                told(Told::Note(format!("not used: {failure}")));
            }
            if stage.data.tokens == 0 && stage.tokens > c.tokens {
                told(Told::Note(format!(
                    "stage {}: {} tokens of training go through the data {:.1} times",
                    stage.name,
                    stage.tokens,
                    stage.tokens as f64 / c.tokens as f64
                )));
            }
            data.push(source);
        }
        let on = compute(session, first.form()?)?;
        let host = TrainHost::new(&on, &session.target.tokens)?;
        let mut runs = Vec::new();
        for (experiment, dir) in experiments {
            let run = match resume && dir.join(CHECKPOINT).exists() {
                true => Run::resume(experiment, dir, session, &host, &data)?,
                false => Run::begin(experiment, dir, session, &host, &data, resume)?,
            };
            if run.state.step > 0 {
                told(Told::Note(format!(
                    "{}: goes on behind step {}",
                    dir.display(),
                    run.state.step
                )));
            }
            runs.push(run);
        }
        let mut taps: Vec<Tap> = Vec::new();
        // Where what the target says is kept, its final state need not be.
        let said = |tap: &Tap| {
            let without = |s: &Source| {
                s.kept
                    .as_ref()
                    .is_some_and(|k| k.says() && !k.taps.contains(tap))
            };
            *tap == Tap::Final && data.iter().all(without)
        };
        for run in &runs {
            let (all, needed) = (run.learner.taps(), run.learner.needed().len());
            for (i, tap) in all.into_iter().enumerate() {
                let wanted = i < needed || !said(&tap);
                if wanted && !taps.contains(&tap) {
                    taps.push(tap);
                }
            }
        }
        for run in &mut runs {
            run.learner.fed_by(&taps)?;
        }
        // What a later stage would fail for is said before the first one is paid for.
        for (source, stage) in data.iter().zip(&first.stage) {
            let place = |e: Error| Error::Experiment(format!("stage {}: {e}", stage.name));
            let sizes = (first.train.batch, first.train.length);
            let lines = Feed::new(
                source.documents(),
                sizes,
                first.run.seed,
                Position::default(),
            )
            .and_then(|mut feed| feed.lines())
            .map_err(place)?;
            if let Some(kept) = &source.kept {
                kept.states(&lines, &taps).map_err(place)?;
                kept.top(&lines).map_err(place)?;
            }
        }
        let tester = Tester::new(session, first, stop)?;
        let prompts = tester.hash();
        for run in &mut runs {
            if run.state.step > 0 && run.state.prompts != prompts {
                return Err(Error::file(
                    &run.dir.join(CHECKPOINT),
                    "the prompts that tau is measured on have changed; go on with what it was begun with, or begin anew in another --output",
                ));
            }
            run.state.prompts = prompts.clone();
        }
        Ok(Self {
            session,
            host,
            data,
            taps,
            runs,
            tester,
            forks: Vec::new(),
            step_s: 0.0,
            evaluation_s: 0.0,
        })
    }

    /// What products are computed with.
    pub fn products(&self) -> String {
        self.host.on.name()
    }

    /// Steps of all stages.
    fn total(&self) -> u64 {
        let first = &self.runs[0].experiment;
        first.stage.iter().map(|s| first.steps(s)).sum()
    }

    /// Trains what other runs branch off from: the state behind each of these steps is kept aside, and nothing is evaluated.
    ///
    /// # Errors
    /// As [`Trainer::run`].
    pub fn trunk(&mut self, forks: &[u64], stop: &AtomicBool, told: OnTold<'_>) -> Result<()> {
        self.forks = forks.to_vec();
        for run in &self.runs {
            // Killed between the two.
            if forks.contains(&run.state.step) {
                keep_aside(run)?;
            }
        }
        self.all_stages(stop, told)
    }

    /// What each draft was worth at its last evaluation, prompt by prompt.
    pub fn by_prompt(&self) -> Vec<&[PromptTau]> {
        self.runs.iter().map(|r| &r.state.by_prompt[..]).collect()
    }

    /// What each draft's network is.
    pub fn networks(&self) -> Vec<&DraftConfig> {
        self.runs.iter().map(|r| &r.learner.config).collect()
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// If the loss is not a number, a file cannot be written, or the user broke off (the state is kept then).
    pub fn run(&mut self, stop: &AtomicBool, told: OnTold<'_>) -> Result<Report> {
        self.all_stages(stop, told)?;
        self.report()
    }

    fn all_stages(&mut self, stop: &AtomicBool, told: OnTold<'_>) -> Result<()> {
        for run in &self.runs {
            std::fs::create_dir_all(&run.dir).map_err(Error::io(&run.dir))?;
            let text = run.experiment.to_toml()?;
            files::write(&run.dir.join("experiment.toml"), text.as_bytes())?;
        }
        self.make_up(stop, told)?;
        let first = self.runs[0].experiment.clone();
        let mut first_step = 0;
        for (index, stage) in first.stage.iter().enumerate() {
            let steps = first_step..first_step + first.steps(stage);
            first_step = steps.end;
            self.stage(&Leg { index, steps }, stop, told)?;
        }
        Ok(())
    }

    /// Makes the evaluations that a break came before.
    fn make_up(&mut self, stop: &AtomicBool, told: OnTold<'_>) -> Result<()> {
        let total = self.total();
        for i in 0..self.runs.len() {
            self.runs[i].open_metrics()?;
            let Some(mut metrics) = self.runs[i].state.pending.take() else {
                continue;
            };
            metrics.tau = Some(self.evaluate(i, stop)?);
            let run = &mut self.runs[i];
            run.keep(&metrics)?;
            run.save()?;
            told(Told::Step(&run.dir, &metrics, total, 0.0));
        }
        Ok(())
    }

    /// Trains the steps of a stage that are not done.
    fn stage(&mut self, leg: &Leg, stop: &AtomicBool, told: OnTold<'_>) -> Result<()> {
        let (index, steps) = (leg.index, &leg.steps);
        // Drafts that were stopped at different steps: those behind catch up.
        let Some(behind) = self
            .runs
            .iter()
            .map(|r| r.state.step)
            .min()
            .filter(|s| *s < steps.end)
        else {
            return Ok(());
        };
        let at = match self.runs.iter().find(|r| r.state.step == behind) {
            Some(run) if run.state.stage == index => run.state.position,
            _ => Position::default(),
        };
        for run in self
            .runs
            .iter_mut()
            .filter(|r| r.state.step == steps.start && r.state.step >= behind)
        {
            run.learner.reset()?;
            run.state.stage = index;
            run.state.position = Position::default();
        }
        let (seed, train) = (
            self.runs[0].experiment.run.seed,
            self.runs[0].experiment.train.clone(),
        );
        // The data of the trainer outlives the feed, which borrows it while the rest changes.
        let data = std::mem::take(&mut self.data[index]);
        let done = (|| {
            let sizes = (train.batch, train.length);
            let mut feed = Feed::new(data.documents(), sizes, seed.wrapping_add(index as u64), at)?;
            for step in behind.max(steps.start)..steps.end {
                self.step(&mut feed, data.kept.as_ref(), leg, step, stop, told)?;
            }
            Ok(())
        })();
        self.data[index] = data;
        done
    }

    /// One step of every draft that has not done it, with what belongs behind it.
    fn step(
        &mut self,
        feed: &mut Feed<'_>,
        kept: Option<&Features>,
        leg: &Leg,
        step: u64,
        stop: &AtomicBool,
        told: OnTold<'_>,
    ) -> Result<()> {
        let (begun, steps) = (Instant::now(), &leg.steps);
        let count = self.runs[0].experiment.train.accumulate;
        let mut batches: Vec<Taught> = Vec::with_capacity(count);
        for _ in 0..count {
            let lines = feed.lines()?;
            batches.push(self.taught(lines, kept)?);
        }
        let target_ms = begun.elapsed().as_secs_f64() * 1e3;
        let total = self.total();
        let rows = self.runs[0].experiment.rows();
        let mut learned = Vec::new();
        for (i, run) in self
            .runs
            .iter_mut()
            .enumerate()
            .filter(|(_, r)| r.state.step == step)
        {
            let begun = Instant::now();
            let stage = run.experiment.stage[leg.index].clone();
            let factor = stage
                .schedule
                .factor(step - steps.start, steps.end - steps.start);
            let rate = stage.optimizer.lr * factor;
            let (loss, norm) = run
                .learn(&self.host.on, &batches, &stage, rate, step)
                .map_err(|e| {
                    let names: Vec<&str> =
                        batches.iter().flat_map(|b| feed.names(&b.lines)).collect();
                    run.failed(&e, step, &names)
                })?;
            let draft_ms = begun.elapsed().as_secs_f64() * 1e3;
            let state = &mut run.state;
            state.step = step + 1;
            state.tokens += rows;
            state.position = feed.position();
            state.loss = loss.total;
            learned.push((
                i,
                run.metrics(&stage, &loss, norm, rate, [target_ms, draft_ms]),
            ));
        }
        self.step_s = smoothed(self.step_s, begun.elapsed().as_secs_f64());
        let done = step + 1;
        let every = self.runs[0].experiment.evaluate.every;
        let trunk = !self.forks.is_empty();
        let evaluate = !trunk && (done == steps.end || (every > 0 && done.is_multiple_of(every)));
        let aside = self.forks.contains(&done);
        let checkpoint = self.runs[0].experiment.train.checkpoint;
        let stopped = stop.load(Ordering::Relaxed);
        let save =
            evaluate || aside || stopped || (checkpoint > 0 && done.is_multiple_of(checkpoint));
        for (i, mut metrics) in learned {
            if save {
                self.runs[i]
                    .check_finite()
                    .map_err(|e| self.runs[i].failed(&e, step, &[]))?;
            }
            if evaluate {
                let begun = Instant::now();
                match (stop.load(Ordering::Relaxed), self.evaluate(i, stop)) {
                    (false, Ok(tau)) => metrics.tau = Some(tau),
                    (true, _) | (_, Err(Error::Interrupted(_))) => {
                        // It is made up for when the run goes on.
                        self.runs[i].state.pending = Some(metrics);
                        continue;
                    }
                    (false, Err(e)) => return Err(e),
                }
                self.evaluation_s = begun.elapsed().as_secs_f64();
            }
            let left = self.seconds_left(total - done, every);
            let run = &mut self.runs[i];
            run.keep(&metrics)?;
            told(Told::Step(&run.dir, &metrics, total, left));
        }
        let stopped = stop.load(Ordering::Relaxed);
        if save || stopped {
            for run in self.runs.iter_mut().filter(|r| r.state.step == done) {
                run.save()?;
                if aside {
                    keep_aside(run)?;
                }
            }
        }
        match stopped {
            true => Err(Error::Interrupted(format!(
                " behind step {done} of {total}; --resume goes on there"
            ))),
            false => Ok(()),
        }
    }

    /// What the target says of some lines, now or when it was kept.
    fn taught(&mut self, lines: Lines, kept: Option<&Features>) -> Result<Taught> {
        match kept {
            Some(kept) => Ok(Taught {
                states: kept.states(&lines, &self.taps)?,
                logits: None,
                top: kept.top(&lines)?,
                lines,
            }),
            None => teach(&mut self.session.target.model, lines, &self.taps),
        }
    }

    fn seconds_left(&self, steps: u64, every: u64) -> f64 {
        let evaluations = match every {
            0 => 1,
            every => steps.div_ceil(every),
        };
        steps as f64 * self.step_s
            + (evaluations * self.runs.len() as u64) as f64 * self.evaluation_s
    }

    /// Decodes with one of the drafts, and keeps it where it is the best.
    fn evaluate(&mut self, index: usize, stop: &AtomicBool) -> Result<Tau> {
        let run = &self.runs[index];
        let mut draft = run
            .learner
            .draft(self.session, &run.experiment.evaluate.tree)?;
        self.tester.limit(run.experiment.evaluate.budget.limits());
        let (tau, by_prompt) = self.tester.judge(self.session, &mut draft, stop)?;
        let run = &mut self.runs[index];
        run.state.by_prompt = by_prompt;
        run.state.last = Some(tau);
        if run.state.best.is_none_or(|best| tau.real > best.tau.real) {
            run.learner.export(self.session, &run.dir.join(BEST))?;
            run.state.best = Some(Best {
                step: run.state.step,
                tau,
            });
        }
        Ok(tau)
    }

    fn report(&self) -> Result<Report> {
        let report = Report {
            runs: self.runs.iter().map(Run::outcome).collect(),
            environment: self.session.environment()?,
            products: self.products(),
            peak_bytes: peak_resident(),
        };
        for (run, outcome) in self.runs.iter().zip(&report.runs) {
            let summary = serde_json::json!({
                "run": outcome,
                "environment": report.environment,
                "products": report.products,
                "peak_bytes": report.peak_bytes.filter(|_| run.experiment.run.times),
            });
            let text = serde_json::to_vec_pretty(&summary)
                .map_err(|e| Error::Experiment(e.to_string()))?;
            files::write(&run.dir.join("summary.json"), &text)?;
        }
        Ok(report)
    }

    /// Exports the drafts as they are before any step, loads what was written, decodes with it, and runs one step without
    /// keeping it: what would fail later fails now. Nothing is left behind.
    ///
    /// # Errors
    /// If any of it fails.
    pub fn dry_run(&mut self, stop: &AtomicBool, told: OnTold<'_>) -> Result<Report> {
        let dir = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
        let total = self.total();
        let data = std::mem::take(&mut self.data[0]);
        let train = &self.runs[0].experiment.train;
        let mut feed = Feed::new(
            data.documents(),
            (train.batch, train.length),
            0,
            Position::default(),
        )?;
        let begun = Instant::now();
        let lines = feed.lines()?;
        let taught = self.taught(lines, data.kept.as_ref())?;
        let mut seconds = begun.elapsed().as_secs_f64();
        let mut evaluation = 0.0;
        for i in 0..self.runs.len() {
            let run = &self.runs[i];
            let to = dir.path().join(i.to_string());
            run.learner.export(self.session, &to)?;
            let layouts = [Layout::Eagle, Layout::Eagle3, Layout::Scylla];
            let form = scylla_core::model::WeightForm::AsIs;
            let from = Checkpoint::open(&to, &layouts, &self.session.target.model.shape(), form)?;
            let fed = Fed {
                head: run.learner.head(),
                ..Fed::default()
            };
            let mut draft = serving(&from, &fed, self.session, &run.experiment.evaluate.tree)?;
            let begun = Instant::now();
            self.tester.limit(run.experiment.evaluate.budget.limits());
            let tau = self.tester.test(self.session, &mut draft, stop)?;
            evaluation += begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            let (loss, _) = self.runs[i].learner.learn(&taught, 0)?;
            seconds += begun.elapsed().as_secs_f64();
            let state = &mut self.runs[i].state;
            (state.loss, state.last) = (loss.total, Some(tau));
            told(Told::Note(format!(
                "untrained: loss {:.3}, tau {:.3} simulated, {:.3} real",
                loss.total, tau.simulated, tau.real
            )));
        }
        self.data[0] = data;
        let first = &self.runs[0].experiment;
        let (accumulate, every) = (first.train.accumulate as f64, first.evaluate.every);
        let evaluations = if every == 0 { 1 } else { total.div_ceil(every) };
        let whole = total as f64 * seconds * accumulate + evaluations as f64 * evaluation;
        told(Told::Note(format!(
            "a step takes {:.2} s ({:.0} tokens/s), an evaluation {evaluation:.1} s: {total} steps about {:.1} minutes",
            seconds * accumulate,
            first.rows() as f64 / (seconds * accumulate),
            whole / 60.0
        )));
        Ok(Report {
            runs: self.runs.iter().map(Run::outcome).collect(),
            environment: self.session.environment()?,
            products: self.products(),
            peak_bytes: peak_resident(),
        })
    }
}

/// Name of the state of a trunk behind a step.
pub(crate) fn fork_name(step: u64) -> String {
    format!("fork-{step}.safetensors")
}

/// Keeps a run's checkpoint aside under the name of its step.
fn keep_aside(run: &Run) -> Result<()> {
    let from = run.dir.join(CHECKPOINT);
    let bytes = std::fs::read(&from).map_err(Error::io(&from))?;
    Ok(files::write(
        &run.dir.join(fork_name(run.state.step)),
        &bytes,
    )?)
}

/// Lets a run begin where a trunk was behind a step, or the trunk itself go on to more steps than it was begun with; returns
/// the step.
///
/// # Errors
/// If the trunk was trained by another experiment, or a file cannot be read or written.
pub(crate) fn branch(
    session: &Session,
    trunk: &Path,
    checkpoint: &Path,
    experiment: &TrainExperiment,
    dir: &Path,
) -> Result<u64> {
    let on = compute(session, experiment.form()?)?;
    Run::fork(trunk, checkpoint, experiment, dir, &on)
}

fn smoothed(mean: f64, new: f64) -> f64 {
    if mean == 0.0 {
        new
    } else {
        0.9 * mean + 0.1 * new
    }
}
