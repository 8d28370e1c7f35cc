//! What is known of the objects of one kind, from lists and events: no network, no clock.
//!
//! # Theory
//! A list is put together aside and takes the place of what is known once it is whole ([`Follow::end_list`]), so that one that breaks off
//! changes nothing. Events follow it one by one.
//!
//! Resource versions of one kind grow, and are compared as numbers. [`Follow`] remembers the newest up to which it knows everything: the version of
//! a whole list, then those of events and bookmarks. What says nothing newer than that says nothing: a list from an older cache, after an API server
//! behind was asked, is passed over as a whole, and the events that follow it are passed over until they are newer. So nothing is
//! deleted because of an old list, and nothing comes back because of one. A server that does not number so (an aggregated one may not) is believed in
//! the order in which it speaks. One that goes on being older than what was seen, as after its etcd was set back, is believed
//! once [`Follow::forget_version`] is called.

use std::{collections::HashSet, sync::Arc};

use weir_cluster::resources::{
    ObjectId,
    live::{Live, Set},
};

/// Objects of one kind that are believed; a server that gives more is at fault.
pub const MAX_OBJECTS: usize = 2_000_000;

/// What is known of one kind.
#[derive(Debug)]
pub struct Follow {
    set: Set,
    /// The objects of a list that is not whole yet.
    incoming: Option<Vec<Arc<Live>>>,
    /// Up to which version everything is known.
    seen: Option<u64>,
    /// From where a watch goes on.
    resume: Option<Box<str>>,
    is_whole: bool,
    is_behind: bool,
    /// Counts what changed.
    changes: u64,
}

/// More objects than [`MAX_OBJECTS`].
#[derive(Debug, thiserror::Error)]
#[error("more than {MAX_OBJECTS} objects of one kind")]
pub struct TooMany;

impl Follow {
    /// Nothing is known yet.
    pub fn new(set: Set) -> Self {
        Self { set, incoming: None, seen: None, resume: None, is_whole: false, is_behind: false, changes: 0 }
    }

    /// The objects.
    pub fn set(&mut self) -> &mut Set {
        &mut self.set
    }

    /// Whether there was a whole list.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether the server is behind what was seen before.
    pub fn is_behind(&self) -> bool {
        self.is_behind
    }

    /// Another number whenever the objects are others.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// From which version a watch goes on; `None`: list first.
    pub fn resume(&self) -> Option<&str> {
        self.resume.as_deref()
    }

    /// A list begins.
    pub fn begin_list(&mut self) {
        self.incoming = Some(Vec::new());
        self.resume = None;
    }

    /// An object of the list.
    ///
    /// # Errors
    /// Where there are too many.
    pub fn item(&mut self, object: Live) -> Result<(), TooMany> {
        let known = self.set.get(object.id()).filter(|known| known.is_same(&object)).cloned();
        let incoming = self.incoming.get_or_insert_default();
        if incoming.len() >= MAX_OBJECTS {
            return Err(TooMany);
        }
        // What is held already costs nothing twice.
        incoming.push(known.unwrap_or_else(|| Arc::new(object)));
        Ok(())
    }

    /// The list is whole, as of a version.
    pub fn end_list(&mut self, version: &str) {
        let incoming = self.incoming.take().unwrap_or_default();
        let number = number(version);
        self.resume = Some(version.into());
        if let (Some(seen), Some(number)) = (self.seen, number)
            && number < seen
        {
            self.is_behind = true;
            return;
        }
        (self.seen, self.is_whole, self.is_behind) = (number, true, false);
        let listed: HashSet<&ObjectId> = incoming.iter().map(|object| object.id()).collect();
        let gone: Vec<ObjectId> =
            self.set.iter().map(|object| object.id()).filter(|id| !listed.contains(id)).cloned().collect();
        for id in gone {
            self.remove(&id);
        }
        for object in incoming {
            self.put(object);
        }
    }

    /// An object was added or changed.
    ///
    /// # Errors
    /// Where there are too many.
    pub fn changed(&mut self, object: Live) -> Result<(), TooMany> {
        if self.set.len() >= MAX_OBJECTS {
            return Err(TooMany);
        }
        if self.is_news(&Box::from(object.version())) {
            self.put(Arc::new(object));
        }
        Ok(())
    }

    /// An object was deleted.
    pub fn deleted(&mut self, object: &Live) {
        if self.is_news(object.version()) {
            self.remove(object.id());
        }
    }

    /// Everything up to a version was told.
    pub fn bookmark(&mut self, version: &str) {
        self.is_news(version);
    }

    /// A list or a watch ended, whole or not.
    pub fn ended(&mut self) {
        if self.incoming.take().is_some() {
            self.resume = None;
        }
    }

    /// The server does not have any more what a watch would go on from.
    pub fn expired(&mut self) {
        (self.resume, self.incoming) = (None, None);
    }

    /// The server is believed, though it is older than what was seen.
    pub fn forget_version(&mut self) {
        self.seen = None;
        self.expired();
    }

    /// Takes note of a version; whether it is newer than all that was seen.
    fn is_news(&mut self, version: &str) -> bool {
        self.resume = Some(version.into());
        match (number(version), self.seen) {
            (Some(number), Some(seen)) if number <= seen => {
                self.is_behind &= number < seen;
                false
            }
            (number, _) => {
                (self.seen, self.is_behind) = (number, false);
                true
            }
        }
    }

    fn put(&mut self, object: Arc<Live>) {
        if self.set.get(object.id()).is_none_or(|known| !known.is_same(&object)) {
            self.set.put(object);
            self.changes += 1;
        }
    }

    fn remove(&mut self, id: &ObjectId) {
        let before = self.set.len();
        self.set.remove(id);
        self.changes += u64::from(self.set.len() != before);
    }
}

/// A resource version as a number.
fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use weir_cluster::resources::{
        Identities,
        live::{LiveKind, Reader},
    };

    use super::*;

    struct World {
        reader: Reader,
        kind: LiveKind,
        follow: Follow,
    }

    impl World {
        fn new() -> Self {
            let reader = Reader::new(&Identities::default());
            let kind = LiveKind::new("", "Namespace").unwrap();
            let follow = Follow::new(Set::new(&reader, kind));
            Self { reader, kind, follow }
        }

        /// An object with a value, as of a version.
        fn object(&self, name: u8, value: u64, version: u64) -> Live {
            let json = format!(
                r#"{{"metadata":{{"name":"n{name}","resourceVersion":"{version}","labels":{{"v":"{value}"}}}}}}"#
            );
            self.reader.read(self.kind, &json).unwrap()
        }

        fn list(&mut self, objects: &[(u8, u64)], version: u64) {
            self.follow.begin_list();
            for (name, value) in objects {
                let object = self.object(*name, *value, version);
                self.follow.item(object).unwrap();
            }
            self.follow.end_list(&version.to_string());
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<String> = self.follow.set.iter().map(|object| object.id().name.to_string()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn nothing_goes_before_a_new_list_is_whole() {
        let mut world = World::new();
        world.list(&[(1, 1), (2, 2)], 10);
        world.follow.expired();
        assert_eq!(world.follow.resume(), None);
        world.follow.begin_list();
        let object = world.object(3, 3, 20);
        world.follow.item(object).unwrap();
        assert_eq!(world.names(), ["n1", "n2"]);
        world.follow.ended();
        assert_eq!((world.names().len(), world.follow.resume(), world.follow.is_whole()), (2, None, true));
        world.list(&[(3, 3)], 20);
        assert_eq!((world.names(), world.follow.resume()), (vec!["n3".to_owned()], Some("20")));
    }

    #[test]
    fn a_list_that_is_older_than_what_was_seen_deletes_nothing_and_brings_nothing_back() {
        let mut world = World::new();
        world.list(&[(1, 1), (2, 2)], 10);
        let (new, gone) = (world.object(3, 3, 12), world.object(1, 1, 13));
        world.follow.changed(new).unwrap();
        world.follow.deleted(&gone);
        let changes = world.follow.changes();
        world.list(&[(1, 1)], 11);
        assert!(world.follow.is_behind());
        // The server catches up.
        let (again, change) = (world.object(3, 3, 12), world.object(2, 9, 14));
        world.follow.changed(again).unwrap();
        world.follow.deleted(&gone);
        assert_eq!((world.names().join(" ").as_str(), world.follow.changes()), ("n2 n3", changes));
        assert!(!world.follow.is_behind());
        world.follow.changed(change).unwrap();
        assert_eq!(world.follow.changes(), changes + 1);
        world.list(&[(1, 1)], 11);
        world.follow.forget_version();
        world.list(&[(1, 1)], 11);
        assert_eq!(world.names(), ["n1"]);
    }

    #[test]
    fn what_says_nothing_new_changes_nothing() {
        let mut world = World::new();
        world.list(&[(1, 1)], 10);
        let before = world.follow.changes();
        let heartbeat = world.object(1, 1, 11);
        world.follow.changed(heartbeat).unwrap();
        world.follow.bookmark("15");
        world.list(&[(1, 1)], 20);
        assert_eq!((world.follow.changes(), world.follow.resume()), (before, Some("20")));
    }

    /// What a cluster's history was, and what happens to who follows it.
    #[derive(Clone, Debug)]
    enum Step {
        /// An object gets a value, or goes.
        Write(u8, Option<u64>),
        /// So many events are delivered.
        Watch(u8),
        /// The watch ends; it goes on from where it was, or its place is gone.
        Cut(bool),
        /// A list from a server that is so many versions behind breaks off after so many objects, or not at all.
        List(u8, Option<u8>),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..6_u8, prop::option::of(0..3_u64)).prop_map(|(name, value)| Step::Write(name, value)),
            4 => (1..6_u8).prop_map(Step::Watch),
            1 => any::<bool>().prop_map(Step::Cut),
            2 => (0..8_u8, prop::option::of(0..4_u8)).prop_map(|(behind, broken)| Step::List(behind, broken)),
        ]
    }

    type State = BTreeMap<u8, u64>;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// The twin is the whole history: what is known is always what the cluster was at one moment, and that moment never goes back.
        #[test]
        fn what_is_known_is_a_moment_of_the_cluster_and_never_an_earlier_one(steps in prop::collection::vec(step(), 1..80)) {
            let mut world = World::new();
            let mut history: Vec<State> = vec![State::new()];
            let mut at = 0;
            for step in steps {
                match step {
                    Step::Write(name, value) => {
                        let mut state = history.last().unwrap().clone();
                        match value {
                            Some(value) => drop(state.insert(name, value)),
                            None => drop(state.remove(&name)),
                        }
                        history.push(state);
                    }
                    Step::Watch(count) => {
                        for _ in 0..count {
                            let Some(from) = world.follow.resume().map(|from| from.parse::<usize>().unwrap()) else { break };
                            let next = from + 1;
                            let Some(after) = history.get(next) else { break };
                            let before = &history[from];
                            for name in 0..6 {
                                match (before.get(&name), after.get(&name)) {
                                    (was, Some(is)) if was != Some(is) => {
                                        let object = world.object(name, *is, next as u64);
                                        world.follow.changed(object).unwrap();
                                    }
                                    (Some(was), None) => {
                                        let object = world.object(name, *was, next as u64);
                                        world.follow.deleted(&object);
                                    }
                                    _ => {}
                                }
                            }
                            // A write that changes nothing is told by a bookmark.
                            world.follow.bookmark(&next.to_string());
                        }
                    }
                    Step::Cut(goes_on) => {
                        world.follow.ended();
                        if !goes_on {
                            world.follow.expired();
                        }
                    }
                    Step::List(behind, broken) => {
                        let version = (history.len() - 1).saturating_sub(behind.into());
                        world.follow.begin_list();
                        for (name, value) in history[version].iter().take(broken.map_or(usize::MAX, usize::from)) {
                            let object = world.object(*name, *value, version as u64);
                            world.follow.item(object).unwrap();
                        }
                        match broken {
                            Some(_) => world.follow.ended(),
                            None => world.follow.end_list(&version.to_string()),
                        }
                    }
                }
                let known: State = world.follow.set.iter().map(|object| {
                    let name = object.id().name[1..].parse().unwrap();
                    (name, (0..3).find(|value| world.object(name, *value, 0).is_same(object)).unwrap())
                }).collect();
                let seen = world.follow.seen.map_or(0, |seen| seen as usize);
                prop_assert!(seen >= at, "from {at} back to {seen}");
                at = seen;
                prop_assert_eq!(&known, &history[seen]);
            }
        }
    }
}
