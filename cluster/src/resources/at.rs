//! Places inside a resource, for messages about values that were read into types already.

use std::sync::Arc;

use super::{identity::ObjectId, object::Base};
use crate::text::{
    Problems, Span, Topic, Untexted,
    tree::{self, Node, Value},
};

/// Steps of the longest way to a place that a message names.
const MAX_STEPS: usize = 14;

/// A place in a resource: where a value stands, or, where it is left out, what it is missing from.
///
/// It is a way, which costs nothing to write down. It is gone only when a message needs its end: then the resource's text, whose tree nobody
/// keeps, is read once more.
#[derive(Clone, Copy)]
pub struct At<'t> {
    root: Root<'t>,
    steps: [Step<'t>; MAX_STEPS],
    count: u8,
    base: Base,
}

#[derive(Clone, Copy)]
enum Root<'t> {
    Tree(&'t Node),
    Text(&'t dyn Reread),
    /// An object without a text, and whether parts of it were dropped.
    Untexted(&'t dyn Untexted, bool),
}

/// A text whose tree can be had again.
pub(super) trait Reread {
    /// The tree as it was when the text was first read, with the same parts dropped; `None` if it cannot be read, which is not so then.
    fn reread(&self) -> Option<Arc<Node>>;
    /// The object in it.
    fn object<'n>(&self, tree: &'n Node) -> Option<&'n Node>;
}

#[derive(Clone, Copy)]
enum Step<'t> {
    /// To the value under a key; by the key itself, where that is wanted.
    Key(&'t str, bool),
    /// To an item of a list.
    Item(usize),
}

/// Where a way ends.
struct End {
    span: Span,
    /// The value is missing only because it was at fault, which is reported already.
    follows_from_fault: bool,
}

impl<'t> At<'t> {
    /// The place of a whole tree, as the tree counts it.
    pub fn root(node: &'t Node) -> Self {
        Self::in_piece(node, Base { file: node.span.file, offset: 0 })
    }

    /// The place of a whole tree that was read from the piece of text at `base`.
    pub fn in_piece(node: &'t Node, base: Base) -> Self {
        Self { root: Root::Tree(node), steps: [Step::Item(0); MAX_STEPS], count: 0, base }
    }

    /// The place of a resource whose piece of text is at `base`.
    pub(super) fn in_text(text: &'t dyn Reread, base: Base) -> Self {
        Self { root: Root::Text(text), steps: [Step::Item(0); MAX_STEPS], count: 0, base }
    }

    /// The place of a resource without a text, of which parts were dropped or not.
    pub(super) fn in_object(objects: &'t dyn Untexted, has_dropped: bool, base: Base) -> Self {
        Self { root: Root::Untexted(objects, has_dropped), steps: [Step::Item(0); MAX_STEPS], count: 0, base }
    }

    fn step(mut self, step: Step<'t>) -> Self {
        // A longer way ends where it has no more room.
        if let Some(free) = self.steps.get_mut(usize::from(self.count)) {
            *free = step;
            self.count += 1;
        }
        self
    }

    /// The value under a key. Objects and lists are shown by their key.
    pub fn key(self, key: &'t str) -> Self {
        self.step(Step::Key(key, false))
    }

    /// The key itself, where it is there.
    pub fn name_of(self, key: &'t str) -> Self {
        self.step(Step::Key(key, true))
    }

    /// An item of a list, counted as the typed list counts them.
    pub fn item(self, index: usize) -> Self {
        self.step(Step::Item(index))
    }

    /// The place in its file.
    pub fn span(self) -> Span {
        self.end().span
    }

    fn end(&self) -> End {
        match self.root {
            Root::Tree(node) => self.end_in(node),
            Root::Untexted(objects, has_dropped) => {
                let end = objects.number(&self.path());
                // Which part that was nobody knows any more; the object is at fault, whatever else is wrong with it.
                End { span: self.base.place(Span { file: 0, start: 0, end }), follows_from_fault: has_dropped }
            }
            Root::Text(text) => {
                let tree = text.reread();
                let node = tree.as_ref().and_then(|tree| text.object(tree));
                node.map_or_else(
                    || End { span: self.base.place(Span::default()), follows_from_fault: false },
                    |node| self.end_in(node),
                )
            }
        }
    }

    fn path(&self) -> String {
        let mut path = String::new();
        for step in &self.steps[..usize::from(self.count)] {
            match step {
                Step::Key(key, _) => tree::push_key(&mut path, key),
                Step::Item(index) => tree::push_index(&mut path, *index),
            }
        }
        path
    }

    fn end_in(&self, root: &Node) -> End {
        let (mut node, mut span, mut exact) = (root, root.span, true);
        for step in &self.steps[..usize::from(self.count)] {
            let next = match step {
                Step::Key(key, by_key) => node.entry(key).map(|(key, node)| {
                    let by_key = *by_key || matches!(node.value, Value::Map(_) | Value::List(_) | Value::Null);
                    (node, if by_key { key.span } else { node.span })
                }),
                Step::Item(index) => node.items().nth(*index).map(|node| (node, node.span)),
            };
            let Some((next, place)) = next else {
                exact = false;
                break;
            };
            (node, span) = (next, place);
        }
        End { span: self.base.place(span), follows_from_fault: !exact && node.has_dropped() }
    }
}

/// Reports on one resource, whose name begins every message.
pub struct Reporter<'a> {
    problems: &'a mut Problems,
    subject: Called<'a>,
}

/// What messages call a resource; it costs nothing where there is no message.
enum Called<'a> {
    Object(&'a ObjectId),
    Other(String),
}

impl std::fmt::Display for Called<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Object(id) => id.fmt(f),
            Self::Other(name) => f.write_str(name),
        }
    }
}

impl<'a> Reporter<'a> {
    /// Reports on the resource that people call `subject`.
    pub fn new(problems: &'a mut Problems, subject: String) -> Self {
        Self { problems, subject: Called::Other(subject) }
    }

    /// Reports on an object.
    pub(super) fn on(problems: &'a mut Problems, id: &'a ObjectId) -> Self {
        Self { problems, subject: Called::Object(id) }
    }

    /// An error at a place.
    pub fn error(&mut self, at: At<'_>, message: impl std::fmt::Display, help: impl Into<Option<String>>) {
        let End { span, follows_from_fault } = at.end();
        if !follows_from_fault {
            self.problems.error(span, format!("{}: {message}", self.subject), help);
        }
    }

    /// An error about a contract field that weir does not enforce yet.
    pub fn not_implemented(&mut self, at: At<'_>, what: impl std::fmt::Display) {
        let help = "not implemented yet: weir would not enforce it".to_owned();
        self.error(at, format_args!("{what} is not implemented yet"), help);
    }

    /// A warning at a place.
    pub fn warning(&mut self, at: At<'_>, message: impl std::fmt::Display, help: impl Into<Option<String>>) {
        let End { span, follows_from_fault } = at.end();
        if !follows_from_fault {
            self.problems.warning(span, format!("{}: {message}", self.subject), help);
        }
    }

    /// A note at a place.
    pub fn note(&mut self, at: At<'_>, message: impl std::fmt::Display) {
        self.problems.note(at.span(), format!("{}: {message}", self.subject));
    }

    /// A note of which there may be many alike.
    pub fn note_on(&mut self, topic: Topic, at: At<'_>, message: impl std::fmt::Display) {
        self.problems.note_on(topic, at.span(), format!("{}: {message}", self.subject));
    }

    /// "file:line:column" of a place.
    pub fn place(&self, span: Span) -> String {
        self.problems.place(span)
    }

    /// The value of a reading that may fail with a fault and advice, which is reported.
    pub fn read<T>(
        &mut self,
        at: At<'_>,
        field: &str,
        value: Result<T, crate::text::address::AddressError>,
    ) -> Option<T> {
        value.map_err(|error| self.error(at, format_args!("{field}: {error}"), error.help())).ok()
    }
}
