//! From losses over plain numbers to losses over tensors.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor, WithDType,
};
use scylla_core::kernels::zeros;
use scylla_core::train::{AlignLoss, AnswerLogits, Part};

use crate::answer::{Pair, Side};
use crate::{Error, Result, Scalar};

/// Values of a loss.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Evaluation {
    /// One a part, without weights.
    pub(crate) parts: Vec<f64>,
    pub(crate) notes: Vec<(&'static str, f64)>,
}

/// A loss over logits with its gradient.
pub(crate) trait Objective: Clone + Send + Sync + 'static {
    /// Names and weights of its parts.
    fn parts(&self) -> Vec<(&'static str, f64)>;

    /// The parts, and in `gradient` `[B, S, W]`, which comes as zeros, that of their sum weighted by `weights` with
    /// respect to the student's logits.
    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation>;
}

/// The mean over the sequences of a batch, which are told nothing of each other and share the cores. `one` gets the
/// sequence, what its weights are multiplied by, and its gradient `[S, W]`.
pub(crate) fn mean_of_sequences<F: Scalar>(
    pair: &Pair<'_, F>,
    gradient: Option<&mut [F]>,
    one: impl Fn(usize, f64, Option<&mut [F]>) -> Result<Evaluation> + Sync,
) -> Result<Evaluation> {
    let side = &pair.student;
    let share = 1.0 / side.batch as f64;
    let mut work: Vec<(usize, Option<&mut [F]>)> = match gradient {
        Some(all) => {
            let parts = all.chunks_exact_mut(side.seq * side.width).map(Some);
            parts.enumerate().collect()
        }
        None => (0..side.batch).map(|b| (b, None)).collect(),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let each = side.batch.div_ceil(threads.min(side.batch));
    let run = |work: &mut [(usize, Option<&mut [F]>)]| -> Vec<Result<Evaluation>> {
        let evaluate = |(b, g): &mut (usize, Option<&mut [F]>)| one(*b, share, g.as_deref_mut());
        work.iter_mut().map(evaluate).collect()
    };
    let found: Vec<Result<Evaluation>> = std::thread::scope(|scope| {
        let mut chunks = work.chunks_mut(each);
        let own = chunks.next();
        let others: Vec<_> = chunks.map(|work| scope.spawn(|| run(work))).collect();
        let mut found = own.map_or_else(Vec::new, run);
        for other in others {
            match other.join() {
                Ok(more) => found.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        found
    });
    let mut mean = Evaluation::default();
    for evaluation in found {
        let evaluation = evaluation?;
        mean.parts.resize(evaluation.parts.len(), 0.0);
        for (sum, part) in mean.parts.iter_mut().zip(&evaluation.parts) {
            *sum += share * part;
        }
        for (name, value) in evaluation.notes {
            match mean.notes.iter_mut().find(|(n, _)| *n == name) {
                Some((_, sum)) => *sum += share * value,
                None => mean.notes.push((name, share * value)),
            }
        }
    }
    Ok(mean)
}

/// What a loss is computed from, on the CPU.
struct Inputs {
    teacher: Given,
    student: Given,
    /// Type of the student's logits as they came, which the gradient has too.
    given: DType,
}

struct Given {
    name: &'static str,
    logits: Tensor,
    labels: Vec<i64>,
    shape: [usize; 3],
    vocab: usize,
    offsets: Option<Vec<Vec<(usize, usize)>>>,
}

impl Given {
    fn new(name: &'static str, answers: &AnswerLogits, dtype: DType) -> Result<Self> {
        let rank = |_| Error::Shape {
            what: "logits",
            expected: "[B, S, V]".into(),
            found: format!("{name} logits {:?}", answers.logits.dims()),
        };
        let (batch, seq, width) = answers.logits.dims3().map_err(rank)?;
        if answers.labels.dims() != [batch, seq] {
            return Err(Error::Shape {
                what: "labels",
                expected: format!("[{batch}, {seq}] as {name} logits have"),
                found: format!("{:?}", answers.labels.dims()),
            });
        }
        let labels = answers.labels.to_dtype(DType::I64)?.flatten_all()?;
        let logits = answers.logits.detach().to_dtype(dtype)?;
        Ok(Self {
            name,
            logits: logits.to_device(&Device::Cpu)?.contiguous()?,
            labels: labels.to_vec1()?,
            shape: [batch, seq, width],
            vocab: answers.vocab,
            offsets: answers.offsets.clone(),
        })
    }

    fn side<'a, F: Scalar>(&'a self, logits: &'a [F]) -> Result<Side<'a, F>> {
        let mut side = Side::new(self.name, logits, &self.labels, self.shape, self.vocab)?;
        side.offsets = self.offsets.as_deref();
        Ok(side)
    }
}

/// The numbers of a tensor on the CPU that is contiguous.
fn with_slice<F: WithDType, T>(tensor: &Tensor, body: impl FnOnce(&[F]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::Invalid("logits are not on the CPU".into()));
    };
    let all = storage.as_slice::<F>()?;
    match layout.contiguous_offsets() {
        Some((from, to)) => body(&all[from..to]),
        None => Err(Error::Invalid("logits are not contiguous".into())),
    }
}

impl Inputs {
    fn evaluate<F: Scalar + WithDType, O: Objective>(
        &self,
        objective: &O,
        weights: &[f64],
        wanted: bool,
    ) -> Result<(Evaluation, Option<Tensor>)> {
        with_slice::<F, _>(&self.teacher.logits, |teacher| {
            with_slice::<F, _>(&self.student.logits, |student| {
                let pair = Pair::new(self.teacher.side(teacher)?, self.student.side(student)?)?;
                let mut gradient = wanted.then(|| zeros::<F>(student.len()));
                let found = objective.evaluate(&pair, weights, gradient.as_deref_mut())?;
                let shape = Shape::from(&self.student.shape[..]);
                let gradient = gradient.map(|g| -> Result<Tensor> {
                    let gradient = Tensor::from_vec(g, shape, &Device::Cpu)?;
                    Ok(gradient.to_dtype(self.given)?)
                });
                Ok((found, gradient.transpose()?))
            })
        })
    }

    fn run<O: Objective>(
        &self,
        objective: &O,
        weights: &[f64],
        wanted: bool,
    ) -> Result<(Evaluation, Option<Tensor>)> {
        match self.student.logits.dtype() {
            DType::F64 => self.evaluate::<f64, O>(objective, weights, wanted),
            _ => self.evaluate::<f32, O>(objective, weights, wanted),
        }
    }
}

/// Makes an [`Objective`] an [`scylla_core::train::Aligner`] that needs byte offsets, or not.
macro_rules! aligner {
    ($of:ty, offsets: $offsets:literal) => {
        aligner!($of, offsets: $offsets, |_own, _needs| {});
    };
    ($of:ty, offsets: $offsets:literal, |$own:ident, $needs:ident| $more:block) => {
        impl scylla_core::train::Aligner for $of {
            fn needs(&self) -> scylla_core::train::AlignNeeds {
                let mut needs = scylla_core::train::AlignNeeds {
                    offsets: $offsets,
                    ..Default::default()
                };
                let ($own, $needs) = (self, &mut needs);
                $more
                needs
            }

            fn loss(
                &self,
                teacher: &scylla_core::train::AnswerLogits,
                student: &scylla_core::train::AnswerLogits,
                _: &scylla_core::train::AlignContext,
            ) -> scylla_core::Result<scylla_core::train::AlignLoss> {
                Ok($crate::loss::loss(self, teacher, student)?)
            }
        }
    };
}
pub(crate) use aligner;

type Gradient = dyn Fn() -> Result<Tensor> + Send + Sync;

/// A number whose gradient is known.
struct Known {
    value: f64,
    gradient: Box<Gradient>,
}

impl Known {
    fn tensor(self, of: &Tensor) -> Result<Tensor> {
        match of.track_op() {
            true => Ok(of.apply_op1(self)?),
            false => Ok(Tensor::new(self.value, &Device::Cpu)?.to_dtype(precision(of.dtype()))?),
        }
    }

    fn storage(&self, dtype: DType) -> candle_core::Result<CpuStorage> {
        let one = Tensor::new(self.value, &Device::Cpu)?.to_dtype(dtype)?;
        let (storage, _) = one.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok(storage.clone()),
            _ => candle_core::bail!("a number made on the CPU is elsewhere"),
        }
    }
}

impl CustomOp1 for Known {
    fn name(&self) -> &'static str {
        "alignment-loss"
    }

    fn cpu_fwd(&self, of: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((self.storage(precision(of.dtype()))?, Shape::from(())))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let gradient = (self.gradient)().map_err(candle_core::Error::wrap)?;
        let factor = upstream.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        match factor == 1.0 {
            true => Ok(Some(gradient)),
            false => Ok(Some((gradient * factor)?)),
        }
    }
}

/// What is computed with for logits of some type.
fn precision(logits: DType) -> DType {
    match logits {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The loss of a batch, differentiable with respect to the student's logits: the total with a gradient that is there
/// already, each part with one that is computed when asked for.
pub(crate) fn loss<O: Objective>(
    objective: &O,
    teacher: &AnswerLogits,
    student: &AnswerLogits,
) -> Result<AlignLoss> {
    let dtype = precision(student.logits.dtype());
    let inputs = Arc::new(Inputs {
        teacher: Given::new("teacher", teacher, dtype)?,
        student: Given::new("student", student, dtype)?,
        given: student.logits.dtype(),
    });
    // Where the logits are on another device, the loss is a number on the CPU, and candle takes its gradient back.
    let of = student.logits.to_device(&Device::Cpu)?;
    let named = objective.parts();
    let weights: Vec<f64> = named.iter().map(|(_, w)| *w).collect();
    let (found, gradient) = inputs.run(objective, &weights, of.track_op())?;
    // An aligner that checks its constants has named the one by now.
    if let Some((name, weight)) = named.iter().find(|(_, w)| !w.is_finite()) {
        return Err(Error::Invalid(format!(
            "the weight of part `{name}` is {weight}, which is not finite"
        )));
    }
    if let Some(at) = found.parts.iter().position(|p| !p.is_finite()) {
        return Err(Error::Invalid(format!(
            "part `{}` of the loss is {}: a token that the teacher expects has no probability at the student",
            named[at].0, found.parts[at]
        )));
    }
    let total = found.parts.iter().zip(&weights).map(|(p, w)| p * w).sum();
    let device = student.logits.device();
    let known = gradient.as_ref().map(|g| g.to_device(device)).transpose()?;
    let missing = || Error::Invalid("the gradient was not computed".into());
    let total = Known {
        value: total,
        gradient: Box::new(move || gradient.clone().ok_or_else(missing)),
    };
    let mut parts = Vec::new();
    for (at, ((name, weight), &value)) in named.iter().zip(&found.parts).enumerate() {
        let (inputs, objective) = (Arc::clone(&inputs), objective.clone());
        let alone: Vec<f64> = (0..named.len())
            .map(|i| f64::from(u8::from(i == at)))
            .collect();
        let gradient = move || {
            let (_, gradient) = inputs.run(&objective, &alone, true)?;
            gradient.ok_or_else(missing)
        };
        let value = Known {
            value,
            gradient: Box::new(gradient),
        };
        parts.push(Part {
            name,
            weight: *weight,
            value: value.tensor(&of)?,
        });
    }
    Ok(AlignLoss {
        total: total.tensor(&of)?,
        parts,
        gradient: known,
        notes: found.notes,
    })
}
