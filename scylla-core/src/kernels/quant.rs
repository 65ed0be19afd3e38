//! Products of rows with 8-bit and 4-bit weights in blocks of 32 (GGUF's Q8_0, Q4_0 and Q4_1).
//!
//! Sixteen columns lie side by side in a tile, so that one register holds four consecutive weights of each and a
//! product needs no sum across lanes. Activations are quantised to 8 bits per block of 32, as llama.cpp does, and
//! multiplied as integers; the weights of a block are read once for up to sixteen rows.

use half::f16;

use super::pool::Pool;
use super::simd::{Level, Line, Simd, dispatch, quantize};
use super::{Columns, Panel, SharedOut, TILE, of_size, panels};

/// Values a block.
pub(super) const BLOCK: usize = 32;

/// How the weights of a block are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    /// `w = d (u - 128)`, a byte each.
    Eight,
    /// `w = d (u - 8)`, two to a byte.
    Four,
    /// `w = d u + m`, two to a byte.
    FourWithOffset,
}

impl Bits {
    /// Lines of 64 bytes that hold one block of sixteen columns.
    fn lines(self) -> usize {
        match self {
            Self::Eight => 8,
            _ => 4,
        }
    }

    /// Bytes of one column's block, quants only.
    fn bytes(self) -> usize {
        self.lines() * 4
    }
}

/// A matrix `[N, K]` in tiles of sixteen columns of its product.
pub(super) struct Quant {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) bits: Bits,
    /// `[N / 16, K / 32, lines]`
    lines: Vec<Line>,
    /// `[N / 16, K / 32][16]`
    scales: Vec<[f16; TILE]>,
    /// The same for offsets, where there are some.
    offsets: Vec<[f16; TILE]>,
}

/// One block of one column: scale, offset, and the quants as they are stored.
#[derive(Clone, Copy)]
pub(super) struct BlockOf {
    pub(super) scale: f16,
    pub(super) offset: f16,
    pub(super) quants: [u8; BLOCK],
}

fn read_f16(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl BlockOf {
    fn new(scale: f16, offset: f16, quants: &[u8]) -> Self {
        let mut all = [0; BLOCK];
        all[..quants.len()].copy_from_slice(quants);
        Self {
            scale,
            offset,
            quants: all,
        }
    }

    /// A block of GGUF's Q8_0: 34 bytes.
    pub(super) fn q8_0(bytes: &[u8]) -> Self {
        let quants: [u8; BLOCK] = std::array::from_fn(|i| bytes[2 + i] ^ 0x80);
        Self::new(read_f16(bytes, 0), f16::ZERO, &quants)
    }

    /// A block of GGUF's Q4_0: 18 bytes.
    pub(super) fn q4_0(bytes: &[u8]) -> Self {
        Self::new(read_f16(bytes, 0), f16::ZERO, &bytes[2..18])
    }

    /// A block of GGUF's Q4_1: 20 bytes.
    pub(super) fn q4_1(bytes: &[u8]) -> Self {
        Self::new(read_f16(bytes, 0), read_f16(bytes, 2), &bytes[4..20])
    }

    /// The eight blocks of a super-block of GGUF's Q4_K: 144 bytes, 256 values, a 6-bit scale and least value for
    /// every 32.
    pub(super) fn q4_k(bytes: &[u8]) -> [Self; 8] {
        let (d, least) = (read_f16(bytes, 0).to_f32(), read_f16(bytes, 2).to_f32());
        let (packed, quants) = (&bytes[4..16], &bytes[16..144]);
        std::array::from_fn(|j| {
            let (scale, min) = match j {
                0..4 => (packed[j] & 63, packed[j + 4] & 63),
                _ => (
                    packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
                    packed[j + 4] >> 4 | packed[j] >> 6 << 4,
                ),
            };
            // Two blocks share 32 bytes: the lower halves are the first one's.
            let from = &quants[j / 2 * 32..][..32];
            let value = |i: usize| match j % 2 {
                0 => from[i] & 15,
                _ => from[i] >> 4,
            };
            let quants: [u8; 16] = std::array::from_fn(|i| value(i) | value(i + 16) << 4);
            let scale = f16::from_f32(d * f32::from(scale));
            Self::new(scale, f16::from_f32(-least * f32::from(min)), &quants)
        })
    }

    /// Quantises 32 values to 8 bits: the largest magnitude becomes 127.
    pub(super) fn quantize(x: &[f32]) -> Self {
        let mut q = [0i8; BLOCK];
        let mut whole = [0.0; BLOCK];
        whole.copy_from_slice(x);
        let (d, _) = quantize(&whole, &mut q);
        Self::new(f16::from_f32(d), f16::ZERO, &q.map(|q| q as u8 ^ 0x80))
    }

    /// Quantises 32 values to 4 bits between their least and their largest.
    pub(super) fn quantize_four(x: &[f32]) -> Self {
        let least = x.iter().copied().fold(f32::INFINITY, f32::min);
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scale = f16::from_f32((largest - least) / 15.0);
        let offset = f16::from_f32(least);
        let inverse = match scale.to_f32() {
            0.0 => 0.0,
            d => 1.0 / d,
        };
        let q = |v: f32| ((v - offset.to_f32()) * inverse).round().clamp(0.0, 15.0) as u8;
        let quants: [u8; 16] = std::array::from_fn(|i| q(x[i]) | q(x[i + 16]) << 4);
        Self::new(scale, offset, &quants)
    }
}

impl Quant {
    /// An empty matrix `[N, K]`, to be filled block by block; `K` is a multiple of 32.
    pub(super) fn new(bits: Bits, n: usize, k: usize) -> Self {
        debug_assert!(k.is_multiple_of(BLOCK));
        let blocks = n.div_ceil(TILE) * (k / BLOCK);
        let offsets = match bits {
            Bits::FourWithOffset => blocks,
            _ => 0,
        };
        Self {
            n,
            k,
            bits,
            lines: vec![Line([0; 64]); blocks * bits.lines()],
            scales: vec![[f16::ZERO; TILE]; blocks],
            offsets: vec![[f16::ZERO; TILE]; offsets],
        }
    }

    /// Appends the rows of `other`; this one's tiles are whole.
    pub(super) fn append(&mut self, other: Self) {
        debug_assert!(self.n.is_multiple_of(TILE) && self.k == other.k && self.bits == other.bits);
        self.n += other.n;
        self.lines.extend(other.lines);
        self.scales.extend(other.scales);
        self.offsets.extend(other.offsets);
    }

    /// Where block `block` of row `row` lies: its tile's block, and its lane.
    fn at(&self, row: usize, block: usize) -> (usize, usize) {
        (row / TILE * (self.k / BLOCK) + block, row % TILE)
    }

    /// Stores one block of one row.
    pub(super) fn set(&mut self, row: usize, block: usize, from: &BlockOf) {
        let (at, lane) = self.at(row, block);
        let lines = self.bits.lines();
        let fours = from.quants.chunks_exact(4);
        for (line, four) in self.lines[at * lines..(at + 1) * lines]
            .iter_mut()
            .zip(fours)
        {
            line.0[lane * 4..lane * 4 + 4].copy_from_slice(four);
        }
        self.scales[at][lane] = from.scale;
        if let Some(offsets) = self.offsets.get_mut(at) {
            offsets[lane] = from.offset;
        }
    }

    /// One block of one row.
    pub(super) fn get(&self, row: usize, block: usize) -> BlockOf {
        let (at, lane) = self.at(row, block);
        let lines = self.bits.lines();
        let mut quants = [0; BLOCK];
        let fours = quants.chunks_exact_mut(4);
        for (line, four) in self.lines[at * lines..(at + 1) * lines].iter().zip(fours) {
            four.copy_from_slice(&line.0[lane * 4..lane * 4 + 4]);
        }
        let offset = self.offsets.get(at).map_or(f16::ZERO, |o| o[lane]);
        BlockOf {
            scale: self.scales[at][lane],
            offset,
            quants,
        }
    }

    /// Writes row `row`, widened `[K]`.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let b = self.get(row, block);
            let (d, m) = (b.scale.to_f32(), b.offset.to_f32());
            let half = BLOCK / 2;
            for i in 0..half {
                let (low, high) = (b.quants[i] & 15, b.quants[i] >> 4);
                (out[i], out[i + half]) = match self.bits {
                    Bits::Eight => {
                        let value = |i: usize| d * (f32::from(b.quants[i]) - 128.0);
                        (value(i), value(i + half))
                    }
                    Bits::Four => (d * (f32::from(low) - 8.0), d * (f32::from(high) - 8.0)),
                    Bits::FourWithOffset => (d * f32::from(low) + m, d * f32::from(high) + m),
                };
            }
        }
    }

    /// Bytes of weights, the padding of the last tile not counted.
    pub(super) fn bytes(&self) -> usize {
        let scales = match self.bits {
            Bits::FourWithOffset => 4,
            _ => 2,
        };
        self.n * (self.k / BLOCK) * (self.bits.bytes() + scales)
    }
}

/// Rows of activations in blocks of 32: 8-bit values, a scale, and the sum of the values. Panel by panel; within one,
/// block by block, the rows of a block side by side.
#[derive(Default)]
pub(super) struct Activations {
    q: Vec<[i8; BLOCK]>,
    scale: Vec<f32>,
    sum: Vec<i32>,
}

impl Activations {
    /// Quantises `[M, K]` values.
    pub(super) fn fill(&mut self, x: &[f32], k: usize) {
        let level = Level::detect();
        dispatch!(level, quantize_rows(self, x, k): (to: &mut Activations, x: &[f32], k: usize) <>);
    }
}

#[inline(always)]
fn quantize_rows<S: Simd>(to: &mut Activations, x: &[f32], k: usize) {
    let blocks = k / BLOCK;
    let room: usize = panels(x.len() / k, S::ROWS).map(|p| p.room).sum();
    to.q.resize(room * blocks, [0; BLOCK]);
    to.scale.resize(room * blocks, 0.0);
    to.sum.resize(room * blocks, 0);
    for panel in panels(x.len() / k, S::ROWS) {
        for r in 0..panel.rows {
            let row = &x[(panel.row + r) * k..(panel.row + r + 1) * k];
            for (b, x) in row.chunks_exact(BLOCK).enumerate() {
                let at = panel.at * blocks + b * panel.room + r;
                let Some(x) = x.first_chunk() else { continue };
                (to.scale[at], to.sum[at]) = S::quantize(x, &mut to.q[at]);
            }
        }
    }
}

/// The weights of one form, as a kernel reads them.
trait Form {
    const LINES: usize;
    /// What each stored value lies above the weight over its scale.
    const BIAS: i32;
    const OFFSET: bool;
    /// The eight groups of four consecutive weights of a block.
    fn groups<S: Simd>(lines: &[Line]) -> [S::B; 8];
}

struct Eight;
struct Four;
struct FourWithOffset;

impl Form for Eight {
    const LINES: usize = 8;
    const BIAS: i32 = 128;
    const OFFSET: bool = false;
    #[inline(always)]
    fn groups<S: Simd>(lines: &[Line]) -> [S::B; 8] {
        std::array::from_fn(|i| S::load_line(&lines[i]))
    }
}

#[inline(always)]
fn nibbles<S: Simd>(lines: &[Line]) -> [S::B; 8] {
    let whole: [S::B; 4] = std::array::from_fn(|i| S::load_line(&lines[i]));
    std::array::from_fn(|i| match i {
        0..4 => S::low(whole[i]),
        _ => S::high(whole[i - 4]),
    })
}

impl Form for Four {
    const LINES: usize = 4;
    const BIAS: i32 = 8;
    const OFFSET: bool = false;
    #[inline(always)]
    fn groups<S: Simd>(lines: &[Line]) -> [S::B; 8] {
        nibbles::<S>(lines)
    }
}

impl Form for FourWithOffset {
    const LINES: usize = 4;
    const BIAS: i32 = 0;
    const OFFSET: bool = true;
    #[inline(always)]
    fn groups<S: Simd>(lines: &[Line]) -> [S::B; 8] {
        nibbles::<S>(lines)
    }
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` for `M` rows `x`.
pub(super) fn matmul(pool: &Pool, w: &Quant, x: &Activations, out: &SharedOut<'_>) {
    let tiles = w.n.div_ceil(TILE);
    let level = Level::detect();
    pool.ranges(tiles, super::grain(tiles, pool), |range| {
        let tiles = Columns {
            start: range.start,
            end: range.end,
        };
        match w.bits {
            Bits::Eight => {
                dispatch!(level, tiles_of(w, x, tiles, out): (w: &Quant, x: &Activations, tiles: Columns, out: &SharedOut<'_>) <F: Form = Eight>);
            }
            Bits::Four => {
                dispatch!(level, tiles_of(w, x, tiles, out): (w: &Quant, x: &Activations, tiles: Columns, out: &SharedOut<'_>) <F: Form = Four>);
            }
            Bits::FourWithOffset => {
                dispatch!(level, tiles_of(w, x, tiles, out): (w: &Quant, x: &Activations, tiles: Columns, out: &SharedOut<'_>) <F: Form = FourWithOffset>);
            }
        }
    });
}

/// Lines of 64 bytes that are asked for ahead.
const AHEAD: usize = 64;

/// All rows of a range of tiles, panel by panel.
#[inline(always)]
fn tiles_of<S: Simd, F: Form>(w: &Quant, x: &Activations, tiles: Columns, out: &SharedOut<'_>) {
    for tile in tiles.start..tiles.end {
        for p in panels(out.rows, S::ROWS) {
            of_size!(p.room, S::ROWS, |R| panel::<S, F, R>(w, x, tile, p, out));
        }
    }
}

#[inline(always)]
fn panel<S: Simd, F: Form, const R: usize>(
    w: &Quant,
    x: &Activations,
    tile: usize,
    panel: Panel,
    out: &SharedOut<'_>,
) {
    let blocks = w.k / BLOCK;
    let lines = &w.lines[tile * blocks * F::LINES..(tile + 1) * blocks * F::LINES];
    let scales = &w.scales[tile * blocks..(tile + 1) * blocks];
    let offsets = match F::OFFSET {
        true => &w.offsets[tile * blocks..(tile + 1) * blocks],
        false => &[],
    };
    let packed = panel.at * blocks..(panel.at + R) * blocks;
    let q = x.q[packed.clone()].chunks_exact(R);
    let x_scale = x.scale[packed.clone()].chunks_exact(R);
    let x_sum = x.sum[packed].chunks_exact(R);
    let mut acc = [S::zero(); R];
    let weights = lines.chunks_exact(F::LINES).zip(scales).enumerate();
    for ((((b, (lines, scale)), q), x_scale), x_sum) in weights.zip(q).zip(x_scale).zip(x_sum) {
        // The products of many rows take longer than the lines need to come, if they were asked for.
        for line in lines {
            S::prefetch(line, AHEAD);
        }
        let groups = F::groups::<S>(lines);
        let scale = S::widen(scale);
        for r in 0..R {
            let four = |i: usize| {
                [
                    q[r][i * 4],
                    q[r][i * 4 + 1],
                    q[r][i * 4 + 2],
                    q[r][i * 4 + 3],
                ]
            };
            // Two chains of four: half the latency of one of eight.
            let mut even = S::splat_i((-F::BIAS).wrapping_mul(x_sum[r])); // no number where the scale is none
            let mut odd = S::splat_i(0);
            for i in 0..4 {
                even = S::dot(even, groups[2 * i], four(2 * i));
                odd = S::dot(odd, groups[2 * i + 1], four(2 * i + 1));
            }
            let dot = S::to_f32(S::add_i(even, odd));
            acc[r] = S::fma(S::mul(dot, S::splat(x_scale[r])), scale, acc[r]);
            if F::OFFSET {
                let sum = x_scale[r] * x_sum[r] as f32;
                acc[r] = S::fma(S::splat(sum), S::widen(&offsets[b]), acc[r]);
            }
        }
    }
    for (r, acc) in acc.into_iter().take(panel.rows).enumerate() {
        let mut lanes = [0.0; TILE];
        S::store(acc, &mut lanes);
        out.store(panel.row + r, tile * TILE, &lanes);
    }
}
