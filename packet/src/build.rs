//! The packets that a router makes itself: ARP and neighbour answers, RST, ICMP errors, fragments.
//!
//! Each function writes one frame to `out` and returns its length; `None` where the rules forbid an answer, or `out` is too
//! small. None is longer than [`MAX_BUILT_BYTES`].

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::{
    Address, FlowKey, Mac, Protocol,
    checksum::{Sum, pseudo_header},
    parse::{Arp, ETHERNET_BYTES, ETHERTYPE_ARP, ICMP_HEADER_BYTES, Kind, TcpFields, View, l4_checksum_ok},
    rewrite::{ORIGIN_TTL, ipv4_header, set_ethernet},
};

/// Length of the longest frame that is built here: an ICMPv6 error of IPv6's minimum MTU.
pub const MAX_BUILT_BYTES: usize = ETHERNET_BYTES + 1280;

/// Hop limit that proves a neighbour discovery packet to be from the link itself (RFC 4861, 7.1).
const LINK_HOP_LIMIT: u8 = 255;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;

/// Answers an ARP request: `request.target_ip` is at `mac`. Probes (RFC 5227) are answered too.
pub fn arp_reply(out: &mut [u8], request: &Arp, mac: Mac) -> Option<usize> {
    let asker = request.sender_mac;
    if request.operation != Arp::REQUEST || asker.is_group() || request.sender_ip.is_multicast_or_broadcast() {
        return None;
    }
    let reply = Arp {
        operation: Arp::REPLY,
        sender_mac: mac,
        sender_ip: request.target_ip,
        target_mac: asker,
        target_ip: request.sender_ip,
    };
    write_arp(out, &reply, asker)
}

/// Asks the link who has `target_ip`.
pub fn arp_request(out: &mut [u8], mac: Mac, sender_ip: Ipv4Addr, target_ip: Ipv4Addr) -> Option<usize> {
    let request = Arp { operation: Arp::REQUEST, sender_mac: mac, sender_ip, target_mac: Mac::default(), target_ip };
    write_arp(out, &request, Mac::BROADCAST)
}

fn write_arp(out: &mut [u8], arp: &Arp, to: Mac) -> Option<usize> {
    let out = out.get_mut(..ETHERNET_BYTES + Arp::BYTES)?;
    set_ethernet(out, to, arp.sender_mac, ETHERTYPE_ARP);
    let packet = &mut out[ETHERNET_BYTES..];
    packet[..6].copy_from_slice(&Arp::PREAMBLE);
    packet[6..8].copy_from_slice(&arp.operation.to_be_bytes());
    packet[8..14].copy_from_slice(&arp.sender_mac.0);
    arp.sender_ip.write(&mut packet[14..18]);
    packet[18..24].copy_from_slice(&arp.target_mac.0);
    arp.target_ip.write(&mut packet[24..28]);
    Some(ETHERNET_BYTES + Arp::BYTES)
}

/// The address that a neighbour solicitation asks for; `None` where the packet is no solicitation, or one that RFC 4861,
/// 7.1.1 says to discard.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn solicited_target(frame: &[u8], view: &View<Ipv6Addr>) -> Option<Ipv6Addr> {
    let message = view.l4_slice(frame);
    if view.kind != Kind::Control
        || view.icmp(frame) != Some((NEIGHBOR_SOLICITATION, 0))
        || view.ttl != LINK_HOP_LIMIT
        || message.len() < 24
        || !l4_checksum_ok(frame, view)
    {
        return None;
    }
    let target = Ipv6Addr::read(&message[8..24]);
    let mut has_source_option = false;
    let mut options = &message[24..];
    while let [kind, units, ..] = *options {
        let bytes = usize::from(units) * 8;
        if bytes == 0 || bytes > options.len() {
            return None;
        }
        has_source_option |= kind == SOURCE_LINK_LAYER;
        options = &options[bytes..];
    }
    let probe = view.key.src.is_unspecified();
    let to_solicited_node = view.key.dst == solicited_node(target);
    if !options.is_empty() || target.is_multicast() || (probe && (has_source_option || !to_solicited_node)) {
        return None;
    }
    Some(target)
}

/// ff02::1:ffXX:XXXX (RFC 4291, 2.7.1).
fn solicited_node(target: Ipv6Addr) -> Ipv6Addr {
    let low = target.to_bits() & 0xff_ffff;
    Ipv6Addr::from_bits(0xff02_0000_0000_0000_0000_0001_ff00_0000 | low)
}

/// The Ethernet group of an IPv6 group (RFC 2464, 7).
fn group_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    Mac([0x33, 0x33, a, b, c, d])
}

/// Answers a neighbour solicitation (RFC 4861, 7.2.4): the target that it asks for is at `mac`, which is a router's.
///
/// The caller asks [`solicited_target`] first whether the target is its own.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn neighbor_advertisement(out: &mut [u8], frame: &[u8], view: &View<Ipv6Addr>, mac: Mac) -> Option<usize> {
    const ROUTER: u8 = 0x80;
    const SOLICITED: u8 = 0x40;
    const OVERRIDE: u8 = 0x20;
    let target = solicited_target(frame, view)?;
    let asker = source_mac(frame)?;
    let (flags, dst, dst_mac) = if view.key.src.is_unspecified() {
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        (ROUTER | OVERRIDE, all_nodes, group_mac(all_nodes))
    } else {
        (ROUTER | SOLICITED | OVERRIDE, view.key.src, asker)
    };
    let mut message = [0; 32];
    message[0] = NEIGHBOR_ADVERTISEMENT;
    message[4] = flags;
    target.write(&mut message[8..24]);
    message[24..26].copy_from_slice(&[TARGET_LINK_LAYER, 1]);
    message[26..].copy_from_slice(&mac.0);
    write_neighbor_message(out, &message, (mac, target), (dst_mac, dst))
}

/// Asks the link who has `target` (RFC 4861, 7.2.2).
pub fn neighbor_solicitation(out: &mut [u8], mac: Mac, sender: Ipv6Addr, target: Ipv6Addr) -> Option<usize> {
    let mut message = [0; 32];
    message[0] = NEIGHBOR_SOLICITATION;
    target.write(&mut message[8..24]);
    message[24..26].copy_from_slice(&[SOURCE_LINK_LAYER, 1]);
    message[26..].copy_from_slice(&mac.0);
    let dst = solicited_node(target);
    write_neighbor_message(out, &message, (mac, sender), (group_mac(dst), dst))
}

fn write_neighbor_message(
    out: &mut [u8],
    message: &[u8; 32],
    from: (Mac, Ipv6Addr),
    to: (Mac, Ipv6Addr),
) -> Option<usize> {
    let mut packet = Builder::new(out, to.0, from.0, from.1, to.1, Protocol::ICMPV6, message.len())?;
    packet.set_hop_limit(LINK_HOP_LIMIT);
    packet.l4().copy_from_slice(message);
    packet.finish(2);
    Some(packet.frame_bytes())
}

/// The sender's MAC address, unless it is a group, which cannot be answered.
fn source_mac(frame: &[u8]) -> Option<Mac> {
    let mac = Mac(*frame.get(6..12)?.first_chunk()?);
    (!mac.is_group()).then_some(mac)
}

/// The MAC address that a frame was sent to, unless it was sent to a group, which is no one's to answer for.
fn destination_mac(frame: &[u8]) -> Option<Mac> {
    let mac = Mac(*frame.first_chunk()?);
    (!mac.is_group()).then_some(mac)
}

/// A frame in the making: Ethernet and IP headers are written, the layer-4 part is zeros.
struct Builder<'o, A> {
    frame: &'o mut [u8],
    src: A,
    dst: A,
    protocol: Protocol,
}

impl<'o, A: Address> Builder<'o, A> {
    const L4: usize = ETHERNET_BYTES + A::HEADER_BYTES;

    fn new(
        out: &'o mut [u8],
        dst_mac: Mac,
        src_mac: Mac,
        src: A,
        dst: A,
        protocol: Protocol,
        l4_bytes: usize,
    ) -> Option<Self> {
        let frame = out.get_mut(..Self::L4 + l4_bytes)?;
        set_ethernet(frame, dst_mac, src_mac, A::ETHERTYPE);
        if A::WORDS != 1 {
            let header = &mut frame[ETHERNET_BYTES..Self::L4];
            header[..4].copy_from_slice(&[0x60, 0, 0, 0]);
            header[4..6].copy_from_slice(&u16::try_from(l4_bytes).ok()?.to_be_bytes());
            header[6..8].copy_from_slice(&[protocol.0, ORIGIN_TTL]);
            src.write(&mut header[8..24]);
            dst.write(&mut header[24..40]);
        }
        let mut builder = Self { frame, src, dst, protocol };
        builder.set_tos(0);
        builder.l4().fill(0);
        Some(builder)
    }

    /// IPv4's header is written as a whole, its identification 0: with DF that is never a fragment (RFC 6864, 4.1).
    fn set_tos(&mut self, tos: u8) {
        if let (std::net::IpAddr::V4(src), std::net::IpAddr::V4(dst)) = (self.src.to_ip(), self.dst.to_ip()) {
            let total_bytes = (self.frame.len() - ETHERNET_BYTES) as u16;
            let header = ipv4_header(src, dst, self.protocol, total_bytes, tos, 0);
            self.frame[ETHERNET_BYTES..Self::L4].copy_from_slice(&header);
        }
    }

    fn set_hop_limit(&mut self, hop_limit: u8) {
        self.frame[ETHERNET_BYTES + 7] = hop_limit;
    }

    fn l4(&mut self) -> &mut [u8] {
        &mut self.frame[Self::L4..]
    }

    /// Writes the checksum, whose field is still 0, at this offset of the layer-4 header.
    fn finish(&mut self, checksum_at: usize) {
        let (src, dst, protocol) = (self.src, self.dst, self.protocol);
        let l4 = self.l4();
        let pseudo = match protocol {
            Protocol::ICMP => Sum::ZERO,
            _ => pseudo_header(src, dst, protocol, l4.len() as u32),
        };
        let checksum = pseudo.plus(Sum::ZERO.bytes(l4)).finish();
        l4[checksum_at..checksum_at + 2].copy_from_slice(&checksum);
    }

    fn frame_bytes(&self) -> usize {
        self.frame.len()
    }
}

/// Refuses a TCP segment (RFC 9293, 3.10.7.1, CLOSED state), from the addresses that its sender sent it to: those of
/// `view.key`, whatever stands in the frame by now.
///
/// Never an answer to a RST, to a segment with a wrong checksum, to a fragment, or to a group.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn tcp_reset<A: Address>(out: &mut [u8], frame: &[u8], view: &View<A>) -> Option<usize> {
    let key = &view.key;
    let segment = view.tcp(frame);
    if key.protocol != Protocol::TCP
        || view.kind != Kind::Flow
        || segment.flags & TcpFields::RST != 0
        || !may_be_answered(key.src)
        || key.dst.is_multicast_or_broadcast()
        || !l4_checksum_ok(frame, view)
    {
        return None;
    }
    let (seq, ack, flags) = if segment.flags & TcpFields::ACK != 0 {
        (segment.ack, 0, TcpFields::RST)
    } else {
        let controls = (segment.flags & TcpFields::SYN != 0) as u32 + (segment.flags & TcpFields::FIN != 0) as u32;
        let next = segment.seq.wrapping_add(segment.payload_bytes).wrapping_add(controls);
        (0, next, TcpFields::RST | TcpFields::ACK)
    };
    let (to, from) = (source_mac(frame)?, destination_mac(frame)?);
    let mut packet = Builder::new(out, to, from, key.dst, key.src, Protocol::TCP, 20)?;
    let header = packet.l4();
    header[..2].copy_from_slice(&key.ports.destination().to_be_bytes());
    header[2..4].copy_from_slice(&key.ports.source().to_be_bytes());
    header[4..8].copy_from_slice(&seq.to_be_bytes());
    header[8..12].copy_from_slice(&ack.to_be_bytes());
    header[12..14].copy_from_slice(&[5 << 4, flags]);
    packet.finish(16);
    Some(packet.frame_bytes())
}

/// Makes a TCP segment that may not reach its receiver one that resets the connection there: its own number is the one that its receiver
/// expects (RFC 5961, 3.2), its acknowledgment what one that waits for a SYN-ACK goes by (RFC 9293, 3.10.7.3). `to`: the key that the
/// segment would have had there.
///
/// Never of a segment with a wrong checksum, or of a fragment.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn tcp_reset_onwards<A: Address>(out: &mut [u8], frame: &[u8], view: &View<A>, to: &FlowKey<A>) -> Option<usize> {
    let segment = view.tcp(frame);
    if view.key.protocol != Protocol::TCP || view.kind != Kind::Flow || !l4_checksum_ok(frame, view) {
        return None;
    }
    let acknowledges = segment.flags & TcpFields::ACK;
    let mut packet = Builder::new(out, Mac::default(), Mac::default(), to.src, to.dst, Protocol::TCP, 20)?;
    let header = packet.l4();
    header[..2].copy_from_slice(&to.ports.source().to_be_bytes());
    header[2..4].copy_from_slice(&to.ports.destination().to_be_bytes());
    header[4..8].copy_from_slice(&segment.seq.to_be_bytes());
    header[8..12].copy_from_slice(&if acknowledges == 0 { 0 } else { segment.ack }.to_be_bytes());
    header[12..14].copy_from_slice(&[5 << 4, TcpFields::RST | acknowledges]);
    packet.finish(16);
    Some(packet.frame_bytes())
}

/// Whether the address names one host that can be answered. A loopback one is the node's own kernel's: whoever else sends from one is dropped as
/// it is parsed ([`crate::parse::parse_start`]).
fn may_be_answered<A: Address>(src: A) -> bool {
    !(src == A::unspecified() || src.is_multicast_or_broadcast())
}

/// Why a packet is returned to its sender.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IcmpError {
    /// Nobody listens at the port.
    PortUnreachable,
    /// The destination's link does not find it.
    HostUnreachable,
    /// There is no route to the destination.
    NetUnreachable,
    /// Policy forbids it.
    AdminProhibited,
    /// The TTL or hop limit ran out.
    TtlExceeded,
    /// It is larger than the next link carries and must not be fragmented.
    TooBig {
        /// Bytes of the largest IP packet that would pass.
        mtu: u32,
    },
}

impl IcmpError {
    /// Type, code, and the second word of the header: RFC 792, RFC 1812 5.2.7.1, RFC 1191 4; RFC 4443, 3.
    fn header<A: Address>(self) -> (u8, u8, u32) {
        let mtu = match self {
            Self::TooBig { mtu } if A::WORDS == 1 => mtu.min(u32::from(u16::MAX)),
            Self::TooBig { mtu } => mtu,
            _ => 0,
        };
        let (icmp_type, code) = match (self, A::WORDS) {
            (Self::PortUnreachable, 1) => (3, 3),
            (Self::HostUnreachable, 1) => (3, 1),
            (Self::NetUnreachable, 1) => (3, 0),
            (Self::AdminProhibited, 1) => (3, 13),
            (Self::TtlExceeded, 1) => (11, 0),
            (Self::TooBig { .. }, 1) => (3, 4),
            (Self::PortUnreachable, _) => (1, 4),
            (Self::HostUnreachable, _) => (1, 3),
            (Self::NetUnreachable, _) => (1, 0),
            (Self::AdminProhibited, _) => (1, 1),
            (Self::TtlExceeded, _) => (3, 0),
            (Self::TooBig { .. }, _) => (2, 0),
        };
        (icmp_type, code, mtu)
    }
}

/// Tells the sender of a packet what became of it, from the address `source`, quoting the packet as the frame holds it now:
/// up to 576 bytes in all for IPv4 (RFC 1812, 4.3.2.3), 1280 for IPv6 (RFC 4443, 2.4 c).
///
/// Never about ICMP errors and redirects, later fragments, packets to a group (but IPv6's too-big, RFC 4443, 2.4 e), packets
/// in a frame to a group, or from a source that is not one host (RFC 1812, 4.3.2.7).
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn icmp_error<A: Address>(
    out: &mut [u8],
    frame: &[u8],
    view: &View<A>,
    source: A,
    error: IcmpError,
) -> Option<usize> {
    const LARGEST_IPV4: usize = 576;
    const LARGEST_IPV6: usize = 1280;
    // RFC 1812, 4.3.2.5: the offending packet's service, at the precedence of internetwork control; no ECN.
    const SERVICE: u8 = 0x1c;
    const INTERNETWORK_CONTROL: u8 = 0xc0;
    let to_group = view.key.dst.is_multicast_or_broadcast();
    let group_is_told = A::WORDS != 1 && matches!(error, IcmpError::TooBig { .. });
    if !matches!(view.kind, Kind::Flow | Kind::FirstFragment { .. })
        || (to_group && !group_is_told)
        || !may_be_answered(view.key.src)
    {
        return None;
    }
    let (to, from) = (source_mac(frame)?, destination_mac(frame)?);
    let largest = if A::WORDS == 1 { LARGEST_IPV4 } else { LARGEST_IPV6 };
    let packet = &frame[usize::from(view.l3)..usize::from(view.end)];
    let quote = &packet[..packet.len().min(largest - A::HEADER_BYTES - ICMP_HEADER_BYTES)];
    let message_bytes = ICMP_HEADER_BYTES + quote.len();
    let mut answer = Builder::new(out, to, from, source, view.key.src, A::ICMP, message_bytes)?;
    answer.set_tos(INTERNETWORK_CONTROL | view.tos & SERVICE);
    let (icmp_type, code, rest) = error.header::<A>();
    let message = answer.l4();
    message[..2].copy_from_slice(&[icmp_type, code]);
    message[4..8].copy_from_slice(&rest.to_be_bytes());
    message[ICMP_HEADER_BYTES..].copy_from_slice(quote);
    answer.finish(2);
    Some(answer.frame_bytes())
}

/// Answers an echo request from the address that it was sent to (RFC 792; RFC 4443, 4.2).
///
/// Never one with a wrong checksum, a fragment, or one to a group.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn echo_reply<A: Address>(out: &mut [u8], frame: &[u8], view: &View<A>) -> Option<usize> {
    let (request, reply) = if A::WORDS == 1 { (8, 0) } else { (128, 129) };
    let key = &view.key;
    if view.kind != Kind::Flow
        || view.icmp(frame).is_none_or(|(icmp_type, _)| icmp_type != request)
        || !may_be_answered(key.src)
        || key.dst.is_multicast_or_broadcast()
        || !l4_checksum_ok(frame, view)
    {
        return None;
    }
    let message = &frame[usize::from(view.l4)..usize::from(view.end)];
    let (to, from) = (source_mac(frame)?, destination_mac(frame)?);
    let mut answer = Builder::new(out, to, from, key.dst, key.src, A::ICMP, message.len())?;
    answer.set_tos(view.tos);
    let l4 = answer.l4();
    l4.copy_from_slice(message);
    l4[0] = reply;
    l4[2..4].fill(0);
    answer.finish(2);
    Some(answer.frame_bytes())
}

/// Splits an IPv4 packet into fragments of at most `mtu` bytes, header included (RFC 791, 3.2); each is given to `emit` as
/// its header, with options, and its payload, a part of `frame`. A fragment may be split further.
///
/// Returns their number; 0 where the packet must not be fragmented, or `mtu` has no room for 8 bytes of payload.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn fragment_ipv4(frame: &[u8], view: &View<Ipv4Addr>, mtu: usize, mut emit: impl FnMut(&[u8], &[u8])) -> usize {
    let packet = &frame[usize::from(view.l3)..usize::from(view.end)];
    let (whole_header, payload) = packet.split_at(usize::from(view.l4 - view.l3));
    if view.dont_fragment || mtu < whole_header.len() + 8 {
        return 0;
    }
    let mut buffer = [0; 60];
    buffer[..whole_header.len()].copy_from_slice(whole_header);
    let mut header_bytes = whole_header.len();
    let field = u16::from_be_bytes([whole_header[6], whole_header[7]]);
    let (base, last_is_followed) = (field & 0x1fff, field & 0x2000 != 0);
    let (mut at, mut fragments) = (0, 0);
    loop {
        let rest = payload.len() - at;
        let room = mtu - header_bytes;
        let bytes = if rest <= room { rest } else { room / 8 * 8 };
        let is_last = bytes == rest;
        let header = &mut buffer[..header_bytes];
        let place = (base + (at / 8) as u16) | if is_last && !last_is_followed { 0 } else { 0x2000 };
        header[0] = 0x40 | (header_bytes / 4) as u8;
        header[2..4].copy_from_slice(&((header_bytes + bytes) as u16).to_be_bytes());
        header[6..8].copy_from_slice(&place.to_be_bytes());
        header[10..12].fill(0);
        let checksum = Sum::ZERO.bytes(header).finish();
        header[10..12].copy_from_slice(&checksum);
        emit(header, &payload[at..at + bytes]);
        fragments += 1;
        at += bytes;
        if is_last {
            return fragments;
        }
        if fragments == 1 {
            header_bytes = 20 + copy_options(&whole_header[20..], &mut buffer[20..]);
        }
    }
}

/// Keeps the options that every fragment carries (RFC 791, 3.1: their first bit is set), ended and padded to whole words.
fn copy_options(mut options: &[u8], out: &mut [u8]) -> usize {
    const COPIED: u8 = 0x80;
    let mut written = 0;
    while let [kind, rest @ ..] = options {
        let length = match *kind {
            0 => break,
            1 => 1,
            _ => rest.first().map_or(1, |length| usize::from(*length)).max(1),
        };
        let Some((option, after)) = options.split_at_checked(length) else { break };
        if kind & COPIED != 0 {
            out[written..written + length].copy_from_slice(option);
            written += length;
        }
        options = after;
    }
    let padded = written.next_multiple_of(4);
    out[written..padded].fill(0);
    padded
}
