//! `scylla generate`

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use scylla_core::engine::{Cycle, Event, Finish, Output, Phases, decode};
use scylla_core::files::read_text;
use scylla_core::text::Message;
use serde::Serialize;

use super::{ModelOptions, open_session, print_json, print_some, print_text, say};
use crate::experiment::{Experiment, Override};
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
    /// Special tokens in the prompt are text, not special
    #[arg(long)]
    literal: bool,
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
        let text = |key: &str, v: &str| Override::new(key, v);
        let size = |key: &str, v: usize| Override::number(key, v as u64);
        let (draft, dir) = match self.draft.split_once(':') {
            Some((name, dir)) => (name, Some(dir)),
            None => (self.draft.as_str(), None),
        };
        let mut set = self.model.overrides();
        set.extend([
            text("target.model", &self.target),
            text("draft.name", draft),
            size("run.max_new_tokens", self.max_new_tokens),
            Override::new("run.ignore_eos", self.ignore_eos),
            Override::new("prompts.raw", self.raw),
            Override::new("prompts.literal", self.literal),
        ]);
        let given = [
            dir.map(|v| text("draft.dir", v)),
            self.rule.as_ref().map(|v| text("verifier.name", v)),
            self.temperature
                .map(|v| Override::new("sampling.temperature", v)),
            self.top_k.map(|v| size("sampling.top_k", v)),
            self.top_p.map(|v| Override::new("sampling.top_p", v)),
            self.seed.map(|v| Override::number("run.seed", v)),
        ];
        set.extend(given.into_iter().flatten());
        set.extend(Override::parse_all(&self.set)?);
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
            // The end of the last line belongs to the file, not to the prompt.
            (None, Some(path)) => {
                let text = read_text(path)?;
                let line = text.strip_suffix('\n').unwrap_or(&text);
                line.strip_suffix('\r').unwrap_or(line).to_string()
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
        check_names(registry, &experiment)?;
        let mut session = open_session(&experiment)?;
        let prompt = match input {
            Input::Ids(ids) => ids,
            Input::Text(content) => {
                let message = Message {
                    role: "user",
                    content,
                };
                session.prompt(&[message], &experiment.prompts)?
            }
        };
        session.wording.check_length(&prompt)?;
        let mut composed = session.compose(registry, &experiment)?;
        let request = session.request(&experiment, &composed, prompt.clone(), 0);
        let options = experiment.run.options(1);
        // What can be refused is refused before costs are measured.
        session
            .engine(&mut composed, options.clone())?
            .check(&request)?;
        session.settle(registry, &experiment, &mut composed)?;
        let mut engine = session.engine(&mut composed, options)?;
        // What became of standard output: whether somebody still reads, or why it cannot be written to.
        let mut told = Ok(true);
        let mut on_event = |event: &Event| {
            if let (false, Event::Tokens { text, .. }) = (self.json, event) {
                told = print_some(text);
            }
            match stop.load(Ordering::Relaxed) || !matches!(told, Ok(true)) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let output = decode(&mut engine, vec![request], &mut on_event).remove(0);
        drop(engine);
        if !told? {
            return Ok(()); // the reader has left
        }
        let failed = output.failed.clone();
        // One that failed at once has nothing to show.
        if failed.is_none() || !output.ids.is_empty() {
            self.show(prompt, output, &session)?;
        }
        match failed {
            Some(message) => Err(Error::Experiment(message)),
            None if stop.load(Ordering::Relaxed) => Err(Error::Interrupted(String::new())),
            None => Ok(()),
        }
    }

    /// Prints what was decoded; of a text that was streamed, its end and figures.
    fn show(&self, prompt: Vec<u32>, output: Output, session: &Session) -> Result<()> {
        if self.json {
            return print_json(&Answer {
                prompt_ids: prompt,
                tau: output.tau(),
                ids: output.ids,
                text: output.text,
                finish: output.finish,
                cycles: output.cycles,
                timings_ms: output.ms,
            });
        }
        let ids = match session.tokenizer {
            None => format!("{:?}\n", output.ids),
            Some(_) => "\n".into(),
        };
        print_text(&ids)?;
        let speed = output.cycles.iter().map(|c| c.committed).sum::<usize>() as f64
            / output.ms.decode()
            * 1e3;
        say(&format!(
            "[{} tokens, {:?}; prefill {:.0} ms, decode {:.1} tokens/s, tau {:.2}]",
            output.ids.len(),
            output.finish,
            output.ms.prefill,
            if speed.is_finite() { speed } else { 0.0 },
            output.tau().unwrap_or(1.0)
        ));
        Ok(())
    }
}

/// A wrong name is told before a model is loaded.
fn check_names(registry: &Registry, experiment: &Experiment) -> Result<()> {
    let (draft, known) = (&experiment.draft.name, registry.draft_names());
    if !known.contains(&draft.as_str()) {
        return Err(scylla_core::Error::unknown("draft", draft, known).into());
    }
    let rule = &experiment.verifier;
    let width = experiment.budget.limits().width;
    registry.make_rule(
        &rule.name,
        &experiment.sampling,
        width,
        rule.settings.clone(),
    )?;
    Ok(())
}

enum Input {
    Text(String),
    Ids(Vec<u32>),
}
