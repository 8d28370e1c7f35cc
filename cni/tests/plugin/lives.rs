//! Sandboxes that come and go, in every order.

use serde_json::json;

use crate::node::{Asked, Cni, Node, Sandbox, V4, V6, addresses};

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_new_sandbox_of_a_pod_has_its_name_and_the_old_ones_del_does_not_touch_it() {
    for late in [true, false] {
        let node = Node::new(&[V4]);
        let (old, new) = (Sandbox::new("db-0"), Sandbox::new("db-0"));
        assert_eq!(old.device(), new.device());
        let first = old.add(&node);
        if !late {
            old.del(&node);
        }
        node.control().take_asked();
        let second = new.add(&node);
        assert_ne!(addresses(&first), addresses(&second), "the old one's address cools down");
        if late {
            let asked = node.control().take_asked();
            assert_eq!(asked[0], Asked::Gone("db-0".into(), old.id.clone()), "{asked:?}");
            assert!(!old.namespace.has("eth0"), "the device is the new one's");
            old.del(&node);
            old.del(&node);
            assert_eq!(node.control().take_asked(), [], "control hears nothing of the old one's DEL");
        }
        let check = new.check(&node, &second);
        assert!(check.success, "{}", check.output);
        assert_eq!(node.pods().kept().len(), 1);
        assert_eq!(node.pods().kept()[0].sandbox, new.id);
        assert_eq!(node.devices(), [new.device()]);
        new.del(&node);
        node.assert_empty();
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn an_add_again_gives_the_same_and_a_del_again_does_nothing() {
    let node = Node::new(&[V4, V6]);
    let pod = Sandbox::new("web-0");
    let first = pod.add(&node);
    let before = pod.namespace.ip_json("link show dev eth0");
    assert_eq!(pod.add(&node), first);
    assert_eq!(pod.namespace.ip_json("link show dev eth0")[0]["ifindex"], before[0]["ifindex"], "it was left alone");
    let asked = node.control().take_asked();
    assert!(matches!(asked.as_slice(), [Asked::Close(..), Asked::Put(..), Asked::Put(..)]), "{asked:?}");

    // Somebody broke it: it is made anew, as a new pod.
    pod.namespace.ip("link set eth0 down");
    let anew = pod.add(&node);
    assert_ne!(addresses(&anew), addresses(&first));
    assert!(pod.check(&node, &anew).success);

    pod.del(&node);
    node.control().take_asked();
    pod.del(&node);
    Sandbox::new("never-added").del(&node);
    assert_eq!(node.control().take_asked(), []);
    node.assert_empty();

    // After the sandbox's namespace is gone, by a runtime that says neither where it was nor whose.
    let other = Sandbox::new("web-1");
    other.add(&node);
    crate::node::ip(&["netns", "del", &other.namespace.name]);
    let bare = other.command("DEL").without("CNI_NETNS").without("CNI_ARGS").run(&node.config());
    assert!(bare.success, "{}", bare.output);
    node.assert_empty();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_has_one_interface() {
    let node = Node::new(&[V4]);
    let pod = Sandbox::new("web-0");
    let result = pod.add(&node);
    let second = pod.command("ADD").set("CNI_IFNAME", "net1").run(&node.config());
    assert_eq!(second.code(), 4);
    assert!(second.message().contains("CNI_IFNAME"));
    assert!(pod.check(&node, &result).success);
    // Of another name, where there is no other.
    let other = Sandbox::new("web-1");
    let named = other.command("ADD").set("CNI_IFNAME", "net1").run(&node.config());
    assert!(named.success, "{}", named.output);
    assert_eq!(named.output["interfaces"][1]["name"], "net1");
    assert!(other.namespace.has("net1"));
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn gc_takes_away_what_the_runtime_does_not_list() {
    let node = Node::new(&[V4]);
    let pods: Vec<_> = (0..3).map(|index| Sandbox::new(&format!("web-{index}"))).collect();
    for pod in &pods {
        pod.add(&node);
    }
    let gc = |valid: serde_json::Value| {
        let mut config = node.config();
        config["cni.dev/valid-attachments"] = valid;
        Cni::new("GC").run(&config)
    };
    // Without a list nothing is taken for stale.
    assert_eq!(Cni::new("GC").run(&node.config()).code(), 7);
    assert_eq!(node.pods().kept().len(), 3);
    let answer =
        gc(json!([{"containerID": pods[1].id, "ifname": "eth0"}, {"containerID": "someone-else", "ifname": "eth0"}]));
    assert!(answer.success, "{}", answer.output);
    assert_eq!(node.devices(), [pods[1].device()]);
    assert_eq!(node.pods().kept()[0].name, "web-1");
    assert!(gc(json!([])).success);
    node.assert_empty();
    // A network that is none of theirs has no pods here.
    pods[0].add(&node);
    let mut config = node.config();
    config["name"] = json!("another");
    config["cni.dev/valid-attachments"] = json!([]);
    assert!(Cni::new("GC").run(&config).success);
    assert_eq!(node.pods().kept().len(), 1);
    pods[0].del(&node);
    // libcni's empty list.
    pods[0].add(&node);
    assert!(gc(serde_json::Value::Null).success);
    node.assert_empty();
}
