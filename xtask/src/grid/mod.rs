//! `cargo xtask grid`: the runs behind the laws, smallest budgets first, so that what is there when it is broken off is whole.

mod page;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{root, run, scylla};

pub(crate) const USAGE: &str = "usage: cargo xtask grid [--small] [--until TOKENS] [--corpus DIR] [--work DIR] [--results DIR] [--gather | --held-out | --test SET]

Trains the grid of drafts of the default model: Scylla with 1, 2 and 4 layers at eight token budgets from 32,768 to 4,194,304 (factor 2),
EAGLE-2, HASS and EAGLE-3 at three of them, on the target's own answers (assets/answers). The target's states are computed once and
kept (13 GB); budgets of a setting share a trunk. Broken off, the same command goes on. Results go to docs/results/grid/runs.jsonl
after each part, one line a run.

  --small          one and two layers, 32,768 to 262,144 tokens, two seeds, EAGLE-2 and EAGLE-3 at the largest: under half an hour;
                   nothing is written to docs/results
  --until TOKENS   budgets up to this one
  --corpus DIR     the default corpus (`cargo xtask data DIR`): with budgets of 1,048,576 tokens and above also a run that has half of them
                   from raw text, beside the one of answers alone (docs/results/grid/pretrained.json)
  --work DIR       folder for states and drafts (runs/grid, or runs/grid-small)
  --results DIR    folder for runs.jsonl (docs/results/grid)
  --gather         only gather what is there, and write tables and figures
  --held-out       train the runs that laws are tested on: 8,388,608 tokens with 1, 2 and 4 layers, and 3 and 6 layers with 1, 2 and 4 million.
                   They go to held-out.jsonl, which no law is fitted to, with what predictions.json had said of them (held-out.md)
  --test SET       only walk every draft that is there, and the shipped ones, along the target's answers to the test part of a prompt set (core, or a file), at
                   temperatures 0 and 1, into test-SET.json and .md: once, at the end, as nothing may be chosen by it
";

/// Eight budgets, whole steps of two lines of 512 rows.
const BUDGETS: [u64; 8] = [
    1 << 15,
    1 << 16,
    1 << 17,
    1 << 18,
    1 << 19,
    1 << 20,
    1 << 21,
    1 << 22,
];
/// Those at which families are compared.
const COMPARED: [u64; 3] = [1 << 18, 1 << 20, 1 << 22];
/// The budgets of one pass over all settings end here: the small ones of all settings are done before a large one is begun.
const UNTIL: [u64; 4] = [1 << 18, 1 << 20, 1 << 21, 1 << 22];

/// Settings that learn side by side.
struct Part {
    /// The family, and its experiment file.
    family: &'static str,
    layers: &'static [usize],
    seeds: &'static [u64],
    budgets: &'static [u64],
}

const GRID: [Part; 5] = [
    Part {
        family: "scylla",
        layers: &[1, 2, 4],
        seeds: &[0],
        budgets: &BUDGETS,
    },
    Part {
        family: "scylla",
        layers: &[1, 2],
        seeds: &[1],
        budgets: &BUDGETS,
    },
    Part {
        family: "eagle3",
        layers: &[1],
        seeds: &[0],
        budgets: &COMPARED,
    },
    Part {
        family: "eagle2",
        layers: &[],
        seeds: &[0],
        budgets: &COMPARED,
    },
    Part {
        family: "hass",
        layers: &[],
        seeds: &[0],
        budgets: &COMPARED,
    },
];

const SMALL: [Part; 3] = [
    Part {
        family: "scylla",
        layers: &[1, 2],
        seeds: &[0, 1],
        budgets: BUDGETS.split_at(4).0,
    },
    Part {
        family: "eagle3",
        layers: &[1],
        seeds: &[0],
        budgets: COMPARED.split_at(1).0,
    },
    Part {
        family: "eagle2",
        layers: &[],
        seeds: &[0],
        budgets: COMPARED.split_at(1).0,
    },
];

/// Runs that laws are tested on.
const HELD_OUT: [Part; 2] = [
    Part {
        family: "scylla",
        layers: &[3, 6],
        seeds: &[0],
        budgets: BUDGETS.split_at(5).1,
    },
    Part {
        family: "scylla",
        layers: &[1, 2, 4],
        seeds: &[0],
        budgets: &[1 << 23],
    },
];

/// Whether a run is one of them.
fn is_held_out(run: &Value) -> bool {
    HELD_OUT.iter().any(|part| {
        let among = |key: &str, all: &[u64]| run[key].as_u64().is_some_and(|v| all.contains(&v));
        let layers: Vec<u64> = part.layers.iter().map(|&l| l as u64).collect();
        run["family"] == part.family && among("layers", &layers) && among("tokens", part.budgets)
    })
}

/// What was asked for.
struct Options {
    small: bool,
    until: u64,
    work: PathBuf,
    results: Option<PathBuf>,
    gather: bool,
    held_out: bool,
    test: Option<String>,
    corpus: Option<PathBuf>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let (mut small, mut gather, mut held_out, mut until) = (false, false, false, u64::MAX);
        let (mut work, mut results, mut test, mut corpus) = (None, None, None, None);
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().with_context(|| format!("{name}: no value"));
            match name.as_str() {
                "--small" => small = true,
                "--gather" => gather = true,
                "--held-out" => held_out = true,
                "--until" => {
                    let text = value()?;
                    until = text
                        .parse()
                        .with_context(|| format!("--until {text}: tokens"))?;
                }
                "--work" => work = Some(PathBuf::from(value()?)),
                "--corpus" => corpus = Some(PathBuf::from(value()?)),
                "--test" => test = Some(value()?.clone()),
                "--results" => results = Some(PathBuf::from(value()?)),
                other => bail!("unknown option `{other}`\n{USAGE}"),
            }
        }
        if held_out && small {
            bail!("--held-out trains more tokens than --small has");
        }
        if until < BUDGETS[0] {
            bail!("--until {until}: the smallest budget is {}", BUDGETS[0]);
        }
        let standard = if small {
            "runs/grid-small"
        } else {
            "runs/grid"
        };
        Ok(Self {
            small,
            until,
            work: root().join(work.unwrap_or_else(|| standard.into())),
            results: match (results, small) {
                (None, true) => None,
                (given, _) => {
                    Some(root().join(given.unwrap_or_else(|| "docs/results/grid".into())))
                }
            },
            gather,
            held_out,
            test,
            corpus,
        })
    }
}

pub(crate) fn grid(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    let scylla = scylla()?;
    if options.gather {
        return gather(&scylla, &options);
    }
    run(Command::new(&scylla).args(["assets", "fetch"]))?;
    if let Some(set) = &options.test {
        return test(&scylla, &options, set);
    }
    let features = features(&scylla, &options)?;
    if options.held_out {
        let mut gathered = Ok(());
        for part in &HELD_OUT {
            sweep(&scylla, &options, part, part.budgets, &features)?;
            // What cannot be told yet does not keep the rest from being trained.
            gathered = gather(&scylla, &options);
        }
        return gathered;
    }
    let parts: &[Part] = if options.small { &SMALL } else { &GRID };
    for until in UNTIL {
        for part in parts {
            let mut budgets = part.budgets.to_vec();
            budgets.retain(|&tokens| tokens <= until.min(options.until));
            if budgets.is_empty() {
                continue;
            }
            sweep(&scylla, &options, part, &budgets, &features)?;
            gather(&scylla, &options)?;
        }
        let whole = !options.small && until == PRETRAINED && options.until >= until;
        if let Some(corpus) = options.corpus.as_deref().filter(|_| whole) {
            pretrain(&scylla, &options, corpus)?;
        }
    }
    Ok(())
}

/// Tokens of the run that begins on raw text, and of the one it is held against.
const PRETRAINED: u64 = 1 << 20;

/// Half of the tokens raw text, then answers; and what both this draft and the one of answers alone are worth.
fn pretrain(scylla: &Path, options: &Options, corpus: &Path) -> Result<()> {
    let alone = options
        .work
        .join(format!("scylla/layers-2_tokens-{PRETRAINED}_seed-0/best"));
    let texts = options.work.join("texts.txt");
    let mut mixed = String::new();
    for name in ["documentation", "papers", "python", "rust"] {
        let path = corpus.join(format!("{name}.txt"));
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{}: see --corpus", path.display()))?;
        // About 300,000 tokens of each, whole documents.
        let begun = mixed.len();
        for document in text.split_inclusive("<|endoftext|>\n") {
            if mixed.len() - begun + document.len() > SHARE {
                break;
            }
            mixed += document;
        }
    }
    std::fs::write(&texts, mixed)?;
    let features = options.work.join("features-texts");
    run(Command::new(scylla)
        .args(["data", "features", "--draft", "scylla", "--output"])
        .args([&features, &texts]))?;
    let plan = root().join("assets/experiments/grid/pretrained.toml");
    let plan = std::fs::read_to_string(&plan)?;
    let plan = plan.replace("runs/grid/", &format!("{}/", options.work.display()));
    let config = options.work.join("pretrained.toml");
    std::fs::write(&config, plan)?;
    let out = options.work.join("pretrained");
    let mut train = Command::new(scylla);
    train.args(["train", "--resume", "--config"]).arg(&config);
    run(train.arg("--output").arg(&out))?;
    let mut command = Command::new(scylla);
    command.args(["inspect", "tau", "--json"]);
    for draft in [&out.join("best"), &alone] {
        command
            .arg("--draft")
            .arg(format!("scylla:{}", draft.display()));
    }
    command.args(LIMITS.iter().flat_map(|setting| ["--set", setting]));
    let found = command.stderr(Stdio::inherit()).output()?;
    if !found.status.success() {
        bail!("inspect tau: {}", found.status);
    }
    let results = options.results.as_deref().unwrap_or(&options.work);
    let path = results.join("pretrained.json");
    let all = drafts_of(&found.stdout, &options.work)?.to_string();
    std::fs::write(&path, all).with_context(|| format!("{}", path.display()))
}

/// The target's own answers, unpacked.
pub(crate) fn answers() -> Result<PathBuf> {
    let answers = root().join("assets/answers/answers.jsonl");
    if !answers.exists() {
        let partial = answers.with_extension("partial");
        let out = File::create(&partial).with_context(|| format!("{}", partial.display()))?;
        let mut xz = Command::new("xz");
        xz.args(["--decompress", "--stdout"])
            .arg(answers.with_extension("jsonl.xz"));
        run(xz.stdout(Stdio::from(out))).context("xz unpacks the answers")?;
        std::fs::rename(&partial, &answers)?;
    }
    Ok(answers)
}

/// The target's states of the answers, computed where they are not there.
fn features(scylla: &Path, options: &Options) -> Result<PathBuf> {
    // As it is named in what was computed before.
    answers()?;
    let features = options.work.join("features");
    let mut command = Command::new(scylla);
    // All families' at once: three layers' inputs and the final state.
    command
        .args([
            "data",
            "features",
            "assets/answers/answers.jsonl",
            "--draft",
            "eagle3",
            "--output",
        ])
        .arg(&features);
    if options.small {
        command.args(["--tokens", "270000"]);
    }
    run(command.current_dir(root()))?;
    Ok(features)
}

fn sweep(
    scylla: &Path,
    options: &Options,
    part: &Part,
    budgets: &[u64],
    features: &Path,
) -> Result<()> {
    let list = |values: &[u64]| {
        let texts: Vec<String> = values.iter().map(u64::to_string).collect();
        texts.join(",")
    };
    let mut command = Command::new(scylla);
    command.current_dir(root()).arg("sweep").arg("--config");
    command.arg(root().join(format!("assets/experiments/grid/{}.toml", part.family)));
    command
        .arg("--output")
        .arg(options.work.join(part.family))
        .arg("--set")
        .arg(format!("stage.data.features={}", features.display()));
    if options.small {
        // Measuring is what small budgets take most of their time for.
        command.args(["--set", "evaluate.max_new_tokens=48"]);
    }
    command
        .args(["--seeds", &list(part.seeds), "--grid"])
        .arg(format!("data.tokens={}", list(budgets)));
    if !part.layers.is_empty() {
        let layers: Vec<u64> = part.layers.iter().map(|&l| l as u64).collect();
        command.arg(format!("draft.layers={}", list(&layers)));
    }
    run(command.stdout(Stdio::null()))
}

/// Bytes that raw text of one kind takes at most, of what a run begins with.
const SHARE: usize = 1_200_000;

/// How drafts are tested.
const LIMITS: [&str; 4] = [
    "run.max_new_tokens=96",
    "budget.total=20",
    "budget.width=5",
    "budget.depth=4",
];

/// A draft as results name it: by its folder below `work`, or as one that comes with the sources.
fn named(draft: &str, work: &Path) -> String {
    let place = format!("{}/", work.display());
    match SHIPPED.contains(&draft) {
        true => format!("{draft}, shipped"),
        false => draft.replace(&place, "").replace("/best", ""),
    }
}

/// What `scylla inspect tau --json` says of several drafts, named by their folders below `work`.
fn drafts_of(said: &[u8], work: &Path) -> Result<Value> {
    let said: Value = serde_json::from_slice(said)?;
    let all = match said["drafts"].as_array() {
        Some(all) => all.clone(),
        None => vec![said],
    };
    let named = all.into_iter().map(|mut one| {
        one["draft"] = named(one["draft"].as_str().unwrap_or_default(), work).into();
        one
    });
    Ok(Value::Array(named.collect()))
}

/// Families, and the folders of their runs.
const FAMILIES: [&str; 4] = ["eagle2", "eagle3", "hass", "scylla"];

/// Drafts that come with the sources.
const SHIPPED: [&str; 2] = ["eagle3", "scylla"];

/// Temperatures that drafts are tested at.
const TEMPERATURES: [&str; 2] = ["0", "1"];

/// What every draft of the grid is worth on a prompt set that nothing was chosen by.
fn test(scylla: &Path, options: &Options, set: &str) -> Result<()> {
    let Some(results) = &options.results else {
        bail!("--test with --small needs --results DIR");
    };
    let mut drafts = Vec::new();
    for family in FAMILIES {
        let Ok(entries) = std::fs::read_dir(options.work.join(family)) else {
            continue;
        };
        let mut runs: Vec<PathBuf> = entries
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|run| run.join("summary.json").exists() && run.join("best").exists())
            .collect();
        runs.sort();
        drafts.extend(
            runs.iter()
                .map(|run| format!("{family}:{}", run.join("best").display())),
        );
    }
    if drafts.is_empty() {
        bail!("{}: no draft", options.work.display());
    }
    // The shipped ones beside them.
    drafts.extend(SHIPPED.map(String::from));
    let name = Path::new(set)
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy();
    let path = results.join(format!("test-{name}.json"));
    std::fs::create_dir_all(results)?;
    // What was broken off between two temperatures goes on.
    let mut found: serde_json::Map<String, Value> = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?,
        Err(_) => serde_json::Map::new(),
    };
    // Walking along sampled text takes trees that are not drawn.
    let set_of = [
        format!("prompts.set={set}"),
        "prompts.part=test".into(),
        "draft.tree=dynamic".into(),
    ];
    let asked: Vec<String> = drafts.iter().map(|d| named(d, &options.work)).collect();
    for temperature in TEMPERATURES {
        let key = format!("temperature_{temperature}");
        let there = found.get(&key).and_then(Value::as_array);
        let there = there.into_iter().flatten().map(|one| one["draft"].as_str());
        if there.eq(asked.iter().map(|draft| Some(draft.as_str()))) {
            continue;
        }
        let mut command = Command::new(scylla);
        command.args(["inspect", "tau", "--json", "--walked", "--tokens", "4000"]);
        for draft in &drafts {
            command.args(["--draft", draft]);
        }
        let temperature_of = format!("sampling.temperature={temperature}");
        command.args(LIMITS.iter().flat_map(|setting| ["--set", setting]));
        for setting in set_of.iter().chain([&temperature_of]) {
            command.args(["--set", setting]);
        }
        eprintln!("{} drafts at temperature {temperature}", drafts.len());
        let out = command.stderr(Stdio::inherit()).output()?;
        if !out.status.success() {
            bail!("inspect tau: {}", out.status);
        }
        found.insert(key, drafts_of(&out.stdout, &options.work)?);
        let tables: Vec<(&str, &Value)> = TEMPERATURES
            .iter()
            .filter_map(|t| Some((*t, found.get(&format!("temperature_{t}"))?)))
            .collect();
        std::fs::write(path.with_extension("md"), page::tested(&name, &tables)?)?;
        let text = serde_json::to_string(&found)?;
        std::fs::write(&path, text).with_context(|| format!("{}", path.display()))?;
    }
    Ok(())
}

/// Writes the results of all runs that are done, one line each, in the order of family, layers, seed and tokens.
fn gather(scylla: &Path, options: &Options) -> Result<()> {
    let Some(results) = &options.results else {
        return Ok(());
    };
    let mut all: Vec<Value> = Vec::new();
    for family in FAMILIES {
        let dir = options.work.join(family);
        let begun = std::fs::read_dir(&dir).is_ok_and(|mut found| {
            found.any(|e| e.is_ok_and(|e| e.path().join("summary.json").exists()))
        });
        if !begun {
            continue;
        }
        let out = Command::new(scylla)
            .args(["sweep", "--json", "--gather"])
            .arg(&dir)
            .output()?;
        if !out.status.success() {
            bail!(
                "{}: {}",
                dir.display(),
                String::from_utf8_lossy(&out.stderr)
            );
        }
        let mut found: Value = serde_json::from_slice(&out.stdout)?;
        if let Some(runs) = found["runs"].as_array_mut() {
            all.append(runs);
        }
    }
    let number = |run: &Value, key: &str| run[key].as_u64().unwrap_or(0);
    all.sort_by_key(|run| {
        let family = run["family"].as_str().unwrap_or_default().to_string();
        let rest = ["layers", "seed", "tokens"].map(|key| number(run, key));
        (family, rest)
    });
    let (held, all): (Vec<Value>, Vec<Value>) = all.into_iter().partition(is_held_out);
    std::fs::create_dir_all(results)?;
    let written = |name: &str, runs: &[Value]| -> Result<PathBuf> {
        let path = results.join(name);
        let lines: Vec<String> = runs.iter().map(Value::to_string).collect();
        std::fs::write(&path, lines.join("\n") + "\n")
            .with_context(|| format!("{}", path.display()))?;
        eprintln!("{} runs in {}", runs.len(), path.display());
        Ok(path)
    };
    let path = written("runs.jsonl", &all)?;
    if all.is_empty() {
        return Ok(());
    }
    let mut fit = Command::new(scylla);
    fit.args(["fit", "--json"]).arg(&path);
    if !held.is_empty() {
        fit.arg("--holdout").arg(written("held-out.jsonl", &held)?);
    }
    // Few runs tell no law.
    let out = fit.output()?;
    let found: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    let fits = found["fits"].as_array().cloned();
    page::write(results, &fits.unwrap_or_default())?;
    match held.len() {
        0 => Ok(()),
        _ if !out.status.success() => bail!(
            "{}: {}",
            results.display(),
            String::from_utf8_lossy(&out.stderr)
        ),
        count => {
            let said = root().join("docs/results/grid/predictions.json");
            let text =
                std::fs::read_to_string(&said).with_context(|| format!("{}", said.display()))?;
            let text = page::held_out(&found, &serde_json::from_str(&text)?, count)?;
            Ok(std::fs::write(results.join("held-out.md"), text)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_laws_are_tested_on_is_no_part_of_the_grid() {
        for part in GRID.iter().chain(&SMALL) {
            for &tokens in part.budgets {
                for &layers in part.layers {
                    let run = serde_json::json!({"family": part.family, "layers": layers, "tokens": tokens});
                    assert!(!is_held_out(&run), "{run}");
                }
            }
        }
        let run = |layers: u64, tokens: u64| serde_json::json!({"family": "scylla", "layers": layers, "tokens": tokens});
        let held = [(1, 1 << 23), (4, 1 << 23), (3, 1 << 20), (6, 1 << 22)];
        assert!(held.iter().all(|&(l, t)| is_held_out(&run(l, t))));
        assert!(!is_held_out(&run(3, 1 << 19)));
    }
}
