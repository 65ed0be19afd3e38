//! How the tiles of a weight meet the rows of activations: what products of all weight forms share.
//!
//! A weight `[N, K]` lies in tiles of sixteen columns of its product, each a run of inner units (lines of a dense
//! weight, blocks of a quantised one). Rows are cut into panels that registers have room for. A few tiles pass all
//! panels together; where there are several panels, chunk by chunk, so that weights come from the first cache for all
//! but the first of them. Sums go on from chunk to chunk in order, so neither chunks nor panels decide how results round.

use std::cell::RefCell;
use std::ops::Range;

use super::pool::Pool;
use super::simd::{InstructionSet, Limits, Simd, dispatch};
use super::{SharedOut, TILE};

/// A product of one weight with packed activations.
pub(super) trait Product: Sync {
    /// Rows of a panel, at most.
    const ROWS: usize;
    /// Units of a chunk, about: those of a few tiles, their successors and the activations fit the first cache.
    const CHUNK: usize;
    /// Chunks begin at a multiple of this.
    const ALIGN: usize;
    /// Tiles that a panel of some rows, one of so many passes, takes together, where registers hold so much: 1, 2, 3 or 4.
    fn wide(rows: usize, passes: usize, limits: Limits) -> usize;
    /// Units that a single pass of some rows asks for ahead.
    fn ahead(rows: usize) -> usize;
    /// Units of a tile.
    fn units(&self) -> usize;
    /// Adds the products of `R` rows with `T` tiles, over some units, to `sums`: tile by tile, row by row. The first
    /// units begin the sums, whatever they hold.
    fn panel<S: Simd, const R: usize, const T: usize>(&self, part: Part, sums: &mut [[f32; TILE]]);
}

/// What one call of a kernel covers.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// First tile.
    pub(super) tile: usize,
    /// Units of it.
    pub(super) start: usize,
    pub(super) end: usize,
    /// Rows that earlier panels have room for.
    pub(super) at: usize,
    /// Which panel of how many.
    pub(super) pass: usize,
    pub(super) passes: usize,
    /// Units from `start` to the weights that shall be asked for: those of all passes together follow there.
    pub(super) ahead: usize,
}

/// Rows that pass a weight together.
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
const SIZES: [usize; 7] = [1, 2, 3, 4, 6, 8, 10];

/// Cuts rows into as few panels of at most `most` rows as there must be, of about the same size.
fn cut(rows: usize, most: usize) -> impl Iterator<Item = Panel> + Clone {
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

/// The panels of some rows: as large as the registers allow, of what the product is made for.
fn panels<P: Product>(rows: usize) -> impl Iterator<Item = Panel> + Clone {
    cut(rows, P::ROWS.min(InstructionSet::detect().limits().rows))
}

/// Packs rows `[M, K]` on all threads: `pack(x, place)` gets the rows of one panel, and their place among the room of
/// all.
pub(super) fn pack<P: Product>(
    pool: &Pool,
    x: &[f32],
    k: usize,
    pack: impl Fn(&[f32], Range<usize>) + Sync,
) {
    let panels = panels::<P>(rows_of(x, k));
    pool.ranges(panels.clone().count(), 1, |range| {
        for p in panels.clone().skip(range.start).take(range.len()) {
            let x = &x[p.row * k..(p.row + p.rows) * k];
            pack(x, p.at..p.at + p.room);
        }
    });
}

/// Rows that all panels of rows `[M, K]` have room for.
pub(super) fn room<P: Product>(x: &[f32], k: usize) -> usize {
    panels::<P>(rows_of(x, k)).map(|p| p.room).sum()
}

fn rows_of(x: &[f32], k: usize) -> usize {
    x.len().checked_div(k).unwrap_or(0)
}

/// The sums of a panel's rows and tiles, as the units before `start` left them.
#[inline(always)]
pub(super) fn begin<S: Simd, const R: usize, const T: usize>(
    start: usize,
    sums: &[[f32; TILE]],
) -> [[S::V; T]; R] {
    let mut acc = [[S::zero(); T]; R];
    if start > 0 {
        for r in 0..R {
            for t in 0..T {
                acc[r][t] = S::load(&sums[t * R + r]);
            }
        }
    }
    acc
}

/// Leaves the sums for the next units.
#[inline(always)]
pub(super) fn end<S: Simd, const R: usize, const T: usize>(
    acc: [[S::V; T]; R],
    sums: &mut [[f32; TILE]],
) {
    for (r, acc) in acc.into_iter().enumerate() {
        for (t, acc) in acc.into_iter().enumerate() {
            S::store(acc, &mut sums[t * R + r]);
        }
    }
}

/// `out[r, c] = sum_k w[c, k] x[r, k]` for all rows and the `tiles` tiles of a product.
pub(super) fn multiply<P: Product>(pool: &Pool, product: &P, tiles: usize, out: &SharedOut<'_>) {
    thread_local! {
        static SUMS: RefCell<Vec<[f32; TILE]>> = const { RefCell::new(Vec::new()) };
    }
    let level = InstructionSet::detect();
    let panels = panels::<P>(out.rows);
    let passes = panels.clone().count();
    let step = panels.map(|p| P::wide(p.room, passes, level.limits()));
    pool.shares(tiles, step.max().unwrap_or(1), |tiles| {
        SUMS.with_borrow_mut(|sums| {
            dispatch!(products level, some_tiles(product, tiles, sums, out): (product: &P, tiles: Range<usize>, sums: &mut Vec<[f32; TILE]>, out: &SharedOut<'_>) <P: Product>);
        });
    });
}

#[inline(always)]
fn some_tiles<S: Simd, P: Product>(
    product: &P,
    tiles: Range<usize>,
    sums: &mut Vec<[f32; TILE]>,
    out: &SharedOut<'_>,
) {
    let panels = cut(out.rows, P::ROWS.min(S::ROWS));
    let passes = panels.clone().count();
    let (mut wide, mut room) = (1, 0);
    for p in panels.clone() {
        wide = wide.max(P::wide(p.room, passes, Limits::of::<S>()));
        room += p.room;
    }
    let units = product.units();
    // One pass runs from memory, some units behind what it asks for, until that lies in the next tiles.
    let ahead = panels.clone().map(|p| P::ahead(p.room)).max().unwrap_or(0);
    let behind = units.saturating_sub(ahead) / P::ALIGN * P::ALIGN;
    let chunk = units.div_ceil(units.div_ceil(P::CHUNK).max(1));
    let chunk = chunk.next_multiple_of(P::ALIGN);
    let end_of = |start: usize| match passes {
        1 if start < behind => behind,
        1 => units,
        _ => units.min(start + chunk),
    };
    let mut tile = tiles.start;
    while tile < tiles.end {
        let together = wide.min(tiles.end - tile);
        sums.resize(room * together, [0.0; TILE]);
        let mut start = 0;
        while start < units {
            let end = end_of(start);
            let ahead = match (end < units, passes) {
                (true, 1) => ahead,
                (true, _) => end - start,
                (false, _) => together * units - start,
            };
            for (pass, p) in panels.clone().enumerate() {
                let mut done = 0;
                while done < together {
                    let part = Part {
                        tile: tile + done,
                        start,
                        end,
                        at: p.at,
                        pass,
                        passes,
                        ahead,
                    };
                    let sums = &mut sums[p.at * together + done * p.room..];
                    let left = together - done;
                    done += of_size::<S, P>(product, p.room, left, part, sums);
                }
            }
            start = end;
        }
        for p in panels.clone() {
            let sums = sums[p.at * together..].chunks_exact(p.room);
            for (t, sums) in sums.take(together).enumerate() {
                for (r, sums) in sums.iter().take(p.rows).enumerate() {
                    out.store(p.row + r, (tile + t) * TILE, sums);
                }
            }
        }
        tile += together;
    }
}

/// Calls the kernel with the room of a panel and the number of tiles as constants; returns how many tiles it took.
#[inline(always)]
fn of_size<S: Simd, P: Product>(
    product: &P,
    room: usize,
    left: usize,
    part: Part,
    sums: &mut [[f32; TILE]],
) -> usize {
    match room {
        1 => of_width::<S, P, 1>(product, left, part, sums),
        2 => of_width::<S, P, 2>(product, left, part, sums),
        3 => of_width::<S, P, 3>(product, left, part, sums),
        4 => of_width::<S, P, 4>(product, left, part, sums),
        6 if S::ROWS.min(P::ROWS) >= 6 => of_width::<S, P, 6>(product, left, part, sums),
        8 if S::ROWS.min(P::ROWS) >= 8 => of_width::<S, P, 8>(product, left, part, sums),
        10 if S::ROWS.min(P::ROWS) >= 10 => of_width::<S, P, 10>(product, left, part, sums),
        room => unreachable!("a panel of {room} rows"),
    }
}

#[inline(always)]
fn of_width<S: Simd, P: Product, const R: usize>(
    product: &P,
    left: usize,
    part: Part,
    sums: &mut [[f32; TILE]],
) -> usize {
    let wide = P::wide(R, part.passes, Limits::of::<S>());
    match wide {
        4 if left >= 4 => product.panel::<S, R, 4>(part, sums),
        3 if left >= 3 => product.panel::<S, R, 3>(part, sums),
        2 if left >= 2 => product.panel::<S, R, 2>(part, sums),
        _ => {
            product.panel::<S, R, 1>(part, sums);
            return 1;
        }
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_all_rows_once_in_sizes_that_kernels_are_made_for() {
        for most in [4, 8, 10] {
            for rows in 0..70 {
                let (mut next, mut at) = (0, 0);
                for p in cut(rows, most) {
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
