//! Which of the node's host endpoints governs what passes a device.
//!
//! A host endpoint names its device, or is found by an address that the device has; one for "*" governs every device that no
//! other does. Where several fit, the one whose name comes first does, as upstream.

use std::net::IpAddr;

use crate::model::{Cluster, Device};

/// Number of a host endpoint in the [`Cluster`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct HostEndpointNumber(pub u32);

/// The node's host endpoints.
#[derive(Debug, Default)]
pub struct HostEndpoints {
    names: Vec<Box<str>>,
    /// Of one device each, by name of the endpoint: its interface, its addresses.
    single: Vec<(HostEndpointNumber, Option<Box<str>>, Vec<IpAddr>)>,
    everywhere: Option<HostEndpointNumber>,
}

impl HostEndpoints {
    pub(crate) fn new(cluster: &Cluster) -> Self {
        let mut sorted: Vec<_> = (0..).map(HostEndpointNumber).zip(&cluster.host_endpoints).collect();
        sorted.sort_by(|(_, a), (_, b)| a.name.cmp(&b.name));
        let is_everywhere = |interface: &Option<String>| interface.as_deref() == Some("*");
        let everywhere =
            sorted.iter().find(|(_, endpoint)| is_everywhere(&endpoint.interface)).map(|(number, _)| *number);
        let single = sorted.iter().filter(|(_, endpoint)| !is_everywhere(&endpoint.interface));
        let single = single.map(|(number, endpoint)| {
            (*number, endpoint.interface.as_deref().map(Box::from), endpoint.addresses.clone())
        });
        Self {
            names: cluster.host_endpoints.iter().map(|endpoint| endpoint.name.as_str().into()).collect(),
            single: single.collect(),
            everywhere,
        }
    }

    /// Whether the node has none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The name of one.
    pub fn name(&self, number: HostEndpointNumber) -> &str {
        &self.names[number.0 as usize]
    }

    /// The one for every device that no other governs. It alone meets what pods send and get, and what goes through tunnels, which
    /// are devices of their own.
    #[inline]
    pub fn everywhere(&self) -> Option<HostEndpointNumber> {
        self.everywhere
    }

    /// The one that governs an uplink.
    pub fn of_device(&self, device: &Device) -> Option<HostEndpointNumber> {
        let fits = |(_, interface, addresses): &&(_, Option<Box<str>>, Vec<IpAddr>)| match interface {
            Some(interface) => **interface == *device.name,
            None => addresses.iter().any(|address| device.addresses.iter().any(|net| net.addr() == *address)),
        };
        self.single.iter().find(fits).map(|(number, ..)| *number).or(self.everywhere)
    }

    /// The one that names a device of which nothing else is known.
    pub fn of_name(&self, device: &str) -> Option<HostEndpointNumber> {
        let named = self.single.iter().find(|(_, interface, _)| interface.as_deref() == Some(device));
        named.map(|(number, ..)| *number).or(self.everywhere)
    }

    /// The likeliest one for an uplink of which nothing is known but an address of the node that the packet has: that with the
    /// address, or the only one.
    pub fn of_address(&self, address: IpAddr) -> Option<HostEndpointNumber> {
        let with_address = self.single.iter().find(|(.., addresses)| addresses.contains(&address));
        let only = || match self.single.as_slice() {
            [only] if self.everywhere.is_none() || only.2.is_empty() => Some(only),
            _ => None,
        };
        let number = |(number, ..): &(HostEndpointNumber, _, _)| *number;
        let first = || self.single.first().map(number);
        with_address.or_else(only).map(number).or(self.everywhere).or_else(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        frame::IfIndex,
        model::{HostEndpoint, Role},
    };

    fn device(name: &str, address: &str) -> Device {
        let addresses = vec![address.parse().unwrap()];
        Device {
            name: name.into(),
            index: IfIndex(7),
            role: Role::Uplink,
            mac: Default::default(),
            mtu: 1500,
            addresses,
        }
    }

    fn endpoint(name: &str, interface: Option<&str>, addresses: &[&str]) -> HostEndpoint {
        HostEndpoint {
            name: name.into(),
            interface: interface.map(str::to_owned),
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_name_an_address_or_everything() {
        let host_endpoints = vec![
            endpoint("all", Some("*"), &["192.0.2.1"]),
            endpoint("z-named", Some("eth0"), &["198.51.100.1"]),
            endpoint("b-named", Some("eth0"), &[]),
            endpoint("addressed", None, &["192.0.2.9"]),
        ];
        let endpoints = HostEndpoints::new(&Cluster { host_endpoints, ..Cluster::default() });
        let name = |number: Option<HostEndpointNumber>| number.map(|number| endpoints.name(number));
        assert_eq!(name(endpoints.of_device(&device("eth0", "192.0.2.8/24"))), Some("b-named"));
        assert_eq!(name(endpoints.of_device(&device("eth1", "192.0.2.9/24"))), Some("addressed"));
        // One that names its interface is not found by its addresses.
        assert_eq!(name(endpoints.of_device(&device("eth1", "198.51.100.1/24"))), Some("all"));
        assert_eq!(name(endpoints.of_name("eth0")), Some("b-named"));
        assert_eq!(name(endpoints.of_address("198.51.100.1".parse().unwrap())), Some("z-named"));
        assert_eq!(name(endpoints.of_address("192.0.2.77".parse().unwrap())), Some("all"));
        assert!(HostEndpoints::default().is_empty());
    }
}
