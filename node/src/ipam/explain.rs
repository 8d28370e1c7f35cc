//! What `weir ipam show` and `weir ipam check` say: each address, and each leak.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs, io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::Path,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    Pool,
    disk::{Disk, Folder, StateFolder},
    record::{Freed, NodeFile, Phase, Record, VERSION},
};
use crate::pods::{
    keeper::NODE_FILE,
    kernel::{HostEnd, Kernel, NodeKernel},
};

/// Everything that there is to say about a node's addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The node's name; empty where no router has run yet.
    pub node_name: String,
    /// Its ranges.
    pub ranges: Vec<RangeUse>,
    /// Addresses that pods have or had, in order. All others are free.
    pub addresses: Vec<Address>,
    /// What is wrong.
    pub leaks: Vec<Leak>,
    /// What could not be looked at.
    pub notes: Vec<String>,
}

/// How much of a range is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangeUse {
    /// The range.
    pub net: IpNet,
    /// Addresses that can be given at all; as text, because IPv6's are more than JSON's numbers are exact for.
    pub usable: String,
    /// Addresses that pods have.
    pub in_use: usize,
    /// Addresses that cool down.
    pub cooling: usize,
    /// Addresses that are left out: the node's own, and those of pods that another plugin made.
    pub left_out: Vec<IpAddr>,
}

/// An address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// What it is.
    #[serde(flatten)]
    pub state: AddressState,
    /// The pod that has it or had it, as namespace/name; empty where only its sandbox is known.
    pub pod: String,
    /// That pod's sandbox.
    pub sandbox: String,
}

/// What an address is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "state", rename_all_fields = "camelCase")]
pub enum AddressState {
    /// A pod has it.
    InUse {
        /// The host end.
        device: String,
        /// Since when, in milliseconds since 1970.
        since: u64,
        /// Whether the pod is complete.
        complete: bool,
    },
    /// A pod had it a short time ago.
    Cooling {
        /// Until when it is not given, in milliseconds since 1970.
        until: u64,
    },
    /// A pod had it; it can be given again.
    Free {
        /// When that pod gave it back, in milliseconds since 1970.
        since: u64,
    },
}

/// Something that keeps an address from being given, or lets one be given twice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leak {
    /// The address, where it is one.
    pub address: Option<IpAddr>,
    /// What is wrong, and what mends it.
    pub what: String,
}

/// Reads a state folder that no router has to use. Devices are looked at where this process is in the pods' namespace.
///
/// # Errors
/// Where the folder cannot be read.
pub fn explain(state: &Path, now: u64) -> io::Result<Report> {
    if !state.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "there is no such folder; has weir made pods on this node?",
        ));
    }
    let disk = StateFolder::existing(state);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let here = fs::metadata("/proc/thread-self/ns/net")?.ino();
    let same = node_file(&disk)?.is_some_and(|node| node.netns == here);
    let ends = same.then(|| NodeKernel.host_ends());
    let (ends, note) = match ends {
        Some(Ok(ends)) => (Some(ends), None),
        Some(Err(error)) => (None, Some(format!("devices were not looked at: {error}"))),
        None => (
            None,
            Some("devices were not looked at: the pods' are in another network namespace than this command".to_owned()),
        ),
    };
    let mut report = report(&disk, ends.as_deref(), boot.trim(), now)?;
    report.notes.extend(note);
    Ok(report)
}

fn node_file(disk: &dyn Disk) -> io::Result<Option<NodeFile>> {
    let files = disk.read(Folder::Node)?;
    let bytes = files.iter().find(|(name, _)| name == NODE_FILE).map(|(_, bytes)| bytes);
    Ok(bytes.and_then(|bytes| serde_json::from_slice::<NodeFile>(bytes).ok()).filter(|node| node.version == VERSION))
}

/// Makes a report of what the files say and, where they are known, the devices.
///
/// # Errors
/// Where the files cannot be read.
pub fn report(disk: &dyn Disk, ends: Option<&[HostEnd]>, boot: &str, now: u64) -> io::Result<Report> {
    let mut leaks = BTreeSet::new();
    let mut notes = Vec::new();
    let node = node_file(disk)?.unwrap_or_else(|| {
        notes.push("the node's ranges are not known: no router has said them yet".to_owned());
        NodeFile::default()
    });
    let mut leak = |address: Option<IpAddr>, what: String| {
        leaks.insert(Leak { address, what });
    };

    let mut addresses: BTreeMap<IpAddr, Address> = BTreeMap::new();
    for (name, bytes) in disk.read(Folder::Freed)? {
        let freed = serde_json::from_slice::<Freed>(&bytes).ok().filter(|freed| freed.version == VERSION);
        let (Ok(address), Some(freed)) = (name.parse::<IpAddr>(), freed) else {
            leak(
                name.parse().ok(),
                format!("freed/{name} cannot be read; the next start of weir takes it as given back then"),
            );
            continue;
        };
        let until = freed.at.min(now).saturating_add(node.cool_down);
        let state = if until > now { AddressState::Cooling { until } } else { AddressState::Free { since: freed.at } };
        addresses.insert(address, Address { address, state, pod: freed.pod, sandbox: freed.sandbox });
    }
    let mut records = Vec::new();
    for (name, bytes) in disk.read(Folder::Pods)? {
        match serde_json::from_slice::<Record>(&bytes).ok().filter(|record| record.version == VERSION) {
            Some(record) => records.push(record),
            None => leak(
                None,
                format!("pods/{name} cannot be read; the next start of weir looks at its device, and removes it"),
            ),
        }
    }
    for record in &records {
        let pod = &record.pod;
        let named = if pod.name.is_empty() { format!("sandbox {}", pod.sandbox) } else { format!("pod {pod}") };
        for address in &pod.addresses {
            let state = AddressState::InUse {
                device: pod.device.clone(),
                since: record.since,
                complete: record.phase == Phase::Made,
            };
            let (name, sandbox) =
                (if pod.name.is_empty() { String::new() } else { pod.to_string() }, pod.sandbox.clone());
            let before = addresses.insert(*address, Address { address: *address, state, pod: name, sandbox });
            if let Some(before) = before.filter(|before| matches!(before.state, AddressState::InUse { .. })) {
                let other = if before.pod.is_empty() { before.sandbox } else { before.pod };
                leak(Some(*address), format!("{named} and {other} both have it; delete one of them"));
            }
            if !node.pod_cidrs.is_empty() && !node.pod_cidrs.iter().any(|net| net.contains(address)) {
                leak(
                    Some(*address),
                    format!("{named} has it, and it is in no pod CIDR of this node any more; delete the pod"),
                );
            }
        }
        let address = pod.addresses.first().copied();
        if record.boot != boot {
            leak(address, format!("{named} is of an earlier boot; the next start of weir gives its addresses back"));
        } else if let Some(ends) = ends {
            let attachment = record.attachment();
            // One that says whose it is may have another name by now.
            let is_its = |end: &HostEnd| match &end.alias {
                Some(alias) => alias.attachment == attachment,
                None => end.name == pod.device,
            };
            if record.phase == Phase::Made && !ends.iter().any(is_its) {
                leak(
                    address,
                    format!(
                        "{named} has no device {} any more, and no DEL of sandbox {} came; a running weir gives its addresses back within a minute",
                        pod.device, pod.sandbox
                    ),
                );
            }
        }
    }
    for end in ends.unwrap_or_default() {
        let Some(alias) = &end.alias else { continue };
        if !records.iter().any(|record| record.attachment() == alias.attachment) {
            leak(
                alias.addresses.first().copied(),
                format!(
                    "{} is of {} and has no record; the next start of weir takes it over",
                    end.name, alias.attachment
                ),
            );
        }
    }

    let ranges = node.pod_cidrs.iter().map(|net| {
        let count = |wanted: fn(&AddressState) -> bool| {
            addresses.values().filter(|address| net.contains(&address.address) && wanted(&address.state)).count()
        };
        RangeUse {
            net: *net,
            usable: Pool::size_of(net).to_string(),
            in_use: count(|state| matches!(state, AddressState::InUse { .. })),
            cooling: count(|state| matches!(state, AddressState::Cooling { .. })),
            left_out: node.left_out.iter().filter(|address| net.contains(*address)).copied().collect(),
        }
    });
    Ok(Report {
        ranges: ranges.collect(),
        node_name: node.node_name.clone(),
        addresses: addresses.into_values().collect(),
        leaks: leaks.into_iter().collect(),
        notes,
    })
}

impl Report {
    /// For a person: ranges, then a line for each address.
    pub fn text(&self, now: u64) -> String {
        let mut text = String::new();
        for range in &self.ranges {
            let _ = write!(
                text,
                "{}: {} in use, {} cooling down, of {}",
                range.net, range.in_use, range.cooling, range.usable
            );
            let left_out: Vec<_> = range.left_out.iter().map(IpAddr::to_string).collect();
            let _ = match left_out.is_empty() {
                true => writeln!(text),
                false => writeln!(text, "; left out: {}", left_out.join(", ")),
            };
        }
        let width = self.addresses.iter().map(|address| address.address.to_string().len()).max().unwrap_or(0);
        for address in &self.addresses {
            let pod = if address.pod.is_empty() { "a pod whose name is lost" } else { &address.pod };
            let sandbox: String = address.sandbox.chars().take(13).collect();
            let _ = match &address.state {
                AddressState::InUse { device, since, complete } => writeln!(
                    text,
                    "{:<width$}  in use   {pod}, {device}, sandbox {sandbox}, since {} ago{}",
                    address.address,
                    ago(*since, now),
                    if *complete { "" } else { ", being made" }
                ),
                AddressState::Cooling { until } => writeln!(
                    text,
                    "{:<width$}  cooling  for {} more, after {pod}, sandbox {sandbox}",
                    address.address,
                    ago(now, *until)
                ),
                AddressState::Free { since } => writeln!(
                    text,
                    "{:<width$}  free     since {} ago, before {pod}, sandbox {sandbox}",
                    address.address,
                    ago(*since, now)
                ),
            };
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }

    /// For a person: a line for each leak.
    pub fn leaks_text(&self) -> String {
        let mut text = String::new();
        for leak in &self.leaks {
            let _ = match leak.address {
                Some(address) => writeln!(text, "{address}: {}", leak.what),
                None => writeln!(text, "{}", leak.what),
            };
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }
}

/// A span of time, in its two largest units at most.
fn ago(from: u64, to: u64) -> String {
    let seconds = to.saturating_sub(from).div_ceil(1000);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}
