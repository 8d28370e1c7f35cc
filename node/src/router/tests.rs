//! Control with a node that is played: messages in any order, and anything that fails.
//!
//! What is in force must always be what some prefix of the inputs asked for, whole; and once nothing fails any more, what the last one asked for.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use proptest::prelude::*;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde_json::{Map, Value};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::UnixStream,
    sync::{Semaphore, mpsc, oneshot},
};
use weir_cluster::{
    compile::{self, Compilers},
    sockets::{Listening, Sockets},
    sources::watch::Trigger,
    translate::{Loaded, Loader, workload_device},
};
use weir_conntrack::{Table, TableConfig, TcpSettings, Timeouts};
use weir_dataplane::{
    attach::{AttachError, Owned, WrongEntry},
    counters::COUNTERS,
    forwarding::Forwarding,
    frame::IfIndex,
    hits::Hits,
    model::{Links, Role, Workload},
    pipeline::Event,
    snapshot::{Rules, Snapshot},
    tables::Tables,
    worker::Shared,
};
use weir_nat::Affinity;
use weir_packet::Mac;
use weir_sync::{Counters, Domain, Published};

use super::{
    Due, PACE, Router,
    answers::Answers,
    assemble::{own_addresses, role_rules},
    configuration::{Pending, Reloads},
    devices::Devices,
    hands::{Adopted, Hands},
    inbox::{self, Message},
    verify::{ReadMaps, Verify},
};
use crate::{
    control::Request,
    health::Check,
    kernel::{DeviceTracker, HostReport, KernelError, Link, View, Wanted},
    prepare::{Preparer, Times},
    trouble::Trouble,
};

const PODS: u32 = 6;
const UPLINK: u32 = 2;
/// Devices of the kernel's own that there may be.
const KERNELS: [u32; 6] = [30, 31, 32, 33, 34, 35];

/// What can happen.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A pod's device comes or goes.
    Device(u32),
    /// One of the kernel's own comes or goes.
    Kernel(usize),
    /// An uplink's MTU is too large for what the router has room for, or is right again.
    Uplink,
    /// Files change: a service more, with the address 10.96.0.VERSION.
    Files,
    /// Files become unreadable as a whole, until they change again.
    Nonsense,
    /// SIGHUP.
    Signal,
    /// A workload tells its MAC address.
    Learned(u32),
    /// The node's sockets are others.
    Ports(u16),
    /// A client asks for the status.
    Status,
    /// Somebody asks whether what is in force is what it should be.
    Verify,
    /// Something that control has begun is done.
    Deliver,
    /// Time passes, in milliseconds.
    Time(u16),
    /// From now on so many of a hundred things that are tried fail.
    Failing(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..PODS).prop_map(Step::Device),
        4 => (0..KERNELS.len()).prop_map(Step::Kernel),
        1 => Just(Step::Uplink),
        3 => Just(Step::Files),
        1 => Just(Step::Nonsense),
        1 => Just(Step::Signal),
        2 => (0..PODS).prop_map(Step::Learned),
        1 => (10_000_u16..10_005).prop_map(Step::Ports),
        1 => Just(Step::Status),
        2 => Just(Step::Verify),
        5 => Just(Step::Deliver),
        3 => (0_u16..3000).prop_map(Step::Time),
        2 => prop_oneof![Just(0_u8), Just(30), Just(100)].prop_map(Step::Failing),
    ];
    proptest::collection::vec(step, 1..60)
}

/// The node that is played.
struct World {
    random: ChaCha8Rng,
    failing: u8,
    /// Devices that there are.
    devices: BTreeSet<u32>,
    kernels: BTreeSet<u32>,
    /// Versions of the files, and of the set of devices, that there were; the last ones are now.
    versions: u8,
    device_sets: Vec<BTreeSet<u32>>,
    adopted: BTreeMap<u32, Adopted>,
    /// Devices of the kernel's own that have programs.
    kernel_devices: BTreeMap<u32, String>,
    owned: Owned,
    /// What was published last: the version of the files, and the place of the set of devices.
    in_force: (u8, usize),
    publications: usize,
    plumbed: Option<Wanted>,
    /// What is done and not delivered yet.
    done: VecDeque<Message>,
    wrong: Option<String>,
}

impl World {
    fn fails(&mut self) -> bool {
        (self.random.next_u32() % 100) < u32::from(self.failing)
    }

    fn refuse(&mut self) -> Result<(), AttachError> {
        let full = || AttachError::TooMany { what: "things that fail", count: 2, max: 1 };
        if self.fails() { Err(full()) } else { Ok(()) }
    }

    fn say(&mut self, what: String) {
        self.wrong.get_or_insert(what);
    }

    /// What a snapshot says: the version of its files.
    fn version(snapshot: &Snapshot) -> u8 {
        let services = snapshot.rules.services.owned_addresses();
        let last = services.filter_map(|address| match address {
            IpAddr::V4(address) if address.octets()[..3] == [10, 96, 0] => Some(address.octets()[3]),
            _ => None,
        });
        last.max().unwrap_or(0)
    }
}

#[derive(Clone)]
struct Played(Arc<Mutex<World>>);

impl Played {
    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hands for Played {
    fn adopt(&mut self, index: u32, _: &str, facts: Adopted, _: bool) -> Result<(), AttachError> {
        let mut world = self.world();
        if !world.devices.contains(&index) {
            return Err(AttachError::DeviceGone { name: "gone".into(), index });
        }
        world.refuse()?;
        world.adopted.insert(index, facts);
        Ok(())
    }

    fn link_next(&mut self) -> Result<bool, AttachError> {
        Ok(false)
    }

    fn forget(&mut self, index: u32) -> Result<(), AttachError> {
        let mut world = self.world();
        world.adopted.remove(&index);
        world.refuse()
    }

    fn attach_kernel_device(&mut self, index: u32, name: &str) -> Result<(), AttachError> {
        let mut world = self.world();
        if !world.kernels.contains(&index) {
            return Err(AttachError::DeviceGone { name: name.to_owned(), index });
        }
        world.refuse()?;
        world.kernel_devices.insert(index, name.to_owned());
        Ok(())
    }

    fn detach_kernel_device(&mut self, index: u32) -> Result<(), AttachError> {
        let mut world = self.world();
        world.refuse()?;
        world.kernel_devices.remove(&index);
        Ok(())
    }

    fn index_of(&self, _: &str) -> Option<u32> {
        None
    }

    fn is_gone(&self, index: u32) -> bool {
        !self.world().devices.contains(&index)
    }

    fn own(&mut self, owned: &Owned) -> Result<(), AttachError> {
        let mut world = self.world();
        world.refuse()?;
        world.owned = owned.clone();
        Ok(())
    }

    fn read_maps(&self) -> ReadMaps {
        let played = self.clone();
        Box::new(move |owned| {
            let world = played.world();
            let [is, should] = [&world.owned, owned].map(|one| one.prefixes.iter().copied().collect::<BTreeSet<_>>());
            let wrong = is.symmetric_difference(&should);
            let entry =
                |net: &IpNet| WrongEntry { map: "prefixes", entry: net.to_string(), is_there: is.contains(net) };
            Ok(wrong.map(entry).collect())
        })
    }

    fn publish(&mut self, next: Arc<Snapshot>, _: BTreeSet<u32>) {
        let mut world = self.world();
        let version = World::version(&next);
        let (version_before, set_before) = world.in_force;
        let workloads: BTreeSet<u32> = next
            .forwarding
            .devices()
            .filter(|(_, device)| device.role == Role::Workload)
            .map(|(_, device)| device.index.0)
            .collect();
        let set = (set_before..world.device_sets.len()).find(|place| world.device_sets[*place] == workloads);
        if version < version_before || version > world.versions {
            let versions = world.versions;
            world.say(format!("version {version} after {version_before}, of {versions}"));
        }
        match set {
            Some(set) => world.in_force = (version, set),
            None => world.say(format!("{workloads:?} is no later set of devices than number {set_before}")),
        }
        for service in next.rules.services.owned_addresses() {
            if !world.owned.prefixes.contains(&service.into()) {
                world.say(format!("{service} is in force, and the programs do not know it"));
            }
        }
        world.publications += 1;
    }

    fn plumb(&mut self, wanted: Wanted) {
        let mut world = self.world();
        let outcome = if world.fails() {
            world.plumbed = None;
            Err(KernelError::NoDevice("weir0".into()))
        } else {
            world.plumbed = Some(wanted);
            Ok(HostReport::default())
        };
        world.done.push_back(Message::Plumbed(outcome));
    }

    fn answer_health(&mut self, _: BTreeMap<SocketAddr, Check>) {}

    fn keep(&mut self, _: &Loaded) {}

    fn watch(&mut self, _: Vec<PathBuf>) {}

    fn resolve(&mut self, _: IpAddr, _: IfIndex) {}

    fn ask_for_device(&mut self, _: String, _: oneshot::Sender<Result<(), String>>) {}

    fn look_at_ports(&mut self, _: (u16, u16), _: bool, _: bool) {}

    fn status(&self) -> Map<String, Value> {
        Map::new()
    }
}

fn link(index: u32, name: &str, mtu: u32) -> Link {
    Link {
        index: IfIndex(index),
        name: name.into(),
        mac: Some(Mac([2, 0, 0, 0, 0, index as u8])),
        mtu,
        up: true,
        kind: Some("veth".into()),
        peer: None,
        peer_elsewhere: true,
        rx_queues: 1,
        tx_queues: 1,
        incarnation: 1,
        leads_to: Vec::new(),
    }
}

fn pod_device(pod: u32) -> String {
    workload_device("x", &format!("p{pod}"))
}

/// A router on that node.
struct Play {
    router: Router,
    played: Played,
    view: View,
    folder: TempDir,
    uplink_mtu: u32,
    now: Instant,
    /// What is prepared or verified, held back.
    prepared: mpsc::UnboundedReceiver<Message>,
}

impl Play {
    fn write(&self, text: &str) {
        // As a whole at once, and read whatever its stamp.
        let new = self.folder.path().join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.folder.path().join("m.yaml")).unwrap();
    }

    fn manifests(version: u8) -> String {
        let mut text =
            "apiVersion: v1\nkind: Node\nmetadata: {name: a}\nspec: {podCIDRs: [10.1.0.0/24]}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n"
                .to_owned();
        for pod in 0..PODS {
            text += &format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{pod}, namespace: x}}\nspec: {{nodeName: a}}\nstatus: {{phase: Running, podIP: 10.1.0.{}}}\n",
                pod + 10
            );
        }
        for service in 1..=version {
            text += &format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{service}}}\nspec: {{clusterIP: 10.96.0.{service}, ports: [{{port: 80}}]}}\n"
            );
        }
        text
    }

    fn start(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let weir = folder.path().join("weir.yaml");
        fs::write(&weir, "nodeName: a\nmanifests: [m.yaml]\ndevices: [{name: eth0, role: uplink}]\n").unwrap();
        fs::write(folder.path().join("m.yaml"), Self::manifests(0)).unwrap();
        let mut loader = Loader::new(&weir);
        let mut loaded = loader.load_strictly().unwrap_or_else(|problems| panic!("{problems}"));
        let view = View::default();
        KERNELS.iter().for_each(|index| view.set_address(*index, "fe80::1/64".parse().unwrap()));
        let roles = role_rules(&loaded);
        let own = own_addresses(&view, &roles);
        loaded.add_local_addresses(&own);
        let mut compilers = Compilers::default();
        let rules = Arc::new(compilers.rules(&loaded).unwrap().counting(1));
        let listening = Listening::default();
        let snat = Arc::new(compile::snat_ports(&loaded, &rules, &listening).unwrap());
        let domain = Domain::new();
        let config = || TableConfig {
            max_entries: 16,
            seed: [1, 2],
            timeouts: Timeouts::default(),
            tcp: TcpSettings::default(),
        };
        let first = Arc::new(Snapshot {
            generation: 1,
            rules: Arc::clone(&rules),
            snat: Arc::clone(&snat),
            forwarding: Arc::new(Forwarding::compile(&loaded.cluster, &Links::default()).unwrap()),
        });
        let shared = Arc::new(Shared {
            snapshot: Published::new(&domain, first),
            offload: None,
            tables: Tables { v4: Table::new(config(), domain.clone()), v6: Table::new(config(), domain.clone()) },
            affinity: Affinity::new(64, [1, 2]),
            tcp_loose: true,
            stop: AtomicBool::new(false),
        });
        let played = Played(Arc::new(Mutex::new(World {
            random: ChaCha8Rng::seed_from_u64(seed),
            failing: 0,
            devices: BTreeSet::new(),
            kernels: BTreeSet::new(),
            versions: 0,
            device_sets: vec![BTreeSet::new()],
            adopted: BTreeMap::new(),
            kernel_devices: BTreeMap::new(),
            owned: Owned::default(),
            in_force: (0, 0),
            publications: 0,
            plumbed: None,
            done: VecDeque::new(),
            wrong: None,
        })));
        let (_, receiver) = inbox::inbox();
        let (sender, prepared) = mpsc::unbounded_channel();
        let now = Instant::now();
        let verdicts = sender.clone();
        let verify = Verify::new(loader.afresh(), move |message| drop(verdicts.send(message)));
        let router = Router {
            inbox: receiver,
            hands: Box::new(played.clone()),
            view: view.clone(),
            devices: Devices {
                roles,
                tracker: DeviceTracker::new(Role::Workload),
                adopted: BTreeMap::new(),
                kernels: BTreeMap::new(),
                max_mtu: 1500,
                too_large: Vec::new(),
                link_due: None,
            },
            path: weir,
            preparer: Preparer::new(loader, compilers, move |finished| {
                drop(sender.send(Message::Prepared(Box::new(finished))));
            }),
            reloads: Reloads::default(),
            is_told: super::configuration::IsTold::default(),
            programming: Default::default(),
            verify,
            cluster: None,
            loaded,
            hits: Hits::new(Arc::clone(&rules)),
            rules,
            snat,
            listening,
            own_addresses: own.clone(),
            in_force_addresses: own,
            pending: Some(Pending { times: Some((true, Times::default())), begun: Some(now), is_of_endpoints: false }),
            learned: BTreeMap::new(),
            links: Links::default(),
            generation: 1,
            published: None,
            owned: None,
            plumbed: None,
            plumbing: false,
            due: Due::default(),
            pods: None,
            trouble: Trouble::default(),
            trying: None,
            follows: true,
            watches: true,
            notes: Vec::new(),
            answers: Answers { shared: Arc::clone(&shared), domain },
            shared,
            counters: Counters::<COUNTERS>::new(),
            workers: 1,
            serves: false,
            ports_due: now + Duration::from_secs(1 << 30),
            now,
        };
        let mut play = Self { router, played, view, folder, uplink_mtu: 1500, now, prepared };
        play.show_devices();
        play.router.due.changes = true;
        play
    }

    /// The kernel tells of the devices that there are.
    fn show_devices(&mut self) {
        let mut world = self.played.world();
        let pods: BTreeSet<u32> = world.devices.clone();
        if world.device_sets.last() != Some(&pods) {
            world.device_sets.push(pods.clone());
        }
        let uplink = std::iter::once(link(UPLINK, "eth0", self.uplink_mtu));
        let pods = pods.iter().map(|index| link(*index, &pod_device(index - 10), 1500));
        let own = world.kernels.iter().map(|index| link(*index, &format!("wg{index}"), 1420));
        self.view.set_links(uplink.chain(pods).chain(own));
    }

    fn take(&mut self, message: Message) {
        assert!(!self.router.take(message).expect("nothing ends it"), "nothing ends it");
    }

    /// Waits for what is being prepared or verified, if anything is.
    async fn prepared(&mut self) -> bool {
        if self.router.preparer.is_idle() && !self.router.verify.is_at_work() {
            return false;
        }
        let message = self.prepared.recv().await.expect("a thread is at it");
        self.take(message);
        true
    }

    async fn deliver(&mut self) -> bool {
        let done = self.played.world().done.pop_front();
        match done {
            Some(message) => {
                self.take(message);
                true
            }
            None => self.prepared().await,
        }
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Device(pod) => {
                let index = pod + 10;
                {
                    let mut world = self.played.world();
                    if !world.devices.remove(&index) {
                        world.devices.insert(index);
                    }
                }
                self.show_devices();
                self.take(Message::KernelChanged);
            }
            Step::Kernel(which) => {
                {
                    let mut world = self.played.world();
                    if !world.kernels.remove(&KERNELS[which]) {
                        world.kernels.insert(KERNELS[which]);
                    }
                }
                self.show_devices();
                self.take(Message::KernelChanged);
            }
            Step::Uplink => {
                self.uplink_mtu = if self.uplink_mtu == 1500 { 3000 } else { 1500 };
                self.show_devices();
                self.take(Message::KernelChanged);
            }
            Step::Files => {
                let version = {
                    let mut world = self.played.world();
                    world.versions = (world.versions + 1).min(200);
                    world.versions
                };
                self.write(&Self::manifests(version));
                self.take(Message::Files(Trigger::Files));
            }
            Step::Nonsense => {
                self.write("- [}: neither YAML\n");
                self.take(Message::Files(Trigger::Files));
            }
            Step::Signal => self.take(Message::Files(Trigger::Signal)),
            Step::Learned(pod) => {
                let (device, address) = (IfIndex(pod + 10), IpAddr::from([10, 1, 0, pod as u8 + 10]));
                self.take(Message::Worker(Event::Learned { device, address, mac: Mac([2, 0, 0, 0, 1, pod as u8]) }));
            }
            Step::Ports(port) => {
                let listening = Listening { tcp: BTreeSet::from([port]), udp: BTreeSet::new() };
                self.take(Message::Ports(listening, Some(Sockets::default())));
            }
            Step::Status => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let place = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
                self.take(Message::Client(Request::Status, theirs, place));
                let mut line = String::new();
                BufReader::new(ours).read_line(&mut line).await.unwrap();
                let status: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(status["nodeName"], "a");
            }
            Step::Verify => self.router.verify(None),
            Step::Deliver => drop(self.deliver().await),
            Step::Time(ms) => self.now += Duration::from_millis(ms.into()),
            Step::Failing(of_hundred) => self.played.world().failing = of_hundred,
        }
        self.router.look(self.now);
        assert!(self.router.wakes().is_some_and(|at| at > self.now), "it waits, also for what fails");
        self.check();
    }

    fn check(&self) {
        let world = self.played.world();
        assert_eq!(world.wrong, None);
        // What is adopted exists, or control has not heard yet that it does not.
        assert!(world.adopted.keys().all(|index| (10..10 + PODS).contains(index)));
    }

    /// Nothing fails any more, and all that is due comes.
    async fn come_to_rest(&mut self) {
        self.played.world().failing = 0;
        if self.uplink_mtu != 1500 {
            self.step(Step::Uplink).await;
        }
        let version = self.played.world().versions;
        self.write(&Self::manifests(version));
        // No signal: what failed is tried again without being asked.
        self.take(Message::Files(Trigger::Files));
        for _ in 0..200 {
            self.now += Duration::from_secs(61);
            self.router.look(self.now);
            self.check();
            let delivered = self.deliver().await;
            self.router.look(self.now);
            if !delivered && !self.router.is_owed() && self.router.trouble.due().is_none() {
                return;
            }
        }
        panic!("it does not come to rest: {}", self.router.trouble.to_json(self.now));
    }

    /// Verifies, and waits for the outcome.
    async fn verified(&mut self) {
        let (runs, _, _, failed) = self.router.verify.counts();
        self.router.verify(None);
        for _ in 0..100 {
            self.now += Duration::from_secs(2);
            self.router.look(self.now);
            self.deliver().await;
            self.router.look(self.now);
            self.check();
            let (runs_now, .., failed_now) = self.router.verify.counts();
            assert_eq!(failed_now, failed, "it can be told");
            if runs_now > runs {
                return;
            }
        }
        panic!("it does not end: {}", self.router.verify.to_json());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn what_is_in_force_is_what_some_prefix_of_the_inputs_asked_for(steps in steps(), seed in any::<u64>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut play = Play::start(seed);
            for step in steps {
                play.step(step).await;
            }
            play.come_to_rest().await;
            let wanted = {
                let world = play.played.world();
                assert_eq!(world.in_force.0, world.versions, "the last files are in force");
                let pods: BTreeSet<u32> = world.adopted.keys().copied().collect();
                assert_eq!(pods, world.devices, "all workloads are adopted, and no others");
                let own: BTreeSet<u32> = world.kernel_devices.keys().copied().collect();
                assert_eq!(own, world.kernels, "the kernel's own have their programs, and no others");
                assert_eq!(world.device_sets[world.in_force.1], world.devices, "and published");
                assert_eq!(Some(&world.owned), play.router.owned.as_ref());
                world.plumbed.clone()
            };
            assert_eq!(wanted, play.router.plumbed, "the kernel has what control thinks that it has");
            assert!(wanted.is_some() && play.router.serves);
            play.verified().await;
            let (runs, differences, ..) = play.router.verify.counts();
            assert!(runs > 0 && differences == 0, "{differences} differences");
        });
    }
}

#[test]
fn a_thousand_messages_that_wait_are_one_publication() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut play = Play::start(1);
        play.router.look(play.now);
        while play.deliver().await {}
        let before = play.played.world().publications;
        for round in 0..1000 {
            let pod = round % PODS;
            {
                let mut world = play.played.world();
                world.devices.insert(pod + 10);
            }
            play.show_devices();
            play.take(Message::KernelChanged);
            // The last one was a moment ago.
            play.router.look(play.now);
        }
        assert_eq!(play.played.world().publications, before, "it is not time for another one");
        assert_eq!(play.router.wakes(), Some(play.now + PACE));
        play.now += PACE;
        play.router.look(play.now);
        let world = play.played.world();
        assert_eq!((world.publications, world.adopted.len()), (before + 1, PODS as usize));
    });
}

#[test]
fn what_is_in_force_and_should_not_be_is_named_and_mended() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut play = Play::start(1);
        play.step(Step::Files).await;
        play.come_to_rest().await;
        play.verified().await;
        assert_eq!(play.router.verify.counts(), (1, 0, 0, 0));

        // The programs' maps: one entry is missing, and one is too many.
        let (missing, extra): (IpNet, IpNet) = ("10.96.0.1/32".parse().unwrap(), "203.0.113.0/24".parse().unwrap());
        let good = play.played.world().owned.clone();
        {
            let mut world = play.played.world();
            world.owned.prefixes.retain(|net| *net != missing);
            assert_eq!(world.owned.prefixes.len() + 1, good.prefixes.len());
            world.owned.prefixes.push(extra);
        }
        play.verified().await;
        assert_eq!(play.router.verify.counts(), (2, 2, 2, 0));
        assert_eq!(play.played.world().owned, good);
        let named = play.router.verify.last_found();
        assert!(named.contains("prefixes: 10.96.0.1/32") && named.contains("prefixes: 203.0.113.0/24"), "{named}");

        // The models: an object that no source has, and one that is another.
        let ghost = Workload {
            name: "x/ghost".into(),
            node: Some("b".into()),
            addresses: vec![IpAddr::from([10, 1, 7, 7])],
            device: "cali0".into(),
            mac: None,
        };
        Arc::make_mut(&mut play.router.loaded.cluster).workloads.push(ghost);
        let services = &mut play.router.loaded.services.services;
        Arc::make_mut(&mut services[0]).port = 81;
        play.verified().await;
        assert_eq!(play.router.verify.counts(), (3, 4, 4, 0));
        let named = play.router.verify.last_found();
        assert!(named.contains("workload x/ghost") && named.contains("default/s1"), "{named}");
        assert!(play.router.loaded.cluster.workloads.iter().all(|workload| workload.name != "x/ghost"));
        assert_eq!(play.router.loaded.services.services[0].port, 80);
        play.verified().await;
        assert_eq!(play.router.verify.counts(), (4, 4, 4, 0));

        // What is compiled, though the models are right.
        let mut other = play.router.loaded.services.clone();
        other.services.clear();
        let policy = Compilers::default().rules(&play.router.loaded).unwrap().policy;
        let none = weir_nat::Compiler::default().compile(&other).unwrap();
        play.router.rules = Arc::new(Rules::new(none, policy, &play.router.loaded.cluster).counting(1));
        play.verified().await;
        let (runs, found, mended, failed) = play.router.verify.counts();
        assert!(runs == 5 && found > 4 && mended == found && failed == 0, "{found} {mended}");
        assert!(play.router.verify.last_found().contains("compiled services"));
        assert_eq!(play.router.rules.services.owned_addresses().count(), 1);
    });
}
