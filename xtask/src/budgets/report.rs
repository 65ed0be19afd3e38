//! What rounds of the sweep say, as JSON, tables and a figure.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{BUDGETS, DRAFTS, FIXED, Options, is_whole, seconds, shown};
use crate::chart::{Axes, Series, lines};
use crate::compare::numbers::Sample;

/// Decoding speeds of one decoder at one batch, round by round.
struct Cell {
    /// Draft and budget; `None` is plain decoding.
    of: Option<(&'static str, String)>,
    speed: Sample,
    tau: Sample,
    /// Tokens a second, and over plain decoding, by the costs of before the sweep and by those of all rounds.
    predicted: Option<[Expected; 2]>,
}

/// What a plan expects.
#[derive(Clone, Copy)]
struct Expected {
    speed: f64,
    over_plain: f64,
}

impl Cell {
    fn name(&self) -> String {
        match &self.of {
            Some((draft, budget)) => format!("{draft} {budget}"),
            None => "off".into(),
        }
    }
}

pub(super) fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
}

/// Speeds and taus of all decoders at a batch, in their order, over all tasks: tau of all cycles, in the time of steps in which the
/// whole batch decodes, as plans have them. Which prompts these steps hold hangs on who ends first, so that their own tau is not that
/// of all.
fn rows(summary: &Value, batch: usize) -> Result<Vec<(f64, f64)>> {
    let rows = summary["rows"].as_array().context("no rows")?;
    rows.iter()
        .filter(|row| row["batch"] == batch && row["task"] == "all")
        .map(|row| {
            let full = &row["full"];
            let speed = full["tokens_per_s"]["median"].as_f64();
            let speed = speed.context("a row without a step in which its whole batch decodes")?;
            let tau = row["tau"].as_f64().unwrap_or(1.0);
            let own = full["tau"].as_f64().unwrap_or(tau);
            Ok((speed * tau / own, tau))
        })
        .collect()
}

/// What plans expect of a draft's budget at a batch, that of before and that of behind; without a draft of plain decoding.
fn predicted(
    plans: &[[Value; 2]],
    of: Option<(usize, [usize; 3])>,
    batch: usize,
) -> Option<[Expected; 2]> {
    let pair = &plans[of.map_or(0, |(draft, _)| draft)];
    let expected = |plan: &Value| {
        let cell = plan["cells"].as_array()?.iter().find(|cell| {
            let same = cell["batch"] == batch && cell["draft"].is_null() == of.is_none();
            same && of.is_none_or(|(_, [total, width, depth])| {
                cell["budget"] == json!({ "total": total, "width": width, "depth": depth })
            })
        })?;
        // Each draft's costs have a plain decoding of their own minutes.
        let (speed, plain) = (&cell["tokens_per_s"]["value"], &cell["plain_tokens_per_s"]);
        Some(Expected {
            speed: speed.as_f64()?,
            over_plain: speed.as_f64()? / plain.as_f64()?,
        })
    };
    Some([expected(&pair[0])?, expected(&pair[1])?])
}

/// The rounds of one kind of run, and the seconds they took.
struct Rounds {
    summaries: Vec<Value>,
    seconds: f64,
}

/// Those of a folder, of names that begin so, in order; all of one machine and build.
fn rounds(work: &Path, kind: &str, like: Option<&Value>) -> Result<Rounds> {
    let (mut summaries, mut all): (Vec<Value>, f64) = (Vec::new(), 0.0);
    let mut paths: Vec<PathBuf> = fs::read_dir(work)
        .with_context(|| format!("{}", work.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            path.is_dir() && name.starts_with(kind)
        })
        .collect();
    paths.sort();
    for path in paths {
        let path = path.join("summary.json");
        // What was broken off holds some decoders' rounds and not others'.
        if !is_whole(&path) {
            continue;
        }
        let summary = read(&path)?;
        let first = like.or(summaries.first().map(|f: &Value| &f["environment"]));
        if let Some(first) = first.filter(|&f| *f != summary["environment"]) {
            bail!(
                "{}: of {}, other rounds of {first}",
                path.display(),
                summary["environment"]
            );
        }
        all += seconds(&path)?;
        summaries.push(summary);
    }
    Ok(Rounds {
        summaries,
        seconds: all,
    })
}

/// Cells of decoders, whose rows each summary has in this order.
fn cells(
    rounds: &Rounds,
    batch: usize,
    of: &[Option<(&'static str, String)>],
) -> Result<Vec<Cell>> {
    let mut all: Vec<Cell> = of
        .iter()
        .map(|of| Cell {
            of: of.clone(),
            speed: Sample::default(),
            tau: Sample::default(),
            predicted: None,
        })
        .collect();
    for summary in &rounds.summaries {
        let found = rows(summary, batch)?;
        if found.len() != all.len() {
            bail!("{} rows at batch {batch}, not {}", found.len(), all.len());
        }
        for (cell, (speed, tau)) in all.iter_mut().zip(found) {
            cell.speed.push(speed);
            cell.tau.push(tau);
        }
    }
    Ok(all)
}

/// What is told of a batch.
struct Batch {
    batch: usize,
    /// Plain decoding, then the cells of the sweep.
    cells: Vec<Cell>,
    /// Automatic budgets of each draft.
    automatic: Vec<Cell>,
    /// The tree that is the same at every batch over plain decoding in its rounds.
    fixed: Option<Sample>,
    /// Which of the cells the plan chose, and which the sweep.
    chosen: usize,
    best: usize,
}

impl Batch {
    fn plain(&self) -> &Sample {
        &self.cells[0].speed
    }

    /// A draft's automatic budgets over the best of its own cells, plain decoding among them.
    fn adapted(&self, draft: usize) -> Sample {
        let own = 1 + draft * BUDGETS.len()..1 + (draft + 1) * BUDGETS.len();
        let own = self.cells[..1].iter().chain(&self.cells[own]);
        let own: Vec<&Cell> = own.collect();
        let best = largest(
            own.iter()
                .map(|cell| cell.speed.over(self.plain()).median()),
        );
        self.automatic[draft].speed.over(&own[best].speed)
    }
}

fn largest(values: impl Iterator<Item = f64>) -> usize {
    let all = values.enumerate();
    all.max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i)
}

fn batch(sweep: &Rounds, fixed: &Rounds, plans: &[[Value; 2]], batch: usize) -> Result<Batch> {
    let mut of = vec![None];
    for draft in &DRAFTS {
        of.extend(BUDGETS.map(|b| Some((draft.name, shown(b)))));
    }
    let named = of.len();
    of.extend(DRAFTS.iter().map(|d| Some((d.name, "auto".to_string()))));
    let mut all = cells(sweep, batch, &of)?;
    let automatic = all.split_off(named);
    let places = (0..DRAFTS.len()).flat_map(|d| BUDGETS.map(|b| Some((d, b))));
    for (cell, place) in all.iter_mut().zip(std::iter::once(None).chain(places)) {
        cell.predicted = predicted(plans, place, batch);
    }
    let fixed = match fixed.summaries.is_empty() {
        true => None,
        false => {
            let both = [None, Some((DRAFTS[0].name, shown(FIXED)))];
            let both = cells(fixed, batch, &both)?;
            Some(both[1].speed.over(&both[0].speed))
        }
    };
    let expected = |cell: &Cell| cell.predicted.map_or(0.0, |p| p[0].over_plain);
    Ok(Batch {
        batch,
        chosen: largest(all.iter().map(expected)),
        best: largest(
            all.iter()
                .map(|cell| cell.speed.over(&all[0].speed).median()),
        ),
        cells: all,
        automatic,
        fixed,
    })
}

/// Cells whose predictions are within 15 % of what was measured, and all: of the fastest round, as costs are the least that were
/// measured, or of the middle one.
fn within(batches: &[Batch], which: usize, measured: fn(&Sample) -> f64) -> (usize, usize) {
    let ratios = batches.iter().flat_map(|b| &b.cells);
    let ratios = ratios.filter_map(|c| Some(c.predicted?[which].speed / measured(&c.speed)));
    ratios.fold((0, 0), |(near, all), ratio| {
        (near + usize::from((ratio - 1.0).abs() <= 0.15), all + 1)
    })
}

pub(super) fn write(options: &Options) -> Result<()> {
    let sweep = rounds(&options.work, "round-", None)?;
    let Some(first) = sweep.summaries.first() else {
        bail!("{}: no round", options.work.display());
    };
    let fixed = rounds(&options.work, "fixed-", Some(&first["environment"]))?;
    let asked = read(&options.work.join("asked.json"))?;
    let of = asked["batches"].as_array().map_or(&[][..], Vec::as_slice);
    let of = of.iter().filter_map(|b| Some(b.as_u64()? as usize));
    let plans: Vec<[Value; 2]> = DRAFTS
        .iter()
        .map(|draft| {
            Ok([
                read(&options.plan(draft, true))?,
                read(&options.plan(draft, false))?,
            ])
        })
        .collect::<Result<_>>()?;
    let batches: Vec<Batch> = of
        .map(|b| batch(&sweep, &fixed, &plans, b))
        .collect::<Result<_>>()?;
    let mut planning = seconds(&options.plan(&DRAFTS[DRAFTS.len() - 1], true))?;
    for draft in &DRAFTS {
        let trace = format!("trace-{}/summary.json", draft.name);
        planning += seconds(&options.work.join(trace))?;
    }
    fs::create_dir_all(&options.results)?;
    let environment = &first["environment"];
    let near = |measured| [0, 1].map(|which| within(&batches, which, measured));
    let told = json!({
        "environment": environment,
        "asked": asked,
        "rounds": sweep.summaries.len(),
        "seconds": { "plan": planning, "sweep": sweep.seconds },
        "within_15_percent": {
            "of_the_fastest": near(Sample::largest),
            "of_the_middle": near(Sample::median),
        },
        "batches": batches.iter().map(as_json).collect::<Vec<_>>(),
    });
    fs::write(options.results.join("budgets.json"), format!("{told:#}\n"))?;
    let text = page(&batches, environment, &sweep, planning);
    fs::write(options.results.join("tables.md"), text)?;
    figure(&batches, environment, &options.results.join("budgets.svg"))
}

fn as_json(of: &Batch) -> Value {
    let cell = |cell: &Cell| {
        let predicted = cell.predicted.map(|p| p.map(|e| [e.speed, e.over_plain]));
        json!({ "decoder": cell.name(), "tau": cell.tau.median(), "tokens_per_s": cell.speed.json(),
                "over_plain": cell.speed.over(of.plain()).json(), "predicted": predicted })
    };
    let over_best = |cell: &Cell| cell.speed.over(&of.cells[of.best].speed).json();
    json!({
        "batch": of.batch,
        "cells": of.cells.iter().map(cell).collect::<Vec<_>>(),
        "automatic": of.automatic.iter().map(cell).collect::<Vec<_>>(),
        "best": of.cells[of.best].name(),
        "planned": of.cells[of.chosen].name(),
        "planned_over_best": over_best(&of.cells[of.chosen]),
        "automatic_over_best": (0..DRAFTS.len()).map(|d| of.adapted(d).json()).collect::<Vec<_>>(),
        "fixed_over_plain": of.fixed.as_ref().map(Sample::json),
    })
}

fn page(batches: &[Batch], environment: &Value, sweep: &Rounds, planning: f64) -> String {
    let said = |key: &str| environment[key].as_str().unwrap_or("?").to_string();
    let mut text = format!(
        "{}, {}, {} threads, commit {}. {} rounds; medians over rounds (smallest-largest), ratios round by round. The plan took {planning:.0} s before \
         the first round, the sweep {:.0} s: {:.3} of it.\n\n",
        said("cpu"),
        said("simd"),
        environment["threads"],
        said("commit"),
        sweep.summaries.len(),
        sweep.seconds,
        planning / sweep.seconds
    );
    text += "| batch | plain, tokens/s | best of the sweep | over plain | the plan's choice | over the best |";
    for draft in &DRAFTS {
        let _ = write!(
            text,
            " {} automatic, over plain | over the best of its own |",
            draft.name
        );
    }
    text += " 60 nodes over plain |\n|---|---|---|---|---|---|";
    text += &"---|---|".repeat(DRAFTS.len());
    text += "---|\n";
    for b in batches {
        let (best, chosen) = (&b.cells[b.best], &b.cells[b.chosen]);
        let _ = write!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            b.batch,
            b.plain(),
            best.name(),
            best.speed.over(b.plain()),
            chosen.name(),
            chosen.speed.over(&best.speed)
        );
        for (i, cell) in b.automatic.iter().enumerate() {
            let _ = write!(text, " {} | {} |", cell.speed.over(b.plain()), b.adapted(i));
        }
        let fixed = b.fixed.as_ref().map_or("-".into(), Sample::to_string);
        let _ = writeln!(text, " {fixed} |");
    }
    let count = |which, measured| within(batches, which, measured).0;
    let (_, all) = within(batches, 0, Sample::largest);
    let _ = write!(
        text,
        "\nPredicted, by the least of each cost, over the fastest round: within 15 % are {} of {all} cells by the costs of before the sweep, {} by those of all rounds (of the middle round: {} and {}).\n\n",
        count(0, Sample::largest),
        count(1, Sample::largest),
        count(0, Sample::median),
        count(1, Sample::median)
    );
    text += "| batch | decoder | tau | tokens/s | over plain | predicted before, over the fastest | by all costs |\n|---|---|---|---|---|---|---|\n";
    for b in batches {
        for cell in b.cells.iter().chain(&b.automatic) {
            let ratio = |which: usize| {
                let of = cell
                    .predicted
                    .map(|p| p[which].speed / cell.speed.largest());
                of.map_or("-".into(), |r| format!("{r:.2}"))
            };
            let _ = writeln!(
                text,
                "| {} | {} | {:.2} | {} | {} | {} | {} |",
                b.batch,
                cell.name(),
                cell.tau.median(),
                cell.speed,
                cell.speed.over(b.plain()),
                ratio(0),
                ratio(1)
            );
        }
    }
    text
}

fn figure(batches: &[Batch], environment: &Value, path: &Path) -> Result<()> {
    let series = |name: &str, of: &dyn Fn(&Batch) -> Option<f64>| Series {
        name: name.into(),
        points: batches
            .iter()
            .filter_map(|b| Some((b.batch as f64, of(b)?, 0.0)))
            .collect(),
    };
    let draft = DRAFTS[0].name;
    let all = [
        series("plain decoding", &|b| Some(b.plain().median())),
        series(&format!("{draft}, 60 nodes at every batch"), &|b| {
            Some(b.fixed.as_ref()?.median() * b.plain().median())
        }),
        series(&format!("{draft}, automatic budgets"), &|b| {
            Some(b.automatic[0].speed.median())
        }),
        series("best of the sweep", &|b| {
            Some(b.cells[b.best].speed.median())
        }),
    ];
    let title = format!(
        "Tokens a second by batch: {}, {}",
        environment["cpu"].as_str().unwrap_or("?"),
        environment["simd"].as_str().unwrap_or("?")
    );
    let axes = Axes {
        title: &title,
        x: "sequences side by side",
        y: "tokens a second",
        ratios: true,
    };
    lines(path, &axes, &all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds at one batch: plain decoding does 100 tokens/s, the cell with index `best` 150, other cells 90, automatic budgets 147 and 80.
    fn sweep(best: usize) -> Rounds {
        let cells = DRAFTS.len() * BUDGETS.len();
        let mut speeds = vec![100.0];
        speeds.extend((1..=cells).map(|i| if i == best { 150.0 } else { 90.0 }));
        speeds.extend([147.0, 80.0]);
        let rows = |scale: f64| {
            let row = |batch: usize, speed: f64| json!({ "batch": batch, "task": "all", "tau": 1.5, "full": { "tau": 3.0, "tokens_per_s": { "median": speed * 2.0 } } });
            let others = row(2, 1.0);
            let rows: Vec<Value> = std::iter::once(others)
                .chain(speeds.iter().map(|speed| row(4, speed * scale)))
                .collect();
            json!({ "rows": rows })
        };
        Rounds {
            // The machine is slower in one of them.
            summaries: vec![rows(1.0), rows(0.5), rows(1.02)],
            seconds: 3.0,
        }
    }

    /// Plans that expect so much of plain decoding, and of all cells but one, of which they expect more.
    fn plans(most: usize) -> Vec<[Value; 2]> {
        let plan = |draft: usize| {
            let cell = |i: usize, [total, width, depth]: [usize; 3]| {
                let expected = if draft * BUDGETS.len() + i + 1 == most {
                    180.0
                } else {
                    95.0
                };
                json!({ "batch": 4, "draft": DRAFTS[draft].name, "budget": { "total": total, "width": width, "depth": depth },
                        "tokens_per_s": { "value": expected }, "plain_tokens_per_s": 90.0 })
            };
            let plain = json!({ "batch": 4, "draft": null, "budget": { "total": 1, "width": 1, "depth": 0 }, "tokens_per_s": { "value": 90.0 }, "plain_tokens_per_s": 90.0 });
            let cells: Vec<Value> = std::iter::once(plain)
                .chain(BUDGETS.iter().enumerate().map(|(i, of)| cell(i, *of)))
                .collect();
            json!({ "cells": cells })
        };
        (0..DRAFTS.len()).map(|d| [plan(d), plan(d)]).collect()
    }

    #[test]
    fn choices_are_held_against_the_best_cell_round_by_round() {
        let none = Rounds {
            summaries: Vec::new(),
            seconds: 0.0,
        };
        let best = 1 + BUDGETS.len();
        for (planned, expected) in [(best, 1.0), (2, 0.6)] {
            let of = batch(&sweep(best), &none, &plans(planned), 4).expect("a batch");
            assert_eq!((of.best, of.chosen), (best, planned));
            assert_eq!(
                of.cells[best].name(),
                format!("scylla {}", shown(BUDGETS[0]))
            );
            let told = as_json(&of);
            let ratio = |key: &str| told[key]["median"].as_f64().expect("a ratio");
            assert!(
                (ratio("planned_over_best") - expected).abs() < 1e-12,
                "{told}"
            );
            // The first draft's best is plain decoding, as the best cell is the second's.
            let automatic = |i: usize| told["automatic_over_best"][i]["median"].as_f64();
            assert!(
                automatic(0).is_some_and(|r| (r - 1.47).abs() < 1e-12),
                "{told}"
            );
            assert!(
                automatic(1).is_some_and(|r| (r - 80.0 / 150.0).abs() < 1e-12),
                "{told}"
            );
            // Plain decoding 0.9, the cells expected at 95 and decoding at 90 as well; the two at stake are not.
            let (near, all) = within(&[of], 0, Sample::largest);
            let cells = 1 + DRAFTS.len() * BUDGETS.len();
            let far = if planned == best { 1 } else { 2 };
            assert_eq!((near, all), (cells - far, cells));
        }
    }

    #[test]
    fn rounds_that_lack_a_decoder_are_refused() {
        let mut short = sweep(1);
        short.summaries[1]["rows"]
            .as_array_mut()
            .expect("rows")
            .pop();
        let found = batch(&short, &sweep(1), &plans(1), 4).map(|_| ());
        assert!(
            found
                .expect_err("short")
                .to_string()
                .contains("rows at batch 4")
        );
    }
}
