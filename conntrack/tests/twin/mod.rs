//! Operations on the table and on a dull twin of hash maps: [`run`] does them on both, and compares everything after each.
//!
//! Shared by the property test beside it and by the fuzz target `table` (fuzz/fuzz_targets/table.rs).

use std::collections::HashMap;

use weir_conntrack::{
    Attributes, Candidate, ConnId, Entry, Hit, Identity, Insert, Lifecycle, NewConn, OFFLOADED, Observed, PRIVILEGED,
    Table, TableConfig, TcpSettings, Timeouts, Tracked,
};
use weir_packet::{Address, Direction, FlowKey, Ports, Protocol, Tick};
use weir_sync::Domain;

/// Connections of the table under test: few, to meet a full table.
const CAPACITY: u32 = 6;
/// Keys: few, so that connections clash in every way.
pub const KEYS: u8 = 10;
pub const PROTOCOLS: [Protocol; 3] = [Protocol::UDP, Protocol::ICMP, Protocol(47)];

/// Keys and protocols are taken modulo [`KEYS`] and the number of [`PROTOCOLS`].
#[derive(Clone, Debug)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub enum Operation {
    Insert { original: u8, reply: u8, protocol: u8, mark: u32 },
    Track { key: u8, protocol: u8, repeated_first: bool },
    Remove { key: u8, protocol: u8 },
    Displace { key: u8, protocol: u8, for_privileged: bool },
    Judge { key: u8, protocol: u8, mark: u32 },
    Pass { ticks: u16 },
    Sweep,
}

fn key<A: Address>(number: u8, protocol: u8) -> FlowKey<A> {
    let number = number % KEYS;
    FlowKey {
        src: A::from_bits128(u128::from(number % 3) << 60 | 0x0a00_0001),
        dst: A::from_bits128(0x0a00_0002),
        ports: Ports::new(u16::from(number), 7),
        protocol: PROTOCOLS[usize::from(protocol) % PROTOCOLS.len()],
    }
}

fn all_keys<A: Address>() -> impl Iterator<Item = FlowKey<A>> {
    (0..PROTOCOLS.len() as u8).flat_map(|protocol| (0..KEYS).map(move |number| key(number, protocol)))
}

/// What was found for a key before an operation.
struct Expected<A: Address> {
    key: FlowKey<A>,
    candidate: Candidate,
    /// The twin's connection with that key, if it was the candidate's.
    holder: Option<(u32, Direction)>,
}

#[derive(Clone, Copy)]
struct TwinConn<A: Address> {
    original: FlowKey<A>,
    reply: FlowKey<A>,
    /// The device, which stays.
    device: u32,
    /// From which the other attributes follow.
    mark: u32,
    created: u32,
    last_seen: u32,
    seen_reply: bool,
    stream: bool,
}

/// The twin has no places.
const NOBODY: Identity = Identity { index: 0, incarnation: 0 };

impl<A: Address> TwinConn<A> {
    fn timeout(&self) -> u32 {
        100 * match (self.original.protocol, self.seen_reply) {
            (Protocol::UDP, _) if self.stream => 120,
            (Protocol::UDP, _) => 30,
            (Protocol::ICMP, _) => 30,
            _ => 600,
        }
    }

    fn attributes(&self) -> Attributes {
        let mark = self.mark;
        Attributes {
            device: self.device,
            stamps: [mark ^ 1, mark ^ 2, mark ^ 3],
            generation: mark ^ 4,
            next_hops: [mark ^ 5, mark ^ 6],
            flags: mark as u8,
        }
    }

    fn entry(&self, now: u32) -> Entry<A> {
        Entry {
            identity: NOBODY,
            original: self.original,
            reply: self.reply,
            attributes: self.attributes(),
            lifecycle: if self.seen_reply { Lifecycle::Established } else { Lifecycle::Unreplied },
            tcp_state: None,
            sctp_state: None,
            assured: self.stream,
            last_seen: Tick(self.last_seen),
            remaining_ticks: self.timeout() - (now - self.last_seen),
            offload_slot: (self.attributes().flags & OFFLOADED != 0).then_some(0),
        }
    }
}

/// Connections by number; no sharing, no expiry but by looking at all of them.
struct Twin<A: Address> {
    conns: HashMap<u32, TwinConn<A>>,
    numbers: u32,
    now: u32,
}

impl<A: Address> Twin<A> {
    fn find(&self, key: &FlowKey<A>) -> Option<(u32, Direction)> {
        self.conns.iter().find_map(|(number, conn)| match () {
            () if conn.original == *key => Some((*number, Direction::Original)),
            () if conn.reply == *key => Some((*number, Direction::Reply)),
            () => None,
        })
    }

    fn expire(&mut self) {
        let now = self.now;
        self.conns.retain(|_, conn| now - conn.last_seen < conn.timeout());
    }
}

/// Does the operations, from tick `start` on.
///
/// # Panics
/// Where the table does anything else than its twin.
pub fn run<A: Address>(operations: Vec<Operation>, start: u32) {
    let domain = Domain::new();
    let mut participant = domain.join();
    let config = TableConfig {
        max_entries: CAPACITY,
        seed: [7, 11],
        timeouts: Timeouts::default(),
        tcp: TcpSettings::default(),
    };
    let table = Table::<A>::new(config, domain.clone());
    let mut handle = table.handle();
    let mut twin = Twin::<A> { conns: HashMap::new(), numbers: 0, now: 0 };
    let mut names: HashMap<u32, ConnId> = HashMap::new();
    // A worker whose turn goes on while the operation is done by another.
    let mut witness = domain.join();
    for operation in operations {
        let now = Tick(start.wrapping_add(twin.now));
        let witness_turn = witness.enter();
        let candidates: Vec<Expected<A>> = all_keys()
            .map(|key| {
                let candidate = table.candidate(table.hash(&key), &witness_turn);
                table.prefetch_candidate(candidate, key.protocol);
                let is_holder = table.expected(candidate, &key, now, &witness_turn).is_some();
                Expected { key, candidate, holder: twin.find(&key).filter(|_| is_holder) }
            })
            .collect();
        match operation {
            Operation::Insert { original, reply, protocol, mark } => {
                let (original, reply) = (key::<A>(original, protocol), key::<A>(reply, protocol));
                let conn = TwinConn {
                    original,
                    reply,
                    device: mark,
                    mark,
                    created: twin.now,
                    last_seen: twin.now,
                    seen_reply: false,
                    stream: false,
                };
                let new = NewConn { original, reply, attributes: conn.attributes(), first: Observed::default() };
                let mut insert = || table.insert(&mut handle, new, now, &participant.enter());
                let mut result = insert();
                if result == Insert::Full {
                    // What was removed becomes free with the turns after it, what has expired when it is swept.
                    for _ in 0..2 {
                        table.sweep(&mut handle, now, 2 * CAPACITY, &participant.enter());
                    }
                    result = table.insert(&mut handle, new, now, &participant.enter());
                }
                match (twin.find(&original), twin.find(&reply)) {
                    (Some((number, direction)), _) => {
                        assert_eq!(result, Insert::Exists(Hit { conn: names[&number], direction }));
                    }
                    (None, Some((number, direction))) => {
                        assert_eq!(result, Insert::ReplyTaken(Hit { conn: names[&number], direction }));
                    }
                    (None, None) if twin.conns.len() == CAPACITY as usize => assert_eq!(result, Insert::Full),
                    (None, None) => {
                        let Insert::Inserted(id) = result else { panic!("{result:?} with room") };
                        twin.numbers += 1;
                        twin.conns.insert(twin.numbers, conn);
                        names.insert(twin.numbers, id);
                    }
                }
            }
            Operation::Track { key: number, protocol, repeated_first } => {
                if let Some((number, direction)) = twin.find(&key(number, protocol)) {
                    let _turn = participant.enter();
                    let (time, found) = (twin.now, table.conn(names[&number]));
                    let conn = twin.conns.get_mut(&number).expect("found");
                    let before = *conn;
                    conn.stream |=
                        conn.original.protocol == Protocol::UDP && conn.seen_reply && time - conn.created > 200;
                    conn.seen_reply |= direction == Direction::Reply;
                    let repeats = (conn.stream, conn.seen_reply) == (before.stream, before.seen_reply);
                    conn.last_seen = time;
                    if repeated_first {
                        assert_eq!(found.track_repeated(direction, now), repeats);
                    }
                    if !repeated_first || !repeats {
                        // What was declined has written nothing.
                        assert_eq!((found.seen_reply(), found.assured()), (before.seen_reply, before.stream));
                        assert_eq!(found.last_seen(), Tick(start.wrapping_add(before.last_seen)));
                        assert_eq!(found.track(direction, &Observed::default(), now), Tracked::Accept);
                    }
                }
            }
            Operation::Remove { key: number, protocol } => {
                if let Some((number, _)) = twin.find(&key(number, protocol)) {
                    let turn = participant.enter();
                    assert!(table.remove(&mut handle, names[&number], &turn));
                    assert!(!table.remove(&mut handle, names[&number], &turn));
                    twin.conns.remove(&number);
                }
            }
            Operation::Displace { key: number, protocol, for_privileged } => {
                if let Some((number, _)) = twin.find(&key(number, protocol)) {
                    let turn = participant.enter();
                    let conn = twin.conns[&number];
                    // Nobody has answered for five seconds.
                    let is_silent = !conn.seen_reply && twin.now - conn.last_seen >= 500;
                    let is_spared = conn.attributes().flags & PRIVILEGED != 0 && !for_privileged;
                    let removed = table.remove_expendable(&mut handle, names[&number], for_privileged, now, &turn);
                    assert_eq!(removed, is_silent && !is_spared);
                    if removed {
                        twin.conns.remove(&number);
                    }
                }
            }
            Operation::Judge { key: number, protocol, mark } => {
                if let Some((number, _)) = twin.find(&key(number, protocol)) {
                    let _turn = participant.enter();
                    let (conn, twin) = (table.conn(names[&number]), twin.conns.get_mut(&number).expect("found"));
                    conn.set_stamps([mark ^ 1, mark ^ 2, mark ^ 3]);
                    conn.set_generation(mark ^ 4);
                    conn.set_next_hops([mark ^ 5, mark ^ 6]);
                    conn.change_flags(mark as u8, !(mark as u8));
                    twin.mark = mark;
                    assert_eq!(conn.attributes(), twin.attributes());
                }
            }
            Operation::Pass { ticks } => {
                twin.now += u32::from(ticks);
                twin.expire();
            }
            Operation::Sweep => {
                table.sweep(&mut handle, now, 2 * CAPACITY, &participant.enter());
                assert_eq!(table.len(), twin.conns.len());
            }
        }
        let now = Tick(start.wrapping_add(twin.now));
        let held = |key: &FlowKey<A>| twin.find(key).map(|(number, direction)| Hit { conn: names[&number], direction });
        let expected = |candidate, key: &FlowKey<A>| {
            let found = table.expected(candidate, key, now, &witness_turn);
            found.map(|(conn, direction)| Hit { conn: conn.id(), direction })
        };
        let mut candidate_before = Candidate::NONE;
        for Expected { key, candidate, holder } in candidates {
            // Who held the key, and still does, is found. Nobody else is but who has come to hold it, whosever candidate is asked.
            if holder.is_some() && holder == twin.find(&key) {
                assert_eq!(expected(candidate, &key), held(&key), "{key:?}");
            }
            for candidate in [candidate, candidate_before] {
                assert!(expected(candidate, &key).is_none_or(|hit| Some(hit) == held(&key)), "{key:?}");
            }
            candidate_before = candidate;
        }
        drop(witness_turn);
        let turn = participant.enter();
        for key in all_keys::<A>() {
            let hash = table.hash(&key);
            assert_eq!(table.lookup(&key, hash, now, &turn), held(&key), "{key:?}");
            if let Some((conn, direction)) = table.expected(table.candidate(hash, &turn), &key, now, &turn) {
                assert_eq!(Some(Hit { conn: conn.id(), direction }), held(&key), "{key:?}");
                if !key.protocol.is_icmp() {
                    let leaves_with = conn.leaves_with(direction, key.protocol);
                    assert_eq!(leaves_with, conn.key(direction.flip()).invert());
                }
            }
        }
        let mut listed = Vec::new();
        table.for_each(now, |entry| listed.push(Entry { identity: NOBODY, ..*entry }));
        let mut expected: Vec<_> = twin
            .conns
            .values()
            .map(|conn| conn.entry(twin.now))
            .map(|entry| Entry { last_seen: Tick(start.wrapping_add(entry.last_seen.0)), ..entry })
            .collect();
        let order = |entry: &Entry<A>| (entry.original.protocol, entry.original.ports, entry.original.src);
        listed.sort_by_key(order);
        expected.sort_by_key(order);
        assert_eq!(listed, expected);
    }
}
