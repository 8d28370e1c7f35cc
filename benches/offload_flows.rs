//! What a million flows in the kernel cost this process, and a packet of one of them the kernel.
//!
//! The maps are the kernel's (so it needs root), the connections are UDP between two pods of a node. Measured, for numbers of flows from a
//! thousand to a million: to hand a flow over (its recipe, two keys), a publication (each flow is worked out anew and compared; how many
//! it confirms in its time), a look at what was carried, and the program's own run time for a packet of a random flow, by BPF_PROG_RUN.
//!
//! `cargo bench -p weir-benches --bench offload_flows [LARGEST]`

#[allow(dead_code, reason = "shared with tests that use all of it")]
#[path = "../dataplane/tests/support/node.rs"]
mod node;
#[allow(dead_code, reason = "shared with tests that use all of it")]
#[path = "../dataplane/tests/support/router.rs"]
mod router;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use aya::{TestRun as _, TestRunOptions, programs::SchedClassifier};
use etherparse::PacketBuilder;
use node::{Namespace, Node, program_info};
use router::{CLIENT_POD, GATEWAY_MAC, Router, SERVER_POD, rules};
use weir_conntrack::{Attributes, Insert, NewConn, Observed};
use weir_dataplane::{
    attach::{Attachment, OffloadMaps, TrunkSettings},
    offload::{CANDIDATE, Offload, Request, keeper::Keeper},
};
use weir_nat::SnatPorts;
use weir_packet::{FlowKey, Ports, Protocol, Tick};

const DESTINATION_PORTS: u32 = 32;
/// None of them is VXLAN's, which no workload may use.
const FIRST_SOURCE_PORT: u32 = 10_000;
/// Packets of random flows that the program runs on.
const PACKETS: u32 = 20_000;

fn key(flow: u32) -> FlowKey<std::net::Ipv4Addr> {
    FlowKey {
        src: "10.1.1.10".parse().unwrap(),
        dst: "10.1.1.20".parse().unwrap(),
        ports: Ports::new((FIRST_SOURCE_PORT + flow / DESTINATION_PORTS) as u16, 1 + (flow % DESTINATION_PORTS) as u16),
        protocol: Protocol::UDP,
    }
}

fn per(duration: Duration, count: u32) -> f64 {
    duration.as_nanos() as f64 / f64::from(count)
}

fn main() {
    let largest = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    println!(
        "{:>9} flows: ns to hand one over | publication, ms (confirmed; all after ms) | look, ms | program, ns a packet",
        ""
    );
    for flows in [1000, 10_000, 100_000, 1_000_000].into_iter().filter(|flows| *flows <= largest) {
        measure(flows);
    }
}

fn measure(flows: u32) {
    let (node, pods) = (Node::new(), [Namespace::new(), Namespace::new()]);
    let pin_dir = node.pins.clone();
    node.namespace.run(|| {
        let mut attachment = Attachment::open(TrunkSettings { queues: 1, mtu: 1500, flows: Some(flows), pin_dir }).unwrap();
        for (name, index, pod) in [("cali1", CLIENT_POD, &pods[0]), ("cali2", SERVER_POD, &pods[1])] {
            let (index, there) = (index.0, &pod.name);
            node::shell(&format!(
                "ip link add {name} index {index} address {GATEWAY_MAC} type veth peer name eth0 netns {there}; ip link set {name} up"
            ));
            attachment.adopt_workload(index, name, GATEWAY_MAC, true).unwrap();
        }
        let link = node.pins.join(format!("workload_{}", CLIENT_POD.0));
        let program = SchedClassifier::from_program_info(program_info(&link), "workload_send".into()).unwrap();
        let OffloadMaps { flows: slots, epoch, keys } = attachment.take_offload().expect("there are to be flows");
        let (offload, _requests) = Offload::new(slots, epoch, 1);
        let offload = Arc::new(offload);

        let mut router = Router::new(rules(Vec::new(), true), SnatPorts::new(10_000..=20_000, []).unwrap(), flows);
        let first = router.published.current();
        let mut keeper = Keeper::new(offload.clone(), flows, Box::new(keys), &router.domain, first.clone());
        keeper.prepare(&first, &router.tables);
        let mut handle = router.tables.v4.handle();
        let mut participant = router.domain.join();
        let mut requests = Vec::new();
        let now = weir_dataplane::clock::now();
        for flow in 0..flows {
            let turn = participant.enter();
            let attributes = Attributes { device: CLIENT_POD.0, generation: 1, flags: CANDIDATE, ..Attributes::default() };
            let new = NewConn { original: key(flow), reply: key(flow).invert(), attributes, first: Observed::NOTHING };
            let Insert::Inserted(id) = router.tables.v4.insert(&mut handle, new, Tick(now.0), &turn) else {
                panic!("there is room")
            };
            requests.push(Request { is_v6: false, identity: router.tables.v4.conn(id).identity() });
        }

        let begin = Instant::now();
        requests.chunks(256).enumerate().for_each(|(at, batch)| keeper.answer(batch, at as u64, &router.tables));
        let handed_over = begin.elapsed();
        assert_eq!(keeper.counts().flows, flows as usize, "{:?}", keeper.counts());

        let next = router.next(rules(Vec::new(), true), router.forwarding.clone());
        let begin = Instant::now();
        keeper.prepare(&next, &router.tables);
        let published = begin.elapsed();
        let epochs = (0..flows).map(|slot| &offload.flow(slot).unwrap().epoch);
        let confirmed = epochs.clone().filter(|epoch| epoch.load(Ordering::Relaxed) == next.generation).count();
        assert_eq!(confirmed as u64 + keeper.counts().unconfirmed, u64::from(flows));
        let begin = Instant::now();
        while keeper.confirm_more(&router.tables) {}
        let all = published + begin.elapsed();
        assert!(epochs.clone().all(|epoch| epoch.load(Ordering::Relaxed) == next.generation));

        let begin = Instant::now();
        keeper.look(&router.tables);
        let looked = begin.elapsed();

        let context = [0, 0, 0, 0, 0, 0, 0, 0, 0, CLIENT_POD.0, CLIENT_POD.0].map(u32::to_ne_bytes).concat();
        let (mut out, mut times) = (vec![0; 2048], Vec::new());
        for number in 0..PACKETS {
            let key = key(number.wrapping_mul(2_654_435_761) % flows);
            let builder = PacketBuilder::ethernet2([10, 0, 0, 0, 0, 1], GATEWAY_MAC.0)
                .ipv4(key.src.octets(), key.dst.octets(), 64)
                .udp(key.ports.source(), key.ports.destination());
            let mut frame = Vec::new();
            builder.write(&mut frame, &[7; 18]).unwrap();
            let run = program.test_run(TestRunOptions {
                data_in: Some(&frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ..TestRunOptions::new()
            });
            times.push(run.unwrap().duration);
        }
        keeper.look(&router.tables);
        assert_eq!(keeper.counts().packets, u64::from(PACKETS), "each was carried");
        times.sort_unstable();
        println!(
            "{flows:>9} flows: {:>8.0} | {:>8.1} ({confirmed}; {:.1}) | {:>6.1} | {:?}",
            per(handed_over, flows),
            published.as_secs_f64() * 1e3,
            all.as_secs_f64() * 1e3,
            looked.as_secs_f64() * 1e3,
            times[times.len() / 2],
        );
    });
}
