//! The texts of the manifests, kept from load to load: what did not change is not read again.
//!
//! # Theory
//! A file whose stamp (device, inode, size, times) is as it was is taken as it was, without opening it. A file that was changed so shortly
//! before it was read that another change could have left the same stamp is read again and compared.
//!
//! A text that was good is not given up for less than a whole one. It stays where its file is being written or cannot be read, and where
//! its folder is gone; and, for [`EMPTY_FOR`], where nothing is left in it, as a text that is about to be written anew is truncated first.
//! What stays so is *held*, and told as such. The texts that an earlier process had in force serve in the same way
//! ([`Library::remember`]).

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, FileType, Metadata},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crate::{
    resources::{Identities, pieces::Pieces},
    sources::{
        file::{self, Stamp, Unread},
        revisit::Awaited,
    },
    text::{Problems, Source, Span, tree},
};

/// How old a file's last change must be for its stamp to tell it from any later one: several times the tick of coarse file times.
const SETTLED: Duration = Duration::from_millis(100);

/// How long a text must have held no document, where it had some, before that is believed.
pub const EMPTY_FOR: Duration = Duration::from_secs(5);
/// How long the first reading waits for files to be closed that are being written.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// The texts that were read last.
#[derive(Debug, Default)]
pub struct Library {
    identities: Identities,
    kept: HashMap<PathBuf, Arc<Text>>,
    /// Since when texts that had documents hold none.
    empty_since: HashMap<PathBuf, Instant>,
    /// Whether it has read before.
    has_read: bool,
}

/// A file's text, as it was read.
#[derive(Debug)]
struct Text {
    pieces: Arc<Pieces>,
    /// What its file had when it was read; `None` where it is from an earlier process.
    stamp: Option<Stamp>,
    /// Whether no other text can have the same stamp.
    settled: bool,
}

/// What was read at one load, in order.
#[derive(Debug, Default)]
pub struct Texts {
    /// The files and folders: what to watch.
    pub files: Vec<PathBuf>,
    /// What is not as its file says.
    pub held: Vec<Held>,
    /// What is to be looked at again.
    pub awaited: Awaited,
    texts: Vec<(u32, PathBuf, Arc<Text>)>,
}

/// A file or folder that does not count as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which.
    pub path: PathBuf,
    /// Whether the text of before stands for it; else nothing does.
    pub has_text: bool,
    /// Why, with what stands for it.
    pub problem: String,
}

/// A text that was in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InForce {
    /// Its file.
    pub path: PathBuf,
    /// The state of the file that it is the text of; `None` where an earlier text is in force.
    pub stamp: Option<Stamp>,
}

impl Texts {
    /// The texts.
    pub fn sources(&self) -> impl Iterator<Item = &Arc<Source>> {
        self.texts.iter().map(|(_, _, text)| text.pieces.source())
    }

    /// What the texts hold, each with its number.
    pub fn pieces(&self) -> impl Iterator<Item = (u32, &Arc<Pieces>)> + Clone {
        self.texts.iter().map(|(file, _, text)| (*file, &text.pieces))
    }

    /// The texts, of which those with a number in `faulty` are not in force as they are.
    pub fn in_force(&self, faulty: &BTreeSet<u32>) -> Vec<InForce> {
        let held: BTreeSet<&Path> = self.held.iter().map(|held| &*held.path).collect();
        let is_as_read = |file: &u32, path: &Path| !faulty.contains(file) && !held.contains(path);
        let stamp = |file, path: &PathBuf, text: &Text| text.stamp.filter(|_| is_as_read(file, path));
        let texts = self.texts.iter();
        texts.map(|(file, path, text)| InForce { path: path.clone(), stamp: stamp(file, path, text) }).collect()
    }
}

impl Library {
    /// One that takes objects without a namespace for those of this one.
    pub fn in_namespace(namespace: &str) -> Self {
        Self { identities: Identities::in_namespace(namespace), ..Self::default() }
    }

    /// What numbers the objects.
    pub fn identities(&self) -> &Identities {
        &self.identities
    }

    /// Reads all files and folders, but what did not change since the last time. `spans` says where weir.yaml, which is `config`,
    /// names each; what cannot be read is reported. With `believes`, a text that has become empty is so.
    pub fn read(
        &mut self,
        paths: &[PathBuf],
        spans: &[Span],
        config: &Path,
        believes: bool,
        problems: &mut Problems,
    ) -> Texts {
        let mut reader = Reader {
            kept: HashMap::new(),
            empty_since: HashMap::new(),
            texts: Texts::default(),
            seen: BTreeSet::new(),
            believes,
            deadline: Instant::now() + if self.has_read { Duration::ZERO } else { PATIENCE },
            library: self,
        };
        // weir.yaml may lie in the folder that it names.
        reader.seen.extend(config.canonicalize());
        let outcome = tree::on_reader_thread(|| {
            for (index, path) in paths.iter().enumerate() {
                let canonical = path.canonicalize();
                reader.path(path, canonical, spans.get(index).copied().unwrap_or_default(), true, problems);
            }
            let Reader { kept, empty_since, texts, .. } = reader;
            (kept, empty_since, texts)
        });
        match outcome {
            Ok((kept, empty_since, texts)) => {
                // What no path leads to any more is forgotten.
                (self.kept, self.empty_since, self.has_read) = (kept, empty_since, true);
                self.identities.names.tidy();
                texts
            }
            Err(error) => {
                problems.error(Span::default(), format!("there is no thread to read manifests with: {error}"), None);
                Texts { files: paths.to_vec(), ..Texts::default() }
            }
        }
    }

    /// Takes texts as those that were read last: what an earlier process had in force.
    pub fn remember(&mut self, texts: Vec<(PathBuf, String)>, problems: &mut Problems) -> Texts {
        let mut remembered = Texts::default();
        let outcome = tree::on_reader_thread(|| {
            for (path, text) in texts {
                let pieces = Pieces::read(Source::new(path.display().to_string(), text), None, &self.identities);
                let text = Arc::new(Text { pieces: Arc::new(pieces), stamp: None, settled: false });
                let file = problems.share_source(Arc::clone(text.pieces.source()));
                remembered.texts.push((file, path.clone(), Arc::clone(&text)));
                self.kept.insert(path, text);
            }
        });
        // Without a thread nothing is remembered, and reading will say so.
        drop(outcome);
        remembered
    }

    /// An empty one that numbers objects as this one does.
    pub fn afresh(&self) -> Self {
        Self { identities: self.identities.clone(), ..Self::default() }
    }

    /// Adds one text, under the name that diagnostics give it.
    #[cfg(test)]
    pub fn add_text(&mut self, name: &str, text: String, texts: &mut Texts, problems: &mut Problems) {
        let before = self.kept.get(Path::new(name)).cloned();
        let source = Source::new(name, text);
        let before = before.as_deref().map(|text| &*text.pieces);
        let pieces = tree::on_reader_thread(|| Pieces::read(source, before, &self.identities));
        let pieces = Arc::new(pieces.expect("there are threads in tests"));
        let text = Arc::new(Text { pieces, stamp: None, settled: false });
        self.kept.insert(name.into(), Arc::clone(&text));
        texts.texts.push((problems.share_source(Arc::clone(text.pieces.source())), name.into(), text));
    }
}

/// Goes through files and folders.
struct Reader<'l> {
    library: &'l Library,
    kept: HashMap<PathBuf, Arc<Text>>,
    empty_since: HashMap<PathBuf, Instant>,
    texts: Texts,
    /// Each file once, however it is named.
    seen: BTreeSet<PathBuf>,
    believes: bool,
    /// Until when files that have no earlier text may be waited for.
    deadline: Instant,
}

impl Reader<'_> {
    /// Reads a file, or a folder with its subfolders. What a folder holds is read in the order of names, and only what
    /// is called *.yaml, *.yml or *.json; hidden entries are left out (a mounted ConfigMap has such links).
    fn path(&mut self, path: &Path, canonical: io::Result<PathBuf>, span: Span, named: bool, problems: &mut Problems) {
        self.texts.files.push(path.to_owned());
        let found = canonical.and_then(|canonical| Ok((fs::metadata(&canonical)?, canonical)));
        let (metadata, canonical) = match found {
            Ok(found) => found,
            Err(error) => return self.lost(path, span, named, &error, problems),
        };
        if !self.seen.insert(canonical.clone()) {
            self.texts.files.pop();
            return;
        }
        if !metadata.is_dir() {
            return self.file(path, &metadata, span, named, problems);
        }
        if path.join("Chart.yaml").is_file() {
            let shown = path.display();
            let file = problems.add_source(Source::new(path.join("Chart.yaml").display().to_string(), String::new()));
            let help = format!("let Helm write it out: `helm template NAME {shown} > chart.yaml`, and read that file");
            let message = format!("the folder {shown} is a Helm chart: nothing is read of it");
            return problems.error(Span { file, ..Span::default() }, message, help);
        }
        let entries = match std::fs::read_dir(path).and_then(|entries| entries.collect::<Result<Vec<_>, _>>()) {
            Ok(entries) => entries,
            Err(error) => return self.lost(path, span, named, &error, problems),
        };
        let mut entries: Vec<(PathBuf, Option<FileType>)> =
            entries.into_iter().map(|entry| (entry.path(), entry.file_type().ok())).collect();
        entries.retain(|(path, kind)| {
            let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            let manifest =
                path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|e| extension == *e));
            !hidden && (manifest || kind.is_none_or(|kind| kind.is_dir() || kind.is_symlink() && path.is_dir()))
        });
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        if named && entries.is_empty() {
            let help = "manifests are files called *.yaml, *.yml or *.json".to_owned();
            problems.warning(span, format!("the folder {} holds no manifests", path.display()), help);
        }
        for (path, kind) in entries {
            // Where a folder is said to be, only links in it may lead elsewhere.
            let is_here = kind.is_some_and(|kind| !kind.is_symlink());
            let own = path.file_name().filter(|_| is_here).map(|name| canonical.join(name));
            let own = own.map_or_else(|| path.canonicalize(), Ok);
            self.path(&path, own, span, false, problems);
        }
    }

    /// A path that leads nowhere: what was there stays.
    fn lost(&mut self, path: &Path, span: Span, named: bool, error: &io::Error, problems: &mut Problems) {
        let shown = path.display().to_string();
        // Whoever removes a file of a folder wants it gone, also while the folder is read.
        if !named && fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            self.texts.files.pop();
            return;
        }
        let below = self.library.kept.iter().filter(|(known, _)| known.starts_with(path));
        let mut below: Vec<(PathBuf, Arc<Text>)> = below.map(|(path, text)| (path.clone(), Arc::clone(text))).collect();
        if below.is_empty() {
            let help = "paths are relative to the folder of weir.yaml".to_owned();
            return problems.error(span, format!("cannot read {shown}: {error}"), help);
        }
        below.sort_by(|(one, _), (other, _)| one.cmp(other));
        for (path, text) in below {
            self.hold(&path, &text, span, &format!("cannot read {shown}: {error}"), problems);
        }
    }

    /// Takes a file's text of before instead of what it holds.
    fn hold(&mut self, path: &Path, text: &Arc<Text>, span: Span, why: &str, problems: &mut Problems) {
        let kept = if text.stamp.is_none() { "the text that an earlier run had in force" } else { "its last text" };
        let problem = format!("{why}; {kept} stands for it");
        problems.warning(span, problem.clone(), None);
        self.texts.held.push(Held { path: path.to_owned(), has_text: true, problem });
        self.add(path, Arc::clone(text), problems);
    }

    fn add(&mut self, path: &Path, text: Arc<Text>, problems: &mut Problems) {
        let file = problems.share_source(Arc::clone(text.pieces.source()));
        self.texts.texts.push((file, path.to_owned(), Arc::clone(&text)));
        self.kept.insert(path.to_owned(), text);
    }

    fn file(&mut self, path: &Path, metadata: &Metadata, span: Span, named: bool, problems: &mut Problems) {
        let shown = path.display().to_string();
        let library = self.library;
        let before = library.kept.get(path);
        // What is changed after this has another stamp, if this one is old enough.
        let at_first = Stamp::of(metadata);
        let settled = Some(at_first).filter(|stamp| stamp.is_older_than(SETTLED));
        if let Some(before) = before.filter(|before| before.settled && before.stamp == Some(at_first)) {
            return self.add(path, Arc::clone(before), problems);
        }
        let mut read = file::read(path);
        while matches!(read, Err(Unread::Written)) && before.is_none() && Instant::now() < self.deadline {
            thread::sleep(PAUSE);
            read = file::read(path);
        }
        let (stamp, bytes) = match read {
            Ok((stamp, bytes)) => (stamp, bytes),
            Err(error) => return self.unread(path, span, named, error, problems),
        };
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                // Its objects stay, and it is compared with once more.
                self.kept.extend(before.map(|before| (path.to_owned(), Arc::clone(before))));
                let valid = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
                let file = problems.add_source(Source::new(shown, text));
                let place = Span { file, start: valid as u32, end: valid as u32 };
                return problems.error(place, "this file is not UTF-8", "save it as UTF-8".to_owned());
            }
        };
        let known = before.map(|before| &before.pieces);
        let pieces = match known.filter(|known| *known.source().text() == *text) {
            Some(known) => Arc::clone(known),
            None => {
                let source = Source::new(shown.clone(), text);
                Arc::new(Pieces::read(source, known.map(|known| &**known), &library.identities))
            }
        };
        let text = Arc::new(Text { pieces, stamp: Some(stamp), settled: settled == Some(stamp) });
        if let Some(before) = before.filter(|before| text.pieces.is_empty() && !before.pieces.is_empty())
            && !self.believes
        {
            let since = library.empty_since.get(path).copied().unwrap_or_else(Instant::now);
            let until = since + EMPTY_FOR;
            if Instant::now() < until {
                self.empty_since.insert(path.to_owned(), since);
                let at = self.texts.awaited.at.map_or(until.into(), |at| at.min(until.into()));
                self.texts.awaited.at = Some(at);
                let seconds = EMPTY_FOR.as_secs();
                let why = format!(
                    "{shown} holds no document any more, which is believed after {seconds} s, or at once with SIGHUP"
                );
                return self.hold(path, before, span, &why, problems);
            }
        }
        self.add(path, text, problems);
    }

    /// A file that is not to be read: what it held stays.
    fn unread(&mut self, path: &Path, span: Span, named: bool, error: Unread, problems: &mut Problems) {
        let shown = path.display().to_string();
        if matches!(error, Unread::Written) {
            self.texts.awaited.written.push(path.to_owned());
        }
        let library = self.library;
        if let Some(before) = library.kept.get(path) {
            return self.hold(path, before, span, &format!("{shown} is not read: {error}"), problems);
        }
        match error {
            // One that is about to come.
            Unread::Written if library.has_read => {
                let problem = format!("{shown} is not read: {error}; it is as if it was not there");
                problems.warning(span, problem.clone(), None);
                self.texts.held.push(Held { path: path.to_owned(), has_text: false, problem });
            }
            Unread::NotRegular(_) if !named => problems.warning(span, format!("{shown} is skipped: {error}"), None),
            Unread::NotRegular(_) => problems.error(span, format!("cannot read {shown}: {error}"), None),
            error => {
                let message = format!("cannot read {shown}: {error}");
                let file = problems.add_source(Source::new(shown, String::new()));
                problems.error(Span { file, ..Span::default() }, message, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs::File, io::Write};

    use super::*;
    use crate::{
        resources::{Chunks, Manifests},
        text::Severity,
    };

    /// A folder with a library that reads it.
    struct World {
        folder: tempfile::TempDir,
        library: Library,
    }

    /// What a reading found: the names of objects, what is held, and problems, without the folder's own name.
    #[derive(Debug)]
    struct Found {
        objects: Vec<String>,
        held: Vec<(String, bool)>,
        problems: Vec<(Severity, String)>,
        awaited: Awaited,
        in_force: Vec<(String, bool)>,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir(folder.path().join("m")).unwrap();
            Self { folder, library: Library::default() }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn put(&self, name: &str, objects: &[&str]) {
            fs::write(self.path(name), text(objects)).unwrap();
        }

        fn read_all(&mut self, paths: &[&str], believes: bool) -> Found {
            let paths: Vec<PathBuf> = paths.iter().map(|path| self.path(path)).collect();
            let mut problems = Problems::default();
            problems.add_source(Source::new("weir.yaml", String::new()));
            let texts = self.library.read(&paths, &[], Path::new("weir.yaml"), believes, &mut problems);
            let folder = format!("{}/", self.folder.path().display());
            let own = |path: &Path| path.strip_prefix(self.folder.path()).unwrap().display().to_string();
            Found {
                objects: names(&texts),
                held: texts.held.iter().map(|held| (own(&held.path), held.has_text)).collect(),
                problems: problems.diagnostics().iter().map(|p| (p.severity, p.message.replace(&folder, ""))).collect(),
                in_force: texts
                    .in_force(&BTreeSet::new())
                    .iter()
                    .map(|text| (own(&text.path), text.stamp.is_some()))
                    .collect(),
                awaited: texts.awaited,
            }
        }

        fn read(&mut self) -> Found {
            self.read_all(&["m"], false)
        }
    }

    fn text(objects: &[&str]) -> String {
        let object = |name: &&str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n");
        objects.iter().map(object).collect::<Vec<_>>().join("---\n")
    }

    fn names(texts: &Texts) -> Vec<String> {
        let manifests =
            Manifests::of(texts.pieces(), &BTreeMap::new(), &mut Chunks::default(), &mut Problems::default());
        manifests.namespaces().iter().map(|namespace| namespace.name.to_string()).collect()
    }

    fn owned(names: &[(&str, bool)]) -> Vec<(String, bool)> {
        names.iter().map(|(name, flag)| ((*name).to_owned(), *flag)).collect()
    }

    #[test]
    fn a_text_that_becomes_empty_stays_for_five_seconds() {
        for empty in ["", "# nothing but this\n", "---\n# first\n---\n\n"] {
            let mut world = World::new();
            world.put("m/a.yaml", &["a"]);
            world.put("m/b.yaml", &["b"]);
            assert_eq!(world.read().objects, ["a", "b"]);
            fs::write(world.path("m/a.yaml"), empty).unwrap();
            for _ in 0..2 {
                let found = world.read();
                assert_eq!(found.objects, ["a", "b"], "{empty:?}");
                assert_eq!(found.held, owned(&[("m/a.yaml", true)]));
                assert_eq!(found.in_force, owned(&[("m/a.yaml", false), ("m/b.yaml", true)]));
                let [(Severity::Warning, why)] = &found.problems[..] else { panic!("{:?}", found.problems) };
                assert!(why.starts_with("m/a.yaml holds no document any more, which is believed after 5 s"), "{why}");
                let wait = found.awaited.at.unwrap().duration_since(tokio::time::Instant::now());
                assert!(wait <= EMPTY_FOR && wait > Duration::from_secs(1), "{wait:?}");
            }
            // What comes within that time begins it anew.
            world.put("m/a.yaml", &["new"]);
            let found = world.read();
            assert_eq!(
                (found.objects, found.held.len(), found.awaited),
                (owned_names(&["new", "b"]), 0, Awaited::default())
            );
            fs::write(world.path("m/a.yaml"), empty).unwrap();
            assert_eq!(world.read().objects, ["new", "b"]);
            let since = world.library.empty_since.values_mut().next().unwrap();
            *since = since.checked_sub(EMPTY_FOR).unwrap();
            let found = world.read();
            assert_eq!((found.objects, found.held.len(), found.problems.len()), (owned_names(&["b"]), 0, 0));
            assert!(world.library.empty_since.is_empty());
        }
    }

    fn owned_names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn what_an_operator_asks_for_is_believed_at_once_and_so_is_a_removed_file_and_an_empty_list() {
        let mut world = World::new();
        world.put("m/a.yaml", &["a"]);
        world.put("m/b.yaml", &["b"]);
        world.put("m/c.yaml", &["c"]);
        world.read();
        fs::write(world.path("m/a.yaml"), "").unwrap();
        assert_eq!(world.read().objects, ["a", "b", "c"]);
        assert_eq!(world.read_all(&["m"], true).objects, ["b", "c"]);
        fs::remove_file(world.path("m/b.yaml")).unwrap();
        fs::write(world.path("m/c.yaml"), "apiVersion: v1\nkind: List\nitems: []\n").unwrap();
        let found = world.read();
        assert_eq!((found.objects.len(), found.held.len()), (0, 0), "{:?}", found.problems);
    }

    #[test]
    fn what_is_being_written_is_what_it_was_before() {
        let mut world = World::new();
        world.put("m/a.yaml", &["a"]);
        assert_eq!(world.read().objects, ["a"]);
        let mut file = File::create(world.path("m/a.yaml")).unwrap();
        file.write_all(text(&["half"]).as_bytes()).unwrap();
        // A new one that is not finished is not there yet.
        let new = File::create(world.path("m/new.yaml")).unwrap();
        let begin = Instant::now();
        let found = world.read();
        assert_eq!(found.objects, ["a"]);
        assert_eq!(found.held, owned(&[("m/a.yaml", true), ("m/new.yaml", false)]));
        assert_eq!(found.awaited.written, [world.path("m/a.yaml"), world.path("m/new.yaml")]);
        assert!(found.problems.iter().all(|(severity, _)| *severity == Severity::Warning), "{:?}", found.problems);
        // Also for an operator who asks.
        assert_eq!(world.read_all(&["m"], true).objects, ["a"]);
        assert!(begin.elapsed() < PATIENCE, "what has an earlier text is not waited for");
        file.write_all(format!("---\n{}", text(&["whole"])).as_bytes()).unwrap();
        drop((file, new));
        let found = world.read();
        assert_eq!((found.objects.len(), found.held.len(), found.awaited), (2, 0, Awaited::default()));
    }

    #[test]
    fn the_first_reading_waits_for_a_writer() {
        let mut world = World::new();
        let mut file = File::create(world.path("m/a.yaml")).unwrap();
        let found = thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(300));
                file.write_all(text(&["a"]).as_bytes()).unwrap();
            });
            world.read()
        });
        assert_eq!((found.objects, found.problems.len()), (owned_names(&["a"]), 0));
        // But not for ever.
        let mut world = World::new();
        let _file = File::create(world.path("m/a.yaml")).unwrap();
        let found = world.read();
        let [(Severity::Error, why)] = &found.problems[..] else { panic!("{:?}", found.problems) };
        assert!(why.starts_with("cannot read m/a.yaml: it is open for writing"), "{why}");
        assert_eq!(found.awaited.written, [world.path("m/a.yaml")]);
    }

    #[test]
    fn what_is_no_regular_file_is_skipped_and_said() {
        let mut world = World::new();
        world.put("m/a.yaml", &["a"]);
        world.put("m/was.yaml", &["was"]);
        let fifo = |name: &str| {
            let made = std::process::Command::new("mkfifo").arg(world.path(name)).status().unwrap();
            assert!(made.success());
        };
        fifo("m/b.yaml");
        fifo("named.yaml");
        let paths = ["m", "named.yaml"];
        let found = world.read_all(&paths, false);
        assert_eq!(found.objects, ["a", "was"]);
        let said = [
            (Severity::Warning, "m/b.yaml is skipped: it is a FIFO, and only regular files are read".to_owned()),
            (Severity::Error, "cannot read named.yaml: it is a FIFO, and only regular files are read".to_owned()),
        ];
        assert_eq!(found.problems, said);
        fs::remove_file(world.path("m/was.yaml")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(world.path("m/was.yaml")).status().unwrap();
        assert!(made.success());
        let found = world.read();
        assert_eq!((found.objects, found.held), (owned_names(&["a", "was"]), owned(&[("m/was.yaml", true)])));
    }

    #[test]
    fn what_cannot_be_read_any_more_stays() {
        let mut world = World::new();
        fs::create_dir(world.path("m/sub")).unwrap();
        world.put("m/a.yaml", &["a"]);
        world.put("m/sub/b.yaml", &["b"]);
        world.put("long.yaml", &["long"]);
        let paths = ["m", "long.yaml"];
        assert_eq!(world.read_all(&paths, false).objects, ["a", "b", "long"]);
        fs::rename(world.path("m"), world.path("away")).unwrap();
        File::options().write(true).open(world.path("long.yaml")).unwrap().set_len(file::MAX_BYTES + 1).unwrap();
        for _ in 0..2 {
            let found = world.read_all(&paths, false);
            assert_eq!(found.objects, ["a", "b", "long"]);
            assert_eq!(found.held, owned(&[("m/a.yaml", true), ("m/sub/b.yaml", true), ("long.yaml", true)]));
        }
        fs::rename(world.path("away"), world.path("m")).unwrap();
        let found = world.read();
        assert_eq!((found.objects, found.held.len()), (owned_names(&["a", "b"]), 0));
        // A link that leads nowhere is none that was removed.
        fs::remove_file(world.path("m/a.yaml")).unwrap();
        std::os::unix::fs::symlink("none", world.path("m/a.yaml")).unwrap();
        assert_eq!(world.read().held, owned(&[("m/a.yaml", true)]));
        // Who never had a text has none.
        let found = World::new().read_all(&["none"], false);
        assert!(found.problems[0].1.starts_with("cannot read none: ") && found.problems[0].0 == Severity::Error);
    }

    #[test]
    fn texts_of_an_earlier_run_stand_for_what_is_lost() {
        let mut world = World::new();
        for name in ["a", "gone", "written", "empty"] {
            world.put(&format!("m/{name}.yaml"), &[name]);
        }
        let texts = ["a", "gone", "written", "empty", "removed"];
        let texts = texts.map(|name| (world.path(&format!("m/{name}.yaml")), text(&[&format!("old-{name}")])));
        let texts: Vec<_> = texts.into_iter().chain([(world.path("none/x.yaml"), text(&["x"]))]).collect();
        let remembered = world.library.remember(texts, &mut Problems::default());
        assert_eq!(names(&remembered).len(), 6);
        fs::remove_file(world.path("m/gone.yaml")).unwrap();
        std::os::unix::fs::symlink("nowhere", world.path("m/gone.yaml")).unwrap();
        fs::write(world.path("m/empty.yaml"), "").unwrap();
        let _file = File::create(world.path("m/written.yaml")).unwrap();
        let begin = Instant::now();
        let found = world.read_all(&["m", "none"], false);
        assert!(begin.elapsed() < PATIENCE);
        assert_eq!(found.objects, ["a", "old-empty", "old-gone", "old-written", "x"]);
        let held = ["m/empty.yaml", "m/gone.yaml", "m/written.yaml", "none/x.yaml"].map(|name| (name, true));
        assert_eq!(found.held, owned(&held));
        assert!(
            found
                .problems
                .iter()
                .all(|(_, why)| why.ends_with("; the text that an earlier run had in force stands for it"))
        );
    }
}
