//! What tracking needs to know of a packet, and what it says about it.

use weir_packet::options::TcpOptions;

use crate::sctp_packet::SctpPacket;

/// FIN, RFC 9293 section 3.1.
pub(crate) const FIN: u8 = 0x01;
/// SYN.
pub(crate) const SYN: u8 = 0x02;
/// RST.
pub(crate) const RST: u8 = 0x04;
/// PSH.
pub(crate) const PSH: u8 = 0x08;
/// ACK.
pub(crate) const ACK: u8 = 0x10;
/// URG.
const URG: u8 = 0x20;

/// The fields of a packet that a connection's state depends on. The default for what is neither TCP nor SCTP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    /// Byte 13 of the TCP header: CWR, ECE, URG, ACK, PSH, RST, SYN, FIN from the highest bit.
    pub tcp_flags: u8,
    /// Sequence number.
    pub tcp_seq: u32,
    /// Acknowledgment number.
    pub tcp_ack: u32,
    /// Window as in the header, not scaled.
    pub tcp_window: u16,
    /// Scale, SACK permitted, SACK.
    pub tcp_options: TcpOptions,
    /// Bytes of TCP payload.
    pub payload_bytes: u32,
    /// An SCTP packet's chunks.
    pub sctp: SctpPacket,
}

impl Observed {
    /// Of what is neither TCP nor SCTP: nothing.
    pub const NOTHING: Self = Self {
        tcp_flags: 0,
        tcp_seq: 0,
        tcp_ack: 0,
        tcp_window: 0,
        tcp_options: TcpOptions { window_scale: None, sack_permitted: false, sack: None },
        payload_bytes: 0,
        sctp: SctpPacket::NOTHING,
    };
}

/// What tracking says of a packet of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tracked {
    /// It belongs to the connection.
    Accept,
    /// It opens a new connection with the keys of one that is over: remove that one, and decide anew.
    NewFlow,
    /// It is none that this connection could have, and changes nothing: drop it as [`weir_packet::DropReason::Invalid`].
    Invalid,
}

impl Observed {
    /// Whether a TCP stack could have sent these flags; ECE, CWR and PSH aside.
    #[inline]
    pub(crate) const fn flags_possible(&self) -> bool {
        match self.tcp_flags & (FIN | SYN | RST | ACK | URG) & !PSH {
            flags if flags == SYN || flags == SYN | URG || flags == SYN | ACK => true,
            flags if flags == RST || flags == RST | ACK => true,
            flags if flags == FIN | ACK || flags == FIN | ACK | URG => true,
            flags => flags == ACK || flags == ACK | URG,
        }
    }

    /// The sequence number after the segment: SYN and FIN count one each (RFC 9293 section 3.4).
    #[inline]
    pub(crate) const fn tcp_end(&self) -> u32 {
        let counted = (self.tcp_flags & SYN != 0) as u32 + (self.tcp_flags & FIN != 0) as u32;
        self.tcp_seq.wrapping_add(self.payload_bytes).wrapping_add(counted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_ends_after_its_payload_syn_and_fin() {
        let end = |tcp_flags, payload_bytes| {
            Observed { tcp_flags, tcp_seq: u32::MAX, payload_bytes, ..Observed::default() }.tcp_end()
        };
        assert_eq!((end(SYN, 0), end(ACK, 0), end(ACK, 10), end(FIN | ACK, 10)), (0, u32::MAX, 9, 10));
    }
}
