//! Everything that a machine with a GPU needs which has CUDA's libraries and neither network nor Rust, in parts that a
//! carrier takes: programs, default model, golden values where they are at hand, and what runs them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{cargo, root, run};

pub(crate) const USAGE: &str = "usage: cargo xtask gpu-pack OUT [--device cuda|cpu] [--part-mb N] [--only NAME,...]

Builds `scylla`, the tests that run on a device and its benchmark, and packs them with the default model into OUT: parts of
at most N (32) MB, their hashes, and unpack.sh, which joins, checks and unpacks them where they arrive. `run.sh` in what it
unpacks does the rest; docs/gpu.md says how. A CUDA build needs nvcc (CUDA_HOME); `--device cpu` packs a build without.
`--only training,device` builds and packs but these of the tests and the benchmark beside `scylla`; `--only scylla` none.
SCYLLA_GOLDEN names the folder of golden values to pack, SCYLLA_TRAIN_DATA a folder of texts and conversations to train on.
";

/// The tests that say something about a device.
const TESTS: [&str; 6] = [
    "parity", "eagle", "lossless", "drafts", "families", "training",
];

struct Options {
    out: PathBuf,
    cuda: bool,
    part_mb: usize,
    only: Option<Vec<String>>,
}

impl Options {
    fn wants(&self, program: &str) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| only.iter().any(|name| name == program))
    }
}

fn options(args: &[String]) -> Result<Options> {
    let mut args = args.iter();
    let (mut out, mut cuda, mut part_mb, mut only) = (None, true, 32, None);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--device" => {
                cuda = match value()?.as_str() {
                    "cuda" => true,
                    "cpu" => false,
                    other => bail!("--device {other}: expected cuda or cpu"),
                }
            }
            "--part-mb" => part_mb = value()?.parse().context("--part-mb")?,
            "--only" => {
                let names: Vec<String> = value()?.split(',').map(String::from).collect();
                let known = |n: &str| n == "scylla" || n == "device" || TESTS.contains(&n);
                if let Some(unknown) = names.iter().find(|n| !known(n)) {
                    bail!("--only {unknown}: expected scylla, device or one of {TESTS:?}");
                }
                only = Some(names);
            }
            other if other.starts_with('-') || out.is_some() => {
                bail!("unknown argument `{other}`\n{USAGE}")
            }
            _ => out = Some(PathBuf::from(arg)),
        }
    }
    if part_mb == 0 {
        bail!("--part-mb must be at least 1");
    }
    Ok(Options {
        out: out.with_context(|| format!("OUT is missing\n{USAGE}"))?,
        cuda,
        part_mb,
        only,
    })
}

/// Where programs with CUDA are built, apart from those without: they do not start without a driver.
fn target_dir(cuda: bool) -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or(root().join("target"), |t| root().join(t));
    match cuda {
        true => target.join("cuda"),
        false => target,
    }
}

/// Cargo, set up for CUDA where asked for. The libraries of a toolkit lie in `lib64` or `lib`, what stands for the
/// driver's on machines without one in `stubs` below.
fn builder(cuda: bool) -> Result<Command> {
    let mut command = cargo();
    if !cuda {
        return Ok(command);
    }
    let home = std::env::var_os("CUDA_HOME").map(PathBuf::from);
    let found = Command::new(std::env::var_os("NVCC").unwrap_or("nvcc".into()))
        .arg("--version")
        .output();
    if !found.is_ok_and(|o| o.status.success()) {
        bail!(
            "a CUDA build needs nvcc: set CUDA_HOME to a toolkit and put its bin into PATH, or pack with --device cpu"
        );
    }
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let libraries = home.map(|h| [h.join("lib"), h.join("lib64")]);
    let libraries = libraries.into_iter().flatten().find(|dir| dir.is_dir());
    for dir in libraries.iter().flat_map(|l| [l.clone(), l.join("stubs")]) {
        flags += &format!(" -L native={}", dir.display());
    }
    command.env("RUSTFLAGS", flags);
    command.env("CARGO_TARGET_DIR", target_dir(true));
    if std::env::var_os("CUDA_COMPUTE_CAP").is_none() {
        command.env("CUDA_COMPUTE_CAP", "90"); // nobody asks a GPU that is not there
    }
    Ok(command)
}

/// Builds programs and returns their paths by name.
fn built(cuda: bool, words: &[&str], package: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut command = builder(cuda)?;
    command.args(words).args(["--package", package]);
    if cuda {
        command.args(["--features", "cuda"]);
    }
    command.arg("--message-format=json-render-diagnostics");
    eprintln!("$ cargo {} --package {package}", words.join(" "));
    let out = command.stderr(Stdio::inherit()).output()?;
    if !out.status.success() {
        bail!("cargo {}: {}", words.join(" "), out.status);
    }
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        let name = message.pointer("/target/name").and_then(Value::as_str);
        let path = message.get("executable").and_then(Value::as_str);
        if let (Some(name), Some(path)) = (name, path) {
            found.push((name.to_string(), PathBuf::from(path)));
        }
    }
    Ok(found)
}

pub(crate) fn pack(args: &[String]) -> Result<()> {
    let options = options(args)?;
    if options.out.exists() {
        bail!("{} is there already", options.out.display());
    }
    // The model by a build without CUDA, which starts here.
    let here = crate::scylla()?;
    run(Command::new(&here).args(["assets", "fetch"]))?;
    let out = Command::new(&here)
        .args(["inspect", "model", "default", "--json"])
        .output()?;
    let model: Value = serde_json::from_slice(&out.stdout).context("scylla inspect model")?;
    let model = PathBuf::from(model["path"].as_str().context("path of the model")?);

    let tests = TESTS.into_iter().filter(|t| options.wants(t));
    let tests: Vec<&str> = tests.flat_map(|t| ["--test", t]).collect();
    let mut programs = built(
        options.cuda,
        &["build", "--release", "--bin", "scylla"],
        "scylla-bench",
    )?;
    if !tests.is_empty() {
        let with_tests = [&["test", "--release", "--no-run"], &tests[..]].concat();
        programs.extend(built(options.cuda, &with_tests, "scylla-tests")?);
    }
    if options.wants("device") {
        let bench = ["bench", "--no-run", "--bench", "device"];
        programs.extend(built(options.cuda, &bench, "scylla-bench")?);
    }

    let stage = options.out.join("stage");
    fill(&stage, &programs, &model, options.cuda)?;
    parts(&options, &stage)?;
    std::fs::remove_dir_all(&stage)?;
    println!("{}", options.out.display());
    Ok(())
}

/// Lays out what is unpacked there.
fn fill(stage: &Path, programs: &[(String, PathBuf)], model: &Path, cuda: bool) -> Result<()> {
    for dir in ["bin", "cache/models"] {
        std::fs::create_dir_all(stage.join(dir))?;
    }
    for (name, path) in programs {
        let to = stage.join("bin").join(name);
        std::fs::copy(path, &to).with_context(|| path.display().to_string())?;
        // Symbols are most of a program; without the tool they stay.
        let _ = Command::new("strip").arg(&to).status();
    }
    let name = model.file_name().context("a model file")?;
    std::fs::copy(model, stage.join("cache/models").join(name))?;
    for file in ["run.sh", "transformers_gpu.py"] {
        let from = root().join("peers/gpu").join(file);
        std::fs::copy(&from, stage.join(file)).with_context(|| from.display().to_string())?;
    }
    let golden = std::env::var_os("SCYLLA_GOLDEN").map(PathBuf::from);
    match golden.filter(|dir| dir.is_dir()) {
        Some(dir) => {
            run(Command::new("cp")
                .args(["-rL", "--no-preserve=mode"])
                .arg(&dir)
                .arg(stage.join("golden")))?;
        }
        None => eprintln!(
            "no golden values: SCYLLA_GOLDEN names no folder; their tests will be skipped"
        ),
    }
    // Training: the experiments that come with the project, and data where some are named.
    run(Command::new("cp")
        .args(["-r"])
        .arg(root().join("assets/experiments/train"))
        .arg(stage.join("train")))?;
    if let Some(data) = std::env::var_os("SCYLLA_TRAIN_DATA") {
        run(Command::new("cp")
            .args(["-rL", "--no-preserve=mode"])
            .arg(&data)
            .arg(stage.join("data")))?;
    }
    let commit = Command::new("git")
        .current_dir(root())
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output();
    let commit = commit.map_or(String::new(), |o| {
        String::from_utf8_lossy(&o.stdout).trim().to_string()
    });
    let device = if cuda { "cuda" } else { "cpu" };
    std::fs::write(
        stage.join("pack.json"),
        serde_json::json!({"commit": commit, "device": device}).to_string(),
    )?;
    Ok(())
}

/// Joins the parts, checks them and the whole, and unpacks.
const UNPACK: &str = r#"#!/bin/sh
# usage: unpack.sh DIR: joins the parts beside this script, checks them by hash, and unpacks them into DIR.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:?usage: unpack.sh DIR}
(cd "$here" && sha256sum --quiet --check parts.sha256)
mkdir -p "$dir"
cat "$here"/part-* >"$dir/pack.tar.xz"
(cd "$dir" && sha256sum --quiet --check "$here/whole.sha256" && tar -xJf pack.tar.xz && rm pack.tar.xz)
chmod +x "$dir"/run.sh "$dir"/bin/*
"#;

fn parts(options: &Options, stage: &Path) -> Result<()> {
    let out = &options.out;
    let whole = out.join("pack.tar.xz");
    // The programs hold the same kernels: a long dictionary keeps them once. Weights do not get smaller.
    let script = format!(
        "tar -C '{}' --sort=name --owner=0 --group=0 --mtime=@0 -cf - . | xz -T1 --lzma2=preset=1,dict=256MiB > '{}'",
        stage.display(),
        whole.display()
    );
    run(Command::new("sh").args(["-c", &script]))?;
    let sums = |pattern: &str, to: &str| {
        let script = format!("sha256sum {pattern} > {to}");
        run(Command::new("sh").args(["-c", &script]).current_dir(out))
    };
    sums("pack.tar.xz", "whole.sha256")?;
    let split = format!("split -b {}MB -d -a 3 pack.tar.xz part-", options.part_mb);
    run(Command::new("sh").args(["-c", &split]).current_dir(out))?;
    std::fs::remove_file(&whole)?;
    sums("part-*", "parts.sha256")?;
    std::fs::write(out.join("unpack.sh"), UNPACK)?;
    run(Command::new("chmod").arg("+x").arg(out.join("unpack.sh")))
}
