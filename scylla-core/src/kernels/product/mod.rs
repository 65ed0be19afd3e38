//! Products of large matrices, as training takes them: hundreds of rows on either side, either of them as it lies in memory
//! or transposed.
//!
//! Both sides are packed: the right one first, in tiles of sixteen columns, line by line of K (one value of each column in
//! f32, a pair in bf16); the left one in panels of rows, a part of K at a time, by the thread that multiplies it next. A block
//! of the output is then a few registers, or tiles of AMX, that pass such a part. Each value is added up in the order of K by one thread, so results
//! depend neither on threads nor on how blocks are cut.

mod amx;
mod micro;
mod pack;
mod select;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use super::pool::Pool;
use super::simd::{InstructionSet, Line};
use super::{SharedValues, TILE};
use pack::Units;
pub(super) use pack::{pair, units_mut};

/// What products are computed in; sums are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProductForm {
    /// Single precision.
    F32,
    /// Both sides are rounded to bf16.
    Bf16,
}

impl ProductForm {
    /// What is fastest here: bf16 where the processor multiplies it.
    pub fn fastest() -> Self {
        match InstructionSet::detect() {
            InstructionSet::Avx512Bf16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    /// Whether products of many rows with weights held in fewer bits are worth widening those to bf16: tiles of AMX multiply
    /// several times as fast as registers.
    pub(super) fn widens() -> bool {
        amx::available()
    }

    /// The instructions that compute it here.
    pub fn instructions(self) -> &'static str {
        match (self, InstructionSet::detect()) {
            (Self::Bf16, _) if amx::available() => "AMX bf16",
            (Self::Bf16, InstructionSet::Avx512Bf16) => "AVX-512 bf16",
            (_, InstructionSet::Portable) => "portable",
            (_, InstructionSet::Avx2 | InstructionSet::AvxVnni) => "AVX2",
            (_, InstructionSet::Neon | InstructionSet::NeonDotprod | InstructionSet::NeonI8mm) => {
                "NEON"
            }
            _ => "AVX-512",
        }
    }
}

/// A matrix as it lies in memory, or its transpose.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    values: &'a [f32],
    /// Rows and columns as they lie.
    rows: usize,
    columns: usize,
    stride: usize,
    transposed: bool,
}

impl<'a> View<'a> {
    /// `[rows, columns]`, row after row.
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "{rows} x {columns} values");
        Self::strided(values, rows, columns, columns)
    }

    /// `[rows, columns]`, `stride` values from one row to the next.
    ///
    /// # Panics
    /// If the rows overlap, or there are fewer values.
    pub fn strided(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride || rows <= 1, "rows that overlap");
        let needed = match rows {
            0 => 0,
            _ => (rows - 1) * stride + columns,
        };
        assert!(
            needed <= values.len(),
            "a matrix of {needed} values in {}",
            values.len()
        );
        Self {
            values,
            rows,
            columns,
            stride,
            transposed: false,
        }
    }

    /// The transpose.
    pub fn transposed(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        match self.transposed {
            true => (self.columns, self.rows),
            false => (self.rows, self.columns),
        }
    }
}

/// The right side of a product `[K, N]`, packed: worth keeping where several products share it.
pub struct Right {
    form: ProductForm,
    k: usize,
    n: usize,
    /// Lines of a tile: those of K, and zeros up to whole steps.
    lines: usize,
    /// `[tiles, lines]`, and perhaps more; the number of tiles is even.
    data: Vec<Line>,
}

impl Right {
    /// Packs a matrix `[K, N]`.
    pub fn pack(pool: &Pool, form: ProductForm, of: View<'_>) -> Self {
        Self::pack_into(pool, form, of, Vec::new())
    }

    fn pack_into(pool: &Pool, form: ProductForm, of: View<'_>, data: Vec<Line>) -> Self {
        let mut to = Self::empty(form, of.shape(), data);
        to.fill(pool, |tiles, lines, to| {
            pack::right(form, of, tiles, lines, to)
        });
        to
    }

    /// Takes memory for a side whose tiles are to be filled.
    fn empty(form: ProductForm, (k, n): (usize, usize), data: Vec<Line>) -> Self {
        let lines = lines_of(form, k);
        let mut to = Self {
            form,
            k,
            n,
            lines,
            data,
        };
        let len = to.tiles() * lines;
        if to.data.len() < len {
            to.data.resize(len, Line([0; 64]));
        }
        to
    }

    fn tiles(&self) -> usize {
        self.n.div_ceil(TILE).next_multiple_of(2)
    }

    /// Fills all tiles: `pack` gets some of them, the lines of each, and where they lie.
    fn fill(&mut self, pool: &Pool, pack: impl Fn(Range<usize>, usize, &mut [Line]) + Sync) {
        let (tiles, lines) = (self.tiles(), self.lines);
        let to = SharedValues::new(&mut self.data[..]);
        pool.shares(tiles, 2, |range| {
            // SAFETY: shares are disjoint, and so are their tiles.
            let to = unsafe { to.part(range.start * lines..range.end * lines) };
            pack(range, lines, to);
        });
    }

    /// The right side `[K, N]` of bf16 products with a weight `[N, K]` that lies in tiles of its own: `pack` writes one of
    /// those, sixteen lines for each 32 values of K. The memory is that of other sides, and goes back with
    /// [`Right::recycle`].
    pub(super) fn of_tiles(
        pool: &Pool,
        (n, k): (usize, usize),
        pack: impl Fn(usize, &mut [Line]) + Sync,
    ) -> Self {
        let form = ProductForm::Bf16;
        let room = n.div_ceil(TILE).next_multiple_of(2) * lines_of(form, k);
        let mut to = Self::empty(form, (k, n), spare(room));
        to.fill(pool, |tiles, lines, to| {
            for (tile, to) in tiles.zip(to.chunks_exact_mut(lines)) {
                match tile * TILE < n {
                    true => pack(tile, to),
                    false => to.fill(Line([0; 64])),
                }
            }
        });
        to
    }

    /// Gives its memory to the sides that come.
    pub(super) fn recycle(self) {
        give_back(self.data);
    }

    /// K and N.
    pub fn shape(&self) -> (usize, usize) {
        (self.k, self.n)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.lines * size_of::<Line>()
    }
}

/// Lines that hold `k` values of a column, filled up to whole steps of AMX where there are any.
fn lines_of(form: ProductForm, k: usize) -> usize {
    match form {
        ProductForm::F32 => k,
        ProductForm::Bf16 => k.div_ceil(2).next_multiple_of(16),
    }
}

/// Where a product goes: `[M, N]`, `stride` values from one row to the next.
struct Target<'a> {
    values: SharedValues<'a, f32>,
    stride: usize,
    /// Whether it is added to what is there.
    add: bool,
    /// Row and column of the product that come first there.
    begin: (usize, usize),
}

impl Target<'_> {
    /// Where a value of the product goes.
    fn at(&self, row: usize, column: usize) -> usize {
        (row - self.begin.0) * self.stride + column - self.begin.1
    }
}

thread_local! {
    /// Memory of packed sides, kept from product to product.
    static SPARE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Memory of at least so many lines, which may hold anything: the least that is there, or the largest, grown.
fn spare(lines: usize) -> Vec<Line> {
    let mut found = SPARE.with_borrow_mut(|spare| {
        let enough = (0..spare.len()).filter(|&i| spare[i].len() >= lines);
        let least = enough.min_by_key(|&i| spare[i].len());
        let best = least.or_else(|| (0..spare.len()).max_by_key(|&i| spare[i].len()));
        best.map(|i| spare.swap_remove(i)).unwrap_or_default()
    });
    if found.len() < lines {
        found.resize(lines, Line([0; 64]));
    }
    found
}

fn give_back(data: Vec<Line>) {
    SPARE.with_borrow_mut(|spare| spare.push(data));
}

/// Computes products on some threads, in one form.
#[derive(Clone)]
pub struct Products {
    /// The threads.
    pub pool: Arc<Pool>,
    /// What products are computed in.
    pub form: ProductForm,
}

impl Products {
    /// `out = left right`, added to what is there where `add`; `out` is `[M, N]`, row after row.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn multiply(&self, left: View<'_>, right: View<'_>, add: bool, out: &mut [f32]) {
        let (k, n) = right.shape();
        let room = n.div_ceil(TILE).next_multiple_of(2) * lines_of(self.form, k);
        let packed = Right::pack_into(&self.pool, self.form, right, spare(room));
        self.multiply_packed(left, &packed, add, out, n);
        give_back(packed.data);
    }

    /// The same with a side that is packed; the rows of `out` begin `stride` values apart. Of the right side the first rows
    /// count where `left` has fewer columns, and the first columns where `stride` is less than all of them.
    ///
    /// # Panics
    /// If the sizes do not fit, or the side was packed in another form.
    pub fn multiply_packed(
        &self,
        left: View<'_>,
        right: &Right,
        add: bool,
        out: &mut [f32],
        stride: usize,
    ) {
        let (m, k) = left.shape();
        let n = right.n.min(stride);
        assert!(k <= right.k, "a product over {k} and {} values", right.k);
        assert!(self.form == right.form, "a side packed in another form");
        if m == 0 || n == 0 {
            return;
        }
        assert!(
            (m - 1) * stride + n <= out.len(),
            "a product of {m} x {n} values"
        );
        if k == 0 {
            if !add {
                out.chunks_mut(stride)
                    .take(m)
                    .for_each(|row| row[..n].fill(0.0));
            }
            return;
        }
        let target = Target {
            values: SharedValues::new(out),
            stride,
            add,
            begin: (0, 0),
        };
        self.block(left, right, n).run(&self.pool, &target);
    }

    fn block<'a>(&self, left: View<'a>, right: &'a Right, n: usize) -> Block<'a> {
        let (m, k) = left.shape();
        Block {
            left,
            right,
            units: Units::of(self.form, amx::available()),
            lines: lines_of(self.form, k),
            m,
            n,
        }
    }
}

/// A product: the right side is packed, the left one is packed part by part where it is used.
struct Block<'a> {
    left: View<'a>,
    right: &'a Right,
    units: Units,
    /// Lines of K that count.
    lines: usize,
    m: usize,
    n: usize,
}

/// Rows that one thread takes at a time, at most and at least, and tiles of columns: parts of K of both stay in the second
/// cache.
const ROWS: usize = 256;
const FEW_ROWS: usize = 128;
const TILES: usize = 24;

/// A part of K: its left side, packed for some panels, and where it lies.
struct Part<'a> {
    left: &'a [Line],
    /// Lines of memory of a panel.
    room: usize,
    /// The first panel.
    panel: usize,
    panels: usize,
    lines: Range<usize>,
    /// Whether sums go on from what is there.
    add: bool,
}

impl Block<'_> {
    /// Shares the output: rows, as each thread packs its own; and columns too, where there are few rows for many of them.
    fn run(&self, pool: &Pool, target: &Target<'_>) {
        let panels = self.m.div_ceil(self.units.rows);
        let tiles = self.n.div_ceil(TILE);
        let rows = self.m.div_ceil(2 * pool.threads()).clamp(FEW_ROWS, ROWS);
        let down = rows.div_ceil(self.units.rows);
        let wide = match self.n >= 4 * self.m {
            true => tiles.min(TILES),
            false => tiles,
        };
        let across = tiles.div_ceil(wide);
        pool.shares(panels.div_ceil(down) * across, 1, |mut tasks| {
            let mut packed = spare(0);
            while !tasks.is_empty() {
                // Neighbours in a row of tasks are one: they share a left side.
                let row = tasks.start / across;
                let end = tasks.end.min((row + 1) * across);
                let columns = tasks.start % across * wide..tiles.min((end - row * across) * wide);
                let panels = row * down..panels.min((row + 1) * down);
                self.task(panels, columns, target, &mut packed);
                tasks.start = end;
            }
            give_back(packed);
        });
    }

    /// Some panels and tiles, over all of K.
    fn task(
        &self,
        panels: Range<usize>,
        columns: Range<usize>,
        target: &Target<'_>,
        packed: &mut Vec<Line>,
    ) {
        let most = match self.units.amx {
            true => amx::LINES,
            false => micro::LINES,
        };
        // In even parts, as each loads and stores the whole output; where there are tiles of AMX, in whole ones.
        let parts = self.lines.div_ceil(most);
        let mut each = self.lines.div_ceil(parts);
        if self.units.amx {
            each = each.next_multiple_of(TILE);
        }
        for start in (0..self.lines).step_by(each) {
            let lines = start..self.lines.min(start + each);
            let room = self.units.lines_of_panel(lines.len());
            if packed.len() < panels.len() * room {
                packed.resize(panels.len() * room, Line([0; 64]));
            }
            let to = &mut packed[..panels.len() * room];
            let form = self.right.form;
            pack::left(
                form,
                self.left,
                panels.clone(),
                self.units,
                lines.clone(),
                to,
            );
            let part = Part {
                left: to,
                room,
                panel: panels.start,
                panels: panels.len(),
                lines,
                add: target.add || start > 0,
            };
            let mut tile = columns.start;
            while tile < columns.end {
                let tiles = tile..columns.end.min(tile + TILES);
                tile = tiles.end;
                match self.units.amx {
                    true => amx::run(self, &part, tiles, target),
                    false => micro::run(self, &part, tiles, target),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    fn rounded(x: f32, form: ProductForm) -> f64 {
        match form {
            ProductForm::F32 => f64::from(x),
            ProductForm::Bf16 => half::bf16::from_f32(x).to_f64(),
        }
    }

    /// Every way to lay out both sides, against the plain sum in f64.
    #[test]
    fn products_equal_the_plain_sums_in_every_layout() {
        let sizes: &[(usize, usize, usize)] = match cfg!(miri) {
            true => &[(3, 5, 2), (9, 18, 17)],
            false => &[
                (1, 1, 1),
                (3, 5, 2),
                (9, 18, 17),
                (33, 31, 70),
                (40, 65, 300),
                (70, 400, 33),
                (513, 130, 600),
            ],
        };
        for threads in [1, 3] {
            for form in [ProductForm::F32, ProductForm::Bf16] {
                let products = Products {
                    pool: Arc::new(Pool::new(threads)),
                    form,
                };
                for &(m, k, n) in sizes {
                    let (a, b) = (values(m * k, 1), values(k * n, 2));
                    let wide =
                        |v: &[f32]| -> Vec<f64> { v.iter().map(|&x| rounded(x, form)).collect() };
                    let (wide_a, wide_b) = (wide(&a), wide(&b));
                    for layout in 0..4 {
                        let left = match layout & 1 {
                            0 => View::new(&a, m, k),
                            _ => View::new(&a, k, m).transposed(),
                        };
                        let right = match layout & 2 {
                            0 => View::new(&b, k, n),
                            _ => View::new(&b, n, k).transposed(),
                        };
                        let at = |v: View<'_>, of: &[f64], i: usize, j: usize| match v.transposed {
                            true => of[j * v.stride + i],
                            false => of[i * v.stride + j],
                        };
                        let begun = values(m * n, 3);
                        for add in [false, true] {
                            let mut out = begun.clone();
                            products.multiply(left, right, add, &mut out);
                            for i in 0..m {
                                for j in 0..n {
                                    let of = |l| at(left, &wide_a, i, l) * at(right, &wide_b, l, j);
                                    let (mut sum, mut size) = (0.0, 0.0);
                                    for l in 0..k {
                                        sum += of(l);
                                        size += of(l).abs();
                                    }
                                    let first = if add {
                                        f64::from(begun[i * n + j])
                                    } else {
                                        0.0
                                    };
                                    let found = f64::from(out[i * n + j]);
                                    // Each of k additions rounds by half a unit of a partial sum.
                                    let room = (size + first.abs())
                                        * (k + 2) as f64
                                        * f64::from(f32::EPSILON);
                                    assert!(
                                        (found - first - sum).abs() <= room,
                                        "{m} x {k} x {n} {form:?} layout {layout} add {add}: [{i}, {j}] {found} for {}",
                                        first + sum
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_selected_is_what_the_whole_product_has() {
        let (m, k, n) = match cfg!(miri) {
            true => (5, 6, 40),
            false => (300, 70, 1000),
        };
        let (a, mut b) = (values(m * k, 1), values(k * n, 2));
        // Columns that are equal, in one block and across: the first of them counts.
        for row in b.chunks_exact_mut(n) {
            for column in [n / 3 + 1, n - 2] {
                row[column] = row[n / 3];
            }
        }
        let listed: Vec<u32> = [n - 1, 0, n / 3, 7, n - 1].map(|c| c as u32).to_vec();
        for threads in [1, 3] {
            for form in [ProductForm::F32, ProductForm::Bf16] {
                let pool = Arc::new(Pool::new(threads));
                let products = Products { pool, form };
                let right = Right::pack(&products.pool, form, View::new(&b, k, n));
                let mut all = vec![0.0; m * n];
                products.multiply_packed(View::new(&a, m, k), &right, false, &mut all, n);
                let (best, found) = products.select(View::new(&a, m, k), &right, &listed);
                for (row, all) in all.chunks_exact(n).enumerate() {
                    let largest = all.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let first = all.iter().position(|&v| v == largest);
                    assert_eq!(Some(best[row] as usize), first, "{form:?}");
                    for (i, &column) in listed.iter().enumerate() {
                        assert_eq!(found[row * listed.len() + i], all[column as usize]);
                    }
                }
                assert_eq!(products.select(View::new(&a, m, k), &right, &[]).0, best);
            }
        }
    }

    #[test]
    fn results_depend_neither_on_threads_nor_on_the_rows_beside() {
        let (m, k, n) = if cfg!(miri) {
            (5, 9, 18)
        } else {
            (300, 500, 130)
        };
        let (a, b) = (values(m * k, 5), values(k * n, 6));
        for form in [ProductForm::F32, ProductForm::Bf16] {
            let of = |threads: usize, first: usize, rows: usize| {
                let products = Products {
                    pool: Arc::new(Pool::new(threads)),
                    form,
                };
                let mut out = vec![0.0; rows * n];
                let left = View::new(&a[first * k..(first + rows) * k], rows, k);
                products.multiply(left, View::new(&b, k, n), false, &mut out);
                out
            };
            let whole = of(1, 0, m);
            assert_eq!(whole, of(3, 0, m));
            for first in [0, 1, 4] {
                assert_eq!(of(2, first, 1), whole[first * n..(first + 1) * n]);
            }
        }
    }

    #[test]
    fn parts_of_a_packed_side_and_strided_rows_are_those_of_the_whole() {
        let (m, k, n) = (5, 70, 50);
        let (a, b) = (values(m * 100, 7), values(k * n, 8));
        for form in [ProductForm::F32, ProductForm::Bf16] {
            let products = Products {
                pool: Arc::new(Pool::new(2)),
                form,
            };
            let right = Right::pack(&products.pool, form, View::new(&b, k, n));
            for (inner, columns) in [(70, 50), (33, 17), (1, 1)] {
                let left = View::strided(&a, m, inner, 100);
                let mut out = vec![7.0; m * columns];
                products.multiply_packed(left, &right, false, &mut out, columns);
                let mut part = Vec::new();
                (0..inner).for_each(|l| part.extend(&b[l * n..l * n + columns]));
                let mut expected = vec![0.0; m * columns];
                products.multiply(left, View::new(&part, inner, columns), false, &mut expected);
                assert_eq!(out, expected);
            }
            let mut out = vec![7.0; m * 60];
            products.multiply_packed(View::strided(&a, m, k, 100), &right, false, &mut out, 60);
            assert!(
                out.chunks(60)
                    .all(|row| row[n..] == [7.0; 10] && row[0] != 7.0)
            );
        }
    }
}
