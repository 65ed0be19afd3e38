//! Plans: which draft, tree and budget pay at each batch size, from what steps cost on a machine and how much is accepted.
//!
//! ```text
//! costs of a machine (measured here, or a CSV of another) --+
//! acceptance: laws, rates by depth, or a dense trace -> trees, tau -> speed at each batch -> the best, or none -> exports
//! ```

mod choose;
mod datasheet;
mod export;
mod measure;
mod prospects;
mod roofline;
mod table;
mod training;
mod trees;

pub use choose::{Choice, Planned, Speed, choose, every};
pub use datasheet::{Datasheet, from_datasheet};
pub use export::{Engine, export};
pub use measure::{Measured, measure};
pub use prospects::{More, Prospects};
pub use roofline::{Peaks, Shapes, fit as fit_roofline};
pub use table::{Cost, CostTable, What};
pub use training::{BreakEven, break_even, experiment};
pub use trees::{Drafted, Rates, Shape, context_of, from_rates, from_trace};
