//! All kinds of one cluster.

use std::{
    cell::{OnceCell, RefCell},
    collections::{BTreeMap, BTreeSet},
    hash::Hasher as _,
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc as std_mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::{AbortHandle, LocalSet, spawn_local},
    time::sleep,
};
use tracing::warn;
use weir_cluster::resources::{
    Identities,
    live::{Fnv, LiveObjects, Reader},
};

use crate::{
    compare::{Unlike, compare},
    dial::{Access, Dial, Failure},
    keep::Folder,
    resource::{self, CLUSTER_INFORMATION, Key, OPTIONAL, Resource},
    speak::{self, Speaker},
    watch::{MOST_TRIGGERS, Shared, Watched, random},
    wire::{Groups, Resources},
};

/// Objects are read on this thread, as of [`weir_cluster::text::tree::on_reader_thread`].
const STACK_BYTES: usize = 16 << 20;
/// How often it is looked which groups there are.
const DISCOVERY: Duration = Duration::from_secs(60);
/// How often it is told when the server last said something.
const REFRESH: Duration = Duration::from_secs(1);
/// How long a kind that comes later is waited for with what changes meanwhile.
const GRACE: Duration = Duration::from_secs(10);
/// Changes that come closer than this are handed on together.
const TOGETHER: Duration = Duration::from_millis(5);

/// What is known of a cluster.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Its objects, as of the last change after every kind had its first list; before, those that were kept, if any.
    pub objects: Option<LiveObjects>,
    /// Since when they are as they were kept, where that is so.
    pub kept_since: Option<SystemTime>,
    /// Each kind.
    pub kinds: Vec<KindState>,
    /// Why there is nothing to follow; `None` where there is.
    pub failure: Option<String>,
    /// Whether Calico's ClusterInformation says that its datastore is not ready, so that the objects stay as they were.
    pub is_frozen: bool,
    /// The address that is asked.
    pub address: String,
}

/// One kind.
#[derive(Clone, Debug)]
pub struct KindState {
    /// "GROUP/PLURAL", or what part of these it is.
    pub name: String,
    /// How many objects there are.
    pub count: usize,
    /// Whether there was a whole list.
    pub is_whole: bool,
    /// Whether the server is behind what was seen.
    pub is_behind: bool,
    /// When the server last said something of it.
    pub last_word: Option<Instant>,
    /// What went wrong last.
    pub failure: Option<String>,
}

#[derive(Default)]
struct Cell {
    state: Mutex<State>,
    /// When the cluster saw what has changed of slices in the objects, until somebody takes it.
    triggers: Mutex<Vec<SystemTime>>,
    changed: Condvar,
}

impl Cell {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is asked of the thread that follows.
#[derive(Debug)]
enum Ask {
    /// What is followed is compared with what is listed afresh.
    Compare(std_mpsc::Sender<Result<Vec<Unlike>, String>>),
    /// All is listed anew, and takes the place of what is followed.
    Anew,
}

/// Asks for fresh lists.
#[derive(Clone, Debug)]
pub struct Lister(mpsc::UnboundedSender<Ask>);

impl Lister {
    /// Has everything listed afresh, and compares what is followed with that. Waits for it.
    ///
    /// # Errors
    /// Where something cannot be listed, or not in time.
    pub fn compare(&self, patience: Duration) -> Result<Vec<Unlike>, String> {
        let (answer, answered) = std_mpsc::channel();
        self.0.send(Ask::Compare(answer)).map_err(|_| "nobody follows the cluster".to_owned())?;
        let why = |_| format!("the cluster's lists did not come within {} s", patience.as_secs());
        answered.recv_timeout(patience).map_err(why)?
    }

    /// Has everything listed afresh, and believed whatever was followed before.
    pub fn follow_anew(&self) {
        // Where nobody follows, nothing is followed wrongly.
        let _ = self.0.send(Ask::Anew);
    }
}

/// When a node begins to ask after its start, by its name, so that a thousand that start at once do not ask at once.
pub fn start_delay(node: &str) -> Duration {
    let mut hasher = Fnv::default();
    hasher.write(node.as_bytes());
    Duration::from_millis((hasher.finish() >> 32) % 2000)
}

/// How a cluster is followed.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How long to wait before the first question.
    pub delay: Duration,
    /// Where its objects are kept; those that are there count until the cluster has answered. `None`: it is only looked at.
    pub folder: Option<PathBuf>,
    /// Services are those that a label gives to the proxy of that name, or to none.
    pub proxy_name: Option<String>,
    /// For whom things are said there; `None`: it is only read.
    pub speaks: Option<speak::Settings>,
}

/// A cluster that is followed until this is dropped.
pub struct Source {
    cell: Arc<Cell>,
    changes: watch::Receiver<()>,
    speaker: Option<Arc<Speaker>>,
    asks: mpsc::UnboundedSender<Ask>,
    /// Dropped, it ends the thread.
    end: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.end = None;
        // It gives a lease back, which has a time of its own; else nobody waits for it.
        let has_lease = self.speaker.as_ref().is_some_and(|speaker| speaker.has_lease());
        if let Some(thread) = self.thread.take().filter(|_| has_lease) {
            drop(thread.join());
        }
    }
}

impl Source {
    /// Begins to follow a cluster.
    ///
    /// # Errors
    /// Where there is no thread for it.
    pub fn start(access: Access, identities: &Identities, settings: Settings) -> std::io::Result<Self> {
        let cell = Arc::new(Cell::default());
        let (tell, changes) = watch::channel(());
        let (end, ended) = oneshot::channel();
        let (asks, asked) = mpsc::unbounded_channel();
        let (reader, own) = (Reader::new(identities), Arc::clone(&cell));
        let speaker = settings.speaks.clone().map(Speaker::new);
        let own_speaker = speaker.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || {
            let local = LocalSet::new();
            let shared = OnceCell::new();
            local.block_on(&runtime, async {
                tokio::select! {
                    () = follow(access, reader, own, tell, settings, own_speaker.clone(), asked, &shared) => {}
                    _ = ended => {}
                }
                if let (Some(speaker), Some(shared)) = (own_speaker, shared.get()) {
                    speaker.end(shared).await;
                }
            });
        };
        let thread = thread::Builder::new().name("kubernetes".to_owned()).stack_size(STACK_BYTES).spawn(run)?;
        Ok(Self { cell, changes, speaker, asks, end: Some(end), thread: Some(thread) })
    }

    /// Who says things there.
    pub fn speaker(&self) -> Option<&Arc<Speaker>> {
        self.speaker.as_ref()
    }

    /// What asks for fresh lists.
    pub fn lister(&self) -> Lister {
        Lister(self.asks.clone())
    }

    /// Tells of changes of [`State::objects`].
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.clone()
    }

    /// When the cluster saw what has changed of slices since this was asked last, for who asks for the objects next.
    pub fn take_triggers(&self) -> Vec<SystemTime> {
        std::mem::take(&mut *self.cell.triggers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The objects that the cluster itself has told.
    pub fn fresh(&self) -> Option<LiveObjects> {
        let state = self.cell.lock();
        state.objects.clone().filter(|_| state.kept_since.is_none())
    }

    /// What is known now.
    pub fn state(&self) -> State {
        self.cell.lock().clone()
    }

    /// The objects, if every kind had its first list or is known from a run before.
    pub fn objects(&self) -> Option<LiveObjects> {
        self.cell.lock().objects.clone()
    }

    /// The objects, once every kind had its first list.
    ///
    /// # Errors
    /// What is wrong, where that is not so in time.
    pub fn wait(&self, patience: Duration) -> Result<LiveObjects, String> {
        let until = Instant::now() + patience;
        let mut state = self.cell.lock();
        loop {
            if let Some(objects) = state.objects.as_ref().filter(|_| state.kept_since.is_none()) {
                return Ok(Arc::clone(objects));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(state.missing());
            }
            let waited = self.cell.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.is_hopeless() {
                return Err(state.missing());
            }
        }
    }
}

impl State {
    /// Whether waiting changes nothing.
    fn is_hopeless(&self) -> bool {
        self.kinds.is_empty() && self.failure.as_ref().is_some_and(|why| why.starts_with(CONFIGURATION))
    }

    /// Why there are no objects.
    pub fn missing(&self) -> String {
        if let Some(failure) = &self.failure {
            return failure.clone();
        }
        if self.is_frozen {
            return "Calico's ClusterInformation has datastoreReady: false: its objects are not to be believed yet"
                .to_owned();
        }
        let waits = self.kinds.iter().filter(|kind| !kind.is_whole);
        let waits: Vec<String> =
            waits.map(|kind| format!("{}: {}", kind.name, kind.failure.as_deref().unwrap_or("no list yet"))).collect();
        if waits.is_empty() { format!("{} has not answered yet", self.address) } else { waits.join("\n") }
    }
}

const CONFIGURATION: &str = "kubernetes: ";

/// What is watched.
type Kinds = BTreeMap<Key, (Rc<Watched>, AbortHandle)>;

#[expect(clippy::too_many_arguments, reason = "each is given at the start and lives as long as the thread")]
async fn follow(
    access: Access,
    reader: Reader,
    cell: Arc<Cell>,
    tell: watch::Sender<()>,
    settings: Settings,
    speaker: Option<Arc<Speaker>>,
    mut asks: mpsc::UnboundedReceiver<Ask>,
    for_the_end: &OnceCell<Rc<Shared>>,
) {
    let Settings { delay, folder, proxy_name, .. } = settings;
    let always = resource::always(proxy_name.as_deref());
    // Who only looks at a cluster has nothing that could stay.
    let may_freeze = folder.is_some();
    let folder = folder.and_then(|path| {
        let opened = Folder::open(&path);
        opened.map_err(|error| warn!("the cluster's objects are not kept in {}: {error}", path.display())).ok()
    });
    let known = folder.as_ref().map_or_else(Vec::new, |folder| read_kept(folder, always.clone(), &reader));
    if let Some(oldest) = known.iter().map(|(_, written)| *written).min() {
        let mut state = cell.lock();
        state.objects =
            Some(known.iter().flat_map(|(watched, _)| watched.follow.borrow_mut().set().pieces()).collect());
        state.kept_since = Some(oldest);
        drop(state);
        tell.send_replace(());
    }
    sleep(delay).await;
    let dial = loop {
        match Dial::new(&access).await {
            Ok(dial) => break dial,
            Err(failure) => {
                cell.lock().failure = Some(format!("{CONFIGURATION}{failure}"));
                cell.changed.notify_all();
                sleep(Duration::from_secs(5)).await;
            }
        }
    };
    let shared = Rc::new(Shared { dial, reader, folder, changed: Notify::new(), triggers: RefCell::default() });
    drop(for_the_end.set(Rc::clone(&shared)));
    if let Some(speaker) = &speaker {
        speaker.begin(&shared);
    }
    let mut kinds = Kinds::new();
    let mut has_discovered = false;
    let mut look_at = Instant::now();
    let mut was_frozen = false;
    let mut published: Option<(Vec<Key>, u64)> = None;
    known.into_iter().for_each(|(watched, _)| begin_with(watched, &shared, &mut kinds));
    always.into_iter().for_each(|resource| begin(resource, &shared, &mut kinds));
    loop {
        if Instant::now() >= look_at {
            let outcome = discover(&shared.dial, &kinds).await;
            let failure = outcome.as_ref().err().map(Failure::to_string);
            has_discovered |= outcome.is_ok();
            if let Ok(resources) = outcome {
                settle(resources, &shared, &mut kinds).await;
            }
            for (watched, _) in kinds.values() {
                speaker.iter().for_each(|speaker| speaker.saw_resource(&watched.resource));
            }
            let pause = if has_discovered { DISCOVERY } else { Duration::from_millis(800) };
            look_at = Instant::now() + pause.mul_f64(0.8 + 0.4 * random());
            cell.lock().failure = failure.filter(|_| !has_discovered);
        }
        if kinds.values().any(|(watched, _)| watched.names_accounts.get()) {
            begin(resource::service_accounts(), &shared, &mut kinds);
        }
        if kinds.values().any(|(watched, _)| watched.names_services.get()) {
            begin(resource::headless_slices(), &shared, &mut kinds);
        }
        if let Some((slices, _)) = kinds.get(&("discovery.k8s.io", "endpointslices")) {
            shared.dial.learn(&own_endpoints(slices));
        }
        let in_use: Vec<&Rc<Watched>> = in_use(&kinds).collect();
        if let (Some(speaker), Some((nodes, _))) = (&speaker, kinds.get(&("", "nodes"))) {
            speaker.saw_node(nodes.follow.borrow_mut().set().node(speaker.node_name()));
        }
        // What comes later is waited for as well, but does not hold up all else if it cannot be had.
        let may_lack = |watched: &Watched| published.is_some() && watched.begun.elapsed() > GRACE;
        let is_whole =
            has_discovered && in_use.iter().all(|watched| watched.follow.borrow().is_whole() || may_lack(watched));
        let is_frozen = may_freeze && in_use.iter().any(|watched| says_not_ready(watched));
        // What is counted of each only grows, as long as the kinds are the same.
        let changes = in_use.iter().map(|watched| watched.follow.borrow().changes()).sum();
        let now: (Vec<Key>, u64) = (in_use.iter().map(|watched| watched.resource.key()).collect(), changes);
        let objects: Option<LiveObjects> = (is_whole && !is_frozen && published.as_ref() != Some(&now)).then(|| {
            published = Some(now);
            in_use.iter().flat_map(|watched| watched.follow.borrow_mut().set().pieces()).collect()
        });
        if let Some(folder) = shared.folder.as_ref().filter(|_| is_frozen || is_whole) {
            folder.judge(!is_frozen);
        }
        // Then it may be that they move, and where to is looked at without waiting.
        if std::mem::replace(&mut was_frozen, is_frozen) != is_frozen {
            look_at = Instant::now();
        }
        let has_changed = objects.is_some();
        {
            let mut state = cell.lock();
            if let Some(objects) = objects {
                (state.objects, state.kept_since) = (Some(objects), None);
                let mut own = cell.triggers.lock().unwrap_or_else(PoisonError::into_inner);
                own.append(&mut shared.triggers.borrow_mut());
                // Nobody takes them: they are not measured.
                if own.len() > MOST_TRIGGERS {
                    own.clear();
                }
            }
            state.is_frozen = is_frozen;
            state.kinds = kinds.values().map(|(watched, _)| kind_state(watched)).collect();
            state.address = shared.dial.address();
            cell.changed.notify_all();
        }
        if has_changed {
            tell.send_replace(());
        }
        sleep(TOGETHER).await;
        tokio::select! {
            () = shared.changed.notified() => {}
            () = sleep(look_at.saturating_duration_since(Instant::now()).min(REFRESH)) => {}
            Some(ask) = asks.recv() => match ask {
                Ask::Compare(answer) => {
                    let (kinds, shared) = (self::in_use(&kinds).map(Rc::clone).collect(), Rc::clone(&shared));
                    // Who asked may have gone.
                    spawn_local(async move { drop(answer.send(compare(kinds, shared).await)) });
                }
                Ask::Anew => kinds.values_mut().for_each(|(watched, task)| {
                    task.abort();
                    watched.follow.borrow_mut().forget_version();
                    *task = spawn_local(Rc::clone(watched).run(Rc::clone(&shared))).abort_handle();
                }),
            }
        }
    }
}

/// What counts of what is watched. Where Calico's objects are in two groups, as while they are moved, those of the one that was there before
/// count until the other was listed whole and is ready.
fn in_use(kinds: &Kinds) -> impl Iterator<Item = &Rc<Watched>> {
    let of = |group: &'static str| {
        let of_group = kinds.iter().filter(move |((of, _), _)| *of == group);
        of_group.map(|(_, (watched, _))| watched)
    };
    let pairs = OPTIONAL.iter().filter_map(|optional| Some((optional.unless?, optional.group)));
    let passed_over: Vec<&str> = pairs
        .filter_map(|(before, after)| {
            let has_moved = of(after).all(|watched| watched.follow.borrow().is_whole() && !says_not_ready(watched));
            let are_both = of(before).next().is_some() && of(after).next().is_some();
            are_both.then_some(if has_moved { before } else { after })
        })
        .collect();
    let counts = move |watched: &&Rc<Watched>| !passed_over.contains(&watched.resource.group);
    kinds.values().map(|(watched, _)| watched).filter(counts)
}

/// Whether this is what says that Calico's datastore is not ready.
fn says_not_ready(watched: &Watched) -> bool {
    watched.resource.kind == CLUSTER_INFORMATION && watched.follow.borrow_mut().set().says_not_ready()
}

fn begin(resource: Resource, shared: &Rc<Shared>, kinds: &mut Kinds) {
    if !kinds.contains_key(&resource.key()) {
        begin_with(Watched::new(resource, &shared.reader), shared, kinds);
    }
}

fn begin_with(watched: Watched, shared: &Rc<Shared>, kinds: &mut Kinds) {
    let key = watched.resource.key();
    watched.journal.replace(shared.folder.as_ref().map(|folder| folder.journal(&watched.resource)));
    let watched = Rc::new(watched);
    let task = spawn_local(Rc::clone(&watched).run(Rc::clone(shared)));
    kinds.insert(key, (watched, task.abort_handle()));
}

/// What a run before has kept, if it is all that every cluster has, with when each was written.
fn read_kept(folder: &Folder, always: Vec<Resource>, reader: &Reader) -> Vec<(Watched, SystemTime)> {
    let optional = OPTIONAL.iter().flat_map(|optional| {
        let of_version = |version: &'static &str| {
            optional.resources.iter().map(|(plural, kind)| optional.resource(version, plural, kind))
        };
        optional.versions.iter().flat_map(of_version)
    });
    let needed = always.len();
    let later = [resource::service_accounts(), resource::headless_slices()];
    let mut known = Vec::new();
    for (index, resource) in always.into_iter().chain(optional).chain(later).enumerate() {
        let written = folder.written(&resource);
        let watched = Watched::new(resource, reader);
        match written.ok_or(None).and_then(|written| folder.read(&watched, reader).map(|()| written).map_err(Some)) {
            Ok(written) => known.push((watched, written)),
            Err(error) => {
                if let Some(error) = error {
                    warn!("what was kept of {} cannot be read: {error}", watched.resource.plural);
                }
                // Half of what was in force is not what was in force.
                if index < needed {
                    return Vec::new();
                }
            }
        }
    }
    // A run that ended while objects moved has kept both, and the list of where they moved to is whole.
    let are_kept: BTreeSet<&str> = known.iter().map(|(watched, _)| watched.resource.group).collect();
    let moved: Vec<&str> =
        OPTIONAL.iter().filter(|one| are_kept.contains(one.group)).filter_map(|one| one.unless).collect();
    known.retain(|(watched, _)| !moved.contains(&watched.resource.group));
    known
}

/// Begins to follow what has come, and lets go of what is not served any more: where its own path says so too, as a group whose server is only down
/// is not listed either, and its policies are in force still. What has moved to another group goes once it counts there.
async fn settle(resources: Vec<Resource>, shared: &Rc<Shared>, kinds: &mut Kinds) {
    let served: BTreeMap<Key, &str> = resources.iter().map(|one| (one.key(), one.version.as_str())).collect();
    let are_served = |group: &str| served.keys().any(|(of, _)| *of == group);
    let mut gone: Vec<Key> = Vec::new();
    let counting: BTreeSet<Key> = in_use(kinds).map(|watched| watched.resource.key()).collect();
    for (key, (watched, _)) in &*kinds {
        let Some(optional) = OPTIONAL.iter().find(|optional| optional.has(&watched.resource)) else { continue };
        if served.get(key).is_some_and(|version| *version == watched.resource.version) {
            continue;
        }
        let has_moved_back = optional.unless.is_some_and(are_served);
        let moves = OPTIONAL.iter().any(|other| other.unless == Some(key.0) && are_served(other.group));
        if has_moved_back {
            gone.push(*key);
        } else if !(moves && counting.contains(key)) {
            let outcome = shared.dial.text(&format!("{}?limit=1", watched.resource.path())).await;
            gone.extend(outcome.is_err_and(|failure| failure.code() == 404).then_some(*key));
        }
    }
    for key in gone {
        if let Some((watched, task)) = kinds.remove(&key) {
            shared.folder.iter().for_each(|folder| folder.forget(&watched.resource));
            task.abort();
        }
    }
    resources.into_iter().for_each(|resource| begin(resource, shared, kinds));
}

/// The resources of optional groups that are served. What makes a group superfluous does not while its datastore is not ready: its objects may be
/// on their way there.
async fn discover(dial: &Dial, kinds: &Kinds) -> Result<Vec<Resource>, Failure> {
    let nonsense = |error: serde_json::Error| Failure::Nonsense(error.to_string());
    let groups: Groups = serde_json::from_str(&dial.text("/apis").await?).map_err(nonsense)?;
    let mut found = Vec::new();
    for optional in OPTIONAL {
        let of = |name: &str| groups.groups.iter().find(|group| group.name == name);
        let is_ready =
            |group: &str| !kinds.iter().any(|((of, _), (watched, _))| *of == group && says_not_ready(watched));
        let is_superfluous = optional.unless.is_some_and(|other| of(other).is_some() && is_ready(other));
        let Some(group) = of(optional.group).filter(|_| !is_superfluous) else { continue };
        let serves = |version: &&str| group.versions.iter().any(|served| served.version == **version);
        let Some(version) = optional.versions.iter().copied().find(|version| serves(version)) else { continue };
        let path = format!("/apis/{}/{version}", optional.group);
        let served: Resources = serde_json::from_str(&dial.text(&path).await?).map_err(nonsense)?;
        for (plural, kind) in optional.resources {
            if served.resources.iter().any(|one| one.name == *plural && one.kind == *kind) {
                found.push(optional.resource(version, plural, kind));
            }
        }
    }
    Ok(found)
}

fn kind_state(watched: &Watched) -> KindState {
    let (group, part) = watched.resource.key();
    let mut follow = watched.follow.borrow_mut();
    KindState {
        name: if group.is_empty() { part.to_owned() } else { format!("{group}/{part}") },
        count: follow.set().len(),
        is_whole: follow.is_whole(),
        is_behind: follow.is_behind(),
        last_word: watched.last_word.get(),
        failure: watched.failure.borrow().clone(),
    }
}

/// The addresses of the API server, by the slices of its service.
fn own_endpoints(slices: &Watched) -> BTreeSet<SocketAddr> {
    slices.follow.borrow_mut().set().kubernetes_endpoints()
}
