//! The dataplane: frames, rings, worker loop, stages, decide, forwarding.
//!
//! A reader follows the fast path through `worker`, `parse` (in weir-packet), `track`, `rewrite` and `forward`;
//! the first packet of a connection adds `decide`.

pub mod driver;
pub mod frame;
pub mod model;
