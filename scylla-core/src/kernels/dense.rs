//! Products of rows with a dense f32 or bf16 matrix.
//!
//! Sixteen columns lie side by side in a tile, so that a register holds one weight of each and a product needs no sum
//! across lanes. The inner dimension is cut into chunks that stay in the first cache while all rows pass.

use super::pool::Pool;
use super::simd::{Level, Simd, dispatch};
use super::{Columns, Panel, SharedOut, TILE, of_size, panels};

/// The element type of a dense weight.
pub(super) trait Element: Copy + Send + Sync + Default {
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

/// A matrix `[N, K]` in tiles of sixteen columns of its product.
pub(super) struct Dense<W> {
    pub(super) n: usize,
    pub(super) k: usize,
    /// `[N / 16, K, 16]`
    tiles: Vec<W>,
}

impl<W: Element> Dense<W> {
    /// A matrix of zeros, to be filled row by row.
    pub(super) fn new(n: usize, k: usize) -> Self {
        Self {
            n,
            k,
            tiles: vec![W::default(); n.div_ceil(TILE) * k * TILE],
        }
    }

    /// Stores row `row` `[K]`.
    pub(super) fn set_row(&mut self, row: usize, values: impl Iterator<Item = W>) {
        let tile = &mut self.tiles[row / TILE * self.k * TILE..];
        for (line, value) in tile.chunks_exact_mut(TILE).take(self.k).zip(values) {
            line[row % TILE] = value;
        }
    }

    /// Row `row` `[K]`.
    pub(super) fn row(&self, row: usize) -> impl Iterator<Item = W> + '_ {
        let tile = &self.tiles[row / TILE * self.k * TILE..];
        let lines = tile.chunks_exact(TILE).take(self.k);
        lines.map(move |line| line[row % TILE])
    }

    /// Appends the rows of `other`; this one's tiles are whole.
    pub(super) fn append(&mut self, other: Self) {
        debug_assert!(self.n.is_multiple_of(TILE) && self.k == other.k);
        self.n += other.n;
        self.tiles.extend(other.tiles);
    }

    /// Bytes of weights, the padding of the last tile not counted.
    pub(super) fn bytes(&self) -> usize {
        self.n * self.k * size_of::<W>()
    }
}

/// Tiles whose products are taken together: with few rows enough sums to hide the latency of the additions, with
/// more as many as the registers hold.
const fn wide(rows: usize) -> usize {
    if rows <= 4 { 4 } else { 3 }
}

/// Rows of a panel at most.
const MOST: usize = 8;

/// Inner values of one chunk: its weights of a few tiles stay in the first cache. Sums are taken chunk by chunk, so
/// the size decides how results round.
const CHUNK: usize = 128;

/// Packs `[M, K]` activations: panel by panel; within one, value by value, the rows side by side.
pub(super) fn pack(x: &[f32], k: usize, to: &mut Vec<f32>) {
    let most = Level::detect().rows().min(MOST);
    let rows = x.len().checked_div(k).unwrap_or(0);
    let room: usize = panels(rows, most).map(|p| p.room).sum();
    to.resize(room * k, 0.0);
    for p in panels(rows, most) {
        for r in 0..p.rows {
            let row = &x[(p.row + r) * k..(p.row + r + 1) * k];
            let lines = to[p.at * k..].chunks_exact_mut(p.room);
            for (line, value) in lines.zip(row) {
                line[r] = *value;
            }
        }
    }
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` for all rows of packed `x`.
pub(super) fn matmul<W: Element>(pool: &Pool, w: &Dense<W>, x: &[f32], out: &SharedOut<'_>) {
    let tiles = w.n.div_ceil(TILE);
    let level = Level::detect();
    let grain = super::grain(tiles, pool).next_multiple_of(12);
    pool.ranges(tiles, grain, |range| {
        let tiles = Columns {
            start: range.start,
            end: range.end,
        };
        dispatch!(level, tiles_of(w, x, tiles, out): (w: &Dense<W>, x: &[f32], tiles: Columns, out: &SharedOut<'_>) <W: Element>);
    });
}

#[inline(always)]
fn tiles_of<S: Simd, W: Element>(w: &Dense<W>, x: &[f32], tiles: Columns, out: &SharedOut<'_>) {
    let most = S::ROWS.min(MOST);
    let largest = panels(out.rows, most).map(|p| p.room).max().unwrap_or(1);
    let mut tile = tiles.start;
    while tile < tiles.end {
        let together = wide(largest).min(tiles.end - tile);
        for start in (0..w.k).step_by(CHUNK) {
            let inner = start..w.k.min(start + CHUNK);
            for p in panels(out.rows, most) {
                let mut at = tile;
                while at < tile + together {
                    let left = tile + together - at;
                    let inner = inner.clone();
                    at += of_size!(p.room, most, |R| match left >= wide(R) {
                        true => panel::<S, W, R, { wide(R) }>(w, x, at, p, inner, out),
                        false => panel::<S, W, R, 1>(w, x, at, p, inner, out),
                    });
                }
            }
        }
        tile += together;
    }
}

/// Some tiles of one panel and chunk; returns how many.
#[inline(always)]
fn panel<S: Simd, W: Element, const R: usize, const T: usize>(
    w: &Dense<W>,
    x: &[f32],
    tile: usize,
    panel: Panel,
    inner: std::ops::Range<usize>,
    out: &SharedOut<'_>,
) -> usize {
    let k = w.k;
    let count = inner.len();
    let weights: [&[W]; T] = std::array::from_fn(|t| {
        let first = (tile + t) * k + inner.start;
        &w.tiles[first * TILE..(first + count) * TILE]
    });
    let x = &x[panel.at * k + inner.start * R..panel.at * k + inner.end * R];
    let mut acc = [[S::zero(); T]; R];
    for (i, x) in x.chunks_exact(R).enumerate() {
        let line: [S::V; T] =
            std::array::from_fn(|t| W::load::<S>(&weights[t][i * TILE..(i + 1) * TILE]));
        for weights in weights {
            S::prefetch(&weights[i * TILE], CHUNK * TILE);
        }
        for r in 0..R {
            let x = S::splat(x[r]);
            for t in 0..T {
                acc[r][t] = S::fma(line[t], x, acc[r][t]);
            }
        }
    }
    for (r, acc) in acc.into_iter().take(panel.rows).enumerate() {
        for (t, acc) in acc.into_iter().enumerate() {
            let mut lanes = [0.0; TILE];
            S::store(acc, &mut lanes);
            let column = (tile + t) * TILE;
            match inner.start {
                0 => out.store(panel.row + r, column, &lanes),
                _ => out.add(panel.row + r, column, &lanes),
            }
        }
    }
    T
}
