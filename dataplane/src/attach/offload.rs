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
use weir_sync::atomic::AtomicU64;

use super::{
    AttachError,
    maps::{self, EPOCH, FlowName, KeyV4, KeyV6, map_error},
};
use weir_packet::Mac;

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
    /// MAC addresses of pods as the process before knew them: device, IP address, MAC address.
    pub fn pods(&self) -> Vec<(IfIndex, IpAddr, Mac)> {
        let Ok(keys) = self.keys.all() else { return Vec::new() };
        let ways = keys.iter().filter_map(|(key, way, serial)| {
            let flow = self.flows.get(*way as usize >> 1).filter(|flow| flow.state() == (*serial, Phase::Live))?;
            WayRecipe::read(&flow.ways[*way as usize & 1])?.pod(key)
        });
        ways.collect()
    }

    pub(super) fn take(object: &mut Ebpf, flows: u32) -> Result<Self, AttachError> {
        let array: Array<MapData, [u64; size_of::<Flow>() / 8]> = maps::take(object, "offload_flows")?;
        let epoch: Array<MapData, u64> = maps::take(object, EPOCH)?;
        let failed = |name| move |source: io::Error| map_error(name)(MapError::IoError(source));
        Ok(Self {
            flows: Mapped::of_map(array.map().fd().as_fd().as_raw_fd(), flows as usize)
                .map_err(failed("offload_flows"))?,
            epoch: Mapped::of_map(epoch.map().fd().as_fd().as_raw_fd(), 1).map_err(failed(EPOCH))?,
            keys: KernelKeys { v4: maps::take(object, "offload_v4")?, v6: maps::take(object, "offload_v6")? },
        })
    }
}

/// Keys in the kernel.
pub struct KernelKeys {
    v4: HashMap<MapData, KeyV4, FlowName>,
    v6: HashMap<MapData, KeyV6, FlowName>,
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
            Key::V4(key) => self.v4.insert(key, [way, serial], 0),
            Key::V6(key) => self.v6.insert(key, [way, serial], 0),
        }
        .map_err(io_error)
    }

    fn remove(&mut self, key: &Key, way: u32, serial: u32) {
        let name = [way, serial];
        // What is not there is gone already; and what a program finds by a key that stays is a slot that says no.
        let _ = match key {
            Key::V4(key) if self.v4.get(key, 0).is_ok_and(|found| found == name) => self.v4.remove(key),
            Key::V6(key) if self.v6.get(key, 0).is_ok_and(|found| found == name) => self.v6.remove(key),
            _ => Ok(()),
        };
    }

    fn all(&self) -> io::Result<Vec<(Key, u32, u32)>> {
        let mut all = Vec::new();
        for entry in self.v4.iter() {
            let (key, [way, serial]) = entry.map_err(io_error)?;
            all.push((Key::V4(key), way, serial));
        }
        for entry in self.v6.iter() {
            let (key, [way, serial]) = entry.map_err(io_error)?;
            all.push((Key::V6(key), way, serial));
        }
        Ok(all)
    }
}
