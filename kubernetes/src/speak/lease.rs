//! A Lease (coordination.k8s.io/v1): what one node of all does alone.
//!
//! As client-go's leader election does it (tools/leaderelection): who changes it names the version that was read, so of two that try one is refused. Another's
//! lease is over once nothing of it has changed for as long as it says, by this node's own clock since it was seen: nodes' clocks differ.

use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{JSON, Speaker, now_in_micros};
use crate::dial::{Dial, Failure};

/// The lease's name.
const NAME: &str = "weir";
/// The longest that a lease may be said to last: what others write is not believed.
const LONGEST: Duration = Duration::from_secs(3600);
/// How long an end waits for the lease to be given back.
const RELEASE: Duration = Duration::from_secs(1);

/// Whose the lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// This node's.
    Own,
    /// Another's.
    Others,
    /// Nobody's, as it was given back.
    Free,
}

/// What was seen of it.
#[derive(Default)]
pub struct Lease {
    /// Its spec, and since when it was so.
    seen: Option<(Value, Instant)>,
}

fn collection(namespace: &str) -> String {
    format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases")
}

fn spec(holder: &str, lease: Duration, transitions: i64, acquired: &str) -> Value {
    json!({
        "holderIdentity": holder, "leaseDurationSeconds": lease.as_secs().max(1), "acquireTime": acquired,
        "renewTime": now_in_micros(), "leaseTransitions": transitions,
    })
}

impl Lease {
    /// How long this spec was not changed, by the own clock.
    fn age(&mut self, spec: &Value, now: Instant) -> Duration {
        match &self.seen {
            Some((seen, since)) if seen == spec => now.saturating_duration_since(*since),
            _ => {
                self.seen = Some((spec.clone(), now));
                Duration::ZERO
            }
        }
    }

    /// Renews it, or takes it where it is nobody's. `wants`: whether to take one that was given back.
    ///
    /// # Errors
    /// Where the server does not answer, or forbids it.
    pub async fn hold(&mut self, speaker: &Speaker, dial: &Dial, wants: bool) -> Result<Held, Failure> {
        let settings = &speaker.settings;
        let (own, path) = (settings.node.as_str(), collection(&settings.lease_namespace));
        let one = format!("{path}/{NAME}");
        let told = |holder: &str| speaker.wishes().holder = Some(holder.to_owned()).filter(|holder| !holder.is_empty());
        let text = match dial.text(&one).await {
            Err(failure) if failure.code() == 404 => {
                if !wants {
                    return Ok(Held::Free);
                }
                let object = json!({
                    "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": NAME},
                    "spec": spec(own, settings.lease, 0, &now_in_micros()),
                });
                let outcome = dial.write(Method::POST, &path, JSON, object.to_string()).await;
                return won(outcome, || told(own));
            }
            other => other?,
        };
        let mut object: Value = serde_json::from_str(&text).map_err(|error| Failure::Nonsense(error.to_string()))?;
        let known = &object["spec"];
        let age = self.age(known, Instant::now());
        let holder = known["holderIdentity"].as_str().unwrap_or_default();
        told(holder);
        if holder.is_empty() && !wants {
            return Ok(Held::Free);
        }
        let lasts = Duration::from_secs(known["leaseDurationSeconds"].as_u64().unwrap_or(0)).min(LONGEST);
        if !holder.is_empty() && holder != own && age < lasts {
            return Ok(Held::Others);
        }
        let transitions = known["leaseTransitions"].as_i64().unwrap_or(0) + i64::from(holder != own);
        let acquired =
            known["acquireTime"].as_str().filter(|_| holder == own).map_or_else(now_in_micros, str::to_owned);
        // The version that was read stays in it.
        object["spec"] = spec(own, settings.lease, transitions, &acquired);
        let outcome = dial.write(Method::PUT, &one, JSON, object.to_string()).await;
        won(outcome, || told(own))
    }
}

fn won(outcome: Result<String, Failure>, told: impl FnOnce()) -> Result<Held, Failure> {
    match outcome {
        Ok(_) => {
            told();
            Ok(Held::Own)
        }
        // Another was first.
        Err(failure) if failure.code() == 409 => Ok(Held::Others),
        Err(failure) => Err(failure),
    }
}

/// Gives it back, if there is an answer soon.
pub async fn release(speaker: &Speaker, dial: &Dial) {
    let settings = &speaker.settings;
    let one = format!("{}/{NAME}", collection(&settings.lease_namespace));
    let give_back = async || {
        let mut object: Value = serde_json::from_str(&dial.text(&one).await?).unwrap_or_default();
        if object["spec"]["holderIdentity"] != settings.node {
            return Ok(String::new());
        }
        object["spec"]["holderIdentity"] = json!("");
        object["spec"]["leaseDurationSeconds"] = json!(1);
        dial.write(Method::PUT, &one, JSON, object.to_string()).await
    };
    let work = async {
        // A renewal that was under way may have been first.
        while give_back().await.is_err_and(|failure| failure.code() == 409) {}
    };
    if timeout(RELEASE, work).await.is_ok() {
        speaker.wishes().holder = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_over_by_the_own_clock_since_it_was_last_another() {
        let (mut lease, start) = (Lease::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let one = json!({"holderIdentity": "a", "renewTime": "1999-01-01T00:00:00.000000Z"});
        let other = json!({"holderIdentity": "a", "renewTime": "2099-01-01T00:00:00.000000Z"});
        assert_eq!(lease.age(&one, at(0)), Duration::ZERO, "whatever time it says");
        assert_eq!(lease.age(&one, at(40)), Duration::from_secs(40));
        assert_eq!(lease.age(&other, at(50)), Duration::ZERO, "it was renewed");
        assert_eq!(lease.age(&other, at(109)), Duration::from_secs(59));
    }
}
