//! The instructions of 64-bit ARM: four registers of four lanes.

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::super::exponential::{EXP, LN2_HIGH, LN2_LOW};
use super::{Line, Simd, sum16, wide};

/// NEON. From `LEVEL` 1 on with products of signed bytes (dotprod), from 2 on with products of unsigned and signed bytes
/// (i8mm) and of bf16 pairs. Used only after all were detected.
///
/// Instructions whose intrinsics are not stable stand as assembly, one to a block.
#[derive(Clone, Copy)]
pub(in super::super) struct Neon<const LEVEL: u8>;

/// Only NEON.
const PLAIN: u8 = 0;
/// With dotprod.
const DOTPROD: u8 = 1;

// SAFETY of every block below: `InstructionSet::detect` hands these types out only where the processor has the features they
// name, each load is bounds-checked on the line before it or of a type of its length, and assembly touches registers alone.

#[inline(always)]
fn four(x: [i8; 4]) -> int8x16_t {
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes(x.map(|x| x as u8)))) }
}

/// Products of sixteen bytes, in pairs: `|w x|` is at most 128 * 127, and two of those fit.
#[inline(always)]
fn pairs(w: int8x16_t, x: int8x16_t) -> int16x8_t {
    unsafe {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        let high = vmull_high_s8(w, x);
        vpaddq_s16(low, high)
    }
}

/// An instruction that adds the products of two registers to a third.
macro_rules! added {
    ($(#[$doc:meta])* $name:ident($acc:ty, $w:ty, $x:ty): $text:literal) => {
        $(#[$doc])*
        #[inline(always)]
        fn $name(mut acc: $acc, w: $w, x: $x) -> $acc {
            unsafe {
                asm!($text, a = inout(vreg) acc, w = in(vreg) w, x = in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags));
            }
            acc
        }
    };
}

added! {
    /// Adds to each lane the products of its four signed bytes.
    sdot(int32x4_t, int8x16_t, int8x16_t): "sdot {a:v}.4s, {w:v}.16b, {x:v}.16b"
}
added! {
    /// The same with unsigned `w`.
    usdot(int32x4_t, int8x16_t, int8x16_t): "usdot {a:v}.4s, {w:v}.16b, {x:v}.16b"
}
added! {
    /// Adds to each lane the products of its pair of bf16.
    bfdot(float32x4_t, uint16x8_t, uint32x4_t): "bfdot {a:v}.4s, {w:v}.8h, {x:v}.8h"
}

/// Four half-precision numbers, widened.
#[inline(always)]
fn widened(x: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    unsafe {
        asm!("fcvtl {o:v}.4s, {x:v}.4h", o = lateout(vreg) wide, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}

#[inline(always)]
fn exp4(v: float32x4_t) -> float32x4_t {
    unsafe {
        let splat = |x: f32| vdupq_n_f32(x);
        // Beyond these bounds the result is 0 or infinite anyway; NaN passes both.
        let v = vmaxq_f32(splat(-104.0), v);
        let v = vminq_f32(splat(89.0), v);
        let n = vrndnq_f32(vmulq_f32(v, splat(std::f32::consts::LOG2_E)));
        let r = vfmsq_f32(v, n, splat(LN2_HIGH));
        let r = vfmsq_f32(r, n, splat(LN2_LOW));
        let mut p = splat(EXP[0]);
        for c in &EXP[1..] {
            p = vfmaq_f32(splat(*c), p, r);
        }
        let p = vfmaq_f32(vaddq_f32(r, splat(1.0)), p, vmulq_f32(r, r));
        // 2^n in two factors: n reaches -150, where one factor alone would leave the range.
        let whole = vcvtq_s32_f32(n);
        let half = vshrq_n_s32::<1>(whole);
        let power =
            |e: int32x4_t| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(e, vdupq_n_s32(127))));
        vmulq_f32(vmulq_f32(p, power(half)), power(vsubq_s32(whole, half)))
    }
}

impl<const LEVEL: u8> Simd for Neon<LEVEL> {
    const FMA: bool = true;
    type V = [float32x4_t; 4];
    #[inline(always)]
    fn zero() -> Self::V {
        Self::splat(0.0)
    }
    #[inline(always)]
    fn load(x: &[f32]) -> Self::V {
        let p = x[..16].as_ptr();
        unsafe {
            [
                vld1q_f32(p),
                vld1q_f32(p.add(4)),
                vld1q_f32(p.add(8)),
                vld1q_f32(p.add(12)),
            ]
        }
    }
    type P = [uint16x8_t; 4];
    #[inline(always)]
    fn load_pairs(x: &[u16]) -> Self::P {
        let p = x[..32].as_ptr();
        unsafe {
            [
                vld1q_u16(p),
                vld1q_u16(p.add(8)),
                vld1q_u16(p.add(16)),
                vld1q_u16(p.add(24)),
            ]
        }
    }
    #[inline(always)]
    fn dot_pairs(acc: Self::V, w: Self::P, x: [u16; 2]) -> Self::V {
        let mut acc = acc;
        unsafe {
            let (even, odd) = (vdupq_n_f32(wide(x[0])), vdupq_n_f32(wide(x[1])));
            let both = vdupq_n_u32(u32::from(x[1]) << 16 | u32::from(x[0]));
            for i in 0..4 {
                if LEVEL > DOTPROD {
                    acc[i] = bfdot(acc[i], w[i], both);
                    continue;
                }
                let w = vreinterpretq_u32_u16(w[i]);
                let odds = vreinterpretq_f32_u32(vandq_u32(w, vdupq_n_u32(0xffff_0000)));
                let evens = vreinterpretq_f32_u32(vshlq_n_u32::<16>(w));
                acc[i] = vfmaq_f32(vfmaq_f32(acc[i], odds, odd), evens, even);
            }
        }
        acc
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let mut c = c;
        for i in 0..4 {
            c[i] = unsafe { vfmaq_f32(c[i], a[i], b[i]) };
        }
        c
    }
    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        let mut lanes = [0.0; 16];
        Self::store(v, &mut lanes);
        sum16(&lanes)
    }
    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn store(v: Self::V, out: &mut [f32]) {
        let p = out[..16].as_mut_ptr();
        for (i, v) in v.into_iter().enumerate() {
            unsafe { vst1q_f32(p.add(4 * i), v) };
        }
    }
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        let mut a = a;
        for i in 0..4 {
            a[i] = unsafe { vaddq_f32(a[i], b[i]) };
        }
        a
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        let mut a = a;
        for i in 0..4 {
            a[i] = unsafe { vmulq_f32(a[i], b[i]) };
        }
        a
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        let mut a = a;
        for i in 0..4 {
            a[i] = unsafe { vdivq_f32(a[i], b[i]) };
        }
        a
    }
    #[inline(always)]
    fn exp(v: Self::V) -> Self::V {
        let mut v = v;
        for v in &mut v {
            *v = exp4(*v);
        }
        v
    }
    #[inline(always)]
    fn widen(x: &[f16; 16]) -> Self::V {
        let p = x.as_ptr().cast::<u16>();
        let mut wide = Self::zero();
        for (i, wide) in wide.iter_mut().enumerate() {
            *wide = widened(unsafe { vld1_u16(p.add(4 * i)) });
        }
        wide
    }
    #[inline(always)]
    fn prefetch<T>(from: &T, at: usize) {
        let at = std::ptr::from_ref(from).wrapping_byte_add(at * size_of::<T>());
        // No more than a hint: an address outside the allocation is not read.
        unsafe {
            asm!("prfm pldl1keep, [{p}]", p = in(reg) at, options(nostack, preserves_flags, readonly));
        }
    }
    const SUMS: usize = 6;
    const ROWS: usize = 4;
    const WIDE: usize = 1;
    #[inline(always)]
    fn quantize(x: &[f32; 32], q: &mut [[i8; 4]; 8]) -> (f32, i32) {
        let q = q.as_flattened_mut().as_mut_ptr();
        unsafe {
            let mut v = [vdupq_n_f32(0.0); 8];
            let mut largest = vdupq_n_f32(0.0);
            for (i, v) in v.iter_mut().enumerate() {
                *v = vld1q_f32(x.as_ptr().add(4 * i));
                // NaN is larger than all else.
                largest = vmaxq_f32(largest, vabsq_f32(*v));
            }
            let largest = vmaxvq_f32(largest);
            let d = match largest.is_finite() {
                true => largest / 127.0,
                false => f32::NAN,
            };
            let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
            let mut sum = vdupq_n_s32(0);
            for i in 0..4 {
                let a = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i], inverse));
                let b = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i + 1], inverse));
                sum = vaddq_s32(sum, vaddq_s32(a, b));
                let narrow = vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)));
                vst1_s8(q.add(8 * i), narrow);
            }
            (d, vaddvq_s32(sum))
        }
    }
    type I = [int32x4_t; 4];
    #[inline(always)]
    fn splat_i(x: i32) -> Self::I {
        unsafe { [vdupq_n_s32(x); 4] }
    }
    #[inline(always)]
    fn add_i(a: Self::I, b: Self::I) -> Self::I {
        let mut a = a;
        for i in 0..4 {
            a[i] = unsafe { vaddq_s32(a[i], b[i]) };
        }
        a
    }
    #[inline(always)]
    fn to_f32(x: Self::I) -> Self::V {
        let mut v = Self::zero();
        for i in 0..4 {
            v[i] = unsafe { vcvtq_f32_s32(x[i]) };
        }
        v
    }
    type B = [uint8x16_t; 4];
    #[inline(always)]
    fn load_line(x: &Line) -> Self::B {
        let p = x.0.as_ptr();
        unsafe {
            [
                vld1q_u8(p),
                vld1q_u8(p.add(16)),
                vld1q_u8(p.add(32)),
                vld1q_u8(p.add(48)),
            ]
        }
    }
    #[inline(always)]
    fn low(b: Self::B) -> Self::B {
        let mut b = b;
        for b in &mut b {
            *b = unsafe { vandq_u8(*b, vdupq_n_u8(15)) };
        }
        b
    }
    #[inline(always)]
    fn high(b: Self::B) -> Self::B {
        let mut b = b;
        for b in &mut b {
            *b = unsafe { vshrq_n_u8::<4>(*b) };
        }
        b
    }
    /// Signed, where products are of signed bytes; else as they are stored.
    type Eight = [int8x16_t; 4];
    #[inline(always)]
    fn eight(b: Self::B) -> Self::Eight {
        let mut w = [unsafe { vdupq_n_s8(0) }; 4];
        for i in 0..4 {
            w[i] = unsafe {
                match Self::ABOVE {
                    true => vreinterpretq_s8_u8(b[i]),
                    false => vreinterpretq_s8_u8(veorq_u8(b[i], vdupq_n_u8(0x80))),
                }
            };
        }
        w
    }
    const ABOVE: bool = LEVEL > DOTPROD;
    #[inline(always)]
    fn dot_eight(acc: Self::I, w: Self::Eight, x: [i8; 4]) -> Self::I {
        let (mut acc, x) = (acc, four(x));
        for i in 0..4 {
            acc[i] = match LEVEL {
                PLAIN => unsafe { vpadalq_s16(acc[i], pairs(w[i], x)) },
                DOTPROD => sdot(acc[i], w[i], x),
                _ => usdot(acc[i], w[i], x),
            };
        }
        acc
    }
    /// Two i16 to a lane without products of four bytes: sixteen products of 15 and 127 fit one.
    type Small = [int32x4_t; 4];
    #[inline(always)]
    fn begin_small(start: i32) -> Self::Small {
        Self::splat_i(if LEVEL == PLAIN { 0 } else { start })
    }
    #[inline(always)]
    fn dot_small(acc: Self::Small, w: Self::B, x: [i8; 4]) -> Self::Small {
        let (mut acc, x) = (acc, four(x));
        for i in 0..4 {
            unsafe {
                let w = vreinterpretq_s8_u8(w[i]);
                acc[i] = match LEVEL {
                    PLAIN => {
                        let sums = vaddq_s16(vreinterpretq_s16_s32(acc[i]), pairs(w, x));
                        vreinterpretq_s32_s16(sums)
                    }
                    _ => sdot(acc[i], w, x),
                };
            }
        }
        acc
    }
    #[inline(always)]
    fn end_small(acc: Self::Small, start: i32) -> Self::I {
        let mut acc = acc;
        if LEVEL == PLAIN {
            for acc in &mut acc {
                *acc = unsafe { vpadalq_s16(vdupq_n_s32(start), vreinterpretq_s16_s32(*acc)) };
            }
        }
        acc
    }
}
