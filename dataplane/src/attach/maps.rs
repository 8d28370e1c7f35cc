//! Loading the programs, and the layout of the maps that they share with the router.

use std::path::Path;

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{MapData, MapError, MapInfo, MapType},
};

use super::{
    error::{AttachError, map_error},
    pins::{self, Pins},
};
use crate::offload::flow::Flow;

/// Queues of one device (`MAX_QUEUES` of `bpf/weir.h`).
pub(super) const MAX_QUEUES: u32 = 256;
/// Workloads of one router.
pub(super) const MAX_WORKLOADS: u32 = 4096;
/// Addresses of the node, of each family.
pub(super) const MAX_NODE_ADDRESSES: u32 = 4096;
/// Owned prefixes, of each family.
pub(super) const MAX_PREFIXES: u32 = 262_144;
/// Frontends on the node's own addresses that there is room for in each family ([`super::Owned::own_ports`]).
pub const MAX_OWN_PORTS: u32 = 262_144;
/// Words of the port bitmaps: two sets, three protocols.
pub(super) const PORT_WORDS: u32 = 2 * 3 * 65_536 / 64;

/// A workload's entry: the MAC address of its host end, whether its peer lies in another namespace, and a zero.
pub(super) type WorkloadEntry = [u8; 8];

/// A port of one of the node's addresses: the address, the port, both in network order, the protocol, and a zero.
pub(super) type OwnPortV4 = [u8; 8];
pub(super) type OwnPortV6 = [u8; 20];

/// Flows of each family that servers of the node answer by weir (`MAX_ANSWERED` of `bpf/node.h`).
const MAX_ANSWERED: u32 = 65_536;

const SOCKETS: &str = "sockets";

/// Name, type, bytes of key and value, entries of each shared map. A pinned map that differs is of another version.
const LAYOUT: [(&str, MapType, u32, u32, u32); 13] = [
    ("counters", MapType::PerCpuArray, 4, 8, 64),
    ("workloads", MapType::Hash, 4, size_of::<WorkloadEntry>() as u32, MAX_WORKLOADS),
    ("prefixes_v4", MapType::LpmTrie, 8, 4, MAX_PREFIXES),
    ("prefixes_v6", MapType::LpmTrie, 20, 4, MAX_PREFIXES),
    ("node_v4", MapType::Hash, 4, 4, MAX_NODE_ADDRESSES),
    ("node_v6", MapType::Hash, 16, 4, MAX_NODE_ADDRESSES),
    ("ports", MapType::Array, 4, 8, PORT_WORDS),
    ("own_ports_v4", MapType::Hash, size_of::<OwnPortV4>() as u32, 4, MAX_OWN_PORTS),
    ("own_ports_v6", MapType::Hash, size_of::<OwnPortV6>() as u32, 4, MAX_OWN_PORTS),
    ("identity", MapType::Array, 4, 8, 1),
    ("governed", MapType::Array, 4, 8, 1),
    // Both ends' addresses and ports, the protocol and zeros.
    ("answered_v4", MapType::LruHash, 16, 4, MAX_ANSWERED),
    ("answered_v6", MapType::LruHash, 40, 4, MAX_ANSWERED),
];

/// Name, type, bytes of key and value of each map of flows in the kernel, and how many entries for a flow.
const OFFLOAD_LAYOUT: [(&str, MapType, u32, u32, u32); 3] = [
    ("offload_flows", MapType::Array, 4, size_of::<Flow>() as u32, 1),
    ("offload_v4", MapType::Hash, size_of::<KeyV4>() as u32, 8, 2),
    ("offload_v6", MapType::Hash, size_of::<KeyV6>() as u32, 8, 2),
];
/// The epoch's map.
pub(super) const EPOCH: &str = "offload_epoch";

/// A flow's keys, as bytes, and what they lead to: the way's number and a serial number.
pub(super) type KeyV4 = [u8; 20];
pub(super) type KeyV6 = [u8; 44];
pub(super) type FlowName = [u32; 2];

/// The trunk's programs, to send to the device `weir0`; with room for so many flows in the kernel, if any.
pub(super) fn load_trunk(pins: &Pins, weir0: u32, mtu: u32, flows: Option<u32>) -> Result<Ebpf, AttachError> {
    let object = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/trunk.bpf.o"));
    let layout = offload_layout(flows);
    // Flows are an earlier process's gift, no duty: those of another size or version are left behind.
    let is_kept = layout.iter().all(|(name, kind, key, value, entries)| {
        let path = pins.dir().join(name);
        flows.is_some() && path.exists() && check_layout(&path, name, (*kind, *key, *value, *entries)).is_ok()
    });
    if !is_kept {
        layout.iter().try_for_each(|(name, ..)| pins::unpin_map(&pins.dir().join(name)))?;
    }
    load("trunk", object, pins, &pins.trunk_sockets(), (weir0, Some(mtu)), flows)
}

/// The programs of one uplink, with the sockets that are pinned there: its own or the trunk's. After [`load_trunk`], with the same
/// `weir0` and `flows`.
pub(super) fn load_uplink(pins: &Pins, sockets: &Path, weir0: u32, flows: Option<u32>) -> Result<Ebpf, AttachError> {
    let object = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/uplink.bpf.o"));
    load("uplink", object, pins, sockets, (weir0, None), flows)
}

/// Name, type, bytes of key and value, entries of the maps for so many flows in the kernel.
fn offload_layout(flows: Option<u32>) -> [(&'static str, MapType, u32, u32, u32); 3] {
    OFFLOAD_LAYOUT.map(|(name, kind, key, value, each)| (name, kind, key, value, each * flows.unwrap_or(1)))
}

fn load(
    name: &'static str,
    object: &[u8],
    pins: &Pins,
    sockets: &Path,
    (weir0, mtu): (u32, Option<u32>),
    flows: Option<u32>,
) -> Result<Ebpf, AttachError> {
    let mut loader = EbpfLoader::new();
    let is_on = u32::from(flows.is_some());
    loader.override_global("trunk_device", &weir0, true).override_global("offload_is_on", &is_on, true);
    if let Some(mtu) = &mtu {
        loader.override_global("trunk_mtu", mtu, true);
    }
    for (map, .., entries) in offload_layout(flows) {
        loader.map_max_entries(map, entries);
    }
    let loaded = loader
        .btf(None)
        .default_map_pin_directory(pins.dir())
        .map_pin_path(SOCKETS, sockets)
        .load(object)
        .map_err(|source| AttachError::Load { object: name, source: Box::new(source) })?;
    for (map, kind, key, value, entries) in LAYOUT {
        check_layout(&pins.dir().join(map), map, (kind, key, value, entries))?;
    }
    check_layout(sockets, SOCKETS, (MapType::XskMap, 4, 4, MAX_QUEUES))?;
    Ok(loaded)
}

/// The loader adopts whatever is pinned under a map's name, so the kernel is asked what that is.
fn check_layout(path: &Path, name: &'static str, expected: (MapType, u32, u32, u32)) -> Result<(), AttachError> {
    let info = MapInfo::from_pin(path).map_err(map_error(name))?;
    let kind = info.map_type().map_err(map_error(name))?;
    if (kind, info.key_size(), info.value_size(), info.max_entries()) == expected {
        Ok(())
    } else {
        Err(AttachError::Layout { path: path.to_owned() })
    }
}

/// Takes a map out of a loaded object.
///
/// # Panics
/// Where the object has no such map: then the object is not the one that was built with this code.
pub(super) fn take<M: TryFrom<aya::maps::Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<M, AttachError> {
    object.take_map(name).expect("the objects carry all maps").try_into().map_err(map_error(name))
}

/// The sockets of a loaded object.
pub(super) fn take_sockets(object: &mut Ebpf) -> Result<aya::maps::XskMap<MapData>, AttachError> {
    take(object, SOCKETS)
}
