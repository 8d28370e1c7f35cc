//! Flows that workers hand over to the kernel's programs: what holds with and without that. The rest is in [`crate::offload_only`].

use std::{
    io::{Read, Write},
    net::UdpSocket,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use weir_lab::wait_until;

use crate::{
    manifests::{Manifests, ONLY_FRIENDS, ServiceSpec},
    site::{DEADLINE, Site, bulk, connection, offload_mode, one_node, passes},
};

pub const NODE_PORT: u16 = 30080;

fn is_off() -> bool {
    offload_mode() != "auto"
}

/// A number of `weir status`'s part on the offload.
pub fn offload(site: &Site, node: &str, what: &str) -> u64 {
    site.status(node)["offload"][what].as_u64().unwrap()
}

/// A counter of the kernel's programs.
pub fn program(site: &Site, node: &str, what: &str) -> u64 {
    site.status(node)["programs"][what].as_u64().unwrap()
}

/// Two pods on node-a, one on node-b, and a service at the pods named `server` and `remote`, with a node port.
pub fn cluster(ipip: &str) -> Manifests {
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
