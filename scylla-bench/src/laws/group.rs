//! A group of runs, every form that they tell, and the one that is chosen.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::fit::{Band, Fit, Query, Variable};
use super::form::{At, Axis, Form, Model};
use super::points::{Measure, OFFERED, Point};
use super::solve::{Runs, Solution, Solver};

/// Forms whose AICc is within this of the least are held to be as good; among them the error on the largest runs decides.
const AS_GOOD: f64 = 2.0;
/// Resamples of the prompts, and draws in all.
const RESAMPLES: usize = 200;
const DRAWS: usize = 4000;

/// A form of a group, ready to be asked.
pub(super) struct Candidate {
    pub(super) model: Model,
    pub(super) solution: Solution,
    pub(super) aicc: Option<f64>,
    pub(super) heldout_error: Option<f64>,
    /// On the largest runs, which the form is chosen by: never on those marked, which are to be predicted.
    pub(super) largest_error: Option<f64>,
    pub(super) r2: f64,
}

/// Runs that a law is fitted to.
pub(super) struct Group {
    pub(super) family: String,
    pub(super) variable: Variable,
    pub(super) measure: Measure,
    pub(super) layers: Option<usize>,
    pub(super) tokens: Option<f64>,
    pub(super) families: Vec<String>,
    /// Indices of the runs.
    pub(super) members: Vec<usize>,
    pub(super) at: Vec<At>,
    pub(super) trunk: Vec<usize>,
    pub(super) y: Vec<f64>,
    pub(super) candidates: Vec<Candidate>,
    pub(super) chosen: usize,
}

/// Values, each once, ascending.
pub(super) fn distinct(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all.dedup();
    all
}

fn axis(levels: usize) -> Axis {
    match levels {
        0 | 1 => Axis::Absent,
        2 => Axis::Line,
        _ => Axis::Curve,
    }
}
impl Group {
    /// The group of some runs, with every form that they can tell; `None` where nothing varies, or too few runs are there.
    pub(super) fn new(
        points: &[Point],
        members: Vec<usize>,
        (family, variable, measure): (&str, Variable, Measure),
        held: &[usize],
    ) -> Option<Self> {
        let measured = |&i: &usize| Some((i, points[i].measured(measure, OFFERED, |_| 1.0)?));
        let (members, y): (Vec<usize>, Vec<f64>) = members.iter().filter_map(measured).unzip();
        let first = points.get(*members.first()?)?;
        let families: BTreeSet<&str> = members.iter().map(|&i| &*points[i].family).collect();
        let families: Vec<String> = families.into_iter().map(String::from).collect();
        let at = places(points, &members, &families);
        let trunk = trunks(points, &members);
        let mut group = Self {
            family: family.into(),
            variable,
            measure,
            layers: (variable == Variable::Tokens).then_some(first.layers),
            tokens: (variable == Variable::Layers).then_some(first.tokens),
            families,
            members,
            at,
            trunk,
            y,
            candidates: Vec::new(),
            chosen: 0,
        };
        let tokens = distinct(group.at.iter().map(|at| at.tokens));
        let layers = distinct(group.at.iter().map(|at| at.layers));
        let axes = match variable {
            Variable::Tokens => [axis(tokens.len()), Axis::Absent],
            Variable::Layers => [Axis::Absent, axis(layers.len())],
            Variable::Joint => [axis(tokens.len()), axis(layers.len())],
        };
        let forms = [Form::Log, Form::Saturating, Form::Power, Form::Interaction];
        let logs: f64 = group.at.iter().map(|at| at.tokens.ln()).sum();
        for form in forms {
            let both = axes.iter().all(|&a| a != Axis::Absent);
            let bends = axes.contains(&Axis::Curve);
            match form {
                Form::Interaction if !both => continue,
                Form::Saturating if !bends => continue,
                _ if axes == [Axis::Absent; 2] => continue,
                _ => {}
            }
            let model = Model {
                form,
                families: group.families.clone(),
                tokens: axes[0],
                layers: axes[1],
                middle: (logs / group.at.len() as f64).exp(),
            };
            let candidate = group.candidate(model, points, held);
            group.candidates.extend(candidate);
        }
        group.chosen = group.choose()?;
        Some(group)
    }

    fn candidate(&self, model: Model, points: &[Point], held: &[usize]) -> Option<Candidate> {
        let solver = self.solver(&model)?;
        let solution = solver.best(&self.y)?;
        let (n, k) = (self.y.len() as f64, solver.freedom() as f64);
        let correction = 2.0 * k * (k + 1.0) / (n - k - 1.0);
        let aicc =
            (n > k + 1.0).then(|| solver.deviance(&solution, &self.y) + 2.0 * k + correction);
        let mean = self.y.iter().sum::<f64>() / n;
        let value = |&at: &At| value(&model, &solution, at);
        let left = self
            .at
            .iter()
            .zip(&self.y)
            .map(|(at, y)| (y - value(at)).powi(2));
        let all = self.y.iter().map(|y| (y - mean).powi(2));
        let (left, all): (f64, f64) = (left.sum(), all.sum());
        let r2 = match all > 0.0 {
            true => 1.0 - left / all,
            false => 1.0,
        };
        let largest = self.largest_error(&model);
        let marked = self.marked_error(&model, &solution, points, held);
        Some(Candidate {
            model,
            solution,
            aicc,
            heldout_error: marked.or(largest),
            largest_error: largest,
            r2,
        })
    }

    fn solver<'a>(&'a self, model: &'a Model) -> Option<Solver<'a>> {
        let runs = Runs {
            at: &self.at,
            trunk: &self.trunk,
        };
        Solver::new(model, runs)
    }

    /// On the runs that were held out.
    fn marked_error(
        &self,
        model: &Model,
        solution: &Solution,
        points: &[Point],
        held: &[usize],
    ) -> Option<f64> {
        let known: Vec<usize> = held
            .iter()
            .copied()
            .filter(|&i| self.families.contains(&points[i].family))
            .filter(|&i| self.layers.is_none_or(|layers| layers == points[i].layers))
            .filter(|&i| self.tokens.is_none_or(|tokens| tokens == points[i].tokens))
            .collect();
        let at = places(points, &known, &self.families);
        let errors = known.iter().zip(at).filter_map(|(&i, at)| {
            let found = points[i].measured(self.measure, OFFERED, |_| 1.0)?;
            Some((value(model, solution, at) - found).abs())
        });
        mean(&errors.collect::<Vec<f64>>())
    }

    /// On the largest runs of each family, by a fit to the others.
    fn largest_error(&self, model: &Model) -> Option<f64> {
        let size = |at: &At| match self.variable {
            Variable::Layers => at.layers,
            _ => at.tokens,
        };
        // Those with most, where a family has others.
        let largest = |one: &At| {
            let own = self.at.iter().filter(|at| at.family == one.family);
            let (least, most) = own
                .map(size)
                .fold((f64::INFINITY, 0.0), |(least, most), s| {
                    (f64::min(least, s), f64::max(most, s))
                });
            size(one) >= most && least < most
        };
        let (mut at, mut trunk, mut y) = (Vec::new(), Vec::new(), Vec::new());
        for (i, one) in self.at.iter().enumerate().filter(|(_, at)| !largest(at)) {
            at.push(*one);
            trunk.push(self.trunk[i]);
            y.push(self.y[i]);
        }
        let runs = Runs {
            at: &at,
            trunk: &trunk,
        };
        let solution = Solver::new(model, runs)?.best(&y)?;
        let largest = self.at.iter().zip(&self.y).filter(|(at, _)| largest(at));
        let errors: Vec<f64> = largest
            .map(|(at, y)| (value(model, &solution, *at) - y).abs())
            .collect();
        mean(&errors)
    }

    fn choose(&self) -> Option<usize> {
        let least = self.candidates.iter().filter_map(|c| c.aicc);
        let least = least.fold(f64::INFINITY, f64::min);
        let good = |c: &Candidate| match c.aicc {
            Some(aicc) => aicc <= least + AS_GOOD,
            None => least.is_infinite(),
        };
        let error = |c: &Candidate| c.largest_error.unwrap_or(f64::INFINITY);
        let order = |a: &Candidate, b: &Candidate| {
            let aicc = |c: &Candidate| c.aicc.unwrap_or(f64::INFINITY);
            error(a)
                .total_cmp(&error(b))
                .then(aicc(a).total_cmp(&aicc(b)))
        };
        let all = self.candidates.iter().enumerate();
        all.filter(|(_, c)| good(c))
            .min_by(|(_, a), (_, b)| order(a, b))
            .map(|(i, _)| i)
    }

    /// How much each form is believed: Akaike's weights; where none has a criterion, the chosen one's alone.
    fn weights(&self) -> Vec<f64> {
        let least = self.candidates.iter().filter_map(|c| c.aicc);
        let least = least.fold(f64::INFINITY, f64::min);
        let weight = |(i, c): (usize, &Candidate)| match c.aicc {
            Some(aicc) => (-0.5 * (aicc - least)).exp(),
            None => f64::from(u8::from(least.is_infinite() && i == self.chosen)),
        };
        let all: Vec<f64> = self.candidates.iter().enumerate().map(weight).collect();
        let sum: f64 = all.iter().sum();
        all.into_iter().map(|w| w / sum).collect()
    }

    /// Degrees of freedom that the chosen form leaves.
    pub(super) fn degrees(&self) -> usize {
        let model = &self.candidates[self.chosen].model;
        self.y
            .len()
            .saturating_sub(model.width() + model.grids().len())
    }

    /// Whether it has runs of the family, and tokens and layers vary among its runs, or are those asked for.
    pub(super) fn tells(&self, query: &Query) -> bool {
        let model = &self.candidates[self.chosen].model;
        let Some(asked) = self.place(query) else {
            return false;
        };
        let known = |axis: Axis, of: fn(&At) -> f64| {
            axis != Axis::Absent || self.at.iter().any(|at| of(at) == of(&asked))
        };
        known(model.tokens, |at| at.tokens) && known(model.layers, |at| at.layers)
    }

    pub(super) fn place(&self, query: &Query) -> Option<At> {
        Some(At {
            family: self.families.iter().position(|f| *f == query.family)?,
            tokens: query.tokens,
            layers: query.layers as f64,
        })
    }

    /// The measures of all runs over resamples of the prompts; of runs without prompts once.
    fn resamples(&self, points: &[Point], rng: &mut StdRng) -> Vec<Vec<f64>> {
        let members = || self.members.iter().map(|&i| &points[i]);
        let ids: BTreeSet<&str> = members()
            .flat_map(|p| p.prompts.iter().map(|p| &*p.id))
            .collect();
        let ids: Vec<&str> = ids.into_iter().collect();
        if ids.is_empty() {
            return vec![self.y.clone()];
        }
        let mut samples = Vec::with_capacity(RESAMPLES);
        for _ in 0..RESAMPLES {
            let mut times: BTreeMap<&str, f64> = BTreeMap::new();
            for _ in 0..ids.len() {
                *times
                    .entry(ids[rng.random_range(0..ids.len())])
                    .or_default() += 1.0;
            }
            let weight = |id: &str| times.get(id).copied().unwrap_or(0.0);
            let y: Option<Vec<f64>> = members()
                .map(|p| p.measured(self.measure, 0.0, weight))
                .collect();
            samples.extend(y);
        }
        samples
    }

    /// The chosen form's value, and the middle 90 % of draws from all forms, over resamples of the prompts.
    pub(super) fn band(&self, points: &[Point], query: &Query) -> Option<Band> {
        let at = self.place(query)?;
        let chosen = &self.candidates[self.chosen];
        let value = value(&chosen.model, &chosen.solution, at);
        let mut rng = StdRng::seed_from_u64(0);
        let samples = self.resamples(points, &mut rng);
        let mut drawn = Vec::with_capacity(DRAWS);
        for (candidate, weight) in self.candidates.iter().zip(self.weights()) {
            let each = (weight * DRAWS as f64 / samples.len().max(1) as f64).round() as usize;
            if each == 0 {
                continue;
            }
            let model = &candidate.model;
            let solver = self.solver(model)?;
            for y in &samples {
                solver.draw(y, each, &mut rng, &mut |beta, exponents, own| {
                    let row = model.row(at, exponents);
                    let law: f64 = row.iter().zip(beta).map(|(x, b)| x * b).sum();
                    drawn.push(law + own);
                });
            }
        }
        let (low, high) = middle(&mut drawn)?;
        // What cannot be is no part of it.
        let (least, most) = match self.measure {
            Measure::Tau => (1.0, f64::INFINITY),
            Measure::Alpha(_) => (0.0, 1.0),
        };
        let value = value.clamp(least, most);
        Some(Band {
            value,
            low: low.clamp(least, most).min(value),
            high: high.clamp(least, most).max(value),
        })
    }

    /// What holds each coefficient of a form with 90 % confidence.
    fn intervals(&self, points: &[Point], model: &Model) -> BTreeMap<String, [f64; 2]> {
        let mut rng = StdRng::seed_from_u64(0);
        let samples = self.resamples(points, &mut rng);
        let mut all: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        if let Some(solver) = self.solver(model) {
            for y in &samples {
                let each = DRAWS / samples.len();
                solver.draw(y, each, &mut rng, &mut |beta, exponents, _| {
                    for (name, value) in model.parameters(beta, exponents) {
                        all.entry(name).or_default().push(value);
                    }
                });
            }
        }
        let ends = |(name, mut drawn): (String, Vec<f64>)| {
            let (low, high) = middle(&mut drawn)?;
            Some((name, [low, high]))
        };
        all.into_iter().filter_map(ends).collect()
    }

    pub(super) fn fits<'a>(&'a self, points: &'a [Point]) -> impl Iterator<Item = Fit> + 'a {
        let trunks = self.trunk.iter().max().map_or(0, |last| last + 1);
        self.candidates.iter().enumerate().map(move |(i, c)| {
            let free = c.model.width() + c.model.grids().len();
            let degrees = self.y.len().saturating_sub(free).max(1) as f64;
            let variance = c.solution.rss / degrees;
            let share = |share: f64| (variance * share).sqrt();
            Fit {
                family: self.family.clone(),
                variable: self.variable,
                layers: self.layers,
                tokens: self.tokens,
                measure: self.measure.to_string(),
                form: c.model.form.to_string(),
                parameters: c.model.parameters(&c.solution.beta, &c.solution.exponents),
                intervals: match (c.model.form, self.measure) {
                    (Form::Log, Measure::Tau) => self.intervals(points, &c.model),
                    _ => BTreeMap::new(),
                },
                r2: c.r2,
                aicc: c.aicc,
                heldout_error: c.heldout_error,
                deviation: [share(c.solution.rho), share(1.0 - c.solution.rho)],
                runs: self.y.len(),
                trunks,
                chosen: i == self.chosen,
            }
        })
    }
}

/// The middle 90 % of values.
fn middle(values: &mut Vec<f64>) -> Option<(f64, f64)> {
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    let end = |share| crate::stats::quantile(values, share);
    Some((end(0.05)?, end(0.95)?))
}

pub(super) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

pub(super) fn value(model: &Model, solution: &Solution, at: At) -> f64 {
    let row = model.row(at, &solution.exponents);
    row.iter().zip(&solution.beta).map(|(x, b)| x * b).sum()
}

fn places(points: &[Point], members: &[usize], families: &[String]) -> Vec<At> {
    let place = |&i: &usize| {
        let family = families.iter().position(|f| *f == points[i].family);
        At {
            family: family.unwrap_or(0),
            tokens: points[i].tokens,
            layers: points[i].layers as f64,
        }
    };
    members.iter().map(place).collect()
}

/// The trunk of each run: runs of a family, depth and seed share one.
fn trunks(points: &[Point], members: &[usize]) -> Vec<usize> {
    let key = |&i: &usize| (&points[i].family, points[i].layers, points[i].seed);
    let keys: BTreeSet<_> = members.iter().map(key).collect();
    let number: BTreeMap<_, usize> = keys.into_iter().zip(0..).collect();
    members.iter().map(|i| number[&key(i)]).collect()
}
