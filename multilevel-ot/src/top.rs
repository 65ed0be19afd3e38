//! The heaviest of many, without sorting all of them.

use crate::Scalar;

/// Places of the `n` largest values, largest first; of equal ones the lowest place comes first. `n` is at most the length.
pub(crate) fn heaviest<F: Scalar>(x: &[F], n: usize) -> Vec<usize> {
    let mut order: Vec<u32> = (0..x.len() as u32).collect();
    let before = |a: &u32, b: &u32| {
        let (u, v) = (x[*a as usize], x[*b as usize]);
        v.partial_cmp(&u)
            .unwrap_or(std::cmp::Ordering::Equal)
            .then(a.cmp(b))
    };
    if n < order.len() {
        order.select_nth_unstable_by(n, before);
        order.truncate(n);
    }
    order.sort_unstable_by(before);
    order.into_iter().map(|i| i as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn they_are_the_first_of_a_stable_sort(x in prop::collection::vec(0u32..6, 1..60), n in 0usize..60) {
            let x: Vec<f64> = x.into_iter().map(f64::from).collect();
            let n = n.min(x.len());
            let mut all: Vec<usize> = (0..x.len()).collect();
            all.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
            prop_assert_eq!(&heaviest(&x, n), &all[..n]);
        }
    }
}
