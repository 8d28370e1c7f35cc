//! Sums and CRCs against the vectors of their RFCs and against dull twins.

mod common;

use common::{slow_crc32c, slow_sum};
use proptest::prelude::*;
use weir_packet::{
    Protocol,
    checksum::{Increment, Sum, crc32c, pseudo_header, sctp_checksum, sctp_increment},
};

#[test]
fn rfc_1071_section_3() {
    let sum = Sum::ZERO.bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
    assert_eq!(sum.finish(), (!0xddf2_u16).to_be_bytes());
}

#[test]
fn rfc_1624_section_4() {
    let change = Increment::ZERO.word16([0x55, 0x55], [0x32, 0x85]);
    assert_eq!(change.apply([0xdd, 0x2f]), [0x00, 0x00]);
}

#[test]
fn crc32c_rfc_3720_b_4() {
    let ascending: Vec<u8> = (0..32).collect();
    let descending: Vec<u8> = (0..32).rev().collect();
    for (name, bytes, crc) in [
        ("zeros", &[0; 32][..], 0x8a91_36aa_u32),
        ("ones", &[0xff; 32], 0x62a8_ab43),
        ("ascending", &ascending, 0x46dd_794e),
        ("descending", &descending, 0x113f_db5c),
        ("the usual nine", b"123456789", 0xe306_9283),
        ("nothing", b"", 0),
    ] {
        assert_eq!(crc32c(&[bytes]), crc, "{name}");
    }
}

#[test]
fn udp_zero_rules() {
    let change = Increment::ZERO.word16([1, 2], [3, 4]);
    assert_eq!(change.apply_udp([0, 0]), [0, 0], "none stays none");
    let to_zero = Increment::ZERO.word16([0x55, 0x55], [0x32, 0x85]);
    assert_eq!(to_zero.apply_udp([0xdd, 0x2f]), [0xff, 0xff], "computed 0 is written as all ones");
    assert_eq!(Sum::ZERO.bytes(&[0xff, 0xff]).finish_udp(), [0xff, 0xff]);
    assert_eq!(Sum::ZERO.bytes(&[0xff, 0xfe]).finish_udp(), [0x00, 0x01]);
}

#[test]
fn sctp_packet_too_short_for_a_checksum() {
    assert_eq!(sctp_checksum(&[0; 11]), None);
    assert!(sctp_checksum(&[0; 12]).is_some());
}

proptest! {
    #[test]
    fn sum_is_the_dull_sum(bytes in prop::collection::vec(any::<u8>(), 0..3000), cut in any::<prop::sample::Index>()) {
        let slow = (!slow_sum(&bytes)).to_be_bytes();
        prop_assert_eq!(Sum::ZERO.bytes(&bytes).finish(), slow);
        let (a, b) = bytes.split_at(cut.index(bytes.len() / 2 + 1) * 2);
        prop_assert_eq!(Sum::ZERO.bytes(a).bytes(b).finish(), slow);
        prop_assert_eq!(Sum::ZERO.bytes(a).plus(Sum::ZERO.bytes(b)).finish(), slow);
    }

    #[test]
    fn pseudo_headers_are_those_of_the_rfcs(
        src in any::<[u8; 16]>(), dst in any::<[u8; 16]>(), protocol in any::<u8>(), length in 0..=65535_u32,
    ) {
        let v6 = [&src[..], &dst, &length.to_be_bytes(), &[0, 0, 0, protocol]].concat();
        let sum = pseudo_header(std::net::Ipv6Addr::from(src), dst.into(), Protocol(protocol), length);
        prop_assert_eq!(sum.finish(), (!slow_sum(&v6)).to_be_bytes());
        let (src, dst): ([u8; 4], [u8; 4]) = (*src.first_chunk().unwrap(), *dst.first_chunk().unwrap());
        let v4 = [&src[..], &dst, &[0, protocol], &(length as u16).to_be_bytes()].concat();
        let sum = pseudo_header(std::net::Ipv4Addr::from(src), dst.into(), Protocol(protocol), length);
        prop_assert_eq!(sum.finish(), (!slow_sum(&v4)).to_be_bytes());
    }

    /// Over all words and checksums: what is right stays right, what is wrong stays wrong by as much.
    #[test]
    fn increments_keep_the_error(
        mut bytes in prop::collection::vec(any::<u8>(), 24..64),
        old_checksum in any::<u16>(),
        word16 in any::<[u8; 2]>(),
        word32 in any::<u32>(),
        row in any::<[u32; 4]>(),
    ) {
        let error = |bytes: &[u8], checksum: [u8; 2]| {
            (u32::from(slow_sum(bytes)) + u32::from(u16::from_be_bytes(checksum))) % 0xffff
        };
        let native = |bytes: &[u8], at: usize| u32::from_ne_bytes(*bytes[at..].first_chunk().unwrap());
        let before = error(&bytes, old_checksum.to_be_bytes());
        let old_row: [u32; 4] = std::array::from_fn(|i| native(&bytes, 8 + 4 * i));
        let change = Increment::ZERO
            .word16([bytes[0], bytes[1]], word16)
            .plus(Increment::ZERO.word32(native(&bytes, 2), word32))
            .plus(Increment::between(Sum::ZERO.words(&old_row), Sum::ZERO.words(&row)));
        bytes[..2].copy_from_slice(&word16);
        bytes[2..6].copy_from_slice(&word32.to_ne_bytes());
        for (at, word) in (8..).step_by(4).zip(row) {
            bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        prop_assert_eq!(error(&bytes, change.apply(old_checksum.to_be_bytes())), before);
        if old_checksum != 0 {
            let changed = change.apply_udp(old_checksum.to_be_bytes());
            prop_assert_ne!(changed, [0, 0]);
            prop_assert_eq!(error(&bytes, changed), before);
        }
    }

    #[test]
    fn no_change_changes_nothing(checksum in any::<[u8; 2]>(), words in any::<[u32; 4]>()) {
        let sum = Sum::ZERO.words(&words);
        prop_assert_eq!(Increment::between(sum, sum).apply(checksum), checksum);
    }

    #[test]
    fn crc_is_the_dull_crc(bytes in prop::collection::vec(any::<u8>(), 0..600), cut in any::<prop::sample::Index>()) {
        prop_assert_eq!(crc32c(&[&bytes]), slow_crc32c(&bytes));
        let (a, b) = bytes.split_at(cut.index(bytes.len() + 1));
        prop_assert_eq!(crc32c(&[a, b]), slow_crc32c(&bytes));
    }

    #[test]
    fn sctp_increment_is_recomputation(
        mut packet in prop::collection::vec(any::<u8>(), 12..2000), ports in any::<[u8; 4]>(), error in any::<[u8; 4]>(),
    ) {
        let right = sctp_checksum(&packet).unwrap();
        let wrong: [u8; 4] = std::array::from_fn(|i| right[i] ^ error[i]);
        let old = u32::from_ne_bytes(*packet.first_chunk().unwrap());
        packet[..4].copy_from_slice(&ports);
        let changed = sctp_increment(wrong, old, u32::from_ne_bytes(ports), packet.len());
        let right = sctp_checksum(&packet).unwrap();
        prop_assert_eq!(changed, std::array::from_fn(|i| right[i] ^ error[i]), "right stays right, wrong as wrong");
    }
}
