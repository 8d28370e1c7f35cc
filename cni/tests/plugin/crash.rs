//! kill -9 of the router at any moment.
//!
//! The router's side runs in a process of its own, this test's program started again; it is killed while pods are added and deleted.

use std::{
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use weir_cluster::config::Cni;
use weir_node::pods::{NodeRanges, Settings};

use crate::node::{Asked, Node, Sandbox, V4, V6, addresses, eventually};

/// Where the killed process finds what it has to serve.
const FOLDER: &str = "WEIR_CNI_TEST_FOLDER";

/// What the killed process does; as one of the tests it does nothing.
#[test]
fn router_process() {
    let Some(folder) = std::env::var_os(FOLDER).map(std::path::PathBuf::from) else { return };
    let settings = Settings {
        node_name: "node-a".into(),
        socket: folder.join("run/cni.sock"),
        state: folder.join("state"),
        cool_down: Cni::COOL_DOWN,
        patience: Duration::from_millis(500),
    };
    // Control answers at once; it sees devices of this process's namespace, which is the node's.
    let (asks, mut receiver) = tokio::sync::mpsc::channel(16);
    let pods = weir_node::pods::Pods::start(settings, asks).unwrap();
    pods.configure(NodeRanges {
        pod_cidrs: [V4, V6].map(|net| net.parse().unwrap()).to_vec(),
        mtu: 1440,
        left_out: vec![],
    });
    use weir_node::pods::{Ask, InForce};
    while let Some(ask) = receiver.blocking_recv() {
        match ask {
            Ask::Close { answer, .. } => drop(answer.send(Ok(()))),
            Ask::Put { answer, .. } => drop(answer.send(InForce::WithObject)),
            Ask::Gone { answer, .. } => drop(answer.send(())),
            Ask::Serves { answer, .. } => {
                let _ = answer.send(true);
            }
        }
    }
}

struct Router(Child);

impl Router {
    fn start(node: &Node) -> Self {
        let child = Command::new("nsenter")
            .arg(format!("--net={}", node.namespace.path().display()))
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "crash::router_process"])
            .env(FOLDER, node.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("util-linux");
        Self(child)
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_router_killed_at_any_moment_leaves_nothing_that_the_next_does_not_mend() {
    let mut node = Node::stopped(&[V4, V6]);
    let ready = |node: &Node| crate::node::Cni::new("STATUS").run(&node.config()).success;
    let mut living: Vec<(Sandbox, serde_json::Value)> = Vec::new();
    for round in 0..12u64 {
        let mut router = Router::start(&node);
        eventually("the start of the router", || ready(&node));
        let (old, new) = (living.pop(), Sandbox::new(&format!("web-{round}")));
        let (added, deleted) = thread::scope(|scope| {
            let adding = scope.spawn(|| new.command("ADD").run(&node.config()));
            let deleting = scope.spawn(|| old.as_ref().map(|(old, _)| old.command("DEL").run(&node.config()).success));
            // Somewhere in the some ten milliseconds that both take.
            thread::sleep(Duration::from_millis(2 * round));
            router.kill();
            (adding.join().unwrap(), deleting.join().unwrap())
        });
        assert_ne!(deleted, Some(false), "a DEL is done or kept");
        if added.success {
            living.push((new, added.output));
        } else {
            assert_eq!(added.code(), 11, "{}", added.output);
            // What a runtime does then, also while no router runs.
            new.del(&node);
        }
    }
    node.start();
    // The start asks for what lies in the queue.
    node.control().take_asked();
    let report = node.explain();
    assert_eq!(report.leaks, []);
    let (kept, devices) = (node.pods().kept(), node.devices());
    assert_eq!(kept.len(), living.len(), "{kept:?}");
    assert_eq!(devices.len(), living.len(), "{devices:?}");
    assert_eq!(report.ranges[0].in_use, living.len());
    for (pod, result) in &living {
        let check = pod.check(&node, result);
        assert!(check.success, "{}", check.output);
        assert_eq!(addresses(result), kept.iter().find(|kept| kept.sandbox == pod.id).unwrap().addresses);
        pod.del(&node);
    }
    let gone = node.control().take_asked().into_iter().filter(|asked| matches!(asked, Asked::Gone(..))).count();
    assert_eq!(gone, living.len());
    node.assert_empty();
}
