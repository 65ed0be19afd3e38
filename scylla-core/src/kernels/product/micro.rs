//! Blocks of a product in registers.

use std::ops::Range;

use super::super::TILE;
use super::super::dense::Element;
use super::super::simd::{InstructionSet, Line, Simd, dispatch};
use super::pack::units;
use super::{Block, Part, ProductForm, Target};

/// Lines of K that pass together: three tiles of them fill half of the first cache.
pub(super) const LINES: usize = 128;

/// Rows of a panel: with three tiles (AVX-512) or one (AVX2: two registers each) the sums fill the registers.
pub(super) fn rows() -> usize {
    match InstructionSet::detect() {
        InstructionSet::Portable => 4,
        InstructionSet::Avx512 | InstructionSet::Avx512Vnni | InstructionSet::Avx512Bf16 => 8,
        _ => 6,
    }
}

/// Computes the output of some panels and tiles.
pub(super) fn run(block: &Block<'_>, part: &Part<'_>, tiles: Range<usize>, target: &Target<'_>) {
    let level = InstructionSet::detect();
    match block.right.form {
        ProductForm::F32 => {
            dispatch!(products level, some(block, part, tiles, target): (block: &Block<'_>, part: &Part<'_>, tiles: Range<usize>, target: &Target<'_>) <W: Element = f32>);
        }
        ProductForm::Bf16 => {
            dispatch!(products level, some(block, part, tiles, target): (block: &Block<'_>, part: &Part<'_>, tiles: Range<usize>, target: &Target<'_>) <W: Element = u16>);
        }
    }
}

#[inline(always)]
fn some<S: Simd, W: Element>(
    block: &Block<'_>,
    part: &Part<'_>,
    tiles: Range<usize>,
    target: &Target<'_>,
) {
    // As `rows` says; the other branches are not compiled in.
    if S::ROWS >= 8 {
        task::<S, W, 8, 3>(block, part, tiles, target);
    } else if S::FMA {
        task::<S, W, 6, 1>(block, part, tiles, target);
    } else {
        task::<S, W, 4, 1>(block, part, tiles, target);
    }
}

#[inline(always)]
fn task<S: Simd, W: Element, const R: usize, const T: usize>(
    block: &Block<'_>,
    part: &Part<'_>,
    tiles: Range<usize>,
    target: &Target<'_>,
) {
    let mut tile = tiles.start;
    while tile < tiles.end {
        let together = if tiles.end - tile >= T { T } else { 1 };
        for panel in 0..part.panels {
            if together == T {
                one::<S, W, R, T>(block, part, panel, tile, target);
            } else {
                one::<S, W, R, 1>(block, part, panel, tile, target);
            }
        }
        tile += together;
    }
}

/// One panel of a part and `T` tiles.
#[inline(always)]
fn one<S: Simd, W: Element, const R: usize, const T: usize>(
    block: &Block<'_>,
    part: &Part<'_>,
    panel: usize,
    tile: usize,
    target: &Target<'_>,
) {
    let (lines, add) = (&part.lines, part.add);
    let of_tile = |t: usize| {
        let first = (tile + t) * block.right.lines;
        elements::<W>(&block.right.data[first + lines.start..first + lines.end])
    };
    let right: [&[W]; T] = std::array::from_fn(of_tile);
    let left = &units(&part.left[panel * part.room..(panel + 1) * part.room])[..lines.len() * R];
    let mut sums = [[S::zero(); T]; R];
    for (i, left) in left.as_chunks::<R>().0.iter().enumerate() {
        let line = i * TILE * W::PER..(i + 1) * TILE * W::PER;
        let mut columns = [W::load::<S>(&right[0][line.clone()]); T];
        for t in 1..T {
            columns[t] = W::load::<S>(&right[t][line.clone()]);
        }
        for r in 0..R {
            let x = W::of_bits(left[r]);
            for t in 0..T {
                sums[r][t] = W::multiply_add::<S>(columns[t], x, sums[r][t]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        let row = (part.panel + panel) * R + r;
        if row >= block.m {
            break;
        }
        for (t, sum) in sums.into_iter().enumerate() {
            let column = (tile + t) * TILE;
            let count = block.n.saturating_sub(column).min(TILE);
            let at = target.at(row, column);
            // SAFETY: blocks of rows and columns are handed out once, and each is written by the thread that took it.
            let out = unsafe { target.values.part(at..at + count) };
            let mut found = [0.0; TILE];
            S::store(sum, &mut found);
            match out.first_chunk_mut::<TILE>() {
                Some(out) if add => S::store(S::add(S::load(out), sum), out),
                Some(out) => *out = found,
                None if add => out.iter_mut().zip(&found).for_each(|(o, f)| *o += f),
                None => out.copy_from_slice(&found[..count]),
            }
        }
    }
}

/// Lines as elements of a weight.
fn elements<W: Element>(lines: &[Line]) -> &[W] {
    let each = size_of::<Line>() / size_of::<W>();
    // SAFETY: a line is so many elements, f32 or bf16 bits, aligned for them, and any bytes are one.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * each) }
}
