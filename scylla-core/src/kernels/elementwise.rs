//! What lies between the products: norms, rotary positions, activations. Row by row, without allocation.

use super::simd::{Level, Simd, dispatch};

/// `x += y`
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Root-mean-square normalisation of each row of `x` `[M, H]` by `weight` `[H]`, into `out`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    dispatch!(Level::detect(), norm_rows(x, weight, eps, out): (x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) <>);
}

#[inline(always)]
fn norm_rows<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let h = weight.len();
    for (x, out) in x.chunks_exact(h).zip(out.chunks_exact_mut(h)) {
        let mut acc = S::zero();
        let chunks = x.chunks_exact(16);
        let mut rest = 0.0;
        for v in chunks.remainder() {
            rest += v * v;
        }
        for chunk in chunks {
            let v = S::load(chunk);
            acc = S::fma(v, v, acc);
        }
        let scale = 1.0 / ((S::sum(acc) + rest) / h as f32 + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * scale * w;
        }
    }
}

/// Rotates the heads of one row in place by `cos` and `sin` `[E / 2]`, pairing element `i` with `i + E / 2`.
pub fn rope(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for head in row.chunks_exact_mut(2 * half) {
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (x, y) = (a[i], b[i]);
            a[i] = x * cos[i] - y * sin[i];
            b[i] = y * cos[i] + x * sin[i];
        }
    }
}

/// `silu(gate) * up` for rows `[gate | up]` of `2 I` values, into `out` `[M, I]`.
pub fn swiglu(x: &[f32], inner: usize, out: &mut [f32]) {
    dispatch!(Level::detect(), swiglu_rows(x, inner, out): (x: &[f32], inner: usize, out: &mut [f32]) <>);
}

#[inline(always)]
fn swiglu_rows<S: Simd>(x: &[f32], inner: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(2 * inner).zip(out.chunks_exact_mut(inner)) {
        let (gate, up) = x.split_at(inner);
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
}

/// `e^x` within about two units in the last place, in a form that compilers vectorise.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Outside these bounds the result is 0 or infinite in single precision anyway; NaN passes both comparisons.
    let clamped = if x < -104.0 { -104.0 } else { x };
    let clamped = if clamped > 88.8 { 88.8 } else { clamped };
    let (n, whole) = nearest(clamped * std::f32::consts::LOG2_E);
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        0.166_666_65,
        0.5,
    ] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    // 2^n in two factors: n reaches -150, where one factor alone would leave the range.
    let half = whole >> 1;
    let power = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    p * power(half) * power(whole.wrapping_sub(half))
}

/// The nearest whole number (ties to even) as f32 and as i32, for magnitudes below 2^22. A cast would saturate, which
/// no vector instruction does; here adding a large number leaves the whole one in the lower bits.
#[inline(always)]
pub(super) fn nearest(x: f32) -> (f32, i32) {
    const LARGE: f32 = 12_582_912.0; // 1.5 * 2^23
    let shifted = x + LARGE;
    let whole = (shifted.to_bits() as i32).wrapping_sub(LARGE.to_bits() as i32);
    (shifted - LARGE, whole)
}

/// The largest value, NaN aside; minus infinity where there is none.
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, v);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_follows_the_library_function() {
        let mut worst = 0.0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 3e-7, "relative error {worst}");
        assert_eq!(exp(-1e9), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1e9).is_infinite());
    }

    #[test]
    fn rms_norm_divides_by_the_root_mean_square() {
        let x: Vec<f32> = (0..2 * 37).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let w: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mut out = vec![0.0; 74];
        rms_norm(&x, &w, 1e-5, &mut out);
        for r in 0..2 {
            let row = &x[r * 37..(r + 1) * 37];
            let mean = row.iter().map(|v| f64::from(v * v)).sum::<f64>() / 37.0;
            for i in 0..37 {
                let expected = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
                assert!((f64::from(out[r * 37 + i]) - expected).abs() < 1e-5);
            }
        }
    }
}
