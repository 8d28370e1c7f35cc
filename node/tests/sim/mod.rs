//! A disk and a kernel in memory that fail or end at a chosen step, a control that does as it is told, and a keeper on them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::sync::mpsc;
use weir_cni::{
    queue::Queue,
    wire::{Attachment, Command, PodName},
};
use weir_node::{
    ipam::disk::{Disk, Folder, Sync as Synced},
    pods::{
        Ask, InForce, KernelError, LocalPod, NodeRanges, Settings, device_name,
        keeper::{Keeper, Parts},
        kernel::{Alias, HostEnd, Kernel, Namespace, Pair},
    },
};
use weir_packet::Mac;

pub const COOL_DOWN_MS: u64 = 60_000;

/// What goes wrong during a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The process ends at its so many'th operation, before or after what it does.
    EndAt(u32),
    /// That operation fails, and the process goes on.
    FailAt(u32),
}

impl Fault {
    pub fn is_none(self) -> bool {
        self == Self::None
    }
}

/// What a runtime was told about a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub pod: u8,
    pub addresses: Vec<IpAddr>,
}

/// A pair in the kernel.
#[derive(Clone, Debug)]
struct Device {
    pair: Pair,
    up: bool,
    namespace: u64,
    /// Another plugin's.
    foreign: bool,
}

#[derive(Default)]
struct Machine {
    files: BTreeMap<(Folder, String), Vec<u8>>,
    /// What is left of the files after a power cut.
    durable: BTreeMap<(Folder, String), Vec<u8>>,
    devices: BTreeMap<String, Device>,
    operations: u32,
    end_at: Option<u32>,
    fail_at: Option<u32>,
    ended: bool,
}

impl Machine {
    /// Does an operation, if the process lives and it does not fail.
    fn operate<T>(&mut self, action: impl FnOnce(&mut Self) -> T) -> io::Result<T> {
        for after in [false, true] {
            let number = self.operations;
            self.operations += 1;
            if self.ended || self.end_at == Some(number) {
                self.ended = true;
                if after {
                    action(self);
                }
                return Err(io::Error::other("the process has ended"));
            }
            if self.fail_at == Some(number) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        Ok(action(self))
    }
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Machine>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().unwrap()
    }

    fn kernel<T>(&self, action: impl FnOnce(&mut Machine) -> T) -> Result<T, KernelError> {
        self.lock().operate(action).map_err(|source| KernelError::Refused { action: "work".into(), source })
    }
}

impl Disk for Shared {
    fn write(&self, folder: Folder, name: &str, bytes: &[u8], sync: Synced) -> io::Result<()> {
        self.lock().operate(|machine| {
            let key = (folder, name.to_owned());
            machine.files.insert(key.clone(), bytes.to_vec());
            if sync == Synced::Now {
                machine.durable.insert(key, bytes.to_vec());
            }
        })
    }

    fn remove(&self, folder: Folder, name: &str, sync: Synced) -> io::Result<()> {
        self.lock().operate(|machine| {
            let key = (folder, name.to_owned());
            machine.files.remove(&key);
            if sync == Synced::Now {
                machine.durable.remove(&key);
            }
        })
    }

    fn read(&self, folder: Folder) -> io::Result<Vec<(String, Vec<u8>)>> {
        self.lock().operate(|machine| {
            let files = machine.files.iter().filter(|((of, _), _)| *of == folder);
            files.map(|((_, name), bytes)| (name.clone(), bytes.clone())).collect()
        })
    }
}

fn host_end((name, device): (&String, &Device)) -> HostEnd {
    HostEnd {
        name: name.clone(),
        up: device.up,
        mtu: device.pair.mtu,
        // Through its text, as the kernel keeps it.
        alias: (device.up && !device.foreign).then(|| device.pair.alias.text().unwrap().parse().unwrap()),
    }
}

impl Kernel for Shared {
    fn create(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<(), KernelError> {
        let namespace = namespace.metadata().unwrap().ino();
        self.kernel(|machine| {
            machine
                .devices
                .insert(pair.device.clone(), Device { pair: pair.clone(), up: false, namespace, foreign: false })
        })
        .map(drop)
    }

    fn bring_up(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<(), KernelError> {
        let namespace = namespace.metadata().unwrap().ino();
        self.kernel(|machine| {
            let device = machine.devices.get_mut(&pair.device).expect("it was created");
            assert_eq!((&device.pair, device.namespace), (pair, namespace));
            device.up = true;
        })
    }

    fn remove(&self, device: &str) -> Result<bool, KernelError> {
        self.kernel(|machine| machine.devices.remove(device).is_some())
    }

    fn host_end(&self, device: &str) -> Result<Option<HostEnd>, KernelError> {
        self.kernel(|machine| machine.devices.get_key_value(device).map(host_end))
    }

    fn host_ends(&self) -> Result<Vec<HostEnd>, KernelError> {
        self.kernel(|machine| machine.devices.iter().map(host_end).collect())
    }

    fn difference(&self, pair: &Pair, namespace: Namespace<'_>) -> Result<Option<String>, KernelError> {
        let namespace = namespace.metadata().unwrap().ino();
        self.kernel(|machine| match machine.devices.get(&pair.device) {
            Some(device) if device.pair == *pair && device.up && device.namespace == namespace => None,
            other => Some(format!("{other:?}")),
        })
    }
}

/// What control knows: pods by name.
type Known = Arc<Mutex<BTreeMap<(String, String), LocalPod>>>;

pub struct World {
    machine: Shared,
    keeper: Option<Keeper>,
    known: Known,
    clock: Arc<AtomicU64>,
    boot: u32,
    booted: u64,
    sandboxes: BTreeMap<String, File>,
    ranges: NodeRanges,
    folder: tempfile::TempDir,
    /// Control looks at nothing.
    pub deaf: Arc<AtomicBool>,
    /// Control refuses new pods.
    pub refuses: Arc<AtomicBool>,
}

impl World {
    pub fn new(ranges: &[&str]) -> Self {
        let mut world = Self {
            machine: Shared(Arc::default()),
            keeper: None,
            known: Known::default(),
            clock: Arc::new(AtomicU64::new(1_700_000_000_000)),
            boot: 0,
            booted: 1_600_000_000_000,
            sandboxes: BTreeMap::new(),
            ranges: NodeRanges {
                pod_cidrs: ranges.iter().map(|net| net.parse().unwrap()).collect(),
                mtu: 1440,
                left_out: Vec::new(),
            },
            folder: tempfile::tempdir().unwrap(),
            deaf: Arc::default(),
            refuses: Arc::default(),
        };
        world.restart();
        world
    }

    pub fn keeper(&self) -> &Keeper {
        self.keeper.as_ref().unwrap()
    }

    pub fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    pub fn wait(&self, time: u64) {
        self.clock.fetch_add(time, Ordering::Relaxed);
    }

    /// The process ends, and another one starts.
    pub fn restart(&mut self) {
        self.keeper = None;
        {
            let mut machine = self.machine.lock();
            machine.ended = false;
            machine.end_at = None;
            machine.fail_at = None;
        }
        let (asks, mut receiver) = mpsc::channel(4);
        // Each process has a control of its own, which begins with what is kept.
        let known = Known::default();
        self.known = known.clone();
        let clock = self.clock.clone();
        let parts = Parts {
            disk: Box::new(self.machine.clone()),
            kernel: Box::new(self.machine.clone()),
            clock: Box::new(move || clock.load(Ordering::Relaxed)),
            boot: format!("boot-{}", self.boot),
            booted: self.booted,
            netns: 0,
            nsfs: 0,
        };
        let settings = Settings {
            node_name: "node-a".into(),
            socket: self.folder.path().join("cni.sock"),
            state: self.folder.path().into(),
            cool_down: Duration::from_millis(COOL_DOWN_MS),
            patience: Duration::ZERO,
        };
        let keeper = Keeper::with(settings, asks, parts, None).expect("it starts");
        keeper.configure(self.ranges.clone());
        let mut kept = known.lock().unwrap();
        kept.extend(keeper.pods().into_iter().map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod)));
        drop(kept);
        // As the router's does, it answers once all is started.
        let (deaf, refuses) = (self.deaf.clone(), self.refuses.clone());
        thread::spawn(move || {
            while let Some(ask) = receiver.blocking_recv() {
                while deaf.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(5));
                }
                match ask {
                    Ask::Put { answer, .. } if refuses.load(Ordering::Relaxed) => {
                        drop(answer.send(InForce::Refused("so it is told".into())));
                    }
                    Ask::Close { answer, .. } => drop(answer.send(Ok(()))),
                    Ask::Put { pod, answer, .. } => {
                        known.lock().unwrap().insert((pod.namespace.clone(), pod.name.clone()), pod);
                        let _ = answer.send(InForce::WithObject);
                    }
                    Ask::Gone { namespace, name, sandbox, answer } => {
                        let mut known = known.lock().unwrap();
                        let key = (namespace, name);
                        if known.get(&key).is_some_and(|pod| pod.sandbox == sandbox) {
                            known.remove(&key);
                        }
                        drop(known);
                        let _ = answer.send(());
                    }
                    Ask::Serves { answer, .. } => {
                        let _ = answer.send(true);
                    }
                }
            }
        });
        self.keeper = Some(keeper);
    }

    pub fn reboot(&mut self, power_cut: bool) {
        self.goes_down(power_cut);
        self.restart();
    }

    /// The machine starts again, and something happens on it before the router does.
    pub fn reboot_with(&mut self, before: impl FnOnce(&Self)) {
        self.goes_down(false);
        before(self);
        self.restart();
    }

    fn goes_down(&mut self, power_cut: bool) {
        {
            let mut machine = self.machine.lock();
            machine.devices.clear();
            if power_cut {
                machine.files = machine.durable.clone();
            } else {
                machine.durable = machine.files.clone();
            }
        }
        self.boot += 1;
        self.booted = self.now() + 1;
        self.wait(COOL_DOWN_MS + 2);
    }

    /// Does something with a fault, and starts the process again if that ended it.
    pub fn with<T>(&mut self, fault: Fault, action: impl FnOnce(&Self) -> Result<T, String>) -> Result<T, String> {
        {
            let mut machine = self.machine.lock();
            machine.operations = 0;
            machine.end_at = if let Fault::EndAt(at) = fault { Some(at) } else { None };
            machine.fail_at = if let Fault::FailAt(at) = fault { Some(at) } else { None };
        }
        let outcome = action(self);
        let ended = {
            let mut machine = self.machine.lock();
            machine.end_at = None;
            machine.fail_at = None;
            machine.ended
        };
        if ended {
            // Nobody heard the answer.
            self.restart();
            return Err("the process ended".into());
        }
        outcome
    }

    pub fn new_sandbox(&mut self) -> String {
        let id = format!("sandbox{}", self.sandboxes.len());
        self.sandboxes.insert(id.clone(), tempfile::tempfile().unwrap());
        id
    }

    pub fn add(&self, sandbox: &str, pod: u8) -> Result<Vec<IpAddr>, String> {
        let command = Command::Add {
            attachment: attachment(sandbox),
            pod: PodName { namespace: "default".into(), name: format!("pod-{pod}"), uid: None },
            network: "weir".into(),
        };
        match self.keeper().serve(command, Some(&self.sandboxes[sandbox])) {
            Ok(made) => Ok(made.expect("what was made").addresses),
            Err(error) => Err(error.to_string()),
        }
    }

    pub fn del(&self, sandbox: &str) -> Result<(), String> {
        let command = Command::Del { attachment: attachment(sandbox), pod: None };
        self.keeper().serve(command, None).map(drop).map_err(|error| error.to_string())
    }

    pub fn gc(&self, valid: &BTreeSet<String>) -> Result<(), String> {
        let valid = valid.iter().map(|sandbox| attachment(sandbox)).collect();
        self.keeper()
            .serve(Command::Gc { valid, network: "weir".into() }, None)
            .map(drop)
            .map_err(|error| error.to_string())
    }

    /// The ADD's answer of a pod with other ranges of the node.
    pub fn add_with(&self, ranges: NodeRanges, sandbox: &str, pod: u8) -> Result<Vec<IpAddr>, String> {
        self.keeper().configure(ranges);
        self.add(sandbox, pod)
    }

    /// A DEL that nobody took.
    pub fn queue(&self, sandbox: &str) {
        Queue::beside(&self.folder.path().join("cni.sock")).push(&attachment(sandbox)).unwrap();
    }

    pub fn queued(&self) -> usize {
        Queue::beside(&self.folder.path().join("cni.sock")).entries().unwrap().len()
    }

    /// Somebody gives a pod's host end another name.
    pub fn rename_device(&self, pod: u8, name: &str) {
        let mut machine = self.machine.lock();
        let device = machine.devices.remove(&device_name("default", &format!("pod-{pod}"))).unwrap();
        machine.devices.insert(name.into(), device);
    }

    /// Another plugin makes a device of that pod's name, which says nothing of itself.
    pub fn foreign_device(&self, pod: u8) {
        let name = format!("pod-{pod}");
        let device = device_name("default", &name);
        let alias = Alias { attachment: attachment("foreign"), mac: Mac([2; 6]), addresses: Vec::new(), pod: None };
        let pair = Pair {
            device: device.clone(),
            interface: "eth0".into(),
            mac: Mac([2; 6]),
            mtu: 1500,
            addresses: Vec::new(),
            alias,
        };
        self.machine.lock().devices.insert(device, Device { pair, up: true, namespace: 0, foreign: true });
    }

    pub fn devices(&self) -> Vec<String> {
        self.machine.lock().devices.keys().cloned().collect()
    }

    pub fn end_namespace(&self, sandbox: &str) {
        self.machine.lock().devices.retain(|_, device| device.pair.alias.attachment.sandbox != sandbox);
    }

    pub fn lose_record(&mut self, sandbox: &str, nonsense: bool) {
        let key = (Folder::Pods, format!("{}.json", attachment(sandbox).file_name()));
        {
            let mut machine = self.machine.lock();
            match nonsense {
                true => machine.files.insert(key, b"{\"version\": 1, \"phase".to_vec()),
                false => machine.files.remove(&key),
            };
        }
        self.restart();
    }

    /// What differs between what a runtime was told, and records, devices, files and control.
    pub fn compare(&self, living: &BTreeMap<String, Told>) -> Vec<String> {
        let mut problems = Vec::new();
        let mut expected: Vec<_> = living
            .iter()
            .map(|(sandbox, told)| {
                let name = format!("pod-{}", told.pod);
                (name.clone(), sandbox.clone(), device_name("default", &name), told.addresses.clone())
            })
            .collect();
        expected.sort();
        let short = |pod: &LocalPod| (pod.name.clone(), pod.sandbox.clone(), pod.device.clone(), pod.addresses.clone());
        let kept: Vec<_> = self.keeper().pods().iter().map(short).collect();
        let mut differ = |what: &str, got: Vec<_>| {
            if got != expected {
                problems.push(format!("{what}: {got:?}, expected {expected:?}"));
            }
        };
        differ("records", kept);
        differ("control", self.known.lock().unwrap().values().map(short).collect());
        let machine = self.machine.lock();
        let mut devices: Vec<_> = machine
            .devices
            .values()
            .map(|device| {
                let alias = &device.pair.alias;
                let name = alias.pod.as_ref().unwrap().1.clone();
                (name, alias.attachment.sandbox.clone(), device.pair.device.clone(), device.pair.addresses.clone())
            })
            .collect();
        devices.sort();
        differ("devices", devices);
        if machine.devices.values().any(|device| !device.up) {
            problems.push("a device is down".into());
        }
        let files: BTreeSet<_> =
            machine.files.keys().filter(|(folder, _)| *folder == Folder::Pods).map(|(_, name)| name.clone()).collect();
        let wanted: BTreeSet<_> =
            living.keys().map(|sandbox| format!("{}.json", attachment(sandbox).file_name())).collect();
        if files != wanted {
            problems.push(format!("files: {files:?}, expected {wanted:?}"));
        }
        problems
    }
}

fn attachment(sandbox: &str) -> Attachment {
    Attachment { sandbox: sandbox.into(), interface: "eth0".into() }
}
