//! What begins anew: every state of an entry, times every packet that may open a connection or goes on with it, times what has become of
//! the backend, the service and the policies meanwhile. The whole pipeline over the memory driver.
//!
//! Each case opens a flow to the old backend, brings it into a state, publishes a change, and sends one packet. Looked at is all that has
//! come of it: what left and by which device, every connection, every counter. Where the flow is to go on, all of that must be what it is
//! in a router that nothing was published to. Where a new one is opened, what the old backend still sends must not touch it, and it must
//! come to be established.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Barrier},
    thread,
};

use crate::keys::SharedKeys;
use crate::packets::{Packet, SCTP, TCP, UDP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, cluster, ip, links, rules, service, sum, tunnelled};
use crossbeam::channel::Receiver;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use weir_conntrack::{Identity, Lifecycle, SctpState, Table, TcpState};
use weir_dataplane::{
    counters::Totals,
    driver::Driver,
    forwarding::Forwarding,
    frame::{IfIndex, LinkType},
    memory_worker::{MemoryWorker, Room, Shared},
    offload::{
        Offload, Request,
        flow::{Mapped, Phase},
        keeper::{Keeper, Keys},
        recipe::Key,
    },
    pipeline::process_burst,
    snapshot::{Rules, Snapshot},
    tables::Family,
};
use weir_nat::{Endpoint, ServicePort, SnatPorts};
use weir_packet::{Direction, DropReason, FlowKey, Protocol, Tick};

use Change::*;
use Direction::{Original, Reply};
use Outcome::*;
use TcpState::{Close, CloseWait, Established, FinWait, LastAck, SynRecv, SynSent, SynSent2, TimeWait};

const CLIENT: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const OLD: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const NEW: [&str; 2] = ["10.1.2.20", "fd00:1:2::20"];
const OUTSIDE: [&str; 2] = ["192.168.10.100", "fd00:10::100"];
const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const OTHER_VIP: [&str; 2] = ["10.96.0.99", "fd00:96::99"];
const NODE_PORT: u16 = 30053;
const CLIENT_PORT: u16 = 40_000;
const SECOND: u32 = 100;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// What happens between the flow's packets and the one that is looked at. The old backend is a pod of this node, the new one another node's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    /// Something else: the old backend is ready, as before.
    Alive,
    /// The old backend is terminating and serves, the new one is ready.
    Draining,
    /// The old backend is in no slice any more, the new one is ready.
    Gone,
    /// No backend is left.
    Emptied,
    /// Neither is the service.
    Deleted,
    /// Nor is the service's address, but another service's slices have the old backend.
    Moved,
    /// As [`Alive`], and a policy denies what comes to pods of this node.
    Denied,
    /// As [`Draining`], and so does a policy: the new backend is no pod of this node.
    OldDenied,
    /// The old backend is terminating and serves, and there is no other: it is used as if it were ready.
    Last,
}

const CHANGES: [Change; 8] = [Alive, Draining, Gone, Emptied, Deleted, Moved, Denied, OldDenied];

/// Each change with its outcome.
fn cases(outcomes: [Outcome; 8]) -> impl Iterator<Item = (Change, Outcome)> {
    CHANGES.into_iter().zip(outcomes).chain([(Last, outcomes[Alive as usize])])
}

/// What becomes of the packet and of the flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    /// What would if nothing had changed: conntrack/tests holds that against netfilter.
    Follows,
    /// So would it, and each packet of the flow comes to a worker from now on.
    Stays,
    /// It opens a flow to that backend, in place of the old one.
    Opens(&'static [&'static str; 2]),
    /// It opens a flow of its own, from the old backend, in place of the old one.
    OpensBack,
    /// No flow is left; its sender is told: by a RST, or by an ICMP error where it is not TCP.
    Refused(DropReason),
    /// No flow is left; nobody is told.
    Ends(DropReason),
    /// The flow stays for as long as one that was reset. Its sender is told by a RST, and its client too, by one of the backend's number.
    Resets,
    /// It is dropped and the flow stays as it is, for as long as it would have without the packet.
    Cut(DropReason),
    /// No flow is left, and the packet is the node's kernel's.
    Kernel,
}

const DENIED: Outcome = Cut(DropReason::PolicyDeniedIngress);

/// Where a flow comes from, and what its service is like.
#[derive(Clone, Copy, Debug)]
struct Way {
    family: usize,
    protocol: Protocol,
    /// From a pod of this node to the cluster IP; or from outside to a node port, masqueraded.
    is_outside: bool,
    has_affinity: bool,
    /// Settled flows are handed over to the programs.
    is_offloaded: bool,
}

impl Way {
    fn all(protocol: Protocol, may_be_offloaded: bool) -> impl Iterator<Item = Self> {
        (0..16)
            .map(move |bits: usize| Self {
                family: bits & 1,
                protocol,
                is_outside: bits & 2 != 0,
                has_affinity: bits & 4 != 0,
                is_offloaded: bits & 8 != 0,
            })
            .filter(move |way| may_be_offloaded || !way.is_offloaded)
    }

    fn client(self) -> ((IpAddr, u16), IfIndex) {
        match self.is_outside {
            true => ((ip(OUTSIDE[self.family]), CLIENT_PORT), UPLINK),
            false => ((ip(CLIENT[self.family]), CLIENT_PORT), CLIENT_POD),
        }
    }

    fn frontend(self) -> (IpAddr, u16) {
        match self.is_outside {
            true => (ip(NODE[self.family]), NODE_PORT),
            false => (ip(VIP[self.family]), 53),
        }
    }

    fn backend(self, of: [&str; 2]) -> ((IpAddr, u16), IfIndex) {
        ((ip(of[self.family]), 5353), if of == OLD { SERVER_POD } else { UPLINK })
    }

    fn rules(self, change: Change) -> Rules {
        let mut service = service("default/web", self.protocol, VIP, OLD, Some(NODE_PORT));
        service.affinity = self.has_affinity.then_some(10_800);
        let like = service.endpoints.remove(0);
        let endpoint = |address: &str| Endpoint { address: ip(address), ..like.clone() };
        let draining = |address: &str| Endpoint { ready: false, terminating: true, ..endpoint(address) };
        let endpoints = match change {
            Alive | Moved | Denied => OLD.map(endpoint).into(),
            Last => OLD.map(draining).into(),
            Draining | OldDenied => [OLD.map(draining), NEW.map(endpoint)].concat(),
            Gone => NEW.map(endpoint).into(),
            Emptied | Deleted => Vec::new(),
        };
        let services = match change {
            Deleted => Vec::new(),
            Moved => vec![ServicePort { endpoints, cluster_ips: OTHER_VIP.map(ip).into(), node_port: None, ..service }],
            _ => vec![ServicePort { endpoints, ..service }],
        };
        rules(services, !matches!(change, Denied | OldDenied))
    }
}

/// A connection, as it is listed.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Listed {
    original: [(IpAddr, u16); 2],
    reply: [(IpAddr, u16); 2],
    lifecycle: &'static str,
    tcp: Option<TcpState>,
    sctp: Option<SctpState>,
    is_assured: bool,
    last_seen: Tick,
    remaining_ticks: u32,
    identity: Identity,
}

fn listed_of<A: Family>(table: &Table<A>, now: Tick, listed: &mut Vec<Listed>) {
    let ends = |key: &FlowKey<A>| [(key.src.to_ip(), key.ports.source()), (key.dst.to_ip(), key.ports.destination())];
    table.for_each(now, |entry| {
        listed.push(Listed {
            original: ends(&entry.original),
            reply: ends(&entry.reply),
            lifecycle: entry.lifecycle.name(),
            tcp: entry.tcp_state,
            sctp: entry.sctp_state,
            is_assured: entry.assured,
            last_seen: entry.last_seen,
            remaining_ticks: entry.remaining_ticks,
            identity: entry.identity,
        });
    });
}

/// What left, with the device by which it did; where weir made it, without the identification that it chose.
type Left = Vec<(IfIndex, Packet)>;

fn read(bytes: &[u8]) -> Packet {
    let mut bytes = bytes.to_vec();
    if bytes[0] >> 4 == 4 {
        assert_eq!(sum(&bytes[..20]), 0xffff, "the header's checksum");
        bytes[4..6].copy_from_slice(&[0x12, 0x34]);
        bytes[6] = 0x40;
        bytes[10..12].fill(0);
        let checksum = !sum(&bytes[..20]);
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    Packet::read(&bytes)
}

fn word(packet: &Packet, at: usize) -> u16 {
    u16::from_be_bytes([packet.l4[at], packet.l4[at + 1]])
}

/// Its addresses and ports.
fn ends(packet: &Packet) -> [(IpAddr, u16); 2] {
    [(packet.src, word(packet, 0)), (packet.dst, word(packet, 2))]
}

type Programs = SharedKeys<HashMap<Key, (u32, u32)>>;

/// To whom a router hands flows over: the keeper, and what the programs would read.
struct Handover {
    offload: Arc<Offload>,
    requests: Receiver<Request>,
    keeper: Keeper,
    keys: Programs,
    graces: u64,
}

/// A router with one flow.
struct Case {
    way: Way,
    router: Router,
    handover: Option<Handover>,
    /// Where the old backend's packets go to: the client, or its masquerade address and port.
    replies_to: (IpAddr, u16),
}

impl Case {
    fn new(way: Way) -> Self {
        Self::with(way, way.rules(Alive))
    }

    fn with(way: Way, rules: Rules) -> Self {
        let mut router = Router::new(rules, SnatPorts::new(10_000..=20_000, []).unwrap(), 64);
        let handover = way.is_offloaded.then(|| {
            let (flows, epoch) = (Mapped::private(16).unwrap(), Mapped::private(1).unwrap());
            let (offload, requests) = Offload::new(flows, epoch, 4);
            let offload = Arc::new(offload);
            router.tables.v4.offload_to(offload.clone());
            router.tables.v6.offload_to(offload.clone());
            router.offload = Some(offload.clone());
            let keys = Programs::default();
            let current = router.published.current();
            let mut keeper = Keeper::new(offload.clone(), 16, Box::new(keys.clone()), &router.domain, current.clone());
            assert_eq!(keeper.adopt(Vec::new(), &router.tables), 0);
            keeper.prepare(&current, &router.tables);
            Handover { offload, requests, keeper, keys, graces: 0 }
        });
        Self { way, router, handover, replies_to: way.client().0 }
    }

    fn publish(&mut self, rules: Rules, forwarding: Arc<Forwarding>) {
        let next = self.router.next(rules, forwarding);
        if let Some(handover) = &mut self.handover {
            handover.keeper.prepare(&next, &self.router.tables);
        }
        self.router.published.publish(next);
    }

    fn change(&mut self, change: Change) {
        self.publish(self.way.rules(change), self.router.forwarding.clone());
    }

    /// The keeper takes over what was asked for; whether there was anything.
    fn hand_over(&mut self) -> bool {
        let Some(handover) = &mut self.handover else { return false };
        let requests: Vec<_> = handover.requests.try_iter().collect();
        handover.graces += 1;
        handover.keeper.answer(&requests, handover.graces, &self.router.tables);
        !requests.is_empty()
    }

    /// How many flows the programs carry.
    fn carried(&self) -> usize {
        let Some(Handover { offload, keys, .. }) = &self.handover else { return 0 };
        let live = keys
            .all()
            .unwrap()
            .into_iter()
            .filter(|(_, way, serial)| offload.flow(way >> 1).expect("a slot").state() == (*serial, Phase::Live));
        live.count() / 2
    }

    fn listed(&self) -> Vec<Listed> {
        let mut listed = Vec::new();
        listed_of(&self.router.tables.v4, self.router.now, &mut listed);
        listed_of(&self.router.tables.v6, self.router.now, &mut listed);
        listed.sort_by_key(|one| one.original);
        listed
    }

    fn send(&mut self, device: IfIndex, [from, to]: [(IpAddr, u16); 2], rest: &[u8]) -> Left {
        let l4 = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), rest].concat();
        let protocol = self.way.protocol.0;
        self.send_packet(device, &Packet { src: from.0, dst: to.0, protocol, ttl: 64, tos: 0, options: 0, l4 })
    }

    fn send_packet(&mut self, device: IfIndex, packet: &Packet) -> Left {
        let sent = self.router.one(device, &framed(device, packet));
        received(&sent).into_iter().map(|((device, _), bytes)| (device, read(bytes))).collect()
    }

    /// A packet of the flow: from the client to the frontend, or from a backend to whom it knows as its client.
    fn say(&mut self, said: &Said) -> Left {
        let client = self.way.client();
        let (device, ends) = match said.direction {
            Original => (client.1, [client.0, self.way.frontend()]),
            Reply => {
                let backend = self.way.backend(OLD);
                (backend.1, [backend.0, self.replies_to])
            }
        };
        self.send(device, ends, &said.rest)
    }

    /// A packet that belongs to the flow and passes, to whom it is for.
    #[track_caller]
    fn pass(&mut self, said: &Said) {
        let left = self.say(said);
        let to = match said.direction {
            Original => self.way.backend(OLD),
            Reply => self.way.client(),
        };
        let [(_, packet)] = &left[..] else { panic!("{said:?}: {left:?}") };
        assert_eq!((left[0].0, ends(packet)[1]), (to.1, to.0), "{said:?}");
        if said.direction == Original {
            self.replies_to = ends(packet)[0];
        }
    }
}

/// A packet, behind its ports.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Said {
    name: &'static str,
    direction: Direction,
    rest: Vec<u8>,
}

fn tcp_with(name: &'static str, direction: Direction, flags: u8, seq: u32, ack: u32, options: &[u8]) -> Said {
    let offset = (5 + options.len() as u8 / 4) << 4;
    let rest = [&seq.to_be_bytes()[..], &ack.to_be_bytes(), &[offset, flags, 0xff, 0xff, 0, 0, 0, 0], options].concat();
    Said { name, direction, rest }
}

fn tcp(name: &'static str, direction: Direction, flags: u8, seq: u32, ack: u32) -> Said {
    tcp_with(name, direction, flags, seq, ack, &[])
}

/// The client's and the server's first sequence numbers.
const C: u32 = 1000;
const S: u32 = 5000;

/// The segments that bring a connection into a state, from nothing.
fn to_state(state: TcpState) -> Vec<Said> {
    let syn = tcp("SYN", Original, SYN, C, 0);
    let syn_ack = tcp("SYN/ACK", Reply, SYN | ACK, S, C + 1);
    let ack = tcp("ACK", Original, ACK, C + 1, S + 1);
    let client_fin = tcp("FIN", Original, FIN | ACK, C + 1, S + 1);
    let its_ack = tcp("ACK of it", Reply, ACK, S + 1, C + 2);
    let server_fin = tcp("FIN", Reply, FIN | ACK, S + 1, C + 2);
    let last_ack = tcp("last ACK", Original, ACK, C + 2, S + 2);
    let reset = tcp("RST", Original, RST, C + 1, 0);
    let closing = [syn.clone(), syn_ack.clone(), ack.clone(), client_fin, its_ack, server_fin, last_ack];
    match state {
        SynSent => closing[..1].into(),
        SynRecv => closing[..2].into(),
        Established => closing[..3].into(),
        FinWait => closing[..4].into(),
        CloseWait => closing[..5].into(),
        LastAck => closing[..6].into(),
        TimeWait => closing[..7].into(),
        Close => [syn, syn_ack, ack, reset].into(),
        SynSent2 => [syn, tcp("SYN", Reply, SYN, S, 0)].into(),
    }
}

/// SYNs of the client: as the first, with greater and with smaller numbers, and with RFC 7323's options.
fn syns() -> Vec<Said> {
    // Maximum segment size, window scale, SACK permitted, timestamps.
    let options = [2, 4, 5, 180, 1, 3, 3, 7, 1, 1, 4, 2, 1, 1, 8, 10, 0, 0, 1, 0, 0, 0, 0, 0];
    vec![
        tcp("a repeated SYN", Original, SYN, C, 0),
        tcp("a newer SYN", Original, SYN, 900_000, 0),
        tcp("an old SYN", Original, SYN, C - 500, 0),
        tcp_with("a SYN with options", Original, SYN, 700_000, 0, &options),
    ]
}

/// What opens nothing.
fn others(direction: Direction) -> Vec<Said> {
    let (seq, ack) = match direction {
        Original => (C + 1, S + 1),
        Reply => (S + 1, C + 1),
    };
    vec![
        tcp("SYN/ACK", direction, SYN | ACK, seq - 1, ack),
        tcp("ACK", direction, ACK, seq, ack),
        tcp("RST", direction, RST, seq, 0),
        tcp("FIN", direction, FIN | ACK, seq, ack),
    ]
}

fn is_reset(said: &Said) -> bool {
    said.rest[9] & RST != 0
}

/// States that a connection has in common with others, what is sent there, and what becomes of it after each of [`CHANGES`].
struct Row<S: 'static> {
    states: &'static [S],
    packets: Vec<Said>,
    outcomes: [Outcome; 8],
    /// What kube-proxy and netfilter do, where that decides; or why weir does not do the same.
    #[allow(dead_code, reason = "it is for who reads the table")]
    linux: &'static str,
}

const REFUSED: Outcome = Refused(DropReason::NoBackend);
const UNCLAIMED: Outcome = Ends(DropReason::UnallocatedServiceIp);

fn tcp_table() -> Vec<Row<TcpState>> {
    const ALL: &[TcpState] = &TcpState::ALL;
    vec![
        Row {
            states: &[SynSent],
            packets: syns(),
            outcomes: [
                Follows,
                Follows,
                Opens(&NEW),
                REFUSED,
                UNCLAIMED,
                Follows,
                Ends(DropReason::PolicyDeniedIngress),
                Opens(&NEW),
            ],
            linux: "netfilter keeps the entry (sSS) and with it the pod that is gone, until the client gives up: TCP entries are not \
                    deleted. 27b is better: the retransmission reaches a living pod at once. A pod that only terminates answers yet. \
                    Policy judges each unanswered SYN there as here (it is NEW), but always with the old pod as destination.",
        },
        Row {
            states: &[SynRecv, Established, FinWait, CloseWait, LastAck, SynSent2],
            packets: syns(),
            outcomes: [Follows, Follows, Opens(&NEW), REFUSED, UNCLAIMED, Follows, DENIED, DENIED],
            linux: "netfilter lets it through (sIG) for the pod to answer by a challenge ACK or to agree (RFC 5961, 4). Where the pod is \
                    gone nobody answers, there neither, and the old connection cannot live: it opens anew.",
        },
        Row {
            states: &[TimeWait, Close],
            packets: syns(),
            outcomes: [
                Opens(&OLD),
                Opens(&NEW),
                Opens(&NEW),
                REFUSED,
                UNCLAIMED,
                UNCLAIMED,
                Ends(DropReason::PolicyDeniedIngress),
                Opens(&NEW),
            ],
            linux: "netfilter forgets the entry and looks again (NF_REPEAT): a new choice, whatever the sequence number. (In CLOSE only \
                    after a RST from the same side; weir's reason is in conntrack/src/tcp.rs.)",
        },
        Row {
            states: ALL,
            packets: others(Original),
            outcomes: [Follows, Follows, Resets, Resets, Follows, Follows, DENIED, DENIED],
            linux: "netfilter sends it to the pod that is gone, and the client waits for its own timeouts; the design has a RST.",
        },
        Row {
            states: ALL,
            packets: others(Reply),
            outcomes: [Follows, Follows, Resets, Resets, Follows, Follows, DENIED, DENIED],
            linux: "netfilter translates what a pod sends that is in no slice any more; the design has both ends told.",
        },
        Row {
            states: &[SynSent, SynSent2, SynRecv, Established, FinWait, CloseWait, LastAck, Close],
            packets: vec![tcp("the backend's SYN", Reply, SYN, 800_000, 0)],
            outcomes: [Follows, Follows, OpensBack, OpensBack, OpensBack, Follows, DENIED, DENIED],
            linux: "a simultaneous open, or invalid; of a pod that is gone it is whatever now has its address.",
        },
        Row {
            states: &[TimeWait],
            packets: vec![tcp("the backend's SYN", Reply, SYN, 800_000, 0)],
            outcomes: [OpensBack; 8],
            linux: "NF_REPEAT, as the roles may have changed.",
        },
    ]
}

/// All that can be seen of a router.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Seen {
    left: Left,
    listed: Vec<Listed>,
    totals: Totals,
    remembered: [usize; 2],
    carried: usize,
}

impl Case {
    fn seen(&self, left: Left) -> Seen {
        let (affinity, now) = (&self.router.affinity, self.router.now);
        let remembered = [affinity.clients::<Ipv4Addr>().count(now), affinity.clients::<Ipv6Addr>().count(now)];
        Seen { left, listed: self.listed(), totals: self.router.totals(), remembered, carried: self.carried() }
    }

    /// Asserts the outcome of `said`: `before` is what was seen before it, `control` makes a router with the same flow, to which nothing is
    /// published.
    fn check(&mut self, said: &Said, outcome: Outcome, before: &Seen, control: impl FnOnce() -> Self, what: &str) {
        let left = self.say(said);
        let after = self.seen(left);
        let added = |name: &str, of: fn(&Totals) -> u64| (name.to_owned(), of(&after.totals) - of(&before.totals));
        let drops = |totals: &Totals| totals.drops.iter().copied().collect::<BTreeMap<_, _>>();
        let mut counted: BTreeMap<String, u64> = [
            added("generated", |t| t.generated),
            added("tx", |t| t.tx),
            added("punted", |t| t.punted),
            added("consumed", |t| t.consumed),
            added("opened", |t| t.opened),
            added("snat_allocated", |t| t.snat_allocated),
            added("snat_taken", |t| t.snat_taken),
            added("snat_displaced", |t| t.snat_displaced),
            added("sent_again", |t| t.sent_again),
        ]
        .into();
        let before_drops = drops(&before.totals);
        for (reason, count) in drops(&after.totals) {
            counted.insert(format!("{reason:?}"), count - before_drops.get(&reason).copied().unwrap_or(0));
        }
        counted.retain(|_, count| *count > 0);
        let counts = |expected: &[&str]| {
            let expected: BTreeMap<_, _> = expected.iter().map(|name| ((*name).to_owned(), 1)).collect();
            assert_eq!(counted, expected, "{what}");
        };
        assert_eq!((after.totals.rx, after.totals.held), (before.totals.rx + 1, 0), "{what}");
        assert!(after.carried <= before.carried, "{what}: one packet hands nothing over");
        let way = self.way;
        match outcome {
            Follows | Stays => {
                let mut control = control();
                let left = control.say(said);
                let mut seen = control.seen(left);
                if outcome == Stays {
                    seen.carried = 0;
                }
                assert_eq!(after, seen, "{what}");
                let goes_to_old = after.left.len() == 1 && ends(&after.left[0].1)[1] == way.backend(OLD).0;
                // Of two SYNs that have crossed, only one of its own number fits.
                let is_syn = way.protocol == Protocol::TCP && said.rest[9] & (SYN | ACK) == SYN;
                let may_be_invalid = said.direction == Reply || before.listed[0].tcp == Some(SynSent2);
                assert!(!is_syn || may_be_invalid || goes_to_old, "{what}");
            }
            Opens(to) => {
                let (address, device) = way.backend(*to);
                let [(by, packet)] = &after.left[..] else { panic!("{what}: {:?}", after.left) };
                assert_eq!((*by, ends(packet)[1], packet.protocol), (device, address, way.protocol.0), "{what}");
                let source = ends(packet)[0];
                match way.is_outside {
                    true => assert_eq!(source.0, ip(NODE[way.family]), "{what}"),
                    false => assert_eq!(source, way.client().0, "{what}"),
                }
                match way.is_outside {
                    true => counts(&["tx", "opened", "snat_allocated"]),
                    false => counts(&["tx", "opened"]),
                }
                let [one] = &after.listed[..] else { panic!("{what}: {:?}", after.listed) };
                assert_eq!((one.original, one.reply), ([way.client().0, way.frontend()], [address, source]), "{what}");
                let expected = (Lifecycle::Unreplied.name(), false, self.router.now);
                assert_eq!((one.lifecycle, one.is_assured, one.last_seen), expected, "{what}");
                assert!(!before.listed.iter().any(|old| old.identity == one.identity), "{what}: another connection");
                assert_eq!(after.carried, 0, "{what}: the old one was taken back");
                let of_family = usize::from(way.has_affinity);
                assert_eq!(after.remembered, if way.family == 0 { [of_family, 0] } else { [0, of_family] }, "{what}");
            }
            OpensBack => {
                let (backend, to) = (way.backend(OLD).0, self.replies_to);
                let [(by, packet)] = &after.left[..] else { panic!("{what}: {:?}", after.left) };
                let expected = if way.is_outside { IfIndex::HOST } else { way.client().1 };
                assert_eq!((*by, ends(packet)), (expected, [backend, to]), "{what}");
                counts(&[if way.is_outside { "punted" } else { "tx" }, "opened"]);
                let [one] = &after.listed[..] else { panic!("{what}: {:?}", after.listed) };
                assert_eq!((one.original, one.reply), ([backend, to], [to, backend]), "{what}");
                assert_eq!((after.carried, after.remembered), (0, before.remembered), "{what}");
            }
            Refused(reason) => {
                let name = format!("{reason:?}");
                assert_eq!(
                    (&after.listed[..], after.carried, after.remembered),
                    (&[][..], 0, before.remembered),
                    "{what}"
                );
                if way.protocol == Protocol::TCP && is_reset(said) {
                    assert_eq!(after.left, [], "{what}: a RST is not answered");
                    return counts(&[&name]);
                }
                counts(&[&name, "generated", "tx"]);
                let [(by, told)] = &after.left[..] else { panic!("{what}: {:?}", after.left) };
                let (device, [from, to]) = match said.direction {
                    Original => (way.client().1, [way.frontend(), way.client().0]),
                    Reply => (way.backend(OLD).1, [self.replies_to, way.backend(OLD).0]),
                };
                assert_eq!((*by, told.dst), (device, to.0), "{what}");
                if way.protocol == Protocol::TCP {
                    assert_eq!((ends(told), told.l4[13] & RST), ([from, to], RST), "{what}");
                } else {
                    let expected = if way.family == 0 { (1, 3, 3) } else { (58, 1, 4) };
                    assert_eq!((told.protocol, told.l4[0], told.l4[1]), expected, "{what}");
                }
            }
            Resets => {
                let (client, backend) = (way.client(), way.backend(OLD));
                let (seq, ack) = (&said.rest[..4], &said.rest[4..8]);
                let to_client = || ([way.frontend(), client.0], client.1);
                let mut expected = BTreeMap::new();
                if said.direction == Reply {
                    let (ends, by) = to_client();
                    expected.insert(ends, (by, seq));
                }
                if !is_reset(said) {
                    let (ends, by) = match said.direction {
                        Original => to_client(),
                        Reply => ([self.replies_to, backend.0], backend.1),
                    };
                    expected.insert(ends, (by, ack));
                }
                let told = |(by, packet): &'_ (IfIndex, Packet)| {
                    assert_eq!((packet.protocol, packet.l4[13] & !ACK), (TCP, RST), "{what}");
                    (ends(packet), (*by, packet.l4[4..8].to_vec()))
                };
                let left: BTreeMap<_, _> = after.left.iter().map(told).collect();
                assert_eq!(left.len(), after.left.len(), "{what}");
                let of_slices: BTreeMap<_, _> = left.iter().map(|(ends, (by, seq))| (*ends, (*by, &seq[..]))).collect();
                assert_eq!(of_slices, expected, "{what}");
                let told = expected.len() as u64;
                let all = [("generated", told), ("tx", told), ("BackendGone", 1)];
                let all = all.into_iter().filter(|(_, count)| *count > 0).map(|(name, count)| (name.to_owned(), count));
                assert_eq!(counted, all.collect(), "{what}");
                let ([old], [one]) = (&before.listed[..], &after.listed[..]) else { panic!("{what}: one connection") };
                assert!(one.remaining_ticks <= 10 * SECOND, "{what}: {one:?}");
                let same = Listed { last_seen: old.last_seen, remaining_ticks: old.remaining_ticks, ..one.clone() };
                assert_eq!((&same, after.remembered), (old, before.remembered), "{what}");
            }
            Ends(reason) => {
                counts(&[&format!("{reason:?}")]);
                let empty = (&[][..], &[][..], 0);
                assert_eq!((&after.left[..], &after.listed[..], after.carried), empty, "{what}");
            }
            Cut(reason) => {
                counts(&[&format!("{reason:?}")]);
                assert_eq!((&after.left[..], &after.listed), (&[][..], &before.listed), "{what}");
                assert_eq!(after.remembered, before.remembered, "{what}");
            }
            Kernel => {
                counts(&["punted"]);
                assert_eq!((after.left.len(), after.left[0].0), (1, IfIndex::HOST), "{what}");
                assert_eq!((&after.listed[..], after.carried), (&[][..], 0), "{what}");
            }
        }
    }
}

/// How the outcome differs for what comes from outside by a node port.
fn for_way(way: Way, change: Change, outcome: Outcome, direction: Direction) -> Outcome {
    match (outcome, change) {
        // Without the service it is a packet for the node itself.
        (UNCLAIMED, Deleted | Moved) if way.is_outside => Kernel,
        // To a pod of this node, which is closed; but the node is not.
        (OpensBack, Denied | OldDenied) if !way.is_outside && direction == Reply => {
            Ends(DropReason::PolicyDeniedIngress)
        }
        _ => outcome,
    }
}

/// A packet as it comes by a device: IPv4 pods of two nodes have a tunnel between them.
fn framed(device: IfIndex, packet: &Packet) -> Vec<u8> {
    let is_pods = |address: IpAddr| matches!(address, IpAddr::V4(a) if a.octets()[..2] == [10, 1]);
    let is_tunnelled = device == UPLINK && is_pods(packet.src) && is_pods(packet.dst);
    if is_tunnelled { tunnelled(&packet.frame()) } else { packet.frame() }
}

/// The new connection is established, whatever the old backend still says.
fn comes_to_be_established(case: &mut Case, to: [&str; 2], seq: u32, what: &str) {
    let way = case.way;
    let [new] = &case.listed()[..] else { panic!("{what}: one connection") };
    let (identity, new_client) = (new.identity, new.reply[1]);
    let find = |case: &Case| case.listed().into_iter().find(|one| one.identity == identity).expect("it lives");
    let before = find(case);
    if to != OLD {
        // Those that go to nobody's connection: dropped, or another connection's.
        for late in others(Reply) {
            case.say(&late);
            assert_eq!(find(case), before, "{what}: {late:?}");
        }
    }
    let (backend, device) = way.backend(to);
    let answer = tcp("SYN/ACK", Reply, SYN | ACK, 60_000, seq.wrapping_add(1));
    let left = case.send(device, [backend, new_client], &answer.rest);
    let [(by, packet)] = &left[..] else { panic!("{what}: {left:?}") };
    assert_eq!((*by, ends(packet)), (way.client().1, [way.frontend(), way.client().0]), "{what}");
    let left = case.say(&tcp("ACK", Original, ACK, seq.wrapping_add(1), 60_001));
    let [(by, packet)] = &left[..] else { panic!("{what}: {left:?}") };
    assert_eq!((*by, ends(packet)), (device, [new_client, backend]), "{what}");
    let now = find(case);
    assert_eq!((now.tcp, now.is_assured), (Some(Established), true), "{what}");
    // Between uplinks workers keep it.
    if way.is_offloaded && (to == OLD || !way.is_outside) {
        for _ in 0..10 {
            case.say(&tcp("ACK", Original, ACK, seq.wrapping_add(1), 60_001));
        }
        assert!(case.hand_over() && case.carried() == 1, "{what}: the new connection is handed over in its turn");
    }
}

/// A flow in a state. Where it is to be handed over, that happens as soon as it is established.
fn tcp_flow(way: Way, state: TcpState) -> Case {
    let mut case = Case::new(way);
    for said in to_state(state) {
        case.pass(&said);
        let [one] = &case.listed()[..] else { panic!("one connection: {:?}", case.listed()) };
        if way.is_offloaded && one.tcp == Some(Established) && one.is_assured && case.carried() == 0 {
            for _ in 0..10 {
                case.pass(&tcp("ACK", Original, ACK, C + 1, S + 1));
                case.pass(&tcp("ACK", Reply, ACK, S + 1, C + 1));
            }
            assert!(case.hand_over() && case.carried() == 1, "handed over");
        }
    }
    assert_eq!(case.listed()[0].tcp, Some(state));
    case
}

/// Whatever either end says within ten seconds is answered too, the other end's next packet first; what opens a connection does.
fn stays_reset(case: &mut Case, told: Direction, change: Change, what: &str) {
    for (after, direction) in [(0, told.flip()), (5 * SECOND, told), (4 * SECOND, told.flip())] {
        case.router.wait(after);
        let before = case.seen(Vec::new());
        let said = others(direction).swap_remove(1);
        case.check(&said, Resets, &before, || unreachable!("it is not compared"), &format!("{what}, then {said:?}"));
    }
    if change == Gone {
        let before = case.seen(Vec::new());
        let syn = syns().swap_remove(1);
        return case.check(
            &syn,
            Opens(&NEW),
            &before,
            || unreachable!("it is not compared"),
            &format!("{what}, then {syn:?}"),
        );
    }
    case.router.wait(SECOND);
    assert_eq!(case.listed(), [], "{what}");
}

#[test]
fn tcp_every_state_every_packet_every_change() {
    let mut count = 0;
    for way in Way::all(Protocol::TCP, true) {
        for Row { states, packets, outcomes, .. } in tcp_table() {
            for (&state, said) in states.iter().flat_map(|state| packets.iter().map(move |said| (state, said))) {
                if way.is_offloaded && matches!(state, SynSent | SynRecv | SynSent2) {
                    continue;
                }
                for (change, outcome) in cases(outcomes) {
                    let what = format!("{way:?}: {said:?} in {state:?}, {change:?}");
                    let mut case = tcp_flow(way, state);
                    case.change(change);
                    let before = case.seen(Vec::new());
                    let outcome = for_way(way, change, outcome, said.direction);
                    case.check(said, outcome, &before, || tcp_flow(way, state), &what);
                    if let Opens(to) = outcome {
                        let seq = u32::from_be_bytes(*said.rest.first_chunk().unwrap());
                        comes_to_be_established(&mut case, *to, seq, &what);
                    }
                    if outcome == Resets {
                        stays_reset(&mut case, said.direction, change, &what);
                    }
                    case.router.finish();
                    count += 1;
                }
            }
        }
    }
    assert!(count > 8000, "{count} cases");
}

/// A damaged packet changes nothing, whatever has become of the backend.
#[test]
fn a_wrong_checksum_ends_nothing() {
    for (way, protocol) in
        Way::all(Protocol::TCP, false).map(|way| (way, TCP)).chain(Way::all(Protocol::UDP, false).map(|way| (way, UDP)))
    {
        for direction in [Original, Reply] {
            let what = format!("{way:?} {direction:?}");
            let (mut case, said) = match protocol {
                TCP => (tcp_flow(way, Established), others(direction).swap_remove(1)),
                _ => (udp_flow(way, Datagrams::Replied), datagram(direction)),
            };
            case.change(Gone);
            let before = case.listed();
            let (device, [from, to]) = match direction {
                Original => (way.client().1, [way.client().0, way.frontend()]),
                Reply => (way.backend(OLD).1, [way.backend(OLD).0, case.replies_to]),
            };
            let l4 = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &said.rest].concat();
            let mut frame = Packet { src: from.0, dst: to.0, protocol, ttl: 64, tos: 0, options: 0, l4 }.frame();
            let at = frame.len() - said.rest.len() - 4 + if protocol == TCP { 17 } else { 7 };
            frame[at] ^= 0x55;
            assert_eq!(case.router.one(device, &frame), [], "{what}");
            assert_eq!((case.listed(), case.router.totals().dropped()), (before, 1), "{what}");
            case.router.finish();
        }
    }
}

/// Where a flow of datagrams stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Datagrams {
    Unreplied,
    Replied,
    Stream,
}

fn datagram(direction: Direction) -> Said {
    Said { name: "a datagram", direction, rest: vec![0, 12, 0, 0, 1, 2, 3, 4] }
}

fn udp_flow(way: Way, state: Datagrams) -> Case {
    let mut case = Case::new(way);
    let exchange = |case: &mut Case| {
        case.pass(&datagram(Original));
        case.pass(&datagram(Reply));
    };
    match state {
        Datagrams::Unreplied => case.pass(&datagram(Original)),
        Datagrams::Replied => exchange(&mut case),
        Datagrams::Stream => {
            exchange(&mut case);
            case.router.wait(3 * SECOND);
            exchange(&mut case);
        }
    }
    if way.is_offloaded {
        let again = if state == Datagrams::Unreplied { [Original; 2] } else { [Original, Reply] };
        for direction in again.into_iter().cycle().take(10) {
            case.pass(&datagram(direction));
        }
        assert!(case.hand_over() && case.carried() == 1, "handed over");
    }
    let [one] = &case.listed()[..] else { panic!("one connection") };
    let has_reply = one.lifecycle == Lifecycle::Established.name();
    assert_eq!((has_reply, one.is_assured), (state != Datagrams::Unreplied, state == Datagrams::Stream));
    case
}

/// How long ago the flow had its last packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Silence {
    Short,
    /// An answer is not awaited any more.
    TwoSeconds,
    /// The flow's timeout is over.
    Over,
}

/// kube-proxy deletes the entries of UDP flows whose backend does not serve any more, or whose service has got its first backend; and while
/// somebody sends, netfilter's entries never expire. weir looks at each flow at its next packet instead. What is no stream leaves a backend
/// that drains; kube-proxy leaves it there, also when the source port comes back, while the backend's process ends before its endpoint does.
#[test]
fn udp_every_state_before_and_after_its_timeout() {
    use Datagrams::{Replied, Stream, Unreplied};
    use Silence::{Over, Short, TwoSeconds};
    const BACK: [Outcome; 8] = [OpensBack; 8];
    let gone = Cut(DropReason::BackendGone);
    let denied = Ends(DropReason::PolicyDeniedIngress);
    // A flow whose backend a policy denies waits for its timeout, which nothing restarts: it picks no other for that.
    let held = [Follows, Stays, Opens(&NEW), REFUSED, UNCLAIMED, UNCLAIMED, DENIED, DENIED];
    let free = [Follows, Opens(&NEW), Opens(&NEW), REFUSED, UNCLAIMED, UNCLAIMED, DENIED, Opens(&NEW)];
    let over = [Opens(&OLD), Opens(&NEW), Opens(&NEW), REFUSED, UNCLAIMED, UNCLAIMED, denied, Opens(&NEW)];
    let answer = [Follows, Stays, gone, gone, gone, gone, DENIED, DENIED];
    let table = [
        (Original, &[Unreplied][..], &[Short, TwoSeconds][..], free),
        (Original, &[Replied], &[Short], held),
        (Original, &[Replied], &[TwoSeconds], free),
        (Original, &[Stream], &[Short, TwoSeconds], held),
        (Original, &[Unreplied, Replied, Stream], &[Over], over),
        (Reply, &[Unreplied, Replied, Stream], &[Short, TwoSeconds], answer),
        (Reply, &[Unreplied, Replied, Stream], &[Over], BACK),
    ];
    let mut count = 0;
    for way in Way::all(Protocol::UDP, true) {
        for (direction, states, silences, outcomes) in table {
            for (&state, &silence) in
                states.iter().flat_map(|state| silences.iter().map(move |silence| (state, silence)))
            {
                for (change, outcome) in cases(outcomes) {
                    let said = datagram(direction);
                    let what = format!("{way:?}: {direction:?} in {state:?}, silence: {silence:?}, {change:?}");
                    let ticks = match silence {
                        Short => 0,
                        TwoSeconds => 2 * SECOND,
                        Over if state == Stream => 120 * SECOND,
                        Over => 30 * SECOND,
                    };
                    let mut case = udp_flow(way, state);
                    case.change(change);
                    case.router.wait(ticks);
                    let before = case.seen(Vec::new());
                    let outcome = for_way(way, change, outcome, direction);
                    let control = || {
                        let mut control = udp_flow(way, state);
                        control.router.wait(ticks);
                        control
                    };
                    case.check(&said, outcome, &before, control, &what);
                    match outcome {
                        Opens(to) => goes_on_at(&mut case, *to, &what),
                        // Another answer is the backend's as well: no more than the first does it pass in the backend's own name.
                        _ if outcome == gone => {
                            let before = case.seen(Vec::new());
                            case.check(&said, gone, &before, || unreachable!("it is not compared"), &what);
                        }
                        Stays if way.is_offloaded => {
                            // It is refused once, and never asks again.
                            assert!(case.hand_over(), "{what}");
                            for _ in 0..10 {
                                case.say(&said);
                            }
                            assert!(!case.hand_over() && case.carried() == 0, "{what}");
                        }
                        _ => {}
                    }
                    case.router.finish();
                    count += 1;
                }
            }
        }
    }
    assert_eq!(count, 16 * 9 * 18);
}

/// The flow that was opened to a backend goes on there, whatever the old one still says.
fn goes_on_at(case: &mut Case, to: [&str; 2], what: &str) {
    let way = case.way;
    let [new] = &case.listed()[..] else { panic!("{what}: one connection") };
    let (identity, new_client, before) = (new.identity, new.reply[1], new.clone());
    if to != OLD {
        case.say(&datagram(Reply));
        assert!(case.listed().contains(&before), "{what}: a late answer of the old backend");
    }
    let (backend, device) = way.backend(to);
    let left = case.send(device, [backend, new_client], &datagram(Reply).rest);
    assert_eq!((left[0].0, ends(&left[0].1)), (way.client().1, [way.frontend(), way.client().0]), "{what}");
    let left = case.say(&datagram(Original));
    assert_eq!((left[0].0, ends(&left[0].1)), (device, [new_client, backend]), "{what}");
    assert!(case.listed().iter().any(|one| one.identity == identity), "{what}");
}

/// A flow stays with a backend that drains only until the next packet after which it need not: each is looked at, whoever's came before.
#[test]
fn a_flow_to_a_backend_that_drains_is_looked_at_at_each_packet() {
    for way in Way::all(Protocol::UDP, true) {
        let mut case = udp_flow(way, Datagrams::Replied);
        case.change(Draining);
        for _ in 0..10 {
            case.router.wait(SECOND / 20);
            case.pass(&datagram(Reply));
            case.pass(&datagram(Original));
        }
        let opened = case.router.totals().opened;
        case.router.wait(2 * SECOND);
        let left = case.say(&datagram(Original));
        assert_eq!((left[0].0, ends(&left[0].1)[1]), (UPLINK, way.backend(NEW).0), "{way:?}");
        assert_eq!(case.router.totals().opened, opened + 1, "{way:?}");
        goes_on_at(&mut case, NEW, &format!("{way:?}"));
        case.router.finish();
    }
}

/// The runtime has taken the pod away, before anybody says that its endpoint serves no more.
#[test]
fn a_stream_leaves_a_pod_of_this_node_that_is_gone_while_it_drains() {
    let without = |is_listed: bool| {
        let (mut cluster, mut links) = (cluster(), links());
        links.devices.retain(|device| device.index != SERVER_POD);
        links.complete = true;
        cluster.workloads.retain(|workload| is_listed || workload.name != "default/server");
        Arc::new(Forwarding::compile(&cluster, &links).unwrap())
    };
    for (way, is_listed) in Way::all(Protocol::UDP, true).flat_map(|way| [(way, true), (way, false)]) {
        let what = format!("{way:?}, listed: {is_listed}");
        let mut case = udp_flow(way, Datagrams::Stream);
        case.publish(way.rules(Draining), without(is_listed));
        let left = case.say(&datagram(Original));
        assert_eq!((left.len(), left[0].0, ends(&left[0].1)[1]), (1, UPLINK, way.backend(NEW).0), "{what}");
        assert_eq!((case.listed().len(), case.router.totals().opened, case.carried()), (1, 2, 0), "{what}");
        case.router.finish();
        // Where there is no other the sender is told, as are those on other nodes whose service knows of another.
        let mut case = udp_flow(way, Datagrams::Stream);
        case.publish(way.rules(Last), without(is_listed));
        let left = case.say(&datagram(Original));
        let [(by, told)] = &left[..] else { panic!("{what}: {left:?}") };
        let expected = if way.family == 0 { [3, 1] } else { [1, 3] };
        assert_eq!((*by, told.dst, &told.l4[..2]), (way.client().1, way.client().0.0, &expected[..]), "{what}");
        assert_eq!(case.router.drops(), BTreeMap::from([(DropReason::NoSuchPod, 1)]), "{what}");
        case.router.finish();
    }
}

/// Who tells that a backend is no more, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Teller {
    /// Port unreachable, by the backend's kernel.
    Kernel,
    /// The same, with a wrong checksum.
    Damaged,
    /// Host unreachable, by the backend's node.
    Node,
    /// Port unreachable, by the backend's node.
    NodeOfPort,
    /// Host unreachable, by a router.
    SomeRouter,
    /// Too big, by the backend: the flow goes on.
    TooBig,
    /// Port unreachable in the backend's name, from where it is not.
    Forger,
    /// The same, from the node's kernel, or whoever it forwards for.
    Host,
}

/// What of a datagram comes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Quote {
    Whole,
    /// The last byte is missing.
    Cut,
    /// Only what must be quoted.
    Least,
    /// Another datagram, with the right checksum.
    Forged,
}

impl Case {
    /// An ICMP error about a datagram that left weir, sent by a device, or by the tunnel.
    fn tell(&mut self, (device, by_tunnel): (IfIndex, bool), message: &Packet, is_damaged: bool) -> Left {
        let mut frame = message.frame();
        if is_damaged {
            let at = frame.len() - message.l4.len() + 2;
            frame[at] ^= 0x55;
        }
        let frame = if by_tunnel { tunnelled(&frame) } else { frame };
        let sent = self.router.one(device, &frame);
        let left = received(&sent);
        // A checksum that is wrong stays so.
        if is_damaged {
            return left.into_iter().map(|((device, _), _)| (device, message.clone())).collect();
        }
        left.into_iter().map(|((device, _), bytes)| (device, read(bytes))).collect()
    }
}

fn error(src: IpAddr, dst: IpAddr, [kind, code]: [u8; 2], quote: &[u8]) -> Packet {
    let l4 = [&[kind, code, 0, 0, 0, 0, 5, 0][..], quote].concat();
    let mut packet = Packet { src, dst, protocol: 0, ttl: 64, tos: 0, options: 0, l4 };
    packet.protocol = packet.icmp();
    packet
}

/// A stream to a backend that drains goes on until somebody who must know says that the backend is no more. The datagram that comes back
/// with that is not lost, if it was the client's indeed; and nobody else moves a flow or speaks in the client's name.
#[test]
fn an_error_from_where_a_backend_was_moves_its_flow_and_its_datagram() {
    const PORT: [[u8; 2]; 2] = [[3, 3], [1, 4]];
    const HOST: [[u8; 2]; 2] = [[3, 1], [1, 3]];
    const TOO_BIG: [[u8; 2]; 2] = [[3, 4], [2, 0]];
    let (other_node, some_router) = (["192.168.10.2", "fd00:10::2"], ["172.16.5.9", "fd00:77::9"]);
    let (mut moved, mut sent_again) = (0, 0);
    for way in Way::all(Protocol::UDP, true) {
        // The backend is a pod of this node, or of the other.
        for (from, to) in [(OLD, NEW), (NEW, OLD)] {
            // Between uplinks workers keep it.
            if way.is_offloaded && from == NEW && way.is_outside {
                continue;
            }
            for teller in [
                Teller::Kernel,
                Teller::Damaged,
                Teller::Node,
                Teller::NodeOfPort,
                Teller::SomeRouter,
                Teller::TooBig,
                Teller::Forger,
                Teller::Host,
            ] {
                for quote in [Quote::Whole, Quote::Cut, Quote::Least, Quote::Forged] {
                    for (drains, has_others) in [(true, true), (true, false), (false, true)] {
                        let f = way.family;
                        let what =
                            format!("{way:?} to {from:?}, {teller:?}, {quote:?}, drains: {drains}, {has_others}");
                        let endpoints = |is_there: bool, drains: bool, has_others: bool| {
                            let mut service = service("default/web", Protocol::UDP, VIP, OLD, Some(NODE_PORT));
                            service.affinity = way.has_affinity.then_some(10_800);
                            let like = service.endpoints.remove(0);
                            let of = |address: &str, ready: bool| Endpoint {
                                address: ip(address),
                                ready,
                                terminating: !ready,
                                ..like.clone()
                            };
                            let old = from.map(|address| of(address, !drains));
                            let new = to.map(|address| of(address, true));
                            let both = [(old, is_there), (new, has_others)];
                            service.endpoints = both.into_iter().filter(|(_, is)| *is).flat_map(|(of, _)| of).collect();
                            rules(vec![service], true)
                        };
                        let mut case = Case::with(way, endpoints(true, false, false));
                        let (backend, device) = way.backend(from);
                        let ask = |case: &mut Case| {
                            let left = case.say(&datagram(Original));
                            let [(by, packet)] = &left[..] else { panic!("{what}: {left:?}") };
                            assert_eq!((*by, ends(packet)[1]), (device, backend), "{what}");
                            packet.clone()
                        };
                        let answer = |case: &mut Case, client| {
                            let left = case.send(device, [backend, client], &datagram(Reply).rest);
                            assert_eq!((left.len(), left[0].0), (1, way.client().1), "{what}");
                        };
                        for _ in 0..5 {
                            let client = ends(&ask(&mut case))[0];
                            answer(&mut case, client);
                            case.router.wait(SECOND);
                        }
                        assert!(case.listed()[0].is_assured, "{what}");
                        assert_eq!(case.hand_over(), way.is_offloaded, "{what}");
                        let next = endpoints(true, drains, has_others);
                        case.publish(next, case.router.forwarding.clone());
                        // More than are remembered: the last one counts.
                        for _ in 0..5 {
                            ask(&mut case);
                        }
                        let asked = ask(&mut case);

                        let mut quoted = asked.clone();
                        if quote == Quote::Forged {
                            *quoted.l4.last_mut().unwrap() ^= 1;
                        }
                        let whole = quoted.bytes();
                        let header = whole.len() - quoted.l4.len();
                        let bytes = match quote {
                            Quote::Whole | Quote::Forged => &whole[..],
                            Quote::Cut => &whole[..whole.len() - 1],
                            Quote::Least => &whole[..header + 8],
                        };
                        let is_local = from == OLD;
                        // IPv4 pods of two nodes have a tunnel between them; what is masqueraded is answered to the node.
                        let tunnelled = !is_local && f == 0 && !way.is_outside;
                        let path = (device, tunnelled);
                        let (path, source, kind) = match teller {
                            Teller::Kernel | Teller::Damaged => (path, backend.0, PORT[f]),
                            Teller::Node => ((UPLINK, tunnelled), ip(other_node[f]), HOST[f]),
                            Teller::NodeOfPort => ((UPLINK, tunnelled), ip(other_node[f]), PORT[f]),
                            Teller::SomeRouter => ((UPLINK, false), ip(some_router[f]), HOST[f]),
                            Teller::TooBig => (path, backend.0, TOO_BIG[f]),
                            // A pod of this node's never comes from outside; one of another's does not come from a pod here, nor without
                            // its tunnel.
                            Teller::Forger if is_local || f == 1 || way.is_outside => {
                                ((CLIENT_POD, false), backend.0, PORT[f])
                            }
                            Teller::Forger => ((UPLINK, false), backend.0, PORT[f]),
                            Teller::Host => ((IfIndex::HOST, false), backend.0, PORT[f]),
                        };
                        let message = error(source, asked.src, kind, bytes);
                        let (before, listed) = (case.router.totals(), case.listed());
                        let left = case.tell(path, &message, teller == Teller::Damaged);
                        let after = case.router.totals();
                        let is_evidence =
                            drains && has_others && (teller == Teller::Kernel || teller == Teller::Node && !is_local);
                        assert_eq!(
                            after.sent_again - before.sent_again,
                            u64::from(is_evidence && quote == Quote::Whole),
                            "{what}"
                        );
                        if !is_evidence {
                            let dropped = after.dropped() - before.dropped();
                            // What a pod was not sent it has nothing to tell about, nor has who is outside of what did not leave.
                            // Nor does the node's kernel speak for pods.
                            let is_forged = matches!(teller, Teller::Forger | Teller::Host);
                            let is_of_nobody = is_forged || is_local && path.0 == UPLINK;
                            assert_eq!((left.len() as u64 + dropped, dropped), (1, u64::from(is_of_nobody)), "{what}");
                            assert_eq!((case.listed(), after.opened), (listed, before.opened), "{what}");
                            ask(&mut case);
                        } else if quote == Quote::Whole {
                            moved += 1;
                            sent_again += 1;
                            let (new, new_device) = way.backend(to);
                            let [(by, packet)] = &left[..] else { panic!("{what}: {left:?}") };
                            let said = &asked.l4[4..6];
                            assert_eq!((*by, ends(packet)[1], &packet.l4[4..6]), (new_device, new, said), "{what}");
                            assert_eq!((&packet.l4[8..], packet.ttl), (&asked.l4[8..], asked.ttl - 1), "{what}");
                            assert_eq!((after.tx - before.tx, after.opened - before.opened), (1, 1), "{what}");
                            let [one] = &case.listed()[..] else { panic!("{what}: {:?}", case.listed()) };
                            assert_eq!(one.original, [way.client().0, way.frontend()], "{what}");
                            assert_eq!(one.reply, [new, ends(packet)[0]], "{what}");
                            assert_eq!(case.carried(), 0, "{what}");
                            // The same error once more, as of another datagram: about no flow that there is.
                            assert_eq!(
                                case.tell(path, &message, false).iter().filter(|(by, _)| *by != IfIndex::HOST).count(),
                                0
                            );
                            assert_eq!(case.router.totals().sent_again, after.sent_again, "{what}");
                            if is_local {
                                goes_on_at(&mut case, to, &what);
                            }
                        } else {
                            moved += 1;
                            // The datagram is lost, and its sender is told.
                            let [(by, packet)] = &left[..] else { panic!("{what}: {left:?}") };
                            assert_eq!(
                                (*by, packet.dst, &packet.l4[..2]),
                                (way.client().1, way.client().0.0, &kind[..]),
                                "{what}"
                            );
                            assert_eq!(
                                (case.listed(), after.opened, case.carried()),
                                (Vec::new(), before.opened, 0),
                                "{what}"
                            );
                            let (new, new_device) = way.backend(to);
                            let left = case.say(&datagram(Original));
                            assert_eq!((left[0].0, ends(&left[0].1)[1]), (new_device, new), "{what}");
                        }
                        case.router.finish();
                    }
                }
            }
        }
    }
    assert!(moved > 100 && sent_again * 4 == moved, "{moved} {sent_again}");
}

/// The tags that both ends of an association choose.
const CLIENT_TAG: u32 = 0xc11e_4700;
const SERVER_TAG: u32 = 0x5e47_e400;

fn sctp(name: &'static str, direction: Direction, tag: u32, chunk: &[u8]) -> Said {
    Said { name, direction, rest: [&tag.to_be_bytes()[..], &[0; 4], chunk].concat() }
}

fn init(kind: u8, tag: u32) -> Vec<u8> {
    [&[kind, 0, 0, 20][..], &tag.to_be_bytes(), &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]].concat()
}

/// Where an association stands: its state, and whether it is one that was ended.
type Association = (SctpState, bool);

fn to_association((state, is_over): Association) -> Vec<Said> {
    let script = [
        sctp("INIT", Original, 0, &init(1, CLIENT_TAG)),
        sctp("INIT ACK", Reply, CLIENT_TAG, &init(2, SERVER_TAG)),
        sctp("COOKIE ECHO", Original, SERVER_TAG, &[10, 0, 0, 8, 1, 2, 3, 4]),
        sctp("COOKIE ACK", Reply, CLIENT_TAG, &[11, 0, 0, 4]),
        sctp("SHUTDOWN", Original, SERVER_TAG, &[7, 0, 0, 8, 0, 0, 0, 1]),
        sctp("SHUTDOWN ACK", Reply, CLIENT_TAG, &[8, 0, 0, 4]),
        sctp("SHUTDOWN COMPLETE", Original, SERVER_TAG, &[14, 0, 0, 4]),
    ];
    let count = match state {
        SctpState::Closed if is_over => 7,
        SctpState::Closed => 1,
        SctpState::CookieWait => 2,
        SctpState::CookieEchoed => 3,
        SctpState::Established => 4,
        SctpState::ShutdownSent => 5,
        _ => 6,
    };
    script[..count].into()
}

fn sctp_table() -> Vec<Row<Association>> {
    const ALL: &[Association] = &[
        (SctpState::Closed, false),
        (SctpState::CookieWait, false),
        (SctpState::CookieEchoed, false),
        (SctpState::Established, false),
        (SctpState::ShutdownSent, false),
        (SctpState::ShutdownAckSent, false),
        (SctpState::Closed, true),
    ];
    let inits = || {
        vec![
            sctp("a repeated INIT", Original, 0, &init(1, CLIENT_TAG)),
            sctp("a new INIT", Original, 0, &init(1, CLIENT_TAG + 1)),
        ]
    };
    let data: &[u8] = &[0, 3, 0, 20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4];
    let others = |direction| {
        let tag = if direction == Original { SERVER_TAG } else { CLIENT_TAG };
        vec![
            sctp("DATA", direction, tag, data),
            sctp("HEARTBEAT", direction, tag, &[4, 0, 0, 8, 0, 1, 0, 4]),
            sctp("SHUTDOWN ACK", direction, tag, &[8, 0, 0, 4]),
            sctp("ABORT", direction, tag, &[6, 0, 0, 4]),
        ]
    };
    let gone = Cut(DropReason::BackendGone);
    let denied = Ends(DropReason::PolicyDeniedIngress);
    vec![
        Row {
            states: &ALL[..1],
            packets: inits(),
            outcomes: [Follows, Follows, Opens(&NEW), REFUSED, UNCLAIMED, Follows, denied, Opens(&NEW)],
            linux: "as TCP's unanswered SYN",
        },
        Row {
            states: &ALL[1..6],
            packets: inits(),
            outcomes: [Follows, Follows, Opens(&NEW), REFUSED, UNCLAIMED, Follows, DENIED, DENIED],
            linux: "lets it through, for the pod to answer (RFC 9260, 5.2.2)",
        },
        Row {
            states: &ALL[6..],
            packets: inits(),
            outcomes: [Opens(&OLD), Opens(&NEW), Opens(&NEW), REFUSED, UNCLAIMED, UNCLAIMED, denied, Opens(&NEW)],
            linux: "goes on with the entry and its old pod; conntrack/src/sctp.rs says why weir does not",
        },
        Row {
            states: ALL,
            packets: others(Original),
            outcomes: [Follows, Follows, gone, gone, Follows, Follows, DENIED, DENIED],
            linux: "sends it to the pod that is gone; SCTP has nothing that a router could answer in another's name without its tag",
        },
        Row {
            states: ALL,
            packets: others(Reply),
            outcomes: [Follows, Follows, gone, gone, Follows, Follows, DENIED, DENIED],
            linux: "translates it",
        },
    ]
}

#[test]
fn sctp_every_state_every_packet_every_change() {
    let flow = |way: Way, state: Association| {
        let mut case = Case::new(way);
        to_association(state).iter().for_each(|said| case.pass(said));
        assert_eq!(case.listed()[0].sctp, Some(state.0));
        case
    };
    for way in Way::all(Protocol::SCTP, false) {
        for Row { states, packets, outcomes, .. } in sctp_table() {
            for (&state, said) in states.iter().flat_map(|state| packets.iter().map(move |said| (state, said))) {
                for (change, outcome) in cases(outcomes) {
                    let what = format!("{way:?}: {said:?} in {state:?}, {change:?}");
                    let mut case = flow(way, state);
                    case.change(change);
                    let before = case.seen(Vec::new());
                    let outcome = for_way(way, change, outcome, said.direction);
                    case.check(said, outcome, &before, || flow(way, state), &what);
                    case.router.finish();
                }
            }
        }
    }
}

/// A flow from a pod to an address outside, where a service appears then (27b).
struct Unserved {
    router: Router,
    family: usize,
    protocol: u8,
    replies_to: (IpAddr, u16),
}

impl Unserved {
    fn new(family: usize, protocol: u8) -> Self {
        let snat = SnatPorts::new(10_000..=20_000, []).unwrap();
        let router = Router::new(rules(Vec::new(), true), snat, 64);
        Self { router, family, protocol, replies_to: (ip(CLIENT[family]), CLIENT_PORT) }
    }

    fn appears(&mut self) {
        let web = service("default/web", Protocol(self.protocol), OUTSIDE, OLD, None);
        self.router.publish(rules(vec![web], true));
    }

    /// Where a packet goes: device, address and port; nowhere.
    fn say(&mut self, said: &Said) -> Option<(IfIndex, (IpAddr, u16))> {
        let (client, outside) = ((ip(CLIENT[self.family]), CLIENT_PORT), (ip(OUTSIDE[self.family]), 53));
        let (device, [from, to]) = match said.direction {
            Original => (CLIENT_POD, [client, outside]),
            Reply => (UPLINK, [outside, self.replies_to]),
        };
        let l4 = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &said.rest].concat();
        let packet = Packet { src: from.0, dst: to.0, protocol: self.protocol, ttl: 64, tos: 0, options: 0, l4 };
        let sent = self.router.one(device, &packet.frame());
        let [((device, _), bytes)] = received(&sent)[..] else { return None };
        let left = read(bytes);
        if said.direction == Original && device != CLIENT_POD {
            self.replies_to = ends(&left)[0];
        }
        Some((device, ends(&left)[1]))
    }
}

#[test]
fn a_service_that_appears_takes_over_what_begins_and_no_connection_that_lives() {
    for family in 0..2 {
        let (outside, backend) = ((UPLINK, (ip(OUTSIDE[family]), 53)), (SERVER_POD, (ip(OLD[family]), 5353)));
        for state in TcpState::ALL {
            for said in syns().into_iter().chain(others(Original)) {
                let what = format!("{said:?} in {state:?}, family {family}");
                let flow = || {
                    let mut flow = Unserved::new(family, TCP);
                    to_state(state).iter().for_each(|said| assert!(flow.say(said).is_some(), "{what}"));
                    flow
                };
                let is_syn = said.rest[9] & (SYN | ACK) == SYN;
                let expected = match state {
                    SynSent | TimeWait | Close if is_syn => Some(backend),
                    _ if is_syn && state != SynSent2 => Some(outside),
                    // Whatever it is that conntrack says of it.
                    _ => flow().say(&said),
                };
                let mut flow = flow();
                flow.appears();
                assert_eq!(flow.say(&said), expected, "{what}");
                flow.router.finish();
            }
        }
        // The unanswered INIT as the unanswered SYN; an association that lives goes on, and so does what it sends.
        for count in [1, 4] {
            let mut flow = Unserved::new(family, SCTP);
            to_association((SctpState::Established, false))[..count].iter().for_each(|said| {
                assert!(flow.say(said).is_some());
            });
            flow.appears();
            let said = match count {
                1 => sctp("INIT", Original, 0, &init(1, CLIENT_TAG)),
                _ => sctp("HEARTBEAT", Original, SERVER_TAG, &[4, 0, 0, 8, 0, 1, 0, 4]),
            };
            assert_eq!(flow.say(&said), Some(if count == 1 { backend } else { outside }), "{said:?}");
            flow.router.finish();
        }
        // A datagram like any other.
        let mut flow = Unserved::new(family, UDP);
        assert_eq!(flow.say(&datagram(Original)), Some(outside));
        flow.appears();
        assert_eq!(flow.say(&datagram(Original)), Some(backend));
        flow.router.finish();
        // Also where an answer comes first, which passes.
        let mut flow = Unserved::new(family, UDP);
        assert_eq!(flow.say(&datagram(Original)), Some(outside));
        flow.appears();
        assert_eq!(flow.say(&datagram(Reply)), Some((CLIENT_POD, (ip(CLIENT[family]), CLIENT_PORT))));
        assert_eq!(flow.say(&datagram(Original)), Some(backend));
        flow.router.finish();
    }
}

/// A pod's flow to the outside, masqueraded, whose way out gets another address. The node has the old one yet, on another device, or not.
#[test]
fn a_masqueraded_flow_whose_way_out_changed_begins_anew_and_tcp_goes_on_while_its_address_is_there() {
    const NEW_NODE: [&str; 2] = ["192.168.10.7", "fd00:10::7"];
    let change = |flow: &mut Unserved, is_gone: bool| {
        let (mut cluster, mut links) = (cluster(), links());
        links.devices[0].addresses = ["192.168.10.7/24", "fd00:10::7/64"].map(|net| net.parse().unwrap()).into();
        if is_gone {
            cluster.nodes[0].internal_ips = NEW_NODE.map(ip).into();
        }
        let forwarding = Arc::new(Forwarding::compile(&cluster, &links).unwrap());
        let next = flow.router.next(rules(Vec::new(), true), forwarding);
        flow.router.published.publish(next);
    };
    for (family, is_gone) in [(0, false), (0, true), (1, false), (1, true)] {
        let outside = Some((UPLINK, (ip(OUTSIDE[family]), 53)));
        let client = Some((CLIENT_POD, (ip(CLIENT[family]), CLIENT_PORT)));
        let (old, new) = (ip(NODE[family]), ip(NEW_NODE[family]));
        for state in [Datagrams::Unreplied, Datagrams::Replied, Datagrams::Stream] {
            let what = format!("{state:?}, family {family}, gone: {is_gone}");
            let mut flow = Unserved::new(family, UDP);
            let rounds = [Datagrams::Unreplied, Datagrams::Replied, Datagrams::Stream];
            for _ in 0..=rounds.iter().position(|one| *one == state).unwrap() {
                assert_eq!((flow.say(&datagram(Original)), flow.replies_to.0), (outside, old), "{what}");
                if state != Datagrams::Unreplied {
                    assert_eq!(flow.say(&datagram(Reply)), client, "{what}");
                }
                flow.router.wait(3 * SECOND);
            }
            change(&mut flow, is_gone);
            if state != Datagrams::Unreplied && !is_gone {
                assert_eq!(flow.say(&datagram(Reply)), client, "{what}: an answer that was under way");
            }
            for _ in 0..2 {
                assert_eq!((flow.say(&datagram(Original)), flow.replies_to.0), (outside, new), "{what}");
                assert_eq!(flow.say(&datagram(Reply)), client, "{what}");
            }
            assert_eq!(flow.router.finish().opened, 2, "{what}");
        }
        for state in TcpState::ALL {
            for said in syns().into_iter().chain(others(Original)) {
                let what = format!("{said:?} in {state:?}, family {family}, gone: {is_gone}");
                let flow = || {
                    let mut flow = Unserved::new(family, TCP);
                    to_state(state).iter().for_each(|said| assert!(flow.say(said).is_some(), "{what}"));
                    flow
                };
                let is_syn = said.rest[9] & (SYN | ACK) == SYN;
                let opens = is_syn && (is_gone || matches!(state, SynSent | TimeWait | Close));
                let goes_on = flow().say(&said);
                let mut flow = flow();
                change(&mut flow, is_gone);
                if opens {
                    assert_eq!((flow.say(&said), flow.replies_to.0), (outside, new), "{what}");
                } else if is_gone {
                    // The client is told, but for its own RST.
                    assert_eq!(flow.say(&said), client.filter(|_| !is_reset(&said)), "{what}");
                    assert_eq!(flow.router.drops(), BTreeMap::from([(DropReason::AddressGone, 1)]), "{what}");
                } else {
                    assert_eq!(flow.say(&said), goes_on, "{what}");
                    assert!(goes_on.is_none() || flow.replies_to.0 == old, "{what}");
                }
                flow.router.finish();
            }
        }
    }
}

/// An echo has no ports: no service serves it, but one may appear where it goes, and policy judges it.
#[test]
fn echoes_follow_services_and_policies_and_begin_anew_after_their_timeout() {
    for family in 0..2 {
        for is_answered in [false, true] {
            for change in ["nothing", "service", "policy"] {
                for is_late in [false, true] {
                    let what = format!("family {family}, answered: {is_answered}, {change}, late: {is_late}");
                    let snat = SnatPorts::new(10_000..=20_000, []).unwrap();
                    let mut router = Router::new(rules(Vec::new(), true), snat, 64);
                    let to = if change == "service" { OUTSIDE } else { OLD };
                    let (icmp, request, reply) = if family == 0 { (1, 8, 0) } else { (58, 128, 129) };
                    let echo = |kind: u8, [src, dst]: [IpAddr; 2], id: [u8; 2]| {
                        let l4 = [&[kind, 0, 0, 0][..], &id, &[0, 1, 9, 9]].concat();
                        Packet { src, dst, protocol: icmp, ttl: 64, tos: 0, options: 0, l4 }
                    };
                    let (client, peer) = (ip(CLIENT[family]), ip(to[family]));
                    let asked = echo(request, [client, peer], [7, 7]);
                    let through = |router: &mut Router, device, packet: &Packet| -> Left {
                        let sent = router.one(device, &packet.frame());
                        received(&sent).into_iter().map(|((device, _), bytes)| (device, read(bytes))).collect()
                    };
                    let left = through(&mut router, CLIENT_POD, &asked);
                    let [(device, sent)] = &left[..] else { panic!("{what}: {left:?}") };
                    if is_answered {
                        let answer = echo(reply, [peer, sent.src], [sent.l4[4], sent.l4[5]]);
                        assert_eq!(through(&mut router, *device, &answer)[0].0, CLIENT_POD, "{what}");
                    }
                    match change {
                        "service" => {
                            router.publish(rules(vec![service("default/web", Protocol::TCP, OUTSIDE, NEW, None)], true))
                        }
                        "policy" => router.publish(rules(Vec::new(), false)),
                        _ => router.publish(rules(Vec::new(), true)),
                    }
                    if is_late {
                        router.wait(30 * SECOND);
                    }
                    let opened = router.totals().opened;
                    let left = through(&mut router, CLIENT_POD, &asked);
                    let mut listed = Vec::new();
                    listed_of(&router.tables.v4, router.now, &mut listed);
                    listed_of(&router.tables.v6, router.now, &mut listed);
                    let seen = (
                        left.len(),
                        left.first().map(|(device, _)| *device),
                        listed.len(),
                        router.totals().opened - opened,
                    );
                    let (expected, drops) = match change {
                        // Refused, and the pod is told.
                        "service" => ((1, Some(CLIENT_POD), 0, 0), Some(DropReason::UnpublishedPort)),
                        // The entry of what is cut waits for its timeout.
                        "policy" => ((0, None, usize::from(!is_late), 0), Some(DropReason::PolicyDeniedIngress)),
                        _ => ((1, Some(*device), 1, u64::from(is_late)), None),
                    };
                    assert_eq!(seen, expected, "{what}");
                    assert_eq!(router.drops(), drops.map(|reason| (reason, 1)).into_iter().collect(), "{what}");
                    router.finish();
                }
            }
        }
    }
}

/// The pod behind a flow has gone with its device, and another has its address, as a StatefulSet's next one may.
#[test]
fn whoever_has_the_address_of_a_pod_that_is_gone_opens_anew() {
    const NEXT_POD: IfIndex = IfIndex(21);
    let moved = || {
        let mut links = links();
        links.devices.iter_mut().filter(|device| device.index == CLIENT_POD).for_each(|device| device.index = NEXT_POD);
        Arc::new(Forwarding::compile(&cluster(), &links).unwrap())
    };
    for family in 0..2 {
        let way = |protocol| Way { family, protocol, is_outside: false, has_affinity: false, is_offloaded: false };
        for state in TcpState::ALL {
            for said in syns().into_iter().chain(others(Original)) {
                let what = format!("{said:?} in {state:?}, family {family}");
                let mut case = tcp_flow(way(Protocol::TCP), state);
                let old = case.listed();
                case.publish(case.way.rules(Alive), moved());
                let ends = [case.way.client().0, case.way.frontend()];
                let left = case.send(NEXT_POD, ends, &said.rest);
                let listed = case.listed();
                if said.rest[9] & (SYN | ACK) == SYN {
                    assert_eq!((left.len(), left[0].0, case.router.totals().opened), (1, SERVER_POD, 2), "{what}");
                    assert!(listed.len() == 1 && listed[0].identity != old[0].identity, "{what}: {listed:?}");
                    assert_eq!((listed[0].tcp, case.router.drops()), (Some(SynSent), BTreeMap::new()), "{what}");
                } else {
                    assert_eq!((left, listed), (Vec::new(), Vec::new()), "{what}");
                    assert_eq!(case.router.drops(), BTreeMap::from([(DropReason::UnknownDevice, 1)]), "{what}");
                }
                case.router.finish();
            }
        }
        let mut case = udp_flow(way(Protocol::UDP), Datagrams::Replied);
        case.publish(case.way.rules(Alive), moved());
        let ends = [case.way.client().0, case.way.frontend()];
        assert_eq!(case.send(NEXT_POD, ends, &datagram(Original).rest)[0].0, SERVER_POD);
        assert_eq!((case.router.totals().opened, case.router.finish().dropped()), (2, 0));
    }
}

/// A worker whose turn began before a publication gets packets of a flow that another one has opened, or judged, by what was published: its
/// own tables do not know the backend yet, and must not end the flow for that.
#[test]
fn a_flow_of_a_later_generation_is_not_judged_by_an_earlier_one() {
    for family in 0..2 {
        for (protocol, is_outside) in
            [(Protocol::TCP, false), (Protocol::TCP, true), (Protocol::UDP, false), (Protocol::UDP, true)]
        {
            let way = Way { family, protocol, is_outside, has_affinity: false, is_offloaded: false };
            let mut case = Case::new(way);
            let earlier = case.router.published.current();
            case.change(Gone);
            let (first, answer, next) = match protocol {
                Protocol::TCP => (
                    tcp("SYN", Original, SYN, C, 0),
                    tcp("SYN/ACK", Reply, SYN | ACK, S, C + 1),
                    tcp("ACK", Original, ACK, C + 1, S + 1),
                ),
                _ => (datagram(Original), datagram(Reply), datagram(Original)),
            };
            let left = case.say(&first);
            let (backend, device) = way.backend(NEW);
            assert_eq!((left[0].0, ends(&left[0].1)[1]), (device, backend));
            let client = ends(&left[0].1)[0];
            let before = case.listed();
            for (device, [from, to], rest, expected) in [
                (device, [backend, client], &answer.rest, way.client().1),
                (way.client().1, [way.client().0, way.frontend()], &next.rest, device),
            ] {
                let l4 = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), rest].concat();
                let packet = Packet { src: from.0, dst: to.0, protocol: protocol.0, ttl: 64, tos: 0, options: 0, l4 };
                let sent = case.router.turn_by(Some(&earlier), &[(device, framed(device, &packet))]);
                assert_eq!((sent.len(), sent[0].0), (1, expected), "{way:?}");
            }
            let after = case.listed();
            assert_eq!((after.len(), after[0].identity, after[0].reply), (1, before[0].identity, before[0].reply));
            assert_eq!((after[0].lifecycle, case.router.totals().opened), (Lifecycle::Established.name(), 1));
            // What has gone since is judged by the later tables all the same.
            case.change(Alive);
            case.say(&next);
            let expected = if protocol == Protocol::TCP { Some(1) } else { None };
            assert_eq!(case.router.drops().get(&DropReason::BackendGone).copied(), expected);
            case.router.finish();
        }
    }
}

/// One of two workers on the same tables.
struct OtherWorker(MemoryWorker);

impl OtherWorker {
    fn new(shared: &Shared, seed: u64) -> Self {
        let room = Room { burst: 64, ports: 2, frames: 256, events: 64 };
        Self(MemoryWorker::new(shared, ChaCha8Rng::seed_from_u64(seed), room))
    }

    /// A turn for each packet; all that was sent.
    fn run(&mut self, shared: &Shared, packets: &[(IfIndex, Packet)]) -> Left {
        let mut sent = Vec::new();
        for (device, packet) in packets {
            let mut frame = self.0.driver.packet_of(&[&packet.frame()]).expect("a frame");
            (frame.device, frame.link) = (*device, LinkType::Host);
            self.0.burst.push(frame);
            self.0.turn(shared, Tick(1000), |pipeline, driver, burst, context| {
                process_burst(pipeline, driver, burst, context);
                pipeline.maintain(driver, context, 32);
            });
            self.0.driver.drain_sent(|device, bytes| sent.push((device, bytes.to_vec())));
        }
        assert!(self.0.pipeline.totals().balance() && self.0.driver.outstanding() == 0);
        received(&sent).into_iter().map(|((device, _), bytes)| (device, read(bytes))).collect()
    }
}

/// Two workers, one with SYNs of a port that is used again, one with another copy of the SYN and with what the old backend still sends: one
/// connection comes of it, whatever meets the old entry first.
#[test]
fn two_workers_open_one_connection_where_an_old_one_is_over() {
    let way = Way { family: 0, protocol: Protocol::TCP, is_outside: false, has_affinity: false, is_offloaded: false };
    let forwarding = Arc::new(Forwarding::compile(&cluster(), &links()).unwrap());
    let snat = Arc::new(SnatPorts::new(10_000..=20_000, []).unwrap());
    let by_change = [Alive, Gone].map(|change| Arc::new(way.rules(change)));
    let snapshot = |generation: u32| Snapshot {
        generation,
        rules: by_change[(generation as usize + 1) % 2].clone(),
        snat: snat.clone(),
        forwarding: forwarding.clone(),
    };
    let shared = Shared::repeatable(snapshot(1), [1024; 2]);
    let (mut one, mut other) = (OtherWorker::new(&shared, 3), OtherWorker::new(&shared, 4));
    let old = way.backend(OLD);
    let (new, new_device) = way.backend(NEW);
    const ROUNDS: u32 = 1500;
    for round in 0..ROUNDS {
        let client = (way.client().0.0, 30_000 + round as u16);
        let packet = |said: &Said| {
            let (device, [from, to]) = match said.direction {
                Original => (CLIENT_POD, [client, way.frontend()]),
                Reply => (old.1, [old.0, client]),
            };
            let l4 = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &said.rest].concat();
            (device, Packet { src: from.0, dst: to.0, protocol: TCP, ttl: 64, tos: 0, options: 0, l4 })
        };
        let state = [TimeWait, Close, SynSent, Established][round as usize % 4];
        let opening: Vec<_> = to_state(state).iter().map(packet).collect();
        assert_eq!(one.run(&shared, &opening).len(), opening.len(), "round {round}");
        shared.published.publish(Arc::new(snapshot(2 * round + 2)));

        let syn = packet(&tcp("SYN", Original, SYN, 900_000, 0));
        let [fin, ack, reset] = [(FIN | ACK, S + 2), (ACK, S + 2), (RST, S + 2)]
            .map(|(flags, seq)| packet(&tcp("late", Reply, flags, seq, C + 2)));
        let late = match round % 3 {
            0 => vec![fin, syn.clone(), reset],
            1 => vec![syn.clone(), fin, reset],
            _ => vec![ack, syn.clone(), reset],
        };
        let barrier = Barrier::new(2);
        let sent = thread::scope(|scope| {
            let first = scope.spawn(|| {
                barrier.wait();
                one.run(&shared, std::slice::from_ref(&syn))
            });
            let second = scope.spawn(|| {
                barrier.wait();
                other.run(&shared, &late)
            });
            [first.join().unwrap(), second.join().unwrap()].concat()
        });
        // Each copy of the SYN has come to the new backend, as one and the same flow.
        let arrived: Vec<_> = sent.iter().filter(|(device, _)| *device == new_device).collect();
        assert_eq!(arrived.len(), 2, "round {round}, {state:?}: {sent:?}");
        assert!(arrived.iter().all(|(_, packet)| ends(packet) == [client, new] && packet.l4[13] == SYN), "{sent:?}");
        let mut listed = Vec::new();
        listed_of(&shared.tables.v4, Tick(1000), &mut listed);
        listed.retain(|one| one.original == [client, way.frontend()]);
        let [opened] = &listed[..] else { panic!("round {round}: {listed:?}") };
        assert_eq!((opened.tcp, opened.reply), (Some(SynSent), [new, client]), "round {round}");
        shared.published.publish(Arc::new(snapshot(2 * round + 3)));
        shared.published.collect();
        // Room for the next ones.
        let (mut participant, table) = (shared.domain.join(), &shared.tables.v4);
        let mut identities = Vec::new();
        table.for_each(Tick(1000), |entry| identities.push(entry.identity));
        let (turn, mut handle) = (participant.enter(), table.handle());
        identities.into_iter().for_each(|identity| assert!(table.remove_listed(&mut handle, identity, &turn)));
    }
}
