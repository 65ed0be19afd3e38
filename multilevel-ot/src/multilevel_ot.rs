use scylla_core::kernels::softmax::{distances, distances_gradient};
use serde::Deserialize;

use crate::answer::Pair;
use crate::loss::{Evaluation, Objective, aligner, mean_of_sequences};
use crate::matching::assign;
use crate::reference_code;
use crate::rows::Rows;
use crate::top::heaviest;
use crate::transport::{Problem, Settings, Stop, exact, sinkhorn, value_and_gradient};
use crate::{Error, Result, Scalar};

/// Which of the two losses that go by the name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The published formulas.
    #[default]
    Paper,
    /// What the authors' released code computes.
    ReferenceCode,
}

/// How the student's tokens are matched with the teacher's heaviest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Matching {
    /// In the order of the mass that the student gives them over the sequence.
    #[default]
    Rank,
    /// By the cheapest one-to-one assignment (Q*) over the student's heaviest.
    Assignment,
}

/// Which transport cost SD is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SinkhornForm {
    /// `<P, C>` after the fixed number of iterations, with the gradient through them.
    #[default]
    Fixed,
    /// `<P, C> + epsilon sum P log P` of the converged plan, whose gradient is the plan.
    Converged,
    /// The least cost of all plans: for answers of some tens of tokens.
    Exact,
}

/// Multi-Level Optimal Transport (arXiv:2412.14528): cross entropy, and beside it the difference (`had`), cross entropy (`sl`)
/// and Sinkhorn distance (`sd`) between probabilities of matched tokens, the `k` heaviest of each sequence.
///
/// `total = ce + alpha (had + beta sl + gamma sd)`. In paper mode parts are sums over a sequence's tokens, and those of a
/// batch the mean over its sequences. Where teacher and student have different numbers of tokens, the ranking, `had` and `sl`
/// take the first that both have, and `sd` is the transport between equal masses in all, as much as the smaller number.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Given")]
pub struct MultiLevelOt {
    /// Published formulas, or released code.
    pub mode: Mode,
    /// Tokens compared. In paper mode at most what both vocabularies have.
    pub k: usize,
    /// Weight of all three beside the cross entropy.
    pub alpha: f64,
    /// Weight of `sl` among them.
    pub beta: f64,
    /// Weight of `sd` among them.
    pub gamma: f64,
    /// Weight of the entropy in `sd`.
    pub epsilon: f64,
    /// Sinkhorn iterations.
    pub iterations: usize,
    /// Temperature of the student's logits in `had`, `sl` and the ranking.
    pub student_temperature: f64,
    /// Temperature of the teacher's logits there.
    pub teacher_temperature: f64,
    /// Temperature of both in `sd`.
    pub sd_temperature: f64,
    /// How tokens are matched (paper mode).
    pub matching: Matching,
    /// How many of the student's heaviest tokens an assignment may choose from.
    pub candidates: usize,
    /// Which transport cost `sd` is (paper mode).
    pub sinkhorn: SinkhornForm,
    /// Distils all but the last of the student's labels.
    pub skip_student_eos: bool,
    /// Distils from all but the last of the teacher's labels.
    pub skip_teacher_eos: bool,
}

impl MultiLevelOt {
    /// The constants of the paper.
    pub fn paper() -> Self {
        Self {
            mode: Mode::Paper,
            k: 50,
            alpha: 0.15,
            beta: 0.1,
            gamma: 0.1,
            epsilon: 0.1,
            iterations: 20,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            sd_temperature: 2.0,
            matching: Matching::Rank,
            candidates: 200,
            sinkhorn: SinkhornForm::Fixed,
            skip_student_eos: false,
            skip_teacher_eos: false,
        }
    }

    /// The constants of the released code.
    pub fn reference_code() -> Self {
        Self {
            mode: Mode::ReferenceCode,
            alpha: 1.5,
            gamma: 1e-4,
            iterations: 10,
            ..Self::paper()
        }
    }

    /// # Errors
    /// On constants outside their range.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("epsilon", self.epsilon),
            ("student_temperature", self.student_temperature),
            ("teacher_temperature", self.teacher_temperature),
            ("sd_temperature", self.sd_temperature),
        ];
        for (name, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::Invalid(format!(
                    "{name} {value} must be finite and above 0"
                )));
            }
        }
        for (name, value) in [
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("gamma", self.gamma),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::Invalid(format!(
                    "{name} {value} must be finite and not negative"
                )));
            }
        }
        if self.k == 0 {
            return Err(Error::Invalid("k must be at least 1".into()));
        }
        if self.matching == Matching::Assignment && self.candidates < self.k {
            return Err(Error::Invalid(format!(
                "{} candidates cannot be assigned to k = {} tokens",
                self.candidates, self.k
            )));
        }
        let published = |changed| match changed && self.mode == Mode::ReferenceCode {
            true => Err("the released code matches by rank and iterates a fixed number of times"),
            false => Ok(()),
        };
        published(self.matching != Matching::Rank || self.sinkhorn != SinkhornForm::Fixed)
            .map_err(|e| Error::Invalid(e.into()))?;
        Ok(())
    }

    /// One sequence by the published formulas; `scale` multiplies the weights.
    fn sequence<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        b: usize,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        let (teacher, student) = (&pair.teacher, &pair.student);
        let smaller = teacher.vocab.min(student.vocab);
        if self.k > smaller {
            return Err(Error::Invalid(format!(
                "k = {} is more than the {smaller} tokens of the smaller vocabulary",
                self.k
            )));
        }
        let answer = student.answer(b);
        let rows = teacher.distilled(b, self.skip_teacher_eos).rows;
        let distilled = student.distilled(b, self.skip_student_eos).rows.len();
        let shared = distilled.min(rows.len());
        let hot = self.student_temperature;
        let mut mass = vec![F::zero(); student.vocab];
        let temperatures = [1.0, hot, self.sd_temperature];
        let s = Rows::read(
            student,
            b,
            &answer.rows,
            &temperatures,
            Some((hot, shared, &mut mass)),
        )?;
        let own = mass;
        let mut mass = vec![F::zero(); teacher.vocab];
        let cold = self.teacher_temperature;
        // The same list of temperatures, so that equal logits give bit for bit equal probabilities.
        let temperatures = [1.0, cold, self.sd_temperature];
        let t = Rows::read(
            teacher,
            b,
            &rows,
            &temperatures,
            Some((cold, shared, &mut mass)),
        )?;
        let ranked = heaviest(&mass, self.k);
        let (p, wide) = (
            t.gather(cold, &ranked),
            t.gather(self.sd_temperature, &ranked),
        );
        let (matched, gap) = match self.matching {
            Matching::Rank => (heaviest(&own, self.k), None),
            Matching::Assignment => {
                let (matched, gap) = self.assignment(&s, shared, &own, &p)?;
                (matched, Some(gap))
            }
        };
        drop((own, mass));
        let mut terms = Terms::new(s, distilled, matched);
        let ce = terms.cross_entropy(&answer.tokens, weights[0]);
        let (had, sl) = terms.compare(hot, &p, weights[1], weights[2]);
        let sd = self.transport(&mut terms, &wide, weights[3])?;
        if let Some(gradient) = gradient {
            terms.write(hot, self.sd_temperature, &answer, student.width, gradient);
        }
        Ok(Evaluation {
            parts: vec![ce, had, sl, sd],
            notes: gap.map(|g| ("assignment_gap", g)).into_iter().collect(),
        })
    }

    /// The student's tokens of the cheapest assignment, and how much cheaper one over the whole vocabulary could be at
    /// most, over the first `tokens` tokens. `p` `[T, k]` is the teacher's.
    fn assignment<F: Scalar>(
        &self,
        s: &Rows<'_, F>,
        tokens: usize,
        own: &[F],
        p: &[F],
    ) -> Result<(Vec<usize>, f64)> {
        let k = self.k;
        let all = heaviest(own, (self.candidates + 1).min(own.len()));
        let candidates = &all[..self.candidates.min(own.len())];
        if tokens == 0 {
            return Ok((candidates[..k].to_vec(), 0.0));
        }
        let q = s.gather(self.student_temperature, candidates);
        let q = &q[..tokens * candidates.len()];
        let rows: Vec<F> = (0..k)
            .flat_map(|i| (0..tokens).map(move |t| p[t * k + i]))
            .collect();
        let mut cost = vec![F::zero(); k * candidates.len()];
        distances(&rows, q, tokens, &mut cost);
        let cost: Vec<f64> = cost.iter().map(|c| c.wide()).collect();
        let found = assign(&cost, k)?;
        // A token that was no candidate costs a row at least the difference of their masses.
        let outside = all.get(candidates.len()).map(|&j| own[j].wide());
        let gap = outside.map_or(0.0, |outside| {
            let compared = |i: usize| (0..tokens).map(|t| p[t * k + i].wide()).sum::<f64>();
            let saved = |i: usize| found.rows[i] - (compared(i) - outside).max(0.0);
            (0..k).map(|i| saved(i).max(0.0)).sum()
        });
        // Never more than there is to save.
        let gap = f64::min(gap, found.cost);
        Ok((found.columns.iter().map(|&j| candidates[j]).collect(), gap))
    }

    /// SD of the student's rows against the teacher's `[T, k]`.
    fn transport<F: Scalar>(&self, terms: &mut Terms<'_, F>, t: &[F], weight: f64) -> Result<f64> {
        let (k, n, m) = (self.k, t.len() / self.k, terms.distilled);
        if n == 0 || m == 0 {
            return Ok(0.0);
        }
        let s = terms.columns(self.sd_temperature);
        let mut cost = vec![F::zero(); n * m];
        distances(t, &s, k, &mut cost);
        let mass = n.min(m) as f64;
        let (a, b) = (
            vec![F::of(mass / n as f64); n],
            vec![F::of(mass / m as f64); m],
        );
        let problem = Problem {
            cost: &cost,
            a: &a,
            b: &b,
        };
        let (value, plan) = match self.sinkhorn {
            SinkhornForm::Fixed => value_and_gradient(&problem, self.epsilon, self.iterations)?,
            SinkhornForm::Converged => {
                let settings = Settings {
                    epsilon: self.epsilon,
                    stop: Stop::Error(1e3 * F::epsilon().wide() * mass, 100_000),
                    scaling: 0.5,
                };
                let found = sinkhorn(&problem, &settings)?;
                (found.regularized, found.plan)
            }
            SinkhornForm::Exact => {
                let found = exact(&problem)?;
                let plan = found.plan.iter().map(|&p| F::of(p)).collect();
                (F::of(found.cost), plan)
            }
        };
        let mut upstream = vec![F::zero(); k * m];
        distances_gradient(t, &s, k, &plan, &mut upstream);
        terms.through_sd(&s, &upstream, self.sd_temperature, weight);
        Ok(value.wide())
    }
}

/// The gradient of one sequence's terms with respect to the student's logits, as what is dense (a factor for each row and
/// temperature) and what is not (a value for each row and matched token).
struct Terms<'a, F> {
    rows: Rows<'a, F>,
    /// How many of the rows, the first, are distilled.
    distilled: usize,
    matched: Vec<usize>,
    /// Factor of the probabilities at temperature 1.
    ce: F,
    /// Factors of those in `had` and `sl`, `[T]`, and what is added to matched tokens `[T, k]`.
    dense: Vec<F>,
    sparse: Vec<F>,
    /// The same of those in `sd`.
    dense_sd: Vec<F>,
    sparse_sd: Vec<F>,
}

impl<'a, F: Scalar> Terms<'a, F> {
    fn new(rows: Rows<'a, F>, distilled: usize, matched: Vec<usize>) -> Self {
        let (n, k, zero) = (rows.len(), matched.len(), F::zero());
        Self {
            rows,
            distilled,
            matched,
            ce: zero,
            dense: vec![zero; n],
            sparse: vec![zero; n * k],
            dense_sd: vec![zero; n],
            sparse_sd: vec![zero; n * k],
        }
    }

    fn cross_entropy(&mut self, tokens: &[usize], weight: f64) -> f64 {
        self.ce = F::of(weight);
        let rows = tokens.iter().enumerate();
        rows.map(|(row, &y)| -self.rows.log_probability(row, 1.0, y).wide())
            .sum()
    }

    /// HAD and SL against the teacher's `p` `[T, k]`, of the rows that both have.
    fn compare(
        &mut self,
        temperature: f64,
        p: &[F],
        had_weight: f64,
        sl_weight: f64,
    ) -> (f64, f64) {
        let k = self.matched.len();
        let (had_weight, sl_weight) = (F::of(had_weight), F::of(sl_weight));
        let slope = F::one() / F::of(temperature);
        let (mut had, mut sl) = (0.0, 0.0);
        for (row, p) in p.chunks_exact(k).enumerate().take(self.distilled) {
            for (i, (&p, &j)) in p.iter().zip(&self.matched).enumerate() {
                let log = self.rows.log_probability(row, temperature, j);
                let q = self.rows.probability(row, temperature, j);
                had += (p - q).abs().wide();
                // No probability costs nothing where none is expected.
                sl -= if p > F::zero() { (p * log).wide() } else { 0.0 };
                let sign = match q.partial_cmp(&p) {
                    Some(std::cmp::Ordering::Greater) => F::one(),
                    Some(std::cmp::Ordering::Less) => -F::one(),
                    _ => F::zero(),
                };
                let (had, sl) = (had_weight * sign * q, sl_weight * p);
                self.sparse[row * k + i] = (had - sl) * slope;
                self.dense[row] = self.dense[row] + (sl - had) * slope;
            }
        }
        (had, sl)
    }

    /// Probabilities of matched tokens, `[k, T]`.
    fn columns(&self, temperature: f64) -> Vec<F> {
        let n = self.distilled;
        let of = |&j: &usize| (0..n).map(move |row| self.rows.probability(row, temperature, j));
        self.matched.iter().flat_map(of).collect()
    }

    /// Carries a gradient with respect to `s` `[k, T]` on to the logits.
    fn through_sd(&mut self, s: &[F], upstream: &[F], temperature: f64, weight: f64) {
        let (n, k) = (self.distilled, self.matched.len());
        let slope = F::of(weight / temperature);
        for row in 0..n {
            for i in 0..k {
                let through = slope * s[i * n + row] * upstream[i * n + row];
                self.sparse_sd[row * k + i] = through;
                self.dense_sd[row] = self.dense_sd[row] - through;
            }
        }
    }

    fn write(
        &self,
        temperature: f64,
        sd_temperature: f64,
        answer: &crate::answer::Answer,
        width: usize,
        gradient: &mut [F],
    ) {
        let k = self.matched.len();
        for (row, (&at, &token)) in answer.rows.iter().zip(&answer.tokens).enumerate() {
            let out = &mut gradient[at * width..][..self.rows.x[row].len()];
            let factors = [
                (1.0, self.ce),
                (temperature, self.dense[row]),
                (sd_temperature, self.dense_sd[row]),
            ];
            self.rows.combine(row, &factors, false, out);
            out[token] = out[token] - self.ce;
            for (i, &j) in self.matched.iter().enumerate() {
                out[j] = out[j] + self.sparse[row * k + i] + self.sparse_sd[row * k + i];
            }
        }
    }
}

impl Objective for MultiLevelOt {
    fn parts(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("ce", 1.0),
            ("had", self.alpha),
            ("sl", self.alpha * self.beta),
            ("sd", self.alpha * self.gamma),
        ]
    }

    fn evaluate<F: Scalar>(
        &self,
        pair: &Pair<'_, F>,
        weights: &[f64],
        gradient: Option<&mut [F]>,
    ) -> Result<Evaluation> {
        self.check()?;
        match self.mode {
            Mode::ReferenceCode => reference_code::evaluate(self, pair, weights, gradient),
            Mode::Paper => mean_of_sequences(pair, gradient, |b, share, gradient| {
                let weights: Vec<f64> = weights.iter().map(|w| w * share).collect();
                self.sequence(pair, b, &weights, gradient)
            }),
        }
    }
}

aligner!(MultiLevelOt, offsets: false);

/// Settings as they stand in a file: those left out are the mode's own.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Given {
    mode: Mode,
    k: Option<usize>,
    alpha: Option<f64>,
    /// The released code's name for `alpha`.
    distillation_weight: Option<f64>,
    beta: Option<f64>,
    gamma: Option<f64>,
    epsilon: Option<f64>,
    iterations: Option<usize>,
    student_temperature: Option<f64>,
    teacher_temperature: Option<f64>,
    sd_temperature: Option<f64>,
    matching: Option<Matching>,
    candidates: Option<usize>,
    sinkhorn: Option<SinkhornForm>,
    skip_student_eos: Option<bool>,
    skip_teacher_eos: Option<bool>,
}

impl TryFrom<Given> for MultiLevelOt {
    type Error = Error;

    fn try_from(g: Given) -> Result<Self> {
        let own = match g.mode {
            Mode::Paper => Self::paper(),
            Mode::ReferenceCode => Self::reference_code(),
        };
        if g.alpha.is_some() && g.distillation_weight.is_some_and(|w| Some(w) != g.alpha) {
            return Err(Error::Invalid(
                "alpha and distillation_weight are the same and differ".into(),
            ));
        }
        let settings = Self {
            mode: g.mode,
            k: g.k.unwrap_or(own.k),
            alpha: g.alpha.or(g.distillation_weight).unwrap_or(own.alpha),
            beta: g.beta.unwrap_or(own.beta),
            gamma: g.gamma.unwrap_or(own.gamma),
            epsilon: g.epsilon.unwrap_or(own.epsilon),
            iterations: g.iterations.unwrap_or(own.iterations),
            student_temperature: g.student_temperature.unwrap_or(own.student_temperature),
            teacher_temperature: g.teacher_temperature.unwrap_or(own.teacher_temperature),
            sd_temperature: g.sd_temperature.unwrap_or(own.sd_temperature),
            matching: g.matching.unwrap_or(own.matching),
            candidates: g
                .candidates
                .unwrap_or(own.candidates.max(4 * g.k.unwrap_or(own.k))),
            sinkhorn: g.sinkhorn.unwrap_or(own.sinkhorn),
            skip_student_eos: g.skip_student_eos.unwrap_or(own.skip_student_eos),
            skip_teacher_eos: g.skip_teacher_eos.unwrap_or(own.skip_teacher_eos),
        };
        settings.check()?;
        Ok(settings)
    }
}
