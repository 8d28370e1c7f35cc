//! Flow keys: what identifies one direction of a connection.

use std::fmt;

use crate::Address;

/// An IP protocol number (IANA "Assigned Internet Protocol Numbers").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP, RFC 792.
    pub const ICMP: Self = Self(1);
    /// IPv4 in IP (RFC 2003).
    pub const IPIP: Self = Self(4);
    /// TCP, RFC 9293.
    pub const TCP: Self = Self(6);
    /// UDP, RFC 768.
    pub const UDP: Self = Self(17);
    /// IPv6 in IP (RFC 2473).
    pub const IPV6: Self = Self(41);
    /// ICMPv6, RFC 4443.
    pub const ICMPV6: Self = Self(58);
    /// SCTP, RFC 9260.
    pub const SCTP: Self = Self(132);

    /// The number of a name as Kubernetes, Calico and weir's traces write it, in any case; or a decimal number.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "icmp" => Self::ICMP,
            "tcp" => Self::TCP,
            "udp" => Self::UDP,
            "icmpv6" | "icmp6" => Self::ICMPV6,
            "sctp" => Self::SCTP,
            "udplite" => Self(136),
            number => Self(number.parse().ok()?),
        })
    }

    /// Whether the protocol has ports in its first four bytes.
    #[inline]
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP)
    }

    /// ICMP or ICMPv6.
    #[inline]
    pub const fn is_icmp(self) -> bool {
        matches!(self, Self::ICMP | Self::ICMPV6)
    }

    /// Whether ICMP messages of that type carry the identifier that tells one's requests, and the replies to them, from another's: echo,
    /// timestamp, information and address mask (RFC 792, RFC 950), ICMPv6's echo (RFC 4443). It stands for their source port. The type may
    /// be given as it stands in a key, with the code.
    #[inline]
    pub const fn has_identifier(self, icmp_type: u16) -> bool {
        match self {
            Self::ICMP => matches!(icmp_type as u8, 0 | 8 | 13..=18),
            Self::ICMPV6 => matches!(icmp_type as u8, 128 | 129),
            _ => false,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ICMP => f.write_str("icmp"),
            Self::TCP => f.write_str("tcp"),
            Self::UDP => f.write_str("udp"),
            Self::ICMPV6 => f.write_str("icmpv6"),
            Self::SCTP => f.write_str("sctp"),
            Self(number) => write!(f, "{number}"),
        }
    }
}

impl fmt::Debug for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Source and destination port, as the four bytes that stand in a TCP, UDP or SCTP header.
///
/// What stands for them in ICMP is made by [`Ports::of_icmp`]; protocols without ports have zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Ports(u32);

impl Ports {
    /// Ports in host order.
    #[inline]
    pub const fn new(source: u16, destination: u16) -> Self {
        let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
        Self(u32::from_ne_bytes([a, b, c, d]))
    }

    /// What stands for the ports of an ICMP message. Requests and replies with an identifier ([`Protocol::has_identifier`]) have it as
    /// source, and as destination their type, with the code (0 as a rule) in the upper byte; others have code and type.
    #[inline]
    pub const fn of_icmp(protocol: Protocol, icmp_type: u8, code: u8, identifier: u16) -> Self {
        if protocol.has_identifier(icmp_type as u16) {
            Self::new(identifier, (code as u16) << 8 | icmp_type as u16)
        } else {
            Self::new(code as u16, icmp_type as u16)
        }
    }

    /// Type and code of the ICMP message of that protocol that these stand for.
    #[inline]
    pub const fn icmp(self, protocol: Protocol) -> (u8, u8) {
        let [code, icmp_type] = self.destination().to_be_bytes();
        (icmp_type, if protocol.has_identifier(self.destination()) { code } else { self.source() as u8 })
    }

    /// From the first four bytes of a TCP, UDP or SCTP header.
    #[inline]
    pub const fn from_wire(bytes: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(bytes))
    }

    /// The four bytes, as one native word (memory order is network order).
    #[inline]
    pub const fn word(self) -> u32 {
        self.0
    }

    /// The inverse of [`Ports::word`].
    #[inline]
    pub const fn from_word(word: u32) -> Self {
        Self(word)
    }

    /// Source port, host order.
    #[inline]
    pub const fn source(self) -> u16 {
        let [a, b, _, _] = self.0.to_ne_bytes();
        u16::from_be_bytes([a, b])
    }

    /// Destination port, host order.
    #[inline]
    pub const fn destination(self) -> u16 {
        let [_, _, c, d] = self.0.to_ne_bytes();
        u16::from_be_bytes([c, d])
    }
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}>{}", self.source(), self.destination())
    }
}

/// Which way a packet of a connection goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Direction {
    /// From the one who opened the connection.
    Original = 0,
    /// Back to the one who opened it.
    Reply = 1,
}

impl Direction {
    /// The other direction.
    #[inline]
    pub const fn flip(self) -> Self {
        match self {
            Self::Original => Self::Reply,
            Self::Reply => Self::Original,
        }
    }
}

/// The key of one direction of a connection: protocol, addresses, ports.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Ports, or what stands for them.
    pub ports: Ports,
    /// IP protocol.
    pub protocol: Protocol,
}

impl<A: Address> FlowKey<A> {
    /// The key of a packet that answers this one: ends swapped; an ICMP request becomes its reply and back.
    ///
    /// Its own inverse: `key.invert().invert() == key`.
    #[inline]
    pub fn invert(self) -> Self {
        let ports = if self.protocol.is_icmp() {
            Ports::new(self.ports.source(), invert_icmp_type(self.ports.destination()))
        } else {
            Ports::new(self.ports.destination(), self.ports.source())
        };
        Self { src: self.dst, dst: self.src, ports, protocol: self.protocol }
    }
}

/// Requests and their replies swapped, others as they are: echo, timestamp, information, address mask; ICMPv6's echo and node information
/// (RFC 4620). The code stays.
const fn invert_icmp_type(type_and_code: u16) -> u16 {
    let [code, icmp_type] = type_and_code.to_be_bytes();
    let inverse = match icmp_type {
        8 => 0,
        0 => 8,
        13 => 14,
        14 => 13,
        15 => 16,
        16 => 15,
        17 => 18,
        18 => 17,
        128 => 129,
        129 => 128,
        139 => 140,
        140 => 139,
        other => other,
    };
    u16::from_be_bytes([code, inverse])
}

impl<A: Address> fmt::Debug for FlowKey<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}:{} > {}:{}", self.protocol, self.src, self.ports.source(), self.dst, self.ports.destination())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn key(protocol: Protocol, source: u16, destination: u16) -> FlowKey<Ipv4Addr> {
        FlowKey {
            src: [10, 0, 0, 1].into(),
            dst: [10, 0, 0, 2].into(),
            ports: Ports::new(source, destination),
            protocol,
        }
    }

    #[test]
    fn icmp_keys_have_type_and_code() {
        for (protocol, icmp_type, code, identifier) in [
            (Protocol::ICMP, 8, 0, 77),
            (Protocol::ICMP, 0, 5, 77),
            (Protocol::ICMP, 3, 4, 0),
            (Protocol::ICMPV6, 128, 255, 1),
        ] {
            let ports = Ports::of_icmp(protocol, icmp_type, code, identifier);
            assert_eq!(ports.icmp(protocol), (icmp_type, code));
            if protocol.has_identifier(u16::from(icmp_type)) {
                assert_eq!(ports.source(), identifier);
            }
        }
        let any = Ipv4Addr::UNSPECIFIED;
        let key = |icmp_type, code| {
            let ports = Ports::of_icmp(Protocol::ICMP, icmp_type, code, 9);
            FlowKey { src: any, dst: any, ports, protocol: Protocol::ICMP }
        };
        assert_eq!(key(8, 3).invert(), key(0, 3));
        assert_eq!(key(8, 3).invert().invert(), key(8, 3));
        assert_ne!(key(8, 3), key(8, 0));
    }

    #[test]
    fn ports_keep_wire_order() {
        let ports = Ports::from_wire([0x12, 0x34, 0, 80]);
        assert_eq!((ports.source(), ports.destination()), (0x1234, 80));
        assert_eq!(ports, Ports::new(0x1234, 80));
    }

    #[test]
    fn inversion_swaps_ends_and_is_its_own_inverse() {
        let tcp = key(Protocol::TCP, 40000, 80);
        assert_eq!(tcp.invert().ports, Ports::new(80, 40000));
        assert_eq!(tcp.invert().src, tcp.dst);
        assert_eq!(tcp.invert().invert(), tcp);
        let ping = key(Protocol::ICMP, 77, 8);
        assert_eq!(ping.invert().ports, Ports::new(77, 0));
        assert_eq!(ping.invert().invert(), ping);
        for (protocol, request, reply) in [
            (Protocol::ICMP, 13, 14),
            (Protocol::ICMP, 15, 16),
            (Protocol::ICMP, 17, 18),
            (Protocol::ICMPV6, 128, 129),
            (Protocol::ICMPV6, 139, 140),
        ] {
            let [request, reply] = [request, reply].map(|icmp_type| key(protocol, 77, icmp_type));
            assert_eq!((request.invert().ports, reply.invert().ports), (reply.ports, request.ports));
        }
    }

    #[test]
    fn protocol_names() {
        assert_eq!(Protocol::from_name("TCP"), Some(Protocol::TCP));
        assert_eq!(Protocol::from_name("47"), Some(Protocol(47)));
        assert_eq!(Protocol::from_name("nonsense"), None);
        assert_eq!(Protocol::from_name("256"), None);
    }
}
