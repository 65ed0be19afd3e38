//! Attention of rows over a cache: a contiguous run of positions, then single ones (the ancestors in a tree).
//!
//! Keys are kept in tiles of 16 positions, element-major, so that one register holds a score of 16 positions and
//! no score needs a horizontal sum. Scores, their softmax and the values are summed by logical position, so a
//! node in a tree gets bit for bit what plain decoding gets, wherever its ancestors lie in the cache.

use std::cell::RefCell;
use std::ops::Range;

use super::elementwise::largest;
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
#[derive(Clone, Copy)]
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
    rows: Range<usize>,
    kv_head: usize,
    /// First query and number of queries.
    first: usize,
    count: usize,
}

/// What row `i` sees, for each row.
type RowOf<'a> = &'a (dyn Fn(usize) -> AttentionRow<'a> + Sync);

/// The work of one call: the queries of each cache and kv head, in portions that keep all threads busy.
fn split(m: usize, row: RowOf<'_>, heads: usize, threads: usize, items: &mut Vec<Item>) {
    let most = (m * heads / (2 * threads)).clamp(1, MOST);
    items.clear();
    let mut start = 0;
    while start < m {
        let cache = row(start).cache;
        let same = |&i: &usize| std::ptr::eq(row(i).cache, cache);
        let end = start + (start..m).take_while(same).count();
        let group = heads / cache.heads;
        for kv_head in 0..cache.heads {
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
}

thread_local! {
    static ITEMS: RefCell<Vec<Item>> = const { RefCell::new(Vec::new()) };
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Softmax attention of `q` `[M, A, E]` (heads of one group side by side, unscaled) into `out` `[M, A, E]`; `row` says
/// what a row sees. Rows of one cache lie one after the other.
///
/// # Panics
/// If a row sees nothing, places outside its cache, or scattered places that do not rise.
pub fn attention<'a>(
    pool: &Pool,
    q: &[f32],
    m: usize,
    row: RowOf<'a>,
    heads: usize,
    out: &mut [f32],
) {
    if m == 0 {
        return;
    }
    let e = row(0).cache.head_dim;
    assert_eq!(q.len(), m * heads * e);
    assert_eq!(out.len(), q.len());
    for row in (0..m).map(row) {
        let AttentionRow {
            cache,
            contiguous,
            scattered,
        } = row;
        assert!(contiguous + scattered.len() > 0, "a row sees nothing");
        let behind = scattered.first().is_none_or(|&p| p as usize >= contiguous);
        let rising = scattered.windows(2).all(|w| w[0] < w[1]);
        let inside = scattered
            .last()
            .is_none_or(|&p| (p as usize) < cache.capacity);
        assert!(contiguous <= cache.capacity && cache.head_dim == e);
        assert!(behind && rising && inside, "places {scattered:?}");
    }
    let level = Level::detect();
    let target = &Shared::new(out);
    ITEMS.with_borrow_mut(|items| {
        split(m, row, heads, pool.threads(), items);
        let items = &items[..];
        pool.shares(items.len(), 1, |range| {
            SCORES.with_borrow_mut(|scores| {
                for item in &items[range] {
                    dispatch!(level, some_queries(row, item, heads, q, scores, target): (row: RowOf<'_>, item: &Item, heads: usize, q: &[f32], scores: &mut Vec<f32>, target: &Shared<'_, f32>) <>);
                }
            });
        });
    });
}

/// One query: its row, its vector, and where its result goes in `out`.
#[derive(Clone, Copy)]
struct Query<'a> {
    row: AttentionRow<'a>,
    vector: &'a [f32],
    at: usize,
}

#[inline(always)]
fn some_queries<S: Simd>(
    row: RowOf<'_>,
    item: &Item,
    heads: usize,
    q: &[f32],
    scores: &mut Vec<f32>,
    target: &Shared<'_, f32>,
) {
    let cache = row(item.rows.start).cache;
    let e = cache.head_dim;
    let group = heads / cache.heads;
    let query = |i: usize| {
        let i = item.first + i.min(item.count - 1); // places beyond the last repeat it
        let r = item.rows.start + i / group;
        let at = (r * heads + item.kv_head * group + i % group) * e;
        Query {
            row: row(r),
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
    // The queries, element by element side by side, lie before the scores.
    scores.clear();
    scores.resize(Q * e + Q * places, 0.0);
    let (vectors, scores) = scores.split_at_mut(Q * e);
    let vectors = vectors.as_chunks_mut::<Q>().0;
    for (q, query) in queries.iter().enumerate() {
        for (to, &x) in vectors.iter_mut().zip(query.vector) {
            to[q] = x;
        }
    }
    let mut start = 0;
    while start < places {
        start += match (places - start) / TILE {
            4.. => tile_scores::<S, Q, 4>(cache, item.kv_head, start, vectors, places, scores),
            _ => tile_scores::<S, Q, 1>(cache, item.kv_head, start, vectors, places, scores),
        };
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

/// Scores of `T` tiles of places from `start` on, so many that additions need not wait for one another; returns how
/// many places those are.
#[inline(always)]
fn tile_scores<S: Simd, const Q: usize, const T: usize>(
    cache: &KvLayer,
    head: usize,
    start: usize,
    vectors: &[[f32; Q]],
    places: usize,
    scores: &mut [f32],
) -> usize {
    let e = cache.head_dim;
    let at = cache.key_at(head, start);
    let keys = &cache.keys[at..at + T * e * TILE];
    let keys: [&[f32]; T] = std::array::from_fn(|t| &keys[t * e * TILE..(t + 1) * e * TILE]);
    let next = &keys[0][0]; // a group of tiles on, as many lines in turn
    let mut acc = [[S::zero(); T]; Q];
    for (i, vector) in vectors.iter().enumerate() {
        let mut lines = [S::zero(); T];
        for t in 0..T {
            S::prefetch(next, (T * e + T * i + t) * TILE);
            lines[t] = S::load(&keys[t][i * TILE..(i + 1) * TILE]);
        }
        for q in 0..Q {
            let x = S::splat(vector[q]);
            for t in 0..T {
                acc[q][t] = S::fma(x, lines[t], acc[q][t]);
            }
        }
    }
    for (q, acc) in acc.into_iter().enumerate() {
        for (t, acc) in acc.into_iter().enumerate() {
            S::store(acc, &mut scores[q * places + start + t * TILE..][..TILE]);
        }
    }
    T * TILE
}

/// Places whose values are asked for ahead.
const AHEAD: usize = 16;

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
    let padded = e.next_multiple_of(TILE);
    let weights: [&[f32]; Q] = std::array::from_fn(|q| &scores[q * places..(q + 1) * places]);
    let values = |place: usize| -> [S::V; W] {
        let at = cache.value_at(item.kv_head, place) + column;
        let line = &cache.values[at..at + W * TILE];
        for w in 0..W {
            S::prefetch(&line[w * TILE], AHEAD * padded);
        }
        std::array::from_fn(|w| S::load(&line[w * TILE..]))
    };
    let mut acc = [[S::zero(); W]; Q];
    let common = queries.iter().map(|q| q.row.contiguous).min().unwrap_or(0);
    let shared = weights.map(|w| w[..common].as_ptr());
    for place in 0..common {
        let values = values(place);
        for q in 0..Q {
            // SAFETY: `shared` points at `common` values of each query. Checking six lengths at each place takes the
            // registers that the pointers need.
            let weight = S::splat(unsafe { *shared[q].add(place) });
            for w in 0..W {
                acc[q][w] = S::fma(weight, values[w], acc[q][w]);
            }
        }
    }
    // In memory, so that queries may be numbered from here on without keeping all sums there before.
    let mut sums = [[[0.0; TILE]; W]; Q];
    for q in 0..Q {
        for w in 0..W {
            S::store(acc[q][w], &mut sums[q][w]);
        }
    }
    for (q, query) in queries.iter().enumerate() {
        let mut acc: [S::V; W] = std::array::from_fn(|w| S::load(&sums[q][w]));
        let contiguous = query.row.contiguous;
        let scattered = query.row.scattered.iter().map(|&p| p as usize);
        for (position, place) in (common..contiguous).chain(scattered).enumerate() {
            let (values, weight) = (values(place), S::splat(weights[q][common + position]));
            for w in 0..W {
                acc[w] = S::fma(weight, values[w], acc[w]);
            }
        }
        for (w, acc) in acc.into_iter().enumerate() {
            let mut lanes = [0.0; TILE];
            S::store(S::mul(acc, S::splat(inverse[q])), &mut lanes);
            let from = column + w * TILE;
            let count = TILE.min(e.saturating_sub(from));
            // SAFETY: no other item holds this query, and its registers are written in turn.
            let out = unsafe { target.part(query.at + from..query.at + from + count) };
            out.copy_from_slice(&lanes[..count]);
        }
    }
}

/// Replaces scores by `exp(scale * (s - max))` and returns one over their sum.
#[inline(always)]
fn softmax<S: Simd>(scores: &mut [f32], scale: f32) -> f32 {
    let (largest, factor) = (S::splat(-scale * largest(scores)), S::splat(scale));
    let exp = |scores: &[f32]| S::exp(S::fma(S::load(scores), factor, largest));
    // Sixteen partial sums by logical position, whatever the length.
    let mut sums = S::zero();
    let (tiles, rest) = scores.as_chunks_mut::<TILE>();
    for tile in tiles {
        let weights = exp(tile);
        S::store(weights, tile);
        sums = S::add(sums, weights);
    }
    let mut last = [f32::NEG_INFINITY; TILE];
    last[..rest.len()].copy_from_slice(rest);
    let weights = exp(&last);
    S::store(weights, &mut last);
    rest.copy_from_slice(&last[..rest.len()]);
    1.0 / S::sum(S::add(sums, weights))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers from -1 to 1. No function whose last place may differ from call to call, as Miri's sine does.
    fn number(i: usize) -> f32 {
        (i * 7919 % 1009) as f32 / 504.0 - 1.0
    }

    /// The number that element `i` of all heads' key at a position is made of; values lie one further.
    fn place(position: usize, i: usize) -> usize {
        position * 331 + i
    }

    fn filled(heads: usize, e: usize, positions: &[usize], capacity: usize) -> KvLayer {
        let mut cache = KvLayer::new(heads, e, capacity);
        for (logical, &at) in positions.iter().enumerate() {
            let row = |salt: usize| -> Vec<f32> {
                (0..heads * e)
                    .map(|i| number(place(logical, i) + salt))
                    .collect()
            };
            cache.write(at, &row(0), &row(1));
        }
        cache
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 40 }))]
        #[test]
        fn scattered_ancestors_give_bit_for_bit_the_contiguous_result(
            committed in 0usize..if cfg!(miri) { 20 } else { 40 }, path in 1usize..6, e in prop::sample::select(vec![8usize, 16, 64, 80, 128]),
        ) {
            let (kv, group) = (2, 3);
            let heads = kv * group;
            let spread: Vec<usize> = (0..path).map(|i| committed + 2 * i + 1).collect();
            let q: Vec<f32> = (0..heads * e).map(|i| number(3 * i + 5)).collect();
            let scattered: Vec<u32> = spread.iter().map(|&p| p as u32).collect();
            let tree_positions: Vec<usize> = (0..committed).chain(spread).collect();
            let plain_positions: Vec<usize> = (0..committed + path).collect();
            let tree = filled(kv, e, &tree_positions, 64);
            let plain = filled(kv, e, &plain_positions, 64);
            let pool = Pool::new(2);
            let (mut a, mut b) = (vec![0.0; heads * e], vec![0.0; heads * e]);
            let row = |_| AttentionRow { cache: &tree, contiguous: committed, scattered: &scattered };
            attention(&pool, &q, 1, &row, heads, &mut a);
            let row = |_| AttentionRow { cache: &plain, contiguous: committed + path, scattered: &[] };
            attention(&pool, &q, 1, &row, heads, &mut b);
            prop_assert_eq!(&a, &b);
            // And it is softmax attention.
            for h in 0..heads {
                let key = |p: usize, i: usize, salt: usize| f64::from(number(place(p, (h / group) * e + i) + salt));
                let s: Vec<f64> = (0..committed + path)
                    .map(|p| (0..e).map(|i| f64::from(q[h * e + i]) * key(p, i, 0)).sum::<f64>() / (e as f64).sqrt())
                    .collect();
                let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = s.iter().map(|s| (s - max).exp()).sum();
                for i in 0..e {
                    let expected: f64 = s.iter().enumerate().map(|(p, s)| (s - max).exp() / total * key(p, i, 1)).sum();
                    prop_assert!((f64::from(a[h * e + i]) - expected).abs() < 1e-5);
                }
            }
        }
    }
}
