//! `scylla inspect tree`

use std::path::{Path, PathBuf};

use clap::Args;
use scylla_core::engine::{Cycle, tau};
use scylla_core::tree::Budget;
use scylla_draft::tree::{MOST_OPTIMAL, expected_tokens, optimal};
use serde::Serialize;

use super::{print_json, print_text};
use crate::stats::alpha_by_rank;
use crate::{Error, Result, runs};

#[derive(Args)]
pub(super) struct Tree {
    /// Directory that a benchmark wrote
    run: PathBuf,
    /// Which of its decoders: 1 is the first beside plain decoding
    #[arg(long, default_value_t = 1)]
    decoder: usize,
    /// Nodes verified, root included
    #[arg(long, default_value_t = 26)]
    total: usize,
    /// Children per node
    #[arg(long, default_value_t = 4)]
    width: usize,
    /// Expansion steps after level 0
    #[arg(long, default_value_t = 5)]
    depth: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Answer {
    cycles: usize,
    tau_recorded: Option<f64>,
    alpha: Vec<Vec<f64>>,
    paths: Vec<Vec<usize>>,
    tau_expected: f64,
}

/// The recorded cycles of one decoder.
fn cycles(run: &Path, decoder: usize) -> Result<Vec<Cycle>> {
    let rows = runs::read_cycles(run)?.into_iter();
    let of_decoder = rows.filter(|row| row.decoder == decoder);
    let cycles: Vec<Cycle> = of_decoder.map(|row| row.record).collect();
    match cycles.is_empty() {
        true => Err(Error::file(run, format!("no cycles of decoder {decoder}"))),
        false => Ok(cycles),
    }
}

impl Tree {
    pub(super) fn run(self) -> Result<()> {
        let budget = Budget {
            total: self.total,
            width: self.width,
            depth: self.depth,
        };
        budget.check()?;
        if self.total > MOST_OPTIMAL {
            return Err(Error::Experiment(format!(
                "--total {}: at most {MOST_OPTIMAL}",
                self.total
            )));
        }
        let cycles = cycles(&self.run, self.decoder)?;
        let alpha = alpha_by_rank(cycles.iter());
        if alpha.is_empty() {
            return Err(Error::Experiment(
                "these cycles drafted nothing, or were recorded without ranks".into(),
            ));
        }
        let tree = optimal(&alpha, budget);
        let answer = Answer {
            cycles: cycles.len(),
            tau_recorded: tau(&cycles),
            tau_expected: expected_tokens(&tree, &alpha),
            paths: tree.paths(),
            alpha,
        };
        if self.json {
            return print_json(&answer);
        }
        let mut text = format!(
            "# {} cycles, tau {:.3}; the tree below expects {:.3}\n# acceptance by depth and rank:\n",
            answer.cycles,
            answer.tau_recorded.unwrap_or(1.0),
            answer.tau_expected
        );
        for (depth, row) in answer.alpha.iter().enumerate() {
            let row: Vec<String> = row.iter().map(|a| format!("{a:.3}")).collect();
            text.push_str(&format!("#   {depth}: {}\n", row.join(" ")));
        }
        if answer
            .paths
            .iter()
            .any(|path| path.len() > answer.alpha.len())
        {
            let recorded = answer.alpha.len();
            text.push_str(&format!(
                "# deeper than the {recorded} levels recorded: the last one's rates were taken to go on\n"
            ));
        }
        let deepest = answer.paths.iter().map(Vec::len).max().unwrap_or(1);
        text.push_str(&format!(
            "[draft]\ntree = \"static\"\npaths = {:?}\n\n[budget]\ntotal = {}\nwidth = {}\ndepth = {}\n",
            answer.paths,
            answer.paths.len() + 1,
            self.width,
            deepest.saturating_sub(1)
        ));
        print_text(&text)
    }
}
