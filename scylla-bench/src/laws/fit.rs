//! Laws of runs, and predictions.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::form::At;
use super::group::{Group, distinct, mean, value};
use super::points::{Measure, Point};
use crate::{Error, Result};

/// What a law's value varies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Variable {
    /// A(T), at one D.
    Tokens,
    /// A(D), at one T.
    Layers,
    /// A(T, D).
    Joint,
}

/// The name of a fit over all families.
pub const ALL: &str = "all";
/// Runs at most: each is solved for at every point of a grid.
const MOST: usize = 2000;
/// Degrees of freedom with which a family's own law is preferred to one over all families.
const ENOUGH: usize = 3;

/// A form fitted to a group of runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// The recipe, or `all`.
    pub family: String,
    /// What varies.
    pub variable: Variable,
    /// D, where tokens vary alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// T, where layers vary alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
    /// What is measured: `tau`, or `alpha_1` and so on.
    pub measure: String,
    /// The form.
    pub form: String,
    /// Its coefficients, with tokens and layers counted singly.
    pub parameters: BTreeMap<String, f64>,
    /// Of the logarithmic form of tau, what holds each with 90 % confidence, over prompts and trunks.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub intervals: BTreeMap<String, [f64; 2]>,
    /// Share of the variance that it explains, of the runs as they are.
    pub r2: f64,
    /// Akaike's criterion for small samples; `None` where runs are too few for it.
    pub aicc: Option<f64>,
    /// Mean absolute error on the runs that were held out: those marked so, or else each family's with most tokens (or layers).
    pub heldout_error: Option<f64>,
    /// Standard deviation of what trunks have of their own, and of the rest.
    pub deviation: [f64; 2],
    /// Runs and trunks that it was fitted to.
    pub runs: usize,
    /// See above.
    pub trunks: usize,
    /// Whether it was chosen among the forms of its group.
    pub chosen: bool,
}

/// A run that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    /// The recipe.
    pub family: String,
    /// D.
    pub layers: usize,
    /// T.
    pub tokens: f64,
}

/// A value and the band that holds what a new run would have, with 90 % confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Band {
    /// By the chosen form.
    pub value: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl Band {
    /// A value that is certain.
    pub fn exactly(value: f64) -> Self {
        Self {
            value,
            low: value,
            high: value,
        }
    }
}

/// What a run would have.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// The recipe.
    pub family: String,
    /// D.
    pub layers: usize,
    /// T.
    pub tokens: f64,
    /// Mean tokens a cycle.
    pub tau: f64,
    /// The band's lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// Acceptance by depth, where the runs tell it.
    pub alpha: Vec<Band>,
    /// The law that says so: family, what varies, form.
    pub law: (String, Variable, String),
    /// What each form of that law says.
    pub forms: BTreeMap<String, f64>,
    /// Tokens over the most, and layers over the most (or the fewest over them), that the law was fitted to; 1 within.
    pub beyond: [f64; 2],
}

/// A run that was held out, and what was said of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Held {
    /// What was said.
    #[serde(flatten)]
    pub said: Prediction,
    /// Its seed.
    pub seed: u64,
    /// What it has.
    pub found: f64,
    /// The value of as many tokens, or the most below them, that was seen of the family at the depth nearest to the one asked for.
    pub last_value: f64,
    /// The mean of the family's runs.
    pub mean: f64,
}

/// How predictions of held-out runs fare, beside two that need no law.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// Runs.
    pub runs: usize,
    /// Mean absolute error of the predictions.
    pub error: f64,
    /// Of the last value seen.
    pub last_value: f64,
    /// Of the mean of the family's runs.
    pub mean: f64,
    /// Share of the runs inside their band.
    pub inside: f64,
    /// Mean half-width of the bands.
    pub half_width: f64,
}

/// Laws of some runs.
pub struct Laws {
    points: Vec<Point>,
    groups: Vec<Group>,
}

impl Laws {
    /// Fits every law that the runs can tell: A(T) for each family and depth with three budgets, A(D) for each family and budget
    /// with three depths, A(T, D) for each family, and over all families with a level each; the last two also of acceptance by
    /// depth.
    ///
    /// # Errors
    /// If no law can be told from the runs.
    pub fn fit(points: Vec<Point>) -> Result<Self> {
        if points.len() > MOST {
            return Err(Error::Experiment(format!(
                "{} runs; laws are fitted to {MOST} at most, so fit a family at a time",
                points.len()
            )));
        }
        let (held, kept): (Vec<usize>, Vec<usize>) =
            (0..points.len()).partition(|&i| points[i].holdout);
        let families: BTreeSet<String> = kept.iter().map(|&i| points[i].family.clone()).collect();
        let depths = kept.iter().map(|&i| points[i].depths()).max().unwrap_or(0);
        let measures = std::iter::once(Measure::Tau).chain((1..=depths).map(Measure::Alpha));
        let measures: Vec<Measure> = measures.collect();
        let mut groups = Vec::new();
        for family in &families {
            let of = |i: &&usize| points[**i].family == *family;
            let own: Vec<usize> = kept.iter().filter(of).copied().collect();
            for layers in distinct(own.iter().map(|&i| points[i].layers as f64)) {
                let of = |i: &&usize| points[**i].layers as f64 == layers;
                let members: Vec<usize> = own.iter().filter(of).copied().collect();
                if distinct(members.iter().map(|&i| points[i].tokens)).len() > 2 {
                    let key = (&**family, Variable::Tokens, Measure::Tau);
                    groups.extend(Group::new(&points, members, key, &held));
                }
            }
            for tokens in distinct(own.iter().map(|&i| points[i].tokens)) {
                let of = |i: &&usize| points[**i].tokens == tokens;
                let members: Vec<usize> = own.iter().filter(of).copied().collect();
                if distinct(members.iter().map(|&i| points[i].layers as f64)).len() > 2 {
                    let key = (&**family, Variable::Layers, Measure::Tau);
                    groups.extend(Group::new(&points, members, key, &held));
                }
            }
            for &measure in &measures {
                let key = (&**family, Variable::Joint, measure);
                groups.extend(Group::new(&points, own.clone(), key, &held));
            }
        }
        if families.len() > 1 {
            for &measure in &measures {
                let key = (ALL, Variable::Joint, measure);
                groups.extend(Group::new(&points, kept.clone(), key, &held));
            }
        }
        if groups.is_empty() {
            return Err(Error::Experiment(format!(
                "{} runs tell no law: at least three token budgets (or depths) of one family are needed",
                kept.len()
            )));
        }
        Ok(Self { points, groups })
    }

    /// All fits, group by group.
    pub fn fits(&self) -> Vec<Fit> {
        let of = |group| Group::fits(group, &self.points);
        self.groups.iter().flat_map(of).collect()
    }

    /// The runs that they were fitted to, and those held out.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The law that knows most of a family: its own over tokens and layers where that leaves freedom enough, else the one over
    /// all families; of those that tell the depth and tokens asked for.
    fn law(&self, query: &Query, measure: Measure) -> Option<&Group> {
        let joint = |family: &str| {
            self.groups.iter().find(|g| {
                let same = g.family == family && g.variable == Variable::Joint;
                same && g.measure == measure && g.tells(query)
            })
        };
        let own = joint(&query.family);
        match own {
            Some(own) if own.degrees() >= ENOUGH => Some(own),
            _ => joint(ALL).or(own),
        }
    }

    /// What a run would have, with its band.
    ///
    /// # Errors
    /// If no law tells it.
    pub fn predict(&self, query: &Query) -> Result<Prediction> {
        let none = || {
            let known: BTreeSet<&str> = self.points.iter().map(|p| &*p.family).collect();
            let known: Vec<&str> = known.into_iter().collect();
            Error::Experiment(format!(
                "no law tells {} with {} layers and {} tokens: runs are of {}, and a law needs more of them than it has \
                 coefficients, and depths or budgets that vary, to tell of others",
                query.family,
                query.layers,
                query.tokens,
                known.join(", ")
            ))
        };
        let law = self.law(query, Measure::Tau).ok_or_else(none)?;
        let at = law.place(query).ok_or_else(none)?;
        let chosen = &law.candidates[law.chosen];
        let band = law.band(&self.points, query).ok_or_else(none)?;
        let depths = (1..).map_while(|depth| {
            let law = self.law(query, Measure::Alpha(depth))?;
            law.band(&self.points, query)
        });
        let ratio = |value: f64, all: &dyn Fn(&At) -> f64| {
            let values = || law.at.iter().map(all);
            let most = values().fold(0.0, f64::max);
            let least = values().fold(f64::INFINITY, f64::min);
            (value / most).max(least / value).max(1.0)
        };
        Ok(Prediction {
            family: query.family.clone(),
            layers: query.layers,
            tokens: query.tokens,
            tau: band.value,
            low: band.low,
            high: band.high,
            alpha: depths.collect(),
            law: (
                law.family.clone(),
                law.variable,
                chosen.model.form.to_string(),
            ),
            forms: law
                .candidates
                .iter()
                .map(|c| (c.model.form.to_string(), value(&c.model, &c.solution, at)))
                .collect(),
            beyond: [
                ratio(at.tokens, &|at| at.tokens),
                ratio(at.layers, &|at| at.layers),
            ],
        })
    }

    /// How the predictions of held-out runs fare; `None` without one.
    pub fn score(&self, held: &[Held]) -> Option<Score> {
        let scored = |one: &Held| {
            let off = |value: f64| (value - one.found).abs();
            let inside = (one.said.low..=one.said.high).contains(&one.found);
            [
                off(one.said.tau),
                off(one.last_value),
                off(one.mean),
                f64::from(u8::from(inside)),
                (one.said.high - one.said.low) / 2.0,
            ]
        };
        let rows: Vec<[f64; 5]> = held.iter().map(scored).collect();
        let column = |i: usize| mean(&rows.iter().map(|row| row[i]).collect::<Vec<f64>>());
        Some(Score {
            runs: rows.len(),
            error: column(0)?,
            last_value: column(1)?,
            mean: column(2)?,
            inside: column(3)?,
            half_width: column(4)?,
        })
    }

    /// What may be said of a run without a law: the last value seen, and the mean; `None` without a run of its family.
    fn naive(&self, query: &Query) -> Option<(f64, f64)> {
        let kept = self.points.iter().filter(|p| !p.holdout);
        let own: Vec<&Point> = kept.filter(|p| p.family == query.family).collect();
        let far = |p: &&&Point| p.layers.abs_diff(query.layers);
        let near = own.iter().map(|p| far(&p)).min()?;
        let near: Vec<&&Point> = own.iter().filter(|p| far(p) == near).collect();
        // As many tokens as are asked for, or the most below that; where all runs have more, the fewest.
        let below = near.iter().map(|p| p.tokens).filter(|&t| t <= query.tokens);
        let fewest = near.iter().map(|p| p.tokens).fold(f64::INFINITY, f64::min);
        let most = below.fold(0.0, f64::max).max(fewest);
        let last = near.iter().filter(|p| p.tokens == most).map(|p| p.tau);
        let all: Vec<f64> = own.iter().map(|p| p.tau).collect();
        Some((mean(&last.collect::<Vec<f64>>())?, mean(&all)?))
    }

    /// What is said of the runs that were held out; those that no law tells are left out.
    pub fn held(&self) -> Vec<Held> {
        let held = self.points.iter().filter(|p| p.holdout);
        held.filter_map(|p| {
            let query = Query {
                family: p.family.clone(),
                layers: p.layers,
                tokens: p.tokens,
            };
            let (last_value, mean) = self.naive(&query)?;
            Some(Held {
                said: self.predict(&query).ok()?,
                seed: p.seed,
                found: p.tau,
                last_value,
                mean,
            })
        })
        .collect()
    }
}
