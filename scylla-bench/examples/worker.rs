//! This project's side of `cargo xtask compare`: it answers one JSON request a line.
//!
//! usage: worker MODEL OPTIONS
//!
//! OPTIONS is a JSON object: `threads`. Requests, answered with milliseconds:
//! - `{"op": "prefill", "tokens": [..]}` empties the cache and runs the tokens, logits of the last;
//! - `{"op": "forward", "rows": m}` runs m rows behind them with the logits of each, three times, and tells the middle time;
//! - `{"op": "decode", "prompt": [..], "new": n, "eos": [..], "set": ["draft.name=ngram", ..]}` decodes with the overrides
//!   of an experiment;
//! - `{"op": "parallel", "prompts": [[..], ..], "new": n}` decodes all prompts side by side;
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
use scylla_bench::{Composed, Error, Override, Registry, Result, Session, prompts};
use scylla_core::engine::{self, Engine, Event, Options as EngineOptions, Parts, Phases};
use scylla_core::kernels::Pool;
use scylla_core::plugin::Want;
use scylla_core::text::Message;
use scylla_verify::Auto;
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
    Parallel {
        prompts: Vec<Vec<u32>>,
        new: usize,
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
    decoders: HashMap<Vec<String>, (Experiment, Composed)>,
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
            Request::Parallel { prompts, new } => self.parallel(prompts, new),
            Request::Prompts { part, per_task } => self.prompts(part, per_task),
            Request::Read => Ok(json!({ "gb_per_s": read(self.session.options.threads) })),
        }
    }

    /// In chunks, as an engine does it.
    fn prefill(&mut self, tokens: &[u32]) -> Result<Value> {
        let model = self.session.target.model.as_mut();
        model.close(0);
        model.open(0)?;
        let begun = Instant::now();
        let mut token = None;
        let chunk = EngineOptions::default().prompt_rows;
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
            let composed = self.session.compose(&self.registry, &experiment)?;
            self.decoders.insert(set.clone(), (experiment, composed));
        }
        let Some((experiment, composed)) = self.decoders.get_mut(&set) else {
            return Err(Error::Experiment("no decoder".into()));
        };
        let request = engine::Request {
            max_new_tokens: new,
            eos,
            ..self.session.request(experiment, composed, prompt, 0)
        };
        let measured = std::mem::take(&mut composed.measured);
        let options = experiment.run.options(1);
        let mut engine = self.session.engine(composed, options)?;
        engine.resume(measured);
        let begun = Instant::now();
        let mut go_on = |_: &Event| ControlFlow::Continue(());
        let told = engine::decode(&mut engine, vec![request], &mut go_on);
        let whole = ms(begun);
        let measured = engine.measured().clone();
        drop(engine);
        composed.measured = measured;
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

    /// Plain greedy decoding of as many sequences side by side. The time is that of the steps after the last prompt ended.
    fn parallel(&mut self, prompts: Vec<Vec<u32>>, new: usize) -> Result<Value> {
        let model = &mut self.session.target.model;
        model.close(0);
        let options = EngineOptions {
            batch: prompts.len(),
            // All prompts in one step, so that no sequence is ahead of the others.
            prompt_rows: prompts.iter().map(Vec::len).sum::<usize>().max(1),
            ..EngineOptions::default()
        };
        let mut engine = Engine::new(Parts::plain(model, Auto), options)?;
        for prompt in prompts {
            engine.submit(engine::Request {
                prompt,
                max_new_tokens: new,
                ..engine::Request::default()
            })?;
        }
        let (mut ids, mut prefill_ms, mut decode_ms) = (Vec::new(), 0.0, 0.0);
        let mut phases = Phases::default();
        while !engine.is_idle() {
            let begun = Instant::now();
            let events = engine.step();
            let whole = ms(begun);
            for event in events {
                match event {
                    Event::Step(step) if step.prompt_rows > 0 => prefill_ms += whole,
                    Event::Step(step) => {
                        decode_ms += whole;
                        phases.add(&step.ms);
                    }
                    Event::Finished { request, output } => ids.push((request, output)),
                    _ => {}
                }
            }
        }
        ids.sort_by_key(|(request, _)| *request);
        if let Some(failed) = ids.iter().find_map(|(_, output)| output.failed.clone()) {
            return Err(Error::Experiment(failed));
        }
        let ids: Vec<Vec<u32>> = ids.into_iter().map(|(_, output)| output.ids).collect();
        Ok(json!({
            "ms": decode_ms, "prefill_ms": prefill_ms, "ids": ids,
            "forward": phases.forward, "accept": phases.accept, "commit": phases.commit,
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
            let message = Message::user(&prompt.turns[0]);
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
