//! The exponential, in a form that compilers vectorise.

/// The logarithm of 2 in two parts, the first with zeros enough for its products to be exact.
pub(super) const LN2_HIGH: f32 = 0.693_359_4;
pub(super) const LN2_LOW: f32 = -2.121_944_4e-4;
/// `e^r = 1 + r + r^2 P(r)` for `|r| <= ln 2 / 2`: the coefficients of `P`, highest first.
pub(super) const EXP: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    0.166_666_65,
    0.5,
];

/// `e^x` within about two units in the last place, in a form that compilers vectorise.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Outside these bounds the result is 0 or infinite in single precision anyway; NaN passes both comparisons.
    let clamped = if x < -104.0 { -104.0 } else { x };
    let clamped = if clamped > 88.8 { 88.8 } else { clamped };
    let (n, whole) = nearest(clamped * std::f32::consts::LOG2_E);
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = EXP[0];
    for c in &EXP[1..] {
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
