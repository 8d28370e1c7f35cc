//! Frames of any content through the parser and all that takes parsed frames.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../packet/tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "a target uses a part of it")]
#[path = "../../packet/tests/exercise/mod.rs"]
mod exercise;

fuzz_target!(|frame: &[u8]| {
    exercise::exercise_frame(frame);
    // Once more as IPv4 with a right header checksum, which no mutation finds.
    let mut frame = frame.to_vec();
    let header_bytes = frame.get(14).map_or(0, |byte| usize::from(byte & 15) * 4);
    if header_bytes >= 20 && frame.len() >= 14 + header_bytes {
        frame[12..14].copy_from_slice(&[8, 0]);
        common::fix_header_checksum(&mut frame[14..]);
        exercise::exercise_frame(&frame);
    }
});
