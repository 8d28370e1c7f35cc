//! Talking to a running router over its Unix socket: one JSON line asked, one JSON document answered, or, by `weir conntrack`, a line
//! for each connection, and by `weir services` one for each service port.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use weir_cluster::{config::RouterConfig, text::Problems};
use weir_policy::RuleIdentity;

use crate::{conntrack, ipam::explain::Report, services};

/// Where running routers keep their sockets and records; a tmpfs.
pub const RUN_FOLDER: &str = "/run/weir";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a verification may take.
const VERIFICATION: Duration = Duration::from_secs(600);

/// What can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// Modes, workers, counters, table use.
    Status,
    /// Live connections.
    Conntrack(conntrack::Query),
    /// Services and their backends.
    Services(services::Query),
    /// Hits per policy rule.
    PolicyHits,
    /// The addresses of pods that weir makes.
    Ipam,
    /// Whether what is in force is what it should be; answered once that is known, and what is not is mended.
    Verify,
}

impl Request {
    /// Whether the answer has many lines.
    pub fn is_long(&self) -> bool {
        matches!(self, Self::Conntrack(_) | Self::Services(_))
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// weir.yaml, which names the node and so the socket, is bad.
    #[error("{0}")]
    Config(String),
    /// Nobody listens.
    #[error("no router answers at {path}: {source}; is `weir run` with this configuration running, and are you root?")]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The answer is none.
    #[error("the router's answer cannot be read: {0}")]
    BadAnswer(#[from] serde_json::Error),
    /// The answer ended before its end, or what reads it did.
    #[error("the answer was cut short: {0}")]
    Broken(io::Error),
    /// The router does not know what is asked for.
    #[error("the router refuses: {0}; is it of the same version?")]
    Refused(String),
}

/// Makes [`RUN_FOLDER`], for root alone: what is asked there changes what the node lets through.
///
/// # Errors
/// Where it cannot be made or changed.
pub fn make_run_folder() -> io::Result<()> {
    fs::create_dir_all(RUN_FOLDER)?;
    fs::set_permissions(RUN_FOLDER, fs::Permissions::from_mode(0o700))
}

/// The socket of the router of a node.
pub fn socket_path(node_name: &str) -> PathBuf {
    Path::new(RUN_FOLDER).join(format!("{node_name}.sock"))
}

/// A connection to the router that runs with `config`.
///
/// # Errors
/// Where it does not run.
pub fn connect(config: &Path) -> Result<UnixStream, AskError> {
    let mut problems = Problems::default();
    let Some((config, _)) = RouterConfig::read(config, &mut problems) else {
        return Err(AskError::Config(format!("the configuration has errors\n{}", problems.render(false))));
    };
    let path = socket_path(&config.node_name);
    UnixStream::connect(&path).map_err(|source| AskError::NotRunning { path, source })
}

/// The status of the router that runs with `config`.
///
/// # Errors
/// Where it does not run or does not answer.
pub fn status(config: &Path) -> Result<Value, AskError> {
    ask(config, &Request::Status)
}

/// New connections by the policy rule that decided about them, of the router that runs with `config`.
///
/// # Errors
/// Where it does not run or does not answer.
pub fn policy_hits(config: &Path) -> Result<HashMap<RuleIdentity, u64>, AskError> {
    let answer: PolicyHits = serde_json::from_value(ask(config, &Request::PolicyHits)?)?;
    Ok(answer.hits.into_iter().map(|(rule, hits)| (RuleIdentity(rule), hits)).collect())
}

/// The addresses of pods that the router that runs with `config` has given.
///
/// # Errors
/// Where it does not run or does not answer.
pub fn ipam(config: &Path) -> Result<Report, AskError> {
    Ok(serde_json::from_value(ask(config, &Request::Ipam)?)?)
}

/// What is in force on the router that runs with `config` and should not be: "differences", or the "problem" for which that cannot be told.
///
/// # Errors
/// Where it does not run or does not answer.
pub fn verify(config: &Path) -> Result<Value, AskError> {
    ask(config, &Request::Verify)
}

/// The answer to [`Request::PolicyHits`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyHits {
    /// [`RuleIdentity`] and count.
    pub hits: Vec<(u64, u64)>,
}

/// The one line that answers a request.
fn ask(config: &Path, request: &Request) -> Result<Value, AskError> {
    let mut stream = connect(config)?;
    let patience = if matches!(request, Request::Verify) { VERIFICATION } else { PATIENCE };
    stream.set_read_timeout(Some(patience)).map_err(AskError::Broken)?;
    writeln!(stream, "{}", serde_json::to_string(request)?).map_err(AskError::Broken)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).map_err(AskError::Broken)?;
    let answer: Value = serde_json::from_str(&answer)?;
    match answer["error"].as_str() {
        Some(error) => Err(AskError::Refused(error.to_owned())),
        None => Ok(answer),
    }
}

/// Asks the router that runs with `config` for many lines, and gives each to `show` until that returns an error. Whether the answer came to
/// its end; the router may also end it by going away.
///
/// # Errors
/// Where no router answers, or its answer cannot be read or shown.
pub fn ask_lines(
    config: &Path,
    request: &Request,
    mut show: impl FnMut(&Value) -> io::Result<()>,
) -> Result<bool, AskError> {
    let stream = connect(config)?;
    // What is watched may say nothing for long; what is listed is read as fast as it comes.
    writeln!(&stream, "{}", serde_json::to_string(request)?).map_err(AskError::Broken)?;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(AskError::Broken)?;
        if line.is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(&line)?;
        if let Some(error) = value["error"].as_str() {
            return Err(AskError::Refused(error.to_owned()));
        }
        if value["end"] == true {
            return Ok(true);
        }
        show(&value).map_err(AskError::Broken)?;
    }
    Ok(false)
}

/// A status for a person.
pub fn status_text(status: &Value) -> String {
    let mut text = String::new();
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let _ = writeln!(text, "node        {}", word(&status["nodeName"]));
    let _ = writeln!(text, "generation  {}", status["generation"]);
    let _ = writeln!(text, "workloads   {}", status["workloads"]);
    let connections = &status["connections"];
    let _ = writeln!(
        text,
        "connections {} IPv4, {} IPv6, of {} each; {} datagrams sent again from a backend that was no more",
        connections["ipv4"], connections["ipv6"], connections["capacity"], connections["sentAgain"]
    );
    for family in ["ipv4", "ipv6"] {
        let table = &status["tables"][family];
        let evicted = &table["evicted"];
        let _ = writeln!(
            text,
            "table       {family}: {} inserted, {} expired, evicted {} closing, {} unproved, {} idle; {} found no room",
            table["inserted"],
            table["expired"],
            evicted["closing"],
            evicted["unproved"],
            evicted["idle"],
            table["refused"],
        );
    }
    let affinity = &status["affinity"];
    let _ = writeln!(
        text,
        "affinity    {} IPv4, {} IPv6 clients, of {} each; {} and {} were evicted before their time",
        affinity["ipv4"]["clients"],
        affinity["ipv6"]["clients"],
        affinity["ipv4"]["capacity"],
        affinity["ipv4"]["evicted"],
        affinity["ipv6"]["evicted"],
    );
    let snat = &status["snat"];
    let _ = writeln!(
        text,
        "snat        {} ports usable; {} connections were given one, {} tries found theirs taken, {} lost theirs unproved",
        snat["usablePorts"], snat["allocated"], snat["taken"], snat["displaced"],
    );
    for address in snat["addresses"].as_array().into_iter().flatten() {
        let _ = write!(text, "snat        {}: {} connections", word(&address["address"]), address["connections"]);
        if let Some(busiest) = address["busiest"].as_object() {
            let _ = write!(
                text,
                "; {} of {} ports in use towards {} {} port {}",
                busiest["portsInUse"],
                snat["usablePorts"],
                word(&busiest["proto"]),
                word(&busiest["dst"]),
                busiest["dport"],
            );
        }
        text.push('\n');
    }
    if let Some(offload) = status["offload"].as_object() {
        let stay = &offload["stay"];
        let _ = writeln!(
            text,
            "offload     {} flows of {} in the kernel; {} handed over, {} after a change, {} taken back, {} evicted; {} packets, {} bytes",
            offload["flows"],
            offload["capacity"],
            offload["handedOver"],
            offload["renewed"],
            offload["takenBack"],
            offload["evicted"],
            offload["packets"],
            offload["bytes"],
        );
        let _ = writeln!(
            text,
            "offload     stay with the workers: {} no slot, {} lead elsewhere, {} unsettled, {} refused by the kernel, {} unheard",
            stay["full"], stay["elsewhere"], stay["unsettled"], stay["refusedByKernel"], stay["unheard"],
        );
    } else {
        let _ = writeln!(text, "offload     off");
    }
    if let Some(pods) = status["pods"].as_object() {
        let list = |key: &str| pods[key].as_array().map_or(&[][..], Vec::as_slice);
        let _ = writeln!(
            text,
            "pods        {} made by weir; {} closed until their object comes, {} requests wait",
            pods["known"],
            list("closedUntilObject").len(),
            list("waiting").len()
        );
        for pod in list("closedUntilObject") {
            let _ = writeln!(text, "pods        {} is closed until its object comes", word(pod));
        }
        for waiting in list("waiting") {
            let [pod, what] = ["pod", "waitsFor"].map(|key| word(&waiting[key]));
            let _ = writeln!(text, "pods        {pod} has waited {} ms for {what}", waiting["waitedMs"]);
        }
        for (key, value) in pods["maker"].as_object().into_iter().flatten() {
            let _ = writeln!(text, "pods        {key}: {}", word(value));
        }
    }
    for mode in status["modes"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "mode        {} {}: {} ({})",
            word(&mode["device"]),
            word(&mode["program"]),
            word(&mode["mode"]),
            word(&mode["reason"]),
        );
    }
    let counters = &status["counters"];
    for name in ["rx", "generated", "tx", "punted", "consumed", "held"] {
        let _ = writeln!(text, "{name:<11} {}", counters[name]);
    }
    for (reason, count) in counters["drops"].as_object().into_iter().flatten() {
        let _ = writeln!(text, "drop        {reason} {count}");
    }
    for faulty in status["faultyObjects"].as_array().into_iter().flatten() {
        let [object, in_force, problem] = ["object", "inForce", "problem"].map(|key| word(&faulty[key]));
        let _ = writeln!(text, "faulty      {object}: {problem}; in force: {in_force}");
    }
    for check in status["healthChecks"].as_array().into_iter().flatten() {
        let [address, service] = ["address", "service"].map(|key| word(&check[key]));
        let endpoints = match check["problem"].as_str() {
            Some(problem) => format!("not answered: {problem}"),
            None => format!("local endpoints: {}", check["localEndpoints"]),
        };
        let _ = writeln!(text, "health      {address} of {service}: {endpoints}");
    }
    if let Some(trouble) = status["trouble"]["now"].as_object() {
        let _ = writeln!(
            text,
            "trouble     {}; for {} s, tried again in {} s",
            word(&trouble["error"]),
            trouble["sinceSeconds"],
            trouble["triedAgainInSeconds"],
        );
    }
    let verify = &status["verify"];
    if verify["differences"].as_u64().is_some_and(|differences| differences > 0) {
        let _ = writeln!(
            text,
            "verify      {} differences in {} runs, {} mended; the log names them",
            verify["differences"], verify["runs"], verify["mended"],
        );
    }
    for note in status["notes"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "note        {}", word(note));
    }
    text
}
