//! Attention of rows over a cache: a contiguous run of positions, then single ones (the ancestors in a tree).
//!
//! Keys are kept in tiles of 16 positions, element-major, so that one register holds a score of 16 positions and
//! no score needs a horizontal sum. Scores, their softmax and the values are summed by logical position, so a
//! node in a tree gets bit for bit what plain decoding gets, wherever its ancestors lie in the cache.

use super::elementwise::{exp, largest};
use super::simd::{Level, Simd, dispatch};
use super::{Pool, Shared};

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

/// Queries that pass the keys and values of one head together, at most.
const MOST: usize = 6;

/// Some queries of one kv head: pairs of rows and heads, numbered row by row within a slot.
struct Item {
    /// Rows of one cache.
    rows: std::ops::Range<usize>,
    kv_head: usize,
    /// First query and number of queries.
    first: usize,
    count: usize,
}

/// The work of one call: the queries of each cache and kv head, in portions that keep all threads busy.
fn items(rows: &[AttentionRow<'_>], heads: usize, threads: usize) -> Vec<Item> {
    let most = (rows.len() * heads / (2 * threads)).clamp(1, MOST);
    let mut items = Vec::new();
    let mut start = 0;
    while let Some(first) = rows.get(start) {
        let same = |r: &&AttentionRow<'_>| std::ptr::eq(r.cache, first.cache);
        let end = start + rows[start..].iter().take_while(same).count();
        let group = heads / first.cache.heads;
        for kv_head in 0..first.cache.heads {
            let queries = (end - start) * group;
            items.extend((0..queries).step_by(most).map(|first| Item {
                rows: start..end,
                kv_head,
                first,
                count: most.min(queries - first),
            }));
        }
        start = end;
    }
    items
}

/// Softmax attention of `q` `[M, A, E]` (heads of one group side by side, unscaled) into `out` `[M, A, E]`. Rows of one
/// cache lie one after the other.
///
/// # Panics
/// If a row sees nothing, places outside its cache, or scattered places that do not rise.
pub fn attention(pool: &Pool, q: &[f32], rows: &[AttentionRow<'_>], heads: usize, out: &mut [f32]) {
    let Some(first) = rows.first() else { return };
    let e = first.cache.head_dim;
    assert_eq!(q.len(), rows.len() * heads * e);
    assert_eq!(out.len(), q.len());
    for row in rows {
        let seen = row.contiguous + row.scattered.len();
        assert!(seen > 0, "a row sees nothing");
        let capacity = row.cache.capacity;
        let behind = row
            .scattered
            .first()
            .is_none_or(|&p| p as usize >= row.contiguous);
        let rising = row.scattered.windows(2).all(|w| w[0] < w[1]);
        let inside = row
            .scattered
            .last()
            .is_none_or(|&p| (p as usize) < capacity);
        assert!(row.contiguous <= capacity && row.cache.head_dim == e);
        assert!(behind && rising && inside, "places {:?}", row.scattered);
    }
    let level = Level::detect();
    let target = &Shared::new(out);
    let items = items(rows, heads, pool.threads());
    let items = &items;
    pool.ranges(items.len(), 1, |range| {
        thread_local! {
            static SCORES: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        SCORES.with_borrow_mut(|scores| {
            for item in &items[range] {
                dispatch!(level, some_queries(rows, item, heads, q, scores, target): (rows: &[AttentionRow<'_>], item: &Item, heads: usize, q: &[f32], scores: &mut Vec<f32>, target: &Shared<'_, f32>) <>);
            }
        });
    });
}

/// One query: its row, its vector, and where its result goes in `out`.
#[derive(Clone, Copy)]
struct Query<'a> {
    row: &'a AttentionRow<'a>,
    vector: &'a [f32],
    at: usize,
}

#[inline(always)]
fn some_queries<S: Simd>(
    rows: &[AttentionRow<'_>],
    item: &Item,
    heads: usize,
    q: &[f32],
    scores: &mut Vec<f32>,
    target: &Shared<'_, f32>,
) {
    let cache = rows[item.rows.start].cache;
    let e = cache.head_dim;
    let group = heads / cache.heads;
    let query = |i: usize| {
        let i = item.first + i.min(item.count - 1); // places beyond the last repeat it
        let row = item.rows.start + i / group;
        let at = (row * heads + item.kv_head * group + i % group) * e;
        Query {
            row: &rows[row],
            vector: &q[at..at + e],
            at,
        }
    };
    match item.count {
        1 => queries::<S, 1>(std::array::from_fn(query), item, scores, target),
        2 => queries::<S, 2>(std::array::from_fn(query), item, scores, target),
        3 => queries::<S, 3>(std::array::from_fn(query), item, scores, target),
        4 => queries::<S, 4>(std::array::from_fn(query), item, scores, target),
        _ => queries::<S, MOST>(std::array::from_fn(query), item, scores, target),
    }
}

#[inline(always)]
fn queries<S: Simd, const Q: usize>(
    queries: [Query<'_>; Q],
    item: &Item,
    scores: &mut Vec<f32>,
    target: &Shared<'_, f32>,
) {
    let cache = queries[0].row.cache;
    let e = cache.head_dim;
    // Scores of all places up to the last that any of them sees, then compacted to logical positions.
    let last = |q: &Query<'_>| {
        let scattered = q.row.scattered.last().map_or(0, |&p| p as usize + 1);
        q.row.contiguous.max(scattered)
    };
    let places = queries
        .iter()
        .map(last)
        .max()
        .unwrap_or(0)
        .next_multiple_of(TILE);
    scores.clear();
    scores.resize(Q * places, 0.0);
    let vectors = queries.map(|q| q.vector);
    for start in (0..places).step_by(TILE) {
        let at = cache.key_at(item.kv_head, start);
        tile_scores::<S, Q>(&cache.keys[at..at + e * TILE], vectors, |i, lanes| {
            S::store(lanes, &mut scores[i * places + start..][..TILE]);
        });
    }
    let mut inverse = [0.0; Q];
    for (i, q) in queries.iter().enumerate() {
        let scores = &mut scores[i * places..(i + 1) * places];
        // Places rise, and each lies at or behind its logical position.
        for (j, &place) in q.row.scattered.iter().enumerate() {
            scores[q.row.contiguous + j] = scores[place as usize];
        }
        let seen = q.row.contiguous + q.row.scattered.len();
        inverse[i] = softmax::<S>(&mut scores[..seen], 1.0 / (e as f32).sqrt());
    }
    let padded = e.next_multiple_of(TILE);
    // Four registers of each query at a time: with six queries 24 sums, as many as there is room for.
    let mut column = 0;
    while column < padded {
        let wide = ((padded - column) / TILE).min(4);
        match wide {
            4 => mix::<S, Q, 4>(&queries, item, scores, places, inverse, column, target),
            3 => mix::<S, Q, 3>(&queries, item, scores, places, inverse, column, target),
            2 => mix::<S, Q, 2>(&queries, item, scores, places, inverse, column, target),
            _ => mix::<S, Q, 1>(&queries, item, scores, places, inverse, column, target),
        }
        column += wide * TILE;
    }
}

#[inline(always)]
fn tile_scores<S: Simd, const Q: usize>(
    tile: &[f32],
    vectors: [&[f32]; Q],
    mut store: impl FnMut(usize, S::V),
) {
    let mut acc = [S::zero(); Q];
    for (i, line) in tile.chunks_exact(TILE).enumerate() {
        let keys = S::load(line);
        for q in 0..Q {
            acc[q] = S::fma(S::splat(vectors[q][i]), keys, acc[q]);
        }
    }
    for (q, acc) in acc.into_iter().enumerate() {
        store(q, acc);
    }
}

/// The mix of `W` registers of values from `column` on, summed by logical position.
#[inline(always)]
fn mix<S: Simd, const Q: usize, const W: usize>(
    queries: &[Query<'_>; Q],
    item: &Item,
    scores: &[f32],
    places: usize,
    inverse: [f32; Q],
    column: usize,
    target: &Shared<'_, f32>,
) {
    let cache = queries[0].row.cache;
    let e = cache.head_dim;
    let weights: [&[f32]; Q] = std::array::from_fn(|q| &scores[q * places..(q + 1) * places]);
    let values = |place: usize| -> [S::V; W] {
        let at = cache.value_at(item.kv_head, place) + column;
        let line = &cache.values[at..at + W * TILE];
        std::array::from_fn(|w| S::load(&line[w * TILE..]))
    };
    let mut acc = [[S::zero(); W]; Q];
    let common = queries.iter().map(|q| q.row.contiguous).min().unwrap_or(0);
    let shared = weights.map(|w| &w[..common]);
    #[allow(clippy::needless_range_loop)] // a place of the cache, and of every query's weights
    for place in 0..common {
        let values = values(place);
        for q in 0..Q {
            let weight = S::splat(shared[q][place]);
            for w in 0..W {
                acc[q][w] = S::fma(weight, values[w], acc[q][w]);
            }
        }
    }
    for (q, query) in queries.iter().enumerate() {
        let contiguous = query.row.contiguous;
        let scattered = query.row.scattered.iter().map(|&p| p as usize);
        for (position, place) in (common..contiguous).chain(scattered).enumerate() {
            let (values, weight) = (values(place), S::splat(weights[q][common + position]));
            for w in 0..W {
                acc[q][w] = S::fma(weight, values[w], acc[q][w]);
            }
        }
        for (w, acc) in acc[q].iter().enumerate() {
            let mut lanes = [0.0; TILE];
            S::store(*acc, &mut lanes);
            let from = column + w * TILE;
            let count = TILE.min(e.saturating_sub(from));
            // SAFETY: no other item holds this query, and its registers are written in turn.
            let out = unsafe { target.part(query.at + from..query.at + from + count) };
            for (o, v) in out.iter_mut().zip(lanes) {
                *o = v * inverse[q];
            }
        }
    }
}

/// Replaces scores by `exp(scale * (s - max))` and returns one over their sum.
#[inline(always)]
fn softmax<S: Simd>(scores: &mut [f32], scale: f32) -> f32 {
    let max = largest(scores);
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
