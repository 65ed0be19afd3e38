use candle_core::{D, DType, Device, IndexOp, Tensor, Var};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scylla_core::train::{AlignContext, AlignLoss, AlignNeeds, Aligner, AnswerLogits, Part};
use serde::Deserialize;

use crate::answer::IGNORED;
use crate::{Error, Result};

/// Constants of [`Dskd`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DskdSettings {
    /// Share of what is distilled; the cross entropy has the rest.
    pub kd_rate: f64,
    /// Temperature of the divergences.
    pub temperature: f64,
    /// Of the projectors' first values.
    pub seed: u64,
}

impl Default for DskdSettings {
    fn default() -> Self {
        Self {
            kd_rate: 0.5,
            temperature: 2.0,
            seed: 0,
        }
    }
}

/// What a model's hidden states and tokens are read with; neither is trained here.
#[derive(Debug, Clone)]
pub struct Space {
    /// Output head `[V, H]`.
    pub head: Tensor,
    /// Input embeddings `[V, H]`.
    pub embeddings: Tensor,
}

/// `x W^T + b`
#[derive(Debug)]
struct Projector {
    weight: Var,
    bias: Var,
}

impl Projector {
    fn new(from: usize, to: usize, dtype: DType, rng: &mut StdRng) -> Result<Self> {
        let bound = 1.0 / (from as f64).sqrt();
        let mut var = |shape: &[usize]| -> Result<Var> {
            let n = shape.iter().product();
            let values: Vec<f64> = (0..n).map(|_| rng.random_range(-bound..bound)).collect();
            let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
            Ok(Var::from_tensor(&values.to_dtype(dtype)?)?)
        };
        Ok(Self {
            weight: var(&[to, from])?,
            bias: var(&[to])?,
        })
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?)
    }
}

/// Dual-space distillation with cross-model attention (DSKD, arXiv:2406.17328): the teacher's hidden states, carried into the
/// student's space by attention over both tokenizations, are read with the student's head, and the student's in the
/// teacher's space with the teacher's.
///
/// `total = (1 - kd_rate) ce + kd_rate (t2s_ce + t2s_kd + s2t_kd)`. `t2s_ce` is the cross entropy of the carried states, which
/// trains the projectors; `t2s_kd` the student's divergence from them on tokens that they get right; `s2t_kd` that of
/// the carried student from the teacher. Each is a sum over tokens divided by the student's, then the mean over sequences.
/// Three projectors are trained beside the student ([`Aligner::parameters`]).
#[derive(Debug)]
pub struct Dskd {
    settings: DskdSettings,
    student: Space,
    teacher: Space,
    query: Projector,
    to_student: Projector,
    to_teacher: Projector,
}

impl Dskd {
    /// Projectors with random first values, f32 or f64 as the student's head.
    ///
    /// # Errors
    /// On constants outside their range, and on heads and embeddings that do not fit.
    pub fn new(settings: DskdSettings, student: Space, teacher: Space) -> Result<Self> {
        let DskdSettings {
            kd_rate,
            temperature,
            seed,
        } = settings;
        let fine = (0.0..=1.0).contains(&kd_rate) && temperature > 0.0 && temperature.is_finite();
        if !fine {
            return Err(Error::Invalid(format!(
                "kd_rate {kd_rate} must be from 0 to 1, temperature {temperature} finite and above 0"
            )));
        }
        let dtype = match student.head.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let read = |name: &'static str, space: &Space| -> Result<(Space, usize)> {
            let dims = space.head.dims();
            if dims.len() != 2 || dims != space.embeddings.dims() {
                return Err(Error::Shape {
                    what: name,
                    expected: "head and embeddings [V, H]".into(),
                    found: format!("{dims:?} and {:?}", space.embeddings.dims()),
                });
            }
            let own = |x: &Tensor| x.detach().to_dtype(dtype);
            let space = Space {
                head: own(&space.head)?,
                embeddings: own(&space.embeddings)?,
            };
            let hidden = space.head.dim(1)?;
            Ok((space, hidden))
        };
        let (student, own) = read("student", &student)?;
        let (teacher, other) = read("teacher", &teacher)?;
        let mut rng = StdRng::seed_from_u64(seed);
        Ok(Self {
            query: Projector::new(2 * own, 2 * other, dtype, &mut rng)?,
            to_student: Projector::new(other, own, dtype, &mut rng)?,
            to_teacher: Projector::new(own, other, dtype, &mut rng)?,
            settings,
            student,
            teacher,
        })
    }

    /// One sequence: `ce`, `t2s_ce`, `t2s_kd`, `s2t_kd`.
    fn sequence(&self, teacher: &Answer, student: &Answer) -> Result<[Tensor; 4]> {
        let n = student.targets.dim(0)? as f64;
        let ce = (cross_entropy(&student.logits, &student.targets)? / n)?;
        if teacher.targets.dim(0)? == 0 {
            let nothing = (&ce * 0.0)?;
            return Ok([ce, nothing.clone(), nothing.clone(), nothing]);
        }
        let query = self
            .query
            .apply(&Tensor::cat(&[&student.inputs, &student.outputs], 1)?)?;
        let keys = normalized(&Tensor::cat(&[&teacher.inputs, &teacher.outputs], 1)?)?;
        let width = keys.dim(1)? as f64;
        let scores = (query.matmul(&keys.t()?)? / width.sqrt())?;
        let values = (normalized(&teacher.hidden)? + normalized(&teacher.outputs)?)?;
        let carried = softmax(&scores)?.matmul(&self.to_student.apply(&values)?)?;
        let projected = carried.matmul(&student.head.t()?)?;
        let t2s_ce = (cross_entropy(&projected, &student.targets)? / n)?;

        let right = projected.argmax(D::Minus1)?.eq(&student.targets)?;
        let right = right.to_dtype(projected.dtype())?;
        let temper =
            |logits: &Tensor| -> Result<Tensor> { Ok((logits / self.settings.temperature)?) };
        let rows = divergence(&temper(&projected.detach())?, &temper(&student.logits)?)?;
        let t2s_kd = ((rows * right)?.sum_all()? / n)?;

        let across = scores.t()?.contiguous()?;
        let carried = softmax(&across)?.matmul(&self.to_teacher.apply(&student.hidden)?)?;
        let projected = carried.matmul(&teacher.head.t()?)?;
        let rows = divergence(&temper(&teacher.logits)?, &temper(&projected)?)?;
        let s2t_kd = (rows.sum_all()? / n)?;
        Ok([ce, t2s_ce, t2s_kd, s2t_kd])
    }
}

/// What one sequence's answer rows hold.
struct Answer {
    /// `[T, V]`
    logits: Tensor,
    /// `[T]`
    targets: Tensor,
    /// `[V, H]`: of the head what belongs to tokens.
    head: Tensor,
    /// `[T, H]`: hidden states, embeddings of the tokens there and of those that follow.
    hidden: Tensor,
    inputs: Tensor,
    outputs: Tensor,
}

impl Answer {
    fn new(name: &'static str, side: &AnswerLogits, b: usize, space: &Space) -> Result<Self> {
        let missing = |what| Error::Invalid(format!("{what} of the {name} are needed"));
        let hidden = side
            .hidden
            .as_ref()
            .ok_or_else(|| missing("hidden states"))?;
        let tokens = side.tokens.as_ref().ok_or_else(|| missing("tokens"))?;
        let (batch, seq, _) = side.logits.dims3()?;
        let (vocab, width) = space.head.dims2()?;
        let fits = side.labels.dims() == [batch, seq]
            && tokens.dims() == [batch, seq]
            && hidden.dims() == [batch, seq, width]
            && vocab >= side.vocab;
        if !fits {
            return Err(Error::Shape {
                what: "answers",
                expected: format!(
                    "{name} labels and tokens [{batch}, {seq}], hidden states [{batch}, {seq}, {width}], and a head for {} tokens",
                    side.vocab
                ),
                found: format!(
                    "{:?}, {:?}, {:?}, and {vocab}",
                    side.labels.dims(),
                    tokens.dims(),
                    hidden.dims()
                ),
            });
        }
        let labels: Vec<i64> = side.labels.i(b)?.to_dtype(DType::I64)?.to_vec1()?;
        let ids: Vec<i64> = tokens.i(b)?.to_dtype(DType::I64)?.to_vec1()?;
        let inside = |&id: &i64| usize::try_from(id).is_ok_and(|id| id < side.vocab);
        if let Some(s) =
            (0..seq).find(|&s| !inside(&ids[s]) || labels[s] != IGNORED && !inside(&labels[s]))
        {
            return Err(Error::Invalid(format!(
                "{name} token {} or label {} at [{b}, {s}] is none of {} tokens",
                ids[s], labels[s], side.vocab
            )));
        }
        let rows: Vec<u32> = (1..seq as u32)
            .filter(|&s| labels[s as usize] != IGNORED)
            .map(|s| s - 1)
            .collect();
        let of = |list: &dyn Fn(usize) -> i64| -> Result<Tensor> {
            let ids: Vec<u32> = rows.iter().map(|&s| list(s as usize) as u32).collect();
            Ok(Tensor::new(ids, &Device::Cpu)?)
        };
        let (inputs, targets) = (of(&|s| ids[s])?, of(&|s| labels[s + 1])?);
        let rows = Tensor::new(rows, &Device::Cpu)?;
        let dtype = space.head.dtype();
        let take = |x: &Tensor| -> Result<Tensor> {
            let x = x.i(b)?.to_device(&Device::Cpu)?.to_dtype(dtype)?;
            Ok(x.contiguous()?.index_select(&rows, 0)?)
        };
        let logits = take(&side.logits.narrow(2, 0, side.vocab)?)?;
        Ok(Self {
            head: space.head.narrow(0, 0, side.vocab)?,
            hidden: take(hidden)?,
            inputs: space.embeddings.index_select(&inputs, 0)?,
            outputs: space.embeddings.index_select(&targets, 0)?,
            logits,
            targets,
        })
    }
}

/// Divided by the deviation of all its values.
fn normalized(x: &Tensor) -> Result<Tensor> {
    let n = x.elem_count() as f64;
    let mean = x.mean_all()?;
    let squares = x.broadcast_sub(&mean)?.sqr()?.sum_all()?;
    let deviation = (squares / (n - 1.0).max(1.0))?.sqrt()?;
    match deviation.to_dtype(DType::F64)?.to_scalar::<f64>()? > 0.0 {
        true => Ok(x.broadcast_div(&deviation)?),
        false => Ok(x.clone()),
    }
}

// Of basic operations: candle's fused softmax has no gradient.
fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let below = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let total = below.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok(below.broadcast_sub(&total)?)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(log_softmax(x)?.exp()?)
}

/// Summed over rows.
fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let picked = log_softmax(logits)?.gather(&targets.unsqueeze(1)?, 1)?;
    Ok(picked.sum_all()?.neg()?)
}

/// `KL(softmax(p) || softmax(q))` of each row of logits.
fn divergence(p: &Tensor, q: &Tensor) -> Result<Tensor> {
    let (p, q) = (log_softmax(p)?, log_softmax(q)?);
    Ok((p.exp()? * (p - q)?)?.sum(D::Minus1)?)
}

impl Aligner for Dskd {
    fn needs(&self) -> AlignNeeds {
        AlignNeeds {
            tokens: true,
            hidden: true,
            whole_rows: true,
            ..AlignNeeds::default()
        }
    }

    fn loss(
        &self,
        teacher: &AnswerLogits,
        student: &AnswerLogits,
        _: &AlignContext,
    ) -> scylla_core::Result<AlignLoss> {
        Ok(self.of_batch(teacher, student)?)
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        let projectors = [
            ("query", &self.query),
            ("to_student", &self.to_student),
            ("to_teacher", &self.to_teacher),
        ];
        let named = projectors.map(|(name, p)| {
            [("weight", &p.weight), ("bias", &p.bias)]
                .map(|(k, v)| (format!("{name}.{k}"), v.clone()))
        });
        named.into_iter().flatten().collect()
    }
}

impl Dskd {
    fn of_batch(&self, teacher: &AnswerLogits, student: &AnswerLogits) -> Result<AlignLoss> {
        let batch = student.logits.dim(0)?;
        if teacher.logits.dim(0)? != batch {
            return Err(Error::Shape {
                what: "batch",
                expected: format!("{batch} texts as the student's"),
                found: format!("{} of the teacher", teacher.logits.dim(0)?),
            });
        }
        let mut sums: Option<[Tensor; 4]> = None;
        for b in 0..batch {
            let own = Answer::new("student", student, b, &self.student)?;
            let other = Answer::new("teacher", teacher, b, &self.teacher)?;
            if own.targets.dim(0)? == 0 {
                continue;
            }
            let other = Answer {
                logits: other.logits.detach(),
                hidden: other.hidden.detach(),
                ..other
            };
            let parts = self.sequence(&other, &own)?;
            sums = Some(match sums {
                None => parts,
                Some([a, b, c, d]) => {
                    let [e, f, g, h] = parts;
                    [(a + e)?, (b + f)?, (c + g)?, (d + h)?]
                }
            });
        }
        let nothing = || {
            Error::Invalid(format!(
                "every student label is {IGNORED}: there is no answer to learn from"
            ))
        };
        let sums = sums.ok_or_else(nothing)?;
        let rate = self.settings.kd_rate;
        let names = [
            ("ce", 1.0 - rate),
            ("t2s_ce", rate),
            ("t2s_kd", rate),
            ("s2t_kd", rate),
        ];
        let mut parts = Vec::new();
        let mut total: Option<Tensor> = None;
        for ((name, weight), sum) in names.into_iter().zip(sums) {
            let value = (sum / batch as f64)?;
            let number = value.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if !number.is_finite() {
                return Err(Error::Invalid(format!(
                    "part `{name}` of the loss is {number}: logits or hidden states hold NaN or infinity"
                )));
            }
            let weighted = (&value * weight)?;
            total = Some(match total {
                None => weighted,
                Some(total) => (total + weighted)?,
            });
            parts.push(Part {
                name,
                weight,
                value,
            });
        }
        Ok(AlignLoss {
            total: total.ok_or_else(nothing)?,
            parts,
            gradient: None,
            notes: Vec::new(),
        })
    }
}
