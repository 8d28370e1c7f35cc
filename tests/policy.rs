//! `weir policy`: who reaches whom, and what applies to an endpoint.

#[path = "policy/listing.rs"]
mod listing;
#[path = "policy/matrix.rs"]
mod matrix;
#[path = "policy/random.rs"]
mod random;
