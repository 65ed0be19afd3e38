//! Plain decoding, prefill and the cost of a forward of m rows, behind 512 tokens, on model files of several shapes.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::numbers::Sample;
use super::setup::{Build, Setup};
use super::worker::Worker;
use super::{Claims, Run};

/// Tokens in the cache.
const CONTEXT: usize = 512;
/// Rows of a forward.
pub(super) const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// A model file and what decoding it is claimed to reach.
pub(super) struct Model {
    pub(super) name: &'static str,
    /// New tokens of one round.
    new: usize,
    /// Plain decoding over llama.cpp's.
    plain: f64,
    /// Time of a forward of 8 and of 16 rows over llama.cpp's; `None` where nothing is claimed.
    eight: Option<f64>,
    sixteen: Option<f64>,
    /// Speed of prefill over llama.cpp's.
    prefill: Option<f64>,
    /// Whether the slow peers take part.
    every_peer: bool,
}

pub(super) const MODELS: [Model; 5] = [
    Model {
        name: super::AS_SHIPPED,
        new: 64,
        plain: 1.5,
        eight: None,
        sixteen: None,
        prefill: None,
        every_peer: true,
    },
    Model {
        name: "smollm2-q8_0",
        new: 64,
        plain: 1.5,
        eight: Some(0.6),
        sixteen: Some(0.6),
        prefill: Some(1.0),
        every_peer: true,
    },
    Model {
        name: "llama-1.1b-q8_0",
        new: 32,
        plain: 1.2,
        eight: Some(0.6),
        sixteen: Some(0.6),
        prefill: Some(1.0),
        every_peer: false,
    },
    Model {
        name: "llama-1.1b-q4_0",
        new: 32,
        plain: 1.2,
        eight: None,
        sixteen: None,
        prefill: None,
        every_peer: false,
    },
    Model {
        name: "qwen2.5-0.5b-q8_0",
        new: 32,
        plain: 1.0,
        eight: Some(1.0),
        sixteen: None,
        prefill: None,
        every_peer: false,
    },
];

/// Whether the slow peers take part on a model.
pub(super) fn has_slow_peers(model: &str) -> bool {
    MODELS.iter().any(|m| m.name == model && m.every_peer)
}

/// A prompt whose text does not matter for speed.
fn prompt() -> Vec<u32> {
    (0..CONTEXT as u32)
        .map(|i| 1000 + 37 * i % 20_000)
        .collect()
}

/// One try of llama.cpp's options.
pub(super) struct Tried {
    pub(super) build: Build,
    pub(super) options: Value,
    /// Tokens a second.
    pub(super) decode: f64,
    prefill: f64,
    /// Milliseconds of eight rows.
    eight: f64,
}

impl Tried {
    /// As results name it.
    pub(super) fn name(&self) -> String {
        name(&self.build, &self.options)
    }

    fn json(&self) -> Value {
        json!({ "options": self.name(), "tokens_per_s": self.decode, "prefill_per_s": self.prefill, "forward_8_ms": self.eight })
    }
}

/// As results name a build with its options, but for those that only make room.
pub(super) fn name(build: &Build, options: &Value) -> String {
    let options = options.as_object().into_iter().flatten();
    let shown = options.filter(|(key, _)| !["context", "sequences"].contains(&key.as_str()));
    let words: Vec<String> = shown
        .map(|(key, value)| format!("{key} {value}").replace('"', ""))
        .collect();
    format!("{}, {}", build.name, words.join(", "))
}

/// Options with one more.
pub(super) fn with(options: &Value, key: &str, value: Value) -> Value {
    let mut options = options.clone();
    options[key] = value;
    options
}

fn attempt(setup: &Setup, model: &Path, build: &Build, options: Value) -> Result<Tried> {
    let mut worker = setup.engine(build, model, &options)?;
    let (prompt, new) = (prompt(), 24);
    let decoded = worker.decode(&prompt, new, &[], &[])?;
    let mut eight = f64::INFINITY;
    for _ in 0..2 {
        eight = eight.min(worker.forward(8, CONTEXT)?);
    }
    let tried = Tried {
        build: build.clone(),
        options,
        decode: (new - 1) as f64 / decoded.ms * 1e3,
        prefill: CONTEXT as f64 / decoded.prefill_ms * 1e3,
        eight,
    };
    eprintln!(
        "  tried {}: {:.1} tokens/s, prefill {:.0}, eight rows {:.1} ms",
        tried.name(),
        tried.decode,
        tried.prefill,
        tried.eight
    );
    Ok(tried)
}

/// Which of some tries has the most of something.
pub(super) fn best<T>(tried: &[T], of: impl Fn(&T) -> f64) -> usize {
    let order = (0..tried.len()).max_by(|&a, &b| of(&tried[a]).total_cmp(&of(&tried[b])));
    order.unwrap_or(0)
}

/// llama.cpp's builds and options, tried on a model: attention fused or not, and from the best of those, threads that keep spinning
/// between graphs, one thread for single rows, and smaller batches.
pub(super) fn tune(setup: &Setup, model: &Path, threads: usize) -> Result<Vec<Tried>> {
    let mut tried = Vec::new();
    for build in &setup.builds {
        for flash in [true, false] {
            let options = json!({ "threads": threads, "flash": flash });
            tried.push(attempt(setup, model, build, options)?);
        }
    }
    let fastest = &tried[best(&tried, |t| t.decode)];
    let (build, options) = (fastest.build.clone(), fastest.options.clone());
    let filler = &tried[best(&tried, |t| t.prefill)];
    let (filling, filled) = (filler.build.clone(), filler.options.clone());
    let mut more = vec![
        (filling.clone(), with(&filled, "ubatch", json!(128))),
        (filling, with(&filled, "ubatch", json!(256))),
    ];
    if threads > 1 {
        more.push((build.clone(), with(&options, "wait", json!("active"))));
        let mut one = with(&options, "threads_batch", json!(threads));
        one["threads"] = json!(1);
        more.push((build, one));
    }
    for (build, options) in more {
        tried.push(attempt(setup, model, &build, options)?);
    }
    Ok(tried)
}

/// Everything measured of one engine.
#[derive(Default)]
struct Measured {
    decode: Sample,
    prefill: Sample,
    forward: [Sample; ROWS.len()],
}

impl Measured {
    fn decode(&mut self, worker: &mut Worker, new: usize) -> Result<()> {
        let decoded = worker.decode(&prompt(), new, &[], &[])?;
        self.decode.push((new - 1) as f64 / decoded.ms * 1e3);
        self.prefill.push(CONTEXT as f64 / decoded.prefill_ms * 1e3);
        Ok(())
    }

    fn json(&self) -> Value {
        let mut forward = Map::new();
        for (rows, sample) in ROWS.iter().zip(&self.forward) {
            if !sample.median().is_nan() {
                forward.insert(rows.to_string(), sample.json());
            }
        }
        json!({ "tokens_per_s": self.decode.json(), "prefill_per_s": self.prefill.json(), "forward_ms": forward })
    }
}

/// Measures one model with a number of threads; prints a table, adds claims, and returns everything.
pub(super) fn measure(run: &mut Run, model: &Model, threads: usize) -> Result<Value> {
    eprintln!("{}, {threads} threads", model.name);
    let tried = run.tuned(model.name, threads)?;
    let (setup, options) = (&run.setup, &run.options);
    let path = setup.model(model.name)?;
    // The best for each kind of work; often the same process.
    let decode = best(&tried, |t| t.decode);
    let filling = best(&tried, |t| t.prefill);
    let rows = best(&tried, |t| -t.eight);
    let mut llama: Vec<(usize, Worker)> = Vec::new();
    for which in [decode, filling, rows] {
        if !llama.iter().any(|(known, _)| *known == which) {
            let tried = &tried[which];
            llama.push((which, setup.engine(&tried.build, &path, &tried.options)?));
        }
    }
    let mut ours = setup.scylla(&path, threads)?;
    let mut others: Vec<(&str, Worker, Measured)> = Vec::new();
    if model.every_peer {
        for (name, worker) in setup.slow_peers(&path, threads)? {
            others.push((name, worker, Measured::default()));
        }
    }
    let (mut us, mut them, mut read) =
        (Measured::default(), Measured::default(), Sample::default());
    for round in 0..options.rounds {
        let rate = ours.ask(&json!({ "op": "read" }))?["gb_per_s"].as_f64();
        read.push(rate.unwrap_or(f64::NAN));
        // Each side goes first in turn.
        let mut llama_decodes = |them: &mut Measured| -> Result<()> {
            for (which, worker) in &mut llama {
                let mut found = Measured::default();
                found.decode(worker, model.new)?;
                if *which == decode {
                    them.decode.push(found.decode.median());
                }
                if *which == filling {
                    them.prefill.push(found.prefill.median());
                }
            }
            Ok(())
        };
        if round % 2 == 0 {
            us.decode(&mut ours, model.new)?;
            llama_decodes(&mut them)?;
        } else {
            llama_decodes(&mut them)?;
            us.decode(&mut ours, model.new)?;
        }
        for (_, worker, found) in &mut others {
            found.decode(worker, model.new / 2)?;
        }
        ours.prefill(&prompt())?;
        for (i, &m) in ROWS.iter().enumerate() {
            for turn in 0..2 {
                if (turn + round + i) % 2 == 0 {
                    us.forward[i].push(ours.forward(m, CONTEXT)?);
                } else if let Some((_, worker)) = llama.iter_mut().find(|(w, _)| *w == rows) {
                    them.forward[i].push(worker.forward(m, CONTEXT)?);
                }
            }
        }
    }
    let found = Found {
        model,
        threads,
        us,
        them,
        read,
        others: others
            .into_iter()
            .map(|(name, worker, found)| (name, worker.greeting["version"].to_string(), found))
            .collect(),
        kept: [decode, filling, rows].map(|i| tried[i].name()),
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
    /// Name, version and numbers.
    others: Vec<(&'static str, String, Measured)>,
    /// Options kept for decoding, prefill and forwards of several rows.
    kept: [String; 3],
}

impl Found<'_> {
    fn claim(&self, claims: &mut Claims) {
        let (m, t) = (self.model, self.threads);
        let name = |what: &str| format!("{}: {what} over llama.cpp", m.name);
        let decode = self.us.decode.over(&self.them.decode);
        claims.at_least(t, name("plain decoding"), m.plain, &decode);
        for (rows, wanted) in [(8, m.eight), (16, m.sixteen)] {
            let i = ROWS.iter().position(|&r| r == rows);
            if let (Some(i), Some(wanted)) = (i, wanted) {
                let ratio = self.us.forward[i].over(&self.them.forward[i]);
                claims.at_most(t, name(&format!("time of forward({rows})")), wanted, &ratio);
            }
        }
        if let Some(wanted) = m.prefill {
            let ratio = self.us.prefill.over(&self.them.prefill);
            claims.at_least(t, name("prefill of 512 tokens"), wanted, &ratio);
        }
    }

    fn table(&self, text: &mut String) {
        let s = if self.threads == 1 { "" } else { "s" };
        *text += &format!(
            "\n### {}, {} thread{s}\n\nMemory read at {} GB/s between the rounds. llama.cpp: {} for decoding; {} for prefill; {} for the curve.\n\n",
            self.model.name, self.threads, self.read, self.kept[0], self.kept[1], self.kept[2],
        );
        *text += "| | scylla | llama.cpp | ratio |\n|---|---|---|---|\n";
        let mut line = |what: &str, a: &Sample, b: &Sample| {
            *text += &format!("| {what} | {a} | {b} | {} |\n", a.over(b));
        };
        line(
            "plain decoding, tokens/s",
            &self.us.decode,
            &self.them.decode,
        );
        line("prefill, tokens/s", &self.us.prefill, &self.them.prefill);
        for (i, rows) in ROWS.iter().enumerate() {
            let what = format!("forward({rows}), ms");
            line(&what, &self.us.forward[i], &self.them.forward[i]);
        }
        let c = |m: &Measured, i: usize| m.forward[i].over(&m.forward[0]);
        for (i, rows) in ROWS.iter().enumerate().skip(2).take(3) {
            line(&format!("c({rows})"), &c(&self.us, i), &c(&self.them, i));
        }
        for (name, version, found) in &self.others {
            let (plain, prefill) = (&found.decode, &found.prefill);
            *text += &format!(
                "\n{name} {}: plain {plain} tokens/s, scylla {} times as fast; prefill {prefill} tokens/s, {} times.\n",
                version.trim_matches('"'),
                self.us.decode.over(plain),
                self.us.prefill.over(prefill),
            );
        }
    }

    fn json(&self) -> Value {
        let others: Map<String, Value> = self
            .others
            .iter()
            .map(|(name, version, found)| {
                (
                    format!("{name} {}", version.trim_matches('"')),
                    found.json(),
                )
            })
            .collect();
        json!({
            "model": self.model.name, "threads": self.threads, "read_gb_per_s": self.read.json(),
            "ours": self.us.json(), "llama_cpp": self.them.json(), "others": others,
            "kept": { "decode": self.kept[0], "prefill": self.kept[1], "forward": self.kept[2] },
        })
    }
}
