//! What one text holds, read piece by piece: of a changed text, those pieces are read that it did not hold before, wherever in it
//! they stood.

use std::{num::NonZero, ops::Range, sync::Arc, thread};

use hashbrown::HashMap;

use super::{
    Identities, ObjectId,
    object::InText,
    piece::{Form, Piece, list_items},
};
use crate::text::{Source, Span, tree};

/// A text with its pieces. As long as the text is unchanged, it is the same one.
#[derive(Debug)]
pub struct Pieces {
    source: Arc<Source>,
    /// In their order, each with where it is.
    pieces: Vec<(Form, Span, Arc<Piece>)>,
    /// Whether an object of it may be given in another version too.
    has_versions: bool,
}

impl Pieces {
    /// Reads the pieces that were not there `before`. Call it within [`tree::on_reader_thread`].
    pub fn read(source: Source, before: Option<&Self>, identities: &Identities) -> Self {
        let before = before.map(|before| (before.source.text(), &before.pieces));
        let before: HashMap<(Form, &str), &Arc<Piece>> = before.as_ref().map_or_else(HashMap::new, |(text, pieces)| {
            let text_of = |span: &Span| text.get(span.range()).unwrap_or_default();
            pieces.iter().map(|(form, span, piece)| ((*form, text_of(span)), piece)).collect()
        });
        let whole = &*source.text();
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
        source.pack();
        let mut items = pieces.iter().flat_map(|(_, _, piece)| &piece.items);
        let has_versions = items.any(|item| item.kind.versions.len() > 1);
        Self { source: Arc::new(source), pieces, has_versions }
    }

    /// Objects without a text, each at its position.
    pub(super) fn of_objects(source: Source, objects: impl Iterator<Item = Arc<Piece>>) -> Self {
        let at = |position| Span { file: 0, start: position, end: position + 1 };
        let pieces = (0..).zip(objects).map(|(position, piece)| (Form::Document, at(position), piece)).collect();
        Self { source: Arc::new(source), pieces, has_versions: false }
    }

    /// This text without some objects; `None` where it has none of them.
    pub fn without(&self, is_gone: impl Fn(&ObjectId) -> bool) -> Option<Self> {
        let has_gone = |piece: &Piece| piece.items.iter().any(|item| is_gone(item.identity.id()));
        if !self.pieces.iter().any(|(_, _, piece)| has_gone(piece)) {
            return None;
        }
        let left = self.pieces.iter().map(|(form, span, piece)| {
            let piece = if has_gone(piece) { Arc::new(piece.without(&is_gone)) } else { Arc::clone(piece) };
            (*form, *span, piece)
        });
        Some(Self { source: Arc::clone(&self.source), pieces: left.collect(), has_versions: self.has_versions })
    }

    /// The objects in it, also those that cannot be read.
    pub fn ids(&self) -> impl Iterator<Item = &ObjectId> {
        self.pieces.iter().flat_map(|(_, _, piece)| &piece.items).map(|item| item.identity.id())
    }

    /// The text.
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether an object of it may be given in another version too.
    pub(super) fn has_versions(&self) -> bool {
        self.has_versions
    }

    /// The pieces, each with where it is.
    pub(super) fn iter(&self) -> impl Iterator<Item = (InText, &Arc<Piece>)> {
        let in_text =
            |form: &Form, piece: &Span| InText { source: Arc::clone(&self.source), piece: *piece, form: *form };
        self.pieces.iter().map(move |(form, span, piece)| (in_text(form, span), piece))
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
