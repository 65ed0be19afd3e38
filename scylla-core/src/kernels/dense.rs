//! Products of a few rows with a dense f32 or bf16 matrix.

use super::pool::Pool;
use super::simd::{Level, Simd, dispatch};
use super::{Columns, SharedOut};

/// The element type of a dense weight.
pub(super) trait Element: Copy + Send + Sync {
    fn load<S: Simd>(w: &[Self]) -> S::V;
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(w: &[Self]) -> S::V {
        S::load(w)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

/// bf16 bits.
impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(w: &[Self]) -> S::V {
        S::load_bf16(w)
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` for all rows, with `w` `[N, K]` and `x` `[M, K]`.
pub(super) fn matmul<W: Element>(pool: &Pool, w: &[W], x: &[f32], k: usize, out: &SharedOut<'_>) {
    let n = out.columns;
    let level = Level::detect();
    pool.ranges(n, super::grain(n, pool), |range| {
        let columns = Columns {
            start: range.start,
            end: range.end,
        };
        dispatch!(level, columns_of(w, x, k, columns, out): (w: &[W], x: &[f32], k: usize, columns: Columns, out: &SharedOut<'_>) <W: Element>);
    });
}

/// All rows of a block of columns; the weights of four columns are read once for every four rows.
#[inline(always)]
fn columns_of<S: Simd, W: Element>(
    w: &[W],
    x: &[f32],
    k: usize,
    columns: Columns,
    out: &SharedOut<'_>,
) {
    let rows = x.len().checked_div(k).unwrap_or(0);
    let mut c = columns.start;
    while c < columns.end {
        let width = if c + 4 <= columns.end { 4 } else { 1 };
        let mut r = 0;
        while r < rows {
            let height = if r + 4 <= rows { 4 } else { 1 };
            match (width, height) {
                (4, 4) => panel::<S, W, 4, 4>(w, x, k, c, r, out),
                (4, _) => panel::<S, W, 4, 1>(w, x, k, c, r, out),
                (_, 4) => panel::<S, W, 1, 4>(w, x, k, c, r, out),
                _ => panel::<S, W, 1, 1>(w, x, k, c, r, out),
            }
            r += height;
        }
        c += width;
    }
}

#[inline(always)]
fn panel<S: Simd, W: Element, const C: usize, const R: usize>(
    w: &[W],
    x: &[f32],
    k: usize,
    c: usize,
    r: usize,
    out: &SharedOut<'_>,
) {
    let ws: [&[W]; C] = std::array::from_fn(|i| &w[(c + i) * k..(c + i + 1) * k]);
    let xs: [&[f32]; R] = std::array::from_fn(|i| &x[(r + i) * k..(r + i + 1) * k]);
    let mut acc = [[S::zero(); R]; C];
    let whole = k / 16 * 16;
    let mut at = 0;
    while at < whole {
        let xv: [S::V; R] = std::array::from_fn(|i| S::load(&xs[i][at..at + 16]));
        for i in 0..C {
            let wv = W::load::<S>(&ws[i][at..at + 16]);
            for j in 0..R {
                acc[i][j] = S::fma(wv, xv[j], acc[i][j]);
            }
        }
        at += 16;
    }
    for i in 0..C {
        for j in 0..R {
            let mut sum = S::sum(acc[i][j]);
            for t in whole..k {
                sum += ws[i][t].widen() * xs[j][t];
            }
            out.set(r + j, c + i, sum);
        }
    }
}
