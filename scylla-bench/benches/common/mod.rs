//! What the benchmarks that print medians and limits share.
#![allow(dead_code)] // each takes its part

pub(crate) mod torch;

use std::hint::black_box;
use std::time::Instant;

use scylla_core::kernels::Pool;
use scylla_core::plugin::{SlotRows, Step, Want};

/// A chain of rows in slot 0.
pub(crate) fn rows<'a>(tokens: &'a [u32], want: Want<'a>) -> Step<'a> {
    Step {
        slots: vec![SlotRows {
            slot: 0,
            tokens,
            parents: &[],
            want,
        }],
        taps: &[],
    }
}

/// `SCYLLA_THREADS` threads, by default as many as there are cores.
pub(crate) fn pool() -> Pool {
    let threads = std::env::var("SCYLLA_THREADS").ok();
    let threads = threads.and_then(|t| t.parse().ok());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Pool::new(threads.unwrap_or(cores))
}

/// Lines that shall run: those whose titles hold all words of the command line, cargo's own aside.
pub(crate) fn asked_for(title: &str) -> bool {
    let words = std::env::args().skip(1).filter(|w| !w.starts_with("--"));
    let words: Vec<String> = words.collect();
    let mut words = words.iter().flat_map(|w| w.split_whitespace());
    words.all(|word| title.contains(word))
}

pub(crate) fn seconds(body: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    body();
    begun.elapsed().as_secs_f64()
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn best(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// Memory that no cache holds, for [`read_rate`].
pub(crate) fn memory() -> Vec<u64> {
    vec![1; 16 << 20]
}

/// Bytes a second that all threads read together.
pub(crate) fn read_rate(pool: &Pool, data: &[u64]) -> f64 {
    let time = seconds(|| {
        pool.ranges(data.len(), 1 << 16, |range| {
            black_box(data[range].iter().fold(0u64, |a, &b| a ^ b));
        });
    });
    size_of_val(data) as f64 / time
}
