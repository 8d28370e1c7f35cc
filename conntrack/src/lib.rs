//! The lock-free connection table.
