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

use nix::sys::signal::Signal;
use serde_json::json;
use weir_lab::Process;

use crate::{
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

/// Sockets that read what reaches them, until dropped.
struct Sockets {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<Vec<String>>>,
}

impl Sockets {
    fn open(site: &Site) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (at, addresses, ports) in
            [("default/server", SERVER, &[SERVER_PORT][..]), ("node-a", NODE, &[OPEN_PORT, CLOSED_PORT])]
        {
            for (address, port) in addresses.iter().flat_map(|address| ports.iter().map(move |port| (address, port))) {
                let address = if address.contains(':') { format!("[{address}]") } else { (*address).to_owned() };
                let socket = site.udp(at, &format!("{address}:{port}"));
                let (name, stop) = (format!("{address}:{port}"), stop.clone());
                threads.push(thread::spawn(move || read(&socket, &name, &stop)));
            }
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
    let count = if what.0 == "all" { FRAMES } else { TAGGED }.to_string();
    let (seed, sources) = (seed.to_string(), sources.join(","));
    let mut command = vec!["/usr/bin/python3", &script, "eth0", &count, &seed, mac, what.0, what.1, &sources];
    command.extend(to.iter().map(String::as_str));
    site.lab.spawn(from, &format!("thrower-{}", from.replace('/', "-")), &command).unwrap()
}

/// Throws from outside and from a pod that may not, while something else is done; what has come to sockets that must not.
fn denied(site: &mut Site, seed: u32, with_node: bool, meanwhile: impl FnOnce(&mut Site)) -> Vec<String> {
    let mac = site.lab.run_in("node-a", &["ip", "-o", "link", "show", "eth0"]).unwrap();
    let mac = mac.split("link/ether ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    let of = |addresses: [&str; 2], port: u16| addresses.map(|address| format!("{address}/{port}"));
    let mut to = of(SERVER, SERVER_PORT).to_vec();
    let from_pod = to.clone();
    if with_node {
        to.extend(of(NODE, CLOSED_PORT));
    }
    let sockets = Sockets::open(site);
    let what = ("all", "denied");
    let sources = [CLIENT, "fd00:10::100", FRIEND[0], FRIEND[1], NODE[0], NODE[1], "10.1.2.77"];
    let mut throwers = vec![
        throw(site, "client", seed, &mac, what, &sources, &to),
        throw(site, "default/attacker", seed + 1, "ee:ee:ee:ee:ee:ee", what, &[ATTACKER, FRIEND].concat(), &from_pod),
    ];
    meanwhile(site);
    for thrower in &mut throwers {
        assert!(thrower.wait(DEADLINE * 6).unwrap().success(), "{}", thrower.log());
        // The log goes on from the thrower before.
        let log = thrower.log();
        let sent = log.rsplit_once("sent ").and_then(|(_, sent)| sent.split_whitespace().next()?.parse().ok());
        assert!(sent.is_some_and(|sent: u32| sent >= FRAMES), "{log}");
    }
    sockets.close().into_iter().filter(|come| come.contains("denied")).collect()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn what_is_denied_reaches_no_socket_in_whatever_shape_it_comes() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/friend", "friend", &FRIEND);
    manifests.pod("node-a", "default/server", "server", &SERVER);
    manifests.pod("node-a", "default/attacker", "attacker", &ATTACKER);
    // As if a friend were there, too.
    manifests.pod("node-b", "default/afar", "friend", &["10.1.2.77"]);
    manifests.add(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint",
        "metadata": {"name": "uplink-of-a", "labels": {"uplink": "yes"}},
        "spec": {"interfaceName": "eth0", "node": "node-a"},
    }));
    let mut site = Site::build(&one_node(), &manifests.text(), POLICIES);
    site.lab.ip("client", "route add 10.1.1.0/24 via 192.168.10.1").unwrap();
    site.start("node-a");

    // What is allowed comes, behind priority tags too, so that nothing below is silent for another reason.
    let sockets = Sockets::open(&site);
    let mac = site.lab.run_in("node-a", &["ip", "-o", "link", "show", "eth0"]).unwrap();
    let mac = mac.split("link/ether ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    let open = NODE.map(|address| format!("{address}/{OPEN_PORT}"));
    let mut allowed = throw(&site, "client", 1, &mac, ("tagged", "allowed"), &[CLIENT, "fd00:10::100"], &open);
    assert!(allowed.wait(DEADLINE).unwrap().success(), "{}", allowed.log());
    let friend = site.udp("default/friend", "10.1.1.10:0");
    friend.send_to(b"allowed", format!("{}:{SERVER_PORT}", SERVER[0])).unwrap();
    let come = sockets.close();
    for of in [NODE[0], NODE[1], SERVER[0]] {
        assert!(come.iter().any(|come| come.contains(of) && come.contains("allowed")), "{of}: {come:?}");
    }
    let tagged = come.iter().filter(|come| come.contains(&format!(":{OPEN_PORT} from"))).count();
    assert!(tagged > TAGGED as usize * 9 / 10, "{tagged} of {TAGGED} came behind priority tags");

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
    let site = &mut site_without_routers(manifests);
    assert_eq!(denied(site, 60, false, |_| {}), nothing, "after weir was taken off");
}

/// A node from which weir was taken off.
fn site_without_routers(manifests: Manifests) -> Site {
    let mut site = Site::build(&one_node(), &manifests.text(), POLICIES);
    site.start("node-a");
    let mut router = site.take_router("node-a");
    router.signal(Signal::SIGTERM);
    assert!(router.wait(DEADLINE).unwrap().success());
    let config = site.config("node-a").display().to_string();
    site.lab.weir("node-a", &["detach", "-c", &config]).unwrap();
    site
}
