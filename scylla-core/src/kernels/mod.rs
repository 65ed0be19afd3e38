//! CPU kernels: products of a few rows with a weight, attention over a cache and a tree, and what lies between.
//!
//! Two rules hold for each of them. A row's result does not depend on how many rows travel with it, nor on the
//! number of threads; so a tree's node has bit for bit the logits of plain decoding. And nothing that grows with
//! the text is allocated per call: buffers are kept. How they are laid out, and why, is in `README.md` beside this file.
//!
//! This is one of the two places in the workspace where `unsafe` may stand (the other maps files).
#![allow(unsafe_code)]

mod attention;
mod dense;
mod elementwise;
mod linear;
mod peak;
mod pool;
pub mod probability;
mod quant;
mod simd;

pub use attention::{AttentionRow, KvLayer, attention};
pub use elementwise::{add, rms_norm, rope, swiglu};
pub use linear::{Linear, Scratch, Weight};
pub use peak::multiply_adds;
pub use pool::Pool;
pub use simd::Level;

use std::marker::PhantomData;

/// Columns of a product that lie side by side in a weight.
const TILE: usize = 16;

/// A range of tiles.
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

    /// Writes the columns from `column` on that there are.
    #[inline(always)]
    fn store(&self, row: usize, column: usize, values: &[f32; TILE]) {
        let count = TILE.min(self.columns - column);
        assert!(row < self.rows && column < self.columns);
        let at = row * self.stride + self.first + column;
        // SAFETY: in bounds, as just checked and as `new` checked the stride; no other thread writes these columns.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.data.add(at), count) }
    }

    /// Adds to the columns from `column` on that there are.
    #[inline(always)]
    fn add(&self, row: usize, column: usize, values: &[f32; TILE]) {
        let count = TILE.min(self.columns - column);
        assert!(row < self.rows && column < self.columns);
        let at = row * self.stride + self.first + column;
        // SAFETY: as in `store`; the values were written by this thread before.
        let out = unsafe { std::slice::from_raw_parts_mut(self.data.add(at), count) };
        for (out, value) in out.iter_mut().zip(values) {
            *out += value;
        }
    }
}

/// Tiles handed to a thread at once: eight portions a thread.
fn grain(tiles: usize, pool: &Pool) -> usize {
    tiles.div_ceil(pool.threads() * 8)
}

/// Rows that pass a weight together, their activations packed side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Panel {
    /// First row, and how many there are.
    row: usize,
    rows: usize,
    /// Rows it has room for, one of the sizes kernels are compiled for; those beyond `rows` are never stored.
    room: usize,
    /// Rows that earlier panels have room for.
    at: usize,
}

/// Sizes of panels.
const SIZES: [usize; 9] = [1, 2, 3, 4, 6, 8, 10, 12, 16];

/// Cuts rows into as few panels of at most `most` rows as there must be, of about the same size.
fn panels(rows: usize, most: usize) -> impl Iterator<Item = Panel> {
    let count = rows.div_ceil(most);
    let mut at = 0;
    (0..count).map(move |i| {
        let row = rows * i / count;
        let rows = rows * (i + 1) / count - row;
        let room = SIZES.into_iter().find(|&s| s >= rows).unwrap_or(rows);
        let panel = Panel {
            row,
            rows,
            room,
            at,
        };
        at += room;
        panel
    })
}

/// Calls `$body` with the room of a panel as a constant.
macro_rules! of_size {
    ($room:expr, $most:expr, |$R:ident| $body:expr) => {
        match $room {
            1 => {
                const $R: usize = 1;
                $body
            }
            2 => {
                const $R: usize = 2;
                $body
            }
            3 => {
                const $R: usize = 3;
                $body
            }
            4 => {
                const $R: usize = 4;
                $body
            }
            6 if $most >= 6 => {
                const $R: usize = 6;
                $body
            }
            8 if $most >= 8 => {
                const $R: usize = 8;
                $body
            }
            10 if $most >= 10 => {
                const $R: usize = 10;
                $body
            }
            12 if $most >= 12 => {
                const $R: usize = 12;
                $body
            }
            16 if $most >= 16 => {
                const $R: usize = 16;
                $body
            }
            room => unreachable!("a panel of {room} rows"),
        }
    };
}
use of_size;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_all_rows_once_in_sizes_that_kernels_are_made_for() {
        for most in [4, 8, 16] {
            for rows in 0..70 {
                let (mut next, mut at) = (0, 0);
                for p in panels(rows, most) {
                    assert_eq!((p.row, p.at), (next, at));
                    assert!(p.rows >= 1 && p.rows <= p.room && p.room <= most);
                    assert!(SIZES.contains(&p.room), "{p:?}");
                    (next, at) = (next + p.rows, at + p.room);
                }
                assert_eq!(next, rows);
            }
        }
    }
}
