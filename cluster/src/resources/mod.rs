//! Kubernetes and Calico resources read from YAML files.
//!
//! Every document becomes an [`Object`] of its kind: the typed value with the tree that it was read from, so that later
//! stages can point at the place of what they refuse. Kinds outside the contract are skipped with a note.

pub mod at;
pub mod calico;
mod chunk;
pub mod cluster_network_policy;
pub mod identity;
mod kinds;
pub mod kubernetes;
pub mod live;
mod made;
pub mod meta;
pub mod network_policy;
pub mod object;
mod piece;
pub mod pieces;
pub mod subject;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use self::{
    chunk::{Changes, Chunk, Placement, Role, Roles},
    kubernetes::{Pod, Service},
    piece::Item,
    pieces::Pieces,
};
use crate::text::{Diagnostic, Problems, Source, Span, tree};

pub use chunk::List;
pub use identity::{Identities, Identity, ObjectId};
pub use made::{Memo, Same};
pub use object::{Base, Content, InText, Object};
pub(crate) use piece::Lists;
pub use subject::Subject;

/// A policy that cannot be read and has no earlier version: it denies what it selects.
#[derive(Clone, Debug)]
pub struct Denying {
    /// Its number in [`Objects`].
    pub origin: u32,
    /// Its identity.
    pub id: ObjectId,
    /// What it selects.
    pub subject: Subject,
}

/// Where an object comes from: what messages, traces and metrics call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Its kind.
    pub kind: &'static str,
    /// Its namespace; `None` for kinds without.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// The file; of an object that no file has, its own name with its version.
    pub file: String,
    /// The line where it begins, from 1; 0 where there is no file.
    pub line: usize,
}

impl Origin {
    /// "file:line", or what stands for it.
    pub fn place(&self) -> String {
        if self.line == 0 { self.file.clone() } else { format!("{}:{}", self.file, self.line) }
    }
}

impl std::fmt::Display for Origin {
    /// "kind/namespace/name" or "kind/name".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{}/{namespace}/{}", self.kind, self.name),
            None => write!(f, "{}/{}", self.kind, self.name),
        }
    }
}

/// All objects, in the order of reading: by kind, and by the number that models and tables have for each. What did not change since the
/// load before is shared with it.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    chunks: Vec<Arc<Chunk>>,
    /// How many placements are in the chunks before each.
    starts: Vec<u32>,
    /// Which placement an object has, counted through all chunks, by its number; [`NOWHERE`] where it has none.
    by_number: Vec<u32>,
}

const NOWHERE: u32 = u32::MAX;

/// What stands for an object that cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Substitute {
    /// The last version that could be.
    LastGood,
    /// Nothing; a policy denies what it selects.
    Nothing,
}

/// The chunks of the last two calls of [`Manifests::of`], for the next one: where an object is at fault, each load makes two.
#[derive(Debug, Default)]
pub struct Chunks([Vec<Arc<Chunk>>; 2]);

impl Manifests {
    /// All objects of texts but for those in `passed_over`; `before` is what the load before has left, and gets what this one leaves.
    pub fn of<'p>(
        texts: impl Iterator<Item = (u32, &'p Arc<Pieces>)> + Clone,
        passed_over: &BTreeMap<ObjectId, Substitute>,
        before: &mut Chunks,
        problems: &mut Problems,
    ) -> Self {
        let newest = newest_versions(texts.clone().map(|(_, pieces)| pieces));
        let role = |item: &Item| match newest.get(item.identity.id()) {
            Some(newest) if *newest < item.version => Role::Older(*newest),
            _ => passed_over.get(item.identity.id()).map_or(Role::Itself, |by| Role::Replaced(*by)),
        };
        let is_plain = newest.is_empty() && passed_over.is_empty();
        let chunks = texts.enumerate().map(|(position, (file, pieces))| {
            let mut roles = Roles::PLAIN;
            if !is_plain {
                let all = Chunk::items(pieces).map(|(position, item)| (position, role(item)));
                roles.named = all.filter(|(_, role)| *role != Role::Itself).collect();
            }
            let is_same =
                |chunk: &&Arc<Chunk>| Arc::ptr_eq(&chunk.pieces, pieces) && chunk.file == file && chunk.roles == roles;
            match before.0.iter().filter_map(|chunks| chunks.get(position)).find(is_same) {
                Some(chunk) => Arc::clone(chunk),
                None => Arc::new(Chunk::new(pieces, file, roles, true)),
            }
        });
        let chunks: Vec<Arc<Chunk>> = chunks.collect();
        let [last, before_last] = &mut before.0;
        std::mem::swap(last, before_last);
        last.clone_from(&chunks);
        let mut manifests = Self::default();
        for chunk in chunks {
            manifests.add(chunk, problems);
        }
        manifests
    }

    /// Adds the objects of a text that no file holds, but for those in `passed_over`.
    pub fn add_text(
        &mut self,
        source: Source,
        identities: &Identities,
        passed_over: &BTreeMap<ObjectId, Substitute>,
        problems: &mut Problems,
    ) {
        let pieces = tree::on_reader_thread(|| Pieces::read(source, None, identities));
        let pieces = match pieces {
            Ok(pieces) => Arc::new(pieces),
            Err(error) => {
                let message = format!("there is no thread to read objects with: {error}");
                return problems.error(Span::default(), message, None);
            }
        };
        let file = problems.share_source(Arc::clone(pieces.source()));
        let named = Chunk::items(&pieces)
            .filter_map(|(position, item)| Some((position, Role::Replaced(*passed_over.get(item.identity.id())?))));
        let roles = Roles { others: Role::Itself, named: named.collect() };
        self.add(Arc::new(Chunk::new(&pieces, file, roles, true)), problems);
    }

    /// Adds objects as they were at an earlier load of the same [`Library`](crate::sources::Library).
    pub fn add_last_good(&mut self, earlier: &Self, ids: &BTreeSet<ObjectId>, problems: &mut Problems) {
        if ids.is_empty() {
            return;
        }
        for chunk in &earlier.chunks {
            let good = chunk.placements.iter().filter(|placement| placement.substitute.is_none());
            let wanted: HashSet<u32> = good.filter(|one| ids.contains(one.id())).map(|one| one.number).collect();
            if wanted.is_empty() {
                continue;
            }
            let good = Chunk::items(&chunk.pieces).filter(|(position, _)| chunk.roles.of(*position) == Role::Itself);
            let named = good.filter(|(_, item)| wanted.contains(&item.identity.number()));
            // What stood for itself does so again, and nothing else of that text.
            let roles =
                Roles { others: Role::Absent, named: named.map(|(position, _)| (position, Role::Itself)).collect() };
            let file = problems.share_source(Arc::clone(chunk.pieces.source()));
            self.add(Arc::new(Chunk::new(&chunk.pieces, file, roles, false)), problems);
        }
    }

    /// Adds the objects of a text. One that has its number already is told.
    fn add(&mut self, chunk: Arc<Chunk>, problems: &mut Problems) {
        chunk.findings.iter().for_each(|finding| problems.push(finding.clone()));
        let start =
            self.starts.last().map_or(0, |start| start + self.chunks[self.chunks.len() - 1].placements.len() as u32);
        for (position, placement) in (start..).zip(&chunk.placements) {
            if !placement.is_in_force() {
                continue;
            }
            let number = placement.number as usize;
            if self.by_number.len() <= number {
                self.by_number.resize(number + 1, NOWHERE);
            }
            let first = std::mem::replace(&mut self.by_number[number], position);
            if first != NOWHERE && placement.substitute.is_none() {
                let (of, first) = match first.checked_sub(start) {
                    Some(own) => (&*chunk, &chunk.placements[own as usize]),
                    None => self.placement(first),
                };
                if first.substitute.is_none() {
                    let place = problems.place(of.name(first));
                    let help = format!("the other is at {place}; keep one");
                    problems.error(chunk.name(placement), format!("{} is defined twice", placement.id()), help);
                }
            }
        }
        self.starts.push(start);
        self.chunks.push(chunk);
    }

    /// A placement by its position in all chunks.
    fn placement(&self, position: u32) -> (&Chunk, &Placement) {
        let index = self.starts.partition_point(|start| *start <= position) - 1;
        // Chunks without objects begin where the next does; the last of those that begin here has it.
        (&self.chunks[index], &self.chunks[index].placements[(position - self.starts[index]) as usize])
    }

    fn by_number(&self, number: u32) -> Option<(&Chunk, &Placement)> {
        let position = self.by_number.get(number as usize).filter(|position| **position != NOWHERE)?;
        Some(self.placement(*position))
    }

    fn placements(&self) -> impl Iterator<Item = (&Chunk, &Placement)> {
        self.chunks.iter().flat_map(|chunk| chunk.placements.iter().map(|placement| (&**chunk, placement)))
    }

    /// The texts' objects.
    pub(crate) fn chunks(&self) -> &[Arc<Chunk>] {
        &self.chunks
    }

    /// Policies that could not be read and deny what they select.
    pub fn denying(&self) -> impl Iterator<Item = &Denying> {
        self.chunks.iter().flat_map(|chunk| &chunk.denying)
    }

    /// What is another than in a load before; `None` where it has other texts.
    pub(crate) fn changes_since<'m>(&'m self, before: &'m Self) -> Option<Changes<'m>> {
        let pairs = before.chunks.iter().zip(&self.chunks);
        let have_same_texts = before.chunks.len() == self.chunks.len() && pairs.clone().all(|(b, a)| b.file == a.file);
        let others = pairs.filter(|(before, after)| !Arc::ptr_eq(before, after));
        have_same_texts.then(|| Changes { chunks: others.map(|(b, a)| (&**b, &**a)).collect() })
    }

    /// An object by its number.
    pub(crate) fn object<T>(&self, number: u32, of: fn(&Lists) -> &Vec<Object<T>>) -> Option<&Object<T>> {
        let (chunk, _) = self.by_number(number)?;
        of(&chunk.lists).iter().find(|object| object.origin == number)
    }

    /// Puts another in the place of each pod that `change` has one for.
    pub(crate) fn change_pods(&mut self, change: impl FnMut(&Object<Pod>) -> Option<Object<Pod>>) {
        self.change(|lists| &mut lists.pods, change);
    }

    /// The same for services.
    pub(crate) fn change_services(&mut self, change: impl FnMut(&Object<Service>) -> Option<Object<Service>>) {
        self.change(|lists| &mut lists.services, change);
    }

    fn change<T>(
        &mut self,
        of: fn(&mut Lists) -> &mut Vec<Object<T>>,
        mut change: impl FnMut(&Object<T>) -> Option<Object<T>>,
    ) {
        for chunk in &mut self.chunks {
            for object in of(&mut Arc::make_mut(chunk).lists) {
                if let Some(changed) = change(object) {
                    *object = changed;
                }
            }
        }
    }

    /// The object with this number.
    pub fn get(&self, number: u32) -> Option<Origin> {
        let (chunk, placement) = self.by_number(number)?;
        Some(chunk.origin(placement))
    }

    /// The place of the name of the object with this number.
    pub fn place(&self, number: u32) -> Option<Span> {
        let (chunk, placement) = self.by_number(number)?;
        Some(chunk.name(placement))
    }

    /// All objects that are in force, in the order of reading.
    pub fn iter(&self) -> impl Iterator<Item = Origin> + '_ {
        let in_force = self.placements().filter(|(_, placement)| placement.is_in_force());
        in_force.map(|(chunk, placement)| chunk.origin(placement))
    }

    /// How many objects of each kind are in force.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for (kind, count) in self.chunks.iter().flat_map(|chunk| &chunk.counts) {
            *counts.entry(*kind).or_default() += count;
        }
        counts
    }

    /// The object in whose text a place is.
    pub fn at(&self, place: Span) -> Option<&ObjectId> {
        let of_file = self.chunks.iter().filter(|chunk| chunk.file == place.file);
        let mut placements = of_file.flat_map(|chunk| chunk.placements.iter().map(move |one| (chunk, one)));
        let holds = |(chunk, placement): &(&Arc<Chunk>, &Placement)| {
            let span = chunk.extent(placement);
            (span.start..span.end).contains(&place.start)
        };
        placements.find(holds).map(|(_, placement)| placement.id())
    }

    /// All objects in the texts that were read, those that were passed over too.
    pub fn mentioned(&self) -> HashSet<&ObjectId> {
        self.placements().map(|(_, placement)| placement.id()).collect()
    }

    /// The objects that stand for themselves, each with the name of its text.
    pub fn good(&self) -> impl Iterator<Item = (&ObjectId, &str)> {
        let good = self.placements().filter(|(_, placement)| placement.substitute.is_none());
        good.map(|(chunk, placement)| (placement.id(), chunk.pieces.source().name()))
    }
}

/// The newest version of each object of a kind that is read in several, where some text has such.
fn newest_versions<'p>(texts: impl Iterator<Item = &'p Arc<Pieces>>) -> HashMap<&'p ObjectId, u8> {
    let mut newest: HashMap<&ObjectId, u8> = HashMap::new();
    let of_several = texts.filter(|pieces| pieces.has_versions()).flat_map(|pieces| Chunk::items(pieces));
    for (_, item) in of_several.filter(|(_, item)| item.kind.versions.len() > 1) {
        let version = newest.entry(item.identity.id()).or_insert(item.version);
        *version = item.version.min(*version);
    }
    newest
}

/// Reports what was found in a piece of text, at the place where it is now.
fn replay(findings: &[Diagnostic], base: Base, into: &mut impl Extend<Diagnostic>) {
    into.extend(findings.iter().map(|finding| Diagnostic { span: base.place(finding.span), ..finding.clone() }));
}
