//! `cargo xtask distill`: methods of distillation across tokenizers under one budget, learning rates chosen for each alike.

mod page;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{grid, root, run, scylla, vocabulary};

pub(crate) const USAGE: &str = "usage: cargo xtask distill --corpus DIR [--part NAME] [--tasks FILES] [--work DIR] [--results DIR] [--small | --gather]

A small Llama with another vocabulary than the default model, its teacher, is pretrained on the default corpus (`cargo xtask data DIR`) and then
learns in the same number of steps by each method. Parts, one after another:

  texts      labelled: papers and documentation, by cross entropy alone, ULD, MinED, MultiLevelOT (as published and as released), ALM, GOLD, DSKD
             and X-Token; the learning rate is chosen for each on dev texts
  answers    unlabelled: the teacher's own answers (assets/answers), of which cross entropy alone is distillation by sequences
  ablation   what MultiLevelOT is made of, part by part, on the same texts
  qwen2.5    a student with Qwen2.5's vocabulary

Three seeds (of the last, one) are reported on what was held out, answer by answer (docs/results/distillation.json, with a page beside it). Broken
off, the same command goes on; an experiment file that changed meanwhile is refused.

  --part NAME      only this part (it may need the rates of `texts`)
  --tasks FILES    also what students of `answers` say to these, separated by commas: questions and summaries over texts, read for evaluation only
  --small          two methods, few steps: whether all of it works; nothing is written to docs/results
  --gather         only write the page of what is there
  --work DIR       folder for students (runs/distill, or runs/distill-small)
  --results DIR    folder for results (docs/results)
";

/// A method: its name, and its aligner as an experiment has it.
type Method = (&'static str, &'static str);

/// Methods that learn the same under the same budget.
struct Part {
    name: &'static str,
    /// What it is, on the page.
    title: &'static str,
    /// What the others are held against.
    first: Method,
    others: &'static [Method],
    vocabulary: &'static str,
    /// Files of the corpus; none are the teacher's answers.
    texts: &'static [&'static str],
    seeds: u64,
}

/// Papers first: a limit on tokens leaves some of each.
const TEXTS: &[&str] = &["papers.txt", "documentation.txt"];
const CE: &str = "{ name = \"ce\" }";
const ULD: &str = "{ name = \"uld\" }";
const PUBLISHED: &str = "{ name = \"multilevel-ot\" }";
/// The released code leaves a student's last label out.
const RELEASED: &str =
    "{ name = \"multilevel-ot\", mode = \"reference-code\", skip_student_eos = true }";
/// Log likelihoods are divided by 100, and their slope with them: with a weight of as much it stands beside cross entropy.
const ALM: &str = "{ name = \"alm\", alm_weight = 100.0 }";
const GOLD: &str = "{ name = \"gold\", ce_weight = 1.0 }";
const MINED: &str = "{ name = \"mined\" }";
const DSKD: &str = "{ name = \"dskd\" }";
const X_TOKEN: &str = "{ name = \"x-token\" }";

/// Where there is a teacher.
const ALIGNERS: [Method; 8] = [
    ("uld", ULD),
    ("mined", MINED),
    ("multilevel-ot", PUBLISHED),
    ("multilevel-ot, released", RELEASED),
    ("alm", ALM),
    ("gold", GOLD),
    ("dskd", DSKD),
    ("x-token", X_TOKEN),
];

const PARTS: [Part; 4] = [
    Part {
        name: "texts",
        title: "Labelled: papers and documentation",
        first: ("ce", CE),
        others: &ALIGNERS,
        vocabulary: "gpt2",
        texts: TEXTS,
        seeds: 3,
    },
    Part {
        name: "answers",
        title: "Unlabelled: the teacher's own answers",
        first: ("sequences (ce)", CE),
        others: &ALIGNERS,
        vocabulary: "gpt2",
        texts: &[],
        seeds: 3,
    },
    Part {
        name: "ablation",
        title: "What MultiLevelOT is made of",
        first: ("ce", CE),
        others: &[
            ("uld", ULD),
            (
                "rank over all tokens",
                "{ name = \"multilevel-ot\", k = 49152, beta = 0.0, gamma = 0.0 }",
            ),
            (
                "rank, 50 tokens",
                "{ name = \"multilevel-ot\", beta = 0.0, gamma = 0.0 }",
            ),
            ("with SL", "{ name = \"multilevel-ot\", gamma = 0.0 }"),
            (
                "with SD, without SL",
                "{ name = \"multilevel-ot\", beta = 0.0 }",
            ),
            ("all", PUBLISHED),
        ],
        vocabulary: "gpt2",
        texts: TEXTS,
        seeds: 3,
    },
    Part {
        name: "qwen2.5",
        title: "A student with Qwen2.5's vocabulary",
        first: ("ce", CE),
        others: &[("uld", ULD), ("multilevel-ot", PUBLISHED)],
        vocabulary: "qwen2.5",
        texts: TEXTS,
        seeds: 1,
    },
];

impl Part {
    fn methods(&self) -> impl Iterator<Item = Method> + use<> {
        std::iter::once(self.first).chain(self.others.iter().copied())
    }

    /// The folder of a method's run, below that of the comparison: the same method over the same texts is one run, whatever part names it.
    fn place(&self, (name, aligner): Method, seed: u64) -> PathBuf {
        let first = &PARTS[0];
        let same = first.methods().find(|(_, a)| *a == aligner);
        let (part, name) = match same {
            Some((name, _)) if self.data() == first.data() => (first.name, name),
            _ => (self.name, name),
        };
        Path::new(part).join(format!("{}-{seed}", folder(name)))
    }

    /// The folder of the student that was taught nothing.
    fn untaught(&self) -> PathBuf {
        let first = &PARTS[0];
        let part = if self.data() == first.data() {
            first.name
        } else {
            self.name
        };
        Path::new(part).join(UNTAUGHT)
    }

    /// What its runs have in common.
    fn data(&self) -> (&'static str, &'static [&'static str]) {
        (self.vocabulary, self.texts)
    }
}

/// Learning rates that methods of the first part are tried with: from the second to the fourth, and on as long as the last one
/// tried is the best.
const RATES: [&str; 5] = ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"];
/// The rate of what is not tried with several.
const USUAL: usize = 2;

/// The student that was taught nothing.
const UNTAUGHT: &str = "untaught";

struct Options {
    corpus: Option<PathBuf>,
    part: Option<String>,
    tasks: Vec<String>,
    work: PathBuf,
    results: Option<PathBuf>,
    small: bool,
    gather: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let (mut corpus, mut work, mut results, mut part) = (None, None, None, None);
        let (mut small, mut gather, mut tasks) = (false, false, Vec::new());
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().with_context(|| format!("{name}: no value"));
            match name.as_str() {
                "--small" => small = true,
                "--gather" => gather = true,
                "--corpus" => corpus = Some(root().join(value()?)),
                "--part" => part = Some(value()?.clone()),
                "--tasks" => {
                    let files = value()?.split(',');
                    tasks = files
                        .map(|f| root().join(f).display().to_string())
                        .collect();
                }
                "--work" => work = Some(PathBuf::from(value()?)),
                "--results" => results = Some(PathBuf::from(value()?)),
                other => bail!("unknown option `{other}`\n{USAGE}"),
            }
        }
        if let Some(part) = part
            .as_ref()
            .filter(|p| PARTS.iter().all(|q| q.name != **p))
        {
            bail!(
                "--part {part}: known are {}",
                PARTS.map(|p| p.name).join(", ")
            );
        }
        let mut names: Vec<String> = tasks.iter().map(|file| scored(file)).collect();
        names.sort();
        if let Some(same) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            bail!("--tasks: two files would be scored in {}", same[0]);
        }
        let standard = if small {
            "runs/distill-small"
        } else {
            "runs/distill"
        };
        Ok(Self {
            corpus,
            part,
            tasks,
            work: root().join(work.unwrap_or_else(|| standard.into())),
            results: match (results, small) {
                (None, true) => None,
                (given, _) => Some(root().join(given.unwrap_or_else(|| "docs/results".into()))),
            },
            small,
            gather,
        })
    }

    fn methods(&self, part: &Part) -> impl Iterator<Item = Method> + use<> {
        let (small, first) = (self.small, part.first);
        let kept = move |method: &Method| !small || *method == first || method.1 == PUBLISHED;
        part.methods().filter(kept)
    }

    fn seeds(&self, part: &Part) -> u64 {
        if self.small { 1 } else { part.seeds }
    }

    fn steps(&self) -> Steps {
        let of = |pretraining, choosing, reporting| Steps {
            pretraining,
            choosing,
            reporting,
        };
        if self.small {
            of("6", "3", "4")
        } else {
            of("360", "40", "100")
        }
    }
}

/// Steps of each kind of run.
struct Steps {
    pretraining: &'static str,
    choosing: &'static str,
    reporting: &'static str,
}

/// What all runs have in common.
struct Comparison<'a> {
    options: &'a Options,
    scylla: PathBuf,
    corpus: &'a Path,
}

pub(crate) fn compare(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    if options.gather {
        return page::write(&options);
    }
    let Some(corpus) = &options.corpus else {
        bail!("--corpus names no folder\n{USAGE}");
    };
    let scylla = scylla()?;
    run(Command::new(&scylla).args(["assets", "fetch"]))?;
    let comparison = Comparison {
        options: &options,
        scylla,
        corpus,
    };
    for part in &PARTS {
        if options.part.as_ref().is_none_or(|only| only == part.name) {
            comparison.run(part)?;
        }
    }
    page::write(&options)
}

impl Comparison<'_> {
    fn command(&self, experiment: &str, more: &[(&str, String)]) -> Command {
        let config = root().join(format!("assets/experiments/distill/{experiment}.toml"));
        let mut command = Command::new(&self.scylla);
        command.args(["distill", "--json", "--config"]).arg(config);
        for (key, value) in more {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        command.stderr(Stdio::inherit());
        command
    }

    fn files(&self, names: &[&str]) -> String {
        let paths = names
            .iter()
            .map(|n| self.corpus.join(n).display().to_string());
        json!(paths.collect::<Vec<_>>()).to_string()
    }

    /// The student of a vocabulary before it meets a teacher.
    fn pretrained(&self, vocabulary: &str) -> Result<String> {
        let small = self.options.small;
        let place = self.options.work.join(vocabulary);
        let tokenizer = place.join("vocabulary");
        if !tokenizer.join("tokenizer.json").exists() {
            vocabulary::write(vocabulary, &tokenizer)?;
        }
        let warmup = if small { "2" } else { "20" };
        let command = self.command(
            "pretrain",
            &[
                ("student.tokenizer", tokenizer.display().to_string()),
                (
                    "data.files",
                    self.files(&["documentation.txt", "python.txt", "rust.txt"]),
                ),
                ("train.steps", self.options.steps().pretraining.into()),
                ("schedule.warmup", warmup.into()),
            ],
        );
        let dir = place.join("pretrained");
        learn(command, &dir)?;
        Ok(dir.join("best").display().to_string())
    }

    /// What a run of a method is asked for.
    fn asked(
        &self,
        part: &Part,
        (student, aligner): (&str, &str),
        rate: &str,
        (seed, steps): (u64, &str),
    ) -> Result<Vec<(&'static str, String)>> {
        let files = match part.texts {
            [] => json!([grid::answers()?.display().to_string()]).to_string(),
            texts => self.files(texts),
        };
        let warmup = if self.options.small { "1" } else { "5" };
        // The teacher reads the answers once for all methods, and says its rows whole.
        let learned = if part.texts.is_empty() {
            "answers"
        } else {
            "texts"
        };
        let said = self
            .options
            .work
            .join(part.vocabulary)
            .join(format!("said-{learned}"));
        let said = json!(said.display().to_string());
        Ok(vec![
            ("cache", format!("{{ dir = {said}, top_k = 0 }}")),
            ("student.model", student.to_string()),
            ("aligner", aligner.to_string()),
            ("data.files", files),
            ("optimizer.lr", rate.to_string()),
            ("run.seed", seed.to_string()),
            ("train.steps", steps.to_string()),
            ("schedule.warmup", warmup.to_string()),
        ])
    }

    /// The learning rates of aligners, by their names: those of the first part serve all.
    fn chosen(&self) -> Result<BTreeMap<&'static str, &'static str>> {
        let part = &PARTS[0];
        let student = self.pretrained(part.vocabulary)?;
        let mut chosen = BTreeMap::new();
        for (name, aligner) in self.options.methods(part) {
            let steps = self.options.steps().choosing;
            let tried = |rate: usize| -> Result<f64> {
                let rate = RATES[rate];
                let dir = self
                    .options
                    .work
                    .join(format!("rates/{}/{rate}", folder(name)));
                let asked = self.asked(part, (&student, aligner), rate, (0, steps))?;
                // A rate at which the loss is no number any more is none to choose.
                let bits = match learn(self.command("compare", &asked), &dir) {
                    Ok(summary) => summary["scores"]["bits_per_byte"]
                        .as_f64()
                        .context("no bits per byte")?,
                    Err(e) if e.to_string().ends_with("exit status: 1") => f64::INFINITY,
                    Err(e) => return Err(e),
                };
                eprintln!("{name} at {rate}: {bits:.4} bits a byte");
                Ok(bits)
            };
            let best = match self.options.small {
                true => USUAL,
                false => best_rate(tried)?,
            };
            chosen.insert(aligner, RATES[best]);
        }
        Ok(chosen)
    }

    fn run(&self, part: &Part) -> Result<()> {
        let chosen = self.chosen()?;
        let student = self.pretrained(part.vocabulary)?;
        let steps = self.options.steps().reporting;
        // Seed by seed, so that what is there when it is broken off is whole.
        for seed in 0..self.options.seeds(part) {
            for (name, aligner) in self.options.methods(part) {
                let dir = self.options.work.join(part.place((name, aligner), seed));
                // A part of a method has the method's rate.
                let rate = chosen.get(aligner).or(chosen.get(PUBLISHED));
                let rate = *rate.context("no rate was chosen")?;
                let mut asked = self.asked(part, (&student, aligner), rate, (seed, steps))?;
                let summary = learn(self.command("compare", &asked), &dir)?;
                for (key, value) in &mut asked {
                    if *key == "student.model" {
                        *value = dir.join("best").display().to_string();
                    }
                }
                self.score(part, &asked, &dir, (name, seed, rate), &summary)?;
                page::write(self.options)?;
            }
        }
        let asked = self.asked(part, (&student, CE), RATES[USUAL], (0, steps))?;
        let dir = self.options.work.join(part.untaught());
        self.score(part, &asked, &dir, (UNTAUGHT, 0, "-"), &Value::Null)
    }

    /// What a student is worth on what was held out, and, where it learned to answer, on tasks.
    fn score(
        &self,
        part: &Part,
        asked: &[(&str, String)],
        dir: &Path,
        method: (&str, u64, &str),
        summary: &Value,
    ) -> Result<()> {
        let mut command = self.command("compare", asked);
        command.args(["--set", "evaluate.part=test"]);
        score(command, &dir.join("test.json"), method, summary)?;
        let answers = part.texts.is_empty();
        for file in self.options.tasks.iter().filter(|_| answers) {
            let mut command = self.command("compare", asked);
            let files = json!([file]).to_string();
            command.args(["--set", &format!("evaluate.files={files}")]);
            // All of them, and room for several sentences.
            command.args(["--set", "evaluate.count=1000000"]);
            command.args(["--set", "evaluate.max_new_tokens=96"]);
            score(command, &dir.join(scored(file)), method, summary)?;
        }
        Ok(())
    }
}

/// The scores of a file of tasks.
fn scored(file: &str) -> String {
    let name = Path::new(file).file_stem().unwrap_or_default();
    format!("{TASKS}{}.json", name.to_string_lossy())
}

/// What such scores' names begin with.
const TASKS: &str = "tasks-";

/// Which of the rates has the least of what is told of it: of the three in the middle, and of those beyond as long as the outermost is
/// the best.
fn best_rate(tried: impl Fn(usize) -> Result<f64>) -> Result<usize> {
    let of = |rate: usize| Ok((rate, tried(rate)?));
    let mut all: Vec<(usize, f64)> = (1..RATES.len() - 1).map(of).collect::<Result<_>>()?;
    loop {
        let rates = || all.iter().map(|(rate, _)| *rate);
        let (low, high) = (rates().min(), rates().max());
        let best = all.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let &(best, value) = best.context("no rate was tried")?;
        if !value.is_finite() {
            bail!("no rate is one to learn with");
        }
        let next = match best {
            _ if Some(best) == low && best > 0 => best - 1,
            _ if Some(best) == high && best + 1 < RATES.len() => best + 1,
            _ => return Ok(best),
        };
        all.push(of(next)?);
    }
}

fn folder(name: &str) -> String {
    let kept = |c: char| if c.is_alphanumeric() { c } else { '-' };
    name.chars().map(kept).collect()
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

/// Whether a result is there already; how it was asked for, the experiment file included, is kept beside it, and must be the same.
fn same_as_before(command: &Command, result: &Path, kept: &str) -> Result<bool> {
    let args: Vec<_> = command.get_args().collect();
    let config = args.windows(2).find(|pair| pair[0] == "--config");
    let config = config.map(|pair| Path::new(pair[1]));
    let said = match config {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?
        }
        None => String::new(),
    };
    let asked = format!("{args:?}\n{said}");
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

/// What a student is worth, kept at `path`.
fn score(
    mut command: Command,
    path: &Path,
    (method, seed, rate): (&str, u64, &str),
    summary: &Value,
) -> Result<()> {
    let kept = path.with_extension("asked");
    let kept = kept.file_name().unwrap_or_default().to_string_lossy();
    if same_as_before(&command, path, &kept)? {
        return Ok(());
    }
    let out = command.arg("--score").output()?;
    if !out.status.success() {
        bail!("scylla distill --score: {}", out.status);
    }
    let mut found: Value = serde_json::from_slice(&out.stdout)?;
    found["method"] = method.into();
    found["seed"] = seed.into();
    found["lr"] = rate.into();
    found["dev"] = summary["scores"].clone();
    found["tokens"] = summary["tokens"].clone();
    // What is there is whole.
    let partial = path.with_extension("partial");
    std::fs::write(&partial, found.to_string())?;
    Ok(std::fs::rename(&partial, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_tried_outwards_as_long_as_the_outermost_is_the_best() {
        for (least, all) in [(2, 3), (3, 4), (4, 4), (1, 4), (0, 4)] {
            let count = std::cell::Cell::new(0);
            let tried = |rate: usize| {
                count.set(count.get() + 1);
                Ok(rate.abs_diff(least) as f64)
            };
            assert_eq!(best_rate(tried).expect("rates"), least);
            assert_eq!(count.get(), all, "{least}");
        }
        assert!(best_rate(|_| bail!("no")).is_err());
        assert!(best_rate(|_| Ok(f64::INFINITY)).is_err());
        let diverging = |rate: usize| {
            Ok(if rate > 2 {
                f64::INFINITY
            } else {
                1.0 - rate as f64
            })
        };
        assert_eq!(best_rate(diverging).expect("rates"), 2);
    }
}
