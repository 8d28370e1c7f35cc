//! Parsing: what must be refused and why, what must be accepted and how it reads, and that nothing makes it panic.

mod common;
mod exercise;

use std::net::{Ipv4Addr, Ipv6Addr};

use common::*;
use exercise::{etherparse_reads, exercise_frame};
use proptest::prelude::*;
use weir_packet::{
    DropReason, Mac, Ports, Protocol,
    parse::{
        Arp, Kind, Parsed, TcpFields, View, inner_of_ipip, l4_checksum_ok, parse, parse_embedded, parse_ip,
        parse_start_of_own,
    },
};

const SYN: u8 = TcpFields::SYN;
const ACK: u8 = TcpFields::ACK;
const FIN: u8 = TcpFields::FIN;
const RST: u8 = TcpFields::RST;
const PSH: u8 = TcpFields::PSH;
const URG: u8 = TcpFields::URG;

fn udp_header(length: u16) -> Vec<u8> {
    [&[0x9c, 0x40, 0, 53][..], &length.to_be_bytes(), &[0, 0]].concat()
}

/// Sets bytes of the IPv4 header, and its checksum right again.
fn with_ipv4(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[14 + at..14 + at + bytes.len()].copy_from_slice(bytes);
    fix_header_checksum(&mut frame[14..]);
    frame
}

fn with(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

/// A good IPv4 UDP frame with 4 bytes of payload.
fn udp4() -> Vec<u8> {
    ipv4_frame(&[], 0, 17, &[&udp_header(12)[..], &[1, 2, 3, 4]].concat())
}

fn udp6() -> Vec<u8> {
    ipv6_frame(17, &[&udp_header(12)[..], &[1, 2, 3, 4]].concat())
}

fn tcp4(flags: u8) -> Vec<u8> {
    ipv4_frame(&[], 0, 6, &tcp_header(40000, 80, flags))
}

fn v4(frame: &[u8]) -> View<Ipv4Addr> {
    view_of(frame)
}

fn v6(frame: &[u8]) -> View<Ipv6Addr> {
    view_of(frame)
}

#[test]
fn refused_frames_and_their_reasons() {
    use DropReason::*;
    let udp = udp_header(12);
    let udp_payload = [&udp[..], &[1, 2, 3, 4]].concat();
    let cut = |mut frame: Vec<u8>, bytes: usize| {
        frame.truncate(bytes);
        frame
    };
    let fragment6 = |next: u8, place: u16, data: &[u8]| {
        ipv6_frame(44, &[&[next, 0][..], &place.to_be_bytes(), &[0, 0, 0, 9], data].concat())
    };
    let mapped = "::ffff:10.0.0.1".parse::<Ipv6Addr>().unwrap().octets();
    let hop_by_hop = [17, 0, 1, 4, 0, 0, 0, 0];
    let rows: Vec<(&str, Vec<u8>, DropReason)> = vec![
        ("empty frame", vec![], Truncated),
        ("Ethernet header cut", vec![0; 13], Truncated),
        ("IPv4 header cut", cut(udp4(), 33), Truncated),
        ("IPv4 packet cut", cut(udp4(), 45), Truncated),
        ("larger than any offset", udp4().into_iter().chain([0; 65_536]).collect(), Truncated),
        ("version 5 as IPv4", with_ipv4(udp4(), 0, &[0x55]), MalformedHeader),
        ("IPv4 header length 16", with(udp4(), 14, &[0x44]), MalformedHeader),
        ("total length below header", with_ipv4(udp4(), 2, &[0, 19]), MalformedHeader),
        ("header length beyond packet", with(udp4(), 14, &[0x4f]), MalformedHeader),
        ("IPv4 header checksum", with(udp4(), 24, &[0xde, 0xad]), BadHeaderChecksum),
        ("source multicast", with_ipv4(udp4(), 12, &[224, 0, 0, 1]), MartianAddress),
        ("source broadcast", with_ipv4(udp4(), 12, &[255; 4]), MartianAddress),
        ("source 0.0.0.0", with_ipv4(udp4(), 12, &[0; 4]), MartianAddress),
        ("source 0.0.0.1, to all", with_ipv4(udp4(), 12, &[0, 0, 0, 1, 255, 255, 255, 255]), MartianAddress),
        ("source 0.1.2.3", with_ipv4(udp4(), 12, &[0, 1, 2, 3]), MartianAddress),
        ("source loopback", with_ipv4(udp4(), 12, &[127, 0, 0, 1]), MartianAddress),
        ("destination loopback", with_ipv4(udp4(), 16, &[127, 1, 2, 3]), MartianAddress),
        ("destination 0.0.0.0", with_ipv4(udp4(), 16, &[0; 4]), MartianAddress),
        ("loose source route", ipv4_frame(&[131, 7, 4, 1, 2, 3, 4, 0], 0, 17, &udp_payload), Unsupported),
        ("strict source route", ipv4_frame(&[1, 137, 7, 4, 1, 2, 3, 4], 0, 17, &udp_payload), Unsupported),
        ("option of length 0", ipv4_frame(&[7, 0, 0, 0], 0, 17, &udp_payload), MalformedHeader),
        ("option of length 1", ipv4_frame(&[7, 1, 0, 0], 0, 17, &udp_payload), MalformedHeader),
        ("option beyond header", ipv4_frame(&[7, 5, 0, 0], 0, 17, &udp_payload), MalformedHeader),
        ("option without length", ipv4_frame(&[1, 1, 1, 7], 0, 17, &udp_payload), MalformedHeader),
        ("TCP header cut by total length", ipv4_frame(&[], 0, 6, &tcp_header(1, 2, ACK)[..19]), MalformedHeader),
        ("TCP data offset 4", with(tcp4(ACK), 46, &[0x40]), MalformedHeader),
        ("TCP data offset beyond packet", with(tcp4(ACK), 46, &[0x60]), MalformedHeader),
        ("UDP header cut", ipv4_frame(&[], 0, 17, &udp[..7]), MalformedHeader),
        ("UDP length below header", ipv4_frame(&[], 0, 17, &udp_header(7)), MalformedHeader),
        ("UDP length 0", ipv4_frame(&[], 0, 17, &udp_header(0)), MalformedHeader),
        ("UDP length beyond packet", ipv4_frame(&[], 0, 17, &udp_header(9)), MalformedHeader),
        ("SCTP header cut", ipv4_frame(&[], 0, 132, &[0; 11]), MalformedHeader),
        ("ICMP header cut", ipv4_frame(&[], 0, 1, &[8, 0, 0, 0, 0, 0, 0]), MalformedHeader),
        ("ICMPv6 over IPv4", ipv4_frame(&[], 0, 58, &[128, 0, 0, 0, 0, 0, 0, 0]), Invalid),
        ("ICMP over IPv6", ipv6_frame(1, &[8, 0, 0, 0, 0, 0, 0, 0]), Invalid),
        ("fragment of TCP at 8", ipv4_frame(&[], 1, 6, &[0; 16]), FragmentTiny),
        ("tiny first TCP fragment", ipv4_frame(&[], 0x2000, 6, &tcp_header(1, 2, SYN)[..16]), FragmentTiny),
        ("empty first fragment", ipv4_frame(&[], 0x2000, 17, &[]), FragmentMalformed),
        ("TCP options cut in first", with(ipv4_frame(&[], 0x2000, 6, &[0; 24]), 46, &[0x80]), FragmentTiny),
        ("empty later fragment", ipv4_frame(&[], 0x2004, 17, &[]), FragmentMalformed),
        ("fragment not in eights", ipv4_frame(&[], 0x2004, 17, &[0; 12]), FragmentMalformed),
        ("fragment beyond 65535", ipv4_frame(&[], 0x1fff, 17, &[0; 8]), FragmentMalformed),
        ("first fragment of an ICMP error", ipv4_frame(&[], 0x2000, 1, &[3; 16]), FragmentMalformed),
        ("first fragment of IGMP", ipv4_frame(&[], 0x2000, 2, &[0x16; 16]), FragmentMalformed),
        ("IPv6 header cut", cut(udp6(), 53), Truncated),
        ("IPv6 packet cut", cut(udp6(), 65), Truncated),
        ("version 4 as IPv6", with(udp6(), 14, &[0x45]), MalformedHeader),
        ("source ff02::1", with(udp6(), 22, &[0xff, 2]), MartianAddress),
        ("source ::", with(udp6(), 22, &[0; 16]), MartianAddress),
        ("source ::1", with(udp6(), 22, &[&[0; 15][..], &[1]].concat()), MartianAddress),
        ("source mapped", with(udp6(), 22, &mapped), MartianAddress),
        ("destination ::", with(udp6(), 38, &[0; 16]), MartianAddress),
        ("destination ::1", with(udp6(), 38, &[&[0; 15][..], &[1]].concat()), MartianAddress),
        ("destination mapped", with(udp6(), 38, &mapped), MartianAddress),
        ("destination of interface scope", with(udp6(), 38, &[0xff, 1]), MartianAddress),
        ("hop-by-hop cut", ipv6_frame(0, &hop_by_hop[..7]), MalformedHeader),
        ("hop-by-hop longer than packet", ipv6_frame(0, &[17, 2, 1, 4, 0, 0, 0, 0]), MalformedHeader),
        ("jumbogram", with(udp6(), 18, &[0, 0, 0]), MalformedHeader),
        ("hop-by-hop twice", ipv6_frame(0, &[0, 0, 1, 4, 0, 0, 0, 0].repeat(3)), MalformedHeader),
        ("endless destination options", ipv6_frame(60, &[60, 0, 1, 4, 0, 0, 0, 0].repeat(30)), MalformedHeader),
        ("routing header in use", ipv6_frame(43, &[17, 0, 0, 1, 0, 0, 0, 0]), Unsupported),
        ("two fragment headers", fragment6(44, 1, &[17, 0, 0, 1, 0, 0, 0, 9]), MalformedHeader),
        ("IPv6 tiny first fragment", fragment6(6, 1, &tcp_header(1, 2, SYN)[..16]), FragmentTiny),
        ("IPv6 chain cut in first fragment", fragment6(60, 1, &[6, 1, 1, 12, 0, 0, 0, 0]), FragmentTiny),
        ("IPv6 fragment not in eights", fragment6(17, 0x61, &[0; 12]), FragmentMalformed),
        ("IPv6 fragment beyond 65535", fragment6(17, 0xfff8, &[0; 8]), FragmentMalformed),
        ("fragmented neighbour solicitation", fragment6(58, 1, &[135; 24]), FragmentMalformed),
        ("no L4 after IPv6", ipv6_frame(17, &[]), MalformedHeader),
        ("ARP cut", cut(with(vec![0; 42], 12, &[8, 6, 0, 1, 8, 0, 6, 4]), 41), Truncated),
        ("ARP of another link", with(vec![0; 42], 12, &[8, 6, 0, 6, 8, 0, 6, 4]), MalformedHeader),
    ];
    for (name, frame, reason) in rows {
        assert_eq!(parse(&frame), Err(reason), "{name}");
        // What a node's own kernel sends to itself may have loopback addresses.
        let own = parse_start_of_own(&frame, frame.len());
        assert_eq!(own.err(), (!name.contains("loopback") && !name.ends_with(" ::1")).then_some(reason), "{name}");
    }
}

#[test]
fn tcp_flag_combinations() {
    // What netfilter lets pass, over all of FIN, SYN, RST, ACK, URG; PSH, ECE and CWR do not matter.
    let possible = [SYN, SYN | URG, SYN | ACK, RST, RST | ACK, ACK, ACK | URG, FIN | ACK, FIN | ACK | URG];
    for flags in 0..=255_u8 {
        let expected = possible.contains(&(flags & (FIN | SYN | RST | ACK | URG)));
        let parsed = parse(&tcp4(flags));
        if expected {
            assert!(parsed.is_ok(), "{flags:#010b}");
        } else {
            assert_eq!(parsed, Err(DropReason::Invalid), "{flags:#010b}");
        }
    }
    assert_eq!(PSH, 8);
}

#[test]
fn an_ipv4_packet_with_options_and_padding() {
    let mut frame = ipv4_frame(&[7, 3, 4, 1, 148, 4, 0, 0], 0x4000, 17, &udp_header(8));
    frame.extend([0xaa; 18]);
    let view = v4(&frame);
    assert_eq!((view.l3, view.l4, view.end), (14, 42, 50));
    assert_eq!((view.ip_bytes(), view.l4_bytes()), (36, 8));
    assert_eq!((view.ttl, view.tos, view.dont_fragment, view.kind), (64, 0, true, Kind::Flow));
    assert_eq!(view.key.ports, Ports::new(40000, 53));
    assert_eq!((view.key.src, view.key.dst), ([10, 0, 0, 1].into(), [10, 0, 0, 2].into()));
}

#[test]
fn tcp_fields_and_options() {
    let spec = Spec::new(
        Ipv4Addr::new(10, 0, 0, 1),
        Ipv4Addr::new(10, 0, 0, 2),
        Carried::Tcp { syn: false },
        40000,
        80,
        b"hello",
    );
    let mut frame = spec.frame();
    frame.extend([0; 6]);
    let view = v4(&frame);
    let expected = TcpFields { flags: ACK | PSH, seq: 0x0102_0304, ack: 0x0a0b_0c0d, window: 1000, payload_bytes: 5 };
    assert_eq!(view.tcp(&frame), expected);
    assert_eq!(view.tcp_options(&frame), [1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(view.icmp(&frame), None);
    let udp = udp4();
    assert_eq!(v4(&udp).tcp(&udp), TcpFields::default());
    assert!(v4(&udp).tcp_options(&udp).is_empty());
}

#[test]
fn icmp_kinds_and_keys() {
    let v4_rows = [
        (8, 0, Kind::Flow, Ports::new(0x0506, 8)),
        (0, 0, Kind::Flow, Ports::new(0x0506, 0)),
        (3, 4, Kind::IcmpError, Ports::new(4, 3)),
        (4, 0, Kind::IcmpError, Ports::new(0, 4)),
        (5, 1, Kind::IcmpError, Ports::new(1, 5)),
        (11, 1, Kind::IcmpError, Ports::new(1, 11)),
        (12, 0, Kind::IcmpError, Ports::new(0, 12)),
        (9, 0, Kind::Control, Ports::new(0, 9)),
        (10, 0, Kind::Control, Ports::new(0, 10)),
        (13, 0, Kind::Flow, Ports::new(0x0506, 13)),
        (18, 0, Kind::Flow, Ports::new(0x0506, 18)),
        (19, 2, Kind::Flow, Ports::new(2, 19)),
        (128, 0, Kind::Flow, Ports::new(0, 128)),
    ];
    for (icmp_type, code, kind, ports) in v4_rows {
        let frame = ipv4_frame(&[], 0, 1, &[icmp_type, code, 0, 0, 5, 6, 7, 8]);
        let view = v4(&frame);
        assert_eq!((view.kind, view.key.ports), (kind, ports), "ICMP type {icmp_type}");
        assert_eq!(view.icmp(&frame), Some((icmp_type, code)));
    }
    for icmp_type in 0..=255_u8 {
        let view = v6(&ipv6_frame(58, &[icmp_type, 2, 0, 0, 5, 6, 7, 8]));
        let kind = match icmp_type {
            1..=4 => Kind::IcmpError,
            130..=137 | 141 | 142 | 143 | 148 | 149 | 151 | 152 | 153 => Kind::Control,
            _ => Kind::Flow,
        };
        let echo = matches!(icmp_type, 128 | 129);
        // The code of an echo stands above its type: its other half has the identifier.
        let ports =
            if echo { Ports::new(0x0506, 2 << 8 | u16::from(icmp_type)) } else { Ports::new(2, icmp_type.into()) };
        assert_eq!((view.kind, view.key.ports), (kind, ports), "ICMPv6 type {icmp_type}");
    }
    assert_eq!(v4(&ipv4_frame(&[], 0, 2, &[0x16; 8])).kind, Kind::Control, "IGMP");
    assert_eq!(v6(&ipv6_frame(2, &[0x16; 8])).kind, Kind::Flow, "protocol 2 is nothing in IPv6");
}

#[test]
fn fragments() {
    let first = v4(&ipv4_frame(&[], 0x2000, 17, &[&udp_header(3008)[..], &[0; 16]].concat()));
    assert_eq!(first.kind, Kind::FirstFragment { id: 0x1234, bytes: 24 });
    assert_eq!(first.key.ports, Ports::new(40000, 53));
    let later = v4(&ipv4_frame(&[], 0x2003, 17, &[0; 16]));
    assert_eq!(later.kind, Kind::LaterFragment { id: 0x1234, offset: 24, bytes: 16, more: true });
    assert_eq!((later.key.ports, later.l4), (Ports::default(), 34));
    let last = v4(&ipv4_frame(&[], 5, 17, &[0; 3]));
    assert_eq!(last.kind, Kind::LaterFragment { id: 0x1234, offset: 40, bytes: 3, more: false });

    let header = |next: u8, place: u16| [&[next, 0][..], &place.to_be_bytes(), &[1, 2, 3, 4]].concat();
    let udp = udp_header(8);
    let first = v6(&ipv6_frame(44, &[&header(17, 1)[..], &udp].concat()));
    assert_eq!(first.kind, Kind::FirstFragment { id: 0x0102_0304, bytes: 8 });
    assert_eq!((first.key.ports, first.key.protocol, first.l4), (Ports::new(40000, 53), Protocol::UDP, 62));
    let options = [17, 0, 1, 4, 0, 0, 0, 0];
    let first = v6(&ipv6_frame(44, &[&header(60, 1)[..], &options, &udp].concat()));
    assert_eq!(first.kind, Kind::FirstFragment { id: 0x0102_0304, bytes: 16 });
    assert_eq!((first.key.protocol, first.l4), (Protocol::UDP, 70));
    let later = v6(&ipv6_frame(44, &[&header(60, 0x18)[..], &udp].concat()));
    assert_eq!(later.kind, Kind::LaterFragment { id: 0x0102_0304, offset: 24, bytes: 8, more: false });
    let atomic = v6(&ipv6_frame(44, &[&header(17, 0)[..], &udp].concat()));
    assert_eq!((atomic.kind, atomic.key.ports), (Kind::Flow, Ports::new(40000, 53)), "RFC 6946");
}

#[test]
fn extension_headers_are_walked_to_the_ports() {
    let chain = [
        &[60, 0, 1, 4, 0, 0, 0, 0][..],                                             // hop-by-hop
        &[43, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],                        // destination options, 16 bytes
        &[17, 2, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], // routing, used up
        &udp_header(8),
    ]
    .concat();
    let view = v6(&ipv6_frame(0, &chain));
    assert_eq!((view.key.protocol, view.key.ports, view.l4), (Protocol::UDP, Ports::new(40000, 53), 102));
    let ah = v6(&ipv6_frame(51, &[6; 24]));
    assert_eq!((ah.key.protocol, ah.key.ports, ah.l4), (Protocol(51), Ports::default(), 54));
    let none = v6(&ipv6_frame(59, &[]));
    assert_eq!((none.key.protocol, none.kind), (Protocol(59), Kind::Flow));
}

#[test]
fn the_unspecified_address_may_solicit() {
    let frame = with(ipv6_frame(58, &[135; 24]), 22, &[0; 16]);
    assert_eq!(v6(&frame).kind, Kind::Control);
}

#[test]
fn arp_vlan_and_others() {
    let frame = hex("ffffffffffff 020000000001 0806 0001 0800 06 04 0001 020000000001 0af40102 000000000000 a9fe0101");
    let arp = Arp {
        operation: Arp::REQUEST,
        sender_mac: Mac(CLIENT_MAC),
        sender_ip: [10, 244, 1, 2].into(),
        target_mac: Mac::default(),
        target_ip: [169, 254, 1, 1].into(),
    };
    assert_eq!(parse(&frame), Ok(Parsed::Arp(arp)));
    for ethertype in [0x8100_u16, 0x88a8, 0x88cc, 0x0026] {
        let frame = with(vec![0; 60], 12, &ethertype.to_be_bytes());
        assert_eq!(parse(&frame), Ok(Parsed::Other { ethertype }));
    }
}

#[test]
fn ipip_inside() {
    let inner = udp4()[14..].to_vec();
    let mut frame = ipv4_frame(&[], 0x4000, 4, &inner);
    frame.extend([0; 9]);
    let outer = v4(&frame);
    assert_eq!((outer.key.protocol, outer.kind), (Protocol::IPIP, Kind::Flow));
    let view = inner_of_ipip(&frame, &outer).unwrap();
    assert_eq!((view.l3, view.l4, view.end), (34, 54, 66));
    let moved = view.moved_up(20).unwrap();
    assert_eq!(parse_ip(&frame[20..], 14, 0x0800), Ok(Parsed::V4(moved)));
    assert_eq!(view.moved_up(21), None);

    let tcp_without_flags = tcp4(0)[14..].to_vec();
    let fragment = ipv4_frame(&[], 1, 6, &[0; 16])[14..].to_vec();
    let six_in_four = ipv4_frame(&[], 0, 41, &udp6()[14..])[14..].to_vec();
    let loopback = with_ipv4(udp4(), 12, &[127, 0, 0, 1])[14..].to_vec();
    let bad_sum = with(udp4(), 24, &[1, 2])[14..].to_vec();
    let rows: [(&str, u16, &[u8], DropReason); 9] = [
        ("nothing", 0, &[], DropReason::TunnelNested),
        ("half a header", 0, &inner[..19], DropReason::TunnelNested),
        ("a packet cut", 0, &inner[..31], DropReason::TunnelNested),
        ("wrong inner header checksum", 0, &bad_sum, DropReason::TunnelNested),
        ("inner loopback", 0, &loopback, DropReason::TunnelNested),
        ("IPv6 inside", 0, &six_in_four, DropReason::TunnelNested),
        ("impossible flags inside", 0, &tcp_without_flags, DropReason::Invalid),
        ("tiny fragment inside", 0, &fragment, DropReason::FragmentTiny),
        ("outer fragment", 0x2000, &inner, DropReason::Unsupported),
    ];
    for (name, place, inside, reason) in rows {
        let frame = ipv4_frame(&[], place, 4, inside);
        assert_eq!(inner_of_ipip(&frame, &v4(&frame)), Err(reason), "{name}");
    }
    let nested = ipv4_frame(&[], 0, 4, &frame[14..frame.len() - 9]);
    assert_eq!(inner_of_ipip(&nested, &v4(&nested)), Err(DropReason::TunnelNested), "IPIP in IPIP");
}

#[test]
fn embedded_packets() {
    let udp = udp4();
    let embedded = parse_embedded::<Ipv4Addr>(&udp[14..42]).unwrap();
    assert_eq!(embedded.key, v4(&udp).key);
    assert_eq!((embedded.l4, embedded.quoted_bytes, embedded.l4_bytes), (20, 28, 12));
    assert_eq!(parse_embedded::<Ipv4Addr>(&udp[14..41]), None, "7 bytes of layer 4");
    assert_eq!(parse_embedded::<Ipv6Addr>(&udp[14..]), None, "other family");
    let tcp = tcp4(SYN);
    assert_eq!(parse_embedded::<Ipv4Addr>(&tcp[14..42]).unwrap().key, v4(&tcp).key);
    let ping = ipv4_frame(&[], 0, 1, &[8, 0, 0, 0, 5, 6, 0, 1]);
    assert_eq!(parse_embedded::<Ipv4Addr>(&ping[14..]).unwrap().key.ports, Ports::new(0x0506, 8));
    let error = ipv4_frame(&[], 0, 1, &[3, 1, 0, 0, 5, 6, 0, 1]);
    assert_eq!(parse_embedded::<Ipv4Addr>(&error[14..]), None, "an ICMP error");
    let later = ipv4_frame(&[], 3, 17, &[0; 8]);
    assert_eq!(parse_embedded::<Ipv4Addr>(&later[14..]), None, "a later fragment");
    let first = ipv4_frame(&[], 0x2000, 17, &[&udp_header(100)[..], &[0; 8]].concat());
    assert_eq!(parse_embedded::<Ipv4Addr>(&first[14..]).unwrap().l4_bytes, 0, "a first fragment");
    let bad_sum = with(udp4(), 24, &[1, 2]);
    assert!(parse_embedded::<Ipv4Addr>(&bad_sum[14..]).is_some(), "its checksum is its sender's matter");
    let options = ipv4_frame(&[7, 3, 4, 1], 0, 17, &udp_header(8));
    assert_eq!(parse_embedded::<Ipv4Addr>(&options[14..]).unwrap().l4, 24);
    let six = udp6();
    let embedded = parse_embedded::<Ipv6Addr>(&six[14..62]).unwrap();
    assert_eq!((embedded.key, embedded.l4, embedded.l4_bytes), (v6(&six).key, 40, 12));
    let esp = ipv6_frame(50, &[]);
    assert_eq!(parse_embedded::<Ipv6Addr>(&esp[14..]).unwrap().key.ports, Ports::default());
}

fn agrees_with_etherparse<A: Family>(spec: &Spec<A>) {
    let frame = spec.frame();
    let view = view_of::<A>(&frame);
    let reading = etherparse_reads(&frame).expect("etherparse reads what it made");
    assert_eq!((view.key.src.to_ip(), view.key.dst.to_ip(), view.ttl), (reading.src, reading.dst, spec.ttl));
    assert_eq!(view.l4_slice(&frame), reading.payload);
    assert_eq!(view.key.protocol, spec.protocol());
    let expected = match spec.carried {
        Carried::Tcp { .. } | Carried::Udp => {
            let ports = Ports::new(spec.source, spec.destination);
            assert_eq!(reading.ports, Some(ports));
            ports
        }
        Carried::Sctp => Ports::new(spec.source, spec.destination),
        Carried::EchoRequest => Ports::new(spec.source, if A::WORDS == 1 { 8 } else { 128 }),
        Carried::EchoReply => Ports::new(spec.source, if A::WORDS == 1 { 0 } else { 129 }),
        Carried::Portless => Ports::default(),
    };
    assert_eq!(view.key.ports, expected);
    assert!(l4_checksum_ok(&frame, &view));
}

/// Found by the fuzz target `parse`.
#[test]
fn frames_that_once_were_not_right() {
    // An echo reply of zeroes alone.
    exercise_frame(&ipv4_frame(&[], 0, 1, &[0; 17]));
}

/// Frames that get past the first checks: a good frame with a few bytes changed, its IPv4 header checksum right.
fn mutated<A: Family>() -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let start = any::<bool>();
    (any_spec::<A>(), changes, start, any::<Option<prop::sample::Index>>()).prop_map(|(spec, changes, start, cut)| {
        let mut frame = spec.frame();
        let bytes = if start { 80.min(frame.len()) } else { frame.len() };
        for (at, byte) in changes {
            frame[14 + at.index(bytes - 14)] = byte;
        }
        let header_bytes = usize::from(frame[14] & 15) * 4;
        if A::WORDS == 1 && (20..=frame.len() - 14).contains(&header_bytes) {
            fix_header_checksum(&mut frame[14..]);
        }
        if let Some(cut) = cut {
            frame.truncate(cut.index(frame.len() + 1));
        }
        frame
    })
}

/// An ICMP error about a frame, from its destination, quoting any part of it.
fn error_about(frame: &[u8], six: bool, quoted: usize) -> Vec<u8> {
    let quote = &frame[14..14 + quoted.min(frame.len() - 14)];
    let message = [&[if six { 1 } else { 3 }, 1, 0, 0, 0, 0, 0, 0][..], quote].concat();
    if six { ipv6_frame(58, &message) } else { ipv4_frame(&[], 0, 1, &message) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes(frame in prop::collection::vec(any::<u8>(), 0..200)) {
        exercise_frame(&frame);
    }

    #[test]
    fn random_packets_after_good_ethernet(
        ethertype in prop_oneof![Just(0x0800_u16), Just(0x86dd), Just(0x0806)],
        mut bytes in prop::collection::vec(any::<u8>(), 42..200),
        padding in 0..20_usize,
    ) {
        bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
        let ip_bytes = (bytes.len() - 14 - padding.min(8)) as u16;
        if ethertype == 0x0800 {
            bytes[14] = 0x45 + bytes[14] % 3;
            bytes[16..18].copy_from_slice(&ip_bytes.to_be_bytes());
            fix_header_checksum(&mut bytes[14..]);
        } else if ethertype == 0x86dd && bytes.len() > 62 {
            bytes[14] = 0x60;
            bytes[18..20].copy_from_slice(&(ip_bytes - 40).to_be_bytes());
            bytes[20] = [0, 6, 17, 43, 44, 58, 60, 132][usize::from(bytes[20] % 8)];
        }
        exercise_frame(&bytes);
    }

    #[test]
    fn mutated_ipv4(frame in mutated::<Ipv4Addr>()) {
        exercise_frame(&frame);
    }

    #[test]
    fn mutated_ipv6(frame in mutated::<Ipv6Addr>()) {
        exercise_frame(&frame);
    }

    #[test]
    fn mutated_ipip_and_quotes(four in mutated::<Ipv4Addr>(), six in mutated::<Ipv6Addr>(), quoted in 0..300_usize) {
        exercise_frame(&ipv4_frame(&[], 0, 4, four.get(14..).unwrap_or(&[])));
        if four.len() > 14 {
            exercise_frame(&error_about(&four, false, quoted));
        }
        if six.len() > 14 {
            exercise_frame(&error_about(&six, true, quoted));
        }
    }

    #[test]
    fn good_packets_read_as_etherparse_reads_them(four in any_spec::<Ipv4Addr>(), six in any_spec::<Ipv6Addr>()) {
        agrees_with_etherparse(&four);
        agrees_with_etherparse(&six);
    }

    #[test]
    fn checksums_are_judged_as_from_scratch(
        four in any_spec::<Ipv4Addr>(), six in any_spec::<Ipv6Addr>(), at in any::<prop::sample::Index>(), flip in any::<u8>(),
    ) {
        fn check<A: Family>(spec: &Spec<A>, at: prop::sample::Index, flip: u8) {
            let mut frame = spec.frame();
            let view = view_of::<A>(&frame);
            let l4 = usize::from(view.l4);
            if l4 < frame.len() {
                let at = l4 + at.index(frame.len() - l4);
                frame[at] ^= flip;
            }
            if let Ok(parsed) = parse(&frame) {
                let view = A::view(parsed).unwrap();
                // A UDP length below the payload's is trailing data, which the twin does not know of.
                if view.key.protocol != Protocol::UDP || usize::from(view.l4_bytes()) == udp_length(&frame, l4) {
                    let expected = l4_checksum_right(&frame[14..], l4 - 14, view.key.protocol.0);
                    assert_eq!(l4_checksum_ok(&frame, &view), expected);
                }
            }
        }
        check(&four, at, flip);
        check(&six, at, flip);
    }
}

fn udp_length(frame: &[u8], l4: usize) -> usize {
    usize::from(u16::from_be_bytes([frame[l4 + 4], frame[l4 + 5]]))
}
