//! Laws: what training tokens and layers bring in tau, fitted to runs that were made, and what runs that were not would have.
//!
//! ```text
//! runs (folders of a sweep, lines of summaries, CSV) -> points -> groups (a family and depth, a family, all)
//!   -> each form by least squares, runs of a trunk together -> the form by held-out error and AICc
//!   -> predictions: the chosen form's value, a 90 % band over prompts, trunks, coefficients and forms
//! ```
//!
//! The published laws (Scylla, arXiv:2505.07858) are logarithms of tokens and layers, with base and unit in doubt, so both are
//! part of the fit; a saturating and a power law are fitted beside them.

mod fit;
mod form;
mod group;
mod points;
mod solve;
mod width;

pub use fit::{ALL, Band, Fit, Held, Laws, Prediction, Query, Score, Variable};
pub use form::Form;
pub use points::{Counted, Measure, Point, read_points};
pub use width::{Line, Roofline, Throughput, WidthLaw};
