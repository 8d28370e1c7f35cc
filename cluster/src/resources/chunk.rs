//! The objects of one text at their places of now, shared from load to load.
//!
//! A load looks at what has changed, not at all that is there. What a text holds is laid out once ([`Chunk`]), and the same chunk serves
//! every load for which text and number are the same. Whether anything has changed is then a comparison of pointers.

use std::{
    collections::{BTreeMap, BTreeSet},
    slice,
    sync::Arc,
};

use super::{
    Denying, Origin, Substitute,
    identity::ObjectId,
    object::{Base, InText, Object},
    piece::{Item, Lists},
    pieces::Pieces,
    replay,
};
use crate::text::{Diagnostic, Problems, Span};

/// Objects of one kind, in the order of reading.
pub struct List<'m, T: 'm> {
    pub(super) chunks: &'m [Arc<Chunk>],
    pub(super) of: fn(&Lists) -> &Vec<Object<T>>,
}

impl<T> Clone for List<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for List<'_, T> {}

impl<'m, T> List<'m, T> {
    /// All of them.
    pub fn iter(self) -> Iter<'m, T> {
        Iter { chunks: self.chunks.iter(), of: self.of, current: [].iter() }
    }

    /// How many there are.
    pub fn len(self) -> usize {
        self.chunks.iter().map(|chunk| (self.of)(&chunk.lists).len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.chunks.iter().all(|chunk| (self.of)(&chunk.lists).is_empty())
    }
}

impl<'m, T> IntoIterator for List<'m, T> {
    type Item = &'m Object<T>;
    type IntoIter = Iter<'m, T>;

    fn into_iter(self) -> Iter<'m, T> {
        self.iter()
    }
}

/// Goes through a [`List`].
pub struct Iter<'m, T: 'm> {
    chunks: slice::Iter<'m, Arc<Chunk>>,
    of: fn(&Lists) -> &Vec<Object<T>>,
    current: slice::Iter<'m, Object<T>>,
}

impl<T> Clone for Iter<'_, T> {
    fn clone(&self) -> Self {
        Self { chunks: self.chunks.clone(), of: self.of, current: self.current.clone() }
    }
}

impl<'m, T> Iterator for Iter<'m, T> {
    type Item = &'m Object<T>;

    fn next(&mut self) -> Option<&'m Object<T>> {
        loop {
            if let Some(object) = self.current.next() {
                return Some(object);
            }
            self.current = (self.of)(&self.chunks.next()?.lists).iter();
        }
    }
}

/// What differs between two loads of the same texts.
pub(crate) struct Changes<'m> {
    /// The texts with other objects, or the same ones at other places: before and now.
    pub(super) chunks: Vec<(&'m Chunk, &'m Chunk)>,
}

impl<'m> Changes<'m> {
    /// The lists, by name, that have other objects. Policies that deny what they select, as they cannot be read, are one.
    pub(crate) fn lists(&self) -> BTreeSet<&'static str> {
        let mut lists = BTreeSet::new();
        for (before, after) in &self.chunks {
            lists.extend(after.lists.changed(&before.lists));
            let [were, are] = [before, after].map(|chunk| chunk.denying.iter().map(|one| one.origin));
            // What one selects is only its object's, and that has another content or role.
            if before.roles != after.roles || !were.eq(are) {
                lists.insert("denying");
            }
        }
        lists
    }

    /// The texts with such, by number.
    pub(crate) fn has_file(&self, file: u32) -> bool {
        self.chunks.iter().any(|(_, after)| after.file == file)
    }

    /// The lists of one kind, before and now, that have other objects or the same ones at other places.
    pub(crate) fn of<T: 'm>(
        &self,
        of: fn(&Lists) -> &Vec<Object<T>>,
    ) -> impl Iterator<Item = (&'m [Object<T>], &'m [Object<T>])> {
        self.chunks.iter().map(move |(before, after)| (&**of(&before.lists), &**of(&after.lists)))
    }
}

/// What an object of a text is in a load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// It stands for itself.
    Itself,
    /// It cannot be read, and this stands for it.
    Replaced(Substitute),
    /// It is passed over, as it is given in this version too.
    Older(u8),
    /// It is none of the load's.
    Absent,
}

/// What the objects of a text are in a load.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Roles {
    /// Of those that are not named.
    pub(super) others: Role,
    /// By position in the text, sorted.
    pub(super) named: Vec<(u32, Role)>,
}

impl Roles {
    /// Each stands for itself.
    pub(super) const PLAIN: Self = Self { others: Role::Itself, named: Vec::new() };

    /// That of the object at a position in the text.
    pub(super) fn of(&self, position: u32) -> Role {
        let named = self.named.binary_search_by_key(&position, |(named, _)| *named);
        named.map_or(self.others, |index| self.named[index].1)
    }
}

/// The objects of one text at their places.
#[derive(Clone, Debug)]
pub struct Chunk {
    pub(super) pieces: Arc<Pieces>,
    /// The text's number.
    pub(super) file: u32,
    pub(super) roles: Roles,
    pub(super) placements: Box<[Placement]>,
    pub(super) lists: Lists,
    /// Policies that could not be read and deny what they select.
    pub(super) denying: Vec<Denying>,
    /// What there is to say.
    pub(super) findings: Vec<Diagnostic>,
    /// How many objects of each kind are in force.
    pub(super) counts: BTreeMap<&'static str, usize>,
}

/// An object of a text.
#[derive(Clone, Debug)]
pub(super) struct Placement {
    pub(super) item: Arc<Item>,
    /// The number of its identity.
    pub(super) number: u32,
    /// Where its piece begins.
    offset: u32,
    /// What stands for it instead of itself.
    pub(super) substitute: Option<Substitute>,
}

impl Placement {
    pub(super) fn id(&self) -> &ObjectId {
        self.item.identity.id()
    }

    /// Whether its own version or an earlier one is not in force by another placement.
    pub(super) fn is_in_force(&self) -> bool {
        self.substitute != Some(Substitute::LastGood)
    }
}

impl Chunk {
    /// The objects of a text; with what there is to say of its pieces, if `tells` of them.
    pub(super) fn new(pieces: &Arc<Pieces>, file: u32, roles: Roles, tells: bool) -> Self {
        let mut chunk = Self {
            pieces: Arc::clone(pieces),
            file,
            roles,
            placements: Box::default(),
            lists: Lists::default(),
            denying: Vec::new(),
            findings: Vec::new(),
            counts: BTreeMap::new(),
        };
        let mut placements = Vec::new();
        let mut position = 0;
        let mut has_template = false;
        for (text, piece) in pieces.iter() {
            let base = text.base(file);
            // Once for each text.
            if tells && !(piece.is_template && has_template) {
                replay(&piece.findings, base, &mut chunk.findings);
                has_template |= piece.is_template;
            }
            for item in &piece.items {
                let role = chunk.roles.of(position);
                position += 1;
                match role {
                    Role::Itself => chunk.place(item, &text, base, None, &mut placements),
                    Role::Replaced(by) => chunk.place(item, &text, base, Some(by), &mut placements),
                    Role::Older(newest) => chunk.pass_over(item, newest, base),
                    Role::Absent => {}
                }
            }
        }
        chunk.placements = placements.into();
        chunk.lists.shrink_to_fit();
        chunk.findings.shrink_to_fit();
        chunk
    }

    fn place(
        &mut self,
        item: &Arc<Item>,
        text: &InText,
        base: Base,
        substitute: Option<Substitute>,
        placements: &mut Vec<Placement>,
    ) {
        let number = item.identity.number();
        let placement = Placement { item: Arc::clone(item), number, offset: base.offset, substitute };
        if placement.is_in_force() {
            *self.counts.entry(placement.id().kind).or_default() += 1;
        }
        placements.push(placement);
        match substitute {
            Some(Substitute::LastGood) => {}
            Some(Substitute::Nothing) => self.denying.extend(item.subject.as_ref().map(|subject| Denying {
                origin: number,
                id: item.identity.id().clone(),
                subject: (**subject).clone(),
            })),
            None => {
                replay(&item.findings, base, &mut self.findings);
                if let Some(body) = &item.body {
                    body.place(text.clone(), base, number, &mut self.lists);
                }
            }
        }
    }

    fn pass_over(&mut self, item: &Item, newest: u8, base: Base) {
        let [counts, passed_over] = [newest, item.version].map(|version| item.kind.versions[usize::from(version)]);
        let id = item.identity.id();
        let mut problems = Problems::default();
        let message = format!("{id}: its {passed_over} is passed over, as its {counts} is here too");
        problems.note(base.place(item.name), message);
        self.findings.extend(problems.diagnostics().iter().cloned());
    }

    fn base(&self, placement: &Placement) -> Base {
        Base { file: self.file, offset: placement.offset }
    }

    /// The place of an object's name.
    pub(super) fn name(&self, placement: &Placement) -> Span {
        self.base(placement).place(placement.item.name)
    }

    /// The place of the whole of an object.
    pub(super) fn extent(&self, placement: &Placement) -> Span {
        self.base(placement).place(placement.item.extent)
    }

    /// What messages call an object.
    pub(super) fn origin(&self, placement: &Placement) -> Origin {
        let ObjectId { kind, namespace, name, .. } = placement.id().clone();
        let source = self.pieces.source();
        let (file, line) = match source.objects() {
            Some(objects) => (objects.object(placement.offset), 0),
            None => (source.name().to_owned(), source.line_column(placement.offset + placement.item.start).0),
        };
        let namespace = Some(namespace.to_string()).filter(|namespace| !namespace.is_empty());
        Origin { kind, namespace, name: name.to_string(), file, line }
    }

    /// Numbers the objects of the text in their order, those that are absent too.
    pub(super) fn items(pieces: &Pieces) -> impl Iterator<Item = (u32, &Arc<Item>)> {
        (0..).zip(pieces.iter().flat_map(|(_, piece)| &piece.items))
    }
}
