//! What is read from files of data.

pub mod conversations;
pub mod documents;
pub mod features;
pub mod packing;
pub(crate) mod parquet;
pub mod regenerate;
pub mod speculators;
