//! The grid's results as tables and figures.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::chart::{Axes, Series, lines};

/// A run, as far as the page shows it.
struct Run {
    family: String,
    layers: u64,
    seed: u64,
    tokens: u64,
    tau: f64,
    /// Standard error over prompts.
    error: f64,
    /// Tokens and cycles of each prompt.
    each: Vec<(f64, f64)>,
    alpha: Vec<Option<f64>>,
}

impl Run {
    fn read(value: &Value) -> Result<Self> {
        let number = |key: &str| value[key].as_u64().with_context(|| format!("no {key}"));
        let prompts = value["prompts"].as_array().context("no prompts")?;
        let each: Vec<(f64, f64)> = prompts
            .iter()
            .map(|p| {
                let of = |key: &str| p[key].as_f64().with_context(|| format!("prompt: no {key}"));
                Ok((of("tokens")?, of("cycles")?))
            })
            .collect::<Result<_>>()?;
        let (tau, error) = ratio(&each);
        Ok(Self {
            family: value["family"].as_str().context("no family")?.into(),
            layers: number("layers")?,
            seed: number("seed")?,
            tokens: number("tokens")?,
            tau,
            error,
            each,
            alpha: alpha(prompts),
        })
    }

    /// Family and, where it has several, layers.
    fn setting(&self) -> String {
        match self.family.as_str() {
            "scylla" => format!("scylla, D = {}", self.layers),
            other => other.into(),
        }
    }
}

/// Tokens over cycles of all prompts, and its standard error, prompts being independent.
fn ratio(each: &[(f64, f64)]) -> (f64, f64) {
    let (tokens, cycles) = each
        .iter()
        .fold((0.0, 0.0), |(a, b), (t, c)| (a + t, b + c));
    let tau = tokens / cycles;
    let n = each.len() as f64;
    let squares: f64 = each.iter().map(|(t, c)| (t - tau * c).powi(2)).sum();
    (tau, (squares * n / (n - 1.0)).sqrt() / cycles)
}

/// A line through tau by doublings of something.
struct Line {
    /// What a doubling brings.
    slope: f64,
    /// Its standard error over prompts (jackknife).
    error: f64,
    /// Share of the variance between the runs that the line explains.
    explained: f64,
}

/// The least squares line through tau by log2 of `x` of each run, the prompts being those of all. `None` of fewer than three runs.
fn line(runs: &[&Run], x: impl Fn(&Run) -> f64) -> Option<Line> {
    let count = runs.first()?.each.len();
    if runs.len() < 3 || count < 2 || runs.iter().any(|run| run.each.len() != count) {
        return None;
    }
    let x: Vec<f64> = runs.iter().map(|run| x(run).log2()).collect();
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let middle = mean(&x);
    let width: f64 = x.iter().map(|x| (x - middle).powi(2)).sum();
    // Without one of the prompts, or with all.
    let taus = |without: Option<usize>| -> Vec<f64> {
        let of = |run: &&Run| {
            let kept = run.each.iter().enumerate();
            let kept = kept.filter(|(i, _)| Some(*i) != without);
            let sums = kept.fold((0.0, 0.0), |(a, b), (_, (t, c))| (a + t, b + c));
            sums.0 / sums.1
        };
        runs.iter().map(of).collect()
    };
    let slope = |tau: &[f64]| {
        let together = x.iter().zip(tau).map(|(x, t)| (x - middle) * t);
        together.sum::<f64>() / width
    };
    let tau = taus(None);
    let all = slope(&tau);
    let left_out: Vec<f64> = (0..count).map(|i| slope(&taus(Some(i)))).collect();
    let between = mean(&left_out);
    let spread: f64 = left_out.iter().map(|s| (s - between).powi(2)).sum();
    let level = mean(&tau);
    let rest = |(x, t): (&f64, &f64)| (t - level - all * (x - middle)).powi(2);
    let unexplained: f64 = x.iter().zip(&tau).map(rest).sum();
    let variance: f64 = tau.iter().map(|t| (t - level).powi(2)).sum();
    Some(Line {
        slope: all,
        error: (spread * (count - 1) as f64 / count as f64).sqrt(),
        explained: 1.0 - unexplained / variance,
    })
}

/// Acceptance by depth over prompts, each weighed by the cycles that came so far.
fn alpha(prompts: &[Value]) -> Vec<Option<f64>> {
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for prompt in prompts {
        let mut reached = prompt["cycles"].as_f64().unwrap_or(0.0);
        for (depth, rate) in prompt["alpha"].as_array().into_iter().flatten().enumerate() {
            let Some(rate) = rate.as_f64() else { break };
            if sums.len() <= depth {
                sums.push((0.0, 0.0));
            }
            sums[depth].0 += reached * rate;
            sums[depth].1 += reached;
            reached *= rate;
        }
    }
    let mean = |(sum, weight): (f64, f64)| (weight > 0.0).then(|| sum / weight);
    sums.into_iter().map(mean).collect()
}

/// Writes `tables.md` and the figures beside `runs.jsonl`.
pub(super) fn write(results: &Path) -> Result<()> {
    let path = results.join("runs.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let mut runs = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.is_empty()) {
        let place = || format!("{}, line {}", path.display(), i + 1);
        let value: Value = serde_json::from_str(line).with_context(place)?;
        runs.push(Run::read(&value).with_context(place)?);
    }
    if runs.is_empty() {
        bail!("{}: no run", path.display());
    }
    std::fs::write(results.join("tables.md"), tables(&runs))?;
    figures(&runs, results)
}

/// Runs of each setting and seed, by tokens.
fn by_setting(runs: &[Run]) -> BTreeMap<(String, u64), Vec<&Run>> {
    let mut all: BTreeMap<(String, u64), Vec<&Run>> = BTreeMap::new();
    for run in runs {
        all.entry((run.setting(), run.seed)).or_default().push(run);
    }
    all.values_mut()
        .for_each(|v| v.sort_by_key(|run| run.tokens));
    all
}

/// Scylla's runs of the first seed by tokens, where there are several, by layers.
fn by_layers(runs: &[Run]) -> Vec<(u64, Vec<&Run>)> {
    let mut all: BTreeMap<u64, Vec<&Run>> = BTreeMap::new();
    for run in runs.iter().filter(|r| r.family == "scylla" && r.seed == 0) {
        all.entry(run.tokens).or_default().push(run);
    }
    all.retain(|_, of| of.len() > 1);
    all.values_mut()
        .for_each(|of| of.sort_by_key(|run| run.layers));
    all.into_iter().collect()
}

fn tables(runs: &[Run]) -> String {
    let mut budgets: Vec<u64> = runs.iter().map(|r| r.tokens).collect();
    budgets.sort_unstable();
    budgets.dedup();
    let mut text = String::from(
        "Tau on the 23 dev prompts (standard error over prompts), greedy, trees of 20 nodes, by tokens trained on.\n\n| draft | seed |",
    );
    for tokens in &budgets {
        let _ = write!(text, " {tokens} |");
    }
    text += "\n|---|---|";
    text += &"---|".repeat(budgets.len());
    text.push('\n');
    let settings = by_setting(runs);
    for ((setting, seed), of) in &settings {
        let _ = write!(text, "| {setting} | {seed} |");
        for tokens in &budgets {
            match of.iter().find(|run| run.tokens == *tokens) {
                Some(run) => {
                    let _ = write!(text, " {:.3} ({:.3}) |", run.tau, run.error);
                }
                None => text += " |",
            }
        }
        text.push('\n');
    }
    text += "\nWhat a doubling brings: least squares lines through tau, with the standard error of their slope over prompts (jackknife) and R2.\n\n";
    text += "| of | runs | tau by doubling | R2 |\n|---|---|---|---|\n";
    let mut row = |name: String, runs: &[&Run], x: fn(&Run) -> f64| {
        if let Some(line) = line(runs, x) {
            let _ = writeln!(
                text,
                "| {name} | {} | {:+.4} ({:.4}) | {:.2} |",
                runs.len(),
                line.slope,
                line.error,
                line.explained
            );
        }
    };
    for ((setting, seed), of) in &settings {
        let name = format!("tokens, {setting}, seed {seed}");
        row(name, of, |run| run.tokens as f64);
    }
    for (tokens, of) in by_layers(runs) {
        let name = format!("layers, scylla, {tokens} tokens, seed 0");
        row(name, &of, |run| run.layers as f64);
    }
    text += "\nAcceptance by depth given the depth above, at the largest budget of each.\n\n";
    text += "| draft | seed | tokens | alpha 1, 2, .. |\n|---|---|---|---|\n";
    for ((setting, seed), of) in &settings {
        let Some(run) = of.last() else { continue };
        let shown = |a: &Option<f64>| a.map_or("-".into(), |a| format!("{a:.2}"));
        let alpha: Vec<String> = run.alpha.iter().map(shown).collect();
        let _ = writeln!(
            text,
            "| {setting} | {seed} | {} | {} |",
            run.tokens,
            alpha.join(", ")
        );
    }
    text
}

fn figures(runs: &[Run], results: &Path) -> Result<()> {
    let name = |setting: &str, seed: u64| match seed {
        0 => setting.to_string(),
        seed => format!("{setting}, seed {seed}"),
    };
    let by_tokens: Vec<Series> = by_setting(runs)
        .iter()
        .map(|((setting, seed), of)| Series {
            name: name(setting, *seed),
            points: of
                .iter()
                .map(|r| (r.tokens as f64, r.tau, r.error))
                .collect(),
        })
        .collect();
    let title = "tau by tokens trained on (dev, greedy; bars: standard error over prompts)";
    let axes = Axes {
        title,
        x: "tokens",
        y: "tau",
        ratios: true,
    };
    lines(&results.join("tokens.svg"), &axes, &by_tokens)?;
    let by_layers: Vec<Series> = by_layers(runs)
        .into_iter()
        .map(|(tokens, of)| Series {
            name: format!("{tokens} tokens"),
            points: of
                .iter()
                .map(|r| (r.layers as f64, r.tau, r.error))
                .collect(),
        })
        .collect();
    let axes = Axes {
        title: "tau by layers, Scylla (dev, greedy, seed 0)",
        x: "layers D",
        y: "tau",
        ratios: true,
    };
    lines(&results.join("layers.svg"), &axes, &by_layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_again_and_a_prompt_that_differs_shows_in_its_error() {
        let run = |layers: u64, odd: f64| Run {
            family: "scylla".into(),
            layers,
            seed: 0,
            tokens: 1,
            tau: 0.0,
            error: 0.0,
            each: (0..4)
                .map(|i| {
                    let slope = if i == 0 { odd } else { 0.25 };
                    (10.0 * (1.5 + slope * (layers as f64).log2()), 10.0)
                })
                .collect(),
            alpha: Vec::new(),
        };
        let of = |odd: f64| {
            let runs = [1, 2, 4].map(|layers| run(layers, odd));
            let runs: Vec<&Run> = runs.iter().collect();
            line(&runs, |run| run.layers as f64).expect("a line")
        };
        let same = of(0.25);
        assert!((same.slope - 0.25).abs() < 1e-12 && same.error < 1e-12);
        assert!((same.explained - 1.0).abs() < 1e-12);
        // Slopes of 0.65, 0.25, 0.25, 0.25: their mean, and its error, the standard deviation 0.2 over the root of 4.
        let odd = of(0.65);
        assert!((odd.slope - 0.35).abs() < 1e-12 && (odd.error - 0.1).abs() < 1e-12);
        assert!(line(&[&run(1, 0.0), &run(2, 0.0)], |run| run.layers as f64).is_none());
    }
}
