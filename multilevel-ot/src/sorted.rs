//! Distances between sorted distributions, which is the transport between distributions over tokens nobody matched.

use crate::rows::Rows;
use crate::Scalar;

const BITS: u32 = 11;

/// Places of `x`, largest value first, by three passes over digits of 11 bits. Equal values keep their order.
pub(crate) fn descending_f32(x: &[f32], order: &mut Vec<u32>) {
    // The order of whole numbers as that of the values, largest first.
    let key = |x: f32| {
        let bits = x.to_bits();
        match bits >> 31 {
            0 => !bits & (u32::MAX >> 1),
            _ => bits,
        }
    };
    sort_by_key(x.len(), |i| key(x[i]), order);
}

fn sort_by_key(n: usize, key: impl Fn(usize) -> u32, order: &mut Vec<u32>) {
    const BUCKETS: usize = 1 << BITS;
    let digit = |key: u32, pass: usize| (key >> (pass as u32 * BITS)) as usize & (BUCKETS - 1);
    let mut counts = [[0u32; BUCKETS]; 3];
    let mut from: Vec<u64> = Vec::with_capacity(n);
    for i in 0..n {
        let key = key(i);
        for (pass, counts) in counts.iter_mut().enumerate() {
            counts[digit(key, pass)] += 1;
        }
        from.push(u64::from(key) << 32 | i as u64);
    }
    let mut to = vec![0u64; n];
    for (pass, counts) in counts.iter_mut().enumerate() {
        if counts.iter().any(|&c| c as usize == n) {
            continue; // all alike
        }
        let mut first = 0;
        for count in counts.iter_mut() {
            first += std::mem::replace(count, first);
        }
        for &x in &from {
            let place = &mut counts[digit((x >> 32) as u32, pass)];
            to[*place as usize] = x;
            *place += 1;
        }
        std::mem::swap(&mut from, &mut to);
    }
    order.clear();
    order.extend(from.iter().map(|&x| x as u32));
}

/// Buffers of [`distance`].
#[derive(Default)]
pub(crate) struct Scratch {
    teacher: Vec<u32>,
    student: Vec<u32>,
}

/// `sum_r |p_(r) - q_(r)|` of a teacher's and a student's probabilities, each sorted, the shorter padded with zeros;
/// `upstream` gets the gradient with respect to the student's.
pub(crate) fn distance<F: Scalar>(
    teacher: &[F],
    student: &[F],
    scratch: &mut Scratch,
    upstream: &mut [F],
) -> F {
    F::descending(teacher, &mut scratch.teacher);
    F::descending(student, &mut scratch.student);
    let mut value = F::zero();
    for (&i, &j) in scratch.teacher.iter().zip(&scratch.student) {
        let (p, q) = (teacher[i as usize], student[j as usize]);
        value = value + (p - q).abs();
        upstream[j as usize] = match q.partial_cmp(&p) {
            Some(std::cmp::Ordering::Greater) => F::one(),
            Some(std::cmp::Ordering::Less) => -F::one(),
            _ => F::zero(),
        };
    }
    let shorter = teacher.len().min(student.len());
    for &i in &scratch.teacher[shorter..] {
        value = value + teacher[i as usize];
    }
    for &j in &scratch.student[shorter..] {
        value = value + student[j as usize];
        upstream[j as usize] = F::one();
    }
    value
}

/// Probabilities of a row, over what is in `out`.
pub(crate) fn probabilities<F: Scalar>(rows: &Rows<'_, F>, row: usize, temperature: f64, out: &mut Vec<F>) {
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
        fn places_by_digits_are_those_of_a_stable_sort(mut x in prop::collection::vec(any::<i16>().prop_map(|x| f32::from(x) * 1e-3), 0..200), same in 0usize..50) {
            x.extend(std::iter::repeat_n(0.25, same));
            let mut order = vec![7];
            descending_f32(&x, &mut order);
            let mut expected: Vec<u32> = (0..x.len() as u32).collect();
            expected.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]));
            prop_assert_eq!(order, expected);
        }
    }
}
