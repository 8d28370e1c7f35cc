//! A node in a network namespace: the router's side of pods, a stand-in for control, sandboxes, and the plugin run as containerd runs it.

use std::{
    fs::{self, File},
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use weir_cluster::config;
use weir_node::{
    ipam::explain::Report,
    pods::{Ask, InForce, LocalPod, NodeRanges, Pods, Settings, device_name},
};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A network namespace with a name of its own, removed when it is dropped.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new(label: &str) -> Self {
        let name = format!("weirc{}-{}-{label}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        Self { name }
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// `ip -j` in it, as JSON.
    pub fn ip_json(&self, arguments: &str) -> Value {
        let mut command = vec!["-n", &self.name, "-j", "-d"];
        command.extend(arguments.split_whitespace());
        let text = ip(&command);
        // A list that is empty is printed as nothing.
        if text.trim().is_empty() { json!([]) } else { serde_json::from_str(&text).expect(arguments) }
    }

    pub fn ip(&self, arguments: &str) -> String {
        let mut command = vec!["-n", &self.name];
        command.extend(arguments.split_whitespace());
        ip(&command)
    }

    /// Whether it has a device of that name.
    pub fn has(&self, device: &str) -> bool {
        Command::new("ip")
            .args(["-n", &self.name, "link", "show", "dev", device])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    }

    /// Runs something on a thread in it.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).unwrap();
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).expect("needs root");
                action()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A test may have removed it.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status();
    }
}

pub fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().expect("iproute2");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {}: {said} (needs root)", arguments.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

/// What the stand-in for control does.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// The answer to Close, where it is no yes.
    pub close: Option<String>,
    /// The answer to Put, where it is no yes.
    pub put: Option<String>,
    /// Put is answered after this time.
    pub slow: Duration,
    /// It does not look at devices, which takes it some milliseconds.
    pub blind: bool,
    /// It has adopted no device.
    pub serves_nothing: bool,
    /// The router ends at the next question of this kind ("close", "put").
    pub ends_at: Option<&'static str>,
}

/// What control was asked, and what it saw then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// With whether the device was there and down.
    Close(String, bool),
    /// With whether the device was up.
    Put(LocalPod, bool),
    Gone(String, String),
}

pub struct Control {
    pub behaviour: Arc<Mutex<Behaviour>>,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    pub fn start(node: &Namespace) -> (mpsc::Sender<Ask>, Self) {
        let (asks, mut receiver) = mpsc::channel(16);
        let behaviour = Arc::new(Mutex::new(Behaviour::default()));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (file, told, seen) = (File::open(node.path()).unwrap(), behaviour.clone(), asked.clone());
        let thread = thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            // Of this thread's namespace: sysfs would show that of its mount.
            let is_up = |device: &str| {
                let output = Command::new("ip").args(["-j", "link", "show", "dev", device]).output().unwrap();
                let links: Value = serde_json::from_slice(&output.stdout).ok()?;
                Some(links[0]["flags"].as_array()?.iter().any(|flag| flag == "UP"))
            };
            while let Some(ask) = receiver.blocking_recv() {
                let behaviour: Behaviour = told.lock().unwrap().clone();
                match ask {
                    Ask::Close { device, answer } => {
                        let down = !behaviour.blind && is_up(&device) == Some(false);
                        seen.lock().unwrap().push(Asked::Close(device, down));
                        if behaviour.ends_at == Some("close") {
                            return;
                        }
                        let _ = answer.send(behaviour.close.map_or(Ok(()), Err));
                    }
                    Ask::Put { pod, answer, .. } => {
                        let up = !behaviour.blind && is_up(&pod.device) == Some(true);
                        seen.lock().unwrap().push(Asked::Put(pod, up));
                        if behaviour.ends_at == Some("put") {
                            return;
                        }
                        let how = behaviour.put.map_or(InForce::WithObject, InForce::Refused);
                        if behaviour.slow.is_zero() {
                            let _ = answer.send(how);
                        } else {
                            thread::spawn(move || {
                                thread::sleep(behaviour.slow);
                                let _ = answer.send(how);
                            });
                        }
                    }
                    Ask::Gone { name, sandbox, answer, .. } => {
                        seen.lock().unwrap().push(Asked::Gone(name, sandbox));
                        let _ = answer.send(());
                    }
                    Ask::Serves { answer, .. } => {
                        let _ = answer.send(!behaviour.serves_nothing);
                    }
                }
            }
        });
        (asks, Self { behaviour, asked, thread: Some(thread) })
    }

    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().unwrap());
    }

    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// A node with a router's pod side.
pub struct Node {
    pods: Option<Pods>,
    control: Option<Control>,
    pub ranges: NodeRanges,
    pub settings: Settings,
    pub namespace: Namespace,
    pub folder: tempfile::TempDir,
}

pub const V4: &str = "10.244.7.0/24";
pub const V6: &str = "fd00:244:0:7::/64";
pub const MTU: u32 = 1440;

impl Node {
    /// A node that serves, with these pod CIDRs.
    pub fn new(pod_cidrs: &[&str]) -> Self {
        let mut node = Self::stopped(pod_cidrs);
        node.start();
        node
    }

    /// A node whose router does not run yet.
    pub fn stopped(pod_cidrs: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("weir-cni-").tempdir().unwrap();
        let settings = Settings {
            node_name: "node-a".into(),
            socket: folder.path().join("run/cni.sock"),
            state: folder.path().join("state"),
            cool_down: config::Cni::COOL_DOWN,
            patience: Duration::from_millis(500),
        };
        let ranges = NodeRanges {
            pod_cidrs: pod_cidrs.iter().map(|net| net.parse().unwrap()).collect(),
            mtu: MTU,
            left_out: Vec::new(),
        };
        Self { pods: None, control: None, ranges, settings, namespace: Namespace::new("node"), folder }
    }

    pub fn start(&mut self) {
        let (asks, control) = Control::start(&self.namespace);
        let settings = self.settings.clone();
        let pods = self.namespace.within(move || Pods::start(settings, asks)).expect("the pod side starts");
        pods.configure(self.ranges.clone());
        self.pods = Some(pods);
        self.control = Some(control);
    }

    pub fn stop(&mut self) {
        self.pods = None;
        if let Some(mut control) = self.control.take() {
            control.thread.take().unwrap().join().unwrap();
        }
    }

    pub fn pods(&self) -> &Pods {
        self.pods.as_ref().expect("it runs")
    }

    pub fn control(&self) -> &Control {
        self.control.as_ref().expect("it runs")
    }

    pub fn config(&self) -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "weir", "type": "weir-cni",
            "socket": self.settings.socket, "capabilities": {"portMappings": true},
        })
    }

    pub fn state_files(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.settings.state.join(folder)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// What the router says of its addresses.
    pub fn explain(&self) -> Report {
        self.namespace.within(|| self.pods().explain().unwrap())
    }

    /// Host ends that there are.
    pub fn devices(&self) -> Vec<String> {
        let links = self.namespace.ip_json("link show");
        let names = links.as_array().unwrap().iter().map(|link| link["ifname"].as_str().unwrap().to_owned());
        let mut names: Vec<_> = names.filter(|name| name.starts_with("cali")).collect();
        names.sort();
        names
    }

    /// That nothing is left of any pod but addresses that cool down.
    pub fn assert_empty(&self) {
        assert_eq!(self.devices(), [""; 0]);
        assert_eq!(self.state_files("pods"), [""; 0]);
        assert_eq!(self.pods().kept(), []);
        let report = self.explain();
        assert_eq!(report.leaks, []);
        assert!(report.ranges.iter().all(|range| range.in_use == 0), "{report:?}");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.pods = None;
    }
}

/// A pod's sandbox, as a runtime has it.
pub struct Sandbox {
    pub namespace: Namespace,
    pub id: String,
    pub pod: String,
}

impl Sandbox {
    pub fn new(pod: &str) -> Self {
        let namespace = Namespace::new("pod");
        let id = format!("{}-{}", namespace.name.replace('-', ""), "0123456789abcdef".repeat(2));
        Self { namespace, id, pod: pod.into() }
    }

    pub fn device(&self) -> String {
        device_name("default", &self.pod)
    }

    pub fn command(&self, command: &str) -> Cni {
        let netns = self.namespace.path();
        Cni::new(command)
            .set("CNI_CONTAINERID", &self.id)
            .set("CNI_IFNAME", "eth0")
            .set("CNI_NETNS", netns.to_str().unwrap())
            .set(
                "CNI_ARGS",
                &format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID=u-{}",
                    self.pod, self.id, self.pod
                ),
            )
    }

    /// ADD that has to go well.
    pub fn add(&self, node: &Node) -> Value {
        let answer = self.command("ADD").run(&node.config());
        assert!(answer.success, "{}", answer.output);
        answer.output
    }

    pub fn del(&self, node: &Node) {
        let answer = self.command("DEL").run(&node.config());
        assert!(answer.success, "{}", answer.output);
        assert_eq!(answer.output, Value::Null, "a DEL says nothing");
    }

    /// The CHECK that a runtime makes with the result that it keeps.
    pub fn check(&self, node: &Node, result: &Value) -> Answer {
        let mut config = node.config();
        config["prevResult"] = result.clone();
        self.command("CHECK").run(&config)
    }
}

/// Addresses in a result.
pub fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().unwrap().iter();
    ips.map(|ip| ip["address"].as_str().unwrap().split_once('/').unwrap().0.parse().unwrap()).collect()
}

/// One run of the plugin.
pub struct Cni {
    command: Command,
}

#[derive(Debug)]
pub struct Answer {
    pub success: bool,
    /// Null where it said nothing.
    pub output: Value,
}

impl Answer {
    pub fn code(&self) -> u64 {
        assert!(!self.success, "it went well: {}", self.output);
        self.output["code"].as_u64().unwrap_or_else(|| panic!("{} is no error", self.output))
    }

    pub fn message(&self) -> String {
        format!("{} {}", self.output["msg"].as_str().unwrap_or(""), self.output["details"].as_str().unwrap_or(""))
    }
}

impl Cni {
    pub fn new(command: &str) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_weir-cni"));
        process.env_clear().env("CNI_COMMAND", command).env("CNI_PATH", "/opt/cni/bin");
        Self { command: process }
    }

    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    pub fn process(self) -> Command {
        self.command
    }

    pub fn run(self, config: &Value) -> Answer {
        self.run_bytes(config.to_string().as_bytes())
    }

    pub fn run_bytes(mut self, input: &[u8]) -> Answer {
        let mut child =
            self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It may end before it has read all, which is its right.
        let _ = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "nothing goes to standard error");
        let text = String::from_utf8(output.stdout).unwrap();
        let value = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect(&text) };
        assert!(matches!(output.status.code(), Some(0 | 1)), "{}: {text}", output.status);
        Answer { success: output.status.success(), output: value }
    }
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{what} did not happen within 20 s");
}
