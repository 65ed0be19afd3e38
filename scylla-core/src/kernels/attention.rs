//! Attention of rows over a cache: a contiguous run of positions, then single ones (the ancestors in a tree).
//!
//! Keys are kept in tiles of 16 positions, element-major, so that one register holds a score of 16 positions and
//! no score needs a horizontal sum. Scores, their softmax and the values are summed by logical position, so a
//! node in a tree gets bit for bit what plain decoding gets, wherever its ancestors lie in the cache.

use super::Pool;
use super::elementwise::exp;
use super::simd::{Level, Simd, dispatch};

const TILE: usize = 16;

/// Keys and values of one layer and one slot.
pub struct KvLayer {
    /// `[K, capacity / 16, E, 16]`
    keys: Vec<f32>,
    /// `[K, capacity, E padded to 16]`
    values: Vec<f32>,
    heads: usize,
    head_dim: usize,
    capacity: usize,
}

impl KvLayer {
    /// Room for `capacity` positions of `heads` kv heads. The pages stay untouched until they are written.
    pub fn new(heads: usize, head_dim: usize, capacity: usize) -> Self {
        let capacity = capacity.next_multiple_of(TILE);
        Self {
            keys: vec![0.0; heads * capacity * head_dim],
            values: vec![0.0; heads * capacity * head_dim.next_multiple_of(TILE)],
            heads,
            head_dim,
            capacity,
        }
    }

    /// Bytes reserved.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.keys[..]) + size_of_val(&self.values[..])
    }

    fn key_at(&self, head: usize, position: usize) -> usize {
        (head * self.capacity + position / TILE * TILE) * self.head_dim + position % TILE
    }

    fn value_at(&self, head: usize, position: usize) -> usize {
        (head * self.capacity + position) * self.head_dim.next_multiple_of(TILE)
    }

    /// Stores one row: `key` and `value` `[K, E]`.
    pub fn write(&mut self, position: usize, key: &[f32], value: &[f32]) {
        assert!(position < self.capacity, "position outside the cache");
        for head in 0..self.heads {
            let from = head * self.head_dim..(head + 1) * self.head_dim;
            let at = self.key_at(head, position);
            for (i, &k) in key[from.clone()].iter().enumerate() {
                self.keys[at + i * TILE] = k;
            }
            let at = self.value_at(head, position);
            self.values[at..at + self.head_dim].copy_from_slice(&value[from]);
        }
    }

    /// Copies the row at `from` to `to`.
    pub fn copy(&mut self, from: usize, to: usize) {
        if from == to {
            return;
        }
        for head in 0..self.heads {
            let (a, b) = (self.key_at(head, from), self.key_at(head, to));
            for i in 0..self.head_dim {
                self.keys[b + i * TILE] = self.keys[a + i * TILE];
            }
            let (a, b) = (self.value_at(head, from), self.value_at(head, to));
            self.values.copy_within(a..a + self.head_dim, b);
        }
    }
}

/// What one row sees.
pub struct AttentionRow<'a> {
    /// The slot's cache of this layer.
    pub cache: &'a KvLayer,
    /// Positions `0..contiguous` of the cache, in order.
    pub contiguous: usize,
    /// Then these single positions of the cache, in order.
    pub scattered: &'a [u32],
}

/// Raw output, filled by threads for disjoint (row, head) pairs.
struct Out(*mut f32);
// SAFETY: each (row, head) range is written by the one thread that was handed it.
unsafe impl Sync for Out {}

/// Softmax attention of `q` `[M, A, E]` (heads of one group side by side, unscaled) into `out` `[M, A, E]`.
///
/// # Panics
/// If a row sees nothing, or a position outside its cache.
pub fn attention(pool: &Pool, q: &[f32], rows: &[AttentionRow<'_>], heads: usize, out: &mut [f32]) {
    let Some(first) = rows.first() else { return };
    let e = first.cache.head_dim;
    assert_eq!(q.len(), rows.len() * heads * e);
    assert_eq!(out.len(), q.len());
    let level = Level::detect();
    let target = Out(out.as_mut_ptr());
    let target = &target;
    pool.ranges(rows.len() * heads, 1.max(rows.len() * heads / (8 * pool.threads())), |range| {
        thread_local! {
            static SCORES: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        SCORES.with_borrow_mut(|scores| {
            for item in range {
                let (row, head) = (&rows[item / heads], item % heads);
                assert!(row.contiguous + row.scattered.len() > 0, "a row sees nothing");
                assert!(row.contiguous <= row.cache.capacity);
                let kv_head = head * row.cache.heads / heads;
                let q = &q[item * e..(item + 1) * e];
                // SAFETY: `item < M * A`, so the range lies within `out`; items are disjoint.
                let out = unsafe { std::slice::from_raw_parts_mut(target.0.add(item * e), e) };
                dispatch!(level, one_head(row, kv_head, q, scores, out): (row: &AttentionRow<'_>, kv_head: usize, q: &[f32], scores: &mut Vec<f32>, out: &mut [f32]) <>);
            }
        });
    });
}

#[inline(always)]
fn tile_scores<S: Simd>(tile: &[f32], q: &[f32], out: &mut [f32]) {
    let mut acc = S::zero();
    for (i, &q) in q.iter().enumerate() {
        acc = S::fma(S::splat(q), S::load(&tile[i * TILE..]), acc);
    }
    S::store(acc, out);
}

#[inline(always)]
fn one_head<S: Simd>(
    row: &AttentionRow<'_>,
    kv_head: usize,
    q: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let cache = row.cache;
    let e = cache.head_dim;
    let seen = row.contiguous + row.scattered.len();
    scores.clear();
    scores.resize(seen.next_multiple_of(TILE) + TILE, 0.0);
    let tile = |position: usize| {
        let at = cache.key_at(kv_head, position / TILE * TILE);
        &cache.keys[at..at + e * TILE]
    };
    for start in (0..row.contiguous).step_by(TILE) {
        tile_scores::<S>(tile(start), q, &mut scores[start..]);
    }
    for (i, &position) in row.scattered.iter().enumerate() {
        let mut lanes = [0.0; TILE];
        tile_scores::<S>(tile(position as usize), q, &mut lanes);
        scores[row.contiguous + i] = lanes[position as usize % TILE];
    }
    let inverse_sum = softmax::<S>(&mut scores[..seen], 1.0 / (e as f32).sqrt());
    let padded = e.next_multiple_of(TILE);
    let value = |position: usize| {
        let at = cache.value_at(kv_head, position);
        &cache.values[at..at + padded]
    };
    let mut column = 0;
    while column < padded {
        // Four registers at a time: enough to hide the latency of the additions.
        let width = (padded - column).min(4 * TILE);
        let mut acc = [S::zero(); 4];
        for (i, &weight) in scores[..seen].iter().enumerate() {
            let position = match i.checked_sub(row.contiguous) {
                None => i,
                Some(i) => row.scattered[i] as usize,
            };
            let v = &value(position)[column..column + width];
            let weight = S::splat(weight);
            if width == 4 * TILE {
                for j in 0..4 {
                    acc[j] = S::fma(weight, S::load(&v[j * TILE..]), acc[j]);
                }
            } else {
                for j in 0..width / TILE {
                    acc[j] = S::fma(weight, S::load(&v[j * TILE..]), acc[j]);
                }
            }
        }
        for (j, acc) in acc.iter().enumerate().take(width / TILE) {
            let mut lanes = [0.0; TILE];
            S::store(*acc, &mut lanes);
            let from = column + j * TILE;
            for (o, v) in out.iter_mut().skip(from).take(TILE).zip(lanes) {
                *o = v * inverse_sum;
            }
        }
        column += width;
    }
}

/// Replaces scores by `exp(scale * (s - max))` and returns one over their sum.
#[inline(always)]
fn softmax<S: Simd>(scores: &mut [f32], scale: f32) -> f32 {
    let mut max = f32::NEG_INFINITY;
    for &s in scores.iter() {
        max = max.max(s);
    }
    for s in scores.iter_mut() {
        *s = exp((*s - max) * scale);
    }
    // Sixteen partial sums by logical position, whatever the length.
    let mut lanes = [0.0f32; TILE];
    for chunk in scores.chunks(TILE) {
        for (lane, s) in lanes.iter_mut().zip(chunk) {
            *lane += s;
        }
    }
    1.0 / lanes.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filled(heads: usize, e: usize, positions: &[usize], capacity: usize) -> KvLayer {
        let mut cache = KvLayer::new(heads, e, capacity);
        for (logical, &at) in positions.iter().enumerate() {
            let row = |salt: f32| -> Vec<f32> {
                (0..heads * e)
                    .map(|i| ((logical * 31 + i) as f32 * 0.7 + salt).sin())
                    .collect()
            };
            cache.write(at, &row(0.0), &row(1.0));
        }
        cache
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn scattered_ancestors_give_bit_for_bit_the_contiguous_result(
            committed in 0usize..40, path in 1usize..6, e in prop::sample::select(vec![8usize, 16, 64, 80, 128]),
        ) {
            let (kv, group) = (2, 3);
            let heads = kv * group;
            let spread: Vec<usize> = (0..path).map(|i| committed + 2 * i + 1).collect();
            let q: Vec<f32> = (0..heads * e).map(|i| (i as f32 * 0.3).cos()).collect();
            let scattered: Vec<u32> = spread.iter().map(|&p| p as u32).collect();
            let tree_positions: Vec<usize> = (0..committed).chain(spread).collect();
            let plain_positions: Vec<usize> = (0..committed + path).collect();
            let tree = filled(kv, e, &tree_positions, 64);
            let plain = filled(kv, e, &plain_positions, 64);
            let pool = Pool::new(2);
            let (mut a, mut b) = (vec![0.0; heads * e], vec![0.0; heads * e]);
            attention(&pool, &q, &[AttentionRow { cache: &tree, contiguous: committed, scattered: &scattered }], heads, &mut a);
            attention(&pool, &q, &[AttentionRow { cache: &plain, contiguous: committed + path, scattered: &[] }], heads, &mut b);
            prop_assert_eq!(&a, &b);
            // And it is softmax attention.
            for h in 0..heads {
                let key = |p: usize, i: usize, salt: f64| (((p * 31 + (h / group) * e + i) as f32 * 0.7 + salt as f32) as f64).sin();
                let s: Vec<f64> = (0..committed + path)
                    .map(|p| (0..e).map(|i| f64::from(q[h * e + i]) * key(p, i, 0.0)).sum::<f64>() / (e as f64).sqrt())
                    .collect();
                let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = s.iter().map(|s| (s - max).exp()).sum();
                for i in 0..e {
                    let expected: f64 = s.iter().enumerate().map(|(p, s)| (s - max).exp() / total * key(p, i, 1.0)).sum();
                    prop_assert!((f64::from(a[h * e + i]) - expected).abs() < 1e-5);
                }
            }
        }
    }
}
