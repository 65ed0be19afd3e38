//! Attention of rows over a cache: a contiguous run of positions, then single ones (the ancestors in a tree).
//!
//! Keys are kept in tiles of 16 positions, element-major, so that one register holds a score of 16 positions and
//! no score needs a horizontal sum. Scores, their softmax and the values are summed by logical position, so a
//! node in a tree gets bit for bit what plain decoding gets, wherever its ancestors lie in the cache.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::elementwise::largest;
use super::simd::{InstructionSet, Simd, dispatch};
use super::{Pool, SharedValues};

const TILE: usize = 16;

/// How a cache holds keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheForm {
    /// Single precision.
    F32,
    /// Half precision (IEEE), as is usual beside weights that are rounded more.
    F16,
}

impl CacheForm {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// A value as it lies in a cache; zero bytes are zero, so that fresh pages need not be written.
trait Element: Copy {
    /// Stores values.
    fn narrow(from: &[f32], to: &mut [Self]);
    /// Loads the first 16.
    fn load<S: Simd>(x: &[Self]) -> S::V;
}

impl Element for f32 {
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    #[inline(always)]
    fn load<S: Simd>(x: &[Self]) -> S::V {
        S::load(x)
    }
}

/// The bits of a number in half precision.
impl Element for u16 {
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.reinterpret_cast_mut::<f16>()
            .convert_from_f32_slice(from);
    }
    #[inline(always)]
    fn load<S: Simd>(x: &[Self]) -> S::V {
        let (first, _) = x.reinterpret_cast::<f16>().as_chunks();
        S::widen(&first[0])
    }
}

/// Values that begin on a cache line, so that none of a register crosses two.
struct Aligned<E> {
    data: Vec<E>,
    start: usize,
}

impl<E: Element> Aligned<E> {
    fn new(zeros: impl Fn(usize) -> Vec<E>, len: usize) -> Self {
        let line = 64 / size_of::<E>();
        let data = zeros(len + line);
        let start = data.as_ptr().align_offset(64);
        Self {
            // An interpreter may not tell.
            start: if start <= line { start } else { 0 },
            data,
        }
    }
}

impl<E> Deref for Aligned<E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        &self.data[self.start..]
    }
}

impl<E> DerefMut for Aligned<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        &mut self.data[self.start..]
    }
}

/// Keys and values in one form.
struct Store<E> {
    /// `[K, capacity / 16, E, 16]`
    keys: Aligned<E>,
    /// `[K, capacity, E padded to 16]`
    values: Aligned<E>,
}

enum Form {
    F32(Store<f32>),
    F16(Store<u16>),
}

/// Keys and values of one layer and one slot.
pub struct KvLayer {
    form: Form,
    layout: KvLayout,
}

/// Where the values of a position lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KvLayout {
    heads: usize,
    head_dim: usize,
    capacity: usize,
}

impl KvLayout {
    fn key(&self, head: usize, position: usize) -> usize {
        (head * self.capacity + position / TILE * TILE) * self.head_dim + position % TILE
    }

    fn value(&self, head: usize, position: usize) -> usize {
        (head * self.capacity + position) * self.head_dim.next_multiple_of(TILE)
    }
}

impl<E: Element> Store<E> {
    fn new(layout: KvLayout, zeros: impl Fn(usize) -> Vec<E>) -> Self {
        let (rows, e) = (layout.heads * layout.capacity, layout.head_dim);
        Self {
            keys: Aligned::new(&zeros, rows * e),
            values: Aligned::new(&zeros, rows * e.next_multiple_of(TILE)),
        }
    }

    fn write(&mut self, layout: KvLayout, position: usize, key: &[f32], value: &[f32]) {
        for head in 0..layout.heads {
            let from = head * layout.head_dim..(head + 1) * layout.head_dim;
            let at = layout.value(head, position);
            // By way of where the value will be.
            let line = at..at + layout.head_dim;
            E::narrow(&key[from.clone()], &mut self.values[line.clone()]);
            let at = layout.key(head, position);
            for (i, &k) in self.values[line.clone()].iter().enumerate() {
                self.keys[at + i * TILE] = k;
            }
            E::narrow(&value[from], &mut self.values[line]);
        }
    }

    /// The first `count` positions of another store of this layout; whole tiles of keys are copied.
    fn copy_first(&mut self, layout: KvLayout, other: &Self, count: usize) {
        for head in 0..layout.heads {
            let at = layout.key(head, 0);
            let keys = at..at + count.next_multiple_of(TILE) * layout.head_dim;
            self.keys[keys.clone()].copy_from_slice(&other.keys[keys]);
            let values = layout.value(head, 0)..layout.value(head, count);
            self.values[values.clone()].copy_from_slice(&other.values[values]);
        }
    }

    fn copy(&mut self, layout: KvLayout, from: usize, to: usize) {
        for head in 0..layout.heads {
            let (a, b) = (layout.key(head, from), layout.key(head, to));
            for i in 0..layout.head_dim {
                self.keys[b + i * TILE] = self.keys[a + i * TILE];
            }
            let (a, b) = (layout.value(head, from), layout.value(head, to));
            self.values.copy_within(a..a + layout.head_dim, b);
        }
    }
}

impl KvLayer {
    /// Room for `capacity` positions of `heads` kv heads. The pages stay untouched until they are written.
    pub fn new(form: CacheForm, heads: usize, head_dim: usize, capacity: usize) -> Self {
        let layout = KvLayout {
            heads,
            head_dim,
            capacity: capacity.next_multiple_of(TILE),
        };
        Self {
            form: match form {
                CacheForm::F32 => Form::F32(Store::new(layout, |n| vec![0.0; n])),
                CacheForm::F16 => Form::F16(Store::new(layout, |n| vec![0; n])),
            },
            layout,
        }
    }

    /// Stores one row: `key` and `value` `[K, E]`.
    pub fn write(&mut self, position: usize, key: &[f32], value: &[f32]) {
        let layout = self.layout;
        assert!(position < layout.capacity, "position outside the cache");
        match &mut self.form {
            Form::F32(store) => store.write(layout, position, key, value),
            Form::F16(store) => store.write(layout, position, key, value),
        }
    }

    /// Copies the first `count` rows of another cache.
    ///
    /// # Panics
    /// If that has another form or size, or fewer positions.
    pub fn copy_first(&mut self, other: &Self, count: usize) {
        assert_eq!(self.layout, other.layout);
        assert!(count <= self.layout.capacity, "rows outside the cache");
        match (&mut self.form, &other.form) {
            (Form::F32(to), Form::F32(from)) => to.copy_first(self.layout, from, count),
            (Form::F16(to), Form::F16(from)) => to.copy_first(self.layout, from, count),
            _ => panic!("caches of different forms"),
        }
    }

    /// Copies the row at `from` to `to`.
    pub fn copy(&mut self, from: usize, to: usize) {
        match &mut self.form {
            _ if from == to => {}
            Form::F32(store) => store.copy(self.layout, from, to),
            Form::F16(store) => store.copy(self.layout, from, to),
        }
    }
}

/// What one row sees.
#[derive(Clone, Copy)]
pub struct AttentionRow<'a> {
    /// The slot's cache of this layer.
    pub cache: &'a KvLayer,
    /// Positions `first..contiguous` of the cache, in order; those before it are out of the row's window, and not read.
    pub first: usize,
    /// Where they end.
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
        let kv_heads = cache.layout.heads;
        let group = heads / kv_heads;
        for kv_head in 0..kv_heads {
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
    let e = row(0).cache.layout.head_dim;
    assert_eq!(q.len(), m * heads * e);
    assert_eq!(out.len(), q.len());
    for row in (0..m).map(row) {
        let AttentionRow {
            cache,
            first,
            contiguous,
            scattered,
        } = row;
        assert!(first <= contiguous, "places {first}..{contiguous}");
        assert!(
            contiguous - first + scattered.len() > 0,
            "a row sees nothing"
        );
        let behind = scattered.first().is_none_or(|&p| p as usize >= contiguous);
        let rising = scattered.windows(2).all(|w| w[0] < w[1]);
        let inside = scattered
            .last()
            .is_none_or(|&p| (p as usize) < cache.layout.capacity);
        assert!(contiguous <= cache.layout.capacity && cache.layout.head_dim == e);
        assert!(behind && rising && inside, "places {scattered:?}");
    }
    let level = InstructionSet::detect();
    let target = &SharedValues::new(out);
    ITEMS.with_borrow_mut(|items| {
        split(m, row, heads, pool.threads(), items);
        let items = &items[..];
        pool.shares(items.len(), 1, |range| {
            SCORES.with_borrow_mut(|scores| {
                for item in &items[range] {
                    dispatch!(level, some_queries(row, item, heads, q, scores, target): (row: RowOf<'_>, item: &Item, heads: usize, q: &[f32], scores: &mut Vec<f32>, target: &SharedValues<'_, f32>) <>);
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
    target: &SharedValues<'_, f32>,
) {
    let KvLayer { form, layout } = row(item.rows.start).cache;
    let (e, group) = (layout.head_dim, heads / layout.heads);
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
    match form {
        Form::F32(store) => of_count::<S, f32>(store, *layout, query, item, scores, target),
        Form::F16(store) => of_count::<S, u16>(store, *layout, query, item, scores, target),
    }
}

#[inline(always)]
fn of_count<'q, S: Simd, E: Element>(
    store: &Store<E>,
    layout: KvLayout,
    query: impl Fn(usize) -> Query<'q>,
    item: &Item,
    scores: &mut Vec<f32>,
    target: &SharedValues<'_, f32>,
) {
    let head = &Head {
        keys: &store.keys,
        values: &store.values,
        layout,
        head: item.kv_head,
    };
    match item.count {
        1 => queries::<S, E, 1>(head, std::array::from_fn(query), scores, target),
        2 => queries::<S, E, 2>(head, std::array::from_fn(query), scores, target),
        3 => queries::<S, E, 3>(head, std::array::from_fn(query), scores, target),
        4 => queries::<S, E, 4>(head, std::array::from_fn(query), scores, target),
        _ => queries::<S, E, MOST>(head, std::array::from_fn(query), scores, target),
    }
}

/// Keys and values of a cache, and the kv head whose are meant.
struct Head<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    layout: KvLayout,
    head: usize,
}

#[inline(always)]
fn queries<S: Simd, E: Element, const Q: usize>(
    head: &Head<'_, E>,
    queries: [Query<'_>; Q],
    scores: &mut Vec<f32>,
    target: &SharedValues<'_, f32>,
) {
    let e = head.layout.head_dim;
    // Scores of all places from the tile of the first to the last that any of them sees, then compacted to logical
    // positions. A score's index counts from `base`.
    let first = queries.iter().map(|q| q.row.first).min();
    let base = first.unwrap_or(0) / TILE * TILE;
    let last = |q: &Query<'_>| {
        let scattered = q.row.scattered.last().map_or(0, |&p| p as usize + 1);
        q.row.contiguous.max(scattered)
    };
    let places = queries
        .iter()
        .map(last)
        .max()
        .unwrap_or(0)
        .next_multiple_of(TILE)
        - base;
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
        let together = ((places - start) / TILE).min(S::SUMS / Q);
        start += match together {
            4.. => tile_scores::<S, E, Q, 4>(head, base, start, vectors, places, scores),
            2.. => tile_scores::<S, E, Q, 2>(head, base, start, vectors, places, scores),
            _ => tile_scores::<S, E, Q, 1>(head, base, start, vectors, places, scores),
        };
    }
    let mut inverse = [0.0; Q];
    for (i, q) in queries.iter().enumerate() {
        let scores = &mut scores[i * places..(i + 1) * places];
        let contiguous = q.row.contiguous - base;
        // Places rise, and each lies at or behind its logical position.
        for (j, &place) in q.row.scattered.iter().enumerate() {
            scores[contiguous + j] = scores[place as usize - base];
        }
        let (first, seen) = (q.row.first - base, contiguous + q.row.scattered.len());
        inverse[i] = softmax::<S>(&mut scores[first..seen], 1.0 / (e as f32).sqrt());
        // What others of these queries see before it weighs nothing here.
        scores[..first].fill(0.0);
    }
    let weights = &Weights {
        base,
        places,
        values: scores,
    };
    let padded = e.next_multiple_of(TILE);
    // As many sums at a time as there is room for.
    let mut column = 0;
    while column < padded {
        let room = (S::SUMS / Q).clamp(1, 4);
        let wide = ((padded - column) / TILE).min(room);
        match wide {
            4 => mix::<S, E, Q, 4>(head, &queries, weights, inverse, column, target),
            3 => mix::<S, E, Q, 3>(head, &queries, weights, inverse, column, target),
            2 => mix::<S, E, Q, 2>(head, &queries, weights, inverse, column, target),
            _ => mix::<S, E, Q, 1>(head, &queries, weights, inverse, column, target),
        }
        column += wide * TILE;
    }
}

/// Scores of `T` tiles of places from `base + start` on, so many that additions need not wait for one another; returns how
/// many places those are.
#[inline(always)]
fn tile_scores<S: Simd, E: Element, const Q: usize, const T: usize>(
    head: &Head<'_, E>,
    base: usize,
    start: usize,
    vectors: &[[f32; Q]],
    places: usize,
    scores: &mut [f32],
) -> usize {
    let e = head.layout.head_dim;
    let at = head.layout.key(head.head, base + start);
    let keys = &head.keys[at..at + T * e * TILE];
    let keys: [&[E]; T] = std::array::from_fn(|t| &keys[t * e * TILE..(t + 1) * e * TILE]);
    let next = &keys[0][0]; // a group of tiles on, as many lines in turn
    let mut acc = [[S::zero(); T]; Q];
    for (i, vector) in vectors.iter().enumerate() {
        let mut lines = [S::zero(); T];
        for t in 0..T {
            if starts_line::<E>(t) {
                S::prefetch(next, (T * e + T * i + t) * TILE);
            }
            lines[t] = E::load::<S>(&keys[t][i * TILE..(i + 1) * TILE]);
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

/// Whether the `register`-th register of values in a row begins a cache line.
const fn starts_line<E>(register: usize) -> bool {
    (register * TILE * size_of::<E>()).is_multiple_of(64)
}

/// Places whose values are asked for ahead.
const AHEAD: usize = 16;

impl<E: Element> Head<'_, E> {
    /// `W` registers of the values of a place, from `column` on.
    #[inline(always)]
    fn values<S: Simd, const W: usize>(&self, place: usize, column: usize) -> [S::V; W] {
        let at = self.layout.value(self.head, place) + column;
        let line = &self.values[at..at + W * TILE];
        let ahead = AHEAD * self.layout.head_dim.next_multiple_of(TILE);
        let mut values = [S::zero(); W];
        for w in 0..W {
            if starts_line::<E>(w) {
                S::prefetch(&line[w * TILE], ahead);
            }
            values[w] = E::load::<S>(&line[w * TILE..]);
        }
        values
    }
}

/// What each query weighs the values with, before division by their sum: `places` a query, by logical position from `base`
/// on.
struct Weights<'a> {
    base: usize,
    places: usize,
    values: &'a [f32],
}

/// The mix of `W` registers of values from `column` on, summed by logical position.
#[inline(always)]
fn mix<S: Simd, E: Element, const Q: usize, const W: usize>(
    head: &Head<'_, E>,
    queries: &[Query<'_>; Q],
    weights: &Weights<'_>,
    inverse: [f32; Q],
    column: usize,
    target: &SharedValues<'_, f32>,
) {
    let e = head.layout.head_dim;
    let Weights {
        base,
        places,
        values,
    } = *weights;
    let weights: [&[f32]; Q] = std::array::from_fn(|q| &values[q * places..(q + 1) * places]);
    let mut acc = [[S::zero(); W]; Q];
    let common = queries.iter().map(|q| q.row.contiguous).min().unwrap_or(0) - base;
    let shared = weights.map(|w| w[..common].as_ptr());
    for place in 0..common {
        let values = head.values::<S, W>(base + place, column);
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
        let mut acc = [S::zero(); W];
        for w in 0..W {
            acc[w] = S::load(&sums[q][w]);
        }
        let contiguous = base + common..query.row.contiguous;
        let scattered = query.row.scattered.iter().map(|&p| p as usize);
        for (position, place) in contiguous.chain(scattered).enumerate() {
            let values = head.values::<S, W>(place, column);
            let weight = S::splat(weights[q][common + position]);
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
    // Sixteen partial sums by logical position, whatever the length.
    let mut sums = S::zero();
    let (tiles, rest) = scores.as_chunks_mut::<TILE>();
    for tile in tiles {
        let weights = S::exp(S::fma(S::load(tile), factor, largest));
        S::store(weights, tile);
        sums = S::add(sums, weights);
    }
    let mut last = [f32::NEG_INFINITY; TILE];
    last[..rest.len()].copy_from_slice(rest);
    let weights = S::exp(S::fma(S::load(&last), factor, largest));
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

    fn filled(
        form: CacheForm,
        heads: usize,
        e: usize,
        positions: &[usize],
        capacity: usize,
    ) -> KvLayer {
        let mut cache = KvLayer::new(form, heads, e, capacity);
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
        /// Rows of a window see what a cache of the window's positions alone would give, bit for bit: in a tree as in a
        /// chain, and whatever rows with other windows pass beside them. What lies before it may be anything.
        #[test]
        fn a_window_is_all_that_a_row_reads(
            committed in 1usize..if cfg!(miri) { 20 } else { 70 }, path in 1usize..5, window in 1usize..40,
            e in prop::sample::select(vec![8usize, 16, 64]), half in any::<bool>(),
        ) {
            let form = if half { CacheForm::F16 } else { CacheForm::F32 };
            let (kv, heads) = (2, 4);
            let spread: Vec<usize> = (0..path).map(|i| committed + 2 * i + 1).collect();
            let tree_positions: Vec<usize> = (0..committed).chain(spread.clone()).collect();
            let plain_positions: Vec<usize> = (0..committed + path).collect();
            let mut tree = filled(form, kv, e, &tree_positions, 128);
            let mut plain = filled(form, kv, e, &plain_positions, 128);
            let first = (committed + path).saturating_sub(window);
            for position in 0..first.min(committed) {
                let broken = vec![60000.0; kv * e];
                tree.write(position, &broken, &broken);
                plain.write(position, &broken, &broken);
            }
            let scattered: Vec<u32> = spread.iter().map(|&p| p as u32).collect();
            let q: Vec<f32> = (0..2 * heads * e).map(|i| number(3 * i + 5)).collect();
            let pool = Pool::new(2);
            let whole = filled(form, kv, e, &plain_positions, 128);
            let attend = |cache: &KvLayer, first: usize, contiguous: usize, scattered: &[u32], beside: usize| {
                // The second row sees more, so that both pass the same keys.
                let row = |i| match i {
                    0 => AttentionRow { cache, first, contiguous, scattered },
                    _ => AttentionRow { cache, first: beside.min(contiguous), contiguous, scattered },
                };
                let mut out = vec![0.0; q.len()];
                attention(&pool, &q, 2, &row, heads, &mut out);
                out.truncate(heads * e);
                out
            };
            let (begin, skipped) = (first.min(committed), first.saturating_sub(committed));
            let expected = attend(&whole, first, committed + path, &[], first);
            prop_assert_eq!(&expected, &attend(&plain, first, committed + path, &[], first));
            prop_assert_eq!(&expected, &attend(&tree, begin, committed, &scattered[skipped..], begin));
            prop_assert_eq!(&expected, &attend(&whole, first, committed + path, &[], 0));
        }

        #[test]
        fn scattered_ancestors_give_bit_for_bit_the_contiguous_result(
            committed in 0usize..if cfg!(miri) { 20 } else { 40 }, path in 1usize..6, e in prop::sample::select(vec![8usize, 16, 64, 80, 128]),
            half in any::<bool>(),
        ) {
            let (form, exact) = if half { (CacheForm::F16, 1e-3) } else { (CacheForm::F32, 1e-5) };
            let (kv, group) = (2, 3);
            let heads = kv * group;
            let spread: Vec<usize> = (0..path).map(|i| committed + 2 * i + 1).collect();
            let q: Vec<f32> = (0..heads * e).map(|i| number(3 * i + 5)).collect();
            let scattered: Vec<u32> = spread.iter().map(|&p| p as u32).collect();
            let tree_positions: Vec<usize> = (0..committed).chain(spread).collect();
            let plain_positions: Vec<usize> = (0..committed + path).collect();
            let tree = filled(form, kv, e, &tree_positions, 64);
            let plain = filled(form, kv, e, &plain_positions, 64);
            let pool = Pool::new(2);
            let (mut a, mut b) = (vec![0.0; heads * e], vec![0.0; heads * e]);
            let row = |_| AttentionRow { cache: &tree, first: 0, contiguous: committed, scattered: &scattered };
            attention(&pool, &q, 1, &row, heads, &mut a);
            let row = |_| AttentionRow { cache: &plain, first: 0, contiguous: committed + path, scattered: &[] };
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
                    prop_assert!((f64::from(a[h * e + i]) - expected).abs() < exact);
                }
            }
        }
    }
}
