//! Control: decides what is in force on a node.
//!
//! # Theory
//!
//! *One inbox.* All state is one struct that one task owns, and that task waits for nothing but its inbox and the time. Whatever may take long
//! or never end (the kernel's answers, files, clients, compiling) is a task or a thread of its own that sends a message
//! ([`inbox`]). So no packet, client, file or object can hold control up.
//!
//! *Gathered.* A message changes what is known or wanted ([`Router::take`]). What follows from it is done once for all messages that wait
//! ([`Router::settle`]), and a publication follows the one before after [`PACE`] at the earliest: a thousand pods that appear at once are
//! one publication, or two.
//!
//! *What is owed, not what happened.* Nothing is done because of a message, but because what is in force differs from what is wanted: links, the
//! programs' prefixes, the kernel's routes are compared with what was told last. What failed was not told, so it is owed still, and the next
//! occasion does it: another message, or the timer of [`Trouble`], which grows from a second to a minute. Until then what was in force
//! stays in force, whole: the programs are told before workers are, and a snapshot is never published in part.
//!
//! *What ends it.* A signal, a worker that failed. Nothing else.
//!
//! [`Hands`] is all that control does to the node, so that a test can be the node (tests.rs).

mod answers;
mod assemble;
mod configuration;
mod devices;
mod forwarding;
mod hands;
mod inbox;
mod start;
mod status;
#[cfg(test)]
mod tests;
mod verify;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, time::timeout_at};
use tracing::{info, warn};
use weir_cluster::{
    config::RouterConfig,
    sockets::{Listening, Sockets},
    sources::watch::Trigger,
    translate::Loaded,
};
use weir_dataplane::{
    attach::Owned, counters::COUNTERS, frame::IfIndex, hits::Hits, model::Links, pipeline::Event, snapshot::Rules,
    worker::Shared,
};
use weir_kubernetes::Source;
use weir_nat::SnatPorts;
use weir_packet::Mac;
use weir_sync::Counters;

pub(crate) use self::start::{Started, start};
use self::{
    answers::Answers,
    configuration::{IsTold, Pending, Reloads},
    devices::Devices,
    hands::Hands,
    inbox::Message,
    verify::Verify,
};
use crate::{
    book::Pods,
    control::Request,
    kernel::{HostReport, KernelError, View, Wanted},
    prepare::{Preparer, Scope},
    programming::Programming,
    run::RunError,
    trouble::{Trouble, Try},
};

/// How often is looked which ports the node listens on.
const PORTS_INTERVAL: Duration = Duration::from_secs(30);
/// The least time between two publications.
const PACE: Duration = Duration::from_millis(5);
/// Messages that are taken before what follows from them is done.
const AT_ONCE: usize = 1024;

/// Control's state.
pub(crate) struct Router {
    inbox: mpsc::Receiver<Message>,
    hands: Box<dyn Hands>,
    view: View,
    devices: Devices,
    /// weir.yaml.
    path: PathBuf,
    preparer: Preparer,
    reloads: Reloads,
    is_told: IsTold,
    programming: Programming,
    verify: Verify,
    /// The running cluster that is followed.
    cluster: Option<Source>,
    /// What was taken over, and is in force unless [`Router::pending`].
    loaded: Loaded,
    rules: Arc<Rules>,
    snat: Arc<SnatPorts>,
    /// Ports that sockets of the node listen on, as far as it matters.
    listening: Listening,
    /// The node's addresses that a configuration was prepared with last, or is being.
    own_addresses: Vec<IpAddr>,
    /// Those that the one that was taken over was prepared with.
    in_force_addresses: Vec<IpAddr>,
    /// What was taken over and no snapshot has yet.
    pending: Option<Pending>,
    /// MAC addresses that workloads told.
    learned: BTreeMap<(IfIndex, IpAddr), Mac>,
    /// What was published last.
    links: Links,
    generation: u32,
    /// When that was.
    published: Option<Instant>,
    /// What the programs were told last; `None`: they are to be told anew.
    owned: Option<Owned>,
    /// What the kernel's routes were to be last; `None`: that failed, or they are to be looked at anew.
    plumbed: Option<Wanted>,
    /// Whether it is not known yet what became of that.
    plumbing: bool,
    /// What waits for [`Router::settle`].
    due: Due,
    /// Where weir makes the pods of this node.
    pods: Option<Pods>,
    trouble: Trouble,
    /// A new try of all that failed, until it is known what became of it.
    trying: Option<Try>,
    /// Whether the kernel is followed, and files are watched.
    follows: bool,
    watches: bool,
    notes: Vec<String>,
    hits: Hits,
    answers: Answers,
    shared: Arc<Shared>,
    counters: Counters<COUNTERS>,
    /// Number of workers.
    workers: usize,
    /// Whether what was there at the start is in force.
    serves: bool,
    ports_due: Instant,
    /// The time, as it was read last.
    now: Instant,
}

/// What is to be looked at once all waiting messages are taken.
#[derive(Default)]
struct Due {
    /// What may differ from what is in force: the kernel's devices, addresses, routes or neighbours, or what was taken over.
    changes: bool,
    /// Everything that may have failed.
    all: bool,
    /// Who asked for a pod, or for a pod to go: whether what is in force is enough for them.
    pods: bool,
}

impl Router {
    /// Serves until a signal or a dead worker ends it.
    pub(crate) async fn serve(&mut self) -> Result<(), RunError> {
        // What there is at the start is in force before anything else is looked at.
        self.due.changes = true;
        self.look(Instant::now());
        loop {
            let message = match self.wakes() {
                Some(at) => match timeout_at(at.into(), self.inbox.recv()).await {
                    Ok(message) => message,
                    Err(_) => {
                        self.look(Instant::now());
                        continue;
                    }
                },
                None => self.inbox.recv().await,
            };
            let Some(message) = message else { return Ok(()) };
            self.now = Instant::now();
            let mut next = Some(message);
            let mut left = AT_ONCE;
            while let Some(message) = next {
                if self.take(message)? {
                    return Ok(());
                }
                left -= 1;
                next = if left > 0 { self.inbox.try_recv().ok() } else { None };
            }
            self.look(Instant::now());
        }
    }

    /// Does what it is time for.
    fn look(&mut self, now: Instant) {
        self.now = now;
        self.expire();
        self.settle();
    }

    /// When something is due without a message.
    fn wakes(&self) -> Option<Instant> {
        let paced = self.published.filter(|_| self.is_owed()).map(|published| published + PACE);
        let pods = self.pods.as_ref().and_then(Pods::deadline);
        let trouble = self.trouble.due().filter(|_| !self.due.all);
        // What is due and waits for a quiet moment is begun then; something comes before it is one.
        let verify = self.verify.due().filter(|due| *due > self.now);
        [paced, pods, self.devices.link_due, trouble, verify, Some(self.ports_due)].into_iter().flatten().min()
    }

    /// Whether something waits for the next publication, and it is not what has just failed.
    fn is_owed(&self) -> bool {
        self.due.changes || self.due.all
    }

    /// What a timer asks for.
    fn expire(&mut self) {
        let now = self.now;
        if self.devices.link_due.is_some_and(|due| due <= now) {
            self.link_next();
        }
        if self.ports_due <= now {
            self.ports_due = now + PORTS_INTERVAL;
            let range = self.loaded.config.snat.port_range;
            let has_host_endpoints = !self.loaded.cluster.host_endpoints.is_empty();
            let waits = self.loaded.host_ports_in_use().next().is_some();
            self.hands.look_at_ports(range, has_host_endpoints, waits);
        }
        if self.trouble.due().is_some_and(|due| due <= now) {
            self.due.all = true;
        }
        if let Some(pods) = &mut self.pods
            && pods.deadline().is_some_and(|deadline| deadline <= now)
        {
            pods.expire(now);
            self.due.pods = true;
        }
    }

    /// Takes one message in; whether it ends the router.
    fn take(&mut self, message: Message) -> Result<bool, RunError> {
        match message {
            Message::End => return Ok(true),
            Message::WorkerFailed(worker, source) => return Err(RunError::Worker { worker, source }),
            Message::KernelChanged => (self.follows, self.due.changes) = (true, true),
            Message::KernelFailed(error) => {
                self.follows = false;
                self.trouble.note(&error, self.now);
            }
            Message::FilesFailed(error) => {
                self.watches = false;
                self.trouble.note(&error, self.now);
            }
            Message::Worker(Event::Resolve { device, address }) => self.hands.resolve(address, device),
            Message::Worker(Event::Learned { device, address, mac }) => {
                self.due.changes |= self.learned.insert((device, address), mac) != Some(mac);
            }
            // Who hands events on writes it.
            Message::Worker(Event::Logged(_)) => {}
            Message::Cluster => self.begin_reload(Scope::Cluster),
            Message::Files(trigger) => {
                // What a signal asks for is set right also where no file changed.
                if trigger == Trigger::Signal {
                    self.plumbed = None;
                    self.due.changes = true;
                } else {
                    self.watches = true;
                }
                self.begin_reload(Scope::Files);
            }
            Message::Prepared(finished) => self.prepared(*finished),
            Message::Ports(listening, sockets) => self.ports(listening, sockets),
            Message::Pod(ask) => self.asked(ask),
            Message::ToClose { device, link, answer } => {
                let closed = self.close(&device, link);
                if let Err(why) = &closed {
                    warn!(device, why, "a new pod's device cannot be closed");
                }
                drop(answer.send(closed));
            }
            Message::Client(Request::Verify, stream, place) => self.verify(Some((stream, place))),
            Message::Verified(round) => self.verified(round),
            Message::Client(request, stream, place) => {
                let answer = self.answer(request);
                if let Err(error) = self.answers.begin(answer, stream, place) {
                    warn!(%error, "a client was not answered");
                }
            }
            // Who asked may have gone.
            Message::Facts(asker) => drop(asker.send(self.facts())),
            Message::Plumbed(outcome) => self.plumbed(outcome),
        }
        Ok(false)
    }

    /// Does what is owed, as far as it is time for it.
    fn settle(&mut self) {
        let now = self.now;
        let has_pace = self.published.is_none_or(|published| now >= published + PACE);
        if self.is_owed() && has_pace {
            if std::mem::take(&mut self.due).all {
                self.trying = Some(self.trouble.begin_try(now));
                self.adopt_what_is_left();
            }
            self.follow_devices();
            if let Err(error) = self.publish() {
                self.trouble.note(&error, now);
            }
            self.due.pods = true;
        }
        if self.follows
            && self.watches
            && !self.plumbing
            && let Some(begun) = self.trying.take()
        {
            self.trouble.end_try(&begun, now);
        }
        // What was taken over must be in force, and the kernel's way to it there.
        if self.due.pods && self.pending.is_none() && !self.plumbing {
            self.due.pods = false;
            self.settle_pods();
        }
        if !self.serves && self.pending.is_none() && !self.plumbing {
            self.serves = true;
            self.say_it_runs();
            self.tell_faults();
        }
        if self.serves && self.is_told.in_force && !self.is_told.is_up && self.pending.is_none() && !self.plumbing {
            self.is_told.is_up = true;
            self.cluster.iter().filter_map(Source::speaker).for_each(|speaker| speaker.set_up());
        }
        self.verify_if_due();
    }

    fn say_it_runs(&self) {
        let status = self.hands.status();
        let modes = status.get("modes").and_then(serde_json::Value::as_array);
        for mode in modes.into_iter().flatten().filter(|mode| mode["program"] != "socket") {
            let [device, program, reason] =
                ["device", "program", "reason"].map(|key| mode[key].as_str().unwrap_or("-"));
            info!(device, program, mode = mode["mode"].as_str().unwrap_or("-"), reason, "program");
        }
        info!("the router runs");
    }

    fn plumbed(&mut self, outcome: Result<HostReport, KernelError>) {
        self.plumbing = false;
        self.due.pods = true;
        match outcome {
            Ok(report) => self.tell(report),
            Err(error) => {
                self.plumbed = None;
                self.trouble.note(&error, self.now);
            }
        }
    }

    fn tell(&mut self, report: HostReport) {
        for line in report.changed {
            info!("{line}");
        }
        for line in report.warnings {
            self.warn_once(line);
        }
    }

    fn warn_once(&mut self, line: String) {
        if !self.notes.contains(&line) {
            warn!("{line}");
            self.notes.push(line);
        }
    }

    /// Leaves ports alone that the node has begun to listen on, and takes back those that it has ceased to.
    fn ports(&mut self, listening: Listening, sockets: Option<Sockets>) {
        if sockets.is_some_and(|sockets| self.loaded.has_freed_host_ports(&sockets)) {
            self.begin_reload(Scope::LocalPods);
        }
        if listening == self.listening {
            return;
        }
        match weir_cluster::compile::snat_ports(&self.loaded, &self.rules, &listening) {
            Ok(snat) => {
                (self.listening, self.snat) = (listening, Arc::new(snat));
                self.due.changes = true;
                self.pending.get_or_insert_with(Pending::default);
            }
            Err(error) => warn!(%error, "source ports stay as they were"),
        }
    }

    /// The files that are read.
    fn files(&self) -> Vec<PathBuf> {
        std::iter::once(&self.path).chain(&self.loaded.config.manifests).cloned().collect()
    }

    /// This node's own addresses.
    fn addresses(&self) -> Vec<IpAddr> {
        assemble::own_addresses(&self.view, &self.devices.roles)
    }

    fn config(&self) -> &RouterConfig {
        &self.loaded.config
    }

    /// Ends what it serves: nobody is told any more that a pod is in force. What is attached stays: pods are closed until the next router adopts
    /// them. The runtime of the tasks must have ended.
    pub(crate) fn end(mut self) {
        self.inbox.close();
        while self.inbox.try_recv().is_ok() {}
        self.pods = None;
        let totals = self.totals();
        info!(rx = totals.rx, tx = totals.tx, punted = totals.punted, dropped = totals.dropped(), "the router ends");
        info!("programs stay attached, so pods stay closed until weir runs again; `weir detach` takes everything off");
    }
}
