//! Packets of the flows that both a program and a worker are to handle: what they are like, how they are odd, how a device cuts them.

use std::net::IpAddr;

use proptest::prelude::*;
use weir_dataplane::{attach::KERNEL_END_MAC, frame::IfIndex};
use weir_packet::Mac;

use crate::{
    packets::{IPIP, Packet, TCP, UDP},
    router::{CLIENT_POD, GATEWAY_MAC, OTHER_MAC, UPLINK, UPLINK_MAC, octets, sum},
};

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;
pub const URG: u8 = 32;
const CWR: u8 = 128;
/// Of all devices.
pub const MTU: usize = 1500;

/// What a packet's checksum is.
#[derive(Clone, Copy, Debug)]
pub enum Checksum {
    Right,
    /// The same, and its payload is such that it is 0 before, or after, the translation; in the IP header the identification is.
    ZeroBefore,
    ZeroAfter,
    /// Of layer 4: this one, whatever is right.
    Fixed(u16),
}

/// Where a segment lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Inside both windows: so far behind what was sent last, and its acknowledgment behind what it may acknowledge, modulo what is
    /// inside.
    Inside {
        back: u32,
        lag: u32,
    },
    /// So far before the edge of what may be sent, or of what is not too old.
    Edge {
        before: u32,
    },
    Old {
        by: u32,
    },
    /// The nth of the four tests fails by so much.
    Outside {
        test: u8,
        by: u32,
    },
}

#[derive(Clone, Debug)]
pub struct Sent {
    pub payload_bytes: usize,
    pub fill: u8,
    pub place: Place,
    pub window: u16,
    pub flags: u8,
    /// Words of TCP options: no-operations, but for a timestamp where it fits.
    pub option_words: usize,
    pub tos: u8,
    pub ttl: u8,
    pub id: u16,
    pub dont_fragment: bool,
    pub checksum: Checksum,
    /// Of a tunnel's header, where it comes in one.
    pub outer_tos: u8,
    /// It is to be cut by a device, or was merged by one.
    pub gso: Option<Gso>,
}

/// Several segments in one.
#[derive(Clone, Copy, Debug)]
pub struct Gso {
    /// Bytes of payload of all but the last.
    pub size: u16,
    /// Of all together.
    pub bytes: usize,
    /// Whether their number is told: a packet from a virtual machine, or into a tunnel, does not (it is 0 then).
    pub tells_count: bool,
}

impl Gso {
    /// Bytes that BPF_PROG_RUN takes in one packet: less than a page.
    const MOST: usize = 3400;

    fn any() -> impl Strategy<Value = Self> {
        let size = prop_oneof![4 => 200..1400u16, 2 => 1400..1500u16, 1 => 1500..1650u16];
        (size, 1..Self::MOST, any::<bool>()).prop_map(|(size, bytes, tells_count)| Self { size, bytes, tells_count })
    }
}

/// What makes a tunnel's header unusual.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outer {
    /// There is none where there is to be one, or one where there is to be none.
    Otherwise,
    Ttl(u8),
    Options,
    Fragment,
    BadChecksum,
    Length(i8),
    Padding(u8),
    /// From another address of the nodes' network: this last byte.
    From(u8),
    /// What it carries is a tunnel packet.
    Twice,
}

/// What makes a packet unusual.
#[derive(Clone, Copy, Debug)]
pub enum Oddity {
    Flags(u8),
    Ttl(u8),
    IpOptions,
    FirstFragment,
    LaterFragment,
    BadHeaderChecksum,
    /// The IP header's length is wrong by so much.
    Length(i8),
    /// UDP's is.
    UdpLength(i8),
    /// TCP's data offset.
    DataOffset(u8),
    Padding(u8),
    TooBig(u16),
    /// UDP over IPv6.
    NoChecksum,
    UnknownPort,
    OtherDevice,
    /// For another MAC address.
    OtherMac,
    /// An ICMP error about the last packet of the other direction.
    IcmpError,
    Outer(Outer),
}

impl Oddity {
    /// Makes a packet odd, as far as its bytes are; whether it is then.
    pub fn spoil(self, packet: &mut Vec<u8>, protocol: u8) -> bool {
        let is_v6 = packet[0] >> 4 == 6;
        let l4_at = if is_v6 { 40 } else { 20 };
        match self {
            Self::Ttl(_) | Self::UnknownPort | Self::OtherDevice | Self::OtherMac | Self::IcmpError => {}
            Self::TooBig(_) | Self::Outer(_) => return false,
            Self::Flags(_) => return protocol == TCP,
            Self::IpOptions if is_v6 => {
                packet.splice(40..40, [protocol, 0, 1, 4, 0, 0, 0, 0]);
                packet[6] = 60;
                let payload_bytes = read16(packet, 4) + 8;
                write16(packet, 4, payload_bytes);
            }
            Self::IpOptions => {
                packet.splice(20..20, [1; 4]);
                packet[0] = 0x46;
                let total_bytes = read16(packet, 2) + 4;
                write16(packet, 2, total_bytes);
                fix_header_checksum(packet);
            }
            Self::FirstFragment | Self::LaterFragment => {
                packet.resize(l4_at + 64, 7);
                let (offset, more) = if matches!(self, Self::FirstFragment) { (0, 1) } else { (64, 0) };
                if is_v6 {
                    packet.splice(40..40, [protocol, 0, 0, offset | more, 0, 0, 0, 9]);
                    packet[6] = 44;
                    write16(packet, 4, 72);
                } else {
                    write16(packet, 2, 84);
                    write16(packet, 4, 9);
                    write16(packet, 6, (u16::from(more) << 13) | (u16::from(offset) / 8));
                    fix_header_checksum(packet);
                }
            }
            Self::BadHeaderChecksum => packet[if is_v6 { 0 } else { 10 }] ^= 0x20,
            Self::Length(by) => {
                let at = if is_v6 { 4 } else { 2 };
                let bytes = read16(packet, at).saturating_add_signed(by.into());
                write16(packet, at, bytes);
                fix_header_checksum(packet);
            }
            Self::UdpLength(by) if protocol == UDP => {
                let bytes = read16(packet, l4_at + 4).wrapping_add_signed(by.into());
                write16(packet, l4_at + 4, bytes);
            }
            Self::DataOffset(words) if protocol == TCP => {
                packet[l4_at + 12] = words << 4;
                return words < 5 || l4_at + 60 > packet.len();
            }
            Self::UdpLength(_) | Self::DataOffset(_) => return false,
            Self::Padding(bytes) => packet.resize(packet.len() + usize::from(bytes), 0),
            Self::NoChecksum => {
                if protocol == UDP {
                    write16(packet, l4_at + 6, 0);
                }
                return protocol == UDP && is_v6;
            }
        }
        true
    }
}

pub fn sents() -> impl Strategy<Value = Sent> {
    let distance = || prop_oneof![3 => Just(0u32), 1 => 0..2000u32, 1 => any::<u32>()];
    let place = prop_oneof![
        12 => (distance(), distance()).prop_map(|(back, lag)| Place::Inside { back, lag }),
        1 => (0..4000u32).prop_map(|before| Place::Edge { before }),
        1 => (0..2000u32).prop_map(|by| Place::Old { by }),
        1 => (0..4u8, prop_oneof![Just(0u32), 0..100_000u32]).prop_map(|(test, by)| Place::Outside { test, by }),
    ];
    let checksum = prop_oneof![
        4 => Just(Checksum::Right),
        1 => Just(Checksum::ZeroBefore),
        1 => Just(Checksum::ZeroAfter),
        1 => prop_oneof![Just(0), Just(u16::MAX), any::<u16>()].prop_map(Checksum::Fixed),
    ];
    let payload = prop_oneof![Just(0usize), 0..100usize, 0..MTU, Just(MTU)];
    let flags = prop_oneof![Just(ACK), Just(ACK | PSH), Just(ACK | 0xc0)];
    let window = prop_oneof![Just(0u16), any::<u16>(), Just(u16::MAX)];
    (
        (payload, any::<u8>(), place, window, flags, 0..=10usize),
        (any::<u8>(), 2..=255u8, any::<u16>(), any::<bool>(), checksum),
        (any::<u8>(), proptest::bool::weighted(0.7), proptest::option::weighted(0.2, Gso::any())),
    )
        .prop_map(|(of_segment, of_packet, (outer_tos, is_outer_plain, gso))| {
            let (payload_bytes, fill, place, window, flags, option_words) = of_segment;
            let (tos, ttl, id, dont_fragment, checksum) = of_packet;
            // The congestion notification that a tunnel's header copies.
            let outer_tos = if is_outer_plain { outer_tos & !3 | tos & 3 } else { outer_tos };
            Sent {
                payload_bytes,
                fill,
                place,
                window,
                flags,
                option_words,
                tos,
                ttl,
                id,
                dont_fragment,
                checksum,
                outer_tos,
                gso,
            }
        })
}

pub fn oddities() -> impl Strategy<Value = Oddity> {
    let flags = proptest::sample::select(vec![
        FIN | ACK,
        SYN,
        SYN | ACK,
        RST,
        RST | ACK,
        URG | ACK,
        0,
        PSH,
        FIN,
        FIN | SYN,
        0xff,
    ]);
    let outer = prop_oneof![
        Just(Outer::Otherwise),
        (0..=1u8).prop_map(Outer::Ttl),
        Just(Outer::Options),
        Just(Outer::Fragment),
        Just(Outer::BadChecksum),
        prop_oneof![-20..0i8, 1..20i8].prop_map(Outer::Length),
        (1..60u8).prop_map(Outer::Padding),
        proptest::sample::select(vec![1u8, 3, 100]).prop_map(Outer::From),
        Just(Outer::Twice),
    ];
    prop_oneof![
        2 => flags.prop_map(Oddity::Flags),
        1 => (0..=1u8).prop_map(Oddity::Ttl),
        1 => Just(Oddity::IpOptions),
        1 => Just(Oddity::FirstFragment),
        1 => Just(Oddity::LaterFragment),
        1 => Just(Oddity::BadHeaderChecksum),
        1 => prop_oneof![-20..0i8, 1..20i8].prop_map(Oddity::Length),
        1 => prop_oneof![-20..0i8, 1..20i8].prop_map(Oddity::UdpLength),
        1 => prop_oneof![0..5u8, Just(15u8)].prop_map(Oddity::DataOffset),
        1 => (1..60u8).prop_map(Oddity::Padding),
        1 => (1..100u16).prop_map(Oddity::TooBig),
        1 => Just(Oddity::NoChecksum),
        1 => Just(Oddity::UnknownPort),
        1 => Just(Oddity::OtherDevice),
        1 => Just(Oddity::OtherMac),
        2 => Just(Oddity::IcmpError),
        3 => outer.prop_map(Oddity::Outer),
    ]
}

fn add(a: u16, b: u16) -> u16 {
    let sum = u32::from(a) + u32::from(b);
    (sum + (sum >> 16)) as u16
}

/// The sum over addresses and layer 4.
fn l4_sum(src: IpAddr, dst: IpAddr, protocol: u8, l4: &[u8]) -> u16 {
    let pseudo = [&octets(src)[..], &octets(dst), &(l4.len() as u32).to_be_bytes(), &[0, 0, 0, protocol]].concat();
    add(sum(&pseudo), sum(l4))
}

pub fn write16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

pub fn read16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Addresses and ports of a direction's packets: source, destination; as they come, and as they leave.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub arrives: [(IpAddr, u16); 2],
    pub leaves: [(IpAddr, u16); 2],
    /// By which they come, and whether in a tunnel.
    pub device: IfIndex,
    pub in_tunnel: bool,
}

impl Ends {
    /// Bytes of the largest packet that fits where these packets come from.
    pub fn mtu(&self) -> usize {
        match self.device {
            IfIndex::HOST => usize::MAX,
            _ if self.in_tunnel => MTU - 20,
            _ => MTU,
        }
    }
}

/// An IP packet of these ends, with layer 4 that begins with ports.
pub fn ip_packet(ends: &Ends, protocol: u8, sent: &Sent, mut l4: Vec<u8>) -> Vec<u8> {
    let checksum_at = if protocol == TCP { 16 } else { 6 };
    let with_ports = |l4: &[u8], [(_, from), (_, to)]: [(IpAddr, u16); 2]| {
        [&from.to_be_bytes()[..], &to.to_be_bytes(), &l4[4..]].concat()
    };
    write16(&mut l4, checksum_at, 0);
    l4 = with_ports(&l4, ends.arrives);
    let [(src, _), (dst, _)] = ends.arrives;
    // What makes the sum right with a checksum of 0 goes into the last whole word of what is no header, if there is one.
    let spare = (l4.len() & !1).checked_sub(2).filter(|at| *at >= if protocol == TCP { 20 } else { 8 });
    if let Some(at) = spare
        && let Checksum::ZeroBefore | Checksum::ZeroAfter = sent.checksum
    {
        let then = if matches!(sent.checksum, Checksum::ZeroBefore) { ends.arrives } else { ends.leaves };
        let missing = !l4_sum(then[0].0, then[1].0, protocol, &with_ports(&l4, then));
        let word = add(read16(&l4, at), missing);
        write16(&mut l4, at, word);
    }
    let checksum = match sent.checksum {
        Checksum::Fixed(checksum) => checksum,
        _ => match !l4_sum(src, dst, protocol, &l4) {
            0 if protocol == UDP => u16::MAX,
            checksum => checksum,
        },
    };
    // Without one, UDP over IPv6 is not plain.
    let checksum = if protocol == UDP && src.is_ipv6() { checksum.max(1) } else { checksum };
    write16(&mut l4, checksum_at, checksum);
    if src.is_ipv6() {
        let mut header = vec![0x60 | sent.tos >> 4, sent.tos << 4 | sent.fill & 15, sent.id as u8, sent.fill, 0, 0];
        write16(&mut header, 4, l4.len() as u16);
        header.extend([protocol, sent.ttl]);
        return [header, octets(src), octets(dst), l4].concat();
    }
    let header = |ttl: u8, [(src, _), (dst, _)]: [(IpAddr, u16); 2], id: u16| {
        let mut header = vec![0x45, sent.tos, 0, 0, 0, 0, if sent.dont_fragment { 0x40 } else { 0 }, 0, ttl, protocol];
        write16(&mut header, 2, 20 + l4.len() as u16);
        write16(&mut header, 4, id);
        [header, vec![0, 0], octets(src), octets(dst)].concat()
    };
    let id = match sent.checksum {
        Checksum::ZeroBefore => add(sent.id, !sum(&header(sent.ttl, ends.arrives, sent.id))),
        Checksum::ZeroAfter => add(sent.id, !sum(&header(sent.ttl.saturating_sub(1), ends.leaves, sent.id))),
        _ => sent.id,
    };
    let mut header = header(sent.ttl, ends.arrives, id);
    let checksum = !sum(&header);
    write16(&mut header, 10, checksum);
    [header, l4].concat()
}

/// Addresses and ports of a packet without options.
pub fn ends_of(ip: &[u8]) -> [(IpAddr, u16); 2] {
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).unwrap());
    let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).unwrap());
    match ip[0] >> 4 {
        4 => [(v4(12), read16(ip, 20)), (v4(16), read16(ip, 22))],
        _ => [(v6(8), read16(ip, 40)), (v6(24), read16(ip, 42))],
    }
}

pub fn fix_header_checksum(ip: &mut [u8]) {
    if ip[0] >> 4 == 4 {
        let header_bytes = usize::from(ip[0] & 15) * 4;
        write16(ip, 10, 0);
        let checksum = !sum(&ip[..header_bytes]);
        write16(ip, 10, checksum);
    }
}

/// The MAC address of a device's end in the kernel.
pub fn mac_of(device: IfIndex) -> Mac {
    match device {
        UPLINK => UPLINK_MAC,
        IfIndex::HOST => KERNEL_END_MAC,
        _ => GATEWAY_MAC,
    }
}

/// As it comes by a device: from a pod to its gateway, from the router of the uplink's link, from the node's own kernel.
pub fn frame(ip: &[u8], destination: Mac, device: IfIndex) -> Vec<u8> {
    let source = match device {
        UPLINK => OTHER_MAC,
        IfIndex::HOST => KERNEL_END_MAC,
        _ => Mac([10, 0, 0, 0, 0, if device == CLIENT_POD { 1 } else { 2 }]),
    };
    let ethertype = if ip[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
    [&destination.0[..], &source.0, &ethertype, ip].concat()
}

/// A packet in a tunnel from node b, or from whom the oddity says.
pub fn tunnelled(ip: &[u8], sent: &Sent, oddity: Option<Outer>) -> Vec<u8> {
    let from = if let Some(Outer::From(last)) = oddity { last } else { 2 };
    let mut outer =
        vec![0x45, sent.outer_tos, 0, 0, 0, 0, 0x40, 0, 64, IPIP, 0, 0, 192, 168, 10, from, 192, 168, 10, 1];
    write16(&mut outer, 4, sent.id.wrapping_add(1));
    let mut bytes = 20 + ip.len() as u16;
    match oddity {
        Some(Outer::Ttl(ttl)) => outer[8] = ttl,
        Some(Outer::Options) => {
            outer[0] = 0x46;
            outer.extend([1; 4]);
            bytes += 4;
        }
        Some(Outer::Fragment) => outer[6] = 0x20,
        Some(Outer::Length(by)) => bytes = bytes.wrapping_add_signed(by.into()),
        _ => {}
    }
    write16(&mut outer, 2, bytes);
    fix_header_checksum(&mut outer);
    if oddity == Some(Outer::BadChecksum) {
        outer[10] ^= 0x20;
    }
    let padding = if let Some(Outer::Padding(bytes)) = oddity { bytes } else { 0 };
    [&outer[..], ip, &vec![0; padding.into()]].concat()
}

/// Puts a packet into a tunnel, if it is to come in one, or in none and the oddity is that it does; whether it is odd then.
pub fn put_into_tunnel(packet: &mut Vec<u8>, in_tunnel: bool, sent: &Sent, oddity: Option<Outer>) -> bool {
    if in_tunnel == (oddity == Some(Outer::Otherwise)) {
        return in_tunnel;
    }
    // RFC 6040, figure 4: what says the same, or nothing, leaves the inner field as it is.
    let is_odd = oddity.is_some() || sent.outer_tos & 3 != 0 && (sent.outer_tos ^ packet[1]) & 3 != 0;
    if oddity == Some(Outer::Twice) {
        *packet = tunnelled(packet, sent, None);
    }
    *packet = tunnelled(packet, sent, oddity);
    is_odd
}

/// What a packet that leaves by an uplink carries, if it is a tunnel's; asserts that the tunnel's header is as it must be.
pub fn tunnel_carries(ip: &[u8]) -> Option<&[u8]> {
    if ip[0] >> 4 != 4 || ip[9] != IPIP {
        return None;
    }
    let (outer, inner) = ip.split_at(20);
    let bytes = (read16(inner, 2) + 20).to_be_bytes();
    // RFC 2003, 3.1; RFC 6040, 4.1: both fields of the type of service are copied.
    assert_eq!(
        (outer[..4].to_vec(), outer[6..10].to_vec()),
        (vec![0x45, inner[1], bytes[0], bytes[1]], vec![0x40, 0, 64, IPIP])
    );
    assert_eq!(sum(outer), u16::MAX, "the tunnel header's checksum");
    Some(inner)
}

/// A frame without what tells nothing: which number a tunnel packet that must not be cut has (RFC 6864, 4.1).
pub fn without_tunnel_id(device: IfIndex, mut frame: Vec<u8>) -> Vec<u8> {
    if device == UPLINK && tunnel_carries(&frame[14..]).is_some() {
        write16(&mut frame[14..], 4, 0);
        fix_header_checksum(&mut frame[14..34]);
    }
    frame
}

/// What a device makes of a frame that is to be cut (net/ipv4/tcp_offload.c, udp_offload.c); asserts that its checksums are right.
pub fn cut(frame: &[u8], gso: Option<Gso>) -> Vec<Vec<u8>> {
    let Some(Gso { size, .. }) = gso else { return vec![frame.to_vec()] };
    let is_v6 = frame[14] >> 4 == 6;
    let (l4_at, protocol) = if is_v6 { (54, frame[20]) } else { (34, frame[23]) };
    let (checksum_at, headers) = match protocol {
        TCP => (l4_at + 16, l4_at + usize::from(frame[l4_at + 12] >> 4) * 4),
        _ => (l4_at + 6, l4_at + 8),
    };
    let [(src, _), (dst, _)] = ends_of(&frame[14..]);
    assert_eq!(l4_sum(src, dst, protocol, &frame[l4_at..]), u16::MAX);
    let one = |(nth, payload): (usize, &[u8])| {
        let (is_first, is_last) = (nth == 0, headers + nth * usize::from(size) + payload.len() == frame.len());
        let mut segment = [&frame[..headers], payload].concat();
        let bytes = (segment.len() - if is_v6 { 54 } else { 14 }) as u16;
        if is_v6 {
            write16(&mut segment, 18, bytes);
        } else {
            assert_eq!(sum(&frame[14..34]), u16::MAX);
            write16(&mut segment, 16, bytes);
            write16(&mut segment, 18, read16(frame, 18).wrapping_add(nth as u16));
            fix_header_checksum(&mut segment[14..34]);
        }
        if protocol == TCP {
            let seq = u32::from_be_bytes(*frame[l4_at + 4..].first_chunk().unwrap());
            segment[l4_at + 4..l4_at + 8]
                .copy_from_slice(&seq.wrapping_add(nth as u32 * u32::from(size)).to_be_bytes());
            segment[l4_at + 13] &= if is_last { 0xff } else { !(FIN | PSH) } & if is_first { 0xff } else { !CWR };
        } else {
            let bytes = (segment.len() - l4_at) as u16;
            write16(&mut segment, l4_at + 4, bytes);
        }
        write16(&mut segment, checksum_at, 0);
        let checksum = match !l4_sum(src, dst, protocol, &segment[l4_at..]) {
            0 if protocol == UDP => u16::MAX,
            checksum => checksum,
        };
        write16(&mut segment, checksum_at, checksum);
        segment
    };
    let payload = &frame[headers..];
    if payload.is_empty() { vec![frame.to_vec()] } else { payload.chunks(size.into()).enumerate().map(one).collect() }
}

pub fn udp(payload: &[u8]) -> Vec<u8> {
    let mut l4 = vec![0; 8];
    write16(&mut l4, 4, 8 + payload.len() as u16);
    [l4, payload.to_vec()].concat()
}

pub fn tcp(seq: u32, ack: u32, flags: u8, window: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = [&[0; 4][..], &seq.to_be_bytes(), &ack.to_be_bytes(), &[(5 + options.len() as u8 / 4) << 4, flags]];
    [&header.concat()[..], &window.to_be_bytes(), &[0; 4], options, payload].concat()
}

pub const USUAL: Sent = Sent {
    payload_bytes: 0,
    fill: 0,
    place: Place::Inside { back: 0, lag: 0 },
    window: 1000,
    flags: ACK,
    option_words: 0,
    tos: 0,
    ttl: 64,
    id: 1,
    dont_fragment: true,
    checksum: Checksum::Right,
    outer_tos: 0,
    gso: None,
};

/// Sequence and acknowledgment number of a segment of `side` in that place.
pub fn numbers(windows: &[[u32; 4]; 2], side: usize, place: Place, length: u32) -> (u32, u32) {
    let [sent, may_send, offered, _] = windows[side];
    let [answers, _, receives, _] = windows[1 - side];
    let late = offered.max(66_000);
    // What is sent may lie beyond what may be: a segment may end there.
    let beyond = sent.wrapping_sub(may_send);
    let beyond = if (beyond as i32) > 0 { beyond } else { 0 };
    let next = sent.wrapping_sub(beyond);
    match place {
        Place::Inside { back, lag } => {
            let most = receives.saturating_sub(beyond);
            (next.wrapping_sub(back % (most + 1)), answers.wrapping_sub(lag % (late + 1)))
        }
        Place::Edge { before } => (may_send.wrapping_sub(before), answers),
        Place::Old { by } => (sent.wrapping_sub(receives).wrapping_sub(by), answers),
        Place::Outside { test: 0, by } => (may_send.wrapping_add(1 + by), answers),
        Place::Outside { test: 1, by } => (next, answers.wrapping_add(1 + by)),
        Place::Outside { test: 2, by } => (sent.wrapping_sub(receives).wrapping_sub(1 + by + length), answers),
        Place::Outside { by, .. } => (next, answers.wrapping_sub(late).wrapping_sub(1 + by)),
    }
}

/// Whether the four tests of conntrack/src/tcp.rs let in a segment from `seq` on, or, of several in one packet, each: what matters is where
/// the first ends, and where the last begins.
pub fn is_inside(windows: &[[u32; 4]; 2], side: usize, seq: u32, ack: u32, [first, last]: [u32; 2]) -> bool {
    let [sent, may_send, offered, _] = windows[side];
    let [answers, _, receives, _] = windows[1 - side];
    let is_before = |a: u32, b: u32| (a.wrapping_sub(b) as i32) < 0;
    !is_before(may_send, seq.wrapping_add(last))
        && !is_before(answers, ack)
        && !is_before(seq.wrapping_add(first), sent.wrapping_sub(receives))
        && !is_before(ack, answers.wrapping_sub(offered.max(66_000)))
}

/// An error from who gets the other direction's packets, about the packet that it got: too big.
pub fn icmp_error(ends: &Ends, got: &[u8]) -> Vec<u8> {
    let quote = &got[..got.len().min(60)];
    let is_v6 = ends.arrives[0].0.is_ipv6();
    let (protocol, kind) = if is_v6 { (58, [2, 0]) } else { (1, [3, 4]) };
    let l4 = [&kind[..], &[0, 0, 0, 0, 5, 0], quote].concat();
    let [(src, _), (dst, _)] = ends.arrives;
    Packet { src, dst, protocol, ttl: 64, tos: 0, options: 0, l4 }.bytes()
}
