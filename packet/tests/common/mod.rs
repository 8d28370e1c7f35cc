//! Packets made by etherparse, and dull twins of what the crate does cleverly: sums and CRCs one byte or bit at a time.

#![allow(dead_code, reason = "each test file uses its part")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use proptest::prelude::*;
use weir_packet::{
    Address, Protocol,
    parse::{Parsed, View, parse},
};

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 10];

/// What a test packet carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Carried {
    Tcp {
        syn: bool,
    },
    Udp,
    EchoRequest,
    EchoReply,
    Sctp,
    /// ESP: no ports, no checksum.
    Portless,
}

/// A packet to be made; for echoes `source` is the identifier.
#[derive(Clone, Debug)]
pub struct Spec<A> {
    pub src: A,
    pub dst: A,
    pub carried: Carried,
    pub source: u16,
    pub destination: u16,
    pub ttl: u8,
    pub payload: Vec<u8>,
}

impl<A: Address> Spec<A> {
    pub fn new(src: A, dst: A, carried: Carried, source: u16, destination: u16, payload: &[u8]) -> Self {
        Self { src, dst, carried, source, destination, ttl: 64, payload: payload.to_vec() }
    }

    /// The frame, its checksums right.
    pub fn frame(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(CLIENT_MAC, ROUTER_MAC);
        let ip = match (self.src.to_ip(), self.dst.to_ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), self.ttl),
            (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), self.ttl),
            _ => unreachable!("both of one family"),
        };
        let mut frame = Vec::new();
        let payload = &self.payload[..];
        match self.carried {
            Carried::Tcp { syn } => {
                let tcp = ip.tcp(self.source, self.destination, 0x0102_0304, 1000);
                let tcp = if syn { tcp.syn() } else { tcp.ack(0x0a0b_0c0d).psh() };
                let options = [1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8];
                tcp.options_raw(&options).unwrap().write(&mut frame, payload).unwrap();
            }
            Carried::Udp => ip.udp(self.source, self.destination).write(&mut frame, payload).unwrap(),
            Carried::EchoRequest if A::WORDS == 1 => {
                ip.icmpv4_echo_request(self.source, 7).write(&mut frame, payload).unwrap();
            }
            Carried::EchoReply if A::WORDS == 1 => {
                ip.icmpv4_echo_reply(self.source, 7).write(&mut frame, payload).unwrap();
            }
            Carried::EchoRequest => ip.icmpv6_echo_request(self.source, 7).write(&mut frame, payload).unwrap(),
            Carried::EchoReply => ip.icmpv6_echo_reply(self.source, 7).write(&mut frame, payload).unwrap(),
            Carried::Sctp => {
                let mut message = Vec::new();
                message.extend(self.source.to_be_bytes());
                message.extend(self.destination.to_be_bytes());
                message.extend([9, 8, 7, 6, 0, 0, 0, 0]);
                message.extend(payload);
                let crc = slow_crc32c(&message).to_le_bytes();
                message[8..12].copy_from_slice(&crc);
                ip.write(&mut frame, 132.into(), &message).unwrap();
            }
            Carried::Portless => ip.write(&mut frame, 50.into(), payload).unwrap(),
        }
        frame
    }

    /// The protocol number.
    pub fn protocol(&self) -> Protocol {
        match self.carried {
            Carried::Tcp { .. } => Protocol::TCP,
            Carried::Udp => Protocol::UDP,
            Carried::EchoRequest | Carried::EchoReply => A::ICMP,
            Carried::Sctp => Protocol::SCTP,
            Carried::Portless => Protocol(50),
        }
    }
}

/// Views of either family through one path.
pub trait Family: Address {
    fn view(parsed: Parsed) -> Option<View<Self>>;
    /// Some address that may appear on the wire.
    fn any_host() -> BoxedStrategy<Self>;
}

impl Family for Ipv4Addr {
    fn view(parsed: Parsed) -> Option<View<Self>> {
        match parsed {
            Parsed::V4(view) => Some(view),
            _ => None,
        }
    }
    fn any_host() -> BoxedStrategy<Self> {
        (prop_oneof![1..=126_u8, 128..=223_u8], any::<[u8; 3]>())
            .prop_map(|(a, [b, c, d])| Ipv4Addr::new(a, b, c, d))
            .boxed()
    }
}

impl Family for Ipv6Addr {
    fn view(parsed: Parsed) -> Option<View<Self>> {
        match parsed {
            Parsed::V6(view) => Some(view),
            _ => None,
        }
    }
    fn any_host() -> BoxedStrategy<Self> {
        (prop_oneof![Just(0x20_u8), Just(0xfd), Just(0xfe)], any::<[u8; 15]>())
            .prop_map(|(first, rest)| {
                let mut octets = [first; 16];
                octets[1..].copy_from_slice(&rest);
                Ipv6Addr::from(octets)
            })
            .boxed()
    }
}

/// The view of a frame that must be good.
pub fn view_of<A: Family>(frame: &[u8]) -> View<A> {
    A::view(parse(frame).expect("a good frame")).expect("a frame of this family")
}

pub fn any_carried() -> impl Strategy<Value = Carried> {
    prop_oneof![
        any::<bool>().prop_map(|syn| Carried::Tcp { syn }),
        Just(Carried::Udp),
        Just(Carried::EchoRequest),
        Just(Carried::EchoReply),
        Just(Carried::Sctp),
        Just(Carried::Portless),
    ]
}

pub fn any_spec<A: Family>() -> impl Strategy<Value = Spec<A>> {
    (
        A::any_host(),
        A::any_host(),
        any_carried(),
        any::<(u16, u16)>(),
        1..=255_u8,
        prop::collection::vec(any::<u8>(), 0..200),
    )
        .prop_map(|(src, dst, carried, (source, destination), ttl, payload)| Spec {
            src,
            dst,
            carried,
            source,
            destination,
            ttl,
            payload,
        })
}

/// Ones' complement sum in network order, a word at a time.
pub fn slow_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    sum as u16
}

/// CRC32c a bit at a time.
pub fn slow_crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

fn slow_pseudo_header(ip: &[u8], protocol: u8, length: usize) -> Vec<u8> {
    let mut pseudo = if ip[0] >> 4 == 4 { ip[12..20].to_vec() } else { ip[8..40].to_vec() };
    pseudo.extend((length as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    pseudo
}

/// Whether the IPv4 header checksum of the packet is right; always so for IPv6.
pub fn header_checksum_right(ip: &[u8]) -> bool {
    ip[0] >> 4 != 4 || slow_sum(&ip[..usize::from(ip[0] & 15) * 4]) == 0xffff
}

/// Whether the layer-4 checksum of a whole packet is right, computed from scratch; its layer 4 begins at `l4`.
pub fn l4_checksum_right(ip: &[u8], l4: usize, protocol: u8) -> bool {
    let message = &ip[l4..];
    let mut bytes = slow_pseudo_header(ip, protocol, message.len());
    bytes.extend(message);
    match protocol {
        17 if message[6..8] == [0, 0] => true,
        6 | 17 | 58 => slow_sum(&bytes) == 0xffff,
        1 => slow_sum(message) == 0xffff,
        132 => {
            let mut zeroed = message.to_vec();
            zeroed[8..12].fill(0);
            slow_crc32c(&zeroed).to_le_bytes() == message[8..12]
        }
        _ => true,
    }
}

/// Bytes written as hex digits, with any white space.
pub fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).expect("a hex digit") as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// Writes the right IPv4 header checksum into a packet.
pub fn fix_header_checksum(ip: &mut [u8]) {
    let header_bytes = usize::from(ip[0] & 15) * 4;
    ip[10..12].fill(0);
    let checksum = !slow_sum(&ip[..header_bytes]);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// An IPv4 frame from its options (whole words), flags and fragment offset field, protocol and payload.
pub fn ipv4_frame(options: &[u8], fragment: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&ROUTER_MAC[..], &CLIENT_MAC, &[8, 0]].concat();
    let header_bytes = 20 + options.len();
    let mut ip = vec![0x40 | (header_bytes / 4) as u8, 0];
    ip.extend(((header_bytes + payload.len()) as u16).to_be_bytes());
    ip.extend([0x12, 0x34]);
    ip.extend(fragment.to_be_bytes());
    ip.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    ip.extend(options);
    fix_header_checksum(&mut ip);
    frame.extend(ip);
    frame.extend(payload);
    frame
}

/// An IPv6 frame from its first next-header number and all that follows the header.
pub fn ipv6_frame(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&ROUTER_MAC[..], &CLIENT_MAC, &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend((payload.len() as u16).to_be_bytes());
    frame.extend([next, 64]);
    frame.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).octets());
    frame.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2).octets());
    frame.extend(payload);
    frame
}

/// A TCP header without options, its checksum 0.
pub fn tcp_header(source: u16, destination: u16, flags: u8) -> Vec<u8> {
    let [[a, b], [c, d]] = [source.to_be_bytes(), destination.to_be_bytes()];
    vec![a, b, c, d, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xfa, 0xf0, 0, 0, 0, 0]
}
