//! Kubernetes and Calico resources read from YAML files.
//!
//! Every document becomes an [`Object`] of its kind: the typed value with the tree that it was read from, so that later
//! stages can point at the place of what they refuse. Kinds outside the contract are skipped with a note.

pub mod at;
pub mod calico;
pub mod cluster_network_policy;
pub mod identity;
mod kinds;
pub mod kubernetes;
mod made;
pub mod meta;
pub mod network_policy;
pub mod object;
pub mod piece;
pub mod subject;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use self::{
    calico::{
        IpPool, WorkloadEndpoint,
        host::{FelixConfiguration, HostEndpoint},
        policy::{self, GlobalNetworkPolicy, NetworkSet, Profile, StagedKubernetesNetworkPolicy, Tier},
    },
    cluster_network_policy::ClusterNetworkPolicy,
    kubernetes::{EndpointSlice, KubernetesNode, Namespace, Pod, Service, ServiceAccount},
    network_policy::NetworkPolicy,
    piece::{Form, Item, Piece},
};
use crate::text::{Diagnostic, Problems, Source, Span, tree};

pub use identity::{Identities, Identity, ObjectId};
pub use made::{Memo, Same};
pub use object::{Base, Content, InText, Object};
pub use subject::Subject;

/// A policy that cannot be read and has no earlier version: it denies what it selects.
#[derive(Debug)]
pub struct Denying {
    /// Its number in [`Objects`].
    pub origin: u32,
    /// Its identity.
    pub id: ObjectId,
    /// What it selects.
    pub subject: Subject,
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
    /// projectcalico.org/v3 GlobalNetworkPolicy.
    pub global_network_policies: Vec<Object<GlobalNetworkPolicy>>,
    /// projectcalico.org/v3 NetworkPolicy.
    pub calico_network_policies: Vec<Object<policy::NetworkPolicy>>,
    /// projectcalico.org/v3 StagedGlobalNetworkPolicy.
    pub staged_global_network_policies: Vec<Object<GlobalNetworkPolicy>>,
    /// projectcalico.org/v3 StagedNetworkPolicy.
    pub staged_network_policies: Vec<Object<policy::NetworkPolicy>>,
    /// projectcalico.org/v3 StagedKubernetesNetworkPolicy.
    pub staged_kubernetes_network_policies: Vec<Object<StagedKubernetesNetworkPolicy>>,
    /// policy.networking.k8s.io/v1beta1 ClusterNetworkPolicy.
    pub cluster_network_policies: Vec<Object<ClusterNetworkPolicy>>,
    /// projectcalico.org/v3 Tier.
    pub tiers: Vec<Object<Tier>>,
    /// projectcalico.org/v3 GlobalNetworkSet and NetworkSet.
    pub network_sets: Vec<Object<NetworkSet>>,
    /// projectcalico.org/v3 Profile.
    pub profiles: Vec<Object<Profile>>,
    /// projectcalico.org/v3 HostEndpoint.
    pub host_endpoints: Vec<Object<HostEndpoint>>,
    /// projectcalico.org/v3 FelixConfiguration.
    pub felix_configurations: Vec<Object<FelixConfiguration>>,
    /// Policies that could not be read and deny what they select.
    pub denying: Vec<Denying>,
    /// Where each object stands, by its number.
    pub objects: Objects,
}

/// Where objects stand, by the number that models and tables have for each.
#[derive(Debug, Default)]
pub struct Objects {
    placements: Vec<Placement>,
    /// Positions in `placements`, by number.
    by_number: Vec<Option<u32>>,
}

/// An object of a text.
#[derive(Debug)]
struct Placement {
    item: Arc<Item>,
    text: InText,
    base: Base,
    /// What stands for it instead of itself.
    substitute: Option<Substitute>,
}

impl Placement {
    fn id(&self) -> &ObjectId {
        self.item.identity.id()
    }

    fn origin(&self) -> Origin {
        let ObjectId { kind, namespace, name, .. } = self.id().clone();
        let source = &self.text.source;
        let (line, _) = source.line_column(self.base.offset + self.item.start);
        let namespace = Some(namespace.to_string()).filter(|namespace| !namespace.is_empty());
        Origin { kind, namespace, name: name.to_string(), file: source.name().to_owned(), line }
    }
}

impl Objects {
    /// The object with this number.
    pub fn get(&self, number: u32) -> Option<Origin> {
        let position = (*self.by_number.get(number as usize)?)?;
        Some(self.placements[position as usize].origin())
    }

    /// The place of the name of the object with this number.
    pub fn place(&self, number: u32) -> Option<Span> {
        let placement = &self.placements[(*self.by_number.get(number as usize)?)? as usize];
        Some(placement.base.place(placement.item.name))
    }

    /// All objects that are in force, in the order of reading.
    pub fn iter(&self) -> impl Iterator<Item = Origin> + '_ {
        let in_force = self.placements.iter().filter(|placement| placement.substitute != Some(Substitute::LastGood));
        in_force.map(Placement::origin)
    }

    /// How many objects of each kind are in force.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for placement in self.placements.iter().filter(|one| one.substitute != Some(Substitute::LastGood)) {
            *counts.entry(placement.id().kind).or_default() += 1;
        }
        counts
    }

    /// The object in whose text a place is.
    pub fn at(&self, place: Span) -> Option<&ObjectId> {
        let holds = |placement: &&Placement| {
            let span = placement.base.place(placement.item.extent);
            span.file == place.file && (span.start..span.end).contains(&place.start)
        };
        self.placements.iter().find(holds).map(Placement::id)
    }

    /// All objects in the texts that were read, those that were passed over too.
    pub fn mentioned(&self) -> HashSet<&ObjectId> {
        self.placements.iter().map(Placement::id).collect()
    }

    /// The objects that stand for themselves, each with the name of its text.
    pub fn good(&self) -> impl Iterator<Item = (&ObjectId, &str)> {
        let good = self.placements.iter().filter(|placement| placement.substitute.is_none());
        good.map(|placement| (placement.id(), placement.text.source.name()))
    }
}

/// What stands for an object that cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Substitute {
    /// The last version that could be.
    LastGood,
    /// Nothing; a policy denies what it selects.
    Nothing,
}

impl Manifests {
    /// All objects of pieces of texts but for those in `passed_over`.
    pub fn of<'p>(
        pieces: impl Iterator<Item = (u32, InText, &'p Piece)> + Clone,
        passed_over: &BTreeMap<ObjectId, Substitute>,
        problems: &mut Problems,
    ) -> Self {
        let mut manifests = Self::default();
        let newest = newest_versions(pieces.clone().map(|(_, _, piece)| piece));
        let mut templates = BTreeSet::new();
        for (file, text, piece) in pieces {
            let base = text.base(file);
            // Once for each text.
            if !piece.is_template || templates.insert(file) {
                replay(&piece.findings, base, problems);
            }
            for item in &piece.items {
                if let Some(newest) = newest.get(item.identity.id()).filter(|newest| **newest < item.version) {
                    let [counts, passed_over] =
                        [*newest, item.version].map(|version| item.kind.versions[usize::from(version)]);
                    let id = item.identity.id();
                    let message = format!("{id}: its {passed_over} is passed over, as its {counts} is here too");
                    problems.note(base.place(item.name), message);
                    continue;
                }
                let substitute = passed_over.get(item.identity.id()).copied();
                manifests.place(item, text.clone(), base, substitute, problems);
            }
        }
        manifests
    }

    /// Adds the objects of a text that no file holds, but for those in `passed_over`.
    pub fn add_text(
        &mut self,
        source: Source,
        identities: &Identities,
        passed_over: &BTreeMap<ObjectId, Substitute>,
        problems: &mut Problems,
    ) {
        let file = problems.add_source(source);
        let source = Arc::clone(problems.source(file));
        let pieces = tree::on_reader_thread(|| {
            let whole = source.text();
            let documents = tree::document_ranges(&whole).into_iter();
            let read = |range: Range<usize>| {
                let piece = Span { file: 0, start: range.start as u32, end: range.end as u32 };
                let text = InText { source: Arc::clone(&source), piece, form: Form::Document };
                Piece::read(Form::Document, &whole[range], identities).map(|piece| (text, piece))
            };
            documents.filter_map(read).collect::<Vec<_>>()
        });
        let pieces = match pieces {
            Ok(pieces) => pieces,
            Err(error) => {
                let message = format!("there is no thread to read objects with: {error}");
                return problems.error(Span { file, ..Span::default() }, message, None);
            }
        };
        for (text, piece) in pieces {
            let base = text.base(file);
            replay(&piece.findings, base, problems);
            for item in &piece.items {
                let substitute = passed_over.get(item.identity.id()).copied();
                self.place(item, text.clone(), base, substitute, problems);
            }
        }
    }

    /// Adds objects as they were at an earlier load from the same [`Library`].
    pub fn add_last_good(&mut self, earlier: &Objects, ids: &BTreeSet<ObjectId>, problems: &mut Problems) {
        let mut files: Vec<(&Arc<Source>, u32)> = Vec::new();
        for placement in &earlier.placements {
            if placement.substitute.is_some() || !ids.contains(placement.id()) {
                continue;
            }
            let known = files.iter().find(|(source, _)| Arc::ptr_eq(source, &placement.text.source));
            let file = known.map(|(_, file)| *file).unwrap_or_else(|| {
                let file = problems.share_source(Arc::clone(&placement.text.source));
                files.push((&placement.text.source, file));
                file
            });
            let base = Base { file, ..placement.base };
            self.place(&placement.item, placement.text.clone(), base, None, problems);
        }
    }

    fn place(
        &mut self,
        item: &Arc<Item>,
        text: InText,
        base: Base,
        substitute: Option<Substitute>,
        problems: &mut Problems,
    ) {
        let number = item.identity.number();
        let position = self.objects.placements.len() as u32;
        self.objects.placements.push(Placement { item: Arc::clone(item), text: text.clone(), base, substitute });
        if substitute == Some(Substitute::LastGood) {
            return;
        }
        if self.objects.by_number.len() <= number as usize {
            self.objects.by_number.resize(number as usize + 1, None);
        }
        let first = self.objects.by_number[number as usize].replace(position);
        if substitute == Some(Substitute::Nothing) {
            if let Some(subject) = &item.subject {
                self.denying.push(Denying {
                    origin: number,
                    id: item.identity.id().clone(),
                    subject: (**subject).clone(),
                });
            }
            return;
        }
        let first = first.map(|first| &self.objects.placements[first as usize]);
        if let Some(first) = first.filter(|first| first.substitute.is_none()) {
            let place = problems.place(first.base.place(first.item.name));
            let help = format!("the other is at {place}; keep one");
            problems.error(base.place(item.name), format!("{} is defined twice", item.identity.id()), help);
        }
        replay(&item.findings, base, problems);
        if let Some(body) = &item.body {
            body.place(text, base, number, self);
        }
    }
}

/// The newest version of each object of a kind that is read in several.
fn newest_versions<'p>(pieces: impl Iterator<Item = &'p Piece>) -> HashMap<&'p ObjectId, u8> {
    let mut newest: HashMap<&ObjectId, u8> = HashMap::new();
    for item in pieces.flat_map(|piece| &piece.items).filter(|item| item.kind.versions.len() > 1) {
        let version = newest.entry(item.identity.id()).or_insert(item.version);
        *version = item.version.min(*version);
    }
    newest
}

/// Reports what was found in a piece of text, at the place where it is now.
fn replay(findings: &[Diagnostic], base: Base, problems: &mut Problems) {
    for finding in findings {
        problems.push(Diagnostic { span: base.place(finding.span), ..finding.clone() });
    }
}
