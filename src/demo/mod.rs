//! `weir demo`: a small cluster of network namespaces with real servers, two routers between them, real traffic, and what happened.
//!
//! Scenario `demo` (configs/demo): three tiers that may talk only to their neighbours, and a web application with a node port; two
//! nodes on one subnet, IPIP between them. Exit status 0 only if all is as expected.

pub mod memory;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;
use weir_cluster::translate;
use weir_dataplane::model::Cluster;
use weir_lab::{INTERRUPTED, Lab, LabError, Process, check_interrupted, wait_until};

/// The scenario, embedded: the command works without its source tree.
pub const FILES: [(&str, &str); 5] = [
    ("cluster.yaml", include_str!("../../configs/demo/cluster.yaml")),
    ("policies.yaml", include_str!("../../configs/demo/policies.yaml")),
    ("flows.jsonl", include_str!("../../configs/demo/flows.jsonl")),
    ("node-a.yaml", include_str!("../../configs/demo/node-a.yaml")),
    ("node-b.yaml", include_str!("../../configs/demo/node-b.yaml")),
];
const NODES: [(&str, &str); 2] = [("node-a", "192.168.10.1/24"), ("node-b", "192.168.10.2/24")];
const CLIENT_ADDRESS: &str = "192.168.10.100/24";
const NODE_PORT: u16 = 31380;
const WEBAPP: &str = "10.152.183.46";
const REQUESTS: u32 = 1000;

/// A flow of flows.jsonl, with what the scenario expects.
#[derive(Debug, Clone, Deserialize)]
pub struct ExpectedFlow {
    /// "namespace/pod".
    pub src: String,
    /// A cluster IP.
    pub dst: String,
    /// The service's port.
    pub dport: u16,
    /// "allow" or "deny".
    pub expect: String,
}

/// The scenario's flows.
///
/// # Panics
/// Where the embedded file is broken, which a test would find.
pub fn expected_flows() -> Vec<ExpectedFlow> {
    let lines = FILES[2].1.lines().filter(|line| !line.trim().is_empty());
    lines.map(|line| serde_json::from_str(line).expect("an embedded flow")).collect()
}

/// Build a small cluster of network namespaces, run the router in it, send real traffic, and check what happens. Needs root.
#[derive(clap::Args)]
pub struct Args {
    /// Run the scenario over memory rings: needs no privileges, sends no real traffic.
    #[arg(long)]
    memory: bool,
}

/// Runs the demo.
pub fn run(args: &Args) -> ExitCode {
    let outcome = if args.memory { memory::run() } else { on_namespaces() };
    match outcome {
        Ok(0) => {
            println!("\nAll is as expected.");
            ExitCode::SUCCESS
        }
        Ok(count) => {
            println!("\n{count} {} not as expected.", if count == 1 { "thing is" } else { "things are" });
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("weir demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Counts what is not as expected, and prints the rest.
#[derive(Debug, Default)]
pub struct Checklist {
    failures: u32,
}

impl Checklist {
    /// Prints a heading.
    pub fn section(&self, title: &str) {
        println!("\n== {title}");
    }

    /// Prints a line with its outcome.
    pub fn check(&mut self, ok: bool, line: &str) {
        println!("  {} {line}", if ok { "ok  " } else { "FAIL" });
        self.failures += u32::from(!ok);
    }

    /// How much was not as expected.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

/// The demo's cluster in namespaces, with running servers and routers.
pub struct DemoCluster {
    /// The namespaces.
    pub lab: Lab,
    /// The cluster as the manifests describe it.
    pub cluster: Arc<Cluster>,
    /// weir.yaml per node.
    pub configs: BTreeMap<&'static str, PathBuf>,
    /// The routers.
    pub routers: BTreeMap<&'static str, Process>,
}

impl DemoCluster {
    /// Builds it with the given `weir` command.
    ///
    /// # Errors
    /// Where a part cannot be made.
    pub fn build(weir: &Path, progress: impl Fn(&str)) -> Result<Self, LabError> {
        let mut lab = Lab::new(weir)?;
        progress("namespaces: a switch, two nodes, an outside client");
        lab.add_switch()?;
        for (node, address) in NODES {
            lab.add_node(node, &[address.into()], 1)?;
        }
        lab.add_host("client", &[CLIENT_ADDRESS.into()], 1)?;

        // Sockets and pins carry the nodes' names, so a lab's are its own.
        let mut configs = BTreeMap::new();
        for (name, text) in FILES {
            let mut text =
                NODES.iter().fold(text.to_owned(), |text, (node, _)| text.replace(node, &lab.node_name(node)));
            if let Some((node, _)) = NODES.iter().find(|(node, _)| name == format!("{node}.yaml")) {
                // Gone with the lab.
                text += &format!("state: state-{node}\n");
            }
            let path = lab.folder().join(name);
            fs::write(&path, text).map_err(|source| LabError::File { path: path.clone(), source })?;
            if let Some((node, _)) = NODES.iter().find(|(node, _)| name == format!("{node}.yaml")) {
                configs.insert(*node, path);
            }
        }
        let loaded = translate::load_strictly(&configs["node-a"])
            .map_err(|problems| LabError::Command { command: "weir check".into(), message: problems.render(false) })?;
        let cluster = loaded.cluster;
        progress(&format!("pods: {} namespaces behind veth pairs, nginx in the servers", cluster.workloads.len()));
        for (node, _) in NODES {
            let full = lab.node_name(node);
            lab.add_pods(&cluster, &full, node)?;
        }
        for (pod, port) in servers(&cluster) {
            lab.serve_http(&pod, &[port])?;
        }
        let mut routers = BTreeMap::new();
        for (node, _) in NODES {
            progress(&format!("weir run on {node}"));
            routers.insert(node, lab.start_router(node, &configs[node])?);
        }
        Ok(Self { lab, cluster, configs, routers })
    }

    /// The counters of a node's router.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn status(&self, node: &str) -> Result<Value, LabError> {
        self.ask(node, "status")
    }

    /// What a node's router answers to a listing command, as JSON.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn ask(&self, node: &str, command: &str) -> Result<Value, LabError> {
        let config = self.configs[node].display().to_string();
        let text = self.lab.weir(node, &[command, "-c", &config, "--output", "json"])?;
        serde_json::from_str(&text)
            .map_err(|e| LabError::Command { command: format!("weir {command}"), message: e.to_string() })
    }
}

/// The pods that serve, with their ports, by the scenario's names.
fn servers(cluster: &Cluster) -> Vec<(String, u16)> {
    let port = |name: &str| match name {
        _ if name.contains("/web-server") || name.contains("/webapp") => Some(80),
        _ if name.contains("/was-server") => Some(8080),
        _ if name.contains("/db-server") => Some(3306),
        _ => None,
    };
    cluster.workloads.iter().filter_map(|w| Some((w.name.clone(), port(&w.name)?))).collect()
}

fn on_namespaces() -> Result<u32, LabError> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, &INTERRUPTED)
            .map_err(|source| LabError::File { path: "a signal handler".into(), source })?;
    }
    let weir = std::env::current_exe().map_err(|source| LabError::File { path: "weir".into(), source })?;
    let mut list = Checklist::default();
    list.section("Building the cluster");
    let demo = DemoCluster::build(&weir, |step| println!("  {step}"))?;
    reachability(&demo, &mut list)?;
    spread(&demo, &mut list)?;
    tunnel(&demo, &mut list)?;
    node_ports(&demo, &mut list)?;
    tables(&demo, &mut list)?;
    counters(&demo, &mut list)?;
    list.section("Cleaning up");
    drop(demo);
    println!("  namespaces, processes, programs and files are gone");
    Ok(list.failures())
}

/// The reachability matrix: expected and seen.
fn reachability(demo: &DemoCluster, list: &mut Checklist) -> Result<(), LabError> {
    list.section("Who reaches whom (NetworkPolicy, through cluster IPs)");
    for flow in expected_flows() {
        check_interrupted()?;
        let url = format!("http://{}:{}/", flow.dst, flow.dport);
        let answer = demo.lab.http(&flow.src, &url, if flow.expect == "allow" { 5.0 } else { 1.0 })?;
        let seen = if answer.is_some() { "allow" } else { "deny" };
        let line = format!(
            "{:<18} -> {:<15} port {:<5} expected {:<6} seen {seen}",
            flow.src, flow.dst, flow.dport, flow.expect
        );
        list.check(seen == flow.expect, &line);
    }
    Ok(())
}

/// The spread of many requests over the backends.
fn spread(demo: &DemoCluster, list: &mut Checklist) -> Result<(), LabError> {
    list.section(&format!("{REQUESTS} requests to the service webapp, one connection each"));
    let url = format!("http://{WEBAPP}/?[1-{REQUESTS}]");
    let output = demo.lab.output_in("default/client", &["curl", "-s", "--max-time", "60", &url])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut count: BTreeMap<&str, u32> = BTreeMap::new();
    for pod in text.lines().filter_map(|line| line.split_whitespace().next()) {
        *count.entry(pod).or_default() += 1;
    }
    let answered: u32 = count.values().sum();
    list.check(answered == REQUESTS, &format!("{answered} answered"));
    for pod in ["default/webapp-1", "default/webapp-2"] {
        let n = count.get(pod).copied().unwrap_or_default();
        // 6.5 standard deviations of a fair coin: a right router fails once in 12 billion runs.
        let spread = 6.5 * (f64::from(REQUESTS) / 4.0).sqrt();
        list.check((f64::from(n) - f64::from(REQUESTS) / 2.0).abs() <= spread, &format!("{pod}: {n}"));
    }
    Ok(())
}

/// IPIP on the wire.
fn tunnel(demo: &DemoCluster, list: &mut Checklist) -> Result<(), LabError> {
    list.section("The tunnel on the wire, as the switch sees it");
    let mut capture =
        demo.lab.spawn("switch", "tcpdump", &["tcpdump", "-n", "-v", "-l", "-i", "br0", "-c", "4", "ip proto 4"])?;
    wait_until("the start of tcpdump", Duration::from_secs(5), || {
        capture.log().contains("listening on").then_some(())
    })?;
    let answer = demo.lab.http("default/client", &format!("http://{WEBAPP}/"), 5.0)?;
    list.check(answer.is_some(), "one request from node-a's client to a backend on node-b");
    let _ = capture.wait(Duration::from_secs(5));
    let log = capture.log();
    let headers: Vec<&str> = log.lines().map(str::trim).filter(|line| line.contains(" > ")).collect();
    for line in &headers {
        println!("       {line}");
    }
    let outer = |from: &str, to: &str| headers.iter().any(|line| line.contains(&format!("{from} > {to}: ")));
    list.check(outer("192.168.10.1", "192.168.10.2"), "outer header 192.168.10.1 > 192.168.10.2");
    list.check(outer("192.168.10.2", "192.168.10.1"), "outer header 192.168.10.2 > 192.168.10.1");
    let inner = headers.iter().any(|line| line.contains("10.1.1.194.") && line.contains(" > 10.1.2.10"));
    list.check(inner, "inner header from the pod 10.1.1.194 to a backend on node-b");
    Ok(())
}

/// The node port, from outside, through both nodes.
fn node_ports(demo: &DemoCluster, list: &mut Checklist) -> Result<(), LabError> {
    list.section(&format!("Node port {NODE_PORT} from the outside client"));
    for (node, address) in NODES {
        check_interrupted()?;
        let address = address.split('/').next().unwrap_or_default();
        let answer = demo.lab.http("client", &format!("http://{address}:{NODE_PORT}/"), 5.0)?;
        let words = match &answer {
            Some((code, body)) => format!("{code}, answered by {body}"),
            None => "no answer".into(),
        };
        let ok = answer.is_some_and(|(code, body)| code == 200 && body.starts_with("default/webapp-"));
        list.check(ok, &format!("through {node} ({address}): {words}"));
    }
    Ok(())
}

/// The connection tables.
fn tables(demo: &DemoCluster, list: &mut Checklist) -> Result<(), LabError> {
    list.section("The connection table (weir conntrack), its last lines");
    for (node, _) in NODES {
        let config = demo.configs[node].display().to_string();
        let text = demo.lab.weir(node, &["conntrack", "-c", &config])?;
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().rev().take(4) {
            println!("       {line}");
        }
        list.check(!lines.is_empty(), &format!("{node} tracks {} connections", lines.len()));
    }
    Ok(())
}

/// The counters and their law.
fn counters(demo: &DemoCluster, list: &mut Checklist) -> Result<(), LabError> {
    list.section("Counters: rx + generated = tx + drops + punted + consumed + held");
    for (node, _) in NODES {
        // Workers count while they are read; a quiet moment comes.
        let balanced = wait_until("balanced counters", Duration::from_secs(5), || {
            let status = demo.status(node).ok()?;
            law(&status["counters"]).then_some(status)
        });
        let status = match &balanced {
            Ok(status) => status.clone(),
            Err(_) => demo.status(node)?,
        };
        let counters = &status["counters"];
        let words =
            ["rx", "generated", "tx", "punted", "consumed", "held"].map(|name| format!("{name} {}", counters[name]));
        list.check(balanced.is_ok(), &format!("{node}: {}, drops {}", words.join(", "), counters["drops"]));
    }
    Ok(())
}

/// Whether counters obey the law of the dataplane.
pub fn law(counters: &Value) -> bool {
    let number = |name: &str| counters[name].as_u64().unwrap_or(0);
    let drops: u64 = counters["drops"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
    number("rx") + number("generated") == number("tx") + number("punted") + number("consumed") + number("held") + drops
}
