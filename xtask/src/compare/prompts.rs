//! Greedy decoding of the project's own prompts: plain and speculative, of this project and of its peers.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::numbers::{Interval, Sample};
use super::setup::{Build, Setup};
use super::worker::{Decoded, Worker};
use super::{AS_SHIPPED, Claims, Run};

/// Tasks whose answers repeat their prompts.
const COPYING: [&str; 3] = ["summarisation", "code", "extraction"];

/// What stands for all tasks.
const ALL: &str = "all";

/// This project's methods: a name, and overrides of an experiment. The budgets were chosen on the dev part.
const OURS: [(&str, &[&str]); 5] = [
    ("plain", &[]),
    (
        "ngram, 4 nodes",
        &[
            "draft.name=ngram",
            "budget.total=4",
            "budget.width=1",
            "budget.depth=2",
        ],
    ),
    (
        "ngram, 8 nodes",
        &[
            "draft.name=ngram",
            "budget.total=8",
            "budget.width=1",
            "budget.depth=6",
        ],
    ),
    (
        "suffix, 4 nodes",
        &[
            "draft.name=suffix",
            "budget.total=4",
            "budget.width=1",
            "budget.depth=2",
        ],
    ),
    (
        "suffix, 8 nodes",
        &[
            "draft.name=suffix",
            "budget.total=8",
            "budget.width=1",
            "budget.depth=6",
        ],
    ),
];

/// llama.cpp's own speculation without a draft model, tried on the dev part: its defaults, and shorter matches and drafts, as a CPU wants them.
fn speculations() -> Vec<Value> {
    vec![
        json!({ "type": "ngram-simple" }),
        json!({ "type": "ngram-simple", "size_n": 3, "size_m": 4 }),
        json!({ "type": "ngram-simple", "size_n": 3, "size_m": 8 }),
        json!({ "type": "ngram-simple", "size_n": 4, "size_m": 16 }),
        json!({ "type": "ngram-map-k", "size_n": 3, "size_m": 4 }),
        json!({ "type": "ngram-map-k4v", "size_n": 3, "size_m": 4 }),
        json!({ "type": "ngram-mod", "n_match": 3, "n_min": 1, "n_max": 4 }),
        json!({ "type": "ngram-cache" }),
    ]
}

struct Prompt {
    task: String,
    ids: Vec<u32>,
}

struct Prompts {
    list: Vec<Prompt>,
    eos: Vec<u32>,
}

fn prompts(ours: &mut Worker, part: &str, per_task: usize) -> Result<Prompts> {
    let found = ours.ask(&json!({ "op": "prompts", "part": part, "per_task": per_task }))?;
    let list = found["prompts"].as_array().context("prompts")?;
    let read = |p: &Value| {
        let task = p["task"].as_str().context("task")?.to_string();
        let ids = serde_json::from_value(p["ids"].clone())?;
        Ok(Prompt { task, ids })
    };
    Ok(Prompts {
        list: list.iter().map(read).collect::<Result<_>>()?,
        eos: serde_json::from_value(found["eos"].clone())?,
    })
}

/// What one prompt took in each round.
#[derive(Default)]
struct Cost {
    tokens: Sample,
    ms: Sample,
}

/// One way to decode.
struct Method {
    name: String,
    /// Which of the workers does it.
    worker: usize,
    /// Decodes in the first round only.
    once: bool,
    set: Vec<String>,
    /// Tokens a second by task.
    speed: BTreeMap<String, Sample>,
    /// Ids of each prompt in the first round.
    ids: Vec<Vec<u64>>,
    /// Of each prompt.
    costs: Vec<Cost>,
    /// Tokens, cycles, milliseconds and those outside the target's forward, over everything.
    totals: [f64; 4],
}

impl Method {
    fn new(name: impl Into<String>, worker: usize, set: Vec<String>) -> Self {
        Self {
            name: name.into(),
            worker,
            once: false,
            set,
            speed: BTreeMap::new(),
            ids: Vec::new(),
            costs: Vec::new(),
            totals: [0.0; 4],
        }
    }

    fn of(&self, task: &str) -> Sample {
        self.speed.get(task).cloned().unwrap_or_default()
    }

    /// Takes in a prompt, by its place among the prompts.
    fn add(&mut self, prompt: usize, decoded: &Decoded) {
        let tokens = decoded.ids.len() as f64 - 1.0;
        if self.costs.len() <= prompt {
            self.costs.resize_with(prompt + 1, Cost::default);
        }
        self.costs[prompt].tokens.push(tokens);
        self.costs[prompt].ms.push(decoded.ms);
        let parts = [
            tokens,
            decoded.cycles.unwrap_or(f64::NAN),
            decoded.ms,
            decoded.outside,
        ];
        for (total, part) in self.totals.iter_mut().zip(parts) {
            *total += part;
        }
    }

    /// Mean tokens a cycle, bonus included.
    fn tau(&self) -> Option<f64> {
        Some(self.totals[0] / self.totals[1]).filter(|tau| tau.is_finite())
    }

    fn outside(&self) -> f64 {
        self.totals[3] / self.totals[2]
    }
}

/// Tokens and milliseconds of one round, by task.
type Sums = BTreeMap<String, (f64, f64)>;

fn add(sums: &mut Sums, task: &str, decoded: &Decoded) {
    for name in [task, ALL] {
        let sum = sums.entry(name.into()).or_default();
        sum.0 += decoded.ids.len() as f64 - 1.0;
        sum.1 += decoded.ms;
    }
}

fn label(spec: &Value) -> String {
    let object = spec.as_object().into_iter().flatten();
    let words: Vec<String> = object
        .map(|(key, value)| match key.as_str() {
            "type" => value.to_string(),
            "model" => "a model".into(),
            _ => format!("{key} {value}"),
        })
        .collect();
    words.join(", ").replace('"', "")
}

struct Speculation {
    spec: Value,
    speed: f64,
    accepted: f64,
}

/// Tries llama.cpp's speculation on dev prompts that repeat themselves; the fastest comes first.
fn tune_speculation(
    setup: &Setup,
    build: &Build,
    base: &Value,
    dev: &Prompts,
    new: usize,
    specs: Vec<Value>,
) -> Result<Vec<Speculation>> {
    let path = setup.model(AS_SHIPPED)?;
    let mut found = Vec::new();
    for spec in specs {
        let mut options = base.clone();
        options["speculation"] = spec.clone();
        let mut worker = setup.server(build, &path, &options)?;
        let (mut sums, mut drafted, mut accepted) = (Sums::new(), 0.0, 0.0);
        for p in dev.list.iter().filter(|p| COPYING.contains(&&*p.task)) {
            let decoded = worker.decode(&p.ids, new, &dev.eos, &[])?;
            add(&mut sums, &p.task, &decoded);
            drafted += decoded.drafted;
            accepted += decoded.accepted;
        }
        let (tokens, ms) = sums.get(ALL).copied().unwrap_or_default();
        let speed = tokens / ms * 1e3;
        eprintln!(
            "  tried {}: {speed:.1} tokens/s, {accepted} of {drafted} accepted",
            label(&spec)
        );
        found.push(Speculation {
            spec,
            speed,
            accepted: accepted / drafted,
        });
    }
    found.sort_by(|a, b| b.speed.total_cmp(&a.speed));
    Ok(found)
}

/// Decodes with every method in turn; adds a table, claims, and returns everything.
pub(super) fn measure(run: &mut Run, threads: usize) -> Result<Value> {
    eprintln!("prompts, {threads} threads");
    let tried = run.tuned(AS_SHIPPED, threads)?;
    let (setup, options) = (&run.setup, &run.options);
    let path = setup.model(AS_SHIPPED)?;
    let mut ours = setup.scylla(&path, threads)?;
    let test = prompts(&mut ours, "test", options.per_task)?;
    let dev = prompts(&mut ours, "dev", 2)?;
    let kept = tried
        .iter()
        .max_by(|a, b| a.decode.total_cmp(&b.decode))
        .context("llama.cpp was not tried")?;
    let (build, mut base) = (kept.build.clone(), kept.options.clone());
    if let Some(base) = base.as_object_mut() {
        base.retain(|key, _| key != "ubatch" && key != "threads_batch");
    }
    let specs = tune_speculation(setup, &build, &base, &dev, options.new, speculations())?;

    let mut methods: Vec<Method> = OURS
        .iter()
        .map(|(name, set)| Method::new(*name, 0, set.iter().map(|s| s.to_string()).collect()))
        .collect();
    for draft in &options.drafts {
        let (name, dir) = draft.split_once(':').unwrap_or((draft, ""));
        let mut set = vec![format!("draft.name={name}")];
        if !dir.is_empty() {
            set.push(format!("draft.dir={dir:?}"));
        }
        set.extend(options.set.iter().cloned());
        methods.push(Method::new(draft.clone(), 0, set));
    }
    let mut workers = vec![ours];
    let mut peer = |name: String, worker: Worker| {
        workers.push(worker);
        methods.push(Method::new(name, workers.len() - 1, Vec::new()));
        methods.len() - 1
    };
    let engine = setup.engine(&build, &path, &kept.options)?;
    let llama_plain = peer("llama.cpp plain".into(), engine);
    let server = setup.server(&build, &path, &base)?;
    let llama_server = peer("llama.cpp server, plain".into(), server);
    let fastest = specs
        .first()
        .context("llama.cpp's speculation was not tried")?;
    let mut with = base.clone();
    with["speculation"] = fastest.spec.clone();
    let llama_ngram = peer(
        format!("llama.cpp server, {}", label(&fastest.spec)),
        setup.server(&build, &path, &with)?,
    );
    let mut draft_specs = Vec::new();
    if let Some(draft) = &options.llama_draft {
        let try_n =
            |n: usize| json!({ "type": "draft-simple", "model": draft, "n_min": 0, "n_max": n });
        let specs = [2, 4, 8].map(try_n).to_vec();
        draft_specs = tune_speculation(setup, &build, &base, &dev, options.new, specs)?;
        let fastest = draft_specs
            .first()
            .context("the draft model was not tried")?;
        with["speculation"] = fastest.spec.clone();
        let server = setup.server(&build, &path, &with)?;
        peer(
            format!("llama.cpp server, {}", label(&fastest.spec)),
            server,
        );
    }
    let mut slow = Vec::new();
    for (name, worker) in setup.slow_peers(&path, threads)? {
        slow.push(peer(format!("{name} plain"), worker));
    }

    for i in slow {
        methods[i].once = true;
    }
    for round in 0..options.rounds {
        let mut sums = vec![Sums::new(); methods.len()];
        for (i, prompt) in test.list.iter().enumerate() {
            for turn in 0..methods.len() {
                // Each method goes first in turn.
                let which = (turn + round + i) % methods.len();
                let method = &mut methods[which];
                if method.once && round > 0 {
                    continue;
                }
                let worker = &mut workers[method.worker];
                let decoded = worker.decode(&prompt.ids, options.new, &test.eos, &method.set)?;
                add(&mut sums[which], &prompt.task, &decoded);
                method.add(i, &decoded);
                if round == 0 {
                    method.ids.push(decoded.ids);
                }
            }
            eprint!(
                "\r  round {} of {}, prompt {} of {} ",
                round + 1,
                options.rounds,
                i + 1,
                test.list.len()
            );
        }
        eprintln!();
        for (method, sums) in methods.iter_mut().zip(sums) {
            for (task, (tokens, ms)) in sums {
                let speed = method.speed.entry(task).or_default();
                speed.push(tokens / ms * 1e3);
            }
        }
    }
    let found = Found {
        threads,
        prompts: test.list.into_iter().map(|p| p.task).collect(),
        new: options.new,
        methods,
        llama_plain: [llama_plain, llama_server],
        llama_ngram,
        kept: kept.name(),
    };
    found.claim(&mut run.claims);
    found.table(&mut run.text);
    let mut json = found.json();
    json["environment"] = workers[0].greeting.clone();
    json["speculation_tried"] = specs.iter().chain(&draft_specs).map(|s| json!({ "options": label(&s.spec), "tokens_per_s": s.speed, "accepted": s.accepted })).collect();
    Ok(json)
}

struct Found {
    threads: usize,
    /// The task of each prompt.
    prompts: Vec<String>,
    new: usize,
    methods: Vec<Method>,
    /// Plain decoding of llama.cpp, through its library and its server.
    llama_plain: [usize; 2],
    llama_ngram: usize,
    kept: String,
}

/// Which method others are set against on a task.
type Base = fn(&Found, &str) -> usize;

const BASES: [(&str, Base); 2] = [
    ("our plain decoding", |_, _| 0),
    ("llama.cpp plain (the faster way)", Found::plain_of_llama),
];

impl Found {
    fn tasks(&self) -> Vec<&str> {
        let tasks = self.methods[0].speed.keys().map(String::as_str);
        let mut tasks: Vec<&str> = tasks.filter(|task| *task != ALL).collect();
        tasks.push(ALL);
        tasks
    }

    /// The fastest of some methods on a task.
    fn fastest(&self, of: impl IntoIterator<Item = usize>, task: &str) -> usize {
        let speed = |i: &usize| self.methods[*i].of(task).median();
        let fastest = of.into_iter().max_by(|a, b| speed(a).total_cmp(&speed(b)));
        fastest.unwrap_or(0)
    }

    /// The faster of llama.cpp's plain ways on a task.
    fn plain_of_llama(&self, task: &str) -> usize {
        self.fastest(self.llama_plain, task)
    }

    /// How many times as fast one method decodes a task as another, of each prompt its middle time over the rounds; the interval is
    /// over which prompts the task happened to have, the same for both methods.
    fn ratio(&self, one: usize, other: usize, task: &str) -> Interval {
        let costs = |which: usize| -> Vec<(f64, f64)> {
            let of_task = self.prompts.iter().zip(&self.methods[which].costs);
            let of_task = of_task.filter(|(known, _)| task == ALL || *known == task);
            of_task
                .map(|(_, cost)| (cost.tokens.median(), cost.ms.median()))
                .collect()
        };
        let speed = |costs: &[(f64, f64)], chosen: &[usize]| {
            let tokens: f64 = chosen.iter().map(|&i| costs[i].0).sum();
            let ms: f64 = chosen.iter().map(|&i| costs[i].1).sum();
            tokens / ms
        };
        let (one, other) = (costs(one), costs(other));
        Interval::bootstrap(one.len(), |chosen| {
            speed(&one, chosen) / speed(&other, chosen)
        })
    }

    /// Places of this project's methods without a draft model.
    fn model_free(&self) -> std::ops::Range<usize> {
        1..OURS.len()
    }

    fn claim(&self, claims: &mut Claims) {
        let t = self.threads;
        for task in self.tasks() {
            let best = self.fastest(self.model_free(), task);
            if COPYING.contains(&task) {
                let what = |over: &str| format!("{task}: best of ngram and suffix over {over}");
                let plain = self.ratio(best, self.plain_of_llama(task), task);
                claims.at_least(t, what("llama.cpp plain"), 1.8, plain);
                let own = self.ratio(best, self.llama_ngram, task);
                claims.at_least(t, what("llama.cpp's own n-gram speculation"), 2.0, own);
            }
            if task != ALL {
                let over = self.ratio(best, 0, task);
                let what = format!("{task}: best of ngram and suffix over our plain decoding");
                claims.at_least(t, what, 0.97, over);
            }
        }
        for method in &self.methods[self.model_free()] {
            let mut share = Sample::default();
            share.push(method.outside());
            let what = format!("{}: share outside the target's forward", method.name);
            claims.at_most(t, what, 0.03, &share);
        }
    }

    fn table(&self, text: &mut String) {
        let tasks = self.tasks();
        let s = if self.threads == 1 { "" } else { "s" };
        *text += &format!(
            "\n### Prompts, {} thread{s}\n\n{} prompts of the test part, greedy, at most {} new tokens, tokens/s. llama.cpp: {}.\n\n| | tau | {} |\n|---|---|{}\n",
            self.threads,
            self.prompts.len(),
            self.new,
            self.kept,
            tasks.join(" | "),
            "---|".repeat(tasks.len()),
        );
        for (i, method) in self.methods.iter().enumerate() {
            let tau = method
                .tau()
                .map_or("-".into(), |tau: f64| format!("{tau:.2}"));
            let speeds = tasks.iter().map(|task| method.of(task).to_string());
            let bold = if i < OURS.len() { "**" } else { "" };
            *text += &format!(
                "| {bold}{}{bold} | {tau} | {} |\n",
                method.name,
                speeds.collect::<Vec<_>>().join(" | ")
            );
        }
        *text += "\nRatios are of all prompts of a task, each with its middle time over the rounds; in brackets is the 95 % interval over which prompts those happened to be (percentile bootstrap, both sides on the same prompts).\n";
        for (what, base) in BASES {
            *text += &format!(
                "\nOver {what}:\n\n| | {} |\n|---|{}\n",
                tasks.join(" | "),
                "---|".repeat(tasks.len())
            );
            for (i, method) in self.methods.iter().enumerate() {
                let over = |task: &&str| self.ratio(i, base(self, task), task).to_string();
                let ratios: Vec<String> = tasks.iter().map(over).collect();
                *text += &format!("| {} | {} |\n", method.name, ratios.join(" | "));
            }
        }
        let equal = |method: &Method| {
            let pairs = method.ids.iter().zip(&self.methods[0].ids);
            pairs.filter(|(a, b)| a == b).count()
        };
        let same: Vec<String> = self
            .methods
            .iter()
            .skip(1)
            .map(|m| format!("{} {}", m.name, equal(m)))
            .collect();
        *text += &format!(
            "\nTexts equal to our plain decoding, of {}: {}.\n",
            self.prompts.len(),
            same.join("; ")
        );
        let outside: Vec<String> = self.methods[self.model_free()]
            .iter()
            .map(|m| format!("{} {:.2} %", m.name, 100.0 * m.outside()))
            .collect();
        *text += &format!(
            "Work outside the target's forward (propose, accept, commit, detokenise): {}.\n",
            outside.join("; ")
        );
    }

    fn json(&self) -> Value {
        let tasks = self.tasks();
        let methods = self.methods.iter().enumerate().map(|(i, m)| {
            let speeds: Map<String, Value> = m.speed.iter().map(|(task, s)| (task.clone(), s.json())).collect();
            let over = |base: Base| -> Map<String, Value> {
                let ratio = |task: &&str| (task.to_string(), self.ratio(i, base(self, task), task).json());
                tasks.iter().map(ratio).collect()
            };
            let over: Map<String, Value> = BASES.iter().map(|(what, base)| (what.to_string(), over(*base).into())).collect();
            json!({ "name": m.name, "set": m.set, "tau": m.tau(), "outside_forward": m.outside(), "tokens_per_s": speeds, "over": over })
        });
        json!({
            "threads": self.threads, "prompts": self.prompts.len(), "new_tokens": self.new, "llama_cpp": self.kept,
            "methods": methods.collect::<Vec<_>>(),
        })
    }
}
