//! Kubernetes and Calico resources read from YAML files.
//!
//! Every document becomes an [`Object`] of its kind: the typed value with the tree that it was read from, so that later
//! stages can point at the place of what they refuse. Kinds that the contract names and weir does not enforce yet are
//! errors; kinds outside the contract are skipped with a note.

pub mod at;
pub mod calico;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Namespace, Node as KubernetesNode, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::de::DeserializeOwned;

use self::{
    at::{At, Reporter},
    calico::{IpPool, WorkloadEndpoint},
};
use crate::config::{
    Problems, Severity, Source, Span,
    problem::nearest,
    tree::{self, Node, Value},
    typed,
};

/// What makes an object the same one in two versions of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Its kind.
    pub kind: &'static str,
    /// Its namespace; empty for kinds without.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for ObjectId {
    /// "kind namespace/name" or "kind name".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, namespace, name } = self;
        if namespace.is_empty() { write!(f, "{kind} {name}") } else { write!(f, "{kind} {namespace}/{name}") }
    }
}

/// A policy that cannot be read and has no earlier version: it denies what it selects.
#[derive(Debug)]
pub struct Denying {
    /// Its index in [`Manifests::origins`].
    pub origin: u32,
    /// Its identity.
    pub id: ObjectId,
    /// Its `spec.podSelector`, where that can be read.
    pub pod_selector: Option<LabelSelector>,
}

/// Where an object comes from: what messages, traces and metrics call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its kind.
    pub kind: &'static str,
    /// Its namespace; `None` for kinds without.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// The file.
    pub file: String,
    /// The line where it begins, from 1.
    pub line: usize,
}

impl std::fmt::Display for Origin {
    /// "kind/namespace/name" or "kind/name".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{}/{namespace}/{}", self.kind, self.name),
            None => write!(f, "{}/{}", self.kind, self.name),
        }
    }
}

/// A resource: its typed value and the tree that this was read from.
#[derive(Debug)]
pub struct Object<T> {
    /// Its index in [`Manifests::origins`].
    pub origin: u32,
    /// What messages call it: "Service default/web".
    pub subject: String,
    /// Its namespace; empty for kinds without.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The value.
    pub value: T,
    /// The tree.
    pub node: Node,
}

impl<T> Object<T> {
    /// "namespace/name".
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The place of the whole object.
    pub fn at(&self) -> At<'_> {
        At::root(&self.node)
    }

    /// A reporter whose messages begin with this object's name.
    pub fn reporter<'a>(&self, problems: &'a mut Problems) -> Reporter<'a> {
        Reporter::new(problems, self.subject.clone())
    }
}

/// All resources, by kind, in the order of reading.
#[derive(Debug, Default)]
pub struct Manifests {
    /// v1 Node.
    pub nodes: Vec<Object<KubernetesNode>>,
    /// v1 Namespace.
    pub namespaces: Vec<Object<Namespace>>,
    /// v1 Pod.
    pub pods: Vec<Object<Pod>>,
    /// v1 Service.
    pub services: Vec<Object<Service>>,
    /// v1 ServiceAccount.
    pub service_accounts: Vec<Object<ServiceAccount>>,
    /// discovery.k8s.io/v1 EndpointSlice.
    pub endpoint_slices: Vec<Object<EndpointSlice>>,
    /// networking.k8s.io/v1 NetworkPolicy.
    pub network_policies: Vec<Object<NetworkPolicy>>,
    /// projectcalico.org/v3 IPPool.
    pub pools: Vec<Object<IpPool>>,
    /// projectcalico.org/v3 WorkloadEndpoint.
    pub workload_endpoints: Vec<Object<WorkloadEndpoint>>,
    /// Where each object comes from.
    pub origins: Vec<Origin>,
    /// The files and folders that were read: what to watch.
    pub files: Vec<PathBuf>,
    /// Policies that could not be read and deny what they select.
    pub denying: Vec<Denying>,
    /// Whether something of the contract was refused because it is not implemented: nothing stands for that.
    pub not_implemented: bool,
    /// The place of each object's name.
    defined: HashMap<ObjectId, Span>,
    /// The place of each object that was read or passed over.
    extents: Vec<(Span, ObjectId)>,
    /// Objects that are passed over, or of which nothing but what they deny is taken.
    passed_over: BTreeMap<ObjectId, Substitute>,
    /// The only objects that are read, at a moment when a text of before is read.
    only: Option<BTreeSet<ObjectId>>,
}

/// What stands for an object that cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Substitute {
    /// The last version that could be.
    LastGood,
    /// Nothing; a policy denies what it selects.
    Nothing,
}

/// A kind that the contract names.
struct Kind {
    groups: &'static [&'static str],
    version: &'static str,
    name: &'static str,
    namespaced: bool,
    implemented: bool,
}

impl Kind {
    fn api_version(&self, group: &str) -> String {
        if group.is_empty() { self.version.to_owned() } else { format!("{group}/{}", self.version) }
    }
}

const CORE: &[&str] = &[""];
const CALICO: &[&str] = &["projectcalico.org", "crd.projectcalico.org"];
const CLUSTER_POLICY: &[&str] = &["policy.networking.k8s.io"];

const fn kind(
    groups: &'static [&'static str],
    version: &'static str,
    name: &'static str,
    namespaced: bool,
    implemented: bool,
) -> Kind {
    Kind { groups, version, name, namespaced, implemented }
}

/// The kinds of the contract (the design, "Contract: the configuration file").
const KINDS: &[Kind] = &[
    kind(CORE, "v1", "Node", false, true),
    kind(CORE, "v1", "Namespace", false, true),
    kind(CORE, "v1", "Pod", true, true),
    kind(CORE, "v1", "Service", true, true),
    kind(CORE, "v1", "ServiceAccount", true, true),
    kind(&["discovery.k8s.io"], "v1", "EndpointSlice", true, true),
    kind(&["networking.k8s.io"], "v1", "NetworkPolicy", true, true),
    kind(CALICO, "v3", "IPPool", false, true),
    kind(CALICO, "v3", "WorkloadEndpoint", true, true),
    kind(CALICO, "v3", "GlobalNetworkPolicy", false, false),
    kind(CALICO, "v3", "NetworkPolicy", true, false),
    kind(CALICO, "v3", "Tier", false, false),
    kind(CALICO, "v3", "GlobalNetworkSet", false, false),
    kind(CALICO, "v3", "NetworkSet", true, false),
    kind(CALICO, "v3", "HostEndpoint", false, false),
    kind(CALICO, "v3", "Profile", false, false),
    kind(CALICO, "v3", "StagedGlobalNetworkPolicy", false, false),
    kind(CALICO, "v3", "StagedNetworkPolicy", true, false),
    kind(CALICO, "v3", "StagedKubernetesNetworkPolicy", true, false),
    kind(CALICO, "v3", "FelixConfiguration", false, false),
    kind(CLUSTER_POLICY, "v1alpha2", "ClusterNetworkPolicy", false, false),
];

/// The version under which kubectl dumps Calico's kinds.
const CALICO_CRD: (&str, &str) = ("crd.projectcalico.org", "v1");

impl Manifests {
    /// Reads all files and folders but for the objects in `passed_over`; `spans` says where weir.yaml names each.
    pub fn read(
        paths: &[PathBuf],
        spans: &[Span],
        config: &Path,
        passed_over: BTreeMap<ObjectId, Substitute>,
        problems: &mut Problems,
    ) -> Self {
        let mut manifests = Self { passed_over, ..Self::default() };
        let mut seen = BTreeSet::new();
        // weir.yaml may lie in the folder that it names.
        seen.extend(config.canonicalize());
        for (index, path) in paths.iter().enumerate() {
            let span = spans.get(index).copied().unwrap_or_default();
            manifests.read_path(path, span, true, &mut seen, problems);
        }
        manifests
    }

    /// Reads a file, or a folder with its subfolders. What a folder holds is read in the order of names, and only what
    /// is called *.yaml, *.yml or *.json; hidden entries are left out (a mounted ConfigMap has such links).
    fn read_path(
        &mut self,
        path: &Path,
        span: Span,
        named: bool,
        seen: &mut BTreeSet<PathBuf>,
        problems: &mut Problems,
    ) {
        let shown = path.display();
        let canonical = match path.canonicalize() {
            Ok(canonical) => canonical,
            Err(error) => {
                self.files.push(path.to_owned());
                let help = "paths are relative to the folder of weir.yaml".to_owned();
                return problems.error(span, format!("cannot read {shown}: {error}"), help);
            }
        };
        if !seen.insert(canonical) {
            return;
        }
        self.files.push(path.to_owned());
        if !path.is_dir() {
            return self.read_file(path, span, problems);
        }
        let entries = match std::fs::read_dir(path).and_then(|entries| entries.collect::<Result<Vec<_>, _>>()) {
            Ok(entries) => entries,
            Err(error) => return problems.error(span, format!("cannot read the folder {shown}: {error}"), None),
        };
        let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.retain(|path| {
            let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            let manifest =
                path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|e| extension == *e));
            !hidden && (manifest || path.is_dir())
        });
        paths.sort();
        if named && paths.is_empty() {
            let help = "manifests are files called *.yaml, *.yml or *.json".to_owned();
            problems.warning(span, format!("the folder {shown} holds no manifests"), help);
        }
        for path in paths {
            self.read_path(&path, span, false, seen, problems);
        }
    }

    fn read_file(&mut self, path: &Path, span: Span, problems: &mut Problems) {
        let shown = path.display().to_string();
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) => return problems.error(span, format!("cannot read {shown}: {error}"), None),
        };
        if bytes.len() > Source::MAX_BYTES {
            let help = "split it into several".to_owned();
            return problems.error(span, format!("{shown} is longer than 4 GiB"), help);
        }
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let valid = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
                let file = problems.add_source(Source::new(shown, text));
                let place = Span { file, start: valid as u32, end: valid as u32 };
                return problems.error(place, "this file is not UTF-8", "save it as UTF-8".to_owned());
            }
        };
        self.read_text(shown, text, problems);
    }

    /// Reads the documents of one text, under the name that diagnostics give it.
    pub fn read_text(&mut self, name: impl Into<String>, text: String, problems: &mut Problems) {
        let file = problems.add_source(Source::new(name, text));
        for document in tree::read_documents(file, problems) {
            self.add(document, problems);
        }
    }

    /// Reads objects out of a text of before, and nothing else of it.
    pub fn read_last_good(&mut self, source: &Arc<Source>, only: BTreeSet<ObjectId>, problems: &mut Problems) {
        let file = problems.share_source(Arc::clone(source));
        self.only = Some(only);
        // What else is wrong with that text was said when it was read.
        let mut said_before = problems.clone();
        for document in tree::read_documents(file, &mut said_before) {
            self.add(document, problems);
        }
        self.only = None;
    }

    /// The object in whose text a place is.
    pub fn object_at(&self, place: Span) -> Option<&ObjectId> {
        let holds = |span: &Span| span.file == place.file && (span.start..span.end).contains(&place.start);
        self.extents.iter().find_map(|(span, id)| holds(span).then_some(id))
    }

    /// All objects in the texts that were read, those that were passed over too.
    pub fn mentioned(&self) -> HashSet<&ObjectId> {
        self.extents.iter().map(|(_, id)| id).collect()
    }

    /// The objects that there are, each with the text that it was read from.
    pub fn sources(&self, problems: &Problems) -> HashMap<ObjectId, Arc<Source>> {
        let source = |(id, span): (&ObjectId, &Span)| (id.clone(), Arc::clone(problems.source(span.file)));
        self.defined.iter().map(source).collect()
    }

    fn add(&mut self, mut node: Node, problems: &mut Problems) {
        if !matches!(node.value, Value::Map(_)) {
            let message = format!("expected a Kubernetes object, found {}", node.describe());
            return problems.error(node.span, message, None);
        }
        let text = |key: &str, problems: &mut Problems| -> Option<String> {
            let Some((_, value)) = node.entry(key) else {
                let help = "every object begins with apiVersion and kind".to_owned();
                problems.error(node.span, format!("{key} is missing"), help);
                return None;
            };
            let text = value.as_str().filter(|text| !text.is_empty());
            if text.is_none() {
                problems.error(value.span, format!("{key}: expected a string, found {}", value.describe()), None);
            }
            text.map(str::to_owned)
        };
        let (Some(api_version), Some(kind_name)) = (text("apiVersion", problems), text("kind", problems)) else {
            return;
        };
        let is_list = kind_name.ends_with("List") && node.get("items").is_some();
        if is_list {
            let Value::Map(entries) = &mut node.value else { return };
            let items = entries.iter_mut().find(|(key, _)| key.text == "items").map(|(_, items)| &mut items.value);
            match items {
                Some(Value::List(items)) => {
                    for item in std::mem::take(items) {
                        self.add(item, problems);
                    }
                }
                Some(Value::Null) | None => {}
                Some(_) => problems.error(At::root(&node).key("items").span(), "items: expected a list", None),
            }
            return;
        }
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let of_group = || KINDS.iter().filter(|kind| kind.groups.contains(&group));
        let version_span = At::root(&node).key("apiVersion").span();
        let kind_span = At::root(&node).key("kind").span();
        let Some(kind) = of_group().find(|kind| kind.name == kind_name) else {
            if kind_name == "NetworkPolicy" && group == "extensions" {
                let help = "write apiVersion: networking.k8s.io/v1".to_owned();
                return problems.error(version_span, format!("NetworkPolicy of {api_version} is not read"), help);
            }
            return match nearest(&kind_name, of_group().map(|kind| kind.name)) {
                Some(known) => {
                    let message = format!("{kind_name} of {api_version} is skipped: weir does not know this kind");
                    problems.warning(kind_span, message, format!("did you mean {known}?"));
                }
                None => problems.note(kind_span, format!("{kind_name} of {api_version} is skipped")),
            };
        };
        if version != kind.version && (group, version) != CALICO_CRD {
            let help = format!("write apiVersion: {}", kind.api_version(group));
            return problems.error(version_span, format!("{kind_name} of {api_version} is not read"), help);
        }
        if !kind.implemented && self.only.is_none() {
            self.not_implemented = true;
            let message = format!("{kind_name} is not implemented yet: weir would not enforce it");
            let help = "take it out, or keep using Calico or kube-proxy for what it says".to_owned();
            return problems.error(kind_span, message, help);
        }
        if kind.implemented {
            self.add_implemented(kind, node, problems);
        }
    }

    fn add_implemented(&mut self, kind: &'static Kind, node: Node, problems: &mut Problems) {
        let metadata = At::root(&node).key("metadata");
        let field = |key: &str| node.get("metadata").and_then(|metadata| metadata.get(key));
        let Some(name) = field("name").and_then(Node::as_str).filter(|name| !name.is_empty()) else {
            let place = metadata.key("name");
            let message = match field("name") {
                Some(found) => format!("{}: metadata.name: expected a name, found {}", kind.name, found.describe()),
                None => format!("{}: metadata.name is missing", kind.name),
            };
            let help = "every object needs a name of its own".to_owned();
            return problems.error(place.span(), message, help);
        };
        let name = name.to_owned();
        let given = field("namespace").and_then(Node::as_str).filter(|namespace| !namespace.is_empty());
        let namespace = match (kind.namespaced, given) {
            (true, given) => given.unwrap_or("default").to_owned(),
            (false, _) => String::new(),
        };
        let id = ObjectId { kind: kind.name, namespace: namespace.clone(), name: name.clone() };
        let subject = id.to_string();
        self.extents.push((node.extent(), id.clone()));
        let substitute = match &self.only {
            Some(only) if only.contains(&id) => None,
            Some(_) => return,
            None => self.passed_over.get(&id).copied(),
        };
        if substitute == Some(Substitute::LastGood) {
            return;
        }
        let span = metadata.key("name").span();
        if substitute.is_none()
            && let Some(first) = self.defined.insert(id.clone(), span)
        {
            let help = format!("the other is at {}; keep one", problems.place(first));
            problems.error(span, format!("{subject} is defined twice"), help);
        }
        let source = problems.source(node.span.file);
        let (line, _) = source.line_column(node.span.start);
        let file = source.name().to_owned();
        let origin = self.origins.len() as u32;
        self.origins.push(Origin {
            kind: kind.name,
            namespace: kind.namespaced.then(|| namespace.clone()),
            name: name.clone(),
            file,
            line,
        });
        if substitute == Some(Substitute::Nothing) {
            if kind.name == "NetworkPolicy" {
                let selector = node.get("spec").and_then(|spec| spec.get("podSelector"));
                let mut unread = Problems::default();
                let pod_selector = selector.and_then(|node| typed::read(node, "", |_| Severity::Error, &mut unread));
                let pod_selector = pod_selector.filter(|_| !unread.has_errors());
                self.denying.push(Denying { origin, id, pod_selector });
            }
            return;
        }
        let read = Read { origin, subject, namespace, name, node, problems };
        match kind.name {
            "Node" => self.nodes.extend(read.object()),
            "Namespace" => self.namespaces.extend(read.object()),
            "Pod" => self.pods.extend(read.object()),
            "Service" => self.services.extend(read.object()),
            "ServiceAccount" => self.service_accounts.extend(read.object()),
            "EndpointSlice" => self.endpoint_slices.extend(read.object()),
            "NetworkPolicy" => self.network_policies.extend(read.object()),
            "IPPool" => self.pools.extend(read.object()),
            "WorkloadEndpoint" => self.workload_endpoints.extend(read.object()),
            other => unreachable!("{other} is marked as implemented and has no list"),
        }
    }

    /// How many objects of each kind there are, by kind.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for origin in &self.origins {
            *counts.entry(origin.kind).or_default() += 1;
        }
        counts
    }
}

/// An object about to be read as its type.
struct Read<'a> {
    origin: u32,
    subject: String,
    namespace: String,
    name: String,
    node: Node,
    problems: &'a mut Problems,
}

impl Read<'_> {
    fn object<T: DeserializeOwned>(self) -> Option<Object<T>> {
        let prefix = format!("{}: ", self.subject);
        let is_policy = self.subject.starts_with("NetworkPolicy ");
        // A rule with a part that weir does not know may let more through than it says.
        let unknown =
            |path: &str| if is_policy && path.starts_with("spec") { Severity::Error } else { Severity::Warning };
        let value = typed::read(&self.node, &prefix, unknown, self.problems)?;
        let Self { origin, subject, namespace, name, node, .. } = self;
        Some(Object { origin, subject, namespace, name, value, node })
    }
}
