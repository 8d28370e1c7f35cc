//! Configurations: prepared beside control, taken over when they are ready.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tracing::{error, warn};
use weir_cluster::{
    config::{Cni, RouterConfig},
    text::{Problems, Severity},
    translate::{Loaded, Unserved},
};

use weir_kubernetes::{Source, speak::Fault};

use super::{Router, assemble::role_rules};
use crate::{
    book::Pods,
    health,
    prepare::{Basis, Finished, Prepared, Scope, Times},
};

/// Something that was taken over and is not in force yet.
#[derive(Default)]
pub(super) struct Pending {
    /// Of a configuration: whether its files may be other ones, and how long it took until then.
    pub(super) times: Option<(bool, Times)>,
    /// When it was taken over.
    pub(super) begun: Option<Instant>,
    /// Whether nothing but endpoints of services is another: of those, programs and kernel are told nothing.
    pub(super) is_of_endpoints: bool,
}

/// What the cluster was told of what is in force.
#[derive(Default)]
pub(super) struct IsTold {
    /// Whether what is being prepared has the objects that the cluster itself told, and not those that were kept.
    pub(super) preparing: bool,
    /// Whether what was taken over has.
    pub(super) in_force: bool,
    /// Whether the cluster knows that this node is up.
    pub(super) is_up: bool,
}

/// What became of changed configurations.
#[derive(Default)]
pub(super) struct Reloads {
    /// The first load's.
    start: Times,
    /// The last reload's.
    last: Option<Times>,
    /// The last one's for the sake of pods that weir made.
    pods: Option<Times>,
    taken_over: u64,
    refused: u64,
    /// Why the newest one is refused; empty where it is in force.
    problems: Vec<String>,
}

impl Reloads {
    pub(super) fn start(&mut self, times: Times) {
        self.start = times;
    }

    pub(super) fn pods(&mut self, times: Times) {
        self.pods = Some(times);
    }

    pub(super) fn taken_over(&mut self, times: Times) {
        self.last = Some(times);
        self.taken_over += 1;
        self.problems.clear();
    }

    fn refused(&mut self, problems: Vec<String>) {
        self.refused += 1;
        self.problems = problems;
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "newestInForce": self.problems.is_empty(), "problems": self.problems,
            "reloads": self.taken_over, "refused": self.refused,
            "startMs": self.start.to_json(), "lastReloadMs": self.last.map(Times::to_json),
            "lastPodsMs": self.pods.map(Times::to_json),
        })
    }
}

/// Tells what is at fault in a configuration that goes on without it.
pub(super) fn warn_of_faulty(loaded: &Loaded, problems: Option<&Problems>) {
    let Some(problems) = problems else { return };
    warn!("objects are faulty:\n{}", problems.render(false));
    for faulty in &loaded.faulty {
        warn!(object = faulty.object, "{}", faulty.outcome());
    }
}

/// Tells the warnings that were not there before, wherever they stood.
fn warn_of_new(now: &Problems, before: &Problems) {
    let known: HashSet<&str> = before.of(Severity::Warning).map(|warning| warning.message.as_str()).collect();
    for warning in now.of(Severity::Warning).filter(|warning| !known.contains(warning.message.as_str())) {
        warn!("{}", now.line(warning));
    }
}

impl Router {
    /// Begins to prepare a configuration of what is known now; where one is being prepared, sees to one more.
    pub(super) fn begin_reload(&mut self, scope: Scope) {
        self.own_addresses = self.addresses();
        let Self { preparer, loaded, pods, listening, own_addresses, cluster, is_told, programming, .. } = self;
        preparer.begin(scope, || {
            // Before the objects, so that nothing counts that they do not have.
            programming.begin(cluster.as_ref().map(Source::take_triggers).unwrap_or_default());
            is_told.preparing = cluster.as_ref().is_some_and(|cluster| cluster.fresh().is_some());
            Basis {
                in_force: Arc::clone(&loaded.objects),
                own_addresses: own_addresses.clone(),
                local_pods: pods.as_ref().map(|pods| Arc::clone(pods.all())).unwrap_or_default(),
                live: cluster.as_ref().and_then(Source::objects).unwrap_or_default(),
                listening: listening.clone(),
                host_ports: loaded.served_host_ports(),
            }
        });
    }

    /// Takes over a configuration that is ready. A bad one changes nothing.
    pub(super) fn prepared(&mut self, finished: Finished) {
        let mut due = None;
        match self.preparer.finish(finished) {
            Ok(prepared) => self.take_over(prepared),
            Err((Scope::LocalPods, refused)) => {
                error!("pods cannot be put in force:\n{refused}");
                if let Some(pods) = &mut self.pods {
                    pods.book().refuse(&self.loaded.local_pods, &refused.to_string());
                }
            }
            Err((Scope::Cluster | Scope::Files, refused)) => {
                error!("reload refused, the last good configuration stays:\n{refused}");
                self.reloads.refused(refused.lines());
                // Neither pods nor the node's addresses wait for who mends the files.
                let is_in_force = |pods: &Pods| Arc::ptr_eq(pods.all(), &self.loaded.local_pods);
                let has_pods = self.pods.as_ref().is_some_and(|pods| !is_in_force(pods));
                due = (has_pods || self.own_addresses != self.in_force_addresses).then_some(Scope::LocalPods);
            }
        }
        if let Some(scope) = self.preparer.due().max(due) {
            self.begin_reload(scope);
        }
    }

    /// What is at fault is said on the objects, once the cluster itself has told them.
    pub(super) fn tell_faults(&self) {
        if let Some(speaker) = self.cluster.as_ref().and_then(Source::speaker).filter(|_| self.is_told.in_force) {
            speaker.set_faults(self.loaded.faulty.iter().filter_map(Fault::of).collect());
        }
    }

    fn take_over(&mut self, prepared: Prepared) {
        let Prepared { scope, loaded, problems, rules, listening, snat, own_addresses, times } = prepared;
        let has_new_files = scope != Scope::LocalPods;
        warn_of_faulty(&loaded, problems.as_ref().filter(|_| has_new_files));
        if has_new_files && problems.is_none() {
            warn_of_new(&loaded.notes, &self.loaded.notes);
        }
        let roles = role_rules(&loaded);
        if loaded.config.workers != self.config().workers || roles.uplinks != self.devices.roles.uplinks {
            warn!("changed workers, uplinks or nodeName take effect at the next start only");
        }
        if loaded.config.kubernetes != self.config().kubernetes {
            warn!("a changed section kubernetes takes effect at the next start only");
        }
        let apart_from_mtu = |config: &RouterConfig| config.cni.clone().map(|cni| Cni { mtu: None, ..cni });
        if apart_from_mtu(&loaded.config) != apart_from_mtu(self.config()) {
            warn!("a changed section cni takes effect at the next start only, but for its mtu");
        }
        let before = self.loaded.unserved_host_ports();
        for Unserved { pod, protocol, port, why } in
            loaded.unserved_host_ports().iter().filter(|unserved| !before.contains(unserved))
        {
            warn!(pod, %protocol, port, "its hostPort is not served: {why}");
        }
        let has_other_files = loaded.config.manifests != self.config().manifests;
        let is_of_endpoints = loaded.config == *self.config()
            && Arc::ptr_eq(&loaded.cluster, &self.loaded.cluster)
            && rules.services.differs_in_endpoints_only(&self.rules.services)
            && snat.ranges().eq(self.snat.ranges())
            && loaded.host_ports_in_use().eq(self.loaded.host_ports_in_use())
            && own_addresses == self.in_force_addresses
            && self.pending.as_ref().is_none_or(|pending| pending.is_of_endpoints);
        self.devices.roles.workloads = roles.workloads;
        self.loaded = loaded;
        // Of pods alone it is prepared from what was read before.
        self.is_told.in_force |= self.is_told.preparing && scope != Scope::LocalPods;
        if scope != Scope::LocalPods {
            self.programming.taken_over();
        }
        self.tell_faults();
        self.rules = Arc::new(rules.counting(self.workers));
        (self.listening, self.snat) = (listening, Arc::new(snat));
        self.in_force_addresses = own_addresses;
        if has_other_files {
            // Once they are watched, they are read once more.
            self.hands.watch(self.files());
        }
        self.hands.answer_health(health::wanted(&self.loaded.services));
        self.verify.every(self.loaded.config.verify.every, self.now);
        // What was taken over before and has not come into force comes with this.
        let had_new_files = self.pending.as_ref().and_then(|pending| pending.times).is_some_and(|(files, _)| files);
        let times = Times { publish: Duration::ZERO, ..times };
        self.due.changes = true;
        self.pending = Some(Pending {
            times: Some((has_new_files || had_new_files, times)),
            begun: Some(Instant::now()),
            is_of_endpoints,
        });
        if self.addresses() != self.in_force_addresses && self.preparer.due().is_none() {
            self.begin_reload(Scope::LocalPods);
        }
    }
}
