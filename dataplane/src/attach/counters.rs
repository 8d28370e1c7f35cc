//! What the kernel's programs count.

use aya::maps::{MapData, PerCpuArray};

use super::error::{AttachError, map_error};

/// A counter of the programs; `bpf/counters.h` has the same in the same order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u32)]
pub enum Counter {
    /// Frames of workloads and of the node's kernel, given to a worker's socket. The socket may still have no room for
    /// one: its own statistics tell.
    TrunkTaken,
    /// The same, dropped: no router runs.
    TrunkUnclaimed,
    /// Frames that workloads sent, put into the trunk. One with segmentation offload counts once and arrives as
    /// several.
    WorkloadSent,
    /// Frames given to workloads.
    DeliveredWorkload,
    /// Frames given to the node's kernel.
    DeliveredHost,
    /// Frames for a device that is no workload (any longer): dropped.
    DeliveredNowhere,
    /// Frames of uplinks that are the kernel's.
    UplinkPassed,
    /// Frames of uplinks that are the kernel's because of a failsafe port.
    UplinkPassedFailsafe,
    /// Taken from an uplink: the destination lies in an owned prefix.
    UplinkTakenPrefix,
    /// Taken from an uplink: an owned port of the node.
    UplinkTakenPort,
    /// Taken from an uplink: a tunnel packet for the node.
    UplinkTakenTunnel,
    /// Taken from an uplink: ICMP for the node.
    UplinkTakenIcmp,
    /// Taken from an uplink: a fragment for the node.
    UplinkTakenFragment,
    /// Of those taken, dropped: no router runs, or no worker has that queue.
    UplinkUnclaimedDropped,
    /// Of those taken, left to the kernel for the same reason.
    UplinkUnclaimedPassed,
    /// Packets of workloads that the kernel carried, of flows that workers have handed over. One with segmentation offload counts once.
    Offloaded,
    /// Packets of such flows left to the workers: no plain data, or larger than where they go takes.
    OffloadUnusual,
    /// Packets of such flows left to the workers: something was published since that concerns them.
    OffloadStale,
    /// Frames of uplinks of such flows, left to the kernel to be merged before they are carried.
    UplinkMerged,
    /// Packets of such flows lost: the kernel had no memory to change them.
    OffloadFailed,
    /// What the node's own processes sent to node ports and host ports of the node itself, put into the trunk.
    LoopbackTaken,
    /// Taken from an uplink: for the node, with headers that the programs do not find or that are not whole.
    UplinkTakenUnread,
    /// Frames of uplinks, dropped: behind more priority tags (VLAN id 0) than are looked through.
    UplinkTagsDropped,
    /// What devices that are no uplinks received for frontends on the node's addresses, put into the trunk.
    DeviceTaken,
    /// What servers of the node answered to what weir has translated for them, put into the trunk on its way out.
    AnswerTaken,
}

impl Counter {
    /// All of them, in the order of their slots.
    pub const ALL: [Self; 25] = [
        Self::TrunkTaken,
        Self::TrunkUnclaimed,
        Self::WorkloadSent,
        Self::DeliveredWorkload,
        Self::DeliveredHost,
        Self::DeliveredNowhere,
        Self::UplinkPassed,
        Self::UplinkPassedFailsafe,
        Self::UplinkTakenPrefix,
        Self::UplinkTakenPort,
        Self::UplinkTakenTunnel,
        Self::UplinkTakenIcmp,
        Self::UplinkTakenFragment,
        Self::UplinkUnclaimedDropped,
        Self::UplinkUnclaimedPassed,
        Self::Offloaded,
        Self::OffloadUnusual,
        Self::OffloadStale,
        Self::UplinkMerged,
        Self::OffloadFailed,
        Self::LoopbackTaken,
        Self::UplinkTakenUnread,
        Self::UplinkTagsDropped,
        Self::DeviceTaken,
        Self::AnswerTaken,
    ];

    /// Its name in metrics, in snake case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TrunkTaken => "trunk_taken",
            Self::TrunkUnclaimed => "trunk_unclaimed",
            Self::WorkloadSent => "workload_sent",
            Self::DeliveredWorkload => "delivered_workload",
            Self::DeliveredHost => "delivered_host",
            Self::DeliveredNowhere => "delivered_nowhere",
            Self::UplinkPassed => "uplink_passed",
            Self::UplinkPassedFailsafe => "uplink_passed_failsafe",
            Self::UplinkTakenPrefix => "uplink_taken_prefix",
            Self::UplinkTakenPort => "uplink_taken_port",
            Self::UplinkTakenTunnel => "uplink_taken_tunnel",
            Self::UplinkTakenIcmp => "uplink_taken_icmp",
            Self::UplinkTakenFragment => "uplink_taken_fragment",
            Self::UplinkUnclaimedDropped => "uplink_unclaimed_dropped",
            Self::UplinkUnclaimedPassed => "uplink_unclaimed_passed",
            Self::Offloaded => "offloaded",
            Self::OffloadUnusual => "offload_unusual",
            Self::OffloadStale => "offload_stale",
            Self::UplinkMerged => "uplink_merged",
            Self::OffloadFailed => "offload_failed",
            Self::LoopbackTaken => "loopback_taken",
            Self::UplinkTakenUnread => "uplink_taken_unread",
            Self::UplinkTagsDropped => "uplink_tags_dropped",
            Self::DeviceTaken => "device_taken",
            Self::AnswerTaken => "answer_taken",
        }
    }
}

/// The counters at one moment, in frames since the pins were made: they survive a restart of the router.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters([u64; Counter::ALL.len()]);

impl Counters {
    /// One counter.
    pub const fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize]
    }

    /// All counters by name.
    pub fn iter(&self) -> impl Iterator<Item = (Counter, u64)> + '_ {
        Counter::ALL.into_iter().map(|counter| (counter, self.get(counter)))
    }

    pub(super) fn read(map: &PerCpuArray<MapData, u64>) -> Result<Self, AttachError> {
        let mut counters = Self::default();
        for counter in Counter::ALL {
            let by_cpu = map.get(&(counter as u32), 0).map_err(map_error("counters"))?;
            counters.0[counter as usize] = by_cpu.iter().fold(0, |sum, count| sum.wrapping_add(*count));
        }
        Ok(counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_count_under_the_same_names_in_the_same_order() {
        let header: Vec<String> = include_str!("../../bpf/counters.h")
            .lines()
            .filter_map(|line| line.trim().strip_prefix("COUNTER_")?.strip_suffix(','))
            .map(str::to_ascii_lowercase)
            .collect();
        assert_eq!(header, Counter::ALL.map(Counter::name));
        for (slot, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, slot);
        }
    }
}
