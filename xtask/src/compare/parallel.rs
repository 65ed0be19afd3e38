//! Plain greedy decoding of several sequences side by side, of this project and of llama.cpp.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::numbers::Sample;
use super::setup::{Build, Setup};
use super::shapes::{best, name, with};
use super::worker::{Parallel, Worker};
use super::{AS_SHIPPED, Claims, Run};

/// Sequences side by side.
const SIDE_BY_SIDE: [usize; 6] = [1, 2, 4, 8, 16, 32];
const MOST: usize = SIDE_BY_SIDE[SIDE_BY_SIDE.len() - 1];
/// Tokens that llama.cpp has room for in each sequence.
const ROOM: usize = 256;

/// A model file and what decoding with it is claimed to reach.
pub(super) struct Model {
    name: &'static str,
    /// Tokens of a prompt, and new ones of each sequence.
    length: usize,
    new: usize,
    /// Tokens a second over llama.cpp's, of one sequence and of four or more; `None` where nothing is claimed.
    over: Option<[f64; 2]>,
    /// Whether time a token of 16 sequences over that of one is claimed.
    sixteen: bool,
}

pub(super) const MODELS: [Model; 3] = [
    Model {
        name: AS_SHIPPED,
        length: 128,
        new: 64,
        over: Some([1.5, 2.0]),
        sixteen: false,
    },
    Model {
        name: "smollm2-q8_0",
        length: 128,
        new: 64,
        over: None,
        sixteen: true,
    },
    Model {
        name: "llama-1.1b-q8_0",
        length: 32,
        new: 32,
        over: Some([1.5, 2.0]),
        sixteen: false,
    },
];

/// Prompts whose texts do not matter for speed, each another.
fn prompts(sequences: usize, length: usize) -> Vec<Vec<u32>> {
    let prompt = |sequence: u32| {
        let token = |i: u32| 1000 + (37 * i + 611 * sequence) % 20_000;
        (0..length as u32).map(token).collect()
    };
    (0..sequences as u32).map(prompt).collect()
}

/// Tokens a second of all sequences together.
fn speed(found: &Parallel, new: usize) -> f64 {
    (found.ids.len() * (new - 1)) as f64 / found.ms * 1e3
}

/// One try of llama.cpp's options, in tokens a second.
struct Tried {
    build: Build,
    options: Value,
    one: f64,
    eight: f64,
    /// Of the most sequences, where they were tried.
    most: Option<f64>,
}

impl Tried {
    fn name(&self) -> String {
        name(&self.build, &self.options)
    }

    fn json(&self) -> Value {
        json!({ "options": self.name(), "tokens_per_s": { "1": self.one, "8": self.eight, MOST.to_string(): self.most } })
    }
}

fn try_speed(worker: &mut Worker, sequences: usize, length: usize) -> Result<f64> {
    let new = 24;
    let found = worker.parallel(&prompts(sequences, length), new)?;
    Ok(speed(&found, new))
}

fn attempt(
    setup: &Setup,
    (model, length): (&Path, usize),
    build: &Build,
    options: Value,
) -> Result<Tried> {
    let mut worker = setup.engine(build, model, &options)?;
    let one = try_speed(&mut worker, 1, length)?;
    let tried = Tried {
        one: one.max(try_speed(&mut worker, 1, length)?),
        eight: try_speed(&mut worker, 8, length)?,
        most: None,
        build: build.clone(),
        options,
    };
    eprintln!(
        "  tried {}: {:.1} tokens/s, of eight sequences {:.1}",
        tried.name(),
        tried.one,
        tried.eight
    );
    Ok(tried)
}

/// llama.cpp's builds and options, tried on a model with one sequence and with eight: attention fused or not, and from the best of
/// those, all sequences in one cache, threads that keep spinning between graphs, and one thread. The three best of eight are tried
/// with the most.
fn tune(setup: &Setup, on: (&Path, usize), threads: usize) -> Result<Vec<Tried>> {
    let mut tried = Vec::new();
    for build in &setup.builds {
        for flash in [true, false] {
            // Room for sequences that do not run costs those that do nothing.
            let options = json!({ "threads": threads, "flash": flash, "sequences": MOST, "context": MOST * ROOM });
            tried.push(attempt(setup, on, build, options)?);
        }
    }
    let fastest = |of: fn(&Tried) -> f64| {
        let found = &tried[best(&tried, of)];
        (found.build.clone(), found.options.clone())
    };
    let (one, eight) = (fastest(|t| t.one), fastest(|t| t.eight));
    let mut bases = vec![eight];
    if one != bases[0] {
        bases.push(one);
    }
    let mut more = vec![("unified", json!(true))];
    if threads > 1 {
        more.push(("wait", json!("active")));
        more.push(("threads", json!(1)));
    }
    for (build, options) in bases {
        for (key, value) in &more {
            let options = with(&options, key, value.clone());
            tried.push(attempt(setup, on, &build, options)?);
        }
    }
    tried.sort_by(|a, b| b.eight.total_cmp(&a.eight));
    for tried in tried.iter_mut().take(3) {
        let mut worker = setup.engine(&tried.build, on.0, &tried.options)?;
        let found = try_speed(&mut worker, MOST, on.1)?;
        eprintln!(
            "  tried {}: of {MOST} sequences {found:.1} tokens/s",
            tried.name()
        );
        tried.most = Some(found);
    }
    Ok(tried)
}

/// Everything measured of one engine, for each number of sequences.
#[derive(Default)]
struct Measured {
    decode: [Sample; SIDE_BY_SIDE.len()],
    prefill: [Sample; SIDE_BY_SIDE.len()],
    /// Share of the time that was spent outside the library, where it was told.
    outside: [Sample; SIDE_BY_SIDE.len()],
    /// Of each sequence in the last round.
    ids: [Vec<Vec<u64>>; SIDE_BY_SIDE.len()],
}

impl Measured {
    fn add(&mut self, i: usize, model: &Model, found: Parallel) {
        let tokens = (SIDE_BY_SIDE[i] * model.length) as f64;
        self.decode[i].push(speed(&found, model.new));
        self.prefill[i].push(tokens / found.prefill_ms * 1e3);
        if let Some(outside) = found.outside {
            self.outside[i].push(outside / found.ms);
        }
        self.ids[i] = found.ids;
    }

    /// Time a token over that of one sequence alone.
    fn cost(&self, i: usize) -> Sample {
        self.decode[0].over(&self.decode[i])
    }

    fn json(&self) -> Value {
        let of = |samples: &dyn Fn(usize) -> Sample| -> Map<String, Value> {
            let told = SIDE_BY_SIDE.iter().enumerate();
            let told = told.map(|(i, b)| (b.to_string(), samples(i)));
            let told = told.filter(|(_, sample)| !sample.median().is_nan());
            told.map(|(b, sample)| (b, sample.json())).collect()
        };
        json!({
            "tokens_per_s": of(&|i| self.decode[i].clone()), "prefill_per_s": of(&|i| self.prefill[i].clone()),
            "time_a_token_over_1": of(&|i| self.cost(i)), "outside_library": of(&|i| self.outside[i].clone()),
        })
    }
}

/// Measures one model with a number of threads; adds a table and claims, and returns everything.
pub(super) fn measure(run: &mut Run, model: &Model, threads: usize) -> Result<Value> {
    eprintln!("{} side by side, {threads} threads", model.name);
    let (setup, options) = (&run.setup, &run.options);
    let path = setup.model(model.name)?;
    let tried = tune(setup, (&path, model.length), threads)?;
    // The best for one sequence, for some and for many; often the same process.
    let kept = [
        best(&tried, |t| t.one),
        best(&tried, |t| t.eight),
        best(&tried, |t| t.most.unwrap_or(0.0)),
    ];
    let mut llama: Vec<(usize, Worker)> = Vec::new();
    for which in kept {
        if !llama.iter().any(|(known, _)| *known == which) {
            let tried = &tried[which];
            llama.push((which, setup.engine(&tried.build, &path, &tried.options)?));
        }
    }
    let mut ours = setup.scylla(&path, threads)?;
    let (mut us, mut them, mut read) =
        (Measured::default(), Measured::default(), Sample::default());
    for round in 0..options.rounds {
        let rate = ours.ask(&json!({ "op": "read" }))?["gb_per_s"].as_f64();
        read.push(rate.unwrap_or(f64::NAN));
        for (i, &sequences) in SIDE_BY_SIDE.iter().enumerate() {
            let prompts = prompts(sequences, model.length);
            let which = match sequences {
                1 => kept[0],
                2..=8 => kept[1],
                _ => kept[2],
            };
            for turn in 0..2 {
                // Each side goes first in turn.
                if (turn + round + i) % 2 == 0 {
                    us.add(i, model, ours.parallel(&prompts, model.new)?);
                } else if let Some((_, worker)) = llama.iter_mut().find(|(w, _)| *w == which) {
                    them.add(i, model, worker.parallel(&prompts, model.new)?);
                }
            }
        }
        eprint!("\r  round {} of {} ", round + 1, options.rounds);
    }
    eprintln!();
    let simd = ours.greeting["simd"].as_str().unwrap_or_default();
    let found = Found {
        model,
        threads,
        us,
        them,
        read,
        wide: simd.starts_with("avx512") || simd == "vnni",
        kept: kept.map(|i| tried[i].name()),
    };
    found.claim(&mut run.claims);
    found.table(&mut run.text);
    let mut json = found.json();
    json["ours"]["environment"] = ours.greeting.clone();
    let systems = llama.iter().map(|(_, worker)| worker.greeting.clone());
    json["llama_cpp"]["systems"] = systems.collect();
    json["llama_cpp"]["tried"] = tried.iter().map(Tried::json).collect();
    Ok(json)
}

struct Found<'a> {
    model: &'a Model,
    threads: usize,
    us: Measured,
    them: Measured,
    read: Sample,
    /// Whether this processor has the widest vectors that the kernels know.
    wide: bool,
    /// Options kept for one sequence, for up to eight and for more.
    kept: [String; 3],
}

impl Found<'_> {
    fn over(&self, i: usize) -> Sample {
        self.us.decode[i].over(&self.them.decode[i])
    }

    /// Sequences of which both sides have the same ids.
    fn equal(&self, i: usize) -> usize {
        let pairs = self.us.ids[i].iter().zip(&self.them.ids[i]);
        pairs.filter(|(a, b)| a == b).count()
    }

    fn claim(&self, claims: &mut Claims) {
        for (i, &sequences) in SIDE_BY_SIDE.iter().enumerate() {
            let what = |what: &str| format!("{}: {what}", self.model.name);
            if let Some([one, more]) = self.model.over {
                let wanted = match sequences {
                    1 => Some(one),
                    4.. => Some(more),
                    _ => None,
                };
                let s = if sequences == 1 { "" } else { "s" };
                let what = what(&format!(
                    "plain decoding of {sequences} sequence{s} over llama.cpp"
                ));
                if let Some(wanted) = wanted {
                    claims.at_least(self.threads, what, wanted, &self.over(i));
                }
            }
            if self.model.sixteen && sequences == 16 {
                let wanted = if self.wide { 0.16 } else { 0.35 };
                let what = what("time a token of 16 sequences over that of one");
                claims.at_most(self.threads, what, wanted, &self.us.cost(i));
            }
        }
    }

    fn table(&self, text: &mut String) {
        let s = if self.threads == 1 { "" } else { "s" };
        let most = self.them.outside.iter().map(Sample::median);
        *text += &format!(
            "\n### {} side by side, {} thread{s}\n\nGreedy, prompts of {} tokens, {} new tokens of each sequence; tokens/s of all sequences together. Memory read at {} GB/s between the rounds. llama.cpp: {} for one sequence; {} for 2 to 8; {} for more; at most {:.1} % of its time outside its library.\n\n",
            self.model.name,
            self.threads,
            self.model.length,
            self.model.new,
            self.read,
            self.kept[0],
            self.kept[1],
            self.kept[2],
            100.0 * most.fold(0.0, f64::max),
        );
        *text += "| sequences | scylla | llama.cpp | ratio | scylla: time a token over one alone | llama.cpp: the same | equal texts |\n|---|---|---|---|---|---|---|\n";
        for (i, sequences) in SIDE_BY_SIDE.iter().enumerate() {
            *text += &format!(
                "| {sequences} | {} | {} | {} | {} | {} | {} |\n",
                self.us.decode[i],
                self.them.decode[i],
                self.over(i),
                self.us.cost(i),
                self.them.cost(i),
                self.equal(i),
            );
        }
    }

    fn json(&self) -> Value {
        let by = |of: &dyn Fn(usize) -> Value| -> Map<String, Value> {
            let told = SIDE_BY_SIDE.iter().enumerate();
            told.map(|(i, b)| (b.to_string(), of(i))).collect()
        };
        json!({
            "model": self.model.name, "threads": self.threads, "prompt_tokens": self.model.length, "new_tokens": self.model.new,
            "read_gb_per_s": self.read.json(), "ours": self.us.json(), "llama_cpp": self.them.json(),
            "ratio": by(&|i| self.over(i).json()), "equal_texts": by(&|i| json!(self.equal(i))),
            "kept": { "1": self.kept[0], "2-8": self.kept[1], "16-32": self.kept[2] },
        })
    }
}
