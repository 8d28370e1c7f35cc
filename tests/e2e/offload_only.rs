//! What flow offload itself does, so that there is nothing to test where it is off.
//!
//! A run with WEIR_E2E_OFFLOAD=off is to leave these out (`--skip offload_only`, as the Makefile does), and its summary then counts them as
//! filtered out.

use std::{net::TcpStream, time::Duration};

use nix::sys::signal::Signal;
use weir_lab::wait_until;

use crate::{
    manifests::ONLY_FRIENDS,
    offload::{NODE_PORT, cluster, offload, program},
    site::{CLIENT, DEADLINE, Echo, Site, bulk, connection, offload_mode, passes, two_nodes},
};

/// Two nodes whose routers hand flows over. `in_driver`: their uplinks' packets are taken by XDP, and by tc only to be carried; else all by tc,
/// as a veth does best.
fn site_with_offload(ipip: &str, in_driver: bool) -> Site {
    assert_eq!(offload_mode(), "auto", "flow offload is off: leave this test out (--skip offload_only)");
    let mut site = Site::build(&two_nodes(), &cluster(ipip).text(), "");
    if in_driver {
        for node in ["node-a", "node-b"] {
            site.reconfigure(node, "role: uplink", "role: uplink, require: native");
        }
    }
    site.start_all();
    site
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

fn every_way(ipip: &str, in_driver: bool) {
    let site = site_with_offload(ipip, in_driver);
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
    for node in both {
        assert_eq!(program(&site, node, "UplinkMerged") > 0, in_driver, "{node}: whether XDP leaves flows to tc");
    }
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn every_way_is_carried_by_the_kernel_tunnels_included() {
    every_way("Always", false);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn every_way_is_carried_by_the_kernel_after_xdp_has_let_it_pass() {
    every_way("Always", true);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn every_way_is_carried_by_the_kernel_direct_routes_included() {
    every_way("Never", true);
}

/// Sends ten datagrams of 500 bytes at a time, for the device to cut (UDP_SEGMENT), and gets each back; until a file is there.
const SEGMENTED: &str = "
import os, socket, sys
pod = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
pod.settimeout(10)
pod.connect(('10.1.2.20', 5353))
pod.setsockopt(17, 103, 500)
number = 0
while not os.path.exists(sys.argv[1]):
    sent = [b'%04d' % (number + nth) * 125 for nth in range(10)]
    pod.send(b''.join(sent))
    got = sorted(pod.recv(2048) for _ in sent)
    assert got == sent, got
    number = (number + 10) % 10000
print('done')
";

/// The one way of packets that BPF_PROG_TEST_RUN does not know: several in one, into a tunnel.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn datagrams_to_be_cut_are_carried_together_and_counted_one_by_one() {
    let site = site_with_offload("Always", false);
    let _echo = Echo::new(&site, "default/remote", "0.0.0.0:5353");
    let carried = |direction: &str| {
        let listing = site.ask("node-a", "conntrack").unwrap();
        let flow = listing.as_array().unwrap().iter().find(|one| one["proto"] == "udp").cloned().unwrap_or_default();
        ["packets", "bytes"].map(|what| flow["offload"][direction][what].as_u64().unwrap_or(0))
    };
    let stop = site.lab.folder().join("stop").display().to_string();
    let frames = program(&site, "node-a", "Offloaded");
    let mut sender =
        site.lab.spawn("default/client", "segmented", &["/usr/bin/python3", "-c", SEGMENTED, &stop]).unwrap();
    wait_until("a thousand datagrams in the kernel", DEADLINE, || (carried("original")[0] >= 1000).then_some(()))
        .unwrap_or_else(|error| panic!("{error}: {}", sender.log()));
    site.write("stop", "");
    sender.wait(DEADLINE).unwrap();
    assert_eq!(sender.log(), "done\n");
    let ([packets, bytes], [answers, _]) = (carried("original"), carried("reply"));
    assert_eq!((packets % 10, bytes), (0, packets * (500 + 28)));
    assert_eq!(program(&site, "node-a", "Offloaded") - frames, packets / 10 + answers, "none was cut before");
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
    let mut site = site_with_offload("Always", false);
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
