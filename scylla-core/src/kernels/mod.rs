//! CPU kernels: products of a few rows with a weight, attention over a cache and a tree, and what lies between.
//!
//! Two rules hold for each of them. A row's result does not depend on how many rows travel with it, nor on the
//! number of threads; so a tree's node has bit for bit the logits of plain decoding. And nothing is allocated
//! per call beyond buffers that are kept.
//!
//! This is one of the two places in the workspace where `unsafe` may stand (the other maps files).
#![allow(unsafe_code)]

mod attention;
mod blocks;
mod dense;
mod elementwise;
mod linear;
mod pool;
pub mod probability;
mod simd;

pub use attention::{AttentionRow, KvLayer, attention};
pub use elementwise::{add, rms_norm, rope, swiglu};
pub use linear::{Linear, Scratch, Weight};
pub use pool::Pool;
pub use simd::Level;

use std::marker::PhantomData;

/// A range of output columns.
#[derive(Clone, Copy)]
struct Columns {
    start: usize,
    end: usize,
}

/// Rows of output that threads fill together, each its own columns.
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

// SAFETY: `set` is called for each (row, column) by one thread only: `Pool::ranges` hands out disjoint columns.
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

    #[inline(always)]
    fn set(&self, row: usize, column: usize, value: f32) {
        debug_assert!(row < self.rows && column < self.columns);
        // SAFETY: in bounds (kernels iterate rows < `rows` and columns < `columns`, and `new` checked the
        // stride), and no other thread writes this element.
        unsafe { *self.data.add(row * self.stride + self.first + column) = value }
    }
}

/// Columns handed to a thread at once: eight portions a thread, in fours.
fn grain(n: usize, pool: &Pool) -> usize {
    n.div_ceil(pool.threads() * 8).next_multiple_of(4).max(16)
}
