//! Any bytes as what a client writes to the router's socket.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../node/tests/request_text/mod.rs"]
mod request_text;

fuzz_target!(|line: &[u8]| request_text::check(line));
