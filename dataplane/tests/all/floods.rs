//! Floods against a small table, through the whole pipeline over the memory driver: what is established goes on, and so does the node.

use std::net::IpAddr;

use crate::packets::{Packet, TCP, received};
use crate::router::{CLIENT_POD, Router, SERVER_POD, UPLINK, ip, rules, service, sum};
use weir_dataplane::{frame::IfIndex, tables::capacity_with_share};
use weir_nat::SnatPorts;
use weir_packet::{DropReason, Protocol, Tick};

const CLIENT: &str = "10.1.1.10";
const SERVER: &str = "10.1.1.20";
const NODE: &str = "192.168.10.1";
const OUTSIDE: &str = "192.168.10.100";
const VIP: &str = "10.96.0.10";
const NODE_PORT: u16 = 30053;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
const FIN_ACK: u8 = 0x11;
const BURST: usize = 64;

fn router(max_entries: u32) -> Router {
    let services = [Protocol::TCP, Protocol::UDP]
        .map(|protocol| {
            let (vips, backends) = ([VIP, "fd00:96::10"], [SERVER, "fd00:1:1::20"]);
            service(&format!("default/local:{protocol}"), protocol, vips, backends, Some(NODE_PORT))
        })
        .to_vec();
    Router::new(rules(services, true), SnatPorts::new(1024..=29999, []).unwrap(), capacity_with_share(max_entries))
}

/// One side of a TCP connection as weir's other side sees it.
#[derive(Clone, Copy, Debug)]
struct End {
    device: IfIndex,
    address: IpAddr,
    port: u16,
    next_seq: u32,
}

/// A TCP connection through the router: `ends[0]` opened it. Each end knows the other by the address that it sees.
struct Connection {
    ends: [End; 2],
    /// Whom each end sends to.
    peers: [(IpAddr, u16); 2],
}

impl Connection {
    fn new(opener: End, to: (&str, u16)) -> Self {
        let other = End { device: SERVER_POD, address: ip(SERVER), port: 5353, next_seq: 90_000 };
        Self { ends: [opener, other], peers: [(ip(to.0), to.1), (ip(SERVER), 0)] }
    }

    /// A segment of one end, as it leaves it.
    fn segment(&self, from: usize, flags: u8, payload_bytes: usize) -> Packet {
        let (sender, receiver, (address, port)) = (self.ends[from], self.ends[1 - from], self.peers[from]);
        let mut l4 = [sender.port.to_be_bytes(), port.to_be_bytes()].concat();
        l4.extend(sender.next_seq.to_be_bytes());
        l4.extend(if flags == SYN { 0 } else { receiver.next_seq }.to_be_bytes());
        l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        l4.resize(20 + payload_bytes, 0x5a);
        Packet { src: sender.address, dst: address, protocol: TCP, ttl: 64, tos: 0, options: 0, l4 }
    }

    /// One end sends a segment, and the other gets it as from whom it knows.
    fn send(&mut self, router: &mut Router, from: usize, flags: u8, payload_bytes: usize) {
        let (sender, receiver) = (self.ends[from], self.ends[1 - from]);
        let packet = self.segment(from, flags, payload_bytes);
        let sent = router.one(sender.device, &packet.frame());
        let sent = received(&sent);
        let [((device, _), bytes)] = sent[..] else { panic!("{packet:?} is lost: {:?}", router.totals()) };
        let got = Packet::read(bytes);
        assert_eq!((device, got.dst), (receiver.device, receiver.address));
        let source = (got.src, u16::from_be_bytes([got.l4[0], got.l4[1]]));
        if flags == SYN {
            self.peers[1] = source;
        }
        assert_eq!(source, self.peers[1 - from], "the source that the receiver knows");
        let counted = u32::from(flags & 0x03 != 0);
        self.ends[from].next_seq = sender.next_seq + payload_bytes as u32 + counted;
    }

    fn shake_hands(&mut self, router: &mut Router) {
        self.send(router, 0, SYN, 0);
        self.send(router, 1, SYN_ACK, 0);
        self.send(router, 0, ACK, 0);
    }
}

/// SYNs with made-up sources, to the node port and to the pod behind it.
struct Flood {
    number: u32,
    frames: [Vec<u8>; 2],
}

impl Flood {
    fn new() -> Self {
        let frames = [(NODE, NODE_PORT), (SERVER, 5353)].map(|(dst, port)| {
            let mut l4 = [&[0, 0][..], &port.to_be_bytes()].concat();
            l4.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 4, 0, 0, 0, 0, 0]);
            let src = ip("172.20.0.0");
            Packet { src, dst: ip(dst), protocol: TCP, ttl: 64, tos: 0, options: 0, l4 }.frame()
        });
        Self { number: 0, frames }
    }

    fn burst(&mut self) -> Vec<(IfIndex, Vec<u8>)> {
        (0..BURST)
            .map(|_| {
                self.number += 1;
                let mut frame = self.frames[self.number as usize % 2].clone();
                // No source comes twice.
                frame[28..30].copy_from_slice(&(self.number as u16).to_be_bytes());
                frame[34..36].copy_from_slice(&(1 + (self.number >> 16) as u16).to_be_bytes());
                frame[24..26].fill(0);
                let checksum = !sum(&frame[14..34]);
                frame[24..26].copy_from_slice(&checksum.to_be_bytes());
                frame[50..52].fill(0);
                let mut covered = [0; 32];
                covered[..28].copy_from_slice(&frame[26..54]);
                // The rest of the pseudo-header: protocol and length.
                covered[28..].copy_from_slice(&[0, TCP, 0, 20]);
                let checksum = !sum(&covered);
                frame[50..52].copy_from_slice(&checksum.to_be_bytes());
                (UPLINK, frame)
            })
            .collect()
    }
}

fn end(device: IfIndex, address: &str, port: u16) -> End {
    End { device, address: ip(address), port, next_seq: 1000 }
}

#[test]
fn a_million_spoofed_syns_cost_no_established_connection_and_none_of_the_nodes() {
    const MAX_ENTRIES: u32 = 4096;
    const SYNS: u32 = 1_000_000;
    /// Bursts a tick: 102,400 SYNs a second.
    const BURSTS_A_TICK: u32 = 16;
    /// Bursts that pass between two steps of a connection of the node: 200 ms, in which the flood fills the table five times.
    const BURSTS_A_STEP: u32 = 20 * BURSTS_A_TICK;
    let mut router = router(MAX_ENTRIES);
    // Downloads: by the node port from outside, from pod to pod, and by the node itself.
    let mut downloads = [
        Connection::new(end(UPLINK, OUTSIDE, 40_000), (NODE, NODE_PORT)),
        Connection::new(end(CLIENT_POD, CLIENT, 40_000), (VIP, 53)),
        Connection::new(end(IfIndex::HOST, NODE, 40_000), (VIP, 53)),
    ];
    downloads.iter_mut().for_each(|download| download.shake_hands(&mut router));
    // What the node's kernel does meanwhile, ten connections at a time: each opens, asks, is answered and closes.
    const STEPS: [(usize, u8, usize); 7] =
        [(0, SYN, 0), (1, SYN_ACK, 0), (0, ACK, 0), (0, ACK, 100), (1, ACK, 1000), (0, FIN_ACK, 0), (1, FIN_ACK, 0)];
    let mut own: Vec<Connection> = Vec::new();
    let (mut own_port, mut own_done, mut bursts) = (50_000, 0, 0);
    let mut flood = Flood::new();
    while flood.number < SYNS {
        router.turn(&flood.burst());
        bursts += 1;
        if bursts % BURSTS_A_TICK == 0 {
            router.now = Tick(router.now.0 + 1);
            for download in &mut downloads {
                download.send(&mut router, 1, ACK, 1400);
                download.send(&mut router, 0, ACK, 0);
            }
        }
        if bursts % BURSTS_A_STEP == 0 {
            let step = bursts / BURSTS_A_STEP - 1;
            let (from, flags, payload_bytes) = STEPS[step as usize % STEPS.len()];
            if flags == SYN {
                own_done += own.len();
                own = (0..10).map(|i| Connection::new(end(IfIndex::HOST, NODE, own_port + i), (VIP, 53))).collect();
                own_port += 10;
            }
            own.iter_mut().for_each(|connection| connection.send(&mut router, from, flags, payload_bytes));
        }
    }
    assert!(own_done >= 50, "{own_done} of the node's connections came to their end");
    let counts = router.tables.v4.counts();
    let len = router.tables.v4.len() as u64;
    assert_eq!(router.drops().get(&DropReason::TableFull), None, "there was always something worth less");
    assert!(len >= u64::from(MAX_ENTRIES - 1) && len <= u64::from(capacity_with_share(MAX_ENTRIES)), "{len}");
    // Every connection is accounted for.
    let evicted = counts.evicted_closing + counts.evicted_unproved + counts.evicted_idle;
    assert_eq!(counts.inserted, router.totals().opened);
    assert_eq!(counts.inserted - counts.removed, len);
    assert_eq!(counts.removed, evicted + counts.expired);
    assert!(counts.evicted_unproved > u64::from(SYNS) - 2 * u64::from(MAX_ENTRIES), "{counts:?}");
    assert_eq!(counts.evicted_idle, 0);
    router.finish();
}

#[test]
fn a_table_full_of_active_connections_refuses_others_but_not_the_node() {
    const MAX_ENTRIES: u32 = 256;
    const SHARE: u32 = MAX_ENTRIES / 64;
    let mut router = router(MAX_ENTRIES);
    let mut all: Vec<Connection> =
        (0..MAX_ENTRIES).map(|i| Connection::new(end(UPLINK, OUTSIDE, 40_000 + i as u16), (NODE, NODE_PORT))).collect();
    all.iter_mut().for_each(|connection| connection.shake_hands(&mut router));
    let mut flood = Flood::new();
    for _ in 0..10 {
        assert_eq!(router.turn(&flood.burst()), []);
    }
    assert_eq!(router.drops(), [(DropReason::TableFull, 10 * BURST as u64)].into());
    // From a pod, and to the node's service of that pod.
    let refused = Connection::new(end(CLIENT_POD, CLIENT, 41_000), (VIP, 53));
    assert_eq!(router.one(CLIENT_POD, &refused.segment(0, SYN, 0).frame()), []);
    // The node's own: as many as its share has.
    for i in 0..SHARE as u16 {
        let mut own = Connection::new(end(IfIndex::HOST, NODE, 50_000 + i), (VIP, 53));
        own.shake_hands(&mut router);
        all.push(own);
    }
    assert_eq!(router.tables.v4.len(), (MAX_ENTRIES + SHARE) as usize);
    router.turn(&flood.burst());
    for connection in &mut all {
        connection.send(&mut router, 1, ACK, 500);
        connection.send(&mut router, 0, ACK, 0);
    }
    assert_eq!(router.tables.v4.counts().removed, 0);
    router.finish();
}
