//! The trunk: the veth pair between the kernel and the workers.

use std::{fs, path::PathBuf};

use nix::net::if_::if_nametoindex;
use serde_json::Value;
use weir_packet::Mac;

use super::{
    error::AttachError,
    maps::MAX_QUEUES,
    tools::{ethtool, failed, ip},
};
use crate::frame::MAX_MTU;

/// The trunk's end in the kernel: the node's route to pods and services, and where what weir sends comes out.
pub const KERNEL_END: &str = "weir0";
/// The trunk's end with the workers' sockets.
pub const ROUTER_END: &str = "weir1";
/// MAC address of [`KERNEL_END`]: destination of all that the node's own kernel sends into the trunk. It begins with 6,
/// so that it never looks like an encoded one, which begins with 2.
pub const KERNEL_END_MAC: Mac = Mac([0x06, b'w', b'e', b'i', b'r', 0]);
/// MAC address of [`ROUTER_END`].
pub const ROUTER_END_MAC: Mac = Mac([0x06, b'w', b'e', b'i', b'r', 1]);

/// The smallest MTU that IPv6 allows (RFC 8200, 5).
const MIN_MTU: u32 = 1280;

/// The trunk as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trunk {
    /// Index of [`KERNEL_END`].
    pub kernel_end: u32,
    /// Index of [`ROUTER_END`].
    pub router_end: u32,
    /// Receive and transmit queues of both ends.
    pub queues: u32,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
}

/// What `ip` tells about a device.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) mtu: u32,
    pub(super) native_xdp: bool,
    pub(super) is_ethernet: bool,
    pub(super) kind: String,
    peer: String,
    mac: String,
    queues: (u32, u32),
}

/// A device of the calling thread's network namespace by its name.
pub(super) fn link(name: &str) -> Result<Option<Link>, AttachError> {
    if if_nametoindex(name).is_err() {
        return Ok(None);
    }
    let arguments = ["-j", "-d", "link", "show", "dev", name];
    let output = ip(&arguments)?;
    let bad = |message: String| failed("ip", &arguments, message);
    let value: Value = serde_json::from_slice(&output).map_err(|error| bad(format!("unreadable output: {error}")))?;
    let link = &value[0];
    let number = |field: &str| {
        let number = link[field].as_u64().and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| bad(format!("its output has no {field}")))
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(Some(Link {
        index: number("ifindex")?,
        mtu: number("mtu")?,
        // XDP_ATTACHED_DRV, include/uapi/linux/if_link.h
        native_xdp: link["xdp"]["mode"].as_u64() == Some(1),
        is_ethernet: link["link_type"].as_str() == Some("ether"),
        kind: text(&link["linkinfo"]["info_kind"]),
        peer: text(&link["link"]),
        mac: text(&link["address"]),
        queues: (number("num_rx_queues")?, number("num_tx_queues")?),
    }))
}

impl Trunk {
    /// Makes the trunk, or takes the one that is there if it has that many queues; else it is made anew. A new one is
    /// down until [`Trunk::set_up`].
    pub(super) fn ensure(queues: u32, mtu: u32) -> Result<Self, AttachError> {
        if queues == 0 || queues > MAX_QUEUES {
            return Err(AttachError::Queues { queues, max: MAX_QUEUES });
        }
        if !(MIN_MTU..=MAX_MTU).contains(&mtu) {
            return Err(AttachError::Mtu { device: KERNEL_END.to_owned(), mtu });
        }

        let usable = match (own(KERNEL_END, KERNEL_END_MAC)?, own(ROUTER_END, ROUTER_END_MAC)?) {
            (Some(kernel_end), Some(router_end)) => {
                kernel_end.peer == ROUTER_END
                    && [&kernel_end, &router_end].iter().all(|end| end.queues == (queues, queues))
            }
            _ => false,
        };
        if !usable {
            remove()?;
            add(queues, mtu)?;
        }
        configure(mtu)?;
        let index = |name: &str, end: Option<Link>| {
            end.map(|link| link.index).ok_or_else(|| AttachError::DeviceGone { name: name.to_owned(), index: 0 })
        };
        Ok(Self {
            kernel_end: index(KERNEL_END, link(KERNEL_END)?)?,
            router_end: index(ROUTER_END, link(ROUTER_END)?)?,
            queues,
            mtu,
        })
    }

    /// Sets both ends up.
    pub(super) fn set_up(&self) -> Result<(), AttachError> {
        ip(&["link", "set", "dev", ROUTER_END, "up"])?;
        ip(&["link", "set", "dev", KERNEL_END, "up"])?;
        Ok(())
    }
}

/// Removes the trunk: the names of what was removed.
pub(super) fn remove() -> Result<Vec<&'static str>, AttachError> {
    let ends = [(KERNEL_END, KERNEL_END_MAC), (ROUTER_END, ROUTER_END_MAC)];
    let mut removed = Vec::new();
    for (name, mac) in ends {
        if own(name, mac)?.is_some() {
            removed.push(name);
        }
    }
    for name in &removed {
        // A veth takes its peer along.
        if if_nametoindex(*name).is_ok() {
            ip(&["link", "delete", "dev", name])?;
        }
    }
    Ok(removed)
}

/// The device with this name, which must be one that weir made.
fn own(name: &'static str, mac: Mac) -> Result<Option<Link>, AttachError> {
    let Some(link) = link(name)? else { return Ok(None) };
    if link.kind != "veth" {
        return Err(AttachError::ForeignDevice { name, why: format!("its kind is {:?}, not veth", link.kind) });
    }
    if link.mac != mac.to_string() {
        return Err(AttachError::ForeignDevice { name, why: format!("its MAC address is {}, not {mac}", link.mac) });
    }
    Ok(Some(link))
}

fn add(queues: u32, mtu: u32) -> Result<(), AttachError> {
    let (queues, mtu) = (queues.to_string(), mtu.to_string());
    let (kernel_end_mac, router_end_mac) = (KERNEL_END_MAC.to_string(), ROUTER_END_MAC.to_string());
    let mut arguments = vec!["link", "add", KERNEL_END];
    let end = |mac| ["address", mac, "mtu", &mtu, "numrxqueues", &queues, "numtxqueues", &queues];
    arguments.extend(end(&kernel_end_mac));
    arguments.extend(["type", "veth", "peer", "name", ROUTER_END]);
    arguments.extend(end(&router_end_mac));
    ip(&arguments).map(drop)
}

fn configure(mtu: u32) -> Result<(), AttachError> {
    let mtu = mtu.to_string();
    // No neighbour discovery on either end: what is not addressed to a device is addressed to the other end.
    for name in [KERNEL_END, ROUTER_END] {
        ip(&["link", "set", "dev", name, "mtu", &mtu, "arp", "off"])?;
    }
    // Without them the kernel finishes checksums, cuts what is larger than a packet, and writes VLAN tags into the
    // frame, all before it reaches XDP, which sees nothing but the frame.
    ethtool(&["-K", KERNEL_END, "tx", "off", "txvlan", "off", "tx-vlan-stag-hw-insert", "off"])?;
    // What is punted comes from anywhere, the node's own addresses included: a connection of the node to itself by way
    // of a service.
    // What a process asks a host port on 127.0.0.1 is answered from there, and nothing else with such an address is punted.
    for (name, value) in [("rp_filter", "0"), ("accept_local", "1"), ("route_localnet", "1")] {
        write_sysctl(&format!("ipv4/conf/{KERNEL_END}/{name}"), value)?;
    }
    // Absent where the kernel was started without IPv6.
    if PathBuf::from("/proc/sys/net/ipv6").exists() {
        ip(&["link", "set", "dev", KERNEL_END, "addrgenmode", "none"])?;
        write_sysctl(&format!("ipv6/conf/{KERNEL_END}/accept_ra"), "0")?;
        write_sysctl(&format!("ipv6/conf/{ROUTER_END}/disable_ipv6"), "1")?;
    }
    Ok(())
}

fn write_sysctl(name: &str, value: &str) -> Result<(), AttachError> {
    let path = PathBuf::from("/proc/sys/net").join(name);
    fs::write(&path, value).map_err(|source| AttachError::Sysctl { path, source })
}
