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
    let mut by_layers: BTreeMap<u64, Vec<&Run>> = BTreeMap::new();
    for run in runs.iter().filter(|r| r.family == "scylla" && r.seed == 0) {
        by_layers.entry(run.tokens).or_default().push(run);
    }
    let by_layers: Vec<Series> = by_layers
        .into_iter()
        .filter(|(_, of)| of.len() > 1)
        .map(|(tokens, mut of)| {
            of.sort_by_key(|run| run.layers);
            Series {
                name: format!("{tokens} tokens"),
                points: of
                    .iter()
                    .map(|r| (r.layers as f64, r.tau, r.error))
                    .collect(),
            }
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
