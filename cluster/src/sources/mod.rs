//! Where objects come from: files ([`library`]), and when to read them again ([`watch`]).

pub mod library;
pub mod watch;

pub use library::Library;
