//! Products of blocks on AMX: one instruction multiplies up to sixteen rows of activations with sixteen columns of weights.
//!
//! A tile of [`super::quant`]'s weights is laid out as the instruction takes it, four values of each column to a lane. The
//! whole numbers it adds up are exact, and what follows is done in the same order as without it, so a row's result is bit
//! for bit that of the other kernels: a row alone, for which the instruction is no gain, goes through those.
//!
//! The compiler knows no tile registers on a stable toolchain, and uses none: they are this file's own.

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, __m512, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm512_add_epi32,
    _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_load_si512,
    _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_srli_epi16, _mm512_store_si512, _mm512_storeu_ps,
};
use std::cell::{Cell, RefCell};
use std::ops::Range;

use half::f16;

use super::simd::Line;
use super::{SharedOut, TILE};

/// Fewest rows that it is a gain for.
pub(super) const FEWEST: usize = 3;
/// Lines of a block of bytes.
const LINES: usize = 8;

/// Whether the processor has the instructions, and the system lets this process use them.
pub(super) fn is_granted() -> bool {
    // SAFETY: every x86-64 has CPUID.
    #[allow(unused_unsafe)]
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    const TILES_OF_BYTES: u32 = 1 << 24 | 1 << 25;
    features & TILES_OF_BYTES == TILES_OF_BYTES && ask()
}

/// Asks Linux for the state of tile registers, which it does not keep for a process that has not asked.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let answer: i64;
    // SAFETY: a system call with numbers alone, which changes nothing but what this process may use; the kernel destroys rcx
    // and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}

/// Rows of each panel that so many rows are cut into, all but the last of them full: one of the sizes kernels are compiled
/// for.
pub(super) fn panel(rows: usize) -> usize {
    let count = rows.div_ceil(16).max(1);
    rows.div_ceil(count).next_multiple_of(2).max(4)
}

/// Rows of activations in panels of one size, each block by block, its rows one after the other.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// Rows of a panel.
    pub(super) panel: usize,
    /// Groups of four values in the order of the weights' lines.
    pub(super) q: &'a [[[i8; 4]; LINES]],
    pub(super) scale: &'a [f32],
    /// `-128 sum(q)`
    pub(super) start: &'a [i32],
    /// `scale sum(q)`
    pub(super) total: &'a [f32],
}

/// Weights in tiles of sixteen columns, `blocks` to a tile.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) blocks: usize,
    pub(super) lines: &'a [Line],
    pub(super) scales: &'a [[f16; TILE]],
    pub(super) offsets: &'a [[f16; TILE]],
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Makes this thread's tile registers ready for panels of so many rows.
fn configure(rows: usize) {
    thread_local! {
        static CONFIGURED: Cell<usize> = const { Cell::new(0) };
    }
    if CONFIGURED.replace(rows) == rows {
        return;
    }
    let mut config = Config {
        palette: 1,
        start: 0,
        reserved: [0; 14],
        bytes: [0; 16],
        rows: [0; 16],
    };
    // Of each of two sets: sums, activations, weights.
    for set in [0, 3] {
        let rows = [rows, rows, LINES];
        for (i, (rows, bytes)) in rows.into_iter().zip([64, 32, 64]).enumerate() {
            config.rows[set + i] = rows as u8;
            config.bytes[set + i] = bytes;
        }
    }
    // SAFETY: `is_granted` was asked before any of this is reached; a whole configuration of palette 1 is read, with rows and
    // bytes within its limits of 16 and 64. Nobody else in the process uses tile registers.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly));
    }
}

/// Sums of one block: what one product leaves.
#[repr(C, align(64))]
struct Sums([[i32; TILE]; 16]);

/// Multiplies one block of a panel: `R` rows of 32 bytes with 8 lines of 64.
///
/// # Safety
/// `a` has `R` rows of 32 bytes one after the other, `b` 8 lines; this thread is configured for `R` rows.
#[inline(always)]
unsafe fn multiply<const SET: usize>(a: *const u8, b: *const Line, to: &mut Sums) {
    // SAFETY: reads what the caller says is there, writes at most the sixteen rows of `to`; the registers are nobody else's.
    unsafe {
        if SET == 0 {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm1, [{a} + {row}*1]",
                "tileloadd tmm2, [{b} + {line}*1]",
                "tdpbsud tmm0, tmm1, tmm2",
                "tilestored [{to} + {line}*1], tmm0",
                a = in(reg) a, b = in(reg) b, to = in(reg) to, row = in(reg) 32usize, line = in(reg) 64usize,
                options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm3",
                "tileloadd tmm4, [{a} + {row}*1]",
                "tileloadd tmm5, [{b} + {line}*1]",
                "tdpbsud tmm3, tmm4, tmm5",
                "tilestored [{to} + {line}*1], tmm3",
                a = in(reg) a, b = in(reg) b, to = in(reg) to, row = in(reg) 32usize, line = in(reg) 64usize,
                options(nostack),
            );
        }
    }
}

/// How a form's values lie above the weights over their scale, as a right shift of 128, or that it has offsets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    Shift(u32),
    Offsets,
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` for some tiles and all rows; where two values share a byte, `halves` says so.
///
/// # Panics
/// If rows, weights and outputs do not fit together.
pub(super) fn product(
    w: Weights<'_>,
    x: Rows<'_>,
    bias: Bias,
    halves: bool,
    tiles: Range<usize>,
    out: &SharedOut<'_>,
) {
    let rows = out.rows.div_ceil(x.panel) * x.panel * w.blocks;
    assert!(x.q.len() >= rows && x.scale.len() >= rows);
    assert!(x.start.len() >= rows && x.total.len() >= rows);
    let (blocks, lines) = (tiles.end * w.blocks, if halves { LINES / 2 } else { LINES });
    assert!(w.lines.len() >= blocks * lines && w.scales.len() >= blocks);
    assert!(bias != Bias::Offsets || w.offsets.len() >= blocks);
    configure(x.panel);
    thread_local! {
        static BYTES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    BYTES.with_borrow_mut(|bytes| {
        for tile in tiles {
            let first = tile * w.blocks;
            let stored = &w.lines[first * lines..(first + w.blocks) * lines];
            // Those of the tiles behind it are asked for while this one is at work; they need not be there.
            let next = stored.as_ptr_range().end;
            let lines = match halves {
                false => stored,
                true => {
                    bytes.resize(w.blocks * LINES, Line([0; 64]));
                    // SAFETY: `is_granted` implies AVX-512.
                    unsafe { widen(stored, bytes) };
                    &bytes[..]
                }
            };
            let part = Part {
                lines,
                scales: &w.scales[first..first + w.blocks],
                offsets: match bias {
                    Bias::Offsets => &w.offsets[first..first + w.blocks],
                    Bias::Shift(_) => &[],
                },
                shift: match bias {
                    Bias::Shift(shift) => Some(shift),
                    Bias::Offsets => None,
                },
                next,
                per_block: stored.len() / w.blocks.max(1),
                column: tile * TILE,
            };
            // SAFETY: as above; the sizes were checked.
            unsafe {
                match x.panel {
                    4 => panels::<4>(&part, x, out),
                    6 => panels::<6>(&part, x, out),
                    8 => panels::<8>(&part, x, out),
                    10 => panels::<10>(&part, x, out),
                    12 => panels::<12>(&part, x, out),
                    14 => panels::<14>(&part, x, out),
                    16 => panels::<16>(&part, x, out),
                    other => unreachable!("panels of {other} rows"),
                }
            }
        }
    });
}

/// Two values of a byte in bytes of their own: the lower halves of a line, then the upper.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn widen(from: &[Line], to: &mut [Line]) {
    let low = _mm512_set1_epi8(15);
    for (line, pair) in from.iter().zip(to.as_chunks_mut::<2>().0) {
        // SAFETY: lines are 64 bytes on a boundary of 64.
        unsafe {
            let both = _mm512_load_si512(line.0.as_ptr().cast());
            let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
            _mm512_store_si512(pair[0].0.as_mut_ptr().cast(), _mm512_and_si512(both, low));
            _mm512_store_si512(pair[1].0.as_mut_ptr().cast(), upper);
        }
    }
}

/// One tile of weights, in bytes.
struct Part<'a> {
    lines: &'a [Line],
    scales: &'a [[f16; TILE]],
    offsets: &'a [[f16; TILE]],
    shift: Option<u32>,
    /// Where the next tile's lines are, as they are stored, and how many a block has.
    next: *const Line,
    per_block: usize,
    column: usize,
}

/// All panels of `R` rows with one tile.
///
/// # Safety
/// The processor has AVX-512, this thread is configured for `R` rows, and `x` has whole panels for the rows of `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn panels<const R: usize>(part: &Part<'_>, x: Rows<'_>, out: &SharedOut<'_>) {
    let blocks = part.scales.len();
    let mut sums = [const { Sums([[0; TILE]; 16]) }; 2];
    for (pass, first) in (0..out.rows).step_by(R).enumerate() {
        let at = pass * R * blocks;
        let q = &x.q[at..at + R * blocks];
        let scale = x.scale[at..at + R * blocks].as_chunks::<R>().0;
        let start = x.start[at..at + R * blocks].as_chunks::<R>().0;
        let total = x.total[at..at + R * blocks].as_chunks::<R>().0;
        let mut acc: [__m512; R] = [_mm512_setzero_ps(); R];
        let multiply_block = |b: usize, to: &mut Sums| {
            let (a, lines) = (q[b * R..].as_ptr().cast(), part.lines[b * LINES..].as_ptr());
            // SAFETY: block b is there in both, as the sizes say.
            unsafe {
                match b % 2 {
                    0 => multiply::<0>(a, lines, to),
                    _ => multiply::<1>(a, lines, to),
                }
            }
        };
        // The product of the next block is on its way while the sums of one are scaled.
        multiply_block(0, &mut sums[0]);
        for b in 0..blocks {
            if pass == 0 {
                let ahead = part.next.wrapping_add(b * part.per_block);
                for line in 0..part.per_block {
                    // It need not be there: nothing is read.
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast());
                }
            }
            let [even, odd] = &mut sums;
            let (here, next) = match b % 2 {
                0 => (even, odd),
                _ => (odd, even),
            };
            if b + 1 < blocks {
                multiply_block(b + 1, next);
            }
            // SAFETY: sixteen numbers of half precision, lines of sixteen sums on a boundary of 64.
            unsafe {
                let w = _mm512_cvtph_ps(_mm256_loadu_si256(part.scales[b].as_ptr().cast()));
                for r in 0..R {
                    let mut sum = _mm512_load_si512(here.0[r].as_ptr().cast());
                    if let Some(shift) = part.shift {
                        sum = _mm512_add_epi32(sum, _mm512_set1_epi32(start[b][r] >> shift));
                    }
                    let scaled =
                        _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale[b][r]));
                    acc[r] = _mm512_fmadd_ps(scaled, w, acc[r]);
                }
                if part.shift.is_none() {
                    let m = _mm512_cvtph_ps(_mm256_loadu_si256(part.offsets[b].as_ptr().cast()));
                    for r in 0..R {
                        acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(total[b][r]), m, acc[r]);
                    }
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate().take(out.rows - first) {
            let mut values = [0.0; TILE];
            // SAFETY: sixteen values.
            unsafe { _mm512_storeu_ps(values.as_mut_ptr(), acc) };
            out.store(first + r, part.column, &values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_have_sizes_that_kernels_are_made_for_and_none_is_empty() {
        for rows in 1..600 {
            let panel = panel(rows);
            assert!(
                [4, 6, 8, 10, 12, 14, 16].contains(&panel),
                "{rows}: {panel}"
            );
            assert!((rows.div_ceil(panel) - 1) * panel < rows);
        }
    }
}
