//! What a packet costs, measured: the cases of `weir bench`, `make bench-path` and `make report`, and how they are measured.
//!
//! It needs no more than the crates that it measures, so that a change of these is measured without building all of weir.

pub mod cases;
pub mod command;
pub mod figures;
pub mod machine;
pub mod measure;
