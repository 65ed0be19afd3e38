//! CPU kernels: products of a few rows with a weight, attention over a cache and a tree, and what lies between.
//!
//! Two rules hold for each of them. A row's result does not depend on how many rows travel with it, nor on the
//! number of threads; so a tree's node has bit for bit the logits of plain decoding. And nothing that grows with
//! the text is allocated per call: buffers are kept. How they are laid out, and why, is in `README.md` beside this file.
//!
//! This is one of the two places in the workspace where `unsafe` may stand (the other maps files).
#![allow(unsafe_code)]

mod attention;
pub mod causal;
mod dense;
pub mod divergence;
mod elementwise;
mod exponential;
pub mod gradients;
mod linear;
mod memory;
mod peak;
mod pool;
pub mod probability;
mod product;
mod quant;
mod simd;
pub mod softmax;
mod tiles;

pub use attention::{AttentionRow, CacheForm, KvLayer, attention};
pub use elementwise::{add, add_rms_norm, rms_norm, rope, swiglu};
pub(crate) use linear::is_finite;
pub use linear::{Linear, Scratch, Weight, Wide};
pub use memory::{keep_freed_memory, zeros};
pub use peak::{Operand, multiply_adds};
pub use pool::Pool;
pub use product::{ProductForm, Products, Right, View};
pub use simd::InstructionSet;

use std::marker::PhantomData;
use std::ops::Range;

/// Columns of a product that lie side by side in a weight.
const TILE: usize = 16;

/// Values that threads fill together, each its own ranges.
struct SharedValues<'a, T> {
    data: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: values are reached through `part` alone, whose callers keep ranges apart.
unsafe impl<T: Send> Sync for SharedValues<'_, T> {}

impl<'a, T> SharedValues<'a, T> {
    fn new(values: &'a mut [T]) -> Self {
        Self {
            data: values.as_mut_ptr(),
            len: values.len(),
            life: PhantomData,
        }
    }

    /// A range of the values.
    ///
    /// # Safety
    /// As long as the result lives, no other one overlaps it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice that is borrowed for `'a`, and apart from all others, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

/// Rows of output that threads fill together, each its own columns.
///
/// Not over [`SharedValues`]: a store through its checked slices cost one row of Q8_0 a tenth.
struct SharedOut<'a> {
    data: *mut f32,
    rows: usize,
    /// Columns that belong to this product.
    columns: usize,
    /// First of them within a row.
    first: usize,
    /// Values from one row to the next.
    stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: `store` is called for each (row, column) by one thread only: `Pool::shares` hands out disjoint tiles.
unsafe impl Sync for SharedOut<'_> {}

impl<'a> SharedOut<'a> {
    /// Columns `first..first + columns` of `out`, `[rows, stride]`.
    fn new(out: &'a mut [f32], stride: usize, first: usize, columns: usize) -> Self {
        let rows = out.len().checked_div(stride).unwrap_or(0);
        assert!(first + columns <= stride, "columns outside the row");
        Self {
            data: out.as_mut_ptr(),
            rows,
            columns,
            first,
            stride,
            life: PhantomData,
        }
    }

    /// Writes the columns from `column` on that there are.
    #[inline(always)]
    fn store(&self, row: usize, column: usize, values: &[f32; TILE]) {
        assert!(row < self.rows && column < self.columns);
        let at = row * self.stride + self.first + column;
        // A whole tile is one store; a count that is not known is a call.
        // SAFETY: in bounds, as just checked and as `new` checked the stride; no other thread writes these columns.
        match self.columns - column {
            TILE.. => unsafe {
                self.data
                    .add(at)
                    .cast::<[f32; TILE]>()
                    .write_unaligned(*values)
            },
            count => unsafe {
                std::ptr::copy_nonoverlapping(values.as_ptr(), self.data.add(at), count);
            },
        }
    }
}
