//! Acceptance rules for speculative decoding: which drafted tokens become final, and proofs of their laws.
//!
//! One file per rule. A rule sees the target's distributions only through [`scylla_core::plugin::TargetRows`] and
//! takes every random decision through [`scylla_core::plugin::Chance`]; it runs no model. [`prove()`] enumerates those
//! decisions, and with them the law of what a rule commits.

mod auto;
mod block;
mod chain;
mod deterministic_tree;
mod greedy;
mod k_seq;
mod proposal;
pub mod prove;
mod recursive;
mod rrs;
mod specinfer;
mod traversal;
mod typical;
mod weights;

pub use auto::Auto;
pub use block::Block;
pub use chain::Chain;
pub use deterministic_tree::DeterministicTree;
pub use greedy::Greedy;
pub use k_seq::KSeq;
pub use prove::{Proof, prove};
pub use rrs::RrsWithoutReplacement;
pub use specinfer::SpecInfer;
pub use traversal::Traversal;
pub use typical::Typical;

#[cfg(test)]
mod laws;
