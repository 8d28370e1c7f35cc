//! ADDs that fail half way give everything back; a router that does not run is no hindrance for DELs.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use serde_json::json;

use crate::node::{Asked, Cni, Node, Sandbox, V4, addresses, eventually};

/// Makes an ADD fail, says how it failed, and lets the next one have the very address.
fn fails(node: &Node, code: u64, words: &str) {
    let pod = Sandbox::new("web-0");
    let answer = pod.command("ADD").run(&node.config());
    assert_eq!(answer.code(), code, "{}", answer.output);
    assert!(answer.message().contains(words), "{words}: {}", answer.message());
    assert!(!pod.namespace.has("eth0"));
    // What runtimes do after a failed ADD.
    pod.del(node);
}

fn works(node: &Node, expected: &str) {
    let pod = Sandbox::new("web-0");
    assert_eq!(addresses(&pod.add(node)), [expected.parse::<std::net::IpAddr>().unwrap()], "nothing leaked");
    pod.del(node);
    node.assert_empty();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn what_control_refuses_is_taken_back() {
    let node = Node::new(&[V4]);
    node.control().set(|control| control.close = Some("MTU 9000 is more than the trunk's".into()));
    fails(&node, 11, "MTU 9000");
    node.assert_empty();
    node.control().set(|control| {
        control.close = None;
        control.put = Some("too many next hops".into());
    });
    node.control().take_asked();
    fails(&node, 11, "too many next hops");
    let asked = node.control().take_asked();
    assert!(matches!(asked.as_slice(), [Asked::Close(..), Asked::Put(..), Asked::Gone(..)]), "{asked:?}");
    node.assert_empty();
    node.control().set(|control| control.put = None);
    works(&node, "10.244.7.2");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn an_interface_that_is_there_already_is_not_weirs() {
    let node = Node::new(&[V4]);
    let pod = Sandbox::new("web-0");
    pod.namespace.ip("link add eth0 type veth peer name other");
    let answer = pod.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(answer.message().contains("eth0"), "{}", answer.message());
    pod.del(&node);
    assert!(pod.namespace.has("eth0"), "it stays");
    works(&node, "10.244.7.1");
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_host_end_that_another_plugin_left_goes() {
    let node = Node::new(&[V4]);
    let pod = Sandbox::new("web-0");
    node.namespace.ip(&format!("link add {} type veth peer name other", pod.device()));
    let result = pod.add(&node);
    assert!(pod.check(&node, &result).success);
    assert!(!node.namespace.has("other"));
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_whose_name_has_the_hash_of_anothers_does_not_take_its_device() {
    let mut node = Node::new(&[V4]);
    let pod = Sandbox::new("web-0");
    let result = pod.add(&node);
    node.stop();
    // Names that collide take long to find: the record says another name instead.
    let record = node.settings.state.join("pods").join(format!("{}@eth0.json", pod.id));
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"web-0\"", "\"victim\"")).unwrap();
    node.start();
    let aimed = Sandbox::new("web-0");
    let answer = aimed.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(answer.message().contains("would be that of pod default/victim"), "{}", answer.message());
    aimed.del(&node);
    let check = pod.check(&node, &result);
    assert!(check.success, "{}", check.output);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn namespaces_that_are_none_or_the_nodes_own_are_refused() {
    let node = Node::new(&[V4]);
    let pod = Sandbox::new("web-0");
    let own = node.namespace.path();
    let cases = [
        ("/run/netns/there-is-none", 4, "CNI_NETNS"),
        ("/etc/passwd", 4, "namespace"),
        ("/proc/self/ns/uts", 4, "namespace"),
        (own.to_str().unwrap(), 4, "node's own"),
    ];
    for (path, code, words) in cases {
        let answer = pod.command("ADD").set("CNI_NETNS", path).run(&node.config());
        assert_eq!(answer.code(), code, "{path}: {}", answer.output);
        assert!(answer.message().contains(words), "{path}: {}", answer.message());
        node.assert_empty();
    }
    // A file that would block whoever opens it.
    let fifo = node.folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(pod.command("ADD").set("CNI_NETNS", fifo.to_str().unwrap()).run(&node.config()).code(), 4);
    works(&node, "10.244.7.1");
}

/// A small file system, taken away again.
struct Mount<'p>(&'p Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_full_disk_fails_adds_and_no_dels() {
    let mut node = Node::stopped(&[V4]);
    let state = node.settings.state.clone();
    fs::create_dir(&state).unwrap();
    nix::mount::mount(Some("none"), &state, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=64k")).unwrap();
    let _mount = Mount(&state);
    node.start();
    let pod = Sandbox::new("web-0");
    let result = pod.add(&node);
    let ballast = state.join("ballast");
    let filled =
        Command::new("dd").args(["if=/dev/zero", &format!("of={}", ballast.display()), "bs=4k"]).output().unwrap();
    assert!(!filled.status.success(), "the disk is full");

    let other = Sandbox::new("web-1");
    let answer = other.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(answer.message().contains("cannot be written"), "{}", answer.message());
    assert!(!other.namespace.has("eth0"));
    assert_eq!(node.devices(), [pod.device()]);
    other.del(&node);
    assert!(pod.check(&node, &result).success);
    // A DEL makes room; that the address cools down is remembered, if not kept.
    pod.del(&node);
    node.assert_empty();
    fs::remove_file(&ballast).unwrap();
    let third = Sandbox::new("web-2");
    assert_eq!(addresses(&third.add(&node)), ["10.244.7.2".parse::<std::net::IpAddr>().unwrap()]);
    third.del(&node);
    node.stop();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_disk_that_cannot_be_written_keeps_no_router_from_starting() {
    let mut node = Node::stopped(&[V4]);
    let state = node.settings.state.clone();
    fs::create_dir(&state).unwrap();
    nix::mount::mount(Some("none"), &state, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
    let _mount = Mount(&state);
    node.start();
    let (pod, gone, lost) = (Sandbox::new("web-0"), Sandbox::new("web-1"), Sandbox::new("web-2"));
    let result = pod.add(&node);
    gone.add(&node);
    lost.add(&node);
    node.stop();
    // What a start mends by writing: a record without a device, a device without a record, a file that says nothing.
    node.namespace.ip(&format!("link del {}", gone.device()));
    fs::remove_file(state.join("pods").join(format!("{}@eth0.json", lost.id))).unwrap();
    fs::write(state.join("pods/nonsense.json"), "nonsense").unwrap();
    let read_only = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
    nix::mount::mount(None::<&str>, &state, None::<&str>, read_only, None::<&str>).unwrap();
    node.start();
    let mut kept: Vec<_> = node.pods().kept().into_iter().map(|pod| pod.name).collect();
    kept.sort();
    assert_eq!(kept, ["web-0", "web-2"]);
    assert!(pod.check(&node, &result).success);
    let late = Sandbox::new("web-3");
    let answer = late.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(answer.message().contains("cannot be written"), "{}", answer.message());
    node.stop();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn without_a_router_adds_wait_and_dels_are_kept() {
    let mut node = Node::new(&[V4]);
    let (pod, other) = (Sandbox::new("web-0"), Sandbox::new("web-1"));
    let result = pod.add(&node);
    other.add(&node);
    node.stop();

    let late = Sandbox::new("web-2");
    let answer = late.command("ADD").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(answer.message().contains("weir run"), "{}", answer.message());
    assert_eq!(pod.check(&node, &result).code(), 11);
    assert_eq!(Cni::new("STATUS").run(&node.config()).code(), 50);
    let mut config = node.config();
    config["cni.dev/valid-attachments"] = json!([]);
    assert_eq!(Cni::new("GC").run(&config).code(), 11);
    let version = Cni::new("VERSION").run(&node.config());
    assert!(version.success, "{}", version.output);

    pod.del(&node);
    pod.del(&node);
    late.del(&node);
    let queue = node.folder.path().join("run/cni.sock.queue");
    let mut queued: Vec<_> =
        fs::read_dir(&queue).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    queued.sort();
    let mut expected = [format!("{}@eth0", pod.id), format!("{}@eth0", late.id)];
    expected.sort();
    assert_eq!(queued, expected, "each once");
    assert_eq!(node.devices().len(), 2, "nobody took it away yet");

    node.start();
    assert_eq!(fs::read_dir(&queue).unwrap().count(), 0);
    assert_eq!(node.devices(), [other.device()]);
    assert_eq!(node.pods().kept().len(), 1);
    assert!(Cni::new("STATUS").run(&node.config()).success);
    other.del(&node);
    node.assert_empty();

    // A DEL that came when the router had looked into the queue already: the next GC does it, or the next look.
    pod.add(&node);
    fs::write(queue.join(format!("{}@eth0", pod.id)), "").unwrap();
    config["cni.dev/valid-attachments"] = json!([{"containerID": pod.id, "ifname": "eth0"}]);
    assert!(Cni::new("GC").run(&config).success);
    node.assert_empty();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_del_does_not_mind_what_became_of_the_configuration() {
    let node = Node::new(&[V4]);
    for (field, value) in [
        ("cniVersion", json!("9.9.9")),
        ("ipMasq", json!(true)),
        ("name", json!("")),
        ("runtimeConfig", json!({"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "localhost"}]})),
    ] {
        let pod = Sandbox::new("web-0");
        pod.add(&node);
        let mut config = node.config();
        config[field] = value;
        let deleted = pod.command("DEL").run(&config);
        assert!(deleted.success, "{field}: {}", deleted.output);
        node.assert_empty();
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_router_looks_after_its_pods_by_itself() {
    let node = Node::new(&[V4]);
    let (queued, dead) = (Sandbox::new("web-0"), Sandbox::new("web-1"));
    for pod in [&queued, &dead] {
        pod.add(&node);
    }
    let queue = node.folder.path().join("run/cni.sock.queue");
    fs::create_dir(&queue).unwrap();
    fs::write(queue.join(format!("{}@eth0", queued.id)), "").unwrap();
    crate::node::ip(&["netns", "del", &dead.namespace.name]);
    eventually("the end of both", || node.pods().kept().is_empty());
    let gone = node.control().take_asked().into_iter().filter(|asked| matches!(asked, Asked::Gone(..))).count();
    assert_eq!(gone, 2);
    node.assert_empty();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn the_queue_is_bounded() {
    let node = Node::stopped(&[V4]);
    let queue = node.folder.path().join("run/cni.sock.queue");
    fs::create_dir_all(&queue).unwrap();
    for index in 0..weir_cni::queue::MAX_ENTRIES {
        fs::write(queue.join(format!("sandbox-{index}@eth0")), "").unwrap();
    }
    let pod = Sandbox::new("web-0");
    let answer = pod.command("DEL").run(&node.config());
    assert_eq!(answer.code(), 11);
    assert!(answer.message().contains("4096 entries"), "{}", answer.message());
    let known = pod.command("DEL").set("CNI_CONTAINERID", "sandbox-7").run(&node.config());
    assert!(known.success, "it is in the queue: {}", known.output);
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_router_that_ends_in_the_middle_takes_everything_back() {
    for at in ["close", "put"] {
        let mut node = Node::new(&[V4]);
        node.control().set(|control| control.ends_at = Some(at));
        let pod = Sandbox::new("web-0");
        let answer = pod.command("ADD").run(&node.config());
        assert_eq!(answer.code(), 11, "{at}");
        assert!(answer.message().contains("ending"), "{}", answer.message());
        assert_eq!(node.devices(), [""; 0]);
        let status = Cni::new("STATUS").run(&node.config());
        assert_eq!(status.code(), 50, "control is gone");
        node.stop();
        node.start();
        // What control may have put in force cools down.
        works(&node, if at == "close" { "10.244.7.1" } else { "10.244.7.2" });
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_del_waits_for_the_add_that_is_under_way() {
    let node = Node::new(&[V4]);
    node.control().set(|control| control.slow = Duration::from_millis(700));
    let pod = Sandbox::new("web-0");
    thread::scope(|scope| {
        let adding = scope.spawn(|| pod.command("ADD").run(&node.config()));
        eventually("Put", || node.control().asked.lock().unwrap().len() == 2);
        // A runtime that gave up: it says whose sandbox it is, or does not.
        let deleted = pod.command("DEL").without("CNI_ARGS").run(&node.config());
        assert!(deleted.success, "{}", deleted.output);
        assert!(adding.join().unwrap().success);
    });
    node.assert_empty();
}
