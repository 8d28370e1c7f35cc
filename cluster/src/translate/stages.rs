//! The stages of a translation, each of which is passed over where nothing that it reads has changed.

use std::{collections::BTreeSet, sync::Arc};

use weir_dataplane::model::Cluster;
use weir_nat::Model as Services;
use weir_policy::model::Model as Policy;

use super::{
    LocalPods,
    cluster::{self, Described},
    host,
    host_ports::{self, HostPorts},
    policy, services,
};
use crate::{
    config::RouterConfig,
    resources::Manifests,
    text::{Diagnostic, Problems, Severity},
};

/// What the load before has left. Each stage knows what it read itself, as a load that fails may have come past some.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) services: services::Kept,
    policy: policy::Kept,
    of_pods: Option<Stage<OfPods>>,
    host_ports: Option<(Stage<HostPorts>, BesideHostPorts)>,
}

/// What a stage has made of what, and what it had to say.
#[derive(Clone, Debug)]
struct Stage<T> {
    inputs: Inputs,
    made: T,
    said: Vec<Diagnostic>,
}

/// What all stages read.
#[derive(Clone, Debug)]
struct Inputs {
    config: Arc<RouterConfig>,
    manifests: Arc<Manifests>,
    local_pods: Arc<LocalPods>,
}

/// What host ports stand beside.
#[derive(Clone, Debug)]
struct BesideHostPorts {
    cluster: Arc<Cluster>,
    /// See [`services::translate`].
    ports: u64,
}

impl BesideHostPorts {
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.cluster, &other.cluster) && self.ports == other.ports
    }
}

impl<T> Stage<T> {
    /// What `stage` makes.
    fn run(inputs: &Inputs, stage: impl FnOnce(&mut Problems) -> T, problems: &mut Problems) -> Self {
        let mut own = problems.without_diagnostics();
        let made = stage(&mut own);
        Self { inputs: inputs.clone(), made, said: own.diagnostics().to_vec() }
    }

    /// This one for other inputs, if it would make and say the same of them: nothing has changed that it reads, by the lists of objects, and
    /// it said nothing of a text that has changed, of which it would say the same at another place.
    fn again(mut self, inputs: &Inputs, reads: impl Fn(&Self, &str) -> bool) -> Option<Self> {
        let Inputs { config, manifests, local_pods } = &self.inputs;
        let changes = inputs.manifests.changes_since(manifests)?;
        let is_same = (Arc::ptr_eq(config, &inputs.config) || config == &inputs.config)
            && Arc::ptr_eq(local_pods, &inputs.local_pods)
            && !changes.lists().iter().any(|list| reads(&self, list))
            && !self.said.iter().any(|said| changes.has_file(said.span.file));
        self.inputs = inputs.clone();
        is_same.then_some(self)
    }

    fn has_failed(&self) -> bool {
        self.said.iter().any(|said| said.severity == Severity::Error)
    }
}

/// What is made of all objects but services, and of their slices where policy names a service.
#[derive(Clone, Debug)]
pub(super) struct OfPods {
    pub(super) cluster: Arc<Cluster>,
    pub(super) policy: Arc<Policy>,
    pub(super) endpoint_to_host_by: Option<u32>,
    pub(super) undescribed: BTreeSet<String>,
    /// Whether policy depends on slices.
    names_services: bool,
}

/// What all stages have made.
pub(super) struct Translated {
    pub(super) of_pods: OfPods,
    pub(super) services: Services,
    pub(super) host_ports: HostPorts,
}

/// Translates all objects; of what has not changed since the load before, what that made is taken.
pub(super) fn translate(
    config: &Arc<RouterConfig>,
    manifests: &Arc<Manifests>,
    local_pods: &Arc<LocalPods>,
    kept: &mut Kept,
    problems: &mut Problems,
) -> Translated {
    let inputs =
        Inputs { config: Arc::clone(config), manifests: Arc::clone(manifests), local_pods: Arc::clone(local_pods) };
    let reads = |stage: &Stage<OfPods>, list: &str| match list {
        // Whether the datastore is ready is asked where it is followed.
        "services" | "cluster_informations" => false,
        "endpoint_slices" => stage.made.names_services,
        _ => true,
    };
    let known = kept.of_pods.take().and_then(|stage| stage.again(&inputs, reads));
    let make = || {
        let stage = |problems: &mut Problems| of_pods(config, manifests, local_pods, &mut kept.policy, problems);
        Stage::run(&inputs, stage, problems)
    };
    let of_pods = known.unwrap_or_else(make);
    problems.extend(of_pods.said.iter().cloned());

    let cluster = &of_pods.made.cluster;
    let (mut services, ports) = services::translate(config, manifests, cluster, &mut kept.services, problems);

    let beside = BesideHostPorts { cluster: Arc::clone(cluster), ports };
    // Pods are those that the cluster was made of.
    let known = kept.host_ports.take().filter(|(_, before)| before.is(&beside));
    let known = known.and_then(|(stage, _)| stage.again(&inputs, |_, _| false));
    let make = || {
        let stage = |problems: &mut Problems| {
            host_ports::translate(config, manifests, local_pods, cluster, &services, problems)
        };
        Stage::run(&inputs, stage, problems)
    };
    let host_ports = known.unwrap_or_else(make);
    problems.extend(host_ports.said.iter().cloned());
    host_ports.made.serve_all(&mut services);

    let translated = Translated { of_pods: of_pods.made.clone(), services, host_ports: host_ports.made.clone() };
    kept.of_pods = Some(of_pods).filter(|stage| !stage.has_failed());
    kept.host_ports = Some((host_ports, beside)).filter(|(stage, _)| !stage.has_failed());
    translated
}

fn of_pods(
    config: &RouterConfig,
    manifests: &Manifests,
    local_pods: &LocalPods,
    kept: &mut policy::Kept,
    problems: &mut Problems,
) -> OfPods {
    let (mut cluster, described) = cluster::translate(config, manifests, local_pods, problems);
    let endpoint_to_host_by = host::translate(config, manifests, &mut cluster, problems);
    let (policy, names_services) = policy::translate(config, manifests, &cluster, &described, kept, problems);
    let undescribed = cluster.workloads.iter().zip(&described);
    let undescribed = undescribed.filter(|(_, by)| matches!(by, Described::NotYet)).map(|(pod, _)| pod.name.clone());
    OfPods {
        undescribed: undescribed.collect(),
        cluster: Arc::new(cluster),
        policy: Arc::new(policy),
        endpoint_to_host_by,
        names_services,
    }
}
