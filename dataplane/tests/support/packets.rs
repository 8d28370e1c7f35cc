//! Packets as they stand on the wire, made and read without weir's own code.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
};

use weir_dataplane::frame::IfIndex;

use crate::router::{UPLINK, octets, sum};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;
pub const IPIP: u8 = 4;
/// A packet of layer 3, with its headers' fields.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: u8,
    pub ttl: u8,
    pub tos: u8,
    /// Words of IPv4 options, or units of 8 bytes of an IPv6 extension header.
    pub options: usize,
    pub l4: Vec<u8>,
}

impl Packet {
    pub fn icmp(&self) -> u8 {
        if self.src.is_ipv4() { 1 } else { 58 }
    }

    /// The packet's bytes; its layer-4 checksum is made right.
    pub fn bytes(&self) -> Vec<u8> {
        let l4 = self.with_checksum();
        let addresses = [octets(self.src), octets(self.dst)].concat();
        if self.src.is_ipv4() {
            let header_bytes = 20 + 4 * self.options;
            let mut header = vec![0x40 | (header_bytes / 4) as u8, self.tos];
            header.extend(((header_bytes + l4.len()) as u16).to_be_bytes());
            header.extend([0x12, 0x34, 0x40, 0, self.ttl, self.protocol, 0, 0]);
            header.extend(addresses);
            header.resize(header_bytes, 1);
            let checksum = !sum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            return [header, l4].concat();
        }
        let extension_bytes = 8 * self.options;
        let mut header = vec![0x60 | self.tos >> 4, self.tos << 4, 0, 0];
        header.extend(((extension_bytes + l4.len()) as u16).to_be_bytes());
        header.extend([if extension_bytes > 0 { 60 } else { self.protocol }, self.ttl]);
        header.extend(addresses);
        if extension_bytes > 0 {
            // Destination options: padding only.
            header.extend([self.protocol, self.options as u8 - 1, 1, extension_bytes as u8 - 4]);
            header.resize(40 + extension_bytes, 0);
        }
        [header, l4].concat()
    }

    /// Where the layer-4 header has its checksum.
    pub fn checksum_place(&self) -> Range<usize> {
        match self.protocol {
            TCP => 16..18,
            UDP => 6..8,
            SCTP => 8..12,
            IPIP => 0..0,
            _ => 2..4,
        }
    }

    pub fn with_checksum(&self) -> Vec<u8> {
        let mut l4 = self.l4.clone();
        let place = self.checksum_place();
        l4[place.clone()].fill(0);
        if self.protocol == IPIP {
            return l4;
        }
        if self.protocol == SCTP {
            let checksum = crc32c(&l4);
            l4[place].copy_from_slice(&checksum.to_le_bytes());
            return l4;
        }
        let mut pseudo = [octets(self.src), octets(self.dst)].concat();
        pseudo.extend((l4.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, self.protocol]);
        if self.protocol == 1 {
            pseudo.clear();
        }
        let checksum = match !sum(&[pseudo, l4.clone()].concat()) {
            0 if self.protocol == UDP => 0xffff,
            checksum => checksum,
        };
        l4[place].copy_from_slice(&checksum.to_be_bytes());
        l4
    }

    /// Reads a packet, and asserts that its checksums are right.
    pub fn read(bytes: &[u8]) -> Self {
        let address = |at: usize, length: usize| -> IpAddr {
            match length {
                4 => Ipv4Addr::from(<[u8; 4]>::try_from(&bytes[at..at + 4]).unwrap()).into(),
                _ => Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).unwrap()).into(),
            }
        };
        let packet = if bytes[0] >> 4 == 4 {
            let header_bytes = usize::from(bytes[0] & 15) * 4;
            Self {
                src: address(12, 4),
                dst: address(16, 4),
                protocol: bytes[9],
                ttl: bytes[8],
                tos: bytes[1],
                options: header_bytes / 4 - 5,
                l4: bytes[header_bytes..].to_vec(),
            }
        } else {
            let options = if bytes[6] == 60 { usize::from(bytes[41]) + 1 } else { 0 };
            Self {
                src: address(8, 16),
                dst: address(24, 16),
                protocol: if options > 0 { bytes[40] } else { bytes[6] },
                ttl: bytes[7],
                tos: bytes[0] << 4 | bytes[1] >> 4,
                options,
                l4: bytes[40 + 8 * options..].to_vec(),
            }
        };
        assert_eq!(packet.bytes(), bytes, "a checksum is wrong");
        packet
    }

    pub fn frame(&self) -> Vec<u8> {
        let ethertype = if self.src.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        [&[0xee; 6][..], &[10, 0, 0, 0, 0, 1], &ethertype, &self.bytes()].concat()
    }
}

/// CRC32c, bit by bit (RFC 9260, appendix A).
pub fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// What left, without Ethernet and tunnel headers.
pub fn received(sent: &[(IfIndex, Vec<u8>)]) -> Vec<((IfIndex, bool), &[u8])> {
    sent.iter()
        .map(|(device, frame)| {
            let is_tunnelled = *device == UPLINK && frame[14] >> 4 == 4 && frame[23] == 4;
            if is_tunnelled {
                assert_eq!((sum(&frame[14..34]), &frame[26..34]), (0xffff, &[192, 168, 10, 1, 192, 168, 10, 2][..]));
            }
            ((*device, is_tunnelled), &frame[if is_tunnelled { 34 } else { 14 }..])
        })
        .collect()
}
