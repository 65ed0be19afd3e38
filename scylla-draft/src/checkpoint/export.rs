//! Writing checkpoint directories.
