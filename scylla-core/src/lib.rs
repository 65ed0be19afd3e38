//! The core of Scylla: token trees and how they are drawn, the plugin traits, sampling, the transformer with taps
//! and tree attention, model and tokenizer loading, and the engine that decodes.
//!
//! This crate knows no draft, rule or aligner by name.

mod decoder;
mod error;

pub mod assets;
pub mod chance;
pub mod draw;
pub mod engine;
pub mod files;
mod guard;
pub mod kernels;
pub mod model;
pub mod plugin;
pub mod policy;
pub mod sampling;
pub mod tabular;
pub mod text;
pub mod train;
pub mod tree;

pub use decoder::{Decoder, Target};
pub use error::{Error, Result};
pub use guard::quiet;
