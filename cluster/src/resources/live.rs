//! Objects of a running API server: read from JSON, and kept by kind.
//!
//! # Theory
//! They are read into the same types as those of files, with the same rules, but have no text, so that a place in one is its name, its version
//! and the path of a field ([`Untexted`]). A change that leaves what weir reads of an object as it was leaves everything as it was ([`Live::is_same`]).
//!
//! A [`Set`] has the objects of one kind in buckets by a hash of their names, some [`PER_BUCKET`] in each. A bucket is for
//! [`Manifests`](super::Manifests) what a file is, so that a change of one object makes one small chunk anew, whatever else the cluster has. How many
//! buckets there are changes only when the set doubles, as then all is laid out anew.
//!
//! Most objects are of kinds that have a short way: straight from JSON into their type. What that does not take, and all policy, goes by a tree, as
//! texts do, which tells faults and fields that nobody knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{Hash, Hasher},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use hashbrown::HashMap;
use serde::Deserialize;
use serde_json::Value;
use sha1::{Digest, Sha1};

use super::{
    Identities, ObjectId,
    calico::ipam::{BlockAffinity, ClusterInformation, IpamBlock},
    identity::Identity,
    kinds::{self, Kind},
    kubernetes::{EndpointSlice, KubernetesNode, Namespace, Pod, Service, ServiceAccount, ServiceCidr},
    made::Made,
    meta::{self, Name},
    object::{Content, Readable},
    piece::{Body, Item, Piece},
    pieces::Pieces,
};
use crate::text::{Diagnostic, Source, Span, Untexted, tree::Node};

/// Objects in a bucket before there are more buckets.
const PER_BUCKET: usize = 64;
/// Paths of fields that are told apart; faults at more than these are told at the object as a whole.
const MAX_PATHS: usize = 1 << 16;
/// The annotation in which Calico keeps the metadata of what it stores.
const CALICO_STORED: &str = "crd.projectcalico.org";

/// All objects of a running cluster, as they are laid out.
pub type LiveObjects = Arc<[Arc<Pieces>]>;

/// Why JSON is no object.
#[derive(Debug, thiserror::Error)]
pub enum NoObject {
    /// It cannot be read.
    #[error("it is no object: {0}")]
    Json(#[from] serde_json::Error),
    /// It has no name.
    #[error("it has no name")]
    Nameless,
}

/// A kind of objects, as an API server serves it.
#[derive(Clone, Copy, Debug)]
pub struct LiveKind {
    kind: &'static Kind,
    is_stored: bool,
}

impl LiveKind {
    /// The kind of that name in a group, if weir reads it.
    pub fn new(group: &str, kind: &str) -> Option<Self> {
        Some(Self { kind: kinds::known(group, kind)?, is_stored: group == CALICO_STORED })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.kind.name
    }

    /// The group that its objects are known by: of Calico's kinds the same in both forms.
    pub fn group(&self) -> &'static str {
        self.kind.group()
    }

    /// Whether its objects are in namespaces.
    pub fn is_namespaced(&self) -> bool {
        self.kind.namespaced
    }
}

impl PartialEq for LiveKind {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.kind, other.kind) && self.is_stored == other.is_stored
    }
}

/// The paths of fields, by number; the first is that of the object itself.
#[derive(Debug, Default)]
struct Paths(Mutex<PathsByNumber>);

#[derive(Debug, Default)]
struct PathsByNumber {
    numbers: HashMap<Arc<str>, u32>,
    paths: Vec<Arc<str>>,
}

impl Paths {
    fn number(&self, path: &str) -> u32 {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let PathsByNumber { numbers, paths } = &mut *known;
        match numbers.get(path) {
            _ if path.is_empty() => 0,
            Some(number) => *number,
            None if paths.len() >= MAX_PATHS => 0,
            None => {
                let path: Arc<str> = path.into();
                paths.push(Arc::clone(&path));
                numbers.insert(path, paths.len() as u32);
                paths.len() as u32
            }
        }
    }

    fn path(&self, number: u32) -> String {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let path = (number as usize).checked_sub(1).and_then(|index| known.paths.get(index));
        path.map_or_else(String::new, |path| path.to_string())
    }
}

/// The objects of a bucket, for places.
#[derive(Debug)]
struct Slots {
    objects: Box<[Arc<Live>]>,
    paths: Arc<Paths>,
}

impl Untexted for Slots {
    fn object(&self, position: u32) -> String {
        self.objects.get(position as usize).map_or_else(String::new, |object| object.to_string())
    }

    fn path(&self, number: u32) -> String {
        self.paths.path(number)
    }

    fn number(&self, path: &str) -> u32 {
        self.paths.number(path)
    }
}

/// What reads objects of a running cluster.
#[derive(Clone, Debug)]
pub struct Reader {
    identities: Identities,
    paths: Arc<Paths>,
}

/// An object of a running cluster.
#[derive(Debug)]
pub struct Live {
    identity: Arc<Identity>,
    version: Box<str>,
    piece: Arc<Piece>,
    /// Of what went by a tree: what weir reads of it, in short.
    digest: Option<[u8; 20]>,
}

impl fmt::Display for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ObjectId { kind, namespace, name, .. } = self.id();
        let slash = if namespace.is_empty() { "" } else { "/" };
        write!(f, "{kind}/{namespace}{slash}{name} (resourceVersion {})", self.version)
    }
}

/// What every object has.
#[derive(Deserialize)]
struct Head<'j> {
    #[serde(borrow)]
    metadata: HeadMetadata<'j>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMetadata<'j> {
    #[serde(borrow, default)]
    name: std::borrow::Cow<'j, str>,
    #[serde(borrow, default)]
    namespace: Option<std::borrow::Cow<'j, str>>,
    #[serde(borrow, default)]
    resource_version: Option<std::borrow::Cow<'j, str>>,
}

impl Live {
    /// What it is.
    pub fn id(&self) -> &ObjectId {
        self.identity.id()
    }

    /// Its resourceVersion.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether weir reads the same of both.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.identity, &other.identity)
            && match (self.body(), other.body()) {
                _ if self.digest.is_some() || other.digest.is_some() => self.digest == other.digest,
                (Some(one), Some(other)) => have_same_value(one, other),
                _ => false,
            }
    }

    fn body(&self) -> Option<&Body> {
        self.piece.items.first()?.body.as_ref()
    }
}

/// Whether two objects of a kind with a short way say the same.
fn have_same_value(one: &Body, other: &Body) -> bool {
    match (one, other) {
        (Body::Node(one), Body::Node(other)) => one.value == other.value,
        (Body::Namespace(one), Body::Namespace(other)) => one.value == other.value,
        (Body::Pod(one), Body::Pod(other)) => one.value == other.value,
        (Body::Service(one), Body::Service(other)) => one.value == other.value,
        (Body::ServiceAccount(one), Body::ServiceAccount(other)) => one.value == other.value,
        (Body::EndpointSlice(one), Body::EndpointSlice(other)) => one.value == other.value,
        (Body::ServiceCidr(one), Body::ServiceCidr(other)) => one.value == other.value,
        (Body::ClusterInformation(one), Body::ClusterInformation(other)) => one.value == other.value,
        (Body::BlockAffinity(one), Body::BlockAffinity(other)) => one.value == other.value,
        (Body::IpamBlock(one), Body::IpamBlock(other)) => one.value == other.value,
        _ => false,
    }
}

fn content<T: Readable>(json: &str, identity: &Arc<Identity>) -> Option<Arc<Content<T>>> {
    let value = serde_json::from_str(json).ok()?;
    Some(Arc::new(Content { identity: Arc::clone(identity), value, start: 0, is_faulty: false, made: Made::default() }))
}

/// The short way from JSON to an object; `None` where there is none for it.
fn straight(kind: &Kind, json: &str, identity: &Arc<Identity>) -> Option<Body> {
    if !kind.unknown_is_allowed() {
        return None;
    }
    Some(match kind.name {
        "Node" => Body::Node(content::<KubernetesNode>(json, identity)?),
        "Namespace" => Body::Namespace(content::<Namespace>(json, identity)?),
        "Pod" => Body::Pod(content::<Pod>(json, identity)?),
        "Service" => Body::Service(content::<Service>(json, identity)?),
        "ServiceAccount" => Body::ServiceAccount(content::<ServiceAccount>(json, identity)?),
        "EndpointSlice" => Body::EndpointSlice(content::<EndpointSlice>(json, identity)?),
        "ServiceCIDR" => Body::ServiceCidr(content::<ServiceCidr>(json, identity)?),
        "ClusterInformation" => Body::ClusterInformation(content::<ClusterInformation>(json, identity)?),
        "BlockAffinity" => Body::BlockAffinity(content::<BlockAffinity>(json, identity)?),
        "IPAMBlock" => Body::IpamBlock(content::<IpamBlock>(json, identity)?),
        _ => return None,
    })
}

impl Reader {
    /// One that numbers objects as others with these identities do.
    pub fn new(identities: &Identities) -> Self {
        Self { identities: identities.clone(), paths: Arc::default() }
    }

    /// Reads an object. What is wrong with it lies with it. Call it with a stack as of [`crate::text::tree::on_reader_thread`].
    ///
    /// # Errors
    /// Where it is none, or has no name.
    pub fn read(&self, kind: LiveKind, json: &str) -> Result<Live, NoObject> {
        let Head { metadata } = serde_json::from_str(json)?;
        let name = kind.name_of(&metadata.name);
        if name.is_empty() {
            return Err(NoObject::Nameless);
        }
        let names = &self.identities.names;
        let namespace = metadata.namespace.filter(|_| kind.kind.namespaced).unwrap_or_default();
        let id = ObjectId {
            group: kind.kind.group(),
            kind: kind.kind.name,
            namespace: names.of(&namespace),
            name: names.of(name),
        };
        let identity = self.identities.of(id);
        let version = metadata.resource_version.unwrap_or_default().into();
        if let Some(body) = meta::sharing(names, || straight(kind.kind, json, &identity)) {
            let (start, name) = (0, Span { file: 0, start: 0, end: 0 });
            let extent = Span { file: 0, start: 0, end: 1 };
            let item = Item {
                identity: Arc::clone(&identity),
                kind: kind.kind,
                version: 0,
                extent,
                start,
                name,
                findings: Box::default(),
                subject: None,
                body: Some(body),
            };
            let piece = Piece { items: vec![Arc::new(item)], ..Piece::default() };
            return Ok(Live { identity, version, piece: Arc::new(piece), digest: None });
        }
        let (piece, digest) = self.read_tree(kind, json)?;
        Ok(Live { identity, version, piece: Arc::new(piece), digest: Some(digest) })
    }

    /// Reads an object by way of a tree.
    fn read_tree(&self, kind: LiveKind, json: &str) -> Result<(Piece, [u8; 20]), NoObject> {
        let mut value: Value = serde_json::from_str(json)?;
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            let name = metadata.get("name").and_then(Value::as_str).map(|name| kind.name_of(name).to_owned());
            metadata.insert("name".to_owned(), Value::from(name));
            for key in ["managedFields", "resourceVersion", "generation"] {
                metadata.remove(key);
            }
        }
        if let Some(object) = value.as_object_mut() {
            if kind.has_unread_status() {
                object.remove("status");
            }
            // Items of lists do not say it.
            object.insert("kind".to_owned(), kind.kind.name.into());
            object.insert("apiVersion".to_owned(), kind.kind.api_version(kind.kind.group()).into());
        }
        let digest = Sha1::digest(serde_json::to_vec(&value)?).into();
        let tree = Node::of_json(value);
        let mut piece = Piece::of_object(kind.kind, tree, &self.identities, |tree, finding| {
            let end = self.paths.number(&tree.path_to(finding.span.start));
            Diagnostic { span: Span { file: 0, start: 0, end }, ..finding.clone() }
        });
        piece.items.iter_mut().filter_map(Arc::get_mut).for_each(|item| {
            (item.extent, item.start) = (Span { file: 0, start: 0, end: 1 }, 0);
            item.name = Span { file: 0, start: 0, end: 0 };
        });
        Ok((piece, digest))
    }
}

impl LiveKind {
    /// What an object is called that the server calls so: Calico's policies are stored with their tier before their name.
    fn name_of<'n>(&self, name: &'n str) -> &'n str {
        let is_policy = self.kind.name.ends_with("NetworkPolicy");
        name.strip_prefix("default.").filter(|_| self.is_stored && is_policy).unwrap_or(name)
    }

    fn has_unread_status(&self) -> bool {
        !matches!(self.kind.name, "Node" | "Pod" | "Service")
    }
}

/// The objects of one kind, laid out for [`Manifests`](super::Manifests).
#[derive(Debug)]
pub struct Set {
    reader: Reader,
    kind: LiveKind,
    buckets: Vec<Bucket>,
    count: usize,
}

#[derive(Debug, Default)]
struct Bucket {
    objects: BTreeMap<(Name, Name), Arc<Live>>,
    /// What it was laid out as; `None` where it has changed since.
    pieces: Option<Arc<Pieces>>,
}

/// FNV-1a of 64 bits: the same in every process, so that nodes with the same objects have the same order and names.
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl Set {
    /// An empty one.
    pub fn new(reader: &Reader, kind: LiveKind) -> Self {
        Self { reader: reader.clone(), kind, buckets: vec![Bucket::default()], count: 0 }
    }

    /// Its kind.
    pub fn kind(&self) -> LiveKind {
        self.kind
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Live>> {
        self.buckets.iter().flat_map(|bucket| bucket.objects.values())
    }

    fn index(&self, namespace: &str, name: &str) -> usize {
        let mut hasher = Fnv::default();
        (namespace, name).hash(&mut hasher);
        let hash = hasher.finish();
        // The low bits depend on all bytes, but little on the last ones' high bits.
        (hash ^ (hash >> 32)) as usize % self.buckets.len()
    }

    fn bucket(&mut self, id: &ObjectId) -> &mut Bucket {
        let index = self.index(&id.namespace, &id.name);
        &mut self.buckets[index]
    }

    /// The object with a name.
    pub fn get(&self, id: &ObjectId) -> Option<&Arc<Live>> {
        self.buckets[self.index(&id.namespace, &id.name)]
            .objects
            .get(&(Arc::clone(&id.namespace), Arc::clone(&id.name)))
    }

    /// Puts an object in the place of the one with its name.
    pub fn put(&mut self, object: Arc<Live>) {
        let key = (Arc::clone(&object.id().namespace), Arc::clone(&object.id().name));
        let bucket = self.bucket(&object.identity.id().clone());
        bucket.pieces = None;
        if bucket.objects.insert(key, object).is_some() {
            return;
        }
        self.count += 1;
        if self.count > PER_BUCKET * self.buckets.len() {
            let more = self.buckets.len() * 2;
            let all = std::mem::take(&mut self.buckets).into_iter().flat_map(|bucket| bucket.objects);
            let all: Vec<_> = all.collect();
            self.buckets.resize_with(more, Bucket::default);
            for (key, object) in all {
                self.bucket(&object.identity.id().clone()).objects.insert(key, object);
            }
        }
    }

    /// Takes an object out.
    pub fn remove(&mut self, id: &ObjectId) {
        let key = (Arc::clone(&id.namespace), Arc::clone(&id.name));
        let bucket = self.bucket(id);
        if bucket.objects.remove(&key).is_some() {
            bucket.pieces = None;
            self.count -= 1;
        }
    }

    /// Of Nodes: the uid of the one with that name, and the status of its condition NetworkUnavailable, if it has any.
    pub fn node(&self, name: &str) -> Option<(Option<Name>, Option<Name>)> {
        let key = (Name::default(), Name::from(name));
        let object = self.buckets[self.index(&key.0, &key.1)].objects.get(&key)?;
        let Some(Body::Node(node)) = object.body() else { return None };
        Some((node.value.metadata.uid.clone(), node.value.status.network_unavailable.clone()))
    }

    /// Where the API server itself is, of the slices of its service, which has that name.
    pub fn kubernetes_endpoints(&mut self) -> BTreeSet<SocketAddr> {
        let names = &self.reader.identities.names;
        let key = (names.of("default"), names.of("kubernetes"));
        let Some(slice) = self.buckets[self.index(&key.0, &key.1)].objects.get(&key) else { return BTreeSet::new() };
        let Some(Body::EndpointSlice(slice)) = slice.body() else { return BTreeSet::new() };
        let ports = slice.value.ports.iter().filter_map(|port| u16::try_from(port.port?).ok());
        let addresses = slice.value.endpoints.iter().flat_map(|endpoint| endpoint.addresses.as_slice());
        let addresses: Vec<_> = addresses.filter_map(|address| address.ip().ok()).collect();
        ports.flat_map(|port| addresses.iter().map(move |address| SocketAddr::new(*address, port))).collect()
    }

    /// Whether one of these, which are ClusterInformations, says that what is stored may not be believed now.
    pub fn says_not_ready(&self) -> bool {
        let is_ready = |object: &Arc<Live>| match object.body() {
            Some(Body::ClusterInformation(information)) => information.value.spec.datastore_ready.unwrap_or(true),
            _ => true,
        };
        !self.iter().all(is_ready)
    }

    /// The objects as they are laid out; those of a bucket in which nothing has changed are the same.
    pub fn pieces(&mut self) -> Vec<Arc<Pieces>> {
        let paths = &self.reader.paths;
        let name = self.kind.name();
        let lay_out = |bucket: &mut Bucket| {
            let objects: Box<[Arc<Live>]> = bucket.objects.values().cloned().collect();
            let pieces: Vec<_> = objects.iter().map(|object| Arc::clone(&object.piece)).collect();
            let slots = Arc::new(Slots { objects, paths: Arc::clone(paths) });
            Arc::new(Pieces::of_objects(Source::of_objects(name, slots), pieces.into_iter()))
        };
        self.buckets
            .iter_mut()
            .map(|bucket| {
                let known = bucket.pieces.take().unwrap_or_else(|| lay_out(bucket));
                Arc::clone(bucket.pieces.insert(known))
            })
            .collect()
    }
}
