//! The graph: what trains. Differentiable operations over packed rows, on this project's kernels or on candle's tensors.
//!
//! A [`Tape`] records what each operation needs for its gradient and runs it backwards once, setting memory free as it goes.
//! Every operation has two forms with gradients written out: [`Compute::Kernels`] on the CPU, in f32 with products in f32 or
//! bf16, and [`Compute::Tensors`], composed of candle operations on any device and in any precision: on a GPU, and in f64 as
//! the reference that the kernels are held against. Operations are free functions over a tape; losses return numbers and
//! seed the tape with their gradient.

mod attention;
mod cross_entropy;
mod linear;
mod norm;
mod rotary;
mod rows;
mod smooth_l1;
mod stack;
mod swiglu;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

pub use crate::kernels::divergence::Mix;
pub use crate::plugin::PackedRows;
pub use attention::attention;
pub use cross_entropy::{
    Compared, Head, LossSum, Teacher, cross_entropy, divergence, probabilities, probabilities_of,
    under_head,
};
pub use linear::linear;
pub use norm::rms_norm;
pub use rotary::{Angles, rotary};
pub use rows::{beside, columns, embedding};
pub use smooth_l1::smooth_l1;
pub use stack::{GraphStack, Parameters, StepCache};
pub use swiglu::swiglu;

use crate::kernels::{ProductForm, Products, Right, View, gradients};
use crate::plugin::Matrix;
use crate::{Error, Result};

/// What computes a graph.
#[derive(Clone)]
pub enum Compute {
    /// This project's kernels: values on the host in f32.
    Kernels(Products),
    /// Candle operations.
    Tensors {
        /// Where.
        device: Device,
        /// Precision of values.
        dtype: DType,
        /// Precision that both sides of products are rounded to.
        products: DType,
    },
}

impl Compute {
    /// Candle operations in one precision.
    pub fn tensors(device: Device, dtype: DType) -> Self {
        Self::Tensors {
            device,
            dtype,
            products: dtype,
        }
    }

    /// Rows of values where they are computed.
    pub fn matrix(&self, values: Vec<f32>, columns: usize) -> Result<Matrix> {
        match self {
            Self::Kernels(_) => Ok(Matrix::host(values, columns)),
            Self::Tensors { device, dtype, .. } => {
                let rows = values.len() / columns.max(1);
                let tensor = Tensor::from_vec(values, (rows, columns), device)?;
                Matrix::device(tensor.to_dtype(*dtype)?)
            }
        }
    }

    /// The same of rows that are somewhere else, or in another precision.
    pub fn bring(&self, m: &Matrix) -> Result<Matrix> {
        match self {
            Self::Kernels(_) if !m.is_on_device() => Ok(m.clone()),
            Self::Tensors { device, dtype, .. } if m.is_on_device() => {
                Matrix::device(m.tensor()?.to_device(device)?.to_dtype(*dtype)?)
            }
            _ => self.matrix(m.all()?.into_owned(), m.columns),
        }
    }

    /// Rows of zeros.
    pub fn zeros(&self, rows: usize, columns: usize) -> Result<Matrix> {
        match self {
            Self::Kernels(_) => Ok(Matrix::host(vec![0.0; rows * columns], columns)),
            Self::Tensors { device, dtype, .. } => {
                Matrix::device(Tensor::zeros((rows, columns), *dtype, device)?)
            }
        }
    }

    /// One row of `n` equal probabilities.
    pub fn uniform(&self, n: usize) -> Result<Matrix> {
        match self {
            Self::Kernels(_) => Ok(Matrix::host(vec![1.0 / n as f32; n], n)),
            Self::Tensors { device, dtype, .. } => {
                let row = Tensor::full(1.0 / n as f64, (1, n), device)?;
                Matrix::device(row.to_dtype(*dtype)?)
            }
        }
    }

    /// What products are computed with, as records name it.
    pub fn name(&self) -> String {
        match self {
            Self::Kernels(p) => match p.form {
                ProductForm::F32 => format!("f32 ({})", p.form.instructions()),
                ProductForm::Bf16 => format!("bf16 products ({})", p.form.instructions()),
            },
            Self::Tensors { products, .. } => format!("candle, {products:?} products"),
        }
    }
}

/// Rows of values in a graph.
#[derive(Debug, Clone)]
pub struct Value {
    /// The values `[M, columns]`.
    pub matrix: Matrix,
    /// Where its gradient goes; `None` has none.
    node: Option<usize>,
}

impl Value {
    /// Values without a gradient.
    pub fn constant(matrix: Matrix) -> Self {
        Self { matrix, node: None }
    }

    /// The same values, whose gradient goes nowhere.
    pub fn detached(&self) -> Self {
        Self::constant(self.matrix.clone())
    }

    /// M.
    pub fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Values a row.
    pub fn columns(&self) -> usize {
        self.matrix.columns
    }
}

type Backward = Box<dyn FnOnce(Matrix, &mut Gradients) -> Result<()>>;

/// Gradients on their way back, and sides of products that several operations share.
pub struct Gradients {
    on: Compute,
    of: Vec<Option<Matrix>>,
    /// Packed weights by node, as they are and transposed.
    packed: HashMap<(usize, bool), Arc<Right>>,
}

impl Gradients {
    /// Adds to what has come for a value.
    pub(crate) fn add(&mut self, to: Option<usize>, grad: Matrix) -> Result<()> {
        let Some(node) = to else { return Ok(()) };
        self.of[node] = Some(match self.of[node].take() {
            None => grad,
            Some(sum) => self.on.sum(sum, &grad)?,
        });
        Ok(())
    }

    /// Lets a product add to what has come for a weight `[rows, columns]`: it is told whether there is anything.
    fn product(
        &mut self,
        to: usize,
        rows: usize,
        columns: usize,
        product: impl FnOnce(&mut [f32], bool),
    ) -> Result<()> {
        match &mut self.of[to] {
            Some(sum) => product(sum.values_mut()?, true),
            place => {
                let mut values = vec![0.0; rows * columns];
                product(&mut values, false);
                *place = Some(Matrix::host(values, columns));
            }
        }
        Ok(())
    }

    /// A weight `[N, K]`, or its transpose, packed as a product's right side: once for all that use it.
    fn right(
        &mut self,
        products: &Products,
        weight: &Value,
        transposed: bool,
    ) -> Result<Arc<Right>> {
        let known = weight
            .node
            .and_then(|node| self.packed.get(&(node, transposed)));
        if let Some(known) = known {
            return Ok(Arc::clone(known));
        }
        let view = View::new(weight.matrix.values()?, weight.rows(), weight.columns());
        let view = if transposed { view.transposed() } else { view };
        let packed = Arc::new(Right::pack(&products.pool, products.form, view));
        if let Some(node) = weight.node {
            self.packed.insert((node, transposed), Arc::clone(&packed));
        }
        Ok(packed)
    }

    /// The gradient that came for a value; `None` where none did.
    pub fn take(&mut self, of: &Value) -> Option<Matrix> {
        self.of.get_mut(of.node?)?.take()
    }
}

impl Compute {
    pub(super) fn sum(&self, mut a: Matrix, b: &Matrix) -> Result<Matrix> {
        match self {
            Self::Kernels(p) => {
                let (columns, b) = (a.columns, b.values()?);
                let a_values = a.values_mut()?;
                if a_values.len() != b.len() {
                    return Err(Error::Invalid(format!(
                        "gradients of {} and of {} values for one",
                        a_values.len(),
                        b.len()
                    )));
                }
                p.pool.rows([a_values], [columns], 64, |range, [a]| {
                    gradients::accumulate(a, &b[range.start * columns..range.end * columns]);
                });
                Ok(a)
            }
            Self::Tensors { .. } => Matrix::device(a.tensor()?.add(b.tensor()?)?),
        }
    }
}

/// Operations in the order in which they ran, each with what its gradient needs.
pub struct Tape {
    /// What computes.
    pub on: Compute,
    nodes: Vec<Option<Backward>>,
    gradients: Gradients,
}

impl Tape {
    /// An empty tape.
    pub fn new(on: &Compute) -> Self {
        Self {
            on: on.clone(),
            nodes: Vec::new(),
            gradients: Gradients {
                on: on.clone(),
                of: Vec::new(),
                packed: HashMap::new(),
            },
        }
    }

    /// Values whose gradient is asked for.
    pub fn leaf(&mut self, matrix: Matrix) -> Value {
        self.node(matrix, None)
    }

    fn node(&mut self, matrix: Matrix, backward: Option<Backward>) -> Value {
        let node = Some(self.nodes.len());
        self.nodes.push(backward);
        self.gradients.of.push(None);
        Value { matrix, node }
    }

    /// What an operation made of `from`; `backward` takes its gradient to those of them that have one.
    pub(crate) fn record(
        &mut self,
        from: &[&Value],
        matrix: Matrix,
        backward: impl FnOnce(Matrix, &mut Gradients) -> Result<()> + 'static,
    ) -> Value {
        match from.iter().any(|v| v.node.is_some()) {
            true => self.node(matrix, Some(Box::new(backward))),
            false => Value::constant(matrix),
        }
    }

    /// Adds a loss's gradient with respect to a value.
    pub fn seed(&mut self, of: &Value, grad: Matrix) -> Result<()> {
        self.gradients.add(of.node, grad)
    }

    /// Runs backwards: the gradients of all leaves.
    pub fn backward(self) -> Result<Gradients> {
        let mut gradients = self.gradients;
        for (node, backward) in self.nodes.into_iter().enumerate().rev() {
            let Some(backward) = backward else { continue };
            if let Some(grad) = gradients.of[node].take() {
                backward(grad, &mut gradients)?;
            }
        }
        Ok(gradients)
    }
}
