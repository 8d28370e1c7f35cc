//! Keeps records, devices and addresses in agreement.
//!
//! Order of an ADD: address (in memory), record "making", pair, closed, up, record "made" on the disk while control publishes, answer. Order of a
//! DEL: control, pair, address to the disk as given back, record. Whoever ends in between leaves a record; what it stands for is then looked
//! up in the kernel ([`Keeper::open`]). What fails in between is undone at once; where that fails too, the record stays, marked as half
//! made (on the disk too, if that can be written), and is looked at again ([`Keeper::tend`]).

mod mend;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc::Receiver},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use tokio::sync::mpsc;
use weir_cluster::config::Cni;
use weir_cni::{
    CniError,
    queue::Queue,
    wire::{Attachment, Command, Made, PodName},
};
use weir_kubernetes::speak::{PodAddresses, Speaker};
use weir_packet::Mac;

use super::{
    Ask, InForce, LocalPod, NodeRanges, PodsError, Settings,
    control::{Control, ControlError, Pending},
    device_name,
    kernel::{Alias, HostEnd, Kernel, KernelError, Namespace, NodeKernel, Pair},
    turns::{Turn, Turns},
};
use crate::ipam::{
    Given, Pool,
    disk::{Disk, Folder, StateFolder, Sync},
    explain,
    record::{Freed, NodeFile, Phase, Record, VERSION},
};

// All these together, as an ADD may meet them, are less than what weir-cni waits (weir_cni::client::PATIENCE).
/// How long a request waits for another of the same pod.
const TURN: Duration = Duration::from_secs(15);
/// How long control may take to close a device, to publish beyond the patience for an object, and to take note that a pod goes.
const CONTROL: Duration = Duration::from_secs(8);
/// How long control may leave its queue full.
const QUEUE: Duration = Duration::from_secs(2);
/// How long control may take to say that it is there, less than weir-cni waits for a STATUS.
const PING: Duration = Duration::from_secs(2);
/// How long an ADD may take at most until its pod's addresses stand on the pod's object, from when they are known.
const SAYING: Duration = Duration::from_millis(500);
/// After which a leak is looked at again.
const SECOND_LOOK: Duration = Duration::from_millis(700);
/// The least MTU of a device with IPv6, in bytes (RFC 8200, section 5): with less the kernel gives it none.
const MIN_MTU_V6: u32 = 1280;
/// The file of the folder `node`.
pub const NODE_FILE: &str = "node.json";
/// Ends a record's file name.
const SUFFIX: &str = ".json";

/// A clock: milliseconds since 1970 that never go back while a process runs, whatever is done to the node's time.
pub type Clock = Box<dyn Fn() -> u64 + Send + std::marker::Sync>;

/// Everything about pods that does not concern sockets.
pub struct Keeper {
    settings: Settings,
    disk: Box<dyn Disk>,
    kernel: Box<dyn Kernel>,
    control: Control,
    clock: Clock,
    boot: String,
    netns: u64,
    nsfs: u64,
    queue: Queue,
    turns: Turns,
    state: Mutex<State>,
    /// Who says pods' addresses to the cluster, where there is one.
    speaker: OnceLock<Arc<Speaker>>,
    /// Held as long as this process uses the state folder.
    _lock: Option<Flock<File>>,
}

struct State {
    records: BTreeMap<Attachment, Record>,
    pool: Pool,
    ranges: Option<NodeRanges>,
    added: u64,
    deleted: u64,
    failed: u64,
    mended: u64,
    last_error: Option<String>,
}

/// What a keeper runs on.
pub struct Parts {
    /// Where records are kept.
    pub disk: Box<dyn Disk>,
    /// Where pods are made.
    pub kernel: Box<dyn Kernel>,
    /// The time.
    pub clock: Clock,
    /// The kernel's boot id.
    pub boot: String,
    /// When it booted, in the clock's milliseconds.
    pub booted: u64,
    /// The inode of the node's network namespace.
    pub netns: u64,
    /// The device number of the file system that it is on.
    pub nsfs: u64,
}

impl Keeper {
    /// Opens the state folder and puts it in agreement with the kernel.
    ///
    /// # Errors
    /// Where the folder or the kernel cannot be used.
    pub fn open(settings: Settings, asks: mpsc::Sender<Ask>) -> Result<Self, PodsError> {
        let failed = |source| PodsError::State { path: settings.state.clone(), source };
        let disk = StateFolder::create(&settings.state).map_err(failed)?;
        let lock = lock(&settings)?;
        disk.clean();
        let system = |what| move |source| PodsError::System { what, source };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(system("the kernel's boot id"))?;
        let own = fs::metadata("/proc/thread-self/ns/net").map_err(system("this network namespace"))?;
        let clock = clock();
        let up = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
            .map_err(|errno| PodsError::System { what: "the time since boot", source: errno.into() })?;
        let up = Duration::from(up).as_millis() as u64;
        let parts = Parts {
            booted: clock().saturating_sub(up),
            disk: Box::new(disk),
            kernel: Box::new(NodeKernel),
            clock,
            boot: boot.trim().to_owned(),
            netns: own.ino(),
            nsfs: own.dev(),
        };
        Self::with(settings, asks, parts, Some(lock))
    }

    /// The same on other parts.
    ///
    /// # Errors
    /// Where they fail.
    pub fn with(
        settings: Settings,
        asks: mpsc::Sender<Ask>,
        parts: Parts,
        lock: Option<Flock<File>>,
    ) -> Result<Self, PodsError> {
        let Parts { disk, kernel, clock, boot, booted, netns, nsfs } = parts;
        // Control begins with what is kept; until it has been told, nobody would answer.
        let (nobody, _) = mpsc::channel(1);
        let mut keeper = Self {
            control: Control::new(nobody),
            queue: Queue::beside(&settings.socket),
            turns: Turns::default(),
            state: Mutex::new(State {
                records: BTreeMap::new(),
                pool: Pool::new(settings.cool_down),
                ranges: None,
                added: 0,
                deleted: 0,
                failed: 0,
                mended: 0,
                last_error: None,
            }),
            speaker: OnceLock::new(),
            settings,
            disk,
            kernel,
            clock,
            boot,
            netns,
            nsfs,
            _lock: lock,
        };
        keeper.load(booted)?;
        keeper.drain();
        keeper.control = Control::new(asks);
        Ok(keeper)
    }

    /// The pods that control has to know, ordered.
    pub fn pods(&self) -> Vec<LocalPod> {
        let state = self.state();
        let made = state.records.values().filter(|record| record.phase == Phase::Made && !record.pod.name.is_empty());
        let mut pods: Vec<_> = made.map(|record| record.pod.clone()).collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        pods
    }

    /// See [`super::Pods::speak_by`].
    pub fn speak_by(&self, speaker: Arc<Speaker>) {
        drop(self.speaker.set(speaker));
    }

    /// A pod's addresses are its own no more.
    fn unsay(&self, pod: &LocalPod) {
        if let (Some(speaker), Some(pod)) = (self.speaker.get(), said(pod)) {
            speaker.withdraw(pod);
        }
    }

    /// Says a pod's addresses to the cluster; who is to be waited for, if anybody. Without the uid of its object nobody knows whether it is that pod's.
    fn say(&self, pod: &LocalPod) -> Option<Receiver<()>> {
        self.speaker.get()?.announce(said(pod)?)
    }

    /// See [`super::Pods::configure`].
    pub fn configure(&self, ranges: NodeRanges) -> bool {
        {
            let mut state = self.state();
            if state.ranges.as_ref() == Some(&ranges) {
                return false;
            }
            state.pool.set_ranges(&ranges.pod_cidrs, ranges.left_out.iter().copied());
            state.ranges = Some(ranges.clone());
        }
        let file = NodeFile {
            version: VERSION,
            node_name: self.settings.node_name.clone(),
            boot: self.boot.clone(),
            netns: self.netns,
            pod_cidrs: ranges.pod_cidrs,
            left_out: ranges.left_out,
            cool_down: self.settings.cool_down.as_millis() as u64,
        };
        // Only explanations need it.
        if let Err(error) = self.disk.write(Folder::Node, NODE_FILE, &text(&file), Sync::Later) {
            tracing::warn!("{}: {error}", self.settings.state.display());
        }
        true
    }

    /// Does what a runtime asks; `None` where there is nothing to say but that it is done.
    ///
    /// # Errors
    /// In the words and numbers of the CNI specification.
    pub fn serve(&self, command: Command, namespace: Option<&File>) -> Result<Option<Made>, CniError> {
        let is_poll = matches!(command, Command::Status);
        let needed = || namespace.ok_or_else(|| failure(CniError::INVALID_ENVIRONMENT, "CNI_NETNS did not come along"));
        let outcome = match command {
            Command::Add { attachment, pod, network } => {
                needed().and_then(|namespace| self.add(attachment, pod, network, namespace)).map(Some)
            }
            Command::Del { attachment, pod } => self.delete(&attachment, pod.as_ref(), || true).map(|()| None),
            Command::Check { attachment } => {
                needed().and_then(|namespace| self.check(&attachment, namespace)).map(Some)
            }
            Command::Status => self.ready().map(|()| None),
            Command::Gc { valid, network } => self.collect(&valid, &network).map(|()| None),
            Command::Drain => {
                self.drain();
                Ok(None)
            }
        };
        // A STATUS is asked every few seconds; that it says no is no failure.
        if let Err(error) = &outcome
            && !is_poll
        {
            let mut state = self.state();
            state.failed += 1;
            state.last_error = Some(error.to_string());
        }
        outcome
    }

    fn add(
        &self,
        attachment: Attachment,
        pod: PodName,
        network: String,
        namespace: Namespace<'_>,
    ) -> Result<Made, CniError> {
        if !pod.is_valid() {
            return Err(failure(
                CniError::INVALID_ENVIRONMENT,
                "CNI_ARGS: the pod's name is none that Kubernetes gives",
            ));
        }
        let file = namespace.metadata().map_err(|error| failure(CniError::IO, "CNI_NETNS").with(error))?;
        let netns = file.ino();
        // Files of other file systems may have that number too.
        if (netns, file.dev()) == (self.netns, self.nsfs) {
            return Err(failure(CniError::INVALID_ENVIRONMENT, KernelError::OwnNamespace));
        }
        let _turn = self.turn(&attachment, Some(&pod))?;
        // A DEL that still waits is of the sandbox's life before this one.
        self.queue.remove(&attachment).map_err(|error| {
            failure(CniError::TRY_AGAIN, format!("an earlier DEL of {attachment} cannot be taken out of the queue"))
                .with(error)
        })?;
        let of_pod = |record: &Record| record.pod.namespace == pod.namespace && record.pod.name == pod.name;

        let known = self.state().records.get(&attachment).cloned();
        if let Some(known) = known {
            let same =
                known.phase == Phase::Made && of_pod(&known) && known.pod.netns.is_none_or(|known| known == netns);
            if same && matches!(self.kernel.difference(&pair(&known), namespace), Ok(None)) {
                // Its answer may have been lost, and so may what control knew.
                self.put(&known.pod)?;
                self.say(&known.pod);
                return Ok(known.made());
            }
            self.take_away(&known)?;
        }
        let others: Vec<_> = {
            let state = self.state();
            state.records.values().filter(|record| of_pod(record)).cloned().collect()
        };
        if others.iter().any(|record| record.pod.sandbox == attachment.sandbox) {
            return Err(failure(
                CniError::INVALID_ENVIRONMENT,
                "CNI_IFNAME: weir gives a pod one interface, and this sandbox has it under another name",
            ));
        }
        // A sandbox of this pod from before: the name and the device are the new one's.
        for record in &others {
            self.take_away(record)?;
        }

        // Its name is a hash, which somebody may have aimed at another pod's.
        let device = device_name(&pod.namespace, &pod.name);
        let taken = self
            .state()
            .records
            .values()
            .find(|record| record.pod.device == device)
            .map(|record| record.pod.to_string());
        if let Some(other) = taken {
            return Err(failure(
                CniError::TRY_AGAIN,
                format!(
                    "the device {device} of pod {}/{} would be that of pod {other}; give it another name",
                    pod.namespace, pod.name
                ),
            ));
        }

        let (record, given) = self.begin(&attachment, &pod, network, netns)?;
        let (heard, since) = (self.say(&record.pod), Instant::now());
        let built = self.build(&record, namespace).map_err(|error| (error, false));
        let announced = built.and_then(|()| self.announce(&record).map_err(|error| (error, true)));
        if let Err((error, control_knows)) = announced {
            self.undo(&record, &given, control_knows);
            return Err(error);
        }
        // Else the pod's first packet may be at another node before its name is.
        if let Some(heard) = heard {
            let _ = heard.recv_timeout(SAYING.saturating_sub(since.elapsed()));
        }
        let mut made = record;
        made.phase = Phase::Made;
        let answer = made.made();
        let mut state = self.state();
        state.records.insert(attachment, made);
        state.added += 1;
        Ok(answer)
    }

    /// Takes addresses and remembers that a pod is being made with them. With what is to be restored if it is not.
    fn begin(
        &self,
        attachment: &Attachment,
        pod: &PodName,
        network: String,
        netns: u64,
    ) -> Result<(Record, Vec<Given>), CniError> {
        let now = (self.clock)();
        let mut state = self.state();
        let mtu = self.mtu_of(state.ranges.as_ref(), CniError::TRY_AGAIN)?;
        if mtu < MIN_MTU_V6 && state.pool.ranges().any(|range| range.addr().is_ipv6()) {
            let mtu = format!("new pods of this node would have an MTU of {mtu}, and IPv6 needs {MIN_MTU_V6}");
            return Err(failure(CniError::TRY_AGAIN, mtu)
                .with("raise cni.mtu in weir.yaml, or the uplink's MTU that it follows from"));
        }
        let given = state.pool.allocate(now).map_err(|exhausted| failure(CniError::TRY_AGAIN, exhausted))?;
        let record = Record {
            version: VERSION,
            phase: Phase::Making,
            network,
            interface: attachment.interface.clone(),
            boot: self.boot.clone(),
            since: now,
            mtu,
            pod: LocalPod {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                sandbox: attachment.sandbox.clone(),
                netns: Some(netns),
                device: device_name(&pod.namespace, &pod.name),
                mac: mac(attachment),
                addresses: given.iter().map(|given| given.address).collect(),
            },
        };
        state.records.insert(attachment.clone(), record.clone());
        Ok((record, given))
    }

    /// Makes a pod's pair, closed, then up.
    fn build(&self, record: &Record, namespace: Namespace<'_>) -> Result<(), CniError> {
        let kernel = |error: KernelError| match error {
            KernelError::Namespace(_) => failure(CniError::INVALID_ENVIRONMENT, error),
            _ => failure(CniError::TRY_AGAIN, error),
        };
        // It need not outlive a power cut yet: neither does the device.
        self.keep(record, Sync::Later).map_err(|error| self.disk_failure(&error))?;
        let pair = pair(record);
        self.kernel.create(&pair, namespace).map_err(kernel)?;
        let device = pair.device.clone();
        let closed = self.control.ask(|answer| Ask::Close { device, answer }, QUEUE);
        closed.and_then(|pending| pending.wait(CONTROL)).map_err(control_failure)?.map_err(|why| {
            failure(CniError::TRY_AGAIN, format!("the pod's device {} cannot be closed: {why}", pair.device))
        })?;
        self.kernel.bring_up(&pair, namespace).map_err(kernel)
    }

    /// Tells control about a pod that was built, and keeps that it is made.
    fn announce(&self, record: &Record) -> Result<(), CniError> {
        let pending = self.ask_to_put(&record.pod)?;
        let mut made = record.clone();
        made.phase = Phase::Made;
        // On the disk while control publishes.
        self.keep(&made, Sync::Now).map_err(|error| self.disk_failure(&error))?;
        in_force(pending.wait(self.put_limit()))?;
        for address in &record.pod.addresses {
            // A file that stays says less than the record of who has the address.
            let _ = self.disk.remove(Folder::Freed, &address.to_string(), Sync::Later);
        }
        Ok(())
    }

    /// Tells control about a pod that is made, and waits until it is in force.
    fn put(&self, pod: &LocalPod) -> Result<(), CniError> {
        in_force(self.ask_to_put(pod)?.wait(self.put_limit()))
    }

    fn ask_to_put(&self, pod: &LocalPod) -> Result<Pending<InForce>, CniError> {
        let (pod, patience) = (pod.clone(), self.patience());
        self.control.ask(|answer| Ask::Put { pod, patience, answer }, QUEUE).map_err(control_failure)
    }

    fn patience(&self) -> Duration {
        self.settings.patience.min(Cni::MAX_PATIENCE)
    }

    fn put_limit(&self) -> Duration {
        self.patience() + CONTROL
    }

    /// Takes back what a failed ADD has done so far. Addresses that control never heard of nobody ever had: they are as they were. Others cool
    /// down, for they may have been in force.
    fn undo(&self, record: &Record, given: &[Given], control_knows: bool) {
        self.unsay(&record.pod);
        let attachment = record.attachment();
        let told = if control_knows { self.gone(&record.pod) } else { Ok(()) };
        let removed = self.kernel.remove(&record.pod.device).map_err(|error| error.to_string());
        let undone = removed.and(told.map_err(|error| error.to_string())).and_then(|()| {
            if control_knows {
                return self.release(record, (self.clock)()).map_err(|error| error.to_string());
            }
            let name = file_name(&attachment);
            self.disk.remove(Folder::Pods, &name, Sync::Later).map_err(|error| error.to_string())
        });
        match undone {
            Ok(()) if control_knows => {}
            Ok(()) => {
                let mut state = self.state();
                state.records.remove(&attachment);
                for given in given {
                    state.pool.give_back(*given);
                }
            }
            // Its addresses stay taken until it can be taken away.
            Err(error) => {
                tracing::error!("what is half made of pod {} cannot be taken back yet: {error}", record.pod);
                // The file may say already that it is made.
                let _ = self.keep(record, Sync::Later);
            }
        }
    }

    /// Takes a sandbox away, if `still` holds with its turn.
    fn delete(&self, attachment: &Attachment, pod: Option<&PodName>, still: impl Fn() -> bool) -> Result<(), CniError> {
        let name_of = |record: &Record| PodName {
            namespace: record.pod.namespace.clone(),
            name: record.pod.name.clone(),
            uid: None,
        };
        loop {
            // Whose it is, is known from the record at the latest; an ADD of it may be under way.
            let of_record = self.state().records.get(attachment).map(name_of);
            let turn = self.turn(attachment, of_record.as_ref().or(pod))?;
            if !still() {
                return Ok(());
            }
            let known = self.state().records.get(attachment).cloned();
            // None: deleted before, never added, or another sandbox has the pod's name by now.
            let Some(record) = known else { return Ok(()) };
            // It was made while this waited: the turn has to be its pod's too.
            if !turn.has(&pod_key(&record.pod.namespace, &record.pod.name)) {
                continue;
            }
            self.take_away(&record)?;
            self.state().deleted += 1;
            return Ok(());
        }
    }

    /// Takes a pod away, with its turn held.
    fn take_away(&self, record: &Record) -> Result<(), CniError> {
        self.gone(&record.pod).map_err(control_failure)?;
        self.remove_device(record).map_err(|error| failure(CniError::TRY_AGAIN, error))?;
        self.release(record, (self.clock)()).map_err(|error| self.disk_failure(&error))?;
        self.unsay(&record.pod);
        Ok(())
    }

    /// Removes a record's device, unless another sandbox has it.
    fn remove_device(&self, record: &Record) -> Result<(), KernelError> {
        match self.end_of(record)? {
            Some(end) => self.kernel.remove(&end.name).map(drop),
            None => Ok(()),
        }
    }

    /// The host end of a record, also where somebody gave it another name.
    fn end_of(&self, record: &Record) -> Result<Option<HostEnd>, KernelError> {
        if let Some(end) = self.kernel.host_end(&record.pod.device)?.filter(|end| is_of(end, record)) {
            return Ok(Some(end));
        }
        Ok(self.kernel.host_ends()?.into_iter().find(|end| says_it_is_of(end, record)))
    }

    /// Gives a record's addresses back and forgets it.
    fn release(&self, record: &Record, at: u64) -> io::Result<()> {
        for address in &record.pod.addresses {
            if let Err(error) = self.write_freed(address, at, &record.pod) {
                tracing::warn!("that {address} was given back is not kept, only remembered: {error}");
            }
        }
        let attachment = record.attachment();
        self.disk.remove(Folder::Pods, &file_name(&attachment), Sync::Now)?;
        let forgotten = {
            let mut state = self.state();
            state.records.remove(&attachment);
            for address in &record.pod.addresses {
                // Two records with one address can only be a hand's work; it stays with the other.
                if !state.records.values().any(|other| other.pod.addresses.contains(address)) {
                    state.pool.free(*address, at);
                }
            }
            state.pool.forget((self.clock)())
        };
        for address in forgotten {
            let _ = self.disk.remove(Folder::Freed, &address.to_string(), Sync::Later);
        }
        Ok(())
    }

    fn check(&self, attachment: &Attachment, namespace: Namespace<'_>) -> Result<Made, CniError> {
        let _turn = self.turn(attachment, None)?;
        let known = self.state().records.get(attachment).cloned();
        let Some(record) = known else {
            return Err(failure(CniError::UNKNOWN_CONTAINER, format!("weir has made no interface {attachment}")));
        };
        if record.phase != Phase::Made {
            return Err(failure(CniError::TRY_AGAIN, format!("{attachment} is half made and still to be taken away")));
        }
        match self.kernel.difference(&pair(&record), namespace) {
            Ok(None) if self.serves(Some(&record.pod.device), CONTROL).map_err(control_failure)? => Ok(record.made()),
            Ok(None) => Err(failure(
                CniError::NOT_AS_MADE,
                format!(
                    "the router does not serve pod {}: the log says why {} is not adopted",
                    record.pod, record.pod.device
                ),
            )),
            Ok(Some(difference)) => Err(failure(
                CniError::NOT_AS_MADE,
                format!("the network of pod {} is not as it was made: {difference}", record.pod),
            )),
            Err(error) => Err(failure(CniError::TRY_AGAIN, error)),
        }
    }

    fn ready(&self) -> Result<(), CniError> {
        if !self.control.is_there() {
            return Err(failure(CniError::UNAVAILABLE, ControlError::Ends));
        }
        // An exhausted pool is no reason: a node that is full is not broken.
        self.mtu_of(self.state().ranges.as_ref(), CniError::UNAVAILABLE)?;
        // It is asked only where it was silent when it was asked last: it may be busy for a while.
        if self.control.was_silent() && self.serves(None, PING).is_err() {
            let code = if self.state().records.is_empty() { CniError::UNAVAILABLE } else { CniError::LIMITED };
            return Err(failure(code, ControlError::Silent));
        }
        Ok(())
    }

    /// Whether control serves a pod's device, or serves at all.
    fn serves(&self, device: Option<&str>, limit: Duration) -> Result<bool, ControlError> {
        let device = device.map(str::to_owned);
        self.control.ask(|answer| Ask::Serves { device, answer }, QUEUE)?.wait(limit)
    }

    /// The MTU of new pods, where there is anything to give to them.
    fn mtu_of(&self, ranges: Option<&NodeRanges>, code: u32) -> Result<u32, CniError> {
        match ranges {
            None => Err(failure(code, "weir is starting: what new pods get is not known yet")),
            Some(ranges) if ranges.pod_cidrs.is_empty() => Err(no_ranges(code, &self.settings.node_name)),
            Some(ranges) => Ok(ranges.mtu),
        }
    }

    /// GC: takes away what of a network is not listed, and works off the queue. A pod whose network was lost with its record may be of any.
    fn collect(&self, valid: &[Attachment], network: &str) -> Result<(), CniError> {
        self.drain();
        let valid: BTreeSet<_> = valid.iter().collect();
        let stale: Vec<_> = {
            let state = self.state();
            let of_it =
                state.records.iter().filter(|(_, record)| record.network.is_empty() || record.network == network);
            of_it.map(|(attachment, _)| attachment).filter(|attachment| !valid.contains(attachment)).cloned().collect()
        };
        let mut failed = Vec::new();
        for attachment in stale {
            tracing::info!("the runtime does not know {attachment} any more");
            if let Err(error) = self.delete(&attachment, None, || true) {
                failed.push(format!("{attachment}: {error}"));
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        Err(failure(CniError::TRY_AGAIN, format!("{} sandboxes could not be taken away", failed.len()))
            .with(failed.join("; ")))
    }

    /// Works off the queue of DELs.
    pub fn drain(&self) {
        let entries = match self.queue.entries() {
            Ok(entries) => entries,
            Err(error) => return tracing::warn!("the queue of DELs cannot be read: {error}"),
        };
        for attachment in entries {
            // An ADD since then has taken it out.
            let still = || self.queue.has(&attachment);
            let done = self.delete(&attachment, None, still).map_err(|error| error.to_string());
            if let Err(error) = done.and_then(|()| self.queue.remove(&attachment).map_err(|error| error.to_string())) {
                tracing::warn!("the DEL of {attachment} stays in the queue: {error}");
            }
        }
    }

    /// Tells control that a pod goes, and waits until nothing is sent there any more.
    ///
    /// # Errors
    /// Where control could not even be told: it would go on taking the pod's addresses for the pod's.
    fn gone(&self, pod: &LocalPod) -> Result<(), ControlError> {
        let (namespace, name, sandbox) = (pod.namespace.clone(), pod.name.clone(), pod.sandbox.clone());
        match self.control.ask(|answer| Ask::Gone { namespace, name, sandbox, answer }, QUEUE) {
            Err(ControlError::Silent) => return Err(ControlError::Silent),
            // A pod must go also while the router ends; the next one never hears of it.
            Err(ControlError::Ends) => {}
            Ok(pending) => {
                if let Err(ControlError::Silent) = pending.wait(CONTROL) {
                    tracing::warn!("control does not answer that pod {pod} goes; it goes all the same");
                }
            }
        }
        Ok(())
    }

    fn keep(&self, record: &Record, sync: Sync) -> io::Result<()> {
        self.disk.write(Folder::Pods, &file_name(&record.attachment()), &text(record), sync)
    }

    fn write_freed(&self, address: &IpAddr, at: u64, pod: &LocalPod) -> io::Result<()> {
        let freed = Freed { version: VERSION, at, pod: pod.to_string(), sandbox: pod.sandbox.clone() };
        self.disk.write(Folder::Freed, &address.to_string(), &text(&freed), Sync::Now)
    }

    fn turn(&self, attachment: &Attachment, pod: Option<&PodName>) -> Result<Turn<'_>, CniError> {
        let mut keys = vec![format!("sandbox {}", attachment.sandbox)];
        keys.extend(pod.map(|pod| pod_key(&pod.namespace, &pod.name)));
        self.turns.take(keys, TURN).ok_or_else(|| {
            failure(CniError::TRY_AGAIN, format!("another request for {attachment} or its pod is still under way"))
        })
    }

    fn disk_failure(&self, error: &io::Error) -> CniError {
        failure(CniError::TRY_AGAIN, format!("the state folder {} cannot be written", self.settings.state.display()))
            .with(error)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`super::Pods::status`].
    pub fn status(&self) -> Value {
        let state = self.state();
        let cooling =
            state.pool.freed().filter(|(_, at)| at.saturating_add(self.cool_down_ms()) > (self.clock)()).count();
        json!({
            "pods": state.records.len(),
            "podCIDRs": state.pool.ranges().collect::<Vec<_>>(),
            "addresses": {"inUse": state.records.values().map(|record| record.pod.addresses.len()).sum::<usize>(), "cooling": cooling},
            "mtu": state.ranges.as_ref().map(|ranges| ranges.mtu),
            "added": state.added,
            "deleted": state.deleted,
            "failed": state.failed,
            "mended": state.mended,
            "lastError": state.last_error,
        })
    }

    fn cool_down_ms(&self) -> u64 {
        self.settings.cool_down.as_millis() as u64
    }

    /// See [`super::Pods::explain`]. A request under way leaves a pod without a device for a moment: a leak is what is there when looked at
    /// twice.
    ///
    /// # Errors
    /// Where the state folder cannot be read.
    pub fn explain(&self) -> io::Result<explain::Report> {
        let first = self.look()?;
        if first.leaks.is_empty() {
            return Ok(first);
        }
        thread::sleep(SECOND_LOOK);
        let mut second = self.look()?;
        second.leaks.retain(|leak| first.leaks.contains(leak));
        Ok(second)
    }

    fn look(&self) -> io::Result<explain::Report> {
        // Only a thread of the node's namespace sees the devices.
        let here = fs::metadata("/proc/thread-self/ns/net")?.ino() == self.netns;
        let ends = if here { self.kernel.host_ends().ok() } else { None };
        let mut report = explain::report(&*self.disk, ends.as_deref(), &self.boot, (self.clock)())?;
        if ends.is_none() {
            report.notes.push("devices were not looked at".to_owned());
        }
        Ok(report)
    }
}

/// Whether a host end of a record's device name is the record's. What says nothing of itself was not brought up yet, or has too long a name to
/// say it; or another plugin made it.
fn is_of(end: &HostEnd, record: &Record) -> bool {
    match &end.alias {
        Some(_) => says_it_is_of(end, record),
        None => record.phase == Phase::Made || !end.up || pair(record).alias.text().is_none(),
    }
}

/// Whether a host end says that it is a record's, whatever it is called.
fn says_it_is_of(end: &HostEnd, record: &Record) -> bool {
    end.alias.as_ref().is_some_and(|alias| alias.attachment == record.attachment())
}

/// What requests of one pod take turns by.
/// What is said of a pod.
fn said(pod: &LocalPod) -> Option<PodAddresses> {
    let LocalPod { namespace, name, uid, addresses, .. } = pod;
    let (namespace, name) = (namespace.clone(), name.clone());
    Some(PodAddresses { namespace, name, uid: uid.clone()?, addresses: addresses.clone() })
}

fn pod_key(namespace: &str, name: &str) -> String {
    format!("pod {namespace}/{name}")
}

fn pair(record: &Record) -> Pair {
    let pod = &record.pod;
    Pair {
        device: pod.device.clone(),
        interface: record.interface.clone(),
        mac: pod.mac,
        mtu: record.mtu,
        addresses: pod.addresses.clone(),
        alias: Alias {
            attachment: record.attachment(),
            mac: pod.mac,
            addresses: pod.addresses.clone(),
            pod: Some((pod.namespace.clone(), pod.name.clone())),
        },
    }
}

/// A MAC address of the pod's own: the same for the same sandbox, another for the next of that name.
fn mac(attachment: &Attachment) -> Mac {
    let digest = Sha1::digest(attachment.file_name());
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&digest[..6]);
    // Locally administered, not a group (IEEE 802-2014, 8.2.2).
    bytes[0] = bytes[0] & !1 | 2;
    Mac(bytes)
}

fn file_name(attachment: &Attachment) -> String {
    attachment.file_name() + SUFFIX
}

fn text(value: &impl serde::Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn failure(code: u32, what: impl ToString) -> CniError {
    CniError::new(code, what.to_string())
}

fn control_failure(error: ControlError) -> CniError {
    failure(CniError::TRY_AGAIN, error)
}

fn in_force(outcome: Result<InForce, ControlError>) -> Result<(), CniError> {
    match outcome {
        Ok(InForce::WithObject | InForce::DeniedUntilObject) => Ok(()),
        Ok(InForce::Refused(why)) => Err(failure(CniError::TRY_AGAIN, format!("the router refuses the pod: {why}"))),
        Err(error) => Err(control_failure(error)),
    }
}

fn no_ranges(code: u32, node: &str) -> CniError {
    failure(code, format!("weir knows no pod CIDR of node {node} yet")).with(
        "Node.spec.podCIDRs is set by the controller manager (--allocate-node-cidrs), and read from the manifests",
    )
}

fn lock(settings: &Settings) -> Result<Flock<File>, PodsError> {
    let path = settings.state.join("lock");
    // On a file system that has become read-only it can still be locked, if it is there.
    let open = || match File::options().create(true).truncate(false).write(true).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(&path),
        other => other,
    };
    // The process before this one may be ending.
    let end = Instant::now() + Duration::from_secs(5);
    let mut file = open().map_err(|source| PodsError::State { path: path.clone(), source })?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() >= end => {
                return Err(PodsError::Locked { path: settings.state.clone() });
            }
            Err((back, nix::errno::Errno::EWOULDBLOCK | nix::errno::Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(PodsError::State { path, source: errno.into() }),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The node's clock as it was at the start, counted on by one that nobody can set.
fn clock() -> Clock {
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let begin = Instant::now();
    Box::new(move || (start + begin.elapsed()).as_millis() as u64)
}
