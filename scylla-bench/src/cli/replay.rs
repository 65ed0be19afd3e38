//! `scylla replay`

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{print_json, print_text};
use crate::experiment::Override;
use crate::trace::{Reader, Replay as Settings, Replayed, find, replay};
use crate::{Error, Registry, Result};

#[derive(Args)]
pub(super) struct Replay {
    /// Dense trace, or the folder of a benchmark that wrote one (`scylla bench --trace dense`)
    trace: PathBuf,
    /// What to decode with in place of what was recorded: budget.total=20, draft.tree=chain, run.max_new_tokens=64
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object, with every cycle
    #[arg(long)]
    json: bool,
}

/// A cycle as it is printed.
#[derive(Serialize)]
struct Told {
    nodes: u16,
    accepted: u16,
}

#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    found: Replayed,
    cycles: Vec<Told>,
}

impl Replay {
    pub(super) fn run(self, registry: &Registry) -> Result<()> {
        let mut reader = Reader::open(&find(&self.trace)?)?;
        let settings = Settings::of(reader.header(), &Override::parse_all(&self.set)?)?;
        let mut cycles = Vec::new();
        let found = replay(
            registry,
            &mut reader,
            &settings,
            &mut |_, nodes, accepted| {
                if self.json {
                    // Both are at most 4096.
                    cycles.push(Told {
                        nodes: nodes as u16,
                        accepted: accepted as u16,
                    });
                }
            },
        )?;
        if found.texts == 0 {
            return Err(Error::file(&self.trace, "a trace without a text"));
        }
        if self.json {
            return print_json(&Answer { found, cycles });
        }
        let alpha: Vec<String> = found
            .alpha
            .iter()
            .map(|a| a.map_or("-".into(), |a| format!("{a:.3}")))
            .collect();
        print_text(&format!(
            "tau {:.4}: {} tokens in {} cycles of {} texts\nalpha {}\n",
            found.tau,
            found.tokens,
            found.count,
            found.texts,
            alpha.join(" ")
        ))
    }
}
