//! The start of a router: what has to be there before control serves.
//!
//! In this order, since each step rests on those before: the objects, the kernel as it is, programs and maps, what they take, the connection
//! tables, workers with their sockets, and the tasks that control hears from.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    net::IpAddr,
    os::fd::AsFd as _,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};
use weir_cluster::{
    compile::{self, CompileError, Compilers},
    config::{Kubernetes, OffloadMode, Require, RouterConfig, WorkerMode},
    sockets::Sockets,
    sources::watch::Watch,
    text::{Problems, Severity},
    translate::{Loaded, Loader},
};
use weir_conntrack::file::Restored;
use weir_dataplane::{
    afxdp::{AfXdp, AfXdpSettings, PortSettings, RingSizes, receive_queues},
    attach::{self, Attachment, SocketDevice, TrunkSettings, UplinkHook},
    clock::now,
    counters::COUNTERS,
    driver::PortId,
    forwarding::{Forwarding, local_workloads},
    frame::{IfIndex, MAX_MTU, ONE_FRAME_MTU},
    hits::Hits,
    model::{Device, Links, Role},
    offload::keeper::Keys as _,
    pipeline::{Event, Pipeline},
    snapshot::Snapshot,
    worker::{Mode, Shared, Worker},
};
use weir_kubernetes::{Source, access_of, speak};
use weir_nat::Affinity;
use weir_packet::Mac;
use weir_sync::{Counters, Domain, Published};

use super::{
    Due, PORTS_INTERVAL, Router,
    answers::Answers,
    assemble::{assemble_links, own_addresses, owned, role_rules},
    configuration::{IsTold, Pending, Reloads, warn_of_faulty},
    devices::{Devices, near_devices},
    hands::{Hands as _, RealHands},
    inbox::{self, Message},
    verify::Verify,
};
use crate::{
    book::Pods,
    connections, control,
    health::{self, HealthChecks},
    keeper::Keeper,
    kernel::{
        DeviceTracker, FollowSettings, HostPlumbing, HostSettings, KernelState, Link, RoleRules, TRUNK_HOST,
        TRUNK_WEIR, View,
    },
    listener::Listener,
    offload::{Offloader, Offloading},
    prepare::{self, Preparer, Times},
    programming::Programming,
    run::{RunError, check_alone, host_record, pin_folder, system},
    trouble::Trouble,
    web,
};

/// Events that workers may have waiting for control.
const EVENTS: usize = 4096;
/// How often it is told what a start waits for.
const WAITING: Duration = Duration::from_secs(10);
/// Entries of an rx ring that nothing is received by.
const UNUSED_RING: u32 = 64;

/// A router that is ready to serve, with what must outlive its serving.
pub(crate) struct Started {
    pub(crate) router: Router,
    pub(crate) workers: Workers,
    /// Removes the socket.
    pub(crate) _listener: Listener,
}

/// The worker threads.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Workers {
    /// Ends them.
    ///
    /// # Errors
    /// Where one panicked.
    pub(crate) fn end(self) -> Result<(), RunError> {
        self.shared.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let mut result = Ok(());
        for (worker, thread) in self.threads.into_iter().enumerate() {
            if thread.join().is_err() {
                let source = io::Error::other("it panicked at its end; the message is above");
                result = Err(RunError::Worker { worker, source });
            }
        }
        result
    }
}

/// What was read and compiled at the start.
struct First {
    loaded: Loaded,
    loader: Loader,
    compilers: Compilers,
    rules: Arc<weir_dataplane::snapshot::Rules>,
    snat: Arc<weir_nat::SnatPorts>,
    listening: weir_cluster::sockets::Listening,
    roles: RoleRules,
    own_addresses: Vec<IpAddr>,
    times: Times,
}

/// Reads and compiles everything, as the node is now.
fn first(mut loader: Loader, view: &View) -> Result<First, RunError> {
    let (mut loaded, problems) = loader.start().map_err(|problems| RunError::Config(Box::new(problems)))?;
    warn_of_faulty(&loaded, problems.as_ref());
    let roles = role_rules(&loaded);
    let own_addresses = own_addresses(view, &roles);
    loaded.add_local_addresses(&own_addresses);
    loaded.settle_host_ports(prepare::room(&loaded.config), &HashSet::new(), Sockets::read);
    let begin = Instant::now();
    let mut compilers = Compilers::default();
    let rules = compilers.rules(&loaded)?.counting(loaded.config.workers.cores.len());
    let rules = Arc::new(rules);
    let listening = prepare::listening(&loaded);
    let snat = Arc::new(compile::snat_ports(&loaded, &rules, &listening)?);
    let times = Times { load: loaded.times, compile: begin.elapsed(), publish: Duration::ZERO };
    for warning in loaded.notes.of(Severity::Warning) {
        warn!("{}", loaded.notes.line(warning));
    }
    info!(
        node = loaded.config.node_name,
        services = loaded.services.services.len(),
        workloads = local_workloads(&loaded.cluster).count(),
        "configuration compiled"
    );
    Ok(First { loaded, loader, compilers, rules, snat, listening, roles, own_addresses, times })
}

/// Sockets and threads of the workers.
struct Crew<'c> {
    config: &'c RouterConfig,
    uplinks: &'c [(Link, UplinkHook)],
    max_mtu: u32,
    shared: &'c Arc<Shared>,
    domain: &'c Arc<Domain>,
    counters: &'c Counters<COUNTERS>,
    events: crossbeam::channel::Sender<Event>,
    failures: mpsc::Sender<(usize, io::Error)>,
}

impl Crew<'_> {
    /// Starts them; their threads, and their sockets' modes for the status.
    fn start(&self, attachment: &mut Attachment) -> Result<(Vec<thread::JoinHandle<()>>, Vec<Value>), RunError> {
        let Self { config, uplinks, max_mtu, shared, domain, counters, events, failures } = self;
        let workers = config.workers.cores.len() as u32;
        let router_end = attachment.trunk().router_end;
        let mut modes: Vec<Value> = Vec::new();
        let mut threads = Vec::new();
        for (worker, core) in config.workers.cores.iter().enumerate() {
            let settings = worker_settings(worker as u32, workers, router_end, uplinks, *max_mtu);
            let driver = AfXdp::open(&settings)?;
            register(attachment, &driver, &settings)?;
            for mode in driver.modes().map_err(system("cannot read a socket's mode"))? {
                info!(
                    worker,
                    device = mode.device,
                    queue = mode.queue,
                    mode = mode.mode,
                    reason = mode.reason,
                    "socket"
                );
                if required(config, &mode.device) == Some(Require::ZeroCopy) && mode.mode != "zero-copy" {
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
                events.clone(),
                config.workers.burst,
                1 + settings.uplinks.len(),
            )
            .with_fragment_lifetimes(compile::fragment_lifetimes(&config.conntrack));
            let mode = match config.workers.mode {
                WorkerMode::Busy => Mode::Busy,
                WorkerMode::Adaptive => Mode::Adaptive,
            };
            let state = Worker::new(driver, pipeline, domain.join(), Arc::clone(shared), config.workers.burst, mode);
            threads.push(spawn_worker(worker, *core, state, failures.clone())?);
        }
        Ok((threads, modes))
    }
}

fn required(config: &RouterConfig, device: &str) -> Option<Require> {
    config.devices.iter().find(|known| known.name == device).and_then(|known| known.require)
}

/// Begins to follow a running cluster, and waits until all is known that it has: half of a cluster's policies are none, and half of its
/// backends are connections lost.
async fn follow_cluster(
    kubernetes: &Kubernetes,
    config: &RouterConfig,
    loader: &mut Loader,
) -> Result<Source, RunError> {
    let settings = weir_kubernetes::Settings {
        delay: weir_kubernetes::start_delay(&config.node_name),
        folder: Some(config.state_folder().join("kubernetes")),
        proxy_name: config.service_proxy_name.clone(),
        speaks: speak::Settings::of(config),
    };
    let source = Source::start(access_of(kubernetes), loader.identities(), settings)
        .map_err(system("cannot start the thread that follows the cluster"))?;
    let mut changes = source.changes();
    loop {
        if let Some(objects) = source.fresh() {
            loader.set_live(objects);
            return Ok(source);
        }
        if tokio::time::timeout(WAITING, changes.changed()).await.is_err() {
            if let Some(objects) = source.objects() {
                warn!("the cluster does not answer, its objects of the last run count: {}", source.state().missing());
                loader.set_live(objects);
                return Ok(source);
            }
            warn!("waiting for the cluster's objects: {}", source.state().missing());
        }
    }
}

/// Makes a router ready to serve. Needs a tokio runtime, which must outlive its serving.
///
/// # Errors
/// Where the configuration is bad, another router runs, or the kernel refuses what the router cannot be without.
pub(crate) async fn start(path: &Path) -> Result<Started, RunError> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let mut watched = Watch::new([path.clone()])?;
    let mut loader = Loader::new(&path);
    // What is wrong is told by the whole load.
    let mut problems = Problems::default();
    let config = RouterConfig::read(&path, &mut problems).filter(|_| !problems.has_errors());
    loader.follow(watched.revisit());
    let (mut made, mut keeper, mut cluster) = (None, None, None);
    if let Some((config, _)) = config {
        check_alone(&config.node_name).await?;
        // Before they are read, so that no change is missed.
        watched.set_paths(std::iter::once(path.clone()).chain(config.manifests.iter().cloned()))?;
        made = Pods::start(&config)?;
        keeper = Some(Keeper::start(config.state_folder(), &mut loader));
        if let Some(kubernetes) = &config.kubernetes {
            cluster = Some(follow_cluster(kubernetes, &config, &mut loader).await?);
        }
    }
    if let (Some((pods, _)), Some(speaker)) = (&made, cluster.as_ref().and_then(Source::speaker)) {
        pods.server().speak_by(Arc::clone(speaker));
    }
    if let Some((pods, _)) = &made {
        loader.set_local_pods(Arc::clone(pods.all()));
    }
    let is_fresh = cluster.as_ref().is_some_and(|cluster| cluster.state().kept_since.is_none());
    let kernel = KernelState::follow(FollowSettings::default()).await?;
    let view = kernel.view().clone();
    let first = first(loader, &view)?;
    let First { loaded, roles, rules, snat, listening, .. } = &first;
    let config = &loaded.config;

    let allowed: Vec<usize> = core_ids();
    if let Some(core) = config.workers.cores.iter().find(|core| !allowed.contains(core)) {
        return Err(RunError::NoCore { core: *core, allowed });
    }
    let socket = control::socket_path(&config.node_name);
    control::make_run_folder().map_err(system(format!("cannot make {}", control::RUN_FOLDER)))?;
    check_alone(&config.node_name).await?;

    let workers = config.workers.cores.len() as u32;
    let uplinks = check_uplinks(config, &view, workers)?;
    let mtus = view.links(roles).devices.into_iter().map(|device| device.mtu);
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
    let maps = attachment.take_offload();
    let left = maps.as_ref().map_or(Ok(Vec::new()), |maps| maps.keys.all());
    let left = left.map_err(system("cannot tell which flows are in the kernel"))?;
    // What the process before had learned, and the programs go by.
    let known = maps.iter().flat_map(|maps| maps.pods(&left));
    let learned: BTreeMap<(IfIndex, IpAddr), Mac> =
        known.map(|(device, address, mac)| ((device, address), mac)).collect();
    let links = assemble_links(&view, roles, loaded, listening, attach::KERNEL_END_MAC, &learned, max_mtu, &[]);
    let forwarding = Forwarding::compile(&loaded.cluster, &links).map_err(CompileError::from)?;
    let owned = owned(loaded, rules, snat, &forwarding);
    attachment.set_owned(&owned)?;
    for left in attachment.pinned_uplinks()? {
        if !uplinks.iter().any(|uplink| uplink.index.0 == left) {
            attachment.detach_uplink(left)?;
        }
    }
    for left in attachment.pinned_kernel_devices()? {
        let is_left = |device: &Device| device.role == Role::Kernel && device.index.received_by().0 == left;
        if !links.devices.iter().any(is_left) {
            attachment.detach_kernel_device(left)?;
        }
    }
    let attach = |uplink: Link| {
        let hook = required(config, &uplink.name).map(|_| UplinkHook::Xdp);
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
    let snapshot = Arc::new(Snapshot {
        generation,
        rules: Arc::clone(rules),
        snat: Arc::clone(snat),
        forwarding: Arc::new(forwarding),
    });
    let near = near_devices(&view.all(), made.as_ref().map(|(pods, _)| pods));
    let offload = offload.map(|offload| offload.begin(&opened.tables, &domain, &snapshot, near));
    let shared = Arc::new(Shared {
        snapshot: Published::new(&domain, snapshot),
        offload: offload.as_ref().map(Offloader::shared),
        tables: opened.tables,
        affinity: Affinity::new(Affinity::DEFAULT_CLIENTS, [random.next_u64(), random.next_u64()]),
        tcp_loose: config.conntrack.tcp_loose,
        stop: AtomicBool::new(false),
    });

    let counters = Counters::<COUNTERS>::new();
    let (events, event_receiver) = crossbeam::channel::bounded(EVENTS);
    let (failures, failure_receiver) = mpsc::channel(config.workers.cores.len().max(1));
    let crew = Crew {
        config,
        uplinks: &uplinks,
        max_mtu,
        shared: &shared,
        domain: &domain,
        counters: &counters,
        events,
        failures,
    };
    let (threads, sockets) = crew.start(&mut attachment)?;
    if let Some(offload) = &offload {
        offload.spawn(Arc::clone(&shared)).map_err(system("cannot start the thread that hands flows over"))?;
    }

    let host = HostSettings {
        device: TRUNK_HOST.into(),
        gateway_mac: attach::ROUTER_END_MAC,
        uplinks: uplinks.iter().map(|(uplink, _)| uplink.name.clone()).collect(),
        snat_ports: config.snat.port_range,
        record: host_record(&config.node_name),
    };
    let plumbing = HostPlumbing::new(host.clone())?;
    let (sender, inbox) = inbox::inbox();
    let listener = Listener::start(&socket, sender.clone(), Message::Client)
        .map_err(system(format!("cannot listen at {}", socket.display())))?;
    if let Some(address) = config.http.listen {
        web::start(address, sender.clone(), Message::Facts)
            .map_err(system("cannot start the thread that answers HTTP"))?;
    }
    let (wanted, wanted_receiver) = watch::channel(None);
    let (files, files_receiver) = watch::channel(Vec::new());
    let (resolver, resolver_receiver) = watch::channel(kernel.resolver());
    inbox::signals(&sender).map_err(system("cannot catch SIGINT and SIGTERM"))?;
    inbox::hear_workers(event_receiver, sender.clone()).map_err(system("cannot start the event thread"))?;
    inbox::hear_failures(failure_receiver, sender.clone());
    inbox::follow_kernel(kernel, resolver, sender.clone());
    inbox::watch_files(watched, files_receiver, sender.clone());
    if let Some(cluster) = &cluster {
        inbox::follow_cluster(cluster.changes(), sender.clone());
    }
    inbox::plumb(host, plumbing, wanted_receiver, sender.clone());
    let pods = made.map(|(pods, asks)| {
        inbox::hear_pods(asks, sender.clone());
        pods
    });
    let mut hands = RealHands {
        attachment,
        pins: pin_folder(&config.node_name),
        shared: Arc::clone(&shared),
        offload,
        health: HealthChecks::start().map_err(system("cannot start the health checks"))?,
        wanted,
        files,
        neighbors: inbox::resolve_neighbors(resolver_receiver.clone()),
        resolver: resolver_receiver,
        inbox: sender.clone(),
        sockets,
        keeper,
    };
    let First { loaded, loader, compilers, rules, snat, listening, roles, own_addresses, times } = first;
    hands.answer_health(health::wanted(&loaded.services));
    let verdicts = sender.clone();
    let mut verify = Verify::new(loader.afresh(), move |message| drop(verdicts.blocking_send(message)));
    verify.every(loaded.config.verify.every, Instant::now());
    let router = Router {
        inbox,
        hands: Box::new(hands),
        view,
        devices: Devices {
            roles,
            tracker: DeviceTracker::new(Role::Workload),
            adopted: BTreeMap::new(),
            kernels: BTreeMap::new(),
            max_mtu,
            too_large: Vec::new(),
            link_due: None,
        },
        path,
        preparer: Preparer::new(loader, compilers, move |finished| {
            drop(sender.blocking_send(Message::Prepared(Box::new(finished))));
        }),
        reloads: Reloads::default(),
        programming: Programming::default(),
        is_told: IsTold { preparing: is_fresh, in_force: is_fresh, ..IsTold::default() },
        verify,
        cluster,
        loaded,
        hits: Hits::new(Arc::clone(&rules)),
        rules,
        snat,
        listening,
        in_force_addresses: own_addresses.clone(),
        own_addresses,
        pending: Some(Pending { times: Some((true, times)), begun: Some(Instant::now()), is_of_endpoints: false }),
        learned,
        links: Links::default(),
        generation,
        published: None,
        owned: Some(owned),
        plumbed: None,
        plumbing: false,
        due: Due::default(),
        pods,
        trouble: Trouble::default(),
        trying: None,
        follows: true,
        watches: true,
        notes,
        answers: Answers { shared: Arc::clone(&shared), domain },
        shared: Arc::clone(&shared),
        counters,
        workers: workers as usize,
        serves: false,
        ports_due: Instant::now() + PORTS_INTERVAL,
        now: Instant::now(),
    };
    Ok(Started { router, workers: Workers { shared, threads }, _listener: listener })
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

/// The uplinks of weir.yaml in their order.
fn check_uplinks(config: &RouterConfig, kernel: &View, workers: u32) -> Result<Vec<Link>, RunError> {
    let uplinks = config.devices.iter().filter(|d| d.role == Role::Uplink);
    uplinks
        .map(|uplink| {
            let mut link = kernel.link(&uplink.name).ok_or_else(|| RunError::NoUplink(uplink.name.clone()))?;
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
