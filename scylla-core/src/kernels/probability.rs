//! Rows of probabilities in f64: exponentials, sums, residuals, and the place of a running sum.
//!
//! The loops are plain Rust over fixed lanes, compiled for the best instruction set of the processor. Sums are of
//! sixteen lanes, so they do not depend on the length of registers.

use super::simd::{InstructionSet, Simd, dispatch};

const LANES: usize = 16;

/// Weights below `exp(-708)` are zero: nothing that small is ever drawn, and it would leave the normal range.
const LOWEST: f64 = -708.0;

fn lanes_sum(lanes: &[f64; LANES]) -> f64 {
    let mut sum = [0.0; 4];
    for (i, lane) in lanes.iter().enumerate() {
        sum[i % 4] += lane;
    }
    (sum[0] + sum[2]) + (sum[1] + sum[3])
}

/// `e^x` for `x <= 0` within a few units in the last place; `fma` says whether the processor has fused multiply-adds.
#[inline(always)]
pub(super) fn exp(x: f64, fma: bool) -> f64 {
    const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // Adding this rounds to an integer, which then stands in the low bits of the sum.
    const SHIFT: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    let fused = |a: f64, b: f64, c: f64| if fma { a.mul_add(b, c) } else { a * b + c };
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = fused(clamped, std::f64::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = fused(-n, LN2_LOW, fused(-n, LN2_HIGH, clamped));
    // Taylor's series: |r| <= ln 2 / 2, so the first term left out is below 2e-16.
    let mut p = 1.0 / 479_001_600.0;
    for c in [
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = fused(p, r, c);
    }
    let power = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1023 << 52));
    if x > LOWEST { p * power } else { 0.0 }
}

/// Writes `exp(scale (x - max))` of each logit and returns the sum. `scale >= 0`, no logit above `max`, none NaN.
pub fn exponentials(logits: &[f32], max: f64, scale: f64, out: &mut [f64]) -> f64 {
    assert_eq!(logits.len(), out.len());
    dispatch!(InstructionSet::detect(), exponentials_of(logits, max, scale, out): (logits: &[f32], max: f64, scale: f64, out: &mut [f64]) [f64] <>)
}

#[inline(always)]
fn exponentials_of<S: Simd>(logits: &[f32], max: f64, scale: f64, out: &mut [f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (mut ins, mut outs) = (logits.chunks_exact(LANES), out.chunks_exact_mut(LANES));
    for (x, o) in (&mut ins).zip(&mut outs) {
        for i in 0..LANES {
            o[i] = exp((f64::from(x[i]) - max) * scale, S::FMA);
            lanes[i] += o[i];
        }
    }
    let mut rest = 0.0;
    for (x, o) in ins.remainder().iter().zip(outs.into_remainder()) {
        *o = exp((f64::from(*x) - max) * scale, S::FMA);
        rest += *o;
    }
    lanes_sum(&lanes) + rest
}

/// The sum of a row, and its smallest value (infinite for an empty one).
pub fn sum_and_least(values: &[f64]) -> (f64, f64) {
    dispatch!(InstructionSet::detect(), sum_and_least_of(values): (values: &[f64]) [(f64, f64)] <>)
}

#[inline(always)]
fn sum_and_least_of<S: Simd>(values: &[f64]) -> (f64, f64) {
    let mut lanes = [0.0; LANES];
    let mut least = [f64::INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let (mut sum, mut low) = (0.0, f64::INFINITY);
    for &v in chunks.remainder() {
        sum += v;
        low = if v < low { v } else { low };
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
            least[i] = if chunk[i] < least[i] {
                chunk[i]
            } else {
                least[i]
            };
        }
    }
    (
        lanes_sum(&lanes) + sum,
        least.iter().copied().fold(low, f64::min),
    )
}

/// `p *= scale`
pub fn scale(p: &mut [f64], scale: f64) {
    dispatch!(InstructionSet::detect(), scale_of(p, scale): (p: &mut [f64], scale: f64) <>);
}

#[inline(always)]
fn scale_of<S: Simd>(p: &mut [f64], scale: f64) {
    for p in p {
        *p *= scale;
    }
}

/// `p <- (a p - b q)+` and the sum of what is left.
pub fn residual(p: &mut [f64], a: f64, q: &[f64], b: f64) -> f64 {
    assert_eq!(p.len(), q.len());
    dispatch!(InstructionSet::detect(), residual_of(p, a, q, b): (p: &mut [f64], a: f64, q: &[f64], b: f64) [f64] <>)
}

#[inline(always)]
fn residual_of<S: Simd>(p: &mut [f64], a: f64, q: &[f64], b: f64) -> f64 {
    lessen(p, q, |p, q| a * p - b * q)
}

/// `p <- (change(p, q))+` and the sum of what is left.
#[inline(always)]
fn lessen(p: &mut [f64], q: &[f64], change: impl Fn(f64, f64) -> f64) -> f64 {
    let left = |p: f64, q: f64| {
        let d = change(p, q);
        if d > 0.0 { d } else { 0.0 }
    };
    let mut lanes = [0.0; LANES];
    let (mut ps, mut qs) = (p.chunks_exact_mut(LANES), q.chunks_exact(LANES));
    for (p, q) in (&mut ps).zip(&mut qs) {
        for i in 0..LANES {
            p[i] = left(p[i], q[i]);
            lanes[i] += p[i];
        }
    }
    let mut rest = 0.0;
    for (p, q) in ps.into_remainder().iter_mut().zip(qs.remainder()) {
        *p = left(*p, *q);
        rest += *p;
    }
    lanes_sum(&lanes) + rest
}

/// `p <- (p - factor min(q, scale p))+` and the sum of what is left.
pub fn spare(p: &mut [f64], q: &[f64], factor: f64, scale: f64) -> f64 {
    assert_eq!(p.len(), q.len());
    dispatch!(InstructionSet::detect(), spare_of(p, q, factor, scale): (p: &mut [f64], q: &[f64], factor: f64, scale: f64) [f64] <>)
}

#[inline(always)]
fn spare_of<S: Simd>(p: &mut [f64], q: &[f64], factor: f64, scale: f64) -> f64 {
    lessen(p, q, |p, q| {
        let share = p * scale;
        p - factor * if q < share { q } else { share }
    })
}

/// Of rows p and q: the sum of p where `p < gamma q`, and the sum of q elsewhere.
pub fn overlap(p: &[f64], q: &[f64], gamma: f64) -> (f64, f64) {
    assert_eq!(p.len(), q.len());
    dispatch!(InstructionSet::detect(), overlap_of(p, q, gamma): (p: &[f64], q: &[f64], gamma: f64) [(f64, f64)] <>)
}

#[inline(always)]
fn overlap_of<S: Simd>(p: &[f64], q: &[f64], gamma: f64) -> (f64, f64) {
    let (mut below, mut above) = ([0.0; LANES], [0.0; LANES]);
    let (ps, qs) = (p.chunks_exact(LANES), q.chunks_exact(LANES));
    let (mut low, mut high) = (0.0, 0.0);
    for (&p, &q) in ps.remainder().iter().zip(qs.remainder()) {
        low += if p < gamma * q { p } else { 0.0 };
        high += if p < gamma * q { 0.0 } else { q };
    }
    for (p, q) in ps.zip(qs) {
        for i in 0..LANES {
            let under = p[i] < gamma * q[i];
            below[i] += if under { p[i] } else { 0.0 };
            above[i] += if under { 0.0 } else { q[i] };
        }
    }
    (lanes_sum(&below) + low, lanes_sum(&above) + high)
}

/// Writes the places of positive values to `out` and returns true, if there are at most `limit`; else false.
pub fn support(values: &[f64], limit: usize, out: &mut Vec<u32>) -> bool {
    dispatch!(InstructionSet::detect(), support_of(values, limit, out): (values: &[f64], limit: usize, out: &mut Vec<u32>) [bool] <>)
}

#[inline(always)]
fn support_of<S: Simd>(values: &[f64], limit: usize, out: &mut Vec<u32>) -> bool {
    const BLOCK: usize = 64;
    // NaN counts: it is to be found by whoever uses the weights.
    let counts = |v: f64| (v > 0.0) | v.is_nan();
    out.clear();
    for (b, block) in values.chunks(BLOCK).enumerate() {
        // Most blocks of a small support are empty, and this tells without a branch per value.
        if block.iter().fold(false, |any, &v| any | counts(v)) {
            let places = block.iter().enumerate().filter(|(_, v)| counts(**v));
            out.extend(places.map(|(i, _)| (b * BLOCK + i) as u32));
            if out.len() > limit {
                return false;
            }
        }
    }
    true
}

/// The first place where the running sum of nonnegative weights exceeds `at`; the last positive one where rounding
/// keeps it below. `None` where no weight is positive.
pub fn place(weights: &[f64], mut at: f64) -> Option<usize> {
    const BLOCK: usize = 512;
    for (b, block) in weights.chunks(BLOCK).enumerate() {
        let (sum, _) = sum_and_least(block);
        if at >= sum {
            at -= sum;
            continue;
        }
        for (i, &w) in block.iter().enumerate() {
            if at < w {
                return Some(b * BLOCK + i);
            }
            at -= w;
        }
        // The block's own sum was rounded up: its last positive weight is meant.
        if let Some(i) = block.iter().rposition(|&w| w > 0.0) {
            return Some(b * BLOCK + i);
        }
    }
    weights.iter().rposition(|&w| w > 0.0)
}

/// `ln sum exp(x - max)` of a row in single precision, to about 1e-6. `max` is finite and no logit above it.
pub fn log_sum(logits: &[f32], max: f32) -> f64 {
    let sum = dispatch!(InstructionSet::detect(), sum_of_exponentials(logits, max): (logits: &[f32], max: f32) [f64] <>);
    sum.ln()
}

#[inline(always)]
fn sum_of_exponentials<S: Simd>(logits: &[f32], max: f32) -> f64 {
    let below = S::splat(-max);
    // Added up in double precision, so that rows of the same logits in another order have as good as the same sum.
    let mut sums = [0.0f64; LANES];
    let (tiles, rest) = logits.as_chunks::<LANES>();
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..rest.len()].copy_from_slice(rest);
    for tile in tiles.iter().chain([&last]) {
        let mut lanes = [0.0; LANES];
        S::store(S::exp(S::add(S::load(tile), below)), &mut lanes);
        for i in 0..LANES {
            sums[i] += f64::from(lanes[i]);
        }
    }
    lanes_sum(&sums)
}

/// The largest value of a row, NaN where one is NaN; minus infinity for an empty one.
pub fn largest(values: &[f32]) -> f32 {
    dispatch!(InstructionSet::detect(), largest_of(values): (values: &[f32]) [f32] <>)
}

#[inline(always)]
fn largest_of<S: Simd>(values: &[f32]) -> f32 {
    const WIDE: usize = 64;
    let mut lanes = [f32::NEG_INFINITY; WIDE];
    // Zero unless a value is NaN or infinite.
    let mut poison = [0.0f32; WIDE];
    let chunks = values.chunks_exact(WIDE);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..WIDE {
            lanes[i] = if chunk[i] > lanes[i] {
                chunk[i]
            } else {
                lanes[i]
            };
            poison[i] += chunk[i] * 0.0;
        }
    }
    let best = lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    let suspicious = poison.iter().any(|p| p.is_nan()) || rest.iter().any(|v| v.is_nan());
    if suspicious && values.iter().any(|v| v.is_nan()) {
        return f32::NAN;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exponentials_follow_the_library_function() {
        let logits: Vec<f32> = (0..40_001)
            .step_by(if cfg!(miri) { 101 } else { 1 })
            .map(|i| -(i as f32) * 0.018)
            .collect();
        for scale in [1.0, 0.37, 3.0] {
            let mut out = vec![0.0; logits.len()];
            let sum = exponentials(&logits, 0.0, scale, &mut out);
            for (&x, &found) in logits.iter().zip(&out) {
                let expected = (f64::from(x) * scale).exp();
                if expected > 1e-300 {
                    assert!(
                        (found / expected - 1.0).abs() < 1e-14,
                        "{x}: {found} for {expected}"
                    );
                } else {
                    assert!(found <= 1e-300);
                }
            }
            assert!((sum / out.iter().sum::<f64>() - 1.0).abs() < 1e-13);
        }
        let mut out = [0.0; 3];
        exponentials(&[1.0, f32::NEG_INFINITY, 0.0], 1.0, 1.0, &mut out);
        assert_eq!((out[0], out[1]), (1.0, 0.0));
    }

    #[test]
    fn log_sums_follow_the_library_function() {
        for n in [1, 15, 16, 17, 3000] {
            let logits: Vec<f32> = (0..n).map(|i| ((i * 37) % 101) as f32 * 0.3).collect();
            let max = largest(&logits);
            let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
            assert!((log_sum(&logits, max) - sum.ln()).abs() < 1e-6, "{n}");
        }
        assert_eq!(log_sum(&[f32::NEG_INFINITY, 5.0], 5.0), 0.0);
    }

    #[test]
    fn the_largest_value_is_found_anywhere_and_nan_is_told() {
        for n in [0, 1, 5, 64, 129, if cfg!(miri) { 130 } else { 200 }] {
            let mut v: Vec<f32> = (0..n).map(|i| ((i * 37) % 101) as f32 - 200.0).collect();
            let expected = v.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest(&v), expected);
            for at in 0..n {
                let kept = std::mem::replace(&mut v[at], f32::NAN);
                assert!(largest(&v).is_nan());
                v[at] = f32::INFINITY;
                assert_eq!(largest(&v), f32::INFINITY);
                v[at] = kept;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 256 }))]
        #[test]
        fn sums_residuals_and_places_equal_the_plain_loops(
            pq in prop::collection::vec((0u32..5, 0u32..5), 0..if cfg!(miri) { 200 } else { 1400 }), a in 0.1f64..2.0, b in 0.0f64..2.0, at in 0.0f64..1.0,
        ) {
            let p: Vec<f64> = pq.iter().map(|x| f64::from(x.0)).collect();
            let q: Vec<f64> = pq.iter().map(|x| f64::from(x.1)).collect();
            let (sum, least) = sum_and_least(&p);
            prop_assert_eq!(sum, p.iter().sum::<f64>());
            prop_assert_eq!(least, p.iter().copied().fold(f64::INFINITY, f64::min));
            let mut left = p.clone();
            let mass = residual(&mut left, a, &q, b);
            for i in 0..p.len() {
                prop_assert!((left[i] - (a * p[i] - b * q[i]).max(0.0)).abs() < 1e-12);
            }
            prop_assert!((mass - left.iter().sum::<f64>()).abs() < 1e-9);
            let mut spared = p.clone();
            let mass = spare(&mut spared, &q, b, a);
            for i in 0..p.len() {
                let expected = (p[i] - b * q[i].min(a * p[i])).max(0.0);
                prop_assert!((spared[i] - expected).abs() < 1e-12);
            }
            prop_assert!((mass - spared.iter().sum::<f64>()).abs() < 1e-9);
            let (below, above) = overlap(&p, &q, a);
            let under = |i: &usize| p[*i] < a * q[*i];
            let expected: f64 = (0..p.len()).filter(under).map(|i| p[i]).sum();
            prop_assert!((below - expected).abs() < 1e-9);
            let expected: f64 = (0..p.len()).filter(|i| !under(i)).map(|i| q[i]).sum();
            prop_assert!((above - expected).abs() < 1e-9);
            let mut places = Vec::new();
            let positive: Vec<u32> = (0..p.len() as u32).filter(|&i| p[i as usize] > 0.0).collect();
            prop_assert!(support(&p, positive.len(), &mut places));
            prop_assert_eq!(&places, &positive);
            prop_assert!(positive.is_empty() || !support(&p, positive.len() - 1, &mut places));
            let mut running = 0.0;
            let expected = p.iter().position(|w| { running += w; at * sum < running });
            prop_assert_eq!(place(&p, at * sum), expected);
            prop_assert_eq!(place(&p, sum), p.iter().rposition(|&w| w > 0.0));
        }
    }
}
