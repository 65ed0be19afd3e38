//! The comparison's scores, as a file and a page.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Options, PARTS, PUBLISHED, Part, TASKS, UNTAUGHT};
use crate::compare::numbers::Interval;

/// Scores of the runs of a part that are there, in the order of its methods, behind those of the student that was taught nothing.
fn scores(work: &Path, part: &Part, name: &str) -> Result<Vec<Value>> {
    let mut all: Vec<Value> = Vec::new();
    let mut read = |dir: PathBuf, method: &str| -> Result<()> {
        let path = work.join(dir).join(name);
        if path.exists() {
            let text = std::fs::read_to_string(&path)?;
            let found: Result<Value, _> = serde_json::from_str(&text);
            let mut found = found.with_context(|| format!("{}", path.display()))?;
            // As this part names it.
            found["method"] = method.into();
            all.push(found);
        }
        Ok(())
    };
    read(part.untaught(), UNTAUGHT)?;
    for method in part.methods() {
        for seed in 0..part.seeds {
            read(part.place(method, seed), method.0)?;
        }
    }
    Ok(all)
}

/// Names of the scores on tasks that a part's runs have.
fn tasks(work: &Path, part: &Part) -> BTreeSet<String> {
    let seeds = |method: super::Method| (0..part.seeds).map(move |seed| part.place(method, seed));
    let places = part.methods().flat_map(seeds);
    let entries = places.filter_map(|place| std::fs::read_dir(work.join(place)).ok());
    let names = entries.flatten().filter_map(|e| {
        let name = e.ok()?.file_name().to_string_lossy().into_owned();
        (name.starts_with(TASKS) && name.ends_with(".json")).then_some(name)
    });
    names.collect()
}

/// Writes what is there: all scores, and tables.
pub(super) fn write(options: &Options) -> Result<()> {
    let Some(results) = &options.results else {
        return Ok(());
    };
    let mut text = String::from(
        "# Methods of distillation across tokenizers\n\nWritten by `cargo xtask distill --corpus corpus`; how: [distillation.md](../distillation.md#the-comparison). Held-out answers; \
         mean over seeds, smallest to largest. Differences are of the same seed and the same answers, their intervals the middle 95 % over resampled documents, for the seeds that there were. \
         Teacher's answers are held out by question: a passage that one asks about may stand behind another that was learned from.\n",
    );
    let mut lines = Vec::new();
    for part in &PARTS {
        let held_out = scores(&options.work, part, "test.json")?;
        if held_out.is_empty() {
            continue;
        }
        let environments: BTreeSet<String> = held_out.iter().filter_map(environment).collect();
        text += &format!(
            "\n## {}\n\n{} documents; {}.\n\n{}",
            part.title,
            held_out
                .iter()
                .map(|run| bits(run).len())
                .max()
                .unwrap_or(0),
            environments.into_iter().collect::<Vec<_>>().join("; "),
            table(part, &held_out)
        );
        let mut all = vec![("held out".to_string(), held_out)];
        for name in tasks(&options.work, part) {
            let what = name.trim_start_matches(TASKS).trim_end_matches(".json");
            let runs = scores(&options.work, part, &name)?;
            text += &format!(
                "\nWhat students say themselves to tasks over texts (`{what}`), which none has learned from:\n\n{}",
                of_tasks(part, &runs)
            );
            all.push((what.to_string(), runs));
        }
        for (what, runs) in all {
            let line =
                |run: Value| json!({ "part": part.name, "on": what, "run": run }).to_string();
            lines.extend(runs.into_iter().map(line));
        }
    }
    std::fs::create_dir_all(results)?;
    let path = results.join("distillation.json");
    std::fs::write(&path, format!("[\n{}\n]\n", lines.join(",\n")))?;
    let path = results.join("distillation.md");
    std::fs::write(&path, text).with_context(|| format!("{}", path.display()))
}

/// Where a run was scored.
fn environment(run: &Value) -> Option<String> {
    let said = |key: &str| run["environment"][key].as_str();
    Some(format!(
        "{}, {}, {} threads, {}, commit {}",
        said("cpu")?,
        said("simd")?,
        run["environment"]["threads"],
        said("device")?,
        said("commit")?
    ))
}

/// Bits and bytes of each document.
fn bits(run: &Value) -> Sums {
    sums(run, |answer| {
        (number(answer, "bits"), number(answer, "bytes"))
    })
}

fn of<'a>(all: &'a [Value], name: &str) -> Vec<&'a Value> {
    all.iter().filter(|run| run["method"] == name).collect()
}

fn names(part: &Part) -> impl Iterator<Item = &'static str> + use<> {
    let methods = part.methods().map(|(name, _)| name);
    std::iter::once(UNTAUGHT).chain(methods)
}

/// A number of several runs: their mean, and the smallest and largest.
fn range(runs: &[&Value], of: impl Fn(&Value) -> Option<f64>) -> String {
    let values: Vec<f64> = runs.iter().filter_map(|run| of(run)).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let (low, high) = values
        .iter()
        .fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
    match values.len() {
        0 => "-".into(),
        1 => format!("{mean:.4}"),
        _ => format!("{mean:.4} ({low:.4}-{high:.4})"),
    }
}

fn table(part: &Part, all: &[Value]) -> String {
    // Cross entropy alone, and what the paper says is best.
    let first = part.first.0;
    let published = part.methods().find(|(_, aligner)| *aligner == PUBLISHED);
    let published = published.map_or(first, |(name, _)| name);
    let mut text = format!(
        "| method | learning rate | seeds | bits a byte | difference from `{first}` | from `{published}` | next byte as the teacher's | difference from `{first}` |\n|---|---|---|---|---|---|---|---|\n"
    );
    for name in names(part) {
        let runs = of(all, name);
        let Some(one) = runs.first() else { continue };
        let from = |other: &str, of_answer: &dyn Fn(&Value) -> (f64, f64)| {
            let others = of(all, other);
            match name == other || name == UNTAUGHT || others.is_empty() {
                true => "-".into(),
                false => apart(&runs, &others, of_answer),
            }
        };
        let bits = |answer: &Value| (number(answer, "bits"), number(answer, "bytes"));
        let next = |answer: &Value| (number(answer, "same"), number(answer, "places"));
        text += &format!(
            "| {name} | {} | {} | {} | {} | {} | {} | {} |\n",
            one["lr"].as_str().unwrap_or("-"),
            runs.len(),
            range(&runs, |run| run["bits_per_byte"].as_f64()),
            from(first, &bits),
            from(published, &bits),
            range(&runs, |run| run["next_byte"].as_f64()),
            from(first, &next)
        );
    }
    text
}

/// Scores of what students say, beside the one that was taught nothing.
fn of_tasks(part: &Part, all: &[Value]) -> String {
    const SCORES: [(&str, &str); 3] = [
        ("f1", "F1"),
        ("rouge_l", "Rouge-L"),
        ("rouge_lsum", "Rouge-LSum"),
    ];
    let mut text = String::from("| method | answers |");
    for (_, name) in SCORES {
        text += &format!(" {name} | above `{UNTAUGHT}` |");
    }
    text += "\n|---|---|---|---|---|---|---|---|\n";
    let untaught = of(all, UNTAUGHT);
    for name in names(part) {
        let runs = of(all, name);
        let Some(one) = runs.first() else { continue };
        text += &format!("| {name} | {} |", one["said"]["count"]);
        for (key, _) in SCORES {
            let above = match name == UNTAUGHT {
                true => "-".into(),
                false => apart(&runs, &untaught, |answer| match answer["said"].is_null() {
                    true => (0.0, 0.0),
                    false => (number(&answer["said"], key), 1.0),
                }),
            };
            text += &format!(
                " {} | {above} |",
                range(&runs, |run| run["said"][key].as_f64())
            );
        }
        text.push('\n');
    }
    text
}

fn number(of: &Value, key: &str) -> f64 {
    of[key].as_f64().unwrap_or(0.0)
}

/// A sum and what it is divided by, by document.
type Sums = Vec<(f64, f64)>;

fn sums(run: &Value, of: impl Fn(&Value) -> (f64, f64)) -> Sums {
    let all = run["answers"].as_array().map_or(&[][..], Vec::as_slice);
    let mut found: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for answer in all {
        let name = answer["name"].as_str().unwrap_or_default();
        let document = name
            .rsplit_once(", piece")
            .map_or(name, |(document, _)| document);
        let (sum, over) = of(answer);
        let sums = found.entry(document).or_default();
        sums.0 += sum;
        sums.1 += over;
    }
    found.into_values().collect()
}

/// Mean difference of a ratio over the seeds that both have (a student that was taught nothing has one for all), with the middle 95 %
/// over resampled documents.
fn apart(runs: &[&Value], others: &[&Value], of: impl Fn(&Value) -> (f64, f64)) -> String {
    let pairs: Vec<(Sums, Sums)> = runs
        .iter()
        .filter_map(|run| {
            let same =
                |other: &&&Value| other["seed"] == run["seed"] || other["method"] == UNTAUGHT;
            Some((sums(run, &of), sums(others.iter().find(same)?, &of)))
        })
        .collect();
    let count = pairs.iter().map(|(a, b)| a.len().min(b.len())).min();
    let Some(count) = count.filter(|&n| n > 0) else {
        return "-".into();
    };
    let over = |chosen: &[usize]| -> f64 {
        let one = |(a, b): &(Sums, Sums)| {
            let sum: f64 = chosen.iter().map(|&i| a[i].0 - b[i].0).sum();
            let over: f64 = chosen.iter().map(|&i| a[i].1).sum();
            sum / over.max(f64::MIN_POSITIVE)
        };
        pairs.iter().map(one).sum::<f64>() / pairs.len() as f64
    };
    let found = Interval::bootstrap(count, over);
    format!(
        "{:+.4} ({:+.4} to {:+.4})",
        found.value, found.low, found.high
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(method: &str, seed: u64, bits: f64) -> Value {
        let answer = |i: usize| {
            json!({"name": format!("a.txt, document {}, piece {}", i / 2, i % 2), "bits": bits * 100.0, "bytes": 100, "same": 5, "places": 10,
                   "said": {"count": 1, "f1": bits / 10.0, "rouge_l": 0.1, "rouge_lsum": 0.1}})
        };
        json!({"method": method, "seed": seed, "lr": "1e-3", "bits_per_byte": bits, "next_byte": 0.5,
               "said": {"count": 6, "f1": bits / 10.0, "rouge_l": 0.1, "rouge_lsum": 0.1}, "answers": (0..6).map(answer).collect::<Vec<_>>()})
    }

    #[test]
    fn the_same_method_over_the_same_texts_is_one_run() {
        let [texts, answers, ablation, qwen] = &PARTS;
        let of = |part: &Part, i: usize| part.methods().nth(i).map(|method| part.place(method, 2));
        assert_eq!(of(ablation, 6), of(texts, 3));
        assert_eq!(of(ablation, 0), Some("texts/ce-2".into()));
        assert_eq!(of(ablation, 3), Some("ablation/rank--50-tokens-2".into()));
        assert_eq!(of(answers, 0), Some("answers/sequences--ce--2".into()));
        assert_eq!(of(qwen, 0), Some("qwen2.5/ce-2".into()));
        assert_eq!(ablation.untaught(), texts.untaught());
        let mut places: Vec<_> = PARTS
            .iter()
            .flat_map(|part| part.methods().map(|m| part.place(m, 0)))
            .collect();
        let all = places.len();
        places.sort();
        places.dedup();
        assert_eq!(all - places.len(), 3);
    }

    #[test]
    fn methods_are_held_against_the_first_seed_by_seed() {
        let part = &PARTS[0];
        let all = [
            run(UNTAUGHT, 0, 3.0),
            run("ce", 0, 2.0),
            run("ce", 1, 2.2),
            run("uld", 0, 1.9),
            run("uld", 1, 2.0),
            run("multilevel-ot", 0, 1.8),
        ];
        assert_eq!(bits(&all[0]).len(), 3, "two pieces of each document");
        let text = table(part, &all);
        for row in [
            "| untaught | 1e-3 | 1 | 3.0000 | - | - | 0.5000 | - |",
            "| ce | 1e-3 | 2 | 2.1000 (2.0000-2.2000) | - | +0.2000 (+0.2000 to +0.2000) |",
            "| uld | 1e-3 | 2 | 1.9500 (1.9000-2.0000) | -0.1500 (-0.1500 to -0.1500) | +0.1000 (+0.1000 to +0.1000) | 0.5000 (0.5000-0.5000) | +0.0000",
            "| multilevel-ot | 1e-3 | 1 | 1.8000 | -0.2000 (-0.2000 to -0.2000) | - |",
        ] {
            assert!(text.contains(row), "{text}");
        }
        // Of tasks each stands beside the one student that was taught nothing.
        let text = of_tasks(part, &all);
        assert!(
            text.contains("| uld | 6 | 0.1950 (0.1900-0.2000) | -0.1050 (-0.1050 to -0.1050) |"),
            "{text}"
        );
        assert!(text.contains("| untaught | 6 | 0.3000 | - |"), "{text}");
    }
}
