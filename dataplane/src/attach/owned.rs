//! What weir owns, told to the programs.

use std::{
    collections::HashSet,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::Path,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};
use ipnet::IpNet;
use weir_packet::Protocol;

use super::{
    error::{AttachError, map_error},
    maps::{MAX_NODE_ADDRESSES, MAX_OWN_PORTS, MAX_PREFIXES, OwnPortV4, OwnPortV6, PORT_WORDS, take},
};

/// What uplinks take away from the node's kernel.
///
/// The node's own addresses are judged before the prefixes: one that is in both is a node address. Towards a node
/// address weir takes its ports, tunnel packets, ICMP (other than ND and MLD), fragments, and what has headers that the programs
/// do not find; towards the prefixes everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owned {
    /// Pods of this node, services, and tunnel addresses that are not the kernel's.
    pub prefixes: Vec<IpNet>,
    /// The node's own addresses.
    pub node_addresses: Vec<IpAddr>,
    /// Ports of the node's addresses: node ports, and those that weir gives to translated connections. TCP, UDP or
    /// SCTP.
    pub ports: Vec<(Protocol, RangeInclusive<u16>)>,
    /// Ports of the node's addresses that stay the kernel's in any case, also if owned.
    pub failsafe_ports: Vec<(Protocol, u16)>,
    /// What is weir's also where the node itself asks for it: node ports and host ports, each on one of the node's addresses, loopback ones
    /// among them. Those at failsafe ports stay the kernel's.
    pub own_ports: Vec<(IpAddr, Protocol, u16)>,
    /// Whether a host endpoint governs what the node itself gets: groups' and link-local addresses are the node's then. Where no router runs, fragments to the node then end: whether their ports
    /// are allowed, only the first of a packet could tell.
    pub governed: bool,
}

/// First word of the owned ports and of the failsafe ports in the bitmaps (`enum port_set` of `bpf/weir.h`).
const OWNED_SET: usize = 0;
const FAILSAFE_SET: usize = 1;
const PORT_PROTOCOLS: usize = 3;
const WORDS_PER_PROTOCOL: usize = 65_536 / 64;

type PortWords = Box<[u64]>;

pub(super) struct OwnedMaps {
    prefixes_v4: LpmTrie<MapData, [u8; 4], u32>,
    prefixes_v6: LpmTrie<MapData, [u8; 16], u32>,
    node_v4: HashMap<MapData, [u8; 4], u32>,
    node_v6: HashMap<MapData, [u8; 16], u32>,
    ports: Array<MapData, u64>,
    own_ports_v4: HashMap<MapData, OwnPortV4, u32>,
    own_ports_v6: HashMap<MapData, OwnPortV6, u32>,
    governed: Array<MapData, u64>,
}

impl OwnedMaps {
    pub(super) fn take(object: &mut Ebpf) -> Result<Self, AttachError> {
        Ok(Self {
            prefixes_v4: take(object, "prefixes_v4")?,
            prefixes_v6: take(object, "prefixes_v6")?,
            node_v4: take(object, "node_v4")?,
            node_v6: take(object, "node_v6")?,
            ports: take(object, "ports")?,
            own_ports_v4: take(object, "own_ports_v4")?,
            own_ports_v6: take(object, "own_ports_v6")?,
            governed: take(object, "governed")?,
        })
    }

    /// The maps of a running router, beside its own handles: to be read only.
    fn pinned(dir: &Path) -> Result<Self, AttachError> {
        fn of<M: TryFrom<Map, Error = MapError>>(
            dir: &Path,
            name: &'static str,
            kind: fn(MapData) -> Map,
        ) -> Result<M, AttachError> {
            let map = MapData::from_pin(dir.join(name)).map_err(map_error(name))?;
            kind(map).try_into().map_err(map_error(name))
        }
        Ok(Self {
            prefixes_v4: of(dir, "prefixes_v4", Map::LpmTrie)?,
            prefixes_v6: of(dir, "prefixes_v6", Map::LpmTrie)?,
            node_v4: of(dir, "node_v4", Map::HashMap)?,
            node_v6: of(dir, "node_v6", Map::HashMap)?,
            ports: of(dir, "ports", Map::Array)?,
            own_ports_v4: of(dir, "own_ports_v4", Map::HashMap)?,
            own_ports_v6: of(dir, "own_ports_v6", Map::HashMap)?,
            governed: of(dir, "governed", Map::Array)?,
        })
    }

    /// What the maps say, in their own form.
    fn read(&self) -> Result<(Wanted, bool), AttachError> {
        let said = Wanted {
            prefixes_v4: collect("prefixes_v4", self.prefixes_v4.keys().map(|key| key.map(plain)))?,
            prefixes_v6: collect("prefixes_v6", self.prefixes_v6.keys().map(|key| key.map(plain)))?,
            node_v4: collect("node_v4", self.node_v4.keys())?,
            node_v6: collect("node_v6", self.node_v6.keys())?,
            ports: self.read_ports()?,
            own_v4: collect("own_ports_v4", self.own_ports_v4.keys())?,
            own_v6: collect("own_ports_v6", self.own_ports_v6.keys())?,
        };
        Ok((said, self.governed.get(&0, 0).map_err(map_error("governed"))? != 0))
    }

    /// Makes the maps say `owned`. All that is new is added before anything is removed, so that what is owned before
    /// and after is owned at every moment between. On an error something of the old or the new may be left, never less
    /// than both share.
    pub(super) fn set(&mut self, owned: &Owned) -> Result<(), AttachError> {
        let wanted = Wanted::of(owned)?;
        let old_ports = self.read_ports()?;
        let old_node_v4 = collect("node_v4", self.node_v4.keys())?;
        let old_node_v6 = collect("node_v6", self.node_v6.keys())?;
        let old_own_v4 = collect("own_ports_v4", self.own_ports_v4.keys())?;
        let old_own_v6 = collect("own_ports_v6", self.own_ports_v6.keys())?;
        let old_prefixes_v4 = collect("prefixes_v4", self.prefixes_v4.keys().map(|key| key.map(plain)))?;
        let old_prefixes_v6 = collect("prefixes_v6", self.prefixes_v6.keys().map(|key| key.map(plain)))?;

        if owned.governed {
            self.set_governed(true)?;
        }
        // Ports before the addresses that they count for.
        for (word, (old, new)) in old_ports.iter().zip(&wanted.ports).enumerate() {
            self.write_ports(word, *old, old | new)?;
        }
        for address in wanted.node_v4.difference(&old_node_v4) {
            self.node_v4.insert(address, 1, 0).map_err(map_error("node_v4"))?;
        }
        for address in wanted.node_v6.difference(&old_node_v6) {
            self.node_v6.insert(address, 1, 0).map_err(map_error("node_v6"))?;
        }
        for &(bits, address) in wanted.prefixes_v4.difference(&old_prefixes_v4) {
            self.prefixes_v4.insert(&Key::new(bits, address), 1, 0).map_err(map_error("prefixes_v4"))?;
        }
        for &(bits, address) in wanted.prefixes_v6.difference(&old_prefixes_v6) {
            self.prefixes_v6.insert(&Key::new(bits, address), 1, 0).map_err(map_error("prefixes_v6"))?;
        }

        for port in wanted.own_v4.difference(&old_own_v4) {
            self.own_ports_v4.insert(port, 1, 0).map_err(map_error("own_ports_v4"))?;
        }
        for port in wanted.own_v6.difference(&old_own_v6) {
            self.own_ports_v6.insert(port, 1, 0).map_err(map_error("own_ports_v6"))?;
        }
        for port in old_own_v4.difference(&wanted.own_v4) {
            self.own_ports_v4.remove(port).map_err(map_error("own_ports_v4"))?;
        }
        for port in old_own_v6.difference(&wanted.own_v6) {
            self.own_ports_v6.remove(port).map_err(map_error("own_ports_v6"))?;
        }

        // An address that stops being the node's becomes a prefix's before that prefix goes.
        for address in old_node_v4.difference(&wanted.node_v4) {
            self.node_v4.remove(address).map_err(map_error("node_v4"))?;
        }
        for address in old_node_v6.difference(&wanted.node_v6) {
            self.node_v6.remove(address).map_err(map_error("node_v6"))?;
        }
        for &(bits, address) in old_prefixes_v4.difference(&wanted.prefixes_v4) {
            self.prefixes_v4.remove(&Key::new(bits, address)).map_err(map_error("prefixes_v4"))?;
        }
        for &(bits, address) in old_prefixes_v6.difference(&wanted.prefixes_v6) {
            self.prefixes_v6.remove(&Key::new(bits, address)).map_err(map_error("prefixes_v6"))?;
        }
        for (word, (old, new)) in old_ports.iter().zip(&wanted.ports).enumerate() {
            self.write_ports(word, old | new, *new)?;
        }
        self.set_governed(owned.governed)
    }

    fn set_governed(&mut self, governed: bool) -> Result<(), AttachError> {
        self.governed.set(0, u64::from(governed), 0).map_err(map_error("governed"))
    }

    fn read_ports(&self) -> Result<PortWords, AttachError> {
        (0..PORT_WORDS).map(|word| self.ports.get(&word, 0).map_err(map_error("ports"))).collect()
    }

    /// The kernel copies a value of eight bytes as one word, so that a program sees the old bits or the new.
    fn write_ports(&mut self, word: usize, old: u64, new: u64) -> Result<(), AttachError> {
        if old == new {
            return Ok(());
        }
        self.ports.set(word as u32, new, 0).map_err(map_error("ports"))
    }
}

/// An entry of a map that is there and should not be, or the other way round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongEntry {
    /// The map.
    pub map: &'static str,
    /// The entry: a prefix, an address, a port.
    pub entry: String,
    /// Whether the map has it.
    pub is_there: bool,
}

/// Reads the maps of the router with that pin folder back from the kernel, and compares them with what it owns. Takes as long as there are entries;
/// the router may go on meanwhile.
///
/// # Errors
/// Where a map cannot be read.
pub fn wrong_entries(pin_dir: &Path, owned: &Owned) -> Result<Vec<WrongEntry>, AttachError> {
    let (is, governed) = OwnedMaps::pinned(pin_dir)?.read()?;
    let should = Wanted::of(owned)?;
    let mut wrong = Vec::new();
    let net_v4 = |(bits, address): &(u32, [u8; 4])| format!("{}/{bits}", Ipv4Addr::from(*address));
    let net_v6 = |(bits, address): &(u32, [u8; 16])| format!("{}/{bits}", Ipv6Addr::from(*address));
    compare("prefixes_v4", &is.prefixes_v4, &should.prefixes_v4, net_v4, &mut wrong);
    compare("prefixes_v6", &is.prefixes_v6, &should.prefixes_v6, net_v6, &mut wrong);
    compare("node_v4", &is.node_v4, &should.node_v4, |one| Ipv4Addr::from(*one).to_string(), &mut wrong);
    compare("node_v6", &is.node_v6, &should.node_v6, |one| Ipv6Addr::from(*one).to_string(), &mut wrong);
    let own = |address: IpAddr, rest: &[u8]| {
        let port = u16::from_be_bytes([rest[0], rest[1]]);
        format!("{} {}", Protocol(rest[2]), SocketAddr::new(address, port))
    };
    let own_v4 = |key: &OwnPortV4| {
        let (address, rest) = key.split_at(4);
        own(<[u8; 4]>::try_from(address).map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::from), rest)
    };
    let own_v6 = |key: &OwnPortV6| {
        let (address, rest) = key.split_at(16);
        own(<[u8; 16]>::try_from(address).map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::from), rest)
    };
    compare("own_ports_v4", &is.own_v4, &should.own_v4, own_v4, &mut wrong);
    compare("own_ports_v6", &is.own_v6, &should.own_v6, own_v6, &mut wrong);
    for (word, (is, should)) in is.ports.iter().zip(&should.ports).enumerate() {
        let bits = (0..64_usize).filter(|bit| (is ^ should) >> bit & 1 == 1);
        wrong.extend(bits.map(|bit| {
            let row = word / WORDS_PER_PROTOCOL;
            let protocol = [Protocol::TCP, Protocol::UDP, Protocol::SCTP][row % PORT_PROTOCOLS];
            let port = word % WORDS_PER_PROTOCOL * 64 + bit;
            let set = if row / PORT_PROTOCOLS == FAILSAFE_SET { "failsafe " } else { "" };
            WrongEntry { map: "ports", entry: format!("{set}{protocol} {port}"), is_there: is >> bit & 1 == 1 }
        }));
    }
    if governed != owned.governed {
        wrong.push(WrongEntry {
            map: "governed",
            entry: "that a host endpoint governs".to_owned(),
            is_there: governed,
        });
    }
    Ok(wrong)
}

fn compare<K: Eq + Hash + Ord>(
    map: &'static str,
    is: &HashSet<K>,
    should: &HashSet<K>,
    name: impl Fn(&K) -> String,
    wrong: &mut Vec<WrongEntry>,
) {
    let mut entries: Vec<&K> = is.symmetric_difference(should).collect();
    entries.sort();
    wrong.extend(entries.into_iter().map(|key| WrongEntry { map, entry: name(key), is_there: is.contains(key) }));
}

/// [`Owned`] in the form of the maps.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    prefixes_v4: HashSet<(u32, [u8; 4])>,
    prefixes_v6: HashSet<(u32, [u8; 16])>,
    node_v4: HashSet<[u8; 4]>,
    node_v6: HashSet<[u8; 16]>,
    ports: PortWords,
    own_v4: HashSet<OwnPortV4>,
    own_v6: HashSet<OwnPortV6>,
}

impl Wanted {
    fn of(owned: &Owned) -> Result<Self, AttachError> {
        let mut wanted = Self {
            prefixes_v4: HashSet::new(),
            prefixes_v6: HashSet::new(),
            node_v4: HashSet::new(),
            node_v6: HashSet::new(),
            ports: vec![0; PORT_WORDS as usize].into_boxed_slice(),
            own_v4: HashSet::new(),
            own_v6: HashSet::new(),
        };
        for prefix in &owned.prefixes {
            match prefix.trunc() {
                IpNet::V4(net) => wanted.prefixes_v4.insert((net.prefix_len().into(), net.addr().octets())),
                IpNet::V6(net) => wanted.prefixes_v6.insert((net.prefix_len().into(), net.addr().octets())),
            };
        }
        for address in &owned.node_addresses {
            match address {
                IpAddr::V4(address) => wanted.node_v4.insert(address.octets()),
                IpAddr::V6(address) => wanted.node_v6.insert(address.octets()),
            };
        }
        for (protocol, range) in &owned.ports {
            for port in range.clone() {
                wanted.set_port(OWNED_SET, *protocol, port)?;
            }
        }
        for (protocol, port) in &owned.failsafe_ports {
            wanted.set_port(FAILSAFE_SET, *protocol, *port)?;
        }
        let failsafe: HashSet<_> = owned.failsafe_ports.iter().copied().collect();
        for &(address, protocol, port) in &owned.own_ports {
            if failsafe.contains(&(protocol, port)) {
                continue;
            }
            let [high, low] = port.to_be_bytes();
            let rest = [high, low, protocol.0, 0];
            match address {
                IpAddr::V4(address) => wanted.own_v4.insert(joined(&address.octets(), rest)),
                IpAddr::V6(address) => wanted.own_v6.insert(joined(&address.octets(), rest)),
            };
        }
        // The kernel holds the new beside the old for a moment; what does not even fit alone is refused before anything
        // is changed.
        fits("owned prefixes", wanted.prefixes_v4.len().max(wanted.prefixes_v6.len()), MAX_PREFIXES)?;
        fits("node addresses", wanted.node_v4.len().max(wanted.node_v6.len()), MAX_NODE_ADDRESSES)?;
        fits("ports of the node's addresses", wanted.own_v4.len().max(wanted.own_v6.len()), MAX_OWN_PORTS)?;
        Ok(wanted)
    }

    fn set_port(&mut self, set: usize, protocol: Protocol, port: u16) -> Result<(), AttachError> {
        let row = match protocol {
            Protocol::TCP => 0,
            Protocol::UDP => 1,
            Protocol::SCTP => 2,
            other => return Err(AttachError::Portless(other)),
        };
        let first = (set * PORT_PROTOCOLS + row) * WORDS_PER_PROTOCOL;
        self.ports[first + usize::from(port / 64)] |= 1 << (port % 64);
        Ok(())
    }
}

/// An address and what follows it in a map's key.
fn joined<const BYTES: usize>(address: &[u8], rest: [u8; 4]) -> [u8; BYTES] {
    let mut key = [0; BYTES];
    let (start, end) = key.split_at_mut(address.len());
    start.copy_from_slice(address);
    end.copy_from_slice(&rest);
    key
}

fn fits(what: &'static str, count: usize, max: u32) -> Result<(), AttachError> {
    let max = max as usize;
    if count <= max { Ok(()) } else { Err(AttachError::TooMany { what, count, max }) }
}

fn plain<A: Pod>(key: Key<A>) -> (u32, A) {
    (key.prefix_len(), key.data())
}

fn collect<K: Eq + Hash>(
    name: &'static str,
    keys: impl Iterator<Item = Result<K, MapError>>,
) -> Result<HashSet<K>, AttachError> {
    keys.collect::<Result<_, _>>().map_err(map_error(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_lie_where_the_program_looks_for_them() {
        let owned = Owned {
            ports: vec![(Protocol::TCP, 63..=64), (Protocol::SCTP, 65_535..=65_535)],
            failsafe_ports: vec![(Protocol::UDP, 68)],
            ..Owned::default()
        };
        let words = Wanted::of(&owned).unwrap().ports;
        let set: Vec<_> =
            words.iter().enumerate().filter(|(_, word)| **word != 0).map(|(i, word)| (i, *word)).collect();
        assert_eq!(set, [(0, 1 << 63), (1, 1), (2 * 1024 + 1023, 1 << 63), (4 * 1024 + 1, 1 << 4)]);
    }

    #[test]
    fn prefixes_lose_their_host_bits_and_count_once() {
        let prefixes = ["10.1.2.3/16", "10.1.0.0/16", "fd00::1/64"].map(|text| text.parse().unwrap());
        let wanted = Wanted::of(&Owned { prefixes: prefixes.to_vec(), ..Owned::default() }).unwrap();
        assert_eq!(wanted.prefixes_v4, HashSet::from([(16, [10, 1, 0, 0])]));
        let mut address = [0; 16];
        address[0] = 0xfd;
        assert_eq!(wanted.prefixes_v6, HashSet::from([(64, address)]));
    }

    #[test]
    fn own_ports_are_keys_as_the_program_makes_them() {
        let own = |address: &str, protocol, port| (address.parse().unwrap(), protocol, port);
        let owned = Owned {
            failsafe_ports: vec![(Protocol::TCP, 22)],
            own_ports: vec![
                own("192.0.2.1", Protocol::UDP, 0x1234),
                own("127.0.0.1", Protocol::TCP, 22),
                own("127.0.0.1", Protocol::UDP, 22),
                own("::1", Protocol::TCP, 80),
            ],
            ..Owned::default()
        };
        let wanted = Wanted::of(&owned).unwrap();
        assert_eq!(wanted.own_v4, HashSet::from([[192, 0, 2, 1, 0x12, 0x34, 17, 0], [127, 0, 0, 1, 0, 22, 17, 0]]));
        assert_eq!(wanted.own_v6, HashSet::from([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 80, 6, 0]]));
        let many = (0..=MAX_OWN_PORTS).map(|n| (IpAddr::from((0x0a00_0000 + n).to_be_bytes()), Protocol::TCP, 80));
        let refused = Wanted::of(&Owned { own_ports: many.collect(), ..Owned::default() });
        assert!(matches!(refused, Err(AttachError::TooMany { .. })));
    }

    #[test]
    fn ports_of_a_protocol_without_ports_are_refused() {
        let owned = Owned { ports: vec![(Protocol::ICMP, 1..=1)], ..Owned::default() };
        assert!(matches!(Wanted::of(&owned), Err(AttachError::Portless(Protocol::ICMP))));
    }
}
