//! How much of the source ports of masqueraded connections is in use, by address.
//!
//! # What
//! One port of an address serves as many connections as there are destinations, so the number of an address's connections does not say
//! how near it is to exhaustion. What does is the destination (address, port, protocol) to which most of them go: when all usable ports are
//! in use towards that one, the next connection there ends as [`weir_packet::DropReason::SnatExhausted`].
//!
//! # How
//! It is read from the connection table when somebody asks, on a thread of its own ([`weir_conntrack::Table::entry`], which disturbs no
//! worker). Counters kept by the workers would cost each insertion and removal a line that all of them write, would have to know the
//! destinations, and be a second record that may disagree with the table.
//!
//! # Bounds
//! A read of each connection's line, once. Memory for [`COUNTED`] destinations, by Misra and Gries, "Finding repeated elements", 1982: where
//! one more finds no room, all counts are lowered by one, and those at zero make room. So a count is exact while there are no more
//! destinations than that, and never too small by more than a `COUNTED`th of the connections.

use std::collections::HashMap;

use serde_json::{Value, json};
use weir_conntrack::{Entry, PRIVILEGED, Table};
use weir_dataplane::tables::Tables;
use weir_packet::{Address, Protocol, Tick};

/// Destinations that are counted at once.
const COUNTED: usize = 4096;

/// Where connections of a masquerade address go to, after DNAT: each of them has a port of its own there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Destination<A> {
    protocol: Protocol,
    address: A,
    /// Its port, or the type of ICMP's replies.
    port: u16,
}

/// What is in use of one family.
struct Use<A: Address> {
    /// By masquerade address.
    connections: HashMap<A, u64>,
    /// By masquerade address and destination.
    destinations: HashMap<(A, Destination<A>), u64>,
}

/// What is shown of a masquerade address.
struct Row<A> {
    address: A,
    connections: u64,
    /// The destination to which most of them go, and how many: so many ports are in use there.
    busiest: Option<(Destination<A>, u64)>,
}

/// Whether an entry's source was translated: to another address, or, for the node's own kernel, to another port of its own.
fn is_masqueraded<A: Address>(entry: &Entry<A>) -> bool {
    let to = entry.reply.invert();
    to.src != entry.original.src
        || entry.attributes.flags & PRIVILEGED != 0 && to.ports.source() != entry.original.ports.source()
}

impl<A: Address> Use<A> {
    fn new() -> Self {
        Self { connections: HashMap::new(), destinations: HashMap::with_capacity(COUNTED) }
    }

    fn read(table: &Table<A>, now: Tick) -> Self {
        let mut all = Self::new();
        table.for_each(now, |entry| {
            if is_masqueraded(entry) {
                all.add(entry);
            }
        });
        all
    }

    fn add(&mut self, entry: &Entry<A>) {
        let reply = entry.reply;
        *self.connections.entry(reply.dst).or_default() += 1;
        let port = match reply.protocol {
            protocol if protocol.has_ports() => reply.ports.source(),
            protocol if protocol.has_identifier(reply.ports.destination()) => reply.ports.destination(),
            _ => return,
        };
        let key = (reply.dst, Destination { protocol: reply.protocol, address: reply.src, port });
        if let Some(count) = self.destinations.get_mut(&key) {
            *count += 1;
        } else if self.destinations.len() < COUNTED {
            self.destinations.insert(key, 1);
        } else {
            self.destinations.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
        }
    }

    /// The addresses in order.
    fn rows(&self) -> Vec<Row<A>> {
        let mut busiest: HashMap<A, (u64, Destination<A>)> = HashMap::new();
        for ((address, destination), count) in &self.destinations {
            let candidate = (*count, *destination);
            let most = busiest.entry(*address).or_insert(candidate);
            *most = candidate.max(*most);
        }
        let row = |(address, connections): (&A, &u64)| Row {
            address: *address,
            connections: *connections,
            busiest: busiest.get(address).map(|(ports, destination)| (*destination, *ports)),
        };
        let mut rows: Vec<_> = self.connections.iter().map(row).collect();
        rows.sort_unstable_by_key(|row| row.address);
        rows
    }
}

/// The masquerade addresses of both families' connections, as `weir status` shows them.
pub fn of_both(tables: &Tables, now: Tick) -> Value {
    [addresses(&tables.v4, now), addresses(&tables.v6, now)].concat().into()
}

fn addresses<A: Address>(table: &Table<A>, now: Tick) -> Vec<Value> {
    let row = |row: Row<A>| {
        let busiest = row.busiest.map(|(destination, ports)| {
            json!({
                "proto": destination.protocol.to_string(), "dst": destination.address.to_ip(),
                "dport": destination.port, "portsInUse": ports,
            })
        });
        json!({"address": row.address.to_ip(), "connections": row.connections, "busiest": busiest})
    };
    Use::read(table, now).rows().into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use weir_conntrack::{Attributes, Insert, NewConn, Observed, TableConfig, TcpSettings, Timeouts};
    use weir_packet::{FlowKey, Ports};
    use weir_sync::Domain;

    use super::*;

    fn key<A: Address>(protocol: Protocol, src: u128, dst: u128, ports: (u16, u16)) -> FlowKey<A> {
        let [src, dst] = [src, dst].map(A::from_bits128);
        FlowKey { src, dst, ports: Ports::new(ports.0, ports.1), protocol }
    }

    const POD: u128 = 0x0a00_0001;
    const NODE: u128 = 0xc0a8_0a01;
    const TUNNEL: u128 = 0x0a00_0100;
    const OUTSIDE: u128 = 0xac14_0001;

    fn shown<A: Address>() -> Vec<Value> {
        let domain = Domain::new();
        let mut participant = domain.join();
        let (timeouts, tcp) = (Timeouts::default(), TcpSettings::default());
        let table = Table::<A>::new(TableConfig { max_entries: 1024, seed: [1, 2], timeouts, tcp }, domain);
        let (mut handle, turn) = (table.handle(), participant.enter());
        let mut insert = |original: FlowKey<A>, to: FlowKey<A>, flags| {
            let attributes = Attributes { flags, ..Attributes::default() };
            let new = NewConn { original, reply: to.invert(), attributes, first: Observed::default() };
            assert!(matches!(table.insert(&mut handle, new, Tick(0), &turn), Insert::Inserted(_)));
        };
        let udp = Protocol::UDP;
        for i in 0..7 {
            insert(key(udp, POD, OUTSIDE, (1000 + i, 53)), key(udp, NODE, OUTSIDE, (10_000 + i, 53)), 0);
        }
        for i in 0..3 {
            insert(key(udp, POD, OUTSIDE, (1000 + i, 443)), key(udp, NODE, OUTSIDE, (10_000 + i, 443)), 0);
            // Not translated; translated at the destination only.
            insert(key(udp, POD, OUTSIDE + 1, (1000 + i, 53)), key(udp, POD, OUTSIDE + 1, (1000 + i, 53)), 0);
            insert(key(udp, POD, 1, (1000 + i, 53)), key(udp, POD, OUTSIDE + 2, (1000 + i, 53)), 0);
        }
        let echo = if A::BITS == 32 { (Protocol::ICMP, 8) } else { (Protocol::ICMPV6, 128) };
        for i in 0..2 {
            insert(key(echo.0, POD, OUTSIDE, (i, echo.1)), key(echo.0, TUNNEL, OUTSIDE, (i + 7, echo.1)), 0);
        }
        insert(key(Protocol(47), POD, OUTSIDE, (0, 0)), key(Protocol(47), NODE, OUTSIDE, (0, 0)), 0);
        // The node's own, to a service: another port of the same address.
        insert(key(udp, NODE, 2, (40_000, 53)), key(udp, NODE, OUTSIDE, (10_007, 53)), PRIVILEGED);
        // A pod's whose port clashed: its own address has nothing to exhaust.
        insert(key(udp, POD, 2, (1000, 53)), key(udp, POD, OUTSIDE + 2, (10_000, 53)), 0);
        addresses(&table, Tick(0))
    }

    #[test]
    fn addresses_and_their_busiest_destinations() {
        assert_eq!(
            shown::<Ipv4Addr>(),
            [
                json!({"address": "10.0.1.0", "connections": 2,
                       "busiest": {"proto": "icmp", "dst": "172.20.0.1", "dport": 0, "portsInUse": 2}}),
                json!({"address": "192.168.10.1", "connections": 12,
                       "busiest": {"proto": "udp", "dst": "172.20.0.1", "dport": 53, "portsInUse": 8}}),
            ]
        );
        assert_eq!(
            shown::<Ipv6Addr>(),
            [
                json!({"address": "::a00:100", "connections": 2,
                       "busiest": {"proto": "icmpv6", "dst": "::ac14:1", "dport": 129, "portsInUse": 2}}),
                json!({"address": "::c0a8:a01", "connections": 12,
                       "busiest": {"proto": "udp", "dst": "::ac14:1", "dport": 53, "portsInUse": 8}}),
            ]
        );
    }

    #[test]
    fn a_busy_destination_is_found_among_more_than_are_counted() {
        let mut all = Use::<Ipv4Addr>::new();
        let template = {
            let domain = Domain::new();
            let mut participant = domain.join();
            let (timeouts, tcp) = (Timeouts::default(), TcpSettings::default());
            let table = Table::<Ipv4Addr>::new(TableConfig { max_entries: 1, seed: [1, 2], timeouts, tcp }, domain);
            let (mut handle, turn) = (table.handle(), participant.enter());
            let original = key(Protocol::UDP, POD, OUTSIDE, (1, 53));
            let new = NewConn {
                original,
                reply: original.invert(),
                attributes: Attributes::default(),
                first: Observed::default(),
            };
            assert!(matches!(table.insert(&mut handle, new, Tick(0), &turn), Insert::Inserted(_)));
            table.entry(0, Tick(0)).expect("the one connection")
        };
        let mut to = |number: u32| {
            let reply = FlowKey { src: Ipv4Addr::from(number), dst: Ipv4Addr::from(NODE as u32), ..template.reply };
            all.add(&Entry { reply, ..template });
        };
        // One in five goes to one destination, all others each to another one.
        const ALL: u32 = 200_000;
        for number in 0..ALL {
            to(if number % 5 == 0 { u32::MAX } else { number });
        }
        assert!(all.destinations.len() <= COUNTED);
        let [Row { address, connections, busiest: Some((busiest, ports)) }] = all.rows()[..] else {
            panic!("one address")
        };
        assert_eq!((address, connections, busiest.address), (Ipv4Addr::from(NODE as u32), ALL.into(), u32::MAX.into()));
        let (exact, bound) = (u64::from(ALL / 5), u64::from(ALL) / COUNTED as u64 + 1);
        assert!((exact - bound..=exact).contains(&ports), "{ports} of {exact}");
    }
}
