//! `cargo xtask budgets`: speed by batch with every budget of a sweep, with budgets that adapt and with a tree that does not, and how
//! near a plan comes that was made beforehand.

mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{root, run, scylla};

pub(crate) const USAGE: &str = "usage: cargo xtask budgets [--rounds N] [--batch LIST] [--part PART] [--per-task N] [--tokens N] [--work DIR] [--results DIR] [--gather]

Decodes the default model's prompts at each batch size, full from the first step on, with every budget of a sweep for the shipped drafts, with automatic budgets, plainly,
and in every third round with a tree of 60 nodes as EAGLE-2 has it; another decoder goes first in each round. A plan is made before the first
round, from costs measured in its time and from what the drafts propose on dev prompts; costs are measured again in every third round. Into results:
how far predictions are off, how far the plan's choice and each draft's automatic budgets are from the best cell, as JSON, tables and a figure.
Broken off, the same command goes on, with the same build on the same machine. SCYLLA_SIMD=avx2 makes a processor of another kind.

  --rounds N       rounds of the sweep (9)
  --batch LIST     sequences side by side (1,2,4,8,16,32)
  --part PART      prompts of the sweep: test, or dev
  --per-task N     of each task (2)
  --tokens N       new tokens of a turn (64)
  --work DIR       folder of the rounds (runs/budgets)
  --results DIR    folder of the results (docs/results/budgets)
  --gather         only gather what is there in the folder, whatever it was asked for
";

/// A draft of the sweep: its name and settings.
struct Draft {
    name: &'static str,
    settings: &'static [(&'static str, &'static str)],
}

const DRAFTS: [Draft; 2] = [
    Draft {
        name: "eagle3",
        settings: &[("weights", "\"q4\"")],
    },
    Draft {
        name: "scylla",
        settings: &[("weights", "\"q4\""), ("head_size", "8192")],
    },
];

/// Budgets of the sweep: nodes with the root, width, and expansion steps after level 0.
const BUDGETS: [[usize; 3]; 4] = [[2, 1, 0], [3, 1, 1], [5, 2, 1], [8, 4, 2]];
/// What a trace must hold for them.
const TRACED: [usize; 3] = [16, 4, 3];
/// EAGLE-2's tree as published, which is the same at every batch.
const FIXED: [usize; 3] = [60, 10, 5];
/// Rounds between those in which it runs: with so many nodes a batch of 32 takes a multiple of what other budgets take.
const EVERY: usize = 3;
/// Rows of prompts in a step: all of a batch's, so that its sequences begin side by side.
const PROMPT_ROWS: usize = 32_768;
/// Samples of each cost that the plan is made from.
const SAMPLES: usize = 2;
/// Committed positions that costs are measured at: those of the prompts and half their answers lie between.
const CONTEXTS: &str = "128,512";
/// What automatic budgets may draft at most: about what the sweep's largest cell has.
const AUTOMATIC: [usize; 3] = [8, 4, 2];

struct Options {
    rounds: usize,
    batches: Vec<usize>,
    part: String,
    per_task: usize,
    tokens: usize,
    work: PathBuf,
    results: PathBuf,
    gather: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            rounds: 9,
            batches: vec![1, 2, 4, 8, 16, 32],
            part: "test".into(),
            per_task: 2,
            tokens: 64,
            work: root().join("runs/budgets"),
            results: root().join("docs/results/budgets"),
            gather: false,
        };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            if name == "--gather" {
                options.gather = true;
                continue;
            }
            let Some(value) = args.next() else {
                bail!("{name}: no value\n{USAGE}");
            };
            let number = |text: &str| -> Result<usize> {
                let number: usize = text.parse().with_context(|| format!("{name} {value}"))?;
                match number {
                    0 => bail!("{name} {value}: 1 at least"),
                    some => Ok(some),
                }
            };
            match name.as_str() {
                "--rounds" => options.rounds = number(value)?,
                "--batch" => {
                    options.batches = value.split(',').map(number).collect::<Result<_>>()?;
                }
                "--part" => options.part.clone_from(value),
                "--per-task" => options.per_task = number(value)?,
                "--tokens" => options.tokens = number(value)?,
                "--work" => options.work = root().join(value),
                "--results" => options.results = root().join(value),
                other => bail!("unknown option `{other}`\n{USAGE}"),
            }
        }
        if !["dev", "test"].contains(&options.part.as_str()) {
            bail!("--part {}: dev or test", options.part);
        }
        Ok(options)
    }

    fn batch_list(&self) -> String {
        let all: Vec<String> = self.batches.iter().map(usize::to_string).collect();
        all.join(",")
    }

    /// What rounds that are compared must have in common.
    fn asked(&self) -> Value {
        json!({ "batches": self.batches, "part": self.part, "per_task": self.per_task, "tokens": self.tokens, "budgets": BUDGETS,
                "drafts": DRAFTS.map(|d| d.name), "simd": std::env::var("SCYLLA_SIMD").unwrap_or_default() })
    }

    fn round(&self, round: usize) -> PathBuf {
        self.work.join(format!("round-{round:02}"))
    }

    fn fixed(&self, round: usize) -> PathBuf {
        self.work.join(format!("fixed-{round:02}"))
    }

    fn costs(&self, draft: &Draft) -> PathBuf {
        self.work.join(format!("costs-{}.csv", draft.name))
    }

    /// The plan that was made before the sweep, or the same with all costs.
    fn plan(&self, draft: &Draft, before: bool) -> PathBuf {
        let when = if before { "before" } else { "behind" };
        self.work.join(format!("plan-{when}-{}.json", draft.name))
    }
}

/// Nodes, width and steps as `scylla plan` takes and tells them.
fn shown([total, width, depth]: [usize; 3]) -> String {
    format!("{total}/{width}/{depth}")
}

pub(crate) fn budgets(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    if options.gather {
        return report::write(&options);
    }
    let scylla = scylla()?;
    run(Command::new(&scylla).args(["assets", "fetch"]))?;
    fs::create_dir_all(&options.work).with_context(|| format!("{}", options.work.display()))?;
    same_as_before(&options)?;
    for draft in &DRAFTS {
        trace(&scylla, &options, draft)?;
    }
    before(&scylla, &options)?;
    for round in 1..=options.rounds {
        // The last one is told of in any case.
        let decoded = options.round(round).join("summary.json");
        if round < options.rounds && is_whole(&decoded) {
            continue;
        }
        // One sample more in every third round.
        for draft in &DRAFTS {
            measure(&scylla, &options, draft, SAMPLES + round.div_ceil(EVERY))?;
        }
        sweep(&scylla, &options, round)?;
        for draft in &DRAFTS {
            plan(&scylla, &options, draft, false)?;
        }
        report::write(&options)?;
    }
    Ok(())
}

/// Rounds of other prompts, budgets or instructions are not gone on with.
fn same_as_before(options: &Options) -> Result<()> {
    let path = options.work.join("asked.json");
    let asked = options.asked();
    match fs::read_to_string(&path) {
        Ok(text) if serde_json::from_str::<Value>(&text).ok() == Some(asked.clone()) => Ok(()),
        Ok(text) => bail!(
            "{} holds rounds of {}, not of {asked}: name another --work",
            options.work.display(),
            text.trim()
        ),
        Err(_) => Ok(fs::write(path, asked.to_string())?),
    }
}

/// Where it is kept how long something took; written last, it says that the thing is whole.
fn took(made: &Path) -> PathBuf {
    made.with_extension("seconds")
}

fn is_whole(made: &Path) -> bool {
    made.exists() && took(made).exists()
}

/// Makes something, unless it is there and whole, and keeps how long that took. What was broken off is made anew.
fn timed(made: &Path, make: impl FnOnce() -> Result<()>) -> Result<()> {
    if is_whole(made) {
        return Ok(());
    }
    if made.is_file() {
        fs::remove_file(made)?;
    }
    let begun = Instant::now();
    make()?;
    let seconds = begun.elapsed().as_secs_f64().to_string();
    Ok(fs::write(took(made), seconds)?)
}

/// Seconds that something took.
fn seconds(made: &Path) -> Result<f64> {
    let path = took(made);
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    text.trim()
        .parse()
        .with_context(|| format!("{}", path.display()))
}

/// Of drafts, whose folders are named from the root.
fn command(scylla: &Path) -> Command {
    let mut command = Command::new(scylla);
    command.current_dir(root());
    command
}

/// What a draft could propose on the dev prompts.
fn trace(scylla: &Path, options: &Options, draft: &Draft) -> Result<()> {
    let out = options.work.join(format!("trace-{}", draft.name));
    let mut command = command(scylla);
    command.args(["bench", "--trace", "dense", "--json"]);
    let [total, width, depth] = TRACED;
    let mut settings = vec![
        "compare=[]".into(),
        format!("draft.name={}", draft.name),
        "prompts.part=dev".into(),
        format!("prompts.per_task={}", options.per_task),
        "run.repeats=1".into(),
        format!("run.max_new_tokens={}", options.tokens),
        "run.ignore_eos=true".into(),
        format!("budget.total={total}"),
        format!("budget.width={width}"),
        format!("budget.depth={depth}"),
        format!("run.output={}", out.display()),
    ];
    settings.extend(draft.settings.iter().map(|(k, v)| format!("draft.{k}={v}")));
    for setting in &settings {
        command.args(["--set", setting]);
    }
    command.stdout(std::process::Stdio::null());
    timed(&out.join("summary.json"), || run(&mut command))
}

/// Batch at which the sweep's contexts are looked up: plain decoding of its prompts, which says nothing of drafts. Larger batches see
/// about as many positions, smaller ones some more.
const LOOKED_UP: usize = 8;

/// Committed positions that the sweep's tokens see on average.
fn context(scylla: &Path, options: &Options) -> Result<String> {
    let out = options.work.join("context");
    let config = options.work.join("context.toml");
    fs::write(&config, experiment(options, 0, &[]))?;
    let mut bench = command(scylla);
    bench.arg("bench").arg(&config).arg("--json");
    bench.args(["--batch", &LOOKED_UP.to_string(), "--set", "compare=[]"]);
    bench.args(["--set", &format!("run.output={}", out.display())]);
    bench.stdout(std::process::Stdio::null());
    let summary = out.join("summary.json");
    timed(&summary, || run(&mut bench))?;
    let found = report::read(&summary)?;
    let context = found["rows"]
        .as_array()
        .and_then(|rows| rows.iter().find(|row| row["task"] == "all"))
        .and_then(|row| row["full"]["context"].as_f64())
        .with_context(|| format!("{}: no step of a whole batch", summary.display()))?;
    Ok(format!("{context:.0}"))
}

/// Costs, sample by sample of all drafts, and the plan that is made of them. Their time is kept beside the last draft's plan.
fn before(scylla: &Path, options: &Options) -> Result<()> {
    let last = options.plan(&DRAFTS[DRAFTS.len() - 1], true);
    timed(&last, || {
        for draft in &DRAFTS {
            let costs = options.costs(draft);
            if costs.exists() {
                fs::remove_file(costs)?;
            }
        }
        for sample in 1..=SAMPLES {
            for draft in &DRAFTS {
                measure(scylla, options, draft, sample)?;
            }
        }
        DRAFTS
            .iter()
            .try_for_each(|draft| plan(scylla, options, draft, true))
    })
}

/// Samples of what steps cost, up to so many.
fn measure(scylla: &Path, options: &Options, draft: &Draft, samples: usize) -> Result<()> {
    let mut command = command(scylla);
    command
        .args(["plan", "--json", "--measure"])
        .arg(options.costs(draft));
    command.args(["--draft", draft.name, "--context", CONTEXTS]);
    command.args(["--batch", &options.batch_list()]);
    command.args(["--rounds", &samples.to_string()]);
    for (key, value) in draft.settings {
        command.args(["--set", &format!("draft.{key}={value}")]);
    }
    run(command.stdout(std::process::Stdio::null())).with_context(|| {
        format!(
            "{}: with another build or machine another --work begins anew",
            options.work.display()
        )
    })
}

fn plan(scylla: &Path, options: &Options, draft: &Draft, before: bool) -> Result<()> {
    let mut command = Command::new(scylla);
    command
        .args(["plan", "--json", "--costs"])
        .arg(options.costs(draft))
        .arg("--trace")
        .arg(options.work.join(format!("trace-{}", draft.name)))
        .args(["--context", &context(scylla, options)?])
        .args(["--batch", &options.batch_list()])
        .args(["--budgets", &BUDGETS.map(shown).join(",")]);
    let out = command.output()?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(fs::write(options.plan(draft, before), &out.stdout)?)
}

fn budget(of: [usize; 3]) -> String {
    let [total, width, depth] = of;
    format!("{{ total = {total}, width = {width}, depth = {depth} }}")
}

/// An experiment of drafts with budgets, beside plain decoding.
fn experiment(options: &Options, round: usize, decoders: &[(&Draft, String)]) -> String {
    let mut text = format!(
        "[target]\nmodel = \"default\"\n\n[sampling]\ntemperature = 0.0\n\n[prompts]\nset = \"core\"\npart = \"{}\"\nper_task = {}\n\n\
         [run]\nrepeats = 1\nseed = {round}\nmax_new_tokens = {}\nignore_eos = true\nper_slot = 1\nprompt_rows = {PROMPT_ROWS}\n",
        options.part, options.per_task, options.tokens
    );
    for (draft, budget) in decoders {
        let settings: String = draft
            .settings
            .iter()
            .map(|(key, value)| format!(", {key} = {value}"))
            .collect();
        text += &format!(
            "\n[[compare]]\ndraft = {{ name = \"{}\"{settings} }}\nbudget = {budget}\n",
            draft.name
        );
    }
    text
}

/// Decoders of a round behind plain decoding: the cells of the sweep, then automatic budgets.
fn decoders() -> Vec<(&'static Draft, String)> {
    let cells = DRAFTS
        .iter()
        .flat_map(|draft| BUDGETS.map(|of| (draft, budget(of))));
    let automatic = DRAFTS.iter().map(|draft| {
        (
            draft,
            budget(AUTOMATIC).replace("{ ", "{ policy = \"auto\", "),
        )
    });
    cells.chain(automatic).collect()
}

fn sweep(scylla: &Path, options: &Options, round: usize) -> Result<()> {
    let fixed = (round % EVERY == 1).then(|| {
        let of = vec![(&DRAFTS[0], budget(FIXED))];
        (options.fixed(round), of)
    });
    // A round that is whole has the other, too.
    let all = [fixed, Some((options.round(round), decoders()))];
    for (out, decoders) in all.into_iter().flatten() {
        let config = out.with_extension("toml");
        fs::write(&config, experiment(options, round, &decoders))?;
        let mut command = command(scylla);
        command.arg("bench").arg(&config).arg("--json");
        command.args(["--batch", &options.batch_list(), "--set"]);
        command.arg(format!("run.output={}", out.display()));
        command.stdout(std::process::Stdio::null());
        timed(&out.join("summary.json"), || run(&mut command))?;
    }
    Ok(())
}
