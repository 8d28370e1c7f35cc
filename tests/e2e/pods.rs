//! Pods that weir itself makes, asked by the real weir-cni as a container runtime asks it.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weir_lab::wait_until;

use crate::{
    manifests::{Manifests, ONLY_FRIENDS},
    site::{DEADLINE, Site, connection, one_node, passes, weir_binary},
};

/// Shorter than the second after which a SYN that was lost comes again: who connects within it did so by its first packet.
const FIRST_PACKET: Duration = Duration::from_millis(900);

/// The plugin: beside the `weir` under test, built where nobody has yet.
fn weir_cni() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let beside = weir_binary().with_file_name("weir-cni");
        if !beside.exists() {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet", "--package", "weir-cni"]).current_dir(env!("CARGO_MANIFEST_DIR"));
            assert!(build.status().unwrap().success() && beside.exists(), "weir-cni is at {}", beside.display());
        }
        beside
    })
}

/// A runtime that makes pods on node-a.
struct Runtime {
    socket: PathBuf,
}

/// What an ADD came to.
struct Added {
    addresses: Vec<IpAddr>,
    took: Duration,
}

impl Added {
    /// Its address of the first family, and a port.
    fn at(&self, port: u16) -> String {
        format!("{}:{port}", self.addresses[0])
    }
}

impl Runtime {
    /// Makes node-a's router, which does not run yet, one that makes pods.
    fn of(site: &Site, patience: u32) -> Self {
        let socket = site.lab.folder().join("cni.sock");
        let section =
            format!("cni: {{socket: {}, state: cni-state, patience: {patience}}}\ndevices:", socket.display());
        site.reconfigure("node-a", "devices:", &section);
        Self { socket }
    }

    /// The command that does something with a sandbox, whose network namespace has the name `at` in the lab.
    fn command(&self, site: &Site, command: &str, [pod, uid, sandbox, at]: [&str; 4]) -> Command {
        let (namespace, name) = pod.split_once('/').unwrap();
        let mut plugin = Command::new(weir_cni());
        plugin.env_clear().envs([("CNI_COMMAND", command), ("CNI_CONTAINERID", sandbox), ("CNI_IFNAME", "eth0")]);
        plugin.env("CNI_NETNS", format!("/run/netns/{}", site.lab.namespace_name(at)));
        plugin.env("CNI_PATH", "/opt/cni/bin");
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={sandbox};K8S_POD_UID={uid}"
        );
        plugin.env("CNI_ARGS", arguments);
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        plugin
    }

    fn run(&self, site: &Site, command: &str, sandbox: [&str; 4]) -> Result<(Value, Duration), String> {
        let begin = Instant::now();
        let mut plugin = self.command(site, command, sandbox).spawn().unwrap();
        let config = json!({"cniVersion": "1.1.0", "name": "weir", "type": "weir-cni", "socket": self.socket});
        plugin.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = plugin.wait_with_output().unwrap();
        let took = begin.elapsed();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            Ok((serde_json::from_str(&said).unwrap_or(Value::Null), took))
        } else {
            Err(said + &String::from_utf8_lossy(&output.stderr))
        }
    }

    /// Makes a pod in a namespace of the lab that is there already.
    fn try_add(&self, site: &Site, sandbox: [&str; 4]) -> Result<Added, String> {
        let (result, took) = self.run(site, "ADD", sandbox)?;
        let ips = result["ips"].as_array().unwrap_or_else(|| panic!("{result}")).iter();
        let address = |ip: &Value| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap();
        Ok(Added { addresses: ips.map(address).collect(), took })
    }

    /// Makes a pod and its namespace.
    fn add(&self, site: &mut Site, sandbox: [&str; 4]) -> Added {
        site.lab.add_namespace(sandbox[3]).unwrap();
        self.try_add(site, sandbox).unwrap_or_else(|error| panic!("{sandbox:?}: {error}"))
    }

    fn delete(&self, site: &Site, sandbox: [&str; 4]) {
        self.run(site, "DEL", sandbox).unwrap_or_else(|error| panic!("{sandbox:?}: {error}"));
    }
}

/// Writes other manifests of node-a's cluster.
fn rewrite(site: &Site, manifests: &Manifests) {
    site.write("cluster.yaml", &site.with_node_names(&manifests.text(), &["node-a", "node-b"]));
}

/// Pods in force of node-a, and which of them are closed for want of their object.
fn pods(site: &Site) -> (u64, BTreeSet<String>) {
    let pods = &site.status("node-a")["pods"];
    let closed = pods["closedUntilObject"].as_array().unwrap().iter();
    (pods["known"].as_u64().unwrap(), closed.map(|name| name.as_str().unwrap().to_owned()).collect())
}

/// How many devices of pods have a link.
fn pinned_workloads(site: &Site) -> usize {
    let pins = fs::read_dir(weir_node::run::pin_folder(&site.lab.node_name("node-a"))).unwrap();
    let names = pins.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.strip_prefix("workload_").is_some_and(|index| index.parse::<u32>().is_ok())).count()
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_pod_that_weir_makes_has_its_policy_from_the_first_packet_to_the_last() {
    let mut cluster = Manifests::cluster("Always");
    for (name, app) in [("server", "server"), ("friend", "friend"), ("stranger", "other")] {
        cluster.new_pod("node-a", &format!("default/{name}"), app, &format!("uid-{name}"));
    }
    let mut site = Site::build(&one_node(), &cluster.text(), ONLY_FRIENDS);
    let runtime = Runtime::of(&site, 1);
    site.start_all();

    // What policy says holds for a process that begins as soon as the pod is made.
    let server = runtime.add(&mut site, ["default/server", "uid-server", "s1", "default/server"]);
    site.serve("default/server", &[80]);
    let friend = runtime.add(&mut site, ["default/friend", "uid-friend", "s2", "default/friend"]);
    site.connect("default/friend", &server.at(80), FIRST_PACKET).expect("a friend's first packet");
    assert_eq!((server.addresses.len(), friend.addresses.len()), (2, 2), "one of each family");
    let six = format!("[{}]:80", server.addresses[1]);
    site.connect("default/friend", &six, FIRST_PACKET).expect("its first packet over IPv6");
    let stranger = runtime.add(&mut site, ["default/stranger", "uid-stranger", "s3", "default/stranger"]);
    let before = site.drops("node-a", "PolicyDeniedIngress");
    assert!(site.connect("default/stranger", &server.at(80), FIRST_PACKET).is_err(), "a stranger's");
    assert!(site.drops("node-a", "PolicyDeniedIngress") > before);
    // To what no policy is about it is open, and so is the way to it, for the node too.
    site.pings("default/stranger", &format!("-c 1 {}", friend.addresses[0]));
    site.pings("node-a", &format!("-c 1 {}", stranger.addresses[0]));
    println!("ADD: {:?}, {:?}, {:?}", server.took, friend.took, stranger.took);
    assert_eq!(site.drops("node-a", "PolicyNotReady"), 0);

    // A pod whose object is late starts closed, and opens when it comes.
    let late = runtime.add(&mut site, ["default/late", "uid-late", "s4", "default/late"]);
    assert!(late.took >= Duration::from_secs(1), "it waits for its object: {:?}", late.took);
    assert_eq!(pods(&site), (4, BTreeSet::from(["default/late".to_owned()])));
    assert!(site.connect("default/late", &server.at(80), FIRST_PACKET).is_err(), "it is nobody's friend yet");
    assert!(!site.ping("default/friend", &format!("-c 1 -W 1 {}", late.addresses[0])).0);
    assert!(site.drops("node-a", "PolicyNotReady") >= 2);
    site.pings("node-a", &format!("-c 1 {}", late.addresses[0]));
    cluster.new_pod("node-a", "default/late", "friend", "uid-late");
    rewrite(&site, &cluster);
    wait_until("the late pod's policy", DEADLINE, || pods(&site).1.is_empty().then_some(())).unwrap();
    site.connect("default/late", &server.at(80), FIRST_PACKET).expect("a friend by now");

    // A StatefulSet's next pod has the name and the device of the one before, whose DEL comes after its ADD.
    cluster.replace_uid("default/server", "uid-server-2");
    rewrite(&site, &cluster);
    let next = runtime.add(&mut site, ["default/server", "uid-server-2", "s1b", "default/server.2"]);
    assert_ne!(next.addresses, server.addresses, "an address cools down");
    site.serve("default/server.2", &[80]);
    site.connect("default/friend", &next.at(80), FIRST_PACKET).expect("the next server");
    runtime.delete(&site, ["default/server", "uid-server", "s1", "default/server"]);
    site.connect("default/friend", &next.at(80), FIRST_PACKET)
        .expect("the next server after the DEL of the one before");
    assert!(site.connect("default/stranger", &next.at(80), FIRST_PACKET).is_err(), "policy is the next one's too");
    assert_eq!(pods(&site).0, 4);
    // When there is time devices get links, which nobody else can remove, in place of their filters.
    wait_until("the devices' links", DEADLINE, || (pinned_workloads(&site) == 4).then_some(())).unwrap();
    let device = weir_node::pods::device_name("default", "server");
    let filters = site.lab.run_in("node-a", &["tc", "filter", "show", "dev", &device, "ingress"]).unwrap();
    assert_eq!(filters, "");
    site.connect("default/friend", &next.at(80), FIRST_PACKET).expect("the next server by its link");
    let (ok, said) = site.ping("default/friend", &format!("-c 1 {}", server.addresses[0]));
    assert!(!ok && said.contains("Unreachable"), "the address of the one before is nobody's: {said}");

    // Death and a restart: pods keep what they have.
    let (near, far) = connection(&site, "default/friend", "default/server.2", &next.at(5000));
    assert!(passes(&near, &far, DEADLINE));
    let mut router = site.take_router("node-a");
    router.signal(Signal::SIGKILL);
    assert!(!router.wait(DEADLINE).unwrap().success());
    let down = runtime.try_add(&site, ["default/none", "uid-none", "s9", "default/late"]);
    assert!(down.err().is_some_and(|error| error.contains("\"code\": 11") || error.contains("\"code\":11")));
    site.start("node-a");
    assert_eq!(pods(&site), (4, BTreeSet::new()));
    assert!(passes(&near, &far, DEADLINE) && passes(&far, &near, DEADLINE), "a connection between pods goes on");
    site.connect("default/late", &next.at(80), FIRST_PACKET).expect("a new one");
    assert!(site.connect("default/stranger", &next.at(80), FIRST_PACKET).is_err());

    // Taken away, it is not reached any more.
    runtime.delete(&site, ["default/friend", "uid-friend", "s2", "default/friend"]);
    runtime.delete(&site, ["default/friend", "uid-friend", "s2", "default/friend"]);
    let (ok, said) = site.ping("default/late", &format!("-c 1 {}", friend.addresses[0]));
    assert!(!ok && said.contains("Unreachable"), "{said}");
    assert!(!passes(&far, &near, Duration::from_secs(1)), "nor by a connection that it had");
    wait_until("the device's end", DEADLINE, || (pinned_workloads(&site) == 3).then_some(())).unwrap();
    assert_eq!(pods(&site).0, 3);
    let shown = site.lab.weir("node-a", &["ipam", "show", "-c", &site.config("node-a").display().to_string()]).unwrap();
    assert!(shown.contains("default/late") && shown.contains("cooling"), "{shown}");
    drop((near, far));
    site.finish();
}

#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_hundred_pods_are_made_at_once_and_leave_nothing_behind() {
    const PODS: usize = 100;
    let names: Vec<String> = (0..PODS).map(|number| format!("default/p{number}")).collect();
    let mut cluster = Manifests::cluster("Always");
    names.iter().for_each(|name| cluster.new_pod("node-a", name, "many", &format!("uid-{name}")));
    let mut site = Site::build(&one_node(), &cluster.text(), "");
    let runtime = Runtime::of(&site, 5);
    site.start_all();
    for name in &names {
        site.lab.add_namespace(name).unwrap();
    }
    let each = |work: &(dyn Fn(&str) -> Duration + Sync)| {
        let begin = Instant::now();
        let mut times: Vec<Duration> = thread::scope(|scope| {
            let threads: Vec<_> = names.iter().map(|name| scope.spawn(move || work(name))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        times.sort_unstable();
        (begin.elapsed(), times)
    };
    let uid = |name: &str| format!("uid-{name}");
    let sandbox = |name: &str| name.replace('/', "-");
    let alone = runtime.try_add(&site, [&names[0], &uid(&names[0]), &sandbox(&names[0]), &names[0]]).unwrap().took;
    runtime.delete(&site, [&names[0], &uid(&names[0]), &sandbox(&names[0]), &names[0]]);
    let (total, times) = each(&|name| {
        runtime.try_add(&site, [name, &uid(name), &sandbox(name), name]).unwrap_or_else(|e| panic!("{name}: {e}")).took
    });
    println!(
        "ADD: alone {alone:?}; {PODS} at once in {total:?}, of which the median took {:?} and the last {:?}",
        times[PODS / 2],
        times[PODS - 1]
    );
    println!("steps of the last preparation: {}", site.status("node-a")["configuration"]["lastPodsMs"]);
    assert_eq!(pods(&site), (PODS as u64, BTreeSet::new()));
    assert!(total < DEADLINE, "{total:?}");
    let addresses: BTreeSet<String> = names
        .iter()
        .map(|name| {
            let said = site.lab.run_in(name, &["ip", "-4", "-o", "address", "show", "dev", "eth0"]).unwrap();
            said.split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned()
        })
        .collect();
    assert_eq!(addresses.len(), PODS);
    for address in addresses.iter().step_by(10) {
        site.pings(&names[1], &format!("-c 1 {address}"));
        site.pings("node-a", &format!("-c 1 {address}"));
    }
    let (total, _) = each(&|name| {
        let begin = Instant::now();
        runtime.delete(&site, [name, &uid(name), &sandbox(name), name]);
        begin.elapsed()
    });
    println!("DEL: {PODS} at once in {total:?}");
    assert_eq!(pods(&site).0, 0);
    wait_until("the devices' end", DEADLINE, || (pinned_workloads(&site) == 0).then_some(())).unwrap();
    site.finish();
}

/// A node that has just joined has neither a Node object with ranges nor any pod.
#[test]
#[cfg_attr(skip_e2e, ignore = "WEIR_SKIP_E2E=1")]
fn a_new_nodes_router_starts_and_makes_pods_once_it_has_a_range() {
    let mut site = Site::build(&one_node(), "", "");
    let runtime = Runtime::of(&site, 0);
    site.start_all();
    site.lab.add_namespace("default/first").unwrap();
    let first = ["default/first", "uid-first", "s1", "default/first"];
    let error = runtime.try_add(&site, first).err().expect("there is no range yet");
    assert!(error.contains("no pod CIDR"), "{error}");

    let mut cluster = Manifests::cluster("Always");
    cluster.new_pod("node-a", "default/first", "first", "uid-first");
    rewrite(&site, &cluster);
    let added = wait_until("the range", DEADLINE, || runtime.try_add(&site, first).ok()).unwrap();
    assert!(added.addresses[0].to_string().starts_with("10.1.1."), "{:?}", added.addresses);
    site.pings("node-a", &format!("-c 1 {}", added.addresses[0]));
    // What fits through a tunnel.
    let link = site.lab.run_in("default/first", &["ip", "link", "show", "dev", "eth0"]).unwrap();
    assert!(link.contains("mtu 1480"), "{link}");
    site.finish();
}
