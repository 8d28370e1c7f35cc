//! What happens to a packet, and why it was dropped.

use std::fmt;

/// A point in time on the dataplane's own clock: units of [`Tick::NS`] nanoseconds since the clock's start.
///
/// 32 bits of 10 ms wrap after 497 days; ages are computed modulo 2^32.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Tick(pub u32);

impl Tick {
    /// Length of a tick in nanoseconds.
    pub const NS: u64 = 10_000_000;
    /// Ticks of a second.
    pub const PER_SECOND: u32 = (1_000_000_000 / Self::NS) as u32;

    /// The tick that holds `ns` nanoseconds after the clock's start.
    #[inline]
    pub const fn from_ns(ns: u64) -> Self {
        Self((ns / Self::NS) as u32)
    }

    /// Ticks from `earlier` to this one; zero where `earlier` is later (clocks of two threads may differ by a tick).
    #[inline]
    pub const fn since(self, earlier: Self) -> u32 {
        let age = self.0.wrapping_sub(earlier.0);
        if age > u32::MAX / 2 { 0 } else { age }
    }
}

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Why a packet was dropped. The number is the index of its counter; the name is its metric,
        /// its word in traces, and its row in docs/COUNTERS.md.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])+ $name,)+ }

        impl DropReason {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The reason's name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// One sentence for operators.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

drop_reasons! {
    /// The frame is shorter than its headers say, or longer than a frame may be.
    Truncated,
    /// An IP header field is impossible: version, header length, total length, or an extension header chain.
    MalformedHeader,
    /// The IPv4 header checksum is wrong.
    BadHeaderChecksum,
    /// A source or destination address that may not appear on the wire: unspecified, loopback, multicast source, the node's own from outside.
    MartianAddress,
    /// The frame is for another MAC address, or carries unicast IP in a broadcast or multicast frame.
    WrongMac,
    /// A VLAN tag or an EtherType that weir does not carry, from a workload.
    UnknownEtherType,
    /// The device that the packet came from is not known, or not one that weir serves any more.
    UnknownDevice,
    /// A workload sent from an address that is not its own; a packet from outside has the address of a workload of this node, or that of another node's pods without the tunnel that these use; one that the node's kernel forwards has that of a pod elsewhere.
    SpoofedSource,
    /// A workload sent a tunnel packet (IPIP or VXLAN) of its own.
    WorkloadTunnel,
    /// An IPIP packet whose outer source is no known node of the cluster, or that is not for this node.
    TunnelUnknownPeer,
    /// An IPIP packet whose inner source does not belong to the node that sent it.
    TunnelForeignSource,
    /// An IPIP packet with another tunnel packet, or nothing valid, inside.
    TunnelNested,
    /// The packet may open no connection, or cannot be its connection's: outside the TCP window, impossible flags, a wrong checksum or SCTP tag.
    Invalid,
    /// An ICMP error about a packet of no known connection, or one that its connection cannot have sent.
    UnrelatedIcmpError,
    /// A packet to a service of which no backend is usable; it was answered by a reject.
    NoBackend,
    /// A packet to a service whose traffic policy is Local and whose usable backends are all on other nodes.
    NoLocalBackend,
    /// A packet to an address of a service, at a port that no service publishes there.
    UnpublishedPort,
    /// A packet to an address of the service range that no service has.
    UnallocatedServiceIp,
    /// A packet to a load balancer address from outside its source ranges.
    SourceRange,
    /// Egress policy of the source workload denied the connection.
    PolicyDeniedEgress,
    /// Ingress policy of the destination workload denied the connection.
    PolicyDeniedIngress,
    /// A policy of a host endpoint denied the packet.
    PolicyDeniedHostEndpoint,
    /// DefaultEndpointToHostAction denied a workload's packet to its own node.
    PolicyDeniedEndpointToHost,
    /// The workload's policy is not compiled yet, or its pod's object has not come yet, so that nobody knows which policy it has.
    PolicyNotReady,
    /// A connection whose backend is gone.
    BackendGone,
    /// A connection that was translated to an address of this node which the node has no more.
    AddressGone,
    /// No source port is left for the translated connection, nor one whose connection is over or has not proved itself.
    SnatExhausted,
    /// The connection table is full.
    TableFull,
    /// The TTL or hop limit ran out here.
    TtlExpired,
    /// The packet is larger than the next device's MTU and must not be fragmented.
    TooBig,
    /// There is no route to the destination.
    NoRoute,
    /// The destination is an address of this node's own pod range that no pod has, or that of a pod of this node that has no device.
    NoSuchPod,
    /// A blackhole route of the node's kernel leads there.
    RouteBlackhole,
    /// An unreachable route of the node's kernel leads there; it was answered by a reject.
    RouteUnreachable,
    /// A prohibit route of the node's kernel leads there; it was answered by a reject.
    RouteProhibited,
    /// The next hop's MAC address is not known, and too many packets wait for it, or waited for too long.
    NeighborUnresolved,
    /// A fragment that no sender makes: empty, not in units of eight bytes, past the largest packet, or of what is never fragmented.
    FragmentMalformed,
    /// A first fragment without its whole layer-4 header, or another that could overwrite that header.
    FragmentTiny,
    /// A fragment that overlaps another of its packet or contradicts where the packet ends; and all that follow.
    FragmentOverlap,
    /// A fragment that came a second time.
    FragmentDuplicate,
    /// A fragment whose first fragment did not come in time, or that found no room to wait for it; and the rest of its packet.
    FragmentOrphan,
    /// More packets pass in fragments at once, or one in more fragments, than weir follows.
    FragmentLimit,
    /// A first fragment of SCTP whose ports would change: its checksum covers all of the packet and cannot be updated.
    FragmentChecksum,
    /// Something that only a later release of weir carries.
    Unsupported,
    /// A link-local or link-scoped packet that is not forwarded.
    LinkScope,
    /// The transmit ring was full.
    TxRingFull,
    /// No free frame was left to make a packet in.
    NoFrame,
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = Self::ALL.len();

    /// Whether the reason is a policy's verdict.
    pub fn is_policy(self) -> bool {
        self.name().starts_with("Policy")
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_names_and_descriptions_line_up() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert!(!reason.description().is_empty());
            assert_eq!(format!("{reason:?}"), reason.name());
        }
        assert!(DropReason::PolicyDeniedIngress.is_policy());
        assert!(!DropReason::Invalid.is_policy());
    }

    #[test]
    fn ages_survive_wrapping_and_skew() {
        assert_eq!(Tick(5).since(Tick(u32::MAX)), 6);
        assert_eq!(Tick(5).since(Tick(6)), 0);
        assert_eq!(Tick::from_ns(25_000_000), Tick(2));
    }
}
