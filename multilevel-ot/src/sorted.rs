//! Distances between sorted distributions, which is the transport between distributions over tokens nobody matched.

use crate::Scalar;

/// Digits of a key: three make up the bits of a number from 0 to below 2.
const BITS: u32 = 10;
const BUCKETS: usize = 1 << BITS;

/// A whole number that is smaller the larger the probability `x` is, `0 <= x < 2`.
fn key(x: f32) -> u32 {
    (1 << (3 * BITS)) - 1 - x.to_bits()
}

fn digit(key: u32, pass: usize) -> usize {
    (key >> (pass as u32 * BITS)) as usize & (BUCKETS - 1)
}

type Counts = [[u32; BUCKETS]; 3];

fn count(counts: &mut Counts, key: u32) {
    for (pass, counts) in counts.iter_mut().enumerate() {
        counts[digit(key, pass)] += 1;
    }
}

/// Sorts by three passes over digits, of which `counts` says how many there are; equal keys keep their order.
fn by_digits<T: Copy + Default>(
    from: &mut Vec<T>,
    to: &mut Vec<T>,
    counts: &mut Counts,
    key: impl Fn(T) -> u32,
) {
    to.clear();
    to.resize(from.len(), T::default());
    for (pass, counts) in counts.iter_mut().enumerate() {
        let mut first = 0;
        for count in counts.iter_mut() {
            first += std::mem::replace(count, first);
        }
        for &x in from.iter() {
            let place = &mut counts[digit(key(x), pass)];
            to[*place as usize] = x;
            *place += 1;
        }
        std::mem::swap(from, to);
    }
}

/// Buffers that are kept from one row to the next.
#[derive(Debug, Default)]
pub struct Scratch<F> {
    values: Vec<F>,
    order: Vec<u32>,
    pairs: [Vec<u64>; 2],
    keys: [Vec<u32>; 2],
    tallies: [Vec<u64>; 2],
    says: Vec<u8>,
    kept: Vec<F>,
    places: Vec<u32>,
}

/// Places of the probabilities `x`, largest first, into `scratch.order`; equal ones keep their order.
pub(crate) fn order_f32(x: &[f32], scratch: &mut Scratch<f32>) {
    let mut counts = [[0; BUCKETS]; 3];
    let [from, to] = &mut scratch.pairs;
    from.clear();
    from.extend(x.iter().enumerate().map(|(i, &x)| {
        let key = key(x);
        count(&mut counts, key);
        u64::from(key) << 32 | i as u64
    }));
    by_digits(from, to, &mut counts, |x| (x >> 32) as u32);
    scratch.order.clear();
    scratch.order.extend(from.iter().map(|&x| x as u32));
}

/// The `n` largest of the probabilities `x`, largest first, into `scratch.values`; returns the sum of the others.
pub(crate) fn largest_f32(x: &[f32], n: usize, scratch: &mut Scratch<f32>) -> f32 {
    // Two counters in turn, as equal digits often follow each other.
    let mut leading = [[0u32; BUCKETS]; 2];
    for pair in x.chunks(2) {
        for (&x, leading) in pair.iter().zip(&mut leading) {
            leading[digit(key(x), 2)] += 1;
        }
    }
    // What has a digit beyond that of the n-th is not sorted.
    let mut before = 0;
    let fits = |d: &usize| {
        before += (leading[0][*d] + leading[1][*d]) as usize;
        before >= n
    };
    let last = (0..BUCKETS).find(fits).unwrap_or(BUCKETS - 1);
    let bound = ((last as u32 + 1) << (2 * BITS)) - 1;
    let [from, to] = &mut scratch.keys;
    from.clear();
    from.resize(x.len() + 1, 0);
    let (mut kept, mut rest) = (0, [0.0f32; 4]);
    for (i, &x) in x.iter().enumerate() {
        let key = key(x);
        from[kept] = key;
        let keep = key <= bound;
        kept += usize::from(keep);
        rest[i % 4] += if keep { 0.0 } else { x };
    }
    from.truncate(kept);
    let mut counts = [[0; BUCKETS]; 3];
    from.iter().for_each(|&key| count(&mut counts, key));
    by_digits(from, to, &mut counts, |key| key);
    let value = |key: &u32| f32::from_bits((1 << (3 * BITS)) - 1 - key);
    scratch.values.clear();
    scratch.values.extend(from.iter().take(n).map(value));
    from.iter().skip(n).map(value).sum::<f32>() + rest.iter().sum::<f32>()
}

pub(crate) fn order_f64(x: &[f64], scratch: &mut Scratch<f64>) {
    scratch.order.clear();
    scratch.order.extend(0..x.len() as u32);
    let larger = |a: &u32, b: &u32| x[*b as usize].total_cmp(&x[*a as usize]);
    scratch.order.sort_by(larger);
}

pub(crate) fn largest_f64(x: &[f64], n: usize, scratch: &mut Scratch<f64>) -> f64 {
    scratch.values.clear();
    scratch.values.extend_from_slice(x);
    scratch.values.sort_by(|a, b| b.total_cmp(a));
    scratch.values.drain(n.min(x.len())..).sum()
}

/// [`Scalar::distance`] by sorting both sides.
pub(crate) fn sorted_distance<F: Scalar>(
    teacher: &[F],
    student: &[F],
    scratch: &mut Scratch<F>,
    upstream: &mut [F],
) -> F {
    let shorter = teacher.len().min(student.len());
    let mut value = F::largest(teacher, shorter, scratch);
    F::order(student, scratch);
    for (&p, &j) in scratch.values.iter().zip(&scratch.order) {
        let q = student[j as usize];
        value = value + (p - q).abs();
        let up = if q > p { F::one() } else { F::zero() };
        let down = if q < p { F::one() } else { F::zero() };
        upstream[j as usize] = up - down;
    }
    for &j in &scratch.order[shorter..] {
        value = value + student[j as usize];
        upstream[j as usize] = F::one();
    }
    value
}

/// Buckets of probabilities by their leading bits, 32 to a factor of two; within one all have the same exponent.
const SHIFT: u32 = 18;
const PLACES: usize = 1 << (3 * BITS - SHIFT);
/// A bucket's count stands above the sum of what its numbers have beyond its lower end, in units of their last place.
const ONE: u64 = 1 << 40;

/// What a bucket says of the student's probabilities in it: below those of the same rank, above, or either.
const BELOW: u8 = 0;
const ABOVE: u8 = 1;
const EITHER: u8 = 2;

fn place(x: f32) -> usize {
    (x.to_bits() >> SHIFT) as usize & (PLACES - 1)
}

fn tally(x: &[f32], buckets: &mut Vec<u64>) {
    buckets.clear();
    buckets.resize(PLACES, 0);
    for &x in x {
        buckets[place(x)] += ONE | u64::from(x.to_bits() & ((1 << SHIFT) - 1));
    }
}

/// [`Scalar::distance`] of numbers below 2 by counting.
///
/// The distance is the integral of `|N_p(x) - N_q(x)|`, the numbers of probabilities above `x`. Where the difference at a
/// bucket's upper end is more than what the bucket holds, its sign is the same throughout: the integral follows from counts
/// and sums, and every probability of the student there is below, or above, the teacher's of the same rank. Only what is
/// left is sorted; where that is much, all is.
pub(crate) fn counted_distance(
    teacher: &[f32],
    student: &[f32],
    scratch: &mut Scratch<f32>,
    upstream: &mut [f32],
) -> f32 {
    let mut tallies = std::mem::take(&mut scratch.tallies);
    tally(teacher, &mut tallies[0]);
    tally(student, &mut tallies[1]);
    let mut says = std::mem::take(&mut scratch.says);
    says.clear();
    says.resize(PLACES, BELOW);
    // From the largest down; `entries` are the buckets to be sorted, with the difference at their upper end.
    let mut entries: Vec<(usize, i64)> = Vec::new();
    let (mut value, mut difference, mut left) = (0.0f64, 0i64, 0);
    for at in (0..PLACES).rev() {
        let [p, q] = [tallies[0][at], tallies[1][at]];
        let (n, m) = ((p / ONE) as i64, (q / ONE) as i64);
        if difference == 0 && n == 0 && m == 0 {
            continue;
        }
        if difference - m > 0 || difference + n < 0 || (n == 0 && m == 0) {
            let (lower, upper) = ends(at);
            // A unit of the last place, by the next number.
            let unit = f64::from(f32::from_bits(((at as u32) << SHIFT) + 1)) - lower;
            let beyond = |tally: u64| (tally % ONE) as f64 * unit;
            value += (difference as f64 * (upper - lower) + beyond(p) - beyond(q)).abs();
            says[at] = if difference > 0 { BELOW } else { ABOVE };
        } else {
            says[at] = EITHER;
            entries.push((at, difference));
            left += n + m;
        }
        difference += n - m;
    }
    if left as usize > (teacher.len() + student.len()) / 4 {
        (scratch.tallies, scratch.says) = (tallies, says);
        return sorted_distance(teacher, student, scratch, upstream);
    }
    let sign = [-1.0f32, 1.0, 0.0, 0.0];
    for (up, &q) in upstream.iter_mut().zip(student) {
        *up = sign[says[place(q)] as usize & 3];
    }
    let bound = entries
        .last()
        .map_or(f32::INFINITY, |&(at, _)| ends(at).0 as f32);
    let open = |x: &[f32], kept: &mut Vec<f32>, places: &mut Vec<u32>| {
        kept.clear();
        places.clear();
        for (block, x) in x.chunks(64).enumerate() {
            // Most of a vocabulary lies below all that is open.
            let largest = x.iter().fold(0.0, |a: f32, &b| if b > a { b } else { a });
            if largest < bound {
                continue;
            }
            for (i, &x) in x.iter().enumerate() {
                if says[place(x)] == EITHER {
                    kept.push(x);
                    places.push((block * 64 + i) as u32);
                }
            }
        }
    };
    let (mut kept, mut places) = (
        std::mem::take(&mut scratch.kept),
        std::mem::take(&mut scratch.places),
    );
    open(teacher, &mut kept, &mut places);
    largest_f32(&kept, kept.len(), scratch);
    open(student, &mut kept, &mut places);
    order_f32(&kept, scratch);
    let mut own = scratch
        .order
        .iter()
        .map(|&i| (kept[i as usize], places[i as usize]))
        .peekable();
    let mut others = scratch.values.iter().copied().peekable();
    for (at, mut difference) in entries {
        let (lower, mut x) = ends(at);
        let inside = |v: &f32| place(*v) == at;
        loop {
            let (p, q) = (
                others.peek().copied().filter(inside),
                own.peek().map(|q| q.0).filter(inside),
            );
            let Some(v) = p.into_iter().chain(q).reduce(f32::max) else {
                break;
            };
            value += difference.unsigned_abs() as f64 * (x - f64::from(v));
            x = f64::from(v);
            let mut same = 0;
            while others.next_if(|p| *p == v).is_some() {
                same += 1;
            }
            let mut before = 0;
            while let Some((_, j)) = own.next_if(|q| q.0 == v) {
                // Above the teacher's of the same rank, unless so many of those are at least as large.
                upstream[j as usize] =
                    match (difference - before >= 1, difference + same - before <= 0) {
                        (true, _) => -1.0,
                        (false, true) => 1.0,
                        (false, false) => 0.0,
                    };
                before += 1;
            }
            difference += same - before;
        }
        value += difference.unsigned_abs() as f64 * (x - lower);
    }
    (scratch.tallies, scratch.says, scratch.kept, scratch.places) = (tallies, says, kept, places);
    value as f32
}

/// The least number of a bucket, and of the next.
fn ends(at: usize) -> (f64, f64) {
    let least = |at: usize| f64::from(f32::from_bits((at as u32) << SHIFT));
    (least(at), least(at + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_sorted_by_digits_is_what_is_sorted(
            mut x in prop::collection::vec(any::<u16>().prop_map(|x| f32::from(x) / 32769.0), 1..300), same in 0usize..50, n in 0usize..400,
        ) {
            x.extend(std::iter::repeat_n(1e-30, same));
            let mut expected: Vec<u32> = (0..x.len() as u32).collect();
            expected.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]));
            let mut scratch = Scratch::default();
            order_f32(&x, &mut scratch);
            prop_assert_eq!(&scratch.order, &expected);
            let n = n.min(x.len());
            let rest = largest_f32(&x, n, &mut scratch);
            let sorted: Vec<f32> = expected.iter().map(|&i| x[i as usize]).collect();
            prop_assert_eq!(&scratch.values, &sorted[..n]);
            let others: f32 = sorted[n..].iter().sum();
            prop_assert!((rest - others).abs() <= 1e-5 * others.max(1e-30));
            let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let mut scratch = Scratch::default();
            order_f64(&wide, &mut scratch);
            prop_assert_eq!(&scratch.order, &expected);
            prop_assert!((largest_f64(&wide, n, &mut scratch) - f64::from(others)).abs() <= 1e-5 * f64::from(others).max(1.0));
        }

        #[test]
        fn distances_by_counting_are_those_by_sorting(
            (n, m) in (1usize..3000, 1usize..3000), spread in 0.1f32..12.0, alike in any::<bool>(), seed in any::<u64>(),
        ) {
            use rand::rngs::StdRng;
            use rand::{RngExt, SeedableRng};
            let mut rng = StdRng::seed_from_u64(seed);
            let mut softmax = |n: usize, spread: f32| -> Vec<f32> {
                let e: Vec<f32> = (0..n).map(|_| (spread * rng.random_range(-1.0f32..1.0)).exp()).collect();
                let total: f32 = e.iter().sum();
                e.iter().map(|e| e / total).collect()
            };
            let p = softmax(n, spread);
            let mut q = softmax(m, if alike { spread } else { 2.0 });
            if alike {
                // Ties with the teacher's.
                for (q, p) in q.iter_mut().zip(&p).step_by(3) {
                    *q = *p;
                }
            }
            let (mut counted, mut sorted) = (vec![f32::NAN; m], vec![f32::NAN; m]);
            let mut scratch = Scratch::default();
            let found = counted_distance(&p, &q, &mut scratch, &mut counted);
            let expected = sorted_distance(&p, &q, &mut scratch, &mut sorted);
            prop_assert!((found - expected).abs() <= 2e-5 * expected.max(0.1), "{} {}", found, expected);
            prop_assert_eq!(&counted, &sorted);
            // And again with buffers in use.
            prop_assert_eq!(counted_distance(&p, &q, &mut scratch, &mut counted), found);
        }
    }
}
