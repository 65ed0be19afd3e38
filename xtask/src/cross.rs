//! `cargo xtask cross`: the kernels of 64-bit ARM, built here and run by an emulator.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::{cargo, run};

const TARGET: &str = "aarch64-unknown-linux-gnu";
/// Where Debian's cross compiler keeps the libraries of the target.
const LIBRARIES: &str = "/usr/aarch64-linux-gnu";
const COMPILER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";

/// Runs the test that holds every level of instructions against the portable one, and each row against itself alone.
pub(crate) fn cross() -> Result<()> {
    for (tool, package) in [
        (COMPILER, "gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"),
        (EMULATOR, "qemu-user"),
    ] {
        let mut found = Command::new(tool);
        found.arg("--version").stdout(Stdio::null());
        if !found.status().is_ok_and(|s| s.success()) {
            bail!("{tool} is not here; Debian has it in {package}");
        }
    }
    let mut rustc = Command::new("rustc");
    let library = rustc.args(["--print", "target-libdir", "--target", TARGET]);
    let library = String::from_utf8(library.output()?.stdout)?;
    if !Path::new(library.trim()).is_dir() {
        bail!("Rust's library for {TARGET} is not here; `rustup target add {TARGET}` fetches it");
    }
    let runner = format!("{EMULATOR} -cpu max -L {LIBRARIES}");
    run(cargo()
        .args(["test", "--package", "scylla-core", "--test", "levels"])
        .args(["--target", TARGET, "--", "--nocapture"])
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", COMPILER)
        .env("CC_aarch64_unknown_linux_gnu", COMPILER)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", &runner)
        .env("SCYLLA_TEST_RUNNER", &runner))
}
