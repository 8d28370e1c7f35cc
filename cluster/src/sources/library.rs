//! The texts of the manifests, kept from load to load: what did not change is not read again.
//!
//! # Theory
//! A file whose stamp (device, inode, size, times) is as it was is taken as it was, without opening it. A file that was changed so shortly
//! before it was read that another change could have left the same stamp is read again and compared. Of a changed text,
//! those pieces are read (see [`crate::resources::piece`]) that it did not hold before, wherever in it they stood.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    num::NonZero,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use crate::{
    resources::{
        Identities,
        object::InText,
        piece::{Form, Piece, list_items},
    },
    sources::watch::Stamp,
    text::{Problems, Source, Span, tree},
};

/// How old a file's last change must be for its stamp to tell it from any later one: several times the tick of coarse file times.
const SETTLED: Duration = Duration::from_millis(100);

/// The texts that were read last.
#[derive(Debug, Default)]
pub struct Library {
    identities: Identities,
    kept: HashMap<PathBuf, Arc<Text>>,
}

/// A text with its pieces.
#[derive(Debug)]
struct Text {
    source: Arc<Source>,
    /// `None` where the same stamp may come to stand for another text.
    stamp: Option<Stamp>,
    pieces: Vec<(Form, Span, Arc<Piece>)>,
}

/// What was read at one load, in order.
#[derive(Debug, Default)]
pub struct Texts {
    /// The files and folders: what to watch.
    pub files: Vec<PathBuf>,
    texts: Vec<(u32, Arc<Text>)>,
}

impl Texts {
    /// All pieces, each with the number of its text and where it is in that.
    pub fn pieces(&self) -> impl Iterator<Item = (u32, InText, &Piece)> + Clone {
        self.texts.iter().flat_map(|(file, text)| {
            text.pieces.iter().map(move |(form, span, piece)| {
                (*file, InText { source: Arc::clone(&text.source), piece: *span, form: *form }, &**piece)
            })
        })
    }
}

impl Library {
    /// Reads all files and folders, but what did not change since the last time. `spans` says where weir.yaml, which is `config`,
    /// names each; what cannot be read is reported.
    pub fn read(&mut self, paths: &[PathBuf], spans: &[Span], config: &Path, problems: &mut Problems) -> Texts {
        let mut reader = Reader { library: self, kept: HashMap::new(), texts: Texts::default(), seen: BTreeSet::new() };
        // weir.yaml may lie in the folder that it names.
        reader.seen.extend(config.canonicalize());
        let outcome = tree::on_reader_thread(|| {
            for (index, path) in paths.iter().enumerate() {
                reader.path(path, spans.get(index).copied().unwrap_or_default(), true, problems);
            }
            let Reader { kept, texts, .. } = reader;
            (kept, texts)
        });
        match outcome {
            Ok((kept, texts)) => {
                // What no path leads to any more is forgotten.
                self.kept = kept;
                self.identities.names.tidy();
                texts
            }
            Err(error) => {
                problems.error(Span::default(), format!("there is no thread to read manifests with: {error}"), None);
                Texts { files: paths.to_vec(), ..Texts::default() }
            }
        }
    }

    /// An empty one that numbers objects as this one does.
    #[cfg(test)]
    pub fn afresh(&self) -> Self {
        Self { identities: self.identities.clone(), ..Self::default() }
    }

    /// Adds one text, under the name that diagnostics give it.
    #[cfg(test)]
    pub fn add_text(&mut self, name: &str, text: String, texts: &mut Texts, problems: &mut Problems) {
        let before = self.kept.get(Path::new(name)).cloned();
        let source = Source::new(name, text);
        let text = tree::on_reader_thread(|| Text::read(source, None, before.as_deref(), &self.identities));
        let text = Arc::new(text.expect("there are threads in tests"));
        self.kept.insert(name.into(), Arc::clone(&text));
        texts.texts.push((problems.share_source(Arc::clone(&text.source)), text));
    }
}

impl Text {
    /// Reads the pieces that were not there `before`.
    fn read(source: Source, stamp: Option<Stamp>, before: Option<&Self>, identities: &Identities) -> Self {
        let before: HashMap<(Form, &str), &Arc<Piece>> = before.map_or_else(HashMap::new, |before| {
            let pieces = before.pieces.iter();
            pieces.map(|(form, span, piece)| ((*form, before.source.slice(*span)), piece)).collect()
        });
        let whole = source.text();
        let cut: Vec<(Range<usize>, Vec<Range<usize>>)> = tree::document_ranges(whole)
            .into_iter()
            .map(|document| {
                let items = list_items(&whole[document.clone()]).unwrap_or_default();
                let in_text = |item: Range<usize>| item.start + document.start..item.end + document.start;
                let items = items.into_iter().map(in_text).collect();
                (document, items)
            })
            .collect();
        let known =
            |form: Form, range: &Range<usize>| before.get(&(form, &whole[range.clone()])).copied().map(Arc::clone);
        let wanted = cut.iter().flat_map(|(document, items)| {
            let whole = items.is_empty().then_some((Form::Document, document));
            whole.into_iter().chain(items.iter().map(|item| (Form::ListItem, item)))
        });
        let unknown: Vec<(Form, &str)> = wanted
            .filter(|(form, range)| known(*form, range).is_none())
            .map(|(form, range)| (form, &whole[range.clone()]))
            .collect();
        let mut read = read_all(&unknown, identities).into_iter();
        let mut piece = |form: Form, range: &Range<usize>| {
            let piece = known(form, range).or_else(|| read.next().flatten())?;
            Some((form, Span { file: 0, start: range.start as u32, end: range.end as u32 }, piece))
        };
        let mut pieces = Vec::new();
        for (document, items) in &cut {
            // All of them are taken out of what was read, also if one of them is no list item by itself.
            let items: Vec<_> = items.iter().map(|item| piece(Form::ListItem, item)).collect();
            match items.into_iter().collect::<Option<Vec<_>>>() {
                Some(items) if !items.is_empty() => pieces.extend(items),
                Some(_) => pieces.extend(piece(Form::Document, document)),
                None => {
                    let range = Span { file: 0, start: document.start as u32, end: document.end as u32 };
                    let known = known(Form::Document, document);
                    let read = || Piece::read(Form::Document, &whole[document.clone()], identities).map(Arc::new);
                    pieces.extend(known.or_else(read).map(|piece| (Form::Document, range, piece)));
                }
            }
        }
        pieces.shrink_to_fit();
        Self { source: Arc::new(source), stamp, pieces }
    }
}

/// Texts of fewer bytes are read by one thread: another would take as long to begin.
const SHARE_BYTES: usize = 32 << 10;

/// Reads pieces of text, in their order, on as many threads as there are cores if there is enough to read. Call it within
/// [`tree::on_reader_thread`].
fn read_all(pieces: &[(Form, &str)], identities: &Identities) -> Vec<Option<Arc<Piece>>> {
    let read = |(form, text): &(Form, &str)| Piece::read(*form, text, identities).map(Arc::new);
    let bytes: usize = pieces.iter().map(|(_, text)| text.len()).sum();
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let shares = cores.min(bytes / SHARE_BYTES).max(1);
    let per_share = pieces.len().div_ceil(shares).max(1);
    let mut parts = pieces.chunks(per_share);
    let own = parts.next().unwrap_or_default();
    thread::scope(|scope| {
        let others: Vec<_> = parts
            .map(|part| (part, tree::spawn_reader(scope, move || part.iter().map(read).collect::<Vec<_>>())))
            .collect();
        let mut all: Vec<_> = own.iter().map(read).collect();
        for (part, other) in others {
            match other {
                Ok(other) => all.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
                // There is no thread for it: this one reads it.
                Err(_) => all.extend(part.iter().map(read)),
            }
        }
        all
    })
}

/// Goes through files and folders.
struct Reader<'l> {
    library: &'l Library,
    kept: HashMap<PathBuf, Arc<Text>>,
    texts: Texts,
    /// Each file once, however it is named.
    seen: BTreeSet<PathBuf>,
}

impl Reader<'_> {
    /// Reads a file, or a folder with its subfolders. What a folder holds is read in the order of names, and only what
    /// is called *.yaml, *.yml or *.json; hidden entries are left out (a mounted ConfigMap has such links).
    fn path(&mut self, path: &Path, span: Span, named: bool, problems: &mut Problems) {
        let shown = path.display();
        self.texts.files.push(path.to_owned());
        let canonical = match path.canonicalize() {
            Ok(canonical) => canonical,
            Err(error) => {
                let help = "paths are relative to the folder of weir.yaml".to_owned();
                return problems.error(span, format!("cannot read {shown}: {error}"), help);
            }
        };
        if !self.seen.insert(canonical) {
            self.texts.files.pop();
            return;
        }
        if !path.is_dir() {
            return self.file(path, span, problems);
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
            self.path(&path, span, false, problems);
        }
    }

    fn file(&mut self, path: &Path, span: Span, problems: &mut Problems) {
        let shown = path.display().to_string();
        let before = self.library.kept.get(path);
        // The stamp comes first: what is written while the file is read has another.
        let read = fs::metadata(path).map(|metadata| Stamp::of(&metadata)).and_then(|stamp| {
            let is_known = before.is_some_and(|before| before.stamp == Some(stamp));
            let bytes = if is_known { None } else { Some(fs::read(path)?) };
            Ok((Some(stamp).filter(|stamp| stamp.is_older_than(SETTLED)), bytes))
        });
        let text = match (read, before) {
            (Err(error), _) => return problems.error(span, format!("cannot read {shown}: {error}"), None),
            (Ok((_, None)), Some(before)) => Arc::clone(before),
            (Ok((stamp, bytes)), before) => {
                let bytes = bytes.unwrap_or_default();
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
                Arc::new(match before.filter(|before| before.source.text() == text) {
                    Some(before) => Text { source: Arc::clone(&before.source), stamp, pieces: before.pieces.clone() },
                    None => Text::read(Source::new(shown, text), stamp, before.map(|b| &**b), &self.library.identities),
                })
            }
        };
        self.texts.texts.push((problems.share_source(Arc::clone(&text.source)), Arc::clone(&text)));
        self.kept.insert(path.to_owned(), text);
    }
}
