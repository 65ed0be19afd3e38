//! Chi-square of what every rule commits on the default model, as a Markdown table.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::scylla;

/// Exact rules, and the lossy one beside them, which must fail.
const RULES: [&str; 8] = [
    "chain",
    "block",
    "deterministic-tree",
    "rrs-without-replacement",
    "specinfer",
    "k-seq",
    "traversal",
    "typical",
];

/// Below this, the committed tokens do not follow the target's law.
const LEAST: f64 = 0.001;

pub(crate) fn run(args: &[String]) -> Result<()> {
    let cycles = args.first().map_or("10000", String::as_str);
    let scylla = scylla()?;
    crate::run(Command::new(&scylla).args(["assets", "fetch"]))?;
    println!("| rule | temperature | top-p | prefix | cycles | tau | chi-square | degrees | p |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut failed = Vec::new();
    for temperature in ["0.7", "1.0"] {
        for rule in RULES {
            let mut command = Command::new(&scylla);
            command.args(["prove", "--target", "default", "--rule", rule, "--json"]);
            command.args([
                "--cycles",
                cycles,
                "--temperature",
                temperature,
                "--top-p",
                "0.9",
            ]);
            let out = command.output()?;
            if !out.status.success() {
                bail!("{rule}: {}", String::from_utf8_lossy(&out.stderr));
            }
            let found: Value = serde_json::from_slice(&out.stdout)?;
            for (i, test) in found["tests"]
                .as_array()
                .context("tests")?
                .iter()
                .enumerate()
            {
                let number = |key: &str| test[key].as_f64().unwrap_or(f64::INFINITY);
                let p = number("p_value");
                println!(
                    "| {rule} | {temperature} | 0.9 | {} | {} | {:.4} | {:.1} | {} | {p:.4} |",
                    i + 1,
                    test["cycles"],
                    number("tau"),
                    number("chi_square"),
                    test["degrees"]
                );
                if (p > LEAST) == (rule == "typical") {
                    failed.push(format!("{rule} at temperature {temperature}: p = {p}"));
                }
            }
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("not as claimed: {}", failed.join("; ")),
    }
}
