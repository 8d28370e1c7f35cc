//! Internet checksums (RFC 1071), their incremental updates (RFC 1624), and SCTP's CRC32c (RFC 9260, appendix A).
//!
//! # Theory
//! The internet checksum is the complement of a ones' complement sum of 16-bit words, which is a sum modulo 2^16 - 1.
//! Two facts of that arithmetic carry this file (RFC 1071, 2):
//!
//! - Byte order does not matter: a sum of words loaded in the machine's own order, stored in that order, is the right
//!   sum in network order. So nothing here swaps bytes; `[u8; 2]` is always what stands in the packet.
//! - Width does not matter: 2^16 = 1 modulo 2^16 - 1, so 32-bit words are added whole into a 64-bit number, and the
//!   halves are added together ("folded") once at the end. 2^32 words fit without a carry; no packet comes near.
//!
//! [`Sum`] is such a number. [`Increment`] is the difference of two sums: RFC 1624's equation 3,
//! `HC' = ~(~HC + ~m + m')`, with all the `~m + m'` added up first, so that one increment serves the IP header and every
//! checksum with a pseudo header. A wrong checksum stays exactly as wrong as it was.
//!
//! A CRC is linear over exclusive or: for messages of equal length, `crc(a) ^ crc(b)` depends on `a ^ b` alone. SCTP's
//! checksum covers no pseudo header, so a port change differs in the first four bytes only, and what it does to the CRC
//! is the CRC of those four bytes multiplied by x^8 for each byte that follows: no byte of the payload is read.

use crate::{Address, Protocol};

/// A ones' complement sum in progress, in the machine's byte order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Self = Self(0);

    /// The sum of a flow key's addresses.
    #[inline]
    pub fn addresses<A: Address>(src: A, dst: A) -> Self {
        Self::ZERO.words(src.words().as_ref()).words(dst.words().as_ref())
    }

    /// Adds `bytes`, which start at an even offset of what is summed; an odd last byte is padded with a zero byte.
    #[inline]
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        let (mut low, mut high) = (0_u64, 0_u64);
        for word in words {
            let word = u64::from_ne_bytes(*word);
            low += word & 0xffff_ffff;
            high += word >> 32;
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        let last = u64::from_ne_bytes(last);
        Self(self.0 + low + high + (last & 0xffff_ffff) + (last >> 32))
    }

    /// Adds words in network byte order, as [`Address::words`] gives them.
    #[inline]
    #[must_use]
    pub fn words(self, words: &[u32]) -> Self {
        Self(words.iter().fold(self.0, |sum, word| sum + u64::from(*word)))
    }

    /// Adds a 16-bit word at an even offset, as it stands in the packet.
    #[inline]
    #[must_use]
    pub fn word16(self, word: [u8; 2]) -> Self {
        Self(self.0 + u64::from(u16::from_ne_bytes(word)))
    }

    /// Adds another sum of whole words.
    #[inline]
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The sum as 16 bits, in the machine's byte order; 0 only where every byte was 0.
    ///
    /// Adding a number to itself with its halves swapped adds the lower half's carry to the upper half, which is the sum
    /// of both halves with its carry brought round.
    #[inline]
    pub const fn fold(self) -> u16 {
        let sum = (self.0.wrapping_add(self.0.rotate_left(32)) >> 32) as u32;
        (sum.wrapping_add(sum.rotate_left(16)) >> 16) as u16
    }

    /// The checksum: the complement, as it stands in a header.
    #[inline]
    pub const fn finish(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }

    /// The checksum of a UDP datagram, where 0 means "none" and so 0xffff stands for it (RFC 768).
    #[inline]
    pub const fn finish_udp(self) -> [u8; 2] {
        match self.finish() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }

    /// Whether the sum, taken over data together with its checksum, says that the data is right.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.fold() == 0xffff
    }
}

/// The sum of the pseudo header of TCP, UDP (RFC 9293, 3.1) and, for IPv6, ICMPv6 (RFC 8200, 8.1).
///
/// `length_bytes` is the length of the layer-4 header and its data. The two families' pseudo headers order their
/// fields differently, which a sum does not notice.
#[inline]
pub fn pseudo_header<A: Address>(src: A, dst: A, protocol: Protocol, length_bytes: u32) -> Sum {
    Sum::addresses(src, dst).words(&[length_bytes.to_be(), u32::from(protocol.0).to_be()])
}

/// What a change of some words does to every checksum over them (RFC 1624, equation 3).
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct Increment(u64);

impl Increment {
    /// No change.
    pub const ZERO: Self = Self(0);

    /// A 16-bit word at an even offset changes, as it stands in the packet.
    #[inline]
    pub fn word16(self, old: [u8; 2], new: [u8; 2]) -> Self {
        self.difference(u32::from(u16::from_ne_bytes(old)), u32::from(u16::from_ne_bytes(new)))
    }

    /// A 32-bit word at an even offset changes; in memory order, as [`Address::words`] and [`crate::Ports::word`] are.
    #[inline]
    pub fn word32(self, old: u32, new: u32) -> Self {
        self.difference(old, new)
    }

    /// Words whose sum was `old` are replaced by words whose sum is `new`: at most 2^16 words of 32 bits each.
    ///
    /// The difference, and where that is below zero, a multiple of 2^16 - 1 more, which changes no checksum. So nothing that changed adds
    /// nothing (see [`Self::difference`]).
    #[inline]
    pub fn between(old: Sum, new: Sum) -> Self {
        const MULTIPLE: u64 = 0xffff << 32;
        let difference = new.0.wrapping_sub(old.0);
        Self(if new.0 < old.0 { difference.wrapping_add(MULTIPLE) } else { difference })
    }

    /// Both changes.
    #[inline]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Equal words must add nothing: `~m + m` is the other zero, and would turn a checksum of 0xffff into 0.
    #[inline]
    fn difference(self, old: u32, new: u32) -> Self {
        Self(self.0 + if old == new { 0 } else { u64::from(!old) + u64::from(new) })
    }

    /// The checksum after the change.
    #[inline]
    pub fn apply(self, checksum: [u8; 2]) -> [u8; 2] {
        Sum(self.0 + u64::from(!u16::from_ne_bytes(checksum))).finish()
    }

    /// A UDP checksum after the change: none stays none, and one that comes out as 0 is written as 0xffff (RFC 768).
    #[inline(always)]
    pub fn apply_udp(self, checksum: [u8; 2]) -> [u8; 2] {
        if checksum == [0, 0] {
            return checksum;
        }
        match self.apply(checksum) {
            [0, 0] => [0xff, 0xff],
            changed => changed,
        }
    }
}

/// CRC32c's generator polynomial, bits reversed.
const CRC32C: u32 = 0x82f6_3b78;

/// `TABLE[k][b]`: the effect of byte `b` with `k` zero bytes after it.
static CRC_TABLE: [[u32; 256]; 8] = crc_table();

const fn crc_table() -> [[u32; 256]; 8] {
    let mut table = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = times_x(crc);
            bit += 1;
        }
        table[0][byte] = crc;
        byte += 1;
    }
    let mut distance = 1;
    while distance < 8 {
        let mut byte = 0;
        while byte < 256 {
            let crc = table[distance - 1][byte];
            table[distance][byte] = (crc >> 8) ^ table[0][(crc & 0xff) as usize];
            byte += 1;
        }
        distance += 1;
    }
    table
}

/// A polynomial (bit 31 is the coefficient of x^0) times x.
const fn times_x(polynomial: u32) -> u32 {
    (polynomial >> 1) ^ if polynomial & 1 != 0 { CRC32C } else { 0 }
}

/// The product of two polynomials.
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut product, mut power, mut bit) = (0, b, 1_u32 << 31);
    while bit != 0 {
        if a & bit != 0 {
            product ^= power;
        }
        power = times_x(power);
        bit >>= 1;
    }
    product
}

/// `ZEROS[k]`: x^(8 * 2^k), the effect of 2^k zero bytes.
static ZEROS: [u32; 32] = {
    let mut zeros = [0; 32];
    zeros[0] = 1 << (31 - 8);
    let mut k = 1;
    while k < 32 {
        zeros[k] = multiply(zeros[k - 1], zeros[k - 1]);
        k += 1;
    }
    zeros
};

/// The CRC's register after `bytes`.
fn crc_register(register: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut crc = register;
    for word in words {
        let [a, b, c, d, e, f, g, h] = (u64::from_le_bytes(*word) ^ u64::from(crc)).to_le_bytes().map(usize::from);
        crc = CRC_TABLE[7][a]
            ^ CRC_TABLE[6][b]
            ^ CRC_TABLE[5][c]
            ^ CRC_TABLE[4][d]
            ^ CRC_TABLE[3][e]
            ^ CRC_TABLE[2][f]
            ^ CRC_TABLE[1][g]
            ^ CRC_TABLE[0][h];
    }
    for byte in rest {
        crc = (crc >> 8) ^ CRC_TABLE[0][usize::from(crc as u8 ^ byte)];
    }
    crc
}

/// The CRC32c of a message in parts.
pub fn crc32c(parts: &[&[u8]]) -> u32 {
    !parts.iter().fold(!0, |register, part| crc_register(register, part))
}

/// The checksum of an SCTP packet (common header and chunks) as it stands in it: CRC32c, least significant byte first,
/// with its own field taken as 0 (RFC 9260, 6.8). `None` where `packet` is shorter than the common header.
pub fn sctp_checksum(packet: &[u8]) -> Option<[u8; 4]> {
    let (ports_and_tag, rest) = packet.split_at_checked(8)?;
    Some(crc32c(&[ports_and_tag, &[0; 4], rest.get(4..)?]).to_le_bytes())
}

/// An SCTP packet's checksum after its first four bytes (the ports) changed from `old` to `new`.
///
/// `length_bytes` is that of the whole SCTP packet. Takes time in the logarithm of it; a wrong checksum stays wrong.
pub fn sctp_increment(checksum: [u8; 4], old: u32, new: u32, length_bytes: usize) -> [u8; 4] {
    let mut change = crc_register(0, &(old ^ new).to_ne_bytes());
    let (mut zeros, mut k) = (length_bytes.saturating_sub(4), 0);
    while zeros != 0 && k < ZEROS.len() {
        if zeros & 1 != 0 {
            change = multiply(change, ZEROS[k]);
        }
        zeros >>= 1;
        k += 1;
    }
    (u32::from_le_bytes(checksum) ^ change).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fold_never_leaves_a_carry() {
        for sum in
            [0, 1, 0xffff, 0x1_0000, 0x1_fffe, 0xffff_ffff, 0x1_0000_0000, 0x1_ffff_ffff, u64::MAX >> 1, u64::MAX]
        {
            let folded = u64::from(Sum(sum).fold());
            assert_eq!(folded % 0xffff, sum % 0xffff, "{sum:#x}");
            assert_eq!(folded == 0, sum == 0, "{sum:#x}");
        }
    }

    #[test]
    fn zero_bytes_are_what_the_table_of_powers_says() {
        let mut crc = 0x1234_5678;
        for (zeros, power) in ZEROS.iter().enumerate().take(12) {
            let mut register = crc;
            for _ in 0..1_u32 << zeros {
                register = crc_register(register, &[0]);
            }
            assert_eq!(register, multiply(crc, *power), "2^{zeros} zero bytes");
            crc = crc.rotate_left(5) ^ 0x9e37;
        }
    }
}
