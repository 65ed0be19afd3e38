//! The grid's results as tables and figures.

use std::collections::BTreeMap;
use std::f64::consts::LN_2;
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

/// Writes `tables.md` and the figures beside `runs.jsonl`, whose laws are `fits` (of `scylla fit --json`; empty where there are none).
pub(super) fn write(results: &Path, fits: &[Value]) -> Result<()> {
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
    std::fs::write(results.join("tables.md"), tables(&runs, fits))?;
    figures(&runs, results)
}

/// A table of what drafts are worth on a prompt set: `found` has those of each temperature, in the same order.
pub(super) fn tested(set: &str, found: &[(&str, &Value)]) -> Result<String> {
    let drafts = |value: &Value| value.as_array().cloned().context("no drafts");
    let mut text = format!(
        "Tau of every draft of the grid on the test prompts of `{set}` (standard error over answers), walked along the target's own answers with trees of \
         20 nodes; acceptance by depth given the depth above; tau by where in the answer a cycle begins.\n"
    );
    for (temperature, value) in found {
        let all = drafts(value)?;
        let starts = |one: &Value| one["positions"].as_array().cloned().unwrap_or_default();
        let mut from: Vec<u64> = all
            .iter()
            .flat_map(starts)
            .filter_map(|p| p["from"].as_u64())
            .collect();
        from.sort_unstable();
        from.dedup();
        let _ = write!(
            text,
            "\nTemperature {temperature}.\n\n| draft | tau | alpha 1, 2, .. |"
        );
        for at in &from {
            let _ = write!(text, " from {at} |");
        }
        text += "\n|---|---|---|";
        text += &"---|".repeat(from.len());
        text.push('\n');
        for one in &all {
            let of = &one["simulated"];
            let number = |key: &str| of[key].as_f64().with_context(|| format!("no {key}"));
            let name = one["draft"].as_str().context("no draft")?;
            let _ = write!(
                text,
                "| {name} | {:.3} ({:.3}) | {} |",
                number("tau")?,
                number("error")?,
                rates(
                    one["alpha"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .map(Value::as_f64)
                )
            );
            for at in &from {
                let there = starts(one).into_iter().find(|p| p["from"] == *at);
                let tau = there.and_then(|p| Some(p["tokens"].as_f64()? / p["cycles"].as_f64()?));
                let _ = write!(text, " {} |", tau.map_or("-".into(), |t| format!("{t:.2}")));
            }
            text.push('\n');
        }
    }
    Ok(text)
}

/// What was said of `runs` runs that no law was fitted to, and what they have: `found` is what `scylla fit --json` says of them now,
/// `predictions` what it had said before they were made, which counts.
pub(super) fn held_out(found: &Value, predictions: &Value, runs: usize) -> Result<String> {
    let mut text = String::from(
        "Runs that no law was fitted to: what `predictions.json` had said of them before they were made (90 % band), and what they have (dev prompts, greedy, trees of 20 nodes). Those of 1, 2 and 4 layers \
         go on from trunks that fitted runs left, those of 3 and 6 have trunks of their own. The last value seen is that of as many tokens, or the most below them, at the nearest depth. Written by `cargo xtask grid --held-out`.\n\n\
         | run | seed | predicted | band | found | inside | last value seen | mean of all |\n|---|---|---|---|---|---|---|---|\n",
    );
    let told = found["held"].as_array().context("no runs held out")?;
    let before = predictions.as_array().map_or(&[][..], Vec::as_slice);
    // Of those with a trunk that was fitted, of the others, and of all.
    let mut sums = [[0.0; 5]; 3];
    let mut counts = [0; 3];
    for one in told {
        let same = |said: &&Value| {
            let key = |key: &str| said[key] == one[key];
            key("family") && key("layers") && said["tokens"].as_f64() == one["tokens"].as_f64()
        };
        let said = before
            .iter()
            .find(same)
            .with_context(|| format!("predictions.json says nothing of {one}"))?;
        let number = |of: &Value, key: &str| of[key].as_f64().with_context(|| format!("no {key}"));
        let (low, high, expected) = (
            number(said, "low")?,
            number(said, "high")?,
            number(said, "tau")?,
        );
        let (tau, last, mean) = (
            number(one, "found")?,
            number(one, "last_value")?,
            number(one, "mean")?,
        );
        let inside = (low..=high).contains(&tau);
        let off = |value: f64| (value - tau).abs();
        let row = [
            off(expected),
            off(last),
            off(mean),
            f64::from(u8::from(inside)),
            (high - low) / 2.0,
        ];
        let own = usize::from([3, 6].contains(&one["layers"].as_u64().unwrap_or(0)));
        for group in [own, 2] {
            counts[group] += 1;
            for (sum, value) in sums[group].iter_mut().zip(row) {
                *sum += value;
            }
        }
        let _ = writeln!(
            text,
            "| {}, D = {}, {:.0} tokens | {} | {expected:.3} | {low:.3}-{high:.3} | {tau:.3} | {} | {last:.3} | {mean:.3} |",
            one["family"].as_str().unwrap_or("?"),
            one["layers"],
            number(one, "tokens")?,
            one["seed"],
            if inside { "yes" } else { "no" }
        );
    }
    text += "\n| runs | | mean absolute error | of the last value seen | of the mean | inside | half-width of the band |\n|---|---|---|---|---|---|---|\n";
    let names = [
        "on trunks that were fitted",
        "on trunks of their own",
        "all",
    ];
    for ((name, &count), sums) in names
        .iter()
        .zip(&counts)
        .zip(&sums)
        .filter(|((_, n), _)| **n > 0)
    {
        let of = |i: usize| sums[i] / f64::from(count);
        let _ = writeln!(
            text,
            "| {name} | {count} | {:.3} | {:.3} | {:.3} | {} | {:.3} |",
            of(0),
            of(1),
            of(2),
            sums[3],
            of(4)
        );
    }
    if told.len() < runs {
        let _ = writeln!(
            text,
            "\nOf {} runs no law tells anything.",
            runs - told.len()
        );
    }
    Ok(text)
}

/// Acceptance by depth as it is shown.
fn rates(alpha: impl Iterator<Item = Option<f64>>) -> String {
    let shown = |a: Option<f64>| a.map_or("-".into(), |a| format!("{a:.2}"));
    alpha.map(shown).collect::<Vec<String>>().join(", ")
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

fn tables(runs: &[Run], fits: &[Value]) -> String {
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
    if !fits.is_empty() {
        text += &laws(fits);
    }
    text += "\nAcceptance by depth given the depth above, at the largest budget of each.\n\n";
    text += "| draft | seed | tokens | alpha 1, 2, .. |\n|---|---|---|---|\n";
    for ((setting, seed), of) in &settings {
        let Some(run) = of.last() else { continue };
        let _ = writeln!(
            text,
            "| {setting} | {seed} | {} | {} |",
            run.tokens,
            rates(run.alpha.iter().copied())
        );
    }
    text
}

/// Laws of tau, the chosen form of each first.
fn laws(fits: &[Value]) -> String {
    let mut text = String::from(
        "\nLaws (`scylla fit runs.jsonl`; [how](../../laws.md)): what a doubling brings by the logarithmic law (90 % interval over prompts and trunks), and the form that was chosen.\n\n\
         | law | runs, trunks | tau by doubling of T | of D | R2 | chosen form, error on the largest |\n|---|---|---|---|---|---|\n",
    );
    for fit in fits
        .iter()
        .filter(|f| f["measure"] == "tau" && f["form"] == "log")
    {
        let same = |key: &str, other: &Value| other[key] == fit[key];
        let keys = ["family", "variable", "layers", "tokens", "measure"];
        let group = fits.iter().filter(|f| keys.iter().all(|key| same(key, f)));
        let chosen = group.clone().find(|f| f["chosen"] == true).unwrap_or(fit);
        let at = match (&fit["layers"], &fit["tokens"]) {
            (Value::Number(layers), _) => format!(" by tokens, D = {layers}"),
            (_, Value::Number(tokens)) => {
                format!(" by layers, {:.0} tokens", tokens.as_f64().unwrap_or(0.0))
            }
            _ => " by both".into(),
        };
        let doubling = |name: &str| {
            let Some(slope) = fit["parameters"][name].as_f64() else {
                return "-".to_string();
            };
            let end = |i: usize| fit["intervals"][name][i].as_f64().map(|v| v * LN_2);
            match (end(0), end(1)) {
                (Some(low), Some(high)) => {
                    format!("{:+.3} ({low:+.3} to {high:+.3})", slope * LN_2)
                }
                _ => format!("{:+.3}", slope * LN_2),
            }
        };
        let error = chosen["heldout_error"].as_f64();
        let _ = writeln!(
            text,
            "| {}{at} | {}, {} | {} | {} | {:.3} | {}, {} |",
            fit["family"].as_str().unwrap_or("?"),
            fit["runs"],
            fit["trunks"],
            doubling("a_tokens"),
            doubling("a_layers"),
            fit["r2"].as_f64().unwrap_or(f64::NAN),
            chosen["form"].as_str().unwrap_or("?"),
            error.map_or("-".into(), |e| format!("{e:.3}"))
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
    use serde_json::json;

    use super::*;

    #[test]
    fn the_error_of_a_ratio_is_that_of_prompts_that_differ() {
        let same = ratio(&[(20.0, 10.0); 4]);
        assert!((same.0 - 2.0).abs() < 1e-12 && same.1 < 1e-12);
        // Taus of 1 and 3: a mean of 2, deviation sqrt(4 / 3), over the root of four.
        let (tau, error) = ratio(&[(10.0, 10.0), (30.0, 10.0), (10.0, 10.0), (30.0, 10.0)]);
        assert!((tau - 2.0).abs() < 1e-12 && (error - (4.0f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
    }

    #[test]
    fn drafts_are_told_by_temperature_and_place() {
        let draft = |name: &str, tau: f64| {
            json!({"draft": name, "simulated": {"tau": tau, "error": 0.05, "tokens": 10, "cycles": 5}, "alpha": [0.5, null],
                   "positions": [{"from": 0, "tokens": 6, "cycles": 4}, {"from": 32, "tokens": 0, "cycles": 0}]})
        };
        let (cold, warm) = (json!([draft("a", 1.5)]), json!([draft("a", 1.2)]));
        let text = tested("core", &[("0", &cold), ("1", &warm)]).expect("a table");
        for expected in [
            "Temperature 0.",
            "| a | 1.500 (0.050) | 0.50, - | 1.50 |",
            "| a | 1.200",
        ] {
            assert!(text.contains(expected), "{text}");
        }
        assert!(tested("core", &[("0", &json!({}))]).is_err());
    }

    #[test]
    fn runs_that_were_held_out_are_told_with_the_bands_that_were_said_before() {
        let one = |layers: usize, found: f64| json!({"family": "scylla", "layers": layers, "tokens": 4_194_304.0, "seed": 0, "tau": 9.0, "low": 9.0, "high": 9.0, "found": found, "last_value": 1.7, "mean": 1.5});
        let said = |layers: usize| json!({"family": "scylla", "layers": layers, "tokens": 4_194_304u64, "tau": 1.8, "low": 1.7, "high": 1.9});
        let found = json!({"held": [one(3, 1.85), one(3, 1.95), one(2, 1.8)]});
        let text = held_out(&found, &json!([said(3), said(2)]), 4);
        let text = text.expect("a table");
        for expected in [
            "| scylla, D = 3, 4194304 tokens | 0 | 1.800 | 1.700-1.900 | 1.850 | yes | 1.700 | 1.500 |",
            "| 1.950 | no |",
            "| on trunks of their own | 2 | 0.100 | 0.200 | 0.400 | 1 | 0.100 |",
            "| on trunks that were fitted | 1 | 0.000 | 0.100 | 0.300 | 1 | 0.100 |",
            "| all | 3 | 0.067 | 0.167 | 0.367 | 2 | 0.100 |",
            "Of 1 runs no law",
        ] {
            assert!(text.contains(expected), "{text}");
        }
        assert!(held_out(&json!({}), &json!([]), 1).is_err());
        let unsaid = held_out(&found, &json!([said(3)]), 3).expect_err("not said");
        assert!(unsaid.to_string().contains("says nothing"), "{unsaid}");
    }

    #[test]
    fn laws_are_told_by_doublings_with_the_form_that_was_chosen() {
        let fit = |form: &str, chosen: bool| {
            json!({"family": "scylla", "variable": "joint", "measure": "tau", "form": form, "chosen": chosen, "runs": 9,
                   "trunks": 3, "r2": 0.97, "heldout_error": 0.02, "parameters": {"a_tokens": 0.1 / LN_2},
                   "intervals": {"a_tokens": [0.05 / LN_2, 0.2 / LN_2]}})
        };
        let text = laws(&[fit("log", false), fit("saturating", true)]);
        let row =
            "| scylla by both | 9, 3 | +0.100 (+0.050 to +0.200) | - | 0.970 | saturating, 0.020 |";
        assert!(text.contains(row), "{text}");
    }
}
