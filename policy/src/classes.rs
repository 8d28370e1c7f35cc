//! Numbers for equivalence classes, which stay as they are while what they stand for changes.
//!
//! A class is what is in the same sets: its signature. Tables made from classes (see [`crate::program`]) hold something
//! for each class that is in one of the sets that they use. So that a change makes few of them anew:
//!
//! - A class all of whose members got another signature keeps its number. A set that comes, goes or changes for whole
//!   classes concerns nobody but the users of that set.
//! - A class that has lost its last member leaves what tables have for it; nothing looks it up any more. Its number is
//!   given again later, and then counts as a change for the users of the old class's sets too.
//!
//! [`Classes::take_regrouped`] says which sets' users have to be made anew: those to which a class was added, or a class
//! that has members was taken from.

use std::sync::Arc;

use hashbrown::HashMap;

/// A set of sets, ascending.
pub(crate) type Signature = Arc<[u32]>;

#[derive(Debug)]
struct Class {
    signature: Signature,
    /// How many members it has; a class without any is vacant, but for class 0.
    members: u32,
    vacant: bool,
}

/// Classes by number. Class 0 is that of what is in no set, whether there is any or not.
#[derive(Debug)]
pub(crate) struct Classes {
    classes: Vec<Class>,
    /// Without the vacant ones.
    numbers: HashMap<Signature, u32>,
    vacant: Vec<u32>,
    /// By set: its classes, ascending.
    of_set: Vec<Vec<u32>>,
    regrouped: Vec<u32>,
    signed_anew: Vec<u32>,
}

/// Where members of classes go: into a class that there is, or into one that has no number yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Class(u32),
    Group(u32),
}

/// Members that go into classes that have no number yet.
#[derive(Default)]
pub(crate) struct Groups {
    numbers: HashMap<Signature, u32>,
    groups: Vec<Group>,
}

struct Group {
    signature: Signature,
    members: u32,
    /// Classes that members came from.
    from: Vec<u32>,
}

/// What [`Classes::settle`] did.
#[derive(Default)]
pub(crate) struct Settled {
    /// By group: its class.
    pub(crate) of_group: Vec<u32>,
    /// Classes with a new signature.
    pub(crate) changed: Vec<u32>,
    /// Classes that lost their last member.
    pub(crate) vacated: Vec<u32>,
}

impl Default for Classes {
    fn default() -> Self {
        let nothing = Signature::default();
        Self {
            numbers: [(Arc::clone(&nothing), 0)].into_iter().collect(),
            classes: vec![Class { signature: nothing, members: 0, vacant: false }],
            vacant: Vec::new(),
            of_set: Vec::new(),
            regrouped: Vec::new(),
            signed_anew: Vec::new(),
        }
    }
}

impl Classes {
    /// Numbers of classes are below this.
    pub(crate) fn len(&self) -> usize {
        self.classes.len()
    }

    /// The sets of a class, ascending.
    pub(crate) fn signature(&self, class: u32) -> &[u32] {
        &self.classes[class as usize].signature
    }

    /// The classes of a set, ascending.
    pub(crate) fn of_set(&self, set: u32) -> &[u32] {
        self.of_set.get(set as usize).map_or(&[], Vec::as_slice)
    }

    /// The sets whose users have to be made anew, since this was called last.
    pub(crate) fn take_regrouped(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.regrouped)
    }

    /// The classes that have another signature than when this was called last, ascending: those that sets were regrouped by.
    pub(crate) fn take_signed_anew(&mut self) -> Vec<u32> {
        let mut classes = std::mem::take(&mut self.signed_anew);
        classes.sort_unstable();
        classes.dedup();
        classes
    }

    /// Takes all members out of all classes; to be followed by [`Classes::join`] for each.
    pub(crate) fn empty(&mut self) {
        self.classes.iter_mut().for_each(|class| class.members = 0);
    }

    /// Takes one member out.
    pub(crate) fn leave(&mut self, class: u32) {
        self.classes[class as usize].members -= 1;
    }

    /// Where something goes that has this signature, and was in class `from`.
    pub(crate) fn target(&self, groups: &mut Groups, from: u32, signature: &[u32]) -> Target {
        if let Some(class) = self.numbers.get(signature) {
            return Target::Class(*class);
        }
        let group = match groups.numbers.get(signature) {
            Some(group) => *group,
            None => {
                let (group, signature) = (groups.groups.len() as u32, Signature::from(signature));
                groups.numbers.insert(Arc::clone(&signature), group);
                groups.groups.push(Group { signature, members: 0, from: Vec::new() });
                group
            }
        };
        let sources = &mut groups.groups[group as usize].from;
        if sources.last() != Some(&from) {
            sources.push(from);
        }
        Target::Group(group)
    }

    /// Puts a member in.
    pub(crate) fn join(&mut self, groups: &mut Groups, target: Target) {
        match target {
            Target::Class(class) => self.classes[class as usize].members += 1,
            Target::Group(group) => groups.groups[group as usize].members += 1,
        }
    }

    /// How many sets the members of a target are in.
    pub(crate) fn memberships(&self, groups: &Groups, target: Target) -> usize {
        match target {
            Target::Class(class) => self.signature(class).len(),
            Target::Group(group) => groups.groups[group as usize].signature.len(),
        }
    }

    /// Gives classes to groups.
    pub(crate) fn settle(&mut self, groups: Groups) -> Settled {
        let mut settled = Settled::default();
        for Group { signature, members, from } in groups.groups {
            let left = |class: &&u32| **class != 0 && self.classes[**class as usize].members == 0;
            let class = match from.iter().find(left) {
                Some(class) => self.sign_anew(*class, signature),
                None => self.add(signature),
            };
            self.classes[class as usize].members = members;
            self.signed_anew.push(class);
            settled.of_group.push(class);
            settled.changed.push(class);
        }
        for class in 1..self.classes.len() as u32 {
            let Class { members, vacant, .. } = self.classes[class as usize];
            if members == 0 && !vacant {
                self.vacate(class);
                settled.vacated.push(class);
            }
        }
        settled
    }

    fn sign_anew(&mut self, class: u32, signature: Signature) -> u32 {
        let before = std::mem::replace(&mut self.classes[class as usize].signature, Arc::clone(&signature));
        self.numbers.remove(&before);
        for set in before.iter().filter(|set| signature.binary_search(set).is_err()) {
            self.take_from(*set, class);
            self.regrouped.push(*set);
        }
        for set in signature.iter().filter(|set| before.binary_search(set).is_err()) {
            self.add_to(*set, class);
        }
        self.numbers.insert(signature, class);
        class
    }

    fn add(&mut self, signature: Signature) -> u32 {
        let new = Class { signature: Arc::clone(&signature), members: 0, vacant: false };
        let class = match self.vacant.pop() {
            Some(class) => {
                let before = std::mem::replace(&mut self.classes[class as usize], new);
                self.regrouped.extend(before.signature.iter());
                class
            }
            None => {
                self.classes.push(new);
                (self.classes.len() - 1) as u32
            }
        };
        signature.iter().for_each(|set| self.add_to(*set, class));
        self.numbers.insert(signature, class);
        class
    }

    fn vacate(&mut self, class: u32) {
        let signature = Arc::clone(&self.classes[class as usize].signature);
        self.numbers.remove(&signature);
        signature.iter().for_each(|set| self.take_from(*set, class));
        self.classes[class as usize].vacant = true;
        self.vacant.push(class);
    }

    fn add_to(&mut self, set: u32, class: u32) {
        if self.of_set.len() <= set as usize {
            self.of_set.resize(set as usize + 1, Vec::new());
        }
        let classes = &mut self.of_set[set as usize];
        if let Err(place) = classes.binary_search(&class) {
            classes.insert(place, class);
        }
        self.regrouped.push(set);
    }

    fn take_from(&mut self, set: u32, class: u32) {
        let classes = &mut self.of_set[set as usize];
        if let Ok(place) = classes.binary_search(&class) {
            classes.remove(place);
        }
    }
}

/// What is in one of the two only, into `both`; all ascending.
pub(crate) fn symmetric_difference(a: &[u32], b: &[u32], difference: &mut Vec<u32>) {
    difference.clear();
    let (mut a, mut b) = (a.iter().copied().peekable(), b.iter().copied().peekable());
    loop {
        match (a.peek(), b.peek()) {
            (Some(first), Some(second)) if first == second => {
                a.next();
                b.next();
            }
            (Some(first), Some(second)) if first < second => difference.extend(a.next()),
            (_, Some(_)) => difference.extend(b.next()),
            (Some(_), None) => difference.extend(a.next()),
            (None, None) => return,
        }
    }
}
