//! The maps of flows in the kernel.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, IterableMap as _, MapData, MapError},
};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};
use weir_packet::Mac;
use weir_sync::atomic::AtomicU64;

use super::{
    error::{AttachError, map_error},
    maps::{self, EPOCH, FlowName, KeyV4, KeyV6},
    pins::Pins,
};

use crate::{
    frame::IfIndex,
    offload::{
        flow::{Flow, Mapped, Phase},
        keeper::Keys,
        recipe::{Key, WayRecipe},
    },
};

/// The maps of flows in the kernel, of which an earlier process may have left some.
pub struct OffloadMaps {
    /// Slots for flows.
    pub flows: Mapped<Flow>,
    /// The publication in force.
    pub epoch: Mapped<AtomicU64>,
    /// What leads to the slots.
    pub keys: KernelKeys,
}

impl OffloadMaps {
    /// MAC addresses of pods as the process before knew them: device, IP address, MAC address. `left`: all keys ([`Keys::all`]).
    pub fn pods(&self, left: &[(Key, u32, u32)]) -> Vec<(IfIndex, IpAddr, Mac)> {
        let ways = left.iter().filter_map(|(key, way, serial)| {
            let flow = self.flows.get(*way as usize >> 1).filter(|flow| flow.state() == (*serial, Phase::Live))?;
            WayRecipe::read(&flow.ways[*way as usize & 1])?.pod(key)
        });
        ways.collect()
    }

    pub(super) fn take(object: &mut Ebpf, flows: u32, pins: &Pins) -> Result<Self, AttachError> {
        let array: Array<MapData, [u64; size_of::<Flow>() / 8]> = maps::take(object, "offload_flows")?;
        let epoch: Array<MapData, u64> = maps::take(object, EPOCH)?;
        Ok(Self {
            flows: Mapped::of_map(array.map().fd().as_fd().as_raw_fd(), flows as usize)
                .map_err(failed("offload_flows"))?,
            epoch: Mapped::of_map(epoch.map().fd().as_fd().as_raw_fd(), 1).map_err(failed(EPOCH))?,
            keys: KernelKeys {
                v4: FamilyKeys::take(object, "offload_v4", pins)?,
                v6: FamilyKeys::take(object, "offload_v6", pins)?,
            },
        })
    }
}

fn failed(name: &'static str) -> impl Fn(io::Error) -> AttachError {
    move |source| map_error(name)(MapError::IoError(source))
}

/// Keys in the kernel.
pub struct KernelKeys {
    v4: FamilyKeys<{ size_of::<KeyV4>() }>,
    v6: FamilyKeys<{ size_of::<KeyV6>() }>,
}

/// Those of one family.
struct FamilyKeys<const BYTES: usize> {
    map: HashMap<MapData, [u8; BYTES], FlowName>,
    /// The same map, for calls with many keys, which aya does not have.
    batches: MapHandle,
}

impl<const BYTES: usize> FamilyKeys<BYTES> {
    fn take(object: &mut Ebpf, name: &'static str, pins: &Pins) -> Result<Self, AttachError> {
        let batches = MapHandle::from_pinned_path(pins.dir().join(name)).map_err(io::Error::other);
        Ok(Self { map: maps::take(object, name)?, batches: batches.map_err(failed(name))? })
    }

    fn insert_all<'k>(&self, keys: impl Iterator<Item = (&'k [u8; BYTES], FlowName)>) -> io::Result<()> {
        let (keys, names): (Vec<_>, Vec<_>) = keys.map(|(key, name)| (*key, name.map(u32::to_ne_bytes))).unzip();
        let (count, names) = (keys.len() as u32, names.as_flattened().as_flattened());
        match count {
            0 => Ok(()),
            _ => self.batches.update_batch(keys.as_flattened(), names, count, MapFlags::ANY, MapFlags::ANY),
        }
        .map_err(io::Error::other)
    }

    fn all(&self) -> io::Result<Vec<([u8; BYTES], FlowName)>> {
        // libbpf-rs takes a batch that is not full for the last one, while the kernel ends each with a bucket of its hash map. So there
        // is one only, with room for all.
        let room = self.batches.max_entries();
        let batch = self.batches.lookup_batch(room, MapFlags::ANY, MapFlags::ANY).map_err(io::Error::other)?;
        let found = batch.filter_map(|(key, name)| {
            let [way, serial] = *name.as_chunks().0 else { return None };
            Some((key.try_into().ok()?, [way, serial].map(u32::from_ne_bytes)))
        });
        let all: Vec<_> = found.collect();
        // It tells no errors either: where there are keys all the same, they come one by one.
        if all.is_empty() { self.map.iter().map(|entry| entry.map_err(io_error)).collect() } else { Ok(all) }
    }
}

fn io_error(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(call) => call.io_error,
        error => io::Error::other(error),
    }
}

impl Keys for KernelKeys {
    fn insert(&mut self, key: &Key, way: u32, serial: u32) -> io::Result<()> {
        match key {
            Key::V4(key) => self.v4.map.insert(key, [way, serial], 0),
            Key::V6(key) => self.v6.map.insert(key, [way, serial], 0),
        }
        .map_err(io_error)
    }

    fn insert_all(&mut self, keys: &[(Key, u32, u32)]) -> io::Result<()> {
        self.v4.insert_all(keys.iter().filter_map(|(key, way, serial)| match key {
            Key::V4(key) => Some((key, [*way, *serial])),
            Key::V6(_) => None,
        }))?;
        self.v6.insert_all(keys.iter().filter_map(|(key, way, serial)| match key {
            Key::V6(key) => Some((key, [*way, *serial])),
            Key::V4(_) => None,
        }))
    }

    fn remove(&mut self, key: &Key, way: u32, serial: u32) {
        let name = [way, serial];
        // What is not there is gone already; and what a program finds by a key that stays is a slot that says no.
        let _ = match key {
            Key::V4(key) if self.v4.map.get(key, 0).is_ok_and(|found| found == name) => self.v4.map.remove(key),
            Key::V6(key) if self.v6.map.get(key, 0).is_ok_and(|found| found == name) => self.v6.map.remove(key),
            _ => Ok(()),
        };
    }

    fn all(&self) -> io::Result<Vec<(Key, u32, u32)>> {
        let v4 = self.v4.all()?.into_iter().map(|(key, [way, serial])| (Key::V4(key), way, serial));
        let v6 = self.v6.all()?.into_iter().map(|(key, [way, serial])| (Key::V6(key), way, serial));
        Ok(v4.chain(v6).collect())
    }
}
