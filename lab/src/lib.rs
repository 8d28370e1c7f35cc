//! A cluster in network namespaces: nodes on one switch, pods behind veth pairs as a CNI makes them, an outside client.
//! `weir demo` and the end-to-end tests build their clusters with it.
//!
//! Everything has a name with the lab's own prefix, and everything is taken away when the lab is dropped: processes by their id, namespaces,
//! pins, files. A veth has no wire, so the switch's ends of the nodes' uplinks do what a NIC does: finish checksums and segment
//! (`ethtool -K ... tx off`).

use std::{
    fs,
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use weir_dataplane::model::Cluster;

/// Programs that a lab runs, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("ethtool", "ethtool"),
    ("nginx", "nginx-light"),
    ("curl", "curl"),
    ("tcpdump", "tcpdump"),
];
/// The MAC address of every pod's host end, as Calico sets it.
const HOST_END_MAC: &str = "ee:ee:ee:ee:ee:ee";

/// Why a lab cannot be built, or what failed in it.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Not root.
    #[error("network namespaces, AF_XDP and BPF need root; run it as root")]
    NotRoot,
    /// Programs are missing.
    #[error("missing: {programs}; on Debian: apt-get install {packages}")]
    Missing {
        /// The programs.
        programs: String,
        /// The packages.
        packages: String,
    },
    /// The kernel has no AF_XDP.
    #[error("this kernel has no AF_XDP sockets (CONFIG_XDP_SOCKETS): {0}")]
    NoAfXdp(io::Error),
    /// A command failed.
    #[error("{command}: {message}")]
    Command {
        /// The command.
        command: String,
        /// What it said.
        message: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s{detail}")]
    Timeout {
        /// What.
        what: String,
        /// The time allowed.
        seconds: u64,
        /// What was seen instead.
        detail: String,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Set by a signal handler: the lab ends at its next step.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

static LABS: AtomicU32 = AtomicU32::new(0);

/// A process that the lab runs.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal);
    }

    /// Waits for its end; its exit status, or what the log says where it does not end.
    ///
    /// # Errors
    /// Where it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<std::process::ExitStatus, LabError> {
        let child = &mut self.child;
        wait_until(&format!("the end of {}", self.name), limit, || child.try_wait().ok().flatten())
    }

    fn end(&mut self) {
        if self.is_running() {
            self.signal(nix::sys::signal::Signal::SIGTERM);
            if self.wait(Duration::from_secs(3)).is_err() {
                let _ = self.child.kill();
            }
        }
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// A lab.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    folder: tempfile::TempDir,
    namespaces: Vec<String>,
    nodes: Vec<String>,
    processes: Vec<Process>,
    weir: PathBuf,
}

impl Lab {
    /// An empty lab that runs the given `weir` command.
    ///
    /// # Errors
    /// Where this machine or user cannot run one; the message says what to do.
    pub fn new(weir: &Path) -> Result<Self, LabError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        let missing: Vec<_> = PROGRAMS.iter().filter(|(program, _)| find_program(program).is_none()).collect();
        if !missing.is_empty() {
            let join = |part: fn(&(&'static str, &'static str)) -> &'static str| {
                missing.iter().map(|m| part(m)).collect::<Vec<_>>().join(" ")
            };
            return Err(LabError::Missing { programs: join(|m| m.0), packages: join(|m| m.1) });
        }
        check_af_xdp()?;
        let folder = tempfile::Builder::new()
            .prefix("weir-lab-")
            .tempdir()
            .map_err(|source| LabError::File { path: std::env::temp_dir(), source })?;
        // Servers that drop their privileges read files in it.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), open)
            .map_err(|source| LabError::File { path: folder.path().into(), source })?;
        Ok(Self {
            prefix: format!("weir{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed)),
            folder,
            namespaces: Vec::new(),
            nodes: Vec::new(),
            processes: Vec::new(),
            weir: weir.into(),
        })
    }

    /// The lab's folder for files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The full name of a namespace of this lab.
    pub fn namespace_name(&self, name: &str) -> String {
        format!("{}-{}", self.prefix, name.replace('/', "."))
    }

    /// The name that a node has in manifests of this lab: unique on the machine, because sockets and pins carry it.
    pub fn node_name(&self, node: &str) -> String {
        format!("{}-{node}", self.prefix)
    }

    /// Makes a namespace with its loopback up.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn add_namespace(&mut self, name: &str) -> Result<(), LabError> {
        let full = self.namespace_name(name);
        run("ip", &["netns", "add", &full])?;
        self.namespaces.push(full.clone());
        run("ip", &["-n", &full, "link", "set", "lo", "up"])?;
        Ok(())
    }

    /// Makes the switch: a namespace with a bridge that nodes and clients are plugged into.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn add_switch(&mut self) -> Result<(), LabError> {
        self.add_namespace("switch")?;
        self.ip("switch", "link add br0 type bridge")?;
        self.ip("switch", "link set br0 up")
    }

    /// Plugs a new namespace into the switch: device eth0 with `queues` queues and the addresses.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn add_host(&mut self, name: &str, addresses: &[String], queues: u32) -> Result<(), LabError> {
        self.add_namespace(name)?;
        let (host, switch) = (self.namespace_name(name), self.namespace_name("switch"));
        let port = format!("p{}", self.namespaces.len());
        let queues = queues.to_string();
        let both = ["numrxqueues", &queues, "numtxqueues", &queues];
        let mut command = vec!["link", "add", "eth0", "netns", &host];
        command.extend(both);
        command.extend(["type", "veth", "peer", "name", &port, "netns", &switch]);
        command.extend(both);
        run("ip", &command)?;
        self.ip("switch", &format!("link set {port} master br0 up"))?;
        self.run_in("switch", &["ethtool", "-K", &port, "tx", "off"])?;
        self.ip(name, "link set eth0 up")?;
        for address in addresses {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            self.ip(name, &format!("address add {address} dev eth0{nodad}"))?;
        }
        Ok(())
    }

    /// Makes a node: a host on the switch that will run a router.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn add_node(&mut self, node: &str, addresses: &[String], queues: u32) -> Result<(), LabError> {
        self.nodes.push(self.node_name(node));
        self.add_host(node, addresses, queues)
    }

    /// Makes a pod as Calico does: a veth pair whose end in the node has the given name, full-length addresses, the gateway
    /// 169.254.1.1 (and the device's link-local address for IPv6). Offloads stay as they are.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn add_pod(&mut self, node: &str, pod: &str, device: &str, addresses: &[IpAddr]) -> Result<(), LabError> {
        self.add_namespace(pod)?;
        let (node_namespace, pod_namespace) = (self.namespace_name(node), self.namespace_name(pod));
        run(
            "ip",
            &[
                "link",
                "add",
                device,
                "netns",
                &node_namespace,
                "address",
                HOST_END_MAC,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                &pod_namespace,
            ],
        )?;
        self.ip(node, &format!("link set {device} up"))?;
        self.ip(pod, "link set eth0 up")?;
        for address in addresses {
            match address {
                IpAddr::V4(_) => self.ip(pod, &format!("address add {address}/32 dev eth0"))?,
                IpAddr::V6(_) => self.ip(pod, &format!("address add {address}/128 dev eth0 nodad"))?,
            }
        }
        if addresses.iter().any(IpAddr::is_ipv4) {
            self.ip(pod, "route add 169.254.1.1 dev eth0 scope link")?;
            self.ip(pod, "route add default via 169.254.1.1 dev eth0")?;
        }
        if addresses.iter().any(IpAddr::is_ipv6) {
            self.ip(pod, "-6 route add default via fe80::ecee:eeff:feee:eeee dev eth0")?;
        }
        Ok(())
    }

    /// Makes the pods of `cluster` that run on `node` (by its name in the cluster) in the namespace `at`.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn add_pods(&mut self, cluster: &Cluster, node: &str, at: &str) -> Result<(), LabError> {
        for workload in cluster.workloads.iter().filter(|w| w.node.as_deref() == Some(node)) {
            check_interrupted()?;
            self.add_pod(at, &workload.name, &workload.device, &workload.addresses)?;
        }
        Ok(())
    }

    /// Removes a pod with its namespace.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn remove_pod(&mut self, pod: &str) -> Result<(), LabError> {
        let full = self.namespace_name(pod);
        self.namespaces.retain(|n| *n != full);
        remove_namespace(&full)
    }

    /// Runs `ip` with blank-separated `arguments` in a namespace.
    ///
    /// # Errors
    /// Where it fails.
    pub fn ip(&self, name: &str, arguments: &str) -> Result<(), LabError> {
        let full = self.namespace_name(name);
        let mut command = vec!["-n", full.as_str()];
        command.extend(arguments.split_whitespace());
        run("ip", &command).map(drop)
    }

    /// The command that runs `arguments` in a namespace. Only the network is another, so BPF's file system stays seen.
    pub fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace_name(name))).arg("--").args(arguments);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command in a namespace to its end; its output, whatever its exit status.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn output_in(&self, name: &str, arguments: &[&str]) -> Result<Output, LabError> {
        self.command(name, arguments)
            .output()
            .map_err(|e| LabError::Command { command: arguments.join(" "), message: e.to_string() })
    }

    /// Runs a command in a namespace; its standard output.
    ///
    /// # Errors
    /// Where it fails.
    pub fn run_in(&self, name: &str, arguments: &[&str]) -> Result<String, LabError> {
        succeeded(&arguments.join(" "), self.output_in(name, arguments)?)
    }

    /// Starts a process in a namespace; its output goes to a log file.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn spawn(&self, name: &str, label: &str, arguments: &[&str]) -> Result<Process, LabError> {
        let log = self.folder().join(format!("{}.log", label.replace('/', ".")));
        let file_error = |source| LabError::File { path: log.clone(), source };
        let file = fs::OpenOptions::new().create(true).append(true).open(&log).map_err(file_error)?;
        let child = self
            .command(name, arguments)
            .stdout(file.try_clone().map_err(file_error)?)
            .stderr(file)
            .spawn()
            .map_err(|e| LabError::Command { command: arguments.join(" "), message: e.to_string() })?;
        Ok(Process { name: label.into(), child, log })
    }

    /// Starts a process that runs until the lab ends.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn keep(&mut self, name: &str, label: &str, arguments: &[&str]) -> Result<(), LabError> {
        let process = self.spawn(name, label, arguments)?;
        self.processes.push(process);
        Ok(())
    }

    /// Starts an nginx in a pod that answers every request on `ports` with its pod's name and then closes the connection; files
    /// below the lab's folder `files` are served under /files/.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub fn serve_http(&mut self, pod: &str, ports: &[u16]) -> Result<(), LabError> {
        let folder = self.folder().join(format!("nginx-{}", pod.replace('/', ".")));
        fs::create_dir_all(&folder).map_err(|source| LabError::File { path: folder.clone(), source })?;
        let listen: String = ports.iter().map(|port| format!("    listen {port}; listen [::]:{port};\n")).collect();
        let at = folder.display();
        let config = format!(
            "daemon off; pid {at}/pid; error_log stderr; worker_processes 1;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\n  access_log off; keepalive_timeout 0; client_body_temp_path {at}; proxy_temp_path {at};\n  \
             fastcgi_temp_path {at}; uwsgi_temp_path {at}; scgi_temp_path {at};\n  server {{\n{listen}    \
             location /files/ {{ alias {}/files/; }}\n    \
             location / {{ default_type text/plain; return 200 \"{pod} $remote_addr\\n\"; }}\n  }}\n}}\n",
            self.folder().display(),
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, config).map_err(|source| LabError::File { path: file.clone(), source })?;
        let (folder, file) = (folder.display().to_string(), file.display().to_string());
        self.keep(pod, &format!("nginx {pod}"), &["nginx", "-p", &folder, "-e", "stderr", "-c", &file])
    }

    /// Starts a router in a node, and waits until it says that it runs.
    ///
    /// # Errors
    /// Where it ends or says nothing in time; with its log.
    pub fn start_router(&self, node: &str, config: &Path) -> Result<Process, LabError> {
        let weir = self.weir.display().to_string();
        let label = format!("weir-{node}");
        let before = fs::read_to_string(self.folder().join(format!("{label}.log"))).map_or(0, |log| log.len());
        let mut process = self.spawn(node, &label, &[&weir, "run", "-c", &config.display().to_string()])?;
        let limit = Duration::from_secs(60);
        let begin = Instant::now();
        loop {
            check_interrupted()?;
            let log = process.log();
            if log[before.min(log.len())..].contains("the router runs") {
                return Ok(process);
            }
            if !process.is_running() {
                return Err(LabError::Command { command: format!("weir run on {node}"), message: log });
            }
            if begin.elapsed() > limit {
                let detail = format!(":\n{log}");
                return Err(LabError::Timeout {
                    what: format!("the start of weir on {node}"),
                    seconds: limit.as_secs(),
                    detail,
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a `weir` command; its standard output.
    ///
    /// # Errors
    /// Where it fails.
    pub fn weir(&self, node: &str, arguments: &[&str]) -> Result<String, LabError> {
        let weir = self.weir.display().to_string();
        let mut command = vec![weir.as_str()];
        command.extend(arguments);
        self.run_in(node, &command)
    }

    /// One HTTP request from a namespace: status code and body; `None` without an answer in `seconds`.
    ///
    /// # Errors
    /// Where curl cannot be started.
    pub fn http(&self, from: &str, url: &str, seconds: f32) -> Result<Option<(u16, String)>, LabError> {
        let limit = seconds.to_string();
        let output = self.output_in(from, &["curl", "-s", "-g", "--max-time", &limit, "-w", "\n%{http_code}", url])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, code) = text.rsplit_once('\n').unwrap_or(("", "0"));
        Ok(code
            .parse()
            .ok()
            .filter(|code| output.status.success() && *code > 0)
            .map(|code| (code, body.trim().to_owned())))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.processes.clear();
        for node in &self.nodes {
            let _ = fs::remove_dir_all(weir_node::run::pin_folder(node));
            let tables = weir_node::connections::folder(node);
            if let Err(error) = weir_node::connections::remove(&tables) {
                eprintln!("could not remove {}: {error}", tables.display());
            }
            let _ = fs::remove_file(weir_node::control::socket_path(node));
            let _ = fs::remove_file(Path::new(weir_node::control::RUN_FOLDER).join(format!("{node}.host.json")));
        }
        for namespace in &self.namespaces {
            if let Err(error) = remove_namespace(namespace) {
                eprintln!("could not remove the namespace {namespace}: {error}");
            }
        }
    }
}

/// Removes a namespace and ends what still runs in it: a server's children outlive the server, and with them the namespace would.
fn remove_namespace(namespace: &str) -> Result<(), LabError> {
    for id in run("ip", &["netns", "pids", namespace])?.split_whitespace().filter_map(|id| id.parse().ok()) {
        // It may have ended by itself.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGKILL);
    }
    run("ip", &["netns", "delete", namespace]).map(drop)
}

/// Waits until `look` finds something.
///
/// # Errors
/// Where it does not within `limit`, or after Ctrl-C.
pub fn wait_until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T, LabError> {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        check_interrupted()?;
        if begin.elapsed() > limit {
            return Err(LabError::Timeout { what: what.into(), seconds: limit.as_secs(), detail: String::new() });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ends a step after Ctrl-C.
///
/// # Errors
/// After Ctrl-C.
pub fn check_interrupted() -> Result<(), LabError> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(LabError::Interrupted) } else { Ok(()) }
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn check_af_xdp() -> Result<(), LabError> {
    // Every user may read which protocol families there are; the sockets themselves are made by the router.
    let mut text = String::new();
    let read = fs::File::open("/proc/net/protocols").and_then(|mut file| file.read_to_string(&mut text));
    match read {
        Ok(_) if text.lines().any(|line| line.starts_with("XDP")) => Ok(()),
        Ok(_) => Err(LabError::NoAfXdp(io::Error::other("/proc/net/protocols does not list XDP"))),
        Err(error) => Err(LabError::NoAfXdp(error)),
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String, LabError> {
    let command = format!("{program} {}", arguments.join(" "));
    match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) => succeeded(&command, output),
        Err(error) => Err(LabError::Command { command, message: error.to_string() }),
    }
}

fn succeeded(command: &str, output: Output) -> Result<String, LabError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(LabError::Command { command: command.into(), message: format!("{} ({})", said.trim(), output.status) })
}
