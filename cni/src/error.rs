//! Errors as a runtime reads them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An error of the CNI specification (section 5, "Error"): its number says what a runtime may do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    /// One of the specification's numbers, or one of weir's own from 100 on.
    pub code: u32,
    /// One sentence.
    pub msg: String,
    /// What else there is to say; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    /// The configuration's version is none of weir's.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A field of the configuration that weir does not serve.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// Weir knows no such sandbox: there is nothing to clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// An environment variable is missing or wrong.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Something could not be read or written.
    pub const IO: u32 = 5;
    /// The configuration cannot be decoded.
    pub const DECODE: u32 = 6;
    /// The configuration says something that cannot be.
    pub const INVALID_CONFIG: u32 = 7;
    /// It may work later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: no pods can be made.
    pub const UNAVAILABLE: u32 = 50;
    /// STATUS: no pods can be made, and those that there are may have limited connectivity.
    pub const LIMITED: u32 = 51;
    /// Weir's own: CHECK found a pod that is not as it was made.
    pub const NOT_AS_MADE: u32 = 100;

    /// An error without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// The same with details.
    #[must_use]
    pub fn with(mut self, details: impl fmt::Display) -> Self {
        self.details = details.to_string();
        self
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.msg, self.code)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl std::error::Error for CniError {}
