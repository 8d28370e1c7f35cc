//! Where objects come from: files ([`library`], each read whole by [`file`](mod@file)), and when to read them again ([`watch`]); and the
//! texts that were in force, kept for the next start ([`keep`]).

pub mod file;
pub mod keep;
pub mod library;
pub mod revisit;
pub mod watch;

pub use library::Library;
pub use revisit::Revisit;
