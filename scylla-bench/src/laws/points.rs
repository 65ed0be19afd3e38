//! Runs as points of a law: from folders of sweeps, from lines of summaries, and from CSV.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use scylla_core::files::read_text;
use serde::{Deserialize, Serialize};

use crate::rows::{at_line, rows};
use crate::sweep::{SUMMARY, Summary, gather};
use crate::{Error, Result};

/// A run of training: what it was given, and what its draft is worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The recipe.
    pub family: String,
    /// D.
    pub layers: usize,
    /// T: tokens trained on.
    pub tokens: f64,
    /// Seed. Runs of one family, depth and seed share a trunk: what they differ by from a law is not independent.
    pub seed: u64,
    /// Mean tokens a cycle, bonus included.
    pub tau: f64,
    /// The prompts that it is the mean over; empty where they are not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<Counted>,
    /// Whether it is kept from fits, to be predicted by them.
    #[serde(default, skip_serializing_if = "is_false")]
    pub holdout: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A prompt of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counted {
    /// Its id.
    pub id: String,
    /// Tokens committed in cycles.
    pub tokens: f64,
    /// Cycles.
    pub cycles: f64,
    /// Acceptance by depth given the depth above.
    pub alpha: Vec<Option<f64>>,
}

/// What a law is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Mean tokens a cycle.
    Tau,
    /// Acceptance at a depth (1 is the first below the root) given the depth above.
    Alpha(usize),
}

impl std::fmt::Display for Measure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tau => write!(f, "tau"),
            Self::Alpha(depth) => write!(f, "alpha_{depth}"),
        }
    }
}

/// Nodes offered at a depth, below which their rate tells nothing.
pub(super) const OFFERED: f64 = 20.0;

impl Point {
    /// A measure over its prompts, each so often as `weight` says; tau as it is where they are not known. `None` of acceptance
    /// where fewer nodes than `least` were offered so deep.
    pub(super) fn measured(
        &self,
        measure: Measure,
        least: f64,
        weight: impl Fn(&str) -> f64,
    ) -> Option<f64> {
        let (mut above, mut below) = (0.0, 0.0);
        for prompt in &self.prompts {
            let weight = weight(&prompt.id);
            match measure {
                Measure::Tau => {
                    above += weight * prompt.tokens;
                    below += weight * prompt.cycles;
                }
                Measure::Alpha(depth) => {
                    // A depth is offered where the one above it was accepted; a rate that is not there never was.
                    let mut offered = prompt.cycles;
                    let (upper, rest) =
                        prompt.alpha.split_at_checked(depth - 1).unwrap_or_default();
                    offered *= upper
                        .iter()
                        .map(|rate| rate.unwrap_or(0.0))
                        .product::<f64>();
                    if let Some(Some(rate)) = rest.first() {
                        above += weight * offered * rate;
                        below += weight * offered;
                    }
                }
            }
        }
        match measure {
            Measure::Tau if below > 0.0 => Some(above / below),
            Measure::Tau => Some(self.tau),
            Measure::Alpha(_) => (below > 0.0 && below >= least).then(|| above / below),
        }
    }

    /// Depths that any of its prompts was offered.
    pub(super) fn depths(&self) -> usize {
        let depths = self.prompts.iter().map(|p| p.alpha.len());
        depths.max().unwrap_or(0)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let Self {
            layers,
            tokens,
            tau,
            ..
        } = self;
        match () {
            () if self.family.is_empty() => Err("a run without a family".into()),
            () if *layers == 0 => Err("layers is 0; a draft has one at least".into()),
            () if !(tokens.is_finite() && *tokens >= 1.0) => Err(format!(
                "tokens is {tokens}; a number of at least 1 is meant"
            )),
            () if !(tau.is_finite() && *tau >= 1.0) => Err(format!(
                "tau is {tau}; it counts the bonus token, so that plain decoding has 1.00 and nothing has less"
            )),
            () => Ok(()),
        }
    }
}

impl From<&Summary> for Point {
    fn from(run: &Summary) -> Self {
        let prompts = run.prompts.iter().map(|p| Counted {
            id: p.id.clone(),
            tokens: p.tokens as f64,
            cycles: p.cycles as f64,
            alpha: p.alpha.clone(),
        });
        Self {
            family: run.family.clone(),
            layers: run.layers,
            tokens: run.tokens as f64,
            seed: run.seed,
            tau: run.tau.real,
            prompts: prompts.filter(|p| p.cycles > 0.0).collect(),
            holdout: false,
        }
    }
}

/// The runs of files and folders: CSV, lines of summaries (`.jsonl`), a summary, or folders of sweeps.
///
/// # Errors
/// With file and line, if one is none of these, holds no run, or a run that cannot be; if one run is there with two results.
pub fn read_points(paths: &[PathBuf]) -> Result<Vec<Point>> {
    let mut all: Vec<Point> = Vec::new();
    let mut origin: BTreeMap<(String, usize, u64, u64), (usize, PathBuf)> = BTreeMap::new();
    for path in paths {
        let kind = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let csv = !path.is_dir() && !matches!(kind, "json" | "jsonl");
        let found = match kind {
            _ if path.is_dir() => of_summaries(path, &gather(path)?)?,
            "jsonl" => lines(path)?,
            "json" => {
                let run = summary(&read_text(path)?).map_err(|what| Error::file(path, what))?;
                of_summaries(path, &[run])?
            }
            _ => csv_points(path)?,
        };
        if found.is_empty() {
            let message = match path.is_dir() {
                true => "holds no run of a sweep that is done".to_string(),
                false => "holds no run".to_string(),
            };
            return Err(Error::file(path, message));
        }
        for point in found {
            let key = (
                point.family.clone(),
                point.layers,
                point.tokens.to_bits(),
                point.seed,
            );
            match origin.get(&key) {
                // A table may have several measurements of a run; a run has one summary.
                Some((at, _)) if !csv && all[*at].tau == point.tau => continue,
                Some((_, other)) if !csv => {
                    return Err(Error::file(
                        path,
                        format!(
                            "{} with {} layers, {} tokens and seed {} is also in {}, with another tau: fit runs that differ in nothing else than these at a time",
                            point.family,
                            point.layers,
                            point.tokens,
                            point.seed,
                            other.display()
                        ),
                    ));
                }
                _ => {
                    origin.insert(key, (all.len(), path.clone()));
                    all.push(point);
                }
            }
        }
    }
    Ok(all)
}

fn of_summaries(path: &Path, runs: &[Summary]) -> Result<Vec<Point>> {
    let checked = |run: &Summary| {
        let point = Point::from(run);
        let bad = |message| Error::file(path, format!("run `{}`: {message}", run.name));
        point.check().map_err(bad).map(|()| point)
    };
    runs.iter().map(checked).collect()
}

fn summary(text: &str) -> Result<Summary, String> {
    serde_json::from_str(text)
        .map_err(|e| format!("not the {SUMMARY} of a run of `scylla sweep`: {e}"))
}

fn lines(path: &Path) -> Result<Vec<Point>> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate();
    let mut all = Vec::new();
    for (at, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let said = |what: String| at_line(path, at as u64 + 1, what);
        let run = summary(line).map_err(said)?;
        let point = Point::from(&run);
        point.check().map_err(said)?;
        all.push(point);
    }
    Ok(all)
}

/// A line of a table.
#[derive(Deserialize)]
struct Row {
    family: String,
    layers: f64,
    tokens: f64,
    seed: u64,
    tau: f64,
    #[serde(default)]
    holdout: Option<u8>,
}

fn csv_points(path: &Path) -> Result<Vec<Point>> {
    let columns = ["family", "layers", "tokens", "seed", "tau"];
    let header = "family,layers,tokens,seed,tau and optionally holdout";
    let rows: Vec<(u64, Row)> = rows(path, &read_text(path)?, &columns, header)?;
    let point = |(line, row): (u64, Row)| {
        if row.layers.fract() != 0.0 || !(1.0..=1e6).contains(&row.layers) {
            let what = format!(
                "layers is {}; a whole number from 1 on is meant",
                row.layers
            );
            return Err(at_line(path, line, what));
        }
        if row.holdout.is_some_and(|h| h > 1) {
            return Err(at_line(path, line, "holdout is neither 0 nor 1"));
        }
        let point = Point {
            family: row.family,
            layers: row.layers as usize,
            tokens: row.tokens,
            seed: row.seed,
            tau: row.tau,
            prompts: Vec::new(),
            holdout: row.holdout == Some(1),
        };
        let checked = point.check();
        checked.map_err(|what| at_line(path, line, what))?;
        Ok(point)
    };
    rows.into_iter().map(point).collect()
}
