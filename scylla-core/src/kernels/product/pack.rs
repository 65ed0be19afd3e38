//! How the sides of a product are packed.
//!
//! The unit is four bytes: a value of f32, or a pair of neighbours of K in bf16.

use std::ops::Range;

use super::super::TILE;
use super::super::dense::to_bf16;
use super::super::simd::{InstructionSet, Line, Simd, dispatch};
use super::{ProductForm, View, micro};

/// How the left side is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Units {
    /// Rows of a panel.
    pub(super) rows: usize,
    /// Whether panels are tiles of AMX, sixteen rows of sixteen units each, two of them in turn; else the rows lie side by
    /// side, unit by unit.
    pub(super) amx: bool,
}

impl Units {
    pub(super) fn of(form: ProductForm, amx: bool) -> Self {
        let amx = amx && form == ProductForm::Bf16;
        Self {
            rows: if amx { 32 } else { micro::rows() },
            amx,
        }
    }

    /// Lines of 64 bytes that a panel takes, for so many lines of K.
    pub(super) fn lines_of_panel(self, lines: usize) -> usize {
        (self.rows * lines).div_ceil(TILE)
    }
}

/// The units of lines, four bytes each.
pub(super) fn units(lines: &[Line]) -> &[u32] {
    // SAFETY: a line is sixteen units, aligned for them, and any bytes are a unit.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * TILE) }
}

pub(in crate::kernels) fn units_mut(lines: &mut [Line]) -> &mut [u32] {
    // SAFETY: as above; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * TILE) }
}

/// Packs some tiles of a right side; `to` is theirs alone.
pub(super) fn right(
    form: ProductForm,
    of: View<'_>,
    tiles: Range<usize>,
    lines: usize,
    to: &mut [Line],
) {
    dispatch!(InstructionSet::detect(), right_tiles(form, of, tiles, lines, to): (form: ProductForm, of: View<'_>, tiles: Range<usize>, lines: usize, to: &mut [Line]) <>);
}

/// Packs some lines of K of some panels of a left side.
pub(super) fn left(
    form: ProductForm,
    of: View<'_>,
    panels: Range<usize>,
    how: Units,
    lines: Range<usize>,
    to: &mut [Line],
) {
    dispatch!(InstructionSet::detect(), left_panels(form, of, panels, how, lines, to): (form: ProductForm, of: View<'_>, panels: Range<usize>, how: Units, lines: Range<usize>, to: &mut [Line]) <>);
}

/// Sixteen lanes (rows of the left side, columns of the right one) by sixteen units of K.
type Square = [[u32; TILE]; TILE];

#[inline(always)]
fn right_tiles<S: Simd>(
    form: ProductForm,
    of: View<'_>,
    tiles: Range<usize>,
    lines: usize,
    to: &mut [Line],
) {
    // Lanes lie side by side in memory unless the matrix is transposed.
    let source = Source::new(form, of, !of.transposed);
    let mut square: Square = [[0; TILE]; TILE];
    for (tile, to) in tiles.zip(units_mut(to).chunks_exact_mut(lines * TILE)) {
        for (i, to) in to.chunks_mut(TILE * TILE).enumerate() {
            match source.lanes_side_by_side {
                true => source.by_lines(tile * TILE, i * TILE, to),
                false => {
                    source.by_lanes(tile * TILE, i * TILE, &mut square);
                    turn(&square, to);
                }
            }
        }
    }
}

#[inline(always)]
fn left_panels<S: Simd>(
    form: ProductForm,
    of: View<'_>,
    panels: Range<usize>,
    how: Units,
    lines: Range<usize>,
    to: &mut [Line],
) {
    let source = Source::new(form, of, of.transposed);
    let mut square: Square = [[0; TILE]; TILE];
    let (begin, lines) = (lines.start, lines.len());
    let room = how.lines_of_panel(lines) * TILE;
    for (panel, to) in panels.zip(units_mut(to).chunks_exact_mut(room)) {
        if how.amx {
            // Two tiles of sixteen rows, each whole before the other.
            for (half, to) in to.chunks_exact_mut(room / 2).enumerate() {
                let first = panel * how.rows + half * TILE;
                match source.lanes_side_by_side {
                    // Along each row, as it lies in memory.
                    false => {
                        let (rows, _) = to.as_chunks_mut::<TILE>();
                        for lane in 0..TILE {
                            for (i, row) in rows.iter_mut().skip(lane).step_by(TILE).enumerate() {
                                source.lane(first + lane, begin + i * TILE, row);
                            }
                        }
                    }
                    true => {
                        for (i, to) in to.chunks_exact_mut(TILE * TILE).enumerate() {
                            source.by_lines(first, begin + i * TILE, square.as_flattened_mut());
                            turn(&square, to);
                        }
                    }
                }
            }
            continue;
        }
        let rows = how.rows;
        for (i, to) in to[..rows * lines].chunks_mut(rows * TILE).enumerate() {
            let first = begin + i * TILE;
            match source.lanes_side_by_side {
                true => source.by_lines(panel * rows, first, square.as_flattened_mut()),
                false => source.by_lanes(panel * rows, first, &mut square),
            }
            for (l, to) in to.chunks_exact_mut(rows).enumerate() {
                for (r, to) in to.iter_mut().enumerate() {
                    *to = match source.lanes_side_by_side {
                        true => square[l][r],
                        false => square[r][l],
                    };
                }
            }
        }
    }
}

/// The transpose.
#[inline(always)]
fn turn(square: &Square, to: &mut [u32]) {
    for (l, to) in to.chunks_exact_mut(TILE).enumerate() {
        for lane in 0..TILE {
            to[lane] = square[lane][l];
        }
    }
}

/// One side, as lanes of units along K.
struct Source<'a> {
    values: &'a [f32],
    stride: usize,
    lanes: usize,
    k: usize,
    /// Whether neighbours in memory are lanes; else they are neighbours of K.
    lanes_side_by_side: bool,
    form: ProductForm,
}

impl<'a> Source<'a> {
    #[inline(always)]
    fn new(form: ProductForm, of: View<'a>, lanes_side_by_side: bool) -> Self {
        let (lanes, k) = match lanes_side_by_side {
            true => (of.columns, of.rows),
            false => (of.rows, of.columns),
        };
        Self {
            values: of.values,
            stride: of.stride,
            lanes,
            k,
            lanes_side_by_side,
            form,
        }
    }

    /// Sixteen units of one lane from unit `first` on, zeros beyond the last.
    #[inline(always)]
    fn lane(&self, lane: usize, first: usize, to: &mut [u32; TILE]) {
        if lane >= self.lanes {
            *to = [0; TILE];
            return;
        }
        let row = &self.values[lane * self.stride..][..self.k];
        match self.form {
            ProductForm::F32 => match row.get(first..first + TILE) {
                Some(values) => {
                    for i in 0..TILE {
                        to[i] = values[i].to_bits();
                    }
                }
                None => {
                    *to = [0; TILE];
                    for (to, v) in to.iter_mut().zip(row.iter().skip(first)) {
                        *to = v.to_bits();
                    }
                }
            },
            ProductForm::Bf16 => match row.get(2 * first..2 * (first + TILE)) {
                Some(values) => {
                    for i in 0..TILE {
                        to[i] = pair(values[2 * i], values[2 * i + 1]);
                    }
                }
                None => {
                    *to = [0; TILE];
                    for (to, v) in to
                        .iter_mut()
                        .zip(row[(2 * first).min(row.len())..].chunks(2))
                    {
                        *to = pair(v[0], v.get(1).copied().unwrap_or(0.0));
                    }
                }
            },
        }
    }

    /// Sixteen lanes, each of sixteen units.
    #[inline(always)]
    fn by_lanes(&self, first_lane: usize, first: usize, square: &mut Square) {
        for (i, to) in square.iter_mut().enumerate() {
            self.lane(first_lane + i, first, to);
        }
    }

    /// Up to sixteen lines, each of sixteen lanes.
    #[inline(always)]
    fn by_lines(&self, first_lane: usize, first: usize, to: &mut [u32]) {
        let per = match self.form {
            ProductForm::F32 => 1,
            ProductForm::Bf16 => 2,
        };
        let lines = to.len() / TILE;
        let inside = (first + lines) * per <= self.k && first_lane + TILE <= self.lanes;
        for (i, to) in to.chunks_exact_mut(TILE).enumerate() {
            let line = (first + i) * per;
            match (self.form, inside) {
                (ProductForm::F32, true) => {
                    let row = self.whole_row(line, first_lane);
                    for lane in 0..TILE {
                        to[lane] = row[lane].to_bits();
                    }
                }
                (ProductForm::Bf16, true) => {
                    let a = self.whole_row(line, first_lane);
                    let b = self.whole_row(line + 1, first_lane);
                    for lane in 0..TILE {
                        to[lane] = pair(a[lane], b[lane]);
                    }
                }
                (ProductForm::F32, false) => {
                    let row = self.row(line, first_lane);
                    for lane in 0..TILE {
                        to[lane] = row[lane].to_bits();
                    }
                }
                (ProductForm::Bf16, false) => {
                    let (a, b) = (self.row(line, first_lane), self.row(line + 1, first_lane));
                    for lane in 0..TILE {
                        to[lane] = pair(a[lane], b[lane]);
                    }
                }
            }
        }
    }

    /// Sixteen lanes of one row in memory, all of which are there.
    #[inline(always)]
    fn whole_row(&self, row: usize, first_lane: usize) -> &[f32] {
        &self.values[row * self.stride + first_lane..][..TILE]
    }

    /// Sixteen lanes of one row in memory, zeros beyond the last.
    #[inline(always)]
    fn row(&self, row: usize, first_lane: usize) -> [f32; TILE] {
        let mut lanes = [0.0; TILE];
        if row < self.k && first_lane < self.lanes {
            let values = &self.values[row * self.stride..][..self.lanes][first_lane..];
            match values.first_chunk::<TILE>() {
                Some(values) => lanes = *values,
                None => lanes[..values.len()].copy_from_slice(values),
            }
        }
        lanes
    }
}

#[inline(always)]
pub(in crate::kernels) fn pair(a: f32, b: f32) -> u32 {
    u32::from(to_bf16(a)) | u32::from(to_bf16(b)) << 16
}
