//! The straight way: what nearly all packets are, in one function that does all or nothing.
//!
//! # Theory
//! *What.* A whole TCP or UDP packet without IP options, of a connection that exists, was judged by this very generation and is only followed
//! on (no first answer, no SYN, FIN or RST), that comes from where its connection's packets come from, with a TTL that lasts, to a next hop whose
//! MAC address is known and which it fits. [`forward`] asks for all of that and, only then, writes: to the connection, and to the packet.
//! To everything else it says no, and the general way ([`super`]) handles the packet from its beginning.
//!
//! *Why.* The general way learns much that is of no use here: offsets, origins, who owns an address. The same answers are in the connection and
//! in its two next hops.
//!
//! *Invariant.* What goes straight would have come out of the general way as the same bytes by the same device, with the same effects on
//! connection and counters. So no rule is written here alone, and leaving this file out changes nothing but the time that packets take:
//! dataplane/tests/all/two_ways.rs sends the same packets through two workers, one of which never goes straight. Who adds a question to the general way
//! asks whether a packet of a judged connection can fail it; if so, it is asked here too, or its connections are given no next hop that
//! this way takes ([`next_hops::words`]).
//!
//! | the general way asks | and here |
//! |---|---|
//! | the device is known and has an origin | it is the connection's, or that of the answers' next hop, in tables of one generation |
//! | the frame was for this node | the link type |
//! | headers are sane | [`weir_packet::glance`] |
//! | addresses may be on the wire and are forwarded | no connection has other keys, but for answers from addresses that may not: [`next_hops::words`] |
//! | a pod of another node is heard through its tunnel | no answers go into a tunnel by the device that the packet came by, unless it came in one, or is for the node |
//! | who sent a tunnel packet owns its source | it is the peer of the tunnel that answers go into ([`Hop::is_peer_known`]) |
//! | untracked policy | nothing that comes by an uplink goes straight where there is any |
//! | the source is where it should be, policy, service | the device; the generation |
//! | the layer-4 checksum, where the packet may change a state | no such packet goes straight |
//! | windows, states | [`weir_conntrack::ConnRef::track_ordinary`], [`weir_conntrack::ConnRef::track_repeated`] |
//! | TTL, MTU, MAC address | themselves |
//!
//! # A burst
//! Three loops, so that memory is asked for some packets before it is read: [`see`] looks at the headers and asks for the buckets;
//! [`fetch`] finds candidates in them and asks for the connections; then [`go`] and, where it says no, the general way handle one packet
//! after the other, in the order in which they came.
//!
//! *How it is written.* What is put together on several paths and merged (an enum, an `Option` that is mapped) costs 30 to 60 instructions here:
//! each arm pushes or returns by itself.

use std::net::{Ipv4Addr, Ipv6Addr};

use weir_conntrack::{Candidate, Hash, Observed};
use weir_packet::{
    Address, Direction, FlowKey, Protocol,
    glance::{Glance, TunnelEnds, glance_ipip, glance_ipv4, glance_ipv6},
    options::TcpOptions,
    rewrite,
};

use super::{context::Context, forward::hops_from};
use crate::{
    driver::PortId,
    frame::{LinkType, Packet},
    model::Role,
    next_hops,
    snapshot::Snapshot,
    tables::Family,
};

const ETHERNET_BYTES: usize = 14;
const TUNNELLED_BYTES: usize = ETHERNET_BYTES + 20;

/// What the first look at a packet has found.
#[derive(Debug)]
pub(crate) enum Seen {
    /// An IPv4 packet.
    V4(Header<Ipv4Addr>),
    /// An IPv4 packet in another, with that one's addresses.
    Tunnelled(Header<Ipv4Addr>, TunnelEnds),
    /// An IPv6 packet.
    V6(Header<Ipv6Addr>),
    /// None that goes straight.
    Other,
}

const _: () = assert!(size_of::<Seen>() <= 64);

impl Seen {
    /// Whether the packet seems to have no connection.
    pub(super) fn is_miss(&self) -> bool {
        match self {
            Self::V4(header) | Self::Tunnelled(header, _) => header.miss().is_some(),
            Self::V6(header) => header.miss().is_some(),
            Self::Other => true,
        }
    }
}

/// Of a packet that may go straight.
#[derive(Debug)]
pub(crate) struct Header<A: Address> {
    glance: Glance<A>,
    hash: Hash,
    candidate: Candidate,
}

/// First loop: looks at the headers, and asks for the buckets of their flows. One is seen of each packet.
pub(crate) fn see(burst: &[Packet], seen: &mut Vec<Seen>, context: &Context<'_>) {
    let has_untracked = context.snapshot.rules.host.has_untracked();
    for packet in burst {
        look(packet, has_untracked, seen, context);
    }
    debug_assert_eq!(seen.len(), burst.len());
}

#[inline(always)]
fn look(packet: &Packet, has_untracked: bool, seen: &mut Vec<Seen>, context: &Context<'_>) {
    let (start, bytes) = (packet.bytes(), packet.total_bytes());
    // As far as what tells which header follows.
    let Some(headers) = start.first_chunk::<24>() else { return seen.push(Seen::Other) };
    if packet.link != LinkType::Host || has_untracked && is_from_uplink(packet, context.snapshot) {
        return seen.push(Seen::Other);
    }
    match (u16::from_be_bytes([headers[12], headers[13]]), Protocol(headers[23])) {
        (Ipv4Addr::ETHERTYPE, Protocol::IPIP) => {
            if let Some((glance, ends)) = glance_ipip(start, bytes) {
                return seen.push(Seen::Tunnelled(Header::new(glance, context), ends));
            }
        }
        (Ipv4Addr::ETHERTYPE, _) => {
            if let Some(glance) = glance_ipv4(start, bytes) {
                return seen.push(Seen::V4(Header::new(glance, context)));
            }
        }
        (Ipv6Addr::ETHERTYPE, _) => {
            if let Some(glance) = glance_ipv6(start, bytes) {
                return seen.push(Seen::V6(Header::new(glance, context)));
            }
        }
        _ => {}
    }
    seen.push(Seen::Other);
}

/// Whether untracked policy may be about a packet.
#[cold]
fn is_from_uplink(packet: &Packet, snapshot: &Snapshot) -> bool {
    let forwarding = &snapshot.forwarding;
    forwarding.device_by_index(packet.device).is_none_or(|id| forwarding.device(id).role == Role::Uplink)
}

impl<A: Family> Header<A> {
    #[inline(always)]
    fn new(glance: Glance<A>, context: &Context<'_>) -> Self {
        let table = A::table(context.tables);
        let hash = table.hash(&glance.key);
        table.prefetch(hash);
        Self { glance, hash, candidate: Candidate::NONE }
    }

    /// Asks for its connection's lines; whether there are any.
    #[inline(always)]
    fn fetch(&mut self, context: &Context<'_>) -> bool {
        let table = A::table(context.tables);
        self.candidate = table.candidate(self.hash, context.turn);
        table.prefetch_candidate(self.candidate, self.glance.key.protocol)
    }

    /// Its flow, if that has no connection, most likely.
    #[inline]
    pub(super) fn miss(&self) -> Option<&FlowKey<A>> {
        self.candidate.is_none().then_some(&self.glance.key)
    }
}

/// Second loop: by now the buckets have arrived, so that the connections' own lines can be asked for. How many seem to have none.
pub(crate) fn fetch(seen: &mut [Seen], context: &Context<'_>) -> usize {
    let mut misses = 0;
    for seen in seen {
        let has_connection = match seen {
            Seen::V4(header) | Seen::Tunnelled(header, _) => header.fetch(context),
            Seen::V6(header) => header.fetch(context),
            Seen::Other => false,
        };
        if !has_connection {
            misses += 1;
        }
    }
    misses
}

/// Sends a packet on, where it goes straight: the port to put it out by. `None`, and nothing is changed, where it does not.
#[inline(always)]
pub(crate) fn go(packet: &mut Packet, seen: &Seen, tunnel_id: &mut u16, context: &Context<'_>) -> Option<PortId> {
    match seen {
        Seen::V4(header) => forward::<_, ETHERNET_BYTES>(packet, header, None, tunnel_id, context),
        Seen::Tunnelled(header, ends) => forward::<_, TUNNELLED_BYTES>(packet, header, Some(*ends), tunnel_id, context),
        Seen::V6(header) => forward::<_, ETHERNET_BYTES>(packet, header, None, tunnel_id, context),
        Seen::Other => None,
    }
}

/// `L3`: where its own IP header is.
#[inline(always)]
fn forward<A: Family, const L3: usize>(
    packet: &mut Packet,
    header: &Header<A>,
    tunnel: Option<TunnelEnds>,
    tunnel_id: &mut u16,
    context: &Context<'_>,
) -> Option<PortId> {
    let Header { glance, candidate, .. } = header;
    let (key, snapshot, now) = (&glance.key, context.snapshot, context.now);
    let (conn, direction) = A::table(context.tables).expected(*candidate, key, now, context.turn)?;
    if conn.generation() != snapshot.generation {
        return None;
    }
    let hop = next_hops::straight(conn, direction, snapshot)?;
    let hops = hops_from(packet.device);
    if glance.ttl <= hops || u32::from(glance.ip_bytes) > hop.fits_bytes {
        return None;
    }
    let comes_from = match direction {
        Direction::Original => conn.device(),
        Direction::Reply => next_hops::straight(conn, Direction::Original, snapshot)?.device.0,
    };
    if packet.device.0 != comes_from {
        return None;
    }
    let back = next_hops::straight(conn, direction.flip(), snapshot)?;
    if let Some(ends) = tunnel {
        if !back.is_peer_known || back.device != packet.device || back.headers.ends() != Some(ends.swapped()) {
            return None;
        }
    } else if back.headers.count() > ETHERNET_BYTES as u16
        && back.device == packet.device
        && !snapshot.forwarding.is_direct(key.dst)
    {
        // Its answers go into a tunnel, so it should have come in one.
        return None;
    }
    // Padding is only cut off a first frame here.
    if packet.has_tail() && packet.total_bytes() != L3 + usize::from(glance.ip_bytes) {
        return None;
    }
    if packet.headroom() + (L3 as u16) < hop.headers.count() {
        return None;
    }

    // The last question, whose answer changes the connection. What the programs have moved is taken over before, and once more by the general
    // way where the answer is no, which then moves nothing.
    let ip = &mut packet.bytes_mut()[L3..];
    if let Some(offload) = context.offload {
        offload.take_windows(&conn, direction);
    }
    let is_followed = if key.protocol == Protocol::TCP {
        let (tcp, options) = glance.tcp(ip);
        // SACK is the general way's: asked here, what most segments do not have costs them one comparison.
        if !options.is_empty() && TcpOptions::read(options, &tcp).sack.is_some() {
            return None;
        }
        let segment = Observed {
            tcp_flags: tcp.flags,
            tcp_seq: tcp.seq,
            tcp_ack: tcp.ack,
            tcp_window: tcp.window,
            payload_bytes: tcp.payload_bytes,
            ..Observed::NOTHING
        };
        conn.track_ordinary(direction, &segment, now)
    } else {
        conn.track_repeated(direction, now)
    };
    if !is_followed {
        return None;
    }
    if let Some(offload) = context.offload {
        offload.consider(&conn, direction);
    }

    rewrite::forward_plain(ip, key, &conn.leaves_with(direction, key.protocol), hops);
    packet.replace_front(L3 as u16, hop.headers.count(), glance.ip_bytes);
    hop.headers.write(packet.bytes_mut(), glance.ip_bytes, glance.tos, || {
        // Only to tell the fragments of packets apart, which DF forbids (RFC 6864, 4.1): any number will do.
        *tunnel_id = tunnel_id.wrapping_add(1);
        *tunnel_id
    });
    packet.device = hop.device;
    Some(hop.port)
}
