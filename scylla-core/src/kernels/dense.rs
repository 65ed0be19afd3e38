//! Products of rows with a dense f32 or bf16 matrix.
//!
//! Sixteen columns lie side by side in a tile, so that a register holds one weight of each (f32) or two (bf16), and a
//! product needs no sum across lanes.

use super::memory::Buffer;
use super::pool::Pool;
use super::simd::{InstructionSet, Limits, Simd, dispatch};
use super::tiles::{self, Part, Product};
use super::{SharedOut, SharedValues, TILE};

/// The element type of a dense weight.
pub(super) trait Element: Copy + Send + Sync + Default {
    /// Inner values that one register line holds of each column.
    const PER: usize;
    /// As many of an activation.
    type X: Copy + Send + Sync + Default;
    /// A line in a register.
    type Line<S: Simd>: Copy;
    fn load<S: Simd>(w: &[Self]) -> Self::Line<S>;
    /// `acc + w x`
    fn multiply_add<S: Simd>(w: Self::Line<S>, x: Self::X, acc: S::V) -> S::V;
    /// Activations as `to` holds them, `PER` values to an element, zero where there are fewer.
    fn activations(x: &[f32], to: &mut [Self::X]);
    fn widen(self) -> f32;
    /// Activations out of four bytes: one, or a pair.
    fn of_bits(bits: u32) -> Self::X;
}

impl Element for f32 {
    const PER: usize = 1;
    type X = f32;
    type Line<S: Simd> = S::V;
    #[inline(always)]
    fn load<S: Simd>(w: &[Self]) -> S::V {
        S::load(w)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(w: S::V, x: f32, acc: S::V) -> S::V {
        S::fma(w, S::splat(x), acc)
    }
    #[inline(always)]
    fn activations(x: &[f32], to: &mut [f32]) {
        to[..x.len()].copy_from_slice(x);
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of_bits(bits: u32) -> f32 {
        f32::from_bits(bits)
    }
}

/// bf16 bits. Activations are rounded to bf16 as well, so that products of pairs are one instruction where the
/// processor has it; sums are f32.
impl Element for u16 {
    const PER: usize = 2;
    type X = [u16; 2];
    type Line<S: Simd> = S::P;
    #[inline(always)]
    fn load<S: Simd>(w: &[Self]) -> S::P {
        S::load_pairs(w)
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(w: S::P, x: [u16; 2], acc: S::V) -> S::V {
        S::dot_pairs(acc, w, x)
    }
    #[inline(always)]
    fn activations(x: &[f32], to: &mut [[u16; 2]]) {
        let (pairs, last) = x.as_chunks();
        for (to, [a, b]) in to.iter_mut().zip(pairs) {
            *to = [to_bf16(*a), to_bf16(*b)];
        }
        if let [last] = last {
            to[pairs.len()] = [to_bf16(*last), 0];
        }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
    #[inline(always)]
    fn of_bits(bits: u32) -> [u16; 2] {
        [bits as u16, (bits >> 16) as u16]
    }
}

/// The nearest bf16, ties to even; NaN stays NaN. As `half` does it, in a form that compilers vectorise.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let quiet = bits | 0x40_0000;
    ((if x.is_nan() { quiet } else { rounded }) >> 16) as u16
}

/// A matrix `[N, K]` in tiles of sixteen columns of its product.
pub(super) struct Dense<W> {
    pub(super) n: usize,
    pub(super) k: usize,
    /// `[N / 16, K / PER, 16, PER]`
    tiles: Buffer<W>,
}

impl<W: Element> Dense<W> {
    /// A matrix of zeros, to be filled row by row.
    pub(super) fn new(n: usize, k: usize) -> Self {
        Self {
            n,
            k,
            tiles: Buffer::new(vec![
                W::default();
                n.div_ceil(TILE) * k.div_ceil(W::PER) * Self::LINE
            ]),
        }
    }

    /// Elements of a line of sixteen columns.
    const LINE: usize = TILE * W::PER;

    /// Lines of a tile.
    fn lines(&self) -> usize {
        self.k.div_ceil(W::PER)
    }

    /// Where the tile of a row begins.
    fn tile(&self, row: usize) -> usize {
        row / TILE * self.lines() * Self::LINE
    }

    /// Stores row `row` `[K]`.
    pub(super) fn set_row(&mut self, row: usize, values: impl Iterator<Item = W>) {
        let at = self.tile(row) + row % TILE * W::PER;
        let tile = &mut self.tiles.own()[at..];
        for (i, value) in values.take(self.k).enumerate() {
            tile[i / W::PER * Self::LINE + i % W::PER] = value;
        }
    }

    /// Row `row` `[K]`.
    pub(super) fn row(&self, row: usize) -> impl Iterator<Item = W> + '_ {
        let tile = &self.tiles[self.tile(row) + row % TILE * W::PER..];
        (0..self.k).map(move |i| tile[i / W::PER * Self::LINE + i % W::PER])
    }

    /// Appends the rows of `other`; this one's tiles are whole.
    pub(super) fn append(&mut self, other: Self) {
        assert!(self.n.is_multiple_of(TILE) && self.k == other.k);
        self.n += other.n;
        self.tiles.own().extend_from_slice(&other.tiles);
    }

    /// Moves the weights to where they stay.
    pub(super) fn settle(&mut self) {
        self.tiles.settle();
    }

    /// The lines of a tile, one after the other.
    pub(super) fn tile_lines(&self, tile: usize) -> impl Iterator<Item = &[W]> {
        let first = tile * self.lines() * Self::LINE;
        self.tiles[first..first + self.lines() * Self::LINE].chunks_exact(Self::LINE)
    }

    /// Bytes of weights, the padding of the last tile not counted.
    pub(super) fn bytes(&self) -> usize {
        self.n * self.k * size_of::<W>()
    }
}

/// Lines whose activations lie together, row by row, in a packed panel.
const RUN: usize = 16;

/// Packs `[M, K]` activations: panel by panel; within one, sixteen lines of each row in turn, the rows side by side.
pub(super) fn pack<W: Element>(pool: &Pool, x: &[f32], k: usize, to: &mut Vec<W::X>) {
    let lines = k.div_ceil(W::PER).next_multiple_of(RUN);
    let room = tiles::room::<Rows<'_, W>>(x, k);
    to.resize(room * lines, W::X::default());
    let to = SharedValues::new(to);
    tiles::pack::<Rows<'_, W>>(pool, x, k, |x, place| {
        let room = place.len();
        // SAFETY: each panel has its own place, and is packed once.
        let to = unsafe { to.part(place.start * lines..place.end * lines) };
        dispatch!(InstructionSet::detect(), pack_panel(x, k, room, to): (x: &[f32], k: usize, room: usize, to: &mut [W::X]) <W: Element = W>);
    });
}

#[inline(always)]
fn pack_panel<S: Simd, W: Element>(x: &[f32], k: usize, room: usize, to: &mut [W::X]) {
    for (r, row) in x.chunks_exact(k).enumerate() {
        let runs = to.chunks_exact_mut(RUN).skip(r).step_by(room);
        for (run, values) in runs.zip(row.chunks(RUN * W::PER)) {
            W::activations(values, run);
        }
    }
}

/// Packed activations `x` and the weight they are multiplied with.
struct Rows<'a, W: Element> {
    w: &'a Dense<W>,
    x: &'a [W::X],
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` for all rows of packed `x`.
pub(super) fn matmul<W: Element>(pool: &Pool, w: &Dense<W>, x: &[W::X], out: &SharedOut<'_>) {
    tiles::multiply(pool, &Rows { w, x }, w.n.div_ceil(TILE), out);
}

impl<W: Element> Product for Rows<'_, W> {
    const ROWS: usize = 8;
    const CHUNK: usize = 64;
    const ALIGN: usize = RUN;

    /// With few rows enough sums to hide the latency of the additions, with more as many as the registers hold.
    #[inline(always)]
    fn wide(rows: usize, _: usize, limits: Limits) -> usize {
        (limits.sums / rows).clamp(1, 4)
    }

    fn ahead(_: usize) -> usize {
        128
    }

    fn units(&self) -> usize {
        self.w.lines()
    }

    #[inline(always)]
    fn panel<S: Simd, const R: usize, const T: usize>(&self, part: Part, sums: &mut [[f32; TILE]]) {
        let (lines, line) = (self.w.lines(), Dense::<W>::LINE);
        let count = part.end - part.start;
        let weights: [&[W]; T] = std::array::from_fn(|t| {
            let first = (part.tile + t) * lines + part.start;
            &self.w.tiles[first * line..(first + count) * line]
        });
        let first = part.at * lines.next_multiple_of(RUN) + part.start * R;
        let x = &self.x[first..first + count.next_multiple_of(RUN) * R];
        let mut acc: [[S::V; T]; R] = tiles::begin::<S, R, T>(part.start, sums);
        // Each pass asks for its share of the lines that come next.
        let share = (1 << 16) / part.passes;
        let ahead = part.ahead + part.pass * count / part.passes;
        for i in 0..count {
            let x = &x[i / RUN * RUN * R + i % RUN..][..(R - 1) * RUN + 1];
            let mut columns = [W::load::<S>(&weights[0][i * line..(i + 1) * line]); T];
            for t in 1..T {
                columns[t] = W::load::<S>(&weights[t][i * line..(i + 1) * line]);
            }
            for weights in weights {
                S::prefetch(&weights[0], (ahead + ((i * share) >> 16)) * line);
            }
            for r in 0..R {
                for t in 0..T {
                    acc[r][t] = W::multiply_add::<S>(columns[t], x[r * RUN], acc[r][t]);
                }
            }
        }
        tiles::end::<S, R, T>(acc, sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        let mut bits = 1u32;
        for _ in 0..if cfg!(miri) { 500 } else { 200_000 } {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(bits);
            let (found, expected) = (to_bf16(x), half::bf16::from_f32(x));
            assert!(found == expected.to_bits() || x.is_nan() && expected.is_nan());
            assert_eq!(f32::from_bits(u32::from(found) << 16).is_nan(), x.is_nan());
        }
    }
}
