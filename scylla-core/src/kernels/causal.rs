//! Attention over packed rows, and its gradient, as training takes it: whole documents at once, nothing kept.
//!
//! Scores of a block of rows with all keys before its end are one product, as is the mix of values; both sides of a product
//! are packed once for all heads of a group. Beside the keys of the documents themselves (step 0), a row may see keys of its
//! own from later steps: EAGLE-3's training-time test (arXiv:2503.01840), in which step `i` runs each row behind its own
//! steps before.

use std::cell::RefCell;
use std::ops::Range;

use super::SharedValues;
use super::product::{Products, Right, View};
use super::simd::{InstructionSet, Simd, dispatch};

/// How packed rows see each other.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// A.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// E.
    pub head_dim: usize,
    /// Rows of each document, apart from all others; rows of none are not touched.
    pub documents: &'a [Range<usize>],
    /// Positions of its document that a row sees at most, itself included.
    pub window: Option<usize>,
}

/// Keys or values by step, each `[M, K E]`: those of step 0 are seen by the rows at and behind them, those of later steps by
/// their own row alone.
pub type Steps<'a> = &'a [&'a [f32]];

/// Rows of a block.
const BLOCK: usize = 128;

impl Packed<'_> {
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn check(&self, q: &[f32], k: Steps<'_>, v: Steps<'_>) -> usize {
        let rows = q.len() / self.q_width();
        assert_eq!(q.len(), rows * self.q_width());
        assert!(self.heads.is_multiple_of(self.kv_heads) && k.len() == v.len() && !k.is_empty());
        let whole = |x: &&[f32]| x.len() == rows * self.kv_width();
        assert!(
            k.iter().all(whole) && v.iter().all(whole),
            "keys or values of other rows"
        );
        let inside = |d: &Range<usize>| d.start <= d.end && d.end <= rows;
        assert!(
            self.documents.iter().all(inside),
            "a document outside the {rows} rows"
        );
        let mut order: Vec<_> = self.documents.iter().collect();
        order.sort_by_key(|d| d.start);
        assert!(
            order.windows(2).all(|w| w[0].end <= w[1].start),
            "documents that overlap"
        );
        rows
    }

    /// Documents and kv heads, one after the other.
    fn tasks(&self) -> usize {
        self.documents.len() * self.kv_heads
    }

    fn task(&self, task: usize) -> (Range<usize>, usize) {
        (
            self.documents[task / self.kv_heads].clone(),
            task % self.kv_heads,
        )
    }

    fn group(&self, kv: usize) -> Range<usize> {
        let each = self.heads / self.kv_heads;
        kv * each..(kv + 1) * each
    }

    /// Keys of the document that a row sees.
    fn sees(&self, row: usize) -> Range<usize> {
        (row + 1).saturating_sub(self.window.unwrap_or(usize::MAX))..row + 1
    }
}

/// Buffers of a thread.
#[derive(Default)]
struct Scratch {
    /// `[BLOCK, keys]`
    scores: Vec<f32>,
    slopes: Vec<f32>,
    /// Scores of the row's own later keys `[BLOCK, steps]`, and their slopes.
    own: Vec<f32>,
    own_slopes: Vec<f32>,
    /// `[BLOCK, E]`
    mixed: Vec<f32>,
    /// `[rows, E]`
    key_grad: Vec<f32>,
    value_grad: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// One document, one kv head and one of its heads.
struct Head<'a> {
    shape: &'a Packed<'a>,
    products: &'a Products,
    document: Range<usize>,
    head: usize,
    kv: usize,
    q: &'a [f32],
    k: Steps<'a>,
    v: Steps<'a>,
    /// `[E, keys]`
    keys: &'a Right,
}

impl<'a> Head<'a> {
    /// Where the head's values of a row begin, `[M, A E]`.
    fn at(&self, row: usize) -> usize {
        (self.document.start + row) * self.shape.q_width() + self.head * self.shape.head_dim
    }

    /// The same of its key, `[M, K E]`.
    fn kv_at(&self, row: usize) -> usize {
        (self.document.start + row) * self.shape.kv_width() + self.kv * self.shape.head_dim
    }

    /// Rows of the head in `x` `[M, A E]`.
    fn rows<'b>(&self, x: &'b [f32], block: &Range<usize>) -> View<'b> {
        let e = self.shape.head_dim;
        View::strided(
            &x[self.at(block.start)..],
            block.len(),
            e,
            self.shape.q_width(),
        )
    }

    /// The row's key or value of a later step.
    fn own<'b>(&self, of: &'b [f32], row: usize) -> &'b [f32] {
        &of[self.kv_at(row)..][..self.shape.head_dim]
    }

    /// What a block's rows pay to the keys before its end, and to the rows' own later keys: probabilities where `whole`, else
    /// as they are before they are divided by their sums. `factors` gets what makes them probabilities.
    fn weigh(
        &self,
        block: &Range<usize>,
        whole: bool,
        scores: &mut [f32],
        own: &mut [f32],
        factors: &mut [f32],
    ) {
        let (end, later) = (block.end, self.k.len() - 1);
        self.products
            .multiply_packed(self.rows(self.q, block), self.keys, false, scores, end);
        for (i, row) in block.clone().enumerate() {
            let q = &self.q[self.at(row)..][..self.shape.head_dim];
            for (own, k) in own[i * later..(i + 1) * later].iter_mut().zip(&self.k[1..]) {
                *own = dot(q, self.own(k, row));
            }
        }
        let scale = (self.shape.head_dim as f32).sqrt().recip();
        let sees = |row: usize| self.shape.sees(row);
        dispatch!(InstructionSet::detect(), weigh_rows(scores, own, factors, whole, scale, block.clone(), &sees): (scores: &mut [f32], own: &mut [f32], factors: &mut [f32], whole: bool, scale: f32, block: Range<usize>, sees: &dyn Fn(usize) -> Range<usize>) <>);
    }
}

/// Always in the same order: four sums, then what is left.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// Softmax of each row over the keys it sees and its own later ones, multiplied by its factor where `whole`; zeros elsewhere.
#[inline(always)]
fn weigh_rows<S: Simd>(
    scores: &mut [f32],
    own: &mut [f32],
    factors: &mut [f32],
    whole: bool,
    scale: f32,
    block: Range<usize>,
    sees: &dyn Fn(usize) -> Range<usize>,
) {
    let (end, later) = (block.end, own.len() / block.len());
    for (i, scores) in scores.chunks_exact_mut(end).take(block.len()).enumerate() {
        let seen = sees(block.start + i);
        let own = &mut own[i * later..(i + 1) * later];
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        let scores = &mut scores[seen];
        let max = super::elementwise::largest(scores).max(super::elementwise::largest(own));
        let mut sums = S::zero();
        let (reference, scale) = (S::splat(-max * scale), S::splat(scale));
        let (tiles, rest) = scores.as_chunks_mut::<16>();
        for tile in tiles {
            let e = S::exp(S::fma(S::load(tile), scale, reference));
            sums = S::add(sums, e);
            S::store(e, tile);
        }
        let mut sum = S::sum(sums);
        // The last ones, and the row's own, through one register.
        for few in [rest, own] {
            for few in few.chunks_mut(16) {
                let mut lanes = [f32::NEG_INFINITY; 16];
                lanes[..few.len()].copy_from_slice(few);
                S::store(
                    S::exp(S::fma(S::load(&lanes), scale, reference)),
                    &mut lanes,
                );
                few.copy_from_slice(&lanes[..few.len()]);
                few.iter().for_each(|e| sum += e);
            }
        }
        factors[i] = 1.0 / sum;
        if whole {
            scores.iter_mut().for_each(|p| *p *= factors[i]);
            own.iter_mut().for_each(|p| *p *= factors[i]);
        }
    }
}

/// Writes the mix of values of each row `[M, A E]`; rows outside all documents get zeros.
///
/// # Panics
/// If sizes do not fit.
pub fn attend(
    products: &Products,
    shape: &Packed<'_>,
    q: &[f32],
    k: Steps<'_>,
    v: Steps<'_>,
    out: &mut [f32],
) {
    shape.check(q, k, v);
    assert_eq!(out.len(), q.len());
    out.fill(0.0);
    let (e, kv_width, later) = (shape.head_dim, shape.kv_width(), k.len() - 1);
    let out = SharedValues::new(out);
    products.pool.ranges(shape.tasks(), 1, |tasks| {
        for (document, kv) in tasks.map(|t| shape.task(t)) {
            let n = document.len();
            if n == 0 {
                continue;
            }
            let first = document.start * kv_width + kv * e;
            let keys = View::strided(&k[0][first..], n, e, kv_width).transposed();
            let values = View::strided(&v[0][first..], n, e, kv_width);
            let keys = Right::pack(&products.pool, products.form, keys);
            let values = Right::pack(&products.pool, products.form, values);
            SCRATCH.with_borrow_mut(|scratch| {
                for head in shape.group(kv) {
                    let h = Head {
                        shape,
                        products,
                        document: document.clone(),
                        head,
                        kv,
                        q,
                        k,
                        v,
                        keys: &keys,
                    };
                    for block in blocks(n) {
                        let end = block.end;
                        let scores = sized(&mut scratch.scores, block.len() * end);
                        let own = sized(&mut scratch.own, block.len() * later);
                        let factors = &mut [0.0; BLOCK][..block.len()];
                        h.weigh(&block, false, scores, own, factors);
                        let mixed = sized(&mut scratch.mixed, block.len() * e);
                        let p = View::new(scores, block.len(), end);
                        products.multiply_packed(p, &values, false, mixed, e);
                        for (i, row) in block.clone().enumerate() {
                            let mixed = &mut mixed[i * e..(i + 1) * e];
                            for (p, v) in own[i * later..(i + 1) * later].iter().zip(&h.v[1..]) {
                                axpy(*p, h.own(v, row), mixed);
                            }
                            // SAFETY: rows of one document and columns of one head, which are this task's.
                            let out = unsafe { out.part(h.at(row)..h.at(row) + e) };
                            let mixed = mixed.iter().map(|m| m * factors[i]);
                            out.iter_mut().zip(mixed).for_each(|(out, m)| *out = m);
                        }
                    }
                }
            });
        }
    });
}

fn blocks(n: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n)
        .step_by(BLOCK)
        .map(move |first| first..n.min(first + BLOCK))
}

/// `y += a x`
#[inline(always)]
fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// The gradients of [`attend`]'s inputs, by steps for keys and values; each is written whole.
///
/// # Panics
/// If sizes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn gradient(
    products: &Products,
    shape: &Packed<'_>,
    q: &[f32],
    k: Steps<'_>,
    v: Steps<'_>,
    grad: &[f32],
    q_grad: &mut [f32],
    k_grad: &mut [Vec<f32>],
    v_grad: &mut [Vec<f32>],
) {
    let rows = shape.check(q, k, v);
    assert!(grad.len() == q.len() && q_grad.len() == q.len());
    assert!(k_grad.len() == k.len() && v_grad.len() == k.len());
    let (e, kv_width, later) = (shape.head_dim, shape.kv_width(), k.len() - 1);
    q_grad.fill(0.0);
    for of_step in k_grad.iter_mut().chain(&mut *v_grad) {
        of_step.clear();
        of_step.resize(rows * kv_width, 0.0);
    }
    let q_grad = SharedValues::new(q_grad);
    let k_grad: Vec<_> = k_grad
        .iter_mut()
        .map(|g| SharedValues::new(&mut g[..]))
        .collect();
    let v_grad: Vec<_> = v_grad
        .iter_mut()
        .map(|g| SharedValues::new(&mut g[..]))
        .collect();
    let scale = (e as f32).sqrt().recip();
    products.pool.ranges(shape.tasks(), 1, |tasks| {
        for (document, kv) in tasks.map(|t| shape.task(t)) {
            let n = document.len();
            if n == 0 {
                continue;
            }
            let first = document.start * kv_width + kv * e;
            let pack = |x: &[f32], turned: bool| {
                let view = View::strided(&x[first..], n, e, kv_width);
                let view = if turned { view.transposed() } else { view };
                Right::pack(&products.pool, products.form, view)
            };
            let (keys, keys_down, values) = (pack(k[0], true), pack(k[0], false), pack(v[0], true));
            SCRATCH.with_borrow_mut(|scratch| {
                let key_grad = sized(&mut scratch.key_grad, n * e);
                let value_grad = sized(&mut scratch.value_grad, n * e);
                key_grad.fill(0.0);
                value_grad.fill(0.0);
                for head in shape.group(kv) {
                    let h = Head {
                        shape,
                        products,
                        document: document.clone(),
                        head,
                        kv,
                        q,
                        k,
                        v,
                        keys: &keys,
                    };
                    for block in blocks(n) {
                        let (count, end) = (block.len(), block.end);
                        let p = sized(&mut scratch.scores, count * end);
                        let own = sized(&mut scratch.own, count * later);
                        h.weigh(&block, true, p, own, &mut [0.0; BLOCK][..count]);
                        let down = h.rows(grad, &block);
                        let slopes = sized(&mut scratch.slopes, count * end);
                        products.multiply_packed(down, &values, false, slopes, end);
                        products.multiply(
                            View::new(p, count, end).transposed(),
                            down,
                            true,
                            &mut value_grad[..end * e],
                        );
                        let own_slopes = sized(&mut scratch.own_slopes, count * later);
                        for (i, row) in block.clone().enumerate() {
                            let down = &grad[h.at(row)..][..e];
                            let of = i * later..(i + 1) * later;
                            let (p, slopes) = (
                                &p[i * end..(i + 1) * end],
                                &mut slopes[i * end..(i + 1) * end],
                            );
                            let (own, own_slopes) = (&own[of.clone()], &mut own_slopes[of]);
                            for (slope, v) in own_slopes.iter_mut().zip(&v[1..]) {
                                *slope = dot(down, h.own(v, row));
                            }
                            // d softmax: p (slope - sum p slope), scaled as the scores were.
                            let mean = dot(p, slopes) + dot(own, own_slopes);
                            for (slope, p) in slopes
                                .iter_mut()
                                .zip(p)
                                .chain(own_slopes.iter_mut().zip(own))
                            {
                                *slope = p * (*slope - mean) * scale;
                            }
                        }
                        let slope_view = View::new(slopes, count, end);
                        products.multiply(
                            slope_view.transposed(),
                            h.rows(q, &block),
                            true,
                            &mut key_grad[..end * e],
                        );
                        let mixed = sized(&mut scratch.mixed, count * e);
                        products.multiply_packed(slope_view, &keys_down, false, mixed, e);
                        for (i, row) in block.clone().enumerate() {
                            let mixed = &mut mixed[i * e..(i + 1) * e];
                            let (q, down) = (&q[h.at(row)..][..e], &grad[h.at(row)..][..e]);
                            for step in 1..=later {
                                let (p, slope) =
                                    (own[i * later + step - 1], own_slopes[i * later + step - 1]);
                                axpy(slope, h.own(k[step], row), mixed);
                                let at = h.kv_at(row)..h.kv_at(row) + e;
                                // SAFETY: rows of one document and columns of one kv head, which are this task's.
                                let (k_grad, v_grad) = unsafe {
                                    (k_grad[step].part(at.clone()), v_grad[step].part(at))
                                };
                                axpy(slope, q, k_grad);
                                axpy(p, down, v_grad);
                            }
                            // SAFETY: rows of one document and columns of one head, which are this task's.
                            unsafe { q_grad.part(h.at(row)..h.at(row) + e) }.copy_from_slice(mixed);
                        }
                    }
                }
                for row in 0..n {
                    let at = first + row * kv_width..first + row * kv_width + e;
                    let from = row * e..(row + 1) * e;
                    // SAFETY: as above.
                    let (k_grad, v_grad) =
                        unsafe { (k_grad[0].part(at.clone()), v_grad[0].part(at)) };
                    k_grad.copy_from_slice(&key_grad[from.clone()]);
                    v_grad.copy_from_slice(&value_grad[from]);
                }
            });
        }
    });
}
