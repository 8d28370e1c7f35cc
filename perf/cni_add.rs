//! How long a pod's network takes: ADD and DEL of weir-cni with a router of this machine, beside Debian's reference plugins (ptp with
//! host-local, package containernetworking-plugins), alone and many at once. Both take turns in one run: on a shared machine the pair
//! counts, and the load is told with it.
//!
//! Each command is a process, run as a runtime runs it; sandboxes (network namespaces) are made beforehand. The pods' objects are in the
//! manifests already, so there is no wait for them. A policy selects every pod, and is in force when ADD returns.
//!
//!     make bench-cni
//!     cargo run --release -p weir-cni --example add -- WEIR WEIR_CNI [--plugins FOLDER] [--rounds N] [--json]

use std::{
    env,
    error::Error,
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

type Failure = Box<dyn Error + Send + Sync>;

/// Pods of the node.
const PODS: usize = 100;
/// How many are asked for at once.
const AT_ONCE: [usize; 3] = [1, 50, PODS];
/// Services of the cluster; each has two backends on another node.
const SERVICES: usize = 100;
/// How long the router may take to start.
const START: Duration = Duration::from_secs(60);
const USAGE: &str =
    "usage: add WEIR WEIR_CNI [--plugins FOLDER] [--rounds N] [--json] (the programs: make release cni)";

fn main() -> Result<(), Failure> {
    let arguments = Arguments::read()?;
    let folder = tempfile::Builder::new().prefix("weir-cni-add-").tempdir()?;
    let pods = (0..PODS).map(Pod::new).collect::<Result<Vec<_>, _>>()?;
    let mut sides = vec![Side::weir(&arguments, folder.path())?];
    if arguments.plugins.join("ptp").exists() {
        sides.push(Side::reference(&arguments, folder.path())?);
    } else {
        let folder = arguments.plugins.display();
        eprintln!("no ptp in {folder} (package containernetworking-plugins): weir is measured alone");
    }

    let mut rows = Vec::new();
    for side in &sides {
        // The first one pays for what is read from the disk.
        side.round(&pods[..1], 1)?;
        rows.extend(AT_ONCE.map(|at_once| Row { plugin: side.name, at_once, ..Row::default() }));
    }
    let mut loads = Vec::new();
    for round in 1..=arguments.rounds {
        for (side, rows) in sides.iter().zip(rows.chunks_mut(AT_ONCE.len())) {
            for row in rows {
                let count = if row.at_once == 1 { PODS } else { row.at_once };
                row.rounds.push(side.round(&pods[..count], row.at_once)?);
            }
        }
        let load = fs::read_to_string("/proc/loadavg")?;
        let load = load.split(' ').next().unwrap_or_default();
        eprintln!("round {round} of {}, load {load}", arguments.rounds);
        loads.push(load.to_owned());
    }
    drop(sides);
    if arguments.json {
        let rows: Vec<_> = rows.iter().map(Row::to_json).collect();
        println!("{:#}", json!({"loads": loads, "rows": rows}));
    } else {
        println!("{}", text(&rows));
    }
    Ok(())
}

/// What is asked for.
struct Arguments {
    weir: PathBuf,
    weir_cni: PathBuf,
    plugins: PathBuf,
    rounds: usize,
    json: bool,
}

impl Arguments {
    fn read() -> Result<Self, Failure> {
        let mut programs = Vec::new();
        let (mut plugins, mut rounds, mut json) = (PathBuf::from("/usr/lib/cni"), 5, false);
        let mut words = env::args().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "--plugins" => plugins = words.next().ok_or(USAGE)?.into(),
                "--rounds" => rounds = words.next().ok_or(USAGE)?.parse()?,
                "--json" => json = true,
                program if !program.starts_with('-') => {
                    programs.push(fs::canonicalize(program).map_err(|error| format!("{program}: {error}; {USAGE}"))?);
                }
                _ => return Err(USAGE.into()),
            }
        }
        let Ok([weir, weir_cni]) = <[PathBuf; 2]>::try_from(programs) else { return Err(USAGE.into()) };
        Ok(Self { weir, weir_cni, plugins, rounds, json })
    }
}

/// A network namespace without a name: it ends with the processes that use it.
struct Namespace(File);

impl Namespace {
    fn new() -> Result<Self, Failure> {
        let make = || -> Result<File, Failure> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        };
        let made = thread::spawn(make).join().map_err(|_| "a thread ended early")?;
        Ok(Self(made.map_err(|error| format!("a network namespace cannot be made: {error} (needs root)"))?))
    }

    /// How other processes name it.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// Does something on a thread in it; a process that it starts is in it too.
    fn within<T: Send>(&self, action: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, Failure> {
        let action = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            action()
        };
        thread::scope(|scope| scope.spawn(action).join().map_err(|_| "a thread ended early")?)
    }

    fn ip(&self, arguments: &str) -> Result<(), Failure> {
        let output = self.within(|| Ok(Command::new("ip").args(arguments.split(' ')).output()?))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr)).into()),
        }
    }
}

/// A pod's sandbox.
struct Pod {
    name: String,
    sandbox: String,
    namespace: Namespace,
}

impl Pod {
    fn new(number: usize) -> Result<Self, Failure> {
        let sandbox = format!("{:064x}", u64::from(std::process::id()) << 32 | number as u64);
        Ok(Self { name: format!("pod-{number}"), sandbox, namespace: Namespace::new()? })
    }
}

/// A plugin, and the node that it makes pods for.
struct Side {
    name: &'static str,
    program: PathBuf,
    /// CNI_PATH
    path: PathBuf,
    config: Value,
    _router: Option<Router>,
    node: Namespace,
}

impl Side {
    fn weir(arguments: &Arguments, folder: &Path) -> Result<Self, Failure> {
        let node = Namespace::new()?;
        node.ip("link set lo up")?;
        node.ip("link add eth0 type veth peer name outside")?;
        node.ip("addr add 192.0.2.11/24 dev eth0")?;
        for device in ["eth0", "outside"] {
            node.ip(&format!("link set {device} up"))?;
        }
        let router = Router::start(&arguments.weir, &node, folder)?;
        Ok(Self {
            name: "weir",
            program: arguments.weir_cni.clone(),
            path: arguments.plugins.clone(),
            config: json!({"cniVersion": "1.0.0", "name": "weir", "type": "weir-cni", "socket": folder.join("cni.sock")}),
            _router: Some(router),
            node,
        })
    }

    fn reference(arguments: &Arguments, folder: &Path) -> Result<Self, Failure> {
        Ok(Self {
            name: "ptp, host-local",
            program: arguments.plugins.join("ptp"),
            path: arguments.plugins.clone(),
            config: json!({
                "cniVersion": "1.0.0", "name": "reference", "type": "ptp",
                "ipam": {
                    "type": "host-local", "dataDir": folder.join("host-local"),
                    "ranges": [[{"subnet": "10.245.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
                },
            }),
            _router: None,
            node: Namespace::new()?,
        })
    }

    /// Adds pods, then deletes them; so many at once.
    fn round(&self, pods: &[Pod], at_once: usize) -> Result<Round, Failure> {
        let add = self.all("ADD", pods, at_once)?;
        Ok(Round { add, del: self.all("DEL", pods, at_once)? })
    }

    fn all(&self, command: &str, pods: &[Pod], at_once: usize) -> Result<Times, Failure> {
        let barrier = Barrier::new(at_once);
        let begin = Instant::now();
        let run = |pods: &[Pod]| -> Result<Vec<Duration>, Failure> {
            setns(&self.node.0, CloneFlags::CLONE_NEWNET)?;
            barrier.wait();
            pods.iter().map(|pod| self.run(command, pod)).collect()
        };
        let each: Vec<Duration> = thread::scope(|scope| {
            let threads: Vec<_> =
                pods.chunks(pods.len() / at_once).map(|pods| scope.spawn(move || run(pods))).collect();
            let joined = threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread ended early")?);
            joined.collect::<Result<Vec<_>, _>>().map(|times| times.concat())
        })?;
        Ok(Times { each, total: begin.elapsed() })
    }

    fn run(&self, command: &str, pod: &Pod) -> Result<Duration, Failure> {
        let begin = Instant::now();
        let arguments = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={}", pod.name);
        let mut child = Command::new(&self.program)
            .env_clear()
            .envs([("CNI_COMMAND", command), ("CNI_CONTAINERID", &pod.sandbox), ("CNI_IFNAME", "eth0")])
            .env("CNI_NETNS", pod.namespace.path())
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", &self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().ok_or("no standard input")?.write_all(self.config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let took = begin.elapsed();
        if output.status.success() {
            return Ok(took);
        }
        let [said, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        Err(format!("{command} of {} by {} failed: {said} {errors}", pod.name, self.name).into())
    }
}

/// A router that runs.
struct Router {
    process: Child,
    weir: PathBuf,
    config: PathBuf,
    node: Namespace,
}

impl Router {
    fn start(weir: &Path, node: &Namespace, folder: &Path) -> Result<Self, Failure> {
        let name = format!("cni-add-{}", std::process::id());
        let config = folder.join("weir.yaml");
        fs::write(folder.join("cluster.yaml"), manifests(&name))?;
        fs::write(
            &config,
            format!(
                "nodeName: {name}\nmanifests: [cluster.yaml]\nserviceCIDRs: [10.96.0.0/16]\nworkers: {{cores: [0]}}\n\
                 devices: [{{name: eth0, role: uplink}}]\ncni: {{socket: {0}/cni.sock, state: {0}/state}}\n",
                folder.display()
            ),
        )?;
        let log = File::create(folder.join("weir.log"))?;
        let mut command = Command::new(weir);
        command.args(["run", "-c"]).arg(&config).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = node.within(|| Ok(command.spawn()?))?;
        let mut router = Self { process, weir: weir.into(), config, node: Namespace(node.0.try_clone()?) };
        let begin = Instant::now();
        // It says so once all is in force; its socket for pods is there before.
        let runs = || fs::read_to_string(folder.join("weir.log")).is_ok_and(|log| log.contains("the router runs"));
        while !runs() || UnixStream::connect(folder.join("cni.sock")).is_err() {
            if begin.elapsed() > START || router.process.try_wait()?.is_some() {
                let log = fs::read_to_string(folder.join("weir.log"))?;
                return Err(format!("the router does not start:\n{log}").into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(router)
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.process.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.process.wait();
        let mut detach = Command::new(&self.weir);
        detach.args(["detach", "-c"]).arg(&self.config).stdout(Stdio::null());
        let detached = self.node.within(|| Ok(detach.status()?));
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("`weir detach -c {}` failed: what the router pinned is left", self.config.display());
        }
    }
}

/// The cluster: this node and another, services, this node's pods, and a policy for each of them.
fn manifests(node: &str) -> String {
    let mut text = String::new();
    for (name, address, cidr) in [(node, "192.0.2.11", "10.244.0.0/16"), ("other", "192.0.2.12", "10.246.0.0/16")] {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{cidr}]}}\n\
             status: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n"
        );
    }
    text += "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n";
    for number in 0..SERVICES {
        let ready = "conditions: {ready: true}";
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}, namespace: default}}\n\
             spec: {{clusterIP: 10.96.1.{number}, ports: [{{port: 80}}]}}\n\
             ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{name: s{number}, namespace: default, labels: {{kubernetes.io/service-name: s{number}}}}}\n\
             ports: [{{port: 80, protocol: TCP}}]\n\
             endpoints: [{{addresses: [10.246.1.{number}], {ready}}}, {{addresses: [10.246.2.{number}], {ready}}}]\n"
        );
    }
    for number in 0..PODS {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: pod-{number}, namespace: default, labels: {{app: a{}}}}}\n\
             spec: {{nodeName: {node}, containers: [{{name: c, image: i}}]}}\n",
            number % 10
        );
    }
    text += "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: some, namespace: default}\n\
             spec: {podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: a1}}}]}]}\n";
    text
}

/// What one kind of run took, round by round.
#[derive(Default)]
struct Row {
    plugin: &'static str,
    at_once: usize,
    rounds: Vec<Round>,
}

struct Round {
    add: Times,
    del: Times,
}

struct Times {
    each: Vec<Duration>,
    total: Duration,
}

impl Row {
    /// Over all rounds: milliseconds of the median, of the 99th percentile and of the slowest, and the median of the rounds' totals.
    fn summary(&self, command: impl Fn(&Round) -> &Times) -> [f64; 4] {
        let mut each: Vec<_> = self.rounds.iter().flat_map(|round| command(round).each.iter().copied()).collect();
        let mut totals: Vec<_> = self.rounds.iter().map(|round| command(round).total).collect();
        each.sort();
        totals.sort();
        let at = |sorted: &[Duration], share: usize| {
            let last = sorted.len().saturating_sub(1);
            sorted.get(last * share / 100).map_or(0.0, |time| (time.as_secs_f64() * 1e4).round() / 10.0)
        };
        [at(&each, 50), at(&each, 99), at(&each, 100), at(&totals, 50)]
    }

    fn to_json(&self) -> Value {
        let times =
            |[p50, p99, most, total]: [f64; 4]| json!({"p50Ms": p50, "p99Ms": p99, "mostMs": most, "totalMs": total});
        json!({
            "plugin": self.plugin, "atOnce": self.at_once,
            "add": times(self.summary(|round| &round.add)), "del": times(self.summary(|round| &round.del)),
        })
    }
}

fn text(rows: &[Row]) -> String {
    let mut text = String::from("plugin            at once  command  p50 ms   p99 ms  most ms  all of them, ms");
    for row in rows {
        for (command, times) in [("ADD", row.summary(|round| &round.add)), ("DEL", row.summary(|round| &round.del))] {
            let [p50, p99, most, total] = times;
            let (plugin, at_once) = (row.plugin, row.at_once);
            // One after another, a total is that of so many processes.
            let total = if at_once == 1 { String::new() } else { format!("{total:.0}") };
            let _ =
                write!(text, "\n{plugin:<17} {at_once:>7}  {command:<7} {p50:>7.1} {p99:>8.1} {most:>8.1} {total:>16}");
        }
    }
    text
}
