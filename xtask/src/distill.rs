//! `cargo xtask distill`: methods of distillation across tokenizers under one budget, learning rates chosen for each alike.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{root, run, scylla, vocabulary};

pub(crate) const USAGE: &str = "usage: cargo xtask distill --corpus DIR [--work DIR] [--results DIR] [--small | --gather]

A small Llama with GPT-2's vocabulary is pretrained on the default corpus (`cargo xtask data DIR`) and then learns the same texts in the same
number of steps by each method: cross entropy alone, and with the default model as teacher ULD, MinED, MultiLevelOT (as published and as
released), ALM, GOLD, DSKD and X-Token. The learning rate is chosen for each on dev texts, three seeds are reported on test texts, answer by
answer (docs/results/distillation.json, with a page beside it). Broken off, the same command goes on.

  --small          two methods, few steps: whether all of it works; nothing is written to docs/results
  --gather         only write the page of what is there
  --work DIR       folder for students and what the teacher said (runs/distill, or runs/distill-small)
  --results DIR    folder for results (docs/results)
";

/// Methods: name and aligner.
const METHODS: [(&str, &str); 9] = [
    ("ce", "{ name = \"ce\" }"),
    ("uld", "{ name = \"uld\" }"),
    ("mined", "{ name = \"mined\" }"),
    ("multilevel-ot", "{ name = \"multilevel-ot\" }"),
    (
        "multilevel-ot, released",
        "{ name = \"multilevel-ot\", mode = \"reference-code\" }",
    ),
    ("alm", "{ name = \"alm\" }"),
    ("gold", "{ name = \"gold\", ce_weight = 1.0 }"),
    ("dskd", "{ name = \"dskd\" }"),
    ("x-token", "{ name = \"x-token\" }"),
];

/// Learning rates that each method is tried with.
const RATES: [&str; 3] = ["3e-4", "1e-3", "3e-3"];

struct Options {
    corpus: Option<PathBuf>,
    work: PathBuf,
    results: Option<PathBuf>,
    small: bool,
    gather: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let (mut corpus, mut work, mut results) = (None, None, None);
        let (mut small, mut gather) = (false, false);
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().with_context(|| format!("{name}: no value"));
            match name.as_str() {
                "--small" => small = true,
                "--gather" => gather = true,
                "--corpus" => corpus = Some(root().join(value()?)),
                "--work" => work = Some(PathBuf::from(value()?)),
                "--results" => results = Some(PathBuf::from(value()?)),
                other => bail!("unknown option `{other}`\n{USAGE}"),
            }
        }
        let standard = if small {
            "runs/distill-small"
        } else {
            "runs/distill"
        };
        Ok(Self {
            corpus,
            work: root().join(work.unwrap_or_else(|| standard.into())),
            results: match (results, small) {
                (None, true) => None,
                (given, _) => Some(root().join(given.unwrap_or_else(|| "docs/results".into()))),
            },
            small,
            gather,
        })
    }

    fn methods(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> + use<> {
        let small = self.small;
        METHODS
            .iter()
            .filter(move |(name, _)| !small || ["ce", "multilevel-ot"].contains(name))
    }

    fn rates(&self) -> &'static [&'static str] {
        if self.small { &RATES[1..2] } else { &RATES }
    }

    fn seeds(&self) -> u64 {
        if self.small { 1 } else { 3 }
    }

    fn steps(&self) -> [&'static str; 3] {
        // Of pretraining, of the choice of rates, and of what is reported.
        if self.small {
            ["6", "3", "4"]
        } else {
            ["360", "40", "100"]
        }
    }
}

pub(crate) fn compare(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    if options.gather {
        return page(&options);
    }
    let Some(corpus) = &options.corpus else {
        bail!("--corpus names no folder\n{USAGE}");
    };
    let scylla = scylla()?;
    run(Command::new(&scylla).args(["assets", "fetch"]))?;
    let vocabulary = options.work.join("vocabulary");
    if !vocabulary.join("tokenizer.json").exists() {
        vocabulary::write("gpt2", &vocabulary)?;
    }
    let [pretraining, choosing, reporting] = options.steps();
    let with = |experiment: &str, more: &[(&str, String)]| -> Command {
        let config = root().join(format!("assets/experiments/distill/{experiment}.toml"));
        let mut command = Command::new(&scylla);
        command.args(["distill", "--json", "--config"]).arg(config);
        for (key, value) in more {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        command.stderr(Stdio::inherit());
        command
    };
    let files = |names: &[&str]| {
        let paths = names.iter().map(|n| corpus.join(n).display().to_string());
        json!(paths.collect::<Vec<_>>()).to_string()
    };
    let first = options.work.join("pretrained");
    let pretrain = with(
        "pretrain",
        &[
            ("student.tokenizer", vocabulary.display().to_string()),
            (
                "data.files",
                files(&["documentation.txt", "python.txt", "rust.txt"]),
            ),
            ("train.steps", pretraining.into()),
            (
                "schedule.warmup",
                (if options.small { "2" } else { "20" }).into(),
            ),
        ],
    );
    learn(pretrain, &first)?;
    let student = first.join("best").display().to_string();
    let texts = files(&["papers.txt", "documentation.txt"]);
    let asked = |aligner: &str, rate: &str, seed: u64, steps: &str| {
        let warmup = if options.small { "1" } else { "5" };
        vec![
            ("student.model", student.clone()),
            ("aligner", aligner.to_string()),
            ("data.files", texts.clone()),
            ("optimizer.lr", rate.to_string()),
            ("run.seed", seed.to_string()),
            ("train.steps", steps.to_string()),
            ("schedule.warmup", warmup.to_string()),
        ]
    };
    let mut chosen = BTreeMap::new();
    for &(name, aligner) in options.methods() {
        let mut best: Option<(f64, &str)> = None;
        for rate in options.rates() {
            let dir = options.work.join(format!("rates/{}/{rate}", folder(name)));
            let command = with("compare", &asked(aligner, rate, 0, choosing));
            let bits = learn(command, &dir)?["scores"]["bits_per_byte"].as_f64();
            let bits = bits.context("no bits per byte")?;
            eprintln!("{name} at {rate}: {bits:.4} bits a byte");
            if best.is_none_or(|(least, _)| bits < least) {
                best = Some((bits, rate));
            }
        }
        chosen.insert(name, best.context("no rate was tried")?.1);
    }
    // Seed by seed, so that what is there when it is broken off is whole.
    for seed in 0..options.seeds() {
        for &(name, aligner) in options.methods() {
            let dir = options.work.join(format!("seeds/{}-{seed}", folder(name)));
            let asked = asked(aligner, chosen[name], seed, reporting);
            let summary = learn(with("compare", &asked), &dir)?;
            let mut of_student = asked;
            of_student[0].1 = dir.join("best").display().to_string();
            score(
                with("compare", &of_student),
                &dir,
                (name, seed, chosen[name]),
                &summary,
            )?;
            page(&options)?;
        }
    }
    let untaught = asked(METHODS[0].1, RATES[1], 0, reporting);
    let dir = options.work.join("seeds/untaught");
    std::fs::create_dir_all(&dir)?;
    score(
        with("compare", &untaught),
        &dir,
        ("untaught", 0, "-"),
        &Value::Null,
    )?;
    page(&options)
}

fn folder(name: &str) -> String {
    name.replace(", ", "-")
}

/// Lets a student learn, or says what came of it before.
fn learn(mut command: Command, dir: &Path) -> Result<Value> {
    let summary = dir.join("summary.json");
    if !same_as_before(&command, &summary, "asked.txt")? {
        command.arg("--output").arg(dir).arg("--resume");
        run(command.stdout(Stdio::null()))?;
    }
    let text =
        std::fs::read_to_string(&summary).with_context(|| format!("{}", summary.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// Whether a result is there already; how it was asked for is kept beside it, and must be the same.
fn same_as_before(command: &Command, result: &Path, kept: &str) -> Result<bool> {
    let asked = format!("{:?}\n", command.get_args().collect::<Vec<_>>());
    let path = result.with_file_name(kept);
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::read_to_string(&path) {
        Ok(before) if before == asked => Ok(result.exists()),
        Ok(_) => bail!(
            "{}: was asked for otherwise; another --work begins anew",
            path.display()
        ),
        Err(_) => {
            std::fs::write(&path, asked)?;
            Ok(false)
        }
    }
}

/// What a student is worth on test texts, kept beside it.
fn score(
    mut command: Command,
    dir: &Path,
    (method, seed, rate): (&str, u64, &str),
    summary: &Value,
) -> Result<()> {
    let path = dir.join("test.json");
    if same_as_before(&command, &path, "scored.txt")? {
        return Ok(());
    }
    let out = command
        .args(["--score", "--set", "evaluate.part=test"])
        .output()?;
    if !out.status.success() {
        bail!("scylla distill --score: {}", out.status);
    }
    let mut found: Value = serde_json::from_slice(&out.stdout)?;
    found["method"] = method.into();
    found["seed"] = seed.into();
    found["lr"] = rate.into();
    found["dev"] = summary["scores"].clone();
    found["tokens"] = summary["tokens"].clone();
    Ok(std::fs::write(&path, found.to_string())?)
}

/// Writes what is there: all scores, and a table.
fn page(options: &Options) -> Result<()> {
    let Some(results) = &options.results else {
        return Ok(());
    };
    let mut all: Vec<Value> = Vec::new();
    for entry in std::fs::read_dir(options.work.join("seeds"))? {
        let path = entry?.path().join("test.json");
        if path.exists() {
            all.push(serde_json::from_str(&std::fs::read_to_string(&path)?)?);
        }
    }
    let order = |run: &Value| {
        let name = run["method"].as_str().unwrap_or_default();
        let place = METHODS.iter().position(|(n, _)| *n == name);
        (place.map_or(0, |p| p + 1), run["seed"].as_u64())
    };
    all.sort_by_key(order);
    std::fs::create_dir_all(results)?;
    let lines: Vec<String> = all.iter().map(Value::to_string).collect();
    let path = results.join("distillation.json");
    std::fs::write(&path, format!("[\n{}\n]\n", lines.join(",\n")))?;
    let path = results.join("distillation.md");
    std::fs::write(&path, table(&all)).with_context(|| format!("{}", path.display()))
}

fn table(all: &[Value]) -> String {
    let mut text = String::from(
        "# Methods of distillation across tokenizers\n\nWritten by `cargo xtask distill --corpus corpus`; how: [distillation.md](../distillation.md#the-comparison). Test texts; \
         mean over seeds, smallest to largest. The difference from `ce` is that of the same seed and the same texts, its interval the middle 95 % over resampled documents.\n\n\
         | method | learning rate | seeds | bits a byte | difference from `ce` | next byte as the teacher's |\n|---|---|---|---|---|---|\n",
    );
    let of = |name: &str| -> Vec<&Value> { all.iter().filter(|r| r["method"] == name).collect() };
    let names = std::iter::once("untaught").chain(METHODS.iter().map(|(name, _)| *name));
    let plain = of("ce");
    for name in names {
        let runs = of(name);
        let Some(first) = runs.first() else { continue };
        let range = |key: &str| {
            let values: Vec<f64> = runs.iter().filter_map(|r| r[key].as_f64()).collect();
            let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
            let (low, high) = values
                .iter()
                .fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
            match values.len() {
                1 => format!("{mean:.4}"),
                _ => format!("{mean:.4} ({low:.4}-{high:.4})"),
            }
        };
        let difference = match name {
            "ce" | "untaught" => "-".into(),
            _ => apart(&runs, &plain),
        };
        text += &format!(
            "| {name} | {} | {} | {} | {difference} | {} |\n",
            first["lr"].as_str().unwrap_or("-"),
            runs.len(),
            range("bits_per_byte"),
            range("next_byte")
        );
    }
    text
}

/// Bits and bytes by document.
type Answers = Vec<(f64, f64)>;

fn answers(run: &Value) -> Answers {
    let all = run["answers"].as_array().map_or(&[][..], Vec::as_slice);
    let number = |a: &Value, key: &str| a[key].as_f64().unwrap_or(0.0);
    let mut found: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for answer in all {
        let name = answer["name"].as_str().unwrap_or_default();
        let document = name
            .rsplit_once(", piece")
            .map_or(name, |(document, _)| document);
        let sums = found.entry(document).or_default();
        sums.0 += number(answer, "bits");
        sums.1 += number(answer, "bytes");
    }
    found.into_values().collect()
}

/// Mean difference of bits a byte over the seeds that both have, with the middle 95 % over resampled documents.
fn apart(runs: &[&Value], plain: &[&Value]) -> String {
    let pairs: Vec<(Answers, Answers)> = runs
        .iter()
        .filter_map(|run| {
            let other = plain.iter().find(|p| p["seed"] == run["seed"])?;
            Some((answers(run), answers(other)))
        })
        .collect();
    let count = pairs.iter().map(|(a, b)| a.len().min(b.len())).min();
    let Some(count) = count.filter(|&n| n > 0) else {
        return "-".into();
    };
    let over = |chosen: &[usize]| -> f64 {
        let one = |(a, b): &(Answers, Answers)| {
            let bits: f64 = chosen.iter().map(|&i| a[i].0 - b[i].0).sum();
            let bytes: f64 = chosen.iter().map(|&i| a[i].1).sum();
            bits / bytes.max(1.0)
        };
        pairs.iter().map(one).sum::<f64>() / pairs.len() as f64
    };
    let all: Vec<usize> = (0..count).collect();
    let mut state = 0x5DEE_CE66_D1CE_4E5Bu64;
    let mut draw = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % count
    };
    let mut drawn: Vec<f64> = (0..2000)
        .map(|_| {
            let chosen: Vec<usize> = (0..count).map(|_| draw()).collect();
            over(&chosen)
        })
        .collect();
    drawn.sort_by(f64::total_cmp);
    format!(
        "{:+.4} ({:+.4} to {:+.4})",
        over(&all),
        drawn[50],
        drawn[1949]
    )
}
