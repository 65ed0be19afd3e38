//! Products of rows with 8-bit and 4-bit weights in blocks of 32 (GGUF's Q8_0, Q4_0 and Q4_1).
//!
//! Sixteen columns lie side by side in a tile, so that one register holds four consecutive weights of each and a
//! product needs no sum across lanes. Activations are quantised to 8 bits per block of 32, as llama.cpp does, and
//! multiplied as integers; the weights of a block are read once for up to sixteen rows.

use std::marker::PhantomData;
use std::ops::Range;

use half::f16;

use super::memory::Buffer;
use super::pool::Pool;
use super::product::{pair, units_mut};
use super::simd::{InstructionSet, Limits, Line, Simd, dispatch, quantize};
use super::tiles::{self, Part, Product};
use super::{SharedOut, SharedValues, TILE};

/// Values a block.
pub(super) const BLOCK: usize = 32;

/// Pairs of groups of four values in a block: the i-th holds the values from 4 i and from 16 + 4 i on.
const PAIRS: usize = BLOCK / 8;

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

    /// Which line holds the bytes `4 group..4 group + 4` of a block. Those that are multiplied in turn lie in turn: the
    /// values 4 i and 16 + 4 i on, which share a byte where two do.
    fn line(self, group: usize) -> usize {
        match self {
            Self::Eight => group % PAIRS * 2 + group / PAIRS,
            _ => group,
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
    lines: Buffer<Line>,
    /// `[N / 16, K / 32][16]`
    scales: Buffer<[f16; TILE]>,
    /// The same for offsets, where there are some.
    offsets: Buffer<[f16; TILE]>,
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
        let mut q = [[0; 4]; 2 * PAIRS];
        let mut whole = [0.0; BLOCK];
        whole.copy_from_slice(x);
        let (d, _) = quantize(&whole, &mut q);
        let stored: [u8; BLOCK] = std::array::from_fn(|i| q[i / 4][i % 4] as u8 ^ 0x80);
        Self::new(f16::from_f32(d), f16::ZERO, &stored)
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
        assert!(k.is_multiple_of(BLOCK));
        let blocks = n.div_ceil(TILE) * (k / BLOCK);
        let offsets = match bits {
            Bits::FourWithOffset => blocks,
            _ => 0,
        };
        Self {
            n,
            k,
            bits,
            lines: Buffer::new(vec![Line([0; 64]); blocks * bits.lines()]),
            scales: Buffer::new(vec![[f16::ZERO; TILE]; blocks]),
            offsets: Buffer::new(vec![[f16::ZERO; TILE]; offsets]),
        }
    }

    /// Appends the rows of `other`; this one's tiles are whole.
    pub(super) fn append(&mut self, other: Self) {
        assert!(self.n.is_multiple_of(TILE) && self.k == other.k && self.bits == other.bits);
        self.n += other.n;
        self.lines.own().extend_from_slice(&other.lines);
        self.scales.own().extend_from_slice(&other.scales);
        self.offsets.own().extend_from_slice(&other.offsets);
    }

    /// Moves the weights to where they stay.
    pub(super) fn settle(&mut self) {
        self.lines.settle();
        self.scales.settle();
        self.offsets.settle();
    }

    /// Where block `block` of row `row` lies: its tile's block, and its lane.
    fn at(&self, row: usize, block: usize) -> (usize, usize) {
        (row / TILE * (self.k / BLOCK) + block, row % TILE)
    }

    /// Stores one block of one row.
    pub(super) fn set(&mut self, row: usize, block: usize, from: &BlockOf) {
        let (at, lane) = self.at(row, block);
        let lines = self.bits.lines();
        let block = &mut self.lines.own()[at * lines..(at + 1) * lines];
        for (group, four) in from.quants.chunks_exact(4).take(lines).enumerate() {
            let line = &mut block[self.bits.line(group)];
            line.0[lane * 4..lane * 4 + 4].copy_from_slice(four);
        }
        self.scales.own()[at][lane] = from.scale;
        if let Some(offsets) = self.offsets.own().get_mut(at) {
            offsets[lane] = from.offset;
        }
    }

    /// One block of one row.
    pub(super) fn get(&self, row: usize, block: usize) -> BlockOf {
        let (at, lane) = self.at(row, block);
        let lines = self.bits.lines();
        let mut quants = [0; BLOCK];
        let block = &self.lines[at * lines..(at + 1) * lines];
        for (group, four) in quants.chunks_exact_mut(4).take(lines).enumerate() {
            let line = &block[self.bits.line(group)];
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

    /// Writes a tile rounded to bf16: line by line a pair of neighbours of K of each column.
    pub(super) fn tile_pairs(&self, tile: usize, to: &mut [Line]) {
        dispatch!(InstructionSet::detect(), tile_pairs(self, tile, to): (w: &Quant, tile: usize, to: &mut [Line]) <>);
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

/// Rows of activations in blocks of 32: 8-bit values, their scale, and their sum in the two forms that weights need.
/// Panel by panel; within one, block by block, the rows of a block side by side.
#[derive(Default)]
pub(super) struct Activations {
    /// In groups of four.
    q: Vec<[[i8; 4]; 2 * PAIRS]>,
    scale: Vec<f32>,
    /// Where sums of products begin for weights that are stored 128 above their value: `-128 sum(q)`.
    start: Vec<i32>,
    /// What an offset of the weights is multiplied with: `scale sum(q)`.
    total: Vec<f32>,
}

impl Activations {
    /// Quantises `[M, K]` values.
    pub(super) fn fill(&mut self, pool: &Pool, x: &[f32], k: usize) {
        let blocks = k / BLOCK;
        // The panels of one form are those of all.
        let room = tiles::room::<Rows<'_, Eight>>(x, k);
        self.q.resize(room * blocks, [[0; 4]; 2 * PAIRS]);
        self.scale.resize(room * blocks, 0.0);
        self.start.resize(room * blocks, 0);
        self.total.resize(room * blocks, 0.0);
        let (q, scale) = (
            SharedValues::new(&mut self.q),
            SharedValues::new(&mut self.scale),
        );
        let (start, total) = (
            SharedValues::new(&mut self.start),
            SharedValues::new(&mut self.total),
        );
        tiles::pack::<Rows<'_, Eight>>(pool, x, k, |x, place| {
            let (room, at) = (place.len(), place.start * blocks..place.end * blocks);
            // SAFETY: each panel has its own place, and is filled once.
            let to = unsafe {
                Quantized {
                    q: q.part(at.clone()),
                    scale: scale.part(at.clone()),
                    start: start.part(at.clone()),
                    total: total.part(at),
                }
            };
            dispatch!(InstructionSet::detect(), quantize_panel(x, k, room, to): (x: &[f32], k: usize, room: usize, to: Quantized<'_>) <>);
        });
    }
}

/// One panel of [`Activations`].
struct Quantized<'a> {
    q: &'a mut [[[i8; 4]; 2 * PAIRS]],
    scale: &'a mut [f32],
    start: &'a mut [i32],
    total: &'a mut [f32],
}

#[inline(always)]
fn quantize_panel<S: Simd>(x: &[f32], k: usize, room: usize, to: Quantized<'_>) {
    for (r, row) in x.chunks_exact(k).enumerate() {
        for (b, x) in row.as_chunks().0.iter().enumerate() {
            let at = b * room + r;
            let (scale, sum) = S::quantize(x, &mut to.q[at]);
            to.scale[at] = scale;
            to.start[at] = sum.wrapping_mul(-128); // no number where the scale is none
            to.total[at] = scale * sum as f32;
        }
    }
}

/// The weights of one form, as a kernel reads them.
trait Form: Sync {
    /// Lines that hold a pair of groups.
    const PER_PAIR: usize;
    const OFFSET: bool;
    /// Sixteen times four consecutive weights.
    type Group<S: Simd>: Copy;
    /// A pair of groups.
    fn pair<S: Simd>(lines: &[Line]) -> [Self::Group<S>; 2];
    /// Sums of the products of a block.
    type Sums<S: Simd>: Copy;
    /// Where they begin; `start` is -128 times the sum of the activations.
    fn begin<S: Simd>(start: i32) -> Self::Sums<S>;
    fn dot<S: Simd>(sums: Self::Sums<S>, w: Self::Group<S>, x: [i8; 4]) -> Self::Sums<S>;
    fn end<S: Simd>(sums: Self::Sums<S>, start: i32) -> S::I;
}

struct Eight;
struct Four;
struct FourWithOffset;

#[inline(always)]
fn nibbles<S: Simd>(line: &Line) -> [S::B; 2] {
    let both = S::load_line(line);
    [S::low(both), S::high(both)]
}

impl Form for Eight {
    const PER_PAIR: usize = 2;
    const OFFSET: bool = false;
    type Group<S: Simd> = S::Eight;
    #[inline(always)]
    fn pair<S: Simd>(lines: &[Line]) -> [S::Eight; 2] {
        let [a, b] = [S::load_line(&lines[0]), S::load_line(&lines[1])];
        [S::eight(a), S::eight(b)]
    }
    type Sums<S: Simd> = S::I;
    #[inline(always)]
    fn begin<S: Simd>(start: i32) -> S::I {
        S::splat_i(if S::ABOVE { start } else { 0 })
    }
    #[inline(always)]
    fn dot<S: Simd>(sums: S::I, w: S::Eight, x: [i8; 4]) -> S::I {
        S::dot_eight(sums, w, x)
    }
    #[inline(always)]
    fn end<S: Simd>(sums: S::I, _: i32) -> S::I {
        sums
    }
}

impl Form for Four {
    const PER_PAIR: usize = 1;
    const OFFSET: bool = false;
    type Group<S: Simd> = S::B;
    #[inline(always)]
    fn pair<S: Simd>(lines: &[Line]) -> [S::B; 2] {
        nibbles::<S>(&lines[0])
    }
    type Sums<S: Simd> = S::Small;
    #[inline(always)]
    fn begin<S: Simd>(start: i32) -> S::Small {
        S::begin_small(start >> 4)
    }
    #[inline(always)]
    fn dot<S: Simd>(sums: S::Small, w: S::B, x: [i8; 4]) -> S::Small {
        S::dot_small(sums, w, x)
    }
    #[inline(always)]
    fn end<S: Simd>(sums: S::Small, start: i32) -> S::I {
        S::end_small(sums, start >> 4)
    }
}

impl Form for FourWithOffset {
    const PER_PAIR: usize = 1;
    const OFFSET: bool = true;
    type Group<S: Simd> = S::B;
    #[inline(always)]
    fn pair<S: Simd>(lines: &[Line]) -> [S::B; 2] {
        nibbles::<S>(&lines[0])
    }
    type Sums<S: Simd> = S::Small;
    #[inline(always)]
    fn begin<S: Simd>(_: i32) -> S::Small {
        S::begin_small(0)
    }
    #[inline(always)]
    fn dot<S: Simd>(sums: S::Small, w: S::B, x: [i8; 4]) -> S::Small {
        S::dot_small(sums, w, x)
    }
    #[inline(always)]
    fn end<S: Simd>(sums: S::Small, _: i32) -> S::I {
        S::end_small(sums, 0)
    }
}

#[inline(always)]
fn tile_pairs<S: Simd>(w: &Quant, tile: usize, to: &mut [Line]) {
    let (blocks, lines) = (w.k / BLOCK, w.bits.lines());
    let (bits, mask, bias) = match w.bits {
        Bits::Eight => (8, 255, 128),
        Bits::Four => (4, 15, 8),
        Bits::FourWithOffset => (4, 15, 0),
    };
    for (block, to) in units_mut(to).chunks_exact_mut(BLOCK / 2 * TILE).enumerate() {
        let at = tile * blocks + block;
        let (mut scale, mut offset) = ([0.0; TILE], [0.0; TILE]);
        S::store(S::widen(&w.scales[at]), &mut scale);
        if let Some(offsets) = w.offsets.get(at) {
            S::store(S::widen(offsets), &mut offset);
        }
        let stored = &w.lines[at * lines..(at + 1) * lines];
        // Each group of four values becomes two pairs.
        for (group, to) in to.chunks_exact_mut(2 * TILE).enumerate() {
            let (line, low) = match bits {
                8 => (w.bits.line(group), 0),
                _ => (group % PAIRS, (group / PAIRS * 4) as u32),
            };
            let (bytes, _) = stored[line].0.as_chunks::<4>();
            for (half, to) in to.chunks_exact_mut(TILE).enumerate() {
                let first = low + 16 * half as u32;
                for c in 0..TILE {
                    let four = u32::from_le_bytes(bytes[c]);
                    let value = |shift: u32| {
                        ((four >> shift & mask) as i32 - bias) as f32 * scale[c] + offset[c]
                    };
                    to[c] = pair(value(first), value(first + 8));
                }
            }
        }
    }
}

/// Quantised activations and the weight they are multiplied with.
struct Rows<'a, F> {
    w: &'a Quant,
    x: &'a Activations,
    form: PhantomData<F>,
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` for `M` rows `x`.
pub(super) fn matmul(pool: &Pool, w: &Quant, x: &Activations, out: &SharedOut<'_>) {
    fn of<F: Form>(pool: &Pool, w: &Quant, x: &Activations, out: &SharedOut<'_>) {
        let form = PhantomData::<F>;
        tiles::multiply(pool, &Rows { w, x, form }, w.n.div_ceil(TILE), out);
    }
    match w.bits {
        Bits::Eight => of::<Eight>(pool, w, x, out),
        Bits::Four => of::<Four>(pool, w, x, out),
        Bits::FourWithOffset => of::<FourWithOffset>(pool, w, x, out),
    }
}

impl<F: Form> Product for Rows<'_, F> {
    const ROWS: usize = 10;
    const CHUNK: usize = 256;
    const ALIGN: usize = 1;

    /// A single pass reads weights in one run: two tiles side by side come up to a third slower from memory. Of several
    /// passes an activation is loaded for two tiles, where registers allow.
    #[inline(always)]
    fn wide(rows: usize, passes: usize, limits: Limits) -> usize {
        match passes {
            1 => 1,
            _ if F::OFFSET && rows > 8 => 1,
            _ => limits.wide,
        }
    }

    /// Few rows come to them sooner.
    fn ahead(rows: usize) -> usize {
        let lines = if rows <= 2 { 128 } else { 48 };
        lines / (PAIRS * F::PER_PAIR)
    }

    fn units(&self) -> usize {
        self.w.k / BLOCK
    }

    #[inline(always)]
    fn panel<S: Simd, const R: usize, const T: usize>(&self, part: Part, sums: &mut [[f32; TILE]]) {
        let (w, blocks) = (self.w, self.w.k / BLOCK);
        // A number the compiler does not know: it would lay out all pairs in a row, load every activation first, and run
        // out of registers.
        let pairs = std::hint::black_box(PAIRS);
        let per_block = pairs * F::PER_PAIR;
        let of_tile = |t: usize| {
            let first = (part.tile + t) * blocks;
            first + part.start..first + part.end
        };
        let lines: [&[Line]; T] = std::array::from_fn(|t| {
            let Range { start, end } = of_tile(t);
            &w.lines[start * per_block..end * per_block]
        });
        let scales: [&[[f16; TILE]]; T] = std::array::from_fn(|t| &w.scales[of_tile(t)]);
        let offsets: [&[[f16; TILE]]; T] = std::array::from_fn(|t| match F::OFFSET {
            true => &w.offsets[of_tile(t)],
            false => &[],
        });
        let first = part.at * blocks;
        let packed = first + part.start * R..first + part.end * R;
        let q = self.x.q[packed.clone()].as_chunks::<R>().0;
        let x_scale = self.x.scale[packed.clone()].as_chunks::<R>().0;
        let x_start = self.x.start[packed.clone()].as_chunks::<R>().0;
        let x_total = self.x.total[packed].as_chunks::<R>().0;
        // The products of many rows take longer than the lines need to come, if they were asked for: each pass asks for
        // its share of those that come next.
        let share = per_block.div_ceil(part.passes);
        let mut acc: [[S::V; T]; R] = tiles::begin::<S, R, T>(part.start, sums);
        for (b, x) in q.iter().enumerate() {
            let next = part.ahead + b;
            for t in 0..T {
                S::prefetch(&scales[t][0], next);
                if F::OFFSET {
                    S::prefetch(&offsets[t][0], next);
                }
                for j in 0..share {
                    S::prefetch(&lines[t][0], next * per_block + part.pass * share + j);
                }
            }
            let mut dots = [[F::begin::<S>(0); T]; R];
            for r in 0..R {
                dots[r] = [F::begin::<S>(x_start[b][r]); T];
            }
            for i in 0..pairs {
                let at = b * per_block + i * F::PER_PAIR;
                let mut groups = [F::pair::<S>(&lines[0][at..at + F::PER_PAIR]); T];
                for t in 1..T {
                    groups[t] = F::pair::<S>(&lines[t][at..at + F::PER_PAIR]);
                }
                for (g, group) in [0, PAIRS].into_iter().enumerate() {
                    for r in 0..R {
                        for t in 0..T {
                            // A check tells the compiler how often the loop runs at most, and it lays it out, which
                            // only many registers bear.
                            let x = match S::SUMS > 16 {
                                true => x[r][group + i],
                                // SAFETY: `i` is below `pairs`, which is `PAIRS`: `black_box` gives back what it is given.
                                false => unsafe { *x[r].get_unchecked(group + i) },
                            };
                            dots[r][t] = F::dot::<S>(dots[r][t], groups[t][g], x);
                        }
                    }
                }
            }
            for t in 0..T {
                let scale = S::widen(&scales[t][b]);
                for r in 0..R {
                    let whole = S::to_f32(F::end::<S>(dots[r][t], x_start[b][r]));
                    let scaled = S::mul(whole, S::splat(x_scale[b][r]));
                    acc[r][t] = S::fma(scaled, scale, acc[r][t]);
                    if F::OFFSET {
                        let offset = S::widen(&offsets[t][b]);
                        acc[r][t] = S::fma(S::splat(x_total[b][r]), offset, acc[r][t]);
                    }
                }
            }
        }
        tiles::end::<S, R, T>(acc, sums);
    }
}
