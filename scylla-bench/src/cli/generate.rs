//! `scylla generate`

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use scylla_core::decode::{Cycle, Event, Finish, Job, Phases};
use scylla_core::text::Message;
use serde::Serialize;

use super::{ModelOptions, print_json, with_download};
use crate::experiment::Experiment;
use crate::{Error, Registry, Result, Session};

#[derive(Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub(super) struct Generate {
    /// Model: `default`, a directory, a GGUF file, or a hub id
    #[arg(long, default_value = "default")]
    target: String,
    /// Draft by name, with the directory of its weights behind a colon
    #[arg(long, value_name = "NAME[:DIR]", default_value = crate::registry::PLAIN)]
    draft: String,
    /// Acceptance rule by name
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,
    /// Prompt, through the chat template
    #[arg(long, group = "input")]
    prompt: Option<String>,
    /// Prompt as token ids, taken as they are
    #[arg(long, group = "input", value_name = "1,2,3")]
    prompt_ids: Option<String>,
    /// File that holds the prompt
    #[arg(long, group = "input", value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Without the chat template
    #[arg(long)]
    raw: bool,
    /// Limit of new tokens
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 means greedy
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Keep the K most probable tokens
    #[arg(long)]
    top_k: Option<usize>,
    /// Keep the smallest set of tokens with this mass
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Seed of the random stream
    #[arg(long)]
    seed: Option<u64>,
    /// Decode past the end-of-sequence ids
    #[arg(long)]
    ignore_eos: bool,
    /// Override any field of the experiment
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelOptions,
}

#[derive(Serialize)]
struct Answer {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    text: String,
    tau: Option<f64>,
    finish: Finish,
    cycles: Vec<Cycle>,
    timings_ms: Phases,
}

impl Generate {
    fn experiment(&self) -> Result<Experiment> {
        let mut set = self.model.overrides();
        set.push(format!("target.model={:?}", self.target));
        let (draft, dir) = match self.draft.split_once(':') {
            Some((name, dir)) => (name, Some(dir)),
            None => (self.draft.as_str(), None),
        };
        set.push(format!("draft.name={draft:?}"));
        set.extend(dir.map(|d| format!("draft.dir={d:?}")));
        set.extend(self.rule.as_ref().map(|r| format!("verifier.name={r:?}")));
        set.push(format!("run.max_new_tokens={}", self.max_new_tokens));
        set.extend(
            self.temperature
                .map(|v| format!("sampling.temperature={v:?}")),
        );
        set.extend(self.top_k.map(|v| format!("sampling.top_k={v}")));
        set.extend(self.top_p.map(|v| format!("sampling.top_p={v:?}")));
        set.extend(self.seed.map(|v| format!("run.seed={v}")));
        set.push(format!("run.ignore_eos={}", self.ignore_eos));
        set.push(format!("prompts.raw={}", self.raw));
        set.extend(self.set.iter().cloned());
        Experiment::from_overrides(&set)
    }

    /// The prompt's text, or its ids.
    fn input(&self) -> Result<Input> {
        if let Some(ids) = &self.prompt_ids {
            let bad = |t: &str| Error::Experiment(format!("--prompt-ids: `{t}` is not a token id"));
            let id = |t: &str| t.trim().parse::<u32>().map_err(|_| bad(t));
            let parts = ids.split(',').filter(|t| !ids.is_empty() || !t.is_empty());
            return Ok(Input::Ids(parts.map(id).collect::<Result<_>>()?));
        }
        let text = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => {
                let bytes = std::fs::read(path).map_err(Error::io(path))?;
                String::from_utf8(bytes).map_err(|e| {
                    let at = e.utf8_error().valid_up_to();
                    Error::file(path, format!("not UTF-8 from byte {at} on"))
                })?
            }
            (None, None) => String::new(),
        };
        if text.trim().is_empty() {
            return Err(Error::Experiment("the prompt is empty".into()));
        }
        Ok(Input::Text(text))
    }

    pub(super) fn run(self, registry: &Registry, stop: &AtomicBool) -> Result<()> {
        let experiment = self.experiment()?;
        let input = self.input()?;
        // A wrong name is told before a model is loaded.
        if !registry
            .draft_names()
            .contains(&experiment.draft.name.as_str())
        {
            return Err(scylla_core::Error::unknown(
                "draft",
                &experiment.draft.name,
                registry.draft_names(),
            )
            .into());
        }
        registry.make_rule(
            &experiment.verifier.name,
            &experiment.sampling,
            experiment.budget.width,
            experiment.verifier.settings.clone(),
        )?;
        let mut session = with_download(|p| Session::open(&experiment, p))?;
        let prompt = match input {
            Input::Ids(ids) => ids,
            Input::Text(content) => {
                let message = Message {
                    role: "user",
                    content,
                };
                session.prompt(&[message], experiment.prompts.raw)?
            }
        };
        let mut decoder = session.decoder(registry, &experiment)?;
        let settings = session.settings(&experiment);
        let jobs = [Job {
            prompt: prompt.clone(),
            sequence: 0,
        }];
        let stream = !self.json;
        let mut on_event = |event: Event<'_>| {
            if let (true, Event::Tokens { text, .. }) = (stream, &event) {
                let mut out = std::io::stdout().lock();
                if out
                    .write_all(text.as_bytes())
                    .and_then(|()| out.flush())
                    .is_err()
                {
                    return ControlFlow::Break(());
                }
            }
            match stop.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let output = session
            .decode(&mut decoder, &jobs, &settings, &mut on_event)?
            .remove(0);
        if self.json {
            print_json(&Answer {
                prompt_ids: prompt,
                tau: output.tau(),
                ids: output.ids,
                text: output.text,
                finish: output.finish,
                cycles: output.cycles,
                timings_ms: output.ms,
            })?;
        } else {
            if session.tokenizer.is_none() {
                print!("{:?}", output.ids);
            }
            println!();
            let speed = output.cycles.iter().map(|c| c.committed).sum::<usize>() as f64
                / output.ms.decode()
                * 1e3;
            eprintln!(
                "[{} tokens, {:?}; prefill {:.0} ms, decode {:.1} tokens/s, tau {:.2}]",
                output.ids.len(),
                output.finish,
                output.ms.prefill,
                if speed.is_finite() { speed } else { 0.0 },
                output.tau().unwrap_or(1.0)
            );
        }
        match stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted(String::new())),
            false => Ok(()),
        }
    }
}

enum Input {
    Text(String),
    Ids(Vec<u32>),
}
