//! That the network of the own node is there: its condition, as Calico's node sets it, and a taint that kept pods away until then.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::Method;
use serde_json::{Value, json};
use tokio::time::sleep;
use weir_cluster::resources::{kubernetes::NETWORK_UNAVAILABLE, meta::Name};

use super::{FORBIDDEN, MERGE, Settings, Speaker, find, jittered, longer, now};
use crate::{
    dial::{Dial, Failure},
    watch::Shared,
};

const STRATEGIC: &str = "application/strategic-merge-patch+json";
/// How often it is looked for the taint without an occasion: a Node that is made anew has it again.
const LOOK: Duration = Duration::from_secs(600);
/// How long a written condition has to come back by the watch before it is written again.
const COMES_BACK: Duration = Duration::from_secs(5);

/// One of the two things, as it goes.
#[derive(Default)]
struct Step {
    pause: Duration,
    /// Not before.
    due: Option<Instant>,
}

impl Step {
    fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| due <= now)
    }

    fn heard(&mut self, outcome: &Result<(), Failure>, rest: Duration, now: Instant) {
        self.pause = if outcome.is_ok() { Duration::ZERO } else { longer(self.pause) };
        let wait = match outcome {
            Ok(()) => rest,
            Err(failure) if failure.code() == 403 => FORBIDDEN,
            Err(_) => self.pause,
        };
        self.due = Some(now + jittered(wait));
    }
}

/// Says it once it is so, and whenever the Node says otherwise, without an end.
pub async fn run(speaker: Arc<Speaker>, shared: Rc<Shared>) {
    let settings = &speaker.settings;
    let (mut condition, mut taint) = (Step::default(), Step::default());
    let mut before: Option<Option<Name>> = None;
    loop {
        let (is_up, seen) = {
            let wishes = speaker.wishes();
            (wishes.is_up, wishes.seen.clone())
        };
        let begin = Instant::now();
        if let Some((uid, unavailable)) = seen.filter(|_| is_up) {
            let is_said = unavailable.as_deref() == Some("False");
            // A Node that was made anew, or was reset, has its taints again.
            if before.as_ref().is_some_and(|before| *before != uid) || !is_said && condition.due.is_none() {
                taint.due = None;
            }
            before = Some(uid);
            if is_said {
                condition.due = condition.due.filter(|due| *due > begin);
            } else if condition.is_due(begin) {
                let outcome = say_it_is_there(&shared.dial, settings).await;
                condition.heard(&outcome, COMES_BACK, Instant::now());
                speaker.wishes().node.hear(&outcome);
            }
            if let Some(key) = settings.startup_taint.as_ref().filter(|_| taint.is_due(begin)) {
                let outcome = take_taint_off(&shared.dial, &settings.node, key).await;
                if !matches!(outcome, Ok(false)) {
                    speaker.wishes().node.hear(&outcome);
                }
                taint.heard(&outcome.map(drop), LOOK, Instant::now());
            }
        }
        let due = [condition.due, taint.due].into_iter().flatten().filter(|due| *due > begin).min();
        let due = due.map_or(LOOK, |due| due.saturating_duration_since(Instant::now()));
        tokio::select! {
            () = speaker.of_node.notified() => {}
            () = sleep(due) => {}
        }
    }
}

/// Node.status.conditions: kubectl and the controller that taints nodes without a network go by it (calico/node, pkg/lifecycle/startup).
async fn say_it_is_there(dial: &Dial, settings: &Settings) -> Result<(), Failure> {
    let now = now();
    let condition = json!({
        "type": NETWORK_UNAVAILABLE, "status": "False", "reason": "WeirIsUp", "message": "weir serves this node's pods",
        "lastHeartbeatTime": now, "lastTransitionTime": now,
    });
    let patch = json!({"status": {"conditions": [condition]}}).to_string();
    dial.write(Method::PATCH, &format!("/api/v1/nodes/{}/status", settings.node), STRATEGIC, patch).await.map(drop)
}

/// Whether there was one.
async fn take_taint_off(dial: &Dial, node: &str, key: &str) -> Result<bool, Failure> {
    let Some(object) = find(dial, "/api/v1/nodes", node).await? else { return Ok(false) };
    let taints = object["spec"]["taints"].as_array().cloned().unwrap_or_default();
    let left: Vec<&Value> = taints.iter().filter(|taint| taint["key"] != key).collect();
    if left.len() == taints.len() {
        return Ok(false);
    }
    // Others write taints too: of another version the server refuses it, and it is read again.
    let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"], "uid": object["metadata"]["uid"]});
    let patch = json!({"metadata": metadata, "spec": {"taints": left}}).to_string();
    dial.write(Method::PATCH, &format!("/api/v1/nodes/{node}"), MERGE, patch).await.map(|_| true)
}
