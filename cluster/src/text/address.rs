//! IP addresses and prefixes as Kubernetes reads them: leading zeros are decimal.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use thiserror::Error;

/// Why a text is no address or prefix.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum AddressError {
    /// Neither an IPv4 nor an IPv6 address.
    #[error("\"{0}\" is not an IP address")]
    Address(String),
    /// No prefix length follows the address.
    #[error("\"{text}\" is an address, not a CIDR")]
    NoPrefix {
        /// What was written.
        text: String,
        /// The address as a prefix of its own.
        whole: IpNet,
    },
    /// The prefix length is no number or too long for the family.
    #[error("\"{0}\" has a prefix length that is not between 0 and {1}")]
    Prefix(String, u8),
}

impl AddressError {
    /// What to write instead.
    pub fn help(&self) -> String {
        match self {
            Self::Address(text) if text.contains('/') => "write an address without prefix length".to_owned(),
            Self::Address(_) => "write an address like 192.0.2.1 or 2001:db8::1".to_owned(),
            Self::NoPrefix { whole, .. } => format!("write {whole} for this one address"),
            Self::Prefix(..) => "write a CIDR like 192.0.2.0/24 or 2001:db8::/64".to_owned(),
        }
    }
}

/// Reads an address; leading zeros of IPv4 octets are decimal.
pub fn parse_ip(text: &str) -> Result<IpAddr, AddressError> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let octet = |part: &str| match part.trim_start_matches('0') {
        "" => (!part.is_empty()).then_some(0),
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    };
    let octets: Option<Vec<u8>> = text.split('.').map(octet).collect();
    match octets.and_then(|octets| <[u8; 4]>::try_from(octets).ok()) {
        Some(octets) => Ok(Ipv4Addr::from(octets).into()),
        None => Err(AddressError::Address(text.to_owned())),
    }
}

/// Reads "address/length" and keeps the address's host bits.
pub fn parse_cidr(text: &str) -> Result<IpNet, AddressError> {
    let Some((address, length)) = text.split_once('/') else {
        let address = parse_ip(text)?;
        return Err(AddressError::NoPrefix { text: text.to_owned(), whole: address.into() });
    };
    let address = parse_ip(address).map_err(|_| AddressError::Address(address.to_owned()))?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    let length = if digits { length.parse().ok() } else { None };
    length
        .and_then(|length| IpNet::new(address, length).ok())
        .ok_or_else(|| AddressError::Prefix(text.to_owned(), longest))
}

/// Reads "address/length"; host bits are masked off.
pub fn parse_network(text: &str) -> Result<IpNet, AddressError> {
    parse_cidr(text).map(|net| net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_are_decimal() {
        assert_eq!(parse_ip("010.000.001.009").unwrap().to_string(), "10.0.1.9");
        assert_eq!(parse_network("010.001.255.7/016").unwrap().to_string(), "10.1.0.0/16");
        assert_eq!(parse_cidr("10.1.255.7/16").unwrap().to_string(), "10.1.255.7/16");
        assert_eq!(parse_ip("2001:db8::1").unwrap().to_string(), "2001:db8::1");
    }

    #[test]
    fn what_is_no_address_is_refused_with_advice() {
        for bad in
            ["", "10.0.0", "10.0.0.256", "10.0.0.1.1", "a.b.c.d", "10..0.1", "10.0.0.1/8", "+1.2.3.4", "1.2.3.0256"]
        {
            assert_eq!(parse_ip(bad), Err(AddressError::Address(bad.to_owned())));
        }
        for bad in ["10.0.0.0/33", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/+8", "2001:db8::/129", "10.0.0.0/999999"] {
            assert!(matches!(parse_cidr(bad), Err(AddressError::Prefix(..))), "{bad}");
        }
        assert_eq!(parse_cidr("10.0.0.9").unwrap_err().help(), "write 10.0.0.9/32 for this one address");
    }
}
