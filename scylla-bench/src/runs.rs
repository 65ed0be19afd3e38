//! The files of a run: one format, written by benches and read by reports, replays and fits.
//!
//! A run is a folder: `experiment.toml` that gives it again, `summary.json`, `cycles.jsonl` with a line per cycle of each
//! sequence, and `steps.jsonl` with a line per step of the engine, whose times are whole. The first line of each `jsonl`
//! says the format and its version; a file without it is of version 1, whose cycles had a share of their batch's time and
//! no steps.

use std::path::Path;

use scylla_core::engine::{Cycle, Step};
use scylla_core::files::read_text;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bench::Summary;
use crate::{Error, Result};

/// Version of the format that is written.
pub const VERSION: u32 = 2;
/// Name of the file of cycles.
pub const CYCLES: &str = "cycles.jsonl";
/// Name of the file of steps.
pub const STEPS: &str = "steps.jsonl";

const FORMAT: &str = "scylla-run";

/// The first line of a file of lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
}

fn one() -> usize {
    1
}

/// One cycle of one sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CycleRow {
    /// Which decoder; 0 is plain decoding.
    pub decoder: usize,
    /// Sequences side by side, at most.
    #[serde(default = "one")]
    pub batch: usize,
    /// Which repeat.
    #[serde(default)]
    pub repeat: usize,
    /// The prompt's task.
    #[serde(default)]
    pub task: String,
    /// The prompt's id.
    #[serde(default)]
    pub prompt: String,
    /// Which of several conversations about it.
    #[serde(default)]
    pub copy: usize,
    /// Which turn.
    #[serde(default)]
    pub turn: usize,
    /// Which cycle of the turn.
    #[serde(default)]
    pub cycle: usize,
    /// What happened.
    #[serde(flatten)]
    pub record: Cycle,
}

/// One step of an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Which decoder; 0 is plain decoding.
    pub decoder: usize,
    /// Sequences side by side, at most.
    pub slots: usize,
    /// Which repeat.
    pub repeat: usize,
    /// Which run of an engine, all counted.
    pub run: usize,
    /// What happened, and what it cost.
    #[serde(flatten)]
    pub record: Step,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its summary.
    pub summary: Summary,
    /// Every cycle.
    pub cycles: Vec<CycleRow>,
    /// Every step.
    pub steps: Vec<StepRow>,
}

/// Lines behind a header.
pub(crate) fn lines<T: Serialize>(rows: impl Iterator<Item = T>) -> Result<Vec<u8>> {
    let whole = |e: serde_json::Error| Error::Experiment(e.to_string());
    let mut bytes = Vec::new();
    let header = Header {
        format: FORMAT.into(),
        version: VERSION,
    };
    serde_json::to_writer(&mut bytes, &header).map_err(whole)?;
    bytes.push(b'\n');
    for row in rows {
        serde_json::to_writer(&mut bytes, &row).map_err(whole)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// Reads a file of lines, of this version or an earlier one; `flaw` says what is wrong with a row.
fn read_lines<T: DeserializeOwned>(
    path: &Path,
    flaw: impl Fn(&T) -> Option<&'static str>,
) -> Result<Vec<T>> {
    let text = read_text(path)?;
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if i == 0
            && let Ok(header) = serde_json::from_str::<Header>(line)
        {
            if header.format != FORMAT || header.version > VERSION {
                return Err(Error::file(
                    path,
                    format!(
                        "format {} version {}; this program reads {FORMAT} up to version {VERSION}",
                        header.format, header.version
                    ),
                ));
            }
            continue;
        }
        let bad = |what: String| Error::file(path, format!("line {}: {what}", i + 1));
        let row = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        if let Some(flaw) = flaw(&row) {
            return Err(bad(flaw.into()));
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Reads the cycles of a run, or of one such file.
///
/// # Errors
/// If there is none, a line is not understood, or its numbers do not fit together.
pub fn read_cycles(path: &Path) -> Result<Vec<CycleRow>> {
    let path = match path.is_dir() {
        true => path.join(CYCLES),
        false => path.to_path_buf(),
    };
    read_lines(&path, |row: &CycleRow| {
        let c = &row.record;
        let mut ranks = c.ranks.iter().zip(&c.offered);
        let sound = c.offered.len() == c.ranks.len() + 1 || c.offered.is_empty();
        let within = c.offered.iter().all(|&n| n < 4096) && c.offered.len() <= 4096;
        let fits = sound && within && ranks.all(|(rank, offered)| rank < offered);
        (!fits).then_some("ranks and offered do not fit together")
    })
}

/// Reads the steps of a run, or of one such file.
///
/// # Errors
/// If there is none, or a line is not understood.
pub fn read_steps(path: &Path) -> Result<Vec<StepRow>> {
    match path.is_dir() {
        true => read_lines(&path.join(STEPS), |_| None),
        false => read_lines(path, |_| None),
    }
}

/// Reads a run that a bench wrote, of version 2; of an earlier one [`read_cycles`] reads the cycles.
///
/// # Errors
/// If a file is missing, of a later version, or not understood.
pub fn read(dir: &Path) -> Result<Run> {
    let path = dir.join("summary.json");
    let mut summary: Summary = serde_json::from_str(&read_text(&path)?)
        .map_err(|e| Error::file(&path, format!("not a summary of a run: {e}")))?;
    if summary.format > VERSION {
        return Err(Error::file(
            &path,
            format!(
                "version {}; this program reads up to version {VERSION}",
                summary.format
            ),
        ));
    }
    summary.output = dir.to_path_buf();
    Ok(Run {
        summary,
        cycles: read_cycles(dir)?,
        steps: read_steps(dir)?,
    })
}
