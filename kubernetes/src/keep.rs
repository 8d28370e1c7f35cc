//! The objects of a cluster on a disk, for a start at which nobody answers.
//!
//! A file for each kind: what the last whole list had, then each change since, a line each. A list is written beside and takes the file's place when it is
//! whole. A thread of its own writes. A list waits for it a while; what is told after a list does not, and where the disk is too slow for it, a kind goes without
//! until its next list.
//!
//! What is kept is what a start may go on with. So a list takes no file's place before it is known whether the cluster's objects may be believed,
//! and while they may not be, nothing is written: see [`Folder::judge`].

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use crate::{resource::Resource, watch::Watched};
use weir_cluster::resources::live::Reader;

/// Lines that may wait to be written.
const WAITING: usize = 4096;
/// How long what was written may wait for the disk.
const SOON: Duration = Duration::from_secs(1);
/// Bytes of changes after which a kind is listed again, so that its file does not grow without end.
const MAX_CHANGES: u64 = 64 << 20;

/// What the writer is told.
enum Word {
    /// What is to be written of a kind, by its file's name.
    Of(String, Line),
    /// Whether that may be believed.
    Judged(Judged),
}

/// What is to be written of a kind.
enum Line {
    /// A list begins.
    Begin,
    /// An object of it.
    Item(String),
    /// It is whole.
    End,
    /// It broke off, or something is missing in it.
    Drop,
    /// An object that is another since, or is no more.
    Change(char, String),
}

/// Where one kind is written to.
pub struct Journal {
    name: String,
    lines: SyncSender<Word>,
    waiting: Arc<AtomicUsize>,
    judged: Rc<Cell<Judged>>,
    /// Whether all since the last list was taken.
    is_complete: bool,
    /// Whether something was not written as it was not to be believed.
    was_held: bool,
    changes: u64,
}

/// What is known of whether the cluster's objects may be believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Judged {
    Unknown,
    Believed,
    Held,
}

/// Where all kinds are.
pub struct Folder {
    path: PathBuf,
    lines: SyncSender<Word>,
    /// Lines of all kinds that are not written yet.
    waiting: Arc<AtomicUsize>,
    judged: Rc<Cell<Judged>>,
}

fn name(resource: &Resource) -> String {
    format!("{}_{}_{}", resource.group, resource.version, resource.key().1.replace(' ', "-"))
}

impl Folder {
    /// Makes it, and begins to write there.
    ///
    /// # Errors
    /// Where that is not possible.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let (lines, written) = sync_channel(WAITING);
        let waiting = Arc::new(AtomicUsize::new(0));
        let (own_path, own_waiting) = (path.to_owned(), Arc::clone(&waiting));
        let work = move || write(&own_path, &written, &own_waiting);
        thread::Builder::new().name("kubernetes-keep".to_owned()).spawn(work)?;
        Ok(Self { path: path.to_owned(), lines, waiting, judged: Rc::new(Cell::new(Judged::Unknown)) })
    }

    /// Says whether the cluster's objects may be believed.
    pub fn judge(&self, may_be_believed: bool) {
        let judged = if may_be_believed { Judged::Believed } else { Judged::Held };
        if self.judged.get() != judged {
            self.waiting.fetch_add(1, Relaxed);
            match self.lines.try_send(Word::Judged(judged)) {
                Ok(()) => self.judged.set(judged),
                // It is said again with the next change.
                Err(_) => drop(self.waiting.fetch_sub(1, Relaxed)),
            }
        }
    }

    /// For one kind.
    pub fn journal(&self, resource: &Resource) -> Journal {
        Journal {
            name: name(resource),
            lines: self.lines.clone(),
            waiting: Arc::clone(&self.waiting),
            judged: Rc::clone(&self.judged),
            is_complete: false,
            was_held: false,
            changes: 0,
        }
    }

    /// Lets go of a kind that is no more.
    pub fn forget(&self, resource: &Resource) {
        // It is gone, or it stays and the next start finds that it is gone.
        let _ = fs::remove_file(self.path.join(name(resource)));
    }

    /// When a kind's file was written last, if it is there.
    pub fn written(&self, resource: &Resource) -> Option<SystemTime> {
        fs::metadata(self.path.join(name(resource))).and_then(|file| file.modified()).ok()
    }

    /// Reads the objects of a kind into what is known of it.
    ///
    /// # Errors
    /// Where a line is none. The last one may be cut off.
    pub fn read(&self, watched: &Watched, reader: &Reader) -> io::Result<()> {
        let mut lines = BufReader::new(File::open(self.path.join(name(&watched.resource)))?);
        let mut line = String::new();
        let mut follow = watched.follow.borrow_mut();
        loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 || !line.ends_with('\n') {
                return Ok(());
            }
            let (sign, json) = line.split_at_checked(1).unwrap_or_default();
            let object = reader.read(watched.resource.live(), json.trim_end()).map_err(io::Error::other)?;
            match sign {
                "+" => follow.set().put(object.into()),
                "-" => follow.set().remove(&object.id().clone()),
                _ => return Err(io::Error::other("no sign before an object")),
            }
        }
    }
}

impl Journal {
    fn send(&mut self, line: Line) {
        if self.judged.get() == Judged::Held {
            (self.is_complete, self.was_held) = (false, true);
            return;
        }
        self.waiting.fetch_add(1, Relaxed);
        if self.lines.try_send(Word::Of(self.name.clone(), line)).is_err() {
            self.waiting.fetch_sub(1, Relaxed);
            self.is_complete = false;
        }
    }

    /// Whether an object of a list should wait for the disk. Half of the room is for what cannot wait.
    pub fn is_crowded(&self) -> bool {
        self.is_complete && self.waiting.load(Relaxed) >= WAITING / 2
    }

    /// The disk is not waited for any more.
    pub fn give_up(&mut self) {
        self.is_complete = false;
    }

    /// A list begins.
    pub fn begin(&mut self) {
        (self.is_complete, self.was_held, self.changes) = (true, false, 0);
        self.send(Line::Begin);
    }

    /// An object of it.
    pub fn item(&mut self, json: &str) {
        if self.is_complete {
            self.send(Line::Item(json.to_owned()));
        }
    }

    /// It is whole, and older than what the file has already.
    pub fn pass_over(&mut self) {
        self.send(Line::Drop);
    }

    /// It is whole.
    pub fn end(&mut self) {
        // If there is no room for this word either, what was begun is dropped by the next beginning.
        let line = if self.is_complete { Line::End } else { Line::Drop };
        self.send(line);
    }

    /// An object that is another, `+`, or is gone, `-`.
    pub fn change(&mut self, sign: char, json: &str) {
        if self.is_complete {
            self.changes += json.len() as u64;
            self.send(Line::Change(sign, json.to_owned()));
        }
    }

    /// Whether its file should be begun anew.
    pub fn needs_list(&self) -> bool {
        self.changes > MAX_CHANGES || self.was_held && self.judged.get() == Judged::Believed
    }
}

/// A kind's files.
#[derive(Default)]
struct Files {
    list: Option<BufWriter<File>>,
    /// A list that is whole, with what changed since, of which nobody knows yet whether it may be believed.
    whole: Option<BufWriter<File>>,
    changes: Option<BufWriter<File>>,
}

/// Where a list is written until it is whole.
fn beside(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!(".{name}.new"))
}

fn write(folder: &Path, words: &Receiver<Word>, waiting: &AtomicUsize) {
    let mut all: BTreeMap<String, Files> = BTreeMap::new();
    let mut judged = Judged::Unknown;
    let mut flushed = Instant::now();
    loop {
        let word = words.recv_timeout(SOON);
        if flushed.elapsed() >= SOON {
            for files in all.values_mut() {
                // What cannot be written is found at the next line.
                let _ = files.changes.as_mut().map(Write::flush);
            }
            flushed = Instant::now();
        }
        let word = match word {
            Ok(word) => word,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        waiting.fetch_sub(1, Relaxed);
        match word {
            Word::Judged(now) => {
                judged = now;
                for (name, files) in &mut all {
                    let settled = files.settle(folder, name, judged);
                    files.goes_without(name, settled);
                }
            }
            Word::Of(name, line) => {
                let files = all.entry(name.clone()).or_default();
                let written = files.take(folder, &name, line).and_then(|()| files.settle(folder, &name, judged));
                files.goes_without(&name, written);
            }
        }
    }
}

impl Files {
    /// Lets go of what could not be written.
    fn goes_without(&mut self, name: &str, outcome: io::Result<()>) {
        if let Err(error) = outcome {
            tracing::warn!("the objects of {name} are not kept for the next start: {error}");
            *self = Self::default();
        }
    }

    /// A whole list takes its file's place, or is dropped, once it is known whether it may be believed.
    fn settle(&mut self, folder: &Path, name: &str, judged: Judged) -> io::Result<()> {
        if judged == Judged::Unknown {
            return Ok(());
        }
        let Some(list) = self.whole.take().filter(|_| judged == Judged::Believed) else { return Ok(()) };
        let file = list.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_data()?;
        fs::rename(beside(folder, name), folder.join(name))?;
        self.changes = Some(BufWriter::new(file));
        Ok(())
    }

    fn take(&mut self, folder: &Path, name: &str, line: Line) -> io::Result<()> {
        match line {
            Line::Begin => {
                self.whole = None;
                let mut options = OpenOptions::new();
                let file = options.write(true).create(true).truncate(true).mode(0o600).open(beside(folder, name))?;
                self.list = Some(BufWriter::new(file));
            }
            Line::Item(json) => {
                if let Some(list) = &mut self.list {
                    writeln!(list, "+{json}")?;
                }
            }
            Line::End => self.whole = self.list.take(),
            Line::Drop => self.list = None,
            Line::Change(sign, json) => {
                if let Some(changes) = self.whole.as_mut().or(self.changes.as_mut()) {
                    writeln!(changes, "{sign}{json}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The disk is a pipe: it takes nothing until somebody reads.
    #[test]
    fn a_list_waits_for_a_slow_disk_and_is_kept_whole() {
        let folder = tempfile::tempdir().unwrap();
        let resource = crate::resource::always(None).remove(0);
        let pipe = folder.path().join(format!(".{}.new", name(&resource)));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let kept = Folder::open(folder.path()).unwrap();
        kept.judge(true);
        let mut journal = kept.journal(&resource);
        journal.begin();
        let mut sent = 0;
        while !journal.is_crowded() {
            journal.item("{}");
            sent += 1;
            assert!(journal.is_complete && sent <= WAITING);
        }
        let reader = thread::spawn(move || {
            let mut text = String::new();
            io::Read::read_to_string(&mut File::open(pipe).unwrap(), &mut text).unwrap();
            text
        });
        let until = Instant::now() + Duration::from_secs(60);
        while journal.is_crowded() {
            assert!(Instant::now() < until, "what is written makes no room");
            thread::sleep(Duration::from_millis(1));
        }
        for _ in 0..WAITING / 2 - 1 {
            journal.item("{}");
        }
        assert!(journal.is_complete);
        journal.end();
        assert_eq!(reader.join().unwrap(), "+{}\n".repeat(sent + WAITING / 2 - 1));
        assert!(!journal.needs_list());
        kept.judge(false);
        journal.change('+', "{}");
        assert!(!journal.needs_list(), "what is not to be believed is not asked for again");
        kept.judge(true);
        assert!(journal.needs_list());
        journal.begin();
        assert!(!journal.needs_list());
        journal.give_up();
        journal.item("{}");
        assert!(!journal.is_crowded(), "who has given up waits for nothing");
    }
}
