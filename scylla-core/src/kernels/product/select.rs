//! Products of which little is kept: the largest of each row, and some columns.

use super::super::{SharedValues, TILE, gradients};
use super::*;

impl Products {
    /// Of each row of `left right` the column of the largest value, the lowest of equals, and the values of the listed
    /// columns, `[M, listed]`. The others are forgotten while they are still in a cache.
    ///
    /// # Panics
    /// If the sizes do not fit, the side was packed in another form, or a listed column is none of its own.
    pub fn select(&self, left: View<'_>, right: &Right, listed: &[u32]) -> (Vec<u32>, Vec<f32>) {
        const WIDE: usize = TILES * TILE;
        let (m, k) = left.shape();
        let n = right.n;
        assert!(
            k > 0 && k == right.k,
            "a product over {k} and {} values",
            right.k
        );
        assert!(self.form == right.form, "a side packed in another form");
        let mut places: Vec<(u32, usize)> = listed.iter().copied().zip(0..).collect();
        places.sort_unstable();
        let last = places.last().map_or(0, |&(column, _)| column as usize);
        assert!(last < n, "column {last} of {n}");

        let block = self.block(left, right, n);
        let (down, across) = (ROWS / block.units.rows, n.div_ceil(WIDE));
        let panels = m.div_ceil(block.units.rows);
        let mut largest = vec![(f32::NEG_INFINITY, 0u32); across * m];
        let mut values = vec![0.0f32; m * listed.len()];
        {
            let largest = SharedValues::new(&mut largest[..]);
            let values = SharedValues::new(&mut values[..]);
            self.pool
                .shares(panels.div_ceil(down) * across, 1, |tasks| {
                    let mut packed = spare(0);
                    let mut found = vec![0.0; down * block.units.rows * WIDE];
                    for task in tasks {
                        let (part, group) = (task / across, task % across);
                        let panels = part * down..panels.min((part + 1) * down);
                        let columns = group * WIDE..n.min((group + 1) * WIDE);
                        let first = part * down * block.units.rows;
                        let target = Target {
                            values: SharedValues::new(&mut found),
                            stride: WIDE,
                            add: false,
                            begin: (first, columns.start),
                        };
                        let tiles = columns.start / TILE..columns.end.div_ceil(TILE);
                        block.task(panels, tiles, &target, &mut packed);
                        let own =
                            |&&(column, _): &&(u32, usize)| columns.contains(&(column as usize));
                        let begin = places.partition_point(|&(c, _)| (c as usize) < columns.start);
                        let count = places[begin..].iter().take_while(own).count();
                        for (i, row) in (first..m.min(first + down * block.units.rows)).enumerate()
                        {
                            let found = &found[i * WIDE..][..columns.len()];
                            let at = gradients::argmax(found);
                            // SAFETY: each place is one row's and one task's.
                            let best =
                                unsafe { largest.part(group * m + row..group * m + row + 1) };
                            best[0] = (found[at], (columns.start + at) as u32);
                            for &(column, place) in &places[begin..begin + count] {
                                let at = row * listed.len() + place;
                                // SAFETY: a listed place of a row belongs to one task, that of its column.
                                let value = unsafe { values.part(at..at + 1) };
                                value[0] = found[column as usize - columns.start];
                            }
                        }
                    }
                    give_back(packed);
                });
        }
        let best = |row: usize| {
            let mut best = largest[row];
            for of_group in largest[row..].iter().step_by(m).skip(1) {
                if of_group.0 > best.0 {
                    best = *of_group;
                }
            }
            best.1
        };
        ((0..m).map(best).collect(), values)
    }
}
