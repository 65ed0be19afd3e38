//! A linear layer for few rows, over the weight forms the kernels know.

use std::borrow::Cow;
use std::io::Read;

use candle_core::quantized::{GgmlDType, QuantizedType};

use super::blocks::{self, Activations, BLOCK, Block, Q4, Q8};
use super::{Pool, SharedOut, dense};
use crate::{Error, Result};

/// A weight `[N, K]` in one of the forms the kernels multiply with.
pub enum Weight {
    /// Single precision.
    F32(Vec<f32>),
    /// bf16 bits.
    Bf16(Vec<u16>),
    /// GGUF blocks, multiplied as integers.
    Blocks(Blocks),
    /// GGUF super-blocks (Q4_K, Q5_K, Q6_K and others), multiplied by candle, on candle's own threads.
    Candle(Box<dyn QuantizedType>),
}

/// Weights in blocks of 32.
pub struct Blocks(Form);

enum Form {
    Q8(Vec<Q8>),
    Q4(Vec<Q4>),
}

/// Reads `bytes` bytes in units of `size`, a piece at a time.
fn units<T>(
    from: &mut dyn Read,
    bytes: usize,
    size: usize,
    unit: impl Fn(&[u8]) -> T,
) -> std::io::Result<Vec<T>> {
    let mut out = Vec::with_capacity(bytes / size);
    let mut piece = vec![0; (64 << 10) / size * size];
    let mut left = bytes / size * size;
    while left > 0 {
        let n = left.min(piece.len());
        from.read_exact(&mut piece[..n])?;
        out.extend(piece[..n].chunks_exact(size).map(&unit));
        left -= n;
    }
    Ok(out)
}

impl Weight {
    /// Takes GGUF data that is at hand. The length of `bytes` was checked by the caller.
    pub fn from_gguf(dtype: GgmlDType, bytes: &[u8]) -> Result<Self> {
        let short = |e| Error::Invalid(format!("GGUF data: {e}"));
        Self::read(dtype, bytes.len(), &mut &bytes[..])?.map_err(short)
    }

    /// Reads `bytes` bytes of GGUF data; the inner error is that of the reader.
    pub fn read(
        dtype: GgmlDType,
        bytes: usize,
        from: &mut dyn Read,
    ) -> Result<std::io::Result<Self>> {
        let q8 = |w| Self::Blocks(Blocks(Form::Q8(w)));
        let q4 = |w| Self::Blocks(Blocks(Form::Q4(w)));
        Ok(match dtype {
            GgmlDType::F32 => {
                let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                units(from, bytes, 4, value).map(Self::F32)
            }
            // Widening is exact; a kernel for f16 would only save bandwidth.
            GgmlDType::F16 => {
                let value = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32();
                units(from, bytes, 2, value).map(Self::F32)
            }
            GgmlDType::BF16 => {
                let value = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
                units(from, bytes, 2, value).map(Self::Bf16)
            }
            GgmlDType::Q8_0 => units(from, bytes, Q8::BYTES, Q8::read).map(q8),
            GgmlDType::Q4_1 => units(from, bytes, Q4::BYTES, Q4::read).map(q4),
            GgmlDType::Q4_0 => units(from, bytes, 18, Q4::read_q4_0).map(q4),
            GgmlDType::Q4K | GgmlDType::Q5K | GgmlDType::Q6K => {
                let mut whole = vec![0; bytes];
                from.read_exact(&mut whole)
                    .map(|()| Self::Candle(dtype.from_data(Cow::Owned(whole))))
            }
            other => {
                return Err(Error::Unsupported(format!(
                    "GGUF tensor type {other:?}; supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K"
                )));
            }
        })
    }

    /// Quantises to Q8_0; `K` must be a multiple of 32.
    pub fn quantize_q8_0(values: &[f32]) -> Self {
        Self::Blocks(Blocks(Form::Q8(
            values.chunks_exact(BLOCK).map(Q8::quantize).collect(),
        )))
    }

    /// The same matrix of `k` columns (a multiple of 32) in Q8_0, row by row.
    pub fn requantize_q8_0(&self, k: usize) -> Result<Self> {
        let mut blocks = Vec::with_capacity(self.count() / BLOCK);
        let mut values = vec![0.0; k];
        for row in 0..self.count() / k {
            self.row(row, k, &mut values)?;
            blocks.extend(values.chunks_exact(BLOCK).map(Q8::quantize));
        }
        Ok(Self::Blocks(Blocks(Form::Q8(blocks))))
    }

    /// Number of weights held.
    pub fn count(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) => w.len(),
            Self::Blocks(Blocks(Form::Q8(w))) => w.len() * BLOCK,
            Self::Blocks(Blocks(Form::Q4(w))) => w.len() * BLOCK,
            Self::Candle(w) => w.storage_size_in_bytes() / w.dtype().type_size() * w.block_size(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(w) => size_of_val(&w[..]),
            Self::Bf16(w) => size_of_val(&w[..]),
            Self::Blocks(Blocks(Form::Q8(w))) => size_of_val(&w[..]),
            Self::Blocks(Blocks(Form::Q4(w))) => size_of_val(&w[..]),
            Self::Candle(w) => w.storage_size_in_bytes(),
        }
    }

    /// The name of the form, as reports print it.
    pub fn form(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::Bf16(_) => "bf16",
            Self::Blocks(Blocks(Form::Q8(_))) => "q8_0",
            Self::Blocks(Blocks(Form::Q4(_))) => "q4",
            Self::Candle(w) => match w.dtype() {
                GgmlDType::Q4K => "q4_k",
                GgmlDType::Q5K => "q5_k",
                _ => "q6_k",
            },
        }
    }

    /// Writes row `row` of `k` values, widened to f32.
    pub fn row(&self, row: usize, k: usize, out: &mut [f32]) -> Result<()> {
        fn widen<B: Block>(blocks: &[B], out: &mut [f32]) {
            for (b, out) in blocks.iter().zip(out.chunks_exact_mut(BLOCK)) {
                b.widen(out);
            }
        }
        let at = row * k..(row + 1) * k;
        let blocks = row * (k / BLOCK)..(row + 1) * (k / BLOCK);
        match self {
            Self::F32(w) => out.copy_from_slice(&w[at]),
            Self::Bf16(w) => {
                for (o, &w) in out.iter_mut().zip(&w[at]) {
                    *o = f32::from_bits(u32::from(w) << 16);
                }
            }
            Self::Blocks(Blocks(Form::Q8(w))) => widen(&w[blocks], out),
            Self::Blocks(Blocks(Form::Q4(w))) => widen(&w[blocks], out),
            Self::Candle(w) => {
                let rows = self.count() / k;
                let values = w.embedding(&[row as u32], rows, k)?;
                out.copy_from_slice(values.as_slice::<f32>()?);
            }
        }
        Ok(())
    }

    /// The listed rows of `k` values, in that order and, where a row is whole blocks of a form that can be cut, in
    /// the same form; other forms are requantised to Q8_0 or widened.
    pub fn rows(&self, rows: &[u32], k: usize) -> Result<Self> {
        fn pick<T: Clone>(from: &[T], rows: &[u32], per_row: usize) -> Vec<T> {
            let row = |&r: &u32| &from[r as usize * per_row..(r as usize + 1) * per_row];
            rows.iter().flat_map(row).cloned().collect()
        }
        Ok(match self {
            Self::F32(w) => Self::F32(pick(w, rows, k)),
            Self::Bf16(w) => Self::Bf16(pick(w, rows, k)),
            Self::Blocks(Blocks(Form::Q8(w))) => {
                Self::Blocks(Blocks(Form::Q8(pick(w, rows, k / BLOCK))))
            }
            Self::Blocks(Blocks(Form::Q4(w))) => {
                Self::Blocks(Blocks(Form::Q4(pick(w, rows, k / BLOCK))))
            }
            Self::Candle(_) => {
                let mut values = vec![0.0; rows.len() * k];
                for (&row, out) in rows.iter().zip(values.chunks_exact_mut(k)) {
                    self.row(row as usize, k, out)?;
                }
                match k.is_multiple_of(BLOCK) {
                    true => Self::quantize_q8_0(&values),
                    false => Self::F32(values),
                }
            }
        })
    }

    /// All weights, widened to f32, `[N, K]`.
    pub fn to_f32(&self, k: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.count()];
        for (row, out) in out.chunks_exact_mut(k).enumerate() {
            self.row(row, k, out)?;
        }
        Ok(out)
    }

    /// Appends the rows of `other` when both have the same form; else gives it back.
    fn append(&mut self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::F32(a), Self::F32(b)) => a.extend(b),
            (Self::Bf16(a), Self::Bf16(b)) => a.extend(b),
            (Self::Blocks(Blocks(Form::Q8(a))), Self::Blocks(Blocks(Form::Q8(b)))) => a.extend(b),
            (Self::Blocks(Blocks(Form::Q4(a))), Self::Blocks(Blocks(Form::Q4(b)))) => a.extend(b),
            (_, other) => return Some(other),
        }
        None
    }
}

/// Buffers a linear layer reuses from call to call.
#[derive(Default)]
pub struct Scratch {
    activations: Activations,
    columns: Vec<f32>,
}

/// `y = x W^T + b` with `W` `[N, K]`. Several weights over the same input may stand behind one another.
pub struct Linear {
    parts: Vec<Weight>,
    bias: Option<Vec<f32>>,
    /// Input features.
    pub k: usize,
    /// Output features.
    pub n: usize,
}

impl Linear {
    /// A layer over one weight of `k` columns.
    pub fn new(weight: Weight, k: usize, bias: Option<Vec<f32>>) -> Self {
        let n = weight.count().checked_div(k).unwrap_or(0);
        Self {
            parts: vec![weight],
            bias,
            k,
            n,
        }
    }

    /// One layer whose outputs are those of `layers`, one after the other; all take the same input.
    pub fn join(layers: Vec<Self>) -> Self {
        let k = layers.first().map_or(0, |l| l.k);
        let n = layers.iter().map(|l| l.n).sum();
        let any_bias = layers.iter().any(|l| l.bias.is_some());
        let mut bias = Vec::new();
        let mut parts: Vec<Weight> = Vec::new();
        for layer in layers {
            match layer.bias {
                Some(b) => bias.extend(b),
                None => bias.resize(bias.len() + layer.n, 0.0),
            }
            for part in layer.parts {
                let rest = match parts.last_mut() {
                    Some(last) => last.append(part),
                    None => Some(part),
                };
                parts.extend(rest);
            }
        }
        Self {
            parts,
            bias: any_bias.then_some(bias),
            k,
            n,
        }
    }

    /// Bytes of weights and biases held.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Weight::bytes).sum::<usize>()
            + self.bias.as_ref().map_or(0, |b| size_of_val(&b[..]))
    }

    /// The weights in order, each `[n_i, K]`.
    pub fn weights(&self) -> &[Weight] {
        &self.parts
    }

    /// Writes `[M, N]` to `out` for `x` `[M, K]`.
    pub fn forward(
        &self,
        pool: &Pool,
        x: &[f32],
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<()> {
        debug_assert_eq!(x.len() / self.k, out.len() / self.n);
        if self.parts.iter().any(|p| matches!(p, Weight::Blocks(_))) {
            scratch.activations.fill(x);
        }
        let mut first = 0;
        for part in &self.parts {
            let n = part.count() / self.k;
            match part {
                Weight::F32(w) => {
                    dense::matmul(pool, w, x, self.k, &SharedOut::new(out, self.n, first, n));
                }
                Weight::Bf16(w) => {
                    dense::matmul(pool, w, x, self.k, &SharedOut::new(out, self.n, first, n));
                }
                Weight::Blocks(Blocks(form)) => {
                    let out = SharedOut::new(out, self.n, first, n);
                    match form {
                        Form::Q8(w) => blocks::matmul(pool, w, &scratch.activations, self.k, &out),
                        Form::Q4(w) => blocks::matmul(pool, w, &scratch.activations, self.k, &out),
                    }
                }
                Weight::Candle(w) => {
                    let m = x.len() / self.k;
                    scratch.columns.resize(m * n, 0.0);
                    w.matmul_t((m, self.k, n), x, &mut scratch.columns)?;
                    for (row, from) in scratch.columns.chunks_exact(n).enumerate() {
                        out[row * self.n + first..][..n].copy_from_slice(from);
                    }
                }
            }
            first += n;
        }
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(self.n) {
                super::add(row, bias);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..n)
            .map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
            })
            .collect()
    }

    fn forward(linear: &Linear, x: &[f32], threads: usize) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / linear.k * linear.n];
        let pool = Pool::new(threads);
        linear
            .forward(&pool, x, &mut Scratch::default(), &mut out)
            .expect("forward");
        out
    }

    /// Quantises to GGUF's Q4_1 bytes.
    fn q4_1(values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for block in values.chunks_exact(32) {
            let low = block.iter().copied().fold(f32::INFINITY, f32::min);
            let high = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let d = (high - low) / 15.0;
            bytes.extend(half::f16::from_f32(d).to_le_bytes());
            bytes.extend(half::f16::from_f32(low).to_le_bytes());
            let q = |v: f32| ((v - low) / d).round().clamp(0.0, 15.0) as u8;
            bytes.extend((0..16).map(|i| q(block[i]) | q(block[i + 16]) << 4));
        }
        bytes
    }

    fn forms(w: &[f32]) -> Vec<(Weight, f64)> {
        let bf16 = w
            .iter()
            .map(|v| half::bf16::from_f32(*v).to_bits())
            .collect();
        vec![
            (Weight::F32(w.to_vec()), 1e-6),
            (Weight::Bf16(bf16), 1e-6),
            (Weight::quantize_q8_0(w), 8e-3),
            (
                Weight::from_gguf(GgmlDType::Q4_1, &q4_1(w)).expect("q4_1"),
                8e-3,
            ),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn products_agree_with_f64_and_rows_do_not_depend_on_their_company(
            m in 1usize..10, n in 1usize..40, blocks in 1usize..8, seed in 0u64..1000,
        ) {
            let k = blocks * 32;
            let (w, x) = (values(n * k, seed), values(m * k, seed + 1));
            for (weight, tolerance) in forms(&w) {
                let exact = weight.to_f32(k).expect("widen");
                let linear = Linear::new(weight, k, None);
                let out = forward(&linear, &x, 2);
                for r in 0..m {
                    let row = &x[r * k..(r + 1) * k];
                    for c in 0..n {
                        let expected: f64 = (0..k).map(|i| f64::from(exact[c * k + i]) * f64::from(row[i])).sum();
                        let scale: f64 = (0..k).map(|i| f64::from(exact[c * k + i] * row[i]).abs()).sum();
                        let found = f64::from(out[r * n + c]);
                        prop_assert!((found - expected).abs() <= tolerance * scale + 1e-7,
                            "{}: {found} for {expected}", linear.weights()[0].form());
                    }
                    prop_assert_eq!(&out[r * n..(r + 1) * n], &forward(&linear, row, 1)[..]);
                }
            }
        }

        #[test]
        fn odd_widths_are_summed_whole(m in 1usize..6, n in 1usize..9, k in 1usize..70, seed in 0u64..100) {
            let (w, x) = (values(n * k, seed), values(m * k, seed + 7));
            let out = forward(&Linear::new(Weight::F32(w.clone()), k, None), &x, 1);
            for r in 0..m {
                for c in 0..n {
                    let expected: f64 = (0..k).map(|i| f64::from(w[c * k + i]) * f64::from(x[r * k + i])).sum();
                    prop_assert!((f64::from(out[r * n + c]) - expected).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn joined_layers_give_the_outputs_side_by_side() {
        let k = 64;
        let x = values(3 * k, 5);
        let parts: Vec<Vec<f32>> = (0..3).map(|i| values((i + 2) * k, i as u64)).collect();
        let layer = |i: usize, f: fn(&[f32]) -> Weight| {
            let bias = (i == 1).then(|| vec![0.5; i + 2]);
            Linear::new(f(&parts[i]), k, bias)
        };
        let f32w: fn(&[f32]) -> Weight = |w| Weight::F32(w.to_vec());
        let joined = Linear::join(vec![
            layer(0, f32w),
            layer(1, f32w),
            layer(2, Weight::quantize_q8_0),
        ]);
        assert_eq!(joined.weights().len(), 2);
        let out = forward(&joined, &x, 1);
        let separate = [
            forward(&layer(0, f32w), &x, 1),
            forward(&layer(1, f32w), &x, 1),
            forward(&layer(2, Weight::quantize_q8_0), &x, 1),
        ];
        for r in 0..3 {
            let expected: Vec<f32> = (0..3)
                .flat_map(|i| separate[i][r * (i + 2)..(r + 1) * (i + 2)].to_vec())
                .collect();
            assert_eq!(out[r * 9..(r + 1) * 9], expected);
        }
    }

    #[test]
    fn nan_and_infinity_reach_the_output() {
        let k = 64;
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = values(k, 3);
            x[40] = bad;
            for (weight, _) in forms(&values(2 * k, 4)) {
                assert!(!forward(&Linear::new(weight, k, None), &x, 1)[0].is_finite());
            }
        }
    }

    #[test]
    fn an_unknown_form_is_refused_with_the_known_ones() {
        let error = Weight::from_gguf(GgmlDType::Q2K, &[])
            .err()
            .expect("refused")
            .to_string();
        assert!(error.contains("Q2K") && error.contains("Q4_1"), "{error}");
    }
}
