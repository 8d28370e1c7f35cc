//! Addresses for the pods of a node.
//!
//! [`Pool`] decides, and is plain data; [`disk`] keeps what was decided; [`explain`] tells a person.

pub mod disk;
pub mod explain;
mod pool;
pub mod record;

pub use pool::{Exhausted, Given, Pool};
