//! Services: backends, masquerade, rejects, node ports.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{CLIENT, DEADLINE, Echo, Site, pattern, two_nodes},
};

const WEB: &str = "10.96.0.10";
const EMPTY: &str = "10.96.0.11";
const ECHO: &str = "10.96.0.12";
const ALONE: &str = "10.96.0.13";
const NODE_PORT: u16 = 31380;
const LOCAL_NODE_PORT: u16 = 31381;
const DOWNLOAD_NODE_PORT: u16 = 31382;
const NODES: [(&str, &str); 2] = [("node-a", "192.168.10.1"), ("node-b", "192.168.10.2")];

fn site() -> Site {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10"]);
    manifests.pod("node-a", "default/web-1", "web", &["10.1.1.21"]);
    manifests.pod("node-b", "default/web-2", "web", &["10.1.2.21"]);
    manifests.pod("node-b", "default/web-3", "web", &["10.1.2.22"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &[WEB],
        ports: &[("http", "TCP", 80, 8080, NODE_PORT), ("download", "TCP", 81, 8081, DOWNLOAD_NODE_PORT)],
        backends: &[("10.1.1.21", "node-a"), ("10.1.2.21", "node-b"), ("10.1.2.22", "node-b")],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/empty",
        addresses: &[EMPTY],
        ports: &[("tcp", "TCP", 80, 8080, 0), ("udp", "UDP", 53, 53, 0)],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/echo",
        addresses: &[ECHO],
        ports: &[("echo", "UDP", 53, 7, 0)],
        backends: &[("10.1.2.21", "node-b")],
        ..ServiceSpec::default()
    });
    manifests.service(&ServiceSpec {
        name: "default/alone",
        addresses: &[ALONE],
        ports: &[("http", "TCP", 80, 8080, LOCAL_NODE_PORT)],
        local: true,
        backends: &[("10.1.1.21", "node-a")],
    });
    let mut site = Site::build(&two_nodes(), &manifests.text(), "");
    for pod in ["default/web-1", "default/web-2", "default/web-3"] {
        site.serve(pod, &[8080]);
    }
    site.start_all();
    site
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn connections_spread_evenly_over_backends_and_keep_their_source() {
    const REQUESTS: u32 = 900;
    let site = site();
    let url = format!("http://{WEB}/?[1-{REQUESTS}]");
    let text = site.lab.run_in("default/client", &["curl", "-sS", "--max-time", "100", &url]).unwrap();
    let mut count: BTreeMap<&str, u32> = BTreeMap::new();
    for (pod, seen) in text.lines().map(|line| line.split_once(' ').unwrap()) {
        assert_eq!(seen, "10.1.1.10", "{pod} sees the client pod itself");
        *count.entry(pod).or_default() += 1;
    }
    assert_eq!(count.values().sum::<u32>(), REQUESTS, "{count:?}");
    // Seven standard deviations of a binomial distribution with p = 1/3: a right router fails once in 60 billion runs.
    let (mean, spread) = (f64::from(REQUESTS) / 3.0, 7.0 * (f64::from(REQUESTS) * 2.0 / 9.0).sqrt());
    assert!(count.len() == 3 && count.values().all(|n| (f64::from(*n) - mean).abs() <= spread), "{count:?}");
    // `weir services` counted the same.
    let services = site.ask("node-a", "services").unwrap();
    let web =
        services.as_array().unwrap().iter().find(|one| one["service"] == "default/web:http").expect("it is listed");
    assert_eq!((&web["hits"], &web["usable"]), (&REQUESTS.into(), &serde_json::json!({"cluster": 3, "local": 1})));
    for (pod, address) in
        [("default/web-1", "10.1.1.21"), ("default/web-2", "10.1.2.21"), ("default/web-3", "10.1.2.22")]
    {
        let backends = web["backends"].as_array().unwrap();
        let backend = backends.iter().find(|one| one["address"] == format!("{address}:8080")).expect("it is listed");
        assert_eq!(backend["hits"], count[pod], "{pod}: {backend}");
    }
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn udp_to_a_service_comes_back_from_the_service() {
    let site = site();
    let echo = Echo::new(&site, "default/web-2", "0.0.0.0:7");
    for _ in 0..20 {
        // Connected: an answer from another address than the service's would not be seen.
        let socket = site.udp("default/client", "0.0.0.0:0");
        socket.connect(format!("{ECHO}:53")).unwrap();
        socket.send(b"question").unwrap();
        assert_eq!(socket.recv(&mut [0; 64]).expect("an answer"), 8);
    }
    drop(echo);
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_service_without_backends_rejects_at_once() {
    let site = site();
    for (address, reason) in [(format!("{EMPTY}:80"), "NoBackend"), (format!("{WEB}:82"), "UnpublishedPort")] {
        let begin = Instant::now();
        let output =
            site.lab.output_in("default/client", &["curl", "-s", "--max-time", "20", &format!("http://{address}/")]);
        assert_eq!(output.unwrap().status.code(), Some(7), "{address}: a RST is a failed connect to curl");
        assert!(begin.elapsed() < Duration::from_secs(15), "{address}");
        let refused = site.connect("default/client", &address, DEADLINE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{address}");
        assert!(site.drops("node-a", reason) >= 2, "{}", site.status("node-a")["counters"]);
    }
    let socket = site.udp("default/client", "0.0.0.0:0");
    socket.connect(format!("{EMPTY}:53")).unwrap();
    socket.send(b"question").unwrap();
    let refused = socket.recv(&mut [0; 64]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "ICMP port unreachable");
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_reaches_itself_through_its_own_service() {
    let site = site();
    // Its only backend is the pod itself.
    let (pod, seen) = site.answered("default/web-1", &format!("http://{ALONE}/"));
    assert_eq!((pod.as_str(), seen.to_string().as_str()), ("default/web-1", "192.168.10.1"), "hairpin is masqueraded");
    // One of three.
    let text = site.lab.run_in("default/web-1", &["curl", "-sS", "--max-time", "60", &format!("http://{WEB}/?[1-60]")]);
    let text = text.unwrap();
    assert_eq!(text.lines().count(), 60);
    for pod in ["default/web-1 192.168.10.1", "default/web-2 10.1.1.21", "default/web-3 10.1.1.21"] {
        assert!(text.lines().any(|line| line == pod), "{pod} is missing in {text}");
    }
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_node_port_answers_on_both_nodes_and_is_masqueraded() {
    let site = site();
    for (node, address) in NODES {
        let mut backends = BTreeMap::new();
        // So many that each of three backends gets some but once in five billion runs.
        for _ in 0..60 {
            let (pod, seen) = site.answered("client", &format!("http://{address}:{NODE_PORT}/"));
            assert_eq!(seen.to_string(), address, "{pod} answered through {node}");
            *backends.entry(pod).or_insert(0) += 1;
        }
        assert_eq!(backends.len(), 3, "{node}: {backends:?}");
        let status = site.status(node);
        let shown =
            status["snat"]["addresses"].as_array().and_then(|all| all.iter().find(|a| a["address"] == *address));
        let shown = shown.unwrap_or_else(|| panic!("{address} masquerades: {status}"));
        let (connections, ports) = (shown["connections"].as_u64(), shown["busiest"]["portsInUse"].as_u64());
        // 60 connections in TIME_WAIT or so, to three backends.
        assert!(connections >= Some(60) && ports >= Some(20), "{shown}");
        assert_eq!(shown["busiest"]["proto"], "tcp");
    }
    // From a pod: the node's address is as good as the cluster IP.
    site.answered("default/client", &format!("http://192.168.10.2:{NODE_PORT}/"));
    site.answered("default/client", &format!("http://192.168.10.1:{NODE_PORT}/"));
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn external_traffic_policy_local_keeps_the_client_and_drops_elsewhere() {
    let site = site();
    for _ in 0..5 {
        let (pod, seen) = site.answered("client", &format!("http://192.168.10.1:{LOCAL_NODE_PORT}/"));
        assert_eq!((pod.as_str(), seen.to_string().as_str()), ("default/web-1", CLIENT));
    }
    site.unanswered("client", &format!("http://192.168.10.2:{LOCAL_NODE_PORT}/"));
    assert!(site.drops("node-b", "NoLocalBackend") >= 1);
    // Within the cluster the policy does not count.
    let (pod, seen) = site.answered("default/web-2", &format!("http://{ALONE}/"));
    assert_eq!((pod.as_str(), seen.to_string().as_str()), ("default/web-1", "10.1.2.21"));
    site.finish();
}

/// Bytes that never end, from one end to the other, which checks each; `received` counts them.
fn stream(mut from: TcpStream, mut to: TcpStream, stop: &AtomicBool, received: &AtomicUsize) {
    const PIECE: usize = 64 * 1024;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut piece = vec![0; PIECE];
            for at in (0..).step_by(PIECE).take_while(|_| !stop.load(Ordering::Relaxed)) {
                pattern(at, &mut piece);
                from.write_all(&piece).expect("the connection takes everything");
            }
            from.shutdown(Shutdown::Write).expect("its end");
        });
        let (mut piece, mut expected, mut at) = (vec![0; PIECE], vec![0; PIECE], 0);
        loop {
            let length = to.read(&mut piece).expect("bytes, or the end");
            if length == 0 {
                break;
            }
            pattern(at, &mut expected[..length]);
            assert!(piece[..length] == expected[..length], "bytes {at} to {}", at + length);
            at += length;
            received.store(at, Ordering::Relaxed);
        }
    });
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn downloads_through_services_live_through_kill_9() {
    let mut site = site();
    site.lab.ip("client", "route add 10.96.0.0/16 via 192.168.10.1").unwrap();
    // From a pod to a backend of the other node; and from outside by a node port, masqueraded.
    let open = |site: &Site, from: &str, address: &str| {
        let listeners = ["default/web-1", "default/web-2", "default/web-3"].map(|pod| {
            let listener = site.listen(pod, "0.0.0.0:8081");
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let near = site.connect(from, address, DEADLINE).unwrap();
        let accepted = || listeners.iter().find_map(|listener| listener.accept().ok());
        let (far, seen) = weir_lab::wait_until("the connection", DEADLINE, accepted).unwrap();
        far.set_nonblocking(false).unwrap();
        for end in [&near, &far] {
            end.set_read_timeout(Some(DEADLINE)).unwrap();
            end.set_write_timeout(Some(DEADLINE)).unwrap();
        }
        (near, far, seen)
    };
    let (stop, received) = (AtomicBool::new(false), [(); 2].map(|()| AtomicUsize::new(0)));
    thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        let (near, far, _) = open(&site, "default/client", &format!("{WEB}:81"));
        scope.spawn(|| stream(far, near, &stop, &received[0]));
        let (near, far, seen) = open(&site, "client", &format!("192.168.10.1:{DOWNLOAD_NODE_PORT}"));
        assert_ne!(seen.ip().to_string(), CLIENT, "it is masqueraded");
        scope.spawn(|| stream(far, near, &stop, &received[1]));
        let progress = |what: &str| {
            let goals = received.each_ref().map(|count| count.load(Ordering::Relaxed) + (1 << 20));
            let reached = || received.iter().zip(goals).all(|(count, goal)| count.load(Ordering::Relaxed) >= goal);
            let begin = Instant::now();
            weir_lab::wait_until(what, DEADLINE, || reached().then_some(())).unwrap();
            begin.elapsed()
        };
        progress("the downloads' start");
        for _ in 0..2 {
            let mut router = site.take_router("node-a");
            router.signal(Signal::SIGKILL);
            assert!(!router.wait(DEADLINE).unwrap().success());
            let begin = Instant::now();
            site.start("node-a");
            let started = begin.elapsed();
            println!("restarted in {started:?}, a MiB more of each {:?} later", progress("the downloads to go on"));
            let log = site.router("node-a").log();
            assert!(log.contains("connections of the process before are taken over"), "{log}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    site.finish();
}
