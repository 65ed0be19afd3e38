//! MultiLevelOT as the authors' released code computes it, which differs from the paper in every term: logits are divided by
//! their deviation, tokens are ranked over the whole batch, `sl` takes a second softmax with the roles swapped, `sd` one over
//! probabilities, and rows of zeros pad every answer to the longest.

use std::collections::BTreeMap;
use std::ops::Range;

use scylla_core::kernels::softmax::{
    Exponentials, accumulate, combine_standardized, distances, distances_gradient, moments,
    weighted_sums,
};

use crate::answer::{Pair, Side};
use crate::cross_entropy::Predicted;
use crate::loss::Evaluation;
use crate::parallel::{by_row, threads};
use crate::scalar::dot;
use crate::settings::MultiLevelOt;
use crate::top::heaviest;
use crate::transport::{Problem, value_and_gradient};
use crate::{Error, Result, Scalar};

/// What the released code adds to a row's deviation.
const DEVIATION: f64 = 1e-4;

/// A row of logits with what its probabilities and their gradient need.
struct Row<'a, F> {
    z: &'a [F],
    mean: F,
    deviation: F,
    reference: F,
    /// What the logits are divided by, temperature and deviation together.
    heat: F,
    total: F,
    /// The mean of the logits under the probabilities.
    expected: F,
}

impl<'a, F: Scalar> Row<'a, F> {
    fn new(side: &Side<'a, F>, (b, s): (usize, usize), temperature: f64) -> Result<Self> {
        let z = side.row(b, s);
        let (mean, squares) = moments(z);
        let n = F::of(z.len() as f64);
        let deviation = (squares / (n - F::one()).max(F::one())).sqrt();
        let heat = (deviation + F::of(DEVIATION)) * F::of(temperature);
        let (reference, total, weighted) = weighted_sums(z, F::one() / heat);
        match total.is_finite() {
            true => Ok(Self {
                z,
                mean,
                deviation,
                reference,
                heat,
                total,
                expected: weighted / total,
            }),
            false => Err(Error::Invalid(format!(
                "{} logits of row [{b}, {s}] hold NaN or infinity",
                side.name
            ))),
        }
    }

    /// Adds all probabilities.
    fn add_probabilities(&self, out: &mut [F]) {
        let (scale, factor) = (F::one() / self.heat, F::one() / self.total);
        accumulate(self.z, self.reference, scale, factor, out);
    }

    fn probability(&self, j: usize) -> F {
        ((self.z[j] - self.reference) / self.heat).exp() / self.total
    }

    /// The gradient of what has `upstream` with respect to the probabilities of `tokens`, and of what has `other` beside it.
    fn through(
        &self,
        tokens: &[usize],
        upstream: &[F],
        temperature: f64,
        other: Exponentials<F>,
        out: &mut [F],
    ) {
        let (mut sum, mut along) = (F::zero(), F::zero());
        for (&j, &g) in tokens.iter().zip(upstream) {
            let weighted = g * self.probability(j);
            sum = sum + weighted;
            along = along + weighted * self.z[j];
        }
        let scale = F::one() / self.heat;
        let slope = F::one() / F::of(temperature);
        // Of the divisor: how the divided logits' gradient projects on the logits.
        let along = slope * (along - sum * self.expected);
        let divisor = self.heat * slope;
        let n = F::of(self.z.len() as f64) - F::one();
        let outwards = match self.deviation > F::zero() {
            true => along / (divisor * divisor * n * self.deviation),
            false => F::zero(),
        };
        let own = Exponentials {
            factor: -sum / (self.heat * self.total),
            reference: self.reference,
            scale,
        };
        combine_standardized(self.z, own, other, (-outwards, self.mean), out);
        for (&j, &g) in tokens.iter().zip(upstream) {
            out[j] = out[j] + g * self.probability(j) / self.heat;
        }
    }
}

/// Rows of which one thread adds the probabilities: few enough for all threads to have some, and so many that the sums take little memory. How
/// many threads there are does not matter to the sum over all.
fn part(rows: usize) -> usize {
    rows.div_ceil(32).clamp(16, 64)
}

/// One side's rows of all answers and its probabilities of the tokens compared.
struct Answers<'a, F> {
    spans: Vec<Range<usize>>,
    rows: Vec<Vec<Row<'a, F>>>,
    /// The heaviest tokens over the batch, at most `k`.
    tokens: Vec<usize>,
}

impl<'a, F: Scalar> Answers<'a, F> {
    fn new(side: &Side<'a, F>, skip_last: bool, temperature: f64, k: usize) -> Result<Self> {
        let spans: Result<Vec<_>> = (0..side.batch).map(|b| side.span(b, skip_last)).collect();
        let spans = spans?;
        let places = spans.iter().enumerate();
        let places: Vec<(usize, usize)> = places
            .flat_map(|(b, span)| span.clone().map(move |s| (b, s)))
            .collect();
        // What a row adds to the mass of all is added while it is at hand.
        let cores = threads(1, places.len() * side.vocab);
        let parts: Vec<&[(usize, usize)]> = places.chunks(part(places.len())).collect();
        let mut masses = vec![F::zero(); parts.len() * side.vocab];
        let numbers: Vec<usize> = (0..parts.len()).collect();
        let read = |(): &mut (), part: usize, mut mass: Option<&mut [F]>| {
            let mut of_row = |&place: &(usize, usize)| {
                let row = Row::new(side, place, temperature)?;
                if let Some(mass) = &mut mass {
                    row.add_probabilities(mass);
                }
                Ok(row)
            };
            parts[part].iter().map(&mut of_row).collect()
        };
        let found = by_row(&numbers, side.vocab, Some(&mut masses), cores, || (), read);
        let mut read: Vec<Row<'_, F>> = Vec::with_capacity(places.len());
        for part in found {
            let part: Result<Vec<Row<'_, F>>> = part;
            read.extend(part?);
        }
        let mut mass = vec![F::zero(); side.vocab];
        for part in masses.chunks_exact(side.vocab) {
            let sums = mass.iter_mut().zip(part);
            sums.for_each(|(sum, &p)| *sum = *sum + p);
        }
        let mut rest = read.into_iter();
        let rows: Vec<Vec<Row<'a, F>>> = spans
            .iter()
            .map(|span| rest.by_ref().take(span.len()).collect())
            .collect();
        Ok(Self {
            tokens: heaviest(&mass, k.min(side.vocab)),
            spans,
            rows,
        })
    }

    /// Probabilities `[longest, k]`, zeros beyond the answer and beyond the vocabulary.
    fn padded(&self, b: usize, longest: usize, k: usize) -> Vec<F> {
        let mut p = vec![F::zero(); longest * k];
        for (row, p) in self.rows[b].iter().zip(p.chunks_exact_mut(k)) {
            for (p, &j) in p.iter_mut().zip(&self.tokens) {
                *p = row.probability(j);
            }
        }
        p
    }
}

/// `softmax(x / temperature)` of each row of `x` `[N, k]`, and its logarithm.
fn softmax_rows<F: Scalar>(x: &[F], k: usize, temperature: f64) -> (Vec<F>, Vec<F>) {
    let mut p = Vec::with_capacity(x.len());
    let mut logs = Vec::with_capacity(x.len());
    for row in x.chunks_exact(k) {
        let at = |&x: &F| x / F::of(temperature);
        let max = row.iter().map(at).fold(F::neg_infinity(), F::max);
        let total: F = row.iter().map(|x| (at(x) - max).exp()).sum();
        logs.extend(row.iter().map(|x| at(x) - max - total.ln()));
        p.extend(row.iter().map(|x| (at(x) - max).exp() / total));
    }
    (p, logs)
}

/// Carries `upstream` on `softmax(x / temperature)` on to `x`, added to `out`, all `[N, k]`.
fn through_softmax<F: Scalar>(p: &[F], upstream: &[F], k: usize, temperature: f64, out: &mut [F]) {
    let rows = p.chunks_exact(k).zip(upstream.chunks_exact(k));
    for ((p, g), out) in rows.zip(out.chunks_exact_mut(k)) {
        let mean = dot(p, g);
        for ((out, &p), &g) in out.iter_mut().zip(p).zip(g) {
            *out = *out + p * (g - mean) / F::of(temperature);
        }
    }
}

fn transposed<F: Scalar>(x: &[F], k: usize) -> Vec<F> {
    let n = x.len() / k;
    (0..k)
        .flat_map(|i| (0..n).map(move |r| x[r * k + i]))
        .collect()
}

/// What a row of the batch is asked for.
#[derive(Clone, Copy, Default)]
struct Asked {
    /// Answer and row there, where it is compared.
    answered: Option<(usize, usize)>,
    /// Its place among those that predict a label.
    predicts: Option<usize>,
}

/// The loss of a batch.
pub(crate) fn evaluate<F: Scalar>(
    settings: &MultiLevelOt,
    pair: &Pair<'_, F>,
    weights: &[f64],
    gradient: Option<&mut [F]>,
) -> Result<Evaluation> {
    let wanted = gradient.is_some();
    let (student, teacher) = (&pair.student, &pair.teacher);
    let (heat, batch) = (settings.student_temperature, student.batch);
    let s = Answers::new(student, settings.skip_student_eos, heat, settings.k)?;
    let t = Answers::new(
        teacher,
        settings.skip_teacher_eos,
        settings.teacher_temperature,
        settings.k,
    )?;
    let k = settings.k.min(student.vocab.max(teacher.vocab));
    let lengths = s.rows.iter().chain(&t.rows).map(Vec::len);
    let longest = lengths.max().unwrap_or(0);
    let predicted = Predicted::new(student)?;
    let one = |b: usize| -> Result<([f64; 3], Vec<F>)> {
        let (mut had, mut sl) = (0.0, 0.0);
        let (p, q) = (t.padded(b, longest, k), s.padded(b, longest, k));
        let mut upstream = vec![F::zero(); longest * k];

        let shared = t.rows[b].len().min(s.rows[b].len());
        let share = 1.0 / (shared.max(1) * batch) as f64;
        let weight = F::of(weights[1] * share);
        for i in 0..shared * k {
            had += share * (p[i] - q[i]).abs().wide();
            let sign = match q[i] == p[i] {
                true => F::zero(),
                false => (q[i] - p[i]).signum(),
            };
            upstream[i] = upstream[i] + weight * sign;
        }

        let share = 1.0 / (batch * longest) as f64;
        let weight = F::of(weights[2] * share);
        let ((second, _), (_, logs)) = (softmax_rows(&q, k, 1.0), softmax_rows(&p, k, 1.0));
        sl -= share * dot(&second, &logs).wide();
        let of_second: Vec<F> = logs.iter().map(|&l| -weight * l).collect();
        through_softmax(&second, &of_second, k, 1.0, &mut upstream);

        let ((flat, _), (other, _)) = (
            softmax_rows(&q, k, settings.sd_temperature),
            softmax_rows(&p, k, settings.sd_temperature),
        );
        let columns = transposed(&flat, k);
        let mut cost = vec![F::zero(); longest * longest];
        distances(&other, &columns, k, &mut cost);
        let ones = vec![F::one(); longest];
        let problem = Problem {
            cost: &cost,
            a: &ones,
            b: &ones,
        };
        let (value, of_cost) = value_and_gradient(&problem, settings.epsilon, settings.iterations)?;
        if wanted {
            let mut of_columns = vec![F::zero(); columns.len()];
            distances_gradient(&other, &columns, k, &of_cost, &mut of_columns);
            let weight = F::of(weights[3]);
            let of_flat: Vec<F> = transposed(&of_columns, longest)
                .iter()
                .map(|&g| g * weight)
                .collect();
            through_softmax(&flat, &of_flat, k, settings.sd_temperature, &mut upstream);
        }
        Ok(([had, sl, value.wide()], upstream))
    };
    let answers: Vec<usize> = (0..batch).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let of_answer = |(): &mut (), b: usize, _: Option<&mut [F]>| one(b);
    let found = by_row(&answers, 1, None::<&mut [F]>, cores, || (), of_answer);
    let found: Vec<([f64; 3], Vec<F>)> = found.into_iter().collect::<Result<_>>()?;
    let part = |i: usize| found.iter().map(|(parts, _)| parts[i]).sum::<f64>();
    let parts = vec![predicted.mean(), part(0), part(1), part(2)];
    if let Some(gradient) = gradient {
        // Rows that anything is asked of, and where each stands among the answers'.
        let mut places: BTreeMap<usize, Asked> = BTreeMap::new();
        for (b, span) in s.spans.iter().enumerate() {
            for (i, row) in span.clone().enumerate() {
                places.entry(b * student.seq + row).or_default().answered = Some((b, i));
            }
        }
        for (at, &row) in predicted.rows.iter().enumerate() {
            places.entry(row).or_default().predicts = Some(at);
        }
        let (rows, places): (Vec<usize>, Vec<_>) = places.into_iter().unzip();
        let share = F::of(weights[0] / predicted.rows.len() as f64);
        let through = |(): &mut (), at: usize, out: Option<&mut [F]>| {
            let Some(out) = out.map(|out| &mut out[..student.vocab]) else {
                return;
            };
            let Asked { answered, predicts } = places[at];
            let Some((b, i)) = answered else {
                if let Some(p) = predicts {
                    // A token may have no probability here: what it adds is next to nothing.
                    predicted.add_gradient(student, p, share, out);
                }
                return;
            };
            let other =
                predicts.map_or(Exponentials::none(), |p| predicted.probabilities(p, share));
            let upstream = &found[b].1[i * k..][..s.tokens.len()];
            s.rows[b][i].through(&s.tokens, upstream, heat, other, out);
            if let Some(p) = predicts {
                out[predicted.tokens[p]] = out[predicted.tokens[p]] - share;
            }
        };
        let cores = threads(1, rows.len() * student.vocab);
        by_row(&rows, student.width, Some(gradient), cores, || (), through);
    }
    Ok(Evaluation {
        parts,
        notes: Vec::new(),
    })
}
