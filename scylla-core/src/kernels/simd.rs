//! Vectors of sixteen f32 lanes, and the instruction sets that carry them.
//!
//! Every product in this folder sums over sixteen fixed lanes, whatever the number of rows beside it, so a
//! row's result does not depend on its company. Different instruction sets may round differently.

use half::f16;

/// Sixteen f32 lanes of one instruction set.
pub(super) trait Simd: Copy {
    /// Whether a fused multiply-add is one instruction.
    const FMA: bool;
    /// The register (or registers) that hold the lanes.
    type V: Copy;
    fn zero() -> Self::V;
    /// Loads the first 16 values of `x`.
    fn load(x: &[f32]) -> Self::V;
    /// Loads 16 bf16 values, widened.
    fn load_bf16(x: &[u16]) -> Self::V;
    /// `a * b + c`
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of the lanes, always in the same order.
    fn sum(v: Self::V) -> f32;
    /// Sixteen copies of `x`.
    fn splat(x: f32) -> Self::V;
    /// Stores the lanes into the first 16 values of `out`.
    fn store(v: Self::V, out: &mut [f32]);
    /// The value of a half-precision number.
    fn widen(x: f16) -> f32;
    /// Eight f32 lanes, the accumulator of the integer products.
    type H: Copy;
    fn half_zero() -> Self::H;
    /// The sum of the eight lanes, always in the same order.
    fn half_sum(h: Self::H) -> f32;
    /// 32 weights of 8 bits, ready to be multiplied with several rows.
    type Bytes: Copy;
    fn bytes(q: &[i8; 32]) -> Self::Bytes;
    /// `acc + scale * (q . x)` as partial sums in the lanes; `x` holds no -128.
    fn dot_bytes(q: Self::Bytes, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H;
    /// 32 weights of 4 bits: the low halves of 16 bytes, then the high halves.
    type Nibbles: Copy;
    fn nibbles(q: &[u8; 16]) -> Self::Nibbles;
    fn dot_nibbles(q: Self::Nibbles, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H;
}

fn sum8(v: &[f32; 8]) -> f32 {
    ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
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
    #[inline(always)]
    fn load_bf16(x: &[u16]) -> Self::V {
        std::array::from_fn(|i| f32::from_bits(u32::from(x[i]) << 16))
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
    fn widen(x: f16) -> f32 {
        x.to_f32()
    }
    type H = [f32; 8];
    #[inline(always)]
    fn half_zero() -> Self::H {
        [0.0; 8]
    }
    #[inline(always)]
    fn half_sum(h: Self::H) -> f32 {
        sum8(&h)
    }
    type Bytes = [i8; 32];
    #[inline(always)]
    fn bytes(q: &[i8; 32]) -> Self::Bytes {
        *q
    }
    #[inline(always)]
    fn dot_bytes(q: Self::Bytes, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H {
        std::array::from_fn(|lane| {
            let fours = (lane * 4)..(lane * 4 + 4);
            let dot: i32 = fours.map(|i| i32::from(q[i]) * i32::from(x[i])).sum();
            acc[lane] + scale * dot as f32
        })
    }
    type Nibbles = [i8; 32];
    #[inline(always)]
    fn nibbles(q: &[u8; 16]) -> Self::Nibbles {
        std::array::from_fn(|i| {
            let nibble = if i < 16 { q[i] & 15 } else { q[i - 16] >> 4 };
            nibble as i8
        })
    }
    #[inline(always)]
    fn dot_nibbles(q: Self::Nibbles, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H {
        Self::dot_bytes(q, x, scale, acc)
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use half::f16;
    use std::arch::x86_64::*;

    /// AVX2 with FMA: two registers of eight lanes. Used only after both were detected.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    /// AVX-512 F, BW and VL with VNNI. Used only after all were detected.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    // SAFETY of every block below: `Level::detect` hands these types out only where the processor has the
    // features they name, and each load is bounds-checked on the line before it.

    #[inline(always)]
    fn half_sum(h: __m256) -> f32 {
        let mut lanes = [0.0; 8];
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), h) };
        super::sum8(&lanes)
    }

    #[inline(always)]
    fn nibbles(q: &[u8; 16]) -> __m256i {
        unsafe {
            let bytes = _mm_loadu_si128(q.as_ptr().cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
            _mm256_and_si256(both, _mm256_set1_epi8(15))
        }
    }

    /// Sums of four products; `u` is at most 128, so pairs stay within an i16.
    #[inline(always)]
    fn dot_maddubs(u: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)) }
    }

    #[inline(always)]
    fn dot_vnni(u: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_dpbusd_epi32(_mm256_setzero_si256(), u, x) }
    }

    impl Simd for Avx2 {
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
        #[inline(always)]
        fn load_bf16(x: &[u16]) -> Self::V {
            let x = &x[..16];
            unsafe {
                let widen = |p: *const u16| {
                    let half = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(half))
                };
                (widen(x.as_ptr()), widen(x.as_ptr().add(8)))
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
        fn widen(x: f16) -> f32 {
            unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(x.to_bits())))) }
        }
        type H = __m256;
        #[inline(always)]
        fn half_zero() -> Self::H {
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        fn half_sum(h: Self::H) -> f32 {
            half_sum(h)
        }
        /// |q|, and q for its sign.
        type Bytes = (__m256i, __m256i);
        #[inline(always)]
        fn bytes(q: &[i8; 32]) -> Self::Bytes {
            unsafe {
                let q = _mm256_loadu_si256(q.as_ptr().cast());
                (_mm256_abs_epi8(q), q)
            }
        }
        #[inline(always)]
        fn dot_bytes(q: Self::Bytes, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H {
            unsafe {
                let x = _mm256_loadu_si256(x.as_ptr().cast());
                // The unsigned side takes |q|, the signed side x with q's sign.
                let dot = dot_maddubs(q.0, _mm256_sign_epi8(x, q.1));
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale), acc)
            }
        }
        type Nibbles = __m256i;
        #[inline(always)]
        fn nibbles(q: &[u8; 16]) -> Self::Nibbles {
            nibbles(q)
        }
        #[inline(always)]
        fn dot_nibbles(q: Self::Nibbles, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H {
            unsafe {
                let x = _mm256_loadu_si256(x.as_ptr().cast());
                let dot = dot_maddubs(q, x);
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale), acc)
            }
        }
    }

    impl Simd for Avx512 {
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
        #[inline(always)]
        fn load_bf16(x: &[u16]) -> Self::V {
            let x = &x[..16];
            unsafe {
                let half = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half))
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
        fn widen(x: f16) -> f32 {
            unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(x.to_bits())))) }
        }
        type H = __m256;
        #[inline(always)]
        fn half_zero() -> Self::H {
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        fn half_sum(h: Self::H) -> f32 {
            half_sum(h)
        }
        /// |q|, and q for its sign.
        type Bytes = (__m256i, __m256i);
        #[inline(always)]
        fn bytes(q: &[i8; 32]) -> Self::Bytes {
            unsafe {
                let q = _mm256_loadu_si256(q.as_ptr().cast());
                (_mm256_abs_epi8(q), q)
            }
        }
        #[inline(always)]
        fn dot_bytes(q: Self::Bytes, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H {
            unsafe {
                let x = _mm256_loadu_si256(x.as_ptr().cast());
                // The unsigned side takes |q|, the signed side x with q's sign.
                let dot = dot_vnni(q.0, _mm256_sign_epi8(x, q.1));
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale), acc)
            }
        }
        type Nibbles = __m256i;
        #[inline(always)]
        fn nibbles(q: &[u8; 16]) -> Self::Nibbles {
            nibbles(q)
        }
        #[inline(always)]
        fn dot_nibbles(q: Self::Nibbles, x: &[i8; 32], scale: f32, acc: Self::H) -> Self::H {
            unsafe {
                let x = _mm256_loadu_si256(x.as_ptr().cast());
                let dot = dot_vnni(q, x);
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale), acc)
            }
        }
    }
}

/// The best instruction set of this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Plain Rust.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, VL and VNNI.
    Avx512,
}

impl Level {
    /// What the processor offers; `SCYLLA_SIMD=portable|avx2` caps it (for tests and comparisons).
    pub fn detect() -> Self {
        static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *LEVEL.get_or_init(|| {
            let best = Self::of_processor();
            match std::env::var("SCYLLA_SIMD").as_deref() {
                Ok("portable") => Level::Portable,
                Ok("avx2") if best == Level::Avx512 => Level::Avx2,
                _ => best,
            }
        })
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn of_processor() -> Self {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        match (avx2, avx512) {
            (_, true) => Level::Avx512,
            (true, false) => Level::Avx2,
            (false, false) => Level::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn of_processor() -> Self {
        Level::Portable
    }
}

/// Calls a kernel that is generic over [`Simd`] (first), and over whatever stands in the angle brackets,
/// compiled for the best instruction set of this processor.
macro_rules! dispatch {
    ($level:expr, $kernel:ident($($arg:expr),*): ($($name:ident: $ty:ty),*) $([$out:ty])? <$($g:ident: $bound:path)?>) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
            fn avx512<$($g: $bound)?>($($name: $ty),*) $(-> $out)? {
                $kernel::<$crate::kernels::simd::Avx512 $(, $g)?>($($name),*)
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<$($g: $bound)?>($($name: $ty),*) $(-> $out)? {
                $kernel::<$crate::kernels::simd::Avx2 $(, $g)?>($($name),*)
            }
            match $level {
                // SAFETY: the level was detected on this processor.
                $crate::kernels::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::kernels::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                $crate::kernels::simd::Level::Portable => {
                    $kernel::<$crate::kernels::simd::Portable $(, $g)?>($($arg),*)
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $level;
            $kernel::<$crate::kernels::simd::Portable $(, $g)?>($($arg),*)
        }
    }};
}
pub(super) use dispatch;
