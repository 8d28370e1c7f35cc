//! What the programs are to do with the packets of a connection: worked out from the connection and the tables of one moment.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use weir_conntrack::ConnRef;
use weir_packet::{Address, Direction, FlowKey, Mac, Protocol};
use weir_sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::flow::{Flow, Way};
use crate::{
    decide,
    forwarding::{AdjacencyId, Encapsulation, RouteKind, Routed, host_source},
    frame::IfIndex,
    model::Role,
    next_hops,
    origin::Origin,
    rejudge::{self, Rejudged},
    snapshot::Snapshot,
};

/// A key of the programs' maps: addresses, ports, device and protocol, as `bpf/offload.h` lays them out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Key {
    /// `flow_key_v4`.
    V4([u8; 20]),
    /// `flow_key_v6`.
    V6([u8; 44]),
}

impl Key {
    fn new<A: Address>(key: &FlowKey<A>, device: IfIndex) -> Self {
        let mut bytes = [0; 44];
        let at = 2 * A::BYTES;
        key.src.write(&mut bytes);
        key.dst.write(&mut bytes[A::BYTES..]);
        bytes[at..at + 4].copy_from_slice(&key.ports.word().to_ne_bytes());
        bytes[at + 4..at + 8].copy_from_slice(&device.0.to_ne_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&u32::from(key.protocol.0).to_ne_bytes());
        if A::WORDS == 1 { Self::V4(*bytes.first_chunk().expect("20 of 44 bytes")) } else { Self::V6(bytes) }
    }

    /// Whether it is the key of packets with these addresses, ports and protocol, by whatever device they come.
    pub fn is_of<A: Address>(&self, key: &FlowKey<A>) -> bool {
        let bytes: &[u8] = match self {
            Self::V4(bytes) => bytes,
            Self::V6(bytes) => bytes,
        };
        let device = bytes[bytes.len() - 8..].first_chunk().expect("eight bytes");
        *self == Self::new(key, IfIndex(u32::from_ne_bytes(*device)))
    }
}

/// How a way's packets leave; the numbers are those of `bpf/offload.h`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// Not at all: they go to a worker.
    Closed = 0,
    /// Into the pod at the other end of the device (`bpf_redirect_peer`).
    Peer = 1,
    /// By the device.
    Device = 2,
    /// Into the node's own kernel.
    Host = 3,
}

/// What is done with the packets of one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WayRecipe {
    device: u32,
    destination: Mac,
    source: Mac,
    mtu: u16,
    exit: Exit,
    translates: bool,
    ports: u32,
    address_difference: u32,
    port_difference: u32,
    comes_from: u32,
    tunnel: [u32; 2],
    addresses: [[u32; 4]; 2],
}

/// What is done with the packets of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recipe {
    /// What its packets are known by, by direction.
    pub keys: [Key; 2],
    ways: [WayRecipe; 2],
    has_windows: bool,
}

/// Why a connection stays with the workers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stays {
    /// It ended, or is to be judged again, or its packets come from where they should not.
    Unsettled,
    /// Its backend drains: a worker is to see each packet of it.
    Drains,
    /// An end of it is not where the programs can send to.
    Elsewhere,
    /// The next hop's MAC address is not known at the moment.
    Unresolved,
}

/// What the programs are to do with a connection's packets, by the tables of `snapshot`. `near`: devices whose other end is not in another
/// network namespace.
///
/// # Errors
/// Where it stays with the workers.
pub fn of_connection<A: Routed>(
    conn: &ConnRef<'_, A>,
    snapshot: &Snapshot,
    near: &BTreeSet<u32>,
) -> Result<Recipe, Stays> {
    match rejudge::outlook(conn, snapshot) {
        Rejudged::Keep => {}
        Rejudged::Drains => return Err(Stays::Drains),
        Rejudged::Cut(_) | Rejudged::Gone(_) | Rejudged::Reset(_) | Rejudged::Anew => return Err(Stays::Unsettled),
    }
    // What untracked policy lets go belongs to no connection, whatever its key.
    if snapshot.rules.host.has_untracked() {
        return Err(Stays::Elsewhere);
    }
    let keys = [Direction::Original, Direction::Reply].map(|direction| conn.key(direction));
    let hop = |direction: Direction| {
        let adjacency = next_hops::find(conn, direction, &snapshot.forwarding).ok_or(Stays::Unsettled)?;
        exit::<A>(snapshot, adjacency, keys[direction.flip() as usize].src)
    };
    let (forth, back) = (hop(Direction::Original)?, hop(Direction::Reply)?);
    // Replies come from where the original direction's packets go.
    let arrives_by = [IfIndex(conn.device()), forth.device];
    let mut has_pod = false;
    for (key, device) in keys.iter().zip(arrives_by) {
        let (origin, device) = Origin::of(device, &snapshot.forwarding).ok_or(Stays::Unsettled)?;
        decide::check_source(snapshot, origin, key).map_err(|_| Stays::Unsettled)?;
        match origin {
            Origin::Workload(_) => has_pod = true,
            // Its policy may be about packets of which no connection tells.
            Origin::Uplink if snapshot.forwarding.device(device).host_endpoint.is_some() => {
                return Err(Stays::Elsewhere);
            }
            Origin::Forwarded { .. } => return Err(Stays::Elsewhere),
            Origin::Uplink | Origin::Host => {}
        }
    }
    // Between uplinks workers are as fast, or faster.
    if !has_pod || arrives_by[0] != back.device {
        return Err(Stays::Elsewhere);
    }
    // Who never answered may answer something else than what it was asked: a worker is to see that.
    let is_open = [true, conn.seen_reply()];
    let way = |direction: Direction, hop: &Hop, opposite: &Hop| {
        let from = &keys[direction as usize];
        let to = keys[direction.flip() as usize].invert();
        let exit = match () {
            () if !is_open[direction as usize] => Exit::Closed,
            () if hop.kind == RouteKind::Host => Exit::Host,
            // From what leaves by weir0, as the node's own packets do, there is no way into another namespace.
            () if hop.kind == RouteKind::Workload
                && opposite.kind != RouteKind::Host
                && !near.contains(&hop.device.0) =>
            {
                Exit::Peer
            }
            () => Exit::Device,
        };
        WayRecipe {
            device: hop.device.0,
            destination: hop.destination,
            source: hop.source,
            mtu: hop.mtu,
            exit,
            translates: to != *from,
            ports: to.ports.word(),
            address_difference: difference(words(from.src).chain(words(from.dst)), words(to.src).chain(words(to.dst))),
            port_difference: difference([from.ports.word()], [to.ports.word()]),
            // Who is answered through a tunnel comes through it.
            comes_from: opposite.tunnel[1],
            tunnel: hop.tunnel,
            addresses: [to.src, to.dst].map(|address| {
                let mut padded = [0; 4];
                padded.iter_mut().zip(words(address)).for_each(|(to, from)| *to = from);
                padded
            }),
        }
    };
    Ok(Recipe {
        keys: [Key::new(&keys[0], arrives_by[0]), Key::new(&keys[1], arrives_by[1])],
        ways: [way(Direction::Original, &forth, &back), way(Direction::Reply, &back, &forth)],
        has_windows: conn.protocol() == Protocol::TCP,
    })
}

struct Hop {
    device: IfIndex,
    kind: RouteKind,
    tunnel: [u32; 2],
    destination: Mac,
    source: Mac,
    mtu: u16,
}

/// Where packets to `destination` leave that have this next hop.
fn exit<A: Routed>(snapshot: &Snapshot, adjacency: AdjacencyId, destination: A) -> Result<Hop, Stays> {
    let forwarding = &*snapshot.forwarding;
    let adjacency = forwarding.adjacency(adjacency);
    let Some(device) = adjacency.device.map(|id| forwarding.device(id)) else { return Err(Stays::Elsewhere) };
    if device.role == Role::Kernel {
        return Err(Stays::Elsewhere);
    }
    if adjacency.kind == RouteKind::Host {
        let destination = adjacency.mac.ok_or(Stays::Unresolved)?;
        return Ok(Hop {
            device: IfIndex::HOST,
            kind: RouteKind::Host,
            tunnel: [0; 2],
            destination,
            source: host_source(destination),
            mtu: u16::MAX,
        });
    }
    // An unspecified next hop stands for the destination itself, on the link.
    let next_hop = if adjacency.next_hop.is_unspecified() { destination.to_ip() } else { adjacency.next_hop };
    let mac = adjacency.mac.or_else(|| forwarding.neighbor(device.index, next_hop));
    Ok(Hop {
        device: device.index,
        kind: adjacency.kind,
        tunnel: match adjacency.encapsulation {
            Encapsulation::None => [0; 2],
            Encapsulation::Ipip { src, dst } => [src.words()[0], dst.words()[0]],
        },
        destination: mac.ok_or(Stays::Unresolved)?,
        source: device.mac,
        mtu: adjacency.mtu.min(u32::from(u16::MAX)) as u16,
    })
}

fn words<A: Address>(address: A) -> impl Iterator<Item = u32> {
    let words = address.words();
    (0..A::WORDS).map(move |at| words.as_ref()[at])
}

/// By how much the one's complement sum grows when these words take the place of those (RFC 1624, equation 3): 32 bits that the kernel's
/// `csum_add` takes.
fn difference(old: impl IntoIterator<Item = u32>, new: impl IntoIterator<Item = u32>) -> u32 {
    let sum = old.into_iter().map(|word| !word).chain(new).map(u64::from).sum::<u64>();
    let folded = (sum & 0xffff_ffff) + (sum >> 32);
    ((folded & 0xffff_ffff) + (folded >> 32)) as u32
}

impl Recipe {
    /// Writes it into a slot that no program reads.
    pub fn write(&self, flow: &Flow) {
        flow.has_windows.store(self.has_windows.into(), Ordering::Relaxed);
        self.ways.iter().zip(&flow.ways).for_each(|(recipe, way)| recipe.write(way));
    }

    /// Whether it is what a slot has.
    pub fn is_written(&self, flow: &Flow) -> bool {
        flow.has_windows.load(Ordering::Relaxed) == u8::from(self.has_windows)
            && self.ways.iter().zip(&flow.ways).all(|(recipe, way)| WayRecipe::read(way).as_ref() == Some(recipe))
    }
}

impl WayRecipe {
    /// The pod that packets with that key are given to: the device, its IP and MAC address.
    pub fn pod(&self, key: &Key) -> Option<(IfIndex, IpAddr, Mac)> {
        let [_, to] = self.addresses;
        let address = match key {
            Key::V4(_) => Ipv4Addr::from_words([to[0]]).to_ip(),
            Key::V6(_) => Ipv6Addr::from_words(to).to_ip(),
        };
        (self.exit == Exit::Peer).then_some((IfIndex(self.device), address, self.destination))
    }

    /// What a slot has; `None` where it is not understood.
    pub fn read(way: &Way) -> Option<Self> {
        let word = |place: &AtomicU32| place.load(Ordering::Relaxed);
        let mac = |start: usize| Mac(std::array::from_fn(|at| way.ethernet[start + at].load(Ordering::Relaxed)));
        let exit = match way.exit.load(Ordering::Relaxed) {
            0 => Exit::Closed,
            1 => Exit::Peer,
            2 => Exit::Device,
            3 => Exit::Host,
            _ => return None,
        };
        Some(Self {
            device: word(&way.device),
            destination: mac(0),
            source: mac(6),
            mtu: way.mtu.load(Ordering::Relaxed),
            exit,
            translates: way.translates.load(Ordering::Relaxed) != 0,
            ports: word(&way.ports),
            comes_from: word(&way.comes_from),
            tunnel: std::array::from_fn(|at| word(&way.tunnel[at])),
            address_difference: word(&way.address_difference),
            port_difference: word(&way.port_difference),
            addresses: std::array::from_fn(|at| std::array::from_fn(|number| word(&way.addresses[at][number]))),
        })
    }

    fn write(&self, way: &Way) {
        let byte = |place: &AtomicU8, value: u8| place.store(value, Ordering::Relaxed);
        let word = |place: &AtomicU32, value: u32| place.store(value, Ordering::Relaxed);
        word(&way.device, self.device);
        let macs = self.destination.0.into_iter().chain(self.source.0);
        way.ethernet.iter().zip(macs).for_each(|(place, value)| byte(place, value));
        way.mtu.store(self.mtu, Ordering::Relaxed);
        byte(&way.exit, self.exit as u8);
        byte(&way.translates, self.translates.into());
        word(&way.comes_from, self.comes_from);
        way.tunnel.iter().zip(self.tunnel).for_each(|(place, value)| word(place, value));
        word(&way.ports, self.ports);
        word(&way.address_difference, self.address_difference);
        word(&way.port_difference, self.port_difference);
        let places = way.addresses.iter().flatten();
        places.zip(self.addresses.iter().flatten()).for_each(|(place, value)| word(place, *value));
    }
}
