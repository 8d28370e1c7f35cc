//! A frame's headers, checked to be whole and sane, in one pass.
//!
//! [`parse`] takes one Ethernet frame of any content and any length and never panics. What it returns is a [`View`]: the
//! flow key, the offsets of the headers, and the [`Kind`] that says how the packet is to be tracked. A view does not
//! borrow the frame, so that the frame may be rewritten through it; the accessors that read more take the frame again.
//!
//! A long frame may be in memory in parts. [`parse_start`] takes the first of them, which must hold all headers, and the
//! length of the whole. Whoever needs the rest (checksums, fragments) takes the whole frame in one piece.
//!
//! What a view promises, and every later stage relies on:
//! - `l3 + header <= l4 <= end <= length of the frame <= 65535`; bytes from `end` on are Ethernet padding. What was parsed
//!   reaches to `l4` at least.
//! - Unless it is a later fragment, the layer-4 header of TCP (with its options), UDP, SCTP, ICMP and ICMPv6 lies whole
//!   between `l4` and `end`, in what was parsed, and a TCP header's flags are a combination that some TCP may send.
//! - Addresses are none that may not appear on the wire.
//!
//! Layer-4 checksums are not verified here: they are updated incrementally, which never repairs a bad one. What changes
//! state asks [`l4_checksum_ok`].

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::{
    Address, DropReason, FlowKey, Mac, Ports, Protocol,
    checksum::{Sum, pseudo_header, sctp_checksum},
};

/// Length of an Ethernet header without tags.
pub const ETHERNET_BYTES: usize = 14;
/// EtherType of ARP (RFC 826).
pub const ETHERTYPE_ARP: u16 = 0x0806;

/// UDP-Lite (RFC 3828): its checksum covers the pseudo header as UDP's does.
pub(crate) const UDP_LITE: Protocol = Protocol(136);
const IGMP: Protocol = Protocol(2);

/// One frame's network layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// An IPv4 packet.
    V4(View<Ipv4Addr>),
    /// An IPv6 packet.
    V6(View<Ipv6Addr>),
    /// ARP for IPv4 over Ethernet.
    Arp(Arp),
    /// A VLAN tag, or a protocol that weir does not carry.
    Other {
        /// Its EtherType, or a length for IEEE 802.3 frames.
        ethertype: u16,
    },
}

/// Where the headers of an IP packet lie in its frame, and what they say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View<A: Address> {
    /// Protocol, addresses and ports. ICMP with an identifier (echo and others): that and the type; other ICMP: code as source and type as
    /// destination; 0 for other protocols and for later fragments (whose protocol, in IPv6, is what the fragment header
    /// says: maybe an extension header's number).
    pub key: FlowKey<A>,
    /// Offset of the IP header in the frame.
    pub l3: u16,
    /// Offset of what follows the IP header with its options or extension headers.
    pub l4: u16,
    /// End of the IP packet in the frame.
    pub end: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class: DSCP and ECN.
    pub tos: u8,
    /// Whether routers must not fragment it: IPv4's flag; always so in IPv6.
    pub dont_fragment: bool,
    /// How it is to be tracked.
    pub kind: Kind,
}

const _: () = assert!(size_of::<View<Ipv4Addr>>() <= 40 && size_of::<View<Ipv6Addr>>() <= 64);

/// How a packet is to be tracked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A whole packet with a usable key.
    Flow,
    /// A whole ICMP error (or redirect) about another packet, which [`parse_embedded`] reads.
    IcmpError,
    /// A packet between neighbours that is not forwarded: IGMP, router discovery, ND, MLD.
    Control,
    /// The first fragment of a packet: it has a usable key, but not the whole payload.
    FirstFragment {
        /// The packet's identification: 16 bits in IPv4.
        id: u32,
        /// Bytes of the packet's fragmentable part that it carries.
        bytes: u16,
    },
    /// A further fragment, without layer-4 header.
    LaterFragment {
        /// The packet's identification: 16 bits in IPv4.
        id: u32,
        /// Its place in the packet's fragmentable part, in bytes.
        offset: u16,
        /// Bytes of the packet's fragmentable part that it carries; never 0.
        bytes: u16,
        /// Whether further fragments follow.
        more: bool,
    },
}

/// The fields of a TCP header that connection tracking reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TcpFields {
    /// FIN, SYN, RST, PSH, ACK, URG, ECE, CWR from the least significant bit.
    pub flags: u8,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgment number; meaningless without [`TcpFields::ACK`].
    pub ack: u32,
    /// Window, not scaled.
    pub window: u16,
    /// Bytes of data; in a first fragment those that it carries itself.
    pub payload_bytes: u32,
}

impl TcpFields {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// The acknowledgment number is meaningful.
    pub const ACK: u8 = 0x10;
    /// The urgent pointer is meaningful.
    pub const URG: u8 = 0x20;
}

impl<A: Address> View<A> {
    /// Bytes of the IP packet, header included.
    #[inline]
    pub const fn ip_bytes(&self) -> u16 {
        self.end - self.l3
    }

    /// Bytes of the layer-4 header and its payload.
    #[inline]
    pub const fn l4_bytes(&self) -> u16 {
        self.end - self.l4
    }

    /// The layer-4 header and its payload, as far as they lie in `frame`.
    ///
    /// # Panics
    /// Where `frame` is shorter than what was parsed.
    #[inline]
    pub fn l4_slice<'f>(&self, frame: &'f [u8]) -> &'f [u8] {
        &frame[usize::from(self.l4)..usize::from(self.end).min(frame.len())]
    }

    /// The TCP header's fields; zeros for other protocols and later fragments.
    ///
    /// # Panics
    /// Where `frame` is shorter than the one that was parsed.
    #[inline]
    pub fn tcp(&self, frame: &[u8]) -> TcpFields {
        let segment = self.l4_slice(frame);
        match segment.first_chunk::<20>() {
            Some(header) if self.key.protocol == Protocol::TCP && !self.is_later_fragment() => TcpFields {
                flags: header[13],
                seq: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
                ack: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
                window: u16::from_be_bytes([header[14], header[15]]),
                payload_bytes: u32::from(self.l4_bytes()).saturating_sub(u32::from(header[12] >> 4) * 4),
            },
            _ => TcpFields::default(),
        }
    }

    /// The TCP options: what lies between the fixed header and the data. Empty for other protocols and later fragments.
    ///
    /// # Panics
    /// Where `frame` is shorter than the one that was parsed.
    #[inline]
    pub fn tcp_options<'f>(&self, frame: &'f [u8]) -> &'f [u8] {
        if self.key.protocol != Protocol::TCP || self.is_later_fragment() {
            return &[];
        }
        let segment = self.l4_slice(frame);
        segment.get(12).and_then(|offset| segment.get(20..usize::from(offset >> 4) * 4)).unwrap_or(&[])
    }

    /// Type and code of an ICMP or ICMPv6 message.
    ///
    /// # Panics
    /// Where `frame` is shorter than the one that was parsed.
    #[inline]
    pub fn icmp(&self, frame: &[u8]) -> Option<(u8, u8)> {
        match self.l4_slice(frame) {
            [icmp_type, code, ..] if self.key.protocol == A::ICMP && !self.is_later_fragment() => {
                Some((*icmp_type, *code))
            }
            _ => None,
        }
    }

    /// What an ICMP error quotes, as far as it lies in `frame`: the start of another IP packet. Empty where it is no ICMP
    /// error.
    ///
    /// # Panics
    /// Where `frame` is shorter than the one that was parsed.
    #[inline]
    pub fn quote<'f>(&self, frame: &'f [u8]) -> &'f [u8] {
        match self.kind {
            Kind::IcmpError => self.l4_slice(frame).get(ICMP_HEADER_BYTES..).unwrap_or(&[]),
            _ => &[],
        }
    }

    /// Whether the packet is an ICMP redirect (RFC 792); ICMPv6's is [`Kind::Control`].
    #[inline]
    pub fn is_redirect(&self) -> bool {
        const REDIRECT: u16 = 5;
        A::WORDS == 1 && self.kind == Kind::IcmpError && self.key.ports.destination() == REDIRECT
    }

    /// Whether the packet is a fragment other than the first.
    #[inline]
    pub const fn is_later_fragment(&self) -> bool {
        matches!(self.kind, Kind::LaterFragment { .. })
    }

    /// Whether the packet is part of a larger one.
    #[inline]
    pub const fn is_fragment(&self) -> bool {
        matches!(self.kind, Kind::FirstFragment { .. } | Kind::LaterFragment { .. })
    }

    /// The view of the same packet in a frame whose start moved by `bytes` towards it: after decapsulation, the IP
    /// header in front is gone. `None` where that would leave no room for an Ethernet header.
    #[inline]
    pub const fn moved_up(&self, bytes: u16) -> Option<Self> {
        if (self.l3 as usize) < bytes as usize + ETHERNET_BYTES {
            return None;
        }
        Some(Self { l3: self.l3 - bytes, l4: self.l4 - bytes, end: self.end - bytes, ..*self })
    }
}

/// Length of the header of every ICMP and ICMPv6 message that weir looks into.
pub(crate) const ICMP_HEADER_BYTES: usize = 8;

/// An ARP packet for IPv4 over Ethernet (RFC 826).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arp {
    /// [`Arp::REQUEST`], [`Arp::REPLY`] or another operation.
    pub operation: u16,
    /// Hardware address of the sender.
    pub sender_mac: Mac,
    /// Address of the sender; 0.0.0.0 in a probe (RFC 5227).
    pub sender_ip: Ipv4Addr,
    /// Hardware address of the target; unknown (zero) in a request.
    pub target_mac: Mac,
    /// Address asked for, or of the one answered.
    pub target_ip: Ipv4Addr,
}

impl Arp {
    /// Who has `target_ip`?
    pub const REQUEST: u16 = 1;
    /// `sender_ip` is at `sender_mac`.
    pub const REPLY: u16 = 2;
    /// Length of the packet.
    pub const BYTES: usize = 28;
    /// Ethernet (1), IPv4 (0x0800), address lengths 6 and 4.
    pub(crate) const PREAMBLE: [u8; 6] = [0, 1, 8, 0, 6, 4];
}

/// Reads one Ethernet frame.
///
/// # Errors
/// The drop reason that fits: `Truncated`, `MalformedHeader`, `BadHeaderChecksum`, `MartianAddress`, `FragmentMalformed`,
/// `FragmentTiny`, `Invalid` or `Unsupported` (source routes).
#[inline]
pub fn parse(frame: &[u8]) -> Result<Parsed, DropReason> {
    parse_start(frame, frame.len())
}

/// Reads an Ethernet frame of `frame_bytes` bytes, of which `start` has the first, all headers among them.
///
/// # Errors
/// As [`parse`]; headers that do not lie in `start` are not whole.
#[inline]
pub fn parse_start(start: &[u8], frame_bytes: usize) -> Result<Parsed, DropReason> {
    let header = start.first_chunk::<ETHERNET_BYTES>().ok_or(DropReason::Truncated)?;
    parse_network_layer(start, frame_bytes, ETHERNET_BYTES, u16::from_be_bytes([header[12], header[13]]))
}

/// As [`parse_start`], for what a node's own kernel sends to itself: loopback addresses may stand on either side.
///
/// # Errors
/// As [`parse`].
#[cold]
pub fn parse_start_of_own(start: &[u8], frame_bytes: usize) -> Result<Parsed, DropReason> {
    let header = start.first_chunk::<ETHERNET_BYTES>().ok_or(DropReason::Truncated)?;
    match u16::from_be_bytes([header[12], header[13]]) {
        Ipv4Addr::ETHERTYPE => parse_ipv4(start, frame_bytes, ETHERNET_BYTES, true).map(Parsed::V4),
        Ipv6Addr::ETHERTYPE => parse_ipv6(start, frame_bytes, ETHERNET_BYTES, true).map(Parsed::V6),
        ethertype => parse_network_layer(start, frame_bytes, ETHERNET_BYTES, ethertype),
    }
}

/// Reads the packet of type `ethertype` that begins at offset `l3` and may reach to the end of `frame`.
///
/// # Errors
/// As [`parse`].
#[inline]
pub fn parse_ip(frame: &[u8], l3: usize, ethertype: u16) -> Result<Parsed, DropReason> {
    parse_network_layer(frame, frame.len(), l3, ethertype)
}

#[inline]
fn parse_network_layer(start: &[u8], frame_bytes: usize, l3: usize, ethertype: u16) -> Result<Parsed, DropReason> {
    match ethertype {
        Ipv4Addr::ETHERTYPE => match usual_ipv4(start, l3) {
            Some(view) => Ok(Parsed::V4(view)),
            None => parse_ipv4(start, frame_bytes, l3, false).map(Parsed::V4),
        },
        Ipv6Addr::ETHERTYPE => match usual_ipv6(start, l3) {
            Some(view) => Ok(Parsed::V6(view)),
            None => parse_ipv6(start, frame_bytes, l3, false).map(Parsed::V6),
        },
        ETHERTYPE_ARP => parse_arp(start, l3).map(Parsed::Arp),
        ethertype => Ok(Parsed::Other { ethertype }),
    }
}

/// The bytes from `l3` on, of a frame whose offsets fit a view's.
#[inline]
fn network_layer(start: &[u8], frame_bytes: usize, l3: usize) -> Result<&[u8], DropReason> {
    if frame_bytes > usize::from(u16::MAX) {
        return Err(DropReason::Truncated);
    }
    start.get(l3..).ok_or(DropReason::Truncated)
}

/// Whole TCP and UDP packets without options: nearly all there are. What is not one, or not right, or in memory in parts,
/// is left to [`parse_ipv4`], which reads everything and knows the reasons.
///
/// The view is made in one place from values in registers. Anything that is put together in memory on several paths (an
/// enum with fields, a `Result` that is mapped) is read back wider than it was written, which stalls for longer than all the
/// checks take.
#[inline(always)]
fn usual_ipv4(frame: &[u8], l3: usize) -> Option<View<Ipv4Addr>> {
    let packet = network_layer(frame, frame.len(), l3).ok()?;
    let header = packet.first_chunk::<20>()?;
    let is_plain = header[0] == 0x45 && u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0;
    if !is_plain || !Sum::ZERO.bytes(header).is_valid() {
        return None;
    }
    let total_bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let ports = usual_ports(packet.get(20..total_bytes)?, Protocol(header[9]))?;
    let view = ipv4_view(header, l3, 20, total_bytes, ports, Kind::Flow);
    (!is_martian_ipv4(view.key.src, view.key.dst, false)).then_some(view)
}

/// Any IPv4 packet.
#[inline(never)]
fn parse_ipv4(start: &[u8], frame_bytes: usize, l3: usize, of_own: bool) -> Result<View<Ipv4Addr>, DropReason> {
    let packet = network_layer(start, frame_bytes, l3)?;
    let header = packet.first_chunk::<20>().ok_or(DropReason::Truncated)?;
    let header_bytes = usize::from(header[0] & 0xf) * 4;
    let total_bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] >> 4 != 4 || header_bytes < 20 || total_bytes < header_bytes {
        return Err(DropReason::MalformedHeader);
    }
    let packet = start_of(packet, total_bytes, frame_bytes - l3)?;
    let (header_and_options, l4) = packet.split_at_checked(header_bytes).ok_or(DropReason::Truncated)?;
    if !Sum::ZERO.bytes(header_and_options).is_valid() {
        return Err(DropReason::BadHeaderChecksum);
    }
    if is_martian_ipv4(Ipv4Addr::read(&header[12..16]), Ipv4Addr::read(&header[16..20]), of_own) {
        return Err(DropReason::MartianAddress);
    }
    check_ipv4_options(&header_and_options[20..])?;
    let protocol = Protocol(header[9]);
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let l4_bytes = total_bytes - header_bytes;
    let (ports, kind) = if fragment & 0x3fff == 0 {
        upper_layer::<Ipv4Addr>(l4, l4_bytes, protocol, DropReason::MalformedHeader)?
    } else {
        let id = u32::from(u16::from_be_bytes([header[4], header[5]]));
        let offset = (fragment & 0x1fff) * 8;
        fragment_kind::<Ipv4Addr>(l4_bytes, l4, l4_bytes, protocol, id, offset, fragment & 0x2000 != 0)?
    };
    Ok(ipv4_view(header, l3, header_bytes, total_bytes, ports, kind))
}

/// What `start` has of a packet of `total_bytes` bytes, for which the frame has room of `room` bytes.
fn start_of(start: &[u8], total_bytes: usize, room: usize) -> Result<&[u8], DropReason> {
    match total_bytes <= room {
        true => Ok(&start[..total_bytes.min(start.len())]),
        false => Err(DropReason::Truncated),
    }
}

#[inline(always)]
fn ipv4_view(
    header: &[u8; 20],
    l3: usize,
    header_bytes: usize,
    total_bytes: usize,
    ports: Ports,
    kind: Kind,
) -> View<Ipv4Addr> {
    View {
        key: FlowKey {
            src: Ipv4Addr::read(&header[12..16]),
            dst: Ipv4Addr::read(&header[16..20]),
            ports,
            protocol: Protocol(header[9]),
        },
        l3: l3 as u16,
        l4: (l3 + header_bytes) as u16,
        end: (l3 + total_bytes) as u16,
        ttl: header[8],
        tos: header[1],
        dont_fragment: header[6] & 0x40 != 0,
        kind,
    }
}

/// RFC 1812, 4.2.2.11 and 5.3.7: sources that are groups, and "this host" or (unless `of_own`) loopback on either side; but who has no address
/// yet asks everybody for one (RFC 2131, 4.1).
#[inline(always)]
pub(crate) fn is_martian_ipv4(src: Ipv4Addr, dst: Ipv4Addr, of_own: bool) -> bool {
    let (src, dst) = (src.to_bits(), dst.to_bits());
    (src >> 28 == 0xe)
        | (src == u32::MAX)
        | (src >> 24 == 0 && !(src == 0 && dst == u32::MAX))
        | (dst >> 24 == 0)
        | (!of_own & ((src >> 24 == 127) | (dst >> 24 == 127)))
}

/// Walks the options (RFC 791, 3.1), which must be whole; source routes would take a packet around policy.
fn check_ipv4_options(mut options: &[u8]) -> Result<(), DropReason> {
    const LOOSE_SOURCE_ROUTE: u8 = 131;
    const STRICT_SOURCE_ROUTE: u8 = 137;
    loop {
        match *options {
            [] | [0, ..] => return Ok(()),
            [1, ref rest @ ..] => options = rest,
            [LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE, ..] => return Err(DropReason::Unsupported),
            [_] | [_, 0 | 1, ..] => return Err(DropReason::MalformedHeader),
            [_, length, ..] => options = options.get(usize::from(length)..).ok_or(DropReason::MalformedHeader)?,
        }
    }
}

/// Whole TCP and UDP packets without extension headers; what is not one, or not right, is left to [`parse_ipv6`].
#[inline(always)]
fn usual_ipv6(frame: &[u8], l3: usize) -> Option<View<Ipv6Addr>> {
    let packet = network_layer(frame, frame.len(), l3).ok()?;
    let header = packet.first_chunk::<40>()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let total_bytes = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
    let protocol = Protocol(header[6]);
    let ports = usual_ports(packet.get(40..total_bytes)?, protocol)?;
    let view = ipv6_view(header, l3, 40, total_bytes, ports, protocol, Kind::Flow);
    (!is_martian_ipv6(view.key.src, view.key.dst, Kind::Flow, false)).then_some(view)
}

/// Any IPv6 packet.
#[inline(never)]
fn parse_ipv6(start: &[u8], frame_bytes: usize, l3: usize, of_own: bool) -> Result<View<Ipv6Addr>, DropReason> {
    let packet = network_layer(start, frame_bytes, l3)?;
    let header = packet.first_chunk::<40>().ok_or(DropReason::Truncated)?;
    if header[0] >> 4 != 6 {
        return Err(DropReason::MalformedHeader);
    }
    let total_bytes = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
    let packet = start_of(packet, total_bytes, frame_bytes - l3)?;
    let chain = extension_headers(packet, header[6])?;
    let l4 = &packet[chain.l4..];
    let l4_bytes = total_bytes - chain.l4;
    let (ports, kind) = match chain.fragment {
        None => upper_layer::<Ipv6Addr>(l4, l4_bytes, chain.protocol, DropReason::MalformedHeader)?,
        Some(FragmentHeader { id, offset, more, data }) => {
            fragment_kind::<Ipv6Addr>(total_bytes - data, l4, l4_bytes, chain.protocol, id, offset, more)?
        }
    };
    let view = ipv6_view(header, l3, chain.l4, total_bytes, ports, chain.protocol, kind);
    if is_martian_ipv6(view.key.src, view.key.dst, kind, of_own) {
        return Err(DropReason::MartianAddress);
    }
    Ok(view)
}

#[inline(always)]
fn ipv6_view(
    header: &[u8; 40],
    l3: usize,
    l4: usize,
    total_bytes: usize,
    ports: Ports,
    protocol: Protocol,
    kind: Kind,
) -> View<Ipv6Addr> {
    View {
        key: FlowKey { src: Ipv6Addr::read(&header[8..24]), dst: Ipv6Addr::read(&header[24..40]), ports, protocol },
        l3: l3 as u16,
        l4: (l3 + l4) as u16,
        end: (l3 + total_bytes) as u16,
        ttl: header[7],
        tos: header[0] << 4 | header[1] >> 4,
        dont_fragment: true,
        kind,
    }
}

/// RFC 4291, 2.5.2, 2.5.3, 2.7: groups as source, loopback (unless `of_own`) and unspecified on either side, groups of reserved or
/// interface-local scope; and IPv4-mapped addresses, which stand for IPv4 inside a host and never on the wire.
/// Duplicate address detection and MLD speak from the unspecified address.
#[inline(always)]
pub(crate) fn is_martian_ipv6(src: Ipv6Addr, dst: Ipv6Addr, kind: Kind, of_own: bool) -> bool {
    let (src, dst) = (src.to_bits(), dst.to_bits());
    let mapped = 0xffff;
    (src >> 120 == 0xff)
        | (src == 0 && kind != Kind::Control)
        | (dst == 0)
        | (!of_own & ((src == 1) | (dst == 1)))
        | (src >> 32 == mapped)
        | (dst >> 32 == mapped)
        | (dst >> 120 == 0xff && (dst >> 112) & 0xf <= 1)
}

/// Where an IPv6 packet's chain of extension headers ends.
struct Chain {
    protocol: Protocol,
    l4: usize,
    fragment: Option<FragmentHeader>,
}

/// An IPv6 fragment header (RFC 8200, 4.5), with the offset of what follows it in the packet.
struct FragmentHeader {
    id: u32,
    offset: u16,
    more: bool,
    data: usize,
}

/// More extension headers than any honest packet has; bounds the walk.
const MAX_EXTENSION_HEADERS: usize = 8;

/// Walks the extension headers of `packet`, which begins with its IPv6 header.
///
/// AH and ESP end the chain, as they do in IPv4: what they carry is theirs. A fragment header that says "all of it"
/// (RFC 6946) makes no fragment.
#[inline]
fn extension_headers(packet: &[u8], first: u8) -> Result<Chain, DropReason> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let (mut next, mut l4, mut fragment) = (first, 40, None);
    for walked in 0..=MAX_EXTENSION_HEADERS {
        if !matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            return Ok(Chain { protocol: Protocol(next), l4, fragment });
        }
        // RFC 7112: a first fragment holds the whole chain.
        let short = if fragment.is_some() { DropReason::FragmentTiny } else { DropReason::MalformedHeader };
        let header: &[u8; 8] = packet.get(l4..).and_then(<[u8]>::first_chunk).ok_or(short)?;
        let mut bytes = 8 + usize::from(header[1]) * 8;
        match next {
            HOP_BY_HOP if walked != 0 => return Err(DropReason::MalformedHeader),
            ROUTING if header[3] != 0 => return Err(DropReason::Unsupported),
            FRAGMENT => {
                bytes = 8;
                let place = u16::from_be_bytes([header[2], header[3]]);
                let (offset, more) = (place & 0xfff8, place & 1 != 0);
                if fragment.is_some() {
                    return Err(DropReason::MalformedHeader);
                }
                if offset != 0 || more {
                    let id = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                    fragment = Some(FragmentHeader { id, offset, more, data: l4 + 8 });
                }
                if offset != 0 {
                    return Ok(Chain { protocol: Protocol(header[0]), l4: l4 + 8, fragment });
                }
            }
            _ => {}
        }
        l4 += bytes;
        if l4 > packet.len() {
            return Err(short);
        }
        next = header[0];
    }
    Err(DropReason::MalformedHeader)
}

/// Ports and kind of a fragment: it carries `data_bytes` of the packet's fragmentable part; `l4`, of `l4_bytes` bytes, is
/// (for the first one) what of it follows further extension headers.
#[cold]
fn fragment_kind<A: Address>(
    data_bytes: usize,
    l4: &[u8],
    l4_bytes: usize,
    protocol: Protocol,
    id: u32,
    offset: u16,
    more: bool,
) -> Result<(Ports, Kind), DropReason> {
    let bytes = data_bytes as u16;
    // RFC 8200, 4.5: all but the last carry a multiple of 8 bytes; no packet is larger than 65535 bytes.
    if bytes == 0 || (more && !bytes.is_multiple_of(8)) || usize::from(offset) + data_bytes > usize::from(u16::MAX) {
        return Err(DropReason::FragmentMalformed);
    }
    if offset == 0 {
        return match upper_layer::<A>(l4, l4_bytes, protocol, DropReason::FragmentTiny)? {
            (ports, Kind::Flow) => Ok((ports, Kind::FirstFragment { id, bytes })),
            // RFC 6980 for ND; an ICMP error fits every link.
            _ => Err(DropReason::FragmentMalformed),
        };
    }
    // RFC 1858, 4.2: it could overwrite the flags that the first one was judged by.
    if protocol == Protocol::TCP && offset == 8 {
        return Err(DropReason::FragmentTiny);
    }
    Ok((Ports::default(), Kind::LaterFragment { id, offset, bytes, more }))
}

/// Ports of a whole and sane TCP or UDP packet.
#[inline(always)]
fn usual_ports(l4: &[u8], protocol: Protocol) -> Option<Ports> {
    match protocol {
        Protocol::TCP => tcp_ports(l4, DropReason::MalformedHeader).ok(),
        Protocol::UDP => udp_ports(l4, l4.len(), DropReason::MalformedHeader).ok(),
        _ => None,
    }
}

/// Ports and kind by the layer-4 header, which must be whole: else `short` is the reason (`FragmentTiny` in a first fragment,
/// whose payload may also be shorter than the header says). `l4` has the start of `l4_bytes` bytes.
fn upper_layer<A: Address>(
    l4: &[u8],
    l4_bytes: usize,
    protocol: Protocol,
    short: DropReason,
) -> Result<(Ports, Kind), DropReason> {
    match protocol {
        Protocol::TCP => Ok((tcp_ports(l4, short)?, Kind::Flow)),
        Protocol::UDP => Ok((udp_ports(l4, l4_bytes, short)?, Kind::Flow)),
        Protocol::SCTP => Ok((first_ports(l4.first_chunk::<12>().ok_or(short)?), Kind::Flow)),
        Protocol::ICMP | Protocol::ICMPV6 if protocol != A::ICMP => Err(DropReason::Invalid),
        Protocol::ICMP | Protocol::ICMPV6 => Ok(icmp_kind::<A>(l4.first_chunk::<ICMP_HEADER_BYTES>().ok_or(short)?)),
        IGMP if A::WORDS == 1 => Ok((Ports::default(), Kind::Control)),
        _ => Ok((Ports::default(), Kind::Flow)),
    }
}

#[inline(always)]
fn tcp_ports(l4: &[u8], short: DropReason) -> Result<Ports, DropReason> {
    let header = l4.first_chunk::<20>().ok_or(short)?;
    let header_bytes = usize::from(header[12] >> 4) * 4;
    if header_bytes < 20 {
        return Err(DropReason::MalformedHeader);
    }
    if header_bytes > l4.len() {
        return Err(short);
    }
    if !tcp_flags_possible(header[13]) {
        return Err(DropReason::Invalid);
    }
    Ok(first_ports(header))
}

#[inline(always)]
fn udp_ports(l4: &[u8], l4_bytes: usize, short: DropReason) -> Result<Ports, DropReason> {
    let header = l4.first_chunk::<8>().ok_or(short)?;
    let bytes = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if bytes < 8 || (bytes > l4_bytes && short != DropReason::FragmentTiny) {
        return Err(DropReason::MalformedHeader);
    }
    Ok(first_ports(header))
}

#[inline(always)]
fn first_ports<const N: usize>(header: &[u8; N]) -> Ports {
    Ports::from_wire([header[0], header[1], header[2], header[3]])
}

/// The combinations that RFC 9293 lets a TCP send; PSH, ECE and CWR may go with any of them.
///
/// SYN and RST carry no FIN, SYN and RST exclude each other, and every segment but a SYN or a RST has ACK.
#[inline]
const fn tcp_flags_possible(flags: u8) -> bool {
    const FIN: u8 = TcpFields::FIN;
    const SYN: u8 = TcpFields::SYN;
    const RST: u8 = TcpFields::RST;
    const ACK: u8 = TcpFields::ACK;
    const URG: u8 = TcpFields::URG;
    const POSSIBLE: u64 = 1 << SYN
        | 1 << (SYN | URG)
        | 1 << (SYN | ACK)
        | 1 << RST
        | 1 << (RST | ACK)
        | 1 << ACK
        | 1 << (ACK | URG)
        | 1 << (FIN | ACK)
        | 1 << (FIN | ACK | URG);
    POSSIBLE >> (flags & (FIN | SYN | RST | ACK | URG)) & 1 != 0
}

#[inline]
fn icmp_kind<A: Address>(header: &[u8; ICMP_HEADER_BYTES]) -> (Ports, Kind) {
    let icmp_type = header[0];
    let kind = if A::WORDS == 1 {
        match icmp_type {
            3 | 4 | 5 | 11 | 12 => Kind::IcmpError,
            9 | 10 => Kind::Control,
            _ => Kind::Flow,
        }
    } else {
        match icmp_type {
            1..=4 => Kind::IcmpError,
            130..=137 | 141..=143 | 148 | 149 | 151..=153 => Kind::Control,
            _ => Kind::Flow,
        }
    };
    (icmp_ports::<A>(header), kind)
}

/// What stands for ports in an ICMP message's key.
#[inline]
fn icmp_ports<A: Address>(header: &[u8; ICMP_HEADER_BYTES]) -> Ports {
    Ports::of_icmp(A::ICMP, header[0], header[1], u16::from_be_bytes([header[4], header[5]]))
}

fn parse_arp(frame: &[u8], l3: usize) -> Result<Arp, DropReason> {
    let packet: &[u8; Arp::BYTES] = frame.get(l3..).and_then(<[u8]>::first_chunk).ok_or(DropReason::Truncated)?;
    if packet[..6] != Arp::PREAMBLE {
        return Err(DropReason::MalformedHeader);
    }
    let mac = |at: usize| Mac(std::array::from_fn(|i| packet[at + i]));
    Ok(Arp {
        operation: u16::from_be_bytes([packet[6], packet[7]]),
        sender_mac: mac(8),
        sender_ip: Ipv4Addr::read(&packet[14..18]),
        target_mac: mac(18),
        target_ip: Ipv4Addr::read(&packet[24..28]),
    })
}

/// The packet inside an IPIP packet, as a view into the same frame, of which `start` has what was parsed.
///
/// # Errors
/// `TunnelNested` where another tunnel packet or nothing valid is inside; `Unsupported` where `outer` is a fragment (weir and Linux set
/// DF on what they put into a tunnel); `FragmentMalformed`, `FragmentTiny`, `Invalid` or `Unsupported` where the inner header is sane but
/// [`parse`] would drop the packet for one of these.
pub fn inner_of_ipip(start: &[u8], outer: &View<Ipv4Addr>) -> Result<View<Ipv4Addr>, DropReason> {
    if outer.is_fragment() {
        return Err(DropReason::Unsupported);
    }
    let end = usize::from(outer.end);
    match parse_ipv4(&start[..end.min(start.len())], end, usize::from(outer.l4), false) {
        Ok(inner) if !matches!(inner.key.protocol, Protocol::IPIP | Protocol::IPV6) => Ok(inner),
        // Found behind a sane header: the inner packet's own fault, not the tunnel's.
        Err(
            reason @ (DropReason::FragmentMalformed
            | DropReason::FragmentTiny
            | DropReason::Invalid
            | DropReason::Unsupported),
        ) => Err(reason),
        _ => Err(DropReason::TunnelNested),
    }
}

/// The start of a packet that an ICMP error quotes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Embedded<A: Address> {
    /// The quoted packet's key, as [`View::key`].
    pub key: FlowKey<A>,
    /// Offset in the quote of the quoted packet's layer-4 header.
    pub l4: u16,
    /// Bytes of the quote.
    pub quoted_bytes: u16,
    /// Bytes of the quoted packet's layer-4 header and payload before it was cut; 0 where it was a fragment.
    pub l4_bytes: u16,
    /// The sequence number of a quoted TCP segment.
    pub tcp_seq: Option<u32>,
}

/// Reads what an ICMP error quotes ([`View::quote`]): an IP packet, usually cut.
///
/// Eight bytes of layer 4 are enough where it has ports or an identifier (RFC 792). Nothing about the quoted packet is
/// verified but what its key needs. `None` where no key can be made, and for quoted ICMP errors and later fragments.
pub fn parse_embedded<A: Address>(quote: &[u8]) -> Option<Embedded<A>> {
    let header = quote.get(..A::HEADER_BYTES)?;
    let length_field = |at: usize| usize::from(u16::from_be_bytes([header[at], header[at + 1]]));
    let (protocol, l4, whole_bytes, is_fragment) = if A::WORDS == 1 {
        let l4 = usize::from(header[0] & 0xf) * 4;
        let fragment = length_field(6);
        if header[0] >> 4 != 4 || l4 < 20 || fragment & 0x1fff != 0 {
            return None;
        }
        (Protocol(header[9]), l4, length_field(2), fragment & 0x2000 != 0)
    } else {
        if header[0] >> 4 != 6 {
            return None;
        }
        let chain = extension_headers(quote, header[6]).ok()?;
        if chain.fragment.as_ref().is_some_and(|fragment| fragment.offset != 0) {
            return None;
        }
        (chain.protocol, chain.l4, 40 + length_field(4), chain.fragment.is_some())
    };
    let l4_header = quote.get(l4..)?;
    let ports = match protocol {
        Protocol::TCP | Protocol::UDP | Protocol::SCTP => first_ports(l4_header.first_chunk::<8>()?),
        Protocol::ICMP | Protocol::ICMPV6 if protocol != A::ICMP => return None,
        Protocol::ICMP | Protocol::ICMPV6 => {
            let (ports, kind) = icmp_kind::<A>(l4_header.first_chunk()?);
            if kind != Kind::Flow {
                return None;
            }
            ports
        }
        _ => Ports::default(),
    };
    let addresses = A::HEADER_BYTES - 2 * A::BYTES;
    let key =
        FlowKey { src: A::read(&header[addresses..]), dst: A::read(&header[addresses + A::BYTES..]), ports, protocol };
    let l4_bytes = if is_fragment { 0 } else { whole_bytes.saturating_sub(l4) };
    let tcp_seq = match l4_header.first_chunk::<8>() {
        Some([_, _, _, _, a, b, c, d]) if protocol == Protocol::TCP => Some(u32::from_be_bytes([*a, *b, *c, *d])),
        _ => None,
    };
    Some(Embedded {
        tcp_seq,
        key,
        l4: u16::try_from(l4).ok()?,
        quoted_bytes: u16::try_from(quote.len()).ok()?,
        l4_bytes: u16::try_from(l4_bytes).unwrap_or(0),
    })
}

/// Whether the layer-4 checksum is right, by the addresses that now stand in the frame.
///
/// True where there is none to judge: other protocols, fragments (it covers the whole packet), UDP without one.
///
/// # Panics
/// Where `frame` is not the whole one.
pub fn l4_checksum_ok<A: Address>(frame: &[u8], view: &View<A>) -> bool {
    if view.is_fragment() {
        return true;
    }
    let addresses = usize::from(view.l3) + A::HEADER_BYTES - 2 * A::BYTES;
    let (src, dst) = (A::read(&frame[addresses..]), A::read(&frame[addresses + A::BYTES..]));
    let l4 = &frame[usize::from(view.l4)..usize::from(view.end)];
    let with_pseudo_header = |covered: &[u8], length: usize| {
        pseudo_header(src, dst, view.key.protocol, length as u32).plus(Sum::ZERO.bytes(covered)).is_valid()
    };
    match view.key.protocol {
        Protocol::TCP => with_pseudo_header(l4, l4.len()),
        Protocol::UDP => {
            let Some(header) = l4.first_chunk::<8>() else { return false };
            let bytes = usize::from(u16::from_be_bytes([header[4], header[5]]));
            // None. Over IPv6 that is for the ends to allow: who is in between must forward it (RFC 6936, 5, requirement 8).
            if header[6..8] == [0, 0] {
                return true;
            }
            l4.get(..bytes).is_some_and(|datagram| with_pseudo_header(datagram, bytes))
        }
        // RFC 3828, 3.1: coverage 0 is all of it, else at least the header; the checksum itself is never left out.
        UDP_LITE => {
            let Some(header) = l4.first_chunk::<8>() else { return false };
            let covered = match usize::from(u16::from_be_bytes([header[4], header[5]])) {
                0 => Some(l4),
                coverage @ 8.. => l4.get(..coverage),
                _ => None,
            };
            header[6..8] != [0, 0] && covered.is_some_and(|covered| with_pseudo_header(covered, l4.len()))
        }
        Protocol::ICMP if A::WORDS == 1 => Sum::ZERO.bytes(l4).is_valid(),
        Protocol::ICMPV6 if A::WORDS != 1 => with_pseudo_header(l4, l4.len()),
        Protocol::SCTP => sctp_checksum(l4).is_some_and(|checksum| l4[8..12] == checksum),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Makes an IPv4 header's checksum right, if the header lies within the frame.
    fn fix_checksum(frame: &mut [u8]) {
        let header_bytes = usize::from(frame[14] & 0xf) * 4;
        if let Some(header) = frame.get_mut(14..14 + header_bytes.max(20)) {
            header[10..12].fill(0);
            let checksum = Sum::ZERO.bytes(header).finish();
            header[10..12].copy_from_slice(&checksum);
        }
    }

    const IPV4: [u8; 20] = [0x45, 0, 0, 48, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    const IPV6: [u8; 40] = [
        0x60, 0, 0, 0, 0, 28, 6, 64, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 2,
    ];
    const L4: [[u8; 28]; 2] = [
        [1, 2, 3, 4, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 1, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7],
        [1, 2, 3, 4, 0, 28, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7],
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// The short way accepts exactly the whole, plain TCP and UDP packets that the long way accepts, with equal views.
        #[test]
        fn the_usual_way_is_the_long_way(
            udp in any::<bool>(),
            changes in prop::collection::vec((0..68_usize, any::<u8>()), 0..3),
            keep_checksum in prop::bool::weighted(0.1),
            bytes in 14..100_usize,
        ) {
            let l4 = L4[usize::from(udp)];
            let protocol = if udp { Protocol::UDP } else { Protocol::TCP };
            let frame = |header: &[u8], next_at: usize| {
                let mut frame = [&[0; 14], header, &l4].concat();
                frame[14 + next_at] = protocol.0;
                let last = frame.len() - 14;
                for (at, byte) in &changes {
                    frame[14 + at % last] = *byte;
                }
                if header.len() == 20 && !keep_checksum {
                    fix_checksum(&mut frame);
                }
                frame.resize(bytes.max(frame.len() - 3), 0);
                frame
            };
            let is_usual = |kind, key_protocol| {
                kind == Kind::Flow && matches!(key_protocol, Protocol::TCP | Protocol::UDP)
            };
            let four = frame(&IPV4, 9);
            let long = parse_ipv4(&four, four.len(), 14, false).ok().filter(|view| is_usual(view.kind, view.key.protocol) && view.l4 == 34);
            prop_assert_eq!(usual_ipv4(&four, 14), long);
            let six = frame(&IPV6, 6);
            let long = parse_ipv6(&six, six.len(), 14, false).ok().filter(|view| is_usual(view.kind, view.key.protocol) && view.l4 == 54);
            prop_assert_eq!(usual_ipv6(&six, 14), long);
        }
    }
}
