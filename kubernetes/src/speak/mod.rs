//! What a node says to the API server.
//!
//! # Theory
//!
//! *Wanted, not done.* Whoever wants something written says what the state is to be ([`Speaker`]), and waits for nothing. The newest wish for an object stands;
//! what was not written of an older one never is. There is room for a bounded number of them.
//!
//! *Three things are said*, each by tasks of its own on the source's thread, so that none waits for another: the addresses of pods ([`pods`]), that the
//! network of the own node is there ([`node`]), and what is at fault ([`faults`]), which one node says for all by a lease ([`lease`]).
//!
//! *What fails* is tried again, from 0.8 s to 30 s later, unless the server says that it never will be so: the object is gone or is another's, which ends a
//! wish well. Who may not write (403) is told so, and says nothing more of that sort for [`FORBIDDEN`]; but only where that goes on for a while, as a server that
//! has just started refuses everybody until it knows its roles. None of it holds up what is read.

mod faults;
mod lease;
mod node;
mod pods;

use std::{
    collections::BTreeMap,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Receiver},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::{
    sync::Notify,
    task::{AbortHandle, spawn_local},
};
use weir_cluster::resources::meta::Name;

pub use self::{faults::Fault, pods::PodAddresses};
use crate::{
    dial::{Dial, Failure},
    resource::Resource,
    watch::{BACKOFF, Shared, random},
};

/// How long nothing more is said of what was forbidden.
const FORBIDDEN: Duration = Duration::from_secs(600);
const MERGE: &str = "application/merge-patch+json";
const JSON_PATCH: &str = "application/json-patch+json";
const JSON: &str = "application/json";

/// Who speaks, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The own Node's name.
    pub node: String,
    /// The taint that is taken off the own Node once it is up, by its key.
    pub startup_taint: Option<String>,
    /// The namespace of the lease.
    pub lease_namespace: String,
    /// For how long a node has the lease after it was last heard of. It is renewed every third of that.
    pub lease: Duration,
    /// For how long a server has to go on refusing (403) before it is believed.
    pub refusals: Duration,
}

impl Settings {
    /// Of a weir.yaml.
    pub fn of(config: &weir_cluster::config::RouterConfig) -> Option<Self> {
        let kubernetes = config.kubernetes.as_ref()?;
        Some(Self {
            node: config.node_name.clone(),
            startup_taint: kubernetes.startup_taint.clone(),
            lease_namespace: kubernetes.lease_namespace.clone(),
            lease: Duration::from_secs(60),
            refusals: Duration::from_secs(30),
        })
    }
}

/// What became of one sort of things to say.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// How many times something was written.
    pub written: u64,
    /// What went wrong last, if nothing of the sort has gone well since.
    pub problem: Option<String>,
}

impl Told {
    fn hear<T>(&mut self, outcome: &Result<T, Failure>) {
        match outcome {
            Ok(_) => (self.written, self.problem) = (self.written + 1, None),
            Err(failure) => self.problem = Some(failure.to_string()),
        }
    }
}

/// Since when a server refuses to have something written, as it is not allowed.
#[derive(Default)]
struct Refused {
    since: Option<Instant>,
}

impl Refused {
    /// What was answered; whether it is to be believed that it is forbidden.
    fn hear(&mut self, code: u16, settings: &Settings, now: Instant) -> bool {
        match code {
            403 => now.saturating_duration_since(*self.since.get_or_insert(now)) >= settings.refusals,
            200 => {
                self.since = None;
                false
            }
            _ => false,
        }
    }
}

/// HTTP's code of an outcome; 0 where there is none.
fn code_of<T>(outcome: &Result<T, Failure>) -> u16 {
    outcome.as_ref().err().map_or(200, Failure::code)
}

/// What there is to say.
#[derive(Default)]
struct Wishes {
    pods: pods::Wishes,
    /// Whether policy is in force that the cluster itself has told.
    is_up: bool,
    /// The uid of the own Node and the status of its condition, as they were seen last.
    seen: Option<(Option<Name>, Option<Name>)>,
    faults: Arc<[Fault]>,
    /// Where objects are, by group and kind of what is read.
    resources: BTreeMap<(&'static str, &'static str), Resource>,
    node: Told,
    fault: Told,
    /// Who has the lease, as far as this node knows.
    holder: Option<String>,
    /// Whether it is to be said of some objects that their fault is over.
    owes_ends: bool,
    tasks: Vec<AbortHandle>,
}

/// Says things to an API server. Nothing here waits for it.
pub struct Speaker {
    settings: Settings,
    wishes: Mutex<Wishes>,
    of_pods: Notify,
    of_node: Notify,
    of_faults: Notify,
}

impl Speaker {
    pub(crate) fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            settings,
            wishes: Mutex::default(),
            of_pods: Notify::new(),
            of_node: Notify::new(),
            of_faults: Notify::new(),
        })
    }

    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pod was given addresses: they are to stand on its object. The receiver hears when that is so, or was tried in vain once; `None` where
    /// waiting is of no use.
    pub fn announce(&self, pod: PodAddresses) -> Option<Receiver<()>> {
        let heard = self.wishes().pods.announce(pod, Instant::now());
        self.of_pods.notify_one();
        heard
    }

    /// A pod's addresses are taken away: they are to stand on its object no more.
    pub fn withdraw(&self, pod: PodAddresses) {
        self.wishes().pods.withdraw(pod, Instant::now());
        self.of_pods.notify_one();
    }

    /// Policy is in force, as the cluster itself has told it.
    pub fn set_up(&self) {
        self.wishes().is_up = true;
        self.of_node.notify_one();
    }

    /// All that is at fault now.
    pub fn set_faults(&self, faults: Vec<Fault>) {
        let mut wishes = self.wishes();
        if *wishes.faults != *faults {
            wishes.faults = faults.into();
            self.of_faults.notify_one();
        }
    }

    pub(crate) fn node_name(&self) -> &str {
        &self.settings.node
    }

    /// What the own Node says.
    pub(crate) fn saw_node(&self, seen: Option<(Option<Name>, Option<Name>)>) {
        let mut wishes = self.wishes();
        if wishes.seen != seen {
            wishes.seen = seen;
            self.of_node.notify_one();
        }
    }

    /// Where objects of a kind are.
    pub(crate) fn saw_resource(&self, resource: &Resource) {
        let key = (resource.live().group(), resource.kind);
        self.wishes().resources.insert(key, resource.clone());
    }

    /// For `weir status`.
    pub fn status(&self) -> Value {
        let wishes = self.wishes();
        let told = |told: &Told| json!({"written": told.written, "problem": told.problem});
        let mut pods = told(&wishes.pods.told);
        pods["waiting"] = json!(wishes.pods.len());
        let mut faults = told(&wishes.fault);
        faults["leaseHolder"] = json!(wishes.holder);
        json!({"podAddresses": pods, "node": told(&wishes.node), "faults": faults})
    }

    /// Whether this node has the lease.
    pub(crate) fn has_lease(&self) -> bool {
        self.wishes().holder.as_ref() == Some(&self.settings.node)
    }

    /// Begins to say what is wished.
    pub(crate) fn begin(self: &Arc<Self>, shared: &Rc<Shared>) {
        let of_pods = (0..pods::AT_ONCE).map(|_| spawn_local(pods::run(Arc::clone(self), Rc::clone(shared))));
        let mut tasks: Vec<_> = of_pods.map(|task| task.abort_handle()).collect();
        tasks.push(spawn_local(node::run(Arc::clone(self), Rc::clone(shared))).abort_handle());
        tasks.push(spawn_local(faults::run(Arc::clone(self), Rc::clone(shared))).abort_handle());
        self.wishes().tasks = tasks;
    }

    /// Gives back what this node alone has.
    pub(crate) async fn end(&self, shared: &Shared) {
        std::mem::take(&mut self.wishes().tasks).iter().for_each(AbortHandle::abort);
        // Whoever has no fault any more takes no lease that was given back, but one that runs out, and looks for what is left to be said.
        let is_settled = {
            let wishes = self.wishes();
            !wishes.faults.is_empty() || !wishes.owes_ends
        };
        if self.has_lease() && is_settled {
            lease::release(self, &shared.dial).await;
        }
    }
}

/// The pause after one that failed.
fn longer(pause: Duration) -> Duration {
    (pause * 2).clamp(BACKOFF.0, BACKOFF.1)
}

/// The same, a little other each time.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.8 + 0.4 * random())
}

/// The time as conditions have it.
fn now() -> String {
    format!("{:.0}", Timestamp::now())
}

/// The time as events and leases have it.
fn now_in_micros() -> String {
    format!("{:.6}", Timestamp::now())
}

/// An object by its name, if there is one: who may list a kind may do that.
async fn find(dial: &Dial, collection: &str, name: &str) -> Result<Option<Value>, Failure> {
    // Names of objects have nothing that a query must not have, but who knows.
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c)).collect();
    let text = dial.text(&format!("{collection}?fieldSelector=metadata.name%3D{name}")).await?;
    let mut list: Value = serde_json::from_str(&text).map_err(|error| Failure::Nonsense(error.to_string()))?;
    Ok(list["items"].as_array_mut().and_then(Vec::pop))
}
