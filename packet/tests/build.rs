//! Packets that a router makes: their bytes, made independently of this crate, and what is never answered.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr};

use common::*;
use proptest::prelude::*;
use weir_packet::{
    Mac,
    build::{
        IcmpError, MAX_BUILT_BYTES, arp_reply, arp_request, fragment_ipv4, icmp_error, neighbor_advertisement,
        neighbor_solicitation, solicited_target, tcp_reset,
    },
    parse::{Arp, Kind, Parsed, TcpFields, View, l4_checksum_ok, parse, parse_embedded},
};

const ROUTER: Mac = Mac(ROUTER_MAC);

fn four(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn six(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// What a builder wrote.
fn built(build: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<Vec<u8>> {
    let mut out = vec![0xee; MAX_BUILT_BYTES];
    let bytes = build(&mut out)?;
    assert!(out[bytes..].iter().all(|byte| *byte == 0xee), "wrote beyond its length");
    out.truncate(bytes);
    Some(out)
}

/// A builder needs exactly the room that it fills.
fn needs_room(bytes: usize, mut build: impl FnMut(&mut [u8]) -> Option<usize>) {
    assert_eq!(build(&mut vec![0; bytes - 1]), None);
    assert_eq!(build(&mut vec![0; bytes]), Some(bytes));
}

fn arp(operation: u16) -> Arp {
    Arp {
        operation,
        sender_mac: Mac(CLIENT_MAC),
        sender_ip: four("10.244.1.2"),
        target_mac: Mac::default(),
        target_ip: four("169.254.1.1"),
    }
}

#[test]
fn arp_is_answered() {
    let reply = built(|out| arp_reply(out, &arp(Arp::REQUEST), ROUTER)).unwrap();
    let expected = "02000000000102000000000a0806000108000604000202000000000aa9fe01010200000000010af40102";
    assert_eq!(reply, hex(expected));
    needs_room(42, |out| arp_reply(out, &arp(Arp::REQUEST), ROUTER));
    let probe = Arp { sender_ip: four("0.0.0.0"), ..arp(Arp::REQUEST) };
    assert!(built(|out| arp_reply(out, &probe, ROUTER)).is_some(), "a probe");
}

#[test]
fn arp_that_is_not_answered() {
    for (name, arp) in [
        ("a reply", arp(Arp::REPLY)),
        ("reverse ARP", arp(3)),
        ("from a group", Arp { sender_mac: Mac::BROADCAST, ..arp(Arp::REQUEST) }),
        ("from a multicast address", Arp { sender_ip: four("224.0.0.1"), ..arp(Arp::REQUEST) }),
    ] {
        assert_eq!(built(|out| arp_reply(out, &arp, ROUTER)), None, "{name}");
    }
}

#[test]
fn arp_asks() {
    let frame = built(|out| arp_request(out, ROUTER, four("192.168.0.10"), four("192.168.0.1"))).unwrap();
    assert_eq!(frame[..14], hex("ffffffffffff 02000000000a 0806"));
    let expected = Arp {
        operation: Arp::REQUEST,
        sender_mac: ROUTER,
        sender_ip: four("192.168.0.10"),
        target_mac: Mac::default(),
        target_ip: four("192.168.0.1"),
    };
    assert_eq!(parse(&frame), Ok(Parsed::Arp(expected)));
}

const SOLICITATION: &str = "3333ffeeeeee02000000000186dd6000000000203afffd000010000000000000000000000002ff02000000000000\
    00000001ffeeeeee8700c26000000000fe80000000000000eceeeefffeeeeeee0101020000000001";
const ADVERTISEMENT: &str = "02000000000102000000000a86dd6000000000203afffe80000000000000eceeeefffeeeeeeefd00001000000000\
    0000000000000002880005ebe0000000fe80000000000000eceeeefffeeeeeee020102000000000a";
const DUPLICATE_DETECTION: &str = "3333ffeeeeee02000000000186dd6000000000183aff00000000000000000000000000000000ff020000000\
    0000000000001ffeeeeee8700c27d00000000fe80000000000000eceeeefffeeeeeee";
const DEFENCE: &str = "33330000000102000000000a86dd6000000000203afffe80000000000000eceeeefffeeeeeeeff0200000000000000000000\
    00000001880043faa0000000fe80000000000000eceeeefffeeeeeee020102000000000a";

#[test]
fn neighbours_are_answered() {
    for (solicitation, advertisement) in [(SOLICITATION, ADVERTISEMENT), (DUPLICATE_DETECTION, DEFENCE)] {
        let frame = hex(solicitation);
        let view = view_of::<Ipv6Addr>(&frame);
        assert_eq!(solicited_target(&frame, &view), Some(six("fe80::ecee:eeff:feee:eeee")));
        let answer = built(|out| neighbor_advertisement(out, &frame, &view, ROUTER)).unwrap();
        assert_eq!(answer, hex(advertisement));
        needs_room(86, |out| neighbor_advertisement(out, &frame, &view, ROUTER));
    }
}

/// Changes bytes of an ICMPv6 frame and makes its checksum right.
fn with_icmpv6(text: &str, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut frame = hex(text);
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame[56..58].fill(0);
    let length = (frame.len() - 54) as u32;
    let covered = [&frame[22..54], &length.to_be_bytes(), &[0, 0, 0, 58], &frame[54..]].concat();
    let checksum = !slow_sum(&covered);
    frame[56..58].copy_from_slice(&checksum.to_be_bytes());
    frame
}

#[test]
fn neighbours_that_are_not_answered() {
    let mut bad_checksum = hex(SOLICITATION);
    bad_checksum[57] ^= 1;
    let mut from_group = hex(SOLICITATION);
    from_group[6] |= 1;
    for (name, frame) in [
        ("hop limit 254", with_icmpv6(SOLICITATION, 21, &[254])),
        ("code 1", with_icmpv6(SOLICITATION, 55, &[1])),
        ("an advertisement", with_icmpv6(SOLICITATION, 54, &[136])),
        ("multicast target", with_icmpv6(SOLICITATION, 62, &[0xff])),
        ("option of length 0", with_icmpv6(SOLICITATION, 79, &[0])),
        ("option beyond the packet", with_icmpv6(SOLICITATION, 79, &[2])),
        ("probe with a source option", with_icmpv6(SOLICITATION, 22, &[0; 16])),
        ("probe to another group", with_icmpv6(DUPLICATE_DETECTION, 53, &[0xed])),
        ("wrong checksum", bad_checksum),
    ] {
        let view = view_of::<Ipv6Addr>(&frame);
        assert_eq!(solicited_target(&frame, &view), None, "{name}");
        assert_eq!(built(|out| neighbor_advertisement(out, &frame, &view, ROUTER)), None, "{name}");
    }
    let view = view_of::<Ipv6Addr>(&from_group);
    assert_eq!(built(|out| neighbor_advertisement(out, &from_group, &view, ROUTER)), None, "frame from a group");
}

#[test]
fn neighbours_are_asked() {
    let target = six("fd00:10::77");
    let frame = built(|out| neighbor_solicitation(out, ROUTER, six("fe80::1"), target)).unwrap();
    let view = view_of::<Ipv6Addr>(&frame);
    assert_eq!(solicited_target(&frame, &view), Some(target));
    assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0, 0, 0x77]);
    assert_eq!(view.key.dst, six("ff02::1:ff00:77"));
    assert_eq!(frame[78..86], [1, 1, 2, 0, 0, 0, 0, 10]);
}

/// A TCP segment to a service, with the checksum right.
fn segment<A: Family>(src: A, dst: A, seq: u32, ack: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Spec::new(src, dst, Carried::Tcp { syn: true }, 40002, 80, payload).frame();
    let l4 = 14 + A::HEADER_BYTES;
    frame[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
    frame[l4 + 8..l4 + 12].copy_from_slice(&ack.to_be_bytes());
    frame[l4 + 13] = flags;
    frame[l4 + 16..l4 + 18].fill(0);
    let length = (frame.len() - l4) as u32;
    let addresses = &frame[l4 - 2 * A::BYTES..l4];
    let covered = [addresses, &length.to_be_bytes(), &[0, 0, 0, 6], &frame[l4..]].concat();
    let checksum = !slow_sum(&covered);
    frame[l4 + 16..l4 + 18].copy_from_slice(&checksum.to_be_bytes());
    frame
}

const FIN: u8 = TcpFields::FIN;
const SYN: u8 = TcpFields::SYN;
const RST: u8 = TcpFields::RST;
const ACK: u8 = TcpFields::ACK;

#[test]
fn resets() {
    let (pod, service) = (four("10.244.1.2"), four("10.96.0.99"));
    let frame = segment(pod, service, 100, 0, SYN, b"hello");
    let reset = built(|out| tcp_reset(out, &frame, &view_of::<Ipv4Addr>(&frame))).unwrap();
    let expected = "02000000000102000000000a08004500002800004000400624180a6000630af40102\
        00509c42000000000000006a50140000fc1b0000";
    assert_eq!(reset, hex(expected), "SYN with data");
    needs_room(54, |out| tcp_reset(out, &frame, &view_of::<Ipv4Addr>(&frame)));

    let frame = segment(pod, service, 100, 77, ACK, b"hello");
    let reset = built(|out| tcp_reset(out, &frame, &view_of::<Ipv4Addr>(&frame))).unwrap();
    let expected = "02000000000102000000000a08004500002800004000400624180a6000630af40102\
        00509c420000004d0000000050040000fc480000";
    assert_eq!(reset, hex(expected), "with ACK");

    let frame = segment(six("fd00:10::2"), six("fd00:96::99"), 105, 0, SYN, b"");
    let reset = built(|out| tcp_reset(out, &frame, &view_of::<Ipv6Addr>(&frame))).unwrap();
    let expected = "02000000000102000000000a86dd6000000000140640fd000096000000000000000000000099fd0000100000000000000000\
        0000000200509c42000000000000006a5014000017920000";
    assert_eq!(reset, hex(expected), "IPv6");
}

#[test]
fn reset_fields_by_rfc_9293() {
    fn check<A: Family>(src: A, dst: A) {
        // Flags, sequence, acknowledgment, payload; then sequence, acknowledgment, flags of the RST.
        for (flags, seq, ack, payload, expected) in [
            (SYN, 4711, 0, &b""[..], (0, 4712, RST | ACK)),
            (SYN, u32::MAX, 0, b"", (0, 0, RST | ACK)),
            (SYN | ACK, 5, 9, b"", (9, 0, RST)),
            (FIN | ACK, 5, 10, b"bye", (10, 0, RST)),
            (ACK, 5, 0, b"data", (0, 0, RST)),
        ] {
            let frame = segment(src, dst, seq, ack, flags, payload);
            let view = view_of::<A>(&frame);
            let reset = built(|out| tcp_reset(out, &frame, &view)).unwrap();
            let answer = view_of::<A>(&reset);
            assert_eq!(answer.key, view.key.invert());
            let fields = answer.tcp(&reset);
            assert_eq!((fields.seq, fields.ack, fields.flags), expected, "{flags:#x}");
            assert_eq!((fields.payload_bytes, fields.window, answer.ttl), (0, 0, 64));
            assert!(l4_checksum_right(&reset[14..], A::HEADER_BYTES, 6));
        }
    }
    check(four("10.244.1.2"), four("10.96.0.99"));
    check(six("fd00:10::2"), six("fd00:96::99"));
}

#[test]
fn a_reset_comes_from_where_the_client_sent_it() {
    let frame = segment(four("10.244.1.2"), four("10.244.2.2"), 1, 0, SYN, b"");
    let mut view = view_of::<Ipv4Addr>(&frame);
    view.key.dst = four("10.96.0.1");
    let reset = built(|out| tcp_reset(out, &frame, &view)).unwrap();
    assert_eq!(view_of::<Ipv4Addr>(&reset).key.src, four("10.96.0.1"));
}

#[test]
fn what_is_never_reset() {
    let (pod, service) = (four("10.244.1.2"), four("10.96.0.99"));
    let mut bad_checksum = segment(pod, service, 1, 0, SYN, b"");
    bad_checksum[51] ^= 1;
    let mut to_group = segment(pod, service, 1, 0, SYN, b"");
    to_group[0] |= 1;
    for (name, frame) in [
        ("a RST", segment(pod, service, 1, 0, RST, b"")),
        ("a RST with ACK", segment(pod, service, 1, 1, RST | ACK, b"")),
        ("UDP", Spec::new(pod, service, Carried::Udp, 1, 2, b"").frame()),
        ("a wrong checksum", bad_checksum),
        ("to a multicast address", segment(pod, four("224.1.1.1"), 1, 0, SYN, b"")),
        ("to the broadcast address", segment(pod, four("255.255.255.255"), 1, 0, SYN, b"")),
        ("in a broadcast frame", to_group),
        ("a first fragment", ipv4_frame(&[], 0x2000, 6, &[&tcp_header(1, 2, SYN)[..], &[0; 4]].concat())),
        ("a later fragment", ipv4_frame(&[], 0x0010, 6, &[0; 24])),
    ] {
        let view = view_of::<Ipv4Addr>(&frame);
        assert_eq!(built(|out| tcp_reset(out, &frame, &view)), None, "{name}");
    }
}

#[test]
fn icmp_errors_byte_by_byte() {
    let mut spec = Spec::new(four("10.244.1.2"), four("10.244.2.2"), Carried::Udp, 5000, 6000, b"last hop");
    spec.ttl = 1;
    let mut frame = spec.frame();
    // As the independent bytes have it: TOS 0xb9, identification 0x1234, no DF.
    frame[15] = 0xb9;
    frame[18..22].copy_from_slice(&[0x12, 0x34, 0, 0]);
    fix_header_checksum(&mut frame[14..]);
    frame.extend([0; 4]);
    let view = view_of::<Ipv4Addr>(&frame);
    let error = built(|out| icmp_error(out, &frame, &view, four("192.168.0.10"), IcmpError::TtlExceeded)).unwrap();
    let expected = "02000000000102000000000a080045d800400000400040016d3dc0a8000a0af401020b000e0d0000000045b9002412340000\
        01118df10af401020af402021388177000104c3c6c61737420686f70";
    assert_eq!(error, hex(expected));
    needs_room(78, |out| icmp_error(out, &frame, &view, four("192.168.0.10"), IcmpError::TtlExceeded));

    let frame = Spec::new(six("fd00:10::2"), six("fd00:20::2"), Carried::Udp, 5000, 6000, b"x").frame();
    let view = view_of::<Ipv6Addr>(&frame);
    let error = built(|out| icmp_error(out, &frame, &view, six("fd00:96::1"), IcmpError::PortUnreachable)).unwrap();
    let expected = "02000000000102000000000a86dd6000000000393a40fd000096000000000000000000000001fd0000100000000000000000\
        00000002010492ae000000006000000000091140fd000010000000000000000000000002fd00002000000000000000000000000213881770\
        000962ae78";
    assert_eq!(error, hex(expected));
}

#[test]
fn icmp_error_types_and_lengths() {
    fn check<A: Family>(src: A, dst: A, largest: usize, rows: &[(IcmpError, [u8; 8])]) {
        for bytes in [0, 100, 1400] {
            let frame = Spec::new(src, dst, Carried::Udp, 5000, 6000, &vec![7; bytes]).frame();
            let view = view_of::<A>(&frame);
            for (error, header) in rows {
                let message = built(|out| icmp_error(out, &frame, &view, dst, *error)).unwrap();
                let answer = view_of::<A>(&message);
                assert_eq!((answer.key.src, answer.key.dst, answer.kind), (dst, src, Kind::IcmpError));
                let l4 = answer.l4_slice(&message);
                assert_eq!((l4[0], l4[1], &l4[4..8]), (header[0], header[1], &header[4..]), "{error:?}");
                assert!(l4_checksum_right(&message[14..], A::HEADER_BYTES, A::ICMP.0));
                assert!(header_checksum_right(&message[14..]));
                let quote = answer.quote(&message);
                assert_eq!(
                    usize::from(answer.ip_bytes()),
                    largest.min(usize::from(view.ip_bytes()) + A::HEADER_BYTES + 8)
                );
                assert_eq!(quote, &frame[14..14 + quote.len()]);
                assert_eq!(parse_embedded::<A>(quote).unwrap().key, view.key);
            }
        }
    }
    let too_big = IcmpError::TooBig { mtu: 1480 };
    check(
        four("10.244.1.2"),
        four("10.244.2.2"),
        576,
        &[
            (IcmpError::NetUnreachable, [3, 0, 0, 0, 0, 0, 0, 0]),
            (IcmpError::HostUnreachable, [3, 1, 0, 0, 0, 0, 0, 0]),
            (IcmpError::PortUnreachable, [3, 3, 0, 0, 0, 0, 0, 0]),
            (too_big, [3, 4, 0, 0, 0, 0, 0x05, 0xc8]),
            (IcmpError::AdminProhibited, [3, 13, 0, 0, 0, 0, 0, 0]),
            (IcmpError::TtlExceeded, [11, 0, 0, 0, 0, 0, 0, 0]),
        ],
    );
    check(
        six("fd00::1"),
        six("fd00::2"),
        1280,
        &[
            (IcmpError::NetUnreachable, [1, 0, 0, 0, 0, 0, 0, 0]),
            (IcmpError::AdminProhibited, [1, 1, 0, 0, 0, 0, 0, 0]),
            (IcmpError::HostUnreachable, [1, 3, 0, 0, 0, 0, 0, 0]),
            (IcmpError::PortUnreachable, [1, 4, 0, 0, 0, 0, 0, 0]),
            (too_big, [2, 0, 0, 0, 0, 0, 0x05, 0xc8]),
            (IcmpError::TtlExceeded, [3, 0, 0, 0, 0, 0, 0, 0]),
        ],
    );
}

#[test]
fn what_gets_no_icmp_error() {
    fn refused<A: Family>(name: &str, frame: &[u8], source: A, error: IcmpError) {
        let view = view_of::<A>(frame);
        assert_eq!(built(|out| icmp_error(out, frame, &view, source, error)), None, "{name}");
    }
    let (pod, router) = (four("10.244.1.2"), four("192.168.0.10"));
    let to = |dst: &str| Spec::new(pod, four(dst), Carried::Udp, 1, 2, b"").frame();
    let mut in_broadcast = to("10.0.0.9");
    in_broadcast[..6].fill(0xff);
    let mut from_group = to("10.0.0.9");
    from_group[6] |= 1;
    for (name, frame) in [
        ("an ICMP error", ipv4_frame(&[], 0, 1, &[3, 1, 0, 0, 0, 0, 0, 0])),
        ("a redirect", ipv4_frame(&[], 0, 1, &[5, 1, 0, 0, 0, 0, 0, 0])),
        ("a later fragment", ipv4_frame(&[], 3, 17, &[0; 8])),
        ("IGMP", ipv4_frame(&[], 0, 2, &[0x16; 8])),
        ("a multicast destination", to("239.1.1.1")),
        ("a broadcast destination", to("255.255.255.255")),
        ("in a broadcast frame", in_broadcast),
        ("in a frame from a group", from_group),
    ] {
        refused(name, &frame, router, IcmpError::TtlExceeded);
        refused(name, &frame, router, IcmpError::TooBig { mtu: 1400 });
    }
    let to_group = Spec::new(six("fd00::1"), six("ff0e::1"), Carried::Udp, 1, 2, b"").frame();
    refused("an IPv6 multicast destination", &to_group, six("fd00::9"), IcmpError::TtlExceeded);
    let view = view_of::<Ipv6Addr>(&to_group);
    let too_big = IcmpError::TooBig { mtu: 1400 };
    assert!(built(|out| icmp_error(out, &to_group, &view, six("fd00::9"), too_big)).is_some(), "RFC 4443, 2.4 e");
    refused("neighbour discovery", &hex(SOLICITATION), six("fd00::9"), IcmpError::TtlExceeded);

    let first = ipv4_frame(&[], 0x2000, 6, &[&tcp_header(1, 2, SYN)[..], &[0; 4]].concat());
    let view = view_of::<Ipv4Addr>(&first);
    assert!(built(|out| icmp_error(out, &first, &view, router, IcmpError::TtlExceeded)).is_some(), "a first fragment");
    let ping = Spec::new(pod, four("10.0.0.9"), Carried::EchoRequest, 1, 2, b"").frame();
    let view = view_of::<Ipv4Addr>(&ping);
    assert!(built(|out| icmp_error(out, &ping, &view, router, IcmpError::TtlExceeded)).is_some(), "an echo request");
}

/// All fragments of a frame as frames.
fn fragments(frame: &[u8], view: &View<Ipv4Addr>, mtu: usize) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    let count = fragment_ipv4(frame, view, mtu, |header, payload| {
        assert!(header.len() + payload.len() <= mtu);
        out.push([&frame[..14], header, payload].concat());
    });
    assert_eq!(count, out.len());
    out
}

/// Joins fragments by their offsets; panics where they overlap, leave a hole, or do not end.
fn join(fragments: &[Vec<u8>]) -> Vec<u8> {
    let mut payload = Vec::new();
    let mut more = true;
    for frame in fragments {
        assert!(more, "nothing follows the last");
        assert!(header_checksum_right(&frame[14..]));
        let field = u16::from_be_bytes([frame[20], frame[21]]);
        assert_eq!(usize::from(field & 0x1fff) * 8, payload.len());
        more = field & 0x2000 != 0;
        let view = view_of::<Ipv4Addr>(frame);
        payload.extend(view.l4_slice(frame));
    }
    assert!(!more);
    payload
}

#[test]
fn options_go_into_the_fragments_that_they_belong_to() {
    // Record route is not copied, router alert and security are; NOPs between.
    let options = [7, 7, 4, 0, 0, 0, 0, 1, 148, 4, 0, 0, 130, 3, 9, 0];
    let payload: Vec<u8> = [&[0x9c, 0x40, 0, 53, 0, 208, 0, 0][..], &(0..200).collect::<Vec<u8>>()].concat();
    let frame = ipv4_frame(&options, 0, 17, &payload);
    let parts = fragments(&frame, &view_of(&frame), 100);
    assert_eq!(parts[0][34..50], options);
    assert_eq!(parts[1][34..42], [148, 4, 0, 0, 130, 3, 9, 0]);
    assert_eq!(parts[1][14], 0x47);
    assert_eq!(join(&parts), payload);
}

#[test]
fn packets_that_are_not_fragmented() {
    let udp = [&[0x9c, 0x40, 0, 53, 0, 108, 0, 0][..], &[0; 100]].concat();
    let dont = ipv4_frame(&[], 0x4000, 17, &udp);
    assert!(fragments(&dont, &view_of(&dont), 60).is_empty(), "DF");
    let may = ipv4_frame(&[], 0, 17, &udp);
    assert!(fragments(&may, &view_of(&may), 27).is_empty(), "no room");
    assert_eq!(fragments(&may, &view_of(&may), 28).len(), 14);
    let whole = fragments(&may, &view_of(&may), 128);
    assert_eq!(whole, [may], "what fits stays as it is");
}

proptest! {
    #[test]
    fn fragments_join_again(bytes in 0..3000_usize, mtu in 68..1600_usize, second_mtu in 68..600_usize, padding in 0..9_usize) {
        let data: Vec<u8> = (0..bytes).map(|i| i as u8).collect();
        let udp = [&[0x9c, 0x40, 0, 53][..], &(8 + bytes as u16).to_be_bytes(), &[0, 0], &data].concat();
        let mut frame = ipv4_frame(&[148, 4, 0, 0], 0, 17, &udp);
        frame.extend(vec![0xaa; padding]);
        let parts = fragments(&frame, &view_of(&frame), mtu);
        prop_assert_eq!(&join(&parts), &udp);
        let again: Vec<Vec<u8>> = parts.iter().flat_map(|part| fragments(part, &view_of(part), second_mtu)).collect();
        prop_assert_eq!(&join(&again), &udp);
    }

    #[test]
    fn errors_about_anything_are_right(spec in any_spec::<Ipv4Addr>(), spec6 in any_spec::<Ipv6Addr>(), mtu in any::<u32>()) {
        fn check<A: Family>(spec: &Spec<A>, error: IcmpError) {
            let frame = spec.frame();
            let view = view_of::<A>(&frame);
            let message = built(|out| icmp_error(out, &frame, &view, spec.dst, error)).unwrap();
            let answer = view_of::<A>(&message);
            assert!(l4_checksum_ok(&message, &answer));
            let embedded = parse_embedded::<A>(answer.quote(&message));
            assert_eq!(embedded.map(|embedded| embedded.key), quotable(&view, &frame));
        }
        fn quotable<A: Family>(view: &View<A>, frame: &[u8]) -> Option<weir_packet::FlowKey<A>> {
            assert!(l4_checksum_ok(frame, view));
            Some(view.key)
        }
        check(&spec, IcmpError::TooBig { mtu });
        check(&spec6, IcmpError::HostUnreachable);
    }
}
