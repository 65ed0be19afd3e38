//! Products of a few rows with 8-bit and 4-bit weights in blocks of 32 (GGUF's Q8_0, Q4_0 and Q4_1).
//!
//! Activations are quantised to 8 bits per block of 32, as llama.cpp does, and multiplied as integers.

use half::f16;

use super::pool::Pool;
use super::simd::{Level, Simd, dispatch};
use super::{Columns, SharedOut};

/// Values a block.
pub(super) const BLOCK: usize = 32;

/// A block of weights: GGUF's bytes with the scale first.
pub(super) trait Block: Copy + Send + Sync {
    /// The weights, ready to be multiplied with several rows.
    type Unpacked<S: Simd>: Copy;
    fn unpack<S: Simd>(&self) -> Self::Unpacked<S>;
    /// `acc + scale * (q . x)`, without the offset.
    fn dot<S: Simd>(q: Self::Unpacked<S>, x: &[i8; BLOCK], scale: f32, acc: S::H) -> S::H;
    /// The scale, and the offset added to every weight of the block.
    fn scale_and_offset<S: Simd>(&self) -> (f32, f32);
    /// Reads one block of little-endian bytes.
    fn read(bytes: &[u8]) -> Self;
    /// Bytes a block takes in a file.
    const BYTES: usize;
    /// The weights.
    fn widen(&self, out: &mut [f32]);
}

/// Q8_0: `w = d q`.
#[derive(Clone, Copy)]
pub(super) struct Q8 {
    d: f16,
    q: [i8; BLOCK],
}

/// Q4_1, and Q4_0 with the offset `-8 d`: `w = d q + m`.
#[derive(Clone, Copy)]
pub(super) struct Q4 {
    d: f16,
    m: f16,
    q: [u8; BLOCK / 2],
}

fn read_f16(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl Block for Q8 {
    const BYTES: usize = 34;
    type Unpacked<S: Simd> = S::Bytes;
    #[inline(always)]
    fn unpack<S: Simd>(&self) -> S::Bytes {
        S::bytes(&self.q)
    }
    #[inline(always)]
    fn dot<S: Simd>(q: S::Bytes, x: &[i8; BLOCK], scale: f32, acc: S::H) -> S::H {
        S::dot_bytes(q, x, scale, acc)
    }
    #[inline(always)]
    fn scale_and_offset<S: Simd>(&self) -> (f32, f32) {
        (S::widen(self.d), 0.0)
    }
    fn read(bytes: &[u8]) -> Self {
        Self {
            d: read_f16(bytes, 0),
            q: std::array::from_fn(|i| bytes[2 + i] as i8),
        }
    }
    fn widen(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (o, &q) in out.iter_mut().zip(&self.q) {
            *o = d * f32::from(q);
        }
    }
}

impl Q8 {
    /// Quantises 32 values: the largest magnitude becomes 127.
    pub(super) fn quantize(x: &[f32]) -> Self {
        let mut q = [0; BLOCK];
        let d = quantize_block(x, &mut q);
        Self {
            d: f16::from_f32(d),
            q,
        }
    }
}

impl Block for Q4 {
    const BYTES: usize = 20;
    type Unpacked<S: Simd> = S::Nibbles;
    #[inline(always)]
    fn unpack<S: Simd>(&self) -> S::Nibbles {
        S::nibbles(&self.q)
    }
    #[inline(always)]
    fn dot<S: Simd>(q: S::Nibbles, x: &[i8; BLOCK], scale: f32, acc: S::H) -> S::H {
        S::dot_nibbles(q, x, scale, acc)
    }
    #[inline(always)]
    fn scale_and_offset<S: Simd>(&self) -> (f32, f32) {
        (S::widen(self.d), S::widen(self.m))
    }
    fn read(bytes: &[u8]) -> Self {
        Self {
            d: read_f16(bytes, 0),
            m: read_f16(bytes, 2),
            q: std::array::from_fn(|i| bytes[4 + i]),
        }
    }
    fn widen(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        for (i, &b) in self.q.iter().enumerate() {
            out[i] = d * f32::from(b & 15) + m;
            out[i + 16] = d * f32::from(b >> 4) + m;
        }
    }
}

impl Q4 {
    /// Reads a Q4_0 block (18 bytes): `w = d (q - 8)`.
    pub(super) fn read_q4_0(bytes: &[u8]) -> Self {
        let d = read_f16(bytes, 0);
        Self {
            d,
            m: f16::from_f32(-8.0 * d.to_f32()),
            q: std::array::from_fn(|i| bytes[2 + i]),
        }
    }
}

/// Rows of activations in blocks of 32: 8-bit values, a scale, and the scaled sum.
#[derive(Default)]
pub(super) struct Activations {
    q: Vec<[i8; BLOCK]>,
    scale: Vec<f32>,
    sum: Vec<f32>,
}

/// Quantises 32 values to `round(x / d)`, `d = max |x| / 127`, and returns `d`. NaN stays NaN in `d`.
fn quantize_block(x: &[f32], q: &mut [i8; BLOCK]) -> f32 {
    let mut largest = 0.0f32;
    let mut poison = 0.0f32;
    for &v in x {
        largest = largest.max(v.abs());
        poison += v * 0.0; // NaN where v is NaN or infinite, else zero
    }
    let d = largest / 127.0 + poison;
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    for (q, &v) in q.iter_mut().zip(x) {
        *q = (v * inverse).round_ties_even() as i8;
    }
    d
}

impl Activations {
    /// Quantises `[M, K]` values.
    pub(super) fn fill(&mut self, x: &[f32]) {
        let blocks = x.len() / BLOCK;
        self.q.resize(blocks, [0; BLOCK]);
        self.scale.resize(blocks, 0.0);
        self.sum.resize(blocks, 0.0);
        let level = Level::detect();
        let (q, scale, sum) = (&mut self.q, &mut self.scale, &mut self.sum);
        dispatch!(level, quantize_rows(x, q, scale, sum): (x: &[f32], q: &mut [[i8; BLOCK]], scale: &mut [f32], sum: &mut [f32]) <>);
    }
}

#[inline(always)]
fn quantize_rows<S: Simd>(x: &[f32], q: &mut [[i8; BLOCK]], scale: &mut [f32], sum: &mut [f32]) {
    for (b, x) in x.chunks_exact(BLOCK).enumerate() {
        scale[b] = quantize_block(x, &mut q[b]);
        let total: i32 = q[b].iter().map(|&v| i32::from(v)).sum();
        sum[b] = scale[b] * total as f32;
    }
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` with `w` in blocks `[N, K / 32]`.
pub(super) fn matmul<W: Block>(
    pool: &Pool,
    w: &[W],
    x: &Activations,
    k: usize,
    out: &SharedOut<'_>,
) {
    let n = out.columns;
    let level = Level::detect();
    pool.ranges(n, super::grain(n, pool), |range| {
        let columns = Columns {
            start: range.start,
            end: range.end,
        };
        dispatch!(level, columns_of(w, x, k, columns, out): (w: &[W], x: &Activations, k: usize, columns: Columns, out: &SharedOut<'_>) <W: Block>);
    });
}

/// All rows of a block of columns; a column's weights are unpacked once for every four rows.
#[inline(always)]
fn columns_of<S: Simd, W: Block>(
    w: &[W],
    x: &Activations,
    k: usize,
    columns: Columns,
    out: &SharedOut<'_>,
) {
    let rows = out.rows;
    for c in columns.start..columns.end {
        let mut r = 0;
        while r < rows {
            if r + 4 <= rows {
                panel::<S, W, 4>(w, x, k / BLOCK, c, r, out);
                r += 4;
            } else {
                panel::<S, W, 1>(w, x, k / BLOCK, c, r, out);
                r += 1;
            }
        }
    }
}

#[inline(always)]
fn panel<S: Simd, W: Block, const R: usize>(
    w: &[W],
    x: &Activations,
    blocks: usize,
    c: usize,
    r: usize,
    out: &SharedOut<'_>,
) {
    let w = &w[c * blocks..(c + 1) * blocks];
    let q: [&[[i8; BLOCK]]; R] =
        std::array::from_fn(|i| &x.q[(r + i) * blocks..(r + i + 1) * blocks]);
    let scale: [&[f32]; R] =
        std::array::from_fn(|i| &x.scale[(r + i) * blocks..(r + i + 1) * blocks]);
    let sum: [&[f32]; R] = std::array::from_fn(|i| &x.sum[(r + i) * blocks..(r + i + 1) * blocks]);
    let mut acc = [S::half_zero(); R];
    let mut offset = [0.0f32; R];
    for (b, w) in w.iter().enumerate() {
        let (d, m) = w.scale_and_offset::<S>();
        let weights = w.unpack::<S>();
        for i in 0..R {
            acc[i] = W::dot::<S>(weights, &q[i][b], d * scale[i][b], acc[i]);
            offset[i] += m * sum[i][b];
        }
    }
    for i in 0..R {
        out.set(r + i, c, S::half_sum(acc[i]) + offset[i]);
    }
}
