//! The executor on candle's tensors: GPUs, and any device that candle has.
//!
//! Weights in blocks and in single precision are multiplied with activations in single precision; weights in bf16 with
//! activations in bf16, the norms' and softmax's sums in single precision inside candle's kernels.

mod stack;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::ops::rms_norm;

use super::WeightForm;
use super::executor::{Executor, Forms, Stack, WeightMatrix, check_specs, outside};
use super::files::{Raw, Weights};
use super::spec::LayerSpec;
use crate::plugin::Matrix;
use crate::{Error, Result};
use stack::DeviceStack;

/// Computes on a candle device. Cloning shares it.
#[derive(Clone)]
pub struct OnDevice {
    device: Device,
}

impl OnDevice {
    /// On this device.
    pub fn new(device: Device) -> Self {
        Self { device }
    }

    fn vector_of(&self, values: Vec<f32>, dtype: DType) -> Result<Tensor> {
        let n = values.len();
        Ok(Tensor::from_vec(values, n, &self.device)?.to_dtype(dtype)?)
    }

    /// Reads products that take the same input as one, where their values are stored alike, and else one by one.
    fn joined(
        &self,
        from: &dyn Weights,
        products: &[(String, [usize; 2], bool)],
    ) -> Result<Vec<DeviceMatrix>> {
        let mut parts: Vec<(Raw<'_>, [usize; 2], Option<Vec<f32>>)> = Vec::new();
        for (name, [n, k], bias) in products {
            let raw = from.find(&format!("{name}.weight"), &[*n, *k])?.raw()?;
            let bias = match bias {
                true => Some(from.vector(&format!("{name}.bias"), *n)?),
                false => None,
            };
            let fits = |(last, _, other): &&mut (Raw<'_>, _, Option<Vec<f32>>)| {
                last.dtype == raw.dtype && other.is_some() == bias.is_some()
            };
            match parts.last_mut().filter(fits) {
                Some((last, [rows, _], biases)) => {
                    last.bytes.to_mut().extend_from_slice(&raw.bytes);
                    *rows += n;
                    if let (Some(all), Some(more)) = (biases, bias) {
                        all.extend(more);
                    }
                }
                None => parts.push((raw, [*n, *k], bias)),
            }
        }
        let hold = |(raw, shape, bias)| self.hold(raw, shape, bias, from.form());
        parts.into_iter().map(hold).collect()
    }

    /// Brings a weight onto the device in the form asked for: blocks as the file stores them, or of 8 or 4 bits where rows
    /// are whole ones; bf16; single precision, to which f16 is widened.
    fn hold(
        &self,
        raw: Raw<'_>,
        [n, k]: [usize; 2],
        bias: Option<Vec<f32>>,
        form: WeightForm,
    ) -> Result<DeviceMatrix> {
        let whole = k.is_multiple_of(32);
        let dense = matches!(raw.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        let (blocks, dtype) = match form {
            WeightForm::AsIs if !dense => (Some(raw.dtype), DType::F32),
            WeightForm::Q8_0 if whole => (Some(GgmlDType::Q8_0), DType::F32),
            WeightForm::Q4 if is_q4(raw.dtype) => (Some(raw.dtype), DType::F32),
            WeightForm::Q4 if whole => (Some(GgmlDType::Q4_1), DType::F32),
            WeightForm::Bf16 => (None, DType::BF16),
            WeightForm::F32 => (None, DType::F32),
            _ if raw.dtype == GgmlDType::BF16 => (None, DType::BF16),
            _ => (None, DType::F32),
        };
        let weight = match blocks {
            Some(blocks) => {
                let bytes = match blocks == raw.dtype {
                    true => raw.bytes,
                    // On the host: a device may not know how.
                    false => {
                        let wide = dense_tensor(&raw, [n, k], DType::F32, &Device::Cpu)?;
                        let made = QTensor::quantize(&wide, blocks)?;
                        Cow::Owned(made.data()?.into_owned())
                    }
                };
                let storage =
                    QStorage::from_data(Cow::Owned(bytes.into_owned()), &self.device, blocks)?;
                Weight::Blocks {
                    of: Arc::new(QTensor::new(storage, (n, k))?),
                    table: OnceLock::new(),
                }
            }
            None => Weight::Dense(dense_tensor(&raw, [n, k], dtype, &self.device)?),
        };
        let bias = bias.map(|bias| self.vector_of(bias, dtype)).transpose()?;
        Ok(DeviceMatrix {
            n,
            k,
            weight,
            bias,
            dtype,
        })
    }
}

/// Whether blocks have 4 bits a value already.
fn is_q4(blocks: GgmlDType) -> bool {
    matches!(blocks, GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K)
}

/// Values in a dense precision, on a device.
fn dense_tensor(
    raw: &Raw<'_>,
    [n, k]: [usize; 2],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let stored = match raw.dtype {
        GgmlDType::F32 => DType::F32,
        GgmlDType::F16 => DType::F16,
        GgmlDType::BF16 => DType::BF16,
        blocks => {
            // On the host: exact, and once.
            let bytes = Cow::Owned(raw.bytes.to_vec());
            let storage = QStorage::from_data(bytes, &Device::Cpu, blocks)?;
            let wide = QTensor::new(storage, (n, k))?.dequantize(&Device::Cpu)?;
            return Ok(wide.to_device(device)?.to_dtype(dtype)?);
        }
    };
    let tensor = Tensor::from_raw_buffer(&raw.bytes, stored, &[n, k], device)?;
    Ok(tensor.to_dtype(dtype)?)
}

enum Weight {
    /// `[N, K]`
    Dense(Tensor),
    /// Blocks, and their values in single precision where rows were asked for.
    Blocks {
        of: Arc<QTensor>,
        table: OnceLock<Tensor>,
    },
}

/// A weight on a device.
struct DeviceMatrix {
    n: usize,
    k: usize,
    weight: Weight,
    bias: Option<Tensor>,
    /// Precision of activations.
    dtype: DType,
}

impl DeviceMatrix {
    /// `[M, N]` of `[M, K]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.dtype)?;
        let y = match &self.weight {
            Weight::Dense(w) => x.matmul(&w.t()?)?,
            Weight::Blocks { of, .. } => {
                QMatMul::QTensor(Arc::clone(of)).forward(&x.contiguous()?)?
            }
        };
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// Its values, `[N, K]`.
    fn table(&self) -> Result<&Tensor> {
        match &self.weight {
            Weight::Dense(w) => Ok(w),
            Weight::Blocks { of, table } => {
                if table.get().is_none() {
                    let _ = table.set(of.dequantize(&of.device())?);
                }
                let lost = || Error::Invalid("a table of values that was not kept".into());
                table.get().ok_or_else(lost)
            }
        }
    }

    fn chosen(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.n) {
            return Err(outside(id, self.n));
        }
        let table = self.table()?;
        Ok(table.index_select(&Tensor::new(ids, table.device())?, 0)?)
    }
}

impl WeightMatrix for DeviceMatrix {
    fn n(&self) -> usize {
        self.n
    }

    fn k(&self) -> usize {
        self.k
    }

    fn multiply(&self, x: &Matrix, out: &mut Matrix) -> Result<()> {
        if x.columns != self.k {
            return Err(Error::Invalid(format!(
                "rows of {} values for a weight of {} x {}",
                x.columns, self.n, self.k
            )));
        }
        *out = Matrix::device(self.forward(x.tensor()?)?)?;
        Ok(())
    }

    fn rows(&self, ids: &[u32], out: &mut Matrix) -> Result<()> {
        *out = Matrix::device(self.chosen(ids)?)?;
        Ok(())
    }

    fn cut(&self, ids: &[u32]) -> Result<Arc<dyn WeightMatrix>> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.n) {
            return Err(outside(id, self.n));
        }
        let weight = match &self.weight {
            Weight::Dense(_) => Weight::Dense(self.chosen(ids)?),
            Weight::Blocks { of, .. } => {
                // Rows are whole blocks, and stay what they are.
                let (all, blocks) = (of.data()?, of.dtype());
                let row = all.len() / self.n;
                let rows = ids.iter().map(|&id| id as usize * row);
                let bytes: Vec<u8> = rows.flat_map(|at| &all[at..at + row]).copied().collect();
                let storage = QStorage::from_data(Cow::Owned(bytes), &of.device(), blocks)?;
                Weight::Blocks {
                    of: Arc::new(QTensor::new(storage, (ids.len(), self.k))?),
                    table: OnceLock::new(),
                }
            }
        };
        Ok(Arc::new(Self {
            n: ids.len(),
            k: self.k,
            weight,
            bias: None,
            dtype: self.dtype,
        }))
    }

    fn count(&self, forms: &mut Forms) {
        let (form, bytes) = match &self.weight {
            Weight::Dense(w) => (
                w.dtype().as_str(),
                w.elem_count() * w.dtype().size_in_bytes(),
            ),
            Weight::Blocks { of, .. } => (form_of(of.dtype()), of.storage_size_in_bytes()),
        };
        *forms.entry(form).or_default() += bytes;
    }

    fn prepare_rows(&self) -> Result<usize> {
        match &self.weight {
            Weight::Dense(_) => Ok(0),
            Weight::Blocks { .. } => Ok(self.table()?.elem_count() * 4),
        }
    }
}

/// How reports call a type of blocks.
fn form_of(blocks: GgmlDType) -> &'static str {
    match blocks {
        GgmlDType::Q4_0 => "q4_0",
        GgmlDType::Q4_1 => "q4_1",
        GgmlDType::Q5_0 => "q5_0",
        GgmlDType::Q5_1 => "q5_1",
        GgmlDType::Q8_0 => "q8_0",
        GgmlDType::Q2K => "q2_k",
        GgmlDType::Q3K => "q3_k",
        GgmlDType::Q4K => "q4_k",
        GgmlDType::Q5K => "q5_k",
        GgmlDType::Q6K => "q6_k",
        _ => "gguf",
    }
}

impl Executor for OnDevice {
    fn bring(&self, rows: Matrix) -> Result<Matrix> {
        let shape = (rows.rows(), rows.columns);
        let values = rows.all()?.into_owned();
        Matrix::device(Tensor::from_vec(values, shape, &self.device)?)
    }

    fn vector(&self, from: &dyn Weights, name: &str, n: usize) -> Result<Matrix> {
        let values = self.vector_of(from.vector(name, n)?, DType::F32)?;
        Matrix::device(values.unsqueeze(0)?)
    }

    fn weight(
        &self,
        from: &dyn Weights,
        name: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Arc<dyn WeightMatrix>> {
        let mut held = self.joined(from, &[(name.to_string(), shape, bias)])?;
        Ok(Arc::new(held.swap_remove(0)))
    }

    fn stack(
        &self,
        from: &dyn Weights,
        layers: &[(String, LayerSpec)],
        positions: usize,
    ) -> Result<Box<dyn Stack>> {
        check_specs(layers)?;
        Ok(Box::new(DeviceStack::read(self, from, layers, positions)?))
    }

    fn rms_norm(&self, x: &Matrix, weight: &Matrix, eps: f32, out: &mut Matrix) -> Result<()> {
        let (x, weight) = (x.tensor()?, weight.tensor()?);
        let (m, columns) = x.dims2()?;
        let n = weight.elem_count();
        if n == 0 || !columns.is_multiple_of(n) {
            return Err(Error::Invalid(format!(
                "a norm of {n} values over rows of {columns}"
            )));
        }
        let pieces = x.contiguous()?.reshape((m * (columns / n), n))?;
        let weight = weight.flatten_all()?.to_dtype(x.dtype())?;
        let normed = rms_norm(&pieces, &weight, eps)?;
        *out = Matrix::device(normed.reshape((m, columns))?)?;
        Ok(())
    }
}
