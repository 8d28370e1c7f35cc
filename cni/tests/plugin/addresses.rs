//! Which addresses pods get, and what is said about them.

use std::{net::IpAddr, thread, time::Duration};

use weir_node::{
    ipam::explain::{AddressState, explain},
    pods::NodeRanges,
};

use crate::node::{Node, Sandbox, V4, V6, addresses};

fn add(node: &Node, pod: &Sandbox) -> String {
    addresses(&pod.add(node)).iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn addresses_cool_down_and_come_back_in_the_order_in_which_they_were_given_back() {
    let mut node = Node::stopped(&["10.244.7.0/29"]);
    node.settings.cool_down = Duration::from_millis(3000);
    // Of .1 to .6, what the node's tunnel has is nobody's.
    node.ranges.left_out = vec!["10.244.7.2".parse().unwrap()];
    node.start();
    let pods: Vec<_> = (0..5).map(|index| Sandbox::new(&format!("web-{index}"))).collect();
    let given: Vec<_> = pods.iter().map(|pod| add(&node, pod)).collect();
    assert_eq!(given, ["10.244.7.1", "10.244.7.3", "10.244.7.4", "10.244.7.5", "10.244.7.6"]);
    let full = Sandbox::new("full");
    let answer = full.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(
        answer.message().contains("no IPv4 address is free in 10.244.7.0/29: 5 in use, 0 cooling down"),
        "{}",
        answer.message()
    );
    // A node that is full is not broken: it stays ready.
    assert!(full.command("STATUS").run(&node.config()).success);

    for index in [3, 0] {
        pods[index].del(&node);
        thread::sleep(Duration::from_millis(20));
    }
    let answer = full.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11, "they are cooling");
    assert!(
        answer.message().contains("3 in use, 2 cooling down") && answer.message().contains("the next is free in"),
        "{}",
        answer.message()
    );
    thread::sleep(Duration::from_millis(3100));
    assert_eq!(add(&node, &full), "10.244.7.5", "the first one given back");
    assert_eq!(add(&node, &Sandbox::new("next")), "10.244.7.1");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn both_families_or_none() {
    let node = Node::new(&["10.244.7.0/30", V6]);
    let pods: Vec<_> = (0..2).map(|index| Sandbox::new(&format!("web-{index}"))).collect();
    assert_eq!(add(&node, &pods[0]), "10.244.7.1 fd00:244:0:7::1");
    assert_eq!(add(&node, &pods[1]), "10.244.7.2 fd00:244:0:7::2");
    let none = Sandbox::new("web-2");
    assert!(none.command("ADD").run(&node.config()).message().contains("no IPv4 address"));
    let report = node.explain();
    assert_eq!(report.addresses.len(), 4, "no IPv6 address was taken by the one that failed: {report:?}");
    // More comes: the family of the first range is the first.
    node.pods().configure(NodeRanges {
        pod_cidrs: vec![V6.parse().unwrap(), V4.parse().unwrap()],
        mtu: 1500,
        left_out: vec!["fd00:244:0:7::3".parse().unwrap()],
    });
    assert_eq!(add(&node, &none), "fd00:244:0:7::4 10.244.7.3");
    assert_eq!(none.namespace.ip_json("link show dev eth0")[0]["mtu"], 1500);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn without_ranges_the_node_is_not_ready() {
    let node = Node::new(&[]);
    let pod = Sandbox::new("web-0");
    let answer = pod.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(answer.message().contains("pod CIDR"), "{}", answer.message());
    assert_eq!(pod.command("STATUS").run(&node.config()).code(), 50);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn each_address_and_each_leak_is_explained() {
    let mut node = Node::new(&[V4]);
    let (pod, gone, leaking) = (Sandbox::new("web-0"), Sandbox::new("web-1"), Sandbox::new("web-2"));
    for pod in [&pod, &gone, &leaking] {
        pod.add(&node);
    }
    gone.del(&node);
    // By the router, and by whoever reads the files, with and without a view of the devices.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    let state = node.settings.state.clone();
    let from_router = node.explain();
    let from_files = node.namespace.within(|| explain(&state, now).unwrap());
    assert_eq!(from_router, from_files);
    assert_eq!(from_files.leaks, []);
    assert_eq!(from_files.notes, [""; 0]);
    let elsewhere = explain(&state, now).unwrap();
    assert_eq!(elsewhere.notes.len(), 1, "{:?}", elsewhere.notes);
    let text = from_router.text(now);
    let wanted = [
        "10.244.7.0/24: 2 in use, 1 cooling down, of 254".to_owned(),
        format!("10.244.7.1  in use   default/web-0, {}, sandbox {}", pod.device(), &pod.id[..13]),
        "10.244.7.2  cooling  for ".to_owned(),
    ];
    for wanted in wanted {
        assert!(text.contains(&wanted), "{wanted}:\n{text}");
    }
    assert!(matches!(from_router.addresses[1].state, AddressState::Cooling { .. }));
    // A minute later it is free.
    assert!(explain(&state, now + 61_000).unwrap().text(now + 61_000).contains("10.244.7.2  free "));

    // While pods come and go nothing looks like a leak.
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            for index in 0..20 {
                let other = Sandbox::new(&format!("busy-{index}"));
                other.add(&node);
                other.del(&node);
            }
        });
        while !busy.is_finished() {
            assert_eq!(node.explain().leaks, []);
        }
    });
    node.stop();
    crate::node::ip(&["-n", &node.namespace.name, "link", "del", &leaking.device()]);
    let report = node.namespace.within(|| explain(&state, now).unwrap());
    assert_eq!(report.leaks.len(), 1, "{:?}", report.leaks);
    assert!(report.leaks_text().starts_with("10.244.7.3: pod default/web-2 has no device"), "{}", report.leaks_text());
    std::fs::remove_file(state.join("pods").join(format!("{}@eth0.json", pod.id))).unwrap();
    let report = node.namespace.within(|| explain(&state, now).unwrap());
    assert!(report.leaks_text().contains("has no record"), "{}", report.leaks_text());
    node.start();
    assert_eq!(node.explain().leaks, [], "the start mended it");
}
