//! The router of a node. So far: pods made and taken away ([`pods`]), and their addresses ([`ipam`]).

pub mod ipam;
pub mod pods;
