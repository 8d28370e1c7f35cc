//! Any text through the selector parser.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../policy/tests/selector_text/mod.rs"]
mod selector_text;

fuzz_target!(|text: &str| selector_text::check(text));
