//! Watching weir.yaml and the manifests, and SIGHUP: when to reload.
//!
//! # Theory
//!
//! *What.* inotify (through the `notify` crate) only says that something may have happened near a watched path; whether
//! it did is told by comparing a [`Survey`]: path, device, inode, size and times of every file that would be read. So
//! it does not matter how a file came to change - written in place, replaced by rename, a symbolic link that was
//! swapped somewhere on the way (the ConfigMap volumes of Kubernetes, whose `..data` link is renamed) - and log files
//! or swap files beside it reload nothing.
//!
//! *Which folders.* Each folder in which a name on the way to a file is looked up last: the parent of the path, of each
//! symbolic link that the path leads through, and of the file itself; for a folder of manifests the folder and its
//! visible subfolders. If one does not exist, its nearest existing ancestor is watched until it does.
//!
//! *Half truths.* A file that somebody has open for writing is, until it is closed, what it was before: the survey keeps its former stamp.
//! A new one is not there yet. So that no close is missed they are looked at again, less and less often. The loader may want to see files
//! again too, which it says by [`Revisit`].
//!
//! *No gap.* Folders are watched before the survey that counts, and the survey is repeated until its folders are those
//! watched. A file that was changed within a tick of the survey is not told by its stamp from what it may become in the same tick: the next event
//! then counts without one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    file::{Stamp, is_written},
    revisit::{Awaited, Revisit},
};

/// How long further events are gathered after the first.
const GATHER: Duration = Duration::from_millis(20);
/// How long after a look that inotify refused the next one is made.
const PAUSE: Duration = Duration::from_secs(10);
/// How long after a look that found a file open for writing the next one is made, at first and at most.
const WRITTEN_PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];
/// Two changes of a file within this time may leave the same stamp: the kernel's coarse clock ticks every 10 ms at most.
const TICK: Duration = Duration::from_millis(10);
/// Symbolic links followed for one path, as the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// How deep folders of manifests are looked into.
const MAX_DEPTH: usize = 16;

/// Why files cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// inotify refuses.
    #[error("cannot watch for changed files: {0}; see the limits fs.inotify.max_user_instances and max_user_watches")]
    Notify(#[from] notify::Error),
    /// SIGHUP cannot be caught.
    #[error("cannot catch SIGHUP: {0}")]
    Signal(#[from] io::Error),
    /// The watching thread ended.
    #[error("the watch for changed files ended; SIGHUP does not reload any more either, restart weir")]
    Ended,
}

/// Why to reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// A watched file changed, came or went.
    Files,
    /// SIGHUP, which counts even where no file changed.
    Signal,
}

/// The state of all watched files, and the folders to watch for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Survey {
    /// Files by the path they are read by; `None`: not there.
    files: BTreeMap<PathBuf, Option<Stamp>>,
    /// Folders by path, with device and inode: another folder under the same path needs a new watch.
    folders: BTreeMap<PathBuf, (u64, u64)>,
}

impl Survey {
    /// Whether a file was changed so shortly before that a change from now on could leave the same stamp.
    fn may_miss_a_change(&self) -> bool {
        self.files.values().flatten().any(|stamp| !stamp.is_older_than(TICK))
    }
}

impl Survey {
    fn of(paths: &BTreeSet<PathBuf>) -> Self {
        let mut survey = Self::default();
        for path in paths {
            survey.visit(path, 0);
        }
        survey
    }

    fn visit(&mut self, path: &Path, depth: usize) {
        self.follow(path);
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                self.watch(path);
                let Ok(entries) = fs::read_dir(path) else { return };
                for entry in entries.flatten() {
                    // Hidden entries are editors' and Kubernetes' own; what they lead to is seen under its visible
                    // name.
                    if depth < MAX_DEPTH && !entry.file_name().as_encoded_bytes().starts_with(b".") {
                        self.visit(&entry.path(), depth + 1);
                    }
                }
            }
            Ok(metadata) => {
                self.files.insert(path.to_owned(), Some(Stamp::of(&metadata)));
            }
            Err(_) => {
                self.files.insert(path.to_owned(), None);
            }
        }
    }

    /// Watches each folder whose entry decides what `path` is.
    fn follow(&mut self, path: &Path) {
        self.watch_parent(path);
        // The path with its links replaced one by one; what is before `done` components has none left.
        let mut current = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        for _ in 0..MAX_LINKS {
            let mut seen = PathBuf::new();
            let mut components = current.components();
            let mut replaced = None;
            while let Some(component) = components.next() {
                if component == Component::ParentDir {
                    seen.pop();
                    continue;
                }
                seen.push(component);
                if let Ok(target) = fs::read_link(&seen) {
                    self.watch_parent(&seen);
                    seen.pop();
                    replaced = Some(seen.join(target).join(components.as_path()));
                    break;
                }
            }
            match replaced {
                Some(next) => current = next,
                None => return self.watch_parent(&seen),
            }
        }
    }

    fn watch_parent(&mut self, path: &Path) {
        for ancestor in path.ancestors().skip(1) {
            let ancestor = if ancestor.as_os_str().is_empty() { Path::new(".") } else { ancestor };
            if self.watch(ancestor) {
                return;
            }
        }
    }

    fn watch(&mut self, folder: &Path) -> bool {
        match fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => {
                self.folders.insert(folder.to_owned(), (metadata.dev(), metadata.ino()));
                true
            }
            _ => false,
        }
    }
}

/// Tells when to reload.
pub struct Watch {
    paths: BTreeSet<PathBuf>,
    survey: Survey,
    watcher: RecommendedWatcher,
    events: mpsc::Receiver<()>,
    hangup: Signal,
    due: Option<Instant>,
    /// The next pause while files are open for writing.
    pause: Duration,
    revisit: Revisit,
    /// Whether the next event tells of a change even if no stamp does.
    suspicious: bool,
}

impl Watch {
    /// Watches files, and folders with all in them that is not hidden. A path that does not exist is waited for. From
    /// the first call on, SIGHUP does not end the process.
    ///
    /// To miss nothing, call this (and [`Watch::set_paths`]) before reading the files. Needs a tokio runtime.
    ///
    /// # Errors
    /// Where inotify or the signal handler is refused.
    pub fn new(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Result<Self, WatchError> {
        // One waiting event is enough: it makes everything be looked at.
        let (sender, events) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let telling = event.is_ok_and(|event| match event.kind {
                EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
                // Reading the files makes these.
                EventKind::Access(_) => false,
                _ => true,
            });
            if telling {
                let _ = sender.try_send(());
            }
        })?;
        let hangup = signal(SignalKind::hangup())?;
        let mut watch = Self {
            paths: BTreeSet::new(),
            survey: Survey::default(),
            watcher,
            events,
            hangup,
            due: None,
            pause: WRITTEN_PAUSES[0],
            revisit: Revisit::default(),
            suspicious: false,
        };
        watch.paths = paths.into_iter().map(Into::into).collect();
        watch.survey = watch.look()?;
        Ok(watch)
    }

    /// Watches other paths from now on. A change of a file that was watched and still is stays noticed.
    ///
    /// # Errors
    /// Where inotify refuses.
    pub fn set_paths(&mut self, paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Result<(), WatchError> {
        self.paths = paths.into_iter().map(Into::into).collect();
        let mut survey = self.look()?;
        for (path, stamp) in &mut survey.files {
            if let Some(before) = self.survey.files.get(path)
                && before != stamp
            {
                *stamp = *before;
                self.due.get_or_insert(Instant::now());
            }
        }
        self.survey = survey;
        Ok(())
    }

    /// With what the loader of these files was given before, instead of its own.
    #[must_use]
    pub fn sharing(self, revisit: Revisit) -> Self {
        Self { revisit, ..self }
    }

    /// What the loader of these files is to be given, so that it can say what is to be looked at again.
    pub fn revisit(&self) -> Revisit {
        self.revisit.clone()
    }

    /// Waits for the next reason to reload; what happens within some 20 ms is one.
    ///
    /// Cancel-safe: a call that is given up loses nothing.
    ///
    /// # Errors
    /// [`WatchError::Ended`] where the watch ended. Else inotify refused a folder that became relevant, which is tried again after a pause.
    pub async fn changed(&mut self) -> Result<Trigger, WatchError> {
        loop {
            let due = self.due;
            let awaited = self.revisit.awaited();
            // Those that were open when they were to be read are looked at as others are.
            if !awaited.written.is_empty() && due.is_none() {
                self.due = Some(Instant::now() + self.pause);
                continue;
            }
            let due_late = due.is_none_or(|due| due > Instant::now() + GATHER);
            tokio::select! {
                biased;
                received = self.hangup.recv() => {
                    self.revisit.believe();
                    return received.map(|()| Trigger::Signal).ok_or(WatchError::Ended);
                }
                () = wait_for(due), if due.is_some() => {
                    if self.has_changed(&awaited)? {
                        return Ok(Trigger::Files);
                    }
                }
                () = wait_for(awaited.at), if awaited.at.is_some() => {
                    self.revisit.replace(&awaited, Awaited { at: None, ..awaited.clone() });
                    return Ok(Trigger::Files);
                }
                () = self.revisit.changed() => {}
                event = self.events.recv(), if due_late => {
                    event.ok_or(WatchError::Ended)?;
                    self.due = Some(Instant::now() + GATHER);
                }
            }
        }
    }

    /// Looks at the files that are due; whether to read them again.
    fn has_changed(&mut self, awaited: &Awaited) -> Result<bool, WatchError> {
        let mut survey = match self.look() {
            Ok(survey) => survey,
            Err(error) => {
                self.due = Some(Instant::now() + PAUSE);
                return Err(error);
            }
        };
        self.due = None;
        let others = survey.files.iter().filter(|(path, stamp)| self.survey.files.get(*path) != Some(stamp));
        let written: Vec<PathBuf> = others.filter(|(path, _)| is_written(path)).map(|(path, _)| path.clone()).collect();
        for path in &written {
            match self.survey.files.get(path) {
                Some(before) => survey.files.insert(path.clone(), *before),
                None => survey.files.remove(path),
            };
        }
        let closed = awaited.written.iter().any(|path| !is_written(path));
        let files_changed = closed || survey.files != self.survey.files || self.suspicious;
        self.suspicious = files_changed && survey.may_miss_a_change();
        self.survey = survey;
        if files_changed {
            self.pause = WRITTEN_PAUSES[0];
        }
        if closed {
            // Which are open now, the next reading says.
            self.revisit.replace(awaited, Awaited { written: Vec::new(), ..awaited.clone() });
        } else if !awaited.written.is_empty() || !written.is_empty() {
            self.pause = (self.pause * 2).min(WRITTEN_PAUSES[1]);
        }
        if !written.is_empty() {
            self.due = Some(Instant::now() + self.pause);
        }
        Ok(files_changed)
    }

    /// Surveys the paths, with the watches on the folders that this names.
    fn look(&mut self) -> Result<Survey, WatchError> {
        let mut watched = self.survey.folders.clone();
        // Bounded, for folders that somebody keeps moving about: then their events make it look again.
        for _ in 0..8 {
            let survey = Survey::of(&self.paths);
            if survey.folders == watched {
                return Ok(survey);
            }
            for (folder, _) in watched.iter().filter(|(folder, id)| survey.folders.get(*folder) != Some(id)) {
                // The watch of a removed folder is gone already.
                let _ = self.watcher.unwatch(folder);
            }
            let fresh: Vec<_> = survey.folders.iter().filter(|(folder, id)| watched.get(*folder) != Some(id)).collect();
            let mut refused = BTreeSet::new();
            for (folder, _) in fresh {
                match self.watcher.watch(folder, RecursiveMode::NonRecursive) {
                    Ok(()) => {}
                    Err(error) if is_gone(&error) => {
                        refused.insert(folder.clone());
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            watched = survey.folders;
            watched.retain(|folder, _| !refused.contains(folder));
        }
        let mut survey = Survey::of(&self.paths);
        survey.folders = watched;
        Ok(survey)
    }
}

async fn wait_for(time: Option<Instant>) {
    sleep_until(time.unwrap_or_else(Instant::now)).await;
}

fn is_gone(error: &notify::Error) -> bool {
    match &error.kind {
        notify::ErrorKind::PathNotFound => true,
        notify::ErrorKind::Io(error) => matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
        _ => false,
    }
}
