//! `weir run`: the router of a node.
//!
//! One control thread (a tokio current-thread runtime) and one pinned thread per worker. Control reads configuration, follows the kernel,
//! attaches the programs, compiles snapshots and publishes them; workers only read snapshots. When a worker fails, the process ends.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    io::{self, IsTerminal as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, sleep_until},
};
use tracing::{error, info, warn};
use weir_cluster::{
    compile::{self, CompileError},
    config::{Cni, OffloadMode, Require, RouterConfig, WorkerMode},
    resources::Substitute,
    sockets::{Listening, PortSet, Sockets},
    sources::watch::{Trigger, Watch, WatchError},
    text::{Problems, Severity},
    translate::{Faulty, Loaded, Loader, Unserved},
};
use weir_conntrack::{Table, file::Restored};
use weir_dataplane::{
    afxdp::{AfXdp, AfXdpError, AfXdpSettings, PortSettings, RingSizes, receive_queues},
    attach::{self, AttachError, Attachment, Owned, SocketDevice, TrunkSettings, UplinkHook},
    clock::now,
    counters::{COUNTERS, Totals},
    driver::PortId,
    forwarding::{Forwarding, is_link_local, local_workloads},
    frame::{IfIndex, MAX_MTU, ONE_FRAME_MTU},
    hits::Hits,
    model::{Device, Links, Neighbor, Role, Route},
    offload::keeper::Keys as _,
    pipeline::{Event, Pipeline},
    snapshot::{Rules, Snapshot},
    tables::Family,
    worker::{Mode, Shared, Worker},
};
use weir_nat::{Affinity, Clients, Model, SnatPorts};
use weir_packet::{Mac, Protocol};
use weir_policy::Compiler;
use weir_sync::{Counters, Domain, Published};

use crate::{
    action_log,
    book::{self, Pods},
    connections::{self, TablesError},
    conntrack,
    control::{self, PolicyHits, RUN_FOLDER, Request},
    health::{self, HealthChecks},
    kernel::{
        DeviceTracker, FollowSettings, HostPlumbing, HostReport, HostSettings, KernelError, KernelState,
        LOOPBACK_SOURCES, Link, RoleRules, TRUNK_HOST, TRUNK_WEIR, Wanted,
    },
    listener::{Listener, writeln_to},
    offload::{Offloader, Offloading},
    pods::{Ask, PodsError},
    prefixes::Prefixes,
    prepare::{self, Basis, Outcome, Prepared, Preparer, Scope, Times},
    report::counters_json,
    services, snat_use,
    trouble::Trouble,
};

/// How often is looked which ports the node listens on.
const PORTS_INTERVAL: Duration = Duration::from_secs(30);
/// How long no pod was made when those that were get their links, and the time between two links: each stops the kernel's work on devices for
/// some 10 ms.
const LINK_QUIET: Duration = Duration::from_secs(1);
const LINK_PAUSE: Duration = Duration::from_millis(50);
/// Events that workers may have waiting for control.
const EVENTS: usize = 4096;
/// Entries of an rx ring that nothing is received by.
const UNUSED_RING: u32 = 64;

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

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> RunError {
    let what = what.into();
    move |source| RunError::System { what, source }
}

/// The pin folder of a node's router.
pub fn pin_folder(node_name: &str) -> PathBuf {
    Path::new("/sys/fs/bpf/weir").join(node_name)
}

fn host_record(node_name: &str) -> PathBuf {
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
    runtime()?.block_on(async {
        let mut router = Router::start(config).await.map_err(for_this_user)?;
        let result = router.serve().await;
        result.and(router.stop())
    })
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
    if lines.is_empty() {
        lines.push("nothing was attached".into());
    }
    Ok(lines)
}

/// The router's control.
struct Router {
    path: PathBuf,
    preparer: Preparer,
    reloads: Reloads,
    loaded: Loaded,
    rules: Arc<Rules>,
    /// Ports that sockets of the node listen on, as far as it matters.
    listening: Listening,
    snat: Arc<SnatPorts>,
    roles: RoleRules,
    kernel: KernelState,
    tracker: DeviceTracker,
    attachment: Attachment,
    /// What the attachment was told last.
    owned: Owned,
    plumbing: HostPlumbing,
    health: HealthChecks,
    /// Where weir makes the pods of this node.
    pods: Option<Pods>,
    hits: Hits,
    /// What the plumbing was told last.
    plumbed: Option<Wanted>,
    /// What could not be done, and is tried again.
    trouble: Trouble,
    /// Whether something was taken over that the snapshot does not have yet.
    unpublished: bool,
    watch: Watch,
    learned: BTreeMap<(IfIndex, IpAddr), Mac>,
    /// The largest MTU of a device that there is room for.
    max_mtu: u32,
    /// Adopted workload devices.
    adopted: BTreeMap<IfIndex, Adopted>,
    /// Whether what was there at the start is in force.
    serves: bool,
    /// When the next of those that were adopted at once gets its link.
    link_due: Option<Instant>,
    links: Links,
    generation: u32,
    shared: Arc<Shared>,
    offload: Option<Offloader>,
    domain: Arc<Domain>,
    counters: Counters<COUNTERS>,
    events: mpsc::Receiver<Event>,
    failures: mpsc::Receiver<(usize, io::Error)>,
    workers: Vec<thread::JoinHandle<()>>,
    modes: Vec<Value>,
    notes: Vec<String>,
    listener: Listener,
}

impl Router {
    async fn start(path: &Path) -> Result<Self, RunError> {
        let config_path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let watch = Watch::new([config_path.clone()])?;
        let mut loader = Loader::new(&config_path);
        // What is wrong is told by the whole load.
        let mut problems = Problems::default();
        let config = RouterConfig::read(&config_path, &mut problems).filter(|_| !problems.has_errors());
        let mut pods = None;
        if let Some((config, _)) = config {
            check_alone(&config.node_name).await?;
            pods = Pods::start(&config)?;
        }
        if let Some(pods) = &pods {
            loader.set_local_pods(Arc::clone(pods.all()));
        }
        let mut loaded = loader.load().map_err(|problems| RunError::Config(Box::new(problems)))?;
        let roles = role_rules(&loaded);
        let kernel = KernelState::follow(FollowSettings::default()).await?;
        loaded.add_local_addresses(&own_addresses(&kernel, &roles));
        loaded.settle_host_ports(prepare::room(&loaded.config), &HashSet::new(), Sockets::read);
        let begin = Instant::now();
        let mut policy = Compiler::default();
        let rules = compile::rules(&loaded, &mut policy)?.counting(loaded.config.workers.cores.len());
        let rules = Arc::new(rules);
        let listening = prepare::listening(&loaded);
        let snat = Arc::new(compile::snat_ports(&loaded, &rules, &listening)?);
        let times = Times { load: loaded.times, compile: begin.elapsed(), publish: Duration::ZERO };
        for warning in loaded.notes.of(Severity::Warning) {
            warn!("{}", loaded.notes.line(warning));
        }
        let config = &loaded.config;
        info!(
            node = config.node_name,
            services = loaded.services.services.len(),
            workloads = local_workloads(&loaded.cluster).count(),
            "configuration compiled"
        );

        let allowed: Vec<usize> = core_ids();
        if let Some(core) = config.workers.cores.iter().find(|core| !allowed.contains(core)) {
            return Err(RunError::NoCore { core: *core, allowed });
        }
        fs::create_dir_all(RUN_FOLDER).map_err(system(format!("cannot make {RUN_FOLDER}")))?;
        let socket = control::socket_path(&config.node_name);
        check_alone(&config.node_name).await?;

        let workers = config.workers.cores.len() as u32;
        let uplinks = check_uplinks(config, &kernel, workers)?;
        let mtus = kernel.links(&roles).devices.into_iter().map(|device| device.mtu);
        let mtus = mtus.chain(config.cni.as_ref().and_then(|cni| cni.mtu));
        let trunk_mtu = mtus.filter(|mtu| *mtu <= MAX_MTU).fold(1500, u32::max);
        let max_mtu = trunk_mtu.max(ONE_FRAME_MTU);
        let mut attachment = Attachment::open(TrunkSettings {
            queues: workers,
            mtu: trunk_mtu,
            flows: (config.offload == OffloadMode::Auto).then_some(config.offload_max_flows),
            pin_dir: pin_folder(&config.node_name),
        })?;

        // What the uplinks' programs take is told before they are attached, so that nothing is taken by mistake.
        let trunk = attachment.trunk();
        let trunk_mac = attach::KERNEL_END_MAC;
        let maps = attachment.take_offload();
        let left = maps.as_ref().map_or(Ok(Vec::new()), |maps| maps.keys.all());
        let left = left.map_err(system("cannot tell which flows are in the kernel"))?;
        // What the process before had learned, and the programs go by.
        let known = maps.iter().flat_map(|maps| maps.pods(&left));
        let learned: BTreeMap<(IfIndex, IpAddr), Mac> =
            known.map(|(device, address, mac)| ((device, address), mac)).collect();
        let mut links = assemble_links(&kernel, &roles, &loaded, &listening, trunk_mac, &learned, max_mtu, &[]);
        let forwarding = Forwarding::compile(&loaded.cluster, &links).map_err(CompileError::from)?;
        let owned = owned(&loaded, &rules, &snat, &forwarding);
        attachment.set_owned(&owned)?;
        for left in attachment.pinned_uplinks()? {
            if !uplinks.iter().any(|uplink| uplink.index.0 == left) {
                attachment.detach_uplink(left)?;
            }
        }
        let required = |device: &str| config.devices.iter().find(|d| d.name == device).and_then(|d| d.require);
        let attach = |uplink: Link| {
            let hook = required(&uplink.name).map(|_| UplinkHook::Xdp);
            let hook = attachment.attach_uplink(uplink.index.0, &uplink.name, hook)?;
            Ok((uplink, hook))
        };
        let uplinks: Vec<(Link, UplinkHook)> = uplinks.into_iter().map(attach).collect::<Result<_, RunError>>()?;

        let domain = Domain::new();
        let mut random = ChaCha8Rng::from_seed(seed()?);
        let folder = connections::folder(&config.node_name);
        let opened = connections::open(&folder, &config.conntrack, &domain, &mut random, now())?;
        for (family, restored) in ["IPv4", "IPv6"].iter().zip(&opened.restored) {
            if let Some(Restored { connections, left_out, .. }) = restored.filter(|r| r.connections + r.left_out > 0) {
                info!(family, connections, left_out, "connections of the process before are taken over");
            }
        }
        let notes = [opened.notes, attachment.notes().to_vec()].concat();
        notes.iter().for_each(|note| warn!("{note}"));
        let offload = Offloading::prepare(maps, left, config.offload_udp_packets);
        let generation = offload.as_ref().map_or(1, Offloading::next_generation);
        let first = Arc::new(Snapshot {
            generation,
            rules: rules.clone(),
            snat: snat.clone(),
            forwarding: Arc::new(forwarding),
        });
        let offload =
            offload.map(|offload| offload.begin(&opened.tables, &domain, &first, near_devices(&kernel, pods.as_ref())));
        let shared = Arc::new(Shared {
            snapshot: Published::new(&domain, first),
            offload: offload.as_ref().map(Offloader::shared),
            tables: opened.tables,
            affinity: Affinity::new(Affinity::DEFAULT_CLIENTS, [random.next_u64(), random.next_u64()]),
            tcp_loose: config.conntrack.tcp_loose,
            stop: AtomicBool::new(false),
        });

        let counters = Counters::<COUNTERS>::new();
        let (event_sender, event_receiver) = crossbeam::channel::bounded(EVENTS);
        let (failure_sender, failures) = mpsc::channel(config.workers.cores.len().max(1));
        let mut modes: Vec<Value> = Vec::new();
        let mut handles = Vec::new();
        for (worker, core) in config.workers.cores.iter().enumerate() {
            let settings = worker_settings(worker as u32, workers, trunk.router_end, &uplinks, max_mtu);
            let driver = AfXdp::open(&settings)?;
            register(&mut attachment, &driver, &settings)?;
            for mode in driver.modes().map_err(system("cannot read a socket's mode"))? {
                info!(
                    worker,
                    device = mode.device,
                    queue = mode.queue,
                    mode = mode.mode,
                    reason = mode.reason,
                    "socket"
                );
                if required(&mode.device) == Some(Require::ZeroCopy) && mode.mode != "zero-copy" {
                    return Err(RunError::Require { device: mode.device, mode: mode.mode, reason: mode.reason });
                }
                modes.push(json!({
                    "device": format!("{} queue {}", mode.device, mode.queue), "program": "socket",
                    "mode": mode.mode, "reason": mode.reason,
                }));
            }
            info!(worker, core, memory_bytes = settings.memory_bytes(), "worker");
            let pipeline = Pipeline::new(
                &shared.tables,
                counters.join(),
                ChaCha8Rng::from_seed(seed()?),
                event_sender.clone(),
                config.workers.burst,
                1 + settings.uplinks.len(),
            )
            .with_fragment_lifetimes(compile::fragment_lifetimes(&config.conntrack));
            let mode = match config.workers.mode {
                WorkerMode::Busy => Mode::Busy,
                WorkerMode::Adaptive => Mode::Adaptive,
            };
            let worker_state = Worker::new(driver, pipeline, domain.join(), shared.clone(), config.workers.burst, mode);
            handles.push(spawn_worker(worker, *core, worker_state, failure_sender.clone())?);
        }

        if let Some(offload) = &offload {
            offload.spawn(shared.clone()).map_err(system("cannot start the thread that hands flows over"))?;
        }
        let plumbing = HostPlumbing::new(HostSettings {
            device: TRUNK_HOST.into(),
            gateway_mac: attach::ROUTER_END_MAC,
            uplinks: uplinks.iter().map(|(uplink, _)| uplink.name.clone()).collect(),
            snat_ports: config.snat.port_range,
            record: host_record(&config.node_name),
        })?;
        let listener = Listener::start(&socket).map_err(system(format!("cannot listen at {}", socket.display())))?;
        links.neighbors.clear();

        let mut router = Self {
            path: config_path,
            preparer: Preparer::new(loader, policy),
            reloads: Reloads::default(),
            roles,
            kernel,
            tracker: DeviceTracker::new(Role::Workload),
            attachment,
            owned,
            plumbing,
            health: HealthChecks::start().map_err(system("cannot start the health checks"))?,
            pods,
            plumbed: None,
            trouble: Trouble::default(),
            unpublished: true,
            watch,
            learned,
            max_mtu,
            adopted: BTreeMap::new(),
            serves: false,
            link_due: None,
            links,
            generation,
            shared,
            offload,
            domain,
            counters,
            events: bridge(event_receiver)?,
            failures,
            workers: handles,
            modes,
            notes,
            listener,
            loaded,
            hits: Hits::new(rules.clone()),
            rules,
            listening,
            snat,
        };
        router.watch_files()?;
        let begin = Instant::now();
        router.devices_changed(true).await?;
        router.health.follow(health::wanted(&router.loaded.services));
        let times = Times { publish: begin.elapsed(), ..times };
        info!(took_ms = %times.to_json(), "configuration in force");
        router.reloads.start = times;
        router.serves = true;
        for mode in router.attachment.modes() {
            info!(device = mode.device, program = mode.program, mode = mode.mode, reason = mode.reason, "program");
        }
        info!("the router runs");
        Ok(router)
    }

    /// Serves until a signal ends it.
    async fn serve(&mut self) -> Result<(), RunError> {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(system("cannot catch SIGINT"))?;
        let mut terminate = signal(SignalKind::terminate()).map_err(system("cannot catch SIGTERM"))?;
        let mut look_at_ports = tokio::time::interval(PORTS_INTERVAL);
        look_at_ports.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = interrupt.recv() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
                failure = self.failures.recv() => {
                    if let Some((worker, source)) = failure {
                        return Err(RunError::Worker { worker, source });
                    }
                }
                changed = self.kernel.changed() => {
                    let outcome = match changed {
                        Ok(changed) if changed.links || changed.routes || changed.neighbors => {
                            self.devices_changed(false).await
                        }
                        Ok(_) => Ok(()),
                        Err(error) => Err(error.into()),
                    };
                    self.go_on(outcome)?;
                }
                event = self.events.recv() => {
                    if let Some(event) = event {
                        let outcome = self.worker_event(event).await;
                        self.go_on(outcome)?;
                    }
                }
                () = sleep_until(self.link_due.unwrap_or_else(Instant::now).into()), if self.link_due.is_some() => {
                    self.link_next();
                }
                _ = look_at_ports.tick() => {
                    let outcome = self.ports_changed().await;
                    self.go_on(outcome)?;
                }
                () = sleep_until(self.trouble.due().unwrap_or_else(Instant::now).into()), if self.trouble.due().is_some() => {
                    self.try_again().await?;
                }
                trigger = self.watch.changed() => {
                    // What a signal asks for is set right also where no file changed.
                    match trigger {
                        Ok(trigger) => {
                            if trigger == Trigger::Signal {
                                self.plumbed = None;
                            }
                            self.begin_reload(Scope::Files);
                        }
                        Err(error) => self.go_on(Err(error.into()))?,
                    }
                }
                prepared = self.preparer.done() => {
                    let outcome = self.reload(prepared).await;
                    self.go_on(outcome)?;
                }
                ask = book::next(&mut self.pods) => match ask {
                    Some(ask) => self.asked(ask).await,
                    None => self.settle_pods(),
                },
                asked = self.listener.next() => {
                    if let Some((request, stream)) = asked
                        && let Err(error) = self.answer(request, stream)
                    {
                        warn!(%error, "a client was not answered");
                    }
                }
            }
        }
    }

    /// Lives with what failed: it is shown, and tried again. Only without the connection to the kernel, or the watcher of the files, there is
    /// nothing left to follow.
    fn go_on(&mut self, outcome: Result<(), RunError>) -> Result<(), RunError> {
        match outcome {
            Err(error @ (RunError::Kernel(KernelError::Closed) | RunError::Watch(WatchError::Ended))) => Err(error),
            Err(error) => {
                self.trouble.note(&error, Instant::now());
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Does everything anew that may have failed.
    async fn try_again(&mut self) -> Result<(), RunError> {
        let begun = self.trouble.begin_try(Instant::now());
        let watched = self.watch_files();
        self.go_on(watched)?;
        let is_workload = |link: &&Link| self.roles.role(&link.name) == Some(Role::Workload) && link.mac.is_some();
        let workloads: Vec<Link> = self.kernel.all().filter(is_workload).cloned().collect();
        self.adopt_all(&workloads);
        let outcome = self.devices_changed(true).await;
        self.go_on(outcome)?;
        self.trouble.end_try(&begun, Instant::now());
        Ok(())
    }

    /// Ends the workers. What is attached stays: pods are closed until the next router adopts them.
    fn stop(&mut self) -> Result<(), RunError> {
        // Nobody is told that a pod is in force that is not served any more.
        self.pods = None;
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut result = Ok(());
        for (number, worker) in self.workers.drain(..).enumerate() {
            if worker.join().is_err() {
                let source = io::Error::other("it panicked at its end; the message is above");
                result = Err(RunError::Worker { worker: number, source });
            }
        }
        let totals = self.totals();
        info!(rx = totals.rx, tx = totals.tx, punted = totals.punted, dropped = totals.dropped(), "the router ends");
        info!("programs stay attached, so pods stay closed until weir runs again; `weir detach` takes everything off");
        result
    }

    fn watch_files(&mut self) -> Result<(), RunError> {
        let files = std::iter::once(self.path.clone()).chain(self.loaded.config.manifests.iter().cloned());
        Ok(self.watch.set_paths(files.collect::<Vec<_>>())?)
    }

    /// Brings attachments and forwarding up to what the kernel has now.
    async fn devices_changed(&mut self, even_if_same: bool) -> Result<(), RunError> {
        // What fails keeps nothing else from being done: it is not seen as a change once more.
        let followed = self.follow_own_addresses().map(drop);
        let changes = self.tracker.update(self.kernel.all(), &self.roles);
        let mut forgotten = Ok(());
        for gone in &changes.gone {
            self.learned.retain(|(device, _), _| *device != gone.index);
            if changes.appeared.iter().any(|link| link.index == gone.index) {
                // Another one has its index, or it has another name: its program is attached anew.
                self.adopted.remove(&gone.index);
            } else if attach::is_gone(gone.index.0) {
                self.adopted.remove(&gone.index);
                forgotten = forgotten.and(self.attachment.forget_workload(gone.index.0));
                info!(device = gone.name, "workload device gone");
            } else {
                warn!(
                    device = gone.name,
                    index = gone.index.0,
                    "a workload's device has another name; it stays closed"
                );
            }
        }
        let forgotten = forgotten.map_err(RunError::from).and(self.forget_adopted());
        self.adopt_all(changes.appeared.iter().chain(&changes.altered));
        let published = self.publish(even_if_same).await;
        self.settle_pods();
        followed.and(forgotten).and(published)
    }

    /// Forgets devices that are gone and were no workloads' by then, or not yet.
    fn forget_adopted(&mut self) -> Result<(), RunError> {
        let followed: BTreeSet<IfIndex> = self.kernel.all().map(|link| link.index).collect();
        // What was adopted a moment ago may not have been followed yet.
        let is_gone = |index: &&IfIndex| !followed.contains(index) && attach::is_gone(index.0);
        let gone: Vec<IfIndex> = self.adopted.keys().filter(is_gone).copied().collect();
        let mut forgotten = Ok(());
        for index in gone {
            self.adopted.remove(&index);
            forgotten = forgotten.and(self.attachment.forget_workload(index.0));
            info!(index = index.0, "a device that was a workload's is gone");
        }
        Ok(forgotten?)
    }

    /// Opens node ports and host ports on addresses that the node did not have before, and closes them on those that it has no more; whether
    /// there are such. While a configuration is prepared, they wait for it.
    fn follow_own_addresses(&mut self) -> Result<bool, RunError> {
        if self.preparer.policy().is_none() {
            return Ok(false);
        }
        let known = |loaded: &Loaded| loaded.services.local_addresses.iter().copied().collect::<BTreeSet<_>>();
        let before = known(&self.loaded);
        self.loaded.add_local_addresses(&own_addresses(&self.kernel, &self.roles));
        if known(&self.loaded) == before {
            return Ok(false);
        }
        self.settle_host_ports(Sockets::read);
        self.compile_services()?;
        self.health.follow(health::wanted(&self.loaded.services));
        Ok(true)
    }

    /// Settles which host ports are served by what the node has now; whether others are.
    fn settle_host_ports(&mut self, sockets: impl FnOnce() -> Sockets) -> bool {
        let served = self.loaded.served_host_ports();
        self.loaded.settle_host_ports(prepare::room(&self.loaded.config), &served, sockets);
        self.loaded.served_host_ports() != served
    }

    fn compile_services(&mut self) -> Result<(), RunError> {
        let Some(policy) = self.preparer.policy() else { return Ok(()) };
        self.rules = Arc::new(compile::rules(&self.loaded, policy)?.counting(self.workers.len()));
        self.snat = Arc::new(compile::snat_ports(&self.loaded, &self.rules, &self.listening)?);
        Ok(())
    }

    /// Opens host ports whose ports a socket of the node had until now. While a configuration is prepared, they wait for it.
    async fn open_freed_host_ports(&mut self) -> Result<(), RunError> {
        if self.loaded.host_ports_in_use().next().is_none() || self.preparer.policy().is_none() {
            return Ok(());
        }
        let Ok(sockets) = tokio::task::spawn_blocking(Sockets::read).await else { return Ok(()) };
        if self.settle_host_ports(|| sockets) {
            self.compile_services()?;
            self.publish(true).await?;
        }
        Ok(())
    }

    /// Attaches workload devices, where what that depends on is not as it was.
    fn adopt_all<'l>(&mut self, links: impl IntoIterator<Item = &'l Link>) {
        for link in links {
            match self.adopt(link) {
                // Gone again already: the next change says so.
                Ok(()) | Err(AttachError::DeviceGone { .. }) => {}
                Err(error) => {
                    error!(device = link.name, %error, "the workload cannot be adopted");
                    self.trouble.note(&error, Instant::now());
                }
            }
        }
    }

    fn adopt(&mut self, link: &Link) -> Result<(), AttachError> {
        // The kernel tells late where the other end is, but those that weir makes are pods'.
        let peer_elsewhere = link.peer_elsewhere || self.pods.as_ref().is_some_and(|pods| pods.own_device(&link.name));
        let facts = Adopted { mac: link.mac, peer_elsewhere, mtu: link.mtu };
        let before = self.adopted.insert(link.index, facts);
        if before == Some(facts) {
            return Ok(());
        }
        // A link costs an RCU grace period, some 10 ms.
        if before.is_none_or(|before| Adopted { mtu: facts.mtu, ..before } != facts) {
            let mac = link.mac.unwrap_or_default();
            // Where weir makes the pods, one waits for it; what is there at the start has time.
            let adopted = match &self.pods {
                Some(_) if self.serves => {
                    self.link_due = Some(Instant::now() + LINK_QUIET);
                    self.attachment.adopt_workload_at_once(link.index.0, &link.name, mac, peer_elsewhere)
                }
                _ => self.attachment.adopt_workload(link.index.0, &link.name, mac, peer_elsewhere),
            };
            if let Err(error) = adopted {
                self.adopted.remove(&link.index);
                return Err(error);
            }
        }
        if link.mtu > MAX_MTU {
            error!(
                device = link.name,
                mtu = link.mtu,
                "the workload stays closed: weir carries an MTU of at most {MAX_MTU}"
            );
        } else if link.mtu > self.max_mtu {
            error!(
                device = link.name,
                mtu = link.mtu,
                "the workload stays closed: by the devices that it was started with, weir has room for an MTU of at most {}; start weir \
                 again, or lower the MTU",
                self.max_mtu
            );
        } else {
            info!(device = link.name, index = link.index.0, "workload device adopted");
        }
        Ok(())
    }

    /// Gives a workload that was adopted at once its link.
    fn link_next(&mut self) {
        let is_one = self.attachment.link_next().unwrap_or_else(|error| {
            error!(%error, "a workload keeps its filter, which serves it but can be removed by others");
            true
        });
        self.link_due = is_one.then(|| Instant::now() + LINK_PAUSE);
    }

    /// Does what the maker of pods asks.
    async fn asked(&mut self, ask: Ask) {
        let Some(book) = self.pods.as_mut().map(Pods::book) else { return };
        let is_new = match ask {
            Ask::Close { device, answer } => {
                let closed = self.close(&device).await;
                if let Err(why) = &closed {
                    warn!(device, why, "a new pod's device cannot be closed");
                }
                drop(answer.send(closed));
                return;
            }
            Ask::Put { pod, patience, answer } => book.put(&pod, patience, answer),
            Ask::Gone { namespace, name, sandbox, answer } => {
                book.gone(&format!("{namespace}/{name}"), &sandbox, answer)
            }
            Ask::Serves { device, answer } => {
                let is_served = |device: String| {
                    self.pods.as_ref().is_some_and(|pods| pods.own_device(&device))
                        && is_served(&device, &self.adopted, &self.links)
                };
                let _ = answer.send(device.is_none_or(is_served));
                return;
            }
        };
        if is_new {
            self.begin_reload(Scope::LocalPods);
        } else {
            self.settle_pods();
        }
    }

    /// Attaches the program to a device that is about to become a pod's, and which may not have been followed yet.
    async fn close(&mut self, device: &str) -> Result<(), String> {
        let link = self.kernel.ask(device).await.map_err(|error| error.to_string())?;
        let link = link.ok_or_else(|| format!("there is no device {device} in the router's network namespace"))?;
        if self.roles.uplinks.contains(device) || self.roles.trunk.iter().any(|end| end == device) {
            return Err(format!("{device} is no pod's device"));
        }
        let link = Link { peer_elsewhere: true, ..link };
        self.adopt(&link).map_err(|error| error.to_string())
    }

    /// Answers for pods that are in force by now.
    fn settle_pods(&mut self) {
        // What was taken over is not in force yet.
        if self.unpublished {
            return;
        }
        let Self { pods: Some(pods), loaded, links, kernel, roles, adopted, .. } = self else { return };
        pods.configure(book::ranges(loaded, links, &own_addresses(kernel, roles)));
        let has_device = |name: &str| is_served(name, adopted, links);
        if pods.book().settle(&loaded.local_pods, &loaded.undescribed, has_device) {
            self.begin_reload(Scope::LocalPods);
        }
    }

    /// Compiles and publishes forwarding, if anything that it depends on changed.
    async fn publish(&mut self, even_if_same: bool) -> Result<(), RunError> {
        let trunk_mac = self.trunk_mac();
        let Self { kernel, roles, loaded, listening, learned, max_mtu: room, .. } = self;
        let known: Vec<Device> = self.links.devices.iter().filter(|d| d.role == Role::Uplink).cloned().collect();
        let links = assemble_links(kernel, roles, loaded, listening, trunk_mac, learned, *room, &known);
        // All else goes on: what is wrong with an uplink is told in the end.
        let uplinks = check_running(kernel, roles, *room);
        if links == self.links && !even_if_same && !self.unpublished {
            return uplinks;
        }
        let even_if_same = even_if_same || self.unpublished;
        let devices_differ = links.devices != self.links.devices;
        // The kernel's way to pods does not depend on their devices.
        let nodes_own = |links: &Links| -> Vec<Device> {
            links.devices.iter().filter(|device| device.role != Role::Workload).cloned().collect()
        };
        let other_devices_differ = devices_differ && nodes_own(&links) != nodes_own(&self.links);
        let forwarding = Forwarding::compile(&self.loaded.cluster, &links).map_err(CompileError::from)?;
        if devices_differ || even_if_same {
            let owned = owned(&self.loaded, &self.rules, &self.snat, &forwarding);
            if owned != self.owned {
                self.attachment.set_owned(&owned)?;
                self.owned = owned;
            }
        }
        self.links = links;
        self.generation = self.generation.wrapping_add(1).max(1);
        let next = Arc::new(Snapshot {
            generation: self.generation,
            rules: self.rules.clone(),
            snat: self.snat.clone(),
            forwarding: Arc::new(forwarding),
        });
        if let Some(offload) = &self.offload {
            offload.prepare(&next, &self.shared.tables, near_devices(&self.kernel, self.pods.as_ref()));
        }
        self.shared.snapshot.publish(next);
        self.unpublished = false;
        self.hits.follow(&self.rules);
        if devices_differ || even_if_same {
            let wanted = self.wanted();
            // Listing the kernel's routes takes its time where there are many.
            if other_devices_differ || self.plumbed.as_ref() != Some(&wanted) {
                let report = self.plumbing.apply(&wanted).await?;
                self.tell(report);
                self.plumbed = Some(wanted);
            }
        }
        uplinks
    }

    fn trunk_mac(&self) -> Mac {
        self.links.devices.iter().find(|d| d.role == Role::Host).map(|d| d.mac).unwrap_or_default()
    }

    fn tell(&mut self, report: HostReport) {
        for line in report.changed {
            info!("{line}");
        }
        for line in report.warnings {
            if !self.notes.contains(&line) {
                warn!("{line}");
                self.notes.push(line);
            }
        }
    }

    /// What the node's kernel shall reach through weir.
    fn wanted(&self) -> Wanted {
        let cluster = &self.loaded.cluster;
        let mut through: Vec<IpNet> = cluster.nodes.iter().flat_map(|n| n.pod_cidrs.iter().copied()).collect();
        through.extend(cluster.pools.iter().map(|p| p.cidr));
        let ranges: Prefixes = through.iter().copied().collect();
        through.extend(&cluster.service_cidrs);
        through.extend(self.rules.services.owned_addresses().map(IpNet::from));
        let own = cluster.nodes.iter().find(|n| n.name == cluster.node_name);
        let internal = own.map(|n| n.internal_ips.as_slice()).unwrap_or_default();
        let mut wanted = Wanted::new(&self.links, through, internal);
        // Other nodes are reached as ever, also where a prefix of pods covers them.
        wanted.except.extend(cluster.nodes.iter().flat_map(|n| n.internal_ips.iter().map(|ip| IpNet::from(*ip))));
        // What a range of pods holds needs no route of its own, but where an exception comes between.
        let except: Prefixes = wanted.except.iter().copied().collect();
        let pods = cluster.workloads.iter().flat_map(|w| &w.addresses);
        let pods = pods.filter(|ip| !ranges.hold(**ip) || except.hold(**ip));
        wanted.through.extend(pods.map(|ip| IpNet::from(*ip)));
        // Loopback's too, and those that wait for a socket to go: nobody else is to get one by chance meanwhile.
        let node_ports = self.rules.services.node_ports().map(|(_, port)| port);
        let own = self.rules.services.own_frontends().iter().map(|(.., port)| *port);
        wanted.ports = PortSet::of(node_ports.chain(own).chain(self.loaded.host_ports_in_use()));
        wanted
    }

    async fn worker_event(&mut self, event: Event) -> Result<(), RunError> {
        match event {
            Event::Logged(logged) => {
                action_log::write(&logged);
                Ok(())
            }
            Event::Resolve { device, address } => {
                // A refusal means that the device just went; the packets that wait are dropped in time.
                if let Err(error) = self.kernel.resolver().resolve(address, device).await {
                    warn!(%address, device = device.0, %error, "a neighbour cannot be asked for");
                }
                Ok(())
            }
            Event::Learned { device, address, mac } => {
                if self.learned.insert((device, address), mac) == Some(mac) {
                    return Ok(());
                }
                self.publish(false).await
            }
        }
    }

    /// Leaves ports alone that the node has begun to listen on, and takes back those that it has ceased to.
    async fn ports_changed(&mut self) -> Result<(), RunError> {
        self.open_freed_host_ports().await?;
        let (range, has_host_endpoints) =
            (self.loaded.config.snat.port_range, !self.loaded.cluster.host_endpoints.is_empty());
        // The kernel lists all sockets to find these, which takes its time where there are many.
        let read = move || Listening::read().relevant(range, has_host_endpoints);
        let Ok(listening) = tokio::task::spawn_blocking(read).await else { return Ok(()) };
        if listening == self.listening {
            return Ok(());
        }
        match compile::snat_ports(&self.loaded, &self.rules, &listening) {
            Ok(snat) => (self.listening, self.snat) = (listening, Arc::new(snat)),
            Err(error) => {
                warn!(%error, "source ports stay as they were");
                return Ok(());
            }
        }
        self.publish(true).await
    }

    fn begin_reload(&mut self, scope: Scope) {
        let Self { preparer, loaded, kernel, roles, pods, listening, .. } = self;
        preparer.begin(scope, || Basis {
            in_force: Arc::clone(&loaded.objects),
            own_addresses: own_addresses(kernel, roles),
            local_pods: pods.as_ref().map(|pods| Arc::clone(pods.all())).unwrap_or_default(),
            listening: listening.clone(),
            host_ports: loaded.served_host_ports(),
        });
    }

    /// Takes over a configuration that is ready. A bad one changes nothing.
    async fn reload(&mut self, prepared: Outcome) -> Result<(), RunError> {
        let mut due = None;
        let mut outcome = Ok(());
        match prepared {
            Ok(prepared) => outcome = self.take_over(prepared).await,
            Err((Scope::LocalPods, refused)) => {
                error!("pods cannot be put in force:\n{refused}");
                if let Some(pods) = &mut self.pods {
                    pods.book().refuse(&self.loaded.local_pods, &refused.to_string());
                }
            }
            Err((Scope::Files, refused)) => {
                error!("reload refused, the last good configuration stays:\n{refused}");
                self.reloads.refused += 1;
                self.reloads.problems = refused.lines();
                outcome = match self.follow_own_addresses() {
                    Ok(true) => self.publish(true).await,
                    followed => followed.map(drop),
                };
                // Pods do not wait for who mends the files.
                let is_in_force = |pods: &Pods| Arc::ptr_eq(pods.all(), &self.loaded.local_pods);
                due = self.pods.as_ref().filter(|pods| !is_in_force(pods)).map(|_| Scope::LocalPods);
            }
        }
        if let Some(scope) = self.preparer.due().max(due) {
            self.begin_reload(scope);
        }
        outcome
    }

    async fn take_over(&mut self, prepared: Prepared) -> Result<(), RunError> {
        let begin = Instant::now();
        let Prepared { scope, loaded, problems, rules, listening, snat, times } = prepared;
        let has_new_files = scope == Scope::Files;
        if let Some(problems) = problems.filter(|_| has_new_files) {
            warn!("objects are faulty, and others stand for them:\n{}", problems.render(false));
            for Faulty { object, substitute, .. } in &loaded.faulty {
                match substitute {
                    Substitute::LastGood => warn!(object, "its last good version stays"),
                    Substitute::Nothing => warn!(object, "left out; a policy denies what it selects"),
                }
            }
        }
        if loaded.config.workers != self.loaded.config.workers || role_rules(&loaded).uplinks != self.roles.uplinks {
            warn!("changed workers, uplinks or nodeName take effect at the next start only");
        }
        let apart_from_mtu = |config: &RouterConfig| config.cni.clone().map(|cni| Cni { mtu: None, ..cni });
        if apart_from_mtu(&loaded.config) != apart_from_mtu(&self.loaded.config) {
            warn!("a changed section cni takes effect at the next start only, but for its mtu");
        }
        let before = self.loaded.unserved_host_ports();
        for Unserved { pod, protocol, port, why } in
            loaded.unserved_host_ports().iter().filter(|unserved| !before.contains(unserved))
        {
            warn!(pod, %protocol, port, "its hostPort is not served: {why}");
        }
        let other_files = loaded.config.manifests != self.loaded.config.manifests;
        self.roles.workloads = role_rules(&loaded).workloads;
        self.loaded = loaded;
        self.unpublished = true;
        self.rules = Arc::new(rules.counting(self.workers.len()));
        (self.listening, self.snat) = (listening, Arc::new(snat));
        let mut outcome = self.follow_own_addresses().map(drop);
        if other_files {
            outcome = outcome.and(self.watch_files());
            // They may have changed after they were read and before they were watched.
            self.preparer.once_more();
        }
        let changes = self.tracker.update(self.kernel.all(), &self.roles);
        for gone in &changes.gone {
            // Still there, but no workload any more: it stays closed.
            self.learned.retain(|(device, _), _| *device != gone.index);
        }
        self.adopt_all(&changes.appeared);
        if has_new_files {
            self.health.follow(health::wanted(&self.loaded.services));
        }
        let published = self.publish(true).await;
        self.settle_pods();
        outcome = outcome.and(published);
        let times = Times { publish: begin.elapsed(), ..times };
        if self.unpublished {
            return outcome;
        }
        if !has_new_files {
            self.reloads.pods = Some(times);
            return outcome;
        }
        self.shared.affinity.forget_gone(&self.rules.services);
        info!(generation = self.generation, took_ms = %times.to_json(), "reloaded");
        self.reloads.taken_over(times);
        outcome
    }

    fn totals(&self) -> Totals {
        Totals::new(&self.counters.sums(), 0)
    }

    fn answer(&mut self, request: Request, mut stream: UnixStream) -> io::Result<()> {
        match request {
            Request::Status => {
                let mut status = self.status();
                let mut stream = blocking(stream)?;
                let shared = self.shared.clone();
                // Reads the tables, which may take long, and a reader may be slow.
                thread::Builder::new().name("weir-status".into()).spawn(move || {
                    status["snat"]["addresses"] = snat_use::of_both(&shared.tables, now());
                    drop(writeln!(stream, "{status}"));
                })?;
            }
            Request::PolicyHits => {
                let mut stream = blocking(stream)?;
                let hits = self.hits.clone();
                // Many rules are a long answer.
                thread::Builder::new().name("weir-policy".into()).spawn(move || {
                    let hits = hits.by_rule().into_iter().map(|(rule, hits)| (rule.0, hits)).collect();
                    drop(writeln!(stream, "{}", json!(PolicyHits { hits })));
                })?;
            }
            Request::Ipam => {
                let Some(pods) = &self.pods else {
                    let answer = json!({"error": "this router makes no pods: its weir.yaml had no section cni"});
                    tokio::spawn(async move { drop(writeln_to(&mut stream, &answer).await) });
                    return Ok(());
                };
                let mut stream = blocking(stream)?;
                let server = Arc::clone(pods.server());
                // It reads files, and asks the kernel for devices.
                thread::Builder::new().name("weir-ipam".into()).spawn(move || {
                    let answer = match server.explain() {
                        Ok(report) => json!(report),
                        Err(error) => json!({"error": error.to_string()}),
                    };
                    drop(writeln!(stream, "{answer}"));
                })?;
            }
            Request::Conntrack(query) => {
                let stream = blocking(stream)?;
                let (shared, domain) = (self.shared.clone(), self.domain.clone());
                // A reader that goes away ends the thread.
                thread::Builder::new()
                    .name("weir-conntrack".into())
                    .spawn(move || drop(conntrack::answer(stream, &shared, &domain, &query)))?;
            }
            Request::Services(query) => {
                let stream = blocking(stream)?;
                let all = &self.loaded.services;
                let services = all.services.iter().filter(|service| query.matches(&service.name)).cloned().collect();
                let model =
                    Model { node_name: all.node_name.clone(), zone: all.zone.clone(), services, ..Model::default() };
                let hits = self.hits.by_backend();
                thread::Builder::new()
                    .name("weir-services".into())
                    .spawn(move || drop(services::answer(stream, &model, &hits)))?;
            }
        }
        Ok(())
    }

    fn status(&self) -> Value {
        let programs = self.attachment.modes().into_iter().map(
            |mode| json!({"device": mode.device, "program": mode.program, "mode": mode.mode, "reason": mode.reason}),
        );
        let kernel: serde_json::Map<String, Value> = match self.attachment.counters() {
            Ok(counters) => counters.iter().map(|(counter, n)| (format!("{counter:?}"), n.into())).collect(),
            Err(_) => serde_json::Map::new(),
        };
        let totals = self.totals();
        let affinity = &self.shared.affinity;
        json!({
            "nodeName": self.loaded.config.node_name,
            "generation": self.generation,
            "workers": self.loaded.config.workers.cores,
            "workloads": self.links.devices.iter().filter(|d| d.role == Role::Workload).count(),
            "modes": programs.chain(self.modes.iter().cloned()).collect::<Vec<_>>(),
            "connections": {
                "ipv4": self.shared.tables.v4.len(), "ipv6": self.shared.tables.v6.len(),
                "capacity": self.shared.tables.v4.capacity(), "sentAgain": totals.sent_again,
            },
            "tables": {
                "ipv4": table_json(&self.shared.tables.v4), "ipv6": table_json(&self.shared.tables.v6),
            },
            "affinity": {
                "ipv4": affinity_json(affinity.clients::<Ipv4Addr>()),
                "ipv6": affinity_json(affinity.clients::<Ipv6Addr>()),
                "memoryBytes": affinity.memory_bytes(),
            },
            "snat": {
                "usablePorts": self.snat.count(), "allocated": totals.snat_allocated, "taken": totals.snat_taken,
                "displaced": totals.snat_displaced,
            },
            "offload": self.offload.as_ref().map(Offloader::to_json),
            "counters": counters_json(&totals),
            "configuration": self.reloads.to_json(),
            "faultyObjects": self.loaded.faulty.iter().map(|faulty| json!({
                "object": faulty.object,
                "inForce": match faulty.substitute {
                    Substitute::LastGood => "last good version",
                    Substitute::Nothing => "nothing; a policy denies what it selects",
                },
                "problem": faulty.problem,
            })).collect::<Vec<_>>(),
            "unservedHostPorts": self.loaded.unserved_host_ports().iter().map(|unserved| json!({
                "pod": unserved.pod, "proto": unserved.protocol.to_string().to_lowercase(), "hostPort": unserved.port,
                "why": unserved.why,
            })).collect::<Vec<_>>(),
            "healthChecks": self.health.status(),
            "pods": self.pods.as_ref().map(|pods| pods.status(&self.loaded)),
            "programs": kernel,
            "trouble": self.trouble.to_json(Instant::now()),
            "notes": self.notes,
        })
    }
}

/// A client's connection, for a thread that waits for it.
fn blocking(stream: UnixStream) -> io::Result<std::os::unix::net::UnixStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// What became of changed configurations.
#[derive(Default)]
struct Reloads {
    /// The first load's.
    start: Times,
    /// The last reload's.
    last: Option<Times>,
    /// The last one's for the sake of pods that weir made.
    pods: Option<Times>,
    taken_over: u64,
    refused: u64,
    /// Why the newest one is refused; empty where it is in force.
    problems: Vec<String>,
}

impl Reloads {
    fn taken_over(&mut self, times: Times) {
        self.last = Some(times);
        self.taken_over += 1;
        self.problems.clear();
    }

    fn to_json(&self) -> Value {
        json!({
            "newestInForce": self.problems.is_empty(), "problems": self.problems,
            "reloads": self.taken_over, "refused": self.refused,
            "startMs": self.start.to_json(), "lastReloadMs": self.last.map(Times::to_json),
            "lastPodsMs": self.pods.map(Times::to_json),
        })
    }
}

/// A connection table's totals.
fn table_json<A: Family>(table: &Table<A>) -> Value {
    let counts = table.counts();
    json!({
        "connections": table.len(), "capacity": table.capacity(), "memoryBytes": table.memory_bytes(),
        "inserted": counts.inserted, "expired": counts.expired, "retried": counts.retried, "refused": counts.full,
        "evicted": {
            "closing": counts.evicted_closing, "unproved": counts.evicted_unproved, "idle": counts.evicted_idle,
        },
    })
}

/// What is remembered of the clients of one family.
fn affinity_json<A: Family>(clients: &Clients<A>) -> Value {
    json!({"clients": clients.count(now()), "capacity": clients.capacity(), "evicted": clients.evicted()})
}

/// What the adoption of a device depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Adopted {
    mac: Option<Mac>,
    peer_elsewhere: bool,
    mtu: u32,
}

/// Whether programs and what was published know the device of that name. The device before may still be known by the same name.
fn is_served(name: &str, adopted: &BTreeMap<IfIndex, Adopted>, links: &Links) -> bool {
    attach::index_of(name).map(IfIndex).is_some_and(|index| {
        let is_it = |device: &Device| device.index == index && device.role == Role::Workload;
        adopted.contains_key(&index) && links.devices.iter().any(is_it)
    })
}

/// Devices whose other end is in this network namespace too; those of pods that weir makes never are.
fn near_devices(kernel: &KernelState, pods: Option<&Pods>) -> BTreeSet<u32> {
    let is_near = |link: &&Link| !link.peer_elsewhere && !pods.is_some_and(|pods| pods.own_device(&link.name));
    kernel.all().filter(is_near).map(|link| link.index.0).collect()
}

/// Nothing if no router of that node answers.
async fn check_alone(node_name: &str) -> Result<(), RunError> {
    let socket = control::socket_path(node_name);
    match UnixStream::connect(&socket).await {
        Ok(_) => Err(RunError::AlreadyRunning(socket)),
        Err(_) => Ok(()),
    }
}

fn core_ids() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}

fn seed() -> Result<[u8; 32], RunError> {
    use io::Read;
    let mut seed = [0; 32];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut seed))
        .map_err(system("cannot read /dev/urandom"))?;
    Ok(seed)
}

fn role_rules(loaded: &Loaded) -> RoleRules {
    let of_role = |role: Role| loaded.config.devices.iter().filter(move |d| d.role == role).map(|d| d.name.clone());
    let workloads = local_workloads(&loaded.cluster).map(|(_, w)| w.device.clone());
    RoleRules::new(of_role(Role::Uplink), workloads.chain(of_role(Role::Workload)))
}

/// The uplinks of weir.yaml in their order.
fn check_uplinks(config: &RouterConfig, kernel: &KernelState, workers: u32) -> Result<Vec<Link>, RunError> {
    let uplinks = config.devices.iter().filter(|d| d.role == Role::Uplink);
    uplinks
        .map(|uplink| {
            let mut link = kernel.link(&uplink.name).ok_or_else(|| RunError::NoUplink(uplink.name.clone()))?.clone();
            match receive_queues(&uplink.name) {
                Ok(queues) => link.rx_queues = queues,
                // It uses all that it has.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(error) => return Err(system("cannot ask an uplink for its queues")(error)),
            }
            if link.mtu > MAX_MTU {
                return Err(RunError::Mtu { device: uplink.name.clone(), mtu: link.mtu });
            }
            if link.rx_queues < workers {
                return Err(RunError::TooFewQueues { device: uplink.name.clone(), queues: link.rx_queues, workers });
            }
            Ok(link)
        })
        .collect()
}

/// Whether the uplinks that the router was started with are as it can use them.
fn check_running(kernel: &KernelState, roles: &RoleRules, room: u32) -> Result<(), RunError> {
    for name in &roles.uplinks {
        match kernel.link(name) {
            Some(link) if link.mtu > room => {
                return Err(RunError::GrownMtu { device: name.clone(), mtu: link.mtu, room });
            }
            Some(_) => {}
            None => return Err(RunError::NoUplink(name.clone())),
        }
    }
    Ok(())
}

/// Worker `worker` owns its queue of the trunk and every `workers`-th queue of each uplink. The first queue of each uplink
/// comes first, so that port numbers are those of the forwarding tables for all workers. On an uplink whose packets come by the trunk it
/// sends only, and needs one queue.
fn worker_settings(worker: u32, workers: u32, trunk: u32, uplinks: &[(Link, UplinkHook)], mtu: u32) -> AfXdpSettings {
    let port = |(uplink, hook): &(Link, UplinkHook), queue: u32| PortSettings {
        device: uplink.name.clone(),
        index: uplink.index,
        mac: uplink.mac.unwrap_or_default(),
        queue,
        sizes: match hook {
            UplinkHook::Xdp => RingSizes::default(),
            UplinkHook::Tc => RingSizes { rx: UNUSED_RING, ..RingSizes::default() },
        },
    };
    let first = uplinks.iter().map(|uplink| port(uplink, worker));
    let received_by = uplinks.iter().filter(|(_, hook)| *hook == UplinkHook::Xdp);
    let further = received_by.flat_map(|uplink| {
        (worker + workers..uplink.0.rx_queues).step_by(workers as usize).map(move |queue| port(uplink, queue))
    });
    AfXdpSettings {
        trunk: PortSettings {
            device: TRUNK_WEIR.into(),
            index: IfIndex(trunk),
            mac: Mac::default(),
            queue: worker,
            sizes: RingSizes::default(),
        },
        uplinks: first.chain(further).collect(),
        spare_frames: AfXdpSettings::default_spare_frames(mtu),
        mtu,
    }
}

fn register(attachment: &mut Attachment, driver: &AfXdp, settings: &AfXdpSettings) -> Result<(), RunError> {
    attachment.register_socket(SocketDevice::Trunk, settings.trunk.queue, driver.socket(PortId::TRUNK).as_fd())?;
    for (position, uplink) in settings.uplinks.iter().enumerate() {
        let socket = driver.socket(PortId(position as u8 + 1));
        attachment.register_socket(SocketDevice::Uplink(uplink.index.0), uplink.queue, socket.as_fd())?;
    }
    Ok(())
}

fn spawn_worker(
    number: usize,
    core: usize,
    mut worker: Worker<AfXdp>,
    failures: mpsc::Sender<(usize, io::Error)>,
) -> Result<thread::JoinHandle<()>, RunError> {
    /// Tells control when the worker ends by a panic.
    struct Guard(usize, mpsc::Sender<(usize, io::Error)>);
    impl Drop for Guard {
        fn drop(&mut self) {
            if thread::panicking() {
                let _ = self.1.try_send((self.0, io::Error::other("it panicked; the message is above")));
            }
        }
    }
    thread::Builder::new()
        .name(format!("weir-worker-{number}"))
        .spawn(move || {
            let guard = Guard(number, failures);
            if !core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
                let _ = guard.1.try_send((number, io::Error::other(format!("it cannot be pinned to core {core}"))));
                return;
            }
            if let Err(error) = worker.run() {
                let _ = guard.1.try_send((number, error));
            }
        })
        .map_err(system("cannot start a worker"))
}

/// Events of the workers, for the control thread's runtime.
fn bridge(events: crossbeam::channel::Receiver<Event>) -> Result<mpsc::Receiver<Event>, RunError> {
    let (sender, receiver) = mpsc::channel(EVENTS);
    thread::Builder::new()
        .name("weir-events".into())
        .spawn(move || events.iter().try_for_each(|event| sender.blocking_send(event)))
        .map_err(system("cannot start the event thread"))?;
    Ok(receiver)
}

/// This node's own addresses, link-local ones (the trunk's among them) excepted.
fn own_addresses(kernel: &KernelState, roles: &RoleRules) -> Vec<IpAddr> {
    kernel.node_addresses(roles).into_iter().filter(|address| !is_link_local(*address)).collect()
}

/// The devices, routes and neighbours that forwarding is compiled from: the kernel's, weir.yaml's, what workloads told, and the
/// node's own kernel. Devices with an MTU above `max_mtu` are left out, but an uplink that was `known` stays as it was, also where it is
/// gone: the workers know uplinks by their places.
#[expect(clippy::too_many_arguments, reason = "each is a part of what links are assembled from")]
fn assemble_links(
    kernel: &KernelState,
    roles: &RoleRules,
    loaded: &Loaded,
    listening: &Listening,
    trunk_mac: Mac,
    learned: &BTreeMap<(IfIndex, IpAddr), Mac>,
    max_mtu: u32,
    known: &[Device],
) -> Links {
    let config = &loaded.config;
    let mut links = kernel.links(roles);
    links.devices.retain(|device| device.mtu <= max_mtu);
    let is_there = |known: &&Device| links.devices.iter().any(|device| device.name == known.name);
    let missing: Vec<Device> = known.iter().filter(|known| !is_there(known)).cloned().collect();
    links.devices.extend(missing);
    // Uplinks in the order of weir.yaml: that is the order of the workers' ports.
    let place = |name: &str| config.devices.iter().position(|d| d.name == name).unwrap_or(usize::MAX);
    links.devices.sort_by_key(|device| (device.role != Role::Uplink, place(&device.name), device.index));
    let index_of = |links: &Links, name: &str| links.devices.iter().find(|d| d.name == name).map(|d| d.index);
    for route in &config.routes {
        if let Some(device) = index_of(&links, &route.device) {
            links.routes.push(Route { to: route.to, via: route.via, device, metric: 0 });
        }
    }
    for neighbor in &config.neighbors {
        if let Some(device) = index_of(&links, &neighbor.device) {
            links.neighbors.push(Neighbor { address: neighbor.address, mac: neighbor.mac, device });
        }
    }
    links.loopback_sources = LOOPBACK_SOURCES.to_vec();
    links.complete = true;
    links.listening.clone_from(&listening.tcp);
    for ((device, address), mac) in learned {
        links.neighbors.push(Neighbor { address: *address, mac: *mac, device: *device });
    }
    if !links.devices.iter().any(|d| d.role == Role::Host) {
        // The follower may not have seen the trunk yet that was made a moment ago.
        links.devices.push(Device {
            name: "host".into(),
            index: IfIndex::HOST,
            role: Role::Host,
            mac: trunk_mac,
            mtu: 65535,
            addresses: kernel.node_addresses(roles).into_iter().map(IpNet::from).collect(),
        });
    }
    links
}

/// What the programs take from the node's kernel.
fn owned(loaded: &Loaded, rules: &Rules, snat: &SnatPorts, forwarding: &Forwarding) -> Owned {
    let cluster = &loaded.cluster;
    let own = cluster.nodes.iter().filter(|n| n.name == cluster.node_name);
    let mut prefixes: Vec<IpNet> = own.flat_map(|n| n.pod_cidrs.iter().copied()).collect();
    // Within this node's pod range a pod more is nothing new.
    let ranges: Prefixes = prefixes.iter().copied().collect();
    let pods = local_workloads(cluster).flat_map(|(_, w)| &w.addresses).filter(|ip| !ranges.hold(**ip));
    prefixes.extend(pods.map(|ip| IpNet::from(*ip)));
    prefixes.extend(rules.services.owned_addresses().map(IpNet::from));
    prefixes.extend(&cluster.service_cidrs);
    // What the node listens on stays its kernel's, so that it is reached without weir too.
    let snat_ports: Vec<_> = snat.ranges().collect();
    let snat = [Protocol::TCP, Protocol::UDP, Protocol::SCTP]
        .into_iter()
        .flat_map(|protocol| snat_ports.iter().map(move |range| (protocol, range.clone())));
    let node_ports = rules.services.node_ports().map(|(protocol, port)| (protocol, port..=port));
    // In an order of its own, so that the same ones are equal.
    prefixes.sort_unstable();
    // Host endpoints rule what the node itself gets: weir takes all but failsafe ports, and punts what their policy allows.
    let governed = forwarding.devices().any(|(_, device)| device.host_endpoint.is_some());
    let all_ports = [Protocol::TCP, Protocol::UDP, Protocol::SCTP].map(|protocol| (protocol, 0..=u16::MAX));
    let all_ports = all_ports.into_iter().filter(|_| governed);
    // Those for some peers only are looked at by weir, which knows the peers.
    let failsafes = cluster.host_settings.failsafe_inbound.iter().filter(|failsafe| failsafe.net.is_none());
    Owned {
        prefixes,
        node_addresses: forwarding.local_addresses(),
        ports: node_ports.chain(snat).chain(all_ports).collect(),
        failsafe_ports: failsafes.map(|failsafe| (failsafe.protocol, failsafe.port)).collect(),
        own_ports: rules.services.own_frontends().to_vec(),
    }
}
