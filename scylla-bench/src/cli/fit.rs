//! `scylla fit`

use std::path::PathBuf;

use clap::Args;
use scylla_core::files;
use serde::Serialize;

use super::{print_json, print_text};
use crate::laws::{self, Held, Laws, Point, Prediction, Query, Score, Variable, read_points};
use crate::{Error, Result};

#[derive(Args)]
pub(super) struct Fit {
    /// Runs: folders of `scylla sweep`, lines of their summaries (.jsonl), or CSV with the header
    /// family,layers,tokens,seed,tau and optionally holdout (0 or 1)
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Runs of the same kinds that are kept from the fits, and predicted by them; may be said several times
    #[arg(long, value_name = "RUNS")]
    holdout: Vec<PathBuf>,
    /// A run to predict: family=scylla,layers=4,tokens=8e6; may be said several times
    #[arg(long, value_name = "RUN")]
    predict: Vec<String>,
    /// Write the JSON object to a file too: what `scylla plan --laws` reads
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The form that was chosen for a law.
#[derive(Serialize)]
struct Chosen<'a> {
    family: &'a str,
    variable: Variable,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<f64>,
    form: &'a str,
}

#[derive(Serialize)]
struct Answer<'a> {
    /// Of tau.
    fits: Vec<&'a laws::Fit>,
    /// Of acceptance by depth.
    alpha: Vec<&'a laws::Fit>,
    chosen: Vec<Chosen<'a>>,
    predictions: &'a [Prediction],
    held: &'a [Held],
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<Score>,
    points: &'a [Point],
}

/// `family=scylla,layers=4,tokens=8e6`, with `layers` 1 unless said otherwise.
pub(super) fn query(text: &str) -> Result<Query> {
    let bad = |what: String| {
        Error::Experiment(format!(
            "--predict {text}: {what}; family=scylla,layers=4,tokens=8e6 is meant"
        ))
    };
    let (mut family, mut layers, mut tokens) = (None, 1, None);
    for part in text.split(',') {
        let Some((key, value)) = part.split_once('=') else {
            return Err(bad(format!("`{part}` has no value")));
        };
        let number = || {
            let number: f64 = value.parse().map_err(|_| bad(format!("{key}={value}")))?;
            match number.is_finite() && number >= 1.0 {
                true => Ok(number),
                false => Err(bad(format!("{key} is {value}, and must be 1 at least"))),
            }
        };
        match key {
            "family" => family = Some(value.to_string()),
            "tokens" => tokens = Some(number()?),
            "layers" => {
                let found = number()?;
                if found.fract() != 0.0 || found > 1e6 {
                    return Err(bad(format!("layers is {value}, no whole number")));
                }
                layers = found as usize;
            }
            other => return Err(bad(format!("unknown `{other}`"))),
        }
    }
    Ok(Query {
        family: family.ok_or_else(|| bad("no family".into()))?,
        layers,
        tokens: tokens.ok_or_else(|| bad("no tokens".into()))?,
    })
}

impl Fit {
    /// The runs, and those that are held out.
    fn points(&self) -> Result<Vec<Point>> {
        let mut points = read_points(&self.runs)?;
        let fitted = points.len();
        for held in read_points(&self.holdout)? {
            let same = |p: &&Point| {
                (&p.family, p.layers, p.seed) == (&held.family, held.layers, held.seed)
                    && p.tokens == held.tokens
            };
            if let Some(same) = points[..fitted].iter().find(same) {
                return Err(Error::Experiment(format!(
                    "{} with {} layers, {} tokens and seed {} is there twice, in a file of runs to fit and in one behind --holdout",
                    same.family, same.layers, same.tokens, same.seed
                )));
            }
            points.push(Point {
                holdout: true,
                ..held
            });
        }
        Ok(points)
    }

    pub(super) fn run(self) -> Result<()> {
        let queries: Vec<Query> = self
            .predict
            .iter()
            .map(|t| query(t))
            .collect::<Result<_>>()?;
        let laws = Laws::fit(self.points()?)?;
        let fits = laws.fits();
        let predictions: Vec<Prediction> = queries
            .iter()
            .map(|q| laws.predict(q))
            .collect::<Result<_>>()?;
        let held = laws.held();
        let (of_tau, alpha): (Vec<_>, Vec<_>) = fits.iter().partition(|f| f.measure == "tau");
        let answer = Answer {
            chosen: of_tau
                .iter()
                .filter(|f| f.chosen)
                .map(|f| Chosen {
                    family: &f.family,
                    variable: f.variable,
                    layers: f.layers,
                    tokens: f.tokens,
                    form: &f.form,
                })
                .collect(),
            fits: of_tau,
            alpha,
            predictions: &predictions,
            score: laws.score(&held),
            held: &held,
            points: laws.points(),
        };
        if let Some(path) = &self.output {
            let text =
                serde_json::to_string(&answer).map_err(|e| Error::Experiment(e.to_string()))?;
            files::write(path, (text + "\n").as_bytes())?;
        }
        if self.json {
            return print_json(&answer);
        }
        print_text(&text(&answer))
    }
}

/// A number as it is read in a table.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        v if !(1e-3..1e5).contains(&v) => format!("{value:.3e}"),
        _ => format!("{value:.4}"),
    }
}

fn optional(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |v| format!("{v:.digits$}"))
}

fn text(answer: &Answer<'_>) -> String {
    let mut text = String::new();
    let mut last = String::new();
    // Of acceptance by depth what was chosen.
    let chosen = answer.alpha.iter().filter(|fit| fit.chosen);
    for fit in answer.fits.iter().chain(chosen) {
        let at = match (fit.layers, fit.tokens) {
            (Some(layers), _) => format!("by tokens, D = {layers}"),
            (_, Some(tokens)) => format!("by layers, T = {tokens:.0}"),
            _ => "by tokens and layers".into(),
        };
        let head = format!(
            "{}, {} {at}: {} runs of {} trunks\n",
            fit.family, fit.measure, fit.runs, fit.trunks
        );
        if head != last {
            text += &head;
            last = head;
        }
        let parameters = fit.parameters.iter();
        let parameters: Vec<String> = parameters
            .map(|(name, value)| format!("{name} {}", short(*value)))
            .collect();
        text += &format!(
            "  {} {:<11} R2 {:.4}  AICc {:>8}  held-out error {:>6}  {}\n",
            if fit.chosen { '>' } else { ' ' },
            fit.form,
            fit.r2,
            optional(fit.aicc, 2),
            optional(fit.heldout_error, 4),
            parameters.join("  ")
        );
    }
    let mut told = |p: &Prediction, found: Option<f64>| {
        text += &format!(
            "{} D {} {:.0} tokens: tau {:.3} ({:.3}-{:.3})",
            p.family, p.layers, p.tokens, p.tau, p.low, p.high
        );
        if let Some(found) = found {
            let inside = (p.low..=p.high).contains(&found);
            let place = if inside { "inside" } else { "outside" };
            text += &format!(", has {found:.3}, {place}");
        }
        for (what, beyond) in ["tokens", "layers"].iter().zip(p.beyond) {
            if beyond > 1.0 {
                text += &format!("; {beyond:.2} x beyond the {what} that were fitted");
            }
        }
        let forms = p.forms.iter().filter(|(form, _)| **form != p.law.2);
        let forms: Vec<String> = forms.map(|(form, v)| format!("{form} {v:.3}")).collect();
        if !forms.is_empty() {
            text += &format!("; other forms: {}", forms.join(", "));
        }
        text.push('\n');
    };
    answer.predictions.iter().for_each(|p| told(p, None));
    answer
        .held
        .iter()
        .for_each(|h| told(&h.said, Some(h.found)));
    if let Some(score) = &answer.score {
        text += &format!(
            "held out: {} runs, mean absolute error {:.4} (last value seen {:.4}, mean {:.4}), {:.0} % inside, half-width {:.3}\n",
            score.runs,
            score.error,
            score.last_value,
            score.mean,
            score.inside * 100.0,
            score.half_width
        );
    }
    text
}
