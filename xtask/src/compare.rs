//! Plain decoding side by side with candle-transformers on the same file, interleaved.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{cargo, root, scylla};

const NEW_TOKENS: usize = 128;

/// A prompt of 40 tokens; its text does not matter for the speed of plain decoding.
fn prompt() -> String {
    let ids: Vec<String> = (0..40).map(|i| (1000 + 37 * i).to_string()).collect();
    ids.join(",")
}

fn json(command: &mut Command) -> Result<Value> {
    let out = command.output()?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}

fn ours(scylla: &Path, model: &str, threads: &str) -> Result<f64> {
    let n = NEW_TOKENS.to_string();
    let mut command = Command::new(scylla);
    command.args([
        "generate",
        "--target",
        model,
        "--prompt-ids",
        &prompt(),
        "--max-new-tokens",
        &n,
    ]);
    let found = json(command.args(["--ignore-eos", "--json", "--threads", threads]))?;
    let ms = |phase: &str| found["timings_ms"][phase].as_f64().unwrap_or(f64::NAN);
    let decode: f64 = ["propose", "forward", "accept", "commit"]
        .map(ms)
        .iter()
        .sum();
    Ok((NEW_TOKENS - 1) as f64 / decode * 1e3)
}

fn theirs(peer: &Path, model: &str, threads: &str) -> Result<f64> {
    let mut command = Command::new(peer);
    command.args([model, &prompt(), &NEW_TOKENS.to_string()]);
    let found = json(
        command
            .env("RAYON_NUM_THREADS", threads)
            .env("CANDLE_NUM_THREADS", threads),
    )?;
    found["tokens_per_s"].as_f64().context("tokens_per_s")
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

pub(crate) fn run(args: &[String]) -> Result<()> {
    let rounds: usize = args
        .first()
        .map_or(Ok(5), |n| n.parse())
        .context("number of rounds")?;
    if rounds == 0 {
        bail!("at least one round");
    }
    let scylla = scylla()?;
    run_fetch(&scylla)?;
    let dir = root().join("peers/candle-transformers");
    // For this processor, as candle's documentation advises: some of its kernels only then use vectors.
    crate::run(
        cargo()
            .current_dir(&dir)
            .env("RUSTFLAGS", "-C target-cpu=native")
            .args(["build", "--release", "--quiet"]),
    )?;
    let peer = dir.join("target/release/peer-candle-transformers");
    let model = Command::new(&scylla).args(["assets", "path"]).output()?;
    let model = String::from_utf8(model.stdout)?.trim().to_string();
    println!(
        "plain decoding of {NEW_TOKENS} tokens, default model as stored, tokens/s, median of {rounds} interleaved rounds (min-max)"
    );
    for threads in ["1", "2"] {
        let (mut a, mut b, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            a.push(ours(&scylla, &model, threads)?);
            b.push(theirs(&peer, &model, threads)?);
            ratio.push(a[a.len() - 1] / b[b.len() - 1]);
        }
        let line = |name: &str, v: &mut [f64]| {
            let m = median(v);
            println!(
                "  {threads} threads  {name:<22} {m:8.2}  ({:.2}-{:.2})",
                v[0],
                v[v.len() - 1]
            );
        };
        line("scylla", &mut a);
        line("candle-transformers", &mut b);
        line("ratio", &mut ratio);
    }
    Ok(())
}

fn run_fetch(scylla: &Path) -> Result<()> {
    crate::run(Command::new(scylla).args(["assets", "fetch"]))
}
