//! How fast the processor multiplies and adds, for benchmarks to hold kernels against.

use std::hint::black_box;
use std::time::Instant;

use super::Pool;
use super::simd::{InstructionSet, Line, Simd, dispatch};

/// Independent sums: enough to hide the latency of an addition, where registers hold as many.
const SUMS: usize = 16;
const ROUNDS: usize = if cfg!(miri) { 2 } else { 20_000 };

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// Single precision.
    F32,
    /// Pairs of bf16, added up in f32.
    Bf16,
    /// Fours of weights of eight bits and of activations, added up as integers.
    Eight,
    /// The same with weights of four bits, whose sums are widened when they may be full.
    Four,
}

/// Multiply-adds a second of all threads together, on registers alone.
pub fn multiply_adds(pool: &Pool, of: Operand) -> f64 {
    let portions = pool.threads() * 8;
    let level = InstructionSet::detect();
    let begun = Instant::now();
    pool.ranges(portions, 1, |range| {
        for _ in range {
            match of {
                Operand::F32 => {
                    dispatch!(products level, floats(): () <>);
                }
                Operand::Bf16 => {
                    dispatch!(products level, pairs(): () <>);
                }
                Operand::Eight => {
                    dispatch!(products level, eights(): () <>);
                }
                Operand::Four => {
                    dispatch!(products level, fours(): () <>);
                }
            }
        }
    });
    let width = match of {
        Operand::F32 => 16,
        Operand::Bf16 => 32,
        Operand::Eight | Operand::Four => 64,
    };
    let sums = match (of, level.limits().sums) {
        (Operand::Bf16, sums) => sums * 2 / 3, // two registers hold the weights
        (_, sums) => sums,
    };
    let each = sums.min(SUMS) * ROUNDS * width;
    (portions * each) as f64 / begun.elapsed().as_secs_f64()
}

/// Keeps the compiler from leaving sums out.
#[inline(always)]
fn consume<S: Simd>(sums: [S::V; SUMS]) {
    for sum in sums {
        black_box(S::sum(sum));
    }
}

#[inline(always)]
fn consume_whole<S: Simd>(sums: [S::I; SUMS]) {
    for sum in sums {
        black_box(S::sum(S::to_f32(sum)));
    }
}

#[inline(always)]
fn floats<S: Simd>() {
    let (a, b) = (S::splat(black_box(0.5)), S::splat(black_box(1.0)));
    let mut sums = [S::zero(); SUMS];
    for _ in 0..ROUNDS {
        for sum in sums.iter_mut().take(S::SUMS) {
            *sum = S::fma(*sum, a, b);
        }
    }
    consume::<S>(sums);
}

#[inline(always)]
fn pairs<S: Simd>() {
    let w = S::load_pairs(&black_box([0x3f80; 32]));
    let x = black_box([0x3f80, 0xbf80]);
    let mut sums = [S::zero(); SUMS];
    for _ in 0..ROUNDS {
        for sum in sums.iter_mut().take(S::SUMS * 2 / 3) {
            *sum = S::dot_pairs(*sum, w, x);
        }
    }
    consume::<S>(sums);
}

#[inline(always)]
fn eights<S: Simd>() {
    let w = S::eight(S::load_line(black_box(&Line([3; 64]))));
    let x = black_box([[1i8, -2, 3, -4]; 2 * SUMS]);
    let mut sums = [S::splat_i(0); SUMS];
    for round in 0..ROUNDS {
        // Others each time: a product that was there before would not be computed.
        let x = &x[round % SUMS..];
        for (sum, x) in sums.iter_mut().zip(x).take(S::SUMS) {
            *sum = S::dot_eight(*sum, w, *x);
        }
    }
    consume_whole::<S>(sums);
}

#[inline(always)]
fn fours<S: Simd>() {
    let w = S::load_line(black_box(&Line([3; 64])));
    let x = black_box([[1i8, -2, 3, -4]; 2 * SUMS]);
    let mut whole = [S::splat_i(0); SUMS];
    for round in 0..ROUNDS / 8 {
        let mut sums = [S::begin_small(0); SUMS];
        for i in 0..8 {
            let x = &x[(round + i) % SUMS..];
            for (sum, x) in sums.iter_mut().zip(x).take(S::SUMS) {
                *sum = S::dot_small(*sum, w, *x);
            }
        }
        for (whole, sum) in whole.iter_mut().zip(sums).take(S::SUMS) {
            *whole = S::add_i(*whole, S::end_small(sum, 0));
        }
    }
    consume_whole::<S>(whole);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_positive_numbers() {
        let pool = Pool::new(2);
        for of in [Operand::F32, Operand::Bf16, Operand::Eight, Operand::Four] {
            let rate = multiply_adds(&pool, of);
            assert!(
                rate.is_finite() && rate > if cfg!(miri) { 0.0 } else { 1e6 },
                "{rate}"
            );
        }
    }
}
