//! What lies between the products: norms, rotary positions, activations. Row by row, without allocation.

use super::exponential::exp;
use super::simd::{InstructionSet, Simd, dispatch};

/// `x += y`
#[inline]
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Root-mean-square normalisation of each row of `x` `[M, H]` by `weight` `[H]`, into `out`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    dispatch!(InstructionSet::detect(), norm_rows(x, weight, eps, out): (x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) <>);
}

/// `x += y`, then the same of the sums: a residual and the norm that follows it.
pub fn add_rms_norm(x: &mut [f32], y: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    dispatch!(InstructionSet::detect(), add_norm_rows(x, y, weight, eps, out): (x: &mut [f32], y: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) <>);
}

#[inline(always)]
fn norm_rows<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let h = weight.len();
    for (x, out) in x.chunks_exact(h).zip(out.chunks_exact_mut(h)) {
        norm_row::<S>(x, weight, eps, out);
    }
}

#[inline(always)]
fn add_norm_rows<S: Simd>(x: &mut [f32], y: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let h = weight.len();
    let rows = x.chunks_exact_mut(h).zip(y.chunks_exact(h));
    for ((x, y), out) in rows.zip(out.chunks_exact_mut(h)) {
        add(x, y);
        norm_row::<S>(x, weight, eps, out);
    }
}

#[inline(always)]
fn norm_row<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // Four sums, so that additions need not wait for one another.
    let mut sums = [S::zero(); 4];
    let (tiles, rest) = x.as_chunks::<16>();
    for (i, tile) in tiles.iter().enumerate() {
        let v = S::load(tile);
        sums[i % 4] = S::fma(v, v, sums[i % 4]);
    }
    let sum = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
    let rest: f32 = rest.iter().map(|v| v * v).sum();
    let scale = 1.0 / ((sum + rest) / weight.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * scale * w;
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
    dispatch!(InstructionSet::detect(), swiglu_rows(x, inner, out): (x: &[f32], inner: usize, out: &mut [f32]) <>);
}

#[inline(always)]
fn swiglu_rows<S: Simd>(x: &[f32], inner: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(2 * inner).zip(out.chunks_exact_mut(inner)) {
        let (gate, up) = x.split_at(inner);
        let (out, last) = out.as_chunks_mut::<16>();
        let (gates, gate) = gate.as_chunks::<16>();
        let (ups, up) = up.as_chunks::<16>();
        for ((o, g), u) in out.iter_mut().zip(gates).zip(ups) {
            let (g, u) = (S::load(g), S::load(u));
            let one = S::splat(1.0);
            let below = S::add(one, S::exp(S::mul(g, S::splat(-1.0))));
            S::store(S::mul(S::div(g, below), u), o);
        }
        for ((o, &g), &u) in last.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
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

    #[inline(always)]
    fn first_lane<S: Simd>(x: f32) -> f32 {
        let mut lanes = [0.0; 16];
        S::store(S::exp(S::splat(x)), &mut lanes);
        lanes[0]
    }

    #[test]
    fn exp_follows_the_library_function() {
        let vector = |x: f32| -> f32 {
            dispatch!(InstructionSet::detect(), first_lane(x): (x: f32) [f32] <>)
        };
        let exps: [&dyn Fn(f32) -> f32; 2] = [&exp, &vector];
        for exp in exps {
            let mut worst = 0.0f64;
            for i in (-87_000..88_000).step_by(if cfg!(miri) { 997 } else { 1 }) {
                let x = i as f32 * 1e-3;
                let expected = f64::from(x).exp();
                worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
            }
            assert!(worst < 3e-7, "relative error {worst}");
            assert_eq!(exp(-1e9), 0.0);
            assert_eq!(exp(f32::NEG_INFINITY), 0.0);
            assert_eq!(exp(0.0), 1.0);
            assert!(exp(f32::NAN).is_nan());
            assert!(exp(1e9).is_infinite());
        }
    }

    #[test]
    fn a_residual_is_added_before_the_norm() {
        let values = |salt: f32| -> Vec<f32> {
            (0..2 * 37)
                .map(|i| (i as f32 * 0.37 + salt).sin())
                .collect()
        };
        let (mut x, y, w) = (values(0.0), values(1.0), vec![0.5; 37]);
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        let (mut fused, mut apart) = (vec![0.0; 74], vec![0.0; 74]);
        add_rms_norm(&mut x, &y, &w, 1e-5, &mut fused);
        rms_norm(&sums, &w, 1e-5, &mut apart);
        assert_eq!((x, fused), (sums, apart));
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
