//! What makes an object the same one in two versions of a manifest, and a number for each such identity.
//!
//! Compiled tables name objects by number. A number stays with its identity as long as any version of the object is in
//! use, so that what was made of an unchanged object is unchanged itself; then it is free for another.

use std::{
    fmt,
    hash::BuildHasher,
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use hashbrown::{DefaultHashBuilder, HashSet, HashTable};

use weir_nat::Topology;

use super::meta::Name;

/// What makes an object the same one in two versions of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Its API group, of those that one kind has the first; empty for the core's.
    pub group: &'static str,
    /// Its kind.
    pub kind: &'static str,
    /// Its namespace; empty for kinds without.
    pub namespace: Name,
    /// Its name.
    pub name: Name,
}

impl ObjectId {
    /// Whether it is a policy that is enforced: one that cannot be read denies what it selects.
    pub fn is_policy(&self) -> bool {
        is_enforced_policy(self.kind)
    }
}

/// Whether the objects of a kind are policy that is enforced.
pub(super) fn is_enforced_policy(kind: &str) -> bool {
    matches!(kind, "NetworkPolicy" | "GlobalNetworkPolicy" | "ClusterNetworkPolicy")
}

impl fmt::Display for ObjectId {
    /// "kind namespace/name" or "kind name".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, namespace, name, .. } = self;
        if namespace.is_empty() { write!(f, "{kind} {name}") } else { write!(f, "{kind} {namespace}/{name}") }
    }
}

/// An [`ObjectId`] with its number, which is free again when the last holder drops this.
#[derive(Debug)]
pub struct Identity {
    id: ObjectId,
    number: u32,
    book: Arc<Mutex<Book>>,
}

impl Identity {
    /// Group, kind, namespace and name.
    pub fn id(&self) -> &ObjectId {
        &self.id
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        let mut book = lock(&self.book);
        let hash = book.hasher.hash_one(&self.id);
        // Another may have come for the same object between the last holder's end and this.
        if let Ok(own) = book.known.find_entry(hash, |(_, known)| ptr::eq(known.as_ptr(), self)) {
            own.remove();
        }
        book.free.push(self.number);
    }
}

/// All identities in use.
#[derive(Clone, Debug)]
pub struct Identities {
    book: Arc<Mutex<Book>>,
    /// The texts that objects repeat.
    pub names: Names,
    /// The namespace of objects that give none.
    namespace: Arc<str>,
}

impl Default for Identities {
    /// The namespace is kubectl's.
    fn default() -> Self {
        Self::in_namespace("default")
    }
}

/// Texts that many hold, each once.
#[derive(Clone, Debug, Default)]
pub struct Names {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    names: HashSet<Name>,
    topologies: HashSet<Arc<Topology>>,
    /// How many there were when they were looked through last.
    tidied: usize,
}

impl Names {
    /// The text as it is held already, or held from now on.
    pub fn of(&self, text: &str) -> Name {
        let names = &mut self.known.lock().unwrap_or_else(PoisonError::into_inner).names;
        match names.get(text) {
            Some(name) => Arc::clone(name),
            None => {
                let name = Name::from(text);
                names.insert(Arc::clone(&name));
                name
            }
        }
    }

    /// The same of an endpoint's topology.
    pub fn topology(&self, topology: Topology) -> Arc<Topology> {
        let topologies = &mut self.known.lock().unwrap_or_else(PoisonError::into_inner).topologies;
        match topologies.get(&topology) {
            Some(known) => Arc::clone(known),
            None => {
                let topology = Arc::new(topology);
                topologies.insert(Arc::clone(&topology));
                topology
            }
        }
    }

    /// Forgets what nobody else holds, now and then: when there are half as many again as were left the last time.
    pub fn tidy(&self) {
        let Known { names, topologies, tidied } = &mut *self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() + topologies.len() > *tidied + *tidied / 2 {
            topologies.retain(|topology| Arc::strong_count(topology) > 1);
            names.retain(|name| Arc::strong_count(name) > 1);
            *tidied = names.len() + topologies.len();
        }
    }
}

#[derive(Debug, Default)]
struct Book {
    /// Each with the hash of what it identifies, which it holds itself.
    known: HashTable<(u64, Weak<Identity>)>,
    hasher: DefaultHashBuilder,
    free: Vec<u32>,
    next: u32,
}

impl Identities {
    /// With this namespace for objects that give none.
    pub fn in_namespace(namespace: &str) -> Self {
        Self { book: Arc::default(), names: Names::default(), namespace: namespace.into() }
    }

    /// The namespace of objects that give none.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The identity of an object: the one that is in use, or a new one.
    pub fn of(&self, id: ObjectId) -> Arc<Identity> {
        // What one of the last holders drops takes the lock: these are dropped after it is given back.
        let mut others = Vec::new();
        let mut book = lock(&self.book);
        let hash = book.hasher.hash_one(&id);
        let of_hash = book.known.iter_hash(hash).filter(|(known, _)| *known == hash);
        for identity in of_hash.filter_map(|(_, known)| known.upgrade()) {
            if identity.id == id {
                return identity;
            }
            others.push(identity);
        }
        let number = book.free.pop().unwrap_or_else(|| {
            book.next += 1;
            book.next - 1
        });
        let identity = Arc::new(Identity { id, number, book: Arc::clone(&self.book) });
        book.known.insert_unique(hash, (hash, Arc::downgrade(&identity)), |(hash, _)| *hash);
        identity
    }
}

/// Nobody panics while holding the lock.
fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ObjectId {
        ObjectId { group: "", kind: "Pod", namespace: "x".into(), name: name.into() }
    }

    #[test]
    fn a_number_stays_as_long_as_anybody_holds_it() {
        let identities = Identities::default();
        let (a, b) = (identities.of(id("a")), identities.of(id("b")));
        assert_eq!((a.number(), b.number()), (0, 1));
        let again = identities.of(id("a"));
        assert!(Arc::ptr_eq(&a, &again));
        drop(a);
        assert_eq!(identities.of(id("c")).number(), 2, "a is still held, and c is given back at once");
        drop(again);
        assert_eq!(lock(&identities.book).known.len(), 1);
        let mut numbers = [identities.of(id("d")), identities.of(id("e"))].map(|identity| identity.number());
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 2]);
        assert_eq!(identities.of(id("b")).number(), 1);
    }
}
