//! Translation in place: checksums right exactly where they were right, and nothing else changed.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr};

use common::*;
use proptest::prelude::*;
use weir_packet::{
    DropReason, FlowKey, Mac, Ports, Protocol,
    build::{IcmpError, MAX_BUILT_BYTES, icmp_error},
    parse::{Kind, View, inner_of_ipip, l4_checksum_ok, parse_embedded},
    rewrite::{
        IPIP_HEADER_BYTES, apply_tos, decapsulated_tos, decrement_ttl, set_ethernet, translate, translate_icmp_error,
        write_ipip_header,
    },
};

/// Another key of the same protocol: an echo keeps its type.
fn other_key<A: Family>(spec: &Spec<A>, view: &View<A>, src: A, dst: A, source: u16, destination: u16) -> FlowKey<A> {
    let ports = match spec.carried {
        Carried::EchoRequest | Carried::EchoReply => Ports::new(source, view.key.ports.destination()),
        Carried::Portless => Ports::default(),
        _ => Ports::new(source, destination),
    };
    FlowKey { src, dst, ports, protocol: view.key.protocol }
}

fn checksum_at(carried: Carried) -> Option<std::ops::Range<usize>> {
    match carried {
        Carried::Tcp { .. } => Some(16..18),
        Carried::Udp => Some(6..8),
        Carried::EchoRequest | Carried::EchoReply => Some(2..4),
        Carried::Sctp => Some(8..12),
        Carried::Portless => None,
    }
}

/// Translates, checks all against a packet made from scratch, and translates back.
fn there_and_back<A: Family>(spec: &Spec<A>, other: &Spec<A>, error: [u8; 4], tail: &[u8]) {
    let mut original = spec.frame();
    original.extend(tail);
    let view = view_of::<A>(&original);
    let to = other_key(spec, &view, other.src, other.dst, other.source, other.destination);
    let l4 = usize::from(view.l4);

    let mut expected = Spec { source: to.ports.source(), ..other.clone() };
    (expected.carried, expected.ttl, expected.payload) = (spec.carried, spec.ttl, spec.payload.clone());
    let mut frame = original.clone();
    translate(&mut frame, &view, &to).unwrap();
    let mut scratch = expected.frame();
    scratch.extend(tail);
    assert_eq!(frame, scratch, "as made from scratch");

    let back = View { key: to, ..view };
    translate(&mut frame, &back, &view.key).unwrap();
    assert_eq!(frame, original, "there and back");

    if let Some(field) = checksum_at(spec.carried) {
        let mut wrong = original.clone();
        for (byte, error) in wrong[l4..][field].iter_mut().zip(error) {
            *byte ^= error;
        }
        let right = |frame: &[u8]| l4_checksum_right(&frame[14..usize::from(view.end)], l4 - 14, view.key.protocol.0);
        let before = right(&wrong);
        translate(&mut wrong, &view, &to).unwrap();
        assert_eq!(right(&wrong), before, "right iff it was right");
        assert_eq!(l4_checksum_ok(&wrong, &view), before);
    }
}

#[test]
fn udp_without_checksum_stays_without() {
    fn check<A: Family>(src: A, dst: A, other: A) {
        let mut frame = Spec::new(src, dst, Carried::Udp, 40000, 53, b"no sum").frame();
        let view = view_of::<A>(&frame);
        let checksum = usize::from(view.l4) + 6;
        frame[checksum..checksum + 2].fill(0);
        let to = FlowKey { src: other, ports: Ports::new(1024, 5353), ..view.key };
        translate(&mut frame, &view, &to).unwrap();
        assert_eq!(frame[checksum..checksum + 2], [0, 0]);
        assert_eq!(view_of::<A>(&frame).key, to);
    }
    check::<Ipv4Addr>([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), [192, 168, 0, 1].into());
    check::<Ipv6Addr>(Ipv6Addr::from(5 << 120), Ipv6Addr::from(6 << 120), Ipv6Addr::from(7 << 120));
}

#[test]
fn a_udp_checksum_that_becomes_zero_is_written_as_ones() {
    // Of all source ports some gives a sum of 0xffff.
    let spec = Spec::new(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), Carried::Udp, 1, 53, b"abc");
    let original = spec.frame();
    let view = view_of::<Ipv4Addr>(&original);
    let mut all_ones = 0;
    for port in 0..=u16::MAX {
        let mut frame = original.clone();
        translate(&mut frame, &view, &FlowKey { ports: Ports::new(port, 53), ..view.key }).unwrap();
        assert_ne!(frame[40..42], [0, 0], "port {port}");
        all_ones += u32::from(frame[40..42] == [0xff, 0xff]);
    }
    assert_eq!(all_ones, 1);
}

/// The fragments of a frame's IPv4 packet, whose payload is cut after `first` bytes.
fn cut_in_two(frame: &[u8], first: usize) -> [Vec<u8>; 2] {
    [(0x2000, &frame[34..34 + first]), ((first / 8) as u16, &frame[34 + first..])].map(|(place, payload)| {
        let mut part = [&frame[..34], payload].concat();
        part[16..18].copy_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
        part[20..22].copy_from_slice(&place.to_be_bytes());
        fix_header_checksum(&mut part[14..]);
        part
    })
}

#[test]
fn translated_fragments_join_to_the_translated_packet() {
    for carried in [Carried::Udp, Carried::Tcp { syn: false }, Carried::EchoRequest] {
        let spec = Spec::new([10, 0, 0, 1].into(), [10, 96, 0, 53].into(), carried, 40000, 53, &[9; 301]);
        let mut whole = spec.frame();
        whole[20] = 0;
        fix_header_checksum(&mut whole[14..]);
        let view = view_of::<Ipv4Addr>(&whole);
        let to = other_key(&spec, &view, [192, 168, 0, 1].into(), [10, 244, 1, 2].into(), 30000, 5353);
        let [mut first, mut later] = cut_in_two(&whole, 128);
        let first_view = view_of::<Ipv4Addr>(&first);
        assert_eq!(first_view.key, view.key);
        translate(&mut first, &first_view, &to).unwrap();
        let later_view = view_of::<Ipv4Addr>(&later);
        assert!(matches!(later_view.kind, Kind::LaterFragment { offset: 128, more: false, .. }));
        translate(&mut later, &later_view, &to).unwrap();
        assert!(header_checksum_right(&first[14..]) && header_checksum_right(&later[14..]));

        translate(&mut whole, &view, &to).unwrap();
        assert_eq!([&first[34..], &later[34..]].concat(), whole[34..], "{carried:?}");
        assert_eq!((&first[26..34], &later[26..34]), (&whole[26..34], &whole[26..34]), "addresses");
    }
}

#[test]
fn a_first_fragment_of_sctp_keeps_its_ports_or_is_refused() {
    let spec = Spec::<Ipv4Addr>::new([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), Carried::Sctp, 7, 8, &[1; 100]);
    let [first, _] = cut_in_two(&spec.frame(), 64);
    let view = view_of::<Ipv4Addr>(&first);
    let mut frame = first.clone();
    let to = FlowKey { ports: Ports::new(9, 8), ..view.key };
    assert_eq!(translate(&mut frame, &view, &to), Err(DropReason::FragmentChecksum));
    assert_eq!(frame, first, "nothing was written");
    let to = FlowKey { dst: [10, 0, 0, 3].into(), ..view.key };
    assert_eq!(translate(&mut frame, &view, &to), Ok(()));
    assert_eq!((&frame[30..34], &frame[34..]), (&[10, 0, 0, 3][..], &first[34..]));
}

#[test]
fn other_icmp_has_no_ports_to_write() {
    let frame = ipv4_frame(&[], 0, 1, &[19, 0, 0xec, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    let view = view_of::<Ipv4Addr>(&frame);
    let mut translated = frame.clone();
    let to = FlowKey { src: [192, 168, 0, 1].into(), ports: Ports::new(77, 99), ..view.key };
    translate(&mut translated, &view, &to).unwrap();
    assert_eq!(translated[34..], frame[34..]);
    assert!(header_checksum_right(&translated[14..]));
}

#[test]
fn udp_lite_follows_the_pseudo_header() {
    // Coverage 8: only the header is covered.
    let mut message = vec![0, 1, 0, 2, 0, 8, 0, 0, 0xaa, 0xbb];
    let covered = [&[10, 0, 0, 1, 10, 0, 0, 2, 0, 136, 0, 10][..], &message[..8]].concat();
    let checksum = !slow_sum(&covered);
    message[6..8].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = ipv4_frame(&[], 0, 136, &message);
    let view = view_of::<Ipv4Addr>(&frame);
    assert!(l4_checksum_ok(&frame, &view));
    translate(&mut frame, &view, &FlowKey { dst: [10, 9, 8, 7].into(), ..view.key }).unwrap();
    assert!(l4_checksum_ok(&frame, &view));
    frame[34] ^= 1;
    assert!(!l4_checksum_ok(&frame, &view));
}

#[test]
fn ethernet_header() {
    let mut frame = [0xaa; 20];
    set_ethernet(&mut frame, Mac([1; 6]), Mac([2; 6]), 0x86dd);
    assert_eq!(frame, *hex("010101010101 020202020202 86dd aaaaaaaaaaaa").first_chunk().unwrap());
}

#[test]
fn ttl_and_tos() {
    fn check<A: Family>(src: A, dst: A) {
        for ttl in [255, 64, 2, 1, 0] {
            let mut spec = Spec::new(src, dst, Carried::Udp, 1, 2, b"x");
            spec.ttl = ttl;
            let mut frame = spec.frame();
            let view = view_of::<A>(&frame);
            decrement_ttl(&mut frame, &view, 1);
            spec.ttl = ttl.saturating_sub(1);
            assert_eq!(frame, spec.frame(), "TTL {ttl}");
            for tos in [0, 0xb8, 0xff, 0x03] {
                apply_tos(&mut frame, &view, tos);
                assert_eq!(view_of::<A>(&frame), View { ttl: spec.ttl, tos, ..view });
            }
            apply_tos(&mut frame, &view, view.tos);
            assert_eq!(frame, spec.frame());
        }
    }
    check::<Ipv4Addr>([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    check::<Ipv6Addr>(Ipv6Addr::from(5 << 120), Ipv6Addr::from(6 << 120));
}

#[test]
fn ipip_header_byte_by_byte() {
    let expected = hex("02000000000102000000000a080045ba0031004d40004004b85cc0a8000ac0a8000b\
         45ba001d1234000040114ef70af401020af4020213881770000943f878");
    let mut frame = vec![0; 14 + IPIP_HEADER_BYTES];
    frame.extend(&expected[34..]);
    frame.extend([0xcc; 3]);
    let (head, inner) = frame.split_at_mut(34);
    let (src, dst) = (Ipv4Addr::new(192, 168, 0, 10), Ipv4Addr::new(192, 168, 0, 11));
    write_ipip_header(&mut head[14..], inner, src, dst, 77);
    set_ethernet(&mut frame, Mac(CLIENT_MAC), Mac(ROUTER_MAC), 0x0800);
    assert_eq!(frame[..expected.len()], expected);
    let outer = view_of::<Ipv4Addr>(&frame);
    assert_eq!((outer.key.protocol, outer.end, outer.dont_fragment), (Protocol::IPIP, 63, true));
    assert_eq!(inner_of_ipip(&frame, &outer).unwrap().key.ports, Ports::new(5000, 6000));
}

#[test]
fn ecn_by_rfc_6040_figure_4() {
    const NOT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    // Rows: inner; columns: outer Not-ECT, ECT(0), ECT(1), CE.
    for (inner, row) in [
        (NOT, [Some(NOT), Some(NOT), Some(NOT), None]),
        (ECT0, [Some(ECT0), Some(ECT0), Some(ECT1), Some(CE)]),
        (ECT1, [Some(ECT1), Some(ECT1), Some(ECT1), Some(CE)]),
        (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
    ] {
        for (outer, expected) in [NOT, ECT0, ECT1, CE].into_iter().zip(row) {
            let result = decapsulated_tos(0x28 | outer, 0xb8 | inner);
            assert_eq!(result, expected.map(|ecn| 0xb8 | ecn), "inner {inner} outer {outer}: the inner DSCP stays");
        }
    }
}

/// An ICMP error about `frame` from a router, quoting `quoted` bytes of it, its checksum right.
fn error_about<A: Family>(frame: &[u8], from: A, quoted: usize) -> Vec<u8> {
    let view = view_of::<A>(frame);
    let mut out = vec![0; MAX_BUILT_BYTES];
    let bytes = icmp_error(&mut out, frame, &view, from, IcmpError::HostUnreachable).unwrap();
    out.truncate(bytes);
    let l4 = 14 + A::HEADER_BYTES;
    out.truncate((l4 + 8 + quoted).min(bytes));
    // Cut: the lengths and checksums that follow from it.
    let ip_bytes = out.len() - 14;
    if A::WORDS == 1 {
        out[16..18].copy_from_slice(&(ip_bytes as u16).to_be_bytes());
        fix_header_checksum(&mut out[14..]);
    } else {
        out[18..20].copy_from_slice(&((ip_bytes - 40) as u16).to_be_bytes());
    }
    out[l4 + 2..l4 + 4].fill(0);
    let message_bytes = (out.len() - l4) as u32;
    let pseudo = [&out[l4 - 2 * A::BYTES..l4], &message_bytes.to_be_bytes(), &[0, 0, 0, 58]].concat();
    let covered = if A::WORDS == 1 { out[l4..].to_vec() } else { [&pseudo[..], &out[l4..]].concat() };
    let checksum = !slow_sum(&covered);
    out[l4 + 2..l4 + 4].copy_from_slice(&checksum.to_be_bytes());
    out
}

/// The error about a translated packet, translated back, is the error about the packet as it was before.
fn errors_go_back<A: Family>(spec: &Spec<A>, other: &Spec<A>, router: A, extra: usize, flip: u8) {
    let original = spec.frame();
    let view = view_of::<A>(&original);
    let to = other_key(spec, &view, other.src, other.dst, other.source, other.destination);
    let mut translated = original.clone();
    translate(&mut translated, &view, &to).unwrap();

    // A checksum that is cut itself cannot be updated: quote all of it or nothing.
    let l4_quoted = if spec.carried == Carried::Portless { extra } else { 8 + extra };
    let cut = checksum_at(spec.carried).filter(|field| field.start < l4_quoted && l4_quoted < field.end);
    let quoted = A::HEADER_BYTES + cut.map_or(l4_quoted, |field| field.end);
    let mut error = error_about::<A>(&translated, router, quoted);
    let expected = error_about::<A>(&original, other.dst, quoted);
    let error_view = view_of::<A>(&error);
    assert_eq!(error_view.kind, Kind::IcmpError);
    let embedded = parse_embedded::<A>(error_view.quote(&error)).unwrap();
    assert_eq!(embedded.key, to);
    let checksum = usize::from(error_view.l4) + 3;
    error[checksum] ^= flip;
    translate_icmp_error(&mut error, &error_view, &embedded, other.dst, spec.src, &view.key);
    assert!(header_checksum_right(&error[14..]));
    assert_eq!(l4_checksum_right(&error[14..], A::HEADER_BYTES, A::ICMP.0), flip == 0);
    if flip == 0 {
        assert_eq!(error, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn translation_ipv4(
        spec in any_spec::<Ipv4Addr>(), other in any_spec::<Ipv4Addr>(), error in any::<[u8; 4]>(), tail in 0..9_usize,
    ) {
        there_and_back(&spec, &other, error, &[0x77; 8][..tail.min(8)]);
    }

    #[test]
    fn translation_ipv6(
        spec in any_spec::<Ipv6Addr>(), other in any_spec::<Ipv6Addr>(), error in any::<[u8; 4]>(), tail in 0..9_usize,
    ) {
        there_and_back(&spec, &other, error, &[0x77; 8][..tail.min(8)]);
    }

    #[test]
    fn icmp_errors_ipv4(
        spec in any_spec::<Ipv4Addr>(), other in any_spec::<Ipv4Addr>(), router in Ipv4Addr::any_host(),
        extra in 0..200_usize, flip in prop_oneof![Just(0_u8), any::<u8>()],
    ) {
        errors_go_back(&spec, &other, router, extra, flip);
    }

    #[test]
    fn icmp_errors_ipv6(
        spec in any_spec::<Ipv6Addr>(), other in any_spec::<Ipv6Addr>(), router in Ipv6Addr::any_host(),
        extra in 0..200_usize, flip in prop_oneof![Just(0_u8), any::<u8>()],
    ) {
        errors_go_back(&spec, &other, router, extra, flip);
    }

    /// A wrong checksum of the quoted header is as wrong afterwards.
    #[test]
    fn quoted_header_checksums_are_not_repaired(spec in any_spec::<Ipv4Addr>(), flip in 1..=255_u8) {
        let frame = spec.frame();
        let mut error = error_about::<Ipv4Addr>(&frame, spec.dst, 28);
        error[14 + 20 + 8 + 10] ^= flip;
        let view = view_of::<Ipv4Addr>(&error);
        if let Some(embedded) = parse_embedded::<Ipv4Addr>(view.quote(&error)) {
            let inner = FlowKey { src: [1, 2, 3, 4].into(), ..embedded.key };
            translate_icmp_error(&mut error, &view, &embedded, spec.dst, [1, 2, 3, 4].into(), &inner);
            prop_assert!(!header_checksum_right(view.quote(&error)));
        }
    }
}
