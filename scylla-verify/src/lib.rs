//! Acceptance rules for speculative decoding: which drafted tokens become final.
//!
//! One file per rule. A rule sees the target's distributions only through [`scylla_core::plugin::TargetRows`] and
//! takes every random decision through [`scylla_core::plugin::Chance`]; it runs no model.

mod chain;
mod greedy;

pub use chain::Chain;
pub use greedy::Greedy;

#[cfg(test)]
mod laws;
