//! What clients are told.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use serde_json::{Value, json};
use weir_cluster::resources::Substitute;
use weir_conntrack::Table;
use weir_dataplane::{clock::now, counters::Totals, model::Role, tables::Family};
use weir_kubernetes::{KindState, Source};
use weir_nat::{Clients, Model};

use super::{Router, answers::Answer};
use crate::{control::Request, report::counters_json, web::Facts};

impl Router {
    /// What is to be answered.
    pub(super) fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Status => Answer::Status(self.status()),
            Request::PolicyHits => Answer::Hits(self.hits.clone()),
            // Answered when it is done.
            Request::Verify => Answer::Line(json!({"error": "a verification takes its time"})),
            Request::Ipam => match &self.pods {
                Some(pods) => Answer::Ipam(Arc::clone(pods.server())),
                None => Answer::Line(json!({"error": "this router makes no pods: its weir.yaml had no section cni"})),
            },
            Request::Conntrack(query) => Answer::Conntrack(query),
            Request::Services(query) => {
                let all = &self.loaded.services;
                let services = all.services.iter().filter(|service| query.matches(&service.name)).cloned().collect();
                let model =
                    Model { node_name: all.node_name.clone(), zone: all.zone.clone(), services, ..Model::default() };
                Answer::Services(model, self.hits.by_backend())
            }
        }
    }

    pub(super) fn totals(&self) -> Totals {
        Totals::new(&self.counters.sums(), 0)
    }

    pub(super) fn facts(&self) -> Facts {
        Facts {
            serves: self.serves,
            generation: self.generation,
            faulty: self.loaded.faulty.len(),
            programming: self.cluster.is_some().then(|| self.programming.histogram()),
            cluster: self.cluster.as_ref().map(Source::state),
        }
    }

    fn status(&self) -> Value {
        let totals = self.totals();
        let affinity = &self.shared.affinity;
        let mut status = json!({
            "nodeName": self.config().node_name,
            "generation": self.generation,
            "workers": self.config().workers.cores,
            "workloads": self.links.devices.iter().filter(|d| d.role == Role::Workload).count(),
            "modes": [],
            "connections": {
                "ipv4": self.shared.tables.v4.len(), "ipv6": self.shared.tables.v6.len(),
                "capacity": self.shared.tables.v4.capacity(), "sentAgain": totals.sent_again,
            },
            "tables": {
                "ipv4": table_json(&self.shared.tables.v4), "ipv6": table_json(&self.shared.tables.v6),
            },
            "affinity": {
                "ipv4": affinity_json(affinity.clients::<Ipv4Addr>()),
                "ipv6": affinity_json(affinity.clients::<Ipv6Addr>()),
                "memoryBytes": affinity.memory_bytes(),
            },
            "snat": {
                "usablePorts": self.snat.count(), "allocated": totals.snat_allocated, "taken": totals.snat_taken,
                "displaced": totals.snat_displaced,
            },
            "offload": null,
            "counters": counters_json(&totals),
            "configuration": self.reloads.to_json(),
            "verify": self.verify.to_json(),
            "faultyObjects": self.loaded.faulty.iter().map(|faulty| json!({
                "object": faulty.object,
                "inForce": match faulty.substitute {
                    Substitute::LastGood => "last good version",
                    Substitute::Nothing => "nothing; a policy denies what it selects",
                },
                "problem": faulty.problem,
            })).collect::<Vec<_>>(),
            "stale": self.loaded.stale.as_ref().map(|stale| json!({
                "sinceUnixSeconds": stale.since_unix_seconds, "objects": stale.objects,
            })),
            "state": null,
            "kubernetes": self.cluster.as_ref().map(cluster_json),
            "networkProgramming": self.cluster.is_some().then(|| self.programming.to_json()),
            "unservedHostPorts": self.loaded.unserved_host_ports().iter().map(|unserved| json!({
                "pod": unserved.pod, "proto": unserved.protocol.to_string().to_lowercase(), "hostPort": unserved.port,
                "why": unserved.why,
            })).collect::<Vec<_>>(),
            "healthChecks": [],
            "pods": self.pods.as_ref().map(|pods| pods.status(&self.loaded)),
            "programs": {},
            "trouble": self.trouble.to_json(Instant::now()),
            "notes": self.notes,
        });
        for (key, value) in self.hands.status() {
            status[key] = value;
        }
        status
    }
}

/// What is known of a running cluster, and how old that is.
fn cluster_json(cluster: &Source) -> Value {
    let state = cluster.state();
    let kind = |kind: &KindState| {
        json!({
            "kind": kind.name, "objects": kind.count, "listed": kind.is_whole, "behind": kind.is_behind,
            "lastWordSeconds": kind.last_word.map(|at| (at.elapsed().as_secs_f64() * 10.0).round() / 10.0),
            "problem": kind.failure,
        })
    };
    json!({
        "address": state.address,
        "speaking": cluster.speaker().map(|speaker| speaker.status()),
        "staleSinceUnixSeconds": state.kept_since.and_then(|since| Some(since.duration_since(UNIX_EPOCH).ok()?.as_secs())),
        "frozen": state.is_frozen, "inForce": state.objects.is_some(), "problem": state.failure,
        "kinds": state.kinds.iter().map(kind).collect::<Vec<_>>(),
    })
}

/// A connection table's totals.
fn table_json<A: Family>(table: &Table<A>) -> Value {
    let counts = table.counts();
    json!({
        "connections": table.len(), "capacity": table.capacity(), "memoryBytes": table.memory_bytes(),
        "inserted": counts.inserted, "expired": counts.expired, "retried": counts.retried, "refused": counts.full,
        "evicted": {
            "closing": counts.evicted_closing, "unproved": counts.evicted_unproved, "idle": counts.evicted_idle,
        },
    })
}

/// What is remembered of the clients of one family.
fn affinity_json<A: Family>(clients: &Clients<A>) -> Value {
    json!({"clients": clients.count(now()), "capacity": clients.capacity(), "evicted": clients.evicted()})
}
