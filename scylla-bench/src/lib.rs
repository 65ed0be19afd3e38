//! Experiments over decoders: the registry of plugins by name, prompt sets, the runner, and the `scylla` command
//! line. It implements no draft, no rule and no aligner.
//!
//! A program of your own that registers more drafts, rules or aligners gets the whole command line with them:
//!
//! ```no_run
//! let mut registry = scylla_bench::Registry::default();
//! // registry.draft("mine", |context, settings| ...);
//! std::process::exit(scylla_bench::cli::run(&registry, std::env::args_os()));
//! ```

mod aligners;
pub mod bench;
mod builtin;
pub mod cases;
pub mod chi_square;
pub mod cli;
mod context;
mod costs;
pub mod data;
pub mod distill;
pub mod doctor;
mod drafts;
mod environment;
mod error;
pub mod experiment;
pub mod laws;
pub mod plan;
pub mod prompts;

mod registry;
mod rows;
pub mod runs;
mod session;
pub mod stats;
pub mod sweep;
pub mod tasks;
mod terminal;
pub mod trace;
pub mod train;

pub use context::{AlignerContext, DraftContext, Spaces, parse as parse_settings};
pub use environment::Environment;
pub use error::{Error, Result};
pub use experiment::Override;
pub use registry::{AUTO, PLAIN, Registry};
pub use session::{Composed, Session, Wording};
