//! A step: the loss of some answers, its gradients, and what becomes of the student.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor, Var};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use scylla_core::plugin::Matrix;
use scylla_core::train::graph::{Compute, Parameters, Tape, Value, under_head};
use scylla_core::train::{AlignContext, Aligner, AnswerLogits, Named};

use super::pairs::{Pair, packed};
use super::rows::Rows;
use super::tables::ALIGNER;
use super::teacher::chosen;
use super::trainer::{Distiller, Step, StepTimes};
use crate::{Error, Result};

impl Distiller {
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

    /// Tokens of each answer of a step, with its prompt: the student's and the teacher's.
    pub fn lengths(&self, step: u64) -> Vec<[usize; 2]> {
        let of = |i: usize| {
            let pair = &self.train.all[i];
            [pair.student.tokens.len(), pair.teacher.tokens.len()]
        };
        self.batch(step).into_iter().map(of).collect()
    }

    /// One step.
    pub(super) fn step(&mut self) -> Result<Step> {
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
                    let answers = &batch[at.clone()];
                    let (logits, hidden) = match cache.is_states() {
                        true => {
                            let states = own.kept_states(cache, answers)?;
                            let rows: Vec<usize> = (0..states.rows()).collect();
                            let logits = self.teacher.logits(&self.on, &states, &rows)?;
                            (logits, self.needs.hidden.then_some(states))
                        }
                        false => own.kept(cache, answers)?,
                    };
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
                vocab: self.student.known(),
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
        // Of autograd one tensor may be the gradient of two.
        let matrix = |t: &Tensor| -> scylla_core::Result<Matrix> {
            let columns = t.dims().last().copied().unwrap_or(1);
            let own = t.to_dtype(DType::F32)?.affine(self.share, 0.0)?;
            Ok(Matrix::host(taken(&own)?, columns))
        };
        let (mut hidden, mut others) = (None, Vec::new());
        let slopes = match &loss.gradient {
            Some(gradient) => scaled(gradient, self.share as f32, self.on)?,
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

/// Takes the values of a tensor out of it, of which nothing is left: logits' gradients are too large to stand twice.
#[derive(Default)]
struct TakeValues(Mutex<Vec<f32>>);

impl InplaceOp1 for TakeValues {
    fn name(&self) -> &'static str {
        "take-values"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("values that are not f32");
        };
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("values that do not follow one another");
        };
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match to - from == values.len() {
            true => std::mem::swap(&mut *taken, values),
            false => match values.get(from..to) {
                Some(some) => taken.extend_from_slice(some),
                None => candle_core::bail!("values that were taken before"),
            },
        }
        Ok(())
    }
}

/// The values of a tensor that nobody else will read.
fn taken(of: &Tensor) -> scylla_core::Result<Vec<f32>> {
    let of = of.to_dtype(DType::F32)?.contiguous()?;
    let take = TakeValues::default();
    of.inplace_op1(&take)?;
    Ok(take.0.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// A known gradient times a factor, as rows of its last dimension, in its place.
fn scaled(of: &Tensor, factor: f32, on: &Compute) -> scylla_core::Result<Matrix> {
    let columns = of.dims().last().copied().unwrap_or(1);
    let mut values = taken(of)?;
    let times = |values: &mut [f32]| values.iter_mut().for_each(|v| *v *= factor);
    match on {
        _ if factor == 1.0 => {}
        Compute::Kernels(p) => {
            let each = |_, [values]: [&mut [f32]; 1]| times(values);
            p.pool.rows([&mut values], [columns], 8, each);
        }
        Compute::Tensors { .. } => times(&mut values),
    }
    Ok(Matrix::host(values, columns))
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
