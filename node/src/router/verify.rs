//! Whether what is in force is what it should be: asked by `weir verify`, and by the router itself, rarely.
//!
//! A *round* is made on a thread beside control: sources are read afresh, translated and compiled from nothing, and compared with what is in
//! force; what the programs' maps have is read back from the kernel. The world changes meanwhile, so that a round alone proves nothing: a difference
//! counts only where [`ROUNDS`] rounds, with pauses and begun at quiet moments, find it with the same thing in force. What counts is told, and
//! mended: a configuration is made from nothing and takes the place of that in force, and the programs are told anew. Rounds after
//! that say whether it helped.

use std::{
    collections::BTreeSet,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tokio::{net::UnixStream, sync::OwnedSemaphorePermit};
use tracing::{error, info, warn};
use weir_cluster::{
    translate::{LastApi, Loader},
    verify::{Difference, Whole, differences},
};
use weir_dataplane::{
    attach::{AttachError, Owned, WrongEntry},
    forwarding::Forwarding,
    model::{Cluster, Links},
    snapshot::Rules,
};
use weir_kubernetes::{Lister, Source, Unlike, watch::random};
use weir_nat::{Model as Services, SnatPorts};
use weir_policy::Model as Policy;

use super::{Router, answers::Answer, assemble::owned, configuration::Pending, inbox::Message};
use crate::prepare::{Basis, Prepared, Scope, afresh};

/// Rounds that must find a difference, and the pause between two of them.
const ROUNDS: usize = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// How long a quiet moment is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Differences that are logged, and that a client is told.
const TOLD: usize = 100;
/// How long the lists of a running cluster may take.
const LISTS: Duration = Duration::from_secs(120);

/// Reads the programs' maps back, and compares them with what is owned.
pub(super) type ReadMaps = Box<dyn FnOnce(&Owned) -> Result<Vec<WrongEntry>, AttachError> + Send>;

/// A round's end: what is another, or why that cannot be told.
pub(super) type Round = Result<Vec<Difference>, String>;

/// What is known of verifications.
pub(super) struct Verify {
    /// Has loaded nothing; each round has one like it.
    loader: Loader,
    deliver: Arc<dyn Fn(Message) + Send + Sync>,
    /// The mean time between those that nobody asks for.
    every: Option<Duration>,
    /// When the next of these is due.
    next: Option<Instant>,
    run: Option<Run>,
    clients: Vec<(UnixStream, OwnedSemaphorePermit)>,
    runs: u64,
    differences: u64,
    mended: u64,
    failed: u64,
    /// What became of the last one, when it ended, and how long it took.
    last: Option<(Value, SystemTime, Duration)>,
}

/// A verification that is under way.
struct Run {
    begun: Instant,
    /// When the next round is due; `None`: one is being made.
    due: Option<Instant>,
    rounds: usize,
    /// What all rounds have found.
    found: Vec<Difference>,
    /// What was found and is being mended.
    mending: Option<Vec<Difference>>,
}

impl Run {
    fn new(now: Instant) -> Self {
        Self { begun: now, due: Some(now), rounds: 0, found: Vec::new(), mending: None }
    }
}

impl Verify {
    /// With a loader that numbers objects as the one of what is in force does. `deliver` is called on a thread that may wait.
    pub(super) fn new(loader: Loader, deliver: impl Fn(Message) + Send + Sync + 'static) -> Self {
        Self {
            loader,
            deliver: Arc::new(deliver),
            every: None,
            next: None,
            run: None,
            clients: Vec::new(),
            runs: 0,
            differences: 0,
            mended: 0,
            failed: 0,
            last: None,
        }
    }

    /// From now on so often, at random times.
    pub(super) fn every(&mut self, every: Option<Duration>, now: Instant) {
        if every != self.every {
            self.every = every;
            self.plan(now);
        }
    }

    /// Half of the mean time to one and a half of it from now.
    fn plan(&mut self, now: Instant) {
        self.next = self.every.map(|every| now + every.mul_f64(0.5 + random()));
    }

    /// When there is something to begin.
    pub(super) fn due(&self) -> Option<Instant> {
        self.run.as_ref().map_or(self.next, |run| run.due)
    }

    #[cfg(test)]
    pub(super) fn is_at_work(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.due.is_none())
    }

    /// What was found last, as who asked was told.
    #[cfg(test)]
    pub(super) fn last_found(&self) -> String {
        self.last.as_ref().map_or(String::new(), |(answer, ..)| answer.to_string())
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (u64, u64, u64, u64) {
        (self.runs, self.differences, self.mended, self.failed)
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "everySeconds": self.every.map(|every| every.as_secs()), "runs": self.runs, "differences": self.differences,
            "mended": self.mended, "failed": self.failed,
            "lastUnixSeconds": self.last.as_ref().and_then(|(_, at, _)| Some(at.duration_since(UNIX_EPOCH).ok()?.as_secs())),
            "tookMs": self.last.as_ref().map(|(.., took)| took.as_millis() as u64),
        })
    }
}

/// What is in force when a round begins, and what it is compared by.
struct InForce {
    cluster: Arc<Cluster>,
    services: Services,
    policy: Arc<Policy>,
    rules: Arc<Rules>,
    snat: Arc<SnatPorts>,
    owned: Owned,
    links: Links,
}

impl Router {
    /// Begins a verification for a client, or lets the client wait for the one that is under way.
    pub(super) fn verify(&mut self, client: Option<(UnixStream, OwnedSemaphorePermit)>) {
        self.verify.clients.extend(client);
        let now = self.now;
        self.verify.run.get_or_insert_with(|| Run::new(now));
    }

    /// Begins what is due, at a quiet moment: where nothing waits to come into force.
    pub(super) fn verify_if_due(&mut self) {
        let now = self.now;
        if self.verify.run.is_none() && self.verify.next.is_some_and(|next| next <= now) {
            self.verify.run = Some(Run::new(now));
        }
        let Some(run) = &self.verify.run else { return };
        let Some(due) = run.due.filter(|due| *due <= now) else { return };
        let is_quiet = self.serves && self.pending.is_none() && !self.is_owed() && self.preparer.is_idle();
        if !is_quiet && due + PATIENCE > now {
            return;
        }
        let begun = self.begin_round();
        if let (Some(run), Ok(())) = (&mut self.verify.run, &begun) {
            run.due = None;
        }
        if let Err(error) = begun {
            self.end_verification(Err(error));
        }
    }

    fn begin_round(&mut self) -> Result<(), String> {
        let in_force = InForce {
            cluster: Arc::clone(&self.loaded.cluster),
            services: self.loaded.services.clone(),
            policy: Arc::clone(&self.loaded.policy),
            rules: Arc::clone(&self.rules),
            snat: Arc::clone(&self.snat),
            owned: self.owned.clone().ok_or("the programs' maps could not be written yet; `weir status` says why")?,
            links: self.links.clone(),
        };
        let basis = Basis {
            in_force: Arc::clone(&self.loaded.objects),
            own_addresses: self.in_force_addresses.clone(),
            local_pods: Arc::clone(&self.loaded.local_pods),
            live: self.cluster.as_ref().and_then(Source::objects).unwrap_or_default(),
            listening: self.listening.clone(),
            host_ports: self.loaded.served_host_ports(),
        };
        let mut loader = self.verify.loader.afresh();
        loader.begin_from_api(LastApi::of(&self.loaded.services));
        let lister = self.cluster.as_ref().map(Source::lister);
        let (read_maps, deliver) = (self.hands.read_maps(), Arc::clone(&self.verify.deliver));
        let work = move || deliver(Message::Verified(round(&in_force, lister.as_ref(), loader, basis, read_maps)));
        let thread = thread::Builder::new().name("weir-verify".into()).spawn(work);
        thread.map(drop).map_err(|error| format!("there is no thread for it: {error}"))
    }

    /// A round has ended.
    pub(super) fn verified(&mut self, round: Round) {
        let Some(run) = &mut self.verify.run else { return };
        let found = match round {
            Ok(found) => found,
            Err(error) => return self.end_verification(Err(error)),
        };
        let key = |one: &Difference| (one.part, one.object.clone(), one.in_force.clone());
        run.found = match run.rounds {
            0 => found,
            _ => {
                let known: BTreeSet<_> = run.found.iter().map(key).collect();
                found.into_iter().filter(|one| known.contains(&key(one))).collect()
            }
        };
        run.rounds += 1;
        if !run.found.is_empty() && run.rounds < ROUNDS {
            run.due = Some(self.now + PAUSE);
            return;
        }
        let found = std::mem::take(&mut run.found);
        match run.mending.take() {
            None if found.is_empty() => self.end_verification(Ok(Vec::new())),
            None => self.mend(found),
            Some(mended) => {
                let left: BTreeSet<_> = found.iter().map(|one| (one.part, &one.object)).collect();
                let outcome = mended.into_iter().map(|one| {
                    let is_mended = !left.contains(&(one.part, &one.object));
                    (one, is_mended)
                });
                let outcome = outcome.collect();
                self.end_verification(Ok(outcome));
            }
        }
    }

    fn mend(&mut self, found: Vec<Difference>) {
        for Difference { part, object, in_force, wanted } in found.iter().take(TOLD) {
            error!(part, object, in_force, wanted, "what is in force is not what it should be, and is made anew");
        }
        if found.len() > TOLD {
            error!("and {} differences more", found.len() - TOLD);
        }
        // The programs are told whatever they were told before; the kernel's routes too.
        (self.owned, self.plumbed) = (None, None);
        if found.iter().any(|one| one.part != MAPS) {
            if let Some(cluster) = &self.cluster {
                cluster.lister().follow_anew();
            }
            self.preparer.forget();
            // What is wrong is not published once more: that comes with what is made anew.
            self.begin_reload(Scope::Files);
        } else {
            self.due.changes = true;
            self.pending.get_or_insert_with(Pending::default).is_of_endpoints = false;
        }
        if let Some(run) = &mut self.verify.run {
            *run = Run { due: Some(self.now + PAUSE), rounds: 0, found: Vec::new(), mending: Some(found), ..*run };
        }
    }

    /// Counts, and tells who asked. The outcome has each difference, and whether it is mended.
    fn end_verification(&mut self, outcome: Result<Vec<(Difference, bool)>, String>) {
        let now = self.now;
        let took = self.verify.run.take().map_or(Duration::ZERO, |run| now.saturating_duration_since(run.begun));
        let answer = match outcome {
            Ok(found) => {
                let mended = found.iter().filter(|(_, is_mended)| *is_mended).count();
                self.verify.runs += 1;
                self.verify.differences += found.len() as u64;
                self.verify.mended += mended as u64;
                if found.is_empty() {
                    info!(took_ms = took.as_millis() as u64, "verified: what is in force is what it should be");
                } else {
                    error!(differences = found.len(), mended, "verified: what was in force was not what it should be");
                }
                let one = |(one, is_mended): &(Difference, bool)| {
                    json!({
                        "part": one.part, "object": one.object, "inForce": one.in_force, "wanted": one.wanted, "mended": is_mended,
                    })
                };
                let told: Vec<Value> = found.iter().take(TOLD).map(one).collect();
                json!({"differences": told, "count": found.len(), "mended": mended, "tookMs": took.as_millis() as u64})
            }
            Err(problem) => {
                self.verify.failed += 1;
                warn!(problem, "it cannot be told whether what is in force is what it should be");
                json!({"problem": problem, "tookMs": took.as_millis() as u64})
            }
        };
        self.verify.last = Some((answer.clone(), SystemTime::now(), took));
        self.verify.plan(now);
        for (stream, place) in std::mem::take(&mut self.verify.clients) {
            if let Err(error) = self.answers.begin(Answer::Line(answer.clone()), stream, place) {
                warn!(%error, "a client was not answered");
            }
        }
    }
}

/// The part of what is followed of a running cluster.
const FOLLOWED: &str = "followed objects";
/// The part of what is read back from the kernel: to mend it, nothing else is made anew.
const MAPS: &str = "maps";

fn round(in_force: &InForce, lister: Option<&Lister>, loader: Loader, basis: Basis, read_maps: ReadMaps) -> Round {
    let unlike = lister.map_or(Ok(Vec::new()), |lister| lister.compare(LISTS))?;
    let prepared = afresh(loader, basis).map_err(|refused| format!("sources cannot be read afresh: {refused}"))?;
    let Prepared { loaded, rules, snat, .. } = &prepared;
    let is = Whole {
        cluster: &in_force.cluster,
        services: &in_force.services,
        policy: &in_force.policy,
        rules: &in_force.rules,
        snat: &in_force.snat,
    };
    let should = Whole { cluster: &loaded.cluster, services: &loaded.services, policy: &loaded.policy, rules, snat };
    let mut found = differences(&is, &should);
    // Of what differs already, the rest follows.
    if found.is_empty() {
        let forwarding = Forwarding::compile(&loaded.cluster, &in_force.links).map_err(|error| error.to_string())?;
        let should = format!("{:?}", owned(loaded, rules, snat, &forwarding));
        let is = format!("{:?}", in_force.owned);
        if is != should {
            found.push(Difference::new("owned", "what the programs take from the node's kernel", &is, &should));
        }
    }
    found.extend(unlike.into_iter().map(|Unlike { object, known, listed }| {
        let version = |version: Option<String>| version.map_or(String::new(), |one| format!("resourceVersion {one}"));
        Difference::new(FOLLOWED, object, &version(known), &version(listed))
    }));
    let wrong = read_maps(&in_force.owned).map_err(|error| format!("the programs' maps cannot be read: {error}"))?;
    found.extend(wrong.into_iter().map(|WrongEntry { map, entry, is_there }| {
        let [is, should] = if is_there { [&entry, ""] } else { ["", &*entry] };
        Difference::new(MAPS, format!("{map}: {entry}"), is, should)
    }));
    Ok(found)
}
