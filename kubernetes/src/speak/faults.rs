//! What is at fault, where people look: an Event on the object, and a condition where its kind has conditions. One node says it for all.
//!
//! *Bounded*: an event that is the same is counted up ([`AGAIN`]), there is a rate for all ([`RATE`]), and a number of objects ([`OBJECTS`]). Nodes without
//! a fault, now or before, do not even look at the lease.
//!
//! *What ends*: a condition becomes True again. Who takes the lease over looks for those that others left False.

use std::{
    collections::BTreeMap,
    hash::{Hash as _, Hasher as _},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;
use weir_cluster::resources::{ObjectId, Substitute, live::Fnv};

use super::{
    FORBIDDEN, JSON, MERGE, Refused, Speaker, code_of, find, jittered,
    lease::{Held, Lease},
    longer, now, now_in_micros,
};
use crate::{
    dial::Failure,
    resource::Resource,
    watch::Shared,
    wire::{FIRST_PAGE, ListMetadata},
};

/// The type of the condition.
pub const ACCEPTED: &str = "weir/Accepted";
/// After how long an event is repeated while its fault lasts: API servers forget events after an hour.
const AGAIN: Duration = Duration::from_secs(1800);
/// How many things may be written at once, and how long each takes to be allowed again.
const RATE: (u32, Duration) = (50, Duration::from_secs(2));
/// The most objects whose faults are said.
const OBJECTS: usize = 1000;
/// The most bytes of an event's note (Kubernetes' validation of events).
const NOTE: usize = 1024;

/// An object at fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which.
    pub object: ObjectId,
    /// What is wrong, and what became of it.
    pub message: String,
}

impl Fault {
    /// What a configuration says of an object that is at fault, if it is known which.
    pub fn of(faulty: &weir_cluster::translate::Faulty) -> Option<Self> {
        let object = faulty.id.clone()?;
        let kept = match faulty.substitute {
            Substitute::LastGood => "weir goes on with its last good version",
            Substitute::Nothing if object.is_policy() => "weir denies what it selects",
            Substitute::Nothing => "weir leaves it out",
        };
        let mut message = format!("{}; {kept}", without_versions(&faulty.problem));
        if message.len() > NOTE {
            message.truncate(message.floor_char_boundary(NOTE));
        }
        Some(Self { object, message })
    }
}

/// Without "(resourceVersion N)": the same fault of another version is the same fault.
fn without_versions(text: &str) -> String {
    let mut rest = text;
    let mut without = String::new();
    while let Some((before, after)) = rest.split_once(" (resourceVersion ") {
        without += before;
        rest = after.split_once(')').map_or("", |(_, after)| after);
    }
    without + rest
}

/// What was said of an object.
struct Said {
    message: String,
    /// When, where it was by an event.
    at: Option<Instant>,
    count: u32,
}

/// Things that may still be written.
struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    fn take(&mut self, now: Instant) -> bool {
        let more = (now.saturating_duration_since(self.since).as_secs_f64() / RATE.1.as_secs_f64()) as u32;
        if more > 0 {
            self.left = self.left.saturating_add(more).min(RATE.0);
            self.since += RATE.1 * more;
        }
        let is_there = self.left > 0;
        self.left -= u32::from(is_there);
        is_there
    }
}

/// Whoever speaks for all.
struct Reporter {
    speaker: Arc<Speaker>,
    shared: Rc<Shared>,
    lease: Lease,
    /// Until when the lease is surely this node's.
    own_until: Option<Instant>,
    /// Whether what others left was looked for since the lease is this node's.
    has_looked: bool,
    said: BTreeMap<ObjectId, Said>,
    budget: Budget,
    /// Of events, and of conditions.
    refused: [Refused; 2],
    /// Until when they are forbidden.
    forbidden: [Option<Instant>; 2],
}

const EVENTS: usize = 0;
const CONDITIONS: usize = 1;

/// Says what is at fault, without an end.
pub async fn run(speaker: Arc<Speaker>, shared: Rc<Shared>) {
    let budget = Budget { left: RATE.0, since: Instant::now() };
    let mut reporter = Reporter {
        speaker: Arc::clone(&speaker),
        shared,
        lease: Lease::default(),
        own_until: None,
        has_looked: false,
        said: BTreeMap::new(),
        budget,
        refused: Default::default(),
        forbidden: [None; 2],
    };
    let lease = speaker.settings.lease;
    let (mut is_candidate, mut pause, mut refused) = (false, Duration::ZERO, Refused::default());
    let mut due = Instant::now();
    loop {
        let faults = Arc::clone(&speaker.wishes().faults);
        is_candidate |= !faults.is_empty();
        if is_candidate && Instant::now() >= due {
            let wants = !faults.is_empty() || !reporter.said.is_empty();
            let outcome = reporter.lease.hold(&speaker, &reporter.shared.dial, wants).await;
            let begin = Instant::now();
            let is_forbidden = refused.hear(code_of(&outcome), &speaker.settings, begin);
            reporter.own_until = matches!(outcome, Ok(Held::Own)).then(|| begin + lease.mul_f64(2.0 / 3.0));
            reporter.has_looked &= reporter.own_until.is_some();
            due = begin
                + match &outcome {
                    Ok(Held::Own) => lease / 3,
                    Ok(Held::Others) => lease.mul_f64(0.5 + 0.5 * crate::watch::random()),
                    Ok(Held::Free) => {
                        is_candidate = wants;
                        lease / 3
                    }
                    Err(_) if is_forbidden => FORBIDDEN,
                    Err(_) => {
                        pause = longer(pause);
                        jittered(pause)
                    }
                };
            match outcome {
                Ok(_) => pause = Duration::ZERO,
                Err(_) => speaker.wishes().fault.hear(&outcome),
            }
        }
        let mut next = due;
        if reporter.owns() {
            let outcome = reporter.say(&faults).await;
            speaker.wishes().owes_ends = !reporter.said.is_empty();
            match outcome {
                Ok(is_all) => {
                    if is_all && faults.is_empty() {
                        // Nothing is left to say: others need not look any more either.
                        super::lease::release(&speaker, &reporter.shared.dial).await;
                        (is_candidate, reporter.own_until, reporter.has_looked) = (false, None, false);
                    } else if !is_all {
                        next = next.min(Instant::now() + RATE.1);
                    }
                }
                Err(failure) => {
                    speaker.wishes().fault.hear::<()>(&Err(failure));
                    pause = longer(pause);
                    next = next.min(Instant::now() + jittered(pause));
                }
            }
        }
        let wait = if is_candidate { next.saturating_duration_since(Instant::now()) } else { AGAIN };
        // A change is looked at once, but not oftener than the rate: what follows from it is said for all of them.
        sleep(Duration::from_millis(100)).await;
        tokio::select! {
            () = speaker.of_faults.notified() => {}
            () = sleep(wait) => {}
        }
    }
}

impl Reporter {
    fn owns(&self) -> bool {
        self.own_until.is_some_and(|until| Instant::now() < until)
    }

    fn is_forbidden(&self, what: usize) -> bool {
        self.forbidden[what].is_some_and(|until| Instant::now() < until)
    }

    /// Says what is to be said; whether that was all of it.
    async fn say(&mut self, faults: &[Fault]) -> Result<bool, Failure> {
        if !self.has_looked {
            self.look_for_what_others_left().await?;
            self.has_looked = true;
        }
        let wanted: BTreeMap<&ObjectId, &Fault> =
            faults.iter().take(OBJECTS).map(|fault| (&fault.object, fault)).collect();
        let mut failed = None;
        for (id, fault) in &wanted {
            let is_said = self
                .said
                .get(*id)
                .is_some_and(|said| said.message == fault.message && said.at.is_some_and(|at| at.elapsed() < AGAIN));
            if is_said {
                continue;
            }
            if !self.owns() || !self.budget.take(Instant::now()) {
                return Ok(false);
            }
            match self.say_fault(fault).await {
                Ok(()) => {}
                Err(failure @ Failure::Refused { .. }) => failed = Some(failure),
                Err(failure) => return Err(failure),
            }
        }
        let over: Vec<ObjectId> = self.said.keys().filter(|id| !wanted.contains_key(id)).cloned().collect();
        for id in over {
            if !self.owns() || !self.budget.take(Instant::now()) {
                return Ok(false);
            }
            match self.say_it_is_over(&id).await {
                Ok(()) => drop(self.said.remove(&id)),
                Err(failure @ Failure::Refused { .. }) => failed = Some(failure),
                Err(failure) => return Err(failure),
            }
        }
        failed.map_or(Ok(true), Err)
    }

    async fn say_fault(&mut self, fault: &Fault) -> Result<(), Failure> {
        let count = self.said.get(&fault.object).filter(|said| said.message == fault.message && said.at.is_some());
        let count = count.map_or(0, |said| said.count) + 1;
        if let Some((resource, object)) = self.object(&fault.object).await? {
            if !self.is_forbidden(EVENTS) {
                let outcome = self.event(&resource, &object, fault, count).await;
                self.settle(EVENTS, outcome)?;
            }
            let condition = ("False", "Faulty", fault.message.as_str());
            self.set_condition(&resource, &object, condition).await?;
        }
        let said = Said { message: fault.message.clone(), at: Some(Instant::now()), count };
        self.said.insert(fault.object.clone(), said);
        Ok(())
    }

    async fn say_it_is_over(&mut self, id: &ObjectId) -> Result<(), Failure> {
        let Some((resource, object)) = self.object(id).await? else { return Ok(()) };
        let has_it = conditions(&object).iter().any(|condition| condition["type"] == ACCEPTED);
        if !has_it {
            return Ok(());
        }
        self.set_condition(&resource, &object, ("True", "Accepted", "weir serves it")).await
    }

    /// What is written well, is forbidden, or can never be written, is done.
    fn settle(&mut self, what: usize, outcome: Result<String, Failure>) -> Result<(), Failure> {
        self.speaker.wishes().fault.hear(&outcome);
        let is_forbidden = self.refused[what].hear(code_of(&outcome), &self.speaker.settings, Instant::now());
        match outcome {
            Ok(_) => Ok(()),
            Err(_) if is_forbidden => {
                self.forbidden[what] = Some(Instant::now() + FORBIDDEN);
                Ok(())
            }
            // It is gone, its namespace is, or the server has another notion of such an object.
            Err(failure) if matches!(failure.code(), 400 | 404 | 413 | 422) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// An object as it is now, with where it is. One that stands in a file is not there.
    async fn object(&self, id: &ObjectId) -> Result<Option<(Resource, Value)>, Failure> {
        let Some(resource) = self.speaker.wishes().resources.get(&(id.group, id.kind)).cloned() else {
            return Ok(None);
        };
        let collection = resource.path_in(&id.namespace);
        // As Calico stores its policies.
        let stored = (resource.group == "crd.projectcalico.org").then(|| format!("default.{}", id.name));
        for name in [Some(id.name.to_string()), stored].into_iter().flatten() {
            if let Some(object) = find(&self.shared.dial, &collection, &name).await? {
                return Ok(Some((resource, object)));
            }
        }
        Ok(None)
    }

    async fn event(&self, resource: &Resource, object: &Value, fault: &Fault, count: u32) -> Result<String, Failure> {
        let metadata = &object["metadata"];
        let namespace = metadata["namespace"].as_str().unwrap_or("default");
        let collection = format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events");
        // The same in every node, so that who takes over counts up what is there.
        let mut hasher = Fnv::default();
        (metadata["uid"].as_str(), &fault.message).hash(&mut hasher);
        let mut stem = metadata["name"].as_str().unwrap_or_default().to_owned();
        stem.truncate(stem.floor_char_boundary(200));
        let name = format!("{}.{:016x}", stem.trim_end_matches(['.', '-']), hasher.finish());
        let time = now_in_micros();
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": name, "namespace": namespace},
            "eventTime": time, "type": "Warning", "reason": "Faulty", "action": "Judge", "note": fault.message,
            "reportingController": "weir", "reportingInstance": self.speaker.settings.node,
            "regarding": {
                "apiVersion": resource.api_version(), "kind": resource.kind, "namespace": metadata["namespace"],
                "name": metadata["name"], "uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"],
            },
        });
        let dial = &self.shared.dial;
        if count == 1 {
            match dial.write(Method::POST, &collection, JSON, event.to_string()).await {
                Err(failure) if failure.code() == 409 => {}
                other => return other,
            }
        }
        let series = json!({"series": {"count": count.max(2), "lastObservedTime": time}}).to_string();
        match dial.write(Method::PATCH, &format!("{collection}/{name}"), MERGE, series).await {
            Err(failure) if failure.code() == 404 => {
                dial.write(Method::POST, &collection, JSON, event.to_string()).await
            }
            other => other,
        }
    }

    /// Sets the condition of an object whose kind has conditions, unless it is so.
    async fn set_condition(
        &mut self,
        resource: &Resource,
        object: &Value,
        (status, reason, message): (&str, &str, &str),
    ) -> Result<(), Failure> {
        if !has_conditions(resource) || self.is_forbidden(CONDITIONS) {
            return Ok(());
        }
        let mut all = conditions(object).to_vec();
        let known = all.iter().position(|condition| condition["type"] == ACCEPTED);
        let before = known.map(|index| all.remove(index)).unwrap_or_default();
        if before["status"] == status && before["message"] == message && before["reason"] == reason {
            return Ok(());
        }
        let since = if before["status"] == status { before["lastTransitionTime"].clone() } else { json!(now()) };
        let mut condition = json!({
            "type": ACCEPTED, "status": status, "reason": reason, "message": message, "lastTransitionTime": since,
        });
        let metadata = &object["metadata"];
        if let Some(generation) = metadata["generation"].as_i64() {
            condition["observedGeneration"] = json!(generation);
        }
        all.push(condition);
        // Others write conditions too: of another version the server refuses it.
        let patch = json!({
            "metadata": {"resourceVersion": metadata["resourceVersion"], "uid": metadata["uid"]},
            "status": {"conditions": all},
        });
        let collection = resource.path_in(metadata["namespace"].as_str().unwrap_or_default());
        let path = format!("{collection}/{}/status", metadata["name"].as_str().unwrap_or_default());
        let outcome = self.shared.dial.write(Method::PATCH, &path, MERGE, patch.to_string()).await;
        self.settle(CONDITIONS, outcome)
    }

    /// Whoever had the lease before may have left conditions False whose fault is over.
    async fn look_for_what_others_left(&mut self) -> Result<(), Failure> {
        let resources: Vec<(&'static str, Resource)> = {
            let wishes = self.speaker.wishes();
            let all = wishes.resources.iter().filter(|(_, resource)| has_conditions(resource));
            all.map(|((group, _), resource)| (*group, resource.clone())).collect()
        };
        for (group, resource) in resources {
            let mut more = FIRST_PAGE.to_owned();
            loop {
                let path = format!("{}?{more}", resource.path());
                let text = self.shared.dial.text(&path).await?;
                let page: Page = serde_json::from_str(&text).map_err(|error| Failure::Nonsense(error.to_string()))?;
                for One { metadata, status } in page.items.unwrap_or_default() {
                    let conditions = status.unwrap_or_default().conditions.unwrap_or_default();
                    if conditions.iter().any(|one| one.type_ == ACCEPTED && one.status == "False") {
                        let (namespace, name) = (metadata.namespace.into(), metadata.name.into());
                        let id = ObjectId { group, kind: resource.kind, namespace, name };
                        self.said.entry(id).or_insert(Said { message: String::new(), at: None, count: 0 });
                    }
                }
                match page.metadata.next_page()? {
                    Some(next) => more = next,
                    None => break,
                }
            }
        }
        Ok(())
    }
}

/// Of a page, what is looked at.
#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    metadata: ListMetadata,
    #[serde(default)]
    items: Option<Vec<One>>,
}

#[derive(Deserialize)]
struct One {
    metadata: Called,
    #[serde(default)]
    status: Option<WithConditions>,
}

#[derive(Deserialize)]
struct Called {
    name: String,
    #[serde(default)]
    namespace: String,
}

#[derive(Default, Deserialize)]
struct WithConditions {
    #[serde(default)]
    conditions: Option<Vec<Condition>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Condition {
    #[serde(rename = "type")]
    type_: String,
    status: String,
}

fn has_conditions(resource: &Resource) -> bool {
    matches!(resource.kind, "Service" | "ClusterNetworkPolicy")
}

fn conditions(object: &Value) -> &[Value] {
    object["status"]["conditions"].as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_fault_of_another_version_is_the_same() {
        let text = "Service/x/a (resourceVersion 12) spec.ports: error: it is Service/x/b (resourceVersion 9)'s too";
        assert_eq!(without_versions(text), "Service/x/a spec.ports: error: it is Service/x/b's too");
        assert_eq!(without_versions("a (resourceVersion 12"), "a");
        assert_eq!(without_versions("plain"), "plain");
    }

    #[test]
    fn what_is_written_has_a_rate() {
        let start = Instant::now();
        let mut budget = Budget { left: RATE.0, since: start };
        let taken = |budget: &mut Budget, now| (0..1000).filter(|_| budget.take(now)).count();
        assert_eq!(taken(&mut budget, start), 50);
        assert_eq!(taken(&mut budget, start + RATE.1 * 3), 3);
        assert_eq!(taken(&mut budget, start + RATE.1 * 1000), 50);
    }
}
