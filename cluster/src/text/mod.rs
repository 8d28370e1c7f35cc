//! The configuration side's ground: YAML documents with the position of every value, typed reading that collects
//! every fault, diagnostics that show the offending line, and weir.yaml itself.
//!
//! A file is read once into a [`tree`] whose nodes know where they stand. [`typed`] reads Rust types out of a tree
//! and, instead of stopping at a fault, records it and goes on without the faulty value. [`problem`] collects and
//! prints what was found; [`source`] holds the texts that positions refer to.

pub mod address;
mod plain;
pub mod problem;
pub mod source;
pub mod tree;
pub mod typed;

pub use problem::{Diagnostic, Problems, Severity, Topic};
pub use source::{Source, Span, Untexted};
