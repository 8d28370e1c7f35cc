//! `weir policy`: what the policies in force mean, for whoever has to know.
//!
//! - [`matrix`]: who can reach whom, pods by pods; shown as text ([`grid`]), as JSON, or as a picture ([`svg`]), where pods that fare
//!   alike may be drawn together ([`groups`]).
//! - [`listing`]: what applies to an endpoint, in the order of evaluation, with hits per rule; [`page`] is its text, [`words`] says
//!   what rules do.
//! - [`places`]: what a rule is called and where it stands.

pub mod grid;
pub mod groups;
pub mod listing;
pub mod matrix;
pub mod page;
pub mod places;
pub mod svg;
pub mod words;
