//! Records and devices that do not agree: found when a process starts, and looked for while it runs.

use std::{collections::BTreeMap, net::IpAddr};

use weir_cni::{
    CniError,
    wire::{Attachment, PodName},
};

use super::{Keeper, SUFFIX, failure, is_of, says_it_is_of};
use crate::{
    ipam::{
        disk::{Folder, Sync},
        record::{Freed, Phase, Record, VERSION},
    },
    pods::{
        LocalPod, PodsError, device_name,
        kernel::{Alias, HostEnd},
    },
};

impl Keeper {
    /// Puts files and devices in agreement when a process starts. Control is not asked: it learns of what is left.
    pub(super) fn load(&self, booted: u64) -> Result<(), PodsError> {
        let failed = |source| PodsError::State { path: self.settings.state.clone(), source };
        let now = (self.clock)();
        let ends: BTreeMap<String, HostEnd> =
            self.kernel.host_ends()?.into_iter().map(|end| (end.name.clone(), end)).collect();
        for (name, bytes) in self.disk.read(Folder::Freed).map_err(failed)? {
            match (name.parse::<IpAddr>(), serde_json::from_slice::<Freed>(&bytes)) {
                // A clock that was set back must not keep an address for years.
                (Ok(address), Ok(freed)) if freed.version == VERSION => {
                    self.state().pool.free(address, freed.at.min(now))
                }
                // That somebody had it just now is the careful reading.
                (Ok(address), _) => self.state().pool.free(address, now),
                _ => self.clean(Folder::Freed, &name),
            }
        }
        let mut records = Vec::new();
        for (name, bytes) in self.disk.read(Folder::Pods).map_err(failed)? {
            let attachment = name.strip_suffix(SUFFIX).and_then(Attachment::from_file_name);
            let record = serde_json::from_slice::<Record>(&bytes).ok().filter(|record| record.version == VERSION);
            match (record, attachment) {
                (Some(record), Some(attachment)) if record.attachment() == attachment => records.push(record),
                _ => {
                    tracing::error!(
                        "{name} in {} is no record; its device, if any, says what it was",
                        self.settings.state.display()
                    );
                    self.clean(Folder::Pods, &name);
                }
            }
        }
        // Of two that claim a device or an address, the younger has it.
        records.sort_by_key(|record| std::cmp::Reverse(record.since));
        let mut lost = Vec::new();
        for record in records {
            let lives = record.boot == self.boot && record.phase == Phase::Made && has_end(&ends, &record);
            let mut state = self.state();
            let claimed = state.records.values().any(|other| {
                other.pod.device == record.pod.device
                    || other.pod.addresses.iter().any(|address| record.pod.addresses.contains(address))
            });
            if lives && !claimed {
                for address in &record.pod.addresses {
                    state.pool.take(*address);
                }
                state.records.insert(record.attachment(), record);
            } else {
                lost.push(record);
            }
        }
        for record in lost {
            let another_boot = record.boot != self.boot;
            let why = match record.phase {
                _ if another_boot => "is of an earlier boot",
                Phase::Making => "was half made",
                Phase::Made => "has no device any more",
            };
            tracing::info!("pod {} ({}) {why}; its addresses are given back", record.pod, record.attachment());
            // No device outlives its boot: one of that name is another plugin's.
            let owned = self.state().records.values().any(|other| other.pod.device == record.pod.device);
            if !owned && !another_boot {
                self.remove_device(&record)?;
            }
            // Since when nobody has had them is known after a reboot: full nodes need not wait once more.
            let at = if another_boot { booted.max(record.since).min(now) } else { now };
            if let Err(error) = self.release(&record, at) {
                // The next start finds it once more. Nobody may have the addresses twice meanwhile.
                tracing::error!("that pod {} is gone cannot be kept, only remembered: {error}", record.pod);
                let mut state = self.state();
                for address in &record.pod.addresses {
                    if !state.records.values().any(|other| other.pod.addresses.contains(address)) {
                        state.pool.free(*address, at);
                    }
                }
            }
            self.state().mended += 1;
        }
        for end in ends.values() {
            let Some(alias) = &end.alias else { continue };
            if !self.state().records.contains_key(&alias.attachment) && self.kernel.host_end(&end.name)?.is_some() {
                self.recover(end, alias, now);
            }
        }
        Ok(())
    }

    /// Removes a file that says nothing. Where the disk cannot be written it stays: the router runs all the same, for the pods that there are.
    fn clean(&self, folder: Folder, name: &str) {
        if let Err(error) = self.disk.remove(folder, name, Sync::Later) {
            tracing::error!("{name} in {} cannot be removed: {error}", self.settings.state.display());
        }
    }

    /// Writes the record anew that a device must have had: it was lost, the pod lives.
    fn recover(&self, end: &HostEnd, alias: &Alias, now: u64) {
        tracing::error!(
            "{} is of {} and has no record in {}; it is taken over as it says it is",
            end.name,
            alias.attachment,
            self.settings.state.display()
        );
        let (namespace, name) = alias.pod.clone().unwrap_or_default();
        let record = Record {
            version: VERSION,
            phase: Phase::Made,
            network: String::new(),
            interface: alias.attachment.interface.clone(),
            boot: self.boot.clone(),
            since: now,
            mtu: end.mtu,
            pod: LocalPod {
                // Also where it has another name now.
                device: if name.is_empty() { end.name.clone() } else { device_name(&namespace, &name) },
                namespace,
                name,
                uid: None,
                sandbox: alias.attachment.sandbox.clone(),
                netns: None,
                mac: alias.mac,
                addresses: alias.addresses.clone(),
            },
        };
        if let Err(error) = self.keep(&record, Sync::Now) {
            tracing::error!("the record of pod {} is not kept, only remembered: {error}", record.pod);
        }
        let mut state = self.state();
        for address in &record.pod.addresses {
            state.pool.take(*address);
        }
        state.mended += 1;
        state.records.insert(alias.attachment.clone(), record);
    }

    /// To be called now and then: takes away pods whose device went with its namespace and of which no DEL came, what is half made and nobody
    /// works at, and what the queue holds.
    pub fn tend(&self) {
        self.drain();
        let ends = match self.kernel.host_ends() {
            Ok(ends) => ends,
            Err(error) => return tracing::warn!("pods are not looked after: {error}"),
        };
        let ends: BTreeMap<_, _> = ends.into_iter().map(|end| (end.name.clone(), end)).collect();
        let whole = |record: &Record| record.phase == Phase::Made && has_end(&ends, record);
        // Those that are made meanwhile seem half made; they are looked at once more, in their turn.
        let suspects: Vec<_> = self.state().records.values().filter(|record| !whole(record)).cloned().collect();
        for record in suspects {
            if let Err(error) = self.tend_to(&record) {
                tracing::warn!("pod {}: {error}", record.pod);
            }
        }
    }

    fn tend_to(&self, record: &Record) -> Result<(), CniError> {
        let attachment = record.attachment();
        let pod = PodName { namespace: record.pod.namespace.clone(), name: record.pod.name.clone(), uid: None };
        let _turn = self.turn(&attachment, Some(&pod))?;
        // Still so, now that nobody works at it?
        let there = self.end_of(record).map_err(|error| failure(CniError::TRY_AGAIN, error))?.is_some();
        let known = self.state().records.get(&attachment).cloned();
        match known {
            Some(known) if known.since == record.since && !(known.phase == Phase::Made && there) => {
                tracing::info!("pod {} went without a DEL ({attachment}); its addresses are given back", known.pod);
                self.state().mended += 1;
                self.take_away(&known)
            }
            _ => Ok(()),
        }
    }
}

/// Whether a record's host end is among these, by whatever name.
fn has_end(ends: &BTreeMap<String, HostEnd>, record: &Record) -> bool {
    ends.get(&record.pod.device).is_some_and(|end| is_of(end, record))
        || ends.values().any(|end| says_it_is_of(end, record))
}
