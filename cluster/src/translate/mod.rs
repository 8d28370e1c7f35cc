//! Resources to the plain models that the lower crates compile their tables from.
//!
//! One pass over each kind: it reads addresses, ports and selectors, refuses what the API server would refuse, and
//! fills the models. What is at fault is reported at its place and left out, so that one run shows everything.

mod assume;
mod cluster;
mod host;
mod host_ports;
mod impossible;
mod last_api;
mod local_pods;
mod policy;
mod ports;
#[cfg(test)]
mod reload_tests;
mod review;
mod services;
mod stages;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use weir_packet::Protocol;

use crate::{
    config::RouterConfig,
    resources::{Chunks, Identities, Manifests, ObjectId, Substitute, live::LiveObjects},
    sources::{
        Library, Revisit,
        file::is_written,
        keep::Kept as KeptTexts,
        library::{Held, InForce, Texts},
        revisit::Awaited,
    },
    text::{Problems, Severity, Source},
};

pub use assume::{Assumed, Assumptions, makes_pods};
pub use cluster::workload_device;
pub use host_ports::{Room, Unserved};
pub use last_api::LastApi;
pub use local_pods::{LocalPod, LocalPods};
use stages::{OfPods, Translated};

/// A configuration that was read and translated, without what is at fault.
#[derive(Debug)]
pub struct Loaded {
    /// weir.yaml.
    pub config: RouterConfig,
    /// What forwarding is compiled from.
    pub cluster: Arc<weir_dataplane::model::Cluster>,
    /// What service NAT is compiled from.
    pub services: weir_nat::Model,
    /// What policy is compiled from.
    pub policy: Arc<weir_policy::model::Model>,
    /// Where objects come from; the models' `origin` is a number of these.
    pub objects: Arc<Manifests>,
    /// How many objects of each kind were read.
    pub counts: BTreeMap<&'static str, usize>,
    /// Warnings and notes.
    pub notes: Problems,
    /// The files and folders that were read, weir.yaml first: what to watch.
    pub files: Vec<PathBuf>,
    /// Objects whose newest version is faulty, and what stands for them.
    pub faulty: Vec<Faulty>,
    /// What is in force as an earlier run left it.
    pub stale: Option<Stale>,
    /// The texts that are in force, for the next run to begin from ([`crate::sources::keep`]).
    pub in_force: Vec<InForce>,
    /// The namespace of objects that give none.
    pub namespace: String,
    /// What was made up; `None` where nothing may be.
    pub assumed: Option<Assumed>,
    /// The pods that this node's CNI plugin had made.
    pub local_pods: Arc<LocalPods>,
    /// Names of those whose objects are not there yet. They are workloads that no policy lets anything through to or from.
    pub undescribed: BTreeSet<String>,
    /// The FelixConfiguration by which what pods send to their own node is dropped or not; `None`: none is there.
    pub endpoint_to_host_by: Option<u32>,
    host_ports: host_ports::HostPorts,
    /// This node's addresses, as weir.yaml or its Node have them.
    node_addresses: Vec<IpAddr>,
    /// How long it took.
    pub times: LoadTimes,
}

/// What is in force as an earlier run left it, since its sources do not say any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stale {
    /// When that was written down, in seconds since 1970.
    pub since_unix_seconds: u64,
    /// Objects, or texts.
    pub objects: BTreeSet<String>,
}

/// How long a load took.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadTimes {
    /// Reading and parsing the files.
    pub read: Duration,
    /// Translating the objects.
    pub translate: Duration,
}

/// An object whose newest version is faulty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faulty {
    /// Which: kind and name, or the text that cannot be read.
    pub object: String,
    /// Which object, where it is known.
    pub id: Option<ObjectId>,
    /// What stands for it.
    pub substitute: Substitute,
    /// What kind of thing it is.
    pub kind: FaultyKind,
    /// What is wrong, with its place.
    pub problem: String,
}

/// What is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultyKind {
    /// A policy that is enforced: where nothing stands for it, it denies what it selects.
    Policy,
    /// Another object.
    Object,
    /// A document of a text, where nobody knows what it held.
    Document,
}

impl FaultyKind {
    fn of(id: &ObjectId) -> Self {
        if id.is_policy() { Self::Policy } else { Self::Object }
    }
}

impl Faulty {
    /// What became of it, in words that follow its name.
    pub fn outcome(&self) -> &'static str {
        match (self.substitute, self.kind) {
            (Substitute::LastGood, _) => "its last good version stays",
            (Substitute::Nothing, FaultyKind::Policy) => "it denies what it selects",
            (Substitute::Nothing, FaultyKind::Object) => "it is left out",
            (Substitute::Nothing, FaultyKind::Document) => "the document is left out",
        }
    }
}

impl Loaded {
    /// The ports that workloads publish, named or not, by workload.
    pub fn published_ports(&self) -> BTreeMap<String, BTreeSet<(Protocol, u16)>> {
        ports::published(&self.objects)
    }

    /// Puts the addresses that devices have now beside those of the Node, unless weir.yaml gives them with `localAddresses`.
    pub fn add_local_addresses(&mut self, addresses: &[IpAddr]) {
        if self.config.local_addresses.is_none() {
            let known = &mut self.services.local_addresses;
            known.clone_from(&self.node_addresses);
            for address in addresses {
                if !known.contains(address) {
                    known.push(*address);
                }
            }
        }
    }
}

/// Reads weir.yaml and its manifests and translates them; see [`Loader::load`].
///
/// # Errors
/// As there.
pub fn load(path: &Path) -> Result<(Loaded, Option<Problems>), Problems> {
    Loader::new(path).load()
}

/// As [`load`], but no object may be at fault.
///
/// # Errors
/// All problems, warnings and notes included, where at least one is an error.
pub fn load_strictly(path: &Path) -> Result<Loaded, Problems> {
    Loader::new(path).load_strictly()
}

/// What stands for a weir.yaml where a running cluster is looked at from outside.
const NO_NODE: &str = "nodeName: this-node\nmanifests: []\n";

/// Loads a configuration, at first and again and again; what did not change is taken as it was.
#[derive(Debug)]
pub struct Loader {
    path: PathBuf,
    library: Library,
    /// Whether what is valid is looked through for what is probably not meant so.
    reviews: bool,
    kept: Kept,
    local_pods: Arc<LocalPods>,
    live: LiveObjects,
    /// Whether they are there instead of the manifests.
    only_live: bool,
    assumes_pods: bool,
    /// What is laid over all objects.
    overlay: Option<Overlay>,
    /// What was read for the last load that succeeded.
    read: Option<Read>,
    /// The objects that an earlier run had in force, until the start.
    beginning: Manifests,
    /// Of these, what is in force yet.
    stale: Option<Stale>,
    revisit: Revisit,
}

/// Objects that take the place of those with their names, or that go.
#[derive(Debug)]
struct Overlay {
    paths: Vec<PathBuf>,
    deletes: bool,
    library: Library,
}

/// What the load before has left.
#[derive(Debug, Default)]
struct Kept {
    chunks: Chunks,
    stages: stages::Kept,
}

/// What was read: weir.yaml and the texts of the manifests, with the problems of reading.
#[derive(Debug)]
struct Read {
    config: Arc<RouterConfig>,
    texts: Texts,
    /// The texts of what is laid over them.
    overlay: Texts,
    problems: Problems,
    took: Duration,
}

impl Read {
    /// With the times of a load that is done.
    fn timed(&self, loaded: Loaded, begin: Instant) -> Loaded {
        Loaded { times: LoadTimes { read: self.took, translate: begin.elapsed() }, ..loaded }
    }
}

impl Loader {
    /// For the weir.yaml at `path`.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            library: Library::default(),
            reviews: false,
            kept: Kept::default(),
            local_pods: Arc::default(),
            live: Arc::default(),
            only_live: false,
            assumes_pods: false,
            overlay: None,
            read: None,
            beginning: Manifests::default(),
            stale: None,
            revisit: Revisit::default(),
        }
    }

    /// Tells `revisit`, a watch's, what is to be looked at again, and is told by it what to believe.
    pub fn follow(&mut self, revisit: Revisit) {
        self.revisit = revisit;
    }

    /// Takes the texts that an earlier run had in force as those of before, for [`Loader::start`].
    pub fn begin_from(&mut self, kept: KeptTexts) {
        // They were good, and what is wrong with their files now is told by the load.
        let mut problems = Problems::default();
        problems.add_source(Source::new("", String::new()));
        let texts = self.library.remember(kept.texts, &mut problems);
        self.beginning = Manifests::of(texts.pieces(), &BTreeMap::new(), &mut Chunks::default(), &mut problems);
        self.stale = Some(Stale { since_unix_seconds: kept.since_unix_seconds, objects: BTreeSet::new() });
    }

    /// Takes what default/kubernetes had in an earlier run as what it had last.
    pub fn begin_from_api(&mut self, api: LastApi) {
        self.kept.stages.services.api = api;
    }

    /// The first load of a router: as [`Loader::reload`], after what [`Loader::begin_from`] was given.
    ///
    /// # Errors
    /// As there.
    pub fn start(&mut self) -> Result<(Loaded, Option<Problems>), Problems> {
        let previous = std::mem::take(&mut self.beginning);
        let mut outcome = self.reload(&previous);
        if let (Ok((loaded, _)), Some(stale)) = (&mut outcome, &mut self.stale) {
            let last_good = loaded.faulty.iter().filter(|faulty| faulty.substitute == Substitute::LastGood);
            stale.objects = last_good.map(|faulty| faulty.object.clone()).collect();
            loaded.stale = Some(stale.clone()).filter(|stale| !stale.objects.is_empty());
        }
        outcome
    }

    /// For the weir.yaml at `path`, or, where pods are assumed, manifests there, with what is to be taken for given.
    pub fn assuming(path: &Path, assumptions: &Assumptions) -> Self {
        let namespace = assumptions.namespace.as_deref();
        let library = namespace.map_or_else(Library::default, Library::in_namespace);
        Self { library, assumes_pods: assumptions.pods, ..Self::new(path) }
    }

    /// The pods that this node's CNI plugin has made, for the loads from now on.
    pub fn set_local_pods(&mut self, pods: Arc<LocalPods>) {
        self.local_pods = pods;
    }

    /// The objects of a running cluster, for the loads from now on. They were read by a [`live::Reader`](crate::resources::live::Reader) with
    /// [`Loader::identities`].
    pub fn set_live(&mut self, objects: LiveObjects) {
        self.live = objects;
    }

    /// Takes the objects of a running cluster instead of the manifests. Without a weir.yaml, a node is made up that has none of the pods.
    pub fn set_only_live(&mut self, objects: LiveObjects) {
        (self.live, self.only_live) = (objects, true);
    }

    /// From now on the objects of these files and folders take the place of those with their names, or, where they are to be `deleted`, these
    /// go. [`Loader::reload`] treats them as a router does that reads them for the first time.
    pub fn lay_over(&mut self, paths: Vec<PathBuf>, deletes: bool) {
        self.overlay = Some(Overlay { paths, deletes, library: self.library.afresh() });
    }

    /// The objects that are laid over others, as they were read for the last load.
    pub fn laid_over(&self) -> impl Iterator<Item = &ObjectId> {
        self.read.iter().flat_map(|read| read.overlay.pieces()).flat_map(|(_, pieces)| pieces.ids())
    }

    /// Looks from now on for what is valid and probably not meant so.
    pub fn review(&mut self) {
        self.reviews = true;
    }

    /// What numbers the objects.
    pub fn identities(&self) -> &Identities {
        self.library.identities()
    }

    /// From now on for another weir.yaml, of the same cluster.
    pub fn set_path(&mut self, path: &Path) {
        path.clone_into(&mut self.path);
    }

    /// One that has loaded nothing yet, with the numbers of this one's objects.
    pub fn afresh(&self) -> Self {
        Self { library: self.library.afresh(), local_pods: Arc::clone(&self.local_pods), ..Self::new(&self.path) }
    }

    /// Forgets all that earlier loads have left, but what they had of the API server: the next one reads and translates everything from nothing.
    pub fn forget(&mut self) {
        let api = std::mem::take(&mut self.kept.stages.services.api);
        (self.library, self.kept, self.read) = (self.library.afresh(), Kept::default(), None);
        self.begin_from_api(api);
    }

    /// Reads and translates everything, as a [`Loader::reload`] from nothing: an object at fault is left out, so that a policy denies what
    /// it selects, and the rest proceeds.
    ///
    /// # Errors
    /// As there.
    pub fn load(&mut self) -> Result<(Loaded, Option<Problems>), Problems> {
        self.reload(&Manifests::default())
    }

    /// Reads and translates everything; no object may be at fault.
    ///
    /// # Errors
    /// All problems, warnings and notes included, where at least one is an error.
    pub fn load_strictly(&mut self) -> Result<Loaded, Problems> {
        let read = self.read()?;
        let begin = Instant::now();
        let loaded = self.attempt(&read, None).map_err(|failed| failed.problems)?;
        let loaded = self.finished(&read, loaded, begin, &BTreeSet::new());
        self.read = Some(read);
        Ok(loaded)
    }

    /// Reads and translates everything. An object at fault does not stop the rest: its last good version stands for it, or, where there is
    /// none, nothing, so that a policy denies what it selects. [`Loaded::faulty`] names what is at fault; all problems come with it, to be
    /// shown. `previous` is what is in force, loaded by this loader.
    ///
    /// # Errors
    /// All problems, where one is not an object's but of weir.yaml itself.
    pub fn reload(&mut self, previous: &Manifests) -> Result<(Loaded, Option<Problems>), Problems> {
        let read = self.read()?;
        let outcome = self.translate_again(&read, previous);
        if outcome.is_ok() {
            self.read = Some(read);
        }
        outcome
    }

    /// As [`Loader::reload`], but without a look at the files: with what the last load that succeeded has read. What changed is
    /// [`Loader::set_local_pods`].
    ///
    /// # Errors
    /// As there.
    pub fn reload_local_pods(&mut self, previous: &Manifests) -> Result<(Loaded, Option<Problems>), Problems> {
        let Some(mut read) = self.read.take() else { return self.reload(previous) };
        read.took = Duration::ZERO;
        let outcome = self.translate_again(&read, previous);
        self.read = Some(read);
        outcome
    }

    fn translate_again(&mut self, read: &Read, previous: &Manifests) -> Result<(Loaded, Option<Problems>), Problems> {
        let begin = Instant::now();
        let all = match self.attempt(read, None) {
            Ok(loaded) => {
                let loaded = self.finished(read, loaded, begin, &BTreeSet::new());
                // What is not as its file says is told as a fault is.
                let told = (!read.texts.held.is_empty()).then(|| read.problems.clone());
                return Ok((loaded, told));
            }
            Err(failed) => failed.problems,
        };
        let faulty_texts = all.of(Severity::Error).map(|error| error.span.file).collect();
        let good: HashSet<&ObjectId> = previous.good().map(|(id, _)| id).collect();
        let mut faulty: BTreeMap<ObjectId, (Substitute, String)> = BTreeMap::new();
        // Each round substitutes for an object that the one before did not, or takes a substitute out, so there is a last one.
        loop {
            let substitutes = faulty.iter().map(|(id, (substitute, _))| (id.clone(), *substitute)).collect();
            let Failed { problems, manifests } = match self.attempt(read, Some((&substitutes, previous))) {
                Ok(mut loaded) => {
                    let named = faulty.into_iter().map(|(id, (substitute, problem))| Faulty {
                        object: id.to_string(),
                        substitute,
                        kind: FaultyKind::of(&id),
                        id: Some(id),
                        problem,
                    });
                    loaded.faulty.extend(named);
                    return Ok((self.finished(read, loaded, begin, &faulty_texts), Some(all)));
                }
                Err(failed) => *failed,
            };
            for error in problems.of(Severity::Error) {
                let Some(id) = manifests.at(error.span) else { continue };
                let substitute = match substitutes.get(id) {
                    None if good.contains(id) => Substitute::LastGood,
                    _ => Substitute::Nothing,
                };
                if substitutes.get(id) != Some(&substitute) {
                    faulty.insert(id.clone(), (substitute, problems.line(error)));
                }
            }
            if faulty.iter().all(|(id, (substitute, _))| substitutes.get(id) == Some(substitute)) {
                return Err(all);
            }
        }
    }

    /// A load with what is known of its texts.
    fn finished(&mut self, read: &Read, mut loaded: Loaded, begin: Instant, faulty_texts: &BTreeSet<u32>) -> Loaded {
        let held = read.texts.held.iter().map(|Held { path, has_text, problem }| Faulty {
            object: path.display().to_string(),
            id: None,
            substitute: if *has_text { Substitute::LastGood } else { Substitute::Nothing },
            kind: FaultyKind::Document,
            problem: problem.clone(),
        });
        loaded.faulty.extend(held);
        loaded.in_force = read.texts.in_force(faulty_texts);
        if let Some(stale) = &mut self.stale {
            let last_good = loaded.faulty.iter().filter(|faulty| faulty.substitute == Substitute::LastGood);
            let last_good: BTreeSet<&String> = last_good.map(|faulty| &faulty.object).collect();
            stale.objects.retain(|object| last_good.contains(object));
            loaded.stale = Some(stale.clone()).filter(|stale| !stale.objects.is_empty());
        }
        read.timed(loaded, begin)
    }

    fn read(&mut self) -> Result<Read, Problems> {
        let begin = Instant::now();
        let mut problems = Problems::default();
        let believes = self.revisit.takes_belief();
        let made_up = match (self.assumes_pods, self.only_live && !self.path.exists()) {
            (true, _) => assume::configuration(&self.path),
            (false, true) => Some(Source::new("weir.yaml, made up by --kubernetes", NO_NODE.to_owned())),
            (false, false) => None,
        };
        // What is no weir.yaml is a manifest, though it lies at its path.
        let no_path = Path::new("");
        let (path, config) = match made_up {
            Some(source) => {
                let file = problems.add_source(source);
                (no_path, RouterConfig::from_source(file, no_path, &mut problems))
            }
            None => (self.path.as_path(), RouterConfig::read(&self.path, &mut problems)),
        };
        let Some((config, spans)) = config else {
            let written = if is_written(&self.path) { vec![self.path.clone()] } else { Vec::new() };
            self.revisit.set(Awaited { written, at: None });
            problems.sort();
            return Err(problems);
        };
        let manifests: &[PathBuf] = if self.only_live { &[] } else { &config.manifests };
        let texts = self.library.read(manifests, &spans, path, believes, &mut problems);
        self.revisit.set(texts.awaited.clone());
        let overlay = self
            .overlay
            .as_mut()
            .map(|overlay| overlay.library.read(&overlay.paths, &[], no_path, believes, &mut problems));
        let overlay = overlay.unwrap_or_default();
        Ok(Read { config: Arc::new(config), texts, overlay, problems, took: begin.elapsed() })
    }

    /// Translates what was read. At a reload with the given substitutes, and with last good versions of what a text that cannot be read
    /// has lost.
    fn attempt(
        &mut self,
        read: &Read,
        reload: Option<(&BTreeMap<ObjectId, Substitute>, &Manifests)>,
    ) -> Result<Loaded, Box<Failed>> {
        let mut problems = read.problems.clone();
        let none = BTreeMap::new();
        let substitutes = reload.map_or(&none, |(substitutes, _)| substitutes);
        let live: Vec<_> =
            self.live.iter().map(|pieces| (problems.share_source(Arc::clone(pieces.source())), pieces)).collect();
        let all = read.texts.pieces().chain(live.iter().copied());
        let mut manifests = match &self.overlay {
            None => Manifests::of(all, substitutes, &mut self.kept.chunks, &mut problems),
            Some(overlay) => {
                let ids: HashSet<&ObjectId> = read.overlay.pieces().flat_map(|(_, pieces)| pieces.ids()).collect();
                let below = all.map(|(file, pieces)| {
                    let left = pieces.without(|id| ids.contains(id)).map(Arc::new);
                    (file, left.unwrap_or_else(|| Arc::clone(pieces)))
                });
                let over = read.overlay.pieces().filter(|_| !overlay.deletes);
                let all: Vec<_> = below.chain(over.map(|(file, pieces)| (file, Arc::clone(pieces)))).collect();
                let all = all.iter().map(|(file, pieces)| (*file, pieces));
                Manifests::of(all, substitutes, &mut self.kept.chunks, &mut problems)
            }
        };
        let mut faulty = Vec::new();
        if let Some((substitutes, previous)) = reload {
            let last_good = substitutes.iter().filter(|(_, substitute)| **substitute == Substitute::LastGood);
            let mut wanted: BTreeSet<ObjectId> = last_good.map(|(id, _)| id.clone()).collect();
            // An error outside of every object: the text may have lost any that it held.
            let unreadable = problems.take_errors(|error| error.span.file != 0 && manifests.at(error.span).is_none());
            let mentioned = manifests.mentioned();
            for error in unreadable {
                let name = problems.source(error.span.file).name();
                let problem = problems.line(&error);
                let of_text = previous.good().filter(|(_, text)| *text == name).map(|(id, _)| id);
                let lost: Vec<&ObjectId> =
                    of_text.filter(|id| !mentioned.contains(id) && !wanted.contains(id)).collect();
                if lost.is_empty() {
                    let object = name.to_owned();
                    faulty.push(Faulty {
                        object,
                        id: None,
                        substitute: Substitute::Nothing,
                        kind: FaultyKind::Document,
                        problem,
                    });
                    continue;
                }
                for id in lost {
                    faulty.push(Faulty {
                        object: id.to_string(),
                        id: Some(id.clone()),
                        substitute: Substitute::LastGood,
                        kind: FaultyKind::of(id),
                        problem: problem.clone(),
                    });
                    wanted.insert(id.clone());
                }
            }
            manifests.add_last_good(previous, &wanted, &mut problems);
        }
        let config = Arc::clone(&read.config);
        let assumed = self.assumes_pods.then(|| {
            let identities = self.library.identities();
            assume::assume(read.texts.sources(), &config, identities, substitutes, &mut manifests, &mut problems)
        });
        let pods = &self.local_pods;
        let files = std::iter::once(&self.path).chain(&read.texts.files).cloned().collect();
        let manifests = Arc::new(manifests);
        match translate(config, &manifests, pods, &mut self.kept, self.reviews, problems) {
            Ok(loaded) => {
                let namespace = self.library.identities().namespace().to_owned();
                Ok(Loaded { faulty, files, assumed, namespace, ..loaded })
            }
            Err(problems) => Err(Box::new(Failed { problems, manifests })),
        }
    }
}

/// An attempt that found errors.
struct Failed {
    problems: Problems,
    /// What was read.
    manifests: Arc<Manifests>,
}

fn translate(
    config: Arc<RouterConfig>,
    manifests: &Arc<Manifests>,
    local_pods: &Arc<LocalPods>,
    kept: &mut Kept,
    reviews: bool,
    mut problems: Problems,
) -> Result<Loaded, Problems> {
    let Translated { of_pods, services, host_ports } =
        stages::translate(&config, manifests, local_pods, &mut kept.stages, &mut problems);
    let OfPods { cluster, policy, endpoint_to_host_by, undescribed, .. } = of_pods;
    let node_addresses = services.local_addresses.clone();
    if reviews {
        review::review(&config, manifests, &cluster, &mut problems);
        policy::lint(manifests, &policy, &mut problems);
    }
    problems.forget_trees();
    problems.sort();
    if problems.has_errors() {
        return Err(problems);
    }
    debug_assert!(problems.of(Severity::Error).next().is_none());
    let objects = Arc::clone(manifests);
    Ok(Loaded {
        config: RouterConfig::clone(&config),
        cluster,
        services,
        policy,
        counts: objects.counts(),
        objects,
        notes: problems,
        files: Vec::new(),
        faulty: Vec::new(),
        stale: None,
        in_force: Vec::new(),
        assumed: None,
        namespace: String::new(),
        local_pods: Arc::clone(local_pods),
        undescribed,
        endpoint_to_host_by,
        host_ports,
        node_addresses,
        times: LoadTimes::default(),
    })
}
