//! Prefixes, asked whether one of them holds an address.

use std::{
    collections::{BTreeSet, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;

/// A set of prefixes. A question costs one lookup for each length that prefixes of the address's family have.
#[derive(Debug, Default)]
pub struct Prefixes {
    nets: HashSet<IpNet>,
    /// Whether of IPv6, and the length.
    lengths: BTreeSet<(bool, u8)>,
}

impl Prefixes {
    /// Whether one of them holds `address`.
    pub fn hold(&self, address: IpAddr) -> bool {
        let is_v6 = address.is_ipv6();
        self.lengths
            .range((is_v6, 0)..=(is_v6, u8::MAX))
            .any(|(_, length)| IpNet::new(address, *length).is_ok_and(|net| self.nets.contains(&net.trunc())))
    }
}

impl FromIterator<IpNet> for Prefixes {
    fn from_iter<I: IntoIterator<Item = IpNet>>(nets: I) -> Self {
        let nets: HashSet<IpNet> = nets.into_iter().map(|net| net.trunc()).collect();
        let lengths = nets.iter().map(|net| (net.addr().is_ipv6(), net.prefix_len())).collect();
        Self { nets, lengths }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_held_by_a_prefix_of_its_family_at_any_length() {
        let nets = ["10.1.2.3/16", "192.0.2.7/32", "fd00::/64", "::/0"].map(|text| text.parse().unwrap());
        let held =
            |nets: &[IpNet], address: &str| nets.iter().copied().collect::<Prefixes>().hold(address.parse().unwrap());
        for (address, expected) in
            [("10.1.255.1", true), ("10.2.0.0", false), ("192.0.2.7", true), ("192.0.2.8", false), ("fd00::1", true)]
        {
            assert_eq!(held(&nets[..3], address), expected, "{address}");
        }
        assert!(!held(&nets[..3], "fd00:0:0:1::1") && held(&nets, "fd00:0:0:1::1") && !held(&nets, "11.0.0.1"));
        assert!(!held(&[], "10.0.0.1"));
    }
}
