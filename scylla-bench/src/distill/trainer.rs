//! The trainer: steps, evaluations and checkpoints of one student.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use scylla_core::assets::OnProgress;
use scylla_core::files;
use scylla_core::model::{LoadOptions, parse_device};
use scylla_core::plugin::Matrix;
use scylla_core::text::Tokenizer;
use scylla_core::train::graph::Compute;
use scylla_core::train::{AdamW, AlignNeeds, Aligner, Named, checkpoint, norm};
use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::experiment::{DistillExperiment, PairSpec};
use super::pairs::{Pairs, pairs_of};
use super::score::{FirstBytes, Scores};
use super::student::Student;
use super::tables::{Tables, spaces};
use super::teacher::Teacher;
use crate::context::{AlignerContext, tokenizer_at};
use crate::data::documents::DataSpec;
use crate::environment::Environment;
use crate::registry::Registry;
use crate::train::{BEST, CHECKPOINT, METRICS, append, compute_beside, cut_to, first_difference};
use crate::{Error, Result};

/// What a step took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepTimes {
    /// Tokens of the student a second, the teacher's pass included.
    pub tokens_per_s: f64,
    /// Milliseconds of the teacher's pass and its logits.
    pub teacher_ms: f64,
    /// Of the aligner.
    pub aligner_ms: f64,
    /// Of all else: the student's pass and its gradient, and the optimizer.
    pub student_ms: f64,
}

/// A line of the metrics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Steps done.
    pub step: u64,
    /// Tokens of the student until now, prompts included.
    pub tokens: u64,
    /// The loss, over the answers of the step.
    pub loss: f64,
    /// Its parts, without their weights; 0 of what has none and is not computed.
    pub parts: BTreeMap<String, f64>,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// What it took; not said in runs whose files shall be the same each time.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub times: Option<StepTimes>,
    /// Where the student was evaluated behind this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Steps done.
    pub steps: u64,
    /// Tokens of the student.
    pub tokens: u64,
    /// The loss of the last step, and its parts.
    pub loss: f64,
    /// By name, without their weights.
    pub parts: BTreeMap<String, f64>,
    /// Of the best student.
    pub scores: Scores,
    /// Of the student behind the last step.
    pub last: Scores,
    /// The step behind which it was the best.
    pub best_step: u64,
    /// Folder of the best student.
    pub best: PathBuf,
}

/// What is told meanwhile.
pub enum Told<'a> {
    /// Something the user should know.
    Note(String),
    /// Documents and tokens read.
    Data(usize, u64),
    /// A step is done, of so many; seconds left.
    Step(&'a Step, u64, f64),
}

/// Told what is going on.
pub type OnTold<'a> = &'a mut dyn FnMut(Told<'_>);

const VERSION: u32 = 1;

/// All that a run is in the middle of, beside parameters and moments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) version: u32,
    pub(super) experiment: DistillExperiment,
    pub(super) teacher: String,
    pub(super) data: String,
    pub(super) step: u64,
    pub(super) tokens: u64,
    pub(super) metrics: u64,
    pub(super) last: Option<Step>,
    /// A step whose evaluation a break came before.
    pub(super) pending: Option<Step>,
    pub(super) best: Option<(u64, Scores)>,
}

/// A student on its way.
pub struct Distiller {
    pub(super) experiment: DistillExperiment,
    pub(super) dir: PathBuf,
    pub(super) on: Compute,
    pub(super) teacher: Teacher,
    pub(super) student: Student,
    pub(super) aligner: Box<dyn Aligner>,
    pub(super) needs: AlignNeeds,
    pub(super) tables: Tables,
    pub(super) train: Pairs,
    pub(super) watched: Pairs,
    /// What the teacher says, where it is kept.
    pub(super) cache: Option<Cache>,
    /// What the teacher expects of each answer that is watched, once it was asked.
    pub(super) expects: Vec<BTreeMap<usize, u8>>,
    pub(super) bytes: [FirstBytes; 2],
    pub(super) named: Named,
    pub(super) optimizer: AdamW,
    pub(super) state: State,
    /// Answers whose logits exist at a time.
    pub(super) together: usize,
    pub(super) step_s: f64,
}

/// Loads student and teacher, with what computes the graph.
fn sides(
    experiment: &DistillExperiment,
    on_progress: OnProgress<'_>,
    told: OnTold<'_>,
) -> Result<(Student, Teacher, Compute)> {
    let mut student = Student::open(&experiment.student, &mut *on_progress)?;
    if !student.is_trained() {
        told(Told::Note("the student begins with random weights".into()));
    }
    let options = LoadOptions {
        weights: experiment.teacher.weights,
        threads: experiment.run.threads,
        context: experiment.teacher.context,
        device: parse_device(&experiment.run.device)?,
    };
    let mut teacher = Teacher::open(&experiment.teacher.model, &options, on_progress)?;
    for note in &teacher.notes {
        told(Told::Note(format!("the teacher: {note}")));
    }
    let date = experiment.date()?;
    for (whose, tokenizer) in [
        ("student", &mut student.tokenizer),
        ("teacher", &mut teacher.tokenizer),
    ] {
        if let Some(reason) = tokenizer.broken_template() {
            return Err(Error::Experiment(format!("the {whose}: {reason}")));
        }
        tokenizer.choose_template(None, Some(date))?;
    }
    let on = compute_beside(teacher.loaded(), &options, experiment.form()?)?;
    let longest = experiment.pairs.longest;
    for (whose, context) in [
        ("teacher", teacher.loaded().model.shape().context),
        ("student", student.shape().context),
    ] {
        if longest > context {
            return Err(Error::Experiment(format!(
                "pairs.longest {longest} is more than the {whose}'s context of {context}"
            )));
        }
    }
    Ok((student, teacher, on))
}

/// Reads what is learned from, and what students are checked on.
fn answers(
    experiment: &DistillExperiment,
    both: (&Tokenizer, &Tokenizer),
    told: OnTold<'_>,
) -> Result<(Pairs, Pairs)> {
    let on_read = &mut |d, t| told(Told::Data(d, t));
    let but = Default::default();
    let (data, how) = (&experiment.data, &experiment.pairs);
    let train = pairs_of(data, how, 0, &but, both, on_read)?;
    let dev = match experiment.evaluate.files.is_empty() {
        true => DataSpec {
            part: experiment.evaluate.part.clone(),
            tokens: 0,
            ..data.clone()
        },
        false => DataSpec {
            files: experiment.evaluate.files.clone(),
            part: "all".into(),
            tokens: 0,
            keep_out: Vec::new(),
            ..data.clone()
        },
    };
    let count = experiment.evaluate.count;
    let how = PairSpec {
        pieces: match experiment.evaluate.pieces {
            0 => how.pieces,
            some => some,
        },
        ..how.clone()
    };
    let watched = pairs_of(&dev, &how, count, &train.documents, both, on_read);
    let watched = watched.map_err(|e| {
        Error::Experiment(format!(
            "nothing to check on: {e} (evaluate.files names files of their own)"
        ))
    })?;
    for (what, pairs) in [("to learn from", &train), ("to check on", &watched)] {
        let bytes: usize = pairs.all.iter().map(|p| p.bytes).sum();
        told(Told::Note(format!(
            "{what}: {} answers of {} documents, {bytes} bytes; {} too long, {} failed",
            pairs.all.len(),
            pairs.documents.len(),
            pairs.long,
            pairs.counts.failed
        )));
        for failure in &pairs.failures {
            told(Told::Note(format!("not used: {failure}")));
        }
    }
    Ok((train, watched))
}

impl Distiller {
    /// Loads teacher and student, reads the data, and begins or, where it is told so, goes on in a folder; without one nothing can be
    /// learned.
    ///
    /// # Errors
    /// If anything is amiss that can be known before a step is paid for; in particular, on resume, if teacher, data or experiment
    /// have changed.
    pub fn new(
        registry: &Registry,
        experiment: &DistillExperiment,
        output: Option<(&Path, bool)>,
        on_progress: OnProgress<'_>,
        told: OnTold<'_>,
    ) -> Result<Self> {
        let (dir, resume) = output.unwrap_or((Path::new(""), false));
        for name in [CHECKPOINT, METRICS, BEST]
            .iter()
            .filter(|_| output.is_some())
        {
            let path = dir.join(name);
            if path.exists() && !resume {
                return Err(Error::file(
                    &path,
                    "is there already: --resume goes on, another --output begins anew",
                ));
            }
        }
        let (student, teacher, on) = sides(experiment, on_progress, told)?;
        let both = (&student.tokenizer, &teacher.tokenizer);
        let (train, watched) = answers(experiment, both, told)?;
        let named = student.begin(experiment.run.seed, &on)?;
        let tables = Tables::default();
        let (name, settings) = experiment.aligner_name()?;
        let aligner = {
            let context = AlignerContext {
                tokenizers: Some((
                    tokenizer_at(student.tokenized())?,
                    tokenizer_at(&teacher.path)?,
                )),
                spaces: Some(spaces(&student, &named, &teacher, &tables)?),
            };
            registry.make_aligner(&name, &context, settings)?
        };
        let mut this = Self {
            bytes: [both.0, both.1].map(FirstBytes::of),
            together: match aligner.needs().whole_batch {
                true => experiment.train.batch,
                false => experiment.train.together,
            },
            needs: aligner.needs(),
            optimizer: AdamW::new(&on, &Named::new())?,
            state: State {
                version: VERSION,
                experiment: experiment.clone(),
                teacher: teacher.hash.clone(),
                data: format!("{} {}", train.hash, watched.hash),
                step: 0,
                tokens: 0,
                metrics: 0,
                last: None,
                pending: None,
                best: None,
            },
            experiment: experiment.clone(),
            dir: dir.to_path_buf(),
            expects: Vec::new(),
            cache: None,
            step_s: 0.0,
            on,
            teacher,
            student,
            aligner,
            tables,
            train,
            watched,
            named,
        };
        this.take_parameters()?;
        this.optimizer = AdamW::new(&this.on, &this.named)?;
        if resume && dir.join(CHECKPOINT).exists() {
            this.resume()?;
            told(Told::Note(format!(
                "goes on behind step {}",
                this.state.step
            )));
        }
        Ok(this)
    }

    /// What products are computed with.
    pub fn products(&self) -> String {
        self.on.name()
    }

    pub(super) fn threads(&self) -> usize {
        let options = LoadOptions {
            threads: self.experiment.run.threads,
            ..LoadOptions::default()
        };
        options.thread_count()
    }

    /// Where it runs; of the forms of weights that of the products.
    pub fn environment(&self) -> Environment {
        Environment::here(
            self.threads(),
            &self.experiment.run.device,
            vec![self.products()],
            &self.teacher.hash,
        )
    }

    fn resume(&mut self) -> Result<()> {
        let path = self.dir.join(CHECKPOINT);
        let (named, optimizer, state): (_, _, State) = checkpoint::load(&path, &self.on)?;
        let changed = |what: String| {
            let advice = "go on with what it was begun with, or begin anew in another --output";
            Err(Error::file(&path, format!("{what}; {advice}")))
        };
        if state.version != VERSION {
            return changed(format!(
                "is of version {}, this is {VERSION}",
                state.version
            ));
        }
        let table = |e: &DistillExperiment| {
            let mut e = e.clone();
            e.run.threads = 0;
            e.train.checkpoint = 0;
            serde_json::to_value(e).map_err(|e| Error::Experiment(e.to_string()))
        };
        let (was, now) = (table(&state.experiment)?, table(&self.experiment)?);
        if let Some(key) = first_difference(&was, &now, "") {
            return changed(format!("the experiment has changed, in `{key}`"));
        }
        if state.teacher != self.state.teacher {
            return changed("the teacher has changed".into());
        }
        if state.data != self.state.data {
            return changed("the data have changed, or a tokenizer".into());
        }
        let fits = |(name, now): (&String, &Matrix)| {
            let was = named.get(name);
            was.is_some_and(|w: &Matrix| (w.rows(), w.columns) == (now.rows(), now.columns))
        };
        if named.len() != self.named.len() || !self.named.iter().all(fits) {
            return changed("holds other parameters".into());
        }
        (self.named, self.optimizer, self.state) = (named, optimizer, state);
        self.tell_aligner()
    }

    /// Learns to the end.
    ///
    /// # Errors
    /// If students would be chosen by the test part; if the loss is not a number, a file cannot be written, or the user broke off (the state is kept then).
    pub fn run(&mut self, stop: &AtomicBool, told: OnTold<'_>) -> Result<Outcome> {
        if self.experiment.evaluate.part == "test" {
            return Err(Error::Experiment(
                "evaluate.part is test: students are chosen by dev; --score reports on test".into(),
            ));
        }
        if self.dir.as_os_str().is_empty() {
            return Err(Error::Experiment(
                "a student learns in a folder: --output".into(),
            ));
        }
        std::fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))?;
        let text = self.experiment.to_toml()?;
        files::write(&self.dir.join("experiment.toml"), text.as_bytes())?;
        if let Some(spec) = self.experiment.cache.clone().filter(|_| !self.needs.alone) {
            if self.needs.whole_rows && (1..self.teacher.known()).contains(&spec.top_k) {
                return Err(Error::Experiment(format!(
                    "this aligner reads the teacher's rows whole, of which cache.top_k keeps {} of {} tokens; with 0, or without [cache], the teacher says all",
                    spec.top_k,
                    self.teacher.known()
                )));
            }
            let dir = spec.dir.display().to_string();
            let mut on_shard = |done: usize, all: usize| {
                told(Told::Note(format!("{dir}: {done} of {all} shards")));
            };
            self.cache = Some(Cache::open(
                &spec,
                (&mut self.teacher, &self.on),
                &self.train.all,
                &self.train.taught,
                self.needs.hidden,
                stop,
                &mut on_shard,
            )?);
        }
        let metrics = self.dir.join(METRICS);
        self.state.metrics = cut_to(&metrics, self.state.metrics)?;
        let steps = self.experiment.train.steps;
        if let Some(step) = self.state.pending.take() {
            self.judge(step, stop, told)?;
        }
        while self.state.step < steps {
            if stop.load(Ordering::Relaxed) {
                self.save()?;
                return Err(Error::Interrupted(format!(
                    " behind step {}; --resume goes on",
                    self.state.step
                )));
            }
            let begun = Instant::now();
            let step = self.step()?;
            let took = begun.elapsed().as_secs_f64();
            self.step_s = match self.step_s {
                0.0 => took,
                mean => 0.9 * mean + 0.1 * took,
            };
            let every = self.experiment.evaluate.every;
            if step.step == steps || every > 0 && step.step.is_multiple_of(every) {
                // Nothing that goes wrong from here on costs a step.
                self.state.pending = Some(step.clone());
                self.save()?;
                self.state.pending = None;
                self.judge(step, stop, told)?;
                continue;
            }
            self.keep(&step)?;
            let checkpoint = self.experiment.train.checkpoint;
            if checkpoint > 0 && step.step.is_multiple_of(checkpoint) {
                self.save()?;
            }
            told(Told::Step(&step, steps, self.left(&step)));
        }
        let outcome = self.outcome()?;
        let text = serde_json::to_string_pretty(&outcome);
        let text = text.map_err(|e| Error::Experiment(e.to_string()))? + "\n";
        files::write(&self.dir.join("summary.json"), text.as_bytes())?;
        Ok(outcome)
    }

    /// Evaluates the student behind a step, and keeps it where it is the best.
    fn judge(&mut self, mut step: Step, stop: &AtomicBool, told: OnTold<'_>) -> Result<()> {
        let scores = self.evaluated(stop)?.0;
        if !scores.bits_per_byte.is_finite() {
            return Err(Error::Experiment(format!(
                "the student needs {} bits a byte behind step {}",
                scores.bits_per_byte, step.step
            )));
        }
        step.scores = Some(scores);
        self.keep_best(&step)?;
        self.keep(&step)?;
        self.save()?;
        told(Told::Step(
            &step,
            self.experiment.train.steps,
            self.left(&step),
        ));
        Ok(())
    }

    /// Appends a step to the metrics.
    fn keep(&mut self, step: &Step) -> Result<()> {
        self.state.metrics += append(&self.dir.join(METRICS), step)?;
        self.state.last = Some(step.clone());
        Ok(())
    }

    /// Seconds that the steps behind one will take.
    fn left(&self, step: &Step) -> f64 {
        self.step_s * (self.experiment.train.steps - step.step) as f64
    }

    fn outcome(&self) -> Result<Outcome> {
        let unfinished = || Error::Experiment("no step was done".into());
        let last = self.state.last.clone().ok_or_else(unfinished)?;
        let (best_step, scores) = self.state.best.ok_or_else(unfinished)?;
        Ok(Outcome {
            steps: last.step,
            tokens: last.tokens,
            loss: last.loss,
            parts: last.parts,
            last: last.scores.unwrap_or(scores),
            scores,
            best_step,
            best: self.dir.join(BEST),
        })
    }

    /// Exports the student where it is the best until now.
    fn keep_best(&mut self, step: &Step) -> Result<()> {
        let Some(scores) = step.scores else {
            return Ok(());
        };
        let before = self.state.best.map(|(_, best)| best.bits_per_byte);
        if before.is_none_or(|before| scores.bits_per_byte < before) {
            self.state.best = Some((step.step, scores));
            self.student.export(&self.named, &self.dir.join(BEST))?;
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        for named in [&self.named, &self.optimizer.first, &self.optimizer.second] {
            if !norm(named)?.is_finite() {
                return Err(Error::Experiment(
                    "a parameter or a moment has left the range of numbers; a smaller learning rate, or clipping".into(),
                ));
            }
        }
        let path = self.dir.join(CHECKPOINT);
        Ok(checkpoint::save(
            &path,
            &self.named,
            &self.optimizer,
            &self.state,
        )?)
    }
}
