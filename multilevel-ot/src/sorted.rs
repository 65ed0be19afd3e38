//! Distances between sorted distributions, which is the transport between distributions over tokens nobody matched.

use crate::Scalar;
use crate::rows::Rows;

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

/// `sum_r |p_(r) - q_(r)|` of a teacher's and a student's probabilities, each sorted, the shorter padded with zeros;
/// `upstream` gets the gradient with respect to the student's.
pub(crate) fn distance<F: Scalar>(
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

/// Probabilities of a row, over what is in `out`.
pub(crate) fn probabilities<F: Scalar>(
    rows: &Rows<'_, F>,
    row: usize,
    temperature: f64,
    out: &mut Vec<F>,
) {
    out.clear();
    out.resize(rows.x[row].len(), F::zero());
    rows.add_probabilities(row, temperature, F::one(), out);
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
    }
}
