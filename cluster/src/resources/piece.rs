//! A piece of text read: a document, or an item of a list of objects.
//!
//! What is read out of a piece depends on its characters alone, and places in it are counted from its beginning. So a piece
//! that did not change, or only moved within its file, need not be read again.

use std::{ops::Range, sync::Arc};

use super::{
    Identities, Identity, Manifests, ObjectId,
    at::At,
    calico::{
        IpPool, WorkloadEndpoint,
        host::{FelixConfiguration, HostEndpoint},
        ipam::{BlockAffinity, ClusterInformation, IpamBlock},
        policy::{self, GlobalNetworkPolicy, NetworkSet, Profile, StagedKubernetesNetworkPolicy, Tier},
    },
    chunk::List,
    cluster_network_policy::ClusterNetworkPolicy,
    identity::Names,
    kinds::{CALICO_GROUP, Kind, Recognised, Slip, recognise},
    kubernetes::{EndpointSlice, KubernetesNode, Namespace, Pod, Service, ServiceAccount, ServiceCidr, known_besides},
    made::Made,
    meta,
    network_policy::NetworkPolicy,
    object::{Base, Content, InText, Object, Readable},
    subject::Subject,
};
use crate::text::{
    Diagnostic, Problems, Severity, Source, Span, Topic,
    tree::{self, Key, Node, Value},
    typed,
};

/// What a piece of text is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Form {
    /// A document.
    Document,
    /// One "- item" of a document that is a list of objects.
    ListItem,
}

/// What a piece of text holds.
#[derive(Debug, Default)]
pub struct Piece {
    /// What is wrong outside of every object.
    pub(super) findings: Vec<Diagnostic>,
    /// Whether it cannot be read as it is a template of YAML; the findings say so.
    pub(super) is_template: bool,
    /// The objects.
    pub(super) items: Vec<Arc<Item>>,
}

/// An object of a piece, also where it cannot be read as its type.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) identity: Arc<Identity>,
    pub(super) kind: &'static Kind,
    /// Which of the kind's versions it is given in.
    pub(super) version: u8,
    /// The object with all that is in it.
    pub(super) extent: Span,
    /// Where it begins.
    pub(super) start: u32,
    /// The place of its name.
    pub(super) name: Span,
    /// What is wrong with it.
    pub(super) findings: Box<[Diagnostic]>,
    /// Of a policy: what it denies where it cannot be read.
    pub(super) subject: Option<Box<Subject>>,
    /// `None` where it cannot be read.
    pub(super) body: Option<Body>,
}

/// Whether two lists have the same objects, wherever those stand.
fn have_same<T>(one: &[Object<T>], other: &[Object<T>]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| Arc::ptr_eq(one.content(), other.content()))
}

/// Makes [`Body`], [`Lists`] and the lists of [`Manifests`] out of one entry per kind: its group and name, its type, and its list.
macro_rules! bodies {
    ($($(#[$doc:meta])+ $variant:ident: $group:pat, $name:pat, $type:ty => $list:ident;)+) => {
        /// An object of any kind.
        #[derive(Debug)]
        pub(super) enum Body {
            $($variant(Arc<Content<$type>>),)+
        }

        impl Body {
            fn read(kind: &Kind, object: Untyped<'_>) -> Option<Self> {
                match (kind.group(), kind.name) {
                    $(($group, $name) => Some(Self::$variant(object.content()?)),)+
                    (group, name) => unreachable!("{name} of {group:?} has no list"),
                }
            }

            /// Adds it to the list of its kind.
            pub fn place(&self, text: InText, base: Base, origin: u32, lists: &mut Lists) {
                match self {
                    $(Self::$variant(content) => lists.$list.push(Object::new(Arc::clone(content), text, base, origin)),)+
                }
            }
        }

        /// The objects of a text, by kind, in the order of reading.
        #[derive(Clone, Debug, Default)]
        pub(crate) struct Lists {
            $(pub(crate) $list: Vec<Object<$type>>,)+
        }

        impl Lists {
            /// Gives back what the lists have of memory beyond their objects.
            pub(super) fn shrink_to_fit(&mut self) {
                $(self.$list.shrink_to_fit();)+
            }

            /// The lists that have other objects than another's.
            pub(super) fn changed<'l>(&'l self, before: &'l Self) -> impl Iterator<Item = &'static str> + 'l {
                let all = [$((stringify!($list), have_same(&self.$list, &before.$list)),)+];
                all.into_iter().filter(|(_, same)| !same).map(|(list, _)| list)
            }
        }

        impl Manifests {
            $($(#[$doc])+
            pub fn $list(&self) -> List<'_, $type> {
                List { chunks: self.chunks(), of: |lists| &lists.$list }
            })+
        }
    };
}

bodies! {
    /// v1 Node.
    Node: _, "Node", KubernetesNode => nodes;
    /// v1 Namespace.
    Namespace: _, "Namespace", Namespace => namespaces;
    /// v1 Pod.
    Pod: _, "Pod", Pod => pods;
    /// v1 Service.
    Service: _, "Service", Service => services;
    /// v1 ServiceAccount.
    ServiceAccount: _, "ServiceAccount", ServiceAccount => service_accounts;
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice: _, "EndpointSlice", EndpointSlice => endpoint_slices;
    /// projectcalico.org/v3 NetworkPolicy.
    CalicoNetworkPolicy: CALICO_GROUP, "NetworkPolicy", policy::NetworkPolicy => calico_network_policies;
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy: _, "NetworkPolicy", NetworkPolicy => network_policies;
    /// policy.networking.k8s.io/v1beta1 ClusterNetworkPolicy.
    ClusterNetworkPolicy: _, "ClusterNetworkPolicy", ClusterNetworkPolicy => cluster_network_policies;
    /// projectcalico.org/v3 IPPool.
    IpPool: _, "IPPool", IpPool => pools;
    /// projectcalico.org/v3 WorkloadEndpoint.
    WorkloadEndpoint: _, "WorkloadEndpoint", WorkloadEndpoint => workload_endpoints;
    /// projectcalico.org/v3 GlobalNetworkPolicy.
    GlobalNetworkPolicy: _, "GlobalNetworkPolicy", GlobalNetworkPolicy => global_network_policies;
    /// projectcalico.org/v3 StagedGlobalNetworkPolicy.
    StagedGlobalNetworkPolicy: _, "StagedGlobalNetworkPolicy", GlobalNetworkPolicy => staged_global_network_policies;
    /// projectcalico.org/v3 StagedNetworkPolicy.
    StagedNetworkPolicy: _, "StagedNetworkPolicy", policy::NetworkPolicy => staged_network_policies;
    /// projectcalico.org/v3 StagedKubernetesNetworkPolicy.
    StagedKubernetesNetworkPolicy: _, "StagedKubernetesNetworkPolicy", StagedKubernetesNetworkPolicy
        => staged_kubernetes_network_policies;
    /// projectcalico.org/v3 Tier.
    Tier: _, "Tier", Tier => tiers;
    /// projectcalico.org/v3 GlobalNetworkSet and NetworkSet.
    NetworkSet: _, "GlobalNetworkSet" | "NetworkSet", NetworkSet => network_sets;
    /// projectcalico.org/v3 Profile.
    Profile: _, "Profile", Profile => profiles;
    /// projectcalico.org/v3 HostEndpoint.
    HostEndpoint: _, "HostEndpoint", HostEndpoint => host_endpoints;
    /// projectcalico.org/v3 FelixConfiguration.
    FelixConfiguration: _, "FelixConfiguration", FelixConfiguration => felix_configurations;
    /// networking.k8s.io/v1 ServiceCIDR.
    ServiceCidr: _, "ServiceCIDR", ServiceCidr => service_cidrs;
    /// projectcalico.org/v3 ClusterInformation.
    ClusterInformation: _, "ClusterInformation", ClusterInformation => cluster_informations;
    /// projectcalico.org/v3 BlockAffinity.
    BlockAffinity: _, "BlockAffinity", BlockAffinity => block_affinities;
    /// projectcalico.org/v3 IPAMBlock.
    IpamBlock: _, "IPAMBlock", IpamBlock => ipam_blocks;
}

impl Form {
    /// The tree of such a piece of a text, read once more.
    pub(super) fn reread(self, source: &Source, piece: Span) -> Option<Arc<Node>> {
        source.tree(piece, |text| match (self, tree::reread(text)?) {
            (Self::Document, node) => Some(node),
            (Self::ListItem, Node { value: Value::List(mut items), .. }) => items.pop(),
            (Self::ListItem, _) => None,
        })
    }
}

impl Piece {
    /// This one without some of its objects.
    pub(super) fn without(&self, is_gone: impl Fn(&ObjectId) -> bool) -> Self {
        let items = self.items.iter().filter(|item| !is_gone(item.identity.id()));
        Self { findings: self.findings.clone(), is_template: self.is_template, items: items.cloned().collect() }
    }

    /// Reads a piece. `None` where it is no list item that says all by itself: then the document must be read as a whole. Call it within
    /// [`tree::on_reader_thread`].
    pub fn read(form: Form, text: &str, identities: &Identities) -> Option<Self> {
        let mut reading = Reading { piece: Self::default(), problems: Problems::default(), identities };
        let file = reading.problems.add_source(Source::new("", text.to_owned()));
        let node = tree::read_document(file, 0..text.len(), &mut reading.problems);
        let node = match (form, node) {
            (Form::Document, node) => node,
            (Form::ListItem, Some(Node { value: Value::List(mut items), .. }))
                if items.len() == 1 && reading.problems.diagnostics().is_empty() =>
            {
                // Of what kind an item is that does not say it, its list does.
                Some(items.pop().filter(|item| item.get("kind").is_some())?)
            }
            (Form::ListItem, _) => return None,
        };
        if let Some(node) = node {
            reading.add(node);
        }
        let Reading { mut piece, problems, .. } = reading;
        if let Some(finding) = piece.items.is_empty().then(|| template(text, &problems)).flatten() {
            return Some(Self { findings: vec![finding], is_template: true, ..piece });
        }
        for finding in problems.diagnostics() {
            // A key that is given twice is the object's fault, though the reader of trees finds it.
            let holds = |item: &&mut Arc<Item>| (item.extent.start..item.extent.end).contains(&finding.span.start);
            match piece.items.iter_mut().find(holds).and_then(Arc::get_mut) {
                Some(item) => item.findings = item.findings.iter().chain([finding]).cloned().collect(),
                None => piece.findings.push(finding.clone()),
            }
        }
        piece.findings.shrink_to_fit();
        piece.items.shrink_to_fit();
        Some(piece)
    }
}

impl Piece {
    /// Reads an object of a known kind out of its tree. `place` moves what is found from its tree to its own places.
    pub(super) fn of_object(
        kind: &'static Kind,
        tree: Node,
        identities: &Identities,
        place: impl Fn(&Node, &Diagnostic) -> Diagnostic,
    ) -> Self {
        let mut reading = Reading { piece: Self::default(), problems: Problems::default(), identities };
        reading.add_object(kind, 0, &tree);
        let Reading { mut piece, problems, .. } = reading;
        piece.findings = problems.diagnostics().iter().map(|finding| place(&tree, finding)).collect();
        for item in piece.items.iter_mut().filter_map(Arc::get_mut) {
            item.findings = item.findings.iter().map(|finding| place(&tree, finding)).collect();
        }
        piece
    }
}

/// What to say of a text that is no YAML because it is a template of Helm's or of another tool that writes YAML with `{{ }}`.
fn template(text: &str, problems: &Problems) -> Option<Diagnostic> {
    // Within quotes and blocks of text, braces are as good as anything, and the text reads well.
    let start = text.find("{{").filter(|_| problems.has_errors())? as u32;
    Some(Diagnostic {
        severity: Severity::Error,
        span: Span { file: 0, start, end: start + 2 },
        message: "this is a template, not YAML: nothing is read of it".to_owned(),
        help: Some("let Helm fill it in: `helm template NAME CHART > chart.yaml`, and read that file".to_owned()),
        topic: None,
    })
}

/// Keys that only a kustomization has; it need not say its kind.
const KUSTOMIZATION_KEYS: [&str; 7] =
    ["resources", "bases", "components", "patches", "patchesStrategicMerge", "configMapGenerator", "secretGenerator"];

/// Whether this is the file that kustomize begins with, with or without its kind.
fn is_kustomization(node: &Node) -> bool {
    let text = |key: &str| node.get(key).and_then(Node::as_str);
    match text("kind") {
        Some(kind) => {
            let is_its_group =
                || text("apiVersion").is_some_and(|version| version.starts_with("kustomize.config.k8s.io/"));
            ["Kustomization", "Component"].contains(&kind) && is_its_group()
        }
        None => KUSTOMIZATION_KEYS.iter().any(|key| node.get(key).is_some()),
    }
}

struct Reading<'i> {
    piece: Piece,
    problems: Problems,
    identities: &'i Identities,
}

impl Reading<'_> {
    fn add(&mut self, mut node: Node) {
        let problems = &mut self.problems;
        if let Value::List(items) = &mut node.value {
            // calicoctl prints several resources so.
            return std::mem::take(items).into_iter().for_each(|item| self.add(item));
        }
        if !matches!(node.value, Value::Map(_)) {
            let message = format!("expected a Kubernetes object, found {}", node.describe());
            return problems.error(node.span, message, None);
        }
        if is_kustomization(&node) {
            let message = "this is a kustomization, and what it makes of its resources is not read".to_owned();
            let help =
                "let kustomize write it out: `kubectl kustomize FOLDER > all.yaml`, and read that file".to_owned();
            let start = node.span.start;
            return problems.warning(Span { end: start, ..node.span }, message, help);
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
        if is_list(&kind_name) && node.get("items").is_some() {
            let of_kind = kind_name.strip_suffix(LIST).filter(|kind| !kind.is_empty());
            let Value::Map(entries) = &mut node.value else { return };
            let items = entries.iter_mut().find(|(key, _)| key.text == "items").map(|(_, items)| &mut items.value);
            match items {
                Some(Value::List(items)) => {
                    for mut item in std::mem::take(items) {
                        if let Some(kind) = of_kind {
                            inherit(&mut item, &api_version, kind);
                        }
                        self.add(item);
                    }
                }
                Some(Value::Null) | None => {}
                Some(_) => problems.error(At::root(&node).key("items").span(), "items: expected a list", None),
            }
            return;
        }
        let place_of = |key: &str| At::root(&node).key(key).span();
        match recognise(&api_version, &kind_name, &node) {
            Recognised::Known(kind, version) => self.add_object(kind, version, &node),
            Recognised::Misnamed(kind, Slip { is_in_kind, help }) => {
                let place = place_of(if is_in_kind { "kind" } else { "apiVersion" });
                let message = format!("{kind_name} of {api_version} is not read");
                if node.get("metadata").and_then(|metadata| metadata.get("name")).is_none() {
                    return problems.error(place, message, help);
                }
                let mut findings = Problems::default();
                findings.error(place, message, help);
                self.add_item(kind, 0, &node, |_| (None, findings));
            }
            Recognised::Foreign { help } => {
                let message = format!("{kind_name} of {api_version} is skipped: weir does not enforce this policy");
                problems.warning(place_of("kind"), message, help);
            }
            Recognised::Nearly(known) => {
                let message = format!("{kind_name} of {api_version} is skipped: weir does not know this kind");
                problems.warning(place_of("kind"), message, format!("did you mean {known}?"));
            }
            Recognised::Other => {
                let of_version = format!("{kind_name} of {api_version}");
                let message = format!("{of_version} is skipped");
                problems.note_on(Topic::Skipped(of_version.into()), place_of("kind"), message);
            }
        }
    }

    fn add_object(&mut self, kind: &'static Kind, version: u8, node: &Node) {
        let names = self.identities.names.clone();
        self.add_item(kind, version, node, |identity| {
            let mut problems = Problems::default();
            let object = Untyped { identity, node, unknown: kind.unknown, problems: &mut problems, names: &names };
            (Body::read(kind, object), problems)
        });
    }

    /// Adds an object whose body `read` reads, with what is wrong with it.
    fn add_item(
        &mut self,
        kind: &'static Kind,
        version: u8,
        node: &Node,
        read: impl FnOnce(&Arc<Identity>) -> (Option<Body>, Problems),
    ) {
        let metadata = At::root(node).key("metadata");
        let field = |key: &str| node.get("metadata").and_then(|metadata| metadata.get(key));
        let Some(name) = field("name").and_then(Node::as_str).filter(|name| !name.is_empty()) else {
            let place = metadata.key("name");
            let message = match field("name") {
                Some(found) => format!("{}: metadata.name: expected a name, found {}", kind.name, found.describe()),
                None => format!("{}: metadata.name is missing", kind.name),
            };
            let help = "every object needs a name of its own".to_owned();
            return self.problems.error(place.span(), message, help);
        };
        let given = field("namespace").and_then(Node::as_str).filter(|namespace| !namespace.is_empty());
        let namespace = match (kind.namespaced, given) {
            (true, given) => given.unwrap_or(self.identities.namespace()).to_owned(),
            (false, _) => String::new(),
        };
        let id = ObjectId {
            group: kind.group(),
            kind: kind.name,
            namespace: self.identities.names.of(&namespace),
            name: self.identities.names.of(name),
        };
        let identity = self.identities.of(id);
        let subject = Subject::read(kind, node).map(Box::new);
        let (extent, start, name) = (node.extent(), node.span.start, metadata.key("name").span());
        let (body, problems) = read(&identity);
        let findings = problems.diagnostics().into();
        self.piece.items.push(Arc::new(Item { identity, kind, version, extent, start, name, findings, subject, body }));
    }
}

/// What the name of a kind ends with whose objects are lists of other objects.
const LIST: &str = "List";

/// Whether a kind's objects are lists of other objects.
fn is_list(kind: &str) -> bool {
    kind.ends_with(LIST)
}

/// Gives an item of a typed list what it leaves to its list, as kubectl does.
fn inherit(item: &mut Node, api_version: &str, kind: &str) {
    if item.get("kind").is_some() {
        return;
    }
    let start = Span { end: item.span.start, ..item.span };
    let Value::Map(entries) = &mut item.value else { return };
    entries.retain(|(key, _)| key.text != "apiVersion" && key.text != "kind");
    for (key, text) in [("apiVersion", api_version), ("kind", kind)] {
        let mut value = Node::null();
        (value.span, value.value) = (start, Value::String(text.to_owned()));
        entries.push((Key { text: key.to_owned(), span: start }, value));
    }
}

/// An object about to be read as its type.
struct Untyped<'a> {
    identity: &'a Arc<Identity>,
    node: &'a Node,
    /// What a field of its spec that its type does not have is, as its kind has it.
    unknown: Option<Severity>,
    problems: &'a mut Problems,
    names: &'a Names,
}

impl Untyped<'_> {
    fn content<T: Readable>(self) -> Option<Arc<Content<T>>> {
        let Self { identity, node, unknown, problems, names } = self;
        let subject = format!("{}: ", identity.id());
        let unknown = |path: &str, nearest: Option<&str>| match unknown {
            Some(_) if !path.starts_with("spec") => Some(Severity::Warning),
            None => nearest.map(|_| Severity::Warning),
            given => given,
        };
        let value = meta::sharing(names, || typed::read_part(node, &subject, known_besides, unknown, problems))?;
        Some(Arc::new(Content {
            identity: Arc::clone(identity),
            value,
            start: node.span.start,
            is_faulty: problems.has_errors(),
            made: Made::default(),
        }))
    }
}

/// The items of a document that is a block list of objects under the key `items`, as kubectl writes it; `None` where that cannot be told
/// from the indentation of its lines.
///
/// Each item is then read by itself, and if one cannot be (a text in quotes that goes on over the lines of several, an alias of
/// another item's anchor), the document is read as a whole. Call it within [`tree::on_reader_thread`].
pub fn list_items(document: &str) -> Option<Vec<Range<usize>>> {
    let mut lines = Lines { text: document, offset: 0 };
    let head_end = loop {
        let line = lines.next()?;
        if document[line.clone()].trim_end() == "items:" {
            break line.end;
        }
    };
    let mut items: Vec<Range<usize>> = Vec::new();
    let mut list_indent = None;
    let mut tail_start = document.len();
    for line in lines {
        let content = document[line.clone()].trim_start_matches(' ');
        let indent = line.len() - content.len();
        let is_blank = content.trim().is_empty() || content.starts_with('#');
        let begins_item = content.strip_prefix('-').is_some_and(|rest| rest.starts_with([' ', '\n', '\r']));
        match list_indent {
            _ if is_blank => {}
            None if begins_item => list_indent = Some(indent),
            None => return None,
            Some(expected) if indent > expected => {}
            Some(expected) if indent == expected && begins_item => {}
            Some(_) => {
                tail_start = line.start;
                break;
            }
        }
        match items.last_mut() {
            Some(item) if is_blank || Some(indent) != list_indent => item.end = line.end,
            None if is_blank => {}
            _ => items.push(line),
        }
    }
    let frame = format!("{}{}", &document[..head_end], &document[tail_start..]);
    (!items.is_empty() && is_frame_of_list(&frame)).then_some(items)
}

/// Whether a document without its items is a list of objects.
fn is_frame_of_list(frame: &str) -> bool {
    let mut problems = Problems::default();
    let file = problems.add_source(Source::new("", frame.to_owned()));
    let Some(node) = tree::read_document(file, 0..frame.len(), &mut problems) else { return false };
    let text = |key: &str| node.get(key).and_then(Node::as_str).filter(|text| !text.is_empty());
    let items = node.get("items").map(|items| &items.value);
    problems.diagnostics().is_empty()
        && text("apiVersion").is_some()
        && text("kind").is_some_and(is_list)
        && matches!(items, Some(Value::Null))
}

/// The ranges of a text's lines, line breaks included.
struct Lines<'t> {
    text: &'t str,
    offset: usize,
}

impl Iterator for Lines<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let line = self.text[self.offset..].split_inclusive('\n').next()?;
        let start = self.offset;
        self.offset += line.len();
        Some(start..self.offset)
    }
}
