//! Hits per policy rule: counted by two workers, shown by `weir policy list`, kept through a reload.

use serde_json::Value;
use weir_lab::wait_until;

use crate::{
    manifests::{Manifests, ONLY_FRIENDS},
    site::{DEADLINE, Echo, Site, one_node},
};

/// The only tier of what arrives at the server.
fn tier(site: &Site) -> Value {
    let config = site.config("node-a").display().to_string();
    let arguments = ["policy", "list", "-c", &config, "default/server", "--output", "json"];
    let listing: Value = serde_json::from_str(&site.lab.weir("node-a", &arguments).unwrap()).unwrap();
    listing["ingress"]["tiers"][0].clone()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn rules_count_their_connections_through_a_reload() {
    let mut manifests = Manifests::cluster("Always");
    for (pod, app, address) in [
        ("default/client", "client", "10.1.1.10"),
        ("default/friend", "friend", "10.1.1.11"),
        ("default/server", "server", "10.1.1.20"),
    ] {
        manifests.pod("node-a", pod, app, &[address]);
    }
    let mut site = Site::build(&one_node(), &manifests.text(), ONLY_FRIENDS);
    site.start_all();
    let _echo = Echo::new(&site, "default/server", "0.0.0.0:7");
    // Many sockets, so that the kernel's hash gives each worker some; each several packets.
    let friends: Vec<_> = (0..32).map(|_| site.udp("default/friend", "0.0.0.0:0")).collect();
    for socket in friends.iter().chain(&friends).chain(&friends) {
        socket.send_to(b"x", "10.1.1.20:7").unwrap();
        socket.recv(&mut [0; 8]).unwrap();
    }
    let stranger = site.udp("default/client", "0.0.0.0:0");
    for _ in 0..4 {
        stranger.send_to(b"x", "10.1.1.20:7").unwrap();
    }
    wait_until("four denials", DEADLINE, || (tier(&site)["endHits"] == 4).then_some(())).unwrap();
    assert_eq!(tier(&site)["policies"][0]["rules"][0]["hits"], 32);

    // Another rule takes the first one's number.
    let ports = "  - ports: [{port: 80}]\n  - from:";
    site.set_policies(&ONLY_FRIENDS.replacen("  - from:", ports, 1));
    let rules = tier(&site)["policies"][0]["rules"].clone();
    assert_eq!((&rules[0]["hits"], &rules[1]["hits"]), (&0.into(), &32.into()), "{rules}");
    // A known connection is judged anew and does not count; one that is new does.
    let new = site.udp("default/friend", "0.0.0.0:0");
    for socket in [&friends[0], &new] {
        socket.send_to(b"x", "10.1.1.20:7").unwrap();
        socket.recv(&mut [0; 8]).unwrap();
    }
    assert_eq!(tier(&site)["policies"][0]["rules"][1]["hits"], 33);
    assert_eq!(tier(&site)["endHits"], 4);
    site.finish();
}
