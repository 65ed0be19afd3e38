//! Where numbers were measured.

use scylla_core::kernels::InstructionSet;
use serde::{Deserialize, Serialize};

/// What a number depends on beside the experiment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of this software.
    pub commit: String,
    /// Processor.
    pub cpu: String,
    /// Instruction set the kernels use.
    pub simd: String,
    /// Threads used.
    pub threads: usize,
    /// Device used.
    pub device: String,
    /// Forms of the weights, most bytes first.
    pub dtypes: Vec<String>,
    /// Sha256 of the target.
    pub target_hash: String,
}

impl Environment {
    /// Of this build and processor, with so many threads on a device.
    pub(crate) fn here(
        threads: usize,
        device: &str,
        dtypes: Vec<String>,
        target_hash: &str,
    ) -> Self {
        Self {
            commit: commit(),
            cpu: cpu(),
            simd: format!("{:?}", InstructionSet::detect()).to_lowercase(),
            threads,
            device: device.into(),
            dtypes,
            target_hash: target_hash.into(),
        }
    }
}

/// The commit this was built from; `-dirty` when files had changed.
fn commit() -> String {
    env!("SCYLLA_COMMIT").into()
}

/// Name of the processor.
fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    match model {
        Some((_, name)) => name.trim().into(),
        None => std::env::consts::ARCH.into(),
    }
}

/// Largest resident size of this process so far, in bytes, where the system tells.
pub(crate) fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
