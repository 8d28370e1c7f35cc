//! A resource as it stands in a text.

use std::{ops::Deref, sync::Arc};

use serde::de::DeserializeOwned;

use super::{
    at::{At, Reporter, Reread},
    identity::{Identity, ObjectId},
    kubernetes::known_besides,
    made::{Fact, Made},
    piece::Form,
    replay,
};
use crate::text::{
    Problems, Source, Span,
    tree::{self, Node, Value},
    typed,
};

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

/// What a resource says: the same as long as its text is, whatever is around it. It derefs to what the resource is called.
#[derive(Debug)]
pub struct Content<T> {
    pub(super) identity: Arc<Identity>,
    /// The value.
    pub value: T,
    /// Where it begins in its piece of text.
    pub(super) start: u32,
    /// Parts of it were dropped when its value was read.
    pub(super) is_faulty: bool,
    pub(super) made: Made,
}

impl<T> Content<T> {
    /// "namespace/name".
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// What messages call it: "Service default/web".
    pub fn subject(&self) -> String {
        self.identity.id().to_string()
    }
}

impl<T> Deref for Content<T> {
    type Target = ObjectId;

    fn deref(&self) -> &ObjectId {
        self.identity.id()
    }
}

/// A piece of text, where it is now.
#[derive(Clone, Debug)]
pub struct InText {
    /// The text.
    pub source: Arc<Source>,
    /// The piece in it.
    pub piece: Span,
    /// What the piece is.
    pub form: Form,
}

impl InText {
    /// Where the piece begins, in the text of that number.
    pub fn base(&self, file: u32) -> Base {
        Base { file, offset: self.piece.start }
    }
}

/// A resource at its place.
#[derive(Debug)]
pub struct Object<T> {
    content: Arc<Content<T>>,
    text: InText,
    base: Base,
    /// Its number in [`Manifests`](super::Manifests).
    pub origin: u32,
}

impl<T> Clone for Object<T> {
    fn clone(&self) -> Self {
        Self { content: Arc::clone(&self.content), text: self.text.clone(), base: self.base, origin: self.origin }
    }
}

/// What objects are read as.
pub trait Readable: DeserializeOwned + Send + Sync {}

impl<T: DeserializeOwned + Send + Sync> Readable for T {}

/// Drops those parts of a tree that cannot be read as a `T`, without a word.
fn drop_faulty<T: Readable>(node: &Node) {
    let _: Option<T> = typed::read_part(node, "", known_besides, |_, _| None, &mut Problems::default());
}

impl<T: Readable> Reread for Object<T> {
    fn reread(&self) -> Option<Arc<Node>> {
        let InText { source, piece, form } = &self.text;
        if source.objects().is_some() {
            return None;
        }
        let tree = form.reread(source, *piece)?;
        if self.content.is_faulty
            && let Some(node) = self.object(&tree)
        {
            // The same parts are dropped as were then; what there is to say was said.
            tree::on_reader_thread(|| drop_faulty::<T>(node)).ok()?;
        }
        Some(tree)
    }

    fn object<'n>(&self, tree: &'n Node) -> Option<&'n Node> {
        find(tree, self.content.start)
    }
}

/// The object that begins at `start`, which is the tree or an item of a list in it.
fn find(tree: &Node, start: u32) -> Option<&Node> {
    let items = match (&tree.value, tree.get("items").map(|items| &items.value)) {
        (Value::List(items), _) | (_, Some(Value::List(items))) => items.as_slice(),
        _ => return (tree.span.start == start).then_some(tree),
    };
    // Items stand in order, but for those that are aliases of an anchor.
    let before = items.partition_point(|item| item.span.start <= start);
    let near = items[..before].last().and_then(|item| find(item, start));
    near.or_else(|| items.iter().find_map(|item| find(item, start)))
}

impl<T> Object<T> {
    pub(super) fn new(content: Arc<Content<T>>, text: InText, base: Base, origin: u32) -> Self {
        Self { content, text, base, origin }
    }

    /// This one, at the same place, with another value.
    pub fn changed(&self, change: impl FnOnce(&mut T)) -> Self
    where
        T: Clone,
    {
        let Content { identity, value, start, is_faulty, .. } = &*self.content;
        let (identity, mut value) = (Arc::clone(identity), value.clone());
        change(&mut value);
        let content = Content { identity, value, start: *start, is_faulty: *is_faulty, made: Made::default() };
        Self::new(Arc::new(content), self.text.clone(), self.base, self.origin)
    }

    /// What it says; the same one at every load for as long as its text is unchanged.
    pub fn content(&self) -> &Arc<Content<T>> {
        &self.content
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
            let object = Self::new(Arc::clone(&self.content), self.text.clone(), Base::default(), self.origin);
            let value = make(&object, &mut problems);
            Fact { value, findings: problems.diagnostics().into() }
        });
        replay(&fact.findings, self.base, problems);
        &fact.value
    }

    /// Where the piece of text begins that it was read from.
    pub fn base(&self) -> Base {
        self.base
    }

    /// A reporter whose messages begin with this object's name.
    pub fn reporter<'a>(&'a self, problems: &'a mut Problems) -> Reporter<'a> {
        Reporter::on(problems, self.content.identity.id())
    }
}

impl<T: Readable> Object<T> {
    /// The place of the whole object.
    pub fn at(&self) -> At<'_> {
        match self.text.source.objects() {
            Some(objects) => At::in_object(&**objects, self.content.is_faulty, self.base),
            None => At::in_text(self, self.base),
        }
    }

    /// Its tree, read once more.
    pub fn tree<R>(&self, look: impl FnOnce(&Node) -> R) -> Option<R> {
        let tree = self.reread()?;
        self.object(&tree).map(look)
    }
}

impl<T> Deref for Object<T> {
    type Target = Content<T>;

    fn deref(&self) -> &Content<T> {
        &self.content
    }
}
