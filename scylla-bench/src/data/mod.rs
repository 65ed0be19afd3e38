//! What is read from files of data.

pub mod conversations;
