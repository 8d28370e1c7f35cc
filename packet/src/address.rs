//! IPv4 and IPv6 addresses behind one trait, so that every stage after parsing is written once.

use std::{
    fmt::{Debug, Display},
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An IP address of one family. Implemented by [`Ipv4Addr`] and [`Ipv6Addr`] only.
pub trait Address: Copy + Eq + Ord + Hash + Debug + Display + Send + Sync + 'static {
    /// Length in 32-bit words: 1 or 4.
    const WORDS: usize;
    /// Length in bytes: 4 or 16.
    const BYTES: usize;
    /// Length in bits: 32 or 128.
    const BITS: u8;
    /// Length of the fixed IP header in bytes: 20 or 40.
    const HEADER_BYTES: usize;
    /// EtherType of the family.
    const ETHERTYPE: u16;
    /// ICMP (1) or ICMPv6 (58).
    const ICMP: crate::Protocol;
    /// The address as words in network byte order: `[u32; WORDS]`.
    type Words: Copy + Eq + Debug + AsRef<[u32]> + AsMut<[u32]> + Default + Send + Sync;

    /// The bytes of the address as native-endian words (memory order is network order).
    fn words(self) -> Self::Words;
    /// The inverse of [`Address::words`].
    fn from_words(words: Self::Words) -> Self;
    /// The address as a number (high bits first), for prefix arithmetic; IPv4 uses the low 32 bits.
    fn to_bits128(self) -> u128;
    /// The inverse of [`Address::to_bits128`]; bits above [`Address::BITS`] are ignored.
    fn from_bits128(bits: u128) -> Self;
    /// Reads the address from the start of `bytes`.
    ///
    /// # Panics
    /// Where `bytes` is shorter than [`Address::BYTES`].
    fn read(bytes: &[u8]) -> Self;
    /// Writes the address to the start of `bytes`.
    ///
    /// # Panics
    /// Where `bytes` is shorter than [`Address::BYTES`].
    fn write(self, bytes: &mut [u8]);
    /// The address of this family inside `ip`.
    fn from_ip(ip: IpAddr) -> Option<Self>;
    /// The address as an [`IpAddr`].
    fn to_ip(self) -> IpAddr;
    /// 0.0.0.0 or `::`.
    fn unspecified() -> Self;
    /// Multicast, or IPv4's limited broadcast.
    fn is_multicast_or_broadcast(self) -> bool;
    /// 127.0.0.0/8 or `::1`.
    fn is_loopback(self) -> bool;
    /// A unicast address that no router may forward from or to (RFC 4291, 2.5.6). None of IPv4's: routers do forward 169.254.0.0/16, where
    /// clouds have their metadata service.
    fn is_bound_to_link(self) -> bool;
    /// Whether a destination is for this link alone: whoever gets the packet has it, and no router passes it on.
    fn ends_at_link(self) -> bool {
        self.is_multicast_or_broadcast() || self.is_bound_to_link()
    }
}

impl Address for Ipv4Addr {
    const WORDS: usize = 1;
    const BYTES: usize = 4;
    const BITS: u8 = 32;
    const HEADER_BYTES: usize = 20;
    const ETHERTYPE: u16 = 0x0800;
    const ICMP: crate::Protocol = crate::Protocol::ICMP;
    type Words = [u32; 1];

    #[inline(always)]
    fn words(self) -> [u32; 1] {
        [u32::from_ne_bytes(self.octets())]
    }
    #[inline(always)]
    fn from_words(words: [u32; 1]) -> Self {
        Self::from(words[0].to_ne_bytes())
    }
    #[inline]
    fn to_bits128(self) -> u128 {
        u128::from(self.to_bits())
    }
    #[inline]
    fn from_bits128(bits: u128) -> Self {
        Self::from_bits(bits as u32)
    }
    #[inline]
    fn read(bytes: &[u8]) -> Self {
        Self::from(*bytes.first_chunk::<4>().expect("4 bytes of an IPv4 address"))
    }
    #[inline]
    fn write(self, bytes: &mut [u8]) {
        bytes[..4].copy_from_slice(&self.octets());
    }
    #[inline]
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }
    }
    #[inline]
    fn to_ip(self) -> IpAddr {
        IpAddr::V4(self)
    }
    #[inline]
    fn unspecified() -> Self {
        Self::UNSPECIFIED
    }
    #[inline]
    fn is_multicast_or_broadcast(self) -> bool {
        self.is_multicast() || self.is_broadcast()
    }
    #[inline]
    fn is_loopback(self) -> bool {
        Self::is_loopback(&self)
    }
    #[inline]
    fn is_bound_to_link(self) -> bool {
        false
    }
}

impl Address for Ipv6Addr {
    const WORDS: usize = 4;
    const BYTES: usize = 16;
    const BITS: u8 = 128;
    const HEADER_BYTES: usize = 40;
    const ETHERTYPE: u16 = 0x86dd;
    const ICMP: crate::Protocol = crate::Protocol::ICMPV6;
    type Words = [u32; 4];

    #[inline(always)]
    fn words(self) -> [u32; 4] {
        let octets = self.octets();
        std::array::from_fn(|i| u32::from_ne_bytes(std::array::from_fn(|j| octets[4 * i + j])))
    }
    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Self {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Self::from(octets)
    }
    #[inline]
    fn to_bits128(self) -> u128 {
        self.to_bits()
    }
    #[inline]
    fn from_bits128(bits: u128) -> Self {
        Self::from_bits(bits)
    }
    #[inline]
    fn read(bytes: &[u8]) -> Self {
        Self::from(*bytes.first_chunk::<16>().expect("16 bytes of an IPv6 address"))
    }
    #[inline]
    fn write(self, bytes: &mut [u8]) {
        bytes[..16].copy_from_slice(&self.octets());
    }
    #[inline]
    fn from_ip(ip: IpAddr) -> Option<Self> {
        match ip {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        }
    }
    #[inline]
    fn to_ip(self) -> IpAddr {
        IpAddr::V6(self)
    }
    #[inline]
    fn unspecified() -> Self {
        Self::UNSPECIFIED
    }
    #[inline]
    fn is_multicast_or_broadcast(self) -> bool {
        self.is_multicast()
    }
    #[inline]
    fn is_loopback(self) -> bool {
        Self::is_loopback(&self)
    }
    #[inline]
    fn is_bound_to_link(self) -> bool {
        self.is_unicast_link_local()
    }
}
