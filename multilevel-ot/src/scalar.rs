//! What losses compute with.

use num_traits::Float;
use scylla_core::kernels::softmax::{Real, times};

use crate::sorted::{self, Scratch};

/// f32 or f64.
///
/// ```
/// use multilevel_ot::Scalar;
///
/// fn mean<F: Scalar>(x: &[F]) -> f64 {
///     (x.iter().copied().sum::<F>() / F::of(x.len() as f64)).wide()
/// }
/// assert_eq!(mean(&[1.0f32, 2.0, 6.0]), 3.0);
/// ```
pub trait Scalar: Real + Float + Default + std::iter::Sum {
    /// Sorts the places of probabilities, largest first; equal ones keep their order.
    fn order(x: &[Self], scratch: &mut Scratch<Self>);

    /// Sorts the `n` largest of probabilities, largest first; returns the sum of the others.
    fn largest(x: &[Self], n: usize, scratch: &mut Scratch<Self>) -> Self;

    /// `sum_r |x_(r) - y_(r)|` of a teacher's and a student's probabilities, each sorted, the shorter padded with zeros;
    /// `upstream` gets the gradient with respect to the student's.
    fn distance(x: &[Self], y: &[Self], scratch: &mut Scratch<Self>, upstream: &mut [Self])
    -> Self;

    /// The nearest such number.
    fn of(x: f64) -> Self;

    /// As f64.
    fn wide(self) -> f64;
}

impl Scalar for f32 {
    fn order(x: &[Self], scratch: &mut Scratch<Self>) {
        sorted::order_f32(x, scratch);
    }

    fn largest(x: &[Self], n: usize, scratch: &mut Scratch<Self>) -> Self {
        sorted::largest_f32(x, n, scratch)
    }

    fn distance(
        x: &[Self],
        y: &[Self],
        scratch: &mut Scratch<Self>,
        upstream: &mut [Self],
    ) -> Self {
        sorted::counted_distance(x, y, scratch, upstream)
    }

    fn of(x: f64) -> Self {
        x as f32
    }

    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Scalar for f64 {
    fn order(x: &[Self], scratch: &mut Scratch<Self>) {
        sorted::order_f64(x, scratch);
    }

    fn largest(x: &[Self], n: usize, scratch: &mut Scratch<Self>) -> Self {
        sorted::largest_f64(x, n, scratch)
    }

    fn distance(
        x: &[Self],
        y: &[Self],
        scratch: &mut Scratch<Self>,
        upstream: &mut [Self],
    ) -> Self {
        sorted::sorted_distance(x, y, scratch, upstream)
    }

    fn of(x: f64) -> Self {
        x
    }

    fn wide(self) -> f64 {
        self
    }
}

/// `sum x y`
pub(crate) fn dot<F: Scalar>(x: &[F], y: &[F]) -> F {
    let mut sum = [F::zero()];
    if !x.is_empty() {
        times(x, y, &mut sum);
    }
    sum[0]
}
