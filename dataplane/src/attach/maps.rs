//! Loading the programs, and the layout of the maps that they share with the router.

use std::path::Path;

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{MapData, MapError, MapInfo, MapType},
};

use super::{AttachError, pins::Pins};

/// Queues of one device (`MAX_QUEUES` of `bpf/weir.h`).
pub(super) const MAX_QUEUES: u32 = 256;
/// Workloads of one router.
pub(super) const MAX_WORKLOADS: u32 = 4096;
/// Addresses of the node, of each family.
pub(super) const MAX_NODE_ADDRESSES: u32 = 4096;
/// Owned prefixes, of each family.
pub(super) const MAX_PREFIXES: u32 = 262_144;
/// Words of the port bitmaps: two sets, three protocols.
pub(super) const PORT_WORDS: u32 = 2 * 3 * 65_536 / 64;

/// A workload's entry: the MAC address of its host end, whether its peer lies in another namespace, and a zero.
pub(super) type WorkloadEntry = [u8; 8];

const SOCKETS: &str = "sockets";

/// Name, type, bytes of key and value, entries of each shared map. A pinned map that differs is of another version.
const LAYOUT: [(&str, MapType, u32, u32, u32); 8] = [
    ("counters", MapType::PerCpuArray, 4, 8, 64),
    ("workloads", MapType::Hash, 4, size_of::<WorkloadEntry>() as u32, MAX_WORKLOADS),
    ("prefixes_v4", MapType::LpmTrie, 8, 4, MAX_PREFIXES),
    ("prefixes_v6", MapType::LpmTrie, 20, 4, MAX_PREFIXES),
    ("node_v4", MapType::Hash, 4, 4, MAX_NODE_ADDRESSES),
    ("node_v6", MapType::Hash, 16, 4, MAX_NODE_ADDRESSES),
    ("ports", MapType::Array, 4, 8, PORT_WORDS),
    ("identity", MapType::Array, 4, 8, 1),
];

/// The trunk's programs, to send to the device `weir0`.
pub(super) fn load_trunk(pins: &Pins, weir0: u32) -> Result<Ebpf, AttachError> {
    let object = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/trunk.bpf.o"));
    let mut loader = EbpfLoader::new();
    loader.override_global("trunk_device", &weir0, true);
    load(loader, "trunk", object, pins, &pins.trunk_sockets())
}

/// The program of one uplink, with that uplink's own sockets.
pub(super) fn load_uplink(pins: &Pins, index: u32) -> Result<Ebpf, AttachError> {
    let object = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/uplink.bpf.o"));
    load(EbpfLoader::new(), "uplink", object, pins, &pins.uplink_sockets(index))
}

fn load<'a>(
    mut loader: EbpfLoader<'a>,
    name: &'static str,
    object: &[u8],
    pins: &Pins,
    sockets: &'a Path,
) -> Result<Ebpf, AttachError> {
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

/// Names the map in an error.
pub(super) fn map_error(name: &'static str) -> impl Fn(MapError) -> AttachError {
    move |source| AttachError::Map { name, source: Box::new(source) }
}
