//! A look at the headers that nearly all packets have: whole TCP and UDP, without IP options or extension headers, perhaps in a tunnel.
//!
//! A [`Glance`] holds what forwarding a packet of a known connection asks for, and no offsets, since they are constants. What is glanced
//! at is what [`parse`](crate::parse::parse) takes for such a packet, with two exceptions, both for who looks the key up in a table:
//!
//! - *Addresses* are not checked. No connection has a key whose addresses may not be on the wire ([`may_be_forwarded`]).
//! - *TCP* segments with SYN, FIN or RST, and frames too short for the largest fixed headers ([`IPV4_BYTES`] and others), are none: the
//!   parser is for them, as it is for all else.
//!
//! A test holds both beside each other.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::{
    Address, FlowKey, Ports, Protocol,
    checksum::Sum,
    parse::{ETHERNET_BYTES, TcpFields, is_martian_ipv4, is_martian_ipv6},
};

/// Bytes that a frame must have for [`glance_ipv4`]: Ethernet, IPv4 and TCP headers.
pub const IPV4_BYTES: usize = ETHERNET_BYTES + 20 + 20;
/// Bytes that a frame must have for [`glance_ipv6`].
pub const IPV6_BYTES: usize = ETHERNET_BYTES + 40 + 20;
/// Bytes that a frame must have for [`glance_ipip`].
pub const IPIP_BYTES: usize = ETHERNET_BYTES + 20 + 20 + 20;

/// What was seen of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Glance<A: Address> {
    /// Protocol (TCP or UDP), addresses and ports.
    pub key: FlowKey<A>,
    /// Bytes of the IP packet, header included.
    pub ip_bytes: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Type of service; 0 for IPv6, which goes into no tunnel.
    pub tos: u8,
}

/// The addresses of a tunnel packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunnelEnds {
    /// Who sent it.
    pub src: Ipv4Addr,
    /// Whom it is for.
    pub dst: Ipv4Addr,
}

impl TunnelEnds {
    /// Those of a packet that goes the other way.
    #[inline]
    pub const fn swapped(self) -> Self {
        Self { src: self.dst, dst: self.src }
    }
}

impl<A: Address> Glance<A> {
    /// The fields and the options of the TCP header of the packet that begins `ip`, which was glanced at.
    ///
    /// # Panics
    /// Where `ip` is shorter than what was looked at.
    #[inline(always)]
    pub fn tcp<'p>(&self, ip: &'p [u8]) -> (TcpFields, &'p [u8]) {
        let l4 = &ip[A::HEADER_BYTES..];
        let header = l4.first_chunk::<20>().expect("a TCP header");
        let header_bytes = usize::from(header[12] >> 4) * 4;
        let fields = TcpFields {
            flags: header[13],
            seq: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            ack: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
            window: u16::from_be_bytes([header[14], header[15]]),
            payload_bytes: u32::from(self.ip_bytes) - (A::HEADER_BYTES + header_bytes) as u32,
        };
        (fields, if header_bytes == 20 { &[] } else { &l4[20..header_bytes] })
    }
}

/// Looks at an Ethernet frame of `frame_bytes` bytes with an IPv4 packet, of which `start` has the first.
#[inline(always)]
pub fn glance_ipv4(start: &[u8], frame_bytes: usize) -> Option<Glance<Ipv4Addr>> {
    let headers = start.first_chunk::<IPV4_BYTES>()?;
    plain_ipv4::<ETHERNET_BYTES, IPV4_BYTES>(headers, start.len(), frame_bytes)
}

/// Looks at an IPIP packet (RFC 2003), in which another IPv4 packet is whose type of service stays as it is when the outer header is taken
/// off.
#[inline(always)]
pub fn glance_ipip(start: &[u8], frame_bytes: usize) -> Option<(Glance<Ipv4Addr>, TunnelEnds)> {
    const INNER: usize = ETHERNET_BYTES + 20;
    let headers = start.first_chunk::<IPIP_BYTES>()?;
    let outer: &[u8; 20] = headers[ETHERNET_BYTES..].first_chunk()?;
    let end = ETHERNET_BYTES + usize::from(u16::from_be_bytes([outer[2], outer[3]]));
    if !is_plain_ipv4(outer) || outer[9] != Protocol::IPIP.0 || end > frame_bytes {
        return None;
    }
    let inner = plain_ipv4::<INNER, IPIP_BYTES>(headers, start.len(), end)?;
    // RFC 6040, 4.2: where the outer header says nothing of congestion that the inner one does not, the inner one stays.
    let outer_ecn = outer[1] & 0b11;
    if outer_ecn != 0 && outer_ecn != inner.tos & 0b11 {
        return None;
    }
    Some((inner, TunnelEnds { src: Ipv4Addr::read(&outer[12..16]), dst: Ipv4Addr::read(&outer[16..20]) }))
}

/// Looks at an Ethernet frame of `frame_bytes` bytes with an IPv6 packet, of which `start` has the first.
#[inline(always)]
pub fn glance_ipv6(start: &[u8], frame_bytes: usize) -> Option<Glance<Ipv6Addr>> {
    let headers = start.first_chunk::<IPV6_BYTES>()?;
    let header: &[u8; 40] = headers[ETHERNET_BYTES..].first_chunk()?;
    let l4: &[u8; 20] = headers[ETHERNET_BYTES + 40..].first_chunk()?;
    let l4_bytes = u16::from_be_bytes([header[4], header[5]]);
    let there = start.len() - (ETHERNET_BYTES + 40);
    if header[0] >> 4 != 6 || ETHERNET_BYTES + 40 + usize::from(l4_bytes) > frame_bytes {
        return None;
    }
    let protocol = Protocol(header[6]);
    if !is_sane(protocol, l4, i32::from(l4_bytes), there) {
        return None;
    }
    let key = FlowKey {
        src: Ipv6Addr::read(&header[8..24]),
        dst: Ipv6Addr::read(&header[24..40]),
        ports: ports(l4),
        protocol,
    };
    // A frame is no longer than 65,535 bytes, so the sum is none either.
    Some(Glance { key, ip_bytes: 40_u16.wrapping_add(l4_bytes), ttl: header[7], tos: 0 })
}

/// The flow of what looks like a TCP segment that opens a connection, in an IPv4 packet that may lie in another. Nearly nothing of the packet
/// is looked at: good for reading ahead only.
pub fn guess_opening_ipv4(start: &[u8]) -> Option<FlowKey<Ipv4Addr>> {
    if start.get(12..ETHERNET_BYTES)? != Ipv4Addr::ETHERTYPE.to_be_bytes() {
        return None;
    }
    let outer: &[u8; 20] = start.get(ETHERNET_BYTES..)?.first_chunk()?;
    let own = if outer[9] == Protocol::IPIP.0 { ETHERNET_BYTES + 20 } else { ETHERNET_BYTES };
    let header: &[u8; 20] = start.get(own..)?.first_chunk()?;
    let l4: &[u8; 20] = start.get(own + 20..)?.first_chunk()?;
    let is_one = header[0] == 0x45 && header[9] == Protocol::TCP.0 && is_opening(l4);
    is_one.then(|| FlowKey {
        src: Ipv4Addr::read(&header[12..16]),
        dst: Ipv4Addr::read(&header[16..20]),
        ports: ports(l4),
        protocol: Protocol::TCP,
    })
}

/// The same of an IPv6 packet.
pub fn guess_opening_ipv6(start: &[u8]) -> Option<FlowKey<Ipv6Addr>> {
    if start.get(12..ETHERNET_BYTES)? != Ipv6Addr::ETHERTYPE.to_be_bytes() {
        return None;
    }
    let header: &[u8; 40] = start.get(ETHERNET_BYTES..)?.first_chunk()?;
    let l4: &[u8; 20] = start.get(ETHERNET_BYTES + 40..)?.first_chunk()?;
    (header[6] == Protocol::TCP.0 && is_opening(l4)).then(|| FlowKey {
        src: Ipv6Addr::read(&header[8..24]),
        dst: Ipv6Addr::read(&header[24..40]),
        ports: ports(l4),
        protocol: Protocol::TCP,
    })
}

fn is_opening(tcp: &[u8; 20]) -> bool {
    tcp[13] & (TcpFields::SYN | TcpFields::ACK) == TcpFields::SYN
}

/// Whether an IPv4 header has no options, is no fragment's, and has a right checksum.
#[inline(always)]
fn is_plain_ipv4(header: &[u8; 20]) -> bool {
    header[0] == 0x45 && u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0 && Sum::ZERO.bytes(header).is_valid()
}

/// The IPv4 packet at offset `L3`, which may reach to `limit`; `there` bytes of the frame can be read.
#[inline(always)]
fn plain_ipv4<const L3: usize, const N: usize>(
    headers: &[u8; N],
    there: usize,
    limit: usize,
) -> Option<Glance<Ipv4Addr>> {
    let header: &[u8; 20] = headers[L3..].first_chunk()?;
    let l4: &[u8; 20] = headers[L3 + 20..].first_chunk()?;
    let ip_bytes = u16::from_be_bytes([header[2], header[3]]);
    let protocol = Protocol(header[9]);
    let is_whole = L3 + usize::from(ip_bytes) <= limit;
    if !is_whole || !is_plain_ipv4(header) || !is_sane(protocol, l4, i32::from(ip_bytes) - 20, there - (L3 + 20)) {
        return None;
    }
    let key = FlowKey {
        src: Ipv4Addr::read(&header[12..16]),
        dst: Ipv4Addr::read(&header[16..20]),
        ports: ports(l4),
        protocol,
    };
    Some(Glance { key, ip_bytes, ttl: header[8], tos: header[1] })
}

/// Whether a header is one of UDP, or one of TCP without SYN, FIN or RST, that lies within its packet; TCP's also with all its options
/// within the `there` bytes that can be read.
#[inline(always)]
fn is_sane(protocol: Protocol, l4: &[u8; 20], l4_bytes: i32, there: usize) -> bool {
    const TELLING: u8 = TcpFields::FIN | TcpFields::SYN | TcpFields::RST | TcpFields::ACK;
    match protocol {
        Protocol::TCP => {
            let header_bytes = usize::from(l4[12] >> 4) * 4;
            header_bytes >= 20
                && header_bytes as i32 <= l4_bytes
                && header_bytes <= there
                && l4[13] & TELLING == TcpFields::ACK
        }
        Protocol::UDP => {
            let bytes = i32::from(u16::from_be_bytes([l4[4], l4[5]]));
            bytes >= 8 && bytes <= l4_bytes
        }
        _ => false,
    }
}

#[inline(always)]
fn ports(l4: &[u8; 20]) -> Ports {
    Ports::from_wire([l4[0], l4[1], l4[2], l4[3]])
}

/// Whether a whole packet with these addresses, from whom it may be on the wire, is one that routers forward: [`parse`](crate::parse::parse)
/// does not refuse it for them, and they are neither a group's nor good on one link only.
pub fn may_be_forwarded<A: Address>(src: A, dst: A) -> bool {
    use std::net::IpAddr::{V4, V6};
    let is_martian = match (src.to_ip(), dst.to_ip()) {
        (V4(src), V4(dst)) => is_martian_ipv4(src, dst, false),
        (V6(src), V6(dst)) => is_martian_ipv6(src, dst, crate::parse::Kind::Flow, false),
        _ => true,
    };
    !is_martian && !dst.is_multicast_or_broadcast() && !src.is_bound_to_link() && !dst.is_bound_to_link()
}
