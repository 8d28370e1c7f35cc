//! Places inside a resource, for messages about values that were read into types already.

use super::object::Base;
use crate::text::{
    Problems, Span, Topic,
    tree::{Node, Value},
};

/// A place in a resource's tree: where a value stands, or, where it is left out, what it is missing from.
#[derive(Clone, Copy, Debug)]
pub struct At<'t> {
    node: &'t Node,
    /// As the tree counts it.
    span: Span,
    base: Base,
    exact: bool,
}

impl<'t> At<'t> {
    /// The place of a whole tree, as the tree counts it.
    pub fn root(node: &'t Node) -> Self {
        Self::in_piece(node, Base { file: node.span.file, offset: 0 })
    }

    /// The place of a whole tree that was read from the piece of text at `base`.
    pub fn in_piece(node: &'t Node, base: Base) -> Self {
        Self { node, span: node.span, base, exact: true }
    }

    /// The value under a key. Objects and lists are shown by their key.
    pub fn key(self, key: &str) -> Self {
        match self.node.entry(key).filter(|_| self.exact) {
            Some((key, node)) => {
                let by_key = matches!(node.value, Value::Map(_) | Value::List(_) | Value::Null);
                Self { node, span: if by_key { key.span } else { node.span }, ..self }
            }
            None => Self { exact: false, ..self },
        }
    }

    /// The key itself, where it is there.
    pub fn name_of(self, key: &str) -> Self {
        match self.node.entry(key).filter(|_| self.exact) {
            Some((key, node)) => Self { node, span: key.span, ..self },
            None => Self { exact: false, ..self },
        }
    }

    /// An item of a list, counted as the typed list counts them.
    pub fn item(self, index: usize) -> Self {
        match self.node.items().nth(index).filter(|_| self.exact) {
            Some(node) => Self { node, span: node.span, ..self },
            None => Self { exact: false, ..self },
        }
    }

    /// The place in its file.
    pub fn span(self) -> Span {
        self.base.place(self.span)
    }

    /// Whether the value is missing only because it was at fault, which is reported already.
    fn follows_from_fault(self) -> bool {
        !self.exact && self.node.has_dropped()
    }
}

/// Reports on one resource, whose name begins every message.
pub struct Reporter<'a> {
    problems: &'a mut Problems,
    subject: String,
}

impl<'a> Reporter<'a> {
    /// Reports on the resource that people call `subject`.
    pub fn new(problems: &'a mut Problems, subject: String) -> Self {
        Self { problems, subject }
    }

    /// An error at a place.
    pub fn error(&mut self, at: At<'_>, message: impl std::fmt::Display, help: impl Into<Option<String>>) {
        if !at.follows_from_fault() {
            self.problems.error(at.span(), format!("{}: {message}", self.subject), help);
        }
    }

    /// An error about a contract field that weir does not enforce yet.
    pub fn not_implemented(&mut self, at: At<'_>, what: impl std::fmt::Display) {
        let help = "not implemented yet: weir would not enforce it".to_owned();
        self.error(at, format_args!("{what} is not implemented yet"), help);
    }

    /// A warning at a place.
    pub fn warning(&mut self, at: At<'_>, message: impl std::fmt::Display, help: impl Into<Option<String>>) {
        if !at.follows_from_fault() {
            self.problems.warning(at.span(), format!("{}: {message}", self.subject), help);
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
