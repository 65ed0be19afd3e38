//! What losses compute with.

use num_traits::Float;
use scylla_core::kernels::softmax::Real;

/// f32 or f64.
pub trait Scalar: Real + Float + std::iter::Sum {
    /// Writes the places of `x` to `order`, largest value first; equal values keep their order.
    fn descending(x: &[Self], order: &mut Vec<u32>);

    /// The nearest such number.
    fn of(x: f64) -> Self;

    /// As f64.
    fn wide(self) -> f64;
}

impl Scalar for f32 {
    fn descending(x: &[Self], order: &mut Vec<u32>) {
        crate::sorted::descending_f32(x, order);
    }

    fn of(x: f64) -> Self {
        x as f32
    }

    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Scalar for f64 {
    fn descending(x: &[Self], order: &mut Vec<u32>) {
        order.clear();
        order.extend(0..x.len() as u32);
        order.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]));
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
    x.iter().zip(y).map(|(&x, &y)| x * y).sum()
}
