//! Softmax of long rows and its gradient, in f32 and f64: what losses over whole vocabularies are made of.
//!
//! Exponentials of one temperature give those of half of it by squaring, so a row is read once for both. Sums are of
//! sixteen lanes, so they do not depend on the length of registers. NaN and infinity leave NaN in the sums.
//!
//! A row of a large vocabulary fills the second cache, so what counts is how often it is read, and the instructions of an
//! exponential. The largest value is not sought before: exponentials are taken relative to that of the first values,
//! which has proved good enough at the end of all rows but the strangest.

use super::probability;
use super::simd::{InstructionSet, Simd, dispatch};

const LANES: usize = 16;

/// Values that the reference of a row is the largest of.
const FIRST: usize = 512;

/// How far, as a power of e, the largest value may lie above the reference: its square is far from overflow.
const ROOM: f64 = 20.0;

/// How many values ahead of their use are asked for.
const AHEAD: usize = 1024;

/// f32 or f64.
///
/// ```
/// use scylla_core::kernels::softmax::Real;
///
/// fn half_life<F: Real>(x: F) -> F {
///     F::exp(-(x * F::narrow(std::f64::consts::LN_2)), false)
/// }
/// assert!((half_life(1.0f64) - 0.5).abs() < 1e-12);
/// ```
pub trait Real:
    Copy
    + PartialOrd
    + Send
    + Sync
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::fmt::Debug
    + 'static
{
    /// 0
    const NULL: Self;
    /// Minus infinity.
    const LEAST: Self;
    /// As such a number.
    fn narrow(x: f64) -> Self;
    /// `e^x` for `x` up to some tens within a few units in the last place, or within a few of x's where that is more; next to
    /// nothing where that is no normal number, NaN for NaN. `fma` says whether the processor has fused multiply-adds.
    fn exp(x: Self, fma: bool) -> Self;
    /// `a * b + c`, fused where `fma`.
    fn fused(a: Self, b: Self, c: Self, fma: bool) -> Self;
    /// `|x|`
    fn magnitude(self) -> Self;
}

impl Real for f32 {
    const NULL: Self = 0.0;
    const LEAST: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn narrow(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn exp(x: Self, fma: bool) -> Self {
        // Adding this rounds to an integer, which then stands in the low bits of the sum.
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
        // 2^f = 1 + f P(f) for |f| <= 1/2, of least relative deviation (9e-8): the coefficients of P, highest first.
        #[allow(clippy::approx_constant)] // near ln 2 and not it: the deviation is spread
        const POWER: [f32; 5] = [
            0.001_326_473_7,
            0.009_671_517,
            0.055_507_336,
            0.240_222_42,
            0.693_147,
        ];
        let t = x * std::f32::consts::LOG2_E;
        let t = if t < -125.0 { -125.0 } else { t }; // NaN passes
        let shifted = t + SHIFT;
        let f = t - (shifted - SHIFT);
        let mut p = POWER[0];
        for &c in &POWER[1..] {
            p = Self::fused(p, f, c, fma);
        }
        p = Self::fused(p, f, 1.0, fma);
        // The integer goes straight into the exponent.
        f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
    }

    #[inline(always)]
    fn fused(a: Self, b: Self, c: Self, fma: bool) -> Self {
        if fma { a.mul_add(b, c) } else { a * b + c }
    }

    #[inline(always)]
    fn magnitude(self) -> Self {
        self.abs()
    }
}

impl Real for f64 {
    const NULL: Self = 0.0;
    const LEAST: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn narrow(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn exp(x: Self, fma: bool) -> Self {
        let e = probability::exp(x, fma);
        if x.is_nan() { x } else { e }
    }

    #[inline(always)]
    fn fused(a: Self, b: Self, c: Self, fma: bool) -> Self {
        if fma { a.mul_add(b, c) } else { a * b + c }
    }

    #[inline(always)]
    fn magnitude(self) -> Self {
        self.abs()
    }
}

/// What a softmax divides by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sums<R> {
    /// What exponentials are relative to: the largest value, or one near it.
    pub reference: R,
    /// `sum exp(scale (x - reference))`
    pub sum: R,
    /// `sum exp(2 scale (x - reference))`
    pub squares: R,
}

#[inline(always)]
fn total<R: Real>(lanes: &[R; LANES]) -> R {
    let mut sum = [R::NULL; 4];
    for (i, &lane) in lanes.iter().enumerate() {
        sum[i % 4] = sum[i % 4] + lane;
    }
    (sum[0] + sum[2]) + (sum[1] + sum[3])
}

#[inline(always)]
fn greater<R: Real>(a: R, b: R) -> R {
    if b > a { b } else { a }
}

/// Sums of a row at `scale > 0` and at twice that. Of an empty row, and of one without a finite largest value, they are NaN.
pub fn sums<R: Real>(x: &[R], scale: R) -> Sums<R> {
    dispatch!(InstructionSet::detect(), sums_of(x, scale): (x: &[R], scale: R) [Sums<R>] <R: Real>)
}

#[inline(always)]
fn sums_of<S: Simd, R: Real>(x: &[R], scale: R) -> Sums<R> {
    let (reference, sum, squares) = both_sums::<S, R>(x, scale, |_, e| e);
    Sums {
        reference,
        sum,
        squares,
    }
}

/// The reference of a row and the sum of its exponentials as [`sums`] has them, and in place of the squares `sum x exp(scale (x - reference))`.
pub fn weighted_sums<R: Real>(x: &[R], scale: R) -> (R, R, R) {
    dispatch!(InstructionSet::detect(), weighted_sums_of(x, scale): (x: &[R], scale: R) [(R, R, R)] <R: Real>)
}

#[inline(always)]
fn weighted_sums_of<S: Simd, R: Real>(x: &[R], scale: R) -> (R, R, R) {
    both_sums::<S, R>(x, scale, |x, _| x)
}

/// The reference, the sum of the exponentials, and that of what `times` makes of a value and its exponential, multiplied by the latter.
#[inline(always)]
fn both_sums<S: Simd, R: Real>(x: &[R], scale: R, times: impl Fn(R, R) -> R) -> (R, R, R) {
    let of_first = x[..x.len().min(FIRST)].iter().copied();
    let first = of_first.fold(R::LEAST, greater);
    let reference = if first > R::LEAST { first } else { R::NULL };
    let found = sums_from::<S, R>(x, scale, reference, &times);
    let above = (found.0 - reference) * scale;
    let room = R::narrow(ROOM);
    // NaN where there is no finite largest value.
    let nothing = found.0 * R::NULL;
    let (reference, (_, sum, other)) = match above > room || above < -room {
        true => (found.0, sums_from::<S, R>(x, scale, found.0, &times)),
        false => (reference, found),
    };
    (reference, sum + nothing, other + nothing)
}

/// The largest value, and the sums relative to `reference`.
#[inline(always)]
fn sums_from<S: Simd, R: Real>(
    x: &[R],
    scale: R,
    reference: R,
    times: &impl Fn(R, R) -> R,
) -> (R, R, R) {
    let mut max = [R::LEAST; LANES];
    let (mut sum, mut other) = ([R::NULL; LANES], [R::NULL; LANES]);
    let (tiles, rest) = x.as_chunks::<LANES>();
    for tile in tiles {
        S::prefetch(tile, AHEAD * size_of::<R>());
        for i in 0..LANES {
            let e = R::exp((tile[i] - reference) * scale, S::FMA);
            max[i] = greater(max[i], tile[i]);
            sum[i] = sum[i] + e;
            other[i] = R::fused(e, times(tile[i], e), other[i], S::FMA);
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        let e = R::exp((x - reference) * scale, S::FMA);
        max[i] = greater(max[i], x);
        sum[i] = sum[i] + e;
        other[i] = other[i] + e * times(x, e);
    }
    let largest = max.iter().copied().fold(R::LEAST, greater);
    (largest, total(&sum), total(&other))
}

/// `out += factor exp(scale (x - reference))`
pub fn accumulate<R: Real>(x: &[R], reference: R, scale: R, factor: R, out: &mut [R]) {
    assert_eq!(x.len(), out.len());
    dispatch!(InstructionSet::detect(), accumulate_of(x, reference, scale, factor, out): (x: &[R], reference: R, scale: R, factor: R, out: &mut [R]) <R: Real>);
}

#[inline(always)]
fn accumulate_of<S: Simd, R: Real>(x: &[R], reference: R, scale: R, factor: R, out: &mut [R]) {
    each::<R>(x, out, |x, out| {
        let e = R::exp((x - reference) * scale, S::FMA);
        R::fused(factor, e, out, S::FMA)
    });
}

/// `out = e (a + b e)` with `e = exp(scale (x - reference))`, added to what is there where `add`: the dense part of a gradient
/// through softmax at one temperature and at half of it.
pub fn combine<R: Real>(x: &[R], reference: R, scale: R, a: R, b: R, add: bool, out: &mut [R]) {
    assert_eq!(x.len(), out.len());
    dispatch!(InstructionSet::detect(), combine_of(x, reference, scale, a, b, add, out): (x: &[R], reference: R, scale: R, a: R, b: R, add: bool, out: &mut [R]) <R: Real>);
}

#[inline(always)]
fn combine_of<S: Simd, R: Real>(
    x: &[R],
    reference: R,
    scale: R,
    a: R,
    b: R,
    add: bool,
    out: &mut [R],
) {
    let value = |x: R| {
        let e = R::exp((x - reference) * scale, S::FMA);
        e * R::fused(b, e, a, S::FMA)
    };
    match add {
        true => each::<R>(x, out, |x, out| out + value(x)),
        false => each::<R>(x, out, |x, _| value(x)),
    }
}

/// The mean of a row, and the sum of the squares of what its values are away from it.
pub fn moments<R: Real>(x: &[R]) -> (R, R) {
    dispatch!(InstructionSet::detect(), moments_of(x): (x: &[R]) [(R, R)] <R: Real>)
}

#[inline(always)]
fn moments_of<S: Simd, R: Real>(x: &[R]) -> (R, R) {
    let sum = over::<S, R>(x, |x, sum| sum + x);
    let mean = sum * R::narrow(1.0 / x.len() as f64);
    let squares = over::<S, R>(x, |x, sum| R::fused(x - mean, x - mean, sum, S::FMA));
    (mean, squares)
}

/// A sum over a row in lanes.
#[inline(always)]
fn over<S: Simd, R: Real>(x: &[R], add: impl Fn(R, R) -> R) -> R {
    let mut sum = [R::NULL; LANES];
    let (tiles, rest) = x.as_chunks::<LANES>();
    for tile in tiles {
        S::prefetch(tile, AHEAD * size_of::<R>());
        for i in 0..LANES {
            sum[i] = add(tile[i], sum[i]);
        }
    }
    for (sum, &x) in sum.iter_mut().zip(rest) {
        *sum = add(x, *sum);
    }
    total(&sum)
}

/// `factor exp(scale (x - reference))` of each value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exponentials<R> {
    /// What they are multiplied by.
    pub factor: R,
    /// What they are relative to.
    pub reference: R,
    /// Of the exponent, at least 0.
    pub scale: R,
}

impl<R: Real> Exponentials<R> {
    /// Zeros.
    pub fn none() -> Self {
        Self {
            factor: R::NULL,
            reference: R::NULL,
            scale: R::NULL,
        }
    }
}

/// `out = a(x) + b(x) + slope (x - mean)`: the dense part of a gradient through a softmax of what was divided by its deviation, beside one
/// through a softmax as it is.
pub fn combine_standardized<R: Real>(
    x: &[R],
    a: Exponentials<R>,
    b: Exponentials<R>,
    (slope, mean): (R, R),
    out: &mut [R],
) {
    assert_eq!(x.len(), out.len());
    let line = (slope, mean);
    dispatch!(InstructionSet::detect(), standardized_of(x, a, b, line, out): (x: &[R], a: Exponentials<R>, b: Exponentials<R>, line: (R, R), out: &mut [R]) <R: Real>);
}

#[inline(always)]
fn standardized_of<S: Simd, R: Real>(
    x: &[R],
    a: Exponentials<R>,
    b: Exponentials<R>,
    (slope, mean): (R, R),
    out: &mut [R],
) {
    let of = |x: R, e: &Exponentials<R>| R::exp((x - e.reference) * e.scale, S::FMA);
    each::<R>(x, out, |x, _| {
        let sum = R::fused(b.factor, of(x, &b), slope * (x - mean), S::FMA);
        R::fused(a.factor, of(x, &a), sum, S::FMA)
    });
}

/// Changes each value beside its input.
#[inline(always)]
fn each<R: Real>(x: &[R], out: &mut [R], change: impl Fn(R, R) -> R) {
    let (tiles, rest) = x.as_chunks::<LANES>();
    let (outs, last) = out.as_chunks_mut::<LANES>();
    for (tile, out) in tiles.iter().zip(outs) {
        for i in 0..LANES {
            out[i] = change(tile[i], out[i]);
        }
    }
    for (&x, out) in rest.iter().zip(last) {
        *out = change(x, *out);
    }
}

/// Distances of the first kind between rows of `x` `[N, K]` and columns of `y` `[K, M]`: `out` `[N, M]` gets
/// `sum_k |x_nk - y_km|`.
pub fn distances<R: Real>(x: &[R], y: &[R], k: usize, out: &mut [R]) {
    assert!(k > 0 && x.len().is_multiple_of(k) && y.len().is_multiple_of(k));
    assert_eq!(out.len(), x.len() / k * (y.len() / k));
    dispatch!(InstructionSet::detect(), distances_of(x, y, k, out): (x: &[R], y: &[R], k: usize, out: &mut [R]) <R: Real>);
}

#[inline(always)]
fn distances_of<S: Simd, R: Real>(x: &[R], y: &[R], k: usize, out: &mut [R]) {
    let m = y.len() / k;
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(m)) {
        out.fill(R::NULL);
        for (&x, y) in x.iter().zip(y.chunks_exact(m)) {
            each::<R>(y, out, |y, out| out + (x - y).magnitude());
        }
    }
}

/// The gradient of [`distances`] with respect to `y`: `out` `[K, M]` gets `sum_n upstream_nm sign(y_km - x_nk)`, where the
/// sign of 0 is 0.
pub fn distances_gradient<R: Real>(x: &[R], y: &[R], k: usize, upstream: &[R], out: &mut [R]) {
    assert!(k > 0 && x.len().is_multiple_of(k) && y.len().is_multiple_of(k));
    assert_eq!(upstream.len(), x.len() / k * (y.len() / k));
    assert_eq!(out.len(), y.len());
    dispatch!(InstructionSet::detect(), distances_gradient_of(x, y, k, upstream, out): (x: &[R], y: &[R], k: usize, upstream: &[R], out: &mut [R]) <R: Real>);
}

#[inline(always)]
fn distances_gradient_of<S: Simd, R: Real>(
    x: &[R],
    y: &[R],
    k: usize,
    upstream: &[R],
    out: &mut [R],
) {
    let m = y.len() / k;
    out.fill(R::NULL);
    for (x, upstream) in x.chunks_exact(k).zip(upstream.chunks_exact(m)) {
        for ((&x, y), out) in x.iter().zip(y.chunks_exact(m)).zip(out.chunks_exact_mut(m)) {
            for ((&y, &g), out) in y.iter().zip(upstream).zip(out) {
                let up = if y > x { g } else { R::NULL };
                let down = if y < x { g } else { R::NULL };
                *out = *out + (up - down);
            }
        }
    }
}

/// `matrix` `[N, M]` times `v` `[M]` into `out` `[N]`.
pub fn times<R: Real>(matrix: &[R], v: &[R], out: &mut [R]) {
    assert_eq!(matrix.len(), v.len() * out.len());
    dispatch!(InstructionSet::detect(), times_of(matrix, v, out): (matrix: &[R], v: &[R], out: &mut [R]) <R: Real>);
}

#[inline(always)]
fn times_of<S: Simd, R: Real>(matrix: &[R], v: &[R], out: &mut [R]) {
    let (vs, last) = v.as_chunks::<LANES>();
    for (row, out) in matrix.chunks_exact(v.len()).zip(out) {
        let (tiles, rest) = row.as_chunks::<LANES>();
        let mut lanes = [R::NULL; LANES];
        for (tile, v) in tiles.iter().zip(vs) {
            for i in 0..LANES {
                lanes[i] = R::fused(tile[i], v[i], lanes[i], S::FMA);
            }
        }
        for (i, (&r, &v)) in rest.iter().zip(last).enumerate() {
            lanes[i] = lanes[i] + r * v;
        }
        *out = total(&lanes);
    }
}

/// `u` `[N]` times `matrix` `[N, M]` added to `out` `[M]`.
pub fn add_transposed_times<R: Real>(matrix: &[R], u: &[R], out: &mut [R]) {
    assert_eq!(matrix.len(), u.len() * out.len());
    dispatch!(InstructionSet::detect(), add_transposed_of(matrix, u, out): (matrix: &[R], u: &[R], out: &mut [R]) <R: Real>);
}

#[inline(always)]
fn add_transposed_of<S: Simd, R: Real>(matrix: &[R], u: &[R], out: &mut [R]) {
    for (row, &u) in matrix.chunks_exact(out.len()).zip(u) {
        each::<R>(row, out, |r, out| R::fused(r, u, out, S::FMA));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: &[usize] = match cfg!(miri) {
        true => &[1, 5, 33, 530],
        false => &[1, 5, 16, 33, 2048, 2049, 6001],
    };

    fn row(n: usize) -> Vec<f64> {
        let value = |i: usize| ((i * 7919) % 1009) as f64 * 0.02 - 9.0;
        // The largest comes late, so that what was summed before is lessened.
        (0..n).map(|i| value(i) + i as f64 * 1e-3).collect()
    }

    fn single(x: &[f64]) -> Vec<f32> {
        x.iter().map(|&x| x as f32).collect()
    }

    #[test]
    fn sums_follow_the_library_function_in_both_precisions() {
        for &n in SIZES {
            let x = row(n);
            let found = sums(&x, 0.5);
            let max = x.iter().copied().fold(f64::MIN, f64::max);
            let at = |scale: f64| -> f64 { x.iter().map(|x| (scale * (x - max)).exp()).sum() };
            assert!(found.reference <= max && found.reference > max - 40.0);
            let at = |scale: f64| at(scale) * (scale * (max - found.reference)).exp();
            assert!((found.sum / at(0.5) - 1.0).abs() < 1e-13, "{n}");
            assert!((found.squares / at(1.0) - 1.0).abs() < 1e-13, "{n}");
            let found = sums(&single(&x), 0.5);
            assert_eq!(
                found.reference,
                single(&x)[..n.min(FIRST)]
                    .iter()
                    .copied()
                    .fold(f32::MIN, f32::max)
            );
            assert!((f64::from(found.sum) / at(0.5) - 1.0).abs() < 2e-6, "{n}");
            assert!((f64::from(found.squares) / at(1.0) - 1.0).abs() < 2e-6);
        }
    }

    #[test]
    fn what_is_not_finite_leaves_nan_and_minus_infinity_has_no_mass() {
        for n in [1, 17, if cfg!(miri) { 530 } else { 3000 }] {
            for bad in [f64::NAN, f64::INFINITY] {
                for at in [0, n / 2, n - 1] {
                    let mut x = row(n);
                    x[at] = bad;
                    assert!(sums(&x, 1.0).sum.is_nan(), "{n} {bad} {at}");
                    assert!(sums(&single(&x), 1.0).sum.is_nan(), "{n} {bad} {at}");
                }
            }
        }
        assert!(sums::<f32>(&[], 1.0).sum.is_nan());
        assert!(sums(&[f64::NEG_INFINITY; 20], 1.0).sum.is_nan());
        assert_eq!(sums(&[f32::NEG_INFINITY, 1.0], 1.0).sum, 1.0);
        assert_eq!(sums(&[f64::NEG_INFINITY, 1.0], 1.0).sum, 1.0);
    }

    #[test]
    fn a_row_that_begins_far_from_its_largest_value_is_summed_as_well() {
        for (first, then) in [
            (-1e4, 3.0),
            (f64::NEG_INFINITY, -700.0),
            (0.0, 500.0),
            (f64::NEG_INFINITY, 700.0),
        ] {
            let mut x = vec![first; 600];
            x.extend([then; 100]);
            let found = sums(&x, 1.0);
            assert_eq!(
                (found.reference, found.sum, found.squares),
                (then, 100.0, 100.0)
            );
            let found = sums(&single(&x), 1.0);
            assert_eq!(
                (found.reference, found.sum, found.squares),
                (then as f32, 100.0, 100.0)
            );
        }
    }

    #[test]
    fn weighted_exponentials_equal_the_plain_loops() {
        for &n in SIZES {
            let x = row(n);
            let max = sums(&x, 1.0).reference;
            let mut mass: Vec<f64> = (0..n).map(|i| i as f64).collect();
            accumulate(&x, max, 0.5, 3.0, &mut mass);
            let mut out = vec![7.0; n];
            combine(&x, max, 0.5, 2.0, -3.0, false, &mut out);
            let mut more = out.clone();
            combine(&x, max, 0.5, 2.0, -3.0, true, &mut more);
            for i in 0..n {
                let e = (0.5 * (x[i] - max)).exp();
                assert!((mass[i] - (i as f64 + 3.0 * e)).abs() < 1e-11 * (1.0 + e));
                let expected = e * (2.0 - 3.0 * e);
                let room = 1e-13 * (1.0 + expected.abs());
                assert!((out[i] - expected).abs() < room);
                assert!((more[i] - 2.0 * expected).abs() < 2.0 * room);
            }
        }
    }

    #[test]
    fn moments_and_what_is_combined_of_them_equal_the_plain_loops() {
        for &n in SIZES {
            let x = row(n);
            let (mean, squares) = moments(&x);
            let expected = x.iter().sum::<f64>() / n as f64;
            assert!((mean - expected).abs() < 1e-12);
            let expected: f64 = x.iter().map(|x| (x - mean) * (x - mean)).sum();
            assert!((squares - expected).abs() <= 1e-12 * (1.0 + expected));
            let top = sums(&x, 1.0).reference;
            let (reference, sum, weighted) = weighted_sums(&x, 0.4);
            assert_eq!((reference, sum), (top, sums(&x, 0.4).sum));
            let expected: f64 = x.iter().map(|x| x * (0.4 * (x - top)).exp()).sum();
            let size: f64 = x.iter().map(|x| (x * (0.4 * (x - top)).exp()).abs()).sum();
            assert!((weighted - expected).abs() < 1e-12 * (1.0 + size));
            let a = Exponentials {
                factor: 3.0,
                reference: top,
                scale: 0.4,
            };
            let mut out = vec![7.0; n];
            combine_standardized(&x, a, Exponentials::none(), (-0.5, mean), &mut out);
            let mut both = vec![7.0; n];
            let b = Exponentials {
                factor: -2.0,
                scale: 1.0,
                ..a
            };
            combine_standardized(&x, a, b, (0.0, mean), &mut both);
            for i in 0..n {
                let e = |scale: f64| (scale * (x[i] - top)).exp();
                let expected = 3.0 * e(0.4) - 0.5 * (x[i] - mean);
                assert!((out[i] - expected).abs() < 1e-12 * (1.0 + expected.abs()));
                let expected = 3.0 * e(0.4) - 2.0 * e(1.0);
                assert!((both[i] - expected).abs() < 1e-12 * (1.0 + e(1.0)));
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(moments(&[1.0, bad, 2.0]).1.is_nan());
        }
    }

    #[test]
    fn distances_their_gradient_and_products_equal_the_plain_loops() {
        for (n, m, k) in [(1, 1, 1), (3, 17, 5), (20, 35, 7)] {
            let (x, y, g) = (row(n * k), row(m * k), row(n * m));
            let mut found = vec![f64::NAN; n * m];
            distances(&x, &y, k, &mut found);
            let mut gradient = vec![f64::NAN; k * m];
            distances_gradient(&x, &y, k, &g, &mut gradient);
            for i in 0..n {
                for j in 0..m {
                    let expected: f64 = (0..k).map(|l| (x[i * k + l] - y[l * m + j]).abs()).sum();
                    assert!((found[i * m + j] - expected).abs() < 1e-12);
                }
            }
            for l in 0..k {
                for j in 0..m {
                    let sign = |d: f64| if d == 0.0 { 0.0 } else { d.signum() };
                    let of = |i: usize| g[i * m + j] * sign(y[l * m + j] - x[i * k + l]);
                    let expected: f64 = (0..n).map(of).sum();
                    assert!((gradient[l * m + j] - expected).abs() < 1e-9);
                }
            }
            let (v, u) = (row(m), row(n));
            let mut product = vec![0.0; n];
            times(&g, &v, &mut product);
            let mut across = vec![1.0; m];
            add_transposed_times(&g, &u, &mut across);
            for i in 0..n {
                let expected: f64 = (0..m).map(|j| g[i * m + j] * v[j]).sum();
                assert!((product[i] - expected).abs() < 1e-9);
            }
            for j in 0..m {
                let expected: f64 = 1.0 + (0..n).map(|i| g[i * m + j] * u[i]).sum::<f64>();
                assert!((across[j] - expected).abs() < 1e-9);
            }
        }
    }
}
