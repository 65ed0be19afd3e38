//! A linear layer for few rows, over the weight forms the kernels know.

use std::borrow::Cow;
use std::io::Read;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;

use super::dense::{self, Dense};
use super::product::{ProductForm, Products, Right, View, units_mut};
use super::quant::{self, Activations, BLOCK, Bits, BlockOf, Quant};
use super::simd::Line;
use super::{Pool, SharedOut, TILE};
use crate::model::gguf_types;
use crate::{Error, Result};

/// A weight `[N, K]` in one of the forms the kernels multiply with, sixteen columns of its product side by side.
pub struct Weight {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    form: Form,
}

enum Form {
    F32(Dense<f32>),
    Bf16(Dense<u16>),
    Quant(Quant),
}

/// The value of an element that is held in single precision: f32, or f16.
fn element(dtype: GgmlDType, b: &[u8]) -> f32 {
    match dtype {
        GgmlDType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        _ => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
    }
}

/// Whether all values of whole blocks are finite; of quantised ones, their scales and offsets.
pub(crate) fn is_finite(dtype: GgmlDType, bytes: &[u8]) -> bool {
    /// Whether the units' exponents, looked at through `mask`, are nowhere all ones.
    fn all<const N: usize>(bytes: &[u8], mask: [u8; N]) -> bool {
        let (units, _) = bytes.as_chunks::<N>();
        let bad = |u: &[u8; N]| (0..N).all(|i| u[i] & mask[i] == mask[i]);
        !units.iter().fold(false, |any, u| any | bad(u))
    }
    const HALF: [u8; 2] = [0, 0x7C];
    let halves = |places: &[usize]| {
        let mut blocks = bytes.chunks_exact(dtype.type_size());
        blocks.all(|b| places.iter().all(|&at| all(&b[at..at + 2], HALF)))
    };
    match dtype {
        GgmlDType::F32 => all(bytes, [0, 0, 0x80, 0x7F]),
        GgmlDType::F16 => all(bytes, HALF),
        GgmlDType::BF16 => all(bytes, [0x80, 0x7F]),
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => halves(&[0]),
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => halves(&[0, 2]),
        GgmlDType::Q2K => halves(&[80, 82]),
        GgmlDType::Q3K => halves(&[108]),
        GgmlDType::Q6K => halves(&[208]),
        GgmlDType::Q8_1 | GgmlDType::Q8K => true,
    }
}

impl Weight {
    /// Takes GGUF data that is at hand. The length of `bytes` was checked by the caller.
    pub fn from_gguf(dtype: GgmlDType, bytes: &[u8], n: usize, k: usize) -> Result<Self> {
        let short = |e| Error::Invalid(format!("GGUF data: {e}"));
        Self::read(dtype, n, k, &mut &bytes[..])?.map_err(short)
    }

    /// Reads GGUF data row by row; the inner error is that of the reader. f16 is widened, which is exact; Q4_K keeps
    /// its 4 bits with scales rounded to half precision; Q2_K, Q3_K, Q5_0, Q5_1, Q5_K and Q6_K become Q8_0.
    ///
    /// # Errors
    /// If the type is none of these, a row is no whole number of its blocks, or a value or scale is not finite.
    pub fn read(
        dtype: GgmlDType,
        n: usize,
        k: usize,
        from: &mut dyn Read,
    ) -> Result<std::io::Result<Self>> {
        let form = match dtype {
            GgmlDType::F32 | GgmlDType::F16 => Form::F32(Dense::new(n, k)),
            GgmlDType::BF16 => Form::Bf16(Dense::new(n, k)),
            GgmlDType::Q8_0
            | GgmlDType::Q5_0
            | GgmlDType::Q5_1
            | GgmlDType::Q2K
            | GgmlDType::Q3K
            | GgmlDType::Q5K
            | GgmlDType::Q6K => Form::Quant(Quant::new(Bits::Eight, n, k)),
            GgmlDType::Q4_0 => Form::Quant(Quant::new(Bits::Four, n, k)),
            GgmlDType::Q4_1 | GgmlDType::Q4K => Form::Quant(Quant::new(Bits::FourWithOffset, n, k)),
            other => {
                return Err(Error::Unsupported(format!(
                    "GGUF tensor type {other:?}; supported: {}",
                    gguf_types()
                )));
            }
        };
        if !k.is_multiple_of(dtype.block_size()) {
            return Err(Error::Invalid(format!(
                "rows of {k} values are no whole blocks of {}",
                dtype.block_size()
            )));
        }
        let mut weight = Self { n, k, form };
        let mut row = vec![0; k / dtype.block_size() * dtype.type_size()];
        for r in 0..n {
            if let Err(e) = from.read_exact(&mut row) {
                return Ok(Err(e));
            }
            if !is_finite(dtype, &row) {
                return Err(Error::Invalid(format!("row {r} holds NaN or infinity")));
            }
            weight.set_stored(r, dtype, &row)?;
        }
        Ok(Ok(weight))
    }

    /// Stores a row as a file holds it.
    fn set_stored(&mut self, row: usize, dtype: GgmlDType, bytes: &[u8]) -> Result<()> {
        let size = dtype.type_size();
        let units = bytes.chunks_exact(size);
        match &mut self.form {
            Form::F32(w) => w.set_row(row, units.map(|b| element(dtype, b))),
            Form::Bf16(w) => w.set_row(row, units.map(|b| u16::from_le_bytes([b[0], b[1]]))),
            Form::Quant(w) => match dtype {
                GgmlDType::Q8_0 => units
                    .enumerate()
                    .for_each(|(i, b)| w.set(row, i, &BlockOf::q8_0(b))),
                GgmlDType::Q4_0 => units
                    .enumerate()
                    .for_each(|(i, b)| w.set(row, i, &BlockOf::q4_0(b))),
                GgmlDType::Q4_1 => units
                    .enumerate()
                    .for_each(|(i, b)| w.set(row, i, &BlockOf::q4_1(b))),
                GgmlDType::Q4K => {
                    for (i, b) in units.enumerate() {
                        for (j, block) in BlockOf::q4_k(b).iter().enumerate() {
                            w.set(row, i * 8 + j, block);
                        }
                    }
                }
                _ => {
                    let wide = dtype.from_data(Cow::Borrowed(bytes)).dequantize(self.k)?;
                    let values = wide.as_slice::<f32>()?;
                    for (i, x) in values.chunks_exact(BLOCK).enumerate() {
                        w.set(row, i, &BlockOf::quantize(x));
                    }
                }
            },
        }
        Ok(())
    }

    /// A matrix of `k` columns in single precision.
    ///
    /// # Panics
    /// If the values are no whole rows.
    pub fn f32(values: &[f32], k: usize) -> Self {
        let n = values.len().checked_div(k).unwrap_or(0);
        assert!(n * k == values.len(), "no whole rows of {k} values");
        let mut w = Dense::new(n, k);
        for (row, values) in values.chunks_exact(k.max(1)).enumerate() {
            w.set_row(row, values.iter().copied());
        }
        Self {
            n,
            k,
            form: Form::F32(w),
        }
    }

    /// Brings every row into another form.
    fn reform(&self, mut form: Form) -> Self {
        let mut values = vec![0.0; self.k];
        for row in 0..self.n {
            self.row(row, &mut values);
            match &mut form {
                Form::F32(w) => w.set_row(row, values.iter().copied()),
                Form::Bf16(w) => {
                    let bits = |v: &f32| half::bf16::from_f32(*v).to_bits();
                    w.set_row(row, values.iter().map(bits));
                }
                Form::Quant(w) => {
                    for (i, x) in values.chunks_exact(BLOCK).enumerate() {
                        let block = match w.bits {
                            Bits::Eight => BlockOf::quantize(x),
                            _ => BlockOf::quantize_four(x),
                        };
                        w.set(row, i, &block);
                    }
                }
            }
        }
        Self {
            n: self.n,
            k: self.k,
            form,
        }
    }

    /// The same in single precision.
    pub fn to_wide(&self) -> Self {
        self.reform(Form::F32(Dense::new(self.n, self.k)))
    }

    /// The same rounded to bf16.
    pub fn to_bf16(&self) -> Self {
        self.reform(Form::Bf16(Dense::new(self.n, self.k)))
    }

    /// The same in Q8_0.
    ///
    /// # Errors
    /// If `K` is no multiple of 32.
    pub fn to_q8_0(&self) -> Result<Self> {
        self.quantised(Bits::Eight)
    }

    /// The same in 4 bits with a scale and an offset per 32.
    ///
    /// # Errors
    /// If `K` is no multiple of 32.
    pub fn to_q4(&self) -> Result<Self> {
        self.quantised(Bits::FourWithOffset)
    }

    fn quantised(&self, bits: Bits) -> Result<Self> {
        match self.k.is_multiple_of(BLOCK) {
            true => Ok(self.reform(Form::Quant(Quant::new(bits, self.n, self.k)))),
            false => Err(Error::Invalid(format!(
                "a weight of {} columns is no whole blocks of {BLOCK}",
                self.k
            ))),
        }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::F32(w) => w.bytes(),
            Form::Bf16(w) => w.bytes(),
            Form::Quant(w) => w.bytes(),
        }
    }

    /// The name of the form, as reports print it.
    pub fn form(&self) -> &'static str {
        match &self.form {
            Form::F32(_) => "f32",
            Form::Bf16(_) => "bf16",
            Form::Quant(w) => match w.bits {
                Bits::Eight => "q8_0",
                Bits::Four | Bits::FourWithOffset => "q4",
            },
        }
    }

    /// Writes row `row` of `K` values, widened to f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.n && out.len() == self.k,
            "row outside the weight"
        );
        match &self.form {
            Form::F32(w) => out.iter_mut().zip(w.row(row)).for_each(|(o, w)| *o = w),
            Form::Bf16(w) => {
                let values = w.row(row).map(dense::Element::widen);
                out.iter_mut().zip(values).for_each(|(o, w)| *o = w);
            }
            Form::Quant(w) => w.row(row, out),
        }
    }

    /// The listed rows, in that order and in the same form.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn rows(&self, rows: &[u32]) -> Self {
        let (n, k) = (rows.len(), self.k);
        let inside = rows.iter().all(|&row| (row as usize) < self.n);
        assert!(inside, "a row outside the {} there are", self.n);
        let pairs = rows.iter().map(|&row| row as usize).enumerate();
        let form = match &self.form {
            Form::F32(w) => {
                let mut to = Dense::new(n, k);
                pairs.for_each(|(i, row)| to.set_row(i, w.row(row)));
                Form::F32(to)
            }
            Form::Bf16(w) => {
                let mut to = Dense::new(n, k);
                pairs.for_each(|(i, row)| to.set_row(i, w.row(row)));
                Form::Bf16(to)
            }
            Form::Quant(w) => {
                let mut to = Quant::new(w.bits, n, k);
                for (i, row) in pairs {
                    (0..k / BLOCK).for_each(|b| to.set(i, b, &w.get(row, b)));
                }
                Form::Quant(to)
            }
        };
        Self { n, k, form }
    }

    /// The right side of bf16 products with many rows, where they are faster than this form's own; f32 stays f32.
    fn right(&self, pool: &Pool) -> Option<Right> {
        let shape = (self.n, self.k);
        match &self.form {
            _ if !ProductForm::widens() => None,
            Form::F32(_) => None,
            Form::Quant(w) => Some(Right::of_tiles(pool, shape, |tile, to| {
                w.tile_pairs(tile, to)
            })),
            Form::Bf16(w) => Some(Right::of_tiles(pool, shape, |tile, to| {
                let (lines, rest) = to.split_at_mut(self.k.div_ceil(2));
                let units = units_mut(lines).as_chunks_mut::<TILE>().0;
                for (to, line) in units.iter_mut().zip(w.tile_lines(tile)) {
                    for (to, pair) in to.iter_mut().zip(line.as_chunks::<2>().0) {
                        *to = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                    }
                }
                rest.fill(Line([0; 64]));
            })),
        }
    }

    /// All weights, widened to f32, `[N, K]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n * self.k];
        for (row, out) in out.chunks_exact_mut(self.k.max(1)).enumerate() {
            self.row(row, out);
        }
        out
    }

    /// Appends the rows of `other` when both have the same form and whole tiles; else gives it back.
    fn append(&mut self, other: Self) -> Option<Self> {
        if !self.n.is_multiple_of(TILE) {
            return Some(other);
        }
        let n = other.n;
        match (&mut self.form, other.form) {
            (Form::F32(a), Form::F32(b)) => a.append(b),
            (Form::Bf16(a), Form::Bf16(b)) => a.append(b),
            (Form::Quant(a), Form::Quant(b)) if a.bits == b.bits => a.append(b),
            (_, form) => return Some(Self { form, ..other }),
        }
        self.n += n;
        None
    }
}

/// Buffers a linear layer reuses from call to call.
#[derive(Default)]
pub struct Scratch {
    activations: Activations,
    wide: Vec<f32>,
    pairs: Vec<[u16; 2]>,
    /// A product that is to be added.
    apart: Vec<f32>,
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
    /// A layer over one weight.
    pub fn new(weight: Weight, bias: Option<Vec<f32>>) -> Self {
        Self {
            n: weight.n,
            k: weight.k,
            parts: vec![weight],
            bias,
        }
    }

    /// One layer whose outputs are those of `layers`, one after the other; all take the same input.
    ///
    /// # Errors
    /// If they take inputs of different sizes.
    pub fn join(layers: Vec<Self>) -> Result<Self> {
        let k = layers.first().map_or(0, |l| l.k);
        if let Some(other) = layers.iter().find(|l| l.k != k) {
            return Err(Error::Invalid(format!(
                "layers over {k} and over {} inputs cannot be joined",
                other.k
            )));
        }
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
        Ok(Self {
            parts,
            bias: any_bias.then_some(bias),
            k,
            n,
        })
    }

    /// The same with its weights where they shall stay, in large pages where the system has them: to be called once,
    /// when no layer will be joined to it any more.
    pub fn settled(mut self) -> Self {
        for part in &mut self.parts {
            match &mut part.form {
                Form::F32(w) => w.settle(),
                Form::Bf16(w) => w.settle(),
                Form::Quant(w) => w.settle(),
            }
        }
        self
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

    /// The number of rows, of sizes that fit.
    fn rows(&self, x: &[f32], out: &[f32]) -> Result<usize> {
        let rows = x.len().checked_div(self.k).unwrap_or(0);
        let biased = self.bias.as_ref().map_or(self.n, Vec::len);
        match x.len() == rows * self.k && out.len() == rows * self.n && biased == self.n {
            true => Ok(rows),
            false => Err(Error::Invalid(format!(
                "{} values in and {} out, with {biased} biases, for a layer from {} to {}",
                x.len(),
                out.len(),
                self.k,
                self.n
            ))),
        }
    }

    /// Writes `[M, N]` to `out` for `x` `[M, K]`.
    ///
    /// # Errors
    /// If the lengths do not fit the layer.
    pub fn forward(
        &self,
        pool: &Pool,
        x: &[f32],
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<()> {
        self.rows(x, out)?;
        let any = |of: fn(&Form) -> bool| self.parts.iter().any(|p| of(&p.form));
        if any(|f| matches!(f, Form::Quant(_))) {
            scratch.activations.fill(pool, x, self.k);
        }
        if any(|f| matches!(f, Form::F32(_))) {
            dense::pack::<f32>(pool, x, self.k, &mut scratch.wide);
        }
        if any(|f| matches!(f, Form::Bf16(_))) {
            dense::pack::<u16>(pool, x, self.k, &mut scratch.pairs);
        }
        let mut first = 0;
        for part in &self.parts {
            let out = SharedOut::new(out, self.n, first, part.n);
            match &part.form {
                Form::F32(w) => dense::matmul(pool, w, &scratch.wide, &out),
                Form::Bf16(w) => dense::matmul(pool, w, &scratch.pairs, &out),
                Form::Quant(w) => quant::matmul(pool, w, &scratch.activations, &out),
            }
            first += part.n;
        }
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(self.n) {
                super::add(row, bias);
            }
        }
        Ok(())
    }
}

/// A linear layer for many rows, hundreds at least: its weights are widened to bf16 for as long as this lives, where the
/// processor multiplies that faster. So rows round otherwise than in [`Linear::forward`]; how many there are still does not
/// matter.
pub struct Wide<'a> {
    linear: &'a Linear,
    /// Of all parts, or none.
    sides: Vec<Right>,
}

impl<'a> Wide<'a> {
    /// Widens the weights.
    pub fn new(linear: &'a Linear, pool: &Pool) -> Self {
        let sides: Option<_> = linear.parts.iter().map(|w| w.right(pool)).collect();
        Self {
            linear,
            sides: sides.unwrap_or_default(),
        }
    }

    /// `out = x W^T + b`, added to what is there where `add`: `x` `[M, K]`, `out` `[M, N]`.
    ///
    /// # Errors
    /// If the sizes do not fit.
    pub fn multiply(
        &self,
        pool: &Arc<Pool>,
        x: &[f32],
        add: bool,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<()> {
        let (n, k) = (self.linear.n, self.linear.k);
        if self.sides.is_empty() {
            if !add {
                return self.linear.forward(pool, x, scratch, out);
            }
            let mut apart = std::mem::take(&mut scratch.apart);
            apart.resize(out.len(), 0.0);
            self.linear.forward(pool, x, scratch, &mut apart)?;
            pool.rows([out], [n], 64, |rows, [out]| {
                super::add(out, &apart[rows.start * n..rows.end * n]);
            });
            scratch.apart = apart;
            return Ok(());
        }
        let m = self.linear.rows(x, out)?;
        if m == 0 {
            return Ok(());
        }
        let products = Products {
            pool: Arc::clone(pool),
            form: ProductForm::Bf16,
        };
        let mut first = 0;
        for side in &self.sides {
            let left = View::new(x, m, k);
            products.multiply_packed(left, side, add, &mut out[first..], n);
            first += side.shape().1;
        }
        if let Some(bias) = &self.linear.bias {
            pool.rows([out], [n], 64, |_, [rows]| {
                rows.chunks_exact_mut(n)
                    .for_each(|row| super::add(row, bias));
            });
        }
        Ok(())
    }
}

impl Drop for Wide<'_> {
    fn drop(&mut self) {
        self.sides.drain(..).for_each(Right::recycle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};
    use proptest::prelude::*;
    use std::ops::Range;

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

    /// Rounding to bf16 changes an activation by at most this part of it.
    const BF16: f64 = 1.0 / 256.0;

    /// Every form of the same values, with the share of `sum |w x|` that rounding activations may cost.
    fn forms(w: &[f32], k: usize) -> Vec<(Weight, f64)> {
        let wide = Weight::f32(w, k);
        let n = w.len() / k;
        let gguf = |dtype, bytes: &[u8]| Weight::from_gguf(dtype, bytes, n, k).expect("gguf");
        vec![
            (wide.to_bf16(), BF16),
            (wide.to_q8_0().expect("blocks"), 8e-3),
            (wide.to_q4().expect("blocks"), 8e-3),
            (gguf(GgmlDType::Q4_1, &q4_1(w)), 8e-3),
            (gguf(GgmlDType::Q4_0, &q4_0(w)), 8e-3),
            (wide, 1e-6),
        ]
    }

    /// Quantises to GGUF's Q4_0 bytes.
    fn q4_0(values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for block in values.chunks_exact(32) {
            let d = block.iter().fold(0.0f32, |a, v| a.max(v.abs())) / 7.0;
            bytes.extend(half::f16::from_f32(d).to_le_bytes());
            let q = |v: f32| ((v / d).round() + 8.0).clamp(0.0, 15.0) as u8;
            bytes.extend((0..16).map(|i| q(block[i]) | q(block[i + 16]) << 4));
        }
        bytes
    }

    /// Fewer and smaller where every step is checked.
    const CASES: u32 = if cfg!(miri) { 1 } else { 24 };
    const MOST: [usize; 3] = if cfg!(miri) { [6, 20, 3] } else { [40, 70, 8] };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(CASES))]
        #[test]
        fn products_agree_with_f64_and_rows_do_not_depend_on_their_company(
            m in 1..MOST[0], n in 1..MOST[1], blocks in 1..MOST[2], seed in 0u64..1000,
        ) {
            let k = blocks * 32;
            let (w, x) = (values(n * k, seed), values(m * k, seed + 1));
            for (weight, tolerance) in forms(&w, k) {
                let exact = weight.to_f32();
                let linear = Linear::new(weight, None);
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
        fn odd_widths_are_summed_whole(m in 1..MOST[0], n in 1..MOST[1], k in 1..40 * MOST[2], seed in 0u64..100) {
            let (w, x) = (values(n * k, seed), values(m * k, seed + 7));
            for (weight, tolerance) in [(Weight::f32(&w, k), 1e-6), (Weight::f32(&w, k).to_bf16(), BF16)] {
                let exact = weight.to_f32();
                let linear = Linear::new(weight, None);
                let out = forward(&linear, &x, 2);
                for r in 0..m {
                    let row = &x[r * k..(r + 1) * k];
                    for c in 0..n {
                        let expected: f64 = (0..k).map(|i| f64::from(exact[c * k + i]) * f64::from(row[i])).sum();
                        let scale: f64 = (0..k).map(|i| f64::from(exact[c * k + i] * row[i]).abs()).sum();
                        prop_assert!((f64::from(out[r * n + c]) - expected).abs() <= tolerance * scale + 1e-7);
                    }
                    prop_assert_eq!(&out[r * n..(r + 1) * n], &forward(&linear, row, 1)[..]);
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too large to interpret")]
    fn the_shapes_of_real_models_and_their_edges_agree_with_f64() {
        for (m, n, k) in [
            (1, 1, 1),
            (7, 7, 7),
            (3, 896, 576),
            (5, 576, 896),
            (2, 49152, 32),
            (33, 17, 896),
        ] {
            let (w, x) = (values(n * k, 1), values(m * k, 2));
            let wide = Weight::f32(&w, k);
            let whole = k % 32 == 0;
            let mut all = vec![(wide.to_bf16(), BF16), (Weight::f32(&w, k), 1e-6)];
            if whole {
                all.extend([
                    (wide.to_q8_0().expect("blocks"), 8e-3),
                    (wide.to_q4().expect("blocks"), 8e-3),
                ]);
            }
            for (weight, tolerance) in all {
                let (exact, form) = (weight.to_f32(), weight.form());
                let out = forward(&Linear::new(weight, None), &x, 2);
                for (r, c) in (0..m).flat_map(|r| [0, n / 2, n - 1].map(|c| (r, c))) {
                    let pairs = exact[c * k..(c + 1) * k].iter().zip(&x[r * k..(r + 1) * k]);
                    let products = pairs.map(|(&w, &x)| f64::from(w) * f64::from(x));
                    let scale: f64 = products.clone().map(f64::abs).sum();
                    let off = (f64::from(out[r * n + c]) - products.sum::<f64>()).abs();
                    assert!(
                        off <= tolerance * scale + 1e-7,
                        "{form} {m} x {n} x {k}: off by {off}"
                    );
                }
            }
        }
        // No rows, and denormals.
        let linear = Linear::new(Weight::f32(&[1e-40; 64], 32).to_bf16(), None);
        assert!(forward(&linear, &[], 2).is_empty());
        assert!(
            forward(&linear, &[1e-39; 32], 1)
                .iter()
                .all(|v| v.abs() < 1e-30)
        );
    }

    /// Products with widened weights are those of both sides rounded to bf16, to what sums of f32 cost; where nothing is
    /// widened they are those of few rows.
    #[test]
    fn many_rows_meet_weights_rounded_to_bf16() {
        let pool = Arc::new(Pool::new(2));
        let (m, n, k) = if cfg!(miri) {
            (3, 18, 32)
        } else {
            (70, 75, 96)
        };
        let (w, x, bias) = (values(n * k, 1), values(m * k, 2), values(n, 3));
        let begun = values(m * n, 4);
        let round = |v: f32| half::bf16::from_f32(v).to_f64();
        for (weight, _) in forms(&w, k) {
            let (exact, form) = (weight.to_f32(), weight.form());
            let linear = Linear::new(weight, Some(bias.clone()));
            let wide = Wide::new(&linear, &pool);
            assert_eq!(
                wide.sides.is_empty(),
                !ProductForm::widens() || form == "f32"
            );
            for add in [false, true] {
                let run = |rows: Range<usize>| {
                    let mut out = begun[rows.start * n..rows.end * n].to_vec();
                    let x = &x[rows.start * k..rows.end * k];
                    wide.multiply(&pool, x, add, &mut Scratch::default(), &mut out)
                        .expect("multiply");
                    out
                };
                let out = run(0..m);
                assert_eq!(
                    out[2 * n..3 * n],
                    run(2..3),
                    "{form}: rows depend on their company"
                );
                if wide.sides.is_empty() {
                    let few = forward(&linear, &x, 2);
                    let first = |at: usize| if add { begun[at] } else { 0.0 };
                    let expected: Vec<f32> = (0..m * n).map(|at| first(at) + few[at]).collect();
                    assert_eq!(out, expected, "{form}");
                    continue;
                }
                for (at, &found) in out.iter().enumerate() {
                    let (r, c) = (at / n, at % n);
                    let of = |i| round(exact[c * k + i]) * round(x[r * k + i]);
                    let first = if add { f64::from(begun[at]) } else { 0.0 };
                    let rest = first + f64::from(bias[c]);
                    let sum = (0..k).map(of).sum::<f64>() + rest;
                    let size = (0..k).map(|i| of(i).abs()).sum::<f64>();
                    let size = size + first.abs() + f64::from(bias[c]).abs();
                    let room = size * (k + 3) as f64 * f64::from(f32::EPSILON);
                    let off = (f64::from(found) - sum).abs();
                    assert!(off <= room, "{form} [{r}, {c}]: off by {off}");
                }
            }
        }
    }

    /// Q4_K keeps its 4 bits; Q5_K and Q6_K are rounded to 8.
    #[test]
    #[cfg_attr(miri, ignore = "candle quantises with instructions Miri does not know")]
    fn super_blocks_are_laid_out_anew_within_their_rounding() {
        let (n, k) = (5, 512);
        let w = values(n * k, 9);
        let tensor = Tensor::from_vec(w, (n, k), &Device::Cpu).expect("tensor");
        for (dtype, bound) in [
            (GgmlDType::Q4K, 2e-3),
            (GgmlDType::Q5K, 8e-3),
            (GgmlDType::Q6K, 8e-3),
            (GgmlDType::Q5_0, 8e-3),
            (GgmlDType::Q5_1, 8e-3),
            (GgmlDType::Q3K, 8e-3),
            (GgmlDType::Q2K, 8e-3),
        ] {
            let stored = QTensor::quantize(&tensor, dtype).expect("quantise");
            let expected = stored.dequantize(&Device::Cpu).expect("widen");
            let expected = expected
                .flatten_all()
                .and_then(|t| t.to_vec1::<f32>())
                .expect("values");
            let bytes = stored.data().expect("bytes");
            let found = Weight::from_gguf(dtype, &bytes, n, k)
                .expect("read")
                .to_f32();
            let off = found
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(off < bound, "{dtype:?}: off by {off}");
        }
    }

    #[test]
    fn joined_layers_give_the_outputs_side_by_side() {
        let k = 64;
        let x = values(3 * k, 5);
        // The first is whole tiles, so the second may stand behind it in one weight.
        let sizes = [16, 3, 4];
        let parts = [0, 1, 2].map(|i| values(sizes[i] * k, i as u64));
        let layer = |i: usize, f: fn(Weight) -> Weight| {
            let bias = (i == 1).then(|| vec![0.5; sizes[i]]);
            Linear::new(f(Weight::f32(&parts[i], k)), bias)
        };
        let f32w: fn(Weight) -> Weight = |w| w;
        let q8: fn(Weight) -> Weight = |w| w.to_q8_0().expect("blocks");
        let joined =
            Linear::join(vec![layer(0, f32w), layer(1, f32w), layer(2, q8)]).expect("joins");
        assert_eq!(joined.weights().len(), 2);
        let out = forward(&joined, &x, 1);
        let separate = [
            forward(&layer(0, f32w), &x, 1),
            forward(&layer(1, f32w), &x, 1),
            forward(&layer(2, q8), &x, 1),
        ];
        for r in 0..3 {
            let part = |i: usize| &separate[i][r * sizes[i]..(r + 1) * sizes[i]];
            assert_eq!(
                out[r * 23..(r + 1) * 23],
                [part(0), part(1), part(2)].concat()
            );
        }
    }

    #[test]
    fn nan_and_infinity_reach_the_output() {
        let k = 64;
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = values(k, 3);
            x[40] = bad;
            for (weight, _) in forms(&values(2 * k, 4), k) {
                assert!(!forward(&Linear::new(weight, None), &x, 1)[0].is_finite());
            }
        }
    }

    #[test]
    fn an_unknown_form_is_refused_with_the_known_ones() {
        let error = Weight::from_gguf(GgmlDType::Q8_1, &[], 1, 256)
            .err()
            .expect("refused")
            .to_string();
        assert!(error.contains("Q8_1") && error.contains("Q4_1"), "{error}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "candle quantises with instructions Miri does not know")]
    fn values_and_scales_that_are_not_finite_are_refused_in_every_form() {
        let (n, k) = (3, 256);
        let tensor = Tensor::from_vec(values(n * k, 9), (n, k), &Device::Cpu).expect("tensor");
        for dtype in [
            GgmlDType::F32,
            GgmlDType::F16,
            GgmlDType::BF16,
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ] {
            let stored = QTensor::quantize(&tensor, dtype).expect("quantise");
            let bytes = stored.data().expect("bytes").into_owned();
            assert!(Weight::from_gguf(dtype, &bytes, n, k).is_ok(), "{dtype:?}");
            let widened = |bytes: &[u8]| {
                let wide = dtype
                    .from_data(Cow::Owned(bytes.to_vec()))
                    .dequantize(n * k);
                let wide = wide.expect("widens");
                let all = wide.as_slice::<f32>().expect("values");
                all.iter().all(|v| v.is_finite())
            };
            // Whatever byte is set to an exponent of ones: refused exactly where a value is not finite.
            for at in 0..bytes.len() {
                let mut broken = bytes.clone();
                broken[at] = 0x7F;
                if at > 0 {
                    broken[at - 1] |= 0x80;
                }
                let (taken, finite) = (
                    Weight::from_gguf(dtype, &broken, n, k).is_ok(),
                    widened(&broken),
                );
                // A scale that is infinite beside quants of zero gives NaN; there is no block without others.
                assert_eq!(taken, finite, "{dtype:?} at {at}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_in_release_builds_too() {
        let narrow = Weight::f32(&values(2 * 40, 1), 40);
        assert!(narrow.to_q8_0().is_err() && narrow.to_q4().is_err());
        let layer = |k: usize| Linear::new(Weight::f32(&values(2 * k, 1), k), None);
        assert!(Linear::join(vec![layer(40), layer(64)]).is_err());
        let (pool, mut scratch) = (Pool::new(1), Scratch::default());
        for (x, out) in [(39, 2), (40, 3), (80, 2), (41, 2)] {
            let (x, mut out) = (vec![0.0; x], vec![0.0; out]);
            assert!(
                layer(40)
                    .forward(&pool, &x, &mut scratch, &mut out)
                    .is_err()
            );
        }
    }
}
