//! What computes networks: the CPU kernels, or candle on a device.
//!
//! A network, of a target or a draft, is written once over these traits. Its values are [`Matrix`]es where the executor
//! keeps them; nothing leaves a device unless it is asked for. The graph that trains takes the same specs and the same
//! named tensors, and is no executor of these: it has no cache, and keeps what a gradient needs.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::files::Weights;
use super::slots::StackRows;
use super::spec::{AttentionInput, LayerSpec};
use crate::kernels::Pool;
use crate::plugin::{Matrix, PackedRows, Slot};
use crate::{Error, Result};

/// Bytes of weights by the form they are held in.
pub type Forms = BTreeMap<&'static str, usize>;

/// A weight `[N, K]`, with a bias `[N]` or without.
///
/// ```
/// use std::sync::Arc;
///
/// use scylla_core::kernels::Pool;
/// use scylla_core::model::{Cpu, Executor};
/// use scylla_core::plugin::Matrix;
/// # use scylla_core::model::{StoredTensor, WeightForm, Weights};
/// # struct Ones;
/// # impl Weights for Ones {
/// #     fn find(&self, name: &str, shape: &[usize]) -> scylla_core::Result<StoredTensor<'_>> {
/// #         let bytes = 1.0f32.to_le_bytes().repeat(shape.iter().product());
/// #         StoredTensor::in_memory(name.to_string(), safetensors::Dtype::F32, shape, bytes)
/// #     }
/// #     fn form(&self) -> WeightForm { WeightForm::F32 }
/// # }
///
/// let cpu = Cpu::new(Arc::new(Pool::new(1)));
/// let head = cpu.weight(&Ones, "head", [4, 2], false)?; // ones, [4, 2]
/// let mut out = Matrix::default();
/// head.multiply(&Matrix::host(vec![1.0, 2.0], 2), &mut out)?;
/// assert_eq!(out.values()?, [3.0; 4]);
/// assert_eq!(head.cut(&[0, 3])?.n(), 2);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait WeightMatrix: Send + Sync {
    /// N: values a row of a product.
    fn n(&self) -> usize;
    /// K: values a row that is multiplied.
    fn k(&self) -> usize;
    /// Writes the product `[M, N]` of rows `[M, K]`, the bias added.
    fn multiply(&self, x: &Matrix, out: &mut Matrix) -> Result<()>;
    /// Writes the weight's rows of these ids `[., K]`, as an embedding gives them.
    ///
    /// # Errors
    /// If an id is outside `0..N`.
    fn rows(&self, ids: &[u32], out: &mut Matrix) -> Result<()>;
    /// The weight's rows of these ids alone, in that order, without bias: a head cut to some tokens.
    ///
    /// # Errors
    /// If an id is outside `0..N`.
    fn cut(&self, ids: &[u32]) -> Result<Arc<dyn WeightMatrix>>;
    /// Adds the bytes that a product reads.
    fn count(&self, forms: &mut Forms);
    /// Makes ready for [`WeightMatrix::rows`], and returns the bytes of f32 that are held for it beside the weight.
    fn prepare_rows(&self) -> Result<usize> {
        Ok(0)
    }
}

/// Decoder layers with a cache for each slot.
///
/// ```
/// use std::sync::Arc;
///
/// use scylla_core::kernels::Pool;
/// use scylla_core::model::{AttentionInput, Biases, Cpu, Executor, LayerSpec, Rope, StackRows};
/// use scylla_core::plugin::Matrix;
/// # use scylla_core::model::{StoredTensor, WeightForm, Weights};
/// # struct Ones;
/// # impl Weights for Ones {
/// #     fn find(&self, name: &str, shape: &[usize]) -> scylla_core::Result<StoredTensor<'_>> {
/// #         let bytes = 1.0f32.to_le_bytes().repeat(shape.iter().product());
/// #         StoredTensor::in_memory(name.to_string(), safetensors::Dtype::F32, shape, bytes)
/// #     }
/// #     fn form(&self) -> WeightForm { WeightForm::F32 }
/// # }
///
/// let spec = LayerSpec {
///     hidden: 4, ffn: 8, heads: 2, kv_heads: 1, head_dim: 2, eps: 1e-5, biases: Biases::default(),
///     qk_norm: false, window: None, rope: Rope::plain(1e4), input: AttentionInput::Normed,
/// };
/// let cpu = Cpu::new(Arc::new(Pool::new(1)));
/// let mut stack = cpu.stack(&Ones, &[("layers.0".into(), spec)], 16)?;
/// stack.open(0)?;
/// let rows = [StackRows { slot: 0, count: 2, parents: &[] }]; // a chain of two
/// let mut x = Matrix::host(vec![0.5; 8], 4);
/// stack.forward(&rows, &mut x, None, &mut |_, _| {})?;
/// stack.commit(0, &[0])?; // the first stays, the second goes
/// assert!(x.values()?.iter().all(|v| v.is_finite()));
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait Stack: Send {
    /// Positions a slot can hold.
    fn capacity(&self) -> usize;
    /// Bytes of one position of a cache.
    fn cache_bytes(&self) -> usize;
    /// Adds the bytes of weights it holds; those of norms are returned apart.
    fn count(&self, forms: &mut Forms) -> usize;
    /// Starts an empty sequence in a slot.
    fn open(&mut self, slot: Slot) -> Result<()>;
    /// Ends it, and keeps its memory for the next one; closing a slot that is not open does nothing.
    fn close(&mut self, slot: Slot);
    /// Opens slot `to` with the first `count` committed rows of slot `from`, which stays as it is.
    ///
    /// # Errors
    /// If there are fewer.
    fn fork(&mut self, from: Slot, to: Slot, count: usize) -> Result<()>;
    /// Bytes that the cache of a slot takes which comes to hold so many positions.
    fn slot_bytes(&self, positions: usize) -> usize;
    /// Gives back the memory of slots that were closed.
    fn trim(&mut self);
    /// Keeps the waiting rows that are listed, a path from a first row, and drops the rest.
    fn commit(&mut self, slot: Slot, path: &[usize]) -> Result<()>;
    /// Runs rows through all layers: `x` `[M, H]`, rows slot by slot, goes from the input of the first to the output
    /// of the last. `beside` `[M, .]` is what the first layer's attention takes where its spec says so. `on_layer(i, x)`
    /// sees what enters layer `i`, and what leaves the last as that of the one behind it.
    fn forward(
        &mut self,
        rows: &[StackRows<'_>],
        x: &mut Matrix,
        beside: Option<&Matrix>,
        on_layer: &mut dyn FnMut(usize, &Matrix),
    ) -> Result<()>;
    /// Runs whole documents, none of which sees another, through all layers, as [`Stack::forward`] does with a slot for each;
    /// but no cache is read or written, and the values may round otherwise.
    ///
    /// # Errors
    /// If a document is longer than a slot holds, or the first layer takes values beside.
    fn packed(
        &mut self,
        rows: &PackedRows,
        x: &mut Matrix,
        on_layer: &mut dyn FnMut(usize, &Matrix),
    ) -> Result<()>;
}

/// Checks packed rows, and what a stack's first layer is given for them: no document is longer than a slot.
pub(super) fn check_packed(
    first: Option<&LayerSpec>,
    rows: &PackedRows,
    capacity: usize,
    x: &Matrix,
) -> Result<()> {
    check_input(first, rows.count(), x, None)?;
    match rows.documents.iter().map(|d| d.len()).max() {
        Some(longest) if longest > capacity => Err(Error::Invalid(format!(
            "a document of {longest} rows, where {capacity} positions are"
        ))),
        _ => Ok(()),
    }
}

/// Refuses layers whose sizes do not fit together, whoever made them.
pub(super) fn check_specs(layers: &[(String, LayerSpec)]) -> Result<()> {
    let flaw = |(prefix, spec): &(String, LayerSpec)| Some((prefix.clone(), spec.flaw()?));
    match layers.iter().find_map(flaw) {
        Some((prefix, flaw)) => Err(Error::Invalid(format!("layer {prefix}: {flaw}"))),
        None if layers.is_empty() => Err(Error::Invalid("a stack of no layers".into())),
        None => Ok(()),
    }
}

/// The error about an id without a row.
pub(super) fn outside(id: u32, n: usize) -> Error {
    Error::Invalid(format!("token {id} outside the vocabulary of {n}"))
}

/// Checks what a stack's first layer is given for `m` rows.
pub(super) fn check_input(
    first: Option<&LayerSpec>,
    m: usize,
    x: &Matrix,
    beside: Option<&Matrix>,
) -> Result<()> {
    let Some(spec) = first else {
        return Err(Error::Invalid("a stack of no layers".into()));
    };
    let width = match spec.input {
        AttentionInput::Beside(width) => Some((m, width)),
        _ => None,
    };
    let given = beside.map(|b| (b.rows(), b.columns));
    if (x.rows(), x.columns) != (m, spec.hidden) || given != width {
        return Err(Error::Invalid(format!(
            "{} x {} values and {given:?} beside them, for {m} rows of {} and {width:?}",
            x.rows(),
            x.columns,
            spec.hidden
        )));
    }
    Ok(())
}

/// Reads weights to where it computes, and computes with them.
///
/// ```
/// use candle_core::Device;
/// use scylla_core::model::{Cpu, Executor, OnDevice};
/// use scylla_core::plugin::Matrix;
/// # use scylla_core::model::{StoredTensor, WeightForm, Weights};
/// # struct Ones;
/// # impl Weights for Ones {
/// #     fn find(&self, name: &str, shape: &[usize]) -> scylla_core::Result<StoredTensor<'_>> {
/// #         let bytes = 1.0f32.to_le_bytes().repeat(shape.iter().product());
/// #         StoredTensor::in_memory(name.to_string(), safetensors::Dtype::F32, shape, bytes)
/// #     }
/// #     fn form(&self) -> WeightForm { WeightForm::F32 }
/// # }
///
/// /// Written once, run anywhere: a normed product.
/// fn run(executor: &dyn Executor) -> scylla_core::Result<Vec<f32>> {
///     let norm = executor.vector(&Ones, "norm.weight", 2)?;
///     let weight = executor.weight(&Ones, "fc", [3, 2], false)?;
///     let (mut normed, mut out) = (Matrix::default(), Matrix::default());
///     let x = executor.bring(Matrix::host(vec![3.0, 3.0], 2))?;
///     executor.rms_norm(&x, &norm, 0.0, &mut normed)?;
///     weight.multiply(&normed, &mut out)?;
///     Ok(out.all()?.into_owned())
/// }
///
/// let kernels = Cpu::new(std::sync::Arc::new(scylla_core::kernels::Pool::new(1)));
/// assert_eq!(run(&kernels)?, [2.0; 3]);
/// assert_eq!(run(&OnDevice::new(Device::Cpu))?, [2.0; 3]);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait Executor: Send + Sync {
    /// Brings rows from the host to where it computes.
    fn bring(&self, rows: Matrix) -> Result<Matrix>;
    /// Reads a vector of weights, as a matrix of one row.
    fn vector(&self, from: &dyn Weights, name: &str, n: usize) -> Result<Matrix>;
    /// Reads `{name}.weight` `[n, k]`, and `{name}.bias` `[n]` where asked to.
    ///
    /// # Errors
    /// If it cannot be held in the form that `from` asks for.
    fn weight(
        &self,
        from: &dyn Weights,
        name: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Arc<dyn WeightMatrix>>;
    /// Reads decoder layers, each with the prefix of its tensors' names, whose slots hold `positions` rows.
    fn stack(
        &self,
        from: &dyn Weights,
        layers: &[(String, LayerSpec)],
        positions: usize,
    ) -> Result<Box<dyn Stack>>;
    /// Root-mean-square normalisation of each row of `x` `[M, H]`, or of each piece of a row that is as long as `weight`.
    fn rms_norm(&self, x: &Matrix, weight: &Matrix, eps: f32, out: &mut Matrix) -> Result<()>;
    /// The threads that work, where it computes on the CPU kernels.
    fn pool(&self) -> Option<&Arc<Pool>> {
        None
    }
}
