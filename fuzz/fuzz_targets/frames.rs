//! Any frames through a worker over memory: services, translation, fragments, ICMP errors, reloads, a small table and few source ports.
//!
//! Asserted after each turn ([`router::Router::turn`], [`router::Router::finish`]): nothing panics,
//! `rx + generated = tx + drops + punted + consumed + held`, and each frame that is not held is back. And here: what leaves has a right IPv4
//! header, no pod's address leaves the cluster, and a second worker, none of whose packets goes the straight way, sends and counts the same.
#![no_main]

use std::{collections::BTreeSet, net::IpAddr};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use weir_dataplane::{
    frame::{IfIndex, MAX_MTU},
    snapshot::Rules,
};
use weir_nat::SnatPorts;
use weir_packet::{
    Address, Protocol,
    parse::{Parsed, View, parse},
};

#[allow(dead_code, reason = "a target uses a part of it")]
#[path = "../../dataplane/tests/support/packets.rs"]
mod packets;
#[allow(dead_code, reason = "a target uses a part of it")]
#[path = "../../dataplane/tests/support/router.rs"]
mod router;

use packets::{IPIP, Packet, SCTP, TCP, UDP};
use router::{CLIENT_POD, Router, SERVER_POD, UPLINK, cluster, ip, links, rules, service, sum, tunnelled};

/// The longest frame of a device with the largest MTU, without a tag.
const MAX_FRAME_BYTES: usize = MAX_MTU as usize + 14;

/// One step of a worker's life.
#[derive(Arbitrary, Debug)]
enum Step {
    /// A burst.
    Turn(Vec<Arrival>),
    /// Time passes, in ticks of 10 ms.
    Wait(u16),
    /// Other rules are published.
    Publish { is_open: bool, has_services: bool },
}

/// A frame that arrives.
#[derive(Arbitrary, Debug)]
struct Arrival {
    device: u8,
    what: What,
    is_tunnelled: bool,
    /// Bytes behind the Ethernet header that are other ones; the IPv4 header's checksum is made right again.
    changes: Vec<(u8, u8)>,
    /// Where it is cut off.
    cut: Option<u16>,
}

/// What arrives. Numbers of addresses, ports, protocols and packets are taken modulo what there is.
#[derive(Arbitrary, Debug)]
enum What {
    Bytes(Vec<u8>),
    Packet {
        is_ipv6: bool,
        src: u8,
        dst: u8,
        ports: [u8; 2],
        protocol: u8,
        fields: Fields,
        /// A fragment's offset in units of 8 bytes, whether more follow, and its identification.
        fragment: Option<(u16, bool, u8)>,
    },
    /// From whom a packet went to, by the device that it left by.
    Answer {
        to: u8,
        fields: Fields,
    },
    /// An ICMP error about a packet that left.
    Error {
        about: u8,
        from: u8,
        code: u8,
        quoted: u8,
    },
}

#[derive(Arbitrary, Debug)]
struct Fields {
    /// TCP's flags or ICMP's type.
    flags: u8,
    seq: u8,
    ack: u8,
    ttl: u8,
    payload: Vec<u8>,
}

const DEVICES: [IfIndex; 5] = [UPLINK, CLIENT_POD, SERVER_POD, IfIndex::HOST, IfIndex(99)];
/// Pods here and there, nodes, outside, services, nobody, link scope.
const ADDRESSES: [[&str; 14]; 2] = [
    [
        "10.1.1.10",
        "10.1.1.20",
        "10.1.2.20",
        "192.168.10.1",
        "192.168.10.2",
        "192.168.10.100",
        "172.20.0.5",
        "10.96.0.10",
        "10.96.0.11",
        "10.96.0.12",
        "10.1.1.99",
        "169.254.1.1",
        "224.0.0.1",
        "0.0.0.0",
    ],
    [
        "fd00:1:1::10",
        "fd00:1:1::20",
        "fd00:1:2::20",
        "fd00:10::1",
        "fd00:10::2",
        "fd00:10::100",
        "fd00:99::5",
        "fd00:96::10",
        "fd00:96::11",
        "fd00:96::12",
        "fd00:1:1::99",
        "fe80::1",
        "ff02::1",
        "::",
    ],
];
const PORTS: [u16; 8] = [53, 5353, 30053, 5000, 443, 10000, 10003, 4789];
const PROTOCOLS: [u8; 7] = [UDP, TCP, SCTP, 1, 58, IPIP, 47];

/// Frames that left, for answers and errors: the last so many.
const REMEMBERED: usize = 32;

fn pick<T: Copy>(from: &[T], number: u8) -> T {
    from[usize::from(number) % from.len()]
}

fn all_rules(is_open: bool, has_services: bool) -> Rules {
    let local = ["10.1.1.20", "fd00:1:1::20"];
    let remote = ["10.1.2.20", "fd00:1:2::20"];
    let mut services = Vec::new();
    if has_services {
        for protocol in [Protocol::UDP, Protocol::TCP, Protocol::SCTP] {
            let name = |which| format!("default/{which}:{protocol}");
            services.push(service(&name("local"), protocol, ["10.96.0.10", "fd00:96::10"], local, Some(30053)));
            services.push(service(&name("remote"), protocol, ["10.96.0.11", "fd00:96::11"], remote, None));
        }
    }
    rules(services, is_open)
}

fn l4(protocol: u8, ports: (u16, u16), fields: &Fields) -> Vec<u8> {
    let ports = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    let payload = &fields.payload[..fields.payload.len().min(1500)];
    let header = match protocol {
        UDP => [&ports[..], &(8 + payload.len() as u16).to_be_bytes(), &[0, 0]].concat(),
        TCP => [&ports[..], &[0, 0, 1, fields.seq, 0, 0, 1, fields.ack, 0x50, fields.flags, 1, 0, 0, 0, 0, 0]].concat(),
        SCTP => [&ports[..], &[0, 0, 0, fields.seq, 0, 0, 0, 0]].concat(),
        1 | 58 => vec![fields.flags, 0, 0, 0, ports[0], ports[1], 0, fields.seq],
        _ => vec![0; 8],
    };
    [&header, payload].concat()
}

fn packet([src, dst]: [IpAddr; 2], protocol: u8, ports: (u16, u16), fields: &Fields) -> Packet {
    Packet { src, dst, protocol, ttl: fields.ttl, tos: 0, options: 0, l4: l4(protocol, ports, fields) }
}

/// Makes a whole packet's frame one of a fragment, whatever else it says.
fn as_fragment(mut frame: Vec<u8>, (offset, more, id): (u16, bool, u8)) -> Vec<u8> {
    if frame[14] >> 4 == 4 {
        frame[18..20].copy_from_slice(&[0, id]);
        frame[20..22].copy_from_slice(&(offset & 0x1fff | u16::from(more) << 13).to_be_bytes());
        return frame;
    }
    let header = [[frame[20], 0], (offset << 3 | u16::from(more)).to_be_bytes(), [0, 0], [0, id]].concat();
    frame[20] = 44;
    let payload_bytes = u16::from_be_bytes([frame[18], frame[19]]) + 8;
    frame[18..20].copy_from_slice(&payload_bytes.to_be_bytes());
    frame.splice(54..54, header);
    frame
}

/// The IP packet of a frame that left, out of its tunnel.
fn carried(frame: &[u8]) -> Vec<u8> {
    let is_tunnelled = frame.len() > 54 && frame[14] == 0x45 && frame[23] == IPIP;
    let packet = &frame[if is_tunnelled { 34 } else { 14 }..];
    let ethertype = if packet[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
    [&[0xee; 12][..], &ethertype, packet].concat()
}

/// Its ends as they stand in the packet: source, destination, ports or identifier and type.
fn ends(frame: &[u8]) -> Option<([IpAddr; 2], u8, (u16, u16))> {
    fn of<A: Address>(view: &View<A>) -> ([IpAddr; 2], u8, (u16, u16)) {
        let key = view.key;
        ([key.src.to_ip(), key.dst.to_ip()], key.protocol.0, (key.ports.source(), key.ports.destination()))
    }
    match parse(frame).ok()? {
        Parsed::V4(view) => Some(of(&view)),
        Parsed::V6(view) => Some(of(&view)),
        Parsed::Arp(_) | Parsed::Other { .. } => None,
    }
}

impl What {
    fn frame(&self, sent: &[(IfIndex, Vec<u8>)]) -> Option<(Option<IfIndex>, Vec<u8>)> {
        let remembered = |number: u8| {
            let (device, frame) = sent.get(usize::from(number).checked_rem(sent.len())?)?;
            Some((*device, carried(frame)))
        };
        match self {
            Self::Bytes(bytes) => Some((None, bytes.clone())),
            Self::Packet { is_ipv6, src, dst, ports, protocol, fields, fragment } => {
                let addresses = [*src, *dst].map(|number| ip(pick(&ADDRESSES[usize::from(*is_ipv6)], number)));
                let ports = (pick(&PORTS, ports[0]), pick(&PORTS, ports[1]));
                let frame = packet(addresses, pick(&PROTOCOLS, *protocol), ports, fields).frame();
                Some((None, fragment.map_or(frame.clone(), |fragment| as_fragment(frame, fragment))))
            }
            Self::Answer { to, fields } => {
                let (device, left) = remembered(*to)?;
                let ([src, dst], protocol, (source, destination)) = ends(&left)?;
                let ports = if matches!(protocol, 1 | 58) { (source, 0) } else { (destination, source) };
                Some((Some(device), packet([dst, src], protocol, ports, fields).frame()))
            }
            Self::Error { about, from, code, quoted } => {
                let (device, left) = remembered(*about)?;
                let ([src, dst], ..) = ends(&left)?;
                let routers = &ADDRESSES[usize::from(src.is_ipv6())];
                let from = if *from == 0 { dst } else { ip(pick(routers, *from)) };
                let quote = left[14..].iter().copied().take(28 + usize::from(*quoted)).collect();
                let fields =
                    Fields { flags: [3, 1][usize::from(src.is_ipv6())], seq: *code, ack: 0, ttl: 64, payload: quote };
                let protocol = if src.is_ipv6() { 58 } else { 1 };
                let mut error = packet([from, src], protocol, (0, 0), &fields);
                error.l4[1] = *code;
                Some((Some(device), error.frame()))
            }
        }
    }
}

impl Arrival {
    fn frame(&self, sent: &[(IfIndex, Vec<u8>)]) -> Option<(IfIndex, Vec<u8>)> {
        let (device, mut frame) = self.what.frame(sent)?;
        for (at, byte) in &self.changes {
            if let Some(place) = frame.get_mut(14 + usize::from(*at)) {
                *place = *byte;
            }
        }
        let header_bytes = frame.get(14).map_or(0, |byte| usize::from(byte & 15) * 4);
        if frame.get(12..14) == Some(&[8, 0]) && header_bytes >= 20 && frame.len() >= 14 + header_bytes {
            frame[24..26].fill(0);
            let checksum = !sum(&frame[14..14 + header_bytes]);
            frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        if self.is_tunnelled && frame.len() >= 14 && frame.len() + 20 <= MAX_FRAME_BYTES {
            frame = tunnelled(&frame);
        }
        if let Some(cut) = self.cut {
            frame.truncate(usize::from(cut));
        }
        frame.truncate(MAX_FRAME_BYTES);
        Some((device.unwrap_or(pick(&DEVICES, self.device)), frame))
    }
}

/// `of_kernel`: the sources that the node's kernel has sent from, which are its own business.
fn check_sent(device: IfIndex, frame: &[u8], of_kernel: &BTreeSet<IpAddr>) {
    if device == IfIndex::HOST || frame[12..14] != [8, 0] {
        return;
    }
    let header_bytes = usize::from(frame[14] & 15) * 4;
    assert_eq!(sum(&frame[14..14 + header_bytes]), 0xffff, "a wrong header checksum leaves: {frame:?}");
    let in_cluster = |address: &[u8]| matches!(address, [10, 1 | 96, ..] | [192, 168, 10, 2]);
    if device == UPLINK && frame[23] != IPIP {
        let (src, dst) = (&frame[26..30], &frame[30..34]);
        let is_of_kernel = ends(frame).is_some_and(|([src, _], ..)| of_kernel.contains(&src));
        assert!(
            in_cluster(dst) || src[..2] != [10, 1] || is_of_kernel,
            "a pod's address leaves the cluster: {frame:?}"
        );
    }
}

/// The same done by both workers, which must send and count the same.
fn both(
    router: &mut Router,
    general: &mut Router,
    mut step: impl FnMut(&mut Router) -> Vec<(IfIndex, Vec<u8>)>,
) -> Vec<(IfIndex, Vec<u8>)> {
    let (sent, expected) = (step(router), step(general));
    assert_eq!(sent, expected);
    assert_eq!(router.totals(), general.totals());
    sent
}

fuzz_target!(|steps: Vec<Step>| {
    let mut links = links();
    links.devices.iter_mut().filter(|device| device.index == UPLINK).for_each(|uplink| uplink.mtu = MAX_MTU);
    let snat = || SnatPorts::new(10000..=10003, [30053]).expect("ports");
    let worker = || Router::between(&cluster(), &links, all_rules(true, true), snat(), 16);
    let (mut router, mut general) = (worker(), worker().without_straight_way());
    let mut sent: Vec<(IfIndex, Vec<u8>)> = Vec::new();
    let mut of_kernel = BTreeSet::new();
    for step in steps {
        let left = match step {
            Step::Turn(arrivals) => {
                let frames: Vec<_> = arrivals.iter().take(64).filter_map(|arrival| arrival.frame(&sent)).collect();
                let by_kernel = frames.iter().filter(|(device, _)| *device == IfIndex::HOST);
                of_kernel.extend(by_kernel.filter_map(|(_, frame)| Some(ends(frame)?.0[0])));
                both(&mut router, &mut general, |router| router.turn(&frames))
            }
            Step::Wait(ticks) => both(&mut router, &mut general, |router| router.wait(u32::from(ticks))),
            Step::Publish { is_open, has_services } => both(&mut router, &mut general, |router| {
                router.publish(all_rules(is_open, has_services));
                Vec::new()
            }),
        };
        left.iter().for_each(|(device, frame)| check_sent(*device, frame, &of_kernel));
        sent.extend(left.into_iter().filter(|(_, frame)| frame.len() >= 34));
        sent.drain(..sent.len().saturating_sub(REMEMBERED));
    }
    assert_eq!(router.finish(), general.finish());
});
