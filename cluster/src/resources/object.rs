//! A resource as it stands in a text.

use std::{ops::Deref, sync::Arc};

use super::{
    at::{At, Reporter},
    made::{Fact, Made},
    replay,
};
use crate::text::{Problems, Span, tree::Node};

/// Where a piece of text begins, from which the places in it are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// The text's number, see [`Problems::source`].
    pub file: u32,
    /// The piece's first byte in it.
    pub offset: u32,
}

impl Base {
    /// A place in the piece as one in the text.
    pub fn place(self, span: Span) -> Span {
        Span { file: self.file, start: span.start + self.offset, end: span.end + self.offset }
    }
}

/// What a resource says: the same as long as its text is, whatever is around it. Places in it are counted from the beginning of the
/// piece of text that it was read from.
#[derive(Debug)]
pub struct Content<T> {
    /// What messages call it: "Service default/web".
    pub subject: String,
    /// Its namespace; empty for kinds without.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The value.
    pub value: T,
    /// The tree.
    pub node: Node,
    pub(super) made: Made,
}

impl<T> Content<T> {
    /// "namespace/name".
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// A resource at its place.
#[derive(Debug)]
pub struct Object<T> {
    content: Arc<Content<T>>,
    base: Base,
    /// Its number in [`Objects`](super::Objects).
    pub origin: u32,
}

impl<T> Object<T> {
    pub(super) fn new(content: Arc<Content<T>>, base: Base, origin: u32) -> Self {
        Self { content, base, origin }
    }

    /// This one, at the same place, with another value.
    pub fn changed(&self, change: impl FnOnce(&mut T)) -> Self
    where
        T: Clone,
    {
        let Content { subject, namespace, name, value, node, .. } = &*self.content;
        let mut value = value.clone();
        change(&mut value);
        let (subject, namespace, name) = (subject.clone(), namespace.clone(), name.clone());
        let content = Content { subject, namespace, name, value, node: node.clone(), made: Made::default() };
        Self::new(Arc::new(content), self.base, self.origin)
    }

    /// What it says; the same one at every load for as long as its text is unchanged.
    pub fn content(&self) -> &Arc<Content<T>> {
        &self.content
    }

    /// The place of the whole object.
    pub fn at(&self) -> At<'_> {
        At::in_piece(&self.content.node, self.base)
    }

    /// What `make` makes of this object alone: made once, and then what there was to report is reported again at each call. Places in
    /// it are counted from [`Object::base`]. There is one value of each type.
    pub fn made<F: Send + Sync + 'static>(
        &self,
        problems: &mut Problems,
        make: impl FnOnce(&Self, &mut Problems) -> F,
    ) -> &F {
        let fact = self.content.made.get(|| {
            let mut problems = Problems::default();
            // The number is the same as long as any version of the object is in use.
            let object = Self::new(Arc::clone(&self.content), Base::default(), self.origin);
            let value = make(&object, &mut problems);
            Fact { value, findings: problems.diagnostics().to_vec() }
        });
        replay(&fact.findings, self.base, problems);
        &fact.value
    }

    /// Where the piece of text begins that it was read from.
    pub fn base(&self) -> Base {
        self.base
    }

    /// A reporter whose messages begin with this object's name.
    pub fn reporter<'a>(&self, problems: &'a mut Problems) -> Reporter<'a> {
        Reporter::new(problems, self.content.subject.clone())
    }
}

impl<T> Deref for Object<T> {
    type Target = Content<T>;

    fn deref(&self) -> &Content<T> {
        &self.content
    }
}
