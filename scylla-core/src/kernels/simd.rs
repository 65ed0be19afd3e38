//! Vectors of sixteen f32 lanes, and the instruction sets that carry them.
//!
//! In a product each lane adds up one output, in the order of the inner dimension, whatever the number of rows beside
//! it, so a row's result does not depend on its company. Different instruction sets may round differently.

use half::f16;

use super::exponential::{exp, nearest};

/// Sixteen f32 lanes of one instruction set.
pub(super) trait Simd: Copy {
    /// Whether a fused multiply-add is one instruction.
    const FMA: bool;
    /// The register (or registers) that hold the lanes.
    type V: Copy;
    fn zero() -> Self::V;
    /// Loads the first 16 values of `x`.
    fn load(x: &[f32]) -> Self::V;
    /// Sixteen pairs of bf16.
    type P: Copy;
    /// Loads the first 32 bf16 values of `x`.
    fn load_pairs(x: &[u16]) -> Self::P;
    /// Adds to each lane the products of its pair with the pair `x`.
    fn dot_pairs(acc: Self::V, w: Self::P, x: [u16; 2]) -> Self::V;
    /// `a * b + c`
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of the lanes, always in the same order.
    fn sum(v: Self::V) -> f32;
    /// Sixteen copies of `x`.
    fn splat(x: f32) -> Self::V;
    /// Stores the lanes into the first 16 values of `out`.
    fn store(v: Self::V, out: &mut [f32]);
    /// `a + b`
    fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `e^x` of each lane, within about two units in the last place.
    #[inline(always)]
    fn exp(v: Self::V) -> Self::V {
        let mut lanes = [0.0; 16];
        Self::store(v, &mut lanes);
        Self::load(&lanes.map(exp))
    }
    /// Sixteen half-precision numbers, widened.
    fn widen(x: &[f16; 16]) -> Self::V;
    /// Asks for the cache line that holds `from + at`; it need not lie within the allocation.
    fn prefetch<T>(from: &T, at: usize);
    /// Sums of sixteen lanes that registers hold beside what is added to them.
    const SUMS: usize;
    /// Rows that a panel of products keeps in registers, at most.
    const ROWS: usize;
    /// Tiles of quantised weights that some rows pass together.
    const WIDE: usize;
    /// Quantises 32 values to `round(x / d)` with `d = max |x| / 127`; returns `d` and the sum of the whole numbers.
    /// NaN and infinity leave NaN in `d`.
    #[inline(always)]
    fn quantize(x: &[f32; 32], q: &mut [[i8; 4]; 8]) -> (f32, i32) {
        quantize(x, q)
    }
    /// Sixteen i32 lanes.
    type I: Copy;
    fn splat_i(x: i32) -> Self::I;
    /// `a + b`
    fn add_i(a: Self::I, b: Self::I) -> Self::I;
    /// The lanes as f32.
    fn to_f32(i: Self::I) -> Self::V;
    /// 64 unsigned bytes, four for each lane.
    type B: Copy;
    fn load_line(x: &Line) -> Self::B;
    /// The lower four bits of each byte.
    fn low(b: Self::B) -> Self::B;
    /// The upper four bits of each byte.
    fn high(b: Self::B) -> Self::B;
    /// Weights `q` of eight bits, of which a line stores `q + 128`, as products take them.
    type Eight: Copy;
    fn eight(b: Self::B) -> Self::Eight;
    /// Whether [`Simd::dot_eight`] multiplies `q + 128`, and not `q`.
    const ABOVE: bool;
    /// Adds to each lane the products of its four weights with the four signed bytes of `x`; none of those is -128.
    fn dot_eight(acc: Self::I, w: Self::Eight, x: [i8; 4]) -> Self::I;
    /// Sums of products with weights of four bits, in each lane.
    type Small: Copy;
    /// Sums that begin at `start`.
    fn begin_small(start: i32) -> Self::Small;
    /// As [`Simd::dot_eight`], with bytes of at most 15; eight times between beginning and end, at most.
    fn dot_small(acc: Self::Small, w: Self::B, x: [i8; 4]) -> Self::Small;
    /// The sums; `start` is the one they began at.
    fn end_small(acc: Self::Small, start: i32) -> Self::I;
}

/// 64 bytes on a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

/// See [`Simd::quantize`].
#[inline(always)]
pub(super) fn quantize(x: &[f32; 32], q: &mut [[i8; 4]; 8]) -> (f32, i32) {
    let mut largest = 0.0f32;
    let mut poison = 0.0f32;
    for &v in x {
        largest = if v.abs() > largest { v.abs() } else { largest };
        poison += v * 0.0; // NaN where v is NaN or infinite, else zero
    }
    let d = largest / 127.0 + poison;
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    let mut sum = 0;
    for (q, &v) in q.as_flattened_mut().iter_mut().zip(x) {
        *q = nearest(v * inverse).1 as i8;
        sum += i32::from(*q);
    }
    (d, sum)
}

/// A bf16 number, widened.
#[inline(always)]
fn wide(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

fn sum16(v: &[f32; 16]) -> f32 {
    let mut acc = [0.0f32; 4];
    for i in 0..4 {
        acc[i] = (v[i] + v[i + 8]) + (v[i + 4] + v[i + 12]);
    }
    (acc[0] + acc[2]) + (acc[1] + acc[3])
}

/// Plain Rust, for any machine and for Miri.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    const FMA: bool = false;
    type V = [f32; 16];
    #[inline(always)]
    fn zero() -> Self::V {
        [0.0; 16]
    }
    #[inline(always)]
    fn load(x: &[f32]) -> Self::V {
        let mut v = [0.0; 16];
        v.copy_from_slice(&x[..16]);
        v
    }
    type P = ([f32; 16], [f32; 16]);
    #[inline(always)]
    fn load_pairs(x: &[u16]) -> Self::P {
        (
            std::array::from_fn(|i| wide(x[2 * i])),
            std::array::from_fn(|i| wide(x[2 * i + 1])),
        )
    }
    #[inline(always)]
    fn dot_pairs(acc: Self::V, w: Self::P, x: [u16; 2]) -> Self::V {
        Self::fma(w.0, [wide(x[0]); 16], Self::fma(w.1, [wide(x[1]); 16], acc))
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        sum16(&v)
    }
    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        [x; 16]
    }
    #[inline(always)]
    fn store(v: Self::V, out: &mut [f32]) {
        out[..16].copy_from_slice(&v);
    }
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn widen(x: &[f16; 16]) -> Self::V {
        x.map(f16::to_f32)
    }
    #[inline(always)]
    fn prefetch<T>(_: &T, _: usize) {}
    const SUMS: usize = 4;
    const ROWS: usize = 4;
    const WIDE: usize = 1;
    type I = [i32; 16];
    #[inline(always)]
    fn splat_i(x: i32) -> Self::I {
        [x; 16]
    }
    #[inline(always)]
    fn add_i(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn to_f32(i: Self::I) -> Self::V {
        i.map(|i| i as f32)
    }
    type B = [u8; 64];
    #[inline(always)]
    fn load_line(x: &Line) -> Self::B {
        x.0
    }
    #[inline(always)]
    fn low(b: Self::B) -> Self::B {
        b.map(|b| b & 15)
    }
    #[inline(always)]
    fn high(b: Self::B) -> Self::B {
        b.map(|b| b >> 4)
    }
    type Eight = [u8; 64];
    #[inline(always)]
    fn eight(b: Self::B) -> Self::Eight {
        b
    }
    const ABOVE: bool = true;
    #[inline(always)]
    fn dot_eight(acc: Self::I, w: Self::Eight, x: [i8; 4]) -> Self::I {
        std::array::from_fn(|lane| {
            let fours = (0..4).map(|i| i32::from(w[lane * 4 + i]) * i32::from(x[i]));
            acc[lane].wrapping_add(fours.sum::<i32>())
        })
    }
    type Small = [i32; 16];
    #[inline(always)]
    fn begin_small(start: i32) -> Self::Small {
        [start; 16]
    }
    #[inline(always)]
    fn dot_small(acc: Self::Small, w: Self::B, x: [i8; 4]) -> Self::Small {
        Self::dot_eight(acc, w, x)
    }
    #[inline(always)]
    fn end_small(acc: Self::Small, _: i32) -> Self::I {
        acc
    }
}

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Line, Simd, wide};
    use half::f16;
    use std::arch::x86_64::*;

    /// AVX2 with FMA: two registers of eight lanes; where `VNNI`, with products of bytes. Used only after all were detected.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2<const VNNI: bool>;

    /// AVX-512 F, BW and VL; where `VNNI`, with products of bytes, and where `BF16`, with products of bf16 pairs. Used
    /// only after all were detected.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512<const VNNI: bool, const BF16: bool>;

    // SAFETY of every block below: `InstructionSet::detect` hands these types out only where the processor has the
    // features they name, and each load is bounds-checked on the line before it or of a type of its length.

    /// See [`Simd::exp`].
    #[inline(always)]
    unsafe fn exp8(v: __m256) -> __m256 {
        use super::super::exponential::{EXP, LN2_HIGH, LN2_LOW};
        unsafe {
            let splat = |x: f32| _mm256_set1_ps(x);
            // As in the wider form.
            let v = _mm256_max_ps(splat(-104.0), v);
            let v = _mm256_min_ps(splat(89.0), v);
            let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm256_mul_ps(v, splat(std::f32::consts::LOG2_E)),
            );
            let r = _mm256_fnmadd_ps(n, splat(LN2_HIGH), v);
            let r = _mm256_fnmadd_ps(n, splat(LN2_LOW), r);
            let mut p = splat(EXP[0]);
            for c in &EXP[1..] {
                p = _mm256_fmadd_ps(p, r, splat(*c));
            }
            let p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, splat(1.0)));
            // 2^n in two factors: n reaches -150, where one factor alone would leave the range.
            let whole = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(whole);
            let rest = _mm256_sub_epi32(whole, half);
            let one = _mm256_set1_epi32(127);
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, one));
            let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, one));
            let p = _mm256_mul_ps(p, _mm256_castsi256_ps(first));
            _mm256_mul_ps(p, _mm256_castsi256_ps(second))
        }
    }

    impl<const VNNI: bool> Simd for Avx2<VNNI> {
        const FMA: bool = true;
        type V = (__m256, __m256);
        #[inline(always)]
        fn zero() -> Self::V {
            unsafe { (_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }
        #[inline(always)]
        fn load(x: &[f32]) -> Self::V {
            let x = &x[..16];
            unsafe {
                (
                    _mm256_loadu_ps(x.as_ptr()),
                    _mm256_loadu_ps(x.as_ptr().add(8)),
                )
            }
        }
        type P = (__m256i, __m256i);
        #[inline(always)]
        fn load_pairs(x: &[u16]) -> Self::P {
            let p = x[..32].as_ptr().cast::<__m256i>();
            unsafe { (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))) }
        }
        #[inline(always)]
        fn dot_pairs(acc: Self::V, w: Self::P, x: [u16; 2]) -> Self::V {
            let (even, odd) = (Self::splat(wide(x[0])), Self::splat(wide(x[1])));
            unsafe {
                let evens = |w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
                let odds = |w| {
                    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                    _mm256_castsi256_ps(_mm256_and_si256(w, upper))
                };
                let acc = Self::fma((odds(w.0), odds(w.1)), odd, acc);
                Self::fma((evens(w.0), evens(w.1)), even, acc)
            }
        }
        #[inline(always)]
        fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe {
                (
                    _mm256_fmadd_ps(a.0, b.0, c.0),
                    _mm256_fmadd_ps(a.1, b.1, c.1),
                )
            }
        }
        #[inline(always)]
        fn sum(v: Self::V) -> f32 {
            let mut lanes = [0.0; 16];
            unsafe {
                _mm256_storeu_ps(lanes.as_mut_ptr(), v.0);
                _mm256_storeu_ps(lanes.as_mut_ptr().add(8), v.1);
            }
            super::sum16(&lanes)
        }
        #[inline(always)]
        fn splat(x: f32) -> Self::V {
            unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        fn store(v: Self::V, out: &mut [f32]) {
            let out = &mut out[..16];
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), v.0);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), v.1);
            }
        }
        #[inline(always)]
        fn add(a: Self::V, b: Self::V) -> Self::V {
            unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn mul(a: Self::V, b: Self::V) -> Self::V {
            unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn div(a: Self::V, b: Self::V) -> Self::V {
            unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
        }
        #[inline(always)]
        fn widen(x: &[f16; 16]) -> Self::V {
            let p = x.as_ptr().cast::<__m128i>();
            unsafe {
                (
                    _mm256_cvtph_ps(_mm_loadu_si128(p)),
                    _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))),
                )
            }
        }
        #[inline(always)]
        fn prefetch<T>(from: &T, at: usize) {
            // No more than a hint: an address outside the allocation is not read.
            let at = std::ptr::from_ref(from).wrapping_add(at).cast();
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at) }
        }
        #[inline(always)]
        fn exp(v: Self::V) -> Self::V {
            unsafe { (exp8(v.0), exp8(v.1)) }
        }
        const SUMS: usize = 6;
        const ROWS: usize = 4;
        const WIDE: usize = 1;
        #[inline(always)]
        fn quantize(x: &[f32; 32], q: &mut [[i8; 4]; 8]) -> (f32, i32) {
            let q = q.as_flattened_mut().as_mut_ptr();
            unsafe {
                let mut v = [_mm256_setzero_ps(); 4];
                // As whole numbers: NaN and infinity are larger than all else.
                let mut largest = _mm256_setzero_si256();
                for (i, v) in v.iter_mut().enumerate() {
                    *v = _mm256_loadu_ps(x.as_ptr().add(8 * i));
                    let magnitude =
                        _mm256_and_si256(_mm256_castps_si256(*v), _mm256_set1_epi32(i32::MAX));
                    largest = _mm256_max_epu32(largest, magnitude);
                }
                let half = _mm_max_epu32(
                    _mm256_castsi256_si128(largest),
                    _mm256_extracti128_si256::<1>(largest),
                );
                let half = _mm_max_epu32(half, _mm_shuffle_epi32::<0b01_00_11_10>(half));
                let half = _mm_max_epu32(half, _mm_shuffle_epi32::<0b10_11_00_01>(half));
                let largest = f32::from_bits(_mm_cvtsi128_si32(half) as u32);
                let d = match largest.is_finite() {
                    true => largest / 127.0,
                    false => f32::NAN,
                };
                let inverse = _mm256_set1_ps(if d > 0.0 { 1.0 / d } else { 0.0 });
                let mut whole = [_mm256_setzero_si256(); 4];
                for (to, v) in whole.iter_mut().zip(v) {
                    *to = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
                }
                let [a, b, c, e] = whole;
                let sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, e));
                let sum = _mm_add_epi32(
                    _mm256_castsi256_si128(sum),
                    _mm256_extracti128_si256::<1>(sum),
                );
                let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
                let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum));
                // Both packs work in halves of registers, which leaves fours out of order.
                let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, e));
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                _mm256_storeu_si256(q.cast(), _mm256_permutevar8x32_epi32(bytes, order));
                (d, _mm_cvtsi128_si32(sum))
            }
        }
        type I = (__m256i, __m256i);
        #[inline(always)]
        fn splat_i(x: i32) -> Self::I {
            unsafe { (_mm256_set1_epi32(x), _mm256_set1_epi32(x)) }
        }
        #[inline(always)]
        fn add_i(a: Self::I, b: Self::I) -> Self::I {
            unsafe { (_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
        }
        #[inline(always)]
        fn to_f32(i: Self::I) -> Self::V {
            unsafe { (_mm256_cvtepi32_ps(i.0), _mm256_cvtepi32_ps(i.1)) }
        }
        type B = (__m256i, __m256i);
        #[inline(always)]
        fn load_line(x: &Line) -> Self::B {
            let p = x.0.as_ptr().cast::<__m256i>();
            unsafe { (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))) }
        }
        #[inline(always)]
        fn low(b: Self::B) -> Self::B {
            unsafe {
                let mask = _mm256_set1_epi8(15);
                (_mm256_and_si256(b.0, mask), _mm256_and_si256(b.1, mask))
            }
        }
        #[inline(always)]
        fn high(b: Self::B) -> Self::B {
            unsafe { Self::low((_mm256_srli_epi16::<4>(b.0), _mm256_srli_epi16::<4>(b.1))) }
        }
        /// The weights as they are stored and nothing, where bytes are multiplied whole; else their magnitudes and themselves.
        type Eight = [(__m256i, __m256i); 2];
        #[inline(always)]
        fn eight(b: Self::B) -> Self::Eight {
            unsafe {
                if VNNI {
                    return [b, (_mm256_setzero_si256(), _mm256_setzero_si256())];
                }
                let top = _mm256_set1_epi8(-128);
                let signed = (_mm256_xor_si256(b.0, top), _mm256_xor_si256(b.1, top));
                let magnitude = (_mm256_abs_epi8(signed.0), _mm256_abs_epi8(signed.1));
                [magnitude, signed]
            }
        }
        const ABOVE: bool = VNNI;
        #[inline(always)]
        fn dot_eight(acc: Self::I, w: Self::Eight, x: [i8; 4]) -> Self::I {
            unsafe {
                let x = _mm256_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
                let [w, signed] = w;
                if VNNI {
                    return (
                        _mm256_dpbusd_avx_epi32(acc.0, w.0, x),
                        _mm256_dpbusd_avx_epi32(acc.1, w.1, x),
                    );
                }
                // The sign of the weight goes to the activation. Two products, of 128 and 127 at most, fit an i16.
                let ones = _mm256_set1_epi16(1);
                let low = _mm256_maddubs_epi16(w.0, _mm256_sign_epi8(x, signed.0));
                let high = _mm256_maddubs_epi16(w.1, _mm256_sign_epi8(x, signed.1));
                (
                    _mm256_add_epi32(acc.0, _mm256_madd_epi16(low, ones)),
                    _mm256_add_epi32(acc.1, _mm256_madd_epi16(high, ones)),
                )
            }
        }
        /// Without products of bytes two i16 to a lane: sixteen products of 15 and 127 fit one.
        type Small = (__m256i, __m256i);
        #[inline(always)]
        fn begin_small(start: i32) -> Self::Small {
            Self::splat_i(if VNNI { start } else { 0 })
        }
        #[inline(always)]
        fn dot_small(acc: Self::Small, w: Self::B, x: [i8; 4]) -> Self::Small {
            unsafe {
                let x = _mm256_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
                match VNNI {
                    true => (
                        _mm256_dpbusd_avx_epi32(acc.0, w.0, x),
                        _mm256_dpbusd_avx_epi32(acc.1, w.1, x),
                    ),
                    false => (
                        _mm256_add_epi16(acc.0, _mm256_maddubs_epi16(w.0, x)),
                        _mm256_add_epi16(acc.1, _mm256_maddubs_epi16(w.1, x)),
                    ),
                }
            }
        }
        #[inline(always)]
        fn end_small(acc: Self::Small, start: i32) -> Self::I {
            if VNNI {
                return acc;
            }
            unsafe {
                let (ones, start) = (_mm256_set1_epi16(1), _mm256_set1_epi32(start));
                (
                    _mm256_add_epi32(start, _mm256_madd_epi16(acc.0, ones)),
                    _mm256_add_epi32(start, _mm256_madd_epi16(acc.1, ones)),
                )
            }
        }
    }

    impl<const VNNI: bool, const BF16: bool> Simd for Avx512<VNNI, BF16> {
        const FMA: bool = true;
        type V = __m512;
        #[inline(always)]
        fn zero() -> Self::V {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        fn load(x: &[f32]) -> Self::V {
            let x = &x[..16];
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        type P = __m512i;
        #[inline(always)]
        fn load_pairs(x: &[u16]) -> Self::P {
            let x = &x[..32];
            unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
        }
        #[inline(always)]
        fn dot_pairs(acc: Self::V, w: Self::P, x: [u16; 2]) -> Self::V {
            unsafe {
                if BF16 {
                    let both = i32::from(x[1]) << 16 | i32::from(x[0]);
                    let x = _mm512_set1_epi32(both);
                    // SAFETY: the same 64 bytes under another name.
                    let pairs = |i| std::mem::transmute::<__m512i, __m512bh>(i);
                    return _mm512_dpbf16_ps(acc, pairs(w), pairs(x));
                }
                let (even, odd) = (Self::splat(wide(x[0])), Self::splat(wide(x[1])));
                let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                let odds = _mm512_castsi512_ps(_mm512_and_si512(w, upper));
                let evens = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w));
                _mm512_fmadd_ps(evens, even, _mm512_fmadd_ps(odds, odd, acc))
            }
        }
        #[inline(always)]
        fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn sum(v: Self::V) -> f32 {
            let mut lanes = [0.0; 16];
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), v) };
            super::sum16(&lanes)
        }
        #[inline(always)]
        fn splat(x: f32) -> Self::V {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn store(v: Self::V, out: &mut [f32]) {
            let out = &mut out[..16];
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn add(a: Self::V, b: Self::V) -> Self::V {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn mul(a: Self::V, b: Self::V) -> Self::V {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn div(a: Self::V, b: Self::V) -> Self::V {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        fn widen(x: &[f16; 16]) -> Self::V {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        }
        #[inline(always)]
        fn prefetch<T>(from: &T, at: usize) {
            // No more than a hint: an address outside the allocation is not read.
            let at = std::ptr::from_ref(from).wrapping_add(at).cast();
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at) }
        }
        #[inline(always)]
        fn exp(v: Self::V) -> Self::V {
            use super::super::exponential::{EXP, LN2_HIGH, LN2_LOW};
            unsafe {
                // Beyond these bounds the result is 0 or infinite anyway; NaN is the second operand, which both pass on.
                let v = _mm512_max_ps(Self::splat(-104.0), v);
                let v = _mm512_min_ps(Self::splat(89.0), v);
                let n =
                    _mm512_roundscale_ps::<0>(Self::mul(v, Self::splat(std::f32::consts::LOG2_E)));
                let r = _mm512_fnmadd_ps(n, Self::splat(LN2_HIGH), v);
                let r = _mm512_fnmadd_ps(n, Self::splat(LN2_LOW), r);
                let mut p = Self::splat(EXP[0]);
                for c in &EXP[1..] {
                    p = _mm512_fmadd_ps(p, r, Self::splat(*c));
                }
                let p = _mm512_fmadd_ps(p, Self::mul(r, r), Self::add(r, Self::splat(1.0)));
                _mm512_scalef_ps(p, n)
            }
        }
        const SUMS: usize = 24;
        const ROWS: usize = 10;
        const WIDE: usize = 2;
        #[inline(always)]
        fn quantize(x: &[f32; 32], q: &mut [[i8; 4]; 8]) -> (f32, i32) {
            let q = q.as_flattened_mut().as_mut_ptr();
            unsafe {
                let (a, b) = (
                    _mm512_loadu_ps(x.as_ptr()),
                    _mm512_loadu_ps(x.as_ptr().add(16)),
                );
                // As whole numbers: NaN and infinity are larger than all else.
                let magnitude = |v| _mm512_castps_si512(_mm512_abs_ps(v));
                let largest = _mm512_max_epu32(magnitude(a), magnitude(b));
                let largest = f32::from_bits(_mm512_reduce_max_epu32(largest));
                let d = match largest.is_finite() {
                    true => largest / 127.0,
                    false => f32::NAN,
                };
                let inverse = _mm512_set1_ps(if d > 0.0 { 1.0 / d } else { 0.0 });
                let a = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
                let b = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
                _mm_storeu_si128(q.cast(), _mm512_cvtepi32_epi8(a));
                _mm_storeu_si128(q.add(16).cast(), _mm512_cvtepi32_epi8(b));
                (d, _mm512_reduce_add_epi32(_mm512_add_epi32(a, b)))
            }
        }
        type I = __m512i;
        #[inline(always)]
        fn splat_i(x: i32) -> Self::I {
            unsafe { _mm512_set1_epi32(x) }
        }
        #[inline(always)]
        fn add_i(a: Self::I, b: Self::I) -> Self::I {
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        fn to_f32(i: Self::I) -> Self::V {
            unsafe { _mm512_cvtepi32_ps(i) }
        }
        type B = __m512i;
        #[inline(always)]
        fn load_line(x: &Line) -> Self::B {
            unsafe { _mm512_load_si512(x.0.as_ptr().cast()) }
        }
        #[inline(always)]
        fn low(b: Self::B) -> Self::B {
            unsafe { _mm512_and_si512(b, _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        fn high(b: Self::B) -> Self::B {
            unsafe { Self::low(_mm512_srli_epi16::<4>(b)) }
        }
        /// The weights as they are stored, where bytes are multiplied whole; else their magnitudes, and which are negative.
        type Eight = (__m512i, __mmask64);
        #[inline(always)]
        fn eight(b: Self::B) -> Self::Eight {
            unsafe {
                if VNNI {
                    return (b, 0);
                }
                let signed = _mm512_xor_si512(b, _mm512_set1_epi8(-128));
                (_mm512_abs_epi8(signed), _mm512_movepi8_mask(signed))
            }
        }
        const ABOVE: bool = VNNI;
        #[inline(always)]
        fn dot_eight(acc: Self::I, w: Self::Eight, x: [i8; 4]) -> Self::I {
            unsafe {
                let x = _mm512_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
                let (w, negative) = w;
                if VNNI {
                    return _mm512_dpbusd_epi32(acc, w, x);
                }
                // As for AVX2.
                let x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
                let pairs = _mm512_maddubs_epi16(w, x);
                _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
            }
        }
        type Small = __m512i;
        #[inline(always)]
        fn begin_small(start: i32) -> Self::Small {
            Self::splat_i(if VNNI { start } else { 0 })
        }
        #[inline(always)]
        fn dot_small(acc: Self::Small, w: Self::B, x: [i8; 4]) -> Self::Small {
            unsafe {
                let x = _mm512_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
                match VNNI {
                    true => _mm512_dpbusd_epi32(acc, w, x),
                    false => _mm512_add_epi16(acc, _mm512_maddubs_epi16(w, x)),
                }
            }
        }
        #[inline(always)]
        fn end_small(acc: Self::Small, start: i32) -> Self::I {
            if VNNI {
                return acc;
            }
            unsafe {
                let pairs = _mm512_madd_epi16(acc, _mm512_set1_epi16(1));
                _mm512_add_epi32(_mm512_set1_epi32(start), pairs)
            }
        }
    }
}

/// The best instruction set of this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// Plain Rust.
    Portable,
    /// ARM's NEON.
    Neon,
    /// The same with products of signed bytes.
    NeonDotprod,
    /// The same with products of unsigned and signed bytes, and of bf16.
    NeonI8mm,
    /// AVX2 and FMA.
    Avx2,
    /// The same with AVX-VNNI: products of bytes.
    AvxVnni,
    /// AVX-512 F, BW and VL.
    Avx512,
    /// The same with VNNI: products of bytes.
    Avx512Vnni,
    /// The same with products of bf16 too.
    Avx512Bf16,
}

/// What registers hold of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// [`Simd::ROWS`]
    pub(super) rows: usize,
    /// [`Simd::WIDE`]
    pub(super) wide: usize,
    /// [`Simd::SUMS`]
    pub(super) sums: usize,
}

impl Limits {
    #[inline(always)]
    pub(super) const fn of<S: Simd>() -> Self {
        Self {
            rows: S::ROWS,
            wide: S::WIDE,
            sums: S::SUMS,
        }
    }
}

impl InstructionSet {
    /// What the processor offers. `SCYLLA_SIMD` caps it (for tests and comparisons): `portable`; on x86-64 `avx2`, `avx-vnni`,
    /// `avx512` or `vnni`; on 64-bit ARM `neon` or `dotprod`.
    pub fn detect() -> Self {
        static LEVEL: std::sync::OnceLock<InstructionSet> = std::sync::OnceLock::new();
        *LEVEL.get_or_init(|| {
            let x86 = cfg!(target_arch = "x86_64");
            let cap = match (std::env::var("SCYLLA_SIMD").as_deref(), x86) {
                (Ok("portable"), _) => InstructionSet::Portable,
                (Ok("avx2"), true) => InstructionSet::Avx2,
                (Ok("avx-vnni"), true) => InstructionSet::AvxVnni,
                (Ok("avx512"), true) => InstructionSet::Avx512,
                (Ok("vnni"), true) => InstructionSet::Avx512Vnni,
                (Ok("neon"), false) => InstructionSet::Neon,
                (Ok("dotprod"), false) => InstructionSet::NeonDotprod,
                _ => InstructionSet::Avx512Bf16,
            };
            match Self::of_processor().min(cap) {
                // Not all that have AVX-512 have it.
                InstructionSet::AvxVnni if !has_avx_vnni() => InstructionSet::Avx2,
                level => level,
            }
        })
    }

    /// [`Simd::ROWS`], [`Simd::WIDE`] and [`Simd::SUMS`] of its instruction set.
    pub(super) fn limits(self) -> Limits {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 => {
                Limits::of::<Avx512<true, true>>()
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Limits::of::<Avx2<true>>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Limits::of::<Avx2<false>>(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon | Self::NeonDotprod | Self::NeonI8mm => Limits::of::<Neon<2>>(),
            _ => Limits::of::<Portable>(),
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn of_processor() -> Self {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
        let bf16 = vnni && is_x86_feature_detected!("avx512bf16");
        match (avx2, avx512, vnni, bf16) {
            (.., true) => InstructionSet::Avx512Bf16,
            (_, _, true, _) => InstructionSet::Avx512Vnni,
            (_, true, ..) => InstructionSet::Avx512,
            (true, ..) if has_avx_vnni() => InstructionSet::AvxVnni,
            (true, ..) => InstructionSet::Avx2,
            _ => InstructionSet::Portable,
        }
    }

    #[cfg(target_arch = "aarch64")]
    pub(super) fn of_processor() -> Self {
        use std::arch::is_aarch64_feature_detected as has;
        let dotprod = has!("dotprod");
        let i8mm = dotprod && has!("i8mm") && has!("bf16");
        match (has!("neon"), dotprod, i8mm) {
            (true, _, true) => InstructionSet::NeonI8mm,
            (true, true, _) => InstructionSet::NeonDotprod,
            (true, ..) => InstructionSet::Neon,
            _ => InstructionSet::Portable,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(super) fn of_processor() -> Self {
        InstructionSet::Portable
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx_vnni() -> bool {
    is_x86_feature_detected!("avxvnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx_vnni() -> bool {
    false
}

/// A kernel, compiled for some features of the processor.
macro_rules! compiled {
    ($features:literal, $for:ident, $simd:ty, $kernel:ident, ($($name:ident: $ty:ty),*), [$($out:ty)?], <$($g:ident: $bound:path)?>) => {
        #[target_feature(enable = $features)]
        fn $for<$($g: $bound)?>($($name: $ty),*) $(-> $out)? {
            $kernel::<$simd $(, $g)?>($($name),*)
        }
    };
}
pub(super) use compiled;

/// Calls a kernel that is generic over [`Simd`] (first), and over whatever stands in the angle brackets (with the
/// type it is called for, where the arguments do not say it), compiled for the best instruction set of this processor.
///
/// After `products`, of those too that differ in products of bytes and of bf16 alone; other kernels need not be compiled as often.
macro_rules! dispatch {
    (products $level:expr, $kernel:ident($($arg:expr),*): ($($name:ident: $ty:ty),*) $([$out:ty])? <$($g:ident: $bound:path $(= $given:ty)?)?>) => {{
        match $level {
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::simd::InstructionSet::Avx512Bf16 => {
                $crate::kernels::simd::compiled!("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c", with, $crate::kernels::simd::Avx512<true, true>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: the level was detected on this processor.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::simd::InstructionSet::Avx512Vnni => {
                $crate::kernels::simd::compiled!("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c", with, $crate::kernels::simd::Avx512<true, false>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: as above.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::simd::InstructionSet::AvxVnni => {
                $crate::kernels::simd::compiled!("avxvnni,avx2,fma,f16c", with, $crate::kernels::simd::Avx2<true>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: as above.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            #[cfg(target_arch = "aarch64")]
            $crate::kernels::simd::InstructionSet::NeonI8mm => {
                $crate::kernels::simd::compiled!("neon,dotprod,i8mm,bf16", with, $crate::kernels::simd::Neon<2>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: as above.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            #[cfg(target_arch = "aarch64")]
            $crate::kernels::simd::InstructionSet::NeonDotprod => {
                $crate::kernels::simd::compiled!("neon,dotprod", with, $crate::kernels::simd::Neon<1>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: as above.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            level => $crate::kernels::simd::dispatch!(level, $kernel($($arg),*): ($($name: $ty),*) $([$out])? <$($g: $bound $(= $given)?)?>),
        }
    }};
    ($level:expr, $kernel:ident($($arg:expr),*): ($($name:ident: $ty:ty),*) $([$out:ty])? <$($g:ident: $bound:path $(= $given:ty)?)?>) => {{
        match $level {
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::simd::InstructionSet::Avx512
            | $crate::kernels::simd::InstructionSet::Avx512Vnni
            | $crate::kernels::simd::InstructionSet::Avx512Bf16 => {
                $crate::kernels::simd::compiled!("avx512f,avx512bw,avx512vl,avx2,fma,f16c", with, $crate::kernels::simd::Avx512<false, false>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: the level was detected on this processor.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::simd::InstructionSet::Avx2 | $crate::kernels::simd::InstructionSet::AvxVnni => {
                $crate::kernels::simd::compiled!("avx2,fma,f16c", with, $crate::kernels::simd::Avx2<false>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: as above.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            #[cfg(target_arch = "aarch64")]
            $crate::kernels::simd::InstructionSet::Neon
            | $crate::kernels::simd::InstructionSet::NeonDotprod
            | $crate::kernels::simd::InstructionSet::NeonI8mm => {
                $crate::kernels::simd::compiled!("neon", with, $crate::kernels::simd::Neon<0>,
                    $kernel, ($($name: $ty),*), [$($out)?], <$($g: $bound)?>);
                // SAFETY: as above.
                unsafe { with$($(::<$given>)?)?($($arg),*) }
            }
            _ => {
                fn portable<$($g: $bound)?>($($name: $ty),*) $(-> $out)? {
                    $kernel::<$crate::kernels::simd::Portable $(, $g)?>($($name),*)
                }
                portable$($(::<$given>)?)?($($arg),*)
            }
        }
    }};
}
pub(super) use dispatch;
