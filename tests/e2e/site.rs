//! A cluster under test: a lab, its files, its routers, and what must hold in the end.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::Signal,
};
use serde_json::Value;
use weir::demo::law;
use weir_cluster::translate;
use weir_dataplane::model::Cluster;
use weir_lab::{Lab, LabError, Process, wait_until};

/// Generous: a loaded machine is no failure.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// The outside client's address.
pub const CLIENT: &str = "192.168.10.100";
/// How long a test looks for an answer that must not come.
pub const NO_ANSWER_SECONDS: f32 = 1.0;

/// Drops that no test may cause without saying so: what weir itself ran out of, or was not ready for.
const NEVER: [&str; 3] = ["PolicyNotReady", "TxRingFull", "NoFrame"];

/// A node to build.
pub struct NodePlan {
    pub name: String,
    /// With prefix lengths.
    pub addresses: Vec<String>,
    pub cores: Vec<usize>,
}

impl NodePlan {
    pub fn new(name: &str, addresses: &[&str], cores: &[usize]) -> Self {
        let addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
        Self { name: name.into(), addresses, cores: cores.into() }
    }
}

/// The nodes of [`crate::manifests::Manifests::cluster`], one worker each.
pub fn two_nodes() -> Vec<NodePlan> {
    vec![
        NodePlan::new("node-a", &["192.168.10.1/24", "fd00:10::1/64"], &[0]),
        NodePlan::new("node-b", &["192.168.10.2/24", "fd00:10::2/64"], &[1]),
    ]
}

/// node-a alone, with two workers.
pub fn one_node() -> Vec<NodePlan> {
    vec![NodePlan::new("node-a", &["192.168.10.1/24", "fd00:10::1/64"], &[0, 1])]
}

/// A cluster.
pub struct Site {
    routers: BTreeMap<String, Process>,
    configs: BTreeMap<String, PathBuf>,
    pub cluster: Arc<Cluster>,
    pub lab: Lab,
}

/// The `weir` under test.
pub fn weir_binary() -> PathBuf {
    std::env::var_os("WEIR_E2E_BIN").map_or_else(|| env!("CARGO_BIN_EXE_weir").into(), PathBuf::from)
}

/// Whether routers hand flows over: all tests are run with both.
pub fn offload_mode() -> String {
    std::env::var("WEIR_E2E_OFFLOAD").unwrap_or_else(|_| "auto".into())
}

impl Site {
    /// Builds nodes, an outside client, and all pods that the manifests have on these nodes; no server and no router runs yet.
    pub fn build(nodes: &[NodePlan], cluster: &str, policies: &str) -> Self {
        Self::build_without(nodes, cluster, policies, &[])
    }

    /// The same, without some pods for now.
    pub fn build_without(nodes: &[NodePlan], cluster: &str, policies: &str, absent: &[&str]) -> Self {
        let mut lab = Lab::new(&weir_binary()).unwrap();
        lab.add_switch().unwrap();
        for node in nodes {
            lab.add_node(&node.name, &node.addresses, node.cores.len() as u32).unwrap();
        }
        let prefix = nodes[0].addresses[0].rsplit_once('.').unwrap().0.to_owned();
        lab.add_host("client", &[format!("{prefix}.100/24"), "fd00:10::100/64".into()], 1).unwrap();
        let mut site = Self { routers: BTreeMap::new(), configs: BTreeMap::new(), cluster: Arc::default(), lab };
        let names: Vec<&str> = nodes.iter().map(|n| n.name.as_str()).collect();
        site.write("cluster.yaml", &site.with_node_names(cluster, &names));
        site.write("policies.yaml", policies);
        for node in nodes {
            let config = format!(
                "apiVersion: weir.dev/v1alpha1\nkind: RouterConfig\nnodeName: {}\nmanifests: [cluster.yaml, policies.yaml]\n\
                 serviceCIDRs: [10.96.0.0/16, \"fd00:96::/112\"]\nworkers: {{cores: {:?}, mode: adaptive}}\n\
                 offload: {}\nstate: state-{}\ndevices:\n- {{name: eth0, role: uplink}}\n",
                site.lab.node_name(&node.name),
                node.cores,
                offload_mode(),
                node.name
            );
            let path = site.write(&format!("{}.yaml", node.name), &config);
            site.configs.insert(node.name.clone(), path);
        }
        site.cluster = match translate::load_strictly(site.config(&nodes[0].name)) {
            Ok(loaded) => loaded.cluster,
            Err(problems) => panic!("the test's manifests: {}", problems.render(false)),
        };
        for node in nodes {
            let full = site.lab.node_name(&node.name);
            for pod in &site.cluster.workloads {
                if pod.node.as_deref() == Some(&full) && !absent.contains(&pod.name.as_str()) {
                    site.lab.add_pod(&node.name, &pod.name, &pod.device, &pod.addresses).unwrap();
                }
            }
        }
        site
    }

    /// What `weir trace` says on a node of flows, a line each.
    pub fn trace(&self, node: &str, flows: &str) -> Vec<Value> {
        let (weir, config) = (weir_binary().display().to_string(), self.config(node).display().to_string());
        let mut trace = self
            .lab
            .command(node, &[&weir, "trace", "-c", &config, "--flows", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        writeln!(trace.stdin.take().unwrap(), "{flows}").unwrap();
        let output = trace.wait_with_output().unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Makes nodes' names those of this lab, wherever a line ends with one as its value.
    pub fn with_node_names(&self, text: &str, nodes: &[&str]) -> String {
        let own = |line: &str| {
            for node in nodes {
                for (old, quote) in [(format!(": {node}"), ""), (format!(": \"{node}\""), "\"")] {
                    let (bare, comma) = line.strip_suffix(',').map_or((line, ""), |bare| (bare, ","));
                    if let Some(before) = bare.strip_suffix(&old) {
                        return format!("{before}: {quote}{}{quote}{comma}\n", self.lab.node_name(node));
                    }
                }
            }
            format!("{line}\n")
        };
        text.lines().map(own).collect()
    }

    /// Writes a file of the lab's folder, as a whole at once.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.lab.folder().join(name);
        let new = self.lab.folder().join(format!(".{name}.new"));
        fs::write(&new, text).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    }

    /// Changes weir.yaml of a node, whose router does not run yet.
    pub fn reconfigure(&self, node: &str, old: &str, new: &str) {
        let text = fs::read_to_string(self.config(node)).unwrap();
        assert!(text.contains(old), "{old:?} is in {text}");
        fs::write(self.config(node), text.replace(old, new)).unwrap();
    }

    /// weir.yaml of a node.
    pub fn config(&self, node: &str) -> &Path {
        &self.configs[node]
    }

    /// Starts nginx in a pod (or node, or host) and waits until it listens.
    pub fn serve(&mut self, pod: &str, ports: &[u16]) {
        self.lab.serve_http(pod, ports).unwrap();
        for port in ports {
            self.wait_for_listener(pod, *port);
        }
    }

    /// Waits until somebody listens on a TCP port of a namespace.
    pub fn wait_for_listener(&self, at: &str, port: u16) {
        wait_until(&format!("the server on port {port} of {at}"), DEADLINE, || {
            self.connect(at, &format!("127.0.0.1:{port}"), DEADLINE).ok()
        })
        .unwrap();
    }

    /// Starts a node's router.
    pub fn start(&mut self, node: &str) {
        let router = self.lab.start_router(node, &self.configs[node]).unwrap();
        self.routers.insert(node.into(), router);
    }

    /// Starts all routers.
    pub fn start_all(&mut self) {
        for node in self.configs.keys().cloned().collect::<Vec<_>>() {
            self.start(&node);
        }
    }

    /// A node's running router.
    pub fn router(&mut self, node: &str) -> &mut Process {
        self.routers.get_mut(node).expect("it was started")
    }

    /// Asks a node's router to reload, whatever files say.
    pub fn hang_up(&self, node: &str) {
        self.routers[node].signal(Signal::SIGHUP);
    }

    /// What a node's router has written to its log so far.
    pub fn router_log(&self, node: &str) -> String {
        self.routers[node].log()
    }

    /// Takes a node's router out, which will have ended by the test's own doing.
    pub fn take_router(&mut self, node: &str) -> Process {
        self.routers.remove(node).expect("it was started")
    }

    /// What a node's router answers to `weir status`.
    pub fn status(&self, node: &str) -> Value {
        self.ask(node, "status").unwrap()
    }

    /// What a node's router answers to a command that prints JSON.
    pub fn ask(&self, node: &str, command: &str) -> Result<Value, LabError> {
        let config = self.configs[node].display().to_string();
        let text = self.lab.weir(node, &[command, "-c", &config, "--output", "json"])?;
        Ok(serde_json::from_str(&text).unwrap())
    }

    /// How often a node's router dropped a packet for a reason.
    pub fn drops(&self, node: &str, reason: &str) -> u64 {
        self.status(node)["counters"]["drops"][reason].as_u64().unwrap_or(0)
    }

    /// Changes the policies, and waits until every router has taken them over.
    pub fn set_policies(&self, text: &str) {
        self.set_file("policies.yaml", text);
    }

    /// Changes the cluster, likewise.
    pub fn set_cluster(&self, text: &str) {
        let nodes: Vec<&str> = self.configs.keys().map(String::as_str).collect();
        self.set_file("cluster.yaml", &self.with_node_names(text, &nodes));
    }

    fn set_file(&self, name: &str, text: &str) {
        let before: Vec<usize> = self.routers.values().map(|r| r.log().matches("reloaded").count()).collect();
        self.write(name, text);
        if text.trim().is_empty() {
            // That nothing is left in a file is believed at once if an operator says so.
            self.routers.values().for_each(|router| router.signal(Signal::SIGHUP));
        }
        for ((node, router), before) in self.routers.iter().zip(before) {
            wait_until("the reload", DEADLINE, || (router.log().matches("reloaded").count() > before).then_some(()))
                .unwrap();
            let held = |status: &Value| status["faultyObjects"].to_string().contains("holds no document");
            wait_until("that it is believed", DEADLINE, || (!held(&self.status(node))).then_some(())).unwrap();
        }
    }

    /// Runs something in a namespace, on a thread of its own.
    pub fn inside<T: Send>(&self, at: &str, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.lab.namespace_name(at));
        let outcome = thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(fs::File::open(&path).expect("a namespace of the lab"), CloneFlags::CLONE_NEWNET).unwrap();
                    work()
                })
                .join()
        });
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A UDP socket in a namespace; reads wait for [`DEADLINE`] at most.
    pub fn udp(&self, at: &str, address: &str) -> UdpSocket {
        let socket = self.bound(at, || UdpSocket::bind(address));
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    }

    /// A TCP listener in a namespace.
    pub fn listen(&self, at: &str, address: &str) -> TcpListener {
        self.bound(at, || TcpListener::bind(address))
    }

    /// What `bind` opens in a namespace. A process that another test starts has all descriptors of this one until it runs its program, those
    /// that were closed a moment ago too: so a port may be taken for that long.
    fn bound<T: Send>(&self, at: &str, bind: impl Fn() -> io::Result<T> + Send + Sync) -> T {
        let try_once = || match self.inside(at, &bind) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            outcome => Some(outcome.unwrap()),
        };
        wait_until("a port that was closed", DEADLINE, try_once).unwrap()
    }

    /// A TCP connection from a namespace; reads and writes wait for [`DEADLINE`] at most.
    pub fn connect(&self, at: &str, address: &str, limit: Duration) -> io::Result<TcpStream> {
        let address: SocketAddr = address.parse().unwrap();
        let stream = self.inside(at, || TcpStream::connect_timeout(&address, limit))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// One HTTP request: the body of the answer, if one comes.
    pub fn get(&self, from: &str, url: &str) -> Option<String> {
        self.get_within(from, url, DEADLINE.as_secs_f32())
    }

    /// One HTTP request with its own patience.
    pub fn get_within(&self, from: &str, url: &str, seconds: f32) -> Option<String> {
        let (code, body) = self.lab.http(from, url, seconds).unwrap()?;
        assert_eq!(code, 200, "{url} from {from}: {body}");
        Some(body)
    }

    /// Asserts that an HTTP request is answered; by whom, and whom the server saw.
    pub fn answered(&self, from: &str, url: &str) -> (String, IpAddr) {
        let body = self.get(from, url).unwrap_or_else(|| panic!("{from} gets no answer from {url}"));
        let (pod, seen) = body.split_once(' ').expect("pod and remote address");
        (pod.to_owned(), seen.trim().parse().unwrap())
    }

    /// Asserts that an HTTP request gets no answer at all (curl: 28, its own time limit).
    pub fn unanswered(&self, from: &str, url: &str) {
        let limit = NO_ANSWER_SECONDS.to_string();
        let output = self.lab.output_in(from, &["curl", "-sS", "-g", "--max-time", &limit, url]).unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(28), "{url} from {from}: {said}");
    }

    /// Runs ping; whether all were answered, and what it said.
    pub fn ping(&self, from: &str, arguments: &str) -> (bool, String) {
        let mut command = vec!["ping", "-n", "-W", "5", "-i", "0.05"];
        command.extend(arguments.split_whitespace());
        let output = self.lab.output_in(from, &command).unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success() && said.contains(" 0% packet loss"), said)
    }

    /// Asserts that pings are all answered.
    pub fn pings(&self, from: &str, arguments: &str) {
        let (ok, said) = self.ping(from, arguments);
        assert!(ok, "ping {arguments} from {from}:\n{said}");
    }

    /// Starts to capture what a bridge or device of a namespace sees.
    pub fn capture(&self, at: &str, device: &str, filter: &str) -> Process {
        let mut command = vec!["tcpdump", "-n", "-l", "-i", device];
        command.extend(filter.split_whitespace());
        let capture = self.lab.spawn(at, &format!("tcpdump-{at}"), &command).unwrap();
        let before = capture.log().matches("listening on").count();
        wait_until("the start of tcpdump", DEADLINE, || {
            (capture.log().matches("listening on").count() > before || capture.log().contains("listening on"))
                .then_some(())
        })
        .unwrap();
        capture
    }

    /// Asserts what must hold after every test, and ends the cluster.
    pub fn finish(mut self) {
        for node in self.routers.keys().cloned().collect::<Vec<_>>() {
            self.check_rest(&node);
            let mut router = self.take_router(&node);
            self.check_end(&node, &mut router);
        }
    }

    /// Asserts that a router runs, is at rest, balances, and dropped nothing that it may not.
    pub fn check_rest(&mut self, node: &str) {
        let running = self.router(node).is_running();
        assert!(running, "the router of {node} has ended by itself:\n{}", self.router(node).log());
        let mut last = Value::Null;
        let rest = wait_until("balanced counters", DEADLINE, || {
            last = self.ask(node, "status").ok()?["counters"].clone();
            (law(&last) && last["held"] == 0).then_some(())
        });
        assert!(rest.is_ok(), "{node} does not balance: {last}");
        for (reason, count) in last["drops"].as_object().into_iter().flatten() {
            let never = NEVER.contains(&reason.as_str());
            assert!(!never || *count == 0, "{node} dropped {count} packets: {reason}; {last}");
        }
        // Whatever the test did, what is in force is what a router that starts now would have.
        let (code, said) = self.verify(node);
        assert_eq!(code, Some(0), "{node}: {said}");
    }

    /// Runs `weir verify`: its exit status, and what it said.
    pub fn verify(&self, node: &str) -> (Option<i32>, String) {
        let (binary, config) = (weir_binary().display().to_string(), self.configs[node].display().to_string());
        let output = self.lab.output_in(node, &[&binary, "verify", "-c", &config]).unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), said)
    }

    /// Asserts that a router ends cleanly on SIGTERM.
    pub fn check_end(&self, node: &str, router: &mut Process) {
        router.signal(Signal::SIGTERM);
        let status = router.wait(DEADLINE).unwrap();
        let log = router.log();
        assert!(status.success(), "{node} ended with {status}:\n{log}");
        assert!(!log.contains("panicked"), "{node}:\n{log}");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if thread::panicking() {
            for (node, router) in &self.routers {
                eprintln!("--- the log of weir on {node}:\n{}", router.log());
                if let Ok(status) = self.ask(node, "status") {
                    eprintln!("--- {node}: {} {}", status["counters"], status["programs"]);
                }
            }
        }
        // Before the lab takes their namespaces away.
        self.routers.clear();
    }
}

/// Answers every datagram, until dropped.
pub struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Echo {
    /// With the datagram itself.
    pub fn new(site: &Site, at: &str, address: &str) -> Self {
        Self::answering(site, at, address, |datagram, _| datagram.to_vec())
    }

    /// With something made of the datagram and of whom it came from.
    pub fn answering(
        site: &Site,
        at: &str,
        address: &str,
        answer: impl Fn(&[u8], SocketAddr) -> Vec<u8> + Send + 'static,
    ) -> Self {
        let socket = site.udp(at, address);
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut buffer = [0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&answer(&buffer[..length], from), from);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Bytes that are never the same at two places nearby, so that a lost, doubled or swapped piece is seen.
pub fn pattern(at: usize, into: &mut [u8]) {
    for (offset, byte) in into.iter_mut().enumerate() {
        let place = (at + offset) as u64;
        *byte = ((place ^ place >> 8 ^ place >> 16).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    }
}

/// Sends `size` bytes from one end of a connection to the other and asserts that they arrive as they were.
pub fn bulk(mut from: &TcpStream, mut to: &TcpStream, size: usize) {
    const PIECE: usize = 64 * 1024;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut piece = vec![0; PIECE];
            for at in (0..size).step_by(PIECE) {
                let length = PIECE.min(size - at);
                pattern(at, &mut piece[..length]);
                from.write_all(&piece[..length]).expect("the connection takes everything");
            }
        });
        let (mut piece, mut expected) = (vec![0; PIECE], vec![0; PIECE]);
        for at in (0..size).step_by(PIECE) {
            let length = PIECE.min(size - at);
            to.read_exact(&mut piece[..length]).expect("the connection brings everything");
            pattern(at, &mut expected[..length]);
            assert!(piece[..length] == expected[..length], "the bytes from {at} on are other ones");
        }
    });
}

/// One exchange over a connection: whether what is written on one end is read at the other in time.
pub fn passes(mut from: &TcpStream, mut to: &TcpStream, limit: Duration) -> bool {
    let before = Instant::now();
    let mut byte = [0];
    to.set_read_timeout(Some(limit)).unwrap();
    let ok = from.write_all(b"x").is_ok() && to.read_exact(&mut byte).is_ok();
    assert!(before.elapsed() < limit + DEADLINE);
    to.set_read_timeout(Some(DEADLINE)).unwrap();
    ok
}

/// A connection between two namespaces, both ends.
pub fn connection(site: &Site, from: &str, to: &str, address: &str) -> (TcpStream, TcpStream) {
    let port = address.rsplit_once(':').unwrap().1;
    let any = if address.contains('[') { "[::]" } else { "0.0.0.0" };
    let listener = site.listen(to, &format!("{any}:{port}"));
    let near = site.connect(from, address, DEADLINE).unwrap_or_else(|e| panic!("{from} to {address}: {e}"));
    let (far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    far.set_write_timeout(Some(DEADLINE)).unwrap();
    far.set_nodelay(true).unwrap();
    (near, far)
}
