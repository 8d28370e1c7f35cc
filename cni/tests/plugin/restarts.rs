//! What a router finds when it starts.

use std::fs;

use serde_json::Value;

use crate::node::{Asked, Node, Sandbox, V4, V6, addresses, ip};

fn record(node: &Node, pod: &Sandbox) -> std::path::PathBuf {
    node.settings.state.join("pods").join(format!("{}@eth0.json", pod.id))
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn pods_and_cooling_addresses_outlive_the_router() {
    let mut node = Node::new(&["10.244.7.0/29"]);
    let (pod, gone) = (Sandbox::new("web-0"), Sandbox::new("web-1"));
    let result = pod.add(&node);
    gone.add(&node);
    gone.del(&node);
    let kept = node.pods().kept();
    node.stop();
    node.start();
    assert_eq!(node.pods().kept(), kept);
    assert_eq!(node.control().take_asked(), [], "control learns of it by what is kept");
    assert!(pod.check(&node, &result).success);
    assert_eq!(pod.add(&node), result, "a runtime that did not hear the answer asks again");
    // Six can be given: .1 is used, .2 cools down.
    let others: Vec<_> = (2..7).map(|index| Sandbox::new(&format!("web-{index}"))).collect();
    for (other, expected) in others.iter().zip(["10.244.7.3", "10.244.7.4", "10.244.7.5", "10.244.7.6"]) {
        assert_eq!(addresses(&other.add(&node)), [expected.parse::<std::net::IpAddr>().unwrap()]);
    }
    let none = others[4].command("ADD").run(&node.config());
    assert_eq!(none.code(), 11);
    assert!(none.message().contains("5 in use, 1 cooling down"), "{}", none.message());
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn after_a_reboot_no_del_comes_and_no_address_leaks() {
    let mut node = Node::new(&["10.244.7.0/29"]);
    let pods: Vec<_> = (0..6).map(|index| Sandbox::new(&format!("web-{index}"))).collect();
    for pod in &pods {
        pod.add(&node);
    }
    node.stop();
    // The machine goes down and comes up: no namespace is left, and the kernel says another boot id.
    for pod in &pods {
        ip(&["netns", "del", &pod.namespace.name]);
        let text = fs::read_to_string(record(&node, pod)).unwrap();
        let mut value: Value = serde_json::from_str(&text).unwrap();
        value["boot"] = "00000000-0000-0000-0000-000000000000".into();
        value["since"] = 1.into();
        fs::write(record(&node, pod), value.to_string()).unwrap();
    }
    // The kernel takes devices away a while after their namespace.
    crate::node::eventually("the end of the devices", || node.devices().is_empty());
    node.start();
    node.assert_empty();
    // This machine has been up for longer than a minute, so nothing cools down any more: it all came back when it booted.
    let again = Sandbox::new("web-0");
    assert_eq!(addresses(&again.add(&node)).len(), 1);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn what_went_with_its_namespace_is_given_back() {
    let mut node = Node::new(&[V4, V6]);
    let (pod, other) = (Sandbox::new("web-0"), Sandbox::new("web-1"));
    pod.add(&node);
    let result = other.add(&node);
    node.stop();
    ip(&["netns", "del", &pod.namespace.name]);
    crate::node::eventually("the end of the device", || node.devices().len() == 1);
    node.start();
    assert_eq!(node.pods().kept().len(), 1);
    let report = node.explain();
    assert_eq!(report.leaks, []);
    assert_eq!(report.ranges.iter().map(|range| (range.in_use, range.cooling)).collect::<Vec<_>>(), [(1, 1), (1, 1)]);
    assert!(other.check(&node, &result).success);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn what_was_half_made_is_taken_away() {
    let mut node = Node::new(&[V4]);
    let pod = Sandbox::new("web-0");
    pod.add(&node);
    node.stop();
    let text = fs::read_to_string(record(&node, &pod)).unwrap();
    assert!(text.contains("\"phase\": \"made\""), "{text}");
    fs::write(record(&node, &pod), text.replace("\"made\"", "\"making\"")).unwrap();
    fs::write(node.settings.state.join("pods/.half-written"), "{").unwrap();
    node.start();
    node.assert_empty();
    assert!(!pod.namespace.has("eth0"));
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn lost_and_spoilt_records_are_written_anew_from_the_devices() {
    let mut node = Node::new(&[V4, V6]);
    // The second has just room for its name, the third has none.
    let (lost, nameless) = (Sandbox::new("web-0"), Sandbox::new(&"n".repeat(200)));
    let addresses_length = "10.244.7.2,fd00:244:0:7::2".len();
    let before_name = "weir-cni  eth0 02:00:00:00:00:00  default/".len() + lost.id.len() + addresses_length;
    let spoilt = Sandbox::new(&format!("web-{}", "m".repeat(254 - before_name - 4)));
    let results = [&lost, &spoilt, &nameless].map(|pod| pod.add(&node));
    let before = node.pods().kept();
    node.stop();
    fs::remove_file(record(&node, &lost)).unwrap();
    fs::write(record(&node, &spoilt), "{\"version\": 1,").unwrap();
    fs::remove_file(record(&node, &nameless)).unwrap();
    node.start();
    let kept = node.pods().kept();
    // What a device has no room for is lost: UID, host ports, and of one pod its name.
    let expected: Vec<_> = before
        .into_iter()
        .filter(|pod| pod.name.starts_with("web"))
        .map(|mut pod| {
            pod.uid = None;
            pod.netns = None;
            pod
        })
        .collect();
    assert_eq!(kept, expected);
    // Their addresses are not given to others.
    let fresh = Sandbox::new("web-9");
    let result = fresh.add(&node);
    for other in &results {
        assert!(addresses(other).iter().all(|address| !addresses(&result).contains(address)));
    }
    for pod in [&lost, &spoilt, &nameless, &fresh] {
        pod.del(&node);
    }
    let gone = node.control().take_asked().into_iter().filter(|asked| matches!(asked, Asked::Gone(..))).count();
    assert_eq!(gone, 4);
    node.assert_empty();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn other_plugins_devices_are_left_alone() {
    let mut node = Node::new(&[V4]);
    node.namespace.ip("link add cali0123456789a type veth peer name other");
    node.stop();
    node.start();
    assert_eq!(node.devices(), ["cali0123456789a"]);
    assert_eq!(node.explain().leaks, []);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn two_routers_do_not_share_a_state_folder() {
    let node = Node::new(&[V4]);
    let (asks, _control) = crate::node::Control::start(&node.namespace);
    let mut settings = node.settings.clone();
    settings.socket = node.folder.path().join("other.sock");
    // What the first one is about to rename.
    let beside = node.settings.state.join("pods/.half");
    fs::write(&beside, "").unwrap();
    let second =
        node.namespace.within(move || weir_node::pods::Pods::start(settings, asks).err().map(|e| e.to_string()));
    assert!(second.as_ref().is_some_and(|error| error.contains("another router")), "{second:?}");
    assert!(beside.exists(), "it is the first one's");
    let pod = Sandbox::new("web-0");
    pod.add(&node);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn two_routers_do_not_share_a_socket() {
    let mut node = Node::new(&[V4]);
    let (asks, _control) = crate::node::Control::start(&node.namespace);
    let mut settings = node.settings.clone();
    settings.state = node.folder.path().join("other");
    let second =
        node.namespace.within(move || weir_node::pods::Pods::start(settings, asks).err().map(|e| e.to_string()));
    assert!(second.as_ref().is_some_and(|error| error.contains("another router")), "{second:?}");
    Sandbox::new("web-0").add(&node);
    // One that ended without taking its socket away is no hindrance, and what another has put there stays.
    let socket = node.settings.socket.clone();
    node.stop();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    node.start();
    let pod = Sandbox::new("web-1");
    pod.add(&node);
    fs::remove_file(&socket).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    node.stop();
    assert!(socket.exists());
}
