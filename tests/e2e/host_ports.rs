//! `hostPort` of pods: from outside, from pods of this node and of another, and from the node's own processes.

use std::{
    io::{ErrorKind, Read, Write},
    net::UdpSocket,
    time::Duration,
};

use serde_json::{Value, json};
use weir_lab::wait_until;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{CLIENT, DEADLINE, Echo, Site, bulk, two_nodes},
};

const NODE: [&str; 2] = ["192.168.10.1", "[fd00:10::1]"];
const WEB: [&str; 2] = ["10.1.1.20", "fd00:1:1::20"];
const NEXT: [&str; 2] = ["10.1.1.21", "fd00:1:1::21"];
const HTTP: u16 = 8080;
const ECHO: u16 = 5353;
const BULK: u16 = 8090;
/// Open on node-a's IPv4 address only.
const ONE: u16 = 8081;
/// Open to node-a's own processes only, on 127.0.0.1 and on ::1.
const LOOPBACK: u16 = 8082;
const NODE_PORT: u16 = 31380;
const LOCAL_NODE_PORT: u16 = 31381;

/// Who has the host ports 8080 and 5353.
#[derive(Clone, Copy, PartialEq)]
enum Owner {
    Web,
    Next,
    /// The pod is gone.
    Nobody,
}

fn manifests(owner: Owner) -> String {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/near", "friend", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-b", "default/far", "stranger", &["10.1.2.10", "fd00:1:2::10"]);
    for (pod, addresses, has_ports) in
        [("default/web", WEB, owner == Owner::Web), ("default/next", NEXT, owner == Owner::Next)]
    {
        if pod == "default/web" && owner != Owner::Web {
            continue;
        }
        manifests.pod("node-a", pod, "server", &addresses);
        if has_ports {
            manifests.host_port("", "TCP", HTTP, 80);
            manifests.host_port("", "TCP", BULK, 90);
            manifests.host_port("0.0.0.0", "UDP", ECHO, 7);
            manifests.host_port("::", "UDP", ECHO, 7);
        }
    }
    manifests.pod("node-a", "default/one", "one", &["10.1.1.30", "fd00:1:1::30"]);
    manifests.host_port("192.168.10.1", "TCP", ONE, 80);
    manifests.pod("node-a", "default/loopback", "loopback", &["10.1.1.31", "fd00:1:1::31"]);
    manifests.host_port("127.0.0.1", "TCP", LOOPBACK, 80);
    manifests.host_port("::1", "TCP", LOOPBACK, 80);
    manifests.service(&ServiceSpec {
        name: "default/service",
        addresses: &["10.96.0.10", "fd00:96::10"],
        ports: &[("http", "TCP", 80, 80, NODE_PORT)],
        backends: &[("10.1.2.10", "node-b"), ("fd00:1:2::10", "node-b")],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/local",
        addresses: &["10.96.0.11", "fd00:96::11"],
        ports: &[("http", "TCP", 80, 80, LOCAL_NODE_PORT)],
        local: true,
        backends: &[("10.1.1.30", "node-a"), ("fd00:1:1::30", "node-a")],
    });
    manifests.text()
}

fn site() -> Site {
    let mut site = Site::build(&two_nodes(), &manifests(Owner::Web), "");
    for pod in ["default/web", "default/next", "default/one", "default/loopback", "default/far"] {
        site.serve(pod, &[80]);
    }
    site.start_all();
    site
}

/// curl's exit status for a connection that is refused.
const REFUSED: i32 = 7;

fn curl(site: &Site, from: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = vec!["curl", "-sS", "-g", "--max-time", "20"];
    command.extend(arguments);
    let output = site.lab.output_in(from, &command).unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Sends a word and waits for it to come back.
fn echoes(socket: &UdpSocket, word: &str) -> bool {
    socket.send(word.as_bytes()).unwrap();
    let mut buffer = [0; 64];
    socket.recv(&mut buffer).is_ok_and(|length| buffer[..length] == *word.as_bytes())
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn everybody_reaches_a_pod_by_its_host_port() {
    let site = site();
    for (family, node) in NODE.into_iter().enumerate() {
        let url = format!("http://{node}:{HTTP}/");
        // The pod sees who asks: only itself it would not answer.
        let own = ["192.168.10.1", "fd00:10::1"][family];
        let far = ["192.168.10.2", "fd00:10::2"][family];
        for (from, seen_as) in [
            ("client", [CLIENT, "fd00:10::100"][family]),
            ("default/near", ["10.1.1.10", "fd00:1:1::10"][family]),
            // Beyond the pools' addresses a pod leaves with its node's.
            ("default/far", far),
            ("node-a", own),
            ("node-b", far),
            ("default/web", own),
        ] {
            let (by, seen) = site.answered(from, &url);
            assert_eq!((by.as_str(), seen.to_string().as_str()), ("default/web", seen_as), "{from} to {url}");
        }
        // On loopback it is not open, and nobody else has the port.
        let loopback = ["127.0.0.1", "[::1]"][family];
        assert_eq!(curl(&site, "node-a", &[&format!("http://{loopback}:{HTTP}/")]).0, Some(REFUSED));
        let bind = ["0.0.0.0:7", "[::]:7"][family];
        let _echo = Echo::new(&site, "default/web", bind);
        for from in ["client", "default/near", "default/far", "node-a", "default/web"] {
            let socket = site.udp(from, ["0.0.0.0:0", "[::]:0"][family]);
            socket.connect(format!("{node}:{ECHO}")).unwrap();
            assert!(echoes(&socket, from), "{from} to {node}");
        }
        // Node ports of the node itself, with the backend on the other node and on this one.
        for (port, pod) in [(NODE_PORT, "default/far"), (LOCAL_NODE_PORT, "default/one")] {
            let (by, _) = site.answered("node-a", &format!("http://{node}:{port}/"));
            assert_eq!(by, pod);
        }
    }
    // hostIP is one address; a loopback one is for the node's own processes, whatever their source.
    assert_eq!(site.answered("client", &format!("http://{}:{ONE}/", NODE[0])).0, "default/one");
    assert_eq!(site.answered("node-a", &format!("http://{}:{ONE}/", NODE[0])).0, "default/one");
    for from in ["client", "node-a", "default/near"] {
        assert_eq!(curl(&site, from, &[&format!("http://{}:{ONE}/", NODE[1])]).0, Some(REFUSED), "{from}");
        assert_eq!(curl(&site, from, &[&format!("http://{}:{LOOPBACK}/", NODE[0])]).0, Some(REFUSED), "{from}");
    }
    for arguments in [
        &["http://127.0.0.1:8082/"][..],
        &["--interface", "192.168.10.1", "http://127.0.0.1:8082/"],
        &["http://[::1]:8082/"],
        &["--interface", "fd00:10::1", "http://[::1]:8082/"],
    ] {
        let (code, body) = curl(&site, "node-a", arguments);
        assert!(code == Some(0) && body.starts_with("default/loopback "), "{arguments:?}: {code:?} {body}");
    }

    // Much at once, both ways, for the node itself.
    for (family, node) in NODE.into_iter().enumerate() {
        let listener = site.listen("default/web", ["0.0.0.0:90", "[::]:90"][family]);
        let near = site.connect("node-a", &format!("{node}:{BULK}"), DEADLINE).unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(DEADLINE)).unwrap();
        far.set_write_timeout(Some(DEADLINE)).unwrap();
        bulk(&near, &far, 4 << 20);
        bulk(&far, &near, 4 << 20);
    }
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn clients_of_a_host_port_follow_its_pod() {
    let mut site = site();
    let named = |pod: &'static str| Echo::answering(&site, pod, "0.0.0.0:7", move |_, _| pod.as_bytes().to_vec());
    let _echoes = [named("default/web"), named("default/next")];
    let clients: Vec<(&str, UdpSocket)> = ["client", "default/near", "node-a"]
        .into_iter()
        .map(|from| {
            let socket = site.udp(from, "0.0.0.0:0");
            socket.connect(format!("{}:{ECHO}", NODE[0])).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            (from, socket)
        })
        .collect();
    // Sockets that go on, whoever has the port.
    let all_reach = |who: &str| {
        for (from, socket) in &clients {
            wait_until(&format!("{from}'s answer by {who}"), DEADLINE, || {
                let _ = socket.send(b"who?");
                let mut buffer = [0; 64];
                let length = socket.recv(&mut buffer).ok()?;
                (buffer[..length] == *who.as_bytes()).then_some(())
            })
            .unwrap();
        }
    };
    all_reach("default/web");
    let mut stream = site.connect("client", &format!("{}:{HTTP}", NODE[0]), DEADLINE).unwrap();

    site.set_cluster(&manifests(Owner::Next));
    all_reach("default/next");
    assert_eq!(site.answered("client", &format!("http://{}:{HTTP}/", NODE[0])).0, "default/next");
    // A connection to the pod that is gone ends.
    let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
    let ended = stream.read(&mut [0; 64]);
    assert!(matches!(&ended, Err(error) if error.kind() == ErrorKind::ConnectionReset), "{ended:?}");

    // Nobody has it: the node's own server gets what comes, and loses it to a pod that comes back.
    site.set_cluster(&manifests(Owner::Nobody));
    {
        let _own = Echo::answering(&site, "node-a", "0.0.0.0:5353", |_, _| b"node-a".to_vec());
        all_reach("node-a");
        site.set_cluster(&manifests(Owner::Web));
        all_reach("default/web");
    }

    // A router that starts anew knows it all from the same objects.
    site.router("node-a").signal(nix::sys::signal::Signal::SIGKILL);
    site.take_router("node-a").wait(DEADLINE).unwrap();
    site.start("node-a");
    all_reach("default/web");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn policy_and_status_see_the_pod_of_a_host_port() {
    let site = site();
    let url = format!("http://{}:{HTTP}/", NODE[0]);
    site.set_policies(crate::manifests::ONLY_FRIENDS);
    site.unanswered("client", &url);
    site.unanswered("default/far", &url);
    for from in ["default/near", "node-a"] {
        assert_eq!(site.answered(from, &url).0, "default/web");
    }
    assert!(site.drops("node-a", "PolicyDeniedIngress") > 0);
    site.set_policies("");
    assert_eq!(site.answered("client", &url).0, "default/web");

    // A second pod that wants the same port, as old as the first, does not get it, and status names it.
    let mut rival = Manifests::default();
    rival.pod("node-a", "default/web-2", "server", &["10.1.1.99"]);
    rival.host_port("", "TCP", HTTP, 80);
    site.set_policies(&site.with_node_names(&rival.text(), &["node-a"]));
    assert_eq!(site.answered("client", &url).0, "default/web");
    let why = "pod default/web has it, and keeps it where both would be open";
    assert_eq!(
        site.status("node-a")["unservedHostPorts"],
        json!([{"pod": "default/web-2", "proto": "tcp", "hostPort": HTTP, "why": why}])
    );
    let services = site.ask("node-a", "services").unwrap();
    let port = services.as_array().unwrap().iter().find(|one| one["service"] == "default/web:hostPort/8080").unwrap();
    let told = ["kind", "hostPort", "hostIP", "proto"].map(|key| port[key].clone());
    assert_eq!(told, [json!("HostPort"), json!(HTTP), json!("all addresses of this node"), json!("tcp")]);
    assert!(port["hits"].as_u64().is_some_and(|hits| hits >= 3), "{port}");
    assert_eq!(port["backends"][0]["address"], Value::from("10.1.1.20:80"));
    site.finish();
}
