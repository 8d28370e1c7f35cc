//! `weir run`: the router of a node.
//!
//! One control thread ([`crate::router`]) and one pinned thread per worker, with tasks and threads for whatever takes long. When a worker fails, the
//! process ends.

use std::{
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::UnixStream;
use tracing::warn;
use weir_cluster::{
    compile::CompileError,
    config::RouterConfig,
    sources::{keep::Kept, watch::WatchError},
    text::Problems,
};
use weir_dataplane::{
    afxdp::AfXdpError,
    attach::{self, AttachError},
    frame::MAX_MTU,
};

use crate::{
    connections::{self, TablesError},
    control::{self, RUN_FOLDER},
    kernel::{HostPlumbing, KernelError, TRUNK_HOST},
    pods::PodsError,
    router::{self, Started},
};

/// Why the router does not run, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration is bad; the problems are for the user to read.
    #[error("the configuration has errors")]
    Config(Box<Problems>),
    /// It is too large to compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The connection tables.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The kernel's programs, maps or the trunk.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// AF_XDP sockets.
    #[error(transparent)]
    AfXdp(#[from] AfXdpError),
    /// Devices, routes, neighbours.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Watched files.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The pods that weir makes.
    #[error(transparent)]
    Pods(#[from] PodsError),
    /// An uplink of weir.yaml does not exist.
    #[error(
        "weir.yaml names the uplink {0}, but there is no such device in this network namespace (`ip link` lists them)"
    )]
    NoUplink(String),
    /// An uplink has too few queues.
    #[error(
        "the uplink {device} has {queues} receive queues for {workers} workers, and each worker needs one of its own; \
         run `ethtool -L {device} combined {workers}` (on a veth: rx {workers} tx {workers}) or list fewer cores in workers.cores"
    )]
    TooFewQueues {
        /// The uplink.
        device: String,
        /// Its receive queues.
        queues: u32,
        /// Workers.
        workers: u32,
    },
    /// An uplink's MTU is too large.
    #[error(
        "the MTU of {device} is {mtu}, but weir carries at most {MAX_MTU}; lower it with `ip link set {device} mtu {MAX_MTU}`"
    )]
    Mtu {
        /// The device.
        device: String,
        /// Its MTU.
        mtu: u32,
    },
    /// An uplink's MTU has become larger than the frames in use were made for.
    #[error("the MTU of {device} has become {mtu}, but weir was started with room for {room}; start it again")]
    GrownMtu {
        /// The device.
        device: String,
        /// Its MTU.
        mtu: u32,
        /// The largest MTU that there is room for.
        room: u32,
    },
    /// A socket is bound in a lesser mode than required.
    #[error(
        "weir.yaml requires zero-copy of {device}, but its socket is bound in mode {mode}: {reason}; remove `require` or use a device that can"
    )]
    Require {
        /// The device.
        device: String,
        /// The mode that it has.
        mode: &'static str,
        /// Why it has that mode.
        reason: &'static str,
    },
    /// A core of weir.yaml does not exist.
    #[error("workers.cores names core {core}, but this process may run on the cores {allowed:?} only")]
    NoCore {
        /// The core.
        core: usize,
        /// Those there are.
        allowed: Vec<usize>,
    },
    /// Another router uses the socket.
    #[error("a router for this node runs: {0} answers; stop it first")]
    AlreadyRunning(PathBuf),
    /// A worker ended.
    #[error("worker {worker} failed, so the router ends: {source}")]
    Worker {
        /// Which.
        worker: usize,
        /// Why.
        source: io::Error,
    },
    /// It failed for a user who is not root.
    #[error("{0}; routers need root (or all of its capabilities): for BPF, AF_XDP sockets, devices and routes")]
    NotRoot(Box<RunError>),
    /// Something of the system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> RunError {
    let what = what.into();
    move |source| RunError::System { what, source }
}

/// The pin folder of a node's router.
pub fn pin_folder(node_name: &str) -> PathBuf {
    Path::new("/sys/fs/bpf/weir").join(node_name)
}

pub(crate) fn host_record(node_name: &str) -> PathBuf {
    Path::new(RUN_FOLDER).join(format!("{node_name}.host.json"))
}

/// The same error, which says so if missing privileges may be behind it.
fn for_this_user(error: RunError) -> RunError {
    match error {
        RunError::Config(_) => error,
        _ if nix::unistd::geteuid().is_root() => error,
        _ => RunError::NotRoot(Box::new(error)),
    }
}

/// Runs the router until SIGINT or SIGTERM.
///
/// # Errors
/// Where it cannot start, or a part of it fails.
pub fn run(config: &Path) -> Result<(), RunError> {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .with_max_level(tracing::Level::INFO)
        // Its own complaint about a line that cannot be written, as on a full disk, goes to the same place, and panics there.
        .log_internal_errors(false)
        .init();
    raise_descriptor_limit();
    let runtime = runtime()?;
    let Started { mut router, workers, _listener } = runtime.block_on(router::start(config)).map_err(for_this_user)?;
    let served = runtime.block_on(router.serve());
    // Tasks end first, and whoever waits for control with them; what is being prepared is nobody's any more.
    runtime.shutdown_background();
    let ended = workers.end();
    router.end();
    served.and(ended)
}

/// Requests for pods hold descriptors, and so do maps and sockets: there may be as many as the node allows.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        warn!(%error, "the limit of open files stays as it is");
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, RunError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("cannot start the control thread"))
}

/// Takes everything off this node that a router attached; what was done, line by line.
///
/// # Errors
/// Where a router still runs, or something cannot be removed.
pub fn detach(config: &Path) -> Result<Vec<String>, RunError> {
    take_off(config).map_err(for_this_user)
}

fn take_off(config: &Path) -> Result<Vec<String>, RunError> {
    let mut problems = Problems::default();
    let Some((config, _)) = RouterConfig::read(config, &mut problems) else {
        return Err(RunError::Config(Box::new(problems)));
    };
    // Before anything is taken away: a router that runs keeps all of it.
    let socket = control::socket_path(&config.node_name);
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        return Err(RunError::AlreadyRunning(socket));
    }
    let mut lines = Vec::new();
    let host = runtime()?.block_on(HostPlumbing::undo(TRUNK_HOST, &host_record(&config.node_name)))?;
    lines.extend(host.changed);
    let report = attach::detach(&pin_folder(&config.node_name))?;
    lines.extend(report.devices.iter().map(|device| format!("removed the device {device}")));
    if !report.pins.is_empty() {
        lines.push(format!("removed {} pinned links and maps", report.pins.len()));
    }
    let folder = connections::folder(&config.node_name);
    if connections::remove(&folder).map_err(system(format!("cannot remove {}", folder.display())))? {
        lines.push("removed the connection table".into());
    }
    let state = config.state_folder();
    if Kept::remove(&state).map_err(system(format!("cannot remove what is in {}", state.display())))? {
        lines.push("removed the objects kept for the next start".into());
    }
    if lines.is_empty() {
        lines.push("nothing was attached".into());
    }
    Ok(lines)
}

/// Nothing if no router of that node answers.
pub(crate) async fn check_alone(node_name: &str) -> Result<(), RunError> {
    let socket = control::socket_path(node_name);
    match UnixStream::connect(&socket).await {
        Ok(_) => Err(RunError::AlreadyRunning(socket)),
        Err(_) => Ok(()),
    }
}
