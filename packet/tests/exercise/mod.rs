//! All that is done with parsed frames, on frames of any content: nothing panics, and what a view promises holds.
//!
//! Shared by the property tests of parsing and by the fuzz target `parse` (fuzz/fuzz_targets/parse.rs).

use std::net::IpAddr;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use weir_packet::{
    Address, DropReason, FlowKey, Mac, Ports, Protocol,
    build::{
        IcmpError, MAX_BUILT_BYTES, arp_reply, fragment_ipv4, icmp_error, neighbor_advertisement, solicited_target,
        tcp_reset,
    },
    parse::{
        Kind, Parsed, View, inner_of_ipip, l4_checksum_ok, parse, parse_embedded, parse_start, parse_start_of_own,
    },
    rewrite::{apply_tos, decrement_ttl, translate, translate_icmp_error},
};

use crate::common::{Family, ROUTER_MAC, header_checksum_right};

/// What etherparse reads of a frame.
pub struct Reading {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ports: Option<Ports>,
    pub payload: Vec<u8>,
}

pub fn etherparse_reads(frame: &[u8]) -> Option<Reading> {
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let (src, dst, payload) = match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), ip.payload().payload)
        }
        NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into(), ip.payload().payload)
        }
        _ => return None,
    };
    let ports = match sliced.transport.as_ref() {
        Some(TransportSlice::Tcp(tcp)) => Some(Ports::new(tcp.source_port(), tcp.destination_port())),
        Some(TransportSlice::Udp(udp)) => Some(Ports::new(udp.source_port(), udp.destination_port())),
        _ => None,
    };
    Some(Reading { src, dst, ports, payload: payload.to_vec() })
}

/// Everything that takes a parsed frame, on a frame that may hold anything.
fn exercise<A: Family>(frame: &[u8], view: &View<A>) {
    let (l3, l4, end) = (usize::from(view.l3), usize::from(view.l4), usize::from(view.end));
    assert!(l3 + A::HEADER_BYTES <= l4 && l4 <= end && end <= frame.len());
    let before = l4_checksum_ok(frame, view);
    view.tcp(frame);
    view.tcp_options(frame);
    view.icmp(frame);
    let to = FlowKey { src: view.key.dst, dst: view.key.src, ports: Ports::new(1, 2), ..view.key };
    let mut copy = frame.to_vec();
    if translate(&mut copy, view, &to).is_ok() {
        // Zeroes alone, the checksum too: wrong to the letter (0xffff is right), but the same number in ones' complement arithmetic, so
        // that increments cannot tell.
        let is_nothing = view.l4_slice(frame).iter().all(|byte| *byte == 0);
        assert!(l4_checksum_ok(&copy, view) == before || is_nothing, "right iff it was right");
    }
    let mut copy = frame.to_vec();
    decrement_ttl(&mut copy, view, 1);
    apply_tos(&mut copy, view, 0xff);
    assert!(header_checksum_right(&copy[l3..]));
    let mut out = [0; MAX_BUILT_BYTES];
    tcp_reset(&mut out, frame, view);
    for error in [IcmpError::PortUnreachable, IcmpError::TooBig { mtu: 1280 }] {
        if let Some(bytes) = icmp_error(&mut out, frame, view, view.key.dst, error) {
            assert!(bytes <= out.len());
        }
    }
    if let Some(embedded) = parse_embedded::<A>(view.quote(frame)) {
        let mut copy = frame.to_vec();
        let inner = FlowKey { ports: Ports::new(1, 2), ..embedded.key };
        translate_icmp_error(&mut copy, view, &embedded, view.key.dst, view.key.src, &inner);
        assert_eq!(l4_checksum_ok(&copy, view), before);
    }
}

/// What works on the start of a frame works there as on the whole.
fn exercise_start<A: Family>(start: &[u8], frame: &[u8], view: &View<A>) {
    assert_eq!((view.tcp(start), view.tcp_options(start)), (view.tcp(frame), view.tcp_options(frame)));
    assert_eq!(view.icmp(start), view.icmp(frame));
    let to = FlowKey { src: view.key.dst, dst: view.key.src, ports: Ports::new(1, 2), ..view.key };
    let (mut part, mut whole) = (start.to_vec(), frame.to_vec());
    assert_eq!(translate(&mut part, view, &to), translate(&mut whole, view, &to));
    decrement_ttl(&mut part, view, 1);
    decrement_ttl(&mut whole, view, 1);
    assert_eq!(part, whole[..part.len()]);
}

/// Parses a frame that may hold anything, and does with it all that is done with parsed frames.
///
/// # Panics
/// Where something does not hold that a view promises, or etherparse reads the frame differently.
pub fn exercise_frame(frame: &[u8]) {
    let parsed = parse(frame);
    // A node's own kernel may send more, but nothing else.
    let own = parse_start_of_own(frame, frame.len());
    if parsed != Err(DropReason::MartianAddress) {
        assert_eq!(own, parsed);
    }
    match own {
        Ok(Parsed::V4(view)) => exercise(frame, &view),
        Ok(Parsed::V6(view)) => exercise(frame, &view),
        _ => {}
    }
    // What is in memory in parts is read by its first one, if that has the headers, as the whole is.
    for bytes in [14, 42, 54, 75, frame.len() / 2].into_iter().filter(|bytes| *bytes < frame.len()) {
        let start = &frame[..bytes];
        if let Ok(start_parsed) = parse_start(start, frame.len()) {
            assert_eq!(Ok(start_parsed), parsed);
            match start_parsed {
                Parsed::V4(view) => exercise_start(start, frame, &view),
                Parsed::V6(view) => exercise_start(start, frame, &view),
                _ => {}
            }
        }
    }
    match parsed {
        Ok(Parsed::V4(view)) => {
            exercise(frame, &view);
            let _ = inner_of_ipip(frame, &view).map(|inner| exercise(frame, &inner));
            let mut joined = 0;
            fragment_ipv4(frame, &view, 68, |_, payload| joined += payload.len());
            assert!(joined == 0 || joined == usize::from(view.l4_bytes()));
            // An authentication header ends the chain here; etherparse looks into it.
            if view.kind == Kind::Flow && !view.key.protocol.is_icmp() && view.key.protocol != Protocol(51) {
                let reading = etherparse_reads(frame).expect("what weir accepts, etherparse accepts");
                assert_eq!((view.key.src.to_ip(), view.key.dst.to_ip()), (reading.src, reading.dst));
                assert_eq!(reading.ports.unwrap_or(view.key.ports), view.key.ports);
            }
        }
        Ok(Parsed::V6(view)) => {
            exercise(frame, &view);
            solicited_target(frame, &view);
            neighbor_advertisement(&mut [0; MAX_BUILT_BYTES], frame, &view, Mac(ROUTER_MAC));
        }
        Ok(Parsed::Arp(arp)) => {
            arp_reply(&mut [0; MAX_BUILT_BYTES], &arp, Mac(ROUTER_MAC));
        }
        Ok(Parsed::Other { .. }) | Err(_) => {}
    }
}
