//! This project's side of `cargo xtask compare`: it answers one JSON request a line.
//!
//! usage: worker MODEL OPTIONS
//!
//! OPTIONS is a JSON object: `threads`. Requests, answered with milliseconds:
//! - `{"op": "prefill", "tokens": [..]}` empties the cache and runs the tokens, logits of the last;
//! - `{"op": "forward", "rows": m}` runs m rows behind them with the logits of each, three times, and tells the middle time;
//! - `{"op": "decode", "prompt": [..], "new": n, "eos": [..], "set": ["draft.name=ngram", ..]}` decodes with the overrides
//!   of an experiment;
//! - `{"op": "prompts", "part": .., "per_task": n}` lists prompts of the project's set as token ids;
//! - `{"op": "read"}` measures how fast all threads read memory.

#[path = "../benches/common/mod.rs"]
mod common;

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::ops::ControlFlow;
use std::time::Instant;

use scylla_bench::experiment::Experiment;
use scylla_bench::prompts::PromptSpec;
use scylla_bench::{Decoder, Error, Override, Registry, Result, Session, prompts};
use scylla_core::decode::{Job, Phases, Settings};
use scylla_core::kernels::Pool;
use scylla_core::plugin::Want;
use scylla_core::text::Message;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Options {
    threads: usize,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
enum Request {
    Prefill {
        tokens: Vec<u32>,
    },
    Forward {
        rows: u32,
    },
    Decode {
        prompt: Vec<u32>,
        new: usize,
        eos: Vec<u32>,
        set: Vec<String>,
    },
    Prompts {
        part: String,
        per_task: usize,
    },
    Read,
}

struct Worker {
    session: Session,
    registry: Registry,
    decoders: HashMap<Vec<String>, (Experiment, Decoder)>,
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(model), Some(options)) = (args.next(), args.next()) else {
        return Err("usage: worker MODEL OPTIONS".into());
    };
    let options: Options = serde_json::from_str(&options)?;
    let threads = Override::number("run.threads", options.threads as u64);
    let experiment = Experiment::from_overrides(&[Override::new("target.model", model), threads])?;
    let mut worker = Worker {
        session: Session::open(&experiment, &mut |_| {})?,
        registry: Registry::default(),
        decoders: HashMap::new(),
    };
    println!("{}", serde_json::to_string(&worker.session.environment()?)?);
    for line in std::io::stdin().lock().lines() {
        let answer = worker.answer(serde_json::from_str(&line?)?)?;
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn ms(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

impl Worker {
    fn answer(&mut self, request: Request) -> Result<Value> {
        match request {
            Request::Prefill { tokens } => self.prefill(&tokens),
            Request::Forward { rows } => self.forward(rows),
            Request::Decode {
                prompt,
                new,
                eos,
                set,
            } => self.decode(prompt, new, eos, set),
            Request::Prompts { part, per_task } => self.prompts(part, per_task),
            Request::Read => Ok(json!({ "gb_per_s": read(self.session.options.threads) })),
        }
    }

    /// In chunks, as the decode loop does it.
    fn prefill(&mut self, tokens: &[u32]) -> Result<Value> {
        let model = self.session.target.model.as_mut();
        model.close(0);
        model.open(0)?;
        let begun = Instant::now();
        let mut token = None;
        let chunk = Settings::default().prefill_chunk;
        let last = tokens.len().div_ceil(chunk) - 1;
        for (i, chunk) in tokens.chunks(chunk).enumerate() {
            let want = if i == last { Want::Last } else { Want::None };
            let found = model.forward(&common::rows(chunk, want))?;
            model.commit(0, &(0..chunk.len()).collect::<Vec<_>>())?;
            if let Some(logits) = found.logits.first().filter(|_| i == last) {
                token = logits.argmax(&[0], logits.columns)?.first().copied();
            }
        }
        Ok(json!({ "ms": ms(begun), "token": token }))
    }

    fn forward(&mut self, rows: u32) -> Result<Value> {
        let tokens: Vec<u32> = (1000..1000 + rows).collect();
        let model = self.session.target.model.as_mut();
        let mut times = Vec::new();
        for _ in 0..3 {
            let begun = Instant::now();
            let found = model.forward(&common::rows(&tokens, Want::All))?;
            times.push(ms(begun));
            model.recycle(found);
            model.commit(0, &[])?;
        }
        Ok(json!({ "ms": common::median(times) }))
    }

    fn decode(
        &mut self,
        prompt: Vec<u32>,
        new: usize,
        eos: Vec<u32>,
        set: Vec<String>,
    ) -> Result<Value> {
        self.session.target.model.close(0);
        if !self.decoders.contains_key(&set) {
            let experiment = Experiment::from_overrides(&Override::parse_all(&set)?)?;
            let decoder = self.session.decoder(&self.registry, &experiment)?;
            self.decoders.insert(set.clone(), (experiment, decoder));
        }
        let Some((experiment, decoder)) = self.decoders.get_mut(&set) else {
            return Err(Error::Experiment("no decoder".into()));
        };
        let settings = Settings {
            max_new_tokens: new,
            eos,
            ..self.session.settings(experiment)
        };
        let job = Job {
            prompt,
            sequence: 0,
        };
        let begun = Instant::now();
        let mut go_on = |_: scylla_core::decode::Event<'_>| ControlFlow::Continue(());
        let told = self
            .session
            .decode(decoder, &[job], &settings, &mut go_on)?;
        let whole = ms(begun);
        let Some(output) = told.into_iter().next() else {
            return Err(Error::Experiment("no output".into()));
        };
        if let Some(failed) = output.failed {
            return Err(Error::Experiment(failed));
        }
        let Phases {
            prefill,
            propose,
            forward,
            accept,
            commit,
        } = output.ms;
        Ok(json!({
            "ids": output.ids, "ms": whole - prefill, "prefill_ms": prefill, "cycles": output.cycles.len(),
            "propose": propose, "forward": forward, "accept": accept, "commit": commit,
        }))
    }

    /// The first turn of each prompt through the chat template.
    fn prompts(&self, part: String, per_task: usize) -> Result<Value> {
        let wanted = PromptSpec {
            part,
            per_task,
            ..Default::default()
        };
        let mut found = Vec::new();
        for prompt in prompts::select(prompts::load(prompts::CORE)?, &wanted)? {
            let message = Message {
                role: "user",
                content: prompt.turns[0].clone(),
            };
            let ids = self.session.prompt(&[message], &wanted)?;
            found.push(json!({ "id": prompt.id, "task": prompt.category, "ids": ids }));
        }
        Ok(json!({ "prompts": found, "eos": self.session.eos }))
    }
}

/// Bytes a second that all threads read together, in units of 10^9: the best of some.
fn read(threads: usize) -> f64 {
    let (pool, data) = (Pool::new(threads), common::memory());
    let rates: Vec<f64> = (0..5).map(|_| common::read_rate(&pool, &data)).collect();
    common::best(&rates) / 1e9
}
