//! `cargo xtask picture`: the speed-ups of a comparison, task by task, as a picture.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::chart::{Bars, bars};

pub(crate) const USAGE: &str = "usage: cargo xtask picture RUN OUT.svg

Draws the speed-ups over plain decoding of a comparison (the folder of a `scylla bench` run), by task, with their 95 % intervals over prompts.
";

pub(crate) fn picture(args: &[String]) -> Result<()> {
    let [run, out] = args else { bail!("{USAGE}") };
    let path = Path::new(run).join("summary.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let summary: Value =
        serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
    let rows = summary["rows"].as_array().context("no rows")?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_string();
    let (mut tasks, mut drafts): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for row in rows {
        let (task, draft) = (text(row, "task"), text(row, "draft"));
        if !tasks.contains(&task) {
            tasks.push(task);
        }
        if draft != "plain" && !drafts.contains(&draft) {
            drafts.push(draft);
        }
    }
    if drafts.is_empty() {
        bail!("{}: nothing beside plain decoding", path.display());
    }
    let value = |task: &str, draft: &str| {
        let of = |row: &&Value| row["task"] == task && row["draft"] == draft;
        let row = rows.iter().find(of)?;
        let of = |key: &str| row["speedup_interval"][key].as_f64();
        Some([of("value")?, of("low")?, of("high")?])
    };
    let all: Vec<Bars> = drafts
        .iter()
        .map(|draft| Bars {
            name: draft.clone(),
            values: tasks.iter().map(|task| value(task, draft)).collect(),
        })
        .collect();
    let environment = &summary["environment"];
    let title = format!(
        "Speed-up over plain decoding: {}, {} threads, {}",
        text(environment, "cpu"),
        environment["threads"],
        text(environment, "simd")
    );
    bars(Path::new(out), &title, "speed-up", &tasks, &all)
}
