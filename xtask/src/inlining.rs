//! `cargo xtask inlining`: whether whoever builds on this library gets its kernels whole, whatever their profile says.
//!
//! The settings of a profile are those of the crate that is built, not of its dependencies. An intrinsic that stays a call
//! costs the kernels all they are worth: they ran at a tenth of their speed where it happened. So a crate outside the workspace
//! is built in three profiles, and the machine code of `scylla-core` is searched for such calls.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::{cargo, root, run};

/// Names, and what a dependent's `Cargo.toml` says of them: cargo's own release profile, the same with nothing left for the
/// linker to inline and as many units as there can be, and a development profile that optimises a little. The units are
/// named, or asking for assembly would make them one.
const PROFILES: [(&str, &str); 3] = [
    ("release", "codegen-units = 16\n"),
    (
        "apart",
        "inherits = \"release\"\nlto = \"off\"\ncodegen-units = 256\n",
    ),
    (
        "little",
        "inherits = \"dev\"\nopt-level = 1\ndebug = false\ncodegen-units = 256\n\n[profile.little.package.\"*\"]\nopt-level = 2\n",
    ),
];

/// Builds the crate in each profile and counts the calls.
pub(crate) fn check() -> Result<()> {
    let place = root().join("target/inlining");
    let outside = place.join("outside");
    std::fs::create_dir_all(outside.join("src"))?;
    let mut manifest = format!(
        "[package]\nname = \"outside\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n\
         [dependencies]\nscylla-core = {{ path = {:?} }}\n",
        root().join("scylla-core")
    );
    for (name, settings) in PROFILES {
        manifest += &format!("\n[profile.{name}]\n{settings}");
    }
    std::fs::write(outside.join("Cargo.toml"), manifest)?;
    std::fs::write(outside.join("src/main.rs"), "fn main() {}\n")?;
    // The versions that the workspace builds with.
    std::fs::copy(root().join("Cargo.lock"), outside.join("Cargo.lock"))?;
    let mut bad = Vec::new();
    for (name, _) in PROFILES {
        let target = place.join(name);
        let units = target.join(name).join("deps");
        forget(&units)?;
        run(cargo()
            .current_dir(&outside)
            .args(["rustc", "--offline", "--profile", name])
            .args(["--package", "scylla-core", "--lib", "--", "--emit=asm"])
            .env("CARGO_TARGET_DIR", &target))?;
        let (mut files, mut calls, mut instructions) = (0, Vec::new(), 0usize);
        for file in assembly(&units)? {
            let text = std::fs::read_to_string(&file)?;
            files += 1;
            instructions += vectors(&text);
            calls.extend(intrinsics_called(&text));
        }
        println!(
            "{name}: {files} units, {instructions} vector instructions, {} calls of intrinsics",
            calls.len()
        );
        if instructions < 10_000 {
            bail!(
                "{name}: that is not the assembly of the kernels ({})",
                units.display()
            );
        }
        calls.sort();
        calls.dedup();
        bad.extend(calls.into_iter().map(|call| format!("{name}: {call}")));
    }
    match bad.is_empty() {
        true => Ok(()),
        false => bail!("intrinsics that are not inlined:\n{}", bad.join("\n")),
    }
}

/// Assembly of `scylla-core` in a folder.
fn assembly(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default();
        if name.starts_with("scylla_core-") && name.ends_with(".s") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Removes what an earlier build left, so that nothing of it is counted.
fn forget(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        for file in assembly(folder)? {
            std::fs::remove_file(file)?;
        }
    }
    Ok(())
}

/// Instructions on vector registers.
fn vectors(assembly: &str) -> usize {
    let vector = |line: &&str| {
        let line = line.trim_start();
        match cfg!(target_arch = "x86_64") {
            true => line.contains("%ymm") || line.contains("%zmm"),
            false => line.contains(".4s") || line.contains(".16b"),
        }
    };
    assembly.lines().filter(vector).count()
}

/// Lines that call a function of `core::core_arch`.
fn intrinsics_called(assembly: &str) -> Vec<String> {
    let calls = |line: &&str| {
        let line = line.trim_start();
        let call = ["call", "jmp", "bl\t", "b\t"]
            .iter()
            .any(|word| line.starts_with(word));
        call && line.contains("core_arch")
    };
    let lines = assembly.lines().filter(calls);
    lines.map(|line| line.trim().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_of_an_intrinsic_is_told_from_other_calls() {
        let text = "_ZN4core9core_arch3x866avx2:\n\tvpaddd\t%ymm0, %ymm1, %ymm2\n\tcallq\t_ZN4core9core_arch3x864avx2E\n\
                    \tcallq\t_ZN5alloc3vecE\n\tjmp\t_ZN4core9core_archE\n";
        assert_eq!(intrinsics_called(text).len(), 2);
        assert_eq!(vectors(text), usize::from(cfg!(target_arch = "x86_64")));
    }
}
