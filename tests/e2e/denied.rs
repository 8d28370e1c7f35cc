//! Whom a policy denies reaches no socket, in whatever shape a packet comes, and whatever the router is doing.

use std::{
    net::UdpSocket,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::Signal,
    socket::{setsockopt, sockopt},
};
use serde_json::json;
use weir_cluster::translate::workload_device;
use weir_lab::{Process, wait_until};

use crate::{
    forwarded::add_behind,
    manifests::Manifests,
    site::{CLIENT, DEADLINE, Site, one_node},
};

const NODE: [&str; 2] = ["192.168.10.1", "fd00:10::1"];
const SERVER: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const FRIEND: [&str; 2] = ["10.1.1.10", "fd00:1:1::10"];
const ATTACKER: [&str; 2] = ["10.1.1.66", "fd00:1:1::66"];
const FRAMES: u32 = 4000;
const TAGGED: u32 = 400;
/// A host endpoint lets datagrams to this port of the node pass, and no others.
const OPEN_PORT: u16 = 7000;
const CLOSED_PORT: u16 = 7001;
const SERVER_PORT: u16 = 5000;

const POLICIES: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: default, name: only-friends}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - podSelector: {matchLabels: {app: friend}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: nodes-own}
spec:
  order: 20
  selector: has(uplink)
  types: [Ingress]
  ingress:
  - {action: Allow, protocol: UDP, destination: {ports: [7000]}}
  - {action: Deny}
"#;

/// What the node's kernel takes for its own besides its addresses: groups, broadcast of everybody and of its network, its routers' anycast address.
const SHARED: [&str; 5] = ["224.0.0.1", "255.255.255.255", "192.168.10.255", "ff02::1", "fd00:10::"];
/// Behind a device of the node that is no uplink, with the node's address there.
const BEHIND: [&str; 2] = ["10.9.0.2", "fd00:9::2"];
const GATEWAY: [&str; 2] = ["10.9.0.1", "fd00:9::1"];
/// A pod of the other node that would be let in.
const AFAR: &str = "10.1.2.77";

/// Sockets that read what reaches them, until dropped.
struct Sockets {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<Vec<String>>>,
}

impl Sockets {
    fn open(site: &Site) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        // Those of the node on all of its addresses, shared ones too, of both families.
        for (at, address, port) in [
            ("default/server", SERVER[0], SERVER_PORT),
            ("default/server", SERVER[1], SERVER_PORT),
            ("node-a", "0.0.0.0", OPEN_PORT),
            ("node-a", "::", OPEN_PORT),
            ("node-a", "0.0.0.0", CLOSED_PORT),
            ("node-a", "::", CLOSED_PORT),
        ] {
            let address = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
            let socket = site.udp(at, &format!("{address}:{port}"));
            // All that is thrown at once, also where nobody reads for a moment.
            setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
            let (name, stop) = (format!("{address}:{port}"), stop.clone());
            threads.push(thread::spawn(move || read(&socket, &name, &stop)));
        }
        Self { stop, threads }
    }

    /// What has come, as "socket: payload".
    fn close(self) -> Vec<String> {
        // What was sent last is on its way for no longer.
        thread::sleep(Duration::from_millis(500));
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    }
}

fn read(socket: &UdpSocket, name: &str, stop: &AtomicBool) -> Vec<String> {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let (mut come, mut buffer) = (Vec::new(), [0; 2048]);
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let payload = String::from_utf8_lossy(&buffer[..length.min(16)]).into_owned();
            come.push(format!("{name} from {from}: {payload}"));
        }
    }
    come
}

/// Starts to send datagrams by a namespace's eth0.
fn throw(
    site: &Site,
    from: &str,
    seed: u32,
    mac: &str,
    what: (&str, &str),
    sources: &[&str],
    to: &[String],
) -> Process {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/e2e/denied.py").display().to_string();
    let count = if what.0 == "tagged" { TAGGED } else { FRAMES }.to_string();
    let (seed, sources) = (seed.to_string(), sources.join(","));
    let mut command = vec!["/usr/bin/python3", &script, "eth0", &count, &seed, mac, what.0, what.1, &sources];
    command.extend(to.iter().map(String::as_str));
    site.lab.spawn(from, &format!("thrower-{}", from.replace('/', "-")), &command).unwrap()
}

/// Who throws: its namespace, how packets come to node-a as a trace names that, the destination MAC, in what shapes, sources, for whom.
struct Thrower {
    from: &'static str,
    device: String,
    mac: String,
    shapes: &'static str,
    sources: Vec<&'static str>,
    to: Vec<String>,
}

/// The MAC address of a device of node-a, and its IPv6 link-local address.
fn of_device(site: &Site, device: &str) -> [String; 2] {
    let after = |arguments: &[&str], word: &str| {
        let text = site.lab.run_in("node-a", arguments).unwrap();
        let rest = text.split(word).nth(1).unwrap_or_else(|| panic!("{word} in {text}"));
        rest.split([' ', '/']).next().unwrap().to_owned()
    };
    [
        after(&["ip", "-o", "link", "show", device], "link/ether "),
        after(&["ip", "-o", "-6", "address", "show", device, "scope", "link"], "inet6 "),
    ]
}

fn throwers(site: &Site, with_node: bool) -> Vec<Thrower> {
    let to_pod: Vec<String> = SERVER.map(|address| format!("{address}/{SERVER_PORT}")).to_vec();
    let mut to_all = to_pod.clone();
    let [mac, link_local] = of_device(site, "eth0");
    if with_node {
        let own = NODE.iter().chain(&SHARED).map(|address| (*address).to_owned()).chain([link_local]);
        to_all.extend(own.map(|address| format!("{address}/{CLOSED_PORT}")));
    }
    let thrower = |from, device: &str, mac: &str, shapes, sources: &[&'static str], to: &[String]| Thrower {
        from,
        device: device.to_owned(),
        mac: mac.to_owned(),
        shapes,
        sources: sources.to_vec(),
        to: to.to_vec(),
    };
    let others = [FRIEND[0], FRIEND[1], NODE[0], NODE[1], AFAR];
    let attackers = workload_device("default", "attacker");
    vec![
        thrower("client", "eth0", &mac, "all", &[&[CLIENT, "fd00:10::100"], &others[..]].concat(), &to_all),
        // As from the other node, and from nobody: none of its pods, who would be let in.
        thrower(
            "client",
            "eth0",
            &mac,
            "tunnelled:192.168.10.1,192.168.10.2,192.168.10.77,192.168.10.100,10.1.2.77",
            &[CLIENT, FRIEND[0], NODE[0], "10.1.1.99"],
            &to_all.iter().filter(|to| !to.contains(':')).cloned().collect::<Vec<_>>(),
        ),
        thrower("default/attacker", &attackers, "ee:ee:ee:ee:ee:ee", "all", &[ATTACKER, FRIEND].concat(), &to_pod),
        // The node's own kernel would send it on.
        thrower("behind", "host", &of_device(site, "side0")[0], "all", &[&BEHIND[..], &others].concat(), &to_pod),
    ]
}

/// Throws from everywhere what may not come in, while something else is done; what has come to sockets all the same.
fn denied(site: &mut Site, seed: u32, with_node: bool, meanwhile: impl FnOnce(&mut Site)) -> Vec<String> {
    let throwers = throwers(site, with_node);
    let sockets = Sockets::open(site);
    let mut thrown: Vec<Process> = (seed..)
        .zip(&throwers)
        .map(|(seed, one)| throw(site, one.from, seed, &one.mac, (one.shapes, "denied"), &one.sources, &one.to))
        .collect();
    meanwhile(site);
    for thrower in &mut thrown {
        assert!(thrower.wait(DEADLINE * 6).unwrap().success(), "{}", thrower.log());
        // The log goes on from the thrower before.
        let log = thrower.log();
        let sent = log.rsplit_once("sent ").and_then(|(_, sent)| sent.split_whitespace().next()?.parse().ok());
        assert!(sent.is_some_and(|sent: u32| sent >= FRAMES), "{log}");
    }
    sockets.close().into_iter().filter(|come| come.contains("denied")).collect()
}

/// What a trace says of the flows that are thrown: none may pass, as none is seen to.
fn trace_agrees(site: &Site) {
    let mut flows = Vec::new();
    for Thrower { device, shapes, sources, to, .. } in throwers(site, true) {
        let is_told = |source: &str, to: &str| {
            // A trace takes packets of the other node's pods for those that came in its tunnel, and others for those that did not; what has the
            // node's address for the node's own; and it knows no device's network.
            !shapes.starts_with("tunnelled")
                && source != AFAR
                && !NODE.contains(&source)
                && !["192.168.10.255", "fd00:10::"].contains(&to)
        };
        for (to, port) in to.iter().filter_map(|to| to.rsplit_once('/')) {
            for source in sources.iter().filter(|source| source.contains(':') == to.contains(':')) {
                if is_told(source, to) {
                    flows.push(json!({
                        "id": format!("{source} by {device} to {to}"), "src": source, "dst": to, "proto": "udp", "sport": 40000,
                        "dport": port.parse::<u16>().unwrap(), "device": device,
                    }));
                }
            }
        }
    }
    let count = flows.len();
    // What is seen to come.
    for (device, source, to, port) in [
        ("eth0", CLIENT, NODE[0], OPEN_PORT),
        ("eth0", CLIENT, SHARED[0], OPEN_PORT),
        ("eth0", "fd00:10::100", SHARED[3], OPEN_PORT),
        (&*workload_device("default", "friend"), FRIEND[0], SERVER[0], SERVER_PORT),
    ] {
        flows.push(json!({
            "id": "seen", "src": source, "dst": to, "proto": "udp", "sport": 40000, "dport": port, "device": device,
        }));
    }
    let text: Vec<String> = flows.iter().map(ToString::to_string).collect();
    let said = site.trace("node-a", &text.join("\n"));
    assert_eq!(said.len(), flows.len());
    assert!(count > 20, "{count}");
    for answer in said {
        let passes = ["forward", "local"].contains(&answer["verdict"].as_str().unwrap_or_default());
        assert_eq!(passes, answer["id"] == "seen", "{answer}");
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn what_is_denied_reaches_no_socket_in_whatever_shape_it_comes() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/friend", "friend", &FRIEND);
    manifests.pod("node-a", "default/server", "server", &SERVER);
    manifests.pod("node-a", "default/attacker", "attacker", &ATTACKER);
    // As if a friend were there, too.
    manifests.pod("node-b", "default/afar", "friend", &[AFAR]);
    manifests.add(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
        "metadata": {"name": "uplink-of-a", "labels": {"uplink": "yes"}},
        "spec": {"interfaceName": "eth0", "node": "node-a"},
    }));
    let mut site = site(&manifests);
    site.start("node-a");

    // What is allowed comes, behind priority tags too, so that nothing below is silent for another reason.
    let sockets = Sockets::open(&site);
    let [mac, link_local] = of_device(&site, "eth0");
    let of_node: Vec<&str> = NODE.into_iter().chain(SHARED).chain([&*link_local]).collect();
    for (number, address) in of_node.iter().enumerate() {
        let (payload, to) = (format!("allowed{number}"), [format!("{address}/{OPEN_PORT}")]);
        let mut allowed = throw(&site, "client", 1, &mac, ("tagged", &payload), &[CLIENT, "fd00:10::100"], &to);
        assert!(allowed.wait(DEADLINE).unwrap().success(), "{}", allowed.log());
    }
    let friend = site.udp("default/friend", "10.1.1.10:0");
    friend.send_to(b"allowed", format!("{}:{SERVER_PORT}", SERVER[0])).unwrap();
    let come = sockets.close();
    assert!(come.iter().any(|come| come.contains(SERVER[0]) && come.contains("allowed")), "{come:?}");
    for (number, address) in of_node.iter().enumerate() {
        let count = come.iter().filter(|come| come.contains(&format!("allowed{number} "))).count();
        assert!(count > TAGGED as usize * 9 / 10, "{count} of {TAGGED} came to {address} behind priority tags");
    }
    trace_agrees(&site);

    let nothing: [String; 0] = [];
    assert_eq!(denied(&mut site, 10, true, |_| {}), nothing, "while weir runs");
    let reloads = |site: &mut Site| {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            site.hang_up("node-a");
            thread::sleep(Duration::from_millis(50));
        }
    };
    assert_eq!(denied(&mut site, 20, true, reloads), nothing, "while weir reloads");
    let killed = |site: &mut Site| {
        let mut router = site.take_router("node-a");
        router.signal(Signal::SIGKILL);
        assert!(!router.wait(DEADLINE).unwrap().success());
    };
    assert_eq!(denied(&mut site, 30, true, killed), nothing, "when weir is killed");
    assert_eq!(denied(&mut site, 40, true, |_| {}), nothing, "while weir is dead");
    assert_eq!(denied(&mut site, 50, true, |site| site.start("node-a")), nothing, "while weir starts");
    site.finish();

    // Nobody governs the node any more, but no way leads from outside to its pods.
    let site = &mut site_without_routers(&manifests);
    assert_eq!(denied(site, 60, false, |_| {}), nothing, "after weir was taken off");
}

/// A node that forwards, with somebody behind a device of its own.
fn site(manifests: &Manifests) -> Site {
    let mut site = Site::build(&one_node(), &manifests.text(), POLICIES);
    // A socket of IPv6 alone beside each of IPv4: one for both would get no packets for groups of IPv4.
    for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv6.bindv6only=1"] {
        site.lab.run_in("node-a", &["sysctl", "-qw", setting]).unwrap();
    }
    add_behind(&mut site, "behind", "side0", &GATEWAY, &BEHIND);
    site.lab.ip("client", "route add 10.1.1.0/24 via 192.168.10.1").unwrap();
    // The kernel takes no packet for an address that it is not sure of yet.
    let is_tentative = || site.lab.run_in("node-a", &["ip", "-6", "address", "show"]).unwrap().contains("tentative");
    wait_until("no address is tentative", DEADLINE, || (!is_tentative()).then_some(())).unwrap();
    site
}

/// A node from which weir was taken off.
fn site_without_routers(manifests: &Manifests) -> Site {
    let mut site = site(manifests);
    site.start("node-a");
    let mut router = site.take_router("node-a");
    router.signal(Signal::SIGTERM);
    assert!(router.wait(DEADLINE).unwrap().success());
    let config = site.config("node-a").display().to_string();
    site.lab.weir("node-a", &["detach", "-c", &config]).unwrap();
    site
}
