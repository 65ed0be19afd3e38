//! One side of a comparison: a process that holds a model and answers one JSON request a line. While it is not asked it
//! is stopped, so that threads that wait by spinning take nothing from the others.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// What was decoded.
pub(super) struct Decoded {
    pub(super) ids: Vec<u64>,
    /// Of the tokens after the first.
    pub(super) ms: f64,
    pub(super) prefill_ms: f64,
    /// Work outside the target's forward, where it was told.
    pub(super) outside: f64,
    pub(super) cycles: Option<f64>,
    /// Tokens drafted and accepted, where llama.cpp tells.
    pub(super) drafted: f64,
    pub(super) accepted: f64,
}

/// What was decoded of several sequences side by side.
pub(super) struct Parallel {
    /// Of each sequence.
    pub(super) ids: Vec<Vec<u64>>,
    /// Of the tokens after the first of each.
    pub(super) ms: f64,
    /// Those of them that a peer in Python spent outside its library.
    pub(super) outside: Option<f64>,
    pub(super) prefill_ms: f64,
}

/// A running worker.
pub(super) struct Worker {
    /// What it said of itself when it was ready.
    pub(super) greeting: Value,
    shown: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts a worker and waits until its model is loaded.
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        let shown = format!("{command:?}").replace('"', "");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A group of its own, as it may have children.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        let mut child = command.spawn().with_context(|| shown.clone())?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{shown}: no pipes");
        };
        let mut worker = Self {
            greeting: Value::Null,
            shown,
            child,
            input,
            output: BufReader::new(output),
        };
        worker.greeting = worker.read()?;
        worker.signal("STOP")?;
        Ok(worker)
    }

    /// To the process and its children, where there are signals.
    fn signal(&self, name: &str) -> Result<()> {
        if cfg!(not(unix)) {
            return Ok(());
        }
        let group = format!("-{}", self.child.id());
        let status = Command::new("kill")
            .args(["-s", name, "--", &group])
            .status()?;
        match status.success() {
            true => Ok(()),
            false => bail!("{}: kill -s {name}: {status}", self.shown),
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("{}: {}", self.shown, self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("{}: {line}", self.shown))
    }

    /// Wakes it, asks, and stops it again.
    pub(super) fn ask(&mut self, request: &Value) -> Result<Value> {
        self.signal("CONT")?;
        writeln!(self.input, "{request}").with_context(|| self.shown.clone())?;
        self.input.flush()?;
        let answer = self.read()?;
        self.signal("STOP")?;
        Ok(answer)
    }

    /// Milliseconds of a request that is answered with them.
    pub(super) fn ms(&mut self, request: &Value) -> Result<f64> {
        let answer = self.ask(request)?;
        let ms = answer["ms"].as_f64();
        ms.with_context(|| format!("{}: no time in {answer}", self.shown))
    }

    /// Empties the cache and runs a prompt.
    pub(super) fn prefill(&mut self, tokens: &[u32]) -> Result<f64> {
        self.ms(&json!({ "op": "prefill", "tokens": tokens }))
    }

    /// Runs rows behind a prompt of `behind` tokens that ran before, logits of each.
    pub(super) fn forward(&mut self, rows: usize, behind: usize) -> Result<f64> {
        self.ms(&json!({ "op": "forward", "rows": rows, "behind": behind }))
    }

    /// Decodes greedily; `set` are overrides of an experiment, which only this project's worker reads.
    pub(super) fn decode(
        &mut self,
        prompt: &[u32],
        new: usize,
        eos: &[u32],
        set: &[String],
    ) -> Result<Decoded> {
        let request =
            json!({ "op": "decode", "prompt": prompt, "new": new, "eos": eos, "set": set });
        let answer = self.ask(&request)?;
        let number = |key: &str| answer[key].as_f64();
        let ids = answer["ids"].as_array().into_iter().flatten();
        Ok(Decoded {
            ids: ids.filter_map(Value::as_u64).collect(),
            ms: number("ms").context("no time")?,
            prefill_ms: number("prefill_ms").context("no time of the prefill")?,
            outside: ["propose", "accept", "commit"]
                .iter()
                .filter_map(|key| number(key))
                .sum(),
            cycles: number("cycles"),
            drafted: number("drafted").unwrap_or(0.0),
            accepted: number("accepted").unwrap_or(0.0),
        })
    }

    /// Decodes several sequences greedily, all in one forward a step, past any end.
    pub(super) fn parallel(&mut self, prompts: &[Vec<u32>], new: usize) -> Result<Parallel> {
        let answer = self.ask(&json!({ "op": "parallel", "prompts": prompts, "new": new }))?;
        let number = |key: &str| answer[key].as_f64();
        let ids: Vec<Vec<u64>> = serde_json::from_value(answer["ids"].clone())?;
        if ids.len() != prompts.len() || ids.iter().any(|ids| ids.len() != new) {
            bail!(
                "{}: not {new} ids of each of {} sequences",
                self.shown,
                prompts.len()
            );
        }
        Ok(Parallel {
            ids,
            ms: number("ms").context("no time")?,
            outside: number("outside_ms"),
            prefill_ms: number("prefill_ms").context("no time of the prefill")?,
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Nothing is left to do where it has ended by itself.
        let _ = self.signal("KILL");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
