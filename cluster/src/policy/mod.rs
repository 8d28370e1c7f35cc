//! What the policies in force mean, for whoever has to know.
//!
//! - [`matrix`]: who can reach whom, pods by pods; pods that fare alike may be told together ([`groups`]).
//! - [`listing`]: what applies to an endpoint, in the order of evaluation, with hits per rule; [`words`] says what rules do.
//! - [`places`]: what a rule is called and where it stands.

pub mod groups;
pub mod listing;
pub mod matrix;
pub mod places;
pub mod words;
