//! Both families from one text: addresses are written as IPv4 ones and carried over.

use std::net::{IpAddr, SocketAddr};

/// The family of a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Family {
    V4,
    V6,
}

/// Prefixes of addresses, in both families.
const CARRIED: [(&str, &str); 8] = [
    ("10.1.1.", "fd00:1:1::"),
    ("10.1.2.", "fd00:1:2::"),
    ("10.96.0.", "fd00:96::"),
    ("192.168.10.", "fd00:10::"),
    ("198.51.100.", "2001:db8:198::"),
    ("203.0.113.", "2001:db8:203::"),
    ("192.0.2.", "2001:db8:192::"),
    ("10.8.0.", "fd00:8::"),
];

impl Family {
    /// An address.
    pub fn address(self, text: &str) -> String {
        let carry = |(v4, v6): &(&str, &str)| Some(format!("{v6}{}", text.strip_prefix(v4)?));
        match self {
            Self::V4 => text.to_owned(),
            Self::V6 => CARRIED.iter().find_map(carry).expect("a known prefix"),
        }
    }

    /// A port of an address.
    pub fn socket(self, text: &str, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(text).parse().expect("an address"), port)
    }

    /// The IPv4 address that an address was carried over from.
    pub fn written(self, address: &str) -> String {
        let back = |(v4, v6): &(&str, &str)| Some(format!("{v4}{}", address.strip_prefix(v6)?));
        match self {
            Self::V4 => address.to_owned(),
            Self::V6 => CARRIED.iter().find_map(back).unwrap_or_else(|| address.to_owned()),
        }
    }

    /// The network of the last byte of an address that ends in 0.
    pub fn net(self, text: &str) -> String {
        match self {
            Self::V4 => format!("{text}/24"),
            Self::V6 => format!("{}/64", self.address(text).strip_suffix('0').expect("a network")),
        }
    }

    /// The length of a prefix that is one address.
    pub fn whole(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    pub fn is_of(self, address: IpAddr) -> bool {
        address.is_ipv6() == (self == Self::V6)
    }
}
