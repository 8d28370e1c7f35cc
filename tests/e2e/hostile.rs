//! Broken and hostile frames: none takes the router down, leaks a frame, or reaches whom it must not.

use std::path::Path;

use crate::{
    manifests::{Manifests, ServiceSpec},
    site::{DEADLINE, NodePlan, Site, connection, passes},
};

const WEB: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const FRAMES: u32 = 20_000;

fn throw(site: &Site, from: &str, seed: u32, mac: &str, sources: [&str; 2], targets: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/e2e/hostile.py").display().to_string();
    let (count, seed) = (FRAMES.to_string(), seed.to_string());
    let mut command = vec!["/usr/bin/python3", &script, "eth0", &count, &seed, mac];
    command.extend(sources);
    command.extend(targets);
    let said = site.lab.run_in(from, &command).unwrap();
    let sent: u32 = said.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(sent > FRAMES / 2, "{said}");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn hostile_frames_never_stop_the_router() {
    let mut manifests = Manifests::cluster("Always");
    manifests.pod("node-a", "default/client", "client", &["10.1.1.10", "fd00:1:1::10"]);
    manifests.pod("node-a", "default/server", "server", &["10.1.1.20", "fd00:1:1::20"]);
    manifests.pod("node-a", "default/attacker", "attacker", &["10.1.1.66", "fd00:1:1::66"]);
    manifests.service(&ServiceSpec {
        name: "default/web",
        addresses: &WEB,
        ports: &[("http", "TCP", 80, 8080, 31380), ("dns", "UDP", 53, 53, 0)],
        backends: &[("10.1.1.20", "node-a"), ("fd00:1:1::20", "node-a")],
        ..ServiceSpec::default()
    });
    let nodes = [NodePlan::new("node-a", &["192.168.10.1/24", "fd00:10::1/64"], &[0, 1])];
    let mut site = Site::build(&nodes, &manifests.text(), "");
    site.serve("default/server", &[8080]);
    site.start_all();
    let url = format!("http://{}/", WEB[0]);
    site.answered("default/client", &url);
    let (near, far) = connection(&site, "default/client", "default/server", "10.1.1.20:5000");

    let works = |site: &Site, after: &str| {
        assert!(passes(&near, &far, DEADLINE) && passes(&far, &near, DEADLINE), "after {after}");
        site.answered("default/client", &url);
        site.answered("default/client", &format!("http://[{}]/", WEB[1]));
        site.answered("client", "http://192.168.10.1:31380/");
        assert!(site.status("node-a")["counters"]["rx"].as_u64().unwrap() > 0);
    };
    let targets =
        ["10.1.1.20", WEB[0], "192.168.10.1", "10.1.1.10", "169.254.1.1", "fd00:1:1::20", WEB[1], "ff02::1", "fe80::1"];
    throw(&site, "default/attacker", 1, "ee:ee:ee:ee:ee:ee", ["10.1.1.66", "fd00:1:1::66"], &targets);
    works(&site, "a pod's frames");

    let mac = site.lab.run_in("node-a", &["ip", "-o", "link", "show", "eth0"]).unwrap();
    let mac = mac.split("link/ether ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    // As from the other node, whose tunnel packets weir opens, and as from outside.
    for (seed, source) in [(2, "192.168.10.2"), (3, "192.168.10.100")] {
        throw(&site, "client", seed, &mac, [source, "fd00:10::100"], &targets);
        works(&site, "the uplink's frames");
    }
    let counters = &site.status("node-a")["counters"]["drops"];
    for reason in
        ["Truncated", "MalformedHeader", "BadHeaderChecksum", "SpoofedSource", "WorkloadTunnel", "UnknownEtherType"]
    {
        assert!(counters[reason].as_u64().unwrap_or(0) > 0, "{reason} is missing in {counters}");
    }

    // A pod that makes its device larger than a frame closes itself, and only itself.
    let device = site.cluster.workloads.iter().find(|w| w.name == "default/attacker").unwrap().device.clone();
    site.lab.ip("default/attacker", "link set eth0 mtu 9000").unwrap();
    site.lab.ip("node-a", &format!("link set {device} mtu 9000")).unwrap();
    weir_lab::wait_until("the refusal", DEADLINE, || {
        site.router("node-a").log().contains("stays closed").then_some(())
    })
    .unwrap();
    let (answered, _) = site.ping("default/attacker", "-c 1 -W 1 10.1.1.20");
    assert!(!answered);
    let _ = site.ping("default/attacker", "-c 2 -W 1 -s 8000 10.1.1.20");
    works(&site, "jumbo frames");
    site.lab.ip("node-a", &format!("link set {device} mtu 1500")).unwrap();
    site.lab.ip("default/attacker", "link set eth0 mtu 1500").unwrap();
    weir_lab::wait_until("the pod's return", DEADLINE, || {
        site.ping("default/attacker", "-c 1 10.1.1.20").0.then_some(())
    })
    .unwrap();
    site.finish();
}
