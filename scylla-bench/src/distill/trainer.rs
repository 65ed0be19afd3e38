//! The trainer: steps, evaluations and checkpoints of one student.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use candle_core::{DType, Device, Storage, Tensor, Var};
use multilevel_ot::{IGNORED, Space};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use scylla_core::assets::OnProgress;
use scylla_core::files;
use scylla_core::kernels::zeros;
use scylla_core::model::{LoadOptions, parse_device};
use scylla_core::plugin::Matrix;
use scylla_core::text::Tokenizer;
use scylla_core::train::graph::{Compute, Head, Parameters, Tape, Value, under_head};
use scylla_core::train::{
    AdamW, AlignContext, AlignNeeds, Aligner, AnswerLogits, Named, checkpoint, norm,
};
use scylla_core::{Decoder, Target};
use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::experiment::DistillExperiment;
use super::pairs::{Pair, Pairs, Side, packed, pairs_of};
use super::score::{AnswerScore, FirstBytes, Said, Scores, expected, of_answer};
use super::student::{Student, still};
use super::teacher::{Teacher, chosen};
use crate::context::{AlignerContext, Spaces, tokenizer_at};
use crate::data::documents::DataSpec;
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
    /// Its parts, without their weights.
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
struct State {
    version: u32,
    experiment: DistillExperiment,
    teacher: String,
    data: String,
    step: u64,
    tokens: u64,
    metrics: u64,
    last: Option<Step>,
    /// A step whose evaluation a break came before.
    pending: Option<Step>,
    best: Option<(u64, Scores)>,
}

/// The student's embedding and head as tensors, where the aligner reads them: they follow the student.
type Tables = Arc<OnceLock<[Var; 2]>>;

/// What stands before the name of what an aligner trains.
const ALIGNER: &str = "aligner.";

/// A student on its way.
pub struct Distiller {
    experiment: DistillExperiment,
    dir: PathBuf,
    on: Compute,
    teacher: Teacher,
    student: Student,
    aligner: Box<dyn Aligner>,
    needs: AlignNeeds,
    tables: Tables,
    train: Pairs,
    watched: Pairs,
    /// What the teacher says, where it is kept.
    cache: Option<Cache>,
    /// What the teacher expects of each answer that is watched, once it was asked.
    expects: Vec<HashMap<usize, u8>>,
    bytes: [FirstBytes; 2],
    named: Named,
    optimizer: AdamW,
    state: State,
    /// Answers whose logits exist at a time.
    together: usize,
    step_s: f64,
}

/// Columns that belong to tokens.
fn columns(tokenizer: &Tokenizer, width: usize) -> usize {
    tokenizer.size().min(width)
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
        let mut student = Student::open(&experiment.student)?;
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
        let both = (&student.tokenizer, &teacher.tokenizer);
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
        let watched = pairs_of(&dev, how, count, &train.documents, both, on_read);
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
        let named = student.begin(experiment.run.seed, &on)?;
        let tables = Tables::default();
        let (name, settings) = experiment.aligner_name()?;
        let aligner = {
            let context = AlignerContext {
                tokenizers: Some((tokenizer_at(&student.from)?, tokenizer_at(&teacher.path)?)),
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
            optimizer: AdamW::new(&on, &named)?,
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

    /// Lets the aligner's own parameters train beside the student's.
    fn take_parameters(&mut self) -> Result<()> {
        for (name, var) in self.aligner.parameters() {
            let columns = var.dims().last().copied().unwrap_or(1);
            let values = var.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
            let matrix = self.on.matrix(values, columns)?;
            self.named.insert(format!("{ALIGNER}{name}"), matrix);
        }
        Ok(())
    }

    /// Gives the aligner what was learned: its parameters, and the student's embedding and head where it reads them.
    fn tell_aligner(&self) -> Result<()> {
        let set = |var: &Var, from: &Matrix| -> Result<()> {
            let values = from.all()?.into_owned();
            let new = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
            Ok(var.set(&new.to_dtype(var.dtype())?)?)
        };
        for (name, var) in self.aligner.parameters() {
            if let Some(from) = self.named.get(&format!("{ALIGNER}{name}")) {
                set(&var, from)?;
            }
        }
        if let Some(tables) = self.tables.get() {
            for (var, from) in tables.iter().zip(tables_of(&self.student, &self.named)?) {
                set(var, from)?;
            }
        }
        Ok(())
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
            if self.needs.whole_rows && spec.top_k < self.teacher.known() {
                return Err(Error::Experiment(format!(
                    "this aligner reads the teacher's rows whole, of which cache.top_k keeps {} of {} tokens; without [cache] the teacher says all",
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

    /// The answers of a step: all in an order of the seed, then all in another.
    fn batch(&self, step: u64) -> Vec<usize> {
        let count = self.train.all.len() as u64;
        let first = step * self.experiment.train.batch as u64;
        let mut order: Option<(u64, Vec<usize>)> = None;
        let of = |at: u64| {
            let epoch = at / count;
            if order.as_ref().is_none_or(|(e, _)| *e != epoch) {
                let mut all: Vec<usize> = (0..count as usize).collect();
                let seed =
                    self.experiment.run.seed ^ (epoch + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                all.shuffle(&mut StdRng::seed_from_u64(seed));
                order = Some((epoch, all));
            }
            let all = order.as_ref().map_or(&[][..], |(_, all)| all);
            all[(at % count) as usize]
        };
        (first..first + self.experiment.train.batch as u64)
            .map(of)
            .collect()
    }

    /// One step.
    fn step(&mut self) -> Result<Step> {
        let begun = Instant::now();
        let step = self.state.step;
        let batch = self.batch(step);
        let pairs: Vec<Pair> = batch.iter().map(|&i| self.train.all[i].clone()).collect();
        let pairs: Vec<&Pair> = pairs.iter().collect();
        let failed = |e: Error| {
            let names: Vec<&str> = pairs.iter().map(|p| p.name.as_str()).collect();
            let names = names.join("; ");
            Error::Experiment(format!(
                "step {} failed: {e}. Its answers: {names}",
                step + 1
            ))
        };
        let mut learned = self.learn(&batch, &pairs).map_err(failed)?;
        let (settings, schedule) = (&self.experiment.optimizer, &self.experiment.schedule);
        let lr = settings.lr * schedule.factor(step, self.experiment.train.steps);
        let grads = std::mem::take(&mut learned.gradients);
        let grad_norm = self
            .optimizer
            .step(&self.on, settings, lr, &mut self.named, &grads)
            .map_err(|e| failed(e.into()))?;
        self.tell_aligner()?;
        let tokens: usize = pairs.iter().map(|p| p.student.tokens.len()).sum();
        self.state.step += 1;
        self.state.tokens += tokens as u64;
        let all_ms = begun.elapsed().as_secs_f64() * 1e3;
        Ok(Step {
            step: self.state.step,
            tokens: self.state.tokens,
            loss: learned.loss,
            parts: learned.parts,
            grad_norm,
            lr,
            times: self.experiment.run.times.then(|| StepTimes {
                tokens_per_s: tokens as f64 / all_ms * 1e3,
                teacher_ms: learned.teacher_ms,
                aligner_ms: learned.aligner_ms,
                student_ms: all_ms - learned.teacher_ms - learned.aligner_ms,
            }),
            scores: None,
        })
    }

    /// The loss of a batch and its gradients. Logits exist for a few answers at a time.
    fn learn(&mut self, batch: &[usize], pairs: &[&Pair]) -> Result<Learned> {
        let mut learned = Learned::default();
        let read = match self.needs.alone || self.cache.is_some() {
            true => None,
            false => {
                let begun = Instant::now();
                let read = self.teacher.read(pairs)?;
                learned.teacher_ms += begun.elapsed().as_secs_f64() * 1e3;
                Some(read)
            }
        };
        let (rows, tokens, begins) = packed(pairs.iter().map(|p| &p.student))?;
        let mut tape = Tape::new(&self.on);
        let mut named = Parameters::new(&self.named);
        let language = &self.student.language;
        let states = language.states(&mut tape, &mut named, &rows, &tokens)?;
        let head = language.head(&mut tape, &mut named)?;
        let mut others: Named = Named::new();
        let together = self.together;
        let labels =
            |pairs: &[&Pair]| -> f64 { pairs.iter().map(|p| p.student.answer.len() as f64).sum() };
        for (i, some) in pairs.chunks(together).enumerate() {
            let at = i * together..i * together + some.len();
            let share = match self.needs.by_token {
                true => labels(some) / labels(pairs),
                false => some.len() as f64 / pairs.len() as f64,
            };
            let begun = Instant::now();
            let given = match (&read, &self.cache) {
                (Some(read), _) => {
                    let own = Rows::of(some.iter().map(|p| &p.teacher), &read.begins[at.clone()]);
                    let logits = self.teacher.logits(&self.on, &read.states, &own.rows)?;
                    let hidden = match self.needs.hidden {
                        true => Some(chosen(&read.states, &own.rows)?),
                        false => None,
                    };
                    Some((own, logits, hidden))
                }
                (None, Some(cache)) => {
                    let own = Rows::of(some.iter().map(|p| &p.teacher), &vec![0; some.len()]);
                    let (logits, hidden) = own.kept(cache, &batch[at.clone()])?;
                    Some((own, logits, hidden))
                }
                (None, None) => None,
            };
            let teacher = match given {
                None => None,
                Some((own, logits, hidden)) => {
                    let logits = own.tensor(logits)?;
                    let mut said = own.answers(logits, self.teacher.known())?;
                    said.hidden = hidden.map(|states| own.tensor(states)).transpose()?;
                    if self.needs.offsets {
                        let offsets = some.iter().map(|p| p.offsets.1.clone());
                        said.offsets = Some(offsets.collect());
                    }
                    Some(said)
                }
            };
            learned.teacher_ms += begun.elapsed().as_secs_f64() * 1e3;
            let own = Rows::of(some.iter().map(|p| &p.student), &begins[at]);
            let hidden = match self.needs.hidden {
                true => {
                    let (values, shape) = own.values(chosen(&states.matrix, &own.rows)?)?;
                    Some(Var::from_vec(values, shape, &Device::Cpu)?)
                }
                false => None,
            };
            let offsets = || some.iter().map(|p| p.offsets.0.clone()).collect();
            let context = AlignContext {
                step: self.state.step as usize,
            };
            let asked = Asked {
                aligner: &*self.aligner,
                teacher,
                hidden: hidden.as_ref(),
                offsets: self.needs.offsets.then(offsets),
                vocab: columns(&self.student.tokenizer, self.student.shape().vocab),
                share,
                context: &context,
                on: &self.on,
            };
            let found = under_head(&mut tape, &states, &head, &own.rows, |logits| {
                asked.loss(&own, logits)
            })?;
            learned.loss += share * found.loss;
            for (name, value) in found.parts {
                *learned.parts.entry(name.into()).or_default() += share * value;
            }
            learned.aligner_ms += found.ms;
            if let Some(grad) = found.hidden {
                tape.seed(&states, scattered(&self.on, &states, &own.rows, &grad)?)?;
            }
            for (name, grad) in found.others {
                let name = format!("{ALIGNER}{name}");
                let grad = [(name, self.on.bring(&grad)?)].into();
                scylla_core::train::accumulate(&self.on, &mut others, grad)?;
            }
        }
        if !learned.loss.is_finite() {
            return Err(Error::Experiment(format!("the loss is {}", learned.loss)));
        }
        let mut gradients = tape.backward()?;
        let mut all = named.gradients(&self.on, &mut gradients)?;
        all.extend(others);
        learned.gradients = all;
        Ok(learned)
    }

    /// What the student is worth on answers that it does not learn from.
    ///
    /// # Errors
    /// If a pass fails.
    pub fn evaluate(&mut self) -> Result<Scores> {
        Ok(self.evaluate_each()?.0)
    }

    /// The same, and answer by answer.
    ///
    /// # Errors
    /// As [`Distiller::evaluate`].
    pub fn evaluate_each(&mut self) -> Result<(Scores, Vec<AnswerScore>)> {
        self.evaluated(&AtomicBool::new(false))
    }

    fn evaluated(&mut self, stop: &AtomicBool) -> Result<(Scores, Vec<AnswerScore>)> {
        let pairs = std::mem::take(&mut self.watched.all);
        let found = self.scored(&pairs, stop);
        self.watched.all = pairs;
        found
    }

    fn scored(&mut self, pairs: &[Pair], stop: &AtomicBool) -> Result<(Scores, Vec<AnswerScore>)> {
        let mut found = Vec::with_capacity(pairs.len());
        let asked = self.expects.len() == pairs.len();
        let mut expects = std::mem::take(&mut self.expects);
        let mut named = still(&self.named);
        let mut tape = Tape::new(&self.on);
        // Packed once for all answers.
        let head = tables_of(&self.student, &self.named)?[1].clone();
        let head = Head::frozen(&self.on, head)?;
        let vocab = columns(&self.student.tokenizer, self.student.shape().vocab);
        for (i, some) in pairs.chunks(self.experiment.train.batch).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted(format!(
                    " while the student was evaluated behind step {}; --resume goes on",
                    self.state.step
                )));
            }
            let some: Vec<&Pair> = some.iter().collect();
            if !asked {
                let read = self.teacher.read(&some)?;
                for (pair, &begin) in some.iter().zip(&read.begins) {
                    let rows = Rows::before(&pair.teacher, begin);
                    let logits = self.teacher.logits(&self.on, &read.states, &rows)?;
                    let (values, width) = (logits.all()?, logits.columns);
                    expects.push(expected(
                        pair.teacher.said(),
                        &pair.offsets.1,
                        &self.bytes[1],
                        &values,
                        width,
                    ));
                }
            }
            let (rows, tokens, begins) = packed(some.iter().map(|p| &p.student))?;
            let language = &self.student.language;
            let states = language.states(&mut tape, &mut named, &rows, &tokens)?;
            for (j, (pair, &begin)) in some.iter().zip(&begins).enumerate() {
                let rows = chosen(&states.matrix, &Rows::before(&pair.student, begin))?;
                let logits = head.logits(&self.on, &rows)?;
                let (values, width) = (logits.all()?, logits.columns);
                let said = pair.student.said();
                let own = expected(said, &pair.offsets.0, &self.bytes[0], &values, width);
                let teacher = &expects[i * self.experiment.train.batch + j];
                found.push(of_answer(pair, (&values, width, vocab), (&own, teacher)));
            }
        }
        self.expects = expects;
        let scores = Scores::over(&found, self.said(pairs)?);
        Ok((scores, found))
    }

    /// What the student says itself, decoded as the model that it is exported as, where right answers are known.
    fn said(&self, pairs: &[Pair]) -> Result<Option<Said>> {
        let most = self.experiment.evaluate.max_new_tokens;
        let asked: Vec<&Pair> = pairs.iter().filter(|p| !p.right.is_empty()).collect();
        if asked.is_empty() || most == 0 {
            return Ok(None);
        }
        let dir = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
        self.student.export(&self.named, dir.path())?;
        let options = LoadOptions {
            threads: self.experiment.run.threads,
            device: parse_device(&self.experiment.run.device)?,
            context: self.student.shape().context,
            ..LoadOptions::default()
        };
        let target = Target::open(&dir.path().to_string_lossy(), &options)?;
        let mut decoder = Decoder::new(target, None, scylla_verify::Auto)?;
        let request = |pair: &&Pair| {
            let prompt = pair.student.tokens[..pair.student.answer.start].to_vec();
            let mut request = decoder.request_of(prompt);
            request.max_new_tokens = most;
            request
        };
        let requests = asked.iter().map(request).collect();
        let outputs = decoder.answer_all(requests);
        if let Some(failed) = outputs.iter().find_map(|o| o.failed.clone()) {
            return Err(Error::Experiment(format!(
                "the student's own answer: {failed}"
            )));
        }
        let texts = outputs.iter().map(|o| o.text.as_str());
        Ok(Some(Said::of(
            texts.zip(asked.iter().map(|p| &p.right[..])),
        )))
    }
}

/// What a batch taught.
#[derive(Default)]
struct Learned {
    loss: f64,
    parts: BTreeMap<String, f64>,
    gradients: Named,
    teacher_ms: f64,
    aligner_ms: f64,
}

/// Rows of some answers of one side, each from the one before its first token on: as many of each, the last repeated.
struct Rows<'a> {
    sides: Vec<&'a Side>,
    /// `[B * S]`
    rows: Vec<usize>,
    /// S.
    length: usize,
}

impl<'a> Rows<'a> {
    fn of(sides: impl Iterator<Item = &'a Side>, begins: &[usize]) -> Self {
        let sides: Vec<&Side> = sides.collect();
        let length = 1 + sides.iter().map(|s| s.answer.len()).max().unwrap_or(0);
        let of = |(side, &begin): (&&Side, &usize)| {
            let (first, last) = (side.answer.start - 1, side.answer.end - 1);
            (0..length).map(move |i| begin + (first + i).min(last))
        };
        let rows = sides.iter().zip(begins).flat_map(of).collect();
        Self {
            sides,
            rows,
            length,
        }
    }

    /// Rows before each token of an answer.
    fn before(side: &Side, begin: usize) -> Vec<usize> {
        side.answer.clone().map(|at| begin + at - 1).collect()
    }

    /// The same rows out of a cache: logits, and hidden states where they are kept.
    fn kept(&self, cache: &Cache, answers: &[usize]) -> Result<(Matrix, Option<Matrix>)> {
        let (mut logits, mut states) = (Vec::new(), Vec::new());
        for &answer in answers {
            let (said, hidden) = cache.said(answer)?;
            let last = said.rows() - 1;
            let rows: Vec<usize> = (0..self.length).map(|i| i.min(last)).collect();
            logits.push(chosen(&said, &rows)?);
            if let Some(hidden) = hidden {
                states.push(chosen(&hidden, &rows)?);
            }
        }
        let states = match states.is_empty() {
            true => None,
            false => Some(Matrix::joined(states)?),
        };
        Ok((Matrix::joined(logits)?, states))
    }

    /// Logits `[B, S, W]` of these rows with their labels and tokens.
    fn answers(&self, logits: Tensor, vocab: usize) -> Result<AnswerLogits> {
        let shape = (self.sides.len(), self.length);
        let (mut labels, mut tokens) = (Vec::new(), Vec::new());
        for side in &self.sides {
            let said = side.said();
            for i in 0..self.length {
                let label = i.checked_sub(1).and_then(|i| said.get(i));
                labels.push(label.map_or(IGNORED, |&t| i64::from(t)));
                let at = (side.answer.start - 1 + i).min(side.tokens.len() - 1);
                tokens.push(i64::from(side.tokens[at]));
            }
        }
        Ok(AnswerLogits {
            logits,
            labels: Tensor::from_vec(labels, shape, &Device::Cpu)?,
            vocab,
            tokens: Some(Tensor::from_vec(tokens, shape, &Device::Cpu)?),
            offsets: None,
            hidden: None,
        })
    }

    /// The values of rows, without a copy where they are on the host, and their shape.
    fn values(&self, m: Matrix) -> Result<(Vec<f32>, (usize, usize, usize))> {
        let shape = (self.sides.len(), self.length, m.columns);
        let values = match m.is_on_device() {
            true => m.all()?.into_owned(),
            false => m.into_values()?,
        };
        Ok((values, shape))
    }

    fn tensor(&self, m: Matrix) -> Result<Tensor> {
        let (values, shape) = self.values(m)?;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// What is asked of an aligner.
struct Asked<'a> {
    aligner: &'a dyn Aligner,
    teacher: Option<AnswerLogits>,
    hidden: Option<&'a Var>,
    offsets: Option<Vec<Vec<(usize, usize)>>>,
    vocab: usize,
    /// What gradients are multiplied by.
    share: f64,
    context: &'a AlignContext,
    on: &'a Compute,
}

/// What it found.
struct Found {
    loss: f64,
    parts: Vec<(&'static str, f64)>,
    /// By the student's hidden states `[rows, H]`.
    hidden: Option<Matrix>,
    /// By the aligner's own parameters.
    others: Vec<(String, Matrix)>,
    ms: f64,
}

impl Asked<'_> {
    /// The loss of these logits, in whose place their gradient comes.
    fn loss(&self, rows: &Rows<'_>, logits: &mut Matrix) -> scylla_core::Result<Found> {
        let core = |e: Error| scylla_core::Error::Invalid(e.to_string());
        let begun = Instant::now();
        let (values, shape) = rows.values(std::mem::take(logits)).map_err(core)?;
        let var = Var::from_vec(values, shape, &Device::Cpu)?;
        let given = rows.answers(var.as_tensor().clone(), self.vocab);
        let mut student = given.map_err(core)?;
        let width = shape.2;
        student.offsets.clone_from(&self.offsets);
        student.hidden = self.hidden.map(|h| h.as_tensor().clone());
        let teacher = self.teacher.as_ref().unwrap_or(&student);
        let loss = self.aligner.loss(teacher, &student, self.context)?;
        let matrix = |t: &Tensor| scaled(t, self.share as f32, self.on);
        let (mut hidden, mut others) = (None, Vec::new());
        let slopes = match &loss.gradient {
            Some(gradient) => matrix(gradient)?,
            None => {
                let found = loss.total.backward()?;
                if let Some(grad) = self.hidden.and_then(|h| found.get(h)) {
                    hidden = Some(matrix(grad)?);
                }
                for (name, var) in self.aligner.parameters() {
                    if let Some(grad) = found.get(&var) {
                        others.push((name, matrix(grad)?));
                    }
                }
                match found.get(&var) {
                    Some(gradient) => matrix(gradient)?,
                    None => Matrix::host(vec![0.0; rows.rows.len() * width], width),
                }
            }
        };
        let number = |t: &Tensor| t.to_dtype(DType::F64)?.to_scalar::<f64>();
        let parts = loss.parts.iter();
        let parts = parts.map(|p| Ok((p.name, number(&p.value)?)));
        let found = Found {
            loss: number(&loss.total)?,
            parts: parts.collect::<scylla_core::Result<_>>()?,
            hidden,
            others,
            ms: begun.elapsed().as_secs_f64() * 1e3,
        };
        *logits = self.on.bring(&slopes)?;
        Ok(found)
    }
}

/// A tensor of f32 on the host times a factor, as rows of its last dimension: one pass over it, as logits' gradients are large.
fn scaled(of: &Tensor, factor: f32, on: &Compute) -> scylla_core::Result<Matrix> {
    let columns = of.dims().last().copied().unwrap_or(1);
    let of = of.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = of.storage_and_layout();
    let (Storage::Cpu(storage), Some((from, to))) = (&*storage, layout.contiguous_offsets()) else {
        return Err(scylla_core::Error::Invalid(
            "a gradient that is not on the host".into(),
        ));
    };
    let values = &storage.as_slice::<f32>()?[from..to];
    let mut out = zeros::<f32>(values.len());
    let times = |rows: std::ops::Range<usize>, out: &mut [f32]| {
        let from = &values[rows.start * columns..rows.end * columns];
        out.iter_mut()
            .zip(from)
            .for_each(|(out, v)| *out = v * factor);
    };
    match on {
        Compute::Kernels(p) => {
            let each = |rows, [out]: [&mut [f32]; 1]| times(rows, out);
            p.pool.rows([&mut out], [columns], 8, each);
        }
        Compute::Tensors { .. } => times(0..values.len() / columns.max(1), &mut out),
    }
    Ok(Matrix::host(out, columns))
}

/// Gradients of some rows, among zeros for all others.
fn scattered(on: &Compute, states: &Value, rows: &[usize], grad: &Matrix) -> Result<Matrix> {
    let width = states.columns();
    let mut values = vec![0.0; states.rows() * width];
    let grad = grad.all()?;
    for (&row, grad) in rows.iter().zip(grad.chunks_exact(width)) {
        let out = &mut values[row * width..][..width];
        out.iter_mut().zip(grad).for_each(|(sum, g)| *sum += g);
    }
    Ok(on.matrix(values, width)?)
}

/// The student's embedding and head among its parameters.
fn tables_of<'a>(student: &Student, named: &'a Named) -> Result<[&'a Matrix; 2]> {
    let head = match student.shape().tied {
        true => "model.embed_tokens.weight",
        false => "lm_head.weight",
    };
    let missing = || Error::Experiment("the student has no embedding".into());
    let one = |name: &str| named.get(name).ok_or_else(missing);
    Ok([one("model.embed_tokens.weight")?, one(head)?])
}

/// Heads and embeddings of both sides, should the aligner ask for them.
fn spaces(student: &Student, named: &Named, teacher: &Teacher, tables: &Tables) -> Result<Spaces> {
    let own = tables_of(student, named)?.map(Matrix::clone);
    let (theirs, tables) = (teacher.tokens().clone(), Arc::clone(tables));
    let tensor = |m: &Matrix| -> Result<Tensor> {
        let shape = (m.rows(), m.columns);
        Ok(Tensor::from_vec(
            m.all()?.into_owned(),
            shape,
            &Device::Cpu,
        )?)
    };
    Ok(Box::new(move || {
        let vars = match tables.get() {
            Some(vars) => vars,
            None => {
                let var = |m: &Matrix| -> Result<Var> { Ok(Var::from_tensor(&tensor(m)?)?) };
                let vars = [var(&own[0])?, var(&own[1])?];
                tables.get_or_init(|| vars)
            }
        };
        let all: Vec<u32> = (0..theirs.vocab as u32).collect();
        let rows = |of: &Arc<dyn scylla_core::model::WeightMatrix>| -> Result<Tensor> {
            let mut m = Matrix::default();
            of.rows(&all, &mut m)?;
            tensor(&m)
        };
        Ok((
            Space {
                embeddings: vars[0].as_tensor().clone(),
                head: vars[1].as_tensor().clone(),
            },
            Space {
                embeddings: rows(&theirs.embedding)?,
                head: rows(&theirs.head)?,
            },
        ))
    }))
}
