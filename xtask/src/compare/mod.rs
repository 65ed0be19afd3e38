//! This project beside what users would pick instead: llama.cpp, candle-transformers, and PyTorch where it is installed,
//! on the same model files and prompts with the same threads, interleaved.

pub(crate) mod numbers;
mod parallel;
mod prompts;
mod setup;
mod shapes;
mod worker;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::root;
use numbers::Evidence;
use setup::Setup;
use shapes::Tried;

/// Name of the default model's file.
const AS_SHIPPED: &str = "smollm2-as-shipped";
/// What `--models` calls the prompts.
const PROMPTS: &str = "prompts";
/// What `--models` calls sequences side by side.
const PARALLEL: &str = "parallel";

pub(crate) const USAGE: &str = "options of `cargo xtask compare`:
  --rounds N           interleaved rounds (default 5)
  --threads LIST       numbers of threads (default 2,1)
  --models LIST        of smollm2-as-shipped, smollm2-q8_0, llama-1.1b-q8_0, llama-1.1b-q4_0, qwen2.5-0.5b-q8_0,
                       parallel (1 to 32 sequences side by side), prompts; default all
  --per-task N         prompts of each task (default 3)
  --new-tokens N       limit of new tokens a prompt (default 96)
  --draft NAME[:DIR]   one more draft of this project on the prompts; may be given again
  --set KEY=VALUE      an override of the experiment, for those drafts; may be given again
  --llama-draft FILE   a GGUF draft model for llama.cpp's draft-model mode
  --output NAME        file names in docs/results, without ending (default: nothing is written)
";

/// What was asked for.
struct Options {
    rounds: usize,
    threads: Vec<usize>,
    models: Vec<String>,
    per_task: usize,
    new: usize,
    drafts: Vec<String>,
    set: Vec<String>,
    llama_draft: Option<PathBuf>,
    output: Option<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let models = shapes::MODELS.iter().map(|m| m.name.to_string());
        let mut options = Self {
            rounds: 5,
            threads: vec![2, 1],
            models: models.chain([PARALLEL.into(), PROMPTS.into()]).collect(),
            per_task: 3,
            new: 96,
            drafts: Vec::new(),
            set: Vec::new(),
            llama_draft: None,
            output: None,
        };
        let known = options.models.clone();
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().with_context(|| format!("{name}: no value"));
            let number = |text: &str| match text.parse() {
                Ok(n) if n > 0 => Ok(n),
                _ => bail!("{name}: `{text}` is not a number above 0"),
            };
            match name.as_str() {
                "--rounds" => options.rounds = number(value()?)?,
                "--threads" => {
                    options.threads = value()?.split(',').map(number).collect::<Result<_>>()?;
                }
                "--models" => options.models = value()?.split(',').map(str::to_string).collect(),
                "--per-task" => options.per_task = number(value()?)?,
                "--new-tokens" => options.new = number(value()?)?.max(2),
                "--draft" => options.drafts.push(value()?.clone()),
                "--set" => options.set.push(value()?.clone()),
                "--llama-draft" => {
                    let path = PathBuf::from(value()?);
                    options.llama_draft = Some(
                        path.canonicalize()
                            .with_context(|| format!("{}", path.display()))?,
                    );
                }
                "--output" => options.output = Some(value()?.clone()),
                other => bail!("unknown option {other}\n{USAGE}"),
            }
        }
        if let Some(unknown) = options.models.iter().find(|m| !known.contains(m)) {
            bail!("unknown model `{unknown}`; there are {}", known.join(", "));
        }
        Ok(options)
    }
}

/// What is claimed of this project, and what was found.
#[derive(Default)]
struct Claims(Vec<Claim>);

struct Claim {
    threads: usize,
    what: String,
    wanted: f64,
    /// Whether less is better.
    at_most: bool,
    found: Evidence,
}

impl Claim {
    fn met(&self) -> bool {
        let found = self.found.value();
        match self.at_most {
            true => found <= self.wanted,
            false => found >= self.wanted,
        }
    }

    fn json(&self) -> Value {
        let bound = if self.at_most { "at most" } else { "at least" };
        json!({
            "threads": self.threads, "what": self.what, "bound": bound, "wanted": self.wanted,
            "found": self.found.json(), "met": self.met(),
        })
    }
}

impl Claims {
    fn at_least(&mut self, threads: usize, what: String, wanted: f64, found: impl Into<Evidence>) {
        self.push(threads, what, wanted, false, found.into());
    }

    fn at_most(&mut self, threads: usize, what: String, wanted: f64, found: impl Into<Evidence>) {
        self.push(threads, what, wanted, true, found.into());
    }

    fn push(&mut self, threads: usize, what: String, wanted: f64, at_most: bool, found: Evidence) {
        self.0.push(Claim {
            threads,
            what,
            wanted,
            at_most,
            found,
        });
    }

    fn table(&self) -> String {
        let mut text = "| threads | what | wanted | found | |\n|---|---|---|---|---|\n".to_string();
        for claim in &self.0 {
            let bound = if claim.at_most { "≤" } else { "≥" };
            let met = if claim.met() { "met" } else { "**not met**" };
            text += &format!(
                "| {} | {} | {bound} {} | {} | {met} |\n",
                claim.threads, claim.what, claim.wanted, claim.found
            );
        }
        text
    }
}

/// A comparison on its way.
struct Run {
    setup: Setup,
    options: Options,
    claims: Claims,
    /// Tables for people.
    text: String,
    /// Options of llama.cpp that were tried, by model and threads.
    tried: BTreeMap<(&'static str, usize), Rc<[Tried]>>,
    environment: Value,
    /// What was found of each model, of sequences side by side, and on the prompts.
    models: Vec<Value>,
    parallel: Vec<Value>,
    on_prompts: Vec<Value>,
}

impl Run {
    /// What was found so far, for people; written too where a name was given, so that what breaks off later loses nothing.
    fn report(&self, args: &[String], begun: Instant) -> Result<String> {
        let minutes = begun.elapsed().as_secs_f64() / 60.0;
        let of_models = self.models.iter().chain(&self.parallel);
        let of_models = of_models.map(|m| &m["ours"]["environment"]);
        let of_prompts = self.on_prompts.iter().map(|p| &p["environment"]);
        let ours = of_models.chain(of_prompts).next();
        let tell = |key: &str| ours.and_then(|e| e[key].as_str()).unwrap_or_default();
        let report = format!(
            "# Side by side\n\n`cargo xtask compare {}`: {} interleaved rounds, medians (smallest-largest), of ratios on prompts the value over all of them (95 % interval), {minutes:.0} minutes in all.\n{} ({}), commit {}. llama.cpp: {}.\n\n{}{}",
            args.join(" "),
            self.options.rounds,
            tell("cpu"),
            tell("simd"),
            tell("commit"),
            self.setup.versions(),
            self.claims.table(),
            self.text,
        );
        if let Some(name) = &self.options.output {
            let claims: Vec<Value> = self.claims.0.iter().map(Claim::json).collect();
            let all = json!({
                "command": args, "minutes": minutes, "environment": self.environment, "ours": ours,
                "models": self.models, "parallel": self.parallel, "prompts": self.on_prompts, "claims": claims,
            });
            let folder = root().join("docs/results");
            std::fs::write(folder.join(format!("{name}.md")), &report)?;
            std::fs::write(folder.join(format!("{name}.json")), format!("{all}\n"))?;
        }
        Ok(report)
    }

    /// llama.cpp's options on a model, tried once.
    fn tuned(&mut self, model: &'static str, threads: usize) -> Result<Rc<[Tried]>> {
        if let Some(tried) = self.tried.get(&(model, threads)) {
            return Ok(Rc::clone(tried));
        }
        let path = self.setup.model(model)?;
        let tried: Rc<[Tried]> = shapes::tune(&self.setup, &path, threads)?.into();
        self.tried.insert((model, threads), Rc::clone(&tried));
        Ok(tried)
    }
}

pub(crate) fn run(args: &[String]) -> Result<()> {
    let begun = Instant::now();
    let options = Options::parse(args)?;
    let slow = |name: &String| *name == PROMPTS || shapes::has_slow_peers(name);
    let setup = Setup::new(options.models.iter().any(slow))?;
    let mut run = Run {
        environment: setup.environment(),
        setup,
        options,
        claims: Claims::default(),
        text: String::new(),
        tried: BTreeMap::new(),
        models: Vec::new(),
        parallel: Vec::new(),
        on_prompts: Vec::new(),
    };
    let asked = |run: &Run, name: &str| run.options.models.iter().any(|m| m == name);
    let mut report = String::new();
    for threads in run.options.threads.clone() {
        for model in &shapes::MODELS {
            if asked(&run, model.name) {
                let found = shapes::measure(&mut run, model, threads)?;
                run.models.push(found);
                report = run.report(args, begun)?;
            }
        }
        if asked(&run, PARALLEL) {
            for model in &parallel::MODELS {
                let found = parallel::measure(&mut run, model, threads)?;
                run.parallel.push(found);
                report = run.report(args, begun)?;
            }
        }
        if asked(&run, PROMPTS) {
            let found = prompts::measure(&mut run, threads)?;
            run.on_prompts.push(found);
            report = run.report(args, begun)?;
        }
    }
    println!("{report}");
    Ok(())
}
