//! The quick look beside the parser, and what is written after it beside what is written after parsing.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr};

use common::*;
use proptest::prelude::*;
use weir_packet::{
    Address, DropReason, FlowKey, Mac, Ports, Protocol,
    glance::{
        Glance, IPIP_BYTES, IPV4_BYTES, IPV6_BYTES, TunnelEnds, glance_ipip, glance_ipv4, glance_ipv6, may_be_forwarded,
    },
    options::TcpOptions,
    parse::{Kind, TcpFields, View, inner_of_ipip, parse_start},
    rewrite::{
        IPIP_HEADER_BYTES, LinkHeaders, decapsulated_tos, decrement_ttl, set_ethernet, translate, write_ipip_header,
    },
};

/// What the parser's view of a frame of `start` and more comes to, if the packet is one to be glanced at.
fn plain<A: Address>(start: &[u8], view: &View<A>, l3: usize) -> Option<Glance<A>> {
    let is_plain = view.kind == Kind::Flow
        && usize::from(view.l3) == l3
        && usize::from(view.l4) == l3 + A::HEADER_BYTES
        && start.len() >= l3 + A::HEADER_BYTES + 20;
    let tcp = view.tcp(start);
    let telling = TcpFields::FIN | TcpFields::SYN | TcpFields::RST | TcpFields::ACK;
    let is_followed = match view.key.protocol {
        Protocol::TCP => tcp.flags & telling == TcpFields::ACK,
        Protocol::UDP => true,
        _ => false,
    };
    let tos = if A::WORDS == 1 { view.tos } else { 0 };
    (is_plain && is_followed).then_some(Glance { key: view.key, ip_bytes: view.ip_bytes(), ttl: view.ttl, tos })
}

/// Both agree, but about addresses, which are not looked at.
fn agree<A: Address>(glance: Option<Glance<A>>, parsed: Result<View<A>, DropReason>, start: &[u8], l3: usize) {
    match (glance, parsed) {
        (Some(glance), Err(DropReason::MartianAddress | DropReason::TunnelNested)) => {
            assert!(!may_be_forwarded(glance.key.src, glance.key.dst), "{glance:?}");
        }
        (glance, parsed) => {
            let view = parsed.ok();
            assert_eq!(glance, view.as_ref().and_then(|view| plain(start, view, l3)), "{view:?}");
            if let (Some(glance), Some(view)) = (glance, view)
                && view.key.protocol == Protocol::TCP
            {
                let (tcp, options) = glance.tcp(&start[l3..]);
                assert_eq!((tcp, options), (view.tcp(start), view.tcp_options(start)));
                assert_eq!(
                    TcpOptions::read(options, &tcp),
                    TcpOptions::read(view.tcp_options(start), &view.tcp(start))
                );
            }
        }
    }
}

/// A frame with some bytes other ones, the IPv4 headers' checksums mostly right, of which the start lies in one piece.
fn change(frame: &mut Vec<u8>, changes: &[(usize, u8)], mends: bool, tail: &[u8], cut: usize) {
    for (at, value) in changes {
        let at = 14 + at % (frame.len() - 14);
        frame[at] = *value;
    }
    let mut l3 = 14;
    while mends && frame[l3] >> 4 == 4 && usize::from(frame[l3] & 15) * 4 >= 20 && frame.len() >= l3 + 60 {
        fix_header_checksum(&mut frame[l3..]);
        if frame[l3 + 9] != 4 {
            break;
        }
        l3 += 20;
    }
    frame.extend(tail);
    frame.truncate(cut.max(14));
}

fn tcp_or_udp<A: Family>() -> impl Strategy<Value = Vec<u8>> {
    let options = prop_oneof![
        Just(Vec::new()),
        Just(vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]),
        Just(vec![1, 1, 5, 10, 0, 0, 1, 0, 0, 0, 2, 0]),
    ];
    let payload = prop::collection::vec(any::<u8>(), 0..40);
    (A::any_host(), A::any_host(), any::<bool>(), any::<[u8; 4]>(), options, payload, any::<[u8; 2]>()).prop_map(
        |(src, dst, is_tcp, ports, options, payload, checksum)| {
            let mut l4 = ports.to_vec();
            if is_tcp {
                l4.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50 + 4 * options.len() as u8, 0x10, 1, 1]);
                l4.extend(checksum);
                l4.extend([0, 0]);
                l4.extend(options);
            } else {
                l4.extend((8 + payload.len() as u16).to_be_bytes());
                l4.extend(checksum);
            }
            l4.extend(payload);
            let protocol = if is_tcp { 6 } else { 17 };
            let mut frame = if A::WORDS == 1 { ipv4_frame(&[], 0, protocol, &l4) } else { ipv6_frame(protocol, &l4) };
            let addresses = 14 + A::HEADER_BYTES - 2 * A::BYTES;
            src.write(&mut frame[addresses..]);
            dst.write(&mut frame[addresses + A::BYTES..]);
            if A::WORDS == 1 {
                fix_header_checksum(&mut frame[14..]);
            }
            frame
        },
    )
}

fn in_tunnel(frame: &[u8], tos: u8) -> Vec<u8> {
    let mut outer = ipv4_frame(&[], 0x4000, 4, &frame[14..]);
    outer[15] = tos;
    fix_header_checksum(&mut outer[14..]);
    outer
}

/// Few, so that most packets are still ones to be glanced at.
fn changes() -> impl Strategy<Value = Vec<(usize, u8)>> {
    prop::collection::vec((0..80_usize, any::<u8>()), 0..3)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_glance_sees_what_the_parser_sees(
        mut four in tcp_or_udp::<Ipv4Addr>(),
        mut six in tcp_or_udp::<Ipv6Addr>(),
        tos in any::<[u8; 2]>(),
        is_congested in any::<bool>(),
        changes in changes(),
        mends in prop::bool::weighted(0.9),
        tail in prop::collection::vec(any::<u8>(), 0..20),
        cut in prop_oneof![3 => Just(usize::MAX), 1 => 0..120_usize],
        more_bytes in prop_oneof![3 => Just(0), 1 => 0..40_usize],
    ) {
        four[15] = tos[0];
        fix_header_checksum(&mut four[14..]);
        let mut nested = in_tunnel(&four, if is_congested { tos[1] } else { tos[0] });
        for frame in [&mut four, &mut six, &mut nested] {
            change(frame, &changes, mends, &tail, cut);
        }
        // The frame may go on elsewhere.
        let bytes = |frame: &[u8]| frame.len() + more_bytes;

        let parsed = parse_start(&four, bytes(&four)).map(|parsed| <Ipv4Addr as Family>::view(parsed).expect("IPv4"));
        agree(glance_ipv4(&four, bytes(&four)), parsed, &four, 14);
        let parsed = parse_start(&six, bytes(&six)).map(|parsed| <Ipv6Addr as Family>::view(parsed).expect("IPv6"));
        agree(glance_ipv6(&six, bytes(&six)), parsed, &six, 14);

        let glanced = glance_ipip(&nested, bytes(&nested));
        let outer = parse_start(&nested, bytes(&nested)).map(|parsed| <Ipv4Addr as Family>::view(parsed).expect("IPv4"));
        match outer {
            Ok(outer) if outer.key.protocol == Protocol::IPIP && outer.l4 == 34 => {
                let inner = inner_of_ipip(&nested, &outer);
                // Only where its type of service stays.
                let stays = |inner: &View<Ipv4Addr>| decapsulated_tos(outer.tos, inner.tos) == Some(inner.tos);
                match inner {
                    Ok(inner) if !stays(&inner) => prop_assert_eq!(glanced, None),
                    // Of two that mean the same, one is left to the parser.
                    Ok(inner) if glanced.is_none() && outer.tos & 3 != 0 && outer.tos & 3 != inner.tos & 3 => {}
                    inner => agree(glanced.map(|(glance, _)| glance), inner, &nested, 34),
                }
                let ends = TunnelEnds { src: outer.key.src, dst: outer.key.dst };
                prop_assert!(glanced.is_none_or(|(_, seen)| seen == ends));
            }
            // The outer addresses are compared by who asks.
            Err(DropReason::MartianAddress) => {}
            _ => prop_assert_eq!(glanced, None),
        }
    }

    /// What is sent straight on is what is translated and has its TTL taken down, whatever its checksums were.
    #[test]
    fn sent_straight_on_is_translated(
        four in tcp_or_udp::<Ipv4Addr>(),
        six in tcp_or_udp::<Ipv6Addr>(),
        to4 in (Ipv4Addr::any_host(), Ipv4Addr::any_host(), any::<[u16; 2]>()),
        to6 in (Ipv6Addr::any_host(), Ipv6Addr::any_host(), any::<[u16; 2]>()),
        kept in any::<[bool; 4]>(),
        checksum in prop_oneof![Just([0, 0]), Just([0xff, 0xff]), any::<[u8; 2]>()],
        ttl in 1..=255_u8,
    ) {
        straight_on(four, to4, kept, checksum, ttl);
        straight_on(six, to6, kept, checksum, ttl);
    }

    #[test]
    fn ready_headers_are_the_headers(
        macs in any::<[[u8; 6]; 2]>(),
        ends in any::<[[u8; 4]; 2]>(),
        tos in any::<u8>(),
        ip_bytes in 20..=u16::MAX - 20,
        id in any::<u16>(),
    ) {
        let [dst, src] = macs.map(Mac);
        let ends = TunnelEnds { src: ends[0].into(), dst: ends[1].into() };
        let mut inner = [0; 20];
        inner[1] = tos;
        inner[2..4].copy_from_slice(&ip_bytes.to_be_bytes());
        let mut expected = [0xa5; 14 + IPIP_HEADER_BYTES];
        set_ethernet(&mut expected, dst, src, 0x0800);
        write_ipip_header(&mut expected[14..], &inner, ends.src, ends.dst, id);
        let headers = LinkHeaders::ipip(dst, src, ends);
        let mut written = [0x5a; 14 + IPIP_HEADER_BYTES];
        headers.write(&mut written, ip_bytes, tos, || id);
        prop_assert_eq!(written, expected);
        prop_assert_eq!((headers.count(), headers.ends()), (34, Some(ends)));
        prop_assert_eq!(ends.swapped().swapped(), ends);

        let headers = LinkHeaders::ethernet(dst, src, 0x86dd);
        let mut written = [0x5a; 16];
        headers.write(&mut written, ip_bytes, tos, || unreachable!("no tunnel packet is numbered"));
        let mut expected = [0x5a; 16];
        set_ethernet(&mut expected, dst, src, 0x86dd);
        prop_assert_eq!(written, expected);
        prop_assert_eq!((headers.count(), headers.ends()), (14, None));
    }
}

fn straight_on<A: Family>(
    mut frame: Vec<u8>,
    (src, dst, [source, destination]): (A, A, [u16; 2]),
    kept: [bool; 4],
    checksum: [u8; 2],
    ttl: u8,
) {
    let l4 = 14 + A::HEADER_BYTES;
    frame[14 + if A::WORDS == 1 { 8 } else { 7 }] = ttl;
    if A::WORDS == 1 {
        fix_header_checksum(&mut frame[14..]);
    }
    let view = view_of::<A>(&frame);
    let from = view.key;
    let at = l4 + if from.protocol == Protocol::TCP { 16 } else { 6 };
    frame[at..at + 2].copy_from_slice(&checksum);
    let to = FlowKey {
        src: if kept[0] { from.src } else { src },
        // Sums that are equal though the words are not.
        dst: if kept[1] {
            from.dst
        } else if kept[3] {
            from.src
        } else {
            dst
        },
        ports: if kept[2] { from.ports } else { Ports::new(source, destination) },
        ..from
    };
    let to = if kept[3] && !kept[1] { FlowKey { src: from.dst, ..to } } else { to };
    frame.resize(frame.len().max(l4 + 20), 0);
    let mut expected = frame.clone();
    if to != from {
        translate(&mut expected, &view, &to).expect("no fragment");
    }
    decrement_ttl(&mut expected, &view, 1);
    weir_packet::rewrite::forward_plain(&mut frame[14..], &from, &to, 1);
    assert_eq!(frame, expected);
}

#[test]
fn the_largest_fixed_headers_are_asked_for() {
    let udp = |bytes: usize| {
        let length = 8 + bytes as u16;
        [&[1, 2, 3, 4][..], &length.to_be_bytes(), &[0, 0], &vec![0; bytes]].concat()
    };
    for short in [0, 1] {
        let four = ipv4_frame(&[], 0, 17, &udp(12 - short));
        assert_eq!((four.len(), glance_ipv4(&four, four.len()).is_some()), (IPV4_BYTES - short, short == 0));
        let nested = in_tunnel(&four, 0);
        assert_eq!((nested.len(), glance_ipip(&nested, nested.len()).is_some()), (IPIP_BYTES - short, short == 0));
        let six = ipv6_frame(17, &udp(12 - short));
        assert_eq!((six.len(), glance_ipv6(&six, six.len()).is_some()), (IPV6_BYTES - short, short == 0));
    }
}

#[test]
fn addresses_that_no_router_forwards() {
    let four = |src: [u8; 4], dst: [u8; 4]| may_be_forwarded(Ipv4Addr::from(src), dst.into());
    assert!(four([10, 0, 0, 1], [169, 254, 169, 254]), "routers do forward IPv4's link-local addresses");
    for bad in [[127, 0, 0, 1], [224, 0, 0, 1], [255; 4], [0, 0, 0, 1]] {
        assert!(!four(bad, [10, 0, 0, 1]) && !four([10, 0, 0, 1], bad), "{bad:?}");
    }
    let six = |src: &str, dst: &str| may_be_forwarded::<Ipv6Addr>(src.parse().unwrap(), dst.parse().unwrap());
    assert!(six("fd00::1", "fd00::2"));
    for bad in ["fe80::1", "::1", "::", "ff05::1", "::ffff:10.0.0.1"] {
        assert!(!six(bad, "fd00::1") && !six("fd00::1", bad), "{bad}");
    }
}
