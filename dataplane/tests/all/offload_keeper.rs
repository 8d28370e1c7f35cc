//! The keeper of flows in the kernel, over memory of this process: what it hands over, confirms, takes back, refuses.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crate::keys::SharedKeys;
use crate::packets::{Packet, TCP, UDP};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, cluster, ip, links, rules, service};
use crossbeam::channel::Receiver;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use weir_conntrack::{OFFLOADED, Windows};
use weir_dataplane::{
    clock::now,
    forwarding::Forwarding,
    frame::IfIndex,
    model::{Cluster, Links, Neighbor},
    offload::{
        Offload, Request,
        flow::{Flow, Mapped, Phase},
        keeper::{Counts, Keeper, Keys, keep},
        recipe::{Exit, Key},
    },
    snapshot::{Rules, Snapshot},
};
use weir_nat::SnatPorts;
use weir_packet::{Direction, FlowKey, Mac, Ports, Protocol, Tick};
use weir_sync::lock;

const CLIENT: &str = "10.1.1.10";
const SERVER: &str = "10.1.1.20";
const VIP: &str = "10.96.0.10";

const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;

type MemoryKeys = HashMap<Key, (u32, u32)>;

/// A router with a keeper.
struct Bench<K = MemoryKeys> {
    router: Router,
    offload: Arc<Offload>,
    requests: Receiver<Request>,
    keys: SharedKeys<K>,
    keeper: Keeper,
    capacity: u32,
    graces: u64,
}

/// A flow that was opened, by the key of its original direction's packets.
#[derive(Clone, Copy, Debug)]
struct Opened {
    key: FlowKey<Ipv4Addr>,
    device: IfIndex,
}

fn service_rules(is_open: bool, has_backend: bool) -> Rules {
    let mut service = service("default/udp", Protocol::UDP, [VIP, "fd00:96::10"], [SERVER, "fd00:1:1::20"], None);
    if !has_backend {
        service.endpoints.clear();
    }
    rules(vec![service], is_open)
}

fn forwarding(cluster: &Cluster, links: &Links) -> Arc<Forwarding> {
    Arc::new(Forwarding::compile(cluster, links).unwrap())
}

impl<K: Keys + Default + 'static> Bench<K> {
    fn new(capacity: u32) -> Self {
        let snat = SnatPorts::new(10_000..=20_000, []).unwrap();
        let mut router = Router::new(service_rules(true, true), snat, 1024);
        router.now = now();
        let (flows, epoch) = (Mapped::private(capacity as usize).unwrap(), Mapped::private(1).unwrap());
        let (offload, requests) = Offload::new(flows, epoch, 1);
        let offload = Arc::new(offload);
        router.tables.v4.offload_to(offload.clone());
        router.offload = Some(offload.clone());
        let keys = SharedKeys::default();
        let keeper = keeper(&router, &offload, capacity, &keys);
        Self { router, offload, requests, keys, keeper, capacity, graces: 0 }
    }

    /// Another process's keeper takes over; how many flows it adopts.
    fn restart(&mut self) -> usize {
        self.keeper = keeper(&self.router, &self.offload, self.capacity, &self.keys);
        let adopted = self.keeper.adopt(self.keys.all().unwrap(), &self.router.tables);
        let current = self.router.published.current();
        self.keeper.prepare(&current, &self.router.tables);
        adopted
    }

    fn pending(&self) -> Vec<Request> {
        self.requests.try_iter().collect()
    }

    fn answer_these(&mut self, requests: &[Request]) {
        self.graces += 1;
        self.keeper.answer(requests, self.graces, &self.router.tables);
    }

    fn answer(&mut self) {
        self.answer_these(&self.pending());
    }

    fn look(&mut self) {
        // What is over is given up at the second.
        self.keeper.look(&self.router.tables);
        self.keeper.look(&self.router.tables);
    }

    /// Before and after a publication.
    fn prepare(&mut self, rules: Rules, forwarding: Arc<Forwarding>) {
        let next = self.router.next(rules, forwarding);
        self.keeper.prepare(&next, &self.router.tables);
        self.router.published.publish(next);
    }

    fn same_forwarding(&self) -> Arc<Forwarding> {
        self.router.forwarding.clone()
    }

    fn send(&mut self, device: IfIndex, [from, to]: [(IpAddr, u16); 2], l4: &[u8], protocol: u8) -> Option<Vec<u8>> {
        let l4 = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), l4].concat();
        let packet = Packet { src: from.0, dst: to.0, protocol, ttl: 64, tos: 0, options: 0, l4 };
        let sent = self.router.one(device, &packet.frame());
        sent.first().map(|(_, frame)| frame[14..].to_vec())
    }

    /// A UDP flow that is answered.
    fn open(&mut self, device: IfIndex, port: u16, to: (&str, u16)) -> Opened {
        let from = (ip(if device == CLIENT_POD { CLIENT } else { SERVER }), port);
        let to = (ip(to.0), to.1);
        let datagram = [0, 8, 0, 0];
        let left = Packet::read(&self.send(device, [from, to], &datagram, UDP).expect("it passes"));
        let word = |at: usize| u16::from_be_bytes([left.l4[at], left.l4[at + 1]]);
        let back = [(left.dst, word(2)), (left.src, word(0))];
        self.send(SERVER_POD, back, &datagram, UDP).expect("the answer passes");
        opened(device, from, to, Protocol::UDP)
    }

    /// Another packet of the original direction of a UDP flow; whether it was sent on.
    fn again(&mut self, flow: Opened) -> bool {
        let FlowKey { src, dst, ports, .. } = flow.key;
        let ends = [(src.into(), ports.source()), (dst.into(), ports.destination())];
        self.send(flow.device, ends, &[0, 8, 0, 0], UDP).is_some()
    }

    fn segment(&mut self, port: u16, direction: Direction, seq: u32, ack: u32, flags: u8) -> bool {
        let ends = [(ip(CLIENT), port), (ip(SERVER), 80)];
        let (device, ends) = match direction {
            Direction::Original => (CLIENT_POD, ends),
            Direction::Reply => (SERVER_POD, [ends[1], ends[0]]),
        };
        let l4 = [&seq.to_be_bytes()[..], &ack.to_be_bytes(), &[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]].concat();
        self.send(device, ends, &l4, TCP).is_some()
    }

    /// A TCP connection whose sides begin at 100 and 1000.
    fn connect(&mut self, port: u16) -> Opened {
        assert!(self.segment(port, Direction::Original, 99, 0, SYN));
        assert!(self.segment(port, Direction::Reply, 999, 100, SYN | ACK));
        for _ in 0..4 {
            assert!(self.segment(port, Direction::Original, 100, 1000, ACK));
            assert!(self.segment(port, Direction::Reply, 1000, 100, ACK));
        }
        opened(CLIENT_POD, (ip(CLIENT), port), (ip(SERVER), 80), Protocol::TCP)
    }

    /// The slot of a flow, if its connection is marked as handed over.
    fn slot(&mut self, flow: Opened) -> Option<u32> {
        let marked = self.router.connection(&flow.key, |conn, direction| {
            assert_eq!(direction, Direction::Original);
            (conn.flags() & OFFLOADED != 0).then(|| conn.offload_slot())
        });
        marked.flatten()
    }

    fn remove(&mut self, flow: Opened) {
        let mut participant = self.router.domain.join();
        let (turn, table) = (participant.enter(), &self.router.tables.v4);
        let hit = table.lookup(&flow.key, table.hash(&flow.key), self.router.now, &turn).expect("it is there");
        assert!(table.remove(&mut table.handle(), hit.conn, &turn));
    }
}

/// The program's key of a flow's packets that come by a device.
fn key(flow: &FlowKey<Ipv4Addr>, device: IfIndex) -> Key {
    let mut key = [0; 20];
    key[..4].copy_from_slice(&flow.src.octets());
    key[4..8].copy_from_slice(&flow.dst.octets());
    key[8..12].copy_from_slice(&flow.ports.word().to_ne_bytes());
    key[12..16].copy_from_slice(&device.0.to_ne_bytes());
    key[16..].copy_from_slice(&u32::from(flow.protocol.0).to_ne_bytes());
    Key::V4(key)
}

/// The way that a program finds by a key, if it carries its packets: as `bpf/offload.h` does.
fn found<'o>(offload: &'o Offload, keys: &SharedKeys<MemoryKeys>, key: &Key) -> Option<(&'o Flow, Direction)> {
    let (way, serial) = *keys.0.lock().unwrap().get(key)?;
    let flow = offload.flow(way >> 1).expect("keys lead to slots");
    let direction = if way & 1 == 0 { Direction::Original } else { Direction::Reply };
    if flow.state() != (serial, Phase::Live) {
        return None;
    }
    let is_stale = (flow.epoch.load(Ordering::Relaxed).wrapping_sub(offload.epoch()) as i32) < 0;
    (!is_stale).then_some((flow, direction))
}

fn is_open(flow: &Flow, direction: Direction) -> bool {
    flow.ways[direction as usize].exit.load(Ordering::Relaxed) != Exit::Closed as u8
}

impl Bench {
    /// The slot of a flow whose original direction's packets a program carries.
    fn carries(&self, flow: Opened) -> Option<&Flow> {
        let (slot, direction) = found(&self.offload, &self.keys, &key(&flow.key, flow.device))?;
        is_open(slot, direction).then_some(slot)
    }

    fn key_count(&self) -> usize {
        self.keys.0.lock().unwrap().len()
    }
}

fn keeper<K: Keys + 'static>(router: &Router, offload: &Arc<Offload>, capacity: u32, keys: &SharedKeys<K>) -> Keeper {
    let (domain, current) = (&router.domain, router.published.current());
    let mut keeper = Keeper::new(offload.clone(), capacity, Box::new(keys.clone()), domain, current.clone());
    if offload.epoch() == 0 {
        keeper.prepare(&current, &router.tables);
    }
    keeper
}

fn opened(device: IfIndex, from: (IpAddr, u16), to: (IpAddr, u16), protocol: Protocol) -> Opened {
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (from.0, to.0) else { unreachable!("the bench speaks IPv4") };
    Opened { key: FlowKey { src, dst, ports: Ports::new(from.1, to.1), protocol }, device }
}

/// A flow from pod to pod, one by the service, and one of the server by the service to itself.
fn three_flows(bench: &mut Bench) -> [Opened; 3] {
    let flows = [
        bench.open(CLIENT_POD, 5000, (SERVER, 80)),
        bench.open(CLIENT_POD, 5001, (VIP, 53)),
        bench.open(SERVER_POD, 5002, (VIP, 53)),
    ];
    bench.answer();
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [true; 3]);
    assert_eq!((bench.keeper.counts().flows, bench.keeper.counts().handed_over, bench.key_count()), (3, 3, 6));
    flows
}

#[test]
fn a_publication_stops_what_it_changes_and_nothing_else() {
    let moved = |change: fn(&mut Cluster, &mut Links)| {
        let (mut cluster, mut links) = (cluster(), links());
        change(&mut cluster, &mut links);
        forwarding(&cluster, &links)
    };
    let same = || moved(|_, _| {});
    let rows = [
        ("nothing", service_rules(true, true), same(), [true, true, true]),
        // A pod's packets to itself are its own business.
        ("policy", service_rules(false, true), same(), [false, false, true]),
        ("backend", service_rules(true, false), same(), [true, false, false]),
        (
            "device",
            service_rules(true, true),
            moved(|_, links| links.devices.retain(|device| device.index != CLIENT_POD)),
            [false, false, true],
        ),
        (
            "MAC address",
            service_rules(true, true),
            moved(|cluster, _| cluster.workloads[0].mac = Some(Mac([10, 0, 0, 0, 0, 77]))),
            [false, false, true],
        ),
        (
            "MTU",
            service_rules(true, true),
            moved(|_, links| links.devices.iter_mut().filter(|d| d.index == CLIENT_POD).for_each(|d| d.mtu = 1400)),
            [false, false, true],
        ),
        (
            "pod",
            service_rules(true, true),
            moved(|cluster, _| cluster.workloads[0].node = Some("b".into())),
            [false, false, true],
        ),
    ];
    for (name, rules, forwarding, expected) in rows {
        let mut bench = Bench::new(8);
        let flows = three_flows(&mut bench);
        bench.prepare(rules, forwarding);
        assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), expected, "{name}");
        assert_eq!(bench.offload.epoch(), 2, "{name}");
        // Nothing more happens until a packet comes.
        bench.answer();
        bench.look();
        assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), expected, "{name}");
        assert_eq!((bench.keeper.counts().renewed, bench.keeper.counts().unconfirmed), (0, 0), "{name}");
    }
}

#[test]
fn a_flow_that_was_stopped_comes_back_changed() {
    let mut bench = Bench::new(8);
    let flows = three_flows(&mut bench);
    let slots = flows.map(|flow| bench.slot(flow));
    let mut cluster = cluster();
    cluster.workloads[1].mac = Some(Mac([10, 0, 0, 0, 0, 77]));
    bench.prepare(service_rules(true, true), forwarding(&cluster, &links()));
    assert!(bench.carries(flows[0]).is_none() && bench.again(flows[0]));
    assert!(bench.carries(flows[0]).is_none(), "not before the keeper has answered");
    bench.answer();
    let slot = bench.carries(flows[0]).expect("it is back");
    assert_eq!(slot.ways[0].ethernet[5].load(Ordering::Relaxed), 77);
    assert_eq!(bench.keeper.counts(), Counts { renewed: 1, ..three_flows_counts() });
    assert_eq!((bench.slot(flows[0]), bench.key_count()), (slots[0], 6));
    // The others are still written otherwise.
    bench.prepare(service_rules(true, true), bench.same_forwarding());
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [true, false, false]);
}

#[test]
fn a_flow_that_a_publication_stopped_goes_on_by_another_that_lets_it() {
    let mut bench = Bench::new(8);
    let flows = three_flows(&mut bench);
    bench.prepare(service_rules(false, false), bench.same_forwarding());
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [false; 3]);
    // A worker ends the one whose backend is gone, and tells its sender.
    bench.again(flows[1]);
    bench.prepare(service_rules(true, true), bench.same_forwarding());
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [true, false, true]);
    assert_eq!(bench.keeper.counts(), three_flows_counts());
}

fn three_flows_counts() -> Counts {
    Counts { flows: 3, capacity: 8, handed_over: 3, ..Counts::default() }
}

#[test]
fn what_an_earlier_process_has_handed_over_goes_on() {
    let mut bench = Bench::new(8);
    let flows = three_flows(&mut bench);
    assert_eq!(bench.restart(), 3);
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [true; 3]);
    // New flows get other slots, and other serial numbers than any key has.
    let fourth = bench.open(CLIENT_POD, 5003, (SERVER, 80));
    bench.answer();
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [true; 3]);
    assert!(bench.carries(fourth).is_some());
    assert_eq!((bench.slot(fourth), bench.key_count()), (Some(3), 8));
    // They are looked after.
    bench.remove(flows[1]);
    bench.look();
    assert_eq!((bench.keeper.counts().flows, bench.key_count()), (3, 6));
}

#[test]
fn what_does_not_fit_is_not_adopted() {
    type Damage = fn(&mut Bench, [Opened; 3]);
    let rows: [(&str, Damage); 6] = [
        ("a key is missing", |bench, flows| {
            let slot = bench.slot(flows[0]).unwrap();
            bench.keys.0.lock().unwrap().retain(|_, (way, _)| *way != 2 * slot + 1);
        }),
        ("a key is of another use", |bench, flows| {
            let slot = bench.slot(flows[0]).unwrap();
            let mut keys = bench.keys.0.lock().unwrap();
            keys.values_mut().filter(|(way, _)| *way == 2 * slot).for_each(|(_, serial)| *serial += 1);
        }),
        ("it was taken back", |bench, flows| bench.carries(flows[0]).unwrap().close()),
        ("other words are written", |bench, flows| {
            bench.carries(flows[0]).unwrap().ways[0].device.store(99, Ordering::Relaxed);
        }),
        ("the connection is gone", |bench, flows| bench.remove(flows[0])),
        ("the connection is another's", |bench, flows| {
            let slot = bench.slot(flows[1]).unwrap();
            bench.router.connection(&flows[0].key, |conn, _| conn.set_offload_slot(slot)).unwrap();
        }),
    ];
    for (name, damage) in rows {
        let mut bench = Bench::new(8);
        let flows = three_flows(&mut bench);
        damage(&mut bench, flows);
        assert_eq!(bench.restart(), 2, "{name}");
        assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [false, true, true], "{name}");
        assert_eq!(bench.key_count(), 4, "{name}: what leads nowhere is removed");
        assert_eq!(bench.slot(flows[0]), None, "{name}: it is no longer marked");
        // Its packets ask again.
        assert!(bench.again(flows[0]) && bench.again(flows[0]));
        bench.answer();
        bench.answer();
        if name != "the connection is gone" {
            assert!(bench.carries(flows[0]).is_some(), "{name}");
        }
        assert_eq!([flows[1], flows[2]].map(|flow| bench.carries(flow).is_some()), [true; 2], "{name}");
    }
}

#[test]
fn a_connection_that_is_removed_is_stopped_at_once() {
    let mut bench = Bench::new(8);
    let flows = three_flows(&mut bench);
    bench.remove(flows[1]);
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [true, false, true]);
    bench.look();
    let counts = bench.keeper.counts();
    assert_eq!((counts.flows, counts.taken_back, bench.key_count()), (2, 1, 4));
}

#[test]
fn a_flow_on_the_keys_of_one_that_was_removed_keeps_them() {
    let mut bench = Bench::new(8);
    let flow = bench.open(CLIENT_POD, 5000, (SERVER, 80));
    bench.answer();
    bench.remove(flow);
    let flow = bench.open(CLIENT_POD, 5000, (SERVER, 80));
    bench.answer();
    assert!(bench.carries(flow).is_some());
    // Now the first one is cleaned up.
    bench.look();
    assert!(bench.carries(flow).is_some(), "the keys are the second one's");
    assert_eq!((bench.keeper.counts().flows, bench.key_count()), (1, 2));
}

#[test]
fn a_slot_is_used_again_only_when_programs_and_turns_of_its_time_are_over() {
    let mut bench = Bench::new(1);
    let first = bench.open(CLIENT_POD, 5000, (SERVER, 80));
    bench.answer();
    bench.remove(first);
    bench.look();
    let next = |bench: &mut Bench, port| {
        bench.open(CLIENT_POD, port, (SERVER, 80));
        bench.pending()
    };
    // No grace period has passed since.
    let requests = next(&mut bench, 5001);
    bench.keeper.answer(&requests, bench.graces, &bench.router.tables);
    assert_eq!((bench.keeper.counts().flows, bench.keeper.counts().full), (0, 1));
    // A turn goes on that may have seen it.
    let mut participant = bench.router.domain.join();
    let turn = participant.enter();
    bench.remove_and_hand_over_one(5002);
    bench.look();
    let requests = next(&mut bench, 5003);
    bench.answer_these(&requests);
    assert_eq!((bench.keeper.counts().flows, bench.keeper.counts().full), (0, 2));
    drop(turn);
    let requests = next(&mut bench, 5004);
    bench.answer_these(&requests);
    assert_eq!((bench.keeper.counts().flows, bench.keeper.counts().full), (1, 2));
}

/// Where the kernel does not tell when programs have ended, slots that were never used are all there are: neither is another's written for a new flow,
/// nor a flow's own for what it is to do by new tables.
#[test]
fn where_the_kernel_does_not_tell_of_programs_no_slot_is_written_again() {
    let mut bench = Bench::new(2);
    // The thread as it runs, one batch at a time, with a membarrier that fails or not.
    let run = |bench: &mut Bench, works: bool| {
        let keeper =
            Mutex::new(std::mem::replace(&mut bench.keeper, keeper(&bench.router, &bench.offload, 2, &bench.keys)));
        let waits = AtomicU64::new(0);
        let wait = || {
            waits.fetch_add(1, Ordering::Relaxed);
            if works { Ok(()) } else { Err(std::io::Error::from_raw_os_error(libc::ENOSYS)) }
        };
        let is_over = || waits.load(Ordering::Relaxed) > 0;
        keep(&keeper, &bench.requests, &bench.router.tables, is_over, wait);
        bench.keeper = keeper.into_inner().unwrap();
    };
    let flows = [5000, 5001].map(|port| {
        let flow = bench.open(CLIENT_POD, port, (SERVER, 80));
        run(&mut bench, false);
        flow
    });
    assert_eq!(flows.map(|flow| bench.carries(flow).is_some()), [true; 2], "slots that were never used");
    bench.remove(flows[0]);
    bench.look();
    let third = bench.open(CLIENT_POD, 5002, (SERVER, 80));
    run(&mut bench, false);
    assert_eq!([flows[1], third].map(|flow| bench.carries(flow).is_some()), [true, false]);
    // The server's MAC is another: the flow visits a worker, and its slot would be written for that.
    let mut links = links();
    links.neighbors.push(Neighbor { address: ip(SERVER), mac: Mac([7; 6]), device: SERVER_POD });
    let changed = forwarding(&cluster(), &links);
    bench.prepare(service_rules(true, true), changed);
    assert!(bench.carries(flows[1]).is_none());
    bench.again(flows[1]);
    run(&mut bench, false);
    assert!(bench.carries(flows[1]).is_none());
    // Until it works again.
    bench.look();
    bench.again(flows[1]);
    run(&mut bench, true);
    assert!(bench.carries(flows[1]).is_some());
}

impl Bench {
    /// One flow comes and goes, but for the keeper's next look.
    fn remove_and_hand_over_one(&mut self, port: u16) {
        let flow = self.open(CLIENT_POD, port, (SERVER, 80));
        self.answer();
        assert!(self.carries(flow).is_some());
        self.remove(flow);
    }
}

#[test]
fn what_is_idle_makes_way() {
    let mut bench = Bench::new(2);
    // Opened a minute ago: an adopted flow is as idle as its connection.
    bench.router.now = Tick(now().0.wrapping_sub(6000));
    let flows = [5000, 5001].map(|port| bench.connect(port));
    bench.answer();
    bench.router.now = now();
    assert_eq!(bench.restart(), 2);
    // One of them is carried.
    bench.carries(flows[0]).unwrap().ways[0].packets.fetch_add(1, Ordering::Relaxed);
    bench.look();
    let third = bench.open(CLIENT_POD, 5002, (SERVER, 80));
    bench.answer();
    let counts = bench.keeper.counts();
    assert_eq!((counts.full, counts.evicted, counts.taken_back, counts.packets), (1, 1, 0, 1));
    assert_eq!([flows[0], flows[1], third].map(|flow| bench.carries(flow).is_some()), [true, false, false]);
    // Nobody else is idle, and nobody is taken back twice.
    bench.open(CLIENT_POD, 5003, (SERVER, 80));
    bench.answer();
    assert_eq!((bench.keeper.counts().full, bench.keeper.counts().evicted), (2, 1));
    bench.look();
    assert_eq!(bench.keeper.counts().taken_back, 1);
    let fifth = bench.open(CLIENT_POD, 5004, (SERVER, 80));
    bench.answer();
    assert!(bench.carries(fifth).is_some(), "its slot is another's now");
    assert!(bench.carries(flows[0]).is_some());
}

#[test]
fn who_was_refused_for_room_asks_again_when_there_is_some() {
    let mut bench = Bench::new(1);
    let flows = [5000, 5001, 5002].map(|port| bench.open(CLIENT_POD, port, (SERVER, 80)));
    bench.answer();
    let asks = |bench: &mut Bench| {
        flows[1..].iter().for_each(|flow| assert!(bench.again(*flow)));
        bench.pending()
    };
    bench.look();
    assert_eq!(asks(&mut bench), [], "there is no room");
    bench.remove(flows[0]);
    bench.look();
    let identity = bench.router.connection(&flows[2].key, |conn, _| conn.identity()).unwrap();
    let requests = asks(&mut bench);
    assert_eq!(requests, [Request { is_v6: false, identity }], "as many may wait as there are slots");
    bench.answer_these(&requests);
    assert!(bench.carries(flows[2]).is_some());
}

#[test]
fn who_was_refused_for_room_gets_that_of_somebody_idle() {
    // More than are looked at when somebody is refused.
    const SLOTS: u16 = 65;
    let mut bench = Bench::new(u32::from(SLOTS));
    bench.router.now = Tick(now().0.wrapping_sub(6000));
    let flows: Vec<_> = (0..SLOTS).map(|number| bench.connect(5000 + number)).collect();
    bench.answer();
    bench.router.now = now();
    assert_eq!(bench.restart(), usize::from(SLOTS));
    for flow in &flows[..64] {
        bench.carries(*flow).unwrap().ways[0].packets.fetch_add(1, Ordering::Relaxed);
    }
    bench.look();
    let refused = bench.open(CLIENT_POD, 6000, (SERVER, 80));
    bench.answer();
    assert_eq!((bench.keeper.counts().full, bench.keeper.counts().handed_over), (1, 0));
    // One look to take the idle one back, two to free its slot.
    bench.look();
    bench.look();
    assert!(bench.again(refused));
    bench.answer();
    assert!(bench.carries(refused).is_some());
    assert_eq!(bench.keeper.counts().evicted, 1);
}

#[test]
fn who_is_refused_costs_nobody_else_a_slot() {
    let mut bench = Bench::new(2);
    let first = bench.open(CLIENT_POD, 5000, (SERVER, 80));
    let second = bench.open(CLIENT_POD, 5001, (SERVER, 80));
    bench.answer();
    for flow in [first, second] {
        bench.remove(flow);
    }
    bench.look();
    // Both slots are free; of three requests the first comes too late.
    let gone = bench.open(CLIENT_POD, 5002, (SERVER, 80));
    let rest = [5003, 5004].map(|port| bench.open(CLIENT_POD, port, (SERVER, 80)));
    bench.remove(gone);
    bench.answer();
    assert_eq!(rest.map(|flow| bench.carries(flow).is_some()), [true; 2]);
    assert_eq!(bench.keeper.counts().full, 0);
}

#[test]
fn a_request_that_was_made_twice_changes_nothing() {
    let mut bench = Bench::new(4);
    let flow = bench.connect(5000);
    let requests = bench.pending();
    assert_eq!(requests.len(), 1);
    bench.answer_these(&requests.repeat(2));
    let slot = bench.carries(flow).expect("it is handed over");
    let state = slot.state();
    slot.advance(&[[300, 70_000, 65_535, 1000], [1000, 66_000, 65_535, 300]]);
    let windows = slot.windows();
    bench.answer_these(&requests);
    let slot = bench.carries(flow).expect("it still is");
    assert_eq!((slot.state(), slot.windows()), (state, windows), "programs may be reading it");
    assert_eq!((bench.keeper.counts().handed_over, bench.keeper.counts().renewed), (1, 0));
}

#[test]
fn a_renewed_flow_keeps_the_windows_that_the_programs_have_moved() {
    let mut bench = Bench::new(4);
    let flow = bench.connect(5000);
    bench.answer();
    let mut cluster = cluster();
    cluster.workloads[1].mac = Some(Mac([10, 0, 0, 0, 0, 77]));
    bench.prepare(service_rules(true, true), forwarding(&cluster, &links()));
    assert!(bench.segment(5000, Direction::Original, 100, 1000, ACK));
    // A program that had begun before carries one more.
    let slot = bench.slot(flow).unwrap();
    bench.offload.flow(slot).unwrap().advance(&[[300, 0, 0, 0], [0; 4]]);
    bench.answer();
    let slot = bench.carries(flow).expect("it is renewed");
    assert_eq!(slot.windows()[0][0], 300);
    // Its acknowledgment is none of what was never sent.
    assert!(bench.segment(5000, Direction::Reply, 1000, 300, ACK));
}

#[test]
fn a_syn_that_is_let_through_brings_the_flow_back_until_it_is_answered() {
    let mut bench = Bench::new(4);
    let flow = bench.connect(5000);
    bench.answer();
    assert!(bench.carries(flow).is_some());
    // Of a client that has forgotten the connection; the server's acknowledgment will tell it. A RST counts differently until then, and only
    // who sees that acknowledgment knows that it has come.
    assert!(bench.segment(5000, Direction::Original, 7_000_000, 0, SYN));
    assert!(bench.carries(flow).is_none());
    bench.look();
    assert!(bench.segment(5000, Direction::Reply, 1000, 100, ACK));
    for _ in 0..8 {
        assert!(bench.segment(5000, Direction::Original, 100, 1000, ACK));
    }
    bench.answer();
    assert!(bench.carries(flow).is_some(), "it is handed over again");
}

/// Programs have carried so much of a client's data, and the acknowledgments, in windows of 64 KiB.
fn carry_far(flow: &Flow, bytes: u64) {
    let window = 1 << 16;
    let mut sides = flow.windows();
    for (side, place) in [(0, 0), (0, 1), (1, 3)] {
        sides[side][place] = sides[side][place].wrapping_add(bytes as u32);
    }
    flow.set_windows(&Windows { sides, scales: [0; 2], is_liberal: false });
    flow.ways[0].packets.fetch_add(bytes / window, Ordering::Relaxed);
    flow.ways[0].bytes.fetch_add(bytes, Ordering::Relaxed);
}

#[test]
fn windows_are_known_however_far_they_have_moved() {
    type Learn = fn(&mut Bench, &str);
    let rows: [(&str, Learn); 3] = [
        ("another process adopts it", |bench, name| assert_eq!(bench.restart(), 1, "{name}")),
        ("another process does not", |bench, name| {
            bench.offload.flow(0).unwrap().ways[0].device.store(99, Ordering::Relaxed);
            assert_eq!(bench.restart(), 0, "{name}");
        }),
        ("the keeper looks", |bench, _| bench.look()),
    ];
    for (name, learn) in rows {
        for bytes in [1 << 20, 1 << 31, (1 << 31) + 1, 3 << 30, (1 << 32) - 1, (1 << 32) + (7 << 29)] {
            let mut bench = Bench::new(4);
            let flow = bench.connect(5000);
            bench.answer();
            carry_far(bench.carries(flow).unwrap(), bytes);
            learn(&mut bench, name);
            let seq = 100_u32.wrapping_add(bytes as u32);
            assert!(!bench.segment(5000, Direction::Original, seq.wrapping_add(1 << 20), 1000, FIN | ACK), "{name}");
            assert!(bench.segment(5000, Direction::Original, seq, 1000, FIN | ACK), "{name}: {bytes} bytes");
            assert!(bench.segment(5000, Direction::Reply, 1000, seq.wrapping_add(1), ACK), "{name}: {bytes} bytes");
        }
    }
}

#[test]
fn what_was_carried_is_told_to_the_table() {
    let mut bench = Bench::new(4);
    let flow = bench.connect(5000);
    bench.answer();
    let slot = bench.carries(flow).unwrap();
    slot.advance(&[[300, 0, 0, 0], [0; 4]]);
    bench.look();
    let windows = |bench: &mut Bench| bench.router.connection(&flow.key, |conn, _| conn.windows()).unwrap().unwrap();
    assert_eq!(windows(&mut bench).sides[0][0], 100, "no packet was counted");
    let slot = bench.carries(flow).unwrap();
    slot.ways[0].packets.fetch_add(2, Ordering::Relaxed);
    slot.ways[0].bytes.fetch_add(280, Ordering::Relaxed);
    bench.look();
    assert_eq!(windows(&mut bench).sides[0][0], 300);
    assert_eq!((bench.keeper.counts().packets, bench.keeper.counts().bytes), (2, 280));
    bench.look();
    assert_eq!(bench.keeper.counts().packets, 2, "each once");
}

#[test]
fn refusals_are_counted_by_their_reason() {
    // From outside to another node's pod: it does not ask again.
    let none = Counts { capacity: 4, ..Counts::default() };
    let mut bench = Bench::<MemoryKeys>::new(4);
    let remote =
        service("default/remote", Protocol::UDP, [VIP, "fd00:96::10"], ["10.1.2.20", "fd00:1:2::20"], Some(30_053));
    bench.prepare(rules(vec![remote], true), bench.same_forwarding());
    let (from, to) = ((ip("192.168.10.100"), 5000), (ip("192.168.10.1"), 30_053));
    assert!(bench.send(UPLINK, [from, to], &[0, 8, 0, 0], UDP).is_some());
    let flow = opened(UPLINK, from, to, Protocol::UDP);
    let conn = bench.router.connection(&flow.key, |conn, _| conn.identity()).expect("it is opened");
    bench.answer_these(&[Request { is_v6: false, identity: conn }]);
    assert_eq!(bench.keeper.counts(), Counts { elsewhere: 1, ..none });
    assert!(bench.again(flow) && bench.pending().is_empty());

    // Denied for the moment, and of an unknown MAC address: it asks again.
    let mut unresolved = cluster();
    unresolved.workloads[1].mac = None;
    for (rules, forwarding) in [
        (service_rules(false, true), bench.same_forwarding()),
        (service_rules(true, true), forwarding(&unresolved, &links())),
    ] {
        let mut bench = Bench::new(4);
        let flow = bench.open(CLIENT_POD, 5000, (SERVER, 80));
        bench.prepare(rules, forwarding);
        bench.answer();
        assert_eq!(bench.keeper.counts(), Counts { unsettled: 1, ..none });
        bench.prepare(service_rules(true, true), self::forwarding(&cluster(), &links()));
        assert!(bench.again(flow));
        bench.answer();
        assert!(bench.carries(flow).is_some());
    }

    // All slots are used.
    let mut bench = Bench::<MemoryKeys>::new(1);
    for port in [5000, 5001] {
        bench.open(CLIENT_POD, port, (SERVER, 80));
    }
    bench.answer();
    assert_eq!(bench.keeper.counts(), Counts { full: 1, flows: 1, handed_over: 1, capacity: 1, ..Counts::default() });

    // Nobody hears.
    let mut bench = Bench::<MemoryKeys>::new(4);
    bench.requests = crossbeam::channel::never();
    bench.open(CLIENT_POD, 5000, (SERVER, 80));
    assert_eq!(bench.keeper.counts(), Counts { unheard: 1, ..none });
}

/// Room for three keys.
#[derive(Debug, Default)]
struct ThreeKeys(MemoryKeys);

impl Keys for ThreeKeys {
    fn insert(&mut self, key: &Key, way: u32, serial: u32) -> io::Result<()> {
        match self.0.len() < 3 || self.0.contains_key(key) {
            true => Keys::insert(&mut self.0, key, way, serial),
            false => Err(io::ErrorKind::StorageFull.into()),
        }
    }
    fn remove(&mut self, key: &Key, way: u32, serial: u32) {
        Keys::remove(&mut self.0, key, way, serial);
    }
    fn all(&self) -> io::Result<Vec<(Key, u32, u32)>> {
        self.0.all()
    }
}

#[test]
fn a_flow_whose_keys_the_kernel_refuses_is_not_handed_over() {
    let mut bench = Bench::<ThreeKeys>::new(4);
    let flows = [5000, 5001].map(|port| bench.open(CLIENT_POD, port, (SERVER, 80)));
    bench.answer();
    assert_eq!((bench.keeper.counts().failed, flows.map(|flow| bench.slot(flow))), (1, [Some(0), None]));
    let phases = [0, 1].map(|slot| bench.offload.flow(slot).unwrap().state().1);
    assert_eq!(phases, [Phase::Live, Phase::Closed]);
    bench.look();
    assert_eq!((bench.keys.all().unwrap().len(), bench.keeper.counts().flows), (2, 1));
}

// --- all at once

/// Flows from the first pod to the second, every other one by the service.
const FLOWS: u16 = 12;
const FIRST_PORT: u16 = 6000;

/// What the threads know of each other.
#[derive(Default)]
struct Stage {
    /// By program, an odd number while it runs.
    running: [AtomicU64; 2],
    /// Twice the number of the publication that was prepared last; an odd number while one is being prepared.
    prepared: AtomicU64,
    /// By flow: even numbers while it is removed.
    removed: [AtomicU64; FLOWS as usize],
    carried: AtomicU64,
    /// Nobody removes a connection between a question and its answer, which would open one in its own right.
    exchange: Mutex<()>,
    is_over: AtomicBool,
}

impl Stage {
    /// Waits until no program runs that ran when this was called: in the kernel's stead.
    fn wait_for_programs(&self) {
        for running in &self.running {
            let before = running.load(Ordering::SeqCst);
            // One that has failed runs for ever.
            while before % 2 == 1 && running.load(Ordering::SeqCst) == before && !self.is_over.load(Ordering::SeqCst) {
                thread::yield_now();
            }
        }
    }
}

/// The server's MAC address by the nth publication ends with this.
const fn mac_of(publication: u64) -> u8 {
    if publication.is_multiple_of(2) { 2 } else { 77 }
}

/// A key of a flow's packets, and what is to be done with those: the new addresses and ports, and the device.
fn way_of(number: u16, direction: Direction) -> (Key, [Ipv4Addr; 2], Ports, IfIndex) {
    let port = FIRST_PORT + number;
    let [client, server, vip] = [CLIENT, SERVER, VIP].map(|address| address.parse::<Ipv4Addr>().unwrap());
    let (asked, backend) =
        if number.is_multiple_of(2) { ((server, 80), (server, 80)) } else { ((vip, 53), (server, 5353)) };
    let flow = |src, dst, ports| FlowKey { src, dst, ports, protocol: Protocol::UDP };
    match direction {
        Direction::Original => {
            let key = key(&flow(client, asked.0, Ports::new(port, asked.1)), CLIENT_POD);
            (key, [client, backend.0], Ports::new(port, backend.1), SERVER_POD)
        }
        Direction::Reply => {
            let key = key(&flow(backend.0, client, Ports::new(backend.1, port)), SERVER_POD);
            (key, [asked.0, client], Ports::new(asked.1, port), CLIENT_POD)
        }
    }
}

/// Looks for random flows' packets, as a program does, and asserts that what it finds is of that flow.
fn program(stage: &Stage, number: usize, offload: &Offload, keys: &SharedKeys<MemoryKeys>) {
    let mut random = ChaCha8Rng::seed_from_u64(number as u64);
    let running = &stage.running[number];
    while !stage.is_over.load(Ordering::Relaxed) {
        let flow = random.next_u32() as u16 % FLOWS;
        let direction = if random.next_u32() % 2 == 0 { Direction::Original } else { Direction::Reply };
        let (key, addresses, ports, device) = way_of(flow, direction);
        let removed = &stage.removed[usize::from(flow)];
        let before = (removed.load(Ordering::SeqCst), stage.prepared.load(Ordering::SeqCst));
        running.fetch_add(1, Ordering::SeqCst);
        if let Some((slot, way)) = found(offload, keys, &key) {
            if random.next_u32() % 16 == 0 {
                thread::yield_now();
            }
            assert_eq!(way, direction);
            let way = &slot.ways[way as usize];
            let found: [Ipv4Addr; 2] =
                [0, 1].map(|at| way.addresses[at][0].load(Ordering::Relaxed).to_ne_bytes().into());
            let found_ports = Ports::from_word(way.ports.load(Ordering::Relaxed));
            let found_device = IfIndex(way.device.load(Ordering::Relaxed));
            assert_eq!((found, found_ports, found_device), (addresses, ports, device), "another flow's recipe");
            let mac = way.ethernet[5].load(Ordering::Relaxed);
            if is_open(slot, direction) {
                way.packets.fetch_add(1, Ordering::Relaxed);
                stage.carried.fetch_add(1, Ordering::Relaxed);
            }
            let after = (removed.load(Ordering::SeqCst), stage.prepared.load(Ordering::SeqCst));
            assert!(after.0 != before.0 || before.0 % 2 == 1, "its connection is gone");
            if direction == Direction::Original && after.1 == before.1 && before.1.is_multiple_of(2) {
                assert_eq!(mac, mac_of(before.1 / 2), "it does what was published before");
            }
        }
        running.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn no_program_ever_acts_for_another_flow() {
    // Carried, renewed, taken back: enough for a missing grace period to show. The other end is reached only where nothing goes on.
    const ENOUGH: (u64, u64, u64) = (10_000, 20, 50);
    const ROUNDS: u32 = 20_000_000;
    let Bench { mut router, offload, requests, keys, keeper, .. } = Bench::<MemoryKeys>::new(6);
    let (tables, published, domain) = (router.tables.clone(), router.published.clone(), router.domain.clone());
    let keeper = Mutex::new(keeper);
    let stage = Stage::default();
    stage.removed.iter().for_each(|removed| removed.store(2, Ordering::SeqCst));
    let forwardings = [0, 1].map(|publication| {
        let mut cluster = cluster();
        cluster.workloads[1].mac = Some(Mac([10, 0, 0, 0, 0, mac_of(publication)]));
        forwarding(&cluster, &links())
    });
    let rules =
        [(true, true), (true, false), (false, true)].map(|(is_open, has)| Arc::new(service_rules(is_open, has)));

    /// Ends the others, however its thread ends.
    struct Ends<'s>(&'s Stage);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.is_over.store(true, Ordering::SeqCst);
        }
    }

    thread::scope(|scope| {
        for number in 0..stage.running.len() {
            let (stage, offload, keys) = (&stage, &*offload, &keys);
            scope.spawn(move || {
                let _ends = Ends(stage);
                program(stage, number, offload, keys);
            });
        }
        // The keeper's thread.
        scope.spawn(|| {
            let _ends = Ends(&stage);
            let mut graces = 0;
            while !stage.is_over.load(Ordering::Relaxed) {
                let batch: Vec<Request> = requests.try_iter().take(4).collect();
                stage.wait_for_programs();
                graces += 1;
                lock(&keeper).answer(&batch, graces, &tables);
                lock(&keeper).confirm_more(&tables);
                lock(&keeper).look(&tables);
            }
        });
        // Control.
        scope.spawn(|| {
            let _ends = Ends(&stage);
            let mut random = ChaCha8Rng::seed_from_u64(7);
            for publication in 1.. {
                if stage.is_over.load(Ordering::Relaxed) {
                    break;
                }
                let current = published.current();
                let next = Arc::new(Snapshot {
                    generation: current.generation + 1,
                    rules: rules[(random.next_u32() % 6).saturating_sub(3) as usize].clone(),
                    snat: current.snat.clone(),
                    forwarding: forwardings[publication % 2].clone(),
                });
                stage.prepared.fetch_add(1, Ordering::SeqCst);
                lock(&keeper).prepare(&next, &tables);
                stage.prepared.fetch_add(1, Ordering::SeqCst);
                published.publish(next);
                (0..random.next_u32() % 2000).for_each(|_| thread::yield_now());
            }
        });
        // Another worker, for which connections end.
        scope.spawn(|| {
            let _ends = Ends(&stage);
            let (mut random, mut participant) = (ChaCha8Rng::seed_from_u64(8), domain.join());
            let mut handle = tables.v4.handle();
            while !stage.is_over.load(Ordering::Relaxed) {
                let exchange = lock(&stage.exchange);
                let turn = participant.enter();
                let flow = worker_key(random.next_u32() as u16 % FLOWS);
                if let Some(hit) = tables.v4.lookup(&flow, tables.v4.hash(&flow), now(), &turn) {
                    tables.v4.remove(&mut handle, hit.conn, &turn);
                }
                drop(turn);
                drop(exchange);
                (0..random.next_u32() % 20_000).for_each(|_| thread::yield_now());
            }
        });
        // A worker.
        let _ends = Ends(&stage);
        let mut random = ChaCha8Rng::seed_from_u64(9);
        for round in 0..ROUNDS {
            if stage.is_over.load(Ordering::Relaxed) {
                break;
            }
            if round.is_multiple_of(256) {
                // The others' turn: whoever takes a mutex again and again keeps it.
                thread::sleep(Duration::from_micros(100));
                let Counts { renewed, taken_back, .. } = lock(&keeper).counts();
                let carried = stage.carried.load(Ordering::Relaxed);
                if carried >= ENOUGH.0 && renewed >= ENOUGH.1 && taken_back >= ENOUGH.2 {
                    break;
                }
            }
            router.now = now();
            let number = random.next_u32() as u16 % FLOWS;
            let removed = &stage.removed[usize::from(number)];
            let flow = worker_key(number);
            if random.next_u32() % 256 == 0 {
                let mut participant = domain.join();
                let turn = participant.enter();
                if let Some(hit) = tables.v4.lookup(&flow, tables.v4.hash(&flow), router.now, &turn) {
                    tables.v4.remove(&mut tables.v4.handle(), hit.conn, &turn);
                }
                if removed.load(Ordering::SeqCst) % 2 == 1 {
                    removed.fetch_add(1, Ordering::SeqCst);
                }
                continue;
            }
            if removed.load(Ordering::SeqCst) % 2 == 0 {
                removed.fetch_add(1, Ordering::SeqCst);
            }
            let send = |router: &mut Router, device, src: Ipv4Addr, dst: Ipv4Addr, ports: Ports| {
                let l4 =
                    [&ports.source().to_be_bytes()[..], &ports.destination().to_be_bytes(), &[0, 8, 0, 0]].concat();
                let packet =
                    Packet { src: src.into(), dst: dst.into(), protocol: UDP, ttl: 64, tos: 0, options: 0, l4 };
                let sent = router.one(device, &packet.frame());
                // Rejected ones are told so.
                sent.iter().any(|(_, frame)| frame[23] == UDP)
            };
            let _exchange = lock(&stage.exchange);
            if send(&mut router, CLIENT_POD, flow.src, flow.dst, flow.ports) {
                let (_, [_, backend], ports, _) = way_of(number, Direction::Original);
                send(&mut router, SERVER_POD, backend, flow.src, Ports::new(ports.destination(), ports.source()));
            }
        }
    });
    let counts = lock(&keeper).counts();
    let reached = (stage.carried.into_inner(), counts.renewed, counts.taken_back);
    assert!(reached.0 >= ENOUGH.0 && reached.1 >= ENOUGH.1 && reached.2 >= ENOUGH.2, "{reached:?} {counts:?}");
}

/// The key of a flow's original direction.
fn worker_key(number: u16) -> FlowKey<Ipv4Addr> {
    let (dst, port) = if number.is_multiple_of(2) { (SERVER, 80) } else { (VIP, 53) };
    FlowKey {
        src: CLIENT.parse().unwrap(),
        dst: dst.parse().unwrap(),
        ports: Ports::new(FIRST_PORT + number, port),
        protocol: Protocol::UDP,
    }
}
