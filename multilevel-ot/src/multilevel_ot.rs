//! Multi-Level Optimal Transport by the published formulas.

use scylla_core::kernels::softmax::{distances, distances_gradient};

use crate::answer::Pair;
use crate::loss::{Evaluation, Objective, aligner, mean_of_sequences};
use crate::matching::assign;
use crate::parallel::{by_row, threads};
use crate::reference_code;
use crate::rows::Rows;
use crate::settings::{Matching, Mode, MultiLevelOt, SinkhornForm};
use crate::top::heaviest;
use crate::transport::{Problem, Settings, Stop, exact, sinkhorn, value_and_gradient};
use crate::{Error, Result, Scalar};

impl MultiLevelOt {
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
            let threads = threads(student.batch, answer.rows.len() * student.vocab);
            let shape = (student.width, threads);
            terms.write(hot, self.sd_temperature, &answer, shape, gradient);
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
        // What has no weight is not computed: over all tokens it would take longer than all else.
        if n == 0 || m == 0 || weight == 0.0 {
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
        (width, threads): (usize, usize),
        gradient: &mut [F],
    ) {
        let k = self.matched.len();
        let of_row = |(): &mut (), row: usize, out: Option<&mut [F]>| {
            let Some(out) = out else { return };
            let (out, token) = (&mut out[..self.rows.x[row].len()], answer.tokens[row]);
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
        };
        let rows = &answer.rows[..answer.tokens.len()];
        by_row(rows, width, Some(gradient), threads, || (), of_row);
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

aligner!(MultiLevelOt, offsets: false, |own, needs| {
    // It ranks over a batch, and divides rows by the deviation of all they hold.
    needs.whole_batch = own.mode == Mode::ReferenceCode;
    needs.whole_rows = own.mode == Mode::ReferenceCode;
});
