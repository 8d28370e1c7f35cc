//! Flows that workers hand over to the kernel's programs.

use std::{
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use weir::lab::wait_until;

use crate::{
    manifests::{Manifests, ONLY_FRIENDS, ServiceSpec},
    site::{CLIENT, DEADLINE, Echo, Site, bulk, connection, offload_mode, one_node, passes, two_nodes},
};

const NODE_PORT: u16 = 30080;

fn is_off() -> bool {
    offload_mode() != "auto"
}

/// A number of `weir status`'s part on the offload.
fn offload(site: &Site, node: &str, what: &str) -> u64 {
    site.status(node)["offload"][what].as_u64().unwrap()
}

/// A counter of the kernel's programs.
fn program(site: &Site, node: &str, what: &str) -> u64 {
    site.status(node)["programs"][what].as_u64().unwrap()
}

/// Two pods on node-a, one on node-b, and a service at the pods named `server` and `remote`, with a node port.
fn cluster(ipip: &str) -> Manifests {
    let mut manifests = Manifests::cluster(ipip);
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20", "fd00:1:1::20"]);
    manifests.pod("node-b", "default/remote", "remote", &["10.1.2.20", "fd00:1:2::20"]);
    for (name, addresses, backends, node_port) in [
        (
            "default/near",
            ["10.96.0.10", "fd00:96::10"],
            [("10.1.1.20", "node-a"), ("fd00:1:1::20", "node-a")],
            NODE_PORT,
        ),
        ("default/far", ["10.96.0.20", "fd00:96::20"], [("10.1.2.20", "node-b"), ("fd00:1:2::20", "node-b")], 0),
    ] {
        let ports = [("tcp", "TCP", 80, 5000, node_port), ("udp", "UDP", 53, 5353, 0)];
        manifests.service(&ServiceSpec {
            name,
            addresses: &addresses,
            ports: &ports,
            backends: &backends,
            ..ServiceSpec::default()
        });
    }
    manifests
}

/// Sends bulk data both ways, from `from` to what listens on port 5000 of `to`, and asserts that the programs of `nodes` carried it.
fn tcp_is_carried(site: &Site, from: &str, to: &str, address: &str, nodes: &[&str]) {
    const SIZE: usize = 16 << 20;
    let any = if address.contains('[') { "[::]:5000" } else { "0.0.0.0:5000" };
    let listener = site.listen(to, any);
    let before: Vec<u64> = nodes.iter().map(|node| offload(site, node, "handedOver")).collect();
    let near = site.connect(from, address, DEADLINE).unwrap_or_else(|e| panic!("{from} to {address}: {e}"));
    let (far, _) = listener.accept().unwrap();
    bulk(&near, &far, 1 << 16);
    for (node, before) in nodes.iter().zip(&before) {
        wait_until(&format!("the flow from {from} to {address} in the kernel of {node}"), DEADLINE, || {
            (offload(site, node, "handedOver") > *before).then_some(())
        })
        .unwrap();
    }
    let counters = |what: &str| nodes.iter().map(|node| program(site, node, what)).collect::<Vec<_>>();
    let (carried, by_workers) = (counters("Offloaded"), counters("TrunkTaken"));
    bulk(&near, &far, SIZE);
    bulk(&far, &near, SIZE);
    for (at, node) in nodes.iter().enumerate() {
        let carried = program(site, node, "Offloaded") - carried[at];
        let by_workers = program(site, node, "TrunkTaken") - by_workers[at];
        // A frame of 64 KiB at most each. Workers get a packet now and then that is no plain data.
        println!("{from} to {address}, {node}: {carried} frames carried, {by_workers} by workers");
        assert!(
            carried as usize >= 2 * SIZE / 65536 && by_workers < carried / 4,
            "{from} to {address}, {node}: {carried} frames carried, {by_workers} packets by workers"
        );
    }
}

/// Asks an echo many times, and asserts that the programs of `nodes` carried questions and answers.
fn udp_is_carried(site: &Site, from: &str, to: &str, address: &str, nodes: &[&str]) {
    let (any, server) = if address.contains('[') { ("[::]:0", "[::]:5353") } else { ("0.0.0.0:0", "0.0.0.0:5353") };
    let _echo = Echo::new(site, to, server);
    let socket = site.udp(from, any);
    socket.connect(address).unwrap();
    let mut received = [0; 2048];
    let mut exchange = |size: usize| {
        let sent: Vec<u8> = (0..size).map(|at| at as u8).collect();
        socket.send(&sent).unwrap();
        let length = socket.recv(&mut received).unwrap_or_else(|e| panic!("{from} to {address}: {e}"));
        assert_eq!(received[..length], sent);
    };
    let before: Vec<u64> = nodes.iter().map(|node| offload(site, node, "handedOver")).collect();
    for (node, before) in nodes.iter().zip(&before) {
        wait_until(&format!("the UDP flow from {from} to {address} in the kernel of {node}"), DEADLINE, || {
            exchange(100);
            (offload(site, node, "handedOver") > *before).then_some(())
        })
        .unwrap();
    }
    let carried: Vec<u64> = nodes.iter().map(|node| program(site, node, "Offloaded")).collect();
    (0..200).for_each(|number| exchange(number * 7 % 1400));
    for (node, before) in nodes.iter().zip(&carried) {
        let carried = program(site, node, "Offloaded") - before;
        assert!(carried >= 400, "{from} to {address}, {node}: {carried} of 400 packets carried");
    }
}

fn every_way(ipip: &str) {
    if is_off() {
        return;
    }
    let mut site = Site::build(&two_nodes(), &cluster(ipip).text(), "");
    site.start_all();
    let both: &[&str] = &["node-a", "node-b"];
    for (from, to, tcp, udp, nodes) in [
        ("default/client", "default/server", "10.1.1.20:5000", "10.1.1.20:5353", &both[..1]),
        ("default/client", "default/server", "[fd00:1:1::20]:5000", "[fd00:1:1::20]:5353", &both[..1]),
        ("default/client", "default/server", "10.96.0.10:80", "10.96.0.10:53", &both[..1]),
        ("default/client", "default/server", "[fd00:96::10]:80", "[fd00:96::10]:53", &both[..1]),
        ("default/client", "default/remote", "10.1.2.20:5000", "10.1.2.20:5353", both),
        ("default/client", "default/remote", "[fd00:1:2::20]:5000", "[fd00:1:2::20]:5353", both),
        ("default/client", "default/remote", "10.96.0.20:80", "10.96.0.20:53", both),
        ("default/client", "default/remote", "[fd00:96::20]:80", "[fd00:96::20]:53", both),
        ("default/remote", "default/server", "10.96.0.10:80", "10.96.0.10:53", both),
        // With the node's own kernel, which has its half of each connection.
        ("node-a", "default/server", "10.1.1.20:5000", "10.1.1.20:5353", &both[..1]),
        ("node-a", "default/server", "10.96.0.10:80", "10.96.0.10:53", &both[..1]),
        ("node-a", "default/server", "[fd00:1:1::20]:5000", "[fd00:1:1::20]:5353", &both[..1]),
        ("default/client", "node-a", "192.168.10.1:5000", "192.168.10.1:5353", &both[..1]),
        // Masqueraded by the pool.
        ("default/client", "client", "192.168.10.100:5000", "192.168.10.100:5353", &both[..1]),
    ] {
        tcp_is_carried(&site, from, to, tcp, nodes);
        udp_is_carried(&site, from, to, udp, nodes);
    }
    // Both translated.
    tcp_is_carried(&site, "client", "default/server", &format!("192.168.10.1:{NODE_PORT}"), &both[..1]);
    assert_eq!(CLIENT, "192.168.10.100");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn every_way_is_carried_by_the_kernel_tunnels_included() {
    every_way("Always");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn every_way_is_carried_by_the_kernel_direct_routes_included() {
    every_way("Never");
}

/// Numbers datagrams, until told to stop; the number of the next.
struct Numbered {
    next: AtomicU64,
    stop: AtomicBool,
}

impl Numbered {
    fn send(&self, socket: &UdpSocket) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::SeqCst);
            // A full queue of the sender is no matter.
            let _ = socket.send(&number.to_be_bytes());
        }
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn nothing_of_a_denied_flow_passes_once_the_policy_is_in_force() {
    let mut site = Site::build(&one_node(), &cluster("Always").text(), "");
    site.start_all();
    let receiver = site.udp("default/server", "0.0.0.0:5353");
    let sender = site.udp("default/client", "0.0.0.0:0");
    sender.connect("10.1.1.20:5353").unwrap();
    let highest = AtomicU64::new(0);
    let numbered = Numbered { next: AtomicU64::new(1), stop: AtomicBool::new(false) };
    let is_over = AtomicBool::new(false);
    receiver.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let refused = thread::scope(|scope| {
        scope.spawn(|| numbered.send(&sender));
        scope.spawn(|| {
            let mut datagram = [0; 8];
            while !is_over.load(Ordering::Relaxed) {
                if receiver.recv(&mut datagram).is_ok() {
                    highest.fetch_max(u64::from_be_bytes(datagram), Ordering::SeqCst);
                }
            }
        });
        let arrived = |more: u64| {
            let from = highest.load(Ordering::SeqCst);
            wait_until("datagrams", DEADLINE, || (highest.load(Ordering::SeqCst) > from + more).then_some(())).unwrap();
        };
        let mut refused = 0;
        for _ in 0..5 {
            if !is_off() {
                let before = program(&site, "node-a", "Offloaded");
                wait_until("packets of the flow in the kernel", DEADLINE, || {
                    (program(&site, "node-a", "Offloaded") > before + 1000).then_some(())
                })
                .unwrap();
            }
            arrived(1000);
            site.set_policies(ONLY_FRIENDS);
            // Whatever is sent from here on must not arrive.
            let first_refused = numbered.next.load(Ordering::SeqCst) + 1;
            wait_until("more datagrams", DEADLINE, || {
                (numbered.next.load(Ordering::SeqCst) > first_refused + 20_000).then_some(())
            })
            .unwrap();
            let denied = site.drops("node-a", "PolicyDeniedIngress");
            assert!(denied > refused, "denied packets are counted with their reason");
            refused = denied;
            let highest = highest.load(Ordering::SeqCst);
            assert!(highest <= first_refused, "{highest} arrived, and {first_refused} was denied already");
            site.set_policies("");
            arrived(1000);
        }
        numbered.stop.store(true, Ordering::Relaxed);
        is_over.store(true, Ordering::Relaxed);
        refused
    });
    assert!(refused > 0);
    site.finish();
}

/// Sends a RST of the client's, by a raw socket.
fn send_reset(site: &Site, source_port: u16, sequence: u32) {
    let script = format!(
        "from scapy.all import *\n\
         send(IP(src='10.1.1.10', dst='10.1.1.20') / TCP(sport={source_port}, dport=5000, flags='R', seq={sequence}), verbose=False)\n"
    );
    site.lab.run_in("default/client", &["/usr/bin/python3", "-c", &script]).unwrap();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn tcp_stays_followed_while_the_kernel_carries_it() {
    let mut site = Site::build(&one_node(), &cluster("Always").text(), "");
    site.start_all();
    let mut capture = site.capture("default/client", "eth0", "-S tcp port 5000");
    let (near, far) = connection(&site, "default/client", "default/server", "10.1.1.20:5000");
    let port = near.local_addr().unwrap().port();
    bulk(&near, &far, 1 << 16);
    if !is_off() {
        wait_until("the flow in the kernel", DEADLINE, || (offload(&site, "node-a", "flows") == 1).then_some(()))
            .unwrap();
    }
    // tcpdump gets packets in batches, and an interrupt loses those that it has not read.
    let syn = wait_until("the captured SYN", DEADLINE, || {
        capture.log().lines().find(|line| line.contains("Flags [S],")).map(str::to_owned)
    })
    .unwrap();
    capture.signal(Signal::SIGINT);
    capture.wait(DEADLINE).unwrap();
    let first: u32 = syn.split("seq ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();

    bulk(&near, &far, 64 << 20);
    // A RST as it would have counted at the beginning, and one far ahead: neither is where the window is now.
    let invalid = site.drops("node-a", "Invalid");
    let sent = first.wrapping_add(1 + (1 << 16) + (64 << 20));
    send_reset(&site, port, first.wrapping_add(1 + (1 << 16)));
    send_reset(&site, port, sent.wrapping_add(1 << 30));
    wait_until("both to be dropped", DEADLINE, || (site.drops("node-a", "Invalid") >= invalid + 2).then_some(()))
        .unwrap();
    assert!(passes(&near, &far, DEADLINE) && passes(&far, &near, DEADLINE));
    bulk(&far, &near, 16 << 20);
    if !is_off() {
        assert_eq!(offload(&site, "node-a", "flows"), 1, "it is still in the kernel");
    }

    // Closed in order, it is no flow any more, and its packets are the workers' business again.
    let state = |site: &Site| {
        let listing = site.ask("node-a", "conntrack").unwrap();
        let connections = listing.as_array().expect("a list of connections").clone();
        connections.iter().find(|one| one["proto"] == "tcp").map(|one| one["tcpState"].as_str().unwrap().to_owned())
    };
    assert_eq!(state(&site).as_deref(), Some("ESTABLISHED"));
    let mut rest = Vec::new();
    near.shutdown(std::net::Shutdown::Write).unwrap();
    (&far).read_to_end(&mut rest).unwrap();
    (&far).write_all(b"half open").unwrap();
    drop(far);
    (&near).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"half open");
    wait_until("TIME_WAIT", DEADLINE, || (state(&site).as_deref() == Some("TIME_WAIT")).then_some(())).unwrap();
    if !is_off() {
        wait_until("the flow's end", DEADLINE, || (offload(&site, "node-a", "flows") == 0).then_some(())).unwrap();
    }
    site.finish();
}

/// Many connections to one port, both ends of each.
fn connections(site: &Site, from: &str, to: &str, address: &str, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let listener = site.listen(to, &format!("0.0.0.0:{}", address.rsplit_once(':').unwrap().1));
    let pair = |_| {
        let near = TcpStream::connect(address).unwrap_or_else(|e| panic!("{from} to {address}: {e}"));
        (near, listener.accept().unwrap().0)
    };
    let pairs: Vec<_> = site.inside(from, || (0..count).map(pair).collect());
    for end in pairs.iter().flat_map(|(near, far)| [near, far]) {
        end.set_read_timeout(Some(DEADLINE)).unwrap();
        end.set_write_timeout(Some(DEADLINE)).unwrap();
        end.set_nodelay(true).unwrap();
    }
    pairs
}

/// Connections that live through the death of a router.
const MANY: usize = 1000;

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn flows_in_the_kernel_go_on_without_the_router_and_the_next_one_rules_them() {
    if is_off() {
        return;
    }
    let mut site = Site::build(&two_nodes(), &cluster("Always").text(), "");
    site.start_all();
    let pairs = [("default/server", "10.1.1.20:5000"), ("default/remote", "10.1.2.20:5001")]
        .map(|(to, address)| connection(&site, "default/client", to, address));
    for (near, far) in &pairs {
        bulk(near, far, 1 << 16);
        bulk(far, near, 1 << 16);
    }
    let many = connections(&site, "default/client", "default/server", "10.1.1.20:5002", MANY);
    for (near, far) in &many {
        bulk(near, far, 1 << 14);
        bulk(far, near, 1 << 14);
    }
    let all = 2 + MANY as u64;
    wait_until("the flows in the kernel", DEADLINE, || (offload(&site, "node-a", "flows") == all).then_some(()))
        .unwrap();

    let mut router = site.take_router("node-a");
    router.signal(Signal::SIGKILL);
    router.wait(DEADLINE).unwrap();
    for (near, far) in &pairs {
        bulk(near, far, 8 << 20);
        bulk(far, near, 8 << 20);
    }
    many.iter().for_each(|(near, far)| assert!(passes(near, far, DEADLINE) && passes(far, near, DEADLINE)));
    site.start("node-a");
    assert_eq!(offload(&site, "node-a", "flows"), all, "the next process takes them over");
    for (near, far) in &pairs {
        bulk(near, far, 8 << 20);
        bulk(far, near, 8 << 20);
    }
    many.iter().for_each(|(near, far)| assert!(passes(near, far, DEADLINE) && passes(far, near, DEADLINE)));
    site.set_policies(ONLY_FRIENDS);
    let (near, far) = &pairs[0];
    assert!(!passes(near, far, Duration::from_millis(500)), "a policy cuts what an earlier process has handed over");
    assert!(passes(&pairs[1].0, &pairs[1].1, DEADLINE), "and nothing else");
    drop(many);
    site.finish();
}
