//! Whether a packet may open a connection.

use weir_packet::{Address, FlowKey, Protocol};

use crate::{
    observed::{ACK, FIN, Observed, RST, SYN},
    sctp::Sctp,
};

/// Whether a packet of no connection may open one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Opening {
    /// It may.
    Opens,
    /// A TCP packet in the middle of a connection, which may be picked up where the configuration allows (tcp_loose).
    MidStream,
    /// It belongs to a connection that does not exist, or is no valid packet.
    Never,
}

impl Observed {
    /// Whether a packet with that key and no connection may open one.
    pub fn opening<A: Address>(&self, key: &FlowKey<A>) -> Opening {
        let (icmp_type, _) = key.ports.icmp(key.protocol);
        match key.protocol {
            Protocol::TCP if !self.flags_possible() => Opening::Never,
            Protocol::TCP => match self.tcp_flags & (SYN | RST | FIN | ACK) {
                SYN => Opening::Opens,
                ACK => Opening::MidStream,
                _ => Opening::Never,
            },
            Protocol::SCTP if Sctp::open(&self.sctp).is_none() => Opening::Never,
            // Echo, timestamp, information and address mask requests (RFC 792, RFC 950); node information (RFC 4620).
            Protocol::ICMP if !matches!(icmp_type, 8 | 13 | 15 | 17) => Opening::Never,
            Protocol::ICMPV6 if !matches!(icmp_type, 128 | 139) => Opening::Never,
            _ => Opening::Opens,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use weir_packet::Ports;

    use super::*;
    use crate::observed::PSH;

    fn opening<A: Address>(protocol: Protocol, destination: u16, tcp_flags: u8) -> Opening {
        let key = FlowKey { src: A::unspecified(), dst: A::unspecified(), ports: Ports::new(7, destination), protocol };
        Observed { tcp_flags, ..Observed::default() }.opening(&key)
    }

    #[test]
    fn who_may_open_a_connection() {
        let tcp = |flags| opening::<Ipv4Addr>(Protocol::TCP, 80, flags);
        let rows = [
            (SYN, Opening::Opens),
            (SYN | 0xc0, Opening::Opens),
            (SYN | PSH, Opening::Opens),
            (ACK, Opening::MidStream),
            (ACK | PSH, Opening::MidStream),
            (SYN | ACK, Opening::Never),
            (FIN | ACK, Opening::Never),
            (RST, Opening::Never),
            (RST | ACK, Opening::Never),
            (SYN | FIN, Opening::Never),
            (SYN | RST, Opening::Never),
            (FIN, Opening::Never),
            (0, Opening::Never),
            (0xff, Opening::Never),
        ];
        for (flags, expected) in rows {
            assert_eq!(tcp(flags), expected, "flags {flags:#04x}");
        }
        assert_eq!(opening::<Ipv4Addr>(Protocol::ICMP, 8, 0), Opening::Opens);
        assert_eq!(opening::<Ipv4Addr>(Protocol::ICMP, 0, 0), Opening::Never);
        assert_eq!(opening::<Ipv6Addr>(Protocol::ICMPV6, 128, 0), Opening::Opens);
        assert_eq!(opening::<Ipv6Addr>(Protocol::ICMPV6, 129, 0), Opening::Never);
        assert_eq!(opening::<Ipv6Addr>(Protocol::UDP, 0, 0), Opening::Opens);
        assert_eq!(opening::<Ipv4Addr>(Protocol(47), 0, 0), Opening::Opens);
    }
}
